"""Damages artifacts and checkpoints as a person who knows the formats would, and looks at what becomes of each.
Every checksum may be right.

    python tests/help/fuzzing.py artifacts --count 10000 --seed 1
    python tests/help/fuzzing.py checkpoints --count 500

A worker with 4 GiB of address space is given one damaged file after the other, with 20 seconds of processor
time for each. It is refused or good; anything else is a failure. Its seed and number make it again (--only).

    refused    BadInput of one printable line of at most 300 characters. A refused checkpoint has left the
               training as it was.
    good       An artifact whose weights are finite and, to the bit, what `reference_weights` reads from the
               same bytes: numpy and the format's description, no code of train_gpt.py but its entropy coder.
               Where no checksum was made again they are those of the file before it was damaged, too.
               A checkpoint that was loaded, after which the training's state is that of the file.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import reference as ref
import torch
from container import (
    of_zeros,
    packed,
    reference_weights,
    reseal,
    rezipped,
    saved,
    seal,
    sealed_checkpoint,
    table_of_streams,
    unpacked,
    unseal,
    zeros,
)

import train_gpt as tg

ADDRESS_SPACE = 4 << 30  # of the worker, of which Python and torch take 0.7 GiB
SECONDS = 20  # for each file
LONGEST_LINE = 300

# Artifacts to begin with: every codec and every compressor.

SMALL = dict(num_layers=2, ve_layers=(1,), num_heads=2, num_kv_heads=1, rope_dims=4)
ORIGINALS = {
    "int, rans": dict(compressor="rans"),
    "int of 4 bits, zlib": dict(compressor="zlib", matrix_bits=4, num_loops=1, loop_start=0, loop_end=1),
    "int of unequal bits, brotli": dict(compressor="brotli", attn_gate="dense", gate_bits=8, layer_bits="0@3",
                                        tie_embeddings=False, smear_gate="scalar"),
    "ternary, zstd": dict(compressor="zstd", matrix_quant="ternary"),
    "float16, lzma": dict(compressor="lzma", matrix_bits=16, embed_bits=16),
    "grid, rans": dict(fit="allocate", compressor="rans", budget=5500),
    "wide, zstd": dict(fit="allocate", compressor="zstd", budget=10**9),
    "mixed, correction, zlib": dict(compressor="zlib", matrix_bits=3, awq_lite_group_top_k=3,
                                    awq_lite_group_size=4, lqer_rank=2),
    "grid, correction, rans": dict(fit="allocate", compressor="rans", lqer_rank=3, lqer_asym_group=5,
                                   budget=5500),
}


def random_curvature(model, seed):
    """{parameter: Curvature} as calibration gives them, of random inputs."""
    generator, curvature = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if isinstance(module, (tg.Linear, tg.Embedding)):
            x = torch.randn(40, module.weight.size(1), generator=generator)
            gain = torch.rand(len(module.weight), generator=generator)
            curvature[f"{name}.weight"] = tg.Curvature(x.T @ x / 40, gain, 0.0, x.square().mean(0))
    return curvature


def save(path, changes, seed=0):
    """A real artifact of random weights: its bytes. `budget` among the changes: the bytes that FIT may fill."""
    changes = {**SMALL, **changes}
    budget = changes.pop("budget", None)
    if changes.get("fit") == "allocate":
        changes |= dict(matrix_quant="rtn", embed_quant="rtn")
    s = ref.small(**changes)
    model = ref.randomise(tg.GPT(s, init=False), seed)
    curvature = random_curvature(model, seed) if s.needs_curvature else None
    tg.save_artifact(path, model, s, "a" * 64, curvature=curvature, budget=budget)
    return Path(path).read_bytes()


# Damage. Every kind is a function of a random.Random and of what is damaged.

NUMBERS = [0, 1, -1, 2, 3, 15, 16, 17, 127, 128, 255, 256, 257, 2**16, 2**16 + 1, 2**24, 2**29, 2**30, 2**31,
           2**32, 2**33, 2**62, 2**63, 2**64, 10**4000, 0.5, -0.0, 1e308, math.inf, -math.inf, math.nan]
TEXTS = ["", "0", "1", "x", "x" * 5000, "a\nb", "\x1b[31m", "\u202e\u00e9", "../../x", "@/etc/passwd"]
WRONG = [*NUMBERS, *TEXTS, True, False, None, [], [[]], [1], {}, {"a": 1}]
WORDS = ["q", "over", "scale", "half", "row", "col", "unit", "fine", "salient", "a", "a_step", "b", "b_step",
         "int", "mixed", "grid", "wide", "float16", "rans", "zstd", "lzma", "brotli", "zlib", "pickle"]


def damaged_bytes(rng, data):
    """A few bytes changed, removed, added, moved or repeated."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(0, 9))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data += rng.randbytes(rng.randrange(1, 40))
        elif kind == 4:
            data[at : at + 40] = data[at : at + 40][::-1]
        elif kind == 5:
            data[at:at] = data[at : at + rng.randrange(1, 100)]
        else:
            data[at : at + 4] = rng.choice((b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
    return bytes(data)


def places(tree, path=()):
    """Paths of everything in nested dicts, lists and tuples."""
    yield path
    if isinstance(tree, (dict, list, tuple)):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*path, key))


