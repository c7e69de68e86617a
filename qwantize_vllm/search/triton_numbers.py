"""E4M3 and E2M1 arithmetic inside Triton kernels, without hardware conversions.

Only integer and float32 operations, so that every GPU and the interpreter compute the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3_value(code):
    """float32 value of a positive E4M3 code (int32, 1..126): eight subnormal steps of 2^-9, then 3-bit mantissas."""
    normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)


@triton.jit
def e4m3_snap(x):
    """E4M3 code (int32, 1..126) nearest to x >= 0, ties to the even code, saturating at both ends."""
    x = tl.minimum(x, 448.0)
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Adding 1.5 * 2^23 leaves round-to-nearest-even of x * 2^9 in the low mantissa bits.
    subnormal = (x * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(x < 0.015625, subnormal, normal)
    return tl.minimum(tl.maximum(code, 1), 126)


@triton.jit
def e2m1_round(y):
    """Magnitude y >= 0 to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to the even code.

    Adding 1.5 * 2^22 * step rounds to a multiple of the step, ties to even multiples.
    """
    y = tl.minimum(y, 6.0)
    magic = tl.where(y < 2.0, 6291456.0, tl.where(y < 4.0, 12582912.0, 25165824.0))
    return (y + magic) - magic


@triton.jit
def e2m1_encode(w, z, scale):
    """E2M1 code (int32) of z = |w/g| at a block scale: midpoint * scale is exact, so ties are ties. Sign from w."""
    code = (z > 0.25 * scale).to(tl.int32)
    code += (z >= 0.75 * scale).to(tl.int32)
    code += (z > 1.25 * scale).to(tl.int32)
    code += (z >= 1.75 * scale).to(tl.int32)
    code += (z > 2.5 * scale).to(tl.int32)
    code += (z >= 3.5 * scale).to(tl.int32)
    code += (z > 5.0 * scale).to(tl.int32)
    return code | ((w.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def pack_words(code, BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(BLOCKS, BLOCK_SIZE) 4-bit codes -> (BLOCKS, BLOCK_SIZE/8) int32, k rising from the lowest nibble."""
    groups = tl.reshape(code, (BLOCKS, BLOCK_SIZE // 8, 8))
    return tl.sum(groups << (4 * tl.arange(0, 8))[None, None, :], axis=2)


@triton.jit
def power_of_two_below(g):
    """(g', 2^-e) with g = g' * 2^e, g' in [1, 2), for a positive normal float32 g."""
    exponent = g.to(tl.int32, bitcast=True) >> 23
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return g * inverse, inverse
