"""CK-SIZE, CK-IMPORT, CK-TRAINTIME and CK-EVALTIME: bytes and seconds."""

import sys
from typing import NamedTuple

from submission import rules
from submission.entry import number_of, stated_by_logs
from submission.findings import OfLog, error, note, unknown, warning

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
    if foreign and not any(file.name == "requirements.txt" for file in entry.files):
        yield note("CK-IMPORT", f"imports {', '.join(foreign)}, and there is no requirements.txt", entry.script.name,
                   imported[foreign[0]])


# ---- CK-SIZE --------------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """The bytes of one seed, as its log counts them or as they follow from the two others."""

    total: int | None
    model: int | None


def size_of(log):
    code = log.code_bytes
    total = log.total_bytes
    model = log.model_bytes
    if model is None and None not in (total, code):
        model = total - code
    if total is None and None not in (model, code):
        total = model + code
    return Size(total, model)


def code_bytes(entry):
    """The bytes of code in the folder; None without a script."""
    return sum(file.size for file in (entry.script, *entry.own_code)) if entry.script else None


def size_of_seed(entry, run, log):
    """Code and model as the logs count them."""
    total, model = size_of(log)
    if total is None:
        text = f"the log of seed {run.seed} does not say the size of the submission"
        yield OfLog("unknown", "CK-SIZE", text, kind="none")
        return
    over = total - rules.SIZE_LIMIT
    if over <= 0:
        return
    text = f"seed {run.seed}: {total:,} bytes, {over:,} over the limit of {rules.SIZE_LIMIT:,}"
    code = code_bytes(entry)
    if None not in (model, code) and model + code <= rules.SIZE_LIMIT:
        text += f"; with the script as it lies in the folder {model + code:,}"
        yield OfLog("warning", "CK-SIZE", text, "total_bytes", "shipped", over)
    else:
        yield OfLog("error", "CK-SIZE", text, "total_bytes", "over", over)


def check_size(entry):
    """Code and model as submission.json says them, and as they lie in the folder. Since #1530 merged folders hold a
    readable script and count a packed copy.
    """
    limit = rules.SIZE_LIMIT
    sizes = [size_of(run.training) for run in entry.runs if run.training]
    largest = max((size.total for size in sizes if size.total is not None), default=None)
    stated = number_of(entry.record or {}, "bytes_total")
    if stated is not None and stated > limit:
        yield error("CK-SIZE", f"bytes_total is {int(stated):,}, {int(stated) - limit:,} over the limit of {limit:,}",
                    entry.record_file)
    if not sizes:
        yield unknown("CK-SIZE", "no log says the size of the submission")
    if None not in (stated, largest) and int(stated) < largest:
        yield warning("CK-SIZE", f"bytes_total is {int(stated):,}, and the largest of the logs {largest:,}",
                      entry.record_file)
    model = max((size.model for size in sizes if size.model is not None), default=None)
    counted = max(stated_by_logs(entry, "code_bytes"), default=None)
    code = code_bytes(entry)
    if None not in (code, model):
        raw = model + code
        text = f"code of {code:,} bytes on disk and a model of {model:,} are {raw:,}"
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


def train_time(entry, run, log):
    """The training clock: the steps, and everything else that reads data to change weights (R4; #606, #609)."""
    limit = rules.TRAIN_LIMIT
    stopped = log.train_seconds
    if stopped is None:
        text = f"the log of seed {run.seed} does not say when the training stopped"
        yield OfLog("unknown", "CK-TRAINTIME", text, kind="none")
    else:
        over = stopped - limit
        text = f"seed {run.seed}: training stopped at {stopped:,.3f} s"
        if over > (0 if log.form == "ours" else rules.TRAIN_TOLERANCE):
            text += f", {over:,.1f} s over the limit of {limit:.0f}"
            yield OfLog("error", "CK-TRAINTIME", text, "train_seconds", "steps", over)
        elif over > 0:
            text += f", after the step that crosses the limit of {limit:.0f}, as 62 of 143 merged logs"
            yield OfLog("warning", "CK-TRAINTIME", text, "train_seconds", "steps", over)
        if over <= rules.TRAIN_TOLERANCE:
            yield from calibration_time(run, log)
    severity = "error" if log.form == "ours" else "warning"
    if log.gpu and rules.GPU.lower() not in log.gpu.lower():
        text = f"seed {run.seed} ran on {log.gpus or log.world_size or 1} x {log.gpu}, not {rules.GPUS} x {rules.GPU}"
        yield OfLog(severity, "CK-TRAINTIME", text, "gpu", "machine")
    elif log.world_size not in (None, rules.GPUS):
        text = f"seed {run.seed} ran on {log.world_size} GPU(s), not {rules.GPUS}"
        yield OfLog(severity, "CK-TRAINTIME", text, "world_size", "machine")


def calibration_time(run, log):
    stopped = log.train_seconds
    calibration = log.calibrate_seconds
    over = stopped + (calibration or 0) - rules.TRAIN_LIMIT
    if calibration and over > 0:
        severity = "error"
        text = (f"seed {run.seed}: {stopped:,.1f} s of training and {calibration:.1f} s of calibration are {over:.1f} "
                "s over the limit")
        if log.form != "ours" and over <= rules.CALIBRATION_TOLERANCE:
            severity = "warning"
            text += ", which was accepted late (#1855) and refused before (#706)"
        yield OfLog(severity, "CK-TRAINTIME", text, "calibrate_seconds", "calibration", over)
    generation = log.generate_seconds
    over = stopped + (generation or 0) - rules.TRAIN_LIMIT
    if generation and over > 0:
        text = (f"seed {run.seed}: {generation:.1f} s of generating calibration text after {stopped:,.1f} s of "
                "training, which is time of the training too, though #1019 was merged")
        yield OfLog("warning", "CK-TRAINTIME", text, "generate_seconds", "generation", over)


# ---- CK-EVALTIME ----------------------------------------------------------------------------------------------------


def eval_time(entry, run, log):
    """The evaluation clock: adaptation, tables and scoring (R5)."""
    limit = rules.EVAL_LIMIT
    if log.eval_seconds is None:
        text = f"the log of seed {run.seed} does not say how long the evaluation took"
        yield OfLog("unknown", "CK-EVALTIME", text, kind="none")
        return
    text = f"seed {run.seed}: {log.eval_seconds:,.0f} s of evaluation"
    if " + " in log.eval_note:
        text += f" ({log.eval_note})"
    over = log.needed_seconds - limit
    if over > 0:
        text += f", {over:,.0f} s over the limit of {limit:.0f}"
        if log.needed_seconds < log.eval_seconds - 1:
            text += " even without diagnostics"
        yield OfLog("error", "CK-EVALTIME", text, "eval_seconds", "over", over)
    elif log.eval_seconds > limit:
        text += f"; {log.needed_seconds:,.0f} s without what may be diagnostics"
        yield OfLog("warning", "CK-EVALTIME", text, "eval_seconds", "sum", log.eval_seconds)
