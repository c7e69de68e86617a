"""Compiling LLVM code for this machine, and running it on PyTorch's own threads.

llvmlite comes with numba, which vLLM requires on a CPU. The threads are those of the OpenMP library that
PyTorch uses: a second pool would fight with it for the same cores.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from llvmlite import binding

# Below this many multiplications a call costs less than waking a thread.
_WORTH_A_THREAD = 2**16


class Kernel:
    """A compiled `void name(int64 *job)`, to be called with a ctypes.Structure of int64 fields."""

    def __init__(self, code: str, name: str) -> None:
        machine = _machine()
        module = binding.parse_assembly(code)
        module.verify()
        passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(module, passes)
        self._engine = binding.create_mcjit_compiler(module, machine)  # owns the machine code
        self._engine.finalize_object()
        self._address = self._engine.get_function_address(name)

    def __call__(self, job: ctypes.Structure, multiplications: int) -> None:
        """Run on torch.get_num_threads() threads, all with the same job, without the GIL."""
        threads = torch.get_num_threads() if multiplications > _WORTH_A_THREAD else 1
        _openmp()(self._address, ctypes.addressof(job), threads, 0)


@functools.cache
def has(feature: str) -> bool:
    """Whether this machine has what LLVM calls `feature`, for example "avx512f"."""
    return bool(binding.get_host_cpu_features().get(feature, False))


def _machine() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True)


@functools.cache
def _openmp() -> Any:
    """GOMP_parallel(function, argument, threads, flags), in whichever OpenMP library the process resolves it.

    Raises:
        AttributeError: this build of PyTorch has no OpenMP, or one without GNU's entry points.
    """
    parallel = ctypes.CDLL(None).GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel
