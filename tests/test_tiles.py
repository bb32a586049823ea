"""Images in parts: receptive fields, tiled equals whole, memory, what is not finite, the self-ensemble."""

import contextlib
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import fastsr
from conftest import ROOT, require_backend
from fastsr.image import io, tiles
from fastsr.image.passes import Pass
from fastsr.image.receptive import Source, reach
from fastsr.image.stream import upscale_to_tiff
from fastsr.models.sftgan import condition

IDN = {"features": 4, "blocks": 1, "block_widths": (4, 4, 8, 4, 4, 8), "slice": 4}
# Every network that enlarges images, shallow: name, configuration, the halo.
SHALLOW = {
    "carn x2": ("carn", {"scale": 2, "features": 2}, 21),
    "carn x3": ("carn", {"scale": 3, "features": 2}, 21),
    "carn x4, grouped": ("carn", {"scale": 4, "features": 8, "group": 4, "mobile": True}, 21),
    "zssr": ("zssr", {"width": 2, "depth": 3}, 3),
    "memnet": ("memnet", {"channels": 2, "num_memblock": 1, "num_resblock": 2}, 5),
    "memnet_original": ("memnet_original", {"channels": 2, "num_memblock": 1, "num_resblock": 2}, 5),
    "dbpn x2": ("dbpn", {"scale": 2, "features": 2, "width": 2, "stages": 2}, 11),
    "dbpn x4": ("dbpn", {"scale": 4, "features": 2, "width": 2, "stages": 2}, 6),
    "dbpn x8, residual": ("dbpn", {"scale": 8, "features": 2, "width": 2, "stages": 2, "residual": True}, 6),
    "ddbpn": ("ddbpn", {"features": 2, "width": 2, "stages": 2}, 6),
    "idn x2": ("idn", {"scale": 2, **IDN}, 12),
    "idn x3": ("idn", {"scale": 3, **IDN}, 11),
    "idn x4": ("idn", {"scale": 4, **IDN}, 10),
    "enhancenet": ("enhancenet", {"features": 2, "blocks": 1}, 5),
    "srfeat": ("srfeat", {"features": 2, "blocks": 2}, 10),
    "srfeat x8": ("srfeat", {"scale": 8, "features": 2, "blocks": 1}, 8),
    "msrn x3": ("msrn", {"scale": 3, "features": 2, "blocks": 1}, 8),
    "msrn_old x4": ("msrn_old", {"scale": 4, "features": 2, "blocks": 1}, 7),
    "rdn x3": ("rdn", {"scale": 3, "D": 2, "C": 2, "G": 2, "G0": 2}, 9),
    "rdn, 5x5": ("rdn", {"scale": 2, "D": 1, "C": 2, "G": 2, "G0": 2, "kernel": 5}, 11),
    "rdn_plain": ("rdn_plain", {"scale": 4, "D": 1, "C": 2, "G": 2}, 7),
    "rdn_original": ("rdn_original", {"scale": 2, "D": 1, "C": 2, "G": 2, "G0": 2, "block_width": 2}, 7),
    "esrgan x4": ("esrgan", {"features": 2, "growth": 2, "blocks": 1}, 19),
    "esrgan x2, unshuffled by 2": ("esrgan", {"scale": 2, "features": 2, "growth": 2, "blocks": 1, "unshuffle": 2}, 38),
    "esrgan x1, unshuffled by 4": ("esrgan", {"scale": 1, "features": 2, "growth": 2, "blocks": 1, "unshuffle": 4}, 76),
    "sftgan": ("sftgan", {"features": 2, "blocks": 1, "condition": 2, "hidden": 2}, 6),
    "sftgan, paper": ("sftgan", {"features": 2, "blocks": 1, "condition": 2, "hidden": 2, "paper": True}, 6),
    "rcan x2": ("rcan", {"scale": 2, "groups": 1, "blocks": 2, "features": 4, "hidden": 2}, 2),
    "rcan x8": ("rcan", {"scale": 8, "groups": 1, "blocks": 1, "features": 4, "hidden": 2}, 2),
    "rcan, unshuffled": ("rcan", {"scale": 2, "groups": 1, "blocks": 1, "features": 4, "hidden": 2, "unshuffle": 2}, 4),
    "rcan_basicsr x3": ("rcan_basicsr", {"scale": 3, "groups": 1, "blocks": 2, "features": 4, "hidden": 2}, 2),
}  # fmt: skip


