"""How fast each way of scoring a model is, how often it forwards a token, and what it scores.

    python tools/bench.py eval model.pg @records/small.env                        every predictor, and counts alone
    python tools/bench.py eval model.pg @records/small.env --rows "contiguous,sliding,TTT=lora_docs cache" --repeats 3
    python tools/bench.py eval model.pg DATA_PATH=... EVAL_SEQ_LEN=2048 --rows none --json counts.json

A row is settings of train_gpt.py on top of those that are given (learning rates, EVAL_SEQ_LEN, COMPILE, DEVICE, ...), each
in a process of its own. So that a short text has as many parts as a long one, TTT_CHUNK_TOKENS, TTT_GROUP_DOCS and
MIXER_MIN_TOKENS are scaled down to it where they are not given. `bench.py eval --help` has the options.
"""

import contextlib
import dataclasses
import math
import os
import shlex
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common import (BadInput, Parser, commit, document_lengths, load_trainer, markdown, measure_apart, names_of,
                    progress, show, usage, whole, write_json)

PLAIN = "EVAL_STRIDE=0 EVAL_DOCS=0 EVAL_CONTEXT=window TTT=off MIXER=off TOKEN_BOOST=0"
SLIDING = 32  # strides in a window, as of 64 in 2,048
EXPERTS, TILT = "MIXER=hedge MIXER_EXPERTS=unigram,bigram,trigram,backoff", "TOKEN_BOOST=2.625"
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
    "hedge with backoff": EXPERTS,
    "hashed": "MIXER=hashed ALLOW_INVALID=1",
    "tilt": TILT,
    "cache + tilt + hedge": f"EVAL_CONTEXT=cache {TILT} {EXPERTS}",
    "TTT=full cache + tilt + hedge": f"TTT=full EVAL_CONTEXT=cache {TILT} {EXPERTS}",
    "TTT=lora_docs cache + tilt + hedge": f"{DOCS} EVAL_CONTEXT=cache {TILT} {EXPERTS}",
}
COUNTS = {f"{kind} {order}": f"MIXER={mixer} NGRAM_ORDER={order}"
          for kind, mixer in (("exact", "backoff"), ("hashed", "hashed ALLOW_INVALID=1")) for order in range(2, 11)
          if kind == "exact" or order in (2, 10)}
SHAPE = 2048, 48  # the contest's EVAL_SEQ_LEN and TTT_CHUNK_SIZE (#1855)
SHAPES = [name for name, text in ROWS.items() if not any(word in text for word in ("MIXER", "BOOST", "full", "WARM", "TTT=lora "))
          and name != "TTT=lora"]


# ---- the trainer ----------------------------------------------------------------------------------------------------


class Notes:
    """A log that is kept in memory."""

    def __init__(self):
        self.events = []

    def __call__(self, event, text=None, **values):
        self.events.append({"event": event, **values})

    def progress(self, *words):
        """Nobody looks."""


