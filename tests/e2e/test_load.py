"""scripts/load_server.py for a short while: a server that many stream from, some leave midway and some ask nonsense."""

from __future__ import annotations

import load_server
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.parametrize("kill_engine", [False, True], ids=["", "engine killed"])
def test_all_that_should_be_is_answered(smollm2, tmp_path, kill_engine):
    report = load_server.load(smollm2, 24, 20, kill_engine, tmp_path / "log")
    assert report.failed == []
    counts = report.counts
    assert min(counts[what] for what in ("answered to the end", "left midway", "malformed and refused")) > 0
    assert counts.get("engines killed", 0) == kill_engine
    assert (counts.get("lost with the engine", 0) > 0) == kill_engine
