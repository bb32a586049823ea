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
from conftest import relative_error, rms_error
from cuda_cases import CONVOLUTIONS, FLOAT8, FLOOR, convolution, dense, in_float64, maker
from emulated import FAULTS, Emulated, KernelError
from fastsr import _cuda_engine, _cuda_forms
from fastsr._cuda_forms import SM80, SM90, Geometry, lower
from fastsr.op import OPS, _replace, _tensors
from fastsr.ops.conv_act import _defaults, conv_act
from fastsr.recipes import Conv

pytestmark = pytest.mark.emu

CAPABILITIES = {"sm80": (8, 0), "sm90": (9, 0)}
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


@pytest.mark.parametrize("arch", CAPABILITIES)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case, arch):
    compare(conv_act, convolution(case, make), CAPABILITIES[arch])


@pytest.mark.parametrize("arch", CAPABILITIES)
@pytest.mark.parametrize(("factors", "height", "width"), [([2], 16, 20), ([3], 17, 12), ([2, 2], 9, 12)])
def test_linear_tails_are_one_convolution_and_its_frame(factors, height, width, arch):
    """Layer by layer maps of all features would be made in the size of the result; at the borders paddings show."""
    shapes = [(16 * r * r, 16, 3, 3) for r in factors] + [(3, 16, 3, 3)]
    weights, biases = [make(*s) for s in shapes], [make(s[0]) for s in shapes]
    args = OPS["linear_tail"]._bind((make(1, 16, height, width), weights, biases))
    runner = _cuda_engine.Runner(OPS["linear_tail"], *args, device=Emulated(CAPABILITIES[arch]))
    convolutions = [s for s in runner.builder.recipe.steps if isinstance(s, Conv)]
    assert len(convolutions) == 9 and all(c.weight.shape[-1] == 5 for c in convolutions)
    made = compare(OPS["linear_tail"], args, CAPABILITIES[arch])
    exact = OPS["linear_tail"].eager(*_replace(args, [t.double() for t in _tensors(args)]))
    error, scale = (made.double() - exact).abs(), exact.square().mean().sqrt()
    for border in (error[:, :, :4], error[:, :, -4:], error[..., :4], error[..., -4:]):
        assert border.max() < 0.03 * scale


@pytest.mark.parametrize("arch", CAPABILITIES)
def test_float16(arch):
    half = maker(torch.float16)
    for case in ("everything", "32 outputs, odd height", "groups"):
        compare(conv_act, convolution(case, half), CAPABILITIES[arch])
    compare(OPS["residual_e"], list(OPS["residual_e"].samples_of(half))[-1], CAPABILITIES[arch])


@pytest.mark.parametrize("height", [32, 16, 12, 8])
def test_every_width_of_wgmma(height):
    """The number of multiprocessors decides the tile; what is computed does not depend on it, bit for bit."""
    tall = convolution("rcan", make)
    args = ([make(1, 64, 2 * height, 16)], *tall[1:])
    program = _cuda_engine.Runner(conv_act, *args, device=Emulated((9, 0))).program
    heights = {tile(program, multiprocessors)[0]: multiprocessors for multiprocessors in range(1, 200)}
    assert height in heights, "no number of multiprocessors makes such tiles"
    made, other = (emulated.run(conv_act, args, Emulated((9, 0), heights[h])) for h in (height, next(iter(heights))))
    assert torch.equal(made, other)
    # The other main loop adds in another order, and a large value may then round to the neighbouring bfloat16.
    assert relative_error(made, emulated.run(conv_act, args, Emulated((8, 0)))) < 4 * FLOOR[made.dtype]


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
    args = convolution("rcan", make)
    args[0][0][0, 5, 7, 8] = torch.nan
    made = emulated.run(conv_act, args, Emulated(CAPABILITIES[arch]))
    assert made.isnan()[0, :, 6:9, 7:10].all() and made.isnan().sum() == 64 * 9


# Products of e4m3.


