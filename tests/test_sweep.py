"""tools/sweep.py: plans and grids, the arithmetic of the table, what is run again and what is not, and one real sweep.

Most tests use a stub in place of the trainer: the settings that it is given decide what becomes of its run.
"""

import json
import math
import os
import shlex
import signal
import string
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from process import REPO, clean_env
from runs import Started
from toy import write_shard

import sweep
import train_gpt as tg
from train_gpt import Settings

# A run that takes no time. Its score is a function of settings and seed; some settings make it fail, lie or wait.
TRAINER = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
given = dict(word.split("=", 1) for word in sys.argv[1:])
def number(name, default):
    return float(given.get(name, default))
out = Path(given["OUT_DIR"])
with open(Path(__file__).with_name("calls"), "a") as calls:
    calls.write(json.dumps([given, os.environ["OMP_NUM_THREADS"]]) + "\\n")
print("step 1", flush=True)
if number("ADAM_EPS", 1e-8) == 0.5:
    print("error: the loss is not finite at step 3", file=sys.stderr)
    print("a word after the error", file=sys.stderr)
    sys.exit(4)
if number("ADAM_EPS", 1e-8) == 0.25:
    os.kill(os.getpid(), signal.SIGKILL)
if number("ADAM_EPS", 1e-8) == 0.125:
    def stopped(*_):
        (out / "checkpoint").touch()
        sys.exit(130)
    signal.signal(signal.SIGINT, stopped)
    Path(__file__).with_name("waiting").touch()
    while not Path(__file__).with_name("go").exists():
        time.sleep(0.02)
