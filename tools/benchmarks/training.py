"""Measures the training step: milliseconds, tokens per second, memory, and share of the device's peak.

No data set is needed: synthetic shards are written to a temporary folder and read by the trainer's own loader.
"""

import argparse
import bisect
import contextlib
import dataclasses
import math
import os
import re
import shlex
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.harness import DOCUMENT_MEAN, document_lengths, in_turn, measure, measure_apart
from benchmarks.ratios import differs, ratio_of_blocks, student
from benchmarks.reports import Report, errors_of, median_and_range, parser_of, progress
from common import BOS, BadInput, load_trainer, names_of, positive, shard_header, trainer_errors, whole
from tables import Column, aligned

MODES = ("eager", "compiled")

# Peak of one device, FLOP/s in dense bfloat16 without sparsity, from NVIDIA's data sheets of H100, H200 and A100; the
# first pattern that fits the name counts. A slice of a device (MIG) has a peak of its own, which its name does not say.
PEAKS = (("MIG", None), ("H100 PCIe", 756e12), ("H[12]00 NVL", 835e12), ("H[12]00", 989e12), ("A100", 312e12))

MOST_TOKENS = 1 << 24  # the shards wrap when a benchmark needs more
WRITTEN_TOGETHER = 1 << 20  # tokens; the peak memory of a child process includes that of its parent


# ---- synthetic data -------------------------------------------------------------------------------------------------


