"""Finished runs for the tests of what is submitted: three seeds of one toy configuration, and what a run would have
said on other hardware.

    three = make_seeds(toy, folder)                     [folder/seed42, ...]
    changed(copies(three, tmp_path)[0], seed=42)        another summary, in all three files that have it
"""

import json
import math
import re
import shutil

from runs import RULE, call, command, good

SEEDS = (42, 314, 1337)
# What a run of the contest's size on the contest's machine says, where it differs from a toy run.
RECORD = {
    "eligible": "yes", "eligible_reasons": [], "device": "NVIDIA H100 80GB HBM3", "world_size": 8,
    "documents_decoded": 50_000, "val_tokens": 40_540_802, "val_bytes": 151_080_891, "train_seconds": 590.0,
    "calibrate_seconds": 4.0, "eval_seconds": 400.0}


def make_seeds(toy, folder):
    """Folders of three runs that differ in their seed."""
    folders = [folder / f"seed{seed}" for seed in SEEDS]
    for seed, out in zip(SEEDS, folders):
        good(call(command(toy, out, f"SEED={seed}", "SELFTEST=1", "EVAL_STRIDE=0")))
    return folders


def copies(folders, to):
    """Copies of runs, which a test may change."""
    return [shutil.copytree(folder, to / folder.name) for folder in folders]


def changed(folder, **facts):
    """Change the summary of a run wherever it stands: summary.json, the last lines of train.log and metrics.jsonl. A
    fact that is None is taken out.
    """
    summary = json.loads((folder / "summary.json").read_text()) | facts
    summary = {key: value for key, value in summary.items() if value is not None}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    lines = (folder / "train.log").read_text().splitlines()
    (folder / "train.log").write_text("\n".join([*lines[:-1], f"summary {json.dumps(summary)}"]) + "\n")
    events = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*events[:-1], json.dumps({"event": "summary", **summary})]) + "\n")
    return folder


def event_changed(folder, event, **facts):
    """Change the values of an event in metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row | facts if row["event"] == event else row for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder



def as_record(folder, bpb):
    """Let a toy run say what one of the contest's size on the contest's machine would, with this score."""
    tokens = RECORD["val_tokens"]
    size = RECORD["val_bytes"]
    loss = bpb * math.log(2) * size / tokens
    changed(folder, **RECORD, val_bpb=bpb, val_loss=loss)
    log = (folder / "train.log").read_text()
    head, rule, body = log.rpartition(RULE)
    for pattern, line in (
            (r"(?m)^(val_loader:.* tokens:)\d+$", rf"\g<1>{tokens}"),
            (r"(?m)^(bytes ).*$", rf"\1documents_decoded:50000 share:1 wrong:0 val_tokens:{tokens} val_bytes:{size} "
             rf"bytes_per_token:{size / tokens:.6f} counted_by:table"),
            (r"(?m)^(final_\w+) val_loss:\S+ val_bpb:\S+", rf"\1 val_loss:{loss:.8f} val_bpb:{bpb:.8f}"),
            (r"(?m)^(run .*world_size:)1 ", r"\g<1>8 ")):
        body, count = re.subn(pattern, line, body)
        assert count == 1, pattern
    (folder / "train.log").write_text(head + rule + body)
    return folder
