"""The base class of every network: what `load`, `create`, `upscale` and `info` ask of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsr.optimize import freeze_copy

State = Mapping[str, Tensor]

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, as EDSR and its descendants use it; RGB, for values 0..1
FLICKR2K_MEAN = (0.4690, 0.4490, 0.4036)  # of DIV2K and Flickr2K together, as RCAN's authors have it


class LoadError(ValueError):
    """A file, state dict or module that is not one of the networks, or not completely."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """What `load` made a network from. `fields` says for each field of the configuration who decided it: "file" (keys,
    shapes and what a file holds beside its tensors), "module" (an attribute of one), "hint", "assumed" (nobody said it)
    or "definition" (the network has no other value). `sha256` is that of the file which a normal form was made from."""

    source: str
    format: str
    variant: str
    fields: Mapping[str, str]
    sha256: str | None = None


class Network(nn.Module):
    """A network with the authors' parameter names and the authors' forward.

    Class attributes
        name: the network's name for `fastsr.create` and in messages.
        Config: a frozen dataclass of all sizes and constants; `self.config` is one.
        dialects: dialect name -> keys that a state dict of that dialect holds and no other network's does.
            The first dialect is the authors' own, which is the module's.
        hints: fields of Config that no file can say; `load(..., field=value)` sets them.
        fixed: fields of Config that neither a file nor a hint changes.
        colour: "rgb" or "y", what the images are (BT.601 luma as MATLAB's rgb2ycbcr gives it, scaled to value_range).
        careful: names of modules that `fastsr.optimize(dtype=torch.bfloat16)` leaves in float32 on a CPU, "" for all:
            where the network would else be less exact than torch's autocast. Winograd's F(2x2, 3x3) in bfloat16, the
            alternative, takes as long as F(4x4, 3x3) in float32.
        float_maps: in that mode the maps within operators stay float32 as well. It costs traffic, but no arithmetic.
        float8_parts: names of modules whose blocks (modules with an attribute `float8`) may multiply in e4m3: where it
            costs at most 0.1 dB on trained weights. `fastsr.optimize(dtype=torch.float8_e4m3fn)` makes them do so.
        split: a part of the network has to see the whole image: it is `local_part` of `global_part`.

    `origin` is what `load` made it from; None for a network that was created.
    Networks that upscale images have `scales` and `value_range`; for the others (discriminators, feature networks)
    `scales` is empty.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    dialects: ClassVar[dict[str, tuple[str, ...]]]
    hints: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[tuple[str, ...]] = ()
    colour: ClassVar[str] = "rgb"
    careful: ClassVar[tuple[str, ...]] = ()
    float_maps: ClassVar[bool] = False
    float8_parts: ClassVar[tuple[str, ...]] = ()
    split: ClassVar[bool] = False
    origin: Origin | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        freeze_copy(self)

    # What a checkpoint is.

    @classmethod
    def detect(cls, state: State) -> str | None:
        """The dialect whose keys the state dict holds, or None if it is another network's."""
        return next((d for d, keys in cls.dialects.items() if all(k in state for k in keys)), None)

    @classmethod
    def convert(cls, state: State, dialect: str) -> State:
        """The state dict under the module's own keys. `dialect` is what `detect` returned."""
        return state

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> Any:
        """The Config that fits a converted state dict; `hints` holds only names listed in `cls.hints`."""
        raise TypeError(f"{cls.__name__} does not define config_from")

    @classmethod
    def hints_of(cls, module: nn.Module) -> dict[str, Any]:
        """What a module's attributes say of `hints`: the first number of that name in it or its submodules."""
        if isinstance(module, Network):
            return {h: getattr(module.config, h) for h in cls.hints if hasattr(module.config, h)}
        found = {h: [getattr(m, h, None) for m in module.modules()] for h in cls.hints}
        numbers = {h: [v for v in values if isinstance(v, (int, float))] for h, values in found.items()}
        return {h: values[0] for h, values in numbers.items() if values}

    # What it does with images.

    @property
    def scales(self) -> tuple[int, ...]:
        """The factors this network upscales by; empty if it does not upscale images."""
        return ()

    @property
    def value_range(self) -> tuple[float, float]:
        """Black and white at the network's input and output."""
        return 0.0, 1.0

    def super_resolve(self, x: Tensor, scale: int) -> Tensor:
        """Upscales images: (N, C, H, W) in `value_range` to exactly (N, C, H * scale, W * scale), for any H and W >= 1.

        The network's own call is the authors' forward; this one also does what their scripts do around it
        (interpolating first, padding to a multiple, completing a border).
        """
        return self(x)

    @property
    def multiple(self) -> int:
        """The side of the cells that `super_resolve` folds into channels; parts of an image begin at its multiples."""
        return 1

    def global_part(self, x: Tensor) -> Tensor:
        """Of a network that is `split`, all that depends on every pixel of the image, as averages over it do:
        x as in `super_resolve` -> (N, F, ceil(H / multiple), ceil(W / multiple))."""
        raise NotImplementedError(f"{type(self).__name__} is not split")

    def local_part(self, features: Tensor, scale: int) -> Tensor:
        """Of a network that is `split`, the rest, which sees no further than a few pixels: the result of `global_part`,
        or a part cut out of it, enlarged `multiple * scale` times."""
        raise NotImplementedError(f"{type(self).__name__} is not split")

    @property
    def parameter_count(self) -> int:
        """The number of parameters, frozen ones included, buffers not."""
        return sum(p.numel() for p in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def summary(self) -> str:
        """One line: the class, every field of the configuration, the parameter count."""
        fields = ", ".join(f"{f.name}={getattr(self.config, f.name)!r}" for f in dataclasses.fields(self.config))
        return f"{type(self).__name__}({fields}): {self.parameter_count:,} parameters"

    def extra_repr(self) -> str:
        """The configuration that was built or read from the file."""
        return self.summary()


def indices(state: State, prefix: str) -> list[int]:
    """The numbers n for which a key starts with `<prefix>.<n>.`, sorted; for counting blocks."""
    found = {key[len(prefix) + 1 :].split(".", 1)[0] for key in state if key.startswith(prefix + ".")}
    return sorted(int(n) for n in found if n.isdigit())


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pads (N, C, H, W) below and to the right to multiples, mirroring the image, or repeating its last row or column
    where it has too few to mirror."""
    down, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    if down:
        x = F.pad(x, (0, 0, 0, down), "reflect" if down < x.shape[-2] else "replicate")
    if right:
        x = F.pad(x, (0, right, 0, 0), "reflect" if right < x.shape[-1] else "replicate")
    return x


def upsampler_scale(state: State, prefix: str, features: int) -> int:
    """The scale of an EDSR upsampler (`fastsr.nn.upsampler`) whose keys start with `prefix`."""
    steps = indices(state, prefix)
    ninefold = bool(steps) and state[f"{prefix}.{steps[0]}.weight"].shape[0] == 9 * features
    return 3 if ninefold else 2 ** len(steps)


def colour_shift(state: State, rgb_range: float = 255.0) -> tuple[tuple[float, ...], float]:
    """(mean, value range) behind `sub_mean.bias` = -range * mean, as EDSR's descendants hold it.

    The product alone is in the file. Its factors are told by the known means; for another mean, `rgb_range` is taken.
    """
    product = -state["sub_mean.bias"].cpu().double()
    for mean in (RGB_MEAN, FLICKR2K_MEAN):
        if len(mean) == len(product):
            ratio = product / torch.tensor(mean, dtype=torch.float64)
            spread = (ratio.max() - ratio.min()).item()
            if ratio.min() > 0 and spread <= 2e-3 * ratio.max().item():  # half-precision files are known too
                average = ratio.mean().item()
                whole = abs(round(average) - average) <= 2e-3 * average
                return mean, float(round(average) if whole else f"{average:.6g}")
    return tuple((product / rgb_range).tolist()), float(rgb_range)
