#!/usr/bin/env python3
"""Quantize a checkpoint layer by layer, each one making up for what those before it have done to its inputs.

    .venv/bin/python scripts/sequential_gptq.py MODEL --text TEXT --out DIRECTORY
    .venv/bin/qwantize eval DIRECTORY --text TEXT --first-token 40960 --setting bf16

An experiment, for what lies beyond `refine: gptq`, which takes every layer's inputs as the unquantized model has them.
X being those, and Y the inputs behind the layers that are quantized already, |X W' - Y Q'|^2 + damping |W - Q|^2 is
least for

    Q  =  W + W (C - H) (H + damping)^-1,       H = Y'Y,   C = X'Y,

so that is what GPTQ quantizes, under H (asymmetric calibration: GPTAQ, Li et al., arXiv:2504.02692). What is written is
an ordinary bf16 checkpoint whose weights are what the NVFP4 codes stand for; nothing here makes it smaller. It is for
decoders whose layers have q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj: Llama, Mistral, Qwen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import transformers
import typer
from tqdm import tqdm

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.search.gptq import BlockOrder, GptqOptions, damp

# What shares an input, in the order in which a layer computes.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_WINDOWS_AT_ONCE = 8

app = typer.Typer(add_completion=False)


class _Reached(Exception):
    """Ends a layer's forward pass at the module whose input is wanted."""


@app.command(help=__doc__)
def main(
    model: Annotated[Path, typer.Argument(help="Directory of the checkpoint.")],
    text: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="UTF-8 text to calibrate on.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    first_token: Annotated[int, typer.Option(min=0, help="Token of the text at which to begin.")] = 0,
    num_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 32768,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window; each is read alone.")] = 1024,
    damping: Annotated[float, typer.Option(help="Added to H's diagonal, as a part of its mean.")] = 0.01,
    order: Annotated[str, typer.Option(help="Of blocks: natural or loss.")] = "natural",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokens = tokenizer.encode(text.read_text("utf-8"), add_special_tokens=False)[first_token : first_token + num_tokens]
    windows = torch.tensor(tokens[: len(tokens) // seq_len * seq_len], dtype=torch.int64).view(-1, seq_len)
    if not len(windows):
        raise typer.BadParameter(f"there are only {len(tokens)} tokens from token {first_token} on, not {seq_len}")
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).to(device)
    with torch.no_grad():
        quantize_layers(network.model, windows.to(device), GptqOptions(damping, cast(BlockOrder, order)))
    network.save_pretrained(out)
    tokenizer.save_pretrained(out)


def quantize_layers(decoder: Any, windows: torch.Tensor, options: GptqOptions) -> None:
    """Replace the weights of a decoder's layers by what their quantization stands for, one after the other."""
    positions = torch.arange(windows.shape[1], device=windows.device)[None]
    exact = decoder.embed_tokens(windows)
    behind = exact.clone()  # the hidden states of the quantized model
    rotary = decoder.rotary_emb(exact[:1], positions)
    for layer in tqdm(decoder.layers, unit="layer", disable=None):

        def run(module: Any, states: torch.Tensor) -> torch.Tensor:
            hidden = module(states, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            return hidden if isinstance(hidden, torch.Tensor) else hidden[0]

        unquantized = copy.deepcopy(layer)
        for stage in STAGES:
            hessian, cross = moments(run, (unquantized, exact), (layer, behind), stage[0])
            quantize_stage([layer.get_submodule(name) for name in stage], hessian, cross, options)
        exact = torch.cat([run(unquantized, states) for states in exact.split(_WINDOWS_AT_ONCE)])
        behind = torch.cat([run(layer, states) for states in behind.split(_WINDOWS_AT_ONCE)])


def moments(
    run: Callable[[Any, torch.Tensor], torch.Tensor],
    unquantized: tuple[Any, torch.Tensor],
    quantized: tuple[Any, torch.Tensor],
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """H = Y'Y and C = X'Y, float32 (K, K), of a module's inputs: X in the unquantized layer, Y in the quantized one."""
    hessian = cross = torch.zeros(())
    for x, y in zip(inputs(run, *unquantized, name), inputs(run, *quantized, name), strict=True):
        hessian, cross = hessian.to(y.device) + y.mT @ y, cross.to(y.device) + x.mT @ y
    return hessian, cross


def inputs(
    run: Callable[[Any, torch.Tensor], torch.Tensor], layer: Any, states: torch.Tensor, name: str
) -> Iterator[torch.Tensor]:
    """What reaches a module of a layer, float32 (tokens, K), some windows at a time."""
    reached: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        reached.append(arguments[0])
        raise _Reached

    handle = layer.get_submodule(name).register_forward_pre_hook(hook)
    try:
        for part in states.split(_WINDOWS_AT_ONCE):
            try:
                run(layer, part)
            except _Reached:
                yield reached.pop().flatten(0, -2).float()
    finally:
        handle.remove()


def quantize_stage(modules: list[Any], hessian: torch.Tensor, cross: torch.Tensor, options: GptqOptions) -> None:
    """Quantize linear modules that share an input, as vLLM does: as one weight with one global scale."""
    weight = torch.cat([module.weight for module in modules])
    wanted = weight.float() + correction(weight, hessian, cross, options.damping).float()
    scale = quantize_nvfp4(weight, "naive").global_scale
    q = quantize_nvfp4(wanted, "hessian", 16, scale, hessian, refine="gptq", gptq=options).dequantize(torch.bfloat16)
    for module, part in zip(modules, q.split([module.weight.shape[0] for module in modules]), strict=True):
        module.weight.copy_(part)


def correction(weight: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor, damping: float) -> torch.Tensor:
    """W (C - H) (H + damping)^-1, float64 (N, K)."""
    h = hessian.double()
    mean = float(h.diagonal().mean())
    difference = weight.double() @ ((cross.double() - h) / (mean or 1.0))
    return torch.linalg.solve(damp(hessian, damping), difference, left=False)


if __name__ == "__main__":
    app()
