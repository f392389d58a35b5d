"""One thread for each of the libraries that multiply for NumPy and PyTorch on a CPU.

This module imports nothing: tests/helpers/threads.py runs it before NumPy is imported.
"""

# OpenBLAS, MKL and OpenMP read these environment variables once, when they are loaded. NumPy's
# wheels bring OpenBLAS, by which Triton's interpreter multiplies; PyTorch's bring the other two.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
