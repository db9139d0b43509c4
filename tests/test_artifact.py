"""The artifact: bit-exact through the file, small, complete or absent, and nothing in it can do more than fail."""

import ast
import contextlib
import hashlib
import inspect
import itertools
import json
import lzma
import math
import pickle
import random
import struct
import sys
import time
import tracemalloc
import zlib
from unittest import mock

import container
import fuzzing
import numpy as np
import pytest
import reference as ref
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from parameters import role_of, width_of

import train_gpt as tg

ALL = ("zstd", "lzma", "brotli", "zlib")


def saved(path, s=None, seed=0, **changes):
    """(settings, model with random weights, what save said) of an artifact at `path`."""
    s = s or ref.small(**changes)
    model = ref.randomise(tg.GPT(s, init=False), seed)
    return s, model, tg.save_artifact(path, model, s, "a" * 64)


def parts_of(path):
    """(header, {stream: packed bytes}), by the format: magic, version, lengths, checksum, header, streams."""
    data = path.read_bytes()
    magic, version, packed, raw, checksum = struct.unpack_from("<8sHIII", data)
    assert magic == b"PGOLF\r\n\x1a" and version == 1
    body = data[22 : 22 + packed]
    assert zlib.crc32(body) == checksum
    text = zlib.decompress(body)
    assert len(text) == raw
    header, at, streams = json.loads(text), 22 + packed, {}
    for name, _, _, length, check in header["streams"]:
        streams[name] = data[at : at + length]
        assert zlib.crc32(streams[name]) == check
        at += length
    assert at == len(data)
    return header, streams


def seal(path, header, payload, magic=b"PGOLF\r\n\x1a", version=1):
    """Write a container whose checksums are right, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = zlib.compress(text)
    path.write_bytes(struct.pack("<8sHIII", magic, version, len(body), len(text), zlib.crc32(body)) + body + payload)


def in_memory(model, s):
    """What every tensor becomes by quantising and decoding, without a file; by the specification's table of roles."""
    out = {}
    for name, parameter in model.named_parameters():
        bits = width_of(s, name)
        method = s.embed_quant if role_of(name) in ("embed", "head") else s.matrix_quant
        if bits == 16:
            out[name] = parameter.detach().half().float()
        else:
            codes, scale = integers(parameter.detach(), bits, method)
            out[name] = codes * scale.float()[:, None]
    return out


def integers(weight, bits, method):
    """(codes, scales): what they should be is the matter of test_quantisation.py."""
    scale = tg.row_scales(weight, bits, method)
    top = 2 ** (bits - 1) - 1
    return (weight / scale.float()[:, None]).round().clamp(-top, top), scale


def refused(path, limit=1 << 28, **options):
    """load_artifact says no in one line, without much memory; returns the line."""
    tracemalloc.start()
    try:
        with pytest.raises(tg.BadInput) as error:
            tg.load_artifact(path, **options)
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
    line = str(error.value)
    assert str(path) in line and len(line) <= 300 and line.isprintable()
    return line


def command_refuses(path, *words):
    """PHASES=eval of this artifact ends with exit code 2 and one line, almost without memory; that line."""
    with Peak() as peak:
        done = runs.call(["PHASES=eval", f"ARTIFACT={path}", "DEVICE=cpu", "DATA_PATH=nowhere"])
    line = runs.refused(done, 2, path)
    reason = line.replace(str(path), "FILE")  # the name of the test is in the path
    assert all(word in reason for word in words), f"{words} not in: {reason}"
    assert len(line) <= 300 and line.isprintable() and peak.mib < 64
    return line


# --- round trip ------------------------------------------------------------------------------------------------------


@ref.tries(25)
@given(ref.models(), st.integers(0, 999), st.sampled_from(["zlib", "zstd"]), st.sampled_from([2, 5, 6, 8, 16]),
       st.sampled_from([4, 8, 16]),
       st.sampled_from(["rtn", "gptq_lite"]))
def test_the_loaded_model_is_the_quantised_one(tmp_path_factory, s, seed, compressor, matrix_bits, embed_bits, method):
    path = tmp_path_factory.getbasetemp() / "round.pg"
    s = tg.replace(s, compressor=compressor, matrix_bits=matrix_bits, embed_bits=embed_bits, matrix_quant=method)
    s, model, info = saved(path, s, seed)
    loaded_settings, loaded = tg.load_artifact(path, s)
    assert loaded_settings == s and info["bytes"] == path.stat().st_size
    want, got = in_memory(model, s), dict(loaded.named_parameters())
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]) and got[name].dtype == torch.float32, name
    model.load_state_dict(want)
    ids = ref.tokens(s.vocab_size, 2, 9)
    with torch.no_grad():
        assert torch.equal(model.logits(model.hidden(ids)), loaded.logits(loaded.hidden(ids)))


