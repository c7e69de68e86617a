"""Have another process compile what products for Hopper launch, and find it in Triton's cache; needs no GPU.

    python -m tests.compile_elsewhere

A program of its own because TRITON_INTERPRET, which the tests set, must be unset when triton is imported. Prints the
name of every kernel that was in the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from qwantize_vllm.matmul import compile_process
from qwantize_vllm.matmul.compile_process import Request, start_compiling
from qwantize_vllm.matmul.gluon_decode import matmul_decode
from qwantize_vllm.matmul.gluon_wgmma import matmul_wgmma
from qwantize_vllm.matmul.normed import AddedNorm
from qwantize_vllm.matmul.tile_shapes import DecodeShape, TileShape
from qwantize_vllm.matmul.triton_grouped import experts_swizzled
from qwantize_vllm.matmul.triton_normed import add_norm, silu_and_mul
from qwantize_vllm.matmul.triton_swizzled import matmul_swizzled
from qwantize_vllm.triton_launch import Launch, compile_now
from tests.replay_launches import Driver, experts, weight

compilations: list[tuple[str, bool]] = []


def launch_all(launch: Launch) -> None:
    x, w = torch.empty(200, 4096, dtype=torch.bfloat16), weight(256, 4096)
    bias = torch.zeros(256, dtype=torch.bfloat16)
    norm = AddedNorm(x, x[0], 1e-6, x)
    matmul_decode(x[:1], w, bias, DecodeShape(1, 1, 4, 8), launch=launch)
    matmul_swizzled(x[:5], w, None, TileShape(8, 1, 4, 4, 3), launch=launch)
    matmul_wgmma(x, w, bias, launch=launch)
    add_norm(x, norm, launch)
    silu_and_mul(x, launch)
    w13, w2 = experts(256, 128, True), experts(128, 128, False)
    for tokens in (1, 200):
        ids = torch.zeros(tokens, 2, dtype=torch.int32)
        experts_swizzled(x[:tokens, :128], w13, w2, ids.float(), ids, "silu", launch=launch)


def listen(*, src: Any, cache_hit: bool, **rest: Any) -> None:
    compilations.append((src.name, cache_hit))


def requested() -> Request:
    request = Request()
    launch_all(request.launch)
    return request


def strangers(request: Request) -> Iterator[Request]:
    """What is not done when request is."""
    yield dataclasses.replace(request, target=["cuda", 100, 32])
    yield dataclasses.replace(request, sources=["changed", *request.sources[1:]])
    yield dataclasses.replace(request, kernels=request.kernels[1:], sources=request.sources[1:])


if __name__ == "__main__":
    driver.set_active(Driver())
    knobs.compilation.listener = listen
    compile_process._PATIENCE = 0.1
    request = requested()
    broken = Request([("tests.compile_elsewhere", "no_such_kernel", "{}")], ["source"], request.target)
    assert not request.done
    threads = [start_compiling(each) for each in (broken, request)]
    assert threads[0] is threads[1] is not None, "a process each"
    threads[0].join()
    assert not broken.done
    assert compilations == []
    assert request.done
    assert not any(each.done for each in strangers(request))
    # What was noted is not yet known here: it is noted again, and found done.
    assert start_compiling(requested()) is None
    assert start_compiling(broken) is not threads[0], "it has ended"
    launch_all(compile_now)
    assert all(hit for _, hit in compilations), compilations
    assert requested().kernels == []
    print(*sorted({name for name, _ in compilations}))
