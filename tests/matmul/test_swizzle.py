"""The swizzled layout, by itself; the kernels that read it are in test_swizzled_matmul.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from qwantize_vllm import Nvfp4Tensor, quantize_nvfp4
from qwantize_vllm.matmul.swizzle import COLUMNS, ROWS, SwizzledNvfp4, swizzle, unswizzle
from qwantize_vllm.matmul.triton_swizzle import swizzle_triton
from tests.numbers import make_weight


def bits(q: Nvfp4Tensor) -> tuple[torch.Tensor, ...]:
    return q.codes, q.block_scales.view(torch.uint8), q.global_scale


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (128, 512), (1, 32), (100, 544)])
@pytest.mark.parametrize("global_scale", ["amax", "none"])
def test_unswizzle_gives_back_every_bit(block_size, n, k, global_scale):
    q = quantize_nvfp4(make_weight("million", n, k), block_size=block_size, global_scale=global_scale)
    back = unswizzle(swizzle(q))
    assert back.block_size == block_size
    for ours, theirs in zip(bits(back), bits(q), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (1, 32), (130, 1120)])
def test_the_kernels_have_the_order_of_pytorch(kernel_on, block_size, n, k):
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    scales = (torch.arange(n * k // block_size) % 126 + 1).to(torch.uint8).view(n, -1).view(torch.float8_e4m3fn)
    expected = swizzle(Nvfp4Tensor(codes, scales, torch.ones(()), block_size))
    words, bytes_ = (torch.empty_like(each, device=kernel_on) for each in (expected.words, expected.scales))
    swizzle_triton(codes.to(kernel_on), scales.to(kernel_on), words, bytes_, block_size)
    assert torch.equal(words.to("cpu"), expected.words)
    assert torch.equal(bytes_.to("cpu"), expected.scales)


def test_every_scale_survives():
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 63)
    q = Nvfp4Tensor(torch.zeros(2, 63 * 8, dtype=torch.uint8), scales, torch.ones(()))
    assert torch.equal(unswizzle(swizzle(q)).block_scales.view(torch.uint8), scales.view(torch.uint8))


def test_each_code_and_scale_is_where_the_layout_says():
    q = quantize_nvfp4(make_weight("gaussian", 2 * ROWS, 2 * COLUMNS))
    codes = torch.stack((q.codes & 15, q.codes >> 4), dim=-1).flatten(1)
    weight = swizzle(q)
    # The bits of sign and of magnitude (2, 1, 0) of each plane, from the table in swizzle.py.
    places = [(15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (13, 11, 10, 14)]
    generator = torch.Generator().manual_seed(0)
    for n, k in torch.randint(0, 2 * ROWS, (200, 2), generator=generator).tolist():
        group, row = divmod(n, ROWS)
        tile, column = divmod(k, COLUMNS)
        part, row = divmod(row, 16)
        plane, column = divmod(column, 16)
        lane = 4 * (row % 8) + column % 8 // 2
        word = int(weight.words[group, tile, part, lane * 8 + 4 * (column // 8) + 2 * (row // 8) + column % 2])
        assert [word >> place & 1 for place in places[plane]] == [int(codes[n, k]) >> bit & 1 for bit in (3, 2, 1, 0)]
        byte = int(weight.scales[group, tile // 4, n % ROWS, tile % 4]) >> (8 * plane) & 255
        assert 2.0 ** ((byte >> 3) - 9) * (1 + (byte & 7) / 8) == float(q.block_scales[n, k // 16])


def test_padding_multiplies_by_zero():
    q = quantize_nvfp4(torch.ones(65, 80))
    weight = swizzle(q)
    assert weight.words.shape[:2] == (2, 2)
    # A word holds four columns of the first tile; of the second tile, one of the 16 that are there.
    assert int((weight.words != 0).sum()) == 65 * (16 + 16)
    assert torch.equal(unswizzle(weight).dequantize(), q.dequantize())


def test_a_batched_weight_is_refused():
    with pytest.raises(ValueError, match=r"unbatched .* got \(2, 16, 32\)"):
        swizzle(quantize_nvfp4(torch.ones(2, 16, 32)))


def test_rows_with_scales_of_their_own_cannot_go_back():
    weight = dataclasses.replace(swizzle(quantize_nvfp4(torch.ones(16, 32))), global_scale=torch.ones(16))
    with pytest.raises(ValueError, match="one global scale a row"):
        unswizzle(weight)


@pytest.mark.parametrize("name", ["words", "scales", "global_scale", "arrived"])
def test_tensors_that_do_not_fit_are_refused(name):
    weight = swizzle(quantize_nvfp4(torch.ones(16, 32)))
    wrong = torch.zeros(3, dtype=getattr(weight, name).dtype)
    with pytest.raises(ValueError, match=rf"SwizzledNvfp4.{name} of a weight \(16, 32\) must be .* got"):
        dataclasses.replace(weight, **{name: wrong})
    with pytest.raises(ValueError, match="float64"):
        dataclasses.replace(weight, **{name: getattr(weight, name).double()})


def test_bytes_are_those_of_codes_and_scales_and_a_little():
    q = quantize_nvfp4(make_weight("gaussian", 4 * ROWS, 8 * COLUMNS))
    weight = swizzle(q)
    assert isinstance(weight, SwizzledNvfp4)
    assert weight.nbytes - weight.arrived.nbytes == q.nbytes


@pytest.mark.parametrize(("k", "bits"), [(768, 4.5), (1408, 4.545), (352, 5.091)])
def test_bits_a_weight_are_more_where_columns_are_padded(k, bits):
    """Of the columns that mixtures of experts have: Qwen3-30B-A3B, DeepSeek-V2-Lite, and a quarter of the latter."""
    weight = swizzle(quantize_nvfp4(make_weight("gaussian", ROWS, k), "naive"))
    stored = weight.words.nbytes + weight.scales.nbytes
    assert 8 * stored / (ROWS * k) == pytest.approx(bits, abs=5e-4)
