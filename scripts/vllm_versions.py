#!/usr/bin/env python3
"""Run the plugin's tests against the oldest and the newest vLLM supported.

    .venv/bin/python scripts/vllm_versions.py [VERSION …]

Each wheel is downloaded without dependencies, and its Python files are unpacked into .cache/vllm: beside a CPU build of
torch neither its kernels nor those of another torch can be loaded, and nothing of them is needed to import a plugin, to
register it and to build its layers. Where vLLM cannot be imported most tests skip themselves, so that is tried first.
As many versions are tested at a time as there are cores; what their tests print follows when they are done.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwantize_vllm.plugin.versions import NEWEST, OLDEST

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "vllm"
_REGISTER = "import vllm; from qwantize_vllm.plugin import register; register()"


def main() -> None:
    versions = sys.argv[1:] or [OLDEST, NEWEST]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(pool.map(passes, versions))
    failed = [version for version, well in zip(versions, passed, strict=True) if not well]
    if failed:
        sys.exit(f"error: the plugin's tests fail with vLLM {', '.join(failed)}")


def passes(version: str) -> bool:
    folder = unpacked(version)
    path = os.pathsep.join([str(ROOT), str(folder)])  # before site-packages, where another vLLM is
    environment = {**os.environ, "PYTHONPATH": path, "QWANTIZE_TEST_VLLM": str(folder)}
    if reason := why_not_registered(environment):
        print(f"error: the plugin cannot be registered with vLLM {version}: {reason}", flush=True)
        return False
    done = _run("-m", "pytest", "-q", "tests/plugin", environment=environment)
    print(f"==> the plugin's tests with vLLM {version}\n{done.stdout}{done.stderr}", flush=True)
    return done.returncode == 0


def why_not_registered(environment: dict[str, str]) -> str | None:
    """The last line of what Python says where vLLM is imported and the plugin registered; None where that succeeds."""
    done = _run("-c", _REGISTER, environment=environment)
    return None if done.returncode == 0 else (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]


def _run(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, text=True, capture_output=True)


def unpacked(version: str) -> Path:
    """The folder with that version's Python files."""
    folder = CACHE / version
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory() as download:
        print(f"==> downloading vLLM {version}, some hundred megabytes", flush=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--only-binary", ":all:", "-d", download, f"vllm=={version}"], check=True)
        (wheel,) = Path(download).glob("*.whl")
        unfinished = CACHE / f"{version}.unfinished"
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith((".py", ".json")) or ".dist-info/" in name]
            archive.extractall(unfinished, names)
    return unfinished.rename(folder)


if __name__ == "__main__":
    main()
