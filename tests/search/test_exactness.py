"""scripts/exactness.py: its fast float64 truth against the slow obvious one, its verdicts, and the proof itself."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
from pathlib import Path

import exactness
import pytest
import torch
from exactness_peer import hessian_of, qwantize_peer
from exactness_truth import Blocks, least_error, measure_by, nearest_e2m1
from exactness_verdict import Result, Tally, judge
from exactness_weights import HESSIAN_KINDS, SYNTHETIC, synthetic_cases
from smollm2_checkpoint import DEFAULT, make_checkpoint
from typer.testing import CliRunner

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.format import Nvfp4Tensor, e2m1_values, e4m3_values, round_to_e2m1
from tests.numbers import least_quadratic, least_sse, make_weight, quadratic, scaled

KINDS_WITH_TIES = ["grid", "million", "zero"]
needs_qwantize = pytest.mark.skipif(not importlib.util.find_spec("qwantize"), reason="qwantize 0.1.1 is not installed")
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
of_every_form = pytest.mark.parametrize("block_size", [16, 32])
of_both_scales = pytest.mark.parametrize("global_scale", ["amax", "none"])
by_both_searches = pytest.mark.parametrize("search", ["optimal", "hessian"])


# The fast truth.


def test_rounding_is_that_of_the_format_at_every_midpoint_and_beside_it():
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])[:, None] * e4m3_values()
    around = [midpoints, midpoints.nextafter(torch.tensor(0.0)), midpoints.nextafter(torch.tensor(torch.inf))]
    z32 = torch.stack(around).view(-1, e4m3_values().numel())
    z32 = torch.cat([z32, torch.rand(1000, 126, generator=torch.Generator().manual_seed(0)) * 8 * e4m3_values()])
    wanted = e2m1_values()[round_to_e2m1(z32 / e4m3_values()).long()].double()
    assert torch.equal(nearest_e2m1(z32.double() / e4m3_values().double()), wanted)


def blocks_of(weight: torch.Tensor, q: Nvfp4Tensor, columns: int) -> Blocks:
    shape = (-1, columns, q.block_size)
    z32 = (weight.float() / q.global_scale).view(shape).permute(1, 2, 0)
    return Blocks(scaled(weight, q).view(shape).permute(1, 2, 0), z32.double().abs())


def small_weight(kind: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with eighteen columns of blocks, and a Hessian for each."""
    cases = list(synthetic_cases("gaussian" if kind in KINDS_WITH_TIES else kind, 18 * 8 * 12, block_size, True, "cpu"))
    weight = torch.cat([case.weight for case in cases])
    if kind in KINDS_WITH_TIES:
        weight = make_weight(kind, *weight.shape)
    return weight, hessian_of(cases[0].activations, block_size)


@pytest.mark.parametrize("kind", [*SYNTHETIC, *KINDS_WITH_TIES])
@of_every_form
@of_both_scales
def test_fast_brute_force_is_the_slow_one(kind, block_size, global_scale):
    weight, hessian = small_weight(kind, block_size)
    q = quantize_nvfp4(weight, "naive", block_size, global_scale)
    fast, _ = least_error(blocks_of(weight, q, 1), measure_by(None))
    torch.testing.assert_close(fast.view(weight.shape[0], -1), least_sse(weight, q), rtol=1e-13, atol=0)
    judged_by = measure_by(hessian)
    fast = least_error(blocks_of(weight, q, hessian.shape[0]), judged_by)[0].t()
    slow = least_quadratic(weight, q, judged_by.hessian).clamp(min=0)
    # r'Hr is a sum of terms of both signs: float64 keeps it to so many digits of the sum of their magnitudes.
    terms = quadratic(scaled(weight, q).abs(), judged_by.hessian.abs())
    assert ((fast - slow).abs() <= 1e-13 * slow + 1e-15 * terms).all()


def test_where_the_hessian_is_zero_the_squared_error_decides():
    hessian = torch.stack([torch.zeros(16, 16), torch.ones(16, 16)])
    judged_by = measure_by(hessian).hessian
    assert torch.equal(judged_by[0], torch.eye(16).double())
    assert torch.equal(judged_by[1], hessian[1].double())


