"""The reader of Torch7's files against damaged ones: it returns a mapping or raises CheckpointError, and its memory
stays within a multiple of the file."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsr.checkpoints import torch7
from fastsr.checkpoints.errors import CheckpointError
from mutations import mutate, mutations
from torch7_files import Function, Thing, View, container, convolution, write

W, B = np.linspace(-1, 1, 18, dtype=np.float32).reshape(2, 1, 3, 3), np.ones(2, np.float32)
FORMS = [{}, {"long": 4}, {"ascii": True}, {"versions": False, "prefix": "torch.Cuda"}]


def _network() -> Thing:
    conv = convolution(W, B)
    network = container("nn.Sequential", conv, container("nn.Concat", Thing("nn.Identity"), conv))
    network.fields["again"] = network
    return network


def _table() -> dict[object, object]:
    half = View(np.arange(6, dtype=np.float16), 2, (2, 2), (2, 1))
    numbers = {"d": np.arange(4.0), "l": np.int64([5, -6]), "b": np.uint8([1, 10]), "h": half}
    return {"n": 1.5, "s": "text\n", "yes": True, "no": None, "f": Function(), 3: numbers, "model": _network()}


FILES = [write(content, **form) for form in FORMS for content in (_network(), _table())]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a.t7"


def tensors(content: dict[str, object]) -> list[torch.Tensor]:
    return [t for v in content.values() for t in (tensors(v) if isinstance(v, dict) else [v])]


def survives(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    try:
        content = torch7.read(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert sum(t.numel() * t.element_size() for t in tensors(content)) <= torch7.SHARING * len(data)
        assert not any(t.double().abs().nansum().isnan() for t in tensors(content))  # every number can be read
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000 + 100 * len(data)


@settings(max_examples=4000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(which=st.integers(0, len(FILES) - 1), steps=mutations)
def test_damaged_files(path, which, steps):
    survives(path, mutate(FILES[which], steps))


def _number(form: str, value: int) -> bytes:
    return value.to_bytes(4 if form == "i" else 8, "little", signed=True)


PARTS = [_number("i", n) for n in (0, 1, 2, 3, 4, 5, 6, 8, -1, 2**31 - 1)] + [_number("q", n) for n in (1, 2, 2**62)]
PARTS += [write("w"), write(2.0), write("weight"), write("modules"), write(W)[4:], write(B)[4:], b"\x03\0\0\0V 1"]
PARTS += [write(Thing("nn.Sequential"))[8:-4], b"\x11\0\0\0torch.FloatTensor", b"\x12\0\0\0torch.FloatStorage"]


@settings(max_examples=4000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(st.sampled_from(PARTS), max_size=30), start=st.sampled_from((3, 4)))
def test_any_objects(path, parts, start):
    survives(path, _number("i", start) + _number("i", 1) + b"".join(parts))
