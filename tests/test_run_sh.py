"""run.sh with stand-ins for trainer, data and pip, so that nothing is downloaded; a few tests have the real trainer."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from process import REPO, clean_env
from runs import heard

import launch
from common import BadInput

# Reads settings as train_gpt.py does, without its checks. Run as a script, it records how it was called, then does what
# BEHAVE says; it handles signals as train_gpt.py does.
TRAINER = """
import json, os, pathlib, shlex, signal, sys, time


class BadInput(Exception):
    pass


class Stopped(Exception):
    pass


class Settings:
    def __init__(self, **values):
        self.device = "auto"
        self.model_dim = 512
        self.data_path = "data/datasets/fineweb10B_sp1024"
        self.out_dir = ""
        self.run_id = ""
        vars(self).update(values)
        self.model_dim = int(self.model_dim)

    @classmethod
    def parse(cls, args, env):
        files = [pathlib.Path(arg[1:]) for arg in args if arg.startswith("@")]
        files = [file / "settings.env" if file.is_dir() else file for file in files]
        texts = [os.fsdecode(file.read_text(encoding="utf-8").encode()) for file in files]
        pairs = [word for text in texts for word in shlex.split(text, comments=True)]
        pairs += [f"{name}={env[name]}" for name in ("DEVICE", "MODEL_DIM", "DATA_PATH", "OUT_DIR", "RUN_ID") if name in env]
        pairs += [arg for arg in args if not arg.startswith("@")]
        values = dict(pair.split("=", 1) for pair in pairs)
        if "BAD" in values:
            raise BadInput("BAD is no setting\\nand a second complaint")
        return cls(**{name.lower(): value for name, value in values.items()})


def main():
    settings = Settings.parse(sys.argv[1:], os.environ)
    out = pathlib.Path(settings.out_dir or "logs/" + (settings.run_id or "none"))
    out.mkdir(parents=True, exist_ok=True)
    caught = []
    signal.signal(signal.SIGINT, lambda n, f: caught.append(n))
    signal.signal(signal.SIGTERM, lambda n, f: caught.append(n))
    argv = [os.fsencode(arg).decode("latin-1") for arg in sys.argv[1:]] if "LATIN" in os.environ else sys.argv[1:]
    event = {"event": "run", "argv": argv, "pid": os.getpid(), "rank": os.environ.get("RANK"), "cwd": os.getcwd()}
    (out / "metrics.jsonl").write_text(json.dumps(event) + "\\n")
    what, _, value = os.environ.get("BEHAVE", "exit:0").partition(":")
    print("trainer up", flush=True)
    if what == "exit":
        sys.exit(int(value))
    end = time.time() + 20
    while time.time() < end and (not caught or what == "stubborn"):
        time.sleep(0.02)
    time.sleep(0.2)
    (out / "caught").write_text(json.dumps(caught))
    print("checkpoint saved", flush=True)
    sys.exit(128 + caught[0])


if __name__ == "__main__":
    main()
"""
PREPARE = """
import os, pathlib, sys
with open("prepared.txt", "a") as calls:
    print(*sys.argv[1:], file=calls)
print("the proof", flush=True)
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
folder.mkdir(parents=True, exist_ok=True)
if "PREPARE_FAILS" in os.environ:
    print("FAILED: the proof does not hold", flush=True)
    sys.exit(1)
(folder / "manifest.json").write_text("{}")
"""
REPORT = "import sys; print('report', *sys.argv[1:], flush=True)"
SHRINK = """
def sizes(args, env):
    data = "data/datasets/builtin_sp1024_caseops" if "CASEOPS=1" in args else "data/datasets/builtin_sp1024"
    return {"MODEL_DIM": 64, "DATA_PATH": data, "OF": "+".join(args)}"""
TORCH = {  # a torch that sees as many GPUs as the variable GPUS says, and a torchrun that tells its arguments
    "torch/__init__.py": "from torch import cuda",
    "torch/cuda.py": """
