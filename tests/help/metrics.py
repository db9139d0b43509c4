"""Folders of runs that never ran: metrics.jsonl and summary.json as the trainer writes them, made up in no time."""

import json
import math
import random


def made_up_run(folder, steps=400, seed=1337, score=1.2, settings="", ended=None, **summary):
    """A finished run with this final score, or with `ended` (reason, exit code) one that stopped half-way. Returns its
    folder; `summary` has further facts of the summary.
    """
    rng = random.Random(f"{folder.name} {seed}")
    words = f"SEED={seed} OUT_DIR={folder} DATA_PATH=/nowhere/text {settings}".strip()
    events = [{"event": "run", "commit": "0123456789ab", "world_size": 1, "seed": seed},
              {"event": "settings", "settings": words}, {"event": "choice", "device": "cpu"},
              {"event": "model_params", "params": 1_000_000}]
    ms = 0.0
    for step in range(10, (steps if ended is None else steps // 2) + 1, 10):
        ms += 10 * rng.uniform(28, 34)
        loss = 6 * math.exp(-step / 60) + 2.6 * score * (1 + 0.3 * math.exp(-step / 200)) + rng.gauss(0, 0.02)
        events.append({"event": "train", "step": step, "train_loss": loss, "train_time_ms": ms,
                       "lr_scale": min(1.0, 1.6 * (1 - step / steps)), "tokens_per_second": 1000 * step * 2048 / ms})
        if step % 50 == 0:
            events.append({"event": "val", "step": step, "val_loss": loss, "val_bpb": loss / 2.6, "train_time_ms": ms})
    if ended is None:
        sizes = {"matrix": 9_000_000, "embed": 4_000_000, "scalar": 40_000, "header": 1200}
        model = sum(sizes.values())
        facts = {"code_bytes": 90_000, "model_bytes": model, "total_bytes": model + 90_000}
        events += [{"event": "artifact", **facts, "limit_bytes": 16_000_000, "margin_bytes": 16_000_000 - model - 90_000},
                   {"event": "role_bytes", **sizes},
                   {"event": "final", "name": "allocated_sliding_window", "val_loss": 2.6 * score, "val_bpb": score}]
        summary = {"val_bpb": score, "val_loss": 2.6 * score, "valid": "yes", "reasons": [], "eligible": "no",
                   "eligible_reasons": ["hardware"], "steps": steps, "train_tokens": 2048 * steps, "val_bytes": 1000,
                   "train_seconds": ms / 1000, "export_seconds": 3.5, "eval_seconds": 2.0, "seed": seed, "data": "text",
                   "params": 1_000_000, **facts, **summary}
        events.append({"event": "summary", **summary})
    else:
        events.append({"event": "ended", "reason": ended[0], "exit_code": ended[1]})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    if ended is None:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder
