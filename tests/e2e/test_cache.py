"""cache_dir: the second start searches nothing, and serves the same."""

from __future__ import annotations

import pytest

from .checkpoints import TINY_LAYERS, quantize_checkpoint, write_tiny
from .compare import assert_serves, tensors_of

pytestmark = pytest.mark.e2e


def test_the_second_start_reads_what_the_first_kept(engines, tiny, tmp_path):
    cache = tmp_path / "cache"
    given = {"additional_config": {"qwantize": {"cache_dir": str(cache)}}}
    first = engines.start(tiny, **given)
    assert "from cache_dir" not in first.log
    files = sorted(cache.iterdir())
    assert len(files) == 4 * TINY_LAYERS
    files[0].write_bytes(files[0].read_bytes()[:-1])

    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][5, 5] += 1

    changed = write_tiny(tmp_path / "changed", change)
    second = engines.start(changed, **given)
    assert f"{files[0].name} cannot be used" in second.log
    assert f"{4 * TINY_LAYERS - 2} of them from cache_dir" in second.log
    for outcome, checkpoint in ((first, tiny), (second, changed)):
        for layer, q in quantize_checkpoint(checkpoint).items():
            assert_serves(tensors_of(outcome), layer, q)
    assert len(list(cache.iterdir())) == 4 * TINY_LAYERS + 1
