"""Images in, images out: `fastsr.upscale`, colour, PSNR, files and the command line."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from PIL import Image

import fastsr
from fastsr import cli
from fastsr.image import io, journal
from fastsr.image import upscale as module
from fastsr.image.colour import rgb_to_gray, rgb_to_y, rgb_to_ycbcr, ycbcr_to_rgb
from fastsr.image.metrics import psnr
from fastsr.image.resize import imresize
from fastsr.models.sftgan import condition
from fastsr.train.zssr import ZSSRConfig


class Nearest(fastsr.Network):
    """Repeats every pixel: a network whose result is known. It notes what it was given."""

    name = "nearest"
    factors, extremes = (2, 3), (0.0, 1.0)

    def __init__(self, colour="rgb", extremes=(0.0, 1.0), factors=(2, 3), add=0.0):
        super().__init__(config=None)
        self.colour, self.extremes, self.factors, self.add = colour, extremes, factors, add
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.given = None

    @property
    def scales(self):
        return self.factors

    @property
    def value_range(self):
        return self.extremes

    def super_resolve(self, x, scale):
        assert not self.training and torch.is_inference_mode_enabled()
        self.given = x
        return x.repeat_interleave(scale, 2).repeat_interleave(scale, 3) + self.add


def _repeated(pixels, scale):
    return pixels.repeat(scale, 0).repeat(scale, 1)


@pytest.fixture
def colour():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.fixture
def gray():
    return np.random.default_rng(1).integers(0, 256, (5, 7), dtype=np.uint8)


# fastsr.upscale


@pytest.mark.parametrize("extremes", [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)])
@pytest.mark.parametrize("scale", [2, 3])
def test_numpy_images_keep_their_levels_in_every_value_range(colour, gray, extremes, scale):
    network = Nearest(extremes=extremes)
    for pixels in (colour, gray):
        result = fastsr.upscale(pixels, network, scale=scale)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, _repeated(pixels, scale))
    white = fastsr.upscale(np.full((1, 1, 3), 255, np.uint8), network, scale=2)
    assert (white == 255).all() and network.given.max().item() == extremes[1]


def test_pil_images_keep_mode_and_colour_profile(colour, gray):
    image = Image.fromarray(colour)
    image.info.update(icc_profile=b"a profile", exif=b"exif data", dpi=(300, 300), comment=b"not kept")
    result = fastsr.upscale(image, Nearest(), scale=2)
    assert result.mode == "RGB"
    assert result.info == {"icc_profile": b"a profile", "exif": b"exif data", "dpi": (300, 300)}
    np.testing.assert_array_equal(np.asarray(result), _repeated(colour, 2))
    assert fastsr.upscale(Image.fromarray(gray), Nearest(), scale=2).mode == "L"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_tensors_keep_dtype_and_batch(dtype, channels):
    image = torch.rand(2, channels, 4, 6).to(dtype)
    result = fastsr.upscale(image, Nearest(), scale=2)
    assert result.dtype == dtype and result.shape == (2, channels, 8, 12) and not result.is_inference()
    expected = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-3 if dtype == torch.float16 else 1e-6)


def test_a_double_network_gets_double_precision():
    image = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    result = fastsr.upscale(image, Nearest(extremes=(0.0, 255.0)).double(), scale=2)
    torch.testing.assert_close(result[..., ::2, ::2], image, atol=1e-14, rtol=0)


def test_a_gray_image_reaches_an_rgb_network_as_three_equal_channels(gray):
    network = Nearest()
    fastsr.upscale(gray, network, scale=2)
    assert network.given.shape == (1, 3, 5, 7) and (network.given == network.given[:, :1]).all()


def test_a_luma_network_gets_luma_and_the_chroma_is_resized(colour, gray):
    network = Nearest(colour="y", extremes=(0.0, 255.0))
    result = fastsr.upscale(colour, network, scale=2)
    values = torch.from_numpy(colour / 255).permute(2, 0, 1)[None]
    torch.testing.assert_close(network.given.double(), rgb_to_y(values) * 255, atol=1e-3, rtol=0)
    ycbcr = rgb_to_ycbcr(values)
    luma = ycbcr[:, :1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = ycbcr_to_rgb(torch.cat([luma, imresize(ycbcr[:, 1:], 2)], 1)).clamp(0, 1) * 255
    assert np.abs(result - expected[0].permute(1, 2, 0).numpy()).max() < 0.51
    np.testing.assert_array_equal(fastsr.upscale(gray, network, scale=2), _repeated(gray, 2))
    assert network.given.max() == gray.max()  # as it is, not squeezed into 16..235


@pytest.mark.parametrize(
    ("add", "expected"), [(0.49, [0, 255]), (0.5, [1, 255]), (-0.51, [0, 254]), (300.0, [255, 255])]
)
def test_levels_are_clamped_and_rounded_halves_up(add, expected):
    image = np.array([[0, 255]], np.uint8)
    result = fastsr.upscale(image, Nearest(extremes=(0.0, 255.0), add=add).double(), scale=2)
    np.testing.assert_array_equal(result[0, ::2], expected)


def test_sixteen_bits_stay_sixteen():
    deep = np.random.default_rng(2).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    for pixels in (deep, deep[..., 0]):
        result = fastsr.upscale(pixels, Nearest(extremes=(-1.0, 1.0)), scale=2)
        assert result.dtype == np.uint16
        np.testing.assert_array_equal(result, _repeated(pixels, 2))
    for mode in ("I;16", "I;16B"):
        image = Image.frombytes(mode, (7, 5), deep[..., 0].astype("<u2" if mode == "I;16" else ">u2").tobytes())
        made = fastsr.upscale(image, Nearest(), scale=2)
        assert made.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(made), _repeated(deep[..., 0], 2))


def test_palettes_and_single_bits_become_colours(colour, gray):
    palette = Image.fromarray(colour).quantize(8)
    made = fastsr.upscale(palette, Nearest(), scale=2)
    assert made.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(made), _repeated(np.asarray(palette.convert("RGB")), 2))
    palette.info["transparency"] = 0
    made = fastsr.upscale(palette, Nearest(), scale=2)
    assert made.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(made)[..., 3] == 0, _repeated(np.asarray(palette) == 0, 2))
    made = fastsr.upscale(Image.fromarray(gray > 99), Nearest(), scale=2)
    assert made.mode == "L"
    np.testing.assert_array_equal(np.asarray(made), _repeated((gray > 99) * np.uint8(255), 2))


def test_a_scale_between_those_of_the_network_is_resized_from_the_next_larger(colour):
    values = torch.from_numpy(colour / 255).permute(2, 0, 1)[None]
    larger = values.repeat_interleave(3, 2).repeat_interleave(3, 3)
    expected = imresize(larger, 2.5 / 3, shape=(13, 18)).clamp(0, 1)  # 12.5 and 17.5 rounded up, as imresize does
    torch.testing.assert_close(fastsr.upscale(values, Nearest().double(), scale=2.5), expected)
    result = fastsr.upscale(colour, Nearest(), scale=2.5)
    assert np.abs(result - expected[0].permute(1, 2, 0).numpy() * 255).max() < 0.51
    assert fastsr.upscale(colour, Nearest(), scale=1).shape == colour.shape


class Cubic(Nearest):
    """Linear, and it mixes neighbours."""

    def super_resolve(self, x, scale):
        return imresize(x, scale) + self.add


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_gets_no_dark_fringes(dtype, channels):
    peak = np.iinfo(dtype).max
    red = np.array([200, 30, 60, 255][-channels:]) * (peak // 255)
    image = np.zeros((12, 12, channels), dtype)  # transparent black
    image[3:9, 3:9] = red
    image[5, 5, -1] = peak // 2
    result = fastsr.upscale(image, Cubic(), scale=3).astype(np.int64)
    alpha = result[..., -1]
    sure = alpha > peak // 50  # where alpha is nearly nothing, so is the precision of a quotient by it
    assert (np.abs(result - red)[..., :-1][sure] <= peak // 100).all()
    assert (result[alpha == 0] == 0).all()
    assert set(np.unique(alpha[:3])) == {0} and ((alpha > 0) & (alpha < peak)).any()
    naive = fastsr.upscale(image[..., 0].copy(), Cubic(), scale=3).astype(np.int64)
    assert np.abs(naive - red[0])[sure].max() > peak // 6  # what the fringe would have been


def test_flat_alpha_stays_exact(colour):
    network = Cubic(add=-0.02)  # not even white stays white
    for level in (255, 77, 0):
        image = np.dstack([colour, np.full(colour.shape[:2], level, np.uint8)])
        result = fastsr.upscale(image, network, scale=2)
        assert (result[..., 3] == level).all()
        np.testing.assert_array_equal(result[..., :3], fastsr.upscale(colour, network, scale=2))
    image = np.full((20, 20, 4), 255, np.uint8)
    image[:, 10:, 3] = 0
    alpha = fastsr.upscale(image, network, scale=2)[..., 3]
    assert (alpha[:, :16] == 255).all() and (alpha[:, 24:] == 0).all()


def test_over_black_and_white_alpha_shows_what_the_network_makes_of_both(colour):
    class Sharp(Cubic):
        """Not linear."""

        def super_resolve(self, x, scale):
            y = imresize(x, scale).clamp(0, 1)
            return y * y * (3 - 2 * y)

    image = np.dstack([colour, np.random.default_rng(3).integers(0, 256, colour.shape[:2], dtype=np.uint8)])
    straight, alpha = np.split(fastsr.upscale(image.astype(np.uint16) * 257, Sharp(), scale=2) / 65535, [3], axis=2)
    opacity = image[..., 3:] / 255
    for ground in (0, 1):
        over = torch.from_numpy(image[..., :3] / 255 * opacity + ground * (1 - opacity)).permute(2, 0, 1)[None]
        expected = fastsr.upscale(over, Sharp().double(), scale=2)[0].permute(1, 2, 0).numpy()
        # One alpha for three colours, which a network that is not linear covers differently: equal in the mean.
        difference = (straight * alpha + ground * (1 - alpha) - expected).mean(2)
        assert np.abs(difference[((straight < 1) & (alpha < 1)).all(2)]).max() < 1e-3  # where nothing was clamped


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_alpha_that_is_not_finite_raises(colour, value):
    with pytest.raises(FloatingPointError, match="not finite"):
        fastsr.upscale(np.dstack([colour, colour[..., 0]]), Nearest(add=value), scale=2)


def test_modes_of_the_network_are_restored(gray):
    network = Nearest().train()
    network.inner = torch.nn.Dropout().eval()
    fastsr.upscale(gray, network, scale=2)
    assert network.training and not network.inner.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_raises(gray, value):
    with pytest.raises(FloatingPointError, match="not finite"):
        fastsr.upscale(gray, Nearest(add=value), scale=2)


def test_scales(gray):
    with pytest.raises(ValueError, match="Nearest has the scales 2, 3, got 4"):
        fastsr.upscale(gray, Nearest(), scale=4)
    with pytest.raises(ValueError, match="choose one"):
        fastsr.upscale(gray, Nearest())
    assert fastsr.upscale(gray, Nearest(factors=(3,))).shape == (15, 21)
    with pytest.raises(ValueError, match="only the scale 3, got 4"):
        fastsr.upscale(gray, Nearest(factors=(3,)), scale=4)
    with pytest.raises(ValueError, match="got 0.9"):
        fastsr.upscale(gray, Nearest(), scale=0.9)
    with pytest.raises(TypeError, match="enlarges images"):
        fastsr.upscale(gray, Nearest(factors=()))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 4, 5), np.uint8), ValueError, r"2 to 4 channels, got uint8 \(4, 4, 5\)"),
        (np.zeros((4, 4), ">u2"), ValueError, "got >u2"),
        (np.zeros((4, 4), np.float32), ValueError, "got float32"),
        (np.zeros((0, 4), np.uint8), ValueError, "at least one pixel, got 0x4"),
        (Image.new("CMYK", (4, 4)), ValueError, "CMYK.*with that profile"),
        (Image.new("F", (4, 4)), ValueError, "got mode F"),
        (Image.new("I", (4, 4)), ValueError, "got mode I;"),
        (torch.zeros(3, 4, 4), ValueError, r"\(N, C, H, W\)"),
        (torch.zeros(1, 2, 4, 4), ValueError, "1 or 3 channels"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ValueError, "floating-point"),
        (torch.full((1, 3, 4, 4), 255.0), ValueError, "values 0..1, got 255..255"),
        (torch.full((1, 3, 4, 4), float("nan")), ValueError, "values 0..1, got nan"),
        ([[1]], TypeError, "got list"),
    ],
)
def test_images_that_are_refused(image, error, message):
    network = Nearest()
    with pytest.raises(error, match=message):
        fastsr.upscale(image, network, scale=2)
    assert network.given is None


def test_too_large_a_result_is_refused_before_work(monkeypatch, gray):
    network = Nearest()
    monkeypatch.setattr(module, "MAX_PIXELS", 139)
    with pytest.raises(ValueError, match="140 pixels, more than the 139"):
        fastsr.upscale(gray, network, scale=2)
    assert network.given is None


def test_zssr_learns_from_the_image(colour, gray):
    config = ZSSRConfig(max_iters=2, width=4, depth=3, crop_size=8)
    states = []
    result = fastsr.upscale(colour, "zssr", config=config, progress=states.append)
    assert result.shape == (10, 14, 3) and result.dtype == np.uint8 and len(states) == 2
    assert fastsr.upscale(gray, "zssr", scale=3, config=config).shape == (15, 21)
    assert fastsr.upscale(torch.rand(2, 3, 6, 6), "zssr", config=config).shape == (2, 3, 12, 12)
    with pytest.raises(ValueError, match="ZSSR has the scales 2, 3, 4, got 5"):
        fastsr.upscale(colour, "zssr", scale=5)
    with pytest.raises(TypeError, match="zssr"):
        fastsr.upscale(colour, Nearest(), scale=2, config=config)


def test_sftgan_is_told_what_is_where(colour, gray):
    torch.manual_seed(0)
    network = fastsr.create("sftgan", features=8, blocks=1)
    segmentation = fastsr.create(
        "outdoor_scene_seg", stem=(4, 4, 8), blocks=(1,) * 4, widths=(4,) * 4, outs=(12, 16, 20, 24), head=8
    )
    values = torch.from_numpy(colour / 255).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        expected = network(values, condition(segmentation, values)).clamp(0, 1) * 255
    result = fastsr.upscale(colour, network, segmentation=segmentation.train())
    assert segmentation.training
    assert np.abs(result - expected[0].permute(1, 2, 0).numpy()).max() < 0.51
    assert fastsr.upscale(gray, network, segmentation=segmentation.eval()).shape == (20, 28)
    with pytest.raises(TypeError, match="SFTGAN needs"):
        fastsr.upscale(colour, network)
    with pytest.raises(TypeError, match="expected the outdoor scene segmentation network, got SFTNet"):
        fastsr.upscale(colour, network, segmentation=network)
    for other in (Nearest(), "zssr"):
        with pytest.raises(TypeError, match="SFTGAN"):
            fastsr.upscale(colour, other, scale=2, segmentation=segmentation)


# Colour and PSNR


def test_colour_agrees_with_scikit_image():
    color = pytest.importorskip("skimage.color")
    image = np.random.default_rng(2).random((6, 5, 3))
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    ycbcr = rgb_to_ycbcr(tensor)
    np.testing.assert_allclose(ycbcr[0].permute(1, 2, 0) * 255, color.rgb2ycbcr(image), atol=1e-10)
    torch.testing.assert_close(rgb_to_y(tensor), ycbcr[:, :1])
    torch.testing.assert_close(ycbcr_to_rgb(ycbcr), tensor, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="three colour channels"):
        rgb_to_y(tensor[:, :1])


def test_gray_of_equal_channels_is_that_channel():
    gray = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(rgb_to_gray(gray.expand(-1, 3, -1, -1)), gray, atol=1e-15, rtol=0)


def test_psnr_agrees_with_scikit_image(colour):
    metrics = pytest.importorskip("skimage.metrics")
    other = np.random.default_rng(3).integers(0, 256, colour.shape, dtype=np.uint8)
    assert psnr(colour, other) == pytest.approx(metrics.peak_signal_noise_ratio(colour, other), abs=1e-9)
    inner = metrics.peak_signal_noise_ratio(colour[2:-2, 2:-2], other[2:-2, 2:-2])
    assert psnr(colour, other, shave=2) == pytest.approx(inner, abs=1e-9)
    a, b = (torch.from_numpy(v / 255).permute(2, 0, 1)[None] for v in (colour, other))
    assert psnr(a, b, shave=2) == pytest.approx(inner, abs=1e-9)


def test_psnr_of_equal_images_is_infinite_and_bad_arguments_raise(colour, gray):
    assert psnr(gray, gray) == float("inf")
    with pytest.raises(ValueError, match="one shape"):
        psnr(colour, gray)
    with pytest.raises(ValueError, match="leaves nothing"):
        psnr(gray, gray, shave=3)
    with pytest.raises(TypeError, match="float64"):
        psnr(gray / 255, gray / 255)


# Files


@pytest.mark.parametrize("extension", [".png", ".bmp", ".tiff", ".webp", ".jpg"])
def test_files_round_trip(tmp_path, colour, gray, extension):
    for pixels in (colour, gray):
        path = tmp_path / f"image{extension}"
        io.write(path, io.Picture(pixels.reshape(5, 7, -1)))
        read = io.read_image(path).convert("L" if pixels.ndim == 2 else "RGB")
        if extension == ".jpg":
            assert read.size == (7, 5)
        else:
            np.testing.assert_array_equal(np.asarray(read), pixels)


def test_a_profile_survives_the_file(tmp_path, colour):
    io.write(tmp_path / "a.png", io.Picture(colour, icc=b"a profile"))
    assert io.read_image(tmp_path / "a.png").info["icc_profile"] == b"a profile"


def test_a_photograph_taken_sideways_is_turned_upright(tmp_path, colour):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    Image.fromarray(colour).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(io.read_image(tmp_path / "a.png")), np.rot90(colour, -1))


def test_unreadable_files_are_named(tmp_path, colour):
    io.write(tmp_path / "whole.png", io.Picture(np.tile(colour, (9, 9, 1))))
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png", "missing.png"):
        with pytest.raises(OSError, match=f"{name}: cannot be read"):
            io.read_image(tmp_path / name)
    Image.new("RGBA", (4, 4)).save(tmp_path / "alpha.png")
    with pytest.raises(ValueError, match=r"alpha.png: .*RGBA"):
        io.read_image(tmp_path / "alpha.png")
    assert io.read(tmp_path / "alpha.png").pixels.shape == (4, 4, 4)


def test_extensions_and_sizes_are_checked(tmp_path, gray):
    with pytest.raises(ValueError, match="extensions .png"):
        io.write(tmp_path / "a.xyz", io.Picture(gray[..., None]))
    with pytest.raises(ValueError, match="at most 65535 a side"):
        io.check_writable("a.jpg", 65536, 1)
    io.check_writable("a.PNG", 65536, 1)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, moment):
    def fail(*args):
        raise OSError("no space left")

    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, moment, fail)
    with pytest.raises(OSError, match="no space left"):
        io.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.png"]


def test_written_files_honour_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        io.write_atomically(tmp_path / "a", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


# The command line


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of untrained weights: CARN at two scales, narrow."""
    path = tmp_path_factory.mktemp("weights") / "carn.pth"
    torch.manual_seed(0)
    torch.save(fastsr.create("carn", scales=(2, 3), features=8).state_dict(), path)
    return str(path)


