"""The model, its optimizer and its score written again from the specification: float64, numpy, one loop a symbol.

Nothing here calls train_gpt.py except to build its settings, so that a mistake there is not repeated here.
Below: random settings and weights, and the stand-ins for Runtime that let one process play several ranks.
"""

import math
import os
import threading

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


def bigram_buckets(ids, rows, doc_mask):
    """The last row is reserved for a token without predecessor."""
    last = rows - 1
    return [last if t == 0 or (doc_mask and ids[t] == BOS) else ((36313 * ids[t]) ^ (27191 * ids[t - 1])) % last
            for t in range(len(ids))]


def attention(p, s, i, n, ve):
    """n, ve: normed inputs and value embeddings (or None) by position -> outputs before the output projection."""
    hd, group, T = s.model_dim // s.num_heads, s.num_heads // s.num_kv_heads, len(n)
    w = {z: p[f"blocks.{i}.attn.{z}.weight"] for z in "qkv"}
    q = [(w["q"] @ x).reshape(s.num_heads, hd) for x in n]
    k = [(w["k"] @ x).reshape(s.num_kv_heads, hd) for x in n]
    v = [w["v"] @ x for x in n]
    if s.ve_dim and i in s.ve_layers:
        v = [a + p[f"blocks.{i}.attn.ve_scale"] * b for a, b in zip(v, ve)]
    v = [x.reshape(s.num_kv_heads, hd) for x in v]
    gain, y = p[f"blocks.{i}.attn.q_gain"], np.zeros((T, s.num_heads, hd))
    for t in range(T):
        for j in range(s.num_heads):
            g = j // group
            query = rope(rms(q[t][j]), t, s.rope_dims, s.rope_base) * gain[j]
            scores = np.array([query @ rope(rms(k[u][g]), u, s.rope_dims, s.rope_base)
                               for u in range(t + 1)]) / math.sqrt(hd)
            share = np.exp(scores - scores.max())
            y[t, j] = sum(a * v[u][g] for u, a in enumerate(share / share.sum()))
            if i >= s.num_layers - s.xsa_last_n:
                unit = v[t][g] / max(np.linalg.norm(v[t][g]), 1e-12)
                y[t, j] -= (y[t, j] @ unit) * unit
    return y.reshape(T, -1)


def forward(p, s, ids):
    """Normed final states (T, D) and logits (T, V) of one sequence of token ids; p: parameters by name, float64."""
    T, masked = len(ids), s.doc_mask == "inputs"
    x = [p["embed.weight"][token].copy() for token in ids]
    if s.bigram_vocab_size:
        for t, bucket in enumerate(bigram_buckets(ids, s.bigram_vocab_size, masked)):
            row = p["bigram.table.weight"][bucket]
            x[t] += p["bigram.scale"] * (p["bigram.proj.weight"] @ row if s.bigram_dim != s.model_dim else row)
    x = [rms(row) for row in x]
    if s.smear_gate:
        gate, before = sigmoid(p["smear.gate"]), [np.zeros(s.model_dim), *x]
        x = [x[t].copy() if masked and ids[t] == BOS else (1 - gate) * x[t] + gate * before[t] for t in range(T)]
    ve = [p["value_embed.scale"] * (p["value_embed.proj.weight"] @ p["value_embed.table.weight"][token])
          for token in ids] if s.ve_dim else None
    x0, x, stack, half = np.array(x), np.array(x), [], s.num_layers // 2
    for i in range(s.num_layers):
        if s.skips == "linear" and i >= half and stack:
            x = x + p["skip_weights"][i - half] * stack.pop()
        lns = 1 / math.sqrt(i + 1) if s.ln_scale else 1.0
        mix = p[f"blocks.{i}.resid_mix"] if s.resid_mix else (1.0, 0.0)
        u = mix[0] * x + mix[1] * x0
        y = attention(p, s, i, [rms(row) * lns for row in u], ve)
        z = u + p[f"blocks.{i}.attn_scale"] * (y @ p[f"blocks.{i}.attn.o.weight"].T)
        inner = np.array([rms(row) * lns for row in z]) @ p[f"blocks.{i}.mlp.up.weight"].T
        act = np.where(inner > 0, inner, s.leaky_slope * inner) ** 2
        x = z + p[f"blocks.{i}.mlp_scale"] * (act @ p[f"blocks.{i}.mlp.down.weight"].T)
        if s.skips == "linear" and i < half:
            stack.append(x)
    hidden = np.array([rms(row) for row in x])
    logits = hidden @ p["embed.weight"].T
    return hidden, s.logit_softcap * np.tanh(logits / s.logit_softcap) if s.logit_softcap else logits


