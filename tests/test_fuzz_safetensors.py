"""Safetensors files, damaged: the reader returns a mapping or raises CheckpointError, and a normal form whose metadata
was tampered with loads as what its tensors are or is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastsr
from fastsr import checkpoints
from fastsr.checkpoints import safetensors
from fastsr.checkpoints.errors import CheckpointError
from mutations import mutate, mutations

QUIET = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "U16", "U32",
          "U64", "F8_E8M0", "F4", "F6_E2M3", "C64", "X9", "")  # fmt: skip
SMALL = {"channels": 1, "features": 4, "blocks": 1, "block_widths": (2, 2, 4, 2, 2, 5), "slice": 1, "groups": 1,
         "upsample_kernel": 3, "scale": 2}  # fmt: skip


def written(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None) -> bytes:
    """A file, from the format's description: the length of a JSON header, the header, the tensors' bytes."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def normal_form() -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]]:
    torch.manual_seed(0)
    state = fastsr.create("idn", **SMALL).state_dict()
    tensors = {k: ("F32", list(v.shape), v.numpy().tobytes()) for k, v in state.items()}
    config = fastsr.create("idn", **SMALL).config
    fields = {f: getattr(config, f) for f in ("leaky_slope", *SMALL)}
    return tensors, {"fastsr_version": "0.1.0", "network": "idn", "variant": "caffe", "config": json.dumps(fields),
                     "source_sha256": "0" * 64}  # fmt: skip


A = np.linspace(-1, 1, 6, dtype="<f4").tobytes()
TENSORS, METADATA = normal_form()
FILES = [
    written({"a.weight": ("F32", [2, 3], A), "a.bias": ("F16", [2], A[:4]), "n": ("I64", [], A[:8])}),
    written({"a": ("F32", [6], A)}, METADATA),
    written(TENSORS, METADATA),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a.safetensors"


def survives(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    for read in (safetensors.read, checkpoints.read):
        try:
            content = read(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            assert sum(t.numel() * t.element_size() for t in content.values()) <= len(data)


def loads_or_refuses(path: Path, data: bytes) -> None:
    """`load` with anything but the tensors right."""
    path.write_bytes(data)
    try:
        model = fastsr.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert model.name == "idn" and (model.config.scale is None or model.config.scale >= 1)


def test_the_files_are_good(path):
    for data in FILES:
        path.write_bytes(data)
        assert len(safetensors.read(path)) == data.count(b'"dtype"')
    assert fastsr.load(path).scales == (2,)


@settings(max_examples=2000, **QUIET)
@given(which=st.integers(0, len(FILES) - 1), steps=mutations)
def test_damaged_files(path, which, steps):
    survives(path, mutate(FILES[which], steps))


@settings(max_examples=1000, **QUIET)
@given(steps=mutations, which=st.integers(0, len(FILES) - 1))
def test_damaged_headers_of_the_right_length(path, steps, which):
    (length,) = struct.unpack("<Q", FILES[which][:8])
    header = mutate(FILES[which][8 : 8 + length], steps)
    survives(path, struct.pack("<Q", len(header)) + header + FILES[which][8 + length :])


@settings(max_examples=500, **QUIET)
@given(dtype=st.sampled_from(DTYPES), shape=st.lists(st.sampled_from((0, 1, 2, 3, 6, 2**31, 2**62)), max_size=9))
def test_kinds_and_shapes(path, dtype, shape):
    survives(path, written({"a": (dtype, shape, A)}))
    survives(path, written({"a": (dtype, shape, b"")}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=500, **QUIET)
@given(field=st.sampled_from(("scale", "features", "leaky_slope", "block_widths", "x", "")), value=json_values)
def test_tampered_configurations(path, field, value):
    config = json.loads(METADATA["config"]) | {field: value}
    loads_or_refuses(path, written(TENSORS, METADATA | {"config": json.dumps(config)}))


@settings(max_examples=500, **QUIET)
@given(key=st.sampled_from(sorted(METADATA)), steps=mutations)
def test_tampered_metadata(path, key, steps):
    said = mutate(METADATA[key].encode(), steps).decode("utf-8", "replace")
    loads_or_refuses(path, written(TENSORS, METADATA | {key: said}))
