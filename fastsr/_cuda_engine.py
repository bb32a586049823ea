"""Operators on NVIDIA GPUs by the compiled CUDA engine: recipes as programs that one call walks.

A call of an operator is one call of the leaf `fastsr_cuda::run`, which launches the steps of a program: plain
structures that mirror csrc/cuda/conv/conv.h, gate.h, residual_e.h and program.h, in a tensor of bytes. A program is
made once a plan and holds no values of parameters; weights come packed in the tensors of the call (`fastsr.packing`),
and `_cuda_forms` says how.

* Maps are stored N, H, W, C. A tensor that is so already, a slice of channels included, is read and written in place;
  another is copied.
* Products of bfloat16 or float16, sums in float32. Sums over a map have a fixed order, which the rest of the batch does
  not change.
* With `Recipe.float8` products are of e4m3, on Hopper alone: the input is rounded first, inner maps are stored in eight
  bits by the convolutions that make them.
* `advice` keeps every call from this backend that no measurement says it is faster for; `fastsr.use("cuda")` reaches it
  always.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int32, c_int64
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsr import _float8, packing, recipes
from fastsr._cpu import offsets
from fastsr._cuda_forms import (
    LAST,
    MAX_SOURCES,
    SM80,
    SM90,
    Form,
    Geometry,
    Unsuitable,
    lower,
    suits_last,
    suits_sm90,
    tile_order,
)
from fastsr._triton import measured
from fastsr.op import Op, _replace, _tensors, describe
from fastsr.ops.linear_tail import linear_tail, merged_recipe, unmergeable
from fastsr.recipes import Recipe, View

TYPES = {torch.bfloat16: 0, torch.float16: 1}
ACTS = {"relu": 0, "leaky": 1, "none": 1, "prelu": 2}
CONV, GATE, SCALE, RESIDUAL_E, FLOAT8 = range(5)  # kinds of steps
SLICES, VECTORS, MAX_GATE = 32, 5, 256  # csrc/cuda/gate.h
RANGE_SLICES = 128  # csrc/cuda/float8.h
MINIMUM_CAPABILITY, FLOAT8_CAPABILITY = (8, 0), (9, 0)
NO_SM90 = "fastsr/_cuda.so was built without 90a (FASTSR_CUDA_ARCHS)"
ALIGNMENT = 256
SMALLEST_TILE = (8, 8)  # bounds the number of channel sums that a map's tiles leave

FORM_FIELDS = (
    "arch", "step_in", "step_out", "row_pitch", "halo_y", "halo_x", "halo_more", "halo_w", "blocks", "rows", "chunks",
    "taps_most", "steps", "tiles", "block_tiles",
)  # fmt: skip
GATE_FIELDS = ("weight", "bias", "down_weight", "down_bias", "up_weight", "up_bias")

_PATH = Path(__file__).with_name("_cuda.so")


class Map(ctypes.Structure):
    """A map in the tensor `slot`, `data` bytes in; strides in elements. Slot -1: there is none."""

    _fields_ = [("data", c_int64), ("image", c_int64), ("row", c_int64), ("pixel", c_int32), ("slot", c_int32)]


NOWHERE = Map(slot=-1)


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class ConvParams(ctypes.Structure):
    """One convolution."""

    _fields_ = [
        ("source", Map * MAX_SOURCES),
        ("out", Map),
        ("skip", Map * 2),
        *_fields(Map, "factor term outer scale packed table partial range"),
        *_fields(c_int32, "type arch n grid_h grid_w in_h in_w step_in out_h out_w step_out row_pitch"),
        *_fields(c_int32, "halo_y halo_x halo_more halo_w blocks rows chunks taps_most steps tiles block_tiles"),
        *_fields(c_int32, "channels skip_split act post_relu has_pre pre_relu pre_count has_bias scale_is_float"),
        *_fields(c_int32, "float8_out vector_in vector_out"),
        *_fields(c_float, "slope gain skip_gain outer_gain"),
    ]


class GateParams(ctypes.Structure):
    """Means of a map, and the gate made from them."""

    _fields_ = [
        *_fields(Map, "map partial scratch weight bias down_weight down_bias up_weight up_bias out"),
        *_fields(c_int32, "type n h w features channels hidden partials"),
    ]


class ScaleParams(ctypes.Structure):
    """A map times its gate."""

    _fields_ = [*_fields(Map, "x gate out"), *_fields(c_int32, "type n h w channels vector")]


class ResidualEParams(ctypes.Structure):
    """CARN-M's residual-E unit in one launch."""

    _fields_ = [*_fields(Map, "x out packed"), *_fields(c_int32, "type n h w")]


