"""Every operator and sample, backends and rivals in turns: `pytest bench/test_ops.py -k conv_act`.

Samples of a network's real width are measured, on their own small maps and on maps of 64 x 64. Results are compared
with float64 before anything is timed. A rival gets the operator's eager definition with its parameters as constants.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsr.ops  # noqa: F401 - fills OPS
from bench.conftest import chosen_peers, recorded
from bench.peers import KERNELS, RIVALS, Subject
from fastsr.op import OPS, Op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("cuda", "triton") if DEVICE == "cuda" else ("cpu",)
LARGE = 20_000  # elements of all tensors of a sample from which it has a network's real width
MAP = 64  # height and width of the large maps
QUICK = ("eager", "channels_last", "openvino-f32", "fastsr-cpu-f32")


def tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    """All tensors among the arguments, lists opened."""
    return [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]


@functools.cache
def samples(op: Op) -> dict[int, tuple[Any, ...]]:
    """The samples worth measuring, all arguments given, by index; weights are scaled so that values keep their size."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / max(1.0, math.prod(shape[1:4]) ** 0.5 if len(shape) > 1 else 1)

    found = enumerate(op._bind(args) for args in op.samples_of(make))
    return {i: args for i, args in found if sum(t.numel() for t in tensors_of(args)) >= LARGE}


def images_of(op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    """The arguments that are maps: what the operator's recipe reads, or its first argument."""
    return list(op.recipe_of(*args).inputs.values()) if op.recipe_of is not None else [args[0]]


class Operator(nn.Module):
    """An operator as a module whose inputs are maps; its other tensors are constants of the module."""

    def __init__(self, op: Op, args: tuple[Any, ...], images: list[Tensor]) -> None:
        super().__init__()
        self.op = op
        self._places: list[Any] = [self._place(a, images) for a in args]

    def _place(self, value: Any, images: list[Tensor]) -> Any:
        """An argument as it is built again in a call: the number of an image, the name of a buffer, or itself."""
        if isinstance(value, list):
            return [self._place(v, images) for v in value]
        if not isinstance(value, Tensor):
            return ("value", value)
        for i, image in enumerate(images):
            if image is value:
                return ("image", i)
        name = f"constant{len(list(self.buffers()))}"
        self.register_buffer(name, value)
        return ("buffer", name)

    def _build(self, place: Any, images: tuple[Tensor, ...]) -> Any:
        if isinstance(place, list):
            return [self._build(p, images) for p in place]
        kind, what = place
        return images[what] if kind == "image" else getattr(self, what) if kind == "buffer" else what

    def forward(self, *images: Tensor) -> Tensor:
        return self.op(*(self._build(place, images) for place in self._places))


def enlarged(image: Tensor, size: int) -> Tensor:
    """A map of the same channels, `size` pixels high and wide, made of the same values over and over."""
    rows, columns = (torch.arange(size) % n for n in image.shape[2:])
    return image[:, :, rows][:, :, :, columns].contiguous()


def subject(name: str, index: int, size: int | None) -> Subject:
    """A sample of an operator; `size` is that of the maps, None the sample's own."""
    op = OPS[name]
    args = samples(op)[index]
    images = images_of(op, args)
    module = Operator(op, args, images).eval().to(DEVICE)
    given = images if size is None else [enlarged(x, size) for x in images]
    return Subject(module, tuple(x.to(DEVICE) for x in given))


def map_of(name: str, index: int) -> tuple[int, int]:
    """Height and width of a sample's own maps."""
    op = OPS[name]
    return tuple(images_of(op, samples(op)[index])[0].shape[2:])


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("quick")
    peers = [p.name for p in (*RIVALS, *KERNELS) if p in RIVALS or p.name.split("-")[1] in BACKENDS]
    peers = chosen_peers(metafunc.config, [p for p in peers if not quick or p in QUICK])
    cases: list[tuple[str, int, int | None]] = []
    for name, op in OPS.items():
        indices = [*samples(op)]
        for i in indices[-1:] if quick else indices:
            own = min(map_of(name, i)) >= MAP
            cases += [(name, i, None)] if own or quick else [(name, i, None), (name, i, MAP)]
    ids = [f"{name}-{i}-{size or 'own'}" for name, i, size in cases]
    metafunc.parametrize(("name", "index", "size"), cases, ids=ids)
    metafunc.parametrize("peer", peers)


@pytest.mark.benchmark(timer=recorded)
def test_op(show, name, index, size, peer):
    height, width = map_of(name, index) if size is None else (size, size)
    show(("operator", name, f"{index}, {height}x{width}"), "operator", lambda: subject(name, index, size), peer)
