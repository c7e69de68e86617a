"""What the kernels for Hopper have in common, in Gluon: buffers, the producer's loads, the consumers' products.

y = x W' is computed as W x', like in triton_swizzled.py, from the same layout. Triton waits for every asynchronous
product before it decodes the next weights; here both run at once:

- One warp, the producer, has the TMA bring tiles of x, words and scales to shared memory, several ahead.
- Two or three warp groups, the consumers, have 64 rows of W each. While the tensor cores multiply a tile of 64 columns
  in one set of registers, a group decodes the next tile into another set, and starts that product before it waits for
  the first.

Registers that an asynchronous product reads must stay as they are until it ends. Nothing in the language promises
that; warpgroup_mma_wait keeps its `deps` alive, so the operands are among them, and tests/wgmma_hazards.py reads the
machine code.

`turn` counts the chunks of W that a program has taken, by which producer and consumers find the same buffers.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qwantize_vllm.matmul.gluon_fragments import decode_tile, load_scales

# Their names in Triton 3.6 are the latter ones.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
# Four tiles of 64 columns at a time: what 16 bytes of a row's scales belong to.
_CHUNK = gl.constexpr(4)
_CHUNK_WORDS = gl.constexpr(8192)  # bytes
TOKENS_IN_CACHE = gl.constexpr(1024)

X_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
FLAT_LAYOUTS = {
    torch.int16: gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=2),
    torch.int32: gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2),
}


class Described(TensorDescriptor):
    """A TensorDescriptor that nobody checks before the driver does, which is asked to make a tensor map of it: to be
    checked twice costs as much as all else."""

    def __post_init__(self) -> None:
        pass


def weight_descriptors(words: torch.Tensor, scales: torch.Tensor) -> tuple[Described, Described]:
    """Of the words and scales of a swizzled weight, or of all experts' one after the other: a chunk of a group each."""
    return _rows(words, 256, 4 * _CHUNK.value), _rows(scales, 64 * _CHUNK.value, 1)


