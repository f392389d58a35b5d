"""Fused LoRA layers and the Stable-LoRA optimizer for PyTorch, in Triton."""
