"""What the readers of weight files share: one error, and one way to open a file."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(ValueError):
    """A weight file that is truncated, damaged, hostile, or not of the format it claims to be. The message names the
    file, the offence, and what to do."""


def damaged(offence: str) -> CheckpointError:
    """The error for bytes that no writer of a format makes."""
    return CheckpointError(f"{offence}: the file is damaged or cut short; fetch it again")


@contextmanager
def opened(path: Path) -> Iterator[mmap.mmap]:
    """The bytes of a file, mapped and not read: what a reader does not look at costs no memory. A CheckpointError from
    inside leaves with the file's name in front, so that readers need not know it."""
    with open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            raise CheckpointError(f"load: {path}: the file is empty; fetch it again")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        yield data  # not closed here: slices of it may outlive an error, and the last one to go unmaps it
    except CheckpointError as error:
        raise CheckpointError(f"load: {path}: {error}") from error
