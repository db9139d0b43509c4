"""What the READMEs tell a reader to type: each command is read by the parser of what it calls, and each setting is one.

Commands are the lines of code blocks without a language, and inline code that begins with a program. In a block that
has a line `$ ...`, only such lines are commands; output and diffs have a language (```text, ```diff). A command of a kind
that is not known here fails: add it to PROGRAMS, or its script to SCRIPTS.
"""

import argparse
import functools
import importlib
import io
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from typing import NamedTuple

import fuzzing
import killing
import pytest
from process import REPO, clean_env
from torch.distributed.run import get_args_parser as torchrun_parser

import bench
import common
import fineweb
import launch
import prepare
import shrink
import submit
import sweep
from train_gpt import BadInput, Settings, parse_value

DOCUMENTS = sorted({*REPO.glob("*.md"), *REPO.glob("data/*.md"), *REPO.glob("tools/*.md"), *REPO.glob("records/**/*.md")})
FIELDS = {f.name.upper(): f for f in fields(Settings)}
RECORD = "records/track_10min_16mb/2026-05-01_SP8192_PR2130Base_Calib32"

# Words that stand for the reader's own, and one that he could write.
PLACEHOLDERS = {
    "FOLDER": RECORD, "RECORD": RECORD, "@RECORD_FOLDER": f"@{RECORD}", "@FILE": "@records/small.env",
    "SETTINGS": "@records/small.env", "PLAN": "LEAKY_SLOPE=0,0.5", "KEY=VALUE": "SEED=7",
    "@settings.env": f"@{RECORD}/settings.env",  # copied to a submission's folder
    "--node_rank=R": "--node_rank=0",
}
# Not settings of the trainer: variables of run.sh and of what it calls, and settings of published scripts.
VARIABLES = {"NPROC", "VENV", "PYTHON", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
             "CUDA_VISIBLE_DEVICES"}
PUBLISHED = {"SMEAR_GATE_BOS_FIX"}


class Wrong(Exception):
    """What a command or a setting in a README should be instead."""


# ---- find them ------------------------------------------------------------------------------------------------------


class Code(NamedTuple):
    """A piece of code in a document."""

    line: int
    text: str
    is_command: bool  # of a code block, whatever its first word


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def pieces(document):
    """Every line of its code blocks and every inline code."""
    found = []
    for block in FENCE.finditer(document):
        begin = document.count("\n", 0, block.start(2)) + 1
        if not block[1]:
            found += [Code(begin + offset, text, True) for offset, text in commands_of(block[2])]
    prose = FENCE.sub(lambda block: "\n" * block[0].count("\n"), document)
    for code in INLINE.finditer(prose):
        text = " ".join(code[1].replace("\\|", "|").split())
        found.append(Code(prose.count("\n", 0, code.start()) + 1, text, False))
    return found


def commands_of(block):
    """[(offset, command)] of a block: lines that end in a backslash go on in the next one."""
    lines = block.splitlines()
    prompted = any(line.startswith("$ ") for line in lines)
    found = []
    begin, text = 0, ""
    for offset, line in enumerate(lines):
        if not text:
            begin = offset
        text += line.removesuffix("\\")
        if not line.endswith("\\"):
            is_command = text.startswith("$ ") if prompted else text.strip()
            if is_command and not text.startswith("#"):
                found.append((begin, text.removeprefix("$ ")))
            text = ""
    return found


def problems(document):
    """One line for each command or setting that is none."""
    found = []
    for code in pieces(document):
        try:
            check(code)
        except (Wrong, BadInput, common.BadInput) as error:
            found += [f"line {code.line}: `{code.text}`: {line}" for line in str(error).splitlines()]
    return found


# ---- check one ------------------------------------------------------------------------------------------------------


def check(code):
    try:
        words = shlex.split(code.text, comments=code.is_command)
    except ValueError:  # an apostrophe in inline code
        words = code.text.split()
    if code.is_command:
        for command in split_at(words, "&&"):
            run(command)
    elif begins_with_program(words) and words[0].endswith(".py"):
        mention(words)
    elif begins_with_program(words):
        run(words)
    else:
        check_settings(words)


