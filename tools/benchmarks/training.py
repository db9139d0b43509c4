"""Measures the training step: milliseconds, tokens per second, memory, and share of the device's peak.

    python tools/bench.py train @records/small.env NUM_LAYERS=6

No data set is needed: synthetic shards are written to a temporary folder and read by the trainer's own loader.
`bench.py train --help` has the options.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.harness import (
    DOCUMENT_MEAN,
    command_line,
    commit,
    commit_text,
    document_lengths,
    errors_of,
    measure,
    measure_apart,
    median_and_range,
    progress,
    versions,
    write_json,
)
from common import (
    BOS,
    BadInput,
    Parser,
    load_trainer,
    positive,
    quartiles,
    shard_header,
    trainer_errors,
    whole,
)

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


class Session:
    """A training run of train_gpt.py, built and stepped as its train() does it. Only this class calls the trainer.

    Relied on: Settings.parse, .text, .sha256, .loops and the fields replaced in __init__, warmup_steps,
    enable_looping_at, train_batch_tokens, vocab_size, num_heads, head_dim, stages; Runtime(s) with .device .dtype
    .world .choices .sync .throttle .close .device_name .peak_memory_mib; pick_attention(s, rt); Run(s, rt, out_dir,
    attend); GPT(s, dtype, attend) with .blocks, .plan (the visits of a step, each with .block), .embed and .head (None:
    tied); roles(module); Training(run, model) with .step .stage .objective .average.start() .enter(progress) .warm_up()
    .step_loss(x, y, docs, weights); _train_step(run, training, progress, scale); _set_sdpa(*names).
    """

    @staticmethod
    def settings(args):
        """Settings of a command line (and the environment), as the trainer reads them."""
        with trainer_errors():
            return load_trainer().Settings.parse(args, os.environ)

    @staticmethod
    def states(s):
        """The states that a run goes through: {name: (progress at its middle, share of the run)}.

        A state is a stage of sequence length and batch, with depth recurrence "off" or "on". Several stages are
        numbered, as in "on 2".
        """
        stage_ends = [until for until, *_ in s.stages]
        edges = {0.0, *stage_ends}
        if s.loops:
            edges.add(s.enable_looping_at)
        edges = sorted(edges)
        states = {}
        for begin, end in zip(edges, edges[1:]):
            name = "on" if s.loops and begin >= s.enable_looping_at else "off"
            if len(stage_ends) > 1:
                stages_before = sum(until <= begin for until in stage_ends)
                name += f" {1 + stages_before}"
            states[name] = ((begin + end) / 2, end - begin)
        return states

    def __init__(self, args, mode, state, folder):
        """`state` is the name of the state to begin in (see states)."""
        s = self.settings(args)
        self.trainer = load_trainer()
        self.progress = self.states(s)[state][0]
        self.shapes = []  # of the micro-batches of the last step
        self.docs = None  # document boundaries of the last micro-batch
        self.s = dataclasses.replace(
            s, data_path=str(folder), compile="on" if mode == "compiled" else "off", phases="all", artifact="",
            resume="", checkpoint_every=0, train_log_every=2**62)
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

    def warm_up(self, steps):
        """Compile as the trainer does, then take `steps` steps of the kind that is measured."""
        if self.s.warmup_steps:
            self.training.warm_up()
        self.training.average.start()
        self.training.step = 10  # up to the tenth step the trainer logs every loss, which waits for the device
        for _ in range(steps):
            self.step()
        self.rt.sync()
        if self.rt.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.rt.device)

    def step(self):
        """One optimizer step; returns this rank's mean loss on its way to the CPU."""
        self.shapes.clear()
        self.training.enter(self.progress)
        _, loss = self.trainer._train_step(self.run, self.training, self.progress, 1.0)
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

    On CUDA the times are between events in the queue, and the host runs ahead as it does in training. Its own CPU time
    says nothing there.
    """
    if session.rt.device.type == "cuda":
        import torch

        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            loss = session.step()
            event.record()
        session.rt.sync()
        return [begin.elapsed_time(end) for begin, end in zip(events, events[1:])], None, loss.item()
    wall = [time.perf_counter()]
    cpu = [time.process_time()]
    for _ in range(steps):
        loss = session.step()
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
    return milliseconds(wall), milliseconds(cpu), loss.item()


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
    session = Session(job["settings"], job["mode"], job["looping"], job["folder"])
    with contextlib.closing(session):
        session.build(job["folder"])
        begin = time.perf_counter()
        session.warm_up(job["warmup"])
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
            **versions(),
        }


def measure_pair(job):
    """The job of a row of --against: steps of two runs in turn, so that whatever else the machine does meets both.

    "pairs" has (milliseconds of a reference step, of a step of the row), on a CPU of CPU time. The states of a run are
    weighted by their shares.
    """
    with contextlib.ExitStack() as stack:
        sides = []
        for number, words in enumerate((job["against"], job["settings"])):
            states = Session.states(Session.settings(words))
            session = Session(words, job["mode"], next(iter(states)), job["folder"])
            stack.enter_context(contextlib.closing(session))
            session.build(Path(job["folder"]) / str(number))
            session.warm_up(0)
            sides.append((session, list(states.values())))
        pairs = []
        for number in range(job["warmup"] + job["steps"]):
            pair = [None, None]
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                pair[side] = time_turn(*sides[side])
            pairs.append(pair)
        return {"facts": sides[1][0].facts(), "pairs": pairs[job["warmup"] :], **versions()}


def time_turn(session, states):
    """Milliseconds of a step, the mean over the states of a run by their shares."""
    session.trainer._set_sdpa(*session.backends)
    steps = 5 if session.rt.device.type == "cuda" else 1  # a GPU's queue must fill
    total = 0.0
    for progress_at_middle, share in states:
        session.progress = progress_at_middle
        wall, cpu, _ = time_steps(session, steps)
        total += share * statistics.median(cpu or wall)
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
    ms, ms_least, ms_most = over_repeats([result["step_ms"] for result in results])
    cpu_ms, cpu_least, cpu_most = None, None, None
    if first["step_cpu_ms"] is not None:
        cpu_ms, cpu_least, cpu_most = over_repeats([result["step_cpu_ms"] for result in results])
    tokens = facts["tokens_per_step"]
    flops_per_second = first["flops"] * tokens / (1e-3 * ms) / facts["world_size"]
    peak = peak_flops(facts["device"], facts["dtype"], peak_tflops)
    per_repeat = ("step_ms", "step_cpu_ms", "warmup_seconds", "peak_memory_mib")
    return {
        **row,
        "ms_per_step": ms,
        "ms_min": ms_least,
        "ms_max": ms_most,
        "cpu_ms_per_step": cpu_ms,
        "cpu_ms_min": cpu_least,
        "cpu_ms_max": cpu_most,
        "tokens_per_second": tokens / (1e-3 * ms),
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
    """A row for --against. Its ratio is the median of the pairs' ratios, with the quartiles around it."""
    if errors := errors_of(results):
        return {"mode": mode, "error": errors[0]}
    pairs = [pair for result in results for pair in result["pairs"]]
    low, ratio, high = quartiles([ms / reference_ms for reference_ms, ms in pairs])
    return {
        "mode": mode,
        "ms_per_step": statistics.median(ms for _, ms in pairs),
        "against_ms_per_step": statistics.median(reference_ms for reference_ms, _ in pairs),
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "pairs": pairs,
    }


