"""Images in parts: how large, how far apart, how many at once; and what happens when memory runs out.

The image is divided into cores; each goes through the network with a halo of neighbouring pixels around it, and of the
result only the core is kept. Where the halo is as wide as the network looks (`receptive.reach`), what is kept is what
the whole image gives, up to the rounding of sums that a library may order by size. At the image's own borders there is
no halo, so that the network meets them as it would have. All parts have one size: near a border they reach further in.
"""

from __future__ import annotations

import contextvars
import math
import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsr.image.passes import Pass
from fastsr.image.receptive import LIMIT, Source, reach
from fastsr.models.network import Network
from fastsr.op import OPS, use

SMALLEST = 16  # pixels; a core below that is nearly all halo
MOST_AT_ONCE = 16  # parts in a batch; more no longer fill a device better
SAMPLE = 48  # pixels a side of the part on which the need of memory is measured
SHARE = {"cuda": 0.8, "cpu": 0.5}  # of the free memory; on the CPU others want some too
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")

AUTO, EXACT = "auto", "exact"
SMALL = 128 * 128  # pixels; below, nothing is measured and the image is taken whole
FIXED = 256  # the tile where results must not depend on how much memory happens to be free
DEFAULT_HALOS = {"esrgan": 32, "rdn": 32, "rdn_plain": 32, "rdn_original": 32}

Enlarge = Callable[[list[Tensor]], Tensor]
_halos: weakref.WeakKeyDictionary[Network, dict[Any, int | None]] = weakref.WeakKeyDictionary()


class Box(NamedTuple):
    """A rectangle of the image's pixels."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.bottom - self.top, self.right - self.left

    def scaled(self, scale: int) -> tuple[Any, slice, slice]:
        """The index of its enlargement in (N, C, H * scale, W * scale)."""
        return ..., slice(self.top * scale, self.bottom * scale), slice(self.left * scale, self.right * scale)

    def within(self, outer: Box) -> Box:
        """The same pixels counted from the corner of a rectangle around it."""
        return Box(self.top - outer.top, self.bottom - outer.top, self.left - outer.left, self.right - outer.left)


class Image(NamedTuple):
    """What parts are cut out of: tensors whose pixels stand for those of one image of height x width, each with its
    ratio of sizes; parts begin at multiples of `multiple`."""

    tensors: list[Tensor]
    ratios: Sequence[Fraction]
    multiple: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), which the first tensor has."""
        height, width = self.tensors[0].shape[2:]
        return height, width

    def cut(self, box: Box) -> list[Tensor]:
        """The part of each tensor."""
        spans = [Source(t.shape[1], ratio).span for t, ratio in zip(self.tensors, self.ratios, strict=True)]
        return [t[:, :, span(box.top, box.bottom), span(box.left, box.right)] for t, span in zip(self.tensors, spans)]


def cores(height: int, width: int, tile: int, multiple: int) -> list[Box]:
    """Divides the image into rows and columns of as equal a size as `multiple` allows, none larger than `tile`."""
    rows, columns = (_steps(length, tile, multiple) for length in (height, width))
    return [
        Box(top, min(top + rows, height), left, min(left + columns, width))
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]


