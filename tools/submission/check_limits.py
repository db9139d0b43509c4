"""CK-SIZE, CK-IMPORT, CK-TRAINTIME and CK-EVALTIME: bytes and seconds."""

import sys

from submission import rules
from submission.entry import number_of, stated_by_logs
from submission.findings import OfSeed, error, note, placed, unknown, warning, worst

# ---- CK-IMPORT ------------------------------------------------------------------------------------------------------

# Modules of Python, of the repository's requirements.txt, and of torch.
PROVIDED = {*sys.stdlib_module_names, "torch", "numpy", "sentencepiece", "triton", "tqdm", "datasets", "tiktoken",
            "huggingface_hub", "kernels", "setuptools", "typing_extensions"}


def check_imports(entry):
    """All counted code should live in train_gpt.py (FAQ)."""
    if entry.source is None:
        if entry.script:
            yield unknown("CK-IMPORT", "what the script imports cannot be seen", entry.script.name)
        return
    used = entry.own_code
    if used:
        total = sum(file.size for file in used)
        which = ", ".join(f"{file.name} ({file.size:,} bytes)" for file in used[:4])
        which += f" and {len(used) - 4} more" if len(used) > 4 else ""
        text = f"uses {which}: {total:,} bytes of code outside the script, which reviewers may count"
        yield warning("CK-IMPORT", text, entry.script.name)
    imported = entry.source.imports
    local = {file.name.partition("/")[0].removesuffix(".py") for file in entry.files}
    foreign = sorted(set(imported) - PROVIDED - local)
    has_list = any(file.name == "requirements.txt" for file in entry.files)
    if foreign and not has_list:
        yield note("CK-IMPORT", f"imports {', '.join(foreign)}, and there is no requirements.txt", entry.script.name,
                   imported[foreign[0]])


# ---- CK-SIZE --------------------------------------------------------------------------------------------------------


class Size:
    """The bytes of one seed, as its log counts them."""

    def __init__(self, log):
        self.total = log.total_bytes
        self.model = log.model_bytes
        code = log.code_bytes
        if self.model is None and None not in (self.total, code):
            self.model = self.total - code
        if self.total is None and None not in (self.model, code):
            self.total = self.model + code


def check_size(entry):
    """Code and model as they are submitted, and as the logs count them."""
    code = sum(file.size for file in entry.own_code) + (entry.script.size if entry.script else 0)
    rows = []
    totals = []
    for run in entry.runs:
        if run.training is None:
            continue
        size = Size(run.training)
        place = entry.relative(run.training.path)
        if size.total is None:
            text = f"the log of seed {run.seed} does not say the size of the submission"
            rows.append(OfSeed("none", run.seed, 0, unknown("CK-SIZE", text, place)))
            continue
        totals.append(size.total)
        rows += over_the_limit(run, size, code if entry.script else None, place)
    yield from worst(rows)
    limit = rules.SIZE_LIMIT
    stated = number_of(entry.record or {}, "bytes_total")
    if stated is not None and stated > limit:
        yield error("CK-SIZE", f"bytes_total is {int(stated):,}, {int(stated) - limit:,} over the limit of {limit:,}",
                    entry.record_file)
    if not totals and not rows:
        yield unknown("CK-SIZE", "no log says the size of the submission")
    if stated is not None and totals and int(stated) < max(totals):
        yield warning("CK-SIZE", f"bytes_total is {int(stated):,}, and the largest of the logs {max(totals):,}",
                      entry.record_file)
    yield from check_raw_size(entry, code, max(totals, default=None))


def over_the_limit(run, size, code, place):
    over = size.total - rules.SIZE_LIMIT
    if over <= 0:
        return
    text = f"seed {run.seed}: {size.total:,} bytes, {over:,} over the limit of {rules.SIZE_LIMIT:,}"
    shipped = None if None in (size.model, code) else size.model + code
    line = run.training.lines.get("total_bytes")
    if shipped is not None and shipped <= rules.SIZE_LIMIT:
        text += f"; with the script as it lies in the folder {shipped:,}"
        yield OfSeed("shipped", run.seed, over, warning("CK-SIZE", text, place, line))
    else:
        yield OfSeed("over", run.seed, over, error("CK-SIZE", text, place, line))


def check_raw_size(entry, code, largest):
    """The code on disk and as counted: since #1530 merged folders hold a readable script and count a packed copy."""
    models = [Size(run.training).model for run in entry.runs if run.training]
    models = [model for model in models if model is not None]
    counted = max(stated_by_logs(entry, "code_bytes"), default=None)
    limit = rules.SIZE_LIMIT
    if entry.script and models:
        raw = max(models) + code
        text = f"code of {code:,} bytes on disk and a model of {max(models):,} are {raw:,}"
        if counted not in (None, code):
            text += f"; the logs count {counted:,} of code"
        if raw > limit and largest is not None and largest <= limit:
            text += f", {largest:,} in all: over the limit unless a packed script counts, as it has since #1530"
            yield warning("CK-SIZE", text, entry.script.name)
        else:
            yield note("CK-SIZE", text, entry.script.name)
    for file in entry.files:
        total = file.size + (counted or 0)
        if file.name.endswith((".pg", ".ptz")) and total > limit:
            text = f"the model on disk and the code are {total:,} bytes, {total - limit:,} over the limit"
            yield error("CK-SIZE", text, file.name)


