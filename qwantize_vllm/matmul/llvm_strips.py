"""Decoding of whole rows on a CPU, one pass from codes to bfloat16 or float32: what PyTorch needs several passes for,
each through memory."""

from __future__ import annotations

import ctypes

from llvmlite import ir

from qwantize_vllm.matmul.llvm_code import FLOAT, INT32S, LANES, Code, int32s, int64
from qwantize_vllm.matmul.llvm_decode import Decode, read_codes, read_scales

_ROWS_A_TURN = 8  # that a thread takes at once


class StripJob(ctypes.Structure):
    """Arguments of the kernel, addresses and numbers.

    codes, scales: bytes (n, row_bytes) and (n, row_bytes * 2 / block_size), rows at their strides.
    table: float32 (256,), half the value of each E4M3 byte, as codes are decoded to twice theirs.
    global_scale: float32 (). strip: (n, row_bytes * 2), contiguous, written. next_row: 0.
    """

    NAMES = (
        *("codes", "scales", "table", "global_scale", "strip"),
        *("n", "row_bytes", "codes_stride", "scales_stride", "next_row"),
    )
    _fields_ = [(name, ctypes.c_int64) for name in NAMES]


class StripCode(Code):
    """The kernel that writes bfloat16, or float32 if not `halved`. The name of the function is "strip"."""

    def __init__(self, block_size: int, decode: Decode, halved: bool) -> None:
        super().__init__("strip")
        self.block_size, self.decode, self.halved = block_size, decode, halved
        self.job = job = self.fields(StripJob.NAMES)
        self.global_scale = self.spread(self.read(job.global_scale, FLOAT))
        self.whole_bytes = self.and_(job.row_bytes, int64(-LANES))
        self.work_off(job.address_of["next_row"], job.n, _ROWS_A_TURN, self._rows)

    def _rows(self, first: ir.Value, end: ir.Value) -> None:
        self.loop(first, end, 1, lambda row, _: self._row(row))

    def _row(self, row: ir.Value) -> tuple:
        job = self.job
        codes, scales = (
            self.add(start, self.mul(row, stride))
            for start, stride in ((job.codes, job.codes_stride), (job.scales, job.scales_stride))
        )
        # Four bytes are written for each byte of codes, or eight.
        strip = self.add(job.strip, self.shl(self.mul(row, job.row_bytes), int64(2 if self.halved else 3)))

        def step(byte: ir.Value, count: int) -> tuple:
            self._step(codes, scales, strip, byte, count)
            return ()

        self.loop(int64(0), self.whole_bytes, LANES, lambda byte, _: step(byte, LANES))
        self.only_if(
            self.icmp_signed("<", self.whole_bytes, job.row_bytes), lambda: step(self.whole_bytes, LANES // 2), []
        )
        return ()

    def _step(self, codes: ir.Value, scales: ir.Value, strip: ir.Value, byte: ir.Value, count: int) -> None:
        """Write the weights of `count` bytes."""
        packed = read_codes(self, self.add(codes, byte), count)
        scale = read_scales(self, self.job.table, scales, byte, self.block_size, count)
        low, high = (
            self.fmul(self.fmul(self.decode(self, packed, nibble), scale), self.global_scale) for nibble in (0, 1)
        )
        if self.halved:
            upper = self.and_(self._rounded(high), int32s(-1 << 16))
            pairs = self.or_(self.lshr(self._rounded(low), int32s(16)), upper)
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(count)))
            self._write(self.add(strip, self.shl(byte, int64(2))), self.shuffle_vector(pairs, pairs, lanes))
            return
        for first in range(0, count, LANES // 2):
            order = [lane + LANES * nibble for lane in range(first, first + LANES // 2) for nibble in (0, 1)]
            values = self.shuffle_vector(low, high, ir.Constant(INT32S, order))
            self._write(self.add(strip, self.shl(self.add(byte, int64(first)), int64(3))), values)

    def _rounded(self, values: ir.Value) -> ir.Value:
        """Bits whose upper halves are the nearest bfloat16, the even one of two."""
        bits = self.bitcast(values, INT32S)
        odd = self.and_(self.lshr(bits, int32s(16)), int32s(1))
        return self.add(bits, self.add(odd, int32s(0x7FFF)))

    def _write(self, address: ir.Value, values: ir.Value) -> None:
        self.store(values, self.pointer(address, values.type), align=1)
