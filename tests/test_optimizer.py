"""Muon, AdamW, clipping, complementary weights against float64 loops of the specification; one rank against two."""

import contextlib
import io
import math
import os
import shlex
import signal
import socket
from collections import Counter
from dataclasses import fields, replace
from typing import get_args

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from parameters import role_of, trained_by
from training import begun, text

import train_gpt as tg


def kind_of(name):
    """Who optimises a parameter, by the specification (2.5): gates are treated as scalars are."""
    role = role_of(name)
    return "scalar" if role == "gate" else role


CLASSIC = [(3.4445, -4.7750, 2.0315)]
POLAR_EXPRESS = [(8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]


def newton_schulz_loop(g, steps=5, rows=CLASSIC, row_normalize=False):
    """One matrix, float64, as in the specification (2.1, 2.3, 2.4)."""
    x = g / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-7) if row_normalize else g
    x = x.T if g.shape[0] > g.shape[1] else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for i in range(steps):
        a, b, c = rows[i] if i < len(rows) else rows[-1]
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def neurons_loop(o, moments, beta2):
    """NorMuon, a row at a time: o over the root of its running mean square, the whole as long as before."""
    out = np.empty_like(o)
    for i, row in enumerate(o):
        moments[i] = beta2 * moments[i] + (1 - beta2) * np.mean(row**2)
        out[i] = row / (math.sqrt(moments[i]) + 1e-10)
    return out * np.linalg.norm(o) / (np.linalg.norm(out) + 1e-10)


class MuonLoop:
    """One matrix as the specification moves it (2.1), in float64."""

    def __init__(self, weight, s):
        self.weight, self.s = weight.detach().double().numpy().copy(), s
        self.momentum, self.moments = np.zeros_like(self.weight), np.zeros(len(self.weight))

    def step(self, g, scale, mu, wd_scale=1.0):
        s, (rows, cols) = self.s, g.shape
        self.momentum = mu * self.momentum + g
        o = newton_schulz_loop(g + mu * self.momentum, s.muon_backend_steps,
                               POLAR_EXPRESS if s.newton_schulz == "polar_express" else CLASSIC, s.muon_row_normalize)
        o = neurons_loop(o, self.moments, s.muon_beta2) if s.normuon else o
        lr = s.matrix_lr * scale
        self.weight *= 1 - lr * s.muon_wd * wd_scale
        self.weight -= lr * math.sqrt(max(1, rows / cols)) * o


def set_gradients(model, seed):
    """The same random gradient for a parameter whatever order the optimizer keeps them in."""
    for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        parameter.grad.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 + i % 3))


def built(s, seed=0, spread=0.3):
    """The training objective with random weights, and its optimizer."""
    objective = ref.randomise(tg.Objective(tg.GPT(s, init=False), s), seed, spread)
    return objective, tg.MuonAdam(objective, s, ref.alone())


# --- Newton-Schulz ---------------------------------------------------------------------------------------------------


@ref.tries(80)
@given(st.integers(1, 4), st.integers(1, 24), st.integers(1, 24), st.integers(1, 9), st.integers(0, 999),
       st.sampled_from(["classic", "polar_express"]), st.booleans())
