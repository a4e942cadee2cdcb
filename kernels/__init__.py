"""Triton kernels, installed as `sslfast.kernels`."""
