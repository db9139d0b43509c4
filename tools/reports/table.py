"""The table of one run, and several runs side by side, as lines of text."""

import shlex
from typing import NamedTuple

from reports.facts import names_of
from tables import Column, aligned

PHASES = {"warmup": "warm-up (outside the clock)", "train": "training", "calibrate": "calibration", "export": "packing",
          "eval": "scoring", "validate": "validation on the way (outside the clock)",
          "selftest": "self-tests (outside the clock)"}
RIVALS = {"xz -9e": "xz_bpb", "brotli -q 11": "brotli_bpb"}
NONE = "-"  # the value of what a run has not, or not yet


class Row(NamedTuple):
    """A line of the table; without a value it is a heading."""

    label: str
    value: str | None = None
    remark: str = ""


def shown(value, form=".4f"):
    """A number or a text in this format; bits per byte have four digits."""
    return NONE if value is None else format(value, form)


def rows(facts):
    """The lines of the table, in order."""
    yield from run_rows(facts)
    yield from score_rows(facts)
    yield from size_and_training_rows(facts)
    yield Row("Seconds")
    for phase in dict.fromkeys((*PHASES, *facts["seconds"])):
        if seconds := facts["seconds"].get(phase):  # what did not happen is no line
            yield Row(PHASES.get(phase, phase), f"{seconds:,.1f}")
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
    yield Row("final, of the packed model", shown(facts["final_bpb"]), kind)
    step = "" if facts["before_at_step"] is None else f" of step {facts['before_at_step']}"
    weights = f"contiguous windows, {facts['before_weights']} weights{step}"
    yield Row("before packing", shown(facts["before_bpb"]), weights)
    yield Row("cost of packing", shown(facts["packing_cost_bpb"], "+.4f"), "contiguous windows, after minus before")
    rivals = facts["compressors"]
    if "note" in rivals:
        yield Row(f"xz and brotli ({rivals['note']})", NONE)
        return
    extent = "the same" if rivals["whole"] else "only the first"
    for label, key in RIVALS.items():
        yield Row(label, shown(rivals[key]), f"{extent} {rivals['text_bytes']:,} bytes")


def size_and_training_rows(facts):
    def count(label, key, remark=""):
        return Row(label, shown(facts[key], ",.0f"), remark)

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
    """A yes with what it means, or a no with a line for each reason."""
    tests = ", ".join(facts["tests"])
    untested = f"not all of {tests} passed" if tests else "left out: SELFTEST=0"
    yield Row("Verdict")
    for label, key, praise, reasons in (
            ("valid", "valid", "the score is a true code length of the text that was scored", facts["reasons"]),
            ("self-tested", "tested", f"{tests} passed", [untested]),
            ("record-eligible", "eligible", "could be a record of the contest", facts["eligible_reasons"])):
        answer = facts[key] or NONE
        remarks = {"yes": [praise], NONE: []}.get(answer, reasons)
        yield Row(label, answer, "".join(remarks[:1]))
        yield from (Row("", "", remark) for remark in remarks[1:])


def table(facts):
    """Aligned lines. What the run does not have, or not yet, is named in one line at the end."""
    every = list(rows(facts))
    missing = [row.label for row in every if row.value == NONE]
    kept = [row for row in every if row.value != NONE]
    left = max((len(row.label) for row in kept if row.value is not None), default=0)
    right = max((len(row.value) for row in kept if row.value is not None), default=0)
    for row, following in zip(kept, [*kept[1:], Row("")]):
        if row.value is not None:
            yield f"  {row.label:<{left}}  {row.value:>{right}}  {row.remark}".rstrip()
        elif row.label.startswith(("Run", "  ")):  # about the run
            yield row.label
        elif following.value is not None:  # a heading with something below it
            yield f"\n{row.label}"
    if missing:
        yield f"\nMissing: {'; '.join(missing)}"


# ---- runs side by side ----------------------------------------------------------------------------------------------


OF_THE_PLACE = ("RUN_ID", "OUT_DIR")  # settings that change nothing that comes out
RESULTS = (
    Column("how it ended", "state"), Column("final, of the packed model", "final_bpb", ".4f"),
    Column("before packing", "before_bpb", ".4f"), Column("cost of packing", "packing_cost_bpb", "+.4f"),
    Column("bytes in total", "total_bytes", ",.0f"), Column("parameters", "params", ",.0f"),
    Column("steps", "steps", ",.0f"), Column("training, seconds", lambda run: run["seconds"].get("train", 0), ",.1f"),
    Column("tokens per second", "tokens_per_second", ",.0f"), Column("peak memory, MiB", "peak_memory_mib", ",.0f"),
    Column("valid", "valid"), Column("commit", "commit"))


def results(every):
    """{label: [its text for each run]} of what came out."""
    return {column.heading: [column.cell(facts) for facts in every] for column in RESULTS}


def side_by_side(every):
    """Lines with a column for each run: the settings in which they differ, and what came out."""
    changed = differing_settings([facts["settings"] for facts in every])
    lines = list(changed.items())
    finals = [facts["final_bpb"] for facts in every]
    for label, values in results(every).items():
        lines.append((label, values))
        if label.startswith("final") and None not in finals:
            lines.append(("difference to the first", [f"{value - finals[0]:+.4f}" for value in finals]))
    columns = [Column("Run", "label"), *(Column(name, place, "") for place, name in enumerate(names_of(every)))]
    cells = [{"label": label, **dict(enumerate(values))} for label, values in lines]
    head, *below = (f"  {line}" for line in aligned(columns, cells))
    yield from (head, "\nSettings that differ", *below[:len(changed)], "\nResults", *below[len(changed):])
    hint = "One run each: tools/sweep.py measures a change over seeds, with its spread."
    yield f"\n{different_texts(every) or hint}"


def different_texts(every):
    """A warning where the scores of these runs do not compare, or ""."""
    texts = {text_of(facts) for facts in every if facts["final_bpb"] is not None}
    return "They scored different texts: the scores do not compare." if len(texts) > 1 else ""


def differing_settings(every, but=OF_THE_PLACE):
    """{name: [its value in each run]} of the settings {name: text} that are not the same in all of them."""
    names = sorted({name for settings in every for name in settings} - set(but))
    values = {name: [settings.get(name, "default") for settings in every] for name in names}
    return {name: of_runs for name, of_runs in values.items() if len(set(of_runs)) > 1}


def text_of(facts):
    """What identifies the text that a run scored."""
    return facts["val_sha256"] or facts["data"], facts["val_bytes"]
