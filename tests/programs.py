"""Programs of the tests that compile kernels, which need a process of their own: TRITON_INTERPRET, which the tests set,
must be unset when triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_PATIENCE = 900


def run_program(module: str, *arguments: str, **variables: str) -> list[str]:
    """The lines that python -m module prints; it must succeed. variables: of the environment, besides this one's."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=_PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