@ref.tries(15)
@given(ref.models(), st.integers(0, 999), st.sampled_from(["off", "prune", "allocate"]), st.sampled_from([0, 1, 3]), st.booleans())
def test_grids_and_corrections_are_the_same_out_of_the_file(tmp_path_factory, s, seed, fit, rank, mixed):
    """Bit for bit what the quantiser decodes in memory: every codec, with and without a correction, several widths."""
    path = tmp_path_factory.getbasetemp() / "grids.pg"
    s = tg.replace(s, fit=fit, matrix_quant="gptq", embed_quant="rtn", lqer_rank=rank, lqer_top_k=2, lqer_asym_group=5, matrix_bits=4,
                   awq_lite_group_top_k=3 * mixed, awq_lite_group_size=3,
                   embed_bits=6, gate_bits=5 if mixed else 16, layer_bits=((0, 3),) if mixed else ())
    model, curvature = ref.randomise(tg.GPT(s, init=False), seed, 0.2), {}
    for name, module in model.named_modules():
        if isinstance(module, (tg.Linear, tg.Embedding)):
            x = torch.randn(40, module.weight.size(1), generator=torch.Generator().manual_seed(seed))
            curvature[f"{name}.weight"] = tg.Curvature(x.T @ x / 40, torch.rand(len(module.weight)), 0.0, x.square().mean(0))
    seen = []
    pack = tg.pack
    with mock.patch.object(tg, "pack", lambda done, *rest: (seen.append(done), pack(done, *rest))[1]):
        info = tg.save_artifact(path, model, s, curvature=curvature, budget=9_000)
    loaded = dict(tg.load_artifact(path, s)[1].named_parameters())
    assert info["bytes"] == path.stat().st_size and sum(one.rank > 0 for one in seen[-1].values()) <= 2 * (rank > 0)
    tensors = tg.read_artifact(path)[0]["tensors"]
    assert tg.loading_bytes(tensors) <= tg.loading_bytes(tg.largest_entries(model, s)), "known before training"
    for name, one in seen[-1].items():
        assert torch.equal(loaded[name], one.decode(loaded[name].shape)), name


@ref.tries(15)
@given(ref.models(), st.integers(1, 6), st.integers(1, 7))
def test_the_bound_of_an_artifact_holds_for_any_tensors_that_lqer_may_correct(s, rank, group):
    """What training is refused for: every pair of tensors, each corrected, against the table that is looked at before."""
    s = tg.replace(s, fit="off", lqer_rank=rank, lqer_top_k=2, lqer_asym_group=group)
    model = tg.GPT(s, init=False)
    bound, plain = tg.largest_entries(model, s), tg.largest_entries(model, tg.replace(s, lqer_rank=0))
    places = [i for i, entry in enumerate(plain) if entry.codec != "float16"]
    for pair in itertools.combinations(places, 2):
        entries = list(plain)
        for i in pair:
            entries[i] = plain[i]._replace(rank=min(rank, *plain[i].shape), group=group)
        assert tg.loading_bytes(entries) <= tg.loading_bytes(bound)
        work = [sum(entry.rank * math.prod(entry.shape) for entry in table) for table in (entries, bound)]
        assert work[0] <= work[1]


@pytest.mark.parametrize("compressor", [*ALL, "auto"])
def test_every_code_and_scale_is_in_the_file(tmp_path, compressor):
    """Unpacked by the format's description: the codes of each kind of matrix together, kinds in the order in which they
    come, all scales and all halves in parameter order and as planes.
    """
    s, model, info = saved(tmp_path / "model.pg", compressor=compressor, tie_embeddings=False, attn_gate="dense",
                           trigram_vocab_size=9, embed_dim=8)
    assert set(tg.roles(model).values()) == {"embed", "head", "matrix", "scalar", "gate"}
    header, streams = parts_of(tmp_path / "model.pg")
    unpack = {"zstd": lambda d: __import__("zstandard").ZstdDecompressor().decompress(d, 1 << 20),
              "lzma": lzma.decompress,
              "brotli": lambda d: __import__("brotli").decompress(d), "zlib": zlib.decompress}
    raw = {name: unpack[chosen](streams[name]) for name, chosen, *_ in header["streams"]}
    assert {name: len(data) for name, data in raw.items()} == {name: size for name, _, size, *_ in header["streams"]}
    planes = lambda data: np.frombuffer(data, np.uint8).reshape(2, -1).T.copy().view(np.float16).ravel()
    values = {name: planes(data) if name in ("scale", "half") else np.frombuffer(data, np.int8)
              for name, data in raw.items()}
    at = dict.fromkeys(values, 0)

    def take(stream, count):
        at[stream] += count
        return values[stream][at[stream] - count : at[stream]]

    table, kinds = tg.roles(model), {}
    for name, parameter in model.named_parameters():
        if table[name] in ("scalar", "gate"):
            np.testing.assert_array_equal(take("half", parameter.numel()), parameter.detach().half().numpy().ravel())
            continue
        codes, scale = integers(parameter.detach(), 6 if table[name] == "matrix" else 8, "gptq_lite")
        kinds.setdefault("".join(c for c in name if not c.isdigit()), []).append(codes.numpy().ravel())
        np.testing.assert_array_equal(take("scale", len(parameter)), scale.numpy())
    for rows in kinds.values():
        np.testing.assert_array_equal(take("q", sum(map(len, rows))), np.concatenate(rows))
    assert at == {name: len(v) for name, v in values.items()}
    used = {chosen for _, chosen, *_ in header["streams"]}
    assert used == {compressor} or compressor == "auto"
    assert info["compressor"] == "+".join(sorted(used))
    assert info["sha256"] == hashlib.sha256((tmp_path / "model.pg").read_bytes()).hexdigest()


def test_auto_takes_the_smallest_of_each_stream(tmp_path):
    s = ref.small(model_dim=32, vocab_size=300, bigram_vocab_size=200)
    model = ref.randomise(tg.GPT(s, init=False))
    sizes, events = {}, []
    for compressor in (*ALL, "auto"):
        path = tmp_path / f"{compressor}.pg"
        tg.save_artifact(path, model, tg.replace(s, compressor=compressor), "",
                         lambda event, **values: events.append((compressor, values)))
        sizes[compressor] = {name: length for name, _, _, length, _ in parts_of(path)[0]["streams"]}
    for stream, size in sizes["auto"].items():
        assert size == min(sizes[compressor][stream] for compressor in ALL), stream
    assert len({min(ALL, key=lambda c: sizes[c][stream]) for stream in sizes["auto"]}) > 0
    reported = {v["stream"]: v for compressor, v in events if compressor == "auto"}
    assert reported.keys() == sizes["auto"].keys()
    assert all(v[f"{c}_bytes"] == sizes[c][name] for name, v in reported.items() for c in ALL)


