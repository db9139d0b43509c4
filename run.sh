#!/usr/bin/env bash
# The newcomer's command. `bash run.sh help` says what it can do. Needs bash 3.2 and Python 3.10 to 3.13; no root.
set -uo pipefail

usage() {
    cat <<'TEXT'
bash run.sh                            set up, train (demo size on a CPU, real size on every GPU), show the score
bash run.sh KEY=VALUE ...              the same with other settings, such as MAX_WALLCLOCK_SECONDS=60 SEED=7
bash run.sh RECORD [KEY=VALUE ...]     a settings file, or a folder or folder name of records/, in place of the defaults
bash run.sh RECORD --small             the same at a size for two CPU cores, on the embedded text
bash run.sh setup                      only set up: .venv, requirements, embedded data
bash run.sh test [PYTEST ARGUMENTS]    run the tests; `test quick`: the basic ones, under a minute
bash run.sh help                       this text; all settings: .venv/bin/python train_gpt.py --help

Settings: default < settings file < environment < KEY=VALUE. Relative paths in them start at the repository.
Variables: VENV=folder of the environment (.venv), PYTHON=interpreter that makes it, NPROC=processes (one per GPU),
and pip's own, such as PIP_INDEX_URL for another package index or build of torch.
Ctrl-C saves a checkpoint and ends the run; a second one ends it at once.
TEXT
}

say() { printf 'run.sh: %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# ---- processes ------------------------------------------------------------------------------------------------------
# A long command is a child in a process group of its own, so a signal reaches it exactly once, through this script,
# however it was sent. Commands know how to end cleanly; the third signal kills. The exit code is the command's.

child=none caught=0 pending=""

on_signal() { # on_signal NAME CODE
    caught=$((caught + 1))
    case $child in
    none)
        say "interrupted" >&2
        exit "$2"
        ;;
    starting) pending=$1 ;;
    *) if [ "$caught" -ge 3 ]; then kill -KILL -- "-$child"; else kill "-$1" "$child"; fi 2>/dev/null ;;
    esac
}
trap 'on_signal INT 130' INT
trap 'on_signal TERM 143' TERM HUP

run() {
    local status=0 code before
    child=starting caught=0 pending=""
    set -m
    "$@" </dev/null &
    child=$!
    set +m
    [ -z "$pending" ] || kill "-$pending" "$child" 2>/dev/null
    while :; do
        before=$caught
        wait "$child" 2>/dev/null
        code=$?
        [ "$code" -eq 127 ] || status=$code # 127: collected in the round before
        [ "$caught" -gt "$before" ] || break
    done
    kill -TERM -- "-$child" 2>/dev/null # whatever it left behind
    child=none
    return "$status"
}

# As `run`, for the steps before the training: an interrupted one ends the script.
step() {
    local status
    run "$@"
    status=$?
    [ "$caught" -eq 0 ] || {
        say "interrupted; the same command goes on from here" >&2
        exit $((status > 128 ? status : 130))
    }
    return "$status"
}

# ---- Python ---------------------------------------------------------------------------------------------------------

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; }

find_python() { # sets python
    local name found=""
    if [ -n "${PYTHON:-}" ]; then
        version_of "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a Python that runs"
        recent "$PYTHON" || fail "PYTHON=$PYTHON is Python $(version_of "$PYTHON"); this needs 3.10 or newer"
        python=$PYTHON
        return
    fi
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if supported "$name"; then
            python=$name
            return
        fi
        [ -n "$found" ] || found=$(version_of "$name")
    done
    local advice="install Python 3.10 to 3.13, or name one with PYTHON=/path/to/python3"
    [ -z "$found" ] || fail "python3 is Python $found; this needs 3.10 to 3.13: $advice"
    fail "no python3 found: $advice"
}

