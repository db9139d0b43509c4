"""What changes along a run: learning rate, weight decay, momentum, stages; against the specification's formulas."""

import math
from dataclasses import replace

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from parameters import role_of
from training import scales, text, trained

import train_gpt as tg

FALLS = ("warmdown_frac", "warmdown_iters", "warmdown_seconds")


def schedule(**changes):
    """Settings in which nothing moves but what `changes` say."""
    flat = dict(dict.fromkeys(FALLS, 0), lr_warmup_steps=0, min_lr=0.0, max_wallclock_seconds=600.0)
    return replace(tg.Settings(), **{**flat, **changes})


# --- learning rate: curves -------------------------------------------------------------------------------------------


@ref.tries(200)
@given(st.floats(0, 1), st.integers(0, 5000), st.integers(0, 300), st.just(0.0) | st.floats(1e-3, 1), st.floats(0, 1))
def test_learning_rate_by_fraction(progress, step, warmup, frac, floor):
    """max((1 - f) / W, MIN_LR) in the last fraction W, 1 before; a rise over the first steps multiplies it."""
    s = schedule(lr_warmup_steps=warmup, warmdown_frac=frac, min_lr=floor)
    down = 1.0 if progress <= 1 - frac or not frac else max((1 - progress) / frac, floor)
    rise = 1.0 if step >= warmup else (step + 1) / warmup
    assert tg.lr_scale(s, progress, step, 1000) == pytest.approx(rise * down, abs=1e-9)


@ref.tries(100)
@given(st.integers(1, 3000), st.integers(1, 5000), st.floats(0, 1))
def test_learning_rate_by_iterations(iters, total, floor):
    """The last `iters` of `total` steps fall linearly; a run shorter than them falls from its first step."""
    s = schedule(warmdown_iters=iters, warmdown_frac=0.5, min_lr=floor)
    length, before = min(iters, total), math.inf
    for step in np.linspace(0, total, 23).astype(int).tolist():
        scale = tg.lr_scale(s, step / total, step, total)
        assert scale == pytest.approx(max(min(1, (total - step) / length), floor), abs=1e-9)
        assert floor - 1e-12 <= scale <= min(before, 1.0) + 1e-12
        before = scale


@ref.tries(100)
@given(st.floats(1, 700), st.floats(1, 2000), st.floats(0, 1), st.floats(0, 1))
def test_learning_rate_by_seconds(budget, seconds, part, floor):
    """The last `seconds` of the budget fall linearly, whatever the number of steps and WARMDOWN_FRAC."""
    s = schedule(warmdown_seconds=seconds, warmdown_frac=0.5, max_wallclock_seconds=budget, min_lr=floor)
    left = budget * (1 - part)
    want = max(min(1.0, left / min(seconds, budget)), floor)
    for steps in (1, 20000):
        assert tg.lr_scale(s, part, 7, steps) == pytest.approx(want, abs=1e-9)


def test_learning_rate_is_that_of_the_seeds_under_a_clock():
    """mult = min(1, remaining / (3500 * elapsed / steps)), with elapsed, budget and steps as of now."""
    s = schedule(warmdown_iters=3500)
    for elapsed, step in ((100.0, 1000), (300.0, 3000), (500.0, 5200), (599.0, 6900)):
        want = min(1.0, (600 - elapsed) / (3500 * elapsed / step))
        assert tg.lr_scale(s, elapsed / 600, step, step / (elapsed / 600)) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("frac, floor, curve", [
    (0.72, 0.0, {0.0: 1, 0.28: 1, 0.64: 0.5, 1.0: 0}),  # #1539, #1493
    (0.85, 0.1, {0.1: 1, 0.15: 1, 0.575: 0.5, 0.9: 0.1 / 0.85, 0.92: 0.1, 0.95: 0.1, 1.0: 0.1})])  # #1855
def test_published_schedules(frac, floor, curve):
    """The floor cuts the line to zero, it does not lift it."""
    s = schedule(warmdown_frac=frac, min_lr=floor)
    assert {at: tg.lr_scale(s, at, 100, 5000) for at in curve} == pytest.approx(curve, abs=1e-9)


def test_warm_up_rises_monotonically_to_one():
    s = schedule(lr_warmup_steps=50)
    curve = [tg.lr_scale(s, 0.0, step, 1000) for step in range(60)]
    assert all(a <= b for a, b in zip(curve, curve[1:])) and 0 <= curve[0] < 0.05 and curve[-1] == 1
    assert curve[30] < 1


