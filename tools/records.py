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
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

from common import ROOT, BadInput, Parser, exit_code, load_trainer, say, trainer_errors, write

RECORDS = ROOT / "records"
BEGIN = "<!-- {name}: made by tools/records.py -->"
END = "<!-- end of {name} -->"
NONE = "-"  # in a cell

SEEDS = {"one": 1, "two": 2, "three": 3}
CONDITIONS = ("C1", "C2", "C3", "C4")  # of #1017: a score that breaks one is no code length
LIMITS = {  # in a record's README: in the table
    "16,000,000 bytes": "bytes",
    "600 s of training": "training time",
    "600 s of evaluation": "evaluation time",
    "no choice by validation": "choice by validation",
}


class Score(NamedTuple):
    """A published score in bits per byte; of several seeds it is their mean."""

    bpb: str  # with the digits that were published
    seeds: int
    each: tuple  # that of every seed; empty if they are not known

    @property
    def deviation(self):
        """Sample standard deviation over the seeds as text; NONE if there is none."""
        return f"{statistics.stdev(map(float, self.each)):.5f}" if len(self.each) > 1 else NONE


class Weight(NamedTuple):
    """A row of "What it weighs"."""

    bytes: int
    remark: str


class Record(NamedTuple):
    """A folder of records/."""

    folder: str  # below records/, such as track_10min_16mb/2026-03-17_NaiveBaseline
    origin: str  # Upstream, #1855 or "Valid twin of #518"
    name: str
    summary: str  # what distinguishes it
    parameters: str  # their number
    settings: object  # Settings of the trainer
    score: Score  # None for a twin, which nobody ran at full size
    published: dict  # {what: value as text}
    broken: list  # conditions and limits that it does not meet, such as C3 or bytes
    measured: dict  # {what: value as text} of the small version
    commit: str  # of the trainer that measured it
    weights: dict  # {what: Weight}

    @property
    def label(self):
        """How a table names it."""
        return self.origin.replace("Valid twin", "twin").replace("Upstream", "upstream")

    @property
    def short_label(self):
        """How the head of a narrow column names it."""
        twin = re.fullmatch(r"Valid twin of (#\d+)", self.origin)
        return f"{twin[1]} twin" if twin else self.label

    @property
    def broken_conditions(self):
        """The conditions of #1017 that it breaks."""
        return [name for name in self.broken if name in CONDITIONS]

    @property
    def valid(self):
        """Is its score a true code length?"""
        return not self.broken_conditions


# ---- read a folder --------------------------------------------------------------------------------------------------


class Readme:
    """The README.md of a record."""

    def __init__(self, path):
        self.path = path
        try:
            self.text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{path}: cannot be read ({error})") from None

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
        """Cells of each row of the section's table, without its head. BadInput if a row of those wanted is missing, or
        if one has another number of cells than the head.
        """
        lines = re.findall(r"^\| .+\|$", self.section(title), re.M)
        head, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines or ["| |"]]
        for row in rows:
            if len(row) != len(head):
                raise BadInput(f"{self.path}: '| {row[0]} |' below '## {title}' has {len(row)} cells, not {len(head)}")
        for what in wanted:
            if what not in [row[0] for row in rows]:
                raise BadInput(f"{self.path}: no row '| {what} |' below '## {title}'")
        return rows


def read_score(readme, published):
    """The Score of a README, or None for a twin."""
    cell = published.get("score", "")
    if cell.startswith("none"):
        return None
    found = readme.find(r"^([\d.]+) BPB, (one|two|three) seeds?(?: \(([\d., ]+)\))?;", "score and seeds", cell)
    each = tuple(found[3].split(", ")) if found[3] else ()
    if each and len(each) != SEEDS[found[2]]:
        raise BadInput(f"{readme.path}: {found[2]} seeds, but {len(each)} scores: {found[3]}")
    return Score(found[1], SEEDS[found[2]], each)


def read_broken(readme):
    """Names of the conditions and limits that are not met."""
    broken = []
    for what, met, *_ in readme.rows("Conditions and limits"):
        if met == "**no**":
            broken.append(LIMITS.get(what, what.partition(":")[0]))
    return broken


