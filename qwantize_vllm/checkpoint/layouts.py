"""How quantized checkpoints name and store the three tensors of a weight, and what their config.json says.

All of them keep codes and block scales as Nvfp4Tensor does: two codes a byte, the even k in the low nibble, uint8
(N, K/2), and float8_e4m3fn (N, K/16). They differ in names, in the shape of the global scale, and in whether that is
the factor itself or its reciprocal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from qwantize_vllm.format import Nvfp4Tensor, reciprocal


def _no_files(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {}


@dataclasses.dataclass(frozen=True)
class Layout:
    """One of LAYOUTS.

    Attributes:
        codes, block_scales, global_scale: what follows the layer's name.
        divides: the global scale on disk is what to divide by.
        scalar: its shape on disk.
        any_blocks: blocks of 32 too, and members of fused layers with global scales of their own.
        config: the quantization_config, of the names of modules that are left as they are, and the block size.
        extra_files: more files for the same, by name.
    """

    name: str
    codes: str
    block_scales: str
    global_scale: str
    divides: bool
    scalar: tuple[int, ...]
    any_blocks: bool
    config: Callable[[Sequence[str], int], dict[str, Any]]
    extra_files: Callable[[dict[str, Any]], dict[str, dict[str, Any]]] = _no_files

    @property
    def names(self) -> tuple[str, str, str]:
        return self.codes, self.block_scales, self.global_scale

    def write(self, layer: str, q: Nvfp4Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a layer's (N, K) weight, by name, on the CPU.

        Raises:
            ValueError: the layout cannot say what its global scale is.
        """
        q = q if self.any_blocks else in_blocks_of_16(q)
        scale = q.global_scale
        if self.divides:
            scale = reciprocal(scale)
            if not torch.equal(reciprocal(scale), q.global_scale):
                raise ValueError(
                    f"{layer}: {self.name} stores 1/global_scale, and no float32 is that of {float(q.global_scale)!r}"
                )
        tensors = zip(self.names, (q.codes, q.block_scales, scale.reshape(self.scalar).clone()), strict=True)
        return {f"{layer}.{name}": tensor.cpu().contiguous() for name, tensor in tensors}

    def described(self, layer: str, n: int, k: int, block_size: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtypes and shapes of what `write` gives, by name."""
        blocks = k // (block_size if self.any_blocks else 16)
        return {
            f"{layer}.{self.codes}": (torch.uint8, (n, k // 2)),
            f"{layer}.{self.block_scales}": (torch.float8_e4m3fn, (n, blocks)),
            f"{layer}.{self.global_scale}": (torch.float32, self.scalar),
        }

    def factor(self, global_scale: torch.Tensor) -> torch.Tensor:
        """What to multiply by, float32, of global scales as they are on disk."""
        return reciprocal(global_scale) if self.divides else global_scale

    def read(self, layer: str, tensors: Mapping[str, torch.Tensor], block_size: int = 16) -> Nvfp4Tensor:
        """Undo `write`.

        Raises:
            KeyError: a tensor is missing. ValueError: dtypes or shapes do not fit together.
        """
        codes, block_scales, scale = (tensors[f"{layer}.{name}"] for name in self.names)
        return Nvfp4Tensor(codes, block_scales, self.factor(scale.reshape(())), block_size)


def in_blocks_of_16(q: Nvfp4Tensor) -> Nvfp4Tensor:
    """The same weight with a scale for every 16: of larger blocks each scale as often as it takes."""
    if q.block_size == 16:
        return q
    scales = q.block_scales.view(torch.uint8).repeat_interleave(q.block_size // 16, dim=-1)
    return Nvfp4Tensor(q.codes, scales.view(torch.float8_e4m3fn), q.global_scale, 16)


def split_rows(parts: Sequence[Nvfp4Tensor], rows: Sequence[int]) -> list[Nvfp4Tensor]:
    """The members of a fused layer: of one part for all of them, or already a part for each."""
    if len(parts) == len(rows):
        return list(parts)
    (whole,) = parts
    codes, scales = whole.codes.split(list(rows)), whole.block_scales.split(list(rows))
    return [Nvfp4Tensor(*each, whole.global_scale, whole.block_size) for each in zip(codes, scales, strict=True)]


def _compressed_tensors(ignore: Sequence[str], block_size: int) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "nvfp4-pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


def _modelopt(ignore: Sequence[str], block_size: int) -> dict[str, Any]:
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    return {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_NVFP4",
        "group_size": 16,
        "config_groups": {"group_0": {"weights": weights, "input_activations": None, "targets": ["Linear"]}},
        "ignore": list(ignore),
    }


def _modelopt_files(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    quantization = {
        "quant_algo": config["quant_algo"],
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": config["ignore"],
    }
    return {"hf_quant_config.json": {"producer": {"name": "qwantize-vllm"}, "quantization": quantization}}


def _own(ignore: Sequence[str], block_size: int) -> dict[str, Any]:
    return {"quant_method": "qwantize", "packed": True, "block_size": block_size, "ignore": list(ignore)}


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "compressed-tensors",
            "weight_packed",
            "weight_scale",
            "weight_global_scale",
            divides=True,
            scalar=(1,),  # compressed-tensors divides bfloat16 by it, and by a scalar would round to bfloat16
            any_blocks=False,
            config=_compressed_tensors,
        ),
        Layout(
            "modelopt",
            "weight",
            "weight_scale",
            "weight_scale_2",
            divides=False,
            scalar=(),
            any_blocks=False,
            config=_modelopt,
            extra_files=_modelopt_files,
        ),
        Layout(
            "qwantize",
            "weight",
            "weight_scale",
            "weight_global_scale",
            divides=False,
            scalar=(),
            any_blocks=True,
            config=_own,
        ),
    )
}