def write_shard(path, count, vocab_size, rng):
    """A shard of `count` tokens: documents that begin with BOS, all other ids by Zipf's law.

    Neither constant nor uniform, because the time of a matmul on a GPU depends on how regular its numbers are.
    """
    lengths = document_lengths(rng, 2 * count // DOCUMENT_MEAN + 99)  # about twice as many as fit
    starts = np.cumsum(lengths)
    is_start = np.zeros(count, bool)
    is_start[0] = True
    is_start[starts[starts < count]] = True
    shares = 1 / np.arange(1, vocab_size - BOS)
    edges = np.cumsum(shares / shares.sum())[:-1]
    with open(path, "wb") as file:
        file.write(shard_header(count))
        for begin in range(0, count, WRITTEN_TOGETHER):
            end = min(begin + WRITTEN_TOGETHER, count)
            ids = BOS + 1 + np.searchsorted(edges, rng.random(end - begin))
            file.write(np.where(is_start[begin:end], BOS, ids).astype("<u2").tobytes())


def write_shards(folder, tokens, vocab_size):
    """Two training shards with at least `tokens` tokens together. The same arguments give the same shards."""
    rng = np.random.default_rng(1337)
    for number in range(2):
        write_shard(Path(folder) / f"fineweb_train_{number:06d}.bin", tokens // 2 + 1, vocab_size, rng)


# ---- the trainer ----------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """A part of a run in which all steps are alike."""

    progress: float  # at its middle
    share: float | None  # of the run; None: it depends on the speed of the machine
    falling: float = 1.0  # what the warmdown multiplies learning rates by
    rounded: bool = False  # late QAT


class Session:
    """A training run of train_gpt.py, built and stepped as its train() does it. Only this class calls the trainer.

    Relied on: Settings.parse, .text, .sha256, .loops and the fields named here, .stages, .needs_reserve; warmdown();
    Runtime(s) with .device .dtype .world .choices .sync .throttle .max .close .device_name .peak_memory_mib;
    pick_attention(s, rt); Run(s, rt, out_dir, attend); GPT(s, dtype, attend) with .blocks, .plan (the visits of a step,
    each with .block), .embed and .head (None: tied); roles(module); Training(run, model) with .step .stage .objective
    .average.start() .enter(progress, falling) .warm_up() .step_loss(x, y, docs, weights) and .qat (None: no late QAT)
    with .begun .switch(on), SCALE_REFRESH_STEPS; _train_step(run, training, progress, scale); _set_sdpa(*names).
    """

    @staticmethod
    def settings(args):
        """Settings of a command line (and the environment), as the trainer reads them."""
        return load_trainer().Settings.parse(args, os.environ)

    @staticmethod
    def rounded_from(s):
        """Progress beyond which steps are on rounded weights, in millionths; 1: there are none. None: it depends on the
        speed of the machine.
        """
        if not s.late_qat_threshold:
            return 1.0
        steps_unknown = s.warmdown_iters and s.max_wallclock_seconds
        seconds_unknown = s.warmdown_seconds and s.needs_reserve and not s.gptq_reserve_seconds
        if steps_unknown or seconds_unknown:
            return None
        reserve = s.gptq_reserve_seconds if s.needs_reserve else 0.0
        seconds = max(s.max_wallclock_seconds - reserve, 0.0)
        warmdown = load_trainer().warmdown

        def is_rounded(millionths):
            return warmdown(s, millionths / 1e6, s.iterations, seconds) < s.late_qat_threshold

        return bisect.bisect_left(range(1_000_000), True, key=is_rounded) / 1e6

    @staticmethod
    def states(s):
        """The states that a run goes through: {name: State}.

        A state is a stage of sequence length and batch, with depth recurrence "off" or "on"; late QAT adds "qat".
        Several stages are numbered, as in "on 2 qat".
        """
        stage_ends = [until for until, *_ in s.stages]
        rounded_from = Session.rounded_from(s)
        edges = {0.0, *stage_ends}
        if s.loops:
            edges.add(s.enable_looping_at)
        if rounded_from is not None:
            edges.add(rounded_from)
        edges = sorted(edges)
        states = {}
        for begin, end in zip(edges, edges[1:]):
            name = "on" if s.loops and begin >= s.enable_looping_at else "off"
            if len(stage_ends) > 1:
                stages_before = sum(until <= begin for until in stage_ends)
                name += f" {1 + stages_before}"
            plain = State((begin + end) / 2, end - begin)
            rounded = plain._replace(falling=s.late_qat_threshold / 2, rounded=True)
            if rounded_from is None and end > 1 - s.late_qat_threshold:  # the warmdown is as long as the run at most
                states[name] = plain._replace(share=None)
                states[f"{name} qat"] = rounded._replace(share=None)
            elif rounded_from is not None and begin >= rounded_from:
                states[f"{name} qat"] = rounded
            else:
                states[name] = plain
        return states

    def __init__(self, args, mode, folder):
        s = self.settings(args)
        self.trainer = load_trainer()
        self.state = None
        self.has_rounded = False  # late QAT has its scales
        self.shapes = []  # of the micro-batches of the last step
        self.docs = None  # document boundaries of the last micro-batch
        self.s = dataclasses.replace(
            s, data_path=str(folder), compile="on" if mode == "compiled" else "off", phases="all", artifact="",
            resume="", checkpoint_every=0, train_log_every=2**62, gptq_calibration="train", gptq_calibration_tokens=1)
        self.rt = None

    def build(self, folder):
        """Everything up to the first step. BadInput for settings that this machine cannot run in any mode."""
        trainer = self.trainer
        s = self.s
        with trainer_errors():
            rt = self.rt = trainer.Runtime(s)
            attend = trainer.pick_attention(s, rt)
            self.backends = sdpa_backends()
            self.run = trainer.Run(s, rt, Path(folder) / "run", attend)
            self.model = trainer.GPT(s, rt.dtype, attend).to(rt.device)
            self.training = trainer.Training(self.run, self.model)
        self.training.step_loss = partial(self._noted, self.training.step_loss)

    def _noted(self, loss, x, y, docs, weights):
        """The loss of a micro-batch. Its shape is noted, so that the tokens of a step are counted, not assumed."""
        self.shapes.append(tuple(x.shape))
        self.docs = docs
        return loss(x, y, docs, weights)

    def warm_up(self, states, steps):
        """Compile as the trainer does, enter each of these states, and take `steps` steps of the last one."""
        if self.s.warmup_steps:
            self.training.warm_up()
        self.training.average.start()
        self.training.step = 10  # up to the tenth step the trainer logs every loss, which waits for the device
        for state in states:
            self.enter(state)
        for _ in range(steps):
            self.step()
        self.rt.sync()
        if self.rt.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.rt.device)

    def enter(self, state):
        """Be in a state, as train() is before each of its steps. Late QAT chooses its scales when it is first entered,
        for which FIT=allocate calibrates; later they are left to refresh().
        """
        self.state = state
        qat = self.training.qat
        if qat:
            later = state.rounded and self.has_rounded
            qat.begun = self.training.step - 1 if later else None  # one step ago, which is not time for new scales
            self.has_rounded |= state.rounded
            if not state.rounded:
                qat.switch(False)
        self.training.enter(state.progress, state.falling)

    @property
    def steps_of_scales(self):
        """Steps after which the scales of late QAT follow the weights; None: they stay."""
        is_allocated = self.s.fit == "allocate"
        return None if is_allocated or not self.state.rounded else self.trainer.SCALE_REFRESH_STEPS

    def refresh(self):
        """Let the scales of late QAT follow the weights."""
        self.training.qat.begun = self.training.step
        self.training.enter(self.state.progress, self.state.falling)

    def step(self):
        """One optimizer step; returns this rank's mean loss on its way to the CPU."""
        self.shapes.clear()
        self.enter(self.state)
        _, loss = self.trainer._train_step(self.run, self.training, self.state.progress, 1.0)
        self.rt.throttle()
        return loss

    def facts(self):
        """What all rows of a table share."""
        rt = self.rt
        choices = {name: choice for name, choice, _ in rt.choices}
        micro_batch_tokens = [rows * length for rows, length in self.shapes]
        return {
            "device": rt.device_name(),
            "world_size": rt.world,
            "dtype": str(rt.dtype).removeprefix("torch."),
            "attention": choices["attention"],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokens_per_step": rt.world * sum(micro_batch_tokens),
            "seq_len": self.s.stages[self.training.stage][1],
            "micro_batches": len(micro_batch_tokens),
            "micro_batch_tokens": micro_batch_tokens[0],
        }

    def flops(self):
        """FLOP of one token, forward and backward."""
        training = self.training
        return flops_per_token(self.trainer.roles, training.objective, training.model, self.s, self.context())

    def context(self):
        """Mean length of the sequences in which a token of the last micro-batch attends: of documents, where masked."""
        docs = self.docs
        if docs is None or docs.cu_seqlens is None:
            return self.s.stages[self.training.stage][1]
        lengths = docs.cu_seqlens.diff().double()
        return (lengths.square().sum() / lengths.sum()).item()

    def close(self):
        if self.rt:
            self.rt.close()


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


def matmul_weights(roles, module):
    """Number of weights that multiply every token: matrices that are neither look-up tables nor element-wise."""
    role_of = roles(module)
    matrices = {name: p for name, p in module.named_parameters() if p.ndim == 2}
    return sum(p.numel() for name, p in matrices.items() if role_of[name] not in ("embed", "scalar"))


def flops_per_token(roles, objective, model, s, length):
    """FLOP of one token, forward and backward, in sequences of `length` tokens. Every visit of the plan counts.

    Convention: 2 FLOP a weight forward, twice that backward; causal attention counted half, its backward 2.5 times
    its forward (5 matmuls against 2). Element-wise work and the optimizer count nothing.
    """
    of_block = [matmul_weights(roles, block) for block in model.blocks]
    outside_of_blocks = matmul_weights(roles, objective) - sum(of_block)
    weights = outside_of_blocks + sum(of_block[visit.block] for visit in model.plan)
    if model.head is None:  # the embedding is the head, too
        weights += model.embed.weight.numel()
    attention = len(model.plan) * 4 * length * s.num_heads * s.head_dim / 2
    return 3 * 2 * weights + 3.5 * attention


def peak_flops(device, dtype, given):
    """FLOP/s of one device: `given`, in TFLOP/s, else by the device's name. None if unknown."""
    if given is not None:
        return given * 1e12
    if dtype != "bfloat16":
        return None
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device)), None)


