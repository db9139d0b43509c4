"""Encodes a model at a given number of bytes, by the knob of each method: the spacing of grids, where they clip, or two
neighbouring widths.
"""

import dataclasses
import math

import numpy as np

TOLERANCE = 0.0005  # of a size that is to be equal
TRIED_STEPS = 2.0 ** np.arange(-6, 3.5, 0.5)  # of a tensor, in spreads of its rows
CLIP_SETTINGS = ("matrix_clip_sigmas", "attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas")


def knob(s):
    """What moves the size of a method: "spacing", "sigmas" or "bits"."""
    if s.fit == "allocate":
        return "spacing"
    return "sigmas" if s.matrix_clip_sigmas else "bits"


def solve(encode_at, x, size, per_octave):
    """(x, bytes, result): the one of encode_at(x) -> (bytes, result) nearest to `size` bytes, by secant steps in x, the
    log2 of a knob. `per_octave` is the first guess of the change of bytes per unit of x; it must be negative.
    """
    tries = []
    slope = per_octave
    for _ in range(10):
        taken, result = encode_at(x)
        tries.append((x, taken, result))
        if abs(taken - size) <= max(TOLERANCE * size, 8):
            break
        if len(tries) > 1 and tries[-2][0] != x:
            secant = (taken - tries[-2][1]) / (x - tries[-2][0])
            if secant < 0.1 * per_octave:
                slope = secant
        x += min(max((size - taken) / slope, -2), 2)
    return min(tries, key=lambda one: abs(one[1] - size))


def fit(subject, s, size, encode, first_guess=1.0):
    """(bytes, encoded, value) at `size` bytes; encode(factor) -> (encoded, value), the value of the knob."""
    def encode_at(x):
        encoded, value = encode(2**x)
        return subject.size(encoded), (encoded, value)

    per_octave = -subject.quantiser(s).quantised / 8
    _, taken, (encoded, value) = solve(encode_at, math.log2(first_guess), size, per_octave)
    return taken, encoded, value


def at_size(subject, s, size):
    """fit() of settings whose knob is continuous: FIT=allocate by the spacing, SDClip by one factor on the multiples at
    which all matrices are clipped.
    """
    if knob(s) == "spacing":
        quantiser = subject.quantiser(s)
        return fit(subject, s, size, lambda spacing: (quantiser.encode(spacing), spacing), quantiser.spacing_for(size))

    def encode(factor):
        sigmas = {name: min(getattr(s, name) * factor, 100.0) for name in CLIP_SETTINGS}
        return subject.quantiser(dataclasses.replace(s, **sigmas)).encode(), sigmas["matrix_clip_sigmas"]

    return fit(subject, s, size, encode)


def at_size_by_tensor(subject, s, size):
    """at_size() with a k of its own for each clipped tensor: those of least felt error at `size` bytes.

    At each of TRIED_STEPS the coder takes bytes for a tensor and, after GPTQ, the loss feels an error. Between them
    bytes and the log of the felt error are straight lines over the log of the step. The price of a byte falls until all
    bytes are spent (Lagrange); a factor on all k, close to 1, then meets the size. The entropy in place of the coder
    cost 2 %.
    """
    stores = {name: store for name, store in subject.quantiser(s).stores.items() if store.sigmas}
    steps, curves = cost_curves(subject, s, stores)

    def encode(factor):
        scaled = {name: k * factor for name, k in sigmas.items()}
        return subject.encode_clipped(s, scaled), scaled

    other_bytes = 0  # of everything but these codes, less what coding them together saves
    for _ in range(3):
        chosen, code_bytes = cheapest_steps(curves, size - other_bytes)
        sigmas = {name: float(2 ** steps[place] * stores[name].top) for name, place in chosen.items()}
        other_bytes = subject.size(encode(1.0)[0]) - code_bytes
    return fit(subject, s, size, encode)


def cost_curves(subject, s, stores):
    """(log2 of steps, {parameter: (bytes at each step, log2 of the felt error at each step)})."""
    measured = {name: [] for name in stores}
    for step in TRIED_STEPS:
        encoded = subject.encode_clipped(s, {name: step * store.top for name, store in stores.items()})
        for name, points in measured.items():
            felt = max(subject.felt_error(name, encoded[name]), 1e-30)
            points.append((subject.code_bytes(name, encoded[name]), math.log2(felt)))
    tried = np.log2(TRIED_STEPS)
    steps = np.linspace(tried[0], tried[-1], 128 * len(tried))
    return steps, {name: [np.interp(steps, tried, values) for values in zip(*points)]
                   for name, points in measured.items()}


def cheapest_steps(curves, room):
    """({parameter: place of its step}, bytes): the codes of least felt error that fit into `room` bytes."""
    places = {name: int(code_bytes.argmin()) for name, (code_bytes, _) in curves.items()}
    total = sum(code_bytes[places[name]] for name, (code_bytes, _) in curves.items())
    for log_price in np.arange(20, -60, -1 / 32):  # log2 of nats a byte
        for name, (code_bytes, log_felt) in curves.items():
            finer = int((2**log_felt + 2**log_price * code_bytes).argmin())
            added = code_bytes[finer] - code_bytes[places[name]]
            if added > 0 and total + added <= room:
                places[name] = finer
                total += added
    return places, total


def between(low, high, size):
    """Measures {"bytes", "gap", ...} at `size`, between two encodings: straight lines, in the log of what is positive
    in both.
    """
    share = (size - low["bytes"]) / (high["bytes"] - low["bytes"])

    def mix(a, b):
        if min(a, b) > 0:
            return math.exp((1 - share) * math.log(a) + share * math.log(b))
        return (1 - share) * a + share * b

    return {"bytes": size, **{key: mix(low[key], high[key]) for key in low if key != "bytes"}}