def _rows(tensor: torch.Tensor, length: int, count: int) -> Described:
    """A contiguous tensor as rows of so many elements, so many at a time."""
    return Described(
        tensor, [tensor.numel() // length, length], [length, 1], [count, length], FLAT_LAYOUTS[tensor.dtype]
    )


@gluon.jit
def make_buffers(operands, GROUPS: gl.constexpr, X_TILES: gl.constexpr, X_STAGES: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory for tiles of x, words and scales, and the barriers that say which are full, and which are empty."""
    x_desc, words_desc, scales_desc = operands
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES * X_TILES, x_desc.block_shape[0], 64], x_desc.layout)
    words_bufs = gl.allocate_shared_memory(words_desc.dtype, [STAGES * GROUPS, 16, 256], words_desc.layout)
    scales_bufs = gl.allocate_shared_memory(scales_desc.dtype, [STAGES * GROUPS, 1, 256], scales_desc.layout)
    x_ready, x_empty = _barriers(X_STAGES, GROUPS)
    ready, empty = _barriers(STAGES, GROUPS)
    return x_bufs, words_bufs, scales_bufs, x_ready, x_empty, ready, empty


@gluon.jit
def _barriers(STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """Barriers (STAGES,) each: that a buffer is full, told by the producer's copies; that it is empty, by consumers."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    return ready, empty


@gluon.jit
def load_chunk(operands, buffers, turn, chunk, first_group, first_row, tiles, chunks):
    """The producer's part: a chunk of W for each consumer, whose groups of 64 rows are first_group and those behind it,
    and as many columns of x, its rows from first_row on. tiles, chunks: of a row of W."""
    x_desc, words_desc, scales_desc = operands
    x_bufs, words_bufs, scales_bufs, x_ready, x_empty, ready, empty = buffers
    STAGES: gl.constexpr = ready.shape[0]
    GROUPS: gl.constexpr = words_bufs.shape[0] // STAGES
    X_STAGES: gl.constexpr = x_ready.shape[0]
    X_TILES: gl.constexpr = x_bufs.shape[0] // X_STAGES
    TOKENS: gl.constexpr = x_bufs.shape[1]
    BYTES: gl.constexpr = GROUPS * (_CHUNK_WORDS + 256 * scales_desc.dtype.primitive_bitwidth // 8)
    stage = turn % STAGES
    mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
    mbarrier.expect(ready.index(stage), BYTES)
    for part in gl.static_range(GROUPS):
        group, slot = first_group + part, stage * GROUPS + part
        first = (group * tiles + chunk * _CHUNK) * 4
        _load(words_desc, [first, 0], ready.index(stage), words_bufs.index(slot))
        first = group * chunks + chunk
        _load(scales_desc, [first, 0], ready.index(stage), scales_bufs.index(slot))
    for tile in gl.static_range(_CHUNK):
        x_turn = turn * (_CHUNK // X_TILES) + tile // X_TILES
        stage = x_turn % X_STAGES
        if tile % X_TILES == 0:
            mbarrier.wait(x_empty.index(stage), ((x_turn // X_STAGES) & 1) ^ 1)
            mbarrier.expect(x_ready.index(stage), X_TILES * TOKENS * 128)
        place = [first_row, (chunk * _CHUNK + tile) * 64]
        _load(x_desc, place, x_ready.index(stage), x_bufs.index(stage * X_TILES + tile % X_TILES))


@gluon.jit
def multiply_chunks(buffers, start, end, turn, PART: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """A consumer's part: float32 (64, tokens), the sum of W x' over the chunks from start to end, at least one, times
    what `RESCALE` takes back; and the turn behind them. PART: which of the program's groups of rows it has."""
    x_bufs, words_bufs, scales_bufs, x_ready, x_empty, ready, empty = buffers
    x_buffers = (x_bufs, x_ready, x_empty)
    dtype: gl.constexpr = x_bufs.dtype
    STAGES: gl.constexpr = ready.shape[0]
    GROUPS: gl.constexpr = words_bufs.shape[0] // STAGES
    X_STAGES: gl.constexpr = x_ready.shape[0]
    X_TILES: gl.constexpr = x_bufs.shape[0] // X_STAGES
    TOKENS: gl.constexpr = x_bufs.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    total = gl.zeros((64, TOKENS), gl.float32, MMA)
    slot = turn % STAGES
    mbarrier.wait(ready.index(slot), (turn // STAGES) & 1)
    words = words_bufs.index(slot * GROUPS + PART)
    scales = load_scales(scales_bufs.index(slot * GROUPS + PART), DOT)
    even = decode_tile(words, 0, scales, dtype, BLOCK_SIZE, DOT)
    for chunk in range(start, end):
        words = words_bufs.index(turn % STAGES * GROUPS + PART)
        acc = _start(total, even, even, x_buffers, turn, 0)
        odd = decode_tile(words, 1, scales, dtype, BLOCK_SIZE, DOT)
        acc = _start(acc, odd, even, x_buffers, turn, 1)
        even = decode_tile(words, 2, scales, dtype, BLOCK_SIZE, DOT)
        acc = _start(acc, even, odd, x_buffers, turn, 2)
        odd = decode_tile(words, 3, scales, dtype, BLOCK_SIZE, DOT)
        acc = _start(acc, odd, even, x_buffers, turn, 3)
        mbarrier.arrive(empty.index(turn % STAGES), count=1)
        turn += 1
        slot = turn % STAGES
        mbarrier.wait(ready.index(slot), (turn // STAGES) & 1, pred=chunk + 1 < end)
        scales = load_scales(scales_bufs.index(slot * GROUPS + PART), DOT)
        even = decode_tile(words_bufs.index(slot * GROUPS + PART), 0, scales, dtype, BLOCK_SIZE, DOT)
        total, _, _, _, _ = warpgroup_mma_wait(0, deps=(acc, odd[0], odd[1], odd[2], odd[3]))
        mbarrier.arrive(x_empty.index((turn * (_CHUNK // X_TILES) - 1) % X_STAGES), count=1)
    return total, turn


@gluon.jit
def _start(acc, weight, running, buffers, turn, TILE: gl.constexpr):
    """Start acc + weight x of a tile of chunk `turn`. With its first plane under way, end the product before, whose
    weight is `running`, and give its x back; the first tile of a chunk has none before it."""
    x_bufs, x_ready, x_empty = buffers
    X_STAGES: gl.constexpr = x_ready.shape[0]
    X_TILES: gl.constexpr = x_bufs.shape[0] // X_STAGES
    x_turn = turn * (_CHUNK // X_TILES) + TILE // X_TILES
    stage = x_turn % X_STAGES
    if TILE % X_TILES == 0:
        mbarrier.wait(x_ready.index(stage), (x_turn // X_STAGES) & 1)
    x = x_bufs.index(stage * X_TILES + TILE % X_TILES).permute((1, 0))
    acc = warpgroup_mma(weight[0], x.slice(0, 16), acc, is_async=True)
    if TILE > 0:
        acc, _, _, _, _ = warpgroup_mma_wait(1, deps=(acc, running[0], running[1], running[2], running[3]))
        if TILE % X_TILES == 0:
            mbarrier.arrive(x_empty.index((x_turn - 1) % X_STAGES), count=1)
    acc = warpgroup_mma(weight[1], x.slice(16, 16), acc, is_async=True)
    acc = warpgroup_mma(weight[2], x.slice(32, 16), acc, is_async=True)
    return warpgroup_mma(weight[3], x.slice(48, 16), acc, is_async=True)
