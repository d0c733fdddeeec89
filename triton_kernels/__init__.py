"""Triton kernels and their launchers, imported as ``lowmem.triton_kernels``; only this folder needs Triton."""
