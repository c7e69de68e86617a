"""Which layers a list of patterns names, members of fused layers included."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

_REGEX = "re:"
# Words in the names that vLLM's multimodal models give to encoders of images and sounds, and to what follows them.
_TOWER = frozenset(
    (
        *("vision", "visual", "image", "video", "vit", "siglip", "clip", "sam", "vpm"),
        *("audio", "sound", "speech", "whisper", "apm"),
        *("resampler", "qformer", "abstractor", "projector", "connector", "merger", "aligner"),
    )
)


def check_pattern(pattern: str) -> None:
    """Raise ValueError where a `re:` pattern is not a regular expression."""
    if not pattern:
        raise ValueError("an empty pattern names no layer")
    if pattern.startswith(_REGEX):
        try:
            re.compile(pattern[len(_REGEX) :])
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any pattern names the layer: an exact name, a glob, or `re:` and a regular expression.

    Exact names and globs must cover the whole name; a regular expression must match from its start.
    """
    return any(
        re.match(pattern[len(_REGEX) :], name) is not None
        if pattern.startswith(_REGEX)
        else fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
    )


def fused_members(name: str, packed_modules: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the checkpoint's layers that a model's layer is fused from; the name itself where it is not fused."""
    parent, _, last = name.rpartition(".")
    members = packed_modules.get(last, [last])
    return [f"{parent}.{member}" if parent else member for member in members]


def named_parts(name: str, patterns: Sequence[str], packed_modules: Mapping[str, Sequence[str]]) -> list[str]:
    """The names by which patterns reach a layer: its own, or those of the members that they name; else empty."""
    if matches(name, patterns):
        return [name]
    return [member for member in fused_members(name, packed_modules) if matches(member, patterns)]


def in_tower(name: str) -> bool:
    """Whether a layer of a multimodal model belongs to its encoders of images or sounds, or to their connectors.

    Only the part before the first number counts: what the layers of a language model are called inside says nothing.
    """
    head = re.split(r"\.\d+(?:\.|$)", name, maxsplit=1)[0]
    return not _TOWER.isdisjoint(re.split(r"[._]", head.lower()))
