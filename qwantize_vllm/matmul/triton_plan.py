"""Which pairs go into which tile of the grouped kernels, where there are too many for each program to look at all.

Tiles of width W: expert e has ceil(count[e] / W) of them, after those of the experts before it, so

    place[p] = W * (tiles of experts before e)  +  pairs of e before p

One kernel counts the pairs of every expert in each chunk; in the next one a program adds up the chunks, all of them and
those before its own, and so knows where its own pairs go.

The plan is an int32 array: the expert of each slot, or -1, then for each slot its W pairs, -1 where there are no more,
then the place of each pair, of no meaning where its expert is not here, then the number of slots that have an expert:
they come first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.matmul.dependent_launch import dependent_launch
from qwantize_vllm.matmul.launcher import launch_again
from qwantize_vllm.triton_launch import Launch

_CHUNK = 1024  # pairs counted by a program
_OWN = 128  # pairs placed by a program


def slots_for(pairs: int, experts: int, width: int) -> int:
    """As many as there can be tiles so wide."""
    return min(pairs, -(-pairs // width) + experts)


def make_plan(ids: torch.Tensor, experts: int, width: int, slots: int, launch: Launch = launch_again) -> torch.Tensor:
    """int32 (slots * (1 + width) + pairs + 1,) for ids int32 (pairs,)."""
    pairs, bins = ids.numel(), 1 << experts.bit_length()
    chunks = -(-pairs // _CHUNK)
    plan = torch.empty(slots * (1 + width) + pairs + 1, dtype=torch.int32, device=ids.device)
    counts = torch.empty(chunks, bins, dtype=torch.int32, device=ids.device)
    sizes = {"BINS": bins, "CHUNK": _CHUNK, "num_warps": 8, **dependent_launch(ids.device)}
    launch(_count_kernel, (chunks,), ids, counts, plan, pairs, slots * (1 + width), **sizes)
    place = (ids, counts, plan, pairs, slots, chunks)
    launch(_place_kernel, (-(-pairs // _OWN),), *place, WIDTH=width, OWN=_OWN, **sizes)
    return plan


@triton.jit(do_not_specialize=["pairs", "fill"])
def _count_kernel(
    ids_ptr, counts_ptr, plan_ptr, pairs, fill, BINS: tl.constexpr, CHUNK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """Pairs of every expert in a chunk; the last bin is for what does not count. Also sets the plan to -1."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    ids = _load_bins(ids_ptr, chunk * CHUNK + tl.arange(0, CHUNK), pairs, BINS)
    tl.store(counts_ptr + chunk * BINS + tl.arange(0, BINS), tl.histogram(ids, BINS))
    for start in range(chunk * CHUNK, fill, chunks * CHUNK):
        index = start + tl.arange(0, CHUNK)
        tl.store(plan_ptr + index, tl.full((CHUNK,), -1, tl.int32), mask=index < fill)


@triton.jit(do_not_specialize=["pairs", "slots", "chunks"])
def _place_kernel(
    ids_ptr,
    counts_ptr,
    plan_ptr,
    pairs,
    slots,
    chunks,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    OWN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    start = tl.program_id(0) * OWN
    mine = start // CHUNK
    bins = tl.arange(0, BINS)
    pair = mine * CHUNK + tl.arange(0, CHUNK)
    ids = _load_bins(ids_ptr, pair, tl.minimum(pairs, start), BINS)
    before = tl.where(bins < BINS - 1, tl.histogram(ids, BINS), 0)
    count = tl.zeros((BINS,), dtype=tl.int32)
    for chunk in range(0, chunks):
        counted = tl.load(counts_ptr + chunk * BINS + bins)
        count += counted
        before += tl.where(chunk < mine, counted, 0)
    tiles = tl.where(bins < BINS - 1, tl.cdiv(count, WIDTH), 0)
    first = tl.cumsum(tiles, 0) - tiles
    if start == 0:
        tl.store(plan_ptr + slots * (1 + WIDTH) + pairs, tl.sum(tiles, 0))
    index = tl.arange(0, OWN)
    pair = start + index
    ids = _load_bins(ids_ptr, pair, pairs, BINS)
    earlier = (ids[:, None] == ids[None, :]) & (index[None, :] < index[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1) + tl.gather(before, ids, 0)
    slot = tl.gather(first, ids, 0) + rank // WIDTH
    here = ids < BINS - 1
    tl.store(plan_ptr + slot, ids, mask=here & (rank % WIDTH == 0))
    place = slot * WIDTH + rank % WIDTH
    tl.store(plan_ptr + slots + place, pair, mask=here)
    tl.store(plan_ptr + slots * (1 + WIDTH) + pair, place, mask=here)


@triton.jit
def _load_bins(ids_ptr, pair, end, BINS: tl.constexpr):
    """The experts of pairs before `end`; the last bin for others, and for experts elsewhere."""
    ids = tl.load(ids_ptr + pair, mask=pair < end, other=-1)
    return tl.where(ids < 0, BINS - 1, ids)
