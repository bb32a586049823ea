"""Operators on NVIDIA GPUs by Triton: recipes walked step by step, every convolution one launch.

Nothing is compiled when fastsr is installed; Triton compiles a kernel when a plan first runs it and keeps it on disk.

* Maps are read and written where they lie if their pixels hold their channels side by side (channels-last, slices of
  its channels included). Others, contiguous images above all, are copied to that form, and results out of it.
* Concatenations and dense blocks live in one workspace; nothing is copied to make one.
* Products: float16 and bfloat16 as such with float32 sums; float32 in TF32 where torch lets convolutions use it
  (`torch.backends.cudnn.allow_tf32`), else in float32. Gates and sums are float32.
* Under `torch.use_deterministic_algorithms(True)` sums are added in a fixed order.

`advice` is the rule by which a GPU's own library is preferred, where no measurement decides.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsr import _tables, packing
from fastsr._tables import Identity
from fastsr.op import Op, _tensors
from fastsr.ops.linear_tail import merge, shuffles_of, unmergeable
from fastsr.ops.resize_bicubic import centred_taps, tf1_taps
from fastsr.recipes import Conv, Copy, Gate, Mean, Recipe

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MINIMUM_CAPABILITY = (8, 0)
INTERPRETED = "TRITON_INTERPRET"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: for tests, a thousand times slower."""
    return os.environ.get(INTERPRETED) == "1"


@functools.cache
def _load() -> str | None:
    """Imports the kernels. Returns why it cannot, or None."""
    # Triton 3.9 warns that multiply-adds will no longer be fused unless asked for.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        _find_kernels()
        import fastsr.kernels.conv  # noqa: F401
    except ImportError as error:
        if (error.name or "").split(".")[0] == "triton":
            return "Triton is not installed (pip install triton; it exists for Linux)"
        return f"fastsr.kernels does not load: {error}; install fastsr"
    return None


def _find_kernels() -> None:
    """Makes fastsr.kernels importable from a checkout that is not installed, where kernels/ stands beside fastsr/."""
    folder = Path(__file__).parents[1] / "kernels"
    if importlib.util.find_spec("fastsr.kernels") is None and (folder / "conv.py").is_file():
        spec = importlib.util.spec_from_file_location(
            "fastsr.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        package = sys.modules["fastsr.kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
        sys.modules["fastsr"].kernels = package  # type: ignore[attr-defined]


def missing() -> str | None:
    """Why no operator can use the Triton kernels here, or None."""
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA device"
    return _load()


def reason(op: Op, *args: Any) -> str | None:
    """Why the engine cannot compute these arguments, or None."""
    tensors = _tensors(args)
    first = tensors[0]
    if first.device.type != ("cpu" if interpreted() else "cuda"):
        return f"the tensors are on {first.device}; Triton kernels need a CUDA device"
    if first.dtype not in DTYPES:
        return f"dtype={first.dtype} (needs float16, bfloat16 or float32)"
    if any(t.numel() == 0 for t in tensors):
        return "a tensor is empty"
    if not interpreted():
        capability = torch.cuda.get_device_capability(first.device)
        if capability < MINIMUM_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]} (needs 8.0)"
    if op.recipe_of is None:
        return None
    from fastsr.kernels.conv import refuses

    recipe = op.recipe_of(*args)
    if recipe.float8:
        return "float8 products are made by the CUDA kernels alone"
    for step in recipe.steps:
        if isinstance(step, Conv):
            why = refuses(step.weight, step.stride, step.groups, step.transposed, step.upsample, step.shuffle,
                          step.shuffle_order)  # fmt: skip
            if why:
                return why
    return None


