"""The experts of a mixture against float64: the grouped kernel, interpreted and on a GPU, and the loop over experts."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.backends import run_experts
from qwantize_vllm.matmul.experts import ACTIVATIONS, local_ids, swizzle_experts
from qwantize_vllm.matmul.experts_cpu import activate, experts_one_by_one, members_of
from qwantize_vllm.matmul.grouped_shapes import GROUPED_WGMMA_SHAPES, choose_grouped
from qwantize_vllm.matmul.op import experts_op, experts_swizzled_op
from qwantize_vllm.matmul.reference import matmul_reference
from qwantize_vllm.matmul.tile_shapes import ANY_TOKENS, TileShape
from qwantize_vllm.matmul.wgmma_shapes import STEPS
from tests.matmul.test_matmul import INTERPRETED_BFLOAT16, TOLERANCE, relative_error

HALVES = [torch.bfloat16, torch.float16]


def make(device, tokens, experts, top_k, hidden, intermediate, dtype, block_size=16, seed=0):
    """x, w13 (E, 2I, H), w2 (E, H, I), weights and ids of the experts that each token is routed to."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    w13 = quantize_nvfp4((randn(experts, 2 * intermediate, hidden) / hidden**0.5).to(dtype), "naive", block_size)
    w2 = quantize_nvfp4((randn(experts, hidden, intermediate) / intermediate**0.5).to(dtype), "naive", block_size)
    weights, ids = randn(tokens, experts).softmax(-1).topk(top_k)
    x = randn(tokens, hidden).to(dtype)
    return tuple(value.to(device) for value in (x, w13, w2, weights, ids))


def exact(x, w13, w2, weights, ids, activation="silu"):
    y = torch.zeros(x.shape[0], w2.shape[1], dtype=torch.float64, device=x.device)
    for token, choice in (ids >= 0).nonzero().tolist():
        expert = int(ids[token, choice])
        gate, up = (w13[expert].dequantize().double() @ x[token].double()).chunk(2)
        h = activate(gate, activation) * up
        y[token] += weights[token, choice].double() * (w2[expert].dequantize().double() @ h)
    return y


def swizzled(w13, w2):
    members = w13.global_scale[:, None]
    first = swizzle_experts(w13.codes, w13.block_scales, members, w13.block_size, gated=True)
    second = swizzle_experts(w2.codes, w2.block_scales, w2.global_scale[:, None], w2.block_size, gated=False)
    return first, second


def tolerance(device, dtype):
    """Three results are rounded one after the other, h, z and y: independently, or by the interpreter always down."""
    return 3 * INTERPRETED_BFLOAT16 if device == "cpu" and dtype == torch.bfloat16 else 3**0.5 * TOLERANCE[dtype]


def grouped(x, w13, w2, weights, ids, activation="silu", shapes=None):
    from qwantize_vllm.matmul.triton_grouped import experts_swizzled

    return experts_swizzled(x, *swizzled(w13, w2), weights, ids, activation, shapes)


@pytest.mark.parametrize(("dtype", "block_size"), [(torch.bfloat16, 16), (torch.float16, 32)])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (7, 8, 3), (40, 2, 1), (140, 5, 2)])
def test_grouped_against_float64(kernel_on, dtype, block_size, tokens, experts, top_k):
    pytest.importorskip("triton")
    case = make(kernel_on, tokens, experts, top_k, 96, 160, dtype, block_size)
    y = grouped(*case)
    assert y.dtype == dtype
    assert relative_error(y, exact(*case)) < tolerance(kernel_on, dtype)


