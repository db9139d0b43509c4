"""What came out of a run, in words and numbers that need no knowledge of the code.

    python tools/report.py logs/RUN_ID                      a table
    python tools/report.py logs/RUN_ID --plot curve.png     and training loss and validation score over time (or .svg)
    python tools/report.py logs/RUN_ID --json               the same facts for programs

Everything is read from what train_gpt.py wrote (metrics.jsonl, summary.json); no score is computed here. Only two
general-purpose compressors are run, on the text behind the validation shards, to give the score a scale; their result
is kept in RUN_DIR/compressors.json. Runs that were interrupted are shown as far as they got.
"""

import argparse
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
    events, damaged = [], 0
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
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def text(mapping, key):
    return " ".join(str((mapping or {}).get(key) or "").split())


def last(events, kind, want=lambda event: True):
    return next((event for event in reversed(events) if event["event"] == kind and want(event)), None)


def curve(events, kind, key):
    """[(training seconds, value)] by step; a resumed run writes some steps again, and the later line counts."""
    points = {}
    for event in events:
        step, time, value = number(event, "step"), number(event, "train_time_ms"), number(event, key)
        if event["event"] == kind and None not in (step, time, value):
            points = {known: point for known, point in points.items() if known < step}
            points[step] = (time / 1000, value)
    return list(points.values())


# ---- the compressors ------------------------------------------------------------------------------------------------


def validation_text(settings, tokenizer_sha256):
    """(text, whether it is all of it): the scored validation documents, decoded one by one, up to MOST_TEXT bytes."""
    import sentencepiece

    folder = Path(settings["DATA_PATH"])
    folder = folder if folder.is_dir() else ROOT / folder
    paths = list(folder.glob("fineweb_val_[0-9]*.bin"))
    paths.sort(key=lambda path: int(re.sub(r"\D", "", path.stem)))  # by number, with or without leading zeros
    vocab = settings["VOCAB_SIZE"]
    name = f"fineweb_{vocab}_bpe{folder.name.partition(f'_sp{vocab}')[2]}.model"
    places = [Path(settings["TOKENIZER_PATH"])] if settings["TOKENIZER_PATH"] else [
        folder / "tokenizer.model", folder.parent.parent / "tokenizers" / name]
    tokenizer = next((p for place in places for p in (place, ROOT / place) if p.is_file()), None)
    if not paths or tokenizer is None:
        raise BadInput(f"{'validation shards' if not paths else 'tokenizer'} of the run not found in {folder}")
    model = tokenizer.read_bytes()
    if tokenizer_sha256 and hashlib.sha256(model).hexdigest() != tokenizer_sha256:
        raise BadInput(f"{tokenizer} is no longer the tokenizer of the run")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = np.concatenate([np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES) for path in paths])
        if any(np.fromfile(path, "<i4", 1)[0] != SHARD_MAGIC for path in paths) or ids.max() >= sp.vocab_size():
            raise ValueError
    except (RuntimeError, ValueError, OSError, IndexError):
        raise BadInput(f"the shards in {folder} or {tokenizer} cannot be read") from None
    if 0 < int(settings["VAL_TOKENS"]) < len(ids):
        ids = ids[: int(settings["VAL_TOKENS"]) + 1]
    starts, (_, invert) = [0, *np.flatnonzero(ids == BOS).tolist(), len(ids)], caseops.codec(sp)
    parts, size = [], 0
    for begin, end in zip(starts, starts[1:]):
        if size >= MOST_TEXT:
            break
        parts.append(invert(sp.decode([token for token in ids[begin:end].tolist() if token != BOS])).encode())
        size += len(parts[-1])
    joined = b"".join(parts)
    return joined[:MOST_TEXT], size <= MOST_TEXT and len(parts) == len(starts) - 1


RESULT = ("text_bytes", "xz_bpb", "brotli_bpb")


