"""Triton's keys of this package's kernels, made in several orders, each in a process of its own; needs no GPU.

    python -m tests.key_orders            # prints the number of functions whose keys are the same in all orders
    python -m tests.key_orders unsettled  # the same without triton_keys.py; prints those whose keys differ

A program of its own because TRITON_INTERPRET, which the tests set, must be unset when triton is imported. For another
Triton than the environment's: pip install --target FOLDER --no-deps triton==3.6.0, and PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import multiprocessing
import random
import sys

from qwantize_vllm.triton_keys import settle_key
from tests.matmul.forget import own_kernels

ORDERS = 6


def keys(order: int) -> dict[str, str]:
    kernels = {f"{kernel.module}.{kernel.__name__}": kernel for kernel in own_kernels()}
    names = sorted(kernels)
    random.Random(order).shuffle(names)
    found = {}
    for name in names:
        if sys.argv[1:] != ["unsettled"]:
            settle_key(kernels[name])
        found[name] = kernels[name].cache_key
    return found


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        first, *others = pool.map(keys, range(ORDERS), chunksize=1)
    differ = sorted(name for name, key in first.items() if any(other[name] != key for other in others))
    print(*differ or [len(first)], sep="\n")
