"""What becomes of a layer's experts besides their tensors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from qwantize_vllm.plugin import expert_weights
from qwantize_vllm.plugin.expert_weights import GroupedForm
from tests.plugin.test_expert_balancing import HIDDEN, INNER, layer_of, quantize


@pytest.mark.parametrize("compiles", [True, False])
def test_kernels_are_compiled_by_one_rank_and_launched_by_all(kernel_on, monkeypatch, compiles):
    called = []

    def note(name):
        return lambda w13, w2, *rest: called.append((name, w13.shape, w2.shape, *rest))

    monkeypatch.setattr(expert_weights, "compiles_for_others", lambda: compiles)
    monkeypatch.setattr(expert_weights, "compile_experts_ahead", note("compiled"))
    monkeypatch.setattr(expert_weights, "announce_experts", note("announced"))
    experts = quantize(16, kernel_on)
    layer_of(GroupedForm(experts), experts)
    kernels = ((2 * INNER, HIDDEN), (HIDDEN, INNER), 2, torch.bfloat16, "silu")
    assert called == [("compiled", *kernels), ("announced", *kernels)][not compiles :]
    called.clear()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    layer_of(GroupedForm(experts), experts)
    assert not called
