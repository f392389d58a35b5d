"""What a gated MLP with LoRA keeps for backward: by formula, counted, and as part of a real training step."""
