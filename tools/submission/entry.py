"""A submission folder as its files have it: the script, submission.json, the logs, and which log belongs to which seed.

A file that cannot be read is a problem of the folder, not of the reader: see Entry.problems.
"""

import json
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from common import BadInput
from submission import logs, rules, script
from submission.findings import Finding, error, unknown

MOST_FILES = 20_000
MOST_JSON = 4 << 20  # bytes
LOG_NAMES = re.compile(r"(?i).*\.(?:log|txt|out)")
NO_LOG = re.compile(r"(?i)(?:requirements|license|notice|readme|vocab|merges).*")


class File(NamedTuple):
    name: str  # relative to the folder, with slashes
    path: Path
    size: int  # bytes
    is_link: bool


class Claim(NamedTuple):
    """What submission.json says of one seed."""

    seed: int | None
    val_bpb: Decimal | None = None
    val_loss: Decimal | None = None
    bytes: int | None = None


class Run(NamedTuple):
    """A seed with its claim and its log."""

    seed: int | None
    claim: Claim | None
    log: logs.Log | None
    score: logs.Score | None  # the line of the log that the claim states, else the last one
    training: logs.Log | None  # where its training is logged: the same log, unless the evaluation has one of its own

    @property
    def bpb(self):
        if self.score:
            return self.score.bpb
        return None if self.log is None else self.log.val_bpb

    @property
    def loss(self):
        if self.score:
            return self.score.loss
        return None if self.log is None else self.log.val_loss


class Entry(NamedTuple):
    path: Path
    name: str
    track: str  # record | non-record
    track_source: str  # where that is from
    files: tuple[File, ...]
    script: File | None
    source: script.Script | None  # None if it is no Python
    own_code: tuple[File, ...]  # further files with code that it uses
    record: dict | None  # submission.json
    record_file: str | None
    logs: tuple[logs.Log, ...]
    runs: tuple[Run, ...]
    problems: tuple[Finding, ...]  # files that are not what their names say

    def relative(self, path):
        return Path(path).relative_to(self.path).as_posix()

    def get(self, field):
        """(value, its name in submission.json) of a field under any of its names; (None, None) if it is missing."""
        for key in rules.SYNONYMS.get(field, (field,)):
            value = (self.record or {}).get(key)
            if value is not None:
                return value, key
        return None, None


