"""tools/submission/logs.py: what a training log says, of ours and of the contest's scripts, however it was written."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from process import REPO
from submissions import MODEL_BYTES, RULE, SCRIPT, SEEDS, TARGETS, contest_log, loss_of, our_log, our_summary

from common import BadInput
from submission.logs import parse, read_log, read_logs, settings_hash, source_hash

CODE_BYTES = len(SCRIPT.encode())


def read(text):
    """The one run in a text."""
    [log] = parse(text if isinstance(text, bytes) else text.encode(), "log")
    return log


def facts(log):
    """What a log says, without where it says so."""
    return {key: value for key, value in log._asdict().items()
            if key not in ("lines", "scores", "phases", "first_line", "path")}


# ---- the forms ------------------------------------------------------------------------------------------------------


def test_a_log_of_a_published_script():
    log = read(contest_log(42, 1.12345678))
    assert (log.form, log.seed, log.world_size, log.gpu, log.gpus) == ("contest", 42, 8, "H100 80GB HBM3", 8)
    assert log.torch == "2.9.1+cu128" and log.train_shards == 80 and log.val_tokens == TARGETS
    assert log.steps == 7058 and log.train_seconds == 599.95 and log.calibrate_seconds is None
    assert (log.code_bytes, log.model_bytes, log.total_bytes) == (CODE_BYTES, MODEL_BYTES, MODEL_BYTES + CODE_BYTES)
    assert log.val_bpb == 1.12345678 and log.val_loss == pytest.approx(loss_of(1.12345678), abs=1e-8)
    assert log.eval_seconds == log.needed_seconds == 95.0
    assert log.source_sha256 == source_hash(SCRIPT.encode())
    assert log.settings["matrix_lr"] == "0.025" and log.valid is None and log.tracebacks == 0
    lines = contest_log(42, 1.12345678).splitlines()
    assert lines[log.lines["seed"] - 1] == "seed:42"
    assert lines[log.lines["total_bytes"] - 1].startswith("Total submission size")


def test_a_log_of_ours():
    summary = our_summary(42, 1.12345678901)
    log = read(our_log(summary))
    for key in ("seed", "world_size", "steps", "train_seconds", "calibrate_seconds", "eval_seconds", "code_bytes",
                "model_bytes", "total_bytes", "val_loss", "val_bpb", "val_tokens", "val_bytes", "code_sha256",
                "artifact_sha256", "settings_hash", "valid", "eligible", "tested"):
        assert getattr(log, key) == summary[key], key
    assert (log.form, log.gpu, log.attention, log.summaries) == ("ours", "NVIDIA H100 80GB HBM3", "fa3", 1)
    assert log.settings == {"DATA_PATH": "data/datasets/fineweb10B_sp1024", "MATRIX_LR": "0.025", "SEED": "42"}
    assert log.documents_in_training == 0 and log.reasons == ()


def test_a_real_log_of_ours():
    path = REPO / "records/small.log"
    summary = json.loads(path.read_text().splitlines()[-1].removeprefix("summary "))
    log = read_log(path)
    assert log.form == "ours" and log.steps == summary["steps"] and log.val_bpb == summary["val_bpb"]
    assert log.total_bytes == summary["total_bytes"] and log.eligible_reasons == tuple(summary["eligible_reasons"])
    assert log.mixed_line is None and log.tracebacks == 0


LATE = f"""\
W0426 20:47:57.175000 888385 torch/distributed/run.py:803] *****************************************
Hyperparameters:
  artifact_dir: /workspace/seed0
  iterations: 20000
  matrix_lr: 0.026
  max_wallclock_seconds: 600.0
  seed: 0
  val_files: ./data/datasets/fineweb10B_sp8192/fineweb_val_*.bin
  world_size: 8
{RULE}
Running PyTorch 2.11.0+cu130
{RULE}
train_shards: 128
val_tokens: 40540160
model_params:35943512
gptq:reserving 12s, effective=588000ms
1/20000 train_loss: 9.0093 train_time: 0.0m tok/s: 8120011
4000/20000 val_loss: 2.9184 val_bpb: 1.1298
4988/20000 val_loss: 2.8177 val_bpb: 1.0908
stopping_early: wallclock_cap train_time: 588138ms step: 4988/20000
pre-quantization post-ema val_loss:2.81547748 val_bpb:1.08995907 eval_time:6003ms
Serialized model: 135426937 bytes
Code size (uncompressed): 120000 bytes
Code size (compressed): 15516 bytes
GPTQ:collected 67 Hessians in 11.3s
Serialized model quantized+brotli: 15972031 bytes
Total submission size quantized+brotli: 15987547 bytes
diagnostic quantized val_loss:2.84757723 val_bpb:1.10238588 eval_time:7531ms
ttt_lora:compile warmup done (88.8s)
ngram_tilt:hints total=9 gated=9 token_gate=9 within_gate=0 word_gate=0 agree2plus=0
quantized_ttt_phased val_loss:2.78013105 val_bpb:1.07627466 eval_time:455128ms
total_eval_time:455.1s
"""


def test_a_log_of_a_late_script():
    log = read(LATE)
    assert (log.seed, log.world_size, log.train_shards, log.val_tokens) == (0, 8, 128, 40_540_160)
    assert (log.steps, log.train_seconds, log.calibrate_seconds) == (4988, 588.138, 11.3)
    assert (log.code_bytes, log.raw_code_bytes, log.total_bytes) == (15_516, 120_000, 15_987_547)
    assert (log.val_loss, log.val_bpb, log.eval_seconds) == (2.78013105, 1.07627466, 455.1)
    assert log.settings["iterations"] == "20000" and log.gates == {"within_gate": 0, "word_gate": 0, "agree2plus": 0}


def test_settings_of_another_seed_have_the_same_hash():
    log = read(LATE)
    other = read(LATE.replace("seed: 0", "seed: 7").replace("/workspace/seed0", "/root/seed7"))
    assert other.settings_hash == log.settings_hash == settings_hash(log.settings)
    assert read(LATE.replace("matrix_lr: 0.026", "matrix_lr: 0.028")).settings_hash != log.settings_hash


# ---- however it was written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [contest_log(42, 1.12345678), our_log(our_summary(42, 1.12345678)), LATE],
                         ids=["contest", "ours", "late"])
@pytest.mark.parametrize("write", [
    lambda text: b"\xff\xfe" + text.encode("utf-16-le"), lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    lambda text: text.encode("utf-16-le"), lambda text: b"\xef\xbb\xbf" + text.encode(),
    lambda text: text.replace("\n", "\r\n").encode(), lambda text: text.replace("\n", "\r").encode(),
    lambda text: text.rstrip().encode(), lambda text: b"\xe9\xff\n" + text.encode()],
    ids=["utf-16", "utf-16 big end", "utf-16 without mark", "utf-8 mark", "crlf", "cr", "no last line", "latin"])
def test_encodings_and_line_ends(text, write):
    assert facts(read(write(text))) == facts(read(text))


def test_lines_with_a_time_before_them():
    stamped = "".join(f"2026-04-14T04:52:27.93Z {line}\n" for line in LATE.splitlines())
    log = read(stamped)
    assert (log.seed, log.steps, log.val_bpb, log.total_bytes) == (0, 4988, 1.07627466, 15_987_547)
    assert log.settings == read(LATE).settings


@pytest.mark.parametrize("data, form", [
    (b"", "empty"), (b" \n\n", "empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer"),
    (b'{"val_bpb": 1.0}', "json"), (b"[1, 2]", "json"), (b"\x7fELF\x02\x01\0\0\0\x07\xff\xfe\xfd", "binary")])
def test_a_file_that_is_no_log(data, form):
    log = read(data)
    assert log.form == form and not log.is_run


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        read_logs(tmp_path)
    with pytest.raises(BadInput, match="cannot be read"):
        read_log(tmp_path / "none.log")


# ---- several runs ---------------------------------------------------------------------------------------------------


def test_several_runs_in_one_file(tmp_path):
    path = tmp_path / "all.log"
    path.write_text("".join(contest_log(seed, bpb) for seed, bpb in SEEDS.items()))
    assert [(log.seed, log.val_bpb) for log in read_logs(path)] == list(SEEDS.items())
    assert read_log(path).seed == [*SEEDS][-1]
    assert all(log.mixed_line is None for log in read_logs(path))


def test_each_run_has_its_own_source():
    other = SCRIPT.replace("scores nothing", "scored nothing")
    first, second = parse((contest_log(42, 1.1) + contest_log(7, 1.2, other)).encode(), "log")
    assert first.source_sha256 == source_hash(SCRIPT.encode())
    assert second.source_sha256 == source_hash(other.encode())


def test_comments_below_the_last_lines_are_source():
    script = SCRIPT + "# tuned\n"
    assert read(contest_log(42, 1.1, script)).source_sha256 == source_hash(script.encode())


def test_a_run_that_is_there_twice(tmp_path):
    """A console and a log file that were joined."""
    assert len(parse((contest_log(42, 1.1234) * 2).encode(), "log")) == 1


def test_steps_that_go_back_without_a_beginning():
    text = LATE.replace("4988/20000 val", "300/20000 train_loss: 3.9 train_time: 0.6m tok/s: 8120011\n4988/20000 val")
    log = read(text)
    assert text.splitlines()[log.mixed_line - 1].startswith("300/20000")
    assert log.val_bpb == 1.07627466


def test_a_run_that_was_continued():
    text = our_log(our_summary(42, 1.1234)).replace(
        "step:7000", "resume step:3900 train_seconds:323.7\nstep:3950 train_loss:6.0 train_time:327850ms\nstep:7000")
    assert read(text).mixed_line is None


# ---- which number is meant ------------------------------------------------------------------------------------------


def test_seconds_of_an_evaluation_that_adapts_first():
    """#518: 186.8 + 889.5 + 307.8 s, of which the first score is not needed."""
    log = read("""\
step:5934/20000 val_loss:1.9305 val_bpb:1.1434 train_time:600046ms step_avg:101.12ms
stopping_early: wallclock_cap train_time:600046ms step:5934/20000
Total submission size int6+zstd: 16460660 bytes
Total submission size int8+zlib: 16460660 bytes
final_int6_roundtrip val_loss:1.9426 val_bpb:1.1505 eval_time:186834ms
final_int6_roundtrip_exact val_loss:1.94262167 val_bpb:1.15052998
ttt: starting 50 epochs, lr=0.0005, cosine+perlayer
ttt_epoch:50/50 avg_loss:1.7581
ttt: completed in 889480ms
final_int6_sliding_window val_loss:1.7935 val_bpb:1.0622 stride:64 eval_time:307844ms
final_int6_sliding_window_exact val_loss:1.79351216 val_bpb:1.06222173
final_int8_zlib_roundtrip_exact val_loss:1.79351216 val_bpb:1.06222173
""")
    assert log.eval_seconds == pytest.approx(186.834 + 889.480 + 307.844)
    assert log.needed_seconds == pytest.approx(889.480 + 307.844)
    assert (log.val_bpb, log.val_loss, log.total_bytes) == (1.06222173, 1.79351216, 16_460_660)


