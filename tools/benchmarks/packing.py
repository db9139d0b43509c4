"""Measures what each way of storing a model costs: bytes, time and memory of codecs and compressors; the loss of each
method at equal bytes.

The weights are those of an artifact that holds them as float16 (tools/README.md says how to make one). The settings
name the data: training text for the curvature by which GPTQ and FIT=allocate go, and validation text for the loss. With
--weights they are the matrices of any model, rounded by SDClip, which asks for no text: only their bytes are measured.
"""

import argparse
import dataclasses
import itertools
import math
import shutil
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

import train_gpt as trainer
from benchmarks import harness
from benchmarks.budgets import at_size, at_size_by_tensor, between, knob
from benchmarks.containers import CONTAINERS, PLAIN, measure_container
from benchmarks.weights import DIVERGENCE_TOKENS, LEAST, ONE_COMPRESSOR, Loaded, Subject
from common import BadInput, names_of, positive, whole
from tables import Column, section

# How weights are stored, as settings of train_gpt.py: METHODS have a width or a knob still to choose, ROWS have it
# chosen.
BY_TENSOR = "GPTQ + SDClip (one k a tensor)"  # from the curvature; int8, so that no step is too small for its range
SDCLIP = "FIT=off MATRIX_QUANT=gptq MATRIX_BITS=6 MATRIX_CLIP_SIGMAS=12.85 EMBED_QUANT=gptq"
SDCLIP_TABLES = "EMBED_BITS=8 EMBED_CLIP_SIGMAS=20"
METHODS = {
    "RTN": "FIT=off MATRIX_QUANT=rtn EMBED_QUANT=rtn EMBED_BITS=8",
    "GPTQ-lite": "FIT=off MATRIX_QUANT=gptq_lite EMBED_QUANT=gptq_lite EMBED_BITS=8",
    "GPTQ + percentile": "FIT=off MATRIX_QUANT=gptq EMBED_QUANT=gptq EMBED_BITS=8",
    "GPTQ + SDClip": f"{SDCLIP} {SDCLIP_TABLES}",
    "GPTQ + SDClip + LQER": f"{SDCLIP} {SDCLIP_TABLES} LQER_RANK=4 LQER_TOP_K=3",
    BY_TENSOR: f"FIT=off MATRIX_QUANT=gptq MATRIX_BITS=8 MATRIX_CLIP_SIGMAS=20 EMBED_QUANT=gptq {SDCLIP_TABLES}",
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
    "GPTQ + SDClip embeddings int7": f"{SDCLIP} EMBED_BITS=7 EMBED_CLIP_SIGMAS=15",
    **{name: METHODS[name] for name in ("GPTQ + SDClip + LQER", "allocated RTN", "allocated GPTQ",
                                        "allocated GPTQ + LQER")},
}


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
    spreads = torch.exp2(torch.arange(-32, 57, dtype=torch.float64) / 8)
    edges = (torch.arange(129, dtype=torch.float64) - 0.5)[:, None] / spreads
    tail = torch.special.log_ndtr(-edges)  # log of the share above each edge
    cost = -(tail[:-1] + torch.log1p(-torch.exp(tail[1:] - tail[:-1])))  # of a magnitude, with its sign
    cost[0] = -torch.log1p(-2 * torch.exp(tail[1]))
    magnitudes = np.abs(q.astype(np.int64)) + 128 * np.arange(len(q))[:, None]
    counts = torch.from_numpy(np.bincount(magnitudes.ravel(), minlength=128 * len(q)).reshape(-1, 128)).double()
    return float((counts @ cost).amin(1).sum()) / math.log(2) / 8


# ---- codes and sizes ------------------------------------------------------------------------------------------------


def encode_row(subject, name, budget):
    """(encoded, spacing) of a row. FIT=allocate, which has no size of its own, fills `budget()` bytes."""
    s = subject.settings(ROWS[name])
    if knob(s) == "spacing":
        _, encoded, spacing = at_size(subject, s, budget())
        return encoded, spacing
    return subject.quantiser(s).encode(), None


