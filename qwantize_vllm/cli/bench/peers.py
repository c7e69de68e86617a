"""Other packages that search NVFP4 block scales: what each is called, and how to call it."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from importlib import metadata

import torch

from qwantize_vllm.format import E4M3_CODES

# Scales (blocks,) and signed E2M1 values (blocks, block_size), both float32.
Result = tuple[torch.Tensor, torch.Tensor]
# From blocks (blocks, block_size) of an (N, K) weight, in its dtype, and for "hessian" the Hessians float32
# (K/block_size, block_size, block_size), to the call that is timed.
Prepare = Callable[[torch.Tensor, torch.Tensor | None], Callable[[], Result]]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A package, which is a distribution of the same name, and its searches by this package's names."""

    package: str
    searches: Mapping[str, Prepare]

    @property
    def importable(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    @property
    def label(self) -> str:
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:  # a folder of that name
            return self.package


def _qwantize(name: str) -> Prepare:
    """A published function of `qwantize`: the kernel on a GPU, the PyTorch reference on a CPU."""

    def prepare(blocks: torch.Tensor, hessian: torch.Tensor | None) -> Callable[[], Result]:
        import qwantize

        function = getattr(qwantize, f"{name}_triton" if blocks.is_cuda else name)
        return lambda: function(blocks)

    return prepare


def _qwantize_hessian(blocks: torch.Tensor, hessian: torch.Tensor | None) -> Callable[[], Result]:
    """`nvfp4_optimal_hessian` from given Hessians, as this package is timed; the published function takes activations.

    On a CPU it gets block_size tokens with just these Hessians, whose product takes no time that counts. On a GPU
    it would, in K/block_size small launches, so there the published kernel is launched as its wrapper does.
    """
    assert hessian is not None
    if blocks.is_cuda:
        return lambda: _launch_qwantize_hessian(blocks, hessian)
    import qwantize

    factors = torch.linalg.cholesky(hessian.double()).mT.float()  # H = factor' factor
    activations = factors.transpose(0, 1).reshape(hessian.shape[-1], -1)
    return lambda: qwantize.nvfp4_optimal_hessian(blocks, X=activations)


def _launch_qwantize_hessian(blocks: torch.Tensor, hessian: torch.Tensor) -> Result:
    from qwantize.nvfp4 import build_fp8_e4m3_scales
    from qwantize.nvfp4.kernels import nvfp4_optimal_hessian_kernel

    count, block_size = blocks.shape
    x = blocks.float()
    out, scales = torch.empty_like(x), x.new_empty(count)
    sizes = {"BLOCK_SIZE": block_size, "NUM_SCALES": E4M3_CODES}
    table = build_fp8_e4m3_scales(device=x.device)
    nvfp4_optimal_hessian_kernel[(count,)](
        x, table, hessian, out, scales, count, hessian.shape[0], *x.stride(), **sizes
    )
    return scales, out / scales[:, None]


PEERS = [
    Peer(
        "qwantize",
        {
            "naive": _qwantize("nvfp4_naive"),
            "optimal": _qwantize("nvfp4_optimal"),
            "hessian": _qwantize_hessian,
        },
    ),
]
