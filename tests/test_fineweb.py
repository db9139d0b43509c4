"""data/fineweb.py against repositories of a few kilobytes: folders, and a hub that answers from one."""

import inspect
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import toy_documents

import fineweb
import prepare
import proof
from common import sha256
from shards import list_shards

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "fineweb.py"
V, NAME = 400, "fineweb10B_sp400"


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """(a repository in the contest's layout with two validation and five training shards, the constants of its validation)."""
    root = tmp_path_factory.mktemp("published")
    (root / "in.txt").write_text("\f".join(toy_documents(count=130)))
    made = root / "made"
    args = ["--source", root / "in.txt", "--out", made, "--vocab-size", V, "--val-docs", 20, "--shard-tokens", 2000, "--workers", 1]
    assert prepare.main([str(a) for a in args]) == 0
    repository = root / "repository"
    (repository / "datasets" / "datasets" / NAME).mkdir(parents=True)
    (repository / "datasets" / "tokenizers").mkdir()
    for path in made.glob("fineweb_*.bin"):
        (repository / "datasets" / "datasets" / NAME / path.name).write_bytes(path.read_bytes())
    (repository / "datasets" / "tokenizers" / f"fineweb_{V}_bpe.model").write_bytes((made / "tokenizer.model").read_bytes())
    assert len(list_shards(made, "val")) > 1 and len(list_shards(made, "train")) > 4
    val = json.loads((made / "manifest.json").read_text())["splits"]["val"]
    return repository, dict(val, tokens={V: val["tokens"]}, bytes_per_token={})


@pytest.fixture
def mirror(published, tmp_path):
    """A copy of the repository, to be damaged, and its folder of shards."""
    for path in published[0].rglob("*.*"):
        if path.is_file():
            target = tmp_path / "mirror" / path.relative_to(published[0])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "mirror", tmp_path / "mirror" / "datasets" / "datasets" / NAME


def run(published, out, *args, repository=None, shards=3, known=None):
    return fineweb.main(["--variant", f"sp{V}", "--train-shards", str(shards), "--out", str(out), "--repo",
                         str(repository or published[0]), *map(str, args)], known=known or published[1])


def contents(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "manifest.json"}


def wanted(published, shards=3):
    """What must lie in the output folder, byte for byte."""
    files = {}
    for path in published[0].rglob("*.*"):
        if path.is_file() and not ("_train_" in path.name and int(path.stem[-6:]) >= shards):
            files[str(path.relative_to(published[0] / "datasets"))] = path.read_bytes()
    return files


def test_files_arrive_in_the_contests_layout_with_a_manifest(published, tmp_path, capsys):
    assert run(published, tmp_path, "--check", "--workers", 1) == 0
    assert contents(tmp_path) == wanted(published)
    manifest = json.loads((tmp_path / "datasets" / NAME / "manifest.json").read_text())
    assert manifest["splits"]["val"] == dict(documents=20, tokens=published[1]["tokens"][V], bytes=published[1]["bytes"])
    assert manifest["splits"]["train"]["tokens"] == 6000 and manifest["vocab_size"] == V
    for row in manifest["shards"]:
        assert row["sha256"] == sha256(tmp_path / "datasets" / NAME / row["name"])
    out = capsys.readouterr().out
    assert "ok      FineWeb validation bytes" in out and "checks ok" in out and "FAILED" not in out


def test_a_repository_may_begin_at_its_root_or_be_an_address(published, tmp_path):
    assert run(published, tmp_path, repository=published[0] / "datasets") == 0
    assert contents(tmp_path) == wanted(published)
    assert run(published, tmp_path / "b", repository=f"file://{published[0]}") == 0
    assert contents(tmp_path / "b") == wanted(published)


