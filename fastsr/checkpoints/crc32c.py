"""CRC-32C (Castagnoli), the checksum of TensorFlow's tables, in NumPy."""

from __future__ import annotations

import numpy as np

POLYNOMIAL = 0x82F63B78  # bits reversed
CHUNK = 1 << 16  # bytes; bounds the working memory


def crc32c(data: memoryview) -> int:
    """The checksum of some bytes; of b"123456789" it is 0xE3069283."""
    register = np.array([0xFFFFFFFF], np.uint32)
    for start in range(0, len(data), CHUNK):
        chunk = np.frombuffer(data[start : start + CHUNK], np.uint8)
        register = _over(register, len(chunk)) ^ _remainder(chunk)
    return int(register[0]) ^ 0xFFFFFFFF


def _remainder(chunk: np.ndarray) -> np.ndarray:
    """What a register that starts at zero holds after a chunk.

    It is linear: for two halves, that of the left half moved on over the length of the right one, xor that of the
    right. So pairs of bytes are joined, all at once, then pairs of pairs; a zero in front changes nothing.
    """
    remainders = TABLES[0][0][chunk]
    level = 0
    while len(remainders) > 1:
        if len(remainders) % 2:
            remainders = np.concatenate([np.zeros(1, np.uint32), remainders])
        remainders = _moved(remainders[::2], TABLES[level]) ^ remainders[1::2]
        level += 1
    return remainders


def _over(register: np.ndarray, count: int) -> np.ndarray:
    """A register after `count` zero bytes."""
    for level in range(count.bit_length()):
        if count >> level & 1:
            register = _moved(register, TABLES[level])
    return register


def _moved(registers: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Registers after as many zero bytes as a table is for: the xor of what becomes of each of their four bytes."""
    moved = table[0][registers & 0xFF]
    for i in (1, 2, 3):
        moved ^= table[i][registers >> np.uint32(8 * i) & 0xFF]
    return moved


def _tables() -> list[np.ndarray]:
    """Tables (4, 256) for 1, 2, 4, ... CHUNK zero bytes."""
    one = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        one = np.where(one & 1, one >> np.uint32(1) ^ np.uint32(POLYNOMIAL), one >> np.uint32(1))
    higher = [np.arange(256, dtype=np.uint32) << np.uint32(8 * i) for i in (0, 1, 2)]
    tables = [np.stack([one, *higher])]
    while len(tables) < CHUNK.bit_length():
        tables.append(_moved(tables[-1], tables[-1]))
    return tables


TABLES = _tables()
