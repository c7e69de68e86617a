"""Programmatic dependent launch, which NVIDIA GPUs have from Hopper on: some 0.5 us less for a kernel of few tokens.

Usually a kernel is put on the GPU when the one before it is done and its writes are in memory. A dependent one is put
there when the programs of the one before have ended, and waits by itself, as its first deed, until their writes can be
seen (`gdc_wait`; PTX ISA, `griddepcontrol.wait`). So it reads and writes nothing too early, and what follows it need
not know: a kernel is done only after the one that it waited for.

A kernel may also tell early that the next one may come (`griddepcontrol.launch_dependents`). Ours do not: programs of
the next one then take what places multiprocessors have left, unevenly, and of few programs that is what takes longest
(H200, the four products of a layer of Llama 3 8B and a small kernel at one token: 45.3 us, 43.4 dependent, 47.7 told
early).
"""

from __future__ import annotations

from typing import Any

import torch

from qwantize_vllm.matmul.gpu import capability_major

_FIRST_MAJOR = 9


def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Constants for the launch of a kernel that begins with `if DEPENDENT: tl.extra.cuda.gdc_wait()`."""
    major = capability_major(device) if device.type == "cuda" else None
    if major is None or major < _FIRST_MAJOR:
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}
