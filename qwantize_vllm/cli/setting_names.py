"""Settings as commands take them: the name of a search, or a YAML file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwantize_vllm.settings import read_settings_file, resolve_settings

SEARCHES = ("naive", "optimal")  # those that need nothing else


def settings_named(name: str) -> dict[str, Any]:
    """The keys that a name stands for.

    Raises:
        ValueError: a key or a value is wrong.
        FileNotFoundError: there is no such file.
    """
    values = {"scale_search": name} if name in SEARCHES else read_settings_file(name)
    resolve_settings({name: values})
    return values


def short_names(names: Iterable[str]) -> dict[str, str]:
    """For tables and plots: of a file its stem, unless another name would then read the same."""
    names = list(names)
    stems = {name: Path(name).stem if name.endswith((".yaml", ".yml")) else name for name in names}
    count = Counter(stems.values())
    return {name: stem if count[stem] == 1 else name for name, stem in stems.items()}