def test_a_time_that_is_said_twice_counts_once():
    """#1413: the score of a method, and its time, are on two lines."""
    log = read("""\
quantized_sliding_window val_loss:2.80001078 val_bpb:1.08397143 eval_time:83620ms
ttt_sliding:done val_loss=2.795171 val_bpb=1.082098 elapsed=293.2s
legal_ttt_exact val_loss:2.79517119 val_bpb:1.08209788 eval_time:293430ms
""")
    assert log.eval_seconds == pytest.approx(83.620 + 293.430) and log.needed_seconds == pytest.approx(293.430)
    assert log.val_bpb == 1.08209788


def test_tables_made_outside_the_timer_are_evaluation():
    log = read(LATE.replace("total_eval_time:455.1s", "ngram_tilt:precompute_outside_timer_done elapsed=150.0s "
                            "total_targets=9\ntotal_eval_time:455.1s"))
    assert log.eval_seconds == log.needed_seconds == pytest.approx(605.1)


def test_scores_without_a_loss():
    log = read("""\
step:9/10 train_loss:1.0
EMA BPB (fp32):     1.00119400
ppm_mix bytes=10982035 mix_bpb=1.001257 ppm_only=2.380212 nn_token_bpb=1.078672
ppm_mixer val_bpb:0.94289082 eval_time:480934ms order=5
Quantized BPB:      1.02054300
""")
    assert [(score.name, score.bpb) for score in log.scores] == [
        ("ema", 1.001194), ("ppm_mix mix", 1.001257), ("ppm_mix nn_token", 1.078672), ("ppm_mixer", 0.94289082),
        ("quantized", 1.020543)]
    assert (log.val_bpb, log.val_loss) == (1.020543, None)