# ---- measuring ------------------------------------------------------------------------------------------------------


def time_steps(session, steps):
    """Take steps: (milliseconds of each, CPU milliseconds of each over all threads or None, last loss).

    What late QAT does every few steps is measured apart: each step bears its part of it.
    """
    wall, cpu, loss = time_calls(session, session.step, steps)
    if session.steps_of_scales:
        once, cpu_once, _ = time_calls(session, session.refresh, 1)
        wall = [ms + once[0] / session.steps_of_scales for ms in wall]
        cpu = cpu and [ms + cpu_once[0] / session.steps_of_scales for ms in cpu]
    return wall, cpu, loss.item()


def time_calls(session, work, count):
    """Call work() `count` times: (milliseconds of each, CPU milliseconds of each or None, what it returned last).

    On CUDA the times are between events in the queue, and the host runs ahead as it does in training. Its own CPU time
    says nothing there.
    """
    if session.rt.device.type == "cuda":
        import torch

        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            last = work()
            event.record()
        session.rt.sync()
        return [begin.elapsed_time(end) for begin, end in zip(events, events[1:])], None, last
    wall = [time.perf_counter()]
    cpu = [time.process_time()]
    for _ in range(count):
        last = work()
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
    return milliseconds(wall), milliseconds(cpu), last


