"""The verdict on what a contestant may write next: each of these was let through once, with `valid:yes`. The real run, on one
rank and on two, must say by name what is wrong with it, and nothing where nothing is.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import socket
import sys
from pathlib import Path
from unittest import mock

import container
import numpy as np
import pytest
import torch
from process import REPO
from runs import (
    Started,
    call,
    checkpoints,
    command,
    events,
    good,
    on_ranks,
    read_checkpoint,
    refused,
    summary,
    torchrun,
)

import train_gpt as tg

C1, C2, C3, C4 = "C1", "C2 normalisation", "C3", "C4 coverage"
LENGTH = 24  # of the windows: longer than what is looked at in one of them


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """Arguments that score the artifact of a short training."""
    folder = tmp_path_factory.mktemp("trained")
    toy = [*toy, "NUM_LAYERS=1", "XSA_LAST_N=0", "VE_LAYERS=0", f"EVAL_SEQ_LEN={LENGTH}", "EVAL_STRIDE=0", "EVAL_BATCH_SEQS=8"]
    good(call(command(toy, folder, "PHASES=train")))
    return [*toy, "DEVICE=cpu", "PHASES=eval", f"ARTIFACT={folder}/model.pg", "VAL_TOKENS=3000", "TTT_CHUNK_TOKENS=1000", "TTT_EPOCHS=1"]


def reasons(args, folder, world=1, **patches):
    """Why the score of a run is not valid, with these attributes of the trainer replaced."""
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(tg, name, value))
        on_ranks([*args, f"OUT_DIR={folder}"], world)
    told = json.loads((folder / "summary.json").read_text())
    assert (told["valid"] == "yes") == (not told["reasons"])
    return told["reasons"]


def predictor(kind):
    """make_predictor that makes one of this kind, around the model."""
    return dict(make_predictor=lambda model, s, rt, targets, temperature=1.0: kind(model, rt))


class LateNll(tg.ModelPredictor):
    """Half the nats from the ninth place of a row on."""

    def nll(self, inputs, targets):
        late = torch.arange(targets.size(1)) >= 8
        return super().nll(inputs, targets) * torch.where(late, 0.5, 1.0)


class Negative(tg.ModelPredictor):
    """A gift at one place of one chunk."""

    given = False

    def nll(self, inputs, targets):
        out = super().nll(inputs, targets)
        if not self.given:
            out[0, 3] -= 500
        self.given = True
        return out


class SlightlyOff(tg.ModelPredictor):
    """A thousandth less than each token costs, in log: worth 0.0005 BPB."""

    def predict(self, inputs, count=None):
        return super().predict(inputs, count) + 5e-4

    def nll(self, inputs, targets):
        return super().nll(inputs, targets) - 5e-4


class OnRankOne(SlightlyOff):
    def nll(self, inputs, targets):
        return super().nll(inputs, targets) + 5e-4 * (self.rt.rank != self.rt.world - 1)

    def predict(self, inputs, count=None):
        return super().predict(inputs, count) - 5e-4 * (self.rt.rank != self.rt.world - 1)


class SeesTheEnd(tg.ModelPredictor):
    """Says that a document ends where its row begins anew, as if by chance."""

    def logits(self, inputs):
        logits = super().logits(inputs)
        x = torch.cat((inputs.ids, inputs.ids[:, :1]), 1)
        ends = x.gather(1, inputs.places + 1) == tg.BOS
        return logits + 5.0 * ends[..., None] * (torch.arange(logits.size(-1)) == tg.BOS)


class SeesTheWidth(tg.ModelPredictor):
    """Knows from the shape of its batch that documents end soon."""

    def logits(self, inputs):
        logits = super().logits(inputs)
        return logits + (inputs.ids.size(1) % 5) * (torch.arange(logits.size(-1)) == tg.BOS)


class Forger(tg.ModelPredictor):
    """Makes the text that is to come easy and long while it learns."""

    learns = True

    def learn(self, part, stream):
        stream.tokens.fill_(5), stream.bytes.fill_(100)


class ReadsAhead(tg.ModelPredictor):
    """Learns the part that comes next."""

    learns = True

    def __init__(self, model, rt):
        super().__init__(model, rt)
        self.bias = torch.zeros(512)

    def logits(self, inputs):
        return super().logits(inputs) + self.bias

    def learn(self, part, stream):
        coming = stream.tokens[part.ranges[-1, 1] + 1 :]
        self.bias = torch.bincount(coming[coming > 0].long(), minlength=512).float().log1p()

    def reset(self):
        super().reset()
        self.bias = torch.zeros(512)


class StepsInReports(tg.ModelPredictor):
    """Learns from the text while it only reports on it."""

    def nll(self, inputs, targets):
        with torch.no_grad():
            self.model.embed.weight[targets.flatten()] += 1e-3
        return super().nll(inputs, targets)


class Remembers(tg.ModelPredictor):
    """Keeps what it has seen on the model, under a name that is no parameter's."""

    def nll(self, inputs, targets):
        if isinstance(getattr(self.model, "notes", None), torch.Tensor):
            self.model.notes = torch.cat((self.model.notes, targets.flatten()))
        else:
            self.model.notes = targets.flatten()
        return super().nll(inputs, targets)


