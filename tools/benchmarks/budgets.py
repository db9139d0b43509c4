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
    best = None
    before = None  # (x, bytes) of the last try
    slope = per_octave
    for _ in range(10):
        taken, result = encode_at(x)
        if best is None or abs(taken - size) < abs(best[1] - size):
            best = x, taken, result
        if abs(taken - size) <= max(TOLERANCE * size, 8):
            break
        if before and before[0] != x:
            secant = (taken - before[1]) / (x - before[0])
            if secant < 0.1 * per_octave:
                slope = secant
        before = x, taken
        step = (size - taken) / slope
        x += min(max(step, -2), 2)
    return best


def at_size(subject, s, size):
    """(bytes, encoded, value of the knob) of settings whose knob is continuous, at `size` bytes."""
    if knob(s) == "spacing":
        return by_spacing(subject, s, size)
    return by_sigmas(subject, s, size)


def by_spacing(subject, s, size):
    """at_size() of FIT=allocate."""
    quantiser = subject.quantiser(s)

    def encode_at(x):
        encoded = quantiser.encode(2**x)
        return subject.size(encoded), (encoded, 2**x)

    first_guess = math.log2(quantiser.spacing_for(size))
    _, taken, (encoded, spacing) = solve(encode_at, first_guess, size, -quantiser.quantised / 8)
    return taken, encoded, spacing


def by_sigmas(subject, s, size):
    """at_size() of SDClip: one factor on the multiples at which all matrices are clipped."""
    def encode_at(x):
        sigmas = {name: min(getattr(s, name) * 2**x, 100.0) for name in CLIP_SETTINGS}
        encoded = subject.quantiser(dataclasses.replace(s, **sigmas)).encode()
        return subject.size(encoded), (encoded, sigmas["matrix_clip_sigmas"])

    _, taken, (encoded, sigmas) = solve(encode_at, 0.0, size, -subject.quantiser(s).quantised / 8)
    return taken, encoded, sigmas


def at_size_by_tensor(subject, s, size):
    """at_size() with a k of its own for each clipped tensor: those of least felt error at `size` bytes.

    At each of TRIED_STEPS the coder takes bytes for a tensor and, after GPTQ, the loss feels an error. Between them
    bytes and the log of the felt error are straight lines over the log of the step. The price of a byte falls until all
    bytes are spent (Lagrange); a factor on all k, close to 1, then meets the size. The entropy in place of the coder
    cost 2 %.
    """
    stores = subject.clipped(s)
    steps, curves = cost_curves(subject, s, stores)

    def encode_at(x):
        scaled = {name: k * 2**x for name, k in sigmas.items()}
        encoded = subject.encode_clipped(s, scaled)
        return subject.size(encoded), (encoded, scaled)

    other_bytes = 0  # of everything but these codes, less what coding them together saves
    for _ in range(3):
        chosen, code_bytes = cheapest_steps(curves, size - other_bytes)
        sigmas = {name: float(2 ** steps[place] * stores[name].top) for name, place in chosen.items()}
        other_bytes = encode_at(0.0)[0] - code_bytes
    _, taken, (encoded, sigmas) = solve(encode_at, 0.0, size, -subject.quantiser(s).quantised / 8)
    return taken, encoded, sigmas


def cost_curves(subject, s, stores):
    """(log2 of steps, {parameter: (bytes at each step, log2 of the felt error at each step)})."""
    measured = {name: [] for name in stores}
    for step in TRIED_STEPS:
        encoded = subject.encode_clipped(s, {name: step * store.top for name, store in stores.items()})
        for name in stores:
            _, felt = subject.error(name, encoded[name])
            measured[name].append((subject.code_bytes(name, encoded[name]), math.log2(max(felt, 1e-30))))
    tried = np.log2(TRIED_STEPS)
    steps = np.linspace(tried[0], tried[-1], 128 * len(tried))
    curves = {}
    for name, points in measured.items():
        code_bytes = [point[0] for point in points]
        log_felt = [point[1] for point in points]
        curves[name] = np.interp(steps, tried, code_bytes), np.interp(steps, tried, log_felt)
    return steps, curves


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
