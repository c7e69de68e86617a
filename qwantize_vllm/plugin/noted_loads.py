"""What vLLM loads where: its own code is given tensors on the meta device, and each call of a loader is noted."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.utils.torch_utils import set_default_torch_dtype

from qwantize_vllm.checkpoint.members import Part
from qwantize_vllm.plugin.inspection import MetaModel

Described = tuple[str, torch.dtype, tuple[int, ...]]  # name, dtype and shape of a tensor


@dataclasses.dataclass(frozen=True)
class Load:
    """A call of a weight loader: what of the checkpoint goes to which part of a parameter.

    Attributes:
        tensor: of the checkpoint; None where it is neither all of one nor a part of a stacked one.
        part: of that tensor; None where it is all of it.
        shard: vLLM's name or number for the part of the parameter, or several numbers; None for all of it.
        expert: the number that it has in the model; None where the layer has none.
    """

    tensor: str | None
    part: Part | None
    shard: int | str | tuple[int, ...] | None
    expert: int | None


def noted_loads(built: MetaModel, tensors: Iterable[Described]) -> dict[tuple[str, str], list[Load]]:
    """By module and parameter, what vLLM loads into it of a checkpoint that has these tensors, in this order.

    The model can load nothing afterwards, but be asked here again. Raises what vLLM does with tensors that it does not
    know.
    """
    found: dict[tuple[str, str], list[Load]] = {}
    handed_out: dict[int, tuple[str, torch.Tensor]] = {}

    def note(key: tuple[str, str], loaded: torch.Tensor, shard: Any, expert: int | None) -> None:
        tensor = loaded if loaded._base is None else loaded._base  # experts come as views of what was handed out
        name, known = handed_out.get(id(tensor), (None, None))
        part = Part.of(tensor, loaded)
        known_part = known is tensor and (part is not None or _layout(loaded) == _layout(tensor))
        found.setdefault(key, []).append(Load(name if known_part else None, part, shard, expert))

    def note_linear(key: tuple[str, str], param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        note(key, loaded_weight, args[0] if args else next(iter(kwargs.values()), None), None)

    def note_expert(
        key: tuple[str, str],
        param: Any,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool:
        each = loaded_weight if loaded_weight.dim() == 3 else [loaded_weight]  # of all experts at once, or of one
        for expert, loaded in enumerate(each, expert_id):
            note(key, loaded, shard_id, expert)
        return True

    for path, module in built.model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            # Beside weights a layer of experts may hold the router's bias, which is loaded as any other parameter.
            of_experts = isinstance(module, RoutedExperts) and name.startswith(("w13_", "w2_"))
            notes = note_expert if of_experts else note_linear
            param.weight_loader = functools.partial(notes, (path, name))

    def hand_out() -> Iterator[tuple[str, torch.Tensor]]:
        for name, dtype, shape in tensors:
            tensor = torch.empty(shape, dtype=dtype, device="meta")
            handed_out[id(tensor)] = name, tensor  # which keeps it, so that its id stays its own
            yield name, tensor

    with set_default_torch_dtype(built.config.model_config.dtype), set_current_vllm_config(built.config):
        built.model.load_weights(hand_out())
    return found


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()
