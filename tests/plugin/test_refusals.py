"""What an engine cannot do with quantized layers is refused by the name of the option."""

from __future__ import annotations

import zlib
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import OffloadConfig

from qwantize_vllm.plugin.linear import largest_over_ranks
from qwantize_vllm.plugin.refusals import refuse_all2all, refuse_unordered_load, refuse_unsupported


def test_weights_in_the_hosts_memory():
    refuse_unsupported(SimpleNamespace(offload_config=OffloadConfig()))
    with pytest.raises(ValueError, match="--cpu-offload-gb 8: vLLM's offloaders do not work with quantized layers"):
        refuse_unsupported(SimpleNamespace(offload_config=OffloadConfig(uva={"cpu_offload_gb": 8})))
    with pytest.raises(ValueError, match="--offload-group-size 4"):
        refuse_unsupported(SimpleNamespace(offload_config=OffloadConfig(prefetch={"offload_group_size": 4})))


@pytest.mark.parametrize(
    ("backend", "why"),
    [("sparse_nccl", "changes single elements"), ("sharded_rdt", "past their loaders"), ("ipc", None)],
)
def test_updates_in_a_way_that_quantized_layers_cannot_take(backend, why):
    config = SimpleNamespace(offload_config=OffloadConfig(), weight_transfer_config=SimpleNamespace(backend=backend))
    with nullcontext() if why is None else pytest.raises(ValueError, match=f"backend '{backend}', which .*{why}"):
        refuse_unsupported(config)


def loading(ranks, extra):
    return SimpleNamespace(
        load_config=SimpleNamespace(model_loader_extra_config=extra),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )


def test_files_in_another_order_on_each_rank():
    refuse_unordered_load(loading(1, {"enable_multithread_load": True}))
    refuse_unordered_load(loading(2, {}))
    refuse_unordered_load(loading(2, "a.json"))
    with pytest.raises(ValueError, match=r"enable_multithread_load in .*, with --tensor-parallel-size 2"):
        refuse_unordered_load(loading(2, {"enable_multithread_load": True}))


def test_ranks_that_have_come_to_different_layers(monkeypatch):
    """By whatever way of loading: each rank sees it, and no scale is made of another layer's weights."""
    group, sent = SimpleNamespace(device_group=None), []

    def all_reduce(tensor, op, group):
        assert op == torch.distributed.ReduceOp.MAX
        tensor.copy_(torch.maximum(tensor, sent.pop(0)))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for number in (zlib.crc32(b"layers.0"), zlib.crc32(b"layers.1")):
        sent += [torch.tensor([number, -number]), torch.tensor([3.0])]
    assert largest_over_ranks(torch.ones(1), group, "layers.0") == 3
    with pytest.raises(RuntimeError, match=r"this one has those of layers\.0, another one those of another layer"):
        largest_over_ranks(torch.ones(1), group, "layers.0")


def test_tokens_that_are_exchanged_inside_of_vllms_kernels():
    def mixture(backend, exchanged=True):
        parallel = SimpleNamespace(
            use_all2all_kernels=exchanged,
            use_ag_rs_all2all_kernels=exchanged and backend == "allgather_reducescatter",
            all2all_backend=backend,
        )
        return SimpleNamespace(moe_parallel_config=parallel)

    refuse_all2all(mixture("allgather_reducescatter"), "model.layers.0.mlp.experts")
    refuse_all2all(mixture("deepep_low_latency", exchanged=False), "model.layers.0.mlp.experts")
    with pytest.raises(
        ValueError, match=r"mlp\.experts: --all2all-backend deepep_low_latency .* use --all2all-backend"
    ):
        refuse_all2all(mixture("deepep_low_latency"), "model.layers.0.mlp.experts")
