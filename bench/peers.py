"""What is compared, by name: other ways to run the same network, each in its strongest form, and fastsr's.

All get one module and its inputs, on which fastsr's operators stand. The others get it as a graph of plain torch
operators instead: exported with the operators' eager definitions, so that each can fuse, plan and convert what it
likes. It frees every tensor after its last use, and calls torch without any module around it, so it is also the fastest
eager form. ONNX, OpenVINO and ncnn files are made from that graph. A rival whose result is wrong is not timed.

A peer is `prepare(subject) -> run`: what is done once, and then a call without arguments that goes from the image in
memory to the result in memory. Packages are imported when a peer is prepared.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import os
import resource
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastsr
from fastsr.train.trainer import PlainOperators

PNNX_BYTES = 8 << 30
PNNX_SECONDS = 300  # of the processor; it takes all memory and no end with some deep networks
Result = Callable[[], Tensor]


class Absent(Exception):
    """A peer that cannot take part; the message says why."""


class Subject:
    """A frozen module and its inputs, float32 and contiguous, and the forms that peers need, made when asked for."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.module, self.inputs = module, inputs
        self._folder = tempfile.TemporaryDirectory(prefix="fastsr-bench-")

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @functools.cached_property
    def exported(self) -> torch.export.ExportedProgram:
        """The module as a graph of plain torch operators, for inputs of these shapes."""
        with torch.no_grad(), PlainOperators():
            return torch.export.export(self.module, self.inputs, strict=False)

    @functools.cached_property
    def graph(self) -> nn.Module:
        """That graph as a module; its parameters are the module's own."""
        graph = self.exported.module(check_guards=False).requires_grad_(False)
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])  # the same tensor by another name, which ncnn does not know
            graph.graph.erase_node(node)
        graph.recompile()
        return graph

    @functools.cached_property
    def channels_last(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The graph and the inputs, copied to the other layout."""
        inputs = tuple(x.to(memory_format=torch.channels_last) for x in self.inputs)
        with quiet():
            return copy.deepcopy(self.graph).to(memory_format=torch.channels_last), inputs

    @functools.cached_property
    def onnx(self) -> Path:
        """The graph as an ONNX file."""
        need("onnx", "onnxscript")
        path = Path(self._folder.name) / "model.onnx"
        with quiet():
            torch.onnx.export(self.exported, (), path, external_data=False, verbose=False)
        return path

    @functools.cached_property
    def ncnn(self) -> tuple[Path, Path]:
        """The graph as ncnn's two files."""
        need("ncnn", "pnnx")
        import pnnx

        source = Path(self._folder.name) / "model.pt"
        with torch.no_grad(), quiet():
            torch.jit.trace(self.graph, self.inputs, check_trace=False).save(source)
        shapes = ",".join(str(list(x.shape)).replace(" ", "") for x in self.inputs)
        command = [pnnx.EXEC_PATH, source.name, f"inputshape={shapes}", "fp16=0"]
        limits = {resource.RLIMIT_AS: PNNX_BYTES, resource.RLIMIT_CPU: PNNX_SECONDS}

        def limit() -> None:
            for what, most in limits.items():
                resource.setrlimit(what, (most, most))

        done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, preexec_fn=limit)
        if done.returncode != 0:
            allowed = f"{PNNX_BYTES >> 30} GiB and {PNNX_SECONDS} s are allowed"
            raise Absent(f"pnnx ends with status {done.returncode}; {allowed}")
        return source.with_name("model.ncnn.param"), source.with_name("model.ncnn.bin")


class quiet:
    """No warnings, and no log messages below errors: exporters have many."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

    def __exit__(self, *error: object) -> None:
        logging.disable(logging.NOTSET)
        self._warnings.__exit__(*error)


def need(*packages: str) -> None:
    """Raises Absent unless the packages are installed."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise Absent(f"{', '.join(missing)} not installed: pip install {' '.join(missing)}")


def on_cpu(subject: Subject, name: str) -> None:
    """Raises Absent for a subject on another device."""
    if subject.device.type != "cpu":
        raise Absent(f"{name} is compared on the CPU only")


# The rivals.


def eager(subject: Subject) -> Result:
    """torch's operators as they come, in the layout of the image."""
    graph, inputs = subject.graph, subject.inputs
    return lambda: graph(*inputs)


def channels_last(subject: Subject) -> Result:
    """torch's operators, weights and image channels-last."""
    graph, inputs = subject.channels_last
    return lambda: graph(*inputs)


def autocast_bf16(subject: Subject) -> Result:
    """`torch.autocast` to bfloat16, weights and image channels-last. The graph is exported as torch.no_grad() runs it,
    so parameters are cast in every call, as they are for every user of autocast."""
    graph, inputs = subject.channels_last
    device = subject.device.type

    def run() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return graph(*inputs)

    return run


def compiled(subject: Subject) -> Result:
    """`torch.compile` with weights frozen into the code, channels-last on a GPU; the CPU's compiler chooses layouts."""
    graph, inputs = subject.channels_last if subject.device.type == "cuda" else (subject.graph, subject.inputs)
    torch._dynamo.reset()
    run = torch.compile(graph, dynamic=False, options={"freezing": True})
    return lambda: run(*inputs)


