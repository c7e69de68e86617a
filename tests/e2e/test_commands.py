"""The commands that start engines of their own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from .engine import IN_PROCESS, PATIENCE, server_environment

pytestmark = pytest.mark.e2e


def qwantize(*arguments: str | Path, env: Mapping[str, str] | None = IN_PROCESS) -> str:
    """What the command prints; it must succeed. env: None for engines in processes of their own, as users have them,
    which start twice as slowly."""
    return run(Path(sys.executable).with_name("qwantize"), *arguments, env=env)


def run(*command: str | Path, env: Mapping[str, str] | None = None) -> str:
    """What a command that starts an engine prints; it must succeed."""
    done = subprocess.run(command, env=server_environment(env), capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def test_eval_compares_settings_with_bf16_window_by_window(smollm2, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    out = tmp_path / "scores.json"
    options = [
        "--setting",
        "naive",
        "--window-tokens",
        "48",
        "--windows",
        "2",
        "--first-token",
        "5",
    ]
    printed = qwantize("eval", smollm2, "--text", text, *options, "--out", out)
    assert "perplexity" in printed
    scores = json.loads(out.read_text())
    assert list(scores) == ["bf16", "naive"]
    assert scores["naive"]["window_nll"] != scores["bf16"]["window_nll"]
    for score in scores.values():
        # After the first sentence the rest is known: a model that reads its window is hardly surprised.
        assert 1 < score["perplexity"] < 10
        assert score["perplexity"] == pytest.approx(math.exp(sum(score["window_nll"]) / 2))
    assert scores["bf16"]["kl"] is None
    naive = scores["naive"]
    assert naive["kl"] == pytest.approx(sum(naive["window_kl"]) / 2)
    # What quantization costs the text's own words on average is a share of what it does to the distributions.
    assert 0.01 < naive["kl"] < 1
    assert 0.5 < naive["same_top_token"] < 1
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_bench_serve_times_every_load_with_every_method(tmp_path):
    out = tmp_path / "bench.json"
    options = ["--shape", "tiny", "--new-tokens", "4", "--prefill-tokens", "32", "--eager", "--backend", "reference"]
    printed = qwantize("bench", "serve", *options, "--out", out)
    assert "batch 32" in printed
    seconds = json.loads(out.read_text())["seconds"]
    assert {method: len(each) for method, each in seconds.items()} == {
        "bf16": 3,
        "qwantize": 3,
        "qwantize, reference": 3,
    }