def test_compressors_return_what_they_were_given():
    for name in ALL:
        for data in (b"", b"\0", bytes(range(256)) * 40, random.Random(0).randbytes(5000), b"\7" * 200_000):
            packed = tg.COMPRESSORS[name][0](data)
            assert tg.decompress(name, packed, len(data), "here") == data
            for size in {0, 1, len(data) // 2, len(data) - 1, len(data) + 1, 10 * len(data)} - {len(data), -1}:
                with pytest.raises(tg.BadInput, match="here"):
                    tg.decompress(name, packed, size, "here")


def test_the_bytes_of_each_role_are_its_shares_of_the_streams(tmp_path):
    _, _, info = saved(tmp_path / "model.pg")
    header, streams = parts_of(tmp_path / "model.pg")
    raw = {stream: {} for stream in streams}  # stream -> {role: bytes before packing}
    for name, shape, codec, _, rank, group in header["tensors"]:
        for stream, (dtype, count) in container.parts_of(tuple(shape), codec, rank, group).items():
            role = role_of(name)
            raw[stream][role] = raw[stream].get(role, 0) + np.dtype(dtype).itemsize * count
    expected = {}
    for stream, data in streams.items():
        for role, size in raw[stream].items():
            expected[role] = expected.get(role, 0) + len(data) * size / sum(raw[stream].values())
    of_header = info["role_bytes"].pop("header")
    assert info["role_bytes"] == {role: pytest.approx(size, abs=0.5) for role, size in expected.items()}
    assert list(info["role_bytes"].values()) == sorted(info["role_bytes"].values(), reverse=True) and len(expected) > 2
    assert sum(info["role_bytes"].values()) + of_header == info["bytes"]
    assert abs(info["bytes"] - sum(map(len, streams.values())) - of_header) < len(expected)


def test_the_default_model_packs_in_one_pass(tmp_path, capsys):
    """27 M normally distributed weights: harder to pack than trained ones, so the size is an upper bound."""
    s = tg.Settings(compressor="zlib", fit="off", matrix_quant="gptq_lite", embed_quant="gptq_lite")
    model = ref.randomise(tg.GPT(s, init=False), spread=0.05)
    began = time.monotonic()
    info = tg.save_artifact(tmp_path / "model.pg", model, s)
    packed = time.monotonic() - began
    _, loaded = tg.load_artifact(tmp_path / "model.pg")
    margin = tg.CONTEST_LIMIT - info["bytes"] - len(inspect.getsource(tg).encode())
    count, size = sum(p.numel() for p in model.parameters()), info["bytes"]
    with capsys.disabled():
        print(f"\n{count} parameters: {size} bytes ({8 * size / count:.3f} bits each), {packed:.1f} s, margin {margin}")
    assert info["bytes"] == (tmp_path / "model.pg").stat().st_size < count * 0.75
    for name, weight in in_memory(model, s).items():
        assert torch.equal(weight, dict(loaded.named_parameters())[name])


def test_the_header_holds_what_loading_needs(tmp_path):
    """Whoever has the file and the script has the model: nothing comes from the reader's settings."""
    odd = dict(num_layers=5, model_dim=24, num_heads=2, num_kv_heads=1, rope_dims=6, mlp_mult=1.375, leaky_slope=0.3,
               logit_softcap=12.345678901234567,
               rope_base=1234.5678901234567, xsa_last_n=3, ln_scale=False, doc_mask="none", bigram_vocab_size=33,
               bigram_dim=5, ve_dim=3,
               ve_layers=(0, 2, 4), vocab_size=77, qk_gain_init=0.1 + 0.2, attn_gate="sparse", gate_window=7,
               sparse_attn_gate_scale=0.7, value_residual="pair", skips="gated", skip_pairs=1, num_loops=2,
               loop_start=1, loop_end=2, loop_order="layer", parallel_residual="routed", parallel_start_layer=3,
               parallel_final_lane="learned", smear_gate="scalar", trigram=True, trigram_vocab_size=19, trigram_dim=3,
               embed_dim=10, tie_embeddings=False)
    s, model, _ = saved(tmp_path / "model.pg", **odd)
    header, _ = parts_of(tmp_path / "model.pg")
    assert header["tokenizer_sha256"] == "a" * 64
    assert {f.name.upper() for f in tg.fields(tg.Settings)
            if f.metadata["group"] == "Model"} | {"VOCAB_SIZE", "SEED"} == set(header["settings"])
    shapes = [(name, list(p.shape)) for name, p in model.named_parameters()]
    assert [(name, shape) for name, shape, *_ in header["tensors"]] == shapes
    bare, loaded = tg.load_artifact(tmp_path / "model.pg")
    for name, value in odd.items():
        assert getattr(bare, name) == value, name
    ids = ref.tokens(77, 2, 9)
    model.load_state_dict(in_memory(model, s))
    with torch.no_grad():
        assert torch.equal(model(ids, ids), loaded(ids, ids))


@pytest.mark.parametrize("looping", [True, False])
def test_whether_depth_recurrence_was_reached_is_in_the_file(tmp_path, looping):
    """A model that was trained without its loop is also scored without, whatever NUM_LOOPS says."""
    s = ref.small(num_loops=1, loop_start=1, loop_end=1)
    model, ids = ref.randomise(tg.GPT(s, init=False)), ref.tokens(32, 2, 9)
    model.looping = looping
    tg.save_artifact(tmp_path / "model.pg", model, s)
    _, loaded = tg.load_artifact(tmp_path / "model.pg", s)
    assert loaded.looping is looping and parts_of(tmp_path / "model.pg")[0]["looping"] is looping
    model.load_state_dict(in_memory(model, s))
    with torch.no_grad():
        assert torch.equal(model(ids, ids), loaded(ids, ids))
        loaded.looping = not looping
        assert not torch.equal(model(ids, ids), loaded(ids, ids))


def test_nothing_of_training_is_in_the_file(tmp_path):
    """MTP heads belong to the objective; an artifact of a run with them is that of the same weights without."""
    s = ref.small(mtp_num_heads=2, train_seq_len=16)
    model = ref.randomise(tg.GPT(s, init=False))
    objective = tg.Objective(model, s)
    assert len(list(objective.parameters())) == len(list(model.parameters())) + 2
    tg.save_artifact(tmp_path / "with.pg", objective.model, s)
    tg.save_artifact(tmp_path / "without.pg", model, ref.small())
    assert (tmp_path / "with.pg").read_bytes() == (tmp_path / "without.pg").read_bytes()


def test_a_contradicting_setting_is_named_with_both_values(tmp_path):
    saved(tmp_path / "model.pg")
    line = refused(tmp_path / "model.pg", settings=ref.small(num_layers=2, ve_layers=(1,)))
    assert "NUM_LAYERS=2" in line and "3" in line
    assert "LEAKY_SLOPE=0.25" in refused(tmp_path / "model.pg", settings=ref.small(leaky_slope=0.25))
    loaded, _ = tg.load_artifact(tmp_path / "model.pg", tg.Settings(eval_stride=7, data_path="somewhere"))
    assert (loaded.eval_stride, loaded.data_path, loaded.num_layers) == (7, "somewhere", 3)


def test_a_file_of_before_a_setting_was_there_has_its_default(tmp_path):
    """Settings come and go: one that the file does not name yet is as it was, one that is gone is refused."""
    saved(tmp_path / "model.pg")
    header, _ = tg.read_artifact(tmp_path / "model.pg")

    def rewritten(change):
        body = zlib.decompress((data := (tmp_path / "model.pg").read_bytes())[tg.PREFIX.size:][: tg.PREFIX.unpack_from(data)[2]])
        whole = json.loads(body)
        change(whole["settings"])
        raw = json.dumps(whole).encode()
        packed = zlib.compress(raw)
        rest = data[tg.PREFIX.size + tg.PREFIX.unpack_from(data)[2]:]
        (tmp_path / "other.pg").write_bytes(tg.PREFIX.pack(tg.MAGIC, tg.ARTIFACT_VERSION, len(packed), len(raw), zlib.crc32(packed)) + packed + rest)
        return tmp_path / "other.pg"

    for name in ("PARALLEL_FIRST_SKIP", "ASYM_LOGIT_RESCALE"):
        s, model = tg.load_artifact(rewritten(lambda settings: settings.pop(name)))
        assert getattr(s, name.lower()) == getattr(tg.Settings(), name.lower())
        want = tg.load_artifact(tmp_path / "model.pg")[1]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want.parameters()))
    assert "SURPRISE" in refused(rewritten(lambda settings: settings.update(SURPRISE="1")))


