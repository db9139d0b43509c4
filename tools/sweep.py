"""Trains the same model under many settings and compares the scores.

    python tools/sweep.py PLAN --base @records/small.env COMPRESSOR=zlib --steps 300 --table ablations.md
    python tools/sweep.py 'MATRIX_LR=0.02,0.03' 'MUON_WD=0.04,0.09' --base @records/small.env --steps 300

A plan is a text file, one technique a line; each is compared with the base, or with another row:

    no SmearGate : SMEAR_GATE=none
    SWA : AVERAGE=swa                                   # a comment
    SWA, dense [vs SWA] : AVERAGE=swa SWA_EVERY=10      # the settings are relative to the base all the same

KEY=A,B words instead of a plan are a grid: all combinations, printed as absolute scores (VE_LAYERS=2,3|3 for settings
that are lists). Other KEY=VALUE words change the base. Settings in the environment are refused: the command says all.

"Equal steps" gives every run ITERATIONS=N and no wall clock. "Equal time" gives a row the steps that fit into the time
in which its reference makes N, from the ratio of their steps that tools/bench.py takes in turn; the clock of a training
run on a shared machine would be noise. Runs live in DIR/runs and are never repeated while settings, seed, data
and code stay: after Ctrl-C, or with more rows, seeds or another --match, the same command makes only what is missing.

Exit codes: 0 done, 1 a run or a measurement failed (the table says which), 2 bad input, 130 and 143 interrupted.
"""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:  # python -P and PYTHONSAFEPATH leave it out
    sys.path.insert(0, HERE)

from common import ROOT, git, quartiles

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch

from train_gpt import BadInput, Layers, Settings, find_shards, write_atomic

BASE = "base"
FIELDS = {f.name.upper(): f for f in fields(Settings)}
# What a sweep decides itself: the value that a file's is replaced by while settings are checked, and what decides it.
OWNED = {"SEED": ("0", "--seeds"), "ITERATIONS": ("1", "--steps"), "MAX_WALLCLOCK_SECONDS": ("0", "--steps"),
         "OUT_DIR": ("", "--out"), "RUN_ID": ("", "--out"), "PHASES": ("all", ""), "ARTIFACT": ("", ""),
         "RESUME": ("", "")}
# What cannot change the work of a training step: numbers that the same operations read, and what is read later. To
# measure them would only add noise, a percent or more on a shared machine.
SAME_WORK = set("""lr_warmup_steps warmdown_frac warmdown_iters warmdown_seconds min_lr seq_change_warmup_steps
    matrix_lr scalar_lr tied_embed_lr embed_lr head_lr muon_momentum muon_momentum_warmup_start
    muon_momentum_warmup_steps muon_beta2 muon_wd adam_wd embed_wd head_wd wd_taper_start_frac wd_taper_final_mult
    beta1 beta2 matrix_betas embed_betas head_betas adam_eps loader ema_decay leaky_slope qk_gain_init
    newton_schulz""".split())
SAME_WORK |= {f.name for f in FIELDS.values() if f.metadata["room"] in ("Quantisation and packing", "Evaluation")}
MATCHES = {"steps": "equal steps", "time": "equal time"}


class Interrupted(Exception):
    """The number of the signal that ended the sweep."""


# ---- the plan -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One technique of a plan or one point of a grid. A point has no reference: its score is shown as it is."""

    name: str
    changes: tuple[str, ...]
    reference: str | None = BASE
    where: str = ""


