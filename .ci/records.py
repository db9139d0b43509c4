"""Runs the small version of every record, with fewer steps and targets, to its final score:

    python .ci/records.py [WORD ...]                 only those with such a word in their name
    python .ci/records.py --seconds N [WORD ...]     begin none after N seconds less what the longest took; say which

What must come out is in each README and in the table of records/README.md: is the score valid, and which condition does
it break? And once more by the trainer cut down to that record, with the same losses, artifact and score to the bit. Two
at a time, each on one core: so small a model gains little from a second one.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Before the folder of this file, which has the name records, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import records
from common import ROOT

# Less than --small has: neither a verdict nor a comparison needs more.
SIZES = ("ITERATIONS=50", "VAL_TOKENS=8192")
SAME = ("steps", "artifact_sha256", "model_bytes", "val_bpb", "val_loss", "val_tokens", "val_bytes", "valid", "tests")


def run(folder):
    """(the summary of the small run, its seconds, lines of the script cut down to the record, its seconds)."""
    out = ROOT / "logs" / f"ci-{Path(folder).name}"
    shutil.rmtree(out, ignore_errors=True)
    seconds = call("bash", "run.sh", f"records/{folder}", "--small", *SIZES, f"OUT_DIR={out}")
    summary = summary_of(out)
    script = out.with_name(f"{out.name}-cut.py")
    # All that the run changed, and nothing of the record that the small sizes set back to its default.
    settings = out.with_name(f"{out.name}.env")
    pairs = [pair for pair in shlex.split(summary["settings"]) if not pair.startswith("OUT_DIR=")]
    settings.write_text(shlex.join(pairs))
    call(sys.executable, "tools/submit.py", "specialise", str(settings), "-o", str(script))
    cut = out.with_name(f"{out.name}-cut")
    shutil.rmtree(cut, ignore_errors=True)
    seconds_cut = call(sys.executable, str(script), f"OUT_DIR={cut}")
    for what in SAME:
        assert summary[what] == summary_of(cut)[what], f"{script}: another {what}: {summary_of(cut)[what]}"
    assert losses(out) == losses(cut), f"{script}: other losses"
    assert causes(summary) == causes(summary_of(cut)), f"{script}: other reasons: {summary_of(cut)['reasons']}"
    return summary, seconds, script.read_text().count("\n"), seconds_cut


def call(*command):
    """Run a command on one core; its seconds."""
    began = time.monotonic()
    limited = ["timeout", "--kill-after=60", "1500"]  # seconds: four times what the longest takes on a slow machine
    done = subprocess.run([*limited, *command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-3000:]}"
    return time.monotonic() - began


def summary_of(out):
    word, _, text = (out / "train.log").read_text(encoding="utf-8").splitlines()[-1].partition(" ")
    assert word == "summary", f"{out}: the last line of the log is no summary: {word} {text[:200]}"
    return json.loads(text)


def losses(out):
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(event["step"], event["train_loss"]) for event in events if event["event"] == "train"]


def causes(summary):
    """The reasons of an invalid score, without what depends on the places that are drawn anew in each run."""
    return [re.sub(r"[\d.]+(e[+-]\d+)?", "", reason) for reason in summary["reasons"] if "sampled" not in reason]


class Clock:
    """Begins no record that might not end in time: on a machine that is slow today, CI ends all the same."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds
        self.longest = 0.0

    def run(self, folder):
        """run(folder), or None for want of time."""
        began = time.monotonic()
        if began + self.longest > self.end:
            return None
        result = run(folder)
        self.longest = max(self.longest, time.monotonic() - began)
        return result


def main(words):
    seconds = float("inf")
    if words[:1] == ["--seconds"]:
        seconds = float(words[1])
        words = words[2:]
    clock = Clock(seconds)
    if records.main(["--check"]):
        sys.exit("records/README.md and the folders differ")
    chosen = [record for record in records.read_records() if not words or any(word in record.folder for word in words)]
    # The data that several need, before two find at the same time that it is missing.
    subprocess.run([sys.executable, "data/prepare.py", "--source", "builtin", "--caseops", "--out",
                    "data/datasets/builtin_sp1024_caseops"], cwd=ROOT, check=True)
    # A wrong verdict ends it at once: closing the runs cancels those that wait.
    folders = [record.folder for record in chosen]
    with ThreadPoolExecutor(2) as pool, contextlib.closing(pool.map(clock.run, folders)) as runs:
        for record, found in zip(chosen, runs):
            if found is None:
                print(f"!!!! NOT RUN for want of time: {record.folder}", flush=True)
                continue
            summary, seconds, lines, seconds_cut = found
            print(f"{Path(record.folder).name:68} {summary['val_bpb']:.4f} valid:{summary['valid']} {seconds:.0f} s, "
                  f"the same by {lines} lines {seconds_cut:.0f} s", *summary["reasons"], sep="\n    ", flush=True)
            valid = "yes" if record.valid else "no"
            assert summary["valid"] == valid, f"the table says valid:{valid}"
            assert bool(summary["reasons"]) == (not record.valid), (
                "a score is invalid if there is a reason, and only then")
            named = [reason for reason in summary["reasons"] if reason.startswith(tuple(record.broken_conditions))]
            # What else its self-test finds follows from that.
            assert named or record.valid, f"the table says {record.broken_conditions}"
            assert 0.3 < summary["val_bpb"] < 3, "no score of a trained model; an untrained one has 3.7"


if __name__ == "__main__":
    main(sys.argv[1:])
