"""Operators and networks on the CPU engine: programs, exactness, determinism, what still runs eager, gradients.

Each convolution form by itself is tested by test_engine.py, and every operator against its definition by test_ops.py.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastsr
from bench import networks
from conftest import ROOT, parity_case, require_backend, rms_error
from fastsr import _cpu, _cpu_bands, _library, packing, recipes
from fastsr.models import NETWORKS
from fastsr.op import OPS, _replace, _tensors
from test_models import UNUSUAL
from test_ops import CASES, samples

LAYOUTS = ("contiguous", "channels_last")
PROGRAMS = [(name, i) for name, i in CASES if OPS[name].recipe_of is not None]


@pytest.fixture(autouse=True)
def cpu():
    require_backend("cpu")
    with fastsr.use("cpu"):
        yield


@pytest.fixture
def threads():
    """Sets torch's number of threads, and back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Programs.


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_buffers_alive_together_do_not_overlap(buffers):
    sizes = [64 * size - size % 5 for size, _, _ in buffers]
    lives = [(min(a, b), max(a, b)) for _, a, b in buffers]
    places, total = _cpu.offsets(sizes, lives)
    for i, (at, size, life) in enumerate(zip(places, sizes, lives, strict=True)):
        assert at % _cpu.ALIGNMENT == 0 and 0 <= at <= at + size <= total
        for other, length, (first, last) in list(zip(places, sizes, lives, strict=True))[:i]:
            apart = at + size <= other or other + length <= at
            assert apart or last < life[0] or life[1] < first


def test_memory_is_shared_once_a_buffer_is_done_with():
    """A chain needs two buffers, whatever its length."""
    places, total = _cpu.offsets([640] * 9, [(i, i + 1) for i in range(9)])
    assert total == 1280 and sorted(set(places)) == [0, 640]


def runner(name: str, sample) -> _cpu.Runner:
    return _cpu.Runner(OPS[name], *OPS[name]._bind(sample))


@pytest.mark.parametrize(("name", "i"), PROGRAMS)
def test_programs_depend_on_no_values_and_no_identities(name, i):
    """The same arguments once all different tensors, once as many of them the same as shapes allow."""
    sample = samples(name, dtype=torch.float32)[i]
    first: dict[tuple[int, ...], Tensor] = {}
    merged = _replace(sample, [first.setdefault(tuple(t.shape), t) for t in _tensors(sample)])
    assert torch.equal(*(runner(name, s)._program(_cpu.PLAIN).code for s in (sample, merged)))


@pytest.mark.parametrize(("name", "i"), PROGRAMS)
def test_layouts_in_place_need_no_copies(name, i):
    sample = samples(name, dtype=torch.float32, layout="channels_last")[i]
    images = [t for t in _cpu._recipe(OPS[name], OPS[name]._bind(sample)).inputs.values() if t.dim() == 4]
    if any(t.shape[2] * t.shape[3] == 1 for t in images):
        pytest.skip("one pixel has no layout")
    steps = torch.ops.fastsr_cpu.profile(*_tensors_and_code(name, sample))
    recipe = _cpu._recipe(OPS[name], OPS[name]._bind(sample))
    sums = sum(getattr(step, "sums", None) is not None and hasattr(step, "sources") for step in recipe.steps)
    assert len(steps) == len(recipe.steps) + sums


def _tensors_and_code(name: str, sample) -> tuple[list[Tensor], Tensor]:
    args = OPS[name]._bind(sample)
    tensors, program = _cpu.Runner(OPS[name], *args).tensors(OPS[name]._allocate(args), *args)
    return tensors, program.code


def workspace(program: _cpu.Program) -> int:
    return _cpu.Header.from_buffer_copy(program.code.numpy().tobytes()).workspace_bytes


