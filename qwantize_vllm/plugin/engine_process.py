"""Offline engines that are gone, with all their memory, when their measurement is done."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def in_own_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """function(*args, **kwargs) in a fresh process; what it raises is raised here."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_call, functools.partial(function, *args, **kwargs)).result()


def _call(function: Callable[[], R]) -> R:
    """function(); an error that cannot leave the process, as those of pydantic that vLLM raises, is one that can."""
    try:
        return function()
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # of any kind: an error's own methods are called
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            raise kind(str(error)) from error
        raise


def keep_core_here() -> None:
    """Engines made from now on have their core in this process, where it has all of a batch before it starts."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


@contextlib.contextmanager
def engine(**arguments: Any) -> Iterator[Any]:
    """A `vllm.LLM` that is shut down on leaving: a process whose engine still runs does not end."""
    from vllm import LLM

    llm = LLM(**arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
