"""The model, its optimizer and its score written again from the specification: float64, numpy, one loop a symbol.

Nothing here calls train_gpt.py except to build its settings, so that a mistake there is not repeated here.
Below: random settings and weights, and the stand-ins for Runtime that let one process play several ranks.
"""

import contextlib
import math
import os
import threading
from dataclasses import fields
from typing import Literal, get_args, get_origin

import numpy as np
import torch
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train_gpt as tg

BOS = 1
EPS = 1.1920929e-07


def tries(n):
    """Profile of a property test: the same cases on every machine; EXPLORE=1 draws new ones."""
    return hypothesis_settings(max_examples=n, deadline=None, derandomize=not os.environ.get("EXPLORE"))


# --- the model -------------------------------------------------------------------------------------------------------


def rms(x):
    return x / np.sqrt(np.mean(x * x) + EPS)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def angles(positions, dims, base):
    """(positions, dims / 2): position times frequency base^(-2j / dims)."""
    return np.array([[t * base ** (-2 * j / dims) for j in range(dims // 2)]
                     for t in range(positions)]).reshape(positions, -1)


def rope(x, t, dims, base):
    """One head's vector at position t: the first half of the first `dims` channels against the second half."""
    out, half = x.copy(), dims // 2
    for j in range(half):
        angle = t * base ** (-2 * j / dims)
        a, b = x[j], x[half + j]
        out[j] = a * math.cos(angle) + b * math.sin(angle)
        out[half + j] = -a * math.sin(angle) + b * math.cos(angle)
    return out


def document_starts(ids, masked=True, longest=0):
    """By position, where its segment begins: at the row's start, at BOS, and every `longest` tokens of a document."""
    starts, at = [], 0
    for t, token in enumerate(ids):
        at = t if masked and token == BOS or longest and t - at == longest else at
        starts.append(at)
    return starts


def hashed(factors, ids, t, buckets):
    """Products of a token and those before it with their factors, xored."""
    value = 0
    for back, factor in enumerate(factors):
        value ^= factor * ids[t - back]
    return value % buckets


def bigram_buckets(ids, rows, masked):
    """The last row is reserved for a token without predecessor in its row (or, masked, document)."""
    starts = document_starts(ids, masked)
    return [rows - 1 if t == starts[t] else hashed((36313, 27191), ids, t, rows - 1) for t in range(len(ids))]


def shared_trigram_buckets(ids, rows, masked):
    """Of the trigram that shares the bigram's table (#1539): the reserved row unless there are two predecessors."""
    starts = document_starts(ids, masked)
    return [rows - 1 if t < starts[t] + 2 else hashed((36313, 27191, 51497), ids, t, rows - 1)
            for t in range(len(ids))]


def trigram_buckets(ids, rows, masked):
    """Of the trigram with a table of its own (#1311): the bigram where there is only one predecessor."""
    starts, bigrams = document_starts(ids, masked), bigram_buckets(ids, rows, masked)
    return [bigrams[t] if t < starts[t] + 2 else hashed((48271, 36313, 27191), ids, t, rows - 1)
            for t in range(len(ids))]


def halves(s, looping):
    """Encoder and decoder as [(layer, how often in a row)], and how many skips run from one to the other."""
    times = s.num_loops if looping else 0
    if s.loop_order == "range":
        order = [(i, 1) for i in range(s.num_layers)]
        for _ in range(times):
            order[s.loop_end + 1 : s.loop_end + 1] = [(i, 1) for i in range(s.loop_start, s.loop_end + 1)]
    else:
        order = [(i, 1 + times if s.loop_start <= i <= s.loop_end else 1) for i in range(s.num_layers)]
    half = len(order) // 2
    most = 0 if s.skips == "none" else s.skip_pairs if s.skip_pairs else half
    return order[:half], order[half:], min(half, most)


def skip(p, s, pair, x, kept):
    w = p["skips.weight"][pair]
    if s.skips == "linear":
        return x + w * kept
    if s.skips == "sigmoid":
        return x + sigmoid(w) * kept
    g = sigmoid(p["skips.gate"][pair])
    return g * x + (1 - g) * (w * kept)


def head_factor(p, s, i, j, n):
    """The gate on head j of layer i, from the attention's normed input at that position."""
    if s.attn_gate == "none":
        return 1.0
    w = p[f"blocks.{i}.attn.gate.weight"][j]
    if s.attn_gate == "dense":
        return sigmoid(w @ n)
    inner = w @ n[: s.gate_window]
    return 2 * sigmoid(inner) if s.attn_gate == "head" else sigmoid(s.sparse_attn_gate_scale * inner)


class Adapters:
    """(A (rank, inputs), B (outputs, rank)) by visit and place, visit None for the head: scale B A x beside a layer.

    Beside o, attn (the whole attention) and mlp that is added behind the layer's scale; scaled (#1530): before it.
    """

    def __init__(self, pairs=None, scale=1.0, scaled=False):
        self.pairs, self.scale, self.scaled = pairs or {}, scale, scaled

    def __call__(self, visit, what, x):
        """Of one position, or of each row of x."""
        if (visit, what) not in self.pairs:
            return 0.0
        a, b = self.pairs[visit, what]
        return self.scale * (np.asarray(x) @ a.T) @ b.T

    def written(self, visit, pairs, channels, written):
        """What a block's part writes: its channels' scale times `written`, and adapters [(what, their input)]."""
        low = sum(self(visit, what, x) for what, x in pairs)
        return channels * (written + low) if self.scaled else channels * written + low


def values(p, s, i, n, ve, first, more=0.0):
    """Values by position; `first` is where layer 0 leaves those that later layers mix in; `more` is an adapter's."""
    v = [*(np.array(n) @ p[f"blocks.{i}.attn.v.weight"].T + more)]
    if i == 0 and s.value_residual == "vrl" and not first:
        first += v
    if s.ve_dim and i in s.ve_layers:
        v = [a + p[f"blocks.{i}.attn.ve_scale"] * b for a, b in zip(v, ve)]
    if i == 0 and not first:
        first += v
    if i == 0 or s.value_residual == "none":
        return v
    mix = p[f"blocks.{i}.attn.residual.mix"]
    if s.value_residual == "vrl":
        return [a + mix * b for a, b in zip(v, first)]
    if s.value_residual == "sigmoid":
        return [a + sigmoid(mix) * b for a, b in zip(v, first)]
    return [mix[0] * b + mix[1] * a for a, b in zip(v, first)]


def attention(p, s, i, n, ve, first, starts, visit, low):
    """n, ve: normed inputs and value embeddings (or None) by position -> what attention writes, scaled."""
    hd, group, T = s.model_dim // s.num_heads, s.num_heads // s.num_kv_heads, len(n)
    q = (np.array(n) @ p[f"blocks.{i}.attn.q.weight"].T + low(visit, "q", n)).reshape(T, s.num_heads, hd)
    k = (np.array(n) @ p[f"blocks.{i}.attn.k.weight"].T + low(visit, "k", n)).reshape(T, s.num_kv_heads, hd)
    v = [x.reshape(s.num_kv_heads, hd) for x in values(p, s, i, n, ve, first, low(visit, "v", n))]
    turned = [[rope(rms(k[t][g]), t, s.rope_dims, s.rope_base) for g in range(s.num_kv_heads)] for t in range(T)]
    gain, y = p[f"blocks.{i}.attn.q_gain"], np.zeros((T, s.num_heads, hd))
    for t in range(T):
        for j in range(s.num_heads):
            g = j // group
            query = rope(rms(q[t][j]), t, s.rope_dims, s.rope_base) * gain[j]
            seen = range(starts[t], t + 1)
            scores = np.array([query @ turned[u][g] for u in seen]) / math.sqrt(hd)
            share = np.exp(scores - scores.max())
            y[t, j] = sum(a * v[u][g] for u, a in zip(seen, share / share.sum()))
            if i >= s.num_layers - s.xsa_last_n:
                unit = v[t][g] / max(np.linalg.norm(v[t][g]), 1e-12)
                y[t, j] -= (y[t, j] @ unit) * unit
            y[t, j] *= head_factor(p, s, i, j, n[t])
    y = y.reshape(T, -1)
    return low.written(visit, [("o", y), ("attn", n)], p[f"blocks.{i}.attn_scale"], y @ p[f"blocks.{i}.attn.o.weight"].T)


def mlp(p, s, i, n):
    inner = np.array(n) @ p[f"blocks.{i}.mlp.up.weight"].T
    return np.where(inner > 0, inner, s.leaky_slope * inner) ** 2 @ p[f"blocks.{i}.mlp.down.weight"].T


def block(p, s, i, lanes, x0, ve, first, starts, visit, low):
    """One application of layer i, number `visit` of the forward, to one lane or two."""
    lns = 1 / math.sqrt(i + 1) if s.ln_scale else 1.0
    mix = p[f"blocks.{i}.resid_mix"] if s.resid_mix else (1.0, 0.0)
    normed = lambda x: [rms(row) * lns for row in x]
    u = mix[0] * lanes[0] + mix[1] * x0
    a = attention(p, s, i, normed(u), ve, first, starts, visit, low)
    feed = lambda x: low.written(visit, [("mlp", normed(x))], p[f"blocks.{i}.mlp_scale"], mlp(p, s, i, normed(x)))
    if len(lanes) == 1:
        z = u + a
        return [z + feed(u if s.parallel_residual == "gptj" and i >= s.parallel_start_layer else z)]
    m = feed(lanes[1])
    if s.parallel_residual == "lanes":
        return [u + a, lanes[1] + m]
    keep, write = p["lanes.keep"][i], p["lanes.write"][i]
    return [keep[0] * lanes[0] + write[0][0] * a + write[1][0] * m,
            keep[1] * lanes[1] + write[0][1] * a + write[1][1] * m]


def embedded(p, s, ids):
    """What enters the first block, by position."""
    T, masked = len(ids), s.doc_mask != "none"
    x = [p["embed.weight"][token].copy() for token in ids]
    if s.embed_dim:
        x = [p["embed_proj.weight"] @ row for row in x]
    tables = [("bigram", s.bigram_vocab_size, s.bigram_dim, [bigram_buckets, shared_trigram_buckets][: 1 + s.trigram]),
              ("trigram", s.trigram_vocab_size, s.trigram_dim, [trigram_buckets])]
    for name, rows, width, hashes in tables:
        found = [buckets(ids, rows, masked) for buckets in hashes] if rows else []
        for t in range(T if rows else 0):
            row = sum(p[f"{name}.table.weight"][buckets[t]] for buckets in found)
            x[t] = x[t] + p[f"{name}.scale"] * (p[f"{name}.proj.weight"] @ row if width != s.model_dim else row)
    before = [np.zeros(s.model_dim), *x]
    if s.smear_gate == "scalar":
        w = p["early_smear.weight"]
        x = [x[t] if masked and ids[t] == BOS else
             x[t] + p["early_smear.scale"] * sigmoid(w @ x[t][: s.gate_window]) * before[t] for t in range(T)]
    x = [rms(row) for row in x]
    if s.smear_gate == "channel":
        gate, before = sigmoid(p["smear.gate"]), [np.zeros(s.model_dim), *x]
        x = [x[t].copy() if masked and ids[t] == BOS else (1 - gate) * x[t] + gate * before[t] for t in range(T)]
    return np.array(x)


def forward(p, s, ids, looping=True, longest=0, band=0, low=Adapters()):  # noqa: B008 - it is immutable
    """Normed final states (T, D) and logits (T, V) of one sequence of token ids; p: parameters by name, float64. With a
    `band` every token sees, in every layer, that many tokens up to itself. low: adapters.
    """
    starts = document_starts(ids, longest=longest) if s.doc_mask == "attention" else [0] * len(ids)
    starts = [max(start, t + 1 - band) if band else start for t, start in enumerate(starts)]
    ve = [p["value_embed.scale"] * (p["value_embed.proj.weight"] @ p["value_embed.table.weight"][token])
          for token in ids] if s.ve_dim else None
    x0, first, stack = embedded(p, s, ids), [], []
    encoder, decoder, pairs = halves(s, looping)
    lanes, visit = [x0], 0

    def part(layer):
        """From the first parallel layer on there are two lanes."""
        nonlocal lanes
        if s.parallel_residual in ("lanes", "routed") and layer >= s.parallel_start_layer and len(lanes) == 1:
            lanes = [lanes[0], lanes[0]]

    def run(layer, times):
        nonlocal lanes, visit
        part(layer)
        for _ in range(times):
            lanes = block(p, s, layer, lanes, x0, ve, first, starts, visit, low)
            visit += 1

    for layer, times in encoder:
        run(layer, times)
        stack.append(lanes[0])
    for slot, (layer, times) in enumerate(decoder):
        if s.parallel_first_skip == "lane0":  # #1855: they part first, then lane 0 gets the skip
            part(layer)
        if slot < pairs:
            lanes = [skip(p, s, slot, lanes[0], stack.pop()), *lanes[1:]]
        run(layer, times)
    if len(lanes) == 2:
        m = p["lanes.merge"] if s.parallel_final_lane == "learned" else 0.5
        lanes = [m * lanes[0] + (1 - m) * lanes[1]]
    hidden = np.array([rms(row) for row in lanes[0]])
    narrow = hidden @ p["head_proj.weight"].T if s.embed_dim else hidden
    logits = narrow @ p["embed.weight" if s.tie_embeddings else "head.weight"].T + low(None, "head", hidden)
    return hidden, capped(p, s, logits)


def capped(p, s, logits):
    if not s.logit_softcap:
        return logits
    above, below = p["caps.caps"] if s.asym_logit_rescale else 2 * [s.logit_softcap]
    return np.where(logits > 0, above * np.tanh(logits / above), below * np.tanh(logits / below))


def nats(logits, target):
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()) - logits[target])


