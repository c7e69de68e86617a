"""Updates of a layer of a checkpoint that is NVFP4 already, by vLLM's own code for reloads."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.model_loader.reload import layerwise

from qwantize_vllm import Nvfp4Tensor, quantize_nvfp4
from qwantize_vllm.checkpoint import LAYOUTS
from qwantize_vllm.plugin.packed_format import Packed
from qwantize_vllm.plugin.packed_linear import PackedLinearMethod
from qwantize_vllm.plugin.packed_tensors import without_zero_scales

LAYOUT = LAYOUTS["compressed-tensors"]


def method():
    made = PackedLinearMethod.__new__(PackedLinearMethod)
    made.name, made.packed, made._arrived = "mlp.down_proj", Packed(LAYOUT, 16, False), Counter()
    return made


def load(param, loaded_weight):
    param.data.copy_(loaded_weight)


def test_a_refused_dtype_leaves_all_layers_what_they_had():
    layers = [torch.nn.Module() for _ in range(2)]
    for layer in layers:
        codes = torch.nn.Parameter(torch.full((4, 8), 7, dtype=torch.uint8), requires_grad=False)
        codes.weight_loader = method()._noting(LAYOUT.codes, load)
        layer.register_parameter(LAYOUT.codes, codes)
    model = torch.nn.Sequential(*layers)
    layerwise.record_metadata_for_reloading(model)
    layerwise.initialize_layerwise_reload(model)
    codes = getattr(layers[0], LAYOUT.codes)
    with pytest.raises(ValueError, match="int8"):
        codes.weight_loader(codes, torch.zeros(4, 8, dtype=torch.int8))
    for layer in layers:
        assert getattr(layer, LAYOUT.codes).eq(7).all()


def test_blocks_of_scale_zero_stay_zero():
    """Swizzled scales have none; nothing is copied where there is none."""
    q = quantize_nvfp4(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
    assert without_zero_scales(q.codes, q.block_scales) == (q.codes, q.block_scales)
    scales = q.block_scales.view(torch.uint8).clone()
    scales[1, 2] = 0
    codes, scales = without_zero_scales(q.codes, scales.view(torch.float8_e4m3fn))
    expected = q.dequantize()
    expected[1, 32:48] = 0
    assert torch.equal(Nvfp4Tensor(codes, scales, q.global_scale).dequantize(), expected)
    assert scales.view(torch.uint8).min() > 0


def test_parts_of_a_refused_update_do_not_count_for_the_next():
    """It brought only the first member; the next one brings only the second."""
    packed, layer = method(), SimpleNamespace(logical_widths=[16, 16])
    for member in range(2):
        for name in LAYOUT.names:
            packed._arrived[name, member] += 1
        with pytest.raises(ValueError, match=r"lacks .* of 1 of 2 members"):
            packed.process_weights_after_loading(layer)
