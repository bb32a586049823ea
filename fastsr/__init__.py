"""fastsr: super-resolution networks as fast as the hardware allows, without changing what they compute.

    model = fastsr.load("RCAN_BIX4.pt")          # the authors' weights
    bigger = fastsr.upscale(image, model)        # NumPy, PIL or tensor in, the same out
    mixed = fastsr.interpolate("RRDB_PSNR_x4.pth", "RRDB_ESRGAN_x4.pth", 0.8)
    fast = fastsr.optimize(model)                # the frozen inference form
    with fastsr.use("eager"): ...                # force a backend

See `python -m fastsr.info` for what runs on this machine and why the rest does not.
"""

from fastsr import _library

_library.require_torch()

from fastsr import backends  # noqa: E402, F401  (registers the operators and their kernels)
from fastsr.convert import convert  # noqa: E402
from fastsr.evaluate import evaluate  # noqa: E402
from fastsr.image.upscale import upscale  # noqa: E402
from fastsr.models import LoadError, Network, create, interpolate, load  # noqa: E402
from fastsr.op import explain, use  # noqa: E402
from fastsr.optimize import optimize  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "LoadError",
    "Network",
    "convert",
    "create",
    "evaluate",
    "explain",
    "interpolate",
    "load",
    "optimize",
    "upscale",
    "use",
]
