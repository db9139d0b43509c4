"""What the commands of data/ share while they run: lines and progress on the console, worker processes, the trainer."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain

from common import BadInput, load_trainer


class Stopped(Exception):
    """The work ended early through no fault of the input; what is finished stays."""


def say(event, **facts):
    """A line of the log: the event, then key:value pairs."""
    print(event, *(f"{key}:{value}" for key, value in facts.items()), flush=True)


def trainer():
    """train_gpt.py, the one definition of the shard format and of the byte table."""
    try:
        return load_trainer()
    except ImportError as error:
        raise BadInput(f"the proof needs train_gpt.py and torch ({error}): pip install -r requirements.txt") from None


def hold_standard_streams():
    """Put something that swallows everything in the place of a closed standard stream (2>&-); else the next
    file to be opened, such as a shard, would get its number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, this one
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115 - it stays open
            setattr(sys, name, stream)


class Bar:
    """Progress with rate and time left: a bar on a terminal, a line every ten seconds elsewhere."""

    WIDTH = 30

    def __init__(self, label, total, unit="B"):
        self.label = label
        self.total = max(total, 1)
        self.unit = unit
        self.tty = sys.stderr.isatty()
        self.begin = time.monotonic()
        self.first = None  # what was done at the first call: a resumed job did not do that part just now
        self.last = self.begin

    def __call__(self, done):
        if self.first is None:
            self.first = done
        now = time.monotonic()
        interval = 0.1 if self.tty else 10
        if now - self.last < interval:
            return
        self.last = now
        share = min(done / self.total, 1)
        rate = max(done - self.first, 1) / (now - self.begin)
        minutes, seconds = divmod(int((self.total - done) / rate), 60)
        text = f"{self.label} {share:4.0%}  {self.speed(rate)}  {minutes}:{seconds:02d} left"
        if self.tty:
            filled = int(share * self.WIDTH)
            bar = "━" * filled + "─" * (self.WIDTH - filled)
            print(f"\r\033[K{bar} {text}", file=sys.stderr, end="", flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def speed(self, rate):
        if rate > 1e6:
            return f"{rate / 1e6:.1f} M{self.unit}/s"
        if rate > 1e3:
            return f"{rate / 1e3:.1f} k{self.unit}/s"
        return f"{rate:.1f} {self.unit}/s"

    def close(self):
        if self.tty:
            print("\r\033[K", file=sys.stderr, end="", flush=True)


def _become_worker(parent):
    """A worker leaves Ctrl-C to its parent, and ends soon after it however the parent ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Workers:
    """Ordered, bounded map over processes. They are spawned, not forked, so they never hold torch, threads or files."""

    def __init__(self, count):
        self.count = count
        self.pool = None
        if count > 1:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(count, context, _become_worker, (os.getpid(),))

    def map(self, function, tasks):
        """(task, result) in the order of the tasks. A reader that is ahead has to wait, so memory stays flat."""
        if self.pool is None:
            yield from ((task, function(task)) for task in tasks)
            return
        waiting = deque()
        most_waiting = 2 * self.count
        try:
            for task in chain(tasks, [None]):
                if task is not None:
                    waiting.append((task, self.pool.submit(function, task)))
                while waiting and (task is None or len(waiting) > most_waiting):
                    done, future = waiting.popleft()
                    yield done, future.result()
        except BrokenProcessPool:
            raise Stopped("a worker process was killed (out of memory? use fewer --workers)") from None
        finally:
            for _, future in waiting:
                future.cancel()

    def close(self):
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
