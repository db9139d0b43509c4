"""Measures what a container, a codec's output in a file layout under a compressor, costs in bytes, time and memory."""

import io
import itertools
import math
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.harness import usage
from common import load_trainer

GENERIC = ("brotli", "zstd", "lzma", "zlib")
PLAIN = ("rans", *GENERIC)


class Contents(NamedTuple):
    """What a container holds."""

    encoded: dict  # {parameter: Encoded of the trainer}
    shapes: dict  # {parameter: shape}
    header: dict


def decoded(contents, encoded):
    """{parameter: weight}"""
    return {name: parameter.decode(contents.shapes[name]) for name, parameter in encoded.items()}


# ---- the artifact of train_gpt.py, and its streams in other layouts -------------------------------------------------


def own_chunks(trainer, contents, compressor):
    """The artifact of train_gpt.py: [(stream, bytes)]."""
    settings = trainer.Settings(compressor=compressor)
    chunks = trainer.pack(contents.encoded, contents.shapes, settings, contents.header).buffers
    streams = trainer.stream_layout(trainer.tensor_entries(contents.encoded, contents.shapes))
    return list(zip(("header", "header", *streams), chunks, strict=True))


def split_streams(trainer, contents, kinds):
    """[(stream, its rows)] as the artifact has them; with `kinds` a stream of codes for each kind of matrix."""
    for stream, rows in trainer.stream_layout(trainer.tensor_entries(contents.encoded, contents.shapes)).items():
        if kinds and stream in trainer.CODED:
            for _, rows_of_kind in itertools.groupby(rows, lambda row: trainer._kind(row[0])):
                yield stream, list(rows_of_kind)
        else:
            yield stream, rows


def layout_chunks(trainer, contents, compressor, kinds, columns):
    """The artifact's streams in another layout: `columns` has the codes of each matrix column by column, `kinds` a
    stream of codes for each kind of matrix.
    """
    encoded = contents.encoded
    if columns:
        encoded = {name: turned(parameter) for name, parameter in encoded.items()}
    zeros = {}
    for name, parameter in contents.encoded.items():
        zeros[name] = parameter._replace(arrays={part: value * 0 for part, value in parameter.arrays.items()})
    header = own_chunks(trainer, contents._replace(encoded=zeros), "zlib")[:2]
    streams = [(stream, trainer.pack_stream(rows, encoded, compressor))
               for stream, rows in split_streams(trainer, contents, kinds)]
    return header + streams


def turned(parameter, back=False):
    """A parameter whose codes lie column by column, in the same shape; `back` undoes that."""
    if "q" not in parameter.arrays:
        return parameter
    q = parameter.arrays["q"]
    order = q.view(q.size(1), q.size(0)) if back else q
    codes = order.mT.contiguous().view(q.shape)
    return parameter._replace(arrays=parameter.arrays | {"q": codes})


def layout_weights(trainer, contents, chunks, compressor, kinds=False, columns=False):
    """The weights that an artifact in any layout holds."""
    import torch

    parts = {name: {} for name in contents.shapes}
    streams = split_streams(trainer, contents, kinds)
    for (stream, rows), (_, data) in zip(streams, chunks[2:], strict=True):
        values = stream_values(trainer, stream, rows, data, compressor)
        ends = np.cumsum([math.prod(shape) for *_, shape in rows])
        for (name, part, _, shape), array in zip(rows, np.split(values, ends[:-1]), strict=True):
            parts[name][part] = torch.from_numpy(array.copy()).view(shape)
    encoded = {name: parameter._replace(arrays=parts[name]) for name, parameter in contents.encoded.items()}
    if columns:
        encoded = {name: turned(parameter, back=True) for name, parameter in encoded.items()}
    return decoded(contents, encoded)


def stream_values(trainer, stream, rows, data, compressor):
    """The numbers of one stream, one row after the other."""
    if compressor == "rans" and stream in trainer.CODED:
        groups = trainer.decode_codes(data, trainer.code_groups(rows), stream)
        return np.concatenate([group.ravel() for group in groups])
    size = sum(np.dtype(dtype).itemsize * math.prod(shape) for _, _, dtype, shape in rows)
    raw = trainer.decompress("lzma" if compressor == "rans" else compressor, data, size, stream)
    return trainer._unplanes(raw, rows[0][2])


