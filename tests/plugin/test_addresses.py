"""What CUDA graphs hold the addresses of, and vLLM's reload does not look after."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from qwantize_vllm.plugin import addresses
from qwantize_vllm.plugin.addresses import keep_latent_projections, same_addresses


class Attention(torch.nn.Module):
    """Makes what it multiplies by anew with each load, as latent attention of vLLM 0.25 does, of a value and a size."""

    def process_weights_after_loading(self, value, size=3):
        self.W_UV = torch.full((size, 2), value).transpose(0, 1)


@pytest.fixture
def attention(monkeypatch):
    monkeypatch.setattr(addresses, "MLAAttention", Attention)
    layer = Attention()
    for _ in range(2):  # as often as vLLM asks
        keep_latent_projections(layer)
    return layer


def test_what_latent_attention_takes_apart_stays_where_it_is(attention):
    attention.process_weights_after_loading(1.0)
    first = attention.W_UV
    attention.process_weights_after_loading(2.0)
    assert attention.W_UV is first
    assert first.eq(2).all()


def test_it_is_wrapped_once(attention):
    wrapped = attention.process_weights_after_loading
    keep_latent_projections(attention)
    assert attention.process_weights_after_loading is wrapped


def test_other_layers_are_left_alone():
    layer = Attention()
    keep_latent_projections(layer)
    assert "process_weights_after_loading" not in vars(layer)


def test_what_has_another_size_is_replaced(attention):
    attention.process_weights_after_loading(1.0)
    attention.process_weights_after_loading(2.0, size=4)
    assert attention.W_UV.shape == (2, 4)


def test_parameters_and_what_is_gone_are_not_touched():
    layer = torch.nn.Linear(2, 2)
    layer.scratch = layer.gone = torch.zeros(2)
    with same_addresses(layer):
        layer.weight = replaced = torch.nn.Parameter(torch.ones(2, 2))
        del layer.gone
        layer.scratch = torch.ones(2)
    assert layer.weight is replaced
    assert not hasattr(layer, "gone")
    assert layer.scratch.eq(1).all()