def milliseconds(marks):
    """Time between neighbouring marks, which are in seconds."""
    return [1e3 * (end - begin) for begin, end in zip(marks, marks[1:])]


def sdpa_backends():
    """The CUDA backends that PyTorch's attention may use: a choice for the whole process."""
    import torch

    names = ("cudnn", "flash", "mem_efficient", "math")
    return [name for name in names if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]


def measure_state(job):
    """The job of a row: steps of one state of a run."""
    session = Session(job["settings"], job["mode"], job["folder"])
    with contextlib.closing(session):
        session.build(job["folder"])
        begin = time.perf_counter()
        session.warm_up([session.states(session.s)[job["state"]]], job["warmup"])
        warmup = time.perf_counter() - begin
        wall, cpu, loss = time_steps(session, job["steps"])
        return {
            "facts": session.facts(),
            "flops": session.flops(),
            "step_ms": wall,
            "step_cpu_ms": cpu,
            "warmup_seconds": warmup,
            "peak_memory_mib": session.rt.peak_memory_mib(),
            "loss": loss if math.isfinite(loss) else None,
        }


def measure_block(job):
    """The job of a block of --against: steps of two runs in turn, so that whatever else the machine does meets both.

    "pairs" has (milliseconds of a reference step, of a step of the row). The states of a run are weighted by their
    shares. job["first"]: the side that is built first, 0 for the reference or 1.
    """
    words = job["against"], job["settings"]
    sides = [None, None]
    with contextlib.ExitStack() as stack:
        for side in (job["first"], 1 - job["first"]):
            session = sides[side] = Session(words[side], job["mode"], job["folder"])
            stack.enter_context(contextlib.closing(session))
            session.build(Path(job["folder"]) / str(side))
            session.warm_up(session.states(session.s).values(), 0)
        pairs = []
        for number in range(job["warmup"] + job["steps"]):
            pair = [None, None]
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                pair[side] = time_turn(sides[side])
            pairs.append(pair)
        return {"facts": sides[1].facts(), "pairs": pairs[job["warmup"] :]}


def time_turn(session):
    """Milliseconds of a step, the mean over the states of a run by their shares. On a CPU they are CPU time; of several
    ranks, which wait for each other, time of the clock.
    """
    rt = session.rt
    session.trainer._set_sdpa(*session.backends)
    steps = 5 if rt.device.type == "cuda" else 1  # a GPU's queue must fill
    total = 0.0
    for state in session.states(session.s).values():
        session.enter(state)
        if rt.world > 1:
            rt.max(0)  # all ranks begin together
        wall, cpu, _ = time_steps(session, steps)
        times = cpu if cpu and rt.world == 1 else wall
        total += state.share * statistics.median(times)
    return total


def over_repeats(series):
    """(median, least, most) of the steps of one repeat, or of the medians of several repeats."""
    if len(series) == 1:
        return median_and_range(series[0])
    return median_and_range([statistics.median(steps) for steps in series])


