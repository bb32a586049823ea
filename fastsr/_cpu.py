"""Operators on a CPU: recipes as programs for the compiled engine.

A call of any operator is one call of the leaf `fastsr_cpu::run`, which walks a program: convolutions and the few other
steps of the operator's recipe, as plain structures in a tensor of bytes. A program is made once a plan and holds no
values of parameters; weights come packed, beside the images, in the tensors of the call (`fastsr.packing`).

* Maps are stored N, H, W, C. A tensor that is so already, a slice of channels included, is read and written in place;
  another is copied into the workspace, or out of it.
* The workspace is one block of memory; buffers share it where their lives do not overlap (`offsets`).
* `forms` chooses the algorithm of each convolution.
* Products: float32 tensors are multiplied as such, bfloat16 tensors as bfloat16. Frozen float32 weights may ask for
  "bfloat16": bfloat16 products, and bfloat16 maps within the operator, but for those that are added later, the residual
  trunk. Convolutions from or to at most four channels, the first and last of a network, multiply in float32.
  "bfloat16 of float32" is the same, but that maps within the operator are float32 as well.

The structures mirror csrc/cpu/conv/conv.h and csrc/cpu/program.h.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_float, c_int32, c_int64
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsr import _cpu_bands, _cpu_tail, _library, packing, recipes
from fastsr.op import Op, _is_list, _replace, _tensors, describe
from fastsr.ops.linear_tail import linear_tail
from fastsr.ops.resize_bicubic import centred_taps, tf1_taps
from fastsr.recipes import Recipe, View

MAX_SOURCES = 24
WORKSPACE, ABSENT = -1, -2  # slots that are not tensors of the call
FORMS = ("direct", "pointwise", "narrow", "winograd43", "winograd23", "winograd63", "winograd25", "winograd35",
         "winograd42", "winograd32")  # fmt: skip
ACTS = {"none": 0, "relu": 1, "leaky": 2, "prelu": 2}
CONV, COPY, SUMS, GATE, MEAN, SCALE = range(6)  # kinds of steps
FLOAT, BF16 = 0, 1
TYPES = {torch.float32: FLOAT, torch.bfloat16: BF16}
BYTES = (4, 2)
ALIGNMENT = 64
BLOCK = 16  # channels that a kernel handles together


class _Struct(ctypes.Structure):
    """A structure of the engine; its fields are listed as in the header, C's rules place them."""


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Map(_Struct):
    """A (N, C, H, W) map with a channel stride of 1; strides in elements."""

    _fields_ = [*_fields(c_int64, "data image row pixel"), *_fields(c_int32, "slot type channels reserved")]


class Shape(_Struct):
    """All that packed weights depend on."""

    _fields_ = [
        *_fields(c_int32, "form bf16_products sources cin cout groups kernel stride padding"),
        *_fields(c_int32, "transposed upsample shuffle tf_order has_pre pre_relu reserved"),
        ("widths", c_int32 * MAX_SOURCES),
    ]


class ConvStep(_Struct):
    """One convolution."""

    _fields_ = [
        ("shape", Shape),
        *_fields(c_int64, "n height width out_height out_width"),
        ("packed", Map),
        ("inputs", Map * MAX_SOURCES),
        ("out", Map),
        *_fields(c_int32, "act post_relu"),
        *_fields(c_float, "gain skip_gain outer_gain"),
        ("skips", c_int32),
        ("skip", Map * 2),
        *_fields(Map, "scale factor term outer partial"),
    ]


class Strided(_Struct):
    """A (N, C, H, W) map with any strides, in elements."""

    _fields_ = [*_fields(c_int64, "data image channel row pixel"), *_fields(c_int32, "slot type")]


class Floats(_Struct):
    """Floats in a row."""

    _fields_ = [("data", c_int64), *_fields(c_int32, "slot reserved")]


class CopyStep(_Struct):
    """to = from, converted to its type."""

    _fields_ = [*_fields(c_int64, "n channels height width"), *_fields(Strided, "source target")]


class SumsStep(_Struct):
    """The nine sums of a stored map."""

    _fields_ = [*_fields(c_int64, "n height width rows"), *_fields(Map, "partial source"), ("out", Floats)]


