from __future__ import annotations

import os
import signal
import sys

import pytest
import torch

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.checkpoint.cache import LayerCache

WEIGHT = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
SHAPES = [(32, 64)]


@pytest.fixture
def parts():
    return [quantize_nvfp4(WEIGHT)]


def test_what_is_saved_is_found(tmp_path, parts):
    cache = LayerCache(tmp_path / "made")
    key = cache.key({"search": "optimal"}, [WEIGHT, None])
    assert cache.load(key, SHAPES, 16) is None
    cache.save(key, parts)
    (found,) = LayerCache(tmp_path / "made").load(key, SHAPES, 16)
    assert torch.equal(found.codes, parts[0].codes)
    assert torch.equal(found.block_scales.view(torch.uint8), parts[0].block_scales.view(torch.uint8))
    assert torch.equal(found.global_scale, parts[0].global_scale)


def test_a_key_tells_weights_and_settings_apart(tmp_path):
    cache, changed = LayerCache(tmp_path), WEIGHT.clone()
    changed[31, 63] += 1
    given = [({"a": 1}, [WEIGHT]), ({"a": 2}, [WEIGHT]), ({"a": 1}, [changed]), ({"a": 1}, [WEIGHT, None])]
    given.append(({"a": 1}, [WEIGHT.half()]))
    assert len({cache.key(*each) for each in given}) == len(given)
    assert cache.key({"a": 1}, [WEIGHT]) == cache.key({"a": 1}, [WEIGHT.clone()])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-3], "not fully covered"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "its tensors are not those that were saved"),
        (lambda data: b"", ""),
    ],
    ids=["truncated", "a bit flipped", "empty"],
)
def test_a_damaged_file_is_named(tmp_path, parts, damage, message):
    cache = LayerCache(tmp_path)
    cache.save("key", parts)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ValueError, match=rf"{path.name} cannot be used.*{'' if message == 'cannot be used' else message}"
    ):
        cache.load("key", SHAPES, 16)
    cache.save("key", parts)
    assert cache.load("key", SHAPES, 16) is not None


def test_another_layers_file(tmp_path, parts):
    cache = LayerCache(tmp_path)
    cache.save("key", parts)
    with pytest.raises(ValueError, match="its shapes are"):
        cache.load("key", [(16, 128)], 16)
    with pytest.raises(ValueError, match="cannot be used"):
        cache.load("key", SHAPES * 2, 16)


def test_killed_while_it_saves(tmp_path, parts):
    """Before each of its file operations: what is found afterwards is the whole file, or none."""
    found = []
    for last in range(8):
        cache = LayerCache(tmp_path / str(last))
        child = os.fork()
        if child == 0:
            done = 0

            def count(event, arguments, last=last):
                nonlocal done
                if event in ("open", "os.rename", "os.remove"):
                    if done == last:
                        os.kill(os.getpid(), signal.SIGKILL)
                    done += 1

            sys.addaudithook(count)
            cache.save("key", parts)
            os._exit(0)
        os.waitpid(child, 0)
        found.append(cache.load("key", SHAPES, 16) is not None)
    assert found[0] is False
    assert found[-1] is True
    assert found == sorted(found)


def test_two_at_once_whose_processes_have_the_same_number(tmp_path, parts):
    """As in two containers that share the directory."""
    cache, children = LayerCache(tmp_path), []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os.getpid = lambda: 77
            for _ in range(20):
                cache.save("key", parts)
                if cache.load("key", SHAPES, 16) is None:
                    os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_file_that_may_not_be_looked_at_is_named(tmp_path, parts, monkeypatch):
    """As in a directory of another user."""

    def is_file(path):
        raise PermissionError(13, "Permission denied")

    cache = LayerCache(tmp_path)
    cache.save("key", parts)
    monkeypatch.setattr(type(tmp_path), "is_file", is_file)
    with pytest.raises(ValueError, match=r"key\.safetensors cannot be used: .*Permission denied"):
        cache.load("key", SHAPES, 16)