def replaced(tree, path, value):
    """The same tree, with another value in a place."""
    if not path:
        return value
    if isinstance(tree, tuple):
        whole = list(tree)
        whole[path[0]] = replaced(whole[path[0]], path[1:], value)
        return tuple(whole)
    tree[path[0]] = replaced(tree[path[0]], path[1:], value)
    return tree


def found_at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def wrong_value(rng, value):
    """Something else in the place of a value: near it, or far from it."""
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 2, 1 << 16, -value * 2 or 1, value))
    if type(value) is list and value and rng.random() < 0.7:
        value, at = list(value), rng.randrange(len(value))
        change = rng.randrange(4)
        if change == 0:
            del value[at]
        elif change == 1:
            value.insert(rng.randrange(len(value)), value[at])
        elif change == 2:
            rng.shuffle(value)
        else:
            value.append(rng.choice(WRONG))
        return value
    return copy.deepcopy(rng.choice(WRONG + WORDS))


class Original:
    """An artifact to begin with."""

    def __init__(self, data):
        self.data, self.weights = data, reference_weights(data)
        self.text = json.dumps(unseal(data)[0])

    def opened(self):
        """(header, {stream: packed bytes}), to be changed."""
        return json.loads(self.text), unseal(self.data)[1]


def damaged_file(rng, one):
    """No checksum is made again."""
    return damaged_bytes(rng, one.data)


def damaged_prefix(rng, one):
    magic, version, *numbers = struct.unpack_from("<8sHIII", one.data)
    numbers[rng.randrange(3)] = rng.choice((0, 1, numbers[0] - 1, numbers[1] + 1, 1 << 22, 2**32 - 1))
    version = rng.choice((version, version, 0, 2, 65535))
    return struct.pack("<8sHIII", magic, version, *numbers) + one.data[22:]


def damaged_text(rng, one):
    """The text of the header, under a right checksum."""
    _, streams = one.opened()
    return seal(damaged_bytes(rng, one.text.encode()), b"".join(streams.values()))


def name_twice(rng, one):
    """A field of the header, or a setting, that comes twice in the text."""
    header, streams = one.opened()
    name = rng.choice(list(header))
    value = json.dumps(rng.choice((header[name], rng.choice(WRONG))))
    text = one.text[:-1] + f', "{name}": {value}}}'
    if rng.random() < 0.3:
        text = one.text.replace('"settings": {', f'"settings": {{"NUM_LAYERS": "{rng.randrange(9)}", ')
    return seal(text.encode(), b"".join(streams.values()))


def wrong_header(rng, one):
    """Values anywhere in the header."""
    header, streams = one.opened()
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice(list(places(header)))
        header = replaced(header, path, wrong_value(rng, found_at(header, path)))
    if isinstance(header, dict) and rng.random() < 0.2:
        header[rng.choice(["surprise", "temperature", *header])] = rng.choice(WRONG)
    return seal(header, b"".join(streams.values()))