def network_of(case, seed=0):
    name, config, _ = SHALLOW[case]
    torch.manual_seed(seed)
    return fastsr.create(name, **config).double()


def steps_of(case, scale=None):
    network = network_of(case)
    return Pass(network, scale or network.scales[0], small_segmentation() if network.name == "sftgan" else None)


def small_segmentation():
    stages = {"blocks": (1,) * 4, "widths": (4,) * 4, "outs": (12, 16, 20, 24)}
    return fastsr.create("outdoor_scene_seg", stem=(4, 4, 8), head=8, **stages).double()


def noise(height, width, channels=3, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, channels, height, width, generator=generator, dtype=dtype)


def in_parts(steps, values, tile, pad=tiles.EXACT, deterministic=False):
    """The tiles put together, and a count of how often each pixel was made."""
    n, c, h, w = values.shape
    whole = torch.full((n, c, h * steps.scale, w * steps.scale), torch.nan, dtype=values.dtype)
    count = torch.zeros(h * steps.scale, w * steps.scale)
    with torch.inference_mode():
        for core, result in tiles.parts(steps, values, tile, pad, deterministic):
            whole[core.scaled(steps.scale)] = result
            count[core.scaled(steps.scale)] += 1
    assert (count == 1).all()
    return whole


def whole_of(steps, values):
    with torch.inference_mode():
        return steps.finish(steps.begin(values))


def halo_of(steps, channels=3, pad=tiles.EXACT):
    with torch.inference_mode():
        tensors = steps.begin(noise(8, 8, channels))
    return tiles.halo(steps, tiles.Image(tensors, steps.ratios, steps.network.multiple), pad)


# How far networks look


@pytest.mark.parametrize("case", SHALLOW)
def test_halos(case):
    assert halo_of(steps_of(case)) == SHALLOW[case][2]


def test_colour_around_a_network_of_luma_is_part_of_what_is_looked_at():
    network = fastsr.create("memnet_original", channels=1, num_memblock=1, num_resblock=1).double()
    assert [halo_of(Pass(network, 4), channels) for channels in (1, 3)] == [3, 3]

    class Copy(Nearest):
        colour = "y"

    assert [halo_of(Pass(Copy(), 4), channels) for channels in (1, 3)] == [0, 2]  # the chroma's cubic interpolation


class Nearest(fastsr.Network):
    """Repeats every pixel, and may be told to do something to an image first."""

    name = "nearest"
    scales = (2, 3, 4)
    before = staticmethod(lambda x: x)

    def __init__(self, before=None, dtype=torch.float64):
        super().__init__(config=None)
        self.anchor = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
        if before is not None:
            self.before = before

    def super_resolve(self, x, scale):
        return self.before(x).repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def test_what_averages_over_the_image_has_no_halo():
    network = Nearest(lambda x: x + x.mean((2, 3), keepdim=True))
    with pytest.raises(ValueError, match="Nearest looks further than 1024 pixels, or at the whole image"):
        in_parts(Pass(network, 2), noise(20, 20), 10)
    assert in_parts(Pass(network, 2), noise(20, 20), 10, pad=3).shape == (1, 3, 40, 40)  # as asked
    rcan = network_of("rcan x2")
    source = [Source(3)]
    with torch.inference_mode():
        assert reach(lambda x: rcan.super_resolve(x[0], 2), source, 2, 1, limit=64) is None
        assert reach(lambda x: rcan.local_part(x[0], 2), [Source(4)], 2, 1, limit=64) == 2


def test_halos_of_shapes_that_no_network_here_has():
    weight = torch.zeros(1, 1, 3, 9, dtype=torch.float64)

    def wide(x):
        return torch.nn.functional.conv2d(x[0], weight, padding=(1, 4))

    def late(x):  # reads to the right and below only
        return torch.nn.functional.conv2d(torch.nn.functional.pad(x[0], (0, 33, 0, 33)), weight.new_zeros(1, 1, 34, 34))

    assert reach(wide, [Source(1)], 1, 1) == 4
    assert reach(late, [Source(1)], 1, 1) == 33
    assert reach(late, [Source(1)], 1, 1, limit=32) is None


