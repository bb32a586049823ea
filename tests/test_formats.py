"""Image files of every kind: what is kept, what is turned, what is refused and in which words."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io as memory
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from fastsr.image import io
from fastsr.image.io import Picture

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXTENSIONS = (".png", ".jpg", ".bmp", ".tiff", ".webp")


def made(channels: int, dtype: type = np.uint8, height: int = 5, width: int = 7) -> np.ndarray:
    """Random pixels, some of them invisible."""
    pixels = np.random.default_rng(channels).integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype)
    if channels in (2, 4):
        pixels[:2, :, -1] = 0
    return pixels


def exif(orientation: int = 1) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    data[271] = "A camera"
    data[34665] = {0x829A: 0.125}  # exposure time
    data[34853] = {1: "N"}  # of the equator
    return data.tobytes()


def deep(channels: int, dtype: type) -> bool:
    return dtype == np.uint16 and channels > 1


def whole(tmp_path, channels: int, dtype: type, extension: str) -> tuple[Picture, Picture, tuple[str, ...]]:
    """(a picture with all that may belong to it, the picture read from its file, the notes of writing)."""
    if deep(channels, dtype):
        pytest.importorskip("imagecodecs", reason="16 bits a channel need the extra fastsr[images]")
    before = Picture(made(channels, dtype), PROFILE, exif(), (300.0, 150.0))
    notes = io.write(tmp_path / f"a{extension}", before)
    return before, io.read(tmp_path / f"a{extension}"), notes


# What is kept.


@pytest.mark.parametrize("extension", [".png", ".tiff", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_and_tiff_keep_everything(tmp_path, channels, dtype, extension):
    before, after, notes = whole(tmp_path, channels, dtype, extension)
    expected = before.pixels
    if deep(channels, dtype) and channels == 2 and extension != ".png":
        expected = expected[..., [0, 0, 0, 1]]
    np.testing.assert_array_equal(after.pixels, expected)
    assert after.pixels.dtype == dtype and after.icc == PROFILE and notes == after.notes == ()
    assert after.dpi == pytest.approx((300, 150), rel=1e-4)
    kept = Image.Exif()
    kept.load(after.exif)
    assert kept[271] == "A camera" and kept.get_ifd(34665)[0x829A] == 0.125 and kept.get_ifd(34853)[1] == "N"
    header = io.read_header(tmp_path / f"a{extension}")
    assert (header.width, header.height, header.channels) == (7, 5, expected.shape[2])
    assert header.depth == (16 if dtype == np.uint16 else 8)


@pytest.mark.parametrize("extension", [".png", ".tiff"])
def test_others_read_our_deep_files(tmp_path, extension):
    """By the headers, with Pillow and tifffile: what it says it is, with a profile that opens."""
    codecs = pytest.importorskip("imagecodecs", reason="16 bits a channel need the extra fastsr[images]")
    before, _, _ = whole(tmp_path, 4, np.uint16, extension)
    with Image.open(tmp_path / f"a{extension}") as image:
        np.testing.assert_array_equal(np.asarray(image), before.pixels >> 8)
        assert ImageCms.ImageCmsProfile(memory.BytesIO(image.info["icc_profile"])).tobytes() == PROFILE
        assert image.getexif()[271] == "A camera"
    data = (tmp_path / f"a{extension}").read_bytes()
    decoded = codecs.png_decode(data) if extension == ".png" else codecs.tiff_decode(data)
    np.testing.assert_array_equal(decoded, before.pixels)
    if extension == ".tiff":
        tifffile = pytest.importorskip("tifffile")
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tiff"), before.pixels)


def test_webp_keeps_invisible_colours(tmp_path):
    for channels in (3, 4):
        before, after, notes = whole(tmp_path, channels, np.uint8, ".webp")
        np.testing.assert_array_equal(after.pixels, before.pixels)
        assert after.icc == PROFILE and after.exif == before.exif and after.dpi is None
        assert notes == ("the resolution in dpi of the image does not fit this format",)


def test_jpeg_and_bmp_say_what_they_lose(tmp_path):
    _, after, notes = whole(tmp_path, 3, np.uint8, ".jpg")
    assert notes == () and after.icc == PROFILE and after.exif == exif() and after.dpi == (300, 150)
    before, after, notes = whole(tmp_path, 3, np.uint8, ".bmp")
    np.testing.assert_array_equal(after.pixels, before.pixels)
    assert [n.split(" of")[0] for n in notes] == ["the colour profile", "the EXIF data"]
    notes = io.write(tmp_path / "b.jpg", Picture(made(3), exif=exif() + bytes(70000)))
    assert notes == ("the EXIF data of the image does not fit this format",)


def test_sixteen_bits_are_rounded_where_only_eight_fit(tmp_path):
    pixels = made(1, np.uint16)
    notes = io.write(tmp_path / "a.webp", Picture(pixels))
    assert notes == ("16 bits are rounded to the 8 of .webp",)
    np.testing.assert_array_equal(io.read(tmp_path / "a.webp").pixels, np.rint(pixels / 257).repeat(3, 2))


@pytest.mark.parametrize("extension", [".jpg", ".bmp"])
def test_alpha_is_not_dropped(tmp_path, extension):
    with pytest.raises(ValueError, match="no alpha channel; use .png"):
        io.write(tmp_path / f"a{extension}", Picture(made(4)))


# What is turned, and what is converted.


@pytest.mark.parametrize("extension", [".png", ".jpg", ".tiff", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(tmp_path, extension, orientation):
    quarter = np.zeros((16, 24, 3), np.uint8)
    quarter[:8, :8] = (250, 120, 10)
    image = Image.fromarray(quarter)
    image.save(tmp_path / f"a{extension}", exif=exif(orientation), quality=100)
    with Image.open(tmp_path / f"a{extension}") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    once = io.read(tmp_path / f"a{extension}")
    np.testing.assert_array_equal(once.pixels, expected)
    io.write(tmp_path / "b.png", once)
    twice = io.read(tmp_path / "b.png")
    np.testing.assert_array_equal(twice.pixels, expected)
    kept = Image.Exif()
    kept.load(twice.exif)
    assert kept.get(0x0112, 1) == 1 and kept[271] == "A camera" and kept.get_ifd(34665)[0x829A] == 0.125


def test_deep_pictures_are_turned_too(tmp_path):
    pytest.importorskip("imagecodecs", reason="16 bits a channel need the extra fastsr[images]")
    pixels = made(3, np.uint16)
    for name in ("a.png", "a.tiff"):
        io.write(tmp_path / name, Picture(pixels, exif=exif(6) if name == "a.png" else None))
    np.testing.assert_array_equal(io.read(tmp_path / "a.png").pixels, np.rot90(pixels, -1))
    np.testing.assert_array_equal(io.read(tmp_path / "a.tiff").pixels, pixels)


def test_damaged_exif_loses_only_itself(tmp_path):
    Image.fromarray(made(3)).save(tmp_path / "a.png", exif=b"Exif\0\0no exif data at all")
    picture = io.read(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.pixels, made(3))
    assert picture.exif is None and "EXIF data are damaged" in picture.notes[0]


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes_and_transparent_colours(tmp_path, transparent):
    palette = Image.fromarray(made(3)).quantize(4)
    gray = Image.fromarray(made(1)[..., 0] // 64 * 64)
    bits = Image.fromarray(made(1)[..., 0] > 99)
    colour = Image.fromarray(made(3))
    for image, key in ((palette, 2), (gray, 64), (bits, 0), (colour, tuple(map(int, made(3)[0, 0])))):
        for extension in (".png", ".gif") if image is palette else (".png",):
            image.save(tmp_path / f"a{extension}", **({"transparency": key} if transparent else {}))
            with Image.open(tmp_path / f"a{extension}") as stored:
                expected = np.asarray(stored.convert("RGBA"))
            pixels = io.read(tmp_path / f"a{extension}").pixels
            assert pixels.shape[2] == (3 if image.mode in ("P", "RGB") else 1) + transparent
            assert io.read_header(tmp_path / f"a{extension}").channels == pixels.shape[2]
            shown = pixels if pixels.shape[2] > 2 else pixels[..., [0, 0, 0, 1][: 3 + transparent]]
            np.testing.assert_array_equal(shown, expected[..., : shown.shape[2]])
            assert ((expected[..., 3] == 0).any() and not (expected[..., 3] == 0).all()) == transparent


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_transparent_colours_of_sixteen_bits(tmp_path):
    for channels in (1, 3):
        if channels == 3:
            pytest.importorskip("imagecodecs", reason="16 bits a channel need the extra fastsr[images]")
        pixels = made(channels, np.uint16)
        data, _ = io.encode("a.png", Picture(pixels))
        key = _chunk(b"tRNS", pixels[0, 0].astype(">u2").tobytes())
        (tmp_path / "a.png").write_bytes(data[:33] + key + data[33:])
        read = io.read(tmp_path / "a.png").pixels
        np.testing.assert_array_equal(read[..., :-1], pixels)
        np.testing.assert_array_equal(read[..., -1] == 0, (pixels == pixels[0, 0]).all(-1))
        assert io.read_header(tmp_path / "a.png").channels == channels + 1


def test_tiffs_of_others(tmp_path):
    """Planes one after the other, big-endian, premultiplied alpha, white as zero."""
    tifffile = pytest.importorskip("tifffile")
    path, gray, rgba = tmp_path / "a.tiff", made(1, np.uint16)[..., 0], made(4, np.uint16)
    for dtype, peak in ((np.uint8, 255), (np.uint16, 65535)):
        tifffile.imwrite(path, gray.astype(dtype), photometric="miniswhite")
        np.testing.assert_array_equal(io.read(path).pixels[..., 0], peak - gray.astype(dtype))
    pytest.importorskip("imagecodecs", reason="16 bits a channel need the extra fastsr[images]")
    tifffile.imwrite(path, rgba[..., :3].transpose(2, 0, 1), photometric="rgb", planarconfig="separate", byteorder=">")
    np.testing.assert_array_equal(io.read(path).pixels, rgba[..., :3])
    visible = rgba.copy()
    visible[..., 3] |= 0x8000
    premultiplied = visible.copy()
    premultiplied[..., :3] = np.rint(visible[..., :3] * (visible[..., 3:] / 65535))
    tifffile.imwrite(path, premultiplied, photometric="rgb", extrasamples=["assocalpha"])
    read = io.read(path).pixels
    assert np.abs(read.astype(int) - visible).max() <= 1 and (read[..., 3] == visible[..., 3]).all()


def test_a_jpeg_of_several_pictures_is_its_first(tmp_path):
    first, second = (Image.fromarray(made(3, height=16, width=24)[::step]) for step in (1, -1))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    picture = io.read(tmp_path / "a.jpg")
    assert picture.pixels.shape == (16, 24, 3) and "further pictures" in picture.notes[0]


# What is refused.


def refused(path, *words: str) -> None:
    """Both from the header and when reading, by name."""
    for action in (io.read_header, io.read):
        with pytest.raises(io.Unsupported) as caught:
            action(path)
        assert all(word in str(caught.value) for word in (str(path), *words)), str(caught.value)


def test_kinds_that_are_refused(tmp_path):
    Image.new("CMYK", (4, 4)).save(tmp_path / "inks.jpg")
    refused(tmp_path / "inks.jpg", "CMYK", "convert it to RGB with that profile first")
    Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
    refused(tmp_path / "float.tiff", "8 or 16 bits")
    Image.new("I", (4, 4)).save(tmp_path / "wide.tiff")
    refused(tmp_path / "wide.tiff", "8 or 16 bits")
    frames = [Image.fromarray(made(3) // n) for n in (1, 2, 3)]
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        refused(tmp_path / name, "animation or several pages")


@pytest.mark.parametrize("side", [12_000, 30_000])
def test_huge_images_are_refused_by_their_header(tmp_path, side):
    """The second is beyond Pillow's own limit. The file holds no pixels at all, so nothing can have been decoded."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")
    (tmp_path / "huge.png").write_bytes(data)
    refused(tmp_path / "huge.png", "pixels")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File")  # on TIFF directories, before the error
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_truncated_files_are_damaged_and_never_gray_below(tmp_path, extension, dtype):
    if dtype == np.uint16:
        pytest.importorskip("imagecodecs", reason="16 bits a channel need the extra fastsr[images]")
    io.write(tmp_path / f"a{extension}", Picture(made(3, dtype, 40, 40)))
    data = (tmp_path / f"a{extension}").read_bytes()
    for share in (0.02, 0.3, 0.9):
        (tmp_path / f"cut{extension}").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(OSError, match=f"cut{extension}: cannot be read as an image: ."):
            io.read(tmp_path / f"cut{extension}")


