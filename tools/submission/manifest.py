"""What a submission's folder is made of, and its submission.json."""

import ast
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from common import BadInput
from submission import recipe, rules, stats
from submission.runs import Run
from submission.script import imports_of

SETTINGS_FILE = "settings.env"
SEED_RESULT = {  # {name in a row of seed_results: key of a run's summary}
    "val_bpb": "val_bpb", "val_loss": "val_loss", "artifact_bytes": "total_bytes", "bytes_code": "code_bytes",
    "bytes_model": "model_bytes", "train_seconds": "train_seconds", "calib_seconds": "calibrate_seconds",
    "eval_seconds": "eval_seconds", "steps": "steps", "artifact_sha256": "artifact_sha256"}
CONDITION_KEYS = ("c1_causality", "c2_normalisation", "c3_score_before_update", "c4_one_pass")  # of #1017
# Modules that come with Python, torch, numpy and sentencepiece, which the contest's machines have.
BASE = {*sys.stdlib_module_names, "torch", "numpy", "sentencepiece", "triton"}
DISTRIBUTIONS = {"flash_attn_interface": "flash_attn_3"}  # of modules that are not named like their package
OPTIONAL = {"flash_attn_interface": "fa3"}  # modules that only this choice of attention imports


class Submission(NamedTuple):
    """Everything that the folder's files are made of."""

    runs: tuple[Run, ...]  # by seed
    track: str  # record | non-record
    draft: bool
    obstacles: tuple[str, ...]  # why it can be no record
    script: Path
    twin: bytes | None  # the readable source, where the script is packed and it is known
    is_packed: bool
    experiment: recipe.Experiment
    settings: list[recipe.Setting]
    changed: list[recipe.Setting]
    credits: list[recipe.Credit]
    sample: stats.Sample
    comparison: stats.Comparison | None
    person: dict  # author, github_id, name, blurb, date
    requirements: list[str]
    settings_file: str = SETTINGS_FILE
    fields: dict = {}  # submission.json

    @property
    def data_path(self):
        return next(setting.value for setting in self.settings if setting.name == "DATA_PATH")

    @property
    def arguments(self):
        """Of the script, so that it does what ran: none if that is what it does alone. A script that was cut down to a
        record takes no settings file, since that names its constants, too.
        """
        chosen = [setting for setting in self.changed if setting.value != setting.default
                  and setting.name not in recipe.PATHS]
        if self.experiment.has_constants:
            return [shlex.quote(f"{setting.name}={setting.value}") for setting in chosen]
        return [f"@{self.settings_file}"] if chosen else []


# ---- packages -------------------------------------------------------------------------------------------------------


def requirements(of_run, script, given):
    """NAME==VERSION of what the script imports beside torch, numpy and sentencepiece, at the versions that ran."""
    sources = {of_run.source.encode(), script.read_bytes()}  # two where it is packed
    imported = set().union(*(imports_of(ast.walk(ast.parse(source))) for source in sources))
    known = {line.partition("==")[0]: line for line in [*of_run.header.get("packages", []), *given]}
    names = {DISTRIBUTIONS.get(module, module) for module in imported - BASE
             if OPTIONAL.get(module, of_run.attention) == of_run.attention}
    unknown = sorted(names - set(known))
    if unknown:
        raise BadInput(f"{script} imports {', '.join(unknown)}, and the runs did not log the version: add "
                       f"--requirement {unknown[0]}==VERSION")
    return sorted(known[name] for name in names)


# ---- submission.json ------------------------------------------------------------------------------------------------


