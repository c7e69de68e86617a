"""A module of this package, run as a program beside this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any


def run_module(name: str, given: Any) -> str:
    """Run `python -m name < given`, which is written as JSON, and wait for its end.

    Returns what it wrote to stderr if it failed, or why there is no such process; nothing if all went well.
    """
    # Whatever it is, as no memory for a process or no room for a file: a thread that waits must go on.
    try:
        return _run(name, given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _run(name: str, given: Any) -> str:
    # Files: of a pipe there is no end as long as a fork of this process has it open.
    with tempfile.TemporaryFile("w+") as file, tempfile.TemporaryFile("w+", errors="replace") as errors:
        json.dump(given, file)
        file.seek(0)
        done = subprocess.run(
            [sys.executable, "-P", "-m", name],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(str, sys.path)))},
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        if done.returncode == 0:
            return ""
        errors.seek(0)
        return errors.read()[-2000:].strip() or f"the process ended with {done.returncode}"