@pytest.mark.parametrize("case", FLOAT8)
def test_float8(case):
    """Against float64 of the same rounded values, from which the result differs by the bfloat16 that it is stored in
    and the few values that fall on the other side of a rounding; without rounding it would be far away."""
    block, args = OPS["dense_block"], dense(make, **FLOAT8[case])
    first, second = (emulated.run(block, args, Emulated((9, 0), seed=seed)) for seed in (0, 1))
    assert torch.equal(first, second), "the order of threads changes the result: a race"
    exact = in_float64(block, args)
    assert rms_error(first, exact) < 3e-3 < 6e-3 < rms_error(exact, in_float64(block, [*args[:-1], False]))


@pytest.mark.parametrize("height", [32, 16, 12, 8])
def test_float8_in_every_width_of_wgmma(height):
    block, args = OPS["dense_block"], dense(make, height=2 * height, width=16, growth=64, layers=1)
    program = _cuda_engine.Runner(block, *args, device=Emulated((9, 0))).program
    convolution = program[8 + ctypes.sizeof(_cuda_engine.Float8Params) :]
    heights = {tile(convolution, multiprocessors)[0]: multiprocessors for multiprocessors in range(1, 200)}
    assert height in heights, "no number of multiprocessors makes such tiles"
    made = emulated.run(block, args, Emulated((9, 0), heights[height]))
    assert rms_error(made, in_float64(block, args)) < 3e-3


def test_float8_scales_follow_each_image():
    """An image is the same in any batch, and as exact at any magnitude."""
    block = OPS["dense_block"]
    x, *rest = dense(make, 1)
    rest[1] = [torch.zeros_like(b) for b in rest[1]]  # then powers of two only scale
    images = torch.cat([x, x * 2**13, x * 0, x * 2**-13]).contiguous(memory_format=torch.channels_last)
    made = emulated.run(block, (images, *rest), Emulated((9, 0)))
    alone = emulated.run(block, (x, *rest), Emulated((9, 0), 7))
    for image, factor in zip(made.split(1), (1, 2**13, 0, 2**-13), strict=True):
        assert torch.equal(image, alone * factor)


def test_float8_reads_a_slice_in_place():
    block, (x, *rest) = OPS["dense_block"], dense(make)
    big = torch.full((1, 20, 20, 96), torch.nan, dtype=x.dtype)
    inner = big.permute(0, 3, 1, 2)[:, 16:80, 5 : 5 + x.shape[2], 3 : 3 + x.shape[3]]
    made = emulated.run(block, (inner.copy_(x), *rest), Emulated((9, 0)))
    assert torch.equal(made, emulated.run(block, (x, *rest), Emulated((9, 0))))
    shifted = torch.zeros(1, 20, 20, 99, dtype=x.dtype).permute(0, 3, 1, 2)[:, :64]
    why = _cuda_engine.unsuitable(block, (shifted, *rest), Emulated((9, 0)))
    assert why == "float8 products of a map whose pixels are not 16-byte aligned"


def test_float8_of_what_is_not_finite_or_too_large():
    block, args = OPS["dense_block"], dense(make, 1, growth=64)
    args[0][0, 5, 7, 4] = torch.nan
    made = emulated.run(block, args, Emulated((9, 0)))
    assert made.isnan()[0, :, 4:11, 1:8].all() and made.isnan().sum() == 64 * 49
    x, weights, *rest = dense(make, 1)
    args = (x, [weights[0] * 100, *weights[1:]], *rest)  # what grows is cut at 448 scales
    assert rms_error(emulated.run(block, args, Emulated((9, 0))), in_float64(block, args)) < 3e-3


def test_float8_is_refused_where_it_cannot_be():
    unsuitable, block = _cuda_engine.unsuitable, OPS["dense_block"]
    args = dense(make)
    assert unsuitable(block, args, Emulated((8, 0))) == "float8 products on compute capability 8.0 (needs 9.0)"
    assert "products of 64 -> 40 channels" in unsuitable(block, dense(make, 1, growth=40, layers=1), Emulated((9, 0)))
    half = _replace(args, [t.half() for t in _tensors(args)])
    assert "needs bfloat16" in unsuitable(block, half, Emulated((9, 0)))
    assert block.reasons(*args)["cpu"] == "float8 products (they need a GPU of compute capability 9.0)"


