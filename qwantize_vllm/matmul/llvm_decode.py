"""Decoding of E2M1 codes and E4M3 scales to float32 in LLVM code; no step makes a denormal, which x86 is slow at."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from qwantize_vllm.matmul.llvm_code import FLOAT, FLOATS, INT8, INT32S, INT64, LANES, Code, int32s, int64

# Twice the magnitude of each code, 0 1 2 3 4 6 8 12, a hexadecimal digit each.
_DOUBLED = 0xC8643210
_MAGNITUDES = [float(_DOUBLED >> 4 * code & 15) for code in range(8)]

# (code, packed int32 lanes, which nibble: 0 low, 1 high) -> float32 lanes, twice the value
Decode = Callable[[Code, ir.Value, int], ir.Value]


def decode_by_permutation(code: Code, packed: ir.Value, nibble: int) -> ir.Value:
    """One instruction of AVX-512: a look-up in a register by the low four bits of each lane."""
    table = ir.Constant(FLOATS, _MAGNITUDES + [-m for m in _MAGNITUDES])
    permute = code.intrinsic("llvm.x86.avx512.permvar.sf.512", FLOATS, [FLOATS, INT32S])
    return code.call(permute, [table, code.lshr(packed, int32s(4)) if nibble else packed])


def decode_by_shift(code: Code, packed: ir.Value, nibble: int) -> ir.Value:
    """On any machine: the magnitude is a digit of a constant, shifted down by four times the code."""
    digit = code.lshr(packed, int32s(2)) if nibble else code.shl(packed, int32s(2))
    magnitude = code.and_(code.lshr(int32s(_DOUBLED), code.and_(digit, int32s(28))), int32s(15))
    sign = code.and_(code.shl(packed, int32s(24 if nibble else 28)), int32s(1 << 31))
    return code.bitcast(code.or_(code.bitcast(code.sitofp(magnitude, FLOATS), INT32S), sign), FLOATS)


def read_codes(code: Code, address: ir.Value, count: int) -> ir.Value:
    """16 packed bytes as int32 lanes; with count 8, eight bytes and then zeros, reading no further."""
    packed = code.read(address, ir.VectorType(INT8, count))
    if count < LANES:
        packed = code.shuffle_vector(
            packed, ir.Constant(packed.type, [0] * count), ir.Constant(INT32S, list(range(LANES)))
        )
    return code.zext(packed, INT32S)


def read_scales(code: Code, table: ir.Value, row: ir.Value, byte: ir.Value, block_size: int, count: int) -> ir.Value:
    """The block scale of each of the 16 bytes from `byte` on, of which `count` exist, from the row's E4M3 bytes.

    table: address of 256 float32, the value of each E4M3 byte.
    """
    bytes_per_block = block_size // 2
    first = code.add(row, code.udiv(byte, int64(bytes_per_block)))
    scales = [
        code.spread(_look_up(code, table, code.add(first, int64(block))))
        for block in range(max(1, count // bytes_per_block))
    ]
    if len(scales) == 1:
        return scales[0]
    in_first = [lane < bytes_per_block for lane in range(LANES)]
    return code.select(ir.Constant(ir.VectorType(ir.IntType(1), LANES), in_first), *scales)


def _look_up(code: Code, table: ir.Value, address: ir.Value) -> ir.Value:
    byte = code.zext(code.read(address, INT8), INT64)
    return code.read(code.add(table, code.shl(byte, int64(2))), FLOAT)
