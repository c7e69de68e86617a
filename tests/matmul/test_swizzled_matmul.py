"""The kernels that multiply by a swizzled weight: interpreted, and on a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton")

from qwantize_vllm import matmul_nvfp4, quantize_nvfp4
from qwantize_vllm.format import FLOAT_DTYPES, Nvfp4Tensor
from qwantize_vllm.matmul import triton_swizzled
from qwantize_vllm.matmul.backends import SWIZZLED_BACKENDS
from qwantize_vllm.matmul.op import matmul_swizzled_op
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.matmul.tile_shapes import ANY_TOKENS, ELSEWHERE, RULES, TileShape, choose_shape
from qwantize_vllm.matmul.triton_swizzled import matmul_swizzled
from qwantize_vllm.matmul.triton_unswizzle import dequantize_swizzled
from tests.matmul.test_matmul import (
    INTERPRETED_BFLOAT16,
    TOLERANCE,
    biases,
    exact_product,
    relative_error,
    unit_weight,
)
from tests.numbers import make_weight

HALVES = [torch.bfloat16, torch.float16]


def tolerance(device, dtype):
    return INTERPRETED_BFLOAT16 if device == "cpu" and dtype == torch.bfloat16 else TOLERANCE[dtype]


def make(device, n, k, m, dtype, block_size=16, kind="gaussian"):
    torch.manual_seed(0)
    q = quantize_nvfp4(make_weight(kind, n, k, dtype).to(device), block_size=block_size)
    return torch.randn(m, k, device=device).to(dtype), q


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (9, 32), (130, 2080)])
@pytest.mark.parametrize("m", [1, 9, 70])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_against_float64(kernel_on, dtype, block_size, n, k, m, with_bias):
    x, q = make(kernel_on, n, k, m, dtype, block_size)
    bias = torch.randn(n, device=kernel_on).to(dtype) if with_bias else None
    weight = swizzle(q)
    y = matmul_nvfp4(x, weight, bias)
    assert y.dtype == dtype
    assert y.shape == (m, n)
    assert relative_error(y, exact_product(x, q, bias)) < tolerance(kernel_on, dtype)
    assert not weight.arrived.any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias_dtype", [*FLOAT_DTYPES, torch.float64])
@pytest.mark.parametrize("backend", SWIZZLED_BACKENDS)
@pytest.mark.parametrize("m", [1, 40])
def test_a_bias_of_any_dtype_and_strides(kernel_on, dtype, bias_dtype, backend, m):
    x, q = make(kernel_on, 48, 64, m, dtype)
    for bias in biases(48, bias_dtype, kernel_on):
        y = matmul_nvfp4(x, swizzle(q), bias, backend)
        assert y.dtype == dtype
        assert relative_error(y, exact_product(x, q, bias)) < tolerance(kernel_on, dtype)


@pytest.mark.parametrize("backend", SWIZZLED_BACKENDS)
@pytest.mark.parametrize("m", [1, 40, 300])
def test_a_bias_is_added_as_it_is(kernel_on, backend, m):
    """It takes away the product but for a little, which is lost where it is rounded to x's dtype first."""
    q = unit_weight(40, 64).to(kernel_on)
    x = torch.nn.functional.one_hot(torch.full((m,), 7), 64).bfloat16().to(kernel_on)
    bias = 2.0**-12 - q.dequantize()[:, 7]
    assert (matmul_nvfp4(x, swizzle(q), bias, backend) == 2.0**-12).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["million", "outlier", "sparse", "zero"])
def test_any_magnitude(kernel_on, dtype, kind):
    x, q = make(kernel_on, 70, 1056, 3, dtype, kind=kind)
    x /= 64  # so that float16 does not overflow
    y = matmul_nvfp4(x, swizzle(q))
    assert relative_error(y, exact_product(x, q, None)) < tolerance(kernel_on, dtype)


