from __future__ import annotations

import logging

import pytest
import torch

from qwantize_vllm import QwantizeSettings
from qwantize_vllm.plugin import rehearsal, search_process
from tests.matmul.forget import forget_kernels


@pytest.fixture
def done(monkeypatch):
    """What was rehearsed, and where."""
    rehearsed = []
    monkeypatch.setattr(rehearsal, "_thread", None)
    monkeypatch.setattr(rehearsal, "_rehearse", lambda *given: rehearsed.append(given))
    return rehearsed


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("scale_search", ["naive", "optimal"])
def test_a_layer_of_zeros_goes_all_the_way(scale_search, block_size):
    settings = QwantizeSettings(scale_search=scale_search, block_size=block_size)
    rehearsal.rehearse(settings, torch.zeros(64, 64, dtype=torch.bfloat16))


def test_without_a_gpu_there_is_none(done):
    rehearsal.begin_rehearsal(QwantizeSettings(), 64, torch.bfloat16, torch.device("cpu"))
    rehearsal.end_rehearsal()
    assert done == []


def test_there_is_one_in_a_process(done):
    settings, device = QwantizeSettings(), torch.device("cuda", 3)
    for k in (64, 128):
        rehearsal.begin_rehearsal(settings, k, torch.bfloat16, device)
    rehearsal.end_rehearsal()
    assert done == [(settings, 64, torch.bfloat16, device)]


def test_what_fails_is_left_to_the_layers_and_the_log_says_so(monkeypatch, caplog):
    def fail(*given):
        raise ValueError("no kernel")

    monkeypatch.setattr(rehearsal, "rehearse", fail)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        rehearsal._rehearse(QwantizeSettings(), 64, torch.bfloat16, torch.device("cpu"))
    assert "in vain" in caplog.text
    assert "ValueError: no kernel" in caplog.text


def test_without_a_thread_there_is_none(done, monkeypatch, caplog):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(rehearsal.threading.Thread, "start", start)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        rehearsal.begin_rehearsal(QwantizeSettings(), 64, torch.bfloat16, torch.device("cuda"))
    rehearsal.end_rehearsal()
    assert "in vain" in caplog.text
    assert "can't start new thread" in caplog.text
    assert not done


@pytest.mark.gpu
def test_what_was_rehearsed_is_not_compiled_again(monkeypatch):
    import triton

    rehearsal._rehearse(QwantizeSettings(), 4096, torch.bfloat16, torch.device("cuda", 0))
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **what: compiled.append(what["repr"]))
    for rows, k in ((6144, 4096), (4096, 14336)):
        rehearsal.rehearse(QwantizeSettings(), torch.randn(rows, k, device="cuda").bfloat16())
    assert compiled == []


@pytest.mark.gpu
@pytest.mark.parametrize("scale_search", ["naive", "optimal"])
def test_what_a_process_compiled_before_is_not_compiled_again(monkeypatch, tmp_path, scale_search):
    """Nor is a launcher built again, nor the driver."""
    import triton
    from triton.runtime import build

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(search_process, "_thread", None)
    forget_kernels(monkeypatch)
    settings, weight = QwantizeSettings(scale_search=scale_search), torch.zeros(512, 14336, device="cuda").bfloat16()
    major, minor = torch.cuda.get_device_capability()
    waiting = search_process.start_search_process(settings, 10 * major + minor, fork=False)
    assert waiting is not None
    waiting.join()
    assert list(tmp_path.rglob("cuda_utils*"))
    compiled = []

    def listen(*, src, cache_hit, **rest):
        if not cache_hit:
            compiled.append(src.name)

    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    original = build._build
    monkeypatch.setattr(build, "_build", lambda name, *rest: compiled.append(name) or original(name, *rest))
    rehearsal.compile_together(settings, weight)
    rehearsal.rehearse(settings, weight)
    assert compiled == []


@pytest.mark.gpu
@pytest.mark.parametrize("scale_search", ["naive", "optimal"])
def test_all_that_is_launched_is_compiled_together(monkeypatch, scale_search):
    import triton

    settings, weight = QwantizeSettings(scale_search=scale_search), torch.zeros(1024, 4096, device="cuda").bfloat16()
    rehearsal.compile_together(settings, weight)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **what: compiled.append(what["repr"]))
    rehearsal.rehearse(settings, weight)
    assert compiled == []
