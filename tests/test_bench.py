"""tools/bench.py: its FLOPs against sums done by hand and against torch's own counter, its data against the trainer's
reader, what the table and the JSON say about toy runs, and bad input; for `pack` that every container gives back what
it was given, the entropies against sums done by hand, equal bytes; for `eval` and `validity` scores and verdicts against
the trainer's own, forwards and counts against loops by hand.
Nothing here judges a speed.
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from process import REPO, clean_env
from runs import call, good, heard, summary
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode
from toy import BOS, TOY

import bench
import common
import train_gpt as tg
from benchmarks import budgets, containers, evaluation, harness, packing, training, validity, weights
from benchmarks.harness import measure
from benchmarks.ratios import Ratio, differs, ratio_of_blocks

ROW = ("mode", "looping", "share", "ms_per_step", "ms_min", "ms_max", "cpu_ms_per_step", "cpu_ms_min", "cpu_ms_max",
       "tokens_per_second", "peak_memory_mib", "mflop_per_token", "tflop_per_step", "tflops_per_device", "mfu",
       "warmup_seconds", "loss", "repeats")
HEAD = ("command", "settings", "commit", "changed_files", "torch", "threads", "machine", "rows", "complete")
SHARED = (*HEAD, "settings_hash", "steps", "warmup", "repeats", "device", "world_size", "dtype", "attention", "parameters",
          "tokens_per_step", "seq_len", "micro_batches", "micro_batch_tokens", "peak_tflops")


def command(words, env=None, launcher=()):
    return subprocess.run([sys.executable, *launcher, str(REPO / "tools/bench.py"), *map(str, words)], text=True,
                          env=clean_env(env), timeout=100, capture_output=True, stdin=subprocess.DEVNULL, check=False)


APART = harness.measure_apart


@contextlib.contextmanager
def here():
    """A command in this process: its jobs, too, and no settings from the environment. Gives the lines it prints."""
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(clean_env()):
            patch.delenv(name)
        if harness.measure_apart is APART:  # else a test has its own
            patch.setattr(harness, "measure_apart", lambda work, job, *_: measure(work, job))
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        yield printed


def read(path):
    """The JSON of a command; a command with several tables has the rows of each by its name, too."""
    result = json.loads(path.read_text())
    assert set(HEAD) <= set(result)
    for row in result["rows"]:
        if "table" in row:
            result.setdefault(row["table"], []).append(row)
    return result


def settings(text=""):
    return tg.Settings.parse(text.split(), {})


def flops(s, length, looping=True):
    with torch.device("meta"):
        objective = tg.Objective(tg.GPT(s, init=False), s)
    objective.model.looping = s.loops and looping
    return training.flops_per_token(objective, s, length)


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


def test_default_model_has_the_published_count():
    """240.2 MFLOP a token, of which 159.4 in matmuls and 80.8 in attention, and 188.9 TFLOP a step."""
    per_token = flops(settings(), 2048)
    assert per_token / 1e6 == pytest.approx(240.2, abs=0.05)
    assert per_token * 786_432 / 1e12 == pytest.approx(188.9, abs=0.05)
    attention = 3.5 * 4 * 2048 * 512 / 2 * 11
    assert (per_token - attention) / 1e6 == pytest.approx(159.4, abs=0.05)


# (settings, weights that multiply a token: per layer q, k, v, o, up, down; then head, bigram and value projection)
HAND = [
    ("NUM_LAYERS=2 MODEL_DIM=64 NUM_HEADS=4 NUM_KV_HEADS=4 MLP_MULT=3 VOCAB_SIZE=100 BIGRAM_VOCAB_SIZE=0 VE_DIM=0",
     2 * (4 * 64 * 64 + 2 * 64 * 192) + 100 * 64),
    ("NUM_LAYERS=3 MODEL_DIM=64 NUM_HEADS=8 NUM_KV_HEADS=2 MLP_MULT=4 VOCAB_SIZE=100 BIGRAM_VOCAB_SIZE=0 VE_DIM=0",
     3 * (2 * 64 * 64 + 2 * 16 * 64 + 2 * 64 * 256) + 100 * 64),
    ("NUM_LAYERS=1 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 MLP_MULT=2.5 VOCAB_SIZE=70 BIGRAM_VOCAB_SIZE=9"
     " BIGRAM_DIM=12 VE_DIM=20 VE_LAYERS=0", 2 * 32 * 32 + 2 * 16 * 32 + 2 * 32 * 80 + 70 * 32 + 12 * 32 + 20 * 16),
    ("NUM_LAYERS=1 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 MLP_MULT=2 VOCAB_SIZE=70 BIGRAM_VOCAB_SIZE=9"
     " BIGRAM_DIM=32 VE_DIM=0", 2 * 32 * 32 + 2 * 16 * 32 + 2 * 32 * 64 + 70 * 32),  # a bigram table without projection
]


def test_the_frontier_with_and_without_its_loop():
    """296.3 MFLOP a token in 11 visits, 444.1 in 17; the head gates (1,056 weights) were not counted."""
    s = settings("VOCAB_SIZE=8192 MLP_MULT=4 BIGRAM_VOCAB_SIZE=0 VE_DIM=0 NUM_LOOPS=2")
    assert flops(s, 2048, looping=False) / 1e6 == pytest.approx(296.3, abs=0.1)  # rounded terms
    assert flops(s, 2048) / 1e6 == pytest.approx(444.1, abs=0.1)


@pytest.mark.parametrize("length", [16, 128])
@pytest.mark.parametrize("text, weights", HAND)
def test_flops_by_hand(text, weights, length):
    s = settings(text + " XSA_LAST_N=0 ROPE_DIMS=4 TRAIN_SEQ_LEN=128 TRAIN_BATCH_TOKENS=128")
    scores = s.num_layers * (2 * s.model_dim * length + 2 * s.model_dim * length) / 2  # q k^T and p v, half of each
    assert flops(s, length) == 6 * weights + 3.5 * scores


def test_matmuls_are_those_that_torch_counts():
    s = settings(" ".join(TOY))
    model, ids = tg.GPT(s), torch.randint(2, 512, (2, 64))
    with FlopCounterMode(display=False) as counter:
        tg.Objective(model, s)(ids, ids).backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if op is torch.ops.aten.mm)
    attention = 3.5 * s.num_layers * 4 * 64 * s.model_dim / 2
    assert flops(s, 64) - attention == counted / ids.numel()


def test_every_visit_of_a_block_counts():
    s = settings(" ".join(TOY) + " NUM_LOOPS=1 LOOP_START=1 LOOP_END=1")
    block = 2 * 32 * 32 + 2 * 16 * 32 + 2 * 32 * 96
    assert flops(s, 64) - flops(s, 64, looping=False) == 6 * block + 3.5 * 4 * 64 * 32 / 2


def test_every_head_counts():
    plain = flops(settings(" ".join(TOY)), 64)
    assert flops(settings(" ".join(TOY) + " TIE_EMBEDDINGS=0"), 64) == plain
    assert flops(settings(" ".join(TOY) + " MTP_NUM_HEADS=2"), 64) - plain == 6 * 2 * 512 * 32


@pytest.mark.parametrize("device, dtype, given, peak", [
    ("NVIDIA H100 80GB HBM3", "bfloat16", None, 989e12), ("NVIDIA H200", "bfloat16", None, 989e12),
    ("NVIDIA A100-SXM4-80GB", "bfloat16", None, 312e12), ("NVIDIA H100 PCIe", "bfloat16", None, 756e12),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None, None), ("NVIDIA H100 80GB HBM3", "float32", None, None),
    ("cpu", "float32", None, None), ("cpu", "float32", 0.5, 0.5e12), ("NVIDIA H200", "bfloat16", 900.0, 900e12)])
def test_peak_of_a_device(device, dtype, given, peak):
    assert training.peak_flops(device, dtype, given) == peak


# ---- data -----------------------------------------------------------------------------------------------------------


def test_shards_are_the_contests(tmp_path):
    bench.write_shards(tmp_path, 3_000_000, 1024)
    paths = tg.find_shards(tmp_path, "train")
    assert len(paths) == 2
    tokens = np.concatenate([tg.read_shard(path, 1024) for path in paths])
    assert len(tokens) >= 3_000_000 and tokens[0] == BOS and tokens.min() == BOS
    starts = np.flatnonzero(tokens == BOS)
    assert 900 < len(tokens) / len(starts) < 1020  # tokens of a document
    assert np.median(np.diff(starts)) < 700 and np.diff(starts).min() >= 2  # skewed, none empty
    assert len(np.unique(tokens)) == 1023  # every id but 0


@pytest.mark.parametrize("vocab_size, tokens", [(8, 40), (65536, 100_000)])
def test_shards_of_any_vocabulary_are_the_same_again(tmp_path, vocab_size, tokens):
    for name in "ab":
        (tmp_path / name).mkdir()
        training.write_shards(tmp_path / name, tokens, vocab_size)
        for path in tg.find_shards(tmp_path / name, "train"):
            assert len(tg.read_shard(path, vocab_size)) == tokens // 2 + 1
            assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


# ---- what a user sees -----------------------------------------------------------------------------------------------


def test_help_waits_for_nothing():
    script = "import sys, bench; bench.main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=REPO / "tools", check=True, capture_output=True)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """(process, JSON) of both modes, twice each, in this process; torch does not compile, which takes half a minute."""
    path = tmp_path_factory.mktemp("bench") / "result.json"
    words = ["train", *TOY, "MICRO_BATCH_TOKENS=128", "--steps", "3", "--warmup", "1", "--repeats", "2", "--peak-tflops",
             "0.05", "--json", str(path)]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)
        for name in set(os.environ) - set(clean_env()):
            patch.delenv(name)
        patch.setattr(harness, "measure_apart", lambda work, job, env: measure(work, job))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert bench.main(words) == 0
    return subprocess.CompletedProcess(words, 0, out.getvalue(), err.getvalue()), read(path)


def test_json_has_every_field(toy_run):
    done, result = toy_run
    assert set(result) == set(SHARED) and [row["mode"] for row in result["rows"]] == ["eager", "compiled"]
    for name, value in (("device", "cpu"), ("world_size", 1), ("dtype", "float32"), ("attention", "math"),
                        ("tokens_per_step", 512), ("micro_batches", 4), ("micro_batch_tokens", 128), ("seq_len", 64)):
        assert result[name] == value, name
    assert result["torch"] == torch.__version__ and result["command"].startswith("tools/bench.py train VOCAB_SIZE=512")
    assert settings(result["settings"]) == settings(" ".join([*TOY, "MICRO_BATCH_TOKENS=128"]))
    for row in result["rows"]:
        assert set(row) == set(ROW) and row["looping"] is None and len(row["repeats"]) == 2
        assert all(len(repeat["step_ms"]) == len(repeat["step_cpu_ms"]) == 3 for repeat in row["repeats"])
        assert row["ms_min"] <= row["ms_per_step"] <= row["ms_max"] and row["peak_memory_mib"] > 0
        assert 3 < row["loss"] < 7 and row["warmup_seconds"] > 0


def test_numbers_follow_from_the_times(toy_run):
    for row in toy_run[1]["rows"]:
        medians = [sorted(repeat["step_ms"])[1] for repeat in row["repeats"]]
        assert row["ms_per_step"] == pytest.approx(sum(medians) / 2)
        assert (row["ms_min"], row["ms_max"]) == (min(medians), max(medians))
        assert row["tokens_per_second"] == pytest.approx(512 / row["ms_per_step"] * 1e3)
        assert row["mflop_per_token"] == flops(settings(" ".join(TOY)), 64) / 1e6
        assert row["tflop_per_step"] == pytest.approx(row["mflop_per_token"] * 512 / 1e6)
        assert row["mfu"] == pytest.approx(row["tflop_per_step"] / (row["ms_per_step"] / 1e3) / 0.05)


def test_table_shows_the_json(toy_run):
    done, result = toy_run
    lines = done.stdout.splitlines()
    names = next(i for i, line in enumerate(lines) if line.startswith("mode "))
    for line, row in zip(lines[names + 1 :], result["rows"], strict=True):
        shown = line.split()
        assert shown[:3] == [row["mode"], "-", f"{row['ms_per_step']:,.2f}"] and shown[-2] == f"{row['mfu']:.1%}"
        assert shown[5:7] == [f"{row['tokens_per_second']:,.0f}", f"{row['peak_memory_mib']:,}"]
    assert "4 micro-batch(es) of 128" in done.stdout and "0.05 TFLOP/s a device" in done.stdout
    order = [line.split()[1].strip(",") for line in done.stderr.splitlines()]
    assert order == ["eager", "compiled", "eager", "compiled"]


def test_mode_that_fails_is_a_row(tmp_path):
    """Without a C++ compiler nothing can be compiled on a CPU; what was measured is kept."""
    done = command(["train", *TOY, "NUM_LAYERS=1", "XSA_LAST_N=0", "VE_DIM=0", "--steps", 1, "--warmup", 0, "--json",
                    tmp_path / "out.json"], env={"CXX": str(tmp_path / "no-compiler")})
    eager, compiled = read(tmp_path / "out.json")["rows"]
    assert done.returncode == 1
    assert eager["ms_per_step"] > 0 and eager["mfu"] is None and eager["mode"] in done.stdout
    assert set(compiled) == {"mode", "looping", "share", "error"} and "a compiled step failed" in compiled["error"]
    assert done.stdout.splitlines()[-1].split()[:3] == ["compiled", "-", "failed:"] and "Traceback" not in done.stdout


def test_two_ranks(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = command(["train", *TOY, "--modes", "eager", "--steps", 2, "--warmup", 0, "--peak-tflops", 1, "--json",
                    tmp_path / "out.json"], launcher=launcher)
    assert done.returncode == 0, done.stderr
    result = read(tmp_path / "out.json")
    assert (result["world_size"], result["tokens_per_step"], result["micro_batch_tokens"]) == (2, 512, 256)
    row = result["rows"][0]
    assert row["mfu"] == pytest.approx(row["tflop_per_step"] / (row["ms_per_step"] / 1e3) / 2)
    assert done.stdout.count("tokens/s") == 1  # one rank prints


BAD = [
    ([], "command", "train"), (["fast"], "'fast'", "train"), (["train", "--steps", "0"], "--steps", "at least 1"),
    (["train", "--steps", "x"], "--steps", "'x'"), (["train", "--modes", "fast"], "--modes", "eager"),
    (["train", "--modes", "eager,eager"], "--modes", "eager"),
    (["train", "--peak-tflops", "nan"], "--peak-tflops", "above 0"),
    (["train", "--warmup", "-1"], "--warmup", "at least 0"), (["train", "--stepz", "3"], "--stepz", "--help"),
    (["train", "MATRIX_LRR=1"], "MATRIX_LRR", "MATRIX_LR"),
    (["train", "records/small.env"], "records/small.env", "@file"),
    (["train", "@nowhere"], "@nowhere", "cannot be read"),
    (["train", "MODEL_DIM=30", "ROPE_DIMS=0"], "MODEL_DIM=30", "NUM_HEADS=8"),
    (["train", "--states", "on"], "'on'", "off"),
    (["train", "--json", "/nowhere/out.json"], "/nowhere/out.json", "folder"),
    (["train", "--json", str(REPO)], str(REPO), "name a file"), (["train", "--json", "/dev/null"], "/dev/null", "name a file"),
    (["train", "--against", "MATRIX_LRR=1"], "MATRIX_LRR", "MATRIX_LR"),
    (["train", "--states", "off", "--against", "SEED=1"], "--against", "leave out --states"),
    (["train", "NUM_LOOPS=1", "--states", "on 2"], "'on 2'", "off, on"),
]


@pytest.mark.parametrize("words, cause, fix", BAD)
def test_bad_input_is_one_line(words, cause, fix, capsys, monkeypatch):
    for name in set(os.environ) - set(clean_env()):
        monkeypatch.delenv(name)
    assert bench.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and cause in err and fix in err


def test_settings_that_no_mode_can_run_are_bad_input():
    done = command(["train", *TOY, "ATTENTION=fa3", "DEVICE=cpu"])
    assert done.returncode == 2 and done.stdout == ""
    assert [line for line in done.stderr.splitlines() if not line.startswith("measuring")] == [
        "error: ATTENTION=fa3 cannot be used: fa3: needs a Hopper GPU"]


def test_both_states_of_a_loop_and_packed_documents_are_rows_of_their_own(tmp_path):
    done = command(["train", *TOY, "NUM_LOOPS=1", "LOOP_START=1", "LOOP_END=2", "DOC_MASK=attention", "LOADER=packed",
                    "--modes", "eager", "--steps", 2, "--warmup", 0, "--json", tmp_path / "out.json"])
    assert done.returncode == 0, done.stderr
    off, on = read(tmp_path / "out.json")["rows"]
    assert (off["looping"], on["looping"]) == ("off", "on") and on["mflop_per_token"] > off["mflop_per_token"]
    assert off["share"] == 0.35 and on["share"] == 0.65


def test_stages_and_loops_are_states_that_share_the_run():
    s = settings(" ".join(TOY) + " NUM_LOOPS=1 LOOP_START=1 LOOP_END=2 TRAIN_SEQ_SCHEDULE=16@0.1,32@0.6,64@1")
    names, where = zip(*training.states_of(s).items())
    assert names == ("off 1", "off 2", "on 2", "on 3")
    assert [state.progress for state in where] == pytest.approx([0.05, 0.225, 0.475, 0.8])
    assert [state.share for state in where] == pytest.approx([0.1, 0.25, 0.25, 0.4])
    assert list(training.states_of(settings("NUM_LOOPS=1 ENABLE_LOOPING_AT=0"))) == ["on"]


def test_several_ranks_want_one_mode(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench.main(["train", *TOY]) == 2
    assert "--modes compiled (or eager)" in capsys.readouterr().err
    assert bench.main(["train", *TOY, "LATE_QAT_THRESHOLD=0.5", "--modes", "eager"]) == 2
    assert "--states off or 'off qat'" in capsys.readouterr().err
    against = ["train", *TOY, "--modes", "eager", "--against"]
    assert bench.main([*against, "--repeats", "2"]) == 2 and "--repeats 1" in capsys.readouterr().err
    assert bench.main([*against, "DEVICE=cpu"]) == 2 and "the same DEVICE" in capsys.readouterr().err


def test_a_pair_of_runs_in_turn(tmp_path):
    deep = [*TOY, "NUM_LAYERS=12", "NUM_LOOPS=1", "LOOP_START=1", "LOOP_END=11"]
    done = command(["train", *deep, "--against", *TOY, "MATRIX_LR=0.5", "--modes", "eager", "--steps", 3, "--repeats", 2,
                    "--warmup", 1, "--json", tmp_path / "out.json"])
    assert done.returncode == 0, done.stderr
    result = read(tmp_path / "out.json")
    assert settings(result["settings"]).num_layers == 12 and settings(result["against"]).matrix_lr == 0.5
    (row,) = result["rows"]
    ratios = np.array([[mine / reference for reference, mine in block] for block in row["blocks"]])
    assert ratios.shape == (2, 3) and row["ratio"] == pytest.approx(np.exp(np.log(np.median(ratios, 1)).mean()))
    assert row["ratio"] > 1.5, "three to six times the visits"
    assert row["against_ms_per_step"] < row["ms_per_step"]
    verdict = "differs" if row["differs"] else "cannot be told from 1"
    assert done.stdout.splitlines()[-1].endswith(f"  {row['ratio']:.3f} ± {row['ratio_error']:.3f} (2)  {verdict}")


def test_a_pair_takes_turns_and_weighs_the_states_of_a_run(monkeypatch, tmp_path):
    took, built = [], []

    class Fake:
        def __init__(self, s):
            self.name, self.backends, self.rt, self.s = s, [], self, s
            self.device, self.world = torch.device("cpu"), 1
            built.append(self.name)

        def be_in(self, state):
            self.now = state

        def nothing(self, *args):
            return {}

        begin = facts = max = nothing

    def states_of(name):
        by_progress = {0.1: 0.25, 0.9: 0.75} if name == "mine" else {0: 1}
        return {str(at): training.State(at, share) for at, share in by_progress.items()}

    def time_steps(session, steps):
        took.append((session.name, session.now.progress))
        return [9e9], [{("reference", 0): 10.0, ("mine", 0.1): 8.0, ("mine", 0.9): 16.0}[took[-1]]], 0.0

    monkeypatch.setattr(training, "opened", lambda s, *_: contextlib.nullcontext(Fake(s)))
    monkeypatch.setattr(training, "states_of", states_of)
    monkeypatch.setattr(tg, "_set_sdpa", lambda *names: None)
    monkeypatch.setattr(training, "time_steps", time_steps)
    job = {"sides": ["mine", "reference"], "mode": "eager", "folder": str(tmp_path), "warmup": 1, "steps": 2, "first": 1,
           "peak_tflops": None}
    assert measure(training.measure_block, job)["pairs"] == [[10.0, 0.25 * 8 + 0.75 * 16]] * 2
    turn = [("reference", 0)], [("mine", 0.1), ("mine", 0.9)]
    assert took == [*turn[0], *turn[1], *turn[1], *turn[0], *turn[0], *turn[1]]
    measure(training.measure_block, job | {"first": 0})
    assert built == ["reference", "mine", "mine", "reference"], "who is built first alternates"


def test_two_ranks_take_turns_and_wait_for_each_other(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = command(["train", *TOY, "NUM_LAYERS=5", "--against", *TOY, "--modes", "eager", "--steps", 2, "--json",
                    tmp_path / "out.json"], launcher=launcher)
    assert done.returncode == 0, done.stderr
    result = read(tmp_path / "out.json")
    (row,) = result["rows"]
    assert (result["world_size"], result["repeats"], len(row["blocks"]), len(row["blocks"][0])) == (2, 1, 1, 2)
    assert row["ratio_error"] is None and not row["differs"] and "(1)  one block cannot tell" in done.stdout
    assert done.stdout.count("against ms/step") == 1 and "Traceback" not in done.stderr
    assert "destroy_process_group" not in done.stderr, "a group was left open"


# ---- late QAT -------------------------------------------------------------------------------------------------------

# Short sequences; a threshold that is crossed between two steps.
ROUNDED = [*TOY, "LATE_QAT_THRESHOLD=0.47", "MAX_WALLCLOCK_SECONDS=0", "ITERATIONS=20"]


@pytest.mark.parametrize("more, begins", [
    ("WARMDOWN_FRAC=0.5", 1 - 0.47 * 0.5), ("WARMDOWN_ITERS=15", 1 - 0.47 * 0.75), ("WARMDOWN_ITERS=99", 1 - 0.47),
    ("WARMDOWN_FRAC=0.5 NUM_LOOPS=1 LOOP_START=1 LOOP_END=2 ENABLE_LOOPING_AT=0.9", 1 - 0.47 * 0.5),
    ("WARMDOWN_FRAC=0.5 MIN_LR=0.5", None), ("WARMDOWN_FRAC=0", None)])
def test_share_of_late_qat_is_that_of_a_run(toy, tmp_path, more, begins):
    states = training.states_of(settings(" ".join(ROUNDED) + " " + more))
    assert sum(state.share for state in states.values()) == pytest.approx(1)
    assert all(name.endswith(" qat") == state.rounded for name, state in states.items())
    share = sum(state.share for state in states.values() if state.rounded)
    assert share == pytest.approx(0 if begins is None else 1 - begins, abs=2e-6)
    log = good(call([*toy, *ROUNDED[-3:], *more.split(), "PHASES=train", "FIT=off", "COMPRESSOR=zlib",
                     f"OUT_DIR={tmp_path}"])).stdout
    begun = re.findall(r"^late_qat step:(\d+)", log, re.MULTILINE)
    assert begun == ([] if begins is None else [str(math.floor(20 * (1 - share)) + 1)])


def test_when_late_qat_begins_may_be_unknown(capsys, monkeypatch):
    for name in set(os.environ) - set(clean_env()):
        monkeypatch.delenv(name)
    by_the_clock = [*TOY, "MAX_WALLCLOCK_SECONDS=600", "LATE_QAT_THRESHOLD=0.2", "WARMDOWN_ITERS=100", "NUM_LOOPS=1", "LOOP_START=1", "LOOP_END=2"]
    states = training.states_of(settings(" ".join(by_the_clock)))
    assert {name: state.share for name, state in states.items()} == {"off": 0.35, "on": None, "on qat": None}
    assert bench.main(["train", *by_the_clock, "--against", *TOY]) == 2
    assert "WARMDOWN_FRAC in place of WARMDOWN_ITERS" in capsys.readouterr().err
    report = harness.Report(mock.Mock(json=None, command="train"), training.document, "", steps=1, warmup=1, repeats=1)
    report.add({"mode": "eager", "looping": "on", "share": None, "error": "none"})
    assert "shares of its states are unknown" in "\n".join(training.document(report))
    seconds = settings("LATE_QAT_THRESHOLD=0.2 WARMDOWN_FRAC=0 WARMDOWN_SECONDS=60 FIT=off MATRIX_QUANT=rtn EMBED_QUANT=rtn")
    assert training.rounded_from(seconds) == pytest.approx(1 - 0.2 * 60 / 600, abs=2e-6)


@pytest.mark.parametrize("fit", ["FIT=allocate MATRIX_QUANT=rtn EMBED_QUANT=rtn", "FIT=off"])
def test_states_with_late_qat_are_on_rounded_weights(tmp_path, monkeypatch, fit):
    """In any order; calibration and new scales are not in the steps, but the scales' part of the time is."""
    s = settings(" ".join(ROUNDED) + " WARMDOWN_FRAC=0.5 " + fit)
    training.write_shards(tmp_path, 1 << 14, s.vocab_size)
    run = training.opened(s, "eager", tmp_path, tmp_path)
    with here():
        session = run.__enter__()
    calls, modes = [], []

    def note(owner, name):
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: calls.append(name) or inner(*args))

    note(session, "calibrate")
    note(tg.Quantiser, "steps")
    loss = session.step_loss
    session.step_loss = lambda *batch: modes.append(session.qat.on) or loss(*batch)
    plain, rounded = training.states_of(session.s).values()
    session.begin([plain, rounded], 0)
    assert calls == (["calibrate", "steps"] if "allocate" in fit else ["steps"])
    modes.clear(), calls.clear()
    for state in (rounded, plain, plain, rounded):
        session.be_in(state)
        for _ in range(12):
            session.take_step()
        assert modes == [state.rounded] * len(modes) and len(modes) >= 12
        weights = [m.fake_quant is not None for m in session.qat.modules.values()]
        assert weights == [state.rounded] * len(weights)
        modes.clear()
    assert calls == []
    wall, cpu, _ = training.time_steps(session, 2)
    assert len(wall) == len(cpu) == 2 and calls == ([] if "allocate" in fit else ["steps"])
    run.__exit__(None, None, None)


