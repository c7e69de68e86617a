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
    try:
        return _run(name, given)
    except OSError as error:  # no memory for a process, no room for a file
        return f"{type(error).__name__}: {error}"


def _run(name: str, given: Any) -> str:
    # Files: of a pipe there is no end as long as a fork of this process has it open.
    with tempfile.TemporaryFile("w+") as file, tempfile.TemporaryFile("w+", errors="replace") as errors:
        json.dump(given, file)
        file.seek(0)
        done = subprocess.run(
            [sys.executable, "-P", "-m", name],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        errors.seek(0)
        said = errors.read()[-2000:].strip()
    return (said or f"the process ended with {done.returncode}") if done.returncode else ""