def code_row(name, encoded, **facts):
    """A row of the table of codes: what they are before any compressor sees them."""
    codes = [one.arrays[part].numpy() for one in encoded.values() for part in trainer.CODED if part in one.arrays]
    return {
        "table": "codes",
        "row": name,
        **facts,
        "codes": sum(one.arrays["q"].numel() for one in encoded.values() if "q" in one.arrays),
        "tensor_entropy_bytes": sum(map(tensor_entropy, codes)) if codes else None,
        "row_entropy_bytes": sum(map(row_entropy, codes)) if codes else None,
    }


def measure_sizes(subject, row, encoded, names, folder):
    """A row of the table of sizes for each container, one after the other."""
    contents = subject.contents(encoded)
    for name in names:
        result = {"table": "sizes", "row": row, "compressor": name}
        if name.startswith("lrzip") and not shutil.which("lrzip"):
            yield result | {"skipped": "lrzip is not installed"}
            continue
        harness.progress(f"measuring {row} with {name}")
        job = {"folder": folder, "contents": contents, "container": name}
        result |= harness.measure_apart(measure_container, job)
        if "bytes" in result:
            result["bits_per_weight"] = 8 * result["bytes"] / subject.parameters
        yield result


# ---- quality --------------------------------------------------------------------------------------------------------


def quality_row(subject, name, size, raw):
    """What a method costs at `size` bytes."""
    s = subject.settings(METHODS[name])
    if knob(s) == "bits":
        return quality_between_widths(subject, s, size, raw)
    fit = at_size_by_tensor if name == BY_TENSOR else at_size
    taken, encoded, value = fit(subject, s, size)
    if abs(taken - size) > 0.01 * size:
        return {"skipped": f"it cannot take {size:,} bytes; {taken:,} bytes are the nearest that was tried"}
    row = {"knob": knob(s), "value": value, **quality_of(subject, encoded, taken, raw)}
    if knob(s) == "spacing":
        row["predicted_gap"] = subject.quantiser(s).quantised * value**2 / 24
    return row


def quality_of(subject, encoded, taken, raw):
    """What encoded weights cost against the raw ones."""
    score, divergence = subject.score_encoded(encoded)
    _, felt_error = subject.errors(encoded)
    return {"bytes": taken, "gap": score.loss - raw.loss, "divergence": divergence, "felt_error": felt_error}


def quality_between_widths(subject, s, size, raw):
    """quality_row() of a method that has only widths: between the two neighbours on either side of `size` bytes."""
    @cache
    def encode(bits):
        encoded = subject.quantiser(dataclasses.replace(s, matrix_bits=bits)).encode()
        return subject.size(encoded), encoded

    low = 5
    while encode(low)[0] > size and low > WIDTHS[0]:
        low -= 1
    while encode(low + 1)[0] < size and low + 1 < WIDTHS[-1]:
        low += 1
    ends = [encode(bits) for bits in (low, low + 1)]
    if not ends[0][0] <= size <= ends[1][0]:
        return {"skipped": f"{size:,} bytes are outside of what {WIDTHS[0]} to {WIDTHS[-1]} bits take "
                           f"({ends[0][0]:,} to {ends[1][0]:,} bytes tried)"}
    ends = [quality_of(subject, encoded, taken, raw) for taken, encoded in ends]
    return {"knob": "bits", "value": [low, low + 1], "ends": ends, **between(*ends, size)}


def quality(subject, names, size, also):
    """A row for each method at `size` bytes: the raw weights first, other artifacts last."""
    raw = subject.score(subject.model)
    bpb_per_nat = raw.bpb / raw.loss  # on this text

    def complete(name, row):
        if "gap" in row:
            row = {
                "bits_per_weight": 8 * row["bytes"] / subject.parameters,
                "loss": raw.loss + row["gap"],
                "bpb": raw.bpb + row["gap"] * bpb_per_nat,
                "gap_bpb": row["gap"] * bpb_per_nat,
                **row,
            }
        return {"table": "quality", "method": name, **row}

    yield complete("raw weights", {"bytes": subject.bytes, "gap": 0.0})
    for name in names:
        harness.progress(f"scoring {name} at {size:,} bytes")
        yield complete(name, {"settings": METHODS[name], **quality_row(subject, name, size, raw)})
    for name, path in also:
        harness.progress(f"scoring {name}")
        taken, score = subject.score_artifact(path)
        yield complete(name, {"bytes": taken, "gap": score.loss - raw.loss, "also": path})


