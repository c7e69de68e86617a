"""Decode and multiply in one loop on a CPU: for few tokens, where reading the weight is the cost.

A step takes 16 bytes of a row, 32 weights, and adds their products with every token's x to 16 float32
lanes; `llvm_products.py` has the two ways to do that. The row ends with the sum over lanes, times the
global scale, in float32. Two rows are taken at once, so that every x read serves both.
"""

from __future__ import annotations

import ctypes

from llvmlite import ir

from qwantize_vllm.matmul.llvm_code import FLOAT, FLOATS, LANES, Code, int64
from qwantize_vllm.matmul.llvm_decode import read_codes, read_scales
from qwantize_vllm.matmul.llvm_products import Products

_ROWS = 2
_ROWS_A_TURN = 32  # that a thread takes at once


class FusedJob(ctypes.Structure):
    """Arguments of the kernel, addresses and numbers.

    x: (m, ...) as the kernel's `Products` take it, x_stride bytes a token.
    codes, scales: bytes (n, row_bytes) and (n, row_bytes * 2 / block_size), rows at their strides.
    table: float32 (256,), half the value of each E4M3 byte, as codes are decoded to twice theirs.
    global_scale: float32 (). y: float32 (m, n), written. next_row: 0.
    """

    NAMES = (
        *("x", "codes", "scales", "table", "global_scale", "y"),
        *("m", "n", "row_bytes", "x_stride", "codes_stride", "scales_stride", "next_row"),
    )
    _fields_ = [(name, ctypes.c_int64) for name in NAMES]


class FusedCode(Code):
    """The kernel for `tokens` rows of x at a time. The name of the function is "fused"."""

    def __init__(self, tokens: int, block_size: int, products: Products) -> None:
        super().__init__("fused")
        self.tokens, self.block_size, self.products = tokens, block_size, products
        self.job = job = self.fields(FusedJob.NAMES)
        self.global_scale = self.read(job.global_scale, FLOAT)
        self.whole_bytes = self.and_(job.row_bytes, int64(-LANES))
        self.work_off(job.address_of["next_row"], job.n, _ROWS_A_TURN, self._rows)

    def _rows(self, first: ir.Value, end: ir.Value) -> None:
        """All tokens times the rows from first to end; what they read of x stays in the cache."""

        def some_tokens(token: ir.Value, _: list) -> tuple:
            self.loop(first, end, _ROWS, lambda row, _: self._tile(row, token))
            return ()

        self.loop(int64(0), self.job.m, self.tokens, some_tokens)

    def _tile(self, row: ir.Value, token: ir.Value) -> tuple:
        """_ROWS x tokens outputs. At the end of y the last row or token is computed again instead of none."""
        job = self.job
        rows = [self.minimum(self.add(row, int64(i)), self.sub(job.n, int64(1))) for i in range(_ROWS)]
        tokens = [self.minimum(self.add(token, int64(i)), self.sub(job.m, int64(1))) for i in range(self.tokens)]
        weights = [
            (self.add(job.codes, self.mul(i, job.codes_stride)), self.add(job.scales, self.mul(i, job.scales_stride)))
            for i in rows
        ]
        xs = [self.add(job.x, self.mul(i, job.x_stride)) for i in tokens]
        zeros = [ir.Constant(FLOATS, [0.0] * LANES)] * (len(rows) * len(tokens))
        sums = self.loop(
            int64(0), self.whole_bytes, LANES, lambda byte, sums: self._step(weights, xs, byte, LANES, sums), zeros
        )
        sums = self.only_if(
            self.icmp_signed("<", self.whole_bytes, job.row_bytes),
            lambda: self._step(weights, xs, self.whole_bytes, LANES // 2, sums),
            sums,
        )
        outputs = [(i, j) for i in rows for j in tokens]
        for (i, j), lanes in zip(outputs, sums, strict=True):
            address = self.add(job.y, self.shl(self.add(self.mul(j, job.n), i), int64(2)))
            self.store(self.fmul(self.sum_of_lanes(lanes), self.global_scale), self.pointer(address, FLOAT))
        return ()

    def _step(self, rows: list, xs: list, byte: ir.Value, count: int, sums: list) -> list:
        """Add the products of `count` bytes, rows in the outer and tokens in the inner order of `sums`."""
        inputs = [self.products.inputs(self, x, self.job.x_stride, byte, count) for x in xs]
        pairs = []
        for codes, scales in rows:
            packed = read_codes(self, self.add(codes, byte), count)
            scale = read_scales(self, self.job.table, scales, byte, self.block_size, count)
            weights = self.products.weights(self, packed, scale)
            pairs += [(weights, x) for x in inputs]
        return [self.products.add(self, total, *pair) for pair, total in zip(pairs, sums, strict=True)]
