"""The Triton kernels: operators, every option of the convolution with every other, networks, and the rule of choice.

On a machine without a GPU the kernels run in Triton's interpreter; on one with a GPU, on it.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastsr
import triton_interpreter
from conftest import parity_case, relative_error
from fastsr import _tables, _triton, ops, recipes
from fastsr.op import OPS, _replace, _tensors
from fastsr.ops.conv_act import conv_shape
from fastsr.recipes import Conv, View
from test_models import UNUSUAL, hints, limit, outputs
from test_ops import CASES, maker, samples, size

pytestmark = pytest.mark.interp

missing = _triton.missing()
if missing is not None:
    pytest.skip(f"no Triton kernels here: {missing}", allow_module_level=True)
DEVICE = "cpu" if _triton.interpreted() else "cuda"
if DEVICE == "cpu":
    triton_interpreter.correct()
conv = importlib.import_module("fastsr.kernels.conv")

default_config = conv.default_config
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def on_device(value):
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    return [on_device(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(autouse=True)
def _true_float32():
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # so that float32 is held to what float32 can do
    yield
    torch.backends.cudnn.allow_tf32 = allowed


# Operators.

# Small samples in every dtype and layout; of the others each in one dtype.
FORMS = [(dtype, "channels_last") for dtype in DTYPES] + [(torch.float32, "contiguous")]
PHASES = (("up_projection", 2), ("down_projection", 2))  # small, but of 64 programs at least
SMALL = [(n, i, *form) for n, i in CASES if size(samples(n)[i]) <= 2000
         for form in (FORMS[:1] if (n, i) in PHASES else FORMS)]  # fmt: skip
SLOW = (("conv_act", 16), ("dense_block", 4), ("resize_bicubic", 4), ("up_projection", 4), ("down_projection", 4),
        ("linear_tail", 6))  # fmt: skip
LARGER = [(n, i, (torch.float32, torch.bfloat16)[i % 2], "channels_last") for n, i in CASES
          if size(samples(n)[i]) > 2000 and (DEVICE == "cuda" or (n, i) not in SLOW)]  # fmt: skip


@pytest.mark.parametrize(("name", "i", "dtype", "layout"), SMALL + LARGER, ids=str)
def test_operators_are_their_definitions(name, i, dtype, layout, monkeypatch):
    op = OPS[name]
    if DEVICE == "cpu" and size(samples(name)[i]) > 2000:  # fewer, larger programs are quicker to interpret
        monkeypatch.setattr(conv, "default_config", lambda shape: default_config(shape) | {"BP": 1024})
    sample = on_device(list(samples(name, dtype=dtype, layout=layout)[i]))
    exact = op.eager(*_replace(sample, [t.double() for t in _tensors(sample)]))
    plain = op.eager(*sample)
    with fastsr.use("triton"):
        made = op(*sample)
    promised = op._alloc(*op._bind(sample))
    assert (made.dtype, made.stride(), made.shape) == (promised.dtype, promised.stride(), promised.shape)
    assert relative_error(made, exact) <= 2 * relative_error(plain, exact) + FLOOR[dtype]


# Options of the convolution, each value of each with each value of each other.

FACTORS = {
    "dtype": DTYPES,
    "size": ((1, 1, 1), (2, 7, 7), (1, 1, 7), (1, 43, 3), (1, 13, 10), (2, 16, 9)),  # tiles have 64 or 128 pixels
    "inputs": ((3,), (16,), (17,), (64,), (65,), (8, 5), (16, 3, 32)),
    "outputs": (1, 3, 17, 64, 65),
    "kernel": (1, 3, 5),
    "form": ("plain", "stride", "transposed", "upsample", "groups"),
    "bias": (False, True),
    "pre": ("none", "affine", "relu", "shift"),
    "act": ("none", "relu", "leaky", "prelu", "prelu of each"),
    "gain": (1.0, -0.5),
    "scale": (False, True),
    "skip": ("none", "one", "two"),
    "end": ("none", "relu", "modulate", "modulate, relu", "outer"),
    "shuffle": ((1, "torch"), (2, "torch"), (2, "tf"), (3, "torch")),
    "sums": (False, True),
}


def valid(case: dict) -> bool:
    """Whether recipes may ask for it; every rule is about two of the options."""
    folded, grouped = case["shuffle"][0] > 1, case["form"] == "groups"
    return not (
        folded and (case["skip"] != "none" or case["end"] not in ("none", "relu") or case["sums"])
        or grouped and (len(case["inputs"]) > 1 or case["shuffle"] == (2, "tf"))
        or case["form"] in ("transposed", "upsample") and case["sums"]
        or case["skip"] == "two" and case["outputs"] == 1
    )  # fmt: skip


def pairs_of(case: dict) -> set:
    return set(itertools.combinations(case.items(), 2))


@cache
def pairwise() -> list[dict]:
    """Cases in which every valid pair of values of two options occurs."""
    chance = random.Random(0)
    left = {
        ((a, x), (b, y)): None for a, b in itertools.combinations(FACTORS, 2) for x in FACTORS[a] for y in FACTORS[b]
    }
    cases = []
    while left:
        pair = next(iter(left))
        tries = [{f: dict(pair).get(f, chance.choice(v)) for f, v in FACTORS.items()} for _ in range(100)]
        best = max(filter(valid, tries), key=lambda t: len(pairs_of(t) & left.keys()), default=None)
        if best is None:  # not a valid pair
            del left[pair]
            continue
        cases.append(best)
        for done in pairs_of(best) & left.keys():
            del left[done]
    return cases


def surrounded(t: Tensor, before: int) -> tuple[Tensor, View]:
    """A channels-last buffer that holds t among channels of NaN, and where."""
    n, c, h, w = t.shape
    whole = torch.full((n, before + c + 3, h, w), torch.nan, dtype=t.dtype).to(memory_format=torch.channels_last)
    whole[:, before : before + c] = t
    return whole, View("", before, c)


@pytest.mark.parametrize("case", pairwise(), ids=lambda case: "-".join(str(v) for v in case.values()))
def test_every_option_with_every_other(case):
    make = maker(len(str(case)))
    n, h, w = case["size"]
    k, (r, order), form, c = case["kernel"], case["shuffle"], case["form"], case["outputs"]
    groups = 2 if form == "groups" else 1
    cout, cin = c * r * r * groups, sum(case["inputs"]) * groups
    stride = 2 if form in ("stride", "transposed") else 1
    weight = make(cin, cout, k, k) if form == "transposed" else make(cout, cin // groups, k, k)
    buffers = {f"x{i}": make(n, ci * groups, h, w) for i, ci in enumerate(case["inputs"])}
    step = Conv(
        tuple(View(name) for name in buffers), weight, make(cout) if case["bias"] else None, View("out"),
        stride, k // 2, groups, form == "transposed",
        pre_scale=make(cin) if case["pre"] == "affine" else None,
        pre_shift=make(cin) if case["pre"] in ("affine", "shift") else None, pre_relu=case["pre"] in ("affine", "relu"),
        upsample=2 if form == "upsample" else 1, act=case["act"].split()[0], slope=0.2,
        prelu=make(cout if "each" in case["act"] else 1) if "prelu" in case["act"] else None,
        gain=case["gain"], scale="scale" if case["scale"] else None, skip_gain=-1.0 if case["gain"] < 0 else 1.0,
        post_relu="relu" in case["end"], shuffle=r, shuffle_order=order, sums="sums" if case["sums"] else None,
    )  # fmt: skip
    buffers["scale"] = make(n, cout)
    shape = conv_shape([buffers[v.buffer] for v in step.sources], weight, stride, k // 2, groups, step.transposed,
                       step.upsample)  # fmt: skip
    shape = (n, shape[1] // (r * r), shape[2] * r, shape[3] * r)
    if case["skip"] != "none":
        step = dataclasses.replace(step, skip=View("skip") if case["skip"] == "one" else (View("skip"), View("skip2")))
        buffers["skip"] = make(n, cout if case["skip"] == "one" else 1, *shape[2:])
        buffers["skip2"] = make(n, max(cout - 1, 1), *shape[2:])
    if "modulate" in case["end"]:
        step = dataclasses.replace(step, modulate=(View("factor"), View("term")))
        buffers["factor"], buffers["term"] = make(*shape), make(*shape)
    if case["end"] == "outer":
        step = dataclasses.replace(step, outer=View("outer"), outer_gain=0.3)
        buffers["outer"] = make(*shape)
    buffers["out"] = torch.full(shape, torch.nan, dtype=torch.float64)
    buffers["sums"] = torch.zeros(n, cout, 3, 3, dtype=torch.float64)

    dtype = case["dtype"]
    low = lambda t: t.to(dtype).to(DEVICE) if isinstance(t, Tensor) else t  # noqa: E731
    ours = dataclasses.replace(step, **{f.name: low(getattr(step, f.name)) for f in dataclasses.fields(step)})
    rounded = dataclasses.replace(step, **{f.name: _double(getattr(ours, f.name)) for f in dataclasses.fields(step)})
    views, lowered = {}, {}
    for name, t in buffers.items():
        if t.dim() == 4 and name != "sums":
            lowered[name], view = surrounded(t.to(dtype), 8)
            lowered[name] = lowered[name].to(DEVICE)
            views[name] = dataclasses.replace(view, buffer=name)
        else:
            lowered[name] = t.to(dtype).float().to(DEVICE)
    exact = {
        name: _double(t if name not in views else views[name].of(lowered).contiguous()) for name, t in lowered.items()
    }
    recipes.eager_conv(rounded, exact)

    def place(v):
        return tuple(map(place, v)) if isinstance(v, tuple) else None if v is None else views[v.buffer]

    named = ("sources", "store", "skip", "modulate", "outer")
    ours = dataclasses.replace(ours, **{name: place(getattr(ours, name)) for name in named})
    _triton._conv(ours, lowered)
    stored, expected = views["out"].of(lowered), exact["out"]
    bound = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert (stored.double() - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))
    assert lowered["out"][:, :8].isnan().all() and lowered["out"][:, 8 + shape[1] :].isnan().all()
    if case["sums"]:
        y = stored.double()
        regions = (y, y[:, :, :1], y[:, :, -1:], y[..., :1], y[..., -1:], y[:, :, :1, :1], y[:, :, :1, -1:],
                   y[:, :, -1:, :1], y[:, :, -1:, -1:])  # fmt: skip
        torch.testing.assert_close(
            lowered["sums"].double(), torch.stack([v.sum((2, 3)) for v in regions], 1), rtol=1e-5, atol=1e-4
        )


def _double(t):
    return t.double().cpu() if isinstance(t, Tensor) else t


@pytest.mark.parametrize("act", ("relu", "leaky", "none"))
def test_nan_in_nan_out(act):
    x = torch.zeros(1, 16, 9, 9, device=DEVICE).to(memory_format=torch.channels_last)
    x[0, 3, 4, 4] = torch.nan
    weight = torch.ones(16, 16, 3, 3, device=DEVICE)
    with fastsr.use("triton"):
        plain = ops.conv_act([x], weight, None, padding=1, act=act, slope=0.1, post_relu=True)
        late = ops.conv_act([x], weight, None, padding=1, pre_relu=True)
    expected = torch.zeros(1, 1, 9, 9, dtype=torch.bool, device=DEVICE)
    expected[:, :, 3:6, 3:6] = True
    assert torch.equal(plain.isnan(), expected.expand_as(plain)) and torch.equal(late.isnan(), plain.isnan())


def test_offsets_of_64_bits_where_an_image_needs_them(monkeypatch):
    monkeypatch.setattr("fastsr.kernels.launch.LARGE", 1)
    for name, i in (("conv_act", 1), ("conv_act", 5), ("residual_e", 0), ("sft_block", 0)):
        sample = on_device(samples(name, dtype=torch.float32, layout="channels_last")[i])
        with fastsr.use("triton"):
            assert relative_error(OPS[name](*sample), OPS[name].eager(*sample)) < 1e-5


@pytest.mark.parametrize(("name", "i"), (("rcab", 0), ("rcab", 3), ("channel_attention", 2)))
def test_sums_of_a_fixed_order(name, i):
    sample = on_device(samples(name, dtype=torch.float32, layout="channels_last")[i])
    torch.use_deterministic_algorithms(True)
    try:
        with fastsr.use("triton"):
            made, again = OPS[name](*sample), OPS[name](*sample)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(made, again) and relative_error(made, OPS[name].eager(*sample)) < 1e-5


def test_changed_weights_are_seen():
    x, weight = torch.randn(1, 16, 5, 5, device=DEVICE), torch.randn(16, 16, 4, 4, device=DEVICE)
    with fastsr.use("triton"):
        before = ops.conv_act([x], weight, None, 2, 1, transposed=True)
        weight.data.mul_(2)
        after = ops.conv_act([x], weight, None, 2, 1, transposed=True)
    torch.testing.assert_close(after, 2 * before)


def test_gradients_come_from_the_definition():
    sample = on_device(samples("rcab", dtype=torch.float32)[0])
    x = sample[0].requires_grad_()
    with fastsr.use("triton"):
        (made,) = torch.autograd.grad(OPS["rcab"](*sample).square().sum(), x)
    (expected,) = torch.autograd.grad(OPS["rcab"].eager(*sample).square().sum(), x)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


# Networks.


@pytest.mark.parametrize(("name", "config"), UNUSUAL, ids=lambda v: v if isinstance(v, str) else "")
def test_small_networks(name, config):
    if DEVICE == "cpu" and (name, config.get("scale")) == ("dbpn", 8):
        pytest.skip("64 phases a transposed convolution: a minute in the interpreter; x2 stands for it")
    torch.manual_seed(0)
    model = fastsr.create(name, **config).eval()
    exact = fastsr.create(name, **config).eval().double()
    exact.load_state_dict(model.state_dict())
    model = model.to(DEVICE, memory_format=torch.channels_last)
    channels = 1 if model.colour == "y" or config.get("channels") == 1 else 3
    low, high = model.value_range
    x = torch.rand(1, channels, 5, 6, dtype=torch.float64) * (high - low) + low
    scale = model.scales[0]
    with torch.no_grad():
        expected = exact.super_resolve(x, scale)
        plain = model.super_resolve(x.float().to(DEVICE), scale).cpu()
        with fastsr.use("triton"):
            made = model.super_resolve(x.float().to(DEVICE).contiguous(memory_format=torch.channels_last), scale).cpu()
    assert relative_error(made, expected) <= 3 * relative_error(plain, expected) + 1e-6


PARITY = ("dbpn_discriminator", "esrgan_discriminator_128", "srfeat_disc_feature", "srfeat_disc_image")


@pytest.mark.parametrize("name", PARITY)
def test_parity(name):
    case = parity_case(name)
    model = fastsr.load(case.state_dict(), dtype=torch.float32, **hints(case)).to(DEVICE)
    if DEVICE == "cuda":
        case = dataclasses.replace(case, tensors={k: t.to(DEVICE) for k, t in case.tensors.items()})
    with torch.inference_mode(), fastsr.use("triton"):
        made = outputs(case, model, torch.float32)
    for key, value in made.items():
        assert relative_error(value, case.tensors[key]) <= limit(case, key, torch.float32), key


# The choice.


@pytest.fixture
def gpu(monkeypatch):
    """What the rule says on a GPU whose times the test gives; tensors stay on the CPU."""
    times: dict = {}
    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    monkeypatch.setattr(_triton, "identity", lambda device: _tables.Identity("Test", "test"))
    monkeypatch.setattr(_tables, "tables", lambda device: (_tables.Table(Path("test.json"), "Test", {}, times),))
    return times


def conv_arguments(layout=torch.channels_last, dtype=torch.bfloat16, **options):
    x = torch.zeros(1, 64, 8, 8, dtype=dtype).to(memory_format=layout)
    return ops.conv_act._bind(([x], torch.zeros(64, 64, 3, 3, dtype=dtype)), {"padding": 1} | options)


def test_the_rule_prefers_the_library_where_nothing_is_saved(gpu):
    advice = _triton.advice
    assert "alone" in advice(OPS["conv_act"], *conv_arguments())
    assert advice(OPS["conv_act"], *conv_arguments(act="relu")) is None
    assert advice(OPS["conv_act"], *conv_arguments(shuffle=2)) is None
    assert advice(OPS["conv_act"], *conv_arguments(transposed=True, stride=2)) is None
    assert "channels_last" in advice(OPS["conv_act"], *conv_arguments(torch.contiguous_format, act="relu"))
    block = samples("rcab", dtype=torch.bfloat16, layout="channels_last")[3]
    assert advice(OPS["rcab"], *OPS["rcab"]._bind(block)) is None
    torch.backends.cudnn.allow_tf32 = False
    assert "TF32" in advice(OPS["conv_act"], *conv_arguments(dtype=torch.float32, act="relu"))
    torch.backends.cudnn.allow_tf32 = True
    assert advice(OPS["conv_act"], *conv_arguments(dtype=torch.float32, act="relu")) is None


def test_measured_times_go_before_the_rule(gpu):
    op, plain, fused = OPS["conv_act"], conv_arguments(), conv_arguments(act="relu")
    gpu[_triton.choice_key(op, plain)] = {"eager": 2.0, "triton": 1.0}
    gpu[_triton.choice_key(op, fused)] = {"eager": 1.0, "triton": 2.0}
    assert _triton.advice(op, *plain) is None
    assert _triton.advice(op, *fused) == "measured: 2.0 us, eager 1.0 us (test.json)"


def test_a_tuned_configuration_is_used(monkeypatch):
    from fastsr.kernels.launch import Launch

    seen: list[Launch] = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (seen.append(self), run(self)))
    shape = conv.Shape("float32", "ieee", 9, (64,), 64)
    tuned = {"BP": 256, "BC": 32, "BK": 16, "WEIGHTS_FIRST": 0, "num_warps": 8, "num_stages": 2}
    table = _tables.Table(Path("test.json"), "", {}, configs={shape.key(): tuned})
    monkeypatch.setattr(_tables, "tables", lambda device: (table,))
    x, weight = torch.randn(1, 64, 9, 9, device=DEVICE), torch.randn(64, 64, 3, 3, device=DEVICE)
    with fastsr.use("triton"):
        made = ops.conv_act([x], weight, None, padding=1)
    (launch,) = seen
    assert all(launch.args[name] == tuned[name] for name in ("BP", "BC", "BK")) and launch.options["num_warps"] == 8
    assert relative_error(made, ops.conv_act.eager([x], weight, None, padding=1)) < 1e-5


def test_the_interpreter_is_never_chosen_by_itself():
    if DEVICE == "cuda":
        pytest.skip("there is a GPU: nothing is interpreted")
    (call,) = fastsr.explain(
        ops.conv_act, [torch.zeros(1, 4, 5, 5)], torch.zeros(4, 4, 3, 3), None, padding=1, act="relu"
    )
    assert call.backend != "triton" and call.refused["triton"] == "Triton's interpreter is for tests"


def test_what_has_no_kernel_says_why():
    x = torch.zeros(1, 4, 5, 5, device=DEVICE)
    for arguments, why in (
        (([x.double()], torch.zeros(4, 4, 3, 3, dtype=torch.float64, device=DEVICE)), "dtype=torch.float64"),
        (([x], torch.zeros(4, 4, 3, 1, device=DEVICE)), "3x1"),
        (([x], torch.zeros(4, 4, 3, 3, device=DEVICE), None, 2, 1, 1, False, None, None, False, 2), "upsampling"),
    ):
        with fastsr.use("triton"), pytest.raises(RuntimeError, match=rf"conv_act: backend 'triton' rejected: .*{why}"):
            ops.conv_act(*arguments)
