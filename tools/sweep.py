"""Trains the same model under many settings and compares the scores.

    python tools/sweep.py PLAN --base @records/small.env COMPRESSOR=zlib --steps 300 --table ablations.md
    python tools/sweep.py 'MATRIX_LR=0.02,0.03' 'MUON_WD=0.04,0.09' --base @records/small.env --steps 300
    python tools/sweep.py 'MATRIX_LR=0.01..0.1' --trials 20 --base @records/small.env --steps 300
    python tools/sweep.py --ablate records/track_10min_16mb/RECORD --base @records/small.env --steps 300

A plan is a text file, one technique a line; each is compared with the base, or with another row:

    no SmearGate : SMEAR_GATE=none
    SWA : AVERAGE=swa                                   # a comment
    SWA, dense [vs SWA] : AVERAGE=swa SWA_EVERY=10      # the settings are relative to the base all the same

KEY=A,B words instead of a plan are a grid: all combinations, printed as scores. Where a value is itself a list, |
divides: VE_LAYERS=2,3|3. KEY=LOW..HIGH is a range, searched by Optuna. --ablate turns every switch that a record turns
on off in turn. Other KEY=VALUE words change the base. Settings in the environment are refused: the command says all.

"Equal steps" gives every run ITERATIONS=N and no wall clock. "Equal time" gives a row the steps that fit into the time
in which its reference makes N, from the ratio of their steps that tools/bench.py takes in turn; the clock of a training
run on a shared machine would be noise.

Runs live in DIR/runs, and are never repeated while settings, seed, code, torch, device and the content of the data
stay: after Ctrl-C, or with more rows, seeds or another --match, the same command makes only what is missing. Rows that
differ in evaluation or packing only share one training. Several commands, on machines that share the folder, work it
off together. A run that failed has failed: --retry tries it again.

With GPUs, as many runs at once as the machine has room for, each on --gpus-per-run of its own, by torchrun where that
is more than one. On a CPU one at a time, or --jobs; there --gpus-per-run is the number of processes of a run. --cluster
slurm or local makes the runs in jobs of submitit instead.

Exit codes: 0 done, 1 a run or a measurement failed or is missing (the table says which), 2 bad input, 130 and 143
interrupted.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for train_gpt.py
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

import torch

from benchmarks.ratios import student
from common import (
    ROOT,
    BadInput,
    check_output,
    commit,
    machine,
    positive,
    print_errors,
    stop_printing,
    whole,
    write,
)
from sweeps.outcome import collect, scores
from sweeps.plan import BASE, make_plan, resolve
from sweeps.progress import Times, duration, follow, say
from sweeps.runs import Runs
from sweeps.search import Search
from sweeps.table import FORMATS, for_terminal, markdown, write_table
from sweeps.timing import Stopwatch, steps_in_equal_time
from sweeps.work import Stop, Task, read_json, workers_here, workers_on_cluster

LONGEST_JOB = 24 * 3600  # seconds of a job of a cluster without --time-limit


# ---- where the runs are made ----------------------------------------------------------------------------------------


def uses_cuda(settings):
    return settings.device != "cpu" and torch.cuda.is_available()


def visible_gpus():
    """The devices that a run may be given, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


class Place:
    """The device of the runs, and the slots in which they are made: variables of the environment for each."""

    def __init__(self, args, settings):
        self.ranks = args.gpus_per_run or 1
        self.cluster = args.cluster
        on_nodes = args.cluster == "slurm"
        if args.device_name:
            self.device = args.device_name
        elif uses_cuda(settings):
            self.device = torch.cuda.get_device_name()
        elif on_nodes and args.gpus_per_run and settings.device != "cpu":
            raise BadInput("this machine has no GPU, and scores of different devices are not compared: say which one "
                           "the nodes have, --device-name 'NVIDIA H100 80GB HBM3' (as nvidia-smi -L shows it)")
        else:
            self.device = "cpu"
        groups = [{}] * (args.jobs or 1) if self.device == "cpu" or on_nodes else self._gpu_groups(args)
        threads = os.environ.get("OMP_NUM_THREADS")
        if not threads and not on_nodes:
            threads = str(max(1, machine()["cores"] // (len(groups) * self.ranks)))
        self.threads = threads or "as many as the node has"
        self.slots = [group | ({"OMP_NUM_THREADS": threads} if threads else {}) for group in groups]

    def _gpu_groups(self, args):
        """[{"CUDA_VISIBLE_DEVICES": ...}] of the runs that are made at once."""
        gpus = visible_gpus()
        groups = [gpus[at : at + self.ranks] for at in range(0, len(gpus) - self.ranks + 1, self.ranks)]
        jobs = args.jobs or len(groups)
        if not groups or jobs > len(groups):
            raise BadInput(f"--jobs {jobs} --gpus-per-run {self.ranks} need {jobs * self.ranks} GPUs, there are "
                           f"{len(gpus)}: lower one of them")
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups[:jobs]]

    def executor(self, args, folder):
        """A submitit executor, one job of which is a worker."""
        try:
            import submitit
        except ImportError:
            raise BadInput("--cluster needs submitit: pip install -r requirements-dev.txt") from None
        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=self.cluster)
        gpus = 0 if self.device == "cpu" else self.ranks
        options = dict(option.split("=", 1) for option in args.cluster_option)
        try:
            executor.update_parameters(
                name="sweep", timeout_min=(args.time_limit or LONGEST_JOB) // 60 + 1, nodes=1, tasks_per_node=1,
                gpus_per_node=gpus, **{name: number_or_text(text) for name, text in options.items()})
        except (NameError, TypeError, ValueError) as error:  # submitit's ways to refuse an option
            raise BadInput(f"--cluster-option: {error}") from None
        return executor


