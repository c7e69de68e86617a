"""The two ways in which the CPU kernel multiplies the 32 weights of 16 bytes by 32 inputs, in LLVM code.

Both add to 16 float32 lanes, lane i the products of byte i; value * scale is exact in either number format.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from llvmlite import ir

from qwantize_vllm.matmul.llvm_code import FLOATS, INT16, INT32S, LANES, Code, int32s, int64
from qwantize_vllm.matmul.llvm_decode import Decode


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"


_BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)


class Products(Protocol):
    def inputs(self, code: Code, x: ir.Value, x_stride: ir.Value, byte: ir.Value, count: int) -> tuple:
        """What multiplies the weights of `count` bytes from `byte` on; x: address of a token, x_stride: its bytes."""

    def weights(self, code: Code, packed: ir.Value, scale: ir.Value) -> tuple:
        """value * scale of 16 bytes of codes, in as many parts as `inputs`."""

    def add(self, code: Code, total: ir.Value, weights: tuple, inputs: tuple) -> ir.Value: ...


@dataclasses.dataclass(frozen=True)
class FloatProducts:
    """x in float32, first its even k, then its odd k, zeros behind each: two multiply-adds, on any machine."""

    decode: Decode

    def inputs(self, code: Code, x: ir.Value, x_stride: ir.Value, byte: ir.Value, count: int) -> tuple:
        even = code.add(x, code.shl(byte, int64(2)))
        odd = code.add(even, code.lshr(x_stride, int64(1)))
        return code.read(even, FLOATS), code.read(odd, FLOATS)

    def weights(self, code: Code, packed: ir.Value, scale: ir.Value) -> tuple:
        return tuple(code.fmul(self.decode(code, packed, nibble), scale) for nibble in (0, 1))

    def add(self, code: Code, total: ir.Value, weights: tuple, inputs: tuple) -> ir.Value:
        for weight, x in zip(weights, inputs, strict=True):
            total = code.multiply_add(weight, x, total)
        return total


@dataclasses.dataclass(frozen=True)
class PairProducts:
    """x in bfloat16 as it is: VDPBF16PS of AVX-512 multiplies 16 pairs and adds them in float32.

    value * scale has six significant bits, so the upper half of its float32 is all of it, and the two
    nibbles of a byte make a pair in x's order. The instruction takes denormal x, below 1e-38, as zero.
    """

    decode: Decode

    def inputs(self, code: Code, x: ir.Value, x_stride: ir.Value, byte: ir.Value, count: int) -> tuple:
        values = code.read(code.add(x, code.shl(byte, int64(2))), ir.VectorType(INT16, 2 * count))
        if count < LANES:  # no further than x goes; the codes there are zero
            order = ir.Constant(ir.VectorType(ir.IntType(32), 2 * LANES), list(range(2 * LANES)))
            values = code.shuffle_vector(values, ir.Constant(values.type, [0] * (2 * count)), order)
        return (values,)

    def weights(self, code: Code, packed: ir.Value, scale: ir.Value) -> tuple:
        low, high = (code.bitcast(code.fmul(self.decode(code, packed, i), scale), INT32S) for i in (0, 1))
        return (code.or_(code.lshr(low, int32s(16)), high),)

    def add(self, code: Code, total: ir.Value, weights: tuple, inputs: tuple) -> ir.Value:
        dot = code.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [FLOATS, _BFLOATS, _BFLOATS])
        return code.call(dot, [total, code.bitcast(weights[0], _BFLOATS), code.bitcast(inputs[0], _BFLOATS)])
