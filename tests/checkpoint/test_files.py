"""Damaged and foreign files: errors that name the file, and the tensor where there is one."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from qwantize_vllm.checkpoint import Checkpoint, files
from qwantize_vllm.checkpoint.files import INDEX, digest, save_tensors

TENSORS = {"a.weight": torch.arange(64).bfloat16().view(8, 8), "b.weight": torch.ones(4, 4), "c": torch.zeros(3)}


@pytest.fixture
def directory(tmp_path):
    save_file({name: TENSORS[name] for name in ("a.weight", "c")}, tmp_path / "one.safetensors")
    save_file({"b.weight": TENSORS["b.weight"]}, tmp_path / "two.safetensors")
    where = {"a.weight": "one.safetensors", "c": "one.safetensors", "b.weight": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    return tmp_path


def test_tensors_of_all_files(directory):
    checkpoint = Checkpoint(directory)
    assert checkpoint.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())
    assert checkpoint.tensors["a.weight"].shape == (8, 8)
    assert checkpoint.tensors["a.weight"].nbytes == 128


@pytest.mark.parametrize(
    ("kept", "lost"),
    [(0, ""), (4, ""), (8, ""), (100, ""), (-1, "1 tensors, 'a.weight' the first"), (-130, "2 tensors, 'c' the first")],
)
def test_truncated(directory, kept, lost):
    path = directory / "one.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"one\.safetensors cannot be read as safetensors.*{lost}"):
        Checkpoint(directory)


def test_a_bit_of_the_header_flipped(directory):
    path = directory / "two.safetensors"
    data = bytearray(path.read_bytes())
    data[8] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"two\.safetensors cannot be read as safetensors"):
        Checkpoint(directory)


def test_nothing_is_unpickled(directory):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    (directory / "two.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"two\.safetensors cannot be read as safetensors"):
        Checkpoint(directory)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"a.weight": "three.safetensors"}, "names 1 files that are not there: three.safetensors"),
        ({"a.weight": "../one.safetensors"}, "which is not a file beside it"),
        ({"d": "one.safetensors"}, r"one\.safetensors lacks 1 tensors that .* names, 'd' among them"),
    ],
)
def test_an_index_of_something_else(directory, where, message):
    (directory / INDEX).write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=message):
        Checkpoint(directory)


def test_no_index_and_a_tensor_twice(directory):
    (directory / INDEX).unlink()
    save_file({"c": torch.zeros(1)}, directory / "two.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'c' is in one\.safetensors and in two\.safetensors"):
        Checkpoint(directory)


def test_not_an_index(directory):
    (directory / INDEX).write_text("[]")
    with pytest.raises(ValueError, match="is not an index of safetensors files"):
        Checkpoint(directory)


def test_no_files(tmp_path):
    with pytest.raises(ValueError, match=r"has no \.safetensors file"):
        Checkpoint(tmp_path)


def test_a_digest_tells_dtype_shape_and_bytes():
    tensor = torch.zeros(4, 4)
    assert digest(tensor) == digest(tensor.clone())
    assert len({digest(each) for each in (tensor, tensor.view(2, 8), tensor.int(), -tensor, tensor + 1)}) == 5


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(IsADirectoryError):
        save_tensors(tmp_path / "x", {"a": torch.zeros(2)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_who_may_read_other_new_files_may_read_it(tmp_path):
    (tmp_path / "other").touch()
    save_tensors(tmp_path / "x", {"a": torch.zeros(2)}, {})
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_safetensors_says_of_a_disk_names_the_file(tmp_path, monkeypatch):
    def save_file(tensors, path, metadata):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", save_file)
    with pytest.raises(OSError, match=r"x cannot be written: No space left on device"):
        save_tensors(tmp_path / "x", {"a": torch.zeros(2)}, {})
    assert not list(tmp_path.iterdir())
