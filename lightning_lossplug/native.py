"""The library's C++ functions for CPUs, compiled at first use with the compiler that is there."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-fno-math-errno", "-shared", "-fPIC", "-fopenmp")


def takes(*tensors: Tensor) -> bool:
    """Tells whether C++ functions can work on these tensors: contiguous ones that are :func:`reachable`."""
    return all(tensor.is_contiguous() and reachable(tensor) for tensor in tensors)


def reachable(tensor: Tensor) -> bool:
    """Tells whether a C++ function may read a tensor's memory: a plain one on a CPU that nobody watches.

    What watches operators go by would not see a function called around PyTorch: ``torch.compile``, tracing, fake
    tensors, ``torch.func``.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@cache
def load(source: Path) -> ctypes.CDLL | str:
    """Returns a compiled source, or in words why there is none.

    What was compiled is kept under ``$XDG_CACHE_HOME/lightning_lossplug`` (``~/.cache``), by source, compiler and
    processor. Its threads are those of torch, whose OpenMP library is in the process already.

    Args:
        source: A C++ file with functions of C linkage; it may include the headers of its folder.
    """
    try:
        return ctypes.CDLL(str(_compiled(source)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return detail.strip().splitlines()[0][:200] if detail.strip() else type(error).__name__


def load_with(source: Path, arguments: type[ctypes.Structure], size: str, otherwise: str) -> ctypes.CDLL | str:
    """Returns a compiled source whose functions take a structure, or in words why it can't be used.

    Args:
        source: See :func:`load`.
        arguments: The structure.
        size: Name of a function that tells how many bytes the source takes it to have; 0 where it can't run.
        otherwise: What to say if the two differ.
    """
    library = load(source)
    if isinstance(library, str):
        return library
    tell = library[size]
    tell.restype = ctypes.c_int64
    return library if tell() == ctypes.sizeof(arguments) else otherwise


def _compiled(source: Path) -> Path:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        raise OSError("there is no C++ compiler")
    about = Path("/proc/cpuinfo")
    flags = next((line for line in about.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    texts = [file.read_text() for file in (source, *sorted(source.parent.glob("*.h")))]
    key = "\n".join([*texts, compiler, *FLAGS, platform.machine(), flags])
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_lossplug"
    target = base / f"{source.stem}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.is_file():
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=base) as folder:
            made = Path(folder) / target.name
            command = [compiler, *FLAGS, str(source), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            made.replace(target)  # at once, for processes that compile at the same time
    return target
