"""The panels and the tables as one page for a browser, by plotly: everything is in the file, nothing is fetched."""

from html import escape
from pathlib import Path

from jinja2 import Template
from plotly.offline import get_plotlyjs

from common import write
from reports.compare import OF_ONE_RUN, compare
from reports.facts import names_of
from reports.panels import AXES, BEST_TO_WORST, MOST_NAMES, colours_of, panels_of
from reports.table import NONE, Row, different_texts, differing_settings, results, rows


def page(every, x, path, compared=False):
    """Write the page of these runs, with the curves over this axis of AXES."""
    colours, scale = colours_of(every)
    columns = results(every)
    columns["seed"] = [str(facts["seed"]) for facts in every]
    columns |= differing_settings([facts["settings"] for facts in every], OF_ONE_RUN)
    columns["remark"] = ["; ".join(facts["reasons"]) if facts["finished"] else facts["ended"] for facts in every]
    runs = []
    for facts, name, colour, *cells in zip(every, names_of(every), colours, *columns.values()):
        table = [row for row in rows(facts) if row.value != NONE]
        table += [Row("Settings"), *(Row(name, value) for name, value in facts["settings"].items())]
        runs.append({**facts, "name": name, "colour": colour, "table": table, "cells": cells})
    panels = panels_of(every)
    for trace in (trace for panel in panels for trace in panel["data"]):
        trace["name"] = escape(trace["name"])
        if trace["type"] == "bar":
            trace["y"] = [escape(name) for name in trace["y"]]
    report = {"x": x, "axes": {axis: label for axis, (_, label) in AXES.items()}, "panels": panels,
              "running": any(facts["state"] == "running" for facts in every)}
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    html = Template(source, autoescape=True, trim_blocks=True, lstrip_blocks=True).render(
        title=f"{runs[0]['name']}: {runs[0]['ended']}" if len(runs) == 1 else f"{len(runs)} runs", runs=runs,
        headings=["run", *columns], warning=different_texts(every), comparison=compare(every) if compared else (),
        report=report, plotly=get_plotlyjs(), most_names=MOST_NAMES, scale=scale, best_to_worst=BEST_TO_WORST)
    write(path, html.encode("utf-8", "backslashreplace"))
