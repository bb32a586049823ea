"""The end of RCAN, RDN and MSRN: convolutions with nothing but PixelShuffles between, the last of which makes colours.

All of it is linear, so it is one convolution of the small image, but for a frame of the result a pixel or a few wide,
where the zero padding between the layers shows (`merge`, `merged_recipe`). As it stands it is bound by arithmetic and
makes maps of all features in the size of the result; merged it makes none.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr.op import empty_image, expect, expect_alike, is_channels_last, op
from fastsr.recipes import Conv, Copy, Recipe, View


@op
def linear_tail(x: Tensor, weights: list[Tensor], biases: list[Tensor], gain: float = 1.0) -> Tensor:
    """gain * (conv_k(shuffle(... conv_2(shuffle(conv_1(x)))))), zero-padded convolutions that keep the size.

    x: (N, C, H, W). weights: (Cout, Cin, k, k), two or more, with odd k; between two of them stands the PixelShuffle
    (torch's order) by the r for which Cout of the first is r^2 times Cin of the second; r = 1 is none.
    biases: (Cout,) each, as many, or [].
    Returns (N, Cout of the last, H * R, W * R), R the product of all r, with the layout of x, or channels-last if one
    of the weights is. Raises ValueError.
    """
    shuffles = shuffles_of(weights)
    for i, weight in enumerate(weights):
        x = F.conv2d(x, weight, biases[i] if biases else None, padding=weight.shape[-1] // 2)
        x = F.pixel_shuffle(x, shuffles[i]) if shuffles[i] > 1 else x
    return x if gain == 1.0 else x * gain


def shuffles_of(weights: list[Tensor]) -> list[int]:
    """The factor of the PixelShuffle behind each convolution."""
    between = [math.isqrt(a.shape[0] // b.shape[1]) for a, b in zip(weights[:-1], weights[1:], strict=True)]
    return [*between, 1]


@linear_tail.check
def _(x, weights, biases, gain):
    expect(x.dim() == 4, "x is (N, C, H, W)", x=x)
    expect(len(weights) >= 2, "two weights or more", weights=weights)
    square = all(w.dim() == 4 and w.shape[2] == w.shape[3] and w.shape[2] % 2 == 1 for w in weights)
    expect(square, "weights of (Cout, Cin, k, k) with odd k", weights=weights)
    expect(weights[0].shape[1] == x.shape[1], "a first weight of as many inputs as x has channels", x=x,
           weights=weights)  # fmt: skip
    shuffled = zip(weights[:-1], weights[1:], shuffles_of(weights)[:-1], strict=True)
    fits = all(r > 0 and a.shape[0] == r * r * b.shape[1] for a, b, r in shuffled)
    expect(fits, "each weight but the last has r^2 times as many outputs as the next has inputs", weights=weights)
    each = not biases or [b.shape for b in biases] == [w.shape[:1] for w in weights]
    expect(each, "no biases, or a (Cout,) for each weight", biases=biases, weights=weights)
    expect_alike(x=x, weights=weights, biases=biases)


@linear_tail.alloc
def _(x, weights, biases, gain):
    n, _, h, w = x.shape
    scale = math.prod(shuffles_of(weights))
    channels_last = is_channels_last(x) or any(is_channels_last(w) for w in weights)
    return empty_image(x, (n, weights[-1].shape[0], h * scale, w * scale), channels_last=channels_last)


@linear_tail.recipe
def _(x, weights, biases, gain):
    n, _, h, w = x.shape
    buffers, steps, scale = {}, [], 1
    shuffles = shuffles_of(weights)
    for i, weight in enumerate(weights):
        last = i == len(weights) - 1
        scale *= shuffles[i]
        source, store = ("x" if i == 0 else f"h{i}"), ("out" if last else f"h{i + 1}")
        buffers[store] = (n, weight.shape[0] // shuffles[i] ** 2, h * scale, w * scale)
        steps.append(Conv((View(source),), weight, biases[i] if biases else None, View(store),
                          padding=weight.shape[-1] // 2, gain=gain if last else 1.0, shuffle=shuffles[i]))  # fmt: skip
    return Recipe({"x": x}, buffers, tuple(steps))


# The same in one convolution.

Span = tuple[int, int]  # of pixels along an axis: the first and the end
BETWEEN, FIRST, LAST = range(3)  # where along an axis a pixel stands


def unmergeable(x: Tensor, weights: list[Tensor]) -> str | None:
    """Why `merged_recipe` cannot be used, or None: it takes two pixels or more along both axes, and kernels by which
    all pixels that do not stand at the border make their results alike."""
    if min(x.shape[2:]) < 2:
        return f"an image of {x.shape[2]}x{x.shape[3]} (needs two rows and columns)"
    for reach, r in zip(_reaches(weights)[1:], shuffles_of(weights), strict=False):
        if reach > r:
            return f"kernels that see {reach} pixels where a PixelShuffle made {r} of one"
    return None


def _reaches(weights: list[Tensor]) -> list[int]:
    """How many of the pixels that each layer reads a result sees, from its own to either side."""
    reaches, shuffles = [0], shuffles_of(weights)
    for weight, r in zip(reversed(weights), reversed(shuffles), strict=True):
        reaches.insert(0, -(-reaches[0] // r) + weight.shape[-1] // 2)
    return reaches[:-1]


def merge(weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The chain as one convolution, shuffled by R, for each kind of pixel: it stands BETWEEN, FIRST or LAST in its
    column, and in its row.

    Returns kernels (3, 3, Cout * R^2, C, k, k) and biases (3, 3, Cout * R^2), computed in float64; they are float32, or
    float64 if the weights are.

    From the last layer to the first: `kernel` (3, 3, Cout, P, P, M, k, k) says how the P x P results of a pixel depend
    on the M channels that a layer reads. On the way to what the layer before makes, before its PixelShuffle, kernels
    lose what they read beyond the border, where there is padding.
    """
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    if weights[0].is_meta:  # where torch would import its compiler to multiply
        outputs, size = weights[-1].shape[0] * math.prod(shuffles_of(weights)) ** 2, 2 * _reaches(weights)[0] + 1
        kernel = torch.empty(3, 3, outputs, weights[0].shape[1], size, size, dtype=dtype, device="meta")
        return kernel, kernel[..., 0, 0, 0] if biases else None
    kernel = weights[-1].double()[:, None, None].expand(3, 3, -1, -1, -1, -1, -1, -1)
    bias = kernel.new_zeros(kernel.shape[:5])
    bias = bias + biases[-1].double()[:, None, None] if biases else bias
    for i in range(len(weights) - 2, -1, -1):
        r = shuffles_of(weights)[i]
        place = _placement(kernel.shape[-1] // 2, r).to(kernel.device)
        kernel = torch.einsum("stcyxmij,kasipe,lbtjqf->klcaybxmpqef", kernel, place, place)
        kernel = kernel.flatten(7, 9).flatten(5, 6).flatten(3, 4)
        stands = _stands(r).to(kernel.device)
        bias = torch.einsum("stcyx,kas,lbt->klcaybx", bias, stands, stands).flatten(5, 6).flatten(3, 4)
        if biases:
            bias = bias + torch.einsum("klcyxmef,m->klcyx", kernel, biases[i].double())
        shape = kernel.shape[:5]
        kernel = F.conv_transpose2d(kernel.flatten(0, 4), weights[i].double()).unflatten(0, shape)
    return kernel.flatten(2, 4).to(dtype), bias.flatten(2).to(dtype) if biases else None


def _stands(r: int) -> Tensor:
    """stands[k, a, s] = 1 if pixel a of the r that are made of one that stands at k stands itself at s."""
    stands = torch.zeros(3, r, 3, dtype=torch.float64)
    stands[:, :, BETWEEN] = 1
    for at, a in ((FIRST, 0), (LAST, r - 1)):
        stands[at, a] = 0
        stands[at, a, at] = 1
    return stands


def _placement(reach: int, r: int) -> Tensor:
    """place[k, a, s, d, p, e] = 1 if, of the r pixels made of one that stands at k, pixel a stands at s and reads, at
    distance d, pixel p of those made of the one at distance e, unless that is beyond the border. Distances begin with
    the most negative."""
    wide = -(-reach // r)
    place = torch.zeros(3, r, 3, 2 * reach + 1, r, 2 * wide + 1, dtype=torch.float64)
    stands = _stands(r)
    for k in range(3):
        for a in range(r):
            for d in range(-reach, reach + 1):
                e, p = divmod(a + d, r)
                if not (k == FIRST and e < 0) and not (k == LAST and e > 0):
                    place[k, a, :, d + reach, p, e + wide] = stands[k, a]
    return place


def merged_recipe(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], gain: float, dtype: torch.dtype | None = None
) -> Recipe:
    """One convolution for all pixels, then one for those of each border and corner, whose results replace the first's.
    Weights and biases have the dtype that `merge` gives them, or this one. See `unmergeable`."""
    n, _, h, w = x.shape
    scale, colours = math.prod(shuffles_of(weights)), weights[-1].shape[0]
    kernels, merged_biases = (t if t is None or dtype is None else t.to(dtype) for t in merge(weights, biases))
    reach = kernels.shape[-1] // 2
    buffers, steps = {"out": (n, colours, h * scale, w * scale)}, []

    def convolve(i: int, j: int, seen: View, store: View) -> None:
        bias = None if merged_biases is None else merged_biases[i, j]
        steps.append(Conv((seen,), kernels[i, j], bias, store, padding=reach, gain=gain, shuffle=scale))

    convolve(BETWEEN, BETWEEN, View("x"), View("out"))
    framed = any(weight.shape[-1] > 1 for weight in weights[1:])
    for i, rows in enumerate(_spans(h)):
        for j, columns in enumerate(_spans(w)):
            if framed and (i, j) != (BETWEEN, BETWEEN) and rows[0] < rows[1] and columns[0] < columns[1]:
                seen = View("x", rows=_around(rows, reach, h), columns=_around(columns, reach, w))
                height, width = seen.size(x.shape)
                name = f"border{i}{j}"
                buffers[name] = (n, colours, height * scale, width * scale)
                convolve(i, j, seen, View(name))
                steps.append(Copy(_results(name, seen, rows, columns, scale),
                                  _results("out", View("x"), rows, columns, scale)))  # fmt: skip
    return Recipe({"x": x}, buffers, tuple(steps))


def _spans(size: int) -> tuple[Span, Span, Span]:
    """The pixels that stand BETWEEN, FIRST and LAST."""
    return (1, size - 1), (0, 1), (size - 1, size)


def _around(span: Span, reach: int, size: int) -> Span:
    """A span and what is read around it."""
    return max(0, span[0] - reach), min(size, span[1] + reach)


def _results(buffer: str, seen: View, rows: Span, columns: Span, scale: int) -> View:
    """The results of these pixels of x in a buffer that holds those of all that were seen."""
    top, left = (seen.rows or (0,))[0], (seen.columns or (0,))[0]
    return View(
        buffer,
        rows=((rows[0] - top) * scale, (rows[1] - top) * scale),
        columns=((columns[0] - left) * scale, (columns[1] - left) * scale),
    )


@linear_tail.samples
def _(make):
    yield make(1, 2, 3, 4), [make(8, 2, 3, 3), make(3, 2, 3, 3)], [make(8), make(3)], 0.5
    yield make(2, 2, 2, 3), [make(4, 2, 3, 3), make(4, 1, 3, 3), make(2, 1, 3, 3), make(2, 2, 1, 1)], []
    yield make(1, 2, 1, 3), [make(3, 2, 3, 3), make(2, 3, 1, 1)], [make(3), make(2)]
    # RCAN, RDN and MSRN x4, with the shift of colours behind; MSRN's x3 of luma; x2; x8
    four, shifted = [make(256, 64, 3, 3), make(256, 64, 3, 3), make(3, 64, 3, 3)], make(3, 3, 1, 1)
    yield make(1, 64, 12, 13), [*four, shifted], [make(256), make(256), make(3), make(3)]
    yield make(1, 64, 7, 9), [make(576, 64, 3, 3), make(1, 64, 3, 3)], []
    yield make(1, 64, 9, 16), [make(256, 64, 3, 3), make(3, 64, 3, 3)], [make(256), make(3)], 1 / 255
    yield make(1, 64, 4, 5), [four[0], *four], [make(256), make(256), make(256), make(3)]
