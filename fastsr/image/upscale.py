"""From a photograph to a larger one: the main job of the package, `fastsr.upscale`.

How pixels go through a network, where papers leave a choice:

* 8-bit results are clamped to 0..255 and rounded to the nearest integer, halves up; 16-bit ones likewise to 0..65535.
* A scale that the network has not: the next larger one that it has, then the cubic `imresize`.
* An image with alpha goes through the network twice: over black, which is premultiplied colours, and over white. What
  the results differ by is 1 - alpha, and colours are those over black divided by that alpha. So no colour of invisible
  pixels gets into visible ones, and over either ground the result is what the network makes of such an image. Where
  alpha is constant around a pixel it stays exactly so; an image that is equally opaque everywhere takes one pass only.
* A network of luma (`colour == "y"`) gets MATLAB's BT.601 luma of a colour image, and the chroma is enlarged by the
  cubic `imresize`; a gray image is given to it as it is.
* A network of RGB gets a gray image as three equal channels, and its output is turned into gray by
  0.299 R + 0.587 G + 0.114 B.
* What holds NaN or infinity in half precision is computed again in float32, with a warning; a result that still does
  raises FloatingPointError: it would be stored as black or white pixels.
* Large images go through the network in tiles, see `fastsr.image.tiles`.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastsr.image import io, tiles
from fastsr.image.passes import Pass
from fastsr.image.resize import imresize, scaled_shape
from fastsr.models import Network, load
from fastsr.models.embedded import DEFAULT, DEFAULT_SCALE, is_embedded, weights_of
from fastsr.models.sftgan import OutdoorSceneSeg, SFTNet

if TYPE_CHECKING:
    from fastsr.train.zssr import ZSSRConfig

ImageLike = TypeVar("ImageLike", np.ndarray, Image.Image, Tensor)
Convert = Callable[[Tensor], Tensor]

MAX_PIXELS = 2**27  # of a result: 11585 x 11585. Beyond, the feature maps of no network here fit a usual machine
ZSSR = "zssr"  # needs no file: it learns from the image itself
ZSSR_SCALES = (2, 3, 4)


def upscale(
    image: ImageLike,
    model: Network | nn.Module | Mapping[str, Any] | str | os.PathLike[str] = DEFAULT,
    *,
    scale: float | None = None,
    segmentation: Network | nn.Module | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    config: ZSSRConfig | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    tile: int | str | None = tiles.AUTO,
    tile_pad: int | str | None = None,
    self_ensemble: bool = False,
    deterministic: bool = False,
) -> ImageLike:
    """Enlarges an image by `scale`; the result is of the same kind, depth and colour type as the input.

    image: NumPy uint8 or uint16, (H, W), (H, W, 3), or with alpha (H, W, 2) and (H, W, 4); a PIL image of mode L, LA,
        RGB, RGBA or I;16, of a palette (the result is RGB or RGBA) or of one bit (the result is L), whose result keeps
        `info`'s colour profile, EXIF data and dpi; or a floating-point tensor (N, C, H, W), C 1 or 3, with values 0..1,
        whose result keeps its dtype and device and is clamped to 0..1.
    model: what `fastsr.load` returns or accepts, which computes on the device and in the dtype of its parameters; or
        "carn_m" (default), whose weights come with fastsr; or "zssr", the network that learns from this one image
        (`fastsr.train.zssr`). These two compute in float32 on the device of a tensor, and for other kinds on a CUDA
        device if there is one.
    scale: one of `model.scales`, or any number from 1 to the largest of them: the result then has the size that
        `imresize` gives. May be left out when the model has only one. "carn_m" and
        "zssr" have 2, 3 and 4 and default to 2.
    segmentation: for SFTGAN, and needed by it: the outdoor scene segmentation network, as `fastsr.load` returns or
        accepts it, which says what is where in the image.
    config, progress: settings of ZSSR, and what it calls after every iteration (`fastsr.train.zssr.zssr`).
    device, dtype: where and in which dtype to compute; a network that is elsewhere, or in another, is copied. Default:
        as said for `model`.
    tile: the largest side, in pixels of the image, of the parts in which it goes through the network; None is the whole
        image at once. "auto" is that too where it fits into free memory, else the largest parts that do; when memory
        runs out nevertheless, with a warning, smaller ones.
    tile_pad: pixels of the neighbourhood that each part is computed with. "exact" is as far as the network looks, and
        so is None but for ESRGAN and RDN, which look hundreds of pixels far: 32, see `fastsr.image.tiles.halo`.
    self_ensemble: the mean of the eight results for the image turned and mirrored, each turned back (EDSR's "+").
    deterministic: the same bits whatever the order of tiles, how many fit at once and how much memory is free.
    Raises TypeError or ValueError, before any work, for an image, model or scale that is not one of these, a result of
    more than MAX_PIXELS pixels, or options that do not go together; FloatingPointError for a result that is not finite;
    MemoryError where not even small tiles fit.
    """
    height, width = image_size(image)
    tiles.check(tile, tile_pad)
    if isinstance(model, str) and model == ZSSR:
        if segmentation is not None:
            raise TypeError("upscale: segmentation is for SFTGAN, not for ZSSR")
        if (
            dtype is not None
            or tile not in (None, tiles.AUTO)
            or tile_pad is not None
            or self_ensemble
            or deterministic
        ):
            raise TypeError(
                "upscale: dtype, tile, tile_pad, self_ensemble and deterministic are for trained networks; ZSSR learns "
                "from the whole image, in float32, and averages turned images itself"
            )
        factor, scale = next_scale("ZSSR", ZSSR_SCALES, ZSSR_SCALES[0] if scale is None else scale)
        values = to_tensor(image, torch.float32).to(device or default_device(image))

        def through(x: Tensor, convert: Convert) -> Tensor:
            return convert(_learn(x, factor, config, progress))
    else:
        if config is not None or progress is not None:
            raise TypeError('upscale: config and progress are for model="zssr"; other networks make one pass')
        if is_embedded(model):
            device, scale = device or default_device(image), DEFAULT_SCALE if scale is None else scale
        network = as_network(model, device, dtype)
        factor, scale = next_scale(type(network).__name__, network.scales, scale)
        steps = Pass(network, factor, as_segmentation(network, segmentation))
        values = to_tensor(image, steps.dtype).to(network.device)

        def through(x: Tensor, convert: Convert) -> Tensor:
            if self_ensemble:
                return convert(
                    _turned_mean(lambda turned: _in_parts(steps, turned, _same, tile, tile_pad, deterministic), x)
                )
            return _in_parts(steps, x, convert, tile, tile_pad, deterministic)

    check_size(height, width, factor)
    peak = 65535 if _is_deep(image) else 255

    def levels(x: Tensor) -> Tensor:
        return to_levels(x, image)

    def resized(x: Tensor) -> Tensor:
        result = through(x, _same)
        return imresize(result, scale / factor, shape=scaled_shape(height, width, scale)) if scale != factor else result

    with torch.no_grad(), repeatable(deterministic):
        if values.shape[1] not in (1, 3):
            result = levels(_with_alpha(values, resized, smallest=0.5 / peak))
        elif scale != factor:
            result = levels(resized(values))
        else:
            result = through(values, levels)  # rounded part by part: never are all of the result's values in memory
        return cast(ImageLike, _from_levels(result, image))


def image_size(image: np.ndarray | Image.Image | Tensor) -> tuple[int, int]:
    """(height, width) of an image that `upscale` takes. Raises TypeError or ValueError, naming what it does take."""
    if isinstance(image, Image.Image):
        io.check_mode(image)
        width, height = image.size
    elif isinstance(image, np.ndarray):
        shaped = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (2, 3, 4))
        if image.dtype not in (np.uint8, np.uint16) or not shaped:
            raise ValueError(
                "image: expected NumPy uint8 or uint16, (H, W) or (H, W, C) with 2 to 4 channels, "
                f"got {image.dtype} {image.shape}"
            )
        height, width = image.shape[:2]
    elif isinstance(image, Tensor):
        if not image.is_floating_point() or image.dim() != 4 or image.shape[1] not in (1, 3):
            raise ValueError(
                "image: expected a floating-point tensor (N, C, H, W) with 1 or 3 channels and values 0..1, "
                f"got {image.dtype} {tuple(image.shape)}"
            )
        height, width = image.shape[-2:]
        if image.numel() > 0 and not (image.min() >= 0 and image.max() <= 1):  # written so that NaN fails too
            low, high = image.min().item(), image.max().item()
            raise ValueError(f"image: expected values 0..1, got {low:g}..{high:g}; divide by the peak, or clamp")
    else:
        raise TypeError(f"image: expected a NumPy array, a PIL image or a tensor, got {type(image).__name__}")
    if height == 0 or width == 0:
        raise ValueError(f"image: expected at least one pixel, got {height}x{width}")
    return height, width


def as_network(
    model: Network | nn.Module | Mapping[str, Any] | str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Network:
    """The model itself, or what `fastsr.load` makes of it (a name of embedded weights among others), or a copy if it
    is on another device or of another dtype. Raises TypeError when that does not enlarge images."""
    loaded = model if isinstance(model, Network) else load(weights_of(model), device=device, dtype=dtype)
    if not isinstance(loaded, Network) or not loaded.scales:
        raise TypeError(f"model: expected a network that enlarges images, got {type(loaded).__name__}")
    there = torch.empty(0, device=device or loaded.device).device  # "cuda" is "cuda:0", or whichever is current
    if (there, dtype or loaded.dtype) == (loaded.device, loaded.dtype):
        return loaded
    return copy.deepcopy(loaded).to(device=there, dtype=dtype)


def as_segmentation(
    network: Network, segmentation: Network | nn.Module | Mapping[str, Any] | str | os.PathLike[str] | None
) -> OutdoorSceneSeg | None:
    """The segmentation network that goes with this one. Raises TypeError where one is missing, superfluous or another
    network."""
    if not isinstance(network, SFTNet):
        if segmentation is not None:
            raise TypeError(f"segmentation: only SFTGAN uses one, not {type(network).__name__}; leave it out")
        return None
    if segmentation is None:
        raise TypeError("segmentation: SFTGAN needs the outdoor scene segmentation network, or a file of its weights")
    loaded = segmentation if isinstance(segmentation, Network) else load(segmentation, device=network.device)
    if not isinstance(loaded, OutdoorSceneSeg):
        raise TypeError(f"segmentation: expected the outdoor scene segmentation network, got {type(loaded).__name__}")
    return loaded


def check_scale(name: str, scales: Sequence[int], scale: float | None) -> int:
    """The scale to use; raises ValueError listing the scales when it is not among them, or left out with several."""
    listed = ", ".join(map(str, scales))
    if scale is None:
        if len(scales) > 1:
            raise ValueError(f"scale: {name} has the scales {listed}: choose one")
        return scales[0]
    if scale not in scales:
        raise ValueError(
            f"scale: {name} has {'the scales' if len(scales) > 1 else 'only the scale'} {listed}, got {scale}"
        )
    return int(scale)


def next_scale(name: str, scales: Sequence[int], scale: float | None) -> tuple[int, float]:
    """(the network's scale to use, the scale of the result): the same, or the former is the next larger one.

    Raises what `check_scale` does, for a scale below 1 or above the largest one.
    """
    if scale is not None and scales and scale not in scales and 1 <= scale < max(scales):
        return min(s for s in scales if s > scale), float(scale)
    factor = check_scale(name, scales, scale)
    return factor, factor


def check_size(height: int, width: int, scale: int) -> None:
    """Raises ValueError when the result would have more than MAX_PIXELS pixels."""
    if height * width * scale**2 > MAX_PIXELS:
        raise ValueError(
            f"image: {height}x{width} at scale {scale} makes {height * width * scale**2:,} pixels, "
            f"more than the {MAX_PIXELS:,} that are allowed; cut the image into parts"
        )


def default_device(image: object) -> torch.device:
    """Where work on this image happens unless a model says otherwise."""
    if isinstance(image, Tensor):
        return image.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _learn(
    values: Tensor, scale: int, config: ZSSRConfig | None, progress: Callable[[dict[str, Any]], None] | None
) -> Tensor:
    from fastsr.train.zssr import zssr  # here because training is not needed by anything else

    result = torch.cat([zssr(one, scale, config=config, progress=progress) for one in values.split(1)])
    if not torch.isfinite(result).all():
        bad = int((~torch.isfinite(result)).sum())
        raise FloatingPointError(f"upscale: {bad} of {result.numel()} values of the result are not finite")
    return result


def enlarge(
    network: Network, image: np.ndarray | Image.Image | Tensor, scale: int, segmentation: OutdoorSceneSeg | None
) -> Tensor:
    """What `upscale` makes, unchecked and not clamped: (N, C, H * scale, W * scale), C as in the image, values 0..1 and
    beyond, at least float32. A tensor may hold values beyond 0..1 too. The whole image goes through at once."""
    steps = Pass(network, scale, segmentation)
    values = to_tensor(image, steps.dtype).to(network.device)
    with torch.inference_mode(), evaluating(network), evaluating(segmentation or nn.Identity()):
        return steps.finish(steps.begin(values))


def _in_parts(
    steps: Pass, values: Tensor, convert: Convert, tile: int | str | None, pad: int | str | None, deterministic: bool
) -> Tensor:
    """All parts, each converted, put together on the network's device."""
    shape = (*values.shape[:2], *(size * steps.scale for size in values.shape[2:]))
    like = convert(values.new_empty(0, *shape[1:]))
    whole = like.new_empty(shape)
    with torch.inference_mode(), evaluating(steps.network), evaluating(steps.segmentation or nn.Identity()):
        for core, result in tiles.parts(steps, values, tile, pad, deterministic):
            whole[core.scaled(steps.scale)] = convert(result)
            del result  # so that its memory is free for the next
    return whole


def _same(values: Tensor) -> Tensor:
    return values


def _turned_mean(enlarge: Convert, values: Tensor) -> Tensor:
    """The mean over the eight ways to turn and mirror an image, of what is enlarged then, turned back."""
    total: Tensor | None = None
    for transposed in (False, True):
        for flips in ((), (2,), (3,), (2, 3)):
            turned = values.mT if transposed else values
            result = enlarge(turned.flip(flips).contiguous()).flip(flips)
            result = result.mT if transposed else result
            total = result.contiguous() if total is None else total.add_(result)
    return total.div_(8)


@contextlib.contextmanager
def repeatable(deterministic: bool) -> Iterator[None]:
    """On CUDA, keeps cuDNN from algorithms whose sums vary from run to run, and from choosing them by stopwatch."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    if deterministic:
        cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode (batch norm, multi-supervision) for the time being; every submodule then gets its mode back."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _with_alpha(values: Tensor, enlarge: Callable[[Tensor], Tensor], smallest: float) -> Tensor:
    """(N, C, H, W), the last channel alpha, as the head of this file says. `enlarge` takes one or three channels. Below
    the alpha `smallest`, all is zero."""
    colour, alpha = values[:, :-1], values[:, -1:]
    if bool((alpha == alpha[:, :, :1, :1]).all()):
        larger = enlarge(colour)
        return torch.cat([larger, alpha[:, :, :1, :1].to(larger).expand(-1, -1, *larger.shape[2:])], dim=1)
    larger = enlarge(colour * alpha)
    covered = (1 + larger - enlarge(colour * alpha + (1 - alpha))).mean(1, keepdim=True)
    low, high = -F.max_pool2d(-alpha, 5, 1, 2), F.max_pool2d(alpha, 5, 1, 2)  # as far as cubic interpolation looks
    low, high = (F.interpolate(x.to(covered), size=covered.shape[2:], mode="nearest") for x in (low, high))
    covered = torch.where(low == high, low, covered)
    visible = covered >= smallest
    # Not clamped to 1 yet: where alpha overshoots, premultiplied colours do too.
    return torch.cat([torch.where(visible, larger / covered.clamp(min=smallest), 0), covered * visible], dim=1)


def to_tensor(image: np.ndarray | Image.Image | Tensor, dtype: torch.dtype | None) -> Tensor:
    """(N, C, H, W) with values 0..1; of arrays and PIL images without a dtype the levels, uint8 or int32."""
    if isinstance(image, Tensor):
        return image.detach().to(dtype)
    pixels = io.pixels_of(image) if isinstance(image, Image.Image) else image
    peak = np.iinfo(pixels.dtype).max
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    # A copy in native byte order; 16 unsigned bits are hardly supported by torch, 32 signed ones hold them.
    pixels = np.array(pixels, np.int32 if peak > 255 else np.uint8).transpose(2, 0, 1)[None]
    levels = torch.from_numpy(np.ascontiguousarray(pixels))
    return levels if dtype is None else levels.to(dtype) / peak


def _is_deep(image: np.ndarray | Image.Image | Tensor) -> bool:
    """Whether it has 16 bits a channel."""
    return image.mode.startswith("I") if isinstance(image, Image.Image) else image.dtype == np.uint16


def to_levels(values: Tensor, like: np.ndarray | Image.Image | Tensor) -> Tensor:
    """Values clamped to 0..1: in the dtype of a tensor `like`; else as levels of its depth, rounded, halves up."""
    values = values.clamp(0, 1)
    if isinstance(like, Tensor):
        return values.to(like.dtype)
    deep = _is_deep(like)
    return values.mul_(65535 if deep else 255).add_(0.5).floor_().to(torch.int32 if deep else torch.uint8)


def _from_levels(levels: Tensor, like: np.ndarray | Image.Image | Tensor) -> np.ndarray | Image.Image | Tensor:
    """An image of the kind and depth of `like` from what `to_levels` made."""
    if isinstance(like, Tensor):
        return levels.to(like.device)
    pixels = levels[0].permute(1, 2, 0).contiguous().cpu().numpy()
    pixels = pixels.astype(np.uint16 if _is_deep(like) else np.uint8, copy=False)
    if isinstance(like, np.ndarray):
        return pixels[..., 0] if like.ndim == 2 else pixels
    made = io.image_of(pixels)
    # Without the profile colours would be shown differently; the pixels are not turned, so the orientation holds on.
    made.info.update({k: like.info[k] for k in ("icc_profile", "exif", "dpi") if k in like.info})
    return made