# ---- the report -----------------------------------------------------------------------------------------------------


def header(report):
    """Lines above the table: what was measured, where, and how to read it."""
    r = report
    against = "against" in r
    yield f"command   {r['command']}"
    yield f"settings  {r['settings'] or '(default)'}"
    if against:
        yield f"against   {r['against'] or '(default)'}"
    measured = "device" in r
    if measured:
        yield (f"run       {r['world_size']} x {r['device']}, {r['dtype']}, attention {r['attention']}, "
               f"torch {r['torch']}, {r['threads']} CPU thread(s), {commit_text(r)}")
        yield (f"step      {r['parameters']:,} parameters, {r['tokens_per_step']:,} tokens in sequences of "
               f"{r['seq_len']:,}: {r['micro_batches']} micro-batch(es) of {r['micro_batch_tokens']:,} a rank")
    if against:
        yield (f"times     medians of {r['steps'] * r['repeats']} pairs of steps in turn, after {r['warmup']}; "
               "on a CPU its time over all threads")
        return
    if measured and r["peak_tflops"]:
        yield f"MFU       matmuls and causal attention as a share of {r['peak_tflops']:g} TFLOP/s a device"
    elif measured:
        yield f"MFU       no peak is known for {r['dtype']} on this device; --peak-tflops gives one"
    steps = f"{r['steps']} steps"
    if r["repeats"] > 1:
        steps = f"{r['repeats']} repeats' medians of {steps}"
    yield f"times     median (least-most) of {steps}, after {r['warmup']} warm-up steps"


