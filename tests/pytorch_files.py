"""Writes PyTorch's three layouts from their descriptions, around pickles made by hand or by Python, for fixtures."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Mapping, Sequence

MAGIC = 0x1950A86A20F9469CFC6C


def archive(members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return buffer.getvalue()


def zipped(program: bytes, storages: Mapping[str, bytes] | None = None, **more: bytes) -> bytes:
    """The present layout: a pickle, and storages by key."""
    members = {"model/data.pkl": program, "model/byteorder": b"little", "model/version": b"3\n"}
    members |= {f"model/data/{key}": content for key, content in (storages or {}).items()}
    return archive(members | {f"model/{name.replace('_', '.')}": content for name, content in more.items()})


def legacy(program: bytes, storages: Sequence[tuple[str, int, bytes]] = (), little: bool = True) -> bytes:
    """The layout before it: storages as (key, count of numbers, bytes)."""
    head = [MAGIC, 1001, {"protocol_version": 1001, "little_endian": little, "type_sizes": {"short": 2}}]
    keys = pickle.dumps([key for key, _, _ in storages], 2)
    body = b"".join(struct.pack("<q", count) + content for _, count, content in storages)
    return b"".join(pickle.dumps(value, 2) for value in head) + program + keys + body


def tarred(
    program: bytes,
    storages: Sequence[tuple[object, bytes, int, bytes]] = (),
    tensors: Sequence[tuple[object, object, Sequence[int], Sequence[int], int]] = (),
    views: Sequence[tuple[object, object, int, int]] = (),
) -> bytes:
    """The oldest layout. storages: (key, type by `name`, count, bytes); tensors: (key, key of the storage, sizes,
    strides, first); views: (key, key of the storage, first, count)."""
    parts = {"storages": pickle.dumps(len(storages), 2), "tensors": pickle.dumps(len(tensors), 2), "pickle": program}
    for key, kind, count, content in storages:
        entry = b"\x80\x02" + value(key) + value("cpu") + kind + b"\x87."
        parts["storages"] += entry + struct.pack("<q", count) + content
    parts["storages"] += pickle.dumps(list(views), 2)
    for key, root, sizes, strides, first in tensors:
        entry = b"\x80\x02" + value(key) + value(root) + name("torch", "FloatTensor") + b"\x87."
        numbers = struct.pack(f"<ii{2 * len(sizes) + 1}q", len(sizes), 0, *sizes, *strides, first)
        parts["tensors"] += entry + numbers
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as made:
        for member, content in parts.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# Parts of pickles; each leaves one value on the stack.


def value(plain: object) -> bytes:
    """A value of Python."""
    return pickle.dumps(plain, 2)[2:-1]


def name(module: str, attribute: str) -> bytes:
    """A class or function."""
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    """What a function returns."""
    return function + b"(" + b"".join(arguments) + b"tR"


def make(cls: bytes, state: bytes = b"}") -> bytes:
    """An object of a class, with a state."""
    return cls + b")\x81" + state + b"b"


def mapping(**entries: bytes) -> bytes:
    """A dict."""
    return b"}(" + b"".join(value(key) + part for key, part in entries.items()) + b"u"


def whole(part: bytes) -> bytes:
    """A pickle of protocol 2."""
    return b"\x80\x02" + part + b"."


def storage(key: str, count: int, kind: bytes = name("torch", "FloatStorage"), view: bytes | None = None) -> bytes:
    """A reference to a storage; the legacy layout has a view of it as a sixth part."""
    parts = [value("storage"), kind, value(key), value("cpu"), value(count)]
    return b"(" + b"".join(parts if view is None else [*parts, view]) + b"tQ"


def tensor(source: bytes, first: int, sizes: object, strides: object, function: str = "_rebuild_tensor_v2") -> bytes:
    """A tensor on a storage."""
    hooks = call(name("collections", "OrderedDict"))
    extra = [] if function == "_rebuild_tensor" else [value(False), hooks]
    return call(name("torch._utils", function), source, value(first), value(sizes), value(strides), *extra)
