"""The load report: which layers were quantized, which were left, what it saved, lost and took."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
import weakref
from collections import Counter

import torch
from vllm.logger import init_logger

from qwantize_vllm.layer_names import matches
from qwantize_vllm.settings import QwantizeSettings

logger = init_logger(f"vllm.{__name__}")

_Energy = float | torch.Tensor


@dataclasses.dataclass(eq=False)
class _Model:
    """Names of the layers of a model that are going to be quantized, and the layers that stay as they are.

    Attributes:
        expected: the former; without_hessian: those of them that the Hessian file does not have.
        left: the latter by name and identity, with the reason.
        is_loaded: whether all of the former have been quantized once.
    """

    expected: set[str] = dataclasses.field(default_factory=set)
    without_hessian: list[str] = dataclasses.field(default_factory=list)
    left: dict[tuple[str, int], tuple[weakref.ref[torch.nn.Module], str]] = dataclasses.field(default_factory=dict)
    is_loaded: bool = False

    @functools.cached_property
    def left_layers(self) -> tuple[int, str]:
        """Bytes of the layers left, a tied weight counted once, and how many by reason.

        Counted at the first summary: later vLLM may have packed their weights, or put them on the meta device.
        """
        storages: dict[int, int] = {}
        reasons: Counter[str] = Counter()
        for reference, reason in self.left.values():
            layer = reference()
            parameters = list(layer.parameters(recurse=False)) if layer is not None else []
            if not any(parameter.numel() for parameter in parameters):
                continue  # attention and its kin are asked about too, and hold no weight
            reasons[reason] += 1
            storages |= {parameter.data_ptr(): parameter.nbytes for parameter in parameters}
        counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
        return sum(storages.values()), f"{sum(reasons.values())} left ({counted})"


class LoadReport:
    """Collects while layers are built and quantized; logs one summary when the last one of a model is done.

    A model's own draft model (layers for multi-token prediction) comes with the same settings, and is built when the
    model is loaded.
    """

    def __init__(self, settings: QwantizeSettings, packed: str | None = None) -> None:
        """packed: the format of a checkpoint whose weights are NVFP4 already; nothing is lost then."""
        self.settings, self.packed = settings, packed
        self._models = [_Model()]
        self._loading = self._models[0]
        self._quantized: dict[str, tuple[_Energy, _Energy]] = {}  # signal and noise
        self._ignored: list[str] = []
        self._from_cache = 0
        self._bytes_before = self._bytes_after = 0
        self._seconds = 0.0

    def expect(self, name: str) -> None:
        """A layer that is going to be quantized has been built."""
        self._building().expected.add(name)

    def without_hessian(self, name: str) -> None:
        """The Hessian file does not have a layer, which is searched by `optimal` instead."""
        self._building().without_hessian.append(name)

    def from_cache(self) -> None:
        """A layer was not searched, but read from cache_dir."""
        self._from_cache += 1

    def leave(self, name: str, layer: torch.nn.Module, reason: str, ignored: list[str] | None = None) -> None:
        """A layer stays as it is; ignored: the names by which the settings reached it."""
        # Not by name alone: vLLM builds layers, the embeddings of Llama among them, without one.
        self._building().left[name, id(layer)] = (weakref.ref(layer), reason)
        self._ignored += ignored or []

    def quantized(self, name: str, before: int, after: int, signal: _Energy, noise: _Energy, began: float) -> None:
        """A layer has been quantized: bytes before and after, energies, and when that began (perf_counter).

        Energies that are tensors () are looked at when the last layer is done: a GPU is not waited for until then.
        """
        model = next((each for each in self._models if name in each.expected), self._loading)
        if name in self._quantized or (self._quantized and model is not self._loading):
            self._start_over()  # a pass before this one broke off
        self._loading = model
        self._quantized[name] = signal, noise
        self._bytes_before += before
        self._bytes_after += after
        self._seconds += time.perf_counter() - began
        if self._quantized.keys() >= model.expected:
            model.is_loaded = True
            self._wait_for_energies()
            logger.info("%s", self.summary())
            if model.without_hessian:
                logger.warning(
                    "qwantize: %s has no Hessian of %d layers, which were quantized by scale_search optimal: %s",
                    self.settings.hessian,
                    len(model.without_hessian),
                    ", ".join(model.without_hessian),
                )
            for pattern in self.unused_patterns():
                logger.warning("qwantize: ignore pattern %r named no layer of this model", pattern)
            self._start_over()  # weights may be reloaded later

    def _building(self) -> _Model:
        """The model whose layers are being built."""
        if self._models[-1].is_loaded:
            self._models.append(_Model())
        return self._models[-1]

    def _wait_for_energies(self) -> None:
        began = time.perf_counter()
        self._quantized = {name: (float(signal), float(noise)) for name, (signal, noise) in self._quantized.items()}
        self._seconds += time.perf_counter() - began

    def _start_over(self) -> None:
        self._quantized, self._bytes_before, self._bytes_after, self._seconds = {}, 0, 0, 0.0
        self._from_cache = 0

    def summary(self) -> str:
        """One line: layers, GiB before and after, mean signal-to-noise ratio, seconds.

        The seconds are those that loading waited; what a GPU does while the next layer is read is not in them.
        """
        left_bytes, left = self._loading.left_layers
        snr = [10 * math.log10(signal / noise) for signal, noise in self._quantized.values() if noise]
        mean = f"{sum(snr) / len(snr):.2f} dB" if snr else "infinite"
        if self.packed:
            total = self._bytes_after + left_bytes
            return (
                f"qwantize summary: {len(self._quantized)} layers are NVFP4 in the checkpoint ({self.packed}), "
                f"{left}; weights {_gib(total)} GiB (NVFP4 {_gib(self._bytes_after)}, left {_gib(left_bytes)}); "
                f"{self._seconds:.2f} s"
            )
        cached = f", {self._from_cache} of them from cache_dir" if self._from_cache else ""
        before, after = self._bytes_before + left_bytes, self._bytes_after + left_bytes
        return (
            f"qwantize summary: {len(self._quantized)} layers quantized to NVFP4 "
            f"({self._how()}, blocks of {self.settings.block_size}{cached}), {left}; "
            f"weights {_gib(before)} -> {_gib(after)} GiB "
            f"(quantized layers {_gib(self._bytes_before)} -> {_gib(self._bytes_after)}, "
            f"left {_gib(left_bytes)}); mean signal-to-noise {mean}; {self._seconds:.2f} s"
        )

    def _how(self) -> str:
        refine = self.settings.refine
        return self.settings.scale_search if refine == "none" else f"{self.settings.scale_search} + {refine}"

    def reason(self, layer: torch.nn.Module) -> str | None:
        """Why a layer stays as it is; None where nothing was said of it."""
        left = itertools.chain(*(model.left.items() for model in self._models))
        return next((reason for (_, key), (_, reason) in left if key == id(layer)), None)

    def unused_patterns(self) -> list[str]:
        """Of `ignore`, those that have named no layer so far."""
        return [pattern for pattern in self.settings.ignore if not any(matches(n, [pattern]) for n in self._ignored)]


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f}"
