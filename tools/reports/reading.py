"""What a run wrote to its folder, as facts: metrics.jsonl, summary.json, and whether it still holds its lock."""

import math

import numpy as np

from common import BadInput, parsed

# ---- files ----------------------------------------------------------------------------------------------------------


def read_events(path):
    """(events, number of damaged lines). A run that was killed may leave half a line."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give the folder of a run, such as logs/RUN_ID") from None
    found = [parsed(line) for line in lines if line.strip()]
    events = [event for event in found if isinstance(event.get("event"), str)]
    if not events:
        raise BadInput(f"{path} holds no events of a run")
    return events, len(found) - len(events)


def read_summary(path):
    """The summary of a run that came to its end, or None."""
    if not path.exists():
        return None
    summary = parsed(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}
    if not summary:
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
    return next((event for event in reversed(events) if event["event"] == kind and accept(event)), None)


# ---- how it ended ---------------------------------------------------------------------------------------------------


def state_of(events, has_summary, holder):
    """(finished, running, diverged, interrupted, failed or killed; the same in words). What a resumed run wrote before
    counts no more.
    """
    if holder:
        return "running", f"running ({holder})"
    begin = max((place for place, event in enumerate(events) if event["event"] == "run"), default=0)
    session = events[begin:]
    ended = last(session, "ended")
    if ended:
        reason = text(ended, "reason") or "no reason given"
        if number(ended, "exit_code") == 4:
            return "diverged", f"diverged ({reason})"
        if reason.startswith("interrupted"):
            return "interrupted", reason
        return "failed", f"failed: {reason}"
    summary_is_older = last(events, "summary") and not last(session, "summary")
    if has_summary and not summary_is_older:
        return "finished", "finished"
    return "killed", "killed (no word of an end, and no process holds run.lock)"


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
        point |= {key: number(event, key) for key in ("train_loss", "lr_scale", "val_loss", "val_bpb") if key in event}
        if rate := number(event, "tokens_per_second"):
            point["tokens"] = round(rate * ms / 1000)
    add_tokens_and_times(list(points.values()))
    return list(points.values())


def add_tokens_and_times(points):
    """Tokens where they are not known, and milliseconds a step since the training line before."""
    known = [(0, 0), *((point["step"], point["tokens"]) for point in points if point["tokens"] is not None)]
    steps, tokens = zip(*known)
    step, seconds = 0, 0.0
    for point in points:
        if point["tokens"] is None and len(known) > 1:
            point["tokens"] = round(float(np.interp(point["step"], steps, tokens)))
        if point["train_loss"] is None:
            continue
        if point["step"] > step and point["seconds"] > seconds:
            point["ms_per_step"] = 1000 * (point["seconds"] - seconds) / (point["step"] - step)
        step, seconds = point["step"], point["seconds"]


def curve(points, key):
    """[(seconds, value)] of the points that have this value."""
    return [(point["seconds"], point[key]) for point in points if point[key] is not None]