def fields_of(submission):
    """submission.json: the fields of the merged files (#1493, #1855) and what makes them provable."""
    runs = submission.runs
    first = runs[0].summary
    bpb = submission.sample.bpb
    losses = submission.sample.losses
    cuda = runs[0].header.get("cuda")
    reasons = list(submission.obstacles)
    if len(runs) < rules.LEAST_SEEDS:
        reasons.append(f"{len(runs)} of {rules.LEAST_SEEDS} seeds")
    on = [f"{technique.name} ({technique.setting.name}={technique.setting.value})"
          for technique in recipe.techniques(submission.settings)]
    results = {str(run.seed): {name: run.summary[key] for name, key in SEED_RESULT.items()} for run in runs}
    fields = {
        **submission.person,
        "track": rules.TRACKS[submission.track].removeprefix("track_"),
        "val_bpb": stats.mean(bpb), "val_loss": stats.mean(losses),
        "val_bpb_std": stats.spread(bpb), "val_loss_std": stats.spread(losses),
        "seeds": [run.seed for run in runs], "seed_results": results,
        "bytes_total": max(run.summary["total_bytes"] for run in runs), "bytes_code": first["code_bytes"],
        "hardware": runs[0].machine, "world_size": first["world_size"],
        "gpu_count": 0 if first["device"] == "cpu" else first["world_size"],
        "pytorch_version": runs[0].header.get("torch"), "cuda_version": None if cuda == "none" else cuda,
        "attention_backend": runs[0].attention,
        "technique_summary": "; ".join(on),
        "attribution": {credit.key: ", ".join(f"PR #{number}" for number in credit.pull_requests)
                        for credit in submission.credits},
        "compliance": compliance(submission),
        "val_bytes": first["val_bytes"], "val_tokens": first["val_tokens"],
        "code_sha256": first["code_sha256"], "config_sha256": first["settings_hash"],
        "tokenizer_sha256": runs[0].tokenizer_sha256, "val_sha256": first["val_sha256"],
        "commit": runs[0].header.get("commit"),
        "valid": "yes" if all(run.summary["valid"] == "yes" for run in runs) else "no",
        "eligible": "no" if reasons else "yes", "eligible_reasons": reasons,
    }
    if submission.draft:
        fields["draft"] = True
    return fields | comparison_fields(submission.comparison)


def comparison_fields(comparison):
    """The test of the README, under the names of the merged files, and the one without margin."""
    if not comparison:
        return {}
    fields = {"comparison_baseline": comparison.record.name,
              "comparison_baseline_pr": comparison.record.pull_request, "comparison_unit": comparison.unit}
    for found, ending in zip(comparison.tests, ("", "_without_margin")):
        fields |= {f"t_statistic{ending}": found.t, f"df{ending}": found.df, f"p_value{ending}": found.p}
    return fields


def compliance(submission):
    """{name: kept?}, the names of the merged files first; each is computed from the runs."""
    summaries = [run.summary for run in submission.runs]
    values = {setting.name: setting.value for setting in submission.settings}
    names = " ".join(values)
    reasons = " ".join(reason for summary in summaries for reason in summary["reasons"])
    ttt = values.get("TTT", "off")
    has_ngrams = values.get("MIXER", "off") != "off" or values.get("TOKEN_BOOST", "0.0") not in recipe.OFF
    return {
        "train_under_600s": all(summary["train_seconds"] + summary["calibrate_seconds"] < rules.TRAIN_LIMIT
                                for summary in summaries),
        "eval_under_600s": all(summary["eval_seconds"] < rules.EVAL_LIMIT for summary in summaries),
        "artifact_under_16mb": all(summary["total_bytes"] <= rules.SIZE_LIMIT for summary in summaries),
        "no_slot": "SLOT" not in names, "no_etlb": "ETLB" not in names,
        "no_pre_quant_ttt": ttt not in ("before", "prequant"),
        "no_ngram_cache": not has_ngrams,
        "score_first_ttt": ttt in ("full", "lora", "lora_docs"),
        "three_seeds": len(summaries) >= rules.LEAST_SEEDS,
        **{key: key[:2].upper() not in reasons for key in CONDITION_KEYS},
        "valid": all(summary["valid"] == "yes" for summary in summaries),
        "self_tested": all(summary["tested"] == "yes" for summary in summaries),
        "full_validation_set": all(is_fineweb(summary) for summary in summaries),
        "no_validation_text_in_training": all(is_apart(summary) for summary in summaries),
    }


def is_apart(summary):
    """Is the validation text no training text? FineWeb itself has a few openings in both; #2127 had 20 %."""
    overlap = summary.get("val_documents_in_training")
    return overlap is not None and overlap <= max(summary["documents_decoded"] // 100, 1)


def is_fineweb(summary):
    """Is the text that was scored FineWeb's whole validation set, by its documents and bytes?"""
    right_bytes = abs(summary["val_bytes"] / rules.VAL_BYTES - 1) < rules.BYTES_TOLERANCE
    return summary.get("documents_decoded") == rules.VAL_DOCUMENTS and right_bytes
