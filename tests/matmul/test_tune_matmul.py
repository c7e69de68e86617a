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


@pytest.mark.parametrize("m", [1, 8, 16, 17, 300])
def test_candidates_hold_the_tokens_or_many(m):
    sizes = {shape.tokens for shape in tune_matmul.candidates(m)}
    assert sizes
    assert all(size >= min(m, 64) for size in sizes)


@pytest.mark.gpu
def test_tuning_prints_the_best_shapes():
    result = CliRunner().invoke(tune_matmul.app, ["--layer", "o", "--tokens", "16"])
    assert result.exit_code == 0, result.output
    assert "(16, " in result.output
    if torch.cuda.get_device_capability()[0] == 9:
        assert "one after the other" in result.output