def test_verified_files_are_not_fetched_again(published, tmp_path, monkeypatch):
    place, fetched = fineweb.place, []
    monkeypatch.setattr(fineweb, "place", lambda r, name, part: (fetched.append(Path(name).name), place(r, name, part)))
    assert run(published, tmp_path, shards=2) == 0 and len(fetched) == 5
    fetched.clear()
    assert run(published, tmp_path, shards=2) == 0 and not fetched
    assert run(published, tmp_path, shards=4) == 0 and fetched == ["fineweb_train_000002.bin", "fineweb_train_000003.bin"]
    assert contents(tmp_path) == wanted(published, 4)
    fetched.clear()
    broken = tmp_path / "datasets" / NAME / "fineweb_train_000001.bin"
    broken.write_bytes(broken.read_bytes()[:500])
    assert run(published, tmp_path, shards=4) == 0 and fetched == ["fineweb_train_000001.bin"]
    assert contents(tmp_path) == wanted(published, 4)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_interrupted_copy_continues(at, published, tmp_path):
    """Killed while a file is being copied: no manifest, nothing cut under a final name, and the same result afterwards."""
    code = ("import os, signal, sys; sys.path.insert(0, sys.argv[1]); import fineweb; left = int(sys.argv[2]); place = fineweb.place\n"
            "def half(r, name, part):\n"
            "    global left; left -= 1; place(r, name, part)\n"
            "    if not left: os.truncate(part, 700); os.kill(os.getpid(), signal.SIGKILL)\n"
            "fineweb.place = half\n"
            "fineweb.main(sys.argv[4:], known=eval(sys.argv[3]))")
    args = ["--variant", f"sp{V}", "--train-shards", "3", "--out", tmp_path, "--repo", published[0]]
    killed = subprocess.run([sys.executable, "-c", code, SCRIPT.parent, str(at), repr(published[1]), *map(str, args)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    complete = wanted(published)
    found = contents(tmp_path)
    assert all(found[name] == complete[name] for name in found if not name.endswith(".part"))
    assert any(name.endswith(".part") for name in found) and not list(tmp_path.rglob("manifest.json"))
    assert run(published, tmp_path) == 0 and contents(tmp_path) == complete


def _pack(path, offset, value):
    raw = bytearray(path.read_bytes())
    struct.pack_into("<i", raw, offset, value)
    path.write_bytes(raw)


DAMAGE = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-10]), "length"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"ab"), "length"),
    "empty": (lambda p: p.write_bytes(b""), "magic"),
    "magic": (lambda p: _pack(p, 0, 7), "magic"),
    "version": (lambda p: _pack(p, 4, 2), "version"),
    "foreign token": (lambda p: _pack(p, 2000, V), "token 400"),
}


