"""ESRGAN beyond the parity cases: key dialects, other sizes, any image size, the discriminator, interpolation."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsr
from conftest import PARITY, parity_case, relative_error

DIALECTS = json.loads((PARITY / "esrgan_key_dialects.json").read_text())
COLUMNS = {name: DIALECTS["columns"].index(name) for name in ("old", "new", "basicsr")}


def renamed(state, source, target):
    """A two-block x4 state dict under the keys of another dialect."""
    names = {row[COLUMNS[source]]: row[COLUMNS[target]] for row in DIALECTS["rows"]}
    return {names[key]: value for key, value in state.items()}


class OldDense(nn.Module):
    """The first release's dense block, restated: each layer a Sequential, so that keys end in `.0.weight`."""

    def __init__(self, nf, gc):
        super().__init__()
        for n in range(1, 6):
            setattr(self, f"conv{n}", nn.Sequential(nn.Conv2d(nf + (n - 1) * gc, nf if n == 5 else gc, 3, 1, 1)))

    def forward(self, x):
        grown = x
        for n in range(1, 5):
            y = getattr(self, f"conv{n}")(grown)
            grown = torch.cat([grown, torch.where(y > 0, y, y * 0.2)], 1)
        return self.conv5(grown) * 0.2 + x


class OldRRDB(nn.Module):
    def __init__(self, nf, gc):
        super().__init__()
        self.RDB1, self.RDB2, self.RDB3 = OldDense(nf, gc), OldDense(nf, gc), OldDense(nf, gc)

    def forward(self, x):
        return self.RDB3(self.RDB2(self.RDB1(x))) * 0.2 + x


class OldShortcut(nn.Module):
    def __init__(self, sub):
        super().__init__()
        self.sub = sub

    def forward(self, x):
        return x + self.sub(x)


class OldRRDBNet(nn.Module):
    """The first release's network in plain torch: one Sequential, three places for each upsampling step."""

    def __init__(self, colours=3, nf=8, nb=1, gc=4, steps=2):
        super().__init__()
        sub = nn.Sequential(*(OldRRDB(nf, gc) for _ in range(nb)), nn.Conv2d(nf, nf, 3, 1, 1))
        layers = [nn.Conv2d(colours, nf, 3, 1, 1), OldShortcut(sub)]
        for _ in range(steps):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(nf, nf, 3, 1, 1), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(nf, nf, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(nf, colours, 3, 1, 1)]
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("target", COLUMNS)
@pytest.mark.parametrize(("name", "source"), [("esrgan_tiny_x4", "new"), ("esrgan_basicsr_tiny_x4", "basicsr")])
def test_each_dialect_gives_the_authors_output(name, source, target):
    case = parity_case(name)
    model = fastsr.load(renamed(case.state_dict(), source, target), dtype=torch.float64)
    with torch.inference_mode():
        assert relative_error(model(case.tensors["input"].double()), case.tensors["output"]) < 1e-6
    assert list(model.state_dict()) == [row[COLUMNS["new"]] for row in DIALECTS["rows"]]
    back = renamed(model.state_dict(), "new", target)
    again = fastsr.load(back)
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[k].double(), v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("wrapping", ["params", "params_ema", "state_dict", "module."])
def test_wrapped_files_load(wrapping, tmp_path):
    state = parity_case("esrgan_basicsr_tiny_x2").state_dict()
    if wrapping == "module.":
        content = {"module." + key: value for key, value in state.items()}
    else:
        content = {wrapping: state}
    torch.save(content, tmp_path / "x2.pth")
    model = fastsr.load(tmp_path / "x2.pth")
    assert (model.config.scale, model.config.unshuffle, model.scales) == (2, 2, (2,))
    assert torch.equal(model.state_dict()["RRDB_trunk.1.RDB2.conv3.bias"], state["body.1.rdb2.conv3.bias"])


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize(("colours", "nf", "nb", "gc"), [(3, 8, 1, 4), (1, 6, 3, 5)])
def test_old_layout_of_any_size(steps, colours, nf, nb, gc):
    torch.manual_seed(steps)
    reference = OldRRDBNet(colours, nf, nb, gc, steps).double()
    top = [k for k in reference.state_dict() if k.endswith(".weight") and k.count(".") == 2]
    assert top == DIALECTS["old_dialect_other_scales"]["weights"][str(2**steps)]
    model = fastsr.load(reference)
    config = model.config
    assert (config.scale, config.unshuffle, config.features, config.blocks) == (2**steps, 1, nf, nb)
    assert (config.growth, config.in_channels, config.out_channels) == (gc, colours, colours)
    x = torch.rand(2, colours, 5, 6, dtype=torch.float64)
    with torch.inference_mode():
        assert relative_error(model(x), reference(x)) < 1e-12


