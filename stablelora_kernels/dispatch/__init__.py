"""Every choice of backend, strategy, kernel and tile, each with its reason. Needs no Triton."""
