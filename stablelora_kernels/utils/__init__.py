"""Helpers without LoRA kernels: validation, timing, threads, DTensors, model wrappers, optional
packages, the hub and lock files.
"""