def test_module_keeps_its_device_and_dtype_and_its_weights_exactly():
    reference = OldRRDBNet().double()
    model = fastsr.load(reference)
    assert model.dtype == torch.float64
    assert torch.equal(model.state_dict()["conv_first.weight"], reference.state_dict()["model.0.weight"])


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (3, 1), (2, 9), (4, 8)])
@pytest.mark.parametrize(("scale", "unshuffle"), [(1, 4), (2, 2), (4, 1), (2, 1)])
def test_any_size_is_enlarged(scale, unshuffle, size):
    torch.manual_seed(0)
    model = fastsr.create("esrgan", scale=scale, unshuffle=unshuffle, features=8, blocks=1, growth=4).double()
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    h, w = size
    down, right = -h % unshuffle, -w % unshuffle
    padded = np.pad(x, ((0, 0), (0, 0), (0, down), (0, 0)), mode="reflect" if down < h else "edge")
    padded = np.pad(padded, ((0, 0), (0, 0), (0, 0), (0, right)), mode="reflect" if right < w else "edge")
    with torch.inference_mode():
        made = model.super_resolve(x, scale)
        expected = model(torch.from_numpy(padded))[:, :, : h * scale, : w * scale]
    assert made.shape == (2, 3, h * scale, w * scale)
    assert torch.equal(made, expected) and torch.equal(model(x), made)


def test_gray_network():
    model = fastsr.create("esrgan", in_channels=1, out_channels=1, features=8, blocks=1, growth=4)
    assert model.colour == "y"
    assert fastsr.load(model.state_dict()).config == model.config
    assert fastsr.upscale(np.zeros((3, 2), np.uint8), model).shape == (12, 8)


def test_sizes_that_make_no_network_are_refused():
    for wrong in ({"scale": 3}, {"unshuffle": 3}, {"blocks": 0}, {"features": 0}):
        with pytest.raises(ValueError, match="esrgan: expected"):
            fastsr.create("esrgan", **wrong)


def test_nearly_right_files_say_what_is_wrong():
    state = parity_case("esrgan_tiny_x4").state_dict()
    short = {k: v for k, v in state.items() if k != "RRDB_trunk.1.RDB3.conv5.bias"}
    with pytest.raises(fastsr.LoadError, match=r"esrgan \(new\).*missing keys: RRDB_trunk\.1\.RDB3\.conv5\.bias"):
        fastsr.load(short)
    plus = renamed(state, "new", "old") | {"model.1.sub.0.RDB1.conv1x1.weight": torch.zeros(32, 64, 1, 1)}
    with pytest.raises(fastsr.LoadError, match=r"unexpected keys: model\.1\.sub\.0\.RDB1\.conv1x1\.weight"):
        fastsr.load(plus)
    shuffled = {k: v for k, v in state.items() if not k.startswith("upconv")}
    shuffled["conv_first.weight"] = torch.zeros(64, 12, 3, 3)
    with pytest.raises(fastsr.LoadError, match="12 channels go in, 3 come out, and 0 upsampling steps"):
        fastsr.load(shuffled)
    narrow = state | {"HRconv.weight": torch.zeros(32, 64, 3, 3)}
    with pytest.raises(fastsr.LoadError, match=r"wrong shapes: HRconv\.weight \[32, 64, 3, 3\] instead of"):
        fastsr.load(narrow)


def test_copies_compute_the_same():
    model = fastsr.create("esrgan", features=8, blocks=2, growth=4)
    x = torch.rand(1, 3, 5, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


def test_trains():
    """Every parameter of the generator gets a gradient, that of the definition in plain torch."""
    torch.manual_seed(0)
    reference = OldRRDBNet(nf=4, gc=2, steps=1).double()
    model = fastsr.load(reference).train()
    x = torch.rand(1, 3, 4, 5, dtype=torch.float64)
    reference(x).square().sum().backward()
    model(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-10


# The discriminator.


def test_discriminator_for_256():
    small, large = (fastsr.create("esrgan_discriminator", input_size=s, features=4) for s in (128, 256))
    width = 8 * 4
    level = width * width * (9 + 16) + 2 * 2 * width  # 3x3 and 4x4 convolutions without bias, two batch norms
    assert large.parameter_count - small.parameter_count == level
    assert large(torch.rand(2, 3, 256, 256)).shape == (2, 1)
    assert fastsr.load(large.state_dict()).config == large.config
    with pytest.raises(ValueError, match="expected 256x256 images; got 128x128"):
        large(torch.rand(1, 3, 128, 128))
    with pytest.raises(ValueError, match="expected input_size 128 or 256"):
        fastsr.create("esrgan_discriminator", input_size=96)


def test_discriminator_trains_on_batch_statistics():
    torch.manual_seed(0)
    model = fastsr.create("esrgan_discriminator", features=4).train()
    x = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        y = F.leaky_relu(F.conv2d(x, model.conv0_0.weight, model.conv0_0.bias, padding=1), 0.2)
        y = F.conv2d(y, model.conv0_1.weight, stride=2, padding=1)
        model(x)
    torch.testing.assert_close(model.bn0_1.running_mean, 0.1 * y.mean((0, 2, 3)))
    assert model.bn0_1.num_batches_tracked == 1


# Interpolation.


def two_networks():
    torch.manual_seed(1)
    return [fastsr.create("esrgan", features=6, blocks=1, growth=3, scale=2) for _ in range(2)]


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.5])
def test_interpolation_is_linear_in_every_tensor(factor):
    a, b = two_networks()
    mixed = fastsr.interpolate(a, b, factor)
    for key, value in mixed.state_dict().items():
        one, two = a.state_dict()[key].double(), b.state_dict()[key].double()
        torch.testing.assert_close(value.double(), one + factor * (two - one), rtol=0, atol=1e-6)
        if factor in (0.0, 1.0):
            assert torch.equal(value, (b if factor else a).state_dict()[key])


