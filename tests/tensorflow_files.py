"""Writes TensorFlow's checkpoints of version 1 from the description of LevelDB's tables, for fixtures."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np

from wire import fixed, number, raw, varint

TYPES = {"float32": (1, 5), "float64": (2, 6), "int32": (3, 7), "int64": (9, 10)}  # DataType, field of TensorProto
MAGIC = 0xDB4775248B80FB57


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value // 2 ^ (0x82F63B78 if value % 2 else 0)
        table.append(value)
    return table


CRC = _crc_table()


def crc32c(data: bytes) -> int:
    """Byte by byte."""
    register = 0xFFFFFFFF
    for byte in data:
        register = register >> 8 ^ CRC[(register ^ byte) & 0xFF]
    return register ^ 0xFFFFFFFF


def entries(pairs: Iterable[tuple[bytes, bytes]], every: int = 16) -> bytes:
    """The content of a block. every: how many entries share beginnings before a key is whole again."""
    made, restarts, before = bytearray(), [], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % every == 0:
            restarts.append(len(made))
        else:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        made += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    restarts = restarts or [0]
    return bytes(made) + struct.pack(f"<{len(restarts)}I", *restarts) + struct.pack("<I", len(restarts))


def table(blocks: Sequence[bytes], compression: int = 0, index: Sequence[bytes] | None = None) -> bytes:
    """A file of data blocks. index: handles to write instead of the true ones."""
    made, handles = bytearray(), []

    def add(content: bytes, kind: int) -> bytes:
        handle = varint(len(made)) + varint(len(content))
        crc = crc32c(content + bytes([kind]))
        rotated = (crc >> 15) + (crc % (1 << 15) << 17)
        made.extend(content + bytes([kind]) + struct.pack("<I", (rotated + 0xA282EAD8) % (1 << 32)))
        return handle

    handles = [add(block, compression) for block in blocks]
    meta = add(entries([]), 0)
    handles = handles if index is None else list(index)
    where = add(entries((bytes([i + 1]), handle) for i, handle in enumerate(handles)), 0)
    return bytes(made) + (meta + where).ljust(40, b"\0") + struct.pack("<Q", MAGIC)


def tensor(array: np.ndarray, encoding: str = "packed") -> bytes:
    """A TensorProto. encoding: packed, single (each value its own field), content (raw)."""
    dtype, field = TYPES[str(array.dtype)]
    raw_values = array.astype(array.dtype.newbyteorder("<"))
    if encoding == "content":
        return raw(4, raw_values.tobytes())
    if dtype in (3, 9):
        values = [int(v) for v in array.ravel()]
        return (
            raw(field, b"".join(map(varint, values)))
            if encoding == "packed"
            else b"".join(number(field, v) for v in values)
        )
    if encoding == "packed":
        return raw(field, raw_values.tobytes())
    return b"".join(fixed(field, value.tobytes()) for value in raw_values.ravel())


def listed(name: str, shape: Sequence[int], dtype: int) -> bytes:
    """What the list of variables says of one: a SavedSliceMeta in its field."""
    sizes = raw(2, b"".join(raw(2, number(1, size)) for size in shape))
    return raw(1, raw(1, name.encode()) + sizes + number(3, dtype) + raw(4, raw(1, b"") * len(shape)))


def saved(name: str, axes: int, data: bytes, extents: bytes | None = None) -> bytes:
    """The value of an entry that holds a variable; its extents are whole axes unless given."""
    whole = raw(1, b"") * axes if extents is None else extents
    return raw(2, raw(1, name.encode()) + raw(2, whole) + raw(3, data))


def values(variables: dict[str, np.ndarray], encoding: str = "packed") -> list[bytes]:
    """The values of all entries: the list of variables first."""
    meta = b"".join(listed(name, v.shape, TYPES[str(v.dtype)][0]) for name, v in variables.items())
    versions = raw(2, number(1, 21))
    return [raw(1, meta + versions)] + [saved(n, v.ndim, tensor(v, encoding)) for n, v in variables.items()]


def checkpoint(all_values: Sequence[bytes], per_block: int = 4, every: int = 16) -> bytes:
    """A file with these values under rising keys."""
    pairs = [(b"" if i == 0 else b"\0variable/%06d" % i, value) for i, value in enumerate(all_values)]
    return table([entries(pairs[i : i + per_block], every) for i in range(0, len(pairs), per_block)])
