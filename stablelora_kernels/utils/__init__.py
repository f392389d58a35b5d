"""Helpers without LoRA kernels: validation, timing, threads, DTensors and model wrappers."""
