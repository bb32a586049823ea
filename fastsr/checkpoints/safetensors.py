"""Safetensors files, the normal form (`normal.py`) among them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from fastsr.checkpoints.content import Content
from fastsr.checkpoints.errors import CheckpointError
from fastsr.checkpoints.normal import from_metadata, tuples

DESCRIPTION = "Safetensors, and fastsr's normal form of it"
ENDINGS = (".safetensors",)
NETWORKS = ("all",)
SEEN = "real files"


def matches(data: memoryview) -> bool:
    """Whether a file begins with the length of its header, and that with a brace."""
    return bytes(data[8:9]) == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def read(path: Path) -> Content:
    """The tensors in the file, on the CPU. The configuration in a normal form's metadata is its hints.

    Raises CheckpointError if the file is damaged.
    """
    content = Content()
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            content.normal = from_metadata(file.metadata())
            for key in file.keys():  # noqa: SIM118 (the file is no mapping)
                content[key] = file.get_tensor(key)
    except (
        SafetensorError,
        RuntimeError,
        AttributeError,
    ) as error:  # the last two: strides or dtypes torch cannot have
        raise CheckpointError(f"load: {path}: damaged, or not a safetensors file ({error})") from error
    except CheckpointError as error:
        raise CheckpointError(f"load: {path}: {error}") from error
    if content.normal is not None:
        content.hints = {field: tuples(value) for field, value in content.normal.config.items()}
    return content