import os
device_count = lambda: int(os.environ['GPUS'])
is_available = lambda: device_count() > 0""",
    "torch/distributed/__init__.py": "",
    "torch/distributed/run.py": """
import os, sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
def main():
    print("torchrun", *sys.argv[1:], "OMP_NUM_THREADS=" + os.environ["OMP_NUM_THREADS"], flush=True)
    if "FAILS" in os.environ:
        raise ChildFailedError(int(os.environ["FAILS"]))""",
    "torch/distributed/elastic/__init__.py": "",
    "torch/distributed/elastic/multiprocessing/__init__.py": "",
    "torch/distributed/elastic/multiprocessing/api.py": "class SignalException(Exception): pass",
    "torch/distributed/elastic/multiprocessing/errors.py": """
import types
class ChildFailedError(Exception):
    def __init__(self, code): super().__init__("the table of torchrun"); self.code = code
    def get_first_failure(self): return 0, types.SimpleNamespace(exitcode=self.code)""",
}


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def tree(tmp_path):
    """A repository with the real run.sh and small.env around stand-ins."""
    root = tmp_path / "my repository"  # the space is meant
    (root / "records/track_a/2026-01-02_fast").mkdir(parents=True)
    shutil.copy(REPO / "run.sh", root)
    shutil.copy(REPO / "records/small.env", root / "records")
    (root / "records/track_a/2026-01-02_fast/settings.env").write_text("SEED=3 MODEL_DIM=64\nDATA_PATH=/other\n")
    (root / "requirements.txt").write_text("# nothing\n")
    (root / "requirements-dev.txt").write_text("-r requirements.txt\n")
    for tool in ("launch.py", "common.py"):
        script(root / "tools" / tool, (REPO / "tools" / tool).read_text())
    for name, text in (("train_gpt.py", TRAINER), ("data/prepare.py", PREPARE), ("tools/report.py", REPORT),
                       ("tools/shrink.py", SHRINK)):
        script(root / name, text)
    return root


def variables(**more):
    return clean_env({"VENV": sys.prefix, "PATH": os.environ["PATH"], **more})


def bash(tree, *args, cwd=None, **env):
    return subprocess.run(["bash", str(tree / "run.sh"), *args], cwd=cwd or tree, env=variables(**env), timeout=60,
                          text=True, stdin=subprocess.DEVNULL, capture_output=True, check=False)


def called(tree):
    """What the only run was given."""
    (metrics,) = [*tree.glob("logs/*/metrics.jsonl"), *tree.glob("elsewhere/metrics.jsonl")]
    return json.loads(metrics.read_text())


def prepared(tree):
    """The arguments of each call of data/prepare.py."""
    calls = tree / "prepared.txt"
    return calls.read_text().splitlines() if calls.exists() else []


EMBEDDED = "--source builtin --out data/datasets/builtin_sp1024"


def one_error(done, *words):
    """One line on stderr that begins with error: and has these words; exit code 2."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0]
    return lines[0]


# ---- what is run ----------------------------------------------------------------------------------------------------


def test_help(tree):
    for word in ("help", "-h", "--help"):
        done = bash(tree, word)
        assert done.returncode == 0
        assert all(what in done.stdout for what in ("setup", "test", "--small", "KEY=VALUE", "PYTHON"))
    assert not (tree / "logs").exists()


def test_default_on_a_cpu(tree):
    done = bash(tree, "SEED=7", "NOTE=two words; $HOME")
    assert done.returncode == 0, done.stderr
    argv = called(tree)["argv"]
    assert argv[:3] == ["@records/small.env", "SEED=7", "NOTE=two words; $HOME"]
    run_id = argv[3].removeprefix("RUN_ID=")
    assert run_id.endswith("-small") and argv[4:] == []
    assert prepared(tree) == [EMBEDDED] and "small model" in done.stdout
    assert done.stdout.splitlines()[-1] == f"report logs/{run_id}"


