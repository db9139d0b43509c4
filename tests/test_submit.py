"""tools/submit.py: the packed script is the readable one in everything but its bytes, and trusts no file but itself."""

import ast
import functools
import hashlib
import json
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("python_minifier")

from process import REPO, clean_env, run_trainer
from runs import QUICK, RULE, SCRIPT, call, command, good, losses, summary

import submit
from submission import pack as packer

UNPACKED = f"train_gpt-{os.getuid()}"
SAME = ("steps", "train_tokens", "model_bytes", "artifact_sha256", "val_bpb", "val_loss", "val_tokens", "val_bytes",
        "params", "settings_hash", "seed", "valid", "reasons")


def pack(script, out, *more):
    """The packed file; its unpacked source is beside it."""
    assert submit.main(["pack", "--script", str(script), "--out", str(out), *more]) == 0
    return out


@pytest.fixture(autouse=True, scope="module")
def minified_once():
    """The trainer takes seconds to minify, always to the same bytes (test_same_input_same_bytes)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer, "minified", functools.cache(packer.minified))
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The packed trainer in a folder of its own, which is read-only."""
    folder = tmp_path_factory.mktemp("packed")
    out = pack(SCRIPT, folder / "train_gpt.py")
    folder.chmod(0o555)
    yield out
    folder.chmod(0o755)


@pytest.fixture(scope="module")
def small():
    return packer.minified(SCRIPT.read_bytes(), SCRIPT)


def python(*words, tmp, **more):
    """Python with these words, unpacking into the folder tmp/UNPACKED."""
    return subprocess.run([sys.executable, *map(str, words)], env=clean_env({"TMPDIR": str(tmp)}), timeout=100, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, check=False, **more)


# ---- the trainer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--compressor", "lzma"], ["--compressor", "brotli"], ["--text"]], ids=" ".join)
def test_help_is_the_same(tmp_path, options):
    """Through every form of the file."""
    out = pack(SCRIPT, tmp_path / "train_gpt.py", *options)
    assert out.read_bytes().isascii() == ("--text" in options)
    assert good(python(out, "--help", tmp=tmp_path)).stdout == good(call(["--help"])).stdout


