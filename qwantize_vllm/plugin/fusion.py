"""A pass over the graph that vLLM compiles: norms before products, and gates after them, become part of the products.

vLLM runs the passes of a config on each graph before Inductor makes kernels of it. There a layer's norm is one node,
`vllm_ir.fused_add_rms_norm`, and silu(gate) * up is what PyTorch takes it apart into. What does not look like this, as
with LoRA adapters, whose nodes read what is in between, stays as it is.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import fx
from torch._inductor.pattern_matcher import CallFunction, Ignored, KeywordArg, Match
from vllm import envs
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from qwantize_vllm.matmul.gpu import capability_major
from qwantize_vllm.matmul.op import matmul_swizzled_op, normed_matmul_swizzled_op
from qwantize_vllm.matmul.tile_shapes import choose_normed_shape
from qwantize_vllm.settings import QwantizeSettings

logger = init_logger(f"vllm.{__name__}")

_aten, _convert = torch.ops.aten, torch.ops.prims.convert_element_type.default
_N = 6  # among the arguments of the op


def _swiglu() -> CallFunction:
    """silu(y[:, :half]) * y[:, half:] of bfloat16 or float16, as PyTorch takes it apart."""
    gate = CallFunction(_aten.slice.Tensor, KeywordArg("y"), 1, 0, KeywordArg("half"))
    wide = CallFunction(_convert, gate, torch.float32, _users=2)
    exp = CallFunction(_aten.exp.default, CallFunction(_aten.neg.default, wide))
    silu = CallFunction(_aten.div.Tensor, wide, CallFunction(_aten.add.Tensor, exp, 1))
    up = CallFunction(_aten.slice.Tensor, KeywordArg("y"), 1, KeywordArg("half"), Ignored())
    return CallFunction(_aten.mul.Tensor, CallFunction(_convert, silu, Ignored()), up)


def install_fusion(config: VllmConfig, settings: QwantizeSettings) -> None:
    """Have vLLM run the pass where a kernel gains by it; to be called while the model is built."""
    if not settings.fuse_norms or envs.VLLM_BATCH_INVARIANT or not current_platform.is_cuda():
        return
    if config.model_config.dtype != torch.bfloat16:  # which the kernel is for
        return
    device = torch.device("cuda", torch.cuda.current_device())
    if choose_normed_shape(capability_major(device), 1, gated=False, block_size=settings.block_size) is None:
        return
    passes = config.compilation_config.inductor_compile_config
    if current_platform.pass_key in passes:
        logger.warning(
            "qwantize: the compilation config has a %s of its own; norms stay kernels of their own",
            current_platform.pass_key,
        )
        return
    passes[current_platform.pass_key] = FuseNorms()


class FuseNorms(InductorPass):
    """Replaces fused_add_rms_norm, a product and perhaps silu(gate) * up by `normed_matmul_swizzled`."""

    def __call__(self, graph: fx.Graph) -> None:
        gates = dict(_gates(graph))
        products = graph.find_nodes(op="call_function", target=matmul_swizzled_op)
        normed = {product: norm for product in products if (norm := _norm_of(product)) is not None}
        for product, norm in normed.items():
            _fuse(graph, product, norm, gates.get(product))
        if normed:
            gated = len(gates.keys() & normed.keys())
            logger.debug("qwantize: %d products norm their input, %d of them gate their output", len(normed), gated)
            graph.eliminate_dead_code()

    def uuid(self) -> str:
        """Of all that this file does: vLLM keeps compiled graphs under it."""
        return InductorPass.hash_source(inspect.getsource(sys.modules[__name__]))


def _gates(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Products of which nothing is read but both halves, by a gate; and what the gate makes of them."""
    pattern = _swiglu()
    for node in graph.find_nodes(op="call_function", target=_aten.mul.Tensor):
        match = pattern.match(node)
        if not isinstance(match, Match):
            continue
        product, half = match.kwargs["y"], match.kwargs["half"]
        if product.target != matmul_swizzled_op or len(product.users) != 2 or not isinstance(half, int):
            continue
        if product.args[_N] == 2 * half:
            yield product, node


def _norm_of(product: fx.Node) -> fx.Node | None:
    """The norm of a product's input, if this is all that its result is for and one kernel can do both."""
    arguments: Any = product.args
    normed, *weight = arguments
    if product.args[-1] != "auto" or len(normed.users) != 1 or normed.target != operator.getitem:
        return None
    norm, index = normed.args
    if index != 0 or norm.target != torch.ops.vllm_ir.fused_add_rms_norm.default:
        return None
    x, _, gain, _, *size = norm.args
    alike = gain is not None and gain.meta["val"].dtype == x.meta["val"].dtype and x.meta["val"].dim() == 2
    first = sum(1 for user in norm.users if user.args[1] == 0) == 1
    # The product moves up to where the norm is.
    there = all(each.op in ("placeholder", "get_attr") for each in weight if isinstance(each, fx.Node))
    return norm if alike and first and there and size in ([], [None]) else None


def _fuse(graph: fx.Graph, product: fx.Node, norm: fx.Node, gate: fx.Node | None) -> None:
    """Replace a product, its norm, and its gate if there is one; what they were is left without users."""
    result, x = gate or product, cast(fx.Node, norm.args[0])
    with graph.inserting_before(norm):
        arguments = (*norm.args[:4], *product.args[1:], gate is not None)
        fused = graph.call_function(normed_matmul_swizzled_op, arguments)
        y, sums = (graph.call_function(operator.getitem, (fused, index)) for index in (0, 1))
    y.meta["val"], sums.meta["val"] = result.meta["val"], x.meta["val"]
    fused.meta["val"] = (y.meta["val"], sums.meta["val"])
    result.replace_all_uses_with(y)
    for user in list(norm.users):
        if user.args[1] == 1:
            user.replace_all_uses_with(sums)
