"""The weights that `bench.py pack` stores: of a float16 artifact with curvature and text, or of any model in a file."""

import dataclasses
import json
import math
import os
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import train_gpt as trainer
from benchmarks.containers import Contents, artifact
from common import BadInput

ONE_COMPRESSOR = "rans"  # of sizes that are to be equal
DIVERGENCE_TOKENS = 16384


# ---- of an artifact -------------------------------------------------------------------------------------------------


class Artifact:
    """An artifact with the settings and the text that it is used with."""

    def __init__(self, path, words):
        self.path = str(path)
        self.words = words
        self.header = trainer.read_artifact(path).header
        self.parameters = sum(math.prod(entry.shape) for entry in self.header["tensors"])
        self.s = Artifact.settings(self)
        self.rt = trainer.Runtime(self.s)
        self.attend = trainer.pick_attention(self.s, self.rt)
        self.val = None
        self.curvature = None

    def settings(self, text=""):
        """Settings of the command line, then of a row, with the artifact's model."""
        s = trainer.Settings.parse([*self.words, *text.split()], os.environ)
        return trainer.artifact_settings(self.path, self.header, s)

    def load_model(self, path, s):
        return trainer.load_artifact(path, s, self.rt.dtype, self.attend, self.rt.device)[1]

    def load_text(self):
        """The validation text; the tokenizer must be the artifact's."""
        sp, _, self.digest = trainer.load_tokenizer(self.s)
        if self.header["tokenizer_sha256"] not in ("", self.digest):
            raise BadInput(f"{self.path} was trained with another tokenizer; set DATA_PATH or TOKENIZER_PATH")
        self.val = trainer.load_validation(self.s, self.rt, sp)

    def calibrate(self, model, s, tokens):
        """Collect curvature from at least `tokens` tokens of the training stream, from its beginning in its longest
        sequences; returns their number.
        """
        length = s.stages[-1].length
        rows = max(min(trainer.ceil_div(tokens, length), trainer.CALIBRATION_MICRO_TOKENS // length), 1)
        s = dataclasses.replace(
            s, train_seq_schedule=(), train_batch_schedule=(), train_seq_len=length, average="none",
            train_batch_tokens=rows * length, micro_batch_tokens=rows * length,
            loader="sequential" if s.loader == "packed" else s.loader)
        stream = trainer.TokenStream(trainer.find_shards(s.data_path, "train"), s, self.rt)
        meter = trainer.CurvatureMeter(model)
        while meter.tokens < tokens:
            for x, y, _ in stream.next():
                meter.observe(x, y)
        self.curvature = meter.curvature(self.rt)
        return meter.tokens


class Subject(Artifact):
    """The weights under test and everything that is decided about them."""

    def __init__(self, path, words):
        super().__init__(path, words)
        self.bytes = Path(path).stat().st_size
        for entry in self.header["tensors"]:
            if entry.codec != "float16":
                raise BadInput(f"{path}: {entry.name} is not float16 but {entry.codec}; make the artifact with FIT=off "
                               "MATRIX_BITS=16 EMBED_BITS=16")
        self.model = self.load_model(path, self.s)
        self.raw = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in self.raw.items()}
        self.factors = {}  # of Hessians, shared between settings: most of a Quantiser's time
        self.raw_predictions = None

    def quantiser(self, s):
        quantiser = trainer.Quantiser(self.model, s, self.curvature)
        quantiser.factors = self.factors
        return quantiser

    def encode_clipped(self, s, sigmas):
        """Encode by settings, but clip each parameter in `sigmas` at a multiple of its own."""
        stores = trainer.storage(self.model, s)
        stores |= {name: stores[name]._replace(sigmas=k) for name, k in sigmas.items()}
        with mock.patch.object(trainer, "storage", lambda *_: stores):
            return self.quantiser(s).encode()

    def contents(self, encoded):
        header = {key: self.header[key] for key in ("settings", "looping", "tokenizer_sha256")}
        return Contents(encoded, self.shapes, header)

    def size(self, encoded):
        """Bytes of the artifact that holds these parameters."""
        return sum(len(data) for _, data in artifact(self.contents(encoded), ONE_COMPRESSOR))

    def code_bytes(self, name, encoded):
        """Bytes of the codes of one encoded parameter, packed alone."""
        rows = trainer.stream_layout(trainer.tensor_entries({name: encoded}, self.shapes))["q"]
        return len(trainer.pack_stream(rows, {name: encoded}, ONE_COMPRESSOR))

    def error(self, name, encoded):
        """(R, C): what one encoded parameter is off by."""
        return self.raw[name].float() - encoded.decode(self.shapes[name]).to(self.rt.device)

    def felt_error(self, name, encoded):
        """Nats a token that the error of one encoded parameter costs, if it has curvature."""
        return self.curvature[name].loss(self.error(name, encoded))

    def errors(self, encoded):
        """(relative squared error, felt error in nats a token) of everything that has curvature."""
        squared = sum(self.error(name, encoded[name]).double().square().sum() for name in self.curvature)
        norm = sum(self.raw[name].double().square().sum() for name in self.curvature)
        return (squared / norm).item(), sum(self.felt_error(name, encoded[name]) for name in self.curvature)

    def score(self, model):
        """Score of a model on the validation text, in windows of EVAL_SEQ_LEN side by side."""
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
                tokens += len(now)
            return self.score(self.model), nats / tokens
        finally:
            self.model.load_state_dict(self.raw)

    def predictions(self):
        """Log-probabilities (N, V) of the model as it is, for the first targets of the validation text."""
        val = self.val
        predictor = trainer.ModelPredictor(self.model, self.rt)
        text = val._replace(tokens=val.tokens[: DIVERGENCE_TOKENS + 1], bytes=val.bytes[:DIVERGENCE_TOKENS])
        s = dataclasses.replace(self.s, eval_batch_seqs=max(4096 // self.s.eval_seq_len, 1))
        for part in trainer.contiguous_reader(text, s, self.rt):
            for chunk in part.chunks:
                yield predictor.predict(chunk.inputs)[chunk.index >= 0]

    def score_artifact(self, path):
        """(bytes, Score) of another artifact of this vocabulary."""
        header = trainer.read_artifact(path).header
        if header["tokenizer_sha256"] != self.header["tokenizer_sha256"]:
            raise BadInput(f"{path} was trained with another tokenizer than {self.path}")
        s = trainer.artifact_settings(path, header, trainer.without_model_settings(self.s))
        attend = trainer.pick_attention(s, self.rt)
        _, model = trainer.load_artifact(path, s, self.rt.dtype, attend, self.rt.device)
        return Path(path).stat().st_size, self.score(model)


# ---- of any model ---------------------------------------------------------------------------------------------------

LEAST = 16384  # weights of a matrix that is measured
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # dtypes of safetensors


def read_tensors(path):
    """[(name, tensor)] of a .safetensors or .npz file, or of what torch.load() reads without running code."""
    try:
        if path.suffix == ".npz":
            return list(read_npz(path))
        if path.suffix == ".safetensors":
            return list(read_safetensors(path))
        return list(tensors_inside("", torch.load(path, map_location="cpu", weights_only=True)))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadInput(f"{path}: its weights cannot be read ({reason}); give a .safetensors or .npz file, or a "
                       "dictionary of tensors by torch.save") from None


def read_npz(path):
    with np.load(path) as arrays:
        for name, array in arrays.items():
            if array.dtype.kind == "f":
                yield name, torch.from_numpy(array)


def read_safetensors(path):
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:begin]).items():
        count = math.prod(entry.get("shape", ()))
        if entry.get("dtype") in STORED and count:
            dtype = getattr(torch, STORED[entry["dtype"]])
            values = torch.frombuffer(data, dtype=dtype, count=count, offset=begin + entry["data_offsets"][0])
            yield name, values.view(entry["shape"])


def tensors_inside(name, value):
    """(name, tensor) of every tensor in nested dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            yield from tensors_inside(f"{name}.{key}".lstrip("."), entry)


class Loaded:
    """The matrices of a file, each once, with all axes after the first as one; for measure_sizes() in a Subject's
    place.
    """

    def __init__(self, path):
        self.path = path
        self.matrices = {}
        for name, value in read_tensors(Path(path)):
            if not value.is_floating_point() or value.ndim < 2 or value.numel() < LEAST:
                continue
            matrix = value.detach().float().flatten(1).contiguous()
            if not matrix.isfinite().all():
                raise BadInput(f"{path}: {name} is not finite; leave it out of the file")
            if not any(matrix.equal(other) for other in self.matrices.values()):  # tied
                self.matrices[name] = matrix
        if not self.matrices:
            raise BadInput(f"{path}: no matrix of floating-point numbers has {LEAST:,} weights; give a larger model")
        self.shapes = {name: tuple(matrix.shape) for name, matrix in self.matrices.items()}
        self.parameters = sum(matrix.numel() for matrix in self.matrices.values())

    def contents(self, encoded):
        return Contents(encoded, self.shapes, {})

    def encode(self, bits, sigmas):
        """Round to nearest on a grid that SDClip makes."""
        encoded = {}
        for name, matrix in self.matrices.items():
            scale = trainer.row_scales(matrix, bits, "rtn", sigmas)
            q = trainer.round_to_grid(matrix, scale.float()[:, None], trainer.largest_code(bits)).to(torch.int8)
            encoded[name] = trainer.Encoded("int", bits, 0, 0, {"q": q, "scale": scale})
        return encoded
