"""What is known of a run: {name: value}, which the table, the pictures, the page and --json show."""

import shlex
from pathlib import Path

from common import BadInput, lock_holder
from reports.compressors import compressors
from reports.reading import (
    curve,
    last,
    number,
    phase_of,
    points_of,
    read_events,
    read_summary,
    sentences,
    state_of,
    text,
)

# As in train_gpt.py, which is not imported: that takes seconds.
DEFAULT = {"DATA_PATH": "data/datasets/fineweb10B_sp1024", "VOCAB_SIZE": "1024", "TOKENIZER_PATH": "",
           "VAL_TOKENS": "0", "ITERATIONS": "20000", "MAX_WALLCLOCK_SECONDS": "600.0"}


def run_settings(events):
    """({name: text} of the settings that were changed, those of DEFAULT as they were in the run)."""
    pairs = shlex.split(text(last(events, "settings"), "settings"))
    given = dict(pair.partition("=")[::2] for pair in pairs)
    settings = {name: given.get(name, default) for name, default in DEFAULT.items()}
    for name in ("VAL_TOKENS", "ITERATIONS"):
        int(settings[name])
    float(settings["MAX_WALLCLOCK_SECONDS"])
    return given, settings


def phase_seconds(summary, train):
    """{phase: seconds} of a finished run; of another one, the training time of its last step."""
    clock = {}
    for key in summary or ():
        seconds = number(summary, key)
        if key.endswith("_seconds") and seconds is not None:
            clock[key.removesuffix("_seconds")] = seconds
    trained = number(train, "train_time_ms")
    if not clock and trained:
        clock["train"] = trained / 1000
    return clock


def gather(run_dir, compress=True):
    """Everything that is shown of a run, as {name: value}; without `compress` nothing is compressed for it."""
    holder = lock_holder(run_dir)  # first: of a run that ends here, the last event is read
    events, damaged = read_events(run_dir / "metrics.jsonl")
    summary = read_summary(run_dir / "summary.json")
    state = state_of(events, summary is not None, holder)
    if state.kind != "finished":
        summary = None  # what a run had come to before it was resumed
    try:
        changed, settings = run_settings(events)
    except ValueError:
        raise BadInput(f"{run_dir / 'metrics.jsonl'}: the line of settings is damaged") from None
    run = last(events, "run")
    train = last(events, "train")
    artifact = last(events, "artifact")
    checkpoint = last(events, "checkpoint")
    device = last(events, "choice", lambda event: "device" in event)
    counted = [event for event in events if event["event"] in ("train", "val", "checkpoint")]
    last_step = max((number(event, "step") or 0 for event in counted), default=0)
    clock = phase_seconds(summary, train)
    tokens = number(summary, "train_tokens")
    rate = number(train, "tokens_per_second")
    if tokens and clock.get("train"):
        rate = tokens / clock["train"]
    val_bytes = number(summary, "val_bytes")
    of_roles = last(events, "role_bytes") or {}
    points = points_of(events)
    facts = {
        "run_dir": str(run_dir), "finished": summary is not None, "state": state.kind, "ended": state.words,
        "phase": phase_of(events), "steps_to_make": int(settings["ITERATIONS"]),
        "seconds_to_train": float(settings["MAX_WALLCLOCK_SECONDS"]),
        "damaged_lines": damaged, "settings": changed, "seed": number(summary, "seed") or number(run, "seed"),
        **scores(events, summary),
        **{key: number(summary, key) or number(artifact, key)
           for key in ("code_bytes", "model_bytes", "total_bytes")},
        "role_bytes": {role: number(of_roles, role) for role in of_roles if number(of_roles, role) is not None},
        "limit_bytes": number(artifact, "limit_bytes"), "margin_bytes": number(artifact, "margin_bytes"),
        "params": number(summary, "params") or number(last(events, "model_params"), "params"),
        "steps": number(summary, "steps") if summary else last_step,
        "train_tokens": tokens, "epochs": number(summary, "epochs"),
        "tokens_per_second": rate, "seconds": clock,
        "peak_memory_mib": number(summary, "peak_memory_mib") or number(last(events, "peak_memory"), "mib"),
        "val_bytes": val_bytes, "val_tokens": number(summary, "val_tokens"), "val_sha256": text(summary, "val_sha256"),
        "valid": text(summary, "valid"), "reasons": sentences(summary, "reasons"),
        "tested": text(summary, "tested"), "tests": sentences(summary, "tests"),
        "eligible": text(summary, "eligible"), "eligible_reasons": sentences(summary, "eligible_reasons"),
        "data": text(summary, "data") or Path(settings["DATA_PATH"]).name, "commit": text(run, "commit"),
        "device": text(summary, "device") or text(device, "device"), "processes": number(run, "world_size"),
        "checkpoint": text(checkpoint, "file"), "checkpoint_step": number(checkpoint, "step"),
        "train_curve": curve(points, "train_loss"), "val_curve": curve(points, "val_bpb"), "points": points,
    }
    facts["compressors"] = {"note": "no score yet to compare them with"}
    if compress and (facts["final_bpb"] is not None or facts["before_bpb"] is not None):
        tokenizer_sha256 = text(last(events, "tokenizer"), "sha256")
        facts["compressors"] = compressors(run_dir, settings, tokenizer_sha256, val_bytes)
    return facts


def scores(events, summary):
    """The final score, the last one before packing, and their difference where both are of contiguous windows."""
    final = last(events, "final")
    val = last(events, "val")
    weights = last(events, "eval", lambda event: text(event, "name").endswith("_weights"))
    packed = last(events, "eval", lambda event: "contiguous" in text(event, "name"))
    if packed is None and "contiguous" in text(final, "name"):
        packed = final
    before = number(weights or val, "val_bpb")
    after = number(packed, "val_bpb")
    cost = None if before is None or after is None else after - before
    return {"final_bpb": number(summary or final, "val_bpb"), "final_loss": number(summary or final, "val_loss"),
            "final_kind": text(summary, "predictor") or text(final, "name"), "before_bpb": before,
            "before_weights": text(weights, "name").removesuffix("_weights") or "last",
            "before_at_step": None if weights else number(val, "step"),
            "packing_cost_bpb": cost}


# ---- names ----------------------------------------------------------------------------------------------------------


def names_of(every):
    """The name of each run: that of its folder, or where several have the same, the whole path. Bytes that are not
    UTF-8 are shown as \\xNN.
    """
    paths = [facts["run_dir"] for facts in every]
    short = [Path(path).resolve().name for path in paths]
    names = paths if len(set(short)) < len(set(paths)) else short
    return [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in names]