def connecting(model, s, rt, targets, temperature=1.0):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
    return tg.ModelPredictor(model, rt, temperature)


def opening(model, s, rt, targets, temperature=1.0):
    np.fromfile(Path(s.data_path) / "fineweb_val_000000.bin", np.uint16)
    return tg.ModelPredictor(model, rt, temperature)


load, prove, evaluate = tg.load_validation, tg._check_bytes, tg.evaluate


def long_bytes(s, rt, sp):
    """Bytes three times too large in the last document."""
    val = load(s, rt, sp)
    val.bytes[-100:] *= 3
    return val


def longer_later(run, sp, val):
    """Right when they are proven, and not any more when they are scored."""
    counted = prove(run, sp, val)
    val.bytes[-100:] *= 3
    return counted


def easy_later(run, sp, val):
    """Another text than the one whose bytes were proven."""
    counted = prove(run, sp, val)
    val.tokens[-100:] = 5
    return counted


CHEATS = {  # who, with which settings, and what is said
    "wrong nats at late places": (predictor(LateNll), "", C2),
    "nats below 0": (predictor(Negative), "", C2),
    "a little off": (predictor(SlightlyOff), "", C2),
    "a little off on the last rank": (predictor(OnRankOne), "", C2),
    # Only in the rows whose last place is drawn, so there have to be many.
    "the end of a row is seen": (predictor(SeesTheEnd), "EVAL_DOCS=1 EVAL_SEQ_LEN=256 EVAL_BATCH_SEQS=64 VAL_TOKENS=0", C1),
    "the width of a batch is used": (predictor(SeesTheWidth), "EVAL_DOCS=1 SELFTEST=1", C1),
    "a step in a report": (dict(ModelPredictor=StepsInReports), "EVAL_STRIDE=12", C3),
    "notes on the model": (dict(ModelPredictor=Remembers), "EVAL_STRIDE=12", C3),
    "a network connection": (dict(make_predictor=connecting), "", "the evaluation opened a network"),
    "validation opened again": (dict(make_predictor=opening), "", "C1: validation shards were opened again"),
    "too many bytes at the end": (dict(load_validation=long_bytes), "VAL_TOKENS=0", "bytes: 1 of 20"),
    "too many bytes later": (dict(_check_bytes=longer_later), "", "bytes: "),
    "another text later": (dict(_check_bytes=easy_later), "", "the text changed"),
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("cheat", CHEATS)
def test_what_was_let_through_is_named(trained, tmp_path, cheat, world):
    patches, words, condition = CHEATS[cheat]
    with mock.patch.object(tg, "CACHE_STEP", 16):
        told = reasons([*trained, *words.split()], tmp_path, world, **patches)
    assert [reason for reason in told if reason.startswith(condition)], told


HONEST = ["", "EVAL_STRIDE=12", "EVAL_DOCS=1", "EVAL_CONTEXT=cache", "TTT=full", "TTT=lora_docs TTT_CHUNK_SIZE=12", "MIXER=backoff MIXER_MIN_TOKENS=200"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("words", HONEST)
def test_nothing_is_said_of_what_is_honest(trained, tmp_path, words, world):
    assert reasons([*trained, *words.split()], tmp_path, world) == []


@pytest.mark.parametrize("kind", [Forger, ReadsAhead])
@pytest.mark.parametrize("world", [1, 2])
def test_what_learns_is_given_nothing_that_it_could_change_or_foresee(trained, tmp_path, kind, world):
    """The score is that of the model alone."""
    told = []
    for number, patches in enumerate((predictor(kind), {})):
        assert reasons(trained, tmp_path / str(number), world, **patches) == []
        told.append(json.loads((tmp_path / str(number) / "summary.json").read_text()))
    assert told[0]["val_bpb"] == pytest.approx(told[1]["val_bpb"], rel=1e-6) and told[0]["val_bytes"] == told[1]["val_bytes"]


def test_an_attention_that_leaks_in_long_rows_only_is_refused(trained, tmp_path):
    """At 128 tokens, where it used to be looked at, it is right."""
    right = tg.attend_sdpa

    def leaking(q, k, v, docs=None):
        out = right(q, k, v, docs)
        if q.size(1) > 128:
            out = out + 0.1 * torch.nn.functional.pad(v[:, 1:], (0, 0, 0, 0, 0, 1)).repeat_interleave(q.size(2) // v.size(2), 2)
        return out

    long = [*trained, f"OUT_DIR={tmp_path}", "TRAIN_SEQ_LEN=192", "TRAIN_BATCH_TOKENS=384"]
    with mock.patch.object(tg, "attend_sdpa", leaking):
        refused(call(long), 2, "ATTENTION=auto", "math: differs from the reference", "at 192 tokens")
    long[-2:] = ["EVAL_SEQ_LEN=192"]
    with mock.patch.object(tg, "attend_sdpa", leaking):
        refused(call(long), 2, "differs from the reference", "at 192 tokens")


def test_an_attention_that_leaks_behind_the_check_is_seen_in_the_run(trained, tmp_path):
    """The Examiner looks at the run's own rows."""
    right = tg.pick_attention

    def pick(s, rt):
        attend = right(s, rt)

        def leaking(q, k, v, docs=None):
            ahead = torch.nn.functional.pad(v[:, 2:], (0, 0, 0, 0, 0, 2)).repeat_interleave(q.size(2) // v.size(2), 2)
            return attend(q, k, v, docs) + 0.3 * ahead

        return leaking

    told = reasons([*trained, "EVAL_SEQ_LEN=192"], tmp_path, pick_attention=pick)
    assert [reason.partition(":")[0] for reason in told] == ["C1 causality"]


class Uniform(tg.Predictor):
    """What the README recommends to begin with: predict() and nothing else."""

    def predict(self, inputs, count=None):
        return torch.full((*inputs.places[:, :count].shape, 512), -math.log(512))


@pytest.mark.parametrize("world", [1, 2])
def test_a_plain_predictor_is_scored_and_tested(trained, tmp_path, world):
    make = dict(make_predictor=lambda *_, **__: Uniform())
    assert reasons([*trained, "SELFTEST=1"], tmp_path, world, **make) == []
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["val_loss"] == pytest.approx(math.log(512), rel=1e-6)
    assert told["tested"] == "yes" and told["tests"] == ["flip", "prefix", "sum", "ends", *["ranks"] * (world - 1)]


def test_a_plain_predictor_is_scored_where_graphs_are_compiled(trained, tmp_path):
    """What is state in it is forgotten behind the warm-up."""
    with mock.patch.object(torch, "compile", lambda function, **_: function):
        make = dict(make_predictor=lambda *_, **__: Uniform())
        assert reasons([*trained, "COMPILE=on"], tmp_path, **make) == []


def test_the_verdict_says_what_it_rests_on(trained, toy, tmp_path):
    """The share of the text that was decoded, the hash of its tokens, the tests."""
    done = good(call([*trained, f"OUT_DIR={tmp_path}", "VAL_TOKENS=0", "SELFTEST=1"]))
    told, (final,) = summary(done), [line for line in done.stdout.splitlines() if line.startswith("final_")]
    shard = Path(toy[0].partition("=")[2]) / "fineweb_val_000000.bin"
    assert told["val_sha256"] == hashlib.sha256(shard.read_bytes()[1024:]).hexdigest()
    assert told["documents_decoded"] == 20 and told["decoded_share"] == 1 and told["tested"] == "yes"
    assert final.endswith(" valid:yes tested:yes") and events(tmp_path, "final")[0]["tested"] == "yes"
    assert events(tmp_path, "bytes")[0]["share"] == 1


def test_a_record_needs_the_self_test(trained, tmp_path):
    without, with_it = (summary(good(call([*trained, f"OUT_DIR={tmp_path}/{i}", f"SELFTEST={i}"]))) for i in (0, 1))
    assert without["valid"] == with_it["valid"] == "yes" and without["tested"] == "no"
    assert [word for word in without["eligible_reasons"] if "SELFTEST" in word] and not [word for word in with_it["eligible_reasons"] if "SELFTEST" in word]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(toy, tmp_path):
    """A copy of the toy data set; the settings that train on it."""
    folder = tmp_path / "data"
    shutil.copytree(toy[0].partition("=")[2], folder)
    return folder, [*toy[1:], f"DATA_PATH={folder}", "ITERATIONS=30", "TRAIN_SEQ_LEN=256", "TRAIN_BATCH_TOKENS=1024", "VAL_TOKENS=600", "EVAL_STRIDE=0", "NUM_LAYERS=1", "XSA_LAST_N=0", "VE_LAYERS=0"]


COPIES = "of 6 validation documents begin as some did that were trained on"
LINKS = {"symbolic": os.symlink, "hard": os.link, "itself": lambda path, new: new.unlink(missing_ok=True)}


@pytest.mark.parametrize("kind", LINKS)
def test_validation_text_that_training_opens_is_named_whatever_its_name(data, tmp_path, kind):
    folder, settings = data
    train, path, link = tg.train, folder / "fineweb_val_000000.bin", tmp_path / "extra.bin"
    LINKS[kind](path, link)

    def opening(run, model, val):
        np.fromfile(link if link.exists() else path, np.uint16)
        return train(run, model, val)

    assert reasons(command(settings, tmp_path / "run", "ITERATIONS=2"), tmp_path / "run", train=opening) == [
        "C3: validation shards opened before the artifact was frozen"]


@pytest.mark.parametrize("loader", ["sequential", "shuffled"])
@pytest.mark.parametrize("kind", ["copy", "symbolic"])
def test_validation_text_among_the_training_shards_is_named(data, tmp_path, kind, loader):
    """A copy, or a link, which the loader itself reads: the content counts, as for data/prepare.py --check."""
    folder, settings = data
    path, new = folder / "fineweb_val_000000.bin", folder / "fineweb_train_000002.bin"
    shutil.copy(path, new) if kind == "copy" else new.symlink_to(path)
    told = reasons(command(settings, tmp_path / "run", f"LOADER={loader}"), tmp_path / "run")
    assert any(COPIES in reason for reason in told), told
    new.unlink()
    assert reasons(command(settings, tmp_path / "other", f"LOADER={loader}"), tmp_path / "other") == []


def test_ranks_that_trained_on_parts_of_the_validation_text_say_so_together(data, tmp_path):
    folder, settings = data
    shutil.copy(folder / "fineweb_val_000000.bin", folder / "fineweb_train_000002.bin")
    with Started(torchrun(command(settings, tmp_path / "run", "CHECKPOINT_EVERY=29"))) as run:
        told = summary(good(run.finish()))
    assert len(read_checkpoint(checkpoints(tmp_path / "run")[29])["copies"]) == 6
    alone = reasons(command(settings, tmp_path / "alone"), tmp_path / "alone")
    assert told["reasons"] == alone and COPIES in alone[0]


@pytest.fixture
def invalid(data):
    """Settings of a run whose first steps train on the validation text."""
    folder, settings = data
    for number in (1, 0):
        (folder / f"fineweb_train_00000{number}.bin").rename(folder / f"fineweb_train_00000{number + 1}.bin")
    shutil.copy(folder / "fineweb_val_000000.bin", folder / "fineweb_train_000000.bin")
    return command(settings, folder.parent / "run", "ITERATIONS=6")


def test_what_was_found_before_a_run_was_stopped_is_known_to_the_one_that_goes_on(invalid, tmp_path):
    """What the loader read, and what else was seen; no step after that meets it again."""
    step = tg._train_step

    def until_five(run, training, *more):
        if training.step == 5:
            raise tg.Stopped("enough", 1)
        run.validity.need(training.step != 2, tg.OPENED_EARLY)
        return step(run, training, *more)

    args = [*invalid, "CHECKPOINT_EVERY=5"]
    with pytest.raises(tg.Stopped):
        reasons(args, tmp_path / "run", _train_step=until_five)
    (state,) = map(read_checkpoint, checkpoints(tmp_path / "run").values())
    assert state["step"] == 5 and len(state["copies"]) == 6 and state["reasons"] == [tg.OPENED_EARLY]
    early, copies = reasons([*args, "RESUME=auto"], tmp_path / "run")
    assert early == tg.OPENED_EARLY and COPIES in copies
    # A checkpoint from before these were noted is gone on with.
    old = {name: value for name, value in state.items() if name not in ("reasons", "copies")}
    (tmp_path / "old.pt").write_bytes(container.checkpoint(old))
    assert reasons([*args, f"RESUME={tmp_path}/old.pt"], tmp_path / "other") == []


def test_what_was_found_in_training_goes_with_the_artifact(invalid, tmp_path):
    """Scored later, by itself, it is as invalid; one whose header is no list of reasons is refused."""
    told = reasons([*invalid, "PHASES=train"], tmp_path / "run")
    assert len(told) == 1 and COPIES in told[0]
    path = tmp_path / "run/model.pg"
    assert reasons([*invalid, "PHASES=eval", f"ARTIFACT={path}"], tmp_path / "later") == told
    header, streams = container.unseal(path.read_bytes())
    assert header["reasons"] == told
    for wrong in ("C3", [1], ["two\nlines"], ["x" * 5000], {"a": 1}):
        path.write_bytes(container.seal(header | {"reasons": wrong}, b"".join(streams.values())))
        with pytest.raises(tg.BadInput, match="unusable header .*reasons"):
            tg.load_artifact(path)


def test_a_seed_that_was_trained_with_is_scored_with(toy, tmp_path):
    """Adapters start from SEED: a score of the artifact, now or later, is one number, and another seed contradicts it."""
    words = ["NUM_LAYERS=1", "XSA_LAST_N=0", "VE_LAYERS=0", "VAL_TOKENS=600", "TTT=lora_docs", "TTT_LORA_LR=0.05", "EVAL_CONTEXT=cache"]
    first = summary(good(call(command(toy, tmp_path / "a", "SEED=7", *words))))
    again = command(toy, tmp_path / "b", "PHASES=eval", f"ARTIFACT={tmp_path}/a/model.pg", *words)
    second = summary(good(call(again)))
    assert second["val_bpb"] == first["val_bpb"] and second["seed"] == 7
    refused(call([*again, "SEED=8", f"OUT_DIR={tmp_path}/c"]), 2, "SEED=8", "model.pg", "7")


# --- what only one rank does ------------------------------------------------------------------------------------------

SCRIPT = """
import os, socket, sys
sys.path.insert(0, {repo!r})
import train_gpt as tg
make = tg.make_predictor
def connecting(*args):
    if os.environ["RANK"] == "1":
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()
    return make(*args)
tg.make_predictor = connecting
sys.exit(tg.main(sys.argv[1:]))
"""


def test_what_a_rank_other_than_the_first_does_is_known(trained, tmp_path):
    """Processes of torchrun, of which only the second makes a network connection."""
    script = tmp_path / "cheat.py"
    script.write_text(SCRIPT.format(repo=str(REPO)))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    with Started([*words, *trained, f"OUT_DIR={tmp_path}/run"]) as run:
        done = run.finish()
    assert summary(good(done))["reasons"] == ["the evaluation opened a network connection to 127.0.0.1"]
