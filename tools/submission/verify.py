"""`submit.py verify`: score the artifact of a submission again, by the folder's own script."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from common import BadInput, Parser, sha256, whole
from reports.reading import last, read_events
from submission.logs import pairs_of
from submission.manifest import SEED_RESULT
from submission.recipe import PATHS, experiment_of, script_words
from submission.runs import shown, source_of, summary_of
from submission.stats import read_json

HELP = """\
Load model.pg by the train_gpt.py of a submission's folder, in a process of its own, score it, and compare everything
with submission.json and the log of that seed. On the same kind of machine (device, ranks, torch, attention kernel, type
of the activations, threads) every digit must be the same; on another one the score may differ by 0.0005 BPB. The
script of the folder is executed. Exit code 0: the same; 1: not the same; 2: it cannot be scored.
"""
# Other kernels round otherwise, and test-time training carries that on: bfloat16 in place of float32 moved two scores
# of 2,099 tokens with document adapters by 0.00002 and 0.00006 BPB (toy runs on a CPU). This is a quarter of the least
# margin of a record (0.0019 BPB with sp8192); training one seed twice moves a score by 0.00045 (#1868).
TOLERANCE = 0.0005  # BPB
LONGEST_ERROR = 400  # characters
# Keys of a summary that are compared: all of them have to be the same, the scores within the tolerance.
COMPARED = ("val_bpb", "val_loss", "val_tokens", "val_bytes", "valid", "code_bytes", "model_bytes", "code_sha256",
            "artifact_sha256", "val_sha256", "tokenizer_sha256")
MACHINE = ("world_size", "device", "torch", "attention", "dtype", "compile", "threads")  # what decides about rounding
# Settings that may differ: of the run and of the machine.
OF_A_RUN = PATHS | {"RUN_ID", "OUT_DIR", "PHASES", "ARTIFACT", "RESUME", "CHECKPOINT_EVERY", "TRAIN_LOG_EVERY",
                    "VAL_LOSS_EVERY", "DEVICE", "DTYPE", "COMPILE", "ATTENTION", "KERNELS", "STRICT_ENV"}


class Row(NamedTuple):
    """A line of the table: what was said in the log and in submission.json, what was found, and whether it agrees."""

    name: str
    logged: object
    declared: object  # None where submission.json does not say it
    found: object
    same: bool


class Seed(NamedTuple):
    """What a folder says of the run whose artifact is scored."""

    log: bytes
    summary: dict
    declared: dict  # {key of the summary: value in submission.json}


# ---- what the folder says -------------------------------------------------------------------------------------------


def seed_of(folder, artifact, number):
    """The Seed with this number, or the one whose artifact this is. Logs count that this trainer wrote."""
    seeds = {}
    for path in sorted(folder.glob("train_seed*.log")):
        log = path.read_bytes()
        summary = summary_of(log)
        if summary and "artifact_sha256" in summary:
            seeds[summary["seed"]] = log, summary
    if not seeds:
        raise BadInput(f"{folder}: no train_seed*.log ends with the summary of this trainer, and only its scripts can "
                       "be asked to score an artifact")
    known = ", ".join(map(str, sorted(seeds)))
    if number is None:
        digest = sha256(artifact)
        number = next((seed for seed, (_, summary) in seeds.items() if summary["artifact_sha256"] == digest), None)
        if number is None:
            raise BadInput(f"{artifact} (SHA-256 {digest}) is the artifact of no seed in {folder}: give the one that a "
                           f"run wrote, or name the seed to compare it with by --seed, one of {known}")
    if number not in seeds:
        raise BadInput(f"{folder} has no log of seed {number}; there is: {known}")
    fields = read_json(folder / "submission.json")
    result = fields.get("seed_results", {}).get(str(number), {})
    of_seed = {key: result.get(name) for name, key in SEED_RESULT.items()}
    return Seed(*seeds[number], fields | of_seed)


def header_of(log):
    """{key: value} of the lines `run` and `choice` of a log: the machine, and what was chosen on it."""
    text = log.decode("utf-8", "replace")
    body = text[len(source_of(log)):]
    found = {}
    for line in re.findall(r"^(?:run|choice) .*$", body, re.MULTILINE):
        found |= dict(re.findall(r'(\w+):("(?:[^"\\]|\\.)*"|\S*)', line))
    return found


# ---- scoring --------------------------------------------------------------------------------------------------------


def score(folder, seed, artifact, pairs, out_dir):
    """Score the artifact by the folder's script; what it wrote is in out_dir."""
    script = folder / "train_gpt.py"
    logged = experiment_of(script, script_words(shlex.split(seed.summary["settings"]))).words
    words = [*logged, *pairs, "PHASES=eval", f"ARTIFACT={artifact}", f"OUT_DIR={out_dir}"]
    last_of_each = {word.partition("=")[0]: word for word in words}
    command = [*launcher(seed.summary["world_size"]), str(script), *last_of_each.values()]
    print(f"verify command:{shlex.join(command)}", file=sys.stderr, flush=True)
    # A group of its own, so that the ranks of torchrun end with it.
    process = subprocess.Popen(command, env=environment(seed), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        errors = process.communicate()[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not (out_dir / "summary.json").is_file():
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        reason = next((line for line in lines if line.startswith("error")), lines[-1])[:LONGEST_ERROR]
        raise BadInput(f"{folder}/train_gpt.py did not score {artifact} ({reason}); add the settings that this machine "
                       "needs, such as DATA_PATH=...")


def launcher(ranks):
    """As many ranks as the run had, where this machine has a GPU for each; else one process."""
    if ranks > 1:
        from torch import cuda

        if cuda.device_count() >= ranks:
            return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable]


def environment(seed):
    """The environment without names in capitals that could be settings, since the run's own are arguments; with the
    number of threads that the run had on a CPU, which decides how sums are rounded.
    """
    kept = ("PATH", "HOME", "LANG", "LC_", "TMPDIR", "LD_", "DYLD_", "CUDA_", "NVIDIA_", "NCCL_", "TORCH", "TRITON",
            "OMP_", "MKL_", "VIRTUAL_ENV", "PYTHON", "XDG_", "USER")
    names = {name: value for name, value in os.environ.items() if name.startswith(kept) or not name.isupper()}
    threads = header_of(seed.log).get("threads")
    if seed.summary["device"] == "cpu" and threads:
        names["OMP_NUM_THREADS"] = threads
    return names


# ---- the comparison -------------------------------------------------------------------------------------------------


def compare(folder, seed, artifact, out_dir, tolerance):
    """The Rows of the table; tolerance is in BPB."""
    found = json.loads((out_dir / "summary.json").read_text(encoding="utf-8"))
    script = folder / "train_gpt.py"
    events = read_events(out_dir / "metrics.jsonl")[0]
    found |= {"code_bytes": script.stat().st_size, "code_sha256": sha256(script), "artifact_sha256": sha256(artifact),
              "model_bytes": artifact.stat().st_size, "tokenizer_sha256": last(events, "tokenizer")["sha256"]}
    in_nats = tolerance * math.log(2) * found["val_bytes"] / found["val_tokens"]
    allowed = {"val_bpb": tolerance, "val_loss": in_nats}
    rows = []
    for key in COMPARED:
        said = seed.summary.get(key), seed.declared.get(key)
        same = [agree(value, found.get(key), allowed.get(key, 0)) for value in said if value is not None]
        rows.append(Row(key, *said, found.get(key), bool(same) and all(same)))
    logged, scored = (pairs_of(settings) for settings in (seed.summary["settings"], found["settings"]))
    names = {*logged, *scored} - OF_A_RUN
    changes = [f"{name}={scored.get(name)}" for name in sorted(names) if logged.get(name) != scored.get(name)]
    rows.append(Row("settings", f"{len(logged.keys() - OF_A_RUN)} changed", None, ", ".join(changes) or "the same",
                    not changes))
    return rows


def agree(said, found, allowed):
    """Are two values equal, or two numbers within what is allowed?"""
    if isinstance(said, float) and isinstance(found, float):
        return abs(said - found) <= allowed
    return said == found


def lines(rows, is_same, tolerance, machines):
    """The table and what it means, line by line."""
    yield f"{'':<18}{'log':<24}{'submission.json':<24}{'found':<24}"
    for row in rows:
        values = "".join(f"{'-' if value is None else str(shown(value)):<24}" for value in row[1:4])
        yield f"{row.name:<18}{values}{'same' if row.same else 'NOT THE SAME'}"
    if tolerance:
        yield f"another kind of machine ({machines}): the score may differ by {tolerance} BPB"
    else:
        yield "the same kind of machine: every digit counts"
    yield f"verdict: {'the same' if is_same else 'not the same'}"


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments(argv):
    parser = Parser(prog="submit.py verify", description=HELP)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a submission's folder")
    parser.add_argument("pairs", metavar="KEY=VALUE", nargs="*", help="settings of this machine: DATA_PATH=...")
    parser.add_argument("--artifact", metavar="FILE", type=Path, help="default: model.pg in DIR")
    parser.add_argument("--seed", metavar="N", type=whole(0), help="default: the seed whose artifact it is")
    return parser.parse_intermixed_args(argv)


def run(args):
    artifact = args.artifact or args.folder / "model.pg"
    if not args.folder.is_dir():
        raise BadInput(f"{args.folder}: no such folder; give that of a submission")
    if not artifact.is_file():
        raise BadInput(f"{artifact}: no such file; name the model.pg that a run wrote with --artifact")
    if not (args.folder / "train_gpt.py").is_file():
        raise BadInput(f"{args.folder} has no train_gpt.py to score the artifact with")
    for pair in args.pairs:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", pair):
            raise BadInput(f"{pair!r} is not KEY=VALUE")
    seed = seed_of(args.folder, artifact, args.seed)
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        out_dir = Path(scratch) / "run"
        score(args.folder, seed, artifact.resolve(), args.pairs, out_dir)
        logged = header_of(seed.log)
        found = header_of((out_dir / "train.log").read_bytes())
        is_same_machine = all(logged.get(key) == found.get(key) for key in MACHINE)
        tolerance = 0.0 if is_same_machine else TOLERANCE
        rows = compare(args.folder, seed, artifact, out_dir, tolerance)
    is_same = all(row.same for row in rows)
    machines = f"log: {machine(logged)}; here: {machine(found)}"
    print("\n".join(lines(rows, is_same, tolerance, machines)), flush=True)
    return 0 if is_same else 1


def machine(header):
    """A machine in words."""
    return ", ".join(f"{key} {header.get(key, '?').strip(chr(34))}" for key in MACHINE)
