"""Muon, AdamW, clipping, schedules, averages against float64 loops of the specification; one rank against two."""

import math
import os
import signal
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference as ref
import train_gpt as tg

TABLES = ("embed.weight", "bigram.table.weight", "value_embed.table.weight")


def kind_of(name, parameter):
    """Who optimises a parameter, by the specification's table (2.5): not by what the model says of itself."""
    return "embed" if name in TABLES else "matrix" if parameter.ndim == 2 and name.endswith(".weight") else "scalar"


def newton_schulz_loop(g, steps=5):
    """One matrix, float64, as in the specification (2.1)."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def set_gradients(model, seed):
    """The same random gradient for a parameter whatever order the optimizer keeps them in."""
    for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        parameter.grad.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 + i % 3))


def built(s, seed=0, spread=0.3):
    model = ref.randomise(tg.GPT(s, init=False), seed, spread)
    return model, tg.MuonAdam(model, s, ref.alone())


# --- Newton-Schulz ---------------------------------------------------------------------------------------------------


@ref.tries(40)
@given(st.integers(1, 4), st.integers(1, 24), st.integers(1, 24), st.integers(1, 7), st.integers(0, 999))
def test_newton_schulz_equals_the_loop_over_single_matrices(count, rows, cols, steps, seed):
    g = torch.randn(count, rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    kept = g.clone()
    got = tg.newton_schulz(g, steps, torch.float64)
    assert torch.equal(g, kept) and got.shape == g.shape
    for one, matrix in zip(got, g):
        np.testing.assert_allclose(one.numpy(), newton_schulz_loop(matrix.numpy(), steps), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows, cols", [(32, 64), (64, 32), (96, 32), (16, 128), (48, 48), (1, 20), (20, 1)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_newton_schulz_pushes_singular_values_to_one(rows, cols, size):
    """Of a matrix whose singular values spread over a factor of 30, in either orientation, at any scale."""
    rng, n = np.random.default_rng(rows), min(rows, cols)
    u, v = np.linalg.qr(rng.normal(size=(rows, n)))[0], np.linalg.qr(rng.normal(size=(cols, n)))[0]
    g = torch.from_numpy(size * (u * np.geomspace(1, 1 / 30, n)) @ v.T).float()
    out = tg.newton_schulz(g[None], 5)[0].double().numpy()
    singular = np.linalg.svd(out, compute_uv=False)
    assert 0.65 < singular.min() and singular.max() < 1.25
    assert np.linalg.svd(u.T @ out @ v)[1].min() > 0.65
    assert np.all(np.diag(u.T @ out @ v) > 0.6)  # same singular vectors


def test_newton_schulz_of_zero_is_zero():
    assert not tg.newton_schulz(torch.zeros(2, 3, 5), 5).any()


# --- updates ---------------------------------------------------------------------------------------------------------

RATES = dict(matrix_lr=0.03, scalar_lr=0.02, tied_embed_lr=0.05, muon_wd=0.1, adam_wd=0.2, embed_wd=0.3,
             grad_clip_norm=0, beta1=0.8, beta2=0.97)
SCALES = [(1.0, 0.85), (0.7, 0.9), (0.3, 0.95), (0.0, 0.95), (0.5, 0.99)]


def test_adamw_parameters_equal_torch_adamw():
    s = ref.small(**RATES, adam_eps=1e-6)
    model, optimizer = built(s)
    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()
              if kind_of(name, p) != "matrix"}
    groups = [dict(params=[p for n, p in copies.items() if kind_of(n, p) == role], lr=lr, weight_decay=wd)
              for role, lr, wd in (("embed", 0.05, 0.3), ("scalar", 0.02, 0.2))]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.97), eps=1e-6)
    peak = [g["lr"] for g in adamw.param_groups]
    for step, (scale, momentum) in enumerate(SCALES):
        set_gradients(model, step)
        for name, copy in copies.items():
            copy.grad = dict(model.named_parameters())[name].grad.clone()
        for group, lr in zip(adamw.param_groups, peak):
            group["lr"] = lr * scale
        optimizer.step(scale, momentum)
        adamw.step()
        for name, copy in copies.items():
            torch.testing.assert_close(dict(model.named_parameters())[name], copy, rtol=2e-6, atol=1e-7,
                                       msg=lambda m: f"{name} at {step}: {m}")


def test_matrices_equal_the_muon_loop():
    s = ref.small(**RATES, mlp_mult=3)
    model, optimizer = built(s)
    matrices = {n: p for n, p in model.named_parameters() if kind_of(n, p) == "matrix"}
    assert len(matrices) == 3 * 6 + 2
    weight, momentum_of = {n: p.detach().double().numpy().copy() for n, p in matrices.items()}, dict.fromkeys(matrices,
                                                                                                              0.0)
    for step, (scale, mu) in enumerate(SCALES):
        set_gradients(model, step)
        for name, p in matrices.items():
            g, lr = p.grad.double().numpy().copy(), 0.03 * scale
            momentum_of[name] = mu * momentum_of[name] + g
            rows, cols = g.shape
            weight[name] *= 1 - lr * 0.1
            weight[name] -= lr * math.sqrt(max(1, rows / cols)) * newton_schulz_loop(g + mu * momentum_of[name])
        optimizer.step(scale, mu)
        for name, p in matrices.items():
            np.testing.assert_allclose(p.detach().numpy(), weight[name], rtol=1e-4, atol=2e-6,
                                       err_msg=f"{name} at {step}")


@pytest.mark.parametrize("steps", [1, 3])
def test_muon_backend_steps_is_the_number_of_iterations(steps):
    s = ref.small(**{**RATES, "muon_wd": 0}, muon_backend_steps=steps)
    model, optimizer = built(s)
    p = model.blocks[0].attn.q.weight
    before = p.detach().double().numpy().copy()
    set_gradients(model, 0)
    g = p.grad.double().numpy().copy()
    optimizer.step(1.0, 0.5)
    np.testing.assert_allclose(p.detach().numpy(), before - 0.03 * newton_schulz_loop(1.5 * g, steps), rtol=1e-4,
                               atol=1e-6)


@pytest.mark.parametrize("limit, bound", [(0, False), (1e9, False), (0.3, True), (2.5, True)])
def test_clipping_scales_the_global_gradient(limit, bound):
    """All parameters together, matrices included: seen in the optimizer's first moments."""
    s = ref.small(**{**RATES, "grad_clip_norm": limit})
    model, optimizer = built(s)
    set_gradients(model, 0)
    gradients = {n: p.grad.double().clone() for n, p in model.named_parameters()}
    total = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    factor = limit / total if bound else 1.0
    optimizer.step(1.0, 0.9)
    state = optimizer.state_dict()
    for name, g in gradients.items():
        want = factor * g * (1 if kind_of(name, g) == "matrix" else 1 - 0.8)
        torch.testing.assert_close(state[name][0].double(), want, rtol=1e-4, atol=1e-12, msg=lambda m: f"{name}: {m}")