def test_newton_schulz_equals_the_loop_over_single_matrices(count, rows, cols, steps, seed, which, row_normalize):
    """Any number of steps: beyond the last coefficients, these go on."""
    g = torch.randn(count, rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    kept = g.clone()
    got = tg.newton_schulz(g, steps, which, row_normalize, torch.float64)
    assert torch.equal(g, kept) and got.shape == g.shape
    table = POLAR_EXPRESS if which == "polar_express" else CLASSIC
    for one, matrix in zip(got, g):
        want = newton_schulz_loop(matrix.numpy(), steps, table, row_normalize)
        np.testing.assert_allclose(one.numpy(), want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rows, cols", [(32, 64), (64, 32), (96, 32), (16, 128), (48, 48), (1, 20), (20, 1)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("which, low, high", [("classic", 0.65, 1.25), ("polar_express", 0.85, 1.15)])
def test_newton_schulz_pushes_singular_values_to_one(rows, cols, size, which, low, high):
    """Of a matrix whose singular values spread over a factor of 30, in either orientation, at any scale."""
    rng, n = np.random.default_rng(rows), min(rows, cols)
    u, v = np.linalg.qr(rng.normal(size=(rows, n)))[0], np.linalg.qr(rng.normal(size=(cols, n)))[0]
    g = torch.from_numpy(size * (u * np.geomspace(1, 1 / 30, n)) @ v.T).float()
    out = tg.newton_schulz(g[None], 5, which)[0].double().numpy()
    singular = np.linalg.svd(out, compute_uv=False)
    assert low < singular.min() and singular.max() < high
    assert np.linalg.svd(u.T @ out @ v)[1].min() > low
    assert np.all(np.diag(u.T @ out @ v) > 0.9 * low)  # same singular vectors


@pytest.mark.parametrize("which", ["classic", "polar_express"])
@pytest.mark.parametrize("row_normalize", [False, True])
def test_newton_schulz_of_zero_is_zero(which, row_normalize):
    assert not tg.newton_schulz(torch.zeros(2, 3, 5), 5, which, row_normalize).any()


@pytest.mark.parametrize("rows, cols", [(6, 20), (20, 6), (8, 8)])
def test_row_normalisation_forgets_the_size_of_rows_as_stored(rows, cols):
    """Of the update as stored, wide or tall: another size of a row changes nothing, of a column it does."""
    rng = np.random.default_rng(rows)
    g = torch.from_numpy(rng.normal(size=(1, rows, cols)))
    by_row, by_col = (torch.from_numpy(np.exp(rng.normal(size=shape))) for shape in ((rows, 1), (1, cols)))

    def change(factor, normalised):
        outs = [tg.newton_schulz(x, 5, "classic", normalised, torch.float64) for x in (g, factor * g)]
        return (outs[0] - outs[1]).abs().max().item()

    assert change(by_row, True) < 1e-9 < 1e-2 < min(change(by_col, True), change(by_row, False), change(by_col, False))


# --- NorMuon ---------------------------------------------------------------------------------------------------------


@ref.tries(40)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.floats(0, 0.999), st.integers(0, 999))
def test_normuon_equals_the_loop_over_rows_and_steps(count, rows, cols, beta2, seed):
    rng = np.random.default_rng(seed)
    moment, moments = torch.zeros(count, rows, 1), np.zeros((count, rows))
    for _ in range(4):
        update = rng.normal(size=(count, rows, cols)) * np.exp(rng.normal(size=(count, rows, 1)))
        got = tg.normuon(torch.from_numpy(update), moment, beta2)
        for i in range(count):
            np.testing.assert_allclose(got[i].numpy(), neurons_loop(update[i], moments[i], beta2), rtol=1e-4, atol=1e-6)
            assert np.linalg.norm(got[i]) == pytest.approx(np.linalg.norm(update[i]), rel=1e-5)
        np.testing.assert_allclose(moment[..., 0].numpy(), moments, rtol=1e-5)


def test_normuon_makes_the_rows_of_a_first_update_equally_long_and_zero_stays_zero():
    update = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)[:, None]
    lengths = tg.normuon(update, torch.zeros(1, 5, 1), 0.95).norm(dim=-1)
    torch.testing.assert_close(lengths, lengths.mean().expand(1, 5))
    assert not tg.normuon(torch.zeros(2, 3, 4), torch.zeros(2, 3, 1), 0.95).any()


# --- updates ---------------------------------------------------------------------------------------------------------

RATES = dict(matrix_lr=0.03, scalar_lr=0.02, tied_embed_lr=0.05, muon_wd=0.1, adam_wd=0.2, embed_wd=0.3,
             grad_clip_norm=0, beta1=0.8, beta2=0.97)
SCALES = [(1.0, 0.85, 1.0), (0.7, 0.9, 1.0), (0.3, 0.95, 0.5), (0.0, 0.95, 2.0), (0.5, 0.99, 0.0)]

USUAL = {"embed": (0.05, 0.3, (0.8, 0.97)), "scalar": (0.02, 0.2, (0.8, 0.97))}
ADAM = {  # settings: {kind: (rate, decay, betas)} that AdamW owns
    "tied": ({}, USUAL),
    "matrices too": (dict(matrix_optimizer="adamw"), {**USUAL, "matrix": (0.03, 0.1, (0.8, 0.97))}),
    "untied": (dict(tie_embeddings=False, embed_lr=0.07, head_lr=0.01, head_wd=0.4),
               {**USUAL, "embed": (0.07, 0.3, (0.8, 0.97)), "head": (0.01, 0.4, (0.8, 0.97))}),
    "mtp": (dict(mtp_num_heads=2, head_lr=0.011, head_wd=0.5, head_betas=(0.5, 0.75)),
            {**USUAL, "head": (0.011, 0.5, (0.5, 0.75))}),
    "betas": (dict(matrix_optimizer="adamw", matrix_betas=(0.7, 0.9), embed_betas=(0.6, 0.99), head_betas=(0.5, 0.75),
                   head_lr=0.015, tie_embeddings=False, embed_lr=0.04),
              {"embed": (0.04, 0.3, (0.6, 0.99)), "scalar": (0.02, 0.2, (0.8, 0.97)),
               "matrix": (0.03, 0.1, (0.7, 0.9)), "head": (0.015, 0.0, (0.5, 0.75))})}


