"""Kernels compiled by a process of their own, which leaves them in Triton's cache for the one that will launch them.

To compile a kernel is in part Python's work (a sixth of the time for wgmma, half of it for few tokens), and threads
that do it keep Python's lock from the thread that loads a checkpoint: on an H200 the shape of Llama-3-8B loaded in
10.7 s with them, and in 5.2 s where nothing was compiled.

What a launch would have Triton compile it says in JSON (`jit_cache_hook`, `JITFunction.preload`): the process needs
neither the tensors nor the GPU. (With VLLM_USE_STANDALONE_COMPILE=0 vLLM moves Triton's cache after the load, and they
are compiled again as they are launched.)

    python -m qwantize_vllm.matmul.compile_process < requests    # the JSON of a list of `Request`
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import logging
import os
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from qwantize_vllm.side_process import run_module
from qwantize_vllm.triton_keys import settle_key
from qwantize_vllm.triton_launch import compile_now

# One of vLLM's loggers where there is vLLM.
logger = logging.getLogger(f"vllm.{__name__}")

# An engine needs one core for itself, and launches few kernels before torch.compile has had half a minute; those of
# Llama 3 8B take a core 25 s to compile. A process takes 0.4 GB, and several seconds to import PyTorch and Triton: so
# there is one at a time, for all that layers have asked for when none has for so long.
_MOST_THREADS = 4
_PATIENCE = 1.0
_MARK = "qwantize-compiled"
NICENESS = 5  # loading goes first where there are few cores
_LONGEST_WAIT = 120.0  # of whoever needs the kernels: should a compiler hang, he compiles them himself
_changed = threading.Condition()  # for what follows
_waiting: list[Request] = []
_compiling = False
_thread: threading.Thread | None = None  # which takes them


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
            if (found := (fn.module, fn.name, compile["specialization_data"])) not in self.kernels:
                self.kernels.append(found)
                self.sources.append(kernel.cache_key)
            return True  # it is not compiled here

        target = driver.active.get_current_target()
        self.target = [target.backend, target.arch, target.warp_size]
        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = note
            compile_now(kernel, grid, *arguments, **constants)

    @property
    def done(self) -> bool:
        """Whether Triton's cache has them all from an earlier start."""
        return is_done(self._what)

    def mark_done(self) -> None:
        mark_done(self._what)

    @property
    def _what(self) -> list[Any]:
        return [self.kernels, self.sources, self.target]


def is_done(what: Any) -> bool:
    """Whether Triton's cache says that this has been compiled, by this version of it; what: all else that it depends
    on, which JSON can say."""
    return _marks(what).get_file(_MARK) is not None


def mark_done(what: Any) -> None:
    _marks(what).put("", _MARK, binary=False)


def _marks(what: Any) -> Any:
    import triton
    from triton.runtime.cache import get_cache_manager

    return get_cache_manager(hashlib.sha256(json.dumps([triton.__version__, what]).encode()).hexdigest())


def start_compiling(request: Request) -> threading.Thread | None:
    """Have a process compile these kernels; returns the thread that waits for it, None if an earlier start has compiled
    them all.

    What fails to compile fails where it is launched too, and says so there; a line in the log says it here.
    """
    global _thread
    if not request.kernels or request.done:
        return None
    with _changed:
        if _thread is None:
            thread = threading.Thread(target=_run, name="qwantize-compiling", daemon=True)
            thread.start()
            _thread = thread
        _waiting.append(request)
        return _thread


def wait_for_compiling() -> None:
    """Until the kernels are compiled that layers have asked for so far, or for _LONGEST_WAIT seconds."""
    with _changed:
        if not (_waiting or _compiling):
            return
        logger.info("qwantize: waiting for kernels that are still being compiled")
        if not _changed.wait_for(lambda: not (_waiting or _compiling), _LONGEST_WAIT):
            tell_failure(f"they are not compiled after {_LONGEST_WAIT:.0f} s more")


def _run() -> None:
    global _compiling
    while requests := _gather():
        if failed := run_module(__name__, [dataclasses.asdict(request) for request in requests]):
            tell_failure(failed)
        with _changed:
            _compiling = False
            _changed.notify_all()


def _gather() -> list[Request]:
    """All requests, once none has come for a while. There may be none: then the next one gets a thread of its own."""
    global _thread, _compiling
    known = -1
    while True:
        time.sleep(_PATIENCE)
        with _changed:
            if len(_waiting) == known or not _waiting:
                if not _waiting:
                    _thread = None
                requests = list(_waiting)
                _waiting.clear()
                _compiling = bool(requests)
                return requests
            known = len(_waiting)


def tell_failure(why: str) -> None:
    logger.info("qwantize: kernels will be compiled as they are launched, not while weights are loaded: %s", why)


def compile_all(file: IO[str]) -> None:
    """What the process does.

    Raises:
        BaseExceptionGroup: what failed, once all else is compiled.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    requests = [Request(**each) for each in json.load(file)]
    jobs: dict[tuple[str, ...], Future[None]] = {}  # requests have kernels in common
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for request in requests:
            driver.set_active(Target(GPUTarget(*request.target)))
            for kernel in map(tuple, request.kernels):
                if kernel not in jobs:
                    jobs[kernel] = pool.submit(_compile, request.parent, *kernel)
        failed = [error for job in jobs.values() if (error := job.exception())]
        for request in requests:
            if not any(jobs[tuple(kernel)].exception() for kernel in request.kernels):
                request.mark_done()
    if failed:
        raise BaseExceptionGroup("kernels that do not compile", failed)


def _compile(parent: int, module: str, name: str, specialization: str) -> None:
    from qwantize_vllm.matmul.triton_launchers import build_launcher

    if os.getppid() != parent:
        raise RuntimeError("the process that wanted the kernels is gone")
    kernel = getattr(importlib.import_module(module), name)
    settle_key(kernel)
    build_launcher(kernel.preload(specialization))


class Target:
    """As much of a driver as compiling asks for, and no GPU; target: Triton's GPUTarget."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


if __name__ == "__main__":
    os.nice(NICENESS)
    compile_all(sys.stdin)
