"""Integer grids, scales and clipping against a brute-force search of the specification, row by row in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import reference as ref
import train_gpt as tg

PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
TINY = 2.0**-24  # the smallest float16


def encode(weight, bits, method):
    parts = tg.encode_int(weight, bits, method)
    assert parts["q"].dtype == torch.int8 and parts["scale"].dtype == torch.float16
    assert parts["scale"].shape == (len(weight),)
    decoded = tg.decode_int(parts, weight.shape).numpy().astype(float)
    return parts["q"].numpy().astype(int), parts["scale"].numpy(), decoded


def brute(row, bits, percentile):
    """(codes, step) of a row clipped at a percentile of its magnitudes."""
    top = 2 ** (bits - 1) - 1
    step = np.float16(max(np.quantile(np.abs(row), percentile) / top, TINY))
    return np.clip(np.round(row / float(step)), -top, top), float(step)


def squared_error(row, codes, step):
    return float(((row - codes * step) ** 2).sum())


def heavy(rows, cols, seed=0, size=0.2):
    """Weights with outliers, so that clipping pays; every row with a spread and an outlier of its own."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(rows, cols)) * np.exp(rng.normal(size=(rows, 1))) * size
    w[np.arange(rows), rng.integers(0, cols, rows)] *= rng.uniform(1, 12, rows)
    return torch.from_numpy(w.astype(np.float32))


matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=st.floats(-8, 8, width=32))


@ref.tries(150)
@given(matrices, st.integers(2, 8))
def test_rtn_is_the_grid_of_the_row_maximum(w, bits):
    q, scale, decoded = encode(torch.from_numpy(w), bits, "rtn")
    top = 2 ** (bits - 1) - 1
    assert np.abs(q).max(initial=0) <= top
    for row, codes, step, back in zip(w.astype(float), q, scale.astype(float), decoded):
        ideal = np.float32(np.abs(row).max()) / np.float32(top)
        assert step == float(np.float16(ideal)) if ideal >= 2**-14 else abs(step - max(ideal, TINY)) < TINY
        np.testing.assert_array_equal(codes, np.clip(np.rint((row.astype(np.float32) / np.float32(step))), -top, top))
        np.testing.assert_array_equal(back, np.float32(codes) * np.float32(step))


@ref.tries(100)
@given(st.integers(1, 6), st.integers(1, 3000), st.integers(2, 8), st.integers(0, 10**6),
       st.sampled_from([0.02, 0.2, 30]))
def test_gptq_lite_is_the_best_percentile_of_each_row(rows, cols, bits, seed, size):
    """As good as the best of the five, whose step it has; a float16 rounding of the percentile may go either way."""
    w = heavy(rows, cols, seed, size)
    q, scale, decoded = encode(w, bits, "gptq_lite")
    assert np.abs(q).max() <= 2 ** (bits - 1) - 1
    for row, codes, step in zip(w.numpy().astype(float), q, scale.astype(float)):
        tried = [brute(row, bits, p) for p in PERCENTILES]
        if min(s for _, s in tried) < 2**-14:
            continue  # a step of few bits: see test_no_weight_is_off_by_more_than_half_a_step
        best = min(squared_error(row, *one) for one in tried)
        assert squared_error(row, codes, step) <= best * 1.002 + 1e-12
        assert min(abs(step - s) for _, s in tried) <= step * 2**-10


def test_the_percentile_is_chosen_for_each_row_by_itself():
    """Rows that want different clips get them, and a row's code does not depend on its neighbours."""
    rng = np.random.default_rng(0)
    w = torch.from_numpy(rng.uniform(-1, 1, (40, 8000)).astype(np.float32))
    for i in range(40):  # outliers, few or many and small or large: clipping them pays or not
        w[i, : i % 10] = 1.2 + i // 10
    q, scale, decoded = encode(w, 8, "gptq_lite")
    picks = [min(range(5), key=lambda i: squared_error(row, *brute(row, 8, PERCENTILES[i])))
             for row in w.numpy().astype(float)]
    assert len(set(picks)) >= 4
    for i in (0, 1, 7, 39):
        alone_q, alone_scale, _ = encode(w[i : i + 1], 8, "gptq_lite")
        assert (alone_q[0] == q[i]).all() and alone_scale[0] == scale[i]
    whole = min(sum(squared_error(row, *brute(row, 8, p)) for row in w.numpy().astype(float)) for p in PERCENTILES)
    assert ((w.numpy() - decoded) ** 2).sum() < whole  # better than one percentile for the whole tensor
    assert ((w.numpy() - decoded) ** 2).sum() < ((w.numpy() - encode(w, 8, "rtn")[2]) ** 2).sum()


@ref.tries(150)
@given(matrices, st.integers(2, 8))
def test_gptq_lite_is_never_worse_than_rtn(w, bits):
    w = torch.from_numpy(w)
    better, plain = (((w.double().numpy() - encode(w, bits, method)[2]) ** 2).sum(1) for method in ("gptq_lite", "rtn"))
    assert (better <= plain * (1 + 1e-5) + 1e-12).all()


@ref.tries(150)
@given(matrices, st.integers(2, 8), st.sampled_from([1.0, 1e-2, 1e-4, 1e-5, 1e-6, 1e-7]))
def test_no_weight_is_off_by_more_than_half_a_step(w, bits, size):
    """Of the ideal grid, plus the last bits of a float16 scale; among its smallest values, of the next larger one."""
    w, top = torch.from_numpy(w * np.float32(size)), 2 ** (bits - 1) - 1
    _, _, decoded = encode(w, bits, "rtn")
    for row, back in zip(w.numpy().astype(float), decoded):
        largest = np.abs(row).max()
        step = math.ceil(max(largest / top, TINY) / TINY) * TINY
        assert np.abs(row - back).max() <= 0.5 * step * (1 + 2**-10) + largest * 2**-10, (largest, largest / top / TINY)