def _steps(length: int, tile: int, multiple: int) -> int:
    largest = max(multiple, tile // multiple * multiple)
    count = -(-length // largest)
    return -(-length // (count * multiple)) * multiple


def surroundings(core: Box, tile: int, halo: int, size: tuple[int, int], multiple: int) -> Box:
    """The part to compute for a core no larger than `tile`: all of its halo that the image has, and of one size."""
    top, bottom = _around(core.top, tile, halo, size[0], multiple)
    left, right = _around(core.left, tile, halo, size[1], multiple)
    return Box(top, bottom, left, right)


def _around(start: int, tile: int, halo: int, length: int, multiple: int) -> tuple[int, int]:
    reach = -(-halo // multiple) * multiple
    wanted = min(_steps(length, tile, multiple) + 2 * reach, length)
    last = (length - wanted) // multiple * multiple
    first = min(max(start - reach, 0), last)
    return first, length if first == last else first + wanted


def check(tile: int | str | None, pad: int | str | None) -> None:
    """Raises ValueError for a tile or a pad that `parts` does not know."""
    if not (tile is None or tile == AUTO or (type(tile) is int and tile > 0)):
        raise ValueError(f'tile: expected a positive number of pixels, "{AUTO}" or None, got {tile!r}')
    if not (pad is None or pad == EXACT or (type(pad) is int and pad >= 0)):
        raise ValueError(f'tile_pad: expected a number of pixels from 0 on, "{EXACT}" or None, got {pad!r}')


def parts(
    through: Pass,
    values: Tensor,
    tile: int | str | None = AUTO,
    pad: int | str | None = None,
    deterministic: bool = False,
    memory: int | None = None,
) -> Iterator[tuple[Box, Tensor]]:
    """Yields (core, its enlarged values (N, C, h * scale, w * scale)) until the whole of values (N, C, H, W) is done.

    To be called in inference mode with networks in evaluation mode. tile: the largest side of a core in pixels of
    `values`; None is the whole; "auto" is the whole where it fits into memory, else the largest that does. pad: the
    width of the halo, see `halo`. deterministic: bits depend neither on free memory nor on what else is computed: parts
    go one by one, "auto" is FIXED, and too little memory raises MemoryError.
    A part that is not finite in half precision is computed again in float32, with a warning; raises
    FloatingPointError where that does not help. Raises ValueError where tiles are needed and the halo is not finite.
    """
    image = Image(_begun(through, values), through.ratios, through.network.multiple)
    half = through.network.dtype.itemsize < 4
    if half and not all(torch.isfinite(tensor).all() for tensor in image.tensors[1:]):
        warnings.warn(f"not finite in {through.network.dtype}: continuing in float32", RuntimeWarning, stacklevel=2)
        through, half = through.widened(torch.float32), False
        image = image._replace(tensors=through.begin(values))

    def width() -> int:
        return halo(through, image, pad)

    batch = 1
    size = None if isinstance(tile, str) else tile
    if tile == AUTO:
        small = math.prod(image.size) <= SMALL and memory is None
        size = FIXED if deterministic else None
        if not (deterministic or small):
            size, batch = choose(through.finish, image, None, width, memory)
    elif size is not None and not deterministic and size < max(image.size):
        size, batch = choose(through.finish, image, size, width, memory)
    size = size if size is not None and size < max(image.size) else None
    wide: tuple[Pass, Image] | None = None
    for core, part, result in run(through.finish, image, through.scale, size, width, batch, not deterministic):
        if half and not torch.isfinite(result).all():
            warnings.warn(
                f"rows {core.top}..{core.bottom - 1}, columns {core.left}..{core.right - 1} are not finite in "
                f"{through.network.dtype}: computed again in float32", RuntimeWarning, stacklevel=2,
            )  # fmt: skip
            if wide is None:
                other = through.widened(torch.float32)
                wide = other, image._replace(tensors=other.begin(values))
            result = wide[0].finish(wide[1].cut(part))[core.within(part).scaled(through.scale)]
        if not torch.isfinite(result).all():
            bad = int((~torch.isfinite(result)).sum())
            raise FloatingPointError(
                f"upscale: {bad} of {result.numel()} values of the result are not finite, in rows "
                f"{core.top}..{core.bottom - 1} and columns {core.left}..{core.right - 1} of the image; "
                "use a wider dtype, as in model.float(), or check the weights"
            )
        yield core, result
        del result


def _begun(through: Pass, values: Tensor) -> list[Tensor]:
    """What has to see the whole image, with a word about it where there is too little memory."""
    try:
        return through.begin(values)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    raise MemoryError(f"{type(through.network).__name__} has to see the whole image, which does not fit: {reason}")


def halo(through: Pass, image: Image, pad: int | str | None) -> int:
    """The width of the halo in pixels: `pad` itself; for "exact" that of the receptive field; for None this too, but
    where the network is listed in DEFAULT_HALOS not more than stands there.

    ESRGAN with 23 blocks looks 349 pixels far, RDN 125 (20 blocks of 6) or 133 (16 of 8). Measured on the full-size
    networks at x4 with the weights of the parity cases (random, of variance-keeping size) on a photograph, in float64:
    a halo of 16 changes no value by more than 1e-8 (ESRGAN), 8e-5 and 3e-4 (RDN) of the result's standard deviation,
    one of 32 by 2e-14, 3e-12 and 2e-11. With trained weights (tests/weights: 2 blocks of each, x2, in float32) a halo
    of 8 changes no value by more than 7e-4 (ESRGAN) and 4e-4 (RDN) of the standard deviation, one of 12 by no more
    than rounding does, 7e-6; trained networks of full depth may look further. Raises ValueError where nothing is
    finite.
    """
    if type(pad) is int:
        return pad
    network = through.network
    usual = DEFAULT_HALOS.get(network.name) if pad is None else None
    key = (through.scale, tuple(t.shape[1] for t in image.tensors), usual)
    known = _halos.setdefault(network, {})
    if key not in known:
        sources = [Source(t.shape[1], ratio) for t, ratio in zip(image.tensors, image.ratios, strict=True)]
        exact = through.widened(torch.float64, torch.device("cpu"))

        def measure() -> int | None:
            with use("eager"), torch.inference_mode():
                return reach(exact.finish, sources, through.scale, image.multiple, usual or LIMIT)

        known[key] = contextvars.Context().run(measure)  # where `explain` does not listen: this is no part of the work
    found = usual if known[key] is None else known[key]
    if found is None:
        raise ValueError(
            f"tile: {type(network).__name__} looks further than {LIMIT} pixels, or at the whole image, so tiles "
            "would show; use tile=None, or say how wide a halo suffices, as in tile_pad=64"
        )
    return found


def run(
    enlarge: Enlarge,
    image: Image,
    scale: int,
    tile: int | None,
    halo: Callable[[], int],
    batch: int,
    retry: bool = True,
) -> Iterator[tuple[Box, Box, Tensor]]:
    """Yields (core, the part that was computed for it, the core's enlargement (N, C, H * scale, W * scale)), all cores.

    enlarge: takes parts of the image's tensors, several along the first axis. tile: the largest side of a core; None
    is the whole image. halo: returns its width, and is not asked for a whole image. batch: parts at once.
    When memory runs out, first the batch and then the tile is halved, with a warning, and the work continues with what
    is left. Raises MemoryError where the smallest tile does not fit, or at once unless `retry`.
    """
    height, width = image.size
    reach = 0 if tile is None else halo()
    tile = max(height, width) if tile is None else tile
    left = deque(cores(height, width, tile, image.multiple))
    while left:
        parts = [surroundings(core, tile, reach, image.size, image.multiple) for core in list(left)[:batch]]
        same = next((i for i, part in enumerate(parts) if part.shape != parts[0].shape), len(parts))
        parts = parts[:same]
        made = _attempt(enlarge, image, parts)
        if made is not None:
            for part, result in zip(parts, made.chunk(len(parts)), strict=True):
                core = left.popleft()
                yield core, part, result[core.within(part).scaled(scale)]
            del made, result  # they would be alive while the next are made
            continue
        if not retry:
            raise MemoryError(f"out of memory for a part of {_shape(parts[0])} pixels: choose a smaller tile")
        if len(parts) > 1:
            batch = len(parts) // 2
            warnings.warn(f"out of memory: continuing with {batch} parts at once", RuntimeWarning, stacklevel=2)
            continue
        if tile <= max(SMALLEST, image.multiple):
            raise MemoryError(f"out of memory for a part of {_shape(parts[0])} pixels, a tile and its halo")
        reach = halo()
        smaller = max(image.multiple, tile // 2 // image.multiple * image.multiple)
        warnings.warn(f"out of memory at tiles of {tile}: continuing with {smaller}", RuntimeWarning, stacklevel=2)
        left = deque(piece for core in left for piece in _divided(core, smaller, image.multiple))
        tile = smaller


def _divided(core: Box, tile: int, multiple: int) -> list[Box]:
    pieces = cores(core.bottom - core.top, core.right - core.left, tile, multiple)
    return [Box(p.top + core.top, p.bottom + core.top, p.left + core.left, p.right + core.left) for p in pieces]


def _shape(box: Box) -> str:
    return "x".join(map(str, box.shape))


def _attempt(enlarge: Enlarge, image: Image, parts: list[Box]) -> Tensor | None:
    """The enlarged parts along the first axis, or None if memory ran out. In a function of its own, so that no
    exception keeps what was allocated alive."""
    try:
        cut = [image.cut(part) for part in parts]
        return enlarge([torch.cat(list(t)) if len(cut) > 1 else t[0] for t in zip(*cut, strict=True)])
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    if image.tensors[0].is_cuda:
        torch.cuda.empty_cache()
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch says that a device's or the host's memory is used up."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


# How much memory there is, and how much a part takes.


def choose(
    enlarge: Enlarge, image: Image, tile: int | None, halo: Callable[[], int], memory: int | None = None
) -> tuple[int | None, int]:
    """(tile, parts at once) that fit into SHARE of the free memory and into `memory` bytes, by what a small part was
    measured to take.

    tile: None lets it be chosen as well, and stays None where the whole image fits.
    """
    device = image.tensors[0].device
    height, width = image.size
    per_pixel = bytes_per_pixel(enlarge, image)
    free = SHARE[device.type] * available(device)
    pixels = min(free, free if memory is None else memory) / per_pixel
    if tile is None:
        if height * width <= pixels:
            return None, 1
        tile = max(SMALLEST, math.isqrt(int(pixels)) - 2 * halo())
    part = surroundings(Box(0, 1, 0, 1), tile, halo(), image.size, image.multiple)
    return tile, max(1, min(MOST_AT_ONCE, int(pixels / math.prod(part.shape))))


def bytes_per_pixel(enlarge: Enlarge, image: Image) -> float:
    """What enlarging takes at its peak, for each pixel of the image, beside the image itself: measured on a part of it
    of SAMPLE pixels a side. On CUDA by torch's own count; on the CPU by `Peak`. Infinite if even that does not fit."""
    height, width = (min(length, -(-SAMPLE // image.multiple) * image.multiple) for length in image.size)
    sample = [Box(0, height, 0, width)]

    def used(tensors: list[Tensor]) -> Tensor:
        made = enlarge(tensors)
        torch.isfinite(made)
        return made.clamp(0, 1)  # before it is rounded

    device = image.tensors[0].device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        made = _attempt(used, image, sample)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with Peak() as tracker:
            made = _attempt(used, image, sample)
        peak = tracker.peak
    if made is None:
        return math.inf
    return max(peak, 1) / (height * width)


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are alive; `peak` is the most there were at a time.

    An operator of fastsr counts with the workspace of its kernel, which stays for the next, or with what its eager
    definition allocates.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.workspace = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "fastsr":
            op = OPS[function._schema.name.partition("::")[2]]
            workspace = op.workspace(*args, **kwargs)
            if workspace is None:
                with self:
                    return op.eager(*args, **kwargs)
            self.workspace = max(self.workspace, workspace)
        else:
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = function(*args, **kwargs)
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:  # else a view, or in place
                storage = tensor.untyped_storage()
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.alive + self.workspace + _scratch(function, args, result))
        return result

    def _freed(self, size: int) -> None:
        self.alive -= size


def _scratch(function: Any, args: Any, result: Any) -> int:
    """What a convolution of torch takes for itself on the CPU: columns, where it is done as a product of matrices."""
    if function is not torch.ops.aten.convolution.default:
        return 0
    x, weight, transposed = args[0], args[1], args[6]
    if x.dtype != torch.float64 and not transposed:
        return 0
    pixels = math.prod((x if transposed else result).shape[2:])
    return len(x) * pixels * weight[0].numel() * args[8] * x.element_size()


def available(device: torch.device) -> int:
    """Free bytes of the device; of the host, what the system and this process' control group leave."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, unused
        return torch.cuda.mem_get_info(device)[0] + kept
    free = []
    if MEMINFO.is_file():
        fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    else:
        free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free.append(int(text) - int(used.read_text()))
    return max(0, min(free))
