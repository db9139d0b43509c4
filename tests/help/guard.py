"""Ends what the tests have started and left running, however the tests themselves ended: Ctrl-C, SIGTERM or SIGKILL.

`watch()` puts a mark into the environment, which every process that is started afterwards inherits, and starts a guard.
The guard waits until pytest is gone and then kills whatever still has the mark. Linux only; elsewhere it does nothing.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "PYTEST_GUARD"


def marked(mark):
    """Process ids of all processes that were started with this mark."""
    pids = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}\0".encode() in environ.read_bytes():
                pids.append(int(environ.parent.name))
    return pids


def kill(mark):
    """Until there are none: a process may start another one while it is being killed."""
    while pids := marked(mark):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def watch():
    """Start the guard of this process; its Popen, to be kept."""
    if not Path("/proc/self/environ").exists():
        return None
    mark = f"{os.getpid()}.{os.urandom(8).hex()}"
    unmarked = {name: value for name, value in os.environ.items() if name != MARK}
    words = [sys.executable, "-S", __file__, str(os.getpid()), mark]
    process = subprocess.Popen(words, env=unmarked, start_new_session=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ[MARK] = mark
    return process


def main(pid, mark):
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while os.getppid() == int(pid):  # a process that is gone leaves its children to another one
        time.sleep(0.2)
    kill(mark)


if __name__ == "__main__":
    main(*sys.argv[1:])