@on_every_device
def test_hessians_are_symmetric_and_of_the_kinds_they_are_named_for(device):
    case = next(synthetic_cases("gaussian", 1000, 32, True, device))
    hessian = hessian_of(case.activations, 32)
    torch.testing.assert_close(hessian, hessian.mT, rtol=1e-6, atol=0)
    spectra = dict(zip(case.hessian_kinds, torch.linalg.eigvalsh(hessian.double()).cpu(), strict=False))
    assert list(spectra) == list(HESSIAN_KINDS)
    ranks = {kind: int((spectrum > 1e-6 * spectrum[-1]).sum()) for kind, spectrum in spectra.items()}
    assert (ranks["rank one"], ranks["deficient"], ranks["zero"], ranks["white"]) == (1, 16, 0, 32)
    assert spectra["singular"][0].abs() < 1e-6 * spectra["singular"][-1]
    assert spectra["times 1e20"][-1] > 1e20
    assert 0 < spectra["times 1e-20"][-1] < 1e-17


# The verdict: a proof that cannot fail proves nothing.


def searched(search: str) -> Result:
    """A Gaussian weight quantized by a search, to be judged by the squared error."""
    weight = make_weight("gaussian", 64, 64)
    naive = quantize_nvfp4(weight, "naive")
    return Result(weight, quantize_nvfp4(weight, search, backend="reference"), naive.block_scales)


def verdict(result: Result, **kwargs) -> Tally:
    tally = Tally()
    judge(result, tally, chunk_blocks=100, **kwargs)
    return tally


def test_a_correct_search_passes():
    tally = verdict(searched("optimal"))
    assert (tally.blocks, tally.failures, tally.wrong_codes) == (256, 0, 0)
    assert tally.worst <= 1
    assert 0 < tally.naive_optimal < 256


def test_every_block_with_another_scale_than_the_best_fails():
    tally = verdict(searched("naive"))
    assert tally.failures == tally.blocks - tally.naive_optimal
    assert tally.wrong_codes == 0
    assert tally.worst > 1


@pytest.mark.parametrize("flipped_bit", [1, 8])
def test_a_code_that_is_not_the_nearest_fails(flipped_bit):
    result = searched("optimal")
    result.q.codes[3, 5] ^= flipped_bit
    tally = verdict(result)
    assert (tally.wrong_codes, tally.failures) == (1, 1)


def test_a_zero_of_the_wrong_sign_fails_though_the_error_is_the_same():
    result = searched("optimal")
    row, byte = (result.q.codes & 15 == 0).nonzero()[0]
    result.q.codes[row, byte] ^= 8
    tally = verdict(result)
    assert (tally.wrong_codes, tally.failures) == (1, 1)
    assert tally.worst <= 1


def peer_by(search: str, spoil=lambda scales, dequantized: (scales, dequantized)):
    """A peer that is this package's own search."""

    def peer(z, activations):
        q = quantize_nvfp4(z.flatten(1), search, global_scale="none", backend="reference")
        return spoil(q.block_scales.float().view(*z.shape[:-1], 1), q.dequantize().view(z.shape))

    return peer


def test_a_peer_that_does_better_fails_the_search():
    tally = verdict(searched("naive"), peer=peer_by("optimal"))
    better = tally.blocks - tally.naive_optimal
    assert (tally.peer_better, tally.peer_better_strictly, tally.peer_worse) == (better, better, 0)


def test_a_peer_that_does_worse_is_counted():
    tally = verdict(searched("optimal"), peer=peer_by("naive"))
    assert (tally.peer_blocks, tally.peer_better, tally.failures) == (256, 0, 0)
    assert tally.peer_worse == tally.blocks - tally.naive_optimal


def test_a_peer_with_codes_that_the_format_does_not_have_is_counted_apart():
    zeros = peer_by("optimal", lambda scales, dequantized: (scales, dequantized.zero_()))
    weight = make_weight("gaussian", 64, 64)
    naive = quantize_nvfp4(weight, "naive")
    zeroed = dataclasses.replace(
        naive, block_scales=torch.full_like(naive.block_scales.float(), 448).to(torch.float8_e4m3fn)
    )
    tally = verdict(Result(weight, zeroed, naive.block_scales), peer=zeros)
    assert tally.peer_better == 0
    assert tally.peer_better_by_ties > 0


def test_a_peer_with_a_scale_that_the_format_does_not_have_is_counted_apart():
    weight = torch.full((4, 16), 1e-6)
    q = quantize_nvfp4(weight, "optimal", global_scale="none", backend="reference")
    peer = lambda z, _: (torch.full((*z.shape[:-1], 1), 1e-8), torch.full_like(z, 6e-8))  # noqa: E731
    tally = verdict(Result(weight, q, q.block_scales), peer=peer)
    assert (tally.blocks, tally.failures, tally.peer_better, tally.peer_better_by_ties) == (4, 0, 0, 4)