def compressors(run_dir, settings, tokenizer_sha256, val_bytes):
    """What xz -9e and brotli -q 11 make of the validation text; a note in place of numbers where it cannot be had."""
    import brotli

    cache = run_dir / "compressors.json"
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
        if known["of"] == [tokenizer_sha256, val_bytes] and "whole" in known and all(number(known, k) for k in RESULT):
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        data, whole = validation_text(settings, tokenizer_sha256)
    except BadInput as error:
        return {"note": str(error)}
    if not data:
        return {"note": "the validation text is empty"}
    # Published CaseOps shards count the text before normalisation, which differs a little.
    if whole and settings["VAL_TOKENS"] == "0" and val_bytes and abs(val_bytes / len(data) - 1) > 1e-4:
        return {"note": f"the shards are no longer those of the run: {len(data):,} bytes, scored were {val_bytes:,}"}
    if len(data) > 4_000_000:
        print(f"compressing {len(data):,} bytes with xz and brotli, about {len(data) // 500_000} s, once ...",
              file=sys.stderr, flush=True)
    with ThreadPoolExecutor(2) as pool:  # both release the interpreter lock
        jobs = (pool.submit(lzma.compress, data, preset=9 | lzma.PRESET_EXTREME),
                pool.submit(brotli.compress, data, quality=11, lgwin=24))
        xz, br = (8 * len(job.result()) / len(data) for job in jobs)
    result = {"of": [tokenizer_sha256, val_bytes], "whole": whole, **dict(zip(RESULT, (len(data), xz, br)))}
    if val_bytes is not None:  # else the run may still be going on
        try:
            part = cache.with_name(cache.name + ".part")
            part.write_text(json.dumps(result) + "\n", encoding="utf-8")
            os.replace(part, cache)
        except OSError:
            pass  # a run in a read-only folder can be reported too
    return result


# ---- the facts ------------------------------------------------------------------------------------------------------


def gather(run_dir):
    events, damaged = read_events(run_dir / "metrics.jsonl")
    summary = read_summary(run_dir / "summary.json")
    try:
        given = dict(pair.partition("=")[::2] for pair in shlex.split(text(last(events, "settings"), "settings")))
        settings = {key: given.get(key, default) for key, default in DEFAULT.items()}
        int(settings["VAL_TOKENS"])
    except ValueError:
        raise BadInput(f"{run_dir / 'metrics.jsonl'}: the line of settings is damaged") from None
    run, artifact, train, checkpoint = (last(events, kind) for kind in ("run", "artifact", "train", "checkpoint"))
    device = last(events, "choice", lambda event: "device" in event)
    steps = [number(event, "step") or 0 for event in events if event["event"] in ("train", "val", "checkpoint")]
    clock = {key.removesuffix("_seconds"): number(summary, key) for key in summary or () if key.endswith("_seconds")}
    clock = {phase: seconds for phase, seconds in clock.items() if seconds is not None}
    if not clock and (at := number(train, "train_time_ms")):
        clock = {"train": at / 1000}
    tokens, val_bytes = number(summary, "train_tokens"), number(summary, "val_bytes")
    rate = tokens / clock["train"] if tokens and clock.get("train") else number(train, "tokens_per_second")
    facts = {
        "run_dir": str(run_dir), "finished": summary is not None, "damaged_lines": damaged, **scores(events, summary),
        **{key: number(summary, key) or number(artifact, key) for key in ("code_bytes", "model_bytes", "total_bytes")},
        "limit_bytes": number(artifact, "limit_bytes"), "margin_bytes": number(artifact, "margin_bytes"),
        "params": number(summary, "params") or number(last(events, "model_params"), "params"),
        "steps": number(summary, "steps") if summary else max(steps, default=0), "train_tokens": tokens,
        "epochs": number(summary, "epochs"), "tokens_per_second": rate, "seconds": clock,
        "peak_memory_mib": number(summary, "peak_memory_mib") or number(last(events, "peak_memory"), "mib"),
        "val_bytes": val_bytes, "val_tokens": number(summary, "val_tokens"),
        "valid": text(summary, "valid"), "reasons": reasons(summary, "reasons"),
        "tested": text(summary, "tested"), "tests": reasons(summary, "tests"),
        "eligible": text(summary, "eligible"), "eligible_reasons": reasons(summary, "eligible_reasons"),
        "data": text(summary, "data") or Path(settings["DATA_PATH"]).name, "commit": text(run, "commit"),
        "device": text(summary, "device") or text(device, "device"), "processes": number(run, "world_size"),
        "checkpoint": text(checkpoint, "file"), "checkpoint_step": number(checkpoint, "step"),
        "train_curve": curve(events, "train", "train_loss"), "val_curve": curve(events, "val", "val_bpb"),
    }
    scored = facts["final_bpb"] is not None or facts["before_bpb"] is not None
    tokenizer = text(last(events, "tokenizer"), "sha256")
    facts["compressors"] = {"note": "no score yet to compare them with"}
    if scored:
        facts["compressors"] = compressors(run_dir, settings, tokenizer, val_bytes)
    return facts