def test_deep_networks_have_a_stated_halo_unless_asked():
    torch.manual_seed(0)
    deep = Pass(fastsr.create("rdn", D=5, C=8, G=1, G0=1, scale=2).double(), 2)
    assert halo_of(deep, pad=None) == 32 and halo_of(deep) == 45 and halo_of(deep, pad=7) == 7
    values = noise(5, 150)
    for pad, error in ((tiles.EXACT, 1e-13), (None, 1e-9)):
        torch.testing.assert_close(in_parts(deep, values, 20, pad), whole_of(deep, values), atol=error, rtol=0)
    shallow = steps_of("rdn x3")
    assert halo_of(shallow, pad=None) == halo_of(shallow) == 9


def test_measuring_is_not_explained():
    steps = steps_of("carn x2")
    assert fastsr.explain(halo_of, steps) == []
    assert halo_of(steps) == 21


# Tiled equals whole


@pytest.mark.parametrize("case", SHALLOW)
@pytest.mark.parametrize(("height", "width", "tile"), [(37, 53, 16), (1, 41, 7), (23, 29, 5)])
def test_tiled_equals_whole(case, height, width, tile):
    steps = steps_of(case)
    values = noise(height, width)
    whole = whole_of(steps, values)
    torch.testing.assert_close(in_parts(steps, values, tile), whole, atol=1e-12 * spread(whole), rtol=0)


def spread(values):
    return max(1.0, values.abs().max().item())


@pytest.mark.parametrize("case", SHALLOW)
def test_without_a_halo_tiles_show(case):
    """So that the test above can fail."""
    steps = steps_of(case)
    values = noise(37, 53)
    assert (in_parts(steps, values, 16, pad=0) - whole_of(steps, values)).abs().max() > 1e-4


@pytest.mark.parametrize("case", ["memnet", "idn x3", "rcan x2", "esrgan x2, unshuffled by 2"])
@pytest.mark.parametrize("channels", [1, 3])
def test_gray_and_batches(case, channels):
    steps = steps_of(case)
    values = torch.cat([noise(19, 26, channels, seed) for seed in range(3)])
    whole = whole_of(steps, values)
    torch.testing.assert_close(in_parts(steps, values, 8), whole, atol=1e-12 * spread(whole), rtol=0)


def test_parts_of_one_size_meet_the_borders():
    for height, width, tile, halo, multiple in [
        (100, 61, 16, 5, 1),
        (37, 90, 20, 12, 4),
        (9, 9, 4, 1, 2),
        (5, 3, 9, 9, 1),
    ]:
        shapes = set()
        for core in tiles.cores(height, width, tile, multiple):
            assert core.shape[0] <= max(tile, multiple) and core.shape[1] <= max(tile, multiple)
            part = tiles.surroundings(core, tile, halo, (height, width), multiple)
            shapes.add(part.shape)
            for start, stop, first, last, size in (
                (core.top, core.bottom, part.top, part.bottom, height),
                (core.left, core.right, part.left, part.right, width),
            ):
                assert start % multiple == 0 and first % multiple == 0
                assert 0 <= first <= max(0, start - halo) and min(size, stop + halo) <= last <= size
        assert multiple > 1 or len(shapes) == 1


# fastsr.upscale


def test_upscale_in_tiles():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    network = network_of("msrn x3")
    whole = fastsr.upscale(image, network, tile=None)
    for options in (
        {"tile": 16},
        {"tile": 16, "tile_pad": "exact"},
        {},
        {"tile": "auto"},
        {"tile": 9, "deterministic": True},
    ):
        result = fastsr.upscale(image, network, **options)
        assert np.abs(result.astype(int) - whole).max() <= (0 if not options or options == {"tile": "auto"} else 1)
        assert (result != whole).mean() < 1e-3  # a value that lies on a half
    deep = image.astype(np.uint16) * 257
    assert (
        np.abs(fastsr.upscale(deep, network, tile=16).astype(int) - fastsr.upscale(deep, network, tile=None)).max() <= 1
    )
    alpha = np.concatenate([image, image[..., :1]], 2)
    assert (
        np.abs(fastsr.upscale(alpha, network, tile=16).astype(int) - fastsr.upscale(alpha, network, tile=None)).max()
        <= 1
    )


