"""What the searches derive from a block Hessian: its scaled form, and a diagonal part that is proven to be one."""

from __future__ import annotations

import pytest
import torch

from qwantize_vllm.search.reference import diagonal_bound, normalize_hessian

CORRELATIONS = [0.0, 0.5, 0.9, 0.99]


def hessians(block_size: int) -> torch.Tensor:
    """One for each of the correlations, of inputs of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    token = torch.randn(400, 1, generator=generator)
    out = []
    for correlation in CORRELATIONS:
        own = torch.randn(400, block_size, generator=generator)
        x = (own * (1 - correlation) ** 0.5 + token * correlation**0.5) * torch.logspace(-2, 2, block_size)
        out.append(x.mT @ x)
    return torch.stack(out)


def prepared(hessian: torch.Tensor, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(form, bound) of the reference or of the kernel, the latter back in the order of the weights."""
    if where == "reference":
        form = normalize_hessian(hessian)
        return form, diagonal_bound(form)
    pytest.importorskip("triton")
    from qwantize_vllm.search.triton_hessian_form import prepare_hessian

    size = hessian.shape[-1]
    form, bound = (each[0].cpu() for each in prepare_hessian(hessian[None].to(where)))
    element = torch.arange(size).view(size // 8, 8).t().flatten()  # where element 8*j + i is: at i*size/8 + j
    back = element.argsort()
    return form[:, back][:, :, back], bound[:, back]


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request):
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are tested compiled")
    return request.param


@pytest.mark.parametrize("block_size", [16, 32])
def test_the_bound_is_a_positive_part_of_the_hessian_and_near_the_largest(where, block_size):
    hessian = hessians(block_size)
    form, bound = prepared(hessian, where)
    rest = form.double() - torch.diag_embed(bound.double())
    assert (torch.linalg.eigvalsh(rest)[:, 0] >= -1e-12).all()
    diagonal = form.double().diagonal(dim1=1, dim2=2)
    correlation = form.double() / (diagonal[:, :, None] * diagonal[:, None]).sqrt()
    least = torch.linalg.eigvalsh(correlation)[:, 0]
    share = (bound / diagonal).amin(dim=1)
    proven = least >= 1 / 64
    assert proven.tolist() == [True, True, True, False]
    assert (share[~proven] == 0).all()
    assert (share[proven] > 0.7 * least[proven]).all()


@pytest.mark.parametrize("factor", [1.0, 1e25, 1e-35])
def test_the_form_is_the_hessian_times_a_power_of_two(where, factor):
    hessian = hessians(16) * factor
    form, _ = prepared(hessian, where)
    peak = form.diagonal(dim1=1, dim2=2).amax(dim=1)
    assert ((peak >= 0.5) & (peak < 2)).all()
    ratio = form[:, 0, 0].double() / hessian[:, 0, 0].double()
    assert (torch.frexp(ratio).mantissa == 0.5).all()
    assert torch.equal(form, (hessian.double() * ratio[:, None, None]).float())


def test_singular_and_broken_hessians_have_no_bound(where):
    x = torch.randn(16, generator=torch.Generator().manual_seed(0))
    indefinite = torch.eye(16)
    indefinite[0, 1] = indefinite[1, 0] = 2.0
    beside_zero = torch.eye(16)
    beside_zero[3, 3], beside_zero[3, 4], beside_zero[4, 3] = 0, 0.1, 0.1
    _, bound = prepared(torch.stack([torch.outer(x, x), indefinite, beside_zero, -torch.eye(16)]), where)
    assert (bound[:3] == 0).all()


def test_zero_means_the_identity_and_dead_inputs_do_not_count(where):
    dead = torch.eye(16)
    dead[5, 5] = 0
    form, bound = prepared(torch.stack([torch.zeros(16, 16), dead]), where)
    assert torch.equal(form[0], torch.eye(16))
    assert (bound[0] > 0.7).all()
    assert bound[1, 5] == 0
    assert (bound[1, torch.arange(16) != 5] > 0.35).all()
