"""The kernels of the LoRA layer."""
