"""Four published scores that are no code length, next to what is left of each when it is made one.

    python tools/bench.py validity                            trains the demo for a minute or two, then scores it
    python tools/bench.py validity DATA_PATH=data/datasets/mine --steps 1000
    python tools/bench.py validity logs/raw/model.pg @records/small.env --json validity.json

Without an ARTIFACT the model is that of records/small.env, trained for a number of steps, not of seconds, so that a machine
trains the same one again, and kept as float16; with one nothing is trained. It is packed as the settings say, which makes
the artifact that all rows score; TTT=prequant trains the weights on the validation text first and packs them then. (An
ARTIFACT whose weights are rounded already is scored as it is, and has no such row.)

Every row is a few settings of train_gpt.py, run by its own functions with its own ledger and self-tests, so that
ALLOW_INVALID=1 and those settings give the same score in any run. `bench.py validity --help` has the options.
"""

import contextlib
import copy
import dataclasses
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from bench_eval import Scoring, facts
from bench_pack import collect_moments
from common import ROOT, BadInput, Parser, load_trainer, markdown, names_of, progress, show, whole, write_json

DEMO = f"@{ROOT / 'records/small.env'}"
RAW = "PHASES=train FIT=off MATRIX_QUANT=rtn MATRIX_BITS=16 EMBED_QUANT=rtn EMBED_BITS=16 SIZE_LIMIT=16000000"
LOAD = 62_021_632 / 4_194_304  # #1033: increments a bucket at the end, 14.8
STEPS_518, EPOCHS_518 = 118, 10  # gradient steps of an epoch; epochs here, and 50 there


PLAIN = "EVAL_DOCS=0 EVAL_CONTEXT=window TTT=off MIXER=off TOKEN_BOOST=0"
WIDE = 1 << 25  # most probabilities that are looked at together


class Row(NamedTuple):
    what: str
    settings: str
    divided: bool = False  # what it says is divided by its sum over the vocabulary


ADAMW = "TTT_OPTIMIZER=adamw TTT_LR=0.0005 TTT_GRAD_CLIP=1 TTT_BATCH_SEQS={batch}"
COSINE = f"{ADAMW} TTT_LR_MULT_PROJ=3 TTT_LR_MULT_FC=0.5"
FLOOR = f"{ADAMW} TTT_MIN_LR=0.1"
HASHED = "MIXER=hashed NGRAM_BUCKETS={buckets}"
ENTROPY = "MIXER=hedge MIXER_EXPERTS=unigram,bigram,trigram,entropy"
DIVIDED, FIRST = "the same, divided by its sum", "score-first, the same optimizer and"
STUDIES = {
    "1033": (Row("hashed n-grams, as published", HASHED), Row(DIVIDED, HASHED, True),
             Row("exact counts at the same weights", "MIXER=backoff")),
    "967": (Row("hedge with the entropy expert, as published", ENTROPY), Row(DIVIDED, ENTROPY, True),
            Row("hedge without that expert", "MIXER=hedge")),
    "518": (Row("trained on the text before scoring", f"TTT=before {COSINE} TTT_EPOCHS={EPOCHS_518}"),
            Row(f"{FIRST} epochs", f"TTT=full {COSINE} TTT_EPOCHS={EPOCHS_518}"),
            Row(f"{FIRST} one epoch", f"TTT=full {COSINE} TTT_EPOCHS=1")),
    "1539": (Row("trained on the text before packing", f"TTT=prequant {FLOOR} TTT_EPOCHS=6"),
             Row(f"{FIRST} epochs", f"TTT=full {FLOOR} TTT_EPOCHS=6"),
             Row(f"{FIRST} one epoch", f"TTT=full {FLOOR} TTT_EPOCHS=1")),
}
ALONE = Row("the model alone", "")


# ---- the trainer ----------------------------------------------------------------------------------------------------


