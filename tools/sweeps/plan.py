"""What is asked for: the rows of a plan, a grid or an ablation, their settings, and all that is wrong with them."""

import itertools
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import train_gpt
from common import BadInput, trainer_errors
from sweeps.data import files_of
from train_gpt import LISTS, Settings

BASE = "base"
FIELDS = {field.name.upper(): field for field in fields(Settings)}
MATCHES = {"steps": "equal steps", "time": "equal time"}


class Owned(NamedTuple):
    """A setting that a sweep decides itself."""

    value: str  # in place of a file's, while settings are checked
    option: str = ""  # of the sweep that decides it


OWNED = {
    "SEED": Owned("0", "--seeds"),
    "ITERATIONS": Owned("1", "--steps"),
    "MAX_WALLCLOCK_SECONDS": Owned("0", "--steps"),
    "OUT_DIR": Owned("", "--out"),
    "RUN_ID": Owned("", "--out"),
    "PHASES": Owned("all"),
    "ARTIFACT": Owned(""),
    "RESUME": Owned(""),
}


class PlanRow(NamedTuple):
    """One technique of a plan or one point of a grid. A point has no reference: its score is shown as it is."""

    name: str
    changes: tuple[str, ...]
    reference: str | None = BASE
    where: str = ""  # FILE:LINE


@dataclass
class Plan:
    """Everything that is decided before the first run."""

    rows: list[PlanRow]
    settings: dict[str, Settings]  # of each row and of the base
    base_words: list[str]
    steps: int
    seeds: list[int]
    matches: list[str]
    left_out: list[str]  # what --ablate cannot switch off, and why
    grid: bool = False  # scores of points, not changes from a base
    axes: "list[Axis] | None" = None  # of a search, whose rows come as it goes on

    def names(self):
        """The base, where its score is shown, and the rows: what is run."""
        names = [row.name for row in self.rows]
        return names if self.grid else [BASE, *names]


# ---- plan files and grids -------------------------------------------------------------------------------------------


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
        head, colon, rest = line.partition(":")
        name, reference = re.fullmatch(r"(.*?)\s*(?:\[vs\s+(.*?)\s*\])?\s*", head).groups()
        try:
            changes = shlex.split(rest)
        except ValueError as error:
            complaints.append(f"{where}: {error}")
            continue
        if colon and name and changes:
            rows.append(PlanRow(name, tuple(changes), reference or BASE, where))
        else:
            complaints.append(f"{where}: {line!r} is not 'name : KEY=VALUE ...'")
    return rows, [*complaints, *_wrong_names(rows, path)]


def _wrong_names(rows, path):
    """Complaints about the names of rows and of their references."""
    names = {BASE}
    if not rows:
        yield f"{path}: holds no row"
    for row in rows:
        if row.name in names:
            yield f"{row.where}: the name {row.name!r} is taken"
        names.add(row.name)
    for row in rows:
        if row.reference not in names:
            yield f"{row.where}: there is no row {row.reference!r} to compare with"


def read_grid(words):
    """(rows, words for the base, complaints): all combinations of KEY=A,B words; one value is for the base."""
    axes = {}  # setting -> its words
    base_words = []
    complaints = []
    for word in words:
        axis = alternatives(word)
        name = setting_of(word)
        if len(axis) < 2:
            base_words.append(word)
        elif name in axes:
            complaints.append(f"grid: {name} is given twice")
        else:
            axes[name] = axis
    if not axes:
        return [], base_words, [*complaints, "grid: no word has two values, such as MATRIX_LR=0.02,0.03"]
    rows = [PlanRow(" ".join(point), point, None, "grid") for point in itertools.product(*axes.values())]
    return rows, base_words, complaints


def setting_of(word):
    """KEY of KEY=VALUE."""
    return word.partition("=")[0]


def alternatives(word):
    """KEY=A,B as [KEY=A, KEY=B]. The value of a list setting has commas of its own: there | divides."""
    name, equals, text = word.partition("=")
    if word.startswith("@") or not equals:
        return [word]
    is_list = name in FIELDS and FIELDS[name].type in LISTS
    values = dict.fromkeys(text.split("|" if is_list else ","))
    return [f"{name}={value}" for value in values]


# ---- ranges ---------------------------------------------------------------------------------------------------------

RANGE = re.compile(r"(.+)\.\.(.+)")


class Axis(NamedTuple):
    """What may be tried of a setting: the texts of its values, or a range."""

    name: str
    choices: list[str] | None = None
    low: float = 0.0
    high: float = 0.0

    def suggest(self, trial):
        """KEY=VALUE."""
        if self.choices:
            return f"{self.name}={trial.suggest_categorical(self.name, self.choices)}"
        if FIELDS[self.name].type is int:
            return f"{self.name}={trial.suggest_int(self.name, int(self.low), int(self.high))}"
        by_factor = self.low > 0 and self.high / self.low >= 4  # rates and decays differ by factors
        return f"{self.name}={trial.suggest_float(self.name, self.low, self.high, log=by_factor):.4g}"