PAIR_COLUMNS = ("mode", "against ms/step", "ms/step", "ratio", "(middle half)")
COLUMNS = ("mode", "looping", "ms/step", "(least-most)", "CPU ms/step", "tokens/s", "peak MiB", "MFLOP/token", "MFU",
           "warm-up s")


def cells(row):
    """The cells of a row; of a measurement that failed only its name."""
    def show_value(key, form):
        return "-" if row[key] is None else format(row[key], form)

    if "pairs" in row:
        return (
            row["mode"],
            f"{row['against_ms_per_step']:,.2f}",
            f"{row['ms_per_step']:,.2f}",
            f"{row['ratio']:.3f}",
            f"({row['ratio_low']:.3f}-{row['ratio_high']:.3f})",
        )
    names = row["mode"], row.get("looping") or "-"
    if "error" in row:
        return names
    return (
        *names,
        show_value("ms_per_step", ",.2f"),
        f"({row['ms_min']:,.2f}-{row['ms_max']:,.2f})",
        show_value("cpu_ms_per_step", ",.2f"),
        show_value("tokens_per_second", ",.0f"),
        show_value("peak_memory_mib", ",.0f"),
        show_value("mflop_per_token", ",.4g"),
        show_value("mfu", ".1%"),
        show_value("warmup_seconds", ",.1f"),
    )


def table(rows):
    """Aligned lines. A mode that failed has its error in place of numbers."""
    columns = COLUMNS if "looping" in rows[0] else PAIR_COLUMNS
    lines = [columns, *map(cells, rows)]
    widths = []
    for column in range(len(columns)):
        widths.append(max((len(line[column]) for line in lines if column < len(line)), default=0))
    for line, row in zip(lines, [{}, *rows]):
        names = [f"{cell:<{width}}" for cell, width in zip(line[:2], widths)]
        numbers = [f"{cell:>{width}}" for cell, width in zip(line[2:], widths[2:])]
        error = [f"failed: {row['error']}"] if "error" in row else []
        yield "  ".join([*names, *numbers, *error])


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
    parser = Parser(prog="bench.py train", allow_abbrev=False, description="""Time the training step: loader, forward,
        backward, optimizer and average, at the peak learning rate. Each mode runs in a process of its own; repeats
        alternate between the modes.""", epilog="""On a CPU the times are wall clock and CPU time of all threads (other
        processes disturb it less), and the peak memory is that of the whole process, the compiler's included; on CUDA
        the times are of events in the device's queue, and the memory is what torch allocated after the warm-up. MFU
        counts the FLOP of matmuls and causal attention; it needs bfloat16 on a known device, or --peak-tflops. The
        seconds of warm-up are compilation from an empty cache (unless TORCHINDUCTOR_CACHE_DIR names one), the
        WARMUP_STEPS of the settings and --warmup. Under torchrun one mode is measured a call.""")
    add = parser.add_argument
    add("settings", nargs="*", metavar="@FILE|KEY=VALUE", help="settings of train_gpt.py; a FILE may be a folder "
        "of records/ (DATA_PATH and OUT_DIR have no effect; in place of COMPILE there is --modes)")
    add("--modes", type=modes, default=list(MODES), help="eager, compiled or eager,compiled (default)")
    add("--looping", choices=("on", "off", "both"), default="both",
        help="depth recurrence on, off, or both where a run has both (default); each stage of TRAIN_SEQ_SCHEDULE and "
        "TRAIN_BATCH_SCHEDULE is a row")
    add("--against", nargs="*", metavar="@FILE|KEY=VALUE", help="settings of a reference, whose steps are taken in "
        "turn with those of the settings, in one process: the ratio of the two is far steadier than either")
    add("--steps", type=whole(1), default=20, metavar="N", help="steps measured in each repeat (default: 20)")
    add("--warmup", type=whole(0), default=3, metavar="N", help="steps before them (default: 3)")
    add("--repeats", type=whole(1), default=1, metavar="N", help="processes for each mode (default: 1)")
    add("--peak-tflops", type=positive, metavar="X", help="peak TFLOP/s of one device, for MFU")
    add("--json", type=Path, metavar="FILE", help="write the result as JSON")
    return parser.parse_intermixed_args(argv)