@ref.tries(100)
@given(st.integers(0, 100), st.integers(0, 50), st.integers(0, 50), st.floats(0, 1))
def test_learning_rate_rises_again_after_a_stage(since, again, warmup, progress):
    """By equal steps over SEQ_CHANGE_WARMUP_STEPS, on top of every other schedule; not in the first stage."""
    s = schedule(seq_change_warmup_steps=again, lr_warmup_steps=warmup, warmdown_frac=0.5, min_lr=0.05)
    step = since + 10
    others = tg.lr_scale(replace(s, seq_change_warmup_steps=0), progress, step, 1000)
    rise = (since + 1) / again if since < again else 1.0
    assert tg.lr_scale(s, progress, step, 1000, since) == pytest.approx(rise * others, abs=1e-9)
    assert tg.lr_scale(s, progress, step, 1000) == others


# --- weight decay, momentum: curves ----------------------------------------------------------------------------------


@ref.tries(100)
@given(st.floats(0, 1), st.floats(0.001, 0.999), st.floats(0, 10))
def test_weight_decay_tapers(progress, start, final):
    """1 up to the start, then a straight line that ends at the final multiple with the run."""
    s = schedule(wd_taper_start_frac=start, wd_taper_final_mult=final)
    want = np.interp(progress, [0, start, 1], [1, 1, final])
    assert tg.wd_scale(s, progress) == pytest.approx(want, abs=1e-9)
    assert tg.wd_scale(replace(s, wd_taper_start_frac=0.0), progress) == 1


def test_the_published_taper():
    s = schedule(wd_taper_start_frac=0.7, wd_taper_final_mult=0.5)
    assert [tg.wd_scale(s, f) for f in (0, 0.7, 0.85, 1)] == pytest.approx([1, 1, 0.75, 0.5])


@ref.tries(100)
@given(st.integers(0, 3000), st.integers(0, 2000), st.floats(0, 0.99), st.floats(0, 0.99))
def test_momentum(step, steps, start, end):
    s = schedule(muon_momentum_warmup_start=start, muon_momentum=end, muon_momentum_warmup_steps=steps)
    want = start + (end - start) * min(step / steps, 1) if steps else end
    assert tg.momentum_at(s, step) == pytest.approx(want, abs=1e-9)


# --- in a run --------------------------------------------------------------------------------------------------------

RUN = dict(iterations=8, average="none", warmdown_frac=0, muon_momentum_warmup_steps=0, grad_clip_norm=0,
           train_log_every=1)


def run(folder, name, **changes):
    """(weights, events) of eight steps."""
    return trained(ref.small(**{**text(folder / "data"), **RUN, **changes}), folder / name)


def apart(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_each_step_has_the_momentum_and_the_decay_of_its_own_number(tmp_path, monkeypatch):
    """As the optimizer gets them: the first step the start value, step n the n-th point of either line."""
    seen, step = [], tg.MuonAdam.step
    monkeypatch.setattr(tg.MuonAdam, "step", lambda self, *args: (seen.append(args), step(self, *args))[1])
    run(tmp_path, "watched", muon_momentum_warmup_steps=4, muon_momentum_warmup_start=0.1, muon_momentum=0.9,
        wd_taper_start_frac=0.5, wd_taper_final_mult=0.2)
    _, momenta, decays = zip(*seen)
    assert momenta == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9, 0.9, 0.9, 0.9])
    assert decays == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4])


def test_stages_change_length_and_batch_and_the_rate_rises_again(tmp_path):
    """Half the run has 8 steps of 32 tokens, then 64 come in rows of 16 and the rate climbs over three steps."""
    s = dict(train_seq_schedule="8@0.5,16@1", train_batch_schedule="32@0.5,64@1", micro_batch_tokens=64)
    weights, rows = run(tmp_path, "re-warmed", **s, iterations=16, seq_change_warmup_steps=3)
    assert scales(rows) == pytest.approx([1] * 8 + [1 / 3, 2 / 3] + [1] * 6)
    plain, steady = run(tmp_path, "plain", **s, iterations=16)
    assert scales(steady) == [1] * 16 and apart(weights, plain) > 1e-3
    seen = [sum(row["tokens_per_second"] * row["train_time_ms"] / 1e3 for row in rows if row.get("step") == step
                and row["event"] == "train") for step in (7, 8, 9, 16)]
    assert seen == pytest.approx([7 * 32, 8 * 32, 8 * 32 + 64, 8 * 32 + 8 * 64], rel=1e-6)