def wrong_settings(rng, one):
    """Settings of the model, within their bounds and beyond, in a header that is otherwise whole."""
    header, streams = one.opened()
    for _ in range(rng.choice((1, 1, 2, 4))):
        name, value = random_setting(rng)
        header["settings"][name] = value
    if rng.random() < 0.3:
        header["settings"].pop(rng.choice(list(header["settings"])))
    return seal(header, b"".join(streams.values()))


def random_setting(rng):
    """(name, text) of a setting that defines the model."""
    f = rng.choice(tg.model_fields())
    low, high = f.metadata["lo"], f.metadata["hi"]
    texts = ["", "0", "1", "2", "3", "16", "-1", "1e9", "nan", "inf", "true", "9" * 30, "0,0,1", *TEXTS]
    texts += [str(bound + step) for bound in (low, high) if bound is not None for step in (-1, 0, 1)]
    choices = [choice for choice in tg.get_args(f.type) if isinstance(choice, str)]
    return f.name.upper(), rng.choice([*texts, *choices])


def wrong_table(rng, one):
    """Lines of a table left out, repeated with their streams, or exchanged."""
    header, streams = one.opened()
    rows, payload = header["streams"], []
    kind, at, other = rng.randrange(6), rng.randrange(len(rows)), rng.randrange(len(rows))
    if kind == 0:
        rows.insert(other, copy.copy(rows[at]))
    elif kind == 1:
        del rows[at]
    elif kind == 2:
        rows[at], rows[other] = rows[other], rows[at]
    elif kind == 3:
        rows[at][0], rows[other][0] = rows[other][0], rows[at][0]
    elif kind == 4:
        rows[at][1:] = rows[other][1:]
    else:
        tensors = header["tensors"]
        tensors.insert(rng.randrange(len(tensors)), rng.choice(tensors))
    payload = [streams[row[0]] for row in rows]
    return seal(header, b"".join(payload))


def other_compressor(rng, one):
    """The same content packed by another compressor, or said to be."""
    header, streams = one.opened()
    row = rng.choice(header["streams"])
    chosen = rng.choice(("zstd", "lzma", "brotli", "zlib"))
    if row[1] != "rans" and rng.random() < 0.7:
        streams[row[0]] = packed(chosen, unpacked(row[1], streams[row[0]], row[2]))
    row[1] = chosen
    return reseal(header, streams)


def damaged_stream(rng, one):
    """The packed bytes of a stream, under right checksums."""
    header, streams = one.opened()
    row = rng.choice(header["streams"])
    streams[row[0]] = damaged_bytes(rng, streams[row[0]])
    return reseal(header, streams)


def damaged_content(rng, one):
    """The unpacked bytes of a stream, packed again: other weights, some of them not finite."""
    header, streams = one.opened()
    rows = [row for row in header["streams"] if row[1] != "rans"]
    row = rng.choice(rows)
    content = damaged_bytes(rng, unpacked(row[1], streams[row[0]], row[2]))
    if rng.random() < 0.7:
        content = content[: row[2]].ljust(row[2], b"\x01")
    streams[row[0]] = packed(row[1], content)
    row[2] = rng.choice((row[2], row[2], len(content)))
    return reseal(header, streams)


def bomb(rng, one):
    """A stream of a few kilobytes that unpacks to as much as 64 MiB, with and without saying so."""
    header, streams = one.opened()
    row = rng.choice(header["streams"])
    size = rng.choice((row[2] - 1, row[2] + 1, 1 << 20, 1 << 20, 1 << 20, 1 << 26))
    row[1] = rng.choice(("zstd", "lzma", "brotli", "zlib"))
    streams[row[0]] = zeros(row[1], size)
    row[2] = rng.choice((row[2], size, 1 << 30, 1 << 40))
    return reseal(header, streams)


