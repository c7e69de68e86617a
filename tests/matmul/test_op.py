from __future__ import annotations

import pytest
import torch

from qwantize_vllm import matmul_nvfp4, quantize_nvfp4
from qwantize_vllm.matmul.op import matmul_op
from tests.numbers import make_weight


def arguments(device="cpu", m=3):
    q = quantize_nvfp4(make_weight("gaussian", 48, 64, torch.bfloat16).to(device))
    x = torch.randn(m, 64, device=device).bfloat16()
    return x, q


def test_the_op_is_registered_as_pytorch_wants_it():
    x, q = arguments()
    # test_schema compares inputs bit by bit in a way that has no float8.
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(matmul_op, (x, q.codes, q.block_scales, q.global_scale, None, 16, "cpu"), test_utils=utils)


def test_dynamo_takes_the_op_whole_and_for_every_number_of_tokens():
    x, q = arguments()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: matmul_nvfp4(x, q) + 1, backend=backend, fullgraph=True, dynamic=True)
    for m in (3, 5, 17):
        x = torch.randn(m, 64).bfloat16()
        assert torch.equal(compiled(x), matmul_nvfp4(x, q) + 1)
    assert len(graphs) == 1
    assert any(node.target == torch.ops.qwantize.matmul_nvfp4.default for node in graphs[0].graph.nodes)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 200])
def test_a_cuda_graph_replays_with_new_inputs_and_new_weights(m):
    x, q = arguments("cuda", m)
    matmul_nvfp4(x, q)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul_nvfp4(x, q)
    x.copy_(torch.randn_like(x))
    fresh = quantize_nvfp4(make_weight("student", 48, 64, torch.bfloat16).cuda())
    q.codes.copy_(fresh.codes), q.block_scales.copy_(fresh.block_scales), q.global_scale.copy_(fresh.global_scale)
    graph.replay()
    assert torch.equal(y, matmul_nvfp4(x, fresh))