def scores(events, summary):
    """The final score, the last one before packing, and their difference where both are of contiguous windows."""
    final, val = last(events, "final"), last(events, "val")
    weights = last(events, "eval", lambda event: text(event, "name").endswith("_weights"))
    packed = last(events, "eval", lambda event: "contiguous" in text(event, "name"))
    if packed is None and "contiguous" in text(final, "name"):
        packed = final
    before, after = number(weights or val, "val_bpb"), number(packed, "val_bpb")
    return {"final_bpb": number(summary or final, "val_bpb"), "final_loss": number(summary or final, "val_loss"),
            "final_kind": text(summary, "predictor") or text(final, "name"), "before_bpb": before,
            "before_weights": text(weights, "name").removesuffix("_weights") or "last",
            "before_at_step": None if weights else number(val, "step"),
            "packing_cost_bpb": None if before is None or after is None else after - before}


def reasons(summary, key):
    value = (summary or {}).get(key)
    return [" ".join(str(item).split()) for item in value] if isinstance(value, list) else []


# ---- the table ------------------------------------------------------------------------------------------------------

PHASES = {"warmup": "warm-up (outside the clock)", "train": "training", "calibrate": "calibration", "export": "packing",
          "eval": "scoring", "validate": "validation on the way (outside the clock)",
          "selftest": "self-tests (outside the clock)"}


def rows(f):
    """(label, value, remark) of each line; a line with only a label is a heading."""
    def count(key):
        return "-" if f[key] is None else f"{f[key]:,.0f}"

    def bits(value, sign=""):
        return "-" if value is None else f"{value:{sign}.4f}"

    state = "finished" if f["finished"] else f"not finished, last known step {f['steps']}"
    yield f"Run {f['run_dir']}: {state}", None, None
    machine = f"{f['processes'] or 1} x {f['device'] or 'unknown device'}"
    yield f"  {f['data']} on {machine}, commit {f['commit'] or 'unknown'}", None, None
    if not f["finished"] and f["checkpoint"]:
        folder = shlex.quote(str(f["run_dir"]))
        again = f"the same command with RESUME=auto OUT_DIR={folder}"
        yield f"  go on from {f['checkpoint']}: {again}", None, None
    if f["damaged_lines"]:
        yield f"  {f['damaged_lines']} damaged line(s) of metrics.jsonl were skipped", None, None

    yield "Score in bits per byte, lower is better", None, None
    sliding = "sliding" in f["final_kind"]
    how = "sliding window: every token with much context" if sliding else f["final_kind"].replace("_", " ")
    yield "final, of the packed model", bits(f["final_bpb"]), how
    step = "" if f["before_at_step"] is None else f" of step {f['before_at_step']}"
    yield "before packing", bits(f["before_bpb"]), f"contiguous windows, {f['before_weights']} weights{step}"
    yield "cost of packing", bits(f["packing_cost_bpb"], "+"), "contiguous windows, after minus before"
    if "note" in (c := f["compressors"]):
        yield f"xz and brotli ({c['note']})", "-", ""
    else:
        extent = f"{'the same' if c['whole'] else 'only the first'} {c['text_bytes']:,} bytes"
        yield "xz -9e", bits(c["xz_bpb"]), extent
        yield "brotli -q 11", bits(c["brotli_bpb"]), extent

    yield "Size in bytes", None, None
    yield "code", count("code_bytes"), "train_gpt.py"
    yield "model", count("model_bytes"), "model.pg"
    yield "total", count("total_bytes"), f"limit {f['limit_bytes']:,}" if f["limit_bytes"] else ""
    yield "margin", count("margin_bytes"), "TOO LARGE" if (f["margin_bytes"] or 0) < 0 else ""

    yield "Training", None, None
    yield "parameters", count("params"), ""
    yield "steps", count("steps"), ""
    yield "tokens", count("train_tokens"), "" if f["epochs"] is None else f"{f['epochs']:.3g} times the training set"
    yield "tokens per second", count("tokens_per_second"), ""
    yield "peak memory, MiB", count("peak_memory_mib"), ""
    yield "validation text, bytes", count("val_bytes"), f"{f['val_tokens']:,} tokens" if f["val_tokens"] else ""

    yield "Seconds", None, None
    for phase in sorted(f["seconds"], key=lambda p: list(PHASES).index(p) if p in PHASES else 99):
        if f["seconds"][phase]:  # what did not happen is no line
            yield PHASES.get(phase, phase), f"{f['seconds'][phase]:,.1f}", ""

    yield "Verdict", None, None
    for label, verdict, good, why in (
            ("valid", f["valid"], "the score is a true code length of the text that was scored", f["reasons"]),
            ("self-tested", f["tested"], f"{', '.join(f['tests'])} passed",
             [f"not all of {', '.join(f['tests'])} passed" if f["tests"] else "left out: SELFTEST=0"]),
            ("record-eligible", f["eligible"], "could be a record of the contest", f["eligible_reasons"])):
        remarks = [good] if verdict == "yes" else why or [""]
        yield label, verdict or "-", remarks[0]
        yield from (("", "", remark) for remark in remarks[1:] if verdict)