def read_plan(path):
    """(rows, complaints) of a plan file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})"]
    rows, complaints = [], []
    for number, line in enumerate(lines, 1):
        line = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()  # "(#549)" in a name is no comment
        if not line:
            continue
        where = f"{path}:{number}"
        head, colon, rest = line.partition(":")
        name, reference = re.fullmatch(r"(.*?)\s*(?:\[vs\s+(.*?)\s*\])?\s*", head).groups()
        try:
            changes = shlex.split(rest)
        except ValueError as error:
            complaints.append(f"{where}: {error}")
            continue
        if not (colon and name and changes):
            complaints.append(f"{where}: {line!r} is not 'name : KEY=VALUE ...'")
        else:
            rows.append(Row(name, tuple(changes), reference or BASE, where))
    return rows, complaints + _wrong_names(rows, path)


def _wrong_names(rows, path):
    taken, complaints = {BASE}, [] if rows else [f"{path}: holds no row"]
    for row in rows:
        if row.name in taken:
            complaints.append(f"{row.where}: the name {row.name!r} is taken")
        taken.add(row.name)
    return complaints + [f"{row.where}: there is no row {row.reference!r} to compare with"
                         for row in rows if row.reference not in taken]


def read_grid(words):
    """(rows, words for the base, complaints): all combinations of KEY=A,B words; one value is for the base."""
    axes, base, complaints = {}, [], []
    for word in words:
        values = alternatives(word)
        name = word.partition("=")[0]
        if len(values) < 2:
            base.append(word)
        elif name in axes:
            complaints.append(f"grid: {name} is given twice")
        else:
            axes[name] = values
    points = itertools.product(*axes.values()) if axes else ()
    rows = [Row(" ".join(point), point, None, "grid") for point in points]
    return rows, base, complaints + ([] if rows else ["grid: no word has two values, such as MATRIX_LR=0.02,0.03"])


def alternatives(word):
    """KEY=A,B as [KEY=A, KEY=B]. The value of a list setting has commas of its own: there | divides."""
    name, equals, text = word.partition("=")
    if word.startswith("@") or not equals:
        return [word]
    lists = name in FIELDS and FIELDS[name].type is Layers
    return [f"{name}={value}" for value in dict.fromkeys(text.split("|" if lists else ","))]


def parse_settings(words, **owned):
    """(settings of a run, complaints): what the sweep decides has a value that fits, whatever a file says."""
    owned = {name: value for name, (value, _) in OWNED.items()} | owned
    words = [word for word in words if word.partition("=")[0] not in OWNED]
    try:
        settings = Settings.parse([*words, *(f"{name}={value}" for name, value in owned.items() if value is not None)])
    except BadInput as error:
        return None, [line.removeprefix("argument: ") for line in str(error).splitlines()]
    return settings, []


def refused(words):
    """Complaints about settings that a sweep decides itself, and about those that are given twice."""
    names = [word.partition("=")[0] for word in words]
    for name in dict.fromkeys(names):
        if name in OWNED:
            yield f"{name} is decided by the sweep" + (f": use {OWNED[name][1]}" if OWNED[name][1] else "")
        elif names.count(name) > 1 and not name.startswith("@"):
            yield f"{name} is set twice"


def resolve(base_words, rows):
    """({row name: settings}, complaints). Complaints about the base are not repeated for every row."""
    settings, wrong = {}, {}
    settings[BASE], wrong[BASE] = parse_settings(base_words)
    complaints = [f"{BASE}: {text}" for text in (*refused(base_words), *wrong[BASE])]
    for row in rows:
        settings[row.name], wrong[row.name] = parse_settings([*base_words, *row.changes])
        own = [text for text in wrong[row.name] if text not in wrong[BASE]]
        complaints += [f"{row.where}: {text}" for text in (*refused(row.changes), *own)]
    for row in rows:
        mine, other = settings[row.name], settings.get(row.reference)
        if mine and mine == other:
            complaints.append(f"{row.where}: has the settings of {row.reference!r}, with which it is compared")
    return settings, complaints


def refused_environment(env):
    """The trainer would read these; a command that is to be repeated cannot depend on them."""
    for name in sorted(FIELDS.keys() & env.keys()):
        yield f"environment: {name} is set; unset it, and give {name}=... after --base if it is wanted"
    try:
        Settings.parse((), {name: value for name, value in env.items() if name not in FIELDS})
    except BadInput as error:
        yield from str(error).splitlines()


def data_facts(path):
    """Name, size and identity of a data set; BadInput if it is not there."""
    train, val = find_shards(path, "train"), find_shards(path, "val")
    known = [(shard.name, shard.stat().st_size) for shard in (*train, *val)]
    with contextlib.suppress(FileNotFoundError):
        known.append((Path(path) / "manifest.json").read_text(encoding="utf-8"))
    return {"name": Path(path).name, "train_tokens": sum(shard.stat().st_size - 1024 for shard in train) // 2,
            "sha256": hashlib.sha256(json.dumps(known).encode()).hexdigest()}


class Plan(NamedTuple):
    """Everything that is decided before the first run."""

    rows: list[Row]
    settings: dict[str, Settings]  # of each row and of the base
    data: dict[str, dict]  # of each DATA_PATH
    base_words: list[str]
    grid: bool
    steps: int
    seeds: list[int]
    matches: list[str]

    def others(self):
        """The base, if its score is wanted, and the rows: what is run."""
        return [*([] if self.grid else [BASE]), *(row.name for row in self.rows)]

    def pace(self, row):
        """Whose time per step the row's is compared with."""
        return row.reference or BASE


