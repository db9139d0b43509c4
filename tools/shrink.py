"""The sizes at which `bash run.sh RECORD --small` runs a record, as KEY=VALUE, a line each.

    python tools/shrink.py @records/track_10min_16mb/2026-03-17_NaiveBaseline [KEY=VALUE ...]

records/shrink.env has them all. Those of a technique that the record leaves out are left out too: nothing is switched
on, and nothing is set that has no effect. The small.env of a record's folder goes before, a variable of the environment
or a KEY=VALUE before that.
"""

import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

from common import ROOT, exit_code, load_trainer, trainer_errors

SHRINK = ROOT / "records/shrink.env"
OFF_AT_0 = ("EVAL_STRIDE", "PHASED_TTT_PREFIX_DOCS")  # a record that sets one of these to 0 leaves that technique out


def read(path):
    """{setting: value} of a settings file."""
    words = shlex.split(path.read_text(encoding="utf-8"), comments=True)
    return dict(word.split("=", 1) for word in words)


def sizes(args, env=None):
    """{setting: value} to be laid over these arguments of the trainer, of which at least one is an @file."""
    parse = load_trainer().Settings.parse
    files = [arg for arg in args if arg.startswith("@")]
    pairs = [arg for arg in args if not arg.startswith("@")]
    record = parse(files)
    small = read(SHRINK)
    for file in files:
        own = Path(file[1:].removesuffix("settings.env")) / "small.env"
        small |= read(own) if own.is_file() else {}
    off = [name for name in OFF_AT_0 if not getattr(record, name.lower())]
    small = {name: value for name, value in small.items() if name not in (*off, *(env or ()))}
    idle = parse([*files, *(f"{name}={value}" for name, value in small.items()), *pairs], env).idle()
    return {name: value for name, value in small.items() if name not in idle}


def main(args):
    if {"-h", "--help"} & set(args):
        print(__doc__.strip())
        return 0
    with trainer_errors():
        small = sizes(args, os.environ)
    for name, value in small.items():
        print(f"{name}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
