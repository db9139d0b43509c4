"""What each way of storing a model costs: bytes, time and memory of codecs and compressors; at equal bytes, the loss.

    python tools/bench.py pack logs/raw/model.pg @records/small.env                    sizes of every row
    python tools/bench.py pack logs/raw/model.pg @records/small.env --score --json pack.json
    python tools/bench.py pack model.pg DATA_PATH=... --rows "RTN int6,allocated GPTQ" --compressors rans,brotli
    python tools/bench.py pack model.pg DATA_PATH=... --rows none --score --budget 15900000 --also QAT=logs/qat/model.pg
    python tools/bench.py pack --weights model.safetensors --weights other.pt         the compressors alone

The weights are those of an artifact that holds them as float16, which PHASES=train FIT=off MATRIX_BITS=16 EMBED_BITS=16
makes (if it is over SIZE_LIMIT, the file is kept). The settings name the data
(DATA_PATH, TRAIN_SEQ_LEN, EVAL_SEQ_LEN): training text for the moments by which GPTQ and FIT=allocate go, and validation
text for the loss. With --weights they are those of any trained model that a file holds: its matrices are rounded by
SDClip, which asks for no text, and only the bytes of the codes are measured. `bench.py pack --help` has the options.
"""

import argparse
import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import shlex
import shutil
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import (BadInput, Parser, commit, load_trainer, markdown, measure_apart, names_of, positive, progress,
                    show, usage, whole, write_json)

# How weights are stored, as settings of train_gpt.py: METHODS have a width or a knob still to choose, ROWS have it chosen.
BY_TENSOR = "GPTQ + SDClip (one k a tensor)"  # from the moments; int8, so that no step is too small for its range
METHODS = {
    "RTN": "FIT=off MATRIX_QUANT=rtn EMBED_QUANT=rtn EMBED_BITS=8",
    "GPTQ-lite": "FIT=off MATRIX_QUANT=gptq_lite EMBED_QUANT=gptq_lite EMBED_BITS=8",
    "GPTQ + percentile": "FIT=off MATRIX_QUANT=gptq EMBED_QUANT=gptq EMBED_BITS=8",
    "GPTQ + SDClip": "FIT=off MATRIX_QUANT=gptq MATRIX_BITS=6 MATRIX_CLIP_SIGMAS=12.85 "
                     "EMBED_QUANT=gptq EMBED_BITS=8 EMBED_CLIP_SIGMAS=20",
    "GPTQ + SDClip + LQER": "FIT=off MATRIX_QUANT=gptq MATRIX_BITS=6 MATRIX_CLIP_SIGMAS=12.85 "
                            "EMBED_QUANT=gptq EMBED_BITS=8 EMBED_CLIP_SIGMAS=20 LQER_RANK=4 LQER_TOP_K=3",
    BY_TENSOR: "FIT=off MATRIX_QUANT=gptq MATRIX_BITS=8 MATRIX_CLIP_SIGMAS=20 "
               "EMBED_QUANT=gptq EMBED_BITS=8 EMBED_CLIP_SIGMAS=20",
    "allocated RTN": "FIT=allocate MATRIX_QUANT=rtn EMBED_QUANT=rtn",
    "allocated GPTQ": "FIT=allocate MATRIX_QUANT=gptq EMBED_QUANT=gptq",
    "allocated GPTQ + LQER": "FIT=allocate MATRIX_QUANT=gptq EMBED_QUANT=gptq LQER_RANK=4 LQER_TOP_K=3",
}
WIDTHS = range(2, 9)
REFERENCE = "GPTQ + SDClip"  # #1394; its bytes are the budget where none is given
ROWS = {
    "float16": "FIT=off MATRIX_QUANT=rtn MATRIX_BITS=16 EMBED_QUANT=rtn EMBED_BITS=16",
    "ternary": "FIT=off MATRIX_QUANT=ternary EMBED_QUANT=rtn EMBED_BITS=8",
    **{f"{name} int{bits}": f"{METHODS[name]} MATRIX_BITS={bits}"
       for name in ("RTN", "GPTQ-lite") for bits in range(4, 9)},
    "GPTQ + percentile int6": METHODS["GPTQ + percentile"] + " MATRIX_BITS=6",
    REFERENCE: METHODS[REFERENCE],
    "GPTQ + SDClip embeddings int7": METHODS[REFERENCE].replace("EMBED_BITS=8 EMBED_CLIP_SIGMAS=20",
                                                               "EMBED_BITS=7 EMBED_CLIP_SIGMAS=15"),
    **{name: METHODS[name] for name in ("GPTQ + SDClip + LQER", "allocated RTN", "allocated GPTQ",
                                        "allocated GPTQ + LQER")},
}
GENERIC = ("brotli", "zstd", "lzma", "zlib")
ONE_COMPRESSOR = "rans"  # of sizes that are to be equal
DIVERGENCE_TOKENS = 16384
TOLERANCE = 0.0005  # of a size that is to be equal


# ---- the trainer ----------------------------------------------------------------------------------------------------


