"""Share out the tiles of experts as the kernel for wgmma does, compiled for Hopper, on a CPU.

    python -m tests.emulate_places

A program of its own because TRITON_INTERPRET, which the tests set, must be unset when triton is imported. Prints the
slots, the filled ones, and the tiles of rows of every case that went right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from qwantize_vllm.matmul.gluon_grouped import _place, _works
from tests.ptx import Program

# Slots of a plan, those that have an expert, tiles of rows: the slots are shared out in bands of eight.
CASES = [(16, 13, 18), (12, 8, 5), (20, 17, 3), (9, 1, 1), (8, 8, 7), (6, 0, 4)]
PROGRAMS, TOKENS, START = 12, 128, 256


@gluon.jit
def _places_kernel(times_ptr, program_ptr, plan_ptr, filled_at, row_tiles, TOKENS: gl.constexpr):
    """How often each tile is met, and by which program; a tile of another expert than its slot's is not met."""
    extent = (0, 0, 0, filled_at, row_tiles)
    filled, works = _works(extent, plan_ptr)
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        expert, slot, row = _place(work, filled, row_tiles, plan_ptr, TOKENS)
        if expert == slot + 100:
            tile = slot * row_tiles + row
            gl.store(times_ptr + tile, gl.load(times_ptr + tile) + 1)
            gl.store(program_ptr + tile, gl.program_id(0))


def compiled() -> str:
    signature = {**dict.fromkeys(("times_ptr", "program_ptr", "plan_ptr"), "*i32"), "filled_at": "i32"}
    signature |= {"row_tiles": "i32", "TOKENS": "constexpr"}
    source = GluonASTSource(_places_kernel, signature, {(5,): TOKENS})
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ptx"]
    return ptx


def check(code: str, slots: int, filled: int, row_tiles: int) -> None:
    """That every filled tile is met once, no other is met, and no program has two tiles more than another."""
    times, program = np.zeros((slots, row_tiles), np.int32), np.full((slots, row_tiles), -1, np.int32)
    plan = np.array([slot + 100 if slot < filled else -1 for slot in range(slots)] + [filled], np.int32)
    starts: list[Any] = [START, START + times.nbytes, START + 2 * times.nbytes]
    memory = np.concatenate(
        [np.zeros(START, np.uint8), *(each.reshape(-1).view(np.uint8) for each in (times, program, plan))]
    )
    for number in range(PROGRAMS):
        Program(code, 32, memory).run([*starts, slots, row_tiles], (number, 0, 0), (PROGRAMS, 1, 1))
    times, program = (memory[start : start + times.nbytes].view(np.int32).reshape(times.shape) for start in starts[:2])
    assert (times[:filled] == 1).all()
    assert (times[filled:] == 0).all()
    shares = np.bincount(program[:filled].reshape(-1), minlength=PROGRAMS)
    assert shares.max() - shares.min() <= 1
    print(slots, filled, row_tiles)


if __name__ == "__main__":
    code = compiled()
    for case in CASES:
        check(code, *case)
