"""Late QAT: training on the weights that the artifact will hold. Alive in the compiled graph, on the exporter's grid, from
the right step on; and what rounding costs is less for it.
"""

import contextlib
import io
from pathlib import Path

import pytest
import reference as ref
import torch
from runs import events
from training import begun, captured_whole, text, trained, validation, walk

import train_gpt as tg

LATE = dict(iterations=12, average="none", late_qat_threshold=0.5, matrix_bits=3, embed_bits=4, val_loss_every=0)


def shards(tmp_path):
    return text(tmp_path / "text", walk(4000))


def late(tmp_path, **changes):
    return ref.small(**{**LATE, **shards(tmp_path), **changes})


def losses(rows):
    return {row["step"]: row["train_loss"] for row in rows if row["event"] == "train"}


# The grid


@pytest.mark.parametrize("soft", [False, True])
def test_a_grid_rounds_as_the_exporter_does_and_hands_gradients_on(soft):
    w = torch.linspace(-3.3, 3.3, 67)[None].repeat(2, 1).requires_grad_()
    grid = tg.FakeQuant(w, 3, soft)
    grid.step.copy_(torch.tensor([[0.5], [2.0]]))
    for sharpness in (1.0, 4.0, 1000.0):
        grid.sharpness.fill_(sharpness)
        rounded = grid(w)
        hard = (w.detach() / grid.step).round().clamp(-3, 3) * grid.step
        assert (rounded.abs() <= 3 * grid.step + 1e-6).all()
        (slope,) = torch.autograd.grad(rounded.sum(), w)
        if not soft:
            assert torch.equal(rounded, hard) and (slope == 1).all()
            continue
        assert ((rounded - w.clamp(-3 * grid.step, 3 * grid.step)).abs() <= 0.5 * grid.step + 1e-5).all()
        inside = (w.detach() / grid.step).abs() < 3
        assert (slope[inside] >= 0).all() and (sharpness > 5 or 0.5 < slope[inside].mean() < 1.5)
        if sharpness == 1000:
            away = ((w.detach() / grid.step) % 1 - 0.5).abs() > 0.01
            torch.testing.assert_close(rounded[away], hard[away], rtol=0, atol=1e-5)
    numbers = (torch.arange(-3, 4) * 0.5)[None].repeat(2, 1) * torch.tensor([[1.0], [4.0]])
    torch.testing.assert_close(grid(numbers), numbers, rtol=1e-6, atol=1e-6)


KINDS = [dict(), dict(matrix_quant="rtn", embed_quant="rtn", matrix_clip_sigmas=3.0, embed_clip_sigmas=3.0),
         dict(matrix_quant="ternary"), dict(embed_bits=16), dict(attn_bits=16, layer_bits=((1, 5),), tie_embeddings=False),
         dict(embed_dim=8, trigram=True, trigram_vocab_size=9, trigram_dim=4)]


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_the_rounded_forward_is_that_of_the_decoded_artifact(tmp_path, changes):
    """Step by step the exporter's scales; and the model behaves as the file would, in its logits, to rounding."""
    s = tg.replace(late(tmp_path), **changes)
    run, training = begun(s, ref.alone(), tmp_path / "run")
    model, ids = training.model, ref.tokens(s.vocab_size, 2, 16)
    training.enter(0.9, 0.2)
    assert training.qat.on
    steps, done = tg.Quantiser(model, s).steps(), tg.Quantiser(model, s).encode()
    assert training.qat.fake_quants.keys() == {name for name, one in done.items() if one.codec == "int"}
    for name, grid in training.qat.fake_quants.items():
        assert torch.equal(grid.step, steps[name])
        assert torch.equal(grid.step[:, 0], done[name].arrays["scale"].float())
        assert torch.equal(grid(dict(model.named_parameters())[name]), done[name].decode(grid.step.shape[:1] + (-1,)))
    exported = tg.GPT(s, init=False)
    exported.load_state_dict({name: one.decode(p.shape) for (name, p), one in zip(model.named_parameters(), done.values())})
    whole = {name: p for name, p in model.named_parameters() if name not in training.qat.fake_quants}
    exported.load_state_dict({name: p.detach() for name, p in whole.items()}, strict=False)  # scalars are not rounded
    with torch.no_grad():
        rounded, want = model.logits(model.hidden(ids)), exported.logits(exported.hidden(ids))
        torch.testing.assert_close(rounded, want, rtol=1e-5, atol=1e-5)
        training.qat.switch(False)
        assert (model.logits(model.hidden(ids)) - rounded).abs().max() > 1e-3
    assert all(module.fake_quant is None for module in training.qat.modules.values())


