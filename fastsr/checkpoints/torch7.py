"""Torch7's serialised objects (`torch.save` of Lua), binary and ascii; nothing in a file is executed.

A file is one object, and objects hold objects: an int for the kind, then the content. Tables and Torch objects carry
an index, by which they are referred to when they come again, also from inside themselves. Objects of a class are read
as the table of their fields; tensors and storages have layouts of their own; the bytecode of functions is passed over.
Longs take 8 bytes, or 4 in files of 32-bit and Windows machines, which no header says: 8 is tried first.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsr.checkpoints.content import Content
from fastsr.checkpoints.errors import CheckpointError, damaged, opened

DESCRIPTION = "Torch7's objects, binary and ascii, of 64-bit and 32-bit machines"
ENDINGS = (".t7",)
NETWORKS = ("rdn_original",)
SEEN = "not seen a real file"

NIL, NUMBER, STRING, TABLE, OBJECT, BOOLEAN, FUNCTION, OLD_CLOSURE, CLOSURE = range(9)
MOST_OBJECTS = 1_000_000
DEEPEST = 10_000  # generators in each other, six for a network in a network; RDN comes to 300
MOST_AXES = 16
SHARING = 32  # how often a file's bytes may be in tensors
LONGEST_TOKEN = 64  # characters of an ascii number
LONGEST_NAME = 2_000
BLOCK = 1 << 14  # ascii numbers read at a time

SCALARS = {"Byte": "u1", "Char": "i1", "Short": "i2", "Int": "i4", "Long": "long", "Half": "f2", "Float": "f4",
           "Double": "f8"}  # fmt: skip
CLASS = re.compile(r"torch\.(Cuda)?(Byte|Char|Short|Int|Long|Half|Float|Double)?(Tensor|Storage)")
PARAMETERS = ("weight", "bias", "running_mean", "running_var")


@dataclass(eq=False)
class Object:
    """An object of a Torch class that is no tensor: the table of its fields."""

    name: str
    fields: Any = None


Reading = Generator[Any, Any, Any]  # yields what has to be read first, is sent it, returns what it read


def matches(data: memoryview) -> bool:
    """Whether a file begins with a table or an object of a version, in either form."""
    start = bytes(data[:16])
    binary = start[:4] in (b"\3\0\0\0", b"\4\0\0\0") and start[4:8] == b"\1\0\0\0" and len(data) >= 12
    return binary or re.match(rb"[34]\n1\n\d+\n", start) is not None


def read(path: Path) -> Content:
    """The parameters of a network: `modules.<n>.weight` and `.bias` in the order of Torch7's `model:parameters()`, and
    `running_mean`, `running_var`; `<n>` counts from 1, and containers in containers add a `modules.<n>` each. Of a
    table, its tensors by their keys, and networks in it as dicts. Flat kernels of convolutions get their four axes.

    Raises CheckpointError if the file is damaged or holds none.
    """
    with opened(path) as data:
        if data[:1] in (b"3", b"4"):
            return _parameters(_Ascii(data))
        try:
            return _parameters(_Binary(data, "<q"))
        except CheckpointError as error:
            try:
                return _parameters(_Binary(data, "<i"))
            except CheckpointError:
                raise error from None


def _parameters(source: _Binary) -> Content:
    content = Content()
    _collect(_Parser(source).run(), content)
    if not content:
        raise CheckpointError("neither a network with parameters nor a table of tensors; expected a trained model")
    return content


# Bytes.


class _Binary:
    """Numbers and characters as the machine that wrote them had them, little-endian. long: "<q" or "<i"."""

    def __init__(self, data: memoryview, long: str) -> None:
        self.data, self.at, self.long = data, 0, long

    def take(self, count: int) -> memoryview:
        if not 0 <= count <= len(self.data) - self.at:
            raise damaged(f"an object claims {count:,} bytes where {len(self.data) - self.at:,} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def integer(self) -> int:
        return self.number("<i")

    def real(self) -> float:
        return self.number("<d")

    def longs(self, count: int) -> tuple[int, ...]:
        return tuple(self.number(self.long) for _ in range(count))

    def characters(self, count: int) -> bytes:
        return bytes(self.take(count))

    def array(self, kind: str, count: int) -> np.ndarray:
        """Numbers of a NumPy type, or "long"."""
        dtype = np.dtype(self.long if kind == "long" else "<" + kind)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


class _Ascii(_Binary):
    """Numbers as text with a space between; characters as they are; a line end behind each group."""

    def __init__(self, data: memoryview) -> None:
        super().__init__(data, "<q")

    def tokens(self, count: int) -> list[bytes]:
        """The next words. Numbers of a group and the line end behind them are taken together, so that what follows may
        be characters."""
        piece = bytes(self.data[self.at : self.at + count * LONGEST_TOKEN])
        found = re.compile(rb"\s{0,2}(?:\S+\s){%d}" % (count - 1) + rb"\S+\n?").match(piece) if count else None
        words = found[0].split() if found else []
        if len(words) != count or any(len(word) >= LONGEST_TOKEN for word in words):
            raise damaged(f"{count:,} numbers are expected where {len(self.data) - self.at:,} bytes are left")
        self.at += found.end() if found else 0
        return words

    def integer(self) -> int:
        return self.longs(1)[0]

    def real(self) -> float:
        return self.reals(1)[0]

    def reals(self, count: int) -> list[float]:
        try:
            return [float(word) for word in self.tokens(count)]
        except ValueError as error:
            raise damaged(f"a number is none ({error})") from error

    def longs(self, count: int) -> tuple[int, ...]:
        words = self.tokens(count)
        if not all(re.fullmatch(rb"[+-]?\d{1,18}", word) for word in words):
            raise damaged("a whole number is none, or too large")
        return tuple(int(word) for word in words)

    def characters(self, count: int) -> bytes:
        content = bytes(self.take(count))
        if count and self.data[self.at : self.at + 1] == b"\n":
            self.at += 1
        return content

    def array(self, kind: str, count: int) -> np.ndarray:
        if kind in ("u1", "i1"):
            return np.frombuffer(self.characters(count), kind)
        if 2 * count - 1 > len(self.data) - self.at:  # a digit and a space each
            raise damaged(f"a storage claims {count:,} numbers where {len(self.data) - self.at:,} bytes are left")
        dtype = np.dtype("i8" if kind == "long" else kind)
        values, wide = np.empty(count, dtype), self.longs if dtype.kind == "i" else self.reals
        for start in range(0, count, BLOCK):
            part = np.array(wide(min(BLOCK, count - start)))
            with np.errstate(over="ignore"):  # what is beyond the type is infinite, as it was for who wrote it
                values[start : start + BLOCK] = part
            if dtype.kind == "i" and not np.array_equal(values[start : start + BLOCK], part):
                raise damaged("a storage holds numbers beyond its type")
        return values


# Objects.


class _Parser:
    """Reads the object graph. Each generator reads one object; the stack of those waiting for a part of theirs is a
    list, so that depth costs no recursion."""

    def __init__(self, source: _Binary) -> None:
        self.source, self.known, self.objects = source, {}, 0
        self.allowance = SHARING * len(source.data)

    def run(self) -> Any:
        waiting: list[Reading] = [self.object()]
        value = None
        while waiting:
            try:
                part = waiting[-1].send(value)
            except StopIteration as finished:
                waiting.pop()
                value = finished.value
                continue
            waiting.append(part)
            value = None
            if len(waiting) > DEEPEST:
                raise CheckpointError("objects too deep in each other; expected a network")
        return value

    def object(self) -> Reading:
        self.objects += 1
        if self.objects > MOST_OBJECTS:
            raise CheckpointError(f"more than {MOST_OBJECTS:,} objects; save the model after model:clearState()")
        kind = self.source.integer()
        if kind == NIL:
            return None
        if kind == NUMBER:
            return self.source.real()
        if kind == BOOLEAN:
            return self.source.integer() == 1
        if kind == STRING:
            return self.text(self.source.integer())
        if kind == FUNCTION:
            self.source.characters(self.source.integer())
            yield self.object()
            return None
        if kind not in (TABLE, OBJECT, OLD_CLOSURE, CLOSURE):
            raise damaged(f"an object of the unknown kind {kind}")
        index = self.source.integer()
        if index in self.known:
            return self.known[index]
        if kind == TABLE:
            return (yield self.table(index))
        if kind == OBJECT:
            return (yield self.instance(index))
        self.known[index] = None
        self.source.characters(self.source.integer())
        yield self.object()
        return None

    def text(self, length: int) -> str:
        return self.source.characters(length).decode("latin-1")

    def table(self, index: int) -> Reading:
        count = self.source.integer()
        table: dict[Any, Any] = {}
        self.known[index] = table
        if not 0 <= count <= len(self.source.data):
            raise damaged(f"a table claims {count:,} entries")
        for _ in range(count):
            key = yield self.object()
            table_key = int(key) if isinstance(key, float) and key.is_integer() else key
            value = yield self.object()
            if isinstance(table_key, (str, int)):
                table[table_key] = value
        return table

    def instance(self, index: int) -> Reading:
        name = self.text(self.source.integer())
        if name.startswith("V "):  # a version, which files have had since classes have
            name = self.text(self.source.integer())
        known = CLASS.fullmatch(name)
        if known and (known[1] or known[2]):
            kind = SCALARS[known[2] or "Float"]  # torch.CudaTensor
            if known[3] == "Storage":
                self.known[index] = self.storage(kind)
                return self.known[index]
            return (yield self.tensor(index))
        if not re.fullmatch(r"[\w.]{1,200}", name):
            raise damaged(f"an object of the class {name[:50]!r}")
        made = self.known[index] = Object(name)
        made.fields = yield self.object()
        if not isinstance(made.fields, dict):
            raise CheckpointError(f"an object of {name} that is no table of fields, which is not read")
        return made

    def storage(self, kind: str) -> Tensor:
        count = self.source.longs(1)[0]
        if not 0 <= count <= len(self.source.data):
            raise damaged(f"a storage claims {count:,} numbers")
        return torch.from_numpy(np.array(self.source.array(kind, count)))

    def tensor(self, index: int) -> Reading:
        axes = self.source.integer()
        if not 0 <= axes <= MOST_AXES:
            raise damaged(f"a tensor of {axes} axes")
        sizes, strides = self.source.longs(axes), self.source.longs(axes)
        first = self.source.longs(1)[0] - 1  # Lua counts from 1
        storage = yield self.object()
        self.known[index] = self.view(storage, first, sizes, strides)
        return self.known[index]

    def view(self, storage: Any, first: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """A tensor on a storage. What it claims has to lie inside, and cannot be more than is there."""
        count = math.prod(sizes) if sizes else 0  # a Torch7 tensor without axes is empty
        if min((*sizes, *strides, 0)) < 0 or math.prod(max(n, 1) for n in sizes) >= 1 << 48:
            raise damaged(f"a tensor of sizes {sizes} and strides {strides}")
        if not count:
            return torch.empty(sizes or (0,))
        if not isinstance(storage, Tensor) or storage.dim() != 1:
            raise damaged(f"a tensor of sizes {sizes} without a storage")
        last = first + sum((size - 1) * stride for size, stride in zip(sizes, strides))
        self.allowance -= count * storage.element_size()
        if first < 0 or last >= len(storage) or count > len(storage) or self.allowance < 0:
            raise damaged(f"a tensor of sizes {sizes} does not fit into its storage of {len(storage):,} numbers")
        return storage.as_strided(sizes, strides, first)


# From the objects to parameters.


def _collect(root: Any, content: Content) -> None:
    """Adds the tensors of a table, or the parameters of a network, by name, and a dict for each network in a table.
    What comes again is not followed again."""
    waiting: list[tuple[dict[str, Any], str, Any, Any, bool]] = [(content, "", "", root, False)]
    seen: set[int] = set()
    while waiting:
        state, parent, key, value, inside = waiting.pop()
        if not isinstance(value, (Tensor, dict, Object)) or id(value) in seen:
            continue
        name = f"{parent}.{key}" if parent else str(key)
        if len(name) > LONGEST_NAME:
            raise CheckpointError(f"a name of more than {LONGEST_NAME:,} characters; expected a network")
        if isinstance(value, Tensor):
            if name and value.numel():
                state[name] = value
            continue
        seen.add(id(value))
        network = isinstance(value, Object)
        if network and name and not inside:
            state[name] = {}
            state, name = state[name], ""
        parts = _parts(value) if isinstance(value, Object) else value
        waiting += [(state, name, k, part, inside or network) for k, part in reversed(parts.items())]


def _parts(module: Object) -> dict[Any, Any]:
    """The parameters of a module, then the modules in it."""
    fields, modules = module.fields, module.fields.get("modules")
    children = [n for n in modules if isinstance(n, int)] if isinstance(modules, dict) else []
    if module.name == "nn.DataParallelTable" and children:  # a copy for each GPU
        first = modules[min(children)]
        return _parts(first) if isinstance(first, Object) and first.name != module.name else {}
    parts = {key: fields[key] for key in PARAMETERS if isinstance(fields.get(key), Tensor)}
    if "weight" in parts:
        parts["weight"] = _with_axes(parts["weight"], fields)
    return parts | {f"modules.{n}": modules[n] for n in sorted(children)}


def _with_axes(weight: Tensor, fields: dict[Any, Any]) -> Tensor:
    """The kernel of a convolution, which older code holds as a matrix, as (out, in, height, width)."""
    numbers = [fields.get(key) for key in ("nOutputPlane", "nInputPlane", "kH", "kW")]
    if weight.dim() != 2 or not all(isinstance(n, float) and 1 <= n < 1 << 31 and n.is_integer() for n in numbers):
        return weight
    sizes = [int(n) for n in numbers]
    return weight.reshape(sizes) if math.prod(sizes) == weight.numel() else weight