def test_the_file_is_complete_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "model.pg"
    saved(path)
    before = path.read_bytes()
    monkeypatch.setattr(tg.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(tg.BadInput, match="No space left"):
        saved(path, seed=1)
    monkeypatch.undo()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.pg"]
    blocked = tmp_path / "model.pg" / "inside"
    with pytest.raises(tg.BadInput, match="inside"):
        saved(blocked)


# --- missing packages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor, package", [("zstd", "zstandard"), ("brotli", "brotli")])
def test_a_missing_package_is_named_before_training_and_at_loading(tmp_path, monkeypatch, compressor, package):
    saved(tmp_path / "model.pg", compressor=compressor)
    monkeypatch.setitem(sys.modules, package, None)
    assert package in refused(tmp_path / "model.pg")
    hide(monkeypatch, package)
    for choice in (compressor, "auto"):
        with pytest.raises(tg.BadInput, match=f"COMPRESSOR={choice}.*{package}"):
            tg.Settings.parse([f"COMPRESSOR={choice}"])


@pytest.mark.parametrize("version, accepted", [("1.1.0", False), ("1.2.0", True), ("2.0.0", True)])
def test_a_brotli_that_could_not_load_what_it_packed_is_refused_before_training(monkeypatch, version, accepted):
    brotli = pytest.importorskip("brotli")
    monkeypatch.setattr(brotli, "__version__", version)
    for choice in ("brotli", "auto"):
        with contextlib.nullcontext() if accepted else pytest.raises(tg.BadInput, match=f"COMPRESSOR={choice}.*pip install -U brotli"):
            tg.Settings.parse([f"COMPRESSOR={choice}"])


@pytest.mark.parametrize("package", ["zstandard", "brotli"])
def test_an_artifact_needs_only_the_package_it_was_packed_with(tmp_path, monkeypatch, package):
    """COMPRESSOR=zlib was allowed without the package, so the run that wrote the file can load it."""
    s, _, _ = saved(tmp_path / "model.pg", compressor="zlib")
    monkeypatch.setitem(sys.modules, package, None)
    hide(monkeypatch, package)
    tg.load_artifact(tmp_path / "model.pg", s)


def hide(monkeypatch, package):
    find = tg.importlib.util.find_spec
    shown = lambda name, *rest: None if name == package else find(name, *rest)
    monkeypatch.setattr(tg.importlib.util, "find_spec", shown)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model.pg"
    s, model, _ = saved(path, num_layers=2, ve_layers=(1,))
    return path, path.read_bytes(), {n: p.detach().clone() for n, p in tg.load_artifact(path)[1].named_parameters()}


def mutate(data, rng):
    if rng.randrange(6):
        return fuzzing.damaged_bytes(rng, data)
    data = bytearray(data)
    data[rng.randrange(min(40, len(data)))] = rng.randrange(256)  # the fixed part and the beginning of the header
    return bytes(data)


# Ten thousand damaged files: here, sealed again below, and as bare codes in test_coder.py.
@pytest.mark.parametrize("compressor", [*ALL, "rans"])
def test_random_damage_is_refused_in_one_line_or_does_no_harm(tmp_path, compressor):
    """Also where the compressor has no checksum of its own."""
    good, bad, rng, harmless = tmp_path / "good.pg", tmp_path / "bad.pg", random.Random(0), 0
    saved(good, num_layers=2, ve_layers=(1,), compressor=compressor)
    data, weights = good.read_bytes(), dict(tg.load_artifact(good)[1].named_parameters())
    for _ in range(1600):
        bad.write_bytes(mutate(data, rng))
        try:
            loaded = dict(tg.load_artifact(bad)[1].named_parameters())
        except tg.BadInput as error:
            assert "\n" not in str(error) and str(bad) in str(error)
        else:
            harmless += 1
            assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert harmless < 40


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 21, 22, 23, 100])
def test_truncations_are_refused(good, tmp_path, length):
    (tmp_path / "bad.pg").write_bytes(good[1][:length])
    refused(tmp_path / "bad.pg")
    (tmp_path / "bad.pg").write_bytes(good[1][: len(good[1]) - 1 - length])
    refused(tmp_path / "bad.pg")


