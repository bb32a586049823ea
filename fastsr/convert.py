"""From any file of weights to the normal form, which says all about its network (`fastsr.checkpoints.normal`)."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save

import fastsr
from fastsr.checkpoints.normal import Normal, plain
from fastsr.image.io import file_digest, write_atomically
from fastsr.models import Network, load

ENDING = ".safetensors"


def convert(source: str | os.PathLike[str], path: str | os.PathLike[str], **hints: Any) -> Network:
    """Reads a file of weights and writes it to `path` in the normal form, which `load` reads back without hints to a
    network of the same outputs, bit for bit.

    source: any file that `load` takes; hints: what no file can say, as for `load`, and is written. path: ends in
    `.safetensors` and is not the source; a file that is there is replaced at once, complete or not at all.
    Tensors are written as `load` gives them: the network's own keys, float32. The metadata holds the network, the
    variant of its keys in the source, the configuration, SHA-256 of the source and fastsr's version; where the source
    is itself a normal form, variant and SHA-256 are those of the file that it came from.

    Returns the network. Raises what `load` does, ValueError for a path that is refused, OSError if writing fails.
    """
    source, path = Path(source), Path(path)
    if path.suffix.lower() != ENDING:
        raise ValueError(f"convert: {path}: expected a path that ends in {ENDING}, got {path.suffix or 'no ending'!r}")
    if not path.parent.is_dir():
        raise ValueError(f"convert: {path}: expected a path in a folder that is there; make {path.parent} first")
    if path.exists() and source.exists() and path.samefile(source):
        raise ValueError(f"convert: {path}: this would replace the source; choose another path")
    network = load(source, **hints)
    said = Normal(
        network=network.name,
        variant=network.origin.variant,
        config=plain(dataclasses.asdict(network.config)),
        source_sha256=network.origin.sha256 or file_digest(source),
        fastsr_version=fastsr.__version__,
    )
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    write_atomically(path, save(tensors, said.metadata()))
    return network
