"""PyTorch operators, their autograd and their PyTorch path."""