def wrong_codes(rng, one):
    """The head of a stream of the entropy coder, its states or its words, under right checksums."""
    header, streams = one.opened()
    data = bytearray(streams.get("q", one.data))
    at = rng.choice((0, 4, 8, 4 * rng.randrange(2, 12), rng.randrange(0, max(len(data) - 4, 1))))
    value = rng.choice((0, 1, 65535, 65536, 2**31, 2**32 - 1, rng.getrandbits(32)))
    data[at : at + 4] = struct.pack("<I", value)
    streams["q"] = bytes(data)
    return reseal(header, streams)


def wrong_correction(rng, one):
    """Rank and group of corrections, with streams of the size that they ask for, as long as that is small."""
    header, streams = one.opened()
    matrices = [row for row in header["tensors"] if row[2] != "float16"] or header["tensors"]
    for row in rng.sample(matrices, min(len(matrices), rng.choice((1, 1, 3)))):
        row[4] = rng.choice((0, 1, 2, 3, min(row[1], default=1), 255, 256, 257, 2**20, -1))
        row[5] = rng.choice((0, 1, 5, 64, 2**16, 2**16 + 1, 2**29, 2**30, 2**33, 2**63, -1))
    with contextlib.suppress(ValueError, ZeroDivisionError, IndexError):
        kept = {row[0]: row for row in header["streams"]}
        header["streams"] = table_of_streams(header["tensors"])
        for row in header["streams"]:
            same = kept.get(row[0])
            if same and same[2] == row[2]:
                row[1] = same[1]
            else:
                row[1] = "zlib"
                content = rng.choice((bytes, rng.randbytes))(min(max(row[2], 0), 1 << 16))
                streams[row[0]] = packed("zlib", content)
        return reseal(header, streams)
    return seal(header, b"".join(streams.values()))


def of_another_model(rng, one):
    """A whole artifact of zeros of other settings, of up to gigabytes of weights: it contradicts nothing."""
    words = dict(MODEL_DIM="32", NUM_HEADS="2", NUM_KV_HEADS="1", NUM_LAYERS="2", XSA_LAST_N="1",
                 ROPE_DIMS="4", VE_DIM="0", BIGRAM_VOCAB_SIZE="16", BIGRAM_DIM="4")
    words |= dict(random_setting(rng) for _ in range(rng.choice((0, 1, 1, 2))))
    if rng.random() < 0.2:
        rows, width = 2 ** rng.randrange(10, 25), rng.randrange(1, 200)
        words |= dict(BIGRAM_VOCAB_SIZE=str(rows), BIGRAM_DIM=str(width))
    codec = rng.choice(("int", "mixed", "grid", "wide", "float16"))
    chosen = rng.choice(("zstd", "lzma", "brotli", "zlib"))
    rank = rng.choice((0, 0, 2))
    most = 1 << rng.choice((16, 16, 16, 16, 27)) if chosen == "zstd" else 1 << 16
    try:
        return of_zeros([f"{name}={value}" for name, value in words.items()], codec, chosen, rank, 64, most)
    except (tg.BadInput, ValueError):  # no model has such settings; the header may say so all the same
        header, streams = one.opened()
        header["settings"] |= words
        return seal(header, b"".join(streams.values()))


def spliced(rng, one, others):
    """The header of one artifact before the streams of another."""
    header, _ = one.opened()
    _, streams = rng.choice(others).opened()
    return seal(header, b"".join(streams.values()))


KINDS = [damaged_file, damaged_prefix, damaged_text, name_twice, wrong_header, wrong_settings, wrong_table,
         other_compressor, damaged_stream, damaged_content, bomb, wrong_codes, wrong_correction,
         of_another_model, spliced]
UNSEALED = (damaged_file, damaged_prefix)  # what they make is the file before, or refused


