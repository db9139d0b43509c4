"""Tables of rows by columns: Markdown, and aligned for a terminal."""

import itertools
from typing import NamedTuple


class Column(NamedTuple):
    """A column of a table."""

    heading: str
    value: object  # key of the row, or a function of it
    form: str | None = None  # format of what is aligned to the right; None: text

    def cell(self, row):
        value = self.value(row) if callable(self.value) else row.get(self.value)
        return "-" if value is None else format(value, self.form or "")


def cells(columns, row):
    """The cells of a row: what failed or was skipped has its names and says why."""
    why = row.get("skipped")
    if "error" in row:
        why = f"failed: {row['error']}"
    if why is None:
        return [column.cell(row) for column in columns]
    names = itertools.takewhile(lambda column: column.form is None, columns)
    return [*(column.cell(row) for column in names), why]


def markdown(columns, rows):
    """The lines of a Markdown table."""
    yield "| " + " | ".join(column.heading for column in columns) + " |"
    yield "|" + "|".join("---" if column.form is None else "---:" for column in columns) + "|"
    for row in rows:
        shown = cells(columns, row)
        missing = len(columns) - len(shown)
        yield "| " + " | ".join([*(cell.replace("|", "\\|") for cell in shown), *[""] * missing]) + " |"


def section(text, columns, rows):
    """The lines of a table with a heading and what is to be known of it; none without rows."""
    if rows:
        yield f"\n### {text}\n"
        yield from markdown(columns, rows)


def aligned(columns, rows):
    """The lines of a table for a terminal."""
    lines = [[column.heading for column in columns], *(cells(columns, row) for row in rows)]
    in_columns = [line if len(line) == len(columns) else line[:-1] for line in lines]  # a reason is as wide as it is
    widths = [max(map(len, column)) for column in itertools.zip_longest(*in_columns, fillvalue="")]
    for line in lines:
        padded = [cell.ljust(width) if column.form is None else cell.rjust(width)
                  for column, cell, width in zip(columns, line, widths)]
        yield "  ".join(padded).rstrip()
