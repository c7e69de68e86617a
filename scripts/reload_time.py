#!/usr/bin/env python3
"""Fresh weights into a running engine: seconds, split into copying and quantizing; memory over 50 reloads; and whether
what is then served is what a fresh start serves.

    .venv/bin/python scripts/reload_time.py [--shape llama-3-8b] [--layers N] [--small-layers 4] [--folder DIR]

Weights are random. Three parts, each in processes of its own, so that one that fails leaves the others:

    speed      reloads from the files of a checkpoint, and from new bf16 tensors that are on the GPU already
    equality   of a model of --small-layers: greedy tokens and every parameter after a reload, from files and from
               tensors, against an engine that was started with these weights
    memory     of the same: what is held after each of 50 reloads, two sets of weights in turn

"quantize" is the time in the plugin, the GPU waited for before and after; "copy" is all else: reading or copying
weights, and what vLLM does about them. The bf16 tensors are on the GPU beside the engine: --utilization leaves room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from engine_log import log_to, tail
from random_checkpoint import is_written, llama_config, weights, write_checkpoint

from qwantize_vllm.plugin.engine_process import engine, in_own_process, keep_core_here

PARTS = ("speed", "equality", "memory")
NEW_TOKENS = 64
PROMPT_LENGTHS = (4, 33, 200)
MIB, GIB = 2**20, 2**30
# Reloads after which memory counts: the first ones fill the allocators' caches.
SETTLED = 4
_PROCESS = "process_weights_after_loading"
Say = Callable[[str], None]

app = typer.Typer(add_completion=False)


@dataclasses.dataclass(frozen=True)
class Work:
    """What the parts are given: where everything is, how often, and arguments of `vllm.LLM`."""

    folder: Path
    configs: dict[str, dict[str, Any]]  # of the speed part, and of the others
    repetitions: int
    reloads: int
    options: dict[str, Any]

    def checkpoint(self, which: str, seed: int) -> Path:
        """Written when it is first asked for.

        Raises:
            FileExistsError: a folder of another run has its name, and other weights in it.
        """
        path = self.folder / f"{which}-{seed}"
        if not is_written(path, self.configs[which]):
            write_checkpoint(path, self.configs[which], seed)
        return path

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


@app.command(help=__doc__)
def main(
    shape: Annotated[str, typer.Option(help="Shape of the model: llama-3-8b or tiny.")] = "llama-3-8b",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the model of the speed part.")] = None,
    small_layers: Annotated[int, typer.Option(min=1, help="Layers of the model of the other parts.")] = 4,
    part: Annotated[list[str] | None, typer.Option(help=f"Only these of {', '.join(PARTS)}.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Reloads of each kind that are timed.")] = 3,
    reloads: Annotated[int, typer.Option(min=SETTLED + 2, help="Reloads of the memory part.")] = 50,
    folder: Annotated[Path | None, typer.Option(help="Where to put everything; default: a temporary folder.")] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Without torch.compile and CUDA graphs.")] = False,
    utilization: Annotated[float, typer.Option(help="vLLM's gpu_memory_utilization.")] = 0.5,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON, after every part.")] = None,
) -> None:
    if unknown := set(part or ()) - set(PARTS):
        raise typer.BadParameter(f"--part must be one of {PARTS}, got {sorted(unknown)}")
    try:
        configs = {"large": llama_config(shape, layers), "small": llama_config(shape, small_layers)}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    options = {"enforce_eager": eager, "gpu_memory_utilization": utilization, "max_model_len": 512}
    options |= {"skip_tokenizer_init": True, "enable_prefix_caching": False}
    results: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        work = Work(place, configs, repetitions, reloads, options)
        for name in part or PARTS:
            results[name] = _run_part(name, work)
            if out:
                out.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(0 if all(result and result["passed"] for result in results.values()) else 1)


def _run_part(name: str, work: Work) -> dict[str, Any] | None:
    """What it found, or None where it failed."""
    print(f"== {name}", flush=True)
    try:
        return {"speed": speed, "equality": equality, "memory": memory}[name](work)
    except Exception as error:  # of any engine
        print(f"FAILED: {type(error).__name__}: {error}", flush=True)
        for log in sorted(work.folder.glob(f"{name}*.log")):
            print(f"the end of {log.name}:\n{tail(log)}", flush=True)
        return None


def speed(work: Work) -> dict[str, Any]:
    began = time.perf_counter()
    checkpoint = work.checkpoint("large", 0)
    print(f"checkpoint written in {time.perf_counter() - began:.1f} s", flush=True)
    result = in_own_process(_speed, work, checkpoint)
    shutil.rmtree(checkpoint)
    return result


def _speed(work: Work, checkpoint: Path) -> dict[str, Any]:
    with _engine(work, checkpoint, "speed") as (llm, say):
        clock = QuantizeClock()
        timed: dict[str, list[dict[str, float]]] = {"files": [], "tensors": []}
        sources: dict[str, Callable[[], dict[str, Any]]] = {"files": lambda: {"weights_path": str(checkpoint)}}
        given = list(weights(work.configs["large"], 1, _device()))
        sources["tensors"] = lambda: {"weights_iterator": iter(given)}
        for name, source in sources.items():
            for _ in range(work.repetitions):
                timed[name].append(clock.time(llm, source()))
                say(f"from {name}: " + ", ".join(f"{key} {value:.3f} s" for key, value in timed[name][-1].items()))
        return {"passed": True, "seconds": timed, "bytes": sum(tensor.nbytes for _, tensor in given)}


class QuantizeClock:
    """Counts the seconds that the plugin quantizes in, in this process."""

    def __init__(self) -> None:
        from qwantize_vllm.plugin.linear import QwantizeLinearMethod
        from qwantize_vllm.plugin.moe import QwantizeMoEMethod

        self.seconds = 0.0
        for method in (QwantizeLinearMethod, QwantizeMoEMethod):
            setattr(method, _PROCESS, self._timed(getattr(method, _PROCESS)))

    def _timed(self, process: Any) -> Any:
        @functools.wraps(process)
        def timed(*args: Any) -> None:
            _synchronize()
            began = time.perf_counter()
            process(*args)
            _synchronize()
            self.seconds += time.perf_counter() - began

        return timed

    def time(self, llm: Any, source: dict[str, Any]) -> dict[str, float]:
        """Seconds of a reload: all, quantize and copy."""
        self.seconds = 0.0
        _synchronize()
        began = time.perf_counter()
        llm.collective_rpc("reload_weights", kwargs=source)
        _synchronize()
        seconds = time.perf_counter() - began
        return {"all": seconds, "quantize": self.seconds, "copy": seconds - self.seconds}


def equality(work: Work) -> dict[str, Any]:
    old, new = (work.checkpoint("small", seed) for seed in (0, 1))
    fresh = in_own_process(_say, work, new, "equality-fresh")
    reloaded = in_own_process(_say_after_reloads, work, old, new)
    if reloaded["before"]["tokens"] == fresh["tokens"]:
        raise RuntimeError("both sets of weights say the same: nothing can be compared")
    passed = True
    for name in ("files", "tensors"):
        tokens = reloaded[name]["tokens"] == fresh["tokens"]
        differ = [key for key, digest in fresh["digests"].items() if reloaded[name]["digests"].get(key) != digest]
        passed &= tokens and not differ and reloaded[name]["addresses"] == reloaded["before"]["addresses"]
        count = len(fresh["digests"])
        print(
            f"after a reload from {name}: greedy tokens {'equal' if tokens else 'DIFFER'}, "
            f"{count - len(differ)} of {count} parameters equal bit for bit {differ[:3]}",
            flush=True,
        )
    return {"passed": passed}


def _say(work: Work, checkpoint: Path, name: str) -> dict[str, Any]:
    with _engine(work, checkpoint, name) as (llm, _):
        return _state(llm)


def _say_after_reloads(work: Work, old: Path, new: Path) -> dict[str, Any]:
    with _engine(work, old, "equality-reloaded") as (llm, _):
        states = {"before": _state(llm)}
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(new)})
        states["files"] = _state(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(old)})
        given = weights(work.configs["small"], 1, _device())
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": given})
        states["tensors"] = _state(llm)
        return states


def _state(llm: Any) -> dict[str, Any]:
    """What the engine says and holds."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": list(range(3, 3 + length))} for length in PROMPT_LENGTHS]
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    (held,) = llm.apply_model(_held)
    return {"tokens": [list(each.outputs[0].token_ids) for each in outputs], **held}