def read_record(folder):
    """The Record of a folder. BadInput if a part of it is missing, or if the trainer refuses its settings."""
    readme = Readme(folder / "README.md")
    title = readme.find(r"\A# (Upstream|#\d+|Valid twin of #\d+): ([^\n]+)\n", "title '# #NUMBER: what it is'")
    summary = readme.find(r"^In short: (.+?)\.\n\n", "paragraph 'In short: what distinguishes it.'")
    words = " ".join(readme.text.split())
    published = {row[0]: row[1] for row in readme.rows("Published, not measured here", "score")}
    measured = {row[0]: row[1] for row in readme.rows("Measured here", "score", "artifact", "seconds")}
    weights = {}
    for row in readme.rows("What it weighs", "published code", "expected model"):
        size = readme.find(r"^([\d,]+) bytes$", f"number of bytes in '{row[0]}'", row[1])[1]
        weights[row[0]] = Weight(int(size.replace(",", "")), row[2])
    with trainer_errors():
        settings = load_trainer().Settings.parse([f"@{folder}"])
    return Record(
        folder=folder.relative_to(RECORDS).as_posix(),
        origin=title[1],
        name=title[2],
        summary=" ".join(summary[1].split()),
        parameters=readme.find(r"\*\*([\d,]+) parameters\*\*", "'**N parameters**'", words)[1],
        settings=settings,
        score=read_score(readme, published),
        published=published,
        broken=read_broken(readme),
        measured=measured,
        commit=readme.find(r"of commit ([0-9a-f]{7,12})\b", "'of commit ...'", readme.section("Measured here"))[1],
        weights=weights,
    )


def read_records():
    """Every Record: the tracks one after the other, in the order of the pull requests, a twin after its original.
    A folder with a submission.json is no published system but a submission: it is left out.
    """
    def place(record):
        number = re.search(r"\d+", record.origin)
        return record.folder.partition("/")[0], int(number[0]) if number else 0, record.origin.startswith("Valid twin")

    folders = [path.parent for path in RECORDS.glob("*/*/settings.env")]
    published = [folder for folder in folders if not (folder / "submission.json").exists()]
    records = sorted(map(read_record, published), key=place)
    if not records:
        raise BadInput(f"{RECORDS}: no folders with a settings.env")
    return records


# ---- the tables -----------------------------------------------------------------------------------------------------


def table(head, rows):
    """Lines of a Markdown table."""
    def line(cells):
        return f"| {' | '.join(cells)} |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def link(record, text):
    return f"[{text}]({record.folder}/)"


def first_of(values, beginning):
    """The value of the first key that begins so, or NONE."""
    return next((value for what, value in values.items() if what.startswith(beginning)), NONE)


def leading_number(text):
    """15,863,489 of "15,863,489 bytes, the largest of the three"."""
    found = re.match(r"[\d,]*\d", text)
    return found[0] if found else NONE


def index_table(records):
    """What each record is."""
    head = ["PR", "record", "parameters", "what distinguishes it", "reported BPB", "bytes", "valid", "breaks",
            "small BPB"]
    rows = []
    for record in records:
        rows.append([
            record.label, link(record, record.name), record.parameters, record.summary, reported(record.score),
            leading_number(record.published.get("submission", NONE)), "yes" if record.valid else "no",
            ", ".join(record.broken) or NONE, small_score(record)])
    return table(head, rows)


def reported(score):
    if score is None:
        return NONE
    return f"{score.bpb}, {score.seeds} seed{'s' * (score.seeds > 1)}"


def small_score(record):
    """BPB of the small version."""
    return record.measured["score"].partition(" BPB")[0].removeprefix("**")


def figures_table(records):
    """What was published, stage by stage, beside what was measured here."""
    head = ["PR", "reported BPB", "of each seed", "standard deviation", "before packing", "packed", "sliding window",
            "training", "small BPB", "small artifact", "small run, s", "commit"]
    rows = []
    for record in records:
        score, published = record.score, record.published
        rows.append([
            link(record, record.label),
            score.bpb if score else NONE,
            ", ".join(score.each) or NONE if score else NONE,
            score.deviation if score else NONE,
            first_of(published, "before packing"),
            first_of(published, "packed"),
            first_of(published, "sliding window"),
            first_of(published, "training"),
            small_score(record),
            leading_number(record.measured["artifact"]),
            record.measured["seconds"].replace(" of ", " "),
            record.commit])
    return table(head, rows)


