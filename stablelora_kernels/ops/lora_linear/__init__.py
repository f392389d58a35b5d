"""``lora_linear``: one projection, a lone branch or a projection group.

``call.py`` has the records of its two calls and of their results, ``autograd.py`` the gradients,
``torch.py`` and ``triton.py`` the two backends, ``proof.py`` what proves the kernels at first use.
"""
