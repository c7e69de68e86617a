"""Parts of stacked tensors: known by the views that a loader takes, cut and counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from qwantize_vllm.checkpoint import Checkpoint
from qwantize_vllm.checkpoint.members import Member, Part, cover, read_members

E, A, B = 3, 4, 6


def stacked() -> torch.Tensor:
    return torch.arange(E * A * B).reshape(E, A, B)


VIEWS = {
    "slice": (lambda whole: whole[1], Part(1, 0, A, False)),
    "first rows": (lambda whole: whole.chunk(2, dim=1)[0][2], Part(2, 0, A // 2, False)),
    "last rows": (lambda whole: whole.chunk(2, dim=1)[1].unbind()[0], Part(0, A // 2, A // 2, False)),
    "transposed": (lambda whole: whole.transpose(-1, -2)[1], Part(1, 0, B, True)),
    "last columns": (lambda whole: whole.transpose(-1, -2).chunk(2, dim=-2)[1][2], Part(2, B // 2, B // 2, True)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_known_and_cut_again(name):
    take, part = VIEWS[name]
    view = take(stacked())
    assert Part.of(stacked(), view) == part
    cut = part.cut(stacked()[part.index])
    assert torch.equal(cut, view)
    assert cut.is_contiguous()


@pytest.mark.parametrize(
    "take",
    [
        lambda whole: whole[1, :, 1:],  # neither rows nor columns
        lambda whole: whole[1, :, : B // 2],
        lambda whole: whole[1, ::2],
        lambda whole: whole[:, 1],  # of all slices
        lambda whole: whole.view(E * A, B)[2:5],  # of two
        lambda whole: whole[0, 0],
        lambda whole: whole,
    ],
)
def test_other_views_are_nothing_of_the_kind(take):
    assert Part.of(stacked(), take(stacked())) is None


def test_what_is_not_stacked_has_no_parts():
    assert Part.of(stacked()[0].contiguous(), stacked()[0]) is None


def halves(transposed: bool) -> list[Part]:
    half = (B if transposed else A) // 2
    return [Part(index, start, half, transposed) for index in range(E) for start in (0, half)]


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_cover_a_tensor_once(transposed):
    parts, shape = halves(transposed), (E, A, B)
    assert cover(parts[::-1], shape)
    assert not cover(parts[1:], shape)  # of the first slice only the second half
    assert not cover(parts[:-1], shape)
    assert not cover(parts[:-2], shape)  # nothing of the last slice
    assert not cover([*parts, parts[0]], shape)
    assert not cover([*parts[:-1], dataclasses.replace(parts[-1], transposed=not transposed)], shape)


def test_a_slice_is_read_once_and_nothing_else(tmp_path, monkeypatch):
    save_file({"m": stacked(), "n": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    source, seen = Checkpoint(tmp_path), []
    read = source.read_slice
    monkeypatch.setattr(source, "read_slice", lambda *which: seen.append(which) or read(*which))
    members = [Member(name, "m", Part(1, start, 3, True)) for name, start in (("gate", 0), ("up", 3))]
    gate, up, other = read_members(source, [*members, Member.whole("n")])
    assert torch.equal(torch.cat([gate, up]), stacked()[1].T)
    assert torch.equal(other, torch.ones(2, 2))
    assert seen == [("m", 1)]
    assert [member.shape(source) for member in members] == [(3, A), (3, A)]
    assert Member("down", "m", Part(2, 0, A, False)).shape(source) == (A, B)


def test_a_slice_that_cannot_be_read_names_its_tensor(tmp_path):
    save_file({"m": stacked()}, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'm' cannot be read"):
        source.read_slice("m", 0)
