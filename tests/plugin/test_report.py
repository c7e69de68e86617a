from __future__ import annotations

import logging
import time

import pytest
import torch

pytest.importorskip("vllm")

from qwantize_vllm import QwantizeSettings
from qwantize_vllm.plugin import report as report_module
from qwantize_vllm.plugin.report import LoadReport


@pytest.fixture
def lines(monkeypatch):
    """What the report logs, level and text."""
    logged: list[tuple[int, str]] = []
    for name, level in (("info", logging.INFO), ("warning", logging.WARNING)):
        monkeypatch.setattr(report_module.logger, name, lambda text, *a, level=level: logged.append((level, text % a)))
    return logged


def finish(report, name, snr_db=20.0):
    report.quantized(name, 2**30, 2**28, signal=1.0, noise=10 ** (-snr_db / 10), began=time.perf_counter())


def test_the_summary_says_how_codes_were_refined(lines, tmp_path):
    (tmp_path / "h").touch()
    report = LoadReport(QwantizeSettings(scale_search="hessian", hessian=tmp_path / "h", refine="codes"))
    report.expect("a")
    finish(report, "a")
    assert "1 layers quantized to NVFP4 (hessian + codes, blocks of 16)" in lines[0][1]


def test_one_summary_when_the_last_layer_is_done(lines):
    report = LoadReport(QwantizeSettings())
    embedding = torch.nn.Embedding(2**14, 2**13, dtype=torch.bfloat16)
    tied = torch.nn.Linear(1, 1, bias=False)
    tied.weight = embedding.weight
    report.leave("embed_tokens", embedding, "embedding or head")
    report.leave("lm_head", tied, "embedding or head")
    report.leave("attn", torch.nn.Module(), "Attention")
    report.expect("a"), report.expect("b")
    finish(report, "a", 20.0)
    assert lines == []
    finish(report, "b", 22.0)
    ((level, summary),) = lines
    assert level == logging.INFO
    assert "2 layers quantized to NVFP4 (optimal, blocks of 16)" in summary
    assert "2 left (2 embedding or head)" in summary
    assert "weights 2.250 -> 0.750 GiB (quantized layers 2.000 -> 0.500, left 0.250)" in summary
    assert "mean signal-to-noise 21.00 dB" in summary


def test_a_reload_is_summed_up_anew(lines):
    report = LoadReport(QwantizeSettings())
    report.expect("a")
    finish(report, "a")
    finish(report, "a")
    assert len(lines) == 2
    assert "quantized layers 1.000 -> 0.250" in lines[1][1]


def test_a_draft_model_is_summed_up_alone(lines):
    report, embedding = LoadReport(QwantizeSettings()), torch.nn.Embedding(2**13, 2**14, dtype=torch.bfloat16)
    report.leave("embed_tokens", embedding, "embedding or head")
    report.expect("a"), report.expect("b")
    report.without_hessian("b")
    finish(report, "a"), finish(report, "b")
    draft = torch.nn.Embedding(2**14, 2**14, dtype=torch.bfloat16)
    report.leave("draft.embed_tokens", draft, "embedding or head")
    report.expect("draft.a")
    report.from_cache()
    finish(report, "draft.a", 30.0)
    finish(report, "a"), finish(report, "b")  # a reload, of the model alone
    of_model, without, of_draft, again, _ = (text for _, text in lines)
    assert without.endswith("has no Hessian of 1 layers, which were quantized by scale_search optimal: b")
    assert "2 layers quantized" in of_model
    assert "1 layers quantized to NVFP4 (optimal, blocks of 16, 1 of them from cache_dir)" in of_draft
    assert "1 left (1 embedding or head); weights 1.500 -> 0.750 GiB" in of_draft
    assert "signal-to-noise 30.00 dB" in of_draft
    assert again.partition("; mean")[0] == of_model.partition("; mean")[0]
    assert report.reason(draft) == report.reason(embedding) == "embedding or head"


def test_a_reload_that_broke_off_is_not_counted(lines):
    report = LoadReport(QwantizeSettings())
    report.expect("a"), report.expect("b")
    finish(report, "a")
    finish(report, "a")
    finish(report, "b")
    assert len(lines) == 1
    assert "quantized layers 2.000 -> 0.500" in lines[0][1]


def test_patterns_that_name_nothing_are_told(lines):
    report = LoadReport(QwantizeSettings(ignore=("lm_head", "*.o_proj")))
    report.leave("layers.0.o_proj", torch.nn.Linear(2, 2), "ignored", ["layers.0.o_proj"])
    report.expect("a")
    finish(report, "a")
    assert (logging.WARNING, "qwantize: ignore pattern 'lm_head' named no layer of this model") in lines
    assert not any("o_proj'" in text for _, text in lines)


def test_a_weight_without_error_has_infinite_ratio(lines):
    report = LoadReport(QwantizeSettings())
    report.expect("a")
    report.quantized("a", 1, 1, signal=0.0, noise=0.0, began=time.perf_counter())
    assert "signal-to-noise infinite" in lines[0][1]


def test_energies_may_be_tensors(lines):
    report = LoadReport(QwantizeSettings())
    report.expect("a"), report.expect("b")
    report.quantized("a", 1, 1, torch.tensor(100.0), torch.tensor(1.0), time.perf_counter())
    report.quantized("b", 1, 1, torch.tensor(0.0), torch.tensor(0.0), time.perf_counter())
    assert "mean signal-to-noise 20.00 dB" in lines[0][1]
