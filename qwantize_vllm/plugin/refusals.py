"""What an engine cannot do with quantized layers, by vLLM's config: refused before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoEConfig

from qwantize_vllm.plugin.base_config import overriding_file

_REFUSED_TRANSFERS = {
    "sparse_nccl": "changes single elements of dense weights; quantized layers do not keep those",
    "sharded_rdt": "writes into parameters past their loaders, by which quantized layers know what has arrived",
}


def refuse_unsupported(config: VllmConfig) -> None:
    """See that an engine is not to get new weights in a way that quantized layers cannot take, nor to leave weights in
    the host's memory, for which vLLM copies them before they are there.

    Raises:
        ValueError: it is.
    """
    transfer = getattr(config, "weight_transfer_config", None)
    if transfer is not None and (why := _REFUSED_TRANSFERS.get(transfer.backend)) is not None:
        raise ValueError(
            f"qwantize: weight_transfer_config has backend {transfer.backend!r}, which {why}: use a backend that sends "
            "whole weights, 'nccl' or 'ipc'"
        )
    offload = config.offload_config
    given = {
        "--cpu-offload-gb": offload.uva.cpu_offload_gb,
        "--offload-group-size": offload.prefetch.offload_group_size,
    }
    if asked := [f"{flag} {value:g}" for flag, value in given.items() if value]:
        raise ValueError(
            f"qwantize: {' and '.join(asked)}: vLLM's offloaders do not work with quantized layers; leave that out "
            "(quantized weights take 0.28 times the memory)"
        )


def refuse_unordered_load(config: VllmConfig) -> None:
    """See that all ranks get their weights in the same order, as they have to agree on global scales layer by layer.

    Raises:
        ValueError: each may get them in its own.
    """
    extra, ranks = config.load_config.model_loader_extra_config, config.parallel_config.tensor_parallel_size
    if ranks > 1 and isinstance(extra, Mapping) and extra.get("enable_multithread_load"):
        raise ValueError(
            f"qwantize: enable_multithread_load in --model-loader-extra-config, with --tensor-parallel-size {ranks}: "
            "each rank then reads files in an order of its own, and ranks have to agree on the global scale of one "
            "layer after the other; leave it out"
        )


def refuse_unread_file(config: VllmConfig, given: Mapping[str, Any]) -> None:
    """See that vLLM reads the settings file that the user names, where a quantization_config has been given.

    Raises:
        ValueError: it does not.
    """
    if (file := overriding_file(config)) is not None:
        raise ValueError(
            f"qwantize settings: --hf-overrides name the file {file}, which vLLM reads only where a model has no "
            f"quantization_config, and this one has {dict(given)}; give what replaces it: "
            '--hf-overrides \'{"quantization_config": {"quant_method": "qwantize", …}}\''
        )


def refuse_all2all(moe: FusedMoEConfig, name: str) -> None:
    """See that the ranks of expert parallelism exchange tokens by the one backend that does so outside of kernels.

    Raises:
        ValueError: they do not.
    """
    parallel = moe.moe_parallel_config
    if parallel.use_all2all_kernels and not parallel.use_ag_rs_all2all_kernels:
        raise ValueError(
            f"qwantize: {name}: --all2all-backend {parallel.all2all_backend} exchanges tokens inside of vLLM's own "
            "expert kernels, which do not serve these experts; use --all2all-backend allgather_reducescatter"
        )
