"""``lora_experts``: one stack of experts, for rows that are sorted by expert."""
