"""README.md of a submission's folder, in the order that reviewers expect (#1493, #1855)."""

import statistics
from typing import NamedTuple

from submission import recipe, rules, stats
from submission.manifest import CONDITION_KEYS

REPOSITORY = "../../.."  # of the contest, from a folder in records/TRACK/


def page(submission):
    """The whole text."""
    sections = [
        headline(submission), results(submission), against(submission), news(submission), settings(submission),
        compliance(submission), reproduction(submission), attribution(submission), dependencies(submission)]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(titles, rows):
    """A table of Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def cell(text):
    """Text as it may stand in a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


# ---- headline, results, comparison, news ----------------------------------------------------------------------------


def headline(submission):
    """Title, score, and what kind of submission this is."""
    fields = submission.fields
    count = len(submission.runs)
    spread = f" (std {fields['val_bpb_std']:.5f})" if count > 1 else ""
    lines = [
        f"# {fields['name']}", "",
        f"**val_bpb {fields['val_bpb']:.5f}**{spread} over {count} seed{'s' * (count > 1)}, "
        f"val_loss {fields['val_loss']:.5f} nats per token, largest submission {fields['bytes_total']:,} of "
        f"{rules.SIZE_LIMIT:,} bytes, {fields['hardware']}, {fields['date']}, by {fields['author']} "
        f"(@{fields['github_id']})"]
    if submission.draft:
        lines += ["", f"**Draft: {count} of at least {rules.LEAST_SEEDS} seeds.**"]
    if submission.track == "non-record":
        lines += ["", "**Not a record:**"]
        lines += [f"- {reason}" for reason in submission.obstacles or ["it was made for this track"]]
    return "\n".join(lines)


def results(submission):
    """A row for each seed, then mean and std."""
    rows = []
    for run in submission.runs:
        summary = run.summary
        rows.append([
            run.seed, f"{summary['val_loss']:.8f}", f"{summary['val_bpb']:.8f}", f"{summary['total_bytes']:,}",
            f"{summary['steps']:,}", f"{summary['train_seconds']:.1f}", f"{summary['calibrate_seconds']:.1f}",
            f"{summary['eval_seconds']:.1f}"])
    losses = [run.summary["val_loss"] for run in submission.runs]
    scores = [run.summary["val_bpb"] for run in submission.runs]
    largest = f"{submission.fields['bytes_total']:,} (largest)"
    rows.append(["mean", f"{statistics.mean(losses):.8f}", f"{statistics.mean(scores):.8f}", largest, *[""] * 4])
    if len(scores) > 1:
        deviations = [f"{statistics.stdev(values):.8f}" for values in (losses, scores)]
        rows.append(["std (n - 1)", *deviations, *[""] * 5])
    titles = ["seed", "val_loss", "val_bpb", "artifact bytes", "steps", "train s", "calibration s", "eval s"]
    note = ("val_loss is in nats per token, val_bpb in bits per byte. Artifact bytes are the script and the compressed "
            "model. Training and calibration share one clock of 600 s.")
    return f"## Results\n\n{table(titles, rows)}\n\n{note}"


def against(submission):
    """The test against a record; nothing where none was named."""
    if not submission.comparison:
        return ""
    lines = stats.comparison_lines(submission.sample, submission.comparison)
    return "## Against the record\n\n```\n" + "\n".join(lines) + "\n```"


def news(submission):
    return f"## What is new\n\n{submission.fields['blurb']}"


# ---- settings -------------------------------------------------------------------------------------------------------


def settings(submission):
    """Every setting that differs from the trainer's defaults, by group."""
    parts = [f"## Recipe\n\nEvery setting that differs from the trainer's defaults; `{submission.settings_file}` has "
             f"the same as a file{whose(submission)}. What is not listed has the trainer's default."]
    groups = dict.fromkeys(setting.group for setting in submission.changed)
    for group in groups:
        rows = [[f"`{setting.name}`", f"`{setting.value or '(empty)'}`", meaning(setting)]
                for setting in submission.changed if setting.group == group]
        parts.append(f"### {group}\n\n{table(['setting', 'value', 'what it is'], rows)}")
    on = "; ".join(technique.name for technique in recipe.techniques(submission.settings))
    parts.append(f"Techniques that are on: {on}.")
    return "\n\n".join(parts)


def whose(submission):
    """For which script a settings file is, where it is not this one."""
    return " for the whole trainer: here they are constants" if submission.experiment.has_constants else ""


def meaning(setting):
    """The sentence of a setting, the function that does it, and whether it has an effect."""
    code = f" (`{setting.code}`)" if setting.code else ""
    idle = "" if setting.has_effect else "; without effect here"
    return f"{setting.doc}{code}{idle}"


