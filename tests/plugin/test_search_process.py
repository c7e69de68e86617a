from __future__ import annotations

import logging
import os
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
pytest.importorskip("vllm")

from qwantize_vllm import QwantizeSettings
from qwantize_vllm.plugin import config as plugin_config
from qwantize_vllm.plugin import search_process
from qwantize_vllm.plugin.config import QwantizeConfig
from qwantize_vllm.plugin.search_process import start_search_process
from tests.programs import run_program


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What processes were asked for, in a cache that has nothing; none is started."""
    given = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(search_process, "_thread", None)
    monkeypatch.setattr(search_process, "run_module", lambda name, asked: given.append((name, asked)) or "")
    return given


@pytest.mark.parametrize("given", [("optimal", "16", "fork"), ("naive", "32", "module")])
def test_a_layer_finds_what_the_process_has_compiled(tmp_path, given):
    lines = run_program("tests.compile_searches", *given, TRITON_CACHE_DIR=str(tmp_path))
    names = " ".join(lines).split()
    assert names == ["_matrix_amax_kernel", "_quality_kernel", "_scales_kernel", "_search_sse_kernel", "_words_kernel"]


def test_a_search_with_hessians_has_other_kernels(asked):
    assert start_search_process(QwantizeSettings(scale_search="hessian", hessian=__file__), 90, fork=False) is None
    assert asked == []


def test_that_there_is_no_process_the_log_says(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(search_process, "_thread", None)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        start_search_process(QwantizeSettings(), 90, fork=False).join()
    (record,) = caplog.records
    assert "will be compiled while they are loaded" in record.message
    assert "/nowhere/python" in record.message


def test_that_a_fork_fails_the_log_says(asked, monkeypatch, capfd):
    """It is written by the fork itself."""

    def fail(asked):
        raise ValueError("no kernel")

    monkeypatch.setattr(search_process, "compile_searches", fail)
    monkeypatch.setattr(search_process, "_tell_failure", lambda why: os.write(2, why.encode()))
    start_search_process(QwantizeSettings(), 90, fork=True).join()
    assert "ValueError: no kernel" in capfd.readouterr().err
    assert asked == []


def test_that_there_is_no_fork_the_log_says_and_the_engine_starts(asked, monkeypatch, caplog):
    def fork():
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        assert start_search_process(QwantizeSettings(), 90, fork=True) is None
    (record,) = caplog.records
    assert "will be compiled while they are loaded: BlockingIOError" in record.message


def platform(capability, cuda=True):
    found = None if capability is None else SimpleNamespace(to_int=lambda: capability)
    return SimpleNamespace(is_cuda=lambda: cuda, get_device_capability=lambda: found)


def test_an_engine_that_is_configured_asks_for_it(asked, monkeypatch):
    monkeypatch.setattr(plugin_config, "current_platform", platform(90))
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    config = QwantizeConfig.from_config({"quant_method": "qwantize", "block_size": 32})
    config.maybe_update_config("a model", hf_config=None)
    search_process._thread.join()
    ((module, what),) = asked
    assert module == "qwantize_vllm.plugin.search_process"
    assert what["settings"] == {"scale_search": "optimal", "block_size": 32, "backend": "auto"}
    assert what["target"] == ["cuda", 90, 32]


@pytest.mark.parametrize("where", [platform(90, cuda=False), platform(None)])
def test_without_an_nvidia_gpu_none_is_asked_for(asked, monkeypatch, where):
    monkeypatch.setattr(plugin_config, "current_platform", where)
    QwantizeConfig().maybe_update_config("a model")
    assert asked == []
    assert search_process._thread is None