def make_plan(args, env):
    """The plan, or BadInput with all complaints at once."""
    first, *more = args.words
    grid = not Path(first).is_file() and "=" in first
    if grid:
        rows, more, complaints = read_grid(args.words)
    else:
        rows, complaints = read_plan(Path(first))
    base_words = [*args.base, *more]
    settings, wrong = resolve(base_words, rows)
    complaints += [*wrong, *refused_environment(env)]
    steps = args.steps
    if not steps and settings[BASE]:
        steps = parse_settings(base_words, ITERATIONS=None, MAX_WALLCLOCK_SECONDS=1)[0].iterations
        if not steps:
            complaints.append("the base has no ITERATIONS: give --steps N")
    data = {}
    for path in dict.fromkeys(s.data_path for s in settings.values() if s):
        try:
            data[path] = data_facts(path)
        except BadInput as error:
            complaints.append(str(error))
    if complaints:
        raise BadInput("\n".join(dict.fromkeys(complaints)))
    matches = [args.match] if args.match in MATCHES else ["steps"] if grid and not args.match else list(MATCHES)
    return Plan(rows, settings, data, base_words, grid, steps, args.seeds, matches)


# ---- processes ------------------------------------------------------------------------------------------------------


@dataclass
class Child:
    process: subprocess.Popen
    begun: float
    told: int = 0  # signals passed on


class Processes:
    """Commands as processes, each in a session of its own, so that a signal reaches it once, through this object.

    The first Ctrl-C or SIGTERM asks them to end (the trainer saves a checkpoint), the second kills them.
    """

    def __init__(self, env, lock):
        self.env, self.lock, self.caught = env, lock, []

    def __enter__(self):
        self._before = {n: signal.signal(n, lambda number, _: self.caught.append(number))
                        for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, commands, jobs=1):
        """Runs each (command, file for its output), `jobs` at once; yields (index, exit code, seconds) as they end."""
        waiting, active = deque(enumerate(commands)), {}
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
            if child.told < min(len(self.caught), 2):
                child.told += 1
                with contextlib.suppress(OSError):  # it has ended by now
                    os.killpg(child.process.pid, signal.SIGINT if child.told == 1 else signal.SIGKILL)


TOO_LARGE = 3  # exit code of a run that was scored, but whose artifact is over SIZE_LIMIT


def why(code, output):
    """Why a process failed, in one line: its last error."""
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no output")
    return f"{last[:300]} ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