# ---- what the contest's records store -------------------------------------------------------------------------------


def pickled(encoded, skip=()):
    """What the reference systems store: torch.save of {"w": {name.q, name.scale, ...}, "m": {name: how}}."""
    import torch

    stored = {}
    codecs = {}
    for name, parameter in encoded.items():
        codecs[name] = "passthrough" if parameter.codec == "float16" else list(parameter[:4])
        for part, value in parameter.arrays.items():
            if part not in skip:
                stored[f"{name}.{part}"] = value
    buffer = io.BytesIO()
    torch.save({"w": stored, "m": codecs}, buffer)
    return buffer.getvalue()


def unpickled(contents, data, skipped=()):
    """The weights in what pickled() gave; `skipped`: the parts that it left out."""
    import torch

    stored = torch.load(io.BytesIO(data), weights_only=True)["w"] | dict(skipped)
    encoded = {}
    for name, parameter in contents.encoded.items():
        parts = {part: stored[f"{name}.{part}"] for part in parameter.arrays}
        encoded[name] = parameter._replace(arrays=parts)
    return decoded(contents, encoded)


def shuffled(data, stride):
    """Every stride-th byte, then the ones after those, ...: bytes of one significance lie together (#1089)."""
    return b"".join(data[first::stride] for first in range(stride))