# missing FILE...: prints the pinned requirements that the environment lacks, one a line. No network, 0.1 s.
missing() {
    "$py" - "$@" <<'CODE'
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    from packaging.requirements import Requirement
except ImportError:  # a new environment has only pip, which carries a copy
    from pip._vendor.packaging.requirements import Requirement

def requirements(path):
    for line in open(path, encoding="utf-8"):
        line = line.partition("#")[0].strip()
        if line and not line.startswith("-r"):
            yield Requirement(line)

def satisfied(requirement):
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return False
    return requirement.specifier.contains(installed, prereleases=True)  # 2.13.0+cpu is a build of 2.13.0

for path in sys.argv[1:]:
    for requirement in requirements(path):
        applies = requirement.marker is None or requirement.marker.evaluate()
        if applies and not satisfied(requirement):
            print(f"{requirement.name}{requirement.specifier}")
CODE
}

# python -m MODULE, without a traceback when it is interrupted.
module='
import runpy, sys
try:
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
except KeyboardInterrupt:
    sys.exit(130)
'

need_pip() { # an environment has none if making it was interrupted
    "$py" -c 'from importlib.metadata import version; version("pip")' 2>/dev/null ||
        step "$py" -c "$module" ensurepip --upgrade >/dev/null || fail "$VENV has no pip: remove it"
}

environment() { # environment FILE...: the virtual environment with these requirements; sets py
    local files=("$@") last=${!#} lacking log
    py=$VENV/bin/python
    if ! recent "$py"; then
        if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV" 2>/dev/null)" ]; then
            fail "VENV=$VENV is neither a Python environment (no working bin/python, 3.10 or newer) nor an empty folder"
        fi
        find_python
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "$python has no venv module: install it (Debian, Ubuntu: apt install python3-venv), or set PYTHON"
        say "making the Python environment $VENV with Python $(version_of "$python")"
        step "$python" -c "$module" venv --clear "$VENV" || fail "the environment $VENV could not be made: see above"
    elif [ -n "${PYTHON:-}" ] && [ "$(version_of "$PYTHON")" != "$(version_of "$py")" ]; then
        fail "$VENV has Python $(version_of "$py"), not that of PYTHON=$PYTHON: remove $VENV, or set VENV"
    fi
    "$py" -c 'import packaging' 2>/dev/null || need_pip
    lacking=$(missing "${files[@]}") || fail "the requirements in $last cannot be checked: see above"
    [ -n "$lacking" ] || return 0
    log=$VENV/pip.log
    say "installing $(echo $lacking) (minutes; torch is large; every line of pip: $log)"
    rm -f "$log"
    need_pip
    step "$py" -m pip install --quiet --progress-bar off --disable-pip-version-check --log "$log" -r "$last" ||
        fail "pip could not install $last: see above, or all in $log (PIP_PROXY, PIP_INDEX_URL help it)"
    lacking=$(missing "${files[@]}")
    [ -z "$lacking" ] || fail "pip ended well, but $VENV still lacks $(echo $lacking): see $log"
}

# ---- data -----------------------------------------------------------------------------------------------------------

embedded=data/datasets/builtin_sp1024

# embedded_data FOLDER: makes it, if it is one of the data sets of the embedded text. What prepare.py
# prints about a new one goes to FOLDER.log; about one that is there it prints a single line.
embedded_data() {
    local folder=$1 options=() log
    case $folder in
    "$embedded") ;;
    "${embedded}_caseops") options=(--caseops) ;;
    data/datasets/builtin_sp512) options=(--vocab-size 512) ;; # of records/proxy-cpu.env
    *) return 0 ;;
    esac
    set -- data/prepare.py --source builtin --out "$folder" ${options[@]+"${options[@]}"}
    if [ -e "$folder/manifest.json" ]; then
        step "$py" "$@" || fail "no embedded data set: see above"
        return
    fi
    log=$folder.log
    mkdir -p "$(dirname "$log")" || fail "no embedded data set: see above"
    say "making the data set $folder and proving it (a minute; every line: $log)"
    step "$py" "$@" >"$log" || {
        cat "$log" >&2
        fail "no embedded data set: see above"
    }
}

# ---- commands -------------------------------------------------------------------------------------------------------