@pytest.mark.parametrize("tokens", [3, 150])
def test_experts_that_are_elsewhere_count_nothing(kernel_on, tokens):
    pytest.importorskip("triton")
    x, w13, w2, weights, ids = make(kernel_on, tokens, 6, 2, 64, 64, torch.float16)
    ids = torch.where(ids % 2 == 0, ids, -1)
    ids[0] = -1
    y = grouped(x, w13, w2, weights, ids)
    assert not y[0].any()
    assert relative_error(y, exact(x, w13, w2, weights, ids)) < tolerance(kernel_on, torch.float16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(kernel_on, activation):
    pytest.importorskip("triton")
    case = make(kernel_on, 5, 4, 2, 64, 64, torch.float16)
    assert relative_error(grouped(*case, activation), exact(*case, activation)) < tolerance(kernel_on, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_by_one_against_float64(dtype, activation):
    x, w13, w2, weights, ids = make("cpu", 9, 4, 2, 64, 96, dtype)
    ids[3, 1] = -1
    y = experts_one_by_one(x, [w13], w2, weights, ids, activation, matmul_reference)
    # gate, up, their product, z and y are rounded.
    assert relative_error(y, exact(x, w13, w2, weights, ids, activation)) < 5**0.5 * TOLERANCE[dtype]


@pytest.mark.parametrize("total", [8, 32])
def test_shapes_are_those_for_the_pairs_that_experts_here_will_have(kernel_on, monkeypatch, total):
    """On one of four ranks that is a quarter of all, and the product is the same."""
    pytest.importorskip("triton")
    from qwantize_vllm.matmul import triton_grouped

    asked = []

    def choose(major, pairs, experts):
        asked.append((pairs, experts))
        return choose_grouped(major, pairs, experts)

    monkeypatch.setattr(triton_grouped, "choose_grouped", choose)
    x, w13, w2, weights, ids = make(kernel_on, 9, 8, 2, 64, 64, torch.float16)
    kept = [[each.words, each.scales, each.global_scales] for each in swizzled(w13, w2)]
    y = experts_swizzled_op(x, *kept, weights, ids, "silu", 64, 64, 16, total, "auto")
    assert asked == [(18 if total == 8 else 5, 8)]
    assert relative_error(y, exact(x, w13, w2, weights, ids)) < tolerance(kernel_on, torch.float16)


def op_arguments(device, tokens=5):
    x, w13, w2, weights, ids = make(device, tokens, 4, 2, 64, 96, torch.bfloat16)
    plain = [[q.codes, q.block_scales, q.global_scale[:, None]] for q in (w13, w2)]
    kept = [[each.words, each.scales, each.global_scales] for each in swizzled(w13, w2)]
    return (x, *plain, weights, ids, "silu", 16, "auto"), (x, *kept, weights, ids, "silu", 96, 64, 16, 4, "auto")


def test_the_ops_are_registered_as_pytorch_wants_them():
    pytest.importorskip("triton")
    # test_schema compares inputs bit by bit in a way that has no float8.
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, arguments in zip((experts_op, experts_swizzled_op), op_arguments("cpu"), strict=True):
        torch.library.opcheck(op, arguments, test_utils=utils)


def test_batch_invariant_results_do_not_depend_on_other_tokens(kernel_on, monkeypatch, exact_products):
    """As test_batch_invariance of one weight: the halves of h cancel each other, and K, where it may be cut, is cut
    otherwise every time."""
    pytest.importorskip("triton")
    from qwantize_vllm.matmul import triton_grouped

    x, w13, w2, weights, ids = make("cpu", 150, 4, 2, 64, 160, torch.bfloat16)
    x, weights, ids = x.to(kernel_on), weights.to(kernel_on), ids.to(kernel_on)
    first, second = swizzled(*(weight.to(kernel_on) for weight in with_opposite_halves(w13, w2)))
    slices = itertools.cycle((1, 2))
    monkeypatch.setattr(triton_grouped, "_splits", lambda *_: next(slices))
    case = (x, first, second, weights, ids, "silu")
    together = run_experts(*case, "batch_invariant")
    for part in (slice(0, 1), slice(77, 90)):
        alone = run_experts(x[part], first, second, weights[part], ids[part], "silu", "batch_invariant")
        assert torch.equal(alone, together[part])
    cut, whole = (triton_grouped.experts_swizzled(*case, (ANY_TOKENS, ANY_TOKENS)) for _ in range(2))
    assert not torch.equal(cut, whole)


def with_opposite_halves(w13, w2):
    """Twice as wide inside: h and -h, which the second weight multiplies by the same."""
    gate, up = w13.codes.chunk(2, dim=1)
    scales = [part for part in w13.block_scales.chunk(2, dim=1) for _ in range(2)]
    # The sign is the highest of a code's four bits.
    first = Nvfp4Tensor(torch.cat((gate, gate, up, up ^ 0x88), 1), torch.cat(scales, 1), w13.global_scale)
    return first, Nvfp4Tensor(w2.codes.repeat(1, 1, 2), w2.block_scales.repeat(1, 1, 2), w2.global_scale)


@pytest.mark.parametrize("members", [1, 2])
def test_a_global_scale_for_gate_and_one_for_up(kernel_on, members):
    """The second one counts: with both parts given the first's, the result is another."""
    pytest.importorskip("triton")
    from qwantize_vllm.matmul.triton_grouped import experts_swizzled

    x, w13, w2, weights, ids = make(kernel_on, 4, 3, 2, 64, 64, torch.float16)
    scales = w13.global_scale[:, None] * torch.tensor([[1.0, 3.0]], device=kernel_on)[:, :members]
    first = swizzle_experts(w13.codes, w13.block_scales, scales.contiguous(), 16, gated=True)
    y = experts_swizzled(x, first, swizzled(w13, w2)[1], weights, ids, "silu")
    # up is linear in its scale.
    truth = exact(x, w13, w2, weights, ids) * (3 if members == 2 else 1)
    assert relative_error(y, truth) < tolerance(kernel_on, torch.float16)
    plain = members_of(w13.codes, w13.block_scales, scales, 16)
    assert [part.shape[1] for part in plain] == [128 // members] * members
    y = experts_one_by_one(x, plain, w2, weights, ids, "silu", matmul_reference)
    assert relative_error(y, truth) < 5**0.5 * TOLERANCE[torch.float16]


@pytest.mark.parametrize("pairs", [257, 3000])
def test_the_plan_has_every_pair_once_in_a_tile_of_its_expert(kernel_on, pairs):
    pytest.importorskip("triton")
    from qwantize_vllm.matmul.triton_plan import make_plan, slots_for

    experts, width = 7, 16
    ids = torch.randint(-1, experts, (pairs,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    slots = slots_for(pairs, experts, width)
    plan = make_plan(ids.to(kernel_on), experts, width, slots).cpu()
    expert, tiles, places = (
        plan[:slots],
        plan[slots : slots * (1 + width)].view(slots, width),
        plan[slots * (1 + width) : -1],
    )
    here = (ids >= 0).nonzero().flatten()
    assert torch.equal(tiles[tiles >= 0].sort().values, here.int())
    assert torch.equal(tiles.flatten()[places[here].long()], here.int())
    assert torch.equal(expert[places[here].long() // width], ids[here])
    used = int((expert >= 0).sum())
    assert used == sum(-(-int((ids == each).sum()) // width) for each in range(experts))
    assert (expert[:used] >= 0).all()
    assert plan[-1] == used
    assert (tiles[used:] < 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 100, 1000])
def test_a_cuda_graph_replays_with_other_routings(tokens):
    """At 1,000 tokens on Hopper with the kernel in Gluon."""
    case = make("cuda", tokens, 4, 2, 256, 128, torch.bfloat16)
    x, w13, w2, weights, ids = case
    first, second = swizzled(w13, w2)
    run_experts(x, first, second, weights, ids, "silu")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run_experts(x, first, second, weights, ids, "silu")
    _, _, _, other_weights, other_ids = make("cuda", tokens, 4, 2, 256, 128, torch.bfloat16, seed=1)
    weights.copy_(other_weights), ids.copy_(other_ids)
    graph.replay()
    assert relative_error(y, exact(*case)) < tolerance("cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("shapes", [*zip(STEPS, STEPS, strict=True), tuple(GROUPED_WGMMA_SHAPES)])
def test_kernel_for_many_tokens_has_the_sums_of_the_other(dtype, block_size, shapes):
    """The number of rows is no multiple of a program's, and an expert has no token."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("runs on Hopper")
    from qwantize_vllm.matmul.gluon_grouped import experts_wgmma

    x, w13, w2, weights, ids = make("cuda", 700, 5, 2, 576, 352, dtype, block_size)
    ids = torch.where(ids == 3, -1, ids)
    case = (x, *swizzled(w13, w2), weights, ids)
    y = experts_wgmma(*case, "silu", shapes)
    assert relative_error(y, grouped(x, w13, w2, weights, ids).double()) < tolerance("cuda", dtype)
    assert all(torch.equal(experts_wgmma(*case, "silu", shapes), y) for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_no_expert_are_of_none_here(kernel_on, dtype):
    """Those of tokens that fill up a batch: as an index -1 would be the last expert, which is here."""
    pytest.importorskip("triton")
    from qwantize_vllm.matmul.triton_local_ids import map_ids

    expert_map = torch.tensor([-1, -1, 0, 1], dtype=torch.int32, device=kernel_on)
    ids = torch.tensor([[0, 3], [2, -1], [-1, -1]], dtype=dtype, device=kernel_on)
    for mapped in (local_ids, map_ids):
        assert mapped(ids, expert_map).tolist() == [[-1, 1], [0, -1], [-1, -1]]
        assert mapped(ids.T, expert_map).tolist() == [[-1, 0, -1], [1, -1, -1]]
        assert mapped(ids[:0], expert_map).shape == (0, 2)
    many = torch.arange(-1, 4, device=kernel_on).repeat(777)
    assert torch.equal(map_ids(many, expert_map), local_ids(many.cpu(), expert_map.cpu()).to(kernel_on))
    assert local_ids(ids, None) is ids


@pytest.mark.parametrize(("pairs", "splits"), [(8, 4), (64, 4), (1024, 1), (65536, 1)])
def test_many_tokens_fill_the_gpu_without_slices(monkeypatch, pairs, splits):
    """Two experts of 8 tiles of rows are 16 programs of 128 wanted where tokens are few, more where they are many."""
    pytest.importorskip("triton")
    from qwantize_vllm.matmul import triton_grouped
    from qwantize_vllm.matmul.triton_plan import slots_for

    monkeypatch.setattr(triton_grouped, "multiprocessors", lambda device: 32)
    weight = types.SimpleNamespace(words=torch.empty(2, 8, 32, 0), expected=lambda pairs: pairs)
    shape = TileShape(64, 1, 1, 4, 3)
    slots = slots_for(pairs, 2, shape.tokens)
    assert triton_grouped._splits(torch.device("cpu"), pairs, slots, weight, shape) == splits


def test_weights_of_pairs_may_be_a_part_of_a_tensor(kernel_on):
    pytest.importorskip("triton")
    x, w13, w2, weights, ids = make(kernel_on, 5, 4, 2, 64, 64, torch.float16)
    wide = torch.zeros(5, 8, device=kernel_on)
    wide[:, :2] = weights
    from qwantize_vllm.matmul.triton_grouped import experts_swizzled

    y = experts_swizzled(x, *swizzled(w13, w2), wide[:, :2], ids, "silu")
    assert relative_error(y, exact(x, w13, w2, weights, ids)) < tolerance(kernel_on, torch.float16)
