"""Trains the same model under many settings and compares the scores.

    python tools/sweep.py PLAN --base @records/small.env COMPRESSOR=zlib --steps 300 --table ablations.md
    python tools/sweep.py 'MATRIX_LR=0.02,0.03' 'MUON_WD=0.04,0.09' --base @records/small.env --steps 300

A plan is a text file, one technique a line; each is compared with the base, or with another row:

    no SmearGate : SMEAR_GATE=none
    SWA : AVERAGE=swa                                   # a comment
    SWA, dense [vs SWA] : AVERAGE=swa SWA_EVERY=10      # the settings are relative to the base all the same

KEY=A,B words instead of a plan are a grid: all combinations, printed as absolute scores. Where a value is itself a
list, | divides: VE_LAYERS=2,3|3. Other KEY=VALUE words change the base. Settings in the environment are refused: the
command says all.

"Equal steps" gives every run ITERATIONS=N and no wall clock. "Equal time" gives a row the steps that fit into the time
in which its reference makes N, from the ratio of their steps that tools/bench.py takes in turn; the clock of a training
run on a shared machine would be noise. Runs live in DIR/runs and are never repeated while settings, seed, data
and code stay: after Ctrl-C, or with more rows, seeds or another --match, the same command makes only what is missing.

A run is one process. On a machine with GPUs every run is on the first of them: CUDA_VISIBLE_DEVICES chooses another.

Exit codes: 0 done, 1 a run or a measurement failed (the table says which), 2 bad input, 130 and 143 interrupted.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for train_gpt.py
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

import torch

from children import Interrupted, Processes, locked, why
from common import (
    ROOT,
    SHARD_HEADER_BYTES,
    BadInput,
    git,
    print_errors,
    quartiles,
    sha256,
    stop_printing,
    trainer_errors,
)
from train_gpt import LISTS, Settings, find_shards, write_atomic

BASE = "base"
FIELDS = {field.name.upper(): field for field in fields(Settings)}


class Owned(NamedTuple):
    """A setting that a sweep decides itself."""

    value: str  # in place of a file's, while settings are checked
    option: str = ""  # of the sweep that decides it


OWNED = {
    "SEED": Owned("0", "--seeds"),
    "ITERATIONS": Owned("1", "--steps"),
    "MAX_WALLCLOCK_SECONDS": Owned("0", "--steps"),
    "OUT_DIR": Owned("", "--out"),
    "RUN_ID": Owned("", "--out"),
    "PHASES": Owned("all"),
    "ARTIFACT": Owned(""),
    "RESUME": Owned(""),
}
# What cannot change the work of a training step: numbers that the same operations read, and what is read later. To
# measure them would only add noise, a percent or more on a shared machine.
SAME_WORK = set("""lr_warmup_steps warmdown_frac warmdown_iters warmdown_seconds min_lr seq_change_warmup_steps
    matrix_lr scalar_lr tied_embed_lr embed_lr head_lr muon_momentum muon_momentum_warmup_start
    muon_momentum_warmup_steps muon_beta2 muon_wd adam_wd embed_wd head_wd wd_taper_start_frac wd_taper_final_mult
    beta1 beta2 matrix_betas embed_betas head_betas adam_eps loader ema_decay leaky_slope qk_gain_init
    newton_schulz""".split())
READ_LATER = ("Quantisation and packing", "Evaluation")  # rooms of settings
SAME_WORK |= {field.name for field in FIELDS.values() if field.metadata["group"] in READ_LATER}
MATCHES = {"steps": "equal steps", "time": "equal time"}


# ---- the plan -------------------------------------------------------------------------------------------------------


class PlanRow(NamedTuple):
    """One technique of a plan or one point of a grid. A point has no reference: its score is shown as it is."""

    name: str
    changes: tuple[str, ...]
    reference: str | None = BASE
    where: str = ""  # FILE:LINE


def read_plan(path):
    """(rows, complaints) of a plan file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})"]
    rows = []
    complaints = []
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
        if colon and name and changes:
            rows.append(PlanRow(name, tuple(changes), reference or BASE, where))
        else:
            complaints.append(f"{where}: {line!r} is not 'name : KEY=VALUE ...'")
    return rows, [*complaints, *_wrong_names(rows, path)]