def onnxruntime(subject: Subject) -> Result:
    """ONNX Runtime's own CPU kernels, all graph optimisations."""
    on_cpu(subject, "onnxruntime")
    need("onnxruntime")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(subject.onnx), options, providers=["CPUExecutionProvider"])
    feeds = {node.name: x.numpy() for node, x in zip(session.get_inputs(), subject.inputs, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


@functools.cache
def _openvino_core() -> Any:
    import openvino

    return openvino.Core()


def openvino(precision: str, subject: Subject) -> Result:
    """OpenVINO for least latency, computing in `precision` ("f32" or "bf16"); images and results are not copied."""
    on_cpu(subject, "openvino")
    need("openvino")
    core = _openvino_core()
    known = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in known:
        raise Absent("openvino: this processor has no bfloat16 arithmetic")
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(str(subject.onnx), "CPU", options).create_infer_request()
    arrays = [x.numpy() for x in subject.inputs]

    def run() -> Tensor:
        results = request.infer(arrays, share_inputs=True, share_outputs=True)
        return torch.from_numpy(next(iter(results.values())))

    return run


def ncnn(subject: Subject) -> Result:
    """ncnn, float32."""
    on_cpu(subject, "ncnn")
    param, weights = subject.ncnn
    lacking = {line.split()[0] for line in param.read_text().splitlines()[2:] if line.split()[0].count(".")}
    if lacking:  # ncnn ends the process when it runs such a file
        raise Absent(f"ncnn has no {', '.join(sorted(lacking))}")
    import ncnn as library
    import numpy as np

    net = library.Net()
    net.opt.num_threads = torch.get_num_threads()
    if net.load_param(str(param)) != 0 or net.load_model(str(weights)) != 0:
        raise Absent("ncnn does not load what pnnx wrote")
    images = [np.ascontiguousarray(x[0].numpy()) for x in subject.inputs]

    def run() -> Tensor:
        extractor = net.create_extractor()
        for i, image in enumerate(images):
            extractor.input(f"in{i}", library.Mat(image))
        status, result = extractor.extract("out0")
        if status != 0:
            raise Absent(f"ncnn: extract returns {status}")
        return torch.from_numpy(np.array(result))[None]

    return run


# fastsr's own.


@dataclass(frozen=True)
class Call:
    """A module and its inputs, called together; `at` is the same module with other inputs."""

    module: nn.Module
    inputs: tuple[Tensor, ...]

    def __call__(self) -> Tensor:
        return self.module(*self.inputs)

    def at(self, inputs: tuple[Tensor, ...]) -> Call:
        return Call(self.module, inputs)


def module(subject: Subject) -> Call:
    """The module as `fastsr.load` returns it: kernels where there are some, nothing prepared."""
    return Call(subject.module, subject.inputs)


def optimized(dtype: torch.dtype, subject: Subject) -> Call:
    """A network that `fastsr.optimize` made, fed the contiguous float32 image."""
    fast = copy.copy(subject.module)
    try:
        network = fastsr.optimize(subject.module.network, dtype=dtype)
    except ValueError as error:  # e4m3 is for some networks and devices
        raise Absent(str(error)) from error
    fast._modules = {**subject.module._modules, "network": network}
    return Call(fast, subject.inputs)


def backend(name: str, dtype: torch.dtype, subject: Subject) -> Result:
    """An operator forced onto one backend, its parameters frozen and its maps channels-last: as an optimized network
    calls it. On a CPU bfloat16 is the mode of `fastsr.optimize`: bfloat16 products of float32 parameters and maps."""
    from fastsr import packing  # here, so that older commits can be compared

    forced = copy.deepcopy(subject.module)
    inputs = tuple(x.to(memory_format=torch.channels_last) for x in subject.inputs)
    if subject.device.type == "cpu":
        packing.freeze([*forced.buffers()], "bfloat16" if dtype == torch.bfloat16 else "float32")
    else:
        forced, inputs = forced.to(dtype), tuple(x.to(dtype) for x in inputs)

    def run() -> Tensor:
        with fastsr.use(name):
            return forced(*inputs)

    return run


@dataclass(frozen=True)
class Peer:
    """prepare: see the module's docstring. dtype: "f32" or "bf16", what it is compared with. ours: fastsr."""

    name: str
    dtype: str
    prepare: Callable[[Subject], Result]
    ours: bool = False


RIVALS = (
    Peer("eager", "f32", eager),
    Peer("channels_last", "f32", channels_last),
    Peer("compile", "f32", compiled),
    Peer("onnxruntime", "f32", onnxruntime),
    Peer("openvino-f32", "f32", functools.partial(openvino, "f32")),
    Peer("ncnn", "f32", ncnn),
    Peer("autocast-bf16", "bf16", autocast_bf16),
    Peer("openvino-bf16", "bf16", functools.partial(openvino, "bf16")),
)
OURS = (
    Peer("fastsr-module", "f32", module, ours=True),
    Peer("fastsr-f32", "f32", functools.partial(optimized, torch.float32), ours=True),
    Peer("fastsr-bf16", "bf16", functools.partial(optimized, torch.bfloat16), ours=True),
    Peer("fastsr-e4m3", "bf16", functools.partial(optimized, torch.float8_e4m3fn), ours=True),
)
KERNELS = tuple(
    Peer(f"fastsr-{name}-{dtype}", dtype, functools.partial(backend, name, torch_dtype), ours=True)
    for name in ("cpu", "triton", "cuda")
    for dtype, torch_dtype in (("f32", torch.float32), ("bf16", torch.bfloat16))
)
"""An operator's backends, where OURS are those of networks."""

PEERS = {peer.name: peer for peer in (*RIVALS, *OURS, *KERNELS)}


def threads() -> int:
    """The threads that every peer uses: torch's."""
    return torch.get_num_threads()


def processors() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
