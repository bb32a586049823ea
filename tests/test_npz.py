"""The reader of NumPy's files: SRFeat's lists of arrays as TensorLayer saves them, and hostile files."""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
import torch

import fastsr
from conftest import parity_case, relative_error
from fastsr.checkpoints import npz
from fastsr.checkpoints.errors import CheckpointError
from pytorch_files import archive, call, mapping, name, value, whole


@pytest.fixture
def read(tmp_path):
    """Reads the bytes of a file."""

    def reader(data: bytes) -> dict[str, torch.Tensor]:
        (tmp_path / "model.npz").write_bytes(data)
        return npz.read(tmp_path / "model.npz")

    return reader


def listed(arrays: list[np.ndarray]) -> np.ndarray:
    """The array of objects that NumPy makes of a list of arrays."""
    made = np.empty(len(arrays), object)
    made[:] = arrays
    return made


def saved(compressed: bool = False, **arrays: object) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def npy(header: str, body: bytes, version: int = 1) -> bytes:
    """A `.npy` file by hand."""
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + body


def header(descr: str = "<f4", order: bool = False, shape: object = (2,)) -> str:
    return f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n"


BODY = np.float32([1, 2]).tobytes()
FLOAT = name("numpy", "dtype") + value("f4") + value(False) + value(True) + b"\x87R" + value((3, "<")) + b"b"
OBJECT = name("numpy", "dtype") + value("O8") + value(False) + value(True) + b"\x87R" + value((3, "|")) + b"b"
SHELL = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), value((0,)), value(b"b"))


def floats(sizes: object, content: bytes, kind: bytes = FLOAT) -> bytes:
    """A pickled array by its parts."""
    return SHELL + b"(" + value(1) + value(sizes) + kind + b"\x89" + content + b"tb"


def objects(sizes: object, content: bytes) -> bytes:
    """A pickle of an array of objects."""
    return whole(floats(sizes, content, OBJECT))


# The networks.