@pytest.mark.parametrize("code", [0, 1, 3, 4])
def test_exit_code_is_that_of_the_trainer(tree, code):
    done = bash(tree, BEHAVE=f"exit:{code}")
    assert done.returncode == code and "report logs/" in done.stdout


def test_no_report_where_nothing_ran(tree):
    done = bash(tree, BEHAVE="exit:2")
    assert done.returncode == 2 and "report" not in done.stdout


def test_a_trainer_that_makes_nothing_leaves_no_empty_folder(tree):
    script(tree / "train_gpt.py", TRAINER.replace("def main():", "def main():\n    sys.exit(2)"))
    assert bash(tree).returncode == 2 and not list((tree / "logs").iterdir())


@pytest.mark.parametrize("record", [
    "records/track_a/2026-01-02_fast", "records/track_a/2026-01-02_fast/", "2026-01-02_fast",
    "records/track_a/2026-01-02_fast/settings.env", "@records/track_a/2026-01-02_fast"])
def test_a_record(tree, record):
    assert bash(tree, record, "SEED=9").returncode == 0
    argv = called(tree)["argv"]
    assert len(argv) == 3 and argv[0].startswith("@") and "2026-01-02_fast" in argv[0] and argv[1] == "SEED=9"
    assert argv[2].endswith("-2026-01-02_fast")


def test_small_lays_sizes_between_the_record_and_the_command(tree):
    done = bash(tree, "--small", "2026-01-02_fast", "SEED=9")
    argv = called(tree)["argv"]
    assert argv[0].startswith("@records/track_a")
    assert argv[1:5] == ["MODEL_DIM=64", "DATA_PATH=data/datasets/builtin_sp1024", f"OF={argv[0]}+SEED=9", "SEED=9"]
    assert argv[5].endswith("-2026-01-02_fast-small") and len(argv) == 6
    assert done.returncode == 0 and prepared(tree) == [EMBEDDED]


def test_small_makes_the_data_that_the_record_needs(tree):
    bash(tree, "--small", "2026-01-02_fast", "CASEOPS=1")
    assert prepared(tree) == [f"{EMBEDDED}_caseops --caseops"]
    bash(tree, "--small", "2026-01-02_fast", "DATA_PATH=/mine")
    assert len(prepared(tree)) == 1


@pytest.mark.parametrize("words", [(), ("--small",), ("2026-01-02_fast",), ("2026-01-02_fast", "--small")])
def test_wrong_settings_are_refused_before_anything_is_made(tree, words):
    done = bash(tree, *words, "BAD=1")
    assert done.returncode == 2 and "training" not in done.stdout
    assert done.stderr.splitlines() == ["error: BAD is no setting", "error: and a second complaint"]
    assert not (tree / "logs").exists() and not prepared(tree)


def test_small_without_a_record_is_the_demo(tree):
    done = bash(tree, "--small", "SEED=9")
    argv = called(tree)["argv"]
    assert argv[:2] == ["@records/small.env", "SEED=9"] and argv[2].endswith("-small") and len(argv) == 3
    assert done.returncode == 0 and prepared(tree) == [EMBEDDED]


def test_full_size_on_a_cpu_is_said(tree):
    (tree / "big.env").write_text("SEED=1")
    assert "too slow for a CPU" in bash(tree, "big.env").stdout
    assert "too slow" not in bash(tree, "2026-01-02_fast").stdout


