"""The order of swizzle.py in Triton, in two launches and without scratch: a GPU that loads a model waits for it.

A thread makes two words, of a column and the next one, from the four bytes of codes that hold both: one a plane. The 32
bytes of a row and a tile are read together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.triton_launch import Launch, launch_now

_TILES = 8  # tiles a program, 16 pairs of words a thread
_SCALES = 2048  # bytes of scales a program


def swizzle_triton(
    codes: torch.Tensor,
    block_scales: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    block_size: int,
    launch: Launch = launch_now,
) -> None:
    """Fill words and scales of a SwizzledNvfp4, contiguous, from codes and block_scales of an Nvfp4Tensor (N, K).

    launch: what else to do with the kernels than to run them.
    """
    n, columns = codes.shape
    groups, tiles = words.shape[:2]
    words_grid = (triton.cdiv(tiles, _TILES), groups)
    pairs = words.view(torch.int32)
    launch(_words_kernel, words_grid, codes.contiguous(), pairs, n, columns, tiles, TILES=_TILES, num_warps=8)
    bytes_ = scales.view(torch.uint8)
    launch(
        _scales_kernel,
        (triton.cdiv(bytes_.numel(), _SCALES),),
        block_scales.contiguous().view(torch.uint8),
        bytes_,
        n,
        block_scales.shape[1],
        scales.shape[1],
        bytes_.numel(),
        ROW=256 // block_size,
        TILE=_SCALES,
        num_warps=8,
    )


# Else there would be a program for sizes that are multiples of 16, and for one group or tile.
@triton.jit(do_not_specialize=["n", "columns", "tiles"])
def _words_kernel(codes_ptr, words_ptr, n, columns, tiles, TILES: tl.constexpr):
    """columns: bytes of codes a row; words_ptr: int32, so two words each."""
    group, index = tl.program_id(1), tl.arange(0, 512 * TILES)
    tile, place = tl.program_id(0) * TILES + index // 512, index % 512
    # Of a part of 16 rows a lane has four pairs of words: of the rows r and r + 8, and the columns 2q and 2q + 8.
    part, lane, pair = place // 128, place // 4 % 32, place % 4
    row = group * 64 + part * 16 + pair % 2 * 8 + lane // 4
    column = tile * 32 + pair // 2 * 4 + lane % 4
    codes_ptr += row.to(tl.int64) * columns
    both = tl.zeros((512 * TILES,), tl.int32)
    for plane in tl.static_range(4):
        there = (row < n) & (column + 8 * plane < columns)
        byte = tl.load(codes_ptr + column + 8 * plane, mask=there, other=0).to(tl.int32)
        code = (byte & 15) | ((byte & 0xF0) << 12)
        if plane < 3:
            both |= ((code & 0x00080008) << (12 - 3 * plane)) | ((code & 0x00070007) << (6 - 3 * plane))
        else:
            both |= ((code & 0x00080008) << 10) | ((code & 0x00060006) << 9) | ((code & 0x00010001) << 14)
    tl.store(words_ptr + (group.to(tl.int64) * tiles + tile) * 512 + place, both, mask=tile < tiles)


@triton.jit(do_not_specialize=["n", "blocks", "chunks", "count"])
def _scales_kernel(block_scales_ptr, scales_ptr, n, blocks, chunks, count, ROW: tl.constexpr, TILE: tl.constexpr):
    """blocks: scales a row of the weight; ROW: bytes a row of a chunk of four tiles; count: bytes in all."""
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    chunk = index // (64 * ROW)
    row = chunk // chunks * 64 + index // ROW % 64
    column = chunk % chunks * ROW + index % ROW
    there = (row < n) & (column < blocks) & (index < count)
    code = tl.load(block_scales_ptr + row * blocks + column, mask=there, other=1).to(tl.int32)
    # A normal E4M3 has two less in its exponent. Of a subnormal, a number of 2^-9, float32 says exponent and mantissa.
    subnormal = (code.to(tl.float32).to(tl.int32, bitcast=True) >> 20) - (127 << 3)
    byte = tl.where(code < 8, subnormal, code + 16)
    tl.store(scales_ptr + index, tl.where(there, byte, 0).to(tl.uint8), mask=index < count)