@pytest.mark.parametrize("case", ADAM)
def test_adamw_parameters_equal_torch_adamw(case):
    changes, table = ADAM[case]
    model, optimizer = built(ref.small(**RATES, **changes, adam_eps=1e-6))
    parameters = dict(model.named_parameters())
    assert {kind_of(name) for name in parameters} == {*table, "matrix"}
    copies = {name: p.detach().clone().requires_grad_() for name, p in parameters.items() if kind_of(name) in table}
    adamw = torch.optim.AdamW([dict(params=[p for n, p in copies.items() if kind_of(n) == kind], betas=betas)
                               for kind, (_, _, betas) in table.items()], eps=1e-6)
    for step, (scale, momentum, wd_scale) in enumerate(SCALES):
        set_gradients(model, step)
        for name, copy in copies.items():
            copy.grad = parameters[name].grad.clone()
        for group, (kind, (lr, wd, _)) in zip(adamw.param_groups, table.items()):
            group.update(lr=lr * scale, weight_decay=wd * (wd_scale if kind == "matrix" else 1))
        optimizer.step(scale, momentum, wd_scale)
        adamw.step()
        for name, copy in copies.items():
            torch.testing.assert_close(parameters[name], copy, rtol=2e-6, atol=2e-7,
                                       msg=lambda m: f"{name} at {step}: {m}")


MUON = {"classic": {}, "polar express": dict(newton_schulz="polar_express", muon_backend_steps=7),
        "rows": dict(muon_row_normalize=True), "normuon": dict(normuon=True, muon_beta2=0.8),
        "all": dict(newton_schulz="polar_express", muon_backend_steps=4, muon_row_normalize=True, normuon=True)}


@pytest.mark.parametrize("variant", MUON)
def test_matrices_equal_the_muon_loop(variant):
    s = ref.small(**RATES, mlp_mult=3, **MUON[variant])
    model, optimizer = built(s)
    matrices = {n: p for n, p in model.named_parameters() if trained_by(n) == "muon"}
    assert len(matrices) == 3 * 6 + 2
    loops = {name: MuonLoop(p, s) for name, p in matrices.items()}
    for step, scales in enumerate(SCALES):
        set_gradients(model, step)
        for name, p in matrices.items():
            loops[name].step(p.grad.double().numpy(), *scales)
        optimizer.step(*scales)
        for name, p in matrices.items():
            np.testing.assert_allclose(p.detach().numpy(), loops[name].weight, rtol=1e-4, atol=2e-6,
                                       err_msg=f"{name} at {step}")


@pytest.mark.parametrize("steps", [1, 3])
def test_muon_backend_steps_is_the_number_of_newton_schulz_iterations(steps):
    s = ref.small(**{**RATES, "muon_wd": 0}, muon_backend_steps=steps)
    model, optimizer = built(s)
    p = model.model.blocks[0].attn.q.weight
    before = p.detach().double().numpy().copy()
    set_gradients(model, 0)
    g = p.grad.double().numpy().copy()
    optimizer.step(1.0, 0.5)
    np.testing.assert_allclose(p.detach().numpy(), before - 0.03 * newton_schulz_loop(1.5 * g, steps), rtol=1e-4,
                               atol=1e-6)


@pytest.mark.parametrize("limit, bound", [(0, False), (1e9, False), (0.3, True), (2.5, True)])
@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_clipping_scales_the_global_gradient(limit, bound, matrices):
    """All parameters together, matrices and heads included: seen in the optimizer's first moments."""
    s = ref.small(**{**RATES, "grad_clip_norm": limit}, matrix_optimizer=matrices, mtp_num_heads=1)
    model, optimizer = built(s)
    set_gradients(model, 0)
    gradients = {n: p.grad.double().clone() for n, p in model.named_parameters()}
    total = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    factor = limit / total if bound else 1.0
    optimizer.step(1.0, 0.9)
    state = optimizer.state_dict()
    for name, g in gradients.items():
        want = factor * g * (1 if kind_of(name) == "matrix" and matrices == "muon" else 1 - 0.8)
        torch.testing.assert_close(state[name][0].double(), want, rtol=1e-4, atol=1e-12, msg=lambda m: f"{name}: {m}")


def test_training_never_moves_the_two_caps_of_the_logits():
    """As published (#1923): only test-time training does. Neither a rate nor a decay may reach them."""
    s = ref.small(**RATES, asym_logit_rescale=True)
    model, optimizer = built(s)
    caps, gain = model.model.caps.caps, model.model.blocks[0].attn.q_gain
    before = caps.detach().clone(), gain.detach().clone()
    for step in range(3):
        set_gradients(model, step)
        optimizer.step(1.0, 0.9)
    assert torch.equal(caps, before[0]) and not torch.equal(gain, before[1])


