"""tools/bench.py on a GPU: times between events, torch's own memory, and MFU where the device's peak is known."""

import json
import subprocess
import sys

import pytest
from process import REPO, clean_env

from benchmarks.training import peak_flops

# Heads of 64 channels as in the contest's models, which every attention kernel supports; otherwise small.
SETTINGS = """VOCAB_SIZE=512 NUM_LAYERS=3 MODEL_DIM=256 NUM_HEADS=4 NUM_KV_HEADS=2 XSA_LAST_N=2 VE_LAYERS=1,2 VE_DIM=32
BIGRAM_VOCAB_SIZE=128 BIGRAM_DIM=64 TRAIN_SEQ_LEN=256 EVAL_SEQ_LEN=256 TRAIN_BATCH_TOKENS=8192 MICRO_BATCH_TOKENS=4096
DEVICE=cuda""".split()


def measured(tmp_path, *words):
    words = [str(REPO / "tools/bench.py"), "train", *SETTINGS, "--steps", "5", "--json", tmp_path / "out.json", *words]
    done = subprocess.run([sys.executable, *map(str, words)], text=True, env=clean_env(), timeout=400,
                          capture_output=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.slow
def test_both_modes_are_measured(tmp_path):
    result = measured(tmp_path)
    assert (result["dtype"], result["micro_batches"]) == ("bfloat16", 2)
    peak = peak_flops(result["device"], "bfloat16", None)
    for row in result["rows"]:
        assert row["ms_per_step"] > 0 and row["cpu_ms_per_step"] is None and 0 < row["peak_memory_mib"] < 4096
        expected = peak and row["tflop_per_step"] * 1e12 / (row["ms_per_step"] / 1e3) / peak
        assert row["mfu"] == (pytest.approx(expected) if peak else None)
    eager, compiled = result["rows"]
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=2e-2)


def test_two_runs_in_turn_keep_their_kernels(tmp_path):
    """Each side sets PyTorch's attention kernels for the whole process: that of the other must not fail for it."""
    result = measured(tmp_path, "--modes", "eager", "--repeats", "2", "--against", *SETTINGS, "ATTENTION=math")
    (row,) = result["rows"]
    assert [len(pairs) for pairs in row["blocks"]] == [5, 5]
    assert all(ms > 0 for pairs in row["blocks"] for pair in pairs for ms in pair)
    assert result["attention"] != "math"


def test_late_qat_is_a_row(tmp_path):
    plain, rounded = measured(tmp_path, "--modes", "eager", "LATE_QAT_THRESHOLD=0.5", "WARMDOWN_FRAC=0.4")["rows"]
    assert (plain["looping"], rounded["looping"]) == ("off", "off qat") and rounded["share"] == pytest.approx(0.2, abs=2e-6)
    assert rounded["ms_per_step"] > 0 and rounded["cpu_ms_per_step"] is None
