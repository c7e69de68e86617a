"""What is exported: which of a checkpoint's tensors vLLM makes which quantized weight of, and what stays as it is.

vLLM's own loading code says what it would load where (noted_loads.py): that tells what is fused from what for every
architecture, without a table of names. Experts that lie stacked are written one by one, as far as vLLM loads them so
(unstacked.py). A layer whose weights vLLM transposes or cuts out of other tensors otherwise stays as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase

from qwantize_vllm.checkpoint import Checkpoint, Layout
from qwantize_vllm.checkpoint.export import ExportLayer
from qwantize_vllm.checkpoint.members import Member, Part, cover
from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.plugin.inspection import MetaModel
from qwantize_vllm.plugin.moe import WEIGHTS, QwantizeMoEMethod, expert_members, matrices_of
from qwantize_vllm.plugin.noted_loads import Load, noted_loads
from qwantize_vllm.plugin.unstacked import Unstacked, unstacked_name, why_not_unstacked

logger = init_logger(f"vllm.{__name__}")

_ORDER = {"q": 0, "k": 1, "v": 2, "w1": 0, "w3": 1, "w2": 0}  # vLLM's names for the parts of a fused weight
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # what vLLM asks for in experts that lie stacked
_NOT_AS_IT_LIES = "vLLM does not load its weights as they lie in the checkpoint"
_SEVERAL_PARTS = "one of its tensors in the checkpoint is several parts of its fused weight"
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
        unstacked: what of `weights` gets names that the checkpoint does not have.
    """

    weights: list[ExportLayer]
    quantize: dict[str, Callable[[torch.Tensor], list[Nvfp4Tensor]]]
    quantized: list[str]
    left: dict[str, str]
    ignore: list[str]
    unstacked: list[Unstacked]


def plan_export(built: MetaModel, source: Checkpoint, layout: Layout) -> Plan:
    """Raises ValueError where the checkpoint lacks a weight of a layer; names the layer, and what there is of it."""
    loaded = noted_loads(built, [(name, info.dtype, info.shape) for name, info in source.tensors.items()])
    plan = _plan(built, source, loaded, None)
    if plan.unstacked:
        config = layout.config(plan.ignore, built.quantization.settings.block_size)
        reason = why_not_unstacked(built, source, plan.weights, plan.unstacked, layout, config)
        if reason is not None:
            plan = _plan(built, source, loaded, reason)
    _warn_of_left(plan, built)
    return plan


def _plan(
    built: MetaModel, source: Checkpoint, loaded: dict[tuple[str, str], list[Load]], keep_stacked: str | None
) -> Plan:
    """keep_stacked: why stacked experts stay as they are; None where they do not."""
    plan = Plan([], {}, [], {}, [], [])
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
        if (reason := _why_left(weights, source, taken, keep_stacked)) is not None:
            plan.left[name] = reason
            continue
        for weight in weights:
            taken.update(weight.tensors)
            plan.weights.append(ExportLayer(weight.name, weight.members))
            plan.quantize[weight.name] = weight.quantize
            plan.unstacked.extend(weight.unstacked)
        plan.quantized.append(name)
    plan.ignore.extend(_ignore(plan, built, source))
    return plan


def _warn_of_left(plan: Plan, built: MetaModel) -> None:
    """Say which layers are left that online serving quantizes."""
    for layer in (built.layers | built.experts).values():
        if built.reason(layer) is None and (reason := plan.left.get(layer.quant_method.name)) is not None:
            logger.warning("qwantize: %s is left unquantized: %s", layer.quant_method.name, reason)


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One (N, K) of a serving layer, and what vLLM loads into it, in the order of its rows.

    Attributes:
        layer: that it is a weight of. path: of that module. kind: name of the parameter, without _weight of experts.
    """

    name: str
    layer: Any
    path: str
    kind: str
    shape: tuple[int, int]
    loads: list[Load]
    quantize: Callable[[torch.Tensor], list[Nvfp4Tensor]]

    @property
    def tensors(self) -> list[str]:
        return [load.tensor for load in self.loads if load.tensor is not None]

    @functools.cached_property
    def members(self) -> tuple[Member, ...]:
        """Of the loads whose tensors are known; of a linear layer's, those that are whole."""
        return tuple(member for load in self.loads if (member := self._member(load)) is not None)

    @property
    def unstacked(self) -> list[Unstacked]:
        return [
            Unstacked(self._name(load), self.path, self.kind, load.shard, load.expert)
            for load in self.loads
            if load.part is not None
        ]

    def check_complete(self, source: Checkpoint) -> None:
        rows = sum(member.shape(source)[0] for member in self.members)
        if len(self.members) == len(self.loads) and rows < self.shape[0]:
            raise ValueError(
                f"the checkpoint lacks weights of {self.name}: of its {self.shape[0]} rows it has those of "
                f"{', '.join(self.tensors) or 'none'}; is it that of another model?"
            )

    def fits(self, source: Checkpoint) -> bool:
        """Whether its members are all of its rows."""
        if len(self.members) != len(self.loads):
            return False
        shapes = [member.shape(source) for member in self.members]
        return (
            all(shape[1:] == self.shape[1:] for shape in shapes) and sum(rows for rows, *_ in shapes) == self.shape[0]
        )

    def _member(self, load: Load) -> Member | None:
        if load.tensor is None:
            return None
        if load.part is None:
            return Member.whole(load.tensor)
        return None if load.expert is None else Member(self._name(load), load.tensor, load.part)

    def _name(self, load: Load) -> str:
        return unstacked_name(self.layer, self.layer.quant_method.name, load)


