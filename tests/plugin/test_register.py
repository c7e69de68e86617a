from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("vllm")

# What builds layers, and takes long to import.
HEAVY = ("vllm.model_executor.layers.fused_moe", "compressed_tensors", "qwantize_vllm.plugin.moe")


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_registering_imports_nothing_that_layers_need():
    program = f"""
import sys
import vllm.config
before = set(sys.modules)
from qwantize_vllm.plugin import register
register()
from vllm.model_executor.layers.quantization import get_quantization_config
print(get_quantization_config("qwantize").__name__)
print([name for name in {HEAVY} if name in set(sys.modules) - before])
"""
    assert run(program).splitlines()[-2:] == ["QwantizeConfig", "[]"]


def test_other_methods_are_looked_up_as_ever():
    from vllm.model_executor.layers import quantization

    from qwantize_vllm.plugin import register

    register()
    once = quantization.get_quantization_config
    register()
    assert quantization.get_quantization_config is once
    assert once("qwantize").__name__ == "QwantizeConfig"
    assert once("fp8").__name__ == "Fp8Config"
    assert once.__wrapped__("qwantize") is once("qwantize")
    with pytest.raises(ValueError, match="Invalid quantization method: no_such"):
        once("no_such")
