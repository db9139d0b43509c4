"""tools/sweep.py: which runs share a training, what is known by its content, GPUs, clusters, searches, and its files."""

import csv
import io
import json
import os
import signal
import time

import numpy as np
import pytest
from runs import Started, call, family, good, summary
from sweeping import Bench, named, stub_score
from toy import write_shard

import sweep
from sweeps import plan as plans
from sweeps import table, work
from train_gpt import Settings


@pytest.fixture
def no_settings(monkeypatch):
    for name in plans.FIELDS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def lab(tmp_path, no_settings):
    return Bench(tmp_path)


STEPS = "--match", "steps", "--steps", 20


def given(lab):
    """{setting: value} of each call of the stub."""
    return [call[0] for call in lab.calls()]


# ---- one training for many rows -------------------------------------------------------------------------------------

TEN_EVALUATIONS = "\n".join(f"stride {stride} : EVAL_STRIDE={stride}" for stride in range(1, 11))


def test_an_evaluation_ablation_of_ten_rows_and_two_seeds_trains_twice(lab):
    code, result = lab.call(lab.plan(TEN_EVALUATIONS), *STEPS)
    calls = given(lab)
    assert code == 0 and len(calls) == 22 and result["trainings"] == 2
    trained = [call for call in calls if call.get("PHASES") != "eval"]
    assert [call.get("SEED", "1337") for call in trained] == ["1337", "42"]
    artifacts = {call["ARTIFACT"] for call in calls if "ARTIFACT" in call}
    assert artifacts == {f"{call['OUT_DIR']}/model.pg" for call in trained}
    for row in result["rows"]:  # what a scored artifact does not say itself, its training does
        assert [run["model_bytes"] for run in row["runs"]["steps"]] == [508, 508]
        assert row["steps"]["bpb"]["count"] == 2
    assert lab.call(lab.plan(TEN_EVALUATIONS), *STEPS)[0] == 0 and not lab.calls()


def test_rows_of_packing_begin_with_the_trained_weights(lab):
    plan = lab.plan("bits 5 : MATRIX_BITS=5\nbits 4 : MATRIX_BITS=4\nscored : MATRIX_BITS=4 EVAL_STRIDE=9\n"
                    "trained : MATRIX_LR=0.1\nrounded : LATE_QAT_THRESHOLD=0.2\n")
    code, result = lab.call(plan, *STEPS, "--seeds", 3)
    base, *others = given(lab)
    assert code == 0 and result["trainings"] == 3
    by_bits = {(call.get("MATRIX_BITS"), call.get("PHASES")): call for call in others}
    weights = f"{base['OUT_DIR']}/checkpoint_0000020.pt"
    assert base["CHECKPOINT_EVERY"] == "20"
    assert [by_bits[bits, None]["RESUME"] for bits in ("5", "4")] == [weights] * 2
    assert by_bits["4", "eval"]["ARTIFACT"] == f"{by_bits['4', None]['OUT_DIR']}/model.pg"
    trained = [call for call in others if call.get("RESUME") == "auto"]
    assert [call.get("MATRIX_LR", call.get("LATE_QAT_THRESHOLD")) for call in trained] == ["0.1", "0.2"]
    # A further row finds the weights; without them it trains.
    more = lab.plan("bits 3 : MATRIX_BITS=3\n")
    assert lab.call(more, *STEPS, "--seeds", 3)[0] == 0 and [call["RESUME"] for call in given(lab)] == [weights]
    os.unlink(weights)
    assert lab.call(lab.plan("bits 2 : MATRIX_BITS=2\n"), *STEPS, "--seeds", 3)[0] == 0
    assert [call["RESUME"] for call in given(lab)] == ["auto"]


