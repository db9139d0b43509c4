"""The model against its specification: counts, the forward again in float64, causality, documents, live switches."""

import logging
import math
import random
from dataclasses import fields
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from parameters import compare_parameters, number_of_weights, parameters_of, role_of
from torch import nn

import train_gpt as tg


def count(model):
    return sum(p.numel() for p in model.parameters())


def meta(s):
    with torch.device("meta"):
        return tg.GPT(s, init=False)


# --- size ------------------------------------------------------------------------------------------------------------


# The shape of #518 and #1311, spelt out: it stays their count whatever the defaults become.
SEED_518 = """VOCAB_SIZE=1024 NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3 BIGRAM_VOCAB_SIZE=2048
BIGRAM_DIM=128 VE_DIM=128 VE_LAYERS=9,10 XSA_LAST_N=4 SMEAR_GATE=channel SKIPS=linear RESID_MIX=1""".split()
CONTEST = "VOCAB_SIZE=8192 NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=4 XSA_LAST_N=11".split()
SEED_1539 = [*CONTEST, *"""BIGRAM_VOCAB_SIZE=0 VE_DIM=44 VE_LAYERS=9,10 SMEAR_GATE=channel SKIPS=linear SKIP_PAIRS=5
NUM_LOOPS=1 LOOP_START=3 LOOP_END=5 PARALLEL_RESIDUAL=lanes PARALLEL_START_LAYER=7
PARALLEL_FINAL_LANE=learned""".split()]
PR_1493 = [*CONTEST, *"""BIGRAM_VOCAB_SIZE=0 VE_DIM=0 VE_LAYERS= SMEAR_GATE=none SKIPS=gated NUM_LOOPS=2 LOOP_START=3
LOOP_END=5 PARALLEL_RESIDUAL=gptj PARALLEL_START_LAYER=7""".split()]
PR_1855 = [*PR_1493, *"""SMEAR_GATE=scalar ATTN_GATE=sparse GATE_WINDOW=12 PARALLEL_RESIDUAL=routed
PARALLEL_START_LAYER=8 PARALLEL_FINAL_LANE=mean PARALLEL_FIRST_SKIP=lane0""".split()]


@pytest.mark.parametrize("args, number", [
    (SEED_518, 26_993_756),
    ([*SEED_518, "VALUE_RESIDUAL=vrl"], 26_993_766),  # #1033
    ([*SEED_518, "NUM_KV_HEADS=8", "MLP_MULT=3.5", "BIGRAM_VOCAB_SIZE=6144", "XSA_LAST_N=11"], 33_317_980),  # #967
    (SEED_1539, 36_311_132), (PR_1493, 35_944_536), (PR_1855, 35_945_671),
    ([*PR_1855, "ASYM_LOGIT_RESCALE=1"], 35_945_673),  # #1945 and what follows it
])
def test_published_parameter_counts(args, number):
    s = tg.Settings.parse(args)
    assert count(meta(s)) == number == number_of_weights(s)


@ref.tries(60)
@given(ref.models())
def test_every_parameter_is_that_of_the_specification(s):
    compare_parameters(s, meta(s))


def test_a_new_parameter_is_named_with_the_row_to_add():
    s = ref.small()
    model = meta(s)
    model.blocks[1].extra = nn.Linear(3, 3, bias=False)
    with pytest.raises(AssertionError, match=r"add the row Parameter\('blocks.\{layer\}.extra.weight'"):
        compare_parameters(s, model)


# --- the whole forward -----------------------------------------------------------------------------------------------


@ref.tries(400)
@given(ref.models(), st.integers(0, 10**6), st.integers(1, 9), st.booleans())
def test_forward_equals_the_float64_loops(s, seed, length, looping):
    model, ids = ref.double(s, seed), ref.tokens(s.vocab_size, 2, length, seed=seed)
    model.looping = looping and s.loops
    targets, parameters = ref.tokens(s.vocab_size, 2, length, seed=seed + 1), ref.arrays(model)
    with torch.no_grad():
        hidden, loss = model.hidden(ids), model(ids, targets, reduction="none")
        mean, logits = model(ids, targets), model.logits(hidden)
    for b in range(2):
        want_hidden, want_logits = ref.forward(parameters, s, ids[b].tolist(), looping)
        np.testing.assert_allclose(hidden[b].numpy(), want_hidden, rtol=1e-8, atol=1e-9)
        # logits are float32 on purpose
        np.testing.assert_allclose(logits[b].numpy(), want_logits, rtol=1e-5, atol=1e-5)
        want = [ref.nats(row, target) for row, target in zip(want_logits, targets[b].tolist())]
        np.testing.assert_allclose(loss[b].numpy(), want, rtol=1e-5, atol=1e-5)
    assert mean.item() == pytest.approx(loss.mean().item(), rel=1e-6)


# The published models in small, and what they have not.
TINY_1855 = dict(num_layers=4, ve_dim=0, ve_layers=(), bigram_vocab_size=0, xsa_last_n=3, smear_gate="scalar", attn_gate="sparse",
                 sparse_attn_gate_scale=0.5, skips="gated", num_loops=2, loop_start=1, loop_end=1,
                 parallel_residual="routed", parallel_start_layer=2, parallel_first_skip="lane0", doc_mask="attention")
TINY_1539 = dict(num_layers=4, bigram_vocab_size=0, xsa_last_n=4, num_loops=1, loop_start=1, loop_end=1, skip_pairs=2,
                 parallel_residual="lanes", parallel_start_layer=2, parallel_final_lane="learned", doc_mask="none")
