"""The normal form: a safetensors file of one network under its own keys, with all that its tensors do not say.

That is in the metadata, as strings: `fastsr_version`, which also marks the form; `network`; `variant`, the dialect of
the file that it was made from; `config`, the configuration as JSON; `source_sha256`, of that file. A file may come from
anybody, so its metadata is data only: bounded here, and believed by `load` as far as it agrees with the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastsr.checkpoints.errors import CheckpointError

LONGEST = {"fastsr_version": 100, "network": 100, "variant": 100, "config": 10_000, "source_sha256": 64}  # characters


@dataclass(frozen=True)
class Normal:
    """What the metadata of a normal form says; `config` is a dict of plain JSON values."""

    network: str
    variant: str
    config: dict[str, Any]
    source_sha256: str
    fastsr_version: str

    def metadata(self) -> dict[str, str]:
        """As it is stored."""
        return asdict(self) | {"config": json.dumps(self.config, sort_keys=True)}


def from_metadata(metadata: Mapping[str, str] | None) -> Normal | None:
    """The reverse of `Normal.metadata`; None for a file that is no normal form. Raises CheckpointError, without the
    file's name, for one that is nearly so."""
    if metadata is None or "fastsr_version" not in metadata:
        return None
    found = {}
    for key, longest in LONGEST.items():
        if key not in metadata:
            raise CheckpointError(f"metadata: expected {key!r} beside 'fastsr_version'; convert the source file again")
        if len(metadata[key]) > longest:
            raise CheckpointError(
                f"metadata: expected {key!r} of at most {longest} characters, got {len(metadata[key])}; "
                "convert the source file again"
            )
        found[key] = metadata[key]
    try:
        config = json.loads(found["config"])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"metadata: 'config' is not JSON ({error}); convert the source file again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"metadata: 'config' is a {type(config).__name__}, not an object of fields")
    if not re.fullmatch("[0-9a-f]{64}", found["source_sha256"]):
        raise CheckpointError("metadata: 'source_sha256' is not 64 hexadecimal digits; convert the source file again")
    return Normal(**found | {"config": config})


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration as JSON gives them back: tuples are lists."""
    return json.loads(json.dumps(dict(config)))


def tuples(value: Any) -> Any:
    """A JSON value as a configuration has it: lists are tuples."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value
