"""Ways in which files get damaged, or are damaged on purpose: what the readers are fuzzed with."""

from __future__ import annotations

from hypothesis import strategies as st

LENGTHS = (
    b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\xff" * 10, b"\x80" * 12,  # varints
    b"\xff\xff\xff\x7f", b"\xff" * 4, b"\xff" * 8, b"\0\0\0\0\0\0\0\x10", b"\0\0\0\x40",  # little-endian numbers
    b"999999999999", b"-1",  # digits
)  # fmt: skip
KINDS = ("flip", "set", "cut", "drop", "delete", "insert", "repeat", "splice", "length")

mutations = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 2**24), st.integers(0, 2**16)), min_size=1, max_size=3
)
"""A few steps of damage: (kind, where, with what)."""


def mutate(data: bytes, steps: list[tuple[str, int, int]]) -> bytes:
    """A damaged copy of some bytes."""
    for kind, where, what in steps:
        at = where % (len(data) + 1)
        before, after, length = data[:at], data[at:], what % 64 + 1
        if kind == "flip":
            data = before + bytes([after[0] ^ 1 << what % 8]) + after[1:] if after else data
        elif kind == "set":
            data = before + bytes([what % 256]) + after[1:]
        elif kind == "cut":
            data = before
        elif kind == "drop":
            data = after
        elif kind == "delete":
            data = before + after[length:]
        elif kind == "insert":
            data = before + what.to_bytes(3, "little") + after
        elif kind == "repeat":
            data = before + after[:length] * 2 + after[length:]
        elif kind == "splice":
            other = what * 31 % (len(data) + 1)
            data = before + data[other : other + length] + after[length:]
        else:
            inflated = LENGTHS[what % len(LENGTHS)]
            data = before + inflated + after[what // 64 % 2 * len(inflated) :]  # over what was there, or between
    return data