FOUND = {  # the faults that each main loop can have
    "sm80": ("copy wait", "divergent barrier", "syncthreads"),
    "sm90": ("named barrier", "mbarrier wait", "copy wait", "wgmma wait", "proxy fence", "wrong stride",
             "divergent barrier"),
    "float8": ("named barrier", "mbarrier wait", "copy wait", "wgmma wait", "proxy fence", "wrong stride",
               "divergent barrier", "syncthreads"),
}  # fmt: skip


@pytest.mark.parametrize(("arch", "fault"), [(a, f) for a, faults in FOUND.items() for f in faults])
def test_planted_faults_are_found(arch, fault):
    """A test of the tests: each fault is reported, gives NaN or wrong numbers, or makes the seeds differ."""
    op, args = conv_act, convolution("several tiles", make)
    if arch == "float8":
        op, args = OPS["dense_block"], dense(make, 2)
    capability = CAPABILITIES.get(arch, (9, 0))
    sound = emulated.run(op, args, Emulated(capability))
    for seed in range(2):
        try:
            made = emulated.run(op, args, Emulated(capability, seed=seed, fault=fault))
        except KernelError:
            return
        if not torch.equal(made, sound):
            return
    pytest.fail(f"a fault went unnoticed: no {fault}")


def test_every_fault_is_planted_somewhere():
    assert {f for faults in FOUND.values() for f in faults} == set(FAULTS) - {"none"}


def test_structures_are_mirrored():
    sizes = (ctypes.c_int * 7)()
    emulated.library().fastsr_cuda_struct_sizes(ctypes.byref(sizes))
    mirrors = (_cuda_engine.ConvParams, _cuda_engine.GateParams, _cuda_engine.ScaleParams, _cuda_engine.ResidualEParams,
               _cuda_engine.Float8Params)  # fmt: skip
    assert list(sizes) == [*map(ctypes.sizeof, mirrors), 4 * (2 + 5 * 8), 4 * 9]


def test_a_malformed_program_is_refused():
    lib = emulated.library()
    args = convolution("one pixel", make)
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


NETWORKS = [
    *(Geometry((c,), 32, (3, 3), padding=1) for c in (64, 96, 128, 160)),
    *(Geometry((64, c), 64, (3, 3), padding=1) for c in (64, 128)),
    *(Geometry((c,), 64, (3, 3), padding=1, sums=True) for c in (16, 64, 192)),
    *(Geometry((64,), c, (3, 3), padding=1, shuffle=2) for c in (256, 12, 48)),
    *(Geometry((64,), 64, (k, k), stride=s, padding=2, transposed=t)
      for k, s in ((6, 2), (8, 4), (12, 8)) for t in (False, True)),
    *(Geometry((64,) * n, 64, (1, 1)) for n in (2, 4, 16)),
    *(Geometry((64,), 64, (3, 3), padding=1, groups=g) for g in (4, 64)),
    *(Geometry((c,), o, (9, 9), padding=4) for c, o in ((3, 64), (64, 3))),
    Geometry((128,), 128, (5, 5), padding=2),
    Geometry((64,), 64, (3, 3), padding=1, upsample=2),
    Geometry((256,), 256, (3, 3), padding=1),
    Geometry((1,), 9, (17, 17), stride=3, padding=8, transposed=True),
]  # fmt: skip


@pytest.mark.parametrize("arch", [SM80, SM90])
def test_tiles_fit_into_shared_memory(arch):
    for g in NETWORKS:
        if arch == SM90 and not _cuda_forms.suits_sm90(g):
            continue
        form = lower(g, arch)
        for (h, w), n, sms in itertools.product(((1, 1), (48, 48), (339, 510), (720, 1280)), (1, 16), (20, 132)):
            p = _cuda_engine.ConvParams(n=n, grid_h=h, grid_w=w)
            for name in _cuda_engine.FORM_FIELDS:
                setattr(p, name, getattr(form, name))
            p.partial.slot = 0 if g.sums else -1
            _, stages, _, shared = tile(torch.frombuffer(bytearray(8) + bytearray(p), dtype=torch.uint8), sms)
            assert stages >= 2 and shared <= (227 if arch == SM90 else 99) * 1024, (g, h, w)


def test_what_is_refused_says_why():
    device = Emulated((9, 0))
    refused = _cuda_engine.unsuitable(conv_act, convolution("rcan", make), Emulated((7, 5)))
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