class Float8Params(ctypes.Structure):
    """A map rounded to e4m3."""

    _fields_ = [*_fields(Map, "x out largest range"), *_fields(c_int32, "n h w channels")]


# A backend's questions.


@functools.cache
def load() -> str | None:
    """Loads `_cuda.so`, which registers the operators of `torch.ops.fastsr_cuda`. Returns why it cannot, or None."""
    if not _PATH.is_file():
        return (
            "fastsr/_cuda.so was not built (no nvcc when fastsr was installed, or FASTSR_CUDA=0); "
            "with nvcc there, install fastsr again"
        )
    try:
        torch.ops.load_library(str(_PATH))
    except OSError as error:
        return f"fastsr/_cuda.so does not load: {error}"
    return None


def missing() -> str | None:
    """Why no operator can use the CUDA kernels here, or None."""
    return load() or (None if torch.cuda.is_available() else "no CUDA device")


def reason(op: Op[..., Any], *args: Any) -> str | None:
    """Why the engine cannot compute these arguments, or None."""
    tensors = _tensors(args)
    first = tensors[0]
    if any(t.device.type != "cuda" for t in tensors):
        return f"the tensors are on {first.device}; this backend needs a CUDA device"
    return unsuitable(op, args, Gpu(first.device))


def unsuitable(op: Op[..., Any], args: Sequence[Any], device: Device) -> str | None:
    """Why the engine of a device cannot compute these arguments, wherever they are, or None."""
    tensors = _tensors(args)
    if tensors[0].dtype not in TYPES:
        return f"dtype={tensors[0].dtype} (needs bfloat16 or float16)"
    if any(t.numel() == 0 for t in tensors):
        return f"a tensor is empty: {describe(tensors)}"
    if device.capability < MINIMUM_CAPABILITY:
        return f"compute capability {device.capability[0]}.{device.capability[1]} (needs 8.0)"
    try:
        Builder(op, args, device)
    except Unsuitable as error:
        return str(error)
    return None


def advice(op: Op[..., Any], *args: Any) -> str | None:
    """Why another backend is preferred: none of ours is ahead without a measurement."""
    if op.recipe_of is not None and _recipe(op, args).float8:
        return None  # nothing else has such products
    found = measured(op, args)
    if found is None:
        return 'nothing measured has it ahead of Triton (fastsr.use("cuda") takes it)'
    times, path = found
    if "cuda" not in times:
        return f"not measured, or failed, or gave a wrong result ({path})"
    fastest = min(times, key=lambda name: times[name])
    if fastest == "cuda":
        return None
    return f"measured: {times['cuda']:.1f} us, {fastest} {times[fastest]:.1f} us ({path})"


def float8_missing(device: torch.device) -> str | None:
    """Why a device has no e4m3 products, or None."""
    if device.type != "cuda":
        return f"{device} is no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability != FLOAT8_CAPABILITY:
        return f"{device} has compute capability {capability[0]}.{capability[1]} (needs 9.0)"
    return missing() or (None if torch.ops.fastsr_cuda.has_sm90() else NO_SM90)


# Devices.


class Device:
    """What a program is made for and what runs it. Subclasses: `Gpu`, and the emulation of the tests.

    capability: of the device; multiprocessors: how many.
    """

    capability: tuple[int, int]
    multiprocessors: int

    def run(self, tensors: list[Tensor], program: Tensor) -> None:
        raise NotImplementedError

    def has_sm90(self) -> bool:
        """Whether what it runs was compiled with Hopper's kernels."""
        return True

    def main_loop(self, g: Geometry) -> int:
        """LAST or SM90 where their kernels are for the convolution, else SM80."""
        if suits_last(g):
            return LAST
        return SM90 if self.capability == (9, 0) and self.has_sm90() and suits_sm90(g) else SM80


