"""Compiles Triton kernels for GPUs that are not there, and says what became of them; run by test_triton_compiled.py.

    python tests/compile_kernels.py variants bfloat16 80 90     one line of JSON for every variant that a network uses;
                                                                with tf32 or ieee for float32, of fewer networks
    python tests/compile_kernels.py sizes                       one line: variants for one size of image, and for twenty

It is a process of its own because kernels are made for the interpreter in the tests' process. Networks run here on tiny
images with launches put on a list instead of on a device: that list, without repetitions, is what gets compiled, with
Triton's own rules about what a kernel is specialised for.
"""

from __future__ import annotations

import collections
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import fastsr
from fastsr import _triton, ops, packing

_triton.interpreted = lambda: True  # tensors on the CPU are accepted, and no table of an architecture is read
assert _triton.missing() is None, _triton.missing()

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastsr.kernels.launch import Launch  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.M)

# Every network as the authors published it; where a configuration changes which kernels run, each of them.
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("carn", {}),
    ("carn", {"mobile": True, "group": 4}),
    ("zssr", {}),
    ("memnet", {}),
    ("memnet_original", {}),
    ("rcan", {}),
    ("rcan_basicsr", {}),
    ("dbpn", {"scale": 2}),
    ("dbpn", {"scale": 4}),
    ("dbpn", {"scale": 8}),
    ("ddbpn", {}),
    ("esrgan", {}),
    ("rdn", {}),
    ("rdn_original", {}),
    ("sftgan", {}),
    ("idn", {}),
    ("srfeat", {}),
    ("msrn", {}),
    ("enhancenet", {}),
]

FEWER = [("carn", {"mobile": True, "group": 4}), ("rcan", {}), ("esrgan", {})]
TASKS: list[tuple[str, Launch, int]] = []  # processes that compile inherit it: launches cannot be sent to them


class Device:
    """Stands for Triton's driver: it says which GPU there is, and that is all that compiling asks."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` would make."""
    made: list[Launch] = []
    run, Launch.run = Launch.run, lambda self: made.append(self)  # type: ignore[method-assign]
    try:
        with torch.no_grad(), fastsr.use("triton"):
            call()
    finally:
        Launch.run = run  # type: ignore[method-assign]
    return made


def keys(made: list[Launch]) -> dict[Any, Launch]:
    """The launches by what Triton would keep them under, so that only different kernels are left."""
    found: dict[Any, Launch] = {}
    compile_ = JITFunction._do_compile
    try:
        for launch in made:

            def note(self: Any, key: Any, *rest: Any, launch: Launch = launch) -> None:
                found.setdefault((self.__name__, key), launch)

            JITFunction._do_compile = note
            launch.kernel.run(grid=launch.grid, warmup=True, **launch.args, **launch.options)
    finally:
        JITFunction._do_compile = compile_
    return found


def network_launches(name: str, config: dict[str, Any], dtype: torch.dtype) -> list[Launch]:
    torch.manual_seed(0)
    model = fastsr.create(name, **config).eval().to(dtype).to(memory_format=torch.channels_last)
    x = torch.rand(1, 1 if model.colour == "y" else 3, 24, 32).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    if name == "sftgan":
        condition = torch.rand(1, 8, 96, 128).to(dtype).contiguous(memory_format=torch.channels_last)
        return launches(lambda: model(x, condition))
    return [each for scale in model.scales for each in launches(partial(model.super_resolve, x, scale))]


def label(name: str, launch: Launch) -> str:
    a = launch.args
    if "KG" not in a:
        return f"{name}: {launch.kernel.__name__}"
    words = [f"{len(a['x'])} inputs"] if len(a["x"]) > 1 else []
    words += [f"U{a['U']}"] * (a["U"] > 1) + [f"stride{a['STRIDE']}"] * (a["STRIDE"] > 1)
    words += [f"groups{a['GROUPS']}"] * (a["GROUPS"] > 1) + [f"fold{a['FOLD']}"] * (a["FOLD"] > 1)
    words += [w for w in ("scale", "skip", "factor", "outer", "sums") if a[w] is not None]
    words += ["pre"] * a["PRE"] + [a["ACT"]] * (a["ACT"] != "none")
    return f"{name}: conv {a['TAPS']}x{a['TAPS']} {a['STARTS'][-1]}-{a['COUT']} {' '.join(words)}"


def compiled(number: int) -> dict[str, Any]:
    """Compiles the launch of this number in TASKS for its GPU."""
    name, launch, capability = TASKS[number]
    driver.set_active(Device(capability))
    start = time.perf_counter()
    kernel = launch.kernel.run(grid=launch.grid, warmup=True, **launch.args, **launch.options)
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        use, code = (
            subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True)
            for option in ("-res-usage", "-sass")
        )
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", use.stdout + use.stderr)
    assert numbers is not None, use
    opcodes = collections.Counter(OPCODE.findall(code.stdout))
    sources = launch.args["x"] if "KG" in launch.args else ()
    aligned = bool(sources) and launch.args["KG"] % 8 == 0 and all(t.shape[1] % 8 == 0 for t in sources)
    looped = aligned and launch.args["TAPS"] ** 2 * launch.args["ENDS"][-1] > 1
    return {
        "label": label(name, launch), "capability": capability, "seconds": round(seconds, 2),
        "registers": int(numbers[1]), "stack": int(numbers[2]), "spills": opcodes["LDL"] + opcodes["STL"],
        "tensor_cores": opcodes["HMMA"] if capability < 90 else opcodes["HGMMA"], "pipelined": opcodes["LDGSTS"],
        "shared": kernel.metadata.shared, "products": "tl.dot" in launch.kernel.src, "looped": looped,
    }  # fmt: skip


