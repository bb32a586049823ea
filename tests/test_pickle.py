"""The reader of PyTorch's files: all layouts and protocols, whole modules, hostile pickles, of which nothing runs."""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pickle
import struct
import sys
import time
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import fastsr
from fastsr.checkpoints import pickles, pytorch
from fastsr.checkpoints.errors import CheckpointError
from pytorch_files import (
    archive,
    call,
    legacy,
    make,
    mapping,
    name,
    storage,
    tarred,
    tensor,
    value,
    whole,
    zipped,
)  # fmt: skip

LAYOUTS = {"zip": True, "legacy": False}
KEPT = b"q\xff0"  # in a pickle: the value before is kept for later, as b"h\xff", and taken off the stack


@pytest.fixture
def read(tmp_path):
    """Reads the bytes of a file."""

    def reader(data: bytes) -> dict[str, object]:
        (tmp_path / "model.pth").write_bytes(data)
        return pytorch.read(tmp_path / "model.pth")

    return reader


@pytest.fixture
def saved(tmp_path):
    """Saves with torch and reads."""

    def reader(content: object, layout: str = "zip", protocol: int = 2) -> dict[str, object]:
        path = tmp_path / "saved.pth"
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=LAYOUTS[layout])
        return pytorch.read(path)

    return reader