def _write(folder, name, pixels):
    Image.fromarray(pixels).save(folder / name)
    return str(folder / name)


def test_cli_one_file(tmp_path, weights, colour, capsys):
    source, target = _write(tmp_path, "in.png", colour), tmp_path / "out.bmp"
    assert cli.main(["upscale", source, "-o", str(target), "--model", weights, "--scale", "3"]) == 0
    expected = fastsr.upscale(colour, weights, scale=3)
    np.testing.assert_array_equal(np.asarray(io.read_image(target)), expected)
    said, end = map(json.loads, capsys.readouterr().out.splitlines())
    assert said.items() >= {"event": "done", "input": source, "output": str(target), "size": [21, 15]}.items()
    assert said.items() >= {"network": "CARN", "scale": 3, "notes": []}.items() and said["backends"]
    assert end == {"event": "end", "done": 1, "skipped": 0, "failed": 0, "all": 1}


def test_cli_folders_and_bad_inputs(tmp_path, weights, colour, gray, capsys):
    (tmp_path / "in").mkdir()
    for name, pixels in (("b.png", gray), ("a.png", colour)):
        _write(tmp_path / "in", name, pixels)
    (tmp_path / "in" / "bad.png").write_text("no image")
    (tmp_path / "in" / "notes.txt").write_text("left alone")
    extra = _write(tmp_path, "c.jpg", gray)
    command = ["upscale", str(tmp_path / "in"), extra, "-o", str(tmp_path / "new" / "out"), "--model", weights]
    assert cli.main([*command, "--scale", "2"]) == 1
    assert sorted(os.listdir(tmp_path / "new" / "out")) == [journal.NAME, "a.png", "b.png", "c.jpg"]
    assert io.read_image(tmp_path / "new" / "out" / "b.png").mode == "L"
    complaint = capsys.readouterr().err
    assert "bad.png: cannot be read" in complaint and "1 of 4 not done" in complaint


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["a.png", "-o", "a.png"], "would replace an input"),
        (["a.png", "-o", "."], "would replace an input"),
        (["a.png", "b.png", "-o", "out.png"], "several images need a folder"),
        (["a.png", "sub/a.png", "-o", "out"], "use two calls"),
        (["empty", "-o", "out"], "no images in this folder"),
        (["missing.png", "-o", "out"], "missing.png: no such file"),
        (["a.png", "-o", "text"], "expected a folder, or a file"),
        (["a.png", "-o", "out", "--scale", "4"], "has the scales 2, 3, got 4"),
        (["a.png", "-o", "out", "--scale", "0"], "has the scales 2, 3, got 0"),
        (["a.png", "-o", "out", "--scale", "nan"], "has the scales 2, 3, got nan"),
        (["-o", "out"], "no image to enlarge"),
        (["a.png", "-o", "out.png", "--resume"], "--resume needs a folder"),
        (["a.png", "-o", "out.png", "--suffix", "x"], "a suffix and an extension are for a folder"),
        (["a.png", "-o", "out", "--suffix", "../x"], "expected part of a file's name"),
        (["a.png", "-o", "out", "--device", "abacus"], "abacus"),
        (["a.png", "-o", "out", "--iterations", "3"], "--iterations are for zssr"),
        (["a.png", "-o", "out", "--tile", "-1"], "tile: expected a positive number of pixels"),
        (["a.png", "-o", "out", "--tile", "exact"], "tile: expected a positive number of pixels"),
        (["a.png", "-o", "out", "--tile_pad", "auto"], "tile_pad: expected a number of pixels"),
        (["a.png", "-o", "out", "--model", "zssr", "--fp32"], "--dtype is for networks with weights"),
        (["a.png", "-o", "out", "--model", "zssr", "-t", "9"], "--tile is for networks with weights"),
        (["a.png", "-o", "out", "--model", "zssr", "--self-ensemble"], "--self-ensemble is for networks with weights"),
        (["a.png", "-o", "out", "--model", "missing.pth"], "missing.pth"),
        (["a.png", "-o", "out", "--model", "text"], "text"),
    ],
)
def test_cli_refusals_change_nothing(tmp_path, monkeypatch, weights, gray, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("sub", "empty"):
        (tmp_path / folder).mkdir()
    for name in ("a.png", "b.png", "sub/a.png"):
        _write(tmp_path, name, gray)
    (tmp_path / "text").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    if "--model" not in command:
        command = [*command, "--model", weights]
    if "--scale" not in command:
        command = [*command, "--scale", "2"]
    assert cli.main(["upscale", *command]) == 1
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    np.testing.assert_array_equal(np.asarray(Image.open("a.png")), gray)


def test_cli_zssr_shows_its_progress(tmp_path, gray, capsys):
    source = _write(tmp_path, "in.png", gray)
    options = ["--model", "zssr", "--iterations", "2"]
    assert cli.main(["upscale", source, "-o", str(tmp_path / "out.png"), *options]) == 0
    captured = capsys.readouterr()
    first, last, done, _ = map(json.loads, captured.out.splitlines())
    assert first["event"] == last["event"] == "progress" and (first["share"], last["share"]) == (0.5, 1.0)
    assert "2 of at most 2 iterations" in last["words"] and done["network"] == "ZSSR" and captured.err == ""
    assert io.read_image(tmp_path / "out.png").size == (14, 10)


def test_cli_info(weights, capsys):
    assert cli.main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
    assert cli.main(["info", weights]) == 0
    printed = capsys.readouterr().out
    assert "CARN(" in printed and "x2, x3" in printed and "parameters" in printed
    assert cli.main(["info", weights + ".missing"]) == 1
