"""Decoding of E2M1 codes and E4M3 scales to float32 inside Triton kernels, by bit position alone.

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
def decode_e4m3(byte):
    """float32 value of a positive E4M3 byte (uint8)."""
    bits = byte.to(tl.int32) << 20
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
