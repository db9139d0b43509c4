"""What is asked for: the rows of a plan, a grid or an ablation, their settings, and all that is wrong with them."""

import contextlib
import itertools
import math
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

from common import BadInput, table_of_techniques, trainer_errors
from train_gpt import LISTS, Settings, find_shards, list_shards, tokenizer_paths

BASE = "base"
FIELDS = {field.name.upper(): field for field in fields(Settings)}
MATCHES = {"steps": "equal steps", "time": "equal time"}
# What a sweep decides itself: a value in place of a file's while settings are checked, and the option that decides it.
OWNED = {
    "SEED": ("0", "--seeds"),
    "ITERATIONS": ("1", "--steps"),
    "MAX_WALLCLOCK_SECONDS": ("0", "--steps"),
    "OUT_DIR": ("", "--out"),
    "RUN_ID": ("", "--out"),
    "PHASES": ("all", ""),
    "ARTIFACT": ("", ""),
    "RESUME": ("", ""),
}


class PlanRow(NamedTuple):
    """One technique of a plan or one point of a grid. A point has no reference: its score is shown as it is."""

    name: str
    changes: tuple[str, ...]
    reference: str | None = BASE
    where: str = ""  # FILE:LINE


class Plan(NamedTuple):
    """Everything that is decided before the first run."""

    name: str
    rows: list[PlanRow]  # of a search they come as it goes on
    settings: dict[str, Settings]  # of each row and of the base
    base_words: list[str]
    steps: int
    seeds: list[int]
    matches: list[str]
    left_out: list[str]  # what --ablate cannot switch off, and why
    grid: bool  # scores of points, not changes from a base
    ranges: dict  # of a search: {setting: see values_of()}


# ---- plan files and grids -------------------------------------------------------------------------------------------


LINE = re.compile(r"(?!\[vs\s)(?P<name>[^:]+?)\s*(?:\[vs\s+(?P<reference>[^:]*?)\s*\])?\s*:(?P<changes>.*)")