def bytes_table(records):
    """Published and expected bytes, with each way to write our code."""
    ways = list(dict.fromkeys(what for record in records for what in record.weights if what.startswith("with the ")))
    head = ["PR", "published code", "expected model", *ways]
    rows = []
    for record in records:
        cells = [link(record, record.label)]
        for what in ("published code", "expected model"):
            cells.append(f"{record.weights[what].bytes:,}")
        for way in ways:
            weight = record.weights.get(way)
            cells.append(f"{weight.bytes:,}: {weight.remark}" if weight else NONE)
        rows.append(cells)
    return table(head, rows)


# ---- the matrix of techniques ---------------------------------------------------------------------------------------

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
LEFT_OUT = ("selftest",)  # of every run, whatever the record
OFF = (0, "", (), "none", "off")
OFF_AT = {"eval_temperature": (1,)}  # 0 is a temperature that is fitted
UNITS = {"warmdown_iters": "steps", "warmdown_seconds": "s"}


def techniques():
    """{field of Settings: technique} in the order of the fields: the trainer's own table, and LABELS."""
    trainer = load_trainer()
    names = {}
    for line in trainer.__doc__.partition("\nTechniques")[2].partition("\n\n")[0].splitlines()[1:]:
        technique, setting, _ = line.rsplit(maxsplit=2)
        names.setdefault(setting.lower(), technique.strip())
    names |= LABELS
    return {f.name: names[f.name] for f in fields(trainer.Settings) if f.name in names and f.name not in LEFT_OUT}


def value_where_on(settings, field):
    """The value of a setting as a cell; "" where it is off, or waits for a setting that is off."""
    if field == "warmdown_frac":
        return warmdown(settings)
    value = getattr(settings, field)
    if value in OFF_AT.get(field, OFF) or not settings.holds(settings.rule(field)):
        return ""
    return "yes" if value is True else text_of(value)


def warmdown(settings):
    """The length of the warmdown: steps or seconds, which replace the fraction, or the fraction."""
    for field, unit in UNITS.items():
        if getattr(settings, field):
            return f"{text_of(getattr(settings, field))} {unit}"
    return text_of(settings.warmdown_frac) if settings.warmdown_frac else ""


def text_of(value):
    """A value as a settings file has it."""
    return load_trainer().format_value(value).removesuffix(".0")


def techniques_table(records):
    """Which record has which technique."""
    rows = []
    unused = []
    for field, technique in techniques().items():
        cells = [value_where_on(record.settings, field) for record in records]
        if any(cells):
            rows.append([technique, f"`{field.upper()}`", *cells])
        else:
            unused.append(f"{technique} (`{field.upper()}`)")
    head = ["technique", "setting", *(record.short_label for record in records)]
    return [*table(head, rows), "", f"Off in all of them: {', '.join(unused)}."]


TABLES = {"index": index_table, "figures": figures_table, "bytes": bytes_table, "techniques": techniques_table}


# ---- the file -------------------------------------------------------------------------------------------------------


def with_tables(text, records, path):
    """The text with every table as the folders have it. BadInput if the markers of a table are not there once."""
    for name, make in TABLES.items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise BadInput(f"{path}: wants the lines '{begin}' and '{end}' once each, in this order")
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = "\n".join([f"{before}{begin}", *make(records), f"{end}{after}"])
    return text


def arguments(argv):
    parser = Parser(prog="records.py", description="Write the tables of records/README.md from the folders.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if they differ")
    return parser.parse_args(argv)


def run(args):
    path = RECORDS / "README.md"
    found = Readme(path).text
    records = read_records()
    wanted = with_tables(found, records, path)
    if args.check:
        return report_differences(found, wanted)
    if wanted != found:
        write(path, wanted.encode())
    say("records", folders=len(records), tables=",".join(TABLES), changed="yes" if wanted != found else "no")
    return 0


def report_differences(found, wanted):
    """Print what is, and what the folders say. Exit code: 1 if that is not the same."""
    lines = list(difflib.unified_diff(found.splitlines(), wanted.splitlines(), "records/README.md", "the folders",
                                      n=0, lineterm=""))
    if lines:
        print(*lines, "", "Write them anew: python tools/records.py", sep="\n")
    return 1 if lines else 0


def main(argv):
    return exit_code(lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
