"""The weights of a benchmark: the linear layers of named models, and shapes given by hand."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight: (N, K), or (experts, N, K). The name is empty if only the shape was given."""

    name: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}".lstrip()


@dataclasses.dataclass(frozen=True)
class Transformer:
    """What a model's config.json says about the shapes of a decoder layer.

    intermediate: width of the MLP, or of each expert if there are experts.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0

    def layers(self, model: str) -> list[Layer]:
        """The distinct linear layers as vLLM fuses them, each named after the model."""
        batch = (self.experts,) if self.experts else ()
        shapes = {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            "o": (self.hidden, self.heads * self.head_dim),
            "gate_up": (*batch, 2 * self.intermediate, self.hidden),
            "down": (*batch, self.hidden, self.intermediate),
        }
        return [Layer(f"{model} {name}", shape) for name, shape in shapes.items()]


MODELS = {
    "qwen3-4b": Transformer(hidden=2560, intermediate=9728, heads=32, kv_heads=8, head_dim=128),
    "llama-3-8b": Transformer(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128),
    "llama-3-70b": Transformer(hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128),
    "qwen3-30b-a3b": Transformer(hidden=2048, intermediate=768, heads=32, kv_heads=4, head_dim=128, experts=128),
}
SMALL = "1024x2560"  # every search of it takes a second at most by the PyTorch reference on one core


def choose_layers(models: list[str], shapes: list[str], block_size: int, experts: bool = True) -> list[Layer]:
    """The layers of the models named, then the shapes, such as 2560x9728 or 128x1536x2048.

    experts: whether weights (experts, N, K) are wanted; if not, those of a model are left out.

    Raises:
        ValueError: there is no such model; a shape is not two sizes (or three), K a multiple of block_size.
    """
    for model in models:
        if model not in MODELS:
            raise ValueError(f"--model must be one of {', '.join(MODELS)}, got {model!r}")
    chosen = [layer for model in dict.fromkeys(models) for layer in MODELS[model].layers(model)]
    chosen = [layer for layer in chosen if experts or len(layer.shape) == 2]
    return chosen + [_parse_shape(text, block_size, experts) for text in dict.fromkeys(shapes)]


def _parse_shape(text: str, block_size: int, experts: bool) -> Layer:
    sizes = tuple(map(int, text.split("x"))) if re.fullmatch(r"\d+x\d+(x\d+)?", text) else ()
    if not sizes or 0 in sizes or sizes[-1] % block_size or len(sizes) > 2 + experts:
        wanted = "NxK or ExNxK (experts)" if experts else "NxK"
        raise ValueError(f"--shape must be {wanted} with K a multiple of {block_size}, such as 2560x9728, got {text!r}")
    return Layer("", sizes)
