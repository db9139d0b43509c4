"""Who makes the runs: workers, each with its own devices, here or as jobs of a cluster.

A task is a command that leaves a result in a folder. Everything that workers have to agree about is in that folder, so
that several of them, on this machine or on others that share the file system, work off one list, and any of them may
be killed: a lock that the kernel releases says who makes a task, the result that it is done, failed.json that it
cannot be.
"""

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

import common
from common import lock_holder, parsed, write_json

POLL_SECONDS = 0.2
LONGEST_REASON = 300  # characters
NO_SCORE = "it ended without a score of these settings and this code"


def read_json(path):
    """The object in a file, or {}."""
    with contextlib.suppress(OSError):
        return parsed(path.read_text(encoding="utf-8", errors="replace"))
    return {}


def fail(folder, reason, **more):
    """Keep in its folder why a task failed."""
    write_json(folder / "failed.json", {"reason": reason, **more})


def lock_of(folder):
    return FileLock(folder.with_suffix(".lock"), timeout=0)


def holder_of(folder):
    """The process that makes a task; "" if none does."""
    with contextlib.suppress(Timeout), lock_of(folder):
        return lock_holder(folder)
    return read_json(folder / "task.json").get("worker", "an unknown process")


def events(folder, kind, last_bytes=None):
    """The events of a kind in metrics.jsonl of a run so far, or in its last bytes."""
    with contextlib.suppress(OSError), open(folder / "metrics.jsonl", "rb") as file:
        if last_bytes:
            file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
        for line in file:
            if line.startswith(b'{"event": "%s"' % kind.encode()):
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


# ---- tasks ----------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A command, and how to see what became of it."""

    name: str
    folder: Path
    command: list[str]
    result: str  # the file in the folder that is there when it is done
    writes: str = ""  # another file, which becomes the result if the command ends well
    after: Path | None = None  # the result of another task, after which it begins with
    needs: Path | None = None  # what that made beside its result
    kind: str = "train"
    size: int = 1  # in which the time of a task of its kind is proportional to
    curve_of: Path | None = None  # folder of the run whose validations it is compared with, and
    margin: float = 0.0  # bits per byte by which it may be worse

    def is_done(self):
        return (self.folder / self.result).exists()

    def has_ended(self):
        return self.is_done() or (self.folder / "failed.json").exists()

    def can_begin(self):
        """Is there what it begins with? It fails with the task before it, or if that was made without keeping it."""
        if self.after is None:
            return True
        reason = ""
        if self.after.exists():
            if self.needs.exists():
                return True
            reason = f"another command did not keep {self.needs}, with which it begins; begun again it trains itself"
        elif failure := read_json(self.after.parent / "failed.json"):
            reason = f"the run that it begins with failed: {failure.get('reason')}"
        if reason:
            fail(self.folder, reason, after=str(self.after))
        return False

    def forget_failure(self, retry, may_be_worse=True):
        """Have it tried again, if it may end otherwise: it was killed, it began with a task that failed, or it was
        stopped as hopeless, which nobody asks for any more.
        """
        path = self.folder / "failed.json"
        failure = read_json(path)
        was_killed = failure.get("code", 0) < 0
        if retry or was_killed or "after" in failure or (failure.get("stopped") and may_be_worse):
            path.unlink(missing_ok=True)

    def is_hopeless(self):
        """What is said of a run that is stopped for its validation curve, or ""."""
        if self.curve_of is None:
            return ""
        curve, reference = ({event["step"]: event["val_bpb"] for event in events(folder, "val")}
                            for folder in (self.folder, self.curve_of))
        step = max(curve.keys() & reference.keys(), default=None)
        if step is None or curve[step] - reference[step] <= self.margin:
            return ""
        worse = curve[step] - reference[step]
        return f"stopped at step {step}: {curve[step]:.4f} BPB, {worse:.4f} more than the base there"


def why(code, output):
    """Why a process failed, in one line: its last error."""
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith("error")]
    reason = (errors or list(filter(None, lines)) or ["no output"])[-1]
    ended_by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{reason[:LONGEST_REASON]} ({ended_by})"


# ---- workers here, and on a cluster ---------------------------------------------------------------------------------


