"""torch.compile takes the matmul whole: one call in the generated code for each layer, nothing of its inside."""

from __future__ import annotations

import functools
import os
import shutil

import pytest

from .compare import assert_scores_agree, sequences_of
from .conftest import TINY_PROMPTS
from .probe import probe

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"),
]


def test_compiled_graph_holds_one_op_a_layer(engines, tiny, tmp_path):
    """In float32, so that what the compiler fuses rounds as the rest does."""
    eager = engines.start(tiny, dtype="float32")
    use = functools.partial(probe, prompts=TINY_PROMPTS, sequences=sequences_of(eager))
    cache = {"VLLM_CACHE_ROOT": str(tmp_path)}
    compiled = engines.start(tiny, use, dtype="float32", enforce_eager=False, env=cache)

    # What inductor made of the model: on CPU one graph of all of it, so nothing broke it apart.
    generated = [file.read_text() for file in tmp_path.rglob("inductor_cache/**/*.py")]
    (model,) = [code for code in generated if "qwantize" in code]
    assert model.count("= torch.ops.qwantize.matmul_nvfp4.default(") == 8
    assert_scores_agree(eager.result["own_scores"], compiled.result["scores"], 1e-4)
