"""E4M3 and E2M1 arithmetic inside Triton kernels, without hardware conversions.

Only integer and float32 operations, so that every GPU and the interpreter compute the same bits.
Float32 denormals are used on purpose, as both formats reach their subnormal values through them.
"""

from __future__ import annotations

import triton
import triton.language as tl

_2_POW_MINUS_126 = tl.constexpr(2.0**-126)
_SIXTH = tl.constexpr(0x3E2AAAAB)  # the bits of float32 1/6


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
def e4m3_ceil(x):
    """Smallest E4M3 code (int32, 1..126) of a value that is at least x >= 0; 126 where there is none."""
    x = tl.minimum(x, 448.0)
    normal = ((x.to(tl.int32, bitcast=True) + 0xFFFFF) >> 20) - (120 << 3)
    code = tl.where(x < 0.015625, tl.ceil(x * 512.0).to(tl.int32), normal)
    return tl.minimum(tl.maximum(code, 1), 126)


@triton.jit
def e2m1_round(y):
    """Magnitude 0 <= y < 7 to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to the even code.

    E2M1 steps by p/2 where p is the power of two below y (1 below 2). Adding 1.5 * 2^22 * p leaves exactly
    such steps in a float32 mantissa.
    """
    power = tl.maximum((y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), 1.0)
    magic = tl.full(y.shape, 6291456.0, tl.float32)
    return tl.fma(power, -magic, tl.fma(power, magic, y))


@triton.jit
def e2m1_round_small(y):
    """2^-126 times a magnitude 0 <= y < 7 to 2^-126 times the nearest E2M1 magnitude, ties upwards.

    Down there a float32 has the fields of E2M1, subnormals included, and more mantissa: an integer addition rounds.
    """
    return ((y.to(tl.int32, bitcast=True) + 0x200000) & 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_encode(z, scale):
    """E2M1 code (int32) of z >= 0 at a block scale, both (TILE, BLOCK_SIZE), ties to the even code.

    z/scale is rounded once, so it is a midpoint of E2M1 only if z is the midpoint * scale.
    """
    inverse = 1.0 / scale
    y = tl.minimum(refine_quotient(z * inverse, z, scale, inverse), 6.0)
    # 2^-126 turns the eight magnitudes into the float32 (denormals) whose bits from 22 on are their codes.
    return (e2m1_round(y) * _2_POW_MINUS_126).to(tl.int32, bitcast=True) >> 22


@triton.jit
def e2m1_code(value):
    """What decode_e2m1 undoes: the code (int32) of a float32 that is an E2M1 value."""
    bits = (value * _2_POW_MINUS_126).to(tl.int32, bitcast=True)
    return ((bits >> 22) & 7) | ((bits >> 28) & 8)


@triton.jit
def e2m1_with_sign(code, w):
    """E2M1 codes of magnitudes, with the signs of w (float32)."""
    return code | ((w.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def refine_quotient(quotient, x, divisor, inverse):
    """One step closer to x/divisor: the exact remainder, times an inverse of the divisor.

    From a quotient within one unit in the last place, and with the correctly rounded inverse, this is
    the correctly rounded quotient (P. W. Markstein, IBM J. Res. Dev. 34(1), 1990). A division proper
    branches for every element. x over- or underflowing gives NaN or a quotient that is off by its last place.
    """
    return tl.fma(tl.fma(quotient, -divisor, x), inverse, quotient)


@triton.jit
def quotient(x, divisor, inverse):
    """x/divisor, correctly rounded, given the correctly rounded inverse of the divisor."""
    near = refine_quotient(x * inverse, x, divisor, inverse)
    return refine_quotient(near, x, divisor, inverse)


@triton.jit
def divide_by_six(x):
    """x/6, correctly rounded (checked for every mantissa in the tests)."""
    sixth = (tl.zeros(x.shape, tl.int32) + _SIXTH).to(tl.float32, bitcast=True)
    return refine_quotient(x * sixth, x, tl.full(x.shape, 6.0, tl.float32), sixth)


@triton.jit
def power_of_two_below(g):
    """(g', 2^-e) with g = g' * 2^e, g' in [1, 2), for a positive normal float32 g."""
    exponent = g.to(tl.int32, bitcast=True) >> 23
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return g * inverse, inverse


@triton.jit
def spread(per_block, like):
    """(TILE,) to the shape (TILE, BLOCK_SIZE) of another tensor."""
    return tl.broadcast_to(per_block[:, None], like.shape)
