"""The settings with which a script ran, what each means, which techniques they turn on and whose these are."""

import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from typing import NamedTuple

from common import ROOT, BadInput, load_trainer, table_of_techniques, trainer_errors

PATHS = {"DATA_PATH", "TOKENIZER_PATH"}  # settings that another machine may need to change
OFF = {"", "0", "0.0", "none", "off"}  # values that turn something off
NEUTRAL = {"TTT_LR_MULT_PROJ": "1.0", "TTT_LR_MULT_FC": "1.0", "ADAPTIVE_LR_MAX": "1.0",
           "PHASED_TTT_NUM_PHASES": "1", "GATE_BITS": "16"}  # values that change nothing
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from submission import recipe
recipe.print_experiment(sys.argv[2], sys.argv[3:])
"""
CHILD_SECONDS = 300


class Setting(NamedTuple):
    """A setting of a script, as it was in a run."""

    name: str  # in capitals
    group: str
    value: str
    default: str  # of that script; the value itself where it is a constant of it
    doc: str  # its sentence
    code: str  # the function or class that does it
    has_effect: bool  # no other setting makes it idle

    @property
    def is_on(self):
        return self.has_effect and self.value not in OFF and NEUTRAL.get(self.name) != self.value


# ---- what the script says -------------------------------------------------------------------------------------------


class Experiment(NamedTuple):
    """What a script makes of the settings of a run; the group Run is left out."""

    values: dict  # {name: value as text}
    defaults: dict  # of that script, which may have those of a record
    words: list  # KEY=VALUE of the run that the script takes: others are constants of it
    settings_hash: str

    @property
    def has_constants(self):
        """Is the script one that was cut down to a record?"""
        return len(self.values) > len(self.defaults)


def experiment_of(script, words):
    """The Experiment of a script, a file that is the trainer or was made of it, given these words KEY=VALUE."""
    if script.read_bytes() == (ROOT / "train_gpt.py").read_bytes():
        return Experiment(*asked(load_trainer(), words))
    command = [sys.executable, "-B", "-c", CHILD, str(ROOT / "tools"), str(script), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise BadInput(f"{script} took over {CHILD_SECONDS} s to import; give a script of this trainer") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BadInput(f"{script} does not say its settings ({reason}); give a script of this trainer")
    return Experiment(*json.loads(done.stdout.splitlines()[-1]))


def print_experiment(script, words):
    """In a process of its own, because a script is imported: print the fields of its Experiment as a line of JSON."""
    spec = importlib.util.spec_from_file_location("submitted", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules["submitted"] = module
    spec.loader.exec_module(module)
    print(json.dumps(asked(module, words)))


def asked(trainer, words):
    """The fields of the Experiment of a trainer as a module, given these words and no environment."""
    constants = getattr(trainer, "RECORD", {})
    is_open = [word for word in words if word.partition("=")[0] not in constants]
    settings = trainer.Settings.parse(is_open, {})
    defaults = {name: value for name, value in trainer.Settings.parse([], {}).experiment().items()
                if name not in constants}
    return settings.experiment(), defaults, is_open, settings.sha256()


def settings_of(experiment):
    """The Settings of an Experiment, with what this repository's trainer says of each."""
    trainer = load_trainer()
    known = {field.name.upper(): field for field in fields(trainer.Settings)}
    words = [f"{name}={value}" for name, value in experiment.values.items() if name in known]
    with trainer_errors():
        whole = trainer.Settings.parse(words, {}, preset="")
    rows = []
    for name, value in sorted(experiment.values.items(), key=lambda pair: [*known, pair[0]].index(pair[0])):
        default = experiment.defaults.get(name, value)
        if name in known:
            about = known[name].metadata
            rows.append(Setting(name, about["group"], value, default, about["doc"], about["code"],
                                whole.holds(about["on"])))
        else:
            rows.append(Setting(name, "Others", value, default, "of another version of the trainer", "", True))
    return rows