@contextlib.contextmanager
def locked(folder):
    """One sweep a folder. Yields the descriptor that holds the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise BadInput(f"--out {folder}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError:
        raise BadInput(f"{folder} is in use by another sweep, or by a run that a killed one left behind") from None
    finally:
        os.close(handle)


def say(text):
    """Progress goes to standard error: standard output is the table."""
    print(text, file=sys.stderr, flush=True)


# ---- time per step --------------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """Time per step of a row over that of its reference."""

    ratio: float | None  # None: it could not be measured
    how: str
    pairs: list | tuple = ()  # (reference ms, row ms)
    error: str = ""


def digest(*values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


class Stopwatch:
    """Measures pairs (reference, row) with tools/bench.py and keeps them in DIR/times."""

    def __init__(self, bench, out, args, plan, processes):
        self.bench, self.out, self.args, self.plan, self.processes = bench, out, args, plan, processes
        self.cuda = uses_cuda(plan.settings[BASE])
        self.code = [file_sha256(bench) if bench.is_file() else "", file_sha256(ROOT / "train_gpt.py")]

    def mode(self, settings):
        """As the trainer decides it."""
        return "compiled" if settings.compile == "on" or (settings.compile == "auto" and self.cuda) else "eager"

    def describe(self):
        kind = "GPU time" if self.cuda else "CPU time"
        return (f"`tools/bench.py train --against` ({self.mode(self.plan.settings[BASE])}): steps of reference and row "
                f"in turn, median ratio of {self.args.bench_steps} pairs of {kind}")

    def measure(self, row):
        """The row's Speed."""
        names = self.plan.pace(row), row.name
        # tools/bench.py brings data of its own: one measurement serves all data sets.
        reference, mine = (replace(self.plan.settings[name], data_path=Settings.data_path, iterations=self.plan.steps,
                                   seed=self.plan.seeds[0]) for name in names)
        if changed(reference, mine) <= SAME_WORK:
            return Speed(1.0, "same work, not measured")
        key = digest(reference.text(), mine.text(), self.code, self.cuda, self.args.bench_steps, torch.__version__,
                     self.processes.env["OMP_NUM_THREADS"])
        store = self.out / "times" / f"{key}.json"
        if not store.exists():
            if error := self._pairs(reference, mine, store):
                return Speed(None, "failed", error=error)
        pairs = json.loads(store.read_text(encoding="utf-8"))
        return Speed(statistics.median(b / a for a, b in pairs), "measured", pairs)

    def _pairs(self, reference, mine, store):
        """Write the pairs to `store`, or say why there are none."""
        answer, output, mode = store.with_suffix(".bench.json"), store.with_suffix(".txt"), self.mode(mine)
        answer.unlink(missing_ok=True)
        words = [sys.executable, str(self.bench), "train", *shlex.split(mine.text()), "--against",
                 *shlex.split(reference.text()), "--modes", mode, "--steps", str(self.args.bench_steps), "--json",
                 str(answer)]
        code = next(self.processes.run([(words, output)]))[1]
        if code:
            return why(code, output)
        try:
            (row,) = json.loads(answer.read_text(encoding="utf-8"))["rows"]
            pairs = [(float(a), float(b)) for a, b in row["pairs"]]
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self.bench.name} gave no pairs of mode {mode}"
        if not pairs or not all(0 < ms < math.inf for pair in pairs for ms in pair):
            return f"{self.bench.name} gave pairs that are no times"
        write_atomic(store, [json.dumps(pairs).encode()])
        return ""


def changed(one, other):
    return {f.name for f in fields(Settings) if getattr(one, f.name) != getattr(other, f.name)}


def ratio_error(pairs):
    """Standard error of the median of the ratios, from their quartiles as if they were normal: 1.253 sigma / root n."""
    low, _, high = quartiles([mine / reference for reference, mine in pairs])
    return 1.253 * (high - low) / 1.349 / len(pairs) ** 0.5


def steps_in_equal_time(steps, speed):
    """Steps that fit into the time of the reference's: as many, where the ratio cannot be told from 1. A step more or
    less for a measuring error would change the schedule, and the score by more than most techniques do.
    """
    same = speed.pairs and abs(speed.ratio - 1) < 2 * ratio_error(speed.pairs)
    return steps if same else max(1, round(steps / speed.ratio))


def measure_all(plan, stopwatch):
    """{row name: Speed}, in the order of the plan."""
    speeds = {}
    for number, row in enumerate(plan.rows, 1):
        speed = speeds[row.name] = stopwatch.measure(row)
        found = speed.error or f"{speed.ratio:.3f} times the step of {plan.pace(row)} ({speed.how})"
        say(f"[time {number}/{len(plan.rows)}] {row.name}: {found}")
    return speeds


