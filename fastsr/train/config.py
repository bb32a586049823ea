"""What a training run is told: a JSON file, read into `TrainConfig`, and every message about a mistake in it."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsr.train.initial import STARTS

SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": ("warmup",),
    "multistep": ("warmup", "milestones", "gamma"),
    "cosine": ("warmup",),
}
"""The learning rate's schedules and their settings; see `rate`."""
AMP = (None, "bfloat16", "float16")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. Counts are in steps, one step being one update of the weights.

    network: what `fastsr.create` takes: {"name": "carn", "scales": [2, 3, 4], ...}.
    data, output: the folder of training images (searched recursively), and the folder that gets everything made.
    initial: weights to begin with, anything `fastsr.load` reads; its network is then the one trained, and `network`
        gives only hints for loading. start: how else a new network's weights are set; "interpolating", for CARN, has it
        begin at bicubic's level (`fastsr.train.initial`). Default: as torch does.
    scales: drawn at each step, with these weights: {"2": 1.0, "4": 2.0}. Default: all of the network's, equally.
    patch: side of the low-resolution patches. batch: patches a step, over all processes together.
    losses: a list of {"name": ..., "weight": ..., settings}; see `fastsr.train.losses`.
    learning_rate, betas: Adam's. schedule: {"name": "constant" | "multistep" | "cosine", "warmup": steps, ...}.
    clip: the gradients' largest allowed norm. amp: "bfloat16" or "float16" for autocast.
    ema: decay a step of the exponential average of the weights, which is then what is validated and written.
    holdout: so many of the images, the last by name, are not trained on but validated on; validation: a folder of
        further ones. validate_every: 0 for never.
    segmentation: for SFTGAN, the weights of its segmentation network.
    tensorboard: write its event files too; needs the package of that name.
    """

    network: dict[str, Any]
    data: str
    output: str
    steps: int
    initial: str | None = None
    start: str | None = None
    segmentation: str | None = None
    scales: dict[str, float] = field(default_factory=dict)
    patch: int = 48
    batch: int = 16
    losses: tuple[dict[str, Any], ...] = ({"name": "l1", "weight": 1.0},)
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    clip: float | None = None
    amp: str | None = None
    ema: float | None = None
    seed: int = 0
    holdout: int = 0
    validation: str | None = None
    validate_every: int = 0
    log_every: int = 100
    checkpoint_every: int = 1000
    tensorboard: bool = False

    def __post_init__(self) -> None:
        def need(condition: bool, name: str, expectation: str) -> None:
            if not condition:
                raise ValueError(f"{name}: expected {expectation}; got {getattr(self, name)!r}")

        need(isinstance(self.data, str), "data", "the path of a folder")
        need(isinstance(self.output, str), "output", "the path of a folder")
        need(isinstance(self.network, dict) and "name" in self.network, "network", 'an object with a "name"')
        for name in ("steps", "patch", "batch", "log_every", "checkpoint_every"):
            need(_whole(getattr(self, name)) and getattr(self, name) >= 1, name, "a whole number, at least 1")
        for name in ("holdout", "validate_every", "seed"):
            need(_whole(getattr(self, name)) and getattr(self, name) >= 0, name, "a whole number, at least 0")
        need(_number(self.learning_rate) and self.learning_rate > 0, "learning_rate", "a positive number")
        need(self.clip is None or (_number(self.clip) and self.clip > 0), "clip", "a positive number or null")
        need(self.ema is None or (_number(self.ema) and 0 <= self.ema < 1), "ema", "a number in [0, 1) or null")
        need(self.start in (None, *STARTS), "start", f"null or one of {', '.join(STARTS)}")
        need(self.start is None or self.initial is None, "start", "null where there are initial weights")
        need(self.amp in AMP, "amp", '"bfloat16", "float16" or null')
        need(len(self.betas) == 2 and all(_number(b) and 0 <= b < 1 for b in self.betas), "betas", "two in [0, 1)")
        need(
            isinstance(self.scales, dict)
            and all(str(s).isdigit() and _number(w) and w > 0 for s, w in self.scales.items()),
            "scales", 'an object of positive weights by scale, as in {"2": 1.0}',
        )  # fmt: skip
        need(
            len(self.losses) > 0 and all(isinstance(entry, dict) and "name" in entry for entry in self.losses),
            "losses", 'a list of at least one object with a "name"',
        )  # fmt: skip
        _check_schedule(self.schedule)
        need(self.validate_every == 0 or self.holdout > 0 or self.validation is not None, "validate_every",
             "0, or images to validate on: a folder `validation` or a number `holdout`")  # fmt: skip


def _check_schedule(schedule: Any) -> None:
    name = schedule.get("name") if isinstance(schedule, dict) else None
    if name not in SCHEDULES:
        raise ValueError(f'schedule: expected an object with a "name" among {", ".join(SCHEDULES)}; got {schedule!r}')
    unknown = [k for k in schedule if k not in ("name", *SCHEDULES[name])]
    if unknown:
        raise ValueError(f"schedule: {name} has the settings {', '.join(SCHEDULES[name])}; got {', '.join(unknown)}")
    warmup, milestones, gamma = schedule.get("warmup", 0), schedule.get("milestones", []), schedule.get("gamma", 0.5)
    if not _whole(warmup) or warmup < 0:
        raise ValueError(f"schedule: warmup: expected a whole number of steps, at least 0; got {warmup!r}")
    if (
        not isinstance(milestones, list)
        or not all(map(_whole, milestones))
        or (name == "multistep") != bool(milestones)
    ):
        raise ValueError(f"schedule: milestones: expected a list of at least one step; got {milestones!r}")
    if not _number(gamma) or gamma <= 0:
        raise ValueError(f"schedule: gamma: expected a positive number; got {gamma!r}")


def rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step 0, 1, ... `config.steps` - 1.

    "warmup" steps lead linearly up to it; then it stays ("constant"), is multiplied by "gamma" (default 0.5) at each of
    the "milestones" ("multistep"), or falls to zero along half a cosine ("cosine").
    """
    warmup = config.schedule.get("warmup", 0)
    ramp = min(1.0, (step + 1) / (warmup + 1))
    if config.schedule["name"] == "multistep":
        passed = sum(step >= m for m in config.schedule["milestones"])
        return config.learning_rate * ramp * config.schedule.get("gamma", 0.5) ** passed
    if config.schedule["name"] == "cosine":
        return config.learning_rate * ramp * _half_cosine(step / config.steps)
    return config.learning_rate * ramp


def read_config(path: str | os.PathLike[str], **changes: Any) -> TrainConfig:
    """The configuration of a JSON file, with `changes` for its fields. Raises ValueError naming the file, the field and
    what was expected, OSError where it cannot be read."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected one JSON object; got {type(content).__name__}")
    content |= changes
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for name in content:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            guess = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(fields)}"
            raise ValueError(f"{path}: unknown setting {name!r}{guess}")
    missing = [
        n for n, f in fields.items()
        if n not in content and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise ValueError(f"{path}: missing: {', '.join(missing)}")
    try:
        return TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _half_cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
