"""Room 12, the train loop: what it does in which order, that it can be stopped and gone on with, and what it writes down."""

import hashlib
import io
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import time
import zipfile
from functools import partial
from types import SimpleNamespace

import container
import fuzzing
import pytest
import reference as ref
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import (
    RULE,
    SCRIPT,
    Started,
    call,
    checkpoints,
    command,
    events,
    furthest,
    good,
    log_lines,
    losses,
    read_checkpoint,
    refused,
    summary,
    torchrun,
    trainer,
    weights,
)
from toy import write_shard
from training import begun, text

import train_gpt
from train_gpt import Settings, Training, Validity, load_artifact

# The same run


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """A complete run as a command that logs, validates and saves: (folder, finished process)."""
    folder = tmp_path_factory.mktemp("whole")
    with Started(trainer(command(toy, folder, "ITERATIONS=12", "CHECKPOINT_EVERY=4", "VAL_LOSS_EVERY=5"))) as run:
        return folder, good(run.finish())


def train(toy, folder, *more):
    """A run up to the artifact with a checkpoint at its end, and what it gave: losses, last weights, artifact."""
    good(call(command(toy, folder, "PHASES=train", "CHECKPOINT_EVERY=1000", *more)))
    return losses(folder), weights(folder), hashlib.sha256((folder / "model.pg").read_bytes()).hexdigest()


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_settings_give_the_same_bits(toy, whole, tmp_path):
    folder, _ = whole
    again, last, artifact = train(toy, tmp_path, "ITERATIONS=12", "TRAIN_LOG_EVERY=3")
    first = losses(folder)
    assert again == {step: first[step] for step in again} and len(again) >= 10, "logged more or less often"
    assert same_bits(last, weights(folder)) and artifact == hashlib.sha256((folder / "model.pg").read_bytes()).hexdigest()


def test_another_seed_gives_another_run(toy, whole, tmp_path):
    other, *_ = train(toy, tmp_path, "SEED=1338", "ITERATIONS=2")
    first = losses(whole[0])
    assert all(other[step] != first[step] for step in other)


@pytest.fixture(scope="module")
def short(toy, tmp_path_factory):
    return train(toy, tmp_path_factory.mktemp("short"))


def test_the_warm_up_leaves_no_trace(toy, short, tmp_path):
    for steps in (0, 2):
        others, last, artifact = train(toy, tmp_path / str(steps), f"WARMUP_STEPS={steps}")
        assert others == short[0] and same_bits(last, short[1]) and artifact == short[2], f"WARMUP_STEPS={steps}"


@pytest.mark.parametrize("tokens", [64, 130, 256])  # of 512 a step: 8, 4 and 2 micro-batches
def test_accumulation_changes_nothing_but_rounding(toy, short, tmp_path, tokens):
    others, last, _ = train(toy, tmp_path, f"MICRO_BATCH_TOKENS={tokens}")
    assert max(abs(others[step] - short[0][step]) for step in short[0]) < 1e-5
    assert furthest(last, short[1]) < 1e-4


def test_looking_at_the_run_does_not_change_it(toy, short, tmp_path):
    others, last, artifact = train(toy, tmp_path, "VAL_LOSS_EVERY=1", "CHECKPOINT_EVERY=2", "EVAL_BATCH_SEQS=3")
    assert others == short[0] and same_bits(last, short[1]) and artifact == short[2]


def test_the_evaluation_batch_changes_the_speed_and_never_the_score(toy, whole, tmp_path):
    folder, done = whole
    args = ("PHASES=eval", f"ARTIFACT={folder}/model.pg")
    for batch in (1, 7, 1000):
        other = summary(good(call(command(toy, tmp_path / str(batch), *args, f"EVAL_BATCH_SEQS={batch}"))))
        assert other["val_bpb"] == pytest.approx(summary(done)["val_bpb"], rel=1e-6)


def test_training_and_scoring_in_two_commands_is_the_same_as_in_one(toy, whole, tmp_path):
    folder, done = whole
    trained = good(call(command(toy, tmp_path / "train", "ITERATIONS=12", "PHASES=train")))
    shutil.copytree(tmp_path / "train", tmp_path / "moved")
    scored = good(call(command(toy, tmp_path / "eval", "PHASES=eval", f"ARTIFACT={tmp_path}/moved/model.pg")))
    for key in ("val_bpb", "val_loss", "val_tokens", "val_bytes", "params"):
        assert summary(scored)[key] == summary(done)[key], key
    assert "val_bpb" not in summary(trained) and not events(tmp_path / "train", "final")
    assert "steps" not in summary(scored) and not events(tmp_path / "eval", "train")


# Resume

KINDS = dict(  # what a run may consist of beside its weights; 8 steps, some of them beyond the end of the data
    loops=("NUM_LOOPS=1", "LOOP_START=1", "LOOP_END=2", "ENABLE_LOOPING_AT=0.7"),
    stages=("TRAIN_SEQ_SCHEDULE=32@0.3,64@1", "TRAIN_BATCH_SCHEDULE=256@0.6,512@1", "SEQ_CHANGE_WARMUP_STEPS=3",
            "WD_TAPER_START_FRAC=0.2"),
    lawa=("AVERAGE=lawa", "LAWA_FREQ=2", "LAWA_K=3"),
    best=("AVERAGE=best", "HOLDOUT_TOKENS=300", "SWA_EVERY=2", "SWA_START_SCALE=1", "LAWA_FREQ=3", "LAWA_K=2"),
    extras=("COMPLEMENT_ALPHA=0.5", "MTP_NUM_HEADS=2", "NORMUON=1"),
    coprime=("LOADER=coprime", "TRAIN_BATCH_TOKENS=1024"), shuffled=("LOADER=shuffled", "TRAIN_BATCH_TOKENS=1024"),
    packed=("LOADER=packed", "DOC_MASK=attention", "TRAIN_BATCH_TOKENS=1024", "MICRO_BATCH_TOKENS=256"),
    qat=("LATE_QAT_THRESHOLD=0.9", "QAT_ROUNDING=soft"),
    allocated=("LATE_QAT_THRESHOLD=0.9", "FIT=allocate", "MATRIX_QUANT=gptq", "EMBED_QUANT=rtn",
               "GPTQ_CALIBRATION_TOKENS=1024", "SIZE_LIMIT=600000"))
EVERYTHING = [word for kind in ("loops", "stages", "best", "extras") for word in KINDS[kind]] + ["LOADER=coprime"]


@pytest.mark.parametrize("more", [EVERYTHING, KINDS["packed"]], ids=["everything", "packed"])
def test_the_warm_up_of_all_that_there_is_leaves_no_trace(toy, tmp_path, more):
    expected = train(toy, tmp_path / "warm", "ITERATIONS=8", *more, "WARMUP_STEPS=2")
    others, last, artifact = train(toy, tmp_path / "cold", "ITERATIONS=8", *more, "WARMUP_STEPS=0")
    assert others == expected[0] and same_bits(last, expected[1]) and artifact == expected[2]
    assert events(tmp_path / "warm", "candidates") == events(tmp_path / "cold", "candidates")


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_with_the_same_bits(toy, tmp_path, monkeypatch, kind):
    more = ("ITERATIONS=8", "WARMDOWN_FRAC=0.9", *KINDS[kind])
    expected = train(toy, tmp_path / "whole", *more)
    step = train_gpt._train_step
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "_train_step", lambda run, training, *rest: (
            training.step == 5 and signal.raise_signal(signal.SIGTERM), step(run, training, *rest))[1])
        stopped = call(command(toy, tmp_path / "cut", "PHASES=train", "CHECKPOINT_EVERY=1000", *more))
    refused(stopped, 128 + signal.SIGTERM, "after step 6", "RESUME=auto")
    others, last, artifact = train(toy, tmp_path / "cut", *more, "RESUME=auto")
    (row,) = events(tmp_path / "cut", "resume")
    assert row["step"] == 6
    assert others == expected[0] and same_bits(last, expected[1]) and artifact == expected[2]
    assert events(tmp_path / "whole", "candidates") == events(tmp_path / "cut", "candidates")