def same(found: dict[str, object], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for key, tensor_ in expected.items():
        assert found[key].dtype == tensor_.dtype and torch.equal(found[key], tensor_), key


class Odd(nn.Module):
    """A module with everything that a state dict has rules for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.twice = self.conv
        self.none = None
        self.register_parameter("absent", None)
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.PReLU()])
        self.low = nn.Parameter(torch.ones(2, dtype=torch.float16), requires_grad=False)
        self.register_module("empty", None)
        self.rgb_range, self.flag, self.text = 255, True, "x"
        self.blocks[1].res_scale = 0.1
        self.args = argparse.Namespace(n_feats=64, rgb_range=1, name="y")


# What torch saves.


@pytest.mark.parametrize("protocol", range(1, 6))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_modules(saved, layout, protocol):
    torch.manual_seed(0)
    module = Odd()
    found = saved(module, layout, protocol)
    same(found, module.state_dict())
    assert found.hints["rgb_range"] == 255 and found.hints["res_scale"] == 0.1 and found.hints["n_feats"] == 64
    assert found.hints["flag"] is True and found.hints["kernel_size"] == (3, 3) and "text" not in found.hints
    parallel = saved(nn.DataParallel(module), layout, protocol)
    same(parallel, {f"module.{key}": v for key, v in module.state_dict().items()})


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_class_that_is_gone(tmp_path, layout):
    code = types.ModuleType("somebodys_code")
    exec("from torch import nn\nclass Net(nn.Sequential):\n    pass\n", code.__dict__)
    code.Net.__module__ = "somebodys_code"
    sys.modules["somebodys_code"] = code
    net = code.Net(nn.Conv2d(3, 4, 3), nn.PReLU())
    torch.save({"epoch": 3, "netG": net}, tmp_path / "a.pth", _use_new_zipfile_serialization=LAYOUTS[layout])
    del sys.modules["somebodys_code"]
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        torch.load(tmp_path / "a.pth", weights_only=False)
    found = pytorch.read(tmp_path / "a.pth")
    assert found["epoch"] == 3
    same(found["netG"], net.state_dict())
    assert "somebodys_code" not in sys.modules


@pytest.mark.parametrize("protocol", range(1, 6))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_checkpoints(saved, layout, protocol):
    module = Odd()
    optimiser = torch.optim.Adam(module.parameters())
    module.blocks[0](torch.ones(1, 2)).sum().backward()
    optimiser.step()
    content = {
        "epoch": 7, "best": 31.5, "name": "run", "done": False, "nothing": None, "state_dict": module.state_dict(),
        "optimizer": optimiser.state_dict(), "args": argparse.Namespace(lr=1e-4), "log": [1, 2, torch.ones(2)],
        "default": collections.defaultdict(list, {"w": torch.ones(1)}), 5: torch.ones(1), "psnr": np.float64(31.5),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3).T, "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5),
    }  # fmt: skip
    found = saved(content, layout, protocol)
    same(found["state_dict"], module.state_dict())
    assert [found[k] for k in ("epoch", "best", "name", "done", "nothing")] == [7, 31.5, "run", False, None]
    assert found["args"] is None and found["log"] is None and 5 not in found
    assert torch.equal(found["default"]["w"], torch.ones(1))
    assert torch.equal(found["array"], torch.tensor([[0, 3], [1, 4], [2, 5]], dtype=torch.int16))
    assert found["empty"].shape == (0, 3) and found["scalar"].shape == () and found["scalar"] == 2.5


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles(read, protocol):
    """By pickle.dump: tensors hold their storages as bytes, in torch.save's form."""
    module = Odd()
    same(read(pickle.dumps(module, protocol)), module.state_dict())
    content = {"state_dict": module.state_dict(), "array": np.arange(3.0), "tied": [1]}
    found = read(pickle.dumps(content, protocol))
    same(found["state_dict"], module.state_dict())
    assert found["array"].tolist() == [0, 1, 2]


def test_storages_in_plain_pickles_are_bounded(read):
    numbers = call(name("torch.storage", "_load_from_bytes"), value(legacy(whole(value("x")))))
    with pytest.raises(CheckpointError, match="a storage in a plain pickle is something else"):
        read(whole(mapping(a=tensor(numbers, 0, (4,), (1,)))))
    bytes_ = legacy(whole(storage("0", 1000)), [("0", 1000, bytes(4000))])
    kept = b"B" + struct.pack("<I", len(bytes_)) + bytes_ + KEPT
    each = [tensor(call(name("torch.storage", "_load_from_bytes"), b"h\xff"), 0, (1,), (1,))] * 100
    assert len(read(whole(kept + mapping(**{f"w{i}": part for i, part in enumerate(each)})))) == 100
    again = call(name("torch.storage", "_load_from_bytes"), call(name("_codecs", "encode"), b"h\xff", value("latin1")))
    kept = value(bytes_.decode("latin1")) + KEPT
    with pytest.raises(CheckpointError, match="describes far more numbers than it holds"):
        read(whole(kept + mapping(**{f"w{i}": tensor(again, 0, (1,), (1,)) for i in range(100)})))


def test_expanded_tensors(saved):
    """One number that is there many times."""
    found = saved({"bias": torch.ones(1).expand(64), "kernel": torch.arange(3.0)[:, None].expand(3, 5)})
    same(found, {"bias": torch.ones(64), "kernel": torch.arange(3.0)[:, None].repeat(1, 5)})


@pytest.mark.parametrize("dtype", pytorch.DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_types_and_views(saved, layout, dtype):
    base = (torch.arange(24) % 5).to(pytorch.DTYPES[dtype])
    content = {"all": base, "part": base[3:9], "t": base.reshape(4, 6).t(), "step": base.reshape(2, 3, 4)[:, ::2, 1:3]}
    same(saved(content, layout), content)


def test_archives_without_checksums_and_untyped_storages(saved, read):
    torch.serialization.set_crc32_options(False)
    try:
        same(saved(content := {"a": torch.arange(5.0)}), content)
    finally:
        torch.serialization.set_crc32_options(True)
    numbers = np.arange(3, dtype=np.float32).tobytes()
    untyped = storage("0", 12, name("torch.storage", "UntypedStorage"))
    hooks = call(name("collections", "OrderedDict"))
    rest = [value(0), value((3,)), value((1,)), value(False), hooks, name("torch", "float32")]
    data = zipped(whole(mapping(a=call(name("torch._utils", "_rebuild_tensor_v3"), untyped, *rest))), {"0": numbers})
    same(read(data), {"a": torch.arange(3.0)})


def test_released_weights_are_what_torch_reads(shared):
    theirs = torch.load(shared / "weights" / "carn_m.pth", map_location="cpu", weights_only=True)
    same(pytorch.read(shared / "weights" / "carn_m.pth"), theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("network", "config"),
    [
        ("rcan_basicsr", {"groups": 1, "blocks": 1, "features": 8, "hidden": 2, "res_scale": 0.5, "img_range": 1.0}),
        ("idn", {"scale": 3}),
        ("zssr", {"residual": False}),
        ("enhancenet", {"rgb_mean": (0.25, 0.5, 0.75)}),
    ],
)
def test_pickled_networks_load_with_what_their_attributes_say(tmp_path, layout, network, config):
    model = fastsr.create(network, **config)
    path = tmp_path / "model"  # no ending: the content tells
    torch.save(nn.DataParallel(model), path, _use_new_zipfile_serialization=LAYOUTS[layout])
    loaded = fastsr.load(path)
    assert loaded.config == model.config
    same(loaded.state_dict(), model.state_dict())


def test_parameters_of_python_2_and_of_old_torch(read):
    """Strings are bytes, dicts are made from lists of pairs, tensors by the first of the functions, parameters by their
    class."""
    text = b"U\x06weightq\x01"
    part = tensor(storage("0", 4), 1, (3,), (1,), "_rebuild_tensor")
    pairs = b"](]" + text + call(name("torch.nn.parameter", "Parameter"), part, value(True)) + b"\x86ea"
    pairs = b"](](" + text + call(name("torch.nn.parameter", "Parameter"), part, value(True)) + b"ee"
    program = whole(call(name("collections", "OrderedDict"), pairs))
    numbers = np.arange(4, dtype=np.float32).tobytes()
    for data in (zipped(program, {"0": numbers}), legacy(program, [("0", 4, numbers)])):
        same(read(data), {"weight": torch.tensor([1.0, 2.0, 3.0])})
    module = b"ccopy_reg\n_reconstructor\n(csomewhere\nNet\nc__builtin__\nobject\nNtR"
    attributes = mapping(_parameters=mapping(w=part), _buffers=b"}", _modules=b"}", training=b"\x89")
    same(read(zipped(whole(module + attributes + b"b"), {"0": numbers})), {"w": torch.tensor([1.0, 2.0, 3.0])})


def test_views_of_storages_in_the_legacy_layout(read):
    view = b"(" + value("root") + value(2) + value(3) + b"t"
    program = whole(mapping(a=tensor(storage("0", 6, view=view), 0, (3,), (1,))))
    numbers = np.arange(6, dtype=np.float32).tobytes()
    same(read(legacy(program, [("0", 6, numbers)])), {"a": torch.tensor([2.0, 3.0, 4.0])})
    far = program.replace(value(2) + value(3) + b"t", value(4) + value(3) + b"t")
    with pytest.raises(CheckpointError, match="reaches beyond"):
        read(legacy(far, [("0", 6, numbers)]))


# The tar layout.

FLOATS = np.arange(6, dtype=np.float32)
TAR = {
    "storages": [(11, name("torch", "FloatStorage"), 6, FLOATS.tobytes()),
                 (12, name("torch", "LongStorage"), 2, np.int64([5, 6]).tobytes())],
    "tensors": [(21, 11, (2, 3), (3, 1), 0), (22, 12, (2,), (1,), 0), (23, 13, (2,), (1,), 1)],
    "views": [(13, 11, 3, 3)],
}  # fmt: skip


def references(*keys: str) -> bytes:
    return mapping(**{f"w{key}": value(key) + b"Q" for key in keys})


def test_tar_archives_are_what_torch_reads(tmp_path):
    module = b"ctorch.nn.modules.container\nSequential\n)\x81"
    parts = {f"w{key}": call(name("torch.nn.parameter", "Parameter"), value(key) + b"Q") for key in ("21", "23")}
    state = mapping(_parameters=mapping(**parts), _buffers=references("22"), _modules=b"}", training=b"\x89")
    expected = {
        "w21": torch.from_numpy(FLOATS).reshape(2, 3),
        "w22": torch.tensor([5, 6]),
        "w23": torch.tensor([4.0, 5.0]),
    }
    path = tmp_path / "old.pth"
    path.write_bytes(tarred(whole(references("21", "22", "23")), **TAR))
    theirs = torch.load(path, weights_only=False)
    same(theirs, expected)
    same(pytorch.read(path), expected)
    path.write_bytes(tarred(whole(module + state + b"b"), **TAR))
    same(pytorch.read(path), {key: expected[key] for key in ("w21", "w23", "w22")})
    assert pytorch.matches(memoryview(path.read_bytes()))


DAMAGED_TAR = {
    "storages: claims 700 numbers": {"storages": [(11, name("torch", "FloatStorage"), 700, FLOATS.tobytes())]},
    "damaged: a storage claims -1": {"storages": [(11, name("torch", "FloatStorage"), -1, b"")]},
    "type 'os.system'": {"storages": [(11, name("os", "system"), 1, bytes(4))]},
    "does not fit": {"tensors": [(21, 11, (7,), (1,), 0)]},
    "beyond it": {"views": [(13, 11, 3, 4)]},
    "does not hold '99'": {"tensors": [(21, 99, (1,), (1,), 0)]},
    "a tensor of 40 axes": {"tensors": [(21, 11, (1,) * 40, (1,) * 40, 0)]},
}


@pytest.mark.parametrize("message", DAMAGED_TAR)
def test_damaged_tar_archives(read, message):
    with pytest.raises(CheckpointError, match=message.split(": ")[-1]):
        read(tarred(whole(references("21")), **TAR | DAMAGED_TAR[message]))


def test_tar_archives_with_wrong_headers(read):
    data = tarred(whole(references("21")), **TAR)
    with pytest.raises(CheckpointError, match="claims .* bytes, which are not there"):
        read(data[:124] + b"77777777777\0" + data[136:])
    with pytest.raises(CheckpointError, match="has no size"):
        read(data[:124] + b"\x80" + b"\xff" * 11 + data[136:])
    with pytest.raises(CheckpointError, match="expected .*pickle in PyTorch's tar archive"):
        read(data[: data.index(b"pickle\0") // 512 * 512] + bytes(1024))


# Tensors that are not what they claim.

FOUR = {"0": np.arange(4, dtype=np.float32).tobytes()}
CLAIMS = {
    "one number too far": (tensor(storage("0", 4), 1, (4,), (1,)), "does not fit into its storage of 4 numbers"),
    "repeated by strides": (tensor(storage("0", 4), 0, (1 << 40,), (0,)), "describes far more numbers than it holds"),
    "negative sizes": (tensor(storage("0", 4), 0, (-2, -2), (1, 1)), "expected sizes from 0"),
    "negative strides": (tensor(storage("0", 4), 3, (4,), (-1,)), "expected sizes from 0"),
    "negative start": (tensor(storage("0", 4), -1, (4,), (1,)), "begins at -1"),
    "overflowing sizes": (tensor(storage("0", 4), 0, (1 << 40, 1 << 40), (1, 1)), "claims the sizes"),
    "empty and absurd": (tensor(storage("0", 4), 0, (0, 1 << 47, 8), (1, 1, 1)), "claims the sizes"),
    "a size that is a text": (tensor(storage("0", 4), 0, ("a",), (1,)), "expected sizes from 0"),
    "fewer strides": (tensor(storage("0", 4), 0, (2, 2), (1,)), "has the strides"),
    "1000 axes": (tensor(storage("0", 4), 0, (1,) * 1000, (1,) * 1000), "at most 32 sizes"),
    "more in the storage": (tensor(storage("0", 5), 0, (4,), (1,)), "has 4 numbers .* instead of 5"),
    "another storage": (tensor(storage("1", 4), 0, (4,), (1,)), "does not hold the storage '1'"),
    "a path out of the archive": (tensor(storage("../data.pkl", 4), 0, (4,), (1,)), "does not hold"),
    "a storage of no type": (tensor(storage("0", 4, name("os", "system")), 0, (4,), (1,)), "type 'os.system'"),
    "no storage": (tensor(value("x"), 0, (4,), (1,)), "a tensor without a storage"),
    "a reference to nothing": (tensor(value(5) + b"Q", 0, (4,), (1,)), "something else than a storage"),
    "a quantized tensor": (call(name("torch._utils", "_rebuild_qtensor"), storage("0", 4)), "sparse, quantized"),
    "an unknown type": (
        call(name("torch._utils", "_rebuild_tensor_v3"), storage("0", 4), *map(value, (0, (1,), (1,), 0, 0)),
             name("torch", "float8_e4m3fn")), "type 'torch.float8_e4m3fn'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CLAIMS)
def test_tensors_that_claim_too_much(read, case):
    part, message = CLAIMS[case]
    with pytest.raises(CheckpointError, match=rf"model\.pth: .*{message}"):
        read(zipped(whole(mapping(a=part)), FOUR))


def test_tensors_may_share_a_storage_but_not_without_end(read):
    part = tensor(storage("0", 4), 0, (4,), (1,))
    assert len(read(zipped(whole(mapping(**{f"w{i}": part for i in range(25)})), FOUR))) == 25
    big = {"0": bytes(4 << 20)}
    parts = mapping(**{f"w{i}": tensor(storage("0", 1 << 20), 0, (1 << 20,), (1,)) for i in range(40)})
    with pytest.raises(CheckpointError, match="describes far more numbers than it holds"):
        read(zipped(whole(parts), big))


def test_special_tensors_and_files_are_refused(read, saved):
    with pytest.raises(CheckpointError, match="sparse"):
        saved({"a": torch.eye(3).to_sparse()})
    with pytest.raises(CheckpointError, match="a TorchScript program"):
        read(zipped(whole(b"}"), constants_pkl=b""))
    with pytest.raises(CheckpointError, match="big-endian"):
        read(archive({"m/data.pkl": whole(b"}"), "m/byteorder": b"big"}))
    with pytest.raises(CheckpointError, match="byte order"):
        read(legacy(whole(b"}"), little=False))
    with pytest.raises(CheckpointError, match="plain pickle refers to storages"):
        read(whole(mapping(a=tensor(storage("0", 4), 0, (4,), (1,)))))
    for layout in LAYOUTS:
        with pytest.raises(CheckpointError, match="protocol 0"):
            saved(nn.Linear(1, 1), layout, 0)
    with pytest.raises(CheckpointError, match="expected one data.pkl"):
        read(archive({"a/data.pkl": b"", "b/data.pkl": b""}))


def test_legacy_storages_that_are_not_there(read):
    program = whole(mapping(a=tensor(storage("0", 4), 0, (4,), (1,))))
    for count, content, message in ((1 << 60, bytes(16), "claims"), (-1, b"", "claims"), (4, bytes(15), "claims")):
        with pytest.raises(CheckpointError, match=message):
            read(legacy(program, [("0", count, content)]))
    with pytest.raises(CheckpointError, match="nothing refers to"):
        read(legacy(program, [("1", 4, bytes(16))]))
    with pytest.raises(CheckpointError, match="does not hold the storage"):
        read(legacy(program))


# Hostile pickles: each would create a file if it ran.

BUILTINS = "builtins"


class Reduced:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def hostile(marker: str) -> dict[str, bytes]:
    """Parts of pickles that create the file `marker` when they run in Python's own machine."""
    command, quoted = value(f"touch {marker}"), value(f"open({marker!r}, 'w')")
    system, evaluate, execute = name("os", "system"), name(BUILTINS, "eval"), name(BUILTINS, "exec")
    imported = call(name(BUILTINS, "__import__"), value("os"))
    attribute = call(name(BUILTINS, "getattr"), imported, value("system"))
    path = call(name("pathlib", "Path"), value(marker))
    touch = call(name(BUILTINS, "getattr"), path, value("touch"))
    partial = call(name("functools", "partial"), system, command)
    return {
        "reduce": call(system, command),
        "posix": call(name("posix", "system"), command),
        "a class that reduces": pickle.dumps(Reduced(os.system, f"touch {marker}"), 2)[2:-1],
        "stack global": value("os") + value("system") + b"\x93" + b"(" + command + b"tR",
        "stack global of joined texts": b"\x80\x04"
        + value("os")
        + value("path.os.system")
        + b"\x93("
        + command
        + b"tR",
        "memoised name": system + b"q\x050h\x05(" + command + b"tR",
        "inst": b"(" + command + b"ios\nsystem\n",
        "obj": b"(" + system + command + b"o",
        "eval": call(evaluate, quoted),
        "exec": call(execute, quoted),
        "__import__ and getattr": attribute + b"(" + command + b"tR",
        "getattr of a path": call(touch),
        "attrgetter": call(call(name("operator", "attrgetter"), value("system")), imported) + b"(" + command + b"tR",
        "methodcaller": call(call(name("operator", "methodcaller"), value("touch")), path),
        "partial": call(partial),
        "map and list": call(name(BUILTINS, "list"), call(name(BUILTINS, "map"), system, b"](" + command + b"e")),
        "setstate by build": make(name("argparse", "Namespace"), mapping(__setstate__=system)) + command + b"b",
        "copyreg": call(name("copyreg", "__newobj__"), name("subprocess", "Popen"))
        + b"0"
        + call(name("subprocess", "check_call"), b"](" + value("touch") + value(marker) + b"e"),
        "in a dict's key": b"}(" + call(system, command) + value(1) + b"u",
        "dropped again": call(system, command) + b"0}",
        "pickle.loads": call(name("pickle", "loads"), value(whole(call(system, command)))),
        "torch.load": call(name("torch.storage", "_load_from_bytes"), value(legacy(whole(call(system, command))))),
        "numpy's scalar": call(name("numpy.core.multiarray", "_reconstruct"), call(system, command)),
        "in a persistent id": b"(" + value("storage") + call(system, command) + value("0") + b"NK\x04tQ",
        "as a persistent id": call(system, command) + b"Q",
    }


NAMES = list(hostile("x"))


@pytest.mark.parametrize("case", [n for n in NAMES if "persistent id" not in n])  # of which this machine knows nothing
def test_the_corpus_is_live(tmp_path, case):
    """What the next test shows would show nothing if these did nothing in Python's machine."""
    marker = tmp_path / "marker"
    with contextlib.suppress(Exception):  # some end in nonsense after they have run
        pickle.loads(whole(hostile(str(marker))[case]))
    assert marker.exists()


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by nature"])
@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("place", ["alone", "beside weights", "in a module", "as a class", "in a tensor"])
def test_nothing_of_a_hostile_pickle_runs(tmp_path, read, monkeypatch, case, place, named):
    """Files are refused for the names of commands in them, which is a courtesy: without it nothing runs either."""
    if not named:
        monkeypatch.setattr(pickles, "HOSTILE_MODULES", frozenset())
        monkeypatch.setattr(pickles, "HOSTILE_BUILTINS", frozenset())
    marker = tmp_path / "marker"
    part = hostile(str(marker))[case]
    good = tensor(storage("0", 4), 0, (4,), (1,))
    module = mapping(_parameters=mapping(w=good, evil=part), _buffers=b"}", _modules=mapping(e=part), x=part)
    program = {
        "alone": part,
        "beside weights": mapping(w=good, evil=part),
        "in a module": make(name("torch.nn.modules.module", "Module"), module),
        "as a class": mapping(w=good, evil=part + b")R"),
        "in a tensor": mapping(w=call(name("torch._utils", "_rebuild_tensor_v2"), part, part, part, part)),
    }[place]
    modules = set(sys.modules)
    for data in (zipped(whole(program), FOUR), legacy(whole(program), [("0", 4, bytes(16))]), tarred(whole(program))):
        try:
            content = read(data)
        except CheckpointError as error:
            assert "model.pth: " in str(error)
        else:
            assert set(content) <= {"w", "evil"} and content.get("evil") in (None, {})
    assert not marker.exists()
    assert set(sys.modules) == modules


def test_calls_of_commands_are_named(read):
    for case, message in (
        ("reduce", "call os.system"),
        ("eval", "call builtins.eval"),
        ("pickle.loads", "call pickle.l"),
    ):
        with pytest.raises(CheckpointError, match=f"wants to {message}.*nothing was run"):
            read(zipped(whole(mapping(a=hostile("x")[case]))))
    with pytest.raises(CheckpointError, match="an object of antigravity.fly, which is not executed"):
        read(zipped(whole(call(name("antigravity", "fly")))))
    assert "antigravity" not in sys.modules


NESTED = 20_000
BOMBS = {
    "memo of 2^31 entries": b"}r\xff\xff\xff\x7f",
    "memo of a negative entry": b"}p-1\n",
    "bytes of 2^62": b"\x8e" + struct.pack("<Q", 1 << 62),
    "bytearray of 2^40": b"\x96" + struct.pack("<Q", 1 << 40),
    "text of 2^32": b"X\xff\xff\xff\xff",
    "string of -1": b"T\xff\xff\xff\xff",
    "frame of 2^60": b"\x95" + struct.pack("<Q", 1 << 60) + b"}",
    "long of 2^31 bytes": b"\x8b\xff\xff\xff\x7f",
    "long of 100,000 digits": b"L" + b"9" * 100_000 + b"L\n",
    "no number": b"I1e\n",
    "no float": b"Fx\n",
    "no text": b"X\x01\0\0\0\xff",
    "no quotes": b"Sabc\n",
    "an escape that is none": b"S'\\x'\n",
    "a line without end": b"cos",
    "lists in lists": b"]" * NESTED + b"a" * (NESTED - 1),
    "tuples in tuples": b")" + b"\x85" * NESTED,
    "tuples as keys": b"})" + b"\x85" * NESTED + b"Ns",
    "dicts in dicts": b"}K\x01" * NESTED + b"N" + b"s" * NESTED,
    "dicts of texts in dicts": b"}X\x01\0\0\0a" * NESTED + b"N" + b"s" * NESTED,
    "a list in itself": b"]q\0h\0a",
    "a dict in itself": b"}q\0X\x01\0\0\0ah\0s",
    "a list as a key": b"}]Ns",
    "a set in itself": b"\x8fq\0(h\0\x90",
    "lists doubling": b"]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(100)),
    "dicts doubling": b"}q\0" + b"".join(
        b"}(" + value("a") + b"h%c" % i + value("b") + b"h%cuq%c" % (i, i + 1) for i in range(95)),
    "an empty stack": b"0",
    "a mark that is not there": b"t",
    "under the mark": b"}(0a",
    "a state for a number": b"K\x01}b",
    "an odd dict": b"(K\x01d",
    "an unknown value": b"h\x09",
    "an extension": b"\x82\x01",
    "a buffer": b"\x97",
    "an unknown instruction": b"\xff",
    "no end": b"}}}",
    "arguments that are no tuple": b"cos\nsystem\n]R",
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_cost_no_more_than_their_bytes(read, case):
    program = whole(BOMBS[case]) if case != "no end" else b"\x80\x02" + BOMBS[case]
    for data in (zipped(program), legacy(program)):
        tracemalloc.start()
        with contextlib.suppress(CheckpointError):
            assert isinstance(read(data), dict)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000 + 400 * len(program)


def test_modules_doubling(read):
    """Each module holds the next twice under two names: 2^60 parameters."""
    module = mapping(_parameters=b"}", _buffers=b"}", _modules=b"}")
    program = make(name("a", "M"), module) + b"q\x00"
    for i in range(60):
        children = b"}(" + value("a") + b"h%c" % i + value("b") + b"h%cu" % i
        program += make(name("a", "M"), mapping(_parameters=b"}", _buffers=b"}", _modules=children)) + b"q%c" % (i + 1)
    with pytest.raises(CheckpointError, match=r"more than 500,000 attributes"):
        read(zipped(whole(program)))
    deep = b"".join(name("a", "M") + b")\x81}(" + value("_parameters") + b"}" + value("_modules") + b"}" + value("m")
                    for _ in range(150))  # fmt: skip
    with pytest.raises(CheckpointError, match="100 modules in each other"):
        read(zipped(whole(deep + b"N" + b"sub" * 150)))


def module(parameters: bytes = b"", modules: bytes = b"", **more: bytes) -> bytes:
    """A module; parameters, modules: names and values in turn."""
    parts = {"_parameters": b"}(" + parameters + b"u", "_modules": b"}(" + modules + b"u"}
    return make(name("a", "M"), mapping(**parts, **more))


def often(part: bytes, count: int) -> bytes:
    """A value under many names."""
    return b"".join(value(str(i)) + part for i in range(count))


COUNT = 20_000
REPEATED = {
    "names": (
        module(modules=value("x" * 600) + module(modules=value("x" * 600) + module(value("w") + tensor(
            storage("0", 4), 0, (4,), (1,))))), "a name of more than 1,000 characters"),
    "tensors": (
        tensor(storage("0", 4), 0, (0,), (1,)) + KEPT + module(often(b"h\xff", 500)) + KEPT
        + module(modules=often(b"h\xff", 500)), "more than 100,000 tensors"),
    "sets": (
        call(name("builtins", "set"), b"](" + b"K\x01" * COUNT + b"e") + KEPT
        + module(_non_persistent_buffers_set=b"h\xff") + KEPT + module(modules=often(b"h\xff", COUNT)),
        "more than 500,000 attributes"),
    "pairs": (
        b"](" + b"K\x01N\x86" * COUNT + b"e\x85" + KEPT + b"}(" + often(name("collections", "OrderedDict") + b"h\xffR",
        COUNT) + b"u", "dicts of more than 2,000,000 pairs"),
}  # fmt: skip


@pytest.mark.parametrize("case", REPEATED)
def test_what_is_written_once_is_not_paid_for_without_end(read, case):
    program, message = REPEATED[case]
    with pytest.raises(CheckpointError, match=message):
        read(zipped(whole(program), FOUR))


def test_a_dict_of_pairs_is_made_once(read):
    """Attributes that are all one module, whose attributes are pairs as Python 2 wrote them."""
    pairs = b"](" + b"".join(value(k) + b"}\x86" for k in ("_parameters", "_modules")) + b"K\x01N\x86" * COUNT + b"e"
    shared = make(name("a", "M"), call(name("collections", "OrderedDict"), pairs)) + KEPT
    part = value("w") + tensor(storage("0", 4), 0, (4,), (1,))
    program = shared + module(part, **{str(i): b"h\xff" for i in range(COUNT)})
    start = time.process_time()
    assert list(read(zipped(whole(program), FOUR))) == ["w"]
    assert time.process_time() - start < 20  # a minute and more, were it made for each


def test_too_many_steps(read, monkeypatch):
    monkeypatch.setattr(pickles, "MOST_STEPS", 1000)
    with pytest.raises(CheckpointError, match="more than 1,000 steps"):
        read(zipped(whole(b"N0" * 1000 + b"}")))


# Archives.


def test_archives_are_what_zipfile_writes(read):
    program, numbers = whole(mapping(a=tensor(storage("0", 4), 0, (4,), (1,)))), FOUR["0"]
    members = {"m/data.pkl": program, "m/data/0": numbers}
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        assert read(archive(members, method))["a"].tolist() == [0, 1, 2, 3]
    with pytest.raises(CheckpointError, match="packed by method 14"):
        read(archive(members, zipfile.ZIP_LZMA))


def test_archives_that_claim_too_much(read):
    program = whole(b"}")
    bomb = archive({"m/data.pkl": program + bytes(200 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="more than 64 times its own size"):
        read(bomb)
    data = zipped(program)
    end, entry = data.index(b"PK\5\6"), data.index(b"PK\1\2")

    def patched(at: int, form: str, number: int) -> bytes:
        return data[:at] + struct.pack(form, number) + data[at + struct.calcsize(form) :]

    for at, form, number, message in (
        (end + 10, "<H", 60000, "ends in the middle|points to where"),
        (end + 12, "<I", 1 << 31, "claims .* a directory of 2,147,483,648 bytes"),
        (end + 16, "<I", 1 << 31, "points to where nothing is"),
        (entry + 8, "<H", 1, "encrypted"),
        (entry + 10, "<H", 99, "method 99"),
        (entry + 16, "<I", 12345, "does not have its checksum"),
        (entry + 20, "<I", 1 << 31, "members of the archive overlap"),
        (entry + 24, "<I", 1 << 31, "64 times"),
        (entry + 24, "<I", 3, "instead of 3"),
        (entry + 28, "<H", 60000, "ends in the middle"),
        (entry + 42, "<I", 1 << 31, "points to where nothing is"),
        (end, "<I", 0, "without a directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(patched(at, form, number))
    alone = archive({"m/data.pkl": program})
    at = alone.index(b"PK\1\2") + 20
    with pytest.raises(CheckpointError, match="claims 2,147,483,648 bytes"):
        read(alone[:at] + struct.pack("<I", 1 << 31) + alone[at + 4 :])
    longest = data[: end + 16] + b"\xff" * 4 + data[end + 20 :]  # the 64-bit directory, which is not there
    with pytest.raises(CheckpointError, match="points to where nothing is"):
        read(longest)
