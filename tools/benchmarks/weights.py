"""The weights that `bench.py pack` stores: of a float16 artifact with curvature and text, or of any model in a file."""

import dataclasses
import json
import math
import os
import pickle
import time
from pathlib import Path

import numpy as np

from benchmarks.containers import Contents, own_chunks
from common import BadInput, load_trainer

ONE_COMPRESSOR = "rans"  # of sizes that are to be equal
DIVERGENCE_TOKENS = 16384
CODEC = 2  # place of the codec in a row of an artifact's table of tensors


# ---- of an artifact -------------------------------------------------------------------------------------------------


class Artifact:
    """An artifact with the settings and the text that it is used with.

    Relied on: Settings.parse; read_artifact, artifact_settings, load_artifact; Runtime, pick_attention; load_tokenizer,
    load_validation.
    """

    def __init__(self, path, words):
        trainer = self.trainer = load_trainer()
        self.path = str(path)
        self.words = words
        self.header = trainer.read_artifact(path)[0]
        self.parameters = sum(math.prod(shape) for _, shape, *_ in self.header["tensors"])
        self.s = self.plain_settings()
        self.rt = trainer.Runtime(self.s)
        self.attend = trainer.pick_attention(self.s, self.rt)
        self.val = None

    def plain_settings(self, text=""):
        """Settings of the command line, then of a row, with the artifact's model."""
        s = self.trainer.Settings.parse([*self.words, *text.split()], os.environ)
        return self.trainer.artifact_settings(self.path, self.header, s)

    def load_model(self, path, s):
        return self.trainer.load_artifact(path, s, self.rt.dtype, self.attend, self.rt.device)[1]

    def load_text(self):
        """The validation text; the tokenizer must be the artifact's."""
        sp, _, self.digest = self.trainer.load_tokenizer(self.s)
        if self.header["tokenizer_sha256"] not in ("", self.digest):
            raise BadInput(f"{self.path} was trained with another tokenizer; set DATA_PATH or TOKENIZER_PATH")
        self.val = self.trainer.load_validation(self.s, self.rt, sp)