# ---- runs -----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training run: what is asked for, and what became of it."""

    settings: Settings
    folder: Path
    code_sha256: str
    label: str
    summary: dict | None = None
    error: str = ""
    reused: bool = False

    def command(self, trainer):
        return [sys.executable, str(trainer), *shlex.split(self.settings.text()), f"OUT_DIR={self.folder}",
                "RESUME=auto"]

    def read(self):
        """Whether the folder holds the finished run that is meant here; sets its summary."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
            words = {word for word in shlex.split(found["settings"]) if not word.startswith(("OUT_DIR=", "RESUME="))}
            same = words == set(shlex.split(self.settings.text())) and found["code_sha256"] == self.code_sha256
            if same and math.isfinite(found["val_bpb"]):
                self.summary = found
        return self.summary is not None

    @property
    def valid(self):
        return self.summary is not None and self.summary.get("valid") == "yes"

    @property
    def bpb(self):
        """The score, if it counts."""
        return self.summary["val_bpb"] if self.valid else None

    def note(self):
        """What the table has to say about it, or nothing."""
        if self.summary is None:
            return f"failed: {self.error}"
        if self.valid:
            total, limit = self.summary.get("total_bytes") or 0, self.settings.size_limit
            return f"over the limit: {total:,} bytes of {limit:,}, scored all the same" if total > limit else ""
        reasons = "; ".join(map(str, self.summary.get("reasons") or ())) or "no reason given"
        return f"INVALID, {self.summary['val_bpb']:.4f} is not counted: {reasons}"

    def facts(self, trainer):
        keys = ("val_bpb", "val_loss", "valid", "reasons", "params", "steps", "train_tokens", "model_bytes",
                "total_bytes", "train_seconds", "export_seconds", "eval_seconds", "settings_hash")
        return {"seed": self.settings.seed, "command": shlex.join(self.command(trainer)), "out_dir": str(self.folder),
                "reused": self.reused, "error": self.error, **{key: (self.summary or {}).get(key) for key in keys}}


class Runs:
    """The runs of a sweep by what they are: rows that ask for the same run share it."""

    def __init__(self, plan, trainer, out):
        self.plan, self.out, self.code = plan, out, file_sha256(trainer)
        self.by_key, self.of = {}, {}  # of: (row name, match, seed) -> run

    def want(self, name, match, steps):
        for seed in self.plan.seeds:
            settings = replace(self.plan.settings[name], iterations=steps, seed=seed)
            key = digest(settings.text(), self.code, self.plan.data[settings.data_path]["sha256"], torch.__version__)
            folder = self.out / "runs" / f"{steps}-{seed}-{key}"
            run = self.by_key.setdefault(key, Run(settings, folder, self.code, f"{name}, seed {seed}, {steps} steps"))
            self.of[name, match, seed] = run

    def row(self, name, match):
        """{seed: run}; empty where equal time is unknown."""
        return {seed: run for (who, how, seed), run in self.of.items() if (who, how) == (name, match)}


def want_all(plan, runs, speeds):
    """Ask for every run that the table needs. A reference always makes N steps, whatever is compared with it."""
    references = {row.reference for row in plan.rows} - {None}
    for name in plan.others():
        if "steps" in plan.matches or name in references | {BASE}:
            runs.want(name, "steps", plan.steps)
    for row in plan.rows if "time" in plan.matches else ():
        if (speed := speeds[row.name]).ratio is not None:
            runs.want(row.name, "time", steps_in_equal_time(plan.steps, speed))


def run_all(runs, trainer, jobs, processes):
    """Every run that is not finished yet, seed by seed, so that the first seed's table comes first."""
    every = sorted(runs.by_key.values(), key=lambda run: runs.plan.seeds.index(run.settings.seed))
    for run in every:
        run.reused = run.read()
    todo = [run for run in every if not run.reused]
    if len(todo) < len(every):
        say(f"{len(every) - len(todo)} of {len(every)} runs are finished already")
    commands = [(run.command(trainer), run.folder / "console.txt") for run in todo]
    left, done, spent = sum(run.settings.iterations for run in todo), 0, 0.0
    for number, (index, code, seconds) in enumerate(processes.run(commands, jobs), 1):
        run = todo[index]
        scored = code in (0, TOO_LARGE) and run.read()
        if code and not scored:
            run.error = why(code, commands[index][1])
        elif not scored:
            run.error = "it ended without a score of these settings and this code"
        done, spent = done + run.settings.iterations, spent + seconds
        eta = (left - done) * spent / done / jobs
        found = "; ".join(filter(None, (f"{run.bpb:.4f} BPB" if run.valid else "", run.note())))
        say(f"[run {number}/{len(todo)}] {run.label}: {found}, {seconds:.0f} s; ETA {duration(eta)}")


