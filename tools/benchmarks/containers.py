"""Measures what a container, a codec's output in a file layout under a compressor, costs in bytes, time and memory."""

import io
import itertools
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

import train_gpt as trainer
from benchmarks.harness import usage

GENERIC = ("brotli", "zstd", "lzma", "zlib")
PLAIN = ("rans", *GENERIC)


class Container(NamedTuple):
    """A way to store encoded weights, and to get them back: as the artifact of train_gpt.py does, whose streams may be
    laid out in other ways; or as the contest's records do, by torch.save, all of it or what is beside streams of codes.
    """

    streams: str = ""  # compressor of each stream
    kinds: bool = False  # a stream of codes for each kind of matrix
    columns: bool = False  # the codes of each matrix column by column
    saved: str = ""  # compressor of what torch.save makes
    stride: int = 1  # of its bytes, that are shuffled before


CONTAINERS = {compressor: Container(compressor) for compressor in PLAIN}
for compressor in GENERIC:
    CONTAINERS |= {
        f"{compressor} columns": Container(compressor, columns=True),
        f"{compressor} kinds": Container(compressor, kinds=True),
        f"{compressor} kinds columns": Container(compressor, kinds=True, columns=True),
    }
for compressor in ("zstd", "lzma", "brotli"):
    CONTAINERS |= {
        f"torch.save {compressor}": Container(saved=compressor),
        f"torch.save {compressor} shuffle 2": Container(saved=compressor, stride=2),
        f"torch.save {compressor} shuffle 4": Container(saved=compressor, stride=4),
    }
# #1855: ZPAQ on the codes of each kind of matrix, column by column, brotli on the rest; without its sorting of rows.
CONTAINERS["lrzip kinds columns"] = Container("lrzip", kinds=True, columns=True, saved="brotli")
CONTAINERS["lrzip"] = Container("lrzip", saved="brotli")


class Contents(NamedTuple):
    """What a container holds."""

    encoded: dict  # {parameter: Encoded of the trainer}
    shapes: dict  # {parameter: shape}
    header: dict

    def weights(self, arrays=None):
        """{parameter: weight}, from the arrays {parameter: {part: array}} of another copy where they are given."""
        weights = {}
        for name, parameter in self.encoded.items():
            if arrays:
                parameter = parameter._replace(arrays=arrays[name])
            weights[name] = parameter.decode(self.shapes[name])
        return weights


# ---- streams --------------------------------------------------------------------------------------------------------


def artifact(contents, compressor):
    """The artifact of train_gpt.py: [(stream, bytes)]."""
    settings = trainer.Settings(compressor=compressor)
    chunks = trainer.pack(contents.encoded, contents.shapes, settings, contents.header).buffers
    streams = trainer.stream_layout(trainer.tensor_entries(contents.encoded, contents.shapes))
    return list(zip(("header", "header", *streams), chunks, strict=True))


def streams_of(contents, container):
    """[(stream, its StreamArrays)] as the artifact has them, or of the container's kinds; of the codes alone where
    torch.save has the rest.
    """
    def kind(row):
        return trainer._kind(row.tensor)

    streams = trainer.stream_layout(trainer.tensor_entries(contents.encoded, contents.shapes))
    if container.saved:
        streams = {stream: sorted(rows, key=kind) for stream, rows in streams.items() if stream == "q"}
    for stream, rows in streams.items():
        if container.kinds and stream in trainer.CODED:
            for _, group in itertools.groupby(rows, kind):
                yield stream, list(group)
        else:
            yield stream, rows


def turned(arrays, back=False):
    """Arrays of a parameter whose codes lie column by column, in the same shape; `back` undoes that."""
    if "q" not in arrays:
        return arrays
    q = arrays["q"]
    order = q.view(q.size(1), q.size(0)) if back else q
    return arrays | {"q": order.mT.contiguous().view(q.shape)}


def lrzip(data, *options):
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        source = Path(folder, "in.lrz")
        target = Path(folder, "out")
        source.write_bytes(data)
        command = ["lrzip", "-q", "-f", *options, "-o", target, source]
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
        return target.read_bytes()


def with_lrzip():
    """A context in which the trainer packs streams with lrzip, too.

    -T: what LZ4 cannot shrink is not left as it is; -p 1: the same bytes on any number of cores.
    """
    compressor = trainer.Compressor(lambda data: lrzip(data, "-z", "-L", "9", "-T", "-p", "1"),
                                    lambda data, most: lrzip(data, "-d"))
    return mock.patch.dict(trainer.COMPRESSORS, lrzip=compressor)


