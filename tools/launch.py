"""Decide what `bash run.sh` trains, and print it as assignments for the shell.

    python tools/launch.py [--small] [@FILE ...] [KEY=VALUE ...]

The trainer itself reads the settings, so run.sh and the run cannot disagree about one. Settings that the trainer would
refuse are refused here, in its words and with exit code 2, before anything is made.
"""

import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

from common import exit_code, load_trainer, trainer_errors
from shrink import sizes

DEMO = "@records/small.env"
EMBEDDED = "data/datasets/builtin_sp1024"  # run.sh makes it
FULL_SIZE = 384  # a MODEL_DIM from which two CPU cores need hours


def usable_gpus(notes):
    """Number of GPUs that torch can use; a note if the machine has one that torch cannot use."""
    try:
        subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    from torch import cuda

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = cuda.device_count() if cuda.is_available() else 0
    if not count:
        notes.append("there is a GPU, but this torch cannot use it (its build or the driver): using the CPU")
    return count


def choose_record(files, pairs, small, env, notes):
    """(arguments of the trainer, end of the run's name, GPUs) of the settings files or records that were asked for."""
    path = Path(files[0].removeprefix("@"))
    name = (path.parent if path.name == "settings.env" else path).name.removesuffix(".env")
    if small:
        pairs = [*(f"{key}={value}" for key, value in sizes([*files, *pairs], env).items()), *pairs]
        name += "-small"
    settings = load_trainer().Settings.parse([*files, *pairs], env)
    gpus = 0 if settings.device == "cpu" else usable_gpus(notes)
    if not gpus and not small and settings.model_dim >= FULL_SIZE:
        notes.append("no GPU: this is the full-size model, far too slow for a CPU; add --small for a size that fits")
    return [*files, *pairs], name, gpus


def choose_default(pairs, small, env, notes):
    """The same of the demo, or with a GPU of the real size: on FineWeb where it is prepared, else the embedded text."""
    given = dict(pair.partition("=")[::2] for pair in pairs)
    device = given.get("DEVICE", env.get("DEVICE"))  # a wrong value is left to the trainer
    gpus = 0 if device == "cpu" else usable_gpus(notes)
    if small or not gpus:
        if not small:
            notes.append("no GPU: training the small model of records/small.env on the embedded text")
        return [DEMO, *pairs], "small", gpus
    settings = load_trainer().Settings
    fineweb = settings().data_path
    is_prepared = all(any(Path(fineweb).glob(f"fineweb_{split}_*.bin")) for split in ("train", "val"))
    if settings.parse(pairs, env).data_path == fineweb and not is_prepared:
        notes.append("FineWeb is not prepared: training on the embedded text; "
                     f"to get it: {sys.executable} data/fineweb.py --variant sp1024")
        pairs = [f"DATA_PATH={EMBEDDED}", *pairs]
    return pairs, "default", gpus


def main(words, env):
    if {"-h", "--help"} & set(words):
        print(__doc__.strip())
        return 0
    small = "--small" in words
    files = [word for word in words if word.startswith("@")]
    pairs = [word for word in words if word != "--small" and not word.startswith("@")]
    notes = []  # what the user should know about the choice
    with trainer_errors():
        chosen = choose_record(files, pairs, small, env, notes) if files else choose_default(pairs, small, env, notes)
        arguments, name, gpus = chosen
        settings = load_trainer().Settings.parse(arguments, env)
    answer = {"arguments": arguments, "notes": notes, "name": name, "gpus": gpus, "data_path": settings.data_path,
              "out_dir": settings.out_dir, "run_id": settings.run_id}
    for variable, value in answer.items():
        text = f"({shlex.join(value)})" if isinstance(value, list) else shlex.quote(str(value))
        sys.stdout.buffer.write(os.fsencode(f"{variable}={text}\n"))  # a path may have bytes that are not UTF-8
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:], os.environ)))
