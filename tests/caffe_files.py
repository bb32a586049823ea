"""Writes Caffe's binary models from the description of NetParameter, for fixtures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wire import fixed, number, raw, varint

ENCODINGS = ("packed", "single", "double", "double single")


def blob(array: np.ndarray, encoding: str = "packed", old_shape: bool = False) -> bytes:
    """A BlobProto. encoding: floats or doubles, packed or each a field. old_shape: num, channels, height, width."""
    array = np.asarray(array)
    doubles = encoding.startswith("double")
    values = array.astype("<f8" if doubles else "<f4").ravel()
    field = 8 if doubles else 5
    if encoding.endswith("single"):
        data = b"".join(fixed(field, value.tobytes()) for value in values)
    else:
        data = raw(field, values.tobytes())
    if old_shape:
        sizes = (1,) * (4 - array.ndim) + array.shape
        return b"".join(number(i, size) for i, size in enumerate(sizes, 1)) + data
    shape = raw(7, raw(1, b"".join(map(varint, array.shape)))) if array.ndim else b""  # Caffe leaves out an empty one
    return data + shape


def layer(name: str, kind: str, blobs: Sequence[bytes] = (), convolution: bytes = b"") -> bytes:
    """A current layer with everything around its blobs that Caffe writes."""
    made = raw(1, name.encode()) + raw(2, kind.encode()) + raw(3, b"below") + raw(4, b"above")
    made += b"".join(raw(6, fixed(3, np.float32(0.1).tobytes())) for _ in blobs)  # a ParamSpec with its lr_mult
    made += b"".join(raw(7, data) for data in blobs) + number(10, 0)
    return raw(100, made + (raw(106, convolution) if convolution else b""))


def old_layer(name: str, kind: int, blobs: Sequence[bytes] = (), convolution: bytes = b"") -> bytes:
    """A layer of 2014, whose kind is a number: 4 convolution, 39 transposed convolution, 18 ReLU."""
    made = raw(2, b"below") + raw(3, b"above") + raw(4, name.encode()) + number(5, kind)
    made += b"".join(raw(6, data) for data in blobs) + (raw(10, convolution) if convolution else b"")
    return raw(2, made)


def net(*layers: bytes, name: str = "a net") -> bytes:
    """A NetParameter."""
    return raw(1, name.encode()) + b"".join(layers)


def convolution(stride: bytes) -> bytes:
    """A ConvolutionParameter whose fields around the stride are those of IDN's last layer."""
    filler = raw(7, raw(1, b"msra") + number(8, 2))
    return number(1, 1) + number(3, 8) + number(4, 17) + stride + filler


def idn(state: dict[str, np.ndarray], scale: int) -> bytes:
    """IDN as its authors' training leaves it: weights of every convolution, and layers that have none."""
    layers = [layer("data", "HDF5Data"), layer("data_data_0_split", "Split")]
    names = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    for name in names:
        kind, stride = ("Deconvolution", scale) if name == "upsample" else ("Convolution", 1)
        blobs = [blob(state[f"{name}.{part}"]) for part in ("weight", "bias")]
        layers += [layer(name, kind, blobs, convolution(number(6, stride))), layer(f"relu_{name}", "ReLU")]
    return net(*layers, layer("bicubic", "Python"), layer("loss", "EuclideanLoss"), name="DPFN")
