"""The CUDA kernels run on the host (tests/emulation): every operator against float64, and faults that must be found.

Every result is computed twice, with background work done as late and as early as the hardware may, and compared bit for
bit: a difference is a race.
"""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

import emulated
from conftest import relative_error
from emulated import FAULTS, Emulated, KernelError
from fastsr import _cuda_engine, _cuda_forms
from fastsr._cuda_forms import SM80, SM90, Geometry, lower
from fastsr.op import OPS, _replace, _tensors
from fastsr.ops.conv_act import _defaults, conv_act

pytestmark = pytest.mark.emu

CAPABILITIES = {"sm80": (8, 0), "sm90": (9, 0)}
FLOOR = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # as tests/test_ops.py has it


def maker(dtype=torch.bfloat16, layout=torch.channels_last, seed=0):
    """`make(*shape)`: normal values, 4-D tensors in the layout, weights scaled so that results stay near one."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        t = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            t = t / max(1.0, (shape[1] * shape[2] * shape[3]) ** 0.5) if shape[2] == shape[3] else t
            t = t.to(memory_format=layout)
        return t.to(dtype)

    return make


make = maker()


def compare(op, args, capability, **device) -> torch.Tensor:
    """Runs the operator late and early; both are one result, and no further from float64 than eager's. Returns it."""
    args = op._bind(args)
    first, second = (emulated.run(op, args, Emulated(capability, seed=seed, **device)) for seed in (0, 1))
    assert torch.equal(first, second), "the order of threads changes the result: a race"
    exact = op.eager(*_replace(args, [t.double() for t in _tensors(args)]))
    bound = 2 * relative_error(op.eager(*args), exact) + FLOOR[first.dtype]
    assert relative_error(first, exact) <= bound
    return first


@pytest.mark.parametrize("arch", CAPABILITIES)
@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.recipe_of is not None])
def test_operators(name, arch):
    op = OPS[name]
    samples = [op._bind(s) for s in op.samples_of(make)]
    if name == "conv_act":  # below, one feature at a time
        samples = samples[:9]
    weight = [sum(t.numel() for t in _tensors(s)) for s in samples]
    for sample, elements in zip(samples, weight, strict=True):
        if elements < 400_000:
            compare(op, sample, CAPABILITIES[arch])


def conv(inputs, weight, **changed):
    return [make(*s) for s in inputs], make(*weight), *_defaults(**changed)


