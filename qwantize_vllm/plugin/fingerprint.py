"""By what a model is recognized, its architecture and sizes, not its name, precision or quantization; and by what this
package is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import qwantize_vllm

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


def sources_fingerprint(folder: Path = Path(qwantize_vllm.__file__).parent) -> str:
    """16 hexadecimal digits of a package's Python files, which in a clone change between two versions too."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(json.dumps([file.relative_to(folder).as_posix(), file.read_text()]).encode())
    return digest.hexdigest()[:16]