def _wrong_names(rows, path):
    """Complaints about the names of rows and of their references."""
    names = {BASE}
    if not rows:
        yield f"{path}: holds no row"
    for row in rows:
        if row.name in names:
            yield f"{row.where}: the name {row.name!r} is taken"
        names.add(row.name)
    for row in rows:
        if row.reference not in names:
            yield f"{row.where}: there is no row {row.reference!r} to compare with"


def read_grid(words):
    """(rows, words for the base, complaints): all combinations of KEY=A,B words; one value is for the base."""
    axes = {}  # setting -> its words
    base_words = []
    complaints = []
    for word in words:
        axis = alternatives(word)
        name = setting_of(word)
        if len(axis) < 2:
            base_words.append(word)
        elif name in axes:
            complaints.append(f"grid: {name} is given twice")
        else:
            axes[name] = axis
    if not axes:
        return [], base_words, [*complaints, "grid: no word has two values, such as MATRIX_LR=0.02,0.03"]
    rows = [PlanRow(" ".join(point), point, None, "grid") for point in itertools.product(*axes.values())]
    return rows, base_words, complaints


def setting_of(word):
    """KEY of KEY=VALUE."""
    return word.partition("=")[0]


def alternatives(word):
    """KEY=A,B as [KEY=A, KEY=B]. The value of a list setting has commas of its own: there | divides."""
    name, equals, text = word.partition("=")
    if word.startswith("@") or not equals:
        return [word]
    is_list = name in FIELDS and FIELDS[name].type in LISTS
    values = dict.fromkeys(text.split("|" if is_list else ","))
    return [f"{name}={value}" for value in values]


def parse_settings(words, **owned):
    """(settings of a run, complaints): what the sweep decides has a value that fits, whatever a file says. `owned` has
    other such values; None leaves a setting to the words.
    """
    owned = {name: setting.value for name, setting in OWNED.items()} | owned
    words = [word for word in words if setting_of(word) not in OWNED]
    words += [f"{name}={value}" for name, value in owned.items() if value is not None]
    try:
        with trainer_errors():
            settings = Settings.parse(words)
    except BadInput as error:
        return None, [line.removeprefix("argument: ") for line in str(error).splitlines()]
    return settings, []


def refused(words):
    """Complaints about settings that a sweep decides itself, and about those that are given twice."""
    names = [setting_of(word) for word in words]
    for name in dict.fromkeys(names):
        if name in OWNED and OWNED[name].option:
            yield f"{name} is decided by the sweep: use {OWNED[name].option}"
        elif name in OWNED:
            yield f"{name} is decided by the sweep"
        elif names.count(name) > 1 and not name.startswith("@"):
            yield f"{name} is set twice"


def resolve(base_words, rows):
    """({row name: settings}, complaints). Complaints about the base are not repeated for every row."""
    base_settings, wrong_in_base = parse_settings(base_words)
    settings = {BASE: base_settings}
    complaints = [f"{BASE}: {text}" for text in (*refused(base_words), *wrong_in_base)]
    for row in rows:
        settings[row.name], wrong = parse_settings([*base_words, *row.changes])
        wrong_in_row = [text for text in wrong if text not in wrong_in_base]
        complaints += [f"{row.where}: {text}" for text in (*refused(row.changes), *wrong_in_row)]
    for row in rows:
        row_settings = settings[row.name]
        if row_settings and row_settings == settings.get(row.reference):
            complaints.append(f"{row.where}: has the settings of {row.reference!r}, with which it is compared")
    return settings, complaints