seed = int(given.get("SEED", 1337))
bpb = 2 + seed / 1e4 + number("MATRIX_LR", 0.025) * (1 + seed / 1e3) + 1 / number("ITERATIONS", 20000)
invalid = number("ADAM_EPS", 1e-8) == 0.0625
silent = number("ADAM_EPS", 1e-8) == 0.03125
summary = {"val_bpb": None if silent else bpb, "val_loss": 1.0, "valid": "no" if invalid else "yes",
           "reasons": ["a reason"] if invalid else [], "params": 1000, "steps": int(given["ITERATIONS"]),
           "model_bytes": 500 + int(given.get("EMBED_BITS", 8)), "total_bytes": 600, "train_seconds": 0.1,
           "settings": " ".join(sys.argv[1:]), "settings_hash": "x", "seed": seed,
           "code_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
(out / "summary.json").write_text(json.dumps(summary))
sys.exit(3 if summary["total_bytes"] > int(given.get("SIZE_LIMIT", 16000000)) else 0)
"""

# A benchmark whose time per step is that of a formula: proportional to the layers.
BENCH = """
import argparse, json, sys
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("words", nargs="+")
parser.add_argument("--against", nargs="*")
parser.add_argument("--modes")
parser.add_argument("--steps", type=int)
parser.add_argument("--json", type=Path)
args = parser.parse_intermixed_args()
sides = [dict(word.split("=", 1) for word in words) for words in (args.against, args.words[1:])]
with open(Path(__file__).with_name("bench_calls"), "a") as calls:
    calls.write(json.dumps([*sides, args.modes, args.steps]) + "\\n")
if sides[1].get("SMEAR_GATE") == "none":
    sys.exit("error: no such machine")
pair = [10 * int(given.get("NUM_LAYERS", 11)) * (1.004 if "GRAD_CLIP_NORM" in given else 1) for given in sides]
row = {"mode": args.modes, "pairs": [pair] * args.steps}
if sides[1].get("MLP_MULT") == "2.0":
    row["error"] = row.pop("pairs")
args.json.write_text(json.dumps({"rows": [row]}))
"""


class Bench:
    """A folder with a base, stubs and what they saw; call() is the command, in this process."""

    def __init__(self, folder):
        self.folder = folder
        for split in ("train", "val"):
            write_shard(folder / f"fineweb_{split}_000000.bin", [1] * 100)
        self.base = folder / "base.env"
        self.base.write_text(f"DATA_PATH={folder}\nMAX_WALLCLOCK_SECONDS=9 SEED=5 COMPRESSOR=zlib DEVICE=cpu\n"
                             "NUM_LAYERS=4 VE_LAYERS=2,3 TRAIN_BATCH_TOKENS=2048\n")
        self.trainer, self.bench = folder / "stub.py", folder / "bench.py"
        self.trainer.write_text(TRAINER)
        self.bench.write_text(BENCH)

    def plan(self, text):
        path = self.folder / "plan.txt"
        path.write_text(textwrap.dedent(text))
        return path

    def call(self, *words):
        """(exit code, result or None)"""
        answer = self.folder / "result.json"
        answer.unlink(missing_ok=True)
        words = [*map(str, words), "--base", f"@{self.base}", "--out", str(self.folder / "out"), "--json", str(answer)]
        code = sweep.main(words, trainer=self.trainer, bench=self.bench)
        return code, json.loads(answer.read_text()) if answer.exists() else None

    def calls(self, name="calls"):
        """What the stub was called with since the last question."""
        path = self.folder / name
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    for name in sweep.FIELDS:
        monkeypatch.delenv(name, raising=False)
    return Bench(tmp_path)


def named(result):
    return {row["name"]: row for row in result["rows"]}


def stub_score(lr, seed, steps):
    return 2 + seed / 1e4 + lr * (1 + seed / 1e3) + 1 / steps


# ---- plans and grids ------------------------------------------------------------------------------------------------


def test_plan_lines(tmp_path):
    path = tmp_path / "plan.txt"
    path.write_text("# a heading\n\nno smear (#65) : SMEAR_GATE=none XSA_LAST_N=0   # why: it may help\n"
                    "  SWA:AVERAGE=swa\ndense [vs SWA] : AVERAGE=swa SWA_EVERY=10\n"
                    "home : DATA_PATH='a folder/x:y'\n")
    rows, complaints = sweep.read_plan(path)
    assert not complaints
    assert [row[:3] for row in rows] == [
        ("no smear (#65)", ("SMEAR_GATE=none", "XSA_LAST_N=0"), "base"), ("SWA", ("AVERAGE=swa",), "base"),
        ("dense", ("AVERAGE=swa", "SWA_EVERY=10"), "SWA"), ("home", ("DATA_PATH=a folder/x:y",), "base")]
    assert rows[0].where == f"{path}:3"


NAMES = st.text(string.ascii_letters + string.digits + " ()#+-/,.", min_size=1, max_size=20).map(str.strip).filter(
    lambda name: name and name != "base" and not name.startswith("#") and " #" not in name)
CHANGES = st.lists(st.tuples(st.sampled_from(["MATRIX_LR", "DATA_PATH", "VE_LAYERS"]),
                             st.text("abc1,./ '\"", max_size=9)),
                   min_size=1, max_size=3)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(NAMES, st.tuples(CHANGES, st.booleans()), min_size=1, max_size=5), st.data())
def test_whatever_is_written_as_a_plan_is_read_back(tmp_path_factory, rows, data):
    names, lines, want = list(rows), [], []
    for name, (changes, other) in rows.items():
        words = tuple(f"{key}={value}" for key, value in changes)
        reference = data.draw(st.sampled_from(names)) if other else "base"
        lines += data.draw(st.sampled_from([[], [""], ["# note : A=1"]]))
        lines.append(f"{name}{f' [vs {reference}]' if other else ''} : {' '.join(map(shlex.quote, words))}"
                     + data.draw(st.sampled_from(["", "  # KEY=1"])))
        want.append((name, words, reference))
    path = tmp_path_factory.getbasetemp() / "any.plan"
    path.write_text("\n".join(lines))
    found, complaints = sweep.read_plan(path)
    assert not complaints and [row[:3] for row in found] == want


def test_every_complaint_comes_at_once_and_nothing_runs(lab, capsys, monkeypatch):
    monkeypatch.setenv("MATRIX_LR", "0.1")
    monkeypatch.setenv("MATRIX_LRR", "0.1")
    plan = lab.plan("""\
        typo : MATRX_LR=1
        no change : MATRIX_LR=0.025
        bad value : MATRIX_LR=fast EMBED_BITS=9
        conflict : XSA_LAST_N=99
        mine : SEED=3 PHASES=train
        twice : MATRIX_LR=1 MATRIX_LR=2
        twice : MATRIX_LR=3
        lost [vs nobody] : MATRIX_LR=4
        no colon
        empty :
        quote : DATA_PATH='x
        gone : DATA_PATH=/nowhere
        base : MATRIX_LR=5
        """)
    code, result = lab.call(plan, "OUT_DIR=x", "MUON_WDD=1")
    error = capsys.readouterr().err
    assert (code, result, lab.calls()) == (2, None, [])
    lines = error.splitlines()
    assert all(line.startswith("error: ") for line in lines) and "Traceback" not in error
    for number, words in ((1, "did you mean MATRIX_LR"), (3, "MATRIX_LR=fast"), (3, "EMBED_BITS=9"),
                          (4, "XSA_LAST_N=99"), (5, "SEED is decided by the sweep: use --seeds"),
                          (5, "PHASES is decided by the sweep"), (6, "set twice"), (7, "'twice' is taken"),
                          (8, "no row 'nobody'"), (9, "'no colon' is not"), (10, "is not"),
                          (11, "No closing quotation"), (13, "'base' is taken")):
        assert any(f"{plan}:{number}: " in line and words in line for line in lines), (number, words, error)
    for words in ("base: OUT_DIR is decided by the sweep: use --out", "MUON_WDD", "environment: MATRIX_LR is set",
                  "environment: MATRIX_LRR", "give --steps"):
        assert sum(words in line for line in lines) == (words != "give --steps"), (words, error)


def test_a_good_base_shows_complaints_that_need_it(lab, capsys):
    code, _ = lab.call(lab.plan("same : MATRIX_LR=0.025\ngone : DATA_PATH=/nowhere\n"))
    error = capsys.readouterr().err
    assert code == 2 and "plan.txt:1: has the settings of 'base'" in error and "DATA_PATH=/nowhere" in error
    assert "the base has no ITERATIONS: give --steps N" not in error  # the file leaves the default, 20000
    lab.base.write_text(lab.base.read_text() + "ITERATIONS=0\n")
    code, _ = lab.call(lab.plan("fast : MATRIX_LR=0.1\n"))
    assert code == 2 and "the base has no ITERATIONS: give --steps N" in capsys.readouterr().err


@pytest.mark.parametrize("words, says", [
    (["nowhere.plan"], "nowhere.plan: cannot be read"), (["MATRIX_LR=0.1"], "no word has two values"),
    (["MATRIX_LR=1,2", "MATRIX_LR=3,4"], "MATRIX_LR is given twice"), (["MATRX_LR=1,2"], "did you mean MATRIX_LR"),
    (["SEED=1,2"], "SEED is decided by the sweep"), (["DATA_PATH=/a,/b"], "no fineweb_train_")])
def test_bad_plans_and_grids(lab, capsys, words, says):
    assert lab.call(*words, "--steps", 4) == (2, None)
    assert capsys.readouterr().err.count(says) == (2 if "DATA" in words[0] else 1)


@pytest.mark.parametrize("words", [["--seeds", "1,1"], ["--seeds", "-1"], ["--seeds", "x"], ["--steps", "0"],
                                   ["--jobs", "0"], ["--match", "space"]])
def test_bad_options(lab, words, capsys):
    with pytest.raises(SystemExit) as stop:
        lab.call("MATRIX_LR=1,2", *words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(sorted(sweep.FIELDS)), st.lists(
    st.integers(0, 99), min_size=1, max_size=4, unique=True), max_size=4))
def test_grid_is_the_product(axes):
    bars = {name: "|" if sweep.FIELDS[name].type in tg.LISTS else "," for name in axes}
    words = [f"{name}={bars[name].join(map(str, values))}" for name, values in axes.items()]
    rows, base, complaints = sweep.read_grid(words)
    wide = {name: values for name, values in axes.items() if len(values) > 1}
    assert base == [f"{name}={values[0]}" for name, values in axes.items() if len(values) == 1]
    assert bool(complaints) == (not wide)
    assert len(rows) == (math.prod(map(len, wide.values())) if wide else 0) == len({row.name for row in rows})
    for row in rows:
        assert [word.partition("=")[0] for word in row.changes] == list(wide)
        assert all(int(word.partition("=")[2]) in wide[word.partition("=")[0]] for word in row.changes)


OF_EACH_LIST = {  # two values of a setting of each type of tg.LISTS
    tg.Layers: ("VE_LAYERS", "2,3", "3"),
    tg.Betas: ("EMBED_BETAS", "0.9,0.95", "0.9,0.99"),
    tg.Schedule: ("TRAIN_SEQ_SCHEDULE", "64@0.3,128@1", "128@1"),
    tg.IntPairs: ("LAYER_BITS", "0@8,3@8", "0@8"),
    tg.Names: ("TTT_LORA_TARGETS", "q,v,head", "q"),
}


@pytest.mark.parametrize("kind", tg.LISTS, ids=tg.LISTS.get)
def test_lists_are_divided_by_a_bar(kind):
    name, first, second = OF_EACH_LIST[kind]
    assert sweep.FIELDS[name].type is kind
    words = [f"{name}={first}", f"{name}={second}"]
    assert sweep.alternatives(f"{name}={first}|{second}") == words
    assert sweep.alternatives(words[0]) == words[:1]
    for word in words:
        tg.parse_value(sweep.FIELDS[name], word.partition("=")[2])


def test_other_values_are_divided_by_a_comma():
    assert sweep.alternatives("VE_LAYERS=2,3|3|") == ["VE_LAYERS=2,3", "VE_LAYERS=3", "VE_LAYERS="]
    assert sweep.alternatives("MATRIX_LR=1,2,1") == ["MATRIX_LR=1", "MATRIX_LR=2"]
    assert sweep.alternatives("@a,b") == ["@a,b"]


# ---- arithmetic -----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9))
def test_sample_statistics_are_those_of_numpy(values):
    found = sweep.sample_statistics(values)
    assert found["mean"] == pytest.approx(np.mean(values), abs=1e-12)
    assert (found["min"], found["max"], found["count"]) == (np.min(values), np.max(values), len(values))
    if len(values) > 1:
        assert found["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    else:
        assert found["std"] is None
    assert sweep.sample_statistics([]) is None


@given(st.dictionaries(st.integers(0, 9), st.floats(-9, 9)), st.dictionaries(st.integers(0, 9), st.floats(-9, 9)))
def test_differences_are_paired_by_seed(one, other):
    both = [seed for seed in range(10) if seed in one and seed in other]
    assert sweep.paired(one, other) == {seed: one[seed] - other[seed] for seed in both}


@pytest.mark.parametrize("ratio, steps", [(1.25, 160), (0.8, 250), (1.009, 198), (1.0, 200), (1.002, 200), (1e6, 1)])
def test_steps_in_equal_time(ratio, steps):
    assert sweep.steps_in_equal_time(200, sweep.Speed(ratio, "measured", [(1, ratio)] * 9)) == steps


def test_a_ratio_within_its_error_of_1_is_equal_time():
    noise = np.random.default_rng(0).normal(0, 0.1, 4000)
    medians = [np.median(part) for part in noise.reshape(100, 40)]
    errors = [sweep.ratio_error([(1, 1 + x) for x in part]) for part in noise.reshape(100, 40)]
    assert np.mean(errors) == pytest.approx(np.std(medians), rel=0.15) and sweep.ratio_error([(2, 3)]) == 0
    for ratio, steps in ((1.025, 200), (1.035, 193), (0.975, 200), (0.965, 207)):  # the error is 0.0152
        pairs = [(1, ratio + x) for x in np.linspace(-0.1, 0.1, 41)]
        assert sweep.steps_in_equal_time(200, sweep.Speed(ratio, "measured", pairs)) == steps, ratio


def test_groups_of_settings_are_settings():
    assert sweep.SAME_WORK < {name.lower() for name in sweep.FIELDS} and sweep.OWNED.keys() < sweep.FIELDS.keys()
    assert {"matrix_bits", "eval_stride", "compressor", "matrix_lr"} < sweep.SAME_WORK
    assert not {"num_layers", "grad_clip_norm", "muon_backend_steps", "average", "train_seq_len"} & sweep.SAME_WORK


# ---- sweeps with a stub ---------------------------------------------------------------------------------------------


def test_plan_at_equal_steps(lab, capsys):
    plan = lab.plan("slow : MATRIX_LR=0.005\nfast : MATRIX_LR=0.1\nfaster [vs fast] : MATRIX_LR=0.2 EMBED_BITS=6\n")
    code, result = lab.call(plan, "MUON_WD=0.1", "--steps", 50, "--seeds", "7,8,9", "--match", "steps",
                            "--table", lab.folder / "t.md")
    assert code == 0
    calls = [call[0] for call in lab.calls()]
    assert len(calls) == 12 and all(call["ITERATIONS"] == "50" and float(call["MAX_WALLCLOCK_SECONDS"]) == 0
                                    and call["MUON_WD"] == "0.1" and call["RESUME"] == "auto" for call in calls)
    assert [call["SEED"] for call in calls] == sorted(call["SEED"] for call in calls)
    assert len({call["OUT_DIR"] for call in calls}) == 12
    rates = {"slow": 0.005, "fast": 0.1, "faster": 0.2}
    assert [row["name"] for row in result["rows"]] == ["slow", "fast", "faster"]
    for row in result["rows"]:
        other = 0.1 if row["name"] == "faster" else 0.025
        change = [stub_score(rates[row["name"]], seed, 50) - stub_score(other, seed, 50) for seed in (7, 8, 9)]
        assert row["steps"]["change"]["mean"] == pytest.approx(np.mean(change))
        assert row["steps"]["change"]["min"] == pytest.approx(min(change))
        assert row["steps"]["change"]["max"] == pytest.approx(max(change))
        assert row["steps"]["changes"].keys() == {"7", "8", "9"} and row["speed"] is None
        assert all(run["valid"] == "yes" and "MUON_WD=0.1" in run["command"] for run in row["runs"]["steps"])
    out = capsys.readouterr().out
    assert out == (lab.folder / "t.md").read_text()
    base = [stub_score(0.025, seed, 50) for seed in (7, 8, 9)]
    assert f"Base: {np.mean(base):.4f} ({min(base):.4f} .. {max(base):.4f}) BPB, 1,000 parameters." in out
    line = next(line for line in out.splitlines() if line.startswith("| faster"))
    mean = result["rows"][2]["steps"]["change"]["mean"]
    assert line.startswith(f"| faster [vs fast] | `MATRIX_LR=0.2 EMBED_BITS=6` | {mean:+.4f} (+")
    assert line.endswith("| -0.4% |")  # 506 bytes, not 508
    assert "small-scale" in out and "8xH100" in out and "7, 8, 9" in out and "100 training tokens" in out
    assert f"python tools/sweep.py {plan} MUON_WD=0.1 --steps 50" in out and "equal time" not in out
    assert "102,400 tokens" in out and "1024.00 epochs" in out and f"torch {result['machine']['torch']}" in out


def test_grid_prints_absolute_scores(lab, capsys):
    code, result = lab.call("MATRIX_LR=0.03,0.02", "EMBED_BITS=6,8", "MUON_WD=0.2", "--steps", 5, "--seeds", "3")
    out = capsys.readouterr().out
    assert code == 0 and len(lab.calls()) == 4 and result["base"]["runs"] == [] and not lab.calls("bench_calls")
    assert "| MATRIX_LR | EMBED_BITS | BPB at equal steps | model bytes |" in out and "seed 3 alone" in out
    assert [row["changes"][0] for row in result["rows"]] == ["MATRIX_LR=0.02"] * 2 + ["MATRIX_LR=0.03"] * 2
    for row in result["rows"]:
        rate = float(row["changes"][0].partition("=")[2])
        assert row["steps"]["bpb"]["mean"] == pytest.approx(stub_score(rate, 3, 5)) and "change" not in row["steps"]
    assert f"| 0.02 | 6 | {stub_score(0.02, 3, 5):.4f} | 506 |" in out


def test_equal_time(lab, capsys):
    plan = lab.plan("wide : NUM_LAYERS=8\nwider [vs wide] : NUM_LAYERS=10\ncoded : MATRIX_BITS=5\n"
                    "decay : MUON_WD=0.1 EMBED_BITS=6\nclip : GRAD_CLIP_NORM=0\n")
    code, result = lab.call(plan, "--steps", 100, "--seeds", 4, "--bench-steps", 6)
    out, rows = capsys.readouterr().out, named(result)
    assert code == 0
    want = {"wide": (2, 50), "wider": (1.25, 80), "coded": (1, 100), "decay": (1, 100), "clip": (1.004, 100)}
    for name, (ratio, steps) in want.items():
        assert rows[name]["speed"]["ratio"] == pytest.approx(ratio) and rows[name]["time"]["iterations"] == steps
        assert rows[name]["time"]["change"]["mean"] == pytest.approx(1 / steps - 1 / 100, abs=1e-9), name
    assert all("not measured" in rows[name]["speed"]["how"] for name in ("coded", "decay"))
    assert rows["wide"]["speed"]["pairs"] == [[40, 80]] * 6
    bench = lab.calls("bench_calls")
    assert len(bench) == 3 and all(call[2:] == ["eager", 6] for call in bench)
    assert [tuple(side["NUM_LAYERS"] for side in call[:2]) for call in bench] == [("4", "8"), ("8", "10"), ("4", "4")]
    runs = [call[0] for call in lab.calls()]
    assert len(runs) == 6 + 2  # only wide and wider need another number of steps
    assert "| wide | `NUM_LAYERS=8` |" in out and "| x 2.000 ± 0.000 | 50 |" in out
    assert "tools/bench.py train --against" in out and "median ratio of 6 pairs of CPU time" in out
    # Measurements are kept as runs are.
    assert lab.call(plan, "--steps", 100, "--seeds", 4, "--bench-steps", 6)[0] == 0
    assert not lab.calls("bench_calls") and not lab.calls()
    assert lab.call(plan, "--steps", 100, "--seeds", 4, "--bench-steps", 7)[0] == 0
    assert len(lab.calls("bench_calls")) == 3


def test_equal_time_only(lab):
    plan = lab.plan("wide : NUM_LAYERS=8\nwider [vs wide] : NUM_LAYERS=10\n")
    code, result = lab.call(plan, "--steps", 100, "--seeds", 4, "--match", "time")
    assert code == 0 and sorted(call[0]["ITERATIONS"] for call in lab.calls()) == ["100", "100", "50", "80"]
    assert [row["name"] for row in result["rows"]] == ["wider", "wide"] and "steps" not in result["rows"][0]


def test_a_measurement_serves_every_data_set(lab):
    words = lab.plan("wide : NUM_LAYERS=8\n"), "--steps", 100, "--seeds", 4, "--match", "time"
    other = lab.folder / "other"
    other.mkdir()
    for path in lab.folder.glob("*.bin"):
        (other / path.name).write_bytes(path.read_bytes())
    assert lab.call(*words)[0] == 0 and len(lab.calls()) == 2 and len(lab.calls("bench_calls")) == 1
    assert lab.call(*words, "--base", f"DATA_PATH={other}")[0] == 0 and len(lab.calls()) == 2
    assert not lab.calls("bench_calls")


def test_failed_measurements_are_said_and_the_rest_goes_on(lab, capsys):
    plan = lab.plan("no smear : SMEAR_GATE=none\nthin : MLP_MULT=2\nwide : NUM_LAYERS=8\n")
    code, result = lab.call(plan, "--steps", 100, "--seeds", 4)
    rows = named(result)
    assert code == 1 and rows["wide"]["time"]["iterations"] == 50
    assert all(rows[name]["steps"]["change"] and rows[name]["time"]["change"] is None for name in ("no smear", "thin"))
    assert "no such machine (exit code 1)" in rows["no smear"]["notes"][0]
    assert "no pairs of mode eager" in rows["thin"]["notes"][0]
    assert "time per step is unknown: error: no such machine" in capsys.readouterr().out
    lab.bench.unlink()
    code, result = lab.call(lab.plan("new : NUM_LAYERS=6\n"), "--steps", 100, "--seeds", 4)
    assert code == 1 and "can't open file" in named(result)["new"]["notes"][0]


def test_a_run_over_the_limit_has_a_score_and_a_note(lab, capsys):
    """Exit code 3: it was scored. The table counts it and says so; the same command makes nothing again."""
    plan = lab.plan("large : SIZE_LIMIT=550\nfits : SIZE_LIMIT=600\n")
    for calls in (3, 0):
        code, result = lab.call(plan, "--steps", 100, "--seeds", 4, "--match", "steps")
        out, rows = "".join(capsys.readouterr()), named(result)
        assert code == 0 and result["failed"] == 0 and len(lab.calls()) == calls and rows["fits"]["notes"] == []
        assert rows["large"]["steps"]["bpb"]["mean"] == rows["fits"]["steps"]["bpb"]["mean"]
        assert rows["large"]["notes"] == ["equal steps, seed 4: over the limit: 600 bytes of 550, scored all the same"]
        assert "over the limit" in out
        assert calls == 0 or "BPB; over the limit" in out


def test_failed_and_invalid_runs_are_marked_and_not_counted(lab, capsys):
    plan = lab.plan("""\
        good : MATRIX_LR=0.02
        diverged : ADAM_EPS=0.5
        killed : ADAM_EPS=0.25
        invalid : ADAM_EPS=0.0625 MATRIX_LR=0.001
        silent : ADAM_EPS=0.03125
        """)
    code, result = lab.call(plan, "--steps", 100, "--seeds", "4,5", "--match", "steps", "--jobs", 2)
    out, rows = capsys.readouterr().out, named(result)
    assert code == 1 and result["failed"] == 6 and len(lab.calls()) == 12
    assert result["rows"][0]["name"] == "good" and rows["good"]["notes"] == []
    bad = ("diverged", "killed", "invalid", "silent")
    assert all(rows[name]["steps"]["change"] is None and rows[name]["steps"]["bpb"] is None for name in bad)
    assert rows["diverged"]["notes"] == [
        "equal steps, seed 4, 5: failed: error: the loss is not finite at step 3 (exit code 4)"]
    assert "step 1 (SIGKILL)" in rows["killed"]["notes"][0]
    assert "INVALID, 2.0" in rows["invalid"]["notes"][0] and "not counted: a reason" in rows["invalid"]["notes"][0]
    assert "without a score of these settings" in rows["silent"]["notes"][0]
    assert rows["invalid"]["runs"]["steps"][0]["valid"] == "no"
    line = next(line for line in out.splitlines() if line.startswith("| invalid"))
    assert "| - |" in line and "INVALID" in line
    # Invalid runs are finished; failed ones are tried again.
    assert lab.call(plan, "--steps", 100, "--seeds", "4,5", "--match", "steps")[0] == 1
    assert sorted(call[0]["ADAM_EPS"] for call in lab.calls()) == sorted(["0.5", "0.25", "0.03125"] * 2)
    # What failed may have been the reference, of one seed.
    (lab.folder / "base.env").write_text(lab.base.read_text() + "ADAM_EPS=0.5\n")
    code, result = lab.call(lab.plan("fine : ADAM_EPS=1\n"), "--steps", 9, "--seeds", "4", "--match", "steps")
    out = capsys.readouterr().out
    assert code == 1 and named(result)["fine"]["steps"]["change"] is None and named(result)["fine"]["steps"]["bpb"]
    assert "Base: - BPB.\nBase, equal steps, seed 4: failed: error: the loss is not finite" in out


def test_an_invalid_score_alone_is_no_failure(lab):
    assert lab.call(lab.plan("x : ADAM_EPS=0.0625\n"), "--steps", 9, "--seeds", "4", "--match", "steps")[0] == 0


def test_the_number_of_seeds_is_shown_where_some_are_missing():
    assert sweep.span(sweep.sample_statistics([1.0, 2.0]), [1, 2]) == "1.5000 (1.0000 .. 2.0000)"
    assert sweep.span(sweep.sample_statistics([1.0, 2.0]), [1, 2, 3], "+") == "+1.5000 (+1.0000 .. +2.0000), 2 of 3 seeds"
    assert sweep.span(sweep.sample_statistics([1.0]), [1]) == "1.0000" and sweep.span(None, [1]) == "-"


def test_finished_runs_are_used_again_and_only_those(lab, capsys):
    plan = lab.plan("a : MATRIX_LR=0.1\nb : MATRIX_LR=0.2\n")
    quick = ("--match", "steps", "--seeds")
    first = lab.call(plan, "--steps", 10, *quick, "4")[1]
    assert len(lab.calls()) == 3
    capsys.readouterr()
    code, again = lab.call(plan, "--steps", 10, *quick, "4")
    assert code == 0 and not lab.calls() and "3 of 3 runs are finished already" in capsys.readouterr().err
    assert named(again)["a"]["steps"] == named(first)["a"]["steps"] and named(again)["a"]["runs"]["steps"][0]["reused"]
    lab.call(plan, "--steps", 10, *quick, "4,5")  # another seed
    assert {call[0]["SEED"] for call in lab.calls()} == {"5"}
    lab.call(lab.plan("b : MATRIX_LR=0.2\nc : MATRIX_LR=0.3\nthe same : MATRIX_LR=0.30\n"), "--steps", 10, *quick, "4")
    assert [call[0]["MATRIX_LR"] for call in lab.calls()] == ["0.3"]  # another row, and other names
    lab.call(plan, "--steps", 11, *quick, "4")
    assert len(lab.calls()) == 3
    write_shard(lab.folder / "fineweb_train_000001.bin", [1] * 50)  # other data
    lab.call(plan, "--steps", 11, *quick, "4")
    assert len(lab.calls()) == 3
    lab.trainer.write_text(TRAINER + "# other code\n")
    lab.call(plan, "--steps", 11, *quick, "4")
    assert len(lab.calls()) == 3
    summaries = sorted((lab.folder / "out/runs").glob("*/summary.json"), key=lambda path: path.stat().st_mtime)[-3:]
    summaries[0].write_text("{")  # a damaged summary is none
    changed = json.loads(summaries[1].read_text())
    summaries[1].write_text(json.dumps({**changed, "settings": changed["settings"] + " MUON_WD=1"}))
    assert lab.call(plan, "--steps", 11, *quick, "4")[0] == 0 and len(lab.calls()) == 2


def test_jobs_share_the_cores(lab, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(sweep, "cores", lambda: 8)
    code, result = lab.call("MATRIX_LR=1,2,3,4", "--steps", 5, "--seeds", "3", "--jobs", 3)
    assert code == 0 and result["threads"] == "2" and {call[1] for call in lab.calls()} == {"2"}


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_gone_on_with(lab, number):
    plan = lab.plan("quick : MATRIX_LR=0.1\nwaits : ADAM_EPS=0.125\n")
    words = [str(plan), "--base", f"@{lab.base}", "--out", str(lab.folder / "out"), "--steps", "5", "--seeds", "3",
             "--match", "steps"]
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import sweep; from pathlib import Path\n"
            "sys.exit(sweep.main(sys.argv[3:], trainer=Path(sys.argv[2])))")
    command = [sys.executable, "-c", code, str(REPO / "tools"), str(lab.trainer), *words]
    with Started(command) as run:
        wait_for((lab.folder / "waiting").exists)
        assert lab.call(plan, "--steps", 5)[0] == 2  # one sweep a folder
        run.signal(number)
        done = run.finish()
    assert done.returncode == 128 + number and done.stdout == ""
    assert done.stderr.splitlines()[-1] == "interrupted: the same command goes on from here"
    assert list((lab.folder / "out/runs").glob("*/checkpoint"))  # the run was asked to end, not killed
    assert len(lab.calls()) == 3
    (lab.folder / "go").touch()
    code, result = lab.call(plan, "--steps", 5, "--seeds", 3, "--match", "steps")
    assert code == 0 and [call[0].get("ADAM_EPS") for call in lab.calls()] == ["0.125"] and len(result["rows"]) == 2


def test_second_signal_kills(lab):
    lab.trainer.write_text(TRAINER.replace("signal.signal(signal.SIGINT, stopped)",
                                           "signal.signal(signal.SIGINT, signal.SIG_IGN)"))
    with sweep.Processes({**os.environ, "OMP_NUM_THREADS": "1"}, 2) as processes:
        words = [sys.executable, str(lab.trainer), f"OUT_DIR={lab.folder}", "ADAM_EPS=0.125", "ITERATIONS=1"]
        running = processes.run([(words, lab.folder / "console.txt")])
        before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.5, 0.3)
        try:
            with pytest.raises(sweep.Interrupted):
                next(running)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert len(processes.caught) >= 2


def test_a_run_that_was_left_behind_keeps_other_sweeps_out(tmp_path):
    with sweep.locked(tmp_path) as lock:
        child = sweep.Processes(dict(os.environ), lock)._start(["sleep", "60"], tmp_path / "console.txt").process
    with pytest.raises(sweep.BadInput, match="is in use by another sweep"), sweep.locked(tmp_path):
        pass
    child.kill()
    child.wait()
    with sweep.locked(tmp_path):
        pass


def test_duration():
    assert (sweep.duration(0.2), sweep.duration(125), sweep.duration(3700)) == ("0 min 0 s", "2 min 5 s", "1 h 1 min")


def test_help_and_no_arguments():
    done = subprocess.run([sys.executable, str(REPO / "tools/sweep.py"), "--help"], env=clean_env(), text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0 and "--match" in done.stdout and "[vs SWA]" in done.stdout


# ---- the real thing -------------------------------------------------------------------------------------------------


def test_real_runs(toy, tmp_path, capsys, monkeypatch):
    """Two techniques by the real trainer: the scores in the table are those in the summaries."""
    for name in sweep.FIELDS:
        monkeypatch.delenv(name, raising=False)
    base = tmp_path / "base.env"
    base.write_text("\n".join(map(shlex.quote, toy)))
    bench = tmp_path / "bench.py"
    bench.write_text(BENCH)
    plan = tmp_path / "plan.txt"
    plan.write_text("one layer less : NUM_LAYERS=2 VE_LAYERS=1\n")
    words = [str(plan), "--base", f"@{base}", "DEVICE=cpu", "--steps", "2", "--seeds", "3", "--out",
             str(tmp_path / "out"), "--json", str(tmp_path / "result.json"), "COMPRESSOR=zlib"]
    assert sweep.main(words, bench=bench) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    [row] = result["rows"]
    scores = {}
    for path in (tmp_path / "out/runs").glob("*/summary.json"):
        summary = json.loads(path.read_text())
        run = Settings.parse(shlex.split(summary["settings"]))
        assert (summary["valid"], run.seed, run.compressor) == ("yes", 3, "zlib")
        scores[run.num_layers, summary["steps"]] = summary["val_bpb"]
    assert scores.keys() == {(4, 2), (2, 2), (2, 4)}  # half the layers: half the time, twice the steps
    assert row["steps"]["change"]["mean"] == scores[2, 2] - scores[4, 2]
    assert row["time"]["change"]["mean"] == scores[2, 4] - scores[4, 2]
    capsys.readouterr()
    assert sweep.main(words, bench=bench) == 0 and "3 of 3 runs are finished already" in capsys.readouterr().err
