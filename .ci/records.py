"""Runs the small version of every record to its final score: `python .ci/records.py [WORD ...]`, of those with such a
word in their name. What must come out is in the table of records/README.md: is the score valid, and what does it break?
Two at a time, each on one core: so small a model gains little from a second one.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| [^|]+ \| \[[^]]+\]\((\S+)/\) \|(?: [^|]+ \|)* (yes|no) \| (C\d|-)", re.M)


def expected():
    """{folder: (valid, the condition that is broken)}"""
    rows = {folder: said for folder, *said in ROW.findall((ROOT / "records/README.md").read_text(encoding="utf-8"))}
    folders = {path.parent.relative_to(ROOT / "records").as_posix() for path in ROOT.glob("records/*/*/settings.env")}
    assert rows.keys() == folders, f"records/README.md and the folders differ: {rows.keys() ^ folders}"
    return rows


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
    chosen = {folder: said for folder, said in expected().items() if not words or any(word in folder for word in words)}
    # The data that several need, before two find at the same time that it is missing.
    subprocess.run([sys.executable, "data/prepare.py", "--source", "builtin", "--caseops", "--out",
                    "data/datasets/builtin_sp1024_caseops"], cwd=ROOT, check=True)
    # A wrong verdict ends it at once: closing the runs cancels those that wait.
    with ThreadPoolExecutor(2) as pool, contextlib.closing(pool.map(run, chosen)) as runs:
        for (folder, (valid, broken)), (summary, seconds) in zip(chosen.items(), runs):
            print(f"{Path(folder).name:68} {summary['val_bpb']:.4f} valid:{summary['valid']} {seconds:.0f} s",
                  *summary["reasons"], sep="\n    ", flush=True)
            assert summary["valid"] == valid, f"the table says valid:{valid}"
            assert bool(summary["reasons"]) == (valid == "no"), "a score is invalid if there is a reason, and only then"
            named = [reason for reason in summary["reasons"] if reason.startswith(broken)]
            # What else its self-test finds follows from that.
            assert named or valid == "yes", f"the table says {broken}"
            assert 0.3 < summary["val_bpb"] < 3, "no score of a trained model; an untrained one has 3.7"


if __name__ == "__main__":
    main(sys.argv[1:])
