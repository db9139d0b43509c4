"""Measures every way of scoring a model: tokens per second, forwards a token, memory, and the score itself.

A row is settings of train_gpt.py on top of those that are given (learning rates, EVAL_SEQ_LEN, COMPILE, DEVICE, ...),
each in a process of its own. So that a short text has as many parts as a long one, TTT_CHUNK_TOKENS, TTT_GROUP_DOCS and
MIXER_MIN_TOKENS are scaled down to it where they are not given.
"""

import contextlib
import dataclasses
import math
import os
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.harness import document_lengths, in_turn, measure_apart, usage
from benchmarks.reports import Report, add_val_tokens, errors_of, median_and_range, parser_of, progress
from benchmarks.weights import Artifact
from common import BadInput, load_trainer, names_of, whole
from tables import Column, section

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


class Scoring(Artifact):
    """An artifact and the text that it is scored on, as run_phases() and evaluate() of the trainer do it.

    Relied on, in addition to what Artifact relies on: Settings with the fields named here; Clock, Validity with .freeze
    .need .reasons, train_on_validation, warm_up_scoring, graphs_so_far; document_ranges; make_predictor, Reader with
    .forwarded, reader_for, score; of predictors .base .adaptation._loss and DocumentAdapters.observe; wrap_predictor
    around a bare Predictor: BackoffMixture with .learn .nodes_of_targets .counts, HashedMixture with .learn .shares.
    """

    def __init__(self, path, words):
        super().__init__(path, words)
        self.load_text()
        self.documents = len(self.trainer.document_ranges(self.val))

    def settings(self, text):
        """Settings of the command line, then of a row, scaled to the text where neither sets them."""
        s = self.plain_settings(text)
        tokens = len(self.val.bytes)
        windows_of_part = max(tokens // 32 // s.eval_seq_len, 1)
        part = min(windows_of_part * s.eval_seq_len, 32768)
        scaled = {
            "ttt_chunk_tokens": part,
            "ttt_group_docs": min(max(self.documents // 8, 1), 512),
            "mixer_min_tokens": min(10000, part),
        }
        default = self.trainer.Settings()
        free = [name for name in scaled if getattr(s, name) == getattr(default, name)]
        return dataclasses.replace(s, **{name: scaled[name] for name in free})

    def model(self):
        return self.load_model(self.path, self.settings(""))

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
    counted = []

    def count(owner, name, tokens_of):
        inner = getattr(owner, name)

        def call(first, *rest):
            counted.append(tokens_of(first))
            return inner(first, *rest)

        setattr(owner, name, call)

    def tokens_of_chunk(chunk):  # of the last one of a batch document adapters do not learn
        return chunk.inputs.ids.numel() if chunk.continuing > 0 else 0

    while predictor:
        if adaptation := getattr(predictor, "adaptation", None):
            count(adaptation, "_loss", lambda x: x.numel())
        if isinstance(predictor, trainer.DocumentAdapters):
            count(predictor, "observe", tokens_of_chunk)
        predictor = getattr(predictor, "base", None)
    return counted


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
                if exact:  # by the longest order
                    contexts, grams = mixer.nodes_of_targets(chunk.inputs, chunk.targets)
                    p = mixer.counts.backoff_probabilities(contexts, grams)[-1]
                else:
                    p = mixer.shares(chunk.inputs.recent, chunk.targets)
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
    row = {"table": "forwards", "row": name, "settings": shown_settings(text)}
    for key, compiled in (("forwarded_per_token", False), ("compiled_forwarded_per_token", True)):
        rt.compiled = compiled
        reader = trainer.Reader(val, s, rt)
        for part in reader:
            deque(part.chunks, maxlen=0)
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


def rates(heading, key):
    """Two columns: the median, and from least to most."""
    def span(row):
        if row.get(key) is None or len(row["repeats"]) == 1:
            return ""
        _, least, most = row[key]
        return f"({least:,.0f}-{most:,.0f})"

    return Column(heading, lambda row: row.get(key) and row[key][0], ",.0f"), Column("(least-most)", span, "")


def settings_cell(row):
    return f"`{row['settings']}`" if row["settings"] else ""


PREDICTORS = (
    Column("predictor", "row"),
    Column("BPB", "bpb", ".4f"),
    Column("valid", lambda row: "no" if row["reasons"] else "yes"),
    *rates("tokens/s", "tokens_per_second"),
    *rates("tokens/CPU s", "tokens_per_cpu_second"),
    Column("forwards", "forwarded_per_token", ".2f"),
    Column("gradients", "gradients_per_token", ".2f"),
    Column("seconds", "seconds", ",.1f"),
    Column("peak MiB", "peak_memory_mib", ",.0f"),
    Column("graphs", "graphs", ",.0f"),
    Column("recompiles", "recompiles", ",.0f"),
    Column("settings", settings_cell),
)
TABLES = (
    Column("counts", "row"),
    *rates("update, tokens/s", "update_tokens_per_second"),
    *rates("score, tokens/s", "score_tokens_per_second"),
    Column("tables, MiB", "table_mib", ",.0f"),
    Column("n-grams", "ngrams", ",.0f"),
    Column("load", "load", ".2f"),
    Column("BPB alone", "bpb", ".3f"),
)
FORWARDS = (
    Column("predictor", "row"),
    Column("forwards, eager", "forwarded_per_token", ".2f"),
    Column("forwards, compiled", "compiled_forwarded_per_token", ".2f"),
    Column("settings", settings_cell),
)


def document(report):
    """Lines of the report."""
    r = report
    yield from r.title()
    yield (f"weights   {r['artifact']}: {r['parameters']:,} parameters; on {r['device']}, {r['dtype']}, attention "
           f"{r['attention']}, {'compiled' if r['compiled'] else 'eager'}, {r.software()}")
    yield (f"text      {r['tokens']:,} targets, {r['bytes']:,} bytes, {r['documents']} documents of {r['data']}, "
           f"in windows of {r['eval_seq_len']:,}; seed {r['seed']}")
    yield scaled_line(r)
    yield from section(predictors_text(r), PREDICTORS, r.table("predictors"))
    yield from section(counts_text(r), TABLES, r.table("counts"))
    yield from section(
        f"Forwards in the contest's shape\n\nWindows of {CONTEST_WINDOW:,}, chunks of {CONTEST_CHUNK}, "
        f"{r['shape_documents']:,} synthetic documents as long as FineWeb's in the mean (log-normal); cut, not "
        "forwarded. Compiled, rows are padded so that few graphs do.", FORWARDS, r.table("forwards"))


def scaled_line(report):
    return "scaled    " + " ".join(f"{name.upper()}={value}" for name, value in report["scaled"].items())


def predictors_text(report):
    before = max((row.get("memory_before_mib", 0) for row in report.table("predictors")), default=0)
    return ("Predictors\n\nforwards: tokens forwarded to score one; gradients: tokens that a gradient went "
            f"through to learn from one. Medians of {report['repeats']} process(es), without compilation and without "
            f"checks of the sums. Peak memory is that of the process ({before:,.0f} MiB at most before anything is "
            f"scored), on CUDA what torch allocated. Settings: on top of `{PLAIN}`.")


def counts_text(report):
    measured = [row for row in report.table("counts") if "error" not in row]
    first = measured[0] if measured else {"tokens": 0, "part_tokens": 0}
    return (f"Counts alone\n\n{first['tokens']:,} targets in parts of {first['part_tokens']:,}, each scored and "
            "then counted. On a CPU the times are CPU time of one thread. Load: of exact tables the share of slots in "
            "use, of hashed ones increments a bucket. BPB alone: of the longest order as a code of its own.")


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments(argv):
    parser = parser_of("eval", """Score an artifact in every way there is: tokens per second, forwards a token, memory,
        time and the score; and n-gram counts without a model. Where --rows, --counts or --documents say what is wanted,
        nothing else is measured.""", f"""Rows: {'; '.join(ROWS)}. Counts: {'; '.join(COUNTS)}.""")
    add = parser.add_argument
    add("artifact", metavar="ARTIFACT", help="artifact of train_gpt.py")
    add("settings", nargs="*", metavar="@FILE|KEY=VALUE", help="settings of train_gpt.py: DATA_PATH, EVAL_SEQ_LEN, "
        "COMPILE, TTT_LORA_LR, ... (how the text is read and what scores it is up to the rows)")
    add("--rows", type=names_of("--rows", ROWS, none=True), metavar="NAME,...",
        help="predictors (default: all), or none")
    add("--counts", type=names_of("--counts", COUNTS, none=True), metavar="NAME,...",
        help="counts alone (default: all), or none")
    add_val_tokens(parser)
    add("--count-tokens", type=whole(1), default=1 << 20, metavar="N",
        help="validation tokens that are counted, if the text has them (default: 1048576)")
    add("--documents", type=whole(0), metavar="N", help="synthetic documents on which forwards in the contest's shape "
        "are counted; 0: none (default: 4000)")
    add("--repeats", type=whole(1), default=1, metavar="N", help="processes for each row, in turn (default: 1)")
    args = parser.parse_intermixed_args(argv)
    is_chosen = args.rows or args.counts or args.documents
    for name, everything, nothing in (("rows", list(ROWS), []), ("counts", list(COUNTS), []), ("documents", 4000, 0)):
        if getattr(args, name) is None:
            setattr(args, name, nothing if is_chosen else everything)
    if not (args.rows or args.counts or args.documents):
        parser.error("nothing is left to measure; name some --rows, --counts or --documents")
    return args


def facts(scoring):
    """What all rows of a report share."""
    trainer = scoring.trainer
    rt = scoring.rt
    s = scoring.settings(PLAIN)
    choices = {name: choice for name, choice, _ in rt.choices}
    return {
        "settings": trainer.Settings.parse(scoring.words, os.environ).text(),
        "artifact": scoring.path,
        "parameters": scoring.parameters,
        "device": rt.device_name(),
        "dtype": str(rt.dtype).removeprefix("torch."),
        "attention": choices["attention"],
        "compiled": rt.compiled,
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
    jobs = {name: (measure_predictor, row_words) for name in args.rows}
    jobs |= {name: (measure_counts, count_words) for name in args.counts}
    report = Report("eval", args, argv, document, **facts(scoring), repeats=args.repeats,
                    shape_documents=args.documents)
    with report, tempfile.TemporaryDirectory(prefix="bench_") as folder:

        def measure_job(name, repeat):
            progress(f"measuring {name}, repeat {repeat + 1} of {args.repeats}")
            work, words = jobs[name]
            job = {"folder": folder, "artifact": str(args.artifact), "words": words, "row": filled(name, window)}
            return measure_apart(work, job)

        for results in in_turn(jobs, args.repeats, measure_job):
            report.keep([merged(blank_row(name, window), results[name]) for name in jobs if name in results])
        for name in FORWARD_ROWS if args.documents else ():
            progress(f"cutting {args.documents} documents for {name}")
            report.add(forwards(name, args.documents))
    return report.code


def blank_row(name, window):
    table = "predictors" if name in ROWS else "counts"
    return {"table": table, "row": name, "settings": shown_settings(filled(name, window))}
