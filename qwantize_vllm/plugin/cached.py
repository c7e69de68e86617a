"""cache_dir: a search whose result is kept, and found again at the next start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger

from qwantize_vllm import __version__
from qwantize_vllm.checkpoint.cache import LayerCache
from qwantize_vllm.format import Nvfp4Tensor

logger = init_logger(f"vllm.{__name__}")


def cached(
    directory: Path,
    name: str,
    how: Sequence[Any],
    weights: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor | None],
    block_size: int,
    search: Callable[[], list[Nvfp4Tensor]],
) -> tuple[list[Nvfp4Tensor], bool]:
    """What the directory has for these weights, or else the search's result, which is kept there.

    Args:
        name: of the layer, for messages. how: what else the result follows from, as JSON takes it.
        weights: (..., N, K) each, all on one device: what search quantizes, in its order.
        others: global scales, Hessians.

    Returns:
        what became of each weight, and whether it was there.
    """
    device = weights[0].device
    try:
        cache = LayerCache(directory)
    except OSError as error:
        logger.warning("qwantize: %s: cache_dir cannot be used, nothing is kept: %s", name, error)
        return search(), False
    key = cache.key({"how": [__version__, device.type, *how, block_size]}, [*weights, *others])
    try:
        if (found := cache.load(key, [tuple(weight.shape) for weight in weights], block_size)) is not None:
            return [q.to(device) for q in found], True
    except ValueError as error:
        logger.warning("qwantize: %s: %s; it is searched again and written anew", name, error)
    quantized = search()
    try:
        cache.save(key, quantized)
    except OSError as error:
        logger.warning("qwantize: %s: it is not kept in cache_dir: %s", name, error)
    return quantized, False