def test_scales_of_late_qat_are_a_part_of_each_step(monkeypatch):
    session = mock.Mock(steps_of_scales=10)
    times = {session.take_step: ([50.0, 60.0], [40.0, 41.0]), session.refresh: ([30.0], [20.0])}
    monkeypatch.setattr(training, "time_calls", lambda session, work, count: (*times[work], torch.tensor(3.0)))
    assert training.time_steps(session, 2) == ([53.0, 63.0], [42.0, 43.0], 3.0)


def test_late_qat_is_a_row(tmp_path):
    out = tmp_path / "out.json"
    with here() as printed:
        assert bench.main(["train", *ROUNDED, "WARMDOWN_FRAC=0.5", "--modes", "eager", "--steps", "1", "--warmup", "0",
                           "--json", str(out)]) == 0
    plain, rounded = read(out)["rows"]
    assert (plain["looping"], rounded["looping"]) == ("off", "off qat") and plain["share"] + rounded["share"] == 1
    assert rounded["share"] == pytest.approx(0.235, abs=2e-6) and any("eager  off qat  " in line for line in printed)


# ---- ratios ---------------------------------------------------------------------------------------------------------


def noisy_block(rng, pairs=8, ratio=1.0):
    """Pairs of times: the machine's load drifts and meets both sides, a process favours one of them, and both tails are
    heavy.
    """
    load = 100 * np.exp(rng.normal(0, 0.05, pairs).cumsum())
    luck = 0.01 * rng.standard_t(3)
    noise = 0.02 * rng.standard_t(2, (2, pairs)).clip(-50, 50)
    return list(zip(load * np.exp(noise[0]), load * ratio * np.exp(luck + noise[1])))


