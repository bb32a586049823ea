"""Triton kernels, one file per operator; installed as fastsr.kernels. Nothing is imported before a plan asks for it."""
