"""Caffe's binary models: every encoding the format has, the authors' files against the authors' outputs, damage.

MemNet has not been seen as a real file: its fixture is written layer by layer as the authors describe the network, and
run below by what Caffe's layers compute.
"""

from __future__ import annotations

import shutil
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastsr
from caffe_files import ENCODINGS, blob, convolution, idn, layer, net, old_layer
from conftest import parity_case, relative_error
from fastsr import checkpoints
from fastsr.checkpoints import caffe
from fastsr.checkpoints.errors import CheckpointError
from fastsr.cli import main
from test_models import outputs
from wire import fixed, number, raw, varint

RANDOM = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file and returns its path."""

    def write(data: bytes, name: str = "a.caffemodel"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


# The format.


def test_nets_that_do_not_begin_with_a_name_are_known_by_their_content(file):
    made = layer("conv", "Convolution", [blob(numbers(3, 2, 3, 3))])
    for first in (b"", raw(3, b"data") + number(4, 1), number(5, 1)):
        assert list(checkpoints.read(file(first + made, "weights"))) == ["conv.weight"]


@pytest.mark.parametrize("old_shape", (False, True), ids=("shape", "old shape"))
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("old", (False, True), ids=("layer", "layer of 2014"))
def test_every_encoding(file, encoding, old_shape, old):
    weight, bias = numbers(3, 2, 3, 3), numbers(3)
    blobs = [blob(a, encoding, old_shape) for a in (weight, bias)]
    made = old_layer("conv", 4, blobs) if old else layer("conv", "Convolution", blobs)
    content = caffe.read(file(net(made)))
    assert list(content) == ["conv.weight", "conv.bias"]
    for tensor, array in zip(content.values(), (weight, bias)):
        assert tensor.dtype == (torch.float64 if "double" in encoding else torch.float32)
        assert np.array_equal(tensor.numpy(), array)  # in the bias's own single axis, whatever the file says


def test_names(file):
    a, b, c = numbers(4), numbers(4), numbers(1)
    content = caffe.read(
        file(
            net(
                layer("data", "Input"),
                layer("norm/1", "BatchNorm", [blob(v) for v in (a, b, c)]),
                layer("scale", "Scale", [blob(a), blob(b)]),
                layer("relu", "ReLU"),
                layer("prelu", "PReLU", [blob(c)]),
                layer("one", "Scale", [blob(np.float32(3))]),
            )
        )
    )
    assert {k: v.tolist() for k, v in content.items()} == {
        "norm/1.blobs.0": a.tolist(), "norm/1.blobs.1": b.tolist(), "norm/1.blobs.2": c.tolist(),
        "scale.weight": a.tolist(), "scale.bias": b.tolist(), "prelu.blobs.0": c.tolist(), "one.weight": 3.0,
    }  # fmt: skip


def test_order_unknown_fields_and_gradients_do_not_matter(file):
    weight = numbers(2, 2)
    shape, data = raw(7, number(1, 2) + number(1, 2)), raw(5, weight.tobytes()[:4]) + raw(5, weight.tobytes()[4:])
    gradients = raw(6, weight.tobytes()) + raw(9, bytes(32))
    message = raw(7, gradients + data + shape + number(99, 7)) + raw(2, b"InnerProduct") + raw(1, b"first")
    content = caffe.read(file(raw(100, message + fixed(77, bytes(8))) + raw(1, b"the name at the end") + number(5, 1)))
    assert np.array_equal(content["first.weight"].numpy(), weight)


@pytest.mark.parametrize(
    ("stride", "expected"),
    [
        (number(6, 3), 3), (number(6, 3) * 2, 3), (raw(6, b"\3"), 3), (raw(6, b"\3\3"), 3), (b"", 1),
        (number(13, 4) + number(14, 4), 4), (number(13, 4) + number(14, 2), None), (number(6, 2) + number(6, 3), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("old", (False, True), ids=("layer", "layer of 2014"))
def test_the_stride_of_the_only_transposed_convolution_is_the_scale(file, stride, expected, old):
    parameters = convolution(stride)
    blobs = [blob(numbers(2, 1, 3, 3))]
    made = old_layer("up", 39, blobs, parameters) if old else layer("up", "Deconvolution", blobs, parameters)
    other = layer("conv", "Convolution", [blob(numbers(1, 1, 1, 1))], convolution(number(6, 7)))
    assert caffe.read(file(net(made, other))).hints == ({} if expected is None else {"scale": expected})
    again = layer("up2", "Deconvolution", [blob(numbers(2, 1, 3, 3))], parameters)
    assert caffe.read(file(net(made, again))).hints == {}


# IDN.


@pytest.mark.parametrize("scale", (2, 4))
def test_idn_of_its_authors(shared, scale):
    case = parity_case(f"idn_x{scale}")
    model = fastsr.load(shared / "weights" / f"IDN_x{scale}.caffemodel")
    assert model.config == fastsr.create("idn", **case.about["build"]).config
    assert model.parameter_count == case.about["parameters"]
    with torch.inference_mode():
        made = outputs(case, model, torch.float32)
        assert torch.equal(model(case.tensors["input"]), made["output"])  # the file says the scale
    assert made.keys() == case.tensors.keys() - {"input"}
    for name, value in made.items():
        assert relative_error(value, case.tensors[name]) <= 1e-5, name


def test_info_of_idn(shared, capsys):
    assert main(["info", str(shared / "weights" / "IDN_x4.caffemodel")]) == 0
    said = capsys.readouterr().out
    assert "IDN(scale=4," in said and "552,769 parameters" in said and "x4" in said and "colour: y" in said


def test_the_content_tells_whatever_the_name(shared, tmp_path):
    for name in ("weights", "model.pth", "model.ckpt"):
        shutil.copy(shared / "weights" / "IDN_x2.caffemodel", tmp_path / name)
        assert fastsr.load(tmp_path / name).config.scale == 2


def test_idn_written_anew(file):
    case = parity_case("idn_x3")
    path = file(idn({k: v.numpy() for k, v in case.state_dict().items()}, 3))
    model = fastsr.load(path)
    assert model.scales == (3,)
    with torch.inference_mode():
        assert relative_error(model(case.tensors["input"]), case.tensors["output"]) <= 1e-5
    assert fastsr.load(path, scale=2).config.scale == 2  # a hint given is taken
    assert fastsr.load(checkpoints.read(path)).config.scale == 3  # the content by itself says it too


# MemNet.


def memnet_layers(blocks: int, units: int, c: int, factor: float) -> dict[str, tuple[str, list[np.ndarray]]]:
    """The authors' layers that have weights, as training leaves them: name -> (type, blobs). A shared convolution is in
    each of its layers."""
    layers: dict[str, tuple[str, list[np.ndarray]]] = {}

    def norm(name: str, channels: int) -> None:
        sums = [factor * numbers(channels), factor * (numbers(channels) ** 2 + 0.5), np.array([factor], np.float32)]
        layers[f"bn_{name}"] = ("BatchNorm", sums)
        layers[f"scale_{name}"] = ("Scale", [1 + numbers(channels) / 4, numbers(channels) / 4])

    def conv(name: str, inputs: int, outputs: int, k: int) -> None:
        layers[name] = ("Convolution", [numbers(outputs, inputs, k, k) / (k * inputs**0.5), numbers(outputs) / 4])

    norm("conv1", 1)
    conv("conv1", 1, c, 3)
    for m in range(1, blocks + 1):
        for r in range(1, units + 1):
            for i in "ab":
                norm(f"conv{m:02}_{r:02}_{i}", c)
                conv(f"conv{m:02}_{r:02}_{i}", c, c, 3)
                layers[f"conv{m:02}_{r:02}_{i}"] = layers[f"conv{m:02}_01_{i}"]
        norm(f"conv_transition_{m:02}", (m + units) * c)
        conv(f"conv_transition_{m:02}", (m + units) * c, c, 1)
    for m in range(1, blocks + 1):
        norm(f"conv_end_{m:02}", c)
        conv(f"conv_end_{m:02}", c, 1, 3)
        layers[f"conv_end_{m:02}"] = layers["conv_end_01"]
        layers[f"weight_output_end_{m:02}"] = ("Scale", [numbers(1)])
    return layers


def run_memnet(layers, x: torch.Tensor, blocks: int, units: int) -> torch.Tensor:
    """What Caffe computes with these layers."""

    def step(name: str, *inputs: torch.Tensor) -> torch.Tensor:
        mean, variance, factor = (torch.from_numpy(a).double() for a in layers[f"bn_{name}"][1])
        once = 0 if factor == 0 else 1 / factor  # as Caffe does it
        gain, shift, weight, bias = (
            torch.from_numpy(a).double() for n in (f"scale_{name}", name) for a in layers[n][1]
        )
        h = torch.cat(inputs, 1)
        h = (h - (mean * once)[:, None, None]) / torch.sqrt((variance * once)[:, None, None] + 1e-5)
        h = F.relu(gain[:, None, None] * h + shift[:, None, None])
        return F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2)

    memory, total = [step("conv1", x)], torch.zeros_like(x)
    for m in range(1, blocks + 1):
        h, made = memory[-1], []
        for r in range(1, units + 1):
            h = h + step(f"conv{m:02}_{r:02}_b", step(f"conv{m:02}_{r:02}_a", h))
            made.append(h)
        memory.append(step(f"conv_transition_{m:02}", *memory, *made))
        image = x + step(f"conv_end_{m:02}", memory[-1])
        total = total + float(layers[f"weight_output_end_{m:02}"][1][0][0]) * image
    return total


def written(layers) -> bytes:
    made = [layer(name, kind, [blob(b) for b in blobs]) for name, (kind, blobs) in layers.items()]
    return net(layer("data", "HDF5Data"), *made, layer("HR_recovery", "Eltwise"), name="MemNet")


@pytest.mark.parametrize("factor", (1.0, 999.982, 0.0))
def test_memnet_computes_what_caffe_does(file, factor):
    layers = memnet_layers(3, 2, 4, factor)
    model = fastsr.load(file(written(layers)), dtype=torch.float64)
    assert type(model).__name__ == "OriginalMemNet"
    assert model.config == type(model.config)(in_channels=1, channels=4, num_memblock=3, num_resblock=2)
    x = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert relative_error(model(x), run_memnet(layers, x, 3, 2)) <= 1e-6


def test_memnet_with_one_copy_of_each_shared_convolution(file):
    layers = memnet_layers(2, 3, 4, 2.0)
    single = {n: v for n, v in layers.items() if n not in ("conv01_02_a", "conv01_03_a", "conv_end_02")}
    one, all_ = fastsr.load(file(written(single))), fastsr.load(file(written(layers), "all.caffemodel"))
    assert all(torch.equal(v, one.state_dict()[k]) for k, v in all_.state_dict().items())


def test_memnet_files_that_do_not_fit(file):
    layers = memnet_layers(2, 2, 4, 1.0)
    for change, message in (
        (
            {"conv02_02_a": ("Convolution", [numbers(4, 4, 3, 3), numbers(4)])},
            r"conv02_02_a\.weight to equal the other",
        ),
        ({"weight_output_end_02": ("Scale", [numbers(3)])}, r"weight_output_end_02\.weight to be one weight; got 3"),
        ({"bn_conv1": ("BatchNorm", [numbers(1), numbers(1)])}, r"key 'bn_conv1\.blobs\.2' is missing"),
        ({"extra": ("Convolution", [numbers(1, 1, 1, 1)])}, r"unexpected keys: extra\.weight"),
        ({"scale_conv_transition_02": ("ReLU", [])}, r"missing keys: memory\.1\.gate\.bn\.weight"),
    ):
        with pytest.raises(fastsr.LoadError, match=r"looks like memnet_original \(caffe\).*" + message):
            fastsr.load(file(written(layers | change)))


# Damage.

WEIGHT = raw(5, bytes(16))  # four floats


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (net(layer("relu", "ReLU")), "no layer has weights; expected a trained"),
        (net(layer("c", "PReLU", [WEIGHT + raw(7, raw(1, b"\5"))])), r"blob 0 of layer 'c': expected 5 values for the"),
        (net(layer("c", "PReLU", [WEIGHT])), "expected 1 values"),
        (net(layer("c", "PReLU", [raw(7, raw(1, b"\0"))])), "expected 0 values"),
        (net(layer("c", "PReLU", [WEIGHT + raw(7, raw(1, varint(-4)))])), "expected 18446744073709551612 values"),
        (net(layer("c", "PReLU", [WEIGHT + raw(7, raw(1, b"\1" * 99))])), "more than 32 axes"),
        (net(layer("c", "PReLU", [raw(5, bytes(15)) + raw(7, raw(1, b"\4"))])), r"got 3\.75"),
        (net(layer("c", "PReLU", [WEIGHT + raw(7, raw(1, b"\4"))]) * 2), r"two of 'c\.blobs\.0'"),
        (net(layer("c", "ReLU"))[:-1], r"claims \d+ bytes where \d+ are left"),
        (net() + b"\xa2\x06\xff\xff\xff\xff\x0f" + bytes(9), "claims 4294967295 bytes where 9 are left"),
        (net() + b"\xa2\x06" + b"\x80" * 11, "a number does not end"),
        (net() + b"\xa2\x06" + b"\x80" * 3, "a number runs past the end"),
        (net() + b"\xa2\x06" + b"\xff" * 9 + b"\2", "more than 64 bits"),
        (net() + b"\x0b", "field 1 has the unknown wire type 3"),
        (net(raw(100, raw(1, b"\xff"))), "not UTF-8"),
        (net(raw(100, raw(1, b"x" * 9999))), "a name of 9999 bytes"),
        (b"name: 'a net in words'\nlayer {}", "unknown wire type"),
    ],
)  # fmt: skip
def test_damage_is_named(file, data, message):
    with pytest.raises(CheckpointError, match=r"load: .*a\.caffemodel: .*" + message):
        fastsr.load(file(data))


def test_what_is_claimed_is_not_allocated(file):
    """Four values with the shape of 256 GiB, and ten thousand layers that name the same few bytes' worth."""
    huge = net(layer("c", "Convolution", [WEIGHT + raw(7, raw(1, varint(1 << 12) * 3))]))
    many = net(layer("r", "ReLU") * 10_000)
    for data, message in ((huge, "expected 68719476736 values"), (many, "no layer has weights")):
        path = file(data)
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=message):
            checkpoints.read(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 200_000
