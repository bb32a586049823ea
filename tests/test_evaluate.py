"""PSNR and SSIM: against scikit-image, against a protocol written out, and on the command line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastsr
from fastsr import cli
from fastsr.evaluate import PROTOCOLS, PUBLISHED, evaluate
from fastsr.image.colour import rgb_to_y
from fastsr.image.metrics import psnr, ssim
from fastsr.image.resize import imresize
from fastsr.models import NETWORKS

KEYS = {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}
IDN = {"channels": 1, "features": 8, "blocks": 1, "block_widths": (6, 4, 8, 8, 6, 11), "slice": 3, "groups": 2,
       "upsample_kernel": 9}  # fmt: skip


def picture(height: int, width: int, *, gray: bool = False) -> np.ndarray:
    """Smooth shapes with a little noise, so that figures are those of photographs."""
    rng = np.random.default_rng(height * width)
    y, x = np.mgrid[:height, :width] / 7
    channels = [128 + 90 * np.sin(x + n) * np.cos(y - n) + rng.normal(0, 4, x.shape) for n in range(3)]
    pixels = np.stack(channels, axis=2).clip(0, 255).astype(np.uint8)
    return pixels[..., 0] if gray else pixels


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "images"
    made.mkdir()
    Image.fromarray(picture(41, 38)).save(made / "colour.png")
    Image.fromarray(picture(36, 45, gray=True)).save(made / "gray.bmp")
    (made / "notes.txt").write_text("left alone")
    return made


@pytest.fixture(scope="module")
def idn():
    torch.manual_seed(0)
    return fastsr.create("idn", **IDN)


@pytest.fixture(scope="module")
def carn():
    torch.manual_seed(0)
    return fastsr.create("carn", scales=(2, 3), features=8)


def levels(x: torch.Tensor) -> np.ndarray:
    return np.floor(x[0].permute(1, 2, 0).numpy().clip(0, 1) * 255 + 0.5).astype(np.uint8)


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)[None]


# The metrics.


@pytest.mark.parametrize("shave", [0, 4])
@pytest.mark.parametrize("gray", [True, False])
def test_ssim_and_psnr_agree_with_scikit_image(gray, shave):
    metrics = pytest.importorskip("skimage.metrics")
    a = picture(40, 33, gray=gray)
    b = (a + np.random.default_rng(1).normal(0, 12, a.shape)).clip(0, 255).astype(np.uint8)
    inner = (slice(shave, 40 - shave), slice(shave, 33 - shave))
    expected = metrics.structural_similarity(
        a[inner], b[inner], gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255,
        channel_axis=None if gray else 2,
    )  # fmt: skip
    assert ssim(a, b, shave=shave) == pytest.approx(expected, abs=1e-9) and 0.2 < expected < 0.98
    assert psnr(a, b, shave=shave) == pytest.approx(metrics.peak_signal_noise_ratio(a[inner], b[inner]), abs=1e-9)


def test_ssim_of_tensors_equals_that_of_arrays_and_is_one_for_equal_images():
    a, b = picture(20, 25), picture(20, 25)[:, ::-1].copy()
    assert ssim(tensor(a).double(), tensor(b).double()) == pytest.approx(ssim(a, b), abs=1e-12)
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-12)


def test_ssim_of_two_constants_is_its_luminance_term():
    a, b = torch.full((1, 1, 12, 15), 0.25).double(), torch.full((1, 1, 12, 15), 0.75).double()
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-12)


def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match="ssim: expected at least 11x11 pixels, got 10x30"):
        ssim(picture(10, 30), picture(10, 30))
    with pytest.raises(ValueError, match="ssim: shave=15 leaves nothing"):
        ssim(picture(30, 30), picture(30, 30), shave=15)


# The protocols.


def test_every_network_has_a_protocol():
    assert PUBLISHED.keys() <= {network.name for network in NETWORKS}
    assert all(PROTOCOLS[p.name] is p for p in PUBLISHED.values()) and "benchmark" in PROTOCOLS


def test_benchmark_is_what_it_says(folder, carn):
    made = evaluate(carn, folder, scale=3)
    assert (made["protocol"], made["model"], made["scale"]) == ("benchmark", "carn", 3)
    assert list(made["images"]) == ["colour.png", "gray.bmp"]
    high = picture(41, 38)[:39, :36]
    low = levels(imresize(tensor(high), 1 / 3))
    bicubic = levels(imresize(tensor(low), 3))
    for pixels, figures in (
        (fastsr.upscale(low, carn, scale=3), made["images"]["colour.png"]),
        (bicubic, made["images"]["colour.png"]["bicubic"]),
    ):
        y = [rgb_to_y(tensor(p)) for p in (pixels, high)]
        expected = {"psnr_y": psnr(*y, shave=3), "ssim_y": ssim(*y, shave=3),
                    "psnr_rgb": psnr(pixels, high, shave=3), "ssim_rgb": ssim(pixels, high, shave=3)}  # fmt: skip
        assert {k: figures[k] for k in KEYS} == pytest.approx(expected, abs=1e-3)  # float32 may round a level otherwise


def test_idns_is_what_it_says(folder, idn):
    made = evaluate(idn, folder, scale=2)
    assert made["protocol"] == "idn"
    high = picture(41, 38)[:40, :38].astype(np.float64)
    y = torch.from_numpy(np.floor(high @ [65.481 / 255, 128.553 / 255, 24.966 / 255] + 16.5))[None, None] / 255
    low = imresize(y.float(), 0.5)
    with torch.inference_mode():
        result = idn(low, scale=2)[:, :, 1:-2, 1:-2]  # what the network makes begins at pixel (1, 1)
    expected = psnr(tensor(levels(result)), y[:, :, 2:-2, 2:-2])
    assert made["images"]["colour.png"]["psnr_y"] == pytest.approx(expected, abs=1e-3)
    bicubic = psnr(tensor(levels(imresize(low, 2))), y, shave=2)
    assert made["images"]["colour.png"]["bicubic"]["psnr_y"] == pytest.approx(bicubic, abs=1e-3)


def test_enhancenets_shrinks_by_pillow(folder, carn):
    made = evaluate(carn, folder, scale=2, protocol="enhancenet")["images"]["gray.bmp"]
    high = Image.fromarray(picture(36, 45, gray=True)[:, :44])
    low = high.resize((22, 18), Image.Resampling.LANCZOS)
    assert made["psnr_y"] == pytest.approx(psnr(np.array(fastsr.upscale(low, carn, scale=2)), np.array(high), shave=2))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_measures_both_kinds_of_network(folder, idn, carn, protocol):
    for network in (idn, carn):
        made = evaluate(network, folder, scale=2, protocol=protocol)
        assert made["protocol"] == protocol
        for figures in (*made["images"].values(), made["mean"]):
            assert figures.keys() == KEYS | {"bicubic"} and figures["bicubic"].keys() == KEYS
        gray = made["images"]["gray.bmp"]
        assert (gray["psnr_y"], gray["ssim_y"]) == (gray["psnr_rgb"], gray["ssim_rgb"])
        means = [made["images"][n]["bicubic"]["ssim_rgb"] for n in made["images"]]
        assert made["mean"]["bicubic"]["ssim_rgb"] == pytest.approx(np.mean(means))


def test_each_part_of_a_protocol_counts(folder, idn, monkeypatch):
    module = sys.modules["fastsr.evaluate"]
    base = PROTOCOLS["idn"]
    figures = [evaluate(idn, folder, scale=2)["mean"]["bicubic"]]
    for change in ({"border": "clamp"}, {"kernel": "lanczos"}, {"luma_first": False}, {"low_rounded": True},
                   {"result_rounded": False}, {"luma_rounded": False}):  # fmt: skip
        monkeypatch.setitem(module.PROTOCOLS, "idn", dataclasses.replace(base, **change))
        figures.append(evaluate(idn, folder, scale=2, protocol="idn")["mean"]["bicubic"])
    assert len({f["psnr_y"] for f in figures}) == len(figures)


def test_equal_images_have_no_finite_psnr(tmp_path, carn):
    Image.new("L", (24, 24), 77).save(tmp_path / "flat.png")
    made = evaluate(carn, tmp_path, scale=2)
    assert made["images"]["flat.png"]["bicubic"]["psnr_y"] is None and made["mean"]["bicubic"]["psnr_rgb"] is None
    json.dumps(made, allow_nan=False)


def test_what_is_refused(tmp_path, folder, carn):
    with pytest.raises(ValueError, match="protocol to be one of benchmark, idn"):
        evaluate(carn, folder, scale=2, protocol="div2k")
    with pytest.raises(ValueError, match="has the scales 2, 3"):
        evaluate(carn, folder, scale=4)
    with pytest.raises(ValueError, match="no images in this folder"):
        evaluate(carn, tmp_path, scale=2)
    with pytest.raises(FileNotFoundError):
        evaluate(carn, tmp_path / "nowhere", scale=2)
    Image.new("L", (9, 9)).save(tmp_path / "tiny.png")
    with pytest.raises(ValueError, match=r"tiny\.png: ssim: expected at least 11x11"):
        evaluate(carn, tmp_path, scale=2)
    Image.new("L", (1, 9)).save(tmp_path / "tiny.png")
    with pytest.raises(ValueError, match=r"tiny\.png: expected at least 2x2 pixels, got 9x1"):
        evaluate(carn, tmp_path, scale=2)


def test_a_result_that_is_not_finite_has_no_figures(folder):
    broken = fastsr.create("idn", **IDN, scale=2)
    broken.conv1.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"colour\.png: the network's result holds values that are not finite"):
        evaluate(broken, folder)


# The command line.


@pytest.fixture
def weights(tmp_path, idn):
    torch.save(idn.state_dict(), tmp_path / "idn.pth")
    return tmp_path / "idn.pth"


def test_cli_evaluate(folder, weights, idn, capsys):
    expected = evaluate(idn, folder, scale=2)
    assert cli.main(["evaluate", str(weights), str(folder), "--scale", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert cli.main(["evaluate", str(weights), str(folder), "--scale", "2", "--protocol", "benchmark"]) == 0
    printed = capsys.readouterr().out
    assert "gray.bmp" in printed and "mean of 2" in printed and "idn x2, protocol benchmark: 8-bit RGB" in printed
    assert cli.main(["evaluate", str(weights), str(folder.parent), "--scale", "2"]) == 1
    assert "no images in this folder" in capsys.readouterr().err
    assert cli.main(["evaluate", str(weights), str(folder)]) == 1
    assert "choose one" in capsys.readouterr().err


def test_cli_convert_and_info(tmp_path, weights, capsys):
    target = tmp_path / "idn.safetensors"
    assert cli.main(["convert", str(weights), str(target), "--hint", "scale=3"]) == 0
    assert "IDN(scale=3" in capsys.readouterr().out
    assert cli.main(["info", str(target), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {k: said[k] for k in ("network", "variant", "scale", "colour", "value_range")} == {
        "network": "idn", "variant": "caffe", "scale": 3, "colour": "y", "value_range": [0, 1],
    }  # fmt: skip
    assert said["parameters"] == fastsr.load(weights).parameter_count and "normal form" in said["format"]
    assert said["config"]["features"] == 8 and said["inferred"]["features"] == said["inferred"]["scale"] == "file"
    assert len(said["source_sha256"]) == 64

    assert cli.main(["info", str(weights), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["scale"] == [2, 3, 4] and said["inferred"]["scale"] == "assumed" and said["source_sha256"] is None
    assert cli.main(["info", str(weights), "--hint", "scale=2"]) == 0
    printed = capsys.readouterr().out
    assert "scales: x2" in printed and "given as hints: scale=2" in printed and "definition: leaky_slope" in printed

    assert cli.main(["convert", str(weights), str(weights)]) == 1
    assert cli.main(["convert", str(target), str(target)]) == 1
    assert "would replace the source" in capsys.readouterr().err


def test_cli_info_of_what_fits_nothing(tmp_path, capsys):
    torch.save({"odd.weight": torch.zeros(3)}, tmp_path / "odd.pth")
    assert cli.main(["info", str(tmp_path / "odd.pth"), "--json"]) == 1
    captured = capsys.readouterr()
    assert "none of the networks known here" in captured.err and captured.out == ""
    assert cli.main(["info", "--json"]) == 1
    with pytest.raises(SystemExit):
        cli.main(["info", str(tmp_path / "odd.pth"), "--hint", "scale"])


def test_a_missing_folder_is_said_before_anything_is_printed(tmp_path, capsys):
    assert cli.main(["evaluate", "carn_m", str(tmp_path / "nowhere"), "--scale", "2"]) == 1
    out, error = capsys.readouterr()
    assert out == "" and "nowhere: expected a folder of images; there is none" in error


def test_a_reader_that_goes_away_is_no_traceback():
    command = [sys.executable, "-c", "import sys; from fastsr import cli; sys.exit(cli.main(['info']))"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read() and process.wait() == 1