class Gpu(Device):
    """A CUDA device."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.capability = (properties.major, properties.minor)
        self.multiprocessors = properties.multi_processor_count

    def run(self, tensors: list[Tensor], program: Tensor) -> None:
        torch.ops.fastsr_cuda.run(tensors, program, self.multiprocessors)

    def has_sm90(self) -> bool:
        return torch.ops.fastsr_cuda.has_sm90()


# Running.


class Runner:
    """Computes an operator for arguments of one kind; what `Backend.prepare` returns."""

    def __init__(self, op: Op[..., Any], *args: Any, device: Device | None = None) -> None:
        tensors = _tensors(args)
        self.op, self.device = op, Gpu(tensors[0].device) if device is None else device
        self.builder = Builder(op, args, self.device)
        self.program = self.builder.program()

    def __call__(self, out: Tensor, *args: Any) -> None:
        builder, given = self.builder, _tensors(args)
        parameters = [given[i] for i in builder.parameters] or given[:1]
        packed = packing.kept(builder.key, parameters, lambda: self._pack(args, out.device))
        inputs = [t if kept else _dense(t) for t, kept in zip((given[i] for i in builder.images), builder.in_place)]
        result = out if builder.out_in_place else _dense(torch.empty_like(out))
        workspace = torch.empty(builder.workspace_bytes, dtype=torch.uint8, device=out.device)
        self.device.run([result, *inputs, workspace, *packed], self.program)
        if result is not out:
            out.copy_(result)

    def _pack(self, args: Sequence[Any], device: torch.device) -> list[Tensor]:
        recipe = _recipe(self.op, _replace(args, [t.detach() for t in _tensors(args)]))
        return self.builder.pack(recipe, device)


def _recipe(op: Op[..., Any], args: Sequence[Any]) -> Recipe:
    assert op.recipe_of is not None
    recipe = op.recipe_of(*args)
    if op is linear_tail and unmergeable(*args[:2]) is None:
        shadows = [torch.empty_like(t, device="meta") for t in _tensors(args)]
        merged = merged_recipe(*_replace(args, shadows))
        if _products(merged) < _products(recipe):
            return merged_recipe(*args, dtype=args[0].dtype)
    return recipe


def _products(recipe: Recipe) -> int:
    """How many multiplications the convolutions of a recipe without strides take for an image."""
    shapes = recipe.workspace | {name: tuple(t.shape) for name, t in recipe.inputs.items()}
    convolutions = (step for step in recipe.steps if isinstance(step, recipes.Conv))
    return sum(math.prod((s.weight.numel(), *s.sources[0].size(shapes[s.sources[0].buffer]))) for s in convolutions)


def _dense(t: Tensor) -> Tensor:
    """A copy, if need be, stored N, H, W, C, or a table in a row."""
    if t.dim() != 4:
        return t.contiguous()
    n, c, h, w = t.shape
    return torch.empty((n, h, w, c), dtype=t.dtype, device=t.device).permute(0, 3, 1, 2).copy_(t)


def _usable(t: Tensor) -> bool:
    """Whether the engine reads and writes a tensor where it lies."""
    return t.dim() != 4 and t.stride(-1) == 1 or t.dim() == 4 and (t.shape[1] == 1 or t.stride(1) == 1)


def _outputs(step: recipes.Conv) -> int:
    return step.weight.shape[1] * step.groups if step.transposed else step.weight.shape[0]


def _skips(step: recipes.Conv) -> tuple[View, ...]:
    return step.skip if isinstance(step.skip, tuple) else () if step.skip is None else (step.skip,)


def _has_pre(step: recipes.Conv) -> bool:
    return step.pre_relu or step.pre_scale is not None or step.pre_shift is not None


# Packing.


def _pack_conv(step: recipes.Conv, geometry: Geometry, arch: int, float8: bool, device: torch.device) -> list[Tensor]:
    """The packed weights of a convolution, and its table. With float8 the weights are pairs of e4m3 in 16 bits, and the
    scales of the outputs stand in the place of slopes."""
    form, weight = lower(geometry, arch), step.weight
    if form.merge is not None:
        rows, columns = (torch.from_numpy(m).to(device) for m in form.merge)
        weight = torch.einsum("ak,bl,oikl->oiab", rows, columns, weight.float()).to(weight.dtype)
    inputs = sum(geometry.widths)
    slope = step.prelu.expand(_outputs(step)) if step.prelu is not None else None
    scale, shift = step.pre_scale, step.pre_shift
    if _has_pre(step):
        scale = weight.new_ones(inputs) if scale is None else scale
        shift = weight.new_zeros(inputs) if shift is None else shift
    parts = [step.bias, slope, scale, shift]
    if float8:
        by = _float8.scale(weight, (1, 2, 3), _float8.WEIGHTS)
        eights = _float8.rounded(weight, by).view(torch.uint8).int()
        weight = (eights[:, ::2] | eights[:, 1::2] << 8).to(torch.int16)
        parts = [None if t is None else t.reshape(-1).view(torch.int16) for t in (step.bias, by, None, None)]
    flat = torch.cat([t.reshape(-1) for t in (weight, *parts) if t is not None] + [weight.new_zeros(1)])
    sizes = (weight.numel(), *(0 if t is None else t.numel() for t in parts))
    index, table = _on_device(geometry, arch, sizes, device)
    return [flat[index], table]


@functools.lru_cache(maxsize=512)
def _on_device(g: Geometry, arch: int, sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Form.index as numbers of elements of the concatenation, whose parts but the last have these sizes, and the
    table."""
    form = lower(g, arch)
    index = torch.from_numpy(form.index)
    starts = torch.tensor([sum(sizes[: i + 1]) for i in range(len(sizes))])  # of all parts but the weight
    present = torch.tensor([*(s > 0 for s in sizes[1:]), True])
    part, element = (-index - 1) % 8, (-index - 1) // 8
    part = part.clamp(max=4)
    elsewhere = torch.where(present[part], starts[part] + element, starts[-1])
    return torch.where(index >= 0, index, elsewhere).to(device), torch.from_numpy(form.table).to(device)


