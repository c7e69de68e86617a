"""Hessians measured by the engine that will serve: every architecture and parallelism that vLLM has.

The workers hang a hook on every linear layer; the driver sends the text, so many windows at once, to an engine core in
its own process: one that runs beside it would start on the first ones, and the batches, and with them the last bits of
the sums, would differ from run to run. Experts tell what they multiply (measured_experts.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform

from qwantize_vllm import __version__
from qwantize_vllm.hessian import BlockHessianSum, FullHessianSum, HessianFile, HessianInfo, save_hessians
from qwantize_vllm.plugin.corpus import check_context
from qwantize_vllm.plugin.engine_process import engine, in_own_process, keep_core_here
from qwantize_vllm.plugin.fingerprint import config_fingerprint
from qwantize_vllm.plugin.measured_experts import MEASURE, ExpertSums, MeasuredExperts
from qwantize_vllm.plugin.methods import is_gate

# What a model that does not generate can be asked for; all of them run the same layers.
_POOLING_TASKS = ("embed", "classify", "token_embed", "token_classify")
# Of all windows of a batch on a GPU: so many that a small model's layers take longer than it takes to launch them. A
# CPU has nothing to launch, and vLLM 0.32 gets latent attention wrong there where several prompts are in a batch.
_TOKENS_AT_ONCE = 32768


class CalibrationWorker:
    """Methods that vLLM adds to its workers (`worker_extension_cls`)."""

    model_runner: Any

    def qwantize_start(self, block_size: int, full: bool) -> list[str]:
        """Hang the hooks; returns the names of linear layers that are left out, K not being a multiple of the block.

        Raises:
            ValueError: full, and a layer whose inputs are shared out among ranks.
        """
        self._qwantize_sums: dict[str, tuple[int, BlockHessianSum | FullHessianSum]] = {}
        self._qwantize_info = HessianInfo(block_size=block_size, full=full)
        left = []
        self._qwantize_experts: dict[str, ExpertSums] = {}
        model = self.model_runner.get_model()
        # Latent attention may take the weight of its projection, and not call it: what it gives it, it is given itself.
        latent = {module.kv_b_proj: module for module in model.modules() if isinstance(module, MLAAttention)}
        for path, layer in model.named_modules():
            if isinstance(layer, RoutedExperts):
                if full or not isinstance(layer.quant_method, MeasuredExperts):
                    left.append(layer.layer_name)
                else:
                    self._qwantize_experts[layer.layer_name] = ExpertSums(layer, block_size)
            if not isinstance(layer, LinearBase) or is_gate(layer, layer.prefix or path):
                continue
            k = getattr(layer, "input_size_per_partition", layer.input_size)
            name = layer.prefix or path
            if k % block_size:
                left.append(name)
                continue
            if full and k != layer.input_size:
                raise ValueError(f"{name} has its inputs on several ranks, none of which can measure a full Hessian")
            rank = layer.tp_rank if k != layer.input_size else 0
            device = next(layer.parameters()).device
            hessian = FullHessianSum(k, device) if full else BlockHessianSum(k, block_size, device)
            if k != layer.input_size or layer.tp_rank == 0:  # what every rank sees one of them counts
                self._qwantize_sums[name] = (rank, hessian)
                caller, argument = (latent[layer], 1) if layer in latent else (layer, 0)
                caller.register_forward_pre_hook(_adding_to(hessian, argument))
        return left

    def qwantize_finish(self, directory: str) -> tuple[str, dict[str, int], dict[str, float]]:
        """Write this worker's sums, but those of layers that no token reached; returns the file, the tokens that each
        layer saw, and those that its experts did, each as often as its part of the experts that it was routed to."""
        sums = self._qwantize_sums
        reached = {name: (rank, hessian) for name, (rank, hessian) in sums.items() if hessian.tokens}
        names = {f"{rank:05d} {name}": hessian.total.cpu() for name, (rank, hessian) in reached.items()}
        for layer, experts in self._qwantize_experts.items():
            names |= {f"{rank:05d} {layer}.{name}": total.cpu() for name, rank, total in experts.totals()}
        with tempfile.NamedTemporaryFile(dir=directory, suffix=".safetensors", delete=False) as file:
            path = file.name
        save_hessians(path, names, self._qwantize_info.block_size, self._qwantize_info)
        routed = {layer: experts.tokens for layer, experts in self._qwantize_experts.items()}
        return path, {name: hessian.tokens for name, (_, hessian) in sums.items()}, routed


def _adding_to(hessian: BlockHessianSum | FullHessianSum, argument: int) -> Any:
    def hook(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        hessian.add(inputs[argument])

    return hook


def calibrate(
    model: str,
    windows: Sequence[Sequence[int]],
    block_size: int,
    out: Path,
    options: dict[str, Any],
    *,
    full: bool = False,
    settings: dict[str, Any] | None = None,
) -> tuple[HessianInfo, dict[str, list[str]]]:
    """Run the windows (token ids) through the model, in an engine of its own process, and write the Hessians of its
    linear layers' inputs to out.

    options: further arguments of `vllm.LLM`, such as tensor_parallel_size. full: all of every Hessian, not its blocks
    alone. settings: of the plugin, for the inputs that layers have behind quantized ones; None for the model as it is.

    Returns:
        What the file says about itself, and the layers that it does not have, by the reason.

    Raises:
        RuntimeError: a layer did not see every token once.
        ValueError: activations were not finite.
    """
    return in_own_process(_calibrate, model, windows, block_size, out, options, full, settings)


def _calibrate(
    model: str,
    windows: Sequence[Sequence[int]],
    block_size: int,
    out: Path,
    options: dict[str, Any],
    full: bool,
    settings: dict[str, Any] | None,
) -> tuple[HessianInfo, dict[str, list[str]]]:
    from vllm.engine.arg_utils import EngineArgs

    model_config = EngineArgs(model=model).create_model_config()
    pools = model_config.runner_type == "pooling"
    longest = max(map(len, windows)) + (0 if pools else 1)  # the token that a model must generate
    check_context(model_config, longest)
    arguments = engine_arguments(longest) | _quantization(settings, model_config.get_num_experts() > 0)
    tokens = sum(map(len, windows))
    keep_core_here()
    with engine(model=model, **arguments, **options) as llm, tempfile.TemporaryDirectory() as directory:
        uneven = llm.collective_rpc("qwantize_start", args=(block_size, full))[0]
        with tqdm(total=tokens, unit="token", unit_scale=True, desc="calibrating", disable=None) as bar:
            read_windows_through(llm, windows, bar.update, pools)
        parts = llm.collective_rpc("qwantize_finish", args=(directory,))
        unreached = {name: None for _, seen, _ in parts for name in _unreached(seen, tokens)}
        _check_routed([routed for _, _, routed in parts], tokens)
        config = llm.llm_engine.model_config
        info = HessianInfo(
            block_size=block_size,
            model=model,
            fingerprint=config_fingerprint(config.hf_config),
            tokens=tokens,
            dtype=str(config.dtype).removeprefix("torch."),
            package=__version__,
            full=full,
            behind=json.dumps(settings, sort_keys=True) if settings is not None else "",
        )
        save_hessians(out, _joined([path for path, _, _ in parts]), block_size, info)
    reasons = {f"K not being a multiple of {block_size}": uneven, "text not reaching them": list(unreached)}
    return info, {reason: names for reason, names in reasons.items() if names}


def _quantization(settings: dict[str, Any] | None, experts: bool) -> dict[str, Any]:
    """Arguments of the engine. Only the plugin can tell what experts multiply, though it quantizes nothing."""
    if settings is None and not experts:
        return {}
    given = {"ignore": ["*"]} if settings is None else settings
    return {"quantization": "qwantize", "additional_config": {"qwantize": given, MEASURE: experts}}


def engine_arguments(longest: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for calibrating on windows of at most so many tokens, the generated one included."""
    return {
        "max_model_len": longest,
        "max_num_batched_tokens": longest * _windows_at_once(longest),
        "enable_prefix_caching": False,
        "enforce_eager": True,  # hooks run where Python does
        "worker_extension_cls": f"{__name__}.{CalibrationWorker.__name__}",
    }


