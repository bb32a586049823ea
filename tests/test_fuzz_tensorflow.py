"""The reader of TensorFlow's checkpoints against damaged files: it returns a mapping or raises CheckpointError, and its
memory stays within a multiple of the file. Most damage is done before the checksums are made, to get past them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsr import checkpoints
from fastsr.checkpoints import tensorflow
from fastsr.checkpoints.errors import CheckpointError
from mutations import mutate, mutations
from tensorflow_files import checkpoint, entries, listed, saved, table, tensor, values
from wire import raw, varint

VARIABLES = {
    "v/weights": np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 1, 3, 2),
    "v/biases": np.ones(2),
    "step": np.array([5, -7], np.int64),
}
FILES = [checkpoint(values(VARIABLES, encoding), per_block) for encoding, per_block in (("packed", 9), ("single", 1))]
VALUES = [value for encoding in ("packed", "single", "content") for value in values(VARIABLES, encoding)]
BLOCK = entries((b"key/%d" % i, value) for i, value in enumerate(values(VARIABLES)))
LISTED, ARRAY = listed("v", (12,), 1), VARIABLES["v/weights"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a.ckpt"


def survives(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    for read in (tensorflow.read, checkpoints.read):
        try:
            content = read(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            assert sum(t.numel() * t.element_size() for t in content.values()) <= 8 * len(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000 + 30 * len(data)  # a byte can be a number of eight


def fuzz(examples: int):
    return settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


@fuzz(1500)
@given(which=st.integers(0, len(FILES) - 1), steps=mutations)
def test_damaged_files(path, which, steps):
    survives(path, mutate(FILES[which], steps))


@fuzz(2000)
@given(which=st.integers(0, len(VALUES) - 1), steps=mutations)
def test_damaged_values(path, which, steps):
    made = [*VALUES]
    made[which] = mutate(made[which], steps)
    first = which // 4 * 4
    survives(path, checkpoint(made[first : first + 4]))


@fuzz(2000)
@given(field=st.sampled_from(("list", "tensor", "extents")), steps=mutations)
def test_damage_within_right_lengths(path, field, steps):
    meta = mutate(LISTED, steps) if field == "list" else LISTED
    data = mutate(tensor(ARRAY), steps) if field == "tensor" else tensor(ARRAY)
    extents = mutate(raw(1, b"\1\2"), steps) if field == "extents" else raw(1, b"")
    survives(path, checkpoint([raw(1, meta), saved("v", 1, data, extents)]))


@fuzz(1500)
@given(in_index=st.booleans(), steps=mutations)
def test_damaged_blocks(path, in_index, steps):
    if in_index:
        survives(path, table([BLOCK], index=[mutate(varint(0) + varint(len(BLOCK)), steps)]))
    else:
        survives(path, table([mutate(BLOCK, steps)]))