@contextlib.contextmanager
def noted(signals):
    """Ctrl-C, SIGTERM and SIGHUP only add their number to a list."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda number, _frame: signals.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


@dataclass
class Worker:
    """Makes one task after another that nobody else makes.

    As the callable of a submitit job it catches signals itself, and a job that is preempted or out of time is queued
    anew: its run has saved a checkpoint and goes on from there.
    """

    tasks: list[Task]
    env: dict  # added to the environment of its commands
    deadline: float = math.inf  # time.time() from which it begins nothing, and ends what it makes
    signals: list = field(default_factory=list)  # at the first, runs save what they have; at the second they are killed
    pause: float = POLL_SECONDS  # between two looks
    process: subprocess.Popen | None = None  # the command that runs

    def __call__(self):
        with noted(self.signals):
            for _ in looks_of([self], wait=True):
                pass

    def checkpoint(self):
        """For submitit, which calls it on top of whatever the worker does: queue the rest."""
        from submitit.helpers import DelayedSubmission

        if self.process:
            os.killpg(self.process.pid, signal.SIGINT)
            self.process.wait()
        return DelayedSubmission(Worker(self.tasks, self.env, self.deadline))

    def is_over(self):
        return bool(self.signals) or time.time() > self.deadline

    def looks(self):
        """Work; yields after each look whether a task is being made."""
        while True:
            for task in self.tasks:
                if self.is_over() or task.has_ended() or not task.can_begin():
                    continue
                with contextlib.suppress(Timeout), lock_of(task.folder):
                    if not task.has_ended() and not lock_holder(task.folder):
                        yield from self._make(task)
                        break  # a task before it may be free by now
            else:
                time.sleep(self.pause)
                yield False

    def _make(self, task):
        """Run the command of a task, pass on what asks it to end, and keep what came of it. Yields while it runs."""
        about = {"name": task.name, "kind": task.kind, "size": task.size, "command": task.command,
                 "worker": f"process {os.getpid()} on {platform.node()}"}
        write_json(task.folder / "task.json", about)
        output = task.folder / "console.txt"
        with open(output, "wb") as file:
            self.process = subprocess.Popen(task.command, env={**os.environ, **self.env}, stdin=subprocess.DEVNULL,
                                            stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        began = looked = time.monotonic()
        hopeless = ""
        asked = 0  # how often it was asked to end
        while self.process.poll() is None:
            if time.monotonic() > looked + 10 * POLL_SECONDS and not hopeless:
                looked = time.monotonic()
                hopeless = task.is_hopeless()
            if asked < max(min(len(self.signals), 2), self.is_over(), bool(hopeless)):
                asked += 1
                with contextlib.suppress(OSError):  # it has ended by now
                    os.killpg(self.process.pid, signal.SIGINT if asked == 1 else signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.pause)
            yield True
        code = self.process.returncode
        self.process = None
        if not self.is_over():
            write_json(task.folder / "task.json", {**about, "seconds": time.monotonic() - began})
        if task.writes and code == 0 and (task.folder / task.writes).exists():
            os.replace(task.folder / task.writes, task.folder / task.result)
        if hopeless:
            fail(task.folder, hopeless, stopped=True)
        elif code == 0 and not task.is_done():
            fail(task.folder, NO_SCORE)
        elif not task.is_done() and not self.is_over():
            fail(task.folder, why(code, output), code=code)


def looks_of(workers, wait=False):
    """Have workers on the same tasks work in turn until none of them finds anything to do; with `wait` until what
    others make has ended, too. Yields after each look. Where this is closed before, the commands save what they have.
    """
    first = workers[0]
    looks = [worker.looks() for worker in workers]

    def is_busy():
        return any([next(look, False) for look in looks])

    try:
        while is_busy() or (wait and not first.is_over() and not all(task.has_ended() for task in first.tasks)):
            yield
    except BaseException:
        first.signals.append(signal.SIGTERM)
        while is_busy():
            pass
        raise


def work_here(tasks, slots, deadline, signals, wait):
    """The looks of workers in this process, one for each slot: variables for its commands."""
    pause = POLL_SECONDS / len(slots)
    return looks_of([Worker(tasks, env, deadline, signals, pause) for env in slots], wait)


def work_on_cluster(tasks, slots, deadline, signals, executor):
    """The same with a submitit job for each slot."""
    import cloudpickle

    import sweeps.work

    for module in (sweeps.work, common):  # a node need not have this folder on its path
        cloudpickle.register_pickle_by_value(module)
    jobs = [executor.submit(Worker(tasks, env, deadline)) for env in slots]
    try:
        while not signals and not all(job.done() for job in jobs):
            yield
            time.sleep(POLL_SECONDS)
    finally:
        for job in jobs:
            if not job.done():
                job.cancel()
    while not all(job.done() for job in jobs):
        yield
        time.sleep(POLL_SECONDS)