def refused_environment(env):
    """The trainer would read these; a command that is to be repeated cannot depend on them."""
    for name in sorted(FIELDS.keys() & env.keys()):
        yield f"environment: {name} is set; unset it, and give {name}=... after --base if it is wanted"
    try:
        with trainer_errors():
            Settings.parse((), {name: value for name, value in env.items() if name not in FIELDS})
    except BadInput as error:
        yield from str(error).splitlines()


def data_facts(path):
    """Name, size and identity of a data set; BadInput if it is not there."""
    with trainer_errors():
        train = find_shards(path, "train")
        val = find_shards(path, "val")
    identity = [(shard.name, shard.stat().st_size) for shard in (*train, *val)]
    with contextlib.suppress(FileNotFoundError):
        identity.append((Path(path) / "manifest.json").read_text(encoding="utf-8"))
    return {
        "name": Path(path).name,
        "train_tokens": sum(shard.stat().st_size - SHARD_HEADER_BYTES for shard in train) // 2,
        "sha256": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
    }


class Plan(NamedTuple):
    """Everything that is decided before the first run."""

    rows: list[PlanRow]
    settings: dict[str, Settings]  # of each row and of the base
    data: dict[str, dict]  # of each DATA_PATH
    base_words: list[str]
    grid: bool
    steps: int
    seeds: list[int]
    matches: list[str]

    def names(self):
        """The base, where its score is shown, and the rows: what is run."""
        names = [row.name for row in self.rows]
        return names if self.grid else [BASE, *names]

    def pace(self, row):
        """Whose time per step the row's is compared with."""
        return row.reference or BASE


def make_plan(args, env):
    """The plan, or BadInput with all complaints at once."""
    first, *words = args.words
    grid = not Path(first).is_file() and "=" in first
    if grid:
        rows, words, complaints = read_grid(args.words)
    else:
        rows, complaints = read_plan(Path(first))
    base_words = [*args.base, *words]
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
    return Plan(rows, settings, data, base_words, grid, steps, args.seeds, matches_of(args.match, grid))


def matches_of(match, grid):
    """What is compared: --match, which is both for a plan and steps for a grid where it is not given."""
    if match in MATCHES:
        return [match]
    if grid and match is None:
        return ["steps"]
    return list(MATCHES)


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
        self.bench = bench
        self.out = out
        self.args = args
        self.plan = plan
        self.processes = processes
        self.cuda = uses_cuda(plan.settings[BASE])
        bench_code = sha256(bench) if bench.is_file() else ""
        self.code = [bench_code, sha256(ROOT / "train_gpt.py")]

    def mode(self, settings):
        """As the trainer decides it."""
        if settings.compile == "auto":
            return "compiled" if self.cuda else "eager"
        return "compiled" if settings.compile == "on" else "eager"

    def describe(self):
        kind = "GPU time" if self.cuda else "CPU time"
        return (f"`tools/bench.py train --against` ({self.mode(self.plan.settings[BASE])}): steps of reference and row "
                f"in turn, median ratio of {self.args.bench_steps} pairs of {kind}")

    def measure(self, row):
        """The row's Speed."""
        reference = self.comparable(self.plan.pace(row))
        settings = self.comparable(row.name)
        if changed(reference, settings) <= SAME_WORK:
            return Speed(1.0, "same work, not measured")
        key = digest(reference.text(), settings.text(), self.code, self.cuda, self.args.bench_steps,
                     torch.__version__, self.processes.env["OMP_NUM_THREADS"])
        store = self.out / "times" / f"{key}.json"
        error = "" if store.exists() else self._measure_pairs(reference, settings, store)
        if error:
            return Speed(None, "failed", error=error)
        pairs = json.loads(store.read_text(encoding="utf-8"))
        return Speed(statistics.median(ms / reference_ms for reference_ms, ms in pairs), "measured", pairs)

    def comparable(self, name):
        """Settings of a row. tools/bench.py brings data of its own: one measurement serves all data sets."""
        return replace(self.plan.settings[name], data_path=Settings.data_path, iterations=self.plan.steps,
                       seed=self.plan.seeds[0])

    def _measure_pairs(self, reference, settings, store):
        """Write the pairs to `store`, or say why there are none."""
        answer = store.with_suffix(".bench.json")
        output = store.with_suffix(".txt")
        mode = self.mode(settings)
        answer.unlink(missing_ok=True)
        words = [sys.executable, str(self.bench), "train", *shlex.split(settings.text()), "--against",
                 *shlex.split(reference.text()), "--modes", mode, "--steps", str(self.args.bench_steps), "--json",
                 str(answer)]
        _, code, _ = next(self.processes.run([(words, output)]))
        if code:
            return why(code, output)
        try:
            (row,) = json.loads(answer.read_text(encoding="utf-8"))["rows"]
            pairs = [(float(reference_ms), float(ms)) for reference_ms, ms in row["pairs"]]
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self.bench.name} gave no pairs of mode {mode}"
        if not pairs or not all(0 < ms < math.inf for pair in pairs for ms in pair):
            return f"{self.bench.name} gave pairs that are no times"
        write_atomic(store, [json.dumps(pairs).encode()])
        return ""