class GateStep(_Struct):
    """Channel attention from sums."""

    _fields_ = [
        *_fields(c_int64, "n inputs outputs hidden taps pixels"),
        *_fields(Floats, "sums weight bias down_weight down_bias up_weight up_bias out"),
    ]


class MeanStep(_Struct):
    """The mean of every channel."""

    _fields_ = [*_fields(c_int64, "n height width"), ("source", Map), ("out", Floats)]


class ScaleStep(_Struct):
    """A map times a factor for each image and channel."""

    _fields_ = [*_fields(c_int64, "n height width"), ("source", Map), ("scale", Floats), ("out", Map)]


class Step(_Struct):
    """In front of each step's structure."""

    _fields_ = _fields(c_int32, "kind bytes")


class Header(_Struct):
    """In front of a program."""

    _fields_ = _fields(c_int64, "steps workspace_bytes")


# A backend's three questions.


def missing() -> str | None:
    """Why no operator can use the CPU kernels here, or None."""
    reason = _library.load()
    if reason is None and _library.isa() == "baseline":
        reason = torch.ops.fastsr_cpu.isa_problem() or "the CPU kernels need a processor with AVX2, FMA and F16C"
    return reason


def reason(op: Op[..., Any], *args: Any) -> str | None:
    """Why the engine cannot compute these arguments, or None."""
    tensors = _tensors(args)
    first = tensors[0]
    if any(t.device.type != "cpu" for t in tensors):
        return f"the tensors are on {first.device}; this backend computes on the CPU"
    if first.dtype not in TYPES:
        return f"dtype={first.dtype} (needs float32 or bfloat16)"
    if any(t.numel() == 0 for t in tensors):
        return f"a tensor is empty: {describe(tensors)}"
    try:
        Builder(op, args, PLAIN)
    except Unsuitable as error:
        return str(error)
    return None


class Mode(NamedTuple):
    """What frozen weights ask for. exact: the places, among an operator's parameters, of those that multiply in float32
    where the others do not. any_size: no form may be chosen by the size of the map."""

    products: str
    any_size: bool
    exact: tuple[int, ...] = ()


PLAIN = Mode("float32", any_size=False)


def _mode(parameters: Sequence[Tensor]) -> Mode:
    first = packing.frozen(parameters[0])
    if first is None:
        return PLAIN
    if first.products == "float32":
        return Mode("float32", first.any_size)
    marks = [packing.frozen(t) for t in parameters]
    exact = tuple(i for i, mark in enumerate(marks) if mark is not None and mark.products == "float32")
    return Mode(first.products, first.any_size, exact)


class Runner:
    """Computes an operator for arguments of one kind; what `Backend.prepare` returns."""

    def __init__(self, op: Op[..., Any], *args: Any) -> None:
        self.op = op
        self.args = _replace(args, [_shadow(t) for t in _tensors(args)])
        self.places = [(i, _is_list(a)) for i, a in enumerate(args) if isinstance(a, Tensor) or _is_list(a)]
        self.programs: dict[Mode, Program] = {}
        program = self._program(PLAIN)
        self.images, self.parameters = program.images, program.parameters
        self.run = torch.ops.fastsr_cpu.run.default

    def _program(self, mode: Mode) -> Program:
        program = self.programs.get(mode)
        if program is None:
            program = self.programs[mode] = Builder(self.op, self.args, mode).program()
        return program

    def _chosen(self, args: Sequence[Any]) -> tuple[list[Tensor], list[Tensor], Program]:
        """The images, the parameters, and the program for them."""
        given: list[Tensor] = []
        for place, several in self.places:
            given.extend(args[place]) if several else given.append(args[place])
        parameters = [given[i] for i in self.parameters]
        return [given[i] for i in self.images], parameters, self._program(_mode(parameters))

    def tensors(self, out: Tensor, *args: Any) -> tuple[list[Tensor], Program]:
        """What a program reads and writes, by slot, and the program."""
        images, parameters, program = self._chosen(args)
        packed = packing.kept(program.key, parameters, lambda: self._pack(program, args))
        return [out, *images, *packed], program

    def workspace(self, *args: Any) -> int:
        """Bytes that a call takes beside its result and packed weights."""
        code = self._chosen(args)[2].code
        return Header.from_buffer_copy(code.numpy().tobytes()).workspace_bytes

    def __call__(self, out: Tensor, *args: Any) -> None:
        tensors, program = self.tensors(out, *args)
        self.run(tensors, program.code)

    def _pack(self, program: Program, args: Sequence[Any]) -> list[Tensor]:
        # New tensors each, so that a recipe that compares its arguments finds them different, as it did in Builder.
        recipe = _recipe(self.op, _replace(args, [t.detach() for t in _tensors(args)]), program.any_size)
        return [_pack(recipe.steps[i], shape) for i, shape in program.packs.items()]  # type: ignore[arg-type]


