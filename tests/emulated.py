"""The CUDA kernels on the host: builds csrc/cuda with the emulation of tests/emulation and runs programs on it.

It is bound by ctypes: the entry points take addresses and numbers, so a binding library would add a dependency and a
build step and check nothing more.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastsr import _cuda_engine

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "emulation"
FAULTS = ("none", "named barrier", "mbarrier wait", "copy wait", "wgmma wait", "proxy fence", "wrong stride",
          "divergent barrier", "syncthreads")  # fmt: skip
FLAGS = ["-O2", "-std=c++20", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas", "-Wno-class-memaccess"]


class KernelError(Exception):
    """What the emulation reports."""


def cuda_include() -> Path | None:
    """The folder of the CUDA toolkit's headers."""
    folders = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders += [Path("/usr/local/cuda/include"), *sorted(Path("/usr/local").glob("cuda-*/include"))]
    return next((f for f in folders if (f / "cuda_bf16.h").is_file() and (f / "vector_types.h").is_file()), None)


@cache
def library() -> ctypes.CDLL:
    """The kernels and the emulation, compiled once for each state of their sources, kept in build/emulation."""
    compiler, include = shutil.which("g++"), cuda_include()
    if compiler is None or include is None:
        pytest.skip("the emulation of CUDA needs g++ and the CUDA toolkit's headers (set CUDA_HOME)")
    sources = [*sorted((ROOT / "csrc/cuda").rglob("*.cu")), EMULATION / "entry.cpp"]
    read = sorted(p for folder in (ROOT / "csrc/cuda", EMULATION) for p in folder.rglob("*") if p.is_file())
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in read) + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "emulation" / digest
    target = folder / "emulation.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        objects = [folder / f"{p.stem}.o" for p in sources]
        paths = [f"-I{p}" for p in (ROOT / "csrc", EMULATION)] + ["-isystem", str(include)]

        def compile_one(source: Path, out: Path) -> None:
            subprocess.run([compiler, *FLAGS, *paths, "-x", "c++", "-c", source, "-o", out], check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources, objects))
        partial = folder / f"{os.getpid()}.so"
        subprocess.run([compiler, "-shared", "-o", partial, *objects], check=True)
        partial.replace(target)
    lib = ctypes.CDLL(str(target))
    lib.emulation_message.restype = ctypes.c_char_p
    return lib


class Emulated(_cuda_engine.Device):
    """A device of the emulation. `fault`: one of FAULTS, planted into everything that runs."""

    def __init__(self, capability: tuple[int, int], multiprocessors: int = 3, seed: int = 0, fault: str = "none"):
        self.capability, self.multiprocessors = capability, multiprocessors
        self.seed, self.fault = seed, fault

    def run(self, tensors: Sequence[Tensor], program: Tensor) -> None:
        lib = library()
        lib.emulation_begin(ctypes.c_uint64(self.seed), FAULTS.index(self.fault))
        addresses = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() or 64 for t in tensors))
        code = lib.fastsr_cuda_run(
            ctypes.c_void_p(program.data_ptr()), ctypes.c_longlong(program.numel()), addresses, len(tensors),
            self.multiprocessors, None,
        )  # fmt: skip
        if code:
            raise KernelError(f"{code}: {lib.emulation_message().decode()}")


def run(op, args, device: _cuda_engine.Device) -> Tensor:
    """An operator on the emulated device, its output and workspace filled with NaN before."""
    reason = _cuda_engine.unsuitable(op, args, device)
    if reason is not None:
        raise KernelError(reason)
    empty = torch.empty
    torch.empty = lambda *a, **k: _poisoned(empty(*a, **k))
    try:
        out = _poisoned(op._allocate(args))
        _cuda_engine.Runner(op, *args, device=device)(out, *args)
    finally:
        torch.empty = empty
    return out


def _poisoned(t: Tensor) -> Tensor:
    if t.device.type == "meta":
        return t
    return t.fill_(torch.nan) if t.is_floating_point() else t.fill_(255)
