"""The kernel in Gluon for few tokens, which Triton does not interpret: on a GPU, and its PTX on a CPU."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

pytest.importorskip("triton")

from qwantize_vllm import matmul_nvfp4
from qwantize_vllm.matmul import backends
from qwantize_vllm.matmul.gluon_decode import matmul_decode, why_not_decode
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.matmul.tile_shapes import RULES, DecodeShape, TileShape, choose_shape
from tests.matmul.test_matmul import TOLERANCE, exact_product, relative_error
from tests.matmul.test_swizzled_matmul import make
from tests.matmul.test_wgmma import hopper
from tests.programs import run_program

RULED = dict.fromkeys(rule.shape for rule in RULES[9] if isinstance(rule.shape, DecodeShape))
# And what else a shape can be.
SHAPES = [
    *RULED,
    DecodeShape(1, 2, 4, 2),
    DecodeShape(4, 4, 4, 1),
    DecodeShape(4, 2, 4, 4),
]
KINDS = [
    (shape, dtype, block_size)
    for shape in SHAPES
    for dtype, block_size in [(torch.bfloat16, 16), (torch.float16, 32), (torch.bfloat16, 32)]
    if shape.takes(block_size)
]


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype", "block_size"), KINDS)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (100, 1056), (130, 2080), (1024, 4096)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_against_float64(shape, dtype, block_size, n, k, with_bias):
    x, q = make("cuda", n, k, shape.tokens, dtype, block_size)
    bias = torch.randn(n, device="cuda").to(dtype) if with_bias else None
    for m in {1, (shape.tokens + 1) // 2, shape.tokens}:
        y = matmul_decode(x[:m], swizzle(q), bias, shape)
        assert y.dtype == dtype
        assert relative_error(y, exact_product(x[:m], q, bias)) < TOLERANCE[dtype]


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 4096), (4096, 14336)])
def test_sizes_of_real_layers(shape, n, k):
    x, q = make("cuda", n, k, shape.tokens, torch.bfloat16)
    weight = swizzle(q)
    y = matmul_decode(x, weight, None, shape)
    assert relative_error(y, exact_product(x, q, None)) < TOLERANCE[torch.bfloat16]
    for _ in range(20):
        assert torch.equal(matmul_decode(x, weight, None, shape), y)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 4])
def test_rows_may_have_global_scales_of_their_own(m):
    x, q = make("cuda", 136, 96, m, torch.float16)
    factor = torch.linspace(0.5, 2, 136, device="cuda")
    weight = dataclasses.replace(swizzle(q), global_scale=q.global_scale * factor)
    exact = exact_product(x, q, None) * factor.double()
    assert relative_error(matmul_nvfp4(x, weight), exact) < TOLERANCE[torch.float16]


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["million", "outlier", "sparse", "zero"])
@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_any_magnitude(kind, m, size):
    x, q = make("cuda", 72, 1056, m, torch.bfloat16, kind=kind)
    x *= size
    assert relative_error(matmul_nvfp4(x, swizzle(q)), exact_product(x, q, None)) < 3e-3


@hopper
@pytest.mark.gpu
def test_x_that_is_not_read_in_pairs_goes_elsewhere_and_is_told(caplog):
    x, q = make("cuda", 72, 1024, 2, torch.bfloat16)
    odd = torch.zeros(2, 1025, dtype=x.dtype, device="cuda")[:, 1:].copy_(x)
    backends._told.clear()
    with caplog.at_level(logging.WARNING):
        y = matmul_nvfp4(odd, swizzle(q))
    assert "multiples of 4 bytes" in caplog.text
    assert relative_error(y, exact_product(x, q, None)) < TOLERANCE[torch.bfloat16]


def test_the_compiled_kernel_on_a_cpu(tmp_path):
    lines = run_program("tests.emulate_decode", TRITON_CACHE_DIR=str(tmp_path))
    errors = {line: float(line.split()[-1]) for line in lines}
    assert len(errors) > 10
    for line, error in errors.items():
        steps = "times the error of steps" in line  # of a norm, the product and perhaps a gate
        assert error < (1.1 if steps else TOLERANCE[torch.bfloat16 if "bfloat16" in line else torch.float16]), line


def test_why_not():
    x = torch.zeros(4, 128, dtype=torch.float16)
    assert why_not_decode(x) is None
    assert why_not_decode(x[:, 2:66]) is None
    for wrong in (x[:, ::2], x[:, 1:65], torch.zeros(4, 65, dtype=torch.float16)[:, :64]):
        assert "rows of x" in why_not_decode(wrong)
    assert "at most 4 tokens, got 5" in why_not_decode(torch.zeros(5, 64))


@pytest.mark.parametrize(("groups", "tiles"), [(1, 1), (64, 64), (64, 224), (96, 64), (448, 64)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_a_rule_of_hopper_holds_the_tokens_and_without_gluon_there_is_another(groups, tiles, block_size):
    for tokens in range(1, 17):
        shape = choose_shape(9, tokens, groups, tiles, True, block_size)
        assert isinstance(shape, TileShape) or shape.takes(block_size)
        assert tokens <= shape.tokens < 2 * tokens or shape.tokens == 8
        assert isinstance(choose_shape(9, tokens, groups, tiles), TileShape)
        assert isinstance(choose_shape(8, tokens, groups, tiles, gluon=True), TileShape)
