"""tools/submit.py verify: a submission's artifact is scored again by its own script, and every difference is found."""

import json
import shutil

import pytest
from seeds import copies

import submit
from submission import verify

PERSON = ["--author", "A", "--github-id", "a", "--name", "x", "--blurb", "x", "--date", "2026-04-30"]


@pytest.fixture(scope="module")
def made(three_seeds, tmp_path_factory):
    """The folder of the three toy seeds."""
    out = tmp_path_factory.mktemp("records")
    assert submit.main(["folder", *map(str, three_seeds), *PERSON, "--out", str(out)]) == 0
    return out / "track_non_record_16mb/2026-04-30_x"


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "2026-04-30_x")


@pytest.fixture(scope="module")
def scored(made, three_seeds, tmp_path_factory):
    """What the script of the folder wrote when it scored the first seed's artifact."""
    out = tmp_path_factory.mktemp("scored") / "run"
    artifact = three_seeds[0] / "model.pg"
    verify.score(made, verify.seed_of(made, artifact, None), artifact, [], out)
    return out


@pytest.fixture
def score_once(scored, monkeypatch):
    """Take that in place of scoring again."""
    monkeypatch.setattr(verify, "score", lambda folder, seed, artifact, pairs, out: shutil.copytree(scored, out))


def call(capsys, *args):
    """(exit code, output, error) of the command."""
    code = submit.main(["verify", *map(str, args)])
    done = capsys.readouterr()
    return code, done.out, done.err


def json_changed(folder, change):
    path = folder / "submission.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


# ---- the same -------------------------------------------------------------------------------------------------------


def test_a_sound_folder_is_the_same_to_the_last_digit(made, three_seeds, capsys, monkeypatch):
    """Whatever settings lie in the environment."""
    monkeypatch.setenv("EVAL_SEQ_LEN", "32")
    code, out, _ = call(capsys, made, "--artifact", three_seeds[1] / "model.pg")
    assert code == 0, out
    summary = json.loads((three_seeds[1] / "summary.json").read_text())
    row = next(line for line in out.splitlines() if line.startswith("val_bpb"))
    assert row.split() == ["val_bpb", *[repr(summary["val_bpb"])] * 3, "same"]
    assert "the same kind of machine: every digit counts" in out and out.endswith("verdict: the same\n")
    assert "NOT" not in out


def test_the_artifact_may_lie_in_the_folder(folder, three_seeds, score_once, capsys):
    assert call(capsys, folder)[0] == 2
    shutil.copy(three_seeds[0] / "model.pg", folder)
    assert call(capsys, folder)[0] == 0


def test_a_folder_does_not_change(made, three_seeds, score_once, capsys):
    before = sorted(path.name for path in made.iterdir())
    call(capsys, made, "--artifact", three_seeds[0] / "model.pg")
    assert sorted(path.name for path in made.iterdir()) == before


# ---- not the same ---------------------------------------------------------------------------------------------------

