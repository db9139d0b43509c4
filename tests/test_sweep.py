"""tools/sweep.py: plans and grids, the arithmetic of the table, what is run again and what is not, and one real sweep.

Most tests use a stub in place of the trainer: the settings that it is given decide what becomes of its run.
"""

import json
import math
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
from sweeping import BENCH, TRAINER, Bench, named, stub_score
from toy import write_shard

import sweep
import train_gpt as tg
from sweeps import outcome, progress, timing
from sweeps import plan as plans
from train_gpt import Settings


@pytest.fixture
def lab(tmp_path, monkeypatch):
    for name in plans.FIELDS:
        monkeypatch.delenv(name, raising=False)
    return Bench(tmp_path)


# ---- plans and grids ------------------------------------------------------------------------------------------------


def test_plan_lines(tmp_path):
    path = tmp_path / "plan.txt"
    path.write_text("# a heading\n\nno smear (#65) : SMEAR_GATE=none XSA_LAST_N=0   # why: it may help\n"
                    "  SWA:AVERAGE=swa\ndense [vs SWA] : AVERAGE=swa SWA_EVERY=10\n"
                    "home : DATA_PATH='a folder/x:y'\n")
    rows, complaints = plans.read_plan(path)
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
    found, complaints = plans.read_plan(path)
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
@given(st.dictionaries(st.sampled_from(sorted(plans.FIELDS)), st.lists(
    st.integers(0, 99), min_size=1, max_size=4, unique=True), max_size=4))
def test_grid_is_the_product(axes):
    bars = {name: "|" if plans.FIELDS[name].type in tg.LISTS else "," for name in axes}
    words = [f"{name}={bars[name].join(map(str, values))}" for name, values in axes.items()]
    found, base, complaints = plans.read_grid(words)
    rows = plans.points(found)
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
    assert plans.FIELDS[name].type is kind
    assert plans.values_of(f"{name}={first}|{second}") == [first, second]
    assert plans.values_of(f"{name}={first}") == [first]
    for value in (first, second):
        tg.parse_value(plans.FIELDS[name], value)


def test_other_values_are_divided_by_a_comma():
    assert plans.values_of("VE_LAYERS=2,3|3|") == ["2,3", "3", ""]
    assert plans.values_of("MATRIX_LR=1,2,1") == ["1", "2"]
    assert len(plans.values_of("@a,b")) == 1


# ---- arithmetic -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9))
def test_sample_statistics_are_those_of_numpy(values):
    found = outcome.sample_statistics(values)
    assert found["mean"] == pytest.approx(np.mean(values), abs=1e-12)
    assert (found["min"], found["max"], found["count"]) == (np.min(values), np.max(values), len(values))
    if len(values) > 1:
        assert found["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    else:
        assert found["std"] is None
    assert outcome.sample_statistics([]) is None


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 9), st.floats(-9, 9)), st.dictionaries(st.integers(0, 9), st.floats(-9, 9)))
def test_differences_are_paired_by_seed(one, other):
    both = [seed for seed in range(10) if seed in one and seed in other]
    assert outcome.paired(one, other) == {seed: one[seed] - other[seed] for seed in both}


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-9, 9), max_size=6), max_size=6))
def test_the_pooled_deviation_is_that_of_the_residuals(samples):
    """By numpy, from the residuals about the means of the samples."""
    residuals = np.concatenate([np.subtract(values, np.mean(values)) for values in samples if values] or [[]])
    degrees = len(residuals) - sum(bool(values) for values in samples)
    found = outcome.pooled_deviation(samples)
    assert (found is None) == (degrees < 1)
    if degrees >= 1:
        assert found == pytest.approx(np.sqrt(np.sum(residuals**2) / degrees), abs=1e-9)


def test_about_one_row_in_twenty_of_nothing_is_called_clear():
    """Rows that change nothing but the noise of the seeds; two seeds each, whose own spread says nothing."""
    rng = np.random.default_rng(0)
    clear = 0
    for _ in range(200):
        rows = [{"steps": {"changes": dict(enumerate(rng.normal(0, 0.003, 2)))}} for _ in range(30)]
        for row in rows:
            row["steps"]["change"] = outcome.sample_statistics(list(row["steps"]["changes"].values()))
        outcome.judge(rows, "steps")
        clear += sum(row["steps"]["change"]["is_clear"] for row in rows)
    assert 0.03 < clear / 6000 < 0.07


@pytest.mark.parametrize("ratio, is_clear, steps", [
    (1.25, True, 160), (0.8, True, 250), (1.009, True, 198), (1.0, True, 200), (1e6, True, 1), (1.25, False, 200)])