@pytest.mark.parametrize("bits", range(2, 9))
def test_error_falls_with_bits_as_it_should(bits):
    """A uniform row: error of a step / sqrt(12)."""
    row = torch.linspace(-1, 1, 20001)[None]
    _, _, decoded = encode(row, bits, "rtn")
    step = 1 / (2 ** (bits - 1) - 1)
    assert math.sqrt(((row.numpy() - decoded) ** 2).mean()) == pytest.approx(step / math.sqrt(12), rel=0.02)


@pytest.mark.parametrize("method", ["rtn", "gptq_lite"])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_zero_and_tiny_rows_decode(method, bits):
    w = torch.zeros(5, 300)
    w[1] = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 1e-6
    w[2, 7] = 1e-6
    w[3] = 0.25
    q, scale, decoded = encode(w, bits, method)
    assert not decoded[0].any() and not decoded[4].any() and not q[0].any()
    assert np.isfinite(decoded).all() and (scale > 0).all()
    assert ((decoded[1] - w[1].numpy()) ** 2).sum() < (w[1].numpy() ** 2).sum() / (3 if bits > 2 else 1)
    step = math.ceil(1e-6 / (2 ** (bits - 1) - 1) / TINY) * TINY
    assert decoded[2, 7] == pytest.approx(1e-6, abs=0.51 * step) and not decoded[2, :7].any()
    np.testing.assert_allclose(decoded[3], 0.25, rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 4, 5)])
@pytest.mark.parametrize("method", ["rtn", "gptq_lite"])
def test_shapes_come_back(shape, method):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    parts = tg.encode_int(w, 8, method)
    back = tg.decode_int(parts, shape)
    assert back.shape == shape and back.dtype == torch.float32 and (back - w).abs().max() <= w.abs().max() / 127


@ref.tries(80)
@given(hnp.arrays(np.int8, st.tuples(st.integers(1, 6), st.integers(1, 50)), elements=st.integers(-31, 31)), st.data())
def test_integers_on_the_grid_are_kept_exactly(codes, data):
    """What decode gives encodes to the same numbers again, for rows that reach the end of the grid."""
    codes[:, 0] = 31
    scale = torch.tensor([data.draw(st.integers(1, 1000)) * 2.0**-12 for _ in codes]).half()
    w = tg.decode_int({"q": torch.from_numpy(codes), "scale": scale}, codes.shape)
    for method in ("rtn", "gptq_lite"):
        q, again, decoded = encode(w, 6, method)
        np.testing.assert_array_equal(decoded, w.numpy())
        if method == "rtn":
            np.testing.assert_array_equal(q, codes)
            np.testing.assert_array_equal(again, scale.numpy())


def test_the_weight_is_not_changed_and_autograd_not_needed():
    w = torch.nn.Parameter(torch.randn(4, 30))
    before = w.detach().clone()
    with torch.no_grad():
        tg.encode_int(w, 6, "gptq_lite")
    assert torch.equal(w, before)


def test_float16_codec():
    w = torch.randn(3, 7)
    parts = tg.encode_float16(w, 16, "")
    assert parts["half"].dtype == torch.float16 and torch.equal(tg.decode_float16(parts, w.shape), w.half().float())


def test_codecs_of_the_roles():
    s = ref.small(matrix_bits=5, embed_bits=7, matrix_quant="rtn", embed_quant="gptq_lite")
    assert tg.codec_of("matrix", s) == ("int", 5, "rtn") and tg.codec_of("embed", s) == ("int", 7, "gptq_lite")
    assert tg.codec_of("head", s) == tg.codec_of("embed", s), "an untied head is a table of tokens, too"
    assert tg.codec_of("scalar", s)[:2] == tg.codec_of("gate", s)[:2] == ("float16", 16)
    half = ref.small(matrix_bits=16, embed_bits=16)
    assert tg.codec_of("matrix", half)[0] == tg.codec_of("embed", half)[0] == "float16"


@pytest.mark.parametrize("name", ["MATRIX_BITS", "EMBED_BITS"])
@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 15, 17])
def test_impossible_bits_are_refused(name, bits):
    with pytest.raises(tg.BadInput, match=name):
        tg.Settings.parse([f"{name}={bits}"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["blocks.1.mlp.up.weight", "embed.weight", "blocks.0.attn.q_gain"])
def test_weights_that_are_not_finite_are_not_packed(tmp_path, name, value):
    s = ref.small()
    model = ref.randomise(tg.GPT(s))
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = value
    with pytest.raises(tg.Stopped, match=name) as error:
        tg.save_artifact(tmp_path / "model.pg", model, s)
    assert error.value.code == 4 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, value", [("blocks.0.attn.q_gain", 1e5), ("blocks.1.mlp.up.weight", 1e8)])
def test_weights_too_large_for_float16_are_not_packed_as_infinity(tmp_path, name, value):
    """Whatever the answer is, it comes before the only copy of the weights is a file that nobody can load."""
    s = ref.small()
    model = ref.randomise(tg.GPT(s))
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = value
    try:
        tg.save_artifact(tmp_path / "model.pg", model, s)
    except (tg.Stopped, tg.BadInput) as error:
        assert name in str(error)
    else:
        loaded = dict(tg.load_artifact(tmp_path / "model.pg")[1].named_parameters())
        assert loaded[name].flatten()[0].item() == pytest.approx(value, rel=0.05)