@pytest.mark.parametrize("blocks", [3, 5, 8])
def test_equal_sides_come_out_equal(blocks):
    rng = np.random.default_rng(1)
    equal = [not differs(ratio_of_blocks([noisy_block(rng) for _ in range(blocks)])) for _ in range(1000)]
    assert np.mean(equal) > 0.935, "of 1000 tries 950 in the mean, with a standard deviation of 7"
    pairs_alone = []
    for _ in range(300):
        low, middle, high = np.percentile([b / a for a, b in noisy_block(rng, 20)], [25, 50, 75])
        pairs_alone.append(abs(middle - 1) < 2 * 1.253 * (high - low) / 1.349 / 20**0.5)
    assert np.mean(pairs_alone) < 0.85, "pairs of one process as if each were an observation of its own"


def test_what_differs_is_told():
    rng = np.random.default_rng(2)
    told = [differs(ratio_of_blocks([noisy_block(rng, ratio=1.1) for _ in range(5)])) for _ in range(200)]
    assert np.mean(told) > 0.95


def test_ratio_of_blocks_by_hand():
    blocks = [[(10, 11), (10, 12), (10, 30)], [(20, 22), (20, 22)], [(5, 6)]]
    logs = np.log([1.2, 1.1, 1.2])
    ratio = ratio_of_blocks(blocks)
    assert ratio.ratio == pytest.approx(np.exp(logs.mean())) and ratio.blocks == 3
    assert ratio.error / ratio.ratio == pytest.approx(stats.sem(logs))
    assert differs(ratio) == (stats.ttest_1samp(logs, 0).pvalue < 0.05)
    same = [[(10, 10.1)], [(10, 10.1)], [(10, 10.1)]]
    assert differs(ratio_of_blocks(same)) and not differs(ratio_of_blocks(same, floor=0.02)), "agreement by chance"
    assert ratio_of_blocks(same, floor=0.03).error == pytest.approx(1.01 * 0.03 / 3**0.5)
    assert ratio_of_blocks(blocks, floor=1e-6) == ratio
    alone = ratio_of_blocks(blocks[:1])
    assert (alone.ratio, alone.error, alone.blocks) == (pytest.approx(1.2), math.inf, 1) and not differs(alone)
    assert ratio_of_blocks(blocks[:1], floor=0.01).error == pytest.approx(0.012)