def test_the_checkpoint_holds_everything(toy, tmp_path):
    good(call(command(toy, tmp_path, "PHASES=train", "CHECKPOINT_EVERY=7", "ITERATIONS=8", *EVERYTHING, "WARMDOWN_FRAC=0.75")))
    state = read_checkpoint(checkpoints(tmp_path)[7])
    s, names = Settings.parse(command(toy, tmp_path, *EVERYTHING)), set(state["weights"])
    params = {f"model.{name}" for name, _ in train_gpt.GPT(s, init=False).named_parameters()}
    assert names == params | {"mtp.0.weight", "mtp.1.weight"} and set(state["optimizer"]) == names | {"t"}
    assert {kind: len(taken) for kind, taken in state["average"].items()} == {"ema": 1, "swa": 1, "lawa": 2}
    assert all(set(one) == names for taken in state["average"].values() for one in taken)
    assert (state["step"], state["optimizer"]["t"], state["average_count"]) == (7, 7, 2), "swa: steps 4 and 6 of the warmdown"
    assert state["tokens"] == state["complement"]["times"].sum() == 5 * 256 + 2 * 512
    assert state["stage"] == (2, 5, True) and state["position"] == 3 * 256 + 2 * 256 + 2 * 512
    matrices = [name for name in names if name.endswith("attn.q.weight")]
    assert matrices and all(len(state["optimizer"][name]) == 2 for name in matrices), "momentum and second moment"


def test_the_clock_of_a_resumed_run_goes_on_where_its_checkpoint_left_it(toy, tmp_path, monkeypatch, watched):
    """A second for each step: six before the interruption and four behind it are the ten of the budget."""
    real, step = train_gpt.time.monotonic, train_gpt._train_step
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(
        monotonic=lambda: real() * 1e-6 + len(trained(watched)), strftime=time.strftime))
    clocked = ("ITERATIONS=0", "MAX_WALLCLOCK_SECONDS=10.5", "WARMDOWN_SECONDS=4")
    args = command(toy, tmp_path, *clocked, "PHASES=train")
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "_train_step", lambda run, training, *rest: (
            training.step == 5 and signal.raise_signal(signal.SIGTERM), step(run, training, *rest))[1])
        refused(call(args), 143, "after step 6")
    said = summary(good(call([*args, "RESUME=auto"])))
    assert (said["steps"], said["train_seconds"]) == (10, pytest.approx(10, abs=0.1))
    (row,) = events(tmp_path, "resume")
    assert (row["step"], row["train_seconds"]) == (6, pytest.approx(6, abs=0.1))
    fall = [(10.5 - second) / 4 for second in (7, 8, 9)]
    assert [row.scale for row in trained(watched)] == pytest.approx(7 * [1] + fall, abs=0.1)


def test_a_run_that_was_killed_twice_ends_with_the_same_bits(toy, tmp_path):
    """One that uses everything a checkpoint has to hold."""
    dice = random.Random(os.environ.get("TEST_SEED"))  # set it to repeat a failure
    first, second = dice.randint(4, 12), dice.randint(1, 25)  # lines of the console
    more = ("ITERATIONS=32", "CHECKPOINT_EVERY=2", *EVERYTHING)
    expected, last, artifact = train(toy, tmp_path / "whole", *more)
    folder, shots = tmp_path / "killed", []
    with Started(trainer(command(toy, folder, "PHASES=train", *more))) as run:
        run.until(f"step:{first}/32 train_loss")
        run.signal(signal.SIGKILL)
        assert run.finish().returncode == -signal.SIGKILL
    shots.append(max(losses(folder)))
    with Started(trainer(command(toy, folder, "PHASES=train", "RESUME=auto", *more))) as run:
        run.until("resume step:")
        run.read(second)
        run.signal(signal.SIGKILL)
        assert run.finish().returncode in (-signal.SIGKILL, 0)
    shots.append(max(losses(folder)))
    good(call(command(toy, folder, "PHASES=train", "RESUME=auto", *more)))
    for row, shot in zip(events(folder, "resume"), shots):
        assert shot - 3 <= row["step"] <= shot, "goes on from the newest checkpoint"
    assert losses(folder) == expected, f"killed after {shots}"
    assert same_bits(weights(folder), last), f"killed after {shots}"
    assert hashlib.sha256((folder / "model.pg").read_bytes()).hexdigest() == artifact, f"killed after {shots}"


@pytest.fixture
def stopped(toy, tmp_path):
    """A folder with the checkpoints after steps 4 and 6 of a run of 8, and the arguments to go on with."""
    args = command(toy, tmp_path / "run", "ITERATIONS=8", "CHECKPOINT_EVERY=2", "PHASES=train")
    good(call(args))
    shutil.copytree(tmp_path / "run", tmp_path / "rest")
    (tmp_path / "rest/model.pg").unlink()
    paths = checkpoints(tmp_path / "rest")
    assert list(paths) == [6, 8], "the last two are kept"
    return tmp_path / "rest", [*args, f"OUT_DIR={tmp_path}/rest"], tmp_path / "run"


def resumed(args, folder, *more):
    """Step from which this run went on, after it ended well."""
    done = good(call([*args, *more]))
    rows = events(folder, "resume")
    return (rows[-1]["step"] if rows else None), done


def test_a_truncated_checkpoint_is_passed_over_with_a_word(stopped):
    folder, args, original = stopped
    path = checkpoints(folder)[8]
    path.write_bytes(path.read_bytes()[:-1000])
    step, done = resumed(args, folder, "RESUME=auto")
    assert step == 6
    (line,) = [line for line in done.stdout.splitlines() if "checkpoint_0000008.pt" in line and "checksum" in line]
    assert line.startswith("checkpoint_skipped ")
    assert same_bits(weights(folder, 8), weights(original, 8))


@pytest.mark.parametrize("other", [
    ("MATRIX_QUANT=gptq", "MATRIX_BITS=4", "GPTQ_CALIBRATION_TOKENS=1024", "EVAL_TEMPERATURE=0"),
    ("MATRIX_QUANT=ternary", "EVAL_SEQ_LEN=32", "EVAL_STRIDE=16", "TTT=full", "TTT_CHUNK_TOKENS=256")],
    ids=["gptq", "ternary"])
def test_trained_weights_are_packed_anew_with_other_settings(stopped, tmp_path, other):
    """Of a training that is over, the artifact and the score are those of a run that was trained with these settings."""
    folder, args, _ = stopped
    args = [*args, "PHASES=all"]
    again = [*args, *other, f"RESUME={checkpoints(folder)[8]}"]
    packed = good(call([*again, f"OUT_DIR={tmp_path}/again"]))
    alone = good(call([*args, *other, f"OUT_DIR={tmp_path}/alone"]))
    assert events(tmp_path / "again", "resume")[-1]["step"] == 8 and not losses(tmp_path / "again")
    for key in ("artifact_sha256", "val_bpb", "steps", "train_tokens", "total_bytes", "eligible_reasons"):
        assert summary(packed)[key] == summary(alone)[key], key
    six = checkpoints(folder)[6]
    refused(call([*args, *other, f"RESUME={six}", f"OUT_DIR={tmp_path}/six"]), 2, "other settings: ")
    for training in ("MATRIX_LR=0.5", "LATE_QAT_THRESHOLD=0.5"):
        refused(call([*again, training, f"OUT_DIR={tmp_path}/no"]), 2, "other settings: ")


def test_with_no_whole_checkpoint_the_run_starts_anew_and_says_so(stopped):
    folder, args, original = stopped
    for path in checkpoints(folder).values():
        path.write_bytes(b"")
    step, done = resumed(args, folder, "RESUME=auto")
    assert step is None and done.stdout.count("checkpoint_skipped ") == 2
    assert (folder / "model.pg").read_bytes() == (original / "model.pg").read_bytes()


def test_what_an_abandoned_run_left_is_neither_taken_nor_in_the_way(stopped):
    """A damaged checkpoint of step 9000 would be the newest for ever, and each new one would be deleted as the oldest."""
    folder, args, original = stopped
    for step, path in checkpoints(folder).items():
        path.write_bytes(b"")
        path.rename(folder / f"checkpoint_{step + 9000:07d}.pt")
    done = good(call([*args, "RESUME=auto"]))
    assert "started_anew " in done.stdout and "checkpoint_0009008.pt,checkpoint_0009006.pt" in done.stdout
    assert list(checkpoints(folder)) == [6, 8] and (folder / "checkpoint_0009008.abandoned").exists()
    assert (folder / "model.pg").read_bytes() == (original / "model.pg").read_bytes()


def test_a_user_may_keep_a_copy_beside_the_checkpoints(stopped):
    folder, args, _ = stopped
    six = checkpoints(folder)[6]
    copies = [shutil.copy(six, folder / name) for name in ("checkpoint_best.pt", "checkpoint_0000006.copy.pt")]
    done = good(call([*args, "RESUME=auto"]))
    assert events(folder, "resume")[-1]["step"] == 8 and "checkpoint_skipped" not in done.stdout
    assert all(copy.exists() for copy in copies)


