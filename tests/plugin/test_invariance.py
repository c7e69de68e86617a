"""VLLM_BATCH_INVARIANT=1: which backends may serve, and which do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from qwantize_vllm import QwantizeSettings
from qwantize_vllm.plugin import expert_weights, invariance, weights
from qwantize_vllm.plugin.expert_weights import GroupedForm
from qwantize_vllm.plugin.weights import SwizzledForm


@pytest.fixture(params=[True, False], ids=["invariant", "as usual"])
def invariant(request, monkeypatch):
    monkeypatch.setattr(invariance.envs, "VLLM_BATCH_INVARIANT", request.param)
    return request.param


@pytest.mark.parametrize("backend", ["vllm", "marlin", "fused"])
def test_backends_whose_sums_depend_on_the_batch_are_refused(invariant, backend):
    settings = QwantizeSettings(backend=backend)
    if not invariant:
        invariance.check_backend(settings)
        return
    message = f"VLLM_BATCH_INVARIANT=1 .* backend '{backend}' does not give: leave the setting backend out"
    with pytest.raises(ValueError, match=message):
        invariance.check_backend(settings)


@pytest.mark.usefixtures("invariant")
@pytest.mark.parametrize("backend", ["auto", "dequantize", "reference", "humming"])
def test_others_are_not(backend):
    invariance.check_backend(QwantizeSettings(backend=backend))


def given_backend(*args):
    """In place of the ops: their last argument is the backend."""
    return args[-1]


def test_swizzled_weights_are_multiplied_by_the_kernel_for_it(invariant, monkeypatch):
    monkeypatch.setattr(weights, "matmul_swizzled_op", given_backend)
    tensors = dict.fromkeys(("weight", "weight_scale", "weight_global_scale", "weight_arrived"))
    form = SwizzledForm(SimpleNamespace(widths=[8], block_size=16), fuse_norms=False)
    backend = form.apply(SimpleNamespace(**tensors), torch.zeros(1, 16), None)
    assert backend == ("batch_invariant" if invariant else "auto")


def test_swizzled_experts_are_too(invariant, monkeypatch):
    monkeypatch.setattr(expert_weights, "experts_swizzled_op", given_backend)
    monkeypatch.setattr(GroupedForm, "parts", lambda self, layer, name: [])
    form = GroupedForm(SimpleNamespace(w2=SimpleNamespace(shape=(2, 1, 16, 16), block_size=16)))
    layer = SimpleNamespace(expert_map=None, global_num_experts=2, activation=SimpleNamespace(value="silu"))
    backend = form.apply(layer, torch.zeros(1, 16), torch.ones(1, 1), torch.zeros(1, 1))
    assert backend == ("batch_invariant" if invariant else "auto")


def test_what_has_no_kernel_for_it_is_dequantized_on_a_gpu(invariant):
    assert invariance.plain_backend("auto", on_gpu=True) == ("dequantize" if invariant else "auto")
    assert invariance.plain_backend("auto", on_gpu=False) == "auto"
    assert invariance.plain_backend("reference", on_gpu=True) == "reference"