TINY_1033 = dict(value_residual="vrl", num_loops=1, loop_start=1, loop_end=2, loop_order="layer")
MIXTURE = dict(num_layers=2, ve_layers=(0,), tie_embeddings=False, embed_dim=6, trigram=True, trigram_vocab_size=11,
               trigram_dim=3, attn_gate="dense", value_residual="pair", skips="sigmoid", parallel_residual="gptj",
               parallel_start_layer=1)


@pytest.mark.parametrize("changes", [
    dict(num_layers=1, xsa_last_n=1, ve_layers=(0,)), dict(num_layers=2, ve_layers=(0, 1), xsa_last_n=2),
    dict(num_layers=5, skips="none"),
    dict(num_layers=7, num_heads=2, num_kv_heads=2, rope_dims=8), dict(num_heads=8, num_kv_heads=1),
    dict(rope_dims=0, leaky_slope=0, logit_softcap=0),
    dict(bigram_vocab_size=0, ve_dim=0, ve_layers=(), smear_gate="none", resid_mix=False, ln_scale=False, skips="none",
         xsa_last_n=0),
    dict(bigram_dim=16, doc_mask="none"), dict(vocab_size=8), dict(mlp_mult=0.25), dict(mlp_mult=3.1875),
    TINY_1855, TINY_1539, TINY_1033, MIXTURE,
])
def test_named_corners_equal_the_float64_loops_in_float32(changes):
    s = ref.small(**changes)
    model, ids = ref.randomise(tg.GPT(s), 3), ref.tokens(s.vocab_size, 1, 11, seed=5)
    with torch.no_grad():
        got = model.logits(model.hidden(ids))[0].double().numpy()
    want = ref.forward(ref.arrays(model), s, ids[0].tolist())[1]
    assert np.abs(got - want).max() < 1e-4 * max(np.abs(want).max(), 1)


class RowNumbers(nn.Module):
    """A table one column wide that holds its row's number."""

    def forward(self, rows, dtype):
        return rows.to(dtype)[..., None]


@ref.tries(30)
@given(st.lists(st.one_of(st.just(ref.BOS), st.integers(0, 65535)), min_size=1, max_size=60), st.integers(2, 2**24),
       st.sampled_from(["none", "inputs"]))
def test_bigram_hash_is_exact_for_every_id_of_a_large_vocabulary(ids, rows, doc_mask):
    """Python integers are the reference; products of ids up to 65535 overflow 32 bits and must not here."""
    docs = tg.find_documents(torch.tensor([ids]), doc_mask)
    hashes = {(tg.BIGRAM,): [ref.bigram_buckets], (tg.TRIGRAM,): [ref.trigram_buckets],
              (tg.BIGRAM, tg.SHARED_TRIGRAM): [ref.bigram_buckets, ref.shared_trigram_buckets]}
    for ngrams, expected in hashes.items():
        with torch.device("meta"):
            embedding = tg.BigramHash(rows, 1, 1, 1.0, *ngrams)
        embedding.table, embedding.scale = RowNumbers(), nn.Parameter(torch.ones(()))
        got = embedding(torch.tensor([ids]), docs, torch.float64)[0, :, 0]
        want = zip(*(buckets(ids, rows, doc_mask == "inputs") for buckets in expected))
        assert got.tolist() == list(map(sum, want))


