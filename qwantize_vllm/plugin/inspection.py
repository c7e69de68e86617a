"""What quantizing does to every layer of a checkpoint, by the code that would serve it, without an engine.

The model is built on the meta device once for each of the settings, where the plugin decides layer by layer as it does
in an engine: what is fused, ignored, left, searched with which Hessian. One more model is loaded by vLLM's own loader.
There every linear layer materializes when the last of its weights has arrived, is quantized under all settings,
measured, and forgotten; everything else stays on the meta device. So memory is bounded by one layer, fused as vLLM
fuses it and in the dtype that would be served, its quantized forms, and what of other layers a file has in between.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_processing
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from qwantize_vllm.hessian import HessianFile
from qwantize_vllm.plugin.engine_process import in_own_process
from qwantize_vllm.plugin.fingerprint import config_fingerprint
from qwantize_vllm.plugin.linear import QwantizeLinearMethod
from qwantize_vllm.plugin.moe import WEIGHTS, QwantizeMoEMethod, expert_members, local_experts, matrices_of
from qwantize_vllm.search.quality import output_signal_and_noise, signal_and_noise


@dataclasses.dataclass(frozen=True)
class Measured:
    """One layer under one setting. Energies are sums over all of its rows and columns.

    Attributes:
        signal, noise: sum of w^2 and of (w - q)^2.
        output_signal, output_noise: sum of w'Hw and of r'Hr over the blocks of every row, r = w - q; None without H.
        nbytes: of codes, block scales and global scales.
        search: that chose the scales; `optimal` where the file of a `hessian` setting lacks the layer.
    """

    signal: float
    noise: float
    output_signal: float | None
    output_noise: float | None
    nbytes: int
    search: str

    @property
    def weight_error(self) -> float:
        """|w - q| / |w|, the norms over the whole weight."""
        return math.sqrt(self.noise / self.signal) if self.signal else 0.0

    @property
    def snr_db(self) -> float:
        """10 log10(signal / noise); infinite where nothing is lost."""
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf

    @property
    def output_error(self) -> float | None:
        """sqrt(sum of r'Hr / sum of w'Hw)."""
        if self.output_signal is None or self.output_noise is None:
            return None
        # An H that is singular up to rounding may give a little less than 0.
        return math.sqrt(max(0.0, self.output_noise) / self.output_signal) if self.output_signal > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class InspectedLayer:
    """One linear layer as vLLM serves it.

    Attributes:
        name: by which settings and Hessian files know it.
        members: the checkpoint's layers that it is fused from; itself where it is not fused.
        shape: (N, K) of its weight.
        nbytes: of its dense weight.
        results: by setting: what was measured, or why the setting leaves the layer as it is.
    """

    name: str
    members: list[str]
    shape: tuple[int, int]
    nbytes: int
    results: dict[str, Measured | str]


@dataclasses.dataclass(frozen=True)
class LeftModule:
    """What no setting quantizes: embeddings, heads, norms, biases, gates, layers whose K no block divides."""

    name: str
    reason: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Everything that was found out about a checkpoint.

    Attributes:
        dtype: in which vLLM would serve it.
        settings: by name, as resolved from all sources.
        unused: by setting, the patterns of `ignore` that name no layer.
        layers: in the model's order.
        left: what has weights and is in no layer of `layers`.
        hessian: what the file says of itself that output errors are measured with; None without one.
    """

    model: str
    dtype: str
    settings: dict[str, dict[str, Any]]
    unused: dict[str, list[str]]
    layers: list[InspectedLayer]
    left: list[LeftModule]
    hessian: dict[str, Any] | None


def inspect_model(
    model: str, settings: Mapping[str, dict[str, Any]], hessian: Path | None = None, dtype: str = "auto"
) -> Inspection:
    """Quantize every layer of a checkpoint under each of the settings and measure what that loses.

    Args:
        model: name or directory, as `vllm serve` takes it; its weights must be safetensors.
        settings: of the plugin, by name.
        hessian: block Hessians to measure output errors with; a setting names its own, to search with.
        dtype: as `vllm serve --dtype`.

    Raises:
        ValueError: there is no such model or no weight of a layer; the Hessian file does not fit; a weight holds NaN.
    """
    return in_own_process(_inspect, model, settings, hessian, dtype)


def _inspect(model: str, settings: Mapping[str, dict[str, Any]], hessian: Path | None, dtype: str) -> Inspection:
    with one_rank():
        built = {name: MetaModel(model, values, dtype) for name, values in settings.items()}
        base = MetaModel(model, _widest(settings.values()), dtype)
        file = None if hessian is None else HessianFile(hessian)
        if file is not None:
            file.check_model(config_fingerprint(base.config.model_config.hf_config))
        layers = _measure(base, built, file)
    return Inspection(
        model=model,
        dtype=str(base.config.model_config.dtype).removeprefix("torch."),
        settings={name: each.settings for name, each in built.items()},
        unused={name: each.unused for name, each in built.items()},
        layers=layers,
        left=base.left(),
        hessian=None if file is None else {"path": str(hessian), **file.info.model_dump()},
    )


