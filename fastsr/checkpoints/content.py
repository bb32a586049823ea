"""What a reader returns if a file says more than tensors."""

from __future__ import annotations

from typing import Any


class Content(dict[str, Any]):
    """Names -> CPU tensors. `hints`: what the file says beside them of the fields of a network's configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.hints: dict[str, Any] = {}
