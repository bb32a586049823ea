"""Whole networks, image in to image out, all peers in turns: `pytest bench/test_models.py -k carn`.

Every result is compared with float64 before anything is timed. `-k "carn and 128"` chooses a case, `--peers
fastsr-f32,openvino-f32` who takes part, `--quick` a few small ones. Rows are appended to bench/results at once.
"""

from __future__ import annotations

import pytest
import torch

from bench.conftest import peers_of, recorded
from bench.networks import CASES, build, build_trained, inputs_of, trained
from bench.peers import OURS, Subject, processors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATCH = 48  # height and width of the small image of a training patch, at which every network is measured too
QUICK = ("carn", "carn_m", "idn")
SIZES = {"carn_m": (96, 192, 384, 768), "idn": (96, 192, 384, 768, 1024)}  # IDN's maps stay small
MAPS = {"carn_m": 4 * 256 * 4, "idn": 4 * 80}  # bytes of the largest map, a pixel of the small image
ROOM = 7  # of the largest maps that all peers together hold: OpenVINO keeps its own between calls
TRUTH = 192  # the largest image whose result is computed in float64; beyond that eager's has to do
THREADS_OF = "carn"  # the network of the curve over threads
CURVE = ("eager", "channels_last", "openvino-f32", "openvino-bf16", "fastsr-f32", "fastsr-bf16")


def pytest_generate_tests(metafunc):
    config, quick = metafunc.config, metafunc.config.getoption("quick")
    peers, test = peers_of(config, OURS), metafunc.function.__name__
    if test == "test_network":
        names = QUICK if quick else CASES
        cases = [(n, size) for n in names for size in sorted({PATCH} if quick else {PATCH, CASES[n].size})]
        metafunc.parametrize(("name", "size"), cases, ids=[f"{n}-{size}" for n, size in cases])
    elif test == "test_sizes":
        curve = [p for p in peers if p in CURVE]
        peers = [p for p in curve if p.startswith(("eager", "fastsr", "openvino-f32"))] if quick else curve
        cases = [(n, size) for n, sizes in SIZES.items() for size in (sizes[:1] if quick else sizes)]
        metafunc.parametrize(("name", "size"), cases, ids=[f"{n}-{size}" for n, size in cases])
    elif test == "test_threads":
        peers = [p for p in peers if p in CURVE]
        counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < torch.get_num_threads()] + [torch.get_num_threads()]
        metafunc.parametrize("threads", counts[:1] if quick else counts)
    elif test == "test_accuracy":
        peers = [p for p in peers if p != "eager"]
        metafunc.parametrize("name", [*trained()][: 1 if quick else None])
    metafunc.parametrize("peer", peers)


def subject(name: str, size: int) -> Subject:
    """A network of CASES with its image, on the device that is measured."""
    module = build(CASES[name]).to(DEVICE)
    return Subject(module, tuple(x.to(DEVICE) for x in inputs_of(module, size)))


@pytest.mark.benchmark(timer=recorded)
def test_network(show, name, size, peer):
    plan = "patch" if size == PATCH else "network"
    show(("network", name, f"{size}x{size}"), plan, lambda: subject(name, size), peer)


@pytest.mark.benchmark(timer=recorded)
def test_sizes(show, name, size, peer):
    """From a training patch to a photograph; `test_network` measures two more sizes."""
    maps = MAPS[name] * size**2
    if ROOM * maps > _free_memory():
        pytest.skip(f"{name} at {size}x{size} needs {ROOM * maps >> 30} GiB, more than are free")
    key = ("network", name, f"{size}x{size}")
    show(key, "large", lambda: subject(name, size), peer, against_float64=size <= TRUTH)


@pytest.mark.benchmark(timer=recorded)
def test_threads(show, threads, peer):
    before = torch.get_num_threads()
    if threads > processors():
        pytest.skip(f"{threads} threads on {processors()} processors")
    torch.set_num_threads(threads)
    try:
        key = ("network", THREADS_OF, f"{CASES[THREADS_OF].size // 2}x{CASES[THREADS_OF].size // 2}", threads)
        show(key, "large", lambda: subject(THREADS_OF, CASES[THREADS_OF].size // 2), peer)
    finally:
        torch.set_num_threads(before)


def test_accuracy(show, name, peer):
    """Trained networks on a photograph against float64; nothing is timed."""

    def make() -> Subject:
        module = build_trained(trained()[name]).to(DEVICE)
        return Subject(module, tuple(x.to(DEVICE) for x in inputs_of(module, 64)))

    show(("accuracy", name, "64x64"), "accuracy", make, peer)


def _free_memory() -> int:
    """Bytes: of the GPU, or what the system says is available."""
    if DEVICE == "cuda":
        return torch.cuda.mem_get_info()[0]
    psutil = pytest.importorskip("psutil")
    return psutil.virtual_memory().available
