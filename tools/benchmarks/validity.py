"""Measures four published scores that are no code length, next to what is left of each when it is made one.

Without an ARTIFACT the model is that of records/small.env, trained for a number of steps, not of seconds, so that a
machine trains the same one again, and kept as float16; with one nothing is trained. It is packed as the settings say,
which makes the artifact that all rows score; TTT=prequant trains the weights on the validation text first and packs
them then. (An ARTIFACT whose weights are rounded already is scored as it is, and has no such row.)

Every row is a few settings of train_gpt.py, run by its own functions with its own ledger and self-tests, so that
ALLOW_INVALID=1 and those settings give the same score in any run.
"""

import contextlib
import copy
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import train_gpt as trainer
from benchmarks import harness
from benchmarks.evaluation import Scoring, facts, text_lines
from common import ROOT, BadInput, names_of, whole
from tables import Column, markdown

DEMO = f"@{ROOT / 'records/small.env'}"
RAW = ("PHASES=train", "FIT=off", "MATRIX_QUANT=rtn", "MATRIX_BITS=16", "EMBED_QUANT=rtn", "EMBED_BITS=16",
       "SIZE_LIMIT=16000000")
LOAD = 62_021_632 / 4_194_304  # #1033: increments a bucket at the end, 14.8
STEPS_518 = 118  # gradient steps of an epoch in #518
EPOCHS_518 = 10  # epochs here; #518 has 50

PLAIN = "EVAL_DOCS=0 EVAL_CONTEXT=window TTT=off MIXER=off TOKEN_BOOST=0"
MOST_PROBABILITIES = 1 << 25  # that are looked at together


class Variant(NamedTuple):
    """A way to score the artifact."""

    what: str
    settings: str
    divided: bool = False  # its "probabilities" are divided by their sum over the vocabulary


ADAMW = "TTT_OPTIMIZER=adamw TTT_LR=0.0005 TTT_GRAD_CLIP=1 TTT_BATCH_SEQS={batch}"
COSINE = f"{ADAMW} TTT_LR_MULT_PROJ=3 TTT_LR_MULT_FC=0.5"
FLOOR = f"{ADAMW} TTT_MIN_LR=0.1"
HASHED = "MIXER=hashed NGRAM_BUCKETS={buckets}"
ENTROPY = "MIXER=hedge MIXER_EXPERTS=unigram,bigram,trigram,entropy"
DIVIDED = "the same, divided by its sum"
FIRST = "score-first, the same optimizer and"
# By the number of the pull request; the first variant of each is the published one.
STUDIES = {
    "1033": (
        Variant("hashed n-grams, as published", HASHED),
        Variant(DIVIDED, HASHED, divided=True),
        Variant("exact counts at the same weights", "MIXER=backoff"),
    ),
    "967": (
        Variant("hedge with the entropy expert, as published", ENTROPY),
        Variant(DIVIDED, ENTROPY, divided=True),
        Variant("hedge without that expert", "MIXER=hedge"),
    ),
    "518": (
        Variant("trained on the text before scoring", f"TTT=before {COSINE} TTT_EPOCHS={EPOCHS_518}"),
        Variant(f"{FIRST} epochs", f"TTT=full {COSINE} TTT_EPOCHS={EPOCHS_518}"),
        Variant(f"{FIRST} one epoch", f"TTT=full {COSINE} TTT_EPOCHS=1"),
    ),
    "1539": (
        Variant("trained on the text before packing", f"TTT=prequant {FLOOR} TTT_EPOCHS=6"),
        Variant(f"{FIRST} epochs", f"TTT=full {FLOOR} TTT_EPOCHS=6"),
        Variant(f"{FIRST} one epoch", f"TTT=full {FLOOR} TTT_EPOCHS=1"),
    ),
}
ALONE = Variant("the model alone", "")


# ---- the trainer ----------------------------------------------------------------------------------------------------


