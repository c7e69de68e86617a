"""Checkpoints that hold NVFP4 already: their codes and scales go into the forms of weights.py as they are.

Which layers those are is asked of vLLM's own classes for the format, so that targets, ignored modules, fused layers and
renamed ones mean here what they mean there.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter

from qwantize_vllm.checkpoint import LAYOUTS, Checkpoint, Layout
from qwantize_vllm.checkpoint.export import NOTES, verify
from qwantize_vllm.plugin.base_config import METHOD, QwantizeBaseConfig, add_to_compile_key
from qwantize_vllm.plugin.report import LoadReport
from qwantize_vllm.plugin.weights import Form, QuantizedLayer, choose_form
from qwantize_vllm.settings import QwantizeSettings, environment_settings, resolve_settings

logger = init_logger(f"vllm.{__name__}")
_DONE = "_already_called_process_weights_after_loading"  # vLLM's reload clears it
_USED = ("backend", "strict")  # of the settings, those that still say something
_MODELOPT_ALGORITHMS = {"NVFP4": True, "W4A16_NVFP4": False}  # whether activations are quantized too
_UNPACKED_BY_MODELOPT = ("vision_tower", "vision_model", "vit_large_projector")  # whatever its config says


@dataclasses.dataclass(frozen=True)
class Packed:
    """What a quantization_config says that a checkpoint holds.

    Attributes:
        activations: whether it asks for activations of four bits too.
    """

    layout: Layout
    block_size: int
    activations: bool


def packed_of(config: Mapping[str, Any]) -> Packed:
    """Of a checkpoint's quantization_config.

    Raises:
        ValueError: it is quantized otherwise; names the method.
    """
    method = str(config.get("quant_method", "modelopt" if "quantization" in config else "")).lower()
    if method == "qwantize" and config.get("packed"):
        return Packed(LAYOUTS["qwantize"], int(config.get("block_size", 16)), False)
    if method == "compressed-tensors":
        groups = dict(config.get("config_groups") or {})
        kinds = {_kind(group.get("weights")) for group in groups.values()}
        if kinds == {"NVFP4"}:
            activations = any(group.get("input_activations") for group in groups.values())
            return Packed(LAYOUTS["compressed-tensors"], 16, activations)
        raise _refusal(f"compressed-tensors with {' and '.join(sorted(kinds)) or 'no'} weights")
    if method.startswith("modelopt"):
        algorithm = str(config.get("quantization", config).get("quant_algo", "")).upper()
        if algorithm in _MODELOPT_ALGORITHMS:
            return Packed(LAYOUTS["modelopt"], 16, _MODELOPT_ALGORITHMS[algorithm] and not _weight_only(config))
        raise _refusal(f"ModelOpt {algorithm or 'without a quant_algo'}")
    raise _refusal(method or "a method that is not named")


def _kind(weights: Mapping[str, Any] | None) -> str:
    if not weights:
        return "unquantized"
    kind = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"), weights.get("group_size"))
    if kind == (4, "float", "tensor_group", 16) and weights.get("symmetric", True):
        return "NVFP4"
    return "{1}{0} ({2})".format(*kind)


def _weight_only(config: Mapping[str, Any]) -> bool:
    groups = config.get("config_groups")
    return bool(groups) and all(group.get("input_activations") is None for group in dict(groups or {}).values())


def _refusal(method: str) -> ValueError:
    return ValueError(
        "--quantization qwantize takes unquantized checkpoints, and NVFP4 ones of compressed-tensors and ModelOpt; "
        f"this one is quantized already, by {method}. Leave --quantization out to have vLLM serve it, or take the "
        "unquantized checkpoint"
    )


class PackedConfig(QwantizeBaseConfig):
    """What QwantizeConfig makes of a checkpoint that is NVFP4 already. Pickled to the engine's processes."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError where the checkpoint is quantized otherwise: see `packed_of`."""
        super().__init__()
        self.packed = packed_of(config)
        self._theirs = _theirs(self.packed, config)
        self._resolved: QwantizeSettings | None = None
        self._report: LoadReport | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        return cls(config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self._theirs.apply_vllm_mapper(hf_to_vllm_mapper)

    @property
    def settings(self) -> QwantizeSettings:
        """Of `--additional-config` and QWANTIZE_CONFIG, what still matters; first while vLLM builds the model."""
        if self._resolved is None:
            additional = get_current_vllm_config().additional_config
            extra = additional.get(METHOD, {}) if isinstance(additional, dict) else {}
            _, origin = resolve_settings({"--additional-config": extra, "QWANTIZE_CONFIG": environment_settings()})
            values = {**environment_settings(), **extra}
            used = {key: values[key] for key in _USED if key in values}
            self._resolved, _ = resolve_settings({"the settings": {**used, "block_size": self.packed.block_size}})
            logger.info("qwantize: the checkpoint is NVFP4 already (%s); nothing is searched", self.packed.layout.name)
            if unused := [f"{key} (from {source})" for key, source in origin.items() if key not in _USED]:
                logger.warning("qwantize: without effect on such a checkpoint: %s", ", ".join(unused))
            if self.packed.activations:
                logger.warning(
                    "qwantize: the checkpoint asks for activations of four bits too (W4A4); they stay as they are"
                )
            _look_at_files(get_current_vllm_config(), self._resolved.strict)
            add_to_compile_key(additional, self._resolved, packed=self.packed.layout.name)
        return self._resolved

    @property
    def report(self) -> LoadReport:
        if self._report is None:
            self._report = LoadReport(self.settings, self.packed.layout.name)
        return self._report

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Raises ValueError where experts or the head are NVFP4, which this package does not serve."""
        self._theirs.packed_modules_mapping = self.packed_modules_mapping
        if isinstance(layer, Attention):
            return self._theirs.get_quant_method(layer, prefix)  # scales of an FP8 KV cache
        if isinstance(layer, LinearBase):
            if self._is_packed(layer, prefix):
                return PackedLinearMethod(self.settings, prefix, self.report, self.packed)
            self.report.leave(prefix, layer, "not quantized in the checkpoint")
            return UnquantizedLinearMethod()
        if (hasattr(layer, "moe_config") or isinstance(layer, ParallelLMHead)) and self._is_packed(layer, prefix):
            raise ValueError(
                f"qwantize: {prefix} ({type(layer).__name__}) is NVFP4 in this checkpoint, which qwantize serves for "
                "linear layers only; leave --quantization out to have vLLM serve it"
            )
        kind = "embedding or head" if isinstance(layer, VocabParallelEmbedding) else type(layer).__name__
        self.report.leave(prefix, layer, kind)
        return None

    def _is_packed(self, layer: torch.nn.Module, prefix: str) -> bool:
        if isinstance(self._theirs, ModelOptNvFp4Config):
            by_name = any(name in prefix for name in _UNPACKED_BY_MODELOPT)
            return not (by_name or self._theirs.is_layer_excluded(prefix))
        if hasattr(layer, "moe_config"):
            prefix = f"{prefix}.0.gate_proj"  # targets and ignored names are those of experts' projections
            return bool(self._theirs.target_scheme_map) and not any(
                prefix.startswith(name) for name in self._theirs.ignore
            )
        try:
            scheme = self._theirs.get_scheme_dict(layer, prefix)
        except ValueError:  # vLLM's way to say that no target matches
            if isinstance(layer, ParallelLMHead):
                return False
            raise
        return bool(scheme and scheme.get("weights"))


def _look_at_files(config: Any, strict: bool) -> None:
    """Of a directory, the headers before anything is built from them; with strict the bytes of an export of ours too.

    Raises:
        ValueError: a file is damaged or missing; names it, and where it is known the tensor.
    """
    directory = Path(config.model_config.model)
    if not directory.is_dir() or config.load_config.load_format not in ("auto", "safetensors", "hf"):
        return
    Checkpoint(directory)
    if strict and (directory / NOTES).is_file():
        logger.info("qwantize: %d tensors are what was exported (strict: true)", verify(directory))


def _theirs(packed: Packed, config: Mapping[str, Any]) -> Any:
    """vLLM's own object for the format, asked what is quantized; of its kernels it is asked for none."""
    config = copy.deepcopy(dict(config))
    if packed.layout.name == "qwantize":
        config = LAYOUTS["compressed-tensors"].config(config.get("ignore", []), 16)
    if packed.layout.name != "modelopt":
        return CompressedTensorsConfig.from_config(config)
    inner = config.get("quantization", config)
    inner["quant_algo"] = "NVFP4"  # any that this vLLM knows
    inner.setdefault("kv_cache_quant_algo", None)
    inner.setdefault("exclude_modules", [])
    inner.setdefault("group_size", 16)
    return ModelOptNvFp4Config.from_config(config)


@register_weight_loader_v2_supported_method
class PackedLinearMethod(LinearMethodBase):
    """Creates the tensors that the checkpoint has, and puts what was loaded into one of the forms of weights.py.

    As in QwantizeLinearMethod they are on the meta device until all have arrived, and a reload comes the same way.
    """

    uses_meta_device = True

    def __init__(self, settings: QwantizeSettings, name: str, report: LoadReport, packed: Packed) -> None:
        self.settings, self.name, self.report, self.packed = settings, name, report, packed
        self._form: Form | None = None
        # How often each tensor was loaded: whole, and for a member of a fused layer.
        self._arrived: Counter[tuple[str, Any]] = Counter()

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Raises ValueError where K is no multiple of the block size."""
        rows, k, block_size = sum(output_partition_sizes), input_size_per_partition, self.packed.block_size
        if k % block_size:
            raise ValueError(
                f"qwantize: {self.name}: K={k} (of this rank) is not a multiple of block_size {block_size}"
            )
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition, layer.output_size_per_partition = k, rows
        self._params_dtype = params_dtype
        layout, loader = self.packed.layout, extra_weight_attrs["weight_loader"]
        matrices = {
            layout.codes: (ModelWeightParameter, k // 2, torch.uint8),
            layout.block_scales: (GroupQuantScaleParameter, k // block_size, torch.float8_e4m3fn),
        }
        for name, (kind, columns, dtype) in matrices.items():
            data = torch.empty(rows, columns, dtype=dtype, device="meta")
            param = kind(data=data, input_dim=1, output_dim=0, weight_loader=self._noting(name, loader))
            layer.register_parameter(name, param)
        scalars = [layout.global_scale, *self._input_scales()]
        for name in scalars:
            data = torch.empty(len(output_partition_sizes), dtype=torch.float32, device="meta")
            layer.register_parameter(name, PerTensorScaleParameter(data=data, weight_loader=self._noting(name, loader)))
        self.report.expect(self.name)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Raises ValueError where a tensor is missing or no scale of NVFP4; names the layer and the tensor."""
        if getattr(layer, _DONE, False):
            return
        began = time.perf_counter()
        layout = self.packed.layout
        self._check_arrived(len(layer.logical_widths))
        codes, block_scales, scales = (getattr(layer, name).data for name in layout.names)
        if self._arrived[layout.global_scale, None] and len(layer.logical_widths) > 1:
            scales = scales[:1]  # fused in the checkpoint too: vLLM loads its only scale as the first
        self._arrived.clear()
        factors = layout.factor(scales)
        self._check_scales(block_scales, factors)
        for name in {*layout.names, *self._input_scales()} - {"weight", "weight_scale", "weight_global_scale"}:
            delattr(layer, name)
        quantized = QuantizedLayer(
            codes, block_scales, *_members(factors, layer.logical_widths), self.packed.block_size, self._params_dtype
        )
        if self.settings.backend in ("vllm", "marlin", "humming") and len(quantized.widths) > 1:
            raise ValueError(
                f"qwantize: {self.name}: backend {self.settings.backend!r} takes one global scale a layer, the members "
                "of this one have different ones in the checkpoint; choose backend: auto"
            )
        self._form = choose_form(self.settings, quantized)
        after = self._form.keep(layer, quantized)
        setattr(layer, _DONE, True)
        self.report.quantized(self.name, 0, after, 0.0, 0.0, began)

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self._form is None:
            raise RuntimeError(f"qwantize: {self.name} is called before its weights were loaded")
        return self._form.apply(layer, x, bias)

    def _input_scales(self) -> list[str]:
        """What a checkpoint has for activations of four bits: read, because it is there, and forgotten."""
        if not self.packed.activations:
            return []
        return ["input_scale"] if self.packed.layout.name == "modelopt" else ["input_global_scale"]

    def _noting(self, name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loader)
        def load(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            member = args[0] if args else next(iter(kwargs.values()), None)
            self._check_loaded(name, param, loaded_weight)
            result = loader(param, loaded_weight, *args, **kwargs)
            if param.device.type != "meta":  # where vLLM only counts what would be loaded
                self._arrived[name, member] += 1
            return result

        return load

    def _check_loaded(self, name: str, param: Any, loaded: torch.Tensor) -> None:
        if loaded.dtype != param.dtype and param.dtype != torch.float32:
            raise ValueError(
                f"qwantize: {self.name}: tensor {name} is {loaded.dtype} in the checkpoint, "
                f"{self.packed.layout.name} has {param.dtype} there"
            )

    def _check_arrived(self, members: int) -> None:
        for name in self.packed.layout.names:
            parts = {member for (each, member), count in self._arrived.items() if each == name and count}
            if None not in parts and len(parts) < members:
                raise ValueError(
                    f"qwantize: {self.name}: the checkpoint lacks {name} of {members - len(parts)} of {members} members"
                )

    def _check_scales(self, block_scales: torch.Tensor, factors: torch.Tensor) -> None:
        bytes_ = block_scales.view(torch.uint8)
        wrong = int((bytes_ > 126).sum())  # NaN, or negative
        if wrong:
            raise ValueError(
                f"qwantize: {self.name}: {self.packed.layout.block_scales} holds {wrong} block scales that are NaN or "
                "negative; the checkpoint is damaged, or is not NVFP4"
            )
        if not bool((factors.isfinite() & (factors > 0)).all()):
            raise ValueError(
                f"qwantize: {self.name}: {self.packed.layout.global_scale} gives the global scales {factors.tolist()}, "
                "which must be positive and finite; the checkpoint is damaged, or is not NVFP4"
            )


def _members(factors: torch.Tensor, widths: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Global scales, and the rows that share each: one for all where they are the same."""
    if len(factors) == 1 or bool((factors == factors[0]).all()):
        return factors[:1], [sum(widths)]
    return factors, list(widths)