# ---- the report -----------------------------------------------------------------------------------------------------


NAME = Column("weights as", "row")
CODE_COUNTS = (
    Column("codes", "codes", ",.0f"),
    Column("entropy by tensor, bytes", "tensor_entropy_bytes", ",.0f"),
    Column("by row's Gaussian, bytes", "row_entropy_bytes", ",.0f"),
)
LOADED_COLUMNS = (NAME, Column("matrices", "matrices", ",.0f"), *CODE_COUNTS)
CODE_COLUMNS = (
    NAME,
    Column("squared error", "squared_error", ".3e"),
    Column("felt error, nats", "felt_error", ".5f"),
    *CODE_COUNTS,
    Column("settings", lambda row: f"`{row['settings']}`"),
)


def size_columns(report):
    """Columns of sizes, which are compared with the entropies of the codes."""
    facts = {row["row"]: row for row in report.table("codes")}

    def over(entropy, row):
        least = facts[row["row"]][entropy]
        return row["code_bytes"] / least - 1 if row["code_bytes"] and least else None

    return (
        NAME,
        Column("compressor", "compressor"),
        Column("bytes", "bytes", ",.0f"),
        Column("bits/weight", "bits_per_weight", ".3f"),
        Column("codes, bytes", "code_bytes", ",.0f"),
        Column("over entropy by tensor", partial(over, "tensor_entropy_bytes"), "+.2%"),
        Column("over row's Gaussian", partial(over, "row_entropy_bytes"), "+.2%"),
        Column("pack, CPU s", "pack_seconds", ",.2f"),
        Column("unpack, CPU s", "unpack_seconds", ",.2f"),
        Column("peak MiB", lambda row: max(row["pack_memory_mib"], row["unpack_memory_mib"]), ",.0f"),
    )


def how_met(row):
    """How the size of a row of --score was met."""
    match row.get("knob"), row.get("value"):
        case "bits", (low, high):
            return f"between int{low} and int{high}"
        case "spacing", spacing:
            return f"spacing {spacing:.4g}"
        case "sigmas", dict(by_tensor):
            return f"k = {min(by_tensor.values()):.4g} to {max(by_tensor.values()):.4g}"
        case "sigmas", k:
            return f"k = {k:.4g}"
    return "as it is"


QUALITY_COLUMNS = (
    Column("method", "method"),
    Column("bytes", "bytes", ",.0f"),
    Column("bits/weight", "bits_per_weight", ".3f"),
    Column("loss", "loss", ".5f"),
    Column("BPB", "bpb", ".5f"),
    Column("gap, nats", "gap", "+.5f"),
    Column("gap, BPB", "gap_bpb", "+.5f"),
    Column("divergence, nats", "divergence", ".5f"),
    Column("felt error, nats", "felt_error", ".5f"),
    Column("predicted, nats", "predicted_gap", ".5f"),
    Column("how the size was met", how_met),
)


