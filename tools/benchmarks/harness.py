"""What the measurements share: jobs in processes of their own, memory and CPU time, synthetic documents."""

import contextlib
import importlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np

from benchmarks.reports import errors_of
from common import ROOT, BadInput, load_trainer

# Document lengths like FineWeb's in tokens: log-normal around a mean.
DOCUMENT_MEAN = 960
DOCUMENT_SIGMA = 1.0


def document_lengths(rng, count):
    """Tokens of each of `count` documents."""
    lengths = rng.lognormal(math.log(DOCUMENT_MEAN) - DOCUMENT_SIGMA**2 / 2, DOCUMENT_SIGMA, count)
    return np.maximum(2, lengths.astype(np.int64))


# ---- jobs -----------------------------------------------------------------------------------------------------------


def measure(work, job):
    """work(job) in this process: its result, or {"error"} of this job alone. A BadInput is one of every job."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the trainer's log
            return work(job)
    except BadInput:
        raise
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
        found = json.loads(result.read_text(encoding="utf-8"))
        if "bad_input" in found:
            raise BadInput(found["bad_input"])
        return found
    reason = f"{signal.Signals(-code).name}; out of memory?" if code < 0 else f"exit code {code}"
    return {"error": f"the process ended without a result ({reason})"}


def run_job(folder):
    """The child process of measure_apart(): read the job in `folder`, write its result there, return the exit code."""
    folder = Path(folder)
    call = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    work = getattr(importlib.import_module(call["module"]), call["function"])
    try:
        result = measure(work, call["job"])
    except BadInput as error:
        result = {"bad_input": str(error)}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
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


def in_turn(jobs, repeats, work):
    """Call work(job, repeat), which returns a result of measure(), in turn: A B A B. A job that failed is not repeated.

    Yields {job: [result of each repeat]} of what was measured so far, after each result.
    """
    results = {}
    for repeat in range(repeats):
        for job in jobs:
            of_job = results.get(job, [])
            if errors_of(of_job):
                continue
            results[job] = [*of_job, work(job, repeat)]
            yield results
