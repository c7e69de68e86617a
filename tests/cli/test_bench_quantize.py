"""`qwantize bench quantize` on tiny shapes: what it says and writes, and that it catches what is wrong."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from qwantize_vllm.cli.bench import clock, measure, peers, shapes
from qwantize_vllm.cli.bench import quantize as command
from qwantize_vllm.cli.bench.exactness import draw_sample, judge
from qwantize_vllm.cli.bench.inputs import random_hessian
from qwantize_vllm.format import pack_codes
from qwantize_vllm.search import brute_force
from qwantize_vllm.search.quantize import quantize_nvfp4, search_nvfp4


@pytest.fixture
def bench(run_bench):
    return functools.partial(run_bench, "quantize")


@pytest.fixture
def without_peers(monkeypatch):
    monkeypatch.setattr(command, "PEERS", [])


def neighbouring_scale(weight, scale_search, block_size, global_scale, hessian=None, refine="none"):
    """A search whose first block has the scale one code above the best, and the codes that belong to it."""
    q = search_nvfp4(weight, scale_search, block_size, global_scale, hessian)
    scales = q.block_scales.view(torch.uint8).clone()
    scales[..., 0, 0] += 1
    q = dataclasses.replace(q, block_scales=scales.view(torch.float8_e4m3fn))
    return dataclasses.replace(q, codes=pack_codes(brute_force.nearest_codes(weight, q)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_prints_tables_and_writes_every_figure_and_a_plot(bench, assert_plotted, device):
    code, output, found = bench("--shape", "8x64", "--shape", "2x4x96", device=device)
    assert code == 0
    assert ("PyTorch reference" in output) == (device == "cpu")
    for text in ("copy: ", "2x4x96", "with amax", "qwantize 0.1.1", "48/48"):
        assert text in output
    assert "naive: 80 of 80 blocks at snap(amax/6)" in output
    assert "optimal: 80 of 80 blocks optimal" in output
    assert "hessian: 80 of 80 blocks optimal" in output
    assert found["versions"]["torch"]
    assert found["settings"]["block_size"] == 16
    assert found["failures"] == []
    assert [(row["layer"]["shape"], row["search"]) for row in found["searches"]] == [
        (shape, search) for shape in ([8, 64], [2, 4, 96]) for search in ("naive", "optimal", "hessian")
    ]
    row = found["searches"][0]
    assert row["bytes_moved"] == 8 * 64 * 2 + 8 * 32 + 8 * 4
    assert row["search_gb_per_s"] == pytest.approx(row["bytes_moved"] / row["search_ms"] / 1e6)
    assert row["whole_of_copy"] == pytest.approx(row["bytes_moved"] / row["whole_ms"] / 1e6 / found["copy_gb_per_s"])
    for peer in found["peers"]:
        assert peer["error"] is None
        assert peer["checked"] in (32, 48)
        assert peer["ours_larger"] == 0
        assert peer["times_as_fast"] == pytest.approx(peer["peer_ms"] / peer["our_ms"])
    assert_plotted("quantize")


@pytest.mark.usefixtures("without_peers")
def test_options_reach_the_search(bench):
    options = ["--block-size", "32", "--global-scale", "none", "--dtype", "float32", "--check-blocks", "3"]
    code, output, found = bench("--shape", "4x64", "--search", "optimal", "--search", "optimal", *options)
    assert code == 0
    assert "float32 weights" in output
    assert "3/3" in output
    assert found["settings"] | {"block_size": 32, "global_scale": "none", "dtype": "float32"} == found["settings"]
    (row,) = found["searches"]
    assert row["bytes_moved"] == 4 * 64 * 4 + 4 * 32 + 4 * 2


@pytest.mark.usefixtures("without_peers")
def test_refined_codes_are_timed_and_held_against_the_hessian_search(bench):
    code, output, found = bench("--shape", "8x64", "--search", "hessian", "--search", "hessian+codes")
    assert code == 0
    assert "hessian+codes: 32 of 32 blocks no worse than the optimal scale with the nearest codes" in output
    assert [row["search"] for row in found["searches"]] == ["hessian", "hessian+codes"]


@pytest.mark.usefixtures("without_peers")
@pytest.mark.parametrize("search", ["naive", "optimal", "hessian"])
def test_a_wrong_scale_ends_with_exit_code_1_and_is_named(bench, tmp_path, monkeypatch, search):
    monkeypatch.setattr(measure, "search_nvfp4", neighbouring_scale)
    code, output, found = bench("--shape", "2x4x64", "--search", search)
    assert code == 1
    assert f"{search}: 30 of 32 blocks" in output
    assert "30/32" in output
    assert f"2x4x64 {search}: 2 wrong, worst matrix " in output
    assert "row 0, columns 0 to 15" in output
    assert len(found["failures"]) == 1
    assert (tmp_path / "out" / "quantize.png").exists()


def test_codes_that_are_not_the_nearest_are_found():
    weight = torch.randn(2, 64)
    q = quantize_nvfp4(weight)
    sample = draw_sample(weight, None, 16, 100)
    assert judge(sample, q).kept == 8
    q.codes[1, 8] ^= 1  # row 1, column 16
    verdict = judge(sample, q)
    assert (verdict.checked, verdict.kept) == (8, 7)
    assert verdict.worst.startswith("row 1, columns 16 to 31: ")
    assert verdict.worst.endswith("codes not the nearest at its scale")


def test_sampled_blocks_are_the_weights_and_find_their_global_scale_and_hessian():
    weight = torch.randn(3, 4, 64) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    hessian = random_hessian(64, 16, torch.device("cpu"))
    q = quantize_nvfp4(weight, "hessian", hessian=hessian)
    sample = draw_sample(weight, hessian, 16, 20)
    assert sample.index.unique().numel() == 20
    assert sample.hessian.shape == (20, 1, 16, 16)
    blocks = sample.of(q)
    assert torch.equal(blocks.dequantize()[:, 0], q.dequantize().view(-1, 16)[sample.index])
    assert judge(sample, q).kept == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "2560"], "--shape must be NxK or ExNxK (experts) with K a multiple of 16"),
        (["--search", "best"], "--search must be one of naive, optimal, hessian, hessian+codes, got 'best'"),
        (["--global-scale", "amax_per_member"], "--global-scale must be one of amax, none"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16"),
        (["--check-blocks", "0"], "--check-blocks"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(assert_refused, arguments, message):
    assert_refused("quantize", arguments, message)


def test_models_have_the_layers_that_vllm_fuses():
    layers = {layer.name: layer.shape for layer in shapes.choose_layers(list(shapes.MODELS), [], 32)}
    assert layers["qwen3-4b down"] == (2560, 9728)
    assert layers["qwen3-4b qkv"] == (6144, 2560)
    assert layers["llama-3-8b gate_up"] == (28672, 4096)
    assert layers["llama-3-70b qkv"] == (10240, 8192)
    assert layers["qwen3-30b-a3b gate_up"] == (128, 1536, 2048)
    assert layers["qwen3-30b-a3b down"] == (128, 2048, 768)
    assert len(layers) == 16


def test_a_peer_that_is_missing_is_named(bench, monkeypatch):
    monkeypatch.setattr(command, "PEERS", [peers.Peer("no_such_package", {})])
    code, output, found = bench("--shape", "4x64", "--search", "naive")
    assert code == 0
    assert "no_such_package is not installed, so not compared" in output
    assert found["peers"] == []


def test_a_peer_that_raises_is_shown_with_its_error(bench, monkeypatch):
    def prepare(blocks, hessian):
        raise RuntimeError("no kernel for [this] device\nlong story")

    monkeypatch.setattr(command, "PEERS", [peers.Peer("numpy", {"optimal": prepare})])
    code, output, found = bench("--shape", "4x64")
    assert code == 0
    assert "did not run: RuntimeError: no kernel for [this] device" in output
    assert "long story" not in output
    (line,) = found["peers"]
    assert line["search"] == "optimal"
    assert line["error"] == "RuntimeError: no kernel for [this] device"


def test_a_peer_with_a_better_scale_ends_with_exit_code_1(bench, monkeypatch):
    monkeypatch.setattr(measure, "search_nvfp4", neighbouring_scale)
    code, output, found = bench("--shape", "4x64", "--search", "optimal", "--global-scale", "none")
    assert code == 1
    assert "4x64 optimal: qwantize 0.1.1 has a smaller error on 1 of 16 blocks" in output
    assert found["peers"][0]["ours_larger"] == 1


def test_a_peer_without_finite_scales_is_the_worse_one(bench, monkeypatch):
    def prepare(blocks, hessian):
        return lambda: (torch.zeros(len(blocks)), torch.full(blocks.shape, torch.nan))

    monkeypatch.setattr(command, "PEERS", [peers.Peer("numpy", {"optimal": prepare})])
    code, _, found = bench("--shape", "4x64", "--search", "optimal")
    assert code == 0
    counts = ("peer_larger", "ours_larger", "peer_smaller_by_ties")
    assert [found["peers"][0][count] for count in counts] == [16, 0, 0]


def test_the_kernel_of_qwantize_is_launched_as_its_own_wrapper_launches_it(monkeypatch):
    from qwantize.nvfp4 import kernels

    calls = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: calls.append((grid, arguments, constants))

    monkeypatch.setattr(kernels, "nvfp4_optimal_hessian_kernel", Recorder())
    blocks, activations = torch.randn(12, 16).bfloat16(), torch.randn(40, 64)
    kernels.nvfp4_optimal_hessian_triton(blocks, X=activations)
    theirs_grid, theirs, their_constants = calls.pop()
    peers._launch_qwantize_hessian(blocks, theirs[2])
    grid, ours, constants = calls.pop()
    assert (grid, constants) == (theirs_grid, their_constants)
    for i, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        if i in (3, 4):  # outputs, not written by the recorder
            assert (mine.numel(), mine.dtype) == (its.numel(), its.dtype)
        else:
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(its))


def test_a_gpu_is_timed_by_the_median_of_its_events(monkeypatch):
    class Event:
        milliseconds = iter([1.0, 9.0, 2.0])

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def elapsed_time(self, other):
            return next(self.milliseconds)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(clock, "_FLUSH_BYTES", 16)
    monkeypatch.setattr(clock, "REPEAT_SECONDS", 0.0)
    assert clock._median_by_events(lambda: None, torch.device("cpu")) == pytest.approx(0.002)
