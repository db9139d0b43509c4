"""What a check says about a folder, and how what it says of each seed becomes one finding."""

from functools import partial
from typing import NamedTuple

# A reviewer refuses it; asks about it, or the organisers have tolerated it; the files do not say; good to know.
SEVERITIES = ("error", "warning", "unknown", "note")


class Finding(NamedTuple):
    severity: str
    rule: str  # CK-...
    text: str  # one sentence, with the numbers
    file: str = ""  # relative to the folder
    line: int | None = None


error, warning, unknown, note = (partial(Finding, severity) for severity in SEVERITIES)


def refused(entry, elsewhere="note"):
    """The severity of what only a record is refused for."""
    return "error" if entry.track == "record" else elsewhere


class OfLog(NamedTuple):
    """A finding about a log."""

    severity: str
    rule: str
    text: str
    place: str | int | None = None  # its line, or the field of Log that the line states
    kind: str = ""  # other seeds may have the same
    amount: float = 0  # how bad it is


def logs_of(entry):
    """{which: [(run, log)]} of the logs that a check may be asked about."""
    trained = [(run, run.training) for run in entry.runs if run.training]
    scored = [(run, run.log) for run in entry.runs if run.log]
    apart = [(run, log) for run, log in trained if log is not run.log]
    return {"training": trained, "score": scored, "both": scored + apart, "every": [(None, log) for log in entry.logs],
            "any": [(run, run.log) for run in entry.runs]}  # None for a seed that has none


def of_logs(entry, check, logs):
    """The findings of a check of each log: of one kind and severity only the worst, which names the other seeds."""
    groups = {}
    for run, log in logs:
        for number, row in enumerate(check(entry, run, log)):
            key = (row.kind, row.severity) if row.kind else (id(log), number)
            groups.setdefault(key, []).append((row, run, log))
    for group in groups.values():
        worst = max(group, key=lambda found: found[0].amount)
        row, _, log = worst
        others = [str(found[1].seed) for found in group if found is not worst]
        also = f"; also seed{'s' if len(others) > 1 else ''} {', '.join(others)}" if others else ""
        file = entry.relative(log.path) if log else entry.record_file
        line = log.lines.get(row.place) if isinstance(row.place, str) else row.place
        yield Finding(row.severity, row.rule, row.text + also, file, line)
