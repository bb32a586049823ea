"""Safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read(path: Path) -> dict[str, Tensor]:
    """The tensors in the file, on the CPU. Raises ValueError if it is damaged."""
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"load: {path}: damaged, or not a safetensors file ({error})") from error
