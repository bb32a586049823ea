"""Safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastsr.checkpoints.errors import CheckpointError

DESCRIPTION = "Safetensors"
ENDINGS = (".safetensors",)
NETWORKS = ("all",)
SEEN = "real files"


def matches(data: memoryview) -> bool:
    """Whether a file begins with the length of its header, and that with a brace."""
    return bytes(data[8:9]) == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def read(path: Path) -> dict[str, Tensor]:
    """The tensors in the file, on the CPU. Raises CheckpointError if it is damaged."""
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"load: {path}: damaged, or not a safetensors file ({error})") from error
