"""``lora_experts_mlp``: a module of experts, its two stacks in one autograd node."""
