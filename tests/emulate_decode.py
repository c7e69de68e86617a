"""Multiply with the kernel for few tokens, compiled for Hopper, on a CPU: the errors against float64.

    python -m tests.emulate_decode

A program of its own because TRITON_INTERPRET, which the tests set, must be unset when triton is imported.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.matmul.gluon_decode import matmul_decode, why_not_decode
from qwantize_vllm.matmul.normed import AddedNorm
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.matmul.tile_shapes import DecodeShape
from tests.matmul.test_matmul import exact_product, relative_error
from tests.matmul.test_normed import exact_normed_product, in_steps
from tests.ptx import Program

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
POINTERS = {BFLOAT16: "*bf16", FLOAT16: "*fp16", torch.int16: "*i16", torch.int32: "*i32", torch.float32: "*fp32"}
# Shape, tokens, N, K, dtype, block size.
CASES = [
    ((1, 2, 4, 2), 1, 64, 512, BFLOAT16, 16),
    ((1, 1, 4, 4), 1, 70, 544, FLOAT16, 32),
    ((1, 4, 2, 4), 1, 130, 2080, BFLOAT16, 16),
    ((2, 2, 4, 2), 2, 64, 512, BFLOAT16, 16),
    ((2, 4, 4, 1), 1, 9, 32, FLOAT16, 32),
    ((4, 2, 4, 2), 4, 40, 784, FLOAT16, 16),
    ((4, 1, 4, 4), 3, 33, 1056, BFLOAT16, 32),
    ((1, 1, 4, 8), 1, 40, 2080, BFLOAT16, 32),
    ((1, 1, 4, 8), 1, 16, 4096, FLOAT16, 16),
    ((2, 1, 4, 8), 2, 33, 2112, BFLOAT16, 16),
    ((2, 1, 4, 8), 1, 16, 1056, FLOAT16, 32),
    ((1, 1, 2, 16), 1, 40, 4096, BFLOAT16, 16),
    ((1, 1, 2, 16), 1, 16, 2080, FLOAT16, 16),
    ((2, 1, 2, 16), 2, 33, 2112, BFLOAT16, 16),
    ((2, 1, 2, 8), 2, 16, 2048, FLOAT16, 16),
]
# Shape, tokens, N, K, gated, block size.
NORMED_CASES = [
    ((1, 1, 4, 8), 1, 40, 2080, False, 16),
    ((1, 2, 4, 8), 1, 256, 2048, True, 16),
    ((1, 2, 4, 4), 1, 128, 544, True, 32),
    ((2, 1, 4, 8), 2, 24, 2112, False, 32),
    ((2, 4, 4, 2), 2, 256, 512, True, 16),
    ((2, 2, 4, 2), 1, 128, 1024, True, 32),
    ((1, 2, 2, 4), 1, 128, 1056, True, 16),
    ((2, 4, 2, 4), 2, 256, 2048, True, 16),
    ((2, 1, 2, 8), 2, 40, 2080, False, 16),
]


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """What a launcher ends with, without a GPU."""
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    constants |= {name: value for name, value in named.items() if value is None}
    kinds = {name: POINTERS[value.dtype] for name, value in named.items() if isinstance(value, torch.Tensor)}
    kinds |= {name: "fp32" for name, value in named.items() if isinstance(value, float)}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    compiled = triton.compile(
        GluonASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": constants["num_warps"]},
    )
    memory, parameters, places = bytearray(4096), [], {}
    for name, value in named.items():
        if name in constants:
            continue
        if isinstance(value, torch.Tensor):
            places[name] = len(memory)
            parameters.append(len(memory) + value.storage_offset() * value.itemsize)
            memory += bytes(value.untyped_storage())
            memory += bytes(-len(memory) % 256 + 256)
        else:
            parameters.append(int(np.float32(value).view(np.uint32)) if isinstance(value, float) else value)
    program = Program(compiled.asm["ptx"], 32 * constants["num_warps"], np.frombuffer(memory, np.uint8))
    sizes = (*grid, 1, 1)[:3]
    for place in itertools.product(*map(range, sizes)):
        program.run(parameters, place, sizes)
    for name in {"y_ptr", "sums_ptr"} & places.keys():
        result = torch.from_numpy(program.memory[places[name] :][: named[name].nbytes].copy())
        named[name].view(-1).view(torch.uint8).copy_(result)


def main() -> None:
    products()
    normed_products()


def products() -> None:
    for number, (shape, m, n, k, dtype, block_size) in enumerate(CASES):
        torch.manual_seed(number)
        q = quantize_nvfp4(0.03 * torch.randn(n, k), block_size=block_size)
        # Rows of x that do not follow each other, scales of the rows' own, and a bias: each in some of the cases.
        x = torch.randn(m, k + 6).to(dtype)[:, 4 : 4 + k] if number % 3 == 1 else torch.randn(m, k).to(dtype)
        factor = torch.linspace(0.5, 2, n) if number % 2 else torch.ones(())
        bias = torch.randn(n).to(dtype) if number % 3 == 2 else None
        weight = dataclasses.replace(swizzle(q), global_scale=q.global_scale * factor)
        assert why_not_decode(x) is None
        y = matmul_decode(x, weight, bias, DecodeShape(*shape), launch=run)
        exact = exact_product(x, q, None) * factor.double() + (0 if bias is None else bias.double())
        print(shape, m, n, k, dtype, block_size, f"error {relative_error(y, exact):.2e}", flush=True)


def normed_products() -> None:
    for number, (shape, m, n, k, gated, block_size) in enumerate(NORMED_CASES):
        torch.manual_seed(number)
        q = quantize_nvfp4(0.03 * torch.randn(n, k), block_size=block_size)
        x, residual = torch.randn(2, m, k, dtype=BFLOAT16)
        gain = torch.linspace(0.5, 2, k).to(BFLOAT16)
        bias = torch.randn(n).to(BFLOAT16) if number % 2 else None
        norm = AddedNorm(residual, gain, 1e-5, torch.empty_like(x))
        y = matmul_decode(x, swizzle(q), bias, DecodeShape(*shape), launch=run, norm=norm, gated=gated)
        assert torch.equal(norm.sums, x + residual)
        exact = exact_normed_product(x, q, bias, norm, gated)
        error = relative_error(y, exact) / relative_error(in_steps(x, q, bias, norm, gated), exact)
        print(shape, m, n, k, f"gated {gated}, times the error of steps: {error:.2f}", flush=True)


if __name__ == "__main__":
    main()