def test_a_run_of_parts_by_other_code_or_hardware_is_no_record(stopped):
    folder, args, _ = stopped
    for path in checkpoints(folder).values():
        state = read_checkpoint(path)
        (mine,) = state["made_by"]
        path.write_bytes(container.checkpoint({**state, "made_by": ["code 0123456789ab on 8 x H100"]}))
    said = summary(resumed(args, folder, "RESUME=auto")[1])
    assert f"trained in parts, by code 0123456789ab on 8 x H100 and by {mine}" in said["eligible_reasons"]
    assert said["reasons"] == [], "the score says nothing of how the model was trained"


def test_a_checkpoint_can_be_named_and_must_then_be_whole(stopped):
    folder, args, original = stopped
    six = checkpoints(folder)[6]
    kept = shutil.copy(six, folder.parent / "kept.pt")
    step, _ = resumed(args, folder, f"RESUME={kept}")
    assert step == 6 and (folder / "model.pg").read_bytes() == (original / "model.pg").read_bytes()
    kept.write_bytes(kept.read_bytes()[:-1])
    refused(call([*args, f"RESUME={kept}"]), 2, kept, "checksum")
    refused(call([*args, "RESUME=/no/such/file.pt"]), 2, "/no/such/file.pt", "No such file")
    foreign = folder.parent / "foreign.pt"
    for content in (b"not a checkpoint", b""):
        foreign.write_bytes(content + hashlib.sha256(content).digest())
        refused(call([*args, f"RESUME={foreign}"]), 2, foreign)


@pytest.mark.parametrize("other", ["MATRIX_LR=0.5", "NUM_LAYERS=5", "ITERATIONS=9", "AVERAGE=swa",
                                   "SEED=7", "DTYPE=bfloat16"])
def test_a_checkpoint_of_other_settings_is_refused(stopped, other):
    """Which ones is said, as the checkpoint has them. Seed and dtype make another run, too."""
    folder, args, _ = stopped
    name = other.partition("=")[0]
    had = {**Settings.parse(args).experiment(), "SEED": "1337", "DTYPE": "float32"}[name]
    refused(call([*args, "RESUME=auto", other]), 2, "other settings", f"{name}={had}")


def test_a_checkpoint_of_before_a_setting_was_there_is_gone_on_with(stopped):
    """At the setting's default it is the same run; at another value it is not."""
    folder, args, original = stopped
    six = checkpoints(folder)[6]
    state = torch.load(io.BytesIO(train_gpt.read_checkpoint(six)), weights_only=True)
    del state["settings"]["CLIP_FLOOR"], state["settings"]["PARALLEL_FIRST_SKIP"]
    six.write_bytes(container.checkpoint(state))
    refused(call([*args, f"RESUME={six}", "CLIP_FLOOR=0.5"]), 2, "other settings: CLIP_FLOOR=0.0")
    step, _ = resumed(args, folder, f"RESUME={six}")
    assert step == 6 and (folder / "model.pg").read_bytes() == (original / "model.pg").read_bytes()


def moved(args, folder):
    """A copy of the data under another path, and the arguments with it."""
    source = [arg for arg in args if arg.startswith("DATA_PATH=")][-1].partition("=")[2]
    shutil.copytree(source, folder)
    return folder, [*args, f"DATA_PATH={folder}"]


def test_a_run_goes_on_where_its_data_have_moved_but_not_on_other_data(stopped, tmp_path):
    folder, args, original = stopped
    six = checkpoints(folder)[6]
    data, elsewhere = moved(args, tmp_path / "moved")
    step, _ = resumed(elsewhere, folder, f"RESUME={six}")
    assert step == 6 and (folder / "model.pg").read_bytes() == (original / "model.pg").read_bytes()
    shard = data / "fineweb_train_000001.bin"
    tokens = train_gpt.read_shard(shard).tolist()
    for other in ([7, *tokens[1:]], tokens[:-1]):
        write_shard(shard, other)
        refused(call([*elsewhere, f"RESUME={six}"]), 2, "other data", "2 shards")
    shard.unlink()
    refused(call([*elsewhere, f"RESUME={six}"]), 2, "other data", "2 shards", "1 shards")


