"""Measures the training step: milliseconds, tokens per second, memory, and share of the device's peak.

No data set is needed: synthetic shards are written to a temporary folder and read by the trainer's own loader.
"""

import bisect
import contextlib
import dataclasses
import math
import os
import re
import shlex
import statistics
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_gpt as trainer
from benchmarks import harness
from benchmarks.ratios import differs, ratio_of_blocks, student
from common import BOS, BadInput, names_of, positive, shard_header, trainer_errors, whole
from tables import Column, aligned

MODES = ("eager", "compiled", "eager,compiled", "compiled,eager")

# Peak of one device, FLOP/s in dense bfloat16 without sparsity, from NVIDIA's data sheets of H100, H200 and A100; the
# first pattern that fits the name counts. A slice of a device (MIG) has a peak of its own, which its name does not say.
PEAKS = (("MIG", None), ("H100 PCIe", 756e12), ("H[12]00 NVL", 835e12), ("H[12]00", 989e12), ("A100", 312e12))

MOST_TOKENS = 1 << 24  # the shards wrap when a benchmark needs more
WRITTEN_TOGETHER = 1 << 20  # tokens; the peak memory of a child process includes that of its parent


# ---- synthetic data -------------------------------------------------------------------------------------------------


def write_shards(folder, tokens, vocab_size):
    """Two training shards with at least `tokens` tokens together: documents that begin with BOS, all other ids by
    Zipf's law. The same arguments give the same shards.

    Neither constant nor uniform, because the time of a matmul on a GPU depends on how regular its numbers are.
    """
    rng = np.random.default_rng(1337)
    count = tokens // 2 + 1
    shares = 1 / np.arange(1, vocab_size - BOS)
    edges = np.cumsum(shares / shares.sum())[:-1]
    for number in range(2):
        lengths = harness.document_lengths(rng, 2 * count // harness.DOCUMENT_MEAN + 99)  # about twice as many as fit
        starts = np.append(0, np.cumsum(lengths))
        is_start = np.zeros(count, bool)
        is_start[starts[starts < count]] = True
        with open(Path(folder) / f"fineweb_train_{number:06d}.bin", "wb") as file:
            file.write(shard_header(count))
            for begins in np.split(is_start, range(WRITTEN_TOGETHER, count, WRITTEN_TOGETHER)):
                ids = BOS + 1 + np.searchsorted(edges, rng.random(len(begins)))
                file.write(np.where(begins, BOS, ids).astype("<u2").tobytes())


# ---- the states of a run --------------------------------------------------------------------------------------------


class State(NamedTuple):
    """A part of a run in which all steps are alike."""

    progress: float  # at its middle
    share: float | None  # of the run; None: it depends on the speed of the machine
    falling: float = 1.0  # what the warmdown multiplies learning rates by
    rounded: bool = False  # late QAT


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

    def is_rounded(millionths):
        return trainer.warmdown(s, millionths / 1e6, s.iterations, seconds) < s.late_qat_threshold

    return bisect.bisect_left(range(1_000_000), True, key=is_rounded) / 1e6


def states_of(s):
    """The states that a run goes through: {name: State}.

    A state is a stage of sequence length and batch, with depth recurrence "off" or "on"; late QAT adds "qat". Several
    stages are numbered, as in "on 2 qat".
    """
    stage_ends = [stage.until for stage in s.stages]
    rounding = rounded_from(s)
    looping = s.enable_looping_at if s.loops else 1.0
    edges = sorted({0.0, *stage_ends, looping, 1.0 if rounding is None else rounding})
    states = {}
    for begin, end in pairwise(edges):
        name = "on" if begin >= looping else "off"
        if len(stage_ends) > 1:
            name += f" {1 + sum(until <= begin for until in stage_ends)}"
        plain = State((begin + end) / 2, end - begin)
        rounded = plain._replace(falling=s.late_qat_threshold / 2, rounded=True)
        if rounding is None and end > 1 - s.late_qat_threshold:  # the warmdown is as long as the run at most
            states[name] = plain._replace(share=None)
            states[f"{name} qat"] = rounded._replace(share=None)
        elif rounding is not None and begin >= rounding:
            states[f"{name} qat"] = rounded
        else:
            states[name] = plain
    return states


# ---- the trainer ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(s, mode, data, out_dir):
    """A Session of settings with the shards of a folder. BadInput if this machine cannot run them in any mode."""
    s = dataclasses.replace(
        s, data_path=str(data), compile="on" if mode == "compiled" else "off", phases="all", artifact="", resume="",
        checkpoint_every=0, train_log_every=2**62, gptq_calibration="train", gptq_calibration_tokens=1)
    with trainer_errors():
        rt = trainer.Runtime(s)
    with contextlib.closing(rt):
        with trainer_errors():
            session = Session(s, rt, Path(out_dir))
        yield session


class Session(trainer.Training):
    """A training run of train_gpt.py in one of its states, stepped as its train() does it."""

    def __init__(self, s, rt, out_dir):
        attend = trainer.pick_attention(s, rt)
        model = trainer.GPT(s, rt.dtype, attend).to(rt.device)
        super().__init__(trainer.Run(s, rt, out_dir, attend), model)
        self.s = s
        self.rt = rt
        self.now = None  # State
        self.has_rounded = False  # late QAT has its scales
        # The CUDA backends that PyTorch's attention may use: a choice for the whole process.
        self.backends = [name for name in ("cudnn", "flash", "mem_efficient", "math")
                         if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]

    def backward(self, micro):
        """Note what the micro-batches are, so that the tokens of a step are counted, not assumed."""
        self.sizes = [ids.numel() for ids, _, _ in micro]
        self.docs = micro[-1][2]
        return super().backward(micro)

    def begin(self, states, steps):
        """Compile as train() does, enter each of these states, and take `steps` steps of the last one."""
        if self.s.warmup_steps:
            self.warm_up()
        self.average.start()
        self.step = 10  # up to the tenth step the trainer logs every loss, which waits for the device
        for state in states:
            self.be_in(state)
        for _ in range(steps):
            self.take_step()
        self.rt.sync()
        if self.rt.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.rt.device)

    def be_in(self, state):
        """Be in a state, as train() is before each of its steps. Late QAT chooses its scales when it is first entered,
        for which FIT=allocate calibrates; later they are left to refresh().
        """
        self.now = state
        if self.qat:
            later = state.rounded and self.has_rounded
            self.qat.begun = self.step - 1 if later else None  # one step ago, which is not time for new scales
            self.has_rounded |= state.rounded
            if not state.rounded:
                self.qat.switch(False)
        self.enter(state.progress, state.falling)

    @property
    def steps_of_scales(self):
        """Steps after which the scales of late QAT follow the weights; None: they stay."""
        is_allocated = self.s.fit == "allocate"
        return None if is_allocated or not self.now.rounded else trainer.SCALE_REFRESH_STEPS

    def refresh(self):
        """Let the scales of late QAT follow the weights."""
        self.qat.begun = self.step
        self.enter(self.now.progress, self.now.falling)

    def take_step(self):
        """One optimizer step; returns this rank's mean loss on its way to the CPU."""
        self.be_in(self.now)
        _, loss = trainer._train_step(self.run, self, self.now.progress, 1.0)
        self.rt.throttle()
        return loss

    def facts(self, peak_tflops):
        """What all rows of a table share; the peak as it is given, or None."""
        chosen = harness.chosen(self.rt)
        peak = peak_flops(chosen["device"], chosen["dtype"], peak_tflops)
        return {
            **chosen,
            "world_size": self.rt.world,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokens_per_step": self.rt.world * sum(self.sizes),
            "seq_len": self.s.stages[self.stage].length,
            "micro_batches": len(self.sizes),
            "micro_batch_tokens": self.sizes[0],
            "peak_tflops": peak and peak / 1e12,
        }

    def flops(self):
        """FLOP of one token, which attends to documents where the last micro-batch has their boundaries."""
        length = self.s.stages[self.stage].length
        if self.docs is not None and self.docs.cu_seqlens is not None:
            lengths = self.docs.cu_seqlens.diff().double()
            length = (lengths.square().sum() / lengths.sum()).item()
        return flops_per_token(self.objective, self.s, length)


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