class Subject(Artifact):
    """The weights under test and everything that is decided about them. Outside of the containers, only this class,
    its base, Loaded and collect_curvature() call the trainer.

    Relied on: Settings.text and the fields of packing; model_fields; find_shards, TokenStream(paths, s, rt).next();
    CurvatureMeter(model) with .observe(x, y) .tokens .curvature(rt); Quantiser(model, s, curvature) with
    .encode(spacing) .spacing_for(bytes) .quantised .stores and .groups (rewritten where each tensor has its own clip)
    and .factors (shared between settings: most of its time); pack().buffers; ModelPredictor, contiguous_reader, score,
    Validity; of Loaded: row_scales, round_to_grid. The containers: Encoded, tensor_entries, stream_layout,
    pack_stream, code_groups, decode_codes, decompress, _unplanes, _kind, COMPRESSORS.
    """

    def __init__(self, path, words):
        super().__init__(path, words)
        self.bytes = Path(path).stat().st_size
        for row in self.header["tensors"]:
            if row[CODEC] != "float16":
                raise BadInput(f"{path}: {row[0]} is not float16 but {row[CODEC]}; make the artifact with FIT=off "
                               "MATRIX_BITS=16 EMBED_BITS=16")
        self.model = self.load_model(path, self.s)
        self.raw = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in self.raw.items()}
        self.factors = {}
        self.curvature = None
        self.raw_predictions = None

    settings = Artifact.plain_settings

    def calibrate(self, tokens):
        """Collect curvature from at least `tokens` tokens of the training stream; returns (tokens, seconds)."""
        began = time.perf_counter()
        self.curvature, counted = collect_curvature(self.trainer, self.model, self.s, self.rt, tokens)
        return counted, time.perf_counter() - began

    def quantiser(self, s):
        quantiser = self.trainer.Quantiser(self.model, s, self.curvature)
        quantiser.factors = self.factors
        return quantiser

    def clipped(self, s):
        """{parameter: Store} of those that settings clip at a multiple of the spread of their rows."""
        return {name: store for name, store in self.quantiser(s).stores.items() if store.sigmas}

    def encode_clipped(self, s, sigmas):
        """Encode by settings, but clip each parameter in `sigmas` at a multiple of its own."""
        quantiser = self.quantiser(s)
        for name, k in sigmas.items():
            quantiser.stores[name] = quantiser.stores[name]._replace(sigmas=k)
        groups = {}
        for (shape, _), names in quantiser.groups.items():
            for name in names:
                groups.setdefault((shape, quantiser.stores[name]), []).append(name)
        quantiser.groups = groups
        return quantiser.encode()

    def contents(self, encoded):
        header = {key: self.header[key] for key in ("settings", "looping", "tokenizer_sha256")}
        return Contents(encoded, self.shapes, header)

    def size(self, encoded):
        """Bytes of the artifact that holds these parameters."""
        chunks = own_chunks(self.trainer, self.contents(encoded), ONE_COMPRESSOR)
        return sum(len(data) for _, data in chunks)

    def code_bytes(self, name, encoded):
        """Bytes of the codes of one encoded parameter, packed alone."""
        rows = self.trainer.stream_layout(self.trainer.tensor_entries({name: encoded}, self.shapes))["q"]
        return len(self.trainer.pack_stream(rows, {name: encoded}, ONE_COMPRESSOR))

    def error(self, name, encoded):
        """(squared error, felt error in nats a token) of one encoded parameter that has curvature."""
        hessian, gain, *_ = self.curvature[name]
        error = self.raw[name].float() - encoded.decode(self.shapes[name]).to(self.rt.device)
        felt_by_row = ((error @ hessian.float()) * error).double().sum(1)
        felt = 0.5 * (gain.double() @ felt_by_row).item()
        return error.double().square().sum().item(), felt

    def errors(self, encoded):
        """(relative squared error, felt error in nats a token) of everything that has curvature."""
        errors = [self.error(name, encoded[name]) for name in self.curvature]
        squared = sum(error for error, _ in errors)
        felt = sum(error for _, error in errors)
        norm = sum(self.raw[name].double().square().sum().item() for name in self.curvature)
        return squared / norm, felt

    def score(self, model):
        """Score of a model on the validation text, in windows of EVAL_SEQ_LEN side by side."""
        trainer = self.trainer
        validity = trainer.Validity()
        parts = trainer.contiguous_reader(self.val, self.s, self.rt)
        score = trainer.score(trainer.ModelPredictor(model, self.rt), parts, self.val, self.rt, validity)
        if validity.reasons:
            raise BadInput(f"the score is not valid: {validity.reasons[0]}")
        return score

    def score_encoded(self, encoded):
        """(Score, divergence) of the model with these weights. The divergence is that of its predictions from those of
        the raw weights, in nats a token of the first DIVERGENCE_TOKENS: what the loss rises by, without chance. The
        loss itself also moves by the slope of the text along the error, either way.
        """
        if self.raw_predictions is None:
            self.raw_predictions = list(self.predictions())
        self.model.load_state_dict({name: one.decode(self.shapes[name]) for name, one in encoded.items()})
        try:
            nats = 0.0
            tokens = 0
            for raw, now in zip(self.raw_predictions, self.predictions(), strict=True):
                nats += (raw.exp() * (raw - now)).sum().item()
                tokens += now[..., 0].numel()
            return self.score(self.model), nats / tokens
        finally:
            self.model.load_state_dict(self.raw)

    def predictions(self):
        """Log-probabilities (N, V) of the model as it is, for the first targets of the validation text."""
        val = self.val
        predictor = self.trainer.ModelPredictor(self.model, self.rt)
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
        defaults = {field.name: field.default for field in self.trainer.model_fields()}
        s = self.trainer.artifact_settings(path, header, dataclasses.replace(self.s, **defaults))
        attend = self.trainer.pick_attention(s, self.rt)
        model = self.trainer.load_artifact(path, s, self.rt.dtype, attend, self.rt.device)[1]
        return Path(path).stat().st_size, self.score(model)


