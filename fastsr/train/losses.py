"""The losses a configuration can name. Every one is a module in the registry `LOSSES`; the trainer knows none of them.

A loss that learns (an adversarial one, with its discriminator and that one's optimiser) overrides `prepare`, which the
trainer calls before each update of the network, clears its gradients there, which the network's update leaves behind,
and keeps its optimiser's state by `get_extra_state` and `set_extra_state`; parameters and buffers are in the checkpoint
anyway. One that needs a feature network (a perceptual
one) loads it in its constructor from a file named in its settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Loss(nn.Module):
    """The base of all losses. Images: (N, C, H, W), float32, black 0 and white 1 whatever the network's own range is,
    C as the network's, results not clipped."""

    def prepare(self, result: Tensor, target: Tensor, step: int) -> None:
        """Called before the network's update with its detached result; here a discriminator learns."""

    def forward(self, result: Tensor, target: Tensor) -> Tensor:
        """The scalar to be made small."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")


LOSSES: dict[str, Callable[..., Loss]] = {}
"""Loss by name; called with the settings of its entry in the configuration."""

L = TypeVar("L", bound=type[Loss])


def register(name: str) -> Callable[[L], L]:
    """Decorator that adds a loss under a name. Raises ValueError if that is taken."""

    def add(loss: L) -> L:
        if name in LOSSES:
            raise ValueError(f"register: the loss {name!r} exists already: {LOSSES[name]}")
        LOSSES[name] = loss
        return loss

    return add


@register("l1")
class L1(Loss):
    """Mean absolute error."""

    def forward(self, result: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(result, target)


@register("l2")
class L2(Loss):
    """Mean squared error."""

    def forward(self, result: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(result, target)


@register("charbonnier")
class Charbonnier(Loss):
    """Mean of sqrt(error^2 + epsilon^2), an absolute error that is smooth at zero (Charbonnier et al., ICIP 1994)."""

    def __init__(self, epsilon: float = 1e-3) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, result: Tensor, target: Tensor) -> Tensor:
        return ((result - target).square() + self.epsilon**2).sqrt().mean()


class WeightedLosses(Loss):
    """The sum of a configuration's losses, each times its weight. `parts` holds them, named in order: "l1", ... ."""

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        for entry in entries:
            settings = dict(entry)
            name, weight = settings.pop("name"), settings.pop("weight", 1.0)
            if name not in LOSSES:
                raise ValueError(f"losses: expected names among {', '.join(LOSSES)}; got {name!r}")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise ValueError(f"losses: {name}: expected weight to be a number; got {weight!r}")
            if name in self.parts:
                raise ValueError(f"losses: {name!r} is listed twice; add up its weights")
            try:
                self.parts[name] = LOSSES[name](**settings)
            except TypeError as error:
                raise ValueError(f"losses: {name}: {error}") from error
            self.weights[name] = float(weight)

    def prepare(self, result: Tensor, target: Tensor, step: int) -> None:
        for part in self.parts.values():
            part.prepare(result, target, step)

    def forward(self, result: Tensor, target: Tensor) -> Tensor:
        terms = [self.weights[name] * part(result, target) for name, part in self.parts.items()]
        return torch.stack(terms).sum()
