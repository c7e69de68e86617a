#!/usr/bin/env python3
"""How long `qwantize calibrate` reads a text, against vLLM's plain prefill of the same tokens.

    .venv/bin/python scripts/calibration_time.py MODEL [--num-tokens 32768] [--random-weights]

"plain" is the engine as it serves, compiled, given all windows at once; "calibrating" has the hooks of `qwantize
calibrate` and is given as many windows at once as that gives it. The tokens are random ones: time does not depend on
them. --random-weights needs no more of the model than its config.json.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qwantize_vllm.plugin.calibration import engine_arguments, read_windows_through
from qwantize_vllm.plugin.engine_process import engine, in_own_process, keep_core_here

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Argument(help="Model name or directory.")],
    num_tokens: Annotated[int, typer.Option(min=1024, help="Tokens to read.")] = 32768,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    block_size: Annotated[int, typer.Option(help="16 or 32.")] = 16,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Do not load the weights.")] = False,
    repetitions: Annotated[int, typer.Option(min=1, help="The median of so many.")] = 3,
) -> None:
    draw = random.Random(0)
    windows = [[draw.randrange(1000) for _ in range(seq_len)] for _ in range(num_tokens // seq_len)]
    options = {"load_format": "dummy", "skip_tokenizer_init": True} if random_weights else {}
    plain = in_own_process(_plain, model, windows, options, repetitions)
    calibrating = in_own_process(_calibrating, model, windows, options, repetitions, block_size)
    table = Table(title=f"{model}: {len(windows) * seq_len:,} tokens in windows of {seq_len}")
    for column in ("", "seconds", "tokens/s", "times plain"):
        table.add_column(column)
    for name, seconds in {"plain": plain, "calibrating": calibrating}.items():
        rate = len(windows) * seq_len / seconds
        table.add_row(name, f"{seconds:.3f}", f"{rate:,.0f}", f"{seconds / plain:.2f}")
    Console(width=120).print(table)


def _plain(model: str, windows: list[list[int]], options: dict[str, Any], repetitions: int) -> float:
    from vllm import SamplingParams

    arguments = {"max_model_len": len(windows[0]) + 1, "enable_prefix_caching": False}
    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    prompts = [{"prompt_token_ids": window} for window in windows]
    with engine(model=model, **arguments, **options) as llm:
        return _seconds(lambda: llm.generate(prompts, sampling, use_tqdm=False), repetitions)


def _calibrating(
    model: str, windows: list[list[int]], options: dict[str, Any], repetitions: int, block_size: int
) -> float:
    keep_core_here()
    with engine(model=model, **engine_arguments(len(windows[0]) + 1), **options) as llm:
        llm.collective_rpc("qwantize_start", args=(block_size, False))
        return _seconds(lambda: read_windows_through(llm, windows, lambda tokens: None), repetitions)


def _seconds(run: Callable[[], Any], repetitions: int) -> float:
    run()  # warms up
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    app()
