from __future__ import annotations

import pytest
import torch

from qwantize_vllm import matmul_nvfp4, quantize_nvfp4
from qwantize_vllm.format import FLOAT_DTYPES, Nvfp4Tensor
from tests.devices import kernel_device
from tests.numbers import make_weight

# bfloat16 outputs: half a unit in the last place everywhere but in the interpreter, which truncates.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 3e-3}
INTERPRETED_BFLOAT16 = 8e-3


def relative_error(got, exact):
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def exact_product(x, q, bias):
    y = x.double() @ q.dequantize().double().T
    return y if bias is None else y + bias.double()


BACKENDS = [
    ("reference", "cpu"),
    ("cpu", "cpu"),
    ("cpu_fused", "cpu"),
    ("dequantize", "interpreted"),
    ("fused", "interpreted"),
    pytest.param(("dequantize", "cuda"), marks=pytest.mark.gpu),
    pytest.param(("fused", "cuda"), marks=pytest.mark.gpu),
]


@pytest.fixture(params=BACKENDS, ids="-".join)
def backend_and_device(request):
    name, where = request.param
    return name, kernel_device(where)


@pytest.fixture
def backend(backend_and_device):
    return backend_and_device[0]


@pytest.fixture
def device(backend_and_device):
    return backend_and_device[1]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(("n", "k"), [(70, 96), (9, 32), (130, 544)])
