"""scripts/load_server.py for a short while: a server that many stream from, some leave midway and some ask nonsense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import load_server
import pytest

from .checkpoints import write_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def talker(smollm2, tmp_path_factory) -> Path:
    """The tiny model with the tokenizer and the chat template of a real one: fast, and asked as that would be."""
    vocabulary = json.loads((smollm2 / "config.json").read_text())["vocab_size"]
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": 1024}
    checkpoint = write_tiny(tmp_path_factory.mktemp("load") / "talker", **sizes)
    for file in (*smollm2.glob("*token*"), *smollm2.glob("chat_template*")):
        shutil.copy(file, checkpoint)
    return checkpoint


@pytest.mark.parametrize("kill_engine", [False, True], ids=["", "engine killed"])
def test_all_that_should_be_is_answered(talker, tmp_path, kill_engine):
    report = load_server.load(talker, 24, 20, kill_engine, tmp_path / "log")
    assert report.failed == []
    counts = report.counts
    assert min(counts[what] for what in ("answered to the end", "left midway", "malformed and refused")) > 0
    assert counts.get("engines killed", 0) == kill_engine
    assert (counts.get("lost with the engine", 0) > 0) == kill_engine
