"""Instruments that examine Triton kernels without a GPU."""
