"""Tuning, with time that passes only in kernels: what is measured, what is kept, and who believes it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys

import pytest
import torch
from torch import Tensor

import bench.__main__
import fastsr
from fastsr import _cuda_engine, _tables, _triton, cli, info, ops
from fastsr.op import OPS, Backend, empty_image, op
from fastsr.optimize import optimize
from fastsr.tune import cuda_clock, tune

CPU = torch.device("cpu")
X = torch.ones(1, 2, 3, 4)


class World:
    """Seconds that pass, and how long each backend of `planted_double` takes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds = {"eager": 3e-3, "triton": 2e-3, "cuda": 1e-3}

    def clock(self, run) -> float:
        before = self.now
        run()
        return self.now - before


WORLD = World()


@op
def planted_double(x: Tensor, number: int = 0) -> Tensor:
    """2 x."""
    WORLD.now += WORLD.seconds["eager"]
    return 2 * x


@planted_double.alloc
def _(x, number):
    return empty_image(x, x.shape)


del OPS["planted_double"]  # not fastsr's: the tests over all operators leave it out


def kernel(name: str):
    def run(out, x, number):
        WORLD.now += WORLD.seconds[name]
        torch.mul(x, 2, out=out)

    return run


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A device named "Test GPU 1" of architecture "test", on which planted_double has all backends."""
    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    monkeypatch.setattr(_triton, "identity", lambda device: _tables.Identity("Test GPU 1", "test"))
    monkeypatch.setattr(_tables, "COMMITTED", tmp_path / "committed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(OPS, "planted_double", planted_double)
    monkeypatch.setattr(sys.modules[__name__], "WORLD", World())
    plant()
    _tables.forget()
    yield WORLD
    planted_double.backends()
    _tables.tables.cache_clear()


def plant(**kernels) -> None:
    advice = {"cuda": _cuda_engine.advice, "triton": _triton.advice}
    runs = {name: kernels.get(name, kernel(name)) for name in advice}
    planted_double.backends(
        **{n: Backend(lambda *a: None, runs[n], advice=lambda *a, n=n: advice[n](planted_double, *a)) for n in advice}
    )


def call(x=X, number=0) -> fastsr.op.Call:
    (made,) = fastsr.explain(planted_double, x, number)
    return made


def measure(run=lambda: planted_double(X), **options):
    return tune(run, CPU, clock=WORLD.clock, now=lambda: WORLD.now, **options)


def users() -> dict:
    return json.loads(_tables.users(_tables.Identity("Test GPU 1", "test")).read_text())


# What is chosen.


@pytest.mark.parametrize("order", list(itertools.permutations(("eager", "triton", "cuda"))))
def test_the_fastest_is_chosen(world, order):
    world.seconds = dict(zip(order, (1e-3, 2e-3, 3e-3)))
    assert call().backend == "triton" and "nothing measured" in call().refused["cuda"]
    found = measure()
    assert (found.measured, found.left, found.rejected) == (1, 0, [])
    assert call().backend == order[0]
    times = {name: f"{t * 1e6:.1f} us" for name, t in world.seconds.items()}
    for name, why in call().refused.items():
        assert name == "cpu" or times[name] in why and times[order[0] if name == "cuda" else "eager"] in why
    assert call(X.to(torch.float16)).backend == "triton"  # which nobody measured


def wrong(out, x, number):
    torch.mul(x, 2, out=out)
    out[0, 0, 0, 0] += 0.1  # a single pixel


def nan(out, x, number):
    torch.mul(x, 2, out=out)
    out[0, 0, -1, -1] = torch.nan


def broken(out, x, number):
    raise RuntimeError("out of resource: shared memory\nmore lines")


@pytest.mark.parametrize(("fault", "why"), [(wrong, "wrong by"), (nan, "wrong by nan"), (broken, "shared memory")])
def test_what_is_wrong_or_fails_is_not_chosen(world, fault, why):
    world.seconds["eager"] = 9.0
    plant(triton=fault)
    found = measure()
    assert call().backend == "cuda" and "triton" not in next(iter(users()["times"].values()))
    (said,) = found.rejected
    assert said.startswith("planted_double by triton: ") and why in said and "\n" not in said
    plant(triton=fault, cuda=fault)
    assert len(measure().rejected) == 2
    assert call().backend == "eager" and "wrong result" in call().refused["triton"]


def test_no_row_stands_for_calls_of_another_kind(world):
    images = X, X.half(), torch.ones(1, 3, 3, 4), torch.ones(1, 2, 512, 512), X.to(memory_format=torch.channels_last)
    keys = {_triton.choice_key(planted_double, (x, number)) for x in images for number in (0, 1)}
    assert len(keys) == 10


def test_the_size_of_an_image_is_in_no_key(world):
    def conv(h, w, **options):
        x, skip = torch.zeros(2, 4, h, w), torch.zeros(2, 4, 2 * h, 2 * w)
        args = [x], torch.zeros(4, 4, 4, 4), None, 2, 1, 1, True
        return _triton.choice_key(OPS["conv_act"], OPS["conv_act"]._bind(args, {"skip": skip}))

    def resize(h, w):
        args = torch.zeros(1, 3, h, w), 2 * h, 2 * w, 2.0, 2.0, "matlab"
        return _triton.choice_key(OPS["resize_bicubic"], args)

    sizes = (5, 6), (4, 4), (8, 8), (3, 1)
    assert len({conv(*s) for s in sizes}) == len({resize(*s) for s in sizes}) == 1


# Time.


def test_it_ends_in_time(world):
    world.seconds = dict.fromkeys(world.seconds, 0.05)

    def run():
        for number in range(20):
            planted_double(X, number)

    shares = []
    found = measure(run, seconds=5.0, show=lambda share, words: shares.append((share, words)))
    passes = 3 * 20 * 0.05
    longest = 4 * 0.05 + 3 * 4 * 0.05  # checked, timed
    assert 5.0 <= world.now <= 5.0 + longest + passes
    assert 0 < found.measured < 20 and found.measured + found.left == 20
    assert len(users()["times"]) == found.measured
    assert shares == sorted(shares) and shares[0][1] == "0 of 20: planted_double" and shares[-1][0] < 1
    more = measure(run, seconds=60.0, again=False)
    assert more.measured == found.left and more.left == 0 and len(users()["times"]) == 20


def test_what_is_known_is_not_measured_again_unless_asked_for(world):
    measure()
    before, start = users(), world.now
    assert measure(again=False).measured == 0
    assert world.now - start < 5e-3 and users() == before  # nothing but the network itself ran
    world.seconds["triton"] = 1e-4
    assert measure().measured == 1 and users() != before and call().backend == "triton"


# The file.


def test_a_file_is_complete_or_not_there(world, monkeypatch):
    path = _tables.users(_tables.Identity("Test GPU 1", "test"))
    visits = []

    def dies():
        visits.append(planted_double(X))
        if len(visits) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(dies)
    assert not list(path.parent.iterdir())
    measure()
    before = path.read_bytes()

    def full(*args):
        raise OSError("no space left")

    world.seconds["eager"] = 1e-5
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            measure()
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    assert measure().measured == 1 and call().backend == "eager"


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_measured(world, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError):
        measure()
    assert world.now == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os.path, "expanduser", lambda path: path)
        patched.delenv("XDG_CACHE_HOME")
        assert call().backend == "triton"
        with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
            measure()


def test_where_the_file_is(world, monkeypatch, tmp_path):
    device = _tables.Identity("NVIDIA RTX 6000/Ada (PCIe)", "sm89")
    assert _tables.users(device) == tmp_path / "cache/fastsr/tuned/nvidia-rtx-6000-ada-pcie-sm89.json"
    monkeypatch.setenv("HOME", str(tmp_path))
    for relative in ("", "some/folder"):  # to be ignored, by the XDG rules
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert _tables.cache_directory() == tmp_path / ".cache/fastsr"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _tables.cache_directory() == tmp_path / ".cache/fastsr"


# Who is believed.

DEVICE = _tables.Identity("Test GPU 1", "test")


def table(path, versions=None, **times) -> _tables.Table:
    key = _triton.choice_key(planted_double, (X, 0))
    made = _tables.Table(path, "", _tables.versions() if versions is None else versions, {key: times} if times else {})
    _tables.write(made)
    return made


def test_the_users_own_before_the_committed_before_the_rule(world):
    assert call().backend == "triton" and "as nothing is measured" in _tables.summary(DEVICE)
    table(_tables.committed("test"), eager=1.0, triton=2.0, cuda=3.0)
    assert call().backend == "eager" and "1 committed measurements" in _tables.summary(DEVICE)
    own = table(_tables.users(DEVICE), eager=3.0, triton=2.0, cuda=1.0)
    assert call().backend == "cuda" and "1 your own measurements" in _tables.summary(DEVICE)
    _tables.write(dataclasses.replace(own, times={}))
    assert call().backend == "eager"  # entry by entry
    assert call(number=1).backend == "triton"


@pytest.mark.parametrize("changed", ("fastsr", "torch", "triton"))
def test_other_versions_make_the_users_own_stale_and_not_the_committed(world, changed):
    other = _tables.versions() | {changed: "0.0"}
    own = table(_tables.users(DEVICE), other, eager=1.0, triton=2.0)
    assert call().backend == "triton"
    said = _tables.summary(DEVICE)
    assert f"ignored: measured with {changed} 0.0, this is " in said and str(own.path) in said
    table(_tables.committed("test"), other, eager=1.0, triton=2.0)
    assert call().backend == "eager"
    measure()
    assert users()["versions"] == _tables.versions() and call().backend == "cuda"


MALFORMED = {
    "no JSON": "{",
    "not text": b"\xff\xfe\x00",
    "a list": "[]",
    "another format": json.dumps({"format": 99, "device": "", "versions": {}, "times": {}, "configs": {}}),
    "a field missing": json.dumps({"format": 1, "device": "", "versions": {}, "times": {}}),
    "no eager": {"times": {"a": {"triton": 1.0}}},
    "no time": {"times": {"a": {"eager": 0.0}}},
    "no number": {"times": {"a": {"eager": "1"}}},
    "infinite": {"times": {"a": {"eager": float("inf")}}},
    "times as a list": {"times": [1.0]},
    "a fraction": {"configs": {"a": {"BP": 1.5}}},
    "versions": {"versions": {"torch": 2}},
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("path", ("users", "committed"))
def test_a_malformed_file_is_named(world, path, content):
    file = _tables.users(DEVICE) if path == "users" else _tables.committed("test")
    if isinstance(content, dict):
        content = json.dumps({"format": 1, "device": "", "versions": {}, "times": {}, "configs": {}} | content)
    file.parent.mkdir(parents=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(_tables.TableError) as raised:
        planted_double(X)
    assert str(raised.value).startswith(f"{file}: not a table of measurements: expected ")
    assert str(raised.value).endswith("delete the file or measure again") and str(file) in _tables.summary(DEVICE)


def test_info_says_who_chooses(world, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "cuda:0     chosen by the rule of fastsr._triton.advice" in info.info()
    measure()
    assert (
        f"cuda:0     chosen by 1 your own measurements, 0 launch configurations ({_tables.users(DEVICE)})"
        in info.info()
    )


# Launch configurations, with the kernels in Triton's interpreter.


@pytest.mark.interp
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is interpreted")
def test_launch_configurations_are_searched_checked_and_used(tmp_path, monkeypatch):
    if _triton.missing() is not None:
        pytest.skip(f"no Triton kernels here: {_triton.missing()}")
    from fastsr.kernels import conv
    from fastsr.kernels.launch import Launch

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    world, run, seen = World(), Launch.run, []

    def timed(launch):
        a = launch.args
        world.now += 1e-3 * (abs(a["BP"] - 64) + abs(a["BC"] - 32) + 10 * abs(launch.options["num_stages"] - 2) + 1)
        seen.append((a["BP"], a["BC"], launch.options["num_stages"]))
        run(launch)
        if launch.options["num_stages"] == 2:  # the fastest of all, but wrong
            a["out"][..., -1, -1] += 1

    monkeypatch.setattr(Launch, "run", timed)
    x, weight = torch.randn(1, 16, 5, 5), torch.randn(64, 16, 3, 3)
    x, expected = x.to(memory_format=torch.channels_last), torch.conv2d(x, weight, padding=1)
    shape = conv.Shape("float32", _triton.precision(x), 9, (16,), 64)
    assert (conv.default_config(shape)["BC"], conv.default_config(shape)["num_stages"]) == (64, 3)

    def network():
        return ops.conv_act([x], weight, None, padding=1)

    try:
        found = tune(network, CPU, clock=lambda run: 1e-3 + world.clock(run), now=lambda: world.now, seconds=1e3)
        assert found.improved == 1 and any("wrong by" in r and "'num_stages': 2" in r for r in found.rejected)
        kept = json.loads(found.path.read_text())["configs"]
        assert kept.keys() == {shape.key()}
        assert (kept[shape.key()]["BP"], kept[shape.key()]["BC"], kept[shape.key()]["num_stages"]) == (64, 32, 3)
        assert all(kept[shape.key()][n] in values for n, values in conv.allowed(shape).items())
        with fastsr.use("triton"):
            torch.testing.assert_close(network(), expected, rtol=1e-4, atol=1e-4)
        assert seen[-1] == (64, 32, 3)
        (before,) = json.loads(found.path.read_text())["times"].values()
        assert before["triton"] == pytest.approx(12e3)  # taken again with what was found

        wrong = json.loads(found.path.read_text())
        wrong["configs"][shape.key()]["BP"] = 96
        found.path.write_text(json.dumps(wrong))
        _tables.forget()
        with fastsr.use("triton"), pytest.raises(_tables.TableError, match=r"json: .*at configs of 'conv .*'BP': 96"):
            network()
    finally:
        monkeypatch.undo()
        _tables.forget()


@pytest.mark.interp
def test_default_configurations_are_allowed():
    if _triton.missing() is not None:
        pytest.skip(f"no Triton kernels here: {_triton.missing()}")
    from fastsr.kernels import conv, residual_e

    for dtype, rows, inputs in itertools.product(
        ("float32", "bfloat16"), (1, 3, 16, 48, 64, 256), ((3,), (16,), (64, 32), (65,), (8, 5), (128,))
    ):
        shape = conv.Shape(dtype, "ieee", 9, inputs, rows)
        allowed, config = conv.allowed(shape), conv.default_config(shape)
        assert config.keys() == allowed.keys() and all(config[n] in allowed[n] for n in config), (shape, config)
    shape = residual_e.Shape("bfloat16", "ieee", 64, 4)
    allowed, config = residual_e.allowed(shape), residual_e.default_config(shape)
    assert config.keys() == allowed.keys() and all(config[n] in allowed[n] for n in config)


# Where it is asked for.


def test_optimize_tunes_in_the_first_call_that_succeeds(world, monkeypatch):
    tuned = []
    monkeypatch.setattr("fastsr.tune.tune", lambda run, device, **options: tuned.append((run(), device, options)))
    frozen = optimize(torch.nn.Upsample(scale_factor=2), dtype=torch.float64, tune=True)
    with pytest.raises(NotImplementedError):
        frozen(torch.ones(2))
    assert not tuned
    assert frozen(X).dtype == torch.float32 and frozen(X).shape == (1, 2, 6, 8)
    ((result, device, options),) = tuned
    assert result.dtype == torch.float64 and device == CPU and options == {"again": False}


def test_a_processor_has_nothing_to_tune(capsys):
    with pytest.raises(ValueError, match="tune=True measures kernels of a GPU; got a model on the CPU"):
        optimize(torch.nn.Conv2d(1, 1, 1), tune=True)
    with pytest.raises(ValueError, match="on cpu there is nothing to choose"):
        cuda_clock(CPU)
    assert cli.main(["tune", "carn_m", "--size", "8x9", "--device", "cpu"]) == 1
    assert "fastsr: tune: expected a CUDA device to measure; got cpu" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["tune", "carn_m", "--size", "8x9", "--device", "cuda"]) == 1
        assert "got cuda, and CUDA devices are 0" in capsys.readouterr().err
    assert cli.main(["tune", "carn_m", "--size", "8x9", "--device", "typo"]) == 1
    assert "fastsr: tune: " in capsys.readouterr().err
    for size in ("8", "8x", "0x4", "ax4"):
        with pytest.raises(SystemExit):
            cli.main(["tune", "carn_m", "--size", size])
        assert "--size" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["bench", "tune"])
            assert bench.__main__.main() == 1
        assert "bench tune: expected a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("name", ("carn_m", "sftgan", "memnet"))
def test_noise_is_what_networks_take(name):
    small = {"sftgan": {"blocks": 1, "features": 4, "condition": 2, "hidden": 2, "cond_hidden": 2},
             "memnet": {"channels": 4, "num_memblock": 1, "num_resblock": 1}}  # fmt: skip
    network = fastsr.create(name, **small[name]) if name in small else cli._load(name, "cpu")
    seen = []
    network.register_forward_hook(lambda module, args, result: seen.append(tuple(result.shape)))
    cli._noise(network, network.scales, 5, 6)()
    scales = {(1, 1 if name == "memnet" else 3, 5 * s, 6 * s) for s in network.scales}
    assert set(seen) == scales and len(seen) == 2 * len(network.scales)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _tables.forget()
    try:
        assert cli.main(["tune", "carn_m", "--size", "48x64", "--dtype", "bfloat16", "--seconds", "20"]) == 0
        (path,) = (tmp_path / "fastsr/tuned").iterdir()
        assert str(path) in capsys.readouterr().out
        found = _tables.read(path)
        assert found.times and _tables.stale(found) is None
        assert any("triton" in row for row in found.times.values())
        model = fastsr.load(fastsr.models.embedded.EMBEDDED["carn_m"], device="cuda")
        x = torch.rand(1, 3, 48, 64, device="cuda")
        fast = optimize(model, dtype=torch.bfloat16, tune=True)
        with fastsr.use("eager"):
            expected = model(x, scale=2)
        assert (fast(x, scale=2) - expected).abs().max() < 0.05
        for call in fastsr.explain(fast, x, scale=2):
            assert call.backend in ("cuda", "triton", "eager")
    finally:
        _tables.forget()