def changed(settings, reference):
    """Names of the settings that differ."""
    names = [field.name for field in fields(Settings)]
    return {name for name in names if getattr(settings, name) != getattr(reference, name)}


def ratio_error(pairs):
    """Standard error of the median of the ratios, from their quartiles as if they were normal: 1.253 sigma / root n."""
    low, _, high = quartiles([ms / reference_ms for reference_ms, ms in pairs])
    return 1.253 * (high - low) / 1.349 / len(pairs) ** 0.5


def steps_in_equal_time(steps, speed):
    """Steps that fit into the time of the reference's: as many, where the ratio cannot be told from 1. A step more or
    less for a measuring error would change the schedule, and the score by more than most techniques do.
    """
    is_within_error = speed.pairs and abs(speed.ratio - 1) < 2 * ratio_error(speed.pairs)
    return steps if is_within_error else max(1, round(steps / speed.ratio))


def measure_all(plan, stopwatch):
    """{row name: Speed}, in the order of the plan."""
    speeds = {}
    for number, row in enumerate(plan.rows, 1):
        speed = stopwatch.measure(row)
        speeds[row.name] = speed
        result = speed.error or f"{speed.ratio:.3f} times the step of {plan.pace(row)} ({speed.how})"
        say(f"[time {number}/{len(plan.rows)}] {row.name}: {result}")
    return speeds


# ---- runs -----------------------------------------------------------------------------------------------------------


TOO_LARGE = 3  # exit code of a run that was scored, but whose artifact is over SIZE_LIMIT
SUMMARY_FACTS = ("val_bpb", "val_loss", "valid", "reasons", "params", "steps", "train_tokens", "model_bytes",
                 "total_bytes", "train_seconds", "export_seconds", "eval_seconds", "settings_hash")


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
            summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
            words = {word for word in shlex.split(summary["settings"]) if not word.startswith(("OUT_DIR=", "RESUME="))}
            has_settings = words == set(shlex.split(self.settings.text()))
            has_code = summary["code_sha256"] == self.code_sha256
            if has_settings and has_code and math.isfinite(summary["val_bpb"]):
                self.summary = summary
        return self.summary is not None

    @property
    def valid(self):
        return self.summary is not None and self.summary.get("valid") == "yes"

    @property
    def bpb(self):
        """The score, if it counts."""
        return self.summary["val_bpb"] if self.valid else None

    def note(self):
        """What the table has to say about it, or ""."""
        if self.summary is None:
            return f"failed: {self.error}"
        if self.valid:
            total = self.summary.get("total_bytes") or 0
            limit = self.settings.size_limit
            return f"over the limit: {total:,} bytes of {limit:,}, scored all the same" if total > limit else ""
        reasons = "; ".join(map(str, self.summary.get("reasons") or ())) or "no reason given"
        return f"INVALID, {self.summary['val_bpb']:.4f} is not counted: {reasons}"

    def facts(self, trainer):
        summary = self.summary or {}
        return {
            "seed": self.settings.seed,
            "command": shlex.join(self.command(trainer)),
            "out_dir": str(self.folder),
            "reused": self.reused,
            "error": self.error,
            **{key: summary.get(key) for key in SUMMARY_FACTS},
        }


