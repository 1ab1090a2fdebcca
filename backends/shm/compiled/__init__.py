"""The collectives of shared memory as compiled kernels; nothing here but loading.py may be imported without numba."""