def number_or_text(text):
    return int(text) if text.isdecimal() else text


class Engine:
    """Makes tasks at a place, and says how they go."""

    def __init__(self, args, place, out):
        self.args = args
        self.place = place
        self.out = out
        self.stop = Stop()
        self.deadline = time.time() + args.time_limit if args.time_limit else float("inf")
        self.held = {}  # {folder: who makes it} of what was left to others

    def make(self, tasks, on_end=lambda task: "", slots=None):
        """Make the tasks; on_end(task) is called as each one ends, and says its result."""
        for task in tasks:
            task.forget_failure(self.args.retry, self.args.stop_worse is None)
        waiting = [task for task in tasks if not task.has_ended()]
        if len(waiting) < len(tasks):
            say(f"{len(tasks) - len(waiting)} of {len(tasks)} {tasks[0].kind} tasks have ended already")
        if not waiting or self.stop.signals:
            return
        if self.args.cluster:
            executor = self.place.executor(self.args, self.out)
            workers = workers_on_cluster(waiting, slots or self.place.slots, self.stop, self.deadline, executor)
        else:
            workers = workers_here(waiting, slots or self.place.slots, self.stop, self.args.wait, self.deadline)
        with self.stop.caught(), workers as (is_over, held):
            follow(waiting, is_over, self.stop, on_end, len(self.place.slots))
        self.held |= {folder: holder for folder, holder in held.items() if holder}


# ---- the sweep ------------------------------------------------------------------------------------------------------


