"""The hooks of a module: who calls its class's forward instead of the module skips them."""

from __future__ import annotations

from torch import nn

# The hooks that nn.Module.__call__ runs.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` may do more than run its class's forward."""
    # Runs at every call of a layer: nn.Module's __getattr__ would take longer.
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own
