"""What a check says about a folder."""

from typing import NamedTuple

# A reviewer refuses it; asks about it, or the organisers have tolerated it; the files do not say; good to know.
SEVERITIES = ("error", "warning", "unknown", "note")


class Finding(NamedTuple):
    rule: str  # CK-...
    severity: str
    text: str  # one sentence, with the numbers
    file: str = ""  # relative to the folder
    line: int | None = None


def error(rule, text, file="", line=None):
    return Finding(rule, "error", text, file, line)


def warning(rule, text, file="", line=None):
    return Finding(rule, "warning", text, file, line)


def unknown(rule, text, file="", line=None):
    return Finding(rule, "unknown", text, file, line)


def note(rule, text, file="", line=None):
    return Finding(rule, "note", text, file, line)


class OfSeed(NamedTuple):
    """A finding about one seed; others may have the same."""

    kind: str
    seed: int | None
    amount: float  # how bad it is
    finding: Finding


def placed(rows, file):
    """The OfSeed rows, with their findings in this file."""
    for row in rows:
        yield row._replace(finding=row.finding._replace(file=file))


def worst(rows):
    """One finding for each kind and severity: the worst, which names the other seeds."""
    groups = {}
    for row in rows:
        groups.setdefault((row.kind, row.finding.severity), []).append(row)
    for group in groups.values():
        top = max(group, key=lambda row: row.amount)
        others = [str(row.seed) for row in group if row is not top]
        text = top.finding.text
        if others:
            text += f"; also seed{'s' if len(others) > 1 else ''} {', '.join(others)}"
        yield top.finding._replace(text=text)