@pytest.mark.parametrize("blocks", range(2, 15))
def test_95_percent_by_students_t(blocks):
    limit = stats.t.ppf(0.975, blocks - 1)
    assert not differs(Ratio(math.exp(0.98 * limit * 0.01), math.exp(0.98 * limit * 0.01) * 0.01, blocks))
    assert differs(Ratio(math.exp(1.05 * limit * 0.01), math.exp(1.05 * limit * 0.01) * 0.01, blocks))


# ---- what is stopped, and what is chosen ----------------------------------------------------------------------------

STOPS = {
    "train": (["train", *TOY, "--modes", "eager", "--steps", "1", "--repeats", "9"], harness, "measure_apart"),
    "pack": (["pack", "{path}", "{data}", "--rows", "RTN int4", "--compressors", "zlib,zstd", "--calibration-tokens", "64"],
             harness, "measure_apart"),
    "eval": (["eval", "{path}", "{data}", "EVAL_SEQ_LEN=64", "--rows", "contiguous,documents", "--val-tokens", "640"],
             harness, "measure_apart"),
    "validity": (["validity", "{path}", "{data}", "EVAL_SEQ_LEN=64", "COMPRESSOR=zlib", "FIT=off", "MATRIX_QUANT=rtn",
                  "EMBED_QUANT=rtn", "--val-tokens", "640", "--studies", "1033"], validity.Demonstration, "score"),
}
ENDS = [(KeyboardInterrupt(), 130), (common.BadInput("no more room"), 2), (SystemExit(143), 143), (RuntimeError("by chance"), 1)]


@pytest.mark.parametrize("name", STOPS)
def test_rows_of_a_command_that_is_stopped_are_kept(raw, tmp_path, name):
    words, owner, attribute = STOPS[name]
    words = [word.format(path=raw[0], data=raw[1][0]) for word in words]
    real = (lambda work, job, *_: measure(work, job)) if attribute == "measure_apart" else getattr(owner, attribute)
    for number, (error, code) in enumerate(ENDS if name == "train" else ENDS[:2]):
        out = tmp_path / f"{number}.json"
        second = mock.Mock(side_effect=[None, error])
        with here() as printed, pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, attribute, lambda *args, second=second: second() or real(*args))
            try:
                assert bench.main([*words, "--json", str(out)]) == code
            except (SystemExit, RuntimeError) as end:
                assert end is error
        result, console = read(out), "\n".join(printed)
        assert not result["complete"] and "stopped   before all was measured" in console
        assert len(result["rows"]) == (2 if name == "pack" else 1), "its codes, and their size"
        assert "| RTN int4 | zlib |" in console if name == "pack" else re.search(r"eager|contiguous|model alone", console)
        assert ("error: no more room" in printed) == (code == 2)


