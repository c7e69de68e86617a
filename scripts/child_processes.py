"""Child processes that never outlive the script that started them. Standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def exit_on_signals() -> None:
    """Make SIGINT, SIGTERM and SIGHUP raise SystemExit, so that every `finally` runs."""

    def leave(number: int, _: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # a second Ctrl-C must not cut the cleaning short
        print(f"\n{signal.Signals(number).name}: stopping what was started", file=sys.stderr, flush=True)
        sys.exit(128 + number)

    for each in SIGNALS:
        signal.signal(each, leave)


@contextlib.contextmanager
def process_group(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start `command` in a process group of its own; on leaving the block, no process of that group is left."""
    _block()  # signals wait while the group is set up and while it is taken down
    try:
        options = {"stdin": subprocess.DEVNULL, "text": True, "errors": "replace", **options}
        process = subprocess.Popen(command, process_group=0, preexec_fn=_unblock, **options)
        with _watcher(process) as watcher:
            try:
                _unblock()
                yield process
            finally:
                _block()
                _stop_group(process, watcher)
    finally:
        _unblock()


def _block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def _watcher(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[bytes]]:
    """For when not even `finally` runs (SIGKILL): a shell in the group, ending it when our end of a pipe is closed."""
    theirs, ours = os.pipe()
    script = "trap '' TERM; read _; kill -TERM 0; sleep 5; kill -KILL 0"
    with subprocess.Popen(["sh", "-c", script], stdin=theirs, process_group=process.pid) as watcher:
        os.close(theirs)
        try:
            yield watcher
        finally:
            os.close(ours)


def _stop_group(process: subprocess.Popen[str], watcher: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the group; SIGKILL to the command after 8 s, and 2 s after its end to whatever is still there."""
    _signal_group(process, signal.SIGTERM)
    try:
        process.wait(8.0)
    except subprocess.TimeoutExpired:  # vLLM, interrupted while its engine starts
        process.kill()
        process.wait()
    watcher.kill()
    watcher.wait()
    # The two seconds are for Python's resource tracker, which frees shared memory when its last client is gone. Waiting
    # until the group is empty would not do: in a container whose first process reaps nobody, the dead stay in it.
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline and _signal_group(process, 0):
        time.sleep(0.05)
    _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[str], number: int) -> bool:
    """True if the group still had a process to signal."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True