def nats(logits, target):
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()) - logits[target])


def parameter_count(s):
    """The general formula of the specification."""
    d, h, L = s.model_dim, round(s.mlp_mult * s.model_dim), s.num_layers
    dk = s.num_kv_heads * (d // s.num_heads)
    count = L * (2 * d * d + 2 * dk * d + 2 * h * d + 2 * d + s.num_heads) + s.vocab_size * d
    count += L * 2 * d if s.resid_mix else 0
    count += d if s.smear_gate else 0
    count += (L // 2) * d if s.skips == "linear" else 0
    if s.bigram_vocab_size:
        count += s.bigram_vocab_size * s.bigram_dim + (s.bigram_dim * d if s.bigram_dim != d else 0) + 1
    if s.ve_dim:
        count += s.vocab_size * s.ve_dim + s.ve_dim * dk + 1 + len(s.ve_layers)
    return count


# --- settings and weights --------------------------------------------------------------------------------------------

SMALL = dict(vocab_size=32, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, rope_dims=2, xsa_last_n=1,
             mlp_mult=2,
             bigram_vocab_size=16, bigram_dim=4, ve_dim=4, ve_layers=(1, 2), train_seq_len=16, train_batch_tokens=32,
             micro_batch_tokens=32, eval_seq_len=16, eval_stride=4, eval_batch_seqs=3, warmup_steps=0, iterations=10,
             max_wallclock_seconds=0, compressor="zlib")


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
def models(draw):
    """Settings of a small model: every switch of the model on and off, odd shapes, the corners of every range."""
    kv, group, head = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    dim = kv * group * head
    while dim < 8:
        head, dim = head + 3, kv * group * (head + 3)
    layers = draw(st.integers(1, 5))
    ve = tuple(sorted(draw(st.sets(st.integers(0, layers - 1)))))
    return small(
        num_layers=layers, model_dim=dim, num_heads=kv * group, num_kv_heads=kv,
        mlp_mult=draw(st.integers(-(-dim // 4), 3 * dim)) / dim,
        leaky_slope=draw(st.sampled_from([0, 0.5, 1])), logit_softcap=draw(st.sampled_from([0, 2.5, 30])),
        rope_dims=2 * draw(st.integers(0, head // 2)), rope_base=draw(st.sampled_from([10000, 22081.8, 3])),
        xsa_last_n=draw(st.integers(0, layers)), ln_scale=draw(st.booleans()), resid_mix=draw(st.booleans()),
        skips=draw(st.sampled_from(["none", "linear"])), smear_gate=draw(st.booleans()),
        doc_mask=draw(st.sampled_from(["none", "inputs"])),
        bigram_vocab_size=draw(st.sampled_from([0, 2, 3, 17])), bigram_dim=draw(st.sampled_from([1, 3, dim])),
        ve_dim=draw(st.integers(1, 4)) if ve else 0, ve_layers=ve, vocab_size=draw(st.integers(8, 40)))


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

    def sync(self):
        pass

    def agree(self, *values):
        return tuple(map(max, zip(*self.ranks.exchange(self.rank, values))))

    def sum(self, tensor):
        return tensor.copy_(sum(self.ranks.exchange(self.rank, tensor.clone())))

    def same(self, value):
        return self.ranks.exchange(self.rank, value)[0]


def alone():
    return Ranks(1).members[0]
