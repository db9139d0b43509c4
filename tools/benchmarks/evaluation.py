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
import time
from collections import defaultdict, deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import train_gpt as trainer
from benchmarks import harness
from benchmarks.weights import Artifact
from common import BadInput, names_of, whole
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


# ---- the trainer ----------------------------------------------------------------------------------------------------


class Notes:
    """A log that is kept in memory."""

    def __init__(self):
        self.events = defaultdict(list)  # {event: [its values each time]}

    def __call__(self, event, text=None, **values):
        self.events[event].append(values)

    def progress(self, *words):
        """No progress bar."""


class Scoring(Artifact):
    """An artifact and the text that it is scored on, as run_phases() and evaluate() of the trainer do it."""

    def __init__(self, path, words):
        super().__init__(path, words)
        self.load_text()
        self.documents = len(trainer.document_ranges(self.val))

    def settings(self, text):
        """Settings of the command line, then of a row, scaled to the text where neither sets them."""
        s = super().settings(text)
        windows_of_part = max(len(self.val.bytes) // 32 // s.eval_seq_len, 1)
        part = min(windows_of_part * s.eval_seq_len, 32768)
        scaled = {
            "ttt_chunk_tokens": part,
            "ttt_group_docs": min(max(self.documents // 8, 1), 512),
            "mixer_min_tokens": min(10000, part),
        }
        default = trainer.Settings()
        free = {name: value for name, value in scaled.items() if getattr(s, name) == getattr(default, name)}
        return dataclasses.replace(s, **free)

    def start(self, s):
        """A stand-in for the trainer's Run, which would write files."""
        clock = trainer.Clock(self.rt.sync)
        validity = trainer.Validity()
        return SimpleNamespace(s=s, rt=self.rt, attend=self.attend, clock=clock, validity=validity, log=Notes())

    def begin(self, run, model):
        """(predictor, reader) of a run, ready to be scored: as evaluate() does it."""
        s = run.s
        temperature = s.eval_temperature or model.temperature
        if temperature is None:
            raise BadInput(f"EVAL_TEMPERATURE=0, but {self.path} was written without a fitted one; give one")
        run.validity.freeze()
        if s.ttt == "before":
            trainer.train_on_validation(run, model, self.val)
        predictor = trainer.make_predictor(model, s, self.rt, len(self.val.bytes), temperature)
        run.validity.need(not predictor.invalid_reason, predictor.invalid_reason)
        return predictor, trainer.reader_for(predictor, self.val, s, self.rt)


def count_gradients(predictor):
    """A list that grows by the number of tokens whenever a gradient goes through them, in a predictor or its bases."""
    counted = []

    def counting(inner, tokens_of):
        def call(first, *rest):
            counted.append(tokens_of(first))
            return inner(first, *rest)

        return call

    def tokens_of_chunk(chunk):  # of the last one of a batch document adapters do not learn
        return chunk.inputs.ids.numel() if chunk.continuing else 0

    while predictor:
        if predictor.adaptation:
            predictor.adaptation._loss = counting(predictor.adaptation._loss, lambda ids: ids.numel())
        if isinstance(predictor, trainer.DocumentAdapters):
            predictor.observe = counting(predictor.observe, tokens_of_chunk)
        predictor = getattr(predictor, "base", None)
    return counted


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure_predictor(job):
    """The job of a row of ROWS: its score, and what that took."""
    scoring = Scoring(job["artifact"], job["words"])
    rt = scoring.rt
    run = scoring.start(scoring.settings(job["settings"]))
    predictor, reader = scoring.begin(run, scoring.load_model(scoring.path, scoring.settings("")))
    began = time.perf_counter()
    graphs = trainer.warm_up_scoring(run, predictor, reader) if rt.compiled else None
    warmup = time.perf_counter() - began
    gradients = count_gradients(predictor)
    cuda = rt.device.type == "cuda"
    if cuda:
        memory_before = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats(rt.device)
    else:
        _, memory_before = harness.usage()
    # Unchecked: whole distributions are looked at in 1 of 64 chunks, and in short texts far more often.
    seconds = np.zeros(2)
    with timed(rt, seconds):
        score = trainer.score(predictor, reader, scoring.val, rt, run.validity, check_every=0)
    return {
        **score._asdict(),
        "reasons": run.validity.reasons,
        "seconds": float(seconds[0]),
        "cpu_seconds": None if cuda else float(seconds[1]),
        "forwarded_per_token": reader.forwarded / score.tokens,
        "gradients_per_token": sum(gradients) / score.tokens,
        "memory_before_mib": memory_before,
        "peak_memory_mib": rt.peak_memory_mib() if cuda else harness.usage()[1],
        "graphs": graphs,
        "recompiles": trainer.graphs_so_far() - graphs if rt.compiled else None,
        "warmup_seconds": warmup if rt.compiled else None,
    }


@contextlib.contextmanager
def timed(rt, seconds):
    """Add the seconds of the clock and of the CPU that are spent inside to these two."""
    rt.sync()
    began = time.perf_counter(), time.process_time()
    yield
    rt.sync()
    seconds += np.subtract((time.perf_counter(), time.process_time()), began)


def measure_counts(job):
    """The job of a row of COUNTS: the tables of a mixer without a model, updated with each part after it was scored.
    On a CPU the times are CPU time of one thread.
    """
    scoring = Scoring(job["artifact"], job["words"])
    rt = scoring.rt
    val = scoring.val
    s = scoring.settings(job["settings"])
    on_cpu = int(rt.device.type == "cpu")
    if on_cpu:
        torch.set_num_threads(1)
    exact = s.mixer == "backoff"
    mixer = trainer.wrap_predictor(trainer.Predictor(), s, rt, len(val.bytes))
    scoring_seconds, update_seconds = np.zeros((2, 2))
    nats = 0.0
    for part in trainer.Reader(val, s, rt, s.ttt_chunk_tokens, mixer.history):
        for chunk in part.chunks:
            with timed(rt, scoring_seconds):
                if exact:  # by the longest order
                    contexts, grams = mixer.nodes_of_targets(chunk.inputs, chunk.targets)
                    p = mixer.counts.backoff_probabilities(contexts, grams)[-1]
                else:
                    p = mixer.shares(chunk.inputs.recent, chunk.targets)
            nats -= p.clamp(min=1e-300).log()[chunk.index >= 0].sum().item()
        with timed(rt, update_seconds):
            mixer.learn(part, val)
    if exact:
        in_use = mixer.counts.table.contents > 0
        tables = [*vars(mixer.counts).values(), mixer.counts.table.contents]
    else:
        tables = vars(mixer).values()
    return {
        "tokens": len(val.bytes),
        "part_tokens": s.ttt_chunk_tokens,
        "score_seconds": float(scoring_seconds[on_cpu]),
        "update_seconds": float(update_seconds[on_cpu]),
        "table_mib": sum(table.nbytes for table in tables if isinstance(table, torch.Tensor)) / 2**20,
        "ngrams": int(in_use.sum()) if exact else None,
        "load": in_use.double().mean().item() if exact else len(val.bytes) / s.ngram_buckets,
        "bpb": nats / math.log(2) / int(val.bytes.sum()) if exact else None,
    }


def forwards(name, documents):
    """Tokens that a row forwards for each that it scores, eager and compiled, in the contest's shape, on documents as
    long as FineWeb's. Nothing is forwarded, the text is only cut.
    """
    val = synthetic_text(documents)
    text = filled(name, CONTEST_WINDOW)
    s = trainer.Settings.parse([f"EVAL_SEQ_LEN={CONTEST_WINDOW}", "DEVICE=cpu", *PLAIN.split(), *text.split()], {})
    rt = trainer.Runtime(s, {})
    row = {"table": "forwards", "row": name, "settings": text}
    for key, compiled in (("forwarded_per_token", False), ("compiled_forwarded_per_token", True)):
        rt.compiled = compiled
        reader = trainer.Reader(val, s, rt)
        for part in reader:
            deque(part.chunks, maxlen=0)
        row[key] = reader.forwarded / len(val.bytes)
    return row


def synthetic_text(documents):
    """A validation stream of `documents` documents. Only where they begin means anything."""
    ends = np.cumsum(harness.document_lengths(np.random.default_rng(1337), documents))
    tokens = torch.full((int(ends[-1]) + 1,), trainer.BOS + 1, dtype=torch.int32)
    tokens[np.append(0, ends[:-1])] = trainer.BOS
    return trainer.unmeasured_text(tokens)


def filled(name, window):
    """Settings of a row on top of PLAIN, for windows of this length."""
    return (ROWS | COUNTS)[name].format(stride=max(window // SLIDING, 1), chunk=min(CONTEST_CHUNK, window))


RATES = {
    "seconds": "tokens_per_second",
    "cpu_seconds": "tokens_per_cpu_second",
    "score_seconds": "score_tokens_per_second",
    "update_seconds": "update_tokens_per_second",
}


def merge(results):
    """What a row has of the results of its repeats."""
    row = dict(results[0])
    for key, rate_key in RATES.items():
        if row.get(key) is not None:
            row[rate_key] = harness.median_and_range([result["tokens"] / max(result[key], 1e-9) for result in results])
            row[key] = statistics.median(result[key] for result in results)
    if "peak_memory_mib" in row:
        row["peak_memory_mib"] = max(result["peak_memory_mib"] for result in results)
    return {**row, "repeats": results}


# ---- the report -----------------------------------------------------------------------------------------------------


def rates(heading, key):
    """Two columns: the median, and from least to most."""
    def span(row):
        if row.get(key) is None or len(row["repeats"]) == 1:
            return ""
        _, least, most = row[key]
        return f"({least:,.0f}-{most:,.0f})"

    return Column(heading, lambda row: row.get(key) and row[key][0], ",.0f"), Column("(least-most)", span, "")


SETTINGS = Column("settings", lambda row: f"`{row['settings']}`" if row["settings"] else "")
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
    SETTINGS,
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
    SETTINGS,
)


def document(report):
    """Lines of the report."""
    r = report
    yield from r.title()
    yield (f"weights   {r['artifact']}: {r['parameters']:,} parameters; on {r['device']}, {r['dtype']}, attention "
           f"{r['attention']}, {'compiled' if r['compiled'] else 'eager'}, {r.software()}")
    yield from text_lines(r)
    before = max((row.get("memory_before_mib", 0) for row in r.table("predictors")), default=0)
    yield from section(
        "Predictors\n\nforwards: tokens forwarded to score one; gradients: tokens that a gradient went through to "
        f"learn from one. Medians of {r['repeats']} process(es), without compilation and without checks of the sums. "
        f"Peak memory is that of the process ({before:,.0f} MiB at most before anything is scored), on CUDA what torch "
        f"allocated. Settings: on top of `{PLAIN}`.", PREDICTORS, r.table("predictors"))
    counted = next((row for row in r.table("counts") if "tokens" in row), {"tokens": 0, "part_tokens": 0})
    yield from section(
        f"Counts alone\n\n{counted['tokens']:,} targets in parts of {counted['part_tokens']:,}, each scored and then "
        "counted. On a CPU the times are CPU time of one thread. Load: of exact tables the share of slots in use, of "
        "hashed ones increments a bucket. BPB alone: of the longest order as a code of its own.",
        TABLES, r.table("counts"))
    yield from section(
        f"Forwards in the contest's shape\n\nWindows of {CONTEST_WINDOW:,}, chunks of {CONTEST_CHUNK}, "
        f"{r['shape_documents']:,} synthetic documents as long as FineWeb's in the mean (log-normal); cut, not "
        "forwarded. Compiled, rows are padded so that few graphs do.", FORWARDS, r.table("forwards"))


def text_lines(report):
    """The text that is scored, and what is scaled to it."""
    r = report
    apart = ""
    if "eval_stride" in r:
        apart = f", {r['eval_stride'] or r['eval_seq_len']:,} apart"
    yield (f"text      {r['tokens']:,} targets, {r['bytes']:,} bytes, {r['documents']} documents of {r['data']}, in "
           f"windows of {r['eval_seq_len']:,}{apart}; seed {r['seed']}")
    yield "scaled    " + " ".join(f"{name.upper()}={value}" for name, value in r["scaled"].items())


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments(argv):
    parser = harness.parser_of("eval", """Score an artifact in every way there is: tokens per second, forwards a token,
        memory, time and the score; and n-gram counts without a model. Where --rows, --counts or --documents say what is
        wanted, nothing else is measured.""", f"""Rows: {'; '.join(ROWS)}. Counts: {'; '.join(COUNTS)}.""")
    add = parser.add_argument
    add("artifact", metavar="ARTIFACT", help="artifact of train_gpt.py")
    add("settings", nargs="*", metavar="@FILE|KEY=VALUE", help="settings of train_gpt.py: DATA_PATH, EVAL_SEQ_LEN, "
        "COMPILE, TTT_LORA_LR, ... (how the text is read and what scores it is up to the rows)")
    add("--rows", type=names_of("--rows", ROWS, none=True), metavar="NAME,...",
        help="predictors (default: all), or none")
    add("--counts", type=names_of("--counts", COUNTS, none=True), metavar="NAME,...",
        help="counts alone (default: all), or none")
    add("--val-tokens", **harness.VAL_TOKENS)
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
    s = scoring.settings(PLAIN)
    return {
        "settings": trainer.Settings.parse(scoring.words, os.environ).text(),
        "artifact": scoring.path,
        "parameters": scoring.parameters,
        **harness.chosen(scoring.rt),
        "compiled": scoring.rt.compiled,
        "tokens": len(scoring.val.bytes),
        "bytes": int(scoring.val.bytes.sum()),
        "documents": scoring.documents,
        "data": Path(s.data_path).name,
        "eval_seq_len": s.eval_seq_len,
        "seed": s.seed,
        "scaled": {name: getattr(s, name) for name in ("ttt_chunk_tokens", "ttt_group_docs", "mixer_min_tokens")},
    }


def run(args):
    """`bench.py eval`; returns the Report."""
    row_words = [*args.settings, f"VAL_TOKENS={args.val_tokens}"]
    count_words = [*args.settings, f"VAL_TOKENS={args.count_tokens}"]
    scoring = Scoring(args.artifact, row_words)
    window = scoring.settings("").eval_seq_len
    jobs = {}
    for name in [*args.rows, *args.counts]:
        text = filled(name, window)
        scoring.settings(f"{PLAIN} {text}")  # BadInput before anything is measured
        jobs[name] = {"table": "predictors" if name in ROWS else "counts", "row": name, "settings": text}

    def measure_job(name, repeat):
        harness.progress(f"measuring {name}, repeat {repeat + 1} of {args.repeats}")
        work, words = (measure_predictor, row_words) if name in ROWS else (measure_counts, count_words)
        settings = f"{PLAIN} {jobs[name]['settings']}"
        job = {"folder": args.folder, "artifact": args.artifact, "words": words, "settings": settings}
        return harness.measure_apart(work, job)

    report = harness.Report(args, document, **facts(scoring), repeats=args.repeats, shape_documents=args.documents)
    with report:
        report.measure(jobs, args.repeats, measure_job, merge)
        for name in FORWARD_ROWS if args.documents else ():
            harness.progress(f"cutting {args.documents} documents for {name}")
            report.add(forwards(name, args.documents))
    return report