def test_scales_follow_the_weights_every_ten_steps(tmp_path, monkeypatch):
    """Between those the step stays; at those it is that of the weights as they are."""
    seen, step = [], tg._train_step

    def watched(run, training, *rest):
        if training.qat.begun is not None:
            name = "blocks.1.mlp.up.weight"
            now = tg.Quantiser(training.model, run.s).steps()[name]
            seen.append((training.step - training.qat.begun, training.qat.fake_quants[name].step.clone(), now))
        return step(run, training, *rest)

    monkeypatch.setattr(tg, "_train_step", watched)
    trained(late(tmp_path, iterations=40, warmdown_frac=1.0, late_qat_threshold=0.65), tmp_path / "run")
    assert [at for at, *_ in seen] == list(range(len(seen))) and len(seen) > 20
    for at, held, now in seen:
        assert torch.equal(held, now) == (at % 10 == 0)
        assert torch.equal(held, seen[at - at % 10][2])


def test_soft_rounding_steepens_from_1_to_16_with_the_fall_of_the_learning_rate(tmp_path, monkeypatch):
    """1 where it begins, at half of the peak rate here, and 16 where the rate comes to nothing."""
    seen, step = [], tg._train_step

    def watched(run, training, progress, scale):
        seen.append((scale, {grid.sharpness.item() for grid in training.qat.fake_quants.values()}))
        return step(run, training, progress, scale)

    monkeypatch.setattr(tg, "_train_step", watched)
    trained(late(tmp_path, iterations=10, warmdown_frac=1.0, qat_rounding="soft"), tmp_path / "run")
    assert [scale for scale, _ in seen] == pytest.approx([1 - number / 10 for number in range(10)])
    assert all(found == {1.0} for scale, found in seen if scale > 0.5)
    for scale, found in seen[6:]:
        assert list(found) == [pytest.approx(16 - 15 * scale / 0.5, rel=1e-5)]


# When


@pytest.mark.parametrize("changes, first", [
    (dict(warmdown_frac=0.5), 10),  # of 12 steps; 1 - p < 0.25
    (dict(warmdown_frac=1.0), 7), (dict(warmdown_frac=0.5, late_qat_threshold=1.0), 7),
    (dict(warmdown_frac=0, warmdown_iters=8, late_qat_threshold=0.75), 7),
    (dict(warmdown_frac=0.5, lr_warmup_steps=11), 10), (dict(warmdown_frac=0.5, min_lr=0.4), 10),
    (dict(warmdown_frac=0.5, min_lr=0.5), None), (dict(warmdown_frac=0), None), (dict(late_qat_threshold=0.0), None)], ids=str)
def test_it_begins_when_the_learning_rate_has_fallen_so_far(tmp_path, changes, first):
    """By the falling part of the schedule alone: a learning rate that is still rising is no reason."""
    s = late(tmp_path, **changes)
    _, rows = trained(s, tmp_path / "run")
    told = [row["step"] for row in rows if row["event"] == "late_qat"]
    assert told == ([first] if first is not None else [])
    missed = [row for row in rows if row["event"] == "never_reached" and row["what"] == "LATE_QAT_THRESHOLD"]
    assert len(missed) == (first is None and s.late_qat_threshold > 0)
    plain = losses(trained(tg.replace(s, late_qat_threshold=0.0), tmp_path / "plain")[1])
    found = losses(rows)
    differ = [step for step in plain if plain[step] != found[step]]
    assert differ == ([step for step in plain if step > first] if first is not None else []), "from that step on, and not before"


@pytest.mark.parametrize("changes", [
    dict(val_loss_every=3), dict(qat_rounding="soft", fit="allocate", matrix_quant="gptq", embed_quant="gptq", gptq_calibration_tokens=64),
    dict(num_loops=1, loop_start=0, loop_end=0, enable_looping_at=0.8)], ids=["ste", "soft, allocate", "loop"])
def test_the_compiled_graph_rounds_and_was_compiled_in_warm_up(tmp_path, monkeypatch, changes):
    """Published trainers switched a flag that tracing had frozen. Captured whole, with no code generated: nothing is
    traced again while the clock runs, and the losses are those of the uncompiled run, which differ from those without.
    """
    s = tg.replace(late(tmp_path, iterations=8, num_layers=1, ve_dim=0, bigram_vocab_size=0, smear_gate="none"), **changes)
    eager = trained(s, tmp_path / "eager")[1]
    without = losses(trained(tg.replace(s, late_qat_threshold=0.0), tmp_path / "without")[1])
    counts = captured_whole(monkeypatch)
    rows = trained(tg.replace(s, compile="on", warmup_steps=1), tmp_path / "compiled")[1]
    torch._dynamo.reset()
    assert counts[0] == counts[1] > 0
    first, found = next(row["step"] for row in rows if row["event"] == "late_qat"), losses(rows)
    assert list(found.values()) == pytest.approx(list(losses(eager).values()), rel=1e-5)
    assert all((abs(found[step] - without[step]) > 1e-4) == (step > first) for step in found)
    scores = [[row["val_loss"] for row in one if row["event"] == "val"] for one in (eager, rows)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5) and len(scores[0]) == (3 if s.val_loss_every else 1)


