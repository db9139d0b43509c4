"""Runs that cannot be lost: whatever ends them, whoever listens, and however many share a machine. The runs here are
forked from one process (killing.py), so that they are real processes that cost no import.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import killing
import pytest
import torch
from process import REPO, clean_env
from runs import (
    Started,
    call,
    checkpoints,
    command,
    events,
    good,
    log_lines,
    read_checkpoint,
    refused,
    strict_json,
    summary,
    torchrun,
)

import train_gpt
from reports.facts import gather

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs")


@pytest.fixture(scope="module")
def forge():
    with killing.Forge() as started:
        yield started


def waits_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def test_runs_that_end_at_once_are_both_noticed(forge, toy, tmp_path):
    """As the ranks of a run do: both ends are told in one breath."""
    args = command(toy, tmp_path / "run", "PHASES=train", "ITERATIONS=1000000")
    pids = [forge.start([*args, f"OUT_DIR={tmp_path / name}"], tmp_path / f"{name}.out") for name in ("a", "b")]
    os.kill(forge.server.pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    os.kill(forge.server.pid, signal.SIGCONT)
    time.sleep(0.5)
    waits_for(lambda: all(forge.ended(pid) for pid in pids), 10)
    assert [forge.wait(pid) for pid in pids] == [-signal.SIGKILL] * 2


# A folder belongs to one run


def test_ten_runs_that_start_at_once_have_ten_folders_and_ten_whole_results(forge, toy, tmp_path):
    """The same command in one second: nothing is shared, nothing is mixed."""
    args = [*toy, "DEVICE=cpu", "COMPRESSOR=zlib", "ITERATIONS=1", "WARMUP_STEPS=0", "EVAL_STRIDE=0", "VAL_TOKENS=512"]
    pids = [forge.start(args, tmp_path / f"{number}.out", cwd=tmp_path) for number in range(10)]
    assert [forge.wait(pid) for pid in pids] == [0] * 10
    folders = sorted((tmp_path / "logs").iterdir())
    assert len(folders) == 10
    said = [(tmp_path / f"{number}.out").read_text().splitlines()[-1].removeprefix("summary ") for number in range(10)]
    assert sorted(strict_json(line)["run_id"] for line in said) == [folder.name for folder in folders]
    for folder in folders:
        assert "-seed1337" in folder.name
        names = {path.name for path in folder.iterdir()}
        assert names == {"train.log", "metrics.jsonl", "model.pg", "summary.json"}
        result = strict_json((folder / "summary.json").read_text())
        assert result["run_id"] == folder.name and [row["run_id"] for row in events(folder, "summary")] == [folder.name]
        assert len(events(folder, "run")) == len(events(folder, "final")) == 1
        assert train_gpt.hashlib.sha256((folder / "model.pg").read_bytes()).hexdigest() == result["artifact_sha256"]


def test_a_name_that_is_taken_is_not_given_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt.time, "strftime", lambda _: "20260102-030405")
    s = train_gpt.Settings(seed=7)
    names = [train_gpt.make_folder(s).name for _ in range(3)]
    assert names[0].startswith("20260102-030405-") and names[0].endswith("-seed7")
    assert names[1:] == [f"{names[0]}-2", f"{names[0]}-3"]


def test_a_folder_in_use_is_refused_and_named_with_its_process_and_free_when_that_is_killed(forge, toy, tmp_path):
    folder = tmp_path / "run"
    args = command(toy, folder, "PHASES=train", "CHECKPOINT_EVERY=5", "ITERATIONS=1000000")
    pid = forge.start(args, tmp_path / "out")
    waits_for(lambda: checkpoints(folder))
    for more in ((), ("RESUME=auto",), ("SEED=2",)):
        before = (folder / "metrics.jsonl").read_text()
        refused(call([*args, *more]), 2, f"OUT_DIR={folder}", "in use", f"process {pid} ", "another RUN_ID or OUT_DIR")
        assert (folder / "metrics.jsonl").read_text().startswith(before), "the other run's files are left alone"
    # Two ranks: both end, at once, with exit code 2.
    began = time.monotonic()
    pids = killing.ranks_of(forge, args, 2, tmp_path / "two")
    assert [forge.wait(one) for one in pids] == [2, 2] and time.monotonic() - began < 30
    assert "Traceback" not in (tmp_path / "two").read_text()
    os.kill(pid, signal.SIGKILL)
    assert forge.wait(pid) == -signal.SIGKILL and (folder / "run.lock").exists()
    pid = forge.start([*args, "RESUME=auto"], tmp_path / "out")
    waits_for(lambda: events(folder, "resume"))
    os.kill(pid, signal.SIGTERM)
    assert forge.wait(pid) == 143 and not killing.left_over(folder)


def test_a_folder_of_an_earlier_run_is_refused_by_all_ranks(forge, toy, tmp_path):
    folder = tmp_path / "run"
    assert forge.wait(forge.start(command(toy, folder), tmp_path / "first")) == 0
    before = (folder / "train.log").read_text()
    pids = killing.ranks_of(forge, command(toy, folder), 2, tmp_path / "out")
    assert [forge.wait(pid) for pid in pids] == [2, 2]
    said = (tmp_path / "out").read_text()
    assert said.count(f"{folder}/train.log belongs to an earlier run") == 2 and "Traceback" not in said
    assert (folder / "train.log").read_text() == before


def test_run_sh_gives_two_names_in_one_second(tmp_path):
    """What makes the name, alone: ten at once, ten folders."""
    text = (REPO / "run.sh").read_text()
    (function,) = re.findall(r"^new_run_id\(\) \{.*?^\}", text, re.MULTILINE | re.DOTALL)
    script = f"fail() {{ exit 2; }}\ndate() {{ echo 20260102-030405; }}\n{function}\nnew_run_id small"
    runs = [subprocess.Popen(["bash", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(10)]
    names = {run.communicate()[0].strip() for run in runs}
    assert len(names) == 10 == len(list((tmp_path / "logs").iterdir()))


# A console that goes away


def outcome(folder):
    """What a run leaves that depends on nothing but its settings."""
    return (folder / "model.pg").read_bytes(), [row["train_loss"] for row in events(folder, "train")]


@pytest.fixture(scope="module")
def undisturbed(forge, toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert forge.wait(forge.start(command(toy, folder), folder.with_suffix(".out"))) == 0
    return outcome(folder)


@pytest.mark.parametrize("console", ["full", "closed", "all closed", "errors closed"])
def test_a_run_without_a_console_is_the_same_run(forge, toy, undisturbed, tmp_path, console):
    """> /dev/full, >&-, >&- 2>&- <&-: the files have everything, the exit code is 0."""
    closed = {"full": (), "closed": (1,), "all closed": (0, 1, 2), "errors closed": (2,)}[console]
    out = "/dev/full" if console == "full" else tmp_path / "out"
    folder = tmp_path / "run"
    pid = forge.start(command(toy, folder), out, tmp_path / "errors", closed=closed)
    assert forge.wait(pid) == 0
    assert outcome(folder) == undisturbed
    assert log_lines(folder)[-1].startswith("summary {")
    told = [row["note"] for row in events(folder, "warning") if "console is gone" in row["note"]]
    reason = {"full": "No space left", "errors closed": None}.get(console, "closed at the start")
    assert len(told) == (reason is not None) and (not told or reason in told[0])
    if 2 not in closed:
        assert (tmp_path / "errors").read_text() == ""
    for name in ("metrics.jsonl", "train.log"):  # no print has landed in a file whose descriptor was free
        assert "error: " not in (folder / name).read_text().rpartition("=" * 100)[2]
    assert [json.loads(line)["event"] for line in (folder / "metrics.jsonl").read_text().splitlines()][0] == "run"


def test_a_reader_that_has_seen_enough_does_not_end_the_run(toy, undisturbed, tmp_path):
    """`| head -1`, of the real command with both streams; and of --help."""
    args = [sys.executable, REPO / "train_gpt.py", *command(toy, tmp_path / "run")]
    script = '"$@" 2>&1 | head -1; echo "${PIPESTATUS[0]}"'
    done = subprocess.run(["bash", "-c", script, "bash", *map(str, args)], env=clean_env(), capture_output=True,
                          text=True, timeout=100, stdin=subprocess.DEVNULL)
    assert done.stdout.splitlines()[-1] == "0" and done.stdout.startswith("run out_dir:")
    assert outcome(tmp_path / "run") == undisturbed


def test_an_error_that_nobody_can_read_has_its_exit_code(forge, toy, tmp_path):
    for out, closed in (("/dev/full", ()), (os.devnull, (1, 2))):
        assert forge.wait(forge.start([*toy, "NUM_LAYERS=banana"], out, closed=closed)) == 2
    assert forge.wait(forge.start(["--help"], "/dev/full")) == 0


def test_warnings_without_a_console_are_no_error(capsys):
    """Through Python's own machinery, which prints to standard error."""
    class Gone:
        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        flush = fileno = isatty = lambda self: self.write("")

    before = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = Gone()
    try:
        with train_gpt.guarded_console():
            warnings.simplefilter("always")
            warnings.showwarning("something", UserWarning, "file", 1)
            print("a line", flush=True)
            lost = sys.stdout.lost
    finally:
        sys.stdout, sys.stderr = before
    assert lost == "Broken pipe"