def test_each_training_setting_of_the_optimizer_is_live():
    """Every rate, decay and constant moves weights of its own kind and no other's."""
    base = dict(RATES, grad_clip_norm=0.5, muon_backend_steps=5, adam_eps=1e-8)
    changed = dict(matrix_lr=0.04, scalar_lr=0.03, tied_embed_lr=0.06, muon_wd=0.4, adam_wd=0.5, embed_wd=0.6,
                   grad_clip_norm=0, beta1=0.5, beta2=0.5,
                   muon_backend_steps=4, adam_eps=1e-2)
    moves = dict(matrix_lr={"matrix"}, scalar_lr={"scalar"}, tied_embed_lr={"embed"}, muon_wd={"matrix"},
                 adam_wd={"scalar"}, embed_wd={"embed"},
                 grad_clip_norm=set(), beta1={"embed", "scalar"}, beta2={"embed", "scalar"},
                 muon_backend_steps={"matrix"},
                 adam_eps={"embed", "scalar"})

    def weights(**values):
        model, optimizer = built(ref.small(**values))
        for step in range(3):
            set_gradients(model, step)
            for p in model.parameters():
                p.grad.mul_(10.0 ** -step)  # so that clipping matters to the sum of several gradients
            optimizer.step(1.0, 0.9)
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    before = weights(**base)
    for name, value in changed.items():
        after = weights(**{**base, name: value})
        kinds = {kind_of(n, p) for n, p in after.items() if not torch.allclose(p, before[n], rtol=1e-5, atol=1e-6)}
        assert kinds == moves[name] or name == "grad_clip_norm" and kinds == {"matrix", "embed", "scalar"}, name


