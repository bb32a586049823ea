"""Readers of weight files, one a format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsr.checkpoints import pytorch, safetensors

FORMATS = {".pth": pytorch.read, ".pt": pytorch.read, ".safetensors": safetensors.read}


def read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The content of a weight file, as saved, on the CPU. Raises FileNotFoundError; ValueError for an unknown ending
    or a file that is not what its ending says."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: {path}: expected a weight file; there is none")
    reader = FORMATS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(FORMATS)
        raise ValueError(f"load: {path}: expected a file ending in {known}; got {path.suffix or 'no ending'!r}")
    return reader(path)