class Subject:
    """The weights under test and everything that is decided about them. Outside of the containers, only this class,
    Loaded and collect_moments() call the trainer.

    Relied on: Settings.parse, .text and the fields of packing; read_artifact, artifact_settings, load_artifact,
    model_fields; Runtime, pick_attention; find_shards, TokenStream(paths, s, rt).next(); MomentMeter(model) with
    .observe(x, y) .tokens .moments(rt); Quantiser(model, s, moments) with .encode(spacing) .spacing_for(bytes) .quantised
    .stores and .groups (rewritten where each tensor has its own clip) and .factors (shared between settings: most of its
    time); pack().chunks; load_tokenizer, load_validation,
    ModelPredictor, contiguous_reader, score, Validity; of Loaded: row_scales, round_to_grid. The containers: Encoded, tensor_entries, stream_layout, pack_stream, code_groups,
    decode_codes, decompress, _unplanes, _kind, COMPRESSORS.
    """

    def __init__(self, path, words):
        self.trainer, self.path, self.words, self.moments = load_trainer(), path, words, None
        trainer = self.trainer
        self.header, self.bytes = trainer.read_artifact(path)[0], Path(path).stat().st_size
        self.s = self.settings()
        if wrong := next((row for row in self.header["tensors"] if row[2] != "float16"), None):
            raise BadInput(f"{path}: {wrong[0]} is not float16 but {wrong[2]}; make the artifact with FIT=off "
                           "MATRIX_BITS=16 EMBED_BITS=16")
        self.rt = trainer.Runtime(self.s)
        self.attend = trainer.pick_attention(self.s, self.rt)
        self.model = trainer.load_artifact(path, self.s, self.rt.dtype, self.attend, self.rt.device)[1]
        self.raw = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in self.raw.items()}
        self.parameters = sum(p.numel() for p in self.raw.values())
        self.factors, self.val, self.said = {}, None, None

    def settings(self, text=""):
        """Those of the command line, then of a row, with the artifact's model."""
        s = self.trainer.Settings.parse([*self.words, *text.split()], os.environ)
        return self.trainer.artifact_settings(self.path, self.header, s)

    def calibrate(self, tokens):
        """Moments from so many tokens of the training stream; returns (tokens, seconds)."""
        began = time.perf_counter()
        self.moments, counted = collect_moments(self.trainer, self.model, self.s, self.rt, tokens)
        return counted, time.perf_counter() - began

    def quantiser(self, s):
        quantiser = self.trainer.Quantiser(self.model, s, self.moments)
        quantiser.factors = self.factors
        return quantiser

    def clipped(self, s):
        """{parameter: Store} of those that settings clip at a multiple of their rows' spread."""
        return {name: store for name, store in self.quantiser(s).stores.items() if store.sigmas}

    def encode_clipped(self, s, sigmas):
        """As settings have it, but with a multiple of its own for each of the parameters in `sigmas`."""
        quantiser, groups = self.quantiser(s), {}
        for name, k in sigmas.items():
            quantiser.stores[name] = quantiser.stores[name]._replace(sigmas=k)
        for (shape, _), names in quantiser.groups.items():
            for name in names:
                groups.setdefault((shape, quantiser.stores[name]), []).append(name)
        quantiser.groups = groups
        return quantiser.encode()

    def row(self, encoded):
        return Row(encoded, self.shapes, {key: self.header[key] for key in ("settings", "looping", "tokenizer_sha256")})

    def size(self, encoded):
        """Bytes of the artifact that holds them."""
        return sum(len(data) for _, data in own_chunks(self.trainer, self.row(encoded), ONE_COMPRESSOR))

    def code_bytes(self, name, one):
        """Bytes of the codes of one parameter, packed alone."""
        rows = self.trainer.stream_layout(self.trainer.tensor_entries({name: one}, self.shapes))["q"]
        return len(self.trainer.pack_stream(rows, {name: one}, ONE_COMPRESSOR))

    def error(self, name, one):
        """(squared error, felt error in nats a token) of a parameter that has moments."""
        hessian, gain, *_ = self.moments[name]
        error = self.raw[name].float() - one.decode(self.shapes[name]).to(self.rt.device)
        felt = 0.5 * (gain.double() @ ((error @ hessian.float()) * error).double().sum(1)).item()
        return error.double().square().sum().item(), felt

    def errors(self, encoded):
        """(relative squared error, felt error in nats a token) of everything that has moments."""
        square, felt = map(sum, zip(*(self.error(name, encoded[name]) for name in self.moments)))
        return square / sum(self.raw[name].double().square().sum().item() for name in self.moments), felt

    def load_text(self):
        """The validation text; the tokenizer must be the artifact's."""
        sp, _, digest = self.trainer.load_tokenizer(self.s)
        if self.header["tokenizer_sha256"] not in ("", digest):
            raise BadInput(f"{self.path} was trained with another tokenizer; set DATA_PATH or TOKENIZER_PATH")
        self.val = self.trainer.load_validation(self.s, self.rt, sp)

    def score(self, model):
        """Score of a model on the validation text, in windows of EVAL_SEQ_LEN side by side."""
        trainer, validity = self.trainer, self.trainer.Validity()
        parts = trainer.contiguous_reader(self.val, self.s, self.rt)
        found = trainer.score(trainer.ModelPredictor(model, self.rt), parts, self.val, self.rt, validity)
        if validity.reasons:
            raise BadInput(f"the score is not valid: {validity.reasons[0]}")
        return found

    def score_encoded(self, encoded):
        """(Score, divergence) of the model with these weights. The divergence is that of its predictions from those of
        the raw weights, in nats a token of the first DIVERGENCE_TOKENS: what the loss rises by, but for chance. The loss
        itself also moves by the slope of the text along the error, either way.
        """
        if self.said is None:
            self.said = list(self.predictions())
        self.model.load_state_dict({name: one.decode(self.shapes[name]) for name, one in encoded.items()})
        try:
            sums = [((was.exp() * (was - now)).sum().item(), now[..., 0].numel())
                    for was, now in zip(self.said, self.predictions())]
            return self.score(self.model), sum(nats for nats, _ in sums) / sum(tokens for _, tokens in sums)
        finally:
            self.model.load_state_dict(self.raw)

    def predictions(self):
        """Log-probabilities (N, V) of the model as it is, for the first targets of the validation text."""
        val, predictor = self.val, self.trainer.ModelPredictor(self.model, self.rt)
        text = val._replace(tokens=val.tokens[: DIVERGENCE_TOKENS + 1], bytes=val.bytes[:DIVERGENCE_TOKENS])
        s = dataclasses.replace(self.s, eval_batch_seqs=max(4096 // self.s.eval_seq_len, 1))
        for part in self.trainer.contiguous_reader(text, s, self.rt):
            for chunk in part.chunks:
                yield predictor.predict(chunk.inputs)[chunk.index >= 0]

    def score_artifact(self, path):
        """(bytes, Score) of another artifact of this vocabulary."""
        header = self.trainer.read_artifact(path)[0]
        if header["tokenizer_sha256"] != self.header["tokenizer_sha256"]:
            raise BadInput(f"{path} was trained with another tokenizer than {self.path}")
        defaults = {f.name: f.default for f in self.trainer.model_fields()}
        s = self.trainer.artifact_settings(path, header, dataclasses.replace(self.s, **defaults))
        attend = self.trainer.pick_attention(s, self.rt)
        model = self.trainer.load_artifact(path, s, self.rt.dtype, attend, self.rt.device)[1]
        return Path(path).stat().st_size, self.score(model)


def collect_moments(trainer, model, s, rt, tokens):
    """({parameter: Moments} of a model, tokens): from the beginning of the training stream in its longest sequences."""
    length = s.stages[-1][1]
    rows = max(min(-(-tokens // length), trainer.CALIBRATION_MICRO_TOKENS // length), 1)
    s = dataclasses.replace(s, train_seq_schedule=(), train_batch_schedule=(), train_seq_len=length, average="none",
                            train_batch_tokens=rows * length, micro_batch_tokens=rows * length,
                            loader="sequential" if s.loader == "packed" else s.loader)
    stream, meter = trainer.TokenStream(trainer.find_shards(s.data_path, "train"), s, rt), trainer.MomentMeter(model)
    while meter.tokens < tokens:
        for x, y, _ in stream.next():
            meter.observe(x, y)
    return meter.moments(rt), meter.tokens


# ---- weights of any model -------------------------------------------------------------------------------------------

LEAST = 16384  # weights of a matrix that is measured
CLIPS = ((5, 12.85), (6, 12.85), (7, 15.0), (8, 20.0))  # (bits, k); the contest's but for the first
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # dtypes of safetensors


def read_tensors(path):
    """[(name, tensor)] of a .safetensors or .npz file, or of what torch.load() reads without running code."""
    import torch

    def leaves(name, value):
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (dict, list, tuple)):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from leaves(f"{name}.{key}".lstrip("."), inner)

    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return [(name, torch.from_numpy(arrays[name])) for name in arrays.files if arrays[name].dtype.kind == "f"]
        if path.suffix == ".safetensors":
            data = bytearray(path.read_bytes())
            begin = 8 + int.from_bytes(data[:8], "little")
            return [(name, torch.frombuffer(data, dtype=getattr(torch, STORED[one["dtype"]]), count=math.prod(one["shape"]),
                                            offset=begin + one["data_offsets"][0]).view(one["shape"]))
                    for name, one in json.loads(data[8:begin]).items()
                    if one.get("dtype") in STORED and math.prod(one["shape"])]
        return list(leaves("", torch.load(path, map_location="cpu", weights_only=True)))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(f"{path}: its weights cannot be read ({reason[0]}); give a .safetensors or .npz file, or a "
                       "dictionary of tensors by torch.save") from None


class Loaded:
    """The matrices of a file, each once, with the axes behind the first as one; for measure_row() in a Subject's place."""

    def __init__(self, path):
        self.trainer, self.path, self.matrices = load_trainer(), path, {}
        for name, value in read_tensors(Path(path)):
            if not value.is_floating_point() or value.ndim < 2 or value.numel() < LEAST:
                continue
            matrix = value.detach().float().flatten(1).contiguous()
            if not matrix.isfinite().all():
                raise BadInput(f"{path}: {name} is not finite; leave it out of the file")
            if not any(matrix.equal(other) for other in self.matrices.values()):  # tied: once
                self.matrices[name] = matrix
        if not self.matrices:
            raise BadInput(f"{path}: no matrix of floating-point numbers has {LEAST:,} weights; give a larger model")
        self.shapes = {name: tuple(matrix.shape) for name, matrix in self.matrices.items()}
        self.parameters = sum(matrix.numel() for matrix in self.matrices.values())

    def row(self, encoded):
        return Row(encoded, self.shapes, {})

    def encode(self, bits, sigmas):
        """By SDClip, to nearest."""
        import torch

        trainer, encoded = self.trainer, {}
        for name, matrix in self.matrices.items():
            scale = trainer.row_scales(matrix, bits, "rtn", sigmas)
            q = trainer.round_to_grid(matrix, scale.float()[:, None], 2 ** (bits - 1) - 1).to(torch.int8)
            encoded[name] = trainer.Encoded("int", bits, 0, 0, {"q": q, "scale": scale})
        return encoded


# ---- choosing a knob ------------------------------------------------------------------------------------------------


def solve(try_at, x, size, per_octave):
    """What try_at(x) -> (bytes, thing) gives nearest to `size` bytes: (x, bytes, thing), by secant steps in x, a log2.
    `per_octave`: the first guess of how bytes follow x, which must be negative.
    """
    best, before, slope = None, None, per_octave
    for _ in range(10):
        found, thing = try_at(x)
        if best is None or abs(found - size) < abs(best[1] - size):
            best = x, found, thing
        if abs(found - size) <= max(TOLERANCE * size, 8):
            break
        if before and before[0] != x and (found - before[1]) / (x - before[0]) < 0.1 * per_octave:
            slope = (found - before[1]) / (x - before[0])
        before = x, found
        x += min(max((size - found) / slope, -2), 2)
    return best


def knob(s):
    return "spacing" if s.fit == "allocate" else "sigmas" if s.matrix_clip_sigmas else "bits"


def at_size(subject, s, size):
    """(bytes, encoded, knob's value) of settings whose knob is continuous, at so many bytes."""
    first = subject.quantiser(s)

    def by_spacing(x):
        encoded = first.encode(2**x)
        return subject.size(encoded), (encoded, 2**x)

    def by_sigmas(x):
        sigmas = {name: min(getattr(s, name) * 2**x, 100.0) for name in (
            "matrix_clip_sigmas", "attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas")}
        encoded = subject.quantiser(dataclasses.replace(s, **sigmas)).encode()
        return subject.size(encoded), (encoded, sigmas["matrix_clip_sigmas"])

    if knob(s) == "spacing":
        _, found, (encoded, value) = solve(by_spacing, math.log2(first.spacing_for(size)), size, -first.quantised / 8)
    else:
        _, found, (encoded, value) = solve(by_sigmas, 0.0, size, -first.quantised / 8)
    return found, encoded, value


TRIED_STEPS = 2.0 ** np.arange(-6, 3.5, 0.5)  # of a tensor, in spreads of its rows


def at_size_by_tensor(subject, s, size):
    """at_size() with a k of its own for each clipped tensor: those of least felt error at so many bytes.

    At each of TRIED_STEPS the coder takes bytes for a tensor and, after GPTQ, the loss feels an error; between them bytes
    and the log of the felt error are straight lines over the log of the step. What a byte may cost falls until all are
    taken (Lagrange); a factor on all k, close to 1, then meets the size. The entropy in place of the coder cost 2 %.
    """
    stores, measured = subject.clipped(s), {}
    for step in TRIED_STEPS:
        encoded = subject.encode_clipped(s, {name: step * store.top for name, store in stores.items()})
        for name in stores:
            felt = math.log2(max(subject.error(name, encoded[name])[1], 1e-30))
            measured.setdefault(name, []).append((subject.code_bytes(name, encoded[name]), felt))
    tried = np.log2(TRIED_STEPS)
    fine = np.linspace(tried[0], tried[-1], 128 * len(tried))
    curves = {name: [np.interp(fine, tried, values) for values in zip(*points)] for name, points in measured.items()}

    def choose(room):
        """({name: k}, bytes) of codes that fit."""
        at = {name: int(taken.argmin()) for name, (taken, _) in curves.items()}
        total = sum(taken[at[name]] for name, (taken, _) in curves.items())
        for price in np.arange(20, -60, -1 / 32):  # log2 of nats a byte
            for name, (taken, felt) in curves.items():
                finer = int((2**felt + 2**price * taken).argmin())
                more = taken[finer] - taken[at[name]]
                if more > 0 and total + more <= room:
                    at[name], total = finer, total + more
        return {name: float(2 ** fine[place] * stores[name].top) for name, place in at.items()}, total

    def by_factor(x):
        scaled = {name: k * 2**x for name, k in sigmas.items()}
        encoded = subject.encode_clipped(s, scaled)
        return subject.size(encoded), (encoded, scaled)

    beside = 0
    for _ in range(3):  # the bytes beside these codes, and what coding them together saves
        sigmas, taken = choose(size - beside)
        beside = by_factor(0.0)[0] - taken
    _, found, (encoded, value) = solve(by_factor, 0.0, size, -subject.quantiser(s).quantised / 8)
    return found, encoded, value


def between(low, high, size):
    """{"bytes", "loss gap", ...} of two such, between which `size` lies: straight lines in log where both gaps are."""
    share = (size - low["bytes"]) / (high["bytes"] - low["bytes"])

    def mix(a, b):
        if min(a, b) > 0:
            return math.exp((1 - share) * math.log(a) + share * math.log(b))
        return (1 - share) * a + share * b

    return {"bytes": size, **{key: mix(low[key], high[key]) for key in low if key != "bytes"}}


# ---- containers -----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What a container holds."""

    encoded: dict
    shapes: dict
    header: dict


def own_chunks(trainer, row, compressor):
    """The artifact of train_gpt.py."""
    chunks = trainer.pack(row.encoded, row.shapes, trainer.Settings(compressor=compressor), row.header).chunks
    streams = trainer.stream_layout(trainer.tensor_entries(row.encoded, row.shapes))
    return list(zip(("header", "header", *streams), chunks, strict=True))


def apart(trainer, row, kinds):
    """[(stream, its rows)] as the artifact has them, or with a stream of codes for each kind of matrix."""
    for stream, rows in trainer.stream_layout(trainer.tensor_entries(row.encoded, row.shapes)).items():
        split = kinds and stream in trainer.CODED
        for _, part in itertools.groupby(rows, lambda one: trainer._kind(one[0]) if split else None):
            yield stream, list(part)


def layout_chunks(trainer, row, compressor, kinds, columns):
    """The same streams in another layout: the codes of each matrix column by column, or a stream for each kind."""
    encoded = {name: turned(one) if columns else one for name, one in row.encoded.items()}
    blank = {name: one._replace(parts={part: value * 0 for part, value in one.parts.items()})
             for name, one in row.encoded.items()}
    header = own_chunks(trainer, row._replace(encoded=blank), "zlib")[:2]
    return header + [(stream, trainer.pack_stream(rows, encoded, compressor))
                     for stream, rows in apart(trainer, row, kinds)]


def turned(one, back=False):
    if "q" not in one.parts:
        return one
    q = one.parts["q"]
    order = q.view(q.size(1), q.size(0)) if back else q
    return one._replace(parts=one.parts | {"q": order.mT.contiguous().view(q.shape)})


def layout_weights(trainer, row, chunks, compressor, kinds=False, columns=False):
    """Weights of an artifact in any layout."""
    import torch

    parts = {name: {} for name in row.shapes}
    for (stream, rows), (_, data) in zip(apart(trainer, row, kinds), chunks[2:], strict=True):
        if compressor == "rans" and stream in trainer.CODED:
            groups = trainer.decode_codes(data, trainer.code_groups(rows), stream)
            values = np.concatenate([group.ravel() for group in groups])
        else:
            size = sum(np.dtype(dtype).itemsize * math.prod(shape) for _, _, dtype, shape in rows)
            raw = trainer.decompress("lzma" if compressor == "rans" else compressor, data, size, stream)
            values = trainer._unplanes(raw, rows[0][2])
        ends = np.cumsum([math.prod(shape) for *_, shape in rows])
        for (name, part, _, shape), array in zip(rows, np.split(values, ends[:-1])):
            parts[name][part] = torch.from_numpy(array.copy()).view(shape)
    done = {name: one._replace(parts=parts[name]) for name, one in row.encoded.items()}
    return weights(row, {name: turned(one, back=True) if columns else one for name, one in done.items()})


def weights(row, encoded):
    return {name: one.decode(row.shapes[name]) for name, one in encoded.items()}


def pickled(encoded, skip=()):
    """What the reference systems store: torch.save of {"w": {name.q, name.scale, ...}, "m": {name: how}}."""
    import torch

    stored = {f"{name}.{part}": value for name, one in encoded.items() for part, value in one.parts.items()
              if part not in skip}
    how = {name: "passthrough" if one.codec == "float16" else list(one[:4]) for name, one in encoded.items()}
    buffer = io.BytesIO()
    torch.save({"w": stored, "m": how}, buffer)
    return buffer.getvalue()


def unpickled(row, data, more=()):
    import torch

    stored = torch.load(io.BytesIO(data), weights_only=True)["w"] | dict(more)
    return weights(row, {name: one._replace(parts={part: stored[f"{name}.{part}"] for part in one.parts})
                         for name, one in row.encoded.items()})


def shuffled(data, stride):
    """Every stride-th byte, then those behind them, ...: bytes of one significance lie together (#1089)."""
    return b"".join(data[i::stride] for i in range(stride))


def unshuffled(data, stride):
    out = np.empty(len(data), np.uint8)
    for i, part in enumerate(np.array_split(np.frombuffer(data, np.uint8), np.cumsum(
            [-(-(len(data) - i) // stride) for i in range(stride)])[:-1])):
        out[i::stride] = part
    return out.tobytes()


def reference_chunks(trainer, row, compressor, stride):
    data = pickled(row.encoded)
    return [("size", len(data).to_bytes(4, "little")),
            ("all", trainer.COMPRESSORS[compressor][0](shuffled(data, stride)))]


def reference_weights(trainer, row, chunks, compressor, stride):
    (_, size), (_, data) = chunks
    data = trainer.decompress(compressor, data, int.from_bytes(size, "little"), "all")
    return unpickled(row, unshuffled(data, stride))


def lrzip(data, *options):
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        source, target = Path(folder, "in.lrz"), Path(folder, "out")
        source.write_bytes(data)
        subprocess.run(["lrzip", "-q", "-f", *options, "-o", target, source], check=True, capture_output=True,
                       stdin=subprocess.DEVNULL)
        return target.read_bytes()


def by_kind(trainer, encoded):
    """{kind: names}"""
    names = sorted((name for name, one in encoded.items() if "q" in one.parts), key=trainer._kind)
    return {key: list(group) for key, group in itertools.groupby(names, trainer._kind)}


def lrzip_chunks(trainer, row, apart):
    """#1855: ZPAQ on the codes of each kind of matrix, column by column, brotli on the rest; without its sorting of rows.
    Not `apart`: on all codes in one file, row by row.
    -T: what LZ4 cannot shrink is not left as it is; -p 1: the same bytes on any number of cores.
    """
    rest = pickled(row.encoded, skip=("q",))
    parts = [[row.encoded[name].parts["q"] for name in names] for names in by_kind(trainer, row.encoded).values()]
    if apart:
        groups = [b"".join(q.mT.contiguous().numpy().tobytes() for q in part) for part in parts]
    else:
        groups = [b"".join(q.numpy().tobytes() for q in itertools.chain(*parts))]
    return [("size", len(rest).to_bytes(4, "little")), ("rest", trainer.COMPRESSORS["brotli"][0](rest)),
            *(("q", lrzip(data, "-z", "-L", "9", "-T", "-p", "1")) for data in groups)]


def lrzip_weights(trainer, row, chunks, apart):
    import torch

    (_, size), (_, rest), *groups = chunks
    codes, kinds = {}, list(by_kind(trainer, row.encoded).values())
    for names, (_, data) in zip(kinds if apart else [list(itertools.chain(*kinds))], groups, strict=True):
        values, at = torch.frombuffer(bytearray(lrzip(data, "-d")), dtype=torch.int8), 0
        for name in names:
            rows, columns = row.encoded[name].parts["q"].shape
            part = values[at : at + rows * columns]
            codes[f"{name}.q"] = part.view(columns, rows).mT.contiguous() if apart else part.view(rows, columns)
            at += rows * columns
    return unpickled(row, trainer.decompress("brotli", rest, int.from_bytes(size, "little"), "rest"), codes)


def containers():
    """{name: (pack(trainer, row) -> [(part, bytes)], unpack(trainer, row, those) -> {name: weight})}."""
    found = {name: (partial(own_chunks, compressor=name), partial(layout_weights, compressor=name))
             for name in ("rans", *GENERIC)}
    for name, (kinds, columns) in itertools.product(GENERIC, ((False, True), (True, False), (True, True))):
        how = {"compressor": name, "kinds": kinds, "columns": columns}
        found[name + " kinds" * kinds + " columns" * columns] = (partial(layout_chunks, **how),
                                                                 partial(layout_weights, **how))
    for name, stride in itertools.product(("zstd", "lzma", "brotli"), (1, 2, 4)):
        how = {"compressor": name, "stride": stride}
        found[f"torch.save {name}" + (f" shuffle {stride}" if stride > 1 else "")] = (
            partial(reference_chunks, **how), partial(reference_weights, **how))
    for name, apart in (("lrzip kinds columns", True), ("lrzip", False)):
        found[name] = partial(lrzip_chunks, apart=apart), partial(lrzip_weights, apart=apart)
    return found


CONTAINERS = containers()
PLAIN = ("rans", *GENERIC)


def measure_container(job):
    """Pack and unpack a stored row in this process."""
    import torch

    trainer, (pack_it, unpack_it) = load_trainer(), CONTAINERS[job["container"]]
    stored = torch.load(job["row"], weights_only=True)
    row = Row(**stored | {"encoded": {name: trainer.Encoded(*one) for name, one in stored["encoded"].items()}})
    marks = [(*usage(), time.perf_counter())]
    chunks = pack_it(trainer, row)
    marks.append((*usage(), time.perf_counter()))
    back = unpack_it(trainer, row, chunks)
    marks.append((*usage(), time.perf_counter()))
    if not all(torch.equal(back[name], weight) for name, weight in weights(row, row.encoded).items()):
        return {"error": "what was unpacked is not what was packed"}
    (cpu0, before, wall0), (cpu1, packing, wall1), (cpu2, unpacking, wall2) = marks
    codes = [len(data) for part, data in chunks if part in trainer.CODED]
    return {"bytes": sum(len(data) for _, data in chunks), "code_bytes": sum(codes) if codes else None,
            "pack_seconds": cpu1 - cpu0, "unpack_seconds": cpu2 - cpu1, "pack_wall_seconds": wall1 - wall0,
            "unpack_wall_seconds": wall2 - wall1, "memory_before_mib": before, "pack_memory_mib": packing,
            "unpack_memory_mib": unpacking}


# ---- entropy --------------------------------------------------------------------------------------------------------


def tensor_entropy(q):
    """Bytes of codes (R, C) at the entropy of their own frequencies, which are not counted."""
    counts = np.bincount(q.ravel().astype(np.int64) + 128)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


def row_entropy(q):
    """Bytes of codes (R, C) under a Gaussian rounded to whole numbers, whose spread is for each row the best of a grid.

    The spreads are not counted.
    """
    import torch

    spreads = torch.exp2(torch.arange(-32, 57, dtype=torch.float64) / 8)
    edges = (torch.arange(129, dtype=torch.float64) - 0.5)[:, None] / spreads
    tail = torch.special.log_ndtr(-edges)  # log of the share above each edge
    cost = -(tail[:-1] + torch.log1p(-torch.exp(tail[1:] - tail[:-1])))  # of a magnitude, with its sign
    cost[0] = -torch.log1p(-2 * torch.exp(tail[1]))
    rows = np.abs(q.astype(np.int64)) + 128 * np.arange(len(q))[:, None]
    counts = torch.from_numpy(np.bincount(rows.ravel(), minlength=128 * len(q)).reshape(-1, 128)).double()
    return float((counts @ cost).amin(1).sum()) / math.log(2) / 8


# ---- sizes ----------------------------------------------------------------------------------------------------------


def encode_row(subject, name, size):
    """(encoded, spacing) of a row; FIT=allocate, which has no size of its own, fills `size()` bytes."""
    s = subject.settings(ROWS[name])
    if knob(s) == "spacing":
        return at_size(subject, s, size())[1:]
    return subject.quantiser(s).encode(), None


def code_facts(subject, name, encoded, spacing):
    codes = [one.parts[part].numpy() for one in encoded.values() for part in subject.trainer.CODED if part in one.parts]
    square, felt = subject.errors(encoded)
    return {"row": name, "settings": ROWS[name], "spacing": spacing, "codes": sum(one.parts["q"].numel() for one in encoded.values() if "q" in one.parts),
            "squared_error": square, "felt_error": felt,
            "tensor_entropy_bytes": sum(map(tensor_entropy, codes)) if codes else None,
            "row_entropy_bytes": sum(map(row_entropy, codes)) if codes else None}


def loaded_facts(loaded, name, encoded):
    """code_facts() of a Loaded, which has no moments."""
    tensors = [{"name": key, "shape": one.parts["q"].shape, "entropy_bytes": tensor_entropy(one.parts["q"].numpy())}
               for key, one in encoded.items()]
    return {"row": name, "weights": loaded.path, "matrices": len(tensors), "codes": loaded.parameters,
            "tensor_entropy_bytes": sum(one["entropy_bytes"] for one in tensors),
            "row_entropy_bytes": sum(row_entropy(one.parts["q"].numpy()) for one in encoded.values()), "tensors": tensors}


def measure_row(subject, row, encoded, names, folder):
    """A dictionary for each compressor, one after the other."""
    import torch

    path = Path(folder) / "row.pt"
    torch.save(subject.row({name: tuple(one) for name, one in encoded.items()})._asdict(), path)
    for name in names:
        result = {"row": row, "compressor": name}
        if name.startswith("lrzip") and not shutil.which("lrzip"):
            yield result | {"skipped": "lrzip is not installed"}
            continue
        progress(f"measuring {row} with {name}")
        result |= measure_apart({"folder": str(folder), "row": str(path), "container": name})
        if "bytes" in result:
            result["bits_per_weight"] = 8 * result["bytes"] / subject.parameters
        yield result


# ---- quality --------------------------------------------------------------------------------------------------------


def quality_row(subject, name, size, raw):
    """What a method costs at `size` bytes."""
    s = subject.settings(METHODS[name])

    def result(encoded, found):
        scored, divergence = subject.score_encoded(encoded)
        return {"bytes": found, "gap": scored.loss - raw.loss, "divergence": divergence,
                "felt_error": subject.errors(encoded)[1]}

    if knob(s) != "bits":
        found, encoded, value = (at_size_by_tensor if name == BY_TENSOR else at_size)(subject, s, size)
        if abs(found - size) > 0.01 * size:
            return {"skipped": f"it cannot take {size:,} bytes; {found:,} bytes are the nearest that was tried"}
        row = {"knob": knob(s), "value": value, **result(encoded, found)}
        if knob(s) == "spacing":
            row["predicted_gap"] = subject.quantiser(s).quantised * value**2 / 24
        return row
    sizes, bits = {}, 5
    while not (bits in sizes and bits + 1 in sizes):
        for width in (bits, bits + 1):
            if width not in sizes:
                encoded = subject.quantiser(dataclasses.replace(s, matrix_bits=width)).encode()
                sizes[width] = subject.size(encoded), encoded
        shift = -1 if sizes[bits][0] > size else 1 if sizes[bits + 1][0] < size else 0
        if bits + shift not in WIDTHS or bits + 1 + shift not in WIDTHS:
            least, most = (sizes[width][0] for width in (min(sizes), max(sizes)))
            return {"skipped": f"{size:,} bytes are outside of what {WIDTHS[0]} to {WIDTHS[-1]} bits take "
                               f"({least:,} to {most:,} bytes tried)"}
        bits += shift
    ends = [result(sizes[width][1], sizes[width][0]) for width in (bits, bits + 1)]
    return {"knob": "bits", "value": [bits, bits + 1], "ends": ends, **between(*ends, size)}


def quality(subject, names, size, also):
    """A dictionary for each method at `size` bytes, the raw weights before them, other artifacts behind them."""
    raw = subject.score(subject.model)
    per_nat = raw.bpb / raw.loss  # bits per byte of a nat a token, on this text

    def finish(name, row):
        if "gap" not in row:
            return {"method": name, **row}
        return {"method": name, "bits_per_weight": 8 * row["bytes"] / subject.parameters, "loss": raw.loss + row["gap"],
                "bpb": raw.bpb + row["gap"] * per_nat, "gap_bpb": row["gap"] * per_nat, **row}

    yield finish("raw weights", {"bytes": subject.bytes, "gap": 0.0})
    for name in names:
        progress(f"scoring {name} at {size:,} bytes")
        yield finish(name, {"settings": METHODS[name], **quality_row(subject, name, size, raw)})
    for name, path in also:
        progress(f"scoring {name}")
        found, scored = subject.score_artifact(path)
        yield finish(name, {"bytes": found, "gap": scored.loss - raw.loss, "also": str(path)})


# ---- the report -----------------------------------------------------------------------------------------------------


TEXT = ("weights as", "compressor", "settings", "method", "how the size was met")
CODE_COLUMNS = ("weights as", "squared error", "felt error, nats", "codes", "entropy by tensor, bytes",
                "by row's Gaussian, bytes", "settings")
SIZE_COLUMNS = ("weights as", "compressor", "bytes", "bits/weight", "codes, bytes", "over entropy by tensor",
                "over row's Gaussian", "pack, CPU s", "unpack, CPU s", "peak MiB")
QUALITY_COLUMNS = ("method", "bytes", "bits/weight", "loss", "BPB", "gap, nats", "gap, BPB", "divergence, nats",
                   "felt error, nats", "predicted, nats", "how the size was met")


LOADED_COLUMNS = ("weights as", "matrices", "codes", "entropy by tensor, bytes", "by row's Gaussian, bytes")


def loaded_line(row):
    return (row["row"], *(show(row[key]) for key in ("matrices", "codes", "tensor_entropy_bytes", "row_entropy_bytes")))


def code_line(row):
    return (row["row"], show(row["squared_error"], ".3e"), show(row["felt_error"], ".5f"), show(row["codes"]),
            show(row["tensor_entropy_bytes"]), show(row["row_entropy_bytes"]), f"`{row['settings']}`")


def size_line(row, facts):
    if "bytes" not in row:
        return row["row"], row["compressor"], f"failed: {row['error']}" if "error" in row else row["skipped"]

    def over(key):
        return show(row["code_bytes"] / facts[key] - 1 if row["code_bytes"] and facts[key] else None, "+.2%")

    return (row["row"], row["compressor"], show(row["bytes"]), show(row["bits_per_weight"], ".3f"),
            show(row["code_bytes"]), over("tensor_entropy_bytes"), over("row_entropy_bytes"),
            show(row["pack_seconds"], ",.2f"), show(row["unpack_seconds"], ",.2f"),
            show(max(row["pack_memory_mib"], row["unpack_memory_mib"])))


def quality_line(row):
    if "gap" not in row:
        return row["method"], row["skipped"]
    if (way := row.get("knob")) == "bits":
        how = "between int{} and int{}".format(*row["value"])
    elif isinstance(row.get("value"), dict):
        how = "k = {:.4g} to {:.4g}".format(min(row["value"].values()), max(row["value"].values()))
    elif way:
        how = f"{'k = ' if way == 'sigmas' else 'spacing '}{row['value']:.4g}"
    else:
        how = "as it is"
    return (row["method"], show(row["bytes"]), show(row["bits_per_weight"], ".3f"), show(row["loss"], ".5f"),
            show(row["bpb"], ".5f"), show(row["gap"], "+.5f"), show(row["gap_bpb"], "+.5f"),
            show(row.get("divergence"), ".5f"), show(row.get("felt_error"), ".5f"), show(row.get("predicted_gap"), ".5f"),
            how)


def header(report):
    r = report
    changed = f" and {r['changed_files']} changed file(s)" if r["changed_files"] else ""
    yield f"command   {r['command']}"
    yield f"settings  {r['settings'] or '(default)'}"
    yield (f"weights   {r['artifact']}: {r['parameters']:,} parameters, {r['artifact_bytes']:,} bytes; on {r['device']}, "
           f"torch {r['torch']}, {r['threads']} CPU thread(s), commit {r['commit']}{changed}")
    yield f"moments   of {r['calibration_tokens']:,} training tokens, in {r['calibration_seconds']:,.1f} s"
    if r["budget_bytes"]:
        yield f"budget    {r['budget_bytes']:,} bytes by {ONE_COMPRESSOR}, {r['budget_from']}"


def loaded_document(report):
    """Lines of the report on --weights."""
    changed = f" and {report['changed_files']} changed file(s)" if report["changed_files"] else ""
    yield f"command   {report['command']}"
    yield f"on        torch {report['torch']}, {report['threads']} CPU thread(s), commit {report['commit']}{changed}"
    facts = {row["row"]: row for row in report["codes"]}
    yield f"\n### Codes\n\nMatrices of at least {LEAST:,} weights, rounded to nearest by SDClip.\n"
    yield from markdown(LOADED_COLUMNS, TEXT, map(loaded_line, report["codes"]))
    yield "\n### Sizes\n\nSeconds are CPU time.\n"
    yield from markdown(SIZE_COLUMNS, TEXT, (size_line(row, facts[row["row"]]) for row in report["sizes"]))


def document(report):
    """Lines of the report."""
    yield from header(report)
    if report["codes"]:
        facts = {row["row"]: row for row in report["codes"]}
        yield "\n### Codes\n\nSquared error: of the weights' squares; felt error: half the sum of gain E H E^T.\n"
        yield from markdown(CODE_COLUMNS, TEXT, map(code_line, report["codes"]))
        before = max((row.get("memory_before_mib", 0) for row in report["sizes"]), default=0)
        yield ("\n### Sizes\n\nSeconds are CPU time; peak memory is that of a process of its own, of which Python, torch and "
               f"the codes are {before:,.0f} MiB before anything is packed.\n")
        yield from markdown(SIZE_COLUMNS, TEXT, (size_line(row, facts[row["row"]]) for row in report["sizes"]))
    if report["quality"]:
        yield (f"\n### Quality at equal bytes\n\n{report['val_tokens']:,} validation tokens in windows of "
               f"{report['eval_seq_len']:,}. Methods that have only widths (of matrices; tables are int8): between two "
               "of them log(gap) is taken as a straight line in bytes. Divergence: of the predictions from those of the raw weights, on the first "
               f"{DIVERGENCE_TOKENS:,} tokens at most, without the chance that moves the loss. Predicted: spacing^2/24 a "
               "weight.\n")
        yield from markdown(QUALITY_COLUMNS, TEXT, map(quality_line, report["quality"]))


# ---- the command ----------------------------------------------------------------------------------------------------


def named(text):
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise BadInput(f"--also {text}: not NAME=ARTIFACT")
    return name, path


def clips(text):
    found = []
    for part in text.split(","):
        bits, colon, k = part.partition(":")
        if not colon or bits not in map(str, WIDTHS):
            raise argparse.ArgumentTypeError(f"{part!r} is not BITS:K with {WIDTHS[0]} to {WIDTHS[-1]} bits, as 6:12.85")
        found.append((int(bits), positive(k)))
    return found


def arguments(argv):
    parser = Parser(prog="bench.py pack", allow_abbrev=False, description="""Store the weights of a float16 artifact in
        every way there is: the bytes, the error, the entropy of the codes, time and memory of packing and unpacking;
        with --score the loss of each method at equal bytes.""", epilog=f"""Rows: {'; '.join(ROWS)}. Compressors, the
        first {len(PLAIN)} by default and all of them for the row {REFERENCE}: {'; '.join(CONTAINERS)}. "columns": the
        codes of a matrix column by column; "kinds": a stream of codes for each kind of matrix; "torch.save": the
        containers of the contest's records; "lrzip": that of #1855, where the program is installed. Methods of --score:
        {'; '.join(METHODS)}.""")
    add = parser.add_argument
    add("artifact", nargs="?", metavar="ARTIFACT", help="artifact whose weights are float16")
    add("settings", nargs="*", metavar="@FILE|KEY=VALUE", help="settings of train_gpt.py: DATA_PATH, TRAIN_SEQ_LEN, "
        "EVAL_SEQ_LEN, GPTQ_DAMP, ...")
    add("--rows", type=names_of("--rows", ROWS, none=True), default=list(ROWS), metavar="NAME,...",
        help="rows of the tables of codes and sizes (default: all), or none")
    add("--compressors", type=names_of("--compressors", [*CONTAINERS, "all"]), metavar="NAME,...",
        help="of every row; or all")
    add("--calibration-tokens", type=whole(1), default=65536, metavar="N", help="of the moments (default: 65536)")
    add("--budget", type=whole(1), metavar="BYTES", help=f"of what fits any size (default: those of {REFERENCE})")
    add("--score", action="store_true", help="score each method at the budget")
    add("--methods", type=names_of("--methods", METHODS), default=list(METHODS), metavar="NAME,...",
        help="what --score scores (default: all)")
    add("--val-tokens", type=whole(1), default=65536, metavar="N", help="validation tokens (default: 65536)")
    add("--also", type=named, action="append", default=[], metavar="NAME=ARTIFACT", help="another artifact to score")
    add("--json", type=Path, metavar="FILE", help="write the result as JSON, anew after each measurement")
    add("--weights", action="append", default=[], metavar="FILE", help="instead of ARTIFACT: the matrices of any model, "
        f"from {LEAST:,} weights, in a .safetensors or .npz file or one of torch.save; may be given again")
    add("--clips", type=clips, default=list(CLIPS), metavar="BITS:K,...", help="what SDClip rounds --weights to (default: "
        + ",".join(f"{bits}:{k:g}" for bits, k in CLIPS) + ")")
    args = parser.parse_intermixed_args(argv)
    if not (args.weights or args.artifact):
        parser.error("ARTIFACT is missing")
    others = ["clips"] if args.artifact else ["rows", "calibration_tokens", "budget", "score", "methods", "val_tokens", "also"]
    if args.artifact and args.weights:
        parser.error(f"--weights stands instead of {args.artifact} and of settings; leave one of them out")
    if idle := [name for name in others if getattr(args, name) != parser.get_default(name)]:
        parser.error(f"--{idle[0].replace('_', '-')} does nothing {'without' if args.artifact else 'with'} --weights")
    return args


def run_loaded(args, argv):
    """`bench.py pack --weights`; returns the exit code."""
    import torch

    report = {"command": shlex.join(["tools/bench.py", "pack", *argv]),
              **dict(zip(("commit", "changed_files"), commit())), "torch": torch.__version__,
              "threads": torch.get_num_threads(), "codes": [], "sizes": []}
    names = args.compressors or [*PLAIN, "lrzip", "lrzip kinds columns"]
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        for loaded, (bits, k) in itertools.product(map(Loaded, args.weights), args.clips):
            name = f"{Path(loaded.path).name} int{bits}, k = {k:g}"
            encoded = loaded.encode(bits, k)
            report["codes"].append(loaded_facts(loaded, name, encoded))
            for row in measure_row(loaded, name, encoded, CONTAINERS if "all" in names else names, folder):
                report["sizes"].append(row)
                if args.json:
                    write_json(args.json, report)
    print("\n".join(loaded_document(report)), flush=True)
    return int(any("error" in row for row in report["sizes"]))


def run(args, argv):
    """`bench.py pack`; returns the exit code."""
    import torch

    if args.weights:
        return run_loaded(args, argv)
    subject = Subject(args.artifact, args.settings)
    subject.s = dataclasses.replace(subject.s, val_tokens=args.val_tokens)
    if args.score:
        subject.load_text()
    progress("collecting moments")
    tokens, seconds = subject.calibrate(args.calibration_tokens)
    report = {"command": shlex.join(["tools/bench.py", "pack", *argv]), "settings": subject.s.text(),
              **dict(zip(("commit", "changed_files"), commit())), "artifact": args.artifact,
              "artifact_bytes": subject.bytes, "parameters": subject.parameters, "device": subject.rt.device_name(),
              "torch": torch.__version__, "threads": torch.get_num_threads(), "calibration_tokens": tokens,
              "calibration_seconds": seconds, "budget_bytes": args.budget, "budget_from": "as given", "codes": [],
              "sizes": [], "quality": [], "val_tokens": args.val_tokens, "eval_seq_len": subject.s.eval_seq_len}

    def budget():
        if report["budget_bytes"] is None:
            s = subject.settings(ROWS[REFERENCE])
            report["budget_bytes"] = subject.size(subject.quantiser(s).encode())
            report["budget_from"] = f"those of {REFERENCE}"
        return report["budget_bytes"]

    def add(part, row):
        report[part].append(row)
        if args.json:
            write_json(args.json, report)

    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        for name in args.rows:
            progress(f"encoding {name}")
            encoded, spacing = encode_row(subject, name, budget)
            add("codes", code_facts(subject, name, encoded, spacing))
            given = args.compressors or (["all"] if name == REFERENCE else PLAIN)
            for row in measure_row(subject, name, encoded, CONTAINERS if "all" in given else given, folder):
                add("sizes", row)
    if args.score:
        report["val_tokens"] = len(subject.val.bytes)
        for row in quality(subject, args.methods, budget(), args.also):
            add("quality", row)
    print("\n".join(document(report)), flush=True)
    return int(any("error" in row for row in report["sizes"]))
