"""PyTorch's own files, zip or legacy. Only weights are read; nothing in the file is executed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastsr.checkpoints.errors import CheckpointError

DESCRIPTION = "PyTorch's own files, zip or older"
ENDINGS = (".pth", ".pt")
NETWORKS = ("all",)
SEEN = "real files"


def matches(data: memoryview) -> bool:
    """Whether a file begins as a zip archive, a pickle or a tar archive does."""
    return bytes(data[:4]) == b"PK\x03\x04" or bytes(data[:1]) == b"\x80" or bytes(data[257:262]) == b"ustar"


def read(path: Path) -> Mapping[str, Any]:
    """The dict in the file, tensors on the CPU. Raises CheckpointError if it is damaged or holds other than weights."""
    try:
        with open(path, "rb") as file:  # torch would read a path's ending, which need not be true
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"load: {path}: expected tensors and plain containers; the file holds other objects, which are not "
            f"executed ({reason}). Save the module's state_dict() instead"
        ) from error
    except (RuntimeError, EOFError, KeyError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"load: {path}: damaged, or not a PyTorch file ({reason})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"load: {path}: expected a dict of tensors; the file holds a {type(content).__name__}")
    return content