find_settings() { # find_settings WORD: prints the settings file or record folder that it names
    local word=${1#@} place
    for place in "$started/$word" "$word" records/*/"$word" "records/$word" "records/$word.env"; do
        [ ! -e "$place" ] || { printf '%s\n' "$place" && return; }
    done
    return 1
}

unknown() {
    local near words=(setup test help --small records/small.env) place
    for place in records/*/*/; do [ ! -e "$place/settings.env" ] || words+=("${place%/}" "$(basename "$place")"); done
    find_python
    near=$("$python" -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1, 0.5))' \
        "$1" "${words[@]}")
    fail "'$1' is no command, settings file or KEY=VALUE${near:+; did you mean $near?} (bash run.sh help)"
}

# torchrun with the trainer's exit code, and without its own traceback where a signal or the trainer said it all.
torchrun='
import sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except SignalException as signal:
    sys.exit(128 + signal.sigval)
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    if code not in (2, 3, 4, 130, 143):
        print(error, file=sys.stderr)
    sys.exit(code if code > 0 else 128 - code)
'

new_run_id() { # new_run_id NAME: prints a name and makes its folder, which no other run can get
    local id
    id=$(date +%Y%m%d-%H%M%S)-$1
    mkdir -p logs || fail "logs cannot be made: set OUT_DIR"
    until mkdir "logs/$id" 2>/dev/null; do
        [ -e "logs/$id" ] || fail "logs/$id cannot be made: set OUT_DIR"
        id+=+
    done
    printf '%s\n' "$id"
}

train() {
    local word place words=() answer launch cores status
    local arguments notes name gpus data_path out_dir run_id # what tools/launch.py answers
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || [ "$word" = --small ]; then
            words+=("$word")
        else
            place=$(find_settings "$word") || unknown "$word"
            [ ! -d "$place" ] || [ -e "$place/settings.env" ] || fail "$place is no record: it has no settings.env"
            words+=("@$place")
        fi
    done
    environment requirements.txt
    answer=$("$py" tools/launch.py ${words[@]+"${words[@]}"}) || exit
    eval "$answer"
    for word in ${notes[@]+"${notes[@]}"}; do say "$word"; done
    embedded_data "$data_path"

    if [ -z "$out_dir$run_id" ]; then
        run_id=$(new_run_id "$name") || exit 2
        arguments+=("RUN_ID=$run_id")
    fi
    out_dir=${out_dir:-logs/$run_id}
    NPROC=${NPROC:-$((gpus > 1 ? gpus : 1))}
    launch=("$py")
    if [ "$NPROC" -gt 1 ]; then
        [ "$NPROC" -le "$gpus" ] || [ "$gpus" -eq 0 ] || fail "NPROC=$NPROC, but torch sees $gpus GPU(s)"
        launch+=(-c "$torchrun" --standalone "--nproc_per_node=$NPROC")
        cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
    fi
    say "training on ${gpus/#0/no} GPU(s), $NPROC process(es); results in $out_dir"
    run "${launch[@]}" train_gpt.py ${arguments[@]+"${arguments[@]}"}
    status=$?
    [ -z "$run_id" ] || rmdir "logs/$run_id" 2>/dev/null # if nothing was run
    # 2: nothing was run; a second signal: wanted to be gone
    if [ "$status" -ne 2 ] && [ "$caught" -lt 2 ] && [ -e "$out_dir/metrics.jsonl" ]; then
        printf '\n'
        "$py" tools/report.py "$out_dir"
    fi
    exit "$status"
}

started=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
VENV=${VENV:-.venv}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # threads that spin make a shared CPU several times slower
export PYTHONUNBUFFERED=1
case ${1:-} in
help | -h | --help) usage ;;
setup)
    [ $# -eq 1 ] || fail "setup takes no arguments, but got: ${*:2}"
    environment requirements.txt
    embedded_data "$embedded"
    say "ready: bash run.sh"
    ;;
test)
    environment requirements.txt requirements-dev.txt
    [ "${2:-}" != quick ] || set -- test -n 2 --dist loadfile @tests/quick.txt "${@:3}"
    [ $# -gt 1 ] || set -- test -n 2 --dist loadfile # all of them: a file at a time on each of two cores
    exec "$py" -m pytest "${@:2}"
    ;;
*) train "$@" ;;
esac
