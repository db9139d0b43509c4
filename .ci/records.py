"""Runs the small version of every record to its final score: `python .ci/records.py [WORD ...]`, of those with such a
word in their name. What must come out is in each README and in the table of records/README.md: is the score valid, and
which condition does it break? Two at a time, each on one core: so small a model gains little from a second one.
"""

import contextlib
import json
import os
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


def run(folder):
    """(the summary of the small run, its seconds)."""
    out, began = ROOT / "logs" / f"ci-{Path(folder).name}", time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    limited = ["timeout", "--kill-after=60", "1500"]  # seconds: four times what the longest takes on a slow machine
    done = subprocess.run([*limited, "bash", "run.sh", f"records/{folder}", "--small", f"OUT_DIR={out}"], cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, check=False, text=True)
    assert done.returncode == 0, f"{folder}: exit code {done.returncode}\n{done.stdout[-3000:]}"
    word, _, text = (out / "train.log").read_text(encoding="utf-8").splitlines()[-1].partition(" ")
    assert word == "summary", f"{folder}: the last line of the log is no summary: {word} {text[:200]}"
    return json.loads(text), time.monotonic() - began


def main(words):
    if records.main(["--check"]):
        sys.exit("records/README.md and the folders differ")
    chosen = [record for record in records.read_records() if not words or any(word in record.folder for word in words)]
    # The data that several need, before two find at the same time that it is missing.
    subprocess.run([sys.executable, "data/prepare.py", "--source", "builtin", "--caseops", "--out",
                    "data/datasets/builtin_sp1024_caseops"], cwd=ROOT, check=True)
    # A wrong verdict ends it at once: closing the runs cancels those that wait.
    folders = [record.folder for record in chosen]
    with ThreadPoolExecutor(2) as pool, contextlib.closing(pool.map(run, folders)) as runs:
        for record, (summary, seconds) in zip(chosen, runs):
            print(f"{Path(record.folder).name:68} {summary['val_bpb']:.4f} valid:{summary['valid']} {seconds:.0f} s",
                  *summary["reasons"], sep="\n    ", flush=True)
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
