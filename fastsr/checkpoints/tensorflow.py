"""TensorFlow's checkpoints of the first version: one file, which is a sorted table in the manner of LevelDB.

The last 48 bytes say where two blocks lie, of which the second is an index of all others. A block consists of entries,
keys without the beginning they share with the key before; four bytes for each place where a key is whole, and how many
there are; a byte for the compression; and a checksum. One value is the list of all variables with shapes and types,
every other one holds a variable. Newer checkpoints, with `.index` and `.data` in their names, are another format.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsr.checkpoints import protobuf
from fastsr.checkpoints.content import Content
from fastsr.checkpoints.crc32c import crc32c
from fastsr.checkpoints.errors import CheckpointError, damaged, opened
from fastsr.checkpoints.protobuf import fields, text, varint, varints

DESCRIPTION = "TensorFlow checkpoint, version 1 (a single file)"
ENDINGS = (".ckpt",)
NETWORKS = ("enhancenet",)
SEEN = "real file"

FOOTER = 48
MAGIC = 0xDB4775248B80FB57
TRAILER = 5  # compression, checksum
SNAPPY = 1
MOST_AXES = 32
FLOAT, DOUBLE, INT32, INT64 = 1, 2, 3, 9  # DataType
VALUE_FIELDS = {5: FLOAT, 6: DOUBLE, 7: INT32, 10: INT64}  # of a TensorProto
DTYPES = {FLOAT: np.dtype("<f4"), DOUBLE: np.dtype("<f8"), INT32: np.dtype("<i4"), INT64: np.dtype("<i8")}


@dataclass(frozen=True)
class Variable:
    """What the list of variables says of one."""

    name: str
    shape: tuple[int, ...]
    type: int


def matches(data: memoryview) -> bool:
    """Whether a file ends with the magic number of a table."""
    return len(data) >= FOOTER and int.from_bytes(data[-8:], "little") == MAGIC


def read(path: Path) -> Content:
    """Variable names -> tensors as they are stored, convolutions (height, width, in, out); the types float32, float64,
    int32 and int64. All checksums are verified. Raises CheckpointError."""
    with opened(path) as mapped:
        data = memoryview(mapped)
        if not matches(data):
            raise damaged("the magic number of a TensorFlow table is missing at the end")
        listed: dict[str, Variable] = {}
        stored: dict[str, memoryview] = {}
        for value in _values(data):
            for number, wire, message in fields(value):
                if (number, wire) == (1, protobuf.VARINT):
                    raise CheckpointError(
                        "this is the index of a checkpoint of version 2, which has its weights in .data files; "
                        "save it as version 1: tf.compat.v1.train.Saver(write_version=tf.compat.v1.train.SaverDef.V1)"
                    )
                if (number, wire) == (1, protobuf.BYTES):
                    for variable in _variables(message):
                        _add(listed, variable.name, variable)
                elif (number, wire) == (2, protobuf.BYTES):
                    _add(stored, *_slice(message))
        return _content(listed, stored)


def _content(listed: dict[str, Variable], stored: dict[str, memoryview]) -> Content:
    """The tensors of all variables listed."""
    if listed.keys() != stored.keys():
        name = min(listed.keys() ^ stored.keys())
        raise damaged(
            f"the variable {name!r} is {'listed but not there' if name in listed else 'there but not listed'}"
        )
    if not listed:
        raise CheckpointError("the checkpoint holds no variables; save it with some")
    content = Content()
    for name, variable in listed.items():
        try:
            content[name] = _tensor(stored[name], variable)
        except CheckpointError as error:
            raise CheckpointError(f"variable {name!r}: {error}") from error
    return content


def _add(known: dict[str, object], name: str, value: object) -> None:
    if name in known:
        raise damaged(f"the variable {name!r} is there twice")
    known[name] = value


# The table.


def _values(data: memoryview) -> Iterator[memoryview]:
    """The values of a table's entries, in order."""
    footer, at, handles = data[-FOOTER:], 0, []
    for _ in range(4):
        number, at = varint(footer, at)
        handles.append(number)
    body = data[:-FOOTER]
    _block(body, handles[0], handles[1])
    end = 0
    for handle in _entries(_block(body, handles[2], handles[3])):
        offset, at = varint(handle, 0)
        size, at = varint(handle, at)
        if offset < end:  # as no writer does; and so the whole takes no longer than the file is long
            raise damaged("blocks overlap")
        yield from _entries(_block(body, offset, size))
        end = offset + size + TRAILER


