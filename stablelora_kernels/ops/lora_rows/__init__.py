"""``lora_rows``: a batch whose rows run several adapters. The files are those of ``ops/lora_linear``."""
