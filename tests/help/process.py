"""The repository, an environment without settings in it, and the trainer as a process of its own.

    from process import REPO, run_trainer

    def test_something(toy, tmp_path):
        done = run_trainer([*toy, f"OUT_DIR={tmp_path}", "ITERATIONS=3"])
        assert done.returncode == 0, done.stderr
"""

import os
import subprocess
import sys
from pathlib import Path

import guard

REPO = Path(__file__).resolve().parents[2]


def clean_env(env=None):
    """The environment without anything that could be a setting: only what a process needs to run, then `env`."""
    keep = ("PATH", "HOME", "LANG", "LC_", "TMPDIR", "LD_", "DYLD_", "CUDA_", "NVIDIA_", "TORCH", "TRITON", "OMP_",
            "MKL_", "VIRTUAL_ENV", "PYENV", guard.MARK)
    kept = {name: value for name, value in os.environ.items() if name.startswith(keep)}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}


def run_trainer(args, env=None, cwd=REPO, timeout=120, script=REPO / "train_gpt.py"):
    """train_gpt.py with these arguments: a CompletedProcess with returncode, stdout and stderr (text)."""
    return subprocess.run([sys.executable, str(script), *map(str, args)], env=clean_env(env), cwd=cwd, timeout=timeout,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
