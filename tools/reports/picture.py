"""The panels as a picture, by matplotlib."""

from matplotlib import cm, colors, figure, lines, rc_context, ticker

from common import BadInput
from reports.facts import names_of
from reports.panels import AXES, BEST_TO_WORST, MOST_NAMES, colours_of, panels_of

GROUND = "#fafaf8"  # opaque, so that what is behind it may be dark
INK = "#24292f"
STYLE = {
    "figure.facecolor": GROUND, "axes.facecolor": GROUND, "text.color": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": "#888888", "grid.color": "#e3e3e0",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "legend.edgecolor": "none", "legend.facecolor": GROUND, "legend.fontsize": 9,
    "axes.titlesize": 11, "text.parse_math": False, "font.size": 10, "figure.dpi": 130, "svg.hashsalt": "report"}
MARKERS = {"circle": "o", "diamond": "D"}
DASHES = {"dash": "--", "dot": ":"}
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}  # where a legend hides nothing


def draw(every, x, path):
    """Write the panels of these runs to a file, .png or .svg, with the curves over this axis of AXES."""
    panels = panels_of(every)
    names = names_of(every)
    if not any(panel["data"][0]["type"] == "scatter" for panel in panels):
        raise BadInput(f"no training or validation lines to plot yet in {', '.join(names)}")
    height = -(-len(panels) // 2)
    with rc_context(STYLE):
        drawing = figure.Figure(figsize=(11, 3.4 * height), layout="constrained")
        for place, panel in enumerate(panels, 1):
            axes = drawing.add_subplot(height, 2, place)
            axes.set_title(panel["layout"]["title"]["text"], loc="left")
            if panel["data"][0]["type"] == "bar":
                draw_bars(axes, **panel)
            else:
                draw_curves(axes, **panel, x=x, alone=len(every) == 1)
        say_colours(drawing, names, *colours_of(every))
        try:
            drawing.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise BadInput(f"{path} cannot be written ({error.strerror})") from None


def draw_curves(axes, data, layout, x, alone):
    for trace in data:
        style = {"color": trace["line"]["color"], "linewidth": 1.3}
        if marker := trace.get("marker"):
            style |= {"marker": MARKERS[marker["symbol"]], "markersize": 0.6 * marker["size"]}
        if trace["mode"] == "markers":  # at the edge, where the run ends
            style |= {"linestyle": "", "clip_on": False, "zorder": 3}
        axes.plot(trace["meta"]["xs"][x], trace["y"], **style)
    for line in layout["shapes"]:
        axes.axhline(line["y0"], color="#6a6f75", linestyle=DASHES[line["line"]["dash"]], linewidth=1.2)
    axes.set(xlabel=AXES[x][1], xlim=(0, None), ylabel=layout["yaxis"]["title"]["text"], ylim=layout["yaxis"]["range"])
    if alone and len(axes.lines) > 1:
        named = [trace["name"] if trace["mode"] == "markers" else "during training" for trace in data]
        named += [line["label"]["text"] for line in layout["shapes"]]
        axes.legend(axes.lines, named, ncols=2, **BELOW)


def draw_bars(axes, data, layout):
    """One bar a row, from the top; the names of many rows would lie over each other."""
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
    rows = data[0]["y"]
    places = range(len(rows))
    left = [0] * len(rows)
    for trace in data:
        axes.barh(places, trace["x"], left=left, height=min(0.8, 0.3 * len(rows)), color=trace["marker"]["color"])
        left = [sum(values) for values in zip(left, trace["x"])]
    shown = layout["yaxis"]["showticklabels"]
    axes.set(xlabel=layout["xaxis"]["title"]["text"], yticks=places if shown else [], yticklabels=rows if shown else [],
             ylim=(len(rows) - 0.4, -0.6), ylabel="" if shown else f"{len(rows)} runs")
    limits = [axes.axvline(line["x0"], color=INK, linestyle="--", linewidth=1.2) for line in layout["shapes"]]
    named = [*(trace["name"] for trace in data), *(line["label"]["text"] for line in layout["shapes"])]
    if len(named) > 1:
        axes.legend([*axes.containers, *limits], named, ncols=4, **BELOW)


def say_colours(drawing, names, of_runs, scale):
    """Below the panels: the name of each colour, or the scale where the colours are scores."""
    if scale:
        shades = colors.LinearSegmentedColormap.from_list("score", BEST_TO_WORST)
        drawing.colorbar(cm.ScalarMappable(colors.Normalize(*scale), shades), ax=drawing.axes, location="bottom",
                         fraction=0.02, aspect=80, label=f"{len(names)} runs, colour: bits per byte")
    elif 1 < len(names) <= MOST_NAMES:
        handles = [lines.Line2D([], [], color=colour, linewidth=3) for colour in of_runs]
        named = [f" {name}" for name in names]  # what begins with _ would be left out
        drawing.legend(handles, named, loc="outside lower center", ncols=min(len(names), 5))
