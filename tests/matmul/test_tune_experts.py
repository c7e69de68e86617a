"""The script that times shapes of the grouped kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("triton")

import tune_experts

from qwantize_vllm.cli.bench.graph_clock import Timing
from qwantize_vllm.matmul.grouped_shapes import RULES, choose_grouped
from qwantize_vllm.matmul.tile_shapes import TileShape
from qwantize_vllm.matmul.wgmma_shapes import STEPS, WgmmaShape

SMALL, LARGE = TileShape(8, 1, 4, 4, 3), TileShape(64, 2, 1, 4, 4)
NARROW, WIDE = WgmmaShape(64, 2, 4, 3, 3), WgmmaShape(128, 2, 2, 3, 3)
WGMMA, OTHER = (NARROW, NARROW), (WIDE, WIDE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tuning_says_that_it_needs_one():
    result = CliRunner().invoke(tune_experts.app, env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "no CUDA GPU" in result.output


def test_it_needs_no_vllm():
    program = "import sys; sys.modules['vllm'] = None; import tune_experts"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env=environment)


@pytest.mark.parametrize("major", [8, 9, None])
@pytest.mark.parametrize(("pairs", "experts"), [(2, 8), (8, 128), (512, 128), (128, 8), (160, 8), (512, 8), (65536, 8)])
def test_candidates_are_few_and_hold_the_pairs_or_many(major, pairs, experts):
    shapes = tune_experts.tile_candidates(major, pairs, experts)
    assert shapes[0] == choose_grouped(major, pairs, experts)
    assert len(set(shapes)) == len(shapes) <= 12
    # An expert's pairs are in one tile, or in full ones.
    assert any(first.tokens >= min(pairs / experts, 64) for first, _ in shapes)
    assert any(first != second for first, second in shapes)


def test_the_forms_have_those_of_the_rules():
    for rule in RULES[9]:
        for shape in (rule.gate_up, rule.down):
            assert tuple(shape[1:]) in tune_experts.FORMS[shape.tokens]


def test_wgmma_is_tried_where_its_tiles_are_not_almost_empty():
    assert tune_experts.wgmma_candidates(OTHER, 15) == []
    few, many = tune_experts.wgmma_candidates(OTHER, 16), tune_experts.wgmma_candidates(OTHER, 64)
    assert few[0] == OTHER
    assert {shape.tokens for shapes in few[1:] for shape in shapes} == {64}
    assert {shape for shapes in many for shape in shapes} == set(STEPS)
    assert all(first.tokens == second.tokens for first, second in many)
    assert any(first != second for first, second in many)
    assert len(set(many)) == len(many)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels on a CPU are for machines without a GPU")
def test_all_that_is_timed_is_the_same_product(monkeypatch):
    """Interpreted, with a clock that stands still."""
    results = []

    def time_call(calls, device):
        results.append(calls[0]())
        return Timing(1e-6 * len(results), "wall clock")

    monkeypatch.setattr(tune_experts, "time_call", time_call)
    (row,) = tune_experts.measure("tiny", [2], torch.device("cpu"))
    assert (row.tokens, row.pairs) == (2, 0.5)
    assert list(row.tiles) == tune_experts.tile_candidates(9, 4, 8)
    assert len(results) == 2 * len(row.tiles)
    assert list(row.tiles.values()) == pytest.approx([(len(results) + 1) / 2] * len(row.tiles))
    assert all((each - results[0]).norm() < 1e-2 * results[0].norm() for each in results)
    assert row.wgmma == {}


def test_a_shape_that_does_not_fit_has_no_time(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def time_call(calls, device):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(tune_experts, "time_call", time_call)
    (row,) = tune_experts.measure("tiny", [1], torch.device("cpu"))
    assert row.tiles == {}
    assert printed(row) == ["1", "0.25", *[""] * 6]


def row_of(pairs, triton, wgmma, chosen=WGMMA):
    return tune_experts.Row(1, pairs, (SMALL, SMALL), triton, chosen, wgmma)


def printed(row):
    """The cells of its line in the table."""
    console = Console(width=240)
    with console.capture() as capture:
        console.print(tune_experts.shape_table([row], "title"))
    return [cell.strip() for cell in capture.get().splitlines()[-2].strip("│").split("│")]


def test_the_table_has_the_best_first_and_what_the_rules_take():
    times = {(SMALL, SMALL): 12.0, (SMALL, LARGE): 11.0, (LARGE, LARGE): 10.0}
    assert printed(row_of(0.25, times, {WGMMA: 30.0, OTHER: 20.0})) == [
        *("1", "0.25", "12.0"),
        *("10.0 (64, 2, 1, 4, 4)", "11.0 (8, 1, 4, 4, 3) (64, 2, 1, 4, 4)", "12.0 (8, 1, 4, 4, 3)"),
        *("30.0", "20.0 (128, 2, 2, 3, 3)"),
    ]


def test_wgmma_pairs_are_those_from_which_on_it_is_always_faster():
    def words(*rows):
        return tune_experts.wgmma_words([row_of(pairs, {(SMALL, SMALL): us}, wgmma) for pairs, us, wgmma in rows])

    assert "faster nowhere" in words()
    assert "faster nowhere" in words((4, 10, {}), (64, 10, {WGMMA: 11.0}))
    assert "faster nowhere" in words((64, 10, {OTHER: 9.0})), "what is not chosen is no reason"
    slow_and_fast = (16, 10, {WGMMA: 9.0}), (64, 10, {WGMMA: 11.0}), (64, 10, {WGMMA: 9.0}), (256, 10, {WGMMA: 9.0})
    assert "faster from 256 pairs an expert on" in words(*slow_and_fast)
    assert "faster from 16 pairs" in words(slow_and_fast[0], slow_and_fast[3])


@pytest.mark.gpu
def test_tuning_prints_the_best_shapes():
    result = CliRunner().invoke(tune_experts.app, ["--model", "tiny", "--tokens", "1", "--tokens", "128"])
    assert result.exit_code == 0, result.output
    assert "(8, 1, 4, 4, 3)" in result.output
    assert "WGMMA_PAIRS: " in result.output