def test_segmentation_sees_the_whole_image():
    network, segmentation = network_of("sftgan"), small_segmentation()
    values = noise(21, 30)
    with torch.inference_mode():
        expected = network(values, condition(segmentation, values)).clamp(0, 1)
    result = fastsr.upscale(values, network, segmentation=segmentation, tile=8)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tile": 0}, ValueError, "tile: expected a positive number of pixels"),
        ({"tile": 2.5}, ValueError, "tile: expected a positive number of pixels"),
        ({"tile": True}, ValueError, "tile: expected a positive number of pixels"),
        ({"tile": "large"}, ValueError, "got 'large'"),
        ({"tile_pad": -1}, ValueError, "tile_pad: expected a number of pixels from 0 on"),
        ({"tile_pad": "auto"}, ValueError, "got 'auto'"),
    ],
)
def test_options_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        fastsr.upscale(noise(4, 4), Nearest(), scale=2, **options)


@pytest.mark.parametrize(
    "options",
    [{"tile": 8}, {"tile_pad": 4}, {"self_ensemble": True}, {"deterministic": True}, {"dtype": torch.float16}],
)
def test_options_that_zssr_has_not(options):
    with pytest.raises(TypeError, match="ZSSR learns from the whole image"):
        fastsr.upscale(noise(4, 4), "zssr", **options)


def test_dtype_and_device_copy_the_network(tmp_path):
    network = network_of("carn x2").float()
    torch.save(network.state_dict(), tmp_path / "carn.pth")
    image = noise(9, 8)
    double = fastsr.upscale(image, network, dtype=torch.float64, device="cpu")
    assert network.dtype == torch.float32
    assert torch.equal(double, fastsr.upscale(image, network.double()))
    network.float()
    assert torch.equal(double, fastsr.upscale(image, str(tmp_path / "carn.pth"), dtype=torch.float64))
    assert torch.equal(fastsr.upscale(image, network), fastsr.upscale(image, network, dtype=torch.float32))


# The self-ensemble


@pytest.mark.parametrize("case", ["carn x2", "idn x3", "rcan x2", "enhancenet"])
def test_self_ensemble(case):
    network = network_of(case)
    image = noise(11, 14, 1 if network.colour == "y" else 3)
    scale = network.scales[0]
    low, high = network.value_range
    total = 0
    for k in range(8):
        turned = torch.rot90(image, k % 4, (2, 3))
        turned = turned.flip(3) if k > 3 else turned
        with torch.inference_mode():
            result = (network.super_resolve(turned * (high - low) + low, scale) - low) / (high - low)
        result = result.flip(3) if k > 3 else result
        total = total + torch.rot90(result, -(k % 4), (2, 3)) / 8
    for options in ({}, {"tile": 6}):
        result = fastsr.upscale(image, network, self_ensemble=True, **options)
        torch.testing.assert_close(result, total.clamp(0, 1), atol=1e-12, rtol=0)
    assert not torch.equal(fastsr.upscale(image, network), result)


# The same bits


@pytest.mark.parametrize("case", ["carn x2", "dbpn x4", "rcan x2"])
def test_deterministic_whatever_the_order_and_the_batch(case, monkeypatch):
    steps = steps_of(case)
    steps = Pass(steps.network.float(), steps.scale)
    values = noise(45, 61, dtype=torch.float32)
    expected = in_parts(steps, values, 9, deterministic=True)
    in_order = tiles.cores

    def shuffled(*args):
        boxes = in_order(*args)
        random.Random(7).shuffle(boxes)
        return boxes

    monkeypatch.setattr(tiles, "cores", shuffled)
    for batch in (1, 4):
        monkeypatch.setattr(tiles, "choose", lambda *args, batch=batch: (9, batch))
        assert torch.equal(in_parts(steps, values, 9, deterministic=True), expected)
        torch.testing.assert_close(in_parts(steps, values, 9), expected, atol=1e-5, rtol=1e-5)


def test_deterministic_does_not_look_at_free_memory(monkeypatch):
    def never(*args):
        raise AssertionError("asked")

    monkeypatch.setattr(tiles, "available", never)
    monkeypatch.setattr(tiles, "FIXED", 16)
    monkeypatch.setattr(tiles, "SMALL", 0)
    network, sizes = Nearest(), []
    network.before = lambda x: sizes.append(tuple(x.shape[2:])) or x
    fastsr.upscale(noise(40, 30), network, scale=2, deterministic=True, tile_pad=1)
    assert sizes == [(16, 17)] * 6


