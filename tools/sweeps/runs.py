"""The runs of a sweep: what each one's score depends on, where it lies, and which of them share a training or an
artifact.
"""

import contextlib
import math
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common import sha256
from sweeps.data import Texts, digest
from sweeps.plan import BASE, FIELDS
from sweeps.work import NO_SCORE, Task, fail, failure_of, read_json
from train_gpt import Settings, checkpoint_path

NOT_MADE = "it is not made yet"
TOO_LARGE = 3  # exit code of a run that was scored, but whose artifact is over SIZE_LIMIT
SUMMARY_FACTS = ("val_bpb", "val_loss", "valid", "reasons", "params", "steps", "train_tokens", "model_bytes",
                 "total_bytes", "train_seconds", "export_seconds", "eval_seconds", "settings_hash", "device")
# Settings of the group Run that change what is computed; the others say where, how long and how often.
COMPUTING = ("SEED", "DEVICE", "DTYPE", "COMPILE", "ATTENTION", "KERNELS")
PLACES = ("DATA_PATH", "TOKENIZER_PATH")  # of text that its hash identifies
OF_THE_RUN = ("OUT_DIR", "RESUME", "PHASES", "ARTIFACT", "CHECKPOINT_EVERY", *PLACES)


# ---- one run --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What is asked for, and what became of it. Runs are equal if all that their scores depend on is."""

    settings: Settings
    folder: Path
    code_sha256: str
    label: str
    machine: tuple  # what the score depends on beside settings and text: torch, device, GPUs, code, text
    summary: dict | None = None
    error: str = ""
    stopped: bool = False  # early, by --stop-worse
    reused: bool = False
    phase: str = "train"  # what it begins with: train, export or eval
    source: "Run | None" = None  # whose weights or artifact it begins with
    keeps_weights: bool = False  # for others to be packed from

    def key(self, phase):
        """Equal for runs that have the same trained weights ("train") or the same artifact ("export")."""
        chosen = self.settings.experiment(phase)
        chosen |= {name: str(getattr(self.settings, FIELDS[name].name)) for name in COMPUTING}
        return digest({name: text for name, text in chosen.items() if name not in PLACES}, self.settings.iterations,
                      self.machine)

    @property
    def checkpoint(self):
        return checkpoint_path(self.folder, self.settings.iterations)

    @property
    def artifact(self):
        return self.folder / "model.pg"

    def words(self):
        """The arguments of the trainer."""
        words = [*shlex.split(self.settings.text()), f"OUT_DIR={self.folder}"]
        if self.phase == "export":
            return [*words, f"RESUME={self.source.checkpoint}"]
        if self.phase == "eval":
            return [*words, "PHASES=eval", f"ARTIFACT={self.source.artifact}"]
        if self.keeps_weights:
            words = [word for word in words if not word.startswith("CHECKPOINT_EVERY=")]
            words.append(f"CHECKPOINT_EVERY={self.settings.iterations}")
        return [*words, "RESUME=auto"]

    def read(self):
        """Whether the folder holds the finished run that is meant here; sets its summary."""
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            summary = read_json(self.folder / "summary.json")
            has_settings = essential(summary["settings"]) == essential(self.settings.text())
            has_code = summary["code_sha256"] == self.code_sha256
            if has_settings and has_code and math.isfinite(summary["val_bpb"]):
                self.summary = summary
        return self.summary is not None

    def fact(self, name):
        """A value of the summary; of what this run did not do itself, its source's."""
        if self.summary is None:
            return None
        if self.summary.get(name) is None and self.source is not None:
            return self.source.fact(name)
        return self.summary.get(name)

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
            return self.error if self.stopped else f"failed: {self.error}"
        if self.valid:
            total = self.fact("total_bytes") or 0
            limit = self.settings.size_limit
            return f"over the limit: {total:,} bytes of {limit:,}, scored all the same" if total > limit else ""
        reasons = "; ".join(map(str, self.summary.get("reasons") or ())) or "no reason given"
        return f"INVALID, {self.summary['val_bpb']:.4f} is not counted: {reasons}"

    def facts(self):
        return {
            "seed": self.settings.seed,
            "command": shlex.join(["python", "train_gpt.py", *self.words()]),
            "begins_with": self.phase,
            "out_dir": str(self.folder),
            "reused": self.reused,
            "error": self.error,
            **{name: self.fact(name) for name in SUMMARY_FACTS},
        }


def essential(text):
    """The words of a line of settings that say what is computed."""
    return {word for word in shlex.split(text) if word.partition("=")[0] not in OF_THE_RUN}


# ---- all of them ----------------------------------------------------------------------------------------------------