def _block(body: memoryview, offset: int, size: int) -> memoryview:
    """The content of a block, its checksum verified."""
    if offset + size + TRAILER > len(body):
        raise damaged(f"a block of {size} bytes at {offset} goes beyond the {len(body)} bytes there are")
    content, (compression, checksum) = body[offset : offset + size], struct.unpack_from("<BI", body, offset + size)
    crc = crc32c(body[offset : offset + size + 1])
    if checksum != ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF:  # masked, as LevelDB has it
        raise damaged(f"the checksum of the block at {offset} is wrong")
    if compression:
        kind = "with snappy" if compression == SNAPPY else f"in the unknown way {compression}"
        raise CheckpointError(f"the block at {offset} is compressed {kind}, which is not read; save it uncompressed")
    return content


def _entries(block: memoryview) -> Iterator[memoryview]:
    """The values in a block. The keys repeat what the values say; only their lengths are followed."""
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise damaged(f"a block of {len(block)} bytes claims {restarts} restarts")
    entries, at, key = block[:end], 0, 0
    while at < end:
        shared, at = varint(entries, at)
        unshared, at = varint(entries, at)
        length, at = varint(entries, at)
        if shared > key or unshared + length > end - at:
            raise damaged("an entry goes beyond its block")
        key, at = shared + unshared, at + unshared
        yield entries[at : at + length]
        at += length


# The messages in it.


def _variables(meta: memoryview) -> Iterator[Variable]:
    """The list of a SavedTensorSliceMeta."""
    for number, wire, message in fields(meta):
        if (number, wire) != (1, protobuf.BYTES):
            continue
        name, shape, kind = "", (), 0
        for number, wire, value in fields(message):
            if (number, wire) == (1, protobuf.BYTES):
                name = text(value)
            elif (number, wire) == (2, protobuf.BYTES):
                shape = _shape(value)
            elif (number, wire) == (3, protobuf.VARINT):
                kind = value
        yield Variable(name, shape, kind)


def _shape(message: memoryview) -> tuple[int, ...]:
    """The sizes in a TensorShapeProto."""
    sizes = []
    for number, wire, dimension in fields(message):
        if (number, wire) == (2, protobuf.BYTES):
            said = [value for number, wire, value in fields(dimension) if (number, wire) == (1, protobuf.VARINT)]
            sizes.append(said[-1] if said else 0)
        if len(sizes) > MOST_AXES:
            raise damaged(f"a shape of more than {MOST_AXES} axes")
    return tuple(sizes)


def _slice(message: memoryview) -> tuple[str, memoryview]:
    """(variable name, TensorProto) of a SavedSlice, which has to be the whole variable: its extents say no length."""
    name, extents, tensor = "", memoryview(b""), memoryview(b"")
    for number, wire, value in fields(message):
        if (number, wire) == (1, protobuf.BYTES):
            name = text(value)
        elif (number, wire) == (2, protobuf.BYTES):
            extents = value
        elif (number, wire) == (3, protobuf.BYTES):
            tensor = value
    for _, wire, extent in fields(extents):
        if wire == protobuf.BYTES and any(number == 2 for number, _, _ in fields(extent)):
            raise CheckpointError(f"the variable {name!r} is stored in parts, which is not read; save it unpartitioned")
    return name, tensor


def _tensor(message: memoryview, variable: Variable) -> Tensor:
    """The tensor in a TensorProto: raw in `tensor_content`, or as a list of numbers of its type."""
    if variable.type not in DTYPES:
        raise CheckpointError(f"its type, number {variable.type} of TensorFlow's, is not read; save it as float32")
    dtype, count = DTYPES[variable.type], math.prod(variable.shape)
    raw, integers = bytearray(), array("q")
    for number, wire, value in fields(message):
        if (number, wire) == (4, protobuf.BYTES):
            raw += value
        elif VALUE_FIELDS.get(number) != variable.type:
            continue
        elif variable.type in (FLOAT, DOUBLE):
            if wire in (protobuf.BYTES, protobuf.I64 if variable.type == DOUBLE else protobuf.I32):
                raw += value
        elif wire in (protobuf.BYTES, protobuf.VARINT):
            numbers = [value] if wire == protobuf.VARINT else varints(value)
            integers.extend(n - (n >> 63 << 64) for n in numbers)  # two's complement
    if integers:
        raw += np.array(integers, np.int64).astype(dtype).tobytes()  # as Protocol Buffers do, cut to the type's width
    if not raw or len(raw) != count * dtype.itemsize:
        raise damaged(f"expected {count} values for the shape {variable.shape}; got {len(raw) / dtype.itemsize:g}")
    values = np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(values.reshape(variable.shape))
