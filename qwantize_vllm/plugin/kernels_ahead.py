"""Kernels of layers that have been quantized: compiled beside the load, by one rank for others, and launched by each in
the engine's first run."""

from __future__ import annotations

from vllm import envs
from vllm.distributed import get_pp_group, get_tp_group, get_world_group, model_parallel_is_initialized

from qwantize_vllm.matmul.compile_ahead import compile_ahead
from qwantize_vllm.matmul.every_kernel import Kernels
from qwantize_vllm.matmul.warm_up import announce


def prepare_kernels(kernels: Kernels) -> None:
    """See that they are there before requests are; nothing in batch-invariant mode, which has one kernel of its own."""
    if envs.VLLM_BATCH_INVARIANT:
        return
    if compiles_for_others():
        compile_ahead(kernels)
    announce(kernels)


def compiles_for_others() -> bool:
    """Whether this rank has kernels compiled while it loads: the first of a host for all of them, into a cache that
    they share, and the first of each later stage of a pipeline, whose layers may be others. Ranks beside them compile
    in their first run what is not there by then."""
    if not model_parallel_is_initialized() or get_world_group().local_rank == 0:
        return True
    return get_pp_group().rank_in_group > 0 and get_tp_group().rank_in_group == 0