class Artifacts:
    """Damaged artifacts, and what becomes of them."""

    def __init__(self, folder):
        self.path = Path(folder) / "damaged.pg"
        self.originals = [Original(save(self.path, changes)) for changes in ORIGINALS.values()]

    def damage(self, rng):
        """(kind of damage, original, bytes)"""
        kind, one = rng.choice(KINDS), rng.choice(self.originals)
        data = spliced(rng, one, self.originals) if kind is spliced else kind(rng, one)
        return kind, one, data

    def offer(self, case):
        """"refused" or "good"; AssertionError, or whatever the loader raises, if it is neither."""
        kind, one, data = case
        self.path.write_bytes(data)
        try:
            s, model = tg.load_artifact(self.path)
        except tg.BadInput as error:
            check_line(error, self.path)
            return "refused"
        weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
        expected = one.weights if kind in UNSEALED else reference_weights(data)
        assert list(weights) == list(expected), "other tensors"
        for name, weight in weights.items():
            assert np.isfinite(weight).all(), f"{name} is not finite"
            assert np.array_equal(weight, expected[name]), f"{name} is not what the file holds"
        for name, text in unseal(data)[0]["settings"].items():
            f = tg.Settings.__dataclass_fields__[name.lower()]
            assert getattr(s, f.name) == tg.parse_value(f, text), f"{name} is not that of the file"
        return "good"

    def describe(self, case):
        return f"{case[0].__name__} of {list(ORIGINALS)[self.originals.index(case[1])]!r}"