def advice(op: Op, *args: Any) -> str | None:
    """Why another backend is expected to be faster for arguments that this one could compute; None if none is.

    Measured times (`_tables`) decide first. The rule without them: fused kernels where they save
    a pass over memory or the library has no good kernel, which is every block, and every convolution with an
    activation, a sum, several inputs, groups, a prologue, upsampling, or a depth-to-space store; the library's
    convolution elsewhere.
    """
    if interpreted():
        return "Triton's interpreter is for tests"
    tensors = _tensors(args)
    first = tensors[0]
    found = measured(op, args)
    if found is not None:
        times, path = found
        if "triton" not in times:
            return f"failed, or gave a wrong result, when it was measured ({path})"
        slower = times["triton"] > times["eager"]
        return f"measured: {times['triton']:.1f} us, eager {times['eager']:.1f} us ({path})" if slower else None
    image = next(t for t in tensors if t.dim() == 4)
    if image.shape[1] > 4 and image.stride(1) != 1:
        return "channels are not side by side, and a copy costs more than is saved: use channels_last"
    if first.dtype == torch.float32 and precision(first) == "ieee":
        return "float32 products without TF32 are bound by arithmetic, which the library does better"
    if op.name != "conv_act":
        return None
    (step,) = op.recipe_of(*args).steps  # type: ignore[misc]
    saves = (
        step.act != "none" or step.gain != 1 or step.scale is not None or step.skip is not None or step.post_relu
        or step.shuffle > 1 or step.upsample > 1 or step.groups > 1 or len(step.sources) > 1
        or step.pre_scale is not None or step.pre_shift is not None or step.pre_relu or step.transposed
    )  # fmt: skip
    return None if saves else "a convolution alone: fusing saves no pass over memory"


def precision(t: Tensor) -> str:
    """ "tf32" or "ieee": how float32 products are to be made, by torch's own switch for convolutions."""
    if t.dtype != torch.float32:
        return "ieee"
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32" else "ieee"


# Measurements.


def identity(device: torch.device) -> Identity:
    """A CUDA device as tables of measurements know it; the interpreter's is "interpreter"."""
    return Identity("interpreter", "interpreter") if interpreted() else _gpu(device)


@functools.cache
def _gpu(device: torch.device) -> Identity:
    major, minor = torch.cuda.get_device_capability(device)
    return Identity(torch.cuda.get_device_name(device), f"sm{major}{minor}")


