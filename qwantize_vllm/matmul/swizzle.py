"""Codes and scales in the order in which tensor cores want them, and back.

The kernels compute W x'. On an NVIDIA GPU a warp holds a 16 x 16 tile of the left operand of a tensor-core product
like this: lane 4*r + q has, of the rows r and r + 8, the columns 2*q, 2*q + 1, 2*q + 8 and 2*q + 9 (PTX ISA,
"Matrix Fragments for mma.m16n8k16"). The weight is cut into tiles of 64 rows x 64 columns, padded with zeros, and

    column k of a tile = 16 * plane + column of the fragment,    plane = 0 .. 3
    row    n of a tile = 16 * part + row of the fragment,        part = 0 .. 3

    words    int16 (N/64, K/64, part, lane, 8)

Each int16 holds the four codes, one a plane, of one row and column; the eight of a lane, in 16 contiguous bytes, are
those of the fragment (k' = column >= 8, n' = row >= 8, k0 = odd column; 4*k' + 2*n' + k0). So a program loads
wide, without gaps, and every weight is born in the register in which the product reads it.

    bit      15  14  13  12  11  10   9   8   7   6   5   4   3   2   1   0
    plane     0   3   3   1   3   3   2   0   0   0   1   1   1   2   2   2
              s  m0   s   s  m2  m1   s  m2  m1  m0  m2  m1  m0  m2  m1  m0     s sign, m magnitude

One shift by 3*plane brings s to bit 15 and m to bits 8 to 6, where the exponent of a bfloat16 ends and its mantissa
begins: the value times 2^-126. The bits of plane 3 lie so that after a shift by 8 and a mask one multiplication, by
2^10 + 2^5 + 1, does the same: a copy of them for s, one for m2 and m1, one for m0, and no carry gets in between.

    scales   int32 (N/64, K/256, 64 rows, 4 tiles) for blocks of 16, a byte a plane; int16 for blocks of 32, a byte two
             planes. Four tiles at a time are what few tokens are multiplied with: 16 bytes a row again.

A byte of a scale has five bits of exponent and three of mantissa, 2^(e - 9) * (1 + m/8): every positive
E4M3 value, without subnormals, so that a shift and an addition make a bfloat16 or float16 of it.
"""

from __future__ import annotations

import dataclasses

import torch

from qwantize_vllm.format import Nvfp4Tensor, check_block_size
from qwantize_vllm.triton_launch import Launch, launch_now

ROWS, COLUMNS = 64, 64
ARRIVALS = 4096  # tiles of a result that can be shared by programs
_EXPONENT_BIAS = 9
_SCALES = {16: torch.int32, 32: torch.int16}


