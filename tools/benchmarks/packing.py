"""Measures what each way of storing a model costs: bytes, time and memory of codecs and compressors; the loss of each
method at equal bytes.

The weights are those of an artifact that holds them as float16, which PHASES=train FIT=off MATRIX_BITS=16 EMBED_BITS=16
makes (if it is over SIZE_LIMIT, the file is kept). The settings name the data (DATA_PATH, TRAIN_SEQ_LEN, EVAL_SEQ_LEN):
training text for the curvature by which GPTQ and FIT=allocate go, and validation text for the loss. With --weights they
are those of any trained model that a file holds: its matrices are rounded by SDClip, which asks for no text, and only
the bytes of the codes are measured.
"""

import argparse
import dataclasses
import itertools
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.budgets import at_size, at_size_by_tensor, between, knob
from benchmarks.containers import CONTAINERS, PLAIN, measure_container, save_contents
from benchmarks.harness import measure_apart
from benchmarks.reports import Report, add_val_tokens, parser_of, progress
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
    import torch

    spreads = torch.exp2(torch.arange(-32, 57, dtype=torch.float64) / 8)
    edges = (torch.arange(129, dtype=torch.float64) - 0.5)[:, None] / spreads
    tail = torch.special.log_ndtr(-edges)  # log of the share above each edge
    cost = -(tail[:-1] + torch.log1p(-torch.exp(tail[1:] - tail[:-1])))  # of a magnitude, with its sign
    cost[0] = -torch.log1p(-2 * torch.exp(tail[1]))
    magnitudes = np.abs(q.astype(np.int64)) + 128 * np.arange(len(q))[:, None]
    counts = torch.from_numpy(np.bincount(magnitudes.ravel(), minlength=128 * len(q)).reshape(-1, 128)).double()
    return float((counts @ cost).amin(1).sum()) / math.log(2) / 8


# ---- sizes ----------------------------------------------------------------------------------------------------------


def encode_row(subject, name, budget):
    """(encoded, spacing) of a row. FIT=allocate, which has no size of its own, fills `budget()` bytes."""
    s = subject.settings(ROWS[name])
    if knob(s) == "spacing":
        _, encoded, spacing = at_size(subject, s, budget())
        return encoded, spacing
    return subject.quantiser(s).encode(), None


def code_arrays(subject, encoded):
    """The matrices of codes of all parameters."""
    for parameter in encoded.values():
        for part in subject.trainer.CODED:
            if part in parameter.arrays:
                yield parameter.arrays[part].numpy()


def code_facts(subject, name, encoded, spacing):
    """What a row's codes are before any compressor sees them."""
    codes = list(code_arrays(subject, encoded))
    squared_error, felt_error = subject.errors(encoded)
    return {
        "row": name,
        "settings": ROWS[name],
        "spacing": spacing,
        "codes": sum(one.arrays["q"].numel() for one in encoded.values() if "q" in one.arrays),
        "squared_error": squared_error,
        "felt_error": felt_error,
        "tensor_entropy_bytes": sum(map(tensor_entropy, codes)) if codes else None,
        "row_entropy_bytes": sum(map(row_entropy, codes)) if codes else None,
    }


def loaded_facts(loaded, name, encoded):
    """code_facts() of a Loaded, which has no curvature."""
    codes = {parameter: one.arrays["q"] for parameter, one in encoded.items()}
    tensors = [{"name": parameter, "shape": q.shape, "entropy_bytes": tensor_entropy(q.numpy())}
               for parameter, q in codes.items()]
    return {
        "row": name,
        "weights": loaded.path,
        "matrices": len(tensors),
        "codes": loaded.parameters,
        "tensor_entropy_bytes": sum(tensor["entropy_bytes"] for tensor in tensors),
        "row_entropy_bytes": sum(row_entropy(q.numpy()) for q in codes.values()),
        "tensors": tensors,
    }


def measure_row(subject, row, encoded, names, folder):
    """A dictionary for each container, one after the other."""
    path = Path(folder) / "row.pt"
    save_contents(subject.contents(encoded), path)
    for name in names:
        result = {"row": row, "compressor": name}
        if name.startswith("lrzip") and not shutil.which("lrzip"):
            yield result | {"skipped": "lrzip is not installed"}
            continue
        progress(f"measuring {row} with {name}")
        result |= measure_apart(measure_container, {"folder": str(folder), "contents": str(path), "container": name})
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
    tried = {}  # bits -> (bytes, encoded)

    def size_at(bits):
        if bits not in tried:
            encoded = subject.quantiser(dataclasses.replace(s, matrix_bits=bits)).encode()
            tried[bits] = subject.size(encoded), encoded
        return tried[bits][0]

    low = 5
    while size_at(low) > size and low > WIDTHS[0]:
        low -= 1
    while size_at(low + 1) < size and low + 1 < WIDTHS[-1]:
        low += 1
    if not size_at(low) <= size <= size_at(low + 1):
        return {"skipped": f"{size:,} bytes are outside of what {WIDTHS[0]} to {WIDTHS[-1]} bits take "
                           f"({size_at(min(tried)):,} to {size_at(max(tried)):,} bytes tried)"}
    ends = []
    for bits in (low, low + 1):
        taken, encoded = tried[bits]
        ends.append(quality_of(subject, encoded, taken, raw))
    return {"knob": "bits", "value": [low, low + 1], "ends": ends, **between(*ends, size)}


