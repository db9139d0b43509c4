"""Artifacts and checkpoints read and written by hand, from the description of their formats.

Of train_gpt.py it uses the entropy coder alone, and `of_zeros` its settings and the names of its parameters.
"""

import hashlib
import io
import json
import lzma
import math
import struct
import zipfile
import zlib
from functools import cache
from itertools import groupby

import numpy as np
import torch

import train_gpt as tg

# The container: magic, version, lengths and checksum of the header, header (zlib, JSON), streams.


def unseal(data):
    """(header, {stream: packed bytes}) of a whole artifact."""
    _, _, packed, _, _ = struct.unpack_from("<8sHIII", data)
    header, at, streams = json.loads(zlib.decompress(data[22 : 22 + packed])), 22 + packed, {}
    for stream, _, _, length, _ in header["streams"]:
        streams[stream] = data[at : at + length]
        at += length
    return header, streams


def seal(header, payload):
    """A container whose header's checksum is right. `header`: an object, or the text of one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = zlib.compress(text, 1)
    prefix = struct.pack("<8sHIII", b"PGOLF\r\n\x1a", 1, len(body), len(text), zlib.crc32(body))
    return prefix + body + payload


def reseal(header, streams):
    """The same with lengths and checksums of the streams as they are now."""
    for row in header["streams"]:
        row[3:] = [len(streams[row[0]]), zlib.crc32(streams[row[0]])]
    return seal(header, b"".join(streams[row[0]] for row in header["streams"]))


def packer(name):
    """(function of a piece, function of the end) of a compressor, at little effort."""
    if name == "brotli":
        import brotli

        made = brotli.Compressor(quality=1)
        return made.process, made.finish
    if name == "zstd":
        import zstandard

        made = zstandard.ZstdCompressor(level=3).compressobj()
    elif name == "lzma":
        made = lzma.LZMACompressor(check=lzma.CHECK_NONE, preset=0)
    else:
        made = zlib.compressobj(6)
    return made.compress, made.flush


def packed(name, data):
    piece, end = packer(name)
    return piece(data) + end()


def zeros(name, size):
    """`size` bytes of zeros packed, made piece by piece: a bomb, if they are many."""
    piece, end = packer(name)
    pieces = [piece(bytes(min(1 << 20, size - at))) for at in range(0, size, 1 << 20)]
    return b"".join([*pieces, end()])


def unpacked(name, data, size):
    """The first `size` bytes."""
    if name == "zstd":
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(data).read(size)
    if name == "brotli":
        import brotli

        return brotli.Decompressor().process(data, output_buffer_limit=size)[:size]
    if name == "lzma":
        return lzma.LZMADecompressor().decompress(data, max_length=size)
    return zlib.decompressobj().decompress(data, size)


# What the format's description says of tensors; no code of train_gpt.py but that of the entropy coder.

CODED = ("q", "over")  # streams of whole matrices, in which equal kinds of matrix lie together


def parts_of(shape, codec, rank, group):
    """{part: (dtype, count)} of a tensor; of more than two axes the later ones count as columns."""
    rows, cols = shape[0] if shape else 1, math.prod(shape[1:])
    if codec == "float16":
        return {"half": ("<f2", rows * cols)}
    parts = {"q": ("i1", rows * cols)}
    if codec in ("int", "mixed"):
        parts["scale"] = ("<f2", rows)
    if codec == "mixed":
        parts |= {"fine": ("<f2", rows), "salient": ("i1", cols)}
    if codec in ("grid", "wide"):
        parts |= {"row": ("i1", rows), "col": ("i1", cols), "unit": ("<f4", 1)}
    if codec == "wide":
        parts["over"] = ("i1", rows * cols)
    if rank:
        parts |= {"a": ("i1", rows * rank), "a_step": ("<f2", 1), "b": ("i1", rank * cols),
                  "b_step": ("<f2", -(-rank * cols // group))}
    return parts


def kind_of(name):
    return ".".join(word for word in name.split(".") if not word.isdigit())


def layout(tensors):
    """{stream: [(name, part, dtype, count, shape)]} in the order of the stream."""
    streams = {}
    for name, shape, codec, _, rank, group in tensors:
        for part, (dtype, count) in parts_of(shape, codec, rank, group).items():
            matrix = (shape[0], math.prod(shape[1:])) if part in CODED else ()
            streams.setdefault(part, []).append((name, part, dtype, count, matrix))
    for stream in set(CODED) & set(streams):
        kinds = list(dict.fromkeys(kind_of(row[0]) for row in streams[stream]))
        streams[stream].sort(key=lambda row: kinds.index(kind_of(row[0])))
    return streams


def groups_of(rows):
    """Rows of a coded stream in runs of one kind of matrix and one shape."""
    return [[*same] for _, same in groupby(rows, lambda row: (kind_of(row[0]), row[4]))]


def table_of_streams(tensors):
    """[[stream, "", size, 0, 0]] as the header lists them, to be completed."""
    return [[stream, "", sum(np.dtype(row[2]).itemsize * row[3] for row in rows), 0, 0]
            for stream, rows in layout(tensors).items()]


@cache
def decoded(data, shapes):
    """Codes of a stream of the entropy coder; most damage leaves it as it is."""
    return np.concatenate([group.ravel() for group in tg.decode_codes(data, shapes, "here")])


def arrays(header, streams):
    """{tensor: {part: array}}"""
    found = {row[0]: {} for row in header["tensors"]}
    order = layout(header["tensors"])
    for stream, chosen, size, *_ in header["streams"]:
        rows = order[stream]
        dtype = np.dtype(rows[0][2])
        if chosen == "rans":
            values = decoded(streams[stream], tuple((len(same), *same[0][4]) for same in groups_of(rows)))
        else:
            raw = np.frombuffer(unpacked(chosen, streams[stream], size), np.uint8)
            values = np.ascontiguousarray(raw.reshape(dtype.itemsize, -1).T).view(dtype).ravel()
        ends = np.cumsum([row[3] for row in rows])
        for (name, part, *_), values_of_one in zip(rows, np.split(values, ends[:-1])):
            found[name][part] = values_of_one
    return found


def reference_weights(data):
    """{tensor: float32 weights} that an artifact holds, by the description of the format."""
    header, streams = unseal(data)
    parts, weights = arrays(header, streams), {}
    for name, shape, codec, _, rank, group in header["tensors"]:
        rows = shape[0] if shape else 1
        one = {part: values.astype(np.float32) for part, values in parts[name].items()}
        if codec == "float16":
            weight = one["half"]
        elif codec == "int":
            weight = one["q"].reshape(rows, -1) * one["scale"][:, None]
        elif codec == "mixed":
            step = np.where(one["salient"] != 0, one["fine"][:, None], one["scale"][:, None])
            weight = one["q"].reshape(rows, -1) * step
        else:
            codes = one["q"] + 127 * one["over"] if codec == "wide" else one["q"]
            by_row, by_col = np.exp2(one["row"] / 4), np.exp2(one["col"] / 4)
            weight = codes.reshape(rows, -1) * (one["unit"] * by_row)[:, None] * by_col
        if rank:
            a = one["a"].reshape(rows, rank) * one["a_step"]
            b = one["b"] * np.repeat(one["b_step"], group)[: len(one["b"])]
            for k in range(rank):
                weight = weight + a[:, k, None] * b.reshape(rank, -1)[k]
        weights[name] = weight.reshape(shape)
    return weights


def of_zeros(words, codec="int", compressor="zstd", rank=0, group=1, most=1 << 40):
    """A consistent artifact of a model of these settings (KEY=VALUE) whose parts are all zeros.

    `most`: bytes of a stream beyond which its content is missing.
    """
    s = tg.Settings.parse(["TRAIN_SEQ_LEN=2", "TRAIN_BATCH_TOKENS=2", *words])
    with torch.device("meta"):
        model = tg.GPT(s, init=False)
    tensors = []
    for name, weight in model.named_parameters():
        row = [name, list(weight.shape), "float16", 16, 0, 0]
        if weight.ndim == 2 and codec != "float16":
            row[2:4] = [codec, 8]
            row[4:] = [min(*weight.shape, rank), group if rank else 0]
        tensors.append(row)
    table, streams = table_of_streams(tensors), {}
    for row in table:
        row[1] = compressor if compressor != "rans" or row[0] in CODED else "lzma"
        if row[1] == "rans":
            groups = groups_of(layout(tensors)[row[0]])
            codes = [np.zeros((len(same), *same[0][4]), np.int8) for same in groups]
            streams[row[0]] = tg.encode_codes(codes)
        else:
            streams[row[0]] = zeros(row[1], min(row[2], most))
    settings = dict(word.split("=", 1) for word in words)
    return reseal({"settings": settings, "looping": False, "tokenizer_sha256": "", "tensors": tensors,
                   "streams": table}, streams)


# Checkpoints: a line that names the format, a file of torch.save, the SHA-256 of both.


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def sealed_checkpoint(body):
    data = b"PGOLF checkpoint 2\n" + body
    return data + hashlib.sha256(data).digest()


def checkpoint(state):
    """Bytes of a checkpoint with the right checksum, whatever it holds."""
    return sealed_checkpoint(saved(state))


def rezipped(body, change, method=zipfile.ZIP_STORED):
    """A file of torch.save whose records are changed: change(name, bytes) -> bytes."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as source, zipfile.ZipFile(target, "w", method) as archive:
        for record in source.infolist():
            archive.writestr(record.filename, change(record.filename, source.read(record)))
    return target.getvalue()
