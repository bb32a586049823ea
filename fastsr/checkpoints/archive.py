"""Zip archives, as PyTorch and NumPy write them, read from mapped bytes.

Only what such archives have: members stored or deflated, in one file, with the 64-bit fields of large archives. What a
member claims is compared with the bytes that are there before anything is made of it. (APPNOTE.TXT of PKWARE, 6.3.)
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from fastsr.checkpoints.errors import CheckpointError, damaged

STORED, DEFLATED = 0, 8
MOST_MEMBERS = 100_000
MOST_INFLATION = 64  # of a whole archive; weights hardly shrink, constant tables do
SMALL = 1 << 20  # bytes that an archive may hold whatever its size


@dataclass(frozen=True)
class Member:
    """One entry of the directory. packed, size: bytes in the archive and unpacked. at: of its local header."""

    method: int
    flags: int
    checksum: int
    packed: int
    size: int
    at: int


class Archive:
    """`members` by name. Raises CheckpointError."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.members = self._directory()
        self.allowance = MOST_INFLATION * len(data) + SMALL

    def read(self, name: str) -> memoryview:
        """The content of a member: the mapped bytes if it is stored. All reads together may not give more than
        MOST_INFLATION times the archive."""
        member = self.members[name]
        if member.flags & 1:
            raise CheckpointError(f"{name[:200]!r} in the archive is encrypted; unpack and pack it again")
        self.allowance -= member.size
        if self.allowance < 0:
            raise CheckpointError(f"the archive claims to hold more than {MOST_INFLATION} times its own size")
        _, name_length, extra_length = self._unpack("<26xHH", member.at, b"PK\x03\x04")
        start = member.at + 30 + name_length + extra_length
        if member.packed > len(self.data) - start:
            raise damaged(f"{name[:200]!r} in the archive claims {member.packed:,} bytes, which are not there")
        packed = self.data[start : start + member.packed]
        content = self._inflate(packed, member.size) if member.method == DEFLATED else packed
        if member.method not in (STORED, DEFLATED):
            raise CheckpointError(
                f"{name[:200]!r} in the archive is packed by method {member.method}; expected deflate"
            )
        if len(content) != member.size:
            raise damaged(f"{name[:200]!r} in the archive has {len(content):,} bytes instead of {member.size:,}")
        if member.checksum not in (0, zlib.crc32(content)):  # torch can be told not to compute it
            raise damaged(f"{name[:200]!r} in the archive does not have its checksum")
        return content

    @staticmethod
    def _inflate(packed: memoryview, size: int) -> memoryview:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = inflater.decompress(packed, size + 1)  # one more, so that too long is noticed
        except zlib.error as error:
            raise damaged(f"a member of the archive cannot be unpacked ({error})") from error
        return memoryview(content)

    def _unpack(self, form: str, at: int, signature: bytes = b"") -> tuple[int, ...]:
        """Fields at a position, which has to be inside the archive and begin with the signature."""
        inside = 0 <= at <= len(self.data) - struct.calcsize(form)
        if not inside or self.data[at : at + len(signature)] != signature:
            raise damaged("the archive's directory points to where nothing is")
        return (at, *struct.unpack_from(form, self.data, at))

    def _directory(self) -> dict[str, Member]:
        tail = max(len(self.data) - 22 - 65535, 0)
        found = bytes(self.data[tail:]).rfind(b"PK\x05\x06")
        if found < 0:
            raise damaged("an archive without a directory")
        end = tail + found
        _, count, length, start = self._unpack("<10xHII2x", end)
        if count == 0xFFFF or 0xFFFFFFFF in (length, start):
            (_, at) = self._unpack("<8xQ", end - 20, b"PK\x06\x07")
            _, count, length, start = self._unpack("<32xQQQ", at, b"PK\x06\x06")
        if count > MOST_MEMBERS or length > len(self.data):
            raise damaged(f"the archive claims {count:,} members and a directory of {length:,} bytes")
        members, spans = {}, []
        for _ in range(count):
            at, flags, method, checksum, packed, size, *lengths, begin = self._unpack(
                "<8xHH4xIIIHHH8xI", start, b"PK\x01\x02"
            )
            name_length, extra_length, comment_length = lengths
            after = at + 46 + name_length
            start = after + extra_length + comment_length
            if start > len(self.data):
                raise damaged("the archive's directory ends in the middle")
            name = bytes(self.data[at + 46 : after]).decode("utf-8", "replace")
            long = self._long_fields(self.data[after : after + extra_length])
            size, packed, begin = (long.pop(0) if n == 0xFFFFFFFF and long else n for n in (size, packed, begin))
            members[name] = Member(method, flags, checksum, packed, size, begin)
            spans.append((begin, begin + 30 + packed))
        spans.sort()
        if any(end > start for (_, end), (start, _) in zip(spans, spans[1:])):  # so that no byte is paid for often
            raise damaged("members of the archive overlap")
        return members

    @staticmethod
    def _long_fields(extra: memoryview) -> list[int]:
        """The 64-bit fields in a member's extra data: those of size, packed size and position that need them."""
        while len(extra) >= 4:
            kind, length = struct.unpack_from("<HH", extra)
            if kind == 1:
                usable = min(length, len(extra) - 4) // 8
                return list(struct.unpack_from(f"<{usable}Q", extra, 4))
            extra = extra[4 + length :]
        return []
