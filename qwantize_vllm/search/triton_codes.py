"""Better codes at given scales in Triton: coordinate descent under r'Hr, one thread a block.

The rule is that of `codes.py`: element by element, the code nearest to the vertex of r'Hr, where that is lower.
r = z - value*s is in units of g (times a power of two), and with it the gradient Hr, of which a step d in element i
leaves Hr - d H_i. All of a block is in the registers of a thread: values and gradient are tuples of a vector for each
element. So that a sweep is a loop, and yet no register is looked for, the tuples turn: the element whose turn it is
comes first, and goes to the end when it is done.

    (v_0 v_1 ... v_15)  ->  (v_1 ... v_15 v_0)  ->  ...  ->  (v_0 v_1 ... v_15)       H_i as (H_ii H_i,i+1 ... H_i,i-1)

The rows of H are turned as the tuples will be. All threads of a program read the same row, whose blocks are in one
column. A sweep is about six instructions for each pair of elements; nothing is exchanged between threads.

The steps are float32, in which a sum of many of them may not fall where each seems to. So at the end the difference

    r'Hr (after) - r'Hr (before)  =  (after - before)' H (after + before)

is computed in float64, and a block where it is not negative keeps the codes that it had.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.search.codes import SWEEPS
from qwantize_vllm.search.reference import normalize_hessian
from qwantize_vllm.search.triton_numbers import e2m1_code, e2m1_round, power_of_two_below
from qwantize_vllm.search.triton_tiles import LaunchShape, columns, launch_shape, load_blocks, to_float32
from qwantize_vllm.triton_format import decode_e2m1, decode_e4m3
from qwantize_vllm.triton_launch import launch_now

# By the major version of the compute capability. A warp ends its sweeps when the last of its blocks is done.
CODES_SHAPES = {9: LaunchShape(blocks=32, warps=1, tiles=4)}


def refine_codes(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block_size: int,
    global_scale: torch.Tensor,
    hessian: torch.Tensor,
) -> torch.Tensor:
    """Launch the descent over a batch of matrices.

    Args:
        weight: (E, N, K) float32, bfloat16 or float16, finite; any strides.
        codes: uint8 (E, N, K/2), packed, contiguous; overwritten.
        scales: uint8 (E, N, K/block_size), E4M3 codes 1..126, contiguous.
        block_size: 16 or 32; divides K.
        global_scale: float32 (E,), positive and normal.
        hessian: float32 (E, K/block_size, block_size, block_size), the last two contiguous;
            the first may be expanded (stride 0).

    Returns:
        codes.
    """
    e, n, k = weight.shape
    if weight.numel():
        shared = e == 1 or hessian.stride(0) == 0
        form = _turned(hessian[:1] if shared else hessian)
        shape = launch_shape(CODES_SHAPES, weight.device, n)
        programs = triton.cdiv(n, shape.blocks * shape.tiles)
        launch_now(
            _refine_codes_kernel,
            (e * programs * (k // block_size),),
            weight,
            global_scale,
            form,
            codes.view(torch.int32),
            scales,
            n,
            programs,
            k // block_size,
            *weight.stride(),
            SHARED=shared,
            BLOCK_SIZE=block_size,
            TILE=shape.blocks,
            TILES=shape.tiles,
            SWEEPS=SWEEPS,
            num_warps=shape.warps,
        )
    return codes


def _turned(hessian: torch.Tensor) -> torch.Tensor:
    """Row i of each H (..., block, block), symmetric and times a power of two, beginning with H_ii."""
    form = normalize_hessian((hessian + hessian.mT) / 2)
    index = torch.arange(form.shape[-1], device=form.device)
    return form.gather(-1, ((index[:, None] + index) % len(index)).expand(form.shape)).contiguous()


@triton.jit
def _refine_codes_kernel(
    weight_ptr,
    global_scale_ptr,
    form_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    programs,
    blocks_per_row,
    stride_e,
    stride_n,
    stride_k,
    SHARED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    SWEEPS: tl.constexpr,
):
    """programs: how many share a column of blocks; neighbouring ones read neighbouring columns of the same rows."""
    j = (tl.program_id(0) % blocks_per_row).to(tl.int64)
    program = tl.program_id(0) // blocks_per_row
    matrix = (program // programs).to(tl.int64)
    row = (program % programs).to(tl.int64) * (TILE * TILES) + tl.arange(0, TILE)
    unit, inverse = power_of_two_below(tl.load(global_scale_ptr + matrix))
    form_ptr += (j if SHARED else matrix * blocks_per_row + j) * (BLOCK_SIZE * BLOCK_SIZE)
    weight_ptr += matrix * stride_e + j * (BLOCK_SIZE * stride_k)
    for _ in range(TILES):
        inside = row < rows
        block = (matrix * rows + row) * blocks_per_row + j
        weights = load_blocks(weight_ptr, row * stride_n, stride_k, inside, BLOCK_SIZE)
        z = _in_order(columns(to_float32(weights) * inverse), BLOCK_SIZE)
        scale = decode_e4m3(tl.load(scales_ptr + block, mask=inside, other=1).to(tl.int32))
        before = _load_values(codes_ptr, block, inside, BLOCK_SIZE)
        after = _descend(z, before, scale, unit, form_ptr, BLOCK_SIZE, SWEEPS)
        falls = inside & (_difference(z, before, after, scale, unit, form_ptr, BLOCK_SIZE) < 0.0)
        _store_values(codes_ptr, block, falls, after, BLOCK_SIZE)
        row += TILE


@triton.jit
def _in_order(x, SIZE: tl.constexpr):
    """The tuple x, in the order of `load_blocks`, in that of the weights."""
    result = ()
    for element in tl.static_range(SIZE):
        result = result + (x[element % 8 * (SIZE // 8) + element // 8],)
    return result


@triton.jit
def _load_values(codes_ptr, block, inside, SIZE: tl.constexpr):
    """The values of blocks (TILE,), a tuple of a (TILE,) for each element."""
    values = ()
    for word in tl.static_range(SIZE // 8):
        codes = tl.load(codes_ptr + block * (SIZE // 8) + word, mask=inside, other=0)
        for nibble in tl.static_range(8):
            values = values + (decode_e2m1(codes >> (4 * nibble)),)
    return values


@triton.jit
def _store_values(codes_ptr, block, inside, values, SIZE: tl.constexpr):
    """What _load_values undoes."""
    for word in tl.static_range(SIZE // 8):
        codes = tl.zeros(block.shape, tl.int32)
        for nibble in tl.static_range(8):
            codes |= e2m1_code(values[8 * word + nibble]) << (4 * nibble)
        tl.store(codes_ptr + block * (SIZE // 8) + word, codes, mask=inside)


@triton.jit
def _turn(x, last, SIZE: tl.constexpr):
    """The tuple x without its first, and then last."""
    result = ()
    for i in tl.static_range(1, SIZE):
        result = result + (x[i],)
    return result + (last,)


@triton.jit
def _descend(z, values, scale, unit, form_ptr, SIZE: tl.constexpr, SWEEPS: tl.constexpr):
    """The values after the sweeps; z and values are tuples of (TILE,), scale (TILE,)."""
    gradient = _gradient(z, values, scale, unit, form_ptr, SIZE)
    inverse = 1.0 / (scale * unit)
    sweep = 0
    while sweep < SWEEPS:
        gained = scale * 0.0
        for element in range(SIZE):
            row_ptr = form_ptr + element * SIZE
            diagonal = tl.load(row_ptr)
            new = _nearest(values[0] + gradient[0] * (inverse / diagonal))
            change = (new - values[0]) * scale * unit
            gain = change * (2.0 * gradient[0] - change * diagonal)
            gains = gain > 0.0
            values = _turn(values, tl.where(gains, new, values[0]), SIZE)
            gradient = _moved(gradient, row_ptr, tl.where(gains, change, 0.0), SIZE)
            gained = tl.where(gains, gain, gained)
        sweep = tl.where(tl.max(gained, axis=0) > 0.0, sweep + 1, SWEEPS)
    return values


@triton.jit
def _gradient(z, values, scale, unit, form_ptr, SIZE: tl.constexpr):
    """H r, a tuple of (TILE,)."""
    gradient = ()
    for _ in tl.static_range(SIZE):
        gradient = gradient + (scale * 0.0,)
    for element in range(SIZE):
        residual = tl.fma(values[0] * scale, scale * 0.0 - unit, z[0])
        gradient = _moved(gradient, form_ptr + element * SIZE, -residual, SIZE)
        z, values = _turn(z, z[0], SIZE), _turn(values, values[0], SIZE)
    return gradient


@triton.jit
def _moved(gradient, row_ptr, change, SIZE: tl.constexpr):
    """The gradient after the first element's residual has fallen by change (TILE,), turned."""
    result = ()
    for i in tl.static_range(1, SIZE):
        result = result + (gradient[i] - tl.load(row_ptr + i) * change,)
    return result + (gradient[0] - tl.load(row_ptr) * change,)