def test_a_checkpoint_of_before_the_data_were_in_it_knows_them_by_their_path(stopped, tmp_path):
    folder, args, _ = stopped
    six = checkpoints(folder)[6]
    state = read_checkpoint(six)
    del state["data"]
    old = {name: Settings.parse(args).experiment()[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
    six.write_bytes(container.checkpoint({**state, "settings": state["settings"] | old}))
    refused(call([*moved(args, tmp_path / "moved")[1], f"RESUME={six}"]), 2, "other settings: DATA_PATH=")
    assert resumed(args, folder, f"RESUME={six}")[0] == 6


@pytest.fixture(scope="module")
def rich(toy, tmp_path_factory):
    """(arguments, checkpoint) of a run that uses everything that a checkpoint has to hold."""
    folder = tmp_path_factory.mktemp("rich")
    args = command(toy, folder, "ITERATIONS=8",
                   "CHECKPOINT_EVERY=8", "PHASES=train", *EVERYTHING, *KINDS["qat"])
    good(call(args))
    return args, checkpoints(folder)[8]


def change(*path, to):
    """A change of a checkpoint's state: the value under these names."""
    def apply(state):
        *names, last = path
        for name in names:
            state = state[name]
        state[last] = to(state[last]) if callable(to) else to
    return apply


SOME = "model.blocks.0.attn.q.weight"
IMPOSSIBLE = {  # what is wrong: (change, words of the message)
    "no step": (lambda state: state.pop("step"), "has no step"),
    "step of 2^70": (change("step", to=2**70), "step is 1180591620717411303424"),
    "step beyond the last": (change("step", to=9), "step is 9, not int from 0 to "),
    "step true": (change("step", to=True), "step is True"),
    "a field of another version": (change("surprise", to=1), "unknown surprise"),
    "weight of one number": (change("weights", SOME, to=torch.zeros(1)),
                             f"weights {SOME} is float32 (1,), not float32 ("),
    "weight of halves": (change("weights", SOME, to=torch.Tensor.half), f"weights {SOME} is float16"),
    "weight not finite": (change("weights", SOME, to=lambda w: w * math.nan), f"weights {SOME} has values"),
    "weight missing": (lambda state: state["weights"].pop(SOME), f"weights has no {SOME}"),
    "weight too many": (change("weights", "other", to=torch.zeros(1)), "weights has an unknown other"),
    "weight sparse": (change("weights", SOME, to=torch.Tensor.to_sparse), f"weights {SOME} is special"),
    "stage abc": (change("stage", to="abc"), "stage is str, not tuple of 3"),
    "stage 7": (change("stage", to=(7, 0, False)), "stage is 7"),
    "stage begins later": (change("stage", to=(0, 9, False)), "beginning of the stage is 9"),
    "negative seconds": (change("seconds", "train", to=-1.0), "seconds of train is -1.0"),
    "seconds nan": (change("seconds", "train", to=math.nan), "seconds of train is nan"),
    "reserve infinite": (change("reserve", to=math.inf), "reserve is inf"),
    "position back": (change("position", to=0), "position is 0"),
    "position far ahead": (change("position", to=2**62), "position is 4611686018427387904"),
    "tokens of other steps": (change("tokens", to=5), "tokens is 5"),
    "optimizer of another step": (change("optimizer", "t", to=3), "optimizer t is 3"),
    "momentum of another shape": (change("optimizer", SOME, 0, to=torch.zeros(2, 2)),
                                  f"optimizer {SOME} is float32 (2, 2)"),
    "moment missing": (lambda state: state["optimizer"][SOME].pop(), "is list of 1, not list of 2"),
    "negative second moment": (change("optimizer", SOME, 1, to=lambda t: t - 1e9),
                               f"optimizer {SOME} has a negative"),
    "rng too short": (change("rng", to=lambda t: t[:-1]), "rng is uint8"),
    "rng of zeros": (change("rng", to=torch.zeros_like), "rng is not the state of a generator"),
    "average of another kind": (change("average", "polyak", to=[]), "average has polyak"),
    "average without ema": (lambda state: state["average"].pop("ema"), "average has no ema"),
    "snapshots too many": (change("average", "lawa", to=lambda taken: 9 * taken), "at most 2 snapshots"),
    "snapshot of another shape": (change("average", "ema", 0, SOME, to=torch.zeros(1)),
                                  f"average ema {SOME} is float32 (1,)"),
    "sum of no snapshots": (change("average_count", to=0), "average_count is 0"),
    "no complement": (change("complement", to=None), "complement is NoneType"),
    "pair of no tokens": (change("complement", "pairs", to=lambda t: t + 512**2), "complement pairs are not"),
    "times too few": (change("complement", "times", to=lambda t: t[:-1]), "complement times is int64"),
    "no qat": (change("qat", to=None), "qat is NoneType"),
    "qat begun later": (change("qat", "begun", to=9), "qat begun is 9"),
    "qat step of zero": (change("qat", "steps", to=lambda steps: {n: 0 * t for n, t in steps.items()}),
                         "are not positive"),
    "settings a list": (change("settings", to=[]), "settings is list of 0"),
    "setting a number": (change("settings", "SEED", to=1), "settings SEED is int, not str"),
    "data a text": (change("data", to="here"), "data is str, not dict"),
}


def spoilt(path, what, target):
    """A checkpoint with the right checksum and something IMPOSSIBLE in it."""
    state = read_checkpoint(path)
    IMPOSSIBLE[what][0](state)
    target.write_bytes(container.checkpoint(state))
    return target


@pytest.mark.parametrize("what", ["no step", "step of 2^70", "weight of one number", "stage abc",
                                  "negative seconds"])
def test_a_checkpoint_that_cannot_be_of_this_run_is_refused_by_its_field(rich, tmp_path, what):
    args, path = rich
    bad = spoilt(path, what, tmp_path / "bad.pt")
    line = refused(call([*args, f"OUT_DIR={tmp_path}/out", f"RESUME={bad}"]), 2, bad, IMPOSSIBLE[what][1])
    assert len(line) <= 300 and not events(tmp_path / "out", "warmup"), "before minutes are spent"


def test_each_field_of_a_checkpoint_is_checked_before_any_is_used(tmp_path):
    args, path = fuzzing.small_run(tmp_path)
    trainee = fuzzing.Trainee(args, tmp_path / "trainee")
    for what, (_, words) in IMPOSSIBLE.items():
        bad = spoilt(path, what, tmp_path / "bad.pt")
        with pytest.raises(train_gpt.BadInput) as error:
            trainee.offer(bad)
        assert words in str(error.value) and str(bad) in str(error.value), what
        fuzzing.check_line(error.value, bad)
        assert fuzzing.same(trainee.state(), trainee.fresh), what
    assert trainee.offer(path)["step"] == 5


@pytest.mark.parametrize("content", [torch.zeros(3), [], {}, {"settings": {}}, {"weights": None}, 3])
def test_a_checkpoint_of_something_else_is_refused(rich, tmp_path, content):
    args, _ = rich
    (tmp_path / "bad.pt").write_bytes(container.checkpoint(content))
    refused(call([*args, f"OUT_DIR={tmp_path}/out", f"RESUME={tmp_path}/bad.pt"]), 2, tmp_path / "bad.pt")


def test_a_checkpoint_that_unpacks_to_more_than_it_is_is_refused(rich, tmp_path):
    """torch.save compresses nothing; 64 MiB of zeros in a file of 64 kB were made by somebody else."""
    args, _ = rich
    packed = io.BytesIO()
    saved = io.BytesIO(fuzzing.saved({"weights": torch.zeros(1 << 24)}))
    with zipfile.ZipFile(saved) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for record in plain.infolist():
            archive.writestr(record.filename, plain.read(record))
    (tmp_path / "bad.pt").write_bytes(fuzzing.sealed_checkpoint(packed.getvalue()))
    refused(call([*args, f"OUT_DIR={tmp_path}/out", f"RESUME={tmp_path}/bad.pt"]), 2, "it is compressed")


def test_resume_auto_passes_over_a_checkpoint_that_cannot_be_of_this_run(stopped):
    folder, args, original = stopped
    eight = checkpoints(folder)[8]
    state = read_checkpoint(eight)
    del state["step"]
    eight.write_bytes(container.checkpoint(state))
    step, done = resumed(args, folder, "RESUME=auto")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("checkpoint_skipped ")]
    assert step == 6 and eight.name in line and "has no step" in line
    assert (folder / "model.pg").read_bytes() == (original / "model.pg").read_bytes()
    for path in checkpoints(folder).values():
        path.write_bytes(container.checkpoint(state))
    done = good(call([*args, "RESUME=auto"]))
    assert done.stdout.count("checkpoint_skipped ") == 2 and "started_anew " in done.stdout
    assert (folder / "model.pg").read_bytes() == (original / "model.pg").read_bytes()


def test_a_checkpoint_that_is_refused_ends_all_ranks(rich, tmp_path):
    """Rank 0 reads it; the other one must not wait for ever."""
    args, path = rich
    bad = spoilt(path, "no step", tmp_path / "bad.pt")
    with Started(torchrun([*args, f"OUT_DIR={tmp_path}/out", f"RESUME={bad}"]), limit=60) as run:
        done = run.finish()
    assert done.returncode > 0 and "error: " in done.stderr and "error (rank 1): " in done.stderr
    assert done.stderr.count("has no step") >= 2


def test_the_seed_in_the_summary_is_that_of_the_weights(stopped):
    """A checkpoint with the weights of one seed cannot be reported as the run of another."""
    folder, args, _ = stopped
    done = call([*args, "RESUME=auto", "SEED=7"])
    assert done.returncode == 2 or summary(done)["seed"] == Settings().seed


def test_resume_in_an_empty_folder_starts_and_a_finished_run_is_only_packed_again(toy, tmp_path):
    args = command(toy, tmp_path, "ITERATIONS=4", "CHECKPOINT_EVERY=2", "PHASES=train", "RESUME=auto")
    good(call(args))
    artifact, trained = (tmp_path / "model.pg").read_bytes(), len(events(tmp_path, "train"))
    step, _ = resumed(args, tmp_path)
    assert step == 4 and (tmp_path / "model.pg").read_bytes() == artifact and len(events(tmp_path, "train")) == trained


def test_a_used_folder_is_refused_without_resume_and_left_alone(toy, whole):
    folder, _ = whole
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(call(command(toy, folder)), 2, folder, "RESUME=auto", "OUT_DIR")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_folder_of_a_finished_evaluation_is_refused_and_left_alone(toy, whole, tmp_path):
    """It holds a score, though nothing was trained there."""
    artifact = f"ARTIFACT={whole[0]}/model.pg"
    args = command(toy, tmp_path, "PHASES=eval", artifact, "VAL_TOKENS=100", "EVAL_STRIDE=0")
    good(call(args))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    refused(call(args), 2, tmp_path, "earlier run", "OUT_DIR")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Stages and depth recurrence


@pytest.fixture
def watched(monkeypatch):
    """Each backward pass of a run: phase, step, progress, scale, looping, shapes of the micro-batches, position."""
    rows, now = [], {}
    step, backward = train_gpt._train_step, Training.backward

    def train_step(run, training, progress, scale):
        now.update(progress=progress, scale=scale, stage=training.stage, before=training.stream.position)
        return step(run, training, progress, scale)

    def spy(self, micro):
        rows.append(SimpleNamespace(phase=self.run.clock._purpose, step=self.step, looping=self.model.looping, **now,
                                    shapes=[tuple(x.shape) for x, *_ in micro], position=self.stream.position))
        return backward(self, micro)

    monkeypatch.setattr(train_gpt, "_train_step", train_step)
    monkeypatch.setattr(Training, "backward", spy)
    return rows


def trained(rows):
    return [row for row in rows if row.phase == "train"]


@pytest.fixture(params=["steps", "clock"])
def of_ten(request, monkeypatch, watched):
    """Settings of a run of ten steps, by their number or by a clock on which each takes a second."""
    if request.param == "steps":
        return ("ITERATIONS=10",)
    real = train_gpt.Clock.__getitem__
    monkeypatch.setattr(train_gpt.Clock, "__getitem__", lambda self, phase: float(len(trained(watched)))
                        if phase == "train" else real(self, phase))
    return "ITERATIONS=0", "MAX_WALLCLOCK_SECONDS=10"


SCHEDULE = ("TRAIN_SEQ_SCHEDULE=16@0.25,32@0.6,64@1", "TRAIN_BATCH_SCHEDULE=160@0.5,256@1", "MICRO_BATCH_TOKENS=128",
            "SEQ_CHANGE_WARMUP_STEPS=2", "WARMDOWN_FRAC=0")


@pytest.mark.parametrize("loader", ["sequential", "coprime"])
def test_stages_give_their_shapes_at_their_fractions_of_the_run(toy, tmp_path, watched, of_ten, loader):
    said = summary(good(call(command(toy, tmp_path, *SCHEDULE, *of_ten, f"LOADER={loader}", "PHASES=train"))))
    rows = trained(watched)
    assert [row.progress for row in rows] == pytest.approx([k / 10 for k in range(10)])
    lengths, tokens = [16] * 3 + [32] * 3 + [64] * 4, [160] * 5 + [256] * 5
    assert [row.shapes for row in rows] == [
        2 * [(5, 16)]] * 3 + 2 * [5 * [(1, 32)]] + [2 * [(4, 32)]] + 4 * [2 * [(2, 64)]]
    begins = [row.position - count for row, count in zip(rows, tokens)]
    assert begins == [row.before if loader == "sequential" else -(-row.before // length) * length
                      for row, length in zip(rows, lengths)]
    assert (begins[6:7] == [1088]) == (loader == "coprime"), "the rest of a block is passed over"
    assert said["train_tokens"] == sum(tokens) and said["steps"] == 10
    assert [row.scale for row in rows] == [1, 1, 1, 0.5, 1, 0.5, 0.5, 1, 1, 1], "it rises again at every stage"
    sizes = [len(train_gpt.read_shard(path)) for path in train_gpt.find_shards(toy[0].partition("=")[2], "train")]
    total = sum(sizes) if loader == "sequential" else sum((size - 1) // 64 * 64 for size in sizes)
    assert said["epochs"] == pytest.approx(rows[-1].position / total, abs=1e-4)


def test_warm_up_meets_every_graph_that_training_meets(toy, tmp_path, watched):
    more = ("NUM_LOOPS=1", "LOOP_START=1", "LOOP_END=2", "ENABLE_LOOPING_AT=0.4", "ITERATIONS=10", "PHASES=train")
    good(call(command(toy, tmp_path, *SCHEDULE, *more)))
    warm, real = ({(row.shapes[0], row.looping) for row in watched if row.phase == phase}
                  for phase in ("warmup", "train"))
    assert warm == real and len(real) == 5
    (row,) = events(tmp_path, "warmup")
    assert row["graphs"] == 5


FRACTIONS = st.lists(st.integers(1, 9), max_size=3, unique=True).map(
    lambda ends: [*sorted(end / 10 for end in ends), 1])


@ref.tries(200)
@given(FRACTIONS, FRACTIONS, st.integers(0, 19), st.integers(0, 1), st.sampled_from([0.0, 0.3, 1.0]))
def test_the_planned_graphs_are_those_of_any_progress(seq, batch, switch, loops, late):
    s = ref.small(train_seq_schedule=tuple(f"{4 * 2**i}@{end}" for i, end in enumerate(seq)), num_loops=loops,
                  train_batch_schedule=tuple(f"{32 * (i + 1)}@{end}" for i, end in enumerate(batch)),
                  loop_start=0, loop_end=1, enable_looping_at=switch / 20, micro_batch_tokens=32, warmdown_frac=0.6,
                  late_qat_threshold=late)
    met, qat = set(), SimpleNamespace(begun=None, enter=lambda run, training, sharp: setattr(qat, "begun", 7)) if late else None
    for progress in [k / 40 for k in range(41)]:
        length = next((i for i, end in enumerate(seq) if progress < end), len(seq) - 1)
        tokens = next((i for i, end in enumerate(batch) if progress < end), len(batch) - 1)
        looping = bool(loops) and progress >= switch / 20
        fake = SimpleNamespace(run=SimpleNamespace(s=s), stage=0, step=7, stage_start=0, model=SimpleNamespace(), qat=qat)
        Training.enter(fake, progress, min((1 - progress) / 0.6, 1))
        rounded = progress > 1 - 0.6 * late + 1e-9
        assert bool(late and qat.begun) == rounded
        assert s.stages[fake.stage][1:] == (4 * 2**length, 32 * (tokens + 1)) and fake.model.looping == looping
        met.add((fake.stage, looping, rounded))
    plans = Training.plans(SimpleNamespace(run=SimpleNamespace(s=s), qat=qat))
    assert len(plans) == len(set(plans)) and met <= set(plans)
    assert all(not rounded and (stage, loop, True) in met for stage, loop, rounded in set(plans) - met), "but for what is rounded all along"


@pytest.mark.parametrize("words", [
    ("TRAIN_SEQ_SCHEDULE=64@0.5",), ("TRAIN_SEQ_SCHEDULE=64@1,128@2",), ("TRAIN_SEQ_SCHEDULE=64@nan,64@1",),
    ("TRAIN_BATCH_SCHEDULE=512@0.5",), ("TRAIN_SEQ_SCHEDULE=32@0.5,64@0.5,64@1",), ("TRAIN_SEQ_SCHEDULE=64",),
    ("TRAIN_BATCH_SCHEDULE=512@1,",), ("TRAIN_BATCH_SCHEDULE=1e3@1",), ("TRAIN_SEQ_SCHEDULE=64@0,64@1",),
    ("TRAIN_SEQ_SCHEDULE=48@1",), ("TRAIN_BATCH_SCHEDULE=500@1",),
    ("LOADER=coprime", "TRAIN_SEQ_SCHEDULE=24@0.5,64@1", "TRAIN_BATCH_TOKENS=384")], ids=" ".join)
def test_a_schedule_that_is_none_is_refused_with_one_line(toy, tmp_path, words):
    said = refused(call(command(toy, tmp_path, *words)), 2)
    assert re.search("TRAIN_(SEQ|BATCH)_(SCHEDULE|LEN|TOKENS)=?", said)


LOOPS = ("NUM_LOOPS=1", "LOOP_START=1", "LOOP_END=2", "SKIPS=none")


def test_depth_recurrence_begins_at_its_fraction_of_the_run(toy, tmp_path, watched, of_ten):
    good(call(command(toy, tmp_path / "loops", *LOOPS, *of_ten, "ENABLE_LOOPING_AT=0.4", "PHASES=train")))
    assert [row.looping for row in trained(watched)] == [False] * 4 + [True] * 6
    assert not events(tmp_path / "loops", "never_reached") and load_artifact(tmp_path / "loops/model.pg")[1].looping
    watched.clear()
    good(call(command(toy, tmp_path / "plain", "SKIPS=none", *of_ten, "PHASES=train")))
    with_loops, without = losses(tmp_path / "loops"), losses(tmp_path / "plain")
    assert [with_loops[k] == without[k] for k in range(1, 11)] == [True] * 4 + [False] * 6, "no sooner, no later"


def test_depth_recurrence_never_reached_stays_off_in_the_artifact(toy, tmp_path):
    """Also after the finished run was resumed, and when the artifact is scored by itself."""
    args = [*LOOPS, "ITERATIONS=8", "ENABLE_LOOPING_AT=0.9", "CHECKPOINT_EVERY=8", "RESUME=auto"]
    first = summary(good(call(command(toy, tmp_path / "run", *args))))
    (row,) = events(tmp_path / "run", "never_reached")
    assert row["what"] == "ENABLE_LOOPING_AT" and "does not loop" in row["consequence"]
    s, model = load_artifact(tmp_path / "run/model.pg")
    assert s.num_loops == 1 and not model.looping and len(model.plan) == 4
    plain = summary(good(call(command(toy, tmp_path / "plain", "SKIPS=none", "ITERATIONS=8"))))
    assert first["val_bpb"] == plain["val_bpb"]
    alone = summary(good(call(command(toy, tmp_path / "eval", "PHASES=eval", f"ARTIFACT={tmp_path}/run/model.pg"))))
    again = summary(good(call(command(toy, tmp_path / "run", *args))))
    assert alone["val_bpb"] == again["val_bpb"] == first["val_bpb"]
    assert not load_artifact(tmp_path / "run/model.pg")[1].looping


COMPILED = ("NUM_LAYERS=1", "XSA_LAST_N=1", "VE_DIM=0", "MODEL_DIM=16", "NUM_HEADS=2", "NUM_KV_HEADS=2", "MLP_MULT=1",
            "BIGRAM_VOCAB_SIZE=0", "LOADER=packed", "DOC_MASK=attention", "NUM_LOOPS=1", "LOOP_START=0", "LOOP_END=0",
            "ENABLE_LOOPING_AT=0.5", "TRAIN_SEQ_SCHEDULE=32@0.25,64@1", "TRAIN_BATCH_TOKENS=128", "ITERATIONS=8")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(
    "EXPLORE" not in os.environ, reason="a minute of C++; EXPLORE=1 runs it")])])
