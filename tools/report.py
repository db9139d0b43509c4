"""What came out of a run, in words and numbers that need no knowledge of the code.

    python tools/report.py logs/RUN_ID                      a table
    python tools/report.py logs/RUN_ID --plot curve.png     and training loss and validation score over time (or .svg)
    python tools/report.py logs/RUN_ID --json               the same facts for programs
    python tools/report.py logs/ONE logs/OTHER              runs side by side: what was changed, and what came of it

Everything is read from what train_gpt.py wrote (metrics.jsonl, summary.json); no score is computed here. Only two
general-purpose compressors are run, on the text behind the validation shards, to give the score a scale; their result
is kept in RUN_DIR/compressors.json. Runs that were interrupted are shown as far as they got.
"""

import argparse
import contextlib
import hashlib
import json
import lzma
import math
import os
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))  # for caseops.py
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

import caseops
from common import BOS, ROOT, SHARD_HEADER_BYTES, SHARD_MAGIC, BadInput, exit_code

DEFAULT = {"DATA_PATH": "data/datasets/fineweb10B_sp1024", "VOCAB_SIZE": "1024", "TOKENIZER_PATH": "",
           "VAL_TOKENS": "0"}  # as in train_gpt.py, which is not imported: that takes seconds
MOST_TEXT = 32_000_000  # bytes given to the compressors: brotli at its best takes about a minute for them


# ---- what the run wrote ---------------------------------------------------------------------------------------------


def read_events(path):
    """(events, number of damaged lines). A run that was killed may leave half a line."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give the folder of a run, such as logs/RUN_ID") from None
    events = []
    damaged = 0
    for line in filter(str.strip, lines):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
        else:
            damaged += 1
    if not events:
        raise BadInput(f"{path} holds no events of a run")
    return events, damaged


def read_summary(path):
    """The summary of a run that came to its end, or None."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, OSError):
        summary = None
    if not isinstance(summary, dict):
        raise BadInput(f"{path} is not the summary of a run; delete it to see the rest")
    return summary


def number(mapping, key):
    """The finite number under this key, or None."""
    value = (mapping or {}).get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def text(mapping, key):
    """The value under this key as one line; "" if there is none."""
    return " ".join(str((mapping or {}).get(key) or "").split())


def last(events, kind, accept=lambda event: True):
    """The last event of this kind that `accept` accepts, or None."""
    for event in reversed(events):
        if event["event"] == kind and accept(event):
            return event
    return None


def curve(events, kind, key):
    """[(training seconds, value)] by step. A resumed run writes some steps again; the later line counts."""
    points = {}
    for event in events:
        if event["event"] != kind:
            continue
        step, time, value = (number(event, name) for name in ("step", "train_time_ms", key))
        if None not in (step, time, value):
            points = {earlier: point for earlier, point in points.items() if earlier < step}
            points[step] = (time / 1000, value)
    return list(points.values())


# ---- the compressors ------------------------------------------------------------------------------------------------


def find_tokenizer(settings, folder):
    """The tokenizer of a data set: the file that was named, or where the trainer looks for one. May be None."""
    if settings["TOKENIZER_PATH"]:
        places = [Path(settings["TOKENIZER_PATH"])]
    else:
        vocab = settings["VOCAB_SIZE"]
        variant = folder.name.partition(f"_sp{vocab}")[2]
        published = f"tokenizers/fineweb_{vocab}_bpe{variant}.model"
        places = [folder / "tokenizer.model", folder.parent.parent / published]
    for place in places:
        for path in (place, ROOT / place):
            if path.is_file():
                return path
    return None


def read_shards(paths, vocab_size):
    """The tokens of these shards, one after another."""
    ids = np.concatenate([np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES) for path in paths])
    foreign = any(np.fromfile(path, "<i4", 1)[0] != SHARD_MAGIC for path in paths)
    if foreign or ids.max() >= vocab_size:
        raise ValueError
    return ids


