"""The time of a step: what fits into the time of the reference's steps.

Steps of row and reference are taken in turn by tools/bench.py, in several processes (blocks): within one, pairs err
alike. The base against itself, measured in the same way, is the noise floor: no ratio is known better than that.
"""

import math
import shlex
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.ratios import differs, ratio_of_blocks
from common import ROOT, sha256
from sweeps.data import digest
from sweeps.plan import BASE
from sweeps.runs import command
from sweeps.work import Task, failure_of, read_json
from train_gpt import Settings

# What cannot change the work of a training step beside what is read after it: numbers that the same operations read.
# To measure them would only add noise, a percent or more on a shared machine.
SAME_WORK = set("""lr_warmup_steps warmdown_frac warmdown_iters warmdown_seconds min_lr seq_change_warmup_steps
    matrix_lr scalar_lr tied_embed_lr embed_lr head_lr muon_momentum muon_momentum_warmup_start
    muon_momentum_warmup_steps muon_beta2 muon_wd adam_wd embed_wd head_wd wd_taper_start_frac wd_taper_final_mult
    beta1 beta2 matrix_betas embed_betas head_betas adam_eps loader ema_decay leaky_slope qk_gain_init
    newton_schulz""".upper().split())
ITSELF = f"{BASE} again"


class Speed(NamedTuple):
    """Time per step of a row over that of its reference."""

    ratio: float | None  # None: it could not be measured
    how: str
    standard_error: float = 0.0
    is_clear: bool = False  # can it be told from 1?
    blocks: list | tuple = ()  # [[(reference ms, row ms), ...] of each process]
    error: str = ""


def same_work(settings, reference):
    """Do these make the same training steps? Where late QAT trains on codes, what is packed counts, too."""
    mine = settings.experiment("train")
    theirs = reference.experiment("train")
    moved = {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)}
    late_qat = settings.late_qat_threshold or reference.late_qat_threshold
    # With it, the warmdown decides how many steps are on rounded weights.
    schedules = {name for name in SAME_WORK if name.startswith("WARMDOWN")} if late_qat else set()
    return moved <= SAME_WORK - schedules


class Stopwatch:
    """The measurements that a plan needs, as tasks in OUT/times, and what came of them."""

    def __init__(self, bench, plan, out, device, ranks, blocks, pairs, threads):
        self.bench = bench
        self.plan = plan
        self.out = out
        self.ranks = ranks
        self.blocks = blocks
        self.pairs = pairs
        self.cuda = device != "cpu"
        code = (ROOT / "train_gpt.py", bench, *sorted(bench.parent.glob("benchmarks/*.py")))
        self.code = [sha256(path) for path in code if path.is_file()]
        self.machine = (device, ranks, torch.__version__, threads, pairs)
        self.measured = {row.name: row for row in plan.rows if not self._has_same_work(row)}

    def _has_same_work(self, row):
        return same_work(self.comparable(row.name), self.comparable(row.reference or BASE))

    def comparable(self, name):
        """Settings of a row. tools/bench.py brings data of its own: one measurement serves all data sets."""
        return replace(self.plan.settings[name], data_path=Settings.data_path, iterations=self.plan.steps,
                       seed=self.plan.seeds[0])

    def mode(self, settings):
        """As the trainer decides it."""
        if settings.compile == "auto":
            return "compiled" if self.cuda else "eager"
        return "compiled" if settings.compile == "on" else "eager"

    def describe(self):
        kind = "GPU time" if self.cuda else "CPU time"
        where = f"{self.ranks} ranks, " if self.ranks > 1 else ""
        return (f"`tools/bench.py train --against` ({where}{self.mode(self.plan.settings[BASE])}): steps of reference "
                f"and row in turn, {kind}, in {self.blocks} processes of {self.pairs} pairs each")

    def sides(self, name):
        """(reference, settings) of a measurement."""
        if name == ITSELF:
            return self.comparable(BASE), self.comparable(BASE)
        return self.comparable(self.measured[name].reference or BASE), self.comparable(name)

    def tasks(self, name):
        """A task for each process of a measurement. In every other one the sides change places."""
        reference, settings = self.sides(name)
        for block in range(self.blocks):
            against, words = (reference, settings) if block % 2 == 0 else (settings, reference)
            key = digest(reference.text(), settings.text(), self.code, self.machine, block)
            folder = self.out / "times" / key
            mode = self.mode(settings)
            bench = command(self.bench, [
                "train", *shlex.split(words.text()), "--against", *shlex.split(against.text()), "--modes", mode,
                "--steps", str(self.pairs), "--repeats", "1", "--json", str(folder / "bench.json")], self.ranks)
            yield Task(f"time of {name}, {block + 1} of {self.blocks}", folder, bench, "pairs.json", "bench.json",
                       kind="time")

    def all_tasks(self):
        names = [ITSELF, *self.measured] if self.measured else []
        return [task for name in names for task in self.tasks(name)]

    def read(self, name):
        """(blocks of a measurement, or the reason why there are none)."""
        found = []
        for block, task in enumerate(self.tasks(name)):
            if not task.is_done():
                return [], failure_of(task.folder).get("reason", "it was not measured")
            try:
                (row,) = read_json(task.folder / task.result)["rows"]
                pairs = [pair if block % 2 == 0 else pair[::-1] for blocks in row["blocks"] for pair in blocks]
            except (ValueError, KeyError, TypeError):
                return [], f"{self.bench.name} gave no pairs"
            if not pairs or not all(ms > 0 for pair in pairs for ms in pair):
                return [], f"{self.bench.name} gave pairs that are no times"
            found.append(pairs)
        return found, ""

    def speeds(self):
        """{row name: Speed}, with the noise floor as ITSELF where anything was measured."""
        floor = 0.0
        speeds = {}
        if self.measured:
            blocks, error = self.read(ITSELF)
            itself = speeds[ITSELF] = self.speed(blocks, error)
            if len(blocks) > 1:
                floor = itself.standard_error / itself.ratio * math.sqrt(len(blocks))
        for row in self.plan.rows:
            if row.name not in self.measured:
                speeds[row.name] = Speed(1.0, "same work, not measured")
                continue
            blocks, error = self.read(row.name)
            speeds[row.name] = self.speed(blocks, error, floor)
        return speeds

    def speed(self, blocks, error, floor=0.0):
        if not blocks:
            return Speed(None, "failed", error=error)
        found = ratio_of_blocks(blocks, floor)
        return Speed(found.ratio, "measured", found.error, differs(found), blocks)


def steps_in_equal_time(steps, speed):
    """Steps that fit into the time of the reference's: as many, where the ratio cannot be told from 1. A step more or
    less for a measuring error would change the schedule, and the score by more than most techniques do.
    """
    return max(1, round(steps / speed.ratio)) if speed.is_clear else steps
