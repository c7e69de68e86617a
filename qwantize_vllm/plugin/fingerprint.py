"""By what a model is recognized: its architecture and sizes, not its name, precision or quantization."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_NOT_OF_THE_MODEL = {
    "_name_or_path",
    "dtype",
    "quantization_config",
    "quantization_config_file",
    "transformers_version",
}


def config_fingerprint(hf_config: Any) -> str:
    """16 hexadecimal digits of a transformers config."""
    values = {key: value for key, value in hf_config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