def train_demo(words, steps, folder):
    """Train by train_gpt.py as a command; returns (the artifact, the command)."""
    given = [*words, *RAW.split(), f"ITERATIONS={steps}", "MAX_WALLCLOCK_SECONDS=0", "VAL_LOSS_EVERY=0"]
    command = [sys.executable, str(ROOT / "train_gpt.py"), *given, f"OUT_DIR={folder}/trained"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    path = Path(folder, "trained", "model.pg")
    if not path.exists():  # one that is over SIZE_LIMIT is kept
        lines = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
        raise BadInput(lines[-1] if lines else f"train_gpt.py ended with exit code {done.returncode}")
    return path


def divided(trainer):
    """A class of predictors: what another one says, divided by its sum over all tokens, which it notes."""
    class Divided(trainer.WrappingPredictor):
        def __init__(self, base, s, rt):
            super().__init__(base, s, rt)
            self.invalid, self.history = "", base.history
            self.learns, self.sums, self.targets = base.learns, 0.0, 0

        def predict(self, inputs, count=None):
            said = self.base.predict(inputs, count).double()
            return said - said.logsumexp(-1, keepdim=True)

        def nll(self, inputs, targets):
            own = self.base.nll(inputs, targets).double()
            self.log = self.base.predict(inputs).double().logsumexp(-1)
            return own + self.log

        def observe(self, chunk):
            some = self.log[chunk.index >= 0]
            self.sums, self.targets = self.sums + some.exp().sum().item(), self.targets + some.numel()
            super().observe(chunk)

        def mean_sum(self):
            return self.sums / self.targets

    return Divided


class Demonstration(Scoring):
    """The artifact that all rows score, and how each of them does it.

    Relied on, beside what Scoring and collect_moments do: save_artifact, read_file, train_on_validation, selftest,
    WrappingPredictor;
    make_predictor by its name, so that selftest() tests a predictor that is wrapped here.
    """

    def __init__(self, path, words, folder):
        super().__init__(path, words)
        self.folder, self.raw, self.moments = Path(folder), None, None
        if {codec for _, _, codec, *_ in self.header["tensors"]} == {"float16"}:
            s, self.raw = self.settings(""), self.model()
            if s.needs_moments:
                self.moments, _ = collect_moments(self.trainer, self.raw, s, self.rt, s.gptq_calibration_tokens)
            self.path = self.pack(self.raw, s, "packed.pg")

    def settings(self, text):
        return super().settings(f"{PLAIN} {text} ALLOW_INVALID=1")

    def pack(self, model, s, name):
        """The artifact that the trainer makes of these weights."""
        path, room = self.folder / name, s.size_limit - (ROOT / "train_gpt.py").stat().st_size
        self.trainer.save_artifact(path, model, s, self.digest, None, self.moments, room)
        return str(path)

    def artifact(self, run):
        """The one that a row scores."""
        if run.s.ttt != "prequant":
            return self.path
        model = copy.deepcopy(self.raw)
        self.trainer.train_on_validation(run, model, self.val)
        return self.pack(model, run.s, "prequant.pg")

    def score(self, row, text):
        """What the report says of a row."""
        trainer, s, began = self.trainer, self.settings(text), time.perf_counter()
        rt, make, wrap = self.rt, trainer.make_predictor, divided(trainer)
        if row.divided:  # it asks for every token at every place
            rows = max(WIDE // (s.eval_seq_len * s.vocab_size), 1)
            s = dataclasses.replace(s, eval_batch_seqs=min(s.eval_batch_seqs, rows))
        run = self.start(s)
        path = self.artifact(run)
        model = trainer.load_artifact(path, s, rt.dtype, self.attend, rt.device)[1]
        with contextlib.ExitStack() as stack:
            if row.divided:
                stack.enter_context(mock.patch.object(trainer, "make_predictor", lambda model, s, rt, *more: wrap(
                    make(model, s, rt, *more), s, rt)))
            predictor, reader = self.begin(run, model)
            if rt.compiled:
                trainer.warm_up_scoring(run, predictor, reader)
            found = trainer.score(predictor, reader, self.val, rt, run.validity, run.log)
            trainer.selftest(run, s, path, trainer.read_file(path), self.val)
        tests = [event for event in run.log.events if event["event"] == "selftest"]
        checked, = (event for event in run.log.events if event["event"] == "normalisation")
        return {"loss": found.loss, "bpb": found.bpb, "valid": "no" if run.validity.reasons else "yes",
                "reasons": run.validity.reasons, "mean_sum": predictor.mean_sum() if row.divided else None,
                "worst_log_sum": checked["worst_log"],
                "selftest": {event["test"]: event["off_by"] for event in tests},
                "failed": [event["test"] for event in tests if event["ok"] == "no"], "seconds": time.perf_counter() - began}


# ---- the report -----------------------------------------------------------------------------------------------------


COLUMNS = ("of", "what", "BPB", "change", "mean sum", "tests that fail", "valid", "condition broken", "seconds")
TEXT = ("of", "what", "tests that fail", "valid", "condition broken")


def line(row, alone):
    if "bpb" not in row:
        return f"#{row['study']}", row["what"], row["skipped"]
    tests = ", ".join(f"{name} ({row['selftest'][name]:.2g})" for name in row["failed"]) or "none"
    return (row["study"] and f"#{row['study']}", row["what"], show(row["bpb"], ".4f"), "" if row is alone else show(row["bpb"] - alone["bpb"], "+.4f"),
            show(1.0 if row["worst_log_sum"] < 1e-3 else row["mean_sum"], ".4g"), tests, f"valid:{row['valid']}", row["reasons"][0] if row["reasons"] else "",
            show(row["seconds"], ",.0f"))


def document(report):
    r, changed = report, f" and {report['changed_files']} changed file(s)" if report["changed_files"] else ""
    yield f"command   {r['command']}"
    yield f"settings  {r['settings'] or '(default)'}"
    yield (f"weights   {r['parameters']:,} parameters, {r['weights']}; on {r['device']}, {r['dtype']}, torch {r['torch']}, "
           f"{r['threads']} CPU thread(s), commit {r['commit']}{changed}")
    yield (f"text      {r['tokens']:,} targets, {r['bytes']:,} bytes, {r['documents']} documents of {r['data']}, in windows of "
           f"{r['eval_seq_len']:,}, {r['eval_stride'] or r['eval_seq_len']:,} apart; seed {r['seed']}")
    yield "scaled    " + " ".join(f"{name.upper()}={value}" for name, value in r["scaled"].items()) + "\n"
    alone = r["rows"][0]
    yield from markdown(COLUMNS, TEXT, (line(row, alone) for row in r["rows"]))
    yield "\nmean sum: of the \"probabilities\" of all tokens, over all targets. Tests: flip, prefix and sum of #1017, off by (...).\n"
    for row in r["rows"]:
        if row["settings"]:
            yield f"- #{row['study']} {row['what']}: `{row['settings']}`"


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments(argv):
    parser = Parser(prog="bench.py validity", allow_abbrev=False, description="""Score one artifact in ways that were published
        and are no code length, and in the nearest ways that are one.""", epilog=f"""Studies: {', '.join(STUDIES)}, the
        numbers of pull requests, each technique on its own and by the settings of its run. Scaled to the text: #1033's tables
        have the original's {LOAD:.1f} increments a bucket in the end; gradient steps before scoring are as many an epoch as
        #518's, {STEPS_518}, with {EPOCHS_518} epochs in place of its 50; parts are 1 / 32 of the text.""")
    add = parser.add_argument
    add("words", nargs="*", metavar="ARTIFACT|@FILE|KEY=VALUE", help="an artifact of float16 weights, which is not trained any "
        "more (default: train records/small.env); settings of train_gpt.py")
    add("--studies", type=names_of("--studies", STUDIES), default=list(STUDIES), metavar="NAME,...", help="default: all")
    add("--steps", type=whole(1), default=400, metavar="N", help="training steps without an artifact (default: 400)")
    add("--val-tokens", type=whole(1), default=65536, metavar="N", help="validation tokens (default: 65536)")
    add("--json", type=Path, metavar="FILE", help="write the result as JSON, anew after each row")
    return parser.parse_intermixed_args(argv)


def filled(row, s, tokens):
    """Settings of a row, scaled to a text."""
    return row.settings.format(buckets=max(round(tokens / LOAD), 2), batch=max(round(tokens / STEPS_518 / s.eval_seq_len), 1))


def run(args, argv):
    """`bench.py validity`; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        return study(args, argv, folder)


def study(args, argv, folder):
    """run() with a folder for what it makes."""
    settings = [word for word in args.words if word.startswith("@") or "=" in word]
    artifacts = [word for word in args.words if word not in settings]
    if len(artifacts) > 1:
        raise BadInput(f"{artifacts[1]}: one artifact at a time ({artifacts[0]} is one)")
    words = [*([] if artifacts else [DEMO]), *settings, f"VAL_TOKENS={args.val_tokens}"]
    load_trainer().Settings.parse(words, os.environ)
    given, weights = artifacts[:1], f"those of {artifacts[0]}" if artifacts else f"trained for {args.steps} steps"
    if not artifacts:
        progress(f"training {args.steps} steps")
        artifacts = [train_demo(words, args.steps, folder)]
    progress("packing")
    demonstration = Demonstration(artifacts[0], words, folder)
    report = {"command": shlex.join(["tools/bench.py", "validity", *argv]), **facts(demonstration), "weights": weights,
              "artifact": given[0] if given else None, "eval_stride": demonstration.settings("").eval_stride, "rows": []}
    for study, row in [("", ALONE), *((study, row) for study in args.studies for row in STUDIES[study])]:
        text = filled(row, demonstration.settings(""), len(demonstration.val.bytes))
        found = {"study": study, "what": row.what, "settings": text}
        if "prequant" in text and demonstration.raw is None:
            found["skipped"] = "needs weights that are not rounded: an artifact of MATRIX_BITS=16 EMBED_BITS=16, or none"
        else:
            progress(f"scoring {study and f'#{study} '}{row.what}")
            found |= demonstration.score(row, text)
        report["rows"].append(found)
        if row.divided:
            report["rows"][-2]["mean_sum"] = found.pop("mean_sum")
        if args.json:
            write_json(args.json, report)
    print("\n".join(document(report)), flush=True)
    return 0
