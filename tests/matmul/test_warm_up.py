from __future__ import annotations

import threading

import pytest
import torch

pytest.importorskip("triton")

from qwantize_vllm.matmul import compile_process, op
from qwantize_vllm.matmul import warm_up as module
from qwantize_vllm.matmul.every_kernel import Seen
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.matmul.warm_up import warm_up, warm_up_experts, warm_up_normed
from tests.matmul.test_experts import make as make_experts
from tests.matmul.test_experts import swizzled
from tests.matmul.test_swizzled_matmul import make


@pytest.fixture
def launched(monkeypatch):
    """What is launched for; whether a graph is being captured is the key "capturing"."""
    found = {"capturing": False, "weights": [], "normed": [], "experts": []}
    monkeypatch.setattr(module, "_begun", Seen())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found["capturing"])
    monkeypatch.setattr(module, "launch_every", lambda *given: found["weights"].append(given[:3]))
    monkeypatch.setattr(module, "launch_every_normed", lambda *given: found["normed"].append(given[3]))
    monkeypatch.setattr(module, "launch_every_of_experts", lambda *given: found["experts"].append(given[2:5]))
    return found


def test_once_for_all_weights_that_are_alike(launched):
    weights = [swizzle(make("cpu", n, 256, 1, torch.bfloat16)[1]) for n in (64, 64, 128)]
    for _ in range(2):
        for weight in weights:
            warm_up(weight, torch.bfloat16, None)
    assert [given[0].shape for given in launched["weights"]] == [(64, 256), (128, 256)]
    warm_up(weights[0], torch.float16, None)
    warm_up(weights[0], torch.bfloat16, torch.zeros(64))
    assert len(launched["weights"]) == 4


def test_what_norms_and_gates_each_once(launched):
    weight = swizzle(make("cpu", 64, 256, 1, torch.bfloat16)[1])
    for gated in (False, True, False):
        warm_up_normed(weight, torch.bfloat16, None, gated)
    assert launched["normed"] == [False, True]
    warm_up(weight, torch.bfloat16, None)
    assert len(launched["weights"]) == 1


def test_once_for_all_experts_that_are_alike(launched):
    _, w13, w2, *_ = make_experts("cpu", 1, 4, 2, 64, 96, torch.bfloat16)
    for top_k in (2, 2, 3):
        warm_up_experts(*swizzled(w13, w2), top_k, torch.bfloat16, "silu")
    assert launched["experts"] == [(2, torch.bfloat16, "silu"), (3, torch.bfloat16, "silu")]


def test_not_while_a_graph_is_captured_but_after(launched):
    weight = swizzle(make("cpu", 64, 256, 1, torch.bfloat16)[1])
    launched["capturing"] = True
    warm_up(weight, torch.bfloat16, None)
    assert not launched["weights"]
    launched["capturing"] = False
    warm_up(weight, torch.bfloat16, None)
    assert len(launched["weights"]) == 1


def test_what_is_being_compiled_is_waited_for(launched, monkeypatch):
    compiled = threading.Event()
    thread = threading.Thread(target=compiled.wait)
    thread.start()
    monkeypatch.setattr(compile_process, "_thread", thread)
    weight = swizzle(make("cpu", 64, 256, 1, torch.bfloat16)[1])
    warming = threading.Thread(target=warm_up, args=(weight, torch.bfloat16, None))
    warming.start()
    warming.join(0.2)
    assert warming.is_alive()
    assert not launched["weights"]
    compiled.set()
    warming.join()
    assert len(launched["weights"]) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 200])
def test_a_first_product_launches_the_kernels_of_all_others(monkeypatch, tokens):
    """Also where the first is of many tokens, as in an engine."""
    import triton

    monkeypatch.setattr(module, "_begun", Seen())
    monkeypatch.setattr(module, "_launched", Seen())
    x, q = make("cuda", 336, 1088, 300, torch.float16)
    weight = swizzle(q)
    rest = (weight.words, weight.scales, weight.global_scale, weight.arrived, None, 336, 16, "auto")
    op.matmul_swizzled_op(x[:tokens], *rest)
    late = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, fn, **more: late.append(fn.name))
    for m in (1, 2, 7, 16, 30, 60, 100, 300):
        op.matmul_swizzled_op(x[:m], *rest)
    assert not late