def document(report):
    """Lines of the report."""
    r = report
    yield from r.title()
    if "artifact" in r:
        yield (f"weights   {r['artifact']}: {r['parameters']:,} parameters, {r['artifact_bytes']:,} bytes; on "
               f"{r['device']}, {r.software()}")
        yield f"moments   of {r['calibration_tokens']:,} training tokens, in {r['calibration_seconds']:,.1f} s"
        if r["budget_bytes"]:
            yield f"budget    {r['budget_bytes']:,} bytes by {ONE_COMPRESSOR}, {r['budget_from']}"
        columns = CODE_COLUMNS
        text = "Squared error: of the weights' squares; felt error: half the sum of gain E H E^T."
    else:
        yield f"on        {r.software()}"
        columns = LOADED_COLUMNS
        text = f"Matrices of at least {LEAST:,} weights, rounded to nearest by SDClip."
    yield from section(f"Codes\n\n{text}", columns, r.table("codes"))
    before = max((row.get("memory_before_mib", 0) for row in r.table("sizes")), default=0)
    yield from section(
        "Sizes\n\nSeconds are CPU time; peak memory is that of a process of its own, of which Python, torch and the "
        f"codes are {before:,.0f} MiB before anything is packed.", size_columns(r), r.table("sizes"))
    if "val_tokens" not in r:
        return
    yield from section(
        f"Quality at equal bytes\n\n{r['val_tokens']:,} validation tokens in windows of {r['eval_seq_len']:,}. Methods "
        "that have only widths (of matrices; tables are int8): between two of them log(gap) is taken as a straight "
        "line in bytes. Divergence: of the predictions from those of the raw weights, on the first "
        f"{DIVERGENCE_TOKENS:,} tokens at most, without the chance that moves the loss. Predicted: spacing^2/24 a "
        "weight.", QUALITY_COLUMNS, r.table("quality"))


# ---- the command ----------------------------------------------------------------------------------------------------

CLIPS = "5:12.85,6:12.85,7:15,8:20"  # of --weights, as bits:k; the contest's except for the first
ONLY_WITH_SCORE = ("methods", "val_tokens", "also")
ONLY_WITH_ARTIFACT = ("rows", "calibration_tokens", "budget", "score", *ONLY_WITH_SCORE)


def named(text):
    """A converter of NAME=ARTIFACT to a pair."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise BadInput(f"--also {text}: not NAME=ARTIFACT")
    return name, path


def clips(text):
    """A converter of BITS:K,... to pairs of numbers."""
    pairs = []
    for part in text.split(","):
        bits, colon, k = part.partition(":")
        if not colon or bits not in map(str, WIDTHS):
            widths = f"{WIDTHS[0]} to {WIDTHS[-1]} bits"
            raise argparse.ArgumentTypeError(f"{part!r} is not BITS:K with {widths}, as 6:12.85")
        pairs.append((int(bits), positive(k)))
    return pairs


def arguments(argv):
    parser = harness.parser_of("pack", """Store the weights of a float16 artifact in every way there is: the bytes, the
        error, the entropy of the codes, time and memory of packing and unpacking; with --score the loss of each method
        at equal bytes.""", f"""Rows: {'; '.join(ROWS)}. Compressors, the first {len(PLAIN)} by default and all of them
        for the row {REFERENCE}: {'; '.join(CONTAINERS)}. "columns": the codes of a matrix column by column; "kinds": a
        stream of codes for each kind of matrix; "torch.save": the containers of the contest's records; "lrzip": that of
        #1855, where the program is installed. Methods of --score: {'; '.join(METHODS)}.""")
    add = parser.add_argument
    add("artifact", nargs="?", metavar="ARTIFACT", help="artifact whose weights are float16")
    add("settings", nargs="*", metavar="@FILE|KEY=VALUE", help="settings of train_gpt.py: DATA_PATH, TRAIN_SEQ_LEN, "
        "EVAL_SEQ_LEN, GPTQ_DAMP, ...")
    add("--rows", type=names_of("--rows", ROWS, none=True), metavar="NAME,...",
        help="rows of the tables of codes and sizes (default: all, with --methods none), or none")
    add("--compressors", type=names_of("--compressors", [*CONTAINERS, "all"]), metavar="NAME,...",
        help="of every row; or all")
    add("--calibration-tokens", type=whole(1), default=65536, metavar="N", help="of the moments (default: 65536)")
    add("--budget", type=whole(1), metavar="BYTES", help=f"of what fits any size (default: those of {REFERENCE})")
    add("--score", action="store_true", help="score each method at the budget")
    add("--methods", type=names_of("--methods", METHODS), metavar="NAME,...",
        help="what --score scores (default: all)")
    add("--val-tokens", **harness.VAL_TOKENS)
    add("--also", type=named, action="append", default=[], metavar="NAME=ARTIFACT", help="another artifact to score")
    add("--weights", action="append", default=[], metavar="FILE", help="instead of ARTIFACT: the matrices of any "
        f"model, from {LEAST:,} weights, in a .safetensors or .npz file or one of torch.save; may be given again")
    add("--clips", type=clips, metavar="BITS:K,...", help=f"what SDClip rounds --weights to (default: {CLIPS})")
    args = parser.parse_intermixed_args(argv)
    if not args.weights and not args.artifact:
        parser.error("ARTIFACT is missing")
    if args.artifact and args.weights:
        parser.error(f"--weights stands instead of {args.artifact} and of settings; leave one of them out")
    for names, is_idle, where in ((("clips",), args.artifact, "without --weights"),
                                  (ONLY_WITH_ARTIFACT, args.weights, "with --weights"),
                                  (ONLY_WITH_SCORE, not args.score, "without --score")):
        for name in names:
            if is_idle and getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} does nothing {where}")
    if args.rows is None:
        args.rows = [] if args.methods else list(ROWS)
    if not (args.rows or args.score or args.weights):
        parser.error("--rows none leaves nothing to measure; add --score")
    args.methods = args.methods or list(METHODS)
    args.clips = args.clips or clips(CLIPS)
    return args


