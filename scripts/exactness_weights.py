"""What scripts/exactness.py quantizes: weights of named distributions, and activations to weigh their errors with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

SYNTHETIC = ("gaussian", "student", "uniform", "sparse", "outlier", "denormal")
REAL = "smollm2"
KINDS = (*SYNTHETIC, REAL)
HESSIAN_KINDS = (
    "white",  # Gaussian activations
    "correlated",  # neighbours at 0.95, a mean, two channels thirty times as large
    "rank one",  # one token
    "deficient",  # half as many tokens as the block is long
    "diagonal",
    "zero",  # the squared error decides
    "singular",  # condition 1e8, as far as float32 can tell
    "times 1e20",
    "times 1e-20",
)

_MATRICES = 8  # of every distribution: four magnitudes in two dtypes, each matrix with a global scale of its own
_MAGNITUDES = (0.02, 0.3, 5.0, 80.0)
_DENORMAL_MAGNITUDES = (1e-42, 1e-40, 1e-38, 1e-36)
_COLUMNS = 2 * len(HESSIAN_KINDS)  # blocks in a row
_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """A matrix to quantize.

    Attributes:
        weight: (N, K), float32 or bfloat16.
        activations: float32 (tokens, K), or None where the squared error is the measure.
        hessian_kinds: one name per column of blocks, of the Hessian that the activations give.
    """

    weight: torch.Tensor
    activations: torch.Tensor | None = None
    hessian_kinds: tuple[str, ...] = ()


def synthetic_cases(kind: str, blocks: int, block_size: int, with_hessian: bool, device: str) -> Iterator[Case]:
    """Matrices with at least so many blocks in all."""
    rows = math.ceil(blocks / (_MATRICES * _COLUMNS))
    for i in range(_MATRICES):
        generator = torch.Generator(device).manual_seed(100 * KINDS.index(kind) + i)
        magnitude = (_DENORMAL_MAGNITUDES if kind == "denormal" else _MAGNITUDES)[i % 4]
        values = _draw(kind, rows, block_size, generator).mul_(magnitude).flatten(1)
        weight = values.to(torch.bfloat16) if i >= _MATRICES // 2 else values
        yield synthetic_hessian_case(weight, block_size, generator) if with_hessian else Case(weight)


def synthetic_hessian_case(weight: torch.Tensor, block_size: int, generator: torch.Generator) -> Case:
    """A weight with activations of every kind, turn by turn over its columns of blocks."""
    columns = weight.shape[1] // block_size
    kinds = tuple(HESSIAN_KINDS[j % len(HESSIAN_KINDS)] for j in range(columns))
    return Case(weight, torch.cat([_activations(kind, block_size, generator) for kind in kinds], dim=1), kinds)


def _draw(kind: str, rows: int, block_size: int, generator: torch.Generator) -> torch.Tensor:
    """float32 (rows, columns, block) with a standard deviation about 1."""
    shape, device = (rows, _COLUMNS, block_size), generator.device

    def uniform() -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def normal() -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if kind == "uniform":
        return uniform() * 2 - 1
    if kind == "student":  # three degrees of freedom
        return normal() / ((normal().square_() + normal().square_() + normal().square_()) / 3).sqrt_()
    if kind == "sparse":  # nine of ten are zero
        return normal() * (uniform() < 0.1)
    if kind == "outlier":  # one a thousand times as large, somewhere in every other block
        where = torch.randint(block_size, (rows, _COLUMNS, 1), generator=generator, device=device)
        factor = torch.ones(shape, device=device).scatter_(2, where, 1000.0)
        factor[:, 1::2] = 1
        return normal() * factor
    if kind not in ("gaussian", "denormal"):
        raise ValueError(f"kind must be one of {SYNTHETIC}, got {kind!r}")
    return normal()


def _activations(kind: str, block_size: int, generator: torch.Generator) -> torch.Tensor:
    """float32 (tokens, block) whose X'X is a Hessian of the kind.

    In values of bfloat16, as a model's are: a product of two is exact in float32, so that a Hessian of one token is.
    """
    device = generator.device
    x = torch.randn(_TOKENS, block_size, generator=generator, device=device)
    if kind == "correlated":
        distance = torch.arange(block_size, device=device)[:, None] - torch.arange(block_size, device=device)
        x = x @ torch.linalg.cholesky(0.95 ** distance.abs().float()).T + 2 * x[0]
        x[:, torch.randperm(block_size, generator=generator, device=device)[:2]] *= 30
    elif kind == "rank one":
        x[1:] = 0
    elif kind == "deficient":
        x[block_size // 2 :] = 0
    elif kind == "diagonal":
        x = torch.zeros_like(x)
        x[:block_size] = torch.randn(block_size, generator=generator, device=device).diag()
    elif kind == "zero":
        x.zero_()
    elif kind == "singular":
        rotation, _ = torch.linalg.qr(x[:block_size])
        x[:block_size] = torch.logspace(0, -4, block_size, device=device)[:, None] * rotation
        x[block_size:] = 0
    elif kind == "times 1e20":
        x *= 1e10
    elif kind == "times 1e-20":
        x *= 1e-10
    elif kind != "white":
        raise ValueError(f"kind must be one of {HESSIAN_KINDS}, got {kind!r}")
    return x.to(torch.bfloat16).float()


def layer_cases(
    checkpoint: Path, blocks: int, block_size: int, with_hessian: bool, device: str, text: Path | None = None
) -> Iterator[Case]:
    """Linear layers of a checkpoint in random order, until they have so many blocks; the last one is cut there.

    With text and with_hessian the activations are the layer's own on that text, else synthetic ones.
    """
    generator = torch.Generator(device).manual_seed(0)
    measured = measure_activations(checkpoint, text) if with_hessian and text else {}
    for name, weight in _layers(checkpoint):
        columns = weight.shape[1] // block_size
        weight = weight[: math.ceil(blocks / columns)].to(device)
        blocks -= weight.shape[0] * columns
        if not with_hessian:
            yield Case(weight)
        elif measured:
            yield Case(weight, measured[name].to(device), ("measured",) * columns)
        else:
            yield synthetic_hessian_case(weight, block_size, generator)
        if blocks <= 0:
            return
    raise ValueError(f"the linear layers of {checkpoint} have {blocks} blocks of {block_size} too few")


def _layers(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of the linear layers, the same random order every time."""
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        names = sorted(name for name in file.keys() if name.endswith("_proj.weight"))  # noqa: SIM118  safe_open is no dict
        for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist():
            yield names[i].removesuffix(".weight"), file.get_tensor(names[i])


def measure_activations(checkpoint: Path, text: Path, tokens: int = 512) -> dict[str, torch.Tensor]:
    """The inputs (tokens, K) of every linear layer on the beginning of a text, float32 on the CPU, by name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(checkpoint)(text.read_text()[: 20 * tokens], return_tensors="pt").input_ids
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> None:
        module.register_forward_pre_hook(lambda _, args: inputs.update({name: args[0][0].float()}))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            keep(name)
    with torch.no_grad():
        model(ids[:, :tokens])
    return inputs