def test_a_compiled_run_is_the_eager_one_and_compiles_nothing_after_warm_up(toy, tmp_path, monkeypatch, backend):
    """Loops, stages, documents and packed rows, with validations between the steps."""
    graphs = []

    def count(name, function):
        monkeypatch.setattr(train_gpt, name, lambda *args: (graphs.append(
            torch._dynamo.utils.counters["stats"]["unique_graphs"]), function(*args))[1])

    # Compiling traces to a logger that pytest would collect line by line, at twice the price.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    eager = train(toy, tmp_path / "eager", *COMPILED, "VAL_LOSS_EVERY=3")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    count("_train_steps", train_gpt._train_steps)  # the end of warm-up
    count("export", train_gpt.export)  # the end of training
    compiled = train(toy, tmp_path / "compiled", *COMPILED, "VAL_LOSS_EVERY=3", "COMPILE=on")
    torch._dynamo.reset()
    assert max(abs(compiled[0][step] - eager[0][step]) for step in eager[0]) < 1e-4
    assert furthest(compiled[1], eager[1]) < 1e-3
    assert [row["val_loss"] for row in events(tmp_path / "compiled", "val")] == pytest.approx(
        [row["val_loss"] for row in events(tmp_path / "eager", "val")], abs=1e-4)
    assert graphs[0] == graphs[1] > 4


