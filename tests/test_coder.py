"""The entropy coder of integer codes: exact, close to what theory allows, and a stream can do no more than fail."""

import hashlib
import math
import random

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg


def pack(groups):
    """encode_codes(), proved by decoding: the bytes."""
    before = [group.copy() for group in groups]
    data = tg.encode_codes(groups)
    back = tg.decode_codes(data, [group.shape for group in groups], "a.pg")
    assert len(back) == len(groups)
    for group, copy, decoded in zip(groups, before, back):
        assert decoded.dtype == np.int8 and decoded.shape == group.shape
        np.testing.assert_array_equal(decoded, copy)
        np.testing.assert_array_equal(group, copy)
    return data


def codes(shape, seed, spread=600, top=31):
    """Bell-shaped codes whose columns differ in size, by integers alone: the same on every machine."""
    rng = np.random.default_rng(seed)
    bell = rng.integers(-spread, spread + 1, (6, *shape)).sum(0)
    return np.clip(bell * rng.integers(4, 17, shape[-1]) // 8192, -top, top).astype(np.int8)


def drawn(kind, shape, seed):
    rng = np.random.default_rng(seed)
    if kind == "constant":
        return np.full(shape, rng.integers(-127, 128), np.int8)
    if kind == "extremes":
        return rng.choice(np.array([-127, 127], np.int8), shape)
    if kind == "uniform":
        return rng.integers(-127, 128, shape).astype(np.int8)
    if kind == "sparse":
        return (rng.integers(-127, 128, shape) * (rng.random(shape) < 0.02)).astype(np.int8)
    if kind == "same rows":  # next to each other they differ by more than a byte holds now and then
        flips = np.where(rng.random(shape) < 0.05, -1, 1)
        return (np.broadcast_to(rng.integers(-127, 128, (*shape[:1], 1, shape[2])), shape) * flips).astype(np.int8)
    return codes(shape, seed)


KINDS = ("constant", "extremes", "uniform", "sparse", "same rows", "bell")
shapes = st.tuples(st.integers(1, 5), st.integers(1, 140), st.integers(1, 24))
groups = st.lists(st.tuples(st.sampled_from(KINDS), shapes, st.integers(0, 2**32)), max_size=4)


@ref.tries(60)
@given(groups)
def test_every_group_comes_back(drafts):
    pack([drawn(*draft) for draft in drafts])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 9000), (1, 9000, 1), (3000, 2, 3), (9000, 1, 1), (1, 1021, 17),
                                   (22, 32, 48), (1, 1024, 32), (5, 129, 1)])
@pytest.mark.parametrize("kind", ["bell", "extremes"])
def test_every_shape_comes_back(shape, kind):
    pack([drawn(kind, shape, 0)])


def test_no_matrices_are_only_a_header():
    assert len(pack([])) == 8 + 4 * 8


@pytest.mark.parametrize("value", [0, 1, -31, 127, -127])
def test_constants_cost_almost_nothing(value):
    assert len(pack([np.full((2, 300, 500), value, np.int8)])) < 4000  # of 300,000 bytes


def test_a_view_is_coded_like_its_copy_and_minus_128_is_refused():
    whole = codes((3, 80, 60), 1)
    assert pack([whole[:, ::2, 10:].transpose(1, 2, 0)]) == pack([whole[:, ::2, 10:].transpose(1, 2, 0).copy()])
    whole[2, 79, 59] = -128
    with pytest.raises(ValueError, match="-128"):
        tg.encode_codes([whole])


def entropy_of_rounded_normal(step, top):
    """Bits of round(x / step) clipped to +-top, x standard normal."""
    def below(code):
        return 0.5 * math.erfc(-(code - 0.5) * step / math.sqrt(2)) if code > -top else 0.0

    chances = [(below(code + 1) if code < top else 1.0) - below(code) for code in range(-top, top + 1)]
    return -sum(p * math.log2(p) for p in chances if p > 0)


@pytest.mark.parametrize("shape, top, step, most", [
    ((11, 512, 512), 31, 0.4145, 1.0015), ((8, 128, 512), 31, 0.4145, 1.003), ((1, 2048, 256), 127, 20 / 127, 1.003),
    ((2, 64, 128), 31, 0.4145, 1.02)])
def test_normal_weights_take_what_theory_says(shape, top, step, most):
    """The bound knows the spread of the weights; the coder has to learn it. Lanes and length are counted."""
    weights = np.random.default_rng(0).standard_normal(shape)
    data = pack([np.clip(np.rint(weights / step), -top, top).astype(np.int8)])
    bits = entropy_of_rounded_normal(step, top) * weights.size
    assert 0.995 * bits < 8 * len(data) < most * bits


def test_coder_context_learns_the_spread_of_each_column():
    """A matrix whose columns differ by factors: within 1 % of an ideal coder that is told every column's spread."""
    rng = np.random.default_rng(3)
    spreads = np.exp(0.5 * rng.standard_normal((3, 1, 384)))
    data = pack([np.clip(np.rint(rng.standard_normal((3, 768, 384)) * spreads / 0.4145), -127, 127).astype(np.int8)])
    bits = 768 * sum(entropy_of_rounded_normal(0.4145 / spread, 127) for spread in spreads.ravel())
    assert 8 * len(data) < 1.01 * bits