def test_what_begins_with_a_run_that_failed_fails_with_it_and_is_tried_with_it(lab):
    plan = lab.plan("stride : EVAL_STRIDE=9\nfine : ADAM_EPS=1e-9\n")
    lab.base.write_text(lab.base.read_text() + "ADAM_EPS=0.5\n")
    code, result = lab.call(plan, *STEPS, "--seeds", 3)
    assert code == 1 and len(lab.calls()) == 2
    assert "the run that it begins with failed: error: the loss is not finite" in named(result)["stride"]["notes"][0]
    assert lab.call(plan, *STEPS, "--seeds", 3)[0] == 1 and not lab.calls()
    assert lab.call(plan, *STEPS, "--seeds", 3, "--retry")[0] == 1 and len(lab.calls()) == 1


def real_sweep(toy, folder, words, *more):
    """{row: score} of a sweep by the real trainer, one seed and three steps; and its result."""
    pairs = dict(word.split("=", 1) for word in (*toy, *SMALL))
    base = folder / "base.env"
    base.write_text("\n".join(f"{name}={value}" for name, value in pairs.items()))
    out = folder / "result.json"
    words = [*words, "--base", f"@{base}", "--steps", "3", "--match", "steps", "--seeds", "3", "--out", folder / "out",
             "--json", out, *more]
    assert sweep.main(list(map(str, words))) == 0
    result = json.loads(out.read_text())
    return {row["name"]: row["steps"]["scores"]["3"] for row in result["rows"]}, result


SMALL = ("DEVICE=cpu", "COMPRESSOR=zlib", "MATRIX_QUANT=gptq", "GPTQ_CALIBRATION_TOKENS=512", "SELFTEST=0")


def alone(toy, folder, *changes):
    """The score of a run of its own."""
    words = [*toy, *SMALL, "ITERATIONS=3", "MAX_WALLCLOCK_SECONDS=0", "SEED=3", f"OUT_DIR={folder}", *changes]
    return summary(good(call(words)))["val_bpb"]


def test_the_real_trainer_gives_shared_runs_the_scores_of_runs_of_their_own(toy, tmp_path, no_settings):
    rows = {"bits": "MATRIX_BITS=4", "stride": "EVAL_STRIDE=16", "both": "MATRIX_BITS=4 EVAL_STRIDE=16"}
    plan = tmp_path / "plan.txt"
    plan.write_text("".join(f"{name} : {changes}\n" for name, changes in rows.items()))
    scores, result = real_sweep(toy, tmp_path, [plan])
    assert result["trainings"] == 1
    assert scores == {name: alone(toy, tmp_path / name, *changes.split()) for name, changes in rows.items()}


# ---- what a score depends on ----------------------------------------------------------------------------------------


def test_other_content_of_the_data_makes_other_runs(lab):
    words = lab.plan("a : MATRIX_LR=0.1\n"), *STEPS, "--seeds", 3
    shard, tokenizer = lab.folder / "fineweb_val_000000.bin", lab.folder / "tokenizer.model"
    assert lab.call(*words)[0] == 0 and len(lab.calls()) == 2
    shard.touch()
    assert lab.call(*words)[0] == 0 and not lab.calls(), "another time alone is nothing"
    for path, content in ((shard, None), (tokenizer, "another tokenizer")):
        size = path.stat().st_size
        write_shard(path, [2] * 100) if content is None else path.write_text(content[:size].ljust(size))
        assert path.stat().st_size == size
        assert lab.call(*words)[0] == 0 and len(lab.calls()) == 2, path
    moved = lab.folder / "moved"
    moved.mkdir()
    for path in (*lab.folder.glob("*.bin"), tokenizer):
        (moved / path.name).write_bytes(path.read_bytes())
    assert lab.call(*words, "--base", f"DATA_PATH={moved}")[0] == 0 and not lab.calls(), "the same text elsewhere"


