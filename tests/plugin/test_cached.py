"""A cache that cannot be used or written costs the keeping alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from qwantize_vllm import QwantizeSettings, quantize_nvfp4
from qwantize_vllm.plugin import cached as module
from qwantize_vllm.plugin import linear
from qwantize_vllm.plugin.cached import cached
from qwantize_vllm.plugin.report import LoadReport

WEIGHT = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *values: found.append(text % values))
    return found


def quantize(directory):
    return cached(directory, "o_proj", ["optimal"], [WEIGHT], [None], 16, lambda: [quantize_nvfp4(WEIGHT)])


def test_what_is_kept_is_found(tmp_path, warnings):
    ((first,), there), ((second,), there_then) = quantize(tmp_path), quantize(tmp_path)
    assert (there, there_then) == (False, True)
    assert torch.equal(first.codes, second.codes)
    assert not warnings


def test_a_directory_that_cannot_be_made(tmp_path, warnings):
    (tmp_path / "file").touch()
    (q,), there = quantize(tmp_path / "file")
    assert not there
    assert torch.equal(q.codes, quantize_nvfp4(WEIGHT).codes)
    assert "o_proj: cache_dir cannot be used, nothing is kept: " in warnings[0]


def test_a_full_disk(tmp_path, warnings, monkeypatch):
    def save(self, key, parts):
        raise OSError("No space left on device")

    monkeypatch.setattr(module.LayerCache, "save", save)
    (q,), there = quantize(tmp_path)
    assert not there
    assert torch.equal(q.codes, quantize_nvfp4(WEIGHT).codes)
    assert warnings == ["qwantize: o_proj: it is not kept in cache_dir: No space left on device"]


@pytest.mark.parametrize(("update", "files"), [(False, 1), (True, 0)])
def test_updates_of_a_running_server_are_not_kept(tmp_path, monkeypatch, update, files):
    """Of which there may be thousands, each of other weights."""
    monkeypatch.setattr(linear, "is_update", lambda layer: update)
    settings = QwantizeSettings(cache_dir=tmp_path)
    method = linear.QwantizeLinearMethod(settings, "o_proj", LoadReport(settings), [])
    (q,) = method._quantize(SimpleNamespace(tp_size=1, output_size_per_partition=16), WEIGHT)
    assert torch.equal(q.codes, quantize_nvfp4(WEIGHT).codes)
    assert len(list(tmp_path.iterdir())) == files
