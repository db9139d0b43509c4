"""Who makes the runs: workers, each with its own devices, here or as jobs of a cluster.

A task is a command that leaves a result in a folder. Everything that workers have to agree about is in that folder, so
that several of them, on this machine or on others that share the file system, work off one list, and any of them may
be killed: a lock that the kernel releases says who makes a task, the result that it is done, failed.json that it
cannot be.
"""

import contextlib
import json
import os
import platform
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

import common
from common import lock_holder

POLL_SECONDS = 0.2
LONGEST_REASON = 300  # characters
NO_SCORE = "it ended without a score of these settings and this code"


def read_json(path):
    """The object in a file, or None."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def write_json(path, value):
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value), encoding="utf-8")
    os.replace(part, path)


def fail(folder, reason, **more):
    """Keep in its folder why a task failed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "failed.json", {"reason": reason, **more})


def failure_of(folder):
    """What fail() kept, or {}."""
    return read_json(folder / "failed.json") or {}


# ---- tasks ----------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A command, and how to see what became of it."""

    name: str
    folder: Path
    command: list[str]
    result: str  # the file in the folder that is there when it is done
    writes: str = ""  # another file, which becomes the result if the command ends well
    after: list[Path] = field(default_factory=list)  # results of other tasks that it begins with
    kind: str = "train"
    size: int = 1  # in which the time of a task of its kind is proportional to
    done_with: tuple = (0,)  # exit codes
    curve_of: Path | None = None  # folder of the run whose validations it is compared with, and
    margin: float = 0.0  # bits per byte by which it may be worse

    def is_done(self):
        return (self.folder / self.result).exists()

    def has_failed(self):
        return (self.folder / "failed.json").exists()

    def has_ended(self):
        return self.is_done() or self.has_failed()

    def is_blocked(self):
        """Does it wait for a task that is not done?"""
        return not all(path.exists() for path in self.after)

    def forget_failure(self, retry, may_be_worse=True):
        """Have it tried again, if it may end otherwise: it was killed, it began with a task that failed, or it was
        stopped as hopeless, which nobody asks for any more.
        """
        failure = failure_of(self.folder)
        was_killed = failure.get("code", 0) < 0
        if retry or was_killed or "after" in failure or (failure.get("stopped") and may_be_worse):
            (self.folder / "failed.json").unlink(missing_ok=True)

    def is_hopeless(self):
        """What is said of a run that is stopped for its validation curve, or ""."""
        if self.curve_of is None:
            return ""
        curve = validations(self.folder)
        reference = validations(self.curve_of)
        steps = curve.keys() & reference.keys()
        if not steps:
            return ""
        step = max(steps)
        worse = curve[step] - reference[step]
        if worse <= self.margin:
            return ""
        return f"stopped at step {step}: {curve[step]:.4f} BPB, {worse:.4f} more than the base there"


def validations(folder):
    """{step: bits per byte} of the validations of a run so far."""
    found = {}
    with contextlib.suppress(OSError), open(folder / "metrics.jsonl", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith('{"event": "val"'):
                with contextlib.suppress(ValueError, KeyError):
                    event = json.loads(line)
                    found[event["step"]] = event["val_bpb"]
    return found


def why(code, output):
    """Why a process failed, in one line: its last error."""
    text = output.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    reason = "no output"
    if lines:
        reason = lines[-1]
    if errors:
        reason = errors[-1]
    ended_by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{reason[:LONGEST_REASON]} ({ended_by})"


# ---- a worker -------------------------------------------------------------------------------------------------------


class Stop:
    """How often the command was asked to end: once, and runs save what they have; twice, and they are killed."""

    def __init__(self):
        self.signals = []

    def __call__(self, number, _frame=None):
        self.signals.append(number)

    @property
    def urgency(self):
        return min(len(self.signals), 2)

    @contextlib.contextmanager
    def caught(self):
        """Ctrl-C, SIGTERM and SIGHUP are only noted."""
        names = {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal))
        before = {name: signal.signal(getattr(signal, name), self) for name in names}
        try:
            yield self
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)


