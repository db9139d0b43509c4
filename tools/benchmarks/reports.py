"""What the commands of tools/bench.py print and write: options and the report."""

import json
import shlex
import statistics
import sys
from pathlib import Path

from common import Parser, commit, machine, whole, write

# ---- options --------------------------------------------------------------------------------------------------------


def parser_of(name, description, epilog=None):
    """The parser of a command, with the options that all of them have."""
    parser = Parser(prog=f"bench.py {name}", allow_abbrev=False, description=description, epilog=epilog)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON, anew after each row")
    return parser


def add_val_tokens(parser):
    parser.add_argument("--val-tokens", type=whole(1), default=65536, metavar="N",
                        help="validation tokens that are scored (default: 65536)")


# ---- the report -----------------------------------------------------------------------------------------------------


def progress(text):
    print(f"{text} ...", file=sys.stderr, flush=True)


class Report(dict):
    """What a command measured: "rows", and facts that they share. A context whose end, whatever the cause (Ctrl-C and
    SIGTERM, too), prints the rows so far and writes them to --json.

    document: a function of the report, which gives its lines. quiet: neither print nor write (another rank does).
    """

    def __init__(self, name, args, argv, document, settings="", quiet=False, **facts):
        import torch

        super().__init__(
            command=shlex.join(["tools/bench.py", name, *argv]), settings=settings, **commit(),
            torch=torch.__version__, threads=torch.get_num_threads(), machine=machine(), **facts,
            complete=False, rows=[])
        self.path = args.json
        self.document = document
        self.quiet = quiet

    def add(self, row, table=None):
        """Keep a row; `table` is where a command has several."""
        place = {"table": table} if table else {}
        self.keep([*self["rows"], place | row])

    def keep(self, rows):
        """Keep these rows in place of the ones before."""
        del self["rows"]
        self["rows"] = rows  # below the facts that came later
        self.save()

    def table(self, name):
        """The rows of one table."""
        return [row for row in self["rows"] if row["table"] == name]

    def save(self):
        if self.path and not self.quiet:
            write(self.path, (json.dumps(self, indent=1) + "\n").encode())

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self["complete"] = error is None
        if self.quiet or not self["rows"]:
            return
        try:
            self.save()
        finally:
            print("\n".join(self.document(self)), flush=True)

    @property
    def code(self):
        """The exit code of a command that measured everything."""
        return int(any("error" in row for row in self["rows"]))

    def title(self):
        """The first lines of a document."""
        yield f"command   {self['command']}"
        if not self["complete"]:
            yield "stopped   before all was measured"
        yield f"settings  {self['settings'] or '(default)'}"

    def software(self):
        changed = f" and {self['changed_files']} changed file(s)" if self["changed_files"] else ""
        return f"torch {self['torch']}, {self['threads']} CPU thread(s), commit {self['commit']}{changed}"


def median_and_range(values):
    """(median, least, most)."""
    return statistics.median(values), min(values), max(values)


def errors_of(results):
    """The errors of the repeats of a job."""
    return [result["error"] for result in results if "error" in result]