def test_settings_file_of_another_folder(tree, tmp_path):
    (tmp_path / "mine.env").write_text(
        "# DATA_PATH=no\nX_DATA_PATH=no A=1 DATA_PATH=data/datasets/builtin_sp1024 # a note\n")
    done = bash(tree, "mine.env", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = called(tree)
    assert run["argv"][0] == f"@{tmp_path}/mine.env" and os.path.samefile(run["cwd"], tree)
    assert prepared(tree) == [EMBEDDED]  # these settings, too, name the embedded data


def test_embedded_data_is_made_only_where_it_is_used(tree):
    bash(tree, "DATA_PATH=/mine")
    bash(tree, DATA_PATH="/mine")
    bash(tree, "2026-01-02_fast")
    assert not prepared(tree)
    bash(tree, "2026-01-02_fast", "DATA_PATH=data/datasets/builtin_sp1024")
    assert prepared(tree) == [EMBEDDED]
    bash(tree, "2026-01-02_fast", "DATA_PATH=data/datasets/builtin_sp512")  # that of the proxy
    assert prepared(tree)[1:] == ["--source builtin --out data/datasets/builtin_sp512 --vocab-size 512"]


def test_the_proof_of_the_data_is_a_line_that_names_its_log(tree):
    done = bash(tree, "setup")
    log = "data/datasets/builtin_sp1024.log"
    assert log in done.stdout and "the proof" not in done.stdout
    assert (tree / log).read_text() == "the proof\n"
    assert "the proof" in bash(tree, "setup").stdout  # of a set that is there prepare.py says one line
    assert (tree / log).read_text() == "the proof\n"


def test_a_proof_that_fails_is_shown_with_all_its_lines(tree):
    done = bash(tree, "setup", PREPARE_FAILS="1")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["the proof", "FAILED: the proof does not hold",
                                        "error: no embedded data set: see above"]


def test_names_of_runs(tree):
    assert "report elsewhere" in bash(tree, "OUT_DIR=elsewhere").stdout
    assert not any(arg.startswith("RUN_ID") for arg in called(tree)["argv"])
    shutil.rmtree(tree / "elsewhere")
    assert "report logs/mine" in bash(tree, "RUN_ID=mine").stdout


def test_a_path_that_is_not_utf8_reaches_the_trainer(tree):
    done = subprocess.run([b"bash", b"run.sh", b"OUT_DIR=elsewhere", b"DATA_PATH=/mine/\xe9", "NOTE=\u00e9".encode()],
                          cwd=tree, env=variables(LATIN="1"), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert called(tree)["argv"][1:] == ["OUT_DIR=elsewhere", "DATA_PATH=/mine/\xe9", "NOTE=\xc3\xa9"]
    shutil.rmtree(tree / "elsewhere")
    done = subprocess.run([b"bash", b"run.sh", b"OUT_DIR=\xe9"], cwd=tree, env=variables(), capture_output=True,
                          timeout=60, check=False)
    assert b"results in \xe9\n" in done.stdout
    assert os.path.exists(os.fsencode(tree) + b"/\xe9/metrics.jsonl")


def test_settings_files_are_read_as_the_trainer_reads_them(tree):
    """Quotes, escapes, comments: the run ends with the table of the folder that the trainer used."""
    spellings = {'SEED=1 OUT_DIR="logs/x y"  # here': "logs/x y",
                 "# OUT_DIR=no\n'OUT_DIR=logs/#1 é' A=2": "logs/#1 é",
                 "NOTE=' OUT_DIR=no' OUT_DIR=logs/back\\ slash": "logs/back slash"}
    for text, folder in spellings.items():
        (tree / "mine.env").write_text(text)
        done = bash(tree, "mine.env")
        assert done.returncode == 0, done.stderr
        assert (tree / folder / "metrics.jsonl").exists() and f"results in {folder}\n" in done.stdout
        assert done.stdout.splitlines()[-1] == f"report {folder}"


def test_small_sizes_may_hold_spaces(tree):
    script(tree / "tools/shrink.py", "def sizes(args, env): return {'NOTE': 'two words *'}")
    assert bash(tree, "--small", "2026-01-02_fast", "SEED=9").returncode == 0
    assert called(tree)["argv"][1:3] == ["NOTE=two words *", "SEED=9"]


def test_two_runs_in_one_second_have_two_names(tree):
    script(tree / "bin/date", "#!/bin/sh\necho 20260102-030405\n")
    for _ in range(2):
        assert bash(tree, PATH=f"{tree}/bin:{os.environ['PATH']}").returncode == 0
    assert sorted(p.name for p in (tree / "logs").iterdir()) == ["20260102-030405-small", "20260102-030405-small+"]


def test_setup(tree):
    done = bash(tree, "setup")
    assert done.returncode == 0 and prepared(tree) == [EMBEDDED] and not (tree / "logs").exists()
    one_error(bash(tree, "setup", "now"), "setup takes no arguments")


def test_test_runs_pytest_with_its_arguments(tree):
    done = bash(tree, "test", "--version")
    assert done.returncode == 0 and "pytest" in done.stdout + done.stderr


@pytest.mark.parametrize("word, near", [("tset", "test"), ("--smal", "--small"), ("2026-01-02_fats", "2026-01-02_fast"),
                                        ("records/smal.env", "records/small.env"), ("qqqqqq", "is no command")])
def test_unknown_word(tree, word, near):
    one_error(bash(tree, word), word, near)


def test_folder_that_is_no_record(tree):
    one_error(bash(tree, "records"), "no settings.env")


# ---- what tools/launch.py answers, with the real trainer ------------------------------------------------------------


def answer(capfd, *words, **env):
    """{variable: word or list of words} of what run.sh evaluates."""
    assert launch.main([*map(str, words)], env) == 0
    lines = capfd.readouterr().out.splitlines()
    texts = dict(line.split("=", 1) for line in lines)
    lists = {name: shlex.split(text[1:-1]) for name, text in texts.items() if text.startswith("(")}
    return {name: "".join(shlex.split(text)) for name, text in texts.items()} | lists


def test_launch_has_the_precedence_of_the_trainer(tmp_path, capfd):
    file = tmp_path / "a run.env"
    file.write_text("DATA_PATH=/file RUN_ID='of the file' OUT_DIR=/file # OUT_DIR=/comment\n")
    found = answer(capfd, f"@{file}", "OUT_DIR=/arg", DATA_PATH="/env", OUT_DIR="/env", DEVICE="cpu")
    assert found["arguments"] == [f"@{file}", "OUT_DIR=/arg"] and found["name"] == "a run" and found["gpus"] == "0"
    assert (found["data_path"], found["run_id"], found["out_dir"]) == ("/env", "of the file", "/arg")


def test_launch_of_the_demo_takes_settings_that_only_fit_the_demo(capfd):
    """Four layers alone would contradict VE_LAYERS=9,10 of the defaults."""
    found = answer(capfd, "NUM_LAYERS=4", "DEVICE=cpu")
    assert found["arguments"] == ["@records/small.env", "NUM_LAYERS=4", "DEVICE=cpu"] and found["name"] == "small"
    assert found["data_path"] == launch.EMBEDDED


@pytest.mark.parametrize("words, complaints", [
    (("SED=7", "MODEL_DIM=x"), ("SEED", "MODEL_DIM=x")), (("RESUME=auto",), ("RESUME=auto needs the RUN_ID",)),
    (("@no.env",), ("@no.env: cannot be read",)), (("@no.env", "--small"), ("@no.env: cannot be read",))])
def test_launch_refuses_in_the_words_of_the_trainer(words, complaints):
    with pytest.raises(BadInput) as error:
        launch.main(list(words), {"DEVICE": "cpu"})
    lines = str(error.value).splitlines()
    assert len(lines) == len(complaints)
    assert all(complaint in line for complaint, line in zip(complaints, lines))


# ---- GPUs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(tree):
    """A function like bash(), on a machine with GPUs."""
    for name, text in TORCH.items():
        script(tree / "fake" / name, text)
    script(tree / "bin/nvidia-smi", "#!/bin/sh\necho GPU 0: H100\n")

    def run(count, *args, **env):
        path = f"{tree}/bin:{os.environ['PATH']}"
        return bash(tree, *args, GPUS=str(count), PYTHONPATH=f"{tree}/fake", PATH=path, **env)

    return run


def test_one_gpu_trains_the_defaults_on_embedded_data(tree, gpus):
    done = gpus(1, "SEED=7")
    assert done.returncode == 0, done.stderr
    assert called(tree)["argv"][:2] == ["DATA_PATH=data/datasets/builtin_sp1024", "SEED=7"]
    assert "FineWeb is not prepared" in done.stdout and "data/fineweb.py" in done.stdout
    assert prepared(tree) == [EMBEDDED]


def test_fineweb_is_used_where_it_is_there(tree, gpus):
    for split in ("train", "val"):
        script(tree / f"data/datasets/fineweb10B_sp1024/fineweb_{split}_000000.bin", "")
    assert gpus(1).returncode == 0
    assert called(tree)["argv"][0].startswith("RUN_ID=") and not prepared(tree)


def test_every_gpu_through_torchrun(tree, gpus):
    done = gpus(8, "DATA_PATH=/mine", "SEED=7", OMP_NUM_THREADS="3")
    line = next(line for line in done.stdout.splitlines() if line.startswith("torchrun"))
    assert line.startswith("torchrun --standalone --nproc_per_node=8 train_gpt.py DATA_PATH=/mine SEED=7 RUN_ID=")
    assert line.endswith("OMP_NUM_THREADS=3") and "8 GPU(s), 8 process(es)" in done.stdout
    assert "--nproc_per_node=4 " in gpus(8, "SEED=7", NPROC="4").stdout
    one_error(gpus(2, NPROC="4"), "NPROC=4", "2 GPU(s)")


@pytest.mark.parametrize("code, expected, table", [(3, 3, False), (1, 1, True), (-9, 137, True)])
def test_exit_code_through_torchrun(gpus, code, expected, table):
    done = gpus(2, FAILS=str(code))
    assert done.returncode == expected and ("the table of torchrun" in done.stderr) == table
    assert "Traceback" not in done.stderr


def test_gpu_that_torch_cannot_use_or_may_not(tree, gpus):
    done = gpus(0)
    assert "cannot use it" in done.stdout and called(tree)["argv"][0] == "@records/small.env"
    shutil.rmtree(tree / "logs")
    gpus(1, "DEVICE=cpu")
    assert called(tree)["argv"][:2] == ["@records/small.env", "DEVICE=cpu"]
    shutil.rmtree(tree / "logs")
    gpus(1, DEVICE="cpu")
    assert called(tree)["argv"][0] == "@records/small.env"
    shutil.rmtree(tree / "logs")
    gpus(1, "--small")
    assert called(tree)["argv"][0] == "@records/small.env"
    assert "no GPU(s), 1 process(es)" in gpus(8, "2026-01-02_fast", "DEVICE=cpu").stdout


# ---- the Python environment -----------------------------------------------------------------------------------------


def no_python(tree):
    """A PATH without any Python."""
    for tool in ("bash", "dirname", "ls", "cat", "date", "sed", "tail", "printenv", "basename", "rm"):
        script(tree / "bin" / tool, f'#!/bin/sh\nexec {shutil.which(tool)} "$@"\n')
    return str(tree / "bin")


def old_python(path, version="3.8"):
    return script(path, f"#!/bin/sh\ncase \"$2\" in *exit*) exit 1 ;; *print*) echo {version} ;; esac\n")


def test_no_python(tree):
    one_error(bash(tree, VENV="new", PATH=no_python(tree)), "no python3 found", "PYTHON=")


def test_old_python(tree):
    path = no_python(tree)
    old_python(tree / "bin/python3")
    one_error(bash(tree, VENV="new", PATH=path), "Python 3.8", "3.10 to 3.13")
    one_error(bash(tree, VENV="new", PYTHON=str(tree / "bin/python3")), "Python 3.8", "3.10 or newer")
    one_error(bash(tree, VENV="new", PYTHON="/no/such/python"), "not a Python that runs")


def test_a_python_that_is_too_new_is_passed_over(tree):
    path = no_python(tree)
    script(tree / "bin/python3", f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 14); $2"\n')
    one_error(bash(tree, VENV="new", PATH=path), "python3 is Python 3.14", "3.10 to 3.13", "PYTHON=")


def test_python_without_venv(tree):
    python = script(tree / "bin/python",
                    f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\nexec {sys.executable} "$@"\n')
    one_error(bash(tree, VENV="new", PYTHON=str(python)), "no venv module", "python3-venv")


def test_venv_that_is_something_else(tree):
    script(tree / "mine/thesis.txt", "years of work")
    one_error(bash(tree, VENV="mine"), "VENV=mine")
    assert (tree / "mine/thesis.txt").read_text() == "years of work"


def fake_environment(tree, pip):
    """An environment with all packages of this one, whose pip is a shell command."""
    script(tree / "env/pyvenv.cfg", "")
    script(tree / "env/bin/python",
           f'#!/bin/bash\nif [ "$1 $2" = "-m pip" ]; then {pip}; fi\nexec "{sys.executable}" "$@"\n')
    return "env"


def test_another_python_than_that_of_the_environment(tree):
    other = script(tree / "bin/other", '#!/bin/sh\ncase "$2" in *print*) echo 3.99 ;; esac\n')
    one_error(bash(tree, VENV=fake_environment(tree, "exit 1"), PYTHON=str(other)), "env has Python", "remove env")


def test_pip_fails(tree):
    (tree / "requirements.txt").write_text(
        'no-such-package==1.0\npytest==0.1; python_version < "3.10"  # never\n'
        'pytest==0.2; python_version >= "3.10" and (sys_platform == "plan9" or os_name == "none")\n')
    done = bash(tree, VENV=fake_environment(tree, 'echo "ERROR: no network" >&2; exit 1'))
    assert "installing no-such-package==1.0 (" in done.stdout  # and not pytest: its markers exclude it
    assert done.returncode == 2 and "Traceback" not in done.stderr
    first, second = done.stderr.splitlines()
    assert first == "ERROR: no network"
    assert second.startswith("error: pip could not install requirements.txt") and "env/pip.log" in second


def test_pip_ends_well_without_the_package(tree):
    (tree / "requirements.txt").write_text('pytest==0.1; python_version >= "3.10"\n')
    one_error(bash(tree, VENV=fake_environment(tree, "exit 0")), "still lacks pytest==0.1")


def test_environment_that_is_half_made_is_completed(tree):
    """An interrupted `python -m venv` leaves an environment without pip."""
    (tree / "requirements.txt").write_text("no-such-package==1.0\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tree / "half")], check=True)
    done = bash(tree, VENV="half", PIP_NO_INDEX="1")
    assert done.returncode == 2 and "No module named pip" not in done.stderr
    assert "no-such-package" in done.stderr.splitlines()[0] and (tree / "half/pip.log").exists()


def test_interrupted_pip_is_no_error_of_pip(tree):
    (tree / "requirements.txt").write_text("no-such-package==1.0\n")
    env = fake_environment(tree, "exec sleep 20")
    code, out = interrupt(tree, signal.SIGINT, "installing", VENV=env)
    assert code == 130 and "interrupted" in out and "error" not in out


def test_interrupted_between_two_steps_is_said(tree):
    """A signal that comes while run.sh looks for something itself, with no child to pass it to."""
    (tree / "requirements.txt").write_text("no-such-package==1.0\n")
    env = fake_environment(tree, "exit 1")
    python = tree / "env/bin/python"
    look = 'case "$2" in *\'version("pip")\'*) sleep 1 ;; esac\n'
    script(python, python.read_text().replace("#!/bin/bash\n", f"#!/bin/bash\n{look}"))
    code, out = interrupt(tree, signal.SIGINT, "installing", VENV=env)
    assert code == 130 and "interrupted" in out and "error" not in out


def test_new_environment(tree):
    """python -m venv for real (no package is needed, so no network); the second call finds everything there."""
    done = bash(tree, VENV="", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "making the Python environment .venv" in done.stdout and (tree / ".venv/bin/python").exists()
    begin = time.monotonic()
    done = bash(tree, VENV="")
    assert done.returncode == 0 and "making" not in done.stdout
    assert time.monotonic() - begin < 3  # the whole overhead of run.sh
    (tree / ".venv/bin/python").unlink()  # as after an upgrade of the system: made again
    assert "making" in bash(tree, VENV="", PYTHON=sys.executable).stdout


# ---- signals --------------------------------------------------------------------------------------------------------


def interrupt(tree, signals, wait_for="trainer up", group=False, **env):
    """Start run.sh, send signals once it printed `wait_for`: (exit code, all output)."""
    process = subprocess.Popen(["bash", str(tree / "run.sh"), "OUT_DIR=elsewhere"], cwd=tree, env=variables(**env),
                               text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True, preexec_fn=heard)
    try:
        lines = []
        while not lines or wait_for not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        time.sleep(0.1)
        for number in signals if isinstance(signals, tuple) else (signals,):
            (os.killpg if group else os.kill)(process.pid, number)
            time.sleep(0.1)
        out, _ = process.communicate(timeout=30)
        return process.returncode, "".join(lines) + out
    finally:
        process.kill()


def gone(tree):
    """Whether the trainer's process has ended."""
    try:
        os.kill(called(tree)["pid"], 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_trainer_once(tree, number, group):
    code, out = interrupt(tree, number, group=group, BEHAVE="wait")
    assert code == 128 + number and "Traceback" not in out
    assert json.loads((tree / "elsewhere/caught").read_text()) == [number]
    assert out.index("checkpoint saved") < out.index("report elsewhere")
    assert gone(tree)


def test_closed_terminal_is_sigterm(tree):
    code, _ = interrupt(tree, signal.SIGHUP, BEHAVE="wait")
    assert code == 143 and gone(tree)


def test_third_signal_kills(tree):
    code, out = interrupt(tree, (signal.SIGINT,) * 3, BEHAVE="stubborn")
    assert code == 137 and "Traceback" not in out and gone(tree)


def test_ctrl_c_on_a_terminal(tree):
    """The real thing: a terminal sends SIGINT to the foreground process group."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        heard()
        os.chdir(tree)
        os.execvpe("bash", ["bash", "run.sh", "OUT_DIR=elsewhere"], variables(BEHAVE="wait"))
    out = b""
    while b"report elsewhere" not in out:
        try:
            part = os.read(terminal, 1000)
        except OSError:  # the terminal is closed
            break
        if b"trainer up" in out + part and b"trainer up" not in out:
            os.write(terminal, b"\x03")
        out += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130, out
    assert json.loads((tree / "elsewhere/caught").read_text()) == [signal.SIGINT] and gone(tree)


def test_the_real_trainer_is_interrupted_cleanly(tree, toy):
    """SIGINT while training: a checkpoint, the table, exit code 130, nothing left running."""
    shutil.copy(REPO / "train_gpt.py", tree)
    shutil.copy(REPO / "data/caseops.py", tree / "data")
    shutil.copytree(REPO / "tools", tree / "tools", dirs_exist_ok=True)
    env = dict(pair.split("=", 1) for pair in toy)
    code, out = interrupt(tree, signal.SIGINT, "step:3/", **{**env, "ITERATIONS": "100000"})
    assert code == 130, out
    assert "Traceback" not in out and "Run elsewhere: interrupted by SIGINT" in out and "RESUME=auto" in out
    assert list((tree / "elsewhere").glob("checkpoint_*.pt"))