def test_steps_in_equal_time(ratio, is_clear, steps):
    assert timing.steps_in_equal_time(200, timing.Speed(ratio, "measured", 0.0, is_clear)) == steps


def work_of(*words):
    return Settings.parse([*words, "COMPRESSOR=zlib"])


def test_late_qat_is_no_same_work():
    """Its settings stand among those of packing, and what it rounds to does, too; its share depends on the warmdown."""
    plain, rounded = work_of(), work_of("LATE_QAT_THRESHOLD=0.2")
    assert not timing.same_work(rounded, plain) and not timing.same_work(plain, rounded)
    assert timing.same_work(work_of("MATRIX_BITS=5"), plain)
    assert not timing.same_work(work_of("LATE_QAT_THRESHOLD=0.2", "MATRIX_BITS=5"), rounded)
    assert not timing.same_work(work_of("LATE_QAT_THRESHOLD=0.2", "WARMDOWN_FRAC=0.4"), rounded)
    assert timing.same_work(work_of("WARMDOWN_FRAC=0.4", "MATRIX_LR=0.1", "TTT=full", "COMPRESSOR=lzma"), plain)
    for word in ("NUM_LAYERS=12", "GRAD_CLIP_NORM=1", "MUON_BACKEND_STEPS=3", "AVERAGE=swa", "TRAIN_SEQ_LEN=512"):
        assert not timing.same_work(work_of(word), plain), word


def test_groups_of_settings_are_settings():
    assert timing.SAME_WORK < plans.FIELDS.keys() and plans.OWNED.keys() < plans.FIELDS.keys()


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
    values = [list(row["steps"]["changes"].values()) for row in result["rows"]]
    error = np.sqrt(np.mean([np.var(changes, ddof=1) for changes in values]) / 3)  # of three rows alike
    assert line.startswith(f"| faster [vs fast] | `MATRIX_LR=0.2 EMBED_BITS=6` | {mean:+.4f} ± {error:.4f} * |")
    assert line.endswith("| -0.4% | yes |")  # 506 bytes, not 508
    assert "small-scale" in out and "8xH100" in out and "7, 8, 9" in out and "100 training tokens" in out
    assert f"python tools/sweep.py {plan} MUON_WD=0.1 --steps 50" in out and "equal time" not in out
    assert "102,400 tokens" in out and "1024.00 epochs" in out and f"torch {result['torch']}" in out


def test_grid_prints_absolute_scores(lab, capsys):
    code, result = lab.call("MATRIX_LR=0.03,0.02", "EMBED_BITS=6,8", "MUON_WD=0.2", "--steps", 5, "--seeds", "3")
    out = capsys.readouterr().out
    assert code == 0 and len(lab.calls()) == 4 and result["base"]["runs"] == [] and not lab.calls("bench_calls")
    assert "| MATRIX_LR | EMBED_BITS | BPB at equal steps | from the best at equal steps | model bytes | valid |" in out and "seed 3 alone" in out
    assert [row["changes"][0] for row in result["rows"]] == ["MATRIX_LR=0.02"] * 2 + ["MATRIX_LR=0.03"] * 2
    for row in result["rows"]:
        rate = float(row["changes"][0].partition("=")[2])
        assert row["steps"]["bpb"]["mean"] == pytest.approx(stub_score(rate, 3, 5))
        assert row["steps"]["change"]["mean"] == pytest.approx(stub_score(rate, 3, 5) - stub_score(0.02, 3, 5))
    assert f"| 0.02 | 6 | {stub_score(0.02, 3, 5):.4f} | +0.0000 | 506 | yes |" in out