def read_entry(path, track=None):
    """The folder at a path. BadInput if there is none."""
    path = Path(path)
    try:
        path = path.resolve(strict=True)
        files = list_files(path)
    except (OSError, ValueError, RuntimeError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise BadInput(f"{path}: {reason}; give the folder of a submission") from None
    problems = []
    script_file = find_script(files)
    raw = read_bytes(script_file, problems)
    source = script.read(raw)
    if script_file and source is None and not script.is_pointer(raw):
        problems.append(unknown("CK-FOLDER", "is not Python that this version of Python reads", script_file.name))
    record_file = find_record(files)
    record = read_record(record_file, problems)
    found = read_all_logs(files, problems)
    track, track_source = find_track(track, path, record)
    claims = claims_of(record or {})
    headline = number_of(record or {}, "val_bpb")
    runs = runs_of(claims, found, path, headline)
    return Entry(path, path.name, track, track_source, tuple(files), script_file, source,
                 tuple(own_code(files, script_file, source)), record, record_file.name if record_file else None,
                 tuple(found), tuple(runs), tuple(problems))


# ---- files ----------------------------------------------------------------------------------------------------------


def list_files(path):
    """The files below a folder. Links are listed, not followed."""
    files = []
    for folder, folders, names in os.walk(path, onerror=raise_error):
        folders.sort()
        folders[:] = [name for name in folders if name != ".git"]
        for name in sorted(names):
            place = Path(folder, name)
            status = place.lstat()
            files.append(File(place.relative_to(path).as_posix(), place, status.st_size, place.is_symlink()))
        if len(files) > MOST_FILES:
            raise BadInput(f"{path}: over {MOST_FILES:,} files; give the folder of one submission")
    return files


def raise_error(error):
    raise error


def top(files, suffix):
    return [file for file in files if file.name.endswith(suffix) and "/" not in file.name and not file.is_link]


def find_script(files):
    """train_gpt.py, else the file beside it that is most like it."""
    scripts = top(files, ".py")
    for file in scripts:
        if file.name == "train_gpt.py":
            return file
    likely = [file for file in scripts if file.name.startswith("train")]
    return max(likely, key=lambda file: file.size, default=None)


CODE = (".py", ".c", ".cc", ".cpp", ".cu", ".rs", ".lzma", ".xz", ".br", ".zst", ".b85")


def own_code(files, script_file, source):
    """The files with code that the script imports or names, and those that these do."""
    candidates = {file.name: file for file in files if file.name.endswith(CODE) and not file.is_link}
    used = {}
    sources = [source] if source else []
    while sources:
        user = sources.pop()
        for name, file in candidates.items():
            module = name.removesuffix("/__init__.py").removesuffix(".py").partition("/")[0]
            is_meant = name in user.strings or (name.endswith(".py") and module in user.imports)
            if is_meant and name != script_file.name and name not in used:
                used[name] = file
                inner = script.read(file.path.read_bytes()) if name.endswith(".py") else None
                sources += [inner] if inner else []
    return list(used.values())


def find_record(files):
    records = [file for file in top(files, ".json") if file.name.startswith("submission")]
    return min(records, key=lambda file: len(file.name), default=None)


def read_bytes(file, problems):
    if file is None:
        return b""
    try:
        return file.path.read_bytes()
    except OSError as failure:
        problems.append(error("CK-FOLDER", f"cannot be read ({failure.strerror})", file.name))
        return b""


def read_record(file, problems):
    """submission.json as a dict whose numbers keep the digits that they are written with; None if there is none."""
    raw = read_bytes(file, problems)
    if file is None:
        return None
    if script.is_pointer(raw):
        problems.append(error("CK-FOLDER", "is a pointer of Git LFS, not the file", file.name))
        return None
    try:
        if len(raw) > MOST_JSON:
            raise ValueError(f"{len(raw):,} bytes")
        record = json.loads(raw.decode("utf-8-sig"), parse_float=Decimal)
    except (ValueError, RecursionError, ArithmeticError) as failure:
        reason = getattr(failure, "msg", None) or str(failure).partition("\n")[0] or type(failure).__name__
        problems.append(error("CK-FOLDER", f"is not JSON: {reason}", file.name, getattr(failure, "lineno", None)))
        return None
    if not isinstance(record, dict):
        problems.append(error("CK-FOLDER", "is not a JSON object", file.name))
        return None
    return record


def read_all_logs(files, problems):
    """Every run of every file that is a log by its name and says something of a run."""
    found = []
    for file in files:
        name = file.name.rpartition("/")[2]
        if file.is_link or not LOG_NAMES.fullmatch(name) or NO_LOG.fullmatch(name):
            continue
        try:
            runs = logs.read_logs(file.path)
        except BadInput as failure:
            problems.append(error("CK-FOLDER", str(failure).partition(": ")[2], file.name))
            continue
        form = runs[0].form
        if form == "pointer":
            problems.append(error("CK-FOLDER", "is a pointer of Git LFS, not a log", file.name))
        elif form in ("empty", "binary", "json") and name.endswith(".log"):
            problems.append(error("CK-FOLDER", f"is {FORMS[form]}, not a log", file.name))
        found += [log for log in runs if log.is_run]
    return found


FORMS = {"empty": "empty", "binary": "binary", "json": "JSON"}


def find_track(given, path, record):
    """(record or non-record, where that is from)."""
    if given:
        return given, "--track"
    for track, folder in rules.TRACKS.items():
        if path.parent.name == folder:
            return track, "the folder"
    stated = str((record or {}).get("track") or "").lower().replace("-", "_")
    if "non_record" in stated or "unlimited" in stated:
        return "non-record", "submission.json"
    if "10min" in stated or stated == "record":
        return "record", "submission.json"
    return "record", "default"


# ---- claims ---------------------------------------------------------------------------------------------------------

SEED_KEY = re.compile(r"(?:seed_?|s)?(\d{1,12})")
BYTES_KEYS = ("artifact_bytes", "bytes_total", "total_bytes", "artifact_size_bytes")
BPB_KEYS = ("val_bpb", "val_bpb_exact", "bpb")


LARGEST_NUMBER = Decimal(10) ** 18


def is_number(value):
    """Is this a finite number of submission.json, and of a size that a submission can have?"""
    if not isinstance(value, (int, Decimal)) or isinstance(value, bool):
        return False
    return Decimal(value).is_finite() and abs(Decimal(value)) < LARGEST_NUMBER


def number_of(mapping, field):
    """The number under any name of a field, as a Decimal, or None."""
    for key in rules.SYNONYMS.get(field, (field,)):
        if is_number(mapping.get(key)):
            return Decimal(mapping[key])
    return None


def claim(seed, row):
    """A row of the table of seeds."""
    if is_number(row):
        return Claim(seed, Decimal(row))
    if not isinstance(row, dict):
        return Claim(seed)
    bpb = next((Decimal(row[key]) for key in BPB_KEYS if is_number(row.get(key))), None)
    size = next((int(row[key]) for key in BYTES_KEYS if is_number(row.get(key))), None)
    return Claim(seed, bpb, number_of(row, "val_loss"), size)


def claims_of(record):
    """The seeds that submission.json names, in any of the ways in use: a table, a list of rows, a list of seeds."""
    for key in (*rules.SYNONYMS["seed_results"], "seeds"):
        rows = record.get(key)
        if isinstance(rows, dict):
            found = [(SEED_KEY.fullmatch(str(name).lower()), row) for name, row in rows.items()]
            if found and all(match for match, _ in found):
                return [claim(int(match.group(1)), row) for match, row in found]
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            seeds = [(row.get("seed"), row) for row in rows]
            if all(is_number(seed) for seed, _ in seeds):
                return [claim(int(seed), row) for seed, row in seeds]
    rows = [(SEED_KEY.fullmatch(key), value) for key, value in record.items() if key.startswith("seed_")]
    named = [claim(int(match.group(1)), value) for match, value in rows if match and isinstance(value, dict)]
    if named:
        return named
    seeds = record.get("seeds")
    if isinstance(seeds, list):
        stated = [int(seed) for seed in seeds if str(seed).isdecimal() and len(str(seed)) <= 12]
        return [Claim(seed) for seed in stated]
    return []


# ---- which log is of which seed -------------------------------------------------------------------------------------

SEED_IN_NAME = re.compile(r"(?i)seed[_-]?(\d{1,12})")


LAST_NUMBER = re.compile(r"(?i)(?:^|[_-])s?(\d{1,12})$")


def seed_in_name(path):
    """The seed that a file's name states, or None."""
    match = SEED_IN_NAME.search(path.stem)
    return int(match.group(1)) if match else None


def numbers_in_name(path):
    return {int(number) for number in re.findall(r"\d{1,12}", path.stem)}


def states(score, bpb):
    """Is this the score that a claim states, after rounding? The claim may have fewer digits than the log."""
    if bpb is None:
        return False
    digits = min(decimals(bpb), score.digits)
    return abs(score.bpb - float(bpb)) <= max(0.51 * 10**-digits, 1e-6)


def decimals(number):
    """Digits after the point of a Decimal as it is written."""
    return min(max(-number.as_tuple().exponent, 0), 18)


def stated_score(log, bpb):
    """The score of a log that a claim states: the last such line with the most digits, or None.

    A line with few digits does not count where another one has the same score with more, which the claim misses.
    """
    found = [score for score in log.scores if states(score, bpb)]
    with_loss = [score for score in found if score.loss is not None]
    best = max(with_loss or found, key=lambda score: (score.digits, score.line), default=None)
    if best is None or best.digits >= decimals(bpb):
        return best
    finer = [score for score in log.scores if score.digits > best.digits and logs.says_the_same(score, best)]
    return None if finer else best


def runs_of(claims, found, path, headline):
    """A Run for each claim; without claims, for each seed that has a log. A log serves one claim."""
    seeds = [(claim.seed, claim) for claim in claims]
    if not claims:
        scored = [log for log in found if log.val_bpb is not None]
        named = dict.fromkeys(seed_of(log) for log in scored)
        if len(named) > 1:
            named.pop(None, None)  # a log without a seed beside others with one
        seeds = [(seed, None) for seed in named]
    unused = list(found)
    runs = []
    for seed, stated in seeds:
        candidates = [log for log in unused if seed in (None, log.seed) or seed in numbers_in_name(log.path)]
        bpb = stated.val_bpb if stated and stated.val_bpb is not None else headline

        def rank(log, seed=seed, bpb=bpb):
            depth = len(log.path.relative_to(path).parts)
            named = seed_in_name(log.path) == seed
            return (stated_score(log, bpb) is not None, named, log.seed == seed, log.val_bpb is not None,
                    log.steps or 0, -depth)

        if not any(stated_score(log, bpb) for log in candidates):
            candidates += [log for log in unused if stated and stated_score(log, stated.val_bpb)]
        log = max(candidates, key=rank, default=None)
        score = None
        if log:
            unused.remove(log)
            score = stated_score(log, stated.val_bpb if stated else None) or stated_score(log, headline)
        runs.append(Run(seed, stated, log, score or last_score(log), training_log(log, found)))
    return runs


def training_log(log, found):
    """The log with the training of an evaluation: itself, or that of the same seed if only one has it."""
    if log is None or log.train_seconds is not None:
        return log
    same = [other for other in found if other.train_seconds is not None and seed_of(other) == seed_of(log)]
    return same[0] if len(same) == 1 else log


def seed_of(log):
    """The seed of a log: what it says, else what its name says, else the number at the end of that."""
    if log.seed is not None:
        return log.seed
    named = seed_in_name(log.path)
    last = LAST_NUMBER.search(log.path.stem)
    return int(last.group(1)) if named is None and last else named


def last_score(log):
    """The line of a log with its final score, or None."""
    if log is None or log.val_bpb is None:
        return None
    for score in log.scores:
        if score.bpb == log.val_bpb and score.digits == log.digits:
            return score
    return logs.Score("summary", log.val_loss, log.val_bpb, log.digits or 8, None, log.lines.get("val_bpb", 1))


def stated_by_logs(entry, field):
    """The values of a fact in the logs of the seeds, where they state it."""
    found = []
    for run in entry.runs:
        values = [getattr(log, field) for log in (run.log, run.training) if log]
        found += [value for value in values if value is not None][:1]
    return found


def seeds_with_logs(entry):
    return {run.seed for run in entry.runs if run.log}
