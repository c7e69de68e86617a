"""What products of swizzled weights leave allocated on a GPU: nothing that grows with the number of tokens."""

from __future__ import annotations

import gc

import pytest
import torch

pytest.importorskip("triton")

from qwantize_vllm import matmul_nvfp4, swizzle
from tests.matmul.test_swizzled_matmul import make

# Each kernel takes some of these; at 256 on Hopper K is cut, so that the stream gets its area (partial_sums.py).
TOKENS = (1, 2, 5, 16, 40, 64, 100, 256, 300, 1000, 2000)
# PyTorch keeps a few numbers for the random generators of graphs; of a token alone the result has 8 KiB.
OF_A_GRAPH = 4096


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "batch_invariant", "unswizzled"])
def test_a_product_leaves_nothing_but_its_result(backend):
    """Once each kernel has run: a stream's area, a spare one and cuBLAS's workspace stay, and are made but once."""
    x, q = make("cuda", 4096, 4096, TOKENS[-1] + 1, torch.bfloat16)
    weight = swizzle(q)
    for m in TOKENS:
        matmul_nvfp4(x[:m], weight, backend=backend)
    gc.collect()  # what other tests have left
    before = torch.cuda.memory_allocated()
    for m in (*TOKENS, *(m + 1 for m in TOKENS)):
        y = matmul_nvfp4(x[:m], weight, backend=backend)
        assert y.shape == (m, 4096)
        del y
        assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "batch_invariant"])
def test_graphs_allocate_in_their_pool_alone_and_replays_nothing(backend):
    """As vLLM captures them: the largest first, on one stream and in one pool, after a run of each on that stream."""
    x, q = make("cuda", 4096, 4096, TOKENS[-1], torch.bfloat16)
    weight, stream, pool = swizzle(q), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for m in TOKENS:
            matmul_nvfp4(x[:m], weight, backend=backend)
    torch.cuda.synchronize()
    gc.collect()
    graphs = []
    for m in reversed(TOKENS):
        before = outside_pools()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool, stream=stream):
            matmul_nvfp4(x[:m], weight, backend=backend)
        assert outside_pools() - before <= OF_A_GRAPH
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    for graph in graphs:
        graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == allocated


def outside_pools() -> int:
    """Bytes allocated outside the pools of CUDA graphs."""
    segments = torch.cuda.memory_snapshot()
    return sum(each["allocated_size"] for each in segments if tuple(each["segment_pool_id"]) == (0, 0))