def validation_text(settings, tokenizer_sha256):
    """(text, whether it is complete): the scored validation documents, decoded, up to MOST_TEXT bytes."""
    import sentencepiece

    folder = Path(settings["DATA_PATH"])
    folder = folder if folder.is_dir() else ROOT / folder
    paths = list(folder.glob("fineweb_val_[0-9]*.bin"))
    paths.sort(key=lambda path: int(re.sub(r"\D", "", path.stem)))  # by number, with or without leading zeros
    tokenizer = find_tokenizer(settings, folder)
    if not paths:
        raise BadInput(f"validation shards of the run not found in {folder}")
    if tokenizer is None:
        raise BadInput(f"tokenizer of the run not found in {folder}")
    model = tokenizer.read_bytes()
    if tokenizer_sha256 and hashlib.sha256(model).hexdigest() != tokenizer_sha256:
        raise BadInput(f"{tokenizer} is no longer the tokenizer of the run")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = read_shards(paths, sp.vocab_size())
    except (RuntimeError, ValueError, OSError, IndexError):
        raise BadInput(f"the shards in {folder} or {tokenizer} cannot be read") from None
    limit = int(settings["VAL_TOKENS"])
    if 0 < limit < len(ids):
        ids = ids[: limit + 1]
    _, to_text = caseops.codec(sp)
    bounds = [0, *np.flatnonzero(ids == BOS).tolist(), len(ids)]
    documents = []
    size = 0
    for begin, end in zip(bounds, bounds[1:]):
        if size >= MOST_TEXT:
            break
        tokens = [token for token in ids[begin:end].tolist() if token != BOS]
        documents.append(to_text(sp.decode(tokens)).encode())
        size += len(documents[-1])
    complete = size <= MOST_TEXT and len(documents) == len(bounds) - 1
    return b"".join(documents)[:MOST_TEXT], complete


RESULT = ("text_bytes", "xz_bpb", "brotli_bpb")


