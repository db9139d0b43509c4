"""tools/submit.py folder: the files against the runs that they come from, and what is refused."""

import hashlib
import importlib.metadata
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from process import REPO, clean_env
from runs import SCRIPT, log_lines
from seeds import SEEDS, as_record, changed, copies, event_changed

import submit
import train_gpt as tg
from common import table_of_techniques
from submission import check, manifest, pack, page, recipe
from submission import folder as maker
from submission.runs import Run, read_run

PERSON = ["--author", "A. Author", "--github-id", "@author", "--name", "Toy: three seeds!", "--blurb", "Nothing | new.",
          "--date", "2026-04-30"]
NAME = "2026-04-30_Toy_three_seeds"


def make(runs, out, *more):
    """Exit code of the command."""
    return submit.main(["folder", *map(str, runs), *PERSON, "--out", str(out), *map(str, more)])


@pytest.fixture(scope="module")
def made(three_seeds, tmp_path_factory):
    """The folder of the three toy seeds."""
    out = tmp_path_factory.mktemp("records")
    assert make(three_seeds, out, "--against", "2.3,2.31,2.32") == 0
    return out / "track_non_record_16mb" / NAME


@pytest.fixture
def eligible(three_seeds, tmp_path):
    """Copies of the three runs that say what a run on the contest's machine would."""
    runs = copies(three_seeds, tmp_path / "runs")
    return [as_record(run, bpb) for run, bpb in zip(runs, RECORD_BPB)]


RECORD_BPB = (1.05213907, 1.05264118, 1.05240922)


def summaries(folders):
    return [json.loads((folder / "summary.json").read_text()) for folder in folders]


def said(folder):
    return json.loads((folder / "submission.json").read_text())


# ---- what is in the folder ------------------------------------------------------------------------------------------


def test_the_folder_has_the_files_of_the_contest(made, three_seeds):
    names = {"README.md", "submission.json", "train_gpt.py", "settings.env", "requirements.txt"}
    assert {path.name for path in made.iterdir()} == names | {f"train_seed{seed}.log" for seed in SEEDS}
    assert [path.name for path in made.parent.iterdir()] == [NAME], "nothing else is left there"
    assert (made / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()
    for seed, run in zip(SEEDS, three_seeds):
        assert (made / f"train_seed{seed}.log").read_bytes() == (run / "train.log").read_bytes()


def test_numbers_of_the_json_are_those_of_the_runs(made, three_seeds):
    fields, runs = said(made), summaries(three_seeds)
    for key in ("val_bpb", "val_loss"):
        values = [run[key] for run in runs]
        mean = sum(values) / 3
        assert fields[key] == pytest.approx(mean, rel=1e-12)
        assert fields[f"{key}_std"] == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in values) / 2))
    assert fields["seeds"] == list(SEEDS) and list(fields["seed_results"]) == [str(seed) for seed in SEEDS]
    sizes = []
    for folder, run in zip(three_seeds, runs):
        result = fields["seed_results"][str(run["seed"])]
        model = (folder / "model.pg").read_bytes()
        sizes.append(SCRIPT.stat().st_size + len(model))
        assert (result["artifact_bytes"], result["bytes_model"]) == (sizes[-1], len(model))
        assert result["artifact_sha256"] == hashlib.sha256(model).hexdigest()
        assert (result["val_bpb"], result["steps"]) == (run["val_bpb"], 5)
        seconds = (result["train_seconds"], result["calib_seconds"], result["eval_seconds"])
        assert seconds == (run["train_seconds"], run["calibrate_seconds"], run["eval_seconds"])
    assert fields["bytes_total"] == max(sizes) and fields["bytes_code"] == SCRIPT.stat().st_size


