"""CUDA graphs on CPU tensors: what `fastsr.graphs` asks of CUDA, as far as it can be had without a device.

A capture notes every call of an operator with its tensors, those that the kernels of fastsr make inside included. A
launch fills the tensors that were made with NaN and calls the operators again on the same tensors, in order: it reads
memory, not variables, as a CUDA graph does. Streams are names that a thread gives itself.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsr.op import OPS

MADE_OF_NOTHING = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")


class Recording(TorchDispatchMode):
    """Notes calls as (function, arguments, results to fill)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastsr":
            with self:
                return OPS[func._schema.name.split("::")[1]]._run(*args, **kwargs)
        result = func(*args, **kwargs)
        if func.namespace != "fastsr_cpu" and torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given]
        self.made += made
        if func.overloadpacket.__name__ not in MADE_OF_NOTHING and (made or func._schema.is_mutable):
            self.calls.append((func, args, kwargs, made))
        return result

    def launch(self) -> None:
        for t in self.made:
            if t.is_floating_point():
                t.fill_(torch.nan)
        for func, args, kwargs, made in self.calls:
            result = func(*args, **kwargs)
            if made:
                for own, new in zip(made, tree_leaves(result), strict=True):
                    own.copy_(new)


class Lane:
    """The memory that graphs share: busy while one of them runs."""

    def __init__(self) -> None:
        self.busy = False


class Recorder:
    """Stands for `fastsr.graphs.Cuda`. captures, launches: how many there were; failure: raised by captures."""

    kind = "cpu"

    def __init__(self) -> None:
        self.here = threading.local()
        self.captures = self.launches = 0
        self.failure: Exception | None = None
        self.delay = 0.0
        self.overlaps = 0

    def capturing(self, device) -> bool:
        return getattr(self.here, "capturing", False)

    def stream(self, device):
        return getattr(self.here, "stream", 0)

    def lane(self, device) -> Lane:
        return Lane()

    def warm_up(self, lane, run) -> None:
        run()

    @contextlib.contextmanager
    def captured(self):
        """Inside, this thread's stream is being captured from outside."""
        self.here.capturing = True
        try:
            yield
        finally:
            self.here.capturing = False

    def capture(self, lane, run):
        self.captures += 1
        recording = Recording()
        with self.captured(), recording:
            result = run()
        if self.failure is not None:
            raise type(self.failure)(*self.failure.args)

        def launch():
            self.launches += 1
            self.overlaps += lane.busy
            lane.busy = True
            with torch.inference_mode(False), torch.no_grad():
                recording.launch()
            time.sleep(self.delay)
            lane.busy = False

        return launch, result
