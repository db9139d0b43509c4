"""The tables of records/README.md, from the folders of the records.

    python tools/records.py             write the tables anew, between their markers
    python tools/records.py --check     say how they differ from the folders; exit code 1 if they do

Every figure comes from a record's own README.md: what was published, which limits it breaks, what was measured here,
what it weighs. The techniques come from its settings.env, read by the trainer itself. The text between the tables is
written by hand and stays as it is.
"""

import difflib
import re
import statistics
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

from common import ROOT, BadInput, Parser, exit_code, load_trainer, say, table_of_techniques, trainer_errors, write
from tables import Column, markdown

RECORDS = ROOT / "records"
BEGIN = "<!-- {name}: made by tools/records.py -->"
END = "<!-- end of {name} -->"

SEEDS = {"one": 1, "two": 2, "three": 3}
CONDITIONS = ("C1", "C2", "C3", "C4")  # of #1017: a score that breaks one is no code length
LIMITS = {  # in a record's README: in the table
    "16,000,000 bytes": "bytes",
    "600 s of training": "training time",
    "600 s of evaluation": "evaluation time",
    "no choice by validation": "choice by validation",
}


# ---- read a folder --------------------------------------------------------------------------------------------------


def read(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None


class Record:
    """A folder of records/. BadInput if a part of its README.md is missing, or if the trainer refuses its settings."""

    def __init__(self, folder):
        self.path = folder / "README.md"
        self.text = read(self.path)
        self.folder = folder.relative_to(RECORDS).as_posix()  # such as track_10min_16mb/2026-03-17_NaiveBaseline
        title = self.find(r"\A# (Upstream|#\d+|Valid twin of #\d+): ([^\n]+)\n", "title '# #NUMBER: what it is'")
        self.label = title[1].replace("Valid twin", "twin").replace("Upstream", "upstream")
        self.short_label = " ".join(reversed(self.label.split(" of ")))  # "#518 twin" for "twin of #518"
        self.name = title[2]
        summary = self.find(r"^In short: (.+?)\.\n\n", "paragraph 'In short: what distinguishes it.'")[1]
        self.summary = " ".join(summary.split())
        self.parameters = self.find(r"\*\*([\d,]+)\s+parameters\*\*", "'**N parameters**'")[1]
        self.published = {what: cells[0] for what, cells in self.rows("Published, not measured here", "score").items()}
        measured = self.rows("Measured here", "score", "artifact", "seconds")
        self.measured = {what: cells[0] for what, cells in measured.items()}
        self.small_bpb = self.measured["score"].partition(" BPB")[0].removeprefix("**")
        self.commit = self.find(r"of commit ([0-9a-f]{7,12})\b", "'of commit ...'", self.section("Measured here"))[1]
        conditions = self.rows("Conditions and limits").items()
        self.broken = [LIMITS.get(what, what.partition(":")[0]) for what, (met, *_) in conditions if met == "**no**"]
        self.broken_conditions = [name for name in self.broken if name in CONDITIONS]
        self.valid = not self.broken_conditions  # is its score a true code length?
        with trainer_errors():
            self.settings = load_trainer().Settings.parse([f"@{folder}"])

    def find(self, pattern, what, text=None):
        """The match of a pattern; BadInput that says what is missing."""
        found = re.search(pattern, self.text if text is None else text, re.M | re.S)
        if found is None:
            raise BadInput(f"{self.path}: no {what}; see \"Adding one\" in records/README.md")
        return found

    def section(self, title):
        """The text below a heading."""
        return self.find(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", f"heading '## {title}'")[1]

    def rows(self, title, *wanted):
        """{first cell: the others} of the rows of the section's table, without its head. BadInput if a row of those
        wanted is missing, or if one has another number of cells than the head.
        """
        lines = re.findall(r"^\| (.+) \|$", self.section(title), re.M) or [""]
        head, *rows = [[cell.replace("\\|", "|") for cell in re.split(r"\s*(?<!\\)\|\s*", line)] for line in lines]
        for row in rows:
            if len(row) != len(head):
                raise BadInput(f"{self.path}: '| {row[0]} |' below '## {title}' has {len(row)} cells, not {len(head)}")
        found = {what: cells for what, *cells in rows}
        for what in wanted:
            if what not in found:
                raise BadInput(f"{self.path}: no row '| {what} |' below '## {title}'")
        return found

    def score(self):
        """(bits per byte with the digits that were published, number of seeds, [that of each seed] or []). Of several
        seeds it is their mean. (None, 0, []) for a twin, which nobody ran at full size.
        """
        cell = self.published["score"]
        if cell.startswith("none"):
            return None, 0, []
        pattern = r"^([\d.]+) BPB, (one|two|three) seeds?(?: \(([\d., ]+)\))?;"
        bpb, seeds, scores = self.find(pattern, "score and seeds", cell).groups()
        each = scores.split(", ") if scores else []
        if each and len(each) != SEEDS[seeds]:
            raise BadInput(f"{self.path}: {seeds} seeds, but {len(each)} scores: {scores}")
        return bpb, SEEDS[seeds], each

    def link(self, text):
        return f"[{text}]({self.folder}/)"


def read_records():
    """Every Record: the tracks one after the other, in the order of the pull requests, a twin after its original.
    A folder with a submission.json is no published system but a submission: it is left out.
    """
    def place(record):
        number = re.search(r"\d+", record.label)
        return record.folder.partition("/")[0], int(number[0]) if number else 0, record.label.startswith("twin")

    folders = [path.parent for path in RECORDS.glob("*/*/settings.env")]
    records = [Record(folder) for folder in folders if not (folder / "submission.json").exists()]
    if not records:
        raise BadInput(f"{RECORDS}: no folders with a settings.env")
    return sorted(records, key=place)


# ---- the tables: a row is {heading: cell}, without those that a record has not --------------------------------------


def leading_number(text):
    """15,863,489 of "15,863,489 bytes, the largest of the three"; None of what begins otherwise."""
    found = re.match(r"[\d,]*\d", text or "")
    return found and found[0]


def what_it_is(record):
    bpb, seeds, _ = record.score()
    return {
        "PR": record.label,
        "record": record.link(record.name),
        "parameters": record.parameters,
        "what distinguishes it": record.summary,
        "reported BPB": bpb and f"{bpb}, {seeds} seed{'s' * (seeds > 1)}",
        "bytes": leading_number(record.published.get("submission")),
        "valid": "yes" if record.valid else "no",
        "breaks": ", ".join(record.broken) or None,
        "small BPB": record.small_bpb,
    }


def figures(record):
    """What was published, stage by stage, beside what was measured here. A deviation is that of the sample."""
    bpb, _, each = record.score()
    stages = {}
    for stage in ("before packing", "packed", "sliding window", "training"):
        stages[stage] = next((value for what, value in record.published.items() if what.startswith(stage)), None)
    return {
        "PR": record.link(record.label),
        "reported BPB": bpb,
        "of each seed": ", ".join(each) or None,
        "standard deviation": f"{statistics.stdev(map(float, each)):.5f}" if len(each) > 1 else None,
        **stages,
        "small BPB": record.small_bpb,
        "small artifact": leading_number(record.measured["artifact"]),
        "small run, s": record.measured["seconds"].replace(" of ", " "),
        "commit": record.commit,
    }


def weights(record):
    """Published and expected bytes, with each way to write our code."""
    row = {"PR": record.link(record.label)}
    for what, (size, remark) in record.rows("What it weighs", "published code", "expected model").items():
        size = record.find(r"^([\d,]+) bytes$", f"number of bytes in '{what}'", size)[1]
        if what in ("published code", "expected model"):
            row[what] = size
        elif what.startswith("with the "):
            row[what] = f"{size}: {remark}"
    return row


# Settings that tell records apart: those that are not in the trainer's own table of techniques, and those that are,
# where a record may have another value than the technique there.
LABELS = {
    "vocab_size": "vocabulary",
    "num_layers": "layers",
    "num_kv_heads": "key/value heads",
    "mlp_mult": "width of the MLP",
    "asym_logit_rescale": "two caps of the logits",
    "ln_scale": "LN scale",
    "resid_mix": "residual mix",
    "trigram_vocab_size": "trigram table",
    "train_seq_schedule": "context that grows",
    "loader": "order of the training text",
    "muon_row_normalize": "MuonEq-R",
    "fit": "pruning or allocation to fit",
    "matrix_quant": "rounding of the matrices",
    "embed_quant": "rounding of the tables",
    "prune_pct": "share that is pruned",
    "gptq_calibration": "text of the calibration",
    "compressor": "compressor",
    "eval_context": "context in evaluation",
    "eval_temperature": "temperature (0: fitted)",
    "eval_docs": "each document on its own",
    "ttt": "test-time training",
    "byte_weighted_ttt": "TTT weighted by bytes",
    "ttt_warm_start_a": "warm start of the adapters",
    "mixer": "n-gram mixture",
}
OFF = (0, "", (), "none", "off")
OFF_AT = {"eval_temperature": (1,)}  # 0 is a temperature that is fitted
UNITS = {"warmdown_iters": "steps", "warmdown_seconds": "s"}


def techniques():
    """{field of Settings: technique} in the order of the fields: the trainer's own table, and LABELS."""
    names = {setting.lower(): technique for technique, setting in reversed(table_of_techniques())} | LABELS
    del names["selftest"]  # of every run, whatever the record
    return {f.name: names[f.name] for f in fields(load_trainer().Settings) if f.name in names}


def value_where_on(settings, field):
    """The value of a setting as a cell; "" where it is off, or waits for a setting that is off."""
    if field == "warmdown_frac":  # steps or seconds replace it
        field = next((other for other in UNITS if getattr(settings, other)), field)
    value = getattr(settings, field)
    if value in OFF_AT.get(field, OFF) or not settings.holds(settings.rule(field)):
        return ""
    text = "yes" if value is True else load_trainer().format_value(value).removesuffix(".0")
    return f"{text} {UNITS[field]}" if field in UNITS else text


def techniques_table(records):
    """Lines: which record has which technique."""
    rows = []
    unused = []
    for field, technique in techniques().items():
        cells = {record.short_label: value_where_on(record.settings, field) for record in records}
        if any(cells.values()):
            rows.append({"technique": technique, "setting": f"`{field.upper()}`", **cells})
        else:
            unused.append(f"{technique} (`{field.upper()}`)")
    return [*table(rows), "", f"Off in all of them: {', '.join(unused)}."]


def table(rows):
    """Lines of a Markdown table with the columns of all rows."""
    headings = dict.fromkeys(heading for row in rows for heading in row)
    return markdown([Column(heading, heading) for heading in headings], rows)


# ---- the file -------------------------------------------------------------------------------------------------------


ROWS = {"index": what_it_is, "figures": figures, "bytes": weights}


def with_tables(text, records, path):
    """The text with every table as the folders have it. BadInput if the markers of a table are not there once."""
    tables = {name: table([row(record) for record in records]) for name, row in ROWS.items()}
    for name, lines in {**tables, "techniques": techniques_table(records)}.items():
        marks = [BEGIN.format(name=name), END.format(name=name)]
        parts = re.split(f"({'|'.join(marks)})", text)
        if parts[1::2] != marks:
            raise BadInput(f"{path}: wants the lines '{marks[0]}' and '{marks[1]}' once each, in this order")
        parts[2] = "\n".join(["", *lines, ""])
        text = "".join(parts)
    return text


def run(args):
    path = RECORDS / "README.md"
    found = read(path)
    records = read_records()
    wanted = with_tables(found, records, path)
    changed = wanted != found
    if args.check:
        differences = list(difflib.unified_diff(found.splitlines(), wanted.splitlines(), "records/README.md",
                                                "the folders", n=0, lineterm=""))
        if differences:
            print(*differences, "", "Write them anew: python tools/records.py", sep="\n")
        return 1 if differences else 0
    if changed:
        write(path, wanted.encode())
    say("records", folders=len(records), tables=",".join([*ROWS, "techniques"]), changed="yes" if changed else "no")
    return 0


def arguments(argv):
    parser = Parser(prog="records.py", description="Write the tables of records/README.md from the folders.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if they differ")
    return parser.parse_args(argv)


def main(argv):
    return exit_code(lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