def read_cache(path, source):
    """The result that an earlier report kept, if it is of the same text; else None."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        usable = kept["of"] == source and "whole" in kept and all(number(kept, key) for key in RESULT)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if usable else None


def write_cache(path, result):
    part = path.with_name(path.name + ".part")
    with contextlib.suppress(OSError):  # a run in a read-only folder can be reported too
        part.write_text(json.dumps(result) + "\n", encoding="utf-8")
        os.replace(part, path)


def bits_per_byte(data):
    """(xz -9e, brotli -q 11): compressed bits per byte of this text."""
    import brotli

    with ThreadPoolExecutor(2) as pool:  # both release the interpreter lock
        xz = pool.submit(lzma.compress, data, preset=9 | lzma.PRESET_EXTREME)
        br = pool.submit(brotli.compress, data, quality=11, lgwin=24)
        return tuple(8 * len(job.result()) / len(data) for job in (xz, br))


def compressors(run_dir, settings, tokenizer_sha256, val_bytes):
    """The scores of xz -9e and brotli -q 11 on the validation text, or a note that says why there are none."""
    cache = run_dir / "compressors.json"
    source = [tokenizer_sha256, val_bytes]
    if kept := read_cache(cache, source):
        return kept
    try:
        data, complete = validation_text(settings, tokenizer_sha256)
    except BadInput as error:
        return {"note": str(error)}
    if not data:
        return {"note": "the validation text is empty"}
    # Published CaseOps shards count the text before normalisation, which differs a little.
    comparable = complete and settings["VAL_TOKENS"] == "0" and val_bytes
    if comparable and abs(val_bytes / len(data) - 1) > 1e-4:
        sizes = f"{len(data):,} bytes, scored were {val_bytes:,}"
        return {"note": f"the shards are no longer those of the run: {sizes}"}
    if len(data) > 4_000_000:
        seconds = len(data) // 500_000
        print(f"compressing {len(data):,} bytes with xz and brotli, about {seconds} s, once ...",
              file=sys.stderr, flush=True)
    xz, br = bits_per_byte(data)
    result = {"of": source, "whole": complete, "text_bytes": len(data), "xz_bpb": xz, "brotli_bpb": br}
    if val_bytes is not None:  # else the run may still be going on
        write_cache(cache, result)
    return result


# ---- the facts ------------------------------------------------------------------------------------------------------


def run_settings(events):
    """({name: text} of the settings that were changed, those of them that say which text was scored)."""
    pairs = shlex.split(text(last(events, "settings"), "settings"))
    given = dict(pair.partition("=")[::2] for pair in pairs)
    settings = {name: given.get(name, default) for name, default in DEFAULT.items()}
    int(settings["VAL_TOKENS"])
    return given, settings


def phase_seconds(summary, train):
    """{phase: seconds} of a finished run; of another one, the training time of its last step."""
    clock = {}
    for key in summary or ():
        seconds = number(summary, key)
        if key.endswith("_seconds") and seconds is not None:
            clock[key.removesuffix("_seconds")] = seconds
    trained = number(train, "train_time_ms")
    if not clock and trained:
        clock["train"] = trained / 1000
    return clock


def gather(run_dir):
    """Everything that the table, the plot and --json show."""
    events, damaged = read_events(run_dir / "metrics.jsonl")
    summary = read_summary(run_dir / "summary.json")
    try:
        changed, settings = run_settings(events)
    except ValueError:
        raise BadInput(f"{run_dir / 'metrics.jsonl'}: the line of settings is damaged") from None
    run = last(events, "run")
    train = last(events, "train")
    artifact = last(events, "artifact")
    checkpoint = last(events, "checkpoint")
    device = last(events, "choice", lambda event: "device" in event)
    counted = [event for event in events if event["event"] in ("train", "val", "checkpoint")]
    last_step = max((number(event, "step") or 0 for event in counted), default=0)
    clock = phase_seconds(summary, train)
    tokens = number(summary, "train_tokens")
    rate = number(train, "tokens_per_second")
    if tokens and clock.get("train"):
        rate = tokens / clock["train"]
    val_bytes = number(summary, "val_bytes")
    facts = {
        "run_dir": str(run_dir), "finished": summary is not None, "damaged_lines": damaged, "settings": changed,
        **scores(events, summary),
        **{key: number(summary, key) or number(artifact, key)
           for key in ("code_bytes", "model_bytes", "total_bytes")},
        "limit_bytes": number(artifact, "limit_bytes"), "margin_bytes": number(artifact, "margin_bytes"),
        "params": number(summary, "params") or number(last(events, "model_params"), "params"),
        "steps": number(summary, "steps") if summary else last_step,
        "train_tokens": tokens, "epochs": number(summary, "epochs"),
        "tokens_per_second": rate, "seconds": clock,
        "peak_memory_mib": number(summary, "peak_memory_mib") or number(last(events, "peak_memory"), "mib"),
        "val_bytes": val_bytes, "val_tokens": number(summary, "val_tokens"),
        "valid": text(summary, "valid"), "reasons": sentences(summary, "reasons"),
        "tested": text(summary, "tested"), "tests": sentences(summary, "tests"),
        "eligible": text(summary, "eligible"), "eligible_reasons": sentences(summary, "eligible_reasons"),
        "data": text(summary, "data") or Path(settings["DATA_PATH"]).name, "commit": text(run, "commit"),
        "device": text(summary, "device") or text(device, "device"), "processes": number(run, "world_size"),
        "checkpoint": text(checkpoint, "file"), "checkpoint_step": number(checkpoint, "step"),
        "train_curve": curve(events, "train", "train_loss"), "val_curve": curve(events, "val", "val_bpb"),
    }
    facts["compressors"] = {"note": "no score yet to compare them with"}
    if facts["final_bpb"] is not None or facts["before_bpb"] is not None:
        tokenizer_sha256 = text(last(events, "tokenizer"), "sha256")
        facts["compressors"] = compressors(run_dir, settings, tokenizer_sha256, val_bytes)
    return facts


def scores(events, summary):
    """The final score, the last one before packing, and their difference where both are of contiguous windows."""
    final = last(events, "final")
    val = last(events, "val")
    weights = last(events, "eval", lambda event: text(event, "name").endswith("_weights"))
    packed = last(events, "eval", lambda event: "contiguous" in text(event, "name"))
    if packed is None and "contiguous" in text(final, "name"):
        packed = final
    before = number(weights or val, "val_bpb")
    after = number(packed, "val_bpb")
    cost = None if before is None or after is None else after - before
    return {"final_bpb": number(summary or final, "val_bpb"), "final_loss": number(summary or final, "val_loss"),
            "final_kind": text(summary, "predictor") or text(final, "name"), "before_bpb": before,
            "before_weights": text(weights, "name").removesuffix("_weights") or "last",
            "before_at_step": None if weights else number(val, "step"),
            "packing_cost_bpb": cost}


def sentences(summary, key):
    """The list of texts under this key, each as one line."""
    value = (summary or {}).get(key)
    return [" ".join(str(item).split()) for item in value] if isinstance(value, list) else []


# ---- the table ------------------------------------------------------------------------------------------------------

PHASES = {"warmup": "warm-up (outside the clock)", "train": "training", "calibrate": "calibration", "export": "packing",
          "eval": "scoring", "validate": "validation on the way (outside the clock)",
          "selftest": "self-tests (outside the clock)"}


NONE = "-"  # the value of what a run has not, or not yet


class Row(NamedTuple):
    """A line of the table; without a value it is a heading."""

    label: str
    value: str | None = None
    remark: str = ""


def bits(value, sign=""):
    return NONE if value is None else f"{value:{sign}.4f}"


def rows(facts):
    """The lines of the table, in order."""
    yield from run_rows(facts)
    yield from score_rows(facts)
    yield from size_and_training_rows(facts)
    yield Row("Seconds")
    known = [phase for phase in PHASES if phase in facts["seconds"]]
    for phase in known + [phase for phase in facts["seconds"] if phase not in PHASES]:
        if facts["seconds"][phase]:  # what did not happen is no line
            yield Row(PHASES.get(phase, phase), f"{facts['seconds'][phase]:,.1f}")
    yield from verdict_rows(facts)


def run_rows(facts):
    state = "finished" if facts["finished"] else f"not finished, last known step {facts['steps']}"
    yield Row(f"Run {facts['run_dir']}: {state}")
    machine = f"{facts['processes'] or 1} x {facts['device'] or 'unknown device'}"
    yield Row(f"  {facts['data']} on {machine}, commit {facts['commit'] or 'unknown'}")
    if not facts["finished"] and facts["checkpoint"]:
        folder = shlex.quote(str(facts["run_dir"]))
        yield Row(f"  go on from {facts['checkpoint']}: the same command with RESUME=auto OUT_DIR={folder}")
    if facts["damaged_lines"]:
        yield Row(f"  {facts['damaged_lines']} damaged line(s) of metrics.jsonl were skipped")


def score_rows(facts):
    yield Row("Score in bits per byte, lower is better")
    kind = facts["final_kind"].replace("_", " ")
    if "sliding" in kind:
        kind = "sliding window: every token with much context"
    yield Row("final, of the packed model", bits(facts["final_bpb"]), kind)
    step = "" if facts["before_at_step"] is None else f" of step {facts['before_at_step']}"
    weights = f"contiguous windows, {facts['before_weights']} weights{step}"
    yield Row("before packing", bits(facts["before_bpb"]), weights)
    yield Row("cost of packing", bits(facts["packing_cost_bpb"], "+"), "contiguous windows, after minus before")
    rivals = facts["compressors"]
    if "note" in rivals:
        yield Row(f"xz and brotli ({rivals['note']})", NONE)
        return
    extent = "the same" if rivals["whole"] else "only the first"
    yield Row("xz -9e", bits(rivals["xz_bpb"]), f"{extent} {rivals['text_bytes']:,} bytes")
    yield Row("brotli -q 11", bits(rivals["brotli_bpb"]), f"{extent} {rivals['text_bytes']:,} bytes")


def size_and_training_rows(facts):
    def count(label, key, remark=""):
        return Row(label, NONE if facts[key] is None else f"{facts[key]:,.0f}", remark)

    limit = f"limit {facts['limit_bytes']:,}" if facts["limit_bytes"] else ""
    too_large = (facts["margin_bytes"] or 0) < 0
    yield Row("Size in bytes")
    yield count("code", "code_bytes", "train_gpt.py")
    yield count("model", "model_bytes", "model.pg")
    yield count("total", "total_bytes", limit)
    yield count("margin", "margin_bytes", "TOO LARGE" if too_large else "")

    epochs = "" if facts["epochs"] is None else f"{facts['epochs']:.3g} times the training set"
    val_tokens = f"{facts['val_tokens']:,} tokens" if facts["val_tokens"] else ""
    yield Row("Training")
    yield count("parameters", "params")
    yield count("steps", "steps")
    yield count("tokens", "train_tokens", epochs)
    yield count("tokens per second", "tokens_per_second")
    yield count("peak memory, MiB", "peak_memory_mib")
    yield count("validation text, bytes", "val_bytes", val_tokens)


def verdict_rows(facts):
    tests = ", ".join(facts["tests"])
    untested = f"not all of {tests} passed" if tests else "left out: SELFTEST=0"
    true_length = "the score is a true code length of the text that was scored"
    yield Row("Verdict")
    yield from verdict("valid", facts["valid"], true_length, facts["reasons"])
    yield from verdict("self-tested", facts["tested"], f"{tests} passed", [untested])
    could_be = "could be a record of the contest"
    yield from verdict("record-eligible", facts["eligible"], could_be, facts["eligible_reasons"])


def verdict(label, answer, praise, reasons):
    """A yes with what it means, or a no with a line for each reason."""
    if not answer:
        yield Row(label, NONE)
        return
    first, *others = [praise] if answer == "yes" else reasons or [""]
    yield Row(label, answer, first)
    for reason in others:
        yield Row("", "", reason)


def table(facts):
    """Aligned lines. What the run does not have, or not yet, is named in one line at the end."""
    every = list(rows(facts))
    missing = [row.label for row in every if row.value == NONE]
    shown = [row for row in every if row.value != NONE]
    left = max((len(row.label) for row in shown if row.value is not None), default=0)
    right = max((len(row.value) for row in shown if row.value is not None), default=0)
    for row, following in zip(shown, [*shown[1:], Row("")]):
        about_the_run = row.label.startswith(("Run", "  "))
        if row.value is not None:
            yield f"  {row.label:<{left}}  {row.value:>{right}}  {row.remark}".rstrip()
        elif about_the_run:
            yield row.label
        elif following.value is not None:  # a heading with something below it
            yield f"\n{row.label}"
    if missing:
        yield f"\nMissing: {'; '.join(missing)}"


# ---- runs side by side ----------------------------------------------------------------------------------------------

OF_THE_PLACE = ("RUN_ID", "OUT_DIR")  # settings that change nothing that comes out
# (label, key of the facts, format)
RESULTS = (
    ("before packing", "before_bpb", ".4f"), ("cost of packing", "packing_cost_bpb", "+.4f"),
    ("bytes in total", "total_bytes", ",.0f"), ("parameters", "params", ",.0f"), ("steps", "steps", ",.0f"),
    ("tokens per second", "tokens_per_second", ",.0f"), ("peak memory, MiB", "peak_memory_mib", ",.0f"),
    ("valid", "valid", ""), ("commit", "commit", ""))


def side_by_side(every):
    """Lines with a column for each run: the settings in which they differ, and what came out."""
    lines = [["Run", *(Path(facts["run_dir"]).name for facts in every)], ["Settings that differ"]]
    lines += differing_settings([facts["settings"] for facts in every])
    lines.append(["Results"])
    finals = [facts["final_bpb"] for facts in every]
    lines.append(["final, of the packed model", *map(bits, finals)])
    if None not in finals:
        lines.append(["difference to the first", *(bits(value - finals[0], "+") for value in finals)])
    for label, key, form in RESULTS:
        lines.append([label, *(NONE if facts[key] is None else format(facts[key], form) for facts in every)])
    lines.append(["training, seconds", *(f"{facts['seconds'].get('train', 0.0):,.1f}" for facts in every)])
    widths = [max(map(len, column)) for column in zip(*(line for line in lines if len(line) > 1))]
    for label, *values in lines:
        if values:
            cells = "".join(f"  {value:>{width}}" for value, width in zip(values, widths[1:]))
            yield f"  {label:<{widths[0]}}{cells}"
        else:
            yield f"\n{label}"
    if len({(facts["data"], facts["val_bytes"]) for facts in every}) > 1:
        yield "\nThey scored different texts: the scores do not compare."
    else:
        yield "\nOne run each: tools/sweep.py measures a change over seeds, with its spread."


def differing_settings(every):
    """[[name, its value in each run]] of the settings {name: text} that are not the same in all of them."""
    found = []
    for name in sorted({name for settings in every for name in settings} - set(OF_THE_PLACE)):
        values = [settings.get(name, "default") for settings in every]
        if len(set(values)) > 1:
            found.append([name, *values])
    return found


# ---- the plot -------------------------------------------------------------------------------------------------------


GROUND = "#fafaf8"  # opaque, so that the page may be dark
INK = "#24292f"
CURVE = "#2f66b0"
FINAL = "#c2452d"
XZ = "#6a6f75"
BROTLI = "#8a6914"
STYLE = {
    "figure.facecolor": GROUND, "axes.facecolor": GROUND, "text.color": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": "#888888", "grid.color": "#e3e3e0",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "font.size": 10, "figure.dpi": 130, "svg.hashsalt": "report"}
FIRST_STEPS = 0.1  # share of the training time whose values may lie above the axis


def plot(facts, path):
    """Training loss and validation score over the seconds of training, as .png or .svg."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("--plot needs matplotlib: pip install -r requirements-dev.txt") from None
    if not facts["train_curve"] and not facts["val_curve"]:
        raise BadInput(f"{facts['run_dir']} has no training or validation lines to plot yet")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure, (loss_axes, score_axes) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        end = max(seconds for seconds, _ in facts["train_curve"] + facts["val_curve"]) or 1.0
        plot_loss(loss_axes, facts["train_curve"], end)
        plot_score(score_axes, facts, end)
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise BadInput(f"{path} cannot be written ({error.strerror})") from None
        finally:
            plt.close(figure)


