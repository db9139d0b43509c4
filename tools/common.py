"""What the tools and the scripts of data/ share: how a command begins and ends, its errors and arguments, hashes, the
format of a shard, what git says, and the trainer as a module.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib
import io
import json
import math
import os
import platform
import re
import struct
import subprocess
import sys
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A shard of the contest: 256 little-endian int32 (magic, version, number of tokens, zeros), then uint16 tokens.
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 1024
BOS = 1  # the token that begins every document; there is no token at its end

READ_BYTES = 1 << 20  # of a file at a time


# ---- a command ------------------------------------------------------------------------------------------------------


class BadInput(Exception):
    """The input cannot be used. Each line of the message names a cause and its fix; the exit code is 2."""


def exit_code(work, quiet=False):
    """Call work() and return its exit code, or the code of the error that ended it. `quiet` prints no errors: several
    ranks of one command meet the same ones.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an accent in a path, a terminal that knows ASCII only
            stream.reconfigure(errors="backslashreplace")
    try:
        code = work()
        print(end="", flush=True)  # what waits in the buffer meets a reader that has gone here, not at the exit
        return code
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        return 130
    except BadInput as error:
        complaints = str(error)
    except ModuleNotFoundError as error:
        complaints = f"this needs the package {error.name}: pip install -r requirements-dev.txt"
    except OSError as error:  # a full disk, a file in the way of a folder
        complaints = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    for line in () if quiet else complaints.splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)
    return 2


def need(purpose, package, pip="-r requirements-dev.txt"):
    """The module of a package that serves a purpose, such as an option; BadInput if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise BadInput(f"{purpose} needs {package.replace('_', '-')}: pip install {pip}") from None


# ---- arguments ------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a BadInput."""

    def error(self, message):
        raise BadInput(f"{message}; see {self.prog} --help")


def whole(least):
    """A converter to whole numbers from `least`."""
    def convert(text):
        with contextlib.suppress(ValueError):  # thousands of digits
            if text.isdecimal() and int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")

    return convert


def positive(text):
    """A converter to finite numbers above 0."""
    with contextlib.suppress(ValueError):
        value = float(text)
        if 0 < value < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def names_of(option, known, none=False):
    """A converter of NAME,NAME,... to a list of known names. With `none`, the word none is an empty list."""
    def convert(text):
        if none and text == "none":
            return []
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise BadInput(f"{option}: {name!r} is unknown; there is: {', '.join(known)}")
        return names

    return convert


# ---- what a command writes ------------------------------------------------------------------------------------------


def check_output(option, path):
    """BadInput before anything is done, if the file that an option names cannot be written."""
    if path is None:
        return
    is_special = path.exists() and not path.is_file()  # a folder, a device
    if is_special or not os.access(path.absolute().parent, os.W_OK):
        raise BadInput(f"{option} {path} cannot be written; name a file in a folder that exists")


def write(path, data):
    """Write a file of these bytes: afterwards it is complete, or as it was. BadInput if it cannot be written."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise BadInput(f"{path} cannot be written ({error.strerror})") from None


def write_json(path, value, indent=None):
    """Write a file of JSON in the same way."""
    write(path, f"{json.dumps(value, indent=indent)}\n".encode())


def say(event, **values):
    """Print a line of the form that a run's log has: the event, then key:value, in which blanks are underscores."""
    print(event, *(f"{key}:{'_'.join(str(value).split())}" for key, value in values.items()), flush=True)


# ---- files and numbers ----------------------------------------------------------------------------------------------


def parsed(text):
    """The object that this JSON describes; {} if it is damaged or something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def lock_holder(run_dir):
    """What run.lock says of the process that holds it; "" if none does. A run that starts meanwhile is not kept out:
    the lock is tried only where the process that is named may be alive.
    """
    with contextlib.suppress(OSError), open(run_dir / "run.lock", encoding="utf-8", errors="replace") as file:
        holder = " ".join(file.read(100).split()) or "unknown process"
        named = re.fullmatch(r"process (\d+) on (.*)", holder)
        if named and named[2] == platform.node() and is_gone(int(named[1])):
            return ""
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # over NFS the second
            return holder
    return ""


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except PermissionError:
        return False
    except (ProcessLookupError, OverflowError):
        return True
    return False


def shard_header(tokens):
    """The header of a shard with this number of tokens."""
    return struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, tokens).ljust(SHARD_HEADER_BYTES, b"\0")


# ---- the machine, git and the trainer -------------------------------------------------------------------------------


def git(*words):
    """What git prints in the repository; "" where there is none, or no git."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, timeout=20,
                              check=True).stdout.strip()
    return ""


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


def load_trainer():
    """train_gpt.py of this repository as a module, in the environment that it makes for itself as a script."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")
    if "train_gpt" not in sys.modules:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module("train_gpt")


def table_of_techniques():
    """[(technique, its setting)] of the table at the top of the trainer."""
    return re.findall(r"^    (\S.*?)  +([A-Z][A-Z_0-9]+)  +\S+$", load_trainer().__doc__, re.MULTILINE)


@contextlib.contextmanager
def trainer_errors():
    """Turn the errors of the trainer (input that it cannot use, a run that it stops) into a BadInput of the tool."""
    trainer = load_trainer()
    try:
        yield
    except (trainer.BadInput, trainer.Stopped) as error:
        raise BadInput(str(error)) from None