def _gate_parameters(step: recipes.Gate) -> tuple[Tensor | None, ...]:
    """In the order of GateParams."""
    return step.weight, step.bias, step.down_weight, step.down_bias, step.up_weight, step.up_bias


def _pack_residual_e(steps: Sequence[recipes.Conv]) -> Tensor:
    """In the order of csrc/cuda/residual_e.h."""
    row, k = (torch.from_numpy(i) for i in tile_order(SM80, 16))
    parts = [s.weight.reshape(4, 16, 16, 9).permute(0, 3, 1, 2)[:, :, row, k].reshape(-1) for s in steps[:2]]
    parts.append(steps[2].weight.reshape(4, 16, 4, 16).permute(0, 2, 1, 3)[:, :, row, k].reshape(-1))
    zeros = parts[0].new_zeros(64)
    return torch.cat([*parts, *(zeros if s.bias is None else s.bias for s in steps)])


# Programs.


@dataclass(frozen=True)
class Float8:
    """An input rounded to e4m3: the step that this engine puts before those of a recipe with `float8`."""

    source: View
    store: View


@dataclass
class Buffer:
    """Where a map lies, or a table of a few numbers for each image, which has no rows or pixels."""

    shape: tuple[int, ...]
    slot: int
    image: int
    row: int
    pixel: int
    data: int = 0
    width: int = 2  # bytes of an element
    aligned: bool = True

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.image * self.width


