"""The script that times tile shapes."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

import tune_matmul


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tuning_says_that_it_needs_one():
    result = CliRunner().invoke(tune_matmul.app, env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "no CUDA GPU" in result.output


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("m", [1, 8, 16, 17, 300])
def test_candidates_hold_the_tokens_or_many(m, block_size):
    sizes = {shape.tokens for shape in tune_matmul.candidates(m, block_size)}
    assert sizes
    assert all(size >= min(m, 64) for size in sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 32])
def test_tuning_prints_the_best_shapes(block_size):
    result = CliRunner().invoke(tune_matmul.app, ["--layer", "o", "--tokens", "16", "--block-size", str(block_size)])
    assert result.exit_code == 0, result.output
    assert "(16, " in result.output
    if torch.cuda.get_device_capability()[0] == 9:
        assert "one after the other" in result.output
