"""Image files: reading photographs, and writing results so that a file is either complete or not there.

Pillow does the work wherever it loses nothing. It would cut 16-bit colour and 16-bit gray with alpha to 8 bits without
a word; those go through imagecodecs, which is an extra: `pip install 'fastsr[images]'`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib
import io
import os
import re
import secrets
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401  (so that Pillow need not import all it has)


@dataclass(frozen=True)
class Format:
    """What files of one extension can hold. `options` are Pillow's for saving."""

    name: str
    options: dict[str, Any]
    longest: int = 2**31 - 1  # side in pixels
    alpha: bool = True
    deep: bool = False  # 16 bits
    metadata: tuple[str, ...] = ("icc", "exif", "dpi")


_JPEG = Format("JPEG", {"quality": 95, "subsampling": 0}, longest=65535, alpha=False)  # 4:4:4: colour was just gained
_TIFF = Format("TIFF", {}, deep=True)
FORMATS = {
    ".png": Format("PNG", {}, deep=True),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".bmp": Format("BMP", {}, alpha=False, metadata=("dpi",)),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".webp": Format("WEBP", {"lossless": True, "exact": True}, longest=16383, metadata=("icc", "exif")),
}
READ = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # no other format of Pillow's: some lose depth, one runs a program
MAX_PIXELS = 2**27  # of an image that is read
_CHANNELS = {"1": 1, "L": 1, "LA": 2, "P": 3, "PA": 4, "RGB": 3, "RGBX": 3, "RGBA": 4}
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_WORDS = {"icc": "the colour profile", "exif": "the EXIF data", "dpi": "the resolution in dpi"}
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
# What a TIFF's first directory says about the photograph; its other tags say how that one file is laid out.
_ABOUT_PHOTOGRAPH = (270, 271, 272, 305, 306, 315, 316, 18246, 33432, 34665, 34853)


class Unsupported(ValueError):
    """An image of a kind, or a size, that is not read or cannot be stored so."""


@dataclass(frozen=True)
class Header:
    """What a file says about its image before any of it is decoded. The sides are as stored, not yet turned upright."""

    width: int
    height: int
    channels: int
    depth: int


@dataclass(frozen=True, eq=False)
class Picture:
    """An image and what belongs to it.

    pixels: (H, W, C) uint8 or uint16, upright; C 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA; alpha not premultiplied.
    icc: the colour profile. exif: EXIF data from "Exif" and two zeros on, whose orientation is upright. dpi: horizontal
    and vertical.
    notes: what could not be kept, in words.
    """

    pixels: np.ndarray
    icc: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


# Reading


def read_header(path: str | os.PathLike[str]) -> Header:
    """What the file says of itself, of which only the header is read.

    Raises OSError naming a file that is no image, Unsupported (a ValueError) for one that `read` refuses.
    """
    with _opened(Path(path)) as file:
        return _header(Path(path), file)


def read(path: str | os.PathLike[str]) -> Picture:
    """Reads a whole image file and turns it upright, as its EXIF orientation says.

    8 and 16 bits, gray, RGB, either with alpha. A palette becomes RGB or RGBA, one bit becomes gray.
    Raises OSError naming the file when it cannot be read or is damaged; Unsupported (a ValueError), before decoding,
    for CMYK and other kinds, for animations and several pages, and for more than MAX_PIXELS pixels; ImportError for 16
    bits a channel where imagecodecs is needed and missing.
    """
    path = Path(path)
    with _opened(path) as file:
        header = _header(path, file)
        file.load()
        if header.depth == 16 and not file.mode.startswith("I"):
            pixels = _decode_deep(path, file)
        else:
            pixels = pixels_of(file)
            if file.format == "TIFF" and header.depth == 16 and file.tag_v2.get(262) == 0:
                pixels = 65535 - pixels  # white is zero: Pillow turns that around for 8 bits only
        orientation, exif, notes = _read_exif(file)
        if file.format == "MPO":
            notes += ("the further pictures of this file are left out",)
        return Picture(
            _upright(pixels, orientation), file.info.get("icc_profile") or None, exif, _read_dpi(file), notes
        )


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """What `read` reads as a PIL image of mode L or RGB, with its colour profile in `info`, for those who want just
    that. Raises what `read` does, and Unsupported for 16 bits or alpha."""
    picture = read(path)
    if picture.pixels.dtype != np.uint8 or picture.pixels.shape[2] not in (1, 3):
        channels = _MODES[picture.pixels.shape[2]]
        raise Unsupported(f"{path}: expected 8 bits, gray or RGB, got {channels} of {picture.pixels.dtype}")
    image = image_of(picture.pixels)
    if picture.icc:
        image.info["icc_profile"] = picture.icc
    return image


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is checked, and is an error
            with Image.open(path, formats=READ) as file:
                yield file
    except (Unsupported, ImportError):
        raise
    except Image.DecompressionBombError as error:
        raise Unsupported(f"{path}: {error}; more than {MAX_PIXELS:,} pixels are not read") from error
    except Image.UnidentifiedImageError as error:
        raise OSError(f"{path}: cannot be read as an image: it is none of {', '.join(READ)}") from error
    except Exception as error:  # on damaged data decoders raise SyntaxError, ValueError, struct.error and more
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OSError(f"{path}: cannot be read as an image: {reason or type(error).__name__}") from error


