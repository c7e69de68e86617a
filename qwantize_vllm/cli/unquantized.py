"""The commands that compare settings, or measure a model as it is, want a checkpoint that sets nothing itself."""

from __future__ import annotations

import json
from pathlib import Path

_MODELOPT = "hf_quant_config.json"


def check_unquantized(model: str) -> None:
    """Of a directory, or of a model of the Hub that is in its cache; what is downloaded first is not looked at.

    Raises:
        ValueError: the checkpoint is quantized, or names settings of the plugin, which would win over any others.
    """
    directory = _directory(model)
    if directory is None or not (directory / "config.json").is_file():
        return
    config = json.loads((directory / "config.json").read_text("utf-8"))
    places = (config, config.get("text_config") or {})
    keys = ("quantization_config", "compression_config")
    found = next((place[key] for place in places for key in keys if place.get(key)), None)
    if found and found.get("quant_method") == "qwantize" and not found.get("packed"):
        raise ValueError(
            f"{model} has settings of qwantize in its config.json, which win over all others: take "
            "quantization_config out of it, and give them by --setting"
        )
    if found or (directory / _MODELOPT).is_file():
        method = (found or {}).get("quant_method", f"see {_MODELOPT}")
        raise ValueError(f"{model} is quantized already ({method}); take the unquantized checkpoint")


def _directory(model: str) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # a path, of which the commands say that it is not there
        return None
    return Path(found).parent if isinstance(found, str) else None