def test_the_json_names_code_data_and_machine_by_their_hashes(made, toy):
    fields = said(made)
    data = Path(toy[0].removeprefix("DATA_PATH="))
    (shard,) = data.glob("fineweb_val_*.bin")
    assert fields["code_sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert fields["val_sha256"] == hashlib.sha256(shard.read_bytes()[1024:]).hexdigest()
    assert fields["tokenizer_sha256"] == hashlib.sha256((data / "tokenizer.model").read_bytes()).hexdigest()
    assert (fields["hardware"], fields["gpu_count"], fields["attention_backend"]) == ("1xcpu", 0, "math")
    assert fields["pytorch_version"] == importlib.metadata.version("torch")
    assert fields["author"] == "A. Author" and fields["github_id"] == "author" and fields["date"] == "2026-04-30"
    assert fields["track"] == "non_record_16mb"


def test_compliance_is_computed(made):
    kept = said(made)["compliance"]
    assert all(isinstance(value, bool) for value in kept.values())
    no = {key for key, value in kept.items() if not value}
    assert no == {"score_first_ttt", "full_validation_set"}, "the toy run has no test-time training and another text"


def test_a_cpu_run_is_no_record_and_says_why(made):
    fields, readme = said(made), (made / "README.md").read_text()
    assert fields["eligible"] == "no" and fields["valid"] == "yes"
    assert any("not 8 x H100" in reason for reason in fields["eligible_reasons"])
    for reason in fields["eligible_reasons"]:
        assert f"- {reason}\n" in readme.partition("## Results")[0]


def test_requirements_are_the_imports_at_the_versions_that_ran(made):
    lines = (made / "requirements.txt").read_text().splitlines()
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in ("brotli", "zstandard")]
    assert lines[1:] == versions and lines[0].startswith("# beside torch==")


def test_the_readme_has_the_sections_in_order(made):
    """rules.md 2.4."""
    titles = re.findall(r"^#+ (.+)$", (made / "README.md").read_text(), re.M)
    expected = ["Toy: three seeds!", "Results", "Against the record", "What is new", "Recipe", "Compliance",
                "Reproduction", "Attribution", "Dependencies"]
    assert [title for title in titles if title in expected] == expected


def test_the_readme_has_every_seed(made, three_seeds):
    readme = (made / "README.md").read_text()
    for run in summaries(three_seeds):
        row = next(line for line in readme.splitlines() if line.startswith(f"| {run['seed']} "))
        assert row.split(" | ")[1:4] == [f"{run['val_loss']:.8f}", f"{run['val_bpb']:.8f}", f"{run['total_bytes']:,}"]
    assert f"**val_bpb {said(made)['val_bpb']:.5f}** (std {said(made)['val_bpb_std']:.5f})" in readme
    assert "Nothing | new." in readme, "a blurb is no cell of a table"
    assert "README: better by 0.005 nats per token, p < 0.01? " in readme


def test_the_comparison_is_in_the_json(made):
    fields = said(made)
    assert fields["comparison_baseline"] == "2.3,2.31,2.32" and fields["comparison_baseline_pr"] is None
    ours, theirs = fields["val_bpb"], 2.31
    error = math.sqrt(fields["val_bpb_std"] ** 2 / 3 + 0.01**2 / 3)
    assert fields["t_statistic_without_margin"] == pytest.approx((ours - theirs) / error)
    assert 0 < fields["p_value"] < 1 and fields["df"] > 1


# ---- recipe and attribution -----------------------------------------------------------------------------------------


def test_the_recipe_has_every_setting_that_was_changed(made, three_seeds):
    readme, given = (made / "README.md").read_text(), shlex.split(summaries(three_seeds)[0]["settings"])
    groups = {f.name.upper(): f.metadata["group"] for f in tg.fields(tg.Settings)}
    for pair in given:
        name, _, value = pair.partition("=")
        row = f"| `{name}` | `{value}` | "
        assert (row in readme) == (groups[name] != "Run"), pair
        if groups[name] != "Run":
            sentence = tg.Settings.__dataclass_fields__[name.lower()].metadata["doc"]
            assert sentence.replace("|", "\\|") in readme.partition(row)[2].partition("\n")[0]


def test_the_settings_file_gives_the_same_configuration(made, three_seeds, toy):
    s = tg.Settings.parse([f"@{made}/settings.env", toy[0], "SEED=9"])
    assert s.sha256() == said(made)["config_sha256"] == summaries(three_seeds)[0]["settings_hash"]
    assert "DATA_PATH" not in (made / "settings.env").read_text(), "a path of the runs' machine"


