"""What is exported: which of a checkpoint's tensors vLLM makes which quantized weight of, and what stays as it is.

vLLM's own loading code is given the checkpoint's tensors, on the meta device, and what it would load where is written
down: that tells what is fused from what for every architecture, without a table of names. A layer whose weights vLLM
does not load as they lie in the checkpoint, but transposes or cuts out of other tensors, stays as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.utils.torch_utils import set_default_torch_dtype

from qwantize_vllm.checkpoint import Checkpoint
from qwantize_vllm.checkpoint.export import ExportLayer
from qwantize_vllm.checkpoint.members import Member
from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.plugin.inspection import MetaModel
from qwantize_vllm.plugin.moe import WEIGHTS, QwantizeMoEMethod, expert_members, matrices_of

logger = init_logger(f"vllm.{__name__}")

_ORDER = {"q": 0, "k": 1, "v": 2, "w1": 0, "w3": 1, "w2": 0}  # vLLM's names for the parts of a fused weight
_NOT_AS_IT_LIES = "vLLM does not load its weights as they lie in the checkpoint"
_CALLED_OTHERWISE = "its tensors are called otherwise than .weight, or are another layer's too"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is quantized and what is not.

    Attributes:
        weights: what is quantized at once: a linear layer, or of one expert gate and up, or down.
        quantize: by the name of each, (N, K) on any device -> the parts that share a global scale.
        quantized: names of the layers that they belong to, as vLLM has them.
        left: names of other layers, with the reason.
        ignore: names of modules that are left as they are, for the config.
    """

    weights: list[ExportLayer]
    quantize: dict[str, Callable[[torch.Tensor], list[Nvfp4Tensor]]]
    quantized: list[str]
    left: dict[str, str]
    ignore: list[str]


def plan_export(built: MetaModel, source: Checkpoint) -> Plan:
    """Raises ValueError where the checkpoint lacks a weight of a layer; names the layer, and what there is of it."""
    loaded = _loads(built, source)
    plan = Plan([], {}, [], {}, [])
    taken: set[str] = set()
    for path, layer in (built.layers | built.experts).items():
        if (reason := built.reason(layer)) is not None:
            plan.left[built.name(path)] = reason
            continue
        name = layer.quant_method.name
        weights = _weights(path, layer, loaded)
        for weight in weights:
            weight.check_complete(source)
        # The experts of a layer share a kernel: one that cannot be exported keeps all of them.
        if (reason := next(filter(None, (weight.why_left(source, taken) for weight in weights)), None)) is not None:
            logger.warning("qwantize: %s is left unquantized: %s", name, reason)
            plan.left[name] = reason
            continue
        for weight in weights:
            taken.update(weight.names)
            plan.weights.append(ExportLayer(weight.name, tuple(map(Member.whole, weight.names))))
            plan.quantize[weight.name] = weight.quantize
        plan.quantized.append(name)
    plan.ignore.extend(_ignore(plan, built, source))
    return plan