def read_plan(path):
    """(rows, complaints) of a plan file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})"]
    rows = []
    complaints = []
    for number, line in enumerate(lines, 1):
        line = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()  # "(#549)" in a name is no comment
        if not line:
            continue
        where = f"{path}:{number}"
        found = LINE.fullmatch(line)
        try:
            changes = shlex.split(found["changes"]) if found else ()
        except ValueError as error:
            complaints.append(f"{where}: {error}")
            continue
        if changes:
            rows.append(PlanRow(found["name"], tuple(changes), found["reference"] or BASE, where))
        else:
            complaints.append(f"{where}: {line!r} is not 'name : KEY=VALUE ...'")
    names = [BASE, *(row.name for row in rows)]
    for number, row in enumerate(rows, 1):
        if row.name in names[:number]:
            complaints.append(f"{row.where}: the name {row.name!r} is taken")
        if row.reference not in names:
            complaints.append(f"{row.where}: there is no row {row.reference!r} to compare with")
    return rows, complaints or ([] if rows else [f"{path}: holds no row"])


def setting_of(word):
    """KEY of KEY=VALUE."""
    return word.partition("=")[0]


class Range(NamedTuple):
    """Where Optuna looks for a value; NaN where it was given no numbers."""

    low: float
    high: float


def values_of(word):
    """The values of a word of a grid or a search: the texts of KEY=A,B or the Range of KEY=LOW..HIGH. The value of a
    list setting has commas of its own: there | divides.
    """
    name, equals, text = word.partition("=")
    if word.startswith("@") or not equals:
        return [text]
    kind = FIELDS[name].type if name in FIELDS else None
    low, dots, high = text.partition("..")
    if dots and kind in (int, float):
        with contextlib.suppress(ValueError):
            return Range(float(low), float(high))
        return Range(math.nan, math.nan)
    return list(dict.fromkeys(text.split("|" if kind in LISTS else ",")))


def read_grid(words):
    """({setting: its values}, words for the base, complaints): a word with one value is for the base."""
    axes = {}
    base_words = []
    complaints = []
    for word in words:
        name = setting_of(word)
        values = values_of(word)
        if len(values) < 2:
            base_words.append(word)
            continue
        if name in axes:
            complaints.append(f"grid: {name} is given twice")
        if isinstance(values, Range) and not values.low < values.high:
            complaints.append(f"search: {word} is no range of numbers, such as {name}=0.01..0.1")
        axes[name] = values
    if not axes:
        complaints.append("grid: no word has two values, such as MATRIX_LR=0.02,0.03")
    return axes, base_words, complaints


def points(axes):
    """The rows of a grid: all combinations of the values."""
    words = [[f"{name}={value}" for value in values] for name, values in axes.items()]
    return [PlanRow(" ".join(point), point, None, "grid") for point in itertools.product(*words) if point]


# ---- every switch of a record ---------------------------------------------------------------------------------------

ROOMS_OF_SWITCHES = ("Model", "Training", "Averaging", "Quantisation and packing", "Evaluation")
NO_TECHNIQUES = ("ALLOW_INVALID", "SELFTEST", "GPTQ_RESERVE_SECONDS", *OWNED)  # they change no score
TABLE = table_of_techniques()
SETTINGS_OF_TECHNIQUES = [setting for _, setting in TABLE]
# {setting: technique} of the table at the top of the trainer, but for settings of several techniques.
TECHNIQUES = {setting: name for name, setting in TABLE if SETTINGS_OF_TECHNIQUES.count(setting) == 1}
MEANS_OFF = ("off", "no", "not", "none", "never", "as", "contiguous")


def off_value(name):
    """The text that switches a setting off, or None, as its type, its sentence and the table of techniques say. Of a
    choice without such a word it is the default.
    """
    field = FIELDS[name]
    if field.type is bool:
        return "0"
    if get_origin(field.type) is Literal:
        return next((choice for choice in ("none", "off") if choice in get_args(field.type)), field.default)
    zero = re.search(r"\b0: (\w+)", field.metadata["doc"])
    if zero:
        return "0" if zero[1] in MEANS_OFF else None
    return "0" if name in SETTINGS_OF_TECHNIQUES and field.metadata["lo"] == 0 else None


def switches(settings):
    """[(name, KEY=VALUE that turns it off)] of what these settings turn on."""
    for name, field in FIELDS.items():
        is_switch = field.metadata["group"] in ROOMS_OF_SWITCHES and name not in NO_TECHNIQUES
        if not is_switch or not settings.holds(settings.rule(field.name)):
            continue
        value = getattr(settings, field.name)
        off = off_value(name)
        if off is not None and value and str(value) != off:
            change = f"{name}={off}"
            yield (f"no {TECHNIQUES.get(name, name)}" if off in ("0", "none", "off") else change), change


def ablation(base_words):
    """(rows, texts of what cannot be turned off alone, complaints) for --ablate."""
    settings, complaints = parse_settings(base_words)
    if complaints:
        return [], [], []  # they come when the base itself is read
    rows = []
    left_out = []
    for name, change in switches(settings):
        wrong = parse_settings([*base_words, change])[1]
        if wrong:
            left_out.append(f"{change} alone cannot be: {wrong[0]}")
        else:
            rows.append(PlanRow(name, (change,), BASE, "--ablate"))
    return rows, left_out, [] if rows else [f"{base_words[0][1:]} turns nothing on"]


# ---- settings -------------------------------------------------------------------------------------------------------


def with_complaints(function, *args):
    """(what a function of the trainer returns, []), or (None, its complaints)."""
    try:
        with trainer_errors():
            return function(*args), []
    except BadInput as error:
        return None, [line.removeprefix("argument: ") for line in str(error).splitlines()]


def parse_settings(words, **owned):
    """(settings of a run, complaints): what the sweep decides has a value that fits, whatever a file says. `owned` has
    other such values; None leaves a setting to the words.
    """
    owned = {name: value for name, (value, _) in OWNED.items()} | owned
    words = [word for word in words if setting_of(word) not in OWNED]
    words += [f"{name}={value}" for name, value in owned.items() if value is not None]
    return with_complaints(Settings.parse, words)


def refused(words):
    """Complaints about settings that a sweep decides itself, and about those that are given twice."""
    names = [setting_of(word) for word in words]
    for name in dict.fromkeys(names):
        if name in OWNED:
            option = OWNED[name][1]
            yield f"{name} is decided by the sweep{f': use {option}' if option else ''}"
        elif names.count(name) > 1 and not name.startswith("@"):
            yield f"{name} is set twice"


def resolve(base_words, rows):
    """({row name: settings}, complaints), those about the base not again for every row. What would be a training for
    nothing is one, too.
    """
    base_settings, wrong_in_base = parse_settings(base_words)
    parsed = {row.name: parse_settings([*base_words, *row.changes]) for row in rows}
    settings = {BASE: base_settings, **{name: row_settings for name, (row_settings, _) in parsed.items()}}
    complaints = [f"{BASE}: {text}" for text in (*refused(base_words), *wrong_in_base)]
    for row in rows:
        row_settings, wrong = parsed[row.name]
        wrong = [*refused(row.changes), *(text for text in wrong if text not in wrong_in_base)]
        if row_settings:
            idle = row_settings.idle()
            wrong += [f"{name} has no effect here without {idle[name]}: leave it out, or set that, too"
                      for name in map(setting_of, row.changes) if name in idle]
            if row_settings == settings.get(row.reference):
                wrong.append(f"has the settings of {row.reference!r}, with which it is compared")
        complaints += [f"{row.where}: {text}" for text in wrong]
    return settings, complaints


def files_of(settings):
    """(training shards, the other files that a score depends on); BadInput of the trainer if shards are missing."""
    folder = settings.data_path
    tokenizers = [path for path in tokenizer_paths(settings) if path.is_file()]
    return (find_shards(folder, "train"),
            [*find_shards(folder, "val"), *list_shards(folder, "val_bytes"), *tokenizers[:1]])


def refused_environment(env):
    """The trainer would read these; a command that is to be repeated cannot depend on them."""
    for name in sorted(FIELDS.keys() & env.keys()):
        yield f"environment: {name} is set; unset it, and give {name}=... after --base if it is wanted"
    others = {name: value for name, value in env.items() if name not in FIELDS}
    yield from with_complaints(Settings.parse, (), others)[1]


# ---- the plan -------------------------------------------------------------------------------------------------------


def only(rows, names):
    """(the rows of --only and their references, complaints)."""
    by_name = {row.name: row for row in rows}
    complaints = [f"--only {name!r}: there is no such row" for name in names if name not in by_name]
    wanted = set()
    for name in names:
        while name in by_name and name not in wanted:
            wanted.add(name)
            name = by_name[name].reference
    return [row for row in rows if row.name in wanted], complaints


def make_plan(args, env):
    """The plan, or BadInput with all complaints at once."""
    left_out = []
    ranges = {}
    first, *others = args.words or [""]
    grid = not args.ablate and "=" in first and not Path(first).is_file()
    if args.ablate:
        name = f"ablate-{args.ablate.name}"
        base_words = [f"@{args.ablate}", *args.base, *args.words]
        rows, left_out, complaints = ablation(base_words)
    elif grid:
        name = "grid"
        axes, words, complaints = read_grid(args.words)
        base_words = [*args.base, *words]
        if any(isinstance(values, Range) for values in axes.values()):
            ranges = axes
        rows = [] if ranges else points(axes)
    else:
        name = Path(first).stem
        rows, complaints = read_plan(Path(first))
        base_words = [*args.base, *others]
    settings, wrong = resolve(base_words, rows)
    complaints += [*wrong, *refused_environment(env)]
    if args.only:
        rows, unknown = only(rows, args.only)
        complaints += unknown
    base = settings[BASE]
    steps = args.steps
    if not steps and base:
        steps = parse_settings(base_words, ITERATIONS=None, MAX_WALLCLOCK_SECONDS=1)[0].iterations
    for row_settings in filter(None, settings.values()):
        complaints += with_complaints(files_of, row_settings)[1]
    checks = [
        (base and not steps, "the base has no ITERATIONS: give --steps N"),
        (ranges and args.match not in (None, "steps"), "a search compares at equal steps: leave out --match"),
        (ranges and not args.trials, "a range is searched, and needs --trials N"),
        (args.trials and not ranges, "--trials: there is no range to search, such as MATRIX_LR=0.01..0.1"),
        (args.stop_worse and grid,
         "--stop-worse compares with the base, which a grid and a search do not make: leave it out"),
        (args.stop_worse and not grid and base and not 0 < base.val_loss_every < steps,
         "--stop-worse compares validations on the way: set VAL_LOSS_EVERY below the steps of a run"),
    ]
    complaints += [text for is_wrong, text in checks if is_wrong]
    if complaints:
        raise BadInput("\n".join(dict.fromkeys(complaints)))
    match = args.match or ("steps" if grid else "both")
    matches = list(MATCHES) if match == "both" else [match]
    return Plan(name, rows, settings, base_words, steps, args.seeds, matches, left_out, grid, ranges)
