"""CARN and CARN-M: Fast, Accurate, and Lightweight Super-Resolution with Cascading Residual Network.

N. Ahn, B. Kang, K.-A. Sohn, ECCV 2018. Weights: nmhkahn/CARN-pytorch (MIT). Input and output: RGB in 0..1.
Tested variants: CARN and CARN-M, single scale and x2/x3/x4 in one file, grouped upsamplers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastsr.models.network import RGB_MEAN, Network, State
from fastsr.nn import ConvAct, MeanShift, fused, numbered
from fastsr.ops import res_block, residual_e


@dataclass(frozen=True)
class CARNConfig:
    """scales: one, or several with a head each. group: of CARN-M's residual-E units and of the upsamplers."""

    scales: tuple[int, ...] = (2, 3, 4)
    multi_scale: bool = True
    group: int = 1
    mobile: bool = False
    features: int = 64
    mean: tuple[float, float, float] = RGB_MEAN

    def __post_init__(self) -> None:
        wrong = [s for s in self.scales if s not in (2, 3, 4)]
        if wrong or not self.scales or (len(self.scales) > 1 and not self.multi_scale):
            raise ValueError(f"carn: expected scales out of 2, 3, 4 (several only with multi_scale); got {self.scales}")
        if min(self.features, self.group) < 1 or self.features % self.group:
            raise ValueError(f"carn: expected features to be a multiple of group, both at least 1; got {self}")


class ResidualUnit(nn.Module):
    """relu(x + conv(relu(conv(x))))."""

    def __init__(self, config: CARNConfig) -> None:
        super().__init__()
        f = config.features
        self.body = numbered({0: ConvAct(f, f, act="relu"), 2: ConvAct(f, f)})

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.body.values()
        return res_block(x, first.weight, first.bias, second.weight, second.bias, act="relu", post_relu=True)


class ResidualE(nn.Module):
    """relu(x + conv1x1(relu(grouped(relu(grouped(x)))))): CARN-M's efficient residual unit."""

    def __init__(self, config: CARNConfig) -> None:
        super().__init__()
        f, g = config.features, config.group
        self.body = numbered({0: ConvAct(f, f, groups=g, act="relu"), 2: ConvAct(f, f, groups=g, act="relu"),
                              4: ConvAct(f, f, 1)})  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.body.values()
        return residual_e(x, a.weight, a.bias, b.weight, b.bias, c.weight, c.bias, a.groups)


class Fusion(nn.Module):
    """The 1x1 convolution and ReLU over a cascade's concatenation."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = numbered({0: ConvAct(in_channels, out_channels, 1, act="relu")})

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.body["0"](*inputs)


class Cascade(nn.Module):
    """Three units, each fed by a fusion of the input and all results so far; CARN's block and its whole trunk."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (Fusion(features * (n + 1), features) for n in (1, 2, 3))

    def cascade(self, x: Tensor, units: tuple[nn.Module, nn.Module, nn.Module]) -> Tensor:
        """c3([x, r1, r2, r3]) where r1 = units[0](x), r2 = units[1](c1([x, r1])), r3 = units[2](c2([x, r1, r2]))."""
        r1 = units[0](x)
        r2 = units[1](self.c1(x, r1))
        r3 = units[2](self.c2(x, r1, r2))
        return self.c3(x, r1, r2, r3)


class Block(Cascade):
    """A cascading block. CARN-M applies one residual-E unit three times; CARN has three residual units."""

    def __init__(self, config: CARNConfig) -> None:
        super().__init__(config.features)
        self.b1: nn.Module = ResidualE(config) if config.mobile else ResidualUnit(config)
        if not config.mobile:
            self.b2, self.b3 = ResidualUnit(config), ResidualUnit(config)

    def forward(self, x: Tensor) -> Tensor:
        units = (self.b1, self.b2, self.b3) if hasattr(self, "b2") else (self.b1, self.b1, self.b1)
        return self.cascade(x, units)


