"""What is known of a run: {name: value}, which the table, the pictures, the page and --json show."""

import shlex
from functools import partial
from pathlib import Path

from common import BadInput, lock_holder
from reports import reading
from reports.compressors import compressors
from reports.reading import curve, number, sentences, text

# As in train_gpt.py, which is not imported: that takes seconds.
DEFAULT = {"DATA_PATH": "data/datasets/fineweb10B_sp1024", "VAL_TOKENS": 0, "ITERATIONS": 20_000,
           "MAX_WALLCLOCK_SECONDS": 600.0}
# What a run says of itself under the same name, in its summary or before.
NUMBERS = ("seed", "code_bytes", "model_bytes", "total_bytes", "limit_bytes", "margin_bytes", "params", "train_tokens",
           "epochs", "val_bytes", "val_tokens")
TEXTS = ("val_sha256", "valid", "tested", "eligible", "commit")
LISTS = ("reasons", "tests", "eligible_reasons")


def phase_seconds(summary, train):
    """{phase: seconds} of a finished run; of another one, the training time of its last step."""
    known = {key: number(summary, key) for key in summary or () if key.endswith("_seconds")}
    clock = {key.removesuffix("_seconds"): seconds for key, seconds in known.items() if seconds is not None}
    trained = number(train, "train_time_ms")
    return clock or ({"train": trained / 1000} if trained else {})


def gather(run_dir, compress=True):
    """Everything that is shown of a run, as {name: value}; without `compress` nothing is compressed for it."""
    holder = lock_holder(run_dir)  # first: of a run that ends here, the last event is read
    metrics = run_dir / "metrics.jsonl"
    events, damaged = reading.read_events(metrics)
    last = partial(reading.last, events)
    summary = reading.read_summary(run_dir / "summary.json")
    state, words = reading.state_of(events, summary is not None, holder)
    if state != "finished":
        summary = None  # what a run had come to before it was resumed
    try:
        pairs = shlex.split(text(last("settings"), "settings"))
        changed = dict(pair.partition("=")[::2] for pair in pairs)
        settings = {name: type(default)(changed.get(name, default)) for name, default in DEFAULT.items()}
    except ValueError:
        raise BadInput(f"{metrics}: the line of settings is damaged") from None
    known = {}  # the later one counts
    for part in (last("run"), last("model_params"), last("artifact"), summary):
        known |= part or {}
    train = last("train")
    checkpoint = last("checkpoint")
    device = last("choice", lambda event: "device" in event)
    steps = [number(event, "step") or 0 for event in events if event["event"] in ("train", "val", "checkpoint")]
    clock = phase_seconds(summary, train)
    tokens = number(summary, "train_tokens")
    mean_rate = tokens / clock["train"] if tokens and clock.get("train") else None
    of_roles = last("role_bytes") or {}
    points = reading.points_of(events)
    facts = {
        "run_dir": str(run_dir), "finished": summary is not None, "state": state, "ended": words,
        "phase": reading.phase_of(events), "steps_to_make": settings["ITERATIONS"],
        "seconds_to_train": settings["MAX_WALLCLOCK_SECONDS"], "damaged_lines": damaged, "settings": changed,
        **scores(last, summary),
        **{key: number(known, key) for key in NUMBERS},
        **{key: text(known, key) for key in TEXTS},
        **{key: sentences(known, key) for key in LISTS},
        "role_bytes": {role: number(of_roles, role) for role in of_roles if number(of_roles, role) is not None},
        "steps": number(summary, "steps") if summary else max(steps, default=0), "seconds": clock,
        "tokens_per_second": mean_rate or number(train, "tokens_per_second"),
        "peak_memory_mib": number(summary, "peak_memory_mib") or number(last("peak_memory"), "mib"),
        "data": text(summary, "data") or Path(settings["DATA_PATH"]).name,
        "device": text(summary, "device") or text(device, "device"), "processes": number(known, "world_size"),
        "checkpoint": text(checkpoint, "file"), "checkpoint_step": number(checkpoint, "step"),
        "train_curve": curve(points, "train_loss"), "val_curve": curve(points, "val_bpb"), "points": points,
        "compressors": {"note": "no score yet to compare them with"},
    }
    if compress and (facts["final_bpb"] is not None or facts["before_bpb"] is not None):
        facts["compressors"] = compressors(run_dir, settings, last("tokenizer") or {}, facts["val_bytes"])
    return facts


def scores(last, summary):
    """The final score, the last one before packing, and their difference where both are of contiguous windows.
    `last` finds an event of the run.
    """
    final = last("final")
    val = last("val")
    weights = last("eval", lambda event: text(event, "name").endswith("_weights"))
    packed = last("eval", lambda event: "contiguous" in text(event, "name"))
    if packed is None and "contiguous" in text(final, "name"):
        packed = final
    before = number(weights or val, "val_bpb")
    after = number(packed, "val_bpb")
    return {"final_bpb": number(summary or final, "val_bpb"), "final_loss": number(summary or final, "val_loss"),
            "final_kind": text(summary, "predictor") or text(final, "name"), "before_bpb": before,
            "before_weights": text(weights, "name").removesuffix("_weights") or "last",
            "before_at_step": None if weights else number(val, "step"),
            "packing_cost_bpb": None if None in (before, after) else after - before}


def names_of(every):
    """The name of each run: that of its folder, or where several have the same, the whole path. Bytes that are not
    UTF-8 are shown as \\xNN.
    """
    paths = [facts["run_dir"] for facts in every]
    short = [Path(path).resolve().name for path in paths]
    names = paths if len(set(short)) < len(set(paths)) else short
    return [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in names]
