"""Compile every kernel for an architecture of NVIDIA or AMD, down to machine code; needs no GPU.

    python -m tests.compile_kernels 90|gfx942 [every]

`every` combination of types and constants that a launcher makes; without it each type and constant at least once, and
of the shapes for many tokens on Hopper the first and the last. Each kernel once more for sizes and strides of 1, which
Triton compiles apart.
A program of its own because TRITON_INTERPRET, which the tests set, must be unset when triton is imported.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from qwantize_vllm.hessian.triton_accumulate import _add_blocks_kernel
from qwantize_vllm.matmul import grouped_shapes
from qwantize_vllm.matmul.tile_shapes import (
    ANY_TOKENS,
    ELSEWHERE,
    NORMED_TOKENS,
    RULES,
    DecodeShape,
    TileShape,
    choose_normed_shape,
)
from qwantize_vllm.matmul.triton_dequantize import _dequantize_kernel
from qwantize_vllm.matmul.triton_fused import _fused_kernel, _reduce_kernel
from qwantize_vllm.matmul.triton_grouped import _grouped_kernel, _sum_kernel
from qwantize_vllm.matmul.triton_local_ids import _map_kernel
from qwantize_vllm.matmul.triton_normed import _add_norm_kernel, _gate_kernel
from qwantize_vllm.matmul.triton_plan import _count_kernel, _place_kernel
from qwantize_vllm.matmul.triton_swizzle import _scales_kernel, _words_kernel
from qwantize_vllm.matmul.triton_swizzled import _swizzled_kernel
from qwantize_vllm.matmul.triton_unswizzle import _unswizzle_kernel
from qwantize_vllm.matmul.wgmma_shapes import STEPS, WgmmaShape
from qwantize_vllm.search.codes import SWEEPS
from qwantize_vllm.search.triton_codes import _refine_codes_kernel
from qwantize_vllm.search.triton_hessian import _search_hessian_kernel
from qwantize_vllm.search.triton_hessian_form import _prepare_hessian_kernel
from qwantize_vllm.search.triton_quality import _quality_kernel
from qwantize_vllm.search.triton_sse import _search_sse_kernel
from tests.wgmma_hazards import disassemble, hazards

# Bytes of shared memory of a workgroup on AMD's GPUs; those named here have more than others.
_LDS, _MORE_LDS = 64 * 1024, {"gfx950": 160 * 1024}
INPUTS, HALVES, BLOCKS = ("*bf16", "*fp16", "*fp32"), ("*bf16", "*fp16"), (16, 32)


def combined(every: bool, *axes: Sequence[Any]) -> Iterable[tuple[Any, ...]]:
    """All combinations of a value of each axis; or so many that each value is there, the first of all together."""
    if every:
        return itertools.product(*axes)
    return itertools.islice(zip(*map(itertools.cycle, axes), strict=False), max(map(len, axes)))


def variants(capability: int, every: bool) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """(kernel, types of its pointers, values of its constants)."""
    packed = {"codes_ptr": "*i32", "scales_ptr": "*u8", "global_scale_ptr": "*fp32"}
    searched = ((True, True), (True, False), (False, True), (False, False))
    for dtype, block, (optimal, whole) in combined(every, INPUTS, BLOCKS, searched):
        shape = {"TILE": 32, "TILES": 1 if optimal else 4}
        flags = {"OPTIMAL": optimal, "WHOLE": whole}
        yield _search_sse_kernel, {"weight_ptr": dtype, **packed}, {"BLOCK_SIZE": block, **shape, **flags}
    for dtype, block in combined(every, INPUTS, BLOCKS):
        weight = {"weight_ptr": dtype, **packed}
        prepared = {**weight, "form_ptr": "*fp32", "bound_ptr": "*fp32"}
        yield _search_hessian_kernel, prepared, {"BLOCK_SIZE": block, "TILE": 32, "TILES": 4, "SHARED": True}
        refined = {**weight, "form_ptr": "*fp32"}
        shape = {"TILE": 32, "TILES": 4, "SWEEPS": SWEEPS}
        yield _refine_codes_kernel, refined, {"BLOCK_SIZE": block, **shape, "SHARED": True}
        quality = {"weight_ptr": dtype, **packed, "codes_ptr": "*u8", "sums_ptr": "*fp64"}
        yield _quality_kernel, quality, {"BLOCK_BYTES": block // 2, "TILE": 2048}
        sums = {"TOKENS": 64, "STAGES": 4, "FLOAT32": dtype == "*fp32"}
        yield _add_blocks_kernel, {"x_ptr": dtype, "total_ptr": "*fp32"}, {"SIZE": block, **sums}
        read = {"codes_ptr": "*u8", "scales_ptr": "*u8", "global_scale_ptr": "*fp32"}
        yield _dequantize_kernel, {**read, "out_ptr": dtype}, {"ROWS": 4, "BYTES": 256, "BLOCK_BYTES": block // 2}
    yield _words_kernel, {"codes_ptr": "*u8", "words_ptr": "*i32"}, {"TILES": 8}
    for block in BLOCKS:
        yield _scales_kernel, {"block_scales_ptr": "*u8", "scales_ptr": "*u8"}, {"ROW": 256 // block, "TILE": 2048}
        read = {"words_ptr": "*i16", "scales_ptr": "*i32" if block == 16 else "*i16", "global_scale_ptr": "*fp32"}
        for dtype in INPUTS:
            yield (
                _unswizzle_kernel,
                {**read, "out_ptr": dtype},
                {"BLOCK_SIZE": block, "STEPS": 4, "PTX": dtype != "*fp32"},
            )
        yield (
            _prepare_hessian_kernel,
            {"hessian_ptr": "*fp32", "form_ptr": "*fp32", "weight_ptr": "*fp32"},
            {"SIZE": block},
        )
    rules = RULES.get(capability // 10, ELSEWHERE)
    shapes = [rule.shape for rule in rules if isinstance(rule.shape, TileShape)]
    for shape, block in combined(every, list(dict.fromkeys([*shapes, ANY_TOKENS])), BLOCKS):
        dtype = HALVES[block // 16 - 1]
        x = {"x_ptr": dtype, "y_ptr": dtype, "bias_ptr": dtype, "partial_ptr": "*fp32", "arrived_ptr": "*i32"}
        read = {"words_ptr": "*i16", "scales_ptr": "*i32" if block == 16 else "*i16", "global_scale_ptr": "*fp32"}
        tile = {"TILE_M": shape.tokens, "GROUPS": shape.groups, "STEPS": shape.steps, "STAGES": shape.stages}
        flags = {"BLOCK_SIZE": block, "WHOLE_K": False, "HAS_BIAS": True, "PTX": True}
        yield _swizzled_kernel, {**x, **read}, {**tile, **flags}
    for dtype, block, tile_m in combined(every, HALVES, BLOCKS, (16, 32, 64)):
        pointers = {"x_ptr": dtype, "codes_ptr": "*u8", "scales_ptr": "*u8", "partial_ptr": "*fp32"}
        tiles = {"TILE_M": tile_m, "TILE_N": 64, "TILE_K": 256}
        yield _fused_kernel, pointers, {"BLOCK_SIZE": block, "DOT_DTYPE": None, **tiles}
    for dtype, bias in itertools.product(HALVES, (False, True)):
        pointers = {"partial_ptr": "*fp32", "global_scale_ptr": "*fp32", "bias_ptr": dtype, "y_ptr": dtype}
        yield _reduce_kernel, pointers, {"HAS_BIAS": bias, "TILE": 1024}
    for dtype in HALVES:
        names = ("x_ptr", "residual_ptr", "gain_ptr", "sums_ptr", "y_ptr")
        yield _add_norm_kernel, {**dict.fromkeys(names, dtype), "epsilon": "fp32"}, {"COLUMNS": 4096}
        yield _gate_kernel, {"x_ptr": dtype, "y_ptr": dtype}, {"COLUMNS": 1024}


def expert_variants(capability: int) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Those for the experts of a mixture: one shape of each rule, with gate and up and with down in turn."""
    rules = grouped_shapes.RULES.get(capability // 10, grouped_shapes.ELSEWHERE)
    for number, rule in enumerate(rules):
        shape, activation = (rule.gate_up, "silu") if number % 2 == 0 else (rule.down, "none")
        dtype, block = (("*bf16", 16), ("*fp16", 32))[number % 2]
        pointers = {
            "x_ptr": dtype,
            "y_ptr": dtype,
            "words_ptr": "*i16",
            "scales_ptr": "*i32" if block == 16 else "*i16",
        }
        pointers |= {"global_scales_ptr": "*fp32", "ids_ptr": "*i32", "plan_ptr": "*i32"}
        tile = {"TILE_M": shape.tokens, "GROUPS": shape.groups, "STEPS": shape.steps, "STAGES": shape.stages}
        flags = {"MEMBERS": 1 + number % 2, "BLOCK_SIZE": block, "PAIRS": 0 if shape.tokens > 16 else 64}
        yield _grouped_kernel, pointers, {**tile, **flags, "WHOLE_K": True, "ACTIVATION": activation, "PTX": True}
    plan = {"ids_ptr": "*i32", "plan_ptr": "*i32", "counts_ptr": "*i32"}
    yield _count_kernel, plan, {"BINS": 256, "CHUNK": 1024}
    yield _place_kernel, plan, {"BINS": 256, "CHUNK": 1024, "WIDTH": 16, "OWN": 128}
    for ids in ("*i32", "*i64"):
        yield _map_kernel, {"ids_ptr": ids, "map_ptr": "*i32", "local_ptr": "*i32"}, {"IDS": 1024}
    for partial in ("*bf16", "*fp32"):
        pointers = {"z_ptr": partial, "weights_ptr": "*fp32", "ids_ptr": "*i32", "y_ptr": "*bf16"}
        yield _sum_kernel, {**pointers, "places_ptr": "*i32"}, {"TOP_K": 8, "COLUMNS": 512}


def warps(kernel: Any, constants: dict[str, Any]) -> int:
    """What has a block a lane or a warp has one warp a program; most others Triton's default."""
    if "num_warps" in constants:
        return constants["num_warps"]
    if kernel is _prepare_hessian_kernel:
        return constants["SIZE"] // 2
    return 1 if kernel.__name__.startswith(("_search", "_refine", "_add")) else 4


def decode_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Hopper's kernel for few tokens: each shape of a rule, and one of 4 tokens, once."""
    from qwantize_vllm.matmul.gluon_decode import _decode_kernel

    shapes = [rule.shape for rule in RULES[9] if isinstance(rule.shape, DecodeShape)]
    for number, shape in enumerate(dict.fromkeys([*shapes, DecodeShape(4, 2, 4, 4)])):
        dtype, block = (("*bf16", 16), ("*fp16", 32), ("*bf16", 32), ("*fp16", 16))[number % 4]
        block = block if shape.takes(block) else 16
        pointers = {"x_ptr": dtype, "y_ptr": dtype, "bias_ptr": dtype, "words_ptr": "*i16", "global_scale_ptr": "*fp32"}
        pointers["scales_ptr"] = "*i32" if block == 16 else "*i16"
        tile = {"TOKENS": shape.tokens, "PARTS": shape.parts, "TILES": shape.tiles}
        flags = {"BLOCK_SIZE": block, "SCALE_A_ROW": number % 2 == 0, "WHOLE": number % 3 == 0}
        without = dict.fromkeys(("residual_ptr", "gain_ptr", "sums_ptr", "residual_stride", "epsilon"))
        yield _decode_kernel, pointers, {**tile, **flags, **without, "GATED": False, "num_warps": shape.warps}


def normed_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Hopper's kernel for few tokens where it norms x: each shape once."""
    from qwantize_vllm.matmul.gluon_decode import _decode_kernel

    names = ("x_ptr", "y_ptr", "residual_ptr", "gain_ptr", "sums_ptr")
    cases = [(1, False, 16), (2, False, 32), *itertools.product(NORMED_TOKENS, (True,), (16, 32))]
    for number, (tokens, gated, block) in enumerate(cases):
        shape = choose_normed_shape(9, tokens, gated, block)
        assert shape is not None
        scales = "*i32" if block == 16 else "*i16"
        pointers = {**dict.fromkeys(names, "*bf16"), "words_ptr": "*i16", "scales_ptr": scales, "epsilon": "fp32"}
        pointers["global_scale_ptr"] = "*fp32"
        tile = {"TOKENS": tokens, "PARTS": shape.parts, "TILES": shape.tiles, "num_warps": shape.warps}
        flags = {"BLOCK_SIZE": block, "SCALE_A_ROW": number % 2 == 0, "WHOLE": number % 3 != 0, "GATED": gated}
        yield _decode_kernel, pointers, {**tile, **flags, "bias_ptr": None}


def wgmma_variants(every: bool) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Those of Hopper's own kernel: its types are those of tensor descriptors."""
    from qwantize_vllm.matmul.gluon_pipeline import FLAT_LAYOUTS, X_LAYOUT
    from qwantize_vllm.matmul.gluon_wgmma import _wgmma_kernel

    shapes = many_tokens(every)
    for shape, (dtype, block) in combined(every, shapes, (("bf16", 16), ("fp16", 32))):
        scales = torch.int32 if block == 16 else torch.int16
        x = f"tensordesc<{dtype}[{shape.tokens}, 64],{X_LAYOUT!r}>"
        types = {
            "x_desc": x,
            "words_desc": f"tensordesc<i16[16, 256],{FLAT_LAYOUTS[torch.int16]!r}>",
            "scales_desc": f"tensordesc<i{8 * scales.itemsize}[1, 256],{FLAT_LAYOUTS[scales]!r}>",
            "y_desc": x,
            "eight_desc": f"tensordesc<{dtype}[8, 64],{X_LAYOUT!r}>",
            **{"global_scale_ptr": "*fp32", "bias_ptr": f"*{dtype}", "sums_ptr": "*i32"},
        }
        names = {"TOKENS": shape.tokens, "GROUPS": shape.groups, "X_TILES": shape.x_tiles}
        stages = {"X_STAGES": shape.x_stages, "STAGES": shape.stages}
        yield _wgmma_kernel, types, {**names, **stages, "BLOCK_SIZE": block, "num_warps": 4}
    yield from grouped_wgmma_variants(shapes)
    yield from decode_variants()
    yield from normed_variants()


def many_tokens(every: bool) -> list[WgmmaShape]:
    """Shapes of Hopper's kernel for many tokens: all, or the smallest and the largest."""
    shapes = list(STEPS)
    return shapes if every else [shapes[0], shapes[-1]]


def grouped_wgmma_variants(shapes: Sequence[WgmmaShape]) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Each shape once, with gate and up and with down in turn."""
    from qwantize_vllm.matmul.gluon_grouped import H_LAYOUT, _copy_kernel, _grouped_wgmma_kernel
    from qwantize_vllm.matmul.gluon_pipeline import FLAT_LAYOUTS, X_LAYOUT

    yield _copy_kernel, {"x_ptr": "*bf16", "pairs_ptr": "*i32", "out_ptr": "*bf16"}, {"COLUMNS": 1024}
    for number, shape in enumerate(shapes):
        dtype, block, scales = (("bf16", 16, torch.int32), ("fp16", 32, torch.int16))[number % 2]
        width, layout, activation = ((32, H_LAYOUT, "silu"), (64, X_LAYOUT, "none"))[number % 2]
        types = {
            "x_desc": f"tensordesc<{dtype}[{shape.tokens}, 64],{X_LAYOUT!r}>",
            "words_desc": f"tensordesc<i16[16, 256],{FLAT_LAYOUTS[torch.int16]!r}>",
            "scales_desc": f"tensordesc<i{8 * scales.itemsize}[1, 256],{FLAT_LAYOUTS[scales]!r}>",
            "y_desc": f"tensordesc<{dtype}[{shape.tokens}, {width}],{layout!r}>",
            **{"global_scales_ptr": "*fp32", "plan_ptr": "*i32"},
        }
        names = {"TOKENS": shape.tokens, "GROUPS": shape.groups, "X_TILES": shape.x_tiles, "ACTIVATION": activation}
        stages = {"X_STAGES": shape.x_stages, "STAGES": shape.stages, "MEMBERS": 1 + number % 2}
        yield _grouped_wgmma_kernel, types, {**names, **stages, "BLOCK_SIZE": block, "num_warps": 4}


def compile_all(target: GPUTarget, every: bool) -> None:
    nvidia = target.backend == "cuda"
    capability = int(target.arch) if nvidia else 0
    everywhere = variants(capability, every), expert_variants(capability)
    compiled_for_ones: set[Any] = set()
    for kernel, pointers, constants in itertools.chain(*everywhere, wgmma_variants(every) if capability == 90 else ()):
        constants = {**constants, **by_target(kernel, constants, nvidia, capability)}
        compiled = compile_one(kernel, pointers, constants, target)
        check(kernel, constants, compiled)
        code = compiled.asm["cubin" if nvidia else "hsaco"]
        print(kernel.__name__, *pointers.values(), constants, f"{len(code)} bytes", flush=True)
        if (ones := ones_of(kernel, pointers, constants)) and kernel not in compiled_for_ones:
            compiled_for_ones.add(kernel)
            compile_one(kernel, pointers, {**constants, **ones}, target)
            print(kernel.__name__, *ones, "are 1", flush=True)


def target_of(name: str) -> GPUTarget:
    """90 is NVIDIA's compute capability 9.0, gfx942 an architecture of AMD: gfx9 has 64 lanes, gfx10 and later 32."""
    if name.isdigit():
        return GPUTarget("cuda", int(name), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def by_target(kernel: Any, constants: dict[str, Any], nvidia: bool, capability: int) -> dict[str, bool]:
    """Constants that say what the GPU can."""
    waits = {"DEPENDENT": capability >= 90} if "DEPENDENT" in kernel.arg_names else {}
    return waits if nvidia or "PTX" not in constants else {**waits, "PTX": False}


def ones_of(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> dict[str, int]:
    """Its numbers, all 1, as far as Triton compiles for that: they are then Python's."""
    given = pointers.keys() | constants.keys()
    return {each.name: 1 for each in kernel.params if each.name not in given and not each.do_not_specialize}


def compile_one(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], target: GPUTarget) -> Any:
    """For a number, where none is given as a constant, that may be any."""
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
    indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    return triton.compile(
        source_type(fn=kernel, signature=signature, constexprs=indexed),
        target=target,
        options={"num_warps": warps(kernel, constants)},
    )


def check(kernel: Any, constants: dict[str, Any], compiled: Any) -> None:
    """The machine code, if it has what is looked for there; to disassemble it takes 0.4 s."""
    if "hsaco" in compiled.asm:
        check_shared_memory(kernel, constants, compiled)
        return
    if not constants.get("DEPENDENT") and "wgmma" not in compiled.asm["ptx"]:
        return
    with tempfile.TemporaryDirectory() as folder:
        code = disassemble(compiled.asm["cubin"], Path(folder))
    check_products(kernel, constants, code)
    if constants.get("DEPENDENT"):
        check_wait(kernel, constants, code)


def check_shared_memory(kernel: Any, constants: dict[str, Any], compiled: Any) -> None:
    """That it fits, which on AMD's GPUs is seen when a kernel is launched."""
    if compiled.metadata.shared > _MORE_LDS.get(compiled.metadata.target.arch, _LDS):
        raise SystemExit(f"{kernel.__name__} {constants}: {compiled.metadata.shared} bytes of shared memory")


def check_products(kernel: Any, constants: dict[str, Any], code: str) -> None:
    products, found = hazards(code)
    if found:
        raise SystemExit(f"{kernel.__name__} {constants}: written while a product runs on them: {found[:3]}")
    if kernel.__name__.endswith("wgmma_kernel") and not products:
        raise SystemExit(f"{kernel.__name__} {constants}: no product with its left operand in registers")


def check_wait(kernel: Any, constants: dict[str, Any], code: str) -> None:
    """That memory is not touched before the kernel before is done. Of kernels whose warps have programs of their own,
    that each program waits: all consumers, and the producer."""
    waits = [match.start() for match in re.finditer(r"\bACQBULK\b", code)]
    if kernel.__name__.endswith("wgmma_kernel"):
        if len(waits) != constants["GROUPS"] + 1:
            raise SystemExit(f"{kernel.__name__} {constants}: {len(waits)} waits for the kernel before")
        return
    accesses = [match.start() for match in re.finditer(r"\b(LDG|LDGSTS|STG|ATOM|ATOMG|RED|LD|ST)\.", code)]
    if len(waits) != 1 or waits[0] > min(accesses):
        raise SystemExit(f"{kernel.__name__} {constants}: memory is touched before the kernel before is done")


if __name__ == "__main__":
    compile_all(target_of(sys.argv[1]), every=sys.argv[2:] == ["every"])
