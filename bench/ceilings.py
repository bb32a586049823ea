"""What the machine can do at most, measured in the run that uses it: multiply-adds, float32 and bfloat16, and copying.

Arithmetic is the best rate of torch's own matrix products and 64-channel 3x3 convolutions over several sizes, or that
of `fastsr_cpu::peak`, multiply-adds out of registers, which is a few percent more on an idle processor. Bandwidth
counts bytes read and bytes written in a copy of blocks far beyond the last cache.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.timing import PAUSE
from fastsr import _library

SECONDS = 0.4  # a candidate is repeated for so long
COPY = 2**28  # bytes of each side
KINDS = {torch.float32: 0, torch.bfloat16: 1}  # of fastsr_cpu::peak


def _best(run: Callable[[], object], seconds: float) -> float:
    """The least time of one call: a ceiling is what can be reached, not what is usual."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    run()
    synchronize()
    time.sleep(PAUSE)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def of_torch(dtype: torch.dtype, device: str, seconds: float) -> float:
    """The best rate of torch's products and convolutions, 1e9 operations a second."""
    rates = []
    for n in (256, 512, 1024) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, dtype=dtype, device=device)
        rates.append(2 * n**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds))
    for size in (64, 128):
        x = torch.randn(1, 64, size, size, device=device).to(dtype).to(memory_format=torch.channels_last)
        w = torch.randn(64, 64, 3, 3, device=device).to(dtype).to(memory_format=torch.channels_last)
        rates.append(2 * 9 * 64**2 * size**2 / _best(lambda x=x, w=w: F.conv2d(x, w, padding=1), seconds))
    return max(rates) / 1e9


def arithmetic(dtype: torch.dtype, device: str = "cpu", seconds: float = SECONDS) -> float:
    """1e9 operations a second, two a multiply-add, by all of torch's threads: the better of the two ways."""
    rates = [of_torch(dtype, device, seconds)]
    if device == "cpu" and _library.load() is None:
        with contextlib.suppress(RuntimeError):  # the processor has no such instructions
            rates.append(torch.ops.fastsr_cpu.peak(KINDS[dtype]))
    return max(rates)


def copying(device: str = "cpu", seconds: float = SECONDS) -> float:
    """1e9 bytes a second, read and written."""
    a, b = (torch.ones(COPY // 4, device=device) for _ in range(2))
    return 2 * COPY / _best(lambda: b.copy_(a), seconds) / 1e9


@torch.inference_mode()
def measure(device: str = "cpu", seconds: float = SECONDS) -> dict[str, float]:
    """f32, bf16: 1e9 operations a second; copy: 1e9 bytes a second."""
    return {
        "f32": arithmetic(torch.float32, device, seconds),
        "bf16": arithmetic(torch.bfloat16, device, seconds),
        "copy": copying(device, seconds),
    }
