"""Runs of the trainer for the tests: inside this process (fast), as a command that can be hit by signals, or as several
ranks; and readers for what a run leaves behind.

    done = call([*toy, f"OUT_DIR={tmp_path}"])     like process.run_trainer, without the two seconds that a process costs
    with Started(trainer(...)) as run:             a process of its own: run.until("step:3/"), run.signal(...), run.finish()
"""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

import reference
import torch
from process import REPO, clean_env

import train_gpt

SCRIPT = REPO / "train_gpt.py"
RULE = "=" * 100  # ends the head of train.log: source, versions
QUICK = ("DEVICE=cpu", "COMPRESSOR=zlib", "TRAIN_LOG_EVERY=1")


def command(toy, out_dir, *more):
    """Arguments of a quick run on the toy data set; later settings win."""
    return [*toy, *QUICK, f"OUT_DIR={out_dir}", *map(str, more)]


def call(args, env=None):
    """main(args) inside this process, in a clean environment: a CompletedProcess like process.run_trainer's."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, clean_env(env), clear=True), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train_gpt.main([str(arg) for arg in args])
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def on_ranks(args, world):
    """The run of these arguments on `world` ranks of this process, a thread each; what it prints. Errors are raised."""
    s, ranks, here, out = train_gpt.Settings.parse([str(arg) for arg in args], {}), reference.Ranks(world), threading.local(), io.StringIO()

    class Member(train_gpt.Runtime):
        def __init__(self, settings, env=None):
            super().__init__(settings, {})
            self.member, self.rank, self.world = here.member, here.member.rank, world

        def max(self, *values):
            return self.member.max(*values) if self.world > 1 else values

        def sum(self, tensor):
            return self.member.sum(tensor) if self.world > 1 else tensor

        def gather(self, value):
            return self.member.gather(value) if self.world > 1 else [value]

        def broadcast(self, value):
            return self.member.broadcast(value) if self.world > 1 else value

        def close(self):
            pass

    class Ledger(train_gpt.Validity):
        """Of one process: what the other threads open is not its own."""

        def __init__(self):
            super().__init__()
            self.thread = threading.get_ident()

        def audit(self, event, args):
            if threading.get_ident() == self.thread:
                super().audit(event, args)

    def work(member):
        here.member = member
        train_gpt.run_phases(s, [])

    with mock.patch.multiple(train_gpt, Runtime=Member, Validity=Ledger), mock.patch.object(signal, "signal"), contextlib.redirect_stdout(out):
        ranks.together(work)
    return out.getvalue()


def good(done):
    """The run, if it ended well; otherwise what it said is the failure."""
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def refused(done, code, *words):
    """The run ended with `code` and one line on stderr, no traceback, which holds all the words; returns that line."""
    text = done.stderr.strip()
    assert done.returncode == code, f"exit code {done.returncode}, not {code}\n{done.stdout[-1000:]}\n{text[-2000:]}"
    assert "Traceback" not in done.stderr + done.stdout, text
    assert text.startswith("error: ") and "\n" not in text, text
    missing = [str(word) for word in words if str(word) not in text]
    assert not missing, f"{missing} not in: {text}"
    return text


def trainer(args):
    return [sys.executable, str(SCRIPT), *map(str, args)]


def torchrun(args, ranks=2, *options):
    where = options or ("--standalone",)
    return [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc_per_node={ranks}", str(SCRIPT), *map(str, args)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def family(pid):
    """Process ids of all descendants of pid (Linux)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def heard():
    """Not ignored, as nohup would have it for all that it starts: a shell cannot trap what it was told to ignore."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Started:
    """A process that is running, killed with all its children after `limit` seconds or at the end of the block."""

    def __init__(self, words, limit=90, env=None, cwd=REPO):
        self._err, self.lines = tempfile.TemporaryFile("w+"), []
        self.process = subprocess.Popen(words, env=clean_env(env), cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=self._err, text=True)
        self._timer = threading.Timer(limit, self._kill)

    def __enter__(self):
        self._timer.start()
        return self

    def __exit__(self, *_):
        self._timer.cancel()
        self._kill()
        self.process.stdout.close()
        self.process.wait()
        self._err.close()

    def _kill(self):
        if self.process.poll() is None:
            for pid in [*family(self.process.pid), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def until(self, text):
        """Read the console up to the first line that holds `text`."""
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"{text!r} never came:\n{''.join(self.lines)[-1500:]}\n{self.errors()[-1500:]}")

    def read(self, count):
        """Read `count` more lines of the console, or to its end."""
        self.lines += [line for line, _ in zip(self.process.stdout, range(count))]

    def signal(self, number):
        self.process.send_signal(number)

    def errors(self):
        self._err.seek(0)
        return self._err.read()

    def finish(self):
        """Wait for the end: a CompletedProcess."""
        self.lines += self.process.stdout.readlines()
        code = self.process.wait()
        return subprocess.CompletedProcess(self.process.args, code, "".join(self.lines), self.errors())


def _strict(word):
    raise ValueError(f"{word} is not JSON")


def strict_json(text):
    """json.loads that refuses NaN and Infinity, as every other language's reader does."""
    return json.loads(text, parse_constant=_strict)


def events(out_dir, name=None):
    """The events of metrics.jsonl, in order."""
    rows = [strict_json(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if name in (None, row["event"])]


def log_lines(out_dir):
    """The lines of train.log after its head; of the latest run where a folder was used again."""
    return (Path(out_dir) / "train.log").read_text().rpartition(RULE + "\n")[2].splitlines()


def summary(done):
    """The object in the last line of the console."""
    return strict_json(done.stdout.splitlines()[-1].removeprefix("summary "))


def losses(out_dir):
    """{step: train loss}, unrounded."""
    return {row["step"]: row["train_loss"] for row in events(out_dir, "train")}


def checkpoints(out_dir):
    """{step: path} of the files under a checkpoint's final name, oldest first."""
    return {int(re.search(r"\d+", path.name)[0]): path for path in sorted(Path(out_dir).glob("checkpoint_*.pt"))}


def read_checkpoint(path):
    """The state in a checkpoint: a line that names the format, a file of torch.save, its SHA-256 behind it."""
    data = Path(path).read_bytes()
    assert hashlib.sha256(data[:-32]).digest() == data[-32:], f"{path} is not whole"
    return torch.load(io.BytesIO(data[data.index(b"\n") + 1 : -32]), weights_only=True)


def weights(out_dir, step=None):
    """{name: weight} of the newest checkpoint, or of the one after `step`."""
    paths = checkpoints(out_dir)
    return read_checkpoint(paths[max(paths) if step is None else step])["weights"]


def furthest(a, b):
    """Largest absolute difference between two dictionaries of tensors."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
