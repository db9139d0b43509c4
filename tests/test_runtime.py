"""Room 2, Runtime: device, clocks and log; and that the number of ranks changes nothing but the time."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from process import run_trainer
from runs import (
    SCRIPT,
    Started,
    call,
    checkpoints,
    command,
    events,
    family,
    free_port,
    furthest,
    good,
    log_lines,
    losses,
    refused,
    strict_json,
    summary,
    torchrun,
    weights,
)

import train_gpt
from train_gpt import BadInput, Clock, Log, Runtime, Settings

no_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker processes in /proc")

# Device and kernels


def test_every_automatic_choice_leaves_its_reason():
    rt = Runtime(Settings(device="cpu"), {})
    choices = {name: (choice, reason) for name, choice, reason in rt.choices}
    assert choices["device"][0] == "cpu" and choices["dtype"][0] == "float32" and choices["compile"][0] == "off"
    assert all(reason for _, reason in choices.values())
    assert rt.device.type == "cpu" and rt.dtype is torch.float32 and (rt.rank, rt.world) == (0, 1)


@pytest.mark.parametrize("setting, attribute, value", [("DTYPE=bfloat16", "dtype", torch.bfloat16), ("DTYPE=float32", "dtype", torch.float32),
                                                       ("COMPILE=on", "compiled", True), ("COMPILE=off", "compiled", False)])
def test_a_choice_can_be_made_by_hand(setting, attribute, value):
    assert getattr(Runtime(Settings.parse(["DEVICE=cpu", setting]), {}), attribute) == value


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_missing_gpu_is_said_not_replaced(toy, tmp_path):
    refused(call(command(toy, tmp_path / "out", "DEVICE=cuda")), 2, "DEVICE=cuda", "DEVICE=cpu")


def test_required_kernels_that_are_not_here_are_an_error_that_names_them(toy, tmp_path):
    refused(run_trainer(command(toy, tmp_path / "out", "KERNELS=require")), 2, "KERNELS=require", "fa3", "KERNELS=auto")
    refused(call(command(toy, tmp_path / "out", "ATTENTION=fa3")), 2, "ATTENTION=fa3", "Hopper")
    refused(call(command(toy, tmp_path / "out", "ATTENTION=flash")), 2, "ATTENTION=flash")
    assert not (tmp_path / "out").exists()


def test_the_kernel_that_was_chosen_and_those_passed_over_are_one_line(toy, tmp_path):
    good(call(command(toy, tmp_path, "ITERATIONS=1", "PHASES=train")))
    (line,) = [line for line in log_lines(tmp_path) if line.startswith("choice attention:")]
    assert line.startswith("choice attention:math ") and "fa3" in line and "flash" in line
    for name in ("device", "dtype", "compile"):
        assert sum(line.startswith(f"choice {name}:") for line in log_lines(tmp_path)) == 1


def test_an_attention_kernel_that_gives_wrong_results_is_passed_over(monkeypatch):
    rt = Runtime(Settings(device="cpu"), {})
    monkeypatch.setattr(train_gpt, "attend_sdpa", lambda q, k, v, docs=None: 1.1 * train_gpt.attend_reference(q, k, v, docs))
    with pytest.raises(BadInput, match="differs from the reference"):
        train_gpt.pick_attention(Settings(device="cpu"), rt)


def test_the_host_runs_two_steps_ahead_of_a_gpu_and_no_more(monkeypatch):
    """Before a third one is begun, it waits for the first of them."""
    waited = []

    class Event:
        made = 0

        def __init__(self):
            Event.made += 1
            self.number = Event.made

        def record(self):
            pass

        def synchronize(self):
            waited.append(self.number)

    rt = Runtime(Settings(device="cpu"), {})
    assert rt.throttle() == 0, "a CPU has nothing in flight"
    rt.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert [rt.throttle() for _ in range(5)] == [1, 2, 2, 2, 2] and waited == [1, 2, 3]


@no_proc
def test_the_peak_memory_is_what_the_system_counts():
    """In MiB; the system counts KiB."""
    held = torch.ones(64 << 18)  # 64 MiB, so that it is no matter of rounding
    peak = Runtime(Settings(device="cpu"), {}).peak_memory_mib()
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM")]
    assert len(held) and peak == pytest.approx(int(line.split()[1]) / 1024, rel=0.05)


# Clock


def test_each_second_is_charged_to_the_innermost_phase_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(train_gpt.time, "monotonic", lambda: now[0])
    clock = Clock()

    def sleep(seconds):
        now[0] += seconds

    sleep(1)
    with clock.charge("train"):
        sleep(10)
        with clock.charge("validate"):
            sleep(5)
            assert clock["train"] == 10 and clock["validate"] == 5, "readable at any time"
        sleep(20)
        with pytest.raises(KeyError), clock.charge("checkpoint"):
            sleep(2)
            raise KeyError
        sleep(40)
        assert clock["train"] == 70
    sleep(3)
    with clock.charge("train"):
        sleep(100)
    assert {name: clock[name] for name in ("setup", "train", "validate", "checkpoint")} == {"setup": 4, "train": 170, "validate": 5, "checkpoint": 2}
    assert clock["never"] == 0


def test_a_phase_waits_for_the_device_at_both_ends():
    waits = []
    clock = Clock(lambda: waits.append(1))
    with clock.charge("train"):
        assert len(waits) == 1
    assert len(waits) == 2
    clock["train"]
    assert len(waits) == 2, "looking at the clock does not wait"


# Log


def test_events_go_to_both_files_and_the_console_at_once(tmp_path, capsys):
    log = Log(tmp_path / "new" / "folder", True)
    log("first", number=3, rate=0.123456789, words="two words")
    log("second", "contest form:1", form=1)
    log.line("only a line", console=False)
    text = (tmp_path / "new/folder/train.log").read_text()  # flushed line by line: readable while the run goes on
    assert text == 'first number:3 rate:0.12345679 words:"two words"\ncontest form:1\nonly a line\n'
    assert capsys.readouterr().out == text.replace("only a line\n", "")
    rows = [strict_json(line) for line in (tmp_path / "new/folder/metrics.jsonl").read_text().splitlines()]
    assert rows == [{"event": "first", "number": 3, "rate": 0.123456789, "words": "two words"}, {"event": "second", "form": 1}]


def test_an_event_for_the_files_alone_is_not_on_the_console(tmp_path, capsys):
    log = Log(tmp_path, True)
    log("ended", 'ended reason:"why not"', console=False, reason="why not", exit_code=4)
    assert capsys.readouterr().out == "" and (tmp_path / "train.log").read_text() == 'ended reason:"why not"\n'
    assert strict_json((tmp_path / "metrics.jsonl").read_text()) == {"event": "ended", "reason": "why not", "exit_code": 4}


def test_the_other_ranks_write_nothing(tmp_path, capsys):
    log = Log(tmp_path / "out", False)
    log("event", a=1)
    log.line("line")
    log.progress("work", 1, 2, "3/s")
    assert capsys.readouterr().out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["a\nb", "a\tb", "a  b", "a\u2028b"])
def test_an_event_is_one_line_whatever_its_values_hold(tmp_path, value):
    log = Log(tmp_path, True)
    log("event", a=value, b=1)
    (line,) = (tmp_path / "train.log").read_text().splitlines()
    assert line == 'event a:"a b" b:1'


@pytest.mark.parametrize("value, form", [
    ("word", "word"), ("", ""), (0.123456789, "0.12345679"), ([1, "two words"], '1,"two words"'),
    ('"', r'"\""'), ('say "it"', r'"say \"it\""'), ("é é", '"é é"')])
def test_a_sentence_in_the_log_is_quoted(value, form):
    assert train_gpt._word(value) == form


def test_a_number_that_is_not_finite_is_still_json(tmp_path):
    log = Log(tmp_path, True)
    log("val", val_loss=float("nan"), bpb=float("inf"))
    strict_json((tmp_path / "metrics.jsonl").read_text())


def test_a_bar_is_drawn_on_terminals_only(tmp_path, monkeypatch, capsys):
    log = Log(tmp_path, True)
    log.progress("training", 5, 10, "7 ms/step")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    log.progress("training", 5, 10, "7 ms/step")
    bar = capsys.readouterr().out
    assert "training" in bar and "50%" in bar and "7 ms/step" in bar and "\n" not in bar
    log("event")
    assert capsys.readouterr().out == "\r\x1b[Kevent\n", "a line of the log replaces the bar"
    assert (tmp_path / "train.log").read_text() == "event\n", "the bar is not part of the log"


def test_long_lines_are_wrapped_and_replaced_on_terminals_only(tmp_path, monkeypatch, capsys):
    log = Log(tmp_path, True)
    monkeypatch.setenv("COLUMNS", "40")
    text = "settings " + " ".join(f"NAME_{number}=1" for number in range(20))
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        log("settings", text)
        log("summary", "summary {}", short="summary file:there", steps=1)
        out = capsys.readouterr().out
        if terminal:
            *lines, last = out.splitlines()
            assert max(map(len, lines)) <= 40 and " ".join(out.split()).startswith(text) and last == "summary file:there"
        else:
            assert out.splitlines() == [text, "summary {}"]
    assert (tmp_path / "train.log").read_text().splitlines() == 2 * [text, "summary {}"]
    assert strict_json((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == {"event": "summary", "steps": 1}


def test_a_full_disk_ends_the_log_but_not_the_run(tmp_path, capsys):
    log = Log(tmp_path, True)

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    log._files[0] = Full()
    log("one", a=1)
    log("two", a=2)
    said = capsys.readouterr()
    assert said.out == "one a:1\ntwo a:2\n" and said.err.count("No space left on device") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2, "the other file goes on"


# The file alone


def test_the_file_runs_when_copied_alone_into_a_folder(toy, tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    args = [*toy, "DEVICE=cpu", "COMPRESSOR=zlib", "ITERATIONS=1", "RUN_ID=first", "EVAL_STRIDE=0"]
    done = good(run_trainer(args, script=tmp_path / SCRIPT.name, cwd=tmp_path))
    assert {path.name for path in (tmp_path / "logs/first").iterdir()} >= {"train.log", "metrics.jsonl", "model.pg"}
    assert summary(done)["run_id"] == "first"


# Ranks. TRAIN_BATCH_TOKENS is 8 sequences; the numbers below are for 12 steps with an average and a checkpoint every 4.

STEPS = ("ITERATIONS=12", "CHECKPOINT_EVERY=4", "EMA_DECAY=0.8")


@pytest.fixture(scope="module")
def one(toy, tmp_path_factory):
    """The run of one rank that the others are compared with."""
    folder = tmp_path_factory.mktemp("one")
    good(call(command(toy, folder, *STEPS, "PHASES=train")))
    return folder


@pytest.fixture(scope="module")
def two(toy, tmp_path_factory):
    """The same with two ranks: folder and finished process."""
    folder = tmp_path_factory.mktemp("two")
    with Started(torchrun(command(toy, folder, *STEPS))) as run:
        return folder, good(run.finish())


def assert_same_training(a, b, loss=1e-5, weight=1e-4):
    first, second = losses(a), losses(b)
    assert first.keys() == second.keys() and len(first) >= 4
    assert max(abs(first[step] - second[step]) for step in first) < loss
    assert furthest(weights(a), weights(b)) < weight


def test_two_ranks_train_the_same_model(one, two):
    folder, done = two
    assert_same_training(one, folder)
    assert summary(done)["world_size"] == 2 and summary(done)["valid"] == "yes"
    assert done.stdout.count("summary {") == 1, "one rank talks"


def test_two_ranks_give_the_same_score_to_the_same_artifact(toy, two, tmp_path):
    folder, done = two
    alone = summary(good(call(command(toy, tmp_path, "PHASES=eval", f"ARTIFACT={folder}/model.pg"))))
    shared = summary(done)
    assert alone["val_bpb"] == pytest.approx(shared["val_bpb"], rel=1e-6) and alone["val_loss"] == pytest.approx(shared["val_loss"], rel=1e-6)
    assert (alone["val_tokens"], alone["val_bytes"]) == (shared["val_tokens"], shared["val_bytes"])
    assert alone["forwarded_per_token"] == shared["forwarded_per_token"] > 1, "of all ranks"


def test_a_run_of_one_rank_is_resumed_by_two_and_the_other_way_round(toy, one, two, tmp_path):
    for source, name in ((one, "wider"), (two[0], "narrower")):
        (tmp_path / name).mkdir()
        shutil.copy(source / "checkpoint_0000008.pt", tmp_path / name)
    args = [*STEPS, "RESUME=auto", "PHASES=train"]
    good(call(command(toy, tmp_path / "narrower", *args)))
    with Started(torchrun(command(toy, tmp_path / "wider", *args))) as run:
        good(run.finish())
    for name in ("narrower", "wider"):
        assert events(tmp_path / name, "resume")[0]["step"] == 8
        assert min(losses(tmp_path / name)) == 9
        for step, loss in losses(tmp_path / name).items():
            assert loss == pytest.approx(losses(one)[step], abs=1e-5)
        assert furthest(weights(one, 12), weights(tmp_path / name, 12)) < 1e-4


def test_two_machines_train_the_same_model_as_one(toy, one, tmp_path):
    port, args = free_port(), command(toy, tmp_path, *STEPS, "PHASES=train")
    nodes = [Started(torchrun(args, 1, "--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}")) for rank in (0, 1)]
    with nodes[0], nodes[1]:
        for node in nodes:
            good(node.finish())
    assert_same_training(one, tmp_path)


def test_ranks_that_cannot_share_the_batch_evenly_are_refused(toy, tmp_path):
    with Started(torchrun(command(toy, tmp_path), 3)) as run:
        done = run.finish()
    said = next(line for line in done.stderr.splitlines() if line.startswith("error"))
    assert done.returncode != 0 and all(word in said for word in ("TRAIN_BATCH_TOKENS=512", "8 sequences", "3 ranks"))
    assert "step:1/" not in done.stdout


@no_proc
def test_the_job_ends_when_one_rank_dies(toy, tmp_path):
    with Started(torchrun(command(toy, tmp_path, "ITERATIONS=1000000", "CHECKPOINT_EVERY=5"))) as run:
        run.until("checkpoint step:5 ")
        workers = {Path(f"/proc/{pid}/environ").read_bytes().split(b"\0RANK=")[-1][:1]: pid for pid in family(run.process.pid)
                   if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()}
        os.kill(workers[b"1"], signal.SIGKILL)
        began = time.monotonic()
        done = run.finish()
        assert time.monotonic() - began < 60
    assert done.returncode != 0
    assert "local_rank: 1" in done.stderr and "SIGKILL" in done.stderr, "the rank that died first is named"
    assert max(checkpoints(tmp_path)) % 5 == 0 and weights(tmp_path)
    assert not (tmp_path / "model.pg").exists()


def test_a_loss_that_is_not_finite_on_one_rank_ends_all(toy, tmp_path):
    """Rank 0 writes the checkpoints: what rank 1 found must reach it, or bad weights keep a good name."""
    source, line = SCRIPT.read_text(encoding="utf-8"), "return training.step, rt.to_cpu(loss)"
    assert source.count(line) == 1
    script = tmp_path / "train_gpt.py"
    script.write_text(source.replace(line, f"loss = loss / (rt.rank != 1 or training.step != 6)\n    {line}"), encoding="utf-8")
    args = command(toy, tmp_path / "out", *STEPS, "CHECKPOINT_EVERY=1")
    with Started([str(script) if word == str(SCRIPT) else word for word in torchrun(args)]) as run:
        done = run.finish()
    why = "the loss is not finite at step 6; last good checkpoint: checkpoint_0000004.pt"
    assert done.returncode != 0 and all(f"{who}: {why}" in done.stderr for who in ("error", "error (rank 1)"))
    assert list(checkpoints(tmp_path / "out")) == [4] and (tmp_path / "out/checkpoint_0000005.bad").exists()


def test_a_scheduler_that_ends_a_job_of_several_ranks_leaves_a_checkpoint(toy, one, tmp_path):
    args = command(toy, tmp_path, *STEPS, "ITERATIONS=100000", "CHECKPOINT_EVERY=0", "PHASES=train")
    with Started(torchrun(args)) as run:
        run.until("step:7/")
        run.signal(signal.SIGTERM)
        done = run.finish()
    assert done.returncode != 0
    (step,) = checkpoints(tmp_path)
    assert step >= 7 and f"interrupted by SIGTERM after step {step}" in done.stderr
    assert max(losses(tmp_path)) == step, "all ranks stopped after the same step"
