"""What the tools share: how a command of theirs begins and ends, measuring in a process apart, what git says."""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Document lengths like FineWeb's in tokens: log-normal around a mean.
DOCUMENT_MEAN, DOCUMENT_SIGMA = 960, 1.0


class BadInput(Exception):
    """What was given cannot be used: each line names a cause and its fix; exit code 2."""


def exit_code(work, quiet=False):
    """work(), which returns its exit code, or the code of what ended it; `quiet` keeps the errors of other ranks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an accent in a path, a terminal that knows ASCII only
            stream.reconfigure(errors="backslashreplace")
    try:
        return work()
    except BadInput as error:
        for line in () if quiet else str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        return 130


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; see {self.prog} --help")


def whole(least):
    """A converter to whole numbers from `least`."""
    def convert(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return convert


def positive(text):
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def names_of(what, known, none=False):
    """A converter of NAME,NAME,... to names that are known."""
    def convert(text):
        if none and text == "none":
            return []
        names = [name.strip() for name in text.split(",")]
        if wrong := [name for name in names if name not in known]:
            raise BadInput(f"{what}: {wrong[0]!r} is unknown; there is: {', '.join(known)}")
        return names

    return convert


def document_lengths(rng, count):
    """Tokens of so many documents."""
    import numpy as np

    lengths = rng.lognormal(math.log(DOCUMENT_MEAN) - DOCUMENT_SIGMA**2 / 2, DOCUMENT_SIGMA, count)
    return np.maximum(2, lengths.astype(np.int64))


def git(*words):
    """What git prints in the repository; "" where there is none, or no git."""
    try:
        done = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit():
    """(commit, number of changed files) of the repository; ("none", 0) outside of one."""
    return git("rev-parse", "--short=12", "HEAD") or "none", len(git("status", "--porcelain").splitlines())


def load_trainer():
    """train_gpt.py of this repository as a module, in the environment that it makes for itself as a script."""
    if "train_gpt" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")
        spec = importlib.util.spec_from_file_location("train_gpt", ROOT / "train_gpt.py")
        sys.modules["train_gpt"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["train_gpt"]


@contextlib.contextmanager
def trainer_errors():
    """What the trainer cannot use, or stops at, is a BadInput of the tool."""
    trainer = load_trainer()
    try:
        yield
    except (trainer.BadInput, trainer.Stopped) as error:
        raise BadInput(str(error)) from None


def measure_apart(job, env=None):
    """The job in a process of its own, so that neither memory nor compiled code comes from another one; `env`: what its
    environment has where ours does not.
    """
    folder = Path(job["folder"])
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    words = [sys.executable, str(ROOT / "tools/bench.py"), "--job", str(folder)]
    code = subprocess.run(words, env={**(env or {}), **os.environ}, stdin=subprocess.DEVNULL, check=False).returncode
    if code == 130:
        raise KeyboardInterrupt
    if not result.exists():
        reason = f"{signal.Signals(-code).name}; out of memory?" if code < 0 else f"exit code {code}"
        return {"error": f"the process ended without a result ({reason})"}
    return json.loads(result.read_text(encoding="utf-8"))


def usage():
    """(CPU seconds, peak MiB) of this process and of those it waited for, one of which ran at a time."""
    import resource  # Unix has it

    mine, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peak = mine.ru_maxrss
    with contextlib.suppress(OSError):  # on Linux that would begin with the peak of whoever started the process
        peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    return (sum(one.ru_utime + one.ru_stime for one in (mine, others)),
            (peak + others.ru_maxrss) / (1 << (20 if sys.platform == "darwin" else 10)))


def check_json(path):
    """BadInput before anything is measured, if --json cannot be written."""
    if path and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise BadInput(f"--json {path} cannot be written; name a file in a folder that exists")


def write_json(path, report):
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--json {path} cannot be written ({error.strerror}); choose another file") from None


def quartiles(values):
    """(lower quartile, median, upper quartile); all the same of a single value."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
    return low, statistics.median(values), high


def progress(text):
    print(f"{text} ...", file=sys.stderr, flush=True)


def show(value, form=",.0f"):
    return "-" if value is None else format(value, form)


def markdown(columns, text, lines):
    """A Markdown table; columns that are not `text` hold numbers, to the right."""
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "|".join("---" if column in text else "---:" for column in columns) + "|"
    for cells in lines:
        yield "| " + " | ".join([*cells, *[""] * (len(columns) - len(cells))]) + " |"
