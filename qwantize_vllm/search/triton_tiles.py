"""How the search kernels read weights and write results.

A thread holds whole blocks, so that a sum over a block needs no other thread.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import driver

# One program of the interpreter costs as much as thousands of blocks in NumPy.
_INTERPRETER_TILE = 4096
_DEFAULT = 9


class LaunchShape(NamedTuple):
    """How a search is cut into programs: `tiles` tiles of `blocks` blocks each, one after the other, by `warps`."""

    blocks: int
    warps: int
    tiles: int


def launch_shape(shapes: dict[int, LaunchShape], device: torch.device, blocks: int) -> LaunchShape:
    """The shape for a device, from a kernel's table by compute capability.

    blocks: how many there are at most, which is all that the interpreter needs.

    A device that the table does not have takes the shape of Hopper, the only one that was measured; the meta
    device, for which kernels are compiled only, has that of the GPU that they are compiled for.
    """
    if device.type == "cpu":
        return LaunchShape(min(_INTERPRETER_TILE, triton.next_power_of_2(blocks)), warps=1, tiles=1)
    if device.type == "meta":
        major = driver.active.get_current_target().arch // 10
    else:
        major, _ = torch.cuda.get_device_capability(device)
    return shapes.get(major, shapes[_DEFAULT])


@triton.jit
def load_blocks(weight_ptr, start, stride_k, inside, BLOCK_SIZE: tl.constexpr):
    """Blocks that begin at the offsets start (TILE,), as they are, (TILE, BLOCK_SIZE).

    The order within a block is what store_blocks undoes: element 8*j + i is at i*BLOCK_SIZE/8 + j. Read as
    one row a block, half of it would belong to another thread, for a load fetches no more than 16 bytes.
    """
    if BLOCK_SIZE == 16:
        parts = _load_2x8(weight_ptr, start, 0, 1, stride_k, inside)
    else:
        even = _load_2x8(weight_ptr, start, 0, 2, stride_k, inside)
        odd = _load_2x8(weight_ptr, start, 1, 3, stride_k, inside)
        parts = tl.join(even, odd)
    return tl.reshape(parts, (start.shape[0], BLOCK_SIZE))


@triton.jit
def to_float32(blocks):
    """Weights of a floating type as float32."""
    if blocks.dtype == tl.bfloat16:
        # What the conversion does; Triton's interpreter converts denormals wrongly.
        return (blocks.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return blocks.to(tl.float32)


@triton.jit
def _load_2x8(weight_ptr, start, j: tl.constexpr, k: tl.constexpr, stride_k, inside):
    """Elements 8*j + i and 8*k + i of each block, (TILE, 8, 2)."""
    pointers = weight_ptr + start[:, None] + (tl.arange(0, 8) * stride_k)[None, :]
    left = tl.load(pointers + j * 8 * stride_k, mask=inside[:, None], other=0.0)
    right = tl.load(pointers + k * 8 * stride_k, mask=inside[:, None], other=0.0)
    return tl.join(left, right)


@triton.jit
def store_blocks(codes_ptr, scales_ptr, block, inside, quants, scale_code):
    """4-bit codes (TILE, BLOCK_SIZE) in the order of load_blocks, packed, and E4M3 codes (TILE,), to blocks (TILE,)."""
    words: tl.constexpr = quants.shape[1] // 8
    columns = tl.reshape(quants, (quants.shape[0], 8, words))
    packed = tl.sum(columns << (4 * tl.arange(0, 8))[None, :, None], axis=1)
    offsets = block[:, None] * words + tl.arange(0, words)[None, :]
    tl.store(codes_ptr + offsets, packed, mask=inside[:, None])
    tl.store(scales_ptr + block, scale_code.to(tl.uint8), mask=inside)


@triton.jit
def columns(x):
    """(TILE, 16 or 32) as a tuple of that many (TILE,); no data moves."""
    size: tl.constexpr = x.shape[1]
    levels: tl.constexpr = 4 if size == 16 else 5
    parts = (x,)
    for level in tl.static_range(levels - 1):
        halves = ()
        for i in tl.static_range(2**level):
            halves = halves + tl.split(tl.reshape(parts[i], (x.shape[0], size >> (level + 1), 2)))
        parts = halves
    split = ()
    for i in tl.static_range(size // 2):
        split = split + tl.split(parts[i])
    # Split into evens and odds each time, the columns are in the order of their reversed bits.
    ordered = ()
    for i in tl.static_range(size):
        ordered = ordered + (
            split[((i & 1) * 16 + (i & 2) * 4 + (i & 4) + (i & 8) // 4 + (i & 16) // 16) >> (5 - levels)],
        )
    return ordered
