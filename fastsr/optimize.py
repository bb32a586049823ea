"""`fastsr.optimize`: the frozen inference form of a module."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastsr import _cuda_engine, packing
from fastsr import tune as tuning
from fastsr.graphs import attach

Module = TypeVar("Module", bound=nn.Module)

_given = threading.local()  # .dtypes: those given to the calls that this thread is in, innermost first, in pairs


class Door:
    """The hooks of a frozen module: what comes in is cast to the parameters' dtype, what goes out to the dtype that
    came in, and the parameters of a copy are frozen like those that were copied."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None  # of a module without parameters
        self.products = "float32"
        self.keep_weights = True
        self.tune = False
        self.released = False
        self.owner: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.needs_weights()
        return self.__dict__ | {"owner": None}

    def needs_weights(self, *args: Any) -> None:
        """Raises RuntimeError if the weights are gone; the hook of `state_dict` and `load_state_dict`."""
        if self.released:
            raise RuntimeError(
                "optimize(keep_weights=False) gave the weights up after the first call: this module cannot be saved, "
                "loaded or copied; use the original, or optimize with keep_weights=True"
            )

    def freeze(self, module: nn.Module) -> None:
        """Freezes the module's tensors; the module is the one that has the hooks."""
        products = self.products
        if products == "bfloat16" and getattr(module, "float_maps", False):
            products = "bfloat16 of float32"
        packing.freeze([*module.parameters(), *module.buffers()], products, not self.keep_weights)
        if self.products == "bfloat16":
            for name in getattr(module, "careful", ()):
                packing.freeze([*module.get_submodule(name).parameters()], "float32", not self.keep_weights)
        self.owner = weakref.ref(module)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The forward pre-hook."""
        if not torch.compiler.is_compiling() and (self.owner is None or self.owner() is not module):
            self.freeze(module)
        first = next(_floating((args, kwargs)), None)
        _given.dtypes = (None if first is None else first.dtype, getattr(_given, "dtypes", None))
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), self.dtype)
        args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
        if self.tune and first is not None and not torch.compiler.is_compiling():
            tuning.tune(lambda: module.forward(*args, **kwargs), first.device, again=False)
            self.tune = False
        return args, kwargs

    def leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        """The forward hook, called after exceptions too."""
        dtype, _given.dtypes = _given.dtypes
        if not self.keep_weights and not self.released and result is not None:
            packing.release(module.parameters())
            self.released = True
        return _cast(result, dtype)


def _floating(value: Any):
    """The floating-point tensors among arguments or results."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif type(value) in (tuple, list, dict):
        for v in value.values() if type(value) is dict else value:
            yield from _floating(v)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """The same with its floating-point tensors of another dtype."""
    if type(value) in (tuple, list):
        return type(value)(_cast(v, dtype) for v in value)
    if type(value) is dict:
        return {k: _cast(v, dtype) for k, v in value.items()}
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating and dtype is not None else value


