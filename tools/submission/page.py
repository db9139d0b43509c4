"""README.md of a submission's folder, in the order that reviewers expect (#1493, #1855)."""

from typing import NamedTuple

from submission import recipe, rules, stats
from submission.manifest import CONDITION_KEYS

REPOSITORY = "../../.."  # of the contest, from a folder in records/TRACK/


def page(submission):
    """The whole text."""
    sections = [
        headline(submission), results(submission), against(submission),
        f"## What is new\n\n{submission.fields['blurb']}", settings(submission), compliance(submission),
        reproduction(submission), attribution(submission), dependencies(submission)]
    return "\n\n".join(filter(None, sections)) + "\n"


def table(titles, rows):
    """A table of Markdown."""
    lines = [[*titles], ["---"] * len(titles), *rows]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


# ---- headline, results, comparison, news ----------------------------------------------------------------------------


def headline(submission):
    """Title, score, and what kind of submission this is."""
    fields = submission.fields
    count = len(submission.runs)
    spread = f" (std {fields['val_bpb_std']:.5f})" if count > 1 else ""
    text = f"""\
# {fields["name"]}

**val_bpb {fields["val_bpb"]:.5f}**{spread} over {count} seed{"s" * (count > 1)}, \
val_loss {fields["val_loss"]:.5f} nats per token, largest submission {fields["bytes_total"]:,} of \
{rules.SIZE_LIMIT:,} bytes, {fields["hardware"]}, {fields["date"]}, by {fields["author"]} (@{fields["github_id"]})"""
    if submission.draft:
        text += f"\n\n**Draft: {count} of at least {rules.LEAST_SEEDS} seeds.**"
    if submission.track == "non-record":
        reasons = submission.obstacles or ["it was made for this track"]
        text += "\n\n**Not a record:**" + "".join(f"\n- {reason}" for reason in reasons)
    return text


RESULTS = {  # {title: (field of a run's summary, its format)}
    "seed": ("seed", ""), "val_loss": ("val_loss", ".8f"), "val_bpb": ("val_bpb", ".8f"),
    "artifact bytes": ("total_bytes", ","), "steps": ("steps", ","), "train s": ("train_seconds", ".1f"),
    "calibration s": ("calibrate_seconds", ".1f"), "eval s": ("eval_seconds", ".1f")}


def results(submission):
    """A row for each seed, then mean and std."""
    fields = submission.fields
    rows = [[format(run.summary[key], form) for key, form in RESULTS.values()] for run in submission.runs]
    rows.append(["mean", f"{fields['val_loss']:.8f}", f"{fields['val_bpb']:.8f}",
                 f"{fields['bytes_total']:,} (largest)", *[""] * 4])
    if len(submission.runs) > 1:
        rows.append(["std (n - 1)", f"{fields['val_loss_std']:.8f}", f"{fields['val_bpb_std']:.8f}", *[""] * 5])
    return f"""\
## Results

{table(RESULTS, rows)}

val_loss is in nats per token, val_bpb in bits per byte. Artifact bytes are the script and the compressed model. \
Training and calibration share one clock of 600 s."""


def against(submission):
    """The test against a record; nothing where none was named."""
    if not submission.comparison:
        return ""
    lines = stats.comparison_lines(submission.sample, submission.comparison)
    return "## Against the record\n\n```\n" + "\n".join(lines) + "\n```"


# ---- settings -------------------------------------------------------------------------------------------------------


def settings(submission):
    """Every setting that differs from the trainer's defaults, by group."""
    whose = " for the whole trainer: here they are constants" if submission.experiment.has_constants else ""
    parts = [f"## Recipe\n\nEvery setting that differs from the trainer's defaults; `{submission.settings_file}` has "
             f"the same as a file{whose}. What is not listed has the trainer's default."]
    for group in dict.fromkeys(setting.group for setting in submission.changed):
        rows = [[f"`{setting.name}`", f"`{setting.value or '(empty)'}`", meaning(setting)]
                for setting in submission.changed if setting.group == group]
        parts.append(f"### {group}\n\n{table(['setting', 'value', 'what it is'], rows)}")
    on = "; ".join(technique.name for technique in recipe.techniques(submission.settings))
    parts.append(f"Techniques that are on: {on}.")
    return "\n\n".join(parts)


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


def kept(submission, key):
    return "yes" if submission.fields["compliance"][key] else "**no**"