def duration(seconds):
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


# ---- statistics -----------------------------------------------------------------------------------------------------


def spread(values):
    """Mean, extremes and standard deviation of a sample, or None of nothing."""
    if not values:
        return None
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "count": len(values),
            "std": statistics.stdev(values) if len(values) > 1 else None}


def scores(runs):
    """{seed: score} of the runs whose score counts."""
    return {seed: run.bpb for seed, run in runs.items() if run.bpb is not None}


def paired(one, reference):
    """{seed: difference} over the seeds that both have: what the seed itself does to a score cancels out."""
    return {seed: one[seed] - reference[seed] for seed in one if seed in reference}


def compare(plan, runs, row, match):
    """What one row came to at equal steps or equal time."""
    mine = runs.row(row.name, match)
    result = {"iterations": next((run.settings.iterations for run in mine.values()), None),
              "bpb": spread(list(scores(mine).values()))}
    if row.reference:
        result["changes"] = paired(scores(mine), scores(runs.row(row.reference, "steps")))
        result["change"] = spread(list(result["changes"].values()))
    return result


def notes(runs, name):
    """Failed and invalid runs of a row, the same thing said once for all its seeds."""
    seeds = {}
    for (who, match, seed), run in runs.of.items():
        if who == name and run.note():
            seeds.setdefault((match, run.note()), []).append(seed)
    return [f"{MATCHES[match]}, seed {', '.join(map(str, which))}: {note}" for (match, note), which in seeds.items()]


def collect(plan, runs, speeds, trainer):
    """The rows of the result, the largest improvement first, those without a score last."""
    rows = []
    for row in plan.rows:
        results = {match: compare(plan, runs, row, match) for match in plan.matches}
        speed = speeds.get(row.name)
        remarks = notes(runs, row.name)
        if speed and speed.error:
            remarks.append(f"equal time: the time per step is unknown: {speed.error}")
        rows.append({"name": row.name, "changes": list(row.changes), "reference": row.reference,
                     "settings": plan.settings[row.name].text(), "speed": speed and speed._asdict(), **results,
                     "runs": {m: [r.facts(trainer) for r in runs.row(row.name, m).values()] for m in MATCHES},
                     "notes": remarks})
    return sorted(rows, key=lambda row: effect(row, plan))


def effect(row, plan):
    found = row[plan.matches[0]]["bpb" if plan.grid else "change"]
    return found["mean"] if found else math.inf


# ---- the machine ----------------------------------------------------------------------------------------------------


def uses_cuda(settings):
    return settings.device != "cpu" and torch.cuda.is_available()


def file_sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model():
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return " ".join(found[1].split())
    return platform.processor() or platform.machine()


def commit():
    changes = " with changes of train_gpt.py" if git("diff", "HEAD", "--stat", "--", "train_gpt.py") else ""
    return (git("rev-parse", "--short=12", "HEAD") or "none") + changes


def machine(settings):
    return {"cpu": cpu_model(), "cores": cores(), "torch": torch.__version__, "python": platform.python_version(),
            "gpu": torch.cuda.get_device_name() if uses_cuda(settings) else None, "system": platform.platform()}


# ---- the table ------------------------------------------------------------------------------------------------------


def cell(text):
    return str(text).replace("|", "\\|")


