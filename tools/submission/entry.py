"""A submission folder as its files have it: the script, submission.json, the logs, and which log belongs to which seed.

A file that cannot be read is a problem of the folder, not of the reader: see Entry.problems.
"""

import json
import os
import re
from decimal import Decimal
from functools import partial
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
    claim: Claim  # without a score, if there is only a log
    log: logs.Log | None
    score: logs.Score | None  # the line of the log that the claim states, else the last one
    training: logs.Log | None  # where its training is logged: the same log, unless the evaluation has one of its own

    @property
    def bpb(self):
        return self.score.bpb if self.score else None

    @property
    def loss(self):
        return self.score.loss if self.score else None


class Entry(NamedTuple):
    path: Path
    name: str
    track: str  # record | non-record
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
    try:
        path = Path(path).resolve(strict=True)
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
    runs = runs_of(claims_of(record or {}), found, number_of(record or {}, "val_bpb"))
    return Entry(path, path.name, track or track_of(path, record), tuple(files), script_file, source,
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
    likely = [file for file in top(files, ".py") if file.name.startswith("train")]
    return max(likely, key=lambda file: (file.name == "train_gpt.py", file.size), default=None)


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
    problem, line = "is not a JSON object", None
    try:
        if len(raw) > MOST_JSON:
            raise ValueError(f"{len(raw):,} bytes")
        record = json.loads(raw.decode("utf-8-sig"), parse_float=Decimal)
        if isinstance(record, dict):
            return record
    except (ValueError, RecursionError, ArithmeticError) as failure:
        reason = getattr(failure, "msg", None) or str(failure).partition("\n")[0] or type(failure).__name__
        problem, line = f"is not JSON: {reason}", getattr(failure, "lineno", None)
    if script.is_pointer(raw):
        problem, line = "is a pointer of Git LFS, not the file", None
    problems.append(error("CK-FOLDER", problem, file.name, line))
    return None


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
        if form == "pointer" or form in NO_LOG_FORMS and name.endswith(".log"):
            problems.append(error("CK-FOLDER", f"is {NO_LOG_FORMS[form]}, not a log", file.name))
        found += [log for log in runs if log.is_run]
    return found


NO_LOG_FORMS = {"pointer": "a pointer of Git LFS", "empty": "empty", "binary": "binary", "json": "JSON"}


def track_of(path, record):
    """record or non-record: by the folder that it lies in, else by submission.json."""
    folders = {folder: track for track, folder in rules.TRACKS.items()}
    stated = str((record or {}).get("track") or "").lower().replace("-", "_")
    is_non_record = "non_record" in stated or "unlimited" in stated
    return folders.get(path.parent.name) or ("non-record" if is_non_record else "record")


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


def first_number(mapping, keys):
    """The number under the first of these keys that has one, as a Decimal, or None."""
    return next((Decimal(mapping[key]) for key in keys if is_number(mapping.get(key))), None)


def number_of(mapping, field):
    """The number under any name of a field, as a Decimal, or None."""
    return first_number(mapping, rules.SYNONYMS.get(field, (field,)))


def claim_of(seed, row):
    """What a row of the table of seeds says: a score, or a mapping that has it."""
    row = row if isinstance(row, dict) else {"val_bpb": row}
    size = first_number(row, BYTES_KEYS)
    size = None if size is None else int(size)
    return Claim(int(seed), first_number(row, BPB_KEYS), number_of(row, "val_loss"), size)


def claims_of(record):
    """The seeds that submission.json names, in any of the ways in use: a table, a list of rows, fields of the record, a
    list of seeds.
    """
    fields = {key: row for key, row in record.items()
              if key.startswith("seed_") and SEED_KEY.fullmatch(key) and isinstance(row, dict)}
    tables = [record.get(key) for key in (*rules.SYNONYMS["seed_results"], "seeds")]
    for rows in filter(None, (*tables, fields)):
        if isinstance(rows, dict):
            seeds = [SEED_KEY.fullmatch(str(name).lower()) for name in rows]
            if all(seeds):
                return [claim_of(seed[1], row) for seed, row in zip(seeds, rows.values())]
        elif isinstance(rows, list) and all(isinstance(row, dict) and is_number(row.get("seed")) for row in rows):
            return [claim_of(row["seed"], row) for row in rows]
    seeds = record.get("seeds")
    stated = map(str, seeds) if isinstance(seeds, list) else ()
    return [Claim(int(seed)) for seed in stated if seed.isdecimal() and len(seed) <= 12]


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


def runs_of(claims, found, headline):
    """A Run for each claim; without claims, for each seed that has a log. A log serves one claim."""
    if not claims:
        named = dict.fromkeys(seed_of(log) for log in found if log.val_bpb is not None)
        if len(named) > 1:
            named.pop(None, None)  # a log without a seed beside others with one
        claims = [Claim(seed) for seed in named]
    unused = list(found)
    runs = []
    for claim in claims:
        seed = claim.seed
        bpb = headline if claim.val_bpb is None else claim.val_bpb
        candidates = [log for log in unused if seed in (None, log.seed) or seed in numbers_in_name(log.path)]
        if not any(stated_score(log, bpb) for log in candidates):
            candidates += [log for log in unused if stated_score(log, claim.val_bpb)]
        log = max(candidates, key=partial(likeness, seed, bpb), default=None)
        score = None
        if log:
            unused.remove(log)
            score = stated_score(log, claim.val_bpb) or stated_score(log, headline) or last_score(log)
        runs.append(Run(seed, claim, log, score, training_log(log, found)))
    return runs


def likeness(seed, bpb, log):
    """How much a log looks like that of a seed with this score, to be compared with other logs."""
    return (stated_score(log, bpb) is not None, seed_in_name(log.path) == seed, log.seed == seed,
            log.val_bpb is not None, log.steps or 0, -len(log.path.parts))


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
    if log.val_bpb is None:
        return None
    for score in log.scores:
        if score.bpb == log.val_bpb and score.digits == log.digits:
            return score
    return logs.Score("summary", log.val_loss, log.val_bpb, log.digits or 8, None, log.lines.get("val_bpb", 1))


def stated_by_logs(entry, field):
    """The values of a fact in the logs of the seeds, where they state it."""
    pairs = [(getattr(run.log, field, None), getattr(run.training, field, None)) for run in entry.runs]
    return [training if own is None else own for own, training in pairs if (own, training) != (None, None)]


def seeds_with_logs(entry):
    return {run.seed for run in entry.runs if run.log}