@pytest.mark.filterwarnings("ignore")  # Pillow's on metadata; the damage here is random
def test_whatever_the_damage_the_error_names_the_file(tmp_path):
    """Bytes of good files changed, left out and put in: 300 files that are read, or raise one of two errors."""
    choose = random.Random(0)
    good = {}
    for extension in EXTENSIONS:
        good[extension] = io.encode(f"a{extension}", Picture(made(3, height=20), PROFILE, exif(6), (72.0, 72.0)))[0]
    raised = 0
    for _ in range(300):
        extension = choose.choice(EXTENSIONS)
        data = bytearray(good[extension])
        for _ in range(choose.choice((1, 4, 16))):
            place = choose.randrange(min(len(data), choose.choice((40, 400, len(data)))))
            data[place : place + choose.choice((0, 1, 1, 4))] = choose.choice((b"\xff" * 4, b"\0", choose.randbytes(1)))
        path = tmp_path / f"a{extension}"
        path.write_bytes(data)
        try:
            io.read_header(path)
            assert io.read(path).pixels.size > 0
        except (OSError, io.Unsupported) as error:
            assert str(path) in str(error)
            raised += 1
    assert 50 < raised < 300


@pytest.mark.parametrize("data", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"])
def test_fakes(tmp_path, data):
    """The last one is a program, which Pillow would have had Ghostscript run."""
    (tmp_path / "fake.png").write_bytes(data)
    for action in (io.read_header, io.read):
        with pytest.raises(OSError, match="fake.png: cannot be read as an image: it is none of BMP, GIF"):
            action(tmp_path / "fake.png")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    png = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    png += _chunk(b"IDAT", zlib.compress(bytes(7))) + _chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    monkeypatch.setitem(__import__("sys").modules, "imagecodecs", None)
    with pytest.raises(ImportError, match=r"a.png: reading 16 bits .* pip install 'fastsr\[images\]'"):
        io.read(tmp_path / "a.png")
    with pytest.raises(ImportError, match=r"b.png: writing 16 bits"):
        io.write(tmp_path / "b.png", Picture(made(3, np.uint16)))
    io.write(tmp_path / "gray.png", Picture(made(1, np.uint16)))  # Pillow alone
    np.testing.assert_array_equal(io.read(tmp_path / "gray.png").pixels, made(1, np.uint16))


# Temporary files.


@pytest.mark.parametrize(("number", "fails"), [(errno.ENOLCK, False), (errno.EINVAL, False), (errno.EIO, True)])
def test_file_systems_without_locks_will_do(tmp_path, monkeypatch, number, fails):
    def refuse(descriptor, *_):
        raise OSError(number, "no such thing here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError) if fails else contextlib.nullcontext():
        io.write_atomically(tmp_path / "a", b"data")
    assert [p.name for p in tmp_path.iterdir()] == ([] if fails else ["a"])


def test_what_the_dead_left_is_removed_and_nothing_else(tmp_path):
    stale, live = (tmp_path / f".a.png.{c * 16}.tmp" for c in "0f")
    others = [tmp_path / name for name in (".a.png.tmp", "a.png", ".a.png.00.tmp")]
    for path in (stale, live, *others):
        path.write_bytes(b"")
    with open(live, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        io.remove_temporaries(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([live, *others])
    io.remove_temporaries(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)