PADDED = {"padding": 1}
CONVOLUTIONS = {
    "rcan": lambda: conv([(1, 64, 20, 21)], (64, 64, 3, 3), bias=make(64), act="relu", **PADDED),
    "several tiles": lambda: conv([(2, 64, 33, 18)], (64, 64, 3, 3), bias=make(64), act="leaky", slope=0.2, **PADDED),
    "one pixel": lambda: conv([(1, 64, 1, 1)], (64, 64, 3, 3), bias=make(64), **PADDED),
    "16 to 32": lambda: conv([(1, 16, 9, 10)], (32, 16, 3, 3), bias=make(32), **PADDED),
    "32 outputs, odd height": lambda: conv([(1, 64, 19, 9)], (32, 64, 3, 3), bias=make(32), act="relu", **PADDED),
    "slices": lambda: conv([(1, 64, 8, 9), (1, 32, 8, 9), (1, 64, 8, 9)], (32, 160, 3, 3), **PADDED),
    "192 inputs, streamed": lambda: conv([(1, 192, 10, 17)], (64, 192, 3, 3), bias=make(64), **PADDED),
    "128 outputs": lambda: conv([(1, 48, 9, 8)], (128, 48, 3, 3), bias=make(128), **PADDED),
    "everything": lambda: conv(
        [(2, 64, 9, 11)], (64, 64, 3, 3), bias=make(64), act="prelu", prelu=make(64), gain=0.3, scale=make(2, 64),
        skip=make(2, 64, 9, 11), skip_gain=0.5, post_relu=True, **PADDED,
    ),
    "prologue": lambda: conv(
        [(1, 64, 9, 9), (1, 32, 9, 9)], (64, 96, 3, 3), pre_scale=make(96), pre_shift=make(96), pre_relu=True, **PADDED
    ),
    "shuffle": lambda: conv([(1, 64, 9, 8)], (256, 64, 3, 3), bias=make(256), act="relu", shuffle=2, **PADDED),
    "shuffle, tf": lambda: conv([(1, 32, 5, 8)], (128, 32, 3, 3), bias=make(128), shuffle=2, shuffle_order="tf",
                                **PADDED),
    "shuffle by 3": lambda: conv([(1, 64, 5, 4)], (27, 64, 3, 3), shuffle=3, **PADDED),
    "nearest": lambda: conv([(1, 64, 6, 7)], (64, 64, 3, 3), bias=make(64), upsample=2, **PADDED),
    "1x1 of several": lambda: conv([(1, 64, 9, 9)] * 3, (64, 192, 1, 1), bias=make(64)),
    "5x5": lambda: conv([(1, 64, 9, 8)], (64, 64, 5, 5), bias=make(64), padding=2),
    "transposed, 4": lambda: conv([(1, 64, 5, 6)], (64, 64, 8, 8), stride=4, padding=2, transposed=True),
    "strided, 4": lambda: conv([(1, 64, 20, 24)], (64, 64, 8, 8), stride=4, padding=2),
    "transposed, 2": lambda: conv([(1, 64, 5, 6)], (64, 64, 6, 6), stride=2, padding=2, transposed=True),
    "groups": lambda: conv([(1, 64, 10, 11)], (64, 16, 3, 3), bias=make(64), groups=4, **PADDED),
    "groups of 12": lambda: conv([(1, 48, 9, 8)], (32, 12, 3, 3), groups=4, **PADDED),
    "first": lambda: conv([(1, 3, 10, 11)], (64, 3, 3, 3), bias=make(64), **PADDED),
    "last": lambda: conv([(1, 64, 10, 11)], (3, 64, 3, 3), bias=make(3), **PADDED),
    "9x9": lambda: conv([(1, 3, 9, 10)], (64, 3, 9, 9), bias=make(64), padding=4),
}  # fmt: skip


@pytest.mark.parametrize("arch", CAPABILITIES)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case, arch):
    compare(conv_act, CONVOLUTIONS[case](), CAPABILITIES[arch])


@pytest.mark.parametrize("arch", CAPABILITIES)
def test_float16(arch):
    global make
    make = maker(torch.float16)
    try:
        for case in ("everything", "32 outputs, odd height", "groups"):
            compare(conv_act, CONVOLUTIONS[case](), CAPABILITIES[arch])
        sample = list(OPS["residual_e"].samples_of(make))[-1]
        compare(OPS["residual_e"], sample, CAPABILITIES[arch])
    finally:
        make = maker()


@pytest.mark.parametrize("height", [32, 16, 12, 8])
def test_every_width_of_wgmma(height):
    """The number of multiprocessors decides the tile; each of the four instances computes the same bits."""
    tall = CONVOLUTIONS["rcan"]()
    args = ([make(1, 64, 2 * height, 16)], *tall[1:])
    expected = emulated.run(conv_act, args, Emulated((8, 0)))
    for multiprocessors in range(1, 200):
        device = Emulated((9, 0), multiprocessors)
        runner = _cuda_engine.Runner(conv_act, *args, device=device)
        if tile(runner.program, multiprocessors)[0] == height:
            made = emulated.run(conv_act, args, device)
            assert relative_error(made, expected) < FLOOR[made.dtype]
            return
    pytest.fail(f"no number of multiprocessors makes tiles of {height} rows")


def tile(program: torch.Tensor, multiprocessors: int) -> list[int]:
    """height, stages, resident and shared bytes that the first step, a convolution, is launched with."""
    found = (ctypes.c_int * 4)()
    emulated.library().fastsr_cuda_tile(ctypes.c_void_p(program.data_ptr() + 8), multiprocessors, ctypes.byref(found))
    return list(found)


