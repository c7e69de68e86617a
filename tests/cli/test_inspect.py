"""`qwantize inspect`: what it refuses, its totals and its page. tests/e2e/test_inspection.py has the measuring."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("vllm")

from qwantize_vllm.cli import app
from qwantize_vllm.cli.inspect import chart, page, summary
from qwantize_vllm.hessian import save_hessians
from qwantize_vllm.plugin.inspection import InspectedLayer, Inspection, LeftModule, Measured

EVIL = 'model.layers.1.<script>alert("1")</script>&amp;proj'


def measured(weight_error, output_error=None, search="optimal"):
    output = (None, None) if output_error is None else (4.0, 4 * output_error**2)
    return Measured(100.0, 100 * weight_error**2, *output, 9000, search)


def layer(name, naive, hessian, nbytes=32768):
    return InspectedLayer(name, [name], (128, 128), nbytes, {"naive": naive, "hessian": hessian})


@pytest.fixture
def inspection():
    settings = {"scale_search": "naive"}, {"scale_search": "hessian", "ignore": ["no<thing"]}
    return Inspection(
        model="a<b>&c",
        dtype="bfloat16",
        settings=dict(zip(("naive", "hessian"), settings, strict=True)),
        unused={"naive": [], "hessian": ["no<thing"]},
        layers=[
            layer(
                "model.layers.0.mlp.o_proj", measured(0.1, 0.08, search="naive"), measured(0.11, 0.04, search="hessian")
            ),
            layer(EVIL, measured(0.1, 0.09, search="naive"), measured(0.12, 0.06)),
            layer("model.layers.2.mlp.o_proj", measured(0.2, search="naive"), "ignored"),
        ],
        left=[LeftModule("lm_head", "embedding or head", 2048), LeftModule("norm", "norm or other", 64)],
        hessian={"path": "h.safetensors", "tokens": 1000, "block_size": 16},
    )


def test_errors_are_those_of_the_energies():
    one = Measured(100.0, 4.0, 10.0, 0.4, 1, "naive")
    assert (one.weight_error, one.output_error) == pytest.approx((0.2, 0.2))
    assert one.snr_db == pytest.approx(10 * math.log10(25))
    exact = Measured(0.0, 0.0, 0.0, -1e-30, 1, "naive")
    assert (exact.weight_error, exact.output_error, exact.snr_db) == (0, 0, math.inf)


def test_worst_layers_first_by_the_last_settings_output_error(inspection):
    assert summary.ranking(inspection) == ("hessian", "output_error")
    order = [each.name for each in summary.worst_first(inspection)]
    assert order == [EVIL, "model.layers.0.mlp.o_proj", "model.layers.2.mlp.o_proj"]


def test_totals_count_what_is_quantized(inspection):
    naive, hessian = (summary.total(inspection, name) for name in ("naive", "hessian"))
    assert (naive.quantized, naive.left, hessian.quantized, hessian.left) == (3, 0, 2, 1)
    assert naive.mean == pytest.approx({"output_error": 0.085, "weight_error": 0.4 / 3})
    assert hessian.whole["output_error"] == pytest.approx(math.sqrt((0.04**2 + 0.06**2) / 2))
    assert hessian.nbytes == 2 * 9000 + 32768 + 2112
    assert (naive.without_hessian, hessian.without_hessian) == (0, 1)
    assert summary.dense_bytes(inspection) == 3 * 32768 + 2112


def test_json_has_everything_and_no_nan(inspection):
    record = json.loads(json.dumps(summary.to_json(inspection, "1.0"), allow_nan=False))
    assert record["layers"][0]["results"]["hessian"]["output_error"] == pytest.approx(0.06)
    assert record["layers"][2]["results"]["hessian"] == {"left": "ignored"}
    assert record["settings"]["hessian"]["totals"]["without_hessian"] == 1


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.scripts, self.texts = [], [], 0, []

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        self.scripts += tag == "script"
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.attributes += attributes

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_escaped_and_needs_nothing_else(inspection):
    html = page.render(inspection, "1.0")
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.scripts == 1  # our own
    assert EVIL in tags.texts  # as text, in the table
    assert not {"src", "href", "srcset"} & {name for name, _ in tags.attributes}
    assert not re.search(r"https?:|@import|url\(", html)
    for text in ("ignored, under hessian", "without Hessian, by optimal", "no<thing", "a<b>&c"):
        assert any(text in each for each in tags.texts), text
    assert html.count('<circle class="worst"') == 4  # two projections, two metrics


def test_a_page_without_hessians_has_no_output_errors(inspection):
    for each in inspection.layers:
        for name, result in each.results.items():
            if not isinstance(result, str):
                each.results[name] = measured(result.weight_error)
    html = page.render(inspection, "1.0")
    assert "Output error" not in html
    assert "Weight error by layer" in html
    assert summary.ranking(inspection) == ("hessian", "weight_error")


@pytest.mark.parametrize(("top", "last"), [(9.6, 10), (10, 10), (0.37, 0.4), (0, 1), (31, 40), (101, 120)])
def test_ticks_reach_the_top(top, last):
    ticks = chart._ticks(top)
    assert ticks[0] == 0
    assert ticks[-1] == pytest.approx(last)
    assert 2 <= len(ticks) <= 8


def test_a_single_layer_is_drawn_in_the_middle():
    svg = chart.lines([[chart.Point(3, 5.0, "a & b")]], 5.0, "label")
    assert "a &amp; b" in svg
    assert "nan" not in svg


def test_projection_and_index_of_a_name():
    assert summary.place("model.layers.12.mlp.down_proj") == ("model.layers.*.mlp.down_proj", 12)
    assert summary.place("visual.merger.proj") == ("visual.merger.proj", None)
    assert page._short_names(["m.*.a.dense", "m.*.b.dense", "m.*.c"]) == {
        "m.*.a.dense": "a.dense",
        "m.*.b.dense": "b.dense",
        "m.*.c": "c",
    }


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, [], "it has no config.json"),
        ({"config.json": "{}"}, [], "has no .safetensors file"),
        (
            {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "1.safetensors"}}'},
            [],
            "names 1 files that are not there: 1.safetensors",
        ),
        ({}, ["--hessian", "none.safetensors"], "none.safetensors does not exist"),
        ({}, ["--setting", "hessian"], "needs --hessian"),
        ({}, ["--setting", "none.yaml"], "none.yaml does not exist"),
        (None, [], "there is no directory"),
    ],
)
def test_what_cannot_be_inspected_is_refused_at_once(tmp_path, files, arguments, message):
    model = tmp_path / "model"
    if files is not None:
        model.mkdir()
        for name, content in files.items():
            (model / name).write_text(content)
    result = CliRunner().invoke(app, ["inspect", str(model), *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert message in result.output


def test_a_hessian_setting_takes_the_blocks_of_the_file(tmp_path):
    from qwantize_vllm.cli.inspect.command import _settings

    path = tmp_path / "h.safetensors"
    save_hessians(path, {"a": torch.zeros(2, 32, 32)}, 32)
    assert _settings(["hessian"], path)["hessian"]["block_size"] == 32
