"""Which layers belong to a multimodal model's encoders of images and sounds, and to what connects them.

vLLM marks them while it builds them, by a context manager of the model, and says it nowhere else: some models give the
layers in it names that tell nothing (in BLIP-2 `encoder.layers.0`, without `vision_model`). So that manager is wrapped,
to be seen. Where a model marks classes, what is built by them is known by wrapping their constructors meanwhile.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.models.interfaces import SupportsMultiModal

from qwantize_vllm.layer_names import in_tower

_building: contextvars.ContextVar[bool] = contextvars.ContextVar("building a tower", default=False)


def is_of_tower(name: str) -> bool:
    """Whether the layer that is being built belongs to a tower. Called while vLLM builds the model."""
    if get_current_vllm_config().model_config.multimodal_config is None:
        return False
    return _building.get() or in_tower(name)


@contextlib.contextmanager
def _built_here() -> Iterator[None]:
    outside = _building.set(True)
    try:
        yield
    finally:
        _building.reset(outside)


@contextlib.contextmanager
def _built_by(targets: type | tuple[type, ...]) -> Iterator[None]:
    classes = targets if isinstance(targets, tuple) else (targets,)
    constructors = [each.__init__ for each in classes]  # type: ignore[misc]
    for each, construct in zip(classes, constructors, strict=True):
        each.__init__ = _built_here()(construct)  # type: ignore[misc]
    try:
        yield
    finally:
        for each, construct in zip(classes, constructors, strict=True):
            each.__init__ = construct  # type: ignore[misc]


def watch_towers() -> None:
    """Make it known when vLLM builds a tower; may be called more than once."""
    mark = SupportsMultiModal._mark_tower_model
    if hasattr(mark, "watched_by_qwantize"):
        return

    @contextlib.contextmanager
    @functools.wraps(mark)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        targets = kwargs.get("targets")
        with _built_here() if targets is None else _built_by(targets), mark(self, *args, **kwargs):
            yield

    watched.watched_by_qwantize = True  # type: ignore[attr-defined]
    SupportsMultiModal._mark_tower_model = watched
