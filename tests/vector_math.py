"""What must be called once, in one thread, before results of a process can be compared bit for bit."""

from __future__ import annotations

import torch

_FUNCTIONS = (
    *("cos", "sin", "tan", "tanh", "exp", "expm1", "log", "log2", "log10", "log1p"),
    *("sqrt", "rsqrt", "erf", "erfc"),
)


def settle_vector_math() -> None:
    """Have MKL choose its kernels for vectors of float32 and float64.

    It does so in the first call of each function, and where two threads make that call together, one of them may get
    the least exact kernel of all. The cosines of 2,048 x 32 angles, the first call of forked processes with 8 threads,
    were 1.5e-4 off in 7 of 3,000 of them; after a call with one number, in none of 4,000.
    https://github.com/pytorch/pytorch/issues/188792
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for name in _FUNCTIONS:
            getattr(torch, name)(one)
