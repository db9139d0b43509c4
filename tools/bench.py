"""How fast the trainer is on this machine: milliseconds, tokens per second, memory and share of the device's peak; what
each way of storing a model costs in bytes and in loss, and each way of scoring it in time; which scores are none.

    python tools/bench.py train                                      the default settings, eager and compiled
    python tools/bench.py train @records/small.env NUM_LAYERS=6      any settings, as train_gpt.py takes them
    python tools/bench.py train --modes compiled --steps 50 --repeats 3 --json step.json
    python tools/bench.py train @records/small.env NORMUON=1 --against @records/small.env     their steps in turn
    torchrun --standalone --nproc_per_node=8 tools/bench.py train --modes compiled
    python tools/bench.py pack model.pg DATA_PATH=... --score        codecs and compressors on the weights of a float16
                                                                     artifact (bench_pack.py)
    python tools/bench.py eval model.pg @records/small.env           every predictor: tokens/s, forwards, memory, score;
                                                                     n-gram counts alone (bench_eval.py)
    python tools/bench.py validity                                   published scores that are no code length, next to what
                                                                     is left of them when they are made one (bench_validity.py)

`python tools/bench.py train --help`, `pack --help`, ... have every option. train needs no data set: synthetic shards are
written to a temporary folder and read by the trainer's own loader.

Exit codes: 0 done, 1 a mode failed (its row says why, the others are kept), 2 bad input, 130 and 143 interrupted.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:  # python -P and PYTHONSAFEPATH leave it out
    sys.path.insert(0, HERE)

import bench_eval
import bench_pack
import bench_validity
from common import (DOCUMENT_MEAN, BadInput, Parser, check_json, commit, document_lengths, exit_code, load_trainer,
                    measure_apart, positive, progress, quartiles, trainer_errors, whole, write_json)

MODES = ("eager", "compiled")

# Peak of one device, FLOP/s in dense bfloat16 without sparsity, from NVIDIA's data sheets of H100, H200 and A100; the
# first pattern that fits the name counts. A slice of a device (MIG) has a peak of its own, which its name does not say.
PEAKS = (("MIG", None), ("H100 PCIe", 756e12), ("H[12]00 NVL", 835e12), ("H[12]00", 989e12), ("A100", 312e12))

MOST_TOKENS = 1 << 24  # the shards wrap when a benchmark needs more
SHARD_MAGIC, SHARD_VERSION, BOS = 20240520, 1, 1


# ---- synthetic data -------------------------------------------------------------------------------------------------


def write_shard(path, count, vocab_size, rng):
    """A shard in the contest's format: `count` tokens of documents that begin with BOS, other ids by Zipf's law.

    Neither constant nor uniform, because the time of a matmul on a GPU depends on how regular its numbers are.
    """
    starts = np.cumsum(document_lengths(rng, 2 * count // DOCUMENT_MEAN + 99))  # about twice as many as fit
    is_start = np.zeros(count, bool)
    is_start[[0, *starts[starts < count]]] = True
    shares = 1 / np.arange(1, vocab_size - BOS)
    edges = np.cumsum(shares / shares.sum())[:-1]
    header = np.zeros(256, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, count
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for at in range(0, count, 1 << 20):  # piece by piece: the peak memory of a child includes its parent's
            ids = BOS + 1 + np.searchsorted(edges, rng.random(min(1 << 20, count - at)))
            file.write(np.where(is_start[at : at + len(ids)], BOS, ids).astype("<u2").tobytes())


def write_shards(folder, tokens, vocab_size):
    """Two training shards of `tokens` or a little more together; the same ones for the same arguments."""
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
        """{name: (progress at its middle, share of the run)} of what a run goes through: its stages of sequence length
        and batch, depth recurrence off and on. One state alone is "off"; stages are numbered, as in "on 2".
        """
        ends = [until for until, *_ in s.stages]
        edges = sorted({0.0, *ends, *([s.enable_looping_at] if s.loops else [])})
        found = {}
        for begin, end in zip(edges, edges[1:]):
            stage = f" {1 + sum(until <= begin for until in ends)}" if len(ends) > 1 else ""
            looping = "on" if s.loops and begin >= s.enable_looping_at else "off"
            found[looping + stage] = ((begin + end) / 2, end - begin)
        return found

    def __init__(self, args, mode, state, folder):
        """`state`: the one to begin in, of states()."""
        s = self.settings(args)
        self.trainer, self.progress, self.shapes, self.docs = load_trainer(), self.states(s)[state][0], [], None
        self.s = dataclasses.replace(
            s, data_path=str(folder), compile="on" if mode == "compiled" else "off", phases="all", artifact="",
            resume="", checkpoint_every=0, train_log_every=2**62)
        self.rt = None

    def build(self, folder):
        """Everything up to the first step. BadInput for settings that this machine cannot run in any mode."""
        trainer, s = self.trainer, self.s
        with trainer_errors():
            self.rt = rt = trainer.Runtime(s)
            attend = trainer.pick_attention(s, rt)
            self.backends = sdpa_backends()
            self.run = trainer.Run(s, rt, Path(folder) / "run", attend)
            self.model = trainer.GPT(s, rt.dtype, attend).to(rt.device)
            self.training = trainer.Training(self.run, self.model)
        self.training.step_loss = partial(self._noted, self.training.step_loss)

    def _noted(self, loss, x, y, docs, weights):
        """The loss of a micro-batch, whose shape is noted: so the tokens of a step are counted, not assumed."""
        self.shapes.append(tuple(x.shape))
        self.docs = docs
        return loss(x, y, docs, weights)

    def warm_up(self, steps):
        """Compile as the trainer does, then take some steps more of those that are measured."""
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
        rt, (rows, length) = self.rt, self.shapes[0]
        choices = {name: choice for name, choice, _ in rt.choices}
        return {"device": rt.device_name(), "world_size": rt.world, "dtype": str(rt.dtype).removeprefix("torch."),
                "attention": choices["attention"], "parameters": sum(p.numel() for p in self.model.parameters()),
                "tokens_per_step": rt.world * sum(rows * length for rows, length in self.shapes),
                "seq_len": self.s.stages[self.training.stage][1],
                "micro_batches": len(self.shapes), "micro_batch_tokens": rows * length}

    def flops(self):
        """FLOP of one token, forward and backward."""
        training = self.training
        return flops_per_token(self.trainer.roles, training.objective, training.model, self.s, self.context())

    def context(self):
        """Length of the sequences in which the tokens of the last micro-batch attend: documents, where masked."""
        docs, length = self.docs, self.s.stages[self.training.stage][1]
        if docs is not None and docs.cu_seqlens is not None:
            lengths = docs.cu_seqlens.diff().double()
            return (lengths.square().sum() / lengths.sum()).item()
        return length

    def close(self):
        if self.rt:
            self.rt.close()


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


def matmul_weights(roles, module):
    """Number of weights that multiply every token: matrices that are neither tables to look up nor element-wise."""
    known, params = roles(module), dict(module.named_parameters())
    return sum(p.numel() for name, p in params.items() if p.ndim == 2 and known[name] not in ("embed", "scalar"))


def flops_per_token(roles, objective, model, s, length):
    """FLOP of one token forward and backward, in sequences of `length` tokens; every visit of the plan counts.

    Convention: 2 FLOP a weight forward, twice that backward; causal attention counted half, its backward 2.5 times
    its forward (5 matmuls against 2). Element-wise work and the optimizer count nothing.
    """
    inside = [matmul_weights(roles, block) for block in model.blocks]
    weights = matmul_weights(roles, objective) - sum(inside) + sum(inside[visit.block] for visit in model.plan)
    weights += model.embed.weight.numel() if model.head is None else 0  # the head
    attention = len(model.plan) * 4 * length * s.num_heads * s.head_dim / 2
    return 3 * 2 * weights + 3.5 * attention


def peak_flops(device, dtype, given):
    """FLOP/s of one device: `given` in TFLOP/s, else by the device's name; None if unknown."""
    if given is not None:
        return given * 1e12
    known = (peak for pattern, peak in PEAKS if re.search(pattern, device))
    return next(known, None) if dtype == "bfloat16" else None


