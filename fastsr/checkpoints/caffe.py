"""Caffe's binary models: a NetParameter message, whose layers carry their weights as blobs.

Read are the current layers (field 100) and those of 2014 (field 2), values as floats or doubles, packed or not, and
shapes as a list of dimensions or as the older num, channels, height and width. Layers without blobs are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsr.checkpoints import protobuf
from fastsr.checkpoints.content import Content
from fastsr.checkpoints.errors import CheckpointError, damaged, opened
from fastsr.checkpoints.protobuf import fields, text, varints

DESCRIPTION = "Caffe's binary model (NetParameter)"
ENDINGS = (".caffemodel",)
NETWORKS = ("idn", "memnet_original")
SEEN = "IDN x2 and x4: real files; MemNet: not seen a real file"

WEIGHT_AND_BIAS = ("Convolution", "Deconvolution", "InnerProduct", "Scale")
MOST_AXES = 32  # Caffe's own limit


@dataclass(frozen=True)
class LayerFields:
    """The numbers that the fields of a layer have."""

    name: int
    type: int
    blobs: int
    convolution: int


LAYERS = {100: LayerFields(1, 2, 7, 106), 2: LayerFields(4, 5, 6, 10)}
FIRST = (0x0A, 0x12, 0x1A, 0x20, 0x28, 0x32, 0x38, 0x42, 0xA2)  # the keys of NetParameter's fields
TYPES_OF_2014 = {4: "Convolution", 14: "InnerProduct", 39: "Deconvolution"}


def matches(data: memoryview) -> bool:
    """Whether a file is nothing but the fields of a NetParameter, a layer among them. It has no magic number."""
    if not data or data[0] not in FIRST:
        return False
    try:
        kinds = {(number, wire) for number, wire, _ in fields(data)}  # all of them, to the end
    except CheckpointError:
        return False
    return any((number, protobuf.BYTES) in kinds for number in LAYERS)


def read(path: Path) -> Content:
    """`<layer>.weight`, `<layer>.bias` of layers that have just these, `<layer>.blobs.<n>` of others, float32 or
    float64 as in the file. If one single layer is a transposed convolution, its stride is the hint `scale`.

    Raises CheckpointError.
    """
    content, strides = Content(), []
    with opened(path) as data:
        for number, wire, value in fields(memoryview(data)):
            if wire == protobuf.BYTES and number in LAYERS:
                layer = Layer(value, LAYERS[number])
                for key, tensor in layer.tensors():
                    if key in content:
                        raise damaged(f"there are two of {key!r}")
                    content[key] = tensor
                if layer.type == "Deconvolution":
                    strides.append(layer.stride)
        if not content:
            raise CheckpointError(
                "no layer has weights; expected a trained .caffemodel, not a description of a network"
            )
    if len(strides) == 1 and strides[0] is not None:
        content.hints["scale"] = strides[0]
    return content


class Layer:
    """One layer of a network; `stride` is that of a convolution, None if it has several."""

    def __init__(self, message: memoryview, known: LayerFields) -> None:
        self.name = self.type = ""
        self.blobs: list[memoryview] = []
        self.stride: int | None = 1
        for number, wire, value in fields(message):
            if (number, wire) == (known.name, protobuf.BYTES):
                self.name = text(value)
            elif (number, wire) == (known.type, protobuf.BYTES):
                self.type = text(value)
            elif (number, wire) == (known.type, protobuf.VARINT):
                self.type = TYPES_OF_2014.get(value, "")
            elif (number, wire) == (known.blobs, protobuf.BYTES):
                self.blobs.append(value)
            elif (number, wire) == (known.convolution, protobuf.BYTES):
                self.stride = _stride(value)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The blobs, by name."""
        named = self.type in WEIGHT_AND_BIAS and len(self.blobs) <= 2
        for n, blob in enumerate(self.blobs):
            key = f"{self.name}.{('weight', 'bias')[n]}" if named else f"{self.name}.blobs.{n}"
            try:
                tensor = _tensor(blob)
            except CheckpointError as error:
                raise CheckpointError(f"blob {n} of layer {self.name!r}: {error}") from error
            yield key, tensor.flatten() if key.endswith(".bias") else tensor  # which had four axes in 2014


def _stride(convolution: memoryview) -> int | None:
    """The stride in a ConvolutionParameter: `stride`, one or two of it, or `stride_h` and `stride_w`."""
    strides: set[int] = set()
    for number, wire, value in fields(convolution):
        if number in (6, 13, 14) and wire == protobuf.VARINT:
            strides.add(value)
        elif number == 6 and wire == protobuf.BYTES:
            strides.update(varints(value))
    return None if len(strides) > 1 else next(iter(strides), 1)


def _tensor(blob: memoryview) -> Tensor:
    """The tensor in a BlobProto; one without a shape has no axes."""
    shape: list[int] = []
    old_shape = [0, 0, 0, 0]
    singles, doubles = bytearray(), bytearray()
    for number, wire, value in fields(blob):
        if number == 5 and wire in (protobuf.BYTES, protobuf.I32):
            singles += value
        elif number == 8 and wire in (protobuf.BYTES, protobuf.I64):
            doubles += value
        elif number == 7 and wire == protobuf.BYTES:
            shape = _dimensions(value)
        elif number in (1, 2, 3, 4) and wire == protobuf.VARINT:
            old_shape[number - 1] = value
    shape = old_shape if any(old_shape) else shape
    values, dtype = (doubles, np.dtype("<f8")) if doubles else (singles, np.dtype("<f4"))
    if not values or len(values) != math.prod(shape) * dtype.itemsize:
        raise damaged(f"expected {math.prod(shape)} values for the shape {shape}; got {len(values) / dtype.itemsize:g}")
    return torch.from_numpy(np.frombuffer(values, dtype).astype(dtype.newbyteorder("="), copy=False).reshape(shape))


def _dimensions(message: memoryview) -> list[int]:
    """The sizes in a BlobShape."""
    sizes: list[int] = []
    for number, wire, value in fields(message):
        if number == 1 and wire in (protobuf.VARINT, protobuf.BYTES):
            sizes += [value] if wire == protobuf.VARINT else varints(value)
        if len(sizes) > MOST_AXES:
            raise damaged(f"a shape of more than {MOST_AXES} axes")
    return sizes
