"""What a run of the trainer left in its folder, and whether several runs are seeds of one configuration."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from common import BadInput
from reports.reading import last, read_events, read_summary
from submission.logs import pairs_of, summary_in

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

    @property
    def tokenizer_sha256(self):
        return self.event("tokenizer").get("sha256")

    @property
    def machine(self):
        return f"{self.summary['world_size']}x{self.summary['device']}"

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
    return summary_in(log.rstrip().rpartition(b"\n")[2])


# ---- several runs ---------------------------------------------------------------------------------------------------


def training_data(run):
    loader = run.event("train_loader")
    return f"{loader.get('dataset')}, {loader.get('train_shards')} shards, {loader.get('tokens')} tokens"


ONE_CONFIGURATION = "the seeds of a submission are runs of one configuration (#2124)"
SHARED = (  # (what the runs of one configuration have in common, its value in a run, what to do where they differ)
    ("code (SHA-256)", lambda run: run.summary["code_sha256"], ONE_CONFIGURATION),
    ("settings", lambda run: run.summary["settings_hash"], ONE_CONFIGURATION),
    ("training data", training_data, "train all of them on the same"),
    ("validation text (SHA-256)", lambda run: run.summary["val_sha256"], "score all of them on the same"),
    ("tokenizer (SHA-256)", lambda run: run.tokenizer_sha256, "use the same for all"),
    ("hardware", lambda run: run.machine, "run all of them on the same"),
    ("torch", lambda run: run.header.get("torch"), "run all of them with the same"),
    ("attention kernel", lambda run: run.attention, "name one with ATTENTION"),
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
    for name, value, fix in SHARED:
        other = next((run for run in runs if value(run) != value(first)), None)
        if other:
            values = f"{shown(value(first))} and {shown(value(other))}"
            if name == "settings":
                values = ", ".join(settings_changes(first, other)) or values
            lines.append(f"{first.folder} and {other.folder} differ in {name}: {values}; {fix}")
    return lines


def shown(value):
    """A value in a line: of a hash the beginning."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def settings_changes(first, other):
    """NAME=value and value, for each setting that two runs were given or found, and in which they differ."""
    one, two = (pairs_of(run.summary["settings"]) for run in (first, other))
    for name in sorted({*one, *two} - OF_ONE_RUN):
        if one.get(name) != two.get(name):
            yield f"{name}={one.get(name, 'default')} and {two.get(name, 'default')}"
