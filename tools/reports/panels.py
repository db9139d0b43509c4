"""The panels of a report as data: what picture.py and page.py draw, so that the two cannot disagree."""

from typing import NamedTuple

from reports.facts import names_of
from reports.table import PHASES

AXES = {"steps": ("step", "optimizer steps"), "tokens": ("tokens", "training tokens"),
        "seconds": ("seconds", "seconds of training")}  # --x: (column of the points, label)
FIRST_STEPS = 0.1  # share of the training time whose values may lie above the axis
MOST_POINTS = 2000  # of a curve; of a longer one every second, third, ... is drawn
MOST_NAMES = 10  # runs with a colour and a name of their own; more are coloured by score

# Each has a contrast of 3:1 or more with a light and with a dark page.
COLOURS = ("#3b7dd8", "#d0662b", "#2f935a", "#b65fc4", "#1590a0", "#c9433f", "#94761d", "#d1508f", "#7d6be0", "#7a7f87")
BEST_TO_WORST = ("#1590a0", "#7d6be0", "#d0662b")
NO_SCORE = "#7a7f87"


class Curve(NamedTuple):
    """A curve of a panel. Its style is "line", "points" (with a line), or of one value "mark" or "small mark"."""

    run: int  # its place among the runs
    name: str
    xs: dict  # {axis of AXES: [x]}
    ys: list
    style: str = "line"


class Level(NamedTuple):
    """A value with a line across the panel."""

    name: str
    value: float


class Lines(NamedTuple):
    """A panel of curves."""

    title: str
    unit: str
    curves: list
    levels: list
    limits: tuple | None  # of the axis


class Part(NamedTuple):
    """What all bars of a panel have: a phase, a role."""

    name: str
    values: list  # one a row
    colour: str


class Bars(NamedTuple):
    """A panel of lying bars, each of them the sum of its parts."""

    title: str
    unit: str
    rows: list  # names
    parts: list
    limit: Level | None


class Pictures(NamedTuple):
    """Everything that is drawn of these runs."""

    names: list
    colours: list
    scale: tuple | None  # (best score, worst score) where colours are scores
    panels: list


def pictures(every):
    """The Pictures of the facts of some runs. Panels without data are left out."""
    names = names_of(every)
    scores = [facts["final_bpb"] for facts in every]
    colours = [COLOURS[place % len(COLOURS)] for place in range(len(every))]
    known = [score for score in scores if score is not None]
    scale = (min(known), max(known)) if len(every) > MOST_NAMES and known else None
    if len(every) > MOST_NAMES:
        colours = [colour_of(score, scale) for score in scores]
    panels = [
        loss(every, names), validation(every, names), learning_rate(every, names), step_time(every, names),
        phases(every, names), sizes(every, names)]
    panels = [panel for panel in panels if (panel.curves if isinstance(panel, Lines) else panel.parts)]
    return Pictures(names, colours, scale, panels)


def colour_of(score, scale):
    """Between BEST_TO_WORST by the place of a score in the scale."""
    if score is None:
        return NO_SCORE
    best, worst = scale
    share = (score - best) / (worst - best or 1) * (len(BEST_TO_WORST) - 1)
    first = min(int(share), len(BEST_TO_WORST) - 2)
    pairs = zip(*(bytes.fromhex(BEST_TO_WORST[place][1:]) for place in (first, first + 1)))
    return "#" + bytes(round(one + (other - one) * (share - first)) for one, other in pairs).hex()


# ---- curves ---------------------------------------------------------------------------------------------------------