def run_loaded(args):
    """`bench.py pack --weights`."""
    names = compressors_of(args, [*PLAIN, "lrzip", "lrzip kinds columns"])
    with harness.Report(args, document, "") as report:
        for loaded, (bits, k) in itertools.product(map(Loaded, args.weights), args.clips):
            name = f"{Path(loaded.path).name} int{bits}, k = {k:g}"
            encoded = loaded.encode(bits, k)
            codes = {parameter: one.arrays["q"].numpy() for parameter, one in encoded.items()}
            tensors = [{"name": parameter, "shape": q.shape, "entropy_bytes": tensor_entropy(q)}
                       for parameter, q in codes.items()]
            report.add(code_row(name, encoded, weights=loaded.path, matrices=len(tensors), tensors=tensors))
            report.add_all(measure_sizes(loaded, name, encoded, names, args.folder))
    return report


def run(args):
    """`bench.py pack`; returns the Report."""
    if args.weights:
        return run_loaded(args)
    subject = Subject(args.artifact, [*args.settings, f"VAL_TOKENS={args.val_tokens}"])
    if args.score:
        subject.load_text()
    harness.progress("collecting moments")
    began = time.perf_counter()
    tokens = subject.calibrate(subject.model, subject.s, args.calibration_tokens)
    report = harness.Report(
        args, document, subject.s.text(),
        artifact=args.artifact,
        artifact_bytes=subject.bytes,
        parameters=subject.parameters,
        device=subject.rt.device_name(),
        calibration_tokens=tokens,
        calibration_seconds=time.perf_counter() - began,
        budget_bytes=args.budget,
        budget_from="as given",
        val_tokens=len(subject.val.bytes) if args.score else args.val_tokens,
        eval_seq_len=subject.s.eval_seq_len,
    )

    def budget():
        if report["budget_bytes"] is None:
            encoded, _ = encode_row(subject, REFERENCE, None)
            report.update(budget_bytes=subject.size(encoded), budget_from=f"those of {REFERENCE}")
        return report["budget_bytes"]

    with report:
        for name in args.rows:
            harness.progress(f"encoding {name}")
            encoded, spacing = encode_row(subject, name, budget)
            squared_error, felt_error = subject.errors(encoded)
            report.add(code_row(name, encoded, settings=ROWS[name], spacing=spacing, squared_error=squared_error,
                                felt_error=felt_error))
            names = compressors_of(args, CONTAINERS if name == REFERENCE else PLAIN)
            report.add_all(measure_sizes(subject, name, encoded, names, args.folder))
        if args.score:
            report.add_all(quality(subject, args.methods, budget(), args.also))
    return report


def compressors_of(args, usual):
    """Names of the containers of a row."""
    names = args.compressors or usual
    return CONTAINERS if "all" in names else names
