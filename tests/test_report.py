"""tools/report.py: table, pictures and exports against what the run wrote, the compressors against their own libraries,
and bad input. The page in a browser is tests/test_page.py.
"""

import contextlib
import csv
import fcntl
import json
import lzma
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import brotli
import numpy as np
import pytest
from metrics import made_up_run
from process import REPO, clean_env, run_trainer
from toy import toy_documents

import report
from reports import compressors, panels, reading
from reports import facts as facts_module


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
    monkeypatch.setattr(compressors, "validation_text", lambda *_: pytest.fail("compressed again"))
    assert facts(run, capsys)["compressors"] == first
    (run / "compressors.json").write_text("{}")  # not what this tool wrote: not trusted
    with pytest.raises(pytest.fail.Exception):
        report.main([str(run)])


def test_long_text_is_cut_and_said(run, capsys, monkeypatch):
    monkeypatch.setattr(compressors, "MOST_TEXT", 1000)
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
    metrics.write_text(metrics.read_text().replace(toy[0].removeprefix("DATA_PATH="), str(folder)))
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
    assert reading.curve(reading.points_of(events), "train_loss") == [(0.01, 9.0), (0.025, 6.0), (0.035, 5.0)]


# ---- output for programs and eyes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot(run, capsys, tmp_path, suffix, magic):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"curve.{suffix}"
    assert report.main([str(run), "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(magic)


def test_the_axis_leaves_the_first_steps_out_and_shows_every_level():
    def limits(seconds, losses, *levels):
        runs = [({"state": "finished", "points": [{"seconds": 100}]}, "run", "#000000")]
        return panels.limits_of(runs, [panels.curve(0, "run", "#000000", {"seconds": seconds}, losses, panels.LINE)], levels)

    points = [1, 2, 50, 100], [9.0, 8.0, 3.0, 2.0]
    bottom, top = limits(*points, 2.5)
    assert bottom < 2.0 and 3.0 < top < 8.0
    bottom, top = limits(*points, 5.0, 1.0)
    assert bottom < 1.0 and 5.0 < top < 8.0
    bottom, top = limits([1], [9.0])  # nothing but first steps: the last of them
    assert bottom < 9.0 < top


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

    for name, default in facts_module.DEFAULT.items():
        assert getattr(Settings(), name.lower()) == default


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
    (other / "summary.json").write_text(json.dumps(second | {"val_bytes": 1}))
    assert report.main([str(run), str(other)]) == 0
    assert "do not compare" in capsys.readouterr().out


@pytest.mark.parametrize("x, column", [("steps", "step"), ("tokens", "tokens"), ("seconds", "seconds")])
def test_a_picture_shows_the_numbers_of_the_log(run, tmp_path, monkeypatch, x, column):
    figure = drawn(monkeypatch, [run, "--plot", tmp_path / "x.svg", "--x", x])
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [event for event in events if event["event"] == "train"]
    axes = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(axes) == ["training loss", "validation", "learning rate", "step time", "phases", PARTS]
    loss = axes["training loss"].lines[0]
    assert list(loss.get_ydata()) == [event["train_loss"] for event in train]
    expected = {"step": [event["step"] for event in train], "tokens": [512 * event["step"] for event in train],
                "seconds": [event["train_time_ms"] / 1000 for event in train]}
    assert list(loss.get_xdata()) == pytest.approx(expected[column])
    assert list(axes["learning rate"].lines[0].get_ydata()) == [event["lr_scale"] for event in train]
    times = [0.0, *(event["train_time_ms"] for event in train)]
    assert list(axes["step time"].lines[0].get_ydata()) == pytest.approx([b - a for a, b in zip(times, times[1:])])
    curve, final = axes["validation"].lines[:2]
    assert list(curve.get_ydata()) == [event["val_bpb"] for event in events if event["event"] == "val"]
    summary = json.loads((run / "summary.json").read_text())
    assert list(final.get_ydata()) == [summary["val_bpb"]] and len(axes["validation"].lines) == 4, "xz and brotli"
    labels = [label.get_text() for label in axes["phases"].get_yticklabels()]
    widths = dict(zip(labels, (bar.get_width() for bar in axes["phases"].patches)))
    assert widths["training"] == summary["train_seconds"] and widths["scoring"] == summary["eval_seconds"]
    sizes = [bar.get_width() for bar in axes[PARTS].patches]
    assert sum(sizes) == summary["total_bytes"] and sizes[-1] == summary["code_bytes"]
    assert axes[PARTS].lines[0].get_xdata()[0] == 16_000_000


def drawn(monkeypatch, words):
    """The matplotlib figure that the report draws."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    assert report.main([*map(str, words)]) == 0
    return figures[0]


PARTS = "size by role of parameters"


def test_the_bytes_of_each_role_are_in_the_table(run):
    (event,) = (event for event in read(run) if event["event"] == "role_bytes")
    out = call(run).stdout
    for role in ("matrix", "embed", "scalar", "header"):
        assert value(out, f"- {role}") == f"{event[role]:,}"
    assert sum(size for role, size in event.items() if role != "event") == (run / "model.pg").stat().st_size


def read(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_panels_without_data_are_left_out(tmp_path, monkeypatch):
    run = made_up_run(tmp_path / "run")
    kept = [event for event in read(run) if event["event"] not in ("val", "final", "artifact", "role_bytes")]
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({key: summary[key] for key in ("steps", "seed")}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    figure = drawn(monkeypatch, [run, "--plot", tmp_path / "x.png"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["training loss", "learning rate", "step time", "phases"]


def test_many_runs_are_overlaid(tmp_path, monkeypatch):
    """Up to ten by name; of more the colour is the score, and there is no legend."""
    runs = [made_up_run(tmp_path / f"{place:02}$x_", score=1.1 + place / 100) for place in range(12)]
    few = drawn(monkeypatch, [*runs[:3], "--plot", tmp_path / "x.png"])
    assert [text.get_text().strip() for text in few.legends[0].texts] == ["00$x_", "01$x_", "02$x_"]
    assert len(few.axes[0].lines) == 3
    many = drawn(monkeypatch, [*runs, "--plot", tmp_path / "x.png"])
    assert not many.legends and len(many.axes[0].lines) == 12
    colours = [line.get_color() for line in many.axes[0].lines]
    assert colours[0] == panels.BEST_TO_WORST[0] and colours[-1] == panels.BEST_TO_WORST[-1]
    assert len(set(colours)) == 12


def test_every_colour_is_legible_on_both_grounds():
    from page import contrast, rgb

    for colour in (*panels.COLOURS, *panels.BEST_TO_WORST, panels.NO_SCORE):
        assert min(contrast(rgb(colour), rgb(ground)) for ground in ("#fafaf8", "#ffffff", "#1b1f25")) >= 3, colour


def test_long_curves_are_thinned_and_keep_their_ends():
    points = [{**dict.fromkeys(reading.COLUMNS), "step": step, "seconds": step, "tokens": step, "train_loss": float(step)}
              for step in range(9_001)]
    (curve,) = panels.curves([({"points": points}, "run", "#000000")], "train_loss")
    assert len(curve["y"]) <= panels.MOST_POINTS + 1 and curve["y"][0] == 0 and curve["y"][-1] == 9000
    assert curve["meta"]["xs"]["steps"] == curve["y"]


def test_the_table_imports_nothing_of_the_pictures(run):
    code = f"import sys; sys.path.insert(0, 'tools'); import report; report.main([{str(run)!r}]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, text=True, capture_output=True, timeout=9, check=True)
    assert not {"torch", "matplotlib", "plotly", "rich", "tensorboardX"} & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("package, words", [
    ("matplotlib", ["--plot", "x.png"]), ("plotly", ["--html", "x.html"]), ("rich", ["--follow"]),
    ("tensorboardX", ["--export", "tensorboard", "--to", "x"]), ("wandb", ["--export", "wandb", "--to", "x"])])
def test_a_missing_package_is_one_line(run, tmp_path, capsys, monkeypatch, package, words):
    monkeypatch.chdir(tmp_path)
    for name in {package, *(name for name in sys.modules if name.startswith(package + "."))}:
        monkeypatch.setitem(sys.modules, name, None)
    pip = "pip install wandb" if package == "wandb" else "pip install -r requirements-dev.txt"
    assert one_error(capsys, run, *words) == f"error: {words[0]} {words[1] + ' ' if '--to' in words else ''}needs {package}: {pip}\n"


# ---- how a run ended ------------------------------------------------------------------------------------------------


def first_line(run, capsys):
    assert report.main([str(run)]) == 0
    return capsys.readouterr().out.splitlines()[0].removeprefix(f"Run {run}: ")


def test_a_diverged_run_says_so(toy, tmp_path, capsys):
    run = tmp_path / "run"
    done = run_trainer([*toy, f"OUT_DIR={run}", "MATRIX_LR=1e30", "TIED_EMBED_LR=1e30", "TRAIN_LOG_EVERY=1"])
    assert done.returncode == 4 and "ended reason" not in done.stdout
    event = read(run)[-1]
    assert event.keys() == {"event", "reason", "exit_code"} and (event["event"], event["exit_code"]) == ("ended", 4)
    assert (run / "train.log").read_text().splitlines()[-1] == f'ended reason:"{event["reason"]}"'
    assert first_line(run, capsys).startswith("diverged (the loss is not finite at step ")


@pytest.mark.parametrize("reason, code, said", [
    ("interrupted by SIGTERM after step 9; the same command continues", 143, "interrupted by SIGTERM after step 9"),
    ("RuntimeError CUDA out of memory", 1, "failed: RuntimeError CUDA out of memory")])
def test_the_reason_of_an_early_end_is_shown(tmp_path, capsys, reason, code, said):
    run = made_up_run(tmp_path / "run", ended=(reason, code))
    assert first_line(run, capsys).startswith(said)
    with open(run / "metrics.jsonl", "a") as file:  # it was resumed, and then killed
        print(json.dumps({"event": "run", "seed": 1337}), file=file)
    assert first_line(run, capsys).startswith("killed (no word of an end")
    finished = made_up_run(tmp_path / "finished")
    text = (run / "metrics.jsonl").read_text() + (finished / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text)
    shutil.copy(finished / "summary.json", run)
    assert first_line(run, capsys) == "finished"
    with open(run / "metrics.jsonl", "a") as file:  # resumed again: the summary is of what was before
        print(json.dumps({"event": "run", "seed": 1337}), file=file)
    assert first_line(run, capsys).startswith("killed")


def test_a_running_run_is_known_by_its_lock(tmp_path, capsys):
    run = made_up_run(tmp_path / "run", ended=("interrupted by SIGTERM", 143))
    with locked(run) as words:
        assert first_line(run, capsys).startswith(f"running ({words})")
    assert first_line(run, capsys).startswith("interrupted"), "the file is there, the lock is not"


def test_a_lock_of_a_process_that_is_gone_is_not_touched(tmp_path, capsys, monkeypatch):
    """A run that starts in this folder just now could meet our try."""
    run = made_up_run(tmp_path / "run", ended=("", 1))
    (run / "run.lock").write_text(f"process 999999999 on {platform.node()}")
    monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("the lock was tried"))
    assert first_line(run, capsys).startswith("failed: no reason given")


@contextlib.contextmanager
def locked(run):
    """The lock of a run that is going on, held by this process as the trainer holds it; yields what the file says."""
    words = f"process {os.getpid()} on {platform.node()}"
    with open(run / "run.lock", "w") as file:
        file.write(words)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield words


# ---- settings compared over seeds -----------------------------------------------------------------------------------


def compared(capsys, *runs):
    """({group: cells}, what stands below) of --compare."""
    assert report.main(["--compare", *map(str, runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    end = lines.index("")
    groups = {re.split("  +", line.strip())[0]: re.split("  +", line.strip())[1:] for line in lines[1:end]}
    return groups, "\n".join(lines[end:])


def test_settings_are_compared_by_seed(tmp_path, capsys):
    scores = {"": {1: 1.30, 2: 1.20, 3: 1.10}, "MATRIX_LR=0.03": {1: 1.28, 2: 1.17, 4: 9.0}, "MATRIX_LR=0.04": {3: 1.14}}
    runs = [made_up_run(tmp_path / f"{seed}{settings}", settings=settings, seed=seed, score=score)
            for settings, seeds in scores.items() for seed, score in seeds.items()]
    groups, below = compared(capsys, *runs)
    differences = np.array([1.28 - 1.30, 1.17 - 1.20])
    assert groups["reference"][:2] == ["3", "1.2000"] and groups["reference"][-1] == "MATRIX_LR=default"
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(2)
    assert groups["group 2"] == ["3", f"{(1.28 + 1.17 + 9) / 3:.4f}", f"{mean:+.4f} ± {error:.4f} (2 of 3 seeds)",
                                 "13,131,200", groups["group 2"][4], "MATRIX_LR=0.03"]
    assert groups["group 3"][:3] == ["1", "1.1400", "+0.0400"], "one pair has no error"
    assert "not counted" not in below


def test_what_does_not_compare_is_said_and_not_counted(tmp_path, capsys):
    base = made_up_run(tmp_path / "base", seed=1, score=1.3)
    other = made_up_run(tmp_path / "other", settings="MUON_WD=0.1", seed=1, score=1.0, val_sha256="f" * 64)
    invalid = made_up_run(tmp_path / "bad", settings="MUON_WD=0.1", seed=1, score=0.5, valid="no", reasons=["C1: it looked"])
    ended = made_up_run(tmp_path / "ended", settings="MUON_WD=0.1", seed=1, ended=("interrupted by SIGINT", 130))
    groups, below = compared(capsys, base, other, invalid, ended)
    assert groups["group 2"][:3] == ["0", "-", "-"]
    assert "other, seed 1: NOT COMPARABLE, 1.0000 is not counted: it is of another text" in below
    assert "bad, seed 1: INVALID, 0.5000 is not counted: C1: it looked" in below
    assert "ended, seed 1: no score, interrupted by SIGINT" in below


# ---- a run that goes on ---------------------------------------------------------------------------------------------


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def start_following(run, *words):
    """The follower, which a Ctrl-C reaches even where the tests themselves were started without one (nohup)."""
    return subprocess.Popen([sys.executable, str(REPO / "tools/report.py"), str(run), "--follow", *map(str, words)],
                            env=clean_env(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_a_run_is_followed_to_its_end(tmp_path):
    pytest.importorskip("plotly")
    run = made_up_run(tmp_path / "run", steps=400, ended=("interrupted by SIGTERM after step 200", 143), settings="ITERATIONS=400")
    events = read(run)
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events[:-1]))
    page = tmp_path / "run.html"
    with locked(run):
        process = start_following(run, "--html", page)
        wait_for(page.exists)
        assert '"running": true' in page.read_text()
        with open(run / "metrics.jsonl", "a") as file:
            print(json.dumps(events[-1]), file=file)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and err == ""
    last_val = [event for event in events if event["event"] == "val"][-1]
    out = " ".join(out.split())
    for shown in ("50% of the training", "step 200", f"{last_val['val_bpb']:.4f} BPB at step 200", "ms/step"):
        assert shown in out
    assert "phase interrupted by SIGTERM after step 200" in out and "ETA" not in out and '"running": false' in page.read_text()


def test_ctrl_c_ends_the_following_and_leaves_the_run_alone(tmp_path):
    run = made_up_run(tmp_path / "run", ended=("", 1))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with locked(run):
        process = start_following(run, "--html", tmp_path / "x.html")
        wait_for((tmp_path / "x.html").exists)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=90)
    assert process.returncode == 130 and "Traceback" not in err
    (run / "run.lock").unlink()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_what_the_rest_of_the_training_takes():
    from reports.follow import progress_of

    end = {"points": [{"step": 100, "seconds": 50.0}]}
    assert progress_of({**end, "steps_to_make": 400, "seconds_to_train": 0.0}) == (0.25, 150.0)
    assert progress_of({**end, "steps_to_make": 0, "seconds_to_train": 100.0}) == (0.5, 50.0)
    assert progress_of({"points": [], "steps_to_make": 400, "seconds_to_train": 600.0}) == (0.0, None)


# ---- for other programs ---------------------------------------------------------------------------------------------


def test_csv_has_a_row_for_each_step(run, tmp_path):
    assert report.main([str(run), "--export", "csv", "--to", str(tmp_path / "run.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "run.csv").open()))
    events = {(event["event"], event.get("step")): event for event in read(run)}
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    for step, row in enumerate(rows, 1):
        train, val = events["train", step], events.get(("val", step), {})
        assert float(row["train_loss"]) == train["train_loss"] and float(row["lr_scale"]) == train["lr_scale"]
        assert int(row["tokens"]) == 512 * step
        assert float(row["seconds"]) == pytest.approx(train["train_time_ms"] / 1000, abs=0.01)
        assert [row["val_loss"], row["val_bpb"]] == [str(val.get(key, "")) for key in ("val_loss", "val_bpb")]
    assert float(rows[0]["ms_per_step"]) == pytest.approx(events["train", 1]["train_time_ms"])


def test_tensorboard_reads_the_curves_back(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    runs = [made_up_run(tmp_path / name, score=score) for name, score in (("one", 1.2), ("two", 1.3))]
    assert report.main([*map(str, runs), "--export", "tensorboard", "--to", str(tmp_path / "board")]) == 0
    for run, score in zip(runs, (1.2, 1.3)):
        (file,) = (tmp_path / "board" / run.name).glob("events.out.tfevents*")
        data = file.read_bytes()
        scalars = {}
        while data:  # a record: its length (8 bytes), a checksum (4), the event, a checksum (4)
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length:]
            for entry in event.summary.value:
                scalars.setdefault(entry.tag, []).append((event.step, entry.simple_value))
        train = [event for event in read(run) if event["event"] == "train"]
        assert scalars["train/loss"] == [(event["step"], pytest.approx(event["train_loss"])) for event in train]
        assert [step for step, _ in scalars["val/bpb"]] == list(range(50, 401, 50))
        assert scalars["final/bpb"] == [(400, pytest.approx(score))]


def test_wandb_gets_an_offline_run(tmp_path, monkeypatch):
    """wandb itself was tried by hand: it is no requirement."""
    calls = SimpleNamespace(logged=[], summary={}, finished=0)
    run = SimpleNamespace(log=lambda values, step: calls.logged.append((step, values)), summary=calls.summary,
                          finish=lambda: setattr(calls, "finished", 1))
    stub = SimpleNamespace(init=lambda **words: setattr(calls, "words", words) or run, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    folder = made_up_run(tmp_path / "run", settings="MATRIX_LR=0.03")
    assert report.main([str(folder), "--export", "wandb", "--to", str(tmp_path / "w")]) == 0
    assert calls.words["mode"] == "offline" and calls.words["config"]["MATRIX_LR"] == "0.03"
    assert [step for step, _ in calls.logged] == list(range(10, 401, 10)) and calls.finished
    assert calls.logged[4][1]["val/bpb"] and calls.summary["final_bpb"] == 1.2


def test_options_that_do_not_go_together(run, capsys, tmp_path):
    assert "give one RUN_DIR" in one_error(capsys, run, tmp_path, "--follow")
    assert "belong together" in one_error(capsys, run, "--export", "csv")
    assert "belong together" in one_error(capsys, run, "--to", tmp_path / "x.csv")
    assert "must end in .html" in one_error(capsys, run, "--html", tmp_path / "x.htm")
    assert "give the folder of a run" in one_error(capsys, tmp_path, "--follow")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    pytest.importorskip("tensorboardX")
    assert "is not empty" in one_error(capsys, run, "--export", "tensorboard", "--to", tmp_path / "full")
    assert "to export yet" in one_error(capsys, just_begun(run), "--export", "csv", "--to", tmp_path / "x.csv")


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
    assert report.main([str(run), str(run), "--compare"]) == 0
    pytest.importorskip("plotly")
    assert report.main([str(run), "--html", str(run / "page.html")]) == 0
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