class Runs:
    """The runs of a sweep by what they are: rows that ask for the same run share it."""

    def __init__(self, plan, trainer, out):
        self.plan = plan
        self.out = out
        self.code = sha256(trainer)
        self.by_key = {}
        self.by_row = {}  # (row name, match, seed) -> run

    def add(self, name, match, steps):
        """Ask for the runs of a row, one a seed."""
        for seed in self.plan.seeds:
            settings = replace(self.plan.settings[name], iterations=steps, seed=seed)
            key = digest(settings.text(), self.code, self.plan.data[settings.data_path]["sha256"], torch.__version__)
            folder = self.out / "runs" / f"{steps}-{seed}-{key}"
            run = self.by_key.setdefault(key, Run(settings, folder, self.code, f"{name}, seed {seed}, {steps} steps"))
            self.by_row[name, match, seed] = run

    def row(self, name, match):
        """{seed: run}; empty where equal time is unknown."""
        runs = {seed: self.by_row.get((name, match, seed)) for seed in self.plan.seeds}
        return {seed: run for seed, run in runs.items() if run is not None}


def add_all(plan, runs, speeds):
    """Ask for every run that the table needs. A reference always makes N steps, whatever is compared with it."""
    references = {BASE, *(row.reference for row in plan.rows)}
    for name in plan.names():
        if "steps" in plan.matches or name in references:
            runs.add(name, "steps", plan.steps)
    if "time" not in plan.matches:
        return
    for row in plan.rows:
        speed = speeds[row.name]
        if speed.ratio is not None:
            runs.add(row.name, "time", steps_in_equal_time(plan.steps, speed))


def run_all(runs, trainer, jobs, processes):
    """Every run that is not finished yet, seed by seed, so that the first seed's table comes first."""
    by_seed = sorted(runs.by_key.values(), key=lambda run: runs.plan.seeds.index(run.settings.seed))
    for run in by_seed:
        run.reused = run.read()
    todo = [run for run in by_seed if not run.reused]
    if len(todo) < len(by_seed):
        say(f"{len(by_seed) - len(todo)} of {len(by_seed)} runs are finished already")
    commands = [(run.command(trainer), run.folder / "console.txt") for run in todo]
    total_steps = sum(run.settings.iterations for run in todo)
    steps = 0
    spent = 0.0  # seconds
    for number, (index, code, seconds) in enumerate(processes.run(commands, jobs), 1):
        run = todo[index]
        scored = code in (0, TOO_LARGE) and run.read()
        if code and not scored:
            run.error = why(code, commands[index][1])
        elif not scored:
            run.error = "it ended without a score of these settings and this code"
        steps += run.settings.iterations
        spent += seconds
        eta = (total_steps - steps) * spent / steps / jobs
        score = f"{run.bpb:.4f} BPB" if run.valid else ""
        result = "; ".join(filter(None, (score, run.note())))
        say(f"[run {number}/{len(todo)}] {run.label}: {result}, {seconds:.0f} s; ETA {duration(eta)}")


