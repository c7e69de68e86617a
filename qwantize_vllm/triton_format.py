"""NVFP4 inside Triton kernels: E2M1 and E4M3 codes to float32, by bit position alone.

A small float's exponent and mantissa bits, moved to the same place of a float32, are its value
times a power of two, subnormals included: E2M1 (bias 1) times 2^-126, E4M3 (bias 7) times 2^-120.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_e2m1(code):
    """float32 value of the low nibble of an int32; higher bits are ignored."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def decode_e4m3(code):
    """float32 value of a non-negative E4M3 code (uint8 or int32, 0..126)."""
    bits = code.to(tl.int32) << 20
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