def _widest(settings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings that quantize every layer that one of these does."""
    given = list(settings)
    towers = "quantize" if any(each.get("towers") == "quantize" for each in given) else "leave"
    gates = any(each.get("quantize_gates", False) for each in given)
    return {"scale_search": "optimal", "towers": towers, "quantize_gates": gates}


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """vLLM's layers ask for their rank when they are built: this process is the only one."""
    with tempfile.NamedTemporaryFile() as rendezvous, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{rendezvous.name}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        yield


class MetaModel:
    """A model on the meta device, with what the plugin decided about its layers."""

    def __init__(
        self, model: str, settings: dict[str, Any], dtype: str, quantization_config: dict[str, Any] | None = None
    ) -> None:
        """quantization_config: in the place of the checkpoint's; None for that one."""
        self._given = model, dtype
        overrides = {} if quantization_config is None else {"quantization_config": quantization_config}
        arguments = EngineArgs(
            model=model,
            dtype=dtype,
            quantization="qwantize",
            additional_config={"qwantize": settings},
            hf_overrides=overrides,
            load_format="safetensors",
            enforce_eager=True,
        )
        self.config = arguments.create_engine_config()
        self.config.load_config.use_tqdm_on_load = False
        with set_default_torch_dtype(self.config.model_config.dtype), torch.device("meta"):
            self.model = initialize_model(self.config)
        self.quantization: Any = self.config.quant_config
        self.settings = self.quantization.settings.model_dump(mode="json")
        self.unused = self.quantization.report.unused_patterns()
        self.layers = {path: layer for path, layer in self.model.named_modules() if isinstance(layer, LinearBase)}
        self.experts = {path: layer for path, layer in self.model.named_modules() if isinstance(layer, RoutedExperts)}

    def exported(self, quantization_config: dict[str, Any]) -> MetaModel:
        """The same model, as it is built for an export with this quantization_config."""
        model, dtype = self._given
        return MetaModel(model, {}, dtype, copy.deepcopy(quantization_config))

    def name(self, path: str) -> str:
        """By which settings and Hessian files know a layer."""
        if (layer := self.experts.get(path)) is not None:
            return str(layer.layer_name)
        return str(getattr(self.layers[path], "prefix", "") or path)

    def reason(self, layer: torch.nn.Module) -> str | None:
        """Why a layer is left as it is; None where it is quantized."""
        if isinstance(getattr(layer, "quant_method", None), (QwantizeLinearMethod, QwantizeMoEMethod)):
            return None
        reason: str | None = self.quantization.report.reason(layer)
        return reason or ("embedding or head" if isinstance(layer, VocabParallelEmbedding) else "norm or other")

    def left(self) -> list[LeftModule]:
        """Modules that hold weights which are not quantized, once the others have been measured."""
        found: list[LeftModule] = []
        seen: set[int] = set()
        for path, module in self.model.named_modules():
            own = [each for each in module.parameters(recurse=False) if id(each) not in seen]  # a tied head is there
            seen.update(map(id, own))
            if own:
                measured = isinstance(getattr(module, "quant_method", None), _Measure)
                reason = "bias" if measured else str(self.reason(module))
                found.append(LeftModule(path, reason, sum(each.nbytes for each in own)))
        return found


def _measure(base: MetaModel, built: dict[str, MetaModel], file: HessianFile | None) -> list[InspectedLayer]:
    """Load the checkpoint into base, each layer measured and forgotten as soon as it is complete."""
    measured: dict[str, list[InspectedLayer]] = {}
    incomplete: list[str] = []
    methods = {path: layer for path, layer in (base.layers | base.experts).items() if base.reason(layer) is None}
    with tqdm(total=len(methods), unit="layer", desc="inspecting", disable=None) as bar:
        for path, layer in methods.items():
            same = {name: (each, (each.layers | each.experts)[path]) for name, each in built.items()}
            kind = _MeasureExperts if isinstance(layer, RoutedExperts) else _Measure
            layer.quant_method = kind(path, layer.quant_method, same, file, measured, incomplete, bar)
            get_layerwise_info(layer).restore_device = torch.device(base.config.device_config.device)
        with set_default_torch_dtype(base.config.model_config.dtype), set_current_vllm_config(base.config):
            get_model_loader(base.config.load_config).load_weights(base.model, base.config.model_config)
            finalize_layerwise_processing(base.model, base.config.model_config)
    if incomplete:
        raise ValueError(
            f"the checkpoint lacks weights of {len(incomplete)} layers: {', '.join(incomplete[:5])}; "
            "is it that of another model?"
        )
    return [layer for path in methods for layer in measured[path]]


class _Measure(QuantizeMethodBase):
    """Stands in for a layer's method: where that would quantize and keep, this one measures and drops."""

    def __init__(
        self,
        path: str,
        method: Any,
        same: dict[str, tuple[MetaModel, Any]],
        file: HessianFile | None,
        measured: dict[str, list[InspectedLayer]],
        incomplete: list[str],
        bar: Any,
    ) -> None:
        self.path, self.method, self.same, self.file = path, method, same, file
        self.measured, self.incomplete, self.bar = measured, incomplete, bar

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weights = dict(layer.named_parameters())
        if get_layerwise_info(layer).load_numel < sum(each.numel() for name, each in weights.items() if name != "bias"):
            self.incomplete.append(self.method.name)
        else:
            self.measured[self.path] = self.measure(layer)
            self.bar.update()
        for name in weights.keys() - {"bias"}:
            delattr(layer, name)

    def measure(self, layer: Any) -> list[InspectedLayer]:
        weight = layer.weight.data
        hessian = self._hessian(weight)
        results = {
            name: each.reason(other) or _result(other, weight, hessian) for name, (each, other) in self.same.items()
        }
        shape = (weight.shape[0], weight.shape[1])
        return [InspectedLayer(self.method.name, self.method.members, shape, weight.nbytes, results)]

    def _hessian(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The layer's block Hessians to measure with; None without a file, or where the file lacks the layer."""
        names = list(dict.fromkeys([self.method.name, *self.method.members]))
        if self.file is None or not self.file.has(names):
            return None
        return self.file.read_all(self.file.find(names, weight.shape[1] // self.file.info.block_size)).to(weight.device)

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the layer has been built")

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("the model is not run")


class _MeasureExperts(_Measure):
    """The experts of a layer: w13 of all of them, then w2, each as one weight with the rows of all."""

    def measure(self, layer: RoutedExperts) -> list[InspectedLayer]:
        measured = []
        for weight_name in WEIGHTS:
            weight = getattr(layer, f"{weight_name}_weight").data
            hessians = self._hessians(weight_name, weight)
            results = {
                name: each.reason(other) or _experts_result(other, weight_name, weight, hessians)
                for name, (each, other) in self.same.items()
            }
            down = f".{layer.ckpt_down_proj_name}"
            members = [m for m in expert_members(layer, self.method.name) if m.endswith(down) == (weight_name == "w2")]
            name, shape = f"{self.method.name}.{weight_name}", (weight[..., 0].numel(), weight.shape[2])
            measured.append(InspectedLayer(name, members, shape, weight.nbytes, results))
        return measured

    def _hessians(self, name: str, weight: torch.Tensor) -> torch.Tensor | None:
        """Of every expert; None without a file, or where the file lacks one."""
        names = [f"{self.method.name}.{expert}.{name}" for expert in range(len(weight))]
        if self.file is None or not all(self.file.has([each]) for each in names):
            return None
        blocks = weight.shape[2] // self.file.info.block_size
        self.file.check_blocks(names, blocks)
        return self.file.read_each(names, 0, blocks).to(weight.device)


def _experts_result(layer: RoutedExperts, name: str, weight: torch.Tensor, hessians: torch.Tensor | None) -> Measured:
    method: QwantizeMoEMethod = layer.quant_method
    q = method.quantize(name, weight, local_experts(layer))
    parts = matrices_of(weight, q)
    signal, noise = (float(sum(each)) for each in zip(*(signal_and_noise(*part) for part in parts), strict=True))
    output_signal = output_noise = None
    if hessians is not None:
        each = hessians.repeat_interleave(q.shape[1], 0)
        energies = [output_signal_and_noise(*part, h) for part, h in zip(parts, each, strict=True)]
        output_signal, output_noise = (float(sum(both)) for both in zip(*energies, strict=True))
    return Measured(signal, noise, output_signal, output_noise, q.nbytes, method.search)


def _result(layer: LinearBase, weight: torch.Tensor, hessian: torch.Tensor | None) -> Measured:
    """Quantize as the layer of this setting would be, and measure."""
    method: QwantizeLinearMethod = layer.quant_method
    parts = method.quantized_parts(layer, weight)
    signal, noise = (float(sum(each)) for each in zip(*(signal_and_noise(*part) for part in parts), strict=True))
    output_signal = output_noise = None
    if hessian is not None:
        energies = [output_signal_and_noise(*part, hessian) for part in parts]
        output_signal, output_noise = (float(sum(each)) for each in zip(*energies, strict=True))
    return Measured(signal, noise, output_signal, output_noise, sum(q.nbytes for _, q in parts), method.search)