TENSORS = [  # what may be wrong with one
    lambda t: t[:0], lambda t: t[None], lambda t: t.flatten()[: t.numel() // 2], lambda t: torch.zeros(1),
    lambda t: torch.zeros(1).expand(2**20, 2**20), lambda t: t.double(), lambda t: t.half(),
    lambda t: t.bool(), lambda t: t.to(torch.complex64), lambda t: t.to_sparse(), lambda t: t.to("meta"),
    lambda t: torch.nn.Parameter(t.float()), lambda t: t.float() * math.nan, lambda t: t.float() + math.inf,
    lambda t: t + 1, lambda t: t - 1, lambda t: t * 0, lambda t: t.flatten().flip(0).view(t.shape),
    lambda t: t.mT.contiguous().mT if t.ndim == 2 else t.clone()]


def wrong_tensor(rng, tensor):
    return rng.choice(TENSORS)(tensor)


def wrong_state(rng, state):
    """Values in some places of a checkpoint's state. Half of the time in the small fields, which are few."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        top = rng.choice(["weights", "optimizer", "average", *4 * [name for name in state]])
        if top not in state:
            continue
        path = rng.choice(list(places(state[top], (top,))))
        value = found_at(state, path)
        kind = rng.random()
        if isinstance(value, torch.Tensor) and kind < 0.8:
            state = replaced(state, path, wrong_tensor(rng, value))
        elif kind < 0.15 and isinstance(found_at(state, path[:-1]), dict):
            del found_at(state, path[:-1])[path[-1]]
        elif kind < 0.3 and isinstance(value, dict):
            value[rng.choice(["other", 5, "step", ("a",)])] = rng.choice(WRONG)
        else:
            state = replaced(state, path, wrong_value(rng, value))
    return saved(state)


def exchanged(rng, state):
    """Two values of a state change places."""
    paths = [path for path in places(state) if path]
    first, second = rng.sample(paths, 2)
    if first[: len(second)] != second and second[: len(first)] != first:
        a, b = found_at(state, first), found_at(state, second)
        state = replaced(replaced(state, first, b), second, a)
    return saved(state)


def damaged_pickle(rng, state):
    """The pickle, or another record, of the file of torch.save, in an archive that is whole."""
    name = rng.choice(("data.pkl", "data.pkl", "data.pkl", "version", "byteorder", "data/0"))
    return rezipped(saved(state), lambda one, data: damaged_bytes(rng, data) if one.endswith(name) else data)


def hostile_pickle(rng, state):
    """Pickles that want memory, depth or a function, and archives that want memory."""
    pickles = [b"\x80\x02cbuiltins\nbytearray\nK\x01\x85R.".replace(b"K\x01", b"\x8a\x05\0\0\0\0\x04"),
               b"\x80\x02" + b"(l" * 100_000 + b".", b"\x80\x02" + b"]" + b"]q\0h\0h\0\x87" * 5000 + b".",
               b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.", b"\x80\x02}.", b"\x80\x02N.", b".", b""]
    if rng.random() < 0.2:
        return rezipped(saved(state), lambda one, data: data, zipfile.ZIP_DEFLATED)
    if rng.random() < 0.2:
        big = lambda one, data: bytes(1 << 24) if one.endswith("data/0") else data
        return rezipped(saved(state), big, zipfile.ZIP_DEFLATED)
    chosen = rng.choice(pickles)
    return rezipped(saved(state), lambda one, data: chosen if one.endswith("data.pkl") else data)


def damaged_archive(rng, state):
    return damaged_bytes(rng, saved(state))


def something_else(rng, state):
    return saved(rng.choice([*WRONG, torch.zeros(3), [state], {"state": state}, tuple(state.values())]))


def same(a, b):
    """Are two states equal, to the bit and the type?"""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


STATE_KINDS = [*5 * [wrong_state], exchanged, damaged_pickle, damaged_pickle, hostile_pickle, damaged_archive,
               something_else]


class Trainee:
    """A training that has not begun, to which checkpoints are offered. `args`: of the run that wrote one."""

    def __init__(self, args, out_dir):
        s = tg.Settings.parse([*args, f"OUT_DIR={out_dir}"])
        rt = tg.Runtime(s, {})
        with contextlib.redirect_stdout(io.StringIO()):
            self.run = tg.Run(tg.replace(s, resume="auto"), rt, Path(out_dir), tg.attend_sdpa)
            self.training = tg.Training(self.run, tg.GPT(s, rt.dtype))
        documents = [[tg.BOS, *range(first, first + 70)] for first in range(2, 10)]
        self.training.stream.copies = tg.Contamination(np.concatenate(documents))
        self.fresh = self.state()

    def state(self):
        """What loading may change; seconds go on."""
        return {name: value for name, value in self.training.state().items() if name != "seconds"}

    def offer(self, path):
        """The state that a run with RESUME=path would go on from; BadInput where it would not."""
        self.run.s = tg.replace(self.run.s, resume=str(path))
        return tg.checkpoint_to_resume(self.run, self.training)

    def begin_again(self):
        self.training.load({**self.fresh, "seconds": {}})
        self.training.stream.copies.met[:] = False
        self.run.validity.reasons.clear()


class Checkpoints:
    """Damaged checkpoints, and what becomes of them."""

    def __init__(self, folder, args, path):
        self.path, self.trainee = Path(folder) / "damaged.pt", Trainee(args, Path(folder) / "trainee")
        self.state = torch.load(io.BytesIO(Path(path).read_bytes()[19:-32]), weights_only=True)
        keys = self.trainee.training.stream.copies.keys[[3, 5]]
        self.state |= {"reasons": ["C3: one", "C1: another"], "copies": torch.from_numpy(keys.view(np.int64))}

    def damage(self, rng):
        kind = rng.choice(STATE_KINDS)
        return kind, sealed_checkpoint(kind(rng, copy.deepcopy(self.state)))

    def offer(self, case):
        trainee, (_, data) = self.trainee, case
        self.path.write_bytes(data)
        try:
            state = trainee.offer(self.path)
        except tg.BadInput as error:
            check_line(error, self.path)
            assert same(trainee.state(), trainee.fresh), "a refused checkpoint has changed the training"
            return "refused"
        trainee.training.load(state)
        now = trainee.state()
        trainee.begin_again()
        # The data and settings at their default may be missing; some bytes of the generator mean nothing.
        expected = {name: state.get(name, now[name]) for name in now}
        expected["settings"] = {**now["settings"], **state["settings"]}
        expected["reasons"] = list(dict.fromkeys(expected["reasons"]))
        keys = expected["copies"].numpy().view(np.uint64)  # of documents; those of another text mean nothing here
        keys = np.intersect1d(keys, trainee.training.stream.copies.keys)
        expected["copies"] = torch.from_numpy(keys.view(np.int64))
        expected["rng"] = torch.Generator().set_state(state["rng"]).get_state()
        assert same(now, expected), "the training is not what the file says"
        return "good"

    def describe(self, case):
        return case[0].__name__


def check_line(error, path):
    line = str(error)
    assert str(path) in line, f"does not name the file: {line[:400]!r}"
    line = line.replace(str(path), "FILE")
    assert len(line) <= LONGEST_LINE and line.isprintable(), f"not one printable line: {line[:400]!r}"


class Late(BaseException):
    """A file took too long."""


def late(*_):
    raise Late(f"took more than {SECONDS} s")


def offer_in_time(cases, case):
    """cases.offer(case), within SECONDS of processor time: what others do on this machine does not count.
    A warning is one line too many.
    """
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return cases.offer(case)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def work(cases, seed, numbers, at):
    """Offer the damaged files of these numbers; a report. `at`: where the number is noted before each."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    signal.signal(signal.SIGPROF, late)
    outcomes, failures, slowest = Counter(), [], 0.0
    for number in numbers:
        at[:8] = struct.pack("<q", number)
        case = cases.damage(random.Random(f"{seed} {number}"))
        began = time.process_time()
        try:
            outcome = offer_in_time(cases, case)
        except (Exception, Late) as error:
            outcome = "failed"
            where = traceback.extract_tb(error.__traceback__)[-1]
            failures.append(f"seed {seed} number {number}: {cases.describe(case)}: {type(error).__name__}: "
                            f"{str(error)[:300]} ({Path(where.filename).name}:{where.lineno})")
        outcomes[f"{case[0].__name__} {outcome}"] += 1
        slowest = max(slowest, time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return {"outcomes": outcomes, "failures": failures, "slowest_seconds": slowest, "peak_mib": peak}


def fuzz(cases, seed, numbers):
    """The report of a worker process on the files of these numbers; one that dies is a failure, too."""
    at, (read, write) = mmap.mmap(-1, 8), os.pipe()
    sys.stdout.flush()
    worker = os.fork()
    if not worker:
        os.close(read)
        try:
            with os.fdopen(write, "w") as pipe:
                json.dump(work(cases, seed, numbers, at), pipe)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(worker, 0)
    if not text:
        number = struct.unpack("<q", at[:8])[0]
        died = f"seed {seed} number {number}: the worker died (status {status})"
        return {"outcomes": {}, "failures": [died]}
    return json.loads(text)


def small_run(folder):
    """(arguments, checkpoint) of a short run on made-up text that has all that a checkpoint may hold."""
    import training

    data = training.text(Path(folder) / "data")
    words = dict(**data, average="best", holdout_tokens=40, swa_every=2, swa_start_scale=1, lawa_freq=2,
                 lawa_k=2, complement_alpha=0.5, normuon=True, late_qat_threshold=0.9, iterations=6,
                 num_layers=1, num_loops=1, loop_start=0, loop_end=0, ve_dim=0, bigram_vocab_size=0)
    s = ref.small(**words)
    with contextlib.redirect_stdout(io.StringIO()):
        rt = tg.Runtime(s, {})
        run, state = training.begun(s, rt, Path(folder) / "run")
        state.average.start()
        for step in range(5):
            state.enter(step / 6, 0.5)
            tg._train_step(run, state, step / 6, 0.5)
        state.save()
    return s.text().split(), tg.checkpoints(run.out_dir)[0]


def arguments(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=("artifacts", "checkpoints"), help="kind of the files that are damaged")
    parser.add_argument("--count", type=int, default=1000, help="number of damaged files (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="what is damaged, and how (default: 1)")
    parser.add_argument("--only", type=int, help="the file of this number alone (default: all)")
    return parser.parse_args(argv)


def main(argv):
    options = arguments(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "artifacts":
            cases = Artifacts(folder)
        else:
            cases = Checkpoints(folder, *small_run(folder))
        began = time.monotonic()
        numbers = range(options.count) if options.only is None else [options.only]
        report = fuzz(cases, options.seed, numbers)
    report["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(report, indent=1))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
