"""The operators, one file each. Importing this package registers all of them in `fastsr.op.OPS`.

What needs no file of its own is `conv_act`: the fusion of a cascade is a 1x1 convolution of several inputs, an
upsampler a convolution with `upsample` in front or `shuffle` behind.
"""

from fastsr.ops.channel_attention import channel_attention
from fastsr.ops.conv_act import conv_act
from fastsr.ops.conv_chain import conv_chain
from fastsr.ops.dense_block import dense_block
from fastsr.ops.distillation_block import distillation_block
from fastsr.ops.down_projection import down_projection
from fastsr.ops.linear_tail import linear_tail
from fastsr.ops.memory_block import memory_block
from fastsr.ops.multi_scale_block import multi_scale_block
from fastsr.ops.rcab import rcab
from fastsr.ops.res_block import res_block
from fastsr.ops.residual_e import residual_e
from fastsr.ops.resize_bicubic import resize_bicubic
from fastsr.ops.sft_block import sft_block
from fastsr.ops.sft_layer import sft_layer
from fastsr.ops.up_projection import up_projection

__all__ = [
    "channel_attention",
    "conv_act",
    "conv_chain",
    "dense_block",
    "distillation_block",
    "down_projection",
    "linear_tail",
    "memory_block",
    "multi_scale_block",
    "rcab",
    "res_block",
    "residual_e",
    "resize_bicubic",
    "sft_block",
    "sft_layer",
    "up_projection",
]