def test_the_size_is_that_of_the_submission():
    """#1311: a variant that is too large lies beside it; the baseline prints the unpacked model without a name."""
    log = read("""\
Serialized model: 87410841 bytes
Code size: 58666 bytes
Total submission size: 87469507 bytes
Serialized model int6+lzma: 15812744 bytes
Total submission size int6+lzma: 15871410 bytes
Serialized model int8+zlib: 22319190 bytes
Total submission size int8+zlib: 22,377,856 bytes
final_int6_roundtrip_exact val_loss:1.94262167 val_bpb:1.15052998
""")
    assert (log.total_bytes, log.model_bytes, log.other_totals) == (15_871_410, 15_812_744, (22_377_856,))


@pytest.mark.parametrize("line, seconds", [
    ("GPTQ:collected 67 Hessians in 11.3s", 11.3), ("gptq:calibrated 68 layers in 2.0s", 2.0),
    ("gptq:hessians collected layers=66 time=7.5s", 7.5), ("gptq:calibration done in 4200ms, 66 layers", 4.2),
    ("calibrate source:train tokens:65536 seconds:4.697 reserved_seconds:5.873", 4.697)])
def test_seconds_of_calibration(line, seconds):
    assert read(f"seed:1\nstep:1/2 train_loss:1.0 train_time:9ms\n{line}\n").calibrate_seconds == pytest.approx(seconds)


