from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("vllm")

from qwantize_vllm import QwantizeSettings
from qwantize_vllm.plugin.linear import QwantizeLinearMethod
from qwantize_vllm.plugin.report import LoadReport


def test_gptq_refuses_a_layer_on_several_ranks(tmp_path):
    (tmp_path / "h").touch()
    settings = QwantizeSettings(scale_search="hessian", hessian=tmp_path / "h", refine="gptq")
    method = QwantizeLinearMethod(settings, "model.layers.0.mlp.down_proj", LoadReport(settings), [])
    layer = types.SimpleNamespace(tp_size=2)
    with pytest.raises(ValueError, match=r"down_proj is on 2 ranks; .*--tensor-parallel-size 1"):
        method.create_weights(layer, 64, [32], 128, 32, torch.bfloat16)