def test_the_last_row_of_a_hash_table_is_only_for_what_has_no_predecessor():
    ids = ref.tokens(65536, 1, 20000, bos=0).clamp_min(2)
    ids[0, [7, 8, 100]] = ref.BOS
    for ngram, alone in ((tg.BIGRAM, {0, 7, 8, 100}), (tg.SHARED_TRIGRAM, {0, 1, 7, 8, 9, 100, 101}),
                         (tg.TRIGRAM, {0, 7, 8, 100})):
        for docs, expected in ((None, {t for t in alone if t < 2}), (tg.Docs(ids == ref.BOS), alone)):
            bucket = tg.hash_ngrams(ids, ngram, 2999, docs)[0]
            assert set((bucket == 2999).nonzero().flatten().tolist()) == expected
            assert bucket.max() == 2999 and bucket.min() >= 0 and bucket.unique().numel() > 2900


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims, base", [(2, 10000.0), (16, 22081.8), (64, 500.0)])
def test_rotary_tables_and_their_sign(dims, base):
    cos, sin = tg.rotary_tables(torch.arange(2048), dims, base)
    want = ref.angles(2048, dims, base)
    assert np.abs(cos.numpy() - np.cos(want)).max() < 1e-7 and np.abs(sin.numpy() - np.sin(want)).max() < 1e-7
    x = torch.randn(1, 2048, 1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = tg.rotate(x, torch.from_numpy(np.cos(want)), torch.from_numpy(np.sin(want)))
    for t in (0, 1, 5, 2047):
        np.testing.assert_allclose(turned[0, t, 0].numpy(), ref.rope(x[0, t, 0].numpy(), t, dims, base), atol=1e-9)


def test_the_rotary_base_is_the_ntk_rule_at_2048():
    """10000 scaled by (2048 / 1024)^(16 / 14): one constant, whatever the length of a forward."""
    s = tg.Settings()
    assert s.rope_dims == 16 and s.rope_base == pytest.approx(10000 * 2 ** (8 / 7), abs=0.05)
    short, long = (meta(tg.Settings.parse([f"EVAL_SEQ_LEN={n}", f"TRAIN_SEQ_LEN={n}", "EVAL_STRIDE=0"]))
                   for n in (1024, 4096))
    assert (len(short.cos), len(long.cos)) == (1024, 4096)
    model = tg.GPT(ref.small(eval_seq_len=4096))
    assert torch.equal(model.cos[:16], tg.GPT(ref.small(eval_seq_len=16)).cos)


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
        block.attn.attend = lambda q, k, v, docs, kernel=kernel: (seen.append(v), kernel(q, k, v, docs))[1]
    with torch.no_grad():
        model.hidden(ids)
    assert len(seen) == 2 * len(model.plan)
    for j, visit in enumerate(model.plan):
        v, y = seen[2 * j], seen[2 * j + 1].unflatten(-1, (s.num_heads, -1))
        along = (y * v.repeat_interleave(s.num_heads // s.num_kv_heads, 2)).sum(-1).abs()
        if visit.block >= s.num_layers - s.xsa_last_n:
            assert along.max() < 1e-9 * (1 + v.square().sum(-1).max())
        else:  # the first position attends only to itself: there y is its own value, times the head's gate
            square = v[:, 0].square().sum(-1).repeat_interleave(s.num_heads // s.num_kv_heads, 1)
            assert (along[:, 0] > 0).all() and (s.attn_gate != "none" or torch.allclose(along[:, 0], square))


def test_xsa_survives_a_zero_value():
    y, v = torch.randn(1, 3, 4, 5, requires_grad=True), torch.zeros(1, 3, 2, 5, requires_grad=True)
    out = tg.xsa(y, v)
    out.sum().backward()
    assert torch.equal(out, y) and torch.isfinite(y.grad).all() and torch.isfinite(v.grad).all()


# --- the plan: skips, recurrence, parallel layers --------------------------------------------------------------------


def pairs(plan):
    """[(visit that takes, visit whose stream it takes, row of weights)]: what the stack does with pushes and pops."""
    kept, found = [], []
    for j, visit in enumerate(plan):
        if visit.pop is not None:
            found.append((j, kept.pop(), visit.pop))
        if visit.push:
            kept.append(j)
    assert kept == []
    return found


@pytest.mark.parametrize("layers", range(1, 33))
def test_layer_plan_pairs_the_halves_last_in_first_out(layers):
    few = dict(num_layers=layers, ve_dim=0, ve_layers=(), xsa_last_n=0)
    for skips in ("linear", "none"):
        plan = tg.layer_plan(ref.small(skips=skips, **few), False)
        assert [visit.block for visit in plan] == list(range(layers))
        assert all(visit.form == "serial" for visit in plan)
        half = layers // 2
        assert pairs(plan) == ([(half + i, half - 1 - i, i) for i in range(half)] if skips == "linear" else [])


PLAIN = [*range(11)]
ROUND = [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]  # encoder up to the second 4, decoder from the 5 after it
# By hand from the descriptions: settings, looping, layers in order, (taking layer, its visit, given by visit), the
# first parallel visit.
PLANS = {
    "1493 looping": (PR_1493, True, ROUND, [(5, 8, 7), (3, 9, 6), (4, 10, 5), (5, 11, 4), (6, 12, 3), (7, 13, 2),
                                            (8, 14, 1), (9, 15, 0)], 13),
    "1493 before": (PR_1493, False, PLAIN, [(5, 5, 4), (6, 6, 3), (7, 7, 2), (8, 8, 1), (9, 9, 0)], 7),
    "1855 looping": (PR_1855, True, ROUND, [(5, 8, 7), (3, 9, 6), (4, 10, 5), (5, 11, 4), (6, 12, 3), (7, 13, 2),
                                            (8, 14, 1), (9, 15, 0)], 14),
    "1855 before": (PR_1855, False, PLAIN, [(5, 5, 4), (6, 6, 3), (7, 7, 2), (8, 8, 1), (9, 9, 0)], 8),
    "1539 looping": (SEED_1539, True, [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10],
                     [(4, 7, 6), (5, 8, 5), (6, 9, 4), (7, 10, 3), (8, 11, 2)], 10),
    "1539 before": (SEED_1539, False, PLAIN, [(5, 5, 4), (6, 6, 3), (7, 7, 2), (8, 8, 1), (9, 9, 0)], 7),
    # 4 hands on what its second pass made, 5 takes before its first
    "1033": ([*SEED_518, "NUM_LOOPS=1", "LOOP_START=4", "LOOP_END=5", "LOOP_ORDER=layer"], True,
             [0, 1, 2, 3, 4, 4, 5, 5, 6, 7, 8, 9, 10], [(5, 6, 5), (6, 8, 3), (7, 9, 2), (8, 10, 1), (9, 11, 0)], 13),
    # 1311: each listed layer three times in a row
    "1311": ([*SEED_518, "NUM_LOOPS=2", "LOOP_START=5", "LOOP_END=5", "LOOP_ORDER=layer"], True,
             [0, 1, 2, 3, 4, 5, 5, 5, 6, 7, 8, 9, 10], [(5, 5, 4), (6, 8, 3), (7, 9, 2), (8, 10, 1), (9, 11, 0)], 13),
}


@pytest.mark.parametrize("name", PLANS)
def test_layer_plans_of_published_models(name):
    args, looping, order, takes, split = PLANS[name]
    s = tg.Settings.parse(args)
    plan = tg.layer_plan(s, looping)
    assert [visit.block for visit in plan] == order
    assert pairs(plan) == [(taker, giver, row) for row, (_, taker, giver) in enumerate(takes)]
    assert [plan[taker].block for taker, _, _ in pairs(plan)] == [layer for layer, _, _ in takes]
    assert [visit.form for visit in plan] == [s.parallel_residual if j >= split else "serial" for j in range(len(plan))]
    parts = {"1855": "before_skip", "1539": "after_skip"}.get(name.split()[0], "")  # the others have one lane
    assert [visit.split for visit in plan] == [parts if j == split else "" for j in range(len(plan))]


@pytest.mark.parametrize("loop_order, looping, order", [
    ("range", True, [(0, 1), (1, 1), (2, 1), (1, 1), (2, 1), (1, 1), (2, 1), (3, 1)]),
    ("layer", True, [(0, 1), (1, 3), (2, 3), (3, 1)]),
    ("range", False, [(0, 1), (1, 1), (2, 1), (3, 1)]), ("layer", False, [(0, 1), (1, 1), (2, 1), (3, 1)])])
def test_depth_recurrence_repeats_the_range_or_each_layer(loop_order, looping, order):
    s = ref.small(num_layers=4, num_loops=2, loop_start=1, loop_end=2, loop_order=loop_order)
    assert tg.depth_recurrence(s, looping) == order


@ref.tries(300)
@given(ref.models(num_loops=2) | ref.models(num_loops=1) | ref.models(num_loops=0), st.booleans())
def test_any_layer_plan_is_that_of_two_halves_and_a_stack(s, looping):
    encoder, decoder, most = ref.halves(s, looping)
    want, stack, split = [], [], False
    for slot, (layer, times) in enumerate([*encoder, *decoder], -len(encoder)):
        source = stack.pop() if 0 <= slot < most else None
        for again in range(times):
            split = split or s.parallel_residual in ("lanes", "routed") and layer >= s.parallel_start_layer
            gptj = s.parallel_residual == "gptj" and layer >= s.parallel_start_layer
            form = s.parallel_residual if split or gptj else "serial"
            want.append((layer, source if again == 0 else None, form))
        if slot < 0:
            stack.append(len(want) - 1)
    plan = tg.layer_plan(s, looping)
    sources = {taker: giver for taker, giver, _ in pairs(plan)}
    assert [(visit.block, sources.get(j), visit.form) for j, visit in enumerate(plan)] == want
    assert [row for _, _, row in pairs(plan)] == list(range(most))
    model = meta(s)
    assert (model.skips is None) == (ref.halves(s, True)[2] == 0) and (not s.loops or model.looping is True)
    assert model.plan == tg.layer_plan(s, s.loops)


def test_depth_recurrence_switched_off_is_a_model_without_loops():
    s = ref.small(**TINY_1855)
    model, plain = ref.double(s), ref.double(ref.small(**{**TINY_1855, "num_loops": 0}))
    values = model.state_dict()
    few = len(plain.skips.weight)  # the plain order has fewer skips
    values.update({name: values[name][:few] for name in ("skips.weight", "skips.gate")})
    plain.load_state_dict(values)
    ids = ref.tokens(32, 2, 9)
    with torch.no_grad():
        looped = model.hidden(ids)
        model.looping = False
        assert torch.equal(model.hidden(ids), plain.hidden(ids)) and not torch.equal(model.hidden(ids), looped)


@pytest.mark.parametrize("merge, dead", [(1.0, "mlp"), (0.0, "attn")])
def test_parallel_lanes_of_1539_meet_only_in_the_merge(merge, dead):
    """Lane 0 hears nothing of the last MLPs, lane 1 nothing of the last attentions or of skips after the split."""
    s = ref.small(num_layers=6, ve_dim=0, ve_layers=(), parallel_residual="lanes", parallel_start_layer=4,
                  parallel_final_lane="learned")
    model, ids = ref.double(s), ref.tokens(32, 2, 9)
    with torch.no_grad():
        model.lanes.merge.fill_(merge)
    model(ids, ids).backward()
    for i, block in enumerate(model.blocks):
        for name, part in (("attn", block.attn), ("mlp", block.mlp)):
            silent = all(p.grad is None or not p.grad.any() for p in part.parameters())
            assert silent == (i >= 4 and name == dead), (i, name)
        assert bool(block.resid_mix.grad.any()) == (i < 4 or dead == "mlp")  # the MLP reads its lane unmixed
    rows = model.skips.weight.grad.any(-1).tolist()
    assert rows == [True, True, dead == "mlp"]  # layers 3, 4, 5 take skips; the split is after that of layer 4


def test_routing_of_1529_starts_where_published_and_its_resting_rows_rest():
    s = ref.small(**TINY_1855)
    model, ids = ref.double(s), ref.tokens(32, 2, 9)
    model(ids, ids).backward()
    for weight in (model.lanes.keep, model.lanes.write):
        assert not weight.grad[:2].any() and (weight.grad[2] != 0).all()


def test_the_mean_of_parallel_lanes_is_what_the_learned_merge_begins_with():
    for kind in ("lanes", "routed"):
        mean, learned = (ref.small(parallel_residual=kind, parallel_start_layer=1, parallel_final_lane=lane)
                         for lane in ("mean", "learned"))
        mean, learned = tg.GPT(mean), tg.GPT(learned)
        begun = ref.randomise(mean).state_dict()
        assert learned.load_state_dict(begun, strict=False).missing_keys == ["lanes.merge"]
        ids = ref.tokens(32, 2, 9)
        with torch.no_grad():
            assert torch.equal(mean.hidden(ids), learned.hidden(ids))
            learned.lanes.merge.fill_(0.25)
            assert not torch.equal(mean.hidden(ids), learned.hidden(ids))


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
        assert (a[:, t] - b[:, t]).abs().max() > 1e-9


@ref.tries(100)
@given(ref.models(), st.integers(0, 10**6), st.integers(1, 11))
def test_inputs_of_a_document_do_not_see_the_document_before(s, seed, start):
    """With attention silenced only SmearGate and the n-gram hashes reach back: not across BOS, unless DOC_MASK=none."""
    model, ids, other = ref.double(s, seed), *two_pasts(s, seed, start)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.o.weight.zero_()
        moved = (model.hidden(ids) - model.hidden(other))[0].abs().amax(-1)
    assert moved[:start].max() > 1e-9
    if s.doc_mask != "none":
        assert moved[start:].max() < 1e-12
        return
    # the smeared BOS is the contest's known leak; a trigram reaches two tokens back, a smeared one three
    reach = (3 if s.trigram_vocab_size or s.bigram_vocab_size and s.trigram else 2 if s.bigram_vocab_size else 1) - 1
    reach += s.smear_gate != "none"
    assert s.smear_gate == "none" or moved[start] > 1e-9
    assert not (moved[start + reach :] > 1e-12).any()


def two_pasts(s, seed, start):
    """Rows of 12 tokens that agree from `start` on, where a document begins, and nowhere before."""
    ids = ref.tokens(s.vocab_size, 1, 12, seed=seed, bos=0)
    other = ids.clone()
    other[0, :start] = (ids[0, :start] + 1 + torch.arange(start) % (s.vocab_size - 1)) % s.vocab_size
    ids[0, start] = other[0, start] = ref.BOS
    return ids, other


@ref.tries(60)
@given(ref.models(doc_mask="attention"), st.integers(0, 10**6), st.integers(1, 11))
def test_with_attention_masked_a_document_is_scored_as_if_it_stood_alone(s, seed, start):
    model, ids, other = ref.double(s, seed), *two_pasts(s, seed, start)
    with torch.no_grad():
        full, after, alone = (model.logits(model.hidden(row)) for row in (ids, other, ids[:, start:]))
    assert not torch.equal(full[:, :start], after[:, :start])
    torch.testing.assert_close(full[:, start:], after[:, start:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(full[:, start:], alone, rtol=1e-5, atol=1e-6)  # positions differ: rotary is relative


@pytest.mark.parametrize("doc_mask", ["none", "inputs"])
def test_without_that_mask_attention_sees_the_document_before(doc_mask):
    s = ref.small(doc_mask=doc_mask)
    model, (ids, other) = ref.double(s), two_pasts(s, 3, 6)
    with torch.no_grad():
        assert ((model.hidden(ids) - model.hidden(other))[0, 6:].abs().amax(-1) > 1e-6).all()


@ref.tries(60)
@given(ref.models(doc_mask="attention"), st.integers(0, 10**6), st.integers(1, 14), st.integers(1, 6))
def test_packed_rows_are_cut_at_documents_and_after_the_longest_sequence(s, seed, length, longest):
    """The whole forward of such a row by the loops, and each uncut document again as if it stood alone."""
    model, ids = ref.double(s, seed), ref.tokens(s.vocab_size, 1, length, seed=seed)
    starts = ref.document_starts(ids[0].tolist(), longest=longest)
    with torch.no_grad():
        hidden = model.hidden(ids, model.find_documents(ids, longest))
        want = ref.forward(ref.arrays(model), s, ids[0].tolist(), longest=longest)[0]
        np.testing.assert_allclose(hidden[0].numpy(), want, rtol=1e-7, atol=1e-8)
        for a in sorted(set(starts)):
            if a == 0 or ids[0, a] == ref.BOS:
                b = a + starts.count(a)
                torch.testing.assert_close(hidden[:, a:b], model.hidden(ids[:, a:b]), rtol=1e-7, atol=1e-8)


@ref.tries(200)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 5), st.integers(0, 10**6))
def test_documents_are_where_bos_says(rows, length, longest, seed):
    """Mask and lengths by brute force; every row begins a segment, and no segment is longer than `longest`."""
    ids = ref.tokens(8, rows, length, seed=seed, bos=0.3)
    assert tg.find_documents(ids, "none", longest) is None
    inputs = tg.find_documents(ids, "inputs", longest)
    assert inputs.mask is None and inputs.cu_seqlens is None and torch.equal(inputs.first, ids == ref.BOS)
    masked, lengths = (tg.find_documents(ids, "attention", longest, varlen) for varlen in (False, True))
    starts = [ref.document_starts(row, longest=longest) for row in ids.tolist()]
    want = [[[starts[b][t] <= u <= t for u in range(length)] for t in range(length)] for b in range(rows)]
    assert masked.mask[:, 0].tolist() == want and masked.cu_seqlens is None
    begins = [b * length + t for b in range(rows) for t in range(length) if starts[b][t] == t]
    assert lengths.cu_seqlens.tolist() == [*begins, rows * length] and lengths.mask is None
    assert lengths.cu_seqlens.dtype == torch.int32
    assert not longest or lengths.cu_seqlens.diff().max() <= longest
    for docs in (masked, lengths):
        assert torch.equal(docs.first, ids == ref.BOS)


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


def test_an_untied_head_begins_as_exactly_a_uniform_guess():
    ids = ref.tokens(32, 2, 9)
    with torch.no_grad():
        assert tg.GPT(ref.small(tie_embeddings=False))(ids, ids).item() == pytest.approx(math.log(32), rel=1e-6)


FRESH = dict(num_layers=4, model_dim=32, tied_embed_init_std=0.02, qk_gain_init=1.25, vocab_size=400, gate_window=12,
             bigram_vocab_size=500, bigram_dim=8)


@pytest.mark.parametrize("changes", [
    {}, dict(skips="gated", attn_gate="sparse", smear_gate="scalar", parallel_residual="routed",
             parallel_start_layer=2),
    dict(skips="sigmoid", attn_gate="head", value_residual="vrl", embed_dim=16, trigram_vocab_size=50, trigram_dim=8,
         parallel_residual="lanes", parallel_start_layer=1, parallel_final_lane="learned"),
    dict(attn_gate="dense", value_residual="pair", tie_embeddings=False, num_loops=2, loop_start=1, loop_end=2),
    dict(asym_logit_rescale=True, logit_softcap=7),
    dict(skips="none", value_residual="sigmoid", trigram=True, ve_dim=0, ve_layers=()),
])
def test_initial_weights_are_those_of_the_specification(changes):
    s = ref.small(**{**FRESH, **changes})
    for name, weight in tg.GPT(s).named_parameters():
        want, weight = parameters_of(s)[name].initial, weight.detach().double()
        if want == "orthogonal":
            singular = torch.linalg.svdvals(weight)
            assert torch.allclose(singular, torch.ones_like(singular), atol=1e-5), name
        elif isinstance(want, tuple):
            rel = min(0.12, 4 / math.sqrt(2 * weight.numel()))  # four deviations of such an estimate
            assert weight.std().item() == pytest.approx(want[1], rel=rel), name
            assert abs(weight.mean()) < want[1] / 5, name
        elif isinstance(want, list):
            assert all(torch.equal(row, torch.full_like(row, x)) for row, x in zip(weight, want)), name
        else:
            assert torch.allclose(weight, torch.tensor(want).double()), name


@pytest.mark.parametrize("changes", [
    dict(attn_gate="head"), dict(value_residual="vrl"), dict(smear_gate="scalar"), dict(bigram_vocab_size=17),
    dict(trigram_vocab_size=17, trigram_dim=4), dict(mtp_num_heads=2)], ids=lambda changes: next(iter(changes)))
def test_what_begins_as_nothing(changes):
    """Added to a trained model, its initial values change nothing; other ones do."""
    without = dict(smear_gate="none", bigram_vocab_size=0)
    plain = ref.randomise(tg.GPT(ref.small(**without)))
    more = tg.GPT(ref.small(**{**without, **changes}))
    missing = more.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert bool(missing) == ("mtp_num_heads" not in changes)
    ids = ref.tokens(32, 2, 9)
    with torch.no_grad():
        assert torch.equal(plain.hidden(ids), more.hidden(ids))
        for name, parameter in more.named_parameters():
            if name in missing:
                parameter.fill_(0.7)
        assert torch.equal(plain.hidden(ids), more.hidden(ids)) == (not missing)


@pytest.mark.parametrize("gate", ["sparse", "dense"])
def test_a_zero_sigmoid_gate_halves_attention(gate):
    plain = ref.randomise(tg.GPT(ref.small()))
    gated = tg.GPT(ref.small(attn_gate=gate))
    gated.load_state_dict(plain.state_dict(), strict=False)
    ids = ref.tokens(32, 2, 9)
    with torch.no_grad():
        for block, other in zip(plain.blocks, gated.blocks):
            block.attn.o.weight *= 0.5
            other.attn.gate.weight.zero_()
        torch.testing.assert_close(gated.hidden(ids), plain.hidden(ids))


@pytest.mark.parametrize("gate, window", [("head", 3), ("sparse", 3), ("dense", 16)])
def test_a_gate_reads_its_window_and_no_more(gate, window):
    s = ref.small(attn_gate=gate, gate_window=3, sparse_attn_gate_scale=0.5)
    module = ref.randomise(tg.HeadGate(s).double())
    x = torch.randn(1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = module(x)
    out.sum().backward()
    assert out.shape == (1, 1, 4, 1) and x.grad[0, 0].ne(0).tolist() == [i < window for i in range(16)]
    scale, top = (0.5 if gate == "sparse" else 1), (2 if gate == "head" else 1)
    for j, row in enumerate(module.weight.tolist()):
        inner = scale * sum(a * b for a, b in zip(row, x[0, 0].tolist()))
        assert out[0, 0, j, 0].item() == pytest.approx(top / (1 + math.exp(-inner)))


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


@ref.tries(100)
@given(ref.models())
def test_every_parameter_has_one_role_and_the_right_one(s):
    model = meta(s)
    table = tg.roles(model)
    assert sorted(table) == sorted(name for name, _ in model.named_parameters())
    for name in table:
        assert table[name] == role_of(name), name


def test_heads_that_predict_further_have_the_role_of_a_head():
    s = ref.small(mtp_num_heads=2)
    table = tg.roles(tg.Objective(tg.GPT(s), s))
    assert {name: role for name, role in table.items() if not name.startswith("model.")} == {
        "mtp.0.weight": "head", "mtp.1.weight": "head"}


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
    slot = lambda value, only=None: tg.VisitAdapters(**{
        k: adapter(*size, value) for k, size in sizes.items() if only in (None, k)})
    with torch.no_grad():
        plain = model.logits(model.hidden(ids))
        zero = Adapters([slot(0.0) for _ in model.plan], adapter(16, 32, 0.0))
        assert torch.equal(plain, model.logits(model.hidden(ids, adapters=zero), zero))
        for layer in range(s.num_layers):
            for part in sizes:
                one = Adapters([slot(0.1, part) if j == layer else tg.VisitAdapters()
                                for j in range(len(model.plan))])
                moved = model.logits(model.hidden(ids, adapters=one), one)
                assert not torch.equal(plain, moved), (layer, part)
                assert torch.equal(model(ids, ids, adapters=one),
                                   nn.functional.cross_entropy(moved.flatten(0, 1), ids.flatten()))
        head = Adapters([tg.VisitAdapters() for _ in model.plan], adapter(16, 32, 0.1))
        assert torch.equal(model.hidden(ids), model.hidden(ids, adapters=head))
        assert not torch.equal(plain, model.logits(model.hidden(ids), head))


@pytest.mark.parametrize("changes", [TINY_1855, TINY_1539, TINY_1033, MIXTURE])
def test_each_visit_of_depth_recurrence_has_adapters_of_its_own(changes):
    s = ref.small(**changes)
    model, ids = ref.randomise(tg.GPT(s)), ref.tokens(32, 2, 9)
    seen = []
    with torch.no_grad():
        for looping in {False, s.loops}:
            model.looping = looping
            for j in range(len(model.plan)):
                slots = [tg.VisitAdapters(mlp=adapter(16, 16, 0.1)) if k == j else tg.VisitAdapters()
                         for k in range(len(model.plan))]
                seen.append(model.hidden(ids, adapters=Adapters(slots)))
            seen.append(model.hidden(ids))
    for j, one in enumerate(seen):
        assert not any(torch.equal(one, other) for other in seen[:j])


# --- what training minimises -----------------------------------------------------------------------------------------


@ref.tries(60)
@given(ref.models(), st.integers(1, 3), st.sampled_from([0.2, 1.0]), st.integers(0, 10**6))
def test_further_heads_add_their_mean_loss(s, heads, weight, seed):
    """Head k reads the state at t and predicts the k-th token after the next, through the same cap; by hand."""
    s = tg.replace(s, mtp_num_heads=heads, mtp_loss_weight=weight)
    objective = tg.Objective(ref.double(s, seed), s).double()
    objective.mtp.requires_grad_(True)
    ref.randomise(objective.mtp, seed)
    ids, targets = ref.tokens(s.vocab_size, 2, 7, seed=seed), ref.tokens(s.vocab_size, 2, 7, seed=seed + 1)
    parameters, sums = ref.arrays(objective.model), [[] for _ in range(heads + 1)]
    for row, goal in zip(ids.tolist(), targets.tolist()):
        hidden, logits = ref.forward(parameters, s, row)
        sums[0] += [ref.nats(logits[t], goal[t]) for t in range(7)]
        narrow = hidden @ parameters["head_proj.weight"].T if s.embed_dim else hidden
        for k in range(1, heads + 1):
            further = narrow @ objective.mtp[k - 1].weight.detach().numpy().T
            further = ref.capped(parameters, s, further)
            sums[k] += [ref.nats(further[t], goal[t + k]) for t in range(7 - k)]
    main, *more = map(np.mean, sums)
    assert objective(ids, targets).item() == pytest.approx(main + weight * np.mean(more), rel=1e-5)
    plain = tg.Objective(objective.model, tg.replace(s, mtp_num_heads=0))
    assert plain(ids, targets).item() == pytest.approx(main, rel=1e-5) and not list(plain.mtp)
    weights = torch.rand(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weighted = np.mean(weights.numpy().ravel() * sums[0])
    assert objective(ids, targets, None, weights).item() == pytest.approx(weighted + weight * np.mean(more), rel=1e-5)


def test_further_heads_teach_the_model_and_stay_out_of_it(tmp_path):
    s = ref.small(mtp_num_heads=2)
    model, ids, targets = ref.randomise(tg.GPT(s), spread=0.2), ref.tokens(32, 2, 9), ref.tokens(32, 2, 9, seed=1)
    gradients = []
    for objective in (tg.Objective(model, s), tg.Objective(model, ref.small())):
        assert not any(head.weight.any() for head in objective.mtp)  # zero at first: no gradient below them yet
        for head in objective.mtp:
            nn.init.normal_(head.weight)
        model.zero_grad()
        objective(ids, targets).backward()
        gradients.append(model.blocks[0].mlp.up.weight.grad.clone())
        assert all(head.weight.grad.any() for head in objective.mtp)
    assert not torch.allclose(*gradients)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in tg.GPT(ref.small()).named_parameters()]
    for name, settings in (("with", s), ("without", ref.small())):
        tg.save_artifact(tmp_path / name, model, settings)
    assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes()


# --- every switch does something, eager and compiled ------------------------------------------------------------------

LIVE = dict(ref.SMALL, model_dim=24, num_heads=2, num_kv_heads=1, rope_dims=4, ve_layers=(1,), loop_start=1, loop_end=1,
            parallel_start_layer=1, trigram_dim=4)
RATES = dict(matrix_lr=0.1, scalar_lr=0.1, tied_embed_lr=0.1, embed_lr=0.1, head_lr=0.1, grad_clip_norm=0)
# What to change a setting to; others are found from their type.
OTHER = dict(model_dim=32, num_heads=4, num_kv_heads=2, num_layers=4, ve_layers=(0, 1), bigram_vocab_size=0, ve_dim=0,
             rope_dims=8, embed_dim=8, trigram_vocab_size=19, loop_end=2, enable_looping_at=0.1)
# What makes a setting act that waits for another one to be on (not to have one of some values).
ON = dict(num_loops=1, trigram_vocab_size=19, bigram_vocab_size=16, ve_dim=4, rope_dims=4)
# More skips than one need more visits; routed lanes are equal at first, until a skip reaches the one and not the other.
MORE = dict(skip_pairs=dict(num_loops=1, enable_looping_at=0), parallel_final_lane=dict(num_layers=4),
            parallel_first_skip=dict(skips="gated"))
# But for the caps, which test-time training moves (test_liveness.py).
MODEL_FIELDS = [f for f in fields(tg.Settings) if f.metadata["group"] == "Model" and f.name != "asym_logit_rescale"]


def others(f, value):
    """Values to change a setting to: every other choice, or one."""
    if get_origin(f.type) is Literal:
        return [choice for choice in get_args(f.type) if choice != value]
    if f.name in OTHER:
        return [OTHER[f.name]]
    if f.type is bool:
        return [not value]
    if f.type is int:
        return [value - 1 if value else 1]
    return [value * 1.5 if value and not (f.metadata["hi"] and value * 1.5 > f.metadata["hi"]) else 0.25]


def bases(f):
    """Changes under each of which a setting must act: one for every way to meet its `on` rule."""
    if not f.metadata["on"]:
        yield MORE.get(f.name, {})
    for (name, values), *_ in ref.alternatives(f.metadata["on"]):  # what follows an & is in MORE
        kind = tg.Settings.__dataclass_fields__[name]
        assert values or name in ON, f"{f.name.upper()} waits for {name.upper()}: add a value of that to ON in tests/test_model.py"
        for value in values or [ON.get(name)]:
            yield {name: tg.parse_value(kind, value) if values else value, **MORE.get(f.name, {})}


def losses(s, backend=None, steps=3):
    """Losses of a few optimizer steps on fixed data, with the loop switched on when a run would."""
    torch._dynamo.reset()
    rt, model = ref.alone(), tg.GPT(s)
    objective = tg.Objective(model, s)
    optimizer = tg.MuonAdam(objective, s, rt)
    training = SimpleNamespace(run=SimpleNamespace(s=s), model=model, stage=0, stage_start=0, step=0, qat=None)
    loss_of = torch.compile(objective, fullgraph=True, dynamic=False, backend=backend) if backend else objective
    out = []
    for step in range(steps):
        ids = ref.tokens(s.vocab_size, 2, 17, seed=step)
        tg.Training.enter(training, step / steps)
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


def test_every_model_switch_changes_the_loss():
    """A switch that is read but has no effect is found here, new settings included; choices are pairwise unlike."""
    known, dead = {}, []

    def loss_of(changes):
        s = ref.parse({**LIVE, **RATES, **changes})
        if s not in known:
            known[s] = losses(s)
        return known[s]

    for f in MODEL_FIELDS:
        for base in bases(f):
            start = ref.parse({**LIVE, **base})
            assert start.holds(f.metadata["on"]), f.name
            seen = [(base, loss_of(base))]
            for value in others(f, getattr(start, f.name)):
                changes = {**base, f.name: value, **({"ve_layers": ()} if f.name == "ve_dim" else {})}
                found = loss_of(changes)
                dead += [(changes, other) for other, before in seen
                         if max(abs(a - b) for a, b in zip(before, found)) < 1e-6]
                seen.append((changes, found))
    assert dead == [], "each of these changes has the same losses as the changes after it: see OTHER, ON and MORE here"


SEARCH = 600  # random settings, of which the one with the most new values is taken: more find a smaller cover


def covering():
    """Few settings, in which together every model setting has each value of the test above while it acts."""
    rng, start = random.Random(0), ref.parse(LIVE)
    choices = {f: [getattr(start, f.name), *others(f, getattr(start, f.name))] for f in MODEL_FIELDS}
    left = {(f.name, value) for f, values in choices.items() for value in values}
    while left:
        best, met = None, set()
        for _ in range(SEARCH):
            values = {f.name: rng.choice(options) for f, options in choices.items()}
            values.update({} if values["ve_dim"] else {"ve_layers": ()})
            try:
                s = ref.parse({**LIVE, **RATES, **values})
            except tg.BadInput:
                continue
            acts = {(f.name, getattr(s, f.name)) for f in choices if s.holds(f.metadata["on"])}
            if len(acts & left) > len(met):
                best, met = s, acts & left
        left -= met
        yield best


def test_a_compiled_graph_loses_no_model_switch(quiet_compiler):
    """Since each switch changes the loss, a graph with the losses of the uncompiled model has them all."""
    for s in covering():
        np.testing.assert_allclose(losses(s, "eager"), losses(s), rtol=1e-4, err_msg=s.text())


GRAPHS = {
    "default": dict(num_layers=2, ve_layers=(1,)),
    "bare": dict(num_layers=2, bigram_vocab_size=0, ve_dim=0, ve_layers=(), smear_gate="none", resid_mix=False,
                 skips="none", rope_dims=0, logit_softcap=0),
    # A layer fewer than elsewhere, with the same parts: each visit is traced for seconds.
    "1855": TINY_1855 | dict(num_layers=3, loop_start=0, loop_end=0, parallel_start_layer=1),
    "1539": TINY_1539 | dict(num_layers=3, xsa_last_n=3),
    "1033": TINY_1033, "mixture": MIXTURE,
    "heads": dict(mtp_num_heads=2, attn_gate="head", value_residual="sigmoid", smear_gate="scalar"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_whole_objective_is_one_graph_forward_and_backward(name, quiet_compiler):
    s = ref.small(**GRAPHS[name])
    objective = ref.randomise(tg.Objective(tg.GPT(s), s), spread=0.3)
    ids, targets = ref.tokens(32, 2, 16), ref.tokens(32, 2, 16, seed=1)
    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, dynamic=False, backend="aot_eager")
    graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    before, plans = graphs(), sorted({False, s.loops})
    for objective.model.looping in plans:
        results = []
        for function in (objective, compiled):
            objective.zero_grad()
            loss = function(ids, targets)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in objective.parameters() if p.grad is not None)])
        assert len(results[0]) == len(results[1])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert graphs() == before + len(plans)
    for objective.model.looping in [*plans, *plans]:  # both are known now: the switch back and forth costs nothing
        compiled(ids.flip(0), targets.flip(0)).backward()
    assert graphs() == before + len(plans)


@pytest.mark.parametrize("changes", [{}, TINY_1855, TINY_1539, TINY_1033, MIXTURE])
def test_bfloat16_activations_stay_close_to_float32(changes):
    s = ref.small(**changes)
    exact, rounded = (ref.randomise(tg.GPT(s, dtype=dtype), spread=0.2) for dtype in (torch.float32, torch.bfloat16))
    ids = ref.tokens(32, 2, 16)
    with torch.no_grad():
        hidden = rounded.hidden(ids)
        assert hidden.dtype == torch.bfloat16 and rounded.logits(hidden).dtype == torch.float32
        assert abs(exact(ids, ids).item() - rounded(ids, ids).item()) < 0.02
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
