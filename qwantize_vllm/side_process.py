"""Work that a process does beside this one: a new process for a module, or a fork for a function."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import IO, Any

_LONGEST = 120  # seconds of a fork, which may have inherited a lock that nobody opens


def run_module(name: str, given: Any) -> str:
    """Run `python -m name < given`, which is written as JSON, and wait for its end.

    Returns what it wrote to stderr if it failed, or why there is no such process; nothing if all went well.
    """
    try:
        # Files: of a pipe there is no end as long as a fork of this process has it open.
        with tempfile.TemporaryFile("w+") as file, _errors() as errors:
            json.dump(given, file)
            file.seek(0)
            done = subprocess.run(
                [sys.executable, "-P", "-m", name],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(str, sys.path)))},
                stdin=file,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            return _failure(done.returncode, errors)
    except Exception as error:  # no memory for a process, no room for a file: whoever waits goes on in any case
        return f"{type(error).__name__}: {error}"


def fork_to(function: Callable[[], object]) -> Callable[[], str]:
    """Have a fork of this process call a function; what it prints is lost.

    Returns at once what waits for its end, and returns what `run_module` does.

    Raises:
        OSError: there is no memory for a fork, or no room for a file.
    """
    errors = _errors()
    process = os.fork()
    if not process:
        _call_and_exit(function, errors)
    return functools.partial(_wait, process, errors)


def _call_and_exit(function: Callable[[], object], errors: IO[str]) -> None:
    """As a program of its own: with signals that end it, and without this one's output, whose reader would wait."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(_LONGEST)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream, instead in enumerate((nothing, nothing, errors.fileno())):
            os.dup2(instead, stream)
        function()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)  # and nothing that the process would do that it was


def _wait(process: int, errors: IO[str]) -> str:
    with errors:
        try:
            _, status = os.waitpid(process, 0)
        except ChildProcessError:  # somebody who waits for every child has seen its end
            return ""
        return _failure(os.waitstatus_to_exitcode(status), errors)


def _errors() -> IO[str]:
    return tempfile.TemporaryFile("w+", errors="replace")


def _failure(code: int, errors: IO[str]) -> str:
    errors.seek(0)
    return (errors.read()[-2000:].strip() or f"the process ended with {code}") if code else ""
