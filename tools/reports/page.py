"""The panels and the table as one page for a browser, by plotly: everything is in the file, nothing is fetched."""

import json
from html import escape
from pathlib import Path
from string import Template

from common import BadInput, write
from reports.compare import OF_ONE_RUN, compare
from reports.facts import names_of
from reports.panels import AXES, BEST_TO_WORST, MOST_NAMES, Lines, pictures
from reports.table import NONE, different_texts, differing_settings, results, rows

TEMPLATE = Path(__file__).with_name("page.html")
STYLES = {"line": {"mode": "lines"}, "points": {"mode": "lines+markers", "marker_size": 5},
          "mark": {"mode": "markers", "marker_symbol": "diamond", "marker_size": 10},
          "small mark": {"mode": "markers", "marker_symbol": "diamond", "marker_size": 5}}


def page(every, x, path, compared=False):
    """Write the page of these runs, with the curves over this axis of AXES."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise BadInput("--html needs plotly: pip install -r requirements-dev.txt") from None
    drawn = pictures(every)
    running = any(facts["state"] == "running" for facts in every)
    report = {
        "x": x, "axes": {axis: label for axis, (_, label) in AXES.items()}, "running": running,
        "panels": [lines(panel, drawn.colours) if isinstance(panel, Lines) else bars(panel) for panel in drawn.panels]}
    names = names_of(every)
    of_runs = "".join(details(facts, name, len(every) == 1) for facts, name in zip(every, names))
    if len(every) > MOST_NAMES:
        of_runs = f"<details><summary>of {len(every)} runs</summary>{of_runs}</details>"
    title = f"{names[0]}: {every[0]['ended']}" if len(every) == 1 else f"{len(every)} runs"
    html = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        plotly=get_plotlyjs(),
        report=json.dumps(report).replace("<", "\\u003c"),  # no text of a file ends the script
        legend=legend(drawn),
        table=results_table(every, drawn.colours), warning=escape(different_texts(every)),
        comparison=comparison_table(every) if compared else "",
        details=of_runs)
    write(path, html.encode("utf-8", "backslashreplace"))


# ---- panels ---------------------------------------------------------------------------------------------------------


def lines(panel, colours):
    """A panel of curves for plotly. `xs` has what a curve is drawn over, by axis, and `runs` its run."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"template": "none", "title_text": panel.title, "showlegend": False,
                               "xaxis_rangemode": "tozero", "yaxis": {"title_text": panel.unit, "range": panel.limits}})
    for curve in panel.curves:
        colour = colours[curve.run]
        figure.add_scatter(y=curve.ys, name=escape(curve.name), line_color=colour, marker_color=colour,
                           hovertemplate="%{x:,.6~g}: %{y:.5~g}", **STYLES[curve.style])
    for level, dash in zip(panel.levels, ("dash", "dot")):
        figure.add_hline(level.value, line={"dash": dash, "width": 1.2, "color": "#7a7f87"},
                         annotation={"text": level.name, "yanchor": "bottom"})
    return {**figure.to_plotly_json(), "xs": [curve.xs for curve in panel.curves],
            "runs": [curve.run for curve in panel.curves]}


def bars(panel):
    """A panel of lying bars for plotly, the first row on top."""
    import plotly.graph_objects as go

    many = len(panel.rows) > MOST_NAMES
    figure = go.Figure(layout={
        "template": "none", "title_text": panel.title, "barmode": "stack", "showlegend": len(panel.parts) > 1,
        "height": max(320, 120 + 14 * len(panel.rows)), "bargap": 0.2 if many else 0.3,
        "legend": {"orientation": "h", "yref": "container", "y": 0.02, "yanchor": "bottom", "traceorder": "normal"},
        "margin": {"l": 60, "r": 20, "t": 44, "b": 100 if len(panel.parts) > 1 else 56},
        "xaxis": {"title_text": panel.unit},
        "yaxis": {"autorange": "reversed", "type": "category", "showticklabels": not many, "automargin": True}})
    for part in panel.parts:
        figure.add_bar(x=part.values, y=[escape(row) for row in panel.rows], name=escape(part.name), orientation="h",
                       marker_color=part.colour, hovertemplate="%{y}: %{x:,.6~g}")
    if panel.limit:
        figure.add_vline(panel.limit.value, line={"dash": "dash", "width": 1.5, "color": "#7a7f87"},
                         annotation={"text": panel.limit.name, "xanchor": "right", "yanchor": "bottom"})
    return {**figure.to_plotly_json(), "xs": None, "runs": []}