def has_range(words):
    return any(setting_of(word) in FIELDS and RANGE.fullmatch(word.partition("=")[2]) for word in words)


def read_axes(words):
    """([Axis], words for the base, complaints) of KEY=LOW..HIGH and KEY=A,B words."""
    axes = []
    base_words = []
    complaints = []
    for word in words:
        name, _, text = word.partition("=")
        bounds = RANGE.fullmatch(text) if name in FIELDS else None
        if bounds and FIELDS[name].type in (int, float):
            try:
                low, high = map(float, bounds.groups())
                if low >= high:
                    raise ValueError
                axes.append(Axis(name, None, low, high))
            except ValueError:
                complaints.append(f"search: {word} is no range of numbers, such as {name}=0.01..0.1")
        elif bounds:
            complaints.append(f"search: {name} is no number; give its values as {name}=A,B")
        elif len(alternatives(word)) > 1:
            axes.append(Axis(name, [value.partition("=")[2] for value in alternatives(word)]))
        else:
            base_words.append(word)
    return axes, base_words, complaints


# ---- every switch of a record ---------------------------------------------------------------------------------------

ROOMS_OF_SWITCHES = ("Model", "Training", "Averaging", "Quantisation and packing", "Evaluation")
NO_TECHNIQUES = ("ALLOW_INVALID", "SELFTEST", "GPTQ_RESERVE_SECONDS", *OWNED)  # they change no score


TABLE = re.findall(r"^ {4}(\S.*?) {2,}([A-Z][A-Z_0-9]+) {2,}\S+$", train_gpt.__doc__, re.MULTILINE)
SETTINGS_OF_TECHNIQUES = [setting for _, setting in TABLE]
# {setting: technique} of the table at the top of the trainer, but for settings of several techniques.
TECHNIQUES = {setting: name for name, setting in TABLE if SETTINGS_OF_TECHNIQUES.count(setting) == 1}
MEANS_OFF = ("off", "no", "not", "none", "never", "as", "contiguous")


def off_value(name):
    """The text that switches a setting off, or None, as its type, its sentence and the table of techniques say."""
    field = FIELDS[name]
    if field.type is bool:
        return "0"
    if get_origin(field.type) is Literal:
        return next((choice for choice in ("none", "off") if choice in get_args(field.type)), None)
    zero = re.search(r"\b0: (\w+)", field.metadata["doc"])
    if zero:
        return "0" if zero[1] in MEANS_OFF else None
    return "0" if name in SETTINGS_OF_TECHNIQUES and field.metadata["lo"] == 0 else None


def switches(settings):
    """[(name, KEY=VALUE that turns it off)] of what these settings turn on: a switch is set to off, another choice to
    its default.
    """
    found = []
    for name, field in FIELDS.items():
        is_switch = field.metadata["group"] in ROOMS_OF_SWITCHES and name not in NO_TECHNIQUES
        if not is_switch or not settings.holds(settings.rule(field.name)):
            continue
        value = getattr(settings, field.name)
        off = off_value(name)
        is_choice = get_origin(field.type) is Literal
        if off is not None and value and str(value) != off:
            found.append((f"no {TECHNIQUES.get(name, name)}", f"{name}={off}"))
        elif off is None and is_choice and value != field.default:
            found.append((f"{name}={field.default}", f"{name}={field.default}"))
    return found


def ablation(settings, parse):
    """(rows, texts of what cannot be turned off alone) for --ablate. `parse`: see parse_settings()."""
    rows = []
    left_out = []
    for name, change in switches(settings):
        wrong = parse(change)[1]
        if wrong:
            left_out.append(f"{change} alone cannot be: {wrong[0]}")
        else:
            rows.append(PlanRow(name, (change,), BASE, "--ablate"))
    return rows, left_out


# ---- settings -------------------------------------------------------------------------------------------------------


def parse_settings(words, **owned):
    """(settings of a run, complaints): what the sweep decides has a value that fits, whatever a file says. `owned` has
    other such values; None leaves a setting to the words.
    """
    owned = {name: setting.value for name, setting in OWNED.items()} | owned
    words = [word for word in words if setting_of(word) not in OWNED]
    words += [f"{name}={value}" for name, value in owned.items() if value is not None]
    try:
        with trainer_errors():
            settings = Settings.parse(words)
    except BadInput as error:
        return None, [line.removeprefix("argument: ") for line in str(error).splitlines()]
    return settings, []