def test_what_is_validated_is_not_rounded(tmp_path):
    """A score in the middle is of the weights themselves, and the next step is rounded again."""
    s = late(tmp_path, val_loss_every=0)
    plain, scored = (trained(tg.replace(s, val_loss_every=every), tmp_path / str(every))[1] for every in (0, 2))
    assert losses(plain) == losses(scored)
    last = [row["val_loss"] for row in scored if row["event"] == "val"][-1]
    weights = trained(s, tmp_path / "again")[0]
    model, val = tg.GPT(s), validation()
    model.load_state_dict(weights)
    with torch.no_grad():
        found = [model(val.tokens[None, a : a + 16].long(), val.tokens[None, a + 1 : a + 17].long()).item() for a in range(0, 48, 16)]
    assert last == pytest.approx(sum(found) / 3, rel=1e-5)


# What it is for


def packed_loss(s, weights, ids, targets):
    """(loss of the weights, loss of what the artifact holds)."""
    model, found = tg.GPT(s), []
    model.load_state_dict(weights)
    with torch.no_grad():
        found.append(model(ids, targets).item())
        model.load_state_dict({name: one.decode(weights[name].shape) for name, one in tg.Quantiser(model, s).encode().items()})
        found.append(model(ids, targets).item())
    return found


@pytest.mark.parametrize("rounding", ["ste", "soft"])
def test_rounding_costs_less_after_it(tmp_path, rounding):
    """At three and four bits, after a short training: the loss of what is packed less that of the weights."""
    s = late(tmp_path, iterations=90, warmdown_frac=0.7, matrix_lr=0.01, embed_bits=3, qat_rounding=rounding)
    ids = torch.tensor(walk(16 * 96 + 1, 5))
    x, y = ids[:-1].view(-1, 16), ids[1:].view(-1, 16)
    gaps, packed = [], []
    for threshold in (0.0, 0.8):
        how = tg.replace(s, late_qat_threshold=threshold)
        raw, rounded = packed_loss(how, trained(how, tmp_path / str(threshold))[0], x, y)
        gaps.append(rounded - raw)
        packed.append(rounded)
    assert gaps[1] < 0.6 * gaps[0] and packed[1] < packed[0], (gaps, packed)


# Checkpoints and FIT=allocate


ALLOCATED = dict(fit="allocate", matrix_quant="gptq", embed_quant="gptq", gptq_calibration_tokens=64,
                 size_limit=len(Path(tg.__file__).read_bytes()) + 6000)


@pytest.mark.parametrize("changes", [dict(), dict(qat_rounding="soft"), ALLOCATED], ids=["ste", "soft", "allocate"])
def test_a_resumed_run_goes_on_with_the_grid_it_had(tmp_path, monkeypatch, changes):
    """Stopped between two refreshes of the scales, it makes the weights and the moments of a run that was not stopped."""
    s = tg.replace(late(tmp_path, iterations=24, warmdown_frac=1.0, late_qat_threshold=0.8), **changes)
    weights, rows = trained(s, tmp_path / "whole")
    step = tg._train_step

    def stopped(run, training, *rest):
        if training.step == 13:
            raise KeyboardInterrupt
        return step(run, training, *rest)

    monkeypatch.setattr(tg, "_train_step", stopped)
    halves = tg.replace(s, checkpoint_every=13, resume="auto", out_dir=str(tmp_path / "halves"))
    with pytest.raises(KeyboardInterrupt):
        trained(halves, tmp_path / "halves")
    monkeypatch.undo()
    again, more = trained(halves, tmp_path / "halves")
    assert [row["step"] for row in more if row["event"] == "resume"] == [13]
    assert sum(row["event"] == "late_qat" for row in more) == 1, "it had begun"
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_the_grid_of_an_allocation_is_chosen_once_and_is_that_of_the_artifact(tmp_path):
    s = tg.replace(late(tmp_path, iterations=24, warmdown_frac=1.0), **ALLOCATED)
    rt, out = tg.Runtime(s, {}), tmp_path / "run"
    model = ref.randomise(tg.GPT(s, attend=tg.attend_sdpa), spread=0.2)
    run, kept, rooms = tg.Run(s, rt, out, tg.attend_sdpa), [], []
    choose, spacing = tg.LateQAT._set, tg.Quantiser.spacing_for
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(tg.LateQAT, "_set", lambda self, steps: (kept.append(steps), choose(self, steps)))
        patch.setattr(tg.Quantiser, "spacing_for", lambda *args: (rooms.append(args[1]), spacing(*args))[1])
        curvature = tg.train(run, model, validation())
    assert len(kept) == 1 and [row["event"] for row in events(out)].count("calibrate") == 1, "another grid would undo it"
    assert rooms == [s.size_limit - len(run.source)], "what the code leaves, as for the export"
    (steps,) = kept
    assert all(steps[name].shape == p.shape for name, p in model.named_parameters() if name in steps)
    assert steps.keys() == curvature.keys()
    with contextlib.redirect_stdout(io.StringIO()):
        path = tg.export(run, model, "", curvature)
    assert path.stat().st_size + len(run.source) <= s.size_limit
    assert not run.validity.reasons