@pytest.mark.parametrize("m", [1, 17, 70])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_against_float64(backend, device, dtype, block_size, n, k, m, with_bias):
    if backend == "fused" and dtype == torch.float32:
        pytest.skip("the fused kernel takes half precision")
    torch.manual_seed(0)
    q = quantize_nvfp4(make_weight("gaussian", n, k, dtype).to(device), block_size=block_size)
    x = torch.randn(m, k, device=device).to(dtype)
    bias = torch.randn(n, device=device).to(dtype) if with_bias else None
    y = matmul_nvfp4(x, q, bias, backend)
    assert y.dtype == dtype
    assert y.shape == (m, n)
    truncates = device == "cpu" and backend in ("dequantize", "fused") and dtype == torch.bfloat16
    assert relative_error(y, exact_product(x, q, bias)) < (INTERPRETED_BFLOAT16 if truncates else TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_any_strides_and_shapes(backend, device, dtype):
    q = quantize_nvfp4(make_weight("gaussian", 48, 64, dtype).to(device))
    wide = torch.randn(6, 128, device=device).to(dtype)
    for x in (
        wide[:, ::2],
        wide[:, 64:],
        wide.view(2, 3, 128)[..., :64],
        torch.randn(64, 5, device=device).to(dtype).T,
    ):
        assert torch.equal(matmul_nvfp4(x, q, backend=backend), matmul_nvfp4(x.contiguous(), q, backend=backend))
    assert matmul_nvfp4(wide.view(2, 3, 128)[..., :64], q, backend=backend).shape == (2, 3, 48)
    assert matmul_nvfp4(wide[0, :64], q, backend=backend).shape == (48,)


def test_no_tokens_give_no_rows(backend, device):
    q = quantize_nvfp4(make_weight("gaussian", 48, 64, torch.bfloat16).to(device))
    x = torch.empty(0, 64, dtype=torch.bfloat16, device=device)
    assert matmul_nvfp4(x, q, backend=backend).shape == (0, 48)
    assert matmul_nvfp4(x.view(2, 0, 64), q, torch.ones(48, device=device).bfloat16(), backend).shape == (2, 0, 48)


def test_extreme_scales_lose_nothing(backend, device):
    """The largest and the smallest block scales, zeros, and a weight a million times the others."""
    for kind in ("million", "zero", "sparse"):
        q = quantize_nvfp4(make_weight(kind, 32, 64).to(device))
        x = torch.randn(3, 64, device=device).half() / 8  # the product stays below 65504
        got = matmul_nvfp4(x, q, backend=backend)
        assert torch.isfinite(got).all()
        assert relative_error(got, exact_product(x, q, None)) < 1e-3


def test_the_fused_kernel_repeats_itself_bit_for_bit(kernel_on):
    q = quantize_nvfp4(make_weight("gaussian", 96, 1056, torch.float16).to(kernel_on))
    x = torch.randn(4, 1056, device=kernel_on).half()
    first = matmul_nvfp4(x, q, backend="fused")
    assert all(torch.equal(matmul_nvfp4(x, q, backend="fused"), first) for _ in range(3))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("block_size", [16, 32])
def test_dequantize_kernel_gives_the_bits_of_dequantize(kernel_on, dtype, block_size):
    from qwantize_vllm.matmul.triton_dequantize import dequantize_triton

    q = quantize_nvfp4(make_weight("student", 37, 544).to(kernel_on), block_size=block_size)
    got, wanted = dequantize_triton(q, dtype), q.dequantize(dtype)
    if kernel_on == "cpu" and dtype == torch.bfloat16:  # the interpreter truncates to bfloat16
        wanted = (q.dequantize().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_the_cpu_backend_is_a_dense_layer_with_the_dequantized_weight(dtype):
    q = quantize_nvfp4(make_weight("gaussian", 7000, 320, dtype))  # more than one strip
    x = torch.randn(5, 320).to(dtype)
    dense = torch.nn.functional.linear(x, q.dequantize(dtype))
    assert relative_error(matmul_nvfp4(x, q, backend="cpu"), dense.double()) < TOLERANCE[dtype]


def test_auto_serves_on_the_cpu():
    q = quantize_nvfp4(make_weight("gaussian", 32, 64))
    x = torch.randn(200, 64)
    assert torch.equal(matmul_nvfp4(x, q), matmul_nvfp4(x, q, backend="cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 32, 33, 300])
def test_auto_serves_every_number_of_tokens_on_a_gpu(m):
    q = quantize_nvfp4(make_weight("gaussian", 256, 512, torch.bfloat16).cuda())
    x = torch.randn(m, 512, device="cuda").bfloat16()
    assert relative_error(matmul_nvfp4(x, q), exact_product(x, q, None)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 48)}, r"x must be \(..., 64\)"),
        ({"bias": torch.zeros(3)}, r"bias must be \(32,\)"),
        ({"backend": "marlin"}, "backend must be one of .* got 'marlin'"),
        ({"backend": "fused"}, "takes x in one of"),
        ({"x": torch.zeros(2, 64, device="meta")}, "x is on meta, the weight on cpu"),
        ({"q": quantize_nvfp4(torch.ones(2, 32, 64))}, "unbatched"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    given = {"x": torch.zeros(2, 64), "q": quantize_nvfp4(torch.ones(32, 64)), **arguments}
    with pytest.raises(ValueError, match=message):
        matmul_nvfp4(**given)


def unit_weight(n, k):
    """Codes of all kinds, and scales of 1: few of them sum up to a number that bfloat16 has."""
    codes = torch.arange(n * k // 2).mul(37).view(n, k // 2).byte()
    return Nvfp4Tensor(codes, torch.ones(n, k // 16).to(torch.float8_e4m3fn), torch.ones(()))


@pytest.mark.parametrize("m", [1, 33])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64])
def test_a_bias_is_added_as_it_is(backend, device, m, bias_dtype):
    """It takes away the product but for a little, which is lost where it is rounded to x's dtype first."""
    q = unit_weight(40, 64).to(device)
    x = torch.nn.functional.one_hot(torch.full((m,), 7), 64).bfloat16().to(device)
    bias = 2.0**-12 - q.dequantize()[:, 7].to(bias_dtype)
    assert (matmul_nvfp4(x, q, bias, backend) == 2.0**-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_dtype", [*FLOAT_DTYPES, torch.float64])
@pytest.mark.parametrize("m", [2, 40])
def test_a_bias_of_any_dtype_and_strides(backend, device, dtype, bias_dtype, m):
    q = quantize_nvfp4(make_weight("gaussian", 48, 64, dtype).to(device))
    x = torch.randn(m, 64, device=device).to(dtype)
    for bias in biases(48, bias_dtype, device):
        y = matmul_nvfp4(x, q, bias, backend)
        assert y.dtype == dtype
        truncates = device == "cpu" and dtype == torch.bfloat16
        assert relative_error(y, exact_product(x, q, bias)) < (INTERPRETED_BFLOAT16 if truncates else TOLERANCE[dtype])


def biases(n, dtype, device):
    """One whose numbers follow each other, one with others between them, and one number for all."""
    bias = torch.randn(2 * n, device=device).to(dtype)
    return bias[:n], bias[::2], bias[:1].expand(n)