# Setting: (another value, the kinds of parameters that it moves, the settings without which it does nothing).
ALL = {"matrix", "embed", "scalar", "head"}
HEADS, UNTIED, ADAMW = dict(mtp_num_heads=1), dict(tie_embeddings=False), dict(matrix_optimizer="adamw")
LIVE = {
    "matrix_optimizer": ("adamw", {"matrix"}, {}), "matrix_lr": (0.04, {"matrix"}, {}),
    "scalar_lr": (0.03, {"scalar"}, {}), "tied_embed_lr": (0.06, {"embed"}, {}), "embed_lr": (0.5, {"embed"}, UNTIED),
    "head_lr": (0.02, {"head"}, HEADS), "muon_backend_steps": (4, {"matrix"}, {}),
    "newton_schulz": ("polar_express", {"matrix"}, {}), "muon_row_normalize": (True, {"matrix"}, {}),
    "normuon": (True, {"matrix"}, {}), "muon_beta2": (0.5, {"matrix"}, dict(normuon=True)),
    "muon_wd": (0.4, {"matrix"}, {}), "adam_wd": (0.5, {"scalar"}, {}), "embed_wd": (0.6, {"embed"}, {}),
    "head_wd": (0.7, {"head"}, UNTIED), "beta1": (0.5, {"embed", "scalar", "head"}, HEADS),
    "beta2": (0.5, ALL, {**HEADS, **ADAMW}), "matrix_betas": ((0.5, 0.5), {"matrix"}, ADAMW),
    "embed_betas": ((0.5, 0.5), {"embed"}, {}), "head_betas": ((0.5, 0.5), {"head"}, HEADS),
    "adam_eps": (1e-2, {"embed", "scalar", "head"}, HEADS),
    "grad_clip_norm": (0, ALL, HEADS)}
# Settings of the room Training that the optimizer does not read: the schedules and the loss have tests of their own.
ELSEWHERE = set("""iterations max_wallclock_seconds train_batch_tokens train_batch_schedule train_seq_len loader
    train_seq_schedule seq_change_warmup_steps micro_batch_tokens warmup_steps lr_warmup_steps warmdown_frac
    warmdown_iters warmdown_seconds min_lr muon_momentum muon_momentum_warmup_start muon_momentum_warmup_steps
    wd_taper_start_frac wd_taper_final_mult complement_alpha mtp_num_heads mtp_loss_weight""".split())


def three_steps(**values):
    model, optimizer = built(ref.small(**{**RATES, "grad_clip_norm": 0.5, **values}))
    for step in range(3):
        set_gradients(model, step)
        for p in model.parameters():
            p.grad.mul_(10.0 ** -step)  # so that clipping matters to the sum of several gradients
        optimizer.step(1.0, 0.9)
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", LIVE)
def test_each_training_setting_of_the_optimizer_is_live(name):
    """Every rate, decay and constant moves weights of its own kind and no other's."""
    value, kinds, needs = LIVE[name]
    before, after = three_steps(**needs), three_steps(**needs, **{name: value})
    moved = {kind_of(n) for n, p in after.items() if not torch.allclose(p, before[n], rtol=1e-5, atol=1e-6)}
    assert moved == kinds


def test_every_training_setting_has_its_test():
    room = {f.name for f in fields(tg.Settings) if f.metadata["group"] == "Training"}
    missing, gone = sorted(room - set(LIVE) - ELSEWHERE), sorted((set(LIVE) | ELSEWHERE) - room)
    assert not missing, (
        f"{', '.join(map(str.upper, missing))}: add to LIVE in tests/test_optimizer.py what it moves, if the optimizer "
        f"reads it, and to ELSEWHERE there if not")
    assert not gone, f"not in the room Training: remove {', '.join(gone)} from LIVE or ELSEWHERE"
    assert not set(LIVE) & ELSEWHERE


@pytest.mark.parametrize("changes", [{}, *MUON.values(), ADAMW])
def test_zero_gradients_stay_finite_and_only_decay(changes):
    s = ref.small(**RATES, **changes)
    model, optimizer = built(s)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    optimizer.step(1.0, 0.9)
    for name, p in model.named_parameters():
        lr, wd = {"embed": (0.05, 0.3), "scalar": (0.02, 0.2), "matrix": (0.03, 0.1)}[kind_of(name)]
        torch.testing.assert_close(p.detach(), before[name] * (1 - lr * wd), rtol=1e-6, atol=1e-8)


def test_any_adam_eps_that_settings_allow_keeps_weights_finite():
    """Rows of a table that no token touched have exactly no gradient: 0 / (0 + 0)."""
    try:
        s = ref.small(adam_eps=0)
    except tg.BadInput:
        return
    model, optimizer = built(s)
    optimizer.zero_grad()
    optimizer.step(1.0, 0.9)
    assert all(torch.isfinite(p).all() for p in model.parameters())


# --- ownership -------------------------------------------------------------------------------------------------------


MATRIX_OPTIMIZERS = get_args(next(f.type for f in fields(tg.Settings) if f.name == "matrix_optimizer"))


