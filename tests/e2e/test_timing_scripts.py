"""scripts/load_time.py and reload_time.py on a tiny model: what they are for is a GPU, what they do is the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from .conftest import ROOT
from .test_commands import run

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ON_A_CPU = ["--shape", "tiny", "--eager", "--utilization", "0.3"]


def script(name: str, folder: Path, *options: str) -> tuple[str, object]:
    """What it prints, and what it writes."""
    out = folder / "out.json"
    command = [sys.executable, ROOT / "scripts" / name, *ON_A_CPU, "--folder", folder / "work", "--out", out]
    return run(*command, *options), json.loads(out.read_text())


def test_starts_are_timed_with_both_methods(tmp_path):
    printed, starts = script("load_time.py", tmp_path, "--starts", "1", "--evict")
    assert "first starts: " in printed
    ours, plain = starts
    assert (ours["method"], plain["method"]) == ("qwantize", "bf16")
    for figures in (ours["figures"], plain["figures"]):
        assert 0 < figures["load"] < figures["ready"]
    assert 0 < ours["figures"]["quantize"] < ours["figures"]["load"]
    assert "quantize" not in plain["figures"]


def test_reloads_are_timed_and_change_nothing_but_the_weights(tmp_path):
    printed, results = script("reload_time.py", tmp_path, "--small-layers", "1", "--reloads", "6", "--repetitions", "1")
    for source in ("files", "tensors"):
        assert f"after a reload from {source}: greedy tokens equal, 17 of 17 parameters equal" in printed
        (seconds,) = results["speed"]["seconds"][source]
        assert seconds["all"] == pytest.approx(seconds["quantize"] + seconds["copy"])
        assert 0 < seconds["quantize"] < seconds["all"]
    assert len(results["memory"]["bytes"]) == 6
