"""Every parameter of the model, from the specification: its name, role, shape and initial value. Nothing here is taken
from train_gpt.py.

This is the only list of parameters in the tests. A new parameter is one row of PARAMETERS; the tests of the model, the
optimizer, quantisation and the artifact read everything from that row.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import reference as ref

TRAINED_BY = {"matrix": "muon", "embed": "adamw", "head": "adamw", "gate": "adamw", "scalar": "adamw", "cap": "nothing"}
WIDTH = {"matrix": "matrix_bits", "embed": "embed_bits", "head": "embed_bits", "gate": "gate_bits",
         "scalar": "float16", "cap": "float16"}  # the setting of the stored width


def normal(deviation):
    return "normal", deviation


class Parameter(NamedTuple):
    """One row. Two rows may share a name where a setting decides the shape or the initial value."""

    name: str  # {layer} and {head} stand for a number
    role: str  # a key of TRAINED_BY and WIDTH
    shape: str  # keys of `dimensions` or numbers; "" for a single number
    initial: object  # a number, numbers (row by row), "orthogonal", normal(...), or a function of the settings
    exists: Callable = lambda s, layer: True


ATTENTION, MLP = "blocks.{layer}.attn.", "blocks.{layer}.mlp."


def two_lanes(s):
    return s.parallel_residual in ("lanes", "routed")


PARAMETERS = [
    # tokens in and out
    Parameter("embed.weight", "embed", "V W", lambda s: normal(s.tied_embed_init_std)),
    Parameter("embed_proj.weight", "matrix", "D W", "orthogonal", lambda s, _: s.embed_dim),
    Parameter("head_proj.weight", "matrix", "W D", "orthogonal", lambda s, _: s.embed_dim),
    Parameter("head.weight", "head", "V W", 0, lambda s, _: not s.tie_embeddings),
    Parameter("caps.caps", "cap", "2", lambda s: s.logit_softcap, lambda s, _: s.asym_logit_rescale),
    Parameter("mtp.{head}.weight", "head", "V W", 0, lambda s, _: False),  # of the training objective, not of the model

    # SmearGate, BigramHash and TrigramHash, value embeddings
    Parameter("smear.gate", "scalar", "D", 0, lambda s, _: s.smear_gate == "channel"),
    Parameter("early_smear.weight", "scalar", "G", 0, lambda s, _: s.smear_gate == "scalar"),
    Parameter("early_smear.scale", "scalar", "", 0, lambda s, _: s.smear_gate == "scalar"),
    Parameter("bigram.table.weight", "embed", "B b", 0, lambda s, _: s.bigram_vocab_size),
    Parameter("bigram.proj.weight", "matrix", "D b", "orthogonal",
              lambda s, _: s.bigram_vocab_size and s.bigram_dim != s.model_dim),
    Parameter("bigram.scale", "scalar", "", 0.05, lambda s, _: s.bigram_vocab_size),
    Parameter("trigram.table.weight", "embed", "T t", 0, lambda s, _: s.trigram_vocab_size),
    Parameter("trigram.proj.weight", "matrix", "D t", "orthogonal",
              lambda s, _: s.trigram_vocab_size and s.trigram_dim != s.model_dim),
    Parameter("trigram.scale", "scalar", "", 0.03, lambda s, _: s.trigram_vocab_size),
    Parameter("value_embed.table.weight", "embed", "V E", normal(0.01), lambda s, _: s.ve_dim),
    Parameter("value_embed.proj.weight", "matrix", "K E", "orthogonal", lambda s, _: s.ve_dim),
    Parameter("value_embed.scale", "scalar", "", 0.1, lambda s, _: s.ve_dim),

    # attention
    Parameter(ATTENTION + "q.weight", "matrix", "D D", "orthogonal"),
    Parameter(ATTENTION + "k.weight", "matrix", "K D", "orthogonal"),
    Parameter(ATTENTION + "v.weight", "matrix", "K D", "orthogonal"),
    Parameter(ATTENTION + "o.weight", "matrix", "D D", 0),
    Parameter(ATTENTION + "q_gain", "scalar", "H", lambda s: s.qk_gain_init),
    Parameter(ATTENTION + "ve_scale", "scalar", "", 1, lambda s, layer: s.ve_dim and layer in s.ve_layers),
    Parameter(ATTENTION + "gate.weight", "gate", "H D", normal(0.01), lambda s, _: s.attn_gate == "dense"),
    Parameter(ATTENTION + "gate.weight", "gate", "H G", 0, lambda s, _: s.attn_gate in ("head", "sparse")),
    Parameter(ATTENTION + "residual.mix", "scalar", "2", [0.5, 0.5],
              lambda s, layer: layer > 0 and s.value_residual == "pair"),
    Parameter(ATTENTION + "residual.mix", "scalar", "", 0,
              lambda s, layer: layer > 0 and s.value_residual in ("vrl", "sigmoid")),

    # MLP and residual stream
    Parameter(MLP + "up.weight", "matrix", "M D", "orthogonal"),
    Parameter(MLP + "down.weight", "matrix", "D M", 0),
    Parameter("blocks.{layer}.attn_scale", "scalar", "D", 1),
    Parameter("blocks.{layer}.mlp_scale", "scalar", "D", 1),
    Parameter("blocks.{layer}.resid_mix", "scalar", "2 D", [1, 0], lambda s, _: s.resid_mix),
    Parameter("skips.weight", "scalar", "P D", 1, lambda s, _: s.skips in ("linear", "gated")),
    Parameter("skips.weight", "scalar", "P D", 2.2, lambda s, _: s.skips == "sigmoid"),
    Parameter("skips.gate", "scalar", "P D", 0, lambda s, _: s.skips == "gated"),
    Parameter("lanes.keep", "scalar", "L 2", 1.1, lambda s, _: s.parallel_residual == "routed"),
    Parameter("lanes.write", "scalar", "L 2 2", 1, lambda s, _: s.parallel_residual == "routed"),
    Parameter("lanes.merge", "scalar", "", 0.5, lambda s, _: two_lanes(s) and s.parallel_final_lane == "learned"),
]


def dimensions(s):
    """{letter: size} of the shapes above."""
    _, _, skips = ref.halves(s, looping=True)
    return {"V": s.vocab_size, "D": s.model_dim, "L": s.num_layers, "H": s.num_heads, "G": s.gate_window,
            "W": s.embed_dim or s.model_dim, "K": s.num_kv_heads * (s.model_dim // s.num_heads),
            "M": round(s.mlp_mult * s.model_dim), "P": skips, "B": s.bigram_vocab_size, "b": s.bigram_dim,
            "T": s.trigram_vocab_size, "t": s.trigram_dim, "E": s.ve_dim}


class Expected(NamedTuple):
    """A parameter of a certain model."""

    role: str
    shape: tuple
    initial: object


def parameters_of(s):
    """{name: Expected} of a model with these settings."""
    sizes, model = dimensions(s), {}
    for row in PARAMETERS:
        shape = tuple(sizes[word] if word in sizes else int(word) for word in row.shape.split())
        initial = row.initial(s) if callable(row.initial) else row.initial
        layers = range(s.num_layers) if "{layer}" in row.name else [None]
        for layer in layers:
            if row.exists(s, layer) and 0 not in shape:
                model[row.name.format(layer=layer)] = Expected(row.role, shape, initial)
    return model


def number_of_weights(s):
    """Number of weights of a model with these settings."""
    return sum(math.prod(parameter.shape) for parameter in parameters_of(s).values())


def compare_parameters(s, model):
    """The model's parameters are those of PARAMETERS, in name and shape; if not, what to change."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    table = parameters_of(s)
    for name, shape in shapes.items():
        assert name in table, unknown(name)
        assert shape == table[name].shape, (
            f"{name} has the shape {shape}, but its row of PARAMETERS in tests/help/parameters.py says "
            f"{table[name].shape}")
    missing = sorted(table.keys() - shapes.keys())
    assert not missing, (
        f"the model lacks {', '.join(missing)}: PARAMETERS in tests/help/parameters.py says that these settings "
        f"create them")


def unknown(name):
    return (f"{name} is not in PARAMETERS of tests/help/parameters.py: add the row "
            f"Parameter({re.sub('[0-9]+', '{layer}', name)!r}, role, shape, initial value, when it exists) there")


PATTERNS = [(re.compile(re.sub(r"\\{\w+\\}", r"\\d+", re.escape(row.name))), row.role) for row in PARAMETERS]


def role_of(name):
    """Role of the parameter of this name, in the model or in the training objective around it."""
    name = name.removeprefix("model.")
    for pattern, role in PATTERNS:
        if pattern.fullmatch(name):
            return role
    raise AssertionError(unknown(name))


def trained_by(name):
    """Its optimizer with MATRIX_OPTIMIZER=muon: "muon", "adamw" or "nothing"."""
    return TRAINED_BY[role_of(name)]


def width_of(s, name):
    """Stored bits by role alone; 16 is float16. What ATTN_BITS, MLP_BITS, PROJ_BITS and LAYER_BITS change is not here."""
    setting = WIDTH[role_of(name)]
    return 16 if setting == "float16" else getattr(s, setting)
