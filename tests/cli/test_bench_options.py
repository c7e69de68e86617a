"""The options that `qwantize bench quantize` and `matmul` have in common."""

from __future__ import annotations

import sys

import pytest

# The fewest figures that each of them can be asked for.
SMALLEST = {
    "quantize": ["--shape", "4x64", "--search", "naive"],
    "matmul": ["--shape", "64x96", "--tokens", "1", "--backend", "cpu", "--no-peer"],
}
both = pytest.mark.parametrize("command", list(SMALLEST))


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "2560"], "with K a multiple of 16, such as 2560x9728, got '2560'"),
        (["--shape", "0x64"], "got '0x64'"),
        (["--shape", "4x40"], "got '4x40'"),
        (["--shape", "4x48", "--block-size", "32"], "K a multiple of 32"),
        (["--model", "gpt-2"], "--model must be one of qwen3-4b, llama-3-8b, llama-3-70b, qwen3-30b-a3b, got 'gpt-2'"),
        (["--block-size", "24"], "block_size must be one of (16, 32), got 24"),
        (["--device", "meta"], "--device must be cuda or cpu"),
        (["--device", "nowhere"], "--device nowhere: "),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(assert_refused, command, arguments, message):
    assert_refused(command, arguments, message)


@both
def test_an_out_that_is_a_file_is_refused(assert_refused, tmp_path, command):
    (tmp_path / "out").write_text("")
    assert_refused(command, SMALLEST[command], "File exists")


@both
def test_without_matplotlib_the_figures_are_written_all_the_same(run_bench, monkeypatch, tmp_path, command):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, output, found = run_bench(command, *SMALLEST[command])
    assert code == 0
    assert "no plot: " in output
    assert "pip install matplotlib" in output
    assert found["searches" if command == "quantize" else "cells"]
    assert not (tmp_path / "out" / f"{command}.png").exists()
