"""Make what is submitted.

    python tools/submit.py specialise RECORD [KEY=VALUE ...] [-o FILE]
    python tools/submit.py pack [--settings RECORD] [--specialise] [--out FILE] [--compressor auto|lzma|brotli] [--text]
    python tools/submit.py folder logs/RUN logs/RUN logs/RUN --name NAME --blurb TEXT [--against 2135]
    python tools/submit.py check DIR [--json FILE] [--track record|non-record] [--base REV]
    python tools/submit.py stats logs/RUN logs/RUN logs/RUN --against 2135
    python tools/submit.py verify DIR --artifact model.pg [DATA_PATH=...]

`specialise` writes the trainer cut down to one record: the settings are constants, the branches that they decide are
folded, and what nothing reaches any more is gone. It is what a reviewer reads, and gives the same losses, artifact and
score. Where it reads and writes, the seed, the machine and the length of the run stay settings. Its lines give the
sizes of the whole and of the cut file, minified and packed, too.

`pack` writes the script minified, compressed and self-extracting: one .py file that python and torchrun run as they
run the readable one, with the same settings, losses and score. Its lines say what each step saves. The file that is
written is what the trainer counts and hashes as its code, and the minified source is what the trainer puts into its
log.

`folder` writes records/TRACK/YYYY-MM-DD_Name/ from the runs of at least three seeds of one configuration: script, logs,
settings, submission.json and README.md, all from what the runs logged. Runs that are not of one configuration, did not
finish, are not valid or too large are refused, each in a line. A run that could be no record goes to the track of
non-records, with the reasons.

`check` reads any submission folder, ours or foreign, against the contest's rules: sizes, clocks, seeds, the bytes that
the score divides by, which text was scored and what had seen it, code and settings of each seed, submission.json
against the logs, and what else the branch touches. A line for each finding, errors first, with rule, file and line;
what the files do not say is `unknown`. Exit code 1 if there are errors.

`stats` prints mean and spread over seeds, and against a record the one-sided test of the README (better by 0.005 nats
per token, p < 0.01) and that of the organisers' later practice. It takes runs, folders, a pull request whose seeds are
in its table, or numbers.

`verify` scores an artifact again by the script of its folder, and compares everything with what the folder says.

`python tools/submit.py pack --help`, ... have every option. The folder submission/ has a module for each command.
"""

import importlib
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

from common import BadInput, exit_code

# Modules of submission/; each is imported when it is called, with what it needs.
COMMANDS = ("specialise", "pack", "folder", "check", "stats", "verify")


def main(argv):
    return exit_code(partial(command, argv))


def command(argv):
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    known = f"there is: {', '.join(COMMANDS)}; see submit.py --help"
    if not argv:
        raise BadInput(f"a command is missing; {known}")
    if argv[0] not in COMMANDS:
        raise BadInput(f"{argv[0]!r} is no command; {known}")
    module = importlib.import_module(f"submission.{argv[0]}")
    return module.run(module.arguments(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