@dataclasses.dataclass(frozen=True)
class SwizzledNvfp4:
    """An NVFP4 weight (N, K) for the kernels of triton_swizzled.

    Attributes:
        words: int16 (N/64, K/64, 4, 256), N and K rounded up.
        scales: int32 (N/64, K/256, 64, 4), or int16 for blocks of 32.
        global_scale: float32 (), or (N,) where rows differ.
        arrived: int32 (ARRIVALS,), zeros: how many of the programs that share a tile of the result are done; zeros
            again after each call.
        shape: (N, K).
        block_size: 16 or 32.

    Raises:
        ValueError: a dtype or a shape does not fit.
    """

    words: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor
    arrived: torch.Tensor
    shape: tuple[int, int]
    block_size: int = 16

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        n, k = self.shape
        tiles = (-(-n // ROWS), -(-k // COLUMNS))
        expected: dict[str, tuple[torch.dtype, set[tuple[int, ...]]]] = {
            "words": (torch.int16, {(*tiles, 4, 256)}),
            "scales": (_SCALES[self.block_size], {(tiles[0], -(-tiles[1] // 4), ROWS, 4)}),
            "global_scale": (torch.float32, {(), (n,)}),
            "arrived": (torch.int32, {(ARRIVALS,)}),
        }
        for name, (dtype, shapes) in expected.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) not in shapes or not tensor.is_contiguous():
                raise ValueError(
                    f"SwizzledNvfp4.{name} of a weight {self.shape} must be contiguous {dtype} "
                    f"{' or '.join(str(shape) for shape in shapes)}, got {tensor.dtype} {tuple(tensor.shape)}"
                )

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        """Bytes held by all of it, scratch included."""
        return self.words.nbytes + self.scales.nbytes + self.global_scale.nbytes + self.arrived.nbytes


def swizzle(q: Nvfp4Tensor, launch: Launch = launch_now) -> SwizzledNvfp4:
    """Reorder an unbatched weight; on a CPU several times its bytes are needed on the way.

    What it returns is for one stream at a time: products that overlap on two would share its scratch, and be wrong. For
    two at once swizzle twice, or `dataclasses.replace` the result's `arrived` by zeros of its own.

    launch: what else to do with a GPU's kernels than to run them.

    Raises:
        ValueError: the weight is batched.
    """
    if q.codes.dim() != 2:
        raise ValueError(f"only an unbatched (N, K) weight can be swizzled, got {tuple(q.shape)}; index it first")
    words, scales = _swizzle_on_gpu(q, launch) if q.codes.is_cuda or launch is not launch_now else _swizzle(q)
    arrived = torch.zeros(ARRIVALS, dtype=torch.int32, device=q.device)
    return SwizzledNvfp4(words, scales, q.global_scale, arrived, (q.shape[0], q.shape[1]), q.block_size)


def _swizzle_on_gpu(q: Nvfp4Tensor, launch: Launch) -> tuple[torch.Tensor, torch.Tensor]:
    from qwantize_vllm.matmul.triton_swizzle import swizzle_triton

    n, k = q.shape
    groups, tiles = -(-n // ROWS), -(-k // COLUMNS)
    words = torch.empty(groups, tiles, 4, 256, dtype=torch.int16, device=q.device)
    scales = torch.empty(groups, -(-tiles // 4), ROWS, 4, dtype=_SCALES[q.block_size], device=q.device)
    swizzle_triton(q.codes, q.block_scales, words, scales, q.block_size, launch)
    return words, scales


def _swizzle(q: Nvfp4Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and scales, in PyTorch."""
    blocks = 4 * COLUMNS // q.block_size
    codes = _padded(q.codes, ROWS, COLUMNS // 2)
    scales = _padded(_to_e5m3(q.block_scales), ROWS, blocks)
    groups, tiles = codes.shape[0] // ROWS, codes.shape[1] // (COLUMNS // 2)
    # A byte of codes holds k0 = 0 and 1. Dimensions: group, part, n', r; tile, plane, k', q, k0.
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).view(groups, 4, 2, 8, tiles, 4, 2, 4, 2)
    nibbles = nibbles.permute(5, 0, 4, 1, 3, 7, 6, 2, 8)
    words = _interleave(list(nibbles)).view(groups, tiles, 4, 256)
    return words, scales.view(_SCALES[q.block_size]).view(groups, ROWS, -1, 4).transpose(1, 2).contiguous()


def unswizzle(weight: SwizzledNvfp4) -> Nvfp4Tensor:
    """What `swizzle` was given.

    Raises:
        ValueError: rows have global scales of their own, which an Nvfp4Tensor cannot have.
    """
    if weight.global_scale.dim():
        raise ValueError("this weight has one global scale a row; an Nvfp4Tensor has one a matrix")
    n, k = weight.shape
    groups, tiles = weight.words.shape[:2]
    nibbles = torch.stack(_separate(weight.words)).view(4, groups, tiles, 4, 8, 4, 2, 2, 2)
    # plane, group, tile, part, r, q, k', n', k0 -> group, part, n', r; tile, plane, k', q, k0
    nibbles = nibbles.permute(1, 3, 7, 4, 2, 0, 6, 5, 8).reshape(groups * ROWS, tiles * COLUMNS // 2, 2)
    codes = nibbles[..., 0] | (nibbles[..., 1] << 4)
    scales = weight.scales.transpose(1, 2).reshape(groups * ROWS, -1).contiguous().view(torch.uint8)
    return Nvfp4Tensor(
        codes[:n, : k // 2].contiguous(),
        _from_e5m3(scales[:n, : k // weight.block_size]).contiguous(),
        weight.global_scale,
        weight.block_size,
    )


def _padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    n, k = matrix.shape
    return torch.nn.functional.pad(matrix, (0, -k % columns, 0, -n % rows))


def _interleave(codes: list[torch.Tensor]) -> torch.Tensor:
    """Four tensors of codes uint8, one a plane, as int16 (contiguous)."""
    word = torch.zeros(codes[0].shape, dtype=torch.int16, device=codes[0].device)
    for plane in range(3):
        # The sign of plane 0 at bit 15 is that of the int16.
        sign = (codes[plane] >> 3).to(torch.int16) << (15 - 3 * plane)
        word |= sign | ((codes[plane] & 7).to(torch.int16) << (6 - 3 * plane))
    last = codes[3].to(torch.int16)
    return word | ((last & 8) << 10) | ((last & 6) << 9) | ((last & 1) << 14)


def _separate(words: torch.Tensor) -> list[torch.Tensor]:
    """The inverse of _interleave: four tensors of codes uint8."""
    codes = [((words >> (6 - 3 * plane)) & 7) | ((words >> (12 - 3 * plane)) & 8) for plane in range(3)]
    codes.append(((words >> 10) & 8) | ((words >> 9) & 6) | ((words >> 14) & 1))
    return [each.to(torch.uint8) for each in codes]


def _to_e5m3(scales: torch.Tensor) -> torch.Tensor:
    """Bytes of positive float8_e4m3fn scales; see the top of this file."""
    mantissa, exponent = torch.frexp(scales.float())  # the mantissa is in [1/2, 1)
    return (((exponent - 1 + _EXPONENT_BIAS) << 3) + (mantissa * 16 - 8).int()).to(torch.uint8)


def _from_e5m3(bytes_: torch.Tensor) -> torch.Tensor:
    value = torch.ldexp(1 + (bytes_ & 7).float() / 8, (bytes_ >> 3).int() - _EXPONENT_BIAS)
    return value.to(torch.float8_e4m3fn)
