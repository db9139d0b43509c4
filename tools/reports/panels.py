"""The panels of a report as figures of plotly's schema, {"data": [trace], "layout": {...}}: page.py shows them,
picture.py draws the same by matplotlib. Names are text, in which plotly would read markup.
"""

from itertools import cycle

import numpy as np

from reports.facts import names_of
from reports.table import PHASES, RIVALS

AXES = {"steps": ("step", "optimizer steps"), "tokens": ("tokens", "training tokens"),
        "seconds": ("seconds", "seconds of training")}  # --x: (column of the points, label)
FIRST_STEPS = 0.1  # share of the training time whose values may lie above the axis
MOST_POINTS = 2000  # of a curve; of a longer one every second, third, ... is drawn

# Each has a contrast of 3:1 or more with a light and with a dark page.
COLOURS = ("#3b7dd8", "#d0662b", "#2f935a", "#b65fc4", "#1590a0", "#c9433f", "#94761d", "#d1508f", "#7d6be0", "#7a7f87")
MOST_NAMES = len(COLOURS)  # runs with a colour and a name of their own; more are coloured by score
BEST_TO_WORST = ("#1590a0", "#7d6be0", "#d0662b")
NO_SCORE = "#7a7f87"

LINE = {"mode": "lines"}
POINTS = {"mode": "lines+markers", "marker": {"size": 5, "symbol": "circle"}}
MARK = {"mode": "markers", "marker": {"size": 10, "symbol": "diamond"}}
SMALL_MARK = {"mode": "markers", "marker": {"size": 5, "symbol": "diamond"}}


def panels_of(every):
    """The panels of the facts of some runs. Those without data are left out."""
    colours, _ = colours_of(every)
    runs = list(zip(every, names_of(every), colours))
    loss, rates, times = (curves(runs, column) for column in ("train_loss", "lr_scale", "ms_per_step"))
    highest = max((max(trace["y"]) for trace in rates), default=0)
    panels = [
        curve_panel("training loss", "nats per token", loss, limits_of(runs, loss)),
        validation(runs),
        curve_panel("learning rate", "share of its peak", rates, (0, 1.05 * highest or 1)),
        curve_panel("step time", "ms per step", times, (0, limits_of(runs, times)[1])),
        phases(every),
        sizes(every)]
    return [panel for panel in panels if panel["data"]]


def colours_of(every):
    """([colour of each run], (best, worst score) where the colours are scores, else None)."""
    if len(every) <= MOST_NAMES:
        return COLOURS[:len(every)], None
    known = [facts["final_bpb"] for facts in every if facts["final_bpb"] is not None]
    scale = (min(known), max(known)) if known else None
    return [colour_of(facts["final_bpb"], scale) for facts in every], scale


def colour_of(score, scale):
    """Between BEST_TO_WORST by the place of a score in the scale."""
    if score is None:
        return NO_SCORE
    share = (score - scale[0]) / (scale[1] - scale[0] or 1)
    channels = zip(*(bytes.fromhex(colour[1:]) for colour in BEST_TO_WORST))
    places = np.linspace(0, 1, len(BEST_TO_WORST))
    return "#" + bytes(round(np.interp(share, places, channel)) for channel in channels).hex()


def panel(title, data, levels, xaxis, yaxis, **layout):
    """A panel with these axes. `levels` are lines across it, of plotly's schema."""
    return {"data": data, "layout": {
        "title": {"text": title, "font": {"size": 15}, "x": 0.02, "xanchor": "left"}, "height": 330, "shapes": levels,
        "margin": {"l": 60, "r": 20, "t": 44, "b": 56}, "hovermode": "closest", "hoverlabel": {"namelength": -1},
        "xaxis": {"showline": True, "title": {"standoff": 8}, **xaxis}, "showlegend": False,
        "yaxis": {"showline": True, "automargin": True, **yaxis}, **layout}}


def level(name, dash, **place):
    return {"type": "line", "line": {"dash": dash, "width": 1.2, "color": "#7a7f87"}, **place,
            "label": {"text": name, "textposition": "end", "textangle": 0, "xanchor": "right", "yanchor": "bottom"}}


# ---- curves ---------------------------------------------------------------------------------------------------------


def curve_panel(title, unit, data, limits, levels=()):
    """A panel of curves; `limits` are (bottom, top) of its axis."""
    return panel(title, data, levels, {"rangemode": "tozero"}, {"title": {"text": unit}, "range": limits})


def curve(run, name, colour, xs, ys, style):
    """A trace without x: the page gives it one of `xs`, {axis of AXES: [x]}. `run` is the place of its run."""
    return {"type": "scatter", "name": name, "y": ys, "meta": {"xs": xs, "run": run}, "line": {"color": colour},
            "hovertemplate": "%{x:,.6~g}: %{y:.5~g}", **style}


