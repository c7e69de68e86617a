"""Load balancing (EPLB) moves experts about between ranks: vLLM copies rows of all that a layer of them keeps."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from vllm.distributed.device_communicators.pynccl_wrapper import ncclDataTypeEnum
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from qwantize_vllm import QwantizeSettings, quantize_nvfp4
from qwantize_vllm.plugin.expert_weights import GroupedForm, PlainExpertForm, QuantizedExperts
from qwantize_vllm.plugin.moe import QwantizeMoEMethod
from qwantize_vllm.plugin.report import LoadReport

EXPERTS, HIDDEN, INNER = 4, 64, 32
ORDER = [2, 0, 3, 2]  # expert 2 has become two, expert 1 has gone to another rank
FORMS = {"plain": lambda experts: PlainExpertForm(experts, "auto"), "grouped": GroupedForm}


def quantize(block_size: int, device: str) -> QuantizedExperts:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int, k: int):
        weight = torch.randn(EXPERTS, 1, n, k, generator=generator).bfloat16()
        return quantize_nvfp4(weight.to(device), block_size=block_size)

    return QuantizedExperts(draw(2 * INNER, HIDDEN), draw(HIDDEN, INNER), torch.bfloat16)


def layer_of(form, experts: QuantizedExperts) -> torch.nn.Module:
    layer = torch.nn.Module()
    for name in ("w13_weight", "w2_weight"):  # what `keep` replaces
        layer.register_parameter(name, torch.nn.Parameter(torch.zeros(1), requires_grad=False))
    form.keep(layer, experts)
    layer.local_num_experts, layer.expert_map, layer.activation = EXPERTS, None, MoEActivation.SILU
    return layer


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("name", FORMS)
def test_experts_compute_the_same_wherever_they_are_moved(kernel_on, name, block_size):
    experts = quantize(block_size, kernel_on)
    form = FORMS[name](experts)
    layer = layer_of(form, experts)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16().to(kernel_on)
    weights = torch.full((5, 2), 0.5, device=kernel_on)
    ids = torch.tensor([[0, 2], [2, 3], [3, 0], [0, 3], [2, 0]], device=kernel_on)
    before = form.apply(layer, x, weights, ids)
    for weight in RoutedExperts.get_expert_weights(layer):
        assert weight.shape[0] == EXPERTS
        weight.copy_(weight[ORDER])
    now_at = torch.tensor([1, -1, 3, 2], device=kernel_on)
    assert before.abs().max() > 0
    assert torch.equal(form.apply(layer, x, weights, now_at[ids]), before)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("name", FORMS)
def test_nccl_can_send_all_that_is_kept(name, block_size):
    experts = quantize(block_size, "cpu")
    kept = list(RoutedExperts.get_expert_weights(layer_of(FORMS[name](experts), experts)))
    assert len(kept) == 6  # of w13 and w2 codes, block scales and global scales
    for weight in kept:
        ncclDataTypeEnum.from_torch(weight.dtype)


def test_vllm_is_told_that_it_may():
    moe = types.SimpleNamespace()
    assert QwantizeMoEMethod(QwantizeSettings(), "mlp.experts", LoadReport(QwantizeSettings()), moe).supports_eplb
