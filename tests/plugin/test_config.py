from __future__ import annotations

import pickle
from importlib import metadata

import pytest

pytest.importorskip("vllm")

from qwantize_vllm.plugin import register
from qwantize_vllm.plugin.config import QwantizeConfig


def test_the_entry_point_is_registered():
    (entry,) = [e for e in metadata.entry_points(group="vllm.general_plugins") if e.name == "qwantize"]
    assert entry.load() is register


def test_register_makes_the_method_known_and_may_run_twice():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    register()
    register()
    assert QUANTIZATION_METHODS.count("qwantize") == 1
    assert get_quantization_config("qwantize") is QwantizeConfig


def test_a_config_can_be_sent_to_another_process():
    config = pickle.loads(pickle.dumps(QwantizeConfig.from_config({"quant_method": "qwantize", "block_size": 32})))
    assert config.get_name() == "qwantize"


def test_what_is_wrong_is_refused_when_the_config_is_made(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"hf-overrides.*got 'optimum'"):
        QwantizeConfig.from_config({"quant_method": "qwantize", "scale_search": "optimum"})
    path = tmp_path / "q.yaml"
    path.write_text("block_size: 24\n")
    with pytest.raises(ValueError, match=r"block_size \(from .*q.yaml\): got 24"):
        QwantizeConfig.from_config_file(str(path))
    monkeypatch.setenv("QWANTIZE_CONFIG", str(path))
    with pytest.raises(ValueError, match="from the variable QWANTIZE_CONFIG"):
        QwantizeConfig()
