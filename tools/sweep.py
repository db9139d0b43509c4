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
import itertools
import os
import re
import shlex
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for train_gpt.py
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

import torch

from benchmarks.ratios import student
from common import ROOT, BadInput, check_output, commit, exit_code, machine, positive, whole, write_json
from sweeps.outcome import collect, scores
from sweeps.plan import BASE, make_plan, resolve
from sweeps.progress import Times, follow, say
from sweeps.runs import STARTS, Runs
from sweeps.table import FORMATS, as_text, write_table
from sweeps.timing import ITSELF, describe, measurements, speeds_of, steps_in_equal_time
from sweeps.work import holder_of, noted, work_here, work_on_cluster

LONGEST_JOB = 24 * 3600  # seconds of a job of a cluster without --time-limit


# ---- where the runs are made ----------------------------------------------------------------------------------------


class Place:
    """The device of the runs, and the slots in which they are made: variables of the environment for each."""

    def __init__(self, args, settings):
        self.ranks = args.gpus_per_run or 1
        on_nodes = args.cluster == "slurm"
        may_use_gpu = settings.device != "cpu"
        gpu_here = torch.cuda.get_device_name() if may_use_gpu and torch.cuda.is_available() else None
        self.device = args.device_name or gpu_here or "cpu"
        if self.device == "cpu" and may_use_gpu and on_nodes and args.gpus_per_run:
            raise BadInput("this machine has no GPU, and scores of different devices are not compared: say which one "
                           "the nodes have, --device-name 'NVIDIA H100 80GB HBM3' (as nvidia-smi -L shows it)")
        if self.device == "cpu" or on_nodes:
            self.slots = [{} for _ in range(args.jobs or 1)]
        else:
            self.slots = self._gpu_groups(args.jobs)
        threads = os.environ.get("OMP_NUM_THREADS")
        if not threads and not on_nodes:
            threads = str(max(1, machine()["cores"] // (len(self.slots) * self.ranks)))
        self.threads = threads or "as many as the node has"
        for slot in self.slots if threads else ():
            slot["OMP_NUM_THREADS"] = threads

    def _gpu_groups(self, jobs):
        """[{"CUDA_VISIBLE_DEVICES": ...}] of the runs that are made at once."""
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
        jobs = jobs or max(1, len(gpus) // self.ranks)
        needed = jobs * self.ranks
        if needed > len(gpus):
            raise BadInput(f"--jobs {jobs} --gpus-per-run {self.ranks} need {needed} GPUs, there are {len(gpus)}: "
                           "lower one of them")
        return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[at : at + self.ranks])} for at in range(0, needed, self.ranks)]

    def executor(self, args, folder):
        """A submitit executor, one job of which is a worker."""
        import submitit

        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=args.cluster)
        options = dict(option.split("=", 1) for option in args.cluster_option)
        options = {name: int(text) if text.isdecimal() else text for name, text in options.items()}
        try:
            executor.update_parameters(
                name="sweep", timeout_min=(args.time_limit or LONGEST_JOB) // 60 + 1, nodes=1, tasks_per_node=1,
                gpus_per_node=0 if self.device == "cpu" else self.ranks, **options)
        except (NameError, TypeError, ValueError) as error:  # submitit's ways to refuse an option
            raise BadInput(f"--cluster-option: {error}") from None
        return executor


# ---- the sweep ------------------------------------------------------------------------------------------------------