def test_training_and_scoring_are_the_same(toy, packed, small, tmp_path):
    """Settings from a file, the environment and arguments; every loss; the artifact; the bytes that were shipped."""
    (tmp_path / "s.env").write_text("ITERATIONS=6\nVAL_LOSS_EVERY=3\n")
    args, env, found = command(toy, tmp_path / "one", f"@{tmp_path}/s.env", "PHASES=all"), {"SEED": "11"}, {}
    args.remove("ITERATIONS=5")
    found["readable"] = summary(good(call(args, env)))
    args[args.index(f"OUT_DIR={tmp_path}/one")] = f"OUT_DIR={tmp_path}/two"
    env["TMPDIR"] = str(tmp_path)
    found["packed"] = summary(good(run_trainer(args, env, cwd=tmp_path, script=packed)))
    args.remove("PHASES=all")
    again = [*args, "PHASES=eval", f"ARTIFACT={tmp_path}/two/model.pg", f"OUT_DIR={tmp_path}/three"]
    found["scored again"] = summary(good(run_trainer(again, env, cwd=tmp_path, script=packed)))
    assert found["readable"]["val_bpb"] == found["scored again"]["val_bpb"]
    assert len(losses(tmp_path / "one")) == 6 and losses(tmp_path / "one") == losses(tmp_path / "two")
    said = found["packed"]
    assert {key: said[key] for key in SAME} == {key: found["readable"][key] for key in SAME}
    assert said["code_bytes"] == packed.stat().st_size < found["readable"]["code_bytes"] == SCRIPT.stat().st_size
    assert said["total_bytes"] == said["code_bytes"] + said["model_bytes"]
    assert said["code_sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()
    for run, source in (("one", SCRIPT.read_bytes()), ("two", small)):  # what runs can be read, whatever was shipped
        head = (tmp_path / run / "train.log").read_text().partition(RULE)[0]
        assert head.rstrip("\n") == source.decode().rstrip("\n")


@pytest.mark.parametrize("options", [[], ["--specialise"]], ids=["preset", "specialised"])
def test_a_script_with_settings_runs_them_by_itself(toy, options, tmp_path):
    """Alone in an empty folder: the same losses, artifact and score, and in the log the same settings."""
    (tmp_path / "mine.env").write_text("\n".join([*toy, *QUICK, "PARALLEL_START_LAYER=3", "LAWA_K=3"]))
    out = tmp_path / "alone/train_gpt.py"
    assert submit.main(["pack", "--settings", f"{tmp_path}/mine.env", *options, "--out", str(out)]) == 0
    good(python(out, "OUT_DIR=run", "SEED=5", tmp=tmp_path, cwd=out.parent))
    good(call([f"@{tmp_path}/mine.env", "SEED=5", f"OUT_DIR={tmp_path}/whole"]))
    found, expected = (json.loads((folder / "summary.json").read_text()) for folder in (out.parent / "run", tmp_path / "whole"))
    same = set(SAME) - {"settings_hash"} if options else SAME
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    assert losses(out.parent / "run") == losses(tmp_path / "whole") != []
    chosen = {pair for pair in expected["settings"].split() if not pair.startswith("OUT_DIR=")}
    assert chosen - set(found["settings"].split()) <= {"LAWA_K=3"}  # which does nothing here
    readable = out.with_name("train_gpt_human.py").read_text()
    if options:
        assert readable.count("\n") < 0.9 * SCRIPT.read_text().count("\n")
    else:
        assert re.search("^PRESET = '.*DATA_PATH=", readable, re.M)


def test_a_preset_is_below_all_that_is_given(tmp_path):
    (tmp_path / "mine.env").write_text("NUM_LAYERS=4 XSA_LAST_N=2 VE_LAYERS=2,3 MATRIX_LR=0.5")
    out = tmp_path / "train_gpt.py"
    assert submit.main(["pack", "--settings", f"{tmp_path}/mine.env", "--out", str(out)]) == 0
    said = good(python(out, "--help", tmp=tmp_path)).stdout
    assert "  MATRIX_LR=0.5 " in said and "  NUM_LAYERS=4 " in said and "  SEED=1337 " in said
    (tmp_path / "more.env").write_text("XSA_LAST_N=5")
    done = python(out, f"@{tmp_path}/more.env", tmp=tmp_path)
    assert done.returncode == 2 and "XSA_LAST_N=5 exceeds NUM_LAYERS=4" in done.stderr


def test_ranks_start_at_once(toy, packed, small, tmp_path):
    """Two ranks unpack into the same empty folder; one rank alone has the same losses."""
    args = command(toy, tmp_path / "two", "ITERATIONS=3")
    good(python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", packed, *args, tmp=tmp_path))
    good(call(command(toy, tmp_path / "one", "ITERATIONS=3")))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    (file,) = (tmp_path / UNPACKED).iterdir()
    assert file.read_bytes() == small and file.stat().st_mode & 0o077 == 0
    assert (tmp_path / UNPACKED).stat().st_mode & 0o777 == 0o700
    assert list(packed.parent.iterdir()) == [packed]


def test_bad_input_is_one_line_as_before(packed, tmp_path):
    """No traceback, and nothing of the wrapper."""
    done = python(packed, "MATRIX_LRR=1", tmp=tmp_path)
    assert done.returncode == 2 and done.stderr == call(["MATRIX_LRR=1"]).stderr != ""


def test_minified_source_keeps_what_is_read_at_run_time(small):
    """Signatures with their names, defaults and annotations; fields of classes; what must come before torch."""
    def shape(source):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                args = node.args
                names = [arg.arg for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs]]
                method = bool(names) and (names[0] in ("self", "cls") or names[0].isupper() and len(names[0]) == 1)
                yield node.name, tuple(names[method:]), tuple(ast.unparse(arg.annotation) for arg in args.args if arg.annotation)
            elif isinstance(node, ast.ClassDef):
                fields = [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]
                yield node.name, tuple((field.target.id, ast.unparse(field.annotation)) for field in fields)

    raw = SCRIPT.read_bytes()
    assert sorted(map(repr, shape(small))) == sorted(map(repr, shape(raw))) and len(small) < 0.7 * len(raw)
    text = small.decode()
    assert text.index("OMP_WAIT_POLICY") < text.index("import numpy as np")


# ---- a small script: what Python sees -------------------------------------------------------------------------------

SIGHT = '''"""The head of \\"it\\".

The rooms: not kept
"""
import inspect, os, pickle, sys, traceback
from dataclasses import dataclass, fields

def scale(some_value, BLOCK: "constexpr" = 3, *, key_only=1):
    """Not kept."""
    another = some_value * BLOCK
    return another + another + key_only

@dataclass
class Fields:
    first: int = 1

def broken():
    raise ValueError("\\u00e9\\u4e16")

if __name__ == "__main__":
    assert pickle.loads(pickle.dumps(Fields(2))) == Fields(2) and fields(Fields)[0].type is int
    try:
        broken()
    except ValueError:
        lines = traceback.format_exc().splitlines()
    facts = dict(doc=__doc__, name=__name__, file=__file__, argv=sys.argv, source=inspect.getsource(scale),
                 signature=str(inspect.signature(scale)), value=scale(2, BLOCK=5, key_only=7), lines=lines,
                 main=vars(sys.modules["__main__"]) is globals(), at=scale.__code__.co_filename)
    print(__import__("json").dumps(facts))
'''


@pytest.fixture(scope="module")
def sight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sight")
    (folder / "readable.py").write_text(SIGHT)
    return pack(folder / "readable.py", folder / "packed.py")


def facts(sight, tmp, **more):
    return json.loads(good(python(sight, "A=1", tmp=tmp, **more)).stdout)


def test_script_is_main_and_has_source(sight, tmp_path):
    """Triton, torch.compile and tracebacks read the source of functions; __file__ is what was shipped."""
    seen = facts(sight, tmp_path)
    assert seen["name"] == "__main__" and seen["main"] and seen["argv"] == [str(sight), "A=1"]
    assert seen["doc"].strip() == 'The head of "it".' and seen["value"] == 27 and seen["file"] == str(sight)
    assert seen["signature"] == "(some_value, BLOCK: 'constexpr' = 3, *, key_only=1)"
    assert seen["source"].startswith("def scale(some_value,BLOCK:'constexpr'=3,*,key_only=1):")
    assert Path(seen["at"]).parent == tmp_path / UNPACKED
    assert any(seen["at"] in line for line in seen["lines"]) and "def broken():raise ValueError(" in "".join(seen["lines"])


def test_script_can_be_imported(sight, tmp_path):
    code = "import pickle, packed; print(packed.scale(1), packed.__name__, pickle.loads(pickle.dumps(packed.Fields())))"
    assert good(python("-c", code, tmp=tmp_path, cwd=sight.parent)).stdout == "7 packed Fields(first=1)\n"


def test_compiler_follows_packed_code(tmp_path):
    """Dynamo traces it whole; it reads the source of what it cannot trace."""
    (tmp_path / "readable.py").write_text(
        "import torch\n@torch.compile(backend='eager', fullgraph=True)\ndef f(x):\n    y = x * 2\n    return y + y\n"
        "print(f(torch.ones(2)).tolist())\n@torch.compile(backend='eager', fullgraph=True)\ndef g(x):\n"
        "    torch._dynamo.graph_break()\n    return x\ntry:\n    g(torch.ones(2))\nexcept Exception as e:\n    print(e)\n")
    out = good(python(pack(tmp_path / "readable.py", tmp_path / "packed.py"), tmp=tmp_path)).stdout
    assert out.startswith("[4.0, 4.0]\n") and "graph_break()" in out and UNPACKED in out


# ---- a small script: whose files it trusts --------------------------------------------------------------------------


def unpacked(tmp_path):
    return next((tmp_path / UNPACKED).iterdir())


def test_tampered_file_is_neither_run_nor_read(sight, tmp_path):
    first = facts(sight, tmp_path)
    file = unpacked(tmp_path)
    whole = file.read_bytes()
    file.write_text("print('tampered')\n" * 60)
    assert facts(sight, tmp_path) == first and file.read_bytes() == whole
    victim = tmp_path / "victim"
    victim.write_text("mine")
    file.unlink()
    file.symlink_to(victim)  # replaced, not followed
    assert facts(sight, tmp_path) == first and victim.read_text() == "mine" and not file.is_symlink()


def _link(folder, elsewhere):
    folder.symlink_to(elsewhere)


def _open_to_all(folder, elsewhere):
    folder.mkdir()
    folder.chmod(0o777)


def _file(folder, elsewhere):
    folder.write_text("")


@pytest.mark.parametrize("prepare", [_link, _open_to_all, _file])
def test_folder_that_others_can_write_is_not_used(sight, tmp_path, prepare):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    prepare(tmp_path / UNPACKED, elsewhere)
    seen = facts(sight, tmp_path)
    assert Path(seen["at"]).parent not in (tmp_path / UNPACKED, elsewhere) and not list(elsewhere.iterdir())
    assert seen["source"].startswith("def scale(") and seen["value"] == 27
    if prepare is not _file:
        assert not list((tmp_path / UNPACKED).iterdir()) and Path(seen["at"]).parent.stat().st_mode & 0o777 == 0o700


def test_full_disk_costs_nothing_but_the_file(sight, tmp_path):
    seen = facts(sight, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)))
    assert seen["source"].startswith("def scale(") and seen["value"] == 27
    assert not list((tmp_path / UNPACKED).glob("*.py"))