def mention(words):
    """`bench.py pack` in a text about it: all that may be missing is what the reader would add."""
    try:
        run(words)
    except (Wrong, common.BadInput) as error:
        if not re.search(r"expected (one|at least one) argument|is missing|are required|is required", str(error)):
            raise


def split_at(words, separator):
    """The words before, between and after the separators."""
    parts = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def is_assignment(word):
    return re.match(r"[A-Z][A-Z0-9_]*=", word) is not None


def program_of(word):
    """python of .venv/bin/python."""
    return re.sub(r"^(REPO/)?\.venv/bin/", "", word)


def begins_with_program(words):
    """Is inline code a command? A name alone, such as `python` or `tools/sweep.py`, only speaks of it."""
    words = [word for word in words if not is_assignment(word)]
    if len(words) < 2:
        return False
    return program_of(words[0]) in PROGRAMS or words[0].endswith((".py", ".sh"))


def check_settings(words):
    """NAME=VALUE in inline code: the name of a setting, and a value that it takes where it is a whole one."""
    for word in words:
        if not is_assignment(word):
            continue
        name, _, value = word.partition("=")
        if name in VARIABLES | PUBLISHED or word in PLACEHOLDERS:
            continue
        if name not in FIELDS:
            raise Wrong(f"{name} is no setting")
        for choice in value.split("|"):
            if choice and "..." not in choice and not choice.isupper():
                try:
                    parse_value(FIELDS[name], choice)
                except ValueError as error:
                    raise Wrong(f"{name}={choice}: {error}") from None


def run(words):
    """Read a command as the program would that it calls."""
    words = [PLACEHOLDERS.get(word.strip("[]"), word.strip("[]")) for word in words if word != "..."]
    while words and is_assignment(words[0]):  # of the environment
        check_settings([words.pop(0)])
    if not words:
        raise Wrong("no program")
    program = program_of(words[0])
    if program.endswith(".py"):
        script(program, words[1:])
    elif program in PROGRAMS:
        PROGRAMS[program](words[1:])
    else:
        raise Wrong(f"{program} is no program that a README may call (PROGRAMS in tests/test_readme.py)")


def run_python(words):
    if words[0] == "-m":
        if words[1] not in ("ruff", "pytest"):
            raise Wrong(f"python -m {words[1]}")
    else:
        script(words[0], words[1:])


def run_torchrun(words):
    args = parsed(torchrun_parser().parse_args, words)
    script(args.training_script, args.training_script_args)


def run_pip(words):
    if words[:1] != ["install"]:
        raise Wrong("pip install")
    if words[1] == "-r":
        exists(words[2])
    elif words[1] not in (REPO / "requirements-dev.txt").read_text():
        raise Wrong(f"{words[1]} is not in requirements-dev.txt")


def run_cp(words):
    for word in words[:-1]:
        exists(word)


def run_bash(words):
    if words[:1] != ["run.sh"]:
        raise Wrong("bash calls run.sh")
    words = words[1:]
    if words[:1] == ["test"]:
        for word in words[1:]:
            if word.startswith("tests/"):
                exists(word)
    elif words not in (["setup"], ["help"]):
        launched = [word if is_assignment(word) or word == "--small" else f"@{settings_of(word)}" for word in words]
        silently(launch.main, launched, {})


def run_ci(words):
    if words:
        raise Wrong(".ci/run takes no arguments")
    exists(".ci/run")


def run_activate(words):
    if words != [".venv/bin/activate"]:
        raise Wrong(". .venv/bin/activate")


PROGRAMS = {"bash": run_bash, "python": run_python, "torchrun": run_torchrun, "pip": run_pip, "cp": run_cp,
            ".ci/run": run_ci, ".": run_activate}


def settings_of(word):
    """The settings file or record that run.sh finds by this word."""
    for place in (word, *REPO.glob(f"records/*/{word}"), f"records/{word}", f"records/{word}.env"):
        if (REPO / place).exists():
            return REPO / place
    raise Wrong(f"there is no settings file or record {word}")


