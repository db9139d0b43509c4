"""The table of one run, and several runs side by side, as lines of text."""

import shlex
from typing import NamedTuple

from reports.facts import names_of

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
    state = facts["ended"]
    if not facts["finished"]:
        state += f"; not finished, last known step {facts['steps']}"
    yield Row(f"Run {facts['run_dir']}: {state}")
    machine = f"{facts['processes'] or 1} x {facts['device'] or 'unknown device'}"
    yield Row(f"  {facts['data']} on {machine}, commit {facts['commit'] or 'unknown'}")
    if facts["checkpoint"] and facts["state"] not in ("finished", "running"):
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
    for role, size in facts["role_bytes"].items():
        remark = "" if role == "header" else "share of the packed streams, by bytes before packing"
        yield Row(f"- {role}", f"{size:,.0f}", remark)
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
    ("how it ended", "state", ""), ("final, of the packed model", "final_bpb", ".4f"),
    ("before packing", "before_bpb", ".4f"), ("cost of packing", "packing_cost_bpb", "+.4f"),
    ("bytes in total", "total_bytes", ",.0f"), ("parameters", "params", ",.0f"), ("steps", "steps", ",.0f"),
    ("training, seconds", "train_seconds", ",.1f"), ("tokens per second", "tokens_per_second", ",.0f"),
    ("peak memory, MiB", "peak_memory_mib", ",.0f"), ("valid", "valid", ""), ("commit", "commit", ""))


def results(facts):
    """[(label, value or None, its text)] of what came out of a run."""
    facts = {**facts, "train_seconds": facts["seconds"].get("train", 0.0)}
    return [(label, facts[key], NONE if facts[key] is None else format(facts[key], form))
            for label, key, form in RESULTS]


def side_by_side(every):
    """Lines with a column for each run: the settings in which they differ, and what came out."""
    lines = [["Run", *names_of(every)], ["Settings that differ"]]
    lines += differing_settings([facts["settings"] for facts in every])
    lines.append(["Results"])
    finals = [facts["final_bpb"] for facts in every]
    for cells in zip(*map(results, every)):
        label = cells[0][0]
        lines.append([label, *(shown for _, _, shown in cells)])
        if label.startswith("final") and None not in finals:
            lines.append(["difference to the first", *(bits(value - finals[0], "+") for value in finals)])
    yield from aligned(lines)
    yield "\n" + (different_texts(every) or ONE_RUN_EACH)


ONE_RUN_EACH = "One run each: tools/sweep.py measures a change over seeds, with its spread."


def different_texts(every):
    """A warning where the scores of these runs do not compare, or ""."""
    texts = {text_of(facts) for facts in every if facts["final_bpb"] is not None}
    return "They scored different texts: the scores do not compare." if len(texts) > 1 else ""


def aligned(lines):
    """Lines of cells, the first of them to the left; a single cell is a heading."""
    widths = [max(map(len, column)) for column in zip(*(line for line in lines if len(line) > 1))]
    for label, *values in lines:
        if values:
            cells = "".join(f"  {value:>{width}}" for value, width in zip(values, widths[1:]))
            yield f"  {label:<{widths[0]}}{cells}"
        else:
            yield f"\n{label}"


def differing_settings(every, but=OF_THE_PLACE):
    """[[name, its value in each run]] of the settings {name: text} that are not the same in all of them."""
    found = []
    for name in sorted({name for settings in every for name in settings} - set(but)):
        values = [settings.get(name, "default") for settings in every]
        if len(set(values)) > 1:
            found.append([name, *values])
    return found


def text_of(facts):
    """What identifies the text that a run scored."""
    return facts["val_sha256"] or facts["data"], facts["val_bytes"]
