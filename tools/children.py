"""Commands as child processes: several at a time, signals passed on once, and one parent a folder."""

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from dataclasses import dataclass

import common
from common import BadInput

LONGEST_REASON = 300  # characters


class Interrupted(Exception):
    """The number of the signal that ended the command."""


@dataclass
class Child:
    process: subprocess.Popen
    begun: float
    signals: int = 0  # passed on to it


class Processes:
    """Commands as processes, each in a session of its own, so that a signal reaches it once, through this object.

    The first Ctrl-C or SIGTERM asks them to end (the trainer saves a checkpoint), the second kills them.
    """

    def __init__(self, env, lock):
        self.env = env
        self.lock = lock
        self.caught = []  # signals

    def __enter__(self):
        def catch(number, _):
            self.caught.append(number)

        self._before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, commands, jobs=1):
        """Runs each (command, file for its output), `jobs` at once; yields (index, exit code, seconds) as they end."""
        waiting = deque(enumerate(commands))
        active = {}  # index -> Child
        try:
            while waiting or active:
                while waiting and len(active) < jobs and not self.caught:
                    index, (words, output) = waiting.popleft()
                    active[index] = self._start(words, output)
                self._pass_on(active.values())
                ended = [index for index, child in active.items() if child.process.poll() is not None]
                for index in ended:
                    child = active.pop(index)
                    if not self.caught:
                        yield index, child.process.returncode, time.monotonic() - child.begun
                if self.caught and not active:
                    raise Interrupted(self.caught[-1])
                if not ended:
                    time.sleep(0.05)
        finally:
            for child in active.values():
                with contextlib.suppress(OSError):
                    os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()

    def _start(self, words, output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "wb") as file:  # a child holds the lock: one that outlives a killed sweep keeps others out
            process = subprocess.Popen(words, env=self.env, stdin=subprocess.DEVNULL, stdout=file,
                                       stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[self.lock])
        return Child(process, time.monotonic())

    def _pass_on(self, children):
        for child in children:
            if child.signals < min(len(self.caught), 2):
                child.signals += 1
                number = signal.SIGINT if child.signals == 1 else signal.SIGKILL
                with contextlib.suppress(OSError):  # it has ended by now
                    os.killpg(child.process.pid, number)


def why(code, output):
    """Why a process failed, in one line: its last error."""
    text = output.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    reason = "no output"
    if lines:
        reason = lines[-1]
    if errors:
        reason = errors[-1]
    ended_by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{reason[:LONGEST_REASON]} ({ended_by})"


@contextlib.contextmanager
def locked(folder):
    """One sweep a folder. Yields the descriptor that holds the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {folder}: {error.strerror}") from None
    in_use = f"{folder} is in use by another sweep, or by a run that a killed one left behind"
    with common.locked(folder, in_use) as handle:
        yield handle