def test_another_device_or_number_of_ranks_makes_other_runs(lab, monkeypatch):
    words = lab.plan("a : MATRIX_LR=0.1\n"), *STEPS, "--seeds", 3
    assert lab.call(*words)[0] == 0 and len(lab.calls()) == 2
    assert lab.call(*words, "--gpus-per-run", 2)[0] == 0
    assert [call[3] for call in lab.calls()] == [2, 2], "processes of torchrun"
    gpus(lab, monkeypatch, 1)
    assert lab.call(*words)[0] == 0 and len(lab.calls()) == 2
    assert lab.call(*words, "--device-name", "NVIDIA H200")[0] == 0 and len(lab.calls()) == 2


# ---- devices --------------------------------------------------------------------------------------------------------


def gpus(lab, monkeypatch, count):
    """A machine with GPUs, for the sweep; the stub says what it was given."""
    lab.base.write_text(lab.base.read_text().replace("DEVICE=cpu", ""))
    monkeypatch.setattr(sweep.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(sweep.torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_eight_runs_at_once_have_eight_devices(lab, monkeypatch):
    gpus(lab, monkeypatch, 8)
    lab.trainer.write_text(lab.trainer.read_text().replace('print("step 1"', 'time.sleep(4); print("step 1"'))
    code, result = lab.call("MATRIX_LR=1,2,3,4,5,6,7,8", *STEPS, "--seeds", 3, "--jobs", 8)
    assert code == 0 and sorted(call[2] for call in lab.calls()) == [str(device) for device in range(8)]
    assert result["jobs"] == 8


def test_as_many_runs_as_the_machine_has_room_for(lab, monkeypatch):
    gpus(lab, monkeypatch, 4)
    code, result = lab.call("MATRIX_LR=1,2,3", *STEPS, "--seeds", 3, "--gpus-per-run", 2)
    assert code == 0 and result["jobs"] == 2
    calls = lab.calls()
    assert {call[2] for call in calls} <= {"0,1", "2,3"} and [call[3] for call in calls] == [2, 2, 2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert lab.call("MATRIX_LR=4,5", *STEPS, "--seeds", 3)[0] == 0
    assert {call[2] for call in lab.calls()} <= {"5", "7"}


def test_too_many_runs_for_the_gpus(lab, monkeypatch, capsys):
    gpus(lab, monkeypatch, 4)
    assert lab.call("MATRIX_LR=1,2", *STEPS, "--gpus-per-run", 2, "--jobs", 3)[0] == 2
    assert "need 6 GPUs, there are 4" in capsys.readouterr().err


def test_eight_gpus_of_one_run_are_started_by_torchrun(lab, monkeypatch):
    gpus(lab, monkeypatch, 8)
    code, _ = lab.call("MATRIX_LR=1,2", *STEPS, "--seeds", 3, "--gpus-per-run", 8)
    assert code == 0 and {(call[2], call[3]) for call in lab.calls()} == {("0,1,2,3,4,5,6,7", 8)}


def test_two_ranks_on_a_cpu_give_the_scores_of_one(toy, tmp_path, no_settings):
    scores, _ = real_sweep(toy, tmp_path, ["EVAL_STRIDE=16,32"], "--gpus-per-run", 2)
    for name, score in scores.items():
        assert score == pytest.approx(alone(toy, tmp_path / name, name), abs=2e-5)


# ---- clusters -------------------------------------------------------------------------------------------------------

SIX = "MATRIX_LR=0.01,0.02,0.03,0.04,0.05,0.06"


def test_a_killed_worker_of_two_changes_nothing_of_the_table(lab, capsys):
    """Six runs by submitit's local executor; one job and what it runs are killed half-way."""
    slow = lab.trainer.read_text().replace('print("step 1"', 'time.sleep(0.7); print("step 1"')
    lab.trainer.write_text(slow)
    words = [SIX, "--base", f"@{lab.base}", "--steps", "20", "--seeds", "3", "--cluster", "local", "--jobs", "2"]
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import sweep; from pathlib import Path\n"
            "sys.exit(sweep.main(sys.argv[3:], trainer=Path(sys.argv[2])))")
    out = lab.folder / "cluster"
    command = [sweep.sys.executable, "-c", code, str(sweep.ROOT / "tools"), str(lab.trainer), *words, "--out", str(out)]
    with Started(command, limit=120) as run:
        begun = out / "runs"
        wait_for(lambda: begun.exists() and len(list(begun.glob("*/task.json"))) >= 3)
        workers = {}
        for path in begun.glob("*/task.json"):
            if not (path.parent / "summary.json").exists():
                workers[int(json.loads(path.read_text())["worker"].split()[1])] = path
        victim = max(workers)
        for pid in (*family(victim), victim):
            os.kill(pid, signal.SIGKILL)
        done = run.finish()
    assert done.returncode == 0, done.stderr
    assert lab.call(SIX, "--steps", 20, "--seeds", 3)[0] == 0  # never killed, without a cluster
    want = capsys.readouterr().out
    assert rows_of(done.stdout) == rows_of(want) and len(rows_of(want)) == 6
    lab.calls()
    assert lab.call(SIX, "--steps", 20, "--seeds", 3, "--out", out)[0] == 0 and not lab.calls(), "from either side"


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("| 0.0")]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def test_the_name_of_the_gpu_of_the_nodes_must_be_said(lab, capsys):
    lab.base.write_text(lab.base.read_text().replace("DEVICE=cpu", ""))
    assert lab.call(SIX, *STEPS, "--cluster", "slurm", "--gpus-per-run", 8)[0] == 2
    assert "--device-name" in capsys.readouterr().err


def test_what_slurm_is_asked_for(lab, monkeypatch):
    """The batch script that submitit would submit."""
    args = sweep.arguments(["MATRIX_LR=1,2", "--cluster", "slurm", "--gpus-per-run", "8", "--time-limit", "4h",
                            "--device-name", "NVIDIA H100", "--cluster-option", "slurm_partition=gpu",
                            "--cluster-option", "cpus_per_task=16"])
    monkeypatch.setattr("submitit.SlurmExecutor.affinity", classmethod(lambda cls: 1))
    place = sweep.Place(args, Settings())
    executor = place.executor(args, lab.folder)
    script = executor._executor._make_submission_file_text("a command", "x")
    for line in ("--gpus-per-node=8", "--partition=gpu", "--cpus-per-task=16", "--time=241", "--nodes=1"):
        assert f"#SBATCH {line}" in script, script
    args.cluster_option = ["nonsense=1"]
    with pytest.raises(sweep.BadInput, match="--cluster-option"):
        place.executor(args, lab.folder)


# ---- what is asked for ----------------------------------------------------------------------------------------------


def test_a_row_that_changes_nothing_is_refused(lab, capsys):
    code, _ = lab.call(lab.plan("rate : TTT_LR=0.1\nfine : TTT=full TTT_LR=0.1\n"), *STEPS)
    error = capsys.readouterr().err
    assert code == 2 and not lab.calls() and error.count("error:") == 1
    assert "plan.txt:1: TTT_LR has no effect here without TTT=" in error
    assert lab.call("TTT_LR=0.1,0.2", *STEPS)[0] == 2
    assert lab.call("TTT_LR=0.1,0.2", "TTT=full", *STEPS, "--seeds", 3)[0] == 0


def test_only_some_rows_and_what_they_are_compared_with(lab, capsys):
    plan = lab.plan("a : MATRIX_LR=0.1\nb [vs a] : MATRIX_LR=0.2\nc : MATRIX_LR=0.3\n")
    code, result = lab.call(plan, *STEPS, "--seeds", 3, "--only", "b")
    assert code == 0 and len(lab.calls()) == 3 and named(result).keys() == {"a", "b"}
    assert lab.call(plan, *STEPS, "--only", "d")[0] == 2 and "--only 'd': there is no such row" in capsys.readouterr().err


def test_dry_run_says_what_would_be_made_and_makes_nothing(lab, capsys):
    plan = lab.plan("a : MATRIX_LR=0.1\nstride : EVAL_STRIDE=9\nwide : NUM_LAYERS=8\n")
    assert lab.call(plan, "--steps", 20, "--seeds", 3, "--dry-run")[0] == 0
    out = capsys.readouterr().out
    assert not lab.calls() and not lab.calls("bench_calls")
    assert "a, seed 3, 20 steps: train\n" in out and "stride, seed 3, 20 steps: score the artifact of base, seed 3" in out
    assert "4 of 4 runs to make, 3 of them trainings, 1 at once on the CPU; time of the trainings: unknown" in out
    assert "10 processes measure the time of a step" in out
    assert lab.call(plan, *STEPS, "--seeds", 3, "--only", "a")[0] == 0
    capsys.readouterr()
    assert lab.call(plan, *STEPS, "--seeds", 3, "--dry-run")[0] == 0
    out = capsys.readouterr().out
    assert "a, seed 3, 20 steps: finished, 2.15" in out and "2 of 4 runs to make, 1 of them trainings" in out
    assert "time of the trainings: 0 min" in out


def test_every_switch_of_a_record_is_turned_off(lab, capsys):
    record = lab.folder / "record"
    record.mkdir()
    (record / "settings.env").write_text("XSA_LAST_N=4 NUM_LOOPS=1 LOOP_START=1 LOOP_END=2 SMEAR_GATE=none NORMUON=1\n"
                                         "EMBED_QUANT=gptq LOADER=packed DOC_MASK=attention TTT=lora_docs\n")
    code, result = lab.call("--ablate", record, *STEPS, "--seeds", 3)
    off = {row["changes"][0]: row["name"] for row in result["rows"]}
    assert code == 0 and len({call["OUT_DIR"] for call in given(lab)}) == len(off) + 1
    assert off["XSA_LAST_N=0"] == "no exclusive self-attention (XSA)" and off["NUM_LOOPS=0"] == "no depth recurrence"
    assert {"NORMUON=0", "LOADER=sequential", "TTT=off", "SKIPS=none", "BIGRAM_VOCAB_SIZE=0"} <= off.keys()
    assert not any(change.startswith(("SMEAR_GATE", "MATRIX_LR", "SELFTEST", "LOOP_START")) for change in off)
    assert any(text.startswith("DOC_MASK=none alone cannot be") for text in result["left_out"])
    assert "Left out: DOC_MASK=none alone cannot be" in capsys.readouterr().out


def test_a_time_limit_ends_with_what_there_is(lab):
    lab.trainer.write_text(lab.trainer.read_text().replace('print("step 1"', 'time.sleep(3); print("step 1"'))
    code, result = lab.call("MATRIX_LR=1,2,3,4,5,6,7,8", *STEPS, "--seeds", 3, "--time-limit", "8s")
    made = [row for row in result["rows"] if row["steps"]["bpb"]]
    assert code == 1 and 1 <= len(made) < 8
    assert lab.call("MATRIX_LR=1,2,3,4,5,6,7,8", *STEPS, "--seeds", 3, "--jobs", 8)[0] == 0


@pytest.mark.parametrize("words, says", [
    (["--table", "x.pdf"], "must end in .md, .csv, .png or .svg"), (["--time-limit", "5"], "90s, 30m or 4h"),
    (["--jobs", "0"], "whole number of at least 1"), (["--seeds", "1,x"], "no list of different seeds"),
    (["--stop-worse", "-1"], "not a number above 0"), (["--cluster-option", "x"], "NAME=VALUE")])
def test_messages_say_what_a_value_should_be(lab, capsys, words, says):
    with pytest.raises(SystemExit) as stop:
        lab.call("MATRIX_LR=1,2", *words)
    assert stop.value.code == 2 and says in capsys.readouterr().err


# ---- early stop, search ---------------------------------------------------------------------------------------------

CURVE = """
import pathlib
def curve(out, values):
    for number, value in enumerate(values, 1):
        with open(out / "metrics.jsonl", "a") as file:
            print(json.dumps({"event": "val", "step": number, "val_bpb": value}), file=file)
"""


def test_hopeless_runs_are_stopped_on_request_and_made_without_it(lab, capsys):
    text = lab.trainer.read_text().replace('print("step 1"', CURVE.strip().replace("import pathlib\n", "") + """
curve(out, [3, 2.5, 2.1 + (number("MATRIX_LR", 0) > 0.5)])
if number("MATRIX_LR", 0) > 0.5:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    time.sleep(5)
print("step 1\"""")
    lab.trainer.write_text(text)
    plan = lab.plan("fine : MATRIX_LR=0.1\nhopeless : MATRIX_LR=0.9\n")
    assert lab.call(plan, *STEPS, "--seeds", 3, "--stop-worse", 0.5)[0] == 2
    assert "set VAL_LOSS_EVERY" in capsys.readouterr().err
    assert lab.call("MATRIX_LR=1,2", *STEPS, "--stop-worse", 0.5)[0] == 2
    assert "the base, which a grid and a search do not make" in capsys.readouterr().err
    words = plan, *STEPS, "--seeds", 3, "VAL_LOSS_EVERY=1"
    code, result = lab.call(*words, "--stop-worse", 0.5)
    assert code == 0 and named(result)["fine"]["steps"]["bpb"]
    assert named(result)["hopeless"]["notes"] == [
        "equal steps, seed 3: stopped at step 3: 3.1000 BPB, 1.0000 more than the base there"]
    lab.calls()
    assert lab.call(*words, "--stop-worse", 0.5)[0] == 0 and not lab.calls()
    code, result = lab.call(*words)
    assert code == 0 and named(result)["hopeless"]["steps"]["bpb"] and len(lab.calls()) == 1


def test_a_search_asks_optuna_and_goes_on_where_it_was(lab, capsys):
    pytest.importorskip("optuna")
    words = "MATRIX_LR=0.01..1", *STEPS, "--seeds", 3
    assert lab.call(*words)[0] == 2 and "needs --trials N" in capsys.readouterr().err
    code, result = lab.call(*words, "--trials", 6)
    tried = [float(row["changes"][0].partition("=")[2]) for row in result["rows"]]
    assert code == 0 and len(lab.calls()) == 6 and all(0.01 <= rate <= 1 for rate in tried)
    best = [row["steps"]["bpb"]["mean"] for row in result["rows"]]
    assert best == sorted(best) and tried == sorted(tried), "the lowest rate is best in the stub"
    code, more = lab.call(*words, "--trials", 8)
    assert code == 0 and len(lab.calls()) == 2 and {row["name"] for row in result["rows"]} < named(more).keys()
    code, mixed = lab.call("MATRIX_LR=0.01..1", "NUM_LAYERS=4,5", "NUM_LOOPS=0..2", *STEPS, "--seeds", 3, "--trials", 3)
    assert code == 0 and all(len(row["changes"]) == 3 for row in mixed["rows"])


# ---- files ----------------------------------------------------------------------------------------------------------


def test_every_format_of_the_table(lab):
    plan = lab.plan("slow : MATRIX_LR=0.005\nfast : MATRIX_LR=0.1\nsame : MUON_WD=0.1\n")
    files = [lab.folder / f"t{suffix}" for suffix in table.FORMATS]
    code, result = lab.call(plan, *STEPS, "--seeds", "7,8,9", *(word for path in files for word in ("--table", path)))
    assert code == 0 and files[0].read_text().startswith("Base: ")
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(files[1].read_text()))}
    for name, rate in (("slow", 0.005), ("fast", 0.1), ("same", 0.025)):
        change = np.mean([stub_score(rate, seed, 20) - stub_score(0.025, seed, 20) for seed in (7, 8, 9)])
        assert float(rows[name]["steps_change_mean"]) == pytest.approx(change, abs=1e-12)
        assert rows[name]["steps_change_is_clear"] == str(name != "same") and rows[name]["valid"] == "yes"
    assert files[2].read_bytes().startswith(b"\x89PNG") and b"slow" in files[3].read_bytes()
    assert result["complete"]


