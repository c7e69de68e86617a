"""The script that times the fused kernel for CPUs against strips."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("llvmlite")

import tune_cpu

from qwantize_vllm.cli.bench import clock
from qwantize_vllm.cli.bench.shapes import Layer
from qwantize_vllm.matmul.backends import cpu_fused_tokens


def run(*options):
    return CliRunner().invoke(tune_cpu.app, options, env={"COLUMNS": "300"})


def test_it_prints_times_and_limits_of_every_dtype(monkeypatch):
    monkeypatch.setattr(clock, "REPEAT_SECONDS", 1e-4)
    result = run("--shape", "64x96", "--shape", "48x32", "--tokens", "3", "--tokens", "1")
    assert result.exit_code == 0, result.output
    assert "avx512f" in result.output
    for dtype in ("bfloat16", "float16", "float32"):
        assert f"64x96, {dtype}, microseconds" in result.output
        assert f"48x32, {dtype}, microseconds" in result.output
    assert result.output.count("the fused kernel is not slower up to ") == 6
    limit = cpu_fused_tokens(torch.float32)
    assert result.output.count(f"auto takes it up to {limit}") >= 2


def test_the_shorter_of_two_times_counts_and_belongs_to_its_backend(monkeypatch):
    there_and_back = iter([5.0, 40.0, 9.0, 10.0, 20.0, 3.0, 30.0, 7.0])
    asked = []

    def time_backend(x, q, backend):
        asked.append((len(x), backend))
        return next(there_and_back)

    monkeypatch.setattr(tune_cpu, "time_backend", time_backend)
    rows = tune_cpu.measure(Layer("", (32, 48)), torch.float32, [2, 5])
    there = [(2, "cpu_fused"), (2, "cpu"), (5, "cpu_fused"), (5, "cpu")]
    assert asked == [*there, *reversed(there)]
    assert rows == [tune_cpu.Row(2, 5.0, 30.0), tune_cpu.Row(5, 3.0, 10.0)]


@pytest.mark.parametrize(
    ("times", "tokens"), [([], 0), ([(1, 2), (3, 3), (5, 4), (5, 6)], 2), ([(2, 1), (1, 2)], 0), ([(1, 2), (3, 4)], 2)]
)
def test_the_limit_is_where_the_fused_kernel_takes_longer_first(times, tokens):
    rows = [tune_cpu.Row(number, *each) for number, each in enumerate(times, start=1)]
    assert tune_cpu.fused_up_to(rows) == tokens


def test_what_cannot_be_timed_is_refused(monkeypatch):
    assert "--dtype must be one of" in run("--dtype", "int8").output
    assert "--shape must be NxK" in run("--shape", "4x4x16").output
    monkeypatch.setattr(tune_cpu, "why_not_fused", lambda: "no llvmlite")
    result = run()
    assert result.exit_code == 2
    assert "cannot be compiled here: no llvmlite" in result.output