@pytest.mark.parametrize("bands", (2, 3, 100))
@pytest.mark.parametrize(("name", "i"), PROGRAMS)
def test_in_bands_it_is_the_same(name, i, bands):
    """The workspace is NaN at first, so a row that no band has made would show."""
    recipe = OPS[name].recipe_of(*OPS[name]._bind(samples(name, dtype=torch.float64)[i]))
    inner = [math.prod(shape[1:]) for buffer, shape in recipe.workspace.items() if buffer != recipe.output]
    cut = _cpu_bands.banded(recipe, max(1, 4 * max(inner, default=0) // bands), least=0)
    if cut is recipe:
        pytest.skip("it is not cut")
    torch.testing.assert_close(recipes.run(cut), recipes.run(recipe), rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode", (_cpu.PLAIN, _cpu.Mode("bfloat16", any_size=False)), ids=("float32", "bfloat16"))
@pytest.mark.parametrize(("name", "i", "parts"), [("conv_chain", 5, 4), ("dense_block", 3, 4), ("dense_block", 4, 4)])
def test_bands_share_a_workspace_and_packed_weights(name, i, parts, mode, monkeypatch):
    sample = samples(name, dtype=torch.float32, layout="channels_last")[i]
    images = {id(t) for t in _images(name, sample)}
    high = [t.repeat(1, 1, 9, 9).contiguous(memory_format=torch.channels_last) for t in _tensors(sample)]
    sample = _replace(sample, [h if id(t) in images else t for h, t in zip(high, _tensors(sample), strict=True)])
    op = OPS[name]
    whole, expected = runner(name, sample)._program(mode), op(*sample)
    limit = runner(name, sample).workspace(*op._bind(sample)) // parts
    monkeypatch.setattr(_cpu_bands, "banded", partial(_cpu_bands.banded, limit=limit, least=0))
    cut = runner(name, sample)._program(mode)
    assert len(cut.code) > len(whole.code) and cut.packs.keys() == whole.packs.keys() and cut.key == whole.key
    assert workspace(cut) < 0.8 * workspace(whole)
    made = torch.empty_like(expected)
    _cpu.Runner(op, *op._bind(sample))(made, *op._bind(sample))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(("name", "shapes", "eager"), [
    # ESRGAN's end, 16 MB in: the upsampled map of 64 channels, the convolution's result and the activation's
    ("conv_chain", [*[(64, 64, 3, 3)] * 3, (3, 64, 3, 3)], 3 * 256),
    # RDN's block: eight layers of 16 MB, and the concatenation of nine, of which the last layer reads a copy
    ("dense_block", [*((64, 64 * i, 3, 3) for i in range(1, 9)), (64, 576, 1, 1)], 16 * 8 + 16 * 9),
])  # fmt: skip
def test_large_maps_do_not_exist_as_a_whole(name, shapes, eager):
    """At 256x256, where the goal for whole networks is 60 % of eager's memory. eager: its maps, in MB."""
    x = torch.empty(1, 64, 256, 256, memory_format=torch.channels_last)
    weights, biases = [torch.empty(s) for s in shapes], [torch.empty(s[0]) for s in shapes]
    rest = ([2, 2, 1, 1], "nearest", "leaky", 0.2) if name == "conv_chain" else ()
    assert OPS[name].workspace(x, weights, biases, *rest) < 0.4 * eager * 2**20


# What is computed.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "i"), CASES)
def test_slices_are_read_and_only_the_output_is_written(name, i, layout):
    """Inputs within NaN on all sides, the output within guards: the same bits, and no guard is touched."""
    sample = samples(name, dtype=torch.float32, layout=layout)[i]
    op = OPS[name]
    expected = op(*sample)

    def surrounded(t: Tensor) -> Tensor:
        if t.dim() != 4:
            return t
        n, c, h, w = t.shape
        whole = torch.full((n, c + 5, h + 2, w + 3), torch.nan).to(memory_format=torch.contiguous_format)
        if t.stride(1) == 1 and c > 1:
            whole = whole.to(memory_format=torch.channels_last)
        return whole[:, 2 : c + 2, 1 : h + 1, 1 : w + 1].copy_(t)

    args = op._bind(_replace(sample, [surrounded(t) for t in _tensors(sample)]))
    spec = op._allocate(args)
    memory = torch.full((spec.numel() + 64,), -7.0)
    out = torch.as_strided(memory, spec.shape, spec.stride(), 32)
    op._backends["cpu"].prepare(*args)(out, *args)
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-6)
    assert (memory[:32] == -7).all() and (memory[-32:] == -7).all() and not (out == -7).any()


@pytest.mark.parametrize(("name", "i"), CASES)
def test_bits_depend_neither_on_threads_nor_on_the_batch(name, i, threads):
    sample = samples(name, dtype=torch.float32, layout="channels_last")[i]
    n = _tensors(sample)[0].shape[0]
    images = {id(t) for t in _images(name, sample)}
    batch = _replace(sample, [torch.cat([t, t.flip(0) * 0.5, t]) if id(t) in images else t for t in _tensors(sample)])
    threads(1)
    expected = OPS[name](*batch)
    for count in (2, 3):
        threads(count)
        assert torch.equal(OPS[name](*batch), expected)
    for part in (expected[:n], expected[2 * n :]):
        assert torch.equal(OPS[name](*sample), part)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", ("carn_m_x2", "rcan_tiny_x4"))
def test_bits_of_networks_depend_neither_on_threads_nor_on_the_batch(case, dtype, threads):
    model = fastsr.optimize(fastsr.load(parity_case(case).state_dict()), dtype=dtype)
    (scale, *_), (low, high) = model.scales, model.value_range
    x = torch.rand(3, 3, 25, 34, generator=torch.Generator().manual_seed(0)) * (high - low) + low
    threads(1)
    expected = model.super_resolve(x, scale)
    for count in (2, 3):
        threads(count)
        assert torch.equal(model.super_resolve(x, scale), expected)
    assert torch.equal(torch.cat([model.super_resolve(image, scale) for image in x.split(1)]), expected)
    assert torch.equal(model.super_resolve(x.flip(0), scale).flip(0), expected)


def _images(name: str, sample) -> list[Tensor]:
    """The tensors of a sample that have one entry an image."""
    if OPS[name].recipe_of is None:
        return [sample[0]]
    return list(_cpu._recipe(OPS[name], OPS[name]._bind(sample)).inputs.values())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "i"), CASES)
