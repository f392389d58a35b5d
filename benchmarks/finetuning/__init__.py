"""``python -m benchmarks``: LoRA fine-tuning side by side."""
