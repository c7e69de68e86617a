from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from qwantize_vllm.matmul import compile_process, op
from qwantize_vllm.matmul import warm_up as module
from qwantize_vllm.matmul.every_kernel import Seen
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.matmul.warm_up import announce, announce_experts, warm_up
from tests.matmul.forget import forget_kernels
from tests.matmul.test_swizzled_matmul import make
from tests.matmul.test_wgmma import hopper

HALF = torch.bfloat16


@pytest.fixture
def launched(monkeypatch):
    """What is launched; whether a graph is being captured is the key "capturing"."""
    found = SimpleNamespace(capturing=False, kinds=[])
    monkeypatch.setattr(module, "_announced", Seen())
    monkeypatch.setattr(module, "_waiting", [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setattr(module, "launch_every", lambda weight, *given: found.kinds.append(weight.shape))
    monkeypatch.setattr(module, "launch_every_normed", lambda weight, *given: found.kinds.append(given[2]))
    monkeypatch.setattr(module, "launch_every_of_experts", lambda w13, w2, top_k, *given: found.kinds.append(top_k))
    return found


def weight(*shape, device="cuda"):
    """As much of one as is looked at."""
    return SimpleNamespace(shape=shape, block_size=16, global_scale=torch.ones(()), device=torch.device(device))


def experts(*shape):
    words = SimpleNamespace(shape=(8,), device=torch.device("cuda"))
    return SimpleNamespace(shape=shape, block_size=16, global_scales=torch.ones(8, 1), words=words)


def test_once_for_all_weights_that_are_alike(launched):
    for _ in range(2):
        for n in (64, 64, 128):
            announce(weight(n, 256), HALF, None)
    assert launched.kinds == [], "not before the first run"
    for _ in range(2):
        warm_up()
    assert sorted(launched.kinds) == [(64, 256), (128, 256)]


def test_what_a_reload_announces_is_known(launched):
    announce(weight(64, 256), HALF, None)
    announce_experts(experts(64, 128), experts(128, 32), 2, HALF, "silu")
    warm_up()
    announce(weight(64, 256), HALF, None)
    announce_experts(experts(64, 128), experts(128, 32), 2, HALF, "silu")
    assert module._waiting == [], "or a reload's tensors would be held"


def test_norms_gates_and_experts(launched):
    announce(weight(64, 256), HALF, None, normed=True, gated=False)
    announce(weight(64, 256), HALF, None, normed=True, gated=True)
    for top_k in (2, 2, 3):
        announce_experts(experts(64, 128), experts(128, 32), top_k, HALF, "silu")
    warm_up()
    assert launched.kinds == [3, 2, (64, 256), True, (64, 256), False]


def test_not_while_a_graph_is_captured_but_after(launched):
    announce(weight(64, 256), HALF, None)
    launched.capturing = True
    warm_up()
    assert launched.kinds == []
    launched.capturing = False
    warm_up()
    assert launched.kinds == [(64, 256)]


def test_nothing_is_announced_for_a_cpu(launched):
    announce(weight(64, 256, device="cpu"), HALF, None)
    assert module._waiting == []


def test_what_cannot_be_launched_is_told_and_left_out(launched, monkeypatch, caplog):
    def fail(w13, w2, top_k, *given):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(module, "launch_every_of_experts", fail)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    announce(weight(64, 256), HALF, None)
    announce_experts(experts(64, 128), experts(128, 32), 2, HALF, "silu")
    with caplog.at_level(logging.WARNING):
        warm_up()
    assert "not launched ahead of requests: RuntimeError: out of shared memory" in caplog.text
    assert launched.kinds == [(64, 256)]


def test_what_is_being_compiled_is_waited_for(launched, monkeypatch):
    compiled, begun = threading.Event(), threading.Event()

    def compile_elsewhere(requests):
        begun.set()
        assert compiled.wait(60)

    monkeypatch.setattr(compile_process, "_PATIENCE", 0.01)
    monkeypatch.setattr(compile_process, "_compile_elsewhere", compile_elsewhere)
    request = compile_process.Request([("module", "kernel", "{}")], ["source"], ["cuda", 90, 32])
    thread = compile_process.start_compiling(request)
    announce(weight(64, 256), HALF, None)
    warming = threading.Thread(target=warm_up)
    warming.start()
    assert begun.wait(60)
    warming.join(0.2)
    assert warming.is_alive()
    assert launched.kinds == []
    compiled.set()
    warming.join(60)
    assert launched.kinds == [(64, 256)]
    thread.join(60)


def test_nobody_waits_for_a_compiler_that_hangs(launched, monkeypatch, caplog):
    monkeypatch.setattr(compile_process, "_LONGEST_WAIT", 0.05)
    monkeypatch.setattr(compile_process, "_compiling", True)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    announce(weight(64, 256), HALF, None)
    with caplog.at_level(logging.INFO):
        warm_up()
    assert "waiting for kernels" in caplog.text
    assert "not compiled after" in caplog.text
    assert launched.kinds == [(64, 256)]


@pytest.fixture
def late(monkeypatch):
    """Names of kernels that are compiled or loaded from now on, with none in memory."""
    import triton

    forget_kernels(monkeypatch)
    monkeypatch.setattr(module, "_announced", Seen())
    monkeypatch.setattr(module, "_launched", Seen())
    names = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, fn, **more: names.append(fn.name))
    return names


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 200])
def test_a_first_product_launches_the_kernels_of_all_others(late, tokens):
    """Also where the first is of many tokens, as in an engine."""
    x, q = make("cuda", 336, 1088, 300, torch.float16)
    weight = swizzle(q)
    rest = (weight.words, weight.scales, weight.global_scale, weight.arrived, None, 336, 16, "auto")
    announce(weight, x.dtype, None)
    op.matmul_swizzled_op(x[:tokens], *rest)
    assert late
    late.clear()
    for m in (1, 2, 7, 16, 30, 60, 100, 300):
        op.matmul_swizzled_op(x[:m], *rest)
    assert not late


@hopper
@pytest.mark.gpu
def test_a_first_product_launches_those_that_norm_and_gate(late):
    x, q = make("cuda", 384, 1088, 300, HALF)
    weight = swizzle(q)
    rest = (weight.words, weight.scales, weight.global_scale, weight.arrived, None, 384, 16, "auto", True)
    announce(weight, x.dtype, None, normed=True, gated=True)
    op.normed_matmul_swizzled_op(x, x, x[0], 1e-5, *rest)
    assert late
    late.clear()
    for m in (1, 2, 3, 40, 300):
        op.normed_matmul_swizzled_op(x[:m], x[:m], x[0], 1e-5, *rest)
    assert not late
