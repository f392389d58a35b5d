"""Every choice of backend, kernel, form and tile, each with its reason. Needs no Triton."""
