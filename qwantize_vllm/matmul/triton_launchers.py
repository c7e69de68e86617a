"""Launchers of Triton 3.6, built into its cache without being loaded.

Up to Triton 3.6 every signature of a kernel has a launcher of its own: a Python module in C, compiled when the first
such kernel is loaded, some 0.2 s each. Later versions have one launcher for all.

Only the thread that launches may load them. All of these modules have the same name, and when a file is loaded again,
CPython fills the module of that name that was loaded last (`import_add_module` in Python/import.c, for extensions that
are initialized in one phase): a thread that has just loaded that one would find another kernel's `launch` in it.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

_NAME = "__triton_launcher"


def build_launcher(compiled: Any) -> None:
    """What Triton will look for in its cache when it loads this kernel, which was compiled for an NVIDIA GPU."""
    source = None if torch.version.hip else _launcher_source(compiled)
    if source is None:
        return
    from triton.runtime import build
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256((source + build.platform_key()).encode()).hexdigest())
    file_name = f"{_NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if cache.get_file(file_name) is None:
        cache.put(_build(source), file_name, binary=True)


def _launcher_source(compiled: Any) -> str | None:
    """Its code, as CudaLauncher asks for it; None from Triton 3.7 on."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return None
    names = compiled.src.fn.arg_names
    constants = {(names.index(at),) if isinstance(at, str) else at: each for at, each in compiled.src.constants.items()}
    described = getattr(compiled.metadata, "tensordesc_meta", None)
    source: str = driver.make_launcher(constants, dict(compiled.src.signature), described)
    return source


def _build(source: str) -> bytes:
    from triton.backends.nvidia import driver
    from triton.runtime import build

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / f"{_NAME}.c"
        file.write_text(source)
        libraries = driver.library_dirs(), driver.include_dirs, driver.libraries
        return Path(build._build(_NAME, str(file), directory, *libraries, [])).read_bytes()
