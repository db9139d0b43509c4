"""Attention kernels against loops, and the choice among them: the first that works, every other one named."""

import logging
import math
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg


def loops(q, k, v, starts=None):
    """Causal grouped-query attention, one query at a time, float64; starts[b][t]: where the token's segment begins."""
    q, k, v = (z.detach().double().numpy() for z in (q, k, v))
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        first = starts[b][t] if starts else 0
        scores = np.array([q[b, t, h] @ k[b, u, h // group] for u in range(first, t + 1)]) / math.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, first : t + 1, h // group] / weights.sum()
    return out


def inputs(batch, length, kv, group, channels, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda heads: torch.randn(batch, length, heads, channels, dtype=torch.float64, generator=generator)
    return [(size * draw(heads)).requires_grad_() for heads in (kv * group, kv, kv)]


shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6),
                   st.integers(0, 99),
                   st.sampled_from([0.1, 1.0, 20.0]))


@pytest.mark.parametrize("attend", [tg.attend_sdpa, tg.attend_reference])
@ref.tries(60)
@given(shapes)
def test_attention_equals_the_loops(attend, shape):
    q, k, v = inputs(*shape)
    out = attend(q, k, v)
    assert out.shape == q.shape
    np.testing.assert_allclose(out.detach().numpy(), loops(q, k, v), rtol=1e-8, atol=1e-9)


@ref.tries(40)
@given(shapes)
def test_gradients_of_the_kernel_are_those_of_the_reference(shape):
    leaves = inputs(*shape)
    weight = torch.randn(leaves[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b = (torch.autograd.grad((attend(*leaves) * weight).sum(), leaves)
            for attend in (tg.attend_sdpa, tg.attend_reference))
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("attend", [tg.attend_sdpa, tg.attend_reference])
def test_gradients_equal_finite_differences(attend):
    assert torch.autograd.gradcheck(attend, inputs(1, 4, 2, 2, 3))


@pytest.mark.parametrize("attend", [tg.attend_sdpa, tg.attend_reference])
def test_the_future_has_no_influence_even_when_it_is_not_finite(attend):
    q, k, v = (z.detach() for z in inputs(1, 8, 2, 2, 4))
    before = attend(q, k, v)
    k[:, 5], v[:, 5:] = 1e30, 1e30
    assert torch.equal(attend(q, k, v)[:, :5], before[:, :5])


# --- documents -------------------------------------------------------------------------------------------------------


def by_segments(q, k, v, cu, longest):
    """What a kernel with cumulative lengths does, (B * T, heads, channels), one segment after the other."""
    assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == len(q) and cu.diff().min() > 0
    assert cu.diff().max() <= longest, "the kernel was promised shorter segments"
    parts = [tg.attend_reference(q[None, a:b], k[None, a:b], v[None, a:b])[0] for a, b in pairwise(cu.tolist())]
    return torch.cat(parts)


def varlen(kernel=by_segments, longest=2**20):
    attend = partial(tg.attend_varlen, kernel=kernel, longest=longest)
    attend.varlen = True
    return attend


KERNELS = {"sdpa": tg.attend_sdpa, "reference": tg.attend_reference, "varlen": varlen(),
           "varlen tuple": varlen(lambda *args: (by_segments(*args), "log-sum-exp"))}


@pytest.mark.parametrize("name", KERNELS)
@ref.tries(60)
@given(shapes, st.integers(0, 5))
def test_attention_stays_in_documents(name, shape, longest):
    (q, k, v), attend = inputs(*shape), KERNELS[name]
    ids = ref.tokens(8, *shape[:2], seed=shape[-2], bos=0.3)
    docs = tg.find_documents(ids, "attention", longest, varlen=getattr(attend, "varlen", False))
    starts = [ref.document_starts(row, longest=longest) for row in ids.tolist()]
    out = attend(q, k, v, docs)
    np.testing.assert_allclose(out.detach().numpy(), loops(q, k, v, starts), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["sdpa", "varlen"])
@ref.tries(40)
@given(shapes, st.integers(0, 5))
def test_gradients_within_documents_are_those_of_the_reference(name, shape, longest):
    leaves, ids = inputs(*shape), ref.tokens(8, *shape[:2], seed=shape[-2], bos=0.3)
    weight = torch.randn(leaves[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = []
    for attend in (KERNELS[name], tg.attend_reference):
        docs = tg.find_documents(ids, "attention", longest, varlen=getattr(attend, "varlen", False))
        grads.append(torch.autograd.grad((attend(*leaves, docs) * weight).sum(), leaves))
    for x, y in zip(*grads):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("attend", [tg.attend_sdpa, tg.attend_reference])
def test_documents_without_a_mask_are_no_bound_for_attention(attend):
    """DOC_MASK=inputs: where documents begin is known, but attention is not confined to them."""
    q, k, v = inputs(2, 9, 2, 2, 3)
    assert torch.equal(attend(q, k, v, tg.find_documents(ref.tokens(8, 2, 9, bos=0.4), "inputs")), attend(q, k, v))


def same_twice(s, attend, spread=0.4):
    """Two models with equal random weights in float64, the first with PyTorch's kernel and a mask."""
    models = []
    for kernel in (None, attend):
        model = ref.double(s, spread=spread) if kernel is None else ref.randomise(
            tg.GPT(s, torch.float64, kernel, init=False).double(), spread=spread)
        model.cos, model.sin = (models or [model])[0].cos, (models or [model])[0].sin
        models.append(model)
    return models


@ref.tries(40)
@given(ref.models(doc_mask="attention"), st.integers(1, 10), st.integers(0, 4), st.integers(0, 10**6))
def test_a_model_with_lengths_is_the_model_with_masks(s, length, longest, seed):
    """Forward and backward, of rows as they come and of rows that are cut; and against the loops of the reference."""
    masked, lengths = same_twice(s, varlen(longest=longest or 10))
    ids, targets = ref.tokens(s.vocab_size, 2, length, seed=seed, bos=0.3), ref.tokens(s.vocab_size, 2, length)
    results = []
    for model in (masked, lengths):
        docs = model.find_documents(ids, longest)
        assert (docs.mask is None) == (docs.cu_seqlens is not None) == (model is lengths)
        model(ids, targets, docs).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        results.append([model.hidden(ids, docs).detach(), *gradients])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    if not longest:
        assert torch.equal(lengths.hidden(ids), results[1][0])  # the model finds its documents itself
    for b in range(2):
        want = ref.forward(ref.arrays(lengths), s, ids[b].tolist(), longest=longest)[0]
        np.testing.assert_allclose(results[1][0][b].numpy(), want, rtol=1e-7, atol=1e-8)


@torch.library.custom_op("test_kernels::segments", mutates_args=())
def segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    return by_segments(q, k, v, cu, len(q))


@torch.library.custom_op("test_kernels::segments_backward", mutates_args=())
def segments_backward(g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                      cu: torch.Tensor) -> list[torch.Tensor]:
    dq, dk, dv = (torch.zeros_like(z) for z in (q, k, v))
    scale = q.size(-1) ** -0.5
    for (a, b), j in ((part, j) for part in pairwise(cu.tolist()) for j in range(q.size(1))):
        i = j * k.size(1) // q.size(1)
        keys, values, queries, gradient = k[a:b, i], v[a:b, i], q[a:b, j], g[a:b, j]
        future = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
        share = (scale * queries @ keys.T).masked_fill(future, -torch.inf).softmax(-1)
        scores = scale * share * (gradient @ values.T - (gradient * (share @ values)).sum(-1, keepdim=True))
        dq[a:b, j] += scores @ keys
        dk[a:b, i] += scores.T @ queries
        dv[a:b, i] += share.T @ gradient
    return [dq, dk, dv]


segments.register_fake(lambda q, k, v, cu: torch.empty_like(q))
segments_backward.register_fake(lambda g, *inputs: [torch.empty_like(z) for z in inputs[:3]])
segments.register_autograd(lambda ctx, g: (*segments_backward(g, *ctx.saved_tensors), None),
                           setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def test_one_graph_serves_any_number_of_documents(monkeypatch):
    """Rows with lengths, marked as the loader marks them, through a kernel that the compiler cannot look into."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    s = ref.small(doc_mask="attention", loader="packed", num_layers=2, ve_layers=(1,))
    attend = varlen(lambda q, k, v, cu, longest: segments(q, k, v, cu))
    lengths, masked = (ref.randomise(tg.GPT(s, attend=kernel), spread=0.3) for kernel in (attend, None))
    torch._dynamo.reset()
    compiled = torch.compile(lengths, fullgraph=True, dynamic=False, backend="aot_eager")
    before, counts = torch._dynamo.utils.counters["stats"]["unique_graphs"], set()
    for seed, bos in enumerate((0, 0.1, 0.3, 0.6, 1)):
        ids = ref.tokens(32, 1, 16, seed=seed, bos=bos)
        docs = lengths.find_documents(ids, 16)
        torch._dynamo.maybe_mark_dynamic(docs.cu_seqlens, 0)
        counts.add(len(docs.cu_seqlens))
        for model, function, found in ((lengths, compiled, docs), (masked, masked, masked.find_documents(ids, 16))):
            model.zero_grad()
            function(ids, ids, found).backward()
        for a, b in zip(lengths.parameters(), masked.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert len(counts) == 5 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


# --- the choice ------------------------------------------------------------------------------------------------------


def runtime(dtype=torch.float32):
    rt = ref.alone()
    rt.dtype = dtype
    return rt


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_a_cpu_takes_math_and_says_why(kernels):
    rt = runtime()
    assert tg.pick_attention(ref.small(kernels=kernels), rt) is tg.attend_sdpa
    (name, choice, reason), = rt.choices
    assert (name, choice) == ("attention", "math")
    assert all(f"{other}: " in reason for other in ("fa3", "cudnn", "flash")) and "\n" not in reason


def test_require_makes_the_fallback_an_error_that_names_it():
    with pytest.raises(tg.BadInput, match="KERNELS=require.*math.*fa3: .*cudnn: .*flash: ") as error:
        tg.pick_attention(ref.small(kernels="require"), runtime())
    assert "\n" not in str(error.value)
    # asked for: no fallback
    assert tg.pick_attention(ref.small(kernels="require", attention="math"), runtime()) is tg.attend_sdpa


@pytest.mark.parametrize("name", ["fa3", "cudnn", "flash"])
@pytest.mark.parametrize("kernels", ["auto", "require", "off"])
def test_an_impossible_kernel_that_was_asked_for_is_an_error(name, kernels):
    with pytest.raises(tg.BadInput, match=f"ATTENTION={name}.*{name}: .+"):
        tg.pick_attention(ref.small(attention=name, kernels=kernels), runtime())


def test_what_one_rank_cannot_use_is_used_by_none():
    """The slowest rank is the speed of all; rank 0 alone writes the log."""
    rt = runtime()
    rt.gather = lambda reason: [reason, "out of memory"]
    with pytest.raises(tg.BadInput, match="math: rank 1: out of memory"):
        tg.pick_attention(ref.small(), rt)


def reverse(q, k, v, docs):
    """Attends to the future."""
    return tg.attend_reference(q.flip(1), k.flip(1), v.flip(1)).flip(1)


def heads_interleaved(q, k, v, docs):
    """Query head j reads key/value head j mod K."""
    order = torch.arange(q.size(2)).view(-1, k.size(2)).T.flatten()
    return tg.attend_reference(q[:, :, order], k, v)[:, :, order.argsort()]


class Wrapped(torch.autograd.Function):
    """The right output with a spoilt gradient."""

    @staticmethod
    def forward(ctx, q, k, v, spoil, which):
        ctx.save_for_backward(q, k, v)
        ctx.spoil, ctx.which = spoil, which
        return tg.attend_reference(q, k, v)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            leaves = [z.detach().requires_grad_() for z in ctx.saved_tensors]
            grads = list(torch.autograd.grad(tg.attend_reference(*leaves), leaves, gradient))
        grads[ctx.which] = ctx.spoil(grads[ctx.which])
        return *grads, None, None


def spoilt(spoil, which):
    return lambda q, k, v, docs: Wrapped.apply(q, k, v, spoil, which)


def raising(error):
    def attend(q, k, v, docs):
        raise error
    return attend


class CompilationError(Exception):
    """Like Triton's: no subclass of RuntimeError."""


WRONG = {
    "not causal": reverse, "other head mapping": heads_interleaved,
    "scaled": lambda q, k, v, docs: 1.1 * tg.attend_reference(q, k, v),
    "other softmax scale": lambda q, k, v, docs: tg.attend_reference(1.3 * q, k, v),
    "not a number": lambda q, k, v, docs: tg.attend_reference(q, k, v) * math.nan,
    "one not a number": lambda q, k, v, docs: torch.where(torch.arange(q.size(1)) == 5, math.nan,
                                                          tg.attend_reference(q, k, v).transpose(1, 3)).transpose(1, 3),
    "zeros": lambda q, k, v, docs: 0 * tg.attend_reference(q, k, v),
    "infinite": lambda q, k, v, docs: tg.attend_reference(q, k, v) / 0.0,
    "gradient of q": spoilt(lambda g: 1.2 * g, 0), "gradient of k": spoilt(lambda g: -g, 1),
    "gradient of v": spoilt(lambda g: 0 * g, 2),
    "gradient of q not a number": spoilt(lambda g: g * math.nan, 0),
    "gradient of v not a number": spoilt(lambda g: g * math.nan, 2),
    "no gradient": lambda q, k, v, docs: tg.attend_reference(q, k, v).detach(),
    **{f"raises {type(error).__name__}({error})": raising(error) for error in (
        RuntimeError("CUDA error: no kernel image is available\nand a second line"), RuntimeError(),
        ImportError("libcudart.so"), OSError("undefined symbol"),
        TypeError("unexpected keyword argument"), ValueError("head_dim not supported"), AssertionError(),
        AssertionError("only fp16"),
        AttributeError("no attribute varlen"), NotImplementedError(), KeyError("sm_120"), IndexError("out of range"),
        CompilationError("at 12:7"))},
}


def only_fa3_and_math(name, s, rt):
    return None if name in ("fa3", "math") else "not here"


@pytest.fixture
def pretend(monkeypatch):
    """Two kernels on a CPU: the one given in the place of FlashAttention-3, then PyTorch's."""
    def install(attend):
        monkeypatch.setattr(tg, "_why_unavailable", only_fa3_and_math)
        monkeypatch.setattr(tg, "_attention_function",
                            lambda name, s: (attend if name == "fa3" else tg.attend_sdpa, None))
    return install


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_is_wrong_or_fails_is_passed_over(pretend, name):
    pretend(WRONG[name])
    rt = runtime()
    assert tg.pick_attention(ref.small(), rt) is tg.attend_sdpa
    (_, choice, reason), = rt.choices
    assert choice == "math" and "fa3: " in reason and "\n" not in reason
    with pytest.raises(tg.BadInput, match="ATTENTION=fa3.*fa3: "):
        tg.pick_attention(ref.small(attention="fa3"), runtime())
    with pytest.raises(tg.BadInput, match="KERNELS=require.*fa3: "):
        tg.pick_attention(ref.small(kernels="require"), runtime())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_a_kernel_that_is_right_is_taken(pretend, dtype, heads):
    """Rounding to bfloat16 is no reason to pass over a kernel."""
    attend = lambda q, k, v, docs: tg.attend_reference(q, k, v)
    pretend(attend)
    rt = runtime(dtype)
    assert tg.pick_attention(ref.small(num_heads=heads[0], num_kv_heads=heads[1]), rt) is attend
    assert rt.choices[0][1] == "fa3"
    assert tg.pick_attention(ref.small(attention="fa3", kernels="require"), runtime(dtype)) is attend


def leaking(q, k, v, cu, longest):
    """Takes lengths and does not heed them."""
    return tg.attend_reference(q[None], k[None], v[None])[0]


WRONG_WITH_DOCUMENTS = {
    "ignores the mask": lambda q, k, v, docs: tg.attend_reference(q, k, v), "ignores lengths": varlen(leaking),
    "one document too few": varlen(lambda q, k, v, cu, longest: by_segments(q, k, v, cu[cu != cu[1]], longest)),
    "rows run together": varlen(lambda q, k, v, cu, longest: by_segments(q, k, v, cu[cu != len(q) // 2], longest)),
}


@pytest.mark.parametrize("name", WRONG_WITH_DOCUMENTS)
def test_a_kernel_that_leaks_between_documents_is_passed_over(pretend, name):
    pretend(WRONG_WITH_DOCUMENTS[name])
    rt = runtime()
    assert tg.pick_attention(ref.small(doc_mask="attention"), rt) is tg.attend_sdpa
    assert "fa3: differs from the reference" in rt.choices[0][2]


LONG = dict(train_seq_len=128, train_batch_tokens=128, micro_batch_tokens=128, eval_seq_len=128)


def heeds_rows_only(q, k, v, docs):
    """Keeps rows apart, and not the documents inside a row."""
    return tg.attend_reference(q, k, v)


@pytest.mark.parametrize("lengths", [False, True], ids=["mask", "lengths"])
def test_a_kernel_that_heeds_no_document_inside_a_row_is_passed_over(pretend, lengths):
    """With sequences so long that nothing but a document ends inside a row."""
    attend = partial(heeds_rows_only)
    attend.varlen = lengths
    pretend(attend)
    rt = runtime()
    assert tg.pick_attention(ref.small(**LONG, doc_mask="attention"), rt) is tg.attend_sdpa
    assert "fa3: differs from the reference" in rt.choices[0][2]


def zero_from(place):
    def attend(q, k, v, docs):
        right = (torch.arange(q.size(1)) < place)[:, None, None]
        return right * tg.attend_reference(q, k, v, docs)
    return attend


@pytest.mark.parametrize("doc_mask", ["inputs", "attention"])
@pytest.mark.parametrize("place", [16, 100])
def test_a_kernel_that_is_wrong_only_far_from_the_start_is_passed_over(pretend, place, doc_mask):
    """As one whose tiles are short is right in the first of them."""
    pretend(zero_from(place))
    rt = runtime()
    assert tg.pick_attention(ref.small(**LONG, doc_mask=doc_mask), rt) is tg.attend_sdpa
    assert "fa3: differs from the reference" in rt.choices[0][2]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_a_kernel_with_lengths_is_taken_for_documents(pretend, heads):
    attend = varlen()
    pretend(attend)
    s = ref.small(doc_mask="attention", num_heads=heads[0], num_kv_heads=heads[1], attention="fa3")
    assert tg.pick_attention(s, runtime()) is attend


HOPPER, AMPERE, CPU = (9, 0), (8, 0), None
PACKAGES = ("flash_attn_interface", "torch.nn.attention.varlen")
MASKED, FLOAT32 = dict(doc_mask="attention"), torch.float32
PACKED = dict(MASKED, loader="packed", micro_batch_tokens=32768, train_batch_tokens=32768)
# (kernel, settings, what the machine has that differs from a good one, a word of the reason or None)
REASONS = [
    ("fa3", {}, {}, None), ("fa3", MASKED, {}, None), ("fa3", MASKED, dict(cudnn=0), None),
    ("fa3", dict(kernels="require"), {}, None), ("fa3", dict(kernels="off"), {}, "KERNELS=off"),
    ("fa3", dict(kernels="off"), dict(gpu=CPU), "KERNELS=off"), ("fa3", {}, dict(gpu=CPU), "Hopper"),
    ("fa3", {}, dict(gpu=AMPERE), "Hopper"), ("fa3", {}, dict(gpu=(10, 0)), "Hopper"),
    ("fa3", {}, dict(missing=("flash_attn_interface",)), "flash_attn_interface is not installed"),
    ("fa3", {}, dict(dtype=FLOAT32), "bfloat16"), ("fa3", MASKED, dict(dtype=FLOAT32), "bfloat16"),
    ("cudnn", {}, {}, None), ("cudnn", dict(kernels="off"), {}, None), ("cudnn", {}, dict(gpu=AMPERE), None),
    ("cudnn", {}, dict(missing=PACKAGES), None), ("cudnn", {}, dict(gpu=CPU), "GPU"),
    ("cudnn", MASKED, {}, "document lengths"), ("cudnn", {}, dict(dtype=FLOAT32), "bfloat16"),
    ("cudnn", {}, dict(cudnn=91500), "cuDNN 91500 may give wrong results"), ("cudnn", {}, dict(cudnn=91501), None),
    ("cudnn", {}, dict(cudnn=None), "may give wrong results; 91501"),
    ("flash", {}, {}, None), ("flash", MASKED, {}, None), ("flash", {}, dict(cudnn=0), None),
    ("flash", {}, dict(gpu=AMPERE), None), ("flash", {}, dict(missing=PACKAGES), None),
    ("flash", {}, dict(gpu=CPU), "GPU"),
    ("flash", MASKED, dict(missing=("torch.nn.attention.varlen",)), "torch.nn.attention.varlen"),
    ("flash", {}, dict(dtype=FLOAT32), "bfloat16"),
    ("math", {}, {}, None), ("math", MASKED, {}, None), ("math", PACKED, {}, "32768 tokens"),
    ("math", dict(kernels="off"), dict(gpu=CPU, dtype=FLOAT32, cudnn=0, missing=PACKAGES), None),
    ("math", dict(PACKED, micro_batch_tokens=16384), {}, None), ("fa3", PACKED, {}, None),
    ("flash", PACKED, {}, None)]


@pytest.mark.parametrize("name, changes, lacks, word", REASONS, ids=str)
def test_a_kernel_that_cannot_be_used_says_why(monkeypatch, name, changes, lacks, word):
    """On machines that lack something of a good one: a Hopper GPU, bfloat16, a recent cuDNN, all packages."""
    has = dict(gpu=HOPPER, dtype=torch.bfloat16, cudnn=91501, missing=()) | lacks
    for package in PACKAGES:
        module = ModuleType(package)
        module.__spec__ = ModuleSpec(package, None)
        monkeypatch.setitem(sys.modules, package, None if package in has["missing"] else module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: has["gpu"])
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: has["cudnn"])
    rt = SimpleNamespace(device=torch.device("cpu" if has["gpu"] is CPU else "cuda"), dtype=has["dtype"])
    reason = tg._why_unavailable(name, ref.small(**changes), rt)
    assert reason is None if word is None else word in reason


@pytest.fixture
def interface(monkeypatch):
    """FlashAttention-3's package with the functions given, on a machine that could use it."""
    def install(**functions):
        monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(**functions) if functions else None)
        monkeypatch.setattr(tg, "_why_unavailable", only_fa3_and_math)
    return install


def test_flash_attention_3_is_imported_once_and_its_tuple_unpacked(interface):
    calls = []

    def flash_attn_func(q, k, v, causal=False):
        calls.append(causal)
        return tg.attend_reference(q, k, v), "log-sum-exp"

    interface(flash_attn_func=flash_attn_func)
    attend = tg.pick_attention(ref.small(), runtime())
    q, k, v = inputs(1, 5, 2, 2, 4)
    torch.testing.assert_close(attend(q, k, v), tg.attend_sdpa(q, k, v))
    assert calls and all(calls)
    interface(flash_attn_func=lambda q, k, v, causal: tg.attend_reference(q, k, v))
    torch.testing.assert_close(tg.pick_attention(ref.small(), runtime())(q, k, v), tg.attend_sdpa(q, k, v))


# Of a run: its settings, and the longest segment its kernel will meet.
LENGTHS = [(dict(), 16), (dict(eval_seq_len=40), 40), (dict(train_seq_len=8), 16),
           (dict(train_seq_schedule="8@0.5,32@1"), 32), (dict(loader="packed"), 16), (dict(eval_seq_len=300), 300)]


@pytest.mark.parametrize("changes, longest", LENGTHS)
def test_documents_go_to_the_kernel_of_lengths(interface, changes, longest):
    """FlashAttention-3 gets lengths for queries and keys, their true maximum, and stays causal, even in the check."""
    seen = []

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest_q, longest_k, causal=False):
        assert causal and longest_q == longest_k and cu_q is cu_k
        seen.append(longest_q)
        return by_segments(q, k, v, cu_q, longest_q), "log-sum-exp"

    interface(flash_attn_varlen_func=flash_attn_varlen_func)
    s = ref.small(doc_mask="attention", attention="fa3", **changes)
    attend = tg.pick_attention(s, runtime())
    assert attend.varlen and set(seen) == {longest}
    model, ids = ref.randomise(tg.GPT(s, attend=attend), spread=0.3), ref.tokens(32, 2, 12)
    masked = ref.randomise(tg.GPT(s), spread=0.3)
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(ids), masked.hidden(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes, longest", LENGTHS)
@pytest.mark.parametrize("signature", ["window", "is_causal", "grouped"])
def test_documents_go_to_the_flash_kernel_of_torch(monkeypatch, signature, changes, longest):
    """Whatever this version of torch calls it, it is told to be causal, and of grouped heads if it has to be."""
    module = pytest.importorskip("torch.nn.attention.varlen")

    def window(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
        assert window_size == (-1, 0) and max_q == max_k == longest and cu_q is cu_k
        return by_segments(q, k, v, cu_q, max_q)

    def is_causal(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
        assert is_causal
        return window(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0))

    def grouped(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa
        return window(q, k, v, cu_q, cu_k, max_q, max_k, window_size=window_size)

    has = {"window": window, "is_causal": is_causal, "grouped": grouped}[signature]
    monkeypatch.setattr(module, "varlen_attn", has)
    monkeypatch.setattr(tg, "_why_unavailable", lambda name, s, rt: None if name == "flash" else "not here")
    rt = runtime()
    assert tg.pick_attention(ref.small(doc_mask="attention", attention="flash", **changes), rt).varlen
    assert rt.choices[0][1] == "flash"


def test_torchs_own_signature_of_varlen_attention_is_understood():
    """The arguments that are passed are those it has, in this version."""
    import inspect

    varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"window_size", "is_causal"} & set(names)


@pytest.mark.parametrize("doc_mask", ["inputs", "attention"])
def test_a_flash_attention_3_that_cannot_be_imported_is_passed_over(interface, doc_mask):
    interface()
    rt = runtime()
    assert tg.pick_attention(ref.small(doc_mask=doc_mask), rt) is tg.attend_sdpa
    assert "flash_attn_interface" in rt.choices[0][2]


def test_packed_rows_too_long_for_a_mask_are_an_error_that_names_the_way_out(monkeypatch):
    monkeypatch.setattr(tg, "_attention_error_at", lambda *_: None)  # at these lengths it takes ten seconds on a CPU
    s = ref.small(doc_mask="attention", loader="packed", micro_batch_tokens=32768, train_batch_tokens=32768)
    with pytest.raises(tg.BadInput, match="math: .*LOADER=packed.*32768.*MICRO_BATCH_TOKENS"):
        tg.pick_attention(s, runtime())
    shorter = tg.replace(s, micro_batch_tokens=16384)
    assert tg.pick_attention(shorter, runtime()) is tg.attend_sdpa


BACKENDS = ("cudnn", "flash", "mem_efficient", "math")


@pytest.fixture
def backends():
    """Which backends PyTorch's attention may use, as a function; they are put back in the end."""
    def enabled():
        return {name for name in BACKENDS if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()}

    before = enabled()
    yield enabled
    for name in BACKENDS:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(name in before)


@pytest.mark.parametrize("name, allowed", [("fa3", set()), ("cudnn", {"cudnn"}), ("flash", {"flash"}),
                                           ("math", {"math", "mem_efficient"})])
def test_nothing_replaces_the_kernel_that_was_chosen(monkeypatch, interface, backends, name, allowed):
    """On a GPU PyTorch would use another backend and say nothing: in a run, and while a kernel is checked."""
    interface(flash_attn_func=lambda q, k, v, causal: q)
    seen = []
    monkeypatch.setattr(tg, "_why_unavailable", lambda *_: None)
    monkeypatch.setattr(tg, "_attention_error", lambda *_: seen.append(backends()))
    rt = runtime(torch.bfloat16)
    rt.device = torch.device("cuda")
    tg.pick_attention(ref.small(attention=name), rt)
    assert seen == [allowed] and backends() == allowed


def test_the_check_leaves_the_random_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    tg.pick_attention(ref.small(), runtime())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("changes", [dict(), dict(num_kv_heads=4), dict(num_kv_heads=1, xsa_last_n=3),
                                     dict(rope_dims=0), dict(doc_mask="attention")])
def test_the_model_is_the_same_with_the_reference_kernel(changes):
    """The kernel is an argument of the model: every forward and backward goes through it."""
    s = ref.small(**changes)
    models = [ref.randomise(tg.GPT(s, attend=attend), spread=0.3)
              for attend in (None, tg.attend_sdpa, tg.attend_reference)]
    ids = ref.tokens(32, 2, 12)
    for model in models:
        model(ids, ids).backward()
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(parameter.grad, dict(models[1].named_parameters())[name].grad, rtol=0, atol=0)
        torch.testing.assert_close(parameter.grad, dict(models[2].named_parameters())[name].grad, rtol=2e-3, atol=1e-5)
    wrong = ref.randomise(tg.GPT(s, attend=partial(lambda q, k, v, docs: 0 * q)), spread=0.3)
    with torch.no_grad():
        assert wrong(ids, ids) != models[0](ids, ids)