def test_nan_is_never_better():
    nan = peer_by("optimal", lambda scales, dequantized: (scales, dequantized * torch.nan))
    tally = verdict(searched("naive"), peer=nan)
    assert (tally.peer_nan, tally.peer_worse, tally.peer_better) == (256, 256, 0)


def test_the_peer_is_asked_for_its_share():
    assert verdict(searched("optimal"), peer=peer_by("naive"), peer_share=0.3).peer_blocks == 100


# The command.


def command(*arguments: str) -> tuple[int, str]:
    outcome = CliRunner().invoke(exactness.app, ["--no-peer", "--blocks", "500", "--device", "cpu", *arguments])
    return outcome.exit_code, outcome.output


def test_command_writes_every_row(tmp_path):
    out = tmp_path / "rows.json"
    code, output = command("--kind", "uniform", "--kind", "sparse", "--block-size", "32", "--out", str(out))
    assert code == 0, output
    rows = json.loads(out.read_text())["rows"]
    assert {(row["kind"], row["global_scale"], row["search"]) for row in rows} == {
        (kind, scale, search)
        for kind in ("uniform", "sparse")
        for scale in ("amax", "none")
        for search in ("optimal", "hessian")
    }
    assert all(row["blocks"] >= 500 and row["failures"] == 0 and row["block_size"] == 32 for row in rows)


def test_command_fails_where_a_block_does(monkeypatch):
    def broken(weight, search, *args, **kwargs):
        return quantize_nvfp4(weight, "naive", *args, **kwargs)

    monkeypatch.setattr(exactness, "quantize_nvfp4", broken)
    code, output = command("--kind", "gaussian", "--search", "optimal")
    assert code == 1
    assert "blocks failed" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--kind", "cauchy"], "gaussian"), (["--block-size", "24"], "16"), (["--kind", "smollm2"], "--checkpoint")],
)
def test_command_says_what_is_allowed(arguments, message):
    code, output = command(*arguments)
    assert code == 2
    assert message in output


# The proof, at a fiftieth of its size on a CPU.


def try_search(kind: str, block_size: int, global_scale: str, search: str, device: str, **options) -> Tally:
    backend = "triton" if device == "cuda" else "reference"
    run = exactness.Run(kind, block_size, global_scale, search, backend)
    return exactness.try_search(run, exactness.Options(device=device, **options))


@functools.cache
def checkpoint() -> Path:
    """SmolLM2-135M-Instruct; QWANTIZE_TEST_CHECKPOINT names a copy that is already there."""
    if given := os.environ.get("QWANTIZE_TEST_CHECKPOINT"):
        return Path(given)
    try:
        return make_checkpoint(DEFAULT)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@on_every_device
@by_both_searches
@of_both_scales
@of_every_form
@pytest.mark.parametrize("kind", [*SYNTHETIC, "smollm2"])
def test_every_block_is_within_the_tolerance(kind, block_size, global_scale, search, device):
    directory = checkpoint() if kind == "smollm2" else None
    tally = try_search(kind, block_size, global_scale, search, device, blocks=20_000, checkpoint=directory)
    assert tally.blocks >= 20_000
    assert tally.failures == 0, tally


@needs_qwantize
@on_every_device
@by_both_searches
@of_both_scales
@of_every_form
@pytest.mark.parametrize("kind", SYNTHETIC)
def test_no_block_is_worse_than_by_the_qwantize_package(kind, block_size, global_scale, search, device):
    options = {"blocks": 1000, "peer": qwantize_peer(device), "peer_blocks": 1000}
    tally = try_search(kind, block_size, global_scale, search, device, **options)
    assert tally.peer_blocks >= 1000
    assert tally.peer_better == 0
    assert tally.failures == 0, tally


@pytest.mark.slow
@on_every_device
@of_both_scales
@of_every_form
@pytest.mark.parametrize("kind", [*SYNTHETIC, "smollm2"])
def test_every_one_of_a_million_blocks_is_within_the_tolerance(kind, block_size, global_scale, device):
    directory = checkpoint() if kind == "smollm2" else None
    tally = try_search(kind, block_size, global_scale, "optimal", device, blocks=1_000_000, checkpoint=directory)
    assert tally.blocks >= 1_000_000
    assert tally.failures == 0, tally
