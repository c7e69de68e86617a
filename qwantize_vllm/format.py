"""NVFP4 itself: the two number grids, packing, and the value that carries a quantized weight.

A weight is cut along its last dimension K into blocks of 16 (the NVFP4 standard) or 32. Each
weight is stored as a 4-bit E2M1 *code*, each block has one positive float8_e4m3fn *block scale*,
each matrix one float32 *global scale*:

    weight  ~  E2M1_VALUES[code] * block_scale * global_scale

Two codes share a byte, the even k in the low nibble: the layout of vLLM, ModelOpt and
compressed-tensors.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

BLOCK_SIZES = (16, 32)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_CODES = 126  # positive finite codes are 1..126; their values grow with the code
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Weights that dequantize() handles at once: bounds its float32 and index temporaries to some 20 MiB.
_CHUNK_ELEMENTS = 2**20


def e2m1_values(device: torch.device | str = "cpu") -> torch.Tensor:
    """The sixteen E2M1 values by code, float32 (16,): code 8 is -0.0, code 15 is -6."""
    magnitudes = torch.tensor(_E2M1_MAGNITUDES, dtype=torch.float32, device=device)
    return torch.cat([magnitudes, -magnitudes])


def e4m3_values(device: torch.device | str = "cpu") -> torch.Tensor:
    """The 126 positive finite float8_e4m3fn values in rising order, float32 (126,): entry i is code i + 1."""
    codes = torch.arange(1, E4M3_CODES + 1, dtype=torch.uint8, device=device)
    return codes.view(torch.float8_e4m3fn).float()


@functools.cache
def _byte_table(dtype: torch.dtype) -> torch.Tensor:
    """(256,) on the CPU, int32 or int64: the bits of the two values of each byte, low nibble first."""
    byte, values = torch.arange(256, device="cpu"), e2m1_values()
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], dim=1).to(dtype)
    return pairs.view(torch.int64 if dtype == torch.float32 else torch.int32).flatten()


@functools.cache
def e4m3_by_byte() -> torch.Tensor:
    """(256,) float32 on the CPU: the value of every E4M3 byte."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """E2M1 codes (uint8, x's shape) nearest to x, ties to the even code, magnitudes above 6 to 6.

    The sign bit of x is kept even where the magnitude rounds to zero, as NVIDIA's conversion
    instruction does. x: any float dtype, no NaN.
    """
    magnitude = x.abs().float()
    # At a midpoint bucketize(right=False) takes the lower code; where the upper one is even, right=True.
    below = torch.tensor([0.25, 1.25, 2.5, 5.0], dtype=torch.float32, device=x.device)
    above = torch.tensor([0.75, 1.75, 3.5], dtype=torch.float32, device=x.device)
    codes = torch.bucketize(magnitude, below, out_int32=True) + torch.bucketize(
        magnitude, above, out_int32=True, right=True
    )
    return (codes + 8 * torch.signbit(x)).to(torch.uint8)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Pack E2M1 codes (uint8, (..., K), values 0..15, K even) into bytes (uint8, (..., K/2))."""
    if codes.dtype != torch.uint8 or codes.shape[-1] % 2:
        raise ValueError(f"pack_codes takes uint8 with an even last dimension, got {codes.dtype} {tuple(codes.shape)}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Undo pack_codes: uint8 (..., K/2) -> uint8 (..., K) with values 0..15."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"unpack_codes takes uint8, got {packed.dtype}")
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def decode_codes(packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """E2M1 values of packed codes: uint8 (..., K/2) -> dtype (..., K), one table look-up a byte."""
    table = _byte_table(dtype).to(packed.device)
    # gather and not index_select: on a CPU it is vectorized, ten times as fast.
    pairs = table.gather(0, packed.reshape(-1).long())
    return pairs.view(dtype).view(*packed.shape[:-1], -1)


def dequantize_rows(
    codes: torch.Tensor, block_scales: torch.Tensor, global_scale: torch.Tensor, block_size: int
) -> torch.Tensor:
    """float32 (rows, K) of uint8 codes (rows, K/2) and E4M3 scales (rows, K/block_size), all at once.

    global_scale: float32 () or (rows,). Temporaries are several times the result: pass a strip, not a model.
    """
    scales = e4m3_by_byte().to(codes.device).gather(0, block_scales.reshape(-1).view(torch.uint8).long())
    values = decode_codes(codes).view(-1, block_size).mul_(scales[:, None])
    return values.view(codes.shape[0], -1).mul_(global_scale.reshape(-1, 1))


def default_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """float32, a little over amax / (6 * 448), so that the largest weight fits the largest code times block scale.

    Of the float32 numbers with 16 significant bits, the last of them 1, the first from that quotient on which its
    float32 reciprocal's reciprocal gives back; less than 5e-4 above it. Two things follow that make a checkpoint exact:

    - It survives formats that store the reciprocal, as compressed-tensors does; one float32 in six would not.
    - value * block_scale * global_scale has at most 2 + 4 + 16 significant bits and at least 16: float32 holds it
      without rounding, and it is never half way between two bfloat16 or float16 numbers nor as close to that as three
      float32 roundings reach. In whatever order a reader multiplies or divides, it finds the same weight.

    At least the smallest normal float32, and 1 where amax is 0, so that dividing by it is always safe.
    """
    # Through float64, because CUDA divides by a Python number as a multiplication by its rounded reciprocal.
    scale = (amax.double() / (E2M1_MAX * E4M3_MAX)).clamp_min_(torch.finfo(torch.float32).tiny).float()
    # Bits 8 to 30 are the exponent and 16 significant bits, the first of which is not stored: bit 8 becomes 1.
    bits = ((scale.view(torch.int32) + 0xFF) & ~0x1FF) | 0x100
    # To the device each time: a tensor kept there would be lost with the memory of an engine that sleeps.
    steps = _steps_to_reciprocal().to(amax.device)[(bits >> 9) & 0x3FFF]
    return (bits + 0x200 * steps.int()).view(torch.float32).masked_fill(amax == 0, 1.0)


@functools.cache
def _steps_to_reciprocal() -> torch.Tensor:
    """(2**14,) uint8 on the CPU: from each odd number of 16 bits, how many such numbers on is one that survives its
    reciprocal."""
    significands = (torch.arange(2**14, dtype=torch.int32, device="cpu") << 9) + 0x3F800100
    numbers = significands.view(torch.float32)
    survives = (reciprocal(reciprocal(numbers)) == numbers).tolist()
    steps, step = [0] * len(survives), 0
    for i in reversed(range(-len(survives), len(survives))):  # twice: the end of one binade goes on in the next
        step = 0 if survives[i] else step + 1
        steps[i] = step
    return torch.tensor(steps, dtype=torch.uint8, device="cpu")


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale in float32, rounded once on every device."""
    return scale.double().reciprocal().float()


@dataclasses.dataclass(frozen=True, eq=False)
class Nvfp4Tensor:
    """A weight in NVFP4: the one value that search, matmul, checkpoint and plugin pass around.

    Attributes:
        codes: uint8 (..., N, K/2), two E2M1 codes a byte, even k in the low nibble.
        block_scales: float8_e4m3fn (..., N, K/block_size), positive.
        global_scale: float32, one per N x K matrix: shape () or the leading batch shape (experts).
        block_size: 16 or 32.

    Raises:
        ValueError: a dtype, a shape or the devices do not fit together.
    """

    codes: torch.Tensor
    block_scales: torch.Tensor
    global_scale: torch.Tensor
    block_size: int = 16

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        dtypes = {"codes": torch.uint8, "block_scales": torch.float8_e4m3fn, "global_scale": torch.float32}
        for name, dtype in dtypes.items():
            if getattr(self, name).dtype != dtype:
                raise ValueError(f"Nvfp4Tensor.{name} must be {dtype}, got {getattr(self, name).dtype}")
        if self.codes.dim() < 2 or self.shape[-1] % self.block_size:
            raise ValueError(
                f"Nvfp4Tensor.codes must be (..., N, K/2) with K a multiple of {self.block_size}, "
                f"got {tuple(self.codes.shape)}"
            )
        expected = (*self.shape[:-1], self.shape[-1] // self.block_size)
        if tuple(self.block_scales.shape) != expected:
            raise ValueError(f"Nvfp4Tensor.block_scales must be {expected}, got {tuple(self.block_scales.shape)}")
        if self.global_scale.shape != self.shape[:-2]:
            raise ValueError(
                f"Nvfp4Tensor.global_scale must have the batch shape {tuple(self.shape[:-2])}, "
                f"got {tuple(self.global_scale.shape)}"
            )
        if len({self.codes.device, self.block_scales.device, self.global_scale.device}) > 1:
            raise ValueError("Nvfp4Tensor: codes, block_scales and global_scale must be on one device")

    @property
    def shape(self) -> torch.Size:
        """(..., N, K) of the weight that this stands for."""
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes held by codes, block scales and global scales."""
        return self.codes.nbytes + self.block_scales.nbytes + self.global_scale.nbytes

    def to(self, device: torch.device | str) -> Nvfp4Tensor:
        return Nvfp4Tensor(
            self.codes.to(device), self.block_scales.to(device), self.global_scale.to(device), self.block_size
        )

    def __getitem__(self, index: int | slice) -> Nvfp4Tensor:
        """Matrix or matrices of a batched (..., N, K) tensor, by the first dimension."""
        if self.codes.dim() < 3:
            raise ValueError(f"only a batched Nvfp4Tensor can be indexed, this one is {tuple(self.shape)}")
        return Nvfp4Tensor(self.codes[index], self.block_scales[index], self.global_scale[index], self.block_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (..., N, K) in float32, bfloat16 or float16.

        Every backend of this package computes the same bits: value * block_scale (exact), times
        global_scale rounded once to float32, rounded to dtype.
        """
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dequantize takes one of {FLOAT_DTYPES}, got {dtype}")
        k = self.shape[-1]
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        rows = out.view(-1, k)
        codes, scales = self.codes.reshape(-1, k // 2), self.block_scales.reshape(-1, k // self.block_size)
        global_scale = self.global_scale[..., None].expand(self.shape[:-1]).reshape(-1)
        step = max(1, _CHUNK_ELEMENTS // k)
        for start in range(0, rows.shape[0], step):
            part = slice(start, start + step)
            rows[part] = dequantize_rows(codes[part], scales[part], global_scale[part], self.block_size)
        return out


def check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}")