def duration(seconds):
    """Seconds in words."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


# ---- statistics -----------------------------------------------------------------------------------------------------


def sample_statistics(values):
    """Mean, extremes and standard deviation of a sample; None of an empty one."""
    if not values:
        return None
    return {
        "mean": statistics.fmean(values),
        "min": min(values),
        "max": max(values),
        "count": len(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def scores(runs):
    """{seed: score} of the runs whose score counts."""
    return {seed: run.bpb for seed, run in runs.items() if run.bpb is not None}


def paired(scores_of_row, reference):
    """{seed: difference} over the seeds that both have: what the seed itself does to a score cancels out."""
    return {seed: score - reference[seed] for seed, score in scores_of_row.items() if seed in reference}


def compare(plan, runs, row, match):
    """What one row came to at equal steps or equal time."""
    row_runs = runs.row(row.name, match)
    row_scores = scores(row_runs)
    result = {
        "iterations": next((run.settings.iterations for run in row_runs.values()), None),
        "bpb": sample_statistics(list(row_scores.values())),
    }
    if row.reference:
        result["changes"] = paired(row_scores, scores(runs.row(row.reference, "steps")))
        result["change"] = sample_statistics(list(result["changes"].values()))
    return result


def notes(runs, name):
    """Failed and invalid runs of a row, the same thing said once for all its seeds."""
    seeds_of = {}  # (match, note) -> seeds
    for (row_name, match, seed), run in runs.by_row.items():
        if row_name == name and run.note():
            seeds_of.setdefault((match, run.note()), []).append(seed)
    lines = []
    for (match, note), seeds in seeds_of.items():
        lines.append(f"{MATCHES[match]}, seed {', '.join(map(str, seeds))}: {note}")
    return lines


def collect(plan, runs, speeds, trainer):
    """The rows of the result, the largest improvement first, those without a score last."""
    rows = []
    for row in plan.rows:
        results = {match: compare(plan, runs, row, match) for match in plan.matches}
        speed = speeds.get(row.name)
        remarks = notes(runs, row.name)
        if speed and speed.error:
            remarks.append(f"equal time: the time per step is unknown: {speed.error}")
        rows.append({
            "name": row.name,
            "changes": list(row.changes),
            "reference": row.reference,
            "settings": plan.settings[row.name].text(),
            "speed": speed._asdict() if speed else None,
            **results,
            "runs": {match: run_facts(runs.row(row.name, match), trainer) for match in MATCHES},
            "notes": remarks,
        })
    return sorted(rows, key=lambda row: effect(row, plan))


def run_facts(runs, trainer):
    return [run.facts(trainer) for run in runs.values()]


def effect(row, plan):
    """The number by which rows are sorted."""
    statistics_of_row = row[plan.matches[0]]["bpb" if plan.grid else "change"]
    return statistics_of_row["mean"] if statistics_of_row else math.inf


# ---- the machine ----------------------------------------------------------------------------------------------------


def uses_cuda(settings):
    return settings.device != "cpu" and torch.cuda.is_available()


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model():
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return " ".join(match[1].split())
    return platform.processor() or platform.machine()


def commit():
    revision = git("rev-parse", "--short=12", "HEAD") or "none"
    is_changed = git("diff", "HEAD", "--stat", "--", "train_gpt.py")
    return f"{revision} with changes of train_gpt.py" if is_changed else revision


def machine(settings):
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if uses_cuda(settings) else None,
        "system": platform.platform(),
    }


# ---- the table ------------------------------------------------------------------------------------------------------


def cell(text):
    return str(text).replace("|", "\\|")


def span(sample, seeds, sign=""):
    """mean (min .. max) of sample_statistics(), and the number of seeds where it is not all of them."""
    if sample is None:
        return "-"
    text = f"{sample['mean']:{sign}.4f}"
    if sample["count"] > 1:
        text += f" ({sample['min']:{sign}.4f} .. {sample['max']:{sign}.4f})"
    if sample["count"] < len(seeds):
        text += f", {sample['count']} of {len(seeds)} seeds"
    return text


def size(row, base_runs, plan):
    """Bytes of the packed model, in a plan as the change relative to the base at equal steps."""
    def mean(runs):
        sizes = [run["model_bytes"] for run in runs if run["model_bytes"]]
        return statistics.fmean(sizes) if sizes else None

    row_size = mean(row["runs"][plan.matches[0]])
    if row_size is None:
        return "-"
    if plan.grid:
        return f"{row_size:,.0f}"
    base_size = mean(base_runs)
    return "-" if base_size is None else f"{row_size / base_size - 1:+.1%}"


def columns(plan, base_runs):
    """(heading, cell of a row) of each column."""
    if plan.grid:
        key = "bpb"
        sign = ""
        what = "BPB"
        for axis, change in enumerate(plan.rows[0].changes):
            yield setting_of(change), lambda row, axis=axis: row["changes"][axis].partition("=")[2]
    else:
        key = "change"
        sign = "+"
        what = "BPB change"
        yield "technique", technique
        yield "settings", lambda row: f"`{' '.join(row['changes'])}`"
    if "steps" in plan.matches:
        yield f"{what} at equal steps", lambda row: span(row["steps"][key], plan.seeds, sign)
    if "time" in plan.matches:
        yield "time per step", lambda row: pace(row["speed"])
        yield "steps in equal time", lambda row: row["time"]["iterations"] or "-"
        yield f"{what} at equal time", lambda row: span(row["time"][key], plan.seeds, sign)
    yield "model bytes", lambda row: size(row, base_runs, plan)


def technique(row):
    return row["name"] if row["reference"] == BASE else f"{row['name']} [vs {row['reference']}]"


def pace(speed):
    if speed["ratio"] is None:
        return "-"
    if not speed["pairs"]:
        return "x 1"
    return f"x {speed['ratio']:.3f} ± {ratio_error(speed['pairs']):.3f}"


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
    data = result["data"]
    host = result["machine"]
    over = f"seed {plan.seeds[0]} alone, so that the spread is unknown"
    if len(plan.seeds) > 1:
        over = f"seeds {', '.join(map(str, plan.seeds))}"
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
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs (default: logs/sweep-PLAN, "
                        "and logs/sweep-grid for every grid)")
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
        add_all(plan, runs, speeds)
        run_all(runs, trainer, args.jobs, processes)
    base = runs.row(BASE, "steps")
    errors = [run.error for run in runs.by_key.values()] + [speed.error for speed in speeds.values()]
    return {
        "command": shlex.join(["python", "tools/sweep.py", *argv]),
        "steps": plan.steps,
        "seeds": plan.seeds,
        "matches": plan.matches,
        "jobs": args.jobs,
        "threads": threads,
        "machine": machine(plan.settings[BASE]),
        "commit": commit(),
        "code_sha256": runs.code,
        "data": plan.data[plan.settings[BASE].data_path],
        "timing": stopwatch.describe() if speeds else None,
        "base": {
            "words": plan.base_words,
            "settings": plan.settings[BASE].text(),
            "notes": notes(runs, BASE),
            "bpb": sample_statistics(list(scores(base).values())),
            "runs": run_facts(base, trainer),
        },
        "rows": collect(plan, runs, speeds, trainer),
        "failed": sum(bool(error) for error in errors),
    }


def main(argv, trainer=ROOT / "train_gpt.py", bench=ROOT / "tools/bench.py"):
    args = arguments(argv)
    try:
        plan = make_plan(args, os.environ)
        out = args.out or Path("logs") / f"sweep-{'grid' if plan.grid else Path(args.words[0]).stem}"
        result = sweep(plan, args, out, argv, trainer, bench)
        text = "\n".join(table(result, plan)) + "\n"
        if args.table:
            write_atomic(args.table, [text.encode()])
        if args.json:
            write_atomic(args.json, [f"{json.dumps(result, indent=1)}\n".encode()])
        print(text, end="", flush=True)
    except BadInput as error:
        print_errors(error)
        return 2
    except Interrupted as error:
        say("interrupted: the same command goes on from here")
        return 128 + error.args[0]
    except KeyboardInterrupt:  # before or after the runs
        return 130
    except BrokenPipeError:
        stop_printing()
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
