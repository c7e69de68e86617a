from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from qwantize_vllm import matmul_nvfp4, swizzle
from qwantize_vllm.matmul import replay
from qwantize_vllm.matmul.backends import run_swizzled
from tests.matmul.test_swizzled_matmul import make
from tests.programs import run_program


def test_replayed_launches_are_those_of_triton():
    experts = ["experts_swizzled", "experts_swizzled", "experts_wgmma"]
    products = [line.split()[0] for line in run_program("tests.replay_launches")]
    assert products == ["matmul_decode", "matmul_swizzled", "matmul_swizzled", "matmul_wgmma", "areas", *experts]


def test_what_is_no_single_launch_is_run_each_time():
    calls = []

    def run(launch):
        calls.append(launch)
        return torch.zeros(2)

    for _ in range(3):
        assert replay.replay_or_run("no launch at all", (torch.zeros(1),), run).tolist() == [0, 0]
    assert len(calls) == 3


def test_what_was_not_to_be_recorded_is_recorded_the_next_time(monkeypatch):
    """As a product that is cut only where there is an area for sums, which there is not yet (gluon_wgmma.py)."""
    monkeypatch.setattr(replay, "_recordings", {})
    given = []

    def run(launch):
        given.append(type(launch))
        return torch.zeros(2)

    for _ in range(2):
        replay.replay_or_run("not now", (torch.zeros(4),), run)
    assert given == [replay._Recorder, replay._Recorder]
    assert not replay._recordings


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 7, 100])
def test_what_is_copied_for_a_launch_is_copied_for_its_replays(monkeypatch, m):
    monkeypatch.setattr(replay, "_recordings", {})
    x, q = make("cuda", 320, 1088, m, torch.bfloat16)
    weight = swizzle(q)
    for _ in range(3):
        x, bias = torch.randn(1088, m, device="cuda").bfloat16().T, torch.randn(640, device="cuda")[::2]
        assert torch.equal(matmul_nvfp4(x, weight, bias), run_swizzled(x.contiguous(), weight, bias.contiguous()))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 7, 16, 30, 100, 300])
@pytest.mark.parametrize("backend", ["auto", "batch_invariant", "unswizzled"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_replay_has_the_bits_of_a_launch(monkeypatch, m, backend, with_bias):
    monkeypatch.setattr(replay, "_recordings", {})
    for seed in range(3):
        x, q = make("cuda", 320, 1088, m, torch.bfloat16)
        torch.manual_seed(seed)
        x, bias = torch.randn_like(x), torch.randn(320, device="cuda").bfloat16() if with_bias else None
        weight = swizzle(q)
        y = matmul_nvfp4(x, weight, bias, backend=backend)
        assert torch.equal(y, run_swizzled(x, weight, bias, backend))
        # A row that starts elsewhere is no replay of one that starts at a multiple of 16 bytes.
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)
        assert torch.equal(
            matmul_nvfp4(shifted, weight, bias, backend=backend), run_swizzled(shifted, weight, bias, backend)
        )
    (recording,) = replay._recordings.values()
    if backend != "auto":  # beyond some number of tokens auto is, on some GPUs, a dense product too
        assert (recording is None) == (backend == "unswizzled")