# Memory


class Limited(Nearest):
    """Runs out of memory for more than `room` pixels at once, and notes what it was given."""

    def __init__(self, room, error):
        super().__init__()
        self.room, self.error, self.sizes = room, error, []

    def super_resolve(self, x, scale):
        if x[:, 0].numel() > self.room:
            raise self.error
        self.sizes.append((len(x), *x.shape[2:]))
        return super().super_resolve(x, scale)


def full(kind="cpu"):
    return torch.OutOfMemoryError("CUDA out of memory") if kind == "cuda" else RuntimeError(
        "[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("tile", [None, "auto", 64])
def test_out_of_memory_halves_and_continues(kind, tile):
    network = Limited(40 * 40, full(kind))
    image = noise(96, 128)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        result = fastsr.upscale(image, network, scale=2, tile=tile, tile_pad=2)
    torch.testing.assert_close(result, image.repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-15, rtol=0)
    assert max(n * h * w for n, h, w in network.sizes) <= 1600


def test_out_of_memory_in_the_middle_keeps_what_is_done(monkeypatch):
    monkeypatch.setattr(tiles, "choose", lambda *args: (32, 1))
    network, done = Limited(10**6, full()), []
    network.before = lambda x: done.append(x.shape) or x

    def shrinking(x, scale):
        network.room = 10**6 if len(done) < 2 else 20 * 20  # somebody else takes the memory meanwhile
        return Limited.super_resolve(network, x, scale)

    network.super_resolve = shrinking
    image = noise(64, 64)
    with pytest.warns(RuntimeWarning, match="out of memory at tiles of 32: continuing with 16"):
        result = in_parts(Pass(network, 2), image, 32, pad=2)
    torch.testing.assert_close(result, image.repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-15, rtol=0)


def test_a_batch_is_halved_before_the_tile(monkeypatch):
    monkeypatch.setattr(tiles, "choose", lambda *args: (8, 8))
    network = Limited(3 * 8 * 8, full())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        in_parts(Pass(network, 2), noise(24, 24), 8, pad=0)
    assert [str(w.message) for w in caught] == [f"out of memory: continuing with {n} parts at once" for n in (4, 2)]
    assert network.sizes == [(2, 8, 8)] * 4 + [(1, 8, 8)]


def test_where_nothing_fits_it_says_so():
    with pytest.warns(RuntimeWarning), pytest.raises(MemoryError, match="out of memory for a part of 18x18"):
        in_parts(Pass(Limited(9, full()), 2), noise(64, 64), 64, pad=1)
    with pytest.raises(MemoryError, match="out of memory for a part of 64x64 pixels: choose a smaller tile"):
        in_parts(Pass(Limited(9, full()), 2), noise(64, 64), 64, pad=1, deterministic=True)
    with pytest.raises(RuntimeError, match="something else"):
        in_parts(Pass(Limited(9, RuntimeError("something else")), 2), noise(64, 64), 64, pad=1)


def test_the_tile_is_chosen_by_what_fits(monkeypatch):
    monkeypatch.setattr(tiles, "SMALL", 0)
    steps = steps_of("carn x2")
    values = noise(80, 100)
    with torch.inference_mode():
        image = tiles.Image(steps.begin(values), steps.ratios, 1)
        per_pixel = tiles.bytes_per_pixel(steps.finish, image)
    sizes = []

    class Noted(Pass):
        def finish(self, inputs):
            sizes.append(len(inputs[0]) * inputs[0].shape[2] * inputs[0].shape[3])
            return super().finish(inputs)

    noted = Noted(steps.network, 2)
    for free, whole in ((2**40, True), (70 * 70, False), (60 * 60, False)):
        monkeypatch.setattr(tiles, "available", lambda device, free=free: free * per_pixel / tiles.SHARE["cpu"])
        sizes.clear()
        result = in_parts(noted, values, "auto")
        torch.testing.assert_close(result, whole_of(steps, values), atol=1e-12, rtol=0)
        sizes.remove(48 * 48)  # the measurement
        assert (sizes == [8000]) if whole else (len(sizes) > 1 and max(sizes) <= free)
    monkeypatch.setattr(tiles, "available", lambda device: 3.5 * 52 * 52 * per_pixel / tiles.SHARE["cpu"])
    sizes.clear()
    in_parts(noted, values, 10)
    assert max(sizes) == 3 * 52 * 52  # a tile of 10 with a halo of 21 on both sides, three at once


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peak_memory_is_counted(dtype):
    x, weight = torch.zeros(1, 4, 10, 10, dtype=dtype), torch.zeros(8, 4, 3, 3, dtype=dtype)
    size = dtype.itemsize
    with torch.inference_mode(), fastsr.use("eager"), tiles.Peak() as peak:
        y = fastsr.ops.conv_act([x, x[:, :0]], weight, None, padding=1)
        z = torch.relu(y)
        assert peak.alive == 2 * y.nbytes
        del y
        z.view(-1).add_(1)
        assert peak.alive == z.nbytes
    scratch = 4 * 9 * 100 * size if dtype == torch.float64 else 0
    assert z.nbytes * 2 <= peak.peak <= z.nbytes * 2 + 400 * size + scratch
    with torch.inference_mode(), tiles.Peak() as peak:
        torch.nn.functional.conv_transpose2d(x, weight.transpose(0, 1).contiguous(), stride=2)
    assert peak.peak >= 8 * 21 * 21 * size + 8 * 9 * 100 * size


def test_peak_memory_of_kernels_is_what_they_take():
    require_backend("cpu")
    x, weight = torch.zeros(1, 16, 10, 10), torch.zeros(16, 16, 3, 3)
    with torch.inference_mode(), tiles.Peak() as peak:
        y = fastsr.ops.conv_act([x], weight, None, padding=1)
        z = torch.relu(y)
    copies = x.nbytes + y.nbytes  # in another layout, in a workspace that stays
    assert peak.peak == y.nbytes + z.nbytes + copies
    x = x.to(memory_format=torch.channels_last)
    with torch.inference_mode(), tiles.Peak() as peak:
        y = fastsr.ops.conv_act([x], weight, None, padding=1)
    assert peak.peak == y.nbytes


def test_tiles_are_as_large_as_the_kernels_allow():
    require_backend("cpu")
    steps = Pass(fastsr.optimize(fastsr.create("carn", scale=2, features=32)), 2)
    with torch.inference_mode():
        image = tiles.Image(steps.begin(noise(64, 64, dtype=torch.float32)), steps.ratios, 1)
        found = tiles.bytes_per_pixel(steps.finish, image)
        with fastsr.use("eager"):
            assert found < 0.8 * tiles.bytes_per_pixel(steps.finish, image)


def test_free_memory_is_the_least_of_what_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "CGROUP", tmp_path)
    monkeypatch.setattr(tiles, "MEMINFO", tmp_path / "meminfo")
    host = torch.device("cpu")
    assert tiles.available(host) > 0
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:   40 kB\n")
    assert tiles.available(host) == 40 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert tiles.available(host) == 40 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert tiles.available(host) == 4000
    (tmp_path / "memory.max").write_text("500\n")
    assert tiles.available(host) == 0


