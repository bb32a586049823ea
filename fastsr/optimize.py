"""`fastsr.optimize`: the frozen inference form of a module."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class _CastInputs:
    """Forward pre-hook: floating-point tensors, also in tuples and lists, arrive in the dtype that the module's
    parameters have by then, or in the one given for a module without any."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), self.dtype)

        def cast(value: Any) -> Any:
            if type(value) in (tuple, list):
                return type(value)(cast(v) for v in value)
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return cast(args), {k: cast(v) for k, v in kwargs.items()}


def optimize(model: Module, *, dtype: torch.dtype | None = None) -> Module:
    """A new frozen module for inference: same class, same call, same parameter names; the argument is untouched.

    The result is in evaluation mode, its parameters need no gradients, and its call casts floating-point inputs to
    `dtype` (torch.float32, float16, bfloat16 or float64; None keeps the model's), which is the dtype of what it
    returns. Changing the original's weights afterwards does not change the result's. Raises TypeError for anything
    but a module or a floating dtype.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: expected model to be a torch.nn.Module; got {type(model).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"optimize: expected dtype to be a floating-point dtype; got {dtype}")
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype is not None:
        frozen = frozen.to(dtype)
        frozen.register_forward_pre_hook(_CastInputs(dtype), with_kwargs=True)
    return frozen
