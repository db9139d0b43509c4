"""CK-FOLDER and CK-DIFF: the files of a folder, its name, the fields of submission.json, and what else a branch
touches.
"""

import json
import re
import subprocess
from pathlib import Path

from submission import rules
from submission.entry import is_number, seeds_with_logs, stated_by_logs
from submission.findings import error, note, unknown, warning

# ---- files and names ------------------------------------------------------------------------------------------------

README = re.compile(r"(?i)readme(?:\.\w+)?")
ALLOWED = re.compile(  # what merged folders hold
    r"(?i).*\.(?:md|json|jsonl|py|log|txt|out|sh|env|c|cc|cpp|h|cu|cuh|rs|model|vocab|png|jpe?g|svg|gif|pdf|csv|tsv|toml|"
    r"ya?ml|cfg|ini)|LICENSE.*|NOTICE.*|Makefile|Dockerfile|CITATION.*")
STRAY = (  # what editors, systems and builds leave behind, and what belongs to a repository, not to a folder
    r"(?i)(?:.*/)?(?:__pycache__|\.DS_Store|Thumbs\.db|\.git\w*|\.venv|\.idea|\.vscode|\.ipynb_checkpoints|wandb)"
    r"(?:/.*)?|.*(?:~|\.bak|\.orig|\.rej|\.swp|\.pyc|\.pid|\.tmp|\.part|\.un~)")
WEIGHTS = r"(?i).*\.(?:pt|pth|ptz|ckpt|safetensors|pg|pkl|npz|npy|zst|xz|lzma|br|gz|bz2|zip|tar|7z|onnx)"
ODD_FILES = (  # (the whole name, how bad it is, why): the first that fits counts
    (STRAY, warning, "does not belong into a submission"),
    (r"(?i)(?:.*/)?\w*_(?:train|val)_\w*\.bin", error, "is a shard of the data, {:,} bytes"),
    (WEIGHTS, warning, "is a blob of {:,} bytes; no weights are wanted"),
    (r"(?s)(?:.*/)?records/.*", warning, "lies in a records/ inside the folder"))


def check_files(entry):
    if not any(README.fullmatch(file.name) for file in entry.files):
        yield error("CK-FOLDER", "there is no README.md")
    if entry.record_file is None:
        yield error("CK-FOLDER", "there is no submission.json")
    elif entry.record_file != "submission.json":
        yield warning("CK-FOLDER", "the name has to be submission.json", entry.record_file)
    if entry.script is None:
        yield error("CK-FOLDER", "there is no train_gpt.py, nor another train*.py")
    elif entry.script.name != "train_gpt.py":
        yield warning("CK-FOLDER", "the name has to be train_gpt.py", entry.script.name)
    elif entry.script.size == 0:
        yield error("CK-FOLDER", "is empty", "train_gpt.py")
    if not entry.logs:
        yield error("CK-FOLDER", "there is no log of a run")
    for file in entry.files:
        odd = next((row for row in ODD_FILES if re.fullmatch(row[0], file.name)), None)
        if file.is_link:
            yield warning("CK-FOLDER", "is a link; a folder of a submission is complete in itself", file.name)
        elif odd:
            _, say, text = odd
            yield say("CK-FOLDER", text.format(file.size), file.name)
        elif not ALLOWED.fullmatch(file.name.rpartition("/")[2]):
            yield warning("CK-FOLDER", f"is of a kind that no merged folder has, {file.size:,} bytes", file.name)
    yield from entry.problems


def check_name(entry):
    if not rules.FOLDER_NAME.fullmatch(entry.name):
        yield error("CK-FOLDER", f"the folder's name {entry.name!r} is not YYYY-MM-DD_ShortDescription")
    parent = entry.path.parent.name
    track = {folder: track for track, folder in rules.TRACKS.items()}.get(parent)
    if track not in (None, entry.track):
        yield warning("CK-FOLDER", f"lies in {parent}, and is checked as a {entry.track}")
    stated, _ = entry.get("track")
    if track and isinstance(stated, str):
        says_non_record = "non" in stated.lower() or "unlimited" in stated.lower()
        if says_non_record != (track == "non-record"):
            yield warning("CK-FOLDER", f"track is {stated!r}, and the folder lies in {parent}", entry.record_file)


# ---- submission.json ------------------------------------------------------------------------------------------------