# --- settings and weights --------------------------------------------------------------------------------------------

SMALL = dict(vocab_size=32, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, rope_dims=2, xsa_last_n=1,
             mlp_mult=2, bigram_vocab_size=16, bigram_dim=4, ve_dim=4, ve_layers=(1, 2), train_seq_len=16,
             train_batch_tokens=32, micro_batch_tokens=32, eval_seq_len=16, eval_stride=4, eval_batch_seqs=3,
             warmup_steps=0, iterations=10, max_wallclock_seconds=0, compressor="zlib",
             fit="off", matrix_quant="gptq_lite", embed_quant="gptq_lite")


def parse(values):
    """Settings from field names and values, through the checks that a user's settings pass."""
    words = {k: ",".join(map(str, v)) if isinstance(v, tuple) else int(v) if isinstance(v, bool) else v
             for k, v in values.items()}
    return tg.Settings.parse([f"{k.upper()}={v}" for k, v in words.items()])


def small(**changes):
    return parse({**SMALL, **changes})


def randomise(model, seed=0, spread=0.5):
    """Every parameter drawn anew, so that no part hides behind a zero or a one of its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)
    return model


def arrays(model):
    return {name: tensor.detach().double().cpu().numpy() for name, tensor in model.named_parameters()}


def double(s, seed=0, spread=0.5):
    """GPT in float64 with random weights and unrounded rotary tables."""
    model = randomise(tg.GPT(s, dtype=torch.float64, init=False).double(), seed, spread)
    exact = angles(len(model.cos), s.rope_dims, s.rope_base)
    for name, table in (("cos", np.cos(exact)), ("sin", np.sin(exact))):
        assert np.abs(getattr(model, name).numpy() - table).max(initial=0) < 1e-6
        setattr(model, name, torch.from_numpy(table))
    return model


def tokens(vocab, *shape, seed=0, bos=0.15):
    """Random ids, some of them the beginning of a document."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, shape)
    return torch.from_numpy(np.where(rng.random(shape) < bos, BOS, ids))