@dataclass
class Worker:
    """Makes tasks one after another until none is left that it could make.

    As the callable of a submitit job it catches signals itself, and a job that is preempted or out of time is queued
    anew: its run has saved a checkpoint and goes on from there.
    """

    tasks: list[Task]
    env: dict  # added to the environment of its commands
    wait: bool = True  # for tasks that others make, before it ends
    deadline: float = float("inf")  # time.time() from which it begins nothing, and ends what it makes
    stop: Stop | None = None
    mine: set = field(default_factory=set)  # folders of the tasks that workers of this process make
    held: dict = field(default_factory=dict)  # {folder: who has it} of tasks that others make
    processes: dict = field(default_factory=dict)  # {folder: process} of the commands that run

    def __call__(self):
        self.stop = Stop()
        with self.stop.caught():
            self.work()

    def checkpoint(self):
        """For submitit, which calls it on top of whatever the worker does: queue the rest."""
        import submitit

        for process in self.processes.values():
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
        return submitit.helpers.DelayedSubmission(Worker(self.tasks, self.env, self.wait, self.deadline))

    def is_over(self):
        return bool(self.stop.signals) or time.time() > self.deadline

    def work(self):
        while not self.is_over():
            open_tasks = [task for task in self.tasks if not task.has_ended()]
            self._fail_after_failures(open_tasks)
            made = any(self._make_if_free(task) for task in open_tasks if not task.is_blocked())
            if made:
                continue
            others = [task for task in open_tasks if task.folder in self.held]
            of_others = {task.folder / task.result for task in others}
            is_worth_waiting = self.wait or any(
                task.folder not in self.held and not of_others & set(task.after) for task in open_tasks)
            if not open_tasks or not is_worth_waiting:
                return
            time.sleep(POLL_SECONDS)

    def _fail_after_failures(self, tasks):
        for task in tasks:
            for path in task.after:
                failure = failure_of(path.parent)
                if failure and not path.exists():
                    fail(task.folder, f"the run that it begins with failed: {failure.get('reason')}", after=str(path))

    def _make_if_free(self, task):
        """Make a task, unless somebody else does. True if it was made, or at least begun."""
        task.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(task.folder.with_suffix(".lock"), timeout=0):
                if task.has_ended() or self.is_over():
                    return True
                if left_behind := lock_holder(task.folder):
                    self.held[task.folder] = left_behind
                    return False
                self.held.pop(task.folder, None)
                self.mine.add(task.folder)
                try:
                    self._make(task)
                finally:
                    self.mine.discard(task.folder)
                return True
        except Timeout:
            if task.folder not in self.mine:
                worker = (read_json(task.folder / "task.json") or {}).get("worker")
                self.held[task.folder] = worker or "an unknown process"
            return False

    def _make(self, task):
        task.folder.mkdir(exist_ok=True)
        about = {"name": task.name, "kind": task.kind, "size": task.size, "command": task.command,
                 "worker": f"process {os.getpid()} on {platform.node()}"}
        write_json(task.folder / "task.json", about)
        began = time.monotonic()
        output = task.folder / "console.txt"
        with open(output, "wb") as file:
            process = subprocess.Popen(task.command, env={**os.environ, **self.env}, stdin=subprocess.DEVNULL,
                                       stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        self.processes[task.folder] = process
        hopeless = self._attend(task, process)
        del self.processes[task.folder]
        code = process.returncode
        if not self.is_over():
            write_json(task.folder / "task.json", {**about, "seconds": time.monotonic() - began})
        if task.writes and code == 0 and (task.folder / task.writes).exists():
            os.replace(task.folder / task.writes, task.folder / task.result)
        if hopeless:
            fail(task.folder, hopeless, stopped=True)
        elif task.is_done() and code in task.done_with:
            return
        elif code in task.done_with:
            fail(task.folder, NO_SCORE)
        elif not self.is_over():
            fail(task.folder, why(code, output), code=code)

    def _attend(self, task, process):
        """Wait for the end of a task, pass on what asks it to end. Returns why it was stopped as hopeless, or ""."""
        passed_on = 0
        hopeless = ""
        looked = time.monotonic()
        while process.poll() is None:
            if time.monotonic() > looked + 10 * POLL_SECONDS and not hopeless:
                looked = time.monotonic()
                hopeless = task.is_hopeless()
            wanted = max(self.stop.urgency, self.is_over(), bool(hopeless))
            if passed_on < wanted:
                passed_on += 1
                with contextlib.suppress(OSError):  # it has ended by now
                    os.killpg(process.pid, signal.SIGINT if passed_on == 1 else signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
        return hopeless


# ---- workers here, and on a cluster ---------------------------------------------------------------------------------


@contextlib.contextmanager
def workers_here(tasks, slots, stop, wait, deadline):
    """A thread for each of `slots`, {variable: value} for its commands. Yields (is_over, held)."""
    mine = set()
    held = {}
    workers = [Worker(tasks, env, wait, deadline, stop, mine, held) for env in slots]
    with ThreadPoolExecutor(len(workers)) as pool:
        futures = [pool.submit(worker.work) for worker in workers]
        try:
            yield lambda: all(future.done() for future in futures), held
        except BaseException:  # of the command: the runs save what they have
            stop(signal.SIGTERM)
            raise
    for future in futures:
        future.result()  # raises what a worker did


@contextlib.contextmanager
def workers_on_cluster(tasks, slots, stop, deadline, executor):
    """A submitit job for each of `slots`. Yields (is_over, held); `held` gets jobs that ended before their work."""
    import cloudpickle

    import sweeps.work

    for module in (sweeps.work, common):  # a node need not have this folder on its path
        cloudpickle.register_pickle_by_value(module)
    jobs = [executor.submit(Worker(tasks, env, True, deadline)) for env in slots]
    cancelled = []

    def is_over():
        if stop.signals and not cancelled:
            cancelled.extend(jobs)
            for job in jobs:
                job.cancel()
        return all(job.done() for job in jobs)

    held = {}
    try:
        yield is_over, held
    finally:
        for job in jobs:
            if not job.done():
                job.cancel()
        left = [task for task in tasks if not task.has_ended()]
        ids = ", ".join(job.job_id for job in jobs)
        held |= {task.folder: f"nobody any more: the jobs {ids} are over, see {executor.folder}" for task in left}
