"""What a layer keeps in place of its dense weight, and how it is multiplied: one class per form.

`keep` puts the tensors on the layer, in place of those that are there; `apply` multiplies. Where weights are reloaded
vLLM copies what `keep` leaves into the old parameters, whose addresses CUDA graphs hold; scratch of ours, which is no
parameter, stays where it is.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.utils import replace_parameter

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.every_kernel import LinearKernels
from qwantize_vllm.matmul.op import matmul_op, matmul_swizzled_op
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.plugin.addresses import same_addresses
from qwantize_vllm.plugin.invariance import plain_backend, swizzled_backend
from qwantize_vllm.plugin.kernels_ahead import prepare_kernels
from qwantize_vllm.plugin.versions import installed, takes_latent_words
from qwantize_vllm.plugin.vllm_kernels import KERNELS, describe, make_kernel
from qwantize_vllm.settings import QwantizeSettings

logger = init_logger(f"vllm.{__name__}")
_OF_LATENT_ATTENTION = "kv_b_proj"  # as all models call it
_NAMES = ("weight", "weight_scale", "weight_global_scale")
# Of activations that the kernels for swizzled weights take.
_SWIZZLED_DTYPES = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """A quantized weight, on its way to a form.

    Attributes:
        codes, block_scales: as in Nvfp4Tensor, (N, K) in all.
        global_scales: float32 (members,), of the groups of `widths` rows that share one.
        dtype: of the dense weight, and of activations.
    """

    codes: torch.Tensor
    block_scales: torch.Tensor
    global_scales: torch.Tensor
    widths: list[int]
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, parts: list[Nvfp4Tensor], dtype: torch.dtype) -> QuantizedLayer:
        return cls(
            _concatenated([q.codes for q in parts]),
            _concatenated([q.block_scales for q in parts]),
            torch.stack([q.global_scale for q in parts]),
            [q.shape[0] for q in parts],
            parts[0].block_size,
            dtype,
        )

    @property
    def whole(self) -> Nvfp4Tensor:
        """All rows, as if they had the first one's global scale."""
        return Nvfp4Tensor(self.codes, self.block_scales, self.global_scales[0], self.block_size)


class Form(Protocol):
    """A way to hold a quantized weight and to multiply by it."""

    def keep(self, layer: LinearBase, quantized: QuantizedLayer) -> int:
        """Put it on the layer; returns its bytes."""

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (..., K) . W' + bias."""


def choose_form(settings: QwantizeSettings, quantized: QuantizedLayer, name: str) -> Form:
    """The form that the setting `backend` asks for, for the layer of a name; for auto, the one that is multiplied
    fastest."""
    _ask_for_amx()
    backend, latent = settings.backend, name.rpartition(".")[2] == _OF_LATENT_ATTENTION
    if backend in ("vllm", *KERNELS) and latent and not takes_latent_words():
        logger.warning(
            "qwantize: %s is served by backend auto, not by %s, with which vLLM %s makes integers of its input",
            *(name, backend, installed()),
        )
        backend = "auto"
    if backend in ("vllm", *KERNELS):
        return VllmForm(backend)
    if backend == "auto" and quantized.codes.is_cuda and quantized.dtype in _SWIZZLED_DTYPES:
        return (LatentForm if latent else SwizzledForm)(quantized, settings.fuse_norms)
    return PlainForm(quantized, plain_backend(backend, quantized.codes.is_cuda))


@functools.cache
def _ask_for_amx() -> bool:
    """Linux lets a process use an Intel CPU's AMX once it has asked to; one that has not is killed by SIGILL.

    vLLM's attention uses AMX and leaves it to PyTorch to ask, which does so at the first product of dense 16-bit
    weights; before the first attention there is none where all layers are quantized.
    """
    return bool(getattr(torch.cpu, "_init_amx", lambda: False)())


