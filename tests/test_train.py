"""The trainer on problems that take a second: it learns, goes on after a kill as if nothing had been, and averages,
schedules, losses and messages are what they say."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastsr
from fastsr.image.resize import imresize
from fastsr.train import losses as losses_module
from fastsr.train.__main__ import main
from fastsr.train.config import TrainConfig, rate, read_config
from fastsr.train.data import Patches, list_images, prepare, shrink
from fastsr.train.initial import interpolating
from fastsr.train.losses import LOSSES, Loss, WeightedLosses, register
from fastsr.train.trainer import Average, PlainOperators, Trainer

TINY = {"name": "carn", "scales": (2, 3), "multi_scale": True, "mobile": True, "group": 2, "features": 8}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three small pictures, one of them gray and in a subfolder."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    y, x = np.mgrid[:54, :60]
    for n, name in enumerate(("a.png", "b.png", "more/c.png")):
        waves = [127 + 120 * np.sin((x * (c + 1) + y * n) / (4 + n)) for c in range(3)]
        pixels = np.stack(waves, -1).astype(np.uint8)
        Image.fromarray(pixels[..., 0] if n == 2 else pixels).save(folder / name)
    return folder


def _config(images: Path, output: Path, **changes: Any) -> TrainConfig:
    settings = {"network": TINY, "data": str(images), "output": str(output), "steps": 6, "patch": 8, "batch": 2,
                "learning_rate": 2e-3, "log_every": 1, "checkpoint_every": 3, "ema": 0.5}  # fmt: skip
    return TrainConfig(**settings | changes)


def _rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def _losses(output: Path) -> list[tuple[str, str, str]]:
    return [(row["step"], row["loss"], row["learning_rate"]) for row in _rows(output / "steps.csv")]


def test_it_learns_and_writes_what_load_reads(images, tmp_path):
    config = _config(images, tmp_path / "run", steps=120, log_every=20, holdout=1, validate_every=60,
                     learning_rate=1e-2, schedule={"name": "cosine", "warmup": 5}, clip=1.0, ema=0.9)  # fmt: skip
    lines: list[str] = []
    trainer = Trainer(config)
    before = trainer.validate()
    trainer.run(lines.append)
    losses = [float(row["loss"]) for row in _rows(tmp_path / "run/steps.csv")]
    assert losses[-1] < 0.6 * losses[0]
    rows = _rows(tmp_path / "run/validation.csv")
    assert [row["step"] for row in rows] == ["60", "120"]
    assert all(float(rows[-1][f"psnr_y_x{s}"]) > before[s] + 1 for s in (2, 3))
    assert len(lines) == 8 and "validation" in lines[-1]

    loaded = fastsr.load(tmp_path / "run/weights.safetensors")
    assert loaded.config == trainer.network.config
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, trainer.average.values[key]), key
    with trainer._averaged():
        assert trainer.validate() == {s: pytest.approx(float(rows[-1][f"psnr_y_x{s}"]), abs=1e-4) for s in (2, 3)}


KILLED_AT_5 = """
import os, signal, sys
from fastsr.train.__main__ import main
from fastsr.train.trainer import Trainer

step = Trainer.train_step
Trainer.train_step = lambda self, rate: os.kill(os.getpid(), signal.SIGKILL) if self.step == 5 else step(self, rate)
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on_with_the_same_losses(images, tmp_path):
    settings = {"network": TINY, "data": str(images), "steps": 9, "patch": 8, "batch": 2, "learning_rate": 2e-3,
                "log_every": 2, "checkpoint_every": 3, "ema": 0.9, "amp": "bfloat16", "output": "unused"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    options = ["--device", "cpu", "--output"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_5, str(tmp_path / "config.json"), *options, str(tmp_path / "stopped")],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["step"] for row in _rows(tmp_path / "stopped/steps.csv")] == ["2", "4"]
    assert main([str(tmp_path / "config.json"), *options, str(tmp_path / "stopped"), "--resume"]) == 0
    assert main([str(tmp_path / "config.json"), *options, str(tmp_path / "whole")]) == 0
    assert [step for step, *_ in _losses(tmp_path / "whole")] == ["2", "4", "6", "8", "9"]
    assert _losses(tmp_path / "stopped") == _losses(tmp_path / "whole")
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("stopped", "whole"))
    for part in ("network", "average"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in b[part])


