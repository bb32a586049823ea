"""Models of spandrel, ESRGAN and RCAN: `load` takes them as they are and gives what they give."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

import fastsr
from conftest import _fill, parity_case, relative_error


def import_spandrel():
    """spandrel. It imports torchvision, which pins a torch of its own, for two networks that are not used here (LaMa,
    RestoreFormer): empty names take its place during the import where it is not installed."""
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.InterpolationMode = functional.rotate = functional.normalize = None  # type: ignore[attr-defined]
    names = {"torchvision": types.ModuleType("torchvision"), "torchvision.transforms": types.ModuleType("transforms")}
    placeholders = {} if importlib.util.find_spec("torchvision") else {**names, functional.__name__: functional}
    sys.modules.update(placeholders)
    try:
        return pytest.importorskip("spandrel", reason="spandrel is not installed: pip install --no-deps spandrel")
    finally:
        for name in placeholders:
            del sys.modules[name]


spandrel = import_spandrel()


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Synthetic weights by the rule of the parity cases."""
    return {k: torch.from_numpy(_fill.fill(k, s, k.rsplit(".")[-1])).clone() for k, s in shapes.items()}


def conv(name: str, out: int, into: int, k: int = 3) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into, k, k), f"{name}.bias": (out,)}


def esrgan_state(dialect: str, scale: int, unshuffle: int = 1, channels: int = 3) -> dict[str, torch.Tensor]:
    """A small RRDBNet with 2 blocks, under the keys of BasicSR, of the authors (new) or of their first release."""
    f, g, steps = 16, 32, {1: 0, 2: 1, 4: 2}[scale * unshuffle]
    names = {
        "basicsr": ("conv_first", "body.{}.rdb{}.conv{}", "conv_body", "conv_up{}", "conv_hr", "conv_last"),
        "new": ("conv_first", "RRDB_trunk.{}.RDB{}.conv{}", "trunk_conv", "upconv{}", "HRconv", "conv_last"),
        "old": ("model.0", "model.1.sub.{}.RDB{}.conv{}.0", "model.1.sub.2", None, None, None),
    }[dialect]
    first, block, body, up, hr, last = names
    shapes = conv(first, f, channels * unshuffle**2)
    for b in range(2):
        for d in (1, 2, 3):
            for n in range(1, 6):
                shapes |= conv(block.format(b, d, n), g if n < 5 else f, f + (n - 1) * g)
    shapes |= conv(body, f, f)
    ups = [up.format(n) if up else f"model.{3 * n}" for n in range(1, steps + 1)]
    for name in ups:
        shapes |= conv(name, f, f)
    shapes |= conv(hr or f"model.{3 * steps + 2}", f, f) | conv(last or f"model.{3 * steps + 4}", channels, f)
    return filled(shapes)


def rcan_state(scale: int, norm: bool = True, unshuffle: int = 1, channels: int = 3) -> dict[str, torch.Tensor]:
    """A small RCAN of 2 groups of 1 block; `scale` is the tail's."""
    f, r = 16, 2
    shapes = conv(f"head.{int(unshuffle > 1)}", f, channels * unshuffle**2)
    for g in range(2):
        for n in (0, 2):
            shapes |= conv(f"body.{g}.body.0.body.{n}", f, f)
        shapes |= conv(f"body.{g}.body.0.body.3.conv_du.0", r, f, 1) | conv(
            f"body.{g}.body.0.body.3.conv_du.2", f, r, 1
        )
        shapes |= conv(f"body.{g}.body.1", f, f)
    shapes |= conv("body.2", f, f)
    for n in range(1 if scale == 3 else scale.bit_length() - 1):
        shapes |= conv(f"tail.0.{2 * n}", 9 * f if scale == 3 else 4 * f, f)
    state = filled(shapes | conv("tail.1", channels, f))
    if norm:
        shift = 255 * torch.tensor([0.4488, 0.4371, 0.4040])
        for name, bias in (("sub_mean", -shift), ("add_mean", shift)):
            state |= {f"{name}.weight": torch.eye(3)[:, :, None, None], f"{name}.bias": bias}
    return state


def compare(state: dict[str, torch.Tensor], size: tuple[int, int], channels: int = 3) -> fastsr.models.Network:
    """Loads the state through spandrel, hands the descriptor and its module to `load`, and compares outputs."""
    descriptor = spandrel.ModelLoader(device="cpu").load_from_state_dict(dict(state))
    model = fastsr.load(descriptor)
    x = torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = descriptor.model(x.clone())  # its RCAN scales its input in place
        double = descriptor.model.double()(x.double())
        descriptor.model.float()
        assert relative_error(model(x), expected) <= 1e-5
        assert relative_error(fastsr.load(descriptor, dtype=torch.float64)(x.double()), double) <= 1e-12
        assert torch.equal(fastsr.load(descriptor.model)(x), model(x))
        assert torch.equal(model.super_resolve(x, descriptor.scale), model(x))
    assert model.scales == (descriptor.scale,) and model.value_range == (0, 1)
    return model


@pytest.mark.parametrize("dialect", ("basicsr", "new", "old"))
@pytest.mark.parametrize("scale", (1, 2, 4))
def test_esrgan(dialect, scale):
    compare(esrgan_state(dialect, scale), (5, 6))


@pytest.mark.parametrize("size", ((8, 12), (7, 9)))
@pytest.mark.parametrize(("scale", "unshuffle"), ((2, 2), (1, 4)))
def test_esrgan_with_pixel_unshuffle(scale, unshuffle, size):
    assert compare(esrgan_state("basicsr", scale, unshuffle), size).config.unshuffle == unshuffle


def test_esrgan_of_one_channel():
    assert compare(esrgan_state("basicsr", 4, channels=1), (5, 4), channels=1).colour == "y"


@pytest.mark.parametrize("norm", (True, False))
@pytest.mark.parametrize("scale", (2, 3, 4, 8))
def test_rcan(scale, norm):
    compare(rcan_state(scale, norm), (5, 6))


@pytest.mark.parametrize("norm", (True, False))
@pytest.mark.parametrize(("unshuffle", "size"), ((2, (6, 8)), (2, (5, 7)), (4, (7, 9))))
def test_rcan_with_pixel_unshuffle(unshuffle, size, norm):
    assert compare(rcan_state(4, norm, unshuffle), size).config.unshuffle == unshuffle


def test_rcan_of_one_channel():
    assert compare(rcan_state(2, norm=False, channels=1), (5, 4), channels=1).colour == "y"


def test_the_same_weights_as_a_file_take_the_authors_range():
    """spandrel's RCAN takes 0..1 whatever the file; the file alone means the authors' network, which takes 0..255."""
    case = parity_case("rcan_tiny_x4")
    descriptor = spandrel.ModelLoader(device="cpu").load_from_state_dict(case.state_dict())
    wrapped, alone = fastsr.load(descriptor), fastsr.load(case.state_dict())
    assert (wrapped.value_range, alone.value_range) == ((0, 1), (0, 255))
    with torch.inference_mode():
        x = case.tensors["input"].float()
        assert relative_error(255 * wrapped(x / 255), case.tensors["output"]) <= 1e-4
    assert fastsr.load(wrapped).config == wrapped.config