def test_nan_in_nan_out(name, i, dtype):
    """Wherever the definition has one."""
    sample = samples(name, dtype=dtype)[i]
    op = OPS[name]
    image = _images(name, sample)[0]
    image[0, 0, image.shape[2] // 2, image.shape[3] // 3] = torch.nan
    wanted = op.eager(*sample).isnan()
    assert wanted.any() and op(*sample).isnan()[wanted].all()


@pytest.mark.parametrize(("name", "i"), PROGRAMS)
def test_bfloat16_products_of_frozen_weights(name, i):
    """float32 in and out. Of white noise, which these samples are, F(4x4, 3x3) loses 1.25e-2, more than of images."""
    sample = samples(name, dtype=torch.float32, layout="channels_last")[i]
    exact = OPS[name].eager(*_replace(sample, [t.double() for t in _tensors(sample)]))
    plain = OPS[name](*sample)
    packing.freeze(_tensors(sample), "bfloat16")
    made = OPS[name](*sample)
    assert made.dtype == torch.float32
    steps = len(_cpu._recipe(OPS[name], OPS[name]._bind(sample)).steps)
    assert rms_error(made, exact) <= 1.5e-2 * steps
    if _library.isa() != "avx512_bf16":
        assert torch.equal(made, plain)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 64), (64, 3), (1, 64), (64, 1)])
def test_first_and_last_layers_multiply_in_float32(inputs, outputs):
    x, weight = torch.randn(1, inputs, 20, 21), torch.randn(outputs, inputs, 3, 3)
    expected = OPS["conv_act"]([x], weight, None, padding=1)
    packing.freeze([weight], "bfloat16")
    assert torch.equal(OPS["conv_act"]([x], weight, None, padding=1), expected)