def plot_loss(axes, curve, end):
    axes.set(title="training loss, nats per token", xlabel="seconds of training", xlim=(0, 1.02 * end))
    if curve:
        axes.plot(*zip(*curve), color=CURVE, linewidth=1.4)
        axes.set_ylim(*loss_limits(curve, end))


def plot_score(axes, facts, end):
    """The validation curve, the packed model to the right of it, and each compressor as a line with its name."""
    axes.set(title="validation, bits per byte", xlabel="seconds of training", xlim=(0, 1.12 * end))
    curve = facts["val_curve"]
    final = facts["final_bpb"]
    levels = []
    if curve:
        axes.plot(*zip(*curve), color=CURVE, linewidth=1.4, marker="o", markersize=3.5)
        first = after_first_steps(curve, end)[0]
        room_on_the_right = first[0] < end / 2
        side = "right" if room_on_the_right else "left"
        label(axes, "during training, contiguous windows", first, CURVE, side=side)
    if final is not None:
        levels.append(final)
        worse = bool(curve) and final > curve[-1][1]
        axes.plot([1.06 * end], [final], color=FINAL, marker="D", markersize=6, clip_on=False)
        label(axes, f"final, packed: {final:.4f}", (1.09 * end, final), FINAL, above=worse, gap=9)
    rivals = {name: (facts["compressors"][key], color)
              for name, key, color in (("xz -9e", "xz_bpb", XZ), ("brotli -q 11", "brotli_bpb", BROTLI))
              if key in facts["compressors"]}
    highest = max((level for level, _ in rivals.values()), default=None)
    for name, (level, color) in rivals.items():
        levels.append(level)
        axes.axhline(level, color=color, linestyle="--", linewidth=1)
        label(axes, f"{name}: {level:.4f}", (1.12 * end, level), color, above=level == highest)
    if curve or levels:
        axes.set_ylim(*loss_limits(curve, end, levels))


