"""What a model on a GPU holds, in the layouts and under the names of one on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwantize_vllm import Nvfp4Tensor
from qwantize_vllm.matmul.experts import in_turn
from qwantize_vllm.matmul.swizzle import ARRIVALS, SwizzledNvfp4, unswizzle
from qwantize_vllm.plugin.expert_weights import GroupedForm
from qwantize_vllm.plugin.weights import SwizzledForm


def plain_tensors(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """As `describe_model`, of the quantized layers alone: codes, block scales and global scales."""
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        form = getattr(getattr(layer, "quant_method", None), "_form", None)
        if isinstance(form, SwizzledForm):
            q = _plain(
                layer.weight,
                layer.weight_scale,
                layer.weight_global_scale,
                (form.rows, layer.input_size_per_partition),
                form.block_size,
            )
            tensors |= dict(_named(f"{name}.weight", q))
        elif isinstance(form, GroupedForm):
            tensors |= dict(_named(f"{name}.w2_weight", _experts(layer, "w2", form)))
            tensors |= dict(_named(f"{name}.w13_weight", _experts(layer, "w13", form)))
    return {"tensors": tensors}


def _experts(layer: torch.nn.Module, weight: str, form: GroupedForm) -> Nvfp4Tensor:
    words, scales, global_scales = form.parts(layer, weight)
    down = weight == "w2"
    shape = (form.out, form.intermediate) if down else (2 * form.intermediate, form.out)
    each = [_plain(words[i], scales[i], global_scales[i, 0], shape, form.block_size) for i in range(len(words))]
    codes, bytes_ = (torch.stack(parts) for parts in zip(*((q.codes, _bytes(q)) for q in each), strict=True))
    if not down:  # rows of gate and up are held in turn
        order = in_turn(shape[0]).argsort()
        codes, bytes_ = codes[:, order], bytes_[:, order]
    return Nvfp4Tensor(codes, bytes_.view(each[0].block_scales.dtype), global_scales[:, 0].cpu(), form.block_size)


def _plain(
    words: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor, shape: tuple[int, int], block_size: int
) -> Nvfp4Tensor:
    arrived = torch.zeros(ARRIVALS, dtype=torch.int32, device=words.device)
    return unswizzle(SwizzledNvfp4(words, scales, global_scale, arrived, shape, block_size)).to("cpu")


def _named(name: str, q: Nvfp4Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield name, q.codes
    yield f"{name}_scale", q.block_scales
    yield f"{name}_global_scale", q.global_scale


def _bytes(q: Nvfp4Tensor) -> torch.Tensor:
    return q.block_scales.view(torch.uint8)