# ---- compliance -----------------------------------------------------------------------------------------------------


class Condition(NamedTuple):
    """A condition of a valid score (#1017), and where the script keeps it."""

    name: str
    how: str  # with the names of functions of train_gpt.py
    tests: tuple[str, ...]  # of SELFTEST that would fail without it
    examined: str | None  # what the Examiner measured of it: a key of the event normalisation


CONDITIONS = (
    Condition("C1 causality", "`Predictor.predict` gets the inputs before its places and no targets. While it scores, "
              "`Examiner` changes the text after places that it draws; `flip_test` and `ends_test` do so for whole "
              "texts.", ("flip", "ends"), "changed_by_later"),
    Condition("C2 normalisation", "`Predictor.predict` says log-probabilities of the whole vocabulary. `Examiner` adds "
              "them up at places that it draws; `sum_test` puts every token at a place and adds up what `nll` charges.",
              ("sum",), "worst_log"),
    Condition("C3 score before update", "`score` counts a chunk in `Meters.add` before `Predictor.observe` sees its "
              "targets and `Predictor.learn` a part of them. `Validity.watch` notes who opens validation text before "
              "`Validity.freeze` or training text after it; `fingerprint` shows that the model is as it was loaded.",
              ("prefix",), None),
    Condition("C4 one pass", "`Meters.add` counts how often each target is scored, and `Meters.coverage` must find "
              "once for all of them. `prefix_test` scores texts that end early.", ("prefix",), None),
)


def compliance(submission):
    """How the four conditions and the limits are kept, and what the runs proved."""
    rows = [[condition.name, "yes" if submission.fields["compliance"][key] else "**no**", condition.how,
             evidence(submission, condition)]
            for key, condition in zip(CONDITION_KEYS, CONDITIONS)]
    parts = ["## Compliance", table(["condition", "kept", "how", "what the runs proved"], rows),
             table(["limit", "met", "largest of the seeds"], limits(submission))]
    invalid = [f"- seed {run.seed}: {reason}" for run in submission.runs for reason in run.summary["reasons"]]
    if invalid:
        parts.append("**The score is not valid:**\n" + "\n".join(invalid))
    declared = ", ".join(f"{key}: {'yes' if value else 'no'}" for key, value in submission.fields["compliance"].items())
    parts.append(f"Computed from the logs, not declared: {declared}.")
    return "\n\n".join(parts)


def evidence(submission, condition):
    """What the logs of all seeds have on a condition."""
    found = []
    if condition.examined:
        measured = [run.event("normalisation") for run in submission.runs]
        places = sum(event.get("positions", 0) for event in measured)
        worst = max(event.get(condition.examined, 0.0) for event in measured)
        found.append(f"off by at most {worst:.1e} in log at {places:,} places")
    if condition.name.startswith("C4"):
        tokens = submission.runs[0].summary["val_tokens"]
        found.append(f"{tokens:,} targets scored once")
    for test in condition.tests:
        passed = sum(test in run.summary["tests"] and run.summary["tested"] == "yes" for run in submission.runs)
        found.append(f"self-test {test} passed in {passed} of {len(submission.runs)} runs")
    return "; ".join(found)


def limits(submission):
    """Rows of the table of limits."""
    kept = submission.fields["compliance"]
    fields = submission.fields
    summaries = [run.summary for run in submission.runs]
    train = max(summary["train_seconds"] + summary["calibrate_seconds"] for summary in summaries)
    scoring = max(summary["eval_seconds"] for summary in summaries)
    overlap = max(summary.get("val_documents_in_training", 0) for summary in summaries)
    documents = summaries[0].get("documents_decoded", 0)
    rows = [
        ("train_under_600s", "training and calibration under 600 s", f"{train:.1f} s"),
        ("eval_under_600s", "evaluation under 600 s, with loading and compiling", f"{scoring:.1f} s"),
        ("artifact_under_16mb", "16,000,000 bytes of code and model", f"{fields['bytes_total']:,} bytes"),
        ("full_validation_set", "all of FineWeb's 50,000 validation documents",
         f"{fields['val_tokens']:,} tokens, {fields['val_bytes']:,} bytes, "
         f"{fields['val_bytes'] / fields['val_tokens']:.6f} a token, proved by decoding (`prove_bytes`)"),
        ("no_validation_text_in_training", "no validation documents in the training text",
         f"{overlap} of {documents:,} begin as one that was trained on; up to 1 % is FineWeb itself"),
        ("three_seeds", "three seeds of one configuration",
         f"{len(summaries)}: {', '.join(map(str, fields['seeds']))}"),
    ]
    return [[what, "yes" if kept[key] else "**no**", value] for key, what, value in rows]


