"""What nvcc made of the CUDA kernels: registers, spills, tensor-core instructions; the library; how it is built."""

from __future__ import annotations

import collections
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import fastsr
from fastsr import _cuda_engine

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(fastsr.__file__).with_name("_cuda.so")
REGISTERS = 65536  # of a multiprocessor
MIRRORS = (_cuda_engine.ConvParams, _cuda_engine.GateParams, _cuda_engine.ScaleParams, _cuda_engine.ResidualEParams,
           _cuda_engine.Float8Params)  # fmt: skip
THREADS = {"conv_sm90_kernel": 384, "residual_e_kernel": 256}  # of a thread block; others are named in the kernel


@pytest.fixture(scope="module", autouse=True)
def library():
    reason = _cuda_engine.load()
    if reason is not None:
        pytest.skip(reason)


@cache
def disassembled(*options: str) -> str:
    """cuobjdump of the library, from the toolkit or the Triton package."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(path) if path.is_file() else None
    if found is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or the Triton package")
    return subprocess.run([found, *options, LIBRARY], capture_output=True, text=True, check=True).stdout


@cache
def instructions() -> dict[tuple[str, str], collections.Counter[str]]:
    """By architecture and kernel: how often each instruction occurs, by the first part of its name, and wgmma's waits
    by what they leave under way."""
    found: dict[tuple[str, str], collections.Counter[str]] = {}
    arch, counter = "", collections.Counter()
    for line in disassembled("-sass").splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif (name := re.search(r"Function : (\S+)", line)) is not None:
            counter = found.setdefault((arch, name[1]), collections.Counter())
        elif (code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", line)) is not None:
            counter[code[1].split(".")[0]] += 1
            if code[1].startswith("WARPGROUP.DEPBAR"):
                counter["DEPBAR " + code[2].split()[-1]] += 1
    return found


def kernels(part: str) -> list[tuple[tuple[str, str], collections.Counter[str]]]:
    found = [(key, counter) for key, counter in instructions().items() if part in key[1]]
    assert found, f"no kernel {part} in the library"
    return found


def test_no_kernel_spills():
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", disassembled("-res-usage"))
    assert len(usage) >= 40
    for name, registers, stack, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        threads = next((t for kernel, t in THREADS.items() if kernel in name), 256)
        assert int(registers) * threads <= REGISTERS, name
        if "residual_e" in name:
            assert 2 * int(registers) * threads <= REGISTERS, f"{name}: two blocks no longer fit a multiprocessor"
    for key, counter in instructions().items():
        assert counter["LDL"] == counter["STL"] == 0, key


def test_matrix_products_run_on_tensor_cores():
    for (arch, name), counter in kernels("conv_sm80") + kernels("residual_e") + kernels("last_conv"):
        assert counter["HMMA"] > 0 and counter["LDSM"] > 0 and counter["LDGSTS"] > 0, (arch, name)
    assert {arch for (arch, _), _ in kernels("conv_sm80")} >= {"sm_80"}


def test_wgmma_is_neither_replaced_nor_serialized():
    if not torch.ops.fastsr_cuda.has_sm90():
        pytest.skip("built without 90a (FASTSR_CUDA_ARCHS)")
    found = kernels("conv_sm90")
    assert len(found) == 12 and {arch for (arch, _), _ in found} == {"sm_90a"}
    for key, counter in found:
        used, unused = ("QGMMA", "HGMMA") if "fp8_e4m3" in key[1] else ("HGMMA", "QGMMA")
        assert counter[used] > 0 and counter[unused] == counter["HMMA"] == 0, key
        assert counter["LDGSTS"] > 0 and counter["USETMAXREG"] == 2, key
        # ptxas serializes by waiting for everything after each product; we wait so once, at the end of a tile.
        assert counter["DEPBAR 0x0"] == 1 and counter["DEPBAR 0x1"] > 1, key


def test_the_library_loads_without_a_gpu_and_says_what_it_holds():
    assert _cuda_engine.load() is None
    assert torch.ops.fastsr_cuda.struct_sizes()[:5] == [ctypes.sizeof(m) for m in MIRRORS]
    if not torch.cuda.is_available():
        assert _cuda_engine.missing() == "no CUDA device"
        with fastsr.use("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' rejected: no CUDA device"):
            fastsr.ops.conv_act([torch.zeros(1, 8, 4, 4)], torch.zeros(8, 8, 3, 3))


def test_the_library_needs_nothing_of_libtorch_but_its_stable_abi():
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    done = subprocess.run(["nm", "-DC", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert not [n for _, n in lines if "at::" in n or "c10::" in n or "torch::" in n]
    assert ["w", "aoti_torch_get_current_cuda_stream"] in lines, "the stream is asked of CUDA's part of torch, if any"


def test_a_library_that_was_not_built_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(_cuda_engine, "_PATH", tmp_path / "_cuda.so")
    load = _cuda_engine.load.__wrapped__  # without the memory of what was found before
    assert "was not built" in load()
    (tmp_path / "_cuda.so").write_bytes(b"no library")
    assert "does not load" in load()


def asked(**environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py asked for its version, which decides what there is to build and builds nothing."""
    pytest.importorskip("setuptools", minversion="77")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTSR_", "CUDA"))}
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=kept | environment)


def test_cuda_can_be_left_out_and_insisted_on(tmp_path):
    assert "leaving out the CUDA kernels: FASTSR_CUDA=0" in asked(FASTSR_CUDA="0").stderr
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    without = asked(FASTSR_CUDA="1", CUDACXX=str(fake))
    assert without.returncode != 0
    assert f"FASTSR_CUDA=1, but {fake} comes without libcudart_static.a" in without.stderr
    assert asked(CUDACXX=str(fake)).returncode == 0