# The schedule and the clock


def test_the_learning_rate_and_the_loss_of_each_step_are_as_planned(toy, tmp_path):
    more = ("ITERATIONS=10", "WARMDOWN_FRAC=0.4", "MIN_LR=0.3", "LR_WARMUP_STEPS=2", "PHASES=train")
    good(call(command(toy, tmp_path, *more)))
    scales = [row["lr_scale"] for row in events(tmp_path, "train")]
    assert scales == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.3])


def test_the_first_loss_is_that_of_a_uniform_guess_and_the_last_is_lower(whole):
    by_step = losses(whole[0])
    assert by_step[1] == pytest.approx(math.log(512), abs=0.02)
    assert by_step[12] < by_step[1] - 0.5


def test_the_clock_ends_the_run_within_its_budget_and_at_the_end_of_the_schedule(toy, tmp_path):
    limit = 3
    done = good(call(command(toy, tmp_path, f"MAX_WALLCLOCK_SECONDS={limit}", "ITERATIONS=1000000", "WARMDOWN_FRAC=0.3", "VAL_LOSS_EVERY=20")))
    said, rows = summary(done), events(tmp_path, "train")
    ends = [row["train_time_ms"] / 1e3 for row in rows]
    steps = [b - a for a, b in zip(ends, ends[1:])]
    last = said["train_seconds"] - ends[-2]  # with the time until the run noticed that it was over
    slow = last > max(steps[-16:-1])  # slower than any of late: a busy machine, not a wrong decision
    assert 0.8 * limit < said["train_seconds"] <= (ends[-1] + 0.1 if slow else limit)
    assert rows[-1]["lr_scale"] < 0.3 and rows[3]["lr_scale"] == 1, "the warmdown is on the clock too"
    (stop,) = events(tmp_path, "stopping_early")
    assert stop["step"] == said["steps"] == len(rows) and "warmdown" not in [row["what"] for row in events(tmp_path, "never_reached")]
    assert said["validate_seconds"] > 0 and events(tmp_path, "val")[-1]["train_time_ms"] <= 1e3 * said["train_seconds"] + 1


CALIBRATED = ("MATRIX_QUANT=gptq", "GPTQ_CALIBRATION_TOKENS=4096", "ITERATIONS=1000000", "EVAL_STRIDE=0", "WARMDOWN_FRAC=0.3")


@pytest.mark.parametrize("source", ["train", "generated"])
def test_calibration_is_part_of_the_budget(toy, tmp_path, monkeypatch, source):
    """What it takes is measured in warm-up and kept of the clock: training and calibration together end in time. Seconds
    of the processor, which other work on this machine does not lengthen.
    """
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(monotonic=time.process_time, strftime=time.strftime))
    limit = 4
    done = good(call(command(toy, tmp_path, *CALIBRATED, f"MAX_WALLCLOCK_SECONDS={limit}", f"GPTQ_CALIBRATION={source}")))
    said, (reserve,), (calibrated,) = summary(done), events(tmp_path, "reserve"), events(tmp_path, "calibrate")
    assert calibrated["tokens"] >= 4096 and calibrated["source"] == source and calibrated["reserved_seconds"] == reserve["seconds"]
    assert said["calibrate_seconds"] == pytest.approx(calibrated["seconds"], abs=0.01) and said["calibrate_seconds"] > 0
    assert 0 < reserve["seconds"] < limit and said["train_seconds"] <= limit - reserve["seconds"] + 0.5
    assert said["train_seconds"] + said["calibrate_seconds"] <= limit * 1.1
    assert said["steps"] > 3 and said["valid"] == "yes" and not said["reasons"], "training text, read before the freeze"


@pytest.mark.parametrize("source", ["train", "generated"])
def test_the_reserve_is_what_calibration_takes_and_a_tenth_more(tmp_path, monkeypatch, source):
    """By a clock on which each backward pass of it takes a second, and each token that the model writes."""
    now, observe, advance = [0.0], train_gpt.CurvatureMeter.observe, train_gpt.KVCache.advance

    def slow(method):
        def timed(self, *args):
            now[0] += 1
            return method(self, *args)
        return timed

    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime))
    monkeypatch.setattr(train_gpt.CurvatureMeter, "observe", slow(observe))
    monkeypatch.setattr(train_gpt.KVCache, "advance", slow(advance))
    s = ref.small(**text(tmp_path / "text"), matrix_quant="gptq", gptq_calibration=source,
                  gptq_calibration_tokens=200, train_batch_tokens=64, micro_batch_tokens=32)
    run, training = begun(s, train_gpt.Runtime(s, {}), tmp_path / "run")
    reserve, before = training.measure_reserve(None), now[0]
    training.calibrate()
    if source == "train":
        assert now[0] - before == 8 and reserve == pytest.approx(1.1 * 8), "4 steps of 2 micro-batches"
    else:
        assert 16 < now[0] - before <= reserve < 30, "16 tokens of each row, all rows at once"


@pytest.mark.parametrize("slow, changes, seconds", [
    ("score", dict(average="best", holdout_tokens=200), 4), ("_best_inverse_temperature", dict(eval_temperature=0), 1)])
def test_the_reserve_holds_the_choice_of_an_average_and_the_temperature(tmp_path, monkeypatch, slow, changes, seconds):
    """By a clock on which each of the four candidates takes a second, or the fit of the temperature."""
    now, function = [0.0], getattr(train_gpt, slow)

    def timed(*args):
        now[0] += 1
        return function(*args)

    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime))
    monkeypatch.setattr(train_gpt, slow, timed)
    s = ref.small(**text(tmp_path / "text"), **changes)
    run, training = begun(s, train_gpt.Runtime(s, {}), tmp_path / "run")
    predictor = train_gpt.ModelPredictor(training.model, run.rt)
    assert training.measure_reserve(predictor) == pytest.approx(1.1 * seconds)


def test_a_reserve_that_is_given_is_kept_and_not_measured(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "measure_reserve", lambda *_: pytest.fail("it was given"))
    done = good(call(command(toy, tmp_path, *CALIBRATED, "GPTQ_CALIBRATION_TOKENS=512", "MAX_WALLCLOCK_SECONDS=100",
                             "GPTQ_RESERVE_SECONDS=98.5", "PHASES=train")))
    said, (reserve,) = summary(done), events(tmp_path, "reserve")
    assert reserve["seconds"] == 98.5 and said["train_seconds"] <= 2.5


@pytest.mark.parametrize("words", [("GPTQ_RESERVE_SECONDS=100",), ("GPTQ_CALIBRATION_TOKENS=1000000000",)])
def test_a_calibration_that_would_take_all_of_the_budget_is_refused(toy, tmp_path, words):
    refused(call(command(toy, tmp_path, *CALIBRATED, "MAX_WALLCLOCK_SECONDS=10", *words)), 2, "MAX_WALLCLOCK_SECONDS=10",
            *words)
    assert not (tmp_path / "model.pg").exists()


