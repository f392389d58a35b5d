"""The kernels of the optimizer step."""
