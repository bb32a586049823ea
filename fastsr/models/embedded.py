"""The weights that come with fastsr, known by name wherever a file of weights is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "train" / "weights"
EMBEDDED = {"carn_m": FOLDER / "carn_m_x234.safetensors"}
"""Files by name; docs/model-card-carn_m.md says what is in this one."""
DEFAULT = "carn_m"
DEFAULT_SCALE = 2  # of embedded weights, where none is asked for


def is_embedded(model: Any) -> bool:
    """Whether this is the name of weights that come with fastsr."""
    return isinstance(model, str) and model in EMBEDDED


def weights_of(model: Any) -> Any:
    """The file behind a name in EMBEDDED; anything else as it is."""
    return EMBEDDED[model] if is_embedded(model) else model