def collect_curvature(trainer, model, s, rt, tokens):
    """({parameter: Curvature}, tokens): from the beginning of the training stream in its longest sequences."""
    length = s.stages[-1][1]
    rows = max(min(-(-tokens // length), trainer.CALIBRATION_MICRO_TOKENS // length), 1)
    s = dataclasses.replace(s, train_seq_schedule=(), train_batch_schedule=(), train_seq_len=length, average="none",
                            train_batch_tokens=rows * length, micro_batch_tokens=rows * length,
                            loader="sequential" if s.loader == "packed" else s.loader)
    stream = trainer.TokenStream(trainer.find_shards(s.data_path, "train"), s, rt)
    meter = trainer.CurvatureMeter(model)
    while meter.tokens < tokens:
        for x, y, _ in stream.next():
            meter.observe(x, y)
    return meter.curvature(rt), meter.tokens


# ---- of any model ---------------------------------------------------------------------------------------------------

LEAST = 16384  # weights of a matrix that is measured
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # dtypes of safetensors


def read_tensors(path):
    """[(name, tensor)] of a .safetensors or .npz file, or of what torch.load() reads without running code."""
    import torch

    try:
        if path.suffix == ".npz":
            return read_npz(path)
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        return list(tensors_inside("", torch.load(path, map_location="cpu", weights_only=True)))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(f"{path}: its weights cannot be read ({lines[0]}); give a .safetensors or .npz file, or a "
                       "dictionary of tensors by torch.save") from None


def read_npz(path):
    import torch

    with np.load(path) as arrays:
        floats = [name for name in arrays.files if arrays[name].dtype.kind == "f"]
        return [(name, torch.from_numpy(arrays[name])) for name in floats]


def read_safetensors(path):
    import torch

    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    tensors = []
    for name, entry in json.loads(data[8:begin]).items():
        if entry.get("dtype") not in STORED:
            continue
        count = math.prod(entry["shape"])
        if count:
            dtype = getattr(torch, STORED[entry["dtype"]])
            offset = begin + entry["data_offsets"][0]
            values = torch.frombuffer(data, dtype=dtype, count=count, offset=offset)
            tensors.append((name, values.view(entry["shape"])))
    return tensors


def tensors_inside(name, value):
    """(name, tensor) of every tensor in nested dictionaries, lists and tuples."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            yield from tensors_inside(f"{name}.{key}".lstrip("."), entry)


class Loaded:
    """The matrices of a file, each once, with all axes after the first as one; for measure_row() in a Subject's place.
    """

    def __init__(self, path):
        self.trainer = load_trainer()
        self.path = path
        self.matrices = {}
        for name, value in read_tensors(Path(path)):
            is_matrix = value.is_floating_point() and value.ndim >= 2
            if not is_matrix or value.numel() < LEAST:
                continue
            matrix = value.detach().float().flatten(1).contiguous()
            if not matrix.isfinite().all():
                raise BadInput(f"{path}: {name} is not finite; leave it out of the file")
            is_tied = any(matrix.equal(other) for other in self.matrices.values())
            if not is_tied:
                self.matrices[name] = matrix
        if not self.matrices:
            raise BadInput(f"{path}: no matrix of floating-point numbers has {LEAST:,} weights; give a larger model")
        self.shapes = {name: tuple(matrix.shape) for name, matrix in self.matrices.items()}
        self.parameters = sum(matrix.numel() for matrix in self.matrices.values())

    def contents(self, encoded):
        return Contents(encoded, self.shapes, {})

    def encode(self, bits, sigmas):
        """Round to nearest on a grid that SDClip makes."""
        import torch

        trainer = self.trainer
        encoded = {}
        for name, matrix in self.matrices.items():
            scale = trainer.row_scales(matrix, bits, "rtn", sigmas)
            q = trainer.round_to_grid(matrix, scale.float()[:, None], 2 ** (bits - 1) - 1).to(torch.int8)
            encoded[name] = trainer.Encoded("int", bits, 0, 0, {"q": q, "scale": scale})
        return encoded