def curves(every, names, key, style="line"):
    """A Curve of this column for each run that has it."""
    found = []
    for run, facts in enumerate(every):
        points = [point for point in facts["points"] if point[key] is not None]
        every_nth = -(-len(points) // MOST_POINTS) or 1
        points = points[:-1:every_nth] + points[-1:]
        if points:
            xs = {axis: [point[column] for point in points] for axis, (column, _) in AXES.items()}
            found.append(Curve(run, names[run], xs, [point[key] for point in points], style))
    return found


def loss(every, names):
    drawn = curves(every, names, "train_loss")
    return Lines("training loss", "nats per token", drawn, [], limits_of(every, drawn))


def validation(every, names):
    """Scores on the way, that of each packed model at the end of its run; of a single run the compressors, too."""
    many = len(every) > MOST_NAMES
    drawn = curves(every, names, "val_bpb", "line" if many else "points")
    for run, facts in enumerate(every):
        score = facts["final_bpb"]
        if score is not None:
            end = facts["points"][-1] if facts["points"] else {}
            xs = {axis: [end.get(column) or 0] for axis, (column, _) in AXES.items()}
            style = "small mark" if many else "mark"
            drawn.append(Curve(run, f"{names[run]}: final, packed, {score:.4f}", xs, [score], style))
    rivals = every[0]["compressors"] if len(every) == 1 else {}
    levels = [Level(f"{name}: {rivals[key]:.4f}", rivals[key])
              for name, key in (("xz -9e", "xz_bpb"), ("brotli -q 11", "brotli_bpb")) if key in rivals]
    return Lines("validation", "bits per byte", drawn, levels, limits_of(every, drawn, levels))


def learning_rate(every, names):
    drawn = curves(every, names, "lr_scale")
    highest = max((max(curve.ys) for curve in drawn), default=1)
    return Lines("learning rate", "share of its peak", drawn, [], (0, 1.05 * highest or 1))


def step_time(every, names):
    drawn = curves(every, names, "ms_per_step")
    return Lines("step time", "ms per step", drawn, [], limits_of(every, drawn, zero=True))


def limits_of(every, drawn, levels=(), zero=False):
    """Limits for the curves of the runs that did not diverge, or of all of them if there is no other."""
    sound = [curve for curve in drawn if every[curve.run]["state"] != "diverged"] or drawn
    if not sound:
        return None
    end = {run: max(curve.xs["seconds"][-1] for curve in sound if curve.run == run) or 1.0
           for run in {curve.run for curve in sound}}
    values = [level.value for level in levels]
    bounds = [loss_limits(list(zip(curve.xs["seconds"], curve.ys)), end[curve.run], values) for curve in sound]
    bottom, top = min(low for low, _ in bounds), max(high for _, high in bounds)
    return (0, top) if zero else (bottom, top)


def after_first_steps(curve, end):
    """The points of a curve that an axis must show: at least its last one."""
    late = [(seconds, value) for seconds, value in curve if seconds >= FIRST_STEPS * end]
    return late or curve[-1:]


def loss_limits(curve, end, levels=()):
    """(bottom, top) of an axis that shows these levels and the curve after its first steps."""
    values = [value for _, value in after_first_steps(curve, end)]
    values += levels
    margin = 0.1 * (max(values) - min(values)) or 0.1
    return min(values) - 1.5 * margin, max(values) + margin


# ---- bars -----------------------------------------------------------------------------------------------------------


def phases(every, names):
    """The seconds of each phase. A run that is alone has a bar for each."""
    clocks = [facts["seconds"] for facts in every]
    known = [phase for phase in (*PHASES, *clocks[0]) if any(clock.get(phase) for clock in clocks)]
    labels = {phase: PHASES.get(phase, phase).partition(" (")[0] for phase in known}
    if len(every) == 1:
        rows = list(labels.values())
        parts = [Part("seconds", [clocks[0][phase] for phase in labels], COLOURS[0])] if rows else []
    else:
        rows = names
        parts = parts_of(labels, clocks)
    return Bars("phases", "seconds", rows, parts, None)


def sizes(every, names):
    """The bytes of each role of parameters, of the header and of the code, against the limit."""
    accounts = []
    for facts in every:
        roles = facts["role_bytes"] or {"model": facts["model_bytes"]}
        accounts.append({**roles, "code": facts["code_bytes"]} if facts["total_bytes"] else {})
    names_of_parts = [*dict.fromkeys(part for account in accounts for part in account if part != "code"), "code"]
    labels = {part: part for part in names_of_parts}
    if len(every) == 1:
        labels = {part: f"{part} {accounts[0].get(part) or 0:,}" for part in names_of_parts}
    parts = parts_of(labels, accounts) if any(accounts) else []
    limits = {facts["limit_bytes"] for facts in every if facts["limit_bytes"]}
    limit = limits.pop() if len(limits) == 1 else None
    return Bars("size by role of parameters", "bytes", names, parts,
                Level(f"limit {limit:,}", limit) if limit else None)


def parts_of(labels, accounts):
    """A Part for each of these {key: label}, with its values in the accounts."""
    return [Part(label, [account.get(key) or 0 for account in accounts], COLOURS[place % len(COLOURS)])
            for place, (key, label) in enumerate(labels.items())]
