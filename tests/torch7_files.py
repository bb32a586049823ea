"""Writes Torch7's files from the description of its serialisation, for fixtures.

An object is an int for its kind and then: 0 nothing; 1 a double; 2 a length and characters; 3 an index, a count and so
many pairs of objects; 4 an index, a version, a class and the content of the class; 5 an int; 6 bytecode and upvalues;
8 an index before them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

TYPES = {"Byte": "u1", "Char": "i1", "Short": "i2", "Int": "i4", "Long": "i8", "Half": "f2", "Float": "f4",
         "Double": "f8"}  # fmt: skip


class Thing:
    """An object of a class: an `nn` module by its fields."""

    def __init__(self, name: str, **fields: object) -> None:
        self.name, self.fields = name, fields


class Function:
    """A Lua function; `kind` 6, 7 or 8, by the age of Torch."""

    def __init__(self, kind: int = 8) -> None:
        self.kind = kind


class View:
    """A tensor by what the file says of it, right or wrong. An array in `storage` is written once for all its views."""

    def __init__(self, storage: np.ndarray, first: int, sizes: Sequence[int], strides: Sequence[int]) -> None:
        self.storage, self.first, self.sizes, self.strides = storage, first, sizes, strides


class Writer:
    """`data`: the file. long: bytes of a C long, 8 or 4. prefix: of the tensors' classes, "torch." or "torch.Cuda"."""

    def __init__(self, *, ascii: bool = False, long: int = 8, versions: bool = True, prefix: str = "torch.") -> None:
        self.ascii, self.long, self.versions, self.prefix = ascii, long, versions, prefix
        self.data = bytearray()
        self.seen: dict[int, int] = {}
        self.kept: list[object] = []

    def numbers(self, form: str, *values: float) -> None:
        if self.ascii:
            style = {"d": ".17g", "f": ".9g", "e": ".9g"}.get(form, "d")
            texts = [format(v if style != "d" else int(v), style) for v in values]
            self.data += " ".join(texts).encode() + b"\n" if values else b""
        else:
            self.data += struct.pack(f"<{len(values)}{form}", *values)

    def longs(self, *values: int) -> None:
        self.numbers("q" if self.long == 8 else "i", *values)

    def characters(self, text: bytes) -> None:
        self.numbers("i", len(text))
        self.data += text
        if self.ascii and text:
            self.data += b"\n"

    def index(self, value: object) -> bool:
        """Writes the index of an object; whether it is new."""
        new = id(value) not in self.seen
        if new:
            self.seen[id(value)] = len(self.seen) + 1
            self.kept.append(value)
        self.numbers("i", self.seen[id(value)])
        return new

    def header(self, name: str) -> None:
        if self.versions:
            self.characters(b"V 1")
        self.characters(name.encode())

    def write(self, value: object) -> Writer:
        if value is None:
            self.numbers("i", 0)
        elif isinstance(value, bool):
            self.numbers("i", 5)
            self.numbers("i", int(value))
        elif isinstance(value, (int, float)):
            self.numbers("i", 1)
            self.numbers("d", value)
        elif isinstance(value, (str, bytes)):
            self.numbers("i", 2)
            self.characters(value.encode() if isinstance(value, str) else value)
        elif isinstance(value, (dict, list)):
            self.numbers("i", 3)
            if self.index(value):
                pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value, 1))
                self.numbers("i", len(pairs))
                for key, item in pairs:
                    self.write(key).write(item)
        elif isinstance(value, Function):
            self.numbers("i", value.kind)
            if value.kind == 6 or self.index(value):
                self.characters(b"\x1bLJ bytecode\n\0")
                self.write([])
        elif isinstance(value, Thing):
            self.numbers("i", 4)
            if self.index(value):
                self.header(value.name)
                self.write(value.fields)
        elif isinstance(value, View):
            self.view(value)
        else:
            array = np.asarray(value)
            strides = [n // array.itemsize for n in np.ascontiguousarray(array).strides]
            self.view(View(array.reshape(-1), 1, array.shape, strides), value)
        return self

    def view(self, view: View, owner: object = None) -> None:
        kind = next(k for k, code in TYPES.items() if np.dtype(code) == view.storage.dtype)
        kind = "" if self.prefix != "torch." and kind == "Float" else kind  # torch.CudaTensor
        self.numbers("i", 4)
        if not self.index(view if owner is None else owner):
            return
        self.header(f"{self.prefix}{kind}Tensor")
        self.numbers("i", len(view.sizes))
        self.longs(*view.sizes)
        self.longs(*view.strides)
        self.longs(view.first)
        self.numbers("i", 4)
        if not self.index(view.storage):
            return
        self.header(f"{self.prefix}{kind}Storage")
        self.longs(view.storage.size)
        if view.storage.dtype == np.int64:
            self.longs(*view.storage.tolist())
        elif view.storage.dtype.itemsize == 1 or not self.ascii:
            self.data += view.storage.tobytes()
            self.data += b"\n" if self.ascii and view.storage.size else b""
        else:
            self.numbers({"f2": "e", "f4": "f", "f8": "d"}.get(view.storage.dtype.str[1:], "i"), *view.storage.tolist())


def write(value: object, **options: object) -> bytes:
    """A file with one object. options: those of `Writer`."""
    return bytes(Writer(**options).write(value).data)  # type: ignore[arg-type]


def convolution(weight: np.ndarray, bias: np.ndarray, kind: str = "nn.SpatialConvolution") -> Thing:
    """A convolution with the fields around its weights that Torch7 gives it, training state included."""
    empty = np.zeros(0, weight.dtype)
    out, width, height, across = weight.shape
    fields = {"nInputPlane": width, "nOutputPlane": out, "kW": across, "kH": height, "dW": 1, "dH": 1,
              "padW": across // 2, "padH": height // 2, "weight": weight, "bias": bias, "gradWeight": weight + 1,
              "gradBias": bias + 1, "output": empty, "gradInput": empty, "train": False}  # fmt: skip
    return Thing(kind, _type="torch.FloatTensor", **fields)


def container(kind: str, *modules: object) -> Thing:
    """A container of modules."""
    empty = np.zeros(0, np.float32)
    return Thing(kind, modules=list(modules), output=empty, gradInput=empty, train=False, _type="torch.FloatTensor")