def test_damaged_file_does_not_run(sight, tmp_path):
    data = bytearray(sight.read_bytes())
    for name, damaged in (("cut.py", data[:-9]), ("flipped.py", data[:-40] + bytes([data[-40] ^ 64]) + data[-39:])):
        (tmp_path / name).write_bytes(damaged)
        done = python(tmp_path / name, tmp=tmp_path)
        assert done.returncode == 1 and done.stdout == "" and "LZMAError" in done.stderr


# ---- the packer -----------------------------------------------------------------------------------------------------


def test_same_input_same_bytes(packed, tmp_path):
    command_line = [sys.executable, REPO / "tools/submit.py", "pack", "--out", tmp_path / "again.py"]
    done = good(subprocess.run(list(map(str, command_line)), env=clean_env({"PYTHONHASHSEED": "3"}), text=True, cwd=tmp_path,
                               capture_output=True, timeout=60, check=False))
    assert (tmp_path / "again.py").read_bytes() == packed.read_bytes()
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [words[0] for words in lines] == ["minified", "packed", "packed", "written"]
    values = [dict(word.split(":", 1) for word in words[1:]) for words in lines]
    assert int(values[0]["raw_bytes"]) == SCRIPT.stat().st_size
    assert int(values[3]["bytes"]) == packed.stat().st_size == int(values[0]["raw_bytes"]) - int(values[3]["saved_bytes"])
    assert values[3]["sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()
    assert list(tmp_path.iterdir()) == [tmp_path / "again.py"]


@pytest.mark.parametrize("data", [b"", b"a", bytes(range(256)), bytes(range(256)) * 99, random.Random(3).randbytes(50_000)])
def test_any_bytes_survive_as_a_comment(data):
    packed, undo = packer.as_comment(data)
    assert not set(packed) & {0, 10, 13} and eval(undo, {"packed": packed}) == data
    assert len(packed) <= len(data) * 85 / 84 + 1


def test_brotli_is_chosen_where_it_pays(tmp_path, capsys, monkeypatch):
    for limit, chosen in ((0, "brotli"), (10**6, "lzma")):
        monkeypatch.setattr(packer, "WORTH_AN_IMPORT", limit)
        pack(REPO / "tools/common.py", tmp_path / "x.py")
        sizes = [int(line.rpartition("packed_bytes:")[2]) for line in capsys.readouterr().out.splitlines()[1:3]]
        assert (tmp_path / "x.py").stat().st_size == sizes[chosen == "brotli"]


def test_every_supported_python_reads_the_f_strings():
    """Quotes of an f-string are not used again inside it, which Python reads only since 3.12."""
    source = 'def f(values):\n    return f"{chr(10)}{values[\'a\']} {\', \'.join(values)}"\n'
    line = packer.minified(source.encode(), "f.py").decode().partition("return f")[2]
    assert line.count(line[0]) == 2


BAD = {
    "no such script": (lambda f: ["--script", f / "none.py"], "none.py: cannot be read"),
    "a folder": (lambda f: ["--script", f], "cannot be read"),
    "not UTF-8": (lambda f: ["--script", put(f / "latin.py", b"x = '\xe9'\n")], "not UTF-8"),
    "syntax error": (lambda f: ["--script", put(f / "bad.py", b"x = 1\nx = (\n")], "bad.py:2: not Python"),
    "a NUL": (lambda f: ["--script", put(f / "nul.py", b"x = 1\0\n")], "not Python"),
    "packed already": (lambda f: ["--script", pack(put(f / "s.py", b"x = 1\n"), f / "p.py", "--text")], "packed already"),
    "onto itself": (lambda f: ["--script", (s := put(f / "s.py", b"x = 1\n")), "--out", s], "is the script itself"),
    "settings that are none": (lambda f: ["--settings", f / "none.env"], "none.env: cannot be read"),
    "settings of another script": (lambda f: ["--script", put(f / "s.py", b"x = 1\n"), "--settings", put(f / "s.env", b"SEED=1")],
                                   "has no PRESET"),
    "nothing to cut down to": (lambda f: ["--specialise"], "--specialise needs the --settings"),
    "other suffix": (lambda f: ["--script", put(f / "s.py", b"x = 1\n"), "--out", f / "s.txt"], "must end in .py"),
    "no folder": (lambda f: ["--script", (s := put(f / "s.py", b"x = 1\n")), "--out", s / "o.py"], "cannot be written"),
}


def put(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path, capsys):
    make, expected = BAD[case]
    args = [str(word) for word in make(tmp_path)]
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    out = [] if "--out" in args else ["--out", str(tmp_path / "out.py")]
    assert submit.main(["pack", *args, *out]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and expected in said
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("module, expected", [("python_minifier", "requirements-dev.txt"), ("brotli", "requirements.txt")])
def test_missing_package_is_named(module, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "python_minifier":
        monkeypatch.setattr(packer, "minified", packer.minified.__wrapped__)
    assert submit.main(["pack", "--out", str(tmp_path / "out.py")]) == 2
    said = capsys.readouterr().err
    assert module.replace("_", "-") in said and f"pip install -r {expected}" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(tmp_path, capsys, monkeypatch):
    out = put(tmp_path / "out.py", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert submit.main(["pack", "--script", str(put(tmp_path / "s.py", b"x = 1\n")), "--out", str(out)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert out.read_bytes() == b"old" and sorted(path.name for path in tmp_path.iterdir()) == ["out.py", "s.py"]


@pytest.mark.parametrize("argv", [[], ["pak"]])
def test_unknown_command_names_those_there_are(argv, capsys):
    assert submit.main(argv) == 2
    assert "there is: specialise, pack, folder, check, stats, verify" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as console:
        done = subprocess.run([sys.executable, REPO / "tools/submit.py", "--help"], env=clean_env(), stdout=console,
                              stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
