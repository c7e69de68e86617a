"""The numbers that a rank gives its experts, for those of all ranks: one small kernel, where PyTorch takes four."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.matmul.dependent_launch import dependent_launch
from qwantize_vllm.matmul.launcher import launch_again
from qwantize_vllm.triton_launch import Launch

_IDS = 1024  # of a program


def map_ids(ids: torch.Tensor, expert_map: torch.Tensor, launch: Launch = launch_again) -> torch.Tensor:
    """int32, of the shape of ids: as `experts.local_ids` has them."""
    ids, count = ids.contiguous(), ids.numel()
    local = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    if count:
        constants = {"IDS": _IDS, **dependent_launch(ids.device)}
        launch(_map_kernel, (-(-count // _IDS),), ids, expert_map, local, count, **constants)
    return local


@triton.jit(do_not_specialize=["count"])
def _map_kernel(ids_ptr, map_ptr, local_ptr, count, IDS: tl.constexpr, DEPENDENT: tl.constexpr):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * IDS + tl.arange(0, IDS)
    ids = tl.load(ids_ptr + at, mask=at < count, other=-1)
    local = tl.load(map_ptr + ids, mask=ids >= 0, other=-1)
    tl.store(local_ptr + at, local, mask=at < count)