def test_without_a_limit_or_a_need_nothing_is_measured(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "measure_reserve", lambda *_: pytest.fail("nothing to keep it of"))
    good(call(command(toy, tmp_path / "steps", "MATRIX_QUANT=gptq", "GPTQ_CALIBRATION_TOKENS=512", "PHASES=train")))
    good(call(command(toy, tmp_path / "rtn", "MAX_WALLCLOCK_SECONDS=60", "MATRIX_QUANT=rtn", "PHASES=train")))
    assert len(events(tmp_path / "steps", "calibrate")) == 1 and not events(tmp_path / "rtn", "calibrate")


def test_a_run_limited_by_steps_and_by_time_ends_with_the_first_of_them(toy, tmp_path):
    said = summary(good(call(command(toy, tmp_path, "MAX_WALLCLOCK_SECONDS=600", "ITERATIONS=3", "PHASES=train"))))
    assert said["steps"] == 3 and not events(tmp_path, "stopping_early")


def test_scheduled_events_that_never_happened_are_said(toy, tmp_path):
    more = ("ITERATIONS=3", "PHASES=train", "MUON_MOMENTUM_WARMUP_STEPS=100", "LR_WARMUP_STEPS=50", "AVERAGE=swa", "SWA_EVERY=50")
    good(call(command(toy, tmp_path / "never", *more)))
    missed = " ".join(row["what"] for row in events(tmp_path / "never", "never_reached"))
    for what in ("MUON_MOMENTUM", "LR_WARMUP_STEPS", "AVERAGE"):
        assert what in missed, missed
    others = ("MATRIX_OPTIMIZER=adamw", "MUON_MOMENTUM_WARMUP_STEPS=100", "TRAIN_SEQ_SCHEDULE=32@0.8,64@1")
    good(call(command(toy, tmp_path / "flat", "ITERATIONS=4", "WARMDOWN_FRAC=0.1", "PHASES=train", *others)))
    missed = {row["what"]: row["consequence"] for row in events(tmp_path / "flat", "never_reached")}
    assert missed.keys() == {"warmdown", "stage"}, "nothing has momentum of Muon"
    assert missed["stage"] == "it ended in number 1 of 2"


def test_nothing_is_reported_as_missed_when_nothing_was(whole):
    assert not events(whole[0], "never_reached")


@pytest.mark.parametrize("loader, total, steps", [
    ("sequential", 1300, [3, 6]), ("packed", 1300, [3, 6]), ("coprime", 1280, [3, 5]), ("shuffled", 1280, [3, 5])])
def test_the_end_of_the_data_is_announced_and_training_goes_on_from_its_start(toy, tmp_path, loader, total, steps):
    """1,300 tokens, 512 a step; 20 whole blocks of 64."""
    data = next(pair.partition("=")[2] for pair in toy if pair.startswith("DATA_PATH="))
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/fineweb_train_000001.bin").unlink()
    write_shard(tmp_path / "data/fineweb_train_000000.bin", [1, *(300 + i % 200 for i in range(1299))])
    done = good(call(command(toy, tmp_path / "out", f"DATA_PATH={tmp_path}/data", "ITERATIONS=6", "PHASES=train",
                             f"LOADER={loader}", "DOC_MASK=attention")))
    rows = events(tmp_path / "out", "epoch")
    assert [(row["number"], row["step"]) for row in rows] == list(zip((1, 2), steps))
    assert done.stdout.count("epoch number:") == 2
    assert summary(done)["epochs"] == pytest.approx(6 * 512 / total, abs=1e-3)


def other_data(toy, folder, change):
    """The toy's data with other training shards: change(list of tokens of the first one) -> tokens; just this one."""
    data = next(pair.partition("=")[2] for pair in toy if pair.startswith("DATA_PATH="))
    shutil.copytree(data, folder)
    (folder / "fineweb_train_000001.bin").unlink()
    path = folder / "fineweb_train_000000.bin"
    write_shard(path, change(train_gpt.read_shard(path).tolist()))
    return path


def bad_at(place, token=700):
    return lambda tokens: [*tokens[:place], token, *tokens[place + 1 :]]


def test_a_bad_token_deep_in_a_shard_ends_the_run_with_a_checkpoint_to_go_on_from(toy, tmp_path):
    path = other_data(toy, tmp_path / "data", lambda tokens: bad_at(1400)(tokens[:2200]))
    args = command(toy, tmp_path / "run", f"DATA_PATH={tmp_path}/data", "ITERATIONS=6", "PHASES=train", "RESUME=auto")
    refused(call(args), 2, path, "token 700", f"offset {1024 + 2 * 1400}", "VOCAB_SIZE=512")
    assert list(checkpoints(tmp_path / "run")) == [max(losses(tmp_path / "run"))] == [2], "after the last good step"
    write_shard(path, bad_at(1400, 7)(train_gpt.read_shard(path).tolist()))
    good(call(args))
    good(call([*args, f"OUT_DIR={tmp_path}/whole"]))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert (tmp_path / "run/model.pg").read_bytes() == (tmp_path / "whole/model.pg").read_bytes()


def test_a_bad_token_that_one_rank_meets_ends_all_ranks_with_a_checkpoint(toy, tmp_path):
    """In the second half of the third batch: rank 0 has read its own half and must neither train nor wait for ever."""
    path = other_data(toy, tmp_path / "data", bad_at(1400))
    args = command(toy, tmp_path / "run", f"DATA_PATH={tmp_path}/data", "ITERATIONS=6", "PHASES=train")
    with Started(torchrun(args), limit=60) as run:
        done = run.finish()
    assert done.returncode > 0 and f"{path}: token 700 at offset {1024 + 2 * 1400}" in done.stderr
    assert read_checkpoint(checkpoints(tmp_path / "run")[2])["position"] == 1024


@pytest.mark.parametrize("more, words", [
    (("LOADER=shuffled",), "fewer than the 65 tokens"), (("LOADER=coprime",), "fewer than the 65 tokens"),
    (("AVERAGE=best", "HOLDOUT_TOKENS=100"), "HOLDOUT_TOKENS=100 leaves nothing"),
    (("AVERAGE=best", "HOLDOUT_TOKENS=65"), None)])
def test_a_stream_that_is_too_short_is_an_error_of_one_line(toy, tmp_path, more, words):
    other_data(toy, tmp_path / "data", lambda tokens: tokens[:64] if "LOADER" in more[0] else tokens[:100])
    done = call(command(toy, tmp_path / "run", f"DATA_PATH={tmp_path}/data", "PHASES=train", *more))
    refused(done, 2, words) if words else good(done)


def test_settings_without_effect_are_said(toy, tmp_path, whole):
    more = ("LOOP_START=1", "SWA_EVERY=3", "VE_DIM=0", "MUON_BETA2=0.9", "AVERAGE=lawa", "LAWA_FREQ=2", "ITERATIONS=2")
    good(call(command(toy, tmp_path, *more, "PHASES=train")))
    idle = {"LOOP_START": "NUM_LOOPS", "SWA_EVERY": "AVERAGE=", "VE_LAYERS": "VE_DIM", "MUON_BETA2": "NORMUON",
            "EMA_DECAY": "AVERAGE="}
    said = {row["setting"]: row["note"] for row in events(tmp_path, "warning")}
    assert said.keys() == idle.keys() and all(idle[name] in note for name, note in said.items()), said
    assert not events(whole[0], "warning")


# The log

CONTEST = [  # forms of the contest's own scripts, kept so that existing parsers work
    r"settings( .*)?", r"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=.+", r"val_loader:shards pattern=.+ tokens:\d+",
    r"train_loader:dataset:\S+ train_shards:\d+ tokens:\d+ order:\w+", r"model_params:\d+",
    r"step:\d+/\d+ train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"step:\d+/\d+ val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"stopping_early: wallclock_cap train_time:\d+ms step:\d+/\d+", r"peak memory allocated: \d+ MiB.*",
    r"Total submission size \S+: \d+ bytes", r"final_\w+ val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} eval_time:\d+ms valid:(yes|no) tested:(yes|no)", r"summary \{.*\}"]
TEXT = r'"([^"\\]|\\.)*"'  # what has spaces: in double quotes, with the escapes of JSON
EVENT = rf"[a-z]\w*( [a-z]\w*:([^\s\"]|{TEXT})*)+"


def test_every_line_of_the_log_parses(whole):
    folder, done = whole
    lines = log_lines(folder)
    strange = [line for line in lines if not re.fullmatch("|".join([EVENT, *CONTEST]), line)]
    assert not strange, strange
    assert done.stdout.splitlines() == lines, "the console shows the same lines"
    for form in CONTEST[1:]:
        assert "stopping_early" in form or sum(bool(re.fullmatch(form, line)) for line in lines) >= 1, form


