"""Averages of the weights against their closed forms, and the choice among them, which validation text must not see."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import call, command, events, good
from toy import write_shard
from training import VOCAB, text, trained, validation, walk

import train_gpt as tg
from test_optimizer import built, set_gradients

TINY = dict(num_layers=1, model_dim=8, num_heads=2, num_kv_heads=1, bigram_vocab_size=0, ve_dim=0, vocab_size=8)


def averaged(s, path):
    """Average over weights that follow `path`, [(progress, learning-rate scale)]: ([weights after step i], {kind: its

    average by parameter name, or None}).
    """
    model, optimizer = built(s)
    average, history = tg.Average(s, optimizer.banks), []

    def now():
        return {n: p.detach().double().clone() for n, p in model.named_parameters()}

    average.start()
    history.append(now())
    for step, (progress, scale) in enumerate(path, 1):
        set_gradients(model, step)
        optimizer.step(1.0, 0.9)
        average.update(step, progress, scale)
        history.append(now())
    found = {}
    for kind in ("ema", "swa", "lawa"):
        if (weights := average.mean(kind)) is not None:
            average.apply(weights)
        found[kind] = None if weights is None else now()
    return history, found


def close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")


def mixed(history, shares):
    """The sum of share * weights after that step, over {step: share}."""
    assert sum(shares.values()) == pytest.approx(1)
    return {name: sum(share * history[step][name] for step, share in shares.items()) for name in history[0]}


# --- closed forms ----------------------------------------------------------------------------------------------------


@ref.tries(15)
@given(st.sampled_from([0.0, 0.05, 0.4, 0.9]), st.floats(0, 0.999), st.integers(0, 12))
def test_ema_start_and_decay_have_their_closed_form(start, decay, steps):
    """From the initial weights, or from those after the first step at or beyond EMA_START_FRAC."""
    path = [(i / 12, 1.0) for i in range(steps)]
    history, found = averaged(ref.small(**TINY, average="ema", ema_decay=decay, ema_start_frac=start), path)
    first = 0 if start == 0 else 1 + next((i for i, (progress, _) in enumerate(path) if progress >= start), steps)
    if first > steps:
        assert found["ema"] is None
        return
    n = steps - first
    shares = {first: decay**n} | {first + j: (1 - decay) * decay ** (n - j) for j in range(1, n + 1)}
    close(found["ema"], mixed(history, shares))
    assert found["swa"] is found["lawa"] is None


@ref.tries(15)
@given(st.lists(st.floats(0, 1), max_size=14), st.integers(1, 5), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_swa_is_the_mean_of_the_snapshots_at_low_learning_rates(path, every, start):
    s = ref.small(**TINY, average="swa", swa_every=every, swa_start_scale=start)
    history, found = averaged(s, [(0.5, scale) for scale in path])
    steps = [step for step, scale in enumerate(path, 1) if scale < start and step % every == 0]
    assert (found["swa"] is None) == (not steps) and found["ema"] is found["lawa"] is None
    if steps:
        close(found["swa"], mixed(history, dict.fromkeys(steps, 1 / len(steps))))


@ref.tries(15)
@given(st.integers(0, 14), st.integers(1, 5), st.integers(1, 4))
def test_lawa_is_the_mean_of_the_last_snapshots(steps, freq, k):
    s = ref.small(**TINY, average="lawa", lawa_freq=freq, lawa_k=k)
    history, found = averaged(s, [(0.5, 1.0)] * steps)
    taken = list(range(freq, steps + 1, freq))[-k:]
    assert (found["lawa"] is None) == (not taken) and found["ema"] is found["swa"] is None
    if taken:
        close(found["lawa"], mixed(history, dict.fromkeys(taken, 1 / len(taken))))


def test_swa_takes_no_snapshot_in_a_warm_up(tmp_path, monkeypatch):
    """Learning rates are small there, too, and the weights are hardly trained."""
    snapshots, swa = [], tg.Average.swa
    monkeypatch.setattr(tg.Average, "swa", lambda self: (snapshots.append(1), swa(self)))
    trained(ref.small(**text(tmp_path / "text"), average="swa", swa_every=1, swa_start_scale=0.9, lr_warmup_steps=6,
                      iterations=8, warmdown_frac=0.25), tmp_path / "run")
    assert len(snapshots) == 1, "only the last step begins with 1 - 7/8 of the run left, half of its warmdown"


def test_the_choice_of_the_best_keeps_every_kind():
    """The same three averages as alone."""
    path = [(i / 12, 1 - i / 12) for i in range(12)]
    shared = dict(**TINY, ema_decay=0.8, swa_every=2, swa_start_scale=0.5, lawa_freq=3, lawa_k=2)
    _, found = averaged(ref.small(**shared, average="best", eval_seq_len=16, holdout_tokens=32), path)
    for kind in ("ema", "swa", "lawa"):
        alone = averaged(ref.small(**shared, average=kind), path)[1][kind]
        assert all(torch.equal(alone[name], found[kind][name]) for name in alone), kind


def test_ema_of_slow_steps_is_not_swallowed():
    """0.001 of a small difference is lost in bf16; fp32 averages keep it."""
    s = ref.small(average="ema", ema_decay=0.999)
    model, optimizer = built(s)
    average = tg.Average(s, optimizer.banks)

    def fill(value):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(value)

    fill(1.0)
    average.start()
    fill(1.001)
    for step in range(1, 101):
        average.update(step, step / 100, 1.0)
    average.apply(average.mean("ema"))
    for p in model.parameters():
        assert torch.allclose(p, torch.full_like(p, 1.001 - 0.001 * 0.999**100), atol=2e-7)


# --- in a run --------------------------------------------------------------------------------------------------------

HELD = 300  # tokens
RUN = dict(iterations=12, warmdown_frac=0.5, swa_every=2, swa_start_scale=0.7, lawa_freq=2, lawa_k=3, ema_decay=0.7)
# Ends of training that make one candidate or the other the best on held-out text.
ENDS = {"last": dict(), "averages": dict(warmdown_frac=0, swa_start_scale=0, matrix_lr=0.3, tied_embed_lr=0.5),
        "start": dict(warmdown_frac=0, matrix_lr=3, tied_embed_lr=9, scalar_lr=3, ema_decay=0.99999)}


def settings(folder, average, **changes):
    best = dict(holdout_tokens=HELD) if average == "best" else {}
    return ref.small(**{**text(folder / "data"), **RUN, **best, **changes}, average=average)


def held_out_loss(s, weights, tokens):
    """Mean over every target of the text, in float64, by windows of EVAL_SEQ_LEN and one of what is left."""
    model = tg.GPT(s, init=False)
    model.load_state_dict(weights)
    length, nats = s.eval_seq_len, []
    for start in range(0, len(tokens) - 1, length):
        ids = torch.tensor(tokens[start : start + length + 1])
        with torch.no_grad():
            logits = model.logits(model.hidden(ids[None, :-1]))[0].double().numpy()
        nats += [ref.nats(row, int(target)) for row, target in zip(logits, ids[1:])]
    assert len(nats) == len(tokens) - 1
    return sum(nats) / len(nats)


@pytest.mark.parametrize("end", ENDS)
def test_best_is_the_candidate_of_least_loss_on_the_held_out_end_of_the_training_text(tmp_path, end):
    """Each candidate made by a run of its own: 12 steps of 32 tokens end before the held-out part begins."""
    weights, rows = trained(settings(tmp_path, "best", **ENDS[end]), tmp_path / "best")
    (said,) = [row for row in rows if row["event"] == "candidates"]
    assert said["held_out_tokens"] == HELD - 1
    alone = {}
    for kind in ("none", "ema", "swa", "lawa"):
        s = settings(tmp_path, kind, **ENDS[end])
        candidate, events_of = trained(s, tmp_path / kind)
        if not any(row["event"] == "never_reached" and kind in row["what"] for row in events_of):
            alone["last" if kind == "none" else kind] = candidate
    losses = {kind: held_out_loss(s, candidate, walk(1500)[-HELD:]) for kind, candidate in alone.items()}
    assert {key.removesuffix("_loss") for key in said if key.endswith("_loss")} == set(losses)
    for kind, loss in losses.items():
        assert said[f"{kind}_loss"] == pytest.approx(loss, rel=1e-5), kind
    assert said["chosen"] == min(losses, key=losses.get)
    assert (said["chosen"] == "last") == (end == "last")
    assert all(torch.equal(weights[name], alone[said["chosen"]][name]) for name in weights)


def test_the_held_out_text_is_never_trained_on(tmp_path):
    """Other held-out tokens, the same training to the last bit - over three epochs of what is left."""
    runs = []
    for seed in (None, 5):
        tokens = walk(1500) if seed is None else [*walk(1500)[:-HELD], *walk(HELD, seed)]
        s = ref.small(**text(tmp_path / f"data{seed}", tokens[900 - HELD :]), iterations=60, holdout_tokens=HELD,
                      average="best", train_log_every=1)
        runs.append(trained(s, tmp_path / f"run{seed}")[1])
    losses, candidates = zip(*([[row["train_loss"] for row in rows if row["event"] == "train"],
                                [row["last_loss"] for row in rows if row["event"] == "candidates"]] for rows in runs))
    assert len(losses[0]) == 60 and losses[0] == losses[1] and candidates[0] != candidates[1]
    assert max(row["number"] for row in runs[0] if row["event"] == "epoch") >= 2


def test_the_choice_does_not_depend_on_the_validation_text(tmp_path):
    """Validation text that prefers another candidate: the same choice, the same weights."""
    s, chosen = settings(tmp_path, "best", **ENDS["averages"], val_loss_every=4), []
    rng = np.random.default_rng(3)
    for name, ids in (("like", walk(49, 4)), ("noise", rng.integers(0, VOCAB, 49)), ("constant", [7] * 49)):
        val = validation()._replace(tokens=torch.tensor(np.array(ids), dtype=torch.int32))
        weights, rows = trained(s, tmp_path / name, val)
        (said,) = [row for row in rows if row["event"] == "candidates"]
        chosen.append((weights, said, [row["val_loss"] for row in rows if row["event"] == "val"]))
    for weights, said, _ in chosen[1:]:
        assert said == chosen[0][1] and all(torch.equal(weights[name], chosen[0][0][name]) for name in weights)
    assert len({tuple(losses) for *_, losses in chosen}) == 3


def test_other_validation_shards_change_no_bit_of_the_artifact(toy, tmp_path):
    """The whole command, AVERAGE=best, with the validation shard replaced by noise."""
    data, artifacts = next(pair.partition("=")[2] for pair in toy if pair.startswith("DATA_PATH=")), []
    for name in ("as made", "noise"):
        shutil.copytree(data, tmp_path / name)
        if name == "noise":
            noise = np.random.default_rng(0).integers(4, 512, 500)
            write_shard(tmp_path / name / "fineweb_val_000000.bin", noise)
        good(call(command(toy, tmp_path / f"{name} run", f"DATA_PATH={tmp_path / name}", "AVERAGE=best",
                          "HOLDOUT_TOKENS=500", "LAWA_FREQ=2", "PHASES=train")))
        (said,) = events(tmp_path / f"{name} run", "candidates")
        artifacts.append((said, (tmp_path / f"{name} run/model.pg").read_bytes()))
    assert artifacts[0] == artifacts[1]


@pytest.mark.parametrize("kind, changes", [
    ("ema", dict(ema_decay=0.3)), ("ema", dict(ema_start_frac=0.5)), ("swa", dict(swa_every=3)),
    ("swa", dict(swa_start_scale=0.3)), ("lawa", dict(lawa_freq=5)), ("lawa", dict(lawa_k=1))],
    ids=lambda c: c if isinstance(c, str) else ",".join(c))
def test_each_setting_of_an_average_is_live(tmp_path, kind, changes):
    base, other = (trained(settings(tmp_path, kind, **c), tmp_path / f"{len(c)}")[0] for c in ({}, changes))
    last, _ = trained(settings(tmp_path, "none"), tmp_path / "none")
    for a, b in ((base, other), (base, last)):
        assert max((a[name] - b[name]).abs().max().item() for name in a) > 1e-4


@pytest.mark.parametrize("changes", [dict(average="swa", swa_every=50), dict(average="swa", swa_start_scale=0),
                                     dict(average="lawa", lawa_freq=50), dict(average="ema", ema_start_frac=0.99)])
def test_an_average_that_was_never_taken_is_said_and_the_last_weights_are_exported(tmp_path, changes):
    weights, rows = trained(settings(tmp_path, **changes), tmp_path / "run")
    last, _ = trained(settings(tmp_path, "none"), tmp_path / "none")
    assert all(torch.equal(weights[name], last[name]) for name in last)
    assert f"AVERAGE={changes['average']}" in [row["what"] for row in rows if row["event"] == "never_reached"]


def test_best_of_a_run_in_which_no_average_was_taken_is_the_last(tmp_path):
    never = dict(swa_every=50, lawa_freq=50, ema_start_frac=0.99)
    weights, rows = trained(settings(tmp_path, "best", **never), tmp_path / "run")
    last, _ = trained(settings(tmp_path, "none"), tmp_path / "none")
    (said,) = [row for row in rows if row["event"] == "candidates"]
    assert said["chosen"] == "last" and all(torch.equal(weights[name], last[name]) for name in last)


def test_a_checkpoint_holds_every_average(tmp_path):
    """Gone on with after step 10 of 12: the same candidates, of which some snapshots are older than that."""
    s = settings(tmp_path, "best", checkpoint_every=5)
    weights, rows = trained(s, tmp_path / "whole")
    path = tmp_path / "whole/checkpoint_0000010.pt"
    resumed, again = trained(replace(s, resume=str(path)), tmp_path / "resumed")
    assert [row["step"] for row in again if row["event"] == "resume"] == [10]
    (a,), (b,) = ([row for row in events_of if row["event"] == "candidates"] for events_of in (rows, again))
    assert a == b and {"last_loss", "ema_loss", "swa_loss", "lawa_loss"} <= a.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_a_text_too_short_to_hold_out_is_refused(tmp_path):
    with pytest.raises(tg.BadInput, match="HOLDOUT_TOKENS=1500"):
        trained(ref.small(**text(tmp_path / "data"), average="best", holdout_tokens=1500), tmp_path / "run")


def test_a_held_out_token_outside_the_vocabulary_is_named_before_training(tmp_path):
    """Found only when the candidates are scored, it would cost the whole run."""
    tokens = walk(1500)
    tokens[-20] = VOCAB + 3
    s = ref.small(**text(tmp_path / "data", tokens), average="best", holdout_tokens=HELD)
    with pytest.raises(tg.BadInput, match=rf"fineweb_train_000001.bin: token {VOCAB + 3} at offset {1024 + 2 * 780}"):
        trained(s, tmp_path / "run")
    assert not [row for row in events(tmp_path / "run") if row["event"] == "train"]


# --- an average that is too young -------------------------------------------------------------------------------------


def young(rows):
    return [row for row in rows if row["event"] == "young_average"]


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_the_share_that_is_said_is_what_the_average_still_holds_of_its_first_weights(tmp_path, start):
    """Measured: weights that are 1 when the average begins and 0 after every later step."""
    s = replace(settings(tmp_path, "ema"), ema_decay=0.8, ema_start_frac=start)
    rows = young(trained(s, tmp_path / "run")[1])
    begun = 7 if start else 0  # the step that begins at half of 12 is number 7
    model, optimizer = built(ref.small(**TINY, average="ema", ema_decay=0.8, ema_start_frac=start))
    average = tg.Average(replace(ref.small(**TINY), average="ema", ema_decay=0.8, ema_start_frac=start), optimizer.banks)
    for step in range(13):
        for bank in optimizer.banks:
            bank.weight.data.fill_(float(step == begun))
        average.update(step, (step - 1) / 12, 1.0) if step else average.start()
    share = average.mean("ema")[0].mean().item()
    (row,) = rows
    assert row["share"] == pytest.approx(share, rel=1e-5) and f"{share:.1%}" in row["note"]
    assert ("the initial weights" if not start else "the weights after step 7") in row["note"]


def test_the_decay_that_is_advised_is_low_enough(tmp_path):
    s = replace(settings(tmp_path, "ema"), ema_decay=0.99)
    (row,) = young(trained(s, tmp_path / "run")[1])
    advised = float(re.search(r"EMA_DECAY=([\d.]+) ", row["note"])[1])
    assert not young(trained(replace(s, ema_decay=advised), tmp_path / "again")[1])
    assert young(trained(replace(s, ema_decay=advised + 0.01), tmp_path / "more")[1]), "and no lower than that"


def test_a_short_run_with_the_default_decay_says_that_it_exports_its_initial_weights(toy, tmp_path):
    good(call(command(toy, tmp_path, f"EMA_DECAY={tg.Settings().ema_decay}", "PHASES=train")))
    (row,) = young(events(tmp_path))
    assert row["share"] > 0.95 and "AVERAGE=none" in row["note"] and "the initial weights" in row["note"]
    for more in ("AVERAGE=none", "AVERAGE=swa", "EMA_DECAY=0.1"):
        good(call(command(toy, tmp_path / more, more, "PHASES=train")))
        assert not young(events(tmp_path / more)), more


def test_a_late_average_knows_its_age_after_a_resume(toy, tmp_path):
    args = command(toy, tmp_path, "EMA_START_FRAC=0.5", "EMA_DECAY=0.9", "ITERATIONS=8", "PHASES=train")
    good(call([*args, "CHECKPOINT_EVERY=6"]))
    shutil.rmtree(tmp_path / "cut", ignore_errors=True)
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "checkpoint_0000006.pt", tmp_path / "cut")
    good(call([*args, f"OUT_DIR={tmp_path}/cut", "RESUME=auto"]))
    assert young(events(tmp_path)) == young(events(tmp_path / "cut")) != []
