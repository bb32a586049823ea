"""Triton kernels, one file per operator; installed as fastsr.kernels. Nothing here is imported before a plan asks for it."""
