"""Measures every way of scoring a model: tokens per second, forwards a token, memory, and the score itself.

    python tools/bench.py eval model.pg @records/small.env                      every predictor, and counts alone
    python tools/bench.py eval model.pg @records/small.env --rows "contiguous,sliding,TTT=lora_docs cache" --repeats 3
    python tools/bench.py eval model.pg DATA_PATH=... EVAL_SEQ_LEN=2048 --rows none --json counts.json

A row is settings of train_gpt.py on top of those that are given (learning rates, EVAL_SEQ_LEN, COMPILE, DEVICE, ...),
each in a process of its own. So that a short text has as many parts as a long one, TTT_CHUNK_TOKENS, TTT_GROUP_DOCS and
MIXER_MIN_TOKENS are scaled down to it where they are not given. `bench.py eval --help` has the options.
"""

import contextlib
import dataclasses
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.harness import (
    command_line,
    commit,
    commit_text,
    document_lengths,
    errors_of,
    markdown,
    measure_apart,
    median_and_range,
    progress,
    show,
    usage,
    versions,
    write_json,
)
from common import BadInput, Parser, load_trainer, names_of, whole

PLAIN = "EVAL_STRIDE=0 EVAL_DOCS=0 EVAL_CONTEXT=window TTT=off MIXER=off TOKEN_BOOST=0"
SLIDING = 32  # strides in a window, as of 64 in 2,048
HEDGE_WITH_BACKOFF = "MIXER=hedge MIXER_EXPERTS=unigram,bigram,trigram,backoff"
TILT = "TOKEN_BOOST=2.625"
DOCS = "TTT=lora_docs TTT_CHUNK_SIZE={chunk}"
ROWS = {
    "contiguous": "",
    "sliding": "EVAL_STRIDE={stride}",
    "cache": "EVAL_CONTEXT=cache",
    "documents": "EVAL_DOCS=1",
    "documents sliding": "EVAL_DOCS=1 EVAL_STRIDE={stride}",
    "documents cache": "EVAL_DOCS=1 EVAL_CONTEXT=cache",
    "TTT=full": "TTT=full",
    "TTT=full sliding": "TTT=full EVAL_STRIDE={stride}",
    "TTT=full cache": "TTT=full EVAL_CONTEXT=cache",
    "TTT=lora": "TTT=lora",
    "TTT=lora cache": "TTT=lora EVAL_CONTEXT=cache",
    "TTT=lora_docs cache": f"{DOCS} EVAL_CONTEXT=cache",
    "TTT=lora_docs cache warm start": f"{DOCS} EVAL_CONTEXT=cache TTT_WARM_START_A=1",
    "TTT=lora_docs window": DOCS,
    "TTT=lora_docs window warm start": f"{DOCS} TTT_WARM_START_A=1",
    "backoff": "MIXER=backoff",
    "hedge": "MIXER=hedge",
    "hedge with backoff": HEDGE_WITH_BACKOFF,
    "hashed": "MIXER=hashed ALLOW_INVALID=1",
    "tilt": TILT,
    "cache + tilt + hedge": f"EVAL_CONTEXT=cache {TILT} {HEDGE_WITH_BACKOFF}",
    "TTT=full cache + tilt + hedge": f"TTT=full EVAL_CONTEXT=cache {TILT} {HEDGE_WITH_BACKOFF}",
    "TTT=lora_docs cache + tilt + hedge": f"{DOCS} EVAL_CONTEXT=cache {TILT} {HEDGE_WITH_BACKOFF}",
}
# Tables of n-grams without a model, by their longest order.
COUNTS = {f"exact {order}": f"MIXER=backoff NGRAM_ORDER={order}" for order in range(2, 11)}
COUNTS |= {f"hashed {order}": f"MIXER=hashed ALLOW_INVALID=1 NGRAM_ORDER={order}" for order in (2, 10)}
CONTEST_WINDOW = 2048  # the contest's EVAL_SEQ_LEN (#1855)
CONTEST_CHUNK = 48  # its TTT_CHUNK_SIZE
# Rows that differ in what they forward: windows, documents, a cache, and adapters of a document.
FORWARD_ROWS = ("contiguous", "sliding", "cache", "documents", "documents sliding", "documents cache",
                "TTT=lora_docs cache", "TTT=lora_docs window")
SCALED = ("ttt_chunk_tokens", "ttt_group_docs", "mixer_min_tokens")


