"""Is the score a code? A zoo of predictors and readers that break one of the four conditions each, what catches them, and
that nothing which is honest is caught; then the ledger, the self-test of a run, and what a run says of an invalid score.
"""

import itertools
import json
import math
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import reference as ref
import scoring
import torch
from runs import Started, call, command, events, good, log_lines, refused, summary, torchrun
from scoring import coded, model_of, settings, stream_of
from toy import write_shard

import train_gpt as tg

# --- a text whose windows, parts and documents end together -----------------------------------------------------------

LENGTHS = 16, 8, 8, 8, 5, 4  # of its documents: with windows of 8 and parts of 16, windows, documents and parts end at 16 and 40
VOCAB = 10


def text(seed=0):
    ids = np.random.default_rng(seed).choice([3, 4, 5, 9], sum(LENGTHS) + 1)  # few different ones: what was seen says much
    ids[[0, *np.cumsum(LENGTHS)[:-1]]] = ref.BOS
    return torch.from_numpy(ids)


IDS = text()
SMALL = dict(vocab_size=VOCAB, num_layers=1, ve_layers=(0,), xsa_last_n=0, ttt_chunk_tokens=16, ttt_epochs=1, mixer_min_tokens=0,
             eval_batch_seqs=1)


def small(kind="windows", **changes):
    s = settings(kind, **SMALL | changes)
    return replace(s, eval_stride=4) if s.eval_stride else s  # so that windows end there, too


def caught(s, make=None, reader=None, sums=(27, 32), worlds=(2, 3)):
    """Names of everything that finds something: score()'s reasons, the code tests of #1017, other numbers of ranks."""
    def nats(ids, rt=None):
        return coded(s, stream_of(ids), rt, 4, make, reader, check_every=0)[0]

    whole, _, reasons = coded(s, stream_of(IDS), None, 4, make, reader)
    errors = tg.code_tests(nats, IDS, VOCAB, flips=(20, 43), cuts=(16, 40), sums=sums)
    errors["ranks"] = max((found - whole).abs().max().item() for world in worlds
                          for found in ref.Ranks(world).together(lambda rt: nats(IDS, rt)))
    return {reason.partition(":")[0] for reason in reasons} | {name for name, error in errors.items() if not error < 1e-3}


# --- the honest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", scoring.HONEST)
def test_nothing_is_found_in_an_honest_predictor(kind):
    assert caught(small(kind)) == set()


OPTIONS = dict(
    eval_docs=(False, True), eval_stride=(0, 4), eval_context=("window", "cache"), doc_mask=("none", "inputs", "attention"), smear_gate=("none", "channel"),
    ttt=("off", "full", "lora", "lora_docs"), ttt_optimizer=("sgd", "adamw"), ttt_epochs=(1, 2), ttt_lr=(0.01, 0.2), polyak_decay=(0.0, 0.5),
    byte_weighted_ttt=(False, True), ttt_freeze_blocks=(0, 1), ttt_lora_a=("shared", "own"), ttt_lora_lr=(0.01, 0.3), ttt_lora_scaled=(False, True),
    ttt_lora_targets=(("q", "v"), ("k", "attn", "head"), ("o", "mlp")), ttt_warm_start_a=(False, True), phased_ttt_prefix_docs=(0, 3),
    ttt_chunk_size=(2, 3, 5), mixer=("off", "backoff", "hedge"), token_boost=(0.0, 1.5))


