"""A trainer and a benchmark that take no time, and a folder in which tools/sweep.py sweeps with them."""

import json
import textwrap

from toy import write_shard

import sweep

# A run that takes no time. Its score is a function of settings and seed; some settings make it fail, lie or wait.
TRAINER = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
given = dict(word.split("=", 1) for word in sys.argv[1:])
def number(name, default):
    return float(given.get(name, default))
out = Path(given["OUT_DIR"])
ranks = int(os.environ.get("WORLD_SIZE", 1))
if os.environ.get("RANK", "0") != "0":
    sys.exit(0)
with open(Path(__file__).with_name("calls"), "a") as calls:
    calls.write(json.dumps([given, os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"), ranks])
                + "\\n")
print("step 1", flush=True)
if number("ADAM_EPS", 1e-8) == 0.5:
    print("error: the loss is not finite at step 3", file=sys.stderr)
    print("a word after the error", file=sys.stderr)
    sys.exit(4)
if number("ADAM_EPS", 1e-8) == 0.25:
    os.kill(os.getpid(), signal.SIGKILL)
if number("ADAM_EPS", 1e-8) == 0.125:
    def stopped(*_):
        (out / "checkpoint").touch()
        sys.exit(130)
    signal.signal(signal.SIGINT, stopped)
    Path(__file__).with_name("waiting").touch()
    while not Path(__file__).with_name("go").exists():
        time.sleep(0.02)
seed = int(given.get("SEED", 1337))
trained = given.get("PHASES") != "eval"
if trained:
    (out / "model.pg").write_text("an artifact")
else:
    assert Path(given["ARTIFACT"]).exists()
if "CHECKPOINT_EVERY" in given:
    (out / f"checkpoint_{int(given['ITERATIONS']):07d}.pt").write_text("weights")
if given.get("RESUME", "auto") != "auto":
    assert Path(given["RESUME"]).exists()
bpb = 2 + seed / 1e4 + number("MATRIX_LR", 0.025) * (1 + seed / 1e3) + 1 / number("ITERATIONS", 20000)
invalid = number("ADAM_EPS", 1e-8) == 0.0625
silent = number("ADAM_EPS", 1e-8) == 0.03125
summary = {"val_bpb": None if silent else bpb, "val_loss": 1.0, "valid": "no" if invalid else "yes",
           "reasons": ["a reason"] if invalid else [], "params": 1000, "device": "cpu", "train_seconds": 0.1,
           "settings": " ".join(sys.argv[1:]), "settings_hash": "x", "seed": seed,
           "code_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
if trained:
    summary |= {"steps": int(given["ITERATIONS"]), "model_bytes": 500 + int(given.get("EMBED_BITS", 8)),
                "total_bytes": 600}
(out / "summary.json").write_text(json.dumps(summary))
sys.exit(3 if summary.get("total_bytes", 0) > int(given.get("SIZE_LIMIT", 16000000)) else 0)
"""

# A benchmark whose time per step is that of a formula: proportional to the layers.
BENCH = """
import argparse, json, sys
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("words", nargs="+")
parser.add_argument("--against", nargs="*")
parser.add_argument("--modes")
parser.add_argument("--steps", type=int)
parser.add_argument("--repeats", type=int)
parser.add_argument("--json", type=Path)
args = parser.parse_intermixed_args()
sides = [dict(word.split("=", 1) for word in words) for words in (args.against, args.words[1:])]
with open(Path(__file__).with_name("bench_calls"), "a") as calls:
    calls.write(json.dumps([*sides, args.modes, args.steps]) + "\\n")
if any(side.get("SMEAR_GATE") == "none" for side in sides):
    sys.exit("error: no such machine")
pair = [10 * int(given.get("NUM_LAYERS", 11)) * (1.004 if "GRAD_CLIP_NORM" in given else 1) for given in sides]
row = {"mode": args.modes, "blocks": [[pair] * args.steps]}
if any(side.get("MLP_MULT") == "2.0" for side in sides):
    row["error"] = row.pop("blocks")
args.json.write_text(json.dumps({"rows": [row]}))
"""


class Bench:
    """A folder with a base, stubs and what they saw; call() is the command, in this process."""

    def __init__(self, folder):
        self.folder = folder
        for split in ("train", "val"):
            write_shard(folder / f"fineweb_{split}_000000.bin", [1] * 100)
        (folder / "tokenizer.model").write_text("a tokenizer")
        self.base = folder / "base.env"
        self.base.write_text(f"DATA_PATH={folder}\nMAX_WALLCLOCK_SECONDS=9 SEED=5 COMPRESSOR=zlib DEVICE=cpu\n"
                             "NUM_LAYERS=4 VE_LAYERS=2,3 TRAIN_BATCH_TOKENS=2048\n"
                             "FIT=off MATRIX_QUANT=gptq_lite EMBED_QUANT=gptq_lite\n")
        self.trainer, self.bench = folder / "stub.py", folder / "bench.py"
        self.trainer.write_text(TRAINER)
        self.bench.write_text(BENCH)

    def plan(self, text):
        path = self.folder / "plan.txt"
        path.write_text(textwrap.dedent(text))
        return path

    def call(self, *words):
        """(exit code, result or None)"""
        answer = self.folder / "result.json"
        answer.unlink(missing_ok=True)
        words = [*map(str, words), "--base", f"@{self.base}", "--out", str(self.folder / "out"), "--json", str(answer)]
        code = sweep.main(words, trainer=self.trainer, bench=self.bench)
        return code, json.loads(answer.read_text()) if answer.exists() else None

    def calls(self, name="calls"):
        """What the stub was called with since the last question."""
        path = self.folder / name
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


def named(result):
    return {row["name"]: row for row in result["rows"]}


def stub_score(lr, seed, steps):
    """The score of a run of the stub, by the formula that stands in it."""
    return 2 + seed / 1e4 + lr * (1 + seed / 1e3) + 1 / steps
