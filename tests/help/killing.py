"""Ends runs at random moments of each phase, in every way that a run can be ended, and looks at what is left.

    python tests/help/killing.py --rounds 40 --seed 7      a table, one line a round; exit code 1 if anything was lost

One process imports torch once and forks a child for every run (`Forge`), so that a round costs a second or two.
The forked child runs the script as `__main__`, with its own standard streams, and ends as every Python process does.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a command, it has to find the trainer

from process import REPO, clean_env
from runs import RULE, SCRIPT, checkpoints, command, events, free_port, heard, log_lines, read_checkpoint
from toy import make_toy

# A run whose phases take some tenths of a second each.
PHASES = {  # the beginning of the line of the log after which the phase begins, and the settings that make it last
    "warmup": ("model_params", "WARMUP_STEPS=4"),
    "train": ("warmup ", "ITERATIONS=12"),
    "calibrate": ("checkpoint step:12 ", "GPTQ_CALIBRATION_TOKENS=2048"),
    "export": ("calibrate ", "FIT=prune"),
    "eval": ("artifact ", "EVAL_STRIDE=32"),
}
SMALLER = ("NUM_LAYERS=2", "XSA_LAST_N=1", "VE_LAYERS=1")
SETTINGS = [*SMALLER, "MATRIX_QUANT=gptq", "VAL_TOKENS=1024", *(setting for _, setting in PHASES.values())]
ACTIONS = ("SIGTERM", "SIGHUP", "SIGINT", "SIGKILL", "console")
SILENCE = 200  # seconds in which one of the runs ends, on the busiest machine


# ---- runs that cost no import ---------------------------------------------------------------------------------------


class Forge:
    """A process that has imported the trainer and forks a child for each run."""

    def __enter__(self):
        self.server = subprocess.Popen([sys.executable, __file__, "--forge"], env=clean_env(), bufsize=0,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._pending, self._codes, self._begun = b"", {}, []
        return self

    def __exit__(self, *_):
        for pid in set(self._begun) - self._codes.keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.server.stdin.close()
        self.server.wait(20)
        self.server.stdout.close()

    def start(self, args, out, err=None, env=None, cwd=REPO, closed=(), ignored=()):
        """Process id of `train_gpt.py args`, its output in these files. `closed`: descriptors that it begins without;
        `ignored`: signals, as nohup does it.
        """
        order = dict(args=[str(arg) for arg in args], out=str(out), err=str(err or out), env=env or {}, cwd=str(cwd),
                     closed=list(closed), ignored=list(ignored))
        number = len(self._begun)
        self.server.stdin.write(json.dumps(order).encode() + b"\n")
        while len(self._begun) == number:
            self._hear(SILENCE)
        return self._begun[number]

    def wait(self, pid):
        """Exit code of a run, negative for the signal that ended it."""
        while pid not in self._codes:
            self._hear(SILENCE)
        return self._codes[pid]

    def ended(self, pid):
        self._hear(0)
        return pid in self._codes

    def _hear(self, seconds):
        """Take note of all that the process has to say; it may be silent for so long, AssertionError if it is longer.
        Its pipe is read without a buffer: a line that waits in one is nothing that select() knows of.
        """
        if not select.select([self.server.stdout], [], [], seconds)[0]:
            assert not seconds, f"none of the runs {sorted(set(self._begun) - self._codes.keys())} has ended in {seconds} s"
            return
        received = self.server.stdout.read(65536)
        assert received, "the process that forks the runs is gone"
        *lines, self._pending = (self._pending + received).split(b"\n")
        for row in map(json.loads, lines):
            if row["event"] == "begun":
                self._begun.append(row["pid"])
                self._codes.pop(row["pid"], None)  # of a run long ago, where numbers begin again
            else:
                self._codes[row["pid"]] = row["code"]


def serve():
    """The process of a Forge: an order a line on standard input."""
    import sentencepiece  # noqa: F401
    import torch._dynamo  # noqa: F401  loading an artifact needs it, for two seconds

    import train_gpt  # noqa: F401

    code = compile(SCRIPT.read_text(encoding="utf-8"), str(SCRIPT), "exec")
    orders, pending, alive = os.fdopen(0, "rb", buffering=0), b"", True
    while alive or _reap():
        ready = select.select([orders], [], [], 0.01)[0] if alive else time.sleep(0.01)
        received = orders.read(65536) if ready else None
        alive = alive and received != b""
        *lines, pending = (pending + (received or b"")).split(b"\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                become_trainer(code, json.loads(line))
            print(json.dumps({"event": "begun", "pid": pid}), flush=True)
        _reap()


def _reap():
    """Report the children that have ended; are there others?"""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return True
            print(json.dumps({"event": "ended", "pid": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)
    return False


def become_trainer(code, order):
    """The rest of this process is `python train_gpt.py ...`. Ends with SystemExit."""
    os.setsid()
    for number, path in ((0, os.devnull), (1, order["out"]), (2, order["err"])):
        file = os.open(path, os.O_RDWR if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, number)
        os.close(file)
    for number in order["closed"]:
        os.close(number)
    streams = [None if n in order["closed"] else open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2)]
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = streams
    heard()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in order["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(order["cwd"])
    os.environ.update(order["env"])
    sys.argv = [str(SCRIPT), *order["args"]]
    module = types.ModuleType("__main__")
    module.__file__ = str(SCRIPT)
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


# ---- one round ------------------------------------------------------------------------------------------------------


def ranks_of(forge, args, ranks, out):
    """Process ids of all ranks of a run; torchrun's part is to start them and to pass signals on."""
    if ranks == 1:
        return [forge.start(args, out)]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [forge.start(args, out, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]


def watch(forge, pids, folder):
    """Wait for the end of a run: {phase: (seconds at which it began, how long it took)}."""
    starts, began = {}, time.monotonic()
    while not all(forge.ended(pid) for pid in pids):
        for phase in PHASES:
            if phase not in starts and reached(folder, phase):
                starts[phase] = time.monotonic() - began
        time.sleep(0.002)
    ends = [*list(starts.values())[1:], time.monotonic() - began]
    return {phase: (start, max(end - start, 0.01)) for (phase, start), end in zip(starts.items(), ends)}


def reached(folder, phase):
    """Has the log the line with which a phase begins? It is asked all the time, so the source in front is skipped."""
    with contextlib.suppress(OSError), open(folder / "train.log", "rb") as log:
        log.seek(SCRIPT.stat().st_size)
        lines = log.read().rpartition(RULE.encode() + b"\n")[2].splitlines()
        return any(line.startswith(PHASES[phase][0].encode()) for line in lines)
    return False


def artifact(folder):
    path = folder / "model.pg"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none"


def score_of(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))["val_bpb"]