def test_zero_gradients_stay_finite_and_only_decay():
    s = ref.small(**RATES)
    model, optimizer = built(s)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    optimizer.step(1.0, 0.9)
    for name, p in model.named_parameters():
        lr, wd = {"embed": (0.05, 0.3), "scalar": (0.02, 0.2), "matrix": (0.03, 0.1)}[kind_of(name, p)]
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


@ref.tries(25)
@given(ref.models(), st.integers(0, 999))
def test_every_parameter_has_one_owner_a_gradient_and_moves(s, seed):
    s = replace(s, matrix_lr=0.05, scalar_lr=0.05, tied_embed_lr=0.05, muon_wd=0.0, adam_wd=0.0, embed_wd=0.0)
    model = tg.GPT(s)
    optimizer = tg.MuonAdam(model, s, ref.alone())
    names = [name for bank in optimizer.banks for name in bank.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(count for _, count, *_ in optimizer.table.values()) == sum(p.numel() for p in model.parameters())
    before, had_gradient = {n: p.detach().clone() for n, p in model.named_parameters()}, set()
    for step in range(20):
        ids = ref.tokens(s.vocab_size, 2, 12, seed=20 * seed + step)
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        had_gradient |= {n for n, p in model.named_parameters() if p.grad.any()}
        optimizer.step(1.0, 0.9)
    excused = never_used(s)
    assert {n for n, _ in model.named_parameters()} - had_gradient <= excused
    assert {n for n, p in model.named_parameters() if torch.equal(p, before[n])} <= excused


def never_used(s):
    """Parameters without effect by the mathematics: of one channel, the norm leaves the sign and XSA leaves nothing."""
    names = set()
    if s.head_dim == 1:
        names |= {f"blocks.{i}.attn.{z}.weight" for i in range(s.num_layers) for z in "qk"}
        for i in range(s.num_layers - s.xsa_last_n, s.num_layers):
            names |= {f"blocks.{i}.attn_scale"}
            names |= {f"blocks.{i}.attn.{z}" for z in ("v.weight", "o.weight", "ve_scale", "q_gain")}
        if s.ve_layers and min(s.ve_layers) >= s.num_layers - s.xsa_last_n:
            names |= {"value_embed.table.weight", "value_embed.proj.weight", "value_embed.scale"}
    return names


def test_an_unknown_role_is_an_error():
    model = tg.GPT(ref.small())
    model.smear.role = "mystery"
    with pytest.raises((KeyError, TypeError), match="mystery"):
        tg.MuonAdam(model, ref.small(), ref.alone())


def test_parameters_are_views_of_the_banks():
    """state_dict() reads them, load_state_dict() writes through to what is updated, gradients accumulate in place."""
    s = ref.small()
    model = ref.randomise(tg.GPT(s))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = tg.MuonAdam(model, s, ref.alone())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    named = optimizer.named(bank.weight for bank in optimizer.banks)
    gradients = optimizer.named(bank.grad for bank in optimizer.banks)
    for name, p in model.named_parameters():
        assert named[name].data_ptr() == p.data_ptr() and named[name].shape == p.shape
        assert p.grad.data_ptr() == gradients[name].data_ptr()
    fresh = ref.randomise(tg.GPT(s), seed=9).state_dict()
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


def test_state_dict_round_trip_continues_exactly():
    s = ref.small(**RATES)
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


# --- schedules -------------------------------------------------------------------------------------------------------


@ref.tries(200)
@given(st.floats(0, 1), st.integers(0, 5000), st.integers(0, 300), st.just(0.0) | st.floats(1e-3, 1), st.floats(0, 1))
def test_learning_rate_by_fraction(progress, step, warmup, frac, floor):
    s = replace(tg.Settings(), lr_warmup_steps=warmup, warmdown_frac=frac, warmdown_iters=0, min_lr=floor)
    down = 1.0 if frac == 0 or progress <= 1 - frac else (1 - progress) / frac
    rise = 1.0 if step >= warmup else (step + 1) / warmup
    assert tg.lr_scale(s, progress, step, 1000) == pytest.approx(rise * (floor + (1 - floor) * down), abs=1e-9)


@ref.tries(100)
@given(st.integers(1, 3000), st.integers(1, 5000), st.floats(0, 1))
def test_learning_rate_by_iterations(iters, total, floor):
    """The last `iters` of `total` steps fall linearly; a run shorter than them falls from its first step."""
    s = replace(tg.Settings(), warmdown_iters=iters, warmdown_frac=0.5, min_lr=floor, lr_warmup_steps=0)
    length, before = min(iters, total), math.inf
    for step in np.linspace(0, total, 23).astype(int).tolist():
        scale = tg.lr_scale(s, step / total, step, total)
        assert scale == pytest.approx(floor + (1 - floor) * min(1, (total - step) / length), abs=1e-9)
        assert floor - 1e-12 <= scale <= min(before, 1.0) + 1e-12
        before = scale


def test_learning_rate_is_that_of_the_seeds_under_a_clock():
    """mult = min(1, remaining / (3500 * elapsed / steps)), with elapsed, budget and steps as of now."""
    s = replace(tg.Settings(), warmdown_iters=3500, warmdown_frac=0.0)
    for elapsed, step in ((100.0, 1000), (300.0, 3000), (500.0, 5200), (599.0, 6900)):
        want = min(1.0, (600 - elapsed) / (3500 * elapsed / step))
        assert tg.lr_scale(s, elapsed / 600, step, step / (elapsed / 600)) == pytest.approx(want, abs=1e-9)


def test_warm_up_rises_monotonically_to_one():
    s = replace(tg.Settings(), lr_warmup_steps=50, warmdown_frac=0.0, warmdown_iters=0)
    scales = [tg.lr_scale(s, 0.0, step, 1000) for step in range(60)]
    assert all(a <= b for a, b in zip(scales, scales[1:])) and 0 <= scales[0] < 0.05 and scales[-1] == 1
    assert scales[30] < 1


@ref.tries(100)
@given(st.integers(0, 3000), st.integers(0, 2000), st.floats(0, 0.99), st.floats(0, 0.99))
def test_momentum(step, steps, start, end):
    s = replace(tg.Settings(), muon_momentum_warmup_start=start, muon_momentum=end, muon_momentum_warmup_steps=steps)
    want = start + (end - start) * min(step / steps, 1) if steps else end
    assert tg.momentum_at(s, step) == pytest.approx(want, abs=1e-9)


# --- averages --------------------------------------------------------------------------------------------------------


def averaged(s, walk):
    """Average over weights that follow `walk`, [(progress, learning-rate scale)]: (weights, their average or None)."""
    model, optimizer = built(s)
    average, history = tg.Average(s, optimizer.banks), []
    average.start()
    history.append({n: p.detach().double().clone() for n, p in model.named_parameters()})
    for step, (progress, scale) in enumerate(walk, 1):
        set_gradients(model, step)
        optimizer.step(1.0, 0.9)
        average.update(step, progress, scale)
        history.append({n: p.detach().double().clone() for n, p in model.named_parameters()})
    taken = average.apply()
    assert taken or all(torch.equal(p.double(), history[-1][n]) for n, p in model.named_parameters())
    return history, {n: p.detach().double() for n, p in model.named_parameters()} if taken else None


def close(got, want):
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("start", [0.0, 0.4])
def test_ema_has_its_closed_form(start):
    """From the initial weights, or from those after the first step at or beyond EMA_START_FRAC."""
    walk, decay = [(i / 10, 1.0) for i in range(10)], 0.9
    history, got = averaged(ref.small(average="ema", ema_decay=decay, ema_start_frac=start), walk)
    first = 0 if start == 0 else 1 + next(i for i, (progress, _) in enumerate(walk) if progress >= start)
    n = len(walk) - first
    weights = [decay**n] + [(1 - decay) * decay ** (n - j) for j in range(1, n + 1)]
    assert sum(weights) == pytest.approx(1)
    close(got, {name: sum(w * history[first + j][name] for j, w in enumerate(weights)) for name in history[0]})


def test_swa_is_the_mean_of_its_snapshots():
    walk = [(i / 20, 1 - i / 20) for i in range(20)]  # scale below 0.5 from step 12 on
    history, got = averaged(ref.small(average="swa", swa_every=3, swa_start_scale=0.5), walk)
    steps = [step for step, (_, scale) in enumerate(walk, 1) if scale < 0.5 and step % 3 == 0]
    assert steps == [12, 15, 18]
    close(got, {name: sum(history[step][name] for step in steps) / 3 for name in history[0]})


@pytest.mark.parametrize("changes", [dict(average="none"), dict(average="swa", swa_every=50),
                                     dict(average="swa", swa_start_scale=0),
                                     dict(average="ema", ema_start_frac=0.99)])
def test_an_average_that_was_never_taken_says_so_and_changes_nothing(changes):
    assert averaged(ref.small(**changes), [(i / 10, 1.0) for i in range(6)])[1] is None


def test_ema_of_slow_steps_is_not_swallowed():
    """0.001 of a small difference is lost in bf16; fp32 averages keep it."""
    s = ref.small(average="ema", ema_decay=0.999)
    model, optimizer = built(s)
    average = tg.Average(s, optimizer.banks)
    average.start()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
        average.sums = [torch.ones_like(t) for t in average.sums]
        for p in model.parameters():
            p.fill_(1.001)
    for step in range(1, 101):
        average.update(step, step / 100, 1.0)
    average.apply()
    for p in model.parameters():
        assert torch.allclose(p, torch.full_like(p, 1.001 - 0.001 * 0.999**100), atol=2e-7)


# --- two ranks -------------------------------------------------------------------------------------------------------

CLIPS = ("0", "0.5")  # off: the size of the averaged gradient shows in the optimizer's state


def train_a_little(rt, share, clip):
    """Five steps on this rank's share of fixed batches of four rows, with a state_dict round trip in the middle."""
    s = ref.small(**{**RATES, "grad_clip_norm": clip})
    model = ref.randomise(tg.GPT(s), spread=0.2)
    optimizer = tg.MuonAdam(model, s, rt)
    for step in range(5):
        ids = ref.tokens(32, 4, 17, seed=step)[share]
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step(1.0 - step / 10, 0.9)
        if step == 2:
            state = optimizer.state_dict()
            for bank in optimizer.banks:
                for tensor in bank.state:
                    tensor.fill_(7.0)
            optimizer.load_state_dict(state)
    return {"weights": {n: p.detach().clone() for n, p in model.named_parameters()}, "state": optimizer.state_dict(),
            "banks": [(bank.kind, len(bank.names)) for bank in optimizer.banks]}


def one_rank_of_two(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    rt = tg.Runtime(replace(ref.small(), device="cpu"), os.environ)
    try:
        result = {clip: train_a_little(rt, slice(2 * rank, 2 * rank + 2), clip) for clip in CLIPS}
        total = rt.sum(torch.tensor([1.0 + rank])).item()
        torch.save({**result, "agree": rt.agree(rank, -rank), "same": rt.same(f"from {rank}"), "sum": total},
                   folder / f"{rank}.pt")
    finally:
        rt.close()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(one_rank_of_two, args=(port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("clip", CLIPS)
def test_two_ranks_make_the_weights_of_one(two_ranks, clip):
    alone, (first, second) = train_a_little(ref.alone(), slice(None), clip), (rank[clip] for rank in two_ranks)
    kinds = alone["banks"]
    assert {kind for kind, _ in kinds} == {"muon", "adam"} and any(kind == "muon" and n % 2 for kind, n in kinds)
    assert any(n > 2 for _, n in kinds)
    assert first["weights"].keys() == second["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), f"{name}: ranks differ"
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-5, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("clip", CLIPS)
def test_state_of_two_ranks_fits_one(two_ranks, clip):
    alone = train_a_little(ref.alone(), slice(None), clip)["state"]
    for state in (rank[clip]["state"] for rank in two_ranks):
        assert state.keys() == alone.keys() and state["t"] == 5
        for name, tensors in alone.items():
            for a, b in zip(tensors, state[name]) if name != "t" else ():
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * a.abs().max().item() + 1e-9,
                                           msg=lambda m: f"{name}: {m}")


def test_ranks_agree(two_ranks):
    assert [r["agree"] for r in two_ranks] == [(1, 0), (1, 0)]
    assert [r["same"] for r in two_ranks] == ["from 0", "from 0"] and [r["sum"] for r in two_ranks] == [3.0, 3.0]


# --- losses on their way from the device -----------------------------------------------------------------------------


class Lagging(tg.Runtime):
    """A CPU that behaves like a GPU: what fetch() returns is not there until throttle() or sync() has waited for it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.flying, self.marks = [], []

    def fetch(self, tensor):
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
