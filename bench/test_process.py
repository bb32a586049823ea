"""Memory, first calls and imports, each in a fresh process: `pytest bench/test_process.py -k memory`."""

from __future__ import annotations

import pytest
import torch

from bench import results
from bench.conftest import peers_of, session_of
from bench.networks import CASES
from bench.peers import OURS, RIVALS
from bench.probe import ProbeError, ask

FULL_SIZE = {"rdn": 256, "esrgan": 256}  # height and width at which the goals for memory are set
ELSEWHERE = 128
MEMORY = ("eager", "openvino-f32", "openvino-bf16", "fastsr-f32", "fastsr-bf16")
LATENCY = (*MEMORY, "onnxruntime", "fastsr-module")
LATENCY_OF = ("carn", "rcan")
PACKAGES = ("torch", "fastsr", "openvino", "onnxruntime")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these are figures of processors")


def pytest_generate_tests(metafunc):
    config, quick = metafunc.config, metafunc.config.getoption("quick")
    test, peers = metafunc.function.__name__, peers_of(config, OURS)
    if test == "test_import":
        metafunc.parametrize("package", PACKAGES[:2] if quick else PACKAGES)
        return
    if test == "test_memory":
        peers = [p for p in peers if p in (("eager", "fastsr-f32") if quick else MEMORY)]
        cases = [("carn_m", 128)] if quick else [(n, FULL_SIZE.get(n, ELSEWHERE)) for n in CASES]
    else:
        peers = [p for p in peers if p in (("eager", "fastsr-f32") if quick else LATENCY)]
        cases = [("carn_m", 48)] if quick else [(n, CASES[n].size) for n in LATENCY_OF]
    metafunc.parametrize(("name", "size"), cases, ids=[f"{n}-{s}" for n, s in cases])
    metafunc.parametrize("peer", peers)


@pytest.fixture
def probe(request):
    """probe(kind, name, sample, engine, *arguments): asks, and writes the row."""
    session = session_of(request.config)

    def run(kind: str, name: str, sample: str, engine: str, *arguments: str) -> None:
        if session.done(kind, name, sample, torch.get_num_threads(), engine):
            pytest.skip(f"measured at this commit already: {kind} {name} {sample} {engine}")
        if engine in {p.name for p in RIVALS} and engine != "eager":
            pytest.importorskip(engine.partition("-")[0])
        try:
            found = ask(kind, *arguments)
        except ProbeError as error:
            pytest.fail(f"{' '.join(arguments)}: {error}", pytrace=False)
        session.write(results.new(results.now(), kind, name, sample, engine, extra=found))

    return run


def test_memory(probe, name, size, peer):
    probe("memory", name, f"{size}x{size}", peer, name, str(size), peer)


def test_latency(probe, name, size, peer):
    probe("latency", name, f"{size}x{size}", peer, name, str(size), peer)


def test_import(probe, package):
    pytest.importorskip(package)
    probe("import", package, "", package, package)