def _header(path: Path, file: Any) -> Header:
    width, height = file.size
    if width * height > MAX_PIXELS:
        raise Unsupported(
            f"{path}: {width}x{height} makes {width * height:,} pixels, more than the {MAX_PIXELS:,} that are read; "
            "cut the image into parts"
        )
    if getattr(file, "is_animated", False) and file.format != "MPO":  # MPO: a JPEG with further pictures at its end
        raise Unsupported(f"{path}: an animation or several pages; expected one image, take the file apart first")
    check_mode(file, str(path), also=("I",))  # as older releases of Pillow open 16-bit gray PNG
    depth = 8
    if file.format == "PNG":
        depth = max(8, _byte(path, 24))
    elif file.format == "TIFF":
        bits, kind = file.tag_v2.get(258, (1,)), file.tag_v2.get(339, (1,))
        if any(k != 1 for k in kind) or (max(bits) > 8 and set(bits) != {16}):
            raise Unsupported(f"{path}: expected 8 or 16 bits a channel, unsigned, got {bits} bits of format {kind}")
        depth = max(8, *bits)
    if file.mode == "I" and depth != 16:
        raise Unsupported(_mode_message(str(path), file.mode))
    channels = 1 if file.mode.startswith("I") else _CHANNELS[file.mode]
    if file.format == "PNG" and _byte(path, 25) == 4:
        channels = 2  # 16-bit gray with alpha, which Pillow calls RGBA
    if channels in (1, 3) and "transparency" in file.info:
        channels += 1
    return Header(width, height, channels, depth)


def _byte(path: Path, position: int) -> int:
    with open(path, "rb") as file:
        file.seek(position)
        return file.read(1)[0]


def _decode_deep(path: Path, file: Any) -> np.ndarray:
    codecs = _imagecodecs(f"{path}: reading 16 bits a channel in colour or with alpha")
    data = path.read_bytes()
    if file.format == "PNG":
        pixels = codecs.png_decode(data)
    else:
        pixels = codecs.tiff_decode(data)
        if file.tag_v2.get(284) == 2:  # one plane after the other
            pixels = np.moveaxis(pixels, 0, -1)
        meaning = file.tag_v2.get(338, ())
        if meaning[:1] == (1,):  # premultiplied
            colour, alpha = pixels[..., :-1].astype(np.float64), pixels[..., -1:]
            colour = np.minimum(np.rint(colour * 65535 / np.maximum(alpha, 1)), 65535)
            pixels = np.concatenate([colour.astype(np.uint16), alpha], axis=-1)
        elif meaning[:1] == (0,):  # something else, as Pillow has it for 8 bits too
            pixels = pixels[..., :3]
    if pixels.dtype != np.uint16 or pixels.ndim != 3 or pixels.shape[:2] != file.size[::-1]:
        raise ValueError(f"expected {file.size[::-1]} pixels of 16 bits, got {pixels.shape} of {pixels.dtype}")
    return pixels


def _imagecodecs(purpose: str) -> Any:
    try:
        return importlib.import_module("imagecodecs")
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package imagecodecs: pip install 'fastsr[images]'") from error


def _read_exif(file: Any) -> tuple[int, bytes | None, tuple[str, ...]]:
    """(orientation, EXIF data that say upright, notes)."""
    try:
        found = file.getexif()
        orientation = found.get(_ORIENTATION, 1)
        if file.format == "TIFF":
            kept = Image.Exif()
            for tag in _ABOUT_PHOTOGRAPH:
                if tag in found:
                    kept[tag] = found.get_ifd(tag) if tag in (34665, 34853) else found[tag]
            return orientation, kept.tobytes() if len(kept) else None, ()
        data = file.info.get("exif")
        if data and orientation != 1:
            del found[_ORIENTATION]
            data = found.tobytes()
        return orientation, _EXIF + data.removeprefix(_EXIF) if data else None, ()
    except Exception as error:  # metadata that nobody can read are no reason to lose the image
        return 1, None, (f"the EXIF data are damaged and left out, an orientation with them: {error}",)


