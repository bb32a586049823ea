"""What a reader returns if a file says more than tensors."""

from __future__ import annotations

from typing import Any

from fastsr.checkpoints.normal import Normal


class Content(dict[str, Any]):
    """Names -> CPU tensors. `hints`: what the file says beside them of the fields of a network's configuration;
    `normal`: the metadata of a file in the normal form."""

    def __init__(self) -> None:
        super().__init__()
        self.hints: dict[str, Any] = {}
        self.normal: Normal | None = None