def make_row(mode, looping, share, results, peak_tflops):
    """A row of the table and of the JSON from the results of all repeats."""
    row = {"mode": mode, "looping": looping, "share": share}
    if errors := errors_of(results):
        return {**row, "error": errors[0]}
    first = results[0]
    facts = first["facts"]
    for key, name in (("step_ms", "ms"), ("step_cpu_ms", "cpu_ms")):
        is_known = first[key] is not None
        values = over_repeats([result[key] for result in results]) if is_known else (None, None, None)
        row |= zip((f"{name}_per_step", f"{name}_min", f"{name}_max"), values)
    tokens = facts["tokens_per_step"]
    tokens_per_second = tokens / (1e-3 * row["ms_per_step"])
    flops_per_second = first["flops"] * tokens_per_second / facts["world_size"]
    peak = peak_flops(facts["device"], facts["dtype"], peak_tflops)
    per_repeat = ("step_ms", "step_cpu_ms", "warmup_seconds", "peak_memory_mib")
    return {
        **row,
        "tokens_per_second": tokens_per_second,
        "peak_memory_mib": max(result["peak_memory_mib"] for result in results),
        "mflop_per_token": first["flops"] / 1e6,
        "tflop_per_step": first["flops"] * tokens / 1e12,
        "tflops_per_device": flops_per_second / 1e12,
        "mfu": flops_per_second / peak if peak else None,
        "warmup_seconds": first["warmup_seconds"],
        "loss": first["loss"],
        "repeats": [{key: result[key] for key in per_repeat} for result in results],
    }


def make_pair_row(mode, results):
    """A row for --against."""
    if errors := errors_of(results):
        return {"mode": mode, "error": errors[0]}
    blocks = [result["pairs"] for result in results]
    ratio = ratio_of_blocks(blocks)
    reference_ms, ms = zip(*[pair for pairs in blocks for pair in pairs])
    return {
        "mode": mode,
        "ms_per_step": statistics.median(ms),
        "against_ms_per_step": statistics.median(reference_ms),
        "ratio": ratio.ratio,
        "ratio_error": ratio.error if math.isfinite(ratio.error) else None,
        "differs": differs(ratio),
        "blocks": blocks,
    }


# ---- the report -----------------------------------------------------------------------------------------------------


def header(report):
    """Lines above the table: what was measured, where, and how to read it."""
    r = report
    yield from r.title()
    if "against" in r:
        yield f"against   {r['against'] or '(default)'}"
    if "device" in r:
        yield f"run       {r['world_size']} x {r['device']}, {r['dtype']}, attention {r['attention']}, {r.software()}"
        yield (f"step      {r['parameters']:,} parameters, {r['tokens_per_step']:,} tokens in sequences of "
               f"{r['seq_len']:,}: {r['micro_batches']} micro-batch(es) of {r['micro_batch_tokens']:,} a rank")
    if "against" in r:
        clock = "on a CPU its time over all threads" if r.get("world_size", 1) == 1 else "of the first rank's clock"
        yield f"times     medians of pairs of steps in turn, {r['steps']} a block, after {r['warmup']}; {clock}"
        yield ("ratio     mean of the blocks' medians, ± its standard error (number of blocks, each a process); told "
               "from 1 at 95 %?")
        return
    if any(row["share"] is None for row in r["rows"]):
        yield "shares    when late QAT begins depends on this machine's speed: the shares of its states are unknown"
    if r.get("peak_tflops"):
        yield f"MFU       matmuls and causal attention as a share of {r['peak_tflops']:g} TFLOP/s a device"
    elif "device" in r:
        yield f"MFU       no peak is known for {r['dtype']} on this device; --peak-tflops gives one"
    steps = f"{r['steps']} steps"
    if r["repeats"] > 1:
        steps = f"{r['repeats']} repeats' medians of {steps}"
    yield f"times     median (least-most) of {steps}, after {r['warmup']} warm-up steps"


def ratio_text(row):
    error = "?" if row["ratio_error"] is None else f"{row['ratio_error']:.3f}"
    return f"{row['ratio']:.3f} ± {error} ({len(row['blocks'])})"


def verdict(row):
    if row["ratio_error"] is None:
        return "one block cannot tell"
    return "differs" if row["differs"] else "cannot be told from 1"


PAIR_COLUMNS = (
    Column("mode", "mode"),
    Column("against ms/step", "against_ms_per_step", ",.2f"),
    Column("ms/step", "ms_per_step", ",.2f"),
    Column("ratio", ratio_text, ""),
    Column("at 95 %", verdict, ""),
)
COLUMNS = (
    Column("mode", "mode"),
    Column("state", "looping"),
    Column("ms/step", "ms_per_step", ",.2f"),
    Column("(least-most)", lambda row: f"({row['ms_min']:,.2f}-{row['ms_max']:,.2f})", ""),
    Column("CPU ms/step", "cpu_ms_per_step", ",.2f"),
    Column("tokens/s", "tokens_per_second", ",.0f"),
    Column("peak MiB", "peak_memory_mib", ",.0f"),
    Column("MFLOP/token", "mflop_per_token", ",.4g"),
    Column("MFU", "mfu", ".1%"),
    Column("warm-up s", "warmup_seconds", ",.1f"),
)


