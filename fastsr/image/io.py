"""Image files: reading photographs, and writing results so that a file is either complete or not there."""

from __future__ import annotations

import io
import os
import secrets
from pathlib import Path

from PIL import Image, ImageOps

# By extension: Pillow's format, how to save (JPEG with full colour resolution: halving it again would undo what was
# just gained), and the longest side that the format can store.
_JPEG = ("JPEG", {"quality": 95, "subsampling": 0}, 65535)
_TIFF = ("TIFF", {"compression": "tiff_deflate"}, 2**31 - 1)
FORMATS = {
    ".png": ("PNG", {}, 2**31 - 1),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".bmp": ("BMP", {}, 2**31 - 1),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".webp": ("WEBP", {"lossless": True}, 16383),
}
MODES = ("L", "RGB")


def check_mode(image: Image.Image, what: str = "image") -> None:
    """Raises ValueError unless the image is 8-bit gray ("L") or RGB, the kinds that are upscaled for now."""
    if image.mode not in MODES:
        raise ValueError(
            f"{what}: expected 8-bit gray (mode L) or RGB, got mode {image.mode}; convert it first, "
            "as in image.convert('RGB')"
        )


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Reads a whole image file, 8-bit gray or RGB, turned upright as its EXIF orientation says.

    Raises OSError naming the file when it cannot be read or is damaged, ValueError when it is of another kind.
    """
    path = Path(path)
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except Exception as error:  # on damaged data Pillow's decoders raise SyntaxError, ValueError, struct.error and more
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OSError(f"{path}: cannot be read as an image: {reason}") from error
    check_mode(image, str(path))
    return image


def check_writable(path: str | os.PathLike[str], width: int, height: int) -> None:
    """Raises ValueError when `path` has no known image extension, or its format cannot hold width x height pixels."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected one of the extensions {', '.join(FORMATS)}, got '{path.suffix}'")
    longest = FORMATS[path.suffix.lower()][2]
    if max(width, height) > longest:
        raise ValueError(
            f"{path}: {width}x{height} pixels do not fit a {path.suffix} file (at most {longest} a side); use .png"
        )


def write_image(path: str | os.PathLike[str], image: Image.Image) -> None:
    """Writes the image in the format of the path's extension, with its colour profile, by `write_atomically`.

    Raises ValueError for an unknown extension or too many pixels, OSError when the file cannot be written.
    """
    check_writable(path, *image.size)
    name, options, _ = FORMATS[Path(path).suffix.lower()]
    buffer = io.BytesIO()
    profile = {"icc_profile": image.info["icc_profile"]} if image.info.get("icc_profile") else {}
    image.save(buffer, name, **options, **profile)
    write_atomically(path, buffer.getbuffer())


def write_atomically(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Writes data to path so that any reader, at any time, finds the old file or the whole new one.

    The new file gets the mode that open() would give it (0o666 less the umask). On any failure the old file is as it
    was and the temporary one, in the same folder because a rename cannot cross file systems, is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # before the rename: else a crash could leave the new name on an empty file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