def test_two_processes_learn_what_one_does(images, tmp_path):
    settings = {"network": TINY, "data": str(images), "steps": 3, "patch": 8, "batch": 4, "learning_rate": 1e-3,
                "log_every": 1, "output": "unused"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "fastsr.train", str(tmp_path / "config.json"), "--device", "cpu", "--output"]
    done = subprocess.run([*launcher, *command, str(tmp_path / "two")], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 3 of 3") == 1
    Trainer(read_config(tmp_path / "config.json", output=str(tmp_path / "one")), device="cpu").run()
    one, two = ([float(loss) for _, loss, _ in _losses(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)
    with pytest.raises(AssertionError):  # it does learn: equal losses would say nothing otherwise
        assert one == pytest.approx([one[0]] * 3, rel=1e-4)


def test_a_finished_or_other_run_is_not_overwritten(images, tmp_path):
    config = _config(images, tmp_path / "run", steps=3)
    Trainer(config).run()
    with pytest.raises(ValueError, match="resume that run, or choose another output"):
        Trainer(config)
    with pytest.raises(ValueError, match="another network"):
        Trainer(_config(images, tmp_path / "run", network=TINY | {"features": 16}), resume=True)
    longer = Trainer(_config(images, tmp_path / "run", steps=4), resume=True)  # a plan may change on the way
    assert longer.step == 3
    longer.run()
    assert [row["step"] for row in _rows(tmp_path / "run/steps.csv")] == ["1", "2", "3", "4"]


def test_a_run_can_begin_with_weights(images, tmp_path):
    Trainer(_config(images, tmp_path / "first", steps=1)).run()
    weights = str(tmp_path / "first/weights.safetensors")
    second = Trainer(_config(images, tmp_path / "second", initial=weights))
    for key, value in fastsr.load(weights).state_dict().items():
        assert torch.equal(second.network.state_dict()[key], value)
    with pytest.raises(ValueError, match="holds carn; network says idn"):
        Trainer(_config(images, tmp_path / "third", network={"name": "idn"}, initial=weights))


def test_operators_in_training_are_their_definitions(images):
    network = fastsr.create(**TINY).train()
    x = torch.rand(1, 3, 7, 8)
    own = torch.autograd.grad(network(x, 2).square().sum(), network.entry.weight)[0]
    with PlainOperators():
        result = network(x, 2)
    assert "fastsr" not in _graph(result.grad_fn) and "fastsr" in _graph(network(x, 2).grad_fn)
    plain = torch.autograd.grad(result.square().sum(), network.entry.weight)[0]
    assert torch.allclose(own, plain, rtol=1e-4, atol=1e-5 * own.abs().max().item())


def _graph(node: Any) -> str:
    """The names of all nodes of an autograd graph."""
    seen, todo = set(), [node]
    while todo:
        n = todo.pop()
        if n is not None and n not in seen:
            seen.add(n)
            todo += [after for after, _ in n.next_functions]
    return " ".join(n.name() for n in seen)


@pytest.mark.parametrize(
    "network, scale",
    [
        ({"name": "idn"}, 2),
        ({"name": "memnet", "channels": 4, "num_memblock": 1, "num_resblock": 1}, 3),
        ({"name": "memnet_original", "channels": 4, "num_memblock": 2, "num_resblock": 1}, 3),
        ({"name": "msrn", "blocks": 1, "scale": 4}, 4),
        ({"name": "srfeat", "blocks": 1}, 4),
        ({"name": "zssr"}, 2),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else f"x{value}",
)
def test_networks_of_every_colour_and_range_train(network, scale, images, tmp_path):
    trainer = Trainer(
        _config(images, tmp_path / "run", network=network, scales={str(scale): 1.0}, losses=({"name": "l2"},))
    )
    before = [p.detach().clone() for p in trainer.network.parameters() if p.requires_grad]
    loss = trainer.train_step(1e-4)
    assert 0 < loss < 10
    after = [p for p in trainer.network.parameters() if p.requires_grad]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after)) > len(before) / 2


# Data.


def test_low_resolution_is_the_whole_image_shrunk_to_8_bits(images, tmp_path):
    examples = prepare(list_images(images), [2, 3], tmp_path / "cache")
    assert [Path(e.name).name for e in examples] == ["a.png", "b.png", "c.png"]
    for example in examples:
        assert example.high.shape == (54, 60, 3)
        exact = imresize(torch.from_numpy(example.high.copy()).double().permute(2, 0, 1)[None], 1 / 3)[0]
        assert np.abs(example.low[3] - exact.permute(1, 2, 0).numpy().clip(0, 255)).max() <= 0.5
    odd = examples[0].high[:53, :59]
    assert np.array_equal(shrink(odd, 2), shrink(odd[:52, :58], 2))


def test_the_cache_follows_the_images(images, tmp_path):
    first = prepare(list_images(images), [2], tmp_path / "cache")[0]
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()}
    prepare(list_images(images), [2], tmp_path / "cache")
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()} == files
    Image.fromarray(255 - first.high).save(images / "a.png")
    assert np.array_equal(prepare(list_images(images), [2], tmp_path / "cache")[0].high, 255 - first.high)