def _why_left(weights: Sequence[_Weight], source: Checkpoint, taken: set[str], keep_stacked: str | None) -> str | None:
    """Why the weights of a layer cannot be exported; None where they can."""
    if not all(weight.fits(source) for weight in weights):
        return _NOT_AS_IT_LIES
    if any(isinstance(load.shard, tuple) for weight in weights for load in weight.loads):
        return _SEVERAL_PARTS
    parts: dict[str, list[Part]] = {}
    whole: list[str] = []
    for member in (member for weight in weights for member in weight.members):
        if member.part is None:
            whole.append(member.tensor)
        else:
            parts.setdefault(member.tensor, []).append(member.part)
    if not all(cover(each, source.tensors[name].shape) for name, each in parts.items()):
        return _NOT_AS_IT_LIES
    if not all(name.endswith(".weight") for name in whole) or not taken.isdisjoint([*whole, *parts]):
        return _CALLED_OTHERWISE
    return keep_stacked if parts else None


def _weights(path: str, layer: Any, loaded: dict[tuple[str, str], list[Load]]) -> list[_Weight]:
    """All weights of a layer that is quantized."""
    method = layer.quant_method
    if not isinstance(layer, RoutedExperts):
        loads, shape = _in_order(loaded.get((path, "weight"), [])), tuple(layer.weight.shape)
        return [_Weight(method.name, layer, path, "weight", shape, loads, functools.partial(_linear, layer))]
    weights = []
    for name in WEIGHTS:
        by_expert: dict[int | None, list[Load]] = {}
        for load in loaded.get((path, f"{name}_weight"), []):
            by_expert.setdefault(load.expert, []).append(load)
        shape = tuple(getattr(layer, f"{name}_weight").shape[1:])
        weights += [
            _Weight(
                f"{method.name}.{expert}.{name}",  # as in files of Hessians
                layer,
                path,
                name,
                shape,
                _in_order(by_expert.get(expert, [])),
                functools.partial(_expert, method, name, expert),
            )
            for expert in range(layer.global_num_experts)
        ]
    return weights


def _in_order(loads: list[Load]) -> list[Load]:
    return sorted(loads, key=lambda load: _place(load.shard))


def _place(shard: Any) -> int:
    first = shard[0] if isinstance(shard, tuple) else shard
    return _ORDER[first] if isinstance(first, str) else first or 0


def _linear(layer: LinearBase, weight: torch.Tensor) -> list[Nvfp4Tensor]:
    return [q for _, q in layer.quant_method.quantized_parts(layer, weight)]


def _expert(method: QwantizeMoEMethod, name: str, expert: int, weight: torch.Tensor) -> list[Nvfp4Tensor]:
    alone = weight[None]
    return [q for _, q in matrices_of(alone, method.quantize(name, alone, [expert]))]


def _ignore(plan: Plan, built: MetaModel, source: Checkpoint) -> list[str]:
    """Modules with a matrix for a weight that are not quantized, by the checkpoint's names; a tied head too.

    Experts may be in the checkpoint otherwise than one by one; what reads the config asks for them one by one. A draft
    model's, which the model does not have, are known by the names of their tensors alone.
    """
    quantized = {member.tensor for weight in plan.weights for member in weight.members}
    copied = {name: info.shape for name, info in source.tensors.items() if name not in quantized}
    left = [
        name.removesuffix(".weight") for name, shape in copied.items() if name.endswith(".weight") and len(shape) == 2
    ]
    for name, shape in copied.items():
        at, experts, _ = name.rpartition(".experts.")
        if experts and len(shape) == 3:
            left += [f"{at}.experts.{expert}.{projection}" for expert in range(shape[0]) for projection in _PROJECTIONS]
    for path, layer in built.experts.items():
        if built.name(path) in plan.left:
            left += expert_members(layer, built.name(path))
    return list(dict.fromkeys(["lm_head", *left]))