def curves(runs, key, style=LINE):
    """A curve of this column for each run that has it."""
    found = []
    for run, (facts, name, colour) in enumerate(runs):
        points = [point for point in facts["points"] if point[key] is not None]
        every_nth = -(-len(points) // MOST_POINTS) or 1
        points = points[:-1:every_nth] + points[-1:]
        if points:
            xs = {axis: [point[column] for point in points] for axis, (column, _) in AXES.items()}
            found.append(curve(run, name, colour, xs, [point[key] for point in points], style))
    return found


def validation(runs):
    """Scores on the way, that of each packed model at the end of its run; of a single run the compressors, too."""
    many = len(runs) > MOST_NAMES
    data = curves(runs, "val_bpb", LINE if many else POINTS)
    for run, (facts, name, colour) in enumerate(runs):
        score = facts["final_bpb"]
        if score is not None:
            end = facts["points"][-1] if facts["points"] else {}
            xs = {axis: [end.get(column) or 0] for axis, (column, _) in AXES.items()}
            title = f"final, packed, {score:.4f}" if len(runs) == 1 else f"{name}: final, packed, {score:.4f}"
            data.append(curve(run, title, colour, xs, [score], SMALL_MARK if many else MARK))
    rivals = runs[0][0]["compressors"] if len(runs) == 1 else {}
    bits = {name: rivals[key] for name, key in RIVALS.items() if key in rivals}
    levels = [level(f"{name}: {value:.4f}", dash, xref="x domain", x0=0, x1=1, y0=value, y1=value)
              for (name, value), dash in zip(bits.items(), ("dash", "dot"))]
    return curve_panel("validation", "bits per byte", data, limits_of(runs, data, bits.values()), levels)


def limits_of(runs, data, levels=()):
    """(bottom, top) of an axis that shows these levels and, of the runs that did not diverge or else of all, the curves
    after their first steps: of each at least its last point.
    """
    values = list(levels)
    every = [(trace, runs[trace["meta"]["run"]][0]) for trace in data]
    sound = [(trace, facts) for trace, facts in every if facts["state"] != "diverged"]
    for trace, facts in sound or every:
        begin = FIRST_STEPS * facts["points"][-1]["seconds"] if facts["points"] else 0
        late = [y for x, y in zip(trace["meta"]["xs"]["seconds"], trace["y"]) if x >= begin]
        values += late or trace["y"][-1:]
    if not values:
        return None, None
    margin = 0.1 * (max(values) - min(values)) or 0.1
    return min(values) - 1.5 * margin, max(values) + margin


# ---- bars -----------------------------------------------------------------------------------------------------------


def bar_panel(title, unit, rows, parts, levels=()):
    """A panel of lying bars, a row each, the first on top. `parts` are {name: [value of each row]}."""
    many = len(rows) > MOST_NAMES
    legend = {"orientation": "h", "yref": "container", "y": 0.02, "yanchor": "bottom", "traceorder": "normal"}
    data = [{"type": "bar", "orientation": "h", "name": name, "x": values, "y": rows, "marker": {"color": colour},
             "hovertemplate": "%{y}: %{x:,.6~g}"} for (name, values), colour in zip(parts.items(), cycle(COLOURS))]
    return panel(title, data, levels, {"title": {"text": unit, "standoff": 8}},
                 {"autorange": "reversed", "type": "category", "showticklabels": not many},
                 barmode="stack", bargap=0.2 if many else 0.3, height=max(320, 120 + 14 * len(rows)), legend=legend,
                 showlegend=len(parts) > 1, margin={"l": 60, "r": 20, "t": 44, "b": 100 if len(parts) > 1 else 56})


def phases(every):
    """The seconds of each phase. A run that is alone has a bar for each."""
    clocks = [facts["seconds"] for facts in every]
    known = [phase for phase in (*PHASES, *clocks[0]) if any(clock.get(phase) for clock in clocks)]
    names = [PHASES.get(phase, phase).partition(" (")[0] for phase in known]
    parts = {name: [clock.get(phase) or 0 for clock in clocks] for name, phase in zip(names, known)}
    if len(every) > 1 or not parts:
        return bar_panel("phases", "seconds", names_of(every), parts)
    return bar_panel("phases", "seconds", list(parts), {"seconds": [values[0] for values in parts.values()]})


def sizes(every):
    """The bytes of each role of parameters, of the header and of the code, against the limit."""
    accounts = []
    for facts in every:
        roles = facts["role_bytes"] or {"model": facts["model_bytes"]}
        accounts.append({**roles, "code": facts["code_bytes"]} if facts["total_bytes"] else {})
    known = dict.fromkeys(part for account in accounts for part in account if part != "code")
    parts = {part: [account.get(part) or 0 for account in accounts] for part in (*known, "code") if any(accounts)}
    if len(every) == 1:
        parts = {f"{part} {size:,}": [size] for part, (size,) in parts.items()}
    limits = {facts["limit_bytes"] for facts in every if facts["limit_bytes"]}
    levels = [level(f"limit {limit:,}", "dash", yref="y domain", y0=0, y1=1, x0=limit, x1=limit) for limit in limits]
    return bar_panel("size by role of parameters", "bytes", names_of(every), parts, levels if len(limits) == 1 else ())
