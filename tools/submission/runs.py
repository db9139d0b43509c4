"""What a run of the trainer left in its folder, and whether several runs are seeds of one configuration."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from common import BadInput
from reports.reading import last, read_events, read_summary

RULE = "=" * 100  # ends the source at the top of train.log
OF_ONE_RUN = {"RUN_ID", "OUT_DIR", "SEED"}  # settings in which the runs of one configuration differ
# What every summary of a finished run has; what only a run that trained and scored has.
ALWAYS = ("seed", "world_size", "device", "settings", "settings_hash", "code_sha256", "eligible", "eligible_reasons",
          "valid", "reasons", "train_seconds", "calibrate_seconds", "eval_seconds")
TRAINED = ("steps", "train_tokens", "code_bytes", "model_bytes", "total_bytes", "artifact_sha256")
SCORED = ("val_bpb", "val_loss", "val_tokens", "val_bytes", "val_sha256", "predictor", "documents_decoded", "tested",
          "tests")


class Run(NamedTuple):
    """A run that trained and scored."""

    folder: Path
    summary: dict  # summary.json
    events: list  # metrics.jsonl
    log: bytes  # train.log

    @property
    def seed(self):
        return self.summary["seed"]

    @property
    def source(self):
        """The source at the top of the log: what Python saw, minified if the script was packed."""
        return source_of(self.log)

    def event(self, kind, key=None):
        """The last event of this kind, and with this key; an empty dict where there is none."""
        return last(self.events, kind, lambda event: key is None or key in event) or {}

    @property
    def header(self):
        return self.event("run")

    # What the runs of one configuration have in common.

    @property
    def code_sha256(self):
        return self.summary["code_sha256"]

    @property
    def settings_hash(self):
        return self.summary["settings_hash"]

    @property
    def training_data(self):
        loader = self.event("train_loader")
        return f"{loader.get('dataset')}, {loader.get('train_shards')} shards, {loader.get('tokens')} tokens"

    @property
    def val_sha256(self):
        return self.summary["val_sha256"]

    @property
    def tokenizer_sha256(self):
        return self.event("tokenizer").get("sha256")

    @property
    def machine(self):
        return f"{self.summary['world_size']}x{self.summary['device']}"

    @property
    def torch(self):
        return self.header.get("torch")

    @property
    def attention(self):
        return self.event("choice", "attention").get("attention")


def source_of(log):
    """The text before the first line of 100 '=' of a log (bytes)."""
    return log.decode("utf-8", "replace").partition(f"\n{RULE}\n")[0].rstrip("\n") + "\n"


def read_run(folder):
    """The run in this folder; BadInput if it did not finish, did not train and score, or is put together."""
    folder = Path(folder)
    path = folder / "train.log"
    try:
        log = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give the folder of a run, such as logs/RUN_ID") from None
    summary = read_summary(folder / "summary.json")
    if summary is None:
        raise BadInput(f"{folder}: the run did not finish{why_it_ended(log)}; continue it with RESUME=auto "
                       f"OUT_DIR={shlex.quote(str(folder))}")
    absent = [key for key in ALWAYS if key not in summary]
    if absent:
        raise BadInput(f"{folder}/summary.json has no {', '.join(absent)}: it is of another trainer; run it again")
    for keys, what in ((TRAINED, "trained"), (SCORED, "scored")):
        if any(key not in summary for key in keys):
            raise BadInput(f"{folder} was not {what} in this run (PHASES); give a run of all phases")
    if summary_of(log) != summary:
        raise BadInput(f"{folder}: the last line of train.log and summary.json are not of the same run; "
                       "give the folder as the run left it")
    return Run(folder, summary, read_events(folder / "metrics.jsonl")[0], log)


def why_it_ended(log):
    """The reason that a log gives for an early end, in brackets, or ""."""
    reasons = re.findall(rb"^ended reason:(.*)$", log, re.MULTILINE)
    return f" ({reasons[-1].decode('utf-8', 'replace')})" if reasons else ""


def summary_of(log):
    """The object in the last line of a log, or None."""
    word, _, text = log.rstrip().rpartition(b"\n")[2].partition(b" ")
    try:
        return json.loads(text) if word == b"summary" else None
    except ValueError:
        return None


# ---- several runs ---------------------------------------------------------------------------------------------------


class Shared(NamedTuple):
    """What the runs of one configuration have in common."""

    name: str
    attribute: str  # of Run
    fix: str


ONE_CONFIGURATION = "the seeds of a submission are runs of one configuration (#2124)"
SHARED = (
    Shared("code (SHA-256)", "code_sha256", ONE_CONFIGURATION),
    Shared("settings", "settings_hash", ONE_CONFIGURATION),
    Shared("training data", "training_data", "train all of them on the same"),
    Shared("validation text (SHA-256)", "val_sha256", "score all of them on the same"),
    Shared("tokenizer (SHA-256)", "tokenizer_sha256", "use the same for all"),
    Shared("hardware", "machine", "run all of them on the same"),
    Shared("torch", "torch", "run all of them with the same"),
    Shared("attention kernel", "attention", "name one with ATTENTION"),
)


def complaints(runs):
    """Why these runs are not the seeds of one submission: a line for each cause."""
    lines = []
    seen = {}
    for run in runs:
        if run.seed in seen:
            lines.append(f"{seen[run.seed].folder} and {run.folder} have the same seed {run.seed}: give one of them")
        seen.setdefault(run.seed, run)
    first = runs[0]
    for shared in SHARED:
        others = [run for run in runs if getattr(run, shared.attribute) != getattr(first, shared.attribute)]
        if others:
            lines.append(difference(shared, first, others[0]))
    return lines


def difference(shared, first, other):
    """In which way two runs differ, in one line."""
    values = " and ".join(str(shown(getattr(run, shared.attribute))) for run in (first, other))
    if shared.name == "settings":
        values = ", ".join(settings_changes(first, other)) or values
    return f"{first.folder} and {other.folder} differ in {shared.name}: {values}; {shared.fix}"


def shown(value):
    """A value in a line: of a hash the beginning."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def pairs_of(run):
    """{name: value} of the settings that the run was given or found in its file and environment."""
    return dict(word.partition("=")[::2] for word in shlex.split(run.summary["settings"]))


def settings_changes(first, other):
    """NAME=value and value, for each setting in which two runs differ."""
    one = pairs_of(first)
    two = pairs_of(other)
    for name in sorted({*one, *two} - OF_ONE_RUN):
        if one.get(name) != two.get(name):
            yield f"{name}={one.get(name, 'default')} and {two.get(name, 'default')}"
