"""Kernels compiled by a process of their own, which leaves them in Triton's cache for the one that will launch them.

To compile a kernel is in part Python's work (a sixth of the time for wgmma, half of it for few tokens), and threads
that do it keep Python's lock from the thread that loads a checkpoint: on an H200 the shape of Llama-3-8B loaded in
10.7 s with them, and in 5.2 s where nothing was compiled.

What a launch would have Triton compile it says in JSON (`jit_cache_hook`, `JITFunction.preload`): the process needs
neither the tensors nor the GPU. (With VLLM_USE_STANDALONE_COMPILE=0 vLLM moves Triton's cache after the load, and they
are compiled again as they are launched.)

    python -m qwantize_vllm.matmul.compile_process < request    # the JSON of a `Request`
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

# One of vLLM's loggers where there is vLLM.
logger = logging.getLogger(f"vllm.{__name__}")

# A form of weights has some five kernels, and a model has few forms; a process takes 0.4 GB for its seconds.
_MOST_PROCESSES = 4
_MOST_THREADS = 8
_MARK = "qwantize-compiled"
_NICENESS = 5  # loading goes first where there are few cores
_free = threading.Semaphore(_MOST_PROCESSES)


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
    """Start a process that compiles these kernels; returns the thread that waits for it, None if there are none that an
    earlier start has not compiled.

    What fails to compile fails where it is launched too, and says so there; a line in the log says it here.
    """
    if not request.kernels or request.done:
        return None
    thread = threading.Thread(target=_run, args=(request,), name="qwantize-compiling", daemon=True)
    thread.start()
    return thread


def _run(request: Request) -> None:
    with _free:
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", __name__],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                input=json.dumps(dataclasses.asdict(request)),
                capture_output=True,
                text=True,
            )
        except OSError as error:
            tell_failure(str(error))
            return
    if done.returncode:
        tell_failure(done.stderr[-2000:].strip())


def tell_failure(why: str) -> None:
    logger.info("qwantize: kernels will be compiled as they are launched, not while weights are loaded: %s", why)


def compile_all(file: IO[str]) -> None:
    """What the process does."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    request = Request(**json.load(file))
    driver.set_active(_Target(GPUTarget(*request.target)))
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for done in [pool.submit(_compile, request.parent, *kernel) for kernel in request.kernels]:
            done.result()
    request.mark_done()


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