@pytest.mark.skipif("FASTSR_CPU_ISA" in os.environ, reason="one level of the others")
@pytest.mark.parametrize("level", ("avx2", "avx512"))
def test_the_other_levels(level):
    """Every operator, and small networks, on the kernels for lesser processors."""
    offered = ("baseline", "avx2", "avx512", "avx512_bf16")
    if offered.index(level) >= offered.index(_library.isa() or "baseline"):
        pytest.skip(f"this processor is not above {level}")
    tests = ["tests/test_ops.py", "tests/test_models.py"]
    chosen = "(forward and cpu and not float64) or (parity and cpu and tiny and not float64)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, "-k", chosen]
    environment = os.environ | {"FASTSR_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def in_another_process(code: str, **environment: str) -> str:
    """What Python code prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_below_avx2_it_is_eager():
    code = """
import torch, fastsr
model, x = fastsr.create("carn", scale=2, features=16).eval(), torch.rand(1, 3, 9, 8)
backends = {call.backend for call in fastsr.explain(fastsr.optimize(model, dtype=torch.bfloat16), x)}
with fastsr.use("eager"):
    expected = model(x)
print(backends, torch.allclose(fastsr.optimize(model)(x), expected, atol=1e-6))
"""
    assert in_another_process(code, FASTSR_CPU_ISA="baseline") == "{'eager'} True"


def test_no_operator_imports_torchs_compiler_on_its_first_call():
    code = """
import sys, torch
from fastsr.op import OPS
from test_ops import samples
calls = [(op, sample) for name, op in OPS.items() for sample in samples(name, dtype=torch.float32)[:1]]
assert "sympy" not in sys.modules
with torch.inference_mode():
    for op, sample in calls:
        op(*sample)
        if "sympy" in sys.modules:  # it comes with the compiler
            print(op.name)
            break
"""
    assert in_another_process(code) == ""


def test_threads_are_those_of_torch_and_as_many_as_it_has_now():
    code = """
import os, torch, fastsr
x, weight = torch.rand(1, 64, 200, 200), torch.rand(64, 64, 3, 3)
def count():
    return len(os.listdir("/proc/self/task"))
def kernels():
    fastsr.ops.conv_act([x], weight, None, padding=1)
torch.set_num_threads(1)
kernels()
before = count()
kernels()
print(count() - before)  # none with one thread
torch.set_num_threads(3)
for _ in range(3):
    torch.randn(1 << 22).exp()  # torch's own pool
own = count()
kernels()
print(count() - own)  # which the kernels use
"""
    assert in_another_process(code).split() == ["0", "0"]


def test_memory_that_stays_is_bounded():
    """A large workspace is given back; of small ones, and of all threads' scratch, as much as is stated may stay."""
    code = """
import ctypes, re, torch, fastsr
torch.set_num_threads(2)
def resident():
    ctypes.CDLL(None).malloc_trim(0)
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
def block(height):
    with fastsr.use("cpu"), torch.inference_mode():
        fastsr.ops.res_block(torch.rand(1, 64, height, 512), weight, None, weight, None)
weight = torch.rand(64, 64, 3, 3)
block(16)
before = resident()
block(1536)  # two copies and a map between of 201 MB each
print(resident() - before)
for height in range(16, 512, 31):
    block(height)
print(resident() - before)
"""
    large, small = map(int, in_another_process(code, MALLOC_MMAP_THRESHOLD_="65536").split())
    assert large <= 100 and small <= 256 + 2 * 16 + 100  # MiB


# Reasons.


def test_reasons():
    x, weight = torch.rand(1, 16, 5, 5), torch.rand(16, 16, 3, 3)
    op = OPS["conv_act"]
    assert op.reasons([x], weight)["cpu"] is None
    assert op.reasons([x.double()], weight.double())["cpu"] == "dtype=torch.float64 (needs float32 or bfloat16)"
    many = op.reasons([x] * 25, torch.rand(16, 16 * 25, 3, 3))["cpu"]
    assert many == "25 maps read as one (at most 24)"
    assert op.reasons([x], torch.rand(16, 16, 3, 1))["cpu"] == "a kernel of 3x1 (needs square ones)"
    empty = OPS["res_block"].reasons(x[:0], weight, None, weight, None)["cpu"]
    assert empty is not None and empty.startswith("a tensor is empty: ")
    meta = op.reasons([x.to("meta")], weight.to("meta"))["cpu"]
    assert meta == "the tensors are on meta; this backend computes on the CPU"
    with fastsr.use(None):
        assert torch.isfinite(op([x] * 25, torch.rand(16, 16 * 25, 3, 3))).all()


# Networks.


FEWER = {
    "rcan": {"groups": 2, "blocks": 2},
    "rcan_basicsr": {"groups": 2, "blocks": 2},
    "rdn": {"D": 2},
    "rdn_original": {"D": 2},
    "rdn_plain": {"D": 2},
    "dbpn": {"stages": 3},
    "ddbpn": {"stages": 3},
    "esrgan": {"blocks": 2},
    "memnet": {"num_memblock": 2},
    "memnet_original": {"num_memblock": 2},
}  # of the same blocks


@pytest.mark.parametrize("network", [n for n in NETWORKS if n.name != "outdoor_scene_seg"], ids=lambda n: n.name)
def test_what_still_runs_eager(network):
    """No operator of any network, in no mode; parts that are torch's own (discriminators) are no operators of ours."""
    model = fastsr.create(network.name, **FEWER.get(network.name, {})).eval()
    if not model.scales:
        pytest.skip("its parts are torch's own")
    low, high = model.value_range
    x = torch.rand(1, 1 if model.colour == "y" else 3, 8, 9) * (high - low) + low
    calls = []
    with fastsr.use(None):
        for scale in model.scales:
            extra = {"condition": torch.rand(1, 8, 8 * scale, 9 * scale)} if network.name == "sftgan" else {}
            for m in (model, fastsr.optimize(model), fastsr.optimize(model, dtype=torch.bfloat16)):
                calls += fastsr.explain(m.super_resolve, x, scale, **extra)
            extra = {name: t.bfloat16() for name, t in extra.items()}
            calls += fastsr.explain(model.bfloat16().super_resolve, x.bfloat16(), scale, **extra)
            model.float()
    assert calls
    assert {(c.op, c.refused.get("cpu")) for c in calls if c.backend != "cpu"} == set()


@pytest.mark.parametrize(("name", "config"), UNUSUAL, ids=lambda v: v if isinstance(v, str) else "")
def test_other_sizes(name, config):
    torch.manual_seed(0)
    model = fastsr.create(name, **config).eval()
    low, high = model.value_range
    channels = 1 if model.colour == "y" or config.get("channels") == 1 else 3
    for scale in model.scales:
        for shape in ((2, channels, 7, 10), (1, channels, 1, 1), (1, channels, 1, 6)):
            x = torch.rand(shape) * (high - low) + low
            with torch.no_grad(), fastsr.use("eager"):
                exact = copy.deepcopy(model).double().super_resolve(x.double(), scale)
                plain = model.super_resolve(x, scale)
            with torch.no_grad():
                made, frozen = model.super_resolve(x, scale), fastsr.optimize(model).super_resolve(x, scale)
            assert max(rms_error(made, exact), rms_error(frozen, exact)) <= 2 * rms_error(plain, exact) + 5e-6


TRAINED = [
    *(ROOT / "tests" / "weights" / f"{name}_small_x2.safetensors" for name in ("rcan", "rdn", "esrgan")),
    ROOT / "fastsr" / "train" / "weights" / "carn_m_x234.safetensors",
]


@pytest.mark.parametrize("file", TRAINED, ids=lambda file: file.stem)
def test_bfloat16_is_no_less_exact_than_autocast(file):
    """On trained networks, and with a picture that has edges and waves."""
    model = fastsr.load(file)
    low, high = model.value_range
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(36.0), indexing="ij")
    picture = 0.5 + 0.4 * torch.sin(rows / 3 + torch.tensor([0.0, 1, 2])[:, None, None]) * torch.cos(columns / 2)
    picture = torch.where(rows > columns + 9, 1 - picture, picture)[None] * (high - low) + low
    scale = 2
    with torch.inference_mode():
        made = fastsr.optimize(model, dtype=torch.bfloat16).super_resolve(picture, scale)
        with fastsr.use("eager"):
            exact = copy.deepcopy(model).double().super_resolve(picture.double(), scale)
            with torch.autocast("cpu", torch.bfloat16):
                autocast = model.super_resolve(picture, scale)
    assert rms_error(made, exact) < rms_error(autocast, exact)