# ---- the trainer ----------------------------------------------------------------------------------------------------


class Notes:
    """A log that is kept in memory."""

    def __init__(self):
        self.events = []

    def __call__(self, event, text=None, **values):
        self.events.append({"event": event, **values})

    def progress(self, *words):
        """No progress bar."""


class Scoring:
    """An artifact and the text that it is scored on, as run_phases() and evaluate() of the trainer do it.

    Relied on: Settings.parse, .text and the fields named here; read_artifact, artifact_settings, load_artifact;
    Runtime, pick_attention, Clock, Validity with .freeze .need .reasons, train_on_validation, warm_up_scoring,
    graphs_so_far; load_tokenizer, load_validation, document_ranges; make_predictor, Reader with .forwarded, reader_for,
    score; of predictors .base .adaptation._loss and DocumentAdapters.observe; wrap_predictor around a bare Predictor:
    BackoffMixture with .learn .nodes_of_targets .counts, HashedMixture with .learn .shares.
    """

    def __init__(self, path, words):
        trainer = self.trainer = load_trainer()
        self.path = str(path)
        self.words = words
        self.header = trainer.read_artifact(path)[0]
        s = trainer.artifact_settings(path, self.header, trainer.Settings.parse(words, os.environ))
        sp, _, self.digest = trainer.load_tokenizer(s)
        if self.header["tokenizer_sha256"] not in ("", self.digest):
            raise BadInput(f"{path} was trained with another tokenizer; set DATA_PATH or TOKENIZER_PATH")
        self.rt = trainer.Runtime(s)
        self.attend = trainer.pick_attention(s, self.rt)
        self.val = trainer.load_validation(s, self.rt, sp)
        self.documents = len(trainer.document_ranges(self.val))

    def settings(self, text):
        """Settings of the command line, then of a row, scaled to the text where neither sets them."""
        trainer = self.trainer
        tokens = len(self.val.bytes)
        s = trainer.Settings.parse([*self.words, *text.split()], os.environ)
        s = trainer.artifact_settings(self.path, self.header, s)
        windows_of_part = max(tokens // 32 // s.eval_seq_len, 1)
        part = min(windows_of_part * s.eval_seq_len, 32768)
        scaled = {
            "ttt_chunk_tokens": part,
            "ttt_group_docs": min(max(self.documents // 8, 1), 512),
            "mixer_min_tokens": min(10000, part),
        }
        default = trainer.Settings()
        free = [name for name in scaled if getattr(s, name) == getattr(default, name)]
        return dataclasses.replace(s, **{name: scaled[name] for name in free})

    def model(self):
        return self.trainer.load_artifact(self.path, self.settings(""), self.rt.dtype, self.attend, self.rt.device)[1]

    def start(self, s):
        """A stand-in for the trainer's Run, which would write files."""
        clock = self.trainer.Clock(self.rt.sync)
        validity = self.trainer.Validity()
        return SimpleNamespace(s=s, rt=self.rt, attend=self.attend, clock=clock, validity=validity, log=Notes())

    def begin(self, run, model):
        """(predictor, reader) of a run, ready to be scored: as evaluate() does it."""
        trainer = self.trainer
        s = run.s
        rt = self.rt
        val = self.val
        temperature = s.eval_temperature or model.temperature
        if temperature is None:
            raise BadInput(f"EVAL_TEMPERATURE=0, but {self.path} was written without a fitted one; give one")
        run.validity.freeze()
        if s.ttt == "before":
            trainer.train_on_validation(run, model, val)
        predictor = trainer.make_predictor(model, s, rt, len(val.bytes), temperature)
        run.validity.need(not predictor.invalid_reason, predictor.invalid_reason)
        return predictor, trainer.reader_for(predictor, val, s, rt)


def count_gradients(predictor, trainer):
    """A list that grows by the number of tokens whenever a gradient goes through them, in a predictor or its bases."""
    tokens = []
    while predictor:
        adaptation = getattr(predictor, "adaptation", None)
        if adaptation:
            count_loss(adaptation, tokens)
        if isinstance(predictor, trainer.DocumentAdapters):
            count_observe(predictor, tokens)
        predictor = getattr(predictor, "base", None)
    return tokens


def count_loss(adaptation, tokens):
    """Count the tokens of each loss of an adaptation."""
    inner = adaptation._loss

    def loss(x, *rest):
        tokens.append(x.numel())
        return inner(x, *rest)

    adaptation._loss = loss


def count_observe(predictor, tokens):
    """Count the tokens of each chunk from which document adapters learn: not of the last one of a batch."""
    inner = predictor.observe

    def observe(chunk):
        if chunk.continuing > 0:
            tokens.append(chunk.inputs.ids.numel())
        inner(chunk)

    predictor.observe = observe


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure_predictor(job):
    """The job of a row of ROWS: its score, and what that took."""
    import torch

    scoring = Scoring(job["artifact"], job["words"])
    trainer = scoring.trainer
    rt = scoring.rt
    run = scoring.start(scoring.settings(job["row"]))
    predictor, reader = scoring.begin(run, scoring.model())
    began = time.perf_counter()
    graphs = trainer.warm_up_scoring(run, predictor, reader) if rt.compiled else None
    warmup = time.perf_counter() - began
    gradients = count_gradients(predictor, trainer)
    cuda = rt.device.type == "cuda"
    if cuda:
        memory_before = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats(rt.device)
    else:
        _, memory_before = usage()
    rt.sync()
    wall_began = time.perf_counter()
    cpu_began = time.process_time()
    # Unchecked: whole distributions are looked at in 1 of 64 chunks, and in short texts far more often.
    score = trainer.score(predictor, reader, scoring.val, rt, run.validity, check_every=0)
    rt.sync()
    wall = time.perf_counter() - wall_began
    cpu = time.process_time() - cpu_began
    return {
        "tokens": score.tokens,
        "bytes": score.bytes,
        "loss": score.loss,
        "bpb": score.bpb,
        "reasons": run.validity.reasons,
        "seconds": wall,
        "cpu_seconds": None if cuda else cpu,
        "forwarded_per_token": reader.forwarded / score.tokens,
        "gradients_per_token": sum(gradients) / score.tokens,
        "memory_before_mib": memory_before,
        "peak_memory_mib": rt.peak_memory_mib() if cuda else usage()[1],
        "graphs": graphs,
        "recompiles": trainer.graphs_so_far() - graphs if rt.compiled else None,
        "warmup_seconds": warmup if rt.compiled else None,
    }


class Stopwatch:
    """Seconds by what was done in them: CPU time on a CPU, else time of the clock."""

    def __init__(self, rt):
        self.rt = rt
        self.clock = time.process_time if rt.device.type == "cpu" else time.perf_counter
        self.seconds = {"score": 0.0, "update": 0.0}

    @contextlib.contextmanager
    def __call__(self, what):
        self.rt.sync()
        began = self.clock()
        yield
        self.rt.sync()
        self.seconds[what] += self.clock() - began


def measure_counts(job):
    """The job of a row of COUNTS: the tables of a mixer without a model, updated with each part after it was scored.
    On a CPU by one thread.
    """
    import torch

    scoring = Scoring(job["artifact"], job["words"])
    trainer = scoring.trainer
    rt = scoring.rt
    val = scoring.val
    s = scoring.settings(job["row"])
    if rt.device.type == "cpu":
        torch.set_num_threads(1)
    exact = s.mixer == "backoff"
    mixer = trainer.wrap_predictor(trainer.Predictor(), s, rt, len(val.bytes))
    stopwatch = Stopwatch(rt)
    nats = 0.0
    for part in trainer.Reader(val, s, rt, s.ttt_chunk_tokens, mixer.history):
        for chunk in part.chunks:
            with stopwatch("score"):
                p = exact_shares(mixer, chunk) if exact else hashed_shares(mixer, chunk)
            nats -= p.clamp(min=1e-300).log()[chunk.index >= 0].sum().item()
        with stopwatch("update"):
            mixer.learn(part, val)
    return {
        "tokens": len(val.bytes),
        "part_tokens": s.ttt_chunk_tokens,
        "score_seconds": stopwatch.seconds["score"],
        "update_seconds": stopwatch.seconds["update"],
        **table_facts(mixer, exact, val, s),
        "bpb": nats / math.log(2) / int(val.bytes.sum()) if exact else None,
    }


def exact_shares(mixer, chunk):
    """Probability of each target by the longest order of exact counts."""
    contexts, grams = mixer.nodes_of_targets(chunk.inputs, chunk.targets)
    return mixer.counts.backoff_probabilities(contexts, grams)[-1]


def hashed_shares(mixer, chunk):
    """The "probability" of each target by hashed counts."""
    return mixer.shares(chunk.inputs.recent, chunk.targets)


def table_facts(mixer, exact, val, s):
    """Memory and contents of the tables of counts."""
    import torch

    if exact:
        in_use = mixer.counts.table.contents > 0
        tensors = [*vars(mixer.counts).values(), mixer.counts.table.contents]
        ngrams = int(in_use.sum())
        load = in_use.double().mean().item()
    else:
        tensors = vars(mixer).values()
        ngrams = None
        load = len(val.bytes) / s.ngram_buckets
    tables = [value for value in tensors if isinstance(value, torch.Tensor)]
    size = sum(value.numel() * value.element_size() for value in tables)
    return {"table_mib": size / 2**20, "ngrams": ngrams, "load": load}


def forwards(name, documents):
    """Tokens that a row forwards for each that it scores, eager and compiled, in the contest's shape, on documents as
    long as FineWeb's. Nothing is forwarded, the text is only cut.
    """
    trainer = load_trainer()
    val = synthetic_text(trainer, documents)
    text = filled(name, CONTEST_WINDOW, CONTEST_CHUNK)
    s = trainer.Settings.parse([f"EVAL_SEQ_LEN={CONTEST_WINDOW}", "DEVICE=cpu", *text.split()], {})
    rt = trainer.Runtime(s, {})
    row = {"row": name}
    for key, compiled in (("forwarded_per_token", False), ("compiled_forwarded_per_token", True)):
        rt.compiled = compiled
        reader = trainer.Reader(val, s, rt)
        for part in reader:
            for _ in part.chunks:
                pass
        row[key] = reader.forwarded / len(val.bytes)
    return row


def synthetic_text(trainer, documents):
    """A validation stream of `documents` documents. Only where they begin means anything."""
    import torch

    ends = np.cumsum(document_lengths(np.random.default_rng(1337), documents))
    starts = np.append(0, ends[:-1])
    tokens = torch.full((int(ends[-1]) + 1,), trainer.BOS + 1, dtype=torch.int32)
    tokens[starts] = trainer.BOS
    return trainer.ValStream(tokens, torch.ones(len(tokens) - 1, dtype=torch.int16), False)


def filled(name, window, chunk=CONTEST_CHUNK):
    """Settings of a row, for windows of this length."""
    text = (ROWS | COUNTS)[name]
    text = text.format(stride=max(window // SLIDING, 1), chunk=min(chunk, window))
    return f"{PLAIN} {text}".strip()


def shown_settings(text):
    """Settings of a row without those that all rows have."""
    return text.removeprefix(PLAIN).strip()


RATES = {
    "seconds": "tokens_per_second",
    "cpu_seconds": "tokens_per_cpu_second",
    "score_seconds": "score_tokens_per_second",
    "update_seconds": "update_tokens_per_second",
}


def merged(row, results):
    """A row of the report from its repeats."""
    if errors := errors_of(results):
        return {**row, "error": errors[0]}
    first = results[0]
    row = {**row, **first}
    for key, rate_key in RATES.items():
        if first.get(key) is not None:
            row[rate_key] = median_and_range([result["tokens"] / max(result[key], 1e-9) for result in results])
            row[key] = statistics.median(result[key] for result in results)
    if "peak_memory_mib" in first:
        row["peak_memory_mib"] = max(result["peak_memory_mib"] for result in results)
    row["repeats"] = results
    return row


# ---- the report -----------------------------------------------------------------------------------------------------


def rate(row, key):
    """Two cells: the median, and from least to most."""
    if row.get(key) is None:
        return "-", ""
    median, least, most = row[key]
    span = f"({least:,.0f}-{most:,.0f})" if len(row["repeats"]) > 1 else ""
    return f"{median:,.0f}", span


PREDICTORS = ("predictor", "BPB", "valid", "tokens/s", "(least-most)", "tokens/CPU s", "(least-most) ", "forwards",
              "gradients", "seconds", "peak MiB", "graphs", "recompiles", "settings")
TABLES = ("counts", "update, tokens/s", "(least-most)", "score, tokens/s", "(least-most) ", "tables, MiB", "n-grams",
          "load", "BPB alone")
FORWARDS = ("predictor", "forwards, eager", "forwards, compiled", "settings")
TEXT = ("predictor", "valid", "settings", "counts")


def predictor_line(row):
    if "error" in row:
        return row["row"], f"failed: {row['error']}"
    return (
        row["row"],
        show(row["bpb"], ".4f"),
        "no" if row["reasons"] else "yes",
        *rate(row, "tokens_per_second"),
        *rate(row, "tokens_per_cpu_second"),
        show(row["forwarded_per_token"], ".2f"),
        show(row["gradients_per_token"], ".2f"),
        show(row["seconds"], ",.1f"),
        show(row["peak_memory_mib"]),
        show(row["graphs"]),
        show(row["recompiles"]),
        f"`{row['settings']}`" if row["settings"] else "",
    )


def counts_line(row):
    if "error" in row:
        return row["row"], f"failed: {row['error']}"
    return (
        row["row"],
        *rate(row, "update_tokens_per_second"),
        *rate(row, "score_tokens_per_second"),
        show(row["table_mib"]),
        show(row["ngrams"]),
        show(row["load"], ".2f"),
        show(row["bpb"], ".3f"),
    )


def forwards_line(row):
    return (
        row["row"],
        show(row["forwarded_per_token"], ".2f"),
        show(row["compiled_forwarded_per_token"], ".2f"),
        f"`{shown_settings(filled(row['row'], CONTEST_WINDOW, CONTEST_CHUNK))}`",
    )


def document(report):
    """Lines of the report."""
    yield from header(report)
    if report["predictors"]:
        yield from predictors_section(report)
    if report["counts"]:
        yield from counts_section(report)
    if report["forwards"]:
        yield from forwards_section(report)


def header(report):
    r = report
    yield f"command   {r['command']}"
    yield f"settings  {r['settings'] or '(default)'}"
    yield (f"weights   {r['artifact']}: {r['parameters']:,} parameters; on {r['device']}, {r['dtype']}, attention "
           f"{r['attention']}, {'compiled' if r['compiled'] else 'eager'}, torch {r['torch']}, "
           f"{r['threads']} CPU thread(s), {commit_text(r)}")
    yield (f"text      {r['tokens']:,} targets, {r['bytes']:,} bytes, {r['documents']} documents of {r['data']}, "
           f"in windows of {r['eval_seq_len']:,}; seed {r['seed']}")
    yield scaled_line(r)


def scaled_line(report):
    return "scaled    " + " ".join(f"{name.upper()}={value}" for name, value in report["scaled"].items())


def predictors_section(report):
    measured = [row for row in report["predictors"] if "error" not in row]
    before = max((row["memory_before_mib"] for row in measured), default=0)
    yield ("\n### Predictors\n\nforwards: tokens forwarded to score one; gradients: tokens that a gradient went "
           f"through to learn from one. Medians of {report['repeats']} process(es), without compilation and without "
           f"checks of the sums. Peak memory is that of the process ({before:,.0f} MiB at most before anything is "
           f"scored), on CUDA what torch allocated. Settings: on top of `{PLAIN}`.\n")
    yield from markdown(PREDICTORS, TEXT, map(predictor_line, report["predictors"]))


def counts_section(report):
    measured = [row for row in report["counts"] if "error" not in row]
    first = measured[0] if measured else {"tokens": 0, "part_tokens": 0}
    yield (f"\n### Counts alone\n\n{first['tokens']:,} targets in parts of {first['part_tokens']:,}, each scored and "
           "then counted. On a CPU the times are CPU time of one thread. Load: of exact tables the share of slots in "
           "use, of hashed ones increments a bucket. BPB alone: of the longest order as a code of its own.\n")
    yield from markdown(TABLES, TEXT, map(counts_line, report["counts"]))


def forwards_section(report):
    yield (f"\n### Forwards in the contest's shape\n\nWindows of {CONTEST_WINDOW:,}, chunks of {CONTEST_CHUNK}, "
           f"{report['shape_documents']:,} synthetic documents as long as FineWeb's in the mean (log-normal); cut, not "
           "forwarded. Compiled, rows are padded so that few graphs do.\n")
    yield from markdown(FORWARDS, TEXT, map(forwards_line, report["forwards"]))


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments(argv):
    parser = Parser(prog="bench.py eval", allow_abbrev=False, description="""Score an artifact in every way there is:
        tokens per second, forwards a token, memory, time and the score; and n-gram counts without a model.""",
        epilog=f"""Rows: {'; '.join(ROWS)}. Counts: {'; '.join(COUNTS)}.""")
    add = parser.add_argument
    add("artifact", metavar="ARTIFACT", help="artifact of train_gpt.py")
    add("settings", nargs="*", metavar="@FILE|KEY=VALUE", help="settings of train_gpt.py: DATA_PATH, EVAL_SEQ_LEN, "
        "COMPILE, TTT_LORA_LR, ... (how the text is read and what scores it is up to the rows)")
    add("--rows", type=names_of("--rows", ROWS, none=True), default=list(ROWS), metavar="NAME,...",
        help="predictors (default: all), or none")
    add("--counts", type=names_of("--counts", COUNTS, none=True), default=list(COUNTS), metavar="NAME,...",
        help="counts alone (default: all), or none")
    add("--val-tokens", type=whole(1), default=65536, metavar="N",
        help="validation tokens of the rows (default: 65536)")
    add("--count-tokens", type=whole(1), default=1 << 20, metavar="N",
        help="validation tokens that are counted, if the text has them (default: 1048576)")
    add("--documents", type=whole(0), default=4000, metavar="N", help="synthetic documents on which forwards in the "
        "contest's shape are counted; 0: none (default: 4000)")
    add("--repeats", type=whole(1), default=1, metavar="N", help="processes for each row, in turn (default: 1)")
    add("--json", type=Path, metavar="FILE", help="write the result as JSON, anew after each measurement")
    return parser.parse_intermixed_args(argv)


def facts(scoring):
    """What all rows of a report share."""
    trainer = scoring.trainer
    rt = scoring.rt
    s = scoring.settings(PLAIN)
    choices = {name: choice for name, choice, _ in rt.choices}
    return {
        "settings": trainer.Settings.parse(scoring.words, os.environ).text(),
        **commit(),
        "artifact": scoring.path,
        "parameters": sum(math.prod(shape) for _, shape, *_ in scoring.header["tensors"]),
        "device": rt.device_name(),
        "dtype": str(rt.dtype).removeprefix("torch."),
        "attention": choices["attention"],
        "compiled": rt.compiled,
        **versions(),
        "tokens": len(scoring.val.bytes),
        "bytes": int(scoring.val.bytes.sum()),
        "documents": scoring.documents,
        "data": Path(s.data_path).name,
        "eval_seq_len": s.eval_seq_len,
        "seed": s.seed,
        "scaled": {name: getattr(s, name) for name in SCALED},
    }


def run(args, argv):
    """`bench.py eval`; returns the exit code."""
    row_words = [*args.settings, f"VAL_TOKENS={args.val_tokens}"]
    count_words = [*args.settings, f"VAL_TOKENS={args.count_tokens}"]
    scoring = Scoring(args.artifact, row_words)
    window = scoring.settings("").eval_seq_len
    for name in [*args.rows, *args.counts]:
        scoring.settings(filled(name, window))  # BadInput before anything is measured
    report = {
        "command": command_line("eval", argv),
        **facts(scoring),
        "repeats": args.repeats,
        "predictors": [],
        "counts": [],
        "forwards": [],
        "shape_documents": args.documents,
    }
    jobs = [("predictors", measure_predictor, name, row_words) for name in args.rows]
    jobs += [("counts", measure_counts, name, count_words) for name in args.counts]
    results = {name: [] for _, _, name, _ in jobs}

    def update():
        for part in ("predictors", "counts"):
            measured = [name for job_part, _, name, _ in jobs if job_part == part and results[name]]
            report[part] = [merged(blank_row(name, window), results[name]) for name in measured]
        write_json(args.json, report)

    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        for repeat in range(args.repeats):
            for _, work, name, words in jobs:
                if errors_of(results[name]):
                    continue
                progress(f"measuring {name}, repeat {repeat + 1} of {args.repeats}")
                job = {"folder": folder, "artifact": str(args.artifact), "words": words, "row": filled(name, window)}
                result = measure_apart(work, job)
                if "bad_input" in result:
                    raise BadInput(result["bad_input"])
                results[name].append(result)
                update()
    for name in FORWARD_ROWS if args.documents else ():
        progress(f"cutting {args.documents} documents for {name}")
        report["forwards"].append(forwards(name, args.documents))
        update()
    print("\n".join(document(report)), flush=True)
    return int(any("error" in row for row in [*report["predictors"], *report["counts"]]))


def blank_row(name, window):
    return {"row": name, "settings": shown_settings(filled(name, window))}