@triton.jit
def _nearest(y):
    """The E2M1 value nearest to y (TILE,), float32; which one it is for a NaN does not matter."""
    magnitude = e2m1_round(tl.minimum(tl.abs(y), 6.0))
    sign = y.to(tl.int32, bitcast=True) & -0x80000000
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _difference(z, before, after, scale, unit, form_ptr, SIZE: tl.constexpr):
    """r'Hr of the values after minus that of those before, in float64 (TILE,)."""
    total = scale.to(tl.float64) * 0.0
    step = scale.to(tl.float64) * unit.to(tl.float64)
    changes, sums = _changes(before, after, SIZE), _sums(z, before, after, step, SIZE)
    for element in range(SIZE):
        product = total * 0.0
        for i in tl.static_range(SIZE):
            product += tl.load(form_ptr + element * SIZE + i).to(tl.float64) * sums[i]
        total += product * (changes[0].to(tl.float64) * step)
        sums, changes = _turn(sums, sums[0], SIZE), _turn(changes, changes[0], SIZE)
    return total


@triton.jit
def _changes(before, after, SIZE: tl.constexpr):
    """What the residuals become less what they were, in steps of scale*unit."""
    result = ()
    for i in tl.static_range(SIZE):
        result = result + (before[i] - after[i],)
    return result


@triton.jit
def _sums(z, before, after, step, SIZE: tl.constexpr):
    """The residuals before plus those after, in float64."""
    result = ()
    for i in tl.static_range(SIZE):
        result = result + (2.0 * z[i].to(tl.float64) - (before[i] + after[i]).to(tl.float64) * step,)
    return result
