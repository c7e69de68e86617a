from __future__ import annotations

import itertools

import pytest
import torch

from qwantize_vllm.format import (
    BLOCK_SIZES,
    FLOAT_DTYPES,
    Nvfp4Tensor,
    decode_codes,
    default_global_scale,
    e2m1_values,
    e4m3_values,
    pack_codes,
    round_to_e2m1,
    unpack_codes,
)


def make(n=3, k=64, block_size=16, batch=()):
    codes = torch.randint(0, 256, (*batch, n, k // 2), dtype=torch.uint8)
    scales = torch.randint(1, 127, (*batch, n, k // block_size), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return Nvfp4Tensor(codes, scales, torch.rand(batch) + 0.1, block_size)


def test_e2m1_values_are_those_of_the_format():
    expected = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert e2m1_values().tolist() == expected + [-v for v in expected]
    assert torch.signbit(e2m1_values()[8])


def test_e4m3_values_are_the_positive_finite_ones():
    values = e4m3_values()
    assert len(values) == 126
    assert values[0] == 2**-9
    assert values[-1] == 448
    assert (values.diff() > 0).all()


def test_rounding_is_to_nearest_with_ties_to_the_even_code():
    values = e2m1_values()[:8]
    for code, (low, high) in enumerate(itertools.pairwise(values.tolist())):
        middle = (low + high) / 2
        even = code if code % 2 == 0 else code + 1
        near = torch.tensor([middle, torch.nextafter(torch.tensor(middle), torch.tensor(0.0)).item()])
        above = torch.nextafter(torch.tensor(middle), torch.tensor(9.0)).item()
        assert round_to_e2m1(torch.tensor([near[0], near[1], above])).tolist() == [even, code, code + 1]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rounding_saturates_and_keeps_the_sign_of_zero(dtype):
    x = torch.tensor([7.0, -1000.0, -0.1, -0.0, 0.0], dtype=dtype)
    assert round_to_e2m1(x).tolist() == [7, 15, 8, 8, 0]


def test_every_code_survives_a_round_trip():
    assert round_to_e2m1(e2m1_values()).tolist() == list(range(16))
    codes = torch.randint(0, 16, (5, 3, 32), dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes)), codes)


def test_even_k_lies_in_the_low_nibble():
    assert pack_codes(torch.tensor([[1, 15]], dtype=torch.uint8)).item() == 0xF1


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_decode_codes_equals_a_look_up_of_each_nibble(dtype):
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    assert torch.equal(decode_codes(packed, dtype), e2m1_values()[unpack_codes(packed).long()].to(dtype))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_dequantize_is_value_times_scales(block_size, dtype, batch):
    q = make(5, 96, block_size, batch)
    values = e2m1_values()[unpack_codes(q.codes).long()].unflatten(-1, (-1, block_size))
    exact = values.double() * q.block_scales.double()[..., None] * q.global_scale.double()[..., None, None, None]
    got = q.dequantize(dtype)
    assert got.dtype == dtype
    assert got.shape == q.shape
    assert torch.equal(got, exact.flatten(-2).float().to(dtype))


def test_batched_tensors_are_indexed_by_matrix():
    q = make(batch=(4,))
    assert torch.equal(q[2].dequantize(), q.dequantize()[2])
    assert q[1:3].shape == (2, 3, 64)
    with pytest.raises(ValueError, match="batched"):
        make()[0]


def test_nbytes_is_four_and_a_half_bits_a_weight():
    q = make(32, 256)
    assert q.nbytes == 32 * 256 * 4.5 / 8 + 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(3, 32)}, "codes must be torch.uint8"),
        ({"codes": torch.zeros(3, 31, dtype=torch.uint8)}, "multiple of 16"),
        ({"block_scales": torch.ones(3, 5).to(torch.float8_e4m3fn)}, r"block_scales must be \(3, 4\)"),
        ({"block_scales": torch.ones(3, 4)}, "float8_e4m3fn"),
        ({"global_scale": torch.ones(1)}, r"batch shape \(\)"),
        ({"block_size": 24}, r"block_size must be one of \(16, 32\), got 24"),
        ({"codes": torch.zeros(3, 32, dtype=torch.uint8, device="meta")}, "one device"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    q = make()
    parts = {"codes": q.codes, "block_scales": q.block_scales, "global_scale": q.global_scale, "block_size": 16}
    with pytest.raises(ValueError, match=message):
        Nvfp4Tensor(**{**parts, **change})


def test_dequantize_refuses_other_dtypes():
    with pytest.raises(ValueError, match="dequantize takes one of"):
        make().dequantize(torch.float64)


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1.0, 3e38])
def test_default_global_scale_is_always_safe_to_divide_by(amax):
    scale = default_global_scale(torch.tensor(amax))
    assert scale >= torch.finfo(torch.float32).tiny
    if amax == 0.0:
        assert scale == 1


@pytest.fixture(scope="module")
def global_scales():
    """Of 20,000 amax: every one with 14 bits of [1, 2), and any in all sizes."""
    generator = torch.Generator().manual_seed(0)
    some = torch.exp2(torch.rand(3616, generator=generator) * 60 - 40)
    amax = torch.cat([torch.arange(2**14) / 2**14 + 1, some])
    return amax, default_global_scale(amax)


def test_default_global_scale_fits_amax_closely(global_scales):
    amax, scales = global_scales
    excess = scales.double() * (6 * 448) / amax.double() - 1
    assert (excess >= -1e-7).all()
    assert excess.max() < 5e-4
    largest = amax.argmax()
    assert default_global_scale(amax[largest]) == scales[largest]  # alone as in a batch


def test_default_global_scale_survives_its_reciprocal(global_scales):
    _, scales = global_scales
    assert torch.equal(1.0 / (1.0 / scales), scales)


def test_weights_are_products_that_float32_holds_and_no_order_of_operations_changes(global_scales):
    _, scales = global_scales
    values, blocks = e2m1_values()[1:8, None, None], e4m3_values()[None, :, None]
    exact = values.double() * blocks.double() * scales.double()
    product = values * blocks * scales
    assert torch.equal(product.double(), exact)
    divided = values * (blocks / (1.0 / scales))  # what compressed-tensors computes
    assert torch.equal(divided.bfloat16(), product.bfloat16())
    assert torch.equal((values * (blocks * scales)).bfloat16(), product.bfloat16())
    assert torch.equal(divided.half(), product.half())