def to_tensorflow(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.numpy()
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array


def own_key(theirs: str) -> str:
    """The key of a variable, from its name in the authors' graph."""
    part = {"W_conv2d": "weight", "b_conv2d": "bias", "beta": "bias", "gamma": "weight",
            "moving_mean": "running_mean", "moving_variance": "running_var"}[theirs.rpartition("/")[2]]  # fmt: skip
    for pattern, own in ((r"n64s1/c/", "conv_in"), (r"n64s1/c([12])/(\d+)/", r"blocks.\2.conv\1"),
                         (r"n64s1/b([12])/(\d+)/", r"blocks.\2.bn\1"), (r"n64s1/c3/(\d+)/", r"skips.\1"),
                         (r"n256s1/(\d)/", r"up\1"), (r"out/", "conv_out")):  # fmt: skip
        if match := re.match(pattern, theirs):
            return match.expand(own) + "." + part
    raise AssertionError(theirs)


@pytest.mark.parametrize("compressed", [False, True])
def test_generator_in_the_order_of_the_authors(tmp_path, compressed):
    case = parity_case("srfeat_x4")
    state, arrays = case.state_dict(), []
    for theirs, shape in case.about["build"]["original_order"]:
        arrays.append(to_tensorflow(state[own_key(theirs)]))
        assert list(arrays[-1].shape) == shape
    path = tmp_path / "SRFeat_full"  # no ending: the content tells
    path.write_bytes(saved(compressed, params=listed(arrays)))
    model = fastsr.load(path)
    assert model.name == "srfeat" and model.config == fastsr.load(state).config
    with torch.inference_mode():
        assert relative_error(model(case.tensors["input"]), case.tensors["output"]) < 1e-4


@pytest.mark.parametrize("config", [{"scale": 2, "blocks": 1}, {"scale": 8, "blocks": 4, "channels": 1, "kernel": 5}])
def test_generators_of_other_sizes(tmp_path, config):
    model = fastsr.create("srfeat", features=4, **config)
    own = model.state_dict()
    keys = ["conv_in.weight", "conv_in.bias"]
    for i in range(config["blocks"]):
        for n in (1, 2):
            parts = ("bias", "weight", "running_mean", "running_var")
            keys += [f"blocks.{i}.conv{n}.weight", *(f"blocks.{i}.bn{n}.{part}" for part in parts)]
    keys += [k for k in own if k.startswith("skips")] + [k for k in own if k.startswith("up")]
    keys += ["conv_out.weight", "conv_out.bias"]
    (tmp_path / "a.npz").write_bytes(saved(params=listed([to_tensorflow(own[k]) for k in keys])))
    loaded = fastsr.load(tmp_path / "a.npz")
    assert loaded.config == model.config
    assert all(torch.equal(v, own[k]) for k, v in loaded.state_dict().items())


def test_discriminator(tmp_path):
    """A chain of layers, whose state dict in the stored case is in the order of the graph."""
    case = parity_case("srfeat_disc_image")
    arrays = [to_tensorflow(tensor) for tensor in case.state_dict().values()]
    (tmp_path / "d_SRFeat.npz").write_bytes(saved(params=listed(arrays)))
    model = fastsr.load(tmp_path / "d_SRFeat.npz")
    assert model.name == "srfeat_discriminator"
    with torch.inference_mode():
        assert relative_error(model(case.tensors["input"]), case.tensors["output"]) < 1e-4


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_vgg_from_a_pickled_dict(tmp_path, protocol):
    model = fastsr.create("srfeat_vgg19", widths=(4, 5), depths=(2, 1))
    layers: dict[str, list[np.ndarray]] = {"fc6": [np.ones((3, 2), np.float32), np.ones(2, np.float32)]}
    for key, tensor in model.state_dict().items():
        layers.setdefault(key.partition(".")[0], []).append(to_tensorflow(tensor))
    body = pickle.dumps(np.array(layers, object), protocol)
    (tmp_path / "vgg19.npy").write_bytes(npy(header("|O", shape=()), body))
    loaded = fastsr.load(tmp_path / "vgg19.npy")
    assert loaded.config == model.config
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_lists_that_are_no_network_are_refused(tmp_path):
    state = parity_case("srfeat_x4").state_dict()
    arrays = [to_tensorflow(tensor) for tensor in state.values()]  # in the order of the figure, not TensorLayer's
    (tmp_path / "a.npz").write_bytes(saved(params=listed(arrays)))
    with pytest.raises(fastsr.LoadError, match=r"a\.npz is none of the networks known here.*params\.0"):
        fastsr.load(tmp_path / "a.npz")


# The files.


def test_arrays_of_numbers(read):
    arrays = {
        "a": np.arange(6.0).reshape(2, 3), "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(4, dtype=">f4"), "half": np.float16([0.5]), "int": np.arange(3), "byte": np.uint8([200]),
        "bool": np.array([True, False]), "scalar": np.float32(2.5), "empty": np.zeros((0, 3)),
    }  # fmt: skip
    for compressed in (False, True):
        found = read(saved(compressed, **arrays))
        assert list(found) == list(arrays)
        for key, array in arrays.items():
            assert np.array_equal(found[key].numpy(), array) and found[key].shape == array.shape
            assert (
                found[key].dtype == torch.from_numpy(np.atleast_1d(array).astype(array.dtype.newbyteorder("="))).dtype
            )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made, made.open("a.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, arrays["a"], version=(2, 0))
    assert np.array_equal(read(buffer.getvalue())["a"].numpy(), arrays["a"])


def test_lists_and_dicts(read):
    one, two = np.float32([1, 2]), np.float64([[3.0]])
    nested = listed([one, [two, {"w": one.copy(), 3: two.copy()}], "text", None, 5])
    found = read(saved(params=nested, other=np.int32([7])))
    assert list(found) == ["params.0", "params.1.0", "params.1.1.w", "params.1.1.3", "other"]
    assert torch.equal(found["params.1.1.w"], torch.tensor([1.0, 2.0])) and found["params.1.0"].dtype == torch.float64
    shared = read(saved(params=listed([one, one])))
    assert torch.equal(shared["params.0"], shared["params.1"])


def test_texts_and_dates_beside_numbers_are_passed_over(read):
    beside = {
        "names": np.array(["conv", "bias"]),
        "when": np.datetime64("2018-01-01", "D"),
        "long": np.array("x" * 2000),
    }
    held = listed([np.float32([1, 2]), np.array(["a"]), np.array([b"a"]), np.zeros(2, "M8[s]")])
    assert list(read(saved(params=held, steps=np.uint32([7, 2**32 - 1]), **beside))) == ["params.0", "steps"]
    assert read(saved(a=np.uint64([2**64 - 1]), c=np.complex64([1j])))["a"].tolist() == [2**64 - 1]


def test_members_that_multiply_what_they_share(read):
    """Many entries of the directory for the same bytes, and many members of many names each."""
    data = archive({"a.npy": npy(header(), BODY), "b.npy": npy(header(), BODY)})
    first, second = (m.start() for m in re.finditer(b"PK\1\2", data))
    with pytest.raises(CheckpointError, match="members of the archive overlap"):
        read(data[: second + 42] + data[first + 42 : first + 46] + data[second + 46 :])
    array = floats((2,), value(BODY)) + b"q\1"
    program = whole(objects((30_001,), b"](" + array + b"h\1" * 30_000 + b"e")[2:-1])
    members = {f"{n}.npy": npy(header("|O", shape=(30_001,)), program) for n in range(4)}
    with pytest.raises(CheckpointError, match="more than 100,000 arrays"):
        read(archive(members))
    long = {"x" * 9000: {"y" * 100: BODY}}
    with pytest.raises(CheckpointError, match="name of more than 1,000 characters"):
        read(saved(params=np.array(long, object)))


def test_arrays_pickled_by_python_2(read):
    """Bytes are strings there, sizes may be long, and the header says so too."""
    end = b"NNNJ" + b"\xff" * 4 + b"J" + b"\xff" * 4
    numbers = name("numpy", "dtype") + value("f4") + value(0) + value(1) + b"\x87R(K\x03U\x01<" + end + b"K\0tb"
    things = name("numpy", "dtype") + value("O8") + value(0) + value(1) + b"\x87R(K\x03U\x01|" + end + b"K?tb"
    shell = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), value((0,)), b"U\x01b")
    array = shell + b"(K\x01(\x8a\x01\x02t" + numbers + b"\x89U\x08" + np.float32([1.5, 2.5]).tobytes() + b"tb"
    outer = shell + b"(K\x01K\x01\x85" + things + b"\x89](" + array + b"etb"
    assert pickle.loads(whole(outer), encoding="latin1")[0].tolist() == [1.5, 2.5]
    found = read(archive({"params.npy": npy(header("|O", shape="(1L,)"), whole(outer))}))
    assert found["params.0"].tolist() == [1.5, 2.5]