# What is not finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{"tile": 8, "tile_pad": 0}, {"tile": None}])
def test_a_part_that_is_not_finite_is_computed_again_in_float32(dtype, options):
    image = noise(16, 24) / 2
    image[:, :, 3, 12] = 1
    network = Nearest(lambda x: torch.where(x == 1, torch.inf, x) if x.dtype == dtype else x, dtype)
    where = "rows 0..7, columns 8..15" if options["tile"] else "rows 0..15, columns 0..23"
    with pytest.warns(RuntimeWarning, match=f"{where} are not finite in {dtype}: computed again") as caught:
        result = fastsr.upscale(image, network, scale=2, **options)
    assert len(caught) == 1
    expected = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (result - expected).abs().max() < 4e-3
    assert torch.allclose(result[:, :, :16, 16:32], expected[:, :, :16, 16:32], atol=1e-7)  # that is float32's


def test_what_stays_not_finite_raises():
    image = noise(16, 24) / 2
    image[:, :, 3, 12] = 1
    for dtype in (torch.float16, torch.float32):
        network = Nearest(lambda x: torch.where(x == 1, torch.inf, x), dtype)
        warned = pytest.warns(RuntimeWarning) if dtype == torch.float16 else contextlib.nullcontext()
        match = r"12 of 768 values .* in rows 0\.\.7 and columns 8\.\.15"
        with warned, pytest.raises(FloatingPointError, match=match):
            fastsr.upscale(image, network, scale=2, tile=8, tile_pad=0)


