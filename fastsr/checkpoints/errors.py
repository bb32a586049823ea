"""The one error of all readers of weight files."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A weight file that is truncated, damaged, hostile, or not of the format it claims to be. The message names the
    file, the offence, and what to do."""


def damaged(offence: str) -> CheckpointError:
    """The error for bytes that no writer of a format makes."""
    return CheckpointError(f"{offence}: the file is damaged or cut short; get it anew")