@pytest.mark.parametrize("changes, curve", [
    (dict(warmdown_frac=0.5), [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    (dict(warmdown_iters=2), [1, 1, 1, 1, 1, 1, 1, 0.5]),
    (dict(warmdown_frac=0.5, min_lr=0.4), [1, 1, 1, 1, 1, 0.75, 0.5, 0.4]),
    (dict(lr_warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1])],
    ids=["frac", "iters", "floor", "warm-up"])
def test_the_run_follows_the_curve_and_the_weights_follow_the_run(tmp_path, changes, curve):
    weights, rows = run(tmp_path, "changed", **changes)
    assert scales(rows) == pytest.approx(curve)
    assert apart(weights, run(tmp_path, "flat")[0]) > 1e-3


@pytest.mark.parametrize("one, other", [
    (dict(muon_momentum=0.5), dict(muon_momentum=0.9)),
    (dict(muon_momentum_warmup_steps=4, muon_momentum_warmup_start=0.1), dict()),
    (dict(muon_momentum_warmup_steps=4), dict(muon_momentum_warmup_steps=4, muon_momentum_warmup_start=0.1)),
    (dict(muon_momentum_warmup_steps=4, muon_momentum_warmup_start=0.1),
     dict(muon_momentum_warmup_steps=40, muon_momentum_warmup_start=0.1)),
    (dict(wd_taper_start_frac=0.2, muon_wd=2), dict(muon_wd=2)),
    (dict(wd_taper_start_frac=0.2, muon_wd=2), dict(wd_taper_start_frac=0.6, muon_wd=2)),
    (dict(wd_taper_start_frac=0.2, muon_wd=2), dict(wd_taper_start_frac=0.2, wd_taper_final_mult=3, muon_wd=2))],
    ids=lambda c: ",".join(c) or "without")
def test_each_schedule_setting_reaches_the_weights(tmp_path, one, other):
    assert apart(run(tmp_path, "one", **one)[0], run(tmp_path, "other", **other)[0]) > 1e-3


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_taper_touches_matrices_only_and_by_its_factor(tmp_path, optimizer):
    """Two runs of one step, at 6/10 of the run: the decay of matrices is less by the curve, all else is bit-equal."""
    changes = dict(matrix_optimizer=optimizer, muon_wd=1.5, embed_wd=1.5, adam_wd=1.5, matrix_lr=0.1)
    results = []
    for start in (0.0, 0.2):
        s = ref.small(**text(tmp_path / "data"), **{**RUN, **changes}, wd_taper_start_frac=start)
        model = ref.randomise(tg.GPT(s), spread=0.2)
        training = tg.Training(tg.Run(s, tg.Runtime(s, {}), tmp_path / f"{optimizer}{start}", None), model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        tg._train_step(training.run, training, 0.6, 1.0)
        results.append(dict(model.named_parameters()))
    matrices = 0
    for name, constant in results[0].items():
        decay = 0.1 * 1.5 * 0.5 * (0.6 - 0.2) / (1 - 0.2)  # rate x decay x (1 - final multiple) x part of the line
        matrix = role_of(name) == "matrix"
        want = decay * before[name] if matrix else torch.zeros_like(before[name])
        torch.testing.assert_close(results[1][name] - constant, want, rtol=1e-4, atol=1e-6 if matrix else 0.0)
        matrices += matrix
    assert matrices == 3 * 6 + 2


def test_a_run_by_the_clock_falls_in_its_last_seconds(tmp_path):
    """WARMDOWN_SECONDS counts back from the budget; the scale at a logged time is that of the line."""
    budget, length = 1.5, 1.0
    _, rows = run(tmp_path, "clock", max_wallclock_seconds=budget, iterations=0, warmdown_seconds=length)
    for row in rows:
        if row["event"] == "train":
            ended = row["train_time_ms"] / 1e3  # the step's rate was decided when it began, a little earlier
            assert row["lr_scale"] >= min(1.0, (budget - ended) / length) - 1e-9
    early = [row for row in rows if row["event"] == "train" and row["train_time_ms"] < 1e3 * (budget - length)]
    late = [row["lr_scale"] for row in rows if row["event"] == "train"][-1]
    assert all(row["lr_scale"] == 1 for row in early) and early and late < 0.7


@ref.tries(60)
@given(st.lists(st.tuples(st.sampled_from([8, 16, 32]), st.floats(0.01, 0.99)), max_size=3, unique_by=lambda p: p[1]),
       st.lists(st.tuples(st.sampled_from([32, 64, 96]), st.floats(0.01, 0.99)), max_size=3, unique_by=lambda p: p[1]),
       st.floats(0, 1))
def test_stages_are_the_two_schedules_merged(lengths, batches, at):
    """At any progress the stage holds the length and the batch that each schedule says by itself."""
    def table(rows):
        rows = sorted(rows, key=lambda row: row[1])
        return (*rows[:-1], (rows[-1][0], 1.0)) if rows else ()

    s = replace(tg.Settings(), train_seq_len=24, train_batch_tokens=480, train_seq_schedule=table(lengths),
                train_batch_schedule=table(batches))
    stage = next(stage for stage in s.stages if at < stage[0] or stage[0] == 1)
    want = [next((size for size, until in rows if at < until or until == 1), default)
            for rows, default in ((s.train_seq_schedule, 24), (s.train_batch_schedule, 480))]
    assert list(stage[1:]) == want
    assert [until for until, *_ in s.stages] == sorted({until for rows in (s.train_seq_schedule, s.train_batch_schedule)
                                                       for _, until in rows} | {1.0})
