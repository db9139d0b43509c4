"""The frame of the commands of tools/bench.py: options, jobs in processes of their own, and the report."""

import contextlib
import io
import math
import os
import signal
import statistics
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

import train_gpt as trainer
from common import ROOT, BadInput, Parser, commit, machine, whole, write_json

# Document lengths like FineWeb's in tokens: log-normal around a mean.
DOCUMENT_MEAN = 960
DOCUMENT_SIGMA = 1.0


def document_lengths(rng, count):
    """Tokens of each of `count` documents."""
    lengths = rng.lognormal(math.log(DOCUMENT_MEAN) - DOCUMENT_SIGMA**2 / 2, DOCUMENT_SIGMA, count)
    return np.maximum(2, lengths.astype(np.int64))


# ---- options --------------------------------------------------------------------------------------------------------


VAL_TOKENS = dict(type=whole(1), default=65536, metavar="N", help="validation tokens that are scored (default: 65536)")


def parser_of(name, description, epilog):
    """The parser of a command, with the option that all of them have."""
    parser = Parser(prog=f"bench.py {name}", allow_abbrev=False, description=description, epilog=epilog)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON, anew after each row")
    return parser


# ---- jobs -----------------------------------------------------------------------------------------------------------


def measure(work, job):
    """work(job) in this process: its result, or {"error"} of this job alone. A BadInput is one of every job."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the trainer's log
            return work(job)
    except BadInput:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].replace("COMPILE=off runs", "--modes eager measures")
        if isinstance(error, (trainer.BadInput, trainer.Stopped)):
            return {"error": reason}
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {reason}"}


def measure_apart(work, job, env=None):
    """measure(work, job) in a process of its own, so that neither memory nor compiled code comes from another job.
    `work` is a function of a module in this folder. `env` adds variables that our environment does not set.
    """
    folder = Path(job["folder"])
    result = folder / "result"
    result.unlink(missing_ok=True)
    torch.save((work, job), folder / "job")
    command = [sys.executable, str(ROOT / "tools/bench.py"), "--job", str(folder)]
    environment = {**(env or {}), **os.environ}
    code = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
    if code == 130:
        raise KeyboardInterrupt
    if not result.exists():
        reason = f"{signal.Signals(-code).name}; out of memory?" if code < 0 else f"exit code {code}"
        return {"error": f"the process ended without a result ({reason})"}
    found = torch.load(result, weights_only=False)
    if isinstance(found, BadInput):
        raise found
    return found


def run_job(folder):
    """The child process of measure_apart(): do the job in `folder`, write its result there, return the exit code."""
    work, job = torch.load(Path(folder, "job"), weights_only=False)
    try:
        result = measure(work, job)
    except BadInput as error:
        result = error
    torch.save(result, Path(folder, "result"))
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


def chosen(rt):
    """The device, dtype and attention of a Runtime of the trainer."""
    return {name: choice for name, choice, _ in rt.choices if name in ("device", "dtype", "attention")}


def median_and_range(values):
    """(median, least, most)."""
    return statistics.median(values), min(values), max(values)


# ---- the report -----------------------------------------------------------------------------------------------------


def progress(text):
    print(f"{text} ...", file=sys.stderr, flush=True)


class Report(dict, contextlib.AbstractContextManager):
    """What a command measured: "rows", and facts that they share. A context whose end, whatever the cause (Ctrl-C and
    SIGTERM, too), prints the rows so far and writes them to --json; under torchrun the first rank does.

    document: a function of the report, which gives its lines. A row of a command with several tables names its "table".
    """

    def __init__(self, args, document, settings, **facts):
        super().__init__(
            command=args.command, settings=settings, **commit(), torch=torch.__version__,
            threads=torch.get_num_threads(), machine=machine(), **facts, complete=False, rows=[])
        self.path = args.json
        self.document = document
        self.quiet = os.environ.get("RANK", "0") != "0"
        self.kept = {}  # {key: row}

    def add(self, row, key=None):
        """Keep a row, in place of the one that this key had before."""
        self.kept[key or len(self.kept)] = row
        del self["rows"]
        self["rows"] = list(self.kept.values())  # below the facts that came later
        self.save()

    def add_all(self, rows):
        for row in rows:
            self.add(row)

    def measure(self, jobs, repeats, work, merge):
        """Add the rows of jobs {key: row without what is measured}: after each work(key, repeat), which returns a
        result of measure(), the row gets merge(results so far). In turn: A B A B. A job that failed is not repeated.
        """
        results = {key: [] for key in jobs}
        for repeat in range(repeats):
            for key, row in jobs.items():
                if "error" in self.kept.get(key, ()):
                    continue
                result = work(key, repeat)
                results[key].append(result)
                self.add(row | (result if "error" in result else merge(results[key])), key)

    def table(self, name):
        """The rows of one table."""
        return [row for row in self["rows"] if row["table"] == name]

    def save(self):
        if self.path and not self.quiet:
            write_json(self.path, self, indent=1)

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
