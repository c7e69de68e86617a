"""Settings as commands take them: the name of a search, or a YAML file."""

from __future__ import annotations

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
