"""TensorFlow's checkpoints of version 1: every encoding, the authors' file against the authors' outputs, damage."""

from __future__ import annotations

import shutil
import tracemalloc

import numpy as np
import pytest
import torch

import fastsr
from conftest import parity_case, relative_error
from fastsr import checkpoints
from fastsr.checkpoints import tensorflow
from fastsr.checkpoints.crc32c import CHUNK, crc32c
from fastsr.checkpoints.errors import CheckpointError
from fastsr.cli import main
from tensorflow_files import checkpoint, entries, listed, saved, table, tensor, values
from tensorflow_files import crc32c as bytewise
from test_models import outputs
from wire import number, raw, varint

RANDOM = np.random.default_rng(0)
VARIABLES = {
    "a/weights": RANDOM.standard_normal((3, 3, 2, 4)).astype(np.float32),
    "a/weights/Adam": RANDOM.standard_normal((3, 3, 2, 4)).astype(np.float32),
    "b": RANDOM.standard_normal(5),
    "beta1_power": np.array(0.9, np.float32),
    "counts": np.array([[-1, 2**31 - 1], [-(2**31), 300]], np.int32),
    "global_step": np.array(-(2**63) + 7, np.int64),
}


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file and returns its path."""

    def write(data: bytes, name: str = "a.ckpt"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


# The checksum.


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"123456789", 0xE3069283), (b"", 0),
        (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43),  # these four are in RFC 3720
        (bytes(range(32)), 0x46DD794E), (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)  # fmt: skip
def test_published_checksums(data, expected):
    assert crc32c(memoryview(data)) == expected


@pytest.mark.parametrize("size", (1, 2, 3, 5, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 777))
def test_checksums_of_any_length(size):
    data = RANDOM.bytes(size)
    assert crc32c(memoryview(data)) == bytewise(data)


# The format.


@pytest.mark.parametrize("encoding", ("packed", "single", "content"))
@pytest.mark.parametrize(("per_block", "every"), ((1, 16), (4, 1), (3, 2), (99, 16)))
def test_every_encoding(file, encoding, per_block, every):
    content = tensorflow.read(file(checkpoint(values(VARIABLES, encoding), per_block, every)))
    assert list(content) == list(VARIABLES)
    for name, array in VARIABLES.items():
        assert str(content[name].dtype) == f"torch.{array.dtype}"
        assert np.array_equal(content[name].numpy(), array) and content[name].shape == array.shape


def test_the_list_may_come_last_and_in_parts(file):
    _, *others = values(VARIABLES)
    parts = [raw(1, listed(n, v.shape, {"float32": 1, "float64": 2, "int32": 3, "int64": 9}[str(v.dtype)]))
             for n, v in VARIABLES.items()]  # fmt: skip
    content = tensorflow.read(file(table([entries((bytes([i]), v) for i, v in enumerate(others + parts))])))
    assert content.keys() == VARIABLES.keys()


# EnhanceNet.


def test_enhancenet_of_its_authors(shared):
    case = parity_case("enhancenet_x4")
    model = fastsr.load(shared / "weights" / "enhancenet_pat_x4.ckpt")
    assert model.config == fastsr.create("enhancenet", **case.about["build"]).config
    assert model.parameter_count == case.about["parameters"]
    with torch.inference_mode():
        made = outputs(case, model, torch.float32)
    for name, value in made.items():
        assert relative_error(value, case.tensors[name]) <= 1e-5, name
    made["output_uint8"] = ((made["output"] * 255).clamp(0, 255) + 0.5).floor()  # how the reference rounds
    assert torch.equal(made["output_uint8"], case.tensors["output_uint8"])
    assert made.keys() == case.tensors.keys() - {"input"}


def test_info_of_enhancenet(shared, capsys):
    assert main(["info", str(shared / "weights" / "enhancenet_pat_x4.ckpt")]) == 0
    said = capsys.readouterr().out
    assert "EnhanceNet(scale=4, blocks=10," in said and "852,867 parameters" in said and "colour: rgb" in said


def test_the_content_tells_whatever_the_name(shared, tmp_path):
    for name in ("weights", "model.pth", "model.caffemodel"):  # the authors' file is named `weights`
        shutil.copy(shared / "weights" / "enhancenet_pat_x4.ckpt", tmp_path / name)
        assert type(fastsr.load(tmp_path / name)).__name__ == "EnhanceNet"


def as_variables(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """TensorFlow's names and layout of an EnhanceNet's weights."""
    variables = {}
    for key, value in state.items():
        layer, kind = key.split(".")
        weights = kind == "weight"
        array = np.ascontiguousarray(np.moveaxis(value.numpy(), (2, 3), (0, 1)).swapaxes(2, 3)) if weights else value
        variables[f"generator/{layer}/{'weights' if weights else 'biases'}"] = np.asarray(array)
    return variables


def test_enhancenet_written_anew_with_all_that_training_keeps(file):
    case = parity_case("enhancenet_synthetic_x4")
    variables = as_variables(case.state_dict())
    slots = {f"{name}/{slot}": v for name, v in variables.items() for slot in ("Adam", "Adam_1") if "Conv_2" in name}
    extra = {"beta1_power": np.array(0.9, np.float32), "global_step": np.array(3), "discriminator/w": np.ones(2)}
    model = fastsr.load(file(checkpoint(values(variables | slots | extra))))
    with torch.inference_mode():
        assert relative_error(model(case.tensors["input"]), case.tensors["output"]) <= 1e-5


def test_enhancenet_files_that_do_not_fit(file):
    variables = as_variables(fastsr.create("enhancenet", blocks=2, features=4).state_dict())
    assert fastsr.load(file(checkpoint(values(variables)))).config.blocks == 2
    for change, message in (
        ({"generator/Conv_3/biases": np.zeros(5, np.float32)}, r"wrong shapes: Conv_3\.bias \[5\] instead of \[4\]"),
        ({"generator/other": np.zeros(5, np.float32)}, r"unexpected keys: .*other"),
    ):
        with pytest.raises(fastsr.LoadError, match=r"looks like enhancenet \(tensorflow checkpoint\).*" + message):
            fastsr.load(file(checkpoint(values(variables | change))))
    del variables["generator/Conv_4/biases"]
    with pytest.raises(fastsr.LoadError, match=r"missing keys: Conv_4\.bias"):
        fastsr.load(file(checkpoint(values(variables))))


# Damage.

ONE = {"v": np.arange(4, dtype=np.float32)}
SOUND = checkpoint(values(ONE))


def changed(meta: bytes | None = None, *others: bytes) -> bytes:
    """The checkpoint of one variable with another list, or with other entries after the list."""
    first, second = values(ONE)
    return checkpoint([first if meta is None else raw(1, meta), *(others or (second,))])


def handle(offset: int, size: int) -> bytes:
    return varint(offset) + varint(size)


BLOCK = entries((bytes([i]), v) for i, v in enumerate(values(ONE)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (SOUND[:-1], "the magic number of a TensorFlow table is missing"),
        (SOUND[-48:], r"a block of \d+ bytes at \d+ goes beyond"),
        (SOUND[:20] + b"x" + SOUND[21:], "the checksum of the block at 0 is wrong"),
        (table([BLOCK], compression=1), "compressed with snappy, which is not read; save it uncompressed"),
        (table([BLOCK], compression=7), "compressed in the unknown way 7"),
        (table([BLOCK, BLOCK]), "the variable 'v' is there twice"),
        (table([BLOCK], index=[handle(0, len(BLOCK))] * 2), "blocks overlap"),
        (table([entries([])], index=[handle(0, 8)] * 2), "blocks overlap"),
        (table([BLOCK], index=[handle(0, 2**60)]), "a block of 1152921504606846976 bytes at 0 goes beyond"),
        (table([BLOCK], index=[handle(2**63, 8)]), "at 9223372036854775808 goes beyond"),
        (table([BLOCK], index=[b"\x80"]), "a number runs past the end"),
        (table([b""]), "a block of 0 bytes claims 0 restarts"),
        (table([b"\0\0\0\x40"]), "a block of 4 bytes claims 1073741824 restarts"),
        (table([b"\5\1\0k" + bytes(4) + b"\1\0\0\0"]), "an entry goes beyond its block"),
        (table([b"\0\1\x7fk" + bytes(4) + b"\1\0\0\0"]), "an entry goes beyond its block"),
        (table([entries([(b"", number(1, 1) + raw(3, number(1, 1)))])]), "index of a checkpoint of version 2"),
        (table([]), "the checkpoint holds no variables"),
        (changed(listed("v", (4,), 1) + listed("w", (), 1)), "the variable 'w' is listed but not there"),
        (changed(b""), "the variable 'v' is there but not listed"),
        (changed(listed("v", (4,), 1) * 2), "the variable 'v' is there twice"),
        (changed(listed("v", (4,), 7)), "variable 'v': its type, number 7 of TensorFlow's, is not read"),
        (changed(listed("v", (5,), 1)), r"variable 'v': expected 5 values for the shape \(5,\); got 4"),
        (changed(listed("v", (4,), 2)), r"expected 4 values for the shape \(4,\); got 0"),
        (changed(listed("v", (0,), 1), saved("v", 1, b"")), r"expected 0 values for the shape \(0,\)"),
        (changed(listed("v", (2**40, 2**40), 1)), "expected 1208925819614629174706176 values"),
        (changed(listed("v", (1,) * 40, 1)), "a shape of more than 32 axes"),
        (changed(None, saved("v", 1, tensor(ONE["v"]), raw(1, number(1, 2) + number(2, 2)))), "'v' is stored in parts"),
        (changed(None, saved("v", 1, raw(5, bytes(15)))), r"got 3\.75"),
        (changed(None, b"\xff"), "a number runs past the end"),
    ],
)  # fmt: skip
def test_damage_is_named(file, data, message):
    with pytest.raises(CheckpointError, match=r"load: .*a\.ckpt: .*" + message):
        fastsr.load(file(data))


def test_what_is_claimed_is_not_allocated(file):
    for data in (
        changed(listed("v", (2**16, 2**20), 1)),
        changed(listed("v", (2**36,), 9), saved("v", 1, raw(10, b""))),
    ):
        path = file(data)
        tracemalloc.start()
        with pytest.raises(CheckpointError, match="variable 'v': expected 68719476736 values"):
            checkpoints.read(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 200_000