def test_patches_fit_each_other_and_depend_on_the_step_alone(images, tmp_path):
    examples = prepare(list_images(images), [2, 3], tmp_path / "cache")
    patches = Patches(examples, {2: 1.0, 3: 3.0}, patch=16, batch=4, seed=1)
    scales = []
    for step in range(40):
        low, high, scale = patches.step(step)
        scales.append(scale)
        assert low.dtype == torch.uint8 and low.shape == (4, 3, 16, 16) and high.shape == (4, 3, 16 * scale, 16 * scale)
        inner = slice(3, -3)  # further inside than the kernel reaches, the patch shrinks to the patch
        small = imresize(high.double(), 1 / scale)[..., inner, inner]
        assert (small.clamp(0, 255) - low[..., inner, inner]).abs().max() <= 0.5 + 1e-6
    assert 0.55 < scales.count(3) / 40 < 0.95
    again, halves = patches.step(7), [patches.step(7, rank, 2) for rank in (0, 1)]
    assert torch.equal(again[0], patches.step(7)[0])
    assert torch.equal(torch.cat([h[1] for h in halves]), again[1])
    assert len({patches.step(n)[0].sum().item() for n in range(9)}) == 9
    with pytest.raises(ValueError, match="choose a smaller patch"):
        Patches(examples, {3: 1.0}, patch=19, batch=1, seed=0)


# Schedules, average, losses.


def test_schedules():
    def rates(steps: int, **schedule: Any) -> list[float]:
        config = TrainConfig({"name": "carn"}, "d", "o", steps, learning_rate=8.0, schedule=schedule)
        return [rate(config, step) for step in range(steps)]

    assert rates(3, name="constant") == [8, 8, 8]
    assert rates(5, name="constant", warmup=3) == [2, 4, 6, 8, 8]
    assert rates(5, name="multistep", milestones=[2, 4]) == [8, 8, 4, 4, 2]
    assert rates(3, name="multistep", milestones=[1], gamma=0.25) == [8, 2, 2]
    assert rates(4, name="cosine") == pytest.approx([8, 4 + 4 * 0.5**0.5, 4, 4 - 4 * 0.5**0.5])


def test_the_average_has_its_closed_form():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    history = [network[0].weight.detach().clone()]
    average = Average(network, decay=0.8)
    for step in range(1, 6):
        with torch.no_grad():
            network[0].weight.add_(step)
            network[1].running_mean.fill_(step)
        history.append(network[0].weight.detach().clone())
        average.update(network)
    expected = 0.8**5 * history[0] + sum(0.2 * 0.8 ** (5 - n) * history[n] for n in range(1, 6))
    assert torch.allclose(average.values["0.weight"], expected, rtol=1e-12)
    assert average.values["1.running_mean"].tolist() == [5, 5]


