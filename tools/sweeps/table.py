"""The result as people read it: Markdown, CSV, a picture with error bars, and an aligned view on a terminal."""

import csv
import io
import statistics

from common import write
from sweeps.plan import BASE, setting_of
from tables import Column, aligned, markdown

FORMATS = (".md", ".csv", ".png", ".svg")
CLEAR = "*"  # marks a change of more than two standard errors


def change_text(sample):
    """Mean change ± its standard error, and the mark."""
    if sample is None:
        return None
    error = "" if sample["standard_error"] is None else f" ± {sample['standard_error']:.4f}"
    return f"{sample['mean']:+.4f}{error}{f' {CLEAR}' if sample['is_clear'] else ''}"


def score_text(sample):
    """mean (min .. max)."""
    if sample is None:
        return None
    text = f"{sample['mean']:.4f}"
    return text if sample["count"] == 1 else f"{text} ({sample['min']:.4f} .. {sample['max']:.4f})"


def pace_text(speed):
    if speed["ratio"] is None:
        return None
    if not speed["blocks"]:
        return "x 1"
    return f"x {speed['ratio']:.3f} ± {speed['standard_error']:.3f}{f' {CLEAR}' if speed['is_clear'] else ''}"


def mean_bytes(runs):
    sizes = [run["model_bytes"] for run in runs if run["model_bytes"]]
    return statistics.fmean(sizes) if sizes else None


def validity(row):
    """yes, no, or how many of the runs that were scored are valid."""
    scored = [run for runs in row["runs"].values() for run in runs if run["val_bpb"] is not None]
    valid = sum(run["valid"] == "yes" for run in scored)
    if not scored:
        return None
    return {len(scored): "yes", 0: "no"}.get(valid, f"{valid} of {len(scored)}")


def columns(result, plan):
    """The Columns of a result."""
    first = plan.matches[0]
    base_bytes = None if plan.grid else mean_bytes(result["base"]["runs"])

    def size(row):
        row_bytes = mean_bytes(row["runs"][first])
        if row_bytes and base_bytes:
            return f"{row_bytes / base_bytes - 1:+.1%}"
        return f"{row_bytes:,.0f}" if row_bytes else None

    def technique(row):
        return row["name"] if row["reference"] == BASE else f"{row['name']} [vs {row['reference']}]"

    def count(row):
        return row[first]["bpb"]["count"] if row[first]["bpb"] else 0

    if plan.grid:
        for axis, change in enumerate(plan.rows[0].changes if plan.rows else ()):
            yield Column(setting_of(change), lambda row, axis=axis: row["changes"][axis].partition("=")[2])
    else:
        yield Column("technique", technique)
        yield Column("settings", lambda row: f"`{' '.join(row['changes'])}`")
    change_of = "from the best" if plan.grid else "BPB change"
    for match in plan.matches:
        if match == "time":
            yield Column("time per step", lambda row: pace_text(row["speed"]), "")
            yield Column("steps in equal time", lambda row: row["time"]["iterations"], "")
        if plan.grid:
            yield Column(f"BPB at equal {match}", lambda row, match=match: score_text(row[match]["bpb"]), "")
        yield Column(f"{change_of} at equal {match}", lambda row, match=match: change_text(row[match]["change"]), "")
    if any(0 < count(row) < len(plan.seeds) for row in result["rows"]):
        yield Column("seeds", count, "")
    yield Column("model bytes", size, "")
    yield Column("valid", validity, "")
    if numbers := footnotes(result):
        yield Column("note", lambda row: " ".join(f"[{numbers[note]}]" for note in row["notes"]))


def footnotes(result):
    """{text of a note: its number}, in the order of the rows."""
    notes = dict.fromkeys(note for row in result["rows"] for note in row["notes"])
    return {note: number for number, note in enumerate(notes, 1)}


def heading(result, plan):
    """Lines above the table."""
    base = result["base"]
    if not plan.grid:
        params = next((f", {run['params']:,} parameters" for run in base["runs"] if run["params"]), "")
        yield f"Base: {score_text(base['bpb']) or '-'} BPB{params}."
        yield from (f"Base, {note}." for note in base["notes"])
    yield from (f"Left out: {text}." for text in plan.left_out)