class Sweep:
    """A plan, its runs, and the files that show how far they are."""

    def __init__(self, plan, args, argv, trainer, bench):
        self.plan = plan
        self.args = args
        self.out = args.out or Path("logs") / f"sweep-{default_name(args, plan)}"
        self.place = Place(args, plan.settings[BASE])
        self.engine = Engine(args, self.place, self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.runs = Runs(plan, trainer, self.out, self.place.device, self.place.ranks)
        self.speeds = {}
        self.about = {
            "command": shlex.join(["python", "tools/sweep.py", *argv]), "jobs": len(self.place.slots),
            "threads": self.place.threads, "ranks": self.place.ranks, "timing": None,
            "torch": torch.__version__, "machine": machine(), **commit(),
        }
        self.stopwatch = None
        if "time" in plan.matches:
            student(1)  # without scipy nothing need be measured
            self.stopwatch = Stopwatch(bench, plan, self.out, self.place.device, self.place.ranks, args.bench_blocks,
                                       args.bench_steps, self.place.threads)
            self.about["timing"] = self.stopwatch.describe()

    def result(self):
        return collect(self.plan, self.runs, self.speeds, self.about)

    def ask(self, rows):
        """Ask for every run that these rows need. A reference always makes N steps, whatever is compared with it."""
        plan = self.plan
        names = [BASE, *(row.name for row in rows)] if not plan.grid else [row.name for row in rows]
        references = {BASE, *(row.reference for row in rows)}
        for name in names:
            if "steps" in plan.matches or name in references:
                self.runs.add(name, "steps", plan.steps)
        for row in rows if self.speeds else ():
            if self.speeds[row.name].ratio is not None:
                self.runs.add(row.name, "time", steps_in_equal_time(plan.steps, self.speeds[row.name]))

    def measure(self):
        """The times of steps. On a CPU one after another, with nothing beside them."""
        if self.stopwatch:
            slots = self.place.slots[:1] if self.place.device == "cpu" else None
            self.engine.make(self.stopwatch.all_tasks(), slots=slots)
            self.speeds = self.stopwatch.speeds()

    def make(self):
        """Make the runs that were asked for and are not made."""
        self.runs.look()
        tasks = self.runs.tasks(self.args.stop_worse)
        reused = len(self.runs.by_key) - len(tasks)
        if reused:
            say(f"{reused} of {len(self.runs.by_key)} runs are finished already")
        run_of = {run.folder: run for run in self.runs.by_key.values()}

        def on_end(task):
            self.runs.settle()
            self.write_files()
            run = run_of[task.folder]
            score = f"{run.bpb:.4f} BPB" if run.valid else ""
            return "; ".join(filter(None, (score, run.note())))

        self.engine.make(tasks, on_end)
        self.runs.settle()

    def write_files(self):
        """What --table and --json show, as far as the runs are."""
        result = self.result()
        for path in self.args.table:
            write_table(result, self.plan, path)
        if self.args.json:
            write(self.args.json, f"{json.dumps(result, indent=1)}\n".encode())
        return result

    def run(self):
        if self.plan.axes:
            self.search()
        else:
            self.measure()
            self.ask(self.plan.rows)
            self.make()
        return self.write_files()

    def search(self):
        """Points by Optuna, as many at a time as there are slots."""
        search = Search(self.plan.axes)
        while len(search.told()) < self.args.trials and not self.engine.stop.signals:
            count = min(len(self.place.slots), self.args.trials - len(search.told()))
            rows = search.ask(count)
            settings, wrong = resolve(self.plan.base_words, rows)
            for text in wrong:
                say(f"not possible: {text}")
            self.plan.settings |= settings
            possible = [row for row in rows if settings[row.name]]
            self.plan.rows += possible
            self.ask(possible)
            self.make()
            for name in list(search.trials):
                of_seeds = scores(self.runs.row(name, "steps"))
                search.tell(name, sum(of_seeds.values()) / len(of_seeds) if of_seeds else None)


def default_name(args, plan):
    if args.ablate:
        return f"ablate-{args.ablate.name}"
    return "grid" if plan.grid else Path(args.words[0]).stem


# ---- the command ----------------------------------------------------------------------------------------------------


def seed_list(text):
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len(set(map(int, seeds))) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different seeds, such as 1337,42")
    return [int(seed) for seed in seeds]


def time_span(text):
    """Seconds of 90s, 30m or 4h."""
    units = {"s": 1, "m": 60, "h": 3600}
    if text[-1:] not in units or not text[:-1].isdecimal() or not int(text[:-1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no time, such as 90s, 30m or 4h")
    return int(text[:-1]) * units[text[-1]]


def table_file(text):
    path = Path(text)
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    return path


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("words", metavar="PLAN | KEY=A,B", nargs="*", help="plan file, or the axes of a grid or a search")
    add("--base", metavar="WORD", nargs="+", action="extend", default=[],
        help="@FILE and KEY=VALUE: what all runs have in common")
    add("--ablate", type=Path, metavar="RECORD", help="a record's folder or settings file, as the base: each switch "
        "that it turns on is a row, turned off")
    add("--only", metavar="ROW", action="append", default=[], help="this row and what it is compared with; repeatable")
    add("--seeds", type=seed_list, default=[1337, 42], metavar="A,B", help="default: 1337,42")
    add("--steps", type=whole(1), metavar="N", help="steps of a run (default: ITERATIONS of the base)")
    add("--match", choices=["steps", "time", "both"], help="default: both for a plan, steps for a grid")
    add("--trials", type=whole(1), metavar="N", default=0, help="points that Optuna may try of a range KEY=LOW..HIGH")
    add("--jobs", type=whole(1), metavar="J", help="runs at once (default: as many as there are GPUs for, 1 on a CPU, "
        "where they share the cores unless OMP_NUM_THREADS says how many threads each has)")
    add("--gpus-per-run", type=whole(1), metavar="G", help="GPUs of a run, by torchrun where more than 1 (default: 1); "
        "on a CPU its processes")
    add("--cluster", choices=["slurm", "local"], help="make the runs in --jobs jobs of submitit")
    add("--cluster-option", metavar="NAME=VALUE", action="append", default=[],
        help="for submitit, such as slurm_partition=gpu; repeatable")
    add("--device-name", metavar="NAME", help="the GPU of the nodes, where this machine has none")
    add("--wait", action="store_true", help="wait for runs that another command makes, too")
    add("--retry", action="store_true", help="try runs again that failed")
    add("--stop-worse", type=positive, metavar="BPB", help="stop a run whose validation is worse by this than the "
        "base's at the same step")
    add("--time-limit", type=time_span, metavar="TIME", help="90s, 30m or 4h: then nothing is begun, and runs save "
        "what they have; in a cluster the time of a job (default there: 24h)")
    add("--dry-run", action="store_true", help="say what would be made, and make nothing")
    add("--out", type=Path, metavar="DIR", help="folder of the runs (default: logs/sweep-PLAN, and logs/sweep-grid for "
        "every grid)")
    add("--table", type=table_file, metavar="FILE", action="append", default=[],
        help=f"write the table here, too, as runs end: {' '.join(FORMATS)}; repeatable")
    add("--json", type=Path, metavar="FILE", help="write everything here, as runs end")
    add("--bench-blocks", type=whole(1), default=5, metavar="B", help="processes of a measurement of times (5)")
    add("--bench-steps", type=whole(1), default=8, metavar="K", help="pairs of steps in each of them (8)")
    args = parser.parse_intermixed_args(argv)
    if not args.words and not args.ablate:
        parser.error("a plan, a grid or --ablate is missing")
    if not all("=" in option for option in args.cluster_option):
        parser.error("--cluster-option is NAME=VALUE, such as slurm_partition=gpu")
    return args


def print_plan(sweep):
    """What --dry-run says."""
    runs = sweep.runs
    runs.look()
    words = {"train": "train", "export": "pack the weights of", "eval": "score the artifact of"}
    times = Times()
    open_tasks = runs.tasks()
    for run in runs.ordered():
        done = run.summary is not None
        if done:
            what = f"finished, {run.summary['val_bpb']:.4f} BPB"
        elif run.source:
            what = f"{words[run.phase]} {run.source.label}"
        else:
            what = words[run.phase]
        print(f"{run.label}: {what}")
    for folder in (sweep.out / "runs").glob("*"):
        about = read_json(folder / "task.json") or {}
        if "kind" in about:
            times.add(Task(about["name"], folder, [], "summary.json", kind=about["kind"], size=about["size"]))
    trainings = [task for task in open_tasks if task.kind == "train"]
    seconds = times.expect(trainings, len(sweep.place.slots))
    hours = "unknown until a run has ended" if seconds is None else duration(seconds)
    measured = len(sweep.stopwatch.all_tasks()) if sweep.stopwatch else 0
    device = sweep.place.device
    where = "on the CPU" if device == "cpu" else f"on {sweep.place.ranks} x {device} each"
    print(f"{len(open_tasks)} of {len(runs.by_key)} runs to make, {len(trainings)} of them trainings, "
          f"{len(sweep.place.slots)} at once {where}; time of the trainings: {hours}")
    if sweep.stopwatch:
        print(f"{measured} processes measure the time of a step; what fits into equal time is known after them, and "
              f"comes to at most {len(sweep.stopwatch.measured) * len(sweep.plan.seeds)} further trainings")


def main(argv, trainer=ROOT / "train_gpt.py", bench=ROOT / "tools/bench.py"):
    args = arguments(argv)
    try:
        for option, path in (*(("--table", path) for path in args.table), ("--json", args.json)):
            check_output(option, path)
        plan = make_plan(args, os.environ)
        sweep = Sweep(plan, args, argv, trainer, bench)
        if args.dry_run:
            sweep.ask(plan.rows)
            print_plan(sweep)
            return 0
        result = sweep.run()
        if sweep.engine.stop.signals:
            say("interrupted: the same command goes on from here")
            return 128 + sweep.engine.stop.signals[-1]
        for folder, holder in sweep.engine.held.items():
            say(f"{folder} is made by {holder}: wait for it with --wait, or end it")
        text = for_terminal(result, plan) if sys.stdout.isatty() else markdown(result, plan)
        print(text, end="", flush=True)
    except BadInput as error:
        print_errors(error)
        return 2
    except KeyboardInterrupt:  # before or after the runs
        return 130
    except BrokenPipeError:
        return stop_printing()
    except OSError as error:  # a full disk, a file in the way of a folder
        print_errors(f"{error.filename or 'the folder of the runs'}: {error.strerror}; what was made is kept")
        return 2
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