def quality(subject, names, size, also):
    """A dictionary for each method at `size` bytes: the raw weights first, other artifacts last."""
    raw = subject.score(subject.model)
    bpb_per_nat = raw.bpb / raw.loss  # on this text

    def complete(name, row):
        if "gap" not in row:
            return {"method": name, **row}
        return {
            "method": name,
            "bits_per_weight": 8 * row["bytes"] / subject.parameters,
            "loss": raw.loss + row["gap"],
            "bpb": raw.bpb + row["gap"] * bpb_per_nat,
            "gap_bpb": row["gap"] * bpb_per_nat,
            **row,
        }

    yield complete("raw weights", {"bytes": subject.bytes, "gap": 0.0})
    for name in names:
        progress(f"scoring {name} at {size:,} bytes")
        yield complete(name, {"settings": METHODS[name], **quality_row(subject, name, size, raw)})
    for name, path in also:
        progress(f"scoring {name}")
        taken, score = subject.score_artifact(path)
        yield complete(name, {"bytes": taken, "gap": score.loss - raw.loss, "also": str(path)})


# ---- the report -----------------------------------------------------------------------------------------------------


NAME = Column("weights as", "row")
CODES = Column("codes", "codes", ",.0f")
ENTROPIES = (Column("entropy by tensor, bytes", "tensor_entropy_bytes", ",.0f"),
             Column("by row's Gaussian, bytes", "row_entropy_bytes", ",.0f"))
LOADED_COLUMNS = (NAME, Column("matrices", "matrices", ",.0f"), CODES, *ENTROPIES)
CODE_COLUMNS = (
    NAME,
    Column("squared error", "squared_error", ".3e"),
    Column("felt error, nats", "felt_error", ".5f"),
    CODES,
    *ENTROPIES,
    Column("settings", lambda row: f"`{row['settings']}`"),
)


def size_columns(report):
    """Columns of sizes, which are compared with the entropies of the codes."""
    facts = {row["row"]: row for row in report.table("codes")}

    def over(entropy):
        def excess(row):
            least = facts[row["row"]][entropy]
            return row["code_bytes"] / least - 1 if row["code_bytes"] and least else None

        return excess

    return (
        NAME,
        Column("compressor", "compressor"),
        Column("bytes", "bytes", ",.0f"),
        Column("bits/weight", "bits_per_weight", ".3f"),
        Column("codes, bytes", "code_bytes", ",.0f"),
        Column("over entropy by tensor", over("tensor_entropy_bytes"), "+.2%"),
        Column("over row's Gaussian", over("row_entropy_bytes"), "+.2%"),
        Column("pack, CPU s", "pack_seconds", ",.2f"),
        Column("unpack, CPU s", "unpack_seconds", ",.2f"),
        Column("peak MiB", lambda row: max(row["pack_memory_mib"], row["unpack_memory_mib"]), ",.0f"),
    )


def how_met(row):
    """How the size of a row of --score was met."""
    kind = row.get("knob")
    value = row.get("value")
    if kind is None:
        return "as it is"
    if kind == "bits":
        return "between int{} and int{}".format(*value)
    if kind == "spacing":
        return f"spacing {value:.4g}"
    if isinstance(value, dict):
        return f"k = {min(value.values()):.4g} to {max(value.values()):.4g}"
    return f"k = {value:.4g}"


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

