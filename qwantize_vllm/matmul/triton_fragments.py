"""How the Triton kernels read a swizzled weight; see `swizzle.py` for its layout.

Nothing here moves data between threads: loads fetch 16 bytes a thread, and reshape and permute only rename.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwantize_vllm.matmul.swizzle import COLUMNS, ROWS
from qwantize_vllm.triton_format import decode_e2m1

TILE_ROWS, TILE_COLUMNS = tl.constexpr(ROWS), tl.constexpr(COLUMNS)
_TILE_WORDS = tl.constexpr(ROWS * COLUMNS // 4)

# Registers of two words (16 bits each) to two bfloat16 of each plane, times 2^-126.
PLANES_BFLOAT16 = tl.constexpr("""
{
.reg .b32 a, b, c;
and.b32 $0, $4, 0x81C081C0;
shl.b32 a, $4, 3;
and.b32 $1, a, 0x81C081C0;
shl.b32 b, $4, 6;
and.b32 $2, b, 0x81C081C0;
shr.u32 c, $4, 8;
and.b32 c, c, 0x006C006C;
mul.lo.u32 c, c, 0x421;
and.b32 $3, c, 0x81C081C0;
}
""")
# The same for float16, whose mantissa has three bits more, times 2^-14.
PLANES_FLOAT16 = tl.constexpr("""
{
.reg .b32 a, b, c, d;
shl.b32 a, $4, 3;
shl.b32 b, $4, 6;
shl.b32 c, $4, 9;
and.b32 d, a, 0x0E000E00;
lop3.b32 $0, $4, 0x80008000, d, 0xEA;
and.b32 d, b, 0x0E000E00;
lop3.b32 $1, a, 0x80008000, d, 0xEA;
and.b32 d, c, 0x0E000E00;
lop3.b32 $2, b, 0x80008000, d, 0xEA;
shr.u32 c, $4, 8;
and.b32 c, c, 0x006C006C;
mul.lo.u32 c, c, 0x421;
shl.b32 d, c, 3;
and.b32 d, d, 0x0E000E00;
lop3.b32 $3, c, 0x80008000, d, 0xEA;
}
""")
# Two bytes of scales, 16 bits apart, to two bfloat16 of exponents e - 9 + 118, or two float16 of e - 9 + 7. One
# instruction, of which Triton would make a shift and an addition.
PAIR_BFLOAT16 = tl.constexpr("mad.lo.u32 $0, $1, 16, 0x76007600;")
PAIR_FLOAT16 = tl.constexpr("mad.lo.u32 $0, $1, 128, 0x34003400;")
# Two values times the lower or the upper one of two scales. On Ampere that is a product plus -0: it has no bfloat16
# multiplication by itself.
_TIMES = """
{{
.reg .b16 low, high;
.reg .b32 scale, zero;
mov.b32 {{low, high}}, $2;
mov.b32 scale, {{{0}, {0}}};
mov.b32 zero, 0x80008000;
fma.rn.{1} $0, $1, scale, zero;
}}
"""
TIMES_LOW_BFLOAT16 = tl.constexpr(_TIMES.format("low", "bf16x2"))
TIMES_HIGH_BFLOAT16 = tl.constexpr(_TIMES.format("high", "bf16x2"))
TIMES_LOW_FLOAT16 = tl.constexpr(_TIMES.format("low", "f16x2"))
TIMES_HIGH_FLOAT16 = tl.constexpr(_TIMES.format("high", "f16x2"))


@triton.jit
def load_words(words_ptr, first, groups, tile, tiles, GROUPS: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr):
    """Words (64 * GROUPS rows, 16 * STEPS columns of each plane), 16 contiguous bytes a thread, of STEPS tiles.

    A group that is not there repeats the last one, and so does a tile, where the tiles are not WHOLE steps.
    """
    step, part, word = tl.arange(0, STEPS), tl.arange(0, 4 * GROUPS), tl.arange(0, 256)
    group = tl.minimum(first + part // 4, groups - 1).to(tl.int64)
    part_offset = group * tiles * _TILE_WORDS + part % 4 * 256
    if not WHOLE:
        step = tl.minimum(step, tiles - 1 - tile)
    offsets = (step * _TILE_WORDS)[:, None, None] + part_offset[None, :, None] + word[None, None, :]
    words = tl.load(words_ptr + offsets + tile * _TILE_WORDS)
    words = tl.reshape(words, (STEPS, 4 * GROUPS, 8, 4, 2, 2, 2))  # step, part, r, q, k', n', k0
    words = tl.permute(words, (1, 5, 2, 0, 4, 3, 6))  # part, n', r; step, k', q, k0
    return tl.reshape(words, (GROUPS * TILE_ROWS, STEPS * 16))


@triton.jit
def load_scales(scales_ptr, first, groups, tile, tiles, GROUPS: tl.constexpr, STEPS: tl.constexpr):
    """int32 (64 * GROUPS rows, STEPS tiles); STEPS is 1, 2 or 4 and tile a multiple of it."""
    row, step = tl.arange(0, GROUPS * TILE_ROWS), tl.arange(0, STEPS)
    group = tl.minimum(first + row // TILE_ROWS, groups - 1).to(tl.int64)
    row_offset = (group * tl.cdiv(tiles, 4) * TILE_ROWS + row % TILE_ROWS) * 4
    offsets = row_offset[:, None] + step[None, :]
    start = tile // 4 * (4 * TILE_ROWS) + tl.multiple_of(tile % 4, STEPS)
    return tl.load(scales_ptr + offsets + tl.multiple_of(start, STEPS)).to(tl.int32)


@triton.jit
def scale_pairs(scales, dtype: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Two int32 of two scales in dtype each: of planes 0 (lower half) and 2, and of planes 1 and 3."""
    if BLOCK_SIZE == 32:  # a byte is for planes 0 and 1, the next one for planes 2 and 3
        first = (scales & 0xFF) | ((scales << 8) & 0x00FF0000)
        second = first
    else:
        first, second = scales & 0x00FF00FF, (scales >> 8) & 0x00FF00FF
    PAIR: tl.constexpr = PAIR_BFLOAT16 if dtype == tl.bfloat16 else PAIR_FLOAT16
    first = tl.inline_asm_elementwise(PAIR, "=r,r", [first], dtype=tl.int32, is_pure=True, pack=1)
    second = tl.inline_asm_elementwise(PAIR, "=r,r", [second], dtype=tl.int32, is_pure=True, pack=1)
    return first, second