def refused(words):
    """Complaints about settings that a sweep decides itself, and about those that are given twice."""
    names = [setting_of(word) for word in words]
    for name in dict.fromkeys(names):
        if name in OWNED and OWNED[name].option:
            yield f"{name} is decided by the sweep: use {OWNED[name].option}"
        elif name in OWNED:
            yield f"{name} is decided by the sweep"
        elif names.count(name) > 1 and not name.startswith("@"):
            yield f"{name} is set twice"


def without_effect(row, settings):
    """Complaints about changes of a row that its other settings leave without effect: a training for nothing."""
    idle = settings.idle()
    for name in map(setting_of, row.changes):
        if name in idle:
            yield f"{name} has no effect here without {idle[name]}: leave it out, or set that, too"


def resolve(base_words, rows):
    """({row name: settings}, complaints). Complaints about the base are not repeated for every row."""
    base_settings, wrong_in_base = parse_settings(base_words)
    settings = {BASE: base_settings}
    complaints = [f"{BASE}: {text}" for text in (*refused(base_words), *wrong_in_base)]
    for row in rows:
        row_settings, wrong = parse_settings([*base_words, *row.changes])
        settings[row.name] = row_settings
        wrong_in_row = [text for text in wrong if text not in wrong_in_base]
        if row_settings:
            wrong_in_row += without_effect(row, row_settings)
        complaints += [f"{row.where}: {text}" for text in (*refused(row.changes), *wrong_in_row)]
    for row in rows:
        row_settings = settings[row.name]
        if row_settings and row_settings == settings.get(row.reference):
            complaints.append(f"{row.where}: has the settings of {row.reference!r}, with which it is compared")
    return settings, complaints


def refused_environment(env):
    """The trainer would read these; a command that is to be repeated cannot depend on them."""
    for name in sorted(FIELDS.keys() & env.keys()):
        yield f"environment: {name} is set; unset it, and give {name}=... after --base if it is wanted"
    try:
        with trainer_errors():
            Settings.parse((), {name: value for name, value in env.items() if name not in FIELDS})
    except BadInput as error:
        yield from str(error).splitlines()


# ---- the plan -------------------------------------------------------------------------------------------------------


def is_grid(args):
    return bool(args.words) and not Path(args.words[0]).is_file() and "=" in args.words[0]


def read_rows(args):
    """(rows, words for the base, what --ablate leaves out, complaints) of a command."""
    if args.ablate:
        base_words = [f"@{args.ablate}", *args.base, *args.words]
        settings, _ = parse_settings(base_words)
        if not settings:  # the complaints come when the base itself is read
            return [], base_words, [], []
        rows, left_out = ablation(settings, lambda change: parse_settings([*base_words, change]))
        return rows, base_words, left_out, [] if rows else [f"{args.ablate} turns nothing on"]
    if is_grid(args):
        rows, words, complaints = ([], *read_axes(args.words)[1:]) if has_range(args.words) else read_grid(args.words)
        return rows, [*args.base, *words], [], complaints
    rows, complaints = read_plan(Path(args.words[0]))
    return rows, [*args.base, *args.words[1:]], [], complaints


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
    rows, base_words, left_out, complaints = read_rows(args)
    settings, wrong = resolve(base_words, rows)
    complaints += [*wrong, *refused_environment(env)]
    if args.only:
        rows, unknown = only(rows, args.only)
        complaints += unknown
    steps = args.steps
    if not steps and settings[BASE]:
        steps = parse_settings(base_words, ITERATIONS=None, MAX_WALLCLOCK_SECONDS=1)[0].iterations
        if not steps:
            complaints.append("the base has no ITERATIONS: give --steps N")
    for row_settings in filter(None, settings.values()):
        try:
            files_of(row_settings)
        except BadInput as error:
            complaints.append(str(error))
    grid = is_grid(args) and not args.ablate
    axes = read_axes(args.words)[0] if grid and has_range(args.words) else None
    if axes and args.match not in (None, "steps"):
        complaints.append("a search compares at equal steps: leave out --match")
    if axes and not args.trials:
        complaints.append("a range is searched, and needs --trials N")
    if args.trials and not axes:
        complaints.append("--trials: there is no range to search, such as MATRIX_LR=0.01..0.1")
    if args.stop_worse is not None and grid:
        complaints.append("--stop-worse compares with the base, which a grid and a search do not make: leave it out")
    elif args.stop_worse is not None and settings[BASE] and not 0 < settings[BASE].val_loss_every < steps:
        complaints.append("--stop-worse compares validations on the way: set VAL_LOSS_EVERY below the steps of a run")
    if complaints:
        raise BadInput("\n".join(dict.fromkeys(complaints)))
    return Plan(rows, settings, base_words, steps, args.seeds, matches_of(args.match, grid), left_out, grid, axes)


def matches_of(match, grid):
    """What is compared: --match, which is both for a plan and steps for a grid where it is not given."""
    if match in MATCHES:
        return [match]
    if grid and match is None:
        return ["steps"]
    return list(MATCHES)
