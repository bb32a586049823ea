"""Which kernels each operator has, in order of preference. Importing this module registers them."""

from __future__ import annotations

from functools import partial

from fastsr import _cpu, ops  # noqa: F401  (registers the operators)
from fastsr.op import OPS, Backend

for op in OPS.values():
    if op.recipe_of is not None:
        cpu = Backend(partial(_cpu.reason, op), missing=_cpu.missing, prepare=partial(_cpu.Runner, op))
        op.backends(cpu=cpu)