def matmul_weights(module):
    """Number of weights that multiply every token: matrices that are neither look-up tables nor element-wise."""
    role_of = trainer.roles(module)
    return sum(p.numel() for name, p in module.named_parameters()
               if p.ndim == 2 and role_of[name] not in ("embed", "scalar"))


def flops_per_token(objective, s, length):
    """FLOP of one token, forward and backward, in sequences of `length` tokens. Every visit of the plan counts.

    Convention: 2 FLOP a weight forward, twice that backward; causal attention counted half, its backward 2.5 times
    its forward (5 matmuls against 2). Element-wise work and the optimizer count nothing.
    """
    model = objective.model
    of_block = [matmul_weights(block) for block in model.blocks]
    outside_of_blocks = matmul_weights(objective) - sum(of_block)
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
    wall, cpu, loss = time_calls(session, session.take_step, steps)
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
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            last = work()
            event.record()
        session.rt.sync()
        return [begin.elapsed_time(end) for begin, end in pairwise(events)], None, last
    marks = [(time.perf_counter(), time.process_time())]
    for _ in range(count):
        last = work()
        marks.append((time.perf_counter(), time.process_time()))
    wall, cpu = (1e3 * np.diff(marks, axis=0)).T.tolist()
    return wall, cpu, last


def measure_state(job):
    """The job of a row: steps of one state of a run."""
    with opened(job["sides"][0], job["mode"], job["folder"], f"{job['folder']}/run") as session:
        begin = time.perf_counter()
        session.begin([states_of(session.s)[job["state"]]], job["warmup"])
        warmup = time.perf_counter() - begin
        wall, cpu, loss = time_steps(session, job["steps"])
        return {
            "facts": session.facts(job["peak_tflops"]),
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
    shares. job["first"]: the side that is built first, 0 for the settings or 1 for the reference.
    """
    sides = {}
    with contextlib.ExitStack() as stack:
        for side in (job["first"], 1 - job["first"]):
            session = opened(job["sides"][side], job["mode"], job["folder"], f"{job['folder']}/{side}")
            sides[side] = stack.enter_context(session)
            sides[side].begin(states_of(job["sides"][side]).values(), 0)
        pairs = []
        for number in range(job["warmup"] + job["steps"]):
            order = (1, 0) if number % 2 == 0 else (0, 1)
            times = {side: time_turn(sides[side]) for side in order}
            pairs.append([times[1], times[0]])
        return {"facts": sides[0].facts(job["peak_tflops"]), "pairs": pairs[job["warmup"] :]}


def time_turn(session):
    """Milliseconds of a step, the mean over the states of a run by their shares. On a CPU they are CPU time; of several
    ranks, which wait for each other, time of the clock.
    """
    rt = session.rt
    trainer._set_sdpa(*session.backends)
    steps = 5 if rt.device.type == "cuda" else 1  # a GPU's queue must fill
    total = 0.0
    for state in states_of(session.s).values():
        session.be_in(state)
        rt.max(0)  # all ranks begin together
        wall, cpu, _ = time_steps(session, steps)
        total += state.share * statistics.median(cpu if cpu and rt.world == 1 else wall)
    return total


# ---- rows -----------------------------------------------------------------------------------------------------------


def over_repeats(results, key):
    """(median, least, most) of the steps of one repeat, or of the medians of several repeats; of what was not measured
    None.
    """
    if results[0][key] is None:
        return None, None, None
    if len(results) == 1:
        return harness.median_and_range(results[0][key])
    return harness.median_and_range([statistics.median(result[key]) for result in results])


def merge_steps(results):
    """What the row of a state has of the results of all repeats."""
    first = results[0]
    facts = first["facts"]
    ms = over_repeats(results, "step_ms")
    cpu_ms = over_repeats(results, "step_cpu_ms")
    tokens = facts["tokens_per_step"]
    tokens_per_second = tokens / (1e-3 * ms[0])
    flops_per_second = first["flops"] * tokens_per_second / facts["world_size"]
    peak = facts["peak_tflops"]
    per_repeat = ("step_ms", "step_cpu_ms", "warmup_seconds", "peak_memory_mib")
    return {
        **dict(zip(("ms_per_step", "ms_min", "ms_max"), ms)),
        **dict(zip(("cpu_ms_per_step", "cpu_ms_min", "cpu_ms_max"), cpu_ms)),
        "tokens_per_second": tokens_per_second,
        "peak_memory_mib": max(result["peak_memory_mib"] for result in results),
        "mflop_per_token": first["flops"] / 1e6,
        "tflop_per_step": first["flops"] * tokens / 1e12,
        "tflops_per_device": flops_per_second / 1e12,
        "mfu": flops_per_second / 1e12 / peak if peak else None,
        "warmup_seconds": first["warmup_seconds"],
        "loss": first["loss"],
        "repeats": [{key: result[key] for key in per_repeat} for result in results],
    }


def merge_pairs(results):
    """What a row of --against has of the results of all blocks."""
    blocks = [result["pairs"] for result in results]
    ratio = ratio_of_blocks(blocks)
    reference_ms, ms = zip(*[pair for pairs in blocks for pair in pairs])
    return {
        "ms_per_step": statistics.median(ms),
        "against_ms_per_step": statistics.median(reference_ms),
        "ratio": ratio.ratio,
        "ratio_error": ratio.error if math.isfinite(ratio.error) else None,
        "differs": differs(ratio),
        "blocks": blocks,
    }


# ---- the report -----------------------------------------------------------------------------------------------------


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
    """Lines of the report: what was measured, where, how to read it, and the table."""
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
               "from 1 at 95 %?\n")
        yield from aligned(PAIR_COLUMNS, r["rows"])
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
    yield f"times     median (least-most) of {steps}, after {r['warmup']} warm-up steps\n"
    yield from aligned(COLUMNS, r["rows"])


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments(argv):
    parser = harness.parser_of("train", """Time the training step: loader, forward, backward, optimizer and average, at
        the peak learning rate. Each mode runs in a process of its own; repeats alternate between the modes.""", """On a
        CPU the times are wall clock and CPU time of all threads (other processes disturb it less), and the peak memory
        is that of the whole process, the compiler's included; on CUDA the times are of events in the device's queue,
        and the memory is what torch allocated after the warm-up. MFU counts the FLOP of matmuls and causal attention;
        it needs bfloat16 on a known device, or --peak-tflops. The seconds of warm-up are compilation from an empty
        cache (unless TORCHINDUCTOR_CACHE_DIR names one), the WARMUP_STEPS of the settings, the calibration by which
        late QAT begins (of one step's text), and --warmup. Under torchrun one mode is measured a call, and with
        --against one block, on all ranks together.""")
    add = parser.add_argument
    add("settings", nargs="*", metavar="@FILE|KEY=VALUE", help="settings of train_gpt.py; a FILE may be a folder "
        "of records/ (DATA_PATH and OUT_DIR have no effect; in place of COMPILE there is --modes)")
    add("--modes", choices=MODES, default="eager,compiled", metavar="MODE,...",
        help="eager, compiled or eager,compiled (default)")
    add("--states", metavar="NAME,...", help="rows by their names, as in off,on 2 qat (default: all): depth recurrence "
        "off or on, each stage of TRAIN_SEQ_SCHEDULE and TRAIN_BATCH_SCHEDULE, late QAT on rounded weights (qat)")
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


def rows_to_measure(args):
    """{state of a run: its row}; of --against one row. BadInput for what cannot be measured."""
    if args.against is None:
        states = states_of(args.sides[0])
        names = names_of("--states", states)(args.states) if args.states else states
        return {name: {"looping": name if len(states) > 1 else None, "share": states[name].share} for name in names}
    if args.states:
        raise BadInput("--against compares whole runs in one process: leave out --states")
    devices = [side.device for side in args.sides]
    if world_size() > 1 and len(set(devices)) > 1:
        raise BadInput(f"DEVICE={' --against DEVICE='.join(devices)}: ranks talk by one backend; give both the same "
                       "DEVICE")
    if None in map(rounded_from, args.sides):
        raise BadInput("--against weighs steps by their share of the run, and when late QAT begins depends on this "
                       "machine's speed; give WARMDOWN_FRAC in place of WARMDOWN_ITERS or WARMDOWN_SECONDS, or "
                       "ITERATIONS with MAX_WALLCLOCK_SECONDS=0")
    student(1)  # without scipy nothing need be measured
    return {"both": {}}


def list_jobs(args):
    """{(mode, state): its row}."""
    rows = rows_to_measure(args)
    jobs = {(mode, state): {"mode": mode, **row} for state, row in rows.items() for mode in args.modes.split(",")}
    if world_size() > 1 and len(jobs) * args.repeats > 1:
        choices = ["--modes compiled (or eager)"]
        if len(rows) > 1:
            choices.append("--states " + " or ".join(map(shlex.quote, rows)))
        if args.repeats > 1:
            choices.append("--repeats 1")
        raise BadInput(f"torchrun measures one thing a call: choose with {' '.join(choices)}")
    return jobs


def measure_job(args, job, repeat):
    """The result of one repeat of a (mode, state): in a process of its own, or on the ranks of torchrun in this one."""
    mode, state = job
    job = vars(args) | {"mode": mode, "state": state, "first": 1 - repeat % 2}
    work = measure_state if args.against is None else measure_block
    if world_size() > 1:
        return harness.measure(work, job)
    what = f"state {state}" if args.against is None else "both in turn"
    harness.progress(f"measuring {mode}, {what}, repeat {repeat + 1} of {args.repeats}")
    # A cache for each job: the first repeat compiles from nothing, the later ones do not compile again.
    return harness.measure_apart(work, job, {"TORCHINDUCTOR_CACHE_DIR": f"{args.folder}/cache_{mode}_{state}"})


def run(args):
    """`bench.py train`; returns the Report."""
    given = [args.settings] if args.against is None else [args.settings, args.against]
    args.sides = [trainer.Settings.parse(words, os.environ) for words in given]
    s = args.sides[0]
    jobs = list_jobs(args)
    facts = {name: getattr(args, name) for name in ("steps", "warmup", "repeats")}
    if args.against is not None:
        facts["against"] = args.sides[1].text()
    with harness.Report(args, document, s.text(), settings_hash=s.sha256(), **facts) as report:
        tokens = (args.warmup + args.steps + 1) * max(side.train_batch_tokens for side in args.sides)
        write_shards(args.folder, min(tokens, MOST_TOKENS), min(side.vocab_size for side in args.sides))

        def merge(results):
            for name, value in results[0]["facts"].items():  # those of the first job that was measured
                report.setdefault(name, value)
            return merge_steps(results) if args.against is None else merge_pairs(results)

        report.measure(jobs, args.repeats, partial(measure_job, args), merge)
    return report
