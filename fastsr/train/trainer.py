"""The training loop: any network that enlarges images, a list of losses, one process or several under torchrun.

A run lives in its output folder: `last.pt` (everything needed to go on), `weights.safetensors` (what `fastsr.load`
reads: the exponential average where there is one), `steps.csv`, `validation.csv`, `config.json` and `cache/`. Every
file is replaced as a whole. A run that was stopped in any way goes on from `last.pt` as if it had not been: a step's
patches and learning rate are functions of its number, and all else is in that file.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastsr
from fastsr.checkpoints.normal import Normal, plain
from fastsr.image.colour import rgb_to_y
from fastsr.image.io import write_atomically
from fastsr.image.metrics import psnr
from fastsr.image.upscale import as_segmentation, upscale
from fastsr.models import Network, create, load
from fastsr.models.sftgan import condition
from fastsr.op import OPS
from fastsr.train.config import TrainConfig, rate
from fastsr.train.data import Example, Patches, list_images, prepare
from fastsr.train.initial import STARTS
from fastsr.train.losses import WeightedLosses


class PlainOperators(TorchFunctionMode):
    """Has operators run as their eager definitions, which autograd then sees through: it keeps what they computed on
    the way, where an operator's own gradient computes it again (about a third longer a step)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function: Any = _EAGER.get(func, func)
        return function(*args, **(kwargs or {}))


_EAGER: dict[Any, Callable[..., Any]] = {op.default: op.eager for op in OPS.values()}