def span(found, seeds, sign=""):
    """mean (min .. max), and of how many seeds where some are missing."""
    if found is None:
        return "-"
    text = f"{found['mean']:{sign}.4f}"
    if found["count"] > 1:
        text += f" ({found['min']:{sign}.4f} .. {found['max']:{sign}.4f})"
    return text if found["count"] == len(seeds) else f"{text}, {found['count']} of {len(seeds)} seeds"


def size(row, base_runs, plan):
    """Bytes of the packed model, in a plan as the change relative to the base at equal steps."""
    def mean(runs):
        found = [run["model_bytes"] for run in runs if run["model_bytes"]]
        return statistics.fmean(found) if found else None

    mine, base = mean(row["runs"][plan.matches[0]]), mean(base_runs)
    if mine is None or (base is None and not plan.grid):
        return "-"
    return f"{mine:,.0f}" if plan.grid else f"{mine / base - 1:+.1%}"


def columns(plan, base_runs):
    """(heading, cell of a row) of each column."""
    key, sign = ("bpb", "") if plan.grid else ("change", "+")
    what = "BPB" if plan.grid else "BPB change"
    if plan.grid:
        for at, change in enumerate(plan.rows[0].changes):
            yield change.partition("=")[0], lambda row, at=at: row["changes"][at].partition("=")[2]
    else:
        yield "technique", lambda row: row["name"] + ("" if row["reference"] == BASE else f" [vs {row['reference']}]")
        yield "settings", lambda row: f"`{' '.join(row['changes'])}`"
    if "steps" in plan.matches:
        yield f"{what} at equal steps", lambda row: span(row["steps"][key], plan.seeds, sign)
    if "time" in plan.matches:
        yield "time per step", lambda row: pace(row["speed"])
        yield "steps in equal time", lambda row: row["time"]["iterations"] or "-"
        yield f"{what} at equal time", lambda row: span(row["time"][key], plan.seeds, sign)
    yield "model bytes", lambda row: size(row, base_runs, plan)


def pace(speed):
    if speed["ratio"] is None:
        return "-"
    return f"x {speed['ratio']:.3f} ± {ratio_error(speed['pairs']):.3f}" if speed["pairs"] else "x 1"


def table(result, plan):
    """Lines of markdown."""
    base = result["base"]
    if not plan.grid:
        params = next((f", {run['params']:,} parameters" for run in base["runs"] if run["params"]), "")
        yield f"Base: {span(base['bpb'], plan.seeds)} BPB{params}."
        yield from (f"Base, {note}." for note in base["notes"])
        yield ""
    parts = list(columns(plan, base["runs"]))
    if any(row["notes"] for row in result["rows"]):
        parts.append(("note", lambda row: "; ".join(row["notes"])))
    yield f"| {' | '.join(heading for heading, _ in parts)} |"
    yield f"|{'---|' * len(parts)}"
    for row in result["rows"]:
        yield f"| {' | '.join(cell(content(row)) for _, content in parts)} |"
    yield ""
    yield from footer(result, plan)


def footer(result, plan):
    seeds, data, host = ", ".join(map(str, plan.seeds)), result["data"], result["machine"]
    over = f"seeds {seeds}" if len(plan.seeds) > 1 else f"seed {seeds} alone, so that the spread is unknown"
    what = "Score" if plan.grid else "Change: score minus that of the reference with the same seed"
    yield f"- {what}, of the packed model, lower is better: mean (min .. max) over {over}."
    tokens = plan.steps * plan.settings[BASE].train_batch_tokens
    yield (f"- Equal steps: {plan.steps:,} steps, {tokens:,} tokens, of {data['name']} with {data['train_tokens']:,} "
           f"training tokens ({tokens / data['train_tokens']:.2f} epochs).")
    if "time" in plan.matches:
        yield (f"- Equal time: the steps that fit into the time of {plan.steps:,} steps of the "
               f"{'base' if plan.grid else 'reference'}. Time per step: {result['timing']}, with its standard "
               "error; within two of them from 1 the steps are equal. x 1 where the settings (rates, schedules, "
               "packing, scoring) cannot change the work of a step.")
    gpu = f"{host['gpu']}, " if host["gpu"] else ""
    yield (f"- Machine: {gpu}{host['cores']} cores of {host['cpu']}, torch {host['torch']}, {result['threads']} "
           f"thread(s) a run, {result['jobs']} run(s) at once; commit {result['commit']}.")
    yield "- These are small-scale results: they say nothing certain about 8xH100 at full size."
    yield f"- Command: `{result['command']}`"