# Names with bytes that are not UTF-8


def test_paths_may_hold_any_bytes_in_any_locale(forge, toy, tmp_path):
    """OUT_DIR with byte E9 and an accent, data behind an accent in a settings file, a locale that knows ASCII only."""
    data = Path(next(pair.partition("=")[2] for pair in toy if pair.startswith("DATA_PATH=")))
    accent = Path(shutil.copytree(data, tmp_path / "donn\u00e9es"))
    (tmp_path / "accent.env").write_text(f'DATA_PATH="{accent}"\n', encoding="utf-8")
    rest = [pair for pair in command(toy, "x") if not pair.startswith(("DATA_PATH=", "OUT_DIR="))]
    folder = os.fsencode(tmp_path) + b"/o\xe9t\xc3\xa9"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, str(REPO / "train_gpt.py"), *rest, f"@{tmp_path}/accent.env", b"OUT_DIR=" + folder]
    done = subprocess.run(words, env=clean_env(ascii_only), capture_output=True, timeout=100, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr[-1500:]
    for locale, wanted in ((done, None), (call([*rest, f"DATA_PATH={accent}", "OUT_DIR=" + os.fsdecode(folder + b"2")]), b"2")):
        assert locale.returncode == 0, locale.stderr
        where = folder + (wanted or b"")
        assert "o\\xe9t\u00e9" in Path(os.fsdecode(where + b"/train.log")).read_text(encoding="utf-8")
        result = strict_json(Path(os.fsdecode(where + b"/summary.json")).read_text(encoding="utf-8"))
        assert result["run_id"] == "o\\xe9t\u00e9" + (wanted or b"").decode() and result["data"] == "donn\u00e9es"
        for line in Path(os.fsdecode(where + b"/metrics.jsonl")).read_text(encoding="utf-8").splitlines():
            strict_json(line)
            assert "\\ud" not in line, "half a pair of UTF-16, which other readers refuse"
    report = subprocess.run([sys.executable, str(REPO / "tools/report.py"), folder], env=clean_env(ascii_only),
                            capture_output=True, timeout=60)
    assert report.returncode == 0, report.stderr


# Signals


def test_nohup_stays_nohup(forge, toy, tmp_path):
    """SIGHUP that was ignored at the start is ignored in every phase."""
    folder = tmp_path / "run"
    pid = forge.start(command(toy, folder, "ITERATIONS=12"), tmp_path / "out", ignored=[signal.SIGHUP])
    waits_for(lambda: killing.reached(folder, "train"))
    os.kill(pid, signal.SIGHUP)
    assert forge.wait(pid) == 0 and log_lines(folder)[-1].startswith("summary {")


def patched(monkeypatch, name, number):
    """From now on the signal comes when that function is called, before it does anything."""
    function = getattr(train_gpt, name)

    def first(*args, **more):
        signal.raise_signal(number)
        return function(*args, **more)

    monkeypatch.setattr(train_gpt, name, first)


@pytest.fixture(autouse=True)
def hangup_is_heard():
    """Under nohup, too, where the process of the tests ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_the_first_batch_is_read_is_noted_and_not_raised(toy, tmp_path, monkeypatch, name):
    """Raised while the thread of the loader starts, it could leave a thread for which Python waits for ever."""
    prefetch = train_gpt.TokenStream.prefetch

    def interrupted(self, *args):
        signal.raise_signal(signal.Signals[name])
        prefetch(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.TokenStream, "prefetch", interrupted)
        stopped = call(command(toy, tmp_path, "ITERATIONS=4"))
    refused(stopped, 128 + signal.Signals[name], f"interrupted by {name} after step 0; ", "RESUME=auto")
    assert list(checkpoints(tmp_path)) == [0]
    assert summary(good(call(command(toy, tmp_path, "ITERATIONS=4", "RESUME=auto"))))["steps"] == 4


CALIBRATED = ("MATRIX_QUANT=gptq", "GPTQ_CALIBRATION_TOKENS=512", "EVAL_STRIDE=0", "AVERAGE=none")
AFTER = {"_report_never_reached": "RESUME=auto", "save_artifact": "RESUME=auto", "evaluate": "PHASES=eval ARTIFACT="}


@pytest.mark.parametrize("number, limit", [("SIGHUP", "ITERATIONS=4"), ("SIGINT", "MAX_WALLCLOCK_SECONDS=0.5")])
@pytest.mark.parametrize("phase", AFTER)
def test_after_training_a_signal_loses_nothing_and_resume_makes_the_same_artifact(toy, tmp_path, monkeypatch, phase,
                                                                                limit, number):
    """Of a run that ended by its clock, too: no step more."""
    number = signal.Signals[number]
    args = command(toy, tmp_path, *CALIBRATED, "ITERATIONS=100000", "GPTQ_RESERVE_SECONDS=0.1", limit)
    with monkeypatch.context() as patch:
        patched(patch, phase, number)
        stopped = call(args)
    refused(stopped, 128 + number, f"interrupted by {number.name}; ", "kept", AFTER[phase])
    assert log_lines(tmp_path)[-1].startswith(f'ended reason:"interrupted by {number.name}; the ')
    assert_ended(tmp_path, number)
    ((step, path),) = checkpoints(tmp_path).items()
    state, before = read_checkpoint(path), (tmp_path / "model.pg").exists() and (tmp_path / "model.pg").read_bytes()
    assert state["step"] == step and state["done"]
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "_train_step", None)  # not one
        done = good(call([*args, "RESUME=auto"]))
    assert summary(done)["steps"] == step and not checkpoints(tmp_path)
    if before:
        assert (tmp_path / "model.pg").read_bytes() == before
    stored = train_gpt.load_artifact(tmp_path / "model.pg")[1].state_dict()
    assert torch.allclose(stored["embed.weight"], state["weights"]["model.embed.weight"], atol=0.02)


def assert_ended(folder, number):
    """The last event has the reason and the exit code of a run that this signal ended, and a report says it."""
    last = events(folder)[-1]
    assert (last["event"], last["exit_code"]) == ("ended", 128 + number)
    assert last["reason"].startswith(f"interrupted by {number.name}; ")
    assert gather(folder, compress=False)["ended"] == last["reason"]


def test_the_checkpoint_of_the_end_is_kept_where_checkpoints_were_asked_for(toy, tmp_path):
    good(call(command(toy, tmp_path, "CHECKPOINT_EVERY=2", "ITERATIONS=5", "PHASES=train")))
    assert list(checkpoints(tmp_path)) == [4, 5]


def test_a_run_ended_before_its_first_step_says_so_and_can_be_repeated(toy, tmp_path, monkeypatch):
    args = command(toy, tmp_path, "PHASES=train")
    with monkeypatch.context() as patch:
        patched(patch, "train", signal.SIGTERM)
        refused(call(args), 143, "interrupted by SIGTERM; the same command starts again")
    assert log_lines(tmp_path)[-1].startswith('ended reason:"interrupted by SIGTERM')
    assert_ended(tmp_path, signal.SIGTERM)
    good(call(args))


def test_an_artifact_that_is_being_written_is_whole_or_absent(toy, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.os, "fsync", lambda file: signal.raise_signal(signal.SIGTERM))
        patch.setattr(train_gpt.Training, "save", lambda training: True)
        refused(call(command(toy, tmp_path)), 143, "interrupted by SIGTERM")
    assert not (tmp_path / "model.pg").exists() and not killing.left_over(tmp_path)


# An export that fails

DEAD = ("MATRIX_QUANT=gptq", "EMBED_QUANT=gptq", "GPTQ_CALIBRATION_TOKENS=512", "TIED_EMBED_INIT_STD=0")


def test_an_export_that_fails_keeps_the_weights_and_names_the_true_cause(toy, tmp_path):
    args = command(toy, tmp_path, *DEAD)
    for more in ((), ("RESUME=auto",)):
        said = refused(call([*args, *more]), 4, "the curvature of embed.weight is nan", "all zero", "RESUME=auto")
        assert "GPTQ_DAMP" not in said
    assert list(checkpoints(tmp_path)) == [5] and len(events(tmp_path, "train")) == 5, "trained once"
    assert "embed.weight" in log_lines(tmp_path)[-1] and not (tmp_path / "model.pg").exists()


def test_all_ranks_hear_that_the_export_failed(forge, toy, tmp_path):
    args = command(toy, tmp_path / "run", *DEAD)
    pids = killing.ranks_of(forge, args, 2, tmp_path / "out")
    assert [forge.wait(pid) for pid in pids] == [4, 4]
    assert "Traceback" not in (tmp_path / "out").read_text()


# At random moments


def test_runs_that_are_ended_at_random_moments_lose_nothing(forge, toy, tmp_path):
    """A short form of tests/help/killing.py: every phase and every way once, and one on two ranks."""
    dice = random.Random(os.environ.get("TEST_SEED"))  # set it to repeat a failure
    references = {ranks: killing.Reference(forge, toy, tmp_path / f"whole{ranks}", ranks) for ranks in (1, 2)}
    actions = dice.sample(killing.ACTIONS, len(killing.ACTIONS))
    plan = [(1, phase, action) for phase, action in zip(killing.PHASES, actions)]
    plan.append((2, dice.choice(list(killing.PHASES)), dice.choice(killing.ACTIONS)))
    for number, (ranks, phase, action) in enumerate(plan):
        killing.play(forge, toy, tmp_path / str(number), references[ranks], ranks, phase, action, dice)


def test_a_dropped_connection_ends_torchrun_with_everything_kept(toy, tmp_path):
    """ssh is gone: nobody reads any more, and SIGHUP comes; in the evaluation."""
    args = command(toy, tmp_path, "EVAL_STRIDE=1", "EVAL_BATCH_SEQS=1")
    with Started(torchrun(args)) as run:
        run.until("artifact ")
        run.process.stdout.close()
        run.signal(signal.SIGHUP)
        run.process.wait(60)
        said = run.errors()
    assert log_lines(tmp_path)[-1].startswith('ended reason:"interrupted by SIGHUP; the artifact is kept')
    assert_ended(tmp_path, signal.SIGHUP)
    assert "error: interrupted by SIGHUP" in said and train_gpt.load_artifact(tmp_path / "model.pg")
    assert not killing.left_over(tmp_path)
