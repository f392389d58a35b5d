"""``lora_mlp``: a gated MLP. The files are those of ``ops/lora_linear``."""
