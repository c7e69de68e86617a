"""Exchange sums as the kernel for wgmma does, compiled for Hopper, on a CPU: programs that wait for each other.

    python -m tests.emulate_sums

A program of its own because TRITON_INTERPRET, which the tests set, must be unset when triton is imported. Prints the
tokens and slices of every case that went right.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from qwantize_vllm.matmul.gluon_sums import exchange_sums, finished_eights
from qwantize_vllm.matmul.partial_sums import EMPTY
from tests.ptx import Program

# Tokens of a tile, slices. In each case two consumers, of which the second is emulated.
CASES = [(64, 2), (64, 3), (64, 5), (64, 11), (128, 2), (128, 3), (128, 7), (256, 2), (256, 4)]
CONSUMERS, CONSUMER, THREADS = 2, 1, 128


@gluon.jit
def _exchange_kernel(sums_of_slices_ptr, result_ptr, sums_ptr, parts, TOKENS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    split = gl.program_id(0)
    row = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, LAYOUT))[None, :]
    place = row * TOKENS + token
    total = gl.load(sums_of_slices_ptr + split * (64 * TOKENS) + place)
    total = exchange_sums(total, sums_ptr, 1, 2, split, parts)
    first, behind = finished_eights(TOKENS, split, parts)
    gl.store(result_ptr + place, total, mask=(token // 8 >= first) & (token // 8 < behind) & (row >= 0))


def compiled(tokens: int) -> str:
    names = ("sums_of_slices_ptr", "result_ptr", "sums_ptr")
    signature = {**dict.fromkeys(names, "*fp32"), "sums_ptr": "*i32", "parts": "i32", "TOKENS": "constexpr"}
    attributes: Any = {(number,): [["tt.divisibility", 16]] for number in range(len(names))}
    source = GluonASTSource(_exchange_kernel, signature, {(4,): tokens}, attributes)
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    return ptx


def check(tokens: int, parts: int, seed: int) -> None:
    """That the tile is the sum of its slices, in whatever order programs go on, and all words are EMPTY again."""
    order = random.Random(seed)
    sums = torch.randn(parts, 64, tokens)
    places = CONSUMERS * parts
    tensors = [sums, torch.full((64, tokens), torch.nan), torch.full((places, 64, tokens), EMPTY, dtype=torch.int32)]
    starts, memory = [], np.full(256, 0xAB, np.uint8)
    for tensor in tensors:
        starts.append(len(memory))
        memory = np.concatenate([memory, tensor.view(torch.uint8).numpy().reshape(-1)])
    code = compiled(tokens)
    running = [
        Program(code, THREADS, memory).steps([*starts, parts], (split, 0, 0), (parts, 1, 1)) for split in range(parts)
    ]
    while running:
        program = order.choice(running)
        if next(program, "done") == "done":
            running.remove(program)
    _, result, words = (
        memory[start : start + tensor.nbytes].view(tensor.numpy().dtype).reshape(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    )
    assert np.abs(result - sums.sum(0).numpy()).max() < 1e-5
    assert (words == EMPTY).all()
    print(tokens, parts)


if __name__ == "__main__":
    torch.manual_seed(0)
    for seed, case in enumerate(CASES):
        check(*case, seed)
