"""What the commands of tools/bench.py print and write: options, the report, tables."""

import itertools
import json
import os
import platform
import re
import shlex
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from common import BadInput, Parser, git, whole, write

# ---- options --------------------------------------------------------------------------------------------------------


def parser_of(name, description, epilog=None):
    """The parser of a command, with the options that all of them have."""
    parser = Parser(prog=f"bench.py {name}", allow_abbrev=False, description=description, epilog=epilog)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON, anew after each row")
    return parser


def add_val_tokens(parser):
    parser.add_argument("--val-tokens", type=whole(1), default=65536, metavar="N",
                        help="validation tokens that are scored (default: 65536)")


def check_json(path):
    """BadInput before anything is measured, if --json cannot be written."""
    if path is None:
        return
    is_special = path.exists() and not path.is_file()  # a folder, a device
    if is_special or not os.access(path.absolute().parent, os.W_OK):
        raise BadInput(f"--json {path} cannot be written; name a file in a folder that exists")


# ---- the report -----------------------------------------------------------------------------------------------------


def progress(text):
    print(f"{text} ...", file=sys.stderr, flush=True)


class Report(dict):
    """What a command measured: "rows", and facts that they share. A context whose end, whatever the cause (Ctrl-C and
    SIGTERM, too), prints the rows so far and writes them to --json.

    document: a function of the report, which gives its lines. quiet: neither print nor write (another rank does).
    """

    def __init__(self, name, args, argv, document, settings="", quiet=False, **facts):
        import torch

        super().__init__(
            command=shlex.join(["tools/bench.py", name, *argv]), settings=settings, **commit(),
            torch=torch.__version__, threads=torch.get_num_threads(), machine=machine(), **facts,
            complete=False, rows=[])
        self.path = args.json
        self.document = document
        self.quiet = quiet

    def add(self, row, table=None):
        """Keep a row; `table` is where a command has several."""
        place = {"table": table} if table else {}
        self.keep([*self["rows"], place | row])

    def keep(self, rows):
        """Keep these rows in place of the ones before."""
        del self["rows"]
        self["rows"] = rows  # below the facts that came later
        self.save()

    def table(self, name):
        """The rows of one table."""
        return [row for row in self["rows"] if row["table"] == name]

    def save(self):
        if self.path and not self.quiet:
            write(self.path, (json.dumps(self, indent=1) + "\n").encode())

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self["complete"] = error is None
        if self.quiet or not self["rows"]:
            return
        try:
            self.save()
        finally:
            print("\n".join(self.document(self)), flush=True)

    @property
    def code(self):
        """The exit code of a command that measured everything."""
        return int(any("error" in row for row in self["rows"]))

    def title(self):
        """The first lines of a document."""
        yield f"command   {self['command']}"
        if not self["complete"]:
            yield "stopped   before all was measured"
        yield f"settings  {self['settings'] or '(default)'}"

    def software(self):
        changed = f" and {self['changed_files']} changed file(s)" if self["changed_files"] else ""
        return f"torch {self['torch']}, {self['threads']} CPU thread(s), commit {self['commit']}{changed}"


def commit():
    """The commit of the repository and the number of files that were changed since; "none" and 0 outside of one."""
    changed_files = len(git("status", "--porcelain").splitlines())
    return {"commit": git("rev-parse", "--short=12", "HEAD") or "none", "changed_files": changed_files}


def machine():
    """What a time depends on, apart from the software and the GPU."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (model := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        cpu = model[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "python": platform.python_version(), "system": platform.platform()}


def median_and_range(values):
    """(median, least, most)."""
    return statistics.median(values), min(values), max(values)


def errors_of(results):
    """The errors of the repeats of a job."""
    return [result["error"] for result in results if "error" in result]


# ---- tables ---------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a table."""

    heading: str
    value: object  # key of the row, or a function of it
    form: str | None = None  # format of what is aligned to the right; None: text

    def cell(self, row):
        value = self.value(row) if callable(self.value) else row.get(self.value)
        return "-" if value is None else format(value, self.form or "")


def cells(columns, row):
    """The cells of a row: what failed or was skipped has its names and says why."""
    why = row.get("skipped")
    if "error" in row:
        why = f"failed: {row['error']}"
    if why is None:
        return [column.cell(row) for column in columns]
    names = itertools.takewhile(lambda column: column.form is None, columns)
    return [*(column.cell(row) for column in names), why]


def markdown(columns, rows):
    """The lines of a Markdown table."""
    yield "| " + " | ".join(column.heading for column in columns) + " |"
    yield "|" + "|".join("---" if column.form is None else "---:" for column in columns) + "|"
    for row in rows:
        shown = cells(columns, row)
        missing = len(columns) - len(shown)
        yield "| " + " | ".join([*shown, *[""] * missing]) + " |"


def section(text, columns, rows):
    """The lines of a table with a heading and what is to be known of it; none without rows."""
    if rows:
        yield f"\n### {text}\n"
        yield from markdown(columns, rows)


def aligned(columns, rows):
    """The lines of a table for a terminal."""
    lines = [[column.heading for column in columns], *(cells(columns, row) for row in rows)]
    widths = [0] * len(columns)
    for line in lines:
        is_complete = len(line) == len(columns)
        for place, cell in enumerate(line if is_complete else line[:-1]):  # a reason is as wide as it is
            widths[place] = max(widths[place], len(cell))
    for line in lines:
        padded = [cell.ljust(width) if column.form is None else cell.rjust(width)
                  for column, cell, width in zip(columns, line, widths)]
        yield "  ".join(padded).rstrip()