class Upsampler(nn.Module):
    """conv, ReLU, PixelShuffle: once for x2 and x3, twice for x4."""

    def __init__(self, config: CARNConfig, scale: int) -> None:
        super().__init__()
        f, r = config.features, 3 if scale == 3 else 2
        steps = [3 * i for i in range(2 if scale == 4 else 1)]
        self.body = numbered({i: ConvAct(f, f * r * r, groups=config.group, act="relu", shuffle=r) for i in steps})


class Upsamplers(nn.Module):
    """The heads: `up` of a single-scale network; `up2`, `up3`, `up4` of a multi-scale one."""

    def __init__(self, config: CARNConfig) -> None:
        super().__init__()
        if not config.multi_scale:
            self.up = Upsampler(config, config.scales[0])
            return
        for scale in config.scales:
            setattr(self, f"up{scale}", Upsampler(config, scale))

    def layers(self, scale: int) -> list[nn.Module]:
        """The convolutions of one head."""
        return list((self.up if hasattr(self, "up") else getattr(self, f"up{scale}")).body.values())


class Shift(nn.Module):
    """A mean shift under the authors' name `shifter`."""

    def __init__(self, mean: tuple[float, float, float], sign: int) -> None:
        super().__init__()
        self.shifter = MeanShift(mean, sign)

    def forward(self, x: Tensor) -> Tensor:
        return self.shifter(x)


class CARN(Network, Cascade):
    """The network of the paper's figure 2; see the module's docstring."""

    name = "carn"
    Config = CARNConfig
    dialects = {"official": ("entry.weight", "b1.b1.body.0.weight", "c3.body.0.weight", "exit.weight")}
    hints = ()
    fixed = ("mean",)

    def __init__(self, config: CARNConfig) -> None:
        Cascade.__init__(self, config.features)
        self.config = config
        f = config.features
        self.sub_mean, self.add_mean = Shift(config.mean, -1), Shift(config.mean, +1)
        self.entry = ConvAct(3, f)
        self.b1, self.b2, self.b3 = Block(config), Block(config), Block(config)
        self.upsample = Upsamplers(config)
        self.exit = ConvAct(f, 3)

    @classmethod
    def config_from(cls, state: State, dialect: str, hints: Mapping[str, Any]) -> CARNConfig:
        """Sizes from shapes. The group count is that of the upsampler."""
        features = state["entry.weight"].shape[0]
        mobile = "b1.b1.body.4.weight" in state
        heads = sorted({key.split(".")[1] for key in state if key.startswith("upsample.")})
        if not heads:
            raise ValueError("it has no upsampler: no key begins with upsample.")
        multi_scale = heads != ["up"]
        if multi_scale:
            scales = tuple(int(h.removeprefix("up")) for h in heads if h.removeprefix("up").isdigit())
        else:
            ninefold = state["upsample.up.body.0.weight"].shape[0] == 9 * features
            scales = (3 if ninefold else 4 if "upsample.up.body.3.weight" in state else 2,)
        group = next(features // w.shape[1] for k, w in state.items() if k.startswith("upsample.") and w.dim() == 4)
        return CARNConfig(scales=scales, multi_scale=multi_scale, group=group, mobile=mobile, features=features)

    @property
    def scales(self) -> tuple[int, ...]:
        """The factors of the heads."""
        return self.config.scales

    def forward(self, x: Tensor, scale: int | None = None) -> Tensor:
        """x: (N, 3, H, W) RGB in 0..1 -> (N, 3, H * scale, W * scale). A multi-scale network needs `scale`; a
        single-scale network ignores it, as the authors' does. Raises ValueError for a scale it has no head for."""
        if not self.config.multi_scale:
            scale = self.config.scales[0]
        elif scale not in self.config.scales:
            example = f"model(x, scale={self.config.scales[0]})"
            raise ValueError(f"carn: expected scale to be one of {self.config.scales}, as in {example}; got {scale}")
        x = self.entry(self.sub_mean(x))
        x = self.cascade(x, (self.b1, self.b2, self.b3))
        return self.add_mean(fused([*self.upsample.layers(scale), self.exit], x))

    def super_resolve(self, x: Tensor, scale: int) -> Tensor:
        return self(x, scale)
