"""The reader of NumPy's files against damaged ones: it returns a mapping or raises CheckpointError, and its memory
stays within a multiple of the file."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsr.checkpoints import npz
from fastsr.checkpoints.archive import MOST_INFLATION, SMALL
from fastsr.checkpoints.errors import CheckpointError
from mutations import mutate, mutations
from pytorch_files import archive

A, B = np.linspace(-1, 1, 18, dtype=np.float32).reshape(3, 3, 1, 2), np.arange(3.0)
LIST = np.empty(3, object)
LIST[:] = [A, B, A.T]
DICT = np.array({"conv1_1": [A, B], "fc6": [B, {"w": A}]}, object)
SETTINGS = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def saved(write, *args: object, **arrays: object) -> bytes:
    buffer = io.BytesIO()
    write(buffer, *args, **arrays)
    return buffer.getvalue()


ARRAYS = [saved(np.save, part) for part in (A, np.asfortranarray(A[0, 0]), B.astype(">f8"), LIST, DICT)]
FILES = [saved(np.savez, params=LIST), saved(np.savez_compressed, params=LIST, b=B), saved(np.savez, a=A, b=B), *ARRAYS]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a.npz"


def survives(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    try:
        content = npz.read(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert sum(t.numel() * t.element_size() for t in content.values()) <= MOST_INFLATION * len(data) + SMALL
        assert not any(t.double().abs().nansum().isnan() for t in content.values())  # every number can be read
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * SMALL + 100 * len(data)


@settings(max_examples=3000, **SETTINGS)
@given(which=st.integers(0, len(FILES) - 1), steps=mutations)
def test_damaged_files(path, which, steps):
    survives(path, mutate(FILES[which], steps))


@settings(max_examples=4000, **SETTINGS)
@given(which=st.integers(0, len(ARRAYS) - 1), steps=mutations, packed=st.booleans())
def test_damaged_arrays_in_right_archives(path, which, steps, packed):
    data = mutate(ARRAYS[which], steps)
    survives(path, archive({"a.npy": data}, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED))