def unshuffled(data, stride):
    values = np.empty(len(data), np.uint8)
    lengths = [-(-(len(data) - first) // stride) for first in range(stride)]
    parts = np.split(np.frombuffer(data, np.uint8), np.cumsum(lengths)[:-1])
    for first, part in enumerate(parts):
        values[first::stride] = part
    return values.tobytes()


def reference_chunks(trainer, contents, compressor, stride):
    data = pickled(contents.encoded)
    compress, _ = trainer.COMPRESSORS[compressor]
    return [("size", len(data).to_bytes(4, "little")), ("all", compress(shuffled(data, stride)))]


def reference_weights(trainer, contents, chunks, compressor, stride):
    (_, size), (_, data) = chunks
    data = trainer.decompress(compressor, data, int.from_bytes(size, "little"), "all")
    return unpickled(contents, unshuffled(data, stride))


# ---- lrzip ----------------------------------------------------------------------------------------------------------


def lrzip(data, *options):
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        source = Path(folder, "in.lrz")
        target = Path(folder, "out")
        source.write_bytes(data)
        command = ["lrzip", "-q", "-f", *options, "-o", target, source]
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
        return target.read_bytes()


def names_by_kind(trainer, encoded):
    """Parameters that have codes: a list of names for each kind of matrix."""
    names = sorted((name for name, parameter in encoded.items() if "q" in parameter.arrays), key=trainer._kind)
    return [list(group) for _, group in itertools.groupby(names, trainer._kind)]


def lrzip_groups(trainer, encoded, kinds):
    """Parameters whose codes are one file: those of a kind, or all."""
    by_kind = names_by_kind(trainer, encoded)
    return by_kind if kinds else [list(itertools.chain(*by_kind))]


def lrzip_chunks(trainer, contents, kinds):
    """#1855: ZPAQ on the codes of each kind of matrix, column by column, brotli on the rest; without its sorting of
    rows. Not `kinds`: on all codes in one file, row by row.

    -T: what LZ4 cannot shrink is not left as it is; -p 1: the same bytes on any number of cores.
    """
    rest = pickled(contents.encoded, skip=("q",))
    compress, _ = trainer.COMPRESSORS["brotli"]
    chunks = [("size", len(rest).to_bytes(4, "little")), ("rest", compress(rest))]
    for names in lrzip_groups(trainer, contents.encoded, kinds):
        codes = [contents.encoded[name].arrays["q"] for name in names]
        if kinds:
            codes = [q.mT.contiguous() for q in codes]
        data = b"".join(q.numpy().tobytes() for q in codes)
        chunks.append(("q", lrzip(data, "-z", "-L", "9", "-T", "-p", "1")))
    return chunks


def lrzip_weights(trainer, contents, chunks, kinds):
    import torch

    (_, size), (_, rest), *groups = chunks
    codes = {}
    for names, (_, data) in zip(lrzip_groups(trainer, contents.encoded, kinds), groups, strict=True):
        values = torch.frombuffer(bytearray(lrzip(data, "-d")), dtype=torch.int8)
        begin = 0
        for name in names:
            rows, columns = contents.encoded[name].arrays["q"].shape
            end = begin + rows * columns
            part = values[begin:end]
            codes[f"{name}.q"] = part.view(columns, rows).mT.contiguous() if kinds else part.view(rows, columns)
            begin = end
    data = trainer.decompress("brotli", rest, int.from_bytes(size, "little"), "rest")
    return unpickled(contents, data, codes)


# ---- all of them ----------------------------------------------------------------------------------------------------


class Container(NamedTuple):
    """A way to store encoded weights, and to get them back."""

    pack: object  # pack(trainer, contents) -> [(part, bytes)]
    unpack: object  # unpack(trainer, contents, what pack() gave) -> {parameter: weight}


def containers():
    """{name: Container}"""
    by_name = {}
    for compressor in PLAIN:
        options = {"compressor": compressor}
        by_name[compressor] = Container(partial(own_chunks, **options), partial(layout_weights, **options))
    for compressor in GENERIC:
        for suffix, kinds, columns in ((" columns", False, True), (" kinds", True, False),
                                       (" kinds columns", True, True)):
            options = {"compressor": compressor, "kinds": kinds, "columns": columns}
            by_name[compressor + suffix] = Container(partial(layout_chunks, **options),
                                                     partial(layout_weights, **options))
    for compressor in ("zstd", "lzma", "brotli"):
        for suffix, stride in (("", 1), (" shuffle 2", 2), (" shuffle 4", 4)):
            options = {"compressor": compressor, "stride": stride}
            by_name[f"torch.save {compressor}{suffix}"] = Container(partial(reference_chunks, **options),
                                                                    partial(reference_weights, **options))
    for name, kinds in (("lrzip kinds columns", True), ("lrzip", False)):
        by_name[name] = Container(partial(lrzip_chunks, kinds=kinds), partial(lrzip_weights, kinds=kinds))
    return by_name


CONTAINERS = containers()


def save_contents(contents, path):
    """Write what measure_container() reads."""
    import torch

    encoded = {name: tuple(parameter) for name, parameter in contents.encoded.items()}
    torch.save(contents._replace(encoded=encoded)._asdict(), path)


def load_contents(trainer, path):
    import torch

    stored = torch.load(path, weights_only=True)
    encoded = {name: trainer.Encoded(*fields) for name, fields in stored["encoded"].items()}
    return Contents(**stored | {"encoded": encoded})


def measure_container(job):
    """The job of a row: pack and unpack stored contents."""
    import torch

    trainer = load_trainer()
    container = CONTAINERS[job["container"]]
    contents = load_contents(trainer, job["contents"])
    begin_cpu, begin_memory = usage()
    begin_wall = time.perf_counter()
    chunks = container.pack(trainer, contents)
    packed_cpu, packed_memory = usage()
    packed_wall = time.perf_counter()
    unpacked = container.unpack(trainer, contents, chunks)
    unpacked_cpu, unpacked_memory = usage()
    unpacked_wall = time.perf_counter()
    expected = decoded(contents, contents.encoded)
    if not all(torch.equal(unpacked[name], weight) for name, weight in expected.items()):
        return {"error": "what was unpacked is not what was packed"}
    code_sizes = [len(data) for part, data in chunks if part in trainer.CODED]
    return {
        "bytes": sum(len(data) for _, data in chunks),
        "code_bytes": sum(code_sizes) if code_sizes else None,
        "pack_seconds": packed_cpu - begin_cpu,
        "unpack_seconds": unpacked_cpu - packed_cpu,
        "pack_wall_seconds": packed_wall - begin_wall,
        "unpack_wall_seconds": unpacked_wall - packed_wall,
        "memory_before_mib": begin_memory,
        "pack_memory_mib": packed_memory,
        "unpack_memory_mib": unpacked_memory,
    }