def test_what_is_no_artifact_is_refused(tmp_path):
    assert "version 2" in (seal(tmp_path / "a.pg", {}, b"", version=2), refused(tmp_path / "a.pg"))[1]
    seal(tmp_path / "b.pg", {}, b"", magic=b"PGOLG\r\n\x1a")
    refused(tmp_path / "b.pg")
    refused(tmp_path / "missing.pg")
    refused(tmp_path)
    (tmp_path / "c.pg").write_bytes(b"\x80\x04\x95" + pickle.dumps({"a": 1}))
    refused(tmp_path / "c.pg")


@pytest.mark.parametrize("compressor", ["zlib", "brotli", "rans"])
def test_damage_with_right_checksums_ends_in_bad_input_or_finite_weights(tmp_path, compressor):
    """Checksums do not protect against a person: the same damage, sealed again."""
    path = tmp_path / "good.pg"
    saved(path, num_layers=2, ve_layers=(1,), compressor=compressor)
    weights, (header, streams) = dict(tg.load_artifact(path)[1].named_parameters()), parts_of(path)
    text, payload = json.dumps(header, separators=(",", ":")).encode(), b"".join(streams.values())
    rng, bad, shapes = random.Random(1), tmp_path / "bad.pg", {name: weight.shape for name, weight in weights.items()}
    for turn in range(150 if compressor == "rans" else 700):
        if turn % 2:
            seal(bad, mutate(text, rng), payload)
        else:
            changed, parts = json.loads(text), dict(streams)
            row = rng.choice(changed["streams"])
            parts[row[0]] = mutate(parts[row[0]], rng)
            row[3:] = len(parts[row[0]]), zlib.crc32(parts[row[0]])
            seal(bad, changed, b"".join(parts.values()))
        try:
            _, model = tg.load_artifact(bad)
        except tg.BadInput as error:
            assert "\n" not in str(error) and str(bad) in str(error)
        else:
            assert all(torch.isfinite(p).all() for p in model.parameters())
            assert {name: p.shape for name, p in model.named_parameters()} == shapes


HUGE = int("9" * 4300)  # the longest that the JSON reader takes; the sum of two cannot even be printed


