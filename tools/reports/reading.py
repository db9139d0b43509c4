"""What a run wrote to its folder, as facts: metrics.jsonl, summary.json, and whether it still holds its lock."""

import json
import math
from typing import NamedTuple

import numpy as np

from common import BadInput

# ---- files ----------------------------------------------------------------------------------------------------------


def read_events(path):
    """(events, number of damaged lines). A run that was killed may leave half a line."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give the folder of a run, such as logs/RUN_ID") from None
    events = []
    damaged = 0
    for line in filter(str.strip, lines):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
        else:
            damaged += 1
    if not events:
        raise BadInput(f"{path} holds no events of a run")
    return events, damaged


def read_summary(path):
    """The summary of a run that came to its end, or None."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, OSError):
        summary = None
    if not isinstance(summary, dict):
        raise BadInput(f"{path} is not the summary of a run; delete it to see the rest")
    return summary


def number(mapping, key):
    """The finite number under this key, or None."""
    value = (mapping or {}).get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def text(mapping, key):
    """The value under this key as one line; "" if there is none."""
    return " ".join(str((mapping or {}).get(key) or "").split())


def sentences(summary, key):
    """The list of texts under this key, each as one line."""
    value = (summary or {}).get(key)
    return [" ".join(str(item).split()) for item in value] if isinstance(value, list) else []


def last(events, kind, accept=lambda event: True):
    """The last event of this kind that `accept` accepts, or None."""
    for event in reversed(events):
        if event["event"] == kind and accept(event):
            return event
    return None


# ---- how it ended ---------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """How a run stands."""

    kind: str  # finished, running, diverged, interrupted, failed or killed
    words: str


def state_of(events, has_summary, holder):
    """The State of a run. What a resumed run wrote before counts no more."""
    if holder:
        return State("running", f"running ({holder})")
    beginnings = [place for place, event in enumerate(events) if event["event"] == "run"]
    session = events[beginnings[-1]:] if beginnings else events
    ended = last(session, "ended")
    if ended:
        reason = text(ended, "reason") or "no reason given"
        if number(ended, "exit_code") == 4:
            return State("diverged", f"diverged ({reason})")
        kind = "interrupted" if reason.startswith("interrupted") else "failed"
        return State(kind, reason if kind == "interrupted" else f"failed: {reason}")
    summary_is_older = last(events, "summary") and not last(session, "summary")
    if has_summary and not summary_is_older:
        return State("finished", "finished")
    return State("killed", "killed (no word of an end, and no process holds run.lock)")


# Phases by the events that are written while they last; any other event leaves the phase as it is.
PHASE_OF = {
    "run": "preparing", "warmup": "training", "train": "training", "val": "training", "calibrate": "calibrating",
    "allocate": "packing", "prune": "packing", "pack": "packing", "artifact": "scoring", "bytes": "scoring",
    "warmup_scoring": "scoring", "normalisation": "checking", "selftest": "checking"}


def phase_of(events):
    """What a run that goes on is doing."""
    return next((PHASE_OF[event["event"]] for event in reversed(events) if event["event"] in PHASE_OF), "preparing")


# ---- curves ---------------------------------------------------------------------------------------------------------

# Columns of a run's points, and how --export names them.
COLUMNS = ("step", "tokens", "seconds", "train_loss", "lr_scale", "ms_per_step", "val_loss", "val_bpb")


def points_of(events):
    """[{column of COLUMNS: value or None}] by step. A resumed run writes some steps again; the later line counts.

    Tokens of a validation, and where the log does not say them, lie between those of its neighbours.
    """
    points = {}
    latest = -1
    for event in events:
        step, ms = number(event, "step"), number(event, "train_time_ms")
        if event["event"] not in ("train", "val") or None in (step, ms):
            continue
        if step < latest:
            points = {earlier: point for earlier, point in points.items() if earlier < step}
        latest = step
        point = points.setdefault(step, {**dict.fromkeys(COLUMNS), "step": step, "seconds": ms / 1000})
        for key in ("train_loss", "lr_scale", "val_loss", "val_bpb"):
            if key in event:
                point[key] = number(event, key)
        tokens = (number(event, "tokens_per_second") or math.nan) * ms / 1000
        if math.isfinite(tokens):
            point["tokens"] = round(tokens)
    rows = list(points.values())
    add_tokens(rows)
    add_step_times(rows)
    return rows


def add_tokens(rows):
    known = [(0, 0), *((row["step"], row["tokens"]) for row in rows if row["tokens"] is not None)]
    steps, tokens = zip(*known)
    for row in rows:
        if row["tokens"] is None and len(known) > 1:
            row["tokens"] = round(float(np.interp(row["step"], steps, tokens)))


def add_step_times(rows):
    """Milliseconds a step since the training line before."""
    step, seconds = 0, 0.0
    for row in rows:
        if row["train_loss"] is None:
            continue
        if row["step"] > step and row["seconds"] > seconds:
            row["ms_per_step"] = 1000 * (row["seconds"] - seconds) / (row["step"] - step)
        step, seconds = row["step"], row["seconds"]


def curve(points, key, x="seconds"):
    """[(x, value)] of the points that have both."""
    return [(point[x], point[key]) for point in points if None not in (point[x], point[key])]
