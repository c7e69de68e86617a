"""Everything a user can set, and where it is read from.

Sources, first wins, key by key:

1. the checkpoint's `quantization_config`, which `--hf-overrides '{"quantization_config": {...}}'` sets or replaces, or
   where there is none the file of `--hf-overrides '{"quantization_config_file": "x.yaml"}'`;
2. `--additional-config '{"qwantize": {...}}'`;
3. the variable QWANTIZE_CONFIG: the path of a YAML file;
4. the defaults below.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from qwantize_vllm.layer_names import check_pattern

ENVIRONMENT_VARIABLE = "QWANTIZE_CONFIG"


class QwantizeSettings(pydantic.BaseModel):
    """Settings of the plugin. Every field can be given by any source; unknown keys are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

    scale_search: Literal["naive", "optimal", "hessian"] = pydantic.Field(
        "optimal",
        description="How each block's scale is chosen: snap(amax/6), least weight error, or least output error "
        "given block Hessians.",
    )
    block_size: Literal[16, 32] = pydantic.Field(16, description="Weights a block scale covers, along the input.")
    global_scale: Literal["amax", "amax_per_member", "none"] = pydantic.Field(
        "amax",
        description="One float32 per layer, max|w|/(6*448), shared by the members of a fused layer as in other NVFP4 "
        "checkpoints; one per member (q_proj, k_proj, v_proj), to reproduce what was measured on unfused weights, "
        "slower; or 1.",
    )
    hessian: Path | None = pydantic.Field(
        None, strict=False, description="Safetensors file of Hessians, for scale_search: hessian."
    )
    refine: Literal["none", "codes", "gptq"] = pydantic.Field(
        "none",
        description="With scale_search: hessian, what follows the choice of scales: nothing; codes are changed as long "
        "as the output error of their block falls; or blocks are quantized one after the other, each repairing what "
        "those before it broke, which is slow and needs the full Hessians of `qwantize calibrate --full`.",
    )
    gptq_damping: float = pydantic.Field(
        0.01,
        gt=0,
        allow_inf_nan=False,
        description="For refine: gptq, what is added to the Hessian's diagonal, as a part of its mean.",
    )
    gptq_order: Literal["loss", "natural"] = pydantic.Field(
        "loss", description="For refine: gptq, which blocks come first: those that lose most, or as they lie."
    )
    gptq_sweeps: int = pydantic.Field(
        0, ge=0, description="For refine: gptq, how often codes are refined again, each block given all others."
    )
    ignore: tuple[str, ...] = pydantic.Field(
        (),
        strict=False,
        description="Layers left unquantized: an exact name, a glob, or re: and a regular expression. "
        "A member of a fused layer (q_proj, gate_proj) may be named.",
    )
    cache_dir: Path | None = pydantic.Field(
        None,
        strict=False,
        description="Directory in which quantized layers are kept, and looked for at the next start; not in a "
        "checkpoint's own settings.",
    )
    towers: Literal["leave", "quantize"] = pydantic.Field(
        "leave",
        description="Vision and audio encoders of multimodal models, and what connects them to the language model, "
        "known by their names (visual, vision_tower, audio_encoder, projector, ...).",
    )
    quantize_gates: bool = pydantic.Field(
        False,
        description="Also quantize the gates of mixtures of experts, which are tiny and decide who computes: left as "
        "they are by default. Where vLLM has a kernel of its own for a gate, it stays as it is in any case.",
    )
    fuse_norms: bool = pydantic.Field(
        True,
        description="With one or two tokens, have the kernel of a product also do the RMS norm before it and the "
        "SwiGLU gate after it, by a pass over the graph that vLLM compiles; on GPUs where that is faster.",
    )
    strict: bool = pydantic.Field(
        False,
        description="Refuse to start where a layer cannot be quantized, or a fused one is named by ignore in part, "
        "instead of leaving it as it is; where it has no Hessian in the file, or an expert one that no token reached, "
        "instead of searching it by optimal; and where an export is not what was written.",
    )
    backend: Literal["auto", "reference", "dequantize", "fused", "vllm", "marlin", "humming"] = pydantic.Field(
        "auto",
        description="Matmul backend; auto chooses by device and number of tokens, vllm is the NVFP4 kernel that vLLM "
        "itself selects for 16-bit activations (of experts: Marlin), marlin and humming are kernels of vLLM by name.",
    )

    @pydantic.field_validator("ignore", mode="before")
    @classmethod
    def _check_ignore(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or not all(isinstance(pattern, str) for pattern in value):
            raise ValueError("must be a list of strings: layer names, globs, or re: and a regular expression")
        for pattern in value:
            check_pattern(pattern)
        return tuple(value)

    @pydantic.model_validator(mode="after")
    def _check_backend(self) -> QwantizeSettings:
        if self.backend in ("vllm", "marlin", "humming"):
            if self.block_size != 16:
                raise ValueError(f"backend {self.backend!r} takes blocks of 16, block_size is {self.block_size}")
            if self.global_scale == "amax_per_member":
                raise ValueError(f"backend {self.backend!r} takes one global scale a layer: not amax_per_member")
        return self

    @pydantic.model_validator(mode="after")
    def _check_hessian(self, info: pydantic.ValidationInfo) -> QwantizeSettings:
        if self.scale_search == "hessian" and self.hessian is None:
            raise ValueError(
                "scale_search 'hessian' needs the key hessian: the path of a block-Hessian file (.safetensors)"
            )
        if self.hessian is not None and self.scale_search != "hessian":
            raise ValueError(f"hessian is given but scale_search is {self.scale_search!r}; set scale_search: hessian")
        if self.refine != "none" and self.scale_search != "hessian":
            raise ValueError(f"refine {self.refine!r} needs scale_search: hessian, got {self.scale_search!r}")
        look = (info.context or {}).get("look_for_files", True)
        if look and self.hessian is not None and not self.hessian.is_file():
            raise ValueError(f"hessian: there is no file {self.hessian}; give the path of a block-Hessian file")
        return self


def resolve_settings(
    layers: Mapping[str, Mapping[str, Any]], look_for_files: bool = True
) -> tuple[QwantizeSettings, dict[str, str]]:
    """Merge sources, key by key, and validate.

    Args:
        layers: settings by the name of their source, strongest first.
        look_for_files: refuse files that do not exist; False where it is not known yet whether they may be read.

    Returns:
        The settings, and for each key that a source gave, the name of that source.

    Raises:
        ValueError: an unknown key, a wrong type or value: names the key, its source, what was given
            and what is allowed.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, values in layers.items():
        if not isinstance(values, Mapping):
            raise ValueError(f"qwantize settings from {source} must be a mapping of keys, got {values!r}")
        for key, value in values.items():
            if key not in merged:
                merged[key], origin[key] = value, source
    try:
        return QwantizeSettings.model_validate(merged, context={"look_for_files": look_for_files}), origin
    except pydantic.ValidationError as error:
        raise ValueError("\n".join(_explain(detail, origin) for detail in error.errors())) from None


def read_settings_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) settings file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"qwantize settings file {path} does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"qwantize settings file {path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(
            f"qwantize settings file {path} must hold a mapping such as 'scale_search: optimal', "
            f"got {type(content).__name__}"
        )
    return content


def environment_settings() -> dict[str, Any]:
    """What the file named by QWANTIZE_CONFIG holds; empty where the variable is unset or empty.

    Raises:
        FileNotFoundError, ValueError: as `read_settings_file`.
    """
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    return read_settings_file(path) if path else {}


def _explain(detail: Any, origin: Mapping[str, str]) -> str:
    key = ".".join(map(str, detail["loc"]))
    if not key:
        return f"qwantize settings: {detail['msg'].removeprefix('Value error, ')}"
    source, given = origin.get(key.split(".")[0], "defaults"), detail["input"]
    if detail["type"] == "extra_forbidden":
        allowed = list(QwantizeSettings.model_fields)
        return f"qwantize settings: unknown key {key!r} (from {source}); allowed keys: {allowed}{_hint(key, allowed)}"
    expected = detail["msg"].removeprefix("Value error, ").replace("Input should be ", "")
    choices = getattr(QwantizeSettings.model_fields.get(key), "annotation", None)
    hint = _hint(given, getattr(choices, "__args__", ()))
    return f"qwantize settings: {key} (from {source}): got {given!r}, allowed: {expected}{hint}"


def _hint(given: Any, allowed: Any) -> str:
    close = difflib.get_close_matches(str(given), [str(choice) for choice in allowed], n=1)
    return f". Did you mean {close[0]!r}?" if close else ""