class Sweep:
    """A plan, its runs, and the files that show how far they are."""

    def __init__(self, plan, args, argv, trainer, bench):
        self.plan = plan
        self.args = args
        self.out = args.out or Path("logs") / f"sweep-{plan.name}"
        self.place = Place(args, plan.settings[BASE])
        self.out.mkdir(parents=True, exist_ok=True)
        self.runs = Runs(plan, trainer, self.out, self.place.device, self.place.ranks)
        self.times = {}  # see measurements()
        self.speeds = {}
        self.signals = []  # that asked the command to end
        self.left = []  # folders of tasks that have not ended, and may be made by others
        self.deadline = time.time() + args.time_limit if args.time_limit else float("inf")
        if "time" in plan.matches:
            student(1)  # without scipy nothing need be measured
            self.times = measurements(plan, bench, self.out, self.place, args)
        self.about = {
            "command": shlex.join(["python", "tools/sweep.py", *argv]), "jobs": len(self.place.slots),
            "threads": self.place.threads, "ranks": self.place.ranks,
            "timing": describe(plan.settings[BASE], self.place, args) if "time" in plan.matches else None,
            "torch": torch.__version__, "machine": machine(), **commit(),
        }

    def run(self):
        """Make everything; returns the result."""
        if "time" in self.plan.matches:  # on a CPU one after another, with nothing beside them
            slots = self.place.slots[:1] if self.place.device == "cpu" else self.place.slots
            self.make(list(itertools.chain(*self.times.values())), slots)
            self.speeds = speeds_of(self.plan, self.times)
        if self.plan.ranges:
            from sweeps.search import search

            search(self.plan.ranges, self.args.trials, len(self.place.slots), self.scores_of)
        else:
            self.ask(self.plan.rows)
            self.make_runs()
        return self.write_files()

    def scores_of(self, rows):
        """The mean score of each point of a search, None where it has none; [] after a signal."""
        settings, wrong = resolve(self.plan.base_words, rows)
        for text in wrong:
            say(f"not possible: {text}")
        new = {row.name: row for row in rows if settings[row.name] and row.name not in self.plan.settings}
        self.plan.settings.update(settings)
        self.plan.rows.extend(new.values())
        self.ask(new.values())
        self.make_runs()
        found = [list(scores(self.runs.row(row.name, "steps")).values()) for row in rows]
        return [] if self.signals else [statistics.fmean(values) if values else None for values in found]

    def ask(self, rows):
        """Ask for every run that these rows need. A reference always makes N steps, whatever is compared with it."""
        plan = self.plan
        references = {BASE, *(row.reference for row in rows)}
        for name in [*([] if plan.grid else [BASE]), *(row.name for row in rows)]:
            if "steps" in plan.matches or name in references:
                self.runs.add(name, "steps", plan.steps)
        for row in rows if self.speeds else ():
            if self.speeds[row.name].ratio is not None:
                self.runs.add(row.name, "time", steps_in_equal_time(plan.steps, self.speeds[row.name]))

    def make_runs(self):
        """Make the runs that were asked for and are not made."""
        runs = self.runs
        runs.look()
        tasks = runs.tasks(self.args.stop_worse)
        if reused := len(runs.by_folder) - len(tasks):
            say(f"{reused} of {len(runs.by_folder)} runs are finished already")

        def on_end(task):
            runs.settle()
            self.write_files()
            run = runs.by_folder[task.folder]
            score = f"{run.bpb:.4f} BPB" if run.valid else ""
            return "; ".join(filter(None, (score, run.note())))

        self.make(tasks, self.place.slots, on_end)
        runs.settle()

    def make(self, tasks, slots, on_end=lambda task: ""):
        """Make the tasks; on_end(task) is called as each one ends, and says its result."""
        args = self.args
        for task in tasks:
            task.forget_failure(args.retry, args.stop_worse is None)
        waiting = [task for task in tasks if not task.has_ended()]
        if len(waiting) < len(tasks):
            say(f"{len(tasks) - len(waiting)} of {len(tasks)} {tasks[0].kind} tasks have ended already")
        if not waiting or self.signals:
            return
        if args.cluster:
            looks = work_on_cluster(waiting, slots, self.deadline, self.signals, self.place.executor(args, self.out))
        else:
            looks = work_here(waiting, slots, self.deadline, self.signals, args.wait)
        with noted(self.signals):
            follow(waiting, looks, self.signals, on_end, len(self.place.slots))
        self.left += [task.folder for task in waiting if not task.has_ended()]

    def write_files(self):
        """What --table and --json show, as far as the runs are; returns it."""
        result = collect(self.plan, self.runs, self.speeds, self.about)
        for path in self.args.table:
            write_table(result, self.plan, path)
        if self.args.json:
            write_json(self.args.json, result, indent=1)
        return result

    def print_plan(self):
        """What --dry-run says."""
        runs = self.runs
        jobs = len(self.place.slots)
        self.ask(self.plan.rows)
        runs.look()
        for run in runs.ordered():
            what = f"{STARTS[run.phase][0]} {run.source.label if run.source else ''}".strip()
            if run.summary:
                what = f"finished, {run.summary['val_bpb']:.4f} BPB"
            print(f"{run.label}: {what}")
        times = Times()
        for folder in (self.out / "runs").glob("*"):
            times.add(folder)
        tasks = runs.tasks()
        trainings = [task for task in tasks if task.kind == "train"]
        where = "on the CPU" if self.place.device == "cpu" else f"on {self.place.ranks} x {self.place.device} each"
        print(f"{len(tasks)} of {len(runs.by_folder)} runs to make, {len(trainings)} of them trainings, {jobs} at once "
              f"{where}; time of the trainings: {times.expect(trainings, jobs) or 'unknown until a run has ended'}")
        if "time" in self.plan.matches:
            processes = sum(map(len, self.times.values()))
            more = len(self.times.keys() - {ITSELF}) * len(self.plan.seeds)
            print(f"{processes} processes measure the time of a step; what fits into equal time is known after them, "
                  f"and comes to at most {more} further trainings")


# ---- the command ----------------------------------------------------------------------------------------------------


def seed_list(text):
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len(set(map(int, seeds))) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different seeds, such as 1337,42")
    return [int(seed) for seed in seeds]


def time_span(text):
    """Seconds of 90s, 30m or 4h."""
    found = re.fullmatch(r"([1-9]\d*)([smh])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, such as 90s, 30m or 4h")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


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


def command(argv, args, trainer, bench):
    """The command after its arguments; returns the exit code."""
    for option, path in (*(("--table", path) for path in args.table), ("--json", args.json)):
        check_output(option, path)
    plan = make_plan(args, os.environ)
    sweep = Sweep(plan, args, argv, trainer, bench)
    if args.dry_run:
        sweep.print_plan()
        return 0
    result = sweep.run()
    if sweep.signals:
        say("interrupted: the same command goes on from here")
        return 128 + sweep.signals[-1]
    for folder in sweep.left:
        if holder := holder_of(folder):
            say(f"{folder} is made by {holder}: wait for it with --wait, or end it")
        elif args.cluster:
            say(f"{folder} is made by nobody any more: the jobs are over, see {sweep.out / 'jobs'}")
    print(as_text(result, plan, sys.stdout.isatty()), end="")
    return 1 if result["failed"] else 0


def main(argv, trainer=ROOT / "train_gpt.py", bench=ROOT / "tools/bench.py"):
    return exit_code(partial(command, argv, arguments(argv), trainer, bench))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