def test_equal_time(lab, capsys):
    plan = lab.plan("wide : NUM_LAYERS=8\nwider [vs wide] : NUM_LAYERS=10\ncoded : MATRIX_BITS=5\n"
                    "decay : MUON_WD=0.1 EMBED_BITS=6\nclip : GRAD_CLIP_NORM=0\n")
    code, result = lab.call(plan, "--steps", 100, "--seeds", 4, "--bench-steps", 6, "--bench-blocks", 3)
    out, rows = capsys.readouterr().out, named(result)
    assert code == 0
    want = {"wide": (2, 50), "wider": (1.25, 80), "coded": (1, 100), "decay": (1, 100), "clip": (1.004, 100)}  # 99.6, rounded
    for name, (ratio, steps) in want.items():
        assert rows[name]["speed"]["ratio"] == pytest.approx(ratio) and rows[name]["time"]["iterations"] == steps
        assert rows[name]["time"]["change"]["mean"] == pytest.approx(1 / steps - 1 / 100, abs=1e-9), name
    assert all("not measured" in rows[name]["speed"]["how"] for name in ("coded", "decay"))
    assert rows["wide"]["speed"]["blocks"] == [[[40, 80]] * 6] * 3
    bench = lab.calls("bench_calls")
    assert all(call[2:] == ["eager", 6] for call in bench)
    layers = [tuple(side["NUM_LAYERS"] for side in call[:2]) for call in bench]  # the sides change places
    assert layers == [("4", "4")] * 3 + [("4", "8"), ("8", "4"), ("4", "8"), ("8", "10"), ("10", "8"), ("8", "10")] \
        + [("4", "4")] * 3
    assert rows["clip"]["speed"]["is_clear"] and result["noise_floor"]["ratio"] == 1
    runs = [call[0] for call in lab.calls()]
    assert len(runs) == 6 + 2  # only wide and wider need another number of steps
    assert "| wide | `NUM_LAYERS=8` |" in out and "| x 2.000 ± 0.000 * | 50 |" in out
    assert "tools/bench.py train --against" in out and "CPU time, in 3 processes of 6 pairs each" in out
    assert "the base against itself takes x 1.000" in out
    # Measurements are kept as runs are.
    assert lab.call(plan, "--steps", 100, "--seeds", 4, "--bench-steps", 6, "--bench-blocks", 3)[0] == 0
    assert not lab.calls("bench_calls") and not lab.calls()
    assert lab.call(plan, "--steps", 100, "--seeds", 4, "--bench-steps", 7, "--bench-blocks", 1)[0] == 0
    assert len(lab.calls("bench_calls")) == 4


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
    assert lab.call(*words)[0] == 0 and len(lab.calls()) == 2 and len(lab.calls("bench_calls")) == 10
    assert lab.call(*words, "--base", f"DATA_PATH={other}")[0] == 0 and len(lab.calls()) == 2
    assert not lab.calls("bench_calls")


def test_other_code_is_measured_anew(lab, monkeypatch):
    """Steps of another trainer have other times, though its rows are the same."""
    monkeypatch.setattr(timing, "ROOT", lab.folder)
    words = lab.plan("wide : NUM_LAYERS=8\n"), "--steps", 100, "--seeds", 4, "--match", "time", "--bench-blocks", 1
    for code, calls in (("one", 2), ("one", 0), ("another", 2)):
        (lab.folder / "train_gpt.py").write_text(code)
        assert lab.call(*words)[0] == 0 and len(lab.calls("bench_calls")) == calls, code


def test_failed_measurements_are_said_and_the_rest_goes_on(lab, capsys):
    plan = lab.plan("no smear : SMEAR_GATE=none\nthin : MLP_MULT=2\nwide : NUM_LAYERS=8\n")
    code, result = lab.call(plan, "--steps", 100, "--seeds", 4)
    rows = named(result)
    assert code == 1 and rows["wide"]["time"]["iterations"] == 50
    assert all(rows[name]["steps"]["change"] and rows[name]["time"]["change"] is None for name in ("no smear", "thin"))
    assert "no such machine (exit code 1)" in rows["no smear"]["notes"][0]
    assert "bench.py gave no pairs" in rows["thin"]["notes"][0]
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
    assert "| - |" in line and "| no |" in line and "INVALID" not in line and "- [3] equal steps, seed 4: INVALID" in out
    # Invalid runs are finished. What failed would fail again, but for what was killed.
    assert lab.call(plan, "--steps", 100, "--seeds", "4,5", "--match", "steps")[0] == 1
    assert [call[0]["ADAM_EPS"] for call in lab.calls()] == ["0.25"] * 2
    code, again = lab.call(plan, "--steps", 100, "--seeds", "4,5", "--match", "steps", "--retry")
    assert code == 1 and named(again)["diverged"]["notes"] == rows["diverged"]["notes"]
    assert sorted(call[0]["ADAM_EPS"] for call in lab.calls()) == sorted(["0.5", "0.25", "0.03125"] * 2)
    # What failed may have been the reference, of one seed.
    (lab.folder / "base.env").write_text(lab.base.read_text() + "ADAM_EPS=0.5\n")
    code, result = lab.call(lab.plan("fine : ADAM_EPS=1\n"), "--steps", 9, "--seeds", "4", "--match", "steps")
    out = capsys.readouterr().out
    assert code == 1 and named(result)["fine"]["steps"]["change"] is None and named(result)["fine"]["steps"]["bpb"]
    assert "Base: - BPB.\nBase, equal steps, seed 4: failed: error: the loss is not finite" in out


