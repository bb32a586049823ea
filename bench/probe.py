"""What has to be measured in a process of its own: memory, first calls, imports.

`python -m bench.probe memory carn 256 fastsr-f32` prints one JSON object; so do `latency` with the same arguments, and
`import` with the name of a package. Bytes are of the resident set: what the process holds, whoever allocated it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.networks import CASES, ROOT, build, inputs_of

UNSEEN = 8  # pixels added to height and width for an image of a size that was not seen before
RETURNED = 65536  # bytes; the C library gives larger blocks back to the system when they are freed


class ProbeError(Exception):
    """A probe that did not end well; the message is the last line it printed."""


def ask(*arguments: str) -> dict[str, Any]:
    """Runs a probe in a fresh interpreter and returns what it found. Raises ProbeError."""
    limits = {"MALLOC_MMAP_THRESHOLD_": str(RETURNED), "MALLOC_TRIM_THRESHOLD_": str(RETURNED)}
    command = [sys.executable, "-m", "bench.probe", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | limits, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise ProbeError(lines[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def _resident(peak: bool = False) -> int:
    """Bytes that the process holds; with `peak` the most it held since `_forget_peak`."""
    if not peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("memory: /proc/self/status says nothing; only Linux is measured")
    return 1024 * int(found[1])


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _packed() -> int:
    """Bytes of the packed weights and folded parameters that fastsr keeps."""
    import torch

    from fastsr import packing

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        return sum(map(size, value)) if isinstance(value, (tuple, list)) else 0

    return sum(size(entry.value) for entries in packing._entries.values() for entry in entries.values())


def memory(name: str, size: int, peer: str) -> dict[str, int]:
    """Bytes of one inference beyond the loaded network.

    prepared: what preparing added for good: copies of weights, graphs, compiled code. kept: what the first call left
    behind, of which `packed` are fastsr's packed weights, the rest workspaces that stay. call: the most that a later
    call held beyond that: activations, workspace and output, whose size is `output`.
    """
    import torch

    from bench.peers import PEERS, Subject

    module = build(CASES[name])
    subject = Subject(module, inputs_of(module, size))
    if not PEERS[peer].ours:
        _ = subject.onnx if "openvino" in peer or "onnx" in peer else subject.graph
    with torch.inference_mode():
        torch.conv2d(torch.zeros(1, 16, 8, 8), torch.zeros(16, 16, 3, 3))  # wakes threads and libraries
        loaded = _resident()
        run = PEERS[peer].prepare(subject)
        prepared = _resident()
        result = run()
        output = result.numel() * result.element_size()
        del result
        kept = _resident()
        _forget_peak()
        run()
        peak = _resident(peak=True)
    return {"prepared": prepared - loaded, "kept": kept - prepared, "packed": _packed(), "call": peak - kept,
            "output": output}  # fmt: skip


def _seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def latency(name: str, size: int, peer: str) -> dict[str, float]:
    """Seconds from a network in memory to results: prepare (optimise, compile; converting to ONNX is not counted), the
    first call, a later one (the median of five), and the first of an image of another size. A peer with a fixed size
    is prepared again for that; eager is the module under `fastsr.use("eager")`, which takes any size."""
    import torch

    import fastsr
    from bench.peers import PEERS, Call, Subject

    module = build(CASES[name])
    first, other = (Subject(module, inputs_of(module, s)) for s in (size, size + UNSEEN))
    prepare: Callable[[Subject], Any] = PEERS[peer].prepare
    if peer == "eager":
        prepare = lambda s: Call(s.module, s.inputs)  # noqa: E731
    elif not PEERS[peer].ours:
        _ = first.onnx, other.onnx
    with torch.inference_mode(), fastsr.use("eager" if peer == "eager" else None):
        prepared, run = _seconds(lambda: prepare(first))
        called = _seconds(run)[0]
        later = sorted(_seconds(run)[0] for _ in range(5))[2]
        again = run.at(other.inputs) if isinstance(run, Call) else lambda: prepare(other)()
        unseen = _seconds(again)[0]
    return {"prepare": prepared, "first": called, "later": later, "unseen": unseen}


def imports(package: str) -> dict[str, float]:
    """Seconds to import a package; for fastsr, after torch."""
    if package == "fastsr":
        import_torch = "import torch, time; "
    else:
        import_torch = "import time; "
    code = f"{import_torch}start = time.perf_counter(); import {package}; print(time.perf_counter() - start)"
    taken = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(done.stderr)
        taken.append(float(done.stdout.strip().splitlines()[-1]))
    return {"seconds": sorted(taken)[1]}


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "import":
        print(json.dumps(imports(rest[0])))
    else:
        print(json.dumps({"memory": memory, "latency": latency}[what](rest[0], int(rest[1]), rest[2])))