# ---- measuring ------------------------------------------------------------------------------------------------------


def time_steps(session, steps):
    """Take steps: (their milliseconds, their CPU milliseconds over all threads or None, last loss).

    On CUDA between events in the queue, the host running ahead as it does in training; its own time says nothing there.
    """
    if session.rt.device.type == "cuda":
        import torch

        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            loss = session.step()
            event.record()
        session.rt.sync()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:])], None, loss.item()
    marks = [(time.perf_counter(), time.process_time())]
    for _ in range(steps):
        loss = session.step()
        marks.append((time.perf_counter(), time.process_time()))
    wall, cpu = ([1e3 * (b - a) for a, b in zip(times, times[1:])] for times in zip(*marks))
    return wall, cpu, loss.item()


def sdpa_backends():
    """The CUDA backends that PyTorch's attention may use: a choice for the whole process."""
    import torch

    names = ("cudnn", "flash", "mem_efficient", "math")
    return [name for name in names if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]


def measure_state(job, stack):
    """Steps of one state of a run: {"facts", "flops", "step_ms", ...}."""
    session = stack.enter_context(contextlib.closing(
        Session(job["settings"], job["mode"], job["looping"], job["folder"])))
    session.build(job["folder"])
    begin = time.perf_counter()
    session.warm_up(job["warmup"])
    warmup = time.perf_counter() - begin
    wall, cpu, loss = time_steps(session, job["steps"])
    return {"facts": session.facts(), "flops": session.flops(), "step_ms": wall, "step_cpu_ms": cpu,
            "warmup_seconds": warmup, "peak_memory_mib": session.rt.peak_memory_mib(),
            "loss": loss if math.isfinite(loss) else None, **versions()}