def variants(kind: str, capabilities: list[int]) -> Iterator[dict[str, Any]]:
    driver.set_active(Device(capabilities[0]))
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    found: dict[Any, tuple[str, Launch]] = {}
    for name, config in NETWORKS if kind == "bfloat16" else FEWER:
        for key, launch in keys(network_launches(name, config, dtype)).items():
            found.setdefault(key, (name, launch))
    x, w, b = torch.rand(1, 64, 24, 32), torch.rand(4, 64, 1, 1), torch.rand(4)
    attention = [x, w, b, torch.rand(64, 4, 1, 1), torch.rand(64)]
    made = launches(lambda: ops.channel_attention(*(t.to(dtype, memory_format=_format(t)) for t in attention)))
    found |= {key: ("operator", launch) for key, launch in keys(made).items()}
    for factors in ([2], [3], [2, 2], [2, 2, 2]):
        made = launches(partial(tail(factors, dtype), 1, 24, 32))
        found |= {key: (f"tail of x{math.prod(factors)}", launch) for key, launch in keys(made).items()}
    TASKS.extend((name, launch, cc) for name, launch in found.values() for cc in capabilities)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        yield from pool.imap_unordered(compiled, range(len(TASKS)))


def tail(factors: list[int], dtype: torch.dtype) -> Callable[[int, int, int], Tensor]:
    """A call of `linear_tail` on n images of h x w, as optimized networks make it."""
    shapes = [(64 * r * r, 64, 3, 3) for r in factors] + [(3, 64, 3, 3)]
    weights = [torch.rand(s).to(dtype) for s in shapes]
    biases = [torch.rand(s[0]).to(dtype) for s in shapes]
    packing.freeze([*weights, *biases])

    def call(n: int, h: int, w: int) -> Tensor:
        return ops.linear_tail(torch.rand(n, 64, h, w).to(dtype, memory_format=torch.channels_last), weights, biases)

    return call


def _format(t: Tensor) -> torch.memory_format:
    return torch.channels_last if t.dim() == 4 else torch.contiguous_format


def sizes() -> dict[str, list[int]]:
    """Per operator: how many kernels one size of image needs, and how many twenty sizes do."""
    driver.set_active(Device(90))
    random = torch.Generator().manual_seed(0)
    shapes = [(1, 24, 32), (2, 1, 2), (1, 7, 1), (3, 16, 16), (1, 1, 13), (1, 128, 160)]
    shapes += [tuple(int(torch.randint(1, 90, (), generator=random)) for _ in range(3)) for _ in range(14)]

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).to(memory_format=_format(torch.empty(shape)))

    def gate() -> list[Tensor]:
        return [make(4, 64, 1, 1), make(4), make(64, 4, 1, 1), make(64)]

    w, b = make(64, 64, 3, 3), make(64)
    e = make(64, 16, 3, 3)
    merged = tail([2, 2], torch.bfloat16)
    calls: dict[str, Callable[[int, int, int], object]] = {
        "first": lambda *s: ops.conv_act([image(3, *s)], make(64, 3, 3, 3), b, padding=1),
        "last": lambda *s: ops.conv_act([image(64, *s)], make(3, 64, 3, 3), make(3), padding=1),
        "shuffle": lambda *s: ops.conv_act([image(64, *s)], make(256, 64, 3, 3), None, padding=1, shuffle=2),
        "upsample": lambda *s: ops.conv_act([image(64, *s)], w, b, padding=1, upsample=2, act="leaky", slope=0.2),
        "projection": lambda *s: ops.conv_act([image(64, *s)], make(64, 64, 8, 8), b, 4, 2, transposed=True),
        "rcab": lambda *s: ops.rcab(image(64, *s), w, b, w, b, *gate()),
        "attention": lambda *s: ops.channel_attention(image(64, *s), *gate()),
        "residual_e": lambda *s: ops.residual_e(image(64, *s), e, b, e, b, make(64, 64, 1, 1), b, 4),
        "dense_block": lambda *s: ops.dense_block(
            image(64, *s), [make(32, 64, 3, 3), make(32, 96, 3, 3), make(64, 128, 1, 1)], [make(32), make(32), b]
        ),
        "tail": lambda *s: merged(*map(max, s, (1, 2, 2))),
        "resize": lambda n, h, w: ops.resize_bicubic(image(3, n, h, w), 2 * h, 2 * w, 2.0, 2.0, "matlab"),
    }

    def image(c: int, n: int, h: int, w: int) -> Tensor:
        return make(n, c, h, w)

    counts = {}
    for name, call in calls.items():
        found = [set(keys(launches(lambda: call(*shape)))) for shape in shapes]  # noqa: B023
        counts[name] = [len(found[0]), len(set().union(*found))]
    return counts


if __name__ == "__main__":
    if sys.argv[1] == "sizes":
        print(json.dumps(sizes()))
    else:
        for line in variants(sys.argv[2], list(map(int, sys.argv[3:]))):
            print(json.dumps(line), flush=True)
