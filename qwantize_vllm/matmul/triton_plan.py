"""Which pairs go into which tile of the grouped kernel, where there are too many for each program to look at all.

Tiles of width W: expert e has ceil(count[e] / W) of them, after those of the experts before it. One launch: a program
counts the pairs of every expert, all of them and those before its own, and so knows where its own go:

    place[p] = W * (tiles of experts before e)  +  pairs of e before p

The plan is an int32 array: the expert of each slot, or -1, then for each slot its W pairs, -1 where there are no more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PAIRS = 128  # a program's own
_READ = 2048  # counted at a time


def make_plan(ids: torch.Tensor, experts: int, width: int, slots: int) -> torch.Tensor:
    """int32 (slots * (1 + width),) for ids int32 (pairs,); slots are at least as many as there can be tiles."""
    plan = torch.full((slots * (1 + width),), -1, dtype=torch.int32, device=ids.device)
    _plan_kernel[(triton.cdiv(len(ids), _PAIRS),)](
        ids,
        plan,
        len(ids),
        slots,
        WIDTH=width,
        BINS=triton.next_power_of_2(experts + 1),
        OWN=_PAIRS,
        READ=_READ,
        num_warps=8,
    )
    return plan


@triton.jit(do_not_specialize=["pairs", "slots"])
def _plan_kernel(
    ids_ptr, plan_ptr, pairs, slots, WIDTH: tl.constexpr, BINS: tl.constexpr, OWN: tl.constexpr, READ: tl.constexpr
):
    # The last bin is for what does not count.
    start = tl.program_id(0) * OWN
    count = tl.zeros((BINS,), dtype=tl.int32)
    before = tl.zeros((BINS,), dtype=tl.int32)
    for turn in range(0, tl.cdiv(pairs, READ)):
        pair = turn * READ + tl.arange(0, READ)
        ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1)
        ids = tl.where(ids < 0, BINS - 1, ids)
        count += tl.histogram(ids, BINS)
        before += tl.histogram(tl.where(pair < start, ids, BINS - 1), BINS)
    tiles = tl.where(tl.arange(0, BINS) < BINS - 1, tl.cdiv(count, WIDTH), 0)
    first = tl.cumsum(tiles, 0) - tiles
    index = tl.arange(0, OWN)
    pair = start + index
    ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1)
    earlier = (ids[:, None] == ids[None, :]) & (index[None, :] < index[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    bins = tl.where(ids < 0, BINS - 1, ids)
    rank += tl.gather(before, bins, 0)
    slot = tl.gather(first, bins, 0) + rank // WIDTH
    tl.store(plan_ptr + slot, ids, mask=(ids >= 0) & (rank % WIDTH == 0))
    tl.store(plan_ptr + slots + slot * WIDTH + rank % WIDTH, pair, mask=ids >= 0)