MADE = {"logs/packed/train_gpt.py"}  # by the command before it


def exists(path):
    if path not in MADE and not (REPO / path).exists():
        raise Wrong(f"there is no {path}")


# ---- the scripts ----------------------------------------------------------------------------------------------------


def script(path, words):
    """A script with these arguments."""
    name = "train_gpt.py" if path in MADE else path
    if not name.startswith(("tools/", "data/", "tests/", ".ci/")) and (REPO / "tools" / name).exists():
        name = f"tools/{name}"  # `bench.py pack` in a text about it
    exists(name)
    if name not in SCRIPTS:
        raise Wrong(f"{name} is no script that a README may call (SCRIPTS in tests/test_readme.py)")
    if "--help" in words:
        run_help(name, *words)
    else:
        SCRIPTS[name](words)


@functools.cache
def run_help(name, *words):
    done = subprocess.run([sys.executable, name, *words], cwd=REPO, env=clean_env(), stdin=subprocess.DEVNULL, timeout=60,
                          capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        raise Wrong(f"{name} {shlex.join(words)}: exit code {done.returncode}: {done.stderr}")


def trainer(words):
    s = Settings.parse(words)
    if s.phases == "eval" and not any(word.startswith(("@", "DATA_PATH=")) for word in words):
        raise Wrong("an artifact does not say with which text it is scored: give @FILE or DATA_PATH")


def tool(name):
    """A tool with a function arguments(): of its own module."""
    def read(words):
        parsed(importlib.import_module(name).arguments, words)

    return read


def with_parser(module):
    """A script of data/, whose module has a function parser()."""
    return lambda words: parsed(module.parser().parse_args, words)


def run_submit(words):
    if words[:1] and words[0] not in submit.COMMANDS:
        raise Wrong(f"submit.py has no command {words[0]}")
    if words:  # a name alone speaks of all of them
        parsed(importlib.import_module(f"submission.{words[0]}").arguments, words[1:])


def run_bench(words):
    if words[0] not in bench.COMMANDS:
        raise Wrong(f"bench.py has no command {words[0]}")
    parsed(importlib.import_module(f"benchmarks.{bench.COMMANDS[words[0]]}").arguments, words[1:])
    Settings.parse([word for word in words if word.startswith("@") or is_assignment(word)])


def run_sweep(words):
    """The plan as well, for any data set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweeps.plan.files_of", lambda settings: ([], []))
        sweep.make_plan(parsed(sweep.arguments, words), {})


def run_launch(words):
    silently(launch.main, words, {})


SCRIPTS = {
    "train_gpt.py": trainer,
    "tools/report.py": tool("report"),
    "tools/records.py": tool("records"),
    "tools/sweep.py": run_sweep,
    "tools/bench.py": run_bench,
    "tools/submit.py": run_submit,
    "tools/shrink.py": shrink.sizes,
    "tools/launch.py": run_launch,
    "data/prepare.py": with_parser(prepare),
    "data/fineweb.py": with_parser(fineweb),
    "tests/help/killing.py": lambda words: parsed(killing.arguments, words),
    "tests/help/fuzzing.py": lambda words: parsed(fuzzing.arguments, words),
}


def parsed(parse, words):
    """What an argument parser makes of the words. Shortened options are wrong here, and what it complains of."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(errors):
        patch.setattr(argparse.ArgumentParser, "_get_option_tuples", lambda self, option: [])
        try:
            return parse(words)
        except SystemExit:
            raise Wrong(errors.getvalue().strip().splitlines()[-1]) from None


def silently(work, *args):
    """Call what prints for a shell."""
    with redirect_stdout(io.TextIOWrapper(io.BytesIO())):
        return work(*args)


# ---- the tests ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def at_the_repository():
    """Relative paths in a command start there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        yield


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(REPO).as_posix())
def test_every_command_is_one(path):
    found = problems(path.read_text(encoding="utf-8"))
    assert not found, f"{path.relative_to(REPO)}\n" + "\n".join(found)


def test_commands_are_found():
    """In code blocks, tables and sentences, over the end of a line."""
    counts = {path.relative_to(REPO).as_posix(): sum(code.is_command or begins_with_program(code.text.split())
              for code in pieces(path.read_text())) for path in DOCUMENTS}
    assert counts["README.md"] > 30 and counts["tools/README.md"] > 12 and counts["data/README.md"] > 12
    assert all(count >= 5 for name, count in counts.items() if re.match("records/track", name))
    document = "a `bash\nrun.sh` b\n\n```\n# none\n$ one \\\n  two # three\nout\n```\n\n```text\nno\n```\n| `x\\|y` |\n"
    assert [tuple(code) for code in pieces(document)] == [
        (6, "one   two # three", True), (1, "bash run.sh", False), (14, "x|y", False)]


@pytest.mark.parametrize("right, wrong, said", [
    ("SEED=7", "SEDE=7", "did you mean SEED"),
    ("SEED=42", "SEED=many", "SEED=many"),
    ("RESUME=auto", "RESUM=auto", "RESUM"),
    ("--plot curve.svg", "--plott curve.svg", "--plott"),
    ("--plot curve.svg", "--pl curve.svg", "--pl"),
    ("tools/bench.py train", "tools/bench.py trian", "trian"),
    ("tools/bench.py train", "tools/banch.py train", "banch.py"),
    ("--vocab-size 1024", "--vocabulary 1024", "--vocabulary"),
    ("--train-shards 80", "--train-shards eighty", "eighty"),
    ("'MATRIX_LR=0.02,0.03'", "'MATRX_LR=0.02,0.03'", "MATRX_LR"),
    ("--nnodes=2", "--nodez=2", "--nodez"),
    ("bash run.sh records/small.env", "bash run.sh records/smal.env", "records/smal.env"),
    ("bash run.sh setup\n", "sh run.sh setup\n", "sh is no program"),
    ("install -r requirements-dev.txt", "install -r requirements-test.txt", "requirements-test.txt"),
    ("--against 2135 --date", "--agains 2135 --date", "--agains"),
    ("bash run.sh test tests/gpu", "bash run.sh test tests/cpu", "tests/cpu"),
    ("PHASES=eval ARTIFACT", "PHASES=evaluate ARTIFACT", "PHASES=evaluate"),
    ("EVAL_CONTEXT=cache", "EVAL_CONTEXT=cash", "EVAL_CONTEXT=cash"),
    ("tools/submit.py pack", "tools/submit.py pakc", "pakc"),
    ("`FIT=allocate` gives", "`FITS=allocate` gives", "FITS is no setting"),
])
def test_a_mistake_in_the_readme_is_found(right, wrong, said):
    text = (REPO / "README.md").read_text()
    assert right in text
    found = problems(text.replace(right, wrong))
    assert found and all(said in line for line in found), found


def test_an_artifact_is_scored_with_a_text():
    assert "DATA_PATH" in problems("`python train_gpt.py PHASES=eval ARTIFACT=logs/RUN/model.pg`")[0]


def test_what_is_not_known_here_fails():
    assert "no program" in problems("```\nmake all\n```")[0]
    assert "no script" in problems("```\npython tests/conftest.py\n```")[0]
    assert "there is no tools/nothing.py" in problems("`python tools/nothing.py --all`")[0]
    assert "no command" in problems("`bench.py pock`")[0] and not problems("`bench.py pack` and `data/prepare.py --check`")


def test_the_readme_says_of_each_technique_what_the_setting_says():
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.+?) \| `([\w.]+)` \| (.+?) \|$", (REPO / "README.md").read_text(), re.M)
    assert len(rows) > 40
    for setting, sentence, code, effect in rows:
        about = FIELDS[setting].metadata
        expected = (about["doc"].replace("|", "\\|"), about["code"])
        assert (sentence, code) == expected, f"README.md says of {setting}: {sentence} ({code}); write {expected}"
        assert effect


def test_links_lead_somewhere():
    """Those to files of the repository; the tables and texts link each other."""
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", FENCE.sub("", path.read_text())):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.relative_to(REPO)}: {target}"
