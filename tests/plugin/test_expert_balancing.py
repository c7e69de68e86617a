"""Load balancing (EPLB) moves experts about between ranks: vLLM copies rows of all that a layer of them keeps."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from vllm.distributed.device_communicators.pynccl_wrapper import ncclDataTypeEnum
from vllm.distributed.eplb.eplb_state import EplbLayerState, EplbState
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from qwantize_vllm import QwantizeSettings, quantize_nvfp4
from qwantize_vllm.plugin.expert_weights import GroupedForm, PlainExpertForm, QuantizedExperts
from qwantize_vllm.plugin.moe import QwantizeMoEMethod
from qwantize_vllm.plugin.reloading import check_not_moved
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
    layer.local_num_experts, layer.global_num_experts, layer.expert_map = EXPERTS, 2 * EXPERTS, None
    layer.activation = MoEActivation.SILU
    layer.moe_config = types.SimpleNamespace(experts_per_token=2)
    form.keep(layer, experts)
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


def runner_where(places: list[list[int]] | None):
    """As vLLM's, of a layer in such an order; None: no model has been given to the load balancing yet."""
    state = EplbLayerState()
    if places is not None:
        placed = torch.tensor(places)
        state.set_layer_state(0, torch.zeros(1, 6), placed[None], (placed >= 0).sum(1)[None])
    return types.SimpleNamespace(eplb_state=state)


@pytest.mark.parametrize("places", [[[0, 4, -1], [1, 5, -1], [2, -1, -1], [3, -1, -1]], None])
def test_weights_are_updated_where_experts_are_as_at_the_start(places):
    check_not_moved(runner_where(places), "mlp.experts", 6, EXPERTS)
    check_not_moved(types.SimpleNamespace(eplb_state=None), "mlp.experts", EXPERTS, EXPERTS)
    check_not_moved(None, "mlp.experts", EXPERTS, EXPERTS)


@pytest.mark.parametrize(
    ("places", "count"),
    [
        ([[1, 4, -1], [0, 5, -1], [2, -1, -1], [3, -1, -1]], 2),  # two have changed places
        ([[0, -1, -1], [1, 5, -1], [2, 4, -1], [3, -1, -1]], 2),  # another one has become two
    ],
)
def test_an_update_is_refused_after_experts_were_moved(places, count):
    with pytest.raises(ValueError, match=f"mlp.experts: load balancing .* moved {count} of 4 experts .* restart"):
        check_not_moved(runner_where(places), "mlp.experts", 6, EXPERTS)


def test_places_are_those_that_vllm_starts_with():
    """So that an update right after the start is taken, also by versions to come."""
    started = EplbState.build_initial_global_physical_to_logical_map(EXPERTS, 6)
    places = [[place for place, expert in enumerate(started) if expert == each] for each in range(EXPERTS)]
    slots = max(map(len, places))
    padded = [each + [-1] * (slots - len(each)) for each in places]
    check_not_moved(runner_where(padded), "mlp.experts", EXPERTS + 6, EXPERTS)


def test_what_is_served_is_not_touched_by_a_refused_update():
    settings = QwantizeSettings()
    moe = types.SimpleNamespace(num_logical_experts=EXPERTS)
    method = QwantizeMoEMethod(settings, "mlp.experts", LoadReport(settings), moe)
    layer = torch.nn.Module()
    layer.layer_name, layer.global_num_experts = "model.mlp.experts", 6
    method._runners = {layer.layer_name: runner_where([[1, 4], [0, 5], [2, -1], [3, -1]])}
    with pytest.raises(ValueError, match="restart the server"):
        method.keep(layer, quantize(16, "cpu"))
    assert not list(layer.parameters())
