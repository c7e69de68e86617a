"""Real vLLM engines, each in a process of its own: a crash stays there, and nothing piles up in pytest.

Importing vLLM takes longer than starting an engine on a tiny model, so a fork server imports it once and
every engine process is forked from that, before anything of it has run.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch

from tests.vector_math import settle_vector_math

PATIENCE = 300  # seconds for one engine, on a busy machine too
_GRACE = 20  # seconds in which the processes of an engine that has ended must follow it

# What the test process is set to must not reach an engine, except through the test.
_UNSET = ("TRITON_INTERPRET", "QWANTIZE_CONFIG")
_SET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1)),
    "OMP_WAIT_POLICY": "PASSIVE",  # on a busy machine, threads that spin at barriers take the cores from each other
}
# Even an eager engine compiles one small function, for log-probabilities; without this that takes a C++ compiler.
_EAGER = {"TORCHDYNAMO_DISABLE": "1"}
# The engine core runs in the process that the test talks to, its threads wherever the machine has room.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_ARGUMENTS = {"enforce_eager": True, "max_model_len": 256, "disable_log_stats": True}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an engine process ended.

    Attributes:
        exit_code: of the process.
        log: what it and the processes that it started wrote.
        result: what the test's function returned; None where it failed.
        survivors: command lines of processes that it started and that outlived it.
    """

    exit_code: int
    log: str = dataclasses.field(repr=False)
    result: Any = dataclasses.field(repr=False)
    survivors: list[str]

    def lines(self, text: str) -> list[str]:
        """The lines of the log that hold `text`."""
        return [line for line in self.log.splitlines() if text in line]


def run_engine(
    use: Callable[[Any], Any],
    directory: Path,
    env: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
    **arguments: Any,
) -> Outcome:
    """Start `vllm.LLM(**arguments)` in a process of its own and call `use(llm)` there.

    Args:
        use: a function of a module, or functools.partial of one; returns what torch can save.
        before: another one, called in that process before the engine starts.
        directory: receives the log and the result.
        env: variables on top of the usual ones.
        arguments: of LLM, on top of the usual ones.

    Raises:
        TimeoutError: it hangs.
    """
    directory.mkdir(parents=True)
    result = directory / "result.pt"
    job = (use, directory / "log", result, {**IN_PROCESS, **(env or {})}, {**_ARGUMENTS, **arguments})
    process = _fork_server().Process(target=_engine_process, args=(before, *job))
    process.start()
    process.join(PATIENCE)
    hangs = process.is_alive()
    survivors = end_session(process.pid, grace=0 if hangs else _GRACE)
    process.join()
    log = (directory / "log").read_text(errors="replace")
    if hangs:
        raise TimeoutError(f"the engine still ran after {PATIENCE} s; the end of its log:\n{log[-3000:]}")
    value = torch.load(result, weights_only=False) if result.exists() else None
    return Outcome(process.exitcode, log, value, survivors)


def in_forked_process(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a process that need not import vLLM; what it raises is raised here."""
    with ProcessPoolExecutor(1, mp_context=_fork_server()) as pool:
        return pool.submit(function, *args).result()


def server_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that imports vLLM."""
    return {key: value for key, value in os.environ.items() if key not in _UNSET} | _SET | dict(extra or {})


def end_session(session: int, grace: float = _GRACE) -> list[str]:
    """Kill what is left of a session after `grace` seconds; returns the command lines of what was killed."""
    _, alive = psutil.wait_procs(_session_members(session), timeout=grace)
    commands = [f"{process.pid}: {' '.join(process.cmdline())}" for process in alive if process.is_running()]
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=_GRACE)
    return commands


def _session_members(session: int) -> list[psutil.Process]:
    """Living processes of a session; the dead that nobody has reaped yet do not count."""
    members = []
    for process in psutil.process_iter(["status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == session:
                members.append(process)
        except ProcessLookupError:
            pass  # it has just ended
    return members


@functools.cache
def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # Importing the CPU's worker replaces torch.cuda.Event.
    worker = [] if torch.cuda.is_available() else ["vllm.v1.worker.cpu_worker"]
    context.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", *worker])
    with mock.patch.dict(os.environ, server_environment(), clear=True):
        multiprocessing.forkserver.ensure_running()
    return context


def _engine_process(
    before: Callable[[], None] | None,
    use: Callable[[Any], Any],
    log: Path,
    result: Path,
    env: Mapping[str, str],
    arguments: Mapping[str, Any],
) -> None:
    os.setsid()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    settle_vector_math()
    from torch import _dynamo as dynamo
    from vllm import LLM

    if arguments["enforce_eager"]:
        os.environ.update(_EAGER)  # for the processes that it starts
        dynamo.config.disable = True
    if before is not None:
        before()
    llm = LLM(**arguments)
    try:
        torch.save(use(llm), result)
    finally:
        llm.llm_engine.engine_core.shutdown()
