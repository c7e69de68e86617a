"""The experts of a mixture, quantized: two weights each, in the layout in which one kernel reads those of all."""

from __future__ import annotations

import dataclasses

import torch

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.swizzle import ROWS, swizzle

# What stands between the two products of an expert, applied to gate and multiplied by up.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
# Rows of gate that rows of up follow: both of a pair are then in one thread's registers (swizzle.py, rows r and r + 8).
_TURN = 8
_CHUNK_ELEMENTS = 2**26


@dataclasses.dataclass(frozen=True)
class SwizzledExperts:
    """One NVFP4 weight (N, K) of each of E experts, each as in SwizzledNvfp4.

    Attributes:
        words: int16 (E, N/64, K/64, 4, 256), N and K rounded up.
        scales: int32 (E, N/64, K/256, 64, 4), or int16 for blocks of 32.
        global_scales: float32 (E, members): of a gated weight those of gate and of up, or one for both.
        shape: (N, K).
        gated: whether the rows are those of gate and of up, eight of each in turn.
        total: experts that tokens are routed to, those of other ranks among them.
    """

    words: torch.Tensor
    scales: torch.Tensor
    global_scales: torch.Tensor
    shape: tuple[int, int]
    block_size: int
    gated: bool
    total: int

    def expected(self, pairs: int) -> int:
        """How many of so many pairs of a token and an expert are those of these experts, if all have as many."""
        return -(-pairs * self.words.shape[0] // self.total)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes + self.global_scales.nbytes


def swizzle_experts(
    codes: torch.Tensor,
    block_scales: torch.Tensor,
    global_scales: torch.Tensor,
    block_size: int,
    *,
    gated: bool,
    total: int | None = None,
) -> SwizzledExperts:
    """Reorder the weights of all experts, one after the other.

    codes: uint8 (E, N, K/2). block_scales: float8_e4m3fn (E, N, K/block_size). global_scales: float32 (E, members).
    gated: the first half of the rows is gate, the second one up. total: as in SwizzledExperts; default E.

    Raises:
        ValueError: gated, and half of N is not a multiple of 8.
    """
    experts, n, half_k = codes.shape
    if gated and n % (2 * _TURN):
        raise ValueError(f"gate and up must have a multiple of {_TURN} rows each, got {n} together")
    order = in_turn(n).to(codes.device) if gated else slice(None)
    # Experts of whole groups of rows are swizzled several at a time, one below the other.
    step = max(1, _CHUNK_ELEMENTS // (2 * n * half_k)) if n % ROWS == 0 else 1
    words, scales = [], []
    for start in range(0, experts, step):
        some = codes[start : start + step, order]
        some_scales = block_scales[start : start + step].view(torch.uint8)[:, order].view(block_scales.dtype)
        one = swizzle(Nvfp4Tensor(some.flatten(0, 1), some_scales.flatten(0, 1), global_scales[0, 0], block_size))
        words.append(one.words.unflatten(0, (len(some), -1)))
        scales.append(one.scales.unflatten(0, (len(some), -1)))
    shape, total = (n, 2 * half_k), total or experts
    return SwizzledExperts(torch.cat(words), torch.cat(scales), global_scales, shape, block_size, gated, total)


def local_ids(ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Numbers of the experts that are here, negative for those of other ranks and where the id is.

    ids: integers, of all experts, of any shape; negative: of no expert, as vLLM gives them to tokens that only
    fill up a batch. expert_map: int32 (all experts,), the number of each here, or -1; None where all are here.

    Returns: int32, of ids' shape; ids themselves where all experts are here.
    """
    if expert_map is None:
        return ids
    if not ids.is_cuda:
        return torch.where(ids < 0, -1, expert_map[ids.long()])
    from qwantize_vllm.matmul.triton_local_ids import map_ids

    return map_ids(ids, expert_map)


def in_turn(n: int) -> torch.Tensor:
    """Where row i of (8 rows of gate, 8 of up, 8 of gate, ...) is in (gate, up): int64 (n,)."""
    return torch.arange(n, dtype=torch.int64, device="cpu").view(2, -1, _TURN).transpose(0, 1).reshape(-1)
