"""How the Triton kernels read a swizzled weight; see `swizzle.py` for its layout.

Nothing here moves data between threads: loads fetch 16 bytes a thread, and reshape and permute only rename.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwantize_vllm.matmul.swizzle import COLUMNS, DEPTH, ROWS
from qwantize_vllm.matmul.triton_decode import decode_e2m1

TILE_ROWS, TILE_COLUMNS, TILE_DEPTH = tl.constexpr(ROWS), tl.constexpr(COLUMNS), tl.constexpr(DEPTH)

# Registers of two words (16 bits each) to two bfloat16 of each plane, times 2^-126. Plane 3 has its magnitude in
# two places.
_PLANES_BFLOAT16 = tl.constexpr("""
{
.reg .b32 a, b, c;
and.b32 $0, $4, 0x81C081C0;
shl.b32 a, $4, 3;
and.b32 $1, a, 0x81C081C0;
shl.b32 a, $4, 6;
and.b32 $2, a, 0x81C081C0;
shl.b32 a, $4, 1;
shr.u32 b, $4, 5;
shr.u32 c, $4, 4;
and.b32 a, a, 0x80008000;
lop3.b32 a, b, 0x01000100, a, 0xEA;
lop3.b32 $3, c, 0x00C000C0, a, 0xEA;
}
""")
# The same for float16, whose mantissa has three bits more, times 2^-14.
_PLANES_FLOAT16 = tl.constexpr("""
{
.reg .b32 a, b, s;
shl.b32 a, $4, 3;
and.b32 a, a, 0x0E000E00;
lop3.b32 $0, $4, 0x80008000, a, 0xEA;
shl.b32 a, $4, 6;
and.b32 a, a, 0x0E000E00;
shl.b32 s, $4, 3;
lop3.b32 $1, s, 0x80008000, a, 0xEA;
shl.b32 a, $4, 9;
and.b32 a, a, 0x0E000E00;
shl.b32 s, $4, 6;
lop3.b32 $2, s, 0x80008000, a, 0xEA;
shr.u32 a, $4, 2;
shr.u32 b, $4, 1;
shl.b32 s, $4, 1;
and.b32 a, a, 0x08000800;
lop3.b32 a, b, 0x06000600, a, 0xEA;
lop3.b32 $3, s, 0x80008000, a, 0xEA;
}
""")


@triton.jit
def word_offsets(first, groups, tiles, GROUPS: tl.constexpr):
    """(step, part, lane and word) of the first tile of each group, 16 contiguous bytes a thread.

    A group that is not there repeats the last one; its rows are not stored.
    """
    step, part, word = tl.arange(0, 4), tl.arange(0, 4 * GROUPS), tl.arange(0, 256)
    group = tl.minimum(first + part // 4, groups - 1).to(tl.int64)
    part_offset = group * tiles * (TILE_ROWS * TILE_DEPTH) + part % 4 * 256
    return step[:, None, None] * 1024 + part_offset[None, :, None] + word[None, None, :]


@triton.jit
def scale_offsets(first, groups, tiles, GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(row, block of a plane) of the first tile of each group."""
    blocks: tl.constexpr = TILE_DEPTH // BLOCK_SIZE
    row = tl.arange(0, GROUPS * TILE_ROWS)
    group = tl.minimum(first + row // TILE_ROWS, groups - 1).to(tl.int64)
    row_offset = group * tiles * (TILE_ROWS * blocks) + row % TILE_ROWS * blocks
    return row_offset[:, None] + tl.arange(0, blocks)[None, :]


@triton.jit
def as_matrix(words):
    """(step, part, 256) to rows and columns of a plane, without moving a word: see swizzle.py."""
    words = tl.reshape(words, (4, words.shape[1], 8, 4, 2, 2, 2))  # step, part, r, q, k', n', k0
    words = tl.permute(words, (1, 5, 2, 0, 4, 3, 6))  # part, n', r; step, k', q, k0
    return tl.reshape(words, (words.shape[0] * 16, TILE_DEPTH))


@triton.jit
def planes(words, dtype: tl.constexpr, PTX: tl.constexpr):
    """The values of each plane's codes; where PTX, in dtype and times 2^-126 (bfloat16) or 2^-14 (float16)."""
    if not PTX:
        word = words.to(tl.int32)
        first = decode_e2m1(((word >> 12) & 8) | ((word >> 6) & 7))
        second = decode_e2m1(((word >> 9) & 8) | ((word >> 3) & 7))
        third = decode_e2m1(((word >> 6) & 8) | (word & 7))
        return first, second, third, decode_e2m1(((word >> 11) & 12) | ((word >> 10) & 3))
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _PLANES_BFLOAT16, "=r,=r,=r,=r,r", [words], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            _PLANES_FLOAT16, "=r,=r,=r,=r,r", [words], dtype=(tl.float16,) * 4, is_pure=True, pack=2
        )


@triton.jit
def spread(scale, BLOCK_SIZE: tl.constexpr):
    """(rows, blocks of a plane) to (rows, columns of a plane)."""
    spread = tl.broadcast_to(scale[:, :, None], (scale.shape[0], TILE_DEPTH // BLOCK_SIZE, BLOCK_SIZE))
    return tl.reshape(spread, (scale.shape[0], TILE_DEPTH))


@triton.jit
def scale_value(byte):
    """float32 value of the byte of a scale (int32)."""
    return ((byte << 20) + (118 << 23)).to(tl.float32, bitcast=True)