def resize_reason(x: Tensor, *rest: Any) -> str | None:
    """As `reason`, for `resize_bicubic`, which is no list of convolutions."""
    if x.device.type != "cpu":
        return f"x is on {x.device}; this backend computes on the CPU"
    return None if x.dtype in TYPES and x.numel() > 0 else f"x={describe(x)} (needs pixels of float32 or bfloat16)"


def resize(x: Tensor, height: int, width: int, scale_y: float, scale_x: float, method: str) -> Callable[..., None]:
    """What `Backend.prepare` returns for `resize_bicubic`."""
    taps = centred_taps if method == "matlab" else tf1_taps
    axes = (taps(x.shape[2], height, scale_y), taps(x.shape[3], width, scale_x))
    tables = [t for at, weights in axes for t in (torch.from_numpy(at), torch.from_numpy(weights).float())]
    run = torch.ops.fastsr_cpu.resize.default
    return lambda out, x, *rest: run(out, x, *tables)


def _shadow(t: Tensor) -> Tensor:
    """A tensor without values."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _recipe(op: Op[..., Any], args: Sequence[Any], any_size: bool = False) -> Recipe:
    if op is linear_tail:
        return _cpu_bands.banded(_cpu_tail.recipe(*args, any_size))
    assert op.recipe_of is not None
    return _cpu_bands.banded(op.recipe_of(*args))


def _bytes(*structures: ctypes.Structure) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(map(bytes, structures))), dtype=torch.uint8)


# Weights.


def _pack(step: recipes.Conv | recipes.Gate, shape: Tensor | None) -> Tensor:
    """The packed weights of a convolution, or the parameters of a gate as floats in a row."""
    if isinstance(step, recipes.Gate):
        return torch.cat([t.float().flatten() for t in _gate_parameters(step) if t is not None])
    assert shape is not None
    outputs = _outputs(step)
    slope = torch.full((outputs,), step.slope) if step.act == "leaky" else step.prelu
    scale, shift = step.pre_scale, step.pre_shift
    if _has_pre(step):  # the engine's prologue is the whole of it
        inputs = step.weight.shape[0] if step.transposed else step.weight.shape[1] * step.groups
        scale = torch.ones(inputs) if scale is None else scale
        shift = torch.zeros(inputs) if shift is None else shift
    slope = None if slope is None else slope.expand(outputs)
    floats = (None if t is None else t.float().contiguous() for t in (step.weight, step.bias, slope, scale, shift))
    return torch.ops.fastsr_cpu.pack(shape, *floats)


def _gate_parameters(step: recipes.Gate) -> tuple[Tensor | None, ...]:
    """In the order of the engine's structure."""
    return step.weight, step.bias, step.down_weight, step.down_bias, step.up_weight, step.up_bias


def _has_pre(step: recipes.Conv) -> bool:
    return step.pre_relu or step.pre_scale is not None or step.pre_shift is not None


def _outputs(step: recipes.Conv) -> int:
    return step.weight.shape[1] * step.groups if step.transposed else step.weight.shape[0]


# Which algorithm.


