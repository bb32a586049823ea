"""`python -m fastsr.info`: what is installed, what this machine offers, and which backend of each operator can run; and
`describe`, what a file of weights holds."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import fastsr
from fastsr import _cuda_engine, _library, _tables, _triton
from fastsr.checkpoints.normal import plain
from fastsr.models import Network
from fastsr.op import OPS

DECIDERS = {
    "file": "inferred from the file",
    "module": "said by the module",
    "hint": "given as hints",
    "assumed": "assumed, as no file says it",
    "definition": "fixed by the network's definition",
}
"""What the values of `Origin.fields` mean."""

LIBRARIES = {"_C.so": _library.load, "_cuda.so": _cuda_engine.load}


def describe(network: Network) -> dict[str, Any]:
    """What `load` found, as JSON can hold it.

    network, variant (of its keys), format (of the file); scale: an int, a list of several, or None for a network that
    does not enlarge images; colour: "rgb" or "y"; value_range: [black, white]; parameters: their count; config: all
    fields of the configuration; inferred: who decided each of them, one of DECIDERS; source_sha256: of the file that a
    normal form was made from, else None. Raises ValueError for a network that was created, not loaded.
    """
    origin, scales = network.origin, network.scales
    if origin is None:
        raise ValueError(f"describe: expected a network that fastsr.load made; {network.name} was created")
    return {
        "network": network.name,
        "variant": origin.variant,
        "scale": list(scales) if len(scales) > 1 else scales[0] if scales else None,
        "colour": network.colour,
        "value_range": list(network.value_range),
        "parameters": network.parameter_count,
        "format": origin.format,
        "config": plain(dataclasses.asdict(network.config)),
        "inferred": dict(origin.fields),
        "source_sha256": origin.sha256,
    }


def info() -> str:
    """The report as text, a line or a few per part. It only looks: nothing is compiled, downloaded or run."""
    lines = [f"{name:<10} {version}" for name, version in _versions()]
    lines += ["", f"{'cpu':<10} {_processor()}, {torch.get_num_threads()} threads", *_devices(), ""]
    lines += [f"{name:<10} {load() or 'loaded'}" for name, load in LIBRARIES.items()]
    lines += [f"{'triton':<10} {_triton.summary()}"]
    for index in range(torch.cuda.device_count()):
        device = _triton.identity(torch.device("cuda", index))
        lines.append(f"{f'cuda:{index}':<10} chosen by {_tables.summary(device)}")
    lines += ["", "operators and their backends, in the order in which they are asked:"]
    width = max(map(len, OPS), default=0)
    for name in sorted(OPS):
        backends = OPS[name].available()
        lines.append(f"  {name:<{width}}  " + ", ".join(b for b, reason in backends.items() if reason is None))
        lines += [f"  {'':<{width}}    not {b}: {reason}" for b, reason in backends.items() if reason is not None]
    return "\n".join(lines)


def _versions() -> list[tuple[str, str]]:
    def installed(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    where = Path(fastsr.__file__).parent
    versions = [("fastsr", f"{installed('fastsr')} in {where}"), ("python", platform.python_version())]
    return [*versions, ("torch", torch.__version__), *((p, installed(p)) for p in ("triton", "numpy"))]


def _processor() -> str:
    level = _library.isa()
    if level is None:
        level = f"torch says {torch.backends.cpu.get_cpu_capability()}"
    elif os.environ.get("FASTSR_CPU_ISA"):
        level = f"{level} by FASTSR_CPU_ISA, of {_library.offered_isa()}"
    return f"{_model_name()}, instruction set: {level}"


def _model_name() -> str:
    try:  # platform.processor() is empty or only the architecture on most Linux systems
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return [f"{'cuda':<10} no device (torch is {built})"]
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = p.total_memory / 2**30
        found.append(
            f"{f'cuda:{index}':<10} {p.name}, sm_{p.major}{p.minor}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
        )
    return found


if __name__ == "__main__":
    print(info())
