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
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

from common import exit_code, load_trainer, trainer_errors
from shrink import sizes

DEMO = "@records/small.env"
EMBEDDED = "data/datasets/builtin_sp1024"  # run.sh makes it
FULL_SIZE = 384  # a MODEL_DIM from which two CPU cores need hours


class Launch(NamedTuple):
    arguments: list  # of train_gpt.py
    name: str  # ends the name of the run
    gpus: int
    notes: list  # what the user should know about the choice


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


def wants_cpu(pairs, env):
    """Whether these settings say DEVICE=cpu. A wrong value is left to the trainer."""
    values = [env.get("DEVICE", "auto")]
    values += [pair.partition("=")[2] for pair in pairs if pair.startswith("DEVICE=")]
    return values[-1] == "cpu"


def has_shards(folder):
    return all(any(Path(folder).glob(f"fineweb_{split}_*.bin")) for split in ("train", "val"))


def record_name(file):
    """The name of a record's folder, or of a settings file."""
    path = Path(file.removeprefix("@"))
    if path.name == "settings.env":
        path = path.parent
    return path.name.removesuffix(".env")


def launch_record(files, pairs, small, env):
    """A settings file or record that was asked for, at its own size or at the small one."""
    name = record_name(files[0])
    notes = []
    if small:
        reduced = [f"{key}={value}" for key, value in sizes([*files, *pairs], env).items()]
        pairs = [*reduced, *pairs]
        name += "-small"
    settings = load_trainer().Settings.parse([*files, *pairs], env)
    gpus = 0 if settings.device == "cpu" else usable_gpus(notes)
    if not gpus and not small and settings.model_dim >= FULL_SIZE:
        notes.append("no GPU: this is the full-size model, far too slow for a CPU; "
                     "add --small for a size that fits")
    return Launch([*files, *pairs], name, gpus, notes)


def launch_default(pairs, small, env):
    """The demo, or with a GPU the real size: on FineWeb where it is prepared, else on the embedded text."""
    notes = []
    gpus = 0 if wants_cpu(pairs, env) else usable_gpus(notes)
    if small:
        return Launch([DEMO, *pairs], "small", gpus, notes)
    if not gpus:
        notes.append("no GPU: training the small model of records/small.env on the embedded text")
        return Launch([DEMO, *pairs], "small", gpus, notes)
    settings = load_trainer().Settings
    fineweb = settings().data_path
    if settings.parse(pairs, env).data_path == fineweb and not has_shards(fineweb):
        notes.append("FineWeb is not prepared: training on the embedded text; "
                     f"to get it: {sys.executable} data/fineweb.py --variant sp1024")
        pairs = [f"DATA_PATH={EMBEDDED}", *pairs]
    return Launch(pairs, "default", gpus, notes)


def assignments(launch, settings):
    """Lines that a shell evaluates."""
    lists = {"arguments": launch.arguments, "notes": launch.notes}
    texts = {"name": launch.name, "gpus": str(launch.gpus), "data_path": settings.data_path,
             "out_dir": settings.out_dir, "run_id": settings.run_id}
    for variable, words in lists.items():
        yield f"{variable}=({shlex.join(words)})"
    for variable, text in texts.items():
        yield f"{variable}={shlex.quote(text)}"


def main(words, env):
    if {"-h", "--help"} & set(words):
        print(__doc__.strip())
        return 0
    small = "--small" in words
    files = [word for word in words if word.startswith("@")]
    pairs = [word for word in words if word != "--small" and not word.startswith("@")]
    with trainer_errors():
        launch = launch_record(files, pairs, small, env) if files else launch_default(pairs, small, env)
        settings = load_trainer().Settings.parse(launch.arguments, env)
    text = "".join(f"{line}\n" for line in assignments(launch, settings))
    sys.stdout.buffer.write(os.fsencode(text))  # a path may have bytes that are not UTF-8
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:], os.environ)))
