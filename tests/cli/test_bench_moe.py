"""`qwantize bench moe`: what it measures on a CPU, and when it fails."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("vllm")

from qwantize_vllm.cli import app
from qwantize_vllm.cli.bench import moe
from qwantize_vllm.cli.bench.graph_clock import Timing


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One call takes a millisecond: times are not what is tested."""

    def time_call(calls, device):
        calls[0]()
        return Timing(1e-3, "wall clock")

    monkeypatch.setattr(moe, "time_call", time_call)


def run(tmp_path, *options):
    arguments = ["bench", "moe", "--device", "cpu", "--model", "tiny", "--out", str(tmp_path), *options]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_figures_and_errors_are_printed_and_written(tmp_path):
    result = run(tmp_path, "--tokens", "3", "--tokens", "1")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "moe.json").read_text())
    assert [(cell["competitor"], cell["tokens"]) for cell in record["cells"]] == [
        (name, tokens) for tokens in (1, 3) for name in ("bf16", "ours")
    ]
    assert all(cell["us"] == 1000 for cell in record["cells"])
    # The dense weights are rounded as well.
    assert all(0 < cell["error"] < (5e-3 if cell["competitor"] == "ours" else 1e-2) for cell in record["cells"])
    assert "tiny" in result.output


def test_one_of_several_ranks_has_its_part_of_the_experts(tmp_path):
    result = run(tmp_path, "--tokens", "1", "--tokens", "40", "--ranks", "4")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "moe.json").read_text())
    assert record["ranks"] == 4
    assert all(cell["error"] < 1e-2 for cell in record["cells"])
    assert "the experts of one of 4 ranks" in result.output
    # As far from float64 as others are, where tokens have experts here.
    assert all(cell["error"] > 0 for cell in record["cells"] if cell["tokens"] == 40)


def test_ranks_that_do_not_divide_the_experts_are_refused(tmp_path):
    result = run(tmp_path, "--ranks", "3")
    assert result.exit_code == 2
    assert "--ranks must divide the 8 experts of tiny, got 3" in result.output


def test_a_machine_that_gets_slower_and_slower_favours_nobody(monkeypatch):
    timed = itertools.count(1)
    monkeypatch.setattr(moe, "time_call", lambda calls, device: Timing(1e-6 * next(timed), "wall clock"))
    found = list(moe._measure(["tiny"], [1, 2], torch.device("cpu")))
    assert [(cell.tokens, cell.competitor) for cell in found] == [(1, "bf16"), (1, "ours"), (2, "bf16"), (2, "ours")]
    assert [cell.us for cell in found] == pytest.approx([2.5, 2.5, 6.5, 6.5])


def test_a_wrong_result_ends_with_exit_code_1(tmp_path, monkeypatch):
    right = moe.experts_op
    monkeypatch.setattr(moe, "experts_op", lambda *given: 1.01 * right(*given))
    assert run(tmp_path, "--tokens", "2").exit_code == 1


def test_what_raises_ends_with_exit_code_1_and_is_told(tmp_path, monkeypatch):
    def fail(*given):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(moe, "experts_op", fail)
    result = run(tmp_path, "--tokens", "2")
    assert result.exit_code == 1
    assert "tiny M=2 ours: RuntimeError: no such kernel" in result.output


def test_an_unknown_mixture_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["bench", "moe", "--model", "mixtral", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "mixtral-8x7b" in result.output
