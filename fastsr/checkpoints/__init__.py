"""Readers of weight files, one a format.

Each has `read(path)`, which returns names -> CPU tensors and raises CheckpointError; `matches(data)`, whether the bytes
of a file look like its format; and for people: DESCRIPTION, ENDINGS, NETWORKS (whose files come in it) and SEEN.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fastsr.checkpoints import caffe, npz, pytorch, safetensors, tensorflow, torch7
from fastsr.checkpoints.errors import CheckpointError, opened

FORMATS: tuple[ModuleType, ...] = (safetensors, tensorflow, pytorch, npz, torch7, caffe)
"""The readers, in the order in which `matches` is asked: whoever has no magic number comes last."""


def reader_of(path: str | os.PathLike[str]) -> ModuleType:
    """The reader for a weight file, chosen by what it holds, whatever its name, and by the ending where that tells
    nothing. Raises FileNotFoundError; CheckpointError for a file of no known format and for what is no file."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"load: {path}: expected a weight file; there is none")
    if not path.is_file():  # a pipe or a device might never end
        raise CheckpointError(f"load: {path}: expected a weight file; this is a folder, a pipe or a device")
    with opened(path) as data:
        by_content = next((f for f in FORMATS if f.matches(memoryview(data))), None)
    reader = by_content or next((f for f in FORMATS if path.suffix.lower() in f.ENDINGS), None)
    if reader is None:
        known = ", ".join(ending for f in FORMATS for ending in f.ENDINGS)
        raise CheckpointError(
            f"load: {path}: expected a file ending in {known}, or the content of one under another name; "
            f"got {path.suffix or 'no ending'!r} and a content of none of these"
        )
    return reader


def read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The content of a weight file, as saved, on the CPU. Raises what `reader_of` does, and CheckpointError for a file
    that is damaged or hostile."""
    return reader_of(path).read(Path(path))