def choice_key(op: Op, args: Sequence[Any]) -> str:
    """The name under which measured times are kept: operator, dtype, whether the map is small (at most 2^17 pixels in
    all) or large, its layout, channels of the images, shapes of the parameters, scalars; not the size of the image."""
    first = _tensors(args)[0]
    images = list(op.recipe_of(*args).inputs.values()) if op.recipe_of is not None else [first]

    def word(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"c{value.shape[1]}" if any(value is t for t in images) else "x".join(map(str, value.shape))
        if isinstance(value, (list, tuple)):
            return "+".join(map(word, value)) or "-"
        return "-" if value is None else str(value)

    args = (first, *args[3:]) if op.name == "resize_bicubic" else args  # without height and width
    dtype = str(first.dtype).removeprefix("torch.") + (f" {precision(first)}" if first.dtype == torch.float32 else "")
    size = "small" if first.shape[0] * first.shape[2] * first.shape[3] <= 2**17 else "large"
    layout = "channels_last" if first.shape[1] == 1 or first.stride(1) == 1 else "strided"
    return " ".join([op.name, dtype, size, layout, *map(word, args)])


def measured(op: Op, args: Sequence[Any]) -> tuple[dict[str, float], Path] | None:
    """Microseconds of each backend for such arguments, and the file that says so; None if nothing does."""
    return _tables.times(identity(_tensors(args)[0].device), choice_key(op, args))


def summary() -> str:
    """One line for people: whether Triton's kernels run here."""
    why = missing()
    if why is not None:
        return why
    return f"interpreted on the CPU ({INTERPRETED}=1), for tests" if interpreted() else "compiles at first use"


# Running.


def run(op: Op, out: Tensor, *args: Any) -> None:
    """Computes one operator call into `out`: by a kernel made for the operator where there is one and it can, else step
    by step."""
    special = {"resize_bicubic": _resize, "residual_e": _residual_e, "linear_tail": _linear_tail}.get(op.name)
    if special is None or not special(out, *args):
        assert op.recipe_of is not None
        run_recipe(op.recipe_of(*args), out)


def run_recipe(recipe: Recipe, out: Tensor) -> None:
    """Runs a recipe's steps on the current stream; `out` becomes its output."""
    from fastsr.kernels import channel_attention
    from fastsr.kernels.launch import as_pixels, pixels

    like = next(iter(recipe.inputs.values()))
    buffers = {name: as_pixels(t).tensor if t.dim() == 4 else t.float() for name, t in recipe.inputs.items()}
    made_here = {step.sums for step in recipe.steps if isinstance(step, Conv)}
    made_here |= {step.store for step in recipe.steps if isinstance(step, (Gate, Mean))}
    for name, shape in recipe.workspace.items():
        if name == recipe.output and pixels(out) is not None:
            buffers[name] = out
        elif name not in made_here:
            buffers[name] = _image(like, shape)
    for step in recipe.steps:
        if isinstance(step, Conv):
            _conv(step, buffers)
        elif isinstance(step, Mean):
            source = step.source.of(buffers)
            slots = channel_attention.sum_tiles(source) if torch.are_deterministic_algorithms_enabled() else 1
            sums = torch.zeros(source.shape[0], slots, source.shape[1], dtype=torch.float32, device=source.device)
            channel_attention.prepare_sums(sums, source).run()
            buffers[step.store] = sums.sum(1)
        elif isinstance(step, Gate):
            sums = buffers[step.sums]
            gate = torch.empty(sums.shape[0], step.up_weight.shape[0], dtype=torch.float32, device=sums.device)
            channel_attention.prepare_gate(
                gate, sums, step.pixels, step.weight, step.bias, step.down_weight, step.down_bias, step.up_weight,
                step.up_bias,
            ).run()  # fmt: skip
            buffers[step.store] = gate
        elif isinstance(step, Copy):
            step.store.of(buffers).copy_(step.source.of(buffers))
        else:
            channel_attention.prepare_scale(step.store.of(buffers), step.source.of(buffers), buffers[step.scale]).run()
    if buffers[recipe.output] is not out:
        out.copy_(buffers[recipe.output])


def _conv(step: Conv, buffers: dict[str, Tensor]) -> None:
    from fastsr.kernels import conv

    out = step.store.of(buffers)
    form = (step.stride, step.padding, step.groups, step.transposed, step.upsample)
    packed = packing.kept(("triton", form), (step.weight,), lambda: conv.pack(step.weight, *form))
    skips = step.skip if isinstance(step.skip, tuple) else () if step.skip is None else (step.skip,)
    sums = None
    if step.sums is not None:
        n, channels, height, width = out.shape
        slots = conv.sum_slots(height, width) if torch.are_deterministic_algorithms_enabled() else 1
        sums = torch.zeros(n, slots, 9, channels, dtype=torch.float32, device=out.device)
    device = identity(out.device)
    conv.prepare(
        out, [v.of(buffers) for v in step.sources], step.weight, step.bias, stride=step.stride, padding=step.padding,
        groups=step.groups, transposed=step.transposed, pre_scale=step.pre_scale, pre_shift=step.pre_shift,
        pre_relu=step.pre_relu, upsample=step.upsample, act=step.act, slope=step.slope, prelu=step.prelu,
        gain=step.gain, scale=None if step.scale is None else buffers[step.scale],
        skips=[v.of(buffers) for v in skips], skip_gain=step.skip_gain, post_relu=step.post_relu,
        shuffle=step.shuffle, shuffle_order=step.shuffle_order, sums=sums,
        modulate=None if step.modulate is None else (step.modulate[0].of(buffers), step.modulate[1].of(buffers)),
        outer=None if step.outer is None else step.outer.of(buffers), outer_gain=step.outer_gain,
        precision=precision(out), packed=packed,
        configure=lambda shape: _tables.config(device, conv, shape),
    ).run()  # fmt: skip
    if sums is not None and step.sums is not None:
        buffers[step.sums] = sums.sum(1)


def _image(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _residual_e(out: Tensor, x: Tensor, *weights_and_groups: Any) -> bool:
    """The unit in one kernel; False where a program could not hold its channels."""
    from fastsr.kernels import residual_e
    from fastsr.kernels.launch import pixels

    if residual_e.refuses(x.shape[1], weights_and_groups[-1]):
        return False
    result = out if pixels(out) is not None else _image(out, out.shape)
    residual_e.prepare(
        result, x, *weights_and_groups, precision=precision(x),
        configure=lambda shape: _tables.config(identity(x.device), residual_e, shape),
    ).run()  # fmt: skip
    if result is not out:
        out.copy_(result)
    return True


def _linear_tail(out: Tensor, x: Tensor, weights: list[Tensor], biases: list[Tensor], gain: float) -> bool:
    """All layers as one convolution and one launch; False where they cannot be merged, or would have to be in every
    call, as weights that are not frozen would."""
    from fastsr.kernels import conv
    from fastsr.kernels.launch import pixels

    given = [*weights, *biases]
    if unmergeable(x, weights) is not None or any(packing.frozen(t) is None for t in given):
        return False

    def merged() -> tuple[Tensor, Tensor | None]:
        kernels, bias = merge(weights, biases)
        kernels = kernels.flatten(0, 1).permute(0, 1, 3, 4, 2).to(x.dtype).contiguous()
        return kernels, None if bias is None else bias.flatten(0, 1)

    packed, bias = packing.kept(("triton merged", len(weights)), given, merged)
    _, outputs, taps, _, channels = packed.shape
    like = torch.empty(outputs, channels, taps, taps, dtype=x.dtype, device="meta")
    scale, device = math.prod(shuffles_of(weights)), identity(x.device)
    result = out if pixels(out) is not None else _image(out, out.shape)
    conv.prepare(
        result, [x], like, bias, padding=taps // 2, gain=gain, shuffle=scale, precision=precision(x), packed=packed,
        framed=True, configure=lambda shape: _tables.config(device, conv, shape),
    ).run()  # fmt: skip
    if result is not out:
        out.copy_(result)
    return True


FEW_TAPS = 64  # of a sample: up to here one pass reads less than two


def _resize(out: Tensor, x: Tensor, height: int, width: int, scale_y: float, scale_x: float, method: str) -> bool:
    from fastsr.kernels import resize_bicubic

    rows = packing.used(_taps(x.shape[2], height, scale_y, method, x.device))
    columns = packing.used(_taps(x.shape[3], width, scale_x, method, x.device))
    if rows[0].shape[0] * columns[0].shape[0] <= FEW_TAPS:
        resize_bicubic.prepare(out, x, rows, columns).run()
        return True
    n, c, h, w = x.shape
    if height / h <= width / w:  # the axis that shrinks most first
        shape, first, second = (n, c, height, w), (rows, _identity(w, x.device)), (_identity(height, x.device), columns)
    else:
        shape, first, second = (n, c, h, width), (_identity(h, x.device), columns), (rows, _identity(width, x.device))
    packing.used((first, second))
    last = torch.channels_last if out.stride(1) == 1 else torch.contiguous_format
    between = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=last)
    resize_bicubic.prepare(between, x, *first).run()
    resize_bicubic.prepare(out, between, *second).run()
    return True


@functools.lru_cache(maxsize=64)
def _taps(size: int, count: int, scale: float, method: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The taps of one axis on the device."""
    position, weight = (centred_taps if method == "matlab" else tf1_taps)(size, count, scale)
    with torch.inference_mode(False):
        return torch.from_numpy(position).int().to(device), torch.from_numpy(weight).float().to(device)


@functools.lru_cache(maxsize=16)
def _identity(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Taps that leave an axis as it is."""
    with torch.inference_mode(False):
        return torch.arange(size, dtype=torch.int32, device=device)[None], torch.ones(1, size, device=device)