class Builder:
    """Turns the recipe of an operator for arguments like these into a program for a device. Raises Unsuitable at once.

    Slots of a program: the output, the images, the workspace, then what `pack` makes.
    """

    def __init__(self, op: Op[..., Any], args: Sequence[Any], device: Device) -> None:
        if op.recipe_of is None:
            raise Unsuitable(f"no CUDA kernel is written for {op.name}")
        given = _tensors(args)
        shadows = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in given]
        replaced = _replace(args, shadows)
        self.recipe = recipe = _recipe(op, replaced)
        self.type, self.device = TYPES[given[0].dtype], device
        places = {id(t): i for i, t in enumerate(shadows)}
        self.images = tuple(places[id(t)] for t in recipe.inputs.values())
        self.parameters = tuple(i for i in range(len(given)) if i not in self.images)
        self.in_place = tuple(_usable(t) for t in recipe.inputs.values())
        self.aligned = tuple(given[i].device.type == "meta" or given[i].data_ptr() % 16 == 0 for i in self.images)
        self.out = op._allocate(replaced)
        self.out_in_place = _usable(self.out)
        self.float8 = recipe.float8
        if self.float8:
            self._check_float8()
        self.fused = op.name == "residual_e" and self._fits_residual_e()
        self.forms = {i: self._form(s) for i, s in enumerate(recipe.steps) if isinstance(s, recipes.Conv)}
        for step in recipe.steps:
            if isinstance(step, recipes.Gate):
                self._check_gate(step)
        scalars = [a for a in args if not isinstance(a, (Tensor, list, tuple))]
        self.key = repr(("cuda", op.name, scalars, [(g, f.arch) for g, f in self.forms.values()]))

    # Forms.

    def _whole(self, name: str) -> tuple[int, ...]:
        if name == self.recipe.output:
            return tuple(self.out.shape)
        t = self.recipe.inputs.get(name)
        return self.recipe.workspace[name] if t is None else tuple(t.shape)

    def _channels(self, view: View) -> int:
        return self._whole(view.buffer)[1] - view.start if view.channels is None else view.channels

    def _form(self, step: recipes.Conv) -> tuple[Geometry, Form]:
        if len(_skips(step)) > 2:
            raise Unsuitable(f"a skip of {len(_skips(step))} maps (at most 2)")
        if step.shuffle > 1 and (step.scale is not None or step.skip is not None or step.modulate is not None):
            raise Unsuitable("a shuffled store together with a scale, a skip or a modulation")
        kernel = (step.weight.shape[-2], step.weight.shape[-1])
        widths = tuple(self._channels(v) // (2 if self.float8 else 1) for v in step.sources)  # in pairs, see conv.h
        g = Geometry(
            widths, _outputs(step), kernel, step.stride, step.padding, step.groups, step.transposed, step.upsample,
            step.shuffle, step.shuffle_order, step.sums is not None,
        )  # fmt: skip
        loop = self.device.main_loop(g)
        if self.float8 and (loop != SM90 or any(self._channels(v) % 32 for v in step.sources)):
            sizes = "+".join(str(self._channels(v)) for v in step.sources)
            raise Unsuitable(f"float8 products of {sizes} -> {g.outputs} channels (needs multiples of 32)")
        return g, lower(g, loop)

    def _check_float8(self) -> None:
        if self.device.capability != FLOAT8_CAPABILITY:
            major, minor = self.device.capability
            raise Unsuitable(f"float8 products on compute capability {major}.{minor} (needs 9.0)")
        if not self.device.has_sm90():
            raise Unsuitable(f"float8 products: {NO_SM90}")
        if self.type != TYPES[torch.bfloat16]:
            raise Unsuitable("float8 products in maps of float16 (needs bfloat16)")
        x = next(iter(self.recipe.inputs.values()))
        if self.in_place[0] and not (self.aligned[0] and _eights(x.stride(0), x.stride(2), x.stride(3))):
            raise Unsuitable("float8 products of a map whose pixels are not 16-byte aligned")

    def _check_gate(self, step: recipes.Gate) -> None:
        channels, hidden = step.up_weight.shape[0], step.down_weight.shape[0]
        features = channels if step.weight is None else step.weight.shape[1]
        if max(channels, hidden, features) > MAX_GATE:
            raise Unsuitable(f"a gate of {max(channels, hidden, features)} channels (at most {MAX_GATE})")

    def _fits_residual_e(self) -> bool:
        weights = [s.weight.shape for s in self.recipe.steps if isinstance(s, recipes.Conv)]
        aligned = self.aligned[0] and self.in_place[0]
        x = self.recipe.inputs["x"]
        return (
            weights == [(64, 16, 3, 3), (64, 16, 3, 3), (64, 64, 1, 1)]
            and (not self.in_place[0] or aligned and _eights(x.stride(0), x.stride(2), x.stride(3)))
            and (not self.out_in_place or _eights(self.out.stride(0), self.out.stride(2), self.out.stride(3)))
        )

    # What is packed, in the order of the slots after the workspace.

    def pack(self, recipe: Recipe, device: torch.device) -> list[Tensor]:
        """The parameters of a recipe, packed."""
        if self.fused:
            return [_pack_residual_e(recipe.steps)]  # type: ignore[arg-type]
        packed = []
        for i, step in enumerate(recipe.steps):
            if isinstance(step, recipes.Conv):
                geometry, form = self.forms[i]
                packed += _pack_conv(step, geometry, form.arch, self.float8, device)
            elif isinstance(step, recipes.Gate):
                packed.append(torch.cat([t.reshape(-1) for t in _gate_parameters(step) if t is not None]))
        return packed

    # Where everything lies.

    def _buffers(self) -> dict[str, Buffer]:
        slots = {self.recipe.output: 0} | {name: 1 + i for i, name in enumerate(self.recipe.inputs)}
        outside = {**self.recipe.inputs, self.recipe.output: self.out}
        in_place = dict(zip(self.recipe.inputs, self.in_place)) | {self.recipe.output: self.out_in_place}
        aligned = dict(zip(self.recipe.inputs, self.aligned))
        buffers = {}
        for name in (*outside, *self.recipe.workspace):
            shape, t, slot = self._whole(name), outside.get(name), slots.get(name, self.workspace)
            if len(shape) != 4:
                dense = t is None or not in_place[name]
                buffers[name] = Buffer(shape, slot, math.prod(shape[1:]) if dense else t.stride(0), 0, 0)
            elif t is not None and in_place[name]:
                given = Buffer(shape, slot, t.stride(0), t.stride(2), t.stride(3))
                given.aligned = aligned.get(name, True)
                buffers[name] = given
            else:
                pixel = shape[1] if t is not None else -(-shape[1] // 8) * 8
                width = 1 if self.float8 and t is None else 2
                buffers[name] = Buffer(shape, slot, shape[2] * shape[3] * pixel, shape[3] * pixel, pixel, width=width)
        return buffers

    @property
    def workspace(self) -> int:
        """The slot of the workspace."""
        return 1 + len(self.images)

    def _private(self, name: str, shape: tuple[int, ...], width: int) -> None:
        self.buffers[name] = Buffer(shape, self.workspace, math.prod(shape[1:]), 0, 0, width=width)

    # What is done.

    def program(self) -> Tensor:
        """The program, uint8 on the CPU; sets workspace_bytes."""
        self.buffers = self._buffers()
        self.means: dict[
            str, tuple[View, bool]
        ] = {}  # of a table of sums or means: their map, whether tiles leave sums
        if self.fused:
            self.workspace_bytes = 0
            n, _, h, w = self._whole("x")
            slot = self.workspace + 1
            x, out = self._map(View("x")), self._map(View(self.recipe.output))
            return _bytes((RESIDUAL_E, ResidualEParams(x, out, _packed(slot), self.type, n, h, w)))
        steps = list(self._named_steps())
        lives: dict[str, tuple[int, int]] = {}
        for i, (_, names) in enumerate(steps):
            lives |= {name: (lives.get(name, (i, i))[0], i) for name in names}
        room = {name: life for name, life in lives.items() if self.buffers[name].slot == self.workspace}
        sizes = [-(-self.buffers[name].bytes // ALIGNMENT) * ALIGNMENT for name in room]
        places, self.workspace_bytes = offsets(sizes, list(room.values()))
        for name, at in zip(room, places, strict=True):
            self.buffers[name].data = at
        parts, slot = [], self.workspace + 1
        for (number, step), _ in steps:
            if isinstance(step, recipes.Conv):
                parts.append((CONV, self._conv(number, step, slot)))
                slot += 2
            elif isinstance(step, recipes.Gate):
                parts.append((GATE, self._gate(step, slot)))
                slot += 1
            elif isinstance(step, Float8):
                parts.append((FLOAT8, self._rounding(step)))
            else:
                parts.append((SCALE, self._scale(step)))
        return _bytes(*parts)

    def _named_steps(self) -> Iterator[tuple[tuple[int, recipes.Step | Float8], list[str]]]:
        """The steps that are launched, with their number, and the buffers each uses. Means are made with their gate."""
        if self.float8:
            first = next(iter(self.recipe.inputs))
            shape = self._whole(first)
            _, c, h, w = shape
            rounded = self._rounded(View(first))
            self.buffers[rounded.buffer] = Buffer(shape, self.workspace, h * w * c, w * c, c, width=1)
            self._private("range", shape[:1], 4)
            self._private("largest", (shape[0], RANGE_SLICES), 4)
            yield (-1, Float8(View(first), rounded)), [first, rounded.buffer, "range", "largest"]
        for number, step in enumerate(self.recipe.steps):
            if isinstance(step, recipes.Mean):
                self.means[step.store] = (step.source, False)
                continue
            if isinstance(step, recipes.Gate):
                source, has_sums = self.means[step.sums]
                n, features = self._whole(source.buffer)[0], self._channels(source)
                self._private(step.store, self._whole(step.store), 4)
                self._private(f"{step.store} scratch", (n, SLICES, VECTORS, features), 4)
                partial = [f"{step.sums} partial"] if has_sums else []
                names = [source.buffer, step.store, f"{step.store} scratch", *partial]
            elif isinstance(step, (recipes.Scale, recipes.Copy)):
                names = [
                    step.source.buffer,
                    step.store.buffer,
                    *([step.scale] if isinstance(step, recipes.Scale) else []),
                ]
            else:
                sources = map(self._rounded, step.sources)
                views = [*sources, step.store, *_skips(step), *(step.modulate or ()), step.outer]
                names = [v.buffer for v in views if v is not None] + ([step.scale] if step.scale else [])
                names += ["range"] if self.float8 else []
                if step.sums is not None:
                    has_sums = self.forms[number][1].has_sums
                    self.means[step.sums] = (step.store, has_sums)
                    if has_sums:
                        n, channels, h, w = self._shape(step)
                        tiles = -(-h // SMALLEST_TILE[0]) * -(-w // SMALLEST_TILE[1])
                        self._private(f"{step.sums} partial", (n, tiles, channels), 4)
                        names.append(f"{step.sums} partial")
            yield (number, step), names

    def _shape(self, step: recipes.Conv) -> tuple[int, int, int, int]:
        whole = self._whole(step.store.buffer)
        return whole[0], self._channels(step.store), *step.store.size(whole)

    def _rounded(self, view: View) -> View:
        """What a convolution reads in the place of a view."""
        rounded = self.float8 and view.buffer in self.recipe.inputs
        return replace(view, buffer=f"{view.buffer} float8") if rounded else view

    # Structures.

    def _map(self, view: View | None) -> Map:
        if view is None:
            return NOWHERE
        b = self.buffers[view.buffer]
        first = view.start + (view.rows or (0, 0))[0] * b.row + (view.columns or (0, 0))[0] * b.pixel
        return Map(b.data + first * b.width, b.image, b.row, b.pixel, b.slot)

    def _table(self, name: str | None) -> Map:
        return NOWHERE if name is None else self._map(View(name))

    def _vector(self, *views: View | None) -> bool:
        """Whether eight channels at a multiple of eight are 16-byte aligned in all of these."""
        for view in views:
            if view is not None:
                b = self.buffers[view.buffer]
                if not (b.aligned and _eights(view.start, b.image, b.row, b.pixel)):
                    return False
        return True

    def _conv(self, number: int, step: recipes.Conv, slot: int) -> ConvParams:
        geometry, form = self.forms[number]
        n, channels, out_h, out_w = self._shape(step)
        in_h, in_w = step.sources[0].size(self._whole(step.sources[0].buffer))
        cell = form.step_out
        skips = _skips(step)
        factor, term = step.modulate or (None, None)
        written = (step.store, *skips, factor, term, step.outer)
        split = self._channels(skips[0]) if skips else 0
        partial = f"{step.sums} partial"
        sources = [self._map(self._rounded(v)) for v in step.sources]
        if self.float8:
            sources = [Map(m.data, m.image // 2, m.row // 2, m.pixel // 2, m.slot) for m in sources]
        p = ConvParams()
        p.source[:] = sources + [NOWHERE] * (MAX_SOURCES - len(sources))
        p.out, p.factor, p.term, p.outer = (self._map(v) for v in (step.store, factor, term, step.outer))
        p.skip[:] = ([self._map(v) for v in skips] + [NOWHERE] * 2)[:2]
        p.scale = self._table(step.scale)
        p.packed, p.table = _packed(slot), _packed(slot + 1)
        p.partial = self._table(partial if partial in self.buffers else None)
        p.range = self._table("range" if self.float8 else None)
        p.type, p.n, p.in_h, p.in_w, p.out_h, p.out_w = self.type, n, in_h, in_w, out_h, out_w
        p.grid_h, p.grid_w = -(-out_h // (cell * form.row_pitch)), -(-out_w // cell)
        for name in FORM_FIELDS:
            setattr(p, name, getattr(form, name))
        p.channels, p.skip_split = channels, split
        p.act, p.post_relu, p.has_bias = ACTS[step.act], step.post_relu, step.bias is not None
        p.has_pre, p.pre_relu, p.pre_count = _has_pre(step), step.pre_relu, sum(geometry.widths)
        p.scale_is_float = step.scale is not None and self.buffers[step.scale].width == 4
        p.float8_out = self.buffers[step.store.buffer].width == 1
        p.vector_in = form.whole_inputs and self._vector(*map(self._rounded, step.sources))
        p.vector_out = form.whole_outputs and split % 8 == 0 and self._vector(*written)
        p.slope = step.slope if step.act == "leaky" else 1.0
        p.gain, p.skip_gain, p.outer_gain = step.gain, step.skip_gain, step.outer_gain
        return p

    def _gate(self, step: recipes.Gate, slot: int) -> GateParams:
        source, has_sums = self.means[step.sums]
        whole = self._whole(source.buffer)
        p = GateParams(self._map(source))
        p.partial = self._table(f"{step.sums} partial" if has_sums else None)
        p.scratch, p.out = self._table(f"{step.store} scratch"), self._table(step.store)
        at = 0
        for name, t in zip(GATE_FIELDS, _gate_parameters(step), strict=True):
            setattr(p, name, NOWHERE if t is None else _packed(slot, at))
            at += 0 if t is None else 2 * t.numel()
        (p.h, p.w), p.n = source.size(whole), whole[0]
        p.type, p.features = self.type, self._channels(source)
        p.channels, p.hidden = step.up_weight.shape[0], step.down_weight.shape[0]
        return p

    def _rounding(self, step: Float8) -> Float8Params:
        maps = (self._map(step.source), self._map(step.store), self._table("largest"), self._table("range"))
        n, channels, h, w = self._whole(step.source.buffer)
        return Float8Params(*maps, n, h, w, channels)

    def _scale(self, step: recipes.Scale | recipes.Copy) -> ScaleParams:
        whole = self._whole(step.source.buffer)
        channels = self._channels(step.source)
        vector = channels % 8 == 0 and self._vector(step.source, step.store)
        gate = step.scale if isinstance(step, recipes.Scale) else None
        maps = (self._map(step.source), self._table(gate), self._map(step.store))
        return ScaleParams(*maps, self.type, whole[0], *step.source.size(whole), channels, vector)


def _eights(*numbers: int) -> bool:
    return all(n % 8 == 0 for n in numbers)


def _packed(slot: int, data: int = 0) -> Map:
    return Map(data=data, slot=slot)


def _bytes(*steps: tuple[int, ctypes.Structure]) -> Tensor:
    """Steps behind their heads: kind, and the bytes of both."""
    code = bytearray()
    for kind, body in steps:
        code += bytes((c_int32 * 2)(kind, 8 + ctypes.sizeof(body))) + bytes(body)
    return torch.frombuffer(code, dtype=torch.uint8)
