from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm")

from qwantize_vllm import QwantizeSettings
from qwantize_vllm.plugin import config as plugin_config
from qwantize_vllm.plugin import search_process
from qwantize_vllm.plugin.config import QwantizeConfig
from qwantize_vllm.plugin.search_process import start_search_process
from tests.programs import run_program


@pytest.fixture
def nothing_done(monkeypatch, tmp_path):
    """No process was started, nor has an earlier start compiled anything."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(search_process, "_thread", None)


@pytest.fixture
def asked(nothing_done, monkeypatch):
    """What was asked of a new process or of a fork; none is started."""
    given = []
    monkeypatch.setattr(search_process, "run_module", lambda name, asked: given.append((name, asked)) or "")
    monkeypatch.setattr(search_process, "_fork", lambda asked: given.append(("fork", asked)) or (lambda: ""))
    return given


@pytest.fixture
def log(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        yield caplog


@pytest.mark.parametrize("given", [("optimal", "16", "fork"), ("naive", "32", "module")])
def test_a_layer_finds_what_the_process_has_compiled(tmp_path, given):
    lines = run_program("tests.compile_searches", *given, TRITON_CACHE_DIR=str(tmp_path))
    names = " ".join(lines).split()
    assert names == ["_matrix_amax_kernel", "_quality_kernel", "_scales_kernel", "_search_sse_kernel", "_words_kernel"]


def test_a_search_with_hessians_has_other_kernels(asked):
    assert start_search_process(QwantizeSettings(scale_search="hessian", hessian=__file__), 90, fork=False) is None
    assert asked == []


@pytest.mark.usefixtures("nothing_done")
def test_that_there_is_no_process_the_log_says(monkeypatch, log):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    start_search_process(QwantizeSettings(), 90, fork=False).join()
    (record,) = log.records
    assert "will be compiled while they are loaded" in record.message
    assert "/nowhere/python" in record.message


def fail(asked):
    raise ValueError("no kernel")


def be_killed(asked):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(asked):
    time.sleep(300)


@pytest.mark.usefixtures("nothing_done")
@pytest.mark.parametrize(("compile_searches", "code"), [(fail, 1), (be_killed, -9), (hang, -9)])
def test_that_a_fork_fails_the_log_says(monkeypatch, log, capfd, compile_searches, code):
    monkeypatch.setattr(search_process, "_LONGEST", 1.0)
    monkeypatch.setattr(search_process, "compile_searches", compile_searches)
    start_search_process(QwantizeSettings(), 90, fork=True).join()
    (record,) = log.records
    assert record.message.endswith(f"will be compiled while they are loaded: the process ended with {code}")
    assert ("ValueError: no kernel" in capfd.readouterr().err) == (compile_searches is fail)


@pytest.mark.usefixtures("nothing_done")
@pytest.mark.parametrize(("owner", "name"), [(os, "fork"), (threading.Thread, "start"), (search_process, "is_done")])
def test_whatever_fails_does_not_end_the_start_of_an_engine(monkeypatch, log, owner, name):
    def fail(*given):
        raise RuntimeError("out of everything")

    monkeypatch.setattr(search_process, "compile_searches", lambda asked: None)
    monkeypatch.setattr(owner, name, fail)
    assert start_search_process(QwantizeSettings(), 90, fork=True) is None
    (record,) = log.records
    assert "will be compiled while they are loaded: RuntimeError: out of everything" in record.message


def platform(capability, cuda=True):
    found = None if capability is None else SimpleNamespace(to_int=lambda: capability)
    return SimpleNamespace(is_cuda=lambda: cuda, get_device_capability=lambda: found)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(plugin_config, "current_platform", platform(90))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_engine_that_is_configured_asks_for_it(asked, monkeypatch, method):
    monkeypatch.setattr(plugin_config, "get_mp_context", lambda: multiprocessing.get_context(method))
    config = QwantizeConfig.from_config({"quant_method": "qwantize", "block_size": 32})
    config.maybe_update_config("a model", hf_config=None)
    search_process._thread.join()
    ((process, what),) = asked
    assert process == ("fork" if method == "fork" else "qwantize_vllm.plugin.search_process")
    assert what["settings"] == {"scale_search": "optimal", "block_size": 32, "backend": "auto"}
    assert what["target"] == ["cuda", 90, 32]


@pytest.mark.usefixtures("hopper")
def test_it_is_started_as_vllm_starts_its_own(asked, monkeypatch):
    """With a variable of the environment, or, in a few cases, whatever that says."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    QwantizeConfig().maybe_update_config("a model")
    search_process._thread.join()
    assert [process for process, _ in asked] == ["qwantize_vllm.plugin.search_process"]


@pytest.mark.usefixtures("hopper")
def test_where_layers_come_at_once_none_is_asked_for(asked, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(torch.cuda, "is_initialized", lambda: True)
        QwantizeConfig().maybe_update_config("the draft model of a worker")
    with monkeypatch.context() as context:
        context.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        QwantizeConfig().maybe_update_config("a model")
    assert asked == []


@pytest.mark.parametrize("where", [platform(90, cuda=False), platform(None)])
def test_without_an_nvidia_gpu_none_is_asked_for(asked, monkeypatch, where):
    monkeypatch.setattr(plugin_config, "current_platform", where)
    QwantizeConfig().maybe_update_config("a model")
    assert asked == []
    assert search_process._thread is None
