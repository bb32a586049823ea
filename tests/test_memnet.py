"""MemNet: training with batch statistics, both forms against second statements of them, files, sizes, the operator.

No output of the original's authors is stored, so `restated_original` below, written from the paper and the description
of their layers, stands for them, beside the published weight count and layer counts.
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsr
from conftest import parity_case, relative_error
from fastsr.image.resize import imresize
from fastsr.models.memnet import affine
from fastsr.ops import memory_block

SIZES = [
    {"in_channels": 1, "channels": 4, "num_memblock": 2, "num_resblock": 3},
    {"in_channels": 3, "channels": 2, "num_memblock": 3, "num_resblock": 1},
    {"in_channels": 1, "channels": 2, "num_memblock": 1, "num_resblock": 2},
]


def small(name: str, **changed):
    """A network whose batch norms have statistics and whose ensemble has weights of their own."""
    torch.manual_seed(0)
    model = fastsr.create(name, **(SIZES[0] | changed)).double()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_mean") or "bn" in key and key.endswith("bias"):
                value.normal_(0, 0.3)
            elif key.endswith("running_var") or key == "ensemble" or "bn" in key and key.endswith("weight"):
                value.uniform_(0.5, 1.5)
    return model


def image(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# Both forms once more.


class PlainPort(nn.Module):
    """The port with torch's modules; they are created by key, so its state dict is the port's."""

    def __init__(self, in_channels: int, channels: int, num_memblock: int, num_resblock: int) -> None:
        super().__init__()
        self.blocks, self.units = num_memblock, num_resblock
        self.parts = nn.ModuleDict()
        self._add("feature_extractor", in_channels, channels, 3)
        self._add("reconstructor", channels, in_channels, 3)
        for m in range(num_memblock):
            for r in range(num_resblock):
                for i in (1, 2):
                    self._add(f"dense_memory.{m}.recursive_unit.{r}.relu_conv{i}", channels, channels, 3)
            self._add(f"dense_memory.{m}.gate_unit", (num_resblock + m + 1) * channels, channels, 1)

    def _add(self, key: str, inputs: int, outputs: int, k: int) -> None:
        conv = nn.Conv2d(inputs, outputs, k, padding=k // 2, bias=False)
        self.parts[key.replace(".", "/")] = nn.ModuleDict({"bn": nn.BatchNorm2d(inputs), "conv": conv})

    def by_key(self) -> dict[str, torch.Tensor]:
        return {k.removeprefix("parts.").replace("/", "."): v for k, v in self.state_dict(keep_vars=True).items()}

    def run(self, key: str, x: torch.Tensor) -> torch.Tensor:
        part = self.parts[key.replace(".", "/")]
        return part["conv"](torch.relu(part["bn"](x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = [self.run("feature_extractor", x)]
        for m in range(self.blocks):
            h, made = memory[-1], []
            for r in range(self.units):
                unit = f"dense_memory.{m}.recursive_unit.{r}.relu_conv"
                h = h + self.run(unit + "2", self.run(unit + "1", h))
                made.append(h)
            memory.append(self.run(f"dense_memory.{m}.gate_unit", torch.cat(made + memory, 1)))
        return x + self.run("reconstructor", memory[-1])


def plain_port(model) -> PlainPort:
    c = model.config
    plain = PlainPort(c.in_channels, c.channels, c.num_memblock, c.num_resblock).double().train(model.training)
    assert plain.by_key().keys() == model.state_dict().keys()
    with torch.no_grad():
        for key, value in plain.by_key().items():
            value.copy_(model.state_dict()[key])
    return plain


def restated_original(state, x: torch.Tensor, blocks: int, units: int, training: bool) -> list[torch.Tensor]:
    """[image_1, ..., image_M, weighted sum]; `state` may hold a convolution of its own for each unit."""

    def layer(bn: str, conv: str, *inputs: torch.Tensor) -> torch.Tensor:
        h = torch.cat(inputs, 1)
        mean, var = state[bn + ".running_mean"].clone(), state[bn + ".running_var"].clone()
        h = F.batch_norm(h, mean, var, state[bn + ".weight"], state[bn + ".bias"], training, eps=1e-5)
        weight = state[conv + ".weight"]
        return F.conv2d(h.clamp(min=0), weight, state[conv + ".bias"], padding=weight.shape[-1] // 2)

    gates = [layer("conv1.bn", "conv1.conv", x)]
    images = []
    for m in range(blocks):
        h, made = gates[-1], []
        for r in range(units):
            a, b = (f"memory.{m}.conv_{i}" for i in "ab")
            own = f"memory.{m}.{r}.conv_a.weight" in state
            a, b = (f"memory.{m}.{r}.conv_{i}" for i in "ab") if own else (a, b)
            middle = layer(f"memory.{m}.bn_a.{r}", a, h)
            h = h + layer(f"memory.{m}.bn_b.{r}", b, middle)
            made.append(h)
        gates.append(layer(f"memory.{m}.gate.bn", f"memory.{m}.gate.conv", *gates, *made))
        images.append(x + layer(f"end_bn.{m}", "end_conv", gates[-1]))
    return [*images, sum(state["ensemble"][m] * images[m] for m in range(blocks))]


# The port.


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_port_trains_as_torchs_modules_do(sizes):
    """Outputs, gradients and running averages over two steps, then the evaluation they lead to."""
    model = small("memnet", **sizes).train()
    plain = plain_port(model)
    for step in range(2):
        x = image(2, sizes["in_channels"], 5, 4) + step
        made, expected = model(x), plain(x)
        torch.testing.assert_close(made, expected)
        made.square().sum().backward()
        expected.square().sum().backward()
        theirs = plain.by_key()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs[key].grad)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, theirs[key].detach())
    assert model.dense_memory[0].gate_unit.bn.num_batches_tracked.item() == 2
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_gradients_in_evaluation():
    model, x = small("memnet"), image(2, 1, 4, 3).requires_grad_()
    plain, again = plain_port(model), x.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    plain(again).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.by_key()[key].grad)


def test_frozen_batch_norms_in_training():
    """Fine-tuning with fixed statistics: the output of evaluation, and only the one norm that trains moves."""
    model, x = small("memnet"), image(2, 1, 4, 5)
    plain = plain_port(model)
    expected = model(x)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.testing.assert_close(model(x), expected)
    model.dense_memory[1].recursive_unit[0].relu_conv2.bn.train()
    plain.parts["dense_memory/1/recursive_unit/0/relu_conv2"]["bn"].train()
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(dict(model.state_dict()), {k: v.detach() for k, v in plain.by_key().items()})


@pytest.mark.parametrize("name", ("memnet", "memnet_original"))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_are_read_from_the_file(name, sizes):
    model = small(name, **sizes)
    loaded = fastsr.load(dict(model.state_dict()), dtype=torch.float64)
    x = image(1, sizes["in_channels"], 6, 5)
    assert type(loaded) is type(model) and loaded.config == model.config and torch.equal(loaded(x), model(x))
    assert loaded.colour == ("rgb" if sizes["in_channels"] == 3 else "y")
    with pytest.raises(ValueError, match="memnet: expected every size to be at least 1"):
        fastsr.create(name, num_memblock=0)


def test_the_build_of_the_case_creates_it():
    case = parity_case("memnet")
    model = fastsr.create("memnet", **case.about["build"])
    assert model.parameter_count == case.about["parameters"] == 2_905_474
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: s for k, s, _ in case.about["state_dict"]}


def test_files_older_than_the_batch_counters():
    model = small("memnet")
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    loaded = fastsr.load(state, dtype=torch.float64)
    assert torch.equal(loaded(image(1, 1, 4, 4)), model(image(1, 1, 4, 4)))
    assert loaded.state_dict()["reconstructor.bn.num_batches_tracked"].item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("reconstructor.bn.num_batches_tracked"), r"missing keys: reconstructor\.bn\.num_batches"),
        (lambda s: s.pop("dense_memory.1.gate_unit.conv.weight"), r"missing keys: dense_memory\.1\.gate_unit\.conv"),
        (lambda s: s.update({"dense_memory.0.gate_unit.conv.bias": torch.zeros(4)}), "unexpected keys"),
        (lambda s: s.update({"reconstructor.conv.weight": torch.zeros(2, 4, 3, 3)}), r"wrong shapes: reconstructor"),
    ],
)
def test_a_file_that_nearly_fits(change, message):
    state = dict(small("memnet").state_dict())
    change(state)
    with pytest.raises(fastsr.LoadError, match="looks like memnet .*" + message):
        fastsr.load(state)


# The original.


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("sizes", [*SIZES, {"channels": 2, "num_memblock": 6, "num_resblock": 6}], ids=str)
def test_the_original_is_its_description(sizes, training):
    model, x = small("memnet_original", **sizes).train(training), image(2, sizes.get("in_channels", 1), 4, 5)
    c = model.config
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = restated_original(state, x, c.num_memblock, c.num_resblock, training)
    made = model(x)
    if not training:
        assert isinstance(made, torch.Tensor) and relative_error(made, expected[-1]) < 1e-12
        return
    assert isinstance(made, tuple) and len(made) == c.num_memblock + 1
    for one, other in zip(made, expected, strict=True):
        assert relative_error(one, other) < 1e-12


def test_recursions_share_their_weights():
    """The gradient of a shared convolution is the sum of those of copies, one for each recursion."""
    model, x, units = small("memnet_original").train(), image(2, 1, 4, 5), 3
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    copies = {}
    for name in ("conv_a.weight", "conv_a.bias", "conv_b.weight", "conv_b.bias"):
        for m in range(2):
            for r in range(units):
                copies[f"memory.{m}.{r}.{name}"] = state[f"memory.{m}.{name}"].clone().requires_grad_()
    sum(y.square().sum() for y in restated_original(state | copies, x, 2, units, True)).backward()
    sum(y.square().sum() for y in model(x)).backward()
    for m, block in enumerate(model.memory):
        for name, parameter in block.named_parameters():
            if name.startswith("conv_"):
                parts = [copies[f"memory.{m}.{r}.{name}"].grad for r in range(units)]
                scale = max(p.abs().max() for p in parts)  # a bias in front of a batch norm has no gradient but noise
                torch.testing.assert_close(parameter.grad, sum(parts), rtol=1e-9, atol=1e-9 * max(scale.item(), 1.0))


def test_the_original_counts_as_published():
    """The paper: 677K weights for M6R6 (those of the convolutions). Batch norms, biases, ensemble weights come on top:
    1, 64 and 57 * 64 channels in stem, units and gates."""
    model = fastsr.create("memnet_original")
    assert sum(p.numel() for p in model.parameters() if p.dim() == 4) == 676_992
    norms = 2 * (1 + 6 * 12 * 64 + (6 * 6 + 21) * 64 + 6 * 64)
    assert model.parameter_count == 676_992 + norms + (64 + 6 * 3 * 64 + 1) + 6


@pytest.mark.parametrize(("size", "layers"), [(6, 80), (10, 212)])
def test_the_original_is_as_deep_as_its_names_say(size, layers):
    """MemNet_M6R6_80C64, MemNet_M10R10_212C64: convolutions in use, that to the output counted once."""
    model = small("memnet_original", channels=1, num_memblock=size, num_resblock=size).train()
    calls = [call for call in fastsr.explain(model, image(1, 1, 2, 2)) if call.op == "conv_act"]
    assert len(calls) - (size - 1) == layers


def test_the_ensemble_is_a_weighted_sum():
    model, x = small("memnet_original"), image(1, 1, 4, 4)
    expected = model(x)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    *images, total = model(x)
    assert torch.equal(total, expected)
    torch.testing.assert_close(total, torch.einsum("m,mnchw->nchw", model.ensemble, torch.stack(images)))


# Images.


@pytest.mark.parametrize("scale", (2, 3, 4))
@pytest.mark.parametrize("name", ("memnet", "memnet_original"))
def test_super_resolve(name, scale):
    """Any size; and where the network adds nothing, what comes out is the interpolated image that goes in."""
    model = small(name).eval()
    assert model.scales == (2, 3, 4)
    for size in ((1, 1), (5, 3)):
        made = model.super_resolve(image(2, 1, *size), scale)
        assert made.shape == (2, 1, size[0] * scale, size[1] * scale) and torch.isfinite(made).all()
    with torch.no_grad():
        if name == "memnet":
            model.reconstructor.conv.weight.zero_()
        else:
            model.end_conv.weight.zero_()
            model.end_conv.bias.zero_()
            model.ensemble.copy_(torch.tensor([0.25, 0.75]))
    x = image(1, 1, 4, 5)
    torch.testing.assert_close(model.super_resolve(x, scale), imresize(x, scale))
    torch.testing.assert_close(model.train().super_resolve(x, scale), imresize(x, scale))


@pytest.mark.parametrize("name", ("memnet", "memnet_original"))
@pytest.mark.parametrize("shape", ((7, 5), (7, 5, 3)), ids=("gray", "colour"))
def test_photographs(name, shape):
    photograph = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    model = small(name).float().train()
    assert fastsr.upscale(photograph, model, scale=3).shape == (21, 15, *shape[2:]) and model.training


# As modules.


@pytest.mark.parametrize("name", ("memnet", "memnet_original"))
def test_copies_pickles_and_compiles(name):
    model, x = small(name), image(1, 1, 4, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    torch.testing.assert_close(fastsr.optimize(model)(x), model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_affine_is_the_batch_norm():
    bn = small("memnet").dense_memory[0].gate_unit.bn
    bn.eps = 0.25
    x = image(2, bn.num_features, 3, 3)
    scale, shift = affine(bn)
    torch.testing.assert_close(x * scale[:, None, None] + shift[:, None, None], bn(x))
    exact = [t.to(torch.bfloat16) for t in affine(copy.deepcopy(bn).bfloat16().double())]
    assert all(torch.equal(a, b) for a, b in zip(affine(bn.bfloat16()), exact, strict=True))


# The operator.


def arguments(units: int = 2, memories: int = 2, c: int = 2):
    g = torch.Generator().manual_seed(3)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    wide = (units + memories) * c
    return {
        "long_term": [make(1, c, 3, 4) for _ in range(memories)],
        "weights": [make(c, c, 3, 3) for _ in range(2)],
        "biases": [make(c) for _ in range(2)],
        "pre_scales": [make(c) for _ in range(2 * units)],
        "pre_shifts": [make(c) for _ in range(2 * units)],
        "gate_weight": make(c, wide, 1, 1),
        "gate_bias": make(c),
        "gate_scale": make(wide),
        "gate_shift": make(wide),
    }


def test_two_weights_are_those_of_every_unit():
    shared = arguments(units=3)
    repeated = shared | {"weights": shared["weights"] * 3, "biases": shared["biases"] * 3}
    assert torch.equal(memory_block(**shared), memory_block(**repeated))


def test_gate_order():
    """The same weights in the other order of the gate's inputs are the same block."""
    args, c = arguments(units=2, memories=1), 2
    order = [*range(2 * c, 3 * c), *range(2 * c)]  # [u1, u2, m1] -> [m1, u1, u2]
    moved = args | {"gate_weight": args["gate_weight"][:, order]}
    moved |= {k: args[k][order] for k in ("gate_scale", "gate_shift")}
    torch.testing.assert_close(memory_block(**args), memory_block(**moved, long_term_first=True))
    assert not torch.allclose(memory_block(**args), memory_block(**args, long_term_first=True))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("long_term", [], "long_term holds at least one"),
        ("pre_shifts", [], "two pre_scales and two pre_shifts a unit"),
        ("weights", [torch.zeros(2, 2, 3, 3, dtype=torch.float64)] * 3, "two weights, or one for each of the 4"),
        ("weights", [torch.zeros(2, 2, 2, 2, dtype=torch.float64)] * 2, "odd k"),
        ("biases", [torch.zeros(2, dtype=torch.float64)], "no biases, or a"),
        ("gate_weight", torch.zeros(2, 6, 1, 1, dtype=torch.float64), r"gate_weight is \(2, 8, 1, 1\)"),
        ("gate_scale", torch.zeros(6, dtype=torch.float64), r"gate_scale and gate_shift are \(8,\)"),
        ("gate_bias", torch.zeros(2), "one dtype and device"),
    ],
)
def test_memory_block_says_what_does_not_fit(name, value, message):
    with pytest.raises(ValueError, match=r"fastsr::memory_block: expected .*" + message):
        memory_block(**(arguments() | {name: value}))
