"""tools/report.py: the table against what the run wrote, the compressors against their own libraries, and bad input."""

import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

import brotli
import numpy as np
import pytest
from process import REPO, clean_env, run_trainer
from toy import toy_documents

import report


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """Folder of a finished run; tests that write into it take a copy."""
    out = tmp_path_factory.mktemp("report") / "run"
    done = run_trainer([*toy, f"OUT_DIR={out}", "ITERATIONS=12", "TRAIN_LOG_EVERY=1", "VAL_LOSS_EVERY=4"])
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def call(*args):
    return subprocess.run([sys.executable, str(REPO / "tools/report.py"), *map(str, args)], env=clean_env(), timeout=60,
                          text=True, capture_output=True, stdin=subprocess.DEVNULL, check=False)


def facts(run, capsys):
    assert report.main([str(run), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def value(out, label):
    """What the table shows behind this label."""
    return next(line[len(label) + 2:].split()[0] for line in out.splitlines() if line.startswith(f"  {label} "))


def test_table_shows_what_the_run_wrote(run):
    done = call(run)
    assert done.returncode == 0 and done.stderr == ""
    out, summary = done.stdout, json.loads((run / "summary.json").read_text())
    assert out.startswith(f"Run {run}: finished\n")
    assert value(out, "final, of the packed model") == f"{summary['val_bpb']:.4f}"
    for label, key in (("code", "code_bytes"), ("model", "model_bytes"), ("total", "total_bytes"), ("steps", "steps"),
                       ("parameters", "params"), ("tokens", "train_tokens"), ("validation text, bytes", "val_bytes")):
        assert value(out, label) == f"{summary[key]:,}"
    assert value(out, "margin") == f"{16_000_000 - summary['total_bytes']:,}"
    assert value(out, "training") == f"{summary['train_seconds']:,.1f}"
    assert value(out, "valid") == "yes" and value(out, "record-eligible") == "no"
    assert value(out, "self-tested") == "no" and "left out: SELFTEST=0" in out
    assert all(reason in out for reason in summary["eligible_reasons"])
    assert "Traceback" not in out and "None" not in out and "nan" not in out.lower().split()


def test_compressors_agree_with_their_libraries(run, capsys):
    """The text that is compressed is the text of the validation documents."""
    data = "".join(toy_documents()[:20]).encode()
    found = facts(run, capsys)["compressors"]
    scored = json.loads((run / "summary.json").read_text())["val_bytes"]
    assert found["text_bytes"] == len(data) == scored and found["whole"]
    assert found["xz_bpb"] == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    assert found["brotli_bpb"] == 8 * len(brotli.compress(data, quality=11, lgwin=24)) / len(data)


def test_compressors_run_once(run, capsys, monkeypatch):
    first = facts(run, capsys)["compressors"]
    monkeypatch.setattr(report, "validation_text", lambda *_: pytest.fail("compressed again"))
    assert facts(run, capsys)["compressors"] == first
    (run / "compressors.json").write_text("{}")  # not what this tool wrote: not trusted
    with pytest.raises(pytest.fail.Exception):
        report.main([str(run)])


def test_long_text_is_cut_and_said(run, capsys, monkeypatch):
    monkeypatch.setattr(report, "MOST_TEXT", 1000)
    assert report.main([str(run)]) == 0
    assert "only the first 1,000 bytes" in capsys.readouterr().out
    data = "".join(toy_documents()[:20]).encode()[:1000]
    bits = 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    assert facts(run, capsys)["compressors"]["xz_bpb"] == bits / 1000


def test_val_tokens_cuts_the_text_too(toy, tmp_path, capsys):
    done = run_trainer([*toy, f"OUT_DIR={tmp_path}/run", "ITERATIONS=1", "VAL_TOKENS=500"])
    assert done.returncode == 0, done.stderr
    found = facts(tmp_path / "run", capsys)
    assert found["val_tokens"] == 500 and abs(found["compressors"]["text_bytes"] - found["val_bytes"]) <= 3


def test_data_that_changed_is_not_compared(run, toy, capsys, tmp_path):
    folder = Path(shutil.copytree(toy[0].removeprefix("DATA_PATH="), tmp_path / "data"))
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace(toy[0], f"DATA_PATH={folder}"))
    shard = folder / "fineweb_val_000000.bin"
    whole = np.fromfile(shard, "<u2")
    whole[:-100].tofile(shard)
    assert "no longer those of the run" in facts(run, capsys)["compressors"]["note"]
    (folder / "tokenizer.model").write_bytes(b"x")
    assert "no longer the tokenizer" in facts(run, capsys)["compressors"]["note"]
    shutil.rmtree(folder)
    assert report.main([str(run)]) == 0
    assert "xz and brotli (validation shards of the run not found" in capsys.readouterr().out


def test_cost_of_packing_needs_like_windows(run, toy, capsys, tmp_path):
    done = run_trainer([*toy, f"OUT_DIR={tmp_path}/contiguous", "ITERATIONS=3", "EVAL_STRIDE=0"])
    assert done.returncode == 0, done.stderr
    found = facts(tmp_path / "contiguous", capsys)
    assert found["packing_cost_bpb"] == pytest.approx(found["final_bpb"] - found["before_bpb"])
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if not any(event["event"] == "eval" and "contiguous" in event["name"] for event in events):
        assert facts(run, capsys)["packing_cost_bpb"] is None  # a sliding score minus a contiguous one would be no cost


# ---- runs that did not end ------------------------------------------------------------------------------------------


def cut(run, event, keep=True):
    """The run as it was when it had just written (or was about to write) its last event of this kind."""
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    at = max(i for i, line in enumerate(lines) if json.loads(line)["event"] == event)
    (run / "metrics.jsonl").write_text("".join(lines[: at + keep]))


def test_every_moment_of_a_run_can_be_shown(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "summary.json").unlink()
    for count in range(1, len(lines) + 1):
        (run / "metrics.jsonl").write_text("".join(lines[:count]))
        out = "\n".join(report.table(report.gather(run)))
        assert "not finished" in out and "Missing: " in out and "None" not in out


def test_interrupted_while_training(run, capsys):
    cut(run, "train")
    with open(run / "metrics.jsonl", "a") as file:
        print(json.dumps({"event": "checkpoint", "step": 13, "file": "checkpoint_0000013.pt", "bytes": 5}), file=file)
        file.write('{"event": "tra')  # kill -9 in the middle of a line
    assert report.main([str(run)]) == 0
    out = capsys.readouterr().out
    assert "not finished, last known step 13" in out and f"RESUME=auto OUT_DIR={run}" in out and "1 damaged line" in out
    assert value(out, "before packing") and "final, of the packed model" in out.split("Missing: ")[1]
    assert value(out, "xz -9e")  # there is a validation score to compare it with


def test_interrupted_before_any_score(run, capsys):
    cut(run, "warmup")
    assert report.main([str(run)]) == 0
    assert "xz and brotli (no score yet" in capsys.readouterr().out


def test_steps_that_a_resumed_run_wrote_again_count_once():
    events = [dict(event="train", step=step, train_time_ms=ms, train_loss=loss)
              for step, ms, loss in ((1, 10, 9.0), (2, 20, 8.0), (3, 30, 7.0), (2, 25, 6.0), (3, 35, 5.0))]
    assert report.curve(events, "train", "train_loss") == [(0.01, 9.0), (0.025, 6.0), (0.035, 5.0)]


# ---- output for programs and eyes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot(run, capsys, tmp_path, suffix, magic):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"curve.{suffix}"
    assert report.main([str(run), "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(magic)


def test_the_axis_leaves_the_first_steps_out_and_shows_every_level():
    points = [(1, 9.0), (2, 8.0), (50, 3.0), (100, 2.0)]
    bottom, top = report.loss_limits(points, 100, [2.5])
    assert bottom < 2.0 and 3.0 < top < 8.0
    bottom, top = report.loss_limits(points, 100, [5.0, 1.0])
    assert bottom < 1.0 and 5.0 < top < 8.0
    bottom, top = report.loss_limits(points[:1], 100)  # nothing but first steps: the last of them
    assert bottom < 9.0 < top
    assert report.loss_limits([], 100, [1.0])[0] < 1.0


@pytest.mark.parametrize("event", ["train", "val"])
def test_plot_of_a_run_that_has_only_begun(run, tmp_path, event):
    """One point is a plot, too."""
    pytest.importorskip("matplotlib")
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "summary.json").unlink()
    first = next(row for row in events if row["event"] == event)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*events[:2], first)))
    assert report.main([str(run), "--plot", str(tmp_path / "curve.svg")]) == 0


