"""What happens when something is wrong (design.md, section 9): one line that says what and where, an exit code that says
which kind, and nothing lost or half written."""

import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from process import clean_env, run_trainer
from runs import (
    SCRIPT,
    Started,
    call,
    checkpoints,
    command,
    events,
    good,
    log_lines,
    losses,
    read_checkpoint,
    refused,
    strict_json,
    summary,
    trainer,
)
from toy import toy_documents, train_tokenizer, write_shard

import train_gpt
from train_gpt import PREFIX, BadInput

VOCAB = 512


@pytest.fixture
def data(toy, tmp_path):
    """A copy of the toy data that a test may damage: (folder, settings)."""
    source = Path(next(pair.partition("=")[2] for pair in toy if pair.startswith("DATA_PATH=")))
    folder = Path(shutil.copytree(source, tmp_path / "data"))
    return folder, [*toy, f"DATA_PATH={folder}"]


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """Folder of a complete small run, for its model.pg. Never written to."""
    folder = tmp_path_factory.mktemp("trained")
    good(call(command(toy, folder, "ITERATIONS=2", "PHASES=train")))
    return folder


def parts_left(folder):
    """Anything that looks like the beginning of a file."""
    return [path.name for path in Path(folder).rglob("*") if path.name.endswith((".part", ".tmp"))]


# Data and tokenizer


def test_missing_data_is_named_with_the_command_that_makes_it(data, tmp_path):
    folder, args = data
    for path in folder.glob("fineweb_train_*"):
        path.unlink()
    refused(run_trainer(command(args, tmp_path / "out")), 2, "fineweb_train_*.bin", folder, "python data/prepare.py")
    write_shard(folder / "fineweb_train_000000.bin", [1] * 2000)
    (folder / "fineweb_val_000000.bin").unlink()
    refused(call(command(args, tmp_path / "out")), 2, "fineweb_val_*.bin", folder, "python data/prepare.py")
    missing = tmp_path / "datasets" / "fineweb10B_sp8192"
    missing.mkdir(parents=True)
    refused(call(command(args, tmp_path / "out", f"DATA_PATH={missing}", f"TOKENIZER_PATH={folder}/tokenizer.model")), 2,
            "python data/fineweb.py", "sp8192")
    assert not (tmp_path / "out").exists()


def test_a_newcomer_without_any_data_learns_how_to_make_it(tmp_path):
    said = refused(run_trainer([], cwd=tmp_path), 2, "data/datasets/fineweb10B_sp1024")
    assert "data/fineweb.py --variant sp1024" in said and "data/prepare.py" in said
    assert not list(tmp_path.iterdir())