class Runs:
    """The runs of a sweep by what they are: rows that ask for the same run share it."""

    def __init__(self, plan, trainer, out, device, ranks):
        self.plan = plan
        self.trainer = trainer
        self.out = out
        self.code = sha256(trainer)
        self.machine = (self.code, torch.__version__, device, ranks)
        self.ranks = ranks
        self.texts = Texts(out / "texts.json")
        self.by_key = {}
        self.by_row = {}  # (row name, match, seed) -> run

    def add(self, name, match, steps):
        """Ask for the runs of a row, one a seed."""
        for seed in self.plan.seeds:
            settings = replace(self.plan.settings[name], iterations=steps, seed=seed)
            machine = (*self.machine, self.texts.facts(settings)["sha256"])
            run = Run(settings, Path(), self.code, f"{name}, seed {seed}, {steps} steps", machine)
            key = digest(sorted(essential(settings.text())), machine)
            run.folder = self.out / "runs" / f"{steps}-{seed}-{key}"
            self.by_row[name, match, seed] = self.by_key.setdefault(key, run)

    def row(self, name, match):
        """{seed: run}; empty where equal time is unknown."""
        runs = {seed: self.by_row.get((name, match, seed)) for seed in self.plan.seeds}
        return {seed: run for seed, run in runs.items() if run is not None}

    def reference_of(self, run):
        """The base's run of the same seed, or None."""
        base = self.by_row.get((BASE, "steps", run.settings.seed))
        return None if base is run else base

    def ordered(self):
        """Seed by seed, so that the first seed's table comes first."""
        return sorted(self.by_key.values(), key=lambda run: self.plan.seeds.index(run.settings.seed))

    def look(self):
        """Read what is finished, and decide what each of the others begins with: a training of its own, the trained
        weights of another run, or another run's artifact.
        """
        for run in self.ordered():
            summary = run.folder / "summary.json"
            was_there = summary.exists()  # another command may finish it just now
            run.reused = run.read()
            if was_there and not run.reused:
                summary.unlink(missing_ok=True)  # it is damaged
        for alike in groups(self.ordered(), "train"):
            share_training(alike)

    def tasks(self, stop_worse=None):
        """[Task] of the runs that are not finished."""
        unfinished = [run for run in self.ordered() if run.summary is None]
        tasks = []
        for run in unfinished:
            task = Task(
                run.label, run.folder, command(self.trainer, run.words(), self.ranks), "summary.json",
                after=[run.source.folder / "summary.json"] if run.source and run.source.summary is None else [],
                kind=run.phase, size=run.settings.iterations if run.phase == "train" else 1, done_with=(0, TOO_LARGE))
            reference = self.reference_of(run)
            if stop_worse is not None and reference and run.phase == "train":
                task.curve_of = reference.folder
                task.margin = stop_worse
            tasks.append(task)
        return tasks

    def settle(self):
        """Read what came of the runs."""
        for run in self.ordered():
            run.error = ""
            if run.summary is None and not run.read():
                if (run.folder / "summary.json").exists():
                    fail(run.folder, NO_SCORE)
                failure = failure_of(run.folder)
                run.error = failure.get("reason", NOT_MADE)
                run.stopped = bool(failure.get("stopped"))


def command(script, words, ranks):
    """The words that start a script of ours, in `ranks` processes of torchrun where there are several."""
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        return [sys.executable, *launcher, str(script), *words]
    return [sys.executable, str(script), *words]


def groups(runs, phase):
    """Lists of runs that are equal up to this phase."""
    found = {}
    for run in runs:
        found.setdefault(run.key(phase), []).append(run)
    return found.values()


def share_training(alike):
    """Of runs with the same training one trains, the first of each other way of packing begins with its weights, and
    the rest with artifacts.
    """
    packed_alike = list(groups(alike, "export"))
    leaders = [leader_of(same) for same in packed_alike]
    trainer = next((run for run in leaders if run.summary and run.checkpoint.exists()), None)
    for same, leader in zip(packed_alike, leaders):
        for run in same:
            was_scored_alone = run.summary is None or "steps" not in run.summary
            if run is not leader and was_scored_alone:
                run.phase = "eval"
                run.source = leader
        if leader.summary is not None:
            continue
        if trainer is None:  # it trains, and keeps its weights for those after it
            trainer = leader
            leader.keeps_weights = len(leaders) > 1
        else:
            leader.phase = "export"
            leader.source = trainer


def leader_of(same):
    """The run that makes the artifact of these: a finished one that has it, else the first that is not finished."""
    finished = [run for run in same if run.summary is not None and run.artifact.exists()]
    unfinished = [run for run in same if run.summary is None]
    return (finished or unfinished or same)[0]