def changed(settings):
    """Those that differ from the defaults of this repository's trainer, or of their script."""
    trainer = load_trainer()
    defaults = {field.name.upper(): trainer.format_value(field.default) for field in fields(trainer.Settings)}
    return [setting for setting in settings if not setting.value == setting.default == defaults.get(setting.name)]


# ---- techniques and whose they are ----------------------------------------------------------------------------------

# Values of a setting with which a technique of the trainer's map is on, where others choose something else.
VALUES = {
    "coprime strides, packing": {"coprime", "packed"}, "Muon": {"muon"}, "parallel lanes": {"lanes", "routed"},
    "GPTQ": {"gptq"}, "calibration on generated text": {"generated"}, "allocation of bits": {"allocate"},
    "soft rounding": {"soft"}, "entropy coder (rANS)": {"rans", "auto"}, "coder context": {"rans", "auto"},
    "kept keys and values": {"cache"}, "score-first TTT": {"full", "lora"}, "document adapters": {"lora_docs"},
    "n-gram backoff": {"backoff"}, "hedge of n-gram experts": {"hedge"}}
ON_AT_ZERO = {"fitted temperature"}


class Technique(NamedTuple):
    name: str
    setting: Setting


def techniques(settings):
    """The Techniques of the trainer's map that these settings turn on."""
    by_name = {setting.name: setting for setting in settings}
    return [Technique(name, by_name[key]) for name, key in table_of_techniques()
            if key in by_name and turns_on(by_name[key], name)]


def turns_on(setting, technique):
    """Does a setting turn on a technique of the trainer's map?"""
    if technique in ON_AT_ZERO:
        return setting.has_effect and setting.value in OFF
    return setting.is_on and setting.value in VALUES.get(technique, {setting.value})


class Credit(NamedTuple):
    """A technique that is on and the pull requests that its setting's sentence names."""

    technique: str
    setting: Setting
    pull_requests: tuple[int, ...]

    @property
    def key(self):
        """Technique and setting: several settings may be of one technique."""
        return f"{self.technique} ({self.setting.name}={self.setting.value})"


def credits(settings):
    """The Credits of all settings that are on."""
    names = {}
    for technique in techniques(settings):
        names.setdefault(technique.setting.name, technique.name)
    found = []
    for setting in settings:
        numbers = pull_requests(setting.doc, setting.value) if setting.is_on else ()
        if numbers:
            beginning = re.split(r"[(:;]", setting.doc)[0].strip(" ,")
            found.append(Credit(names.get(setting.name, beginning), setting, numbers))
    return found


def pull_requests(doc, value):
    """The numbers of pull requests that a sentence names for this value of its setting.

    A number in brackets stands for the setting, (#265), or behind a word for one of its choices: (full, #549) or
    (sigmoid #1539, gated #1394).
    """
    words = set(value.split(","))
    numbers = []
    for brackets in re.findall(r"\(([^()]*#\d[^()]*)\)", doc):
        choice = None
        for item in brackets.split(","):
            *before, last = item.split()
            choice = before[-1] if before else choice
            if not last.startswith("#"):
                choice = last
            elif choice is None or choice in words:
                numbers.append(int(last[1:]))
                choice = None
    return tuple(dict.fromkeys(numbers))


# ---- settings.env ---------------------------------------------------------------------------------------------------


def settings_file(settings, heading):
    """The text of a settings file: these settings by group, a line each."""
    lines = [f"# {heading}"]
    for group, members in itertools.groupby(settings, lambda setting: setting.group):
        lines += ["", f"# {group}", *(shlex.quote(f"{setting.name}={setting.value}") for setting in members)]
    return "\n".join(lines) + "\n"


def script_words(run_settings):
    """The words KEY=VALUE of a run's summary without those that name files of that run."""
    left_out = ("OUT_DIR=", "RUN_ID=", "PHASES=", "ARTIFACT=", "RESUME=")
    return [word for word in run_settings if not word.startswith(left_out)]
