"""The tables of launch shapes, and the script that regenerates them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

import tune_search

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.matmul.compile_process import Target
from qwantize_vllm.search import triton_codes, triton_hessian, triton_sse, triton_tiles
from qwantize_vllm.search.triton_tiles import LaunchShape, launch_shape
from tests.numbers import make_weight

TABLES = [
    triton_sse.NAIVE_SHAPES,
    triton_sse.OPTIMAL_SHAPES,
    triton_hessian.HESSIAN_SHAPES,
    triton_codes.CODES_SHAPES,
]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("major", [8, 9, 10, 12])
def test_every_gpu_has_a_shape_of_whole_warps(monkeypatch, table, major):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    shape = launch_shape(table, torch.device("cuda"), blocks=5)
    assert shape.blocks % (32 * shape.warps) == 0
    assert shape.tiles >= 1


@pytest.mark.parametrize("major", [8, 9, 12])
def test_what_is_only_compiled_has_the_shape_of_the_gpu_that_it_is_for(monkeypatch, major):
    table = {9: LaunchShape(32, 1, 1), 12: LaunchShape(64, 2, 1)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    target = SimpleNamespace(arch=10 * major)
    monkeypatch.setattr(triton_tiles, "driver", SimpleNamespace(active=Target(target)))
    shapes = [launch_shape(table, torch.device(device), blocks=5) for device in ("meta", "cuda")]
    assert shapes[0] == shapes[1]


def test_the_interpreter_takes_a_tile_of_all_blocks_up_to_a_limit():
    cpu = torch.device("cpu")
    assert launch_shape(TABLES[0], cpu, blocks=37) == (64, 1, 1)
    assert launch_shape(TABLES[0], cpu, blocks=10**6).blocks == 4096


@pytest.mark.parametrize(
    ("scale_search", "refine"),
    [
        ("naive", "none"),
        ("optimal", "none"),
        pytest.param("hessian", "none", marks=pytest.mark.slow),
        pytest.param("hessian", "codes", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("shape", [LaunchShape(32, 1, 3), LaunchShape(64, 1, 2)])
def test_results_do_not_depend_on_the_shape(kernel_on, monkeypatch, scale_search, refine, shape):
    weight = torch.stack([make_weight("student", 37, 48, seed=i) for i in range(2)]).to(kernel_on)
    hessian = None
    if scale_search == "hessian":
        x = torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(0))
        x[2, 1:] = 0  # a singular one
        hessian = (x.mT @ x).to(kernel_on)
    wanted = quantize_nvfp4(weight, scale_search, hessian=hessian, refine=refine, backend="triton")
    for module in (triton_sse, triton_hessian, triton_codes):
        monkeypatch.setattr(module, "launch_shape", lambda *_: shape)
    got = quantize_nvfp4(weight, scale_search, hessian=hessian, refine=refine, backend="triton")
    assert torch.equal(got.codes, wanted.codes)
    assert torch.equal(got.block_scales.view(torch.uint8), wanted.block_scales.view(torch.uint8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tuning_says_that_it_needs_one():
    result = CliRunner().invoke(tune_search.app, env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "no CUDA GPU" in result.output


@pytest.mark.gpu
def test_tuning_prints_an_entry_for_this_gpu_and_leaves_the_tables_alone():
    before = [dict(table) for table in TABLES]
    result = CliRunner().invoke(tune_search.app, ["--n", "64", "--k", "256"])
    assert result.exit_code == 0, result.output
    assert f"NAIVE_SHAPES: {torch.cuda.get_device_capability()[0]}: LaunchShape(" in result.output
    assert before == TABLES