@pytest.mark.parametrize("shard", ["fineweb_train_000001.bin", "fineweb_val_000001.bin"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named_and_never_gets_its_final_name(case, shard, published, mirror, tmp_path, capsys):
    damage, word = DAMAGE[case]
    damage(mirror[1] / shard)
    assert run(published, tmp_path / "out", repository=mirror[0]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{NAME}/{shard}" in error and word in error and "damaged" in error
    complete, found = wanted(published), contents(tmp_path / "out")
    assert not any(name.endswith(shard) for name in found) and all(found[name] == complete[name] for name in found)


def test_only_the_published_validation_set_is_accepted(published, mirror, tmp_path, capsys):
    assert run(published, tmp_path / "out", known=proof.FINEWEB) == 2
    error = capsys.readouterr().err
    assert "not the published validation set" in error and "expected 50,000, found 20" in error
    assert not contents(tmp_path / "out")
    _pack(mirror[1] / "fineweb_val_000000.bin", 1030, 260 << 16 | 300)  # still a shard, but of another text
    assert run(published, tmp_path / "out", repository=mirror[0]) == 2
    assert "FineWeb validation bytes" in capsys.readouterr().err and not contents(tmp_path / "out")


def test_a_wrong_tokenizer_is_refused(published, mirror, tmp_path, capsys):
    model = mirror[0] / "datasets" / "tokenizers" / f"fineweb_{V}_bpe.model"
    model.write_bytes(b"no model")
    assert run(published, tmp_path / "out", repository=mirror[0]) == 2
    assert "not a SentencePiece model" in capsys.readouterr().err and not contents(tmp_path / "out")


def test_more_shards_than_there_are(published, tmp_path, capsys):
    have = len(list((published[0] / "datasets" / "datasets" / NAME).glob("*_train_*")))
    assert run(published, tmp_path, shards=have + 20) == 2
    error = capsys.readouterr().err
    assert f"holds {have} training shards" in error and str(have + 20) in error
    assert not any("_train_" in name for name in contents(tmp_path)), "known before the first download"


@pytest.mark.parametrize("args, words", [
    (["--variant", "sp2048"], ["sp1024, sp4096, sp8192"]), (["--variant", "bytes"], ["--variant bytes"]),
    (["--train-shards", "-1"], ["--train-shards: '-1'", "at least 0"]),
    (["--workers", "some"], ["--workers: 'some'", "whole number"]), (["--repo", "/no/such/folder"], ["no such folder"]),
    (["--repo", "."], ["holds no fineweb_1024_bpe.model"])])
def test_wrong_arguments_are_one_line(args, words, tmp_path, capsys):
    assert fineweb.main(["--out", str(tmp_path / "out"), *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words)
    assert not contents(tmp_path)


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    pytest.importorskip("huggingface_hub")
    begin = time.monotonic()
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, str(SCRIPT), "--variant", "sp1024", "--train-shards", "1", "--out", str(tmp_path / "out")],
                          capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "check the network" in done.stderr and "--source builtin" in done.stderr
    assert time.monotonic() - begin < 15 and not contents(tmp_path / "out")


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert fineweb.main(["--variant", "sp1024", "--out", str(tmp_path)]) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err


def test_the_hub_is_asked_in_the_contests_layout(published, tmp_path, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")
    cache, asked, limit = tmp_path / "cache", [], [4]

    def exists(repo, name, repo_type):
        assert (repo, repo_type) == ("somebody/golf", "dataset")
        return (published[0] / name).is_file()

    def download(repo, name, repo_type, etag_timeout):
        asked.append(name)
        if len(asked) > limit[0]:
            raise ConnectionError("the line is down\nand more")
        blob, link = cache / f"blob{len(asked)}", cache / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        blob.write_bytes((published[0] / name).read_bytes())
        link.symlink_to(blob)  # as the hub's cache does it
        return str(link)

    inspect.signature(hub.file_exists).bind("a/b", "c", repo_type="dataset")  # the fakes take what the real ones take
    inspect.signature(hub.hf_hub_download).bind("a/b", "c", repo_type="dataset", etag_timeout=10)
    monkeypatch.setattr(hub, "file_exists", exists)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    out = tmp_path / "out"
    assert run(published, out, repository="somebody/golf") == 2
    error = capsys.readouterr().err
    assert "the line is down" in error and error.count("\n") == 1 and "what is complete stays" in error
    assert "datasets/fineweb10B_sp400/fineweb_train_000000.bin" in contents(out)
    limit[0] = 99
    assert run(published, out, repository="somebody/golf") == 0
    assert asked[:2] == [f"datasets/tokenizers/fineweb_{V}_bpe.model", f"datasets/datasets/{NAME}/fineweb_val_000000.bin"]
    assert asked.count(f"datasets/datasets/{NAME}/fineweb_train_000000.bin") == 1
    assert contents(out) == wanted(published)
    shard = out / "datasets" / NAME / "fineweb_train_000002.bin"
    assert shard.stat().st_nlink == 2 and not shard.is_symlink(), "linked to the cache: no second copy of 16 GB"


def test_help_names_every_option():
    text = fineweb.parser().format_help()
    assert all(action.help for action in fineweb.parser()._actions) and "examples:" in text and "exit codes" in text