def test_files_are_checked_before_and_written_as_runs_end(lab, capsys):
    plan = lab.plan("a : MATRIX_LR=0.1\nwaits : ADAM_EPS=0.125\n")
    assert lab.call(plan, *STEPS, "--table", lab.folder / "no/t.md")[0] == 2 and not lab.calls()
    assert "name a file in a folder that exists" in capsys.readouterr().err
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import sweep; from pathlib import Path\n"
            "sys.exit(sweep.main(sys.argv[3:], trainer=Path(sys.argv[2])))")
    words = [plan, "--base", f"@{lab.base}", *STEPS, "--seeds", 3, "--out", lab.folder / "out", "--table",
             lab.folder / "t.md", "--json", lab.folder / "t.json"]
    with Started([sweep.sys.executable, "-c", code, str(sweep.ROOT / "tools"), str(lab.trainer), *map(str, words)]) as run:
        wait_for((lab.folder / "waiting").exists)
        wait_for(lambda: (lab.folder / "t.md").exists() and "| a | `MATRIX_LR=0.1` | +" in (lab.folder / "t.md").read_text())
        result = json.loads((lab.folder / "t.json").read_text())
        assert named(result)["a"]["steps"]["bpb"] and named(result)["waits"]["steps"]["bpb"] is None
        assert not result["complete"]
        run.signal(signal.SIGINT)
        assert run.finish().returncode == 130