def train_demo(words, steps, folder):
    """Train by train_gpt.py as a command; returns the path of the artifact."""
    given = [*words, *RAW, f"ITERATIONS={steps}", "MAX_WALLCLOCK_SECONDS=0", "VAL_LOSS_EVERY=0"]
    command = [sys.executable, str(ROOT / "train_gpt.py"), *given, f"OUT_DIR={folder}/trained"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    path = Path(folder, "trained", "model.pg")
    if not path.exists():  # one that is over SIZE_LIMIT is kept
        *_, last = ["", *done.stderr.strip().splitlines()]
        raise BadInput(last.removeprefix("error: ") or f"train_gpt.py ended with exit code {done.returncode}")
    return path


class Divided(trainer.WrappingPredictor):
    """Another predictor's "probabilities", divided by their sum over all tokens, which it notes."""

    def __init__(self, base, s, rt):
        super().__init__(base, s, rt)
        self.invalid_reason = ""
        self.learns = base.learns
        self.sums = 0.0
        self.targets = 0

    def predict(self, inputs, count=None):
        return self.base.predict(inputs, count).double().log_softmax(-1)

    def nll(self, inputs, targets):
        undivided = self.base.nll(inputs, targets).double()
        self.log_sums = self.base.predict(inputs).double().logsumexp(-1)
        return undivided + self.log_sums

    def observe(self, chunk):
        log_sums = self.log_sums[chunk.index >= 0]
        self.sums += log_sums.exp().sum().item()
        self.targets += log_sums.numel()
        super().observe(chunk)

    def mean_sum(self):
        return self.sums / self.targets


def dividing():
    """A context in which the trainer, selftest() included, makes predictors that are divided by their sums."""
    make_predictor = trainer.make_predictor

    def make_divided(model, s, rt, *rest):
        return Divided(make_predictor(model, s, rt, *rest), s, rt)

    return mock.patch.object(trainer, "make_predictor", make_divided)


class Demonstration(Scoring):
    """The artifact that all rows score, and how each of them does it."""

    def __init__(self, path, words, folder):
        super().__init__(path, words)
        self.folder = folder
        self.raw = None
        if {entry.codec for entry in self.header["tensors"]} == {"float16"}:
            s = self.settings("")
            self.raw = self.load_model(path, s)
            if s.needs_curvature:
                self.calibrate(self.raw, s, s.gptq_calibration_tokens)
            self.path = self.pack(self.raw, s, "packed.pg")

    def settings(self, text):
        return super().settings(f"{PLAIN} {text} ALLOW_INVALID=1")

    def pack(self, model, s, name):
        """The artifact that the trainer makes of these weights."""
        path = f"{self.folder}/{name}"
        room = s.size_limit - (ROOT / "train_gpt.py").stat().st_size
        trainer.save_artifact(path, model, s, self.digest, None, self.curvature, room)
        return path

    def score(self, variant, text):
        """A row of the report."""
        s = self.settings(text)
        began = time.perf_counter()
        if variant.divided:  # it asks for every token at every place
            rows = max(MOST_PROBABILITIES // (s.eval_seq_len * s.vocab_size), 1)
            s = dataclasses.replace(s, eval_batch_seqs=min(s.eval_batch_seqs, rows))
        run = self.start(s)
        path = self.path
        if s.trains_before_packing:
            model = copy.deepcopy(self.raw)
            trainer.train_on_validation(run, model, self.val)
            path = self.pack(model, s, "prequant.pg")
        model = self.load_model(path, s)
        with dividing() if variant.divided else contextlib.nullcontext():
            predictor, reader = self.begin(run, model)
            if self.rt.compiled:
                trainer.warm_up_scoring(run, predictor, reader)
            score = trainer.score(predictor, reader, self.val, self.rt, run.validity, run.log)
            trainer.selftest(run, s, path, trainer.read_file(path), self.val)
        tests = run.log.events["selftest"]
        (sums,) = run.log.events["normalisation"]
        return {
            "loss": score.loss,
            "bpb": score.bpb,
            "valid": "no" if run.validity.reasons else "yes",
            "reasons": run.validity.reasons,
            "mean_sum": predictor.mean_sum() if variant.divided else None,
            "worst_log_sum": sums["worst_log"],
            "selftest": {event["test"]: event["off_by"] for event in tests},
            "failed": [event["test"] for event in tests if event["ok"] == "no"],
            "seconds": time.perf_counter() - began,
        }

    def row(self, study, variant):
        """A row of the report, whatever its variant needs."""
        text = filled(variant, self.settings(""), len(self.val.bytes))
        row = {"study": study, "what": variant.what, "settings": text}
        if "prequant" in text and self.raw is None:
            return row | {"skipped": "needs weights that are not rounded: an artifact of MATRIX_BITS=16 EMBED_BITS=16, "
                                     "or none"}
        harness.progress(f"scoring #{study} {variant.what}" if study else f"scoring {variant.what}")
        return row | self.score(variant, text)


def filled(variant, s, tokens):
    """Settings of a variant, scaled to a text of this many tokens."""
    buckets = max(round(tokens / LOAD), 2)
    batch = max(round(tokens / STEPS_518 / s.eval_seq_len), 1)
    return variant.settings.format(buckets=buckets, batch=batch)


# ---- the report -----------------------------------------------------------------------------------------------------


def tests_cell(row):
    return ", ".join(f"{name} ({row['selftest'][name]:.2g})" for name in row["failed"]) or "none"


def columns(alone):
    """The columns of the table; `alone` is the row of the model alone."""
    return (
        Column("of", lambda row: f"#{row['study']}" if row["study"] else ""),
        Column("what", "what"),
        Column("BPB", "bpb", ".4f"),
        Column("change", lambda row: "" if row is alone else f"{row['bpb'] - alone['bpb']:+.4f}", ""),
        Column("mean sum", lambda row: 1.0 if row["worst_log_sum"] < 1e-3 else row["mean_sum"], ".4g"),
        Column("tests that fail", tests_cell),
        Column("valid", lambda row: f"valid:{row['valid']}"),
        Column("condition broken", lambda row: row["reasons"][0] if row["reasons"] else ""),
        Column("seconds", "seconds", ",.0f"),
    )


def document(report):
    """Lines of the report."""
    r = report
    yield from r.title()
    yield f"weights   {r['parameters']:,} parameters, {r['weights']}; on {r['device']}, {r['dtype']}, {r.software()}"
    yield from text_lines(r)
    yield ""
    yield from markdown(columns(r["rows"][0]), r["rows"])
    yield ("\nmean sum: of the \"probabilities\" of all tokens, over all targets. Tests: flip, prefix and sum of "
           "#1017, off by (...).\n")
    for row in r["rows"]:
        if row["settings"]:
            yield f"- #{row['study']} {row['what']}: `{row['settings']}`"


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments(argv):
    parser = harness.parser_of("validity", """Score one artifact in ways that were published and are no code length, and
        in the nearest ways that are one.""", f"""Studies: {', '.join(STUDIES)}, the numbers of pull requests, each
        technique on its own and by the settings of its run. Scaled to the text: #1033's tables have the original's
        {LOAD:.1f} increments a bucket in the end; gradient steps before scoring are as many an epoch as #518's,
        {STEPS_518}, with {EPOCHS_518} epochs in place of its 50; parts are 1 / 32 of the text.""")
    add = parser.add_argument
    add("words", nargs="*", metavar="ARTIFACT|@FILE|KEY=VALUE", help="an artifact of float16 weights, which is not "
        "trained any more (default: train records/small.env); settings of train_gpt.py")
    add("--studies", type=names_of("--studies", STUDIES), default=list(STUDIES), metavar="NAME,...",
        help="default: all")
    add("--steps", type=whole(1), default=400, metavar="N", help="training steps without an artifact (default: 400)")
    add("--val-tokens", **harness.VAL_TOKENS)
    return parser.parse_intermixed_args(argv)


def run(args):
    """`bench.py validity`; returns the Report."""
    settings = [word for word in args.words if word.startswith("@") or "=" in word]
    artifacts = [word for word in args.words if word not in settings]
    if len(artifacts) > 1:
        raise BadInput(f"{artifacts[1]}: one artifact at a time ({artifacts[0]} is one)")
    words = [*settings, f"VAL_TOKENS={args.val_tokens}"]
    if artifacts:
        (path,) = artifacts
        source = {"weights": f"those of {path}", "artifact": path}
    else:
        words = [DEMO, *words]
        trainer.Settings.parse(words, os.environ)  # BadInput before anything is trained
        harness.progress(f"training {args.steps} steps")
        path = train_demo(words, args.steps, args.folder)
        source = {"weights": f"trained for {args.steps} steps", "artifact": None}
    harness.progress("packing")
    demonstration = Demonstration(path, words, args.folder)
    stride = demonstration.settings("").eval_stride
    with harness.Report(args, document, **facts(demonstration) | source, eval_stride=stride) as report:
        report.add(demonstration.row("", ALONE))
        for study in args.studies:
            for variant in STUDIES[study]:
                row = demonstration.row(study, variant)
                if variant.divided:  # the sum is that of the variant before it, which is divided here
                    report["rows"][-1]["mean_sum"] = row.pop("mean_sum")
                report.add(row)
    return report