def test_nothing_of_a_pickle_runs(tmp_path, read):
    marker = tmp_path / "marker"
    evil = call(name("pathlib", "Path.touch"), call(name("pathlib", "Path"), value(str(marker))))
    system = call(name("os", "system"), value(f"touch {marker}"))
    pickle.loads(b"\x80\x04" + call(name("os", "system"), value(f"touch {marker}")) + b".")
    assert marker.exists()
    marker.unlink()
    inside = objects((2,), b"](" + floats((2,), value(BODY)) + evil + b"e")
    for body in (whole(evil), whole(system), whole(mapping(a=system)), inside):
        data = archive({"params.npy": npy(header("|O", shape=(2,)), body)})
        try:
            assert list(read(data)) == ["params.0"] and body == inside
        except CheckpointError as error:
            assert "model.npz: " in str(error) and body != inside
    assert not marker.exists()
    with pytest.raises(CheckpointError, match=r"wants to call os\.system"):
        read(archive({"params.npy": npy(header("|O", shape=(2,)), whole(system))}))


WRONG = {
    "too few numbers": (npy(header(shape=(3,)), BODY), "has 8 bytes"),
    "too many numbers": (npy(header(shape=(1,)), BODY), "has 8 bytes"),
    "absurd sizes": (npy(header(shape=(2**62, 2**62)), BODY), "expected sizes from 0|claims the shape"),
    "overflowing sizes": (npy(header(shape=(2**40, 2**40)), BODY), "claims the sizes"),
    "a long number": (npy(header(shape="(" + "9" * 5000 + ",)"), BODY), "claims the shape"),
    "a nested shape": (npy(header(shape="((((2,))))"), BODY), "unusual kind"),
    "a record": (npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }", BODY), "unusual kind"),
    "a text": (npy(header("<U2"), BODY), "no named array"),
    "a date": (npy(header("<M8[ns]"), BODY), "no named array"),
    "an unknown size": (npy(header("<f3"), BODY), "type 'f3'"),
    "code": (npy("__import__('os').system('x')", BODY), "unusual kind"),
    "no header": (b"\x93NUMPY\x01\0\xff\xff" + BODY, "claims a header of 65,535 bytes"),
    "a header of 2^31": (b"\x93NUMPY\x02\0\xff\xff\xff\x7f" + BODY, "claims a header of 2,147,483,647 bytes"),
    "an unknown version": (npy(header(), BODY, 9), "without NumPy's header"),
    "a cut": (b"\x93NUMPY\x01", "without NumPy's header"),
    "an array without a name": (npy(header(), BODY), "no named array"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays(read, case):
    data, message = WRONG[case]
    with pytest.raises(CheckpointError, match=rf"model\.npz: .*({message})"):
        read(data)
    with pytest.raises(CheckpointError) if case != "an array without a name" else pytest.MonkeyPatch.context():
        read(archive({"a.npy": data}))


def test_wrong_arrays_in_pickles(read):
    good = floats((2,), value(BODY))
    assert list(read(archive({"p.npy": npy(header("|O", shape=(1,)), objects((1,), b"](" + good + b"e"))}))) == ["p.0"]
    for content, message in (
        (b"](" + floats((3,), value(BODY)) + b"e", "has 8 bytes"),
        (b"](" + floats((1 << 60,), value(BODY)) + b"e", "expected sizes from 0"),
        (b"](" + floats((-2,), value(BODY)) + b"e", "expected sizes from 0"),
        (b"](" + floats("ab", value(BODY)) + b"e", "at most 32 sizes"),
        (b"](" + floats((2,), value(3)) + b"e", "numbers are a int"),
        (b"](" + floats((2,), value("\u1234")) + b"e", "numbers are text"),
        (b"](" + floats((2,), value(BODY), name("os", "system")) + b"e", "the type 'None'"),
        (b"](" + floats((2,), value(BODY), call(name("numpy", "dtype"), value("V8"))) + b"e", "the type 'V8'"),
        (b"]", "does not hold as many"),
        (value({"a": 1}), "does not hold as many"),
        (b"]q\0h\0a", "more than 8 deep"),
        (b"](" + SHELL + b"e", "no named array"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(archive({"p.npy": npy(header("|O", shape=(1,)), objects((1,), content))}))
    with pytest.raises(CheckpointError, match="pickled as something else"):
        read(archive({"p.npy": npy(header("|O", shape=(1,)), whole(good))}))


def test_arrays_that_share_their_bytes_without_end(read):
    """One text of a million characters, encoded anew for each of a thousand arrays."""
    text = value("x" * 1_000_000) + b"q\x07"
    kind = name("numpy", "dtype") + value("u1") + value(False) + value(True) + b"\x87R" + value((3, "|")) + b"b"
    encoded = call(name("_codecs", "encode"), b"h\x07", value("latin1"))
    array = floats((1_000_000,), encoded, kind)
    program = objects((1000,), text + b"0](" + array * 1000 + b"e")
    with pytest.raises(CheckpointError, match="describes far more numbers than it holds"):
        read(archive({"p.npy": npy(header("|O", shape=(1000,)), program)}))


def test_compressed_bombs(read):
    data = saved(compressed=True, a=np.zeros(50_000_000, np.float32))
    assert len(data) < 1_000_000
    with pytest.raises(CheckpointError, match="more than 64 times its own size"):
        read(data)
    small = saved(compressed=True, a=np.zeros(100_000, np.float32))  # constant tables are small
    assert not read(small)["a"].any()


def test_lists_doubling(read):
    """Seven lists, each seven times the one before: 7^7 entries."""
    program = b"](" + b"N" * 7 + b"eq\0"
    for i in range(6):
        program += b"0](" + b"h%c" % i * 7 + b"eq%c" % (i + 1)
    with pytest.raises(CheckpointError, match="more than 100,000 arrays"):
        read(archive({"p.npy": npy(header("|O", shape=(1,)), objects((1,), b"](" + program + b"e"))}))
