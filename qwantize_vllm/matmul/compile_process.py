"""Kernels compiled by a process of their own, which leaves them in Triton's cache for the one that will launch them.

To compile a kernel is in part Python's work (a sixth of the time for wgmma, half of it for few tokens), and threads
that do it keep Python's lock from the thread that loads a checkpoint: on an H200 the shape of Llama-3-8B loaded in
10.7 s with them, and in 5.2 s where nothing was compiled.

What a launch would have Triton compile it says in JSON (`jit_cache_hook`, `JITFunction.preload`): the process needs
neither the tensors nor the GPU. (With VLLM_USE_STANDALONE_COMPILE=0 vLLM moves Triton's cache after the load, and they
are compiled again as they are launched.)

    python -m qwantize_vllm.matmul.compile_process < requests    # the JSON of a `Request` a line, up to an empty one
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

# One of vLLM's loggers where there is vLLM.
logger = logging.getLogger(f"vllm.{__name__}")

# The engine needs one core for itself, and launches no kernel before it has spent half a minute on other work; all of
# Llama 3 8B's take a core 30 s to compile. A process takes 0.4 GB, and several seconds to import PyTorch and Triton:
# one compiles what all layers ask for, and ends when none has asked for so long.
_MOST_THREADS = 4
_PATIENCE = 5.0
_MARK = "qwantize-compiled"
_NICENESS = 5  # loading goes first where there are few cores


@dataclasses.dataclass
class Request:
    """Kernels to compile.

    Attributes:
        kernels: (module, name, what Triton says of a specialization).
        sources: what says whether these kernels have changed.
        target: backend, architecture and warp size.
        parent: the process that wants them, without which they are not compiled.
    """

    kernels: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    sources: list[str] = dataclasses.field(default_factory=list)
    target: list[Any] = dataclasses.field(default_factory=list)
    parent: int = dataclasses.field(default_factory=os.getpid)

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """As `launch_now`, but the kernel is noted, if this process has not launched it yet."""
        from triton import knobs
        from triton.runtime import driver

        def note(*, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
            if fn.jit_function is not kernel:
                return False
            self.kernels.append((fn.module, fn.name, compile["specialization_data"]))
            self.sources.append(kernel.cache_key)
            return True  # it is not compiled here

        target = driver.active.get_current_target()
        self.target = [target.backend, target.arch, target.warp_size]
        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = note
            kernel.warmup(*arguments, grid=grid, **constants)

    @property
    def done(self) -> bool:
        """Whether Triton's cache has them all from an earlier start."""
        return self._cache.get_file(_MARK) is not None

    def mark_done(self) -> None:
        self._cache.put("", _MARK, binary=False)

    @property
    def _cache(self) -> Any:
        import triton
        from triton.runtime.cache import get_cache_manager

        key = json.dumps([triton.__version__, self.kernels, self.sources, self.target])
        return get_cache_manager(hashlib.sha256(key.encode()).hexdigest())


def start_compiling(request: Request) -> threading.Thread | None:
    """Have a process compile these kernels; returns the thread that waits for it, None if an earlier start has compiled
    them all.

    What fails to compile fails where it is launched too, and says so there; a line in the log says it here.
    """
    global _process
    if not request.kernels or request.done:
        return None
    with _lock:
        if _process is None:
            _process = _Process()
            _process.thread.start()
        _process.requests.put(request)
        return _process.thread


class _Process:
    """One that compiles, and the thread that tells it what, and waits for it."""

    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="qwantize-compiling", daemon=True)

    def _run(self) -> None:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            with _lock:
                self._retire()
            tell_failure(str(error))
            return
        self._write_requests(process.stdin)
        _, errors = process.communicate()
        if process.returncode:
            tell_failure(errors[-2000:].strip())

    def _write_requests(self, file: IO[str] | None) -> None:
        try:
            while (request := self._next()) is not None:
                print(json.dumps(dataclasses.asdict(request)), file=file, flush=True)
            print(file=file, flush=True)  # closing the file is no end where a fork has it open
        except BrokenPipeError:  # the process has ended, and says why
            with _lock:
                self._retire()

    def _next(self) -> Request | None:
        """None if there is none for a while."""
        with contextlib.suppress(queue.Empty):
            return self.requests.get(timeout=_PATIENCE)
        with _lock:
            if not self.requests.empty():  # it has come this moment
                return self.requests.get()
            self._retire()
            return None

    def _retire(self) -> None:
        """Whoever wants something from now on gets another process."""
        global _process
        if _process is self:
            _process = None


_lock = threading.Lock()
_process: _Process | None = None


def tell_failure(why: str) -> None:
    logger.info("qwantize: kernels will be compiled as they are launched, not while weights are loaded: %s", why)


def compile_all(file: IO[str]) -> None:
    """What the process does.

    Raises:
        BaseExceptionGroup: what failed, once all else is compiled.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    jobs: list[tuple[Request, list[Future[None]]]] = []
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for line in iter(file.readline, ""):
            if line == "\n":
                break
            request = Request(**json.loads(line))
            driver.set_active(_Target(GPUTarget(*request.target)))
            jobs.append((request, [pool.submit(_compile, request.parent, *kernel) for kernel in request.kernels]))
    failed = []
    for request, compiled in jobs:
        errors = [error for job in compiled if (error := job.exception())]
        failed += errors
        if not errors:
            request.mark_done()
    if failed:
        raise BaseExceptionGroup("kernels that do not compile", failed)


def _compile(parent: int, module: str, name: str, specialization: str) -> None:
    from qwantize_vllm.matmul.triton_launchers import build_launcher

    if os.getppid() != parent:
        raise RuntimeError("the process that wanted the kernels is gone")
    build_launcher(getattr(importlib.import_module(module), name).preload(specialization))


class _Target:
    """As much of a driver as compiling asks for, and no GPU."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0


if __name__ == "__main__":
    os.nice(_NICENESS)
    compile_all(sys.stdin)
