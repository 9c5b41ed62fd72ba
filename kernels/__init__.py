"""Triton kernels of the ops, one file an op family; `registration` makes them torch ops."""