def test_the_demo_has_twelve_validation_points():
    """In the 811 steps that two slow cores make in its three minutes."""
    from train_gpt import Settings

    assert 811 // Settings.parse([f"@{REPO}/records/small.env"]).val_loss_every >= 12


def test_curves_are_those_of_the_run(run, capsys):
    found = facts(run, capsys)
    assert [len(found["train_curve"]), len(found["val_curve"])] == [12, 3]
    assert found["val_curve"][0][1] > found["val_curve"][-1][1] > 0


def test_fast_and_without_torch(run):
    code = ("import sys; sys.path.insert(0, 'tools'); import report; "
            f"report.main([{str(run)!r}]); print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, text=True, capture_output=True, timeout=9, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_reader_that_stops_early(run):
    done = subprocess.run(f"'{sys.executable}' tools/report.py '{run}' | head -n 1", shell=True, cwd=REPO, text=True,
                          capture_output=True, timeout=60, check=True)
    assert done.stdout.startswith("Run ") and done.stderr == ""


def test_defaults_are_those_of_the_trainer():
    from train_gpt import Settings

    for name, default in report.DEFAULT.items():
        assert str(getattr(Settings(), name.lower())) == default


def test_runs_side_by_side(run, toy, tmp_path, capsys):
    other = tmp_path / "other"
    done = run_trainer([*toy, f"OUT_DIR={other}", "ITERATIONS=9", "TRAIN_LOG_EVERY=1", "VAL_LOSS_EVERY=4", "MATRIX_LR=0.03"])
    assert done.returncode == 0, done.stderr
    assert report.main([str(run), str(other)]) == 0
    out = capsys.readouterr().out
    cells = {line.split("  ")[1]: line.split()[-2:] for line in out.splitlines() if line.startswith("  ")}
    assert cells["Run"] == ["run", "other"]
    differ = out.partition("Results")[0].partition("Settings that differ")[2]
    assert [line.split()[0] for line in differ.splitlines() if line] == ["ITERATIONS", "MATRIX_LR"]
    assert cells["ITERATIONS"] == ["12", "9"] and cells["MATRIX_LR"] == ["default", "0.03"]
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (run, other))
    assert cells["final, of the packed model"] == [f"{first['val_bpb']:.4f}", f"{second['val_bpb']:.4f}"]
    assert cells["difference to the first"] == ["+0.0000", f"{second['val_bpb'] - first['val_bpb']:+.4f}"]
    assert cells["bytes in total"] == [f"{first['total_bytes']:,}", f"{second['total_bytes']:,}"]
    assert cells["valid"] == ["yes", "yes"] and "do not compare" not in out
    assert report.main([str(run), str(other), "--json"]) == 0
    assert [facts["steps"] for facts in json.loads(capsys.readouterr().out)] == [12, 9]
    assert "give one RUN_DIR" in one_error(capsys, run, other, "--plot", tmp_path / "x.svg")
    (other / "summary.json").write_text(json.dumps(second | {"val_bytes": 1}))
    assert report.main([str(run), str(other)]) == 0
    assert "do not compare" in capsys.readouterr().out