def test_nothing_is_said_of_a_command_that_measured_nothing(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with here() as printed:
        monkeypatch.setattr(harness, "measure_apart", stop)
        assert bench.main([*STOPS["train"][0], "--json", str(tmp_path / "out.json")]) == 130
    assert not (tmp_path / "out.json").exists() and not [line for line in printed if "ms/step" in line]


def test_signal_ends_a_measurement_with_its_rows(tmp_path):
    words = ["train", *TOY, "--modes", "eager", "--steps", "2", "--repeats", "99", "--json", tmp_path / "out.json"]
    with subprocess.Popen([sys.executable, str(REPO / "tools/bench.py"), *map(str, words)], env=clean_env(), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heard) as job:
        while "repeat 2 of" not in job.stderr.readline():
            assert job.poll() is None
        job.send_signal(signal.SIGTERM)
        console, _ = job.communicate(timeout=60)
    assert job.returncode == 143 and not read(tmp_path / "out.json")["complete"]
    assert "stopped   before all" in console and console.splitlines()[-1].startswith("eager")


def test_a_row_that_failed_is_complete(tmp_path, monkeypatch):
    with here() as printed:
        monkeypatch.setattr(harness, "measure_apart", lambda *_: {"error": "no compiler"})
        assert bench.main(["train", *TOY, "--modes", "eager", "--json", str(tmp_path / "out.json")]) == 1
    assert read(tmp_path / "out.json")["complete"] and "failed: no compiler" in "\n".join(printed)


def tables(words, tmp_path):
    """{table: names of its rows} of a command in this process."""
    with here():
        assert bench.main([*words, "--json", str(tmp_path / "out.json")]) == 0
    found = {}
    for row in read(tmp_path / "out.json")["rows"]:
        found.setdefault(row.get("table"), []).append(row.get("row") or row.get("method") or row.get("what"))
    return found


def forbid(patch, *places):
    """What must not be computed."""
    for owner, name in places:
        patch.setattr(owner, name, mock.Mock(side_effect=AssertionError(f"{name} was not asked for")))


def test_eval_computes_only_what_is_asked_for(raw, tmp_path, monkeypatch):
    words = ["eval", raw[0], *raw[1], "--val-tokens", "640", "--count-tokens", "640"]
    with monkeypatch.context() as patch:
        forbid(patch, (evaluation, "measure_counts"), (evaluation, "forwards"), (tg, "BackoffMixture"), (tg, "HashedMixture"))
        assert tables([*words, "--rows", "contiguous"], tmp_path) == {"predictors": ["contiguous"]}
    with monkeypatch.context() as patch:
        forbid(patch, (evaluation, "measure_predictor"), (evaluation, "forwards"), (tg, "ModelPredictor"))
        assert tables([*words, "--counts", "exact 3"], tmp_path) == {"counts": ["exact 3"]}
    with monkeypatch.context() as patch:
        forbid(patch, (evaluation, "measure_predictor"), (evaluation, "measure_counts"))
        assert tables([*words, "--documents", "9"], tmp_path) == {"forwards": [*evaluation.FORWARD_ROWS]}
    for given, rows, counts, documents in (([], evaluation.ROWS, evaluation.COUNTS, 4000), (["--rows", "none"], [], evaluation.COUNTS, 4000),
                                           (["--rows", "cache", "--documents", "5"], ["cache"], [], 5)):
        args = evaluation.arguments(["model.pg", *given])
        assert (args.rows, args.counts, args.documents) == ([*rows], [*counts], documents)


def test_pack_computes_only_what_is_asked_for(raw, tmp_path, monkeypatch):
    words = ["pack", raw[0], *raw[1], "--calibration-tokens", "64"]
    encoded = []
    quantiser = weights.Subject.quantiser
    monkeypatch.setattr(weights.Subject, "quantiser", lambda self, s: encoded.append(s.matrix_quant) or quantiser(self, s))
    monkeypatch.setattr(weights, "ONE_COMPRESSOR", "zlib")
    with monkeypatch.context() as patch:
        forbid(patch, (weights.Subject, "load_text"), (weights.Subject, "score"))
        found = tables([*words, "--rows", "RTN int4", "--compressors", "zlib"], tmp_path)
    assert found == {"codes": ["RTN int4"], "sizes": ["RTN int4"]} and encoded == ["rtn"], "no budget of a reference"
    encoded.clear()
    with monkeypatch.context() as patch:
        forbid(patch, (packing, "measure_container"))
        found = tables([*words, "--score", "--methods", "RTN", "--budget", "56000", "--val-tokens", "640"], tmp_path)
    assert found == {"quality": ["raw weights", "RTN"]} and set(encoded) == {"rtn"}


def test_validity_computes_only_what_is_asked_for(raw, tmp_path, monkeypatch):
    forbid(monkeypatch, (tg, "train_on_validation"), (tg, "make_predictor"))
    row = {"loss": 1.0, "bpb": 1.0, "valid": "yes", "reasons": [], "mean_sum": 1.0, "worst_log_sum": 0.0, "selftest": {},
           "failed": [], "seconds": 1.0}
    monkeypatch.setattr(validity.Demonstration, "score", lambda *_: dict(row))
    words = ["validity", raw[0], *raw[1], *QUICK, "--val-tokens", "640", "--studies", "967"]
    assert tables(words, tmp_path) == {None: ["the model alone", *(variant.what for variant in validity.STUDIES["967"])]}


def test_train_computes_only_what_is_asked_for(tmp_path, monkeypatch):
    took = []
    monkeypatch.setattr(harness, "measure_apart", lambda work, job, env: took.append((job["mode"], job["state"])) or measure(work, job))
    loop = ["NUM_LOOPS=1", "LOOP_START=1", "LOOP_END=2"]
    words = ["train", *TOY, *loop, "LATE_QAT_THRESHOLD=0.5", "--modes", "eager", "--steps", "1", "--warmup", "0"]
    tables([*words, "--states", "off, on qat"], tmp_path)
    assert took == [("eager", "off"), ("eager", "on qat")]


@pytest.mark.parametrize("words, option", [
    (["train", "--steps", "9" * 5000], "--steps"), (["train", "--repeats", "1.5"], "--repeats"),
    (["train", "--peak-tflops", "fast"], "--peak-tflops"), (["pack", "a", "--budget", "big"], "--budget"),
    (["pack", "--weights", "a", "--clips", "6:x"], "--clips"), (["eval", "a", "--documents", "-1"], "--documents"),
    (["eval", "a", "--count-tokens", "1e6"], "--count-tokens"), (["validity", "--val-tokens", ""], "--val-tokens")])
def test_messages_say_what_a_value_should_be(words, option, capsys):
    assert bench.main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and option in err and "invalid" not in err
    assert "whole number of at least" in err or "number above 0" in err


@pytest.mark.parametrize("words, word", [(["--help"], "bench.py train"), (["train", "--help"], "--peak-tflops"),
                                         (["pack", "--help"], "allocated GPTQ"), (["eval", "--help"], "TTT=lora_docs"),
                                         (["validity", "--help"], "--steps")])
def test_help(words, word, capsys):
    try:
        assert bench.main(words) == 0
    except SystemExit as end:
        assert end.code == 0
    assert word in capsys.readouterr().out


# ---- pack -----------------------------------------------------------------------------------------------------------

RAW = ("FIT=off", "MATRIX_BITS=16", "EMBED_BITS=16", "MATRIX_QUANT=rtn", "EMBED_QUANT=rtn", "PHASES=train", "DEVICE=cpu")


@pytest.fixture(scope="module")
def raw(toy, tmp_path_factory):
    """(a float16 artifact, the words that name its data)."""
    folder = tmp_path_factory.mktemp("raw")
    good(call([*toy, *RAW, f"OUT_DIR={folder}"]))
    return str(folder / "model.pg"), [toy[0], "TRAIN_SEQ_LEN=64", "TRAIN_BATCH_TOKENS=512", "EVAL_SEQ_LEN=64", "EVAL_STRIDE=0"]


@pytest.fixture(scope="module")
def subject(raw):
    path, words = raw
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(clean_env()):
            patch.delenv(name)
        subject = weights.Subject(path, words)
    assert subject.calibrate(subject.model, subject.s, 1000) == 1024
    return subject


@pytest.fixture(scope="module")
def packed(raw, tmp_path_factory):
    """(console, JSON) of a run with both parts; containers in this process, and sizes by zlib, which costs no time."""
    path, words = raw
    out = tmp_path_factory.mktemp("packed") / "pack.json"
    rows, compressors = "float16,RTN int4,GPTQ + SDClip,allocated GPTQ", "zstd,zlib,zlib kinds columns,lrzip kinds columns"
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(clean_env()):
            patch.delenv(name)
        patch.setattr(harness, "measure_apart", measure)
        patch.setattr(weights, "ONE_COMPRESSOR", "zlib")
        patch.setattr(budgets, "TRIED_STEPS", budgets.TRIED_STEPS[::2])
        patch.setattr(packing.shutil, "which", lambda name: None)
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert bench.main(["pack", path, *words, "--rows", rows, "--compressors", compressors, "--score", "--val-tokens",
                           "1024", "--calibration-tokens", "1024", "--also", f"again={path}", "--json", str(out)]) == 0
    return "\n".join(printed), read(out)


def test_pack_as_a_command(raw, tmp_path):
    path, words = raw
    done = command(["pack", path, *words, "--rows", "ternary", "--compressors", "zlib", "--calibration-tokens", 64, "--json",
                    tmp_path / "out.json"])
    assert done.returncode == 0, done.stderr
    (row,) = read(tmp_path / "out.json")["sizes"]
    assert row["pack_memory_mib"] > 50 and row["memory_before_mib"] <= row["pack_memory_mib"] <= row["unpack_memory_mib"]
    assert f"| ternary | zlib | {row['bytes']:,} |" in done.stdout and "Traceback" not in done.stderr


def test_pack_reports_what_it_measured(packed, raw):
    console, result = packed
    assert (result["artifact_bytes"], result["calibration_tokens"]) == (os.path.getsize(raw[0]), 1024)
    assert [row["row"] for row in result["codes"]] == ["float16", "RTN int4", "GPTQ + SDClip", "allocated GPTQ"]
    exact, coarse, sdclip, allocated = result["codes"]
    assert exact["squared_error"] == exact["felt_error"] == 0 and exact["tensor_entropy_bytes"] is None
    assert sdclip["felt_error"] > allocated["felt_error"] > 0 and coarse["squared_error"] > 0
    sizes = {(row["row"], row["compressor"]): row for row in result["sizes"]}
    assert len(sizes) == 16 and all("skipped" in row for (_, name), row in sizes.items() if name.startswith("lrzip"))
    for row in coarse, sdclip, allocated:
        assert row["codes"] == coarse["codes"]
        zstd, zlib = (sizes[row["row"], name] for name in ("zstd", "zlib"))
        assert 0.9 * row["tensor_entropy_bytes"] < zlib["code_bytes"] < zlib["bytes"]
        assert zstd["bits_per_weight"] == pytest.approx(8 * zstd["bytes"] / result["parameters"])
        assert f"| {row['row']} | zstd | {zstd['bytes']:,} |" in console
    assert "lrzip is not installed" in console


def test_pack_compares_at_equal_bytes(packed):
    console, result = packed
    size = result["budget_bytes"]
    assert size == next(row["bytes"] for row in result["sizes"] if (row["row"], row["compressor"]) == ("GPTQ + SDClip", "zlib"))
    raw, *rows, again = result["quality"]
    assert [row["method"] for row in rows] == list(packing.METHODS)
    assert (raw["gap"], again["gap"], again["loss"], again["bytes"]) == (0, 0, raw["loss"], raw["bytes"])
    at_size = [row for row in rows if "skipped" not in row]
    assert {row["method"] for row in rows if row not in at_size} <= {"RTN", "GPTQ-lite", "GPTQ + percentile"}
    assert all("2 to 8 bits" in row["skipped"] for row in rows if row not in at_size), "toy weights need no int3"
    for row in at_size:
        assert row["bytes"] == pytest.approx(size, rel=0.002), row["method"]
        assert row["loss"] == pytest.approx(raw["loss"] + row["gap"])
        assert row["bpb"] / row["loss"] == pytest.approx(raw["bpb"] / raw["loss"])
        assert ("predicted_gap" in row) == row["method"].startswith("allocated")
    by_name = {row["method"]: row for row in at_size}
    assert by_name["allocated GPTQ"]["predicted_gap"] == pytest.approx(by_name["allocated GPTQ"]["felt_error"], rel=0.5)
    assert f"| {by_name['GPTQ + SDClip']['loss']:.5f} |" in console and "k = 12.85" in console
    by_tensor = by_name[packing.BY_TENSOR]
    assert by_name["allocated GPTQ"]["felt_error"] < by_tensor["felt_error"] < by_name["GPTQ + SDClip"]["felt_error"]
    sigmas = by_tensor["value"]
    assert f"k = {min(sigmas.values()):.4g} to {max(sigmas.values()):.4g} |" in console and len(set(sigmas.values())) > 5


def test_widths_are_interpolated(subject, monkeypatch):
    monkeypatch.setattr(weights, "ONE_COMPRESSOR", "zlib")
    subject.s = subject.settings("VAL_TOKENS=640")
    subject.load_text()
    raw = subject.score(subject.model)
    row = packing.quality_row(subject, "RTN", 56_000, raw)
    low, high = row["ends"]
    assert low["bytes"] <= row["bytes"] == 56_000 <= high["bytes"] and row["value"][1] == row["value"][0] + 1
    assert high["felt_error"] < row["felt_error"] < low["felt_error"]
    assert 0 < high["divergence"] < row["divergence"] < low["divergence"]
    assert all(torch.equal(p, subject.raw[name]) for name, p in subject.model.named_parameters()), "not put back"
    assert "nearest" in packing.quality_row(subject, "GPTQ + SDClip", 1000, raw)["skipped"]


def test_one_k_a_tensor_is_the_best_of_its_family(subject, monkeypatch):
    """Its steps are those of the trainer at that k; and two tensors that trade bytes only lose."""
    monkeypatch.setattr(weights, "ONE_COMPRESSOR", "zlib")
    monkeypatch.setattr(budgets, "TRIED_STEPS", budgets.TRIED_STEPS[::2])
    s = subject.settings(packing.METHODS[packing.BY_TENSOR])
    size, encoded, sigmas = budgets.at_size_by_tensor(subject, s, 40_000)
    assert size == subject.size(encoded) == pytest.approx(40_000, rel=0.002)
    assert set(sigmas) == {name for name, one in encoded.items() if one.codec == "int" and subject.raw[name].ndim == 2
                           and name in subject.curvature}
    for name, k in sigmas.items():
        assert encoded[name].arrays["scale"].equal(tg.row_scales(subject.raw[name], 8, "gptq", k)), name
    alike = subject.encode_clipped(s, dict.fromkeys(sigmas, 20.0))
    assert all(one.arrays["q"].equal(alike[name].arrays["q"]) for name, one in subject.quantiser(s).encode().items()
               if "q" in one.arrays)
    felt = subject.errors(encoded)[1]
    first, second = sorted(sigmas, key=lambda name: -subject.raw[name].numel())[:2]
    for a, b in ((first, second), (second, first)):
        traded = subject.raw[a].numel() / subject.raw[b].numel()  # octaves of b that are an octave of a in bytes
        other = subject.encode_clipped(s, sigmas | {a: sigmas[a] * 2, b: sigmas[b] / 2**traded})
        assert subject.size(other) == pytest.approx(size, rel=0.05) and subject.errors(other)[1] > felt


@pytest.fixture(scope="module")
def stored(subject):
    """[(row, its encoded parameters, contents for measure_container)]: steps by row with corrections, steps by row and column."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "ONE_COMPRESSOR", "zlib")
        for row in ("GPTQ + SDClip + LQER", "allocated RTN"):
            encoded, _ = packing.encode_row(subject, row, lambda: 35_000)
            found.append((row, encoded, subject.contents(encoded)))
    return found


@pytest.mark.parametrize("name", containers.CONTAINERS)
def test_every_container_gives_back_the_weights(subject, stored, name):
    if name.startswith("lrzip") and not shutil.which("lrzip"):
        pytest.skip("needs lrzip")
    for row, encoded, contents in stored:
        found = measure(containers.measure_container, {"contents": contents, "container": name})
        assert "error" not in found and found["bytes"] > 10_000
        if name in ("zlib", "rans"):  # the bytes are those of the trainer's file
            s = subject.settings(f"{packing.ROWS[row]} COMPRESSOR={name}")
            assert found["bytes"] == tg.pack(encoded, subject.shapes, s, subject.contents(encoded).header).size


def test_container_that_loses_something_is_an_error(stored, monkeypatch):
    turned = containers.turned
    monkeypatch.setattr(containers, "turned", lambda one, back=False: one if back else turned(one))
    for name, lost in (("zlib kinds", False), ("zlib columns", True)):
        job = {"contents": stored[0][2], "container": name}
        assert ("error" in measure(containers.measure_container, job)) == lost


@pytest.mark.parametrize("length", [0, 1, 2, 5, 8, 1001])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_shuffle_is_a_permutation(stride, length):
    data = np.random.default_rng(length).bytes(length)
    moved = containers.shuffled(data, stride)
    assert containers.unshuffled(moved, stride) == data and Counter(moved) == Counter(data)
    assert moved[: -(-length // stride)] == data[::stride]


@pytest.mark.parametrize("spread, top", [(0.3, 1), (1.0, 7), (2.5, 31), (20.0, 127)])
def test_entropies_by_hand(spread, top):
    rng = np.random.default_rng(1)
    q = (spread * rng.lognormal(0, 0.5, (12, 1)) * rng.standard_normal((12, 400))).round().clip(-top, top).astype(np.int8)
    shares = [count / q.size for count in Counter(q.ravel().tolist()).values()]
    assert packing.tensor_entropy(q) == pytest.approx(-q.size * sum(p * math.log2(p) for p in shares) / 8)

    def bits(row, sigma):
        def below(edge):
            return math.erfc(-edge / sigma / math.sqrt(2)) / 2

        return -sum(count * math.log2(max(below(0.5 - abs(v)) - below(-0.5 - abs(v)), 1e-300))
                    for v, count in Counter(row.tolist()).items())

    by_hand = sum(min(bits(row, 0.05 * 1.02**k) for k in range(420)) for row in q) / 8
    assert packing.row_entropy(q) == pytest.approx(by_hand, rel=2e-3)


def test_codes_that_are_all_zero_need_nothing():
    q = np.zeros((3, 50), np.int8)
    assert packing.tensor_entropy(q) == 0 and packing.row_entropy(q) == pytest.approx(0, abs=1e-6)


def test_solve_meets_a_size():
    def falling(x):
        return round(1e6 / (1 + 2**x)), x

    for size in (100_000, 500_000, 900_000):
        x, found, thing = budgets.solve(falling, 0.0, size, -1e5)
        assert found == pytest.approx(size, rel=budgets.TOLERANCE) and thing == x
    x, found, _ = budgets.solve(falling, 0.0, 2_000_000, -1e5)
    assert found == pytest.approx(1e6, rel=1e-3), "the nearest, if the size is out of reach"


def test_between_two_widths():
    low, high = {"bytes": 100, "gap": 0.4, "felt_error": 0.8}, {"bytes": 200, "gap": 0.1, "felt_error": 0.2}
    assert budgets.between(low, high, 150) == pytest.approx({"bytes": 150, "gap": 0.2, "felt_error": 0.4})
    assert budgets.between(low, high | {"gap": -0.1}, 150)["gap"] == pytest.approx(0.15), "no logarithm of a gain"


def test_every_row_is_settings():
    for text in packing.ROWS.values():
        assert not settings(text).idle()
    for name, text in packing.METHODS.items():
        assert budgets.knob(settings(text)) in ("bits", "sigmas", "spacing"), name


# ---- pack --weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_matrices_of_any_file(tmp_path, suffix):
    """Each once, convolutions as rows, what is small or no float left out; the codes by hand."""
    rng = np.random.default_rng(3)
    kernel = rng.standard_normal((64, 4, 8, 8)).astype(np.float32)
    wide = rng.standard_normal((128, 256)).astype(np.float16)
    tensors = {"kernel": kernel, "tied": kernel.copy(), "wide": wide, "small": wide[:8].copy(), "bias": wide.ravel(),
               "ids": np.zeros((200, 200), np.int64)}
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 3, "model": [{name: torch.from_numpy(value) for name, value in tensors.items()}]}, path)
    elif suffix == ".npz":
        np.savez(path, **tensors)
    else:
        names, header, data = {"float32": "F32", "float16": "F16", "int64": "I64"}, {"__metadata__": {"format": "pt"}}, b""
        for name, value in tensors.items():
            header[name] = {"dtype": names[str(value.dtype)], "shape": value.shape,
                            "data_offsets": [len(data), len(data) + value.nbytes]}
            data += value.tobytes()
        words = json.dumps(header).encode()
        path.write_bytes(len(words).to_bytes(8, "little") + words + data)
    loaded = weights.Loaded(str(path))
    assert {name.split(".")[-1]: shape for name, shape in loaded.shapes.items()} == {"kernel": (64, 256), "wide": (128, 256)}
    assert loaded.parameters == kernel.size + wide.size
    one = list(loaded.encode(6, 12.85).values())[0]
    step = (12.85 * kernel.reshape(64, -1).std(1, ddof=1) / 31).astype(np.float16)
    assert np.array_equal(one.arrays["q"].numpy(), np.round(kernel.reshape(64, -1) / step.astype(np.float32)[:, None]))


def test_the_coder_alone(tmp_path):
    rng = np.random.default_rng(4)
    np.savez(tmp_path / "model.npz", a=rng.standard_normal((160, 120)), b=rng.standard_normal((16384, 1)) * 7)
    out = tmp_path / "out.json"
    with here() as printed:
        assert bench.main(["pack", "--weights", str(tmp_path / "model.npz"), "--clips", "4:12,6:12.85", "--compressors",
                           "rans,zlib", "--json", str(out)]) == 0
    console, result = "\n".join(printed), read(out)
    assert [row["row"] for row in result["codes"]] == ["model.npz int4, k = 12", "model.npz int6, k = 12.85"]
    for facts in result["codes"]:
        assert facts["codes"] == 160 * 120 + 16384 and facts["matrices"] == len(facts["tensors"]) == 2
        assert facts["tensor_entropy_bytes"] == sum(one["entropy_bytes"] for one in facts["tensors"])
        rans, zlib = (row for row in result["sizes"] if row["row"] == facts["row"])
        assert 0.97 * facts["tensor_entropy_bytes"] < rans["code_bytes"] < zlib["code_bytes"]
        assert f"| {facts['row']} | rans | {rans['bytes']:,} |" in console


PACK_BAD = [
    (["pack"], "ARTIFACT", "--help"), (["pack", "{path}", "--rows", "int9"], "'int9'", "RTN int4"),
    (["pack", "{path}", "--compressors", "rar"], "'rar'", "brotli"), (["pack", "{path}", "--methods", "x"], "'x'", "GPTQ-lite"),
    (["pack", "/nowhere/model.pg"], "/nowhere/model.pg", "cannot be read"),
    (["pack", "{path}", "DATA_PATH=/nowhere"], "/nowhere", "data/prepare.py"),
    (["pack", "{path}", "DATA_PATH=/nowhere", "--score"], "/nowhere", "TOKENIZER_PATH"),
    (["pack", "{path}", "MATRIX_BIT=6"], "MATRIX_BIT", "MATRIX_BITS"),
    (["pack", "{path}", "LEAKY_SLOPE=0.25"], "LEAKY_SLOPE=0.25", "contradicts"),
    (["pack", "{path}", "--also", "nothing"], "--also", "NAME=ARTIFACT"),
    (["pack", "{path}", "--budget", "0"], "--budget", "at least 1"),
    (["pack", "{path}", "--rows", "none"], "--rows none", "--score"),
    (["pack", "{path}", "--methods", "RTN"], "--methods", "without --score"),
    (["pack", "--weights", "/nowhere/a.pt"], "/nowhere/a.pt", "safetensors"),
    (["pack", "--weights", "records/small.env"], "records/small.env", "safetensors"),
    (["pack", "{path}", "--weights", "a.pt"], "--weights", "leave one of them out"),
    (["pack", "--weights", "a.pt", "--score"], "--score", "does nothing with --weights"),
    (["pack", "{path}", "--clips", "6:12"], "--clips", "does nothing without --weights"),
    (["pack", "--weights", "a.pt", "--clips", "9:12"], "'9:12'", "2 to 8 bits"),
    (["pack", "{path}", "--json", "/nowhere/out.json"], "/nowhere/out.json", "folder"),
]


@pytest.mark.parametrize("words, cause, fix", PACK_BAD)
def test_bad_input_of_pack_is_one_line(raw, words, cause, fix, capsys, monkeypatch):
    for name in set(os.environ) - set(clean_env()):
        monkeypatch.delenv(name)
    assert bench.main([word.format(path=raw[0]) for word in words]) == 2
    out, err = capsys.readouterr()
    err = "".join(line for line in err.splitlines(keepends=True) if not line.endswith(" ...\n"))
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and cause in err and fix in err


def test_artifact_that_was_quantised_is_refused(toy, tmp_path, capsys):
    good(call([*toy, "PHASES=train", "COMPRESSOR=zlib", f"OUT_DIR={tmp_path}"]))
    assert bench.main(["pack", str(tmp_path / "model.pg"), toy[0]]) == 2
    err = capsys.readouterr().err
    assert "is not float16 but int" in err and "MATRIX_BITS=16" in err and err.count("\n") == 1


# ---- eval -----------------------------------------------------------------------------------------------------------

EVAL_ROWS = {"contiguous": "", "sliding": "EVAL_STRIDE=2", "TTT=full": "TTT=full", "TTT=lora_docs cache": "TTT=lora_docs "
             "EVAL_CONTEXT=cache", "TTT=lora_docs window": "TTT=lora_docs", "hedge": "MIXER=hedge",
             "hashed": "MIXER=hashed ALLOW_INVALID=1"}


@pytest.fixture(scope="module")
def scored(raw, tmp_path_factory):
    """(console, JSON) of rows and counts, twice each."""
    path, words = raw
    out = tmp_path_factory.mktemp("scored") / "eval.json"
    with here() as printed:
        assert bench.main(["eval", path, *words, "NGRAM_BUCKETS=64", "--rows", ",".join(EVAL_ROWS), "--counts",
                           "exact 2,exact 4,hashed 10", "--val-tokens", "1500", "--count-tokens", "1000", "--documents", "40",
                           "--repeats", "2", "--json", str(out)]) == 0
    return "\n".join(printed), read(out)


def lengths(path, most):
    """Targets of each validation document, and the tokens."""
    tokens = tg.read_shard(tg.find_shards(path.removeprefix("DATA_PATH="), "val")[0], 512)[: most + 1]
    starts = [i for i, token in enumerate(tokens[:-1]) if token == BOS]
    return [b - a for a, b in zip(starts, [*starts[1:], most])], tokens.tolist()


def steps_of(documents, chunk):
    """[documents that are still read] for each chunk."""
    return [sum(n > at for n in documents) for at in range(0, max(documents), chunk)]


def windows_of(documents, chunk, window):
    """Tokens forwarded where all of the window is forwarded for each chunk, in sizes of a quarter of it or the chunk."""
    grain = max(window // 4, chunk)
    return sum(min(math.ceil((at + chunk) / grain) * grain, window) for n in documents for at in range(0, n, chunk))


@pytest.mark.parametrize("row", EVAL_ROWS)
def test_scores_are_those_of_the_trainer(scored, raw, row, tmp_path):
    path, words = raw
    scaled = [f"{name.upper()}={value}" for name, value in scored[1]["scaled"].items()]
    ours = next(one for one in scored[1]["predictors"] if one["row"] == row)
    theirs = summary(good(call([*words, *scaled, "NGRAM_BUCKETS=64", "VAL_TOKENS=1500", "DEVICE=cpu", "PHASES=eval",
                                f"ARTIFACT={path}", f"OUT_DIR={tmp_path}", *EVAL_ROWS[row].split()])))
    assert ours["bpb"] == pytest.approx(theirs["val_bpb"], rel=1e-9)
    assert ours["forwarded_per_token"] == pytest.approx(theirs["forwarded_per_token"], abs=1e-4)
    assert bool(ours["reasons"]) == (theirs["valid"] == "no") == (row == "hashed")


def test_forwards_and_gradients_by_hand(scored, raw):
    part, (documents, _) = scored[1]["scaled"]["ttt_chunk_tokens"], lengths(raw[1][0], 1500)
    rows = {row["row"]: row for row in scored[1]["predictors"]}
    forwards = {"contiguous": math.ceil(1500 / 64) * 64, "sliding": (1 + math.ceil((1500 - 64) / 2)) * 64,
                "TTT=lora_docs cache": 48 * sum(steps_of(documents, 48)), "TTT=lora_docs window": windows_of(documents, 48, 64)}
    for name, tokens in forwards.items():
        assert rows[name]["forwarded_per_token"] == pytest.approx(tokens / 1500), name
    running = steps_of(documents, 48)
    gradients = {"contiguous": 0, "hedge": 0, "TTT=full": 3 * part * (math.ceil(1500 / part) - 1),
                 "TTT=lora_docs cache": 48 * sum(running[:-1])}
    for name, tokens in gradients.items():
        assert rows[name]["gradients_per_token"] == pytest.approx(tokens / 1500), name


def test_rates_follow_from_the_times(scored):
    console, result = scored
    assert result["tokens"] == 1500 and result["threads"] >= 1 and result["device"] == "cpu" and not result["compiled"]
    for row in result["predictors"]:
        rates = sorted(1500 / repeat["seconds"] for repeat in row["repeats"])
        assert row["tokens_per_second"] == pytest.approx([sum(rates) / 2, *rates]) and len(rates) == 2
        assert row["peak_memory_mib"] >= row["memory_before_mib"] > 50 and row["graphs"] is None
        shown = f"| {row['row']} | {row['bpb']:.4f} | {'no' if row['row'] == 'hashed' else 'yes'} | {sum(rates) / 2:,.0f} |"
        assert shown in console
    for row in result["counts"]:
        rates = sorted(row["tokens"] / repeat["update_seconds"] for repeat in row["repeats"])
        assert row["update_tokens_per_second"] == pytest.approx([sum(rates) / 2, *rates])


def test_counts_alone_are_a_code_of_their_own(scored, raw):
    """Absolute discounting of 0.9 down to 1 / V, from the counts of the parts before."""
    _, tokens = lengths(raw[1][0], 1000)
    rows = {row["row"]: row for row in scored[1]["counts"]}
    for name, order in (("exact 2", 2), ("exact 4", 4)):
        seen, nats, part = {}, 0.0, rows[name]["part_tokens"]
        for begin in range(0, 1000, part):
            places = range(begin + 1, min(begin + part, 1000) + 1)
            for at in places:
                p = 1 / 512
                for n in range(min(order, at + 1)):
                    after = seen.get(tuple(tokens[at - n : at]), {})
                    if total := sum(after.values()):
                        p = (max(after.get(tokens[at], 0) - 0.9, 0) + 0.9 * len(after) * p) / total
                nats -= math.log(p)
            for at in places:
                for n in range(min(order, at + 1)):
                    after = seen.setdefault(tuple(tokens[at - n : at]), {})
                    after[tokens[at]] = after.get(tokens[at], 0) + 1
        grams = {tuple(tokens[i : i + n]) for n in range(2, order + 1) for i in range(1001 - n + 1)}
        assert rows[name]["ngrams"] == len(grams)
        sp = tg.load_tokenizer(settings(f"{raw[1][0]} VOCAB_SIZE=512"))[0]
        ids = np.array(tokens)
        assert rows[name]["bpb"] == pytest.approx(nats / math.log(2) / tg.target_bytes(ids, tg.byte_tables(sp, 512)).sum())
    assert rows["hashed 10"]["bpb"] is None and rows["hashed 10"]["load"] == 1000 / 64


def test_forwards_in_the_contests_shape(scored):
    rows = {row["row"]: row for row in scored[1]["forwards"]}
    documents = harness.document_lengths(np.random.default_rng(1337), 40).tolist()
    cached, window = 48 * sum(steps_of(documents, 48)), windows_of(documents, 48, 2048)
    assert rows["TTT=lora_docs cache"]["forwarded_per_token"] == pytest.approx(cached / sum(documents)) and cached < 1.1 * sum(documents)
    assert rows["TTT=lora_docs window"]["forwarded_per_token"] == pytest.approx(window / sum(documents))
    assert all(row["compiled_forwarded_per_token"] >= row["forwarded_per_token"] for row in rows.values())
    assert rows["sliding"]["forwarded_per_token"] > 30 > rows["TTT=lora_docs window"]["forwarded_per_token"] > 10


def test_every_row_of_eval_is_settings():
    for name in [*evaluation.ROWS, *evaluation.COUNTS]:
        s = settings(f"{evaluation.PLAIN} {evaluation.filled(name, 2048)}")
        assert s.idle().keys() <= {"EVAL_STRIDE"}, name  # what PLAIN takes back waits for windows
        if "sliding" in name or name.endswith("window"):
            assert (s.eval_stride, s.ttt_chunk_size) == (64 if "sliding" in name else 0, 48)


def test_a_long_text_has_the_parts_of_the_settings(raw):
    path, words = raw
    with here():
        scoring = evaluation.Scoring(path, [*words, "TTT_GROUP_DOCS=7"])
        scoring.val = scoring.val._replace(bytes=torch.ones(1).expand(62_000_000))
        s = scoring.settings("")
        assert (s.ttt_chunk_tokens, s.mixer_min_tokens, s.ttt_group_docs) == (32768, 10000, 7), "scaled, or not as given"


def test_eval_as_a_command(raw, tmp_path):
    path, words = raw
    done = command(["eval", path, *words, "--rows", "hedge", "--counts", "none", "--documents", 0, "--val-tokens", 640])
    assert done.returncode == 0, done.stderr
    assert "| hedge | " in done.stdout and "### Counts" not in done.stdout and "`MIXER=hedge` |" in done.stdout
    words = [*words, "EVAL_TEMPERATURE=0", "--rows", "cache", "--counts", "none", "--documents", "0"]
    with here() as printed:
        assert bench.main(["eval", path, *words]) == 2
    assert printed[-1].startswith("error: EVAL_TEMPERATURE=0, but")


# ---- validity -------------------------------------------------------------------------------------------------------

PUBLISHED = {"hashed n-grams, as published": "C2", "hedge with the entropy expert, as published": "C2",
             "trained on the text before scoring": "C3", "trained on the text before packing": "C3"}
QUICK = ("FIT=off", "MATRIX_QUANT=gptq_lite", "EMBED_QUANT=gptq_lite", "COMPRESSOR=zlib", "EVAL_STRIDE=32")


@pytest.fixture(scope="module")
def verdicts(raw, tmp_path_factory):
    """(console, JSON) of all studies, with two epochs in place of six and ten."""
    path, words = raw
    out = tmp_path_factory.mktemp("verdicts") / "validity.json"
    quick = {}
    for study, variants in validity.STUDIES.items():
        quick[study] = [variant._replace(settings=re.sub("TTT_EPOCHS=(6|10)", "TTT_EPOCHS=2", variant.settings))
                        for variant in variants]
    with here() as printed, mock.patch.dict(validity.STUDIES, quick):
        assert bench.main(["validity", path, *words, *QUICK, "--val-tokens", "640", "--json", str(out)]) == 0
    return "\n".join(printed), read(out)


def test_every_published_score_is_called_invalid_and_no_other(verdicts):
    console, result = verdicts
    assert len(result["rows"]) == 13 and {row["study"] for row in result["rows"]} == {"", *validity.STUDIES}
    for row in result["rows"]:
        condition = PUBLISHED.get(row["what"], "")
        assert row["valid"] == ("no" if condition else "yes"), row["what"]
        assert bool(row["reasons"]) == bool(condition) and all(reason.startswith("C") for reason in row["reasons"])
        assert not condition or row["reasons"][0].startswith(condition)
        said = f"| {row['what']} | {row['bpb']:.4f} |"
        line, = (line for line in console.splitlines() if said in line)
        assert f"| valid:{row['valid']} | {row['reasons'][0] if row['reasons'] else ''} |" in line
    assert result["artifact"] and "ALLOW_INVALID" not in result["settings"]


def test_what_the_self_tests_see(verdicts):
    """Sums give the mixers away; training before scoring all three tests; training before packing none of them."""
    failed = {row["what"]: row["failed"] for row in verdicts[1]["rows"] if row["valid"] == "no"}
    assert failed["hashed n-grams, as published"] == failed["hedge with the entropy expert, as published"] == ["sum"]
    assert failed["trained on the text before scoring"][:2] == ["flip", "prefix"]
    assert failed["trained on the text before packing"] == []
    assert all(set(row["selftest"]) == {"flip", "prefix", "sum", "ends"} for row in verdicts[1]["rows"])


def test_what_was_gained_was_the_sum(verdicts):
    rows = {(row["study"], row["what"]): row for row in verdicts[1]["rows"]}
    for study, what in (("1033", "hashed n-grams, as published"), ("967", "hedge with the entropy expert, as published")):
        published, rest = rows[study, what], rows[study, "the same, divided by its sum"]
        assert published["mean_sum"] > 1.001 and published["worst_log_sum"] > 1e-3 > rest["worst_log_sum"]
        # In nats a token what the division costs is the mean of log sums, and that is at most the log of the mean.
        assert 0 < rest["loss"] - published["loss"] <= math.log(published["mean_sum"]) + 1e-9
        assert published["settings"] == rest["settings"]


def test_divided_by_the_sum():
    """Of a predictor whose "probabilities" of 4 tokens sum to anything."""
    share = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4], [1.0, 3.0, 2.0, 2.0]]])

    class Base(tg.Predictor):
        invalid, learns = "it is no distribution", True

        def predict(self, inputs, count=None):
            return share[:, :count].log()

    wrapped = validity.Divided(Base(), None, None)
    assert wrapped.learns and not wrapped.invalid_reason
    inputs = tg.Inputs(torch.zeros(1, 3), torch.arange(3)[None], None)
    chunk = tg.Chunk(inputs, torch.tensor([[1, 3, 1]]), torch.tensor([[0, 1, -1]]))
    assert wrapped.predict(inputs, 2).exp().sum(-1).tolist() == [[pytest.approx(1), pytest.approx(1)]]
    assert wrapped.nll(inputs, chunk.targets)[0].exp().tolist() == pytest.approx([4, 1 / 0.4, 8 / 3])
    wrapped.observe(chunk)
    assert wrapped.mean_sum() == pytest.approx((2 + 1) / 2), "padding counts nothing"


def test_rounded_weights_are_scored_as_they_are(toy, tmp_path):
    """By the trainer's own numbers; and what needs weights that are not rounded says so."""
    good(call([*toy, "PHASES=train", "COMPRESSOR=zlib", f"OUT_DIR={tmp_path}/a"]))
    path, out = tmp_path / "a" / "model.pg", tmp_path / "out.json"
    words = [*toy, "COMPRESSOR=zlib", "DEVICE=cpu"]
    published = {study: validity.STUDIES[study][:1] for study in ("518", "1539")}
    with here() as printed, mock.patch.dict(validity.STUDIES, published):
        assert bench.main(["validity", str(path), *words, "--val-tokens", "640", "--studies", "518,1539", "--json", str(out)]) == 0
    alone, before, prequant = read(out)["rows"]
    assert "not rounded" in prequant["skipped"] and "bpb" not in prequant and prequant["skipped"] in "\n".join(printed)
    for row, more in ((alone, []), (before, ["ALLOW_INVALID=1", *before["settings"].split()])):
        theirs = summary(good(call([*words, "PHASES=eval", f"ARTIFACT={path}", "VAL_TOKENS=640", *more,
                                    f"OUT_DIR={tmp_path}/{len(more)}"])))
        assert row["bpb"] == pytest.approx(theirs["val_bpb"], rel=1e-6)
        assert row["valid"] == theirs["valid"] and row["reasons"][:1] == theirs["reasons"][:1]


def test_validity_trains_where_nothing_is_given(toy, tmp_path):
    out = tmp_path / "out.json"
    with here() as printed:
        assert bench.main(["validity", *toy, *QUICK, "--steps", "3", "--val-tokens", "640", "--studies", "1033", "--json",
                           str(out)]) == 0
    result = read(out)
    assert result["weights"] == "trained for 3 steps" and result["artifact"] is None and len(result["rows"]) == 4
    assert (result["data"], result["eval_seq_len"]) == (os.path.basename(toy[0]), 64) and "### " not in printed[-1]


def test_scaled_as_the_originals():
    """62,021,632 increments in 4,194,304 buckets; 118 steps an epoch."""
    (published, _, _), s = validity.STUDIES["1033"], settings("EVAL_SEQ_LEN=128")
    assert validity.filled(published, s, 62_021_632) == "MIXER=hashed NGRAM_BUCKETS=4194304"
    before = settings("ALLOW_INVALID=1 " + validity.filled(validity.STUDIES["518"][0], s, 65536))
    assert 65536 / (before.ttt_batch_seqs * 128) == pytest.approx(118, rel=0.1)
    assert (before.ttt_optimizer, before.ttt_lr, before.ttt_lr_mult_proj, before.ttt_lr_mult_fc) == ("adamw", 5e-4, 3, 0.5)


BAD_SCORING = [
    (["eval"], "ARTIFACT", "--help"), (["eval", "{path}", "--rows", "fast"], "'fast'", "contiguous"),
    (["eval", "{path}", "--counts", "exact 99"], "'exact 99'", "exact 10"),
    (["eval", "{path}", "--repeats", "0"], "--repeats", "at least 1"),
    (["eval", "{path}", "--rows", "none", "--counts", "none", "--documents", "0"], "nothing is left", "--rows"),
    (["eval", "/nowhere/model.pg"], "/nowhere/model.pg", "cannot be read"),
    (["eval", "{path}", "DATA_PATH=/nowhere"], "/nowhere", "TOKENIZER_PATH"),
    (["eval", "{path}", "{data}", "TTT_LORA_LRR=1"], "TTT_LORA_LRR", "TTT_LORA_LR"),
    (["eval", "{path}", "{data}", "EVAL_SEQ_LEN=128", "--val-tokens", "100"], "EVAL_SEQ_LEN=128", "shorten"),
    (["eval", "{path}", "{data}", "--json", "/nowhere/out.json"], "/nowhere/out.json", "folder"),
    (["validity", "--studies", "7"], "'7'", "1033"), (["validity", "a.pg", "b.pg"], "b.pg", "one artifact"),
    (["validity", "/nowhere/model.pg"], "/nowhere/model.pg", "cannot be read"),
    (["validity", "MATRIX_LRR=1"], "MATRIX_LRR", "MATRIX_LR"), (["validity", "--steps", "0"], "--steps", "at least 1"),
    (["validity", "DATA_PATH=/nowhere"], "/nowhere", "data/prepare.py"),
    (["validity", "--json", "/nowhere/out.json"], "/nowhere/out.json", "folder"),
]


@pytest.mark.parametrize("words, cause, fix", BAD_SCORING)
def test_bad_input_of_scoring_is_one_line(raw, words, cause, fix, capsys, monkeypatch):
    for name in set(os.environ) - set(clean_env()):
        monkeypatch.delenv(name)
    assert bench.main([word.format(path=raw[0], data=raw[1][0]) for word in words]) == 2
    out, err = capsys.readouterr()
    err = "".join(line for line in err.splitlines(keepends=True) if not line.endswith(" ...\n"))
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and cause in err and fix in err