class PlainForm:
    """`weight` uint8 (N, K/2), `weight_scale` float8_e4m3fn (N, K/block_size), and `weight_global_scale` float32 ();
    with `global_scale: amax_per_member` the latter is (members,), and each member is multiplied on its own."""

    def __init__(self, quantized: QuantizedLayer, backend: str) -> None:
        self.widths, self.block_size, self.backend = quantized.widths, quantized.block_size, backend

    def keep(self, layer: LinearBase, quantized: QuantizedLayer) -> int:
        scales = quantized.global_scales
        return _replace(layer, quantized.codes, quantized.block_scales, scales if len(scales) > 1 else scales[0])

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tensors = [getattr(layer, name) for name in _NAMES]
        if len(self.widths) == 1:
            return matmul_op(x, *tensors, bias, self.block_size, self.backend)
        codes, scales, global_scales = tensors
        members = zip(codes.split(self.widths), scales.split(self.widths), global_scales, strict=True)
        biases = [None] * len(self.widths) if bias is None else bias.split(self.widths)
        outputs = [
            matmul_op(x, *member, part, self.block_size, self.backend)
            for member, part in zip(members, biases, strict=True)
        ]
        return torch.cat(outputs, dim=-1)


class SwizzledForm:
    """`weight`, `weight_scale` and `weight_global_scale` are words, scales and global_scale of a SwizzledNvfp4, the
    latter (N,) with `global_scale: amax_per_member`; `weight_arrived` is its scratch."""

    def __init__(self, quantized: QuantizedLayer, fuse_norms: bool) -> None:
        self.rows, self.block_size, self.fuse_norms = sum(quantized.widths), quantized.block_size, fuse_norms
        self.backend = swizzled_backend()

    def keep(self, layer: LinearBase, quantized: QuantizedLayer) -> int:
        weight = swizzle(quantized.whole)
        if hasattr(layer, "weight_arrived"):
            layer.weight_arrived.zero_()
        else:
            layer.weight_arrived = weight.arrived
        scale = weight.global_scale
        if len(quantized.widths) > 1:
            widths = torch.tensor(quantized.widths, device=scale.device)
            scale = quantized.global_scales.repeat_interleave(widths)
        # What several layers are fused into follows a norm; two as large as each other are gate and up.
        members = getattr(layer, "logical_widths", [])
        normed = self.fuse_norms and len(members) > 1
        gated = len(members) == 2 and members[0] == members[1]
        served = dataclasses.replace(weight, global_scale=scale)
        prepare_kernels(LinearKernels(served, quantized.dtype, getattr(layer, "bias", None), normed, gated))
        return _replace(layer, self.held(weight.words), weight.scales, scale)

    def held(self, words: torch.Tensor) -> torch.Tensor:
        """As `weight` is on the layer."""
        return words

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # Dynamo follows this for every layer: what it would follow into, once more each time, is avoided.
        weight, scales, global_scale = layer.weight, layer.weight_scale, layer.weight_global_scale
        rest = (layer.weight_arrived, bias, self.rows, self.block_size, self.backend)
        return matmul_swizzled_op(x, weight, scales, global_scale, *rest)


class LatentForm(SwizzledForm):
    """For the projection that latent attention takes apart, and multiplies by where a prompt goes on behind what is in
    the cache: vLLM then casts the input to the dtype of `weight`, but for uint8, so the words are held as bytes."""

    def held(self, words: torch.Tensor) -> torch.Tensor:
        return words.view(torch.uint8)

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tensors = (layer.weight.view(torch.int16), layer.weight_scale, layer.weight_global_scale, layer.weight_arrived)
        return matmul_swizzled_op(x, *tensors, bias, self.rows, self.block_size, self.backend)


class VllmForm:
    """What one of vLLM's own kernels makes of the tensors that it has in common with PlainForm."""

    def __init__(self, kernel: str) -> None:
        self.kernel = make_kernel(kernel)

    def keep(self, layer: LinearBase, quantized: QuantizedLayer) -> int:
        n, k = quantized.whole.shape
        describe(layer, n, k, quantized.dtype)
        _replace(layer, quantized.codes, quantized.block_scales, quantized.global_scales[0])
        # Made anew each time: the workspace of Marlin in vLLM 0.25, and the locks that Humming's kernel has itself.
        with same_addresses(layer, self.kernel):
            self.kernel.process_weights_after_loading(layer)
        return sum(tensor.nbytes for name, tensor in layer.named_parameters() if name != "bias")

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = self.kernel.apply_weights(layer, x.contiguous(), None)
        # The kernels want a bias repacked with the weight, each in its own way.
        return y if bias is None else y + bias.to(y.dtype)


def _replace(layer: LinearBase, *tensors: torch.Tensor) -> int:
    for name, tensor in zip(_NAMES, tensors, strict=True):
        replace_parameter(layer, name, tensor)
    return sum(tensor.nbytes for tensor in tensors)


def _concatenated(parts: list[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    # PyTorch does not concatenate float8 everywhere; its bytes it does.
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