def read_windows_through(
    llm: Any, windows: Sequence[Sequence[int]], tell: Callable[[int], Any], pools: bool = False
) -> None:
    """Run windows (token ids) through the model: to the first token of a completion, or, if it `pools`, to what an
    encoder makes of them. tell is called with the tokens of each batch."""
    from vllm import SamplingParams

    first_token = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    task = next((task for task in _POOLING_TASKS if task in llm.supported_tasks), None)
    at_once = _windows_at_once(llm.llm_engine.model_config.max_model_len)
    for first in range(0, len(windows), at_once):
        batch = windows[first : first + at_once]
        prompts = [{"prompt_token_ids": list(window)} for window in batch]
        if pools:
            llm.encode(prompts, pooling_task=task, use_tqdm=False)
        else:
            llm.generate(prompts, first_token, use_tqdm=False)
        tell(sum(map(len, batch)))


def _windows_at_once(longest: int) -> int:
    return 1 if current_platform.is_cpu() else -(-_TOKENS_AT_ONCE // longest)


def _unreached(seen: dict[str, int], tokens: int) -> list[str]:
    """Layers that no token reached, as those of vision and audio towers.

    Raises:
        RuntimeError: tokens reached none, or some but not each once.
    """
    none = [name for name, count in seen.items() if not count]
    wrong = {name: count for name, count in seen.items() if count != tokens and (count or len(none) == len(seen))}
    if wrong:
        name, count = next(iter(wrong.items()))
        raise RuntimeError(
            f"{len(wrong)} layers did not see each of the {tokens} tokens once; {name} saw {count}. "
            "Layers that only some tokens reach cannot be calibrated yet"
        )
    return none


def _check_routed(parts: list[dict[str, float]], tokens: int) -> None:
    """The experts of all ranks together must have seen each token as often as it was routed."""
    for layer in parts[0]:
        seen = sum(part[layer] for part in parts)
        if round(seen) != tokens:
            raise RuntimeError(f"the experts of {layer} saw {seen:g} tokens, not {tokens}")


def _joined(paths: list[str]) -> dict[str, torch.Tensor]:
    """The layers' Hessians, the parts of those that are sharded along K one after the other."""
    parts: dict[str, list[torch.Tensor]] = {}
    keyed = {key: file for file in map(HessianFile, paths) for key in file.names}
    for key in sorted(keyed):  # by rank, then name
        parts.setdefault(key.partition(" ")[2], []).append(keyed[key].read_whole(key))
    return {name: torch.cat(each) for name, each in sorted(parts.items())}