def test_a_trunk_that_is_not_finite_is_computed_again_in_float32():
    network = network_of("rcan x2").half()
    with torch.no_grad():
        network.body["1"].bias.fill_(6e4)
        network.body["0"].body["2"].bias.fill_(6e4)
    image = noise(20, 22)
    with pytest.warns(RuntimeWarning, match="not finite in torch.float16: continuing in float32"):
        result = fastsr.upscale(image, network, tile=8)
    expected = fastsr.upscale(image, network, dtype=torch.float32)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)  # features are 6e4


def test_an_optimized_network_is_measured_and_widened():
    network = fastsr.optimize(network_of("carn x2"), dtype=torch.bfloat16)
    assert halo_of(Pass(network, 2)) == 21
    image = noise(30, 50)
    assert (fastsr.upscale(image, network, tile=16) - fastsr.upscale(image, network)).abs().max() < 0.05


# Written part by part


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_streamed_tiff_holds_what_upscale_makes(tmp_path, depth, channels):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(depth).max, (150, 210, channels)).astype(depth)
    exif = Image.Exif()
    exif[271] = "a camera"
    picture = io.Picture(pixels, icc=b"a profile", exif=b"Exif\0\0" + exif.tobytes(), dpi=(300.0, 150.0))
    network = network_of("carn x3")
    upscale_to_tiff(tmp_path / "a.tif", picture, network, tile=64, deterministic=True)
    expected = fastsr.upscale(pixels if channels == 3 else pixels[..., 0], network, tile=64, deterministic=True)
    with Image.open(tmp_path / "a.tif") as file:
        assert file.size == (630, 450) and file.tag_v2[322] == file.tag_v2[323] == 256
        assert file.info["icc_profile"] == b"a profile" and file.info["dpi"] == (300, 150)
        assert file.getexif()[271] == "a camera"
        if (depth, channels) != (np.uint16, 3):
            np.testing.assert_array_equal(np.array(file), expected)
        else:  # Pillow reads 8 bits of 16
            whole = (tmp_path / "a.tif").read_bytes()
            np.testing.assert_array_equal(pytest.importorskip("imagecodecs").tiff_decode(whole), expected)
    assert os.listdir(tmp_path) == ["a.tif"]


def test_a_streamed_file_is_complete_or_absent(tmp_path):
    picture = io.Picture(np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "a.tif").write_bytes(b"old")
    with pytest.raises(FloatingPointError):
        upscale_to_tiff(tmp_path / "a.tif", picture, Nearest(lambda x: x / 0), scale=2)
    assert os.listdir(tmp_path) == ["a.tif"] and (tmp_path / "a.tif").read_bytes() == b"old"
    with pytest.raises(ValueError, match="without alpha, got 4"):
        upscale_to_tiff(tmp_path / "a.tif", io.Picture(np.zeros((4, 4, 4), np.uint8)), Nearest(), scale=2)
    with pytest.raises(ValueError, match="has the scales 2, 3, 4, got 5"):
        upscale_to_tiff(tmp_path / "a.tif", picture, Nearest(), scale=5)


STREAMING = """
import sys
import numpy as np
from PIL import Image
import fastsr
from fastsr.image import io
from fastsr.image.stream import upscale_to_tiff

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

network = fastsr.create("zssr", channels=3, width=2, depth=3)
picture = io.Picture(np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8))
small = io.Picture(picture.pixels[:64, :64])
upscale_to_tiff(sys.argv[1], small, network, scale=4, memory=int(sys.argv[2]))  # imports, and what torch keeps
before = memory("VmRSS")
upscale_to_tiff(sys.argv[1], picture, network, scale=4, memory=int(sys.argv[2]))
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of memory is not to be had here")
def test_streaming_keeps_to_its_budget(tmp_path):
    budget, pixels = 4 * 2**20, 600 * 800 * 3
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    command = [sys.executable, "-c", STREAMING, str(tmp_path / "a.tif"), str(budget)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    # the picture and its copy, the budget twice, and as much again for what allocators keep: less than the result
    assert int(done.stdout) < 2 * pixels + 3 * budget < 16 * pixels * 3 / 4
    assert (tmp_path / "a.tif").stat().st_size > 16 * pixels
