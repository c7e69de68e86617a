from __future__ import annotations

import dataclasses
import logging
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from qwantize_vllm.matmul import compile_process, op
from qwantize_vllm.matmul import warm_up as module
from qwantize_vllm.matmul.every_kernel import ExpertKernels, LinearKernels
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.matmul.warm_up import announce, warm_up
from tests.matmul.forget import forget_kernels
from tests.matmul.test_experts import make as make_experts
from tests.matmul.test_experts import swizzled
from tests.matmul.test_swizzled_matmul import make
from tests.matmul.test_wgmma import hopper

HALF = torch.bfloat16


@pytest.fixture
def launched(monkeypatch):
    """The kinds that are launched; whether a graph is being captured."""
    found = SimpleNamespace(capturing=False, kinds=[])
    monkeypatch.setattr(module, "_announced", set())
    monkeypatch.setattr(module, "_waiting", [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    return found


def kernels(launched, kind, device="cuda"):
    """In place of those of a layer."""
    return SimpleNamespace(
        device=torch.device(device), kind=kind, launch_all=lambda launch: launched.kinds.append(kind)
    )


def test_once_for_all_layers_that_are_alike(launched):
    for _ in range(2):
        for kind in "aab":
            announce(kernels(launched, kind))
    assert launched.kinds == [], "not before the first run"
    for _ in range(2):
        warm_up()
    assert sorted(launched.kinds) == ["a", "b"]


def test_nothing_is_held_of_a_reload(launched):
    announce(kernels(launched, "a"))
    warm_up()
    announce(kernels(launched, "a"))
    assert module._waiting == []


def test_not_while_a_graph_is_captured_but_after(launched):
    announce(kernels(launched, "a"))
    launched.capturing = True
    warm_up()
    assert launched.kinds == []
    launched.capturing = False
    warm_up()
    assert launched.kinds == ["a"]


def test_nothing_is_announced_for_a_cpu(launched):
    announce(kernels(launched, "a", device="cpu"))
    assert module._waiting == []


def test_what_cannot_be_launched_is_told_and_left_out(launched, monkeypatch, caplog):
    def fail(launch):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    announce(kernels(launched, "a"))
    announce(SimpleNamespace(device=torch.device("cuda"), kind="b", launch_all=fail))
    with caplog.at_level(logging.WARNING):
        warm_up()
    assert "not launched ahead of requests: RuntimeError: out of shared memory" in caplog.text
    assert launched.kinds == ["a"]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float16},
        {"bias": torch.zeros(64)},
        {"normed": True},
        {"normed": True, "gated": True},
        {"weight": swizzle(make("cpu", 128, 256, 1, HALF)[1])},
        {"weight": swizzle(make("cpu", 64, 256, 1, HALF, 32)[1])},
    ],
)
def test_layers_that_are_not_alike(change):
    one = LinearKernels(swizzle(make("cpu", 64, 256, 1, HALF)[1]), HALF, None)
    assert one.kind == dataclasses.replace(one).kind
    assert one.kind != dataclasses.replace(one, **change).kind


def test_experts_that_are_not_alike():
    _, w13, w2, *_ = make_experts("cpu", 1, 4, 2, 64, 96, HALF)
    one = ExpertKernels(*swizzled(w13, w2), 2, HALF, "silu")
    assert one.kind == dataclasses.replace(one).kind
    for change in ({"top_k": 3}, {"dtype": torch.float16}, {"activation": "gelu"}):
        assert one.kind != dataclasses.replace(one, **change).kind
    first, second = (dataclasses.replace(each, total=8) for each in swizzled(w13, w2))
    assert one.kind != ExpertKernels(first, second, 2, HALF, "silu").kind, "other shapes serve as many tokens"
    _, more, others, *_ = make_experts("cpu", 1, 5, 2, 64, 96, HALF)
    assert one.kind != ExpertKernels(*swizzled(more, others), 2, HALF, "silu").kind


def test_what_is_being_compiled_is_waited_for(launched, monkeypatch):
    compiled, begun = threading.Event(), threading.Event()

    def run_module(name, requests):
        begun.set()
        return "" if compiled.wait(60) else "nobody says that it is compiled"

    monkeypatch.setattr(compile_process, "_PATIENCE", 0.01)
    monkeypatch.setattr(compile_process, "run_module", run_module)
    request = compile_process.Request([("module", "kernel", "{}")], ["source"], ["cuda", 90, 32])
    thread = compile_process.start_compiling(request)
    announce(kernels(launched, "a"))
    warming = threading.Thread(target=warm_up)
    warming.start()
    assert begun.wait(60)
    warming.join(0.2)
    assert warming.is_alive()
    assert launched.kinds == []
    compiled.set()
    warming.join(60)
    assert launched.kinds == ["a"]
    thread.join(60)


def test_nobody_waits_for_a_compiler_that_hangs(launched, monkeypatch, caplog):
    monkeypatch.setattr(compile_process, "_LONGEST_WAIT", 0.05)
    monkeypatch.setattr(compile_process, "_compiling", True)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    announce(kernels(launched, "a"))
    with caplog.at_level(logging.INFO):
        warm_up()
    assert "waiting for kernels" in caplog.text
    assert "not compiled after" in caplog.text
    assert launched.kinds == ["a"]


@pytest.fixture
def late(monkeypatch):
    """Names of kernels that are compiled or loaded from now on, with none in memory."""
    import triton

    forget_kernels(monkeypatch)
    monkeypatch.setattr(module, "_announced", set())
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
    announce(LinearKernels(weight, x.dtype, None))
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
    announce(LinearKernels(weight, x.dtype, None, normed=True, gated=True))
    op.normed_matmul_swizzled_op(x, x, x[0], 1e-5, *rest)
    assert late
    late.clear()
    for m in (1, 2, 3, 40, 300):
        op.normed_matmul_swizzled_op(x[:m], x[:m], x[0], 1e-5, *rest)
    assert not late
