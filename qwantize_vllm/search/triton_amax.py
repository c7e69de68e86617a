"""max|w| of each matrix in Triton: one pass at the speed of memory.

Without its sign bit, a float is ordered as an integer; NaN comes after infinity. So the maximum is one of integers,
which programs combine by atomic_max in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.triton_launch import Launch, launch_now

_TILE = 8192  # int32 words a program, 8 warps: 8 loads of 16 bytes a thread
_INTERPRETER_TILE = 2**20


def matrix_amax_triton(weight: torch.Tensor, launch: Launch = launch_now) -> torch.Tensor:
    """max|w| of each matrix, float32 (E,), NaN where a matrix holds one.

    Args:
        weight: contiguous (E, N, K) float32, bfloat16 or float16; N*K even, and positive.
        launch: what else to do with the kernel than to run it.
    """
    e = weight.shape[0]
    out = torch.zeros(e, dtype=torch.float32, device=weight.device)
    words = weight.view(e, -1).view(torch.int32)
    tile = _INTERPRETER_TILE if weight.device.type == "cpu" else _TILE
    tiles = triton.cdiv(words.shape[1], tile)
    half = {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(weight.dtype)
    given = (words, out.view(torch.int32), words.shape[1], tiles)
    launch(_matrix_amax_kernel, (e * tiles,), *given, HALF=half, TILE=tile, num_warps=8)
    return out


@triton.jit
def _matrix_amax_kernel(words_ptr, out_ptr, words, tiles, HALF: tl.constexpr, TILE: tl.constexpr):
    """words: of one matrix; HALF: the 16-bit type of which a word holds two, or None."""
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    offset = (tl.program_id(0) % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    word = tl.load(words_ptr + matrix * words + offset, mask=offset < words, other=0)
    if HALF is None:
        amax = tl.max(word & 0x7FFFFFFF, axis=0)
    else:
        amax = tl.max(tl.maximum(word & 0x7FFF, (word >> 16) & 0x7FFF), axis=0)
        if HALF == "bfloat16":
            amax = amax << 16
        else:
            amax = amax.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    tl.atomic_max(out_ptr + matrix, amax, sem="relaxed")
