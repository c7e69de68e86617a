"""Memory behind which the process may not read."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def at_the_end(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A copy of uint8, a page at most, that ends where reading on would end the process."""
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    page = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    copy = torch.frombuffer(memory, dtype=torch.uint8)[mmap.PAGESIZE - tensor.numel() : mmap.PAGESIZE]
    copy = copy.view_as(tensor).copy_(tensor)
    assert protect(page + mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
    try:
        yield copy
    finally:
        protect(page + mmap.PAGESIZE, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
