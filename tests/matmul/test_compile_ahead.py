from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton

from qwantize_vllm.matmul import compile_ahead as ahead
from qwantize_vllm.matmul.backends import run_swizzled
from qwantize_vllm.matmul.every_kernel import LinearKernels
from qwantize_vllm.matmul.op import normed_matmul_swizzled_op
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.matmul.tile_shapes import choose_shape, shapes_for
from tests.matmul.forget import forget_kernels
from tests.matmul.test_swizzled_matmul import make
from tests.matmul.test_wgmma import hopper
from tests.programs import run_program


@pytest.mark.parametrize("major", [8, 9, 10, None])
@pytest.mark.parametrize(("groups", "tiles"), [(1, 1), (64, 64), (64, 224), (96, 64), (448, 64)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_shapes_for_are_those_of_any_number_of_tokens(major, groups, tiles, block_size):
    chosen = {choose_shape(major, tokens, groups, tiles, True, block_size) for tokens in range(1, 600)} - {None}
    assert set(shapes_for(major, groups, tiles, block_size)) == chosen


def test_what_is_launched_ahead_is_what_any_number_of_tokens_takes():
    assert [line.rsplit(maxsplit=1)[0] for line in run_program("tests.every_launch")] == [
        "256x1024",
        "4096x4096",
        "136x1040 others",
        "6144x4096 normed",
        "28672x4096 gated",
        "8 of 8 experts",
        "64 of 64 experts",
        "8 of 64 experts",
        "both products",
        "4096x4096",
        "136x1040 others",
        "8 of 8 experts",
        "8 of 64 experts",
        "2 of 8 experts",
    ]


def test_nothing_is_compiled_without_a_gpu():
    _, q = make("cpu", 64, 256, 1, torch.bfloat16)
    assert ahead.compile_ahead(LinearKernels(swizzle(q), torch.bfloat16, None)) is None
    assert not ahead._asked_for


def test_what_cannot_be_noted_is_left_to_the_launch_and_the_log_says_so(monkeypatch, caplog):
    def fail(launch):
        raise KeyError("no such shape")

    monkeypatch.setattr(ahead, "_asked_for", set())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    kernels = SimpleNamespace(device=torch.device("cuda"), kind="kind", launch_all=fail)
    with caplog.at_level(logging.INFO):
        assert ahead.compile_ahead(kernels) is None
    assert "compiled as they are launched" in caplog.text
    assert "KeyError: 'no such shape'" in caplog.text


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Names of the kernels that this process compiles, with nothing in memory and a cache of its own."""
    names = []

    def listen(*, src, cache_hit, **rest):
        if not cache_hit:
            names.append(src.name)

    forget_kernels(monkeypatch)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    monkeypatch.setattr(ahead, "_asked_for", set())
    return names


@pytest.mark.gpu
@pytest.mark.parametrize("with_bias", [False, True])
def test_what_was_compiled_ahead_is_not_compiled_again(monkeypatch, compiled, with_bias):
    """Nor is a launcher built again, and none is loaded but where it is launched (triton_launchers.py)."""
    x, q = make("cuda", 208, 1088, 700, torch.float16, 32)
    weight, bias = swizzle(q), torch.randn(208, device="cuda").half() if with_bias else None
    events = watch_launchers(monkeypatch)
    compiled.clear()
    waiting = ahead.compile_ahead(LinearKernels(weight, x.dtype, bias))
    assert waiting is not None
    waiting.join()
    assert compiled == events == []
    for tokens in (1, 8, 9, 16, 20, 33, 64, 65, 128, 129, 300, 700):
        run_swizzled(x[:tokens], weight, bias)
    assert not [name for name in compiled if "unswizzle" not in name]
    assert events.count("built") <= len(compiled)


@hopper
@pytest.mark.gpu
def test_what_norms_and_gates_was_compiled_ahead(compiled):
    x, q = make("cuda", 384, 1056, 40, torch.bfloat16)
    weight = swizzle(q)
    waiting = ahead.compile_ahead(LinearKernels(weight, x.dtype, None, normed=True, gated=True))
    assert waiting is not None
    waiting.join()
    tensors = (weight.words, weight.scales, weight.global_scale, weight.arrived)
    for tokens in (1, 2, 3, 40):
        normed_matmul_swizzled_op(x[:tokens], x[:tokens], x[0], 1e-5, *tensors, None, 384, 16, "auto", True)
    assert not {"_decode_kernel", "_swizzled_kernel", "_add_norm_kernel", "_gate_kernel"} & set(compiled)


def watch_launchers(monkeypatch):
    """What Triton does with modules in C."""
    from triton.runtime import build

    events = []
    for event, original in {"built": build._build, "loaded": build._load_module_from_path}.items():

        def watched(*arguments, event=event, original=original):
            events.append(event)
            return original(*arguments)

        monkeypatch.setattr(build, original.__name__, watched)
    return events
