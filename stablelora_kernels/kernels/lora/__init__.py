"""The kernels of the LoRA layer; ``linear`` has the formulas."""
