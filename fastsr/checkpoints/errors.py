"""The one error of all readers of weight files."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(ValueError):
    """A weight file that is truncated, damaged, hostile, or not of the format it claims to be. The message names the
    file, the offence, and what to do."""


@contextmanager
def opened(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, mapped and not read: what a reader does not look at costs no memory. A CheckpointError from
    inside leaves with the file's name in front, so that readers need not know it."""
    with open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            raise CheckpointError(f"load: {path}: the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            try:
                yield view
            except CheckpointError as error:
                raise CheckpointError(f"load: {path}: {error}") from error
