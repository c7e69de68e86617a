"""Whose a setting is: the user's, who may name any file, or the checkpoint's, which may name its own files only.

A config.json may come from anybody. Of all settings one names a file, `hessian`. Named by the checkpoint it is a
relative path, read below the checkpoint's directory as it lies on this machine, and nowhere else; nothing is downloaded
for it. vLLM hands over the settings of config.json and those of `--hf-overrides` alike: they are the user's where the
user's overrides name the very same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from vllm.config import VllmConfig

PATHS = ("hessian",)  # the settings that name files
# Where vLLM looks for the settings of a checkpoint, and where overrides can replace them.
_KEYS = (("quantization_config",), ("text_config", "quantization_config"), ("compression_config",))


def with_trusted_paths(given: Mapping[str, Any], config: VllmConfig) -> dict[str, Any]:
    """Settings that reached vLLM as a model's quantization config, their paths such that they may be read.

    Raises:
        ValueError: the checkpoint's own settings name a file outside of the checkpoint, or one that it lacks.
    """
    users = _overridden(config.model_config.hf_overrides)
    settings = dict(given)
    for key in PATHS:
        value = settings.get(key)
        if value is not None and not any(value == own.get(key) for own in users):
            settings[key] = _inside(key, value, _directory(config))
    return settings


def _overridden(overrides: Any) -> list[Mapping[str, Any]]:
    """Settings that the user gave by --hf-overrides. What a function does to the config counts as the checkpoint's."""
    found = []
    for keys in _KEYS:
        value = overrides
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            found.append(value)
    return found


def _directory(config: VllmConfig) -> Path | None:
    """Where the files of the checkpoint lie on this machine; None if they are nowhere, or the model is no directory."""
    from huggingface_hub import try_to_load_from_cache

    model = config.model_config.hf_config_path or config.model_config.model
    if Path(model).exists():
        return Path(model) if Path(model).is_dir() else None
    cache = config.load_config.download_dir
    found = try_to_load_from_cache(model, "config.json", cache_dir=cache, revision=config.model_config.revision)
    return Path(found).parent if isinstance(found, str) else None


def _inside(key: str, value: Any, directory: Path | None) -> str:
    """The file that a checkpoint's path names, all links followed.

    Raises:
        ValueError: as `with_trusted_paths`.
    """
    rule = (
        f"qwantize settings: {key} is {value!r} in the checkpoint's own config, which may name files of the checkpoint "
        f"only, by a path relative to its directory ({directory or 'which is not on this machine'})"
    )
    advice = f'to read another file, name it yourself: --additional-config \'{{"qwantize": {{"{key}": …}}}}\''
    if not isinstance(value, str) or "\0" in value or PurePath(value).is_absolute() or ".." in PurePath(value).parts:
        raise ValueError(f"{rule}; {advice}")
    if directory is None:
        raise ValueError(f"{rule}, and are never downloaded for it; {advice}")
    file = (directory / value).resolve()
    if not any(file.is_relative_to(root) for root in _roots(directory)):
        raise ValueError(f"{rule}; this one is a link that leads out of it; {advice}")
    if not file.is_file():
        raise ValueError(f"{rule}; there is no such file in it; {advice}")
    return str(file)


def _roots(directory: Path) -> list[Path]:
    """The checkpoint's directory, and if that is a snapshot in the Hub's cache, the folder its links lead to."""
    root = directory.resolve()
    snapshot = root.parent.name == "snapshots" and root.parents[1].name.startswith("models--")
    return [root, root.parents[1] / "blobs"] if snapshot else [root]
