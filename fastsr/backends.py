"""Which kernels each operator has, in order of preference. Importing this module registers them."""

from __future__ import annotations

from functools import partial

from fastsr import _cpu, _cuda_engine, _triton, ops
from fastsr.op import OPS, Backend

for op in OPS.values():
    found = {
        "cuda": Backend(
            partial(_cuda_engine.reason, op), missing=_cuda_engine.missing, prepare=partial(_cuda_engine.Runner, op),
            advice=partial(_cuda_engine.advice, op),
        ),
        "triton": Backend(
            partial(_triton.reason, op), partial(_triton.run, op), _triton.missing, advice=partial(_triton.advice, op)
        ),
    }  # fmt: skip
    if op.recipe_of is not None:
        found["cpu"] = Backend(partial(_cpu.reason, op), missing=_cpu.missing, prepare=partial(_cpu.Runner, op))
    elif op is ops.resize_bicubic:
        found["cpu"] = Backend(_cpu.resize_reason, missing=_cpu.missing, prepare=_cpu.resize)
    op.backends(**found)
