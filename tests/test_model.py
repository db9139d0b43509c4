"""The model against its specification: counts, the forward again in float64, causality, documents, live switches."""

import logging
import math
from dataclasses import fields
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import reference as ref
import train_gpt as tg


def count(model):
    return sum(p.numel() for p in model.parameters())


def meta(s):
    with torch.device("meta"):
        return tg.GPT(s, init=False)


# --- size ------------------------------------------------------------------------------------------------------------


# The shape of #518 and #1311, spelt out: it stays their count whatever the defaults become.
SEED_518 = """VOCAB_SIZE=1024 NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3 BIGRAM_VOCAB_SIZE=2048
BIGRAM_DIM=128 VE_DIM=128 VE_LAYERS=9,10 XSA_LAST_N=4 SMEAR_GATE=1 SKIPS=linear RESID_MIX=1""".split()


@pytest.mark.parametrize("args, expected", [
    (SEED_518, 26_993_756),
    ([*SEED_518, "NUM_KV_HEADS=8", "MLP_MULT=3.5", "BIGRAM_VOCAB_SIZE=6144", "XSA_LAST_N=11"], 33_317_980),  # #967
])
def test_published_parameter_counts(args, expected):
    s = tg.Settings.parse(args)
    assert count(meta(s)) == expected == ref.parameter_count(s)


@ref.tries(60)
@given(ref.models())
def test_parameter_count_follows_the_general_formula(s):
    assert count(meta(s)) == ref.parameter_count(s)


# --- the whole forward -----------------------------------------------------------------------------------------------


@ref.tries(200)
@given(ref.models(), st.integers(0, 10**6), st.integers(1, 9))
def test_forward_equals_the_float64_loops(s, seed, length):
    model, ids = ref.double(s, seed), ref.tokens(s.vocab_size, 2, length, seed=seed)
    targets, parameters = ref.tokens(s.vocab_size, 2, length, seed=seed + 1), ref.arrays(model)
    with torch.no_grad():
        hidden, loss = model.hidden(ids), model(ids, targets, reduction="none")
        mean, logits = model(ids, targets), model.logits(hidden)
    for b in range(2):
        want_hidden, want_logits = ref.forward(parameters, s, ids[b].tolist())
        np.testing.assert_allclose(hidden[b].numpy(), want_hidden, rtol=1e-8, atol=1e-9)
        # logits are float32 on purpose
        np.testing.assert_allclose(logits[b].numpy(), want_logits, rtol=1e-5, atol=1e-5)
        want = [ref.nats(row, target) for row, target in zip(want_logits, targets[b].tolist())]
        np.testing.assert_allclose(loss[b].numpy(), want, rtol=1e-5, atol=1e-5)
    assert mean.item() == pytest.approx(loss.mean().item(), rel=1e-6)


@pytest.mark.parametrize("changes", [
    dict(num_layers=1, xsa_last_n=1, ve_layers=(0,)), dict(num_layers=2, ve_layers=(0, 1), xsa_last_n=2),
    dict(num_layers=5, skips="none"),
    dict(num_layers=7, num_heads=2, num_kv_heads=2, rope_dims=8), dict(num_heads=8, num_kv_heads=1),
    dict(rope_dims=0, leaky_slope=0, logit_softcap=0),
    dict(bigram_vocab_size=0, ve_dim=0, ve_layers=(), smear_gate=False, resid_mix=False, ln_scale=False, skips="none",
         xsa_last_n=0),
    dict(bigram_dim=16, doc_mask="none"), dict(vocab_size=8), dict(mlp_mult=0.25), dict(mlp_mult=3.1875),
])
def test_named_corners_equal_the_float64_loops_in_float32(changes):
    s = ref.small(**changes)
    model, ids = ref.randomise(tg.GPT(s), 3), ref.tokens(s.vocab_size, 1, 11, seed=5)
    with torch.no_grad():
        got = model.logits(model.hidden(ids))[0].double().numpy()
    want = ref.forward(ref.arrays(model), s, ids[0].tolist())[1]
    assert np.abs(got - want).max() < 1e-4 * max(np.abs(want).max(), 1)


