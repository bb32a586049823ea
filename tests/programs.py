"""Programs of the CPU engine built by hand, one step at a time, for tests of the engine alone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsr import _cpu
from fastsr._cpu import ABSENT, ACTS, FORMS, MAX_SOURCES, TYPES, WORKSPACE, Map, Shape, Strided


def as_bytes(structure: ctypes.Structure) -> Tensor:
    """A structure as the engine's operators take one."""
    return torch.frombuffer(bytearray(bytes(structure)), dtype=torch.uint8)


def pixels(x: Tensor, *, before: int = 0, after: int = 0, fill: float = torch.nan) -> Tensor:
    """A copy of (N, C, H, W) with a channel stride of 1, between so many channels of something else on both sides."""
    n, c, h, w = x.shape
    whole = torch.full((n, h + 2, w + 1, before + c + after), fill, dtype=x.dtype)
    made = whole.permute(0, 3, 1, 2)[:, before : before + c, 1 : h + 1, :w]
    return made.copy_(x)


def shape_of(
    form: str,
    widths: Sequence[int],
    cout: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    transposed: bool = False,
    upsample: int = 1,
    shuffle: int = 1,
    tf_order: bool = False,
    has_pre: bool = False,
    pre_relu: bool = False,
    bf16: bool = False,
) -> Shape:
    """What packed weights depend on."""
    return Shape(
        form=FORMS.index(form), bf16_products=bf16, sources=len(widths), cin=sum(widths), cout=cout, groups=groups,
        kernel=kernel, stride=stride, padding=padding, transposed=transposed, upsample=upsample, shuffle=shuffle,
        tf_order=tf_order, has_pre=has_pre, pre_relu=pre_relu, widths=(ctypes.c_int32 * MAX_SOURCES)(*widths),
    )  # fmt: skip


class Call:
    """One call of the engine: steps are added, then run together. Tensors given to it are read and written in place."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.code: list[bytes] = []
        self.workspace = 0

    def slot(self, t: Tensor) -> int:
        """The number of a tensor in the call."""
        found = next((i for i, known in enumerate(self.tensors) if known is t), None)
        if found is None:
            self.tensors.append(t)
            return len(self.tensors) - 1
        return found

    def map(self, t: Tensor | None) -> Map:
        """A (N, C, H, W) tensor whose channels lie side by side."""
        if t is None:
            return Map(slot=ABSENT)
        assert t.stride(1) == 1 or t.shape[1] == 1
        return Map(image=t.stride(0), row=t.stride(2), pixel=t.stride(3), slot=self.slot(t), type=TYPES[t.dtype],
                   channels=t.shape[1])  # fmt: skip

    def floats(self, t: Tensor | None) -> _cpu.Floats:
        """A contiguous tensor."""
        assert t is None or t.is_contiguous()
        return _cpu.Floats(slot=ABSENT if t is None else self.slot(t))

    def strided(self, t: Tensor) -> Strided:
        """A (N, C, H, W) tensor."""
        image, channel, row, pixel = t.stride()
        return Strided(image=image, channel=channel, row=row, pixel=pixel, slot=self.slot(t), type=TYPES[t.dtype])

    def add(self, kind: int, body: ctypes.Structure) -> None:
        """A step."""
        self.code.append(bytes(_cpu.Step(kind=kind, bytes=ctypes.sizeof(body))) + bytes(body))

    def copy(self, source: Tensor, target: Tensor) -> None:
        n, c, h, w = source.shape
        body = _cpu.CopyStep(
            n=n, channels=c, height=h, width=w, source=self.strided(source), target=self.strided(target)
        )
        self.add(_cpu.COPY, body)

    def conv(
        self,
        shape: Shape,
        packed: Tensor,
        sources: Sequence[Tensor],
        out: Tensor,
        *,
        act: str = "none",
        post_relu: bool = False,
        gain: float = 1.0,
        skip_gain: float = 1.0,
        outer_gain: float = 1.0,
        skip: Sequence[Tensor] = (),
        scale: Tensor | None = None,
        factor: Tensor | None = None,
        term: Tensor | None = None,
        outer: Tensor | None = None,
        partial: Tensor | None = None,
    ) -> None:
        """scale: (N, cout); partial: (N, rows, padded channels)."""
        n, _, h, w = sources[0].shape
        body = _cpu.ConvStep(
            shape=shape, n=n, height=h, width=w, out_height=out.shape[2] // shape.shuffle,
            out_width=out.shape[3] // shape.shuffle, packed=Map(slot=self.slot(packed)), out=self.map(out),
            act=ACTS[act], post_relu=post_relu, gain=gain, skip_gain=skip_gain, outer_gain=outer_gain,
            skips=len(skip), factor=self.map(factor), term=self.map(term), outer=self.map(outer),
            scale=self.map(None if scale is None else scale[:, :, None, None]),
            partial=self.map(None if partial is None else partial[:, :, None].permute(0, 3, 1, 2)),
        )  # fmt: skip
        for i, source in enumerate(sources):
            body.inputs[i] = self.map(source)
        for i, s in enumerate(skip):
            body.skip[i] = self.map(s)
        self.add(_cpu.CONV, body)

    def sums(self, partial: Tensor, stored: Tensor, out: Tensor) -> None:
        n, _, h, w = stored.shape
        rows = partial[:, :, None].permute(0, 3, 1, 2)
        self.add(_cpu.SUMS, _cpu.SumsStep(n=n, height=h, width=w, rows=partial.shape[1], partial=self.map(rows),
                                          source=self.map(stored), out=self.floats(out)))  # fmt: skip

    def gate(
        self, sums: Tensor, pixels: int, weight: Tensor | None, bias: Tensor | None, down: tuple[Tensor, Tensor],
        up: tuple[Tensor, Tensor], out: Tensor
    ) -> None:  # fmt: skip
        n, inputs = sums.shape[:2]
        self.add(_cpu.GATE, _cpu.GateStep(
            n=n, inputs=inputs, outputs=out.shape[1], hidden=down[0].shape[0], taps=sums[0, 0].numel(), pixels=pixels,
            sums=self.floats(sums), weight=self.floats(weight), bias=self.floats(bias),
            down_weight=self.floats(down[0]), down_bias=self.floats(down[1]),
            up_weight=self.floats(up[0]), up_bias=self.floats(up[1]), out=self.floats(out)))  # fmt: skip

    def mean(self, source: Tensor, out: Tensor) -> None:
        n, _, h, w = source.shape
        body = _cpu.MeanStep(n=n, height=h, width=w, source=self.map(source), out=self.floats(out))
        self.add(_cpu.MEAN, body)

    def scale(self, source: Tensor, scale: Tensor, out: Tensor) -> None:
        n, _, h, w = source.shape
        body = _cpu.ScaleStep(n=n, height=h, width=w, source=self.map(source), scale=self.floats(scale),
                              out=self.map(out))  # fmt: skip
        self.add(_cpu.SCALE, body)

    @property
    def program(self) -> Tensor:
        header = bytes(_cpu.Header(steps=len(self.code), workspace_bytes=self.workspace))
        return torch.frombuffer(bytearray(header + b"".join(self.code)), dtype=torch.uint8)

    def run(self) -> None:
        torch.ops.fastsr_cpu.run(self.tensors, self.program)

    def profile(self) -> list[float]:
        """Runs it; the seconds of each step."""
        return torch.ops.fastsr_cpu.profile(self.tensors, self.program)


__all__ = ["WORKSPACE", "Call", "as_bytes", "pixels", "shape_of"]
