"""The runs of a sweep: what each one's score depends on, where it lies, and which of them share a training or an
artifact.
"""

import contextlib
import hashlib
import json
import math
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from common import SHARD_HEADER_BYTES, sha256, trainer_errors, write_json
from sweeps.plan import BASE, FIELDS, files_of
from sweeps.work import NO_SCORE, Task, fail, read_json
from train_gpt import Settings, checkpoint_path

NOT_MADE = "it is not made yet"
SUMMARY_FACTS = ("val_bpb", "val_loss", "valid", "reasons", "params", "steps", "train_tokens", "model_bytes",
                 "total_bytes", "train_seconds", "export_seconds", "eval_seconds", "settings_hash", "device")
# Settings of the group Run that change what is computed; the others say where, how long and how often.
COMPUTING = ("SEED", "DEVICE", "DTYPE", "COMPILE", "ATTENTION", "KERNELS")
PLACES = ("DATA_PATH", "TOKENIZER_PATH")  # of text that its hash identifies
OF_THE_RUN = ("OUT_DIR", "RESUME", "PHASES", "ARTIFACT", "CHECKPOINT_EVERY", *PLACES)
STARTS = {  # what a run begins with: how that is said, and the arguments, with what the run before it made
    "train": ("train", ["RESUME=auto"]),
    "export": ("pack the weights of", ["RESUME={}"]),
    "eval": ("score the artifact of", ["PHASES=eval", "ARTIFACT={}"]),
}


# ---- the text of a run ----------------------------------------------------------------------------------------------


