"""`submit.py check`: a submission folder, ours or foreign, against the contest's rules."""

import argparse
from pathlib import Path
from typing import NamedTuple

from common import Parser, write_json
from submission import check_form, check_limits, check_score, check_seeds, rules
from submission.entry import Entry, read_entry
from submission.findings import SEVERITIES, Finding, logs_of, of_logs

HELP = """\
Check the folder of a submission against every rule of the contest that its files can show: sizes, clocks, seeds, the
number of bytes that the score divides by, which validation text was scored and what had seen it, code and settings of
each seed, submission.json against the logs, and what else the branch touches.

  error     a reviewer refuses it
  warning   a reviewer asks about it, or the organisers have tolerated it
  unknown   the files do not say
  note      good to know

Exit code: 0 no errors, 1 errors, 2 no folder that can be read.
"""

CHECKS = (  # (check, the logs that it is asked about, see logs_of(); None: it is asked about the folder)
    (check_form.check_name, None), (check_form.check_files, None), (check_form.check_record, None),
    (check_form.check_compliance, None), (check_seeds.claimed_score, "score"), (check_seeds.check_scores, None),
    (check_seeds.check_fields, None), (check_seeds.claimed_size, "training"), (check_seeds.check_seeds, None),
    (check_seeds.log_of_seed, "score"), (check_seeds.one_run, "every"), (check_seeds.check_same_code, None),
    (check_seeds.check_same_settings, None), (check_limits.size_of_seed, "training"), (check_limits.check_size, None),
    (check_limits.check_imports, None), (check_limits.train_time, "training"), (check_limits.eval_time, "score"),
    (check_score.bytes_of_seed, "any"), (check_score.check_bytes, None), (check_score.coverage, "score"),
    (check_score.overlap, "training"), (check_seeds.script_of_seed, "training"), (check_seeds.check_models, None),
    (check_score.verdict, "score"), (check_score.check_foreign, None), (check_score.breaches, "both"),
    (check_score.check_script, None), (check_seeds.check_statistics, None))


class Report(NamedTuple):
    """The findings about one folder, errors first, and which rules were looked at."""

    entry: Entry
    findings: tuple[Finding, ...]
    checked: tuple[str, ...] = (
        "CK-FOLDER", "CK-SEEDS", "CK-SIZE", "CK-IMPORT", "CK-TRAINTIME", "CK-EVALTIME", "CK-BYTES", "CK-COVER",
        "CK-OVERLAP", "CK-HASH", "CK-ORDER", "CK-FLIP", "CK-SUM", "CK-VALOPEN", "CK-STAT", "CK-DIFF")

    def count(self, severity):
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def counts(self):
        return {f"{severity}s": self.count(severity) for severity in SEVERITIES}


def examine(path, track=None, base=None):
    """The Report on a folder. BadInput if there is no folder that can be read."""
    entry = read_entry(path, track)
    logs = logs_of(entry)
    findings = []
    for check, which in CHECKS:
        findings += of_logs(entry, check, logs[which]) if which else check(entry)
    findings += check_form.check_diff(entry, base)
    if entry.track != "record":
        findings = [softened(finding) for finding in findings]
    findings = sorted(dict.fromkeys(findings), key=lambda finding: SEVERITIES.index(finding.severity))
    return Report(entry, tuple(findings))


def softened(finding):
    """A limit of records is a note elsewhere: unlimited compute is a track of its own."""
    is_clock = finding.rule in ("CK-TRAINTIME", "CK-EVALTIME") and finding.severity != "unknown"
    return finding._replace(severity="note") if is_clock else finding


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments(argv):
    parser = Parser(prog="submit.py check", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="records/TRACK/YYYY-MM-DD_Name, or any other folder")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the findings as JSON too")
    parser.add_argument("--track", choices=[*rules.TRACKS],
                        help="default: that of the folder DIR lies in, else of its submission.json, else record")
    parser.add_argument("--base", metavar="REV", help="what the branch is compared with; default: upstream/main, "
                        "origin/main or main")
    return parser.parse_args(argv)


def run(args):
    report = examine(args.folder, args.track, args.base)
    for line in table(report.findings):
        print(line)
    counts = " ".join(f"{name}:{count}" for name, count in report.counts.items())
    print(f"{counts} track:{report.entry.track} checked:{','.join(report.checked)}", flush=True)
    if args.json:
        document = {"folder": str(report.entry.path), "track": report.entry.track, **report.counts,
                    "checked": report.checked, "findings": [finding._asdict() for finding in report.findings]}
        write_json(args.json, document, indent=1)
    return 1 if report.count("error") else 0


def table(findings):
    """Aligned lines, errors first."""
    places = [f"{finding.file}:{finding.line}" if finding.line else finding.file for finding in findings]
    rule = max((len(finding.rule) for finding in findings), default=0)
    width = min(max((len(place) for place in places), default=0), 48)
    for finding, place in zip(findings, places):
        text = " ".join(finding.text.split())
        yield f"{finding.severity:<7}  {finding.rule:<{rule}}  {place:<{width}}  {text}".rstrip()
