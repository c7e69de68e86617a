"""Checkpoints on disk: reading safetensors, the layouts of quantized ones, exporting to them, the cache of layers."""

from qwantize_vllm.checkpoint.files import Checkpoint
from qwantize_vllm.checkpoint.layouts import LAYOUTS, Layout

__all__ = ["LAYOUTS", "Checkpoint", "Layout"]