def forms(step: recipes.Conv, inputs: int, height: int, width: int, bf16: bool) -> Iterator[tuple[str, bool]]:
    """The forms to try for a convolution of so many channels of a map of height x width, each with whether it is to
    multiply in bfloat16, best first: the first that the engine does not refuse is taken.

    The limits are where measured times cross, at 64 channels on one core. Winograd's forms save multiplications; they
    pay with transforms, a tile at a time, and with weights that are several times as many to read. So maps must have
    some tiles, and these some pixels; and there must be channels to spread the transforms over.
    """
    kernel, stride, outputs = step.weight.shape[-1], step.stride, _outputs(step)
    if outputs // step.shuffle**2 <= 4 and step.sums is None:
        yield "narrow", False  # sixteen lanes of outputs would stand mostly empty
    if kernel == 1:
        yield "pointwise", bf16
    coarse = height * width // (1 if step.transposed else stride**2)  # pixels of the smaller of both maps
    if inputs >= (BLOCK if bf16 else 8) and inputs * outputs >= 144:
        if (kernel, stride) == (3, 1) and coarse >= (24 if step.upsample == 1 else 1024):
            if coarse >= 5 * math.ceil(height / 4) * math.ceil(width / 4):
                yield "winograd43", bf16
        elif (kernel, stride) == (5, 1) and coarse >= 12:
            yield "winograd35", False  # F(2x2, 5x5) in bfloat16, the next that is exact enough, is no faster
        elif (kernel, stride) == (8, 4) and coarse >= 100:
            yield ("winograd32", True) if bf16 else ("winograd42", False)  # F(4x4, 2x2) loses too much in bfloat16
        elif (kernel, stride) == (6, 2) and coarse >= 32:
            yield "winograd43", bf16
    yield "direct", bf16
    yield "direct", False


# Programs.


@dataclass(frozen=True)
class Program:
    """code: uint8. images, parameters: which tensors of an operator are its maps, in the order of their slots from 1
    on, and which are not. packs: what is packed into the slots that follow: the number of the step in the recipe, and
    a convolution's shape as bytes, None for a gate. key: equal for programs that pack the same. any_size: no size of
    image needs other weights."""

    code: Tensor
    images: tuple[int, ...]
    parameters: tuple[int, ...]
    packs: dict[int, Tensor | None]
    key: bytes
    any_size: bool


class Unsuitable(Exception):
    """Says why a recipe is none that the engine can run."""


@dataclass
class Buffer:
    """Where a map lies, or a table of floats, which has one row of no pixels. Strides in elements, data in bytes."""

    shape: tuple[int, ...]
    type: int
    slot: int
    image: int
    row: int = 0
    pixel: int = 0
    data: int = 0

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.image * BYTES[self.type]


Operation = tuple[list[str], Callable[[], tuple[int, ctypes.Structure]]]  # the buffers it uses; makes the step


def pixel_stride(channels: int) -> int:
    """Of a map in the workspace: whole blocks, but not for a few colours."""
    return 1 << (channels - 1).bit_length() if channels < BLOCK else _round_up(channels, BLOCK)


