"""The page of `qwantize inspect`: one HTML file that needs no other, with everything of the checkpoint escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from qwantize_vllm.cli.inspect import chart
from qwantize_vllm.cli.inspect.summary import (
    OUTPUT,
    WEIGHT,
    Totals,
    dense_bytes,
    error_of,
    metrics,
    place,
    ranking,
    size,
    total,
    worst_first,
)

if TYPE_CHECKING:  # imports vLLM
    from qwantize_vllm.plugin.inspection import InspectedLayer, Inspection

_TITLES = {OUTPUT: "Output error", WEIGHT: "Weight error"}
_MEANINGS = {
    WEIGHT: "‖W − Ŵ‖ / ‖W‖, Ŵ what the codes and scales stand for.",
    OUTPUT: "√(Σ rᵀHr / Σ wᵀHw) over the blocks w of every row, r = w − ŵ, H = Σ x xᵀ of the block's inputs: the error "
    "of each block's part of the layer's output on the text of the Hessians. What different blocks have in common, or "
    "cancel, is not in it.",
}


def render(inspection: Inspection, version: str) -> str:
    """The page as text, to be written as UTF-8."""
    sections = [
        _head(inspection, version),
        _cards(inspection),
        *(_charts(inspection, metric) for metric in metrics() if _has(inspection, metric)),
        _layers(inspection),
        _left(inspection),
        _notes(inspection),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>qwantize inspect: {escape(inspection.model)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n"
        f"<body>\n{chr(10).join(sections)}\n<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _has(inspection: Inspection, metric: str) -> bool:
    return any(error_of(layer, name, metric) is not None for layer in inspection.layers for name in inspection.settings)


def _percent(value: float | None, places: int = 2) -> str:
    return "" if value is None else f"{100 * value:.{places}f}"


def _head(inspection: Inspection, version: str) -> str:
    facts = [
        f"{len(inspection.layers)} linear layers",
        f"{size(dense_bytes(inspection))} of weights in {inspection.dtype}",
    ]
    if inspection.hessian:
        file = inspection.hessian
        facts.append(f"Hessians of {file['tokens']:,} tokens, blocks of {file['block_size']} ({file['path']})")
    facts.append(f"qwantize-vllm {version}")
    return f'<h1>{escape(inspection.model)}</h1>\n<p class="soft">{escape(" · ".join(facts))}</p>'


def _cards(inspection: Inspection) -> str:
    _, metric = ranking(inspection)
    first = total(inspection, next(iter(inspection.settings)))
    cards = [
        _card(inspection, number, name, total(inspection, name), first.mean.get(metric), metric)
        for number, name in enumerate(inspection.settings)
    ]
    return f'<div class="cards">\n{chr(10).join(cards)}\n</div>'


def _card(inspection: Inspection, number: int, name: str, totals: Totals, baseline: float | None, metric: str) -> str:
    error = totals.mean.get(metric)
    delta = ""
    if number and error is not None and baseline:
        against = escape(next(iter(inspection.settings)))
        change = f"{100 * (error / baseline - 1):+.1f}".replace("-", "−")
        delta = f'<span class="delta">{change} % against {against}</span>'
    rows = {f"{_TITLES[metric].lower()}, layers together": f"{_percent(totals.whole.get(metric))} %"}
    if metric == OUTPUT:
        rows["weight error, mean"] = f"{_percent(totals.mean.get(WEIGHT))} %"
    rows["signal-to-noise, mean"] = "" if totals.snr_db is None else f"{totals.snr_db:.2f} dB"
    rows["weights"] = f"{size(totals.nbytes)} ({100 * totals.nbytes / max(1, dense_bytes(inspection)):.0f} %)"
    rows["layers quantized, left"] = f"{totals.quantized}, {totals.left}"
    if totals.without_hessian:
        rows["without Hessian, by optimal"] = str(totals.without_hessian)
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows.items())
    big = f"{_percent(error)} %" if error is not None else "–"
    return (
        f'<section class="card" style="{chart.color(number)}"><h3>{escape(name)}</h3>'
        f'<div class="big">{big}{delta}</div>'
        f'<div class="soft">{_TITLES[metric].lower()}, mean over layers</div><dl>{items}</dl></section>'
    )


def _charts(inspection: Inspection, metric: str) -> str:
    kinds: dict[str, list[InspectedLayer]] = {}
    for layer in inspection.layers:
        kinds.setdefault(place(layer.name)[0], []).append(layer)
    errors = [error_of(layer, name, metric) for layer in inspection.layers for name in inspection.settings]
    top = 100 * max(error for error in errors if error is not None)
    legend = "".join(
        f'<span style="{chart.color(number)}">{escape(name)}</span>' for number, name in enumerate(inspection.settings)
    )
    short = _short_names(kinds)
    panels = "\n".join(_panel(inspection, short[kind], layers, metric, top) for kind, layers in kinds.items())
    return (
        f"<h2>{_TITLES[metric]} by layer</h2>\n"
        f'<p class="soft">Percent, over the layer index, one panel for each projection, all with one scale. '
        f"Ringed, and named above: the worst under {escape(list(inspection.settings)[-1])}.</p>\n"
        f'<div class="legend">{legend}</div>\n<div class="panels">\n{panels}\n</div>'
    )


def _panel(inspection: Inspection, kind: str, layers: list[InspectedLayer], metric: str, top: float) -> str:
    series = []
    for name in inspection.settings:
        points = []
        for layer in layers:
            error = error_of(layer, name, metric)
            if error is not None:
                title = f"{layer.name}, {name}: {100 * error:.2f} %"
                points.append(chart.Point(place(layer.name)[1] or 0, 100 * error, title))
        series.append(points)
    shapes = {f"{layer.shape[0]} × {layer.shape[1]}" for layer in layers}
    caption = f'{escape(kind)} <span class="soft">{escape(", ".join(sorted(shapes)))}</span>'
    if series[-1]:
        worst = chart.worst(series[-1])
        style = chart.color(len(series) - 1)
        caption += f'<span class="worst" style="{style}">{worst.index}: {worst.percent:.2f} %</span>'
    label = f"{_TITLES[metric]} of {kind} by layer"
    drawn = chart.lines(series, top, label) if any(series) else '<p class="soft">not known, or not quantized</p>'
    return f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>"


def _short_names(kinds: Iterable[str]) -> dict[str, str]:
    """The last components of each name, as many as tell it from the others."""
    kinds = list(kinds)
    short = {}
    for kind in kinds:
        parts = kind.split(".")
        for count in range(1, len(parts) + 1):
            tail = "." + ".".join(parts[-count:])
            if sum(f".{other}".endswith(tail) for other in kinds) == 1:
                break
        short[kind] = tail[1:]
    return short


def _layers(inspection: Inspection) -> str:
    setting, metric = ranking(inspection)
    groups = [(each, "%") for each in metrics() if _has(inspection, each)]
    names = list(inspection.settings)
    above, below, column = ["<th></th>"], ['<th data-column="0" data-text><button>layer</button></th>'], 1
    for each, unit in [*groups, ("snr", "dB")]:
        above.append(f'<th class="first" colspan="{len(names)}">{_TITLES.get(each, "Signal-to-noise")}, {unit}</th>')
        for number, name in enumerate(names):
            sort = ' aria-sort="descending"' if (name, each) == (setting, metric) else ""
            first = ' class="first"' if number == 0 else ""
            below.append(f'<th{first} data-column="{column}"{sort}><button>{escape(name)}</button></th>')
            column += 1
    served = _memory_columns(inspection)
    above.append(f'<th class="first" colspan="{1 + len(served)}">Memory</th>')
    for number, name in enumerate(["as it is", *served]):
        first = ' class="first"' if number == 0 else ""
        below.append(f'<th{first} data-column="{column}"><button>{escape(name)}</button></th>')
        column += 1
    tops = {each: max(e for layer in inspection.layers for e in _errors(layer, names, each)) for each, _ in groups}
    rows = "\n".join(_row(layer, names, tops, served) for layer in worst_first(inspection))
    return (
        f'<h2>Layers</h2>\n<p class="soft">Worst first, by {_TITLES[metric].lower()} under {escape(setting)}. '
        "A click on a heading sorts by it.</p>\n"
        '<input type="search" id="filter" placeholder="only layers whose name has …" aria-label="filter layers">\n'
        f'<div class="scroll"><table id="layers"><thead><tr>{"".join(above)}</tr><tr>{"".join(below)}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _errors(layer: InspectedLayer, names: list[str], metric: str) -> list[float]:
    return [error or 0.0 for name in names for error in [error_of(layer, name, metric)]]


def _memory_columns(inspection: Inspection) -> dict[str, str]:
    """Headings of the columns of memory, each with its setting: one for all settings where they take the same."""
    names = list(inspection.settings)
    same = all(len({_kept(layer, name) for name in names}) == 1 for layer in inspection.layers)
    return {"quantized": names[0]} if same else {name: name for name in names}


def _kept(layer: InspectedLayer, name: str) -> int:
    """Bytes of a layer under a setting."""
    result = layer.results[name]
    return layer.nbytes if isinstance(result, str) else result.nbytes


def _row(layer: InspectedLayer, names: list[str], tops: dict[str, float], served: dict[str, str]) -> str:
    n, k = layer.shape
    members = "" if layer.members == [layer.name] else f' title="{escape("fused from " + ", ".join(layer.members))}"'
    cells = [
        f'<td data-v="{escape(layer.name)}"{members}><code>{escape(layer.name)}</code>'
        f'<span class="shape">{n} × {k}</span></td>'
    ]
    for metric, top in tops.items():
        for number, name in enumerate(names):
            cells.append(_error_cell(layer, name, metric, top, number))
    for number, name in enumerate(names):
        result = layer.results[name]
        ratio = None if isinstance(result, str) or math.isinf(result.snr_db) else result.snr_db
        cells.append(_cell(ratio, "" if ratio is None else f"{ratio:.2f}", number == 0))
    cells.append(_cell(layer.nbytes, size(layer.nbytes), True))
    for name in served.values():
        cells.append(_cell(_kept(layer, name), size(_kept(layer, name)), False))
    return f"<tr>{''.join(cells)}</tr>"


def _error_cell(layer: InspectedLayer, name: str, metric: str, top: float, number: int) -> str:
    result, error = layer.results[name], error_of(layer, name, metric)
    first = " first" if number == 0 else ""
    if error is None:
        why = escape(result) if isinstance(result, str) else "no Hessian"
        return f'<td class="soft{first}" data-v="" title="{why}">{"left" if isinstance(result, str) else "–"}</td>'
    style = f"{chart.color(number)};--w:{100 * error / top if top else 0:.0f}%"
    return f'<td class="bar{first}" style="{style}" data-v="{error:.6g}">{_percent(error)}</td>'


def _cell(value: float | None, text: str, first: bool) -> str:
    data = "" if value is None else f"{value:.6g}"
    return f'<td{" class=" + chr(34) + "first" + chr(34) if first else ""} data-v="{data}">{escape(text)}</td>'


def _left(inspection: Inspection) -> str:
    """What stays as it is: under any setting, and under each."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for module in inspection.left:
        groups.setdefault(module.reason, []).append((module.name, module.nbytes))
    for name in inspection.settings:
        for layer in inspection.layers:
            result = layer.results[name]
            if isinstance(result, str):
                groups.setdefault(f"{result}, under {name}", []).append((layer.name, layer.nbytes))
    parts = []
    for reason, modules in groups.items():
        names = "".join(f"<li><code>{escape(each)}</code></li>" for each, _ in modules)
        label = f"{len(modules)} {reason} ({size(sum(nbytes for _, nbytes in modules))})"
        parts.append(f'<details><summary>{escape(label)}</summary><ul class="names">{names}</ul></details>')
    for name, patterns in inspection.unused.items():
        parts += [
            f"<p>The ignore pattern <code>{escape(pattern)}</code> of {escape(name)} names no layer of this model.</p>"
            for pattern in patterns
        ]
    return f"<h2>What stays as it is</h2>\n{chr(10).join(parts)}"


def _notes(inspection: Inspection) -> str:
    meanings = "".join(
        f"<p><b>{_TITLES[metric]}</b>: {escape(_MEANINGS[metric])}</p>"
        for metric in metrics()
        if _has(inspection, metric)
    )
    settings = "".join(
        f"<p><b>{escape(name)}</b>: <code>{escape(', '.join(f'{k}: {v}' for k, v in values.items()))}</code></p>"
        for name, values in inspection.settings.items()
    )
    return (
        f"<h2>What the figures are</h2>\n{meanings}"
        "<p><b>Signal-to-noise</b>: 10·log₁₀(‖W‖² / ‖W − Ŵ‖²). <b>Memory</b>: codes, block scales and global scales; "
        "layouts that kernels repack them to may be padded.</p>"
        "<p>Layers are those that vLLM serves, fused as it fuses them, with the global scales that the plugin gives "
        "them on one GPU or several, each quantized by the code that quantizes it while the model loads.</p>\n"
        f"<h2>Settings</h2>\n{settings}"
    )