def trained_like():
    """Codes at a step per row, as SDClip chooses it, of weights with unequal columns and heavy tails."""
    rng = np.random.default_rng(5)
    weights = rng.standard_t(12, (4, 192, 256)) * np.exp(0.3 * rng.standard_normal((4, 1, 256)))
    weights *= np.exp(0.5 * rng.standard_normal((4, 192, 1)))
    return np.clip(np.rint(weights * 31 / (12.85 * weights.std(2, keepdims=True))), -31, 31).astype(np.int8)


def test_the_coder_beats_brotli():
    brotli = pytest.importorskip("brotli")
    trained = trained_like()
    assert len(pack([trained])) < 0.98 * len(brotli.compress(trained.tobytes(), quality=11, lgwin=24))


def test_coder_context_of_a_kind_of_matrices_helps_the_next_in_any_order():
    trained = trained_like()
    together, apart = pack([trained[:2], trained[2:]]), [pack([trained[:2]]), pack([trained[2:]])]
    assert len(together) < sum(map(len, apart))
    assert abs(len(pack([trained[::-1]])) - len(pack([trained]))) < 0.002 * len(together)


def test_coder_context_makes_rows_like_the_one_above_cheap():
    """Tokens that training never saw keep nearly the same row."""
    rng = np.random.default_rng(2)
    rows = rng.integers(-90, 91, (1, 400, 128))
    rows[:, 150:300] = rows[:, 150:151] + rng.integers(-1, 2, (1, 150, 128))
    apart = len(pack([np.delete(rows, np.s_[150:300], axis=1).astype(np.int8)]))
    assert len(pack([rows.astype(np.int8)])) - apart < 150 * 128 * 2.9 / 8  # log2(181) = 7.5 bits if coded alone


def test_the_format_is_fixed():
    """Every machine writes these bytes. Whoever changes them has changed what ARTIFACT_VERSION stands for."""
    data = pack([codes((3, 200, 48), 1), codes((1, 300, 20), 2, 3000, 127), drawn("same rows", (2, 40, 30), 3)])
    assert hashlib.sha256(data).hexdigest() == "c458d001fe06c149400c60e0fa1a6f7241e6691b386fce22bc5cccbc04896046"


def test_frequencies_are_complete():
    rng = np.random.default_rng(0)
    for most in (1, 2, 1000, 10**9):
        kept = rng.random((tg.BUCKETS, 256)) < rng.random((tg.BUCKETS, 1))
        counts = rng.integers(0, most, kept.shape) * kept
        frequencies = tg.code_frequencies(counts.copy())
        assert frequencies.shape == counts.shape and frequencies.dtype == np.int64
        assert (frequencies.sum(1) == 1 << tg.PRECISION).all() and (frequencies >= 0).all()
        assert (frequencies[:, tg.ESCAPE] >= 1).all()
    likely = tg.code_frequencies(np.zeros((tg.BUCKETS, 256), np.int64))
    sizes = np.abs(np.arange(256, dtype=np.uint8).view(np.int8).astype(int))
    mean = (likely * sizes * (sizes < 128)).sum(1) / (1 << tg.PRECISION)
    for k in range(20, 42):  # before any code, a bucket expects about the magnitude that is its number
        assert 0.8 < mean[k] / 2 ** ((k + 0.5) / 4 - 5) < 1.4, k


# --- hostile streams -------------------------------------------------------------------------------------------------

SMALL = [codes((2, 9, 14), 1), drawn("same rows", (1, 8, 12), 5), drawn("sparse", (1, 10, 12), 0)]


def decode_or_refuse(data, groups):
    """Whether it is refused, and else proves that it means the same."""
    try:
        back = tg.decode_codes(data, [group.shape for group in groups], "a.pg: stream q")
    except tg.BadInput as error:
        assert str(error).startswith("a.pg: stream q: ") and "\n" not in str(error)
        return True
    assert all((one == two).all() for one, two in zip(back, groups)), "a changed stream passes for whole"
    return False


def test_a_damaged_stream_is_refused_or_means_the_same():
    data, rng, refused = tg.encode_codes(SMALL), random.Random(0), 0
    for number in range(3000):
        bad = bytearray(data)
        at = rng.randrange(len(bad))
        kind = number % 5
        if kind == 0:
            bad[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del bad[at : at + rng.randint(1, 4)]
        elif kind == 2:
            bad[at:at] = rng.randbytes(rng.randint(1, 4))
        elif kind == 3:
            bad[at : at + rng.randint(1, 40)] = rng.randbytes(rng.randint(1, 40))
        else:
            bad = bad[:at]
        if bytes(bad) != data:
            refused += decode_or_refuse(bytes(bad), SMALL)
    assert refused > 2900


def test_arbitrary_bytes_and_wrong_shapes_are_refused():
    data, rng = tg.encode_codes(SMALL), random.Random(1)
    for bad in (b"", b"\0" * 7, b"\xff" * 400, b"\0" * 400, data[:4] + b"\xff" * 4 + data[8:], data + b"\0",
                data + b"\0\0", data[:12], *(rng.randbytes(rng.randrange(400)) for _ in range(100))):
        assert decode_or_refuse(bad, SMALL)
    assert decode_or_refuse(data, SMALL[::-1]) and decode_or_refuse(data, SMALL[:2])
    assert decode_or_refuse(b"", []) and decode_or_refuse(data, [])
