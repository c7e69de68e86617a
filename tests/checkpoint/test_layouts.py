"""The layouts of quantized checkpoints, against this package's own value and the library whose format it is."""

from __future__ import annotations

import pytest
import torch

from qwantize_vllm import Nvfp4Tensor, quantize_nvfp4
from qwantize_vllm.checkpoint import LAYOUTS
from qwantize_vllm.checkpoint.layouts import in_blocks_of_16, split_rows


def make(k=128, block_size=16, seed=0, amax=1.0):
    weight = torch.randn(48, k, generator=torch.Generator().manual_seed(seed))
    return quantize_nvfp4(weight * amax / weight.abs().max(), block_size=block_size)


def same(a: Nvfp4Tensor, b: Nvfp4Tensor) -> bool:
    bits = torch.equal(a.block_scales.view(torch.uint8), b.block_scales.view(torch.uint8))
    return bits and torch.equal(a.codes, b.codes) and torch.equal(a.global_scale, b.global_scale)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("block_size", [16, 32])
def test_what_is_written_is_read(name, block_size):
    layout, q = LAYOUTS[name], make(block_size=block_size)
    tensors = layout.write("a.b", q)
    described = layout.described("a.b", 48, 128, block_size)
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()} == described
    kept = block_size if layout.any_blocks else 16
    again = layout.read("a.b", tensors, kept)
    assert torch.equal(again.dequantize(), q.dequantize())
    if kept == block_size:
        assert same(again, q)


def test_blocks_of_32_are_two_blocks_of_16_each():
    q = make(block_size=32)
    assert torch.equal(in_blocks_of_16(q).dequantize(), q.dequantize())
    assert in_blocks_of_16(q).block_scales.shape == (48, 8)


def test_a_global_scale_without_a_reciprocal_is_refused():
    bits = torch.arange(0x3FC00000, 0x3FC00400, dtype=torch.int32).view(torch.float32)
    lost = bits[1 / (1 / bits) != bits][0]
    q = make()
    with pytest.raises(ValueError, match="a: compressed-tensors stores 1/global_scale, and no float32 is that of"):
        LAYOUTS["compressed-tensors"].write("a", Nvfp4Tensor(q.codes, q.block_scales, lost))
    assert LAYOUTS["modelopt"].write("a", Nvfp4Tensor(q.codes, q.block_scales, lost))["a.weight_scale_2"] == lost


@pytest.mark.parametrize("amax", [1e-20, 0.03, 0.17, 1.0, 77.0, 2e30])
def test_compressed_tensors_decompresses_to_the_bits_of_dequantize(amax):
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4.base")
    for seed in range(4):
        q = make(256, seed=seed, amax=amax * (1 + seed / 7))
        tensors = LAYOUTS["compressed-tensors"].write("a", q)
        state = {name.removeprefix("a."): tensor for name, tensor in tensors.items()}
        theirs = nvfp4.NVFP4PackedCompressor.decompress(state, None)["weight"]
        assert theirs.dtype == torch.bfloat16
        assert torch.equal(theirs.view(torch.int16), q.dequantize(torch.bfloat16).view(torch.int16))


def test_the_config_is_one_that_compressed_tensors_accepts():
    library = pytest.importorskip("compressed_tensors.quantization")
    config = library.QuantizationConfig.model_validate(LAYOUTS["compressed-tensors"].config(["lm_head"], 16))
    (scheme,) = config.config_groups.values()
    assert scheme.weights.strategy == "tensor_group"
    assert scheme.input_activations is None
    assert config.ignore == ["lm_head"]


def test_rows_are_split_into_members():
    q = make()
    first, second = split_rows([q], [16, 32])
    assert torch.equal(torch.cat([first.dequantize(), second.dequantize()]), q.dequantize())
    assert split_rows([first, second], [16, 32]) == [first, second]
