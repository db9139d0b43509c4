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


class OfSeed(NamedTuple):
    """A finding about one seed; others may have the same."""

    kind: str
    severity: str
    rule: str
    text: str
    place: str | int | None = None  # the line of the log, or the field of Log that the line states
    amount: float = 0  # how bad it is


def of_seeds(entry, check, which):
    """The findings of a check of each seed's log: one for each kind and severity, the worst, which names the other
    seeds. `which` log: that with the `score`, with the `training`, `both` if they are two, or `any`: that with the
    score, or None for a seed that has none.
    """
    groups = {}
    for run in entry.runs:
        choices = {"score": [run.log], "any": [run.log], "training": [run.training], "both": [run.log, run.training]}
        logs = {id(log): log for log in choices[which] if log or which == "any"}
        for log in logs.values():
            for row in check(entry, run, log):
                groups.setdefault((row.kind, row.severity), []).append((row, run.seed, log))
    for group in groups.values():
        worst = max(group, key=lambda found: found[0].amount)
        row, _, log = worst
        others = [str(found[1]) for found in group if found is not worst]
        also = f"; also seed{'s' if len(others) > 1 else ''} {', '.join(others)}" if others else ""
        file = entry.relative(log.path) if log else entry.record_file
        line = log.lines.get(row.place) if isinstance(row.place, str) else row.place
        yield Finding(row.severity, row.rule, row.text + also, file, line)