def drawn(count, seed):
    """Settings that may be combined, one of each option by chance."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        s = small(**{name: values[rng.integers(len(values))] for name, values in OPTIONS.items()})
        if not tg._conflicts(s, set()):
            found.append(s)
    return found


@pytest.mark.parametrize("number", range(20))
def test_nothing_is_found_in_what_else_may_be_combined(number):
    seed = int(os.environ.get("EXPLORE") or 0)
    assert caught(drawn(20, seed)[number], sums=(27,), worlds=(2,)) == set()


# --- the zoo ----------------------------------------------------------------------------------------------------------


class Counting(tg.Predictor):
    """Honest: a unigram of the parts that were scored."""

    learns = True

    def __init__(self, stream, rt):
        self.rt, self.counts = rt, torch.ones(VOCAB, dtype=torch.float64)

    def predict(self, inputs, count=None):
        return (self.counts / self.counts.sum()).log().expand(*inputs.places[:, :count].shape, VOCAB)

    def learn(self, part, stream):
        for a, b in part.ranges.tolist():
            self.counts = self.counts + torch.bincount(stream.tokens[a + 1 : b + 1].long(), minlength=VOCAB)


class UpdatesFirst(Counting):
    """Counts a token before it is scored."""

    def nll(self, inputs, targets):
        return ((self.counts.sum() + 1) / (self.counts[targets] + 1)).log()


class LearnsFromChunks(Counting):
    """Learns from each chunk that it has scored: other ranks have others, and they may come in any order."""

    learns = False

    def observe(self, chunk):
        self.counts = self.counts + torch.bincount(chunk.targets[chunk.index >= 0], minlength=VOCAB)


class KnowsTheWholeText(Counting):
    """Counts the stream before any of it is scored."""

    learns = False

    def __init__(self, stream, rt):
        super().__init__(stream, rt)
        self.counts = self.counts + torch.bincount(stream.tokens.long(), minlength=VOCAB)


class HashesTheTarget(Counting):
    """Shares of the buckets of (last token, target) among those of the last token: each is at most 1, and no sum is 1."""

    def __init__(self, stream, rt):
        super().__init__(stream, rt)
        self.pairs, self.single = torch.ones(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)

    def predict(self, inputs, count=None):
        last = inputs.ids.gather(1, inputs.places)[:, :count, None]
        return (self.pairs[(5 * last + 3 * torch.arange(VOCAB)) % 8].minimum(self.single[last % 8]) / self.single[last % 8]).log()

    def learn(self, part, stream):
        for a, b in part.ranges.tolist():
            last, token = stream.tokens[a:b].long(), stream.tokens[a + 1 : b + 1].long()
            self.pairs += torch.bincount((5 * last + 3 * token) % 8, minlength=8)
            self.single += torch.bincount(last % 8, minlength=8)


class BetterOfTwo(Counting):
    """Takes for each token the expert that likes it more."""

    def predict(self, inputs, count=None):
        return super().predict(inputs, count).clamp(min=-math.log(VOCAB))


class EntropyExpert(Counting):
    """Mixes in exp(-H) for whatever token comes."""

    def predict(self, inputs, count=None):
        said = super().predict(inputs, count)
        return (0.8 * said.exp() + 0.2 * (said.exp() * said).sum(-1, keepdim=True).exp()).log()


class GatesByTheTarget(Counting):
    """Trusts its counts where the target is of one class, and not where it is of the other."""

    def predict(self, inputs, count=None):
        odd = torch.arange(VOCAB) % 2
        return ((0.2 + 0.7 * odd) * super().predict(inputs, count).exp() + (0.8 - 0.7 * odd) / VOCAB).log()


class LooksAhead(Counting):
    """Says the token that is `far` places further in its row of text, where there is one."""

    far = 1

    def predict(self, inputs, count=None):
        there = inputs.ids.gather(1, (inputs.places + self.far).clamp(max=inputs.ids.size(1) - 1))[:, :count]
        return (0.5 / VOCAB + 0.5 * torch.nn.functional.one_hot(there, VOCAB).double()).log()


class LooksTwoAhead(LooksAhead):
    far = 2


class FitsItsWindow(Counting):
    """Fits a bias to the row that it scores (#1240): to the text behind the place as well as before it."""

    learns = False

    def predict(self, inputs, count=None):
        seen = torch.nn.functional.one_hot(inputs.ids, VOCAB).double().mean(1, keepdim=True) + 0.01
        return (seen / seen.sum(-1, keepdim=True)).log().expand(*inputs.places[:, :count].shape, VOCAB)


class CountsItsShare(Counting):
    """Learns only what this rank scored."""

    def __init__(self, stream, rt):
        super().__init__(stream, rt)
        self.own = torch.zeros(VOCAB, dtype=torch.float64)

    def observe(self, chunk):
        self.own = self.own + torch.bincount(chunk.targets[chunk.index >= 0], minlength=VOCAB)

    def learn(self, part, stream):
        self.counts, self.own = self.counts + self.own, torch.zeros_like(self.own)


class FitsATemperature(tg.ModelPredictor):
    """The model at the temperature that is best for this text."""

    def __init__(self, stream, rt):
        super().__init__(model_of(small()), rt)
        x, y = (ids[: len(ids) // 8 * 8].view(-1, 8).long() for ids in (stream.tokens[:-1], stream.tokens[1:]))
        logits = self.model.logits(self.model.hidden(x)).detach().double()
        low, high = -5.0, 5.0  # of the factor 1 / T, in which the nats are convex
        while high - low > 1e-6:
            factor = (low + high) / 2
            slope = ((factor * logits).softmax(-1) * logits).sum() - logits.gather(-1, y[..., None]).sum()
            low, high = (low, factor) if slope > 0 else (factor, high)
        self.temperature = 1 / factor


class FitsItsWeights(tg.ModelPredictor):
    """TTT=before: the model after steps on this text."""

    def __init__(self, stream, rt):
        s = small("full", ttt="before", ttt_epochs=3)
        super().__init__(model_of(s), rt)
        tg.adaptation_of_weights(self.model, s, rt).fit(stream, np.arange(len(stream.bytes)), 3, lambda _: 1.0)


class LeakyMask(tg.ModelPredictor):
    """A model of two layers whose attention lets each token see the next one."""

    def __init__(self, stream, rt):
        def attend(q, k, v, docs=None):
            mask = torch.ones(q.size(1), q.size(1), dtype=torch.bool).tril(1)
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)

        model = tg.GPT(small(num_layers=2, ve_layers=(1,)), attend=attend)
        super().__init__(ref.randomise(model, seed=1, spread=0.4), rt)


class Altered:
    """A reader that hands on the parts of an honest one in another way."""

    def __init__(self, *args):
        self.parts = [part._replace(chunks=list(part.chunks)) for part in tg.Reader(*args)]

    def __iter__(self):
        yield from self.parts


class Backwards(Altered):
    """The chunks of a part in another order."""

    def __iter__(self):
        for part in self.parts:
            yield part._replace(chunks=part.chunks[::-1])


class Twice(Altered):
    """All of the text once to learn it, and once more to score it."""

    def __iter__(self):
        yield from itertools.chain(self.parts, self.parts)


class WithoutTail(Altered):
    """Windows that the text does not fill are left out."""

    def __iter__(self):
        for part in self.parts:
            yield part._replace(chunks=[chunk for chunk in part.chunks if (chunk.index >= 0).all()])


class Ahead(Altered):
    """What is learnt behind a part is the next one."""

    def __iter__(self):
        for part, following in zip(self.parts, [*self.parts[1:], self.parts[-1]]):
            yield part._replace(ranges=following.ranges)


class LearnsFirst(Altered):
    """Each part is learnt, and then scored."""

    def __iter__(self):
        for part in self.parts:
            yield part._replace(chunks=[])
            yield part


class LearnsOneTooMany(Counting):
    """Learns behind each part the target that comes next, too."""

    def learn(self, part, stream):
        super().learn(part._replace(ranges=np.minimum(part.ranges + [0, 1], len(stream.bytes))), stream)


C1, C2, C3, C4 = "C1 causality", "C2 normalisation", "C3 order", "C4 coverage"
ZOO = [  # who, read by whom, and all that catches it: score() by name; flip, prefix, sum and ranks see nothing but nats
    (UpdatesFirst, None, {C2, "sum"}),
    (LearnsFromChunks, None, {"ranks"}),
    (LearnsFromChunks, Backwards, {"flip", "prefix", "ranks"}),
    (Counting, Backwards, set()),
    (LearnsOneTooMany, None, set()),  # it is shown nothing of that one
    (KnowsTheWholeText, None, {"flip", "prefix", "sum"}),
    (HashesTheTarget, None, {C2, "sum"}),
    (BetterOfTwo, None, {C2, "sum"}),
    (EntropyExpert, None, {C2, "sum"}),
    (GatesByTheTarget, None, {C2, "sum"}),
    (LooksAhead, None, {C1, "sum"}),
    (LooksTwoAhead, None, {C1, "flip"}),
    (FitsItsWindow, None, {C1, "flip", "sum"}),
    (LeakyMask, None, {C1, "flip", "sum"}),
    (CountsItsShare, None, {"ranks"}),
    (FitsATemperature, None, {"flip", "prefix"}),
    (FitsItsWeights, None, {"flip", "prefix", "sum"}),
    (Counting, Twice, {C4, "flip", "prefix", "sum"}),
    (Counting, WithoutTail, {C3, C4, "sum"}),  # it learns the tail all the same
    (Counting, Ahead, {C3, "flip", "prefix", "sum"}),
    (Counting, LearnsFirst, {C3, "flip", "prefix", "sum"}),
    (Counting, None, set()),
]


@pytest.mark.parametrize("make, reader, by", ZOO, ids=lambda value: getattr(value, "__name__", ""))
def test_what_breaks_a_condition_is_caught(make, reader, by):
    assert caught(small(), make, reader) == by


@pytest.mark.parametrize("kind", scoring.INVALID)
def test_the_published_mixtures_that_are_no_distributions_are_caught(kind):
    assert caught(small(kind)) == {C2, "sum"}


@pytest.mark.parametrize("ids, test", [([1, 5, 6, 7, 8, 9], "flip"), ([1, 5, 6], "prefix"), ([1, 5, 6, 3, 8], "sum")])
def test_a_score_that_is_no_number_passes_no_test(ids, test):
    """Wherever it comes up: in the last of the texts of a test, say."""
    whole = torch.tensor([1, 5, 6, 7, 8, 2])

    def nats(text):
        wrong = len(text) == len(ids) and text.tolist() != whole.tolist() and (test != "sum" or text.tolist() == ids)
        return torch.full((len(text) - 1,), math.nan if wrong else math.log(10), dtype=torch.float64)

    errors = tg.code_tests(nats, whole, 10, flips=(1, 3), cuts=(3, 2), sums=(1, 2))
    assert {name for name, error in errors.items() if not error < 1e-3} == {test}


# --- the self-test of a run -------------------------------------------------------------------------------------------


class Found:
    """A run on one rank, as far as the self-test looks at it; what it logs."""

    def __init__(self, rt):
        self.rt, self.validity, self.tests = rt, tg.Validity(), {}
        self.clock = tg.Clock()

    def log(self, event, **values):
        self.tests[values["test"]] = values["ok"] == "yes" and values["off_by"] < 1e-3 and values["ranks"] == self.rt.world


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A model of random weights, and its validation text."""
    path, s = tmp_path_factory.mktemp("artifact") / "model.pg", small()
    tg.save_artifact(path, model_of(s), s)
    return path, stream_of(IDS)


def selftested(artifact, s, world, make=tg.make_predictor):
    """[(what each test says, reasons)] by rank."""
    path, val = artifact

    def work(rt):
        run = Found(rt)
        tg.selftest(run, s, path, path.read_bytes(), val)
        return run.tests, run.validity.reasons

    with mock.patch.object(tg, "make_predictor", make):
        return ref.Ranks(world).together(work)


@pytest.mark.parametrize("kind", ["sliding", "all", "all, lora_docs"])
def test_the_self_test_finds_nothing_in_what_is_honest(artifact, kind):
    assert selftested(artifact, small(kind), 2) == 2 * [(dict.fromkeys(("flip", "prefix", "sum", "ends", "ranks"), True), [])]


class Forgets:
    """A member of the zoo that can be begun anew: what it says depends on the text alone."""

    def __init__(self, make):
        self.make = make

    def __call__(self, model, s, rt, targets, temperature):
        predictor = self.make(None, rt)
        begun = dict(vars(predictor))
        predictor.reset = lambda: vars(predictor).update(begun)
        return predictor


@pytest.mark.parametrize("make, names", [(UpdatesFirst, {"sum"}), (LearnsFromChunks, {"ranks"}), (LooksAhead, {"sum"}),
                                         (CountsItsShare, {"ranks"}), (LearnsOneTooMany, set()), (Counting, set())], ids=lambda value: getattr(value, "__name__", ""))
def test_the_self_test_catches_the_zoo_by_name(artifact, make, names):
    for tests, reasons in selftested(artifact, small(), 2, Forgets(make)):
        assert {name for name, ok in tests.items() if not ok} == names and len(reasons) == len(names)
        assert {reason.partition(":")[0] for reason in reasons} == {tg.SELFTESTS[name] for name in names}


class LooksAheadWhereItHints(tg.Tilt):
    """Hints the token that comes next in its row of text, where an honest tilt would hint at all."""

    def _hints(self, inputs):
        there = inputs.ids.gather(1, (inputs.places + 1).clamp(max=inputs.ids.size(1) - 1))
        return torch.where(super()._hints(inputs) >= 0, there, -1)


@pytest.mark.parametrize("kind", ["windows", "cache", "warm start"])
def test_the_self_test_sees_the_hints_of_a_tilt_whose_contexts_are_long(artifact, kind):
    """TOKEN_ORDER=16, as in #2135: the text of the self-test repeats nothing of that length."""
    s = small(kind, token_boost=2.625, token_order=16, token_threshold=0.8)
    (tests, reasons), = selftested(artifact, s, 1)
    assert all(tests.values()) and reasons == []
    with mock.patch.object(tg, "Tilt", LooksAheadWhereItHints):
        (tests, reasons), = selftested(artifact, s, 1)
        assert not all(tests.values()) and reasons, tests


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """Arguments that score the artifact of a short training."""
    folder = tmp_path_factory.mktemp("trained")
    toy = [*toy, "NUM_LAYERS=1", "XSA_LAST_N=0", "VE_LAYERS=0"]
    good(call(command(toy, folder, "PHASES=train")))
    return [*toy, "DEVICE=cpu", "PHASES=eval", f"ARTIFACT={folder}/model.pg", "VAL_TOKENS=600", "TTT_CHUNK_TOKENS=200", "TTT_EPOCHS=1",
            "MIXER_MIN_TOKENS=200"]


def said(done, folder):
    """{test: ok} of the lines that a run prints, which its log and its events hold, too."""
    lines = [line for line in good(done).stdout.splitlines() if line.startswith("selftest ")]
    words = [dict(word.split(":", 1) for word in line.split()[1:]) for line in lines]
    assert set(lines) <= set(log_lines(folder)) and len({word["test"] for word in words}) == len(words)
    assert [(row["test"], row["ok"]) for row in events(folder, "selftest")] == [(word["test"], word["ok"]) for word in words]
    return {word["test"]: word["ok"] for word in words}


HONEST_RUNS = ["", "EVAL_DOCS=1 EVAL_CONTEXT=cache TTT=full", "TTT=lora_docs TTT_WARM_START_A=1 TTT_GROUP_DOCS=4", "TTT=lora MIXER=hedge TOKEN_BOOST=2 EVAL_STRIDE=0"]
BROKEN_RUNS = {"MIXER=hashed": ({"sum"}, "C2"), "MIXER=hedge MIXER_EXPERTS=bigram,entropy": ({"sum"}, "C2"), "TTT=before TTT_LR=0.1": ({"flip", "prefix", "sum", "ends"}, "C3")}


@pytest.mark.parametrize("words", HONEST_RUNS)
def test_a_run_that_tests_itself_prints_a_line_for_each_test(trained, tmp_path, words):
    done = call([*trained, f"OUT_DIR={tmp_path}", "SELFTEST=1", *words.split()])
    assert said(done, tmp_path) == dict.fromkeys(("flip", "prefix", "sum", "ends"), "yes")
    assert summary(done)["valid"] == "yes" and summary(done)["reasons"] == []


class UnsureOfWhatNeverCame(tg.WrappingPredictor):
    """An honest predictor whose nats of tokens that the validation text does not hold are no numbers."""

    def __init__(self, honest, known):
        super().__init__(honest, None, None)
        self.known, self.history, self.learns = known, honest.history, honest.learns

    def predict(self, inputs, count=None):
        return self.base.predict(inputs, count)

    def nll(self, inputs, targets):
        return torch.where(torch.isin(targets, self.known), self.base.nll(inputs, targets), math.nan)


def test_a_run_whose_self_test_finds_no_number_is_not_valid(trained, toy, tmp_path):
    """What it scores is finite throughout; only the texts that the tests make up come to nan."""
    shard = next(Path(toy[0].partition("=")[2]).glob("fineweb_val_*.bin"))
    known = torch.from_numpy(tg.read_shard(shard).astype(np.int64)).unique()
    make = tg.make_predictor
    with mock.patch.object(tg, "make_predictor", lambda *args: UnsureOfWhatNeverCame(make(*args), known)):
        done = call([*trained, f"OUT_DIR={tmp_path}", "SELFTEST=1", "EVAL_STRIDE=0", "VAL_TOKENS=200"])
    assert "no" in said(done, tmp_path).values()
    told = summary(done)
    assert math.isfinite(told["val_bpb"]) and told["valid"] == "no" and told["reasons"]


def test_a_run_on_two_ranks_tests_them_against_one(trained, tmp_path):
    words = ["TTT=lora", "MIXER=hedge", "TOKEN_BOOST=2", "EVAL_DOCS=1"]
    with Started(torchrun([*trained, f"OUT_DIR={tmp_path}", "SELFTEST=1", *words])) as run:
        done = run.finish()
    assert said(done, tmp_path) == dict.fromkeys(("flip", "prefix", "sum", "ends", "ranks"), "yes") and "ranks:2" in done.stdout
    alone = call([*trained, f"OUT_DIR={tmp_path}/alone", *words])
    assert summary(done)["val_bpb"] == pytest.approx(summary(alone)["val_bpb"], rel=1e-5) and summary(done)["valid"] == "yes"


# --- invalid techniques run only where that is allowed, and say so everywhere -----------------------------------------


def carries(done, folder, condition):
    """The run ended well, and wherever its score stands there stands that it is none, and why."""
    told, final = summary(good(done)), [line for line in done.stdout.splitlines() if line.startswith("final_")]
    assert len(final) == 1 and " valid:no reasons:" in final[0] and condition in final[0].partition("reasons:")[2]
    for row in (told, json.loads((folder / "summary.json").read_text()), *events(folder, "final"), *events(folder, "summary")):
        assert row["valid"] == "no" and any(reason.startswith(condition) for reason in row["reasons"])
        assert row["val_bpb"] > 0
    assert told["eligible"] == "no" and "the score is not valid" in told["eligible_reasons"]
    return told


@pytest.mark.parametrize("words", [*BROKEN_RUNS, "TTT=prequant"])
def test_an_invalid_technique_is_refused_in_one_line(trained, tmp_path, words):
    args = [arg for arg in trained if not words.startswith("TTT=prequant") or not arg.startswith(("PHASES", "ARTIFACT"))]
    refused(call([*args, f"OUT_DIR={tmp_path}/out", *words.split()]), 2, "ALLOW_INVALID=1", words.split()[0].partition("=")[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, tests, condition", [(words, *by) for words, by in BROKEN_RUNS.items()])
def test_an_invalid_score_is_called_so_wherever_it_stands(trained, tmp_path, words, tests, condition):
    done = call([*trained, f"OUT_DIR={tmp_path}", "SELFTEST=1", "ALLOW_INVALID=1", *words.split()])
    carries(done, tmp_path, condition)
    assert {name for name, ok in said(done, tmp_path).items() if ok == "no"} == tests


def test_training_on_the_validation_text_before_packing_is_called_so_in_every_score_behind_it(toy, tmp_path):
    """No test of the predictor can see that: the run says it."""
    done = call(command(toy, tmp_path, "ITERATIONS=2", "TTT=prequant", "ALLOW_INVALID=1", "VAL_TOKENS=600", "TTT_LR=0.05", "SELFTEST=1"))
    carries(done, tmp_path, "C3 order")
    assert set(said(done, tmp_path).values()) == {"yes"}
    (row,) = [row for row in events(tmp_path, "eval") if "contiguous" in row["name"]]
    assert row["valid"] == "no" and row["reasons"][0].startswith("C3 order")


def test_a_valid_score_is_called_so(trained, tmp_path):
    done = good(call([*trained, f"OUT_DIR={tmp_path}"]))
    assert [line.endswith(" valid:yes tested:no") for line in done.stdout.splitlines() if line.startswith("final_")] == [True]
    assert summary(done)["tested"] == "no" and "the self-test was left out: SELFTEST=0" in summary(done)["eligible_reasons"]
    assert [row["valid"] for row in events(tmp_path) if row["event"] in ("eval", "final", "summary")] == ["yes"] * 3


# --- the ledger of what was opened when ------------------------------------------------------------------------------


def test_validation_before_the_freeze_is_c3_except_for_reports():
    validity = tg.Validity()
    with validity.reporting():
        validity.opened("val")
        assert not torch.is_grad_enabled()
    validity.opened("train")
    assert torch.is_grad_enabled() and validity.reasons == []
    validity.opened("val")
    assert len(validity.reasons) == 1 and "C3" in validity.reasons[0]


def test_training_data_after_the_freeze_is_a_reason():
    validity = tg.Validity()
    validity.opened("train")
    validity.freeze()
    validity.opened("val")
    assert validity.reasons == []
    validity.opened("train")
    assert len(validity.reasons) == 1 and "train" in validity.reasons[0]


def test_a_report_that_fails_ends_the_permission():
    validity = tg.Validity()
    with pytest.raises(ZeroDivisionError), validity.reporting():
        raise ZeroDivisionError
    validity.opened("val")
    assert validity.reasons != [] and torch.is_grad_enabled()


def test_reasons_are_kept_once_and_never_withdrawn():
    validity = tg.Validity()
    for ok in (False, True, False):
        validity.need(ok, "a reason")
    validity.need_for_record(False, "hardware")
    assert validity.reasons == ["a reason"] and validity.obstacles == ["hardware"]


@pytest.mark.parametrize("change", [lambda model: model.table.__setitem__(1, 7), lambda model: model.seen["kinds"].add("b"),
                                    lambda model: model.weight.data.add_(1), lambda model: model.seen.update(size=2)])
def test_a_fingerprint_changes_with_all_that_a_forward_could_read(change):
    model = torch.nn.Linear(2, 2)
    model.table, model.seen = np.arange(3), {"kinds": {"a"}, "size": 1}
    before = tg.fingerprint(model)
    assert tg.fingerprint(model) == before
    change(model)
    assert tg.fingerprint(model) != before


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "fineweb_train_000007.bin", range(50))
    write_shard(tmp_path / "fineweb_val_000000.bin", range(50))
    return tmp_path / "fineweb_train_000007.bin"


OPEN = {"open": open, "a text path": lambda path: open(str(path), "rb"), "bytes": lambda path: open(os.fsencode(path), "rb"),
        "os.open": lambda path: os.fdopen(os.open(path, os.O_RDONLY)), "read_bytes": Path.read_bytes, "memmap": np.memmap,
        "fromfile": lambda path: np.fromfile(path, np.uint16), "read_shard": tg.read_shard,
        "a thread": lambda path: ThreadPoolExecutor(1).submit(path.read_bytes).result()}


@pytest.mark.parametrize("how", OPEN)
def test_a_training_shard_that_anything_opens_during_evaluation_is_noted(shard, how):
    validity = tg.Validity()
    with validity.watch(shard.parent):
        OPEN[how](shard)  # the artifact is not frozen: this is still training
        assert validity.reasons == []
        validity.freeze()
        OPEN[how](shard)
    assert validity.reasons == ["training shards were read after the artifact was frozen"]


NAMES = {"itself": lambda path, new: path, "symbolic": lambda path, new: new.symlink_to(path) or new, "hard": lambda path, new: os.link(path, new) or new,
         "in a linked folder": lambda path, new: new.symlink_to(path.parent) or new / path.name}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", OPEN)
def test_a_validation_shard_that_anything_opens_is_noted_whatever_its_name(shard, tmp_path, how, name):
    """But by the loader: before the artifact is complete, for a report; later once."""
    path = shard.with_name("fineweb_val_000000.bin")
    new = NAMES[name](path, tmp_path / "harmless.bin")
    validity = tg.Validity()
    with validity.watch(shard.parent):
        with validity.reporting(), validity.loading():
            OPEN[how](new)
        assert validity.reasons == []
        OPEN[how](new)
        assert validity.reasons == ["C3: validation shards opened before the artifact was frozen"]
        validity.freeze()
        with validity.loading():
            OPEN[how](new)
        assert len(validity.reasons) == 1
        OPEN[how](new)
    OPEN[how](new)
    assert validity.reasons[1:] == ["C1: validation shards were opened again while they were scored"]


def test_a_network_connection_during_evaluation_is_noted(tmp_path):
    validity, local = tg.Validity(), str(tmp_path / "socket")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as other, validity.watch(tmp_path):
        other.bind(local), other.listen()
        connect = lambda: socket.create_connection(server.getsockname()).close()
        connect()
        with validity.evaluation(), socket.socket(socket.AF_UNIX) as here:
            here.connect(local)  # another process of this machine
            assert validity.reasons == []
            ThreadPoolExecutor(1).submit(connect).result()
        connect()
    assert validity.reasons == ["the evaluation opened a network connection to 127.0.0.1"]


def test_a_run_that_fails_ends_the_watch(shard):
    validity = tg.Validity()
    validity.freeze()
    with pytest.raises(ZeroDivisionError), validity.watch(shard.parent), validity.evaluation():
        raise ZeroDivisionError
    shard.read_bytes()
    assert validity.reasons == []


def test_a_run_notes_what_its_evaluation_fetched(trained, toy, tmp_path):
    make, data = tg.make_predictor, Path(toy[0].partition("=")[2])

    def fetching(*args):
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()
        np.fromfile(data / "fineweb_train_000001.bin", np.uint16)
        return make(*args)

    with mock.patch.object(tg, "make_predictor", fetching):
        told = carries(call([*trained, f"OUT_DIR={tmp_path}"]), tmp_path, "the evaluation opened a network connection")
    assert [reason.partition(" to ")[0] for reason in told["reasons"]] == [
        "the evaluation opened a network connection", "training shards were read after the artifact was frozen"]


@pytest.mark.parametrize("world, device, fits", [
    (8, "NVIDIA H100 80GB HBM3", True), (7, "NVIDIA H100 80GB HBM3", False),
    (16, "NVIDIA H100 80GB HBM3", False), (8, "NVIDIA H200", False), (8, "NVIDIA A100-SXM4-80GB", False),
    (1, "cpu", False)])
def test_only_eight_h100_can_make_a_record(tmp_path, world, device, fits):
    s = ref.small(device="cpu")
    rt = tg.Runtime(s, {})
    rt.world, rt.device_name, rt.gather = world, lambda: device, lambda value: [value] * world
    tg.summarise(tg.Run(s, rt, tmp_path, tg.attend_sdpa))
    (row,) = events(tmp_path, "summary")
    reasons = [why for why in row["eligible_reasons"] if "hardware" in why]
    assert reasons == ([] if fits else [f"hardware {world} x {device}, not 8 x H100"])


def test_only_a_score_of_all_of_fineweb_can_be_a_record(trained, toy, tmp_path):
    """50,000 documents, and their bytes to a ten-thousandth. Here the toy's bytes stand for them."""
    s = tg.Settings.parse(toy)
    val = tg.load_validation(s, ref.alone(), tg.load_tokenizer(s)[0])
    nbytes = int(val.bytes.sum())

    def complaints(name, share, documents, val_tokens=0):
        ranges = np.zeros((documents, 2), dtype=np.int64)
        arguments = [*trained, "EVAL_STRIDE=0", f"VAL_TOKENS={val_tokens}", f"OUT_DIR={tmp_path / name}"]
        with mock.patch.multiple(tg, FINEWEB_VAL_BYTES=share * nbytes, document_ranges=lambda stream: ranges):
            said = summary(good(call(arguments)))
        return [why for why in said["eligible_reasons"] if "FineWeb" in why]

    assert complaints("whole", 1.00005, 50_000) == []
    assert complaints("bytes", 1.002, 50_000)
    assert complaints("documents", 1.0, 49_999)
    assert complaints("cut", 1.0, 50_000, len(val.bytes) - 1)


def test_an_artifact_that_changed_between_writing_and_scoring_is_noted(trained, toy, tmp_path):
    """Another one, whole and good, lies where the run had put its own."""
    evaluate, other = tg.evaluate, next(Path(arg.partition("=")[2]) for arg in trained if arg.startswith("ARTIFACT="))

    def exchanged(run, path):
        path.write_bytes(other.read_bytes())
        return evaluate(run, path)

    with mock.patch.object(tg, "evaluate", exchanged):
        told = carries(call(command(toy, tmp_path, "ITERATIONS=2", "VAL_TOKENS=600")), tmp_path, "the artifact changed")
    assert told["reasons"] == ["the artifact changed after it was written"]


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(path.read_bytes() + b"0"), Path.unlink], ids=["written", "removed"])
def test_an_artifact_that_changes_while_it_is_scored_is_noted(trained, tmp_path, change):
    path = tmp_path / "model.pg"
    arguments = [f"ARTIFACT={path}" if arg.startswith("ARTIFACT=") else arg for arg in trained]
    path.write_bytes(next(Path(arg.partition("=")[2]) for arg in trained if arg.startswith("ARTIFACT=")).read_bytes())

    def changing(*args, make=tg.make_predictor):
        change(path)
        return make(*args)

    with mock.patch.object(tg, "make_predictor", changing):
        told = carries(call([*arguments, f"OUT_DIR={tmp_path / 'out'}"]), tmp_path / "out", "the artifact changed while")
    assert told["reasons"] == ["the artifact changed while it was scored"]