def measure_pair(job, stack):
    """Steps of two runs in turn, so that whatever else the machine does meets both: {"facts", "pairs"}, each pair the
    milliseconds of a step of (reference, row), on a CPU of its CPU time, the states of a run weighted by their shares.
    """
    sides = []
    for number, words in enumerate((job["against"], job["settings"])):
        states = Session.states(Session.settings(words))
        session = stack.enter_context(contextlib.closing(
            Session(words, job["mode"], next(iter(states)), job["folder"])))
        session.build(Path(job["folder"]) / str(number))
        session.warm_up(0)
        sides.append((session, list(states.values())))

    def turn(session, states):
        session.trainer._set_sdpa(*session.backends)
        total, steps = 0.0, 5 if session.rt.device.type == "cuda" else 1  # a GPU's queue must fill
        for session.progress, share in states:
            wall, cpu, _ = time_steps(session, steps)
            total += share * statistics.median(cpu or wall)
        return total

    pairs = []
    for number in range(job["warmup"] + job["steps"]):
        found = {side: turn(*sides[side]) for side in ((0, 1), (1, 0))[number % 2]}
        pairs.append([found[0], found[1]])
    return {"facts": sides[1][0].facts(), "pairs": pairs[job["warmup"] :], **versions()}


def measure(job):
    """Run one job in this process: what it found, or {"error"}, or {"bad_input"} for any mode."""
    try:
        with contextlib.ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()):  # the trainer's log
            if "container" in job:
                return bench_pack.measure_container(job)
            if "eval" in job:
                return bench_eval.measure(job)
            return (measure_state if job["against"] is None else measure_pair)(job, stack)
    except BadInput as error:
        return {"bad_input": str(error)}
    except Exception as error:
        known = type(error) is load_trainer().BadInput
        if not known:
            traceback.print_exc()
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        line = line.replace("COMPILE=off runs", "--modes eager measures")
        return {"error": line if known else f"{type(error).__name__}: {line}"}


def versions():
    import torch

    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def run_job(folder):
    """What the process of measure_apart does."""
    job = json.loads((Path(folder) / "job.json").read_text(encoding="utf-8"))
    (Path(folder) / "result.json").write_text(json.dumps(measure(job)), encoding="utf-8")
    return 0


def spread(series):
    """(median, least, most) of the steps of one repeat, or of the medians of several repeats."""
    values = series[0] if len(series) == 1 else [statistics.median(steps) for steps in series]
    return statistics.median(values), min(values), max(values)


def make_row(mode, looping, share, results, peak_tflops):
    """A row of the table and of the JSON from the results of all repeats."""
    row = {"mode": mode, "looping": looping, "share": share}
    if errors := [result["error"] for result in results if "error" in result]:
        return {**row, "error": errors[0]}
    first, facts = results[0], results[0]["facts"]
    ms, least, most = spread([result["step_ms"] for result in results])
    cpu = (None, None, None) if first["step_cpu_ms"] is None else spread([result["step_cpu_ms"] for result in results])
    rate = first["flops"] * facts["tokens_per_step"] / (1e-3 * ms) / facts["world_size"]
    peak = peak_flops(facts["device"], facts["dtype"], peak_tflops)
    return {**row, "ms_per_step": ms, "ms_min": least, "ms_max": most, "cpu_ms_per_step": cpu[0], "cpu_ms_min": cpu[1],
            "cpu_ms_max": cpu[2], "tokens_per_second": facts["tokens_per_step"] / (1e-3 * ms),
            "peak_memory_mib": max(result["peak_memory_mib"] for result in results),
            "mflop_per_token": first["flops"] / 1e6, "tflop_per_step": first["flops"] * facts["tokens_per_step"] / 1e12,
            "tflops_per_device": rate / 1e12, "mfu": rate / peak if peak else None,
            "warmup_seconds": first["warmup_seconds"], "loss": first["loss"],
            "repeats": [{key: result[key] for key in ("step_ms", "step_cpu_ms", "warmup_seconds", "peak_memory_mib")}
                        for result in results]}