CLIPS = ((5, 12.85), (6, 12.85), (7, 15.0), (8, 20.0))  # (bits, k) of --weights; the contest's except for the first
ONLY_WITH_WEIGHTS = ("clips",)
ONLY_WITH_ARTIFACT = ("rows", "calibration_tokens", "budget", "score", "methods", "val_tokens", "also")
ONLY_WITH_SCORE = ("methods", "val_tokens", "also")


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
    default_clips = ",".join(f"{bits}:{k:g}" for bits, k in CLIPS)
    parser = parser_of("pack", """Store the weights of a float16 artifact in every way there is: the bytes, the error,
        the entropy of the codes, time and memory of packing and unpacking; with --score the loss of each method at
        equal bytes.""", f"""Rows: {'; '.join(ROWS)}. Compressors, the first {len(PLAIN)} by default and all of them for
        the row {REFERENCE}: {'; '.join(CONTAINERS)}. "columns": the codes of a matrix column by column; "kinds": a
        stream of codes for each kind of matrix; "torch.save": the containers of the contest's records; "lrzip": that of
        #1855, where the program is installed. Methods of --score:
        {'; '.join(METHODS)}.""")
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
    add_val_tokens(parser)
    add("--also", type=named, action="append", default=[], metavar="NAME=ARTIFACT", help="another artifact to score")
    add("--weights", action="append", default=[], metavar="FILE", help="instead of ARTIFACT: the matrices of any "
        f"model, from {LEAST:,} weights, in a .safetensors or .npz file or one of torch.save; may be given again")
    add("--clips", type=clips, default=list(CLIPS), metavar="BITS:K,...",
        help=f"what SDClip rounds --weights to (default: {default_clips})")
    args = parser.parse_intermixed_args(argv)
    if not args.weights and not args.artifact:
        parser.error("ARTIFACT is missing")
    if args.artifact and args.weights:
        parser.error(f"--weights stands instead of {args.artifact} and of settings; leave one of them out")
    reject_idle(parser, args, ONLY_WITH_WEIGHTS if args.artifact else ONLY_WITH_ARTIFACT,
                f"{'without' if args.artifact else 'with'} --weights")
    if not args.score:
        reject_idle(parser, args, ONLY_WITH_SCORE, "without --score")
    if args.rows is None:
        args.rows = [] if args.methods else list(ROWS)
    if not (args.rows or args.score or args.weights):
        parser.error("--rows none leaves nothing to measure; add --score")
    args.methods = args.methods or list(METHODS)
    return args


def reject_idle(parser, args, names, where):
    """BadInput for an option that was given and does nothing."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} does nothing {where}")


def run_loaded(args, argv):
    """`bench.py pack --weights`; returns the exit code."""
    report = Report("pack", args, argv, document)
    names = args.compressors or [*PLAIN, "lrzip", "lrzip kinds columns"]
    if "all" in names:
        names = CONTAINERS
    with report, tempfile.TemporaryDirectory(prefix="bench_") as folder:
        for loaded, (bits, k) in itertools.product(map(Loaded, args.weights), args.clips):
            name = f"{Path(loaded.path).name} int{bits}, k = {k:g}"
            encoded = loaded.encode(bits, k)
            report.add(loaded_facts(loaded, name, encoded), "codes")
            for row in measure_row(loaded, name, encoded, names, folder):
                report.add(row, "sizes")
    return report.code


def run(args, argv):
    """`bench.py pack`; returns the exit code."""
    if args.weights:
        return run_loaded(args, argv)
    subject = Subject(args.artifact, args.settings)
    subject.s = dataclasses.replace(subject.s, val_tokens=args.val_tokens)
    if args.score:
        subject.load_text()
    progress("collecting moments")
    tokens, seconds = subject.calibrate(args.calibration_tokens)
    report = Report(
        "pack", args, argv, document, subject.s.text(),
        artifact=args.artifact,
        artifact_bytes=subject.bytes,
        parameters=subject.parameters,
        device=subject.rt.device_name(),
        calibration_tokens=tokens,
        calibration_seconds=seconds,
        budget_bytes=args.budget,
        budget_from="as given",
        val_tokens=len(subject.val.bytes) if args.score else args.val_tokens,
        eval_seq_len=subject.s.eval_seq_len,
    )

    def budget():
        if report["budget_bytes"] is None:
            s = subject.settings(ROWS[REFERENCE])
            report["budget_bytes"] = subject.size(subject.quantiser(s).encode())
            report["budget_from"] = f"those of {REFERENCE}"
        return report["budget_bytes"]

    with report, tempfile.TemporaryDirectory(prefix="bench_") as folder:
        for name in args.rows:
            progress(f"encoding {name}")
            encoded, spacing = encode_row(subject, name, budget)
            report.add(code_facts(subject, name, encoded, spacing), "codes")
            for row in measure_row(subject, name, encoded, compressors_of(args, name), folder):
                report.add(row, "sizes")
        if args.score:
            for row in quality(subject, args.methods, budget(), args.also):
                report.add(row, "quality")
    return report.code


def compressors_of(args, row):
    """Names of the containers of a row."""
    if args.compressors:
        return CONTAINERS if "all" in args.compressors else args.compressors
    return CONTAINERS if row == REFERENCE else PLAIN