@st.composite
def models(draw, **fixed):
    """Settings of a small model: every switch of the model in every position, odd shapes, the corners of every range.

    What only acts with another switch is drawn with it. `fixed` settings are not drawn.
    """
    kv, group, head = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    dim = kv * group * head
    while dim < 8:
        head, dim = head + 3, kv * group * (head + 3)
    layers = draw(st.integers(1, 5))
    ve = tuple(sorted(draw(st.sets(st.integers(0, layers - 1)))))
    pick = lambda *values: draw(st.sampled_from(values))
    chosen = dict(
        num_layers=layers, model_dim=dim, num_heads=kv * group, num_kv_heads=kv,
        mlp_mult=draw(st.integers(-(-dim // 4), 3 * dim)) / dim, leaky_slope=pick(0, 0.5, 1),
        logit_softcap=pick(0, 2.5, 30), tie_embeddings=draw(st.booleans()), embed_dim=pick(0, 3, dim),
        rope_dims=2 * draw(st.integers(0, head // 2)), rope_base=pick(10000, 22081.8, 3),
        xsa_last_n=draw(st.integers(0, layers)), ln_scale=draw(st.booleans()), resid_mix=draw(st.booleans()),
        attn_gate=pick("none", "head", "dense", "sparse"), value_residual=pick("none", "vrl", "pair", "sigmoid"),
        skips=pick("none", "linear", "sigmoid", "gated"), num_loops=pick(0, 0, 1, 2),
        parallel_residual=pick("none", "gptj", "lanes", "routed"), smear_gate=pick("none", "channel", "scalar"),
        doc_mask=pick("none", "inputs", "attention"), bigram_vocab_size=pick(0, 2, 3, 17),
        trigram_vocab_size=pick(0, 0, 2, 19), ve_dim=draw(st.integers(1, 4)) if ve else 0, ve_layers=ve,
        vocab_size=draw(st.integers(8, 40)))
    chosen.update(fixed)
    if chosen["attn_gate"] in ("head", "sparse") or chosen["smear_gate"] == "scalar":
        chosen["gate_window"] = draw(st.integers(1, dim))
    if chosen["attn_gate"] == "sparse":
        chosen["sparse_attn_gate_scale"] = pick(0.5, 1, 3)
    if chosen["skips"] != "none":
        chosen["skip_pairs"] = pick(0, 0, 1, 2, 9)
    if chosen["num_loops"]:
        first = draw(st.integers(0, layers - 1))
        chosen.update(loop_start=first, loop_end=draw(st.integers(first, layers - 1)),
                      loop_order=pick("range", "layer"))
    if chosen["parallel_residual"] != "none":
        chosen["parallel_start_layer"] = draw(st.integers(0, layers - 1))
        if chosen["parallel_residual"] != "gptj":
            chosen["parallel_final_lane"] = pick("mean", "learned")
        if chosen["parallel_residual"] == "routed" and chosen["parallel_start_layer"] == layers - 1:
            chosen["parallel_final_lane"] = "mean"  # the other is refused: equal lanes teach it nothing
    if chosen["bigram_vocab_size"]:
        chosen.update(bigram_dim=pick(1, 3, dim), trigram=draw(st.booleans()))
    if chosen["trigram_vocab_size"]:
        chosen["trigram_dim"] = pick(1, 4, dim)
    if chosen["logit_softcap"]:
        chosen["asym_logit_rescale"] = draw(st.booleans())
    chosen.update(fixed)
    if chosen["parallel_residual"] in ("lanes", "routed") and chosen["skips"] != "none" and pick("both", "lane0") == "lane0":
        with contextlib.suppress(tg.BadInput):  # refused where no skip enters as the lanes part
            return small(**chosen, parallel_first_skip="lane0")
    return small(**chosen)


# --- ranks -----------------------------------------------------------------------------------------------------------


class Ranks:
    """Stand-ins for Runtime: `world` ranks in this process, which reduce when used from a thread each (`together`)."""

    def __init__(self, world=1):
        self.world, self.box, self.barrier = world, [None] * world, threading.Barrier(world)
        self.members = [Rank(self, rank) for rank in range(world)]

    def exchange(self, rank, value):
        self.box[rank] = value
        self.barrier.wait(60)
        values = list(self.box)
        self.barrier.wait(60)
        return values

    def together(self, work):
        """work(rank object) on all ranks at once; their results in order."""
        results = [None] * self.world

        def run(i):
            try:
                results[i] = work(self.members[i])
            except BaseException as error:
                results[i] = error
                self.barrier.abort()

        threads = [threading.Thread(target=run, args=(i,)) for i in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


class Rank:
    device, dtype, compiled = torch.device("cpu"), torch.float32, False

    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.world, self.choices = ranks, rank, ranks.world, []

    def choose(self, name, choice, reason):
        self.choices.append((name, choice, reason))

    def compile(self, function):
        return function

    def device_name(self):
        return "cpu"

    def sync(self):
        pass

    def max(self, *values):
        return tuple(map(max, zip(*self.ranks.exchange(self.rank, values)))) if self.world > 1 else values

    def sum(self, tensor):
        return tensor.copy_(sum(self.ranks.exchange(self.rank, tensor.clone()))) if self.world > 1 else tensor

    def gather(self, value):
        return self.ranks.exchange(self.rank, value) if self.world > 1 else [value]

    def broadcast(self, value):
        return self.ranks.exchange(self.rank, value)[0] if self.world > 1 else value


def alone():
    return Ranks(1).members[0]


# Rules of settings (`on`)


def typed_choices(f):
    """What a user may type for a field whose values a condition names."""
    if get_origin(f.type) is Literal:
        return get_args(f.type)
    if f.type is float:
        return ("0", "0.7")
    return ("0", "1") if f.type is bool else ("q", "k", "v", "o", "attn", "mlp", "head")


def alternatives(rule):
    """[[(field, the typed values that meet its condition; none: anything but 0 and empty)]], one list an alternative."""
    choices = {f.name: typed_choices(f) for f in fields(tg.Settings)}

    def meeting(condition):
        return [value for value in choices[condition.setting] if condition.values
                and (value in condition.values) != condition.negated]

    return [[(condition.setting, meeting(condition)) for condition in alternative] for alternative in rule]