def compliance(submission):
    """How the four conditions and the limits are kept, and what the runs proved."""
    rows = [[condition.name, kept(submission, key), condition.how, evidence(submission, condition)]
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
    return [[what, kept(submission, key), value] for key, what, value in rows]


# ---- reproduction, attribution, dependencies ------------------------------------------------------------------------


def reproduction(submission):
    """Commands for the environment, the data and each seed."""
    fields = submission.fields
    launch = "python train_gpt.py"
    if fields["world_size"] > 1:
        launch = f"torchrun --standalone --nproc_per_node={fields['world_size']} train_gpt.py"
    launch = " ".join([launch, *submission.arguments])
    path = submission.data_path
    from_inside = path if path.startswith("/") else f"{REPOSITORY}/{path}"
    return f"""\
## Reproduction

From inside this folder:

```
pip install {" ".join(base_packages(submission))}
pip install -r requirements.txt
for seed in {" ".join(map(str, fields["seeds"]))}; do
    {launch} SEED=$seed RUN_ID=seed$seed DATA_PATH={from_inside}
done
```

{data(submission)}

Each run ends with `final_{submission.runs[0].summary["predictor"]} val_loss:... val_bpb:...` and a summary in JSON. \
Its artifact is scored again, without training, by

```
{launch} DATA_PATH=... PHASES=eval ARTIFACT=logs/seed{fields["seeds"][0]}/model.pg
```

{script(submission)}"""


def base_packages(submission):
    """torch, numpy and sentencepiece at the versions of the runs. A build of torch, +cu128, cannot be asked for."""
    header = submission.runs[0].header
    names = [f"torch=={str(header.get('torch')).partition('+')[0]}", f"numpy=={header.get('numpy')}"]
    return names + [name for name in header.get("packages", []) if name.startswith("sentencepiece==")]


def data(submission):
    """Which data, and the command that makes it."""
    loader = submission.runs[0].event("train_loader")
    name = submission.runs[0].summary["data"]
    shards = loader.get("train_shards")
    text = (f"Data: `{name}`, {shards} training shards of {loader.get('tokens'):,} tokens in all; "
            f"SHA-256 of the validation tokens {submission.fields['val_sha256']}, of the tokenizer "
            f"{submission.fields['tokenizer_sha256']}.")
    where = "trainer's"
    match name.split("_", 1):
        case ["fineweb10B", "sp1024"]:
            where = "contest's"
            command = f"python data/cached_challenge_fineweb.py --variant sp1024 --train-shards {shards}"
        case ["fineweb10B", variant]:
            command = f"python data/fineweb.py --variant {variant} --train-shards {shards}"
        case ["builtin", _]:
            command = "python data/prepare.py --source builtin"
        case _:
            return text
    return f"{text} It is made by, in the root of the {where} repository,\n\n```\n{command}\n```"


def script(submission):
    """What train_gpt.py is, and where it can be read."""
    fields = submission.fields
    text = f"`train_gpt.py` has {fields['bytes_code']:,} bytes, which are counted (SHA-256 {fields['code_sha256']})."
    if submission.twin:
        return (f"{text} It is packed, and `train_gpt_human.py` is its readable source, {len(submission.twin):,} "
                "bytes: minified, that is the source at the top of each log.")
    if submission.is_packed:
        return f"{text} It is packed; the source that ran is at the top of each log."
    return text


def attribution(submission):
    """Techniques and the pull requests of the contest that they come from."""
    rows = [[credit.technique, f"`{credit.setting.name}={credit.setting.value}`",
             ", ".join(f"#{number}" for number in credit.pull_requests)] for credit in submission.credits]
    return f"## Attribution\n\n{table(['technique', 'setting', 'pull request'], rows)}"


def dependencies(submission):
    """Versions with which the runs were made."""
    fields = submission.fields
    header = submission.runs[0].header
    changed_files = header.get("changed_files", 0)
    changes = f" with {changed_files} changed file(s)" if changed_files else ""
    return (f"## Dependencies\n\ntorch {fields['pytorch_version']}, CUDA {header.get('cuda', 'not logged')}, "
            f"attention by {fields['attention_backend']}, {', '.join(base_packages(submission)[1:])}; beside these "
            f"what `requirements.txt` names. Trainer of commit {fields['commit']}{changes}.")