@pytest.mark.parametrize(("name", "seed"), [("memnet", 1), ("sftgan", 0), ("srfeat", 1), ("zssr", 0)])
def test_bfloat16_is_no_less_exact_than_autocast_with_any_weights(name, seed):
    """The networks for which it is close, whole, with half a decibel to spare. The others have 4 dB and more."""
    if _library.isa() != "avx512_bf16":
        pytest.skip("no bfloat16 products on this processor")
    case = networks.CASES[name]
    torch.manual_seed(seed)
    model = fastsr.create(case.create, **case.config).eval().requires_grad_(False)
    if case.he:
        for p in model.parameters():
            if p.dim() == 4:
                torch.nn.init.kaiming_normal_(p, nonlinearity="relu")
    whole = networks.Enlarge(model, networks.SCALE, case.enlarged_first)
    inputs = networks.inputs_of(whole, 24)
    frozen = networks.Enlarge(fastsr.optimize(model, dtype=torch.bfloat16), networks.SCALE, case.enlarged_first)
    with torch.inference_mode():
        made = frozen(*inputs)
        with fastsr.use("eager"):
            expected = whole(*inputs)  # float32's own error is a thirtieth of these at most
            with torch.autocast("cpu", torch.bfloat16):
                autocast = whole(*inputs)
    assert rms_error(made, expected) < 0.94 * rms_error(autocast, expected)


# Gradients.


@pytest.mark.parametrize(("name", "i"), CASES)
def test_gradients_are_those_of_the_definition(name, i):
    sample = samples(name, dtype=torch.float32, grad=True)[i]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(OPS[name](*sample).square().mean(), _tensors(sample))

    made = gradients()
    with fastsr.use("eager"):
        expected = gradients()
    for m, e in zip(made, expected, strict=True):
        torch.testing.assert_close(m, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())


def test_training_goes_the_same_way():
    """With the kernels and without: the same losses, but for rounding."""
    case = parity_case("rcan_tiny_x4")
    x, target = (
        case.tensors["input"][:, :, :12, :12],
        torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(3)),
    )

    def losses(backend: str) -> list[float]:
        model = fastsr.load(case.state_dict()).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        found = []
        with fastsr.use(backend):
            for _ in range(8):
                loss = (model(x) / 255 - target).abs().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        return found

    made, expected = losses("cpu"), losses("eager")
    assert expected[-1] < 0.9 * expected[0]
    assert made == pytest.approx(expected, rel=1e-3)