# ---- reproduction, attribution, dependencies ------------------------------------------------------------------------


def reproduction(submission):
    """Commands for the environment, the data and each seed."""
    fields = submission.fields
    seeds = " ".join(map(str, fields["seeds"]))
    given = "".join(f" {argument}" for argument in submission.arguments)
    launch = "python train_gpt.py"
    if fields["world_size"] > 1:
        launch = f"torchrun --standalone --nproc_per_node={fields['world_size']} train_gpt.py"
    lines = [
        "pip install " + " ".join(base_packages(submission)),
        "pip install -r requirements.txt",
        f"for seed in {seeds}; do",
        f"    {launch}{given} SEED=$seed RUN_ID=seed$seed DATA_PATH={data_path(submission)}",
        "done"]
    text = "\n".join(lines)
    artifact = f"{launch}{given} DATA_PATH=... PHASES=eval ARTIFACT=logs/seed{fields['seeds'][0]}/model.pg"
    score = f"final_{submission.runs[0].summary['predictor']} val_loss:... val_bpb:..."
    return (f"## Reproduction\n\nFrom inside this folder:\n\n```\n{text}\n```\n\n{data(submission)}\n\nEach run ends "
            f"with `{score}` and a summary in JSON. Its artifact is scored again, without training, by\n\n"
            f"```\n{artifact}\n```\n\n{script(submission)}")


def base_packages(submission):
    """torch, numpy and sentencepiece at the versions of the runs. A build of torch, +cu128, cannot be asked for."""
    header = submission.runs[0].header
    names = [f"torch=={str(header.get('torch')).partition('+')[0]}", f"numpy=={header.get('numpy')}"]
    return names + [name for name in header.get("packages", []) if name.startswith("sentencepiece==")]


def data_path(submission):
    """DATA_PATH as it is from inside the folder."""
    path = submission.data_path
    return path if path.startswith("/") else f"{REPOSITORY}/{path}"


def data(submission):
    """Which data, and the command that makes it."""
    loader = submission.runs[0].event("train_loader")
    name = submission.runs[0].summary["data"]
    shards = loader.get("train_shards")
    variant = name.removeprefix("fineweb10B_")
    command = ""
    if name == "fineweb10B_sp1024":
        command = f"python data/cached_challenge_fineweb.py --variant {variant} --train-shards {shards}"
    elif name.startswith("fineweb10B_"):
        command = f"python data/fineweb.py --variant {variant} --train-shards {shards}"
    elif name.startswith("builtin_"):
        command = "python data/prepare.py --source builtin"
    text = (f"Data: `{name}`, {shards} training shards of {loader.get('tokens'):,} tokens in all; "
            f"SHA-256 of the validation tokens {submission.fields['val_sha256']}, of the tokenizer "
            f"{submission.fields['tokenizer_sha256']}.")
    if not command:
        return text
    where = "of the contest's repository" if "cached" in command else "of the trainer's repository"
    return f"{text} It is made by, in the root {where},\n\n```\n{command}\n```"


def script(submission):
    """What train_gpt.py is, and where it can be read."""
    fields = submission.fields
    text = f"`train_gpt.py` has {fields['bytes_code']:,} bytes, which are counted (SHA-256 {fields['code_sha256']})."
    if submission.twin is None and submission.is_packed:
        return f"{text} It is packed; the source that ran is at the top of each log."
    if submission.twin is None:
        return text
    return (f"{text} It is packed, and `train_gpt_human.py` is its readable source, {len(submission.twin):,} bytes: "
            "minified, that is the source at the top of each log.")


def attribution(submission):
    """Techniques and the pull requests of the contest that they come from."""
    rows = [[credit.technique, f"`{credit.setting.name}={credit.setting.value}`",
             ", ".join(f"#{number}" for number in credit.pull_requests)] for credit in submission.credits]
    return f"## Attribution\n\n{table(['technique', 'setting', 'pull request'], rows)}"


def dependencies(submission):
    """Versions with which the runs were made."""
    fields = submission.fields
    packages = ", ".join(base_packages(submission)[1:])
    changed_files = submission.runs[0].header.get("changed_files", 0)
    changes = f" with {changed_files} changed file(s)" if changed_files else ""
    cuda = submission.runs[0].header.get("cuda", "not logged")
    return (f"## Dependencies\n\ntorch {fields['pytorch_version']}, CUDA {cuda}, "
            f"attention by {fields['attention_backend']}, {packages}; beside these what `requirements.txt` names. "
            f"Trainer of commit {fields['commit']}{changes}.")