# ---- CK-TRAINTIME ---------------------------------------------------------------------------------------------------


def softened(entry, rows):
    """A limit of records is a note elsewhere: unlimited compute is a track of its own."""
    for finding in worst(rows):
        if entry.track != "record" and finding.severity != "unknown":
            finding = finding._replace(severity="note")
        yield finding


def check_train_time(entry):
    """The training clock: the steps, and everything else that reads data to change weights (R4; #606, #609)."""
    rows = []
    for run in entry.runs:
        if run.training:
            found = (*steps_in_time(run), *calibration_in_time(run), *on_the_machine(run))
            rows += placed(found, entry.relative(run.training.path))
    yield from softened(entry, rows)


def steps_in_time(run):
    log = run.training
    limit = rules.TRAIN_LIMIT
    if log.train_seconds is None:
        text = f"the log of seed {run.seed} does not say when the training stopped"
        yield OfSeed("none", run.seed, 0, unknown("CK-TRAINTIME", text))
        return
    over = log.train_seconds - limit
    line = log.lines.get("train_seconds")
    text = f"seed {run.seed}: training stopped at {log.train_seconds:,.3f} s"
    tolerance = 0 if log.form == "ours" else rules.TRAIN_TOLERANCE
    if over > tolerance:
        text += f", {over:,.1f} s over the limit of {limit:.0f}"
        yield OfSeed("steps", run.seed, over, error("CK-TRAINTIME", text, line=line))
    elif over > 0:
        text += f", after the step that crosses the limit of {limit:.0f}, as 62 of 143 merged logs"
        yield OfSeed("steps", run.seed, over, warning("CK-TRAINTIME", text, line=line))


def calibration_in_time(run):
    log = run.training
    limit = rules.TRAIN_LIMIT
    stopped = log.train_seconds
    if stopped is None or stopped > limit + rules.TRAIN_TOLERANCE:
        return
    calibration = log.calibrate_seconds or 0.0
    over = stopped + calibration - limit
    if calibration and over > 0:
        text = (f"seed {run.seed}: {stopped:,.1f} s of training and {calibration:.1f} s of calibration are {over:.1f} "
                "s over the limit")
        line = log.lines.get("calibrate_seconds")
        if log.form != "ours" and over <= rules.CALIBRATION_TOLERANCE:
            text += ", which was accepted late (#1855) and refused before (#706)"
            yield OfSeed("calibration", run.seed, over, warning("CK-TRAINTIME", text, line=line))
        else:
            yield OfSeed("calibration", run.seed, over, error("CK-TRAINTIME", text, line=line))
    generation = log.generate_seconds or 0.0
    over = stopped + generation - limit
    if generation and over > 0:
        text = (f"seed {run.seed}: {generation:.1f} s of generating calibration text after {stopped:,.1f} s of "
                "training, which is time of the training too, though #1019 was merged")
        line = log.lines.get("generate_seconds")
        yield OfSeed("generation", run.seed, over, warning("CK-TRAINTIME", text, line=line))


def on_the_machine(run):
    log = run.training
    say = error if log.form == "ours" else warning
    if log.gpu and rules.GPU.lower() not in log.gpu.lower():
        text = f"seed {run.seed} ran on {log.gpus or log.world_size or 1} x {log.gpu}, not {rules.GPUS} x {rules.GPU}"
        yield OfSeed("machine", run.seed, 0, say("CK-TRAINTIME", text, line=log.lines.get("gpu")))
    elif log.world_size not in (None, rules.GPUS):
        text = f"seed {run.seed} ran on {log.world_size} GPU(s), not {rules.GPUS}"
        yield OfSeed("machine", run.seed, 0, say("CK-TRAINTIME", text, line=log.lines.get("world_size")))


# ---- CK-EVALTIME ----------------------------------------------------------------------------------------------------


def check_eval_time(entry):
    """The evaluation clock: adaptation, tables and scoring (R5)."""
    rows = []
    for run in entry.runs:
        if run.log:
            rows += placed(evaluation_in_time(run), entry.relative(run.log.path))
    yield from softened(entry, rows)


def evaluation_in_time(run):
    log = run.log
    limit = rules.EVAL_LIMIT
    if log.eval_seconds is None:
        text = f"the log of seed {run.seed} does not say how long the evaluation took"
        yield OfSeed("none", run.seed, 0, unknown("CK-EVALTIME", text))
        return
    text = f"seed {run.seed}: {log.eval_seconds:,.0f} s of evaluation"
    if " + " in log.eval_note:
        text += f" ({log.eval_note})"
    line = log.lines.get("eval_seconds")
    over = log.needed_seconds - limit
    if over > 0:
        text += f", {over:,.0f} s over the limit of {limit:.0f}"
        if log.needed_seconds < log.eval_seconds - 1:
            text += " even without diagnostics"
        yield OfSeed("over", run.seed, over, error("CK-EVALTIME", text, line=line))
    elif log.eval_seconds > limit:
        text += f"; {log.needed_seconds:,.0f} s without what may be diagnostics"
        yield OfSeed("sum", run.seed, log.eval_seconds, warning("CK-EVALTIME", text, line=line))