def document(report):
    """Lines of the report."""
    yield from header(report)
    yield ""
    yield from aligned(PAIR_COLUMNS if "against" in report else COLUMNS, report["rows"])


# ---- the command ----------------------------------------------------------------------------------------------------


def modes(text):
    """A converter of eager, compiled or eager,compiled to a list."""
    names = text.split(",")
    is_unknown = not set(names) <= set(MODES)
    is_repeated = len(set(names)) < len(names)
    if is_unknown or is_repeated:
        raise argparse.ArgumentTypeError(f"{text!r} is not eager, compiled or eager,compiled")
    return names


def arguments(argv):
    parser = parser_of("train", """Time the training step: loader, forward, backward, optimizer and average, at the peak
        learning rate. Each mode runs in a process of its own; repeats alternate between the modes.""", """On a CPU the
        times are wall clock and CPU time of all threads (other processes disturb it less), and the peak memory is that
        of the whole process, the compiler's included; on CUDA the times are of events in the device's queue, and the
        memory is what torch allocated after the warm-up. MFU counts the FLOP of matmuls and causal attention; it needs
        bfloat16 on a known device, or --peak-tflops. The seconds of warm-up are compilation from an empty cache (unless
        TORCHINDUCTOR_CACHE_DIR names one), the WARMUP_STEPS of the settings, the calibration by which late QAT begins
        (of one step's text), and --warmup. Under torchrun one mode is measured a call, and with --against one block,
        on all ranks together.""")
    add = parser.add_argument
    add("settings", nargs="*", metavar="@FILE|KEY=VALUE", help="settings of train_gpt.py; a FILE may be a folder "
        "of records/ (DATA_PATH and OUT_DIR have no effect; in place of COMPILE there is --modes)")
    add("--modes", type=modes, default=list(MODES), help="eager, compiled or eager,compiled (default)")
    add("--looping", choices=("on", "off", "both"), default="both",
        help="depth recurrence on, off, or both where a run has both (default); each stage of TRAIN_SEQ_SCHEDULE and "
        "TRAIN_BATCH_SCHEDULE is a row, and so is what late QAT trains on rounded weights (qat)")
    add("--states", metavar="NAME,...", help="rows by their names, as in off,on 2 qat (default: all)")
    add("--against", nargs="*", metavar="@FILE|KEY=VALUE", help="settings of a reference, whose steps are taken in "
        "turn with those of the settings, in one process: the ratio of the two is far steadier than either. Several "
        "processes, in which the one or the other is built first, say how steady")
    add("--steps", type=whole(1), metavar="N", help="steps measured in each repeat (default: 20, with --against 8)")
    add("--warmup", type=whole(0), metavar="N", help="steps before them (default: 3, with --against 1)")
    add("--repeats", type=whole(1), metavar="N", help="processes for each mode (default: 1, with --against 5)")
    add("--peak-tflops", type=positive, metavar="X", help="peak TFLOP/s of one device, for MFU")
    args = parser.parse_intermixed_args(argv)
    is_pair = args.against is not None
    args.steps = args.steps or (8 if is_pair else 20)
    args.repeats = args.repeats or (5 if is_pair and world_size() == 1 else 1)
    if args.warmup is None:
        args.warmup = 1 if is_pair else 3
    return args


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def list_jobs(args, s):
    """(mode, state) of each row; of --against the state is "both"."""
    if args.against is None:
        states = list(Session.states(s))
        if args.states:
            states = names_of("--states", states)(args.states)
        states = [state for state in states if args.looping in ("both", looping_of(state))]
        if not states:
            never = "have no depth recurrence" if args.looping == "on" else "loop from the first step"
            raise BadInput(f"--looping {args.looping}: these settings {never}; leave --looping out")
    else:
        check_pair(args, s)
        student(1)  # without scipy nothing need be measured
        states = ["both"]
    jobs = [(mode, state) for state in states for mode in args.modes]
    if world_size() > 1 and len(jobs) * args.repeats > 1:
        choices = ["--modes compiled (or eager)"]
        if len(states) > 1:
            choices.append("--states " + " or ".join(map(shlex.quote, states)))
        if args.repeats > 1:
            choices.append("--repeats 1")
        raise BadInput(f"torchrun measures one thing a call: choose with {' '.join(choices)}")
    return jobs


