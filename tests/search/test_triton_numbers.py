"""The arithmetic that the search kernels are made of, against PyTorch's: every code, every tie and its neighbours."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from qwantize_vllm.format import e2m1_values, e4m3_values, round_to_e2m1  # noqa: E402
from qwantize_vllm.search import triton_numbers as numbers  # noqa: E402
from qwantize_vllm.search.quantize import matrix_amax  # noqa: E402
from qwantize_vllm.search.triton_amax import matrix_amax_triton  # noqa: E402
from qwantize_vllm.triton_format import decode_e4m3  # noqa: E402


@triton.jit
def _apply(x_ptr, y_ptr, out_ptr, n, NAME: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + at, mask=at < n, other=1.0)
    y = tl.load(y_ptr + at, mask=at < n, other=1.0)
    if NAME == "value":
        out = decode_e4m3(x.to(tl.int32))
    elif NAME == "snap":
        out = numbers.e4m3_snap(x).to(tl.float32)
    elif NAME == "ceil":
        out = numbers.e4m3_ceil(x).to(tl.float32)
    elif NAME == "round":
        out = numbers.e2m1_round(x)
    elif NAME == "round_small":
        out = numbers.e2m1_round_small(x)
    elif NAME == "sixth":
        out = numbers.divide_by_six(x)
    else:
        out = numbers.quotient(x, y, tl.math.div_rn(1.0, y))
    tl.store(out_ptr + at, out, mask=at < n)


def apply(name: str, x: torch.Tensor, y: torch.Tensor | None = None, *, device: str) -> torch.Tensor:
    x, tile = x.float().contiguous().to(device), 4096
    out = torch.empty_like(x)
    _apply[(triton.cdiv(x.numel(), tile),)](x, x if y is None else y.to(device), out, x.numel(), NAME=name, TILE=tile)
    return out.cpu()


def with_neighbours(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x.nextafter(torch.tensor(0.0)), x.nextafter(torch.tensor(torch.inf))])


MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
MAGNITUDES = e2m1_values()[:8]


def test_e4m3_values(kernel_on):
    assert torch.equal(apply("value", torch.arange(1, 127), device=kernel_on), e4m3_values())


def test_e4m3_snap_rounds_to_nearest_even_and_saturates(kernel_on):
    values = e4m3_values().double()
    x = with_neighbours(torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([0.0, 1e-9, 1e9])]).float())
    wanted = x.clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).clamp(1, 126)
    assert torch.equal(apply("snap", x, device=kernel_on), wanted.float())


def test_e4m3_ceil_is_the_smallest_code_that_reaches_x(kernel_on):
    x = with_neighbours(torch.cat([e4m3_values(), torch.tensor([0.0, 1e-9, 1e9])]))
    wanted = (torch.bucketize(x, e4m3_values()) + 1).clamp(max=126)
    assert torch.equal(apply("ceil", x, device=kernel_on), wanted.float())


def test_e2m1_round_is_to_nearest_even_of_either_sign(kernel_on):
    x = with_neighbours(torch.cat([MIDPOINTS, MAGNITUDES, torch.linspace(0, 6.9, 5000)]))
    x = torch.cat([x, -x])
    wanted = e2m1_values()[round_to_e2m1(x).long()]
    assert torch.equal(apply("round", x, device=kernel_on), wanted)


def test_e2m1_round_small_is_to_nearest_with_ties_up(kernel_on):
    y = torch.cat([MIDPOINTS, MAGNITUDES, torch.linspace(0, 6.9, 5000)])
    small = y * 2.0**-126
    exact = small.double() * 2.0**126  # denormal: what is left of y
    above = torch.searchsorted(MIDPOINTS.double(), exact, right=True)
    assert torch.equal(apply("round_small", small, device=kernel_on), MAGNITUDES[above] * 2.0**-126)


def test_a_sixth_is_correctly_rounded_for_every_mantissa(kernel_on):
    x = (torch.arange(2**23, dtype=torch.int32) + (127 << 23)).view(torch.float32)
    if kernel_on == "cpu":
        x = x[::37]  # the interpreter takes its time
    assert torch.equal(apply("sixth", x, device=kernel_on), x / 6)


def test_quotients_are_correctly_rounded(kernel_on):
    generator = torch.Generator().manual_seed(0)
    n = 2**20 if kernel_on == "cuda" else 2**17
    x = torch.randn(n, generator=generator) * 10.0 ** torch.randint(-6, 7, (n,), generator=generator)
    divisor = torch.rand(n, generator=generator) + 1
    assert torch.equal(apply("quotient", x, divisor, device=kernel_on), x / divisor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_amax_is_that_of_pytorch(kernel_on, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(5, 33, 64, generator=generator) * 10.0 ** torch.arange(-4, 1)[:, None, None]).to(dtype)
    weight[3] = 0
    weight[4, 32, 63] = -100
    assert torch.equal(matrix_amax_triton(weight.to(kernel_on)).cpu(), weight.float().abs().amax(dim=(1, 2)))
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a model
    try:
        assert torch.equal(matrix_amax_triton(weight.to(kernel_on)).cpu(), weight.float().abs().amax(dim=(1, 2)))
    finally:
        torch.set_default_dtype(torch.float32)
    weight[0, 0, 1], weight[1, 5, 0], weight[2, 7, 7] = torch.nan, torch.inf, -torch.inf
    amax = matrix_amax_triton(weight.to(kernel_on)).cpu()
    assert amax.isfinite().tolist() == [False, False, False, True, True]
    assert amax[0].isnan()
    assert torch.equal(matrix_amax(weight).nan_to_num(), amax.nan_to_num())
