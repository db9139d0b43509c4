"""What the command says while runs are made, wherever that is: it looks into their folders."""

import json
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from sweeps.work import POLL_SECONDS, read_json

TAIL = 8192  # bytes of metrics.jsonl that hold its last line of training


def say(text):
    """Progress goes to standard error: standard output is the table."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds):
    """Seconds in words."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def steps_so_far(task):
    """Steps that a run has made."""
    if task.kind != "train":
        return 0
    try:
        with open(task.folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
        return max(json.loads(line)["step"] for line in lines if line.startswith('{"event": "train"'))
    except (OSError, ValueError, KeyError):
        return 0


def seconds_of(task):
    return (read_json(task.folder / "task.json") or {}).get("seconds")


class Times:
    """How long tasks of each kind take, by those that have ended."""

    def __init__(self):
        self.seconds = {}  # kind -> [seconds, size]

    def add(self, task):
        """Note an ended task; returns its seconds, or None where its worker has not seen its end."""
        seconds = seconds_of(task)
        if seconds:
            spent = self.seconds.setdefault(task.kind, [0.0, 0])
            spent[0] += seconds
            spent[1] += task.size
        return seconds

    def expect(self, tasks, jobs):
        """Seconds until these tasks are done, or None while one of their kinds is not known."""
        if any(task.kind not in self.seconds for task in tasks):
            return None
        needed = 0.0
        for task in tasks:
            seconds, size = self.seconds[task.kind]
            needed += seconds / size * max(task.size - steps_so_far(task), 0)
        return needed / jobs

    def eta(self, tasks, jobs):
        """The same in words, or "" where it is not known."""
        seconds = self.expect(tasks, jobs)
        return f"; ETA {duration(seconds)}" if tasks and seconds is not None else ""


def follow(tasks, is_over, stop, on_end, jobs):
    """Say how each task ends, until the workers are over. On a terminal a line shows what is being made."""
    console = Console(stderr=True)
    times = Times()
    open_tasks = list(tasks)
    bar = Progress(TextColumn("{task.completed}/{task.total}"), BarColumn(24), TextColumn("{task.description}"),
                   console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False)
    with bar:
        line = bar.add_task("", total=len(tasks))
        while True:
            last_look = is_over()
            ended = [task for task in open_tasks if task.has_ended() and (last_look or seconds_of(task))]
            for task in ended:
                open_tasks.remove(task)
                seconds = times.add(task)
                result = on_end(task)
                spent = "" if seconds is None else f", {seconds:.0f} s"
                bar.console.print(
                    f"[{task.kind} {len(tasks) - len(open_tasks)}/{len(tasks)}] {task.name}: {result or 'done'}"
                    f"{spent}{times.eta(open_tasks, jobs)}", markup=False, highlight=False, soft_wrap=True)
            if console.is_terminal:
                what = now(open_tasks, stop) + times.eta(open_tasks, jobs)
                bar.update(line, completed=len(tasks) - len(open_tasks), description=what)
            if last_look:
                return
            time.sleep(POLL_SECONDS)


def now(tasks, stop):
    """What is being made, in one line."""
    if stop.signals:
        return "ending: the runs save what they have; once more kills them"
    begun = [task for task in tasks if (task.folder / "task.json").exists()]
    return ", ".join(f"{task.name}: step {steps_so_far(task)}" if task.kind == "train" else task.name
                     for task in begun[:4])