def test_losses_are_weighted_sums_of_their_definitions():
    a, b = torch.tensor([0.5, 1.0]), torch.tensor([0.0, 1.0])
    assert WeightedLosses([{"name": "l1"}])(a, b).item() == pytest.approx(0.25)
    assert WeightedLosses([{"name": "l2", "weight": 2}])(a, b).item() == pytest.approx(0.25)
    both = WeightedLosses([{"name": "l1", "weight": 4.0}, {"name": "charbonnier", "weight": 1.0, "epsilon": 0.1}])
    assert both(a, b).item() == pytest.approx(1 + (0.26**0.5 + 0.1) / 2)
    for entries, message in [
        ([{"name": "l3"}], "expected names among l1, l2, charbonnier"),
        ([{"name": "l1", "epsilon": 1}], "epsilon"),
        ([{"name": "l1", "weight": "2"}], "expected weight to be a number"),
        ([{"name": "l1"}, {"name": "l1"}], "listed twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            WeightedLosses(entries)


def test_a_loss_that_learns_fits_and_resumes(images, tmp_path, monkeypatch):
    monkeypatch.setattr(losses_module, "LOSSES", dict(LOSSES))

    @register("judge")
    class Judge(Loss):
        """The smallest adversary: it learns to tell results from targets, and says how sure it is."""

        def __init__(self, learning_rate: float) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 1, 3)
            self.optimizer = torch.optim.Adam(self.body.parameters(), lr=learning_rate)
            self.steps: list[int] = []

        def prepare(self, result, target, step):
            assert not result.requires_grad
            self.steps.append(step)
            self.optimizer.zero_grad()
            (nn.functional.softplus(self.body(result)) + nn.functional.softplus(-self.body(target))).mean().backward()
            self.optimizer.step()

        def forward(self, result, target):
            return nn.functional.softplus(-self.body(result)).mean()

        def get_extra_state(self):
            return self.optimizer.state_dict()

        def set_extra_state(self, state):
            self.optimizer.load_state_dict(state)

    listed = ({"name": "l1"}, {"name": "judge", "weight": 0.1, "learning_rate": 1e-3})
    with pytest.raises(ValueError, match="exists already"):
        register("judge")(Judge)
    trainer = Trainer(_config(images, tmp_path / "whole", losses=listed))
    fresh = [p.detach().clone() for p in trainer.losses.parameters()]
    trainer.run()
    assert trainer.losses.parts["judge"].steps == list(range(6))
    assert not any(torch.equal(a, b) for a, b in zip(fresh, trainer.losses.parameters()))
    Trainer(_config(images, tmp_path / "stopped", losses=listed, steps=3)).run()
    Trainer(_config(images, tmp_path / "stopped", losses=listed), resume=True).run()
    assert _losses(tmp_path / "stopped") == _losses(tmp_path / "whole")


def test_tensorboard_gets_what_the_tables_get(images, tmp_path, monkeypatch):
    written: list[tuple[str, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (folder, purge_step) == (str(tmp_path / "run"), 1)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

        def close(self) -> None:
            written.append(("closed", 0))

    config = _config(images, tmp_path / "run", steps=2, tensorboard=True, holdout=1, validate_every=2)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    Trainer(config).run()
    steps = [(name, step) for step in (1, 2) for name in ("loss", "learning_rate")]
    assert written == [*steps, ("psnr_y/x2", 2), ("psnr_y/x3", 2), ("closed", 0)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard: not installed"):
        Trainer(config, resume=True).run()


@pytest.mark.parametrize("mobile, group, multi_scale, scales", [(True, 4, True, (2, 3, 4)), (False, 1, False, (4,))])
def test_interpolating_weights_interpolate(mobile, group, multi_scale, scales):
    torch.manual_seed(0)
    network = fastsr.create("carn", scales=scales, multi_scale=multi_scale, mobile=mobile, group=group, features=32)
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij")
    image = torch.stack([0.5 + 0.4 * torch.sin(x / 4 + c) * torch.cos(y / 5) for c in range(3)])[None]

    def errors() -> list[float]:  # away from the borders, where zeros come in
        with torch.no_grad():
            differences = [network.super_resolve(image, scale) - imresize(image, scale) for scale in scales]
        return [d[..., 8:-8, 8:-8].abs().mean().item() for d in differences]

    assert min(errors()) > 0.1
    interpolating(network)
    assert max(errors()) < 0.04
    with pytest.raises(ValueError, match="6 features a group"):
        interpolating(fastsr.create(**TINY))
    with pytest.raises(ValueError, match="expected a CARN"):
        interpolating(fastsr.create("zssr"))


# Messages.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"step": 3}, "unknown setting 'step'; did you mean 'steps'"),
        ({"steps": None}, "steps: expected a whole number, at least 1"),
        ({"patch": 2.5}, "patch: expected a whole number"),
        ({"network": "carn"}, 'network: expected an object with a "name"'),
        ({"amp": "half"}, 'amp: expected "bfloat16", "float16" or null'),
        ({"start": "bicubic"}, "start: expected null or one of interpolating"),
        ({"ema": 1}, "ema: expected a number in"),
        ({"losses": []}, "losses: expected a list of at least one object"),
        ({"scales": {"2": 0}}, "scales: expected an object of positive weights"),
        ({"schedule": {"name": "step"}}, "schedule: expected an object with a \"name\" among constant, multistep"),
        ({"schedule": {"name": "cosine", "gamma": 1}}, "schedule: cosine has the settings warmup; got gamma"),
        ({"schedule": {"name": "multistep"}}, "milestones: expected a list"),
        ({"validate_every": 5}, "validate_every: expected 0, or images to validate on"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_configuration_is_named(changes, message, tmp_path, capsys):
    settings = {"network": {"name": "carn"}, "data": "images", "output": "run", "steps": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings | changes))
    assert main([str(tmp_path / "config.json")]) == 1
    error = capsys.readouterr().err
    assert message in error and "config.json" in error


def test_what_is_missing_or_does_not_fit_is_named(images, tmp_path):
    (tmp_path / "config.json").write_text('{"data": "images"}')
    with pytest.raises(ValueError, match="missing: network, output, steps"):
        read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("steps = 3")
    with pytest.raises(ValueError, match="not a JSON file"):
        read_config(tmp_path / "config.json")
    for changes, message in [
        ({"scales": {"8": 1.0}}, r"scales: the network has \(2, 3\)"),
        ({"holdout": 3}, "holdout: expected less than the 3 images"),
        ({"data": str(tmp_path / "nothing")}, "no images in this folder"),
        ({"network": {"name": "esrgan_discriminator"}}, "expected one that enlarges images"),
        ({"network": {"name": "sftgan"}, "patch": 4}, "SFTGAN needs the outdoor scene segmentation network"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            Trainer(_config(images, tmp_path / "run", **changes))