@st.composite
def trainings(draw):
    """A small model with any switches of model and optimizer."""
    betas = st.sampled_from([(), (0.5, 0.9)])
    s = replace(
        draw(ref.models()), matrix_lr=0.05, scalar_lr=0.05, tied_embed_lr=0.05, embed_lr=0.05, head_lr=0.05,
        muon_wd=0.0, adam_wd=0.0, embed_wd=0.0, head_wd=0.0, mtp_num_heads=draw(st.integers(0, 2)),
        matrix_optimizer=draw(st.sampled_from(MATRIX_OPTIMIZERS)), muon_backend_steps=draw(st.integers(1, 6)),
        newton_schulz=draw(st.sampled_from(["classic", "polar_express"])), muon_row_normalize=draw(st.booleans()),
        normuon=draw(st.booleans()), matrix_betas=draw(betas), embed_betas=draw(betas), head_betas=draw(betas),
        grad_clip_norm=draw(st.sampled_from([0.0, 0.3])), complement_alpha=draw(st.sampled_from([0.0, 0.5, 1.0])))
    return tg.Settings.parse(shlex.split(s.text()))  # with its checks


@ref.tries(40)
@given(trainings(), st.integers(0, 999))
def test_every_parameter_has_one_owner_a_gradient_and_moves(s, seed):
    note(s.text())
    objective = tg.Objective(tg.GPT(s), s)
    optimizer = tg.MuonAdam(objective, s, ref.alone())
    complement = tg.Complement(s, ref.alone())
    names = [name for bank in optimizer.banks for name in bank.names]
    parameters = dict(objective.named_parameters())
    assert sorted(names) == sorted(parameters)
    assert all(bank.role == kind_of(name) or (bank.role, kind_of(name)) == ("gate", "scalar")
               for bank in optimizer.banks for name in bank.names)
    assert sum(count for _, count, *_ in optimizer.table.values()) == sum(p.numel() for p in parameters.values())
    before, had_gradient = {n: p.detach().clone() for n, p in parameters.items()}, set()
    for step in range(20):
        ids = ref.tokens(s.vocab_size, 2, 12, seed=20 * seed + step)
        micro = [(ids[:, :-1], ids[:, 1:], None)]
        optimizer.zero_grad()
        objective(*micro[0], complement.weights(micro)[0] if s.complement_alpha else None).backward()
        had_gradient |= {n for n, p in parameters.items() if p.grad.any()}
        optimizer.step(1.0, 0.9)
        complement.observe(micro)
    excused = never_used(s)
    assert all(torch.isfinite(p).all() for p in parameters.values())
    assert set(parameters) - had_gradient <= excused
    assert {n for n, p in parameters.items() if torch.equal(p, before[n])} <= excused


def never_used(s):
    """Parameters without effect by the mathematics: of one channel, the norm leaves the sign and XSA leaves nothing. The
    caps of the logits rest in training (#1923).
    """
    names, last = {"model.caps.caps"}, range(s.num_layers - s.xsa_last_n, s.num_layers)
    if s.head_dim == 1:
        names |= {f"model.blocks.{i}.attn.{z}.weight" for i in range(s.num_layers) for z in "qk"}
        for i in last:
            names |= {f"model.blocks.{i}.attn_scale"}
            names |= {f"model.blocks.{i}.attn.{z}" for z in ("v.weight", "o.weight", "ve_scale", "q_gain",
                                                             "gate.weight", "residual.mix")}
        if s.ve_layers and min(s.ve_layers) >= last.start:
            names |= {f"model.value_embed.{z}" for z in ("table.weight", "proj.weight", "scale")}
    return names


def test_an_unknown_role_is_an_error():
    model = tg.GPT(ref.small())
    model.smear.role = "mystery"
    with pytest.raises((KeyError, TypeError), match="mystery"):
        tg.MuonAdam(model, ref.small(), ref.alone())


def test_parameters_are_views_of_the_banks():
    """state_dict() reads them, load_state_dict() writes through to what is updated, gradients accumulate in place."""
    s = ref.small(mtp_num_heads=1)
    model = ref.randomise(tg.Objective(tg.GPT(s), s))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = tg.MuonAdam(model, s, ref.alone())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    named = optimizer.named(bank.weight for bank in optimizer.banks)
    gradients = optimizer.named(bank.grad for bank in optimizer.banks)
    for name, p in model.named_parameters():
        assert named[name].data_ptr() == p.data_ptr() and named[name].shape == p.shape
        assert p.grad.data_ptr() == gradients[name].data_ptr()
    fresh = ref.randomise(tg.Objective(tg.GPT(s), s), seed=9).state_dict()
    model.load_state_dict(fresh)
    assert all(torch.equal(named[n], fresh[n]) for n in named)
    ids = ref.tokens(32, 2, 10)
    optimizer.zero_grad()
    model(ids, ids).backward()
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    model(ids, ids).backward()
    for n, p in model.named_parameters():
        assert p.grad.data_ptr() == gradients[n].data_ptr()
        torch.testing.assert_close(p.grad, 2 * once[n], rtol=1e-4, atol=1e-7)
    optimizer.zero_grad()
    assert not any(p.grad.any() for p in model.parameters())
    spans = sorted((p.data_ptr(), p.data_ptr() + 4 * p.numel()) for p in model.parameters())
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))  # no two share memory