def _read_dpi(file: Any) -> tuple[float, float] | None:
    try:
        x, y = (float(v) for v in file.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 0 < x < 1e6 and 0 < y < 1e6 else None


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns (H, W, C) as EXIF orientation 1 to 8 says; anything else is upright."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


# Pillow's images and pixels


def check_mode(image: Image.Image, what: str = "image", *, also: Sequence[str] = ()) -> None:
    """Raises Unsupported (a ValueError) for a mode of Pillow's that is not read, with a word on what to do."""
    if image.mode not in (*_CHANNELS, "I;16", "I;16L", "I;16B", *also):
        raise Unsupported(_mode_message(what, image.mode))


def _mode_message(what: str, mode: str) -> str:
    if mode == "CMYK":
        return f"{what}: CMYK, whose inks mean colours only by a profile; convert it to RGB with that profile first"
    return (
        f"{what}: expected gray, RGB, palette or one bit, 8 or 16 bits, with or without alpha, got mode {mode}; "
        "convert it first, as in image.convert('RGB')"
    )


def pixels_of(image: Image.Image) -> np.ndarray:
    """(H, W, C) of a PIL image: uint16 for 16-bit gray, else uint8; C as in `Picture`. Raises as `check_mode` does."""
    check_mode(image, also=("I",))
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):
        pixels = np.array(image).astype(np.uint16)[..., None]
        if transparent is None:
            return pixels
        return np.concatenate([pixels, np.where(pixels == transparent, 0, 65535).astype(np.uint16)], axis=-1)
    if image.mode in ("P", "PA"):
        image = image.convert("RGB" if transparent is None and image.mode == "P" else "RGBA")
    elif transparent is not None and image.mode in ("1", "L", "RGB"):
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    elif image.mode in ("1", "RGBX"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return np.array(image).reshape(image.height, image.width, -1)


def image_of(pixels: np.ndarray) -> Image.Image:
    """The PIL image of pixels (H, W, C): mode L, LA, RGB, RGBA, or I;16 for 16-bit gray, the only one Pillow has.

    Raises Unsupported for 16 bits of another kind.
    """
    if pixels.dtype == np.uint16 and pixels.shape[2] > 1:
        raise Unsupported(f"image: Pillow has no 16-bit image of {pixels.shape[2]} channels; use NumPy arrays")
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))


# Writing