def footer(result, plan):
    """Lines below it: notes, what the numbers are, and what made them."""
    data = result["data"]
    host = result["machine"]
    for note, number in footnotes(result).items():
        yield f"- [{number}] {note}."
    over = f"seed {plan.seeds[0]} alone, so that the spread is unknown"
    if len(plan.seeds) > 1:
        over = (f"seeds {', '.join(map(str, plan.seeds))}, ± its standard error from the spread of all rows; "
                f"{CLEAR} more than two of them")
    other = "the best point" if plan.grid else "the reference"
    yield f"- BPB of the packed model, lower is better. Change: from {other} with the same seed, mean over {over}."
    tokens = plan.steps * plan.settings[BASE].train_batch_tokens
    yield (f"- Equal steps: {plan.steps:,} steps, {tokens:,} tokens, of {data['name']} with {data['train_tokens']:,} "
           f"training tokens ({tokens / data['train_tokens']:.2f} epochs).")
    if "time" in plan.matches:
        yield (f"- Equal time: the steps that fit into the time of {plan.steps:,} steps of the "
               f"{'base' if plan.grid else 'reference'}. Time per step: {result['timing']}; ± standard error over the "
               f"processes, {CLEAR} can be told from 1 (95 %), else the steps are equal. x 1 where the settings "
               "(rates, schedules, packing, scoring) cannot change the work of a step.")
        if floor := result["noise_floor"]:
            yield f"- Noise floor: the base against itself takes {pace_text(floor)} of its own time."
    devices = ", ".join(result["devices"]) or "no device yet"
    ranks = f", {result['ranks']} ranks a run" if result["ranks"] > 1 else ""
    changed = f" and {result['changed_files']} changed file(s)" if result["changed_files"] else ""
    yield (f"- Machine: {devices}, {host['cores']} cores of {host['cpu']}, torch {result['torch']}, "
           f"{result['threads']} thread(s) a run{ranks}, {result['jobs']} run(s) at once; commit {result['commit']}"
           f"{changed}.")
    yield "- These are small-scale results: they say nothing certain about 8xH100 at full size."
    yield f"- Command: `{result['command']}`"


def as_text(result, plan, terminal=False):
    """The table and what is to be known of it: Markdown, or aligned columns for a terminal."""
    draw = aligned if terminal else markdown
    table = draw(list(columns(result, plan)), result["rows"])
    text = "\n".join([*heading(result, plan), "", *table, "", *footer(result, plan), ""]).lstrip()
    return text.replace("`", "") if terminal else text


def comma_separated(result, plan):
    """The text of the table as CSV: numbers of their own columns, unrounded."""
    numbers = ("mean", "standard_error", "is_clear", "min", "max", "count")
    samples = [(match, key) for match in plan.matches for key in ("bpb", "change")]
    names = [f"{match}_{key}_{name}" for match, key in samples for name in numbers]
    lines = [["name", "reference", "changes", *names, "time_per_step", "time_per_step_error", "model_bytes", "valid",
              "notes"]]
    for row in result["rows"]:
        values = [(row[match][key] or {}).get(name) for match, key in samples for name in numbers]
        speed = row["speed"] or {}
        lines.append([row["name"], row["reference"], " ".join(row["changes"]), *values, speed.get("ratio"),
                      speed.get("standard_error"), mean_bytes(row["runs"][plan.matches[0]]), validity(row),
                      "; ".join(row["notes"])])
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def picture(result, plan, form):
    """The bytes of a picture: the change of each row with two standard errors to both sides, the best row on top."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if any(row[match]["change"] for match in plan.matches)][::-1]
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "sweep", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 1.2 + 0.28 * max(len(rows), 1)), layout="constrained")
        axes = figure.subplots()
        for offset, match in enumerate(plan.matches):
            samples = [(row[match]["change"], place + 0.2 * offset) for place, row in enumerate(rows)]
            samples = [(sample, place) for sample, place in samples if sample]
            axes.errorbar([sample["mean"] for sample, _ in samples], [place for _, place in samples],
                          xerr=[2 * (sample["standard_error"] or 0) for sample, _ in samples], fmt="o", markersize=4,
                          capsize=2, linewidth=1, label=f"equal {match}")
        axes.axvline(0, color="#888888", linewidth=1)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        axes.set_xlabel(f"change in BPB from {'the best point' if plan.grid else 'the reference'}, lower is better; "
                        "bars: two standard errors")
        axes.grid(axis="x", color="#e3e3e0")
        axes.set_axisbelow(True)
        if len(plan.matches) > 1:
            axes.legend()
        figure.savefig(file, dpi=130, format=form, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()


def write_table(result, plan, path):
    """Write the table in the format of the file's name. Afterwards it is complete, or as it was."""
    if path.suffix in (".png", ".svg"):
        write(path, picture(result, plan, path.suffix[1:]))
    else:
        text = comma_separated(result, plan) if path.suffix == ".csv" else as_text(result, plan)
        write(path, text.encode())
