"""Settings by every route into a real engine, and which route wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .checkpoints import write_tiny
from .compare import settings_of, tensors_of
from .conftest import Engines

pytestmark = pytest.mark.e2e

DEFAULTS = {
    "scale_search": "optimal",
    "block_size": 16,
    "global_scale": "amax",
    "hessian": None,
    "refine": "none",
    "gptq_damping": 0.01,
    "gptq_order": "loss",
    "gptq_sweeps": 0,
    "cache_dir": None,
    "ignore": [],
    "towers": "leave",
    "quantize_gates": False,
    "fuse_norms": True,
    "strict": False,
    "backend": "auto",
}


class Routes:
    """Every route gives `arguments` of the engine, variables, or another checkpoint."""

    def __init__(self, tiny: Path, folder: Path) -> None:
        self.checkpoint, self.folder = tiny, folder
        self.arguments: dict[str, Any] = {}
        self.env: dict[str, str] = {}

    def hf_overrides(self, settings: dict[str, Any]) -> None:
        self.arguments["hf_overrides"] = {"quantization_config": {"quant_method": "qwantize", **settings}}

    def file(self, settings: dict[str, Any]) -> None:
        self.arguments["hf_overrides"] = {"quantization_config_file": self._write("overrides.yaml", settings)}

    def checkpoint_config(self, settings: dict[str, Any]) -> None:
        own = {"quant_method": "qwantize", **settings}
        self.checkpoint = write_tiny(self.folder / "checkpoint", quantization_config=own)
        self.arguments["quantization"] = None

    def additional_config(self, settings: dict[str, Any]) -> None:
        self.arguments["additional_config"] = {"qwantize": settings}

    def variable(self, settings: dict[str, Any]) -> None:
        self.env["QWANTIZE_CONFIG"] = self._write("variable.yaml", settings)

    def _write(self, name: str, settings: dict[str, Any]) -> str:
        lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
        (self.folder / name).write_text("# settings of a test\n" + "\n".join(lines) + "\n")
        return str(self.folder / name)


@pytest.fixture
def routes(tiny: Path, tmp_path: Path) -> Routes:
    return Routes(tiny, tmp_path)


def start(engines: Engines, routes: Routes) -> Any:
    return engines.start(routes.checkpoint, env=routes.env, **routes.arguments)


def test_nothing_given(tiny_engine):
    assert settings_of(tiny_engine) == DEFAULTS
    assert tiny_engine.lines("given: all defaults")


@pytest.mark.parametrize("route", ["hf_overrides", "file", "checkpoint_config", "additional_config", "variable"])
def test_every_route_arrives(engines, routes, route):
    given = {"block_size": 32, "ignore": ["*.o_proj"]}
    getattr(routes, route)(given)
    engine = start(engines, routes)
    assert settings_of(engine) == {**DEFAULTS, **given}
    # It is what the layers are made with, not only what the settings say.
    tensors = tensors_of(engine)
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (128, 256 // 32)
    assert "model.layers.0.self_attn.o_proj.weight_scale" not in tensors


@pytest.mark.parametrize("strongest", ["hf_overrides", "file", "checkpoint_config"])
def test_the_stronger_route_wins_key_by_key(engines, routes, strongest):
    getattr(routes, strongest)({"scale_search": "naive"})
    routes.additional_config({"scale_search": "optimal", "global_scale": "none"})
    routes.variable({"scale_search": "optimal", "global_scale": "amax", "backend": "reference"})
    engine = start(engines, routes)
    expected = {"scale_search": "naive", "global_scale": "none", "backend": "reference"}
    assert settings_of(engine) == {**DEFAULTS, **expected}
    assert tensors_of(engine)["model.layers.0.mlp.down_proj.weight_global_scale"] == 1
    (line,) = engine.lines("qwantize settings:")
    assert "global_scale (from --additional-config)" in line
    assert "backend (from the variable QWANTIZE_CONFIG)" in line


def test_a_file_that_vllm_would_not_read_is_refused(engines, routes):
    """It reads none for a checkpoint that has settings of its own."""
    routes.checkpoint_config({"block_size": 32})
    routes.file({"scale_search": "naive"})
    log = engines.refuse(routes.checkpoint, **routes.arguments)
    assert "overrides.yaml, which vLLM reads only where a model has no quantization_config" in log
    assert "Loading safetensors" not in log


def test_hf_overrides_replace_the_checkpoints_own_settings(engines, routes):
    routes.checkpoint_config({"block_size": 32})
    routes.hf_overrides({"scale_search": "naive"})
    engine = start(engines, routes)
    assert settings_of(engine) == {**DEFAULTS, "scale_search": "naive"}