def format_of(path: str | os.PathLike[str]) -> Format:
    """By the extension. Raises Unsupported for an unknown one."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise Unsupported(f"{path}: expected one of the extensions {', '.join(FORMATS)}, got '{path.suffix}'")
    return FORMATS[path.suffix.lower()]


def check_writable(path: str | os.PathLike[str], width: int, height: int, channels: int = 3, depth: int = 8) -> None:
    """Raises Unsupported when the format of this extension cannot hold such an image, or there is no such format, and
    ImportError when writing it needs a package that is missing. (16 bits do fit everywhere: they are rounded to 8.)"""
    path, kind = Path(path), format_of(path)
    if max(width, height) > kind.longest:
        raise Unsupported(
            f"{path}: {width}x{height} pixels do not fit a {path.suffix} file (at most {kind.longest} a side); use .png"
        )
    if channels in (2, 4) and not kind.alpha:
        raise Unsupported(f"{path}: a {path.suffix} file has no alpha channel; use .png, .tiff or .webp")
    if kind.name == "PNG" and depth == 16 and channels > 1:
        _imagecodecs(f"{path}: writing 16 bits a channel in colour or with alpha")


def encode(path: str | os.PathLike[str], picture: Picture) -> tuple[bytes, tuple[str, ...]]:
    """The bytes of a file with this extension, and notes on what of the picture it cannot hold.

    JPEG at quality 95 without chroma subsampling, WebP without loss. Raises what `check_writable` does.
    """
    pixels, kind = picture.pixels, format_of(path)
    height, width, channels = pixels.shape
    check_writable(path, width, height, channels, 16 if pixels.dtype == np.uint16 else 8)
    held = {"icc": picture.icc, "exif": picture.exif, "dpi": picture.dpi}
    lost = [k for k, v in held.items() if v and k not in kind.metadata]
    if kind.name == "JPEG" and len(picture.exif or b"") > 65000:  # a segment holds no more
        lost.append("exif")
    notes = tuple(f"{_WORDS[k]} of the image does not fit this format" for k in lost)
    held = {k: v for k, v in held.items() if v and k not in lost}
    if pixels.dtype == np.uint16 and not kind.deep:
        pixels = np.rint(pixels / 257).astype(np.uint8)
        notes += (f"16 bits are rounded to the 8 of {Path(path).suffix}",)
    if kind.name == "TIFF":
        encoded = _tiff(pixels, held)
    elif pixels.dtype == np.uint16 and channels > 1:
        encoded = _deep_png(pixels, held)
    else:
        buffer = io.BytesIO()
        named = {{"icc": "icc_profile"}.get(k, k): v for k, v in held.items()}
        image_of(pixels).save(buffer, kind.name, **kind.options, **named)
        encoded = buffer.getvalue()
    return encoded, notes


def write(path: str | os.PathLike[str], picture: Picture) -> tuple[str, ...]:
    """Writes the picture in the format of the path's extension by `write_atomically`; returns `encode`'s notes.

    Raises what `encode` does, and OSError when the file cannot be written.
    """
    encoded, notes = encode(path, picture)
    write_atomically(path, encoded)
    return notes


def _deep_png(pixels: np.ndarray, held: dict[str, Any]) -> bytes:
    encoded = _imagecodecs("writing 16 bits a channel").png_encode(np.ascontiguousarray(pixels))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    added = b""
    if "icc" in held:
        added += chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(held["icc"]))
    if "dpi" in held:
        added += chunk(b"pHYs", struct.pack(">IIB", *(round(v / 0.0254) for v in held["dpi"]), 1))
    if "exif" in held:
        added += chunk(b"eXIf", held["exif"].removeprefix(_EXIF))
    return encoded[:33] + added + encoded[33:]  # right behind the signature and the header, IHDR


def _tiff(pixels: np.ndarray, held: dict[str, Any]) -> bytes:
    """One strip, deflated after horizontal differences (predictor 2). Pillow lays out the directory; its own writer
    knows neither 16-bit colour nor EXIF data in a compressed file."""
    if pixels.dtype == np.uint16 and pixels.shape[2] == 2:
        pixels = pixels[..., [0, 0, 0, 1]]  # hardly any reader knows 16-bit gray with alpha
    differences = pixels.astype(pixels.dtype.newbyteorder("<"))
    differences[:, 1:] -= pixels[:, :-1]
    strip = zlib.compress(differences.tobytes(), 6)
    layout = {259: 8, 273: 0, 278: len(pixels), 279: len(strip), 317: 2}  # 273 counts from the directory's end
    return tiff_directory(pixels.shape, pixels.dtype, layout, held) + strip


def tiff_directory(shape: tuple[int, int, int], dtype: np.dtype, layout: dict[int, Any], held: dict[str, Any]) -> bytes:
    """The start of a little-endian TIFF of (H, W, C) pixels, whose data follow behind it. layout: the tags that say
    how; a strip's offset counts from the end of what is returned. held: "icc", "exif", "dpi"."""
    height, width, channels = shape
    tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    bits, photometric = 8 * dtype.itemsize, 1 if channels < 3 else 2  # black is zero, or RGB
    tags.update({256: width, 257: height, 258: (bits,) * channels, 262: photometric, 277: channels, 284: 1, **layout})
    if channels in (2, 4):
        tags[338] = 2  # alpha, not premultiplied
    if "icc" in held:
        tags.tagtype[34675] = 7
        tags[34675] = held["icc"]
    if "dpi" in held:
        tags.update({282: held["dpi"][0], 283: held["dpi"][1], 296: 2})
    if "exif" in held:
        exif = Image.Exif()
        exif.load(held["exif"])
        for tag in _ABOUT_PHOTOGRAPH:
            if tag in exif:
                tags[tag] = exif.get_ifd(tag) if tag in (34665, 34853) else exif[tag]
    buffer = io.BytesIO()
    tags.save(buffer)
    return buffer.getvalue()


def write_atomically(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Writes data to path by `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A binary file to write, which is at `path` once the block is left: any reader, at any time, finds the old file or
    the whole new one, and it stays there once the block is left, whatever happens to the machine.

    The new file gets the mode that open() would give it (0o666 less the umask). On any failure the old file is as it
    was and the temporary one, in the same folder because a rename cannot cross file systems, is gone. A killed process
    leaves its temporary file to `remove_temporaries`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            lock(file.fileno())  # says that somebody is still at it; the kernel takes it from the dead
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename: else a crash could leave the new name on an empty file
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def lock(descriptor: int) -> None:
    """Waits for the only lock on an open file, where the file system has locks: some on networks have none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise


def sync_folder(folder: Path) -> None:
    """Waits until the names in the folder are on the disk, where the file system can tell."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Removes what killed processes left of `atomic_file` in this folder; files still being written stay."""
    for path in folder.glob(".*.tmp"):
        if not re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", path.name):
            continue
        with contextlib.suppress(OSError), open(path, "rb") as file:  # gone meanwhile, or locked: somebody else's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def file_digest(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