@pytest.mark.parametrize("setting, value, numbers", [
    ("TTT", "full", (549,)), ("TTT", "lora", ()), ("TTT", "lora_docs", (1530,)), ("SKIPS", "gated", (1394,)),
    ("SKIPS", "linear", ()), ("PARALLEL_RESIDUAL", "gptj", (1412,)), ("PARALLEL_RESIDUAL", "lanes", (1539,)),
    ("PARALLEL_RESIDUAL", "routed", (1529,)), ("ATTN_GATE", "dense", (1736,)), ("ATTN_GATE", "sparse", (1787,)),
    ("VALUE_RESIDUAL", "pair", (1311,)), ("LOADER", "coprime", (1060,)), ("LOADER", "sequential", ()),
    ("LOADER", "packed", (1530,)), ("GPTQ_CALIBRATION", "train", ()), ("GPTQ_CALIBRATION", "generated", (1019,)),
    ("XSA_LAST_N", "11", (265,)), ("MATRIX_CLIP_SIGMAS", "12.85", (1394,)), ("MIXER", "hedge", (967,)),
    ("MIXER", "backoff", ()), ("LOOP_ORDER", "layer", (1033,)), ("TRIGRAM_VOCAB_SIZE", "64", (1311,)),
    ("DOC_MASK", "attention", (1530,)), ("QAT_ROUNDING", "soft", (967,)), ("TOKEN_BOOST", "2.6", (1514,))])
def test_each_choice_is_credited_to_its_pull_request(setting, value, numbers):
    doc = tg.Settings.__dataclass_fields__[setting.lower()].metadata["doc"]
    assert recipe.pull_requests(doc, value) == numbers


def test_credits_of_a_published_record():
    """#2135, as its own README and spec have them: of what is on, and of the choices that it makes."""
    record = f"@{REPO}/records/track_10min_16mb/2026-05-01_SP8192_PR2130Base_Calib32"
    settings = recipe.settings_of(recipe.experiment_of(SCRIPT, [record]))
    found = {credit.setting.name: credit.pull_requests for credit in recipe.credits(settings)}
    expected = {"XSA_LAST_N": (265,), "LEAKY_SLOPE": (549,), "SKIPS": (1394,), "NUM_LOOPS": (1394,), "LQER_RANK": (1797,),
                "PARALLEL_RESIDUAL": (1529,), "ATTN_GATE": (1787,), "TTT": (1530,), "TOKEN_BOOST": (1514,),
                "MUON_ROW_NORMALIZE": (1285,), "SMEAR_GATE": (1667,), "ASYM_LOGIT_RESCALE": (1923,),
                "TTT_WARM_START_A": (1767,), "PHASED_TTT_PREFIX_DOCS": (1610,)}
    assert expected.items() <= found.items()
    assert not {"MIXER", "VALUE_RESIDUAL", "TRIGRAM", "COMPLEMENT_ALPHA", "BYTE_WEIGHTED_TTT"} & found.keys(), "off"


def test_every_technique_of_the_map_can_be_on():
    """The choices that turn a technique on, and its setting, are of the trainer."""
    rows = dict(table_of_techniques())
    assert len(table_of_techniques()) > 40
    assert recipe.VALUES.keys() | recipe.ON_AT_ZERO <= rows.keys()
    for technique, values in recipe.VALUES.items():
        choices = tg.get_args(tg.Settings.__dataclass_fields__[rows[technique].lower()].type)
        assert values <= set(choices), technique
    for name, value in recipe.NEUTRAL.items():
        assert tg.format_value(tg.Settings.__dataclass_fields__[name.lower()].default) == value


def test_compliance_names_functions_that_the_trainer_has():
    source = SCRIPT.read_text()
    for condition in page.CONDITIONS:
        for name in re.findall(r"`([\w.]+)`", condition.how):
            for part in name.split("."):
                assert re.search(rf"^ *(?:def|class) {part}\b", source, re.M), f"{condition.name}: {name}"
        assert set(condition.tests) <= tg.SELFTESTS.keys()


# ---- the script alone -----------------------------------------------------------------------------------------------