def digest(*values):
    """A short hash of values that JSON knows."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


class Texts:
    """Hashes of files by their content, kept in a file: gigabytes are read once, and again when a file has another size
    or time.
    """

    def __init__(self, store):
        self.store = store
        self.hashes = read_json(store)  # {"path, bytes, time": hash}
        self.found = {}  # {places: facts}, for this command

    def facts(self, settings):
        """Name, size and identity of the text of a run; BadInput if it is not there."""
        places = settings.data_path, settings.tokenizer_path, settings.vocab_size
        if places not in self.found:
            with trainer_errors():
                train, others = files_of(settings)
            self.found[places] = {
                "name": Path(settings.data_path).name,
                "train_tokens": sum(shard.stat().st_size - SHARD_HEADER_BYTES for shard in train) // 2,
                "sha256": digest(self._hashes(train), self._hashes(others)),
            }
        return self.found[places]

    def _hashes(self, paths):
        states = [f"{path.resolve()}, {path.stat().st_size}, {path.stat().st_mtime_ns}" for path in paths]
        new = {state: path for state, path in zip(states, paths) if state not in self.hashes}
        with ThreadPoolExecutor() as pool:
            self.hashes |= zip(new, pool.map(sha256, new.values()))
        if new:
            write_json(self.store, self.hashes)
        return [self.hashes[state] for state in states]


# ---- one run --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What is asked for, and what became of it. Runs are equal if all that their scores depend on is."""

    settings: Settings
    folder: Path
    label: str
    machine: tuple  # what its score depends on beside the settings: Runs.machine, and the hash of the text
    summary: dict = field(default_factory=dict)  # empty: it is not finished
    error: str = ""
    stopped: bool = False  # early, by --stop-worse
    reused: bool = False
    phase: str = "train"  # what it begins with, of STARTS
    source: "Run | None" = None  # whose weights or artifact it begins with
    keeps_weights: bool = False  # for others to be packed from

    def key(self, phase):
        """Equal for runs that have the same trained weights ("train") or the same artifact ("export")."""
        chosen = self.settings.experiment(phase)
        chosen |= {name: str(getattr(self.settings, FIELDS[name].name)) for name in COMPUTING}
        return digest({name: text for name, text in chosen.items() if name not in PLACES}, self.settings.iterations,
                      self.machine)

    def made_for(self, phase):
        """The file with which a run can begin a phase: the trained weights for "export", the artifact for "eval"."""
        return checkpoint_path(self.folder, self.settings.iterations) if phase == "export" else self.folder / "model.pg"

    def words(self):
        """The arguments of the trainer."""
        settings = self.settings
        if self.keeps_weights:
            settings = replace(settings, checkpoint_every=settings.iterations)
        made = self.source and self.source.made_for(self.phase)
        return [*shlex.split(settings.text()), f"OUT_DIR={self.folder}",
                *(word.format(made) for word in STARTS[self.phase][1])]

    def read(self):
        """Whether the folder holds the finished run that is meant here; sets its summary."""
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            summary = read_json(self.folder / "summary.json")
            has_settings = essential(summary["settings"]) == essential(self.settings.text())
            has_code = summary["code_sha256"] == self.machine[0]
            if has_settings and has_code and math.isfinite(summary["val_bpb"]):
                self.summary = summary
        return bool(self.summary)

    def fact(self, name):
        """A value of the summary; of what this run did not do itself, its source's."""
        value = self.summary.get(name)
        return self.source.fact(name) if value is None and self.summary and self.source else value

    @property
    def valid(self):
        return self.summary.get("valid") == "yes"

    @property
    def bpb(self):
        """The score, if it counts."""
        return self.summary["val_bpb"] if self.valid else None

    def note(self):
        """What the table has to say about it, or ""."""
        if not self.summary:
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
        self.ranks = ranks
        self.machine = (sha256(trainer), torch.__version__, device, ranks)
        self.texts = Texts(out / "texts.json")
        self.by_folder = {}
        self.by_row = {}  # (row name, match) -> {seed: run}

    def add(self, name, match, steps):
        """Ask for the runs of a row, one a seed."""
        for seed in self.plan.seeds:
            settings = replace(self.plan.settings[name], iterations=steps, seed=seed)
            machine = (*self.machine, self.texts.facts(settings)["sha256"])
            key = digest(sorted(essential(settings.text())), machine)
            folder = self.out / "runs" / f"{steps}-{seed}-{key}"
            run = Run(settings, folder, f"{name}, seed {seed}, {steps} steps", machine)
            self.row(name, match)[seed] = self.by_folder.setdefault(folder, run)

    def row(self, name, match):
        """{seed: run}; empty where equal time is unknown."""
        return self.by_row.setdefault((name, match), {})

    def ordered(self):
        """Seed by seed, so that the first seed's table comes first."""
        return sorted(self.by_folder.values(), key=lambda run: self.plan.seeds.index(run.settings.seed))

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
        share(share(self.ordered(), "export", "eval"), "train", "export")

    def tasks(self, stop_worse=None):
        """[Task] of the runs that are not finished."""
        return [self._task(run, stop_worse) for run in self.ordered() if not run.summary]

    def _task(self, run, stop_worse):
        source = run.source
        task = Task(run.label, run.folder, command(self.trainer, run.words(), self.ranks), "summary.json",
                    kind=run.phase, size=run.settings.iterations if run.phase == "train" else 1)
        if source:
            task.after = source.folder / "summary.json"
            task.needs = source.made_for(run.phase)
        base = self.row(BASE, "steps").get(run.settings.seed)
        if stop_worse and base and base is not run and run.phase == "train":
            task.curve_of = base.folder
            task.margin = stop_worse
        return task

    def settle(self):
        """Read what came of the runs."""
        for run in self.ordered():
            run.error = ""
            if not run.summary and not run.read():
                if (run.folder / "summary.json").exists():
                    fail(run.folder, NO_SCORE)
                failure = read_json(run.folder / "failed.json")
                run.error = failure.get("reason", NOT_MADE)
                run.stopped = bool(failure.get("stopped"))


def command(script, words, ranks):
    """The words that start a script of ours, in `ranks` processes of torchrun where there are several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(script), *words]


def share(runs, phase, following):
    """Of runs that are equal up to a phase, have one make what the others begin the following phase with. Returns those
    that make it: of finished ones the first that has it, else the first that is not finished.
    """
    groups = {}
    for run in runs:
        groups.setdefault(run.key(phase), []).append(run)
    makers = []
    for alike in groups.values():
        have_it = [run for run in alike if run.summary and run.made_for(following).exists()]
        unfinished = [run for run in alike if not run.summary]
        maker = (have_it or unfinished or alike)[0]
        maker.keeps_weights = phase == "train" and len(alike) > 1 and not maker.summary
        makers.append(maker)
        for run in alike:
            if run is not maker and "steps" not in run.summary:  # it did not train, and need not
                run.phase = following
                run.source = maker
    return makers