def test_a_run_by_the_clock_alone_has_no_number_of_steps_to_reach():
    assert train_gpt.step_of(Settings.parse(["ITERATIONS=20000"]), 50) == "step:50/20000"
    assert train_gpt.step_of(Settings.parse(["ITERATIONS=0"]), 50) == "step:50"


def test_the_log_starts_with_the_source_and_the_versions(whole):
    text = (whole[0] / "train.log").read_text()
    source = SCRIPT.read_text()
    assert text.startswith(source + "\n" + RULE + "\n") and f"Running PyTorch {torch.__version__}" in text
    (run,) = events(whole[0], "run")
    assert hashlib.sha256(source.encode()).hexdigest().startswith(run["code_sha256"])
    assert run["torch"] == torch.__version__ and run["world_size"] == 1 and "commit" in run and "ITERATIONS=12" in run["command"]
    assert run["seed"] == 1337 and run["cuda"] == (torch.version.cuda or "none")
    assert f"sentencepiece=={sentencepiece.__version__}" in run["packages"], "versions to install again"


def test_parsers_written_for_the_contest_find_their_numbers(whole):
    folder, done = whole
    text, said = (folder / "train.log").read_text().rpartition(RULE)[2], summary(done)
    steps = {int(n): float(loss) for n, loss in re.findall(r"step:(\d+)/\d+ train_loss:([\d.]+)", text)}
    assert steps == {step: round(loss, 4) for step, loss in losses(folder).items()} and list(steps) == list(range(1, 13))
    vals = [(int(n), float(loss), float(bpb)) for n, loss, bpb in re.findall(r"step:(\d+)/\d+ val_loss:([\d.]+) val_bpb:([\d.]+)", text)]
    assert [step for step, *_ in vals] == [5, 10, 12]
    assert vals == [(row["step"], round(row["val_loss"], 4), round(row["val_bpb"], 4)) for row in events(folder, "val")]
    assert [int(n) for n in re.findall(r"Total submission size .*: (\d+) bytes", text)] == [said["total_bytes"]]
    ((loss, bpb),) = re.findall(r"^final_\w+ val_loss:(\d+\.\d{8}) val_bpb:(\d+\.\d{8})", text, re.M)
    assert (float(loss), float(bpb)) == (pytest.approx(said["val_loss"], abs=1e-8), pytest.approx(said["val_bpb"], abs=1e-8))
    times = [int(ms) for ms in re.findall(r"train_time:(\d+)ms", text)]
    assert times == sorted(times)
    for step, ms, average in re.findall(r"step:(\d+)/.* train_time:(\d+)ms step_avg:([\d.]+)ms", text):
        rounding = 0.51 / int(step) + 0.006
        assert float(average) == pytest.approx(int(ms) / int(step), abs=rounding)
    (ms,) = re.findall(r"eval_time:(\d+)ms", text)
    assert int(ms) / 1e3 == pytest.approx(said["eval_seconds"], abs=0.01)


def test_the_json_events_say_the_same_as_the_log(whole):
    folder, _ = whole
    lines = log_lines(folder)
    assert len(events(folder)) in (len(lines), len(lines) - 1), "one event a line; the summary may be a file of its own"
    assert any("betas:0.9,0.95" in line for line in lines), "a list is written as in the settings"
    for row in events(folder):
        same = [line for line in lines if line.startswith(row["event"] + " ")]
        if row["event"] in ("choice", "optimizer", "artifact", "bytes", "pack", "checkpoint", "eval"):
            words = [f"{key}:{train_gpt._word(value)}" for key, value in row.items() if key != "event"]
            assert " ".join([row["event"], *words]) in same


SUMMARY = """val_bpb val_loss valid reasons eligible eligible_reasons params steps train_tokens val_tokens val_bytes code_bytes model_bytes total_bytes
train_seconds calibrate_seconds export_seconds eval_seconds seed world_size device settings_hash code_sha256 artifact_sha256""".split()


def test_the_last_line_of_log_and_console_is_the_summary(whole, toy):
    folder, done = whole
    last = done.stdout.splitlines()[-1]
    said = summary(done)
    assert last.startswith("summary {") and log_lines(folder)[-1] == last
    assert not set(SUMMARY) - set(said), set(SUMMARY) - set(said)
    artifact, code = (folder / "model.pg").read_bytes(), SCRIPT.read_bytes()
    assert (said["code_bytes"], said["model_bytes"], said["total_bytes"]) == (len(code), len(artifact), len(code) + len(artifact))
    assert (said["artifact_sha256"], said["code_sha256"]) == (hashlib.sha256(artifact).hexdigest(), hashlib.sha256(code).hexdigest())
    assert (said["steps"], said["train_tokens"], said["world_size"], said["seed"], said["device"]) == (12, 12 * 512, 1, 1337, "cpu")
    assert said["val_bpb"] == pytest.approx(said["val_loss"] * said["val_tokens"] / said["val_bytes"] / math.log(2))
    assert said["settings_hash"] == Settings.parse(command(toy, folder, "ITERATIONS=12")).sha256()
    assert said["valid"] == "yes" and said["reasons"] == []
    assert said["eligible"] == "no" and any("H100" in why for why in said["eligible_reasons"]) and any("bytes" in why for why in said["eligible_reasons"])
    assert said["train_seconds"] > 0 and said["eval_seconds"] > 0 and said["export_seconds"] > 0
    assert said["train_seconds"] * 1e3 == pytest.approx(events(folder, "val")[-1]["train_time_ms"], abs=50)


def test_a_score_of_a_part_of_the_stream_is_valid_but_no_record(toy, whole, tmp_path):
    said = summary(good(call(command(toy, tmp_path, "PHASES=eval", f"ARTIFACT={whole[0]}/model.pg", "VAL_TOKENS=500"))))
    assert said["val_tokens"] == 500 and said["valid"] == "yes" and said["eligible"] == "no"
    assert "not trained in this run" in said["eligible_reasons"]


# Validity


def test_validation_text_may_be_read_for_a_report_or_after_the_freeze_only():
    ledger = Validity()
    ledger.opened("train")
    with ledger.reporting():
        assert not torch.is_grad_enabled(), "a report learns nothing"
        ledger.opened("val")
    assert torch.is_grad_enabled() and ledger.reasons == []
    ledger.opened("val")
    assert len(ledger.reasons) == 1 and "validation" in ledger.reasons[0]
    ledger = Validity()
    ledger.freeze()
    ledger.opened("val")
    assert ledger.reasons == []
    ledger.opened("train")
    ledger.opened("train")
    assert len(ledger.reasons) == 1 and "training" in ledger.reasons[0]


def test_a_report_that_fails_does_not_leave_the_door_open():
    ledger = Validity()
    with pytest.raises(KeyError), ledger.reporting():
        raise KeyError
    ledger.opened("val")
    assert ledger.reasons


def test_a_run_reads_the_shards_in_the_allowed_order(toy, tmp_path, monkeypatch):
    """Whatever opens a shard, by whatever name: no validation shard outside a report before the artifact is complete,

    no training shard after it.
    """
    seen, ledger, read = [], [], train_gpt.read_shard
    monkeypatch.setattr(train_gpt, "read_shard", lambda path, *rest: (seen.append((path.name, (tmp_path / "model.pg").exists(), ledger[0].frozen,
                                                                                  ledger[0]._reporting)), read(path, *rest))[1])
    made = Validity.__init__
    monkeypatch.setattr(Validity, "__init__", lambda self: (made(self), ledger.append(self))[0])
    good(call(command(toy, tmp_path, "ITERATIONS=2")))
    assert {name[:13] for name, *_ in seen} == {"fineweb_train", "fineweb_val_0"}
    for name, packed, frozen, reporting in seen:
        assert packed == frozen
        assert not frozen if "train" in name else frozen or reporting, name
    assert ledger[0].reasons == []


def test_an_invalid_run_says_so_in_every_line_that_carries_its_score(toy, tmp_path, monkeypatch):
    freeze = Validity.freeze
    monkeypatch.setattr(Validity, "freeze", lambda self: (self.opened("val"), freeze(self))[1])
    done = good(call(command(toy, tmp_path, "ITERATIONS=1")))
    said = summary(done)
    assert said["valid"] == "no" and said["eligible"] == "no" and "C3" in said["reasons"][0]
    assert all("valid:no" in line for line in done.stdout.splitlines() if line.startswith("final_"))
    assert json.loads((tmp_path / "summary.json").read_text())["valid"] == "no"
