"""Helpers that know nothing of LoRA kernels: validation, timing, tensors and modules behind wrappers."""
