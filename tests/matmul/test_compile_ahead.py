from __future__ import annotations

import threading

import pytest
import torch

pytest.importorskip("triton")

import triton

from qwantize_vllm.matmul import compile_ahead as ahead
from qwantize_vllm.matmul.backends import run_swizzled
from qwantize_vllm.matmul.op import normed_matmul_swizzled_op
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.matmul.tile_shapes import choose_shape, shapes_for
from tests.matmul.test_swizzled_matmul import make
from tests.matmul.test_wgmma import hopper


@pytest.mark.parametrize("major", [8, 9, 10, None])
@pytest.mark.parametrize(("groups", "tiles"), [(1, 1), (64, 64), (64, 224), (96, 64), (448, 64)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_shapes_for_are_those_of_any_number_of_tokens(major, groups, tiles, block_size):
    chosen = {choose_shape(major, tokens, groups, tiles, True, block_size) for tokens in range(1, 600)} - {None}
    assert set(shapes_for(major, groups, tiles, block_size)) == chosen


def test_nothing_is_compiled_without_a_gpu():
    _, q = make("cpu", 64, 256, 1, torch.bfloat16)
    ahead.compile_ahead(swizzle(q), torch.bfloat16, None)
    assert not ahead._seen


@pytest.mark.gpu
@pytest.mark.parametrize("with_bias", [False, True])
def test_what_was_compiled_ahead_is_not_compiled_again(monkeypatch, tmp_path, with_bias):
    """Nor is a launcher built again, and none is loaded but where it is launched (triton_launchers.py)."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    events = watch_launchers(monkeypatch)
    x, q = make("cuda", 208, 1088, 700, torch.float16, 32)
    weight, bias = swizzle(q), torch.randn(208, device="cuda").half() if with_bias else None
    events.clear()
    ahead._seen.clear()
    ahead.compile_ahead(weight, x.dtype, bias)
    ahead._threads(x.device).shutdown(wait=True)
    ahead._threads.cache_clear()
    assert not [thread for event, thread in events if event == "loaded"]
    events.clear()
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **what: compiled.append(what["repr"]))
    for tokens in (1, 8, 9, 16, 20, 33, 64, 65, 128, 129, 300, 700):
        run_swizzled(x[:tokens], weight, bias)
    assert not [repr for repr in compiled if "unswizzle" not in repr]
    assert len([thread for event, thread in events if event == "built"]) <= len(compiled)


@hopper
@pytest.mark.gpu
def test_what_norms_and_gates_was_compiled_ahead(monkeypatch, tmp_path):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    x, q = make("cuda", 384, 1056, 40, torch.bfloat16)
    weight = swizzle(q)
    ahead._seen.clear()
    ahead.compile_ahead(weight, x.dtype, None)
    ahead.compile_normed_ahead(weight, x.dtype, None, gated=True)
    ahead._threads(x.device).shutdown(wait=True)
    ahead._threads.cache_clear()
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **what: compiled.append(what["repr"]))
    tensors = (weight.words, weight.scales, weight.global_scale, weight.arrived)
    for tokens in (1, 2, 3, 40):
        normed_matmul_swizzled_op(x[:tokens], x[:tokens], x[0], 1e-5, *tensors, None, 384, 16, "auto", True)
    assert not [repr for repr in compiled if "unswizzle" not in repr]


def watch_launchers(monkeypatch):
    """What Triton does with modules in C, and in which thread."""
    from triton.runtime import build

    events = []
    for event, original in {"built": build._build, "loaded": build._load_module_from_path}.items():

        def watched(*arguments, event=event, original=original):
            events.append((event, threading.current_thread()))
            return original(*arguments)

        monkeypatch.setattr(build, original.__name__, watched)
    return events