def test_an_invalid_score_alone_is_no_failure(lab):
    assert lab.call(lab.plan("x : ADAM_EPS=0.0625\n"), "--steps", 9, "--seeds", "4", "--match", "steps")[0] == 0


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
    monkeypatch.setattr(sweep, "machine", lambda: {"cpu": "a CPU", "cores": 8})
    code, result = lab.call("MATRIX_LR=1,2,3,4", "--steps", 5, "--seeds", "3", "--jobs", 3)
    assert code == 0 and result["threads"] == "2" and {call[1] for call in lab.calls()} == {"2"}


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def started(lab, plan, *words):
    """The command as a process of its own, with the stub as its trainer."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import sweep; from pathlib import Path\n"
            "sys.exit(sweep.main(sys.argv[3:], trainer=Path(sys.argv[2])))")
    words = [str(plan), "--base", f"@{lab.base}", "--out", str(lab.folder / "out"), "--steps", "5", "--seeds", "3",
             "--match", "steps", *words]
    return Started([sys.executable, "-c", code, str(REPO / "tools"), str(lab.trainer), *words])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_gone_on_with(lab, number):
    plan = lab.plan("quick : MATRIX_LR=0.1\nwaits : ADAM_EPS=0.125\n")
    with started(lab, plan) as run:
        wait_for((lab.folder / "waiting").exists)
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
    with started(lab, lab.plan("waits : ADAM_EPS=0.125\n")) as run:
        wait_for((lab.folder / "waiting").exists)
        run.signal(signal.SIGINT)
        time.sleep(0.5)
        run.signal(signal.SIGINT)
        assert run.finish().returncode == 130


def test_two_commands_share_the_work(lab):
    """The second makes what the first does not, says who makes the rest, and with --wait waits for it."""
    plan = lab.plan("waits : ADAM_EPS=0.125\nquick : MATRIX_LR=0.1\n")
    quick = "--steps", 5, "--seeds", 3, "--match", "steps"
    with started(lab, plan) as first:
        wait_for((lab.folder / "waiting").exists)
        code, result = lab.call(plan, *quick)
        assert code == 1 and named(result)["quick"]["steps"]["bpb"] and named(result)["waits"]["steps"]["bpb"] is None
        with started(lab, plan, "--wait") as second:
            time.sleep(1)
            (lab.folder / "go").touch()
            done = second.finish()
        assert done.returncode == 0 and first.finish().returncode == 0 and "| waits |" in done.stdout
    assert len(lab.calls()) == 3


def test_after_kill_9_the_process_that_is_left_is_named(lab, capsys):
    """Its run goes on, and keeps its folder: a lock as the trainer holds it."""
    lab.trainer.write_text("import fcntl, os, platform\n" + TRAINER.replace("ranks = ", textwrap.dedent("""\
        lock = open(out / "run.lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(f"process {os.getpid()} on {platform.node()}", end="", file=lock, flush=True)
        ranks = """), 1))
    plan = lab.plan("waits : ADAM_EPS=0.125\n")
    with started(lab, plan) as run:
        wait_for((lab.folder / "waiting").exists)
        run.process.kill()
        run.process.wait()
    (lock,) = [path for path in (lab.folder / "out/runs").glob("*/run.lock") if "process" in path.read_text()
               and not (path.parent / "summary.json").exists()]
    code, _ = lab.call(plan, "--steps", 5, "--seeds", 3, "--match", "steps")
    assert code == 1 and f"{lock.parent} is made by {lock.read_text()}: wait for it with --wait" in capsys.readouterr().err
    (lab.folder / "go").touch()
    code, result = lab.call(plan, "--steps", 5, "--seeds", 3, "--match", "steps", "--wait")
    assert code == 0 and named(result)["waits"]["steps"]["change"] and len(lab.calls()) == 2


def test_duration():
    assert (progress.duration(0.2), progress.duration(125), progress.duration(3700)) == ("0 min 0 s", "2 min 5 s", "1 h 1 min")


def test_help_and_no_arguments():
    done = subprocess.run([sys.executable, str(REPO / "tools/sweep.py"), "--help"], env=clean_env(), text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0 and "--match" in done.stdout and "[vs SWA]" in done.stdout


# ---- the real thing -------------------------------------------------------------------------------------------------


def test_real_runs(toy, tmp_path, capsys, monkeypatch):
    """Two techniques by the real trainer: the scores in the table are those in the summaries."""
    for name in plans.FIELDS:
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
