"""The helpers of the tests: nothing is left behind, the reference draws every setting, the quick tests exist."""

import ast
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import reference as ref
from process import REPO, clean_env
from runs import heard

import train_gpt as tg

# A process like pytest, and what it has started: a child in a session of its own that starts a child, too.
PARENT = """
import subprocess, sys, time
sys.path.insert(0, {help!r})
import guard, process
kept = guard.watch()
child = "import subprocess; subprocess.Popen(['sleep', '600']).wait()"
print(subprocess.Popen([sys.executable, "-c", child], env=process.clean_env(), start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def alive(pid):
    """Is it running, or waiting, rather than dead and not yet collected?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the guard needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_tests(number):
    words = [sys.executable, "-c", PARENT.format(help=str(REPO / "tests/help"))]
    with subprocess.Popen(words, env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=heard) as parent:
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(number)
    end = time.monotonic() + 30
    while alive(child):
        assert time.monotonic() < end, f"process {child} is still running"
        time.sleep(0.05)


def test_temporary_files_lie_in_the_folder_of_pytest(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    assert Path(os.environ["TMPDIR"]).parent == base and clean_env()["TMPDIR"] == os.environ["TMPDIR"]


def test_the_reference_draws_every_setting_of_the_model():
    """Otherwise the model would be compared with the reference at the default of a new setting only."""
    text = Path(ref.__file__).read_text(encoding="utf-8")
    (models,) = [node for node in ast.parse(text).body if getattr(node, "name", "") == "models"]
    source = ast.get_source_segment(text, models)
    missing = [f.name for f in fields(tg.Settings) if f.metadata["group"] == "Model" and f"{f.name}=" not in source
               and f'["{f.name}"]' not in source and f.name not in NOT_DRAWN]
    assert not missing, (
        f"models() in tests/help/reference.py never draws {', '.join(map(str.upper, missing))}: draw it there, and write "
        f"its formula into the forward of that file")


NOT_DRAWN = {  # of these the forward knows nothing but the initial values
    "tied_embed_init_std", "qk_gain_init",
    "enable_looping_at"}  # a fraction of the training


def test_the_quick_tests_exist():
    for line in (REPO / "tests/quick.txt").read_text().splitlines():
        path, _, name = line.partition("::")
        tree = ast.parse((REPO / path).read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in names or not name, f"tests/quick.txt: {path} has no {name}"