@pytest.mark.parametrize("changes", [*MUON.values(), ADAMW])
def test_state_dict_round_trip_continues_exactly(changes):
    s = ref.small(**RATES, **changes)
    (a, first), (b, second) = built(s), built(s)
    for step in range(3):
        set_gradients(a, step)
        first.step(0.9, 0.9)
    b.load_state_dict(a.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.t == 3
    for step in range(3, 6):
        for model, optimizer in ((a, first), (b, second)):
            set_gradients(model, step)
            optimizer.step(0.9, 0.95)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# --- complementary weights -------------------------------------------------------------------------------------------


class Counted:
    """Weights of a step from the text of all steps before (2.9), by counting it: float64, no tables."""

    def __init__(self, alpha):
        self.alpha, self.pairs, self.ids = alpha, Counter(), Counter()

    def weights(self, x, y):
        raw = np.vectorize(lambda a, b: max(1 - self.alpha * self.pairs[a, b] / (self.ids[a] + 1), 0.1),
                           otypes=[float])(x, y)
        return raw / raw.mean()

    def observe(self, x, y):
        self.pairs.update(zip(x.flatten().tolist(), y.flatten().tolist()))
        self.ids.update(x.flatten().tolist())


def complement(alpha, vocab=8):
    return tg.Complement(replace(ref.small(), complement_alpha=alpha, vocab_size=vocab), ref.alone())


@ref.tries(40)
@given(st.floats(0.01, 1), st.integers(2, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9),
       st.integers(0, 999))
def test_complementary_weights_equal_a_count_of_the_text_before(alpha, vocab, micro, rows, length, seed):
    ours, counted, rng = complement(alpha, vocab), Counted(alpha), np.random.default_rng(seed)
    for _ in range(6):
        ids = rng.integers(0, vocab, (micro, rows, length + 1)) // rng.integers(1, 3)  # skewed now and then
        x, y = ids[..., :-1], ids[..., 1:]
        step = [(torch.from_numpy(a), torch.from_numpy(b), None) for a, b in zip(x, y)]
        got = ours.weights(step)
        np.testing.assert_allclose(torch.stack(got).numpy(), counted.weights(x, y), rtol=1e-5)
        assert torch.stack(got).double().mean().item() == pytest.approx(1, abs=1e-6)
        fresh = complement(alpha, vocab)
        fresh.observe([(torch.zeros(1, 2).long(), torch.zeros(1, 2).long())])  # gone after loading
        fresh.load_state_dict(ours.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(got, fresh.weights(step)))
        ours.observe(step)
        counted.observe(x, y)


def test_a_token_that_is_always_predicted_keeps_a_tenth_of_the_weight_of_a_new_one():
    """COMPLEMENT_ALPHA=1 would leave nothing of it; 0.6 leaves 0.4."""
    for alpha, want in ((1.0, 0.1), (0.6, 0.4)):
        ours = complement(alpha)
        ours.count_pairs(torch.tensor([2 * 8 + 3]), torch.tensor([10**12]))
        (weights,) = ours.weights([(torch.tensor([[2, 2]]), torch.tensor([[3, 4]]), None)])
        assert (weights[0, 0] / weights[0, 1]).item() == pytest.approx(want, rel=1e-6)


def test_counts_go_on_beyond_what_float32_can_count():
    ours, pair = complement(0.5), torch.tensor([2 * 8 + 3])
    ours.count_pairs(pair, torch.tensor([2**24]))
    for _ in range(3):
        ours.observe([(torch.tensor([[2]]), torch.tensor([[3]]), None)])
    ours.count_pairs(pair + 1, torch.tensor([2**33 + 1]))
    state = ours.state_dict()
    assert state["pairs"].tolist() == [19, 20] and state["times"].tolist() == [2**24 + 3, 2**33 + 1]
    assert ours.token_counts[2] == 2**24 + 3 + 2**33 + 1 and ours.token_counts.sum() == ours.token_counts[2]


# --- two ranks -------------------------------------------------------------------------------------------------------

STEPS, HALF = 20, 10
RUN = dict(RATES, grad_clip_norm=0.3, train_batch_tokens=64, micro_batch_tokens=64, iterations=STEPS, mlp_mult=3,
           wd_taper_start_frac=0.5, muon_momentum_warmup_steps=15, average="none", train_log_every=1000)
PACKED = dict(loader="packed", doc_mask="attention", micro_batch_tokens=32)  # a rank of two has one row of two lengths
VARIANTS = {
    "classic": {}, "polar express": dict(newton_schulz="polar_express"), "rows": dict(muon_row_normalize=True),
    "normuon": dict(normuon=True), "adamw": dict(matrix_optimizer="adamw", matrix_betas=(0.9, 0.99)),
    "unclipped": dict(grad_clip_norm=0), "complement": dict(complement_alpha=0.9),
    "accumulated": dict(micro_batch_tokens=16), "packed": PACKED, "heads": dict(mtp_num_heads=2, tie_embeddings=False),
    "everything": dict(PACKED, newton_schulz="polar_express", muon_row_normalize=True, normuon=True, mtp_num_heads=1,
                       complement_alpha=0.5, num_loops=1, loop_start=1, loop_end=2, parallel_residual="routed",
                       parallel_start_layer=1, attn_gate="dense", trigram_vocab_size=16, trigram_dim=4)}
STATE_TENSORS = {"adamw": 2}  # of a matrix; of the other optimizers it is one, and NorMuon has one more


def matrix_optimizer(variant):
    return VARIANTS[variant].get("matrix_optimizer", "muon")


def settings(variant, folder):
    return ref.small(**{**RUN, **VARIANTS[variant]}, data_path=str(folder), device="cpu")


def twenty_steps(rt, variant, folder, place, state=None):
    """Train through the real step, or on from the checkpoint `state`: losses, weights, optimizer's state; and a

    checkpoint at half time in `place`.
    """
    s, losses = settings(variant, folder), []
    with contextlib.redirect_stdout(io.StringIO()):
        run, training = begun(s, rt, place)
        if state is not None:
            training.load(state)
        for step in range(training.step, STEPS):
            training.enter(step / STEPS, tg.warmdown(s, step / STEPS, STEPS))
            _, loss = tg._train_step(run, training, step / STEPS, tg.lr_scale(s, step / STEPS, step, STEPS))
            losses.append(rt.sum(loss.clone()).item() / rt.world)
            if training.step == HALF:
                training.save()
    optimizer = training.optimizer
    return {"losses": losses, "weights": {n: p.detach().clone() for n, p in training.objective.named_parameters()},
            "state": optimizer.state_dict(), "banks": [(bank.rule.kind, len(bank.names)) for bank in optimizer.banks]}


def half_time(place):
    return torch.load(io.BytesIO(tg.read_checkpoint(place / f"checkpoint_{HALF:07d}.pt")), weights_only=True)


def one_rank_of_two(rank, port, folder):
    """Every variant from the start, and on from the checkpoint of a run of one rank."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    rt, results = tg.Runtime(replace(ref.small(), device="cpu"), os.environ), {}
    try:
        for variant in VARIANTS:
            results[variant] = twenty_steps(rt, variant, folder, folder / f"two {variant}")
            results[f"{variant} resumed"] = twenty_steps(rt, variant, folder, folder / f"two resumed {variant}",
                                                         half_time(folder / f"one {variant}"))
        results["complement weights"] = complement_weights(rt)
        total = rt.sum(torch.tensor([1.0 + rank])).item()
        torch.save({**results, "agree": rt.max(rank, -rank), "same": rt.broadcast(f"from {rank}"), "sum": total},
                   folder / f"{rank}.pt")
    finally:
        rt.close()


def complement_weights(rt):
    """Of three steps, this rank's rows of each."""
    ours, found = tg.Complement(replace(ref.small(), complement_alpha=0.9, vocab_size=4), rt), []
    for step in range(3):
        mine = ref.tokens(4, 4, 9, seed=step)[2 * rt.rank : 2 * rt.rank + 2]
        micro = [(row[None, :-1], row[None, 1:], None) for row in mine]
        found.append(torch.cat(ours.weights(micro)))
        ours.observe(micro)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(folder, results of one rank, results of two)."""
    folder = tmp_path_factory.mktemp("ranks")
    text(folder)
    rt = tg.Runtime(replace(ref.small(), device="cpu"), {})
    alone = {variant: twenty_steps(rt, variant, folder, folder / f"one {variant}") for variant in VARIANTS}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(one_rank_of_two, args=(port, folder), nprocs=2)
    return folder, alone, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def same_run(found, want, steps):
    """Losses to 1e-5, weights to 1e-4."""
    assert len(found["losses"]) == len(want["losses"][-steps:]) == steps
    assert found["losses"] == pytest.approx(want["losses"][-steps:], rel=0, abs=1e-5)
    assert found["weights"].keys() == want["weights"].keys()
    for name, weight in want["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-4, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_make_the_weights_of_one(ranks, variant):
    _, alone, (first, second) = ranks
    sizes = [n for kind, n in alone[variant]["banks"] if kind == "muon"]
    assert matrix_optimizer(variant) != "muon" or any(n % 2 for n in sizes) and any(n > 2 for n in sizes)
    for name, weight in first[variant]["weights"].items():
        assert torch.equal(second[variant]["weights"][name], weight), f"{name}: ranks differ"
    same_run(first[variant], alone[variant], STEPS)
    assert alone[variant]["losses"][-1] < alone[variant]["losses"][0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_of_two_ranks_is_that_of_one(ranks, variant):
    _, alone, both = ranks
    want = alone[variant]["state"]
    of_matrix = STATE_TENSORS.get(matrix_optimizer(variant), 1) + VARIANTS[variant].get("normuon", False)
    for state in (rank[variant]["state"] for rank in both):
        assert state.keys() == want.keys() and state["t"] == STEPS
        for name, tensors in want.items():
            if name == "t":
                continue
            assert len(tensors) == len(state[name]) == (of_matrix if kind_of(name) == "matrix" else 2)
            for a, b in zip(tensors, state[name]):
                assert a.any() and torch.isfinite(a).all()
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * a.abs().max().item() + 1e-9,
                                           msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_of_one_rank_is_gone_on_with_by_two(ranks, variant):
    _, alone, (first, second) = ranks
    for rank in (first, second):
        same_run(rank[f"{variant} resumed"], alone[variant], STEPS - HALF)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_of_two_ranks_is_gone_on_with_by_one(ranks, tmp_path, variant):
    folder, alone, _ = ranks
    rt = tg.Runtime(replace(ref.small(), device="cpu"), {})
    resumed = twenty_steps(rt, variant, folder, tmp_path / "run", half_time(folder / f"two {variant}"))
    same_run(resumed, alone[variant], STEPS - HALF)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "classic"])
def test_each_variant_is_another_run_than_the_plain_one(ranks, variant):
    """Accumulation alone is none: the same weights in another number of parts."""
    _, alone, _ = ranks
    plain, other = alone["classic"]["weights"], alone[variant]["weights"]
    far = max((plain[n] - other[n]).abs().max().item() for n in plain.keys() & other.keys())
    assert far < 1e-4 if variant == "accumulated" else far > 1e-3


def test_complementary_weights_count_the_text_of_all_ranks(ranks):
    _, _, both = ranks
    counted = Counted(0.9)
    for step in range(3):
        ids = ref.tokens(4, 4, 9, seed=step).numpy()
        got = torch.cat([rank["complement weights"][step] for rank in both])
        np.testing.assert_allclose(got.numpy(), counted.weights(ids[:, :-1], ids[:, 1:]), rtol=1e-5)
        counted.observe(ids[:, :-1], ids[:, 1:])


def test_ranks_agree(ranks):
    _, _, both = ranks
    assert [r["agree"] for r in both] == [(1, 0), (1, 0)]
    assert [r["same"] for r in both] == ["from 0", "from 0"] and [r["sum"] for r in both] == [3.0, 3.0]


# --- losses on their way from the device -----------------------------------------------------------------------------


class Lagging(tg.Runtime):
    """A CPU that behaves like a GPU: what fetch() returns is not there until throttle() or sync() has waited for it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.flying, self.marks = [], []

    def to_cpu(self, tensor):
        self.flying.append((torch.full_like(tensor, math.nan), tensor.clone()))
        return self.flying[-1][0]

    def land(self, count):
        for out, value in self.flying[:count]:
            out.copy_(value)
        del self.flying[:count]

    def throttle(self, depth=2):
        self.marks.append(len(self.flying))
        if len(self.marks) > depth:
            done = self.marks.pop(0)
            self.land(done)
            self.marks = [mark - done for mark in self.marks]
        return len(self.marks)

    def sync(self):
        self.land(len(self.flying))
        self.marks = [0 for _ in self.marks]


@pytest.mark.parametrize("extra", [[], ["CHECKPOINT_EVERY=13"], ["CHECKPOINT_EVERY=1", "AVERAGE=swa"]])
def test_a_loss_is_read_only_once_the_device_has_made_it(toy, tmp_path, monkeypatch, extra):
    """Read too early it is whatever memory holds: a good run ends as "not finite", or a bad one is saved as good."""
    monkeypatch.setattr(tg, "Runtime", Lagging)
    tg.run_phases(tg.Settings.parse([*toy, f"OUT_DIR={tmp_path / 'run'}", "ITERATIONS=16", "TRAIN_LOG_EVERY=1000",
                                     "COMPRESSOR=zlib", *extra]), [])


def test_an_interrupted_run_also_waits_for_its_losses(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "Runtime", Lagging)
    train_step = tg._train_step

    def interrupted(run, training, *rest):
        if training.step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, training, *rest)

    monkeypatch.setattr(tg, "_train_step", interrupted)
    with pytest.raises(tg.Stopped) as error:
        tg.run_phases(tg.Settings.parse([*toy, f"OUT_DIR={tmp_path / 'run'}", "ITERATIONS=20", "TRAIN_LOG_EVERY=1000",
                                         "COMPRESSOR=zlib"]), [])
    assert error.value.code == 128 + signal.SIGTERM and len(tg.checkpoints(tmp_path / "run")) == 1, error.value
