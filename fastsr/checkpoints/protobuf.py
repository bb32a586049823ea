"""The wire format of Protocol Buffers, as far as files of weights need it.

Nothing is copied, and no length is believed that reaches beyond the bytes really there. A reader looks at the fields it
knows, with the wire type it expects, and passes over all others, as the format asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastsr.checkpoints.errors import damaged

VARINT, I64, BYTES, I32 = 0, 1, 2, 5  # wire types
LONGEST_TEXT = 1000  # bytes; for names, which come up in messages


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """The unsigned number of at most 64 bits at a position, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise damaged("a number runs past the end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    else:
        raise damaged("a number does not end")
    if value >> 64:
        raise damaged("a number of more than 64 bits")
    return value, at


def varints(data: memoryview) -> Iterator[int]:
    """The numbers of a packed field."""
    at = 0
    while at < len(data):
        value, at = varint(data, at)
        yield value


def fields(message: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(field number, wire type, value): an int where the wire type is VARINT, else a memoryview of the bytes."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = varint(message, at)
            yield number, wire, value
            continue
        if wire == BYTES:
            length, at = varint(message, at)
        elif wire in (I32, I64):
            length = 4 if wire == I32 else 8
        else:
            raise damaged(f"field {number} has the unknown wire type {wire}")
        if length > len(message) - at:
            raise damaged(f"field {number} claims {length} bytes where {len(message) - at} are left")
        yield number, wire, message[at : at + length]
        at += length


def text(value: memoryview) -> str:
    """A string field."""
    if len(value) > LONGEST_TEXT:
        raise damaged(f"a name of {len(value)} bytes")
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError:
        raise damaged(f"a name that is not UTF-8, {bytes(value[:20])!r}") from None
