"""The reader of Torch7's files, on files written from the description of the format; no real file was at hand."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch

import fastsr
from conftest import PARITY
from fastsr.checkpoints import torch7
from fastsr.checkpoints.errors import CheckpointError
from torch7_files import Function, Thing, View, container, convolution, write

FORMS = {
    "binary": {},
    "32-bit": {"long": 4},
    "ascii": {"ascii": True},
    "without versions": {"versions": False},
    "cuda": {"prefix": "torch.Cuda"},
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture
def read(tmp_path):
    """Reads the bytes of a file."""

    def reader(data: bytes) -> dict[str, torch.Tensor]:
        (tmp_path / "model.t7").write_bytes(data)
        return torch7.read(tmp_path / "model.t7")

    return reader


def lua_rdn(state: dict[str, torch.Tensor], blocks: int, layers: int) -> Thing:
    """The authors' model as their code builds it: each dense layer a Concat with its input, each block followed by a
    Concat of itself and all later blocks."""

    def conv(name: str) -> Thing:
        weight, bias = (state[f"{name}.{part}"].numpy() for part in ("weight", "bias"))
        return convolution(weight, bias, "cudnn.SpatialConvolution")

    def skip(module: Thing) -> Thing:
        branches = container("nn.ConcatTable", module, container("nn.Identity"))
        return container("nn.Sequential", branches, Thing("nn.CAddTable", inplace=True))

    def block(d: int) -> Thing:
        parts = []
        for c in range(layers):
            grown = container("nn.Sequential", conv(f"RDBs.{d}.convs.{c}.conv.0"), Thing("cudnn.ReLU", inplace=True))
            joined = container("nn.Concat", Thing("nn.Identity"), grown)
            parts.append(container("nn.Sequential", joined))
        return skip(container("nn.Sequential", *parts, conv(f"RDBs.{d}.LFF")))

    nested = container("nn.Sequential", block(blocks - 1))
    for d in reversed(range(blocks - 1)):
        nested = container("nn.Sequential", block(d), container("nn.Concat", Thing("nn.Identity"), nested))
    body = container("nn.Sequential", conv("SFENet2"), nested, conv("GFF.0"), conv("GFF.1"))
    ups = sorted(k.removesuffix(".weight") for k in state if k.startswith("UPNet.") and k.endswith(".weight"))
    shuffles = [m for name in ups[:-1] for m in (conv(name), Thing("nn.PixelShuffle", upscaleFactor=2))]
    inner = [conv("SFENet1"), skip(body), container("nn.Sequential", *shuffles), conv(ups[-1])]
    return container("nn.Sequential", conv("subMean"), *inner, conv("addMean"))


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_rdn_from_the_authors_model(tmp_path, scale, form):
    torch.manual_seed(0)
    sizes = {"D": 3, "C": 2, "G": 5, "G0": 4, "block_width": 6}
    model = fastsr.create("rdn_original", scale=scale, **sizes, mean=(0.4, 0.5, 0.6))
    path = tmp_path / "rdn"  # no ending: the content tells
    path.write_bytes(write(lua_rdn(model.state_dict(), sizes["D"], sizes["C"]), **form))
    loaded = fastsr.load(path, rgb_range=255)
    assert loaded.name == "rdn_original" and loaded.config == model.config
    theirs = model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in loaded.state_dict().items())


def test_rdn_in_the_order_of_the_parameters(read):
    """A model whose tensors are numbered has them in the order that was recorded from Torch7."""
    for scale, rows in json.loads((PARITY / "rdn_key_dialects.json").read_text())["scales"].items():
        own = fastsr.create("rdn_original", scale=int(scale), G=1, G0=1).state_dict()
        state = {key: torch.full(value.shape, float(i)) for i, (key, value) in enumerate(own.items())}
        found = read(write(lua_rdn(state, 16, 8)))
        order = [list(own)[int(value.flatten()[0])] for value in found.values()]
        assert order == rows["lua_order"]


def test_networks_that_are_nearly_rdn_are_refused(tmp_path):
    state = fastsr.create("rdn_original", D=2, C=2, G=3, G0=3).state_dict()
    whole = lua_rdn(state, 2, 2)
    (tmp_path / "a.t7").write_bytes(write(container("nn.Sequential", *whole.fields["modules"][:-1])))
    with pytest.raises(fastsr.LoadError, match=r"a\.t7 is none of the networks known here.*modules\.1\.weight"):
        fastsr.load(tmp_path / "a.t7")
    (tmp_path / "b.t7").write_bytes(write(container("nn.Sequential", *whole.fields["modules"][::5])))
    with pytest.raises(fastsr.LoadError, match=r"looks like rdn_original \(torch7\) but it has 2 convolutions of 1x1"):
        fastsr.load(tmp_path / "b.t7")


def test_tables_tensors_and_everything_else(read, form):
    shared = np.arange(24, dtype=np.float32)
    table = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": {1: np.float32([1.5, -2.5e-20, np.inf]), 2: {"deep": np.int64([-(2**31), 7])}},
        "t": View(shared, 3, (4, 2), (2, 11)),  # a transposed part of a storage
        "u": View(shared, 1, (24,), (1,)),
        "text": "with\nline ends \0 and \xff",
        "empty": "",
        "nothing": None,
        "yes": True,
        "half": np.float16([0.5, -1.25]),
        "byte": np.uint8([0, 10, 32, 255]),
        "char": np.int8([-128, 10, 127]),
        "short": np.int16([-32768, 5]),
        "int": np.int32([-(2**31), 2**31 - 1]),
        "none": np.zeros((0,), np.float32),
        "new": Function(8),
        "old": Function(7),
        "oldest": Function(6),
    }
    again = table["b"]
    table |= {"same": again, "same tensor": table["a"], "itself": table}
    found = read(write(table, **form))
    assert list(found) == ["a", "b.1", "b.2.deep", "t", "u", "half", "byte", "char", "short", "int", "same tensor"]
    torch.testing.assert_close(found["a"], torch.arange(6.0, dtype=torch.float64).reshape(2, 3), rtol=0, atol=0)
    assert torch.equal(found["b.1"], torch.tensor([1.5, -2.5e-20, float("inf")]))
    assert found["b.2.deep"].tolist() == [-(2**31), 7]
    assert torch.equal(
        found["t"], torch.from_numpy(np.lib.stride_tricks.as_strided(shared[2:], (4, 2), (8, 44)).copy())
    )
    assert torch.equal(found["u"], torch.from_numpy(shared))
    assert found["same tensor"] is found["a"]
    for name in ("half", "byte", "char", "short", "int"):
        assert torch.equal(found[name], torch.from_numpy(table[name]))


def test_networks_in_tables_are_dicts_and_cycles_are_followed_once(read):
    w, b = np.ones((2, 1, 3, 3), np.float32), np.zeros(2, np.float32)
    conv = convolution(w.reshape(2, 9)[:, :, None, None], b)  # a kernel as a matrix
    conv.fields |= {"weight": w.reshape(2, 9), "nInputPlane": 1, "kW": 3, "kH": 3}
    norm = Thing("nn.SpatialBatchNormalization", weight=b, bias=b, running_mean=b + 1, running_var=b + 2, eps=1e-5)
    net = container("nn.Sequential", conv, norm, conv)
    net.fields["owner"] = net
    net.fields["modules"].append(net)
    found = read(write({"epoch": 3, "model": net, "best": {"netG": net, "copy": container("nn.Sequential", norm)}}))
    assert list(found) == ["model", "best.copy"]
    assert list(found["model"]) == [
        "modules.1.weight", "modules.1.bias",
        "modules.2.weight", "modules.2.bias", "modules.2.running_mean", "modules.2.running_var",
    ]  # fmt: skip
    assert found["model"]["modules.1.weight"].shape == (2, 1, 3, 3)
    replicas = Thing("nn.DataParallelTable", modules=[net, container("nn.Sequential", conv)])
    assert list(read(write(replicas))) == list(found["model"])


WHOLE = write(container("nn.Sequential", convolution(np.ones((2, 3, 3, 3), np.float32), np.ones(2, np.float32))))
STORAGE = np.ones(6, np.float32)
HOSTILE = {
    "nothing": (b"", "empty"),
    "a cut in the middle": (WHOLE[:200], "damaged or cut short"),
    "an unknown kind": (struct.pack("<i", 9), "unknown kind 9"),
    "a table of 2^31 entries": (struct.pack("<iii", 3, 1, 2**31 - 1), "claims 2,147,483,647 entries"),
    "a table of -1 entries": (struct.pack("<iii", 3, 1, -1), "claims -1 entries"),
    "a string of 2^31 characters": (struct.pack("<iiiii", 3, 1, 1, 2, 2**31 - 1), "claims 2,147,483,647 bytes"),
    "a tensor beyond its storage": (write({"a": View(STORAGE, 2, (6,), (1,))}), "does not fit into its storage of 6"),
    "a tensor before its storage": (write({"a": View(STORAGE, 0, (6,), (1,))}), "does not fit"),
    "a tensor repeated by its strides": (write({"a": View(STORAGE, 1, (1 << 40,), (0,))}), "does not fit"),
    "a tensor of overflowing sizes": (write({"a": View(STORAGE, 1, (2**62, 2**62, 4), (0, 0, 0))}), "of sizes"),
    "a tensor of negative sizes": (write({"a": View(STORAGE, 1, (-2, -3), (1, 1))}), "of sizes"),
    "an empty tensor of absurd sizes": (write({"a": View(STORAGE, 1, (0, 2**62), (1, 1))}), "of sizes"),
    "a tensor of 1000 axes": (write({"a": View(STORAGE, 1, (1,) * 1000, (1,) * 1000)}), "1000 axes"),
    "nothing but numbers": (write({"lr": 0.1}), "neither a network with parameters nor a table of tensors"),
    "one tensor": (write(STORAGE), "neither a network"),
    "a class of no name": (write(Thing("os.execute('x')")), "an object of the class"),
    "an object that is no table": (write(Thing("nn.Odd"))[:-12] + struct.pack("<id", 1, 2.0), "no table of fields"),
    "ascii: a word for a number": (b"3\n1\n1\n1\nxyz\n", "a number is none"),
    "ascii: too large a number": (b"3\n1\n99999999999999999999\n", "too large"),
    "ascii: an endless word": (b"3\n1\n1\n1\n" + b"9" * 1000, "expected where"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_and_hostile_files_say_what_is_wrong(read, name):
    data, message = HOSTILE[name]
    with pytest.raises(CheckpointError, match=rf"model\.t7: .*{message}"):
        read(data)


def test_storage_that_is_not_there(read):
    data = write({"a": View(STORAGE, 1, (6,), (1,))})
    at = data.rindex(struct.pack("<q", 6))
    with pytest.raises(CheckpointError, match="claims"):
        read(data[:at] + struct.pack("<q", 2**40) + data[at + 8 :])
    text = write({"a": View(STORAGE, 1, (6,), (1,))}, ascii=True)
    with pytest.raises(CheckpointError, match="claims 90 numbers where"):
        read(text.replace(b"Storage\n6\n", b"Storage\n90\n"))


def test_ascii_numbers_beyond_their_type(read):
    text = write({"a": np.int16([1, 2])}, ascii=True)
    with pytest.raises(CheckpointError, match="beyond its type"):
        read(text.replace(b"1 2\n", b"1 70000\n"))


def test_depth_is_no_recursion_and_has_an_end(read):
    tree: dict[str, object] = {"w": STORAGE}
    for _ in range(900):
        tree = {"t": tree}
    assert len(next(iter(read(write(tree))))) == 2 * 900 + 1
    header = struct.pack("<iiiid", 3, 1, 1, 1, 1.0)
    tables = b"".join(header[:4] + struct.pack("<i", n) + header[8:] for n in range(1, 20_000))
    with pytest.raises(CheckpointError, match="too deep"):
        read(tables)


def test_shared_tables_do_not_multiply(read):
    """Each of 60 tables holds the next twice; followed anew each time they would be 2^60."""
    table: dict[str, object] = {"w": STORAGE}
    for _ in range(60):
        table = {"a": table, "b": table}
    assert len(read(write(table))) == 1
