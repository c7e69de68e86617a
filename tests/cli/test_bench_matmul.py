"""`qwantize bench matmul` on tiny shapes: what it says and writes, and that it catches and names what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch

from qwantize_vllm import matmul_nvfp4, quantize_nvfp4
from qwantize_vllm.cli.bench.graph_clock import Timing
from qwantize_vllm.cli.bench.matmul import command, competitors, measure, report, summary
from qwantize_vllm.cli.bench.matmul.error import exact_product, relative_error, sampled_rows
from qwantize_vllm.cli.bench.matmul.measure import Cell, Plan
from qwantize_vllm.cli.bench.shapes import Layer
from qwantize_vllm.matmul.backends import BACKENDS, Backend

LAYER = Layer("", (64, 96))


@pytest.fixture
def bench(run_bench):
    return functools.partial(run_bench, "matmul")


def peer(name, prepare, reason=None):
    return competitors.Peer(name, prepare, lambda block_size: reason)


def right(q, dtype):
    return lambda x: x @ q.dequantize(dtype).T


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_prints_tables_and_writes_every_figure_and_a_plot(bench, assert_plotted, monkeypatch, device):
    monkeypatch.setattr(command, "PEERS", [peer("twin", right)])
    shapes = ("--shape", "512x96", "--shape", "256x64")
    code, output, found = bench(*shapes, "--tokens", "20", "--tokens", "1", device=device)
    assert code == 0
    assert ("On a CPU this is the wall clock" in output) == (device == "cpu")
    for text in ("copy: ", "512x96", "256x64", "bf16", "twin", "best of ours", "geometric mean", "M 17-1024"):
        assert text in output
    plain = [name for name, backend in BACKENDS.items() if not backend.needs_gpu]
    names = ["bf16", "auto", *(["swizzled", "unswizzled"] if device == "cuda" else plain), "twin"]
    assert list(found["competitors"]) == names
    assert [(cell["layer"]["shape"], cell["tokens"], cell["competitor"]) for cell in found["cells"]] == [
        (shape, tokens, name) for shape in ([512, 96], [256, 64]) for tokens in (1, 20) for name in names
    ]
    assert found["versions"]["torch"]
    assert found["settings"]["tokens"] == [1, 20]
    assert found["failures"] == []
    assert len(found["ratios"]) == 4
    by_name = {cell["competitor"]: cell for cell in found["cells"][: len(names)]}
    assert by_name["bf16"]["weight_bytes"] == 512 * 96 * 2
    assert by_name["auto"]["weight_bytes"] == 512 * 96 // 2 + 512 * 6 + 4
    for cell in found["cells"]:
        assert cell["problem"] is None
        assert 0 < cell["error"] < 3e-3
        rate = cell["weight_bytes"] / cell["us"] * 1e6
        assert cell["of_copy"] == pytest.approx(rate / found["copy_gb_per_s"] / 1e9)
    assert_plotted("matmul")


def test_options_reach_the_measurement(bench):
    options = ["--block-size", "32", "--dtype", "float16", "--no-check", "--no-peer", "--tokens", "3"]
    code, output, found = bench("--shape", "64x96", "--backend", "cpu", "--backend", "cpu", *options)
    assert code == 0
    assert "float16 activations" in output
    assert "not checked against float64" in output
    assert "is not compared" not in output
    assert found["competitors"] == {"fp16": "dense", "cpu": "ours"}
    assert [(cell["tokens"], cell["error"]) for cell in found["cells"]] == [(3, None), (3, None)]
    assert found["cells"][1]["weight_bytes"] == 64 * 96 // 2 + 64 * 3 + 4


def test_peers_that_cannot_run_are_named_with_the_reason(bench):
    code, output, found = bench("--shape", "64x96", "--tokens", "1", "--backend", "cpu", "--block-size", "32")
    assert code == 0
    for name in ("marlin", "humming"):
        assert f"{name} is not compared: takes blocks of 16 only" in output
        assert found["missing"][name] == "takes blocks of 16 only"
    assert found["competitors"] == {"bf16": "dense", "cpu": "ours"}


@pytest.mark.parametrize("while_preparing", [True, False])
def test_a_peer_that_raises_is_shown_with_its_error(bench, tmp_path, monkeypatch, while_preparing):
    def fail(*_):
        raise RuntimeError("no kernel for [this] device\nlong story")

    monkeypatch.setattr(command, "PEERS", [peer("broken", fail if while_preparing else lambda q, dtype: fail)])
    code, output, found = bench("--shape", "64x96", "--tokens", "1", "--tokens", "2", "--backend", "cpu")
    assert code == 0
    words = "RuntimeError: no kernel for [this] device" + " (while preparing the weight)" * while_preparing
    assert output.count(f"- broken did not run: {words}\n") == 1
    assert "long story" not in output
    assert [cell["problem"] for cell in found["cells"]] == [None, None, words] * 2
    assert (tmp_path / "out" / "matmul.png").exists()


def test_a_peer_that_is_wrong_is_marked_but_no_failure(bench, monkeypatch):
    monkeypatch.setattr(command, "PEERS", [peer("doubling", lambda q, dtype: lambda x: 2 * right(q, dtype)(x))])
    code, output, found = bench("--shape", "64x96", "--tokens", "1", "--backend", "cpu")
    assert code == 0
    assert "! 64x96 M=1 doubling: relative error 1.00e+00" in output
    assert found["failures"] == []


def test_a_wrong_backend_ends_with_exit_code_1_and_is_named(bench, tmp_path, monkeypatch):
    def off_in_the_last_row(x, q, bias, backend):
        y = matmul_nvfp4(x, q, bias, backend)
        if backend == "cpu" and len(x) == 300:
            y[-1] *= 1.2
        return y

    monkeypatch.setattr(competitors, "matmul_nvfp4", off_in_the_last_row)
    tokens = ("--tokens", "1", "--tokens", "300")
    code, output, found = bench("--shape", "64x96", *tokens, "--backend", "reference", "--backend", "cpu")
    assert code == 1
    (failure,) = found["failures"]
    assert failure.startswith("64x96 M=300 cpu: relative error 1.")
    assert failure.endswith(", allowed 3e-03")
    assert failure in output
    assert (tmp_path / "out" / "matmul.png").exists()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_product_that_is_no_number_is_wrong(bench, monkeypatch, bad):
    monkeypatch.setattr(competitors, "matmul_nvfp4", lambda x, q, bias, backend: x.new_full((len(x), q.shape[0]), bad))
    code, output, _ = bench("--shape", "64x96", "--tokens", "1", "--backend", "auto")
    assert code == 1
    assert "64x96 M=1 auto: relative error inf" in output


def test_a_backend_that_raises_ends_with_exit_code_1_and_is_named(bench, monkeypatch):
    def fail(x, q, bias, backend):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(competitors, "matmul_nvfp4", fail)
    code, output, _ = bench("--shape", "64x96", "--tokens", "1", "--backend", "cpu")
    assert code == 1
    assert "64x96 M=1 cpu did not run: RuntimeError: illegal memory access" in output


def test_a_number_of_tokens_that_a_backend_does_not_take_is_no_failure(bench, monkeypatch):
    def why_not(x):
        return "takes 16 tokens at most" if len(x) > 16 else None

    monkeypatch.setattr(Backend, "why_not", lambda self, x: why_not(x))
    code, output, found = bench("--shape", "64x96", "--tokens", "16", "--tokens", "17", "--backend", "cpu", "--no-peer")
    assert code == 0
    assert "- cpu does not multiply so many tokens: takes 16 tokens at most (64x96 M=17)" in output
    assert [cell["us"] is None for cell in found["cells"]] == [False, False, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "2x64x64"], "--shape must be NxK with K a multiple of 16, such as 2560x9728, got '2x64x64'"),
        (["--backend", "marlin"], "--backend must be one of auto, "),
        (["--dtype", "float32"], "--dtype must be one of bfloat16, float16, got 'float32'"),
        (["--tokens", "0"], "--tokens"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(assert_refused, arguments, message):
    assert_refused("matmul", arguments, message)


def test_a_backend_that_cannot_run_here_is_refused(bench, monkeypatch):
    monkeypatch.setattr(Backend, "why_not", lambda self, x: "needs a GPU")
    code, output, _ = bench("--shape", "64x96", "--backend", "fused")
    assert code == 2
    assert "--backend fused needs a GPU" in output


def test_layers_are_dense_ones():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [str(layer) for layer in command._layers([], [], 16, cpu)] == ["1024x2560"]
    assert {layer.shape for layer in command._layers([], [], 16, gpu)} == {
        (6144, 4096),
        (4096, 4096),
        (28672, 4096),
        (4096, 14336),
        (57344, 8192),
    }
    assert [layer.shape for layer in command._layers(["qwen3-30b-a3b"], [], 16, gpu)] == [(5120, 2048), (2048, 4096)]


def test_sampled_rows_are_spread_from_the_first_to_the_last():
    device = torch.device("cpu")
    assert sampled_rows(1, device).tolist() == [0]
    assert sampled_rows(5, device).tolist() == [0, 1, 2, 3, 4]
    rows = sampled_rows(8192, device).tolist()
    assert (len(set(rows)), rows[0], rows[-1]) == (256, 0, 8191)


def test_the_exact_product_is_put_together_from_strips(monkeypatch):
    monkeypatch.setattr("qwantize_vllm.cli.bench.matmul.error._STRIP", 96 * 5)
    q = quantize_nvfp4(torch.randn(64, 96))
    x = torch.randn(3, 96)
    exact = x.double() @ q.dequantize().double().T
    torch.testing.assert_close(exact_product(x, q), exact, rtol=1e-12, atol=1e-12)
    assert relative_error(exact * 1.5, exact) == pytest.approx(0.5)


def entrants(**kinds):
    return [competitors.Competitor(name, kind, right) for name, kind in kinds.items()]


def plan_of(*tokens):
    who = entrants(bf16="dense", auto="ours", fused="ours", marlin="peer")
    return Plan([LAYER], list(tokens), who, {}, 16, torch.bfloat16, torch.device("cpu"), True)


def cells_of(plan, times, **others):
    return [
        Cell(LAYER, tokens, competitor.name, competitor.kind, 2, 100, us=us, **others)
        for tokens, row in times.items()
        for competitor, us in zip(plan.competitors, row, strict=True)
    ]


def test_ratios_and_means_are_those_of_the_fastest():
    plan = plan_of(1, 16, 2048)
    cells = cells_of(plan, {1: (8, 4, 2, 1), 16: (8, 4, 8, None), 2048: (6, 3, None, 12)}, of_copy=0.5, error=1e-3)
    found = summary.rows(plan, cells)
    assert [(row.over_dense, row.over_others) for row in found] == [(4, 0.5), (2, 2), (2, 2)]
    lines = {line.competitor: line for line in summary.summarize(plan, found)}
    assert list(lines["auto"].times_as_fast.values()) == [pytest.approx(2), None, pytest.approx(2)]
    assert list(lines["fused"].times_as_fast.values()) == [pytest.approx(2), None, None]
    assert list(lines["marlin"].times_as_fast.values()) == [pytest.approx(8), None, pytest.approx(0.5)]
    assert (lines["auto"].of_copy, lines["auto"].largest_error) == (pytest.approx(0.5), 1e-3)


def test_a_gpu_that_gets_slower_and_slower_favours_nobody(monkeypatch):
    timed = itertools.count(1)
    monkeypatch.setattr(measure, "time_call", lambda calls, device: Timing(1e-6 * next(timed), "graph"))
    monkeypatch.setattr(measure, "copy_bytes_per_second", lambda device: 1e6)
    plan = plan_of(1, 2)
    found = measure.measure(plan)
    assert [cell.us for cell in found.cells] == pytest.approx([4.5] * 4 + [12.5] * 4)
    assert [cell.competitor for cell in found.cells] == ["bf16", "auto", "fused", "marlin"] * 2
    assert [cell.of_copy for cell in found.cells] == pytest.approx([c.weight_bytes / c.us for c in found.cells])


def test_what_fails_when_it_is_timed_again_has_no_time():
    cell = cells_of(plan_of(1), {1: (8, 4, 2, 1)})[0]
    failed = dataclasses.replace(cell, us=None, problem="RuntimeError: ")
    assert measure._mean(cell, failed) == measure._mean(failed, cell) == failed


def test_what_is_wrong_once_or_in_no_graph_once_is_shown():
    cell = cells_of(plan_of(1), {1: (8, 4, 2, 1)}, method="graph", error=1e-3)[0]
    other = dataclasses.replace(cell, method="events", no_graph="not permitted", error=0.5, us=10)
    for found in (measure._mean(cell, other), measure._mean(other, cell)):
        assert (found.us, found.error, found.method, found.no_graph) == (9, 0.5, "events", "not permitted")
        assert found.wrong


def test_a_call_that_no_graph_takes_is_marked():
    plan = plan_of(1)
    cells = cells_of(plan, {1: (8, 4, 2, 1)}, method="events", no_graph="operation not permitted")
    assert [report._figure(cell) for cell in cells] == ["8.00*", "4.00*", "2.00*", "1.00*"]
    (note,) = report._grouped(cells[1:2], "no_graph", "{}: {}")
    assert note == "auto: operation not permitted"


def test_copies_that_fit_the_cache_are_confessed(monkeypatch):
    monkeypatch.setattr(report, "cache_bytes", lambda device: 100)
    plan = plan_of(1, 2)
    results = report.Results(1.0, cells_of(plan, {1: (8, 4, 2, 1), 2: (8, 4, 2, 1)}))
    notes = [note for note in report._notes(plan, results) if "L2" in note]
    assert len(notes) == 4
    assert notes[0].startswith("64x96: the copies of bf16 hold 200 bytes together")