class Average:
    """The exponential average of a network's parameters; its buffers are copied.

    After updates with w1, w2, ..., wn of a network that was w0: d^n w0 + (1 - d) (d^(n-1) w1 + ... + d wn-1 + wn).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        parameters = dict(network.named_parameters())
        for key, value in network.state_dict().items():
            if key in parameters:
                self.values[key].lerp_(value, 1 - self.decay)
            else:
                self.values[key].copy_(value)


class Trainer:
    """One run of a configuration. `run` does all of it; `train_step` and `validate` are its parts.

    device: default the CUDA device of this process if there is one. resume: go on from the output folder's `last.pt`
    where there is one; without it, one that is there is an error. The configuration may differ from that of the run so
    far in everything but the network's shape; what remains is then done by the new one.
    Raises ValueError for a configuration, folder or checkpoint that does not fit.
    """

    def __init__(self, config: TrainConfig, *, device: torch.device | str | None = None, resume: bool = False) -> None:
        self.config = config
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if config.batch % self.world:
            raise ValueError(f"batch: expected a multiple of the {self.world} processes; got {config.batch}")
        self.device = torch.device(device or _default_device())
        self.output = Path(config.output)
        self.checkpoint = self.output / "last.pt"
        if self.checkpoint.exists() and not resume:
            raise ValueError(f"{self.checkpoint} exists: resume that run, or choose another output")

        torch.manual_seed(config.seed)
        self.network = self._network().to(self.device, torch.float32, memory_format=torch.channels_last)
        self.scales = self._scales()
        self.segmentation = as_segmentation(
            self.network, None if config.segmentation is None else load(config.segmentation, device=self.device)
        )
        self.losses = WeightedLosses(config.losses).to(self.device)
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.learning_rate, betas=config.betas)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "float16")
        self.step = 0
        self.seconds = 0.0
        self.collected: list[float] = []
        self.average = None if config.ema is None else Average(self.network, config.ema)
        if self.checkpoint.exists():
            self._restore()
        self.patches, self.validation = self._data()

    def run(self, report: Callable[[str], None] | None = None) -> None:
        """Trains up to `config.steps`, logging, validating and writing checkpoints on the way and at the end."""
        report = report or (lambda line: None)
        config, logs = self.config, _Logs(self.output, self.step, self.config.tensorboard, self.rank == 0)
        if self.rank == 0:
            text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
            write_atomically(self.output / "config.json", text.encode())
        started = time.perf_counter() - self.seconds
        while self.step < config.steps:
            learning_rate = rate(config, self.step)
            self.collected.append(self.train_step(learning_rate))
            self.step += 1
            last = self.step == config.steps
            self.seconds = time.perf_counter() - started
            if self.step % config.log_every == 0 or last:
                loss, self.collected = float(np.mean(self.collected)), []
                logs.steps(self.step, loss, learning_rate, self.seconds)
                report(f"step {self.step} of {config.steps}: loss {loss:.6f}, rate {learning_rate:.3g}, "
                       f"{self.seconds:.0f} s")  # fmt: skip
            if self.rank == 0 and config.validate_every and (self.step % config.validate_every == 0 or last):
                made = self.validate()
                logs.validation(self.step, made)
                report("  validation: " + ", ".join(f"x{s} {value:.3f} dB" for s, value in made.items()))
            if self.rank == 0 and (self.step % config.checkpoint_every == 0 or last):
                self.save()
        logs.close()

    def train_step(self, learning_rate: float) -> float:
        """One update of the weights with the patches of step `self.step`; returns the loss, averaged over processes."""
        low, high, scale = self.patches.step(self.step, self.rank, self.world)
        low, target = self._as_input(low), self._as_input(high)
        black, white = self.network.value_range
        self.network.train()
        with torch.autocast(self.device.type, _dtype(self.config.amp), enabled=self.config.amp is not None):
            inputs = {}
            if self.segmentation is not None:
                with torch.no_grad():
                    inputs["condition"] = condition(self.segmentation, low)
            with PlainOperators():
                made = self.network.super_resolve(low * (white - black) + black, scale, **inputs)
        result = (made.float() - black) / (white - black)
        self.losses.prepare(result.detach(), target, self.step)
        loss = self.losses(result, target)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.world > 1:
            self._average_gradients()
        if self.config.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.network)
        value = loss.detach()
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        if not math.isfinite(value.item()):
            raise FloatingPointError(
                f"step {self.step}: the loss is {value.item()}; resume with a smaller learning_rate or a clip"
            )
        return value.item()

    def _average_gradients(self) -> None:
        """Every process gets the mean of all gradients, in one message.

        All processes train the same scale in a step, so the same parameters have gradients; what a multi-scale
        network's other heads have not is not sent.
        """
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        message = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(message)
        message /= self.world
        for gradient, mean in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))

    @torch.no_grad()
    def validate(self) -> dict[int, float]:
        """Mean luma PSNR in dB by scale, of 8-bit results with `scale` pixels shaved, over the validation images."""
        self.network.eval()
        made: dict[int, float] = {}
        with self._averaged():
            for scale in self.scales:
                made[scale] = float(np.mean([self._psnr(example, scale) for example in self.validation]))
        return made

    def save(self) -> None:
        """Writes `weights.safetensors`, in the normal form, and `last.pt`."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "collected": self.collected,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.losses.state_dict(),
            "average": None if self.average is None else self.average.values,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        said = Normal(
            network=self.network.name,
            variant=next(iter(self.network.dialects)),
            config=plain(dataclasses.asdict(self.network.config)),
            source_sha256=hashlib.sha256(buffer.getbuffer()).hexdigest(),
            fastsr_version=fastsr.__version__,
        )
        values = self.network.state_dict() if self.average is None else self.average.values
        weights = save({k: v.contiguous().cpu() for k, v in values.items()}, said.metadata())
        write_atomically(self.output / "weights.safetensors", weights)
        write_atomically(self.checkpoint, buffer.getbuffer())  # last: what it stands for is then there

    def _restore(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.losses.load_state_dict(state["losses"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.checkpoint}: belongs to another network or other losses: {error}") from error
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:  # a run that goes on with an average it did not have starts it from its weights
            self.average.values = state["average"] or Average(self.network, self.average.decay).values
        self.step, self.seconds, self.collected = state["step"], state["seconds"], state["collected"]
        torch.set_rng_state(state["random"].cpu())
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.device)

    def _network(self) -> Network:
        shape = dict(self.config.network)
        name = shape.pop("name")
        shape = {k: tuple(v) if isinstance(v, list) else v for k, v in shape.items()}
        network = create(name, **shape) if self.config.initial is None else load(self.config.initial, **shape)
        if network.name != name:
            raise ValueError(f"initial: {self.config.initial} holds {network.name}; network says {name}")
        if not network.scales:
            raise ValueError(f"network: expected one that enlarges images; got {name}")
        if self.config.start is not None:
            STARTS[self.config.start](network)
        return network

    def _scales(self) -> dict[int, float]:
        chosen = {int(s): float(w) for s, w in self.config.scales.items()} or dict.fromkeys(self.network.scales, 1.0)
        wrong = [s for s in chosen if s not in self.network.scales]
        if wrong:
            raise ValueError(f"scales: the network has {self.network.scales}; got {wrong}")
        return chosen

    def _data(self) -> tuple[Patches, list[Example]]:
        config, scales = self.config, list(self.scales)
        images = list_images(config.data)
        if len(images) <= config.holdout:
            raise ValueError(f"holdout: expected less than the {len(images)} images of {config.data}")
        kept = len(images) - config.holdout
        checked = images[kept:] + (list_images(config.validation) if config.validation is not None else [])
        cache = self.output / "cache"
        if self.world > 1 and self.rank > 0:
            dist.barrier()
        examples, validation = prepare(images[:kept], scales, cache), prepare(checked, scales, cache)
        if self.world > 1 and self.rank == 0:
            dist.barrier()
        return Patches(examples, self.scales, config.patch, config.batch, config.seed), validation

    def _as_input(self, pixels: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 in 0..1, RGB or luma as the network wants it, on the device."""
        image = pixels.to(self.device, torch.float32).div_(255).contiguous(memory_format=torch.channels_last)
        return rgb_to_y(image) if self.network.colour == "y" else image

    def _psnr(self, example: Example, scale: int) -> float:
        low = np.ascontiguousarray(example.low[scale])
        result = upscale(low, self.network, scale=scale, segmentation=self.segmentation)
        luma = [rgb_to_y(torch.from_numpy(p / 255.0).permute(2, 0, 1)[None]) for p in (result, example.target(scale))]
        return psnr(*luma, shave=scale)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The network holds the averaged weights for the time being."""
        if self.average is None:
            yield
            return
        own = {k: v.clone() for k, v in self.network.state_dict().items()}
        self.network.load_state_dict(self.average.values)
        try:
            yield
        finally:
            self.network.load_state_dict(own)


class _Logs:
    """`steps.csv`, `validation.csv` and, if wanted, TensorBoard's files; rows of steps to be done again are dropped."""

    def __init__(self, folder: Path, step: int, tensorboard: bool, active: bool) -> None:
        self.active, self.folder, self.writer = active, folder, None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("steps.csv", "validation.csv"):
            file = folder / name
            if file.exists():
                head, *rows = file.read_text().splitlines(keepends=True)
                rows = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= step]
                write_atomically(file, "".join([head, *rows]).encode())
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(f"tensorboard: not installed ({error}); install it, or leave it out") from error
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def steps(self, step: int, loss: float, learning_rate: float, seconds: float) -> None:
        self._add("steps.csv", {"step": step, "loss": repr(loss), "learning_rate": repr(learning_rate),
                                "seconds": f"{seconds:.1f}"})  # fmt: skip
        self._scalars(step, {"loss": loss, "learning_rate": learning_rate})

    def validation(self, step: int, made: dict[int, float]) -> None:
        self._add("validation.csv", {"step": step, **{f"psnr_y_x{s}": f"{v:.4f}" for s, v in made.items()}})
        self._scalars(step, {f"psnr_y/x{s}": v for s, v in made.items()})

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _add(self, name: str, row: dict[str, Any]) -> None:
        if not self.active:
            return
        new = not (self.folder / name).exists()
        with open(self.folder / name, "a", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)


def _default_device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def _dtype(amp: str | None) -> torch.dtype:
    return torch.float16 if amp == "float16" else torch.bfloat16