def hostile():
    """Headers of a person who wants the reader to crash, hang, run out of memory or load something else."""
    def change(key, value):
        def apply(header):
            header[key] = value(header[key]) if callable(value) else value
        return apply

    def matrix(column, value):
        def apply(header):
            i = next(i for i, line in enumerate(header["tensors"]) if line[0] == "blocks.0.mlp.up.weight")
            row("tensors", i, column, value(header["tensors"][i][column]) if callable(value) else value)(header)
        return apply

    def settings(**values):
        return lambda header: header["settings"].update(values)

    def row(key, i, column, value):
        def apply(header):
            header[key][i] = list(header[key][i])
            header[key][i][column] = value
        return apply

    yield from {
        "empty": lambda header: header.clear(), "no streams": lambda header: header.pop("streams"),
        "no tensors": lambda header: header.pop("tensors"),
        "no settings": lambda header: header.pop("settings"), "settings is a list": change("settings", []),
        "streams is a number": change("streams", 5),
        "tensors is text": change("tensors", "abcd"), "a stream is text": row("streams", 0, slice(None), "abcde"),
        "no tensors at all": change("tensors", []), "no streams at all": change("streams", []),
        "tensor twice": change("tensors", lambda t: t + t[:1]),
        "stream twice": change("streams", lambda rows: rows + rows[:1]),
        "unknown stream": row("streams", 0, 0, "other"),
        "unknown codec": matrix(2, "pickle"), "other codec": matrix(2, "float16"), "grid instead": matrix(2, "grid"),
        "corrected, but there is no correction": matrix(slice(4, 6), [2, 64]), "rank negative": matrix(4, -1),
        "rank without a group": matrix(slice(4, 6), [2, 0]), "group negative": matrix(slice(4, 6), [2, -3]),
        "rank huge": matrix(slice(4, 6), [1 << 60, 1]), "rank of 4300 digits": matrix(slice(4, 6), [HUGE, 1]),
        "rank infinite": matrix(4, math.inf), "rank of halves": lambda header: next(
            line for line in header["tensors"] if line[2] == "float16").__setitem__(slice(4, 6), [1, 1]),
        **{f"{codec} of {size} axes, rank {rank}": lambda header, codec=codec, size=size, rank=rank: next(
            line for line in header["tensors"] if len(line[1]) == size).__setitem__(slice(2, 6), [codec, 8, rank, 1])
           for codec in ("int", "grid") for size in (0, 1) for rank in (0, 1)},
        "unknown compressor": row("streams", 0, 1, "gzip"),
        "other compressor": row("streams", 0, 1, "lzma"), "brotli instead": row("streams", 0, 1, "brotli"),
        "zstd instead": row("streams", 0, 1, "zstd"),
        "negative raw size": row("streams", 0, 2, -1), "negative length": row("streams", 0, 3, -5),
        "huge raw size": row("streams", 0, 2, 1 << 60),
        "huge length": row("streams", 0, 3, 1 << 60), "raw size of 4300 digits": row("streams", 0, 2, HUGE),
        "lengths of 4301 digits together": lambda header: [line.__setitem__(3, HUGE) for line in header["streams"]],
        "infinite size": row("streams", 0, 2, math.inf), "size not a number": row("streams", 0, 2, math.nan),
        "infinite length": row("streams", 0, 3, math.inf),
        "infinite checksum": row("streams", 0, 4, math.inf), "size is null": row("streams", 0, 2, None),
        "size is a list": row("streams", 0, 2, [1]),
        "one byte less": lambda header: row("streams", 0, 2, header["streams"][0][2] - 1)(header),
        "one byte more": lambda header: row("streams", 0, 2, header["streams"][0][2] + 1)(header),
        "shape transposed": matrix(1, lambda shape: shape[::-1]),
        "shape huge": matrix(1, [1 << 40, 1 << 40]), "shape negative": matrix(1, [-32, -16]),
        "shape empty": matrix(1, []),
        "shape infinite": matrix(1, [math.inf, 16]), "shape text": matrix(1, "ab"),
        "bits infinite": matrix(3, math.inf),
        "bits text": matrix(3, "six"), "tensor renamed": matrix(0, "__class__"),
        "tensors reordered": change("tensors", lambda t: t[::-1]),
        "a model of 2^40 weights": settings(NUM_LAYERS="256", MODEL_DIM="16384", NUM_HEADS="256", NUM_KV_HEADS="256",
                                            MLP_MULT="16"),
        "vocabulary of 2^16": settings(VOCAB_SIZE="65536"),
        "table of 2^24 rows": settings(BIGRAM_VOCAB_SIZE=str(2**24), BIGRAM_DIM="16384"),
        "no layers": settings(NUM_LAYERS="0"), "a billion layers": settings(NUM_LAYERS="1000000000"),
        "negative width": settings(MODEL_DIM="-512"),
        "layers not a number": settings(NUM_LAYERS="nan"), "cap infinite": settings(LOGIT_SOFTCAP="inf"),
        "a value of 10^5 digits": settings(NUM_LAYERS="1" * 10**5),
        "heads do not divide": settings(NUM_HEADS="3"), "setting unknown": settings(SURPRISE="1"),
        "setting missing": lambda header: header["settings"].popitem(),
        "another room's setting": settings(VAL_TOKENS="64"), "the reader's folder": settings(DATA_PATH="elsewhere"),
        "newline": settings(NUM_LAYERS="3\n4"),
        "a setting that is a file": lambda header: header["settings"].update({"@" + __file__: ""}),
        "no word of looping": lambda header: header.pop("looping"),
        "a loop over layers that are not there": settings(NUM_LOOPS="1", LOOP_END="9"),
        "lanes from a layer that is not there": settings(PARALLEL_RESIDUAL="lanes", PARALLEL_START_LAYER="9"),
        "more loops than anyone waits for": settings(NUM_LOOPS="1000000"),
        "a head that is not there": settings(TIE_EMBEDDINGS="0"), "another choice": settings(SMEAR_GATE="pickle"),
        "a field of another version": change("surprise", 1), "looping is a number": change("looping", 1),
        "temperature is true": change("temperature", True),
        "temperature infinite": change("temperature", math.inf),
        "temperature of 100": change("temperature", 100),
        "rank is true": matrix(slice(4, 6), [True, 1]), "rank is 1.0": matrix(slice(4, 6), [1.0, 1]),
        "group beyond what can be chosen": matrix(slice(4, 6), [2, 2**16 + 1]),
        "bits of 2^40": matrix(3, 2**40),
        "name is a number": matrix(0, 5), "shape of floats": matrix(1, [32.0, 16.0]),
        "raw size is true": row("streams", 0, 2, True), "length is a float": row("streams", 0, 3, 10.0),
        "checksum of 2^40": row("streams", 0, 4, 2**40), "stream is a number": row("streams", 0, 0, 5),
        "stream is a list": row("streams", 0, 0, ["q"]),
        "compressor is a list": row("streams", 0, 1, ["zlib"]),
        "codec is a list": matrix(2, ["int"]),
        "a value that is no text": settings(NUM_LAYERS=2),
        "a name that ends the line": settings(**{"A\nB": "1"}),
        "a name of 10^5 letters": settings(**{"A" * 10**5: "1"}),
        "a value with colours": settings(SKIPS="\x1b[31m"),
        "layers listed a million times": settings(VE_LAYERS="1," * 10**6 + "1"),
        "short tokenizer hash": change("tokenizer_sha256", "abcd"),
        "no tokenizer hash": lambda header: header.pop("tokenizer_sha256"),
        "tokenizer hash is a number": change("tokenizer_sha256", 12),
        "tokenizer hash is a list": change("tokenizer_sha256", ["a"]),
    }.items()