def test_bigram_buckets_are_exact_for_every_pair_of_a_large_vocabulary():
    """Python integers are the reference; ids up to 65535 overflow 32 bits and must not here."""
    s = ref.small(vocab_size=65536, bigram_vocab_size=3000)
    model, rng = tg.GPT(s, init=False), np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 65536, (1, 5000)))
    ids[0, [7, 8, 100]] = ref.BOS
    for docs, masked in ((None, False), (tg.Docs(ids == ref.BOS), True)):
        assert model.bigram.bucket(ids, docs)[0].tolist() == ref.bigram_buckets(ids[0].tolist(), 3000, masked)
    assert model.bigram.bucket(ids, None)[0, 0] == 2999 and model.bigram.bucket(ids, None)[0, 1:].max() < 2999


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims, base", [(2, 10000.0), (16, 22081.8), (64, 500.0)])
def test_rotary_tables_and_their_sign(dims, base):
    cos, sin = tg.rotary_tables(2048, dims, base)
    want = ref.angles(2048, dims, base)
    assert np.abs(cos.numpy() - np.cos(want)).max() < 1e-7 and np.abs(sin.numpy() - np.sin(want)).max() < 1e-7
    x = torch.randn(1, 2048, 1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = tg.rotate(x, torch.from_numpy(np.cos(want)), torch.from_numpy(np.sin(want)))
    for t in (0, 1, 5, 2047):
        np.testing.assert_allclose(turned[0, t, 0].numpy(), ref.rope(x[0, t, 0].numpy(), t, dims, base), atol=1e-9)


@ref.tries(40)
@given(st.integers(0, 4), st.integers(1, 5), st.integers(0, 40), st.integers(0, 40), st.integers(0, 99))
def test_rope_turns_only_its_channels_and_is_relative(half, rest, t, gap, seed):
    dims, channels = 2 * half, 2 * half + rest
    q, k = torch.randn(2, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cos, sin = (torch.from_numpy(f(ref.angles(100, dims, 100.0))) for f in (np.cos, np.sin))
    turn = lambda x: tg.rotate(x.expand(1, 100, 1, channels), cos, sin)[0, :, 0]
    turned_q, turned_k = turn(q), turn(k)
    assert torch.equal(turned_q[:, dims:], q[dims:].expand(100, rest))
    assert torch.equal(turned_q[0], q) and torch.allclose(turned_q.norm(dim=-1), q.norm().expand(100))
    assert (turned_q[t] @ turned_k[t + gap]).item() == pytest.approx((turned_q[0] @ turned_k[gap]).item(), abs=1e-9)


@ref.tries(30)
@given(ref.models(), st.integers(0, 99))
def test_xsa_leaves_nothing_along_the_tokens_own_value(s, seed):
    """Read where it acts: what enters the output projection, against the values that attention used."""
    model, ids = ref.double(s, seed), ref.tokens(s.vocab_size, 2, 9, seed=seed)
    seen = []
    for block in model.blocks:
        block.attn.o.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        kernel = block.attn.attend
        block.attn.attend = lambda q, k, v, kernel=kernel: (seen.append(v), kernel(q, k, v))[1]
    with torch.no_grad():
        model.hidden(ids)
    for i in range(s.num_layers):
        v, y = seen[2 * i], seen[2 * i + 1].unflatten(-1, (s.num_heads, -1))
        along = (y * v.repeat_interleave(s.num_heads // s.num_kv_heads, 2)).sum(-1).abs()
        if i >= s.num_layers - s.xsa_last_n:
            assert along.max() < 1e-9
        else:  # the first position attends only to itself: there y is its own value
            square = v[:, 0].square().sum(-1).repeat_interleave(s.num_heads // s.num_kv_heads, 1)
            assert torch.allclose(along[:, 0], square)


def test_xsa_survives_a_zero_value():
    y, v = torch.randn(1, 3, 4, 5, requires_grad=True), torch.zeros(1, 3, 2, 5, requires_grad=True)
    out = tg.exclude_self(y, v)
    out.sum().backward()
    assert torch.equal(out, y) and torch.isfinite(y.grad).all() and torch.isfinite(v.grad).all()


@pytest.mark.parametrize("layers", range(0, 33))
def test_layer_plan_pairs_the_halves_last_in_first_out(layers):
    for skips in ("linear", "none"):
        plan = tg.layer_plan(layers, skips)
        assert [visit.block for visit in plan] == list(range(layers))
        kept, pairs = [], {}
        for visit in plan:
            if visit.pop is not None:
                pairs[visit.block] = (kept.pop(), visit.pop)
            if visit.push:
                kept.append(visit.block)
        assert kept == []
        half = layers // 2
        assert pairs == ({half + i: (half - 1 - i, i) for i in range(half)} if skips == "linear" else {})


# --- what may depend on what -----------------------------------------------------------------------------------------


@ref.tries(40)
@given(ref.models(), st.integers(0, 10**6), st.data())
def test_nothing_before_a_changed_token_moves(s, seed, data):
    model, ids = ref.double(s, seed), ref.tokens(s.vocab_size, 1, 12, seed=seed)
    t, token = data.draw(st.integers(0, 11)), data.draw(st.integers(0, s.vocab_size - 1))
    changed = ids.clone()
    changed[0, t] = token
    with torch.no_grad():
        a, b = model.hidden(ids), model.hidden(changed)
    torch.testing.assert_close(a[:, :t], b[:, :t], rtol=1e-10, atol=1e-10)
    if token != ids[0, t]:
        assert (a[:, t] - b[:, t]).abs().max() > 1e-6


@ref.tries(40)
@given(ref.models(), st.integers(0, 10**6), st.integers(1, 11))
def test_inputs_of_a_document_do_not_see_the_document_before(s, seed, start):
    """With attention silenced only SmearGate and the n-gram hash reach back: not across BOS, unless DOC_MASK=none."""
    model, ids = ref.double(s, seed), ref.tokens(s.vocab_size, 1, 12, seed=seed, bos=0)
    ids[0, start] = ref.BOS
    other = ids.clone()
    other[0, :start] = (ids[0, :start] + 1 + torch.arange(start) % (s.vocab_size - 1)) % s.vocab_size
    with torch.no_grad():
        for block in model.blocks:
            block.attn.o.weight.zero_()
        moved = (model.hidden(ids) - model.hidden(other))[0].abs().amax(-1)
    assert moved[:start].max() > 1e-6
    if s.doc_mask == "inputs":
        assert moved[start:].max() < 1e-12
    else:  # the smeared BOS is the contest's known leak
        assert not s.smear_gate or moved[start] > 1e-6
        assert s.smear_gate or s.bigram_vocab_size or moved[start:].max() < 1e-12


def test_given_documents_replace_those_of_bos():
    s = ref.small()
    model, ids = ref.double(s), ref.tokens(32, 1, 12, bos=0) % 30 + 2
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[0, 5] = True
    with torch.no_grad():
        plain, given_docs, none = (model.hidden(ids, docs) for docs in (None, tg.Docs(first), tg.Docs(first & False)))
    assert torch.equal(plain, none) and torch.equal(plain[:, :5], given_docs[:, :5])
    assert not torch.equal(plain[:, 5], given_docs[:, 5])


@ref.tries(15)
@given(ref.models(), st.integers(0, 99))
def test_rows_of_a_batch_do_not_touch(s, seed):
    model, ids = ref.double(s, seed), ref.tokens(s.vocab_size, 3, 7, seed=seed)
    with torch.no_grad():
        together, apart = model.hidden(ids), torch.cat([model.hidden(row[None]) for row in ids])
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-10)


# --- initial weights -------------------------------------------------------------------------------------------------


def test_first_loss_is_that_of_a_uniform_guess():
    s = tg.Settings.parse(SEED_518)
    model = tg.GPT(s)
    ids = ref.tokens(1024, 2, 257, bos=0.01)
    with torch.no_grad():
        loss, embedded = model(ids[:, :-1], ids[:, 1:]).item(), tg.norm(model.embed(ids, torch.float32))
    assert abs(loss - math.log(1024)) < 0.02
    # 0.005^2 is far above the norm's eps
    assert torch.allclose(embedded.square().mean(-1), torch.ones(2, 257), atol=1e-2)


def test_initial_weights_are_those_of_the_specification():
    s = ref.small(tied_embed_init_std=0.01, qk_gain_init=1.25, bigram_vocab_size=500, vocab_size=400, model_dim=32,
                  bigram_dim=8)
    model = tg.GPT(s)
    for block in model.blocks:
        for linear in (block.attn.q, block.attn.k, block.attn.v, block.mlp.up):
            w = linear.weight.double()
            singular = torch.linalg.svdvals(w)
            assert torch.allclose(singular, torch.ones_like(singular), atol=1e-5)
        assert not block.attn.o.weight.any() and not block.mlp.down.weight.any()
        assert (block.attn.q_gain == 1.25).all() and (block.attn_scale == 1).all() and (block.mlp_scale == 1).all()
        assert (block.resid_mix[0] == 1).all() and not block.resid_mix[1].any()
        assert block.attn.ve_scale is None or block.attn.ve_scale == 1
    assert model.embed.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert model.value_embed.table.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not model.bigram.table.weight.any() and not model.smear.gate.any() and (model.skip_weights == 1).all()
    assert model.bigram.scale.item() == pytest.approx(0.05) and model.value_embed.scale.item() == pytest.approx(0.1)
    assert model.bigram.proj.weight.any() and model.value_embed.proj.weight.any()


def test_the_seed_decides_the_weights():
    a, b, c = (tg.GPT(ref.small(seed=seed)).state_dict() for seed in (5, 5, 6))
    torch.manual_seed(0)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embed.weight"], c["embed.weight"])
    assert not torch.equal(a["blocks.0.mlp.up.weight"], c["blocks.0.mlp.up.weight"])


def test_building_a_model_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tg.GPT(ref.small())
    assert torch.equal(before, torch.get_rng_state())


# --- roles, adapters -------------------------------------------------------------------------------------------------


@ref.tries(40)
@given(ref.models())
def test_every_parameter_has_one_role_and_the_right_one(s):
    model = meta(s)
    table = tg.roles(model)
    assert sorted(table) == sorted(name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        table_of_rows = name in ("embed.weight", "bigram.table.weight", "value_embed.table.weight")
        want = "embed" if table_of_rows else "matrix" if parameter.ndim == 2 and name.endswith(".weight") else "scalar"
        assert table[name] == want, name


def test_a_parameter_without_a_role_is_an_error():
    model = tg.GPT(ref.small())
    model.blocks[1].extra = nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"blocks\.1\.extra\.weight"):
        tg.roles(model)


class Adapters:
    def __init__(self, slots, head=None):
        self.slots, self.head = slots, head


def adapter(inputs, outputs, value):
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_adapters_add_nothing_when_zero_and_something_when_not():
    s = ref.small()
    model, ids = ref.randomise(tg.GPT(s)), ref.tokens(32, 2, 9)
    sizes = dict(q=(16, 16), k=(16, 8), v=(16, 8), o=(16, 16), mlp=(16, 16))
    slot = lambda value, only=None: tg.Slot(**{k: adapter(*size, value) for k, size in sizes.items()
                                               if only in (None, k)})
    with torch.no_grad():
        plain = model.logits(model.hidden(ids))
        zero = Adapters([slot(0.0) for _ in model.plan], adapter(16, 32, 0.0))
        assert torch.equal(plain, model.logits(model.hidden(ids, adapters=zero), zero))
        for layer in range(s.num_layers):
            for part in sizes:
                one = Adapters([slot(0.1, part) if j == layer else tg.Slot() for j in range(len(model.plan))])
                moved = model.logits(model.hidden(ids, adapters=one), one)
                assert not torch.equal(plain, moved), (layer, part)
                assert torch.equal(model(ids, ids, adapters=one),
                                   nn.functional.cross_entropy(moved.flatten(0, 1), ids.flatten()))
        head = Adapters([tg.Slot() for _ in model.plan], adapter(16, 32, 0.1))
        assert torch.equal(model.hidden(ids), model.hidden(ids, adapters=head))
        assert not torch.equal(plain, model.logits(model.hidden(ids), head))


# --- every switch does something, eager and compiled ------------------------------------------------------------------

LIVE = dict(ref.SMALL, model_dim=24, num_heads=2, num_kv_heads=1, rope_dims=4, num_layers=2, ve_layers=(1,),
            xsa_last_n=1)
# What to change a setting to; others are found from their type.
OTHER = dict(model_dim=32, num_heads=4, num_kv_heads=2, num_layers=3, ve_layers=(0, 1), bigram_vocab_size=0, ve_dim=0,
             rope_dims=8,
             doc_mask="none", skips="none")
MODEL_FIELDS = [f for f in fields(tg.Settings) if f.metadata["room"] == "Model"]


def another(f, value):
    if f.name in OTHER:
        return OTHER[f.name]
    if f.type is bool:
        return not value
    if get_origin(f.type) is Literal:
        return next(choice for choice in get_args(f.type) if choice != value)
    if f.type is int:
        return value - 1 if value else 1
    return value * 1.5 if value and not (f.metadata["hi"] and value * 1.5 > f.metadata["hi"]) else 0.25


def losses(s, backend=None, steps=3):
    """Losses of a few optimizer steps on fixed data."""
    torch._dynamo.reset()
    rt, model = ref.alone(), tg.GPT(s)
    optimizer = tg.MuonAdam(model, s, rt)
    loss_of = torch.compile(model, fullgraph=True, dynamic=False, backend=backend) if backend else model
    out = []
    for step in range(steps):
        ids = ref.tokens(s.vocab_size, 2, 17, seed=step)
        optimizer.zero_grad()
        loss = loss_of(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step(1.0, 0.9)
        out.append(loss.item())
    return out


@pytest.fixture
def quiet_compiler(monkeypatch):
    """Compiling traces to a logger that pytest would collect line by line, at twice the price."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_every_model_switch_changes_the_loss(backend, quiet_compiler):
    """A switch that is read but has no effect, or that a compiled graph lost, is found here, new settings included."""
    rate = dict(matrix_lr=0.1, scalar_lr=0.1, tied_embed_lr=0.1, grad_clip_norm=0, vocab_size=32)
    base = losses(ref.parse({**LIVE, **rate}), backend)
    if backend:
        np.testing.assert_allclose(base, losses(ref.parse({**LIVE, **rate})), rtol=1e-5)
    dead = []
    for f in MODEL_FIELDS:
        value = another(f, getattr(ref.parse(LIVE), f.name))
        follow = {"ve_layers": ()} if f.name == "ve_dim" else {}
        changed = losses(ref.parse({**LIVE, **rate, f.name: value, **follow}), backend)
        if max(abs(a - b) for a, b in zip(base, changed)) < 1e-6:
            dead.append(f"{f.name.upper()}={value}")
    assert dead == []


@pytest.mark.parametrize("changes", [dict(num_layers=2, ve_layers=(1,)), dict(
    num_layers=2, bigram_vocab_size=0, ve_dim=0, ve_layers=(), smear_gate=False, resid_mix=False, skips="none",
    rope_dims=0, logit_softcap=0)])
def test_the_whole_model_is_one_graph_forward_and_backward(changes, quiet_compiler):
    s = ref.small(**changes)
    model, ids, targets = ref.randomise(tg.GPT(s), spread=0.3), ref.tokens(32, 2, 16), ref.tokens(32, 2, 16, seed=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    results = []
    for function in (model, compiled):
        model.zero_grad()
        loss = function(ids, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled(ids.flip(0), targets.flip(0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_bfloat16_activations_stay_close_to_float32():
    s = ref.small()
    exact, rounded = (ref.randomise(tg.GPT(s, dtype=dtype), spread=0.2) for dtype in (torch.float32, torch.bfloat16))
    ids = ref.tokens(32, 2, 16)
    with torch.no_grad():
        hidden = rounded.hidden(ids)
        assert hidden.dtype == torch.bfloat16 and rounded.logits(hidden).dtype == torch.float32
        assert abs(exact(ids, ids).item() - rounded(ids, ids).item()) < 0.02
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