@pytest.mark.parametrize("arch", CAPABILITIES)
def test_memory_around_maps_is_neither_read_nor_written(arch):
    """Inputs are slices of something larger, with NaN on every side, and the result goes into such a slice."""
    block = OPS["dense_block"]
    x, weights, biases, *rest = block._bind(list(block.samples_of(make))[3])
    big = torch.full((1, 20, 20, 96), torch.nan, dtype=x.dtype)
    inner = big.permute(0, 3, 1, 2)[:, 16:80, 5 : 5 + x.shape[2], 3 : 3 + x.shape[3]]
    args = block._bind((inner.copy_(x), weights, biases, *rest))
    expected = compare(block, block._bind((x, weights, biases, *rest)), CAPABILITIES[arch])
    before = big.clone()
    assert torch.equal(emulated.run(block, args, Emulated(CAPABILITIES[arch])), expected)
    assert torch.equal(big.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("arch", CAPABILITIES)
def test_contiguous_images(arch):
    """Maps that are not N, H, W, C are copied."""
    plain = maker(layout=torch.contiguous_format)
    args = ([plain(1, 64, 9, 10)], plain(64, 64, 3, 3), *_defaults(bias=plain(64), padding=1, skip=plain(1, 64, 9, 10)))
    assert compare(conv_act, args, CAPABILITIES[arch]).is_contiguous()


@pytest.mark.parametrize("arch", CAPABILITIES)
def test_an_image_is_the_same_in_any_batch(arch):
    """Channel attention's sums too: their order does not depend on what else is computed."""
    rcab = OPS["rcab"]
    x, *weights = rcab._bind(list(rcab.samples_of(make))[-1])
    x = make(3, 64, 33, 13)
    whole = emulated.run(rcab, (x, *weights), Emulated(CAPABILITIES[arch], 2))
    alone = emulated.run(rcab, (x[1:2].contiguous(memory_format=torch.channels_last), *weights),
                         Emulated(CAPABILITIES[arch], 7))  # fmt: skip
    assert torch.equal(whole[1:2], alone)


@pytest.mark.parametrize("arch", CAPABILITIES)
def test_nan_spreads_as_far_as_it_should(arch):
    args = CONVOLUTIONS["rcan"]()
    args[0][0][0, 5, 7, 8] = torch.nan
    made = emulated.run(conv_act, args, Emulated(CAPABILITIES[arch]))
    assert made.isnan()[0, :, 6:9, 7:10].all() and made.isnan().sum() == 64 * 9


FOUND = {  # the faults that each main loop can have
    "sm80": ("copy wait", "divergent barrier", "syncthreads"),
    "sm90": ("named barrier", "mbarrier wait", "copy wait", "wgmma wait", "proxy fence", "wrong stride",
             "divergent barrier"),
}  # fmt: skip


@pytest.mark.parametrize(("arch", "fault"), [(a, f) for a, faults in FOUND.items() for f in faults])
def test_planted_faults_are_found(arch, fault):
    """A test of the tests: each fault is reported, gives NaN or wrong numbers, or makes the seeds differ."""
    args = CONVOLUTIONS["several tiles"]()
    sound = emulated.run(conv_act, args, Emulated(CAPABILITIES[arch]))
    for seed in range(2):
        try:
            made = emulated.run(conv_act, args, Emulated(CAPABILITIES[arch], seed=seed, fault=fault))
        except KernelError:
            return
        if not torch.equal(made, sound):
            return
    pytest.fail(f"a fault went unnoticed: no {fault}")


def test_every_fault_is_planted_somewhere():
    assert {f for faults in FOUND.values() for f in faults} == set(FAULTS) - {"none"}


def test_structures_are_mirrored():
    sizes = (ctypes.c_int * 6)()
    emulated.library().fastsr_cuda_struct_sizes(ctypes.byref(sizes))
    mirrors = (_cuda_engine.ConvParams, _cuda_engine.GateParams, _cuda_engine.ScaleParams, _cuda_engine.ResidualEParams)
    assert list(sizes) == [*map(ctypes.sizeof, mirrors), 4 * (2 + 5 * 8), 4 * 9]


def test_a_malformed_program_is_refused():
    lib = emulated.library()
    args = CONVOLUTIONS["one pixel"]()
    device = Emulated((8, 0))
    program = _cuda_engine.Runner(conv_act, *args, device=device).program
    with pytest.raises(KernelError, match="-2"):
        device.run([torch.zeros(8)], program)  # slots that do not exist
    for broken in (program[:-1], program[:4], torch.full((8,), 255, dtype=torch.uint8)):
        with pytest.raises(KernelError, match="-2"):
            device.run([torch.zeros(64)] * 8, broken.clone())
    assert lib is not None


# The pure functions.


def table_rows(form):
    """Blocks, chunks and taps of a form's table."""
    blocks = form.table[: 42 * form.blocks].reshape(-1, 42)
    chunks = form.table[42 * form.blocks :][: 9 * form.chunks].reshape(-1, 9)
    return blocks, chunks, form.table[42 * form.blocks + 9 * form.chunks :]


@pytest.mark.parametrize(
    ("geometry", "pairs"),
    [
        (Geometry((64,), 64, (3, 3), padding=1), 64 * 64 * 9),
        (Geometry((64, 32), 32, (3, 3), padding=1), 96 * 32 * 9),
        (Geometry((64,), 64, (3, 3), padding=1, groups=4), 64 * 16 * 9),
        (Geometry((48,), 32, (3, 3), padding=1, groups=4), 48 * 8 * 9),
        (Geometry((64,), 256, (3, 3), padding=1, shuffle=2), 64 * 256 * 9),
        (Geometry((64,), 64, (8, 8), stride=4, padding=2, transposed=True), 64 * 64 * 64),
        (Geometry((3,), 12, (5, 5), padding=2, shuffle=2), 3 * 12 * 25),
    ],
)
@pytest.mark.parametrize("arch", [SM80, SM90])
def test_every_weight_is_packed_as_often_as_it_is_used(geometry, pairs, arch):
    if arch == SM90 and not _cuda_forms.suits_sm90(geometry):
        pytest.skip("computed by the other main loop")
    form = lower(geometry, arch)
    index = form.index[: form.tiles * form.rows * 16]
    used = index[index >= 0]
    times = form.row_pitch  # two output rows at once have the weights twice
    assert used.size == pairs * times and len(set(used.tolist())) == pairs
    blocks, chunks, taps = table_rows(form)
    assert (blocks[:, 0] + blocks[:, 1] <= form.chunks).all() and chunks[:, 6].max() == form.taps_most
    assert (chunks[:, 5] + chunks[:, 6] <= taps.size).all() and taps.min() >= 0


def test_tiles_follow_the_waves():
    """A large image takes the tallest tiles; sixteen training patches take what fills 132 multiprocessors."""
    weight, rest = make(64, 64, 3, 3), _defaults(bias=make(64), padding=1)

    def height(n, h, w):
        x = torch.empty(n, 64, h, w, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
        program = _cuda_engine.Runner(conv_act, [x], weight.to("meta"), *rest, device=Emulated((9, 0))).program
        return tile(program, 132)

    rows, stages, resident, shared = height(1, 720, 1280)
    assert (rows, resident) == (32, 1) and stages >= 4 and shared <= 227 * 1024
    assert height(16, 48, 48)[0] == 12
    assert height(1, 48, 48)[0] == 8


def test_what_is_refused_says_why():
    device = Emulated((9, 0))
    refused = _cuda_engine.unsuitable(conv_act, CONVOLUTIONS["rcan"](), Emulated((7, 5)))
    assert refused == "compute capability 7.5 (needs 8.0)"
    args = ([torch.zeros(1, 4, 5, 6)], torch.zeros(4, 4, 3, 3), *_defaults())
    assert _cuda_engine.unsuitable(conv_act, args, device) == "dtype=torch.float32 (needs bfloat16 or float16)"
    args = ([make(1, 4, 5, 6)], make(4, 4, 3, 3), *_defaults(stride=2, upsample=2))
    assert "upsampling together with a stride" in _cuda_engine.unsuitable(conv_act, args, device)
    args = ([make(1, 1, 5, 6)] * 30, make(4, 30, 3, 3), *_defaults())
    assert "30 maps read as one" in _cuda_engine.unsuitable(conv_act, args, device)
    assert "the tensors are on cpu" in _cuda_engine.reason(conv_act, *args)


def test_all_orders_of_a_weight_tile_are_permutations():
    for arch, rows in itertools.chain(((SM90, 64),), ((SM80, r) for r in (16, 32, 64))):
        row, k = _cuda_forms.tile_order(arch, rows)
        assert len(set(zip(row.tolist(), k.tolist(), strict=True))) == rows * 16
