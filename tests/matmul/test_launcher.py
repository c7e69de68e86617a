"""Launches that are made again: kinds no coarser than what Triton compiles for, and on a GPU the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from qwantize_vllm.matmul import launcher, triton_grouped, triton_plan
from qwantize_vllm.matmul.backends import run_experts
from qwantize_vllm.matmul.launcher import launch_again
from qwantize_vllm.triton_launch import launch_now
from tests.matmul.test_experts import make, swizzled


class Kernel:
    """Notes what is launched in the ordinary way."""

    arg_names = ("pointer", "argument", "CONSTANT")

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.calls.append((grid, arguments, constants))


@pytest.fixture
def cheap(monkeypatch):
    """What is launched in the cheap way."""
    launched = []
    monkeypatch.setattr(launcher, "_launchers", {})
    monkeypatch.setattr(launcher, "_understood", lambda *rest: lambda *given: launched.append(given))
    return launched


def values():
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    numbers = [0, 1, 2, 16, 17, -1, -16, 2**31 - 1, 2**31, -(2**31), 2**32 + 16, 2**63, 2**64 - 1]
    memory = torch.empty(1024, dtype=torch.int16)
    tensors = [memory, memory[1:], memory[8:], memory.view(torch.bfloat16), memory.view(torch.int32)[1:]]
    wide, narrow = (gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=16) for width in (128, 64))
    descriptors = [
        TensorDescriptor(memory.view(dtype), [count, 64], [64, 1], [block, 64], layout)
        for dtype in (torch.int16, torch.bfloat16)
        for count in (1, 4)
        for block in (8, 16)
        for layout in (wide, narrow)
    ]
    return [None, True, False, 1.0, 0.5, *numbers, *tensors, *descriptors]


def test_kinds_are_no_coarser_than_what_triton_compiles_for(cheap):
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    base, again = torch.empty(16), 0
    for first, second in itertools.permutations(values(), 2):
        kernel = Kernel()
        launch_again(kernel, (1,), base, first, CONSTANT=1)
        launch_again(kernel, (1,), base, second, CONSTANT=1)
        if len(kernel.calls) == 1:
            again += 1
            a, b = (native_specialize_impl(CUDABackend, each, False, True, True) for each in (first, second))
            assert a == b, (first, second)
    assert again == len(cheap) > 20


def test_a_kind_has_its_kernel_and_its_constants(cheap):
    x = torch.empty(16)
    kernels = [Kernel(), Kernel()]
    constants = [{"CONSTANT": 1}, {"CONSTANT": True}, {"CONSTANT": 1.0}, {"CONSTANT": 1, "num_warps": 8}]
    for kernel, each in itertools.product(kernels, constants):
        launch_again(kernel, (2, 3), x, 5, **each)
    assert [len(kernel.calls) for kernel in kernels] == [4, 4]
    assert kernels[1].calls[3] == ((2, 3), (x, 5), {"CONSTANT": 1, "num_warps": 8})
    assert not cheap
    launch_again(kernels[0], (7,), torch.zeros(16), 6, CONSTANT=1)
    ((grid, (address, number)),) = [(grid, rest) for grid, *rest in cheap]
    assert (grid, number) == ((7,), 6)
    assert isinstance(address, int)


def test_what_triton_did_not_compile_is_launched_each_time(monkeypatch):
    monkeypatch.setattr(launcher, "_launchers", {})
    kernel = Kernel()
    for _ in range(3):
        launch_again(kernel, (1,), torch.empty(16), 5, CONSTANT=1)
    assert len(kernel.calls) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("many", [False, True])
def test_launches_made_again_have_the_bits_of_others(monkeypatch, many):
    """Few tokens and many, one and none besides that Triton compiles for, and rows at other addresses."""
    if many and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("runs on Hopper")
    launching = [triton_plan, triton_grouped]
    if many:
        from qwantize_vllm.matmul import gluon_grouped

        launching.append(gluon_grouped)
    run = gluon_grouped.experts_wgmma if many else triton_grouped.experts_swizzled
    monkeypatch.setattr(launcher, "_launchers", {})
    x, w13, w2, weights, ids = make("cuda", 1000, 8, 2, 256, 128, torch.bfloat16)
    first, second = swizzled(w13, w2)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape)
    for tokens in (1, 2, 7, 16, 100, 129, 1000, 1, 7, 1000):
        for rows in (x, shifted.copy_(x), -x):
            case = (rows[:tokens], first, second, weights[:tokens], ids[:tokens], "silu")
            with monkeypatch.context() as ordinary:
                for module in launching:
                    ordinary.setattr(module, "launch_again", launch_now)
                expected = run(*case)
            assert all(torch.equal(run(*case), expected) for _ in range(2))
    assert all(launch is not None for _, launch in launcher._launchers.values())


@pytest.mark.gpu
def test_a_stream_of_its_own_and_a_graph_are_launched_into(monkeypatch):
    monkeypatch.setattr(launcher, "_launchers", {})
    x, w13, w2, weights, ids = make("cuda", 100, 8, 2, 256, 128, torch.bfloat16)
    case = (*swizzled(w13, w2), weights, ids, "silu")
    run_experts(x, *case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run_experts(x, *case)
    x.neg_()
    expected = run_experts(x, *case)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
