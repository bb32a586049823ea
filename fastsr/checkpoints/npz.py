"""NumPy's files, `.npz` and `.npy`. TensorLayer saves a network as the list `params` of its arrays in one `.npz`.

Arrays of numbers are bytes behind a line of text. Arrays of objects, which such lists become, are pickles; they go
through `fastsr.checkpoints.pickles`, which runs nothing, and never through NumPy's own reader (whose `allow_pickle`
would).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsr.checkpoints import pickles
from fastsr.checkpoints.archive import Archive
from fastsr.checkpoints.content import Content
from fastsr.checkpoints.errors import CheckpointError, damaged, opened
from fastsr.checkpoints.pickles import Budget

DESCRIPTION = "NumPy's arrays and lists of arrays, as TensorLayer saves them"
ENDINGS = (".npz", ".npy")
NETWORKS = ("srfeat", "srfeat_discriminator", "srfeat_vgg19")
SEEN = "not seen a real file"

MAGIC = b"\x93NUMPY"
LONGEST_HEADER = 1 << 16
MOST_ENTRIES = 100_000
LONGEST_NAME = 1000  # characters
DEEPEST = 8  # lists in lists


def matches(data: memoryview) -> bool:
    """Whether a file is an array, or an archive of arrays."""
    if data[:4] == b"PK\x03\x04":
        return any(name.endswith(".npy") for name in Archive(data).members)
    return data[:6] == MAGIC


def read(path: Path) -> Content:
    """Arrays by name: `<name>`; `<name>.<n>` for those in a list or an array of objects; `<name>.<key>` for those in a
    dict. In a `.npy` file the first part is missing. Types are the file's; texts, dates and objects that are no
    arrays are left out.

    Raises CheckpointError if the file is damaged or hostile, or without arrays.
    """
    with opened(path) as data:
        content = Content()
        names = _Names(content)
        if data[:6] == MAGIC:
            names.add("", _array(data), len(data))
        else:
            archive = Archive(data)
            for name in archive.members:
                if name.endswith(".npy"):
                    array = archive.read(name)
                    names.add(name.removesuffix(".npy"), _array(array), len(array))
        if not content:
            raise CheckpointError("no named array of numbers; expected a list or a dict of weights")
        return content


def _array(data: memoryview) -> Any:
    """An array of numbers as a tensor, one of objects as what its pickle holds; None for texts and dates."""
    if data[:6] != MAGIC or len(data) < 12 or data[6] not in (1, 2, 3):
        raise damaged("an array without NumPy's header")
    wide = 2 if data[6] == 1 else 4
    start = 8 + wide
    length = int.from_bytes(data[8:start], "little")
    if length > min(LONGEST_HEADER, len(data) - start):
        raise damaged(f"an array claims a header of {length:,} bytes")
    header = bytes(data[start : start + length]).decode("latin-1")
    code = re.search(r"""['"]descr['"]\s*:\s*['"]([<>|=]?)([A-Za-z]\d{0,9})(?:\[\w+\])?['"]""", header)
    order = re.search(r"""['"]fortran_order['"]\s*:\s*(True|False)""", header)
    shape = re.search(r"""['"]shape['"]\s*:\s*\(([\dL,\s]*)\)""", header)
    if not code or not order or not shape:
        raise CheckpointError(f"an array of an unusual kind ({header.strip()[:100]}); expected plain numbers")
    texts = [text.strip(" L") for text in shape[1].split(",") if text.strip()]
    if not all(text.isdecimal() and len(text) < 16 for text in texts):
        raise damaged(f"an array claims the shape ({shape[1][:50]})")
    sizes, body = pickles.sizes_of([int(text) for text in texts]), data[start + length :]
    if code[2][0] == "O":
        value = pickles.load(body).value
        held = pickles.array(value, Budget(len(body)))
        if not isinstance(held, list):
            raise damaged("an array of objects is pickled as something else")
        return held[0] if sizes == () and held else held
    if code[2][0] in pickles.PASSED:
        return None
    if code[2] not in pickles.KINDS:
        raise CheckpointError(f"an array of the type {code[2]!r}; expected plain numbers")
    return pickles.numbers(body, (code[1] or "=") + code[2], sizes, order[1] == "True", Budget(len(body)))


class _Names:
    """Adds arrays, and those in lists and dicts, to a content, by names."""

    def __init__(self, content: Content) -> None:
        self.content, self.entries = content, 0

    def add(self, name: str, value: Any, size: int) -> None:
        """Adds what a member of the file holds, which has `size` bytes."""
        self.budget = Budget(size)
        self.made: dict[int, Any] = {}  # by id
        self.enter(name, value, 0)

    def enter(self, name: str, value: Any, depth: int) -> None:
        self.entries += 1
        if self.entries > MOST_ENTRIES or depth > DEEPEST or len(name) > LONGEST_NAME:
            raise CheckpointError(
                f"more than {MOST_ENTRIES:,} arrays, lists more than {DEEPEST} deep in each other, or a name of more "
                f"than {LONGEST_NAME:,} characters"
            )
        if not isinstance(value, Tensor):
            if id(value) not in self.made:
                self.made[id(value)] = pickles.array(value, self.budget)
            array = self.made[id(value)]
            value = value if array is None else array
        if isinstance(value, Tensor):
            if name:
                self.content[name] = value
            return
        parts = enumerate(value) if isinstance(value, (list, tuple)) else (pickles.entries(value) or {}).items()
        for key, part in parts:
            if isinstance(key, (str, int)):
                self.enter(f"{name}.{key}" if name else str(key), part, depth + 1)
