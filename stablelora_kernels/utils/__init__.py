"""Helpers without LoRA kernels: validation, timing, DTensors and model wrappers."""
