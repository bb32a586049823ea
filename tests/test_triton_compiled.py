"""Triton kernels compiled ahead of time, for GPUs that need not be there: every variant that a network uses, on the
oldest architecture and on the one they are made for. `compile_kernels.py` says how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")
pytestmark = pytest.mark.aot

KIB = 1024
SHARED = {80: 99 * KIB, 90: 227 * KIB}  # 163 KiB on sm_80 itself; 99 lets the same kernels run on sm_86 and sm_89


@cache
def output(*arguments: str) -> list[dict]:
    """What compile_kernels.py prints, a line of JSON each."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("kind", "capabilities"), (("bfloat16", (80, 90)), ("tf32", (90,)), ("ieee", (90,))))
def test_kernels_of_the_networks(kind, capabilities):
    made = output("variants", kind, *map(str, capabilities))
    assert {k["capability"] for k in made} == set(capabilities) and len(made) > 20
    for kernel in made:
        assert kernel["stack"] == 0 and kernel["spills"] == 0, kernel
        assert kernel["shared"] <= SHARED[kernel["capability"]], kernel
        if kernel["products"] and kind != "ieee":
            assert kernel["tensor_cores"] > 0, kernel
        if kernel["looped"]:  # over blocks of 16 bytes or more, which is what asynchronous copies need
            assert kernel["pipelined"] > 0, kernel


def test_twenty_sizes_of_an_image_are_one_kernel():
    (counts,) = output("sizes")
    assert len(counts) == 11 and all(one == twenty for one, twenty in counts.values()), counts
