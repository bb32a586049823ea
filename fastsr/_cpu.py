"""Operators on a CPU: recipes as programs for the compiled engine.

A call of any operator is one call of the leaf `fastsr_cpu::run`, which walks a program: convolutions and the few other
steps, as plain structures in a tensor of bytes. The structures here mirror csrc/cpu/conv/conv.h and csrc/cpu/program.h.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64

MAX_SOURCES = 24
WORKSPACE, ABSENT = -1, -2  # slots that are not tensors of the call
FORMS = ("direct", "pointwise", "narrow", "winograd43", "winograd23", "winograd63", "winograd25", "winograd35",
         "winograd42", "winograd32")  # fmt: skip
ACTS = {"none": 0, "relu": 1, "leaky": 2, "prelu": 2}
CONV, COPY, SUMS, GATE, MEAN, SCALE = range(6)  # kinds of steps


class _Struct(ctypes.Structure):
    """A structure of the engine; its fields are listed as in the header, C's rules place them."""


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Map(_Struct):
    """A (N, C, H, W) map with a channel stride of 1; strides in elements."""

    _fields_ = [*_fields(c_int64, "data image row pixel"), *_fields(c_int32, "slot type channels reserved")]


class Shape(_Struct):
    """All that packed weights depend on."""

    _fields_ = [
        *_fields(c_int32, "form bf16_products sources cin cout groups kernel stride padding"),
        *_fields(c_int32, "transposed upsample shuffle tf_order has_pre pre_relu reserved"),
        ("widths", c_int32 * MAX_SOURCES),
    ]


class ConvStep(_Struct):
    """One convolution."""

    _fields_ = [
        ("shape", Shape),
        *_fields(c_int64, "n height width out_height out_width"),
        ("packed", Map),
        ("inputs", Map * MAX_SOURCES),
        ("out", Map),
        *_fields(c_int32, "act post_relu"),
        *_fields(c_float, "gain skip_gain outer_gain"),
        ("skips", c_int32),
        ("skip", Map * 2),
        *_fields(Map, "scale factor term outer partial"),
    ]


class Strided(_Struct):
    """A (N, C, H, W) map with any strides, in elements."""

    _fields_ = [*_fields(c_int64, "data image channel row pixel"), *_fields(c_int32, "slot type")]


class Floats(_Struct):
    """Floats in a row."""

    _fields_ = [("data", c_int64), *_fields(c_int32, "slot reserved")]


class CopyStep(_Struct):
    """to = from, converted to its type."""

    _fields_ = [*_fields(c_int64, "n channels height width"), *_fields(Strided, "source target")]


class SumsStep(_Struct):
    """The nine sums of a stored map."""

    _fields_ = [*_fields(c_int64, "n height width rows"), *_fields(Map, "partial source"), ("out", Floats)]


class GateStep(_Struct):
    """Channel attention from sums."""

    _fields_ = [
        *_fields(c_int64, "n inputs outputs hidden taps pixels"),
        *_fields(Floats, "sums weight bias down_weight down_bias up_weight up_bias out"),
    ]


class MeanStep(_Struct):
    """The mean of every channel."""

    _fields_ = [*_fields(c_int64, "n height width"), ("source", Map), ("out", Floats)]


class ScaleStep(_Struct):
    """A map times a factor for each image and channel."""

    _fields_ = [*_fields(c_int64, "n height width"), ("source", Map), ("scale", Floats), ("out", Map)]