def test_a_python_without_torch_is_told_how_to_get_it():
    done = subprocess.run([sys.executable, "-S", SCRIPT], env=clean_env(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: torch is not installed: bash run.sh setup, then .venv/bin/python\n"


def test_a_missing_or_wrong_tokenizer_is_named(data, tmp_path):
    folder, args = data
    args = command(args, tmp_path / "out")
    refused(call([*args, "TOKENIZER_PATH=/no/such/file.model"]), 2, "/no/such/file.model", "TOKENIZER_PATH")
    refused(call([*args, f"TOKENIZER_PATH={folder}/fineweb_val_000000.bin"]), 2, "fineweb_val_000000.bin", "not a SentencePiece model")
    refused(call([*args, "VOCAB_SIZE=1024"]), 2, "tokenizer.model", "512", "VOCAB_SIZE=1024")
    (folder / "tokenizer.model").unlink()
    refused(run_trainer(args), 2, f"{folder}/tokenizer.model", "TOKENIZER_PATH", "data/prepare.py")
    assert not (tmp_path / "out").exists()


def test_a_validation_stream_shorter_than_one_window_names_both_lengths(data, tmp_path):
    folder, args = data
    write_shard(folder / "fineweb_val_000000.bin", [1, *range(300, 350)])
    refused(call(command(args, tmp_path / "out")), 2, "50 targets", "EVAL_SEQ_LEN=64")


def damage(path, kind):
    """Damage a shard; returns what the message has to name."""
    raw = bytearray(path.read_bytes())
    count = struct.unpack_from("<i", raw, 8)[0]
    if kind == "magic":
        struct.pack_into("<i", raw, 0, 20240521)
        words = ("magic", "offset 0", "20240520", "20240521")
    elif kind == "version":
        struct.pack_into("<i", raw, 4, 7)
        words = ("version", "offset 4", "found 7")
    elif kind == "count":
        struct.pack_into("<i", raw, 8, count + 5)
        words = ("length", "offset 8", 1024 + 2 * count, 1024 + 2 * (count + 5))
    elif kind == "negative count":
        struct.pack_into("<i", raw, 8, -1)
        words = ("offset 8",)
    elif kind == "truncated":
        raw = raw[:-7]
        words = ("length", 1024 + 2 * count, len(raw))
    elif kind == "empty":
        raw, words = b"", ("magic", "20240520")
    elif kind == "no tokens":
        raw = raw[:1024]
        struct.pack_into("<i", raw, 8, 0)
        words = ("no tokens",)
    elif kind == "token":
        struct.pack_into("<H", raw, 1024 + 2 * 77, VOCAB)
        words = (f"token {VOCAB}", f"offset {1024 + 2 * 77}", f"VOCAB_SIZE={VOCAB}")
    path.write_bytes(raw)
    return words


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["magic", "version", "count", "negative count", "truncated", "empty", "no tokens", "token"])
def test_a_damaged_shard_is_named_with_offset_expected_and_found(data, tmp_path, split, kind):
    folder, args = data
    path = folder / f"fineweb_{split}_000000.bin"
    words = damage(path, kind)
    run = run_trainer if kind == "magic" else call
    done = run(command(args, tmp_path / "out"))
    refused(done, 2, path, *words)
    assert "step:1/" not in done.stdout, "found before the first step"


def test_a_bad_token_far_into_the_training_data_loses_no_work(data, tmp_path):
    """Found before training, or at least the steps until then are kept."""
    folder, args = data
    path = folder / "fineweb_train_000001.bin"
    first = struct.unpack_from("<i", (folder / "fineweb_train_000000.bin").read_bytes(), 8)[0]
    raw = bytearray(path.read_bytes())
    struct.pack_into("<H", raw, 1024 + 2 * 700, 60000)
    path.write_bytes(raw)
    done = call(command(args, tmp_path / "out", "ITERATIONS=12"))
    refused(done, 2, path, "token 60000", f"offset {1024 + 2 * 700}", f"VOCAB_SIZE={VOCAB}")
    steps = max(losses(tmp_path / "out"), default=0) if (tmp_path / "out/metrics.jsonl").exists() else 0
    assert steps in (0, (first + 700) // 512)
    assert not steps or steps in checkpoints(tmp_path / "out"), f"{steps} steps were trained and lost"


def test_the_same_command_works_once_the_data_is_repaired(data, tmp_path):
    """A run that never began does not occupy its folder."""
    folder, args = data
    whole = (folder / "fineweb_val_000000.bin").read_bytes()
    damage(folder / "fineweb_val_000000.bin", "truncated")
    args = command(args, tmp_path / "out", "ITERATIONS=1", "PHASES=train")
    refused(call(args), 2, "length")
    (folder / "fineweb_val_000000.bin").write_bytes(whole)
    good(call(args))


def test_bad_input_is_named_before_the_device_is_touched(data, tmp_path, monkeypatch):
    folder, args = data
    touched = []
    monkeypatch.setattr(train_gpt, "pick_attention", lambda *_: touched.append("attention"))
    monkeypatch.setattr(train_gpt, "Runtime", lambda *_: touched.append("runtime"))
    refused(call(command(args, tmp_path / "out", "VOCAB_SIZE=1024")), 2)
    refused(call(command(args, tmp_path / "out", "DATA_PATH=/no/such/place")), 2)
    refused(call(command(args, tmp_path / "out", "PHASES=eval", f"ARTIFACT={folder}/tokenizer.model")), 2)
    assert not touched


# Artifacts


def evaluate(toy, tmp_path, path, *more):
    return call(command(toy, tmp_path / "eval", "PHASES=eval", f"ARTIFACT={path}", "EVAL_STRIDE=0", *more))


def rebuilt(path, target, change=lambda header: None, raw=None, version=None, payload=None):
    """The artifact with its header changed and every checksum right: what an attacker would write."""
    data = path.read_bytes()
    magic, ours, packed, size, _ = PREFIX.unpack_from(data)
    header = json.loads(zlib.decompress(data[PREFIX.size : PREFIX.size + packed]))
    header = change(header) or header
    text = raw if raw is not None else json.dumps(header).encode()
    body = zlib.compress(text)
    rest = data[PREFIX.size + packed :] if payload is None else payload
    target.write_bytes(PREFIX.pack(magic, version or ours, len(body), len(text), zlib.crc32(body)) + body + rest)
    return target


def test_the_rebuilt_artifact_of_these_tests_is_accepted_when_nothing_is_changed(toy, trained, tmp_path):
    good(evaluate(toy, tmp_path, rebuilt(trained / "model.pg", tmp_path / "same.pg")))


def test_an_artifact_that_is_missing_truncated_or_of_another_kind_is_refused(toy, trained, tmp_path):
    data, path = (trained / "model.pg").read_bytes(), tmp_path / "bad.pg"
    refused(evaluate(toy, tmp_path, path), 2, path, "No such file")
    for content, words in ((b"", ("not an artifact",)), (b"PK\3\4" + data[4:], ("not an artifact", "offset 0")),
                           (data[:15], ("not an artifact",)), (data[:100], ("truncated",)), (data[:-1], ("truncated", len(data), len(data) - 1)),
                           (data + b"x", ("padded", len(data) + 1)), (data[:8] + struct.pack("<H", 9) + data[10:], ("version 9", "offset 8"))):
        path.write_bytes(content)
        refused(evaluate(toy, tmp_path, path), 2, path, *words)
    path.write_bytes(data[: len(data) // 2])
    refused(run_trainer(command(toy, tmp_path / "eval", "PHASES=eval", f"ARTIFACT={path}")), 2, path, "truncated")
    assert not (tmp_path / "eval").exists()


@settings(max_examples=60)
@given(where=st.integers(0, 2**31), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(trained, tmp_path_factory, where, bit):
    data, path = bytearray((trained / "model.pg").read_bytes()), tmp_path_factory.getbasetemp() / "flipped.pg"
    data[where % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(BadInput, match=re.escape(str(path))):
        train_gpt.load_artifact(path)


@settings(max_examples=25)
@given(length=st.integers(0, 2**31))
def test_any_truncation_is_noticed(trained, tmp_path_factory, length):
    data, path = (trained / "model.pg").read_bytes(), tmp_path_factory.getbasetemp() / "short.pg"
    path.write_bytes(data[: length % len(data)])
    with pytest.raises(BadInput, match=re.escape(str(path))):
        train_gpt.load_artifact(path)


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_a_pickle_is_refused_and_not_executed(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Bomb()}, tmp_path / "torch.pg")
    (tmp_path / "pickle.pg").write_bytes(pickle.dumps(Bomb()))
    for name in ("torch.pg", "pickle.pg"):
        refused(evaluate(toy, tmp_path, tmp_path / name), 2, "not an artifact")
    assert not (tmp_path / "executed").exists()


def header_with(**changes):
    def change(header):
        for key, value in changes.items():
            if isinstance(value, dict):
                header[key] = {**header[key], **value}
            else:
                header[key] = value
    return change


def first_row(key, position, value):
    def change(header):
        header[key][0][position] = value
    return change


def replace_row(key, row):
    return lambda header: header_with(**{key: [row]})(header)


HOSTILE = {
    "not JSON": dict(raw=b"{"),
    "not UTF-8": dict(raw=b"\xff\xfe{}"),
    "a list": dict(raw=b"[]"),
    "nothing": dict(raw=b"{}"),
    "nested beyond reason": dict(raw=b"[" * 100_000),
    "a number of a million digits": dict(raw=b'{"streams": [["a", "zlib", ' + b"9" * 1_000_000 + b", 1, 1]]}"),
    "infinite size": dict(change=first_row("streams", 2, float("inf"))),
    "NaN size": dict(change=first_row("streams", 3, float("nan"))),
    "negative size": dict(change=first_row("streams", 2, -5)),
    "size of 2^62": dict(change=first_row("streams", 2, 2**62)),
    "stream longer than the file": dict(change=first_row("streams", 3, 2**40)),
    "unknown compressor": dict(change=first_row("streams", 1, "os.system")),
    "unknown codec": dict(change=first_row("tensors", 2, "pickle")),
    "a tensor of 2^60": dict(change=first_row("tensors", 1, [2**30, 2**30])),
    "a negative tensor": dict(change=first_row("tensors", 1, [-4, -4])),
    "a scalar for a matrix": dict(change=first_row("tensors", 1, [])),
    "another tensor": dict(change=first_row("tensors", 0, "__class__")),
    "one tensor only": dict(change=replace_row("tensors", ["embed.weight", [512, 32], "int", 8])),
    "one stream only": dict(change=replace_row("streams", ["scale", "zlib", 1, 1, 0])),
    "no settings": dict(change=header_with(settings=None)),
    "unknown setting": dict(change=header_with(settings={"BANANA": "1"})),
    "a file for a setting": dict(change=header_with(settings={"@/etc/passwd": ""})),
    "bad value": dict(change=header_with(settings={"NUM_LAYERS": "10**9"})),
    "a model too large for any machine": dict(change=header_with(settings={"MODEL_DIM": "16384", "NUM_LAYERS": "256", "NUM_HEADS": "16"})),
    "a temperature of no model": dict(change=header_with(temperature=10.5)),
    "a negative temperature": dict(change=header_with(temperature=-0.5)),
    "NaN temperature": dict(change=header_with(temperature=float("nan"))),
    "other data": dict(change=header_with(settings={"DATA_PATH": "/somewhere/easier"})),
    "fewer validation tokens": dict(change=header_with(settings={"VAL_TOKENS": "100"})),
    "a folder to write to": dict(change=header_with(settings={"OUT_DIR": "elsewhere"})),
}


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.replace(" ", "_"))
def test_a_hostile_artifact_is_refused_in_one_line_before_anything_is_written(toy, trained, tmp_path, case):
    path = rebuilt(trained / "model.pg", tmp_path / "hostile.pg", **HOSTILE[case])
    refused(evaluate(toy, tmp_path, path), 2, path)


def test_an_artifact_of_before_a_setting_was_there_is_scored_with_its_default(toy, trained, tmp_path):
    """Settings come and go: a missing one is as it was, one that is gone is refused by name."""
    def older(header):
        for name in ("PARALLEL_FIRST_SKIP", "ASYM_LOGIT_RESCALE", "LOOP_ORDER"):
            del header["settings"][name]

    now = summary(good(evaluate(toy, tmp_path, trained / "model.pg")))
    path = rebuilt(trained / "model.pg", tmp_path / "older.pg", older)
    then = summary(good(evaluate(toy, tmp_path, path, f"OUT_DIR={tmp_path}/older")))
    assert then["val_bpb"] == now["val_bpb"] and then["valid"] == "yes"
    rebuilt(trained / "model.pg", path, header_with(settings={"GONE_SINCE": "1"}))
    refused(evaluate(toy, tmp_path, path), 2, path, "unknown GONE_SINCE")


def test_a_header_or_stream_that_unpacks_without_end_is_refused_without_the_memory(toy, trained, tmp_path):
    good_path, path = trained / "model.pg", tmp_path / "bomb.pg"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bomb = zlib.compress(bytes(200 << 20), 9)
    data = good_path.read_bytes()
    for claimed in (100, 1 << 30):
        path.write_bytes(PREFIX.pack(data[:8], 1, len(bomb), claimed, zlib.crc32(bomb)) + bomb)
        refused(evaluate(toy, tmp_path, path), 2, path)

    def claim(header):
        stream, *rest = header["streams"]
        header["streams"] = [[stream[0], "zlib", stream[2], len(bomb), zlib.crc32(bomb)], *rest]

    packed, rows = PREFIX.unpack_from(data)[2], []
    rebuilt(good_path, tmp_path / "look.pg", lambda header: rows.extend(header["streams"]))
    rebuilt(good_path, path, claim, payload=bomb + data[PREFIX.size + packed + rows[0][3] :])
    refused(evaluate(toy, tmp_path, path), 2, path, rows[0][0], "more than")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak - before < (300 << 10), "the 200 MiB of the bomb itself, made here, and not once more"


def test_an_artifact_that_contradicts_the_command_is_refused(toy, trained, tmp_path):
    refused(evaluate(toy, tmp_path, trained / "model.pg", "NUM_LAYERS=5", "VE_LAYERS=2,3"), 2, "NUM_LAYERS=5", "model.pg")


def test_an_artifact_is_not_scored_with_another_tokenizer_of_the_same_size(toy, trained, tmp_path):
    """Its ids would mean other bytes. A copy of its own tokenizer under another name is as good as that."""
    data = Path(next(pair.partition("=")[2] for pair in toy if pair.startswith("DATA_PATH=")))
    own, other = tmp_path / "own.model", tmp_path / "other.model"
    shutil.copy(data / "tokenizer.model", own)
    train_tokenizer(toy_documents(seed=8), other)
    good(evaluate(toy, tmp_path, trained / "model.pg", f"TOKENIZER_PATH={own}", "VAL_TOKENS=100"))
    found = [hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in (own, other)]
    refused(evaluate(toy, tmp_path / "refused", trained / "model.pg", f"TOKENIZER_PATH={other}"), 2,
            trained / "model.pg", "another tokenizer", *found, "TOKENIZER_PATH")
    assert not events(tmp_path / "refused" / "eval", "final")


def test_an_artifact_without_its_text_says_that_its_run_knew_where_that_is(toy, trained, tmp_path):
    """As in the README, but without the settings file: an artifact does not hold where its text lies."""
    done = call(["PHASES=eval", f"ARTIFACT={trained / 'model.pg'}", "DEVICE=cpu", f"OUT_DIR={tmp_path}", "DATA_PATH=nowhere"])
    refused(done, 2, "no fineweb_val_*.bin in DATA_PATH=nowhere", "model.pg does not hold the DATA_PATH of its run", "settings file")


# Size, loss, disk


def test_an_artifact_over_the_limit_is_kept_and_scored_and_ends_with_code_3(toy, tmp_path):
    done = run_trainer(command(toy, tmp_path, "SIZE_LIMIT=1000", "ITERATIONS=1"))
    total = events(tmp_path, "artifact")[0]["total_bytes"]
    assert done.returncode == 3 and "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all(str(word) in error for word in (total, 1000, total - 1000, "model.pg", "FIT=", "tools/submit.py"))
    assert train_gpt.load_artifact(tmp_path / "model.pg")
    assert events(tmp_path, "artifact")[0]["margin_bytes"] == 1000 - total
    (final,) = events(tmp_path, "final")
    for last in (done.stdout.splitlines()[-1], (tmp_path / "train.log").read_text().splitlines()[-1]):
        result = json.loads(last.removeprefix("summary "))
        assert result["val_bpb"] == final["val_bpb"] and result["valid"] == "yes" and result["eligible"] == "no"
        assert f"{total} bytes, the limit is 1000" in result["eligible_reasons"]


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_the_limit_itself_is_not_over_it(tmp_path, monkeypatch, beyond):
    """16,000,000 bytes are allowed, and one more is not."""
    s = train_gpt.Settings(device="cpu")
    run = train_gpt.Run(s, train_gpt.Runtime(s, {}), tmp_path, None)
    size = s.size_limit - len(run.source) + beyond
    info = {"bytes": size, "sha256": "", "compressor": "rans", "role_bytes": {}}
    monkeypatch.setattr(train_gpt, "save_artifact", lambda *_: info)
    train_gpt.export(run, None, "")
    (row,) = events(tmp_path, "artifact")
    assert (row["total_bytes"], row["margin_bytes"]) == (16_000_000 + beyond, -beyond)
    assert bool(run.too_large) == bool(run.validity.obstacles) == (beyond > 0)


@pytest.fixture(scope="module")
def diverged(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diverged")
    return folder, run_trainer(command(toy, folder, "MATRIX_LR=1e10", "AVERAGE=none", "CHECKPOINT_EVERY=1", "VAL_LOSS_EVERY=1", "ITERATIONS=20"))


def test_a_loss_that_is_not_finite_ends_with_code_4_and_names_the_step(diverged):
    folder, done = diverged
    said = refused(done, 4, "not finite", "last good checkpoint: checkpoint_")
    step = int(re.search(r"at step (\d+)", said)[1])
    assert f"step:{step - 1}/20 train_loss:" in done.stdout and not (folder / "model.pg").exists()


def test_the_checkpoint_that_is_called_good_gave_a_finite_loss(diverged):
    """The checkpoint after step k is known to be good once step k + 1 had a finite loss; two are kept, so there is one."""
    folder, done = diverged
    step, named = re.search(r"at step (\d+).*checkpoint_(\d+)", done.stderr).groups()
    assert int(named) + 1 < int(step)
    assert all(torch.isfinite(weight).all() for weight in read_checkpoint(folder / f"checkpoint_{named}.pt")["weights"].values())


def test_the_records_of_a_diverged_run_are_still_json(diverged):
    for line in (diverged[0] / "metrics.jsonl").read_text().splitlines():
        strict_json(line)


@pytest.mark.parametrize("setting", ["TIED_EMBED_LR=1e30", "SCALAR_LR=1e30", "MATRIX_LR=1e38", "TIED_EMBED_LR=1e38"])
def test_divergence_by_any_learning_rate_ends_the_same_way(toy, tmp_path, setting):
    done = call(command(toy, tmp_path / "out", setting))
    refused(done, done.returncode, "not finite" if done.returncode == 4 else setting)
    assert done.returncode in (2, 4)


def limited(args, kilobytes):
    """The trainer under a limit on the size of every file that it writes: how a full disk looks from inside."""
    return ["bash", "-c", f"ulimit -f {kilobytes}; exec \"$@\"", "bash", *trainer(args)]


def test_a_full_disk_leaves_earlier_checkpoints_and_artifact_as_they_were(toy, tmp_path):
    args = command(toy, tmp_path, "MODEL_DIM=96", "MATRIX_BITS=16", "EMBED_BITS=16", "CHECKPOINT_EVERY=2", "PHASES=train")
    good(call([*args, "ITERATIONS=4"]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".pt", ".pg")}
    assert set(before) == {"checkpoint_0000002.pt", "checkpoint_0000004.pt", "model.pg"}
    limit = SCRIPT.stat().st_size // 1024 + 100  # room for a log, not for an artifact or a checkpoint
    assert min(map(len, before.values())) > 1024 * limit
    with Started(limited([*args, "ITERATIONS=4", f"RESUME={tmp_path}/checkpoint_0000002.pt"], limit)) as run:
        done = run.finish()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"{tmp_path}/model.pg cannot be written (File too large)" in errors[0]
    assert "checkpoint_failed step:4" in done.stdout, "a checkpoint that cannot be written is said and does not end the run"
    (tmp_path / "checkpoint_0000004.abandoned").rename(tmp_path / "checkpoint_0000004.pt")  # of the run that step 2 left
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".pt", ".pg")}
    assert after == before and not parts_left(tmp_path)


def test_a_full_disk_does_not_end_a_run_whose_results_fit(toy, tmp_path):
    limit = SCRIPT.stat().st_size // 1024 + 60
    with Started(limited(command(toy, tmp_path, "CHECKPOINT_EVERY=2"), limit)) as run:
        done = good(run.finish())
    assert done.stdout.count("checkpoint_failed ") >= 2 and not checkpoints(tmp_path) and not parts_left(tmp_path)
    assert done.stdout.splitlines()[-1].startswith("summary {")


def test_a_summary_that_cannot_be_stored_is_still_printed(toy, trained, tmp_path):
    (tmp_path / "eval/summary.json").mkdir(parents=True)
    done = evaluate(toy, tmp_path, trained / "model.pg")
    assert done.stdout.splitlines()[-1].startswith("summary {"), done.stderr


def test_a_folder_that_cannot_be_written_is_named(toy, tmp_path):
    (tmp_path / "file").write_text("")
    refused(call(command(toy, tmp_path / "file" / "out")), 2, tmp_path / "file", "OUT_DIR")


# Signals


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_run_that_is_told_to_stop_saves_first_and_its_clock_goes_on_when_resumed(toy, tmp_path, number, code):
    args = command(toy, tmp_path, "ITERATIONS=80", "PHASES=train")
    with Started(trainer(args)) as run:
        run.until("step:20/")
        run.signal(number)
        done = run.finish()
    said = refused(done, code, f"interrupted by {number.name} after step", "RESUME=auto", tmp_path)
    (step,) = checkpoints(tmp_path)
    assert f"after step {step};" in said and max(losses(tmp_path)) == step >= 20 and not (tmp_path / "model.pg").exists()
    spent = events(tmp_path, "train")[-1]["train_time_ms"] / 1e3
    resumed = good(call([*args, "RESUME=auto"]))
    assert events(tmp_path, "resume")[0]["step"] == step
    assert list(losses(tmp_path)) == list(range(1, 81)), "every step once"
    assert events(tmp_path, "resume")[0]["train_seconds"] >= 0.95 * spent, "the seconds before the interruption count"
    assert summary(resumed)["train_seconds"] > spent


SLOW_VALIDATION = ("AVERAGE=none", "EVAL_BATCH_SEQS=1", "EVAL_SEQ_LEN=4", "EVAL_STRIDE=0")  # about 480 windows one by one


def test_a_signal_during_the_last_validation_is_not_lost(toy, tmp_path):
    with Started(trainer(command(toy, tmp_path, "ITERATIONS=8", "PHASES=train", *SLOW_VALIDATION))) as run:
        run.until("step:8/8 train_loss")
        run.signal(signal.SIGTERM)
        done = run.finish()
    assert done.returncode == 143 or done.returncode == -signal.SIGTERM, f"went on as if nothing had happened: {done.returncode}"
    assert 8 in checkpoints(tmp_path), "the eight steps were trained and are lost"


def test_a_second_interrupt_ends_at_once(toy, tmp_path):
    """For the user who does not want to wait for the validation that is under way."""
    args = command(toy, tmp_path, "ITERATIONS=100000", "VAL_LOSS_EVERY=3", *SLOW_VALIDATION)
    with Started(trainer(args)) as run:
        run.until("step:3/100000 train_loss")
        run.signal(signal.SIGINT)
        time.sleep(0.3)
        run.signal(signal.SIGINT)
        began = time.monotonic()
        done = run.finish()
    assert done.returncode == 130 and "Traceback" not in done.stderr and time.monotonic() - began < 5


def test_an_interrupt_during_the_evaluation_leaves_the_artifact_and_no_traceback(toy, trained, tmp_path):
    args = command(toy, tmp_path, "PHASES=eval", f"ARTIFACT={trained}/model.pg", "EVAL_STRIDE=1", "EVAL_BATCH_SEQS=1")
    before = (trained / "model.pg").read_bytes()
    with Started(trainer(args)) as run:
        run.until("val_bpb:enabled")
        time.sleep(1)
        run.signal(signal.SIGINT)
        done = run.finish()
    refused(done, 130, "interrupted by SIGINT", "the same command starts again")
    assert log_lines(tmp_path)[-1].startswith('ended reason:"interrupted by SIGINT')
    assert (trained / "model.pg").read_bytes() == before and not parts_left(tmp_path)


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Else a machine that loses its power may keep the name and lose the bytes."""
    seen, fsync, rename = [], os.fsync, os.replace

    def synced(file):
        fsync(file)
        seen.append(os.fstat(file).st_size)

    def renamed(old, new):
        rename(old, new)
        seen.append(Path(new).name)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    train_gpt.write_atomic(tmp_path / "file", [b"one", b"three"])
    assert seen[:2] == [8, "file"] and (tmp_path / "file").read_bytes() == b"onethree"


def test_a_killed_run_leaves_nothing_half_written_under_a_final_name(toy, tmp_path):
    """Killed while it writes a checkpoint after every step: whatever has the name of a checkpoint is one."""
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        with Started(trainer(command(toy, folder, "ITERATIONS=100000", "CHECKPOINT_EVERY=1"))) as run:
            run.until("checkpoint step:3 ")
            time.sleep(random.uniform(0, 0.1))
            run.signal(signal.SIGKILL)
            assert run.finish().returncode == -signal.SIGKILL
        assert max(checkpoints(folder)) >= 3
        for path in checkpoints(folder).values():
            read_checkpoint(path)
        assert not (folder / "model.pg").exists()
        for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]:
            strict_json(line)
        assert log_lines(folder)
