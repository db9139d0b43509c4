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
from sweeps.plan import BASE
from sweeps.runs import command, digest
from sweeps.work import Task, read_json
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


def mode_of(settings, place):
    """As the trainer decides it."""
    is_compiled = settings.compile == "on" or (settings.compile == "auto" and place.device != "cpu")
    return "compiled" if is_compiled else "eager"


def describe(settings, place, args):
    """How times are measured."""
    kind = "CPU time" if place.device == "cpu" else "GPU time"
    where = f"{place.ranks} ranks, " if place.ranks > 1 else ""
    return (f"`tools/bench.py train --against` ({where}{mode_of(settings, place)}): steps of reference and row in "
            f"turn, {kind}, in {args.bench_blocks} processes of {args.bench_steps} pairs each")


def measurements(plan, bench, out, place, args):
    """{row name: [Task]} in OUT/times, a task for each process of a measurement; that of ITSELF comes first."""
    # tools/bench.py brings data of its own: one measurement serves all data sets.
    common = {"data_path": Settings.data_path, "iterations": plan.steps, "seed": plan.seeds[0]}
    settings = {name: replace(settings, **common) for name, settings in plan.settings.items()}
    pairs = {row.name: (settings[row.reference or BASE], settings[row.name]) for row in plan.rows}
    pairs = {name: sides for name, sides in pairs.items() if not same_work(*sides)}
    if pairs:
        pairs = {ITSELF: (settings[BASE], settings[BASE]), **pairs}
    code = (ROOT / "train_gpt.py", bench, *sorted(bench.parent.glob("benchmarks/*.py")))
    code = [sha256(path) for path in code if path.is_file()]
    machine = (place.device, place.ranks, torch.__version__, place.threads, args.bench_steps)
    tasks = {name: [] for name in pairs}
    for name, sides in pairs.items():
        texts = [side.text() for side in sides]
        for block in range(args.bench_blocks):
            folder = out / "times" / digest(*texts, code, machine, block)
            against, words = map(shlex.split, in_turn(block, texts))
            words = ["train", *words, "--against", *against, "--modes", mode_of(sides[1], place), "--steps",
                     str(args.bench_steps), "--repeats", "1", "--json", str(folder / "bench.json")]
            tasks[name].append(Task(f"time of {name}, {block + 1} of {args.bench_blocks}", folder,
                                    command(bench, words, place.ranks), "pairs.json", "bench.json", kind="time"))
    return tasks


def in_turn(block, sides):
    """In every other process the sides change places."""
    return sides if block % 2 == 0 else sides[::-1]


def read(tasks):
    """(blocks of a measurement, or the reason why there are none)."""
    found = []
    for block, task in enumerate(tasks):
        if not task.is_done():
            return [], read_json(task.folder / "failed.json").get("reason", "it was not measured")
        try:
            (row,) = read_json(task.folder / task.result)["rows"]
            pairs = [in_turn(block, pair) for pairs in row["blocks"] for pair in pairs]
            if not pairs or not all(ms > 0 for pair in pairs for ms in pair):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            return [], "bench.py gave no pairs of times"
        found.append(pairs)
    return found, ""


def speeds_of(plan, tasks):
    """{row name: Speed} by the tasks of measurements(), with the noise floor as ITSELF where anything was measured."""
    speeds = {row.name: Speed(1.0, "same work, not measured") for row in plan.rows}
    floor = 0.0
    for name in tasks:
        blocks, error = read(tasks[name])
        if error:
            speeds[name] = Speed(None, "failed", error=error)
            continue
        found = ratio_of_blocks(blocks, floor)
        speeds[name] = Speed(found.ratio, "measured", found.error, differs(found), blocks)
        if name == ITSELF and len(blocks) > 1:
            floor = found.error / found.ratio * math.sqrt(len(blocks))
    return speeds


def steps_in_equal_time(steps, speed):
    """Steps that fit into the time of the reference's: as many, where the ratio cannot be told from 1. A step more or
    less for a measuring error would change the schedule, and the score by more than most techniques do.
    """
    return max(1, round(steps / speed.ratio)) if speed.is_clear else steps
