"""What the command says while runs are made, wherever that is: it looks into their folders."""

import contextlib
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from sweeps.work import events, read_json

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
    return max((event.get("step", 0) for event in events(task.folder, "train", TAIL)), default=0)


class Times:
    """How long tasks of each kind take, by those that have ended."""

    def __init__(self):
        self.spent = {}  # kind -> [seconds, size]

    def add(self, folder):
        """Note an ended task; returns its seconds, or None where its worker has not seen its end."""
        task = read_json(folder / "task.json")
        if "seconds" not in task:
            return None
        spent = self.spent.setdefault(task["kind"], [0.0, 0])
        spent[0] += task["seconds"]
        spent[1] += task["size"]
        return task["seconds"]

    def expect(self, tasks, jobs):
        """How long these tasks take, in words; "" while one of their kinds is not known."""
        if any(task.kind not in self.spent for task in tasks):
            return ""
        needed = 0.0
        for task in tasks:
            seconds, size = self.spent[task.kind]
            needed += seconds / size * max(task.size - steps_so_far(task), 0)
        return duration(needed / jobs)


def follow(tasks, looks, signals, on_end, jobs):
    """Say how each task ends, until there are no more looks. On a terminal a line shows what is being made."""
    console = Console(stderr=True)
    times = Times()
    open_tasks = list(tasks)
    bar = Progress(TextColumn("{task.completed}/{task.total}"), BarColumn(24), TextColumn("{task.description}"),
                   console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False)
    line = bar.add_task("", total=len(tasks))

    def eta():
        expected = times.expect(open_tasks, jobs)
        return f"; ETA {expected}" if open_tasks and expected else ""

    def tell(is_last):
        for task in [task for task in open_tasks if task.has_ended()]:
            seconds = times.add(task.folder)
            if seconds is None and not is_last:
                continue  # its result is there, its worker has still to say so
            open_tasks.remove(task)
            result = on_end(task)
            spent = "" if seconds is None else f", {seconds:.0f} s"
            console.print(f"[{task.kind} {len(tasks) - len(open_tasks)}/{len(tasks)}] {task.name}: {result or 'done'}"
                          f"{spent}{eta()}", markup=False, highlight=False, soft_wrap=True)
        if console.is_terminal:
            bar.update(line, completed=len(tasks) - len(open_tasks), description=now(open_tasks, signals) + eta())

    with contextlib.closing(looks), bar:
        for _ in looks:
            tell(is_last=False)
        tell(is_last=True)


def now(tasks, signals):
    """What is being made, in one line."""
    if signals:
        return "ending: the runs save what they have; once more kills them"
    begun = [task for task in tasks if (task.folder / "task.json").exists()]
    return ", ".join(f"{task.name}: step {steps_so_far(task)}" if task.kind == "train" else task.name
                     for task in begun[:4])