@pytest.mark.parametrize("apply", [pytest.param(apply, id=name) for name, apply in hostile()])
def test_hostile_headers_are_refused(good, tmp_path, apply):
    header, streams = parts_of(good[0])
    apply(header)
    seal(tmp_path / "bad.pg", header, b"".join(streams.values()))
    refused(tmp_path / "bad.pg", limit=1 << 24)


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"3", b'"x"', b"{", b"\xff\xfe", b"{}" * 100, b"[" * 200_000,
                                  b'{"a":' * 100_000, b"\0" * 1000])
def test_headers_that_are_no_header_are_refused(tmp_path, text):
    seal(tmp_path / "bad.pg", text, b"")
    refused(tmp_path / "bad.pg", limit=1 << 26)


@pytest.mark.parametrize("twice", ["looping", "settings", "streams"])
def test_a_name_that_comes_twice_in_the_header_is_refused(good, tmp_path, twice):
    """JSON readers differ in which of them counts."""
    header, streams = parts_of(good[0])
    text = json.dumps(header)
    again = text[:-1] + f', "{twice}": {json.dumps(header[twice])}}}'
    assert json.loads(again) == header
    seal(tmp_path / "bad.pg", again.encode(), b"".join(streams.values()))
    assert "twice" in command_refuses(tmp_path / "bad.pg")


def test_a_stream_that_is_there_twice_is_refused(good, tmp_path):
    """With its bytes, so that every length is right."""
    header, streams = parts_of(good[0])
    header["streams"].append(header["streams"][0])
    payload = [streams[row[0]] for row in header["streams"]]
    seal(tmp_path / "bad.pg", header, b"".join(payload))
    assert "twice" in command_refuses(tmp_path / "bad.pg")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin"])
def test_a_device_is_no_artifact(path):
    """It may never end."""
    command_refuses(path, "not a regular file")


class Peak:
    """MiB of memory that a block touched at most beyond what was in use before; 0 where the system does not tell."""

    def read(self, key):
        try:
            return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith(key))
        except (OSError, StopIteration):
            return 0

    def __enter__(self):
        try:
            open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
            self.before = self.read("VmRSS")
        except OSError:
            self.before = self.read("VmHWM")
        return self

    def __exit__(self, *_):
        self.mib = self.read("VmHWM") - self.before


@pytest.mark.parametrize("name", ALL)
def test_bombs_go_off_nowhere(good, tmp_path, name):
    """256 MiB of zeros for a stream of some hundred bytes: unpacked to the size that the header's shapes allow."""
    header, streams = parts_of(good[0])
    first = header["streams"][0]
    streams[first[0]] = container.zeros(name, 256 << 20)
    assert len(streams[first[0]]) < 1 << 19
    first[1], first[3:] = name, [len(streams[first[0]]), zlib.crc32(streams[first[0]])]
    seal(tmp_path / "bad.pg", header, b"".join(streams.values()))
    with Peak() as peak:
        assert first[0] in refused(tmp_path / "bad.pg", limit=1 << 25)
    assert peak.mib < 64


def test_a_bomb_of_a_header_goes_off_nowhere(tmp_path):
    body = container.zeros("zlib", 64 << 20)
    for claimed in (64 << 20, 1000, (1 << 22) - 1, 0):
        (tmp_path / "bad.pg").write_bytes(struct.pack("<8sHIII", b"PGOLF\r\n\x1a", 1, len(body), claimed,
                                                      zlib.crc32(body)) + body)
        with Peak() as peak:
            refused(tmp_path / "bad.pg", limit=1 << 25)
        assert peak.mib < 32


# --- what decoding needs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2**16 + 1, 2**29, 2**30, 2**33, 10**30])
def test_the_group_of_lqer_is_bounded(tmp_path, group):
    """One step of B is repeated as often as the group says: 2^29 made 2.3 GB of a small file."""
    path = tmp_path / "bad.pg"
    data = fuzzing.save(path, dict(lqer_rank=2, lqer_top_k=1, lqer_asym_group=2**16))
    tg.load_artifact(path)  # the largest that a run can choose
    header, streams = container.unseal(data)
    (row,) = [row for row in header["tensors"] if row[4]]
    row[5] = group
    path.write_bytes(container.reseal(header, streams))
    command_refuses(path, "group", str(group)[:20], "65536")


def test_the_time_that_lqer_takes_is_bounded(tmp_path):
    """The rank of a hostile file is that of its largest matrices: hours of additions."""
    path = tmp_path / "bad.pg"
    path.write_bytes(container.of_zeros(["VOCAB_SIZE=49152", "MODEL_DIM=512"], rank=256))
    command_refuses(path, "corrections")
    words = ["MODEL_DIM=512", "NUM_LAYERS=1", "XSA_LAST_N=1", "VE_DIM=0"]
    header, streams = container.unseal(container.of_zeros(words, rank=2))
    for row in header["tensors"]:
        row[4] = row[4] and min(row[1])
    path.write_bytes(container.reseal(header, streams))
    command_refuses(path, "from 1 to 256")


@pytest.mark.parametrize("compressor", ALL)
def test_a_small_file_of_a_model_of_gigabytes_is_refused(tmp_path, compressor):
    """16 kB of zstd were 0.5 GB of codes, and 5.7 GB while they were decoded. It contradicts nothing."""
    words = ["BIGRAM_VOCAB_SIZE=16777216", "BIGRAM_DIM=28"]
    path = tmp_path / "bad.pg"
    if compressor == "zstd":
        data = container.of_zeros(words)
    else:  # a megabyte will do for the others: nothing is unpacked
        zeros = container.zeros
        with mock.patch.object(container, "zeros", lambda name, size: zeros(name, min(size, 1 << 20))):
            data = container.of_zeros(words, compressor=compressor)
    assert len(data) < 1 << 20
    path.write_bytes(data)
    command_refuses(path, "MiB to be loaded", "the limit is 1024")


@pytest.mark.parametrize("codec, compressor, rank", [
    ("int", "rans", 0), ("int", "lzma", 0), ("mixed", "zstd", 2), ("wide", "brotli", 2),
    ("float16", "zlib", 0)])