class Reference:
    """What a run that nobody disturbs leaves behind, for a number of ranks; and how long its phases take."""

    def __init__(self, forge, toy, folder, ranks):
        self.args = command(toy, folder, *SETTINGS)
        pids = ranks_of(forge, self.args, ranks, folder.with_suffix(".out"))
        self.times = watch(forge, pids, folder)
        assert [forge.wait(pid) for pid in pids] == [0] * ranks, folder.with_suffix(".out").read_text()[-2000:]
        self.artifact, self.score = artifact(folder), score_of(folder)
        assert not checkpoints(folder), "the checkpoint of the end of training is gone when nothing can be lost"


def play(forge, toy, folder, reference, ranks, phase, action, dice):
    """One round: ended by `action` in `phase`, looked at, and gone on with. AssertionError if anything was lost."""
    every = dice.choice((0, 5))
    args = command(toy, folder, *SETTINGS, f"CHECKPOINT_EVERY={every}")
    out = folder.with_suffix(".out")
    os.mkfifo(out)
    reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
    pids = ranks_of(forge, args, ranks, out)
    while not reached(folder, phase) and not forge.ended(pids[0]):
        time.sleep(0.002)
    time.sleep(dice.uniform(0, reference.times[phase][1]))
    if action == "console":
        os.close(reader)
    else:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[action])
    codes = [forge.wait(pid) for pid in pids]
    said = b"" if action == "console" else os.read(reader, 1 << 20)
    last = log_lines(folder)[-1]
    check_end(folder, reference, action, codes, last, said.decode())
    if action != "console":
        os.close(reader)
        out.unlink()
        pids = ranks_of(forge, [*args, "RESUME=auto"], ranks, out)
        again = [forge.wait(pid) for pid in pids]
        assert again == [0] * ranks, f"RESUME=auto: {again} {out.read_text()[-1500:]}"
    assert artifact(folder) == reference.artifact, "the artifact is another one"
    assert score_of(folder) == reference.score
    assert not left_over(folder), left_over(folder)
    return {"code": codes[0], "last line": last[:60], "steps kept": resumed_at(folder)}


def resumed_at(folder):
    rows = events(folder, "resume")
    return rows[-1]["step"] if rows else ""


def left_over(folder):
    """Files that no ended run should leave."""
    return [path.name for path in folder.iterdir() if path.name.endswith(".part") or path.name == "run.lock"]


def check_end(folder, reference, action, codes, last, said):
    """Whatever has its final name is whole, and the log says what happened."""
    for path in checkpoints(folder).values():
        read_checkpoint(path)
    assert artifact(folder) in ("none", reference.artifact), "an artifact that is not whole"
    if action == "SIGKILL":
        return
    assert not left_over(folder), left_over(folder)
    if set(codes) == {0}:  # the console went, or the signal came after the end
        assert last.startswith("summary {"), last
        return
    assert action != "console", f"the run ended with its console: {codes} {last}"
    number = signal.Signals[action]
    assert set(codes) == {128 + number}, f"{codes} {said[-1500:]}"
    assert last.startswith(f'ended reason:"interrupted by {action}'), last
    assert "Traceback" not in said and f"interrupted by {action}" in said, said[-1500:]


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="number of runs that are ended (default: 20)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2],
                        help="numbers of processes of a run, in turn (default: 1 2)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6),
                        help="repeats the moments, about (default: drawn, and printed first)")
    parser.add_argument("--forge", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main():
    args = arguments(sys.argv[1:])
    if args.forge:
        return serve()
    dice, lost = random.Random(args.seed), 0
    print(f"seed {args.seed}\n{'round':>5} {'ranks':>5} {'phase':10} {'by':8} {'code':>5} {'step':>5}  last line of the log")
    with tempfile.TemporaryDirectory() as place, Forge() as forge:
        place = Path(place)
        (place / "toy").mkdir()
        toy = make_toy(place / "toy")
        references = {n: Reference(forge, toy, place / f"reference{n}", n) for n in set(args.ranks)}
        for number in range(args.rounds):
            ranks = args.ranks[number % len(args.ranks)]
            phase, action = dice.choice(list(PHASES)), dice.choice(ACTIONS)
            try:
                row = play(forge, toy, place / str(number), references[ranks], ranks, phase, action, dice)
            except AssertionError as error:
                row, lost = {"code": "LOST", "steps kept": "", "last line": str(error)}, lost + 1
            print(f"{number:>5} {ranks:>5} {phase:10} {action:8} {row['code']:>5} {row['steps kept']:>5}  {row['last line']}",
                  flush=True)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
