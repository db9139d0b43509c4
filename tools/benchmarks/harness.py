"""What the measurements share: jobs in processes of their own, memory and CPU time, synthetic documents, options, the
report and its tables.
"""

import contextlib
import importlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import ROOT, BadInput, Parser, git, load_trainer, whole, write

# Document lengths like FineWeb's in tokens: log-normal around a mean.
DOCUMENT_MEAN = 960
DOCUMENT_SIGMA = 1.0


def document_lengths(rng, count):
    """Tokens of each of `count` documents."""
    lengths = rng.lognormal(math.log(DOCUMENT_MEAN) - DOCUMENT_SIGMA**2 / 2, DOCUMENT_SIGMA, count)
    return np.maximum(2, lengths.astype(np.int64))


# ---- jobs -----------------------------------------------------------------------------------------------------------


def measure(work, job):
    """work(job) in this process: its result, or {"error"} of this job alone, or {"bad_input"} of every job."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the trainer's log
            return work(job)
    except BadInput as error:
        return {"bad_input": str(error)}
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else ""
        reason = reason.replace("COMPILE=off runs", "--modes eager measures")
        if isinstance(error, (load_trainer().BadInput, load_trainer().Stopped)):
            return {"error": reason}
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {reason}"}


def measure_apart(work, job, env=None):
    """measure(work, job) in a process of its own, so that neither memory nor compiled code comes from another job.
    `work` is a function of a module in this folder. `env` adds variables that our environment does not set.
    """
    folder = Path(job["folder"])
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    call = {"module": work.__module__, "function": work.__name__, "job": job}
    (folder / "job.json").write_text(json.dumps(call), encoding="utf-8")
    command = [sys.executable, str(ROOT / "tools/bench.py"), "--job", str(folder)]
    environment = {**(env or {}), **os.environ}
    code = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
    if code == 130:
        raise KeyboardInterrupt
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    reason = f"{signal.Signals(-code).name}; out of memory?" if code < 0 else f"exit code {code}"
    return {"error": f"the process ended without a result ({reason})"}


def run_job(folder):
    """The child process of measure_apart(): read the job in `folder`, write its result there, return the exit code."""
    folder = Path(folder)
    call = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    work = getattr(importlib.import_module(call["module"]), call["function"])
    (folder / "result.json").write_text(json.dumps(measure(work, call["job"])), encoding="utf-8")
    return 0


def usage():
    """(CPU seconds, peak MiB) of this process and of the children that it waited for, one of which ran at a time."""
    import resource  # Unix has it

    this_process = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = this_process.ru_utime + this_process.ru_stime + children.ru_utime + children.ru_stime
    peak = this_process.ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss begins with the peak of the process that started this one
        lines = status.read_text(encoding="utf-8").splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    units_per_mib = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return seconds, (peak + children.ru_maxrss) / units_per_mib


def measure_in_turn(jobs, repeats, work):
    """Call work(job, repeat), which returns a result of measure(), in turn: A B A B. A job that failed is not repeated.

    Yields {job: [result of each repeat]} of what was measured so far, after each result.
    """
    results = {}
    for repeat in range(repeats):
        for job in jobs:
            of_job = results.get(job, [])
            if errors_of(of_job):
                continue
            result = work(job, repeat)
            if "bad_input" in result:
                raise BadInput(result["bad_input"])
            results[job] = [*of_job, result]
            yield results


def median_and_range(values):
    """(median, least, most)."""
    return statistics.median(values), min(values), max(values)


def errors_of(results):
    """The errors of the repeats of a job."""
    return [result["error"] for result in results if "error" in result]


# ---- options --------------------------------------------------------------------------------------------------------


def parser_of(name, description, epilog=None):
    """The parser of a command."""
    return Parser(prog=f"bench.py {name}", allow_abbrev=False, description=description, epilog=epilog)


def add_json(parser):
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON, anew after each row")


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