def _held(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Digest and address of every parameter."""
    digests, addresses = {}, {}
    for name, parameter in model.named_parameters():
        bytes_ = parameter.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
        digests[name], addresses[name] = hashlib.sha256(bytes_).hexdigest(), parameter.data_ptr()
    return {"digests": digests, "addresses": addresses}


def memory(work: Work) -> dict[str, Any]:
    samples = in_own_process(_reload_often, work, work.checkpoint("small", 0))
    grown = {key: samples[-1][key] - samples[SETTLED][key] for key in samples[0]}
    print(
        f"from reload {SETTLED + 1} to {len(samples)}: "
        + ", ".join(f"{key} {value / MIB:+.1f} MiB" for key, value in grown.items()),
        flush=True,
    )
    # Of tensors nothing may stay. What is around them moves a little; a layer that stayed each time would be gigabytes.
    passed = grown.get("allocated", 0) <= 0 and all(growth < 64 * MIB for growth in grown.values())
    return {"passed": passed, "bytes": samples}


def _reload_often(work: Work, checkpoint: Path) -> list[dict[str, int]]:
    with _engine(work, checkpoint, "memory") as (llm, say):
        sets = [list(weights(work.configs["small"], seed, _device())) for seed in (0, 1)]
        samples = []
        for number in range(work.reloads):
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(sets[number % 2])})
            samples.append(_sample())
            if number % 10 in (0, 9):
                figures = ", ".join(f"{key} {value / GIB:.3f}" for key, value in samples[-1].items())
                say(f"after reload {number + 1}, GiB: {figures}")
        return samples


def _sample() -> dict[str, int]:
    gc.collect()
    sample = {"resident": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        sample |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
        sample["device"] = total - free
    return sample


@contextlib.contextmanager
def _engine(work: Work, checkpoint: Path, name: str) -> Iterator[tuple[Any, Say]]:
    """An engine whose core is in this process, where tensors on the GPU can be given to it."""
    say = log_to(work.log(name))
    keep_core_here()
    began = time.perf_counter()
    with engine(model=str(checkpoint), quantization="qwantize", **work.options) as llm:
        say(f"engine ready in {time.perf_counter() - began:.1f} s")
        yield llm, say


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    app()
