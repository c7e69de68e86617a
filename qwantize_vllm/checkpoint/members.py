"""Which part of which tensor of a checkpoint a matrix is: all of one, or of a stacked one a few rows of a slice.

Some checkpoints hold all experts of a layer in one tensor (E, A, B). A matrix of one expert then is some rows of a
slice (A, B), or of its transpose; vLLM's loader says which, by the view that it takes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from qwantize_vllm.checkpoint.files import Checkpoint


@dataclasses.dataclass(frozen=True)
class Part:
    """`rows` rows, from `start` on, of slice `index` of a stacked tensor (E, A, B), or of the slice's transpose."""

    index: int
    start: int
    rows: int
    transposed: bool

    @classmethod
    def of(cls, whole: torch.Tensor, view: torch.Tensor) -> Part | None:
        """What a view (N, K) of a contiguous tensor (E, A, B) is of it; None where it is nothing of this kind."""
        if whole.dim() != 3 or view.dim() != 2 or not whole.is_contiguous():
            return None
        _, a, b = whole.shape
        (rows, k), (index, within) = view.shape, divmod(int(view.storage_offset()), a * b)
        if view.stride() == (b, 1) and k == b and within % b == 0 and within // b + rows <= a:
            return cls(index, within // b, rows, False)
        if view.stride() == (1, b) and k == a and within + rows <= b:
            return cls(index, within, rows, True)
        return None

    def cut(self, matrix: torch.Tensor) -> torch.Tensor:
        """These rows (N, K), contiguous, of the slice (A, B)."""
        oriented = matrix.T if self.transposed else matrix
        return oriented[self.start : self.start + self.rows].contiguous()


@dataclasses.dataclass(frozen=True)
class Member:
    """A matrix that is quantized with others or alone, and that is a layer of its own in what is written.

    Attributes:
        name: of that layer: `.weight` and so on follow it.
        tensor: of the checkpoint.
        part: of that tensor; None where it is all of a tensor (N, K).
    """

    name: str
    tensor: str
    part: Part | None = None

    @classmethod
    def whole(cls, tensor: str) -> Member:
        """All of a layer's `.weight`, under the same name."""
        return cls(tensor.removesuffix(".weight"), tensor)

    def shape(self, source: Checkpoint) -> tuple[int, ...]:
        """(N, K) of the matrix; of what is all of a tensor that is no matrix, the tensor's shape."""
        shape = source.tensors[self.tensor].shape
        if self.part is None:
            return shape
        return self.part.rows, shape[1] if self.part.transposed else shape[2]


def read_members(source: Checkpoint, members: Sequence[Member]) -> list[torch.Tensor]:
    """The matrices (N, K), on the CPU. A slice that several are cut from is read once, and of its tensor nothing else.

    Raises:
        ValueError: a file cannot be read; names it and the tensor.
    """
    slice_of = functools.cache(source.read_slice)
    return [
        source.read(member.tensor)
        if member.part is None
        else member.part.cut(slice_of(member.tensor, member.part.index))
        for member in members
    ]


def cover(parts: Sequence[Part], shape: Sequence[int]) -> bool:
    """Whether parts are all of a stacked tensor (E, A, B), each of its rows (or columns) once."""
    experts, a, b = shape
    ends: dict[int, tuple[int, bool]] = {}  # by slice: up to where it is covered, and in which orientation
    for part in sorted(parts, key=lambda part: (part.index, part.start)):
        end, transposed = ends.get(part.index, (0, part.transposed))
        if part.start != end or part.transposed != transposed:
            return False
        ends[part.index] = end + part.rows, transposed
    return len(ends) == experts and all(end == (b if transposed else a) for end, transposed in ends.values())