def test_what_is_in_the_way_is_one_line(lab, capsys):
    out = lab.folder / "out"
    out.mkdir()
    (out / "runs").touch()
    assert lab.call(lab.plan("a : MATRIX_LR=0.1\n"), *STEPS)[0] == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {out}/runs")


def test_the_table_on_a_terminal_is_aligned(lab):
    code, result = lab.call(lab.plan("one : MATRIX_LR=0.1\nanother : MATRIX_LR=0.2 MUON_WD=0.1\n"), *STEPS)
    args = sweep.arguments([str(lab.folder / "plan.txt"), "--base", f"@{lab.base}", *map(str, STEPS)])
    text = table.as_text(result, plans.make_plan(args, {}), terminal=True)
    rows = [line for line in text.splitlines() if line.startswith(("one ", "another "))]
    assert code == 0 and len(rows) == 2
    assert len({line.rindex("yes") for line in rows}) == 1 and "|" not in rows[0]


def test_a_worker_never_makes_what_has_ended(tmp_path):
    """Two workers, one list: each task is made once, in the order of the list, and after what it begins with."""
    log = tmp_path / "log"
    tasks = []
    for number in range(8):
        after = tasks[0].folder / "done" if number else None
        folder = tmp_path / str(number)
        command = ["sh", "-c", f"echo {number} >> {log}; sleep 0.1; touch {folder}/done"]
        tasks.append(work.Task(str(number), folder, command, "done", after=after, needs=after))
    for _ in work.work_here(tasks, [{}, {}, {}], float("inf"), [], wait=False):
        pass
    made = log.read_text().split()
    assert made[0] == "0" and sorted(made) == list("01234567")


def test_what_another_command_did_not_keep_is_said_and_made_at_the_next_call(tmp_path):
    """It had begun the run before this command asked for its weights."""
    task = work.Task("packed", tmp_path / "packed", ["false"], "summary.json", after=tmp_path / "summary.json",
                     needs=tmp_path / "weights.pt")
    assert not task.can_begin() and not task.has_ended()
    task.after.touch()
    assert not task.can_begin()
    assert "another command did not keep" in work.read_json(task.folder / "failed.json")["reason"]
    task.forget_failure(retry=False)
    assert not task.has_ended()