def table(f):
    """Aligned lines. What the run has not, or not yet, is named in one line at the end, not shown as rows of dashes."""
    shown = list(rows(f))
    lacking = [label for label, value, _ in shown if value == "-"]
    shown = [row for row in shown if row[1] != "-"]
    left = max((len(label) for label, value, _ in shown if value is not None), default=0)
    right = max((len(value) for _, value, _ in shown if value is not None), default=0)
    for (label, value, remark), (_, after, _) in zip(shown, [*shown[1:], ("", None, "")]):
        if value is None and label.startswith(("Run", "  ")):
            yield label
        elif value is None and after is not None:  # a heading with something below it
            yield f"\n{label}"
        elif value is not None:
            yield f"  {label:<{left}}  {value:>{right}}  {remark}".rstrip()
    if lacking:
        yield f"\nMissing: {'; '.join(lacking)}"


# ---- the plot -------------------------------------------------------------------------------------------------------


INK, CURVE, FINAL, XZ, BROTLI = "#24292f", "#2f66b0", "#c2452d", "#6a6f75", "#8a6914"
STYLE = {
    "figure.facecolor": "#fafaf8", "axes.facecolor": "#fafaf8",  # its own ground, so a dark page does not matter
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": "#888888",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e3e0",
    "axes.axisbelow": True, "font.size": 10, "figure.dpi": 130, "svg.hashsalt": "report"}
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
    """The validation curve; the packed model to the right of it; each compressor's score as a line with its name."""
    axes.set(title="validation, bits per byte", xlabel="seconds of training", xlim=(0, 1.12 * end))
    curve, final = facts["val_curve"], facts["final_bpb"]
    if curve:
        axes.plot(*zip(*curve), color=CURVE, linewidth=1.4, marker="o", markersize=3.5)
        first = after_first_steps(curve, end)[0]
        early = first[0] < end / 2  # then there is room to the right of it
        axes.annotate("during training, contiguous windows", first, (6 if early else -6, 2), color=CURVE,
                      textcoords="offset points", ha="left" if early else "right", va="bottom", fontsize=9)
    rivals = [(facts["compressors"][key], name, color)
              for name, key, color in (("xz -9e", "xz_bpb", XZ), ("brotli -q 11", "brotli_bpb", BROTLI))
              if key in facts["compressors"]]
    if final is not None:
        above = bool(curve) and final > curve[-1][1]
        axes.plot([1.06 * end], [final], color=FINAL, marker="D", markersize=6, linestyle="none", clip_on=False)
        axes.annotate(f"final, packed: {final:.4f}", (1.06 * end, final), (10, 9 if above else -9), color=FINAL,
                      textcoords="offset points", ha="right", va="bottom" if above else "top")
    for level, name, color in rivals:
        highest = level == max(rivals)[0]  # its name goes above the line, the other's below
        axes.axhline(level, color=color, linestyle="--", linewidth=1)
        axes.annotate(f"{name}: {level:.4f}", (1.12 * end, level), (0, 3 if highest else -3), color=color,
                      textcoords="offset points", ha="right", va="bottom" if highest else "top", fontsize=9)
    levels = [level for level, _, _ in rivals] + ([] if final is None else [final])
    if curve or levels:
        axes.set_ylim(*loss_limits(curve, end, levels))


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


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run, such as logs/RUN_ID")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write a plot (.png or .svg)")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    args = parser.parse_args(argv)
    return exit_code(partial(report, args))


def report(args):
    if args.plot and args.plot.suffix not in (".png", ".svg"):
        raise BadInput(f"--plot {args.plot}: the name must end in .png or .svg")
    facts = gather(args.run_dir)
    print(json.dumps(facts, indent=1) if args.json else "\n".join(table(facts)), flush=True)
    if args.plot:
        plot(facts, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
