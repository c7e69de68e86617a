#!/usr/bin/env python3
"""An export beside the checkpoint that it is of: the same tokens, the same rates?

    qwantize export MODEL --out EXPORT [--format modelopt]
    .venv/bin/python scripts/export_served.py MODEL EXPORT [--rounds 2] [--out served.json]

Served three ways, each in a process of its own: "online" is MODEL with --quantization qwantize, "export" is EXPORT with
it, "stock" is EXPORT by vLLM alone, no plugin loaded. Of each: tokens a second, the median of three runs; the greedy
tokens that it has in common with "online"; and the mean difference of log-probabilities of the same prompts. What is
served first may find cold clocks and caches: the ways take turns, --rounds times. An export of other settings than the
defaults wants them online too: name their file in QWANTIZE_CONFIG.
"""

from __future__ import annotations

import json
import os
import random
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qwantize_vllm.plugin.engine_process import engine, in_own_process
from qwantize_vllm.plugin.throughput import Load, run_load

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 128, 32
LOADS = (Load(1, 16, 256), Load(32, 16, 256), Load(1, 2048, 1))

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    model: Annotated[Path, typer.Argument(help="Directory of the unquantized checkpoint.")],
    export: Annotated[Path, typer.Argument(help="What `qwantize export` made of it.")],
    rounds: Annotated[int, typer.Option(min=1, help="How often every way is served.")] = 2,
    stock: Annotated[bool, typer.Option(help="Also by vLLM alone, whose kernels need a GPU.")] = True,
    eager: Annotated[bool, typer.Option(help="Without torch.compile and CUDA graphs.")] = False,
    rates: Annotated[bool, typer.Option(help="Measure rates.")] = True,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    ways = {"online": (model, "qwantize"), "export": (export, "qwantize")} | (
        {"stock": (export, None)} if stock else {}
    )
    found: list[dict[str, Any]] = []
    for number in range(rounds):
        for way, (path, quantization) in ways.items():
            served = in_own_process(serve, str(path), quantization, eager, LOADS if rates else ())
            found.append({"round": number, "way": way, **served})
    Console(width=160).print(table(found))
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


def serve(model: str, quantization: str | None, eager: bool, loads: tuple[Load, ...]) -> dict[str, Any]:
    from vllm import SamplingParams

    if quantization is None:
        os.environ["VLLM_PLUGINS"] = ""
    options = {"skip_tokenizer_init": True, "enable_prefix_caching": False, "enforce_eager": eager}
    with engine(model=model, quantization=quantization, max_model_len=2304, **options) as llm:
        vocabulary, chance = llm.llm_engine.model_config.get_vocab_size(), random.Random(0)
        prompts = [
            {"prompt_token_ids": [chance.randrange(vocabulary) for _ in range(PROMPT_TOKENS)]} for _ in range(PROMPTS)
        ]
        greedy = SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, prompt_logprobs=0
        )
        # One by one: what is in a batch together follows from when it arrives, and roundings from that.
        outputs = [llm.generate([prompt], greedy, use_tqdm=False)[0] for prompt in prompts]
        seconds = []
        for load in loads:
            run_load(llm, load, vocabulary)  # warms up
            seconds.append(statistics.median(run_load(llm, load, vocabulary) for _ in range(3)))
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "log_probabilities": [
            step[token].logprob
            for o in outputs
            for token, step in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:], strict=True)
        ],
        "seconds": seconds,
    }


def table(found: list[dict[str, Any]]) -> Table:
    online, made = found[0], Table()
    for column in ("round", "", "tokens/s, batch 1", "batch 32", "ms, prefill of 2048", "tokens as online", "log-p"):
        made.add_column(column, justify="right")
    for each in found:
        rates = [f"{load.requests * load.new_tokens / s:.1f}" for load, s in zip(LOADS, each["seconds"], strict=False)]
        rates[2:] = [f"{1000 * s:.1f}" for s in each["seconds"][2:]]
        same = sum(map(agreeing, online["tokens"], each["tokens"]))
        pairs = zip(online["log_probabilities"], each["log_probabilities"], strict=True)
        difference = statistics.mean(abs(a - b) for a, b in pairs)
        rates += [""] * (3 - len(rates))
        made.add_row(str(each["round"]), each["way"], *rates, f"{same}/{PROMPTS * NEW_TOKENS}", f"{difference:.6f}")
    return made


def agreeing(a: list[int], b: list[int]) -> int:
    """How many tokens two answers have in common before they part."""
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=True)) if one != other), len(a))


if __name__ == "__main__":
    app()