def check_pair(args, s):
    """BadInput for two sides that cannot be compared."""
    for option, is_given in (("--looping", args.looping != "both"), ("--states", args.states)):
        if is_given:
            raise BadInput(f"--against compares whole runs in one process: leave out {option}")
    reference = Session.settings(args.against)
    if world_size() > 1 and s.device != reference.device:
        raise BadInput(f"DEVICE={s.device} --against DEVICE={reference.device}: ranks talk by one backend; give both "
                       "the same DEVICE")
    for side in (s, reference):
        if Session.rounded_from(side) is None:
            raise BadInput("--against weighs steps by their share of the run, and when late QAT begins depends on this "
                           "machine's speed; give WARMDOWN_FRAC in place of WARMDOWN_ITERS or WARMDOWN_SECONDS, or "
                           "ITERATIONS with MAX_WALLCLOCK_SECONDS=0")


def looping_of(state):
    """"on" or "off", from the name of a state."""
    return state.split()[0]


def write_data(args, s, folder):
    """Shards for all steps of one job."""
    runs = [s]
    if args.against is not None:
        runs.append(Session.settings(args.against))
    steps = args.warmup + args.steps + 1
    tokens = steps * max(run.train_batch_tokens for run in runs)
    try:
        write_shards(folder, min(tokens, MOST_TOKENS), min(run.vocab_size for run in runs))
    except OSError as error:
        raise BadInput(f"{folder}: {error.strerror}; name a folder with more room as TMPDIR") from None


def measure_job(args, folder, job, repeat):
    """The result of one repeat of a (mode, state): in a process of its own, or on the ranks of torchrun in this one."""
    mode, state = job
    job = {
        "settings": args.settings,
        "against": args.against,
        "mode": mode,
        "state": state,
        "first": repeat % 2,
        "folder": folder,
        "steps": args.steps,
        "warmup": args.warmup,
    }
    work = measure_state if args.against is None else measure_block
    if world_size() > 1:
        return measure(work, job)
    what = f"state {state}" if args.against is None else "both in turn"
    progress(f"measuring {mode}, {what}, repeat {repeat + 1} of {args.repeats}")
    # A cache for each job: the first repeat compiles from nothing, the later ones do not compile again.
    return measure_apart(work, job, {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache_{mode}_{state}"})


def run(args, argv):
    """`bench.py train`; returns the exit code."""
    s = Session.settings(args.settings)
    jobs = list_jobs(args, s)
    facts = {name: getattr(args, name) for name in ("steps", "warmup", "repeats")}
    if args.against is not None:
        facts["against"] = Session.settings(args.against).text()
    is_first_rank = os.environ.get("RANK", "0") == "0"
    report = Report("train", args, argv, document, s.text(), quiet=not is_first_rank, settings_hash=s.sha256(), **facts)
    with report, tempfile.TemporaryDirectory(prefix="bench_") as folder:
        write_data(args, s, folder)
        for results in in_turn(jobs, args.repeats, partial(measure_job, args, folder)):
            report.update(facts_of(results, args.peak_tflops))
            report.keep(make_rows(args, s, results))
    return report.code


def facts_of(results, peak_tflops):
    """What all rows of a report share, from the first job that was measured."""
    measured = [repeats[0]["facts"] for repeats in results.values() if "error" not in repeats[0]]
    if not measured:
        return {}
    facts = measured[0]
    peak = peak_flops(facts["device"], facts["dtype"], peak_tflops)
    return {**facts, "peak_tflops": peak and peak / 1e12}


def make_rows(args, s, results):
    if args.against is not None:
        return [make_pair_row(mode, repeats) for (mode, _), repeats in results.items()]
    states = Session.states(s)
    rows = []
    for (mode, state), repeats in results.items():
        looping = state if len(states) > 1 else None
        rows.append(make_row(mode, looping, states[state].share, repeats, args.peak_tflops))
    return rows