def list_jobs(args, s, world):
    """(mode, state) of each row."""
    if args.against is not None:
        if world > 1:
            raise BadInput("--against compares whole runs in one process: leave out torchrun")
        if args.looping != "both":
            raise BadInput("--against compares whole runs in one process: leave out --looping")
        return [(mode, "run") for mode in args.modes]
    states = [state for state in Session.states(s) if args.looping in ("both", looping_of(state))]
    if not states:
        never = "have no depth recurrence" if args.looping == "on" else "loop from the first step"
        raise BadInput(f"--looping {args.looping}: these settings {never}; leave --looping out")
    jobs = [(mode, state) for state in states for mode in args.modes]
    if world > 1 and len(jobs) * args.repeats > 1:
        choices = ["--modes compiled (or eager)"]
        if len({looping_of(state) for state in states}) > 1:
            choices.append("--looping on (or off)")
        if args.repeats > 1:
            choices.append("--repeats 1")
        raise BadInput(f"torchrun measures one thing a call: choose with {' '.join(choices)}")
    return jobs


def looping_of(state):
    """"on" or "off", from the name of a state."""
    return state.split()[0]


def measure_jobs(args, s, jobs, world):
    """{(mode, state): [result of each repeat]}. Repeats alternate between the jobs: A B A B."""
    results = {job: [] for job in jobs}
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        write_data(args, s, folder)
        for repeat in range(args.repeats):
            for mode, state in jobs:
                if errors_of(results[mode, state]):
                    continue
                if world == 1:
                    what = f"looping {state}" if args.against is None else "both in turn"
                    progress(f"measuring {mode}, {what}, repeat {repeat + 1} of {args.repeats}")
                result = measure_job(args, mode, state, folder, world)
                if "bad_input" in result:
                    raise BadInput(result["bad_input"])
                results[mode, state].append(result)
    return results


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


def measure_job(args, mode, state, folder, world):
    """The result of one repeat of one job: in a process of its own, or on the ranks of torchrun in this one."""
    job = {
        "settings": args.settings,
        "against": args.against,
        "mode": mode,
        "looping": state,
        "folder": folder,
        "steps": args.steps,
        "warmup": args.warmup,
    }
    work = measure_state if args.against is None else measure_pair
    if world > 1:
        return measure(work, job)
    # A cache for each job: the first repeat compiles from nothing, the later ones do not compile again.
    return measure_apart(work, job, {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache_{mode}_{state}"})


def run(args, argv):
    """`bench.py train`; returns the exit code."""
    s = Session.settings(args.settings)
    world = int(os.environ.get("WORLD_SIZE", 1))
    jobs = list_jobs(args, s, world)
    results = measure_jobs(args, s, jobs, world)
    rows = make_rows(args, s, results)
    if os.environ.get("RANK", "0") == "0":
        report = make_report(args, argv, s, results, rows)
        write_json(args.json, report)
        print("\n".join([*header(report), "", *table(rows)]), flush=True)
    return int(any("error" in row for row in rows))


def make_rows(args, s, results):
    if args.against is not None:
        return [make_pair_row(mode, repeats) for (mode, _), repeats in results.items()]
    states = Session.states(s)
    rows = []
    for (mode, state), repeats in results.items():
        looping = state if len(states) > 1 else None
        _, share = states[state]
        rows.append(make_row(mode, looping, share, repeats, args.peak_tflops))
    return rows


def make_report(args, argv, s, results, rows):
    """What --json writes and the console shows."""
    report = {
        "command": command_line("train", argv),
        "settings": s.text(),
        "settings_hash": s.sha256(),
        **commit(),
        "steps": args.steps,
        "warmup": args.warmup,
        "repeats": args.repeats,
    }
    if args.against is not None:
        report["against"] = Session.settings(args.against).text()
    measured = [repeats[0] for repeats in results.values() if "error" not in repeats[0]]
    if measured:
        facts = measured[0]["facts"]
        peak = peak_flops(facts["device"], facts["dtype"], args.peak_tflops)
        report |= facts
        report["torch"] = measured[0]["torch"]
        report["threads"] = measured[0]["threads"]
        report["peak_tflops"] = peak and peak / 1e12
    report["rows"] = rows
    return report
