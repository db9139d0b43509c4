"""What came out of a run, in words, numbers and pictures that need no knowledge of the code.

    python tools/report.py logs/RUN_ID                      a table
    python tools/report.py logs/RUN_ID --plot curve.png     and its curves, phases and bytes as a picture (or .svg)
    python tools/report.py logs/RUN_ID --html run.html      and as a page for a browser
    python tools/report.py logs/RUN_ID --json               the same facts for programs
    python tools/report.py logs/RUN_ID --follow             a run that is going on, until it ends
    python tools/report.py logs/ONE logs/OTHER              runs side by side: what was changed, and what came of it
    python tools/report.py --compare logs/A1 logs/A2 logs/B settings compared over seeds; the first are the reference
    python tools/report.py logs/RUN_ID --export csv --to run.csv

Everything is read from what train_gpt.py wrote (metrics.jsonl, summary.json); no score is computed here. Only two
general-purpose compressors are run, on the text behind the validation shards, to give the score of a run a scale; their
result is kept in RUN_DIR/compressors.json. Runs that were interrupted are shown as far as they got.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))  # for caseops.py
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

from common import BadInput, exit_code, need
from reports.compare import comparison
from reports.export import WRITERS, export
from reports.facts import gather
from reports.panels import AXES
from reports.table import side_by_side, table

SUFFIXES = {"plot": (".png", ".svg"), "html": (".html",)}
# What an option needs beyond requirements.txt, and how pip installs what is in no file of requirements.
PACKAGES = {"--plot": ["matplotlib"], "--html": ["plotly"], "--follow": ["rich"],
            "--export tensorboard": ["tensorboardX"], "--export wandb": ["wandb", "wandb"]}


def arguments(argv):
    lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__, formatter_class=lines)
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path,
                        help="folder of a run, such as logs/RUN_ID; several are set side by side")
    parser.add_argument("--compare", action="store_true", help="compare settings over seeds: the runs that differ in "
                        "nothing but SEED are a group, and that of the first run is the reference")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the runs (.png or .svg)")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page that needs nothing but a browser")
    parser.add_argument("--x", choices=AXES, default="seconds", help="what curves are drawn over (default: seconds)")
    parser.add_argument("--follow", action="store_true", help="show a run that is going on; --html is written anew "
                        "as it goes, and reloads itself")
    parser.add_argument("--export", choices=WRITERS, help="write the curves for another program, to --to")
    parser.add_argument("--to", metavar="PATH", type=Path, help="file of --export csv, folder of the others; of "
                        "several runs, the folder of all of them")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    return parser.parse_args(argv)


def main(argv):
    return exit_code(partial(report, arguments(argv)))


def check(args):
    """BadInput where options do not go together, or a package is missing that one of them needs."""
    for option, suffixes in SUFFIXES.items():
        path = getattr(args, option)
        if path and path.suffix not in suffixes:
            raise BadInput(f"--{option} {path}: the name must end in {' or '.join(suffixes)}")
    if bool(args.export) != bool(args.to):
        raise BadInput("--export and --to belong together, such as --export csv --to run.csv")
    if args.follow and (len(args.run_dirs) > 1 or args.compare or args.json or args.export or args.plot):
        raise BadInput("--follow shows one run, in the terminal and with --html as a page; give one RUN_DIR and no "
                       "other option")
    given = {"--plot": args.plot, "--html": args.html, "--follow": args.follow, f"--export {args.export}": args.export}
    for option in filter(given.get, PACKAGES):
        need(option, *PACKAGES[option])


def report(args):
    check(args)
    if args.follow:
        from reports.follow import follow

        follow(args.run_dirs[0], args.html, args.x)
        return 0
    run_dirs = list(dict.fromkeys(args.run_dirs))  # one that is named twice would be counted twice
    alone = len(run_dirs) == 1
    every = [gather(run_dir, compress=alone or args.json) for run_dir in run_dirs]
    if args.json:
        print(json.dumps(every[0] if alone else every, indent=1), flush=True)
    else:
        lines = comparison(every) if args.compare else table(every[0]) if alone else side_by_side(every)
        print("\n".join(lines), flush=True)
    if args.plot:
        from reports.picture import draw

        draw(every, args.x, args.plot)
    if args.html:
        from reports.page import page

        page(every, args.x, args.html, args.compare)
    if args.export:
        export(every, args.export, args.to)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