TYPE_NAMES = {str: "a text", float: "a number", int: "a whole number", list: "a list"}


def check_record(entry):
    """The fields of submission.json: are they there, under their names, and of their types?"""
    if entry.record is None:
        return
    for field in (*rules.REQUIRED, *rules.WANTED):
        is_required = field in rules.REQUIRED
        value, key = entry.get(field)
        if value is None:
            say = error if is_required else warning
            yield say("CK-FOLDER", f"has no {field}", entry.record_file)
        elif key != field:
            say = warning if is_required else note
            yield say("CK-FOLDER", f"has {key} in place of {field}", entry.record_file)
    for field, wanted in rules.TYPES.items():
        value = entry.record.get(field)
        if value is not None and not is_of(value, wanted):
            say = error if field == "val_bpb" else warning
            shown = json.dumps(value, default=str)[:60]
            yield say("CK-FOLDER", f"{field} is {shown}, not {TYPE_NAMES[wanted]}", entry.record_file)
    date = entry.record.get("date")
    if isinstance(date, str) and not rules.DATE.fullmatch(date):
        say = note if rules.DATE.match(date) else warning
        yield say("CK-FOLDER", f"date is {date!r}, not YYYY-MM-DD", entry.record_file)


def is_of(value, wanted):
    if wanted is float:
        return is_number(value)
    if wanted is int:
        return is_number(value) and value == int(value)
    return isinstance(value, wanted)


def check_compliance(entry):
    """What the author declares, where the logs say otherwise (#2139 declared three seeds and had one)."""
    declared = (entry.record or {}).get("compliance")
    if not isinstance(declared, dict) or not entry.runs:
        return
    limits = {"artifact_under_16mb": ("total_bytes", rules.SIZE_LIMIT),
              "train_under_600s": ("train_seconds", rules.TRAIN_LIMIT + rules.TRAIN_TOLERANCE),
              "eval_under_600s": ("needed_seconds", rules.EVAL_LIMIT)}
    facts = {name: max(stated_by_logs(entry, field), default=0) <= limit for name, (field, limit) in limits.items()}
    facts["three_seeds"] = len(seeds_with_logs(entry)) >= rules.LEAST_SEEDS
    for name, fact in facts.items():
        if declared.get(name) is True and not fact:
            yield error("CK-FOLDER", f"declares {name}: true, and its logs say otherwise", entry.record_file)


# ---- the branch -----------------------------------------------------------------------------------------------------

BASES = ("upstream/main", "origin/main", "main")  # of the repository it was forked from, of the fork, local


def check_diff(entry, base):
    """A pull request adds one folder and touches nothing else."""
    root = git(entry.path, "rev-parse", "--show-toplevel")
    if not root:
        yield unknown("CK-DIFF", "the folder lies in no git work tree: what else a branch touches is not known")
        return
    known = [name for name in BASES if git(root, "rev-parse", "--verify", "--quiet", name)]
    base = base or next(iter(known), None)
    start = git(root, "merge-base", base, "HEAD") if base else ""
    if not start:
        missing = f"no common commit with {base}" if base else f"none of {', '.join(BASES)} exists"
        yield unknown("CK-DIFF", f"{missing}; name what to compare with: --base REV")
        return
    inside = entry.path.relative_to(Path(root).resolve()).as_posix()
    changed = git(root, "diff", "--name-only", "-z", start).split("\0")
    changed += git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    changed = sorted({name for name in changed if name})
    outside = [name for name in changed if not name.startswith(f"{inside}/")]
    if not changed:
        yield note("CK-DIFF", f"nothing differs from {base}")
    elif outside:
        shown = ", ".join(outside[:3]) + (", ..." if len(outside) > 3 else "")
        yield error("CK-DIFF", f"{len(outside)} file(s) outside the folder differ from {base}: {shown}")
    if not re.fullmatch(r"records/track_\w+/[^/]+", inside):
        yield error("CK-DIFF", f"the folder is {inside} of its repository, not records/TRACK/NAME")


def git(folder, *words):
    """What git prints in a folder; "" where there is no work tree, or no git."""
    try:
        done = subprocess.run(("git", *words), cwd=folder, capture_output=True, timeout=60, check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "surrogateescape").strip("\n") if done.returncode == 0 else ""