def test_loading_takes_no_more_memory_than_is_known_before(tmp_path, codec, compressor, rank):
    path = tmp_path / "model.pg"
    width = 128 if compressor == "rans" else 512  # the entropy coder takes a second for a million codes
    words = ["VOCAB_SIZE=8192", f"MODEL_DIM={width}", "NUM_LAYERS=1", "XSA_LAST_N=1", "VE_DIM=0"]
    path.write_bytes(container.of_zeros(words, codec, compressor, rank, 64))
    expected = tg.loading_bytes(tg.read_artifact(path)[0]["tensors"])
    with Peak() as peak:
        tg.load_artifact(path)
    assert peak.mib << 20 < expected + (24 << 20), "beside the window of a compressor"


def test_a_model_that_could_not_be_loaded_is_refused_before_it_is_trained(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "MAX_LOADED", 1 << 18)
    done = runs.call(runs.command(toy, tmp_path, "PHASES=train"))
    runs.refused(done, 2, "the artifact of this model", "MiB to be loaded")
    assert not runs.events(tmp_path, "train")


def test_a_header_of_the_deepest_model_is_refused_in_seconds(good, tmp_path):
    """Of 256 layers, each met 17 times; the model is only a skeleton then."""
    header, streams = parts_of(good[0])
    header["settings"] |= dict(NUM_LAYERS="256", NUM_LOOPS="16", LOOP_START="0", LOOP_END="255",
                               PARALLEL_RESIDUAL="lanes", PARALLEL_START_LAYER="255",
                               BIGRAM_VOCAB_SIZE="16777216", BIGRAM_DIM="16384")
    seal(tmp_path / "bad.pg", header, b"".join(streams.values()))
    began = time.process_time()
    command_refuses(tmp_path / "bad.pg", "its tensors are not those of its settings")
    assert time.process_time() - began < 10


def greedy_xz(raw):
    """xz data whose block header asks for a dictionary of 2 GiB."""
    data = bytearray(lzma.compress(raw, check=lzma.CHECK_NONE))
    start, length = 12, 4 * (data[12] + 1)  # of the block header, behind the stream header
    assert data[start + 2 : start + 4] == b"\x21\x01"  # one filter, LZMA2, with one byte of properties
    data[start + 4] = 38
    data[start + length - 4 : start + length] = struct.pack("<I", zlib.crc32(bytes(data[start : start + length - 4])))
    return bytes(data)


def greedy_zstd(raw):
    """One raw block in a frame that asks for a window of 2 GiB."""
    return b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + struct.pack("<I", len(raw) << 3 | 1)[:3] + raw


@pytest.mark.parametrize("name, pack", [("lzma", greedy_xz), ("zstd", greedy_zstd)])
def test_windows_of_gigabytes_are_refused(good, tmp_path, name, pack):
    """What a decompressor reserves before its first byte counts as well."""
    header, streams = parts_of(good[0])
    first = header["streams"][0]
    streams[first[0]] = pack(zlib.decompress(streams[first[0]]))
    first[1], first[3:] = name, [len(streams[first[0]]), zlib.crc32(streams[first[0]])]
    seal(tmp_path / "bad.pg", header, b"".join(streams.values()))
    assert name in refused(tmp_path / "bad.pg", limit=(1 << 28) + (1 << 24))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stream", ["scale", "half"])
def test_values_that_are_not_finite_are_refused(good, tmp_path, stream, value):
    header, streams = parts_of(good[0])
    row = next(row for row in header["streams"] if row[0] == stream)
    values = np.frombuffer(zlib.decompress(streams[stream]), np.uint8).reshape(2, -1).T.copy().view(np.float16).ravel()
    values[3] = value
    streams[stream] = zlib.compress(values.view(np.uint8).reshape(-1, 2).T.tobytes())
    row[3:] = len(streams[stream]), zlib.crc32(streams[stream])
    seal(tmp_path / "bad.pg", header, b"".join(streams.values()))
    assert "finite" in refused(tmp_path / "bad.pg")


# --- nothing is executed ---------------------------------------------------------------------------------------------


def test_loading_never_unpickles(good, monkeypatch):
    def never(*_, **__):
        raise AssertionError("loading an artifact must not unpickle")

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",)), (np, ("load", "fromfile"))):
        for name in names:
            monkeypatch.setattr(module, name, never)
    tg.load_artifact(good[0])


def test_nothing_that_loading_calls_can_execute():
    """The functions of the module that load_artifact reaches, by their syntax trees."""
    tree = ast.parse(inspect.getsource(tg))
    bodies = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    bodies |= {target.id: node for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
               if isinstance(target, ast.Name)}
    reached, todo = set(), ["load_artifact", "read_artifact"]
    while todo:
        name = todo.pop()
        if name in bodies and name not in reached:
            reached.add(name)
            todo += [node.id for node in ast.walk(bodies[name]) if isinstance(node, ast.Name)
                     and isinstance(node.ctx, ast.Load)]
    assert {"decompress", "Settings", "GPT", "CODECS", "COMPRESSORS"} <= reached
    banned = {"pickle", "eval", "exec", "compile", "marshal", "shelve", "joblib", "__import__", "subprocess", "system",
              "popen"}
    for name in reached:
        for node in ast.walk(bodies[name]):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name):
                assert called.id not in banned, name
            if isinstance(called, ast.Attribute):
                assert called.attr not in banned - {"compile"}, name
                assert not (called.attr == "load" and isinstance(called.value, ast.Name)
                            and called.value.id in ("torch", "np", "pickle")), name


def test_the_file_never_imports_pickle_and_loads_only_weights():
    tree = ast.parse(inspect.getsource(tg))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