CHANGES = {  # of submission.json: the row that finds it
    "a digit of the score": (lambda fields: fields["seed_results"]["42"].update(val_bpb=fields["seed_results"]["42"]["val_bpb"] + 1e-12), "val_bpb"),
    "another loss": (lambda fields: fields["seed_results"]["42"].update(val_loss=1.0), "val_loss"),
    "tokens": (lambda fields: fields.update(val_tokens=fields["val_tokens"] - 1), "val_tokens"),
    "bytes": (lambda fields: fields.update(val_bytes=fields["val_bytes"] + 1), "val_bytes"),
    "size of the code": (lambda fields: fields["seed_results"]["42"].update(bytes_code=1), "code_bytes"),
    "size of the model": (lambda fields: fields["seed_results"]["42"].update(bytes_model=1), "model_bytes"),
    "another tokenizer": (lambda fields: fields.update(tokenizer_sha256="0" * 64), "tokenizer_sha256"),
    "another text": (lambda fields: fields.update(val_sha256="0" * 64), "val_sha256"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_json_is_found(change, folder, three_seeds, score_once, capsys):
    plant, name = CHANGES[change]
    json_changed(folder, plant)
    code, out, _ = call(capsys, folder, "--artifact", three_seeds[0] / "model.pg")
    wrong = [line.split()[0] for line in out.splitlines() if line.endswith("NOT THE SAME")]
    assert (code, wrong) == (1, [name]), out
    assert out.endswith("verdict: not the same\n")


def test_a_changed_script_is_found(folder, three_seeds, score_once, capsys):
    with open(folder / "train_gpt.py", "a") as script:
        script.write("# one more line\n")
    code, out, _ = call(capsys, folder, "--artifact", three_seeds[0] / "model.pg")
    wrong = [line.split()[0] for line in out.splitlines() if line.endswith("NOT THE SAME")]
    assert (code, wrong) == (1, ["code_bytes", "code_sha256"])


def test_a_changed_log_is_found(folder, three_seeds, score_once, capsys):
    path = folder / "train_seed42.log"
    head, _, last = path.read_text().rstrip().rpartition("summary ")
    summary = json.loads(last)
    summary["val_bpb"] -= 0.001
    path.write_text(f"{head}summary {json.dumps(summary)}\n")
    code, out, _ = call(capsys, folder, "--artifact", three_seeds[0] / "model.pg")
    assert code == 1 and "val_bpb" in next(line for line in out.splitlines() if "NOT THE SAME" in line)


def test_another_artifact_than_that_of_the_seed(made, three_seeds, score_once, capsys):
    code, out, _ = call(capsys, made, "--seed", "314", "--artifact", three_seeds[0] / "model.pg")
    wrong = {line.split()[0] for line in out.splitlines() if line.endswith("NOT THE SAME")}
    assert code == 1 and {"val_bpb", "val_loss", "artifact_sha256"} <= wrong


# ---- another machine ------------------------------------------------------------------------------------------------


def test_on_another_machine_the_score_may_differ_by_a_stated_amount(folder, three_seeds, score_once, capsys):
    path = folder / "train_seed42.log"
    path.write_text(path.read_text().replace("choice attention:math", "choice attention:fa3"))
    artifact = three_seeds[0] / "model.pg"
    for off, expected in ((0.0004, 0), (0.0006, 1)):
        result = json.loads((folder / "submission.json").read_text())["seed_results"]["42"]
        json_changed(folder, lambda fields, off=off, result=result: fields["seed_results"]["42"].update(val_bpb=result["val_bpb"] + off))
        code, out, _ = call(capsys, folder, "--artifact", artifact)
        assert code == expected and "another kind of machine" in out and "attention fa3" in out, out
        assert "may differ by 0.0005 BPB" in out
        json_changed(folder, lambda fields, result=result: fields["seed_results"].update({"42": result}))
    json_changed(folder, lambda fields: fields.update(val_bytes=1))
    assert call(capsys, folder, "--artifact", artifact)[0] == 1, "whole numbers may not differ anywhere"


# ---- it cannot ------------------------------------------------------------------------------------------------------


def refused(result, *words):
    code, out, err = result
    errors = [line for line in err.splitlines() if not line.startswith("verify command:")]
    assert code == 2 and out == "" and len(errors) == 1 and errors[0].startswith("error: "), (out, err)
    assert all(word in errors[0] for word in words), err


def test_what_cannot_be_scored_is_one_line(folder, three_seeds, tmp_path, capsys):
    artifact = three_seeds[0] / "model.pg"
    refused(call(capsys, tmp_path / "none"), "no such folder")
    refused(call(capsys, folder), "model.pg: no such file", "--artifact")
    refused(call(capsys, folder, "--artifact", artifact, "--seed", "7"), "no log of seed 7; there is: 42, 314, 1337")
    refused(call(capsys, folder, "--artifact", artifact, "stride=3"), "'stride=3' is not KEY=VALUE")
    other = tmp_path / "other.pg"
    other.write_bytes(b"PGOLF" * 9)
    refused(call(capsys, folder, "--artifact", other), "artifact of no seed", "--seed")
    refused(call(capsys, folder, "--artifact", other, "--seed", "42"), "did not score", "other.pg")
    for log in folder.glob("*.log"):
        log.write_text("step:9/9 train_loss:2.1 train_time:590000ms\n")
    refused(call(capsys, folder, "--artifact", artifact), "no train_seed*.log ends with the summary of this trainer")
    (folder / "train_gpt.py").unlink()
    refused(call(capsys, folder, "--artifact", artifact), "has no train_gpt.py")


def test_missing_data_is_named(three_seeds, tmp_path, capsys):
    """The folder was made elsewhere: the data has another path here."""
    runs = copies(three_seeds[:1], tmp_path / "runs")
    assert submit.main(["folder", *map(str, runs), *PERSON, "--out", str(tmp_path)]) == 0
    folder = tmp_path / "track_non_record_16mb/2026-04-30_x"
    capsys.readouterr()
    artifact = runs[0] / "model.pg"
    refused(call(capsys, folder, "--artifact", artifact, f"DATA_PATH={tmp_path}/none"), "fineweb_val_*.bin", "DATA_PATH=")
