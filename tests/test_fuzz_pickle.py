"""The reader of PyTorch's files against damaged ones: it returns a mapping or raises CheckpointError, and its memory
stays within a multiple of the file."""

from __future__ import annotations

import argparse
import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastsr.checkpoints import pytorch
from fastsr.checkpoints.errors import CheckpointError
from mutations import mutate, mutations
from pytorch_files import call, legacy, make, mapping, name, storage, tarred, tensor, value, whole, zipped

FLOATS = np.arange(12, dtype=np.float32)
SETTINGS = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def _module() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.PReLU())
    module.rgb_range, module.args = 255, argparse.Namespace(scale=2)
    return module


def _saved(content: object, protocol: int, zip: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zip)
    return buffer.getvalue()


STATE = {"epoch": 3, "state_dict": _module().state_dict(), "array": np.arange(4.0), "lr": 1e-4, "done": (True, None)}
TAR = tarred(
    whole(mapping(a=value("21") + b"Q", b=call(name("torch.nn.parameter", "Parameter"), value("22") + b"Q"))),
    [(11, name("torch", "FloatStorage"), 12, FLOATS.tobytes())],
    [(21, 11, (3, 4), (4, 1), 0), (22, 12, (2,), (1,), 1)],
    [(12, 11, 4, 4)],
)
FILES = [
    *(_saved(content, protocol, zip) for content in (_module(), STATE) for protocol in (2, 4) for zip in (True, False)),
    TAR,
]

# Pickles on two storages, which the layouts are put around after they were damaged.
A = tensor(storage("0", 12), 2, (2, 3), (3, 1))
B = call(name("torch._utils", "_rebuild_parameter"), tensor(storage("0", 12), 0, (12,), (1,)), value(True), b"}")
INNER = make(name("b", "M"), mapping(_parameters=mapping(w=B), _buffers=b"}", _modules=b"}", res_scale=value(0.1)))
OUTER = mapping(_parameters=mapping(w=A), _buffers=mapping(s=B), _modules=mapping(m=INNER))
ORDERED = b"\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93)R\x94(\x8c\x01w\x94" + A + b"\x8c\x01v\x94h\x05h\x04B"
PROGRAMS = [
    whole(mapping(a=A, b=B, c=value([1, 2.5, "x", (None,)]), d=mapping(e=A, f=value({"g": 1})))),
    whole(make(name("a", "Net"), OUTER)),
    b"\x80\x04" + ORDERED + b"\x02\0\0\0abu.",
    whole(b"(dp1\nS'w'\np2\n" + A + b"sS'l'\n(lp3\nI5\naL6L\naF1.5\nasg1\n0g1\n"),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a.pth"


def tensors(content: dict[str, object]) -> list[torch.Tensor]:
    parts = [tensors(v) if isinstance(v, dict) else [v] for v in content.values()]
    return [t for part in parts for t in part if isinstance(t, torch.Tensor)]


def survives(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    try:
        content = pytorch.read(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(key, str) for key in content)
        assert sum(t.numel() * t.element_size() for t in tensors(content)) <= pytorch.SHARING * len(data)
        assert sum(t.double().abs().nansum().isnan() for t in tensors(content)) == 0  # every number can be read
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000 + 100 * len(data)


@settings(max_examples=2000, **SETTINGS)
@given(which=st.integers(0, len(FILES) - 1), steps=mutations)
def test_damaged_files(path, which, steps):
    survives(path, mutate(FILES[which], steps))


@settings(max_examples=3500, **SETTINGS)
@given(which=st.integers(0, len(PROGRAMS) - 1), steps=mutations, layout=st.sampled_from((zipped, legacy, tarred)))
def test_damaged_pickles_in_right_layouts(path, which, steps, layout):
    program = mutate(PROGRAMS[which], steps)
    storages = {
        zipped: {"0": FLOATS.tobytes()},
        legacy: [("0", 12, FLOATS.tobytes())],
        tarred: [(0, name("torch", "FloatStorage"), 12, FLOATS.tobytes())],
    }[layout]
    survives(path, layout(program, storages))


OPCODES = (
    [bytes([code]) for code in b"(012N}])tldaesubRoQ.\x81\x85\x86\x87\x88\x8f\x90\x91\x92\x93\x94"]
    + [b"q\0", b"h\0", b"q\1", b"h\1", b"K\1", b"X\1\0\0\0w", b"ios\nsystem\n", A, B, storage("0", 12), value("w")]
    + [name("collections", "OrderedDict"), name("torch._utils", "_rebuild_tensor_v2"), name("torch", "Size")]
    + [value(part) for part in ("_parameters", "_modules", "_buffers", "storage", (3,), (1,), 0, 12, -1, 1 << 62)]
)


@settings(max_examples=3500, **SETTINGS)
@given(parts=st.lists(st.sampled_from(OPCODES), max_size=40), start=st.sampled_from((b"", b"}", A, b"}(", b"](")))
def test_any_instructions(path, parts, start):
    survives(path, zipped(b"\x80\x02" + start + b"".join(parts) + b".", {"0": FLOATS.tobytes()}))
