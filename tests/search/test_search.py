"""The searches against float64 brute force over all 126 codes: reference on the CPU, kernels on both devices."""

from __future__ import annotations

import itertools

import pytest
import torch

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.format import FLOAT_DTYPES, e4m3_values, round_to_e2m1, unpack_codes
from qwantize_vllm.search.brute_force import SSE_TOLERANCE
from tests.devices import kernel_device
from tests.numbers import least_quadratic, least_sse, make_weight, quadratic, residuals, scaled, sse

KINDS = ["gaussian", "student", "uniform", "sparse", "outlier", "million", "denormal", "zero", "grid"]


@pytest.fixture(params=["reference", "interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def search(request):
    """quantize_nvfp4 by the reference, by the interpreted kernel, or by the compiled one; the result on the CPU."""
    device = kernel_device(request.param)

    def run(weight, *args, hessian=None, **kwargs):
        hessian = None if hessian is None else hessian.to(device)
        backend = "reference" if request.param == "reference" else "triton"
        return quantize_nvfp4(weight.to(device), *args, hessian=hessian, backend=backend, **kwargs).to("cpu")

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("global_scale", ["amax", "none"])
def test_optimal_reaches_the_least_error_on_every_block(search, kind, block_size, global_scale):
    weight = make_weight(kind, 33, 160)
    q = search(weight, "optimal", block_size, global_scale)
    least = least_sse(weight, q)
    assert (sse(weight, q) <= least * (1 + SSE_TOLERANCE)).all()
    assert torch.isfinite(q.dequantize()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("global_scale", ["amax", "none"])
def test_naive_is_the_snapped_amax_over_six(search, kind, global_scale):
    weight = make_weight(kind, 33, 160)
    q = search(weight, "naive", 16, global_scale)
    z = (weight / q.global_scale).unflatten(-1, (-1, 16)).abs()
    wanted = (z.amax(-1) / 6).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    assert torch.equal(q.block_scales.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("scale_search", ["naive", "optimal"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_nearest_with_ties_to_even(search, scale_search, kind):
    weight = make_weight(kind, 17, 64)
    q = search(weight, scale_search, 16, "none")
    wanted = round_to_e2m1(weight.unflatten(-1, (-1, 16)) / q.block_scales.float()[..., None])
    assert torch.equal(unpack_codes(q.codes), wanted.flatten(-2))


@pytest.mark.parametrize("scale_search", ["naive", "optimal", "hessian"])
@pytest.mark.parametrize("global_scale", [1.0, 0.0123])
def test_codes_of_weights_at_midpoints_and_beside_them(search, scale_search, global_scale):
    """Each block: 6 scales, and at a midpoint of E2M1 times the scale, or some float32 steps beside it, the rest."""
    generator = torch.Generator().manual_seed(0)
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    scales = e4m3_values()[:, None]
    weight = midpoints[torch.randint(7, (126, 64), generator=generator)] * scales * global_scale
    steps = torch.randint(-3, 4, weight.shape, generator=generator, dtype=torch.int32)
    weight = (weight.view(torch.int32) + steps).view(torch.float32)
    weight[:, ::16] = 6 * scales * global_scale
    weight *= torch.where(torch.rand(weight.shape, generator=generator) < 0.5, -1, 1)
    hessian = torch.eye(16).repeat(4, 1, 1) if scale_search == "hessian" else None
    q = search(weight, scale_search, 16, torch.tensor(global_scale), hessian=hessian)
    if scale_search == "naive":
        assert torch.equal(q.block_scales.float(), scales.expand(126, 4))
    wanted = round_to_e2m1((weight / q.global_scale).unflatten(-1, (-1, 16)) / q.block_scales.float()[..., None])
    assert torch.equal(unpack_codes(q.codes), wanted.flatten(-2))


LEAST_OUTPUT_ERROR = [
    (16, "amax", ("gaussian", "sparse", "outlier", "zero", "grid")),
    (16, "none", ("zero", "grid")),
    (32, "amax", ("outlier", "zero")),
]
SLOWER = [
    (16, "none", ("gaussian", "sparse", "outlier")),
    (32, "amax", ("gaussian", "sparse", "grid")),
    (32, "none", ("gaussian", "sparse", "outlier", "zero", "grid")),
]


@pytest.mark.parametrize(
    ("block_size", "global_scale", "kind"),
    [
        *((size, scale, kind) for size, scale, kinds in LEAST_OUTPUT_ERROR for kind in kinds),
        *(pytest.param(size, scale, kind, marks=pytest.mark.slow) for size, scale, kinds in SLOWER for kind in kinds),
    ],
)
def test_hessian_reaches_the_least_output_error_on_every_block(search, block_size, global_scale, kind):
    weight = make_weight(kind, 37, 5 * block_size)
    hessian = make_hessians(5, block_size)
    q = search(weight, "hessian", block_size, global_scale, hessian=hessian)
    judged_by = hessian.clone()
    judged_by[0] = torch.eye(block_size)  # H = 0: the squared error decides
    residual = residuals(weight, q)
    got, least = quadratic(residual, judged_by), least_quadratic(weight, q, judged_by)
    trace = judged_by.double().diagonal(dim1=-2, dim2=-1).sum(-1)
    assert (got <= least * (1 + 1e-4) + 1e-7 * trace * residual.square().sum(-1)).all()


def make_hessians(count, block_size):
    """Zero, rank one, diagonal, nearly singular, and well-conditioned but for scale."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4 * block_size, block_size, generator=generator)
    hessian = x.mT @ x
    hessian[0] = 0
    hessian[1] = torch.outer(x[1, 0], x[1, 0])
    hessian[2] = torch.diag(x[2, 0].square())
    mixing = torch.randn(block_size, block_size, generator=generator) @ torch.diag(torch.logspace(0, -4, block_size))
    hessian[3] = mixing @ mixing.T
    hessian[4] *= 1e20
    return hessian


def test_hessian_search_of_blocks_that_reach_seven_scales(search):
    """A quotient of 7 is as near to 8, which E2M1 does not have: were it to round there, r would change its sign."""
    weight = make_weight("gaussian", 126, 16) * 50  # at most 4 or so
    weight[:, 3] = 7
    weight *= e4m3_values()[:, None]
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) + 1
    hessian = (x.mT @ x)[None]
    q = search(weight, "hessian", 16, "none", hessian=hessian)
    got, least = quadratic(residuals(weight, q), hessian), least_quadratic(weight, q, hessian)
    assert (got <= least * (1 + 1e-4)).all()


def test_a_hessian_that_is_not_positive_semidefinite_is_searched_whole(search):
    weight = make_weight("gaussian", 40, 16)
    hessian = torch.diag(torch.linspace(-1, 1, 16))[None]
    q = search(weight, "hessian", hessian=hessian)
    got, least = quadratic(residuals(weight, q), hessian), least_quadratic(weight, q, hessian)
    assert (least < 0).sum() > 20
    assert (got <= least + 1e-4 * least.abs()).all()


@pytest.mark.parametrize(
    ("scale_search", "dtype"),
    [
        *itertools.product(["naive", "optimal"], FLOAT_DTYPES),
        ("hessian", torch.bfloat16),
        *(pytest.param("hessian", dtype, marks=pytest.mark.slow) for dtype in FLOAT_DTYPES if dtype != torch.bfloat16),
    ],
)
def test_kernel_agrees_with_the_reference(kernel_on, dtype, scale_search):
    weight = make_weight("gaussian", 19, 96, dtype)
    hessian = make_hessians(6, 16) if scale_search == "hessian" else None
    reference = quantize_nvfp4(weight, scale_search, hessian=hessian, backend="reference")
    on_device = None if hessian is None else hessian.to(kernel_on)
    kernel = quantize_nvfp4(weight.to(kernel_on), scale_search, hessian=on_device, backend="triton").to("cpu")
    assert torch.equal(kernel.global_scale, reference.global_scale)
    same = kernel.block_scales.view(torch.uint8) == reference.block_scales.view(torch.uint8)
    # Where two scales are equally good within float32, either may be chosen.
    assert same.float().mean() > 0.99
    codes = [unpack_codes(q.codes).unflatten(-1, (-1, 16)) for q in (kernel, reference)]
    assert torch.equal(codes[0][same], codes[1][same])


@pytest.mark.parametrize("scale_search", ["naive", "optimal", "hessian"])
def test_batched_weights_equal_their_matrices(search, scale_search):
    weight = torch.stack([make_weight("gaussian", 9, 32, seed=i) * 10.0**i for i in range(2)])
    hessian = torch.stack([make_hessians(6, 16)[4:] * (i + 1) for i in range(2)])
    hessian = hessian if scale_search == "hessian" else None
    q = search(weight, scale_search, hessian=hessian)
    for i in range(2):
        one = search(weight[i], scale_search, hessian=None if hessian is None else hessian[i])
        assert torch.equal(q[i].codes, one.codes)
        assert torch.equal(q[i].block_scales.view(torch.uint8), one.block_scales.view(torch.uint8))
        assert q[i].global_scale == one.global_scale


@pytest.mark.parametrize("scale_search", ["naive", "optimal", "hessian"])
def test_strides_do_not_matter(search, scale_search):
    weight = make_weight("gaussian", 32, 32, torch.bfloat16)
    hessian = make_hessians(6, 16)[4:] if scale_search == "hessian" else None
    transposed = search(weight.t(), scale_search, hessian=hessian)
    contiguous = search(weight.t().contiguous(), scale_search, hessian=hessian)
    assert torch.equal(transposed.codes, contiguous.codes)
    sliced = torch.cat([weight, weight], dim=1)[:, ::2]
    assert torch.equal(
        search(sliced, scale_search, hessian=hessian).codes,
        search(sliced.contiguous(), scale_search, hessian=hessian).codes,
    )


@pytest.mark.parametrize("scale_search", ["naive", "optimal", "hessian"])
def test_a_hessian_or_nothing_is_shared_by_experts(search, scale_search):
    weight = torch.stack([make_weight("gaussian", 5, 16, seed=i) for i in range(3)])
    hessian = make_hessians(5, 16)[4:] if scale_search == "hessian" else None
    q = search(weight, scale_search, hessian=hessian)
    for i in range(3):
        assert torch.equal(q[i].codes, search(weight[i], scale_search, hessian=hessian).codes)


@pytest.mark.parametrize("scale_search", ["naive", "optimal", "hessian"])
def test_results_do_not_depend_on_the_default_dtype(search, scale_search):
    """vLLM builds and loads models under a default dtype of theirs."""
    weight = make_weight("gaussian", 7, 32, torch.bfloat16)
    hessian = make_hessians(6, 16)[4:] if scale_search == "hessian" else None
    wanted = search(weight, scale_search, hessian=hessian)
    torch.set_default_dtype(torch.bfloat16)
    try:
        q = search(weight, scale_search, hessian=hessian)
        empty = search(weight[:0], scale_search, hessian=hessian)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(q.codes, wanted.codes)
    assert torch.equal(q.block_scales.view(torch.uint8), wanted.block_scales.view(torch.uint8))
    assert q.global_scale == wanted.global_scale
    assert q.global_scale.dtype == empty.global_scale.dtype == torch.float32


def test_more_matrices_than_a_grid_has_room_for(kernel_on, monkeypatch):
    triton_sse = pytest.importorskip("qwantize_vllm.search.triton_sse")
    weight = torch.stack([make_weight("gaussian", 2, 32, seed=i) for i in range(5)]).to(kernel_on)
    wanted = quantize_nvfp4(weight, backend="triton")
    monkeypatch.setattr(triton_sse, "_MATRICES_A_LAUNCH", 2)
    assert torch.equal(quantize_nvfp4(weight, backend="triton").codes, wanted.codes)


def test_a_given_global_scale_is_used(search):
    weight = make_weight("gaussian", 8, 32)
    scale = torch.tensor(0.001)
    q = search(weight, "optimal", global_scale=scale)
    assert q.global_scale == scale
    assert (sse(weight, q) <= least_sse(weight, q) * (1 + SSE_TOLERANCE)).all()


def test_optimal_is_never_worse_than_naive_and_hessian_beats_both_on_its_own_error():
    weight = make_weight("student", 64, 80)
    hessian = make_hessians(5, 16)
    naive, optimal = quantize_nvfp4(weight, "naive"), quantize_nvfp4(weight, "optimal")
    assert (sse(weight, optimal) <= sse(weight, naive) * (1 + SSE_TOLERANCE)).all()
    assert sse(weight, optimal).sum() < sse(weight, naive).sum()
    best = quadratic(residuals(weight, quantize_nvfp4(weight, "hessian", hessian=hessian)), hessian).sum()
    assert best < quadratic(residuals(weight, optimal), hessian).sum()


def test_largest_weight_is_kept_by_the_default_global_scale():
    weight = make_weight("gaussian", 16, 64)
    q = quantize_nvfp4(weight)
    assert scaled(weight, q).abs().max() <= 6 * e4m3_values()[-1] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale_search": "optimum"}, "scale_search must be one of .* got 'optimum'"),
        ({"block_size": 24}, "block_size must be one of"),
        ({"global_scale": "max"}, "global_scale must be one of .* got 'max'"),
        ({"global_scale": torch.tensor(0.0)}, "at least"),
        ({"global_scale": torch.tensor([1.0])}, r"float32 of shape \(\)"),
        ({"scale_search": "hessian"}, "'hessian' needs a hessian"),
        ({"hessian": torch.zeros(4, 16, 16)}, "no other takes one"),
        ({"scale_search": "hessian", "hessian": torch.zeros(3, 16, 16)}, r"float32 \(4, 16, 16\)"),
        ({"scale_search": "hessian", "hessian": torch.full((4, 16, 16), torch.nan)}, "1024 non-finite"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_nvfp4(torch.ones(3, 64), **arguments)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(64), r"weight must be \(..., N, K\)"),
        (torch.ones(2, 64, dtype=torch.float64), "torch.float64"),
        (torch.ones(2, 40), "multiple of block_size 16"),
        (torch.ones(2, 0), "positive multiple"),
        (torch.tensor([[1.0] * 14 + [torch.nan, torch.inf]]), "1 NaN and 1 infinite"),
        (torch.tensor([[1.0] * 15 + [-torch.inf]]), "0 NaN and 1 infinite"),
    ],
)
def test_bad_weights_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        quantize_nvfp4(weight)


def test_empty_weights_give_empty_results():
    assert quantize_nvfp4(torch.ones(0, 64)).shape == (0, 64)
    assert quantize_nvfp4(torch.ones(0, 3, 64)).shape == (0, 3, 64)