# ---- what torch.save makes ------------------------------------------------------------------------------------------


def saved(contents, skip):
    """What the reference systems store: torch.save of {"w": {name.q, name.scale, ...}, "m": {name: how}}, without the
    parts to skip.
    """
    stored = {}
    codecs = {}
    for name, parameter in contents.encoded.items():
        codecs[name] = "passthrough" if parameter.codec == "float16" else list(parameter[:4])
        stored |= {f"{name}.{part}": value for part, value in parameter.arrays.items() if part not in skip}
    buffer = io.BytesIO()
    torch.save({"w": stored, "m": codecs}, buffer)
    return buffer.getvalue()


def shuffled(data, stride):
    """Every stride-th byte, then the ones after those, ...: bytes of one significance lie together (#1089)."""
    return b"".join(data[first::stride] for first in range(stride))


def unshuffled(data, stride):
    values = bytearray(len(data))
    begin = 0
    for first in range(stride):
        end = begin + len(range(first, len(data), stride))
        values[first::stride] = data[begin:end]
        begin = end
    return bytes(values)


# ---- pack and unpack ------------------------------------------------------------------------------------------------


def pack(contents, container):
    """[(part, bytes)]"""
    encoded = contents.encoded
    if container == Container(container.streams):
        return artifact(contents, container.streams)
    if container.saved:
        data = saved(contents, skip=("q",) if container.streams else ())
        compress = trainer.COMPRESSORS[container.saved].compress
        head = [("size", len(data).to_bytes(4, "little")), ("saved", compress(shuffled(data, container.stride)))]
    else:  # the header of the artifact, of which only the sizes in it would be others
        zeros = {name: one._replace(arrays={part: value * 0 for part, value in one.arrays.items()})
                 for name, one in encoded.items()}
        head = artifact(contents._replace(encoded=zeros), "zlib")[:2]
    if not container.streams:
        return head
    if container.columns:
        encoded = {name: one._replace(arrays=turned(one.arrays)) for name, one in encoded.items()}
    return head + [(stream, trainer.pack_stream(rows, encoded, container.streams))
                   for stream, rows in streams_of(contents, container)]


def unpack(contents, container, chunks):
    """The arrays {parameter: {part: array}} in what pack() gave."""
    arrays = {name: {} for name in contents.encoded}
    (_, size), (_, data), *streams = chunks
    if container.saved:
        data = trainer.decompress(container.saved, data, int.from_bytes(size, "little"), "saved")
        stored = torch.load(io.BytesIO(unshuffled(data, container.stride)), weights_only=True)["w"]
        for place, value in stored.items():
            name, _, part = place.rpartition(".")
            arrays[name][part] = value
    if not container.streams:
        return arrays
    for (stream, rows), (_, data) in zip(streams_of(contents, container), streams, strict=True):
        (compressor,) = trainer.candidate_compressors(stream, container.streams)
        packed = trainer.PackedStream(compressor, data, sum(row.bytes for row in rows))
        values = torch.tensor(trainer._unpack_stream(stream, rows, packed))
        for row, array in zip(rows, values.split([row.count for row in rows])):
            arrays[row.tensor][stream] = array.view(row.shape)
    if container.columns:
        arrays = {name: turned(parts, back=True) for name, parts in arrays.items()}
    return arrays


def measure_container(job):
    """The job of a row: pack and unpack contents."""
    container = CONTAINERS[job["container"]]
    contents = job["contents"]
    marks = [(*usage(), time.perf_counter())]
    with with_lrzip():
        chunks = pack(contents, container)
        marks.append((*usage(), time.perf_counter()))
        unpacked = contents.weights(unpack(contents, container, chunks))
        marks.append((*usage(), time.perf_counter()))
    if not all(torch.equal(unpacked[name], weight) for name, weight in contents.weights().items()):
        return {"error": "what was unpacked is not what was packed"}
    code_sizes = [len(data) for part, data in chunks if part in trainer.CODED]
    (begin_cpu, packed_cpu, unpacked_cpu), memory, (begin, packed, unpacked) = zip(*marks)
    return {
        "bytes": sum(len(data) for _, data in chunks),
        "code_bytes": sum(code_sizes) if code_sizes else None,
        "pack_seconds": packed_cpu - begin_cpu,
        "unpack_seconds": unpacked_cpu - packed_cpu,
        "pack_wall_seconds": packed - begin,
        "unpack_wall_seconds": unpacked - packed,
        **dict(zip(("memory_before_mib", "pack_memory_mib", "unpack_memory_mib"), memory, strict=True)),
    }