def optimize(
    model: Module,
    *,
    dtype: torch.dtype | None = None,
    keep_weights: bool = True,
    graphs: bool = True,
    tune: bool = False,
) -> Module:
    """A new frozen module for inference: same class, same call, same parameter names; the argument is untouched.

    The result is in evaluation mode, its parameters need no gradients, and its weights are packed once, for each kind
    of image size that needs its own. It computes in `dtype` (torch.float32, float16, bfloat16 or float64; None keeps
    the model's) and takes floating-point tensors of any dtype; what it returns has the dtype of the first one given.

    On a CPU, bfloat16 is a mode: parameters and the maps between operators stay float32, convolutions multiply in
    bfloat16 and sum in float32, but for those from or to at most four channels, a network's first and last, and layers
    that the network names (`Network.careful`). Maps within an operator are bfloat16 then, unless the network says
    otherwise (`Network.float_maps`). Without the kernels for it, or on a processor without AVX512-BF16, it computes in
    float32.

    torch.float8_e4m3fn is for GPUs of compute capability 9.0 and the networks that name what bears it
    (`Network.float8_parts`: the dense blocks of ESRGAN and RDN). Convolutions there multiply in eight bits and sum in
    float32; parameters, all other convolutions and the maps between operators are bfloat16. Scales follow each image.

    To change weights afterwards use `load_state_dict`; packed weights do not follow `p.data.mul_()` or a write through
    NumPy. Changing the original's weights does not change the result's.

    keep_weights=False saves memory on a CPU: after the first call, weights that were packed in it are given up. Then
    `state_dict`, `load_state_dict`, copying and pickling raise RuntimeError, and what is not computed by packed weights
    (under `fastsr.use("eager")`, say) becomes NaN. The first call must not be made by several threads at once.

    On a CUDA device, calls that come again are replayed as CUDA graphs, with the same results; `fastsr.graphs` has the
    rules, and `fastsr.graphs.report` says what became of each kind of call. graphs=False is for a module whose forward
    keeps something between calls, or to save the memory that graphs hold.

    tune=True measures on a GPU, during the first call and with what it is given, which kernels are fastest here, eager
    ones among them; calls of other image sizes use what was found. It takes a minute, shown by a bar where stderr is a
    terminal, and is remembered in the user's cache directory, so that a later program has nothing left to measure (see
    `fastsr.tune`). Raises ValueError for a model on a CPU, whose kernels need no tuning.

    Raises TypeError for anything but a module or a floating dtype, ValueError where torch.float8_e4m3fn is not for the
    network or its device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: expected model to be a torch.nn.Module; got {type(model).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"optimize: expected dtype to be a floating-point dtype; got {dtype}")
    if tune and any(p.device.type == "cpu" for p in model.parameters()):
        raise ValueError("optimize: tune=True measures kernels of a GPU; got a model on the CPU: move it, or omit tune")
    float8 = dtype == torch.float8_e4m3fn
    if float8:
        _check_float8(model)
        dtype = torch.bfloat16
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype is not None:
        use_float8(frozen, float8)
    parameters = [p for p in frozen.parameters() if p.is_floating_point()]
    mode = dtype == torch.bfloat16 and all(p.device.type == "cpu" for p in parameters)
    if dtype is not None:
        frozen = frozen.to(torch.float32 if mode else dtype)
    for p in frozen.parameters():
        if p.dim() == 4:
            p.data = _channels_last(p.data)
    door = _door(frozen)
    if door is None:
        door = Door()
        frozen.register_forward_pre_hook(door.enter, with_kwargs=True)
        frozen.register_forward_hook(door.leave, with_kwargs=True, always_call=True)
        frozen.register_state_dict_pre_hook(door.needs_weights)
        frozen.register_load_state_dict_pre_hook(door.needs_weights)
    door.dtype = torch.float32 if mode else dtype
    door.products = "bfloat16" if mode else "float32"
    door.keep_weights = keep_weights
    door.tune = tune
    door.freeze(frozen)
    attach(frozen, graphs)
    return frozen


def use_float8(model: nn.Module, on: bool) -> None:
    """Makes the blocks in a network's `float8_parts` multiply in e4m3, or no longer."""
    for name in getattr(model, "float8_parts", ()):
        for block in model.get_submodule(name).modules():
            if hasattr(block, "float8"):
                block.float8 = on


def _check_float8(model: nn.Module) -> None:
    """Raises ValueError unless a network multiplies in e4m3 where it is."""
    name, instead = f"dtype=float8_e4m3fn; got {type(model).__name__}", "use dtype=torch.bfloat16"
    parts = [model.get_submodule(part) for part in getattr(model, "float8_parts", ())]
    if not parts:
        raise ValueError(f"optimize: expected a network with float8_parts for {name}; {instead}")
    weights = [p for part in parts for p in part.parameters() if p.dim() == 4]
    narrow = next((w for w in weights if w.shape[0] % 32 or w.shape[1] % 32), None)
    if narrow is not None:
        raise ValueError(
            f"optimize: expected dense blocks of multiples of 32 channels for {name} with a convolution "
            f"{narrow.shape[1]} -> {narrow.shape[0]}; {instead}"
        )
    why = _cuda_engine.float8_missing(weights[0].device)
    if why is not None:
        raise ValueError(
            f"optimize: expected a model on a GPU of compute capability 9.0 for {name}: {why}; "
            f"move it there, or {instead}"
        )


def freeze_copy(module: nn.Module) -> None:
    """Freezes the parameters of a copy of a frozen module; does nothing to other modules."""
    door = _door(module)
    if door is not None:
        door.freeze(module)


def _door(module: nn.Module) -> Door | None:
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Door)), None)


def _channels_last(weight: Tensor) -> Tensor:
    """The weight in the layout that asks `conv_act` for a channels-last result. It is written out because torch takes
    both layouts of one channel for the same, and copies nothing."""
    _, c, h, w = weight.shape
    strides = (c * h * w, 1, c * w, c)
    return torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device).copy_(weight)