# ---- bad input ------------------------------------------------------------------------------------------------------


def one_error(capsys, *args):
    assert report.main([*map(str, args)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("content", [
    b"", b"\n\n", b"\xff\xfe\x00garbage", b"[1, 2]\n", b'{"no": "event"}\n', b'"event"\n', b"[" * 100_000])
def test_metrics_that_are_none(tmp_path, capsys, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert "metrics.jsonl" in one_error(capsys, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_summary_that_is_none(run, capsys, content):
    (run / "summary.json").write_text(content)
    assert "summary.json" in one_error(capsys, run)


@pytest.mark.parametrize("wrong", [None, "text", [], {}, float("nan"), True])
def test_values_of_wrong_type_are_not_shown(run, capsys, wrong):
    keep = ("valid", "eligible")
    summary = {key: wrong for key in json.loads((run / "summary.json").read_text()) if key not in keep}
    (run / "summary.json").write_text(json.dumps(summary))
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [{key: value if key == "event" else wrong for key, value in event.items()} for event in events]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, events)))
    assert report.main([str(run)]) == 0
    assert report.main([str(run), "--json"]) == 0
    capsys.readouterr()


def test_other_bad_input(run, capsys, tmp_path):
    assert "give the folder of a run" in one_error(capsys, tmp_path / "nothing")
    assert one_error(capsys, run / "train.log")
    assert ".png or .svg" in one_error(capsys, run, "--plot", tmp_path / "x.pdf")
    assert "cannot be written" in one_error(capsys, run, "--plot", tmp_path / "no/x.png")
    assert "no training or validation lines" in one_error(capsys, just_begun(run), "--plot", tmp_path / "x.png")
    done = call()
    assert done.returncode == 2 and "Traceback" not in done.stderr


def just_begun(run):
    cut(run, "settings")
    return run
