"""Record launches of the kernels for swizzled weights and replay them on a driver that only notes them; needs no GPU.

    python -m tests.replay_launches

A program of its own because TRITON_INTERPRET, which the tests set, must be unset when triton is imported. Prints the
name of every kernel whose replayed launches were what Triton makes of the same tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from qwantize_vllm.matmul import gluon_grouped, gluon_wgmma, launcher, partial_sums, replay, triton_grouped
from qwantize_vllm.matmul.experts import SwizzledExperts
from qwantize_vllm.matmul.gluon_decode import matmul_decode
from qwantize_vllm.matmul.gluon_wgmma import matmul_wgmma
from qwantize_vllm.matmul.swizzle import ARRIVALS, SwizzledNvfp4
from qwantize_vllm.matmul.tile_shapes import DecodeShape, TileShape
from qwantize_vllm.matmul.triton_swizzled import matmul_swizzled
from qwantize_vllm.triton_launch import launch_now

# Of a TensorDescriptor, what launching looks at besides its tensor.
_OF_DESCRIPTORS = ("shape", "strides", "block_shape", "layout", "padding")
_LEAST_ADDRESS = 2**32  # no size is so large

launches: list[tuple[Any, ...]] = []


class _Utils:
    def load_binary(self, name: str, *rest: Any) -> tuple[Any, ...]:
        return name, name, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class Driver:
    """As much of a CUDA driver as launching asks for."""

    utils = _Utils()

    @staticmethod
    def launcher_cls(src: Any, metadata: Any) -> Any:
        # The grid, the function, and the kernel's arguments behind stream, metadata and hooks.
        return lambda *given: launches.append((*given[:3], given[4], *given[9:]))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def weight(n: int, k: int) -> SwizzledNvfp4:
    groups, tiles = -(-n // 64), -(-k // 64)
    words = torch.empty(groups, tiles, 4, 256, dtype=torch.int16)
    scales = torch.empty(groups, -(-tiles // 4), 64, 4, dtype=torch.int32)
    return SwizzledNvfp4(words, scales, torch.ones(()), torch.zeros(ARRIVALS, dtype=torch.int32), (n, k))


def address(argument: Any) -> Any:
    """That of the tensor that an argument of a launch is, or describes; what is none stays as it is."""
    tensor = getattr(argument, "base", argument)
    return tensor.data_ptr() if isinstance(tensor, torch.Tensor) else argument


def described(argument: Any, own: list[torch.Tensor | None]) -> Any:
    """An argument such that a tensor equals its address, and all tensors are equal that the launch made itself."""
    where = address(argument)
    if not isinstance(where, int) or where < _LEAST_ADDRESS:
        return type(where), where
    known = any(each is not None and where == each.data_ptr() for each in own)
    rest = [getattr(argument, name) for name in _OF_DESCRIPTORS] if hasattr(argument, "base") else []
    return where if known else "made by the launch", rest


def check(product: Any, m: int, n: int, k: int, bias: torch.Tensor | None, *shape: Any) -> None:
    """That the second of two calls replays, and with its own tensors."""
    key = (product, m, n, k)
    for _ in range(2):
        check_call(key, weight(n, k), torch.empty(m, k, dtype=torch.bfloat16), bias, *shape)
    assert isinstance(replay._recordings[key], replay.Recording)
    print(product.__name__, m, n, k)


def check_call(key: Any, w: SwizzledNvfp4, x: torch.Tensor, bias: torch.Tensor | None, *shape: Any) -> None:
    inputs = (x, w.words, w.scales, w.global_scale, w.arrived, bias)
    launches.clear()
    y = replay.replay_or_run(key, inputs, lambda launch: key[0](x, w, bias, *shape, launch=launch))
    assert y.shape == key[0](x, w, bias, *shape).shape
    replayed, direct = launches
    # Of the result the kernel for wgmma stores whole tiles, or parts of them: two descriptors.
    results = 2 if key[0] is matmul_wgmma else 1
    assert [address(each) for each in replayed].count(y.data_ptr()) == results, replayed
    for pair in zip(replayed, direct, strict=True):
        a, b = (described(each, list(inputs)) for each in pair)
        assert a == b, (a, b)


def check_areas() -> None:
    """A replay of a product whose K is cut takes the area of the stream that it is on; without one there is none."""
    areas = [torch.full((100,), partial_sums.EMPTY, dtype=torch.int32) for _ in range(2)]
    partial_sums._areas(areas[0].device).of_streams.update(enumerate(areas))
    of_stream: list[torch.Tensor | None] = [areas[0]]
    gluon_wgmma.area_of_stream = replay.area_of_stream = lambda device, words: of_stream[0]
    gluon_wgmma.multiprocessors = lambda device: 132
    x, w = torch.empty(128, 4096, dtype=torch.bfloat16), weight(256, 4096)
    inputs = (x, w.words, w.scales, w.global_scale, w.arrived, None)
    taken = []
    for area in (*areas, None, areas[0]):
        of_stream[0] = area
        launches.clear()
        replay.replay_or_run("areas", inputs, lambda launch: matmul_wgmma(x, w, None, launch=launch))
        (launch,) = launches
        taken.append([i for i, each in enumerate(areas) if any(argument is each for argument in launch)])
    assert taken == [[0], [1], [], [0]], taken
    print("areas")


def experts(n: int, k: int, gated: bool, count: int = 8, total: int | None = None) -> SwizzledExperts:
    groups, tiles = -(-n // 64), -(-k // 64)
    words = torch.empty(count, groups, tiles, 4, 256, dtype=torch.int16)
    scales = torch.empty(count, groups, -(-tiles // 4), 64, 4, dtype=torch.int32)
    return SwizzledExperts(words, scales, torch.ones(count, 1 + gated), (n, k), 16, gated, total or count)


def check_experts(run: Any, tokens: int) -> None:
    """That what is launched again is what Triton makes of the same arguments."""
    w13, w2 = experts(256, 128, True), experts(128, 128, False)
    x, weights = torch.empty(tokens, 128, dtype=torch.bfloat16), torch.ones(tokens, 2)
    ids = torch.zeros(tokens, 2, dtype=torch.int32)
    own = [x, weights, ids, *(each for w in (w13, w2) for each in (w.words, w.scales, w.global_scales))]

    def launched(launch: Any) -> list[tuple[Any, ...]]:
        launches.clear()
        run(x, w13, w2, weights, ids, "silu", launch=launch)
        return list(launches)

    launched(launcher.launch_again)
    known = len(launcher._launchers)
    again, direct = launched(launcher.launch_again), launched(launch_now)
    assert len(launcher._launchers) == known
    for pair in zip(again, direct, strict=True):
        assert not any(isinstance(each, torch.Tensor) for each in pair[0])
        for a, b in zip(*pair, strict=True):
            assert described(a, own) == described(b, own), (a, b)
    print(run.__name__, tokens)


if __name__ == "__main__":
    driver.set_active(Driver())
    bias = torch.zeros(256, dtype=torch.bfloat16)
    check(matmul_decode, 1, 256, 4096, bias, DecodeShape(1, 1, 4, 8))
    check(matmul_swizzled, 5, 256, 4096, bias, TileShape(8, 1, 4, 4, 3))
    check(matmul_swizzled, 5, 8192, 1024, None, TileShape(8, 1, 4, 4, 3))
    check(matmul_wgmma, 200, 256, 4096, bias)
    check_areas()
    check_experts(triton_grouped.experts_swizzled, 1)
    check_experts(triton_grouped.experts_swizzled, 200)
    check_experts(gluon_grouped.experts_wgmma, 500)