@dataclasses.dataclass(frozen=True)
class _Load:
    """A call of a weight loader: which tensor of the checkpoint goes to which part of a parameter, if it is whole."""

    tensor: str | None
    part: int | str | None
    expert: int | None


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One (N, K) of a serving layer, and what vLLM loads into it, in the order of its rows."""

    name: str
    shape: tuple[int, int]
    loads: list[_Load]
    quantize: Callable[[torch.Tensor], list[Nvfp4Tensor]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(load.tensor for load in self.loads if load.tensor is not None)

    def check_complete(self, source: Checkpoint) -> None:
        rows = sum(source.tensors[name].shape[0] for name in self.names)
        if len(self.names) == len(self.loads) and rows < self.shape[0]:
            raise ValueError(
                f"the checkpoint lacks weights of {self.name}: of its {self.shape[0]} rows it has those of "
                f"{', '.join(self.names) or 'none'}; is it that of another model?"
            )

    def why_left(self, source: Checkpoint, taken: set[str]) -> str | None:
        """Why it cannot be exported; None where it can."""
        shapes = [source.tensors[name].shape for name in self.names]
        as_it_lies = len(self.names) == len(self.loads) and all(shape[1:] == self.shape[1:] for shape in shapes)
        if not as_it_lies or sum(shape[0] for shape in shapes) != self.shape[0]:
            return _NOT_AS_IT_LIES
        if not all(name.endswith(".weight") for name in self.names) or not taken.isdisjoint(self.names):
            return _CALLED_OTHERWISE
        return None


def _weights(path: str, layer: Any, loaded: dict[tuple[str, str], list[_Load]]) -> list[_Weight]:
    """All weights of a layer that is quantized."""
    method = layer.quant_method
    if not isinstance(layer, RoutedExperts):
        loads = _in_order(loaded.get((path, "weight"), []))
        return [_Weight(method.name, tuple(layer.weight.shape), loads, functools.partial(_linear, layer))]
    weights = []
    for name in WEIGHTS:
        by_expert: dict[int | None, list[_Load]] = {}
        for load in loaded.get((path, f"{name}_weight"), []):
            by_expert.setdefault(load.expert, []).append(load)
        shape = tuple(getattr(layer, f"{name}_weight").shape[1:])
        weights += [
            _Weight(
                f"{method.name}.{expert}.{name}",  # as in files of Hessians
                shape,
                _in_order(by_expert.get(expert, [])),
                functools.partial(_expert, method, name, expert),
            )
            for expert in range(layer.global_num_experts)
        ]
    return weights


def _in_order(loads: list[_Load]) -> list[_Load]:
    return sorted(loads, key=lambda load: _ORDER[load.part] if isinstance(load.part, str) else load.part or 0)


def _linear(layer: LinearBase, weight: torch.Tensor) -> list[Nvfp4Tensor]:
    return [q for _, q in layer.quant_method.quantized_parts(layer, weight)]


def _expert(method: QwantizeMoEMethod, name: str, expert: int, weight: torch.Tensor) -> list[Nvfp4Tensor]:
    alone = weight[None]
    return [q for _, q in matrices_of(alone, method.quantize(name, alone, [expert]))]


def _loads(built: MetaModel, source: Checkpoint) -> dict[tuple[str, str], list[_Load]]:
    """By module and parameter, what vLLM loads into it."""
    found: dict[tuple[str, str], list[_Load]] = {}
    handed_out: dict[int, tuple[str, torch.Tensor]] = {}

    def note(key: tuple[str, str], loaded: torch.Tensor, part: Any, expert: int | None) -> None:
        tensor = loaded if loaded._base is None else loaded._base  # experts come as views of what was handed out
        name, known = handed_out.get(id(tensor), (None, None))
        whole = known is tensor and _layout(loaded) == _layout(tensor)
        found.setdefault(key, []).append(_Load(name if whole else None, part, expert))

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
        note(key, loaded_weight, shard_id, expert_id)
        return True

    for path, module in built.model.named_modules():
        notes = note_expert if isinstance(module, RoutedExperts) else note_linear
        for name, param in module.named_parameters(recurse=False):
            param.weight_loader = functools.partial(notes, (path, name))

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, info in source.tensors.items():
            tensor = torch.empty(info.shape, dtype=info.dtype, device="meta")
            handed_out[id(tensor)] = name, tensor  # which keeps it, so that its id stays its own
            yield name, tensor

    with set_default_torch_dtype(built.config.model_config.dtype), set_current_vllm_config(built.config):
        built.model.load_weights(tensors())
    return found


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _ignore(plan: Plan, built: MetaModel, source: Checkpoint) -> list[str]:
    """Modules with a matrix for a weight that are not quantized, by the checkpoint's names; a tied head too.

    Experts may be in the checkpoint otherwise than one by one; what reads the config asks for them one by one.
    """
    quantized = {member.tensor for weight in plan.weights for member in weight.members}
    left = [
        name.removesuffix(".weight")
        for name, info in source.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and name not in quantized
    ]
    for path, layer in built.experts.items():
        if built.name(path) in plan.left:
            left += expert_members(layer, built.name(path))
    return list(dict.fromkeys(["lm_head", *left]))
