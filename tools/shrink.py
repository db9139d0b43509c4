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

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:  # python -P and PYTHONSAFEPATH leave it out
    sys.path.insert(0, HERE)

from common import ROOT, exit_code, load_trainer

SHRINK = ROOT / "records/shrink.env"
OFF_AT_0 = "EVAL_STRIDE", "PHASED_TTT_PREFIX_DOCS"  # where a record has 0, it does without


def read(path):
    return dict(pair.split("=", 1) for pair in shlex.split(path.read_text(encoding="utf-8"), comments=True))


def sizes(args, env=None):
    """{setting: value} to be laid over these arguments of the trainer, of which at least one is an @file."""
    settings = load_trainer().Settings
    files = [arg for arg in args if arg.startswith("@")]
    record, found = settings.parse(files), read(SHRINK)
    found = {name: value for name, value in found.items() if name not in OFF_AT_0 or getattr(record, name.lower())}
    for own in (Path(file[1:].removesuffix("settings.env")) / "small.env" for file in files):
        found |= read(own) if own.is_file() else {}
    found = {name: value for name, value in found.items() if name not in (env or {})}
    pairs = [f"{name}={value}" for name, value in found.items()]
    idle = settings.parse([*files, *pairs, *(arg for arg in args if arg not in files)], env).idle()
    return {name: value for name, value in found.items() if name not in idle}


def main(args):
    if {"-h", "--help"} & set(args):
        print(__doc__.strip())
        return 0
    try:
        found = sizes(args, os.environ)
    except load_trainer().BadInput as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
