"""``lora_linear_cross_entropy``: a head's loss without its logits."""
