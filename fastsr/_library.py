"""The compiled operators of the CPU, `_C.so`: loaded on first need, and absent for a stated reason."""

from __future__ import annotations

import functools
from pathlib import Path

MINIMUM_TORCH = (2, 11)
_PATH = Path(__file__).with_name("_C.so")


def require_torch() -> None:
    """Raises ImportError when torch is missing or older than the stable ABI that the compiled operators use."""
    wanted = ".".join(map(str, MINIMUM_TORCH))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"fastsr needs torch {wanted} or newer and finds none: pip install 'torch>={wanted}'"
        ) from None
    major, minor, *_ = torch.__version__.split(".")
    if (int(major), int(minor)) < MINIMUM_TORCH:
        raise ImportError(
            f"fastsr needs torch {wanted} or newer, but this is torch {torch.__version__}: "
            f"pip install -U 'torch>={wanted}'"
        )


@functools.cache
def load() -> str | None:
    """Loads `_C.so`, which registers the operators of `torch.ops.fastsr_cpu`. Returns why it cannot, or None."""
    import torch

    if not _PATH.is_file():
        return (
            "fastsr/_C.so was not built (no C++ compiler or no torch when fastsr was installed, or FASTSR_BUILD=0); "
            "with both there, install fastsr again"
        )
    try:
        torch.ops.load_library(str(_PATH))
    except OSError as error:
        return f"fastsr/_C.so does not load: {error}"
    return torch.ops.fastsr_cpu.isa_problem() or None


def isa() -> str | None:
    """The instruction-set level of the CPU kernels in use: "avx512_bf16", "avx512", "avx2" or "baseline" (none).

    It is what processor and operating system offer, or a lower level that FASTSR_CPU_ISA in the environment asks for.
    None when `_C.so`, which asks the processor, cannot be used: there are no CPU kernels to choose from then.
    """
    if load() is not None:
        return None
    import torch

    return torch.ops.fastsr_cpu.isa_name(torch.ops.fastsr_cpu.isa())


def offered_isa() -> str | None:
    """The highest level that processor and operating system offer; None when `_C.so` cannot be used."""
    if load() is not None:
        return None
    import torch

    return torch.ops.fastsr_cpu.isa_name(torch.ops.fastsr_cpu.isa_detected())