def test_the_folder_alone_makes_the_same_run(made, three_seeds, toy, tmp_path):
    """Its README's command, from inside a copy of it: the same configuration, the same model, the same score."""
    inside = shutil.copytree(made, tmp_path / "inside")
    command = re.search(r"^ +python (train_gpt.py .*)$", (made / "README.md").read_text(), re.M)[1]
    words = shlex.split(command.replace("$seed", "314"))
    words = [word for word in words if not word.startswith("DATA_PATH=")]
    done = subprocess.run([sys.executable, *words, toy[0], "DEVICE=cpu"], cwd=inside, env=clean_env(), timeout=120,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = json.loads((inside / "logs/seed314/summary.json").read_text())
    first = summaries(three_seeds)[1]
    for key in ("settings_hash", "code_sha256", "artifact_sha256", "val_bpb", "val_loss", "seed"):
        assert again[key] == first[key], key


# ---- records --------------------------------------------------------------------------------------------------------


def test_runs_that_could_be_one_go_to_the_record_track(eligible, tmp_path, capsys):
    assert make(eligible, tmp_path / "out", "--against", "2135") == 0
    folder = tmp_path / "out/track_10min_16mb" / NAME
    fields = said(folder)
    assert fields["eligible"] == "yes" and fields["eligible_reasons"] == [] and fields["track"] == "10min_16mb"
    assert fields["compliance"]["full_validation_set"] and fields["gpu_count"] == 8
    assert fields["hardware"] == "8xNVIDIA H100 80GB HBM3" and fields["comparison_baseline_pr"] == 2135
    readme = (folder / "README.md").read_text()
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py @settings.env" in readme
    assert "Not a record" not in readme and "against #2135" in readme.replace("Against", "against")
    assert "obstacle" not in capsys.readouterr().out


def test_a_draft_says_what_is_missing(eligible, tmp_path):
    assert make(eligible[:2], tmp_path / "out", "--draft") == 0
    folder = tmp_path / "out/track_10min_16mb" / NAME
    assert said(folder)["draft"] is True and said(folder)["compliance"]["three_seeds"] is False
    assert said(folder)["eligible"] == "no" and said(folder)["eligible_reasons"] == ["2 of 3 seeds"]
    assert "**Draft: 2 of at least 3 seeds.**" in (folder / "README.md").read_text()


def test_an_invalid_score_is_marked_everywhere(three_seeds, tmp_path):
    runs = copies(three_seeds, tmp_path / "runs")
    changed(runs[1], valid="no", reasons=["C3: trained on the text before scoring it"])
    assert make(runs, tmp_path / "out", "--track", "non-record") == 0
    folder = tmp_path / "out/track_non_record_16mb" / NAME
    fields, readme = said(folder), (folder / "README.md").read_text()
    assert fields["valid"] == "no" and not fields["compliance"]["c3_score_before_update"] and fields["compliance"]["c1_causality"]
    assert "**The score is not valid:**\n- seed 314: C3: trained on the text" in readme
    assert "C3: trained on the text before scoring it (seed 314)" in fields["eligible_reasons"]


def test_one_seed_is_enough_for_a_non_record(three_seeds, tmp_path):
    assert make(three_seeds[:1], tmp_path) == 0
    fields = said(tmp_path / "track_non_record_16mb" / NAME)
    assert fields["val_bpb_std"] is None and not fields["compliance"]["three_seeds"] and "draft" not in fields


# ---- what is refused ------------------------------------------------------------------------------------------------


def _tampered(runs):
    path = runs[0] / "summary.json"
    path.write_text(path.read_text().replace('"val_bpb": ', '"val_bpb": 1.0 and '))


def _mixed(runs):
    shutil.copy(runs[1] / "train.log", runs[0] / "train.log")


def _unfinished(runs):
    (runs[2] / "summary.json").unlink()
    with open(runs[2] / "train.log", "a") as log:
        log.write('ended reason:"interrupted by SIGTERM; the same command starts again"\n')


# name: (what is done to copies of the runs, options, words of the refusal)
FAULTS = {
    "one seed twice": (lambda runs: changed(runs[1], seed=42), [], ["the same seed 42", "give one of them"]),
    "other code": (lambda runs: changed(runs[2], code_sha256="0" * 64), [], ["differ in code", "000000000000"]),
    "other settings": (lambda runs: changed(runs[1], settings_hash="1" * 64, settings="MATRIX_LR=0.03 SEED=314"), [],
                       ["differ in settings", "MATRIX_LR=default and 0.03", "#2124"]),
    "other data": (lambda runs: event_changed(runs[1], "train_loader", train_shards=1499), [],
                   ["differ in training data", "1499 shards"]),
    "other validation text": (lambda runs: changed(runs[1], val_sha256="2" * 64), [], ["differ in validation text"]),
    "other tokenizer": (lambda runs: event_changed(runs[1], "tokenizer", sha256="3" * 64), [], ["differ in tokenizer"]),
    "other hardware": (lambda runs: changed(runs[1], device="NVIDIA H200"), [], ["differ in hardware", "1xcpu and 1xNVIDIA H200"]),
    "other torch": (lambda runs: event_changed(runs[1], "run", torch="2.4.1"), [], ["differ in torch", "2.4.1"]),
    "not finished": (_unfinished, [], ["did not finish", "interrupted by SIGTERM", "RESUME=auto"]),
    "no run": (lambda runs: shutil.rmtree(runs[0]), [], ["train.log: No such file", "logs/RUN_ID"]),
    "only scored": (lambda runs: changed(runs[0], steps=None, train_tokens=None), [], ["was not trained in this run"]),
    "only trained": (lambda runs: changed(runs[0], val_bpb=None), [], ["was not scored in this run"]),
    "two runs in one folder": (_mixed, [], ["are not of the same run"]),
    "damaged summary": (_tampered, [], ["is not the summary of a run"]),
    "a byte too many": (lambda runs: changed(runs[1], total_bytes=16_000_001), [], ["1 over the limit of 16000000", "FIT=allocate"]),
    "invalid": (lambda runs: changed(runs[1], valid="no", reasons=["C2 normalisation: off by 1e-2"]), [],
                ["not valid (C2 normalisation", "--track non-record"]),
    "other script": (lambda runs: None, ["--script", REPO / "tools/common.py"], ["is not what ran", "SHA-256"]),
    "no script": (lambda runs: None, ["--script", REPO / "none.py"], ["none.py: cannot be read"]),
    "unknown script": (lambda runs: [changed(run, code_sha256="4" * 64) for run in runs], [], ["neither train_gpt.py nor", "--script"]),
    "no name": (lambda runs: None, ["--name", ""], ["not given: --name"]),
    "a name without letters": (lambda runs: None, ["--name", "?!"], ["needs a letter or digit"]),
    "no blurb": (lambda runs: None, ["--blurb", " "], ["not given: --blurb"]),
    "no date": (lambda runs: None, ["--date", "30.4.2026"], ["not a date such as 2026-04-30"]),
    "a date without dashes": (lambda runs: None, ["--date", "20260430"], ["not a date such as 2026-04-30"]),
    "no day of the calendar": (lambda runs: None, ["--date", "2026-04-31"], ["not a date such as 2026-04-30"]),
    "unknown record": (lambda runs: None, ["--against", "7"], ["#7 is not in the table"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_refused_in_one_line(fault, three_seeds, tmp_path, capsys):
    plant, options, words = FAULTS[fault]
    runs = copies(three_seeds, tmp_path / "runs")
    plant(runs)
    assert make(runs, tmp_path / "out", *options) == 2
    refusal = capsys.readouterr().err
    assert refusal.startswith("error: ") and refusal.count("\n") == 1, refusal
    assert all(word in refusal for word in words), refusal
    assert not (tmp_path / "out").exists(), "nothing is written"


RECORD_FAULTS = {
    "two seeds": (lambda runs: runs.pop(), ["2 seed(s), and a record needs 3", "--draft"]),
    "clock": (lambda runs: changed(runs[1], eligible="no", eligible_reasons=["training took 600.4 s, the limit is 600"]),
              ["no record (training took 600.4 s", "--track non-record"]),
    "not a machine of the contest": (lambda runs: changed(runs[1], eligible="no", eligible_reasons=["hardware 8 x A100"]), ["8 x A100"]),
}


@pytest.mark.parametrize("fault", RECORD_FAULTS)
def test_each_fault_of_a_record_is_refused_in_one_line(fault, eligible, tmp_path, capsys):
    plant, words = RECORD_FAULTS[fault]
    plant(eligible)
    assert make(eligible, tmp_path / "out", "--track", "record") == 2
    refusal = capsys.readouterr().err
    assert refusal.startswith("error: ") and refusal.count("\n") == 1, refusal
    assert all(word in refusal for word in words) and not (tmp_path / "out").exists(), refusal


def test_everything_that_is_wrong_is_said_at_once(three_seeds, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SUBMIT_AUTHOR", raising=False)
    monkeypatch.delenv("SUBMIT_GITHUB_ID", raising=False)
    runs = copies(three_seeds, tmp_path / "runs")
    changed(runs[1], seed=42, device="NVIDIA H200", total_bytes=16_000_001)
    assert submit.main(["folder", *map(str, runs), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)
    assert "not given: --author, --github-id, --name, --blurb" in lines[0]


def test_author_and_id_may_come_from_the_environment(three_seeds, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBMIT_AUTHOR", "E. Nvironment")
    monkeypatch.setenv("SUBMIT_GITHUB_ID", "env")
    (tmp_path / "news.md").write_text("From a file.\n")
    words = [*map(str, three_seeds), "--name", "x", "--blurb", f"@{tmp_path}/news.md", "--out", str(tmp_path / "out")]
    assert submit.main(["folder", *words]) == 0
    (folder,) = (tmp_path / "out/track_non_record_16mb").iterdir()
    fields = said(folder)
    assert (fields["author"], fields["github_id"], fields["blurb"]) == ("E. Nvironment", "env", "From a file.")


# ---- complete or absent ---------------------------------------------------------------------------------------------


def test_a_folder_that_exists_stays_as_it_is(made, three_seeds, capsys):
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    assert make(three_seeds, made.parents[1]) == 2
    assert "exists; remove it" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_absent(tmp_path, monkeypatch, capsys):
    def full_disk(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "rename", full_disk)
    with pytest.raises(maker.BadInput, match="No space left on device"):
        maker.write_folder(tmp_path / "records/2026-04-30_x", {"a": b"1"})
    assert list((tmp_path / "records").iterdir()) == []


# ---- script, twin, requirements -------------------------------------------------------------------------------------

SMALL = b'"""Small."""\nimport lzma\n\n\ndef double(value):\n    """Twice."""\n    return 2 * value\n'


@pytest.fixture
def packed_run(tmp_path):
    """A run of a small packed script, as far as its twin is concerned; the script and its readable source."""
    small = pack.minified(SMALL, "small.py")
    script = tmp_path / "train_gpt.py"
    script.write_bytes(pack.packed(small, "lzma", False))
    log = f"{small.decode()}\n{'=' * 100}\nRunning Python\n".encode()
    summary = {"code_sha256": hashlib.sha256(script.read_bytes()).hexdigest()}
    events = [{"event": "run", "commit": "none", "packages": ["brotli==1.2.1"]}]
    (tmp_path / "readable.py").write_bytes(SMALL)
    return Run(tmp_path, summary, events, log), script, tmp_path / "readable.py"


def test_the_twin_is_proved_by_minifying_it(packed_run, tmp_path):
    run, script, readable = packed_run
    assert maker.find_twin(run, script, str(readable)) == SMALL
    (tmp_path / "train_gpt_human.py").write_bytes(SMALL)
    assert maker.find_twin(run, script, None) == SMALL, "it lies beside the script"
    readable.write_bytes(SMALL.replace(b"2 *", b"3 *"))
    with pytest.raises(maker.BadInput, match="minified, it is not the source at the top"):
        maker.find_twin(run, script, str(readable))
    assert maker.find_twin(run, script, "none") is None


def test_imports_decide_what_is_required(packed_run, tmp_path):
    run, script, _ = packed_run
    assert manifest.requirements(run, script, []) == [], "lzma comes with Python"
    more = run._replace(log=b"import brotli, torch, einops\n\n" + b"=" * 100 + b"\n")
    with pytest.raises(manifest.BadInput, match="imports einops, .*--requirement einops==VERSION"):
        manifest.requirements(more, script, [])
    assert manifest.requirements(more, script, ["einops==0.8.1"]) == ["brotli==1.2.1", "einops==0.8.1"]


def test_flash_attention_is_required_where_it_ran(packed_run):
    run, script, _ = packed_run
    log = b"def f():\n    import flash_attn_interface\n\n" + b"=" * 100 + b"\n"
    events = [{"event": "run", "packages": ["flash_attn_3==3.0.0"]}, {"event": "choice", "attention": "fa3"}]
    assert manifest.requirements(run._replace(log=log, events=events), script, []) == ["flash_attn_3==3.0.0"]
    events[1]["attention"] = "flash"
    assert manifest.requirements(run._replace(log=log, events=events), script, []) == []


def test_a_script_says_its_settings_in_a_process_of_its_own(tmp_path):
    """A script may have a record's settings as defaults: they are no change of the script, but of the trainer."""
    script = tmp_path / "train_gpt.py"
    script.write_text(SCRIPT.read_text().replace("leaky_slope: float = _model(\n        0.5,", "leaky_slope: float = _model(\n        0.25,"))
    experiment = recipe.experiment_of(script, ["NUM_LAYERS=12"])
    settings = {setting.name: setting for setting in recipe.settings_of(experiment)}
    assert not experiment.has_constants and experiment.words == ["NUM_LAYERS=12"]
    assert (settings["LEAKY_SLOPE"].value, settings["LEAKY_SLOPE"].default) == ("0.25", "0.25")
    assert [setting.name for setting in recipe.changed(list(settings.values()))] == ["NUM_LAYERS", "LEAKY_SLOPE"]
    script.write_text("raise SystemExit('no trainer')\n")
    with pytest.raises(recipe.BadInput, match=r"does not say its settings \(no trainer\)"):
        recipe.experiment_of(script, [])


# A script that was cut down to a record, as far as its settings are concerned: most are constants.
CUT_DOWN = """
RECORD = {"NUM_LAYERS": "12", "XSA_LAST_N": "12"}

class Settings:
    def parse(words, env):
        assert not [word for word in words if word.startswith("NUM_LAYERS")], "a constant of this script"
        settings = Settings()
        settings.chosen = dict(word.split("=") for word in words)
        return settings

    def experiment(self):
        return RECORD | {"ITERATIONS": "5000"} | self.chosen

    def sha256(self):
        return "hash"
"""


def test_the_constants_of_a_script_are_its_recipe_and_no_arguments(tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_text(CUT_DOWN)
    experiment = recipe.experiment_of(script, ["NUM_LAYERS=12", "XSA_LAST_N=12", "ITERATIONS=90"])
    assert experiment.has_constants and experiment.words == ["ITERATIONS=90"]
    settings = recipe.settings_of(experiment)
    assert [(setting.name, setting.value, setting.default) for setting in recipe.changed(settings)] == [
        ("NUM_LAYERS", "12", "12"), ("XSA_LAST_N", "12", "12"), ("ITERATIONS", "90", "5000")]
    assert settings[1].group == "Model" and "(#265)" in settings[1].doc, "in the words of the trainer"
    submission = manifest.Submission(*[None] * 16)._replace(experiment=experiment, changed=recipe.changed(settings))
    assert submission.arguments == ["ITERATIONS=90"], "it takes no settings file that names its constants"


def test_a_run_is_read_as_it_was_left(three_seeds):
    run = read_run(three_seeds[0])
    assert run.source == SCRIPT.read_text() and run.attention == "math" and run.machine == "1xcpu"
    assert run.summary == json.loads(log_lines(three_seeds[0])[-1].removeprefix("summary "))


# ---- submit.py check ------------------------------------------------------------------------------------------------


def errors(folder):
    """{rule} of all errors that the check finds."""
    return {finding.rule for finding in check.examine(folder).findings if finding.severity == "error"}


def test_the_folder_of_three_cpu_seeds_passes_the_check(made, capsys):
    assert submit.main(["check", str(made)]) == 0
    out = capsys.readouterr().out
    assert "errors:0" in out and "track:non-record" in out and "not 8 x H100" in out


def test_the_folder_of_a_record_passes_the_check(eligible, tmp_path):
    assert make(eligible, tmp_path, "--against", "2135") == 0
    found = check.examine(tmp_path / "track_10min_16mb" / NAME).findings
    assert not [finding for finding in found if finding.severity in ("error", "warning")], found


def log_changed(folder, seed, **facts):
    """Change the summary in the log of a seed, and in submission.json what is said there of it."""
    path = folder / f"train_seed{seed}.log"
    head, _, last = path.read_text().rstrip().rpartition("\nsummary ")
    path.write_text(f"{head}\nsummary {json.dumps(json.loads(last) | facts)}\n")


def json_changed(folder, seed, **facts):
    fields = said(folder)
    fields["seed_results"][str(seed)] |= facts
    (folder / "submission.json").write_text(json.dumps(fields))


def _too_large(folder):
    path = folder / "train_seed314.log"
    code, model = said(folder)["bytes_code"], 16_000_001 - said(folder)["bytes_code"]
    text = re.sub(r"model_bytes:\d+ total_bytes:\d+", f"model_bytes:{model} total_bytes:16000001", path.read_text())
    path.write_text(re.sub(r"(Total submission size \S+) \d+ bytes", r"\1 16000001 bytes", text))
    log_changed(folder, 314, code_bytes=code, model_bytes=model, total_bytes=16_000_001)
    json_changed(folder, 314, bytes_model=model, artifact_bytes=16_000_001)
    fields = said(folder) | {"bytes_total": 16_000_001}
    (folder / "submission.json").write_text(json.dumps(fields))


def _slow_training(folder):
    log_changed(folder, 314, train_seconds=603.2)
    json_changed(folder, 314, train_seconds=603.2)


def _slow_scoring(folder):
    log_changed(folder, 42, eval_seconds=600.5)
    json_changed(folder, 42, eval_seconds=600.5)
    path = folder / "train_seed42.log"
    path.write_text(re.sub(r"eval_time:\d+ms valid", "eval_time:600500ms valid", path.read_text()))


def _other_code(folder):
    with open(folder / "train_gpt.py", "a") as script:
        script.write("# \n")


def _overlap(folder):
    """As the trainer says it of the data of #2127."""
    reason = "C3: 9662 of 50000 validation documents begin as some did that were trained on, with the same 64 tokens"
    log_changed(folder, 1337, val_documents_in_training=9_662, valid="no", reasons=[reason])


def _mixed_logs(folder):
    """The second half of one seed's log behind the first half of another's."""
    first, second = ((folder / f"train_seed{seed}.log").read_text() for seed in (42, 314))
    cut = re.compile(r"(?m)^step:3\b")
    mixed = first[: cut.search(first).start()] + second[cut.search(second).start():]
    (folder / "train_seed42.log").write_text(mixed)


PLANTED = {
    "a byte too many": (_too_large, "CK-SIZE"),
    "training over 600 s": (_slow_training, "CK-TRAINTIME"),
    "evaluation over 600 s": (_slow_scoring, "CK-EVALTIME"),
    "other code": (_other_code, "CK-HASH"),
    "a changed score": (lambda folder: json_changed(folder, 42, val_bpb=RECORD_BPB[0] - 2e-6), "CK-FOLDER"),
    "a missing seed": (lambda folder: (folder / "train_seed1337.log").unlink(), "CK-SEEDS"),
    "training on validation text": (_overlap, "CK-OVERLAP"),
    "two runs' logs mixed": (_mixed_logs, "CK-SEEDS"),
}


@pytest.fixture(scope="module")
def record(three_seeds, tmp_path_factory):
    """The folder of a record, made of runs that say what the contest's would."""
    folder = tmp_path_factory.mktemp("record")
    runs = [as_record(run, bpb) for run, bpb in zip(copies(three_seeds, folder / "runs"), RECORD_BPB)]
    assert make(runs, folder / "out", "--against", "2135") == 0
    return folder / "out/track_10min_16mb" / NAME


@pytest.mark.parametrize("fault", PLANTED)
def test_the_check_finds_each_fault_by_its_rule(fault, record, tmp_path):
    plant, rule = PLANTED[fault]
    folder = Path(shutil.copytree(record, tmp_path / NAME))
    plant(folder)
    found = errors(folder)
    assert rule in found, check.examine(folder).findings
