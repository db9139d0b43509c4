"""The panels and the table as one page for a browser, by plotly: everything is in the file, nothing is fetched."""

import json
from html import escape
from pathlib import Path
from string import Template

from common import BadInput, write
from reports.compare import compare
from reports.facts import names_of
from reports.panels import AXES, BEST_TO_WORST, MOST_NAMES, Lines, pictures
from reports.table import NONE, differing_settings, results, rows

TEMPLATE = Path(__file__).with_name("page.html")
STYLES = {"line": {"mode": "lines"}, "points": {"mode": "lines+markers", "marker_size": 5},
          "final": {"mode": "markers", "marker_symbol": "diamond", "marker_size": 10}}


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
    title = f"{names[0]}: {every[0]['ended']}" if len(every) == 1 else f"{len(every)} runs"
    html = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        plotly=get_plotlyjs(),
        report=json.dumps(report).replace("<", "\\u003c"),  # no text of a file ends the script
        legend=legend(drawn),
        table=results_table(every, drawn.colours),
        comparison=comparison_table(every) if compared else "",
        details="".join(details(facts, name, len(every) == 1) for facts, name in zip(every, names)))
    write(path, html.encode("utf-8", "backslashreplace"))


# ---- panels ---------------------------------------------------------------------------------------------------------


def lines(panel, colours):
    """A panel of curves for plotly. `xs` has what a curve is drawn over, by axis, and `runs` its run."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"template": "none", "title_text": panel.title, "showlegend": False,
                               "yaxis": {"title_text": panel.unit, "range": panel.limits}})
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
        "legend": {"orientation": "h", "y": -0.22, "yanchor": "top"}, "xaxis": {"title_text": panel.unit},
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


def cell(value, shown=None, tag="td"):
    """A cell that is sorted by its value."""
    kind = "number" if isinstance(value, (int, float)) else "word"
    order = "" if value is None else escape(str(value))
    return f'<{tag} class="{kind}" data-order="{order}">{escape(shown or str(value or ""))}</{tag}>'


def results_table(every, colours):
    """A row a run: what came out, what is wrong with it, and its settings that differ."""
    differing = differing_settings([facts["settings"] for facts in every])
    heads = ["run", *(label for label, _, _ in results(every[0])), "seed", "remark",
             *(name for name, *_ in differing)]
    lines = []
    for run, (facts, name) in enumerate(zip(every, names_of(every))):
        wrong = "; ".join(facts["reasons"]) if facts["finished"] else facts["ended"]
        cells = [f'<th scope="row" data-order="{escape(name)}">{swatch(colours[run])}{escape(name)}</th>',
                 *(cell(value, shown if value is not None else NONE) for _, value, shown in results(facts)),
                 cell(facts["seed"]), cell(wrong)]
        cells += [cell(as_number(values[run]), values[run]) for _, *values in differing if _ != "SEED"]
        lines.append(f'<tr data-run="{run}" class="{escape(facts["state"])}">{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col"><button>{escape(head)}</button></th>' for head in heads if head != "SEED")
    return f'<table id="results"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


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