RULED = [rule.shape for rules in (*RULES.values(), ELSEWHERE) for rule in rules]
SHAPES = [shape for shape in dict.fromkeys(RULED) if isinstance(shape, TileShape)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("splits", [pytest.param(1, marks=pytest.mark.gpu), 3])
def test_every_shape_and_number_of_slices(kernel_on, monkeypatch, shape, splits):
    x, q = make(kernel_on, 100, 1152, 21, torch.float16)
    monkeypatch.setattr(triton_swizzled, "_splits", lambda *_: splits)
    weight = swizzle(q)
    y = matmul_swizzled(x, weight, None, shape)
    assert relative_error(y, exact_product(x, q, None)) < TOLERANCE[torch.float16]
    assert not weight.arrived.any()
    assert torch.equal(matmul_swizzled(x, weight, None, shape), y)


@pytest.mark.parametrize("major", [None, 8, 9, 10, 12])
def test_every_gpu_has_a_shape_for_few_tokens_and_none_for_many(major):
    for groups, tiles in ((1, 1), (64, 224), (448, 64)):
        shapes = [choose_shape(major, tokens, groups, tiles) for tokens in range(1, 2048)]
        few = shapes.index(None)
        assert few >= 64
        assert not any(shapes[few:])
        for tokens, shape in enumerate(shapes[:few], start=1):
            assert shape.tokens >= min(tokens, 64)
            assert shape.tokens <= max(2 * tokens, 64)


def test_x_of_any_strides_and_dimensions(kernel_on):
    _, q = make(kernel_on, 48, 64, 1, torch.float16)
    wide = torch.randn(6, 128, device=kernel_on).half()
    narrow = torch.randn(64, 6, device=kernel_on).half().T
    for x in (wide[:, ::2], wide[:, 64:], narrow, wide.view(2, 3, 128)[..., :64], wide[:0, :64], wide[0, ::2]):
        y = matmul_nvfp4(x, swizzle(q))
        assert y.shape == (*x.shape[:-1], 48)
        assert relative_error(y, exact_product(x, q, None)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("backend", SWIZZLED_BACKENDS)
def test_columns_of_x_may_be_farther_apart_than_an_int32_says(kernel_on, tmp_path, backend):
    m, k = 2, 48
    stride = 2**31 // (k - 1) + 1
    size = (k - 1) * stride + m
    if kernel_on == "cpu":  # a file with holes, which takes no memory
        numbers = torch.from_file(str(tmp_path / "x"), shared=True, size=size, dtype=torch.float16)
    else:
        numbers = torch.empty(size, dtype=torch.float16, device=kernel_on)
    near, q = make(kernel_on, 64, k, m, torch.float16)
    x = numbers.as_strided((m, k), (1, stride)).copy_(near)
    y = matmul_nvfp4(x, swizzle(q), backend=backend)
    assert torch.equal(y, matmul_nvfp4(near, swizzle(q), backend=backend))


def test_rows_may_have_global_scales_of_their_own(kernel_on):
    x, q = make(kernel_on, 70, 96, 5, torch.float16)
    factor = torch.linspace(0.5, 2, 70, device=kernel_on)
    weight = dataclasses.replace(swizzle(q), global_scale=q.global_scale * factor)
    exact = exact_product(x, q, None) * factor.double()
    assert relative_error(matmul_nvfp4(x, weight), exact) < TOLERANCE[torch.float16]
    dense = dequantize_swizzled(weight, torch.float32)
    assert torch.allclose(dense, q.dequantize() * factor[:, None], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("n", "k", "block_size"), [(64, 256, 16), (9, 32, 32), (130, 2080, 16)])
def test_dequantized_bits_are_those_of_the_tensor(kernel_on, dtype, n, k, block_size):
    _, q = make(kernel_on, n, k, 1, torch.bfloat16, block_size, "student")
    got, wanted = dequantize_swizzled(swizzle(q), dtype), q.dequantize(dtype)
    if kernel_on == "cpu" and dtype == torch.bfloat16:
        assert (got.view(torch.int16) - wanted.view(torch.int16)).abs().max() <= 1  # the interpreter truncates
    else:
        assert torch.equal(got, wanted)


def test_many_tokens_are_dequantized_for(kernel_on):
    x, q = make(kernel_on, 70, 96, 700, torch.float16)
    assert relative_error(matmul_nvfp4(x, swizzle(q)), exact_product(x, q, None)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("m", [2, 20, 90, pytest.param(700, marks=pytest.mark.gpu)])
def test_batch_invariance(kernel_on, monkeypatch, exact_products, m):
    """The halves of K cancel each other: all that is left is how each sum was rounded on the way, and K, where it may
    be cut, is cut otherwise every time."""
    x, q = make("cpu", 100, 528, m, torch.bfloat16)
    twice = Nvfp4Tensor(q.codes.repeat(1, 2), q.block_scales.repeat(1, 2), q.global_scale)
    x, weight = torch.cat((x, -x), 1).to(kernel_on), swizzle(twice.to(kernel_on))
    slices = itertools.cycle((1, 2))
    monkeypatch.setattr(triton_swizzled, "_splits", lambda *_: next(slices))
    y = matmul_nvfp4(x, weight, backend="batch_invariant")
    assert torch.equal(y[1:2], matmul_nvfp4(x[1:2], weight, backend="batch_invariant"))
    assert torch.equal(y[-1:], matmul_nvfp4(x[-1:], weight, backend="batch_invariant"))
    assert torch.equal(y[:1], matmul_swizzled(x[:1], weight, None, ANY_TOKENS, split=False))
    cut, whole = (matmul_swizzled(x[:1], weight, None, ANY_TOKENS) for _ in range(2))
    assert not torch.equal(cut, whole)


def test_wrong_input_is_refused(kernel_on):
    x, q = make(kernel_on, 48, 64, 3, torch.float16)
    weight = swizzle(q)
    with pytest.raises(ValueError, match=r"swizzled weight takes x in one of .*float32"):
        matmul_nvfp4(x.float(), weight)
    with pytest.raises(ValueError, match=r"x must be \(..., 64\)"):
        matmul_nvfp4(x[:, :32], weight)
    with pytest.raises(ValueError, match=r"backend must be one of .*batch_invariant.* got 'fused'"):
        matmul_nvfp4(x, weight, backend="fused")


def test_the_op_is_registered_as_pytorch_wants_it(kernel_on):
    x, q = make(kernel_on, 48, 64, 3, torch.float16)
    w = swizzle(q)
    arguments = (x, w.words, w.scales, w.global_scale, w.arrived, None, 48, 16, "auto")
    torch.library.opcheck(matmul_swizzled_op, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 32, 40, 128, 200, 400, 1000])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 4096), (4096, 14336)])
def test_sizes_of_real_layers(m, n, k):
    """Often, for a kernel whose parts do not wait for each other may well be right most of the time."""
    x, q = make("cuda", n, k, m, torch.bfloat16)
    weight = swizzle(q)
    y = matmul_nvfp4(x, weight)
    assert relative_error(y, exact_product(x, q, None)) < TOLERANCE[torch.bfloat16]
    for _ in range(20):
        assert torch.equal(matmul_nvfp4(x, weight), y)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 100, 1000])
def test_a_cuda_graph_replays_with_new_inputs_and_new_weights(m):
    x, q = make("cuda", 512, 2048, m, torch.bfloat16)
    weight = swizzle(q)
    matmul_nvfp4(x, weight)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul_nvfp4(x, weight)
    x.copy_(torch.randn_like(x))
    fresh = swizzle(quantize_nvfp4(make_weight("student", 512, 2048, torch.bfloat16).cuda()))
    weight.words.copy_(fresh.words), weight.scales.copy_(fresh.scales), weight.global_scale.copy_(fresh.global_scale)
    for _ in range(3):
        graph.replay()
        assert torch.equal(y, matmul_nvfp4(x, fresh))