@triton.jit
def block_values(words, scales, dtype: tl.constexpr, BLOCK_SIZE: tl.constexpr, PTX: tl.constexpr):
    """value * block_scale (rows, 64 columns of each tile); where PTX, in dtype and in units that rescale undoes."""
    first, second, third, fourth = _planes(words, dtype, PTX)
    if PTX:
        LOW: tl.constexpr = TIMES_LOW_BFLOAT16 if dtype == tl.bfloat16 else TIMES_LOW_FLOAT16
        HIGH: tl.constexpr = TIMES_HIGH_BFLOAT16 if dtype == tl.bfloat16 else TIMES_HIGH_FLOAT16
        even, odd = scale_pairs(scales, dtype, BLOCK_SIZE)
        even, odd = _spread(even), _spread(odd)
        first, third = _times(first, even, LOW), _times(third, even, HIGH)
        second, fourth = _times(second, odd, LOW), _times(fourth, odd, HIGH)
    else:
        first *= _spread(_scale_value(scales, 0, BLOCK_SIZE))
        second *= _spread(_scale_value(scales, 1, BLOCK_SIZE))
        third *= _spread(_scale_value(scales, 2, BLOCK_SIZE))
        fourth *= _spread(_scale_value(scales, 3, BLOCK_SIZE))
    rows: tl.constexpr = first.shape[0]
    tiles: tl.constexpr = first.shape[1] // 16
    joined = tl.join(tl.join(first, third), tl.join(second, fourth))  # plane = 2 * (last axis but one) + last axis
    joined = tl.permute(tl.reshape(joined, (rows, tiles, 16, 2, 2)), (0, 1, 3, 4, 2))
    return tl.reshape(joined, (rows, tiles * TILE_COLUMNS))


@triton.jit
def _times(values, pair, TIMES: tl.constexpr):
    """Each of two neighbouring 16-bit values times half of an int32, which is the same for both."""
    return tl.inline_asm_elementwise(TIMES, "=r,r,r,r", [values, pair], dtype=values.dtype, is_pure=True, pack=2)


@triton.jit
def rescale(dtype: tl.constexpr, PTX: tl.constexpr):
    """What codes (times 2^-126 or 2^-14) and scales (times 2^118 or 2^7) leave to be multiplied."""
    if not PTX:
        return 1.0
    elif dtype == tl.bfloat16:
        return 256.0
    else:
        return 128.0


@triton.jit
def _planes(words, dtype: tl.constexpr, PTX: tl.constexpr):
    """The values of each plane's codes; where PTX, in dtype and times 2^-126 (bfloat16) or 2^-14 (float16)."""
    if not PTX:
        word = words.to(tl.int32)
        first = decode_e2m1(((word >> 12) & 8) | ((word >> 6) & 7))
        second = decode_e2m1(((word >> 9) & 8) | ((word >> 3) & 7))
        third = decode_e2m1(((word >> 6) & 8) | (word & 7))
        return first, second, third, decode_e2m1(((word >> 10) & 8) | ((word >> 9) & 6) | ((word >> 14) & 1))
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            PLANES_BFLOAT16, "=r,=r,=r,=r,r", [words], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            PLANES_FLOAT16, "=r,=r,=r,=r,r", [words], dtype=(tl.float16,) * 4, is_pure=True, pack=2
        )


@triton.jit
def _spread(scale):
    """(rows, tiles) to (rows, 16 columns of a plane in each tile)."""
    return tl.reshape(
        tl.broadcast_to(scale[:, :, None], (scale.shape[0], scale.shape[1], 16)), (scale.shape[0], scale.shape[1] * 16)
    )


@triton.jit
def _scale_value(scales, plane: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """float32 of the byte of the scale of a plane's block."""
    byte = (scales >> (8 * (plane * 16 // BLOCK_SIZE))) & 0xFF
    return ((byte << 20) + (118 << 23)).to(tl.float32, bitcast=True)