# ---- tables ---------------------------------------------------------------------------------------------------------


def swatch(colour):
    return f'<i class="swatch" style="background:{colour}"></i>'


def legend(drawn):
    """The colours of few runs by name, of many as a scale of scores."""
    if drawn.scale:
        best, worst = drawn.scale
        scale = f'<i class="scale" style="background:linear-gradient(90deg,{",".join(BEST_TO_WORST)})"></i>'
        return f"<span>bits per byte {best:.4f} {scale} {worst:.4f}</span>"
    if len(drawn.names) == 1:
        return ""
    return "".join(f"<span>{swatch(colour)}{escape(name)}</span>" for name, colour in zip(drawn.names, drawn.colours))


def cell(value, shown, tag="td", order=""):
    """A cell, to the right if it is a number; `order` is what it is sorted by."""
    kind = "number" if isinstance(value, (int, float)) else "word"
    return f'<{tag} class="{kind}" data-order="{escape(str(order))}">{shown}</{tag}>'


def results_table(every, colours):
    """A row a run: what came out, what is wrong with it, and its settings that differ."""
    columns = [(cells[0][0], [(value, shown) for _, value, shown in cells]) for cells in zip(*map(results, every))]
    remarks = ["; ".join(facts["reasons"]) if facts["finished"] else facts["ended"] for facts in every]
    columns.append(("seed", [(facts["seed"], str(facts["seed"])) for facts in every]))
    columns.append(("remark", [(remark or None, remark) for remark in remarks]))
    for name, *values in differing_settings([facts["settings"] for facts in every], OF_ONE_RUN):
        columns.append((name, [(as_number(value), value) for value in values]))
    kinds = [next((value for value, _ in cells if value is not None), 0) for _, cells in columns]
    heads = [cell("", "<button>run</button>", "th")]
    heads += [cell(kind, f"<button>{escape(head)}</button>", "th") for kind, (head, _) in zip(kinds, columns)]
    lines = []
    for run, (facts, name) in enumerate(zip(every, names_of(every))):
        cells = [cell(name, swatch(colours[run]) + escape(name), "th", name)]
        for kind, (_, column) in zip(kinds, columns):
            value, shown = column[run]
            cells.append(cell(kind, escape(shown), order="" if value is None else value))
        lines.append(f'<tr data-run="{run}" class="{escape(facts["state"])}">{"".join(cells)}</tr>')
    return f'<table id="results"><thead><tr>{"".join(heads)}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def as_number(text):
    """The value of a setting as a number, where it is one: 3e-2 is before 0.1."""
    try:
        return float(text)
    except ValueError:
        return text


def comparison_table(every):
    found = compare(every)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in found.head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in line)}</tr>" for line in found.lines)
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    return (f'<h2>Compared by seed</h2><div class="scroll"><table id="comparison"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div><ul>{notes}</ul>")


def details(facts, name, alone):
    """The table of one run, open where it is the only one."""
    lines = []
    for row in rows(facts):
        if row.value is None:
            lines.append(f'<tr><th colspan="3">{escape(row.label.strip())}</th></tr>')
        elif row.value != NONE:
            lines.append("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>")
    lines += ['<tr><th colspan="3">Settings</th></tr>',
              *(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td><td></td></tr>"
                for key, value in facts["settings"].items())]
    return (f"<details{' open' if alone else ''}><summary>{escape(name)}: {escape(facts['ended'])}</summary>"
            f'<div class="scroll"><table class="facts">{"".join(lines)}</table></div></details>')
