"""The operators, one file each. Importing this package registers all of them in `fastsr.op.OPS`."""

from fastsr.ops.conv_act import conv_act
from fastsr.ops.res_block import res_block
from fastsr.ops.residual_e import residual_e
from fastsr.ops.resize_bicubic import resize_bicubic

__all__ = ["conv_act", "res_block", "residual_e", "resize_bicubic"]