def test_interpolation_leaves_its_arguments_alone():
    a, b = two_networks()
    before = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    mixed = fastsr.interpolate(a, b, 0.5)
    with torch.no_grad():
        mixed.conv_first.weight.zero_()
    for network, state in zip((a, b), before):
        assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def test_interpolation_of_files_in_different_dialects(tmp_path):
    new = parity_case("esrgan_tiny_x4").state_dict()
    other = {key: -2.0 * value for key, value in new.items()}
    torch.save(new, tmp_path / "psnr.pth")
    torch.save({"params_ema": renamed(other, "new", "basicsr")}, tmp_path / "gan.pth")
    mixed = fastsr.interpolate(tmp_path / "psnr.pth", tmp_path / "gan.pth", 0.25)  # 0.75 - 0.25 * 2
    for key, value in mixed.state_dict().items():
        torch.testing.assert_close(value, 0.25 * new[key])


def test_interpolation_takes_dtype_and_counters_from_the_first():
    a, b = (fastsr.create("esrgan_discriminator", features=2).double() for _ in range(2))
    a.bn2_1.num_batches_tracked.fill_(7)
    b.bn2_1.num_batches_tracked.fill_(100)
    a.bn2_1.running_var.fill_(1 / 3)
    mixed = fastsr.interpolate(a, b.float(), 0.25)
    assert mixed.dtype == torch.float64 and not mixed.training
    assert mixed.bn2_1.num_batches_tracked == 7
    half = torch.full((8,), 0.5, dtype=torch.float64)  # 3/4 of 1/3 and 1/4 of 1
    torch.testing.assert_close(mixed.bn2_1.running_var, half, rtol=1e-15, atol=0)


def test_interpolation_refuses_what_does_not_match():
    a, _ = two_networks()
    for other in (fastsr.create("esrgan", features=6, blocks=2, growth=3, scale=2), fastsr.create("carn", scale=2)):
        with pytest.raises(ValueError, match=r"(?s)one network and configuration; got a = ESRGAN.* and b = "):
            fastsr.interpolate(a, other, 0.5)
    with pytest.raises(ValueError, match="finite factor"):
        fastsr.interpolate(a, a, float("nan"))


# The operator.


def test_the_generator_is_made_of_operators_alone():
    model = fastsr.create("esrgan", features=4, blocks=2, growth=2)
    calls = [call.op for call in fastsr.explain(model, torch.rand(1, 3, 4, 4))]
    assert calls == ["conv_act", *6 * ["dense_block"], "conv_act", "conv_chain"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [torch.zeros(2, 4, 3, 3)]}, "two weights or more and as many biases"),
        ({"weights": [torch.zeros(2, 4, 3, 3), torch.zeros(4, 5, 1, 1)]}, r"weights\[1\] is \(G, 6, s, s\) with odd s"),
        ({"weights": [torch.zeros(2, 4, 2, 2), torch.zeros(4, 6, 1, 1)]}, r"weights\[0\] is \(G, 4, s, s\) with odd s"),
        ({"weights": [torch.zeros(2, 4, 3, 3), torch.zeros(3, 6, 1, 1)]}, r"biases\[1\] is \(G,\)"),
        ({"weights": [torch.zeros(2, 4, 3, 3), torch.zeros(3, 6, 1, 1)], "biases": [torch.zeros(2), torch.zeros(3)]},
         "the last weight has as many outputs as x"),
        ({"outer": torch.zeros(1, 4, 5, 6)}, "outer has the shape of x"),
        ({"x": torch.zeros(1, 4, 5, 5, dtype=torch.float64)}, "one dtype and device"),
    ],
)  # fmt: skip
def test_dense_block_refuses_what_does_not_fit(change, message):
    fitting = {
        "x": torch.zeros(1, 4, 5, 5),
        "weights": [torch.zeros(2, 4, 3, 3), torch.zeros(4, 6, 1, 1)],
        "biases": [torch.zeros(2), torch.zeros(4)],
    }
    assert fastsr.ops.dense_block(**fitting).shape == (1, 4, 5, 5)
    with pytest.raises(ValueError, match=f"fastsr::dense_block: expected .*{message}"):
        fastsr.ops.dense_block(**(fitting | change))
