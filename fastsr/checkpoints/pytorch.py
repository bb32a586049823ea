"""PyTorch's own files, zip or legacy. Only weights are read; nothing in the file is executed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def read(path: Path) -> Mapping[str, Any]:
    """The dict in the file, tensors on the CPU. Raises ValueError if it is damaged or holds anything but weights."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"load: {path}: expected tensors and plain containers; the file holds other objects, which are not "
            f"executed ({reason}). Save the module's state_dict() instead"
        ) from error
    except (RuntimeError, EOFError, KeyError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"load: {path}: damaged, or not a PyTorch file ({reason})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"load: {path}: expected a dict of tensors; the file holds a {type(content).__name__}")
    return content
