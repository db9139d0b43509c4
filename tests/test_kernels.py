"""Attention kernels against loops, and the choice among them: the first that works, every other one named."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference as ref
import train_gpt as tg


def loops(q, k, v):
    """Causal grouped-query attention, one query at a time, float64."""
    q, k, v = (z.detach().double().numpy() for z in (q, k, v))
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        scores = np.array([q[b, t, h] @ k[b, u, h // group] for u in range(t + 1)]) / math.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, : t + 1, h // group] / weights.sum()
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


def reverse(q, k, v):
    """Attends to the future."""
    return tg.attend_reference(q.flip(1), k.flip(1), v.flip(1)).flip(1)


def heads_interleaved(q, k, v):
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
    return lambda q, k, v: Wrapped.apply(q, k, v, spoil, which)


def raising(error):
    def attend(q, k, v):
        raise error
    return attend


class CompilationError(Exception):
    """Like Triton's: no subclass of RuntimeError."""


WRONG = {
    "not causal": reverse, "other head mapping": heads_interleaved,
    "scaled": lambda q, k, v: 1.1 * tg.attend_reference(q, k, v),
    "other softmax scale": lambda q, k, v: tg.attend_reference(1.3 * q, k, v),
    "not a number": lambda q, k, v: tg.attend_reference(q, k, v) * math.nan,
    "one not a number": lambda q, k, v: torch.where(torch.arange(q.size(1)) == 5, math.nan,
                                                    tg.attend_reference(q, k, v).transpose(1, 3)).transpose(1, 3),
    "zeros": lambda q, k, v: 0 * tg.attend_reference(q, k, v),
    "infinite": lambda q, k, v: tg.attend_reference(q, k, v) / 0.0,
    "gradient of q": spoilt(lambda g: 1.2 * g, 0), "gradient of k": spoilt(lambda g: -g, 1),
    "gradient of v": spoilt(lambda g: 0 * g, 2),
    "gradient of q not a number": spoilt(lambda g: g * math.nan, 0),
    "gradient of v not a number": spoilt(lambda g: g * math.nan, 2),
    "no gradient": lambda q, k, v: tg.attend_reference(q, k, v).detach(),
    **{f"raises {type(error).__name__}({error})": raising(error) for error in (
        RuntimeError("CUDA error: no kernel image is available\nand a second line"), RuntimeError(),
        ImportError("libcudart.so"), OSError("undefined symbol"),
        TypeError("unexpected keyword argument"), ValueError("head_dim not supported"), AssertionError(),
        AssertionError("only fp16"),
        AttributeError("no attribute varlen"), NotImplementedError(), KeyError("sm_120"), IndexError("out of range"),
        CompilationError("at 12:7"))},
}


@pytest.fixture
def pretend(monkeypatch):
    """Two kernels on a CPU: the one given in the place of FlashAttention-3, then PyTorch's."""
    def install(attend):
        monkeypatch.setattr(tg, "_why_not", lambda name, s, rt: None if name in ("fa3", "math") else "not here")
        monkeypatch.setattr(tg, "_attention_function", lambda name: (attend if name == "fa3" else tg.attend_sdpa, None))
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
    attend = lambda q, k, v: tg.attend_reference(q, k, v)
    pretend(attend)
    rt = runtime(dtype)
    assert tg.pick_attention(ref.small(num_heads=heads[0], num_kv_heads=heads[1]), rt) is attend
    assert rt.choices[0][1] == "fa3"
    assert tg.pick_attention(ref.small(attention="fa3", kernels="require"), runtime(dtype)) is attend


def test_flash_attention_3_is_imported_once_and_its_tuple_unpacked(monkeypatch):
    import sys

    calls = []

    def flash_attn_func(q, k, v, causal=False):
        calls.append(causal)
        return tg.attend_reference(q, k, v), "log-sum-exp"

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(tg, "_why_not", lambda name, s, rt: None if name in ("fa3", "math") else "not here")
    attend = tg.pick_attention(ref.small(), runtime())
    q, k, v = inputs(1, 5, 2, 2, 4)
    torch.testing.assert_close(attend(q, k, v), tg.attend_sdpa(q, k, v))
    assert calls and all(calls)
    monkeypatch.setitem(sys.modules, "flash_attn_interface",
                        SimpleNamespace(flash_attn_func=lambda q, k, v, causal: tg.attend_reference(q, k, v)))
    torch.testing.assert_close(tg.pick_attention(ref.small(), runtime())(q, k, v), tg.attend_sdpa(q, k, v))


def test_a_flash_attention_3_that_cannot_be_imported_is_passed_over(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setattr(tg, "_why_not", lambda name, s, rt: None if name in ("fa3", "math") else "not here")
    rt = runtime()
    assert tg.pick_attention(ref.small(), rt) is tg.attend_sdpa and "flash_attn_interface" in rt.choices[0][2]


def test_the_check_leaves_the_random_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    tg.pick_attention(ref.small(), runtime())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("changes", [dict(), dict(num_kv_heads=4), dict(num_kv_heads=1, xsa_last_n=3),
                                     dict(rope_dims=0)])
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
    wrong = ref.randomise(tg.GPT(s, attend=partial(lambda q, k, v: 0 * q)), spread=0.3)
    with torch.no_grad():
        assert wrong(ids, ids) != models[0](ids, ids)
