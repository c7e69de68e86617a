"""The tables of launch shapes, and the script that regenerates them."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

import tune_search

from qwantize_vllm.search import triton_hessian, triton_sse
from qwantize_vllm.search.triton_tiles import launch_shape

TABLES = [triton_sse.LAUNCH_SHAPES, triton_hessian.LAUNCH_SHAPES]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("major", [8, 9, 10, 12])
def test_every_gpu_has_a_shape_of_whole_warps(monkeypatch, table, major):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    blocks, warps = launch_shape(table, torch.device("cuda"), blocks=5)
    assert blocks % (32 * warps) == 0


def test_the_interpreter_takes_a_tile_of_all_blocks_up_to_a_limit():
    cpu = torch.device("cpu")
    assert launch_shape(TABLES[0], cpu, blocks=37) == (64, 1)
    assert launch_shape(TABLES[0], cpu, blocks=10**6)[0] == 4096


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
    assert f"triton_sse.LAUNCH_SHAPES: {torch.cuda.get_device_capability()[0]}: (" in result.output
    assert before == TABLES