def test_signs():
    log = read("""\
train_shards: 1499
val_files: ./data/datasets/a/datasets/datasets/b/fineweb_val_*.bin
val_doc_fraction: 0.5
TTT temperature: 0.98
best_model:ema val_bpb:1.1375
ngram_two_pass: Pass 2 done tokens_scored=9
prequant_ttt:epoch 1/6 val_bpb=1.1000 time=70.0s
Traceback (most recent call last):
step:9/10 train_loss:1.0
""")
    assert (log.train_shards, log.val_share, log.temperature, log.passes) == (1499, 0.5, 0.98, 2)
    assert log.doubled_path == "./data/datasets/a/datasets/datasets/b/fineweb_val_*.bin"
    assert (log.selected_line, log.prequant_line, log.tracebacks, log.lines["tracebacks"]) == (5, 7, 1, 8)


def test_the_temperature_of_generated_text_is_another():
    line = "gptq:generating autoregressive calibration data (64 seqs x 2048 tokens, temp=0.8)..."
    assert read(f"step:9/10 train_loss:1.0\n{line}\n").temperature is None


# ---- nothing makes it fail ------------------------------------------------------------------------------------------

QUIET = settings(suppress_health_check=list(HealthCheck), max_examples=60)
TEXTS = [contest_log(42, 1.1234).encode(), our_log(our_summary(42, 1.1234)).encode(), LATE.encode()]


@QUIET
@given(st.one_of(st.binary(max_size=2000), st.text(alphabet="step:0123456789/.=val_loss bpb\n{}", max_size=500).map(
    str.encode)))
def test_any_bytes(data):
    assert parse(data, "log")


@QUIET
@given(st.sampled_from(TEXTS), st.integers(0, 4000), st.integers(0, 4000))
def test_a_log_cut_off_or_with_a_hole(text, begin, length):
    assert parse(text[:begin], "log")
    assert parse(text[:begin] + text[begin + length :], "log")


@pytest.mark.parametrize("line", [b"val_loss:1.5 val_bpb:1.5 ", b"step:1 train_loss:1 train_time:1ms\n", b"ttt done ", b"\n",
                                  b"=" * 100 + b"\nimport a\n", b"summary {\n", b"1/", b"seed", b"x val_bpb:1.5\n"])
def test_large_files_take_seconds(line):
    began = time.process_time()
    parse(line * (500_000 // len(line)), "log")
    assert time.process_time() - began < 10  # about 1; what is quadratic takes minutes
