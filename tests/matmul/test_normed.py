"""Products with the norm before them and the gate after them, in one kernel and in several."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.gluon_decode import matmul_decode
from qwantize_vllm.matmul.normed import AddedNorm, one_kernel
from qwantize_vllm.matmul.op import normed_matmul_swizzled_op
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.matmul.tile_shapes import NORMED_TOKENS, DecodeShape, choose_normed_shape
from qwantize_vllm.matmul.triton_normed import add_norm, silu_and_mul
from tests.matmul.test_matmul import exact_product, relative_error
from tests.matmul.test_swizzled_matmul import make
from tests.matmul.test_wgmma import hopper

PLACES = [("cpu", torch.float16), pytest.param(("cuda", torch.bfloat16), marks=pytest.mark.gpu)]
ROUNDED = {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # the most that rounding once changes a number by


def exact_normed_product(
    x: torch.Tensor, q: Nvfp4Tensor, bias: torch.Tensor | None, norm: AddedNorm, gated: bool
) -> torch.Tensor:
    """float64, of the sum x + residual as it is in x's dtype."""
    sums = (x + norm.residual).double()
    normed = sums / (sums.square().mean(1, keepdim=True) + norm.epsilon).sqrt() * norm.gain.double()
    y = exact_product(normed, q, bias)
    if not gated:
        return y
    gate, up = y.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def in_steps(x: torch.Tensor, q: Nvfp4Tensor, bias: torch.Tensor | None, norm: AddedNorm, gated: bool) -> torch.Tensor:
    """The same by what one kernel leaves to the next, each rounded to x's dtype."""
    sums = (x + norm.residual).float()
    normed = (sums * torch.rsqrt(sums.square().mean(1, keepdim=True) + norm.epsilon)).to(x.dtype) * norm.gain
    y = exact_product(normed, q, bias).to(x.dtype)
    if not gated:
        return y
    gate, up = y.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def make_norm(x: torch.Tensor) -> AddedNorm:
    gain = torch.linspace(0.5, 2, x.shape[1], device=x.device).to(x.dtype)
    return AddedNorm(torch.randn_like(x), gain, 1e-5, torch.empty_like(x))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("m", "k"), [(1, 16), (3, 1000), (2, 4096)])
def test_norm_of_a_sum(place, m, k):
    device, dtype = place
    x = 5 * torch.randn(m, k + 2, device=device, dtype=dtype)[:, 1 : k + 1]
    norm = make_norm(x.contiguous())
    y = add_norm(x, norm)
    assert torch.equal(norm.sums, x + norm.residual)
    sums = x.double() + norm.residual.double()
    exact = sums / (sums.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.gain.double()
    assert ((y - exact).abs() <= ROUNDED[dtype] * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("m", "n"), [(1, 8), (3, 1100), (2, 4096)])
def test_gate(place, m, n):
    device, dtype = place
    x = 3 * torch.randn(m, 2 * n, device=device, dtype=dtype)
    gate, up = x.double().chunk(2, dim=1)
    exact = torch.nn.functional.silu(gate) * up
    assert ((silu_and_mul(x) - exact).abs() <= ROUNDED[dtype] * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [1, 2, 3, 40])
def test_op(place, gated, m):
    device, dtype = place
    x, q = make(device, 256, 1024 if device == "cuda" else 96, m, dtype)
    weight, norm = swizzle(q), make_norm(x)
    bias = torch.randn(512, device=device).to(dtype)[::2]
    tensors = (weight.words, weight.scales, weight.global_scale, weight.arrived)
    y, sums = normed_matmul_swizzled_op(x, *norm[:3], *tensors, bias, 256, 16, "auto", gated)
    assert torch.equal(sums, x + norm.residual)
    exact = exact_normed_product(x, q, bias, norm, gated)
    assert y.shape == exact.shape
    assert relative_error(y, exact) < 1.1 * relative_error(in_steps(x, q, bias, norm, gated), exact)


MORE = [(DecodeShape(2, 4, 4, 4), True), (DecodeShape(4, 2, 4, 4), False)]
SIZES = [(128, 1056, 32), (256, 2080, 16), (6144, 4096, 16), (28672, 4096, 16), (28672, 4096, 32)]
CASES = [
    (shape, gated, *size)
    for size in SIZES
    for shape, gated in [
        *(
            (choose_normed_shape(9, tokens, gated, size[2]), gated)
            for tokens in NORMED_TOKENS
            for gated in (False, True)
        ),
        *MORE,
    ]
    if shape is not None
]


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "gated", "n", "k", "block_size"), CASES)
def test_one_kernel(shape, gated, n, k, block_size):
    x, q = make("cuda", n, k, shape.tokens, torch.bfloat16, block_size)
    weight, norm = swizzle(q), make_norm(x)
    y = matmul_decode(x, weight, None, shape, norm=norm, gated=gated)
    assert torch.equal(norm.sums, x + norm.residual)
    exact = exact_normed_product(x, q, None, norm, gated)
    assert relative_error(y, exact) < 1.1 * relative_error(in_steps(x, q, None, norm, gated), exact)
    for _ in range(20):
        norm.sums.zero_()
        assert torch.equal(matmul_decode(x, weight, None, shape, norm=norm, gated=gated), y)
        assert torch.equal(norm.sums, x + norm.residual)


@hopper
@pytest.mark.gpu
def test_what_one_kernel_is_for():
    x = torch.randn(4, 256, device="cuda").bfloat16()
    norm = make_norm(x)

    def of(m, **changed):
        cut = norm._replace(residual=norm.residual[:m], sums=norm.sums[:m])
        return one_kernel(x[:m], cut._replace(**changed), 128, 16, gated=True)

    assert of(1) == choose_normed_shape(9, 1, gated=True, block_size=16)
    assert of(2) == choose_normed_shape(9, 2, gated=True, block_size=16)
    assert of(3) is None
    odd = torch.zeros(1, 257, dtype=x.dtype, device="cuda")[:, 1:]
    assert of(1, residual=odd) is None
    assert of(1, gain=odd[0]) is None
    assert one_kernel(x[:1].half(), norm, 128, 16, gated=True) is None
    assert one_kernel(x[:1], norm, 64, 16, gated=True) is None


def test_on_a_cpu_there_is_no_one_kernel():
    x = torch.randn(1, 96).bfloat16()
    assert one_kernel(x, make_norm(x), 128, 16, gated=False) is None
