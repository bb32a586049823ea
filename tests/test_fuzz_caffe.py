"""The reader of Caffe's models against damaged files: it returns a mapping or raises CheckpointError, and its memory
stays within a multiple of the file."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caffe_files import ENCODINGS, blob, convolution, layer, net, old_layer
from fastsr import checkpoints
from fastsr.checkpoints import caffe
from fastsr.checkpoints.errors import CheckpointError
from mutations import mutate, mutations
from wire import number, raw

A, B = np.linspace(-1, 1, 18, dtype=np.float32).reshape(2, 1, 3, 3), np.ones(2, np.float32)
LAYERS = [
    layer("conv1", "Convolution", [blob(A), blob(B)], convolution(number(6, 1))),
    layer("bn", "BatchNorm", [blob(B), blob(B), blob(B[:1])]),
    layer("relu", "ReLU"),
    layer("up", "Deconvolution", [blob(A, "double"), blob(B, "double")], convolution(raw(6, b"\2"))),
]
OLD = [old_layer("c", 4, [blob(A, e, old_shape=True) for e in ENCODINGS[:2]]), old_layer("u", 39, [blob(A)])]
FILES = [net(*LAYERS), net(*OLD), net(*LAYERS, *OLD)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a.caffemodel"


def survives(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    for read in (caffe.read, checkpoints.read):
        try:
            content = read(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            assert sum(t.numel() * t.element_size() for t in content.values()) <= len(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000 + 8 * len(data)


@settings(max_examples=4000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(which=st.integers(0, len(FILES) - 1), steps=mutations)
def test_damaged_files(path, which, steps):
    survives(path, mutate(FILES[which], steps))


@settings(max_examples=3000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    parts=st.lists(st.tuples(st.sampled_from((1, 2, 4, 5, 7, 8)), mutations), min_size=1, max_size=3), old=st.booleans()
)
def test_damage_within_right_lengths(path, parts, old):
    """Inside a layer, a shape, values or parameters, with the lengths of all that is around them right."""
    blobs = []
    layers = b""
    for field, steps in parts:
        inner = {1: b"conv", 2: b"Deconvolution", 4: b"conv", 5: B.tobytes(), 7: raw(1, b"\2"), 8: B.tobytes()}[field]
        damaged = raw(field, mutate(inner, steps))
        if field in (5, 7, 8):
            blobs.append(damaged + (raw(7, raw(1, b"\2")) if field != 7 else raw(5, B.tobytes())))
        elif field == 4:
            blobs.append(mutate(blob(A, "single", old_shape=True), steps))
        else:
            layers += old_layer("u", 39, [blob(B)], mutate(convolution(number(6, 2)), steps))
            layers += raw(100, damaged + raw(7, blob(B)))
    layers += old_layer("o", 4, blobs) if old else layer("n", "Convolution", blobs)
    survives(path, net(layers))
