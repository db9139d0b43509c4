"""What the tools share: how a command of theirs ends, what git says about the code, the middle of measured values."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class BadInput(Exception):
    """What was given cannot be used: each line names a cause and its fix; exit code 2."""


def exit_code(work, quiet=False):
    """work(), which returns its exit code, or the code of what ended it; `quiet` keeps the errors of other ranks."""
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


def git(*words):
    """What git prints in the repository; "" where there is none, or no git."""
    try:
        done = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def quartiles(values):
    """(lower quartile, median, upper quartile); all the same of a single value."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
    return low, statistics.median(values), high