def make_pair_row(mode, results):
    """The same for --against; the ratio is the median of the pairs', with the quartiles around it."""
    if errors := [result["error"] for result in results if "error" in result]:
        return {"mode": mode, "error": errors[0]}
    pairs = [pair for result in results for pair in result["pairs"]]
    low, ratio, high = quartiles([mine / reference for reference, mine in pairs])
    return {"mode": mode, "ms_per_step": statistics.median(mine for _, mine in pairs),
            "against_ms_per_step": statistics.median(reference for reference, _ in pairs),
            "ratio": ratio, "ratio_low": low, "ratio_high": high, "pairs": pairs}


# ---- the report -----------------------------------------------------------------------------------------------------


def header(report):
    """Lines above the table: what was measured, where, and how to read it."""
    r = report
    changed = f" and {r['changed_files']} changed file(s)" if r["changed_files"] else ""
    yield f"command   {r['command']}"
    yield f"settings  {r['settings'] or '(default)'}"
    if "against" in r:
        yield f"against   {r['against'] or '(default)'}"
    if "device" in r:
        yield (f"run       {r['world_size']} x {r['device']}, {r['dtype']}, attention {r['attention']}, "
               f"torch {r['torch']}, {r['threads']} CPU thread(s), commit {r['commit']}{changed}")
        yield (f"step      {r['parameters']:,} parameters, {r['tokens_per_step']:,} tokens in sequences of "
               f"{r['seq_len']:,}: {r['micro_batches']} micro-batch(es) of {r['micro_batch_tokens']:,} a rank")
    if "against" in r:
        yield (f"times     medians of {r['steps'] * r['repeats']} pairs of steps in turn, after {r['warmup']}; on a CPU "
               "its time over all threads")
        return
    if "device" in r:
        yield (f"MFU       matmuls and causal attention as a share of {r['peak_tflops']:g} TFLOP/s a device"
               if r["peak_tflops"] else
               f"MFU       no peak is known for {r['dtype']} on this device; --peak-tflops gives one")
    over = f"{r['steps']} steps" if r["repeats"] == 1 else f"{r['repeats']} repeats' medians of {r['steps']} steps"
    yield f"times     median (least-most) of {over}, after {r['warmup']} warm-up steps"


PAIR_COLUMNS = ("mode", "against ms/step", "ms/step", "ratio", "(middle half)")
COLUMNS = ("mode", "looping", "ms/step", "(least-most)", "CPU ms/step", "tokens/s", "peak MiB", "MFLOP/token", "MFU",
           "warm-up s")


def cells(row):
    def show(key, form):
        return "-" if row[key] is None else format(row[key], form)

    if "pairs" in row:
        return (row["mode"], f"{row['against_ms_per_step']:,.2f}", f"{row['ms_per_step']:,.2f}", f"{row['ratio']:.3f}",
                f"({row['ratio_low']:.3f}-{row['ratio_high']:.3f})")
    names = row["mode"], row.get("looping") or "-"
    if "error" in row:
        return names
    return (*names, show("ms_per_step", ",.2f"),
            f"({row['ms_min']:,.2f}-{row['ms_max']:,.2f})", show("cpu_ms_per_step", ",.2f"),
            show("tokens_per_second", ",.0f"), show("peak_memory_mib", ",.0f"), show("mflop_per_token", ",.4g"),
            show("mfu", ".1%"), show("warmup_seconds", ",.1f"))


def table(rows):
    """Aligned lines; a mode that failed has its error in place of numbers."""
    columns = COLUMNS if "looping" in rows[0] else PAIR_COLUMNS
    lines = [columns, *map(cells, rows)]
    widths = [max((len(line[i]) for line in lines if i < len(line)), default=0) for i in range(len(columns))]
    for line, row in zip(lines, [{}, *rows]):
        left = [f"{cell:<{width}}" for cell, width in zip(line[:2], widths)]
        right = [f"{cell:>{width}}" for cell, width in zip(line[2:], widths[2:])]
        yield "  ".join([*left, *right, *([f"failed: {row['error']}"] if "error" in row else [])])


# ---- the command train ----------------------------------------------------------------------------------------------


def modes(text):
    given = text.split(",")
    if not set(given) <= set(MODES) or len(set(given)) < len(given):
        raise argparse.ArgumentTypeError(f"{text!r} is not eager, compiled or eager,compiled")
    return given


def train_arguments(argv):
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


