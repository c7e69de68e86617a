"""Nothing imports upward, and everything below plugin/ works without vLLM."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qwantize_vllm"
FLOORS = {"plugin": 3, "cli": 4}
LOWER = {
    **{"format": 0, "triton_format": 0, "triton_launch": 0, "triton_keys": 0, "layer_names": 0, "side_process": 0},
    **{"settings": 1, "search": 1, "matmul": 1, "hessian": 1, "checkpoint": 1},
}


def floor_of(module: str) -> int:
    parts = module.split(".")
    return 2 if len(parts) == 1 else {**LOWER, **FLOORS}[parts[1]]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    relative = path.relative_to(PACKAGE.parent).with_suffix("")
    module = ".".join(part for part in relative.parts if part != "__init__")
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names = [node.module]
        for name in names:
            if name.split(".")[0] == "qwantize_vllm" and name != "qwantize_vllm":
                assert floor_of(name) <= floor_of(module), f"{module} imports {name}"
            if name.split(".")[0] == "vllm":
                assert module.split(".")[1] == "plugin", f"{module} imports {name}"


def test_the_package_works_without_vllm_and_without_triton():
    program = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vllm", "triton"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch, qwantize_vllm as q
w = torch.randn(32, 64)
t = q.quantize_nvfp4(w)
assert (q.matmul_nvfp4(torch.eye(64), t).T - w).norm() < 0.2 * w.norm()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
