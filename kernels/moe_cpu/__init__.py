"""Float32 kernels for a CPU, in C, compiled for the processor at hand when they are first asked for (library.py)."""