def train_jobs(args, s, world):
    """(mode, looping) of each row."""
    if args.against is not None:
        if world > 1 or args.looping != "both":
            raise BadInput("--against compares whole runs in one process: leave out " +
                           ("torchrun" if world > 1 else "--looping"))
        return [(mode, "run") for mode in args.modes]
    states = [state for state in Session.states(s) if args.looping in ("both", state.split()[0])]
    if not states:
        never = "have no depth recurrence" if args.looping == "on" else "loop from the first step"
        raise BadInput(f"--looping {args.looping}: these settings {never}; leave --looping out")
    jobs = [(mode, state) for state in states for mode in args.modes]
    if world > 1 and len(jobs) * args.repeats > 1:
        raise BadInput("torchrun measures one thing a call: choose with --modes compiled (or eager)"
                       + " --looping on (or off)" * (len({state.split()[0] for state in states}) > 1)
                       + " --repeats 1" * (args.repeats > 1))
    return jobs


def train_results(args, s, jobs, world):
    """{(mode, looping): [result of each repeat]}, alternating: A B A B."""
    results = {job: [] for job in jobs}
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        try:
            steps = args.warmup + args.steps + 1
            both = [s] if args.against is None else [s, Session.settings(args.against)]
            tokens, vocab_size = max(x.train_batch_tokens for x in both), min(x.vocab_size for x in both)
            write_shards(folder, min(tokens * steps, MOST_TOKENS), vocab_size)
        except OSError as error:
            raise BadInput(f"{folder}: {error.strerror}; name a folder with more room as TMPDIR") from None
        for repeat in range(args.repeats):
            for mode, state in jobs:
                if any("error" in result for result in results[mode, state]):
                    continue
                if world == 1:
                    what = f"looping {state}" if args.against is None else "both in turn"
                    progress(f"measuring {mode}, {what}, repeat {repeat + 1} of {args.repeats}")
                job = {"settings": args.settings, "against": args.against, "mode": mode, "looping": state,
                       "folder": folder, "steps": args.steps, "warmup": args.warmup}
                # A cache for each mode: the first repeat compiles from nothing, the later ones do not again.
                cache = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache_{mode}_{state}"}
                result = measure_apart(job, cache) if world == 1 else measure(job)
                if "bad_input" in result:
                    raise BadInput(result["bad_input"])
                results[mode, state].append(result)
    return results


def train(args, argv):
    """`bench.py train`; returns the exit code."""
    s, world = Session.settings(args.settings), int(os.environ.get("WORLD_SIZE", 1))
    jobs = train_jobs(args, s, world)
    states = Session.states(s)
    results = train_results(args, s, jobs, world)
    rows = [make_pair_row(mode, results[mode, state]) if args.against is not None else
            make_row(mode, state if len(states) > 1 else None, states[state][1], results[mode, state],
                     args.peak_tflops) for mode, state in jobs]
    if os.environ.get("RANK", "0") == "0":
        report = {"command": shlex.join(["tools/bench.py", "train", *argv]), "settings": s.text(),
                  "settings_hash": s.sha256(), **dict(zip(("commit", "changed_files"), commit())),
                  "steps": args.steps, "warmup": args.warmup, "repeats": args.repeats}
        if args.against is not None:
            report["against"] = Session.settings(args.against).text()
        if good := [result[0] for result in results.values() if "error" not in result[0]]:
            facts = good[0]["facts"]
            peak = peak_flops(facts["device"], facts["dtype"], args.peak_tflops)
            report |= {**facts, "torch": good[0]["torch"], "threads": good[0]["threads"],
                       "peak_tflops": peak and peak / 1e12}
        report["rows"] = rows
        if args.json:
            write_json(args.json, report)
        print("\n".join([*header(report), "", *table(rows)]), flush=True)
    return int(any("error" in row for row in rows))


COMMANDS = {"train": (train_arguments, train)} | {  # how its words are read, and what runs then
    name: (module.arguments, module.run)
    for name, module in (("pack", bench_pack), ("eval", bench_eval), ("validity", bench_validity))}


def main(argv):
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    return exit_code(partial(command, argv), quiet=os.environ.get("RANK", "0") != "0")


def command(argv):
    if argv[:1] == ["--job"]:
        return run_job(argv[1])
    if argv[:1] == [] or argv[0] not in COMMANDS:
        found = f"{argv[0]!r} is no command" if argv else "a command is missing"
        raise BadInput(f"{found}; there is: {', '.join(COMMANDS)}; see bench.py --help")
    (read, run), words = COMMANDS[argv[0]], argv[1:]
    args = read(words)
    check_json(args.json)
    with trainer_errors():
        return run(args, words)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder is removed
    sys.exit(main(sys.argv[1:]))
