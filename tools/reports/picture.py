"""The panels as a picture, by matplotlib."""

from common import BadInput
from reports.panels import AXES, BEST_TO_WORST, MOST_NAMES, Lines

GROUND = "#fafaf8"  # opaque, so that what is behind it may be dark
INK = "#24292f"
STYLE = {
    "figure.facecolor": GROUND, "axes.facecolor": GROUND, "text.color": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": "#888888", "grid.color": "#e3e3e0",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "legend.edgecolor": "none", "legend.facecolor": GROUND, "legend.fontsize": 9,
    "axes.titlesize": 11, "text.parse_math": False, "font.size": 10, "figure.dpi": 130, "svg.hashsalt": "report"}
STYLES = {"line": {"linewidth": 1.3}, "points": {"linewidth": 1.3, "marker": "o", "markersize": 3},
          "mark": {"linestyle": "", "marker": "D", "markersize": 6, "clip_on": False, "zorder": 3},
          "small mark": {"linestyle": "", "marker": "D", "markersize": 3}}


def draw(pictures, x, path):
    """Write the panels to a file, .png or .svg, with the curves over this axis of AXES."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("--plot needs matplotlib: pip install -r requirements-dev.txt") from None
    if not any(isinstance(panel, Lines) for panel in pictures.panels):
        raise BadInput(f"no training or validation lines to plot yet in {', '.join(pictures.names)}")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height = max(1, -(-len(pictures.panels) // 2))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(height, 2, figsize=(11, 3.4 * height), layout="constrained", squeeze=False)
        for axes, panel in zip(grid.flat, pictures.panels):
            axes.set_title(panel.title, loc="left")
            if isinstance(panel, Lines):
                draw_lines(axes, panel, pictures, x)
            else:
                draw_bars(axes, panel, plt)
        for axes in list(grid.flat)[len(pictures.panels):]:
            axes.remove()
        say_colours(figure, pictures, matplotlib)
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise BadInput(f"{path} cannot be written ({error.strerror})") from None
        finally:
            plt.close(figure)


def draw_lines(axes, panel, pictures, x):
    axes.set(xlabel=AXES[x][1], ylabel=panel.unit, ylim=panel.limits)
    for curve in panel.curves:
        axes.plot(curve.xs[x], curve.ys, color=pictures.colours[curve.run], **STYLES[curve.style])
    for level, dashes in zip(panel.levels, ("--", ":")):
        axes.axhline(level.value, color="#6a6f75", linestyle=dashes, linewidth=1.2)
    axes.set_xlim(left=0)
    if len(pictures.names) == 1:
        named = [curve.name if curve.style == "mark" else "during training" for curve in panel.curves]
        named += [level.name for level in panel.levels]
        if len(named) > 1:
            axes.legend(axes.lines, named)


def draw_bars(axes, panel, plt):
    """One bar a row, from the top; the names of many rows would lie over each other."""
    axes.set(xlabel=panel.unit)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(plt.MaxNLocator(4))
    places = range(len(panel.rows))
    left = [0] * len(panel.rows)
    for part in panel.parts:
        axes.barh(places, part.values, left=left, height=min(0.8, 0.3 * len(panel.rows)), color=part.colour)
        left = [sum(values) for values in zip(left, part.values)]
    shown = len(panel.rows) <= MOST_NAMES
    axes.set(yticks=places if shown else [], yticklabels=panel.rows if shown else [],
             ylim=(len(panel.rows) - 0.4, -0.6), ylabel="" if shown else f"{len(panel.rows)} runs")
    handles = list(axes.containers)
    named = [part.name for part in panel.parts]
    if panel.limit:
        handles.append(axes.axvline(panel.limit.value, color=INK, linestyle="--", linewidth=1.2))
        named.append(panel.limit.name)
    if len(named) > 1:
        axes.legend(handles, named, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)


def say_colours(figure, pictures, matplotlib):
    """Below the panels: the name of each colour, or the scale where the colours are scores."""
    count = len(pictures.names)
    if pictures.scale:
        colours = matplotlib.colors.LinearSegmentedColormap.from_list("score", BEST_TO_WORST)
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(*pictures.scale), colours)
        figure.colorbar(scale, ax=figure.axes, location="bottom", fraction=0.02, aspect=80,
                        label=f"{count} runs, colour: bits per byte")
    elif 1 < count <= MOST_NAMES:
        handles = [matplotlib.lines.Line2D([], [], color=colour, linewidth=3) for colour in pictures.colours]
        # A name that begins with _ would be left out.
        names = [f" {name}" for name in pictures.names]
        figure.legend(handles, names, loc="outside lower center", ncols=min(count, 5))
