"""How the Gluon kernel makes a wgmma operand of a tile of a swizzled weight; see `swizzle.py` for its layout.

Codes and scales come from shared memory, 16 bytes a thread; after that nothing moves between threads: layouts that
differ in name alone are converted with assert_trivial.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qwantize_vllm.matmul.triton_fragments import (
    PAIR_BFLOAT16,
    PAIR_FLOAT16,
    PLANES_BFLOAT16,
    PLANES_FLOAT16,
    TIMES_HIGH_BFLOAT16,
    TIMES_HIGH_FLOAT16,
    TIMES_LOW_BFLOAT16,
    TIMES_LOW_FLOAT16,
)


@gluon.jit
def load_scales(buffer, DOT: gl.constexpr):
    """The scales of a chunk (64 rows, 4 tiles), one tensor a tile: a thread has those of its rows r and r + 8."""
    THREADS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]],
        lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
    ROW: gl.constexpr = gl.SliceLayout(1, DOT)
    even, odd = gl.split(gl.reshape(buffer.reshape((64, 4)).load(THREADS), (64, 2, 2)))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.convert_layout(first, ROW, assert_trivial=True),
        gl.convert_layout(second, ROW, assert_trivial=True),
        gl.convert_layout(third, ROW, assert_trivial=True),
        gl.convert_layout(fourth, ROW, assert_trivial=True),
    )


@gluon.jit
def decode_tile(buffer, tile: gl.constexpr, scales, dtype: gl.constexpr, BLOCK_SIZE: gl.constexpr, DOT: gl.constexpr):
    """value * block_scale of a tile of a chunk, four planes (64 rows, 16 columns), in units that the end undoes."""
    THREADS: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    words = gl.reshape(buffer.slice(4 * tile, 4, 0).load(THREADS), (4, 8, 4, 2, 2, 2))  # part, r, q, k', n', k0
    words = gl.reshape(gl.permute(words, (0, 4, 1, 3, 2, 5)), (64, 16))
    words = gl.convert_layout(words, DOT, assert_trivial=True)
    even, odd = scale_pairs(scales[tile].to(gl.int32), dtype, BLOCK_SIZE)
    ASM: gl.constexpr = "=r,=r,=r,=r,r"
    if dtype == gl.bfloat16:
        a, b, c, d = gl.inline_asm_elementwise(PLANES_BFLOAT16, ASM, [words], (gl.bfloat16,) * 4, is_pure=True, pack=2)
    else:
        a, b, c, d = gl.inline_asm_elementwise(PLANES_FLOAT16, ASM, [words], (gl.float16,) * 4, is_pure=True, pack=2)
    return _times(a, even, 0), _times(b, odd, 0), _times(c, even, 1), _times(d, odd, 1)


@gluon.jit
def scale_pairs(scales, dtype: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """As in triton_fragments.py: two int32 of two scales each, of planes 0 and 2, and of planes 1 and 3."""
    if BLOCK_SIZE == 32:
        first = (scales & 0xFF) | ((scales << 8) & 0x00FF0000)
        second = first
    else:
        first, second = scales & 0x00FF00FF, (scales >> 8) & 0x00FF00FF
    PAIR: gl.constexpr = PAIR_BFLOAT16 if dtype == gl.bfloat16 else PAIR_FLOAT16
    first = gl.inline_asm_elementwise(PAIR, "=r,r", [first], dtype=gl.int32, is_pure=True, pack=1)
    second = gl.inline_asm_elementwise(PAIR, "=r,r", [second], dtype=gl.int32, is_pure=True, pack=1)
    return first, second


@gluon.jit
def _times(values, pair, HIGH: gl.constexpr):
    """values (rows, 16 columns of a plane) by the lower or the upper one of two scales (rows,)."""
    LOW: gl.constexpr = TIMES_LOW_BFLOAT16 if values.dtype == gl.bfloat16 else TIMES_LOW_FLOAT16
    UPPER: gl.constexpr = TIMES_HIGH_BFLOAT16 if values.dtype == gl.bfloat16 else TIMES_HIGH_FLOAT16
    TIMES: gl.constexpr = UPPER if HIGH else LOW
    values, pair = gl.broadcast(values, gl.expand_dims(pair, 1))
    return gl.inline_asm_elementwise(TIMES, "=r,r,r,r", [values, pair], dtype=values.dtype, is_pure=True, pack=2)