class Scoring:
    """An artifact and the text that it is scored on, as run_phases() and evaluate() of the trainer do it.

    Relied on: Settings.parse, .text and the fields named here; read_artifact, artifact_settings, load_artifact;
    Runtime, pick_attention, Clock, Validity with .freeze .need .reasons, train_on_validation, warm_up_scoring,
    graphs_so_far; load_tokenizer, load_validation, document_ranges; make_predictor, Reader with .forwarded, reader_for,
    score; of predictors .base .adaptation._loss and DocumentAdapters.observe; wrap_predictor around a bare Predictor:
    BackoffMixture with .learn .nodes_of_targets .counts, HashedMixture with .learn .shares.
    """

    def __init__(self, path, words):
        self.trainer, self.path, self.words = load_trainer(), str(path), words
        trainer = self.trainer
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
        """Those of the command line, then of a row, scaled to the text where they are nobody's choice."""
        trainer, tokens = self.trainer, len(self.val.bytes)
        s = trainer.Settings.parse([*self.words, *text.split()], os.environ)
        s = trainer.artifact_settings(self.path, self.header, s)
        part = min(max(tokens // 32 // s.eval_seq_len, 1) * s.eval_seq_len, 32768)
        scaled = {"ttt_chunk_tokens": part, "mixer_min_tokens": min(10000, part),
                  "ttt_group_docs": min(max(self.documents // 8, 1), 512)}
        default = trainer.Settings()
        return dataclasses.replace(s, **{name: value for name, value in scaled.items()
                                         if getattr(s, name) == getattr(default, name)})

    def model(self):
        return self.trainer.load_artifact(self.path, self.settings(""), self.rt.dtype, self.attend, self.rt.device)[1]

    def start(self, s):
        """What the trainer's functions take for a run, without the files that one writes."""
        return SimpleNamespace(s=s, rt=self.rt, attend=self.attend, clock=self.trainer.Clock(self.rt.sync),
                               validity=self.trainer.Validity(), log=Notes())

    def begin(self, run, model):
        """(predictor, reader) of a run, ready to be scored: as evaluate() does it."""
        trainer, rt, val, s = self.trainer, self.rt, self.val, run.s
        if s.eval_temperature == 0 and model.temperature is None:
            raise BadInput(f"EVAL_TEMPERATURE=0, but {self.path} was written without a fitted one; give one")
        run.validity.freeze()
        if s.ttt == "before":
            trainer.train_on_validation(run, model, val)
        predictor = trainer.make_predictor(model, s, rt, len(val.bytes), s.eval_temperature or model.temperature)
        run.validity.need(not predictor.invalid, predictor.invalid)
        return predictor, trainer.reader_for(predictor, val, s, rt)


def count_gradients(predictor, trainer):
    """A list that gets the number of tokens whenever a gradient goes through them, in a predictor or what it is over."""
    found = []
    while predictor:
        if adaptation := getattr(predictor, "adaptation", None):
            def loss(x, *rest, of=adaptation._loss):
                found.append(x.numel())
                return of(x, *rest)

            adaptation._loss = loss
        if isinstance(predictor, trainer.DocumentAdapters):
            def observe(chunk, of=predictor.observe):
                found.append(chunk.inputs.ids.numel() * (chunk.continuing > 0))
                of(chunk)

            predictor.observe = observe
        predictor = getattr(predictor, "base", None)
    return found


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(job):
    """One job in this process: a row of ROWS or of COUNTS."""
    scoring = Scoring(job["artifact"], job["words"])
    return (measure_counts if job["eval"] == "counts" else measure_predictor)(scoring, job["row"])


def measure_predictor(scoring, text):
    import torch

    trainer, rt, run = scoring.trainer, scoring.rt, scoring.start(scoring.settings(text))
    predictor, reader = scoring.begin(run, scoring.model())
    began = time.perf_counter()
    graphs = trainer.warm_up_scoring(run, predictor, reader) if rt.compiled else None
    warmup, cuda = time.perf_counter() - began, rt.device.type == "cuda"
    gradients, memory = count_gradients(predictor, trainer), usage()[1]
    if cuda:
        memory = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats(rt.device)
    rt.sync()
    wall, cpu = time.perf_counter(), time.process_time()
    # Unchecked: whole distributions are looked at in 1 of 64 chunks, and in short texts far more often.
    found = trainer.score(predictor, reader, scoring.val, rt, run.validity, check_every=0)
    rt.sync()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"tokens": found.tokens, "bytes": found.bytes, "loss": found.loss, "bpb": found.bpb,
            "reasons": run.validity.reasons, "seconds": wall, "cpu_seconds": None if cuda else cpu,
            "forwarded_per_token": reader.forwarded / found.tokens, "gradients_per_token": sum(gradients) / found.tokens,
            "memory_before_mib": memory, "peak_memory_mib": rt.peak_memory_mib() if cuda else usage()[1], "graphs": graphs,
            "recompiles": trainer.graphs_so_far() - graphs if rt.compiled else None,
            "warmup_seconds": warmup if rt.compiled else None}


def measure_counts(scoring, text):
    """The tables of a mixer without a model: update with each part after it was scored. On a CPU by one thread."""
    import torch

    trainer, rt, val, s = scoring.trainer, scoring.rt, scoring.val, scoring.settings(text)
    if rt.device.type == "cpu":
        torch.set_num_threads(1)
    exact = s.mixer == "backoff"
    mixer = trainer.wrap_predictor(trainer.Predictor(), s, rt, len(val.bytes))
    seconds, nats = {"score": 0.0, "update": 0.0}, 0.0
    clock = time.process_time if rt.device.type == "cpu" else time.perf_counter

    @contextlib.contextmanager
    def timed(what):
        rt.sync()
        began = clock()
        yield
        rt.sync()
        seconds[what] += clock() - began

    for part in trainer.Reader(val, s, rt, s.ttt_chunk_tokens, mixer.history):
        for chunk in part.chunks:
            with timed("score"):
                if exact:
                    contexts, grams = mixer.nodes_of_targets(chunk.inputs, chunk.targets)
                    p = mixer.counts.backoff_probabilities(contexts, grams)[-1]
                else:
                    p = mixer.shares(chunk.inputs.recent, chunk.targets)
            nats -= p.clamp(min=1e-300).log()[chunk.index >= 0].sum().item()
        with timed("update"):
            mixer.learn(part, val)
    owner = mixer.counts if exact else mixer
    tables = [z for z in [*vars(owner).values(), *([owner.table.keys] if exact else [])] if isinstance(z, torch.Tensor)]
    return {"tokens": len(val.bytes), "part_tokens": s.ttt_chunk_tokens, "score_seconds": seconds["score"],
            "update_seconds": seconds["update"], "table_mib": sum(z.numel() * z.element_size() for z in tables) / 2**20,
            "ngrams": int((owner.table.keys > 0).sum()) if exact else None,
            "load": (owner.table.keys > 0).double().mean().item() if exact else len(val.bytes) / s.ngram_buckets,
            "bpb": nats / math.log(2) / int(val.bytes.sum()) if exact else None}


def forwards(name, documents):
    """{"forwarded_per_token", "compiled_forwarded_per_token"} of a row in the contest's shape, on documents as long as
    FineWeb's: nothing is forwarded, only cut.
    """
    import torch

    trainer, (length, chunk), found = load_trainer(), SHAPE, {"row": name}
    starts = np.cumsum(document_lengths(np.random.default_rng(1337), documents))
    tokens = torch.full((int(starts[-1]) + 1,), trainer.BOS + 1, dtype=torch.int32)
    tokens[np.append(0, starts[:-1])] = trainer.BOS
    val = trainer.ValStream(tokens, torch.ones(len(tokens) - 1, dtype=torch.int16), False)
    s = trainer.Settings.parse([f"EVAL_SEQ_LEN={length}", "DEVICE=cpu", *filled(name, length, chunk).split()], {})
    rt = trainer.Runtime(s, {})
    for key, rt.compiled in (("forwarded_per_token", False), ("compiled_forwarded_per_token", True)):
        reader = trainer.Reader(val, s, rt)
        for part in reader:
            for _ in part.chunks:
                pass
        found[key] = reader.forwarded / len(val.bytes)
    return found


def filled(name, length, chunk=SHAPE[1]):
    """Settings of a row, at a length of windows."""
    text = {**ROWS, **COUNTS}[name].format(stride=max(length // SLIDING, 1), chunk=min(chunk, length))
    return f"{PLAIN} {text}".strip()


def spread(values):
    """(median, least, most) of all repeats."""
    return statistics.median(values), min(values), max(values)


def merged(row, results):
    """A row of the report from its repeats."""
    if errors := [result["error"] for result in results if "error" in result]:
        return {**row, "error": errors[0]}
    first, rates = results[0], {}
    for key in ("seconds", "cpu_seconds", "score_seconds", "update_seconds"):
        if first.get(key) is not None:
            name = {"seconds": "tokens_per_second", "cpu_seconds": "tokens_per_cpu_second"}.get(key) or key.replace(
                "seconds", "tokens_per_second")
            rates[name] = spread([result["tokens"] / max(result[key], 1e-9) for result in results])
            rates[key] = statistics.median(result[key] for result in results)
    peak = {"peak_memory_mib": max(result["peak_memory_mib"] for result in results)} if "peak_memory_mib" in first else {}
    return {**row, **first, **rates, **peak, "repeats": results}


# ---- the report -----------------------------------------------------------------------------------------------------


def rate(row, key):
    """Two cells: the median, and from least to most."""
    if row.get(key) is None:
        return "-", ""
    middle, least, most = row[key]
    return f"{middle:,.0f}", f"({least:,.0f}-{most:,.0f})" if len(row["repeats"]) > 1 else ""


PREDICTORS = ("predictor", "BPB", "valid", "tokens/s", "(least-most)", "tokens/CPU s", "(least-most) ", "forwards", "gradients",
              "seconds", "peak MiB", "graphs", "recompiles", "settings")
TABLES = ("counts", "update, tokens/s", "(least-most)", "score, tokens/s", "(least-most) ", "tables, MiB", "n-grams", "load",
          "BPB alone")
FORWARDS = ("predictor", "forwards, eager", "forwards, compiled", "settings")
TEXT = ("predictor", "valid", "settings", "counts")


def predictor_line(row):
    if "error" in row:
        return row["row"], f"failed: {row['error']}"
    return (row["row"], show(row["bpb"], ".4f"), "no" if row["reasons"] else "yes", *rate(row, "tokens_per_second"),
            *rate(row, "tokens_per_cpu_second"), show(row["forwarded_per_token"], ".2f"), show(row["gradients_per_token"], ".2f"),
            show(row["seconds"], ",.1f"), show(row["peak_memory_mib"]), show(row["graphs"]), show(row["recompiles"]),
            f"`{row['settings']}`" if row["settings"] else "")


def counts_line(row):
    if "error" in row:
        return row["row"], f"failed: {row['error']}"
    return (row["row"], *rate(row, "update_tokens_per_second"), *rate(row, "score_tokens_per_second"), show(row["table_mib"]),
            show(row["ngrams"]), show(row["load"], ".2f"), show(row["bpb"], ".3f"))


def document(report):
    r, changed = report, f" and {report['changed_files']} changed file(s)" if report["changed_files"] else ""
    yield f"command   {r['command']}"
    yield f"settings  {r['settings'] or '(default)'}"
    yield (f"weights   {r['artifact']}: {r['parameters']:,} parameters; on {r['device']}, {r['dtype']}, attention "
           f"{r['attention']}, {'compiled' if r['compiled'] else 'eager'}, torch {r['torch']}, {r['threads']} CPU thread(s), "
           f"commit {r['commit']}{changed}")
    yield (f"text      {r['tokens']:,} targets, {r['bytes']:,} bytes, {r['documents']} documents of {r['data']}, in windows of "
           f"{r['eval_seq_len']:,}; seed {r['seed']}")
    yield "scaled    " + " ".join(f"{name.upper()}={value}" for name, value in r["scaled"].items())
    if r["predictors"]:
        before = [row["memory_before_mib"] for row in r["predictors"] if "error" not in row]
        yield ("\n### Predictors\n\nforwards: tokens forwarded to score one; gradients: tokens that a gradient went through to "
               f"learn from one. Medians of {r['repeats']} process(es), without compilation and without checks of the sums. "
               f"Peak memory is that of the process ({max(before, default=0):,.0f} MiB at most before anything is scored), on "
               "CUDA what torch allocated. Settings: on top of "
               f"`{PLAIN}`.\n")
        yield from markdown(PREDICTORS, TEXT, map(predictor_line, r["predictors"]))
    if r["counts"]:
        some = next((row for row in r["counts"] if "error" not in row), {"tokens": 0, "part_tokens": 0})
        yield (f"\n### Counts alone\n\n{some['tokens']:,} targets in parts of {some['part_tokens']:,}, each scored and then "
               "counted. On a CPU the times are CPU time of one thread. Load: of exact tables the share of slots in use, of "
               "hashed ones increments a bucket. BPB alone: of the longest order as a code of its own.\n")
        yield from markdown(TABLES, TEXT, map(counts_line, r["counts"]))
    if r["forwards"]:
        yield (f"\n### Forwards in the contest's shape\n\nWindows of {SHAPE[0]:,}, chunks of {SHAPE[1]}, {r['shape_documents']:,} "
               "synthetic documents as long as FineWeb's in the mean (log-normal); cut, not forwarded. Compiled, rows are "
               "padded so that few graphs do.\n")
        yield from markdown(FORWARDS, TEXT, ((row["row"], show(row["forwarded_per_token"], ".2f"), show(
            row["compiled_forwarded_per_token"], ".2f"), f"`{filled(row['row'], *SHAPE).removeprefix(PLAIN).strip()}`")
            for row in r["forwards"]))


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments(argv):
    parser = Parser(prog="bench.py eval", allow_abbrev=False, description="""Score an artifact in every way there is: tokens
        per second, forwards a token, memory, time and the score; and n-gram counts without a model.""", epilog=f"""Rows:
        {'; '.join(ROWS)}. Counts: {'; '.join(COUNTS)}.""")
    add = parser.add_argument
    add("artifact", metavar="ARTIFACT", help="artifact of train_gpt.py")
    add("settings", nargs="*", metavar="@FILE|KEY=VALUE", help="settings of train_gpt.py: DATA_PATH, EVAL_SEQ_LEN, COMPILE, "
        "TTT_LORA_LR, ... (how the text is read and what scores it is up to the rows)")
    add("--rows", type=names_of("--rows", ROWS, none=True), default=list(ROWS), metavar="NAME,...",
        help="predictors (default: all), or none")
    add("--counts", type=names_of("--counts", COUNTS, none=True), default=list(COUNTS), metavar="NAME,...",
        help="counts alone (default: all), or none")
    add("--val-tokens", type=whole(1), default=65536, metavar="N", help="validation tokens of the rows (default: 65536)")
    add("--count-tokens", type=whole(1), default=1 << 20, metavar="N", help="validation tokens that are counted, if there are "
        "so many (default: 1048576)")
    add("--documents", type=whole(0), default=4000, metavar="N", help="synthetic documents on which forwards in the contest's "
        "shape are counted; 0: none (default: 4000)")
    add("--repeats", type=whole(1), default=1, metavar="N", help="processes for each row, in turn (default: 1)")
    add("--json", type=Path, metavar="FILE", help="write the result as JSON, anew after each measurement")
    return parser.parse_intermixed_args(argv)


def facts(scoring):
    """What all rows of a report share."""
    import torch

    trainer, rt, s = scoring.trainer, scoring.rt, scoring.settings(PLAIN)
    choices = {name: choice for name, choice, _ in rt.choices}
    return {"settings": trainer.Settings.parse(scoring.words, os.environ).text(),
            **dict(zip(("commit", "changed_files"), commit())), "artifact": scoring.path,
            "parameters": sum(math.prod(shape) for _, shape, *_ in scoring.header["tensors"]), "device": rt.device_name(),
            "dtype": str(rt.dtype).removeprefix("torch."), "attention": choices["attention"], "compiled": rt.compiled,
            "torch": torch.__version__, "threads": torch.get_num_threads(), "tokens": len(scoring.val.bytes),
            "bytes": int(scoring.val.bytes.sum()), "documents": scoring.documents, "data": Path(s.data_path).name,
            "eval_seq_len": s.eval_seq_len, "seed": s.seed,
            "scaled": {name: getattr(s, name) for name in ("ttt_chunk_tokens", "ttt_group_docs", "mixer_min_tokens")}}


def run(args, argv):
    """`bench.py eval`; returns the exit code."""
    words = [*args.settings, f"VAL_TOKENS={args.val_tokens}"]
    scoring = Scoring(args.artifact, words)
    length = scoring.settings("").eval_seq_len
    for name in [*args.rows, *args.counts]:
        scoring.settings(filled(name, length))  # what no row can take is said before anything is measured
    report = {"command": shlex.join(["tools/bench.py", "eval", *argv]), **facts(scoring), "repeats": args.repeats, "predictors": [], "counts": [], "forwards": [],
              "shape_documents": args.documents}
    jobs = [("predictors", name, words) for name in args.rows]
    jobs += [("counts", name, [*args.settings, f"VAL_TOKENS={args.count_tokens}"]) for name in args.counts]
    results = {name: [] for _, name, _ in jobs}

    def update():
        for part in ("predictors", "counts"):
            report[part] = [merged({"row": name, "settings": filled(name, length).removeprefix(PLAIN).strip()}, results[name])
                            for kind, name, _ in jobs if kind == part and results[name]]
        if args.json:
            write_json(args.json, report)

    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        for repeat in range(args.repeats):
            for kind, name, given in jobs:
                if any("error" in result for result in results[name]):
                    continue
                progress(f"measuring {name}, repeat {repeat + 1} of {args.repeats}")
                result = measure_apart({"folder": folder, "artifact": str(args.artifact), "words": given, "eval": kind,
                                        "row": filled(name, length)})
                if "bad_input" in result:
                    raise BadInput(result["bad_input"])
                results[name].append(result)
                update()
    for name in SHAPES if args.documents else ():
        progress(f"cutting {args.documents} documents for {name}")
        report["forwards"].append(forwards(name, args.documents))
        update()
    print("\n".join(document(report)), flush=True)
    return int(any("error" in row for part in ("predictors", "counts") for row in report[part]))
