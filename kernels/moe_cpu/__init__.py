"""Kernels for a CPU in C (float32; experts in bfloat16 too), compiled for the processor when first asked for (library.py)."""
