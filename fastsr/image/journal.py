"""What is proven to be done in a folder of results, so that a run that was stopped can go on where it was.

One line of JSON for every finished image, in the folder itself, appended after the image is on the disk and synced
before the next one starts. A line is believed only where all of it still holds: the hashes of the input, the model and
the options, and size and hash of the output as it lies there. A line that was cut off when the machine died is no JSON
and says nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fastsr.image import io
from fastsr.models import Network

NAME = ".fastsr-journal.jsonl"


@dataclass(frozen=True)
class Entry:
    """One image: its output, relative to the folder; what it was made from (SHA-256, hex); what it is."""

    output: str
    input: str
    model: str
    options: str
    size: int
    sha256: str


class Journal:
    """The journal of one folder, which several processes may write to at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / NAME

    def entries(self) -> dict[str, Entry]:
        """The last line about every output; lines that cannot be read are left out."""
        found = {}
        for line in self.path.read_bytes().split(b"\n") if self.path.exists() else ():
            entry = _parsed(line)
            if entry is not None:
                found[entry.output] = entry
        return found

    def holds(self, entry: Entry) -> bool:
        """Whether the output lies there as the entry says, every byte of it."""
        path = self.folder / entry.output
        try:
            return path.stat().st_size == entry.size and io.file_digest(path) == entry.sha256
        except OSError:
            return False

    def add(self, entry: Entry) -> None:
        """Appends a line, all of it or nothing, and waits until it is on the disk. Raises OSError."""
        line = json.dumps(asdict(entry)).encode() + b"\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            io.lock(descriptor)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # after one that was cut off
            if os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, size)
                raise OSError(f"{self.path}: no space for another line")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if size == 0:
            io.sync_folder(self.folder)


def _parsed(line: bytes) -> Entry | None:
    try:
        said = json.loads(line)
        if {f.name: type(said[f.name]).__name__ for f in fields(Entry)} != {f.name: f.type for f in fields(Entry)}:
            return None
        return Entry(**said)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def network_digest(network: Network) -> str:
    """SHA-256 of a network: its class, configuration, and every tensor with its name, dtype and shape."""
    digest = hashlib.sha256(network.summary().encode())
    for key, tensor in network.state_dict().items():
        digest.update(f"\0{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def options_digest(options: Mapping[str, Any]) -> str:
    """SHA-256 of what JSON can hold, in whatever order."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
