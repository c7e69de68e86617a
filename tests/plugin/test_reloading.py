"""Layers of which nothing came."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from qwantize_vllm.plugin import reloading
from qwantize_vllm.plugin.reloading import check_arrived


@pytest.mark.parametrize(
    ("model", "draft", "refused"),
    [("auto", None, True), ("dummy", None, False), ("auto", "dummy", False), ("auto", "auto", True)],
)
def test_a_layer_without_weights_is_refused_unless_vllm_writes_random_ones(monkeypatch, model, draft, refused):
    formats = [SimpleNamespace(load_format=each) for each in (model, draft)]
    speculative = None if draft is None else SimpleNamespace(draft_load_config=formats[1])
    config = SimpleNamespace(load_config=formats[0], speculative_config=speculative)
    monkeypatch.setattr(reloading, "get_current_vllm_config_or_none", lambda: config)
    with pytest.raises(ValueError, match="o_proj: the checkpoint has no weight") if refused else nullcontext():
        check_arrived(torch.nn.Linear(2, 2), "o_proj", 4, "o_proj")


def test_parts_that_a_loader_tells_apart_by_name_alone(monkeypatch):
    """As DBRX's: gate and up of all experts, which are one parameter here."""
    layer = torch.nn.Linear(2, 2)
    given = [SimpleNamespace(arguments={"weight_name": name, "expert_id": None}) for name in ("mlp.w1", "mlp.v1")]
    info = SimpleNamespace(load_numel=4, loaded_weights=[("w13_weight", each) for each in given])
    monkeypatch.setattr(reloading.layerwise, "get_layerwise_info", lambda layer: info)
    check_arrived(layer, "ffn.experts", 4, "gate and up")
    info.loaded_weights.append(info.loaded_weights[0])
    with pytest.raises(ValueError, match=r"w13_weight mlp\.w1 was given more than once"):
        check_arrived(layer, "ffn.experts", 4, "gate and up")