def label(axes, text, point, color, side="left", above=True, gap=3):
    """Text to the left or right of a point, above or below it; `gap` is in points of type."""
    offset = (6 if side == "right" else 0, gap if above else -gap)
    axes.annotate(text, point, offset, textcoords="offset points", color=color, fontsize=9,
                  ha="left" if side == "right" else "right", va="bottom" if above else "top")


def after_first_steps(curve, end):
    """The points of a curve that an axis must show: at least its last one."""
    late = [(seconds, value) for seconds, value in curve if seconds >= FIRST_STEPS * end]
    return late or curve[-1:]


def loss_limits(curve, end, levels=()):
    """(bottom, top) of an axis that shows these levels and the curve after its first steps."""
    values = [value for _, value in after_first_steps(curve, end)]
    values += levels
    margin = 0.1 * (max(values) - min(values)) or 0.1
    return min(values) - 1.5 * margin, max(values) + margin


def arguments(argv):
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.split("\n")[0])
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path,
                        help="folder of a run, such as logs/RUN_ID; several are set side by side")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write a plot (.png or .svg)")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    return parser.parse_args(argv)


def main(argv):
    return exit_code(partial(report, arguments(argv)))


def report(args):
    if args.plot and args.plot.suffix not in (".png", ".svg"):
        raise BadInput(f"--plot {args.plot}: the name must end in .png or .svg")
    if args.plot and len(args.run_dirs) > 1:
        raise BadInput("--plot shows one run; give one RUN_DIR")
    every = list(map(gather, args.run_dirs))
    if args.json:
        print(json.dumps(every if len(every) > 1 else every[0], indent=1), flush=True)
    else:
        print("\n".join(side_by_side(every) if len(every) > 1 else table(every[0])), flush=True)
    if args.plot:
        plot(every[0], args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