def offsets(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Where buffers of so many bytes, used from one step to another, inclusive, lie in one block of memory, and the
    size of that: the largest first, each at the lowest aligned place that is free throughout its life."""
    found: dict[int, int] = {}
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = 0
        for k in sorted(found, key=found.__getitem__):
            if lives[k][0] <= lives[i][1] and lives[i][0] <= lives[k][1] and found[k] < at + sizes[i]:
                at = max(at, _round_up(found[k] + sizes[k], ALIGNMENT))
        found[i] = at
    return [found[i] for i in range(len(sizes))], max((found[i] + size for i, size in enumerate(sizes)), default=0)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _views(step: recipes.Step) -> Iterator[View]:
    """The maps that a step reads."""
    if isinstance(step, (recipes.Mean, recipes.Scale, recipes.Copy)):
        yield step.source
    elif isinstance(step, recipes.Conv):
        yield from step.sources
        yield from _skips(step)
        yield from step.modulate or ()
        if step.outer is not None:
            yield step.outer


def _skips(step: recipes.Conv) -> tuple[View, ...]:
    return step.skip if isinstance(step.skip, tuple) else () if step.skip is None else (step.skip,)


class Builder:
    """Turns the recipe of an operator for arguments like these into a program. Raises Unsuitable at once."""

    def __init__(self, op: Op[..., Any], args: Sequence[Any], mode: Mode) -> None:
        self.any_size = mode.any_size
        tensors = [_shadow(t) for t in _tensors(args)]  # no two the same, whatever was given
        shadows = _replace(args, tensors)
        self.recipe = recipe = _recipe(op, shadows, mode.any_size)
        if recipe.float8:
            raise Unsuitable("float8 products (they need a GPU of compute capability 9.0)")
        self.type = TYPES[tensors[0].dtype]
        self.able = _library.isa() == "avx512_bf16"
        self.bf16 = self.type == BF16 or (mode.products != "float32" and self.able)
        self.inner = BF16 if self.type == BF16 or (mode.products == "bfloat16" and self.able) else FLOAT  # maps
        places = {id(t): i for i, t in enumerate(tensors)}
        self.images = tuple(places[id(t)] for t in recipe.inputs.values())
        self.parameters = tuple(i for i in range(len(tensors)) if i not in self.images)
        self.exact = {id(tensors[self.parameters[i]]) for i in mode.exact}
        self.outside = {**recipe.inputs, recipe.output: op._allocate(shadows)}
        self.convolutions = {i: self._shape(s) for i, s in enumerate(recipe.steps) if isinstance(s, recipes.Conv)}
        scalars = [a for a in args if not isinstance(a, Tensor) and not _is_list(a)]
        self.packs = self._packs()
        packed = [bytes(self.convolutions[i]) for i in dict.fromkeys(self.packs.values()) if i in self.convolutions]
        self.key = repr((op.name, scalars, packed)).encode()

    def _whole(self, name: str) -> tuple[int, ...]:
        """The shape of a buffer."""
        return tuple(self.outside[name].shape) if name in self.outside else self.recipe.workspace[name]

    def _channels(self, view: View) -> int:
        return self._whole(view.buffer)[1] - view.start if view.channels is None else view.channels

    # What each convolution is.

    def _shape(self, step: recipes.Conv) -> Shape:
        widths = [self._channels(v) for v in step.sources]
        inputs, outputs, kernel = sum(widths), _outputs(step), step.weight.shape[-1]
        if step.weight.shape[-2] != kernel:
            raise Unsuitable(f"a kernel of {step.weight.shape[-2]}x{kernel} (needs square ones)")
        if len(widths) > MAX_SOURCES:
            raise Unsuitable(f"{len(widths)} maps read as one (at most {MAX_SOURCES})")
        if len(_skips(step)) > 2:
            raise Unsuitable(f"a skip of {len(_skips(step))} maps (at most 2)")
        _, height, width = (0, 1 << 16, 1 << 16) if self.any_size else self._size(step.sources[0])
        ends = min(inputs, outputs // step.shuffle**2) <= 4
        bf16 = self.bf16 and self.able and not ends and id(step.weight) not in self.exact
        why = ""
        for form, product in forms(step, inputs, height, width, bf16):
            shape = Shape(
                FORMS.index(form), product, len(widths), inputs, outputs, step.groups, kernel, step.stride,
                step.padding, step.transposed, step.upsample, step.shuffle, step.shuffle_order == "tf",
                _has_pre(step), step.pre_relu, 0, (c_int32 * MAX_SOURCES)(*widths),
            )  # fmt: skip
            why = torch.ops.fastsr_cpu.refuse(_bytes(shape))
            if not why:
                return shape
        raise Unsuitable(why)

    def _packs(self) -> dict[int, int]:
        """For each step with weights the first one that packs the same, often itself."""
        firsts: dict[Any, int] = {}
        found = {}
        for i, step in enumerate(self.recipe.steps):
            if isinstance(step, recipes.Conv):
                tensors = step.weight, step.bias, step.prelu, step.pre_scale, step.pre_shift
                what = (*map(id, tensors), step.act, step.slope, bytes(self.convolutions[i]))
                found[i] = firsts.setdefault(what, i)
            elif isinstance(step, recipes.Gate):
                found[i] = i
        return found

    # Where everything lies.

    def _buffers(self) -> dict[str, Buffer]:
        """Inputs and the output in their places if the engine can use them there; all else in the workspace."""
        convolutions = [step for step in self.recipe.steps if isinstance(step, recipes.Conv)]
        added = {v.buffer for s in convolutions for v in (*_skips(s), *([s.outer] if s.outer is not None else []))}
        added |= {step.source.buffer for step in self.recipe.steps if isinstance(step, recipes.Copy)}  # are results
        tables = self._tables()
        slots = {self.recipe.output: 0} | {name: 1 + i for i, name in enumerate(self.recipe.inputs)}
        buffers = {}
        for name in (*self.outside, *self.recipe.workspace):
            shape, t = self._whole(name), self.outside.get(name)
            if t is not None and (shape[1] == 1 or t.stride(1) == 1) and (name not in tables or self.type == FLOAT):
                row, pixel = (0, 0) if name in tables else (t.stride(2), t.stride(3))
                buffers[name] = Buffer(shape, self.type, slots[name], t.stride(0), row, pixel)
            elif name in tables:
                buffers[name] = Buffer(shape, FLOAT, WORKSPACE, math.prod(shape[1:]))
            else:
                pixel = pixel_stride(shape[1])
                row = shape[3] * pixel
                type_ = self.type if t is not None else FLOAT if name in added else self.inner
                buffers[name] = Buffer(shape, type_, WORKSPACE, shape[2] * row, row, pixel)
        return buffers

    def _tables(self) -> set[str]:
        """The buffers that hold a few floats for each image and channel."""
        named: set[str | None] = set()
        for step in self.recipe.steps:
            if isinstance(step, recipes.Gate):
                named |= {step.sums, step.store}
            elif isinstance(step, recipes.Conv):
                named |= {step.scale, step.sums}
            elif not isinstance(step, recipes.Copy):
                named |= {step.store if isinstance(step, recipes.Mean) else step.scale}
        return {name for name in named if name is not None}

    # What is done.

    def program(self) -> Program:
        self.buffers = self._buffers()
        operations = list(self._operations())
        lives: dict[str, tuple[int, int]] = {}
        for i, (names, _) in enumerate(operations):
            lives |= {name: (lives.get(name, (i, i))[0], i) for name in names}
        room = {name: life for name, life in lives.items() if self.buffers[name].slot == WORKSPACE}
        places, size = offsets([self.buffers[name].bytes for name in room], list(room.values()))
        for name, at in zip(room, places, strict=True):
            self.buffers[name].data = at
        parts: list[ctypes.Structure] = [Header(len(operations), size)]
        for _, make in operations:
            kind, step = make()
            parts += [Step(kind, ctypes.sizeof(step)), step]
        shapes = {i: self.convolutions.get(i) for i in dict.fromkeys(self.packs.values())}
        packs = {i: None if shape is None else _bytes(shape) for i, shape in shapes.items()}
        return Program(_bytes(*parts), self.images, self.parameters, packs, self.key, self.any_size)

    def _operations(self) -> Iterator[Operation]:
        """The steps of the engine: an input's copy stands in front of its first reader."""
        waiting = [name for name in self.recipe.inputs if self.buffers[name].slot == WORKSPACE]
        slots = {i: 1 + len(self.images) + k for k, i in enumerate(dict.fromkeys(self.packs.values()))}
        for i, step in enumerate(self.recipe.steps):
            names = [v.buffer for v in _views(step)]
            if not isinstance(step, (recipes.Mean, recipes.Copy)) and (
                table := step.sums if isinstance(step, recipes.Gate) else step.scale
            ):
                names.append(table)
            for name in [n for n in waiting if n in names]:
                waiting.remove(name)
                yield [name], partial(self._copy, name, inward=True)
            names.append(step.store.buffer if isinstance(step.store, View) else step.store)
            if isinstance(step, recipes.Conv):
                yield from self._convolve(i, step, slots[self.packs[i]], names)
            elif isinstance(step, recipes.Gate):
                yield names, partial(self._gate, step, slots[i])
            elif isinstance(step, recipes.Mean):
                yield names, partial(self._mean, step)
            elif isinstance(step, recipes.Copy):
                yield names, partial(self._again, step)
            else:
                yield names, partial(self._scale, step)
        if self.buffers[self.recipe.output].slot == WORKSPACE:
            yield [self.recipe.output], partial(self._copy, self.recipe.output, inward=False)

    def _convolve(self, number: int, step: recipes.Conv, slot: int, names: list[str]) -> Iterator[Operation]:
        if step.sums is None:
            yield names, partial(self._conv, number, step, slot)
            return
        rows = torch.ops.fastsr_cpu.partials(_bytes(self._conv(number, step, slot)[1]))
        n, channels = self._whole(step.sums)[:2]
        name, row = f"parts of {step.sums}", _round_up(channels, BLOCK)
        self.buffers[name] = Buffer((n, row), FLOAT, WORKSPACE, rows * row, row)
        yield [*names, name], partial(self._conv, number, step, slot, name)
        yield [name, step.store.buffer, step.sums], partial(self._sums, step, name, rows)

    # Structures. The numbers of the map that they are about come first.

    def _map(self, view: View | None) -> Map:
        if view is None:
            return Map(slot=ABSENT)
        b = self.buffers[view.buffer]
        channels = b.shape[1] - view.start if view.channels is None else view.channels
        return Map(b.data + self._first(view), b.image, b.row, b.pixel, b.slot, b.type, channels)

    def _first(self, view: View) -> int:
        """Where the first element of a slice lies in its buffer, in bytes."""
        b, (row, _), (pixel, _) = self.buffers[view.buffer], view.rows or (0, 0), view.columns or (0, 0)
        return (view.start + row * b.row + pixel * b.pixel) * BYTES[b.type]

    def _floats(self, name: str) -> Floats:
        return Floats(self.buffers[name].data, self.buffers[name].slot)

    def _size(self, view: View) -> tuple[int, int, int]:
        whole = self._whole(view.buffer)
        return whole[0], *view.size(whole)

    def _conv(self, number: int, step: recipes.Conv, slot: int, parts: str | None = None) -> tuple[int, ConvStep]:
        n, height, width = self._size(step.sources[0])
        _, out_height, out_width = self._size(step.store)
        made = ConvStep(self.convolutions[number], n, height, width, out_height // step.shuffle,
                        out_width // step.shuffle, Map(slot=slot))  # fmt: skip
        for i, view in enumerate(step.sources):
            made.inputs[i] = self._map(view)
        skips = _skips(step)
        for i in range(2):
            made.skip[i] = self._map(skips[i] if i < len(skips) else None)
        made.out, made.act, made.post_relu = self._map(step.store), ACTS[step.act], step.post_relu
        made.gain, made.skip_gain, made.outer_gain = step.gain, step.skip_gain, step.outer_gain
        made.skips = len(skips)
        made.scale = self._map(None if step.scale is None else View(step.scale))
        made.factor, made.term = (self._map(v) for v in step.modulate or (None, None))
        made.outer = self._map(step.outer)
        made.partial = self._map(None if parts is None else View(parts))
        return CONV, made

    def _sums(self, step: recipes.Conv, parts: str, rows: int) -> tuple[int, SumsStep]:
        assert step.sums is not None
        size = self._size(step.store)
        return SUMS, SumsStep(*size, rows, self._map(View(parts)), self._map(step.store), self._floats(step.sums))

    def _gate(self, step: recipes.Gate, slot: int) -> tuple[int, GateStep]:
        parameters, at = [], 0
        for t in _gate_parameters(step):
            parameters.append(Floats(at, slot) if t is not None else Floats(0, ABSENT))
            at += 4 * t.numel() if t is not None else 0
        n, outputs = self._whole(step.store)
        inputs, taps = (outputs, 1) if step.weight is None else (step.weight.shape[1], step.weight[0, 0].numel())
        sizes = n, inputs, outputs, step.down_weight.shape[0], taps, step.pixels
        return GATE, GateStep(*sizes, self._floats(step.sums), *parameters, self._floats(step.store))

    def _mean(self, step: recipes.Mean) -> tuple[int, MeanStep]:
        return MEAN, MeanStep(*self._size(step.source), self._map(step.source), self._floats(step.store))

    def _scale(self, step: recipes.Scale) -> tuple[int, ScaleStep]:
        maps = self._map(step.source), self._floats(step.scale), self._map(step.store)
        return SCALE, ScaleStep(*self._size(step.source), *maps)

    def _again(self, step: recipes.Copy) -> tuple[int, CopyStep]:
        n, height, width = self._size(step.source)
        maps = (self._map(v) for v in (step.source, step.store))
        ends = [Strided(m.data, m.image, 1, m.row, m.pixel, m.slot, m.type) for m in maps]
        return COPY, CopyStep(n, self._channels(step.source), height, width, *ends)

    def _copy(self, name: str, inward: bool) -> tuple[int, CopyStep]:
        """An input into the workspace, or the output out of it."""
        t, b = self.outside[name], self.buffers[name]
        slot = 1 + list(self.recipe.inputs).index(name) if inward else 0
        shape, strides = [*t.shape, 1, 1][:4], [*t.stride(), 0, 0][:4]
        outside = Strided(0, *strides, slot, self.type)
        inside = Strided(b.data, b.image, 1, b.row, b.pixel, WORKSPACE, b.type)
        return COPY, CopyStep(*shape, *((outside, inside) if inward else (inside, outside)))
