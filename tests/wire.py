"""Writes the wire format of Protocol Buffers, for the fixtures of Caffe's and TensorFlow's files."""

from __future__ import annotations


def varint(value: int) -> bytes:
    """A number, seven bits a byte, the lowest first; negative ones as 64 bits."""
    value %= 1 << 64
    made = bytearray()
    while value >= 0x80:
        made.append(value % 0x80 + 0x80)
        value //= 0x80
    return bytes([*made, value])


def number(field: int, value: int) -> bytes:
    """A field of wire type 0."""
    return varint(field * 8) + varint(value)


def raw(field: int, value: bytes) -> bytes:
    """A field of wire type 2: text, a message, packed numbers."""
    return varint(field * 8 + 2) + varint(len(value)) + value


def fixed(field: int, value: bytes) -> bytes:
    """A field of wire type 5 or 1: four or eight bytes."""
    return varint(field * 8 + {4: 5, 8: 1}[len(value)]) + value
