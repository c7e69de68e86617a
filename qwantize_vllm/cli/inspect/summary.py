"""What the table, the JSON and the page of `qwantize inspect` have in common: records of layers, and totals."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imports vLLM
    from qwantize_vllm.plugin.inspection import InspectedLayer, Inspection, Measured

WEIGHT, OUTPUT = "weight_error", "output_error"


@dataclasses.dataclass(frozen=True)
class Totals:
    """One setting over all layers that it quantizes.

    Attributes:
        quantized, left: numbers of linear layers.
        mean: by metric, the mean over layers of their errors; a metric that no layer has is not there.
        whole: by metric, the square root of the noise of all layers over the signal of all layers.
        snr_db: the mean over layers, those without any error left out; None where there is none with.
        nbytes: of all weights of the model as served: quantized, left and not linear.
        without_hessian: layers that a `hessian` setting had to search by `optimal`.
    """

    quantized: int
    left: int
    mean: dict[str, float]
    whole: dict[str, float]
    snr_db: float | None
    nbytes: int
    without_hessian: int


def total(inspection: Inspection, setting: str) -> Totals:
    """The totals of one setting."""
    results = [(layer, layer.results[setting]) for layer in inspection.layers]
    measured = [result for _, result in results if not isinstance(result, str)]
    ratios = [each.snr_db for each in measured if math.isfinite(each.snr_db)]
    errors = {metric: [e for each in measured if (e := getattr(each, metric)) is not None] for metric in metrics()}
    kept = sum(layer.nbytes if isinstance(result, str) else result.nbytes for layer, result in results)
    search = inspection.settings[setting]["scale_search"]
    return Totals(
        quantized=len(measured),
        left=len(results) - len(measured),
        mean={metric: statistics.fmean(values) for metric, values in errors.items() if values},
        whole={metric: _whole(measured, metric) for metric, values in errors.items() if values},
        snr_db=statistics.fmean(ratios) if ratios else None,
        nbytes=kept + sum(module.nbytes for module in inspection.left),
        without_hessian=sum(each.search != search for each in measured),
    )


def _whole(measured: list[Measured], metric: str) -> float:
    if metric == WEIGHT:
        pairs = [(each.signal, each.noise) for each in measured]
    else:
        pairs = [(each.output_signal or 0.0, each.output_noise or 0.0) for each in measured]
    signal, noise = (sum(each) for each in zip(*pairs, strict=True))
    return math.sqrt(max(0.0, noise) / signal) if signal > 0 else 0.0


def metrics() -> tuple[str, ...]:
    """The errors of a layer, the more telling first."""
    return OUTPUT, WEIGHT


def ranking(inspection: Inspection) -> tuple[str, str]:
    """(setting, metric) by which layers are ordered: the last setting's output error, without Hessians weight error."""
    setting = list(inspection.settings)[-1]
    has_output = any(error_of(layer, setting, OUTPUT) is not None for layer in inspection.layers)
    return setting, OUTPUT if has_output else WEIGHT


def error_of(layer: InspectedLayer, setting: str, metric: str) -> float | None:
    """None where the setting leaves the layer, or its output error is not known."""
    result = layer.results[setting]
    error: float | None = None if isinstance(result, str) else getattr(result, metric)
    return error


def worst_first(inspection: Inspection) -> list[InspectedLayer]:
    """All layers, those that the setting of the ranking leaves at the end."""
    setting, metric = ranking(inspection)
    errors = {layer.name: error_of(layer, setting, metric) for layer in inspection.layers}
    return sorted(inspection.layers, key=lambda layer: -(-1 if (e := errors[layer.name]) is None else e))


def dense_bytes(inspection: Inspection) -> int:
    """Of all weights, in the dtype in which they would be served."""
    return sum(layer.nbytes for layer in inspection.layers) + sum(module.nbytes for module in inspection.left)


def size(nbytes: float) -> str:
    """Bytes in the unit that leaves them between 1 and 1024, if there is one."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3f} GiB"


def place(name: str) -> tuple[str, int | None]:
    """(projection, index) of a layer's name: its first number is the index, the name without it the projection."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    if match is None:
        return name, None
    return f"{name[: match.start()]}*{name[match.end() :]}", int(match.group())


def left_by_reason(inspection: Inspection) -> dict[str, tuple[int, int]]:
    """(modules, bytes) of what no setting quantizes."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for module in inspection.left:
        count[module.reason] += 1
        size[module.reason] += module.nbytes
    return {reason: (count[reason], size[reason]) for reason in count}


def to_json(inspection: Inspection, version: str) -> dict[str, Any]:
    """Everything, worst layers first; what is infinite or not known is None."""
    return {
        "model": inspection.model,
        "package": version,
        "dtype": inspection.dtype,
        "hessian": inspection.hessian,
        "weight_bytes": dense_bytes(inspection),
        "settings": {
            name: {
                "settings": values,
                "unused_ignore_patterns": inspection.unused[name],
                "totals": dataclasses.asdict(total(inspection, name)),
            }
            for name, values in inspection.settings.items()
        },
        "ranking": dict(zip(("setting", "metric"), ranking(inspection), strict=True)),
        "layers": [_layer_record(layer) for layer in worst_first(inspection)],
        "left": [dataclasses.asdict(module) for module in inspection.left],
    }


def _layer_record(layer: InspectedLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "members": layer.members,
        "shape": list(layer.shape),
        "bytes": layer.nbytes,
        "results": {name: _result_record(result) for name, result in layer.results.items()},
    }


def _result_record(result: Measured | str) -> dict[str, Any]:
    if isinstance(result, str):
        return {"left": result}
    return {
        WEIGHT: result.weight_error,
        "snr_db": result.snr_db if math.isfinite(result.snr_db) else None,
        OUTPUT: result.output_error,
        "bytes": result.nbytes,
        "search": result.search,
        "energies": {
            "signal": result.signal,
            "noise": result.noise,
            "output_signal": result.output_signal,
            "output_noise": result.output_noise,
        },
    }