# ---- main -----------------------------------------------------------------------------------------------------------


def natural(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def seed_list(text):
    seeds = [int(part) for part in text.split(",")]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError
    return seeds


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", metavar="PLAN | KEY=A,B", nargs="+", help="plan file, or the axes of a grid")
    parser.add_argument("--base", metavar="WORD", nargs="+", action="extend", default=[],
                        help="@FILE and KEY=VALUE: what all runs have in common")
    parser.add_argument("--seeds", type=seed_list, default=[1337, 42], metavar="A,B", help="default: 1337,42")
    parser.add_argument("--steps", type=natural, metavar="N", help="steps of a run (default: ITERATIONS of the base)")
    parser.add_argument("--match", choices=[*MATCHES, "both"], help="default: both for a plan, steps for a grid")
    parser.add_argument("--jobs", type=natural, default=1, metavar="J", help="runs at once; they share the cores, "
                        "unless OMP_NUM_THREADS says how many threads each has")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs (default: logs/sweep-PLAN)")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the table here, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    parser.add_argument("--bench-steps", type=natural, default=40, metavar="K",
                        help="pairs of steps of a measurement (40)")
    return parser.parse_intermixed_args(argv)


def sweep(plan, args, out, argv, trainer, bench):
    """Measure, run, compare; returns the result as one object."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // args.jobs))
    with locked(out) as lock, Processes({**os.environ, "OMP_NUM_THREADS": threads}, lock) as processes:
        stopwatch = Stopwatch(bench, out, args, plan, processes)
        speeds = measure_all(plan, stopwatch) if "time" in plan.matches else {}
        runs = Runs(plan, trainer, out)
        want_all(plan, runs, speeds)
        run_all(runs, trainer, args.jobs, processes)
    base = runs.row(BASE, "steps")
    return {"command": shlex.join(["python", "tools/sweep.py", *argv]), "steps": plan.steps, "seeds": plan.seeds,
            "matches": plan.matches, "jobs": args.jobs, "threads": threads, "machine": machine(plan.settings[BASE]),
            "commit": commit(), "code_sha256": runs.code, "data": plan.data[plan.settings[BASE].data_path],
            "timing": stopwatch.describe() if speeds else None,
            "base": {"words": plan.base_words, "settings": plan.settings[BASE].text(), "notes": notes(runs, BASE),
                     "bpb": spread(list(scores(base).values())),
                     "runs": [run.facts(trainer) for run in base.values()]},
            "rows": collect(plan, runs, speeds, trainer),
            "failed": sum(bool(one.error) for one in (*runs.by_key.values(), *speeds.values()))}


def main(argv, trainer=ROOT / "train_gpt.py", bench=ROOT / "tools/bench.py"):
    args = arguments(argv)
    try:
        plan = make_plan(args, os.environ)
        out = args.out or Path("logs") / f"sweep-{'grid' if plan.grid else Path(args.words[0]).stem}"
        result = sweep(plan, args, out, argv, trainer, bench)
        text = "\n".join(table(result, plan)) + "\n"
        for path, content in ((args.table, text), (args.json, json.dumps(result, indent=1) + "\n")):
            if path:
                write_atomic(path, [content.encode()])
        print(text, end="", flush=True)
    except BadInput as error:
        for line in str(error).splitlines():
            say(f"error: {line}")
        return 2
    except Interrupted as error:
        say("interrupted: the same command goes on from here")
        return 128 + error.args[0]
    except KeyboardInterrupt:  # before or after the runs
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
