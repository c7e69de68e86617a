"""Keys of kernels in Triton's cache that are the same in every process.

A kernel's key has the keys of the functions that it calls, and their global constants. Before Triton 3.8 (pull request
10494) it had the constants only of those functions whose own keys had been made before, for another kernel: so the key
depended on what a process, or a faster thread of it, had launched earlier, and a kernel that was compiled ahead was
compiled once more where it was launched.
"""

from __future__ import annotations

from typing import Any

_settled: dict[int, Any] = {}  # by id, as the hash of Triton's functions is their key


def settle_key(function: Any) -> None:
    """Have Triton make the keys of all functions that this one calls, each after those that it calls itself, and then
    its own. To be called before anything else asks for the key of a kernel.

    function: a JITFunction; what has no key, as a kernel that is interpreted, is left alone.
    """
    if id(function) in _settled or not hasattr(type(function), "cache_key"):
        return
    for name in function.fn.__code__.co_names:
        if (called := function.fn.__globals__.get(name)) is not function:
            settle_key(called)
    _ = function.cache_key
    _settled[id(function)] = function
