"""How fast the trainer is on this machine: milliseconds, tokens per second, memory and share of the device's peak; what
each way of storing a model costs in bytes and in loss, and each way of scoring it in time; which scores are none.

    python tools/bench.py train                                      the default settings, eager and compiled
    python tools/bench.py train @records/small.env NUM_LAYERS=6      any settings, as train_gpt.py takes them
    python tools/bench.py train --modes compiled --steps 50 --repeats 3 --json step.json
    python tools/bench.py train @records/small.env NORMUON=1 --against @records/small.env     their steps in turn
    torchrun --standalone --nproc_per_node=8 tools/bench.py train --modes compiled            also with --against
    python tools/bench.py pack model.pg DATA_PATH=... --score        codecs and compressors on the weights of a
                                                                     float16 artifact
    python tools/bench.py eval model.pg @records/small.env           every predictor: tokens/s, forwards, memory,
                                                                     score; n-gram counts alone
    python tools/bench.py validity                                   published scores that are no code length, next to
                                                                     what is left of them when they are made one

`python tools/bench.py train --help`, `pack --help`, ... have every option. train needs no data set: synthetic shards
are written to a temporary folder and read by the trainer's own loader. The folder benchmarks/ has a module for each
command.

--json FILE of any command has command, settings, commit, torch, machine, rows and whether they are complete, and is
written anew after each row. A command that is stopped prints the rows so far.

Exit codes: 0 done, 1 a row failed (it says why, the others are kept), 2 bad input, 130 and 143 interrupted.
"""

import importlib
import os
import shlex
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

from common import BadInput, check_output, exit_code, trainer_errors

# The module of each command, in benchmarks/: only the one that is asked for is imported, because torch takes seconds.
COMMANDS = {"train": "training", "pack": "packing", "eval": "evaluation", "validity": "validity"}


def write_shards(folder, tokens, vocab_size):
    """The synthetic shards of `train`, for who counts a step by other means: two of them, of `tokens` in all, in
    `folder`.
    """
    from benchmarks import training

    training.write_shards(folder, tokens, vocab_size)


def main(argv):
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    return exit_code(partial(command, argv), quiet=os.environ.get("RANK", "0") != "0")


def command(argv):
    """Run a command: its module has arguments(words), and run(args), which returns a Report. Returns the exit code."""
    if argv[:1] == ["--job"]:
        from benchmarks.harness import run_job

        return run_job(argv[1])
    if not argv or argv[0] not in COMMANDS:
        wrong = f"{argv[0]!r} is no command" if argv else "a command is missing"
        raise BadInput(f"{wrong}; there is: {', '.join(COMMANDS)}; see bench.py --help")
    module = importlib.import_module(f"benchmarks.{COMMANDS[argv[0]]}")
    args = module.arguments(argv[1:])
    check_output("--json", args.json)
    args.command = shlex.join(["tools/bench.py", *argv])
    with trainer_errors(), tempfile.TemporaryDirectory(prefix="bench_") as args.folder:
        return module.run(args).code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder is removed
    sys.exit(main(sys.argv[1:]))
