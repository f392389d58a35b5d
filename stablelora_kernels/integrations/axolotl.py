"""``accelerate_peft`` as a plugin of Axolotl. Importing this module needs axolotl.

In the YAML file of a run with ``adapter: lora`` or ``qlora``::

    plugins:
      - stablelora_kernels.integrations.axolotl.Plugin
    stablelora:
      fuse_mlp: true
      fuse_projections: true

The keys under ``stablelora`` are the keywords of :func:`~stablelora_kernels.accelerate_peft`. The
methods of the plugin are those of Axolotl 0.19's ``BasePlugin``
(src/axolotl/integrations/base.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from peft import PeftModel
from pydantic import BaseModel
from torch import nn

from stablelora_kernels.integrations.peft import accelerate_peft, check_accelerate_options

SECTION = "stablelora"
# Axolotl's own LoRA kernels read A and B themselves, so they would take the place of ours. Axolotl
# switches them on where none of these keys is set.
AXOLOTL_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


class Args(BaseModel):
    """What the plugin adds to the keys that Axolotl accepts.

    Attributes:
        stablelora: keywords of :func:`~stablelora_kernels.accelerate_peft`.
    """

    stablelora: dict[str, Any] | None = None


class Plugin(BasePlugin):
    """Runs the PEFT model that Axolotl makes on this library's ops, and prints the report."""

    def get_input_args(self) -> str:
        """The dotted name of the class whose fields Axolotl adds to its own keys."""
        return f"{__name__}.{Args.__name__}"

    def register(self, cfg: MutableMapping[str, Any]) -> None:
        """Check the keys before anything is loaded, and keep Axolotl's own LoRA kernels off.

        Raises:
            TypeError: ``accelerate_peft`` has no such keyword, or a value has another type.
            ValueError: the run trains no LoRA, or switches on LoRA kernels of Axolotl's own.
        """
        _options(cfg)
        adapter = cfg.get("adapter")
        if adapter not in ("lora", "qlora"):
            raise ValueError(f"adapter must be lora or qlora with {__name__}, got {adapter!r}")
        for key in AXOLOTL_KERNELS:
            if cfg.get(key):
                raise ValueError(
                    f"{key} must be false with {__name__}, got {cfg[key]!r}: Axolotl's kernel would take the place of this "
                    "library's"
                )
            cfg[key] = False

    def post_lora_load(self, cfg: Mapping[str, Any], model: nn.Module) -> None:
        """Accelerate the model. A reference model without adapters, and a run that only merges,
        stay as they are.
        """
        if cfg.get("merge_lora") or not isinstance(model, PeftModel):
            return
        report = accelerate_peft(model, **_options(cfg))
        # torchrun and accelerate set RANK; the process group need not exist yet.
        if os.environ.get("RANK", "0") == "0":
            print(f"accelerate_peft: {report}")


def _options(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords under ``stablelora``."""
    options = cfg.get(SECTION) or {}
    if not isinstance(options, Mapping):
        raise TypeError(
            f"{SECTION} must map keywords of accelerate_peft to their values, got {options!r}"
        )
    check_accelerate_options(SECTION, options)
    return dict(options)
