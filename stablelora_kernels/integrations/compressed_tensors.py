"""``keep_in_4_bits``: layers that compressed-tensors stores in NVFP4, for training. Importing needs
neither compressed-tensors nor torchao.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stablelora_kernels.utils.extras import import_extra
from stablelora_kernels.utils.modules import check_module

_PARAMETERS = {"weight_packed", "weight_scale", "weight_global_scale"}
# What compressed-tensors sets on a layer.
_ATTRIBUTES = ("quantization_scheme", "quantization_status", "forward")
# The handle of its hook, in the model's __dict__.
_HOOK = "ct_decompress_hook"
# The dtype of the weights that it decompresses.
_DTYPE = torch.bfloat16


def keep_in_4_bits(model: nn.Module) -> list[str]:
    """Keep the weights that compressed-tensors stores as NVFP4A16 in 4 bits, in place.

    Otherwise compressed-tensors decompresses the whole model to bfloat16 at its first forward, and
    PEFT takes its layers only then. Here each such ``nn.Linear`` gets a ``weight`` that is torchao's
    ``NVFP4Tensor`` of the same bytes, without a copy. PEFT, :func:`~stablelora_kernels.accelerate_peft`
    and :func:`~stablelora_kernels.apply_lora` read that. Call it before PEFT::

        model = AutoModelForCausalLM.from_pretrained("...-NVFP4A16")
        slk.keep_in_4_bits(model)
        model = peft.get_peft_model(model, config)

    compressed-tensors divides by a scale of the whole weight, and torchao multiplies with its
    inverse: some of the float32 products that are rounded to bfloat16 differ in the last bit. The
    model cannot be saved by compressed-tensors afterwards; adapters can.

    Args:
        model: any module. Beside such layers, those in other formats are decompressed, as the first
            forward would do it. A model without such layers stays as it is. So does a layer that
            accelerate moves between devices (a ``device_map`` over several): its hook would be lost.

    Returns:
        The names of the layers.

    Raises:
        ImportError: there are such layers, and torchao 0.16 or newer, or compressed-tensors, is not
            installed. Nothing has changed then.
        TypeError: ``model`` is not a module.
    """
    check_module(model)
    layers = {name: layer for name, layer in model.named_modules() if _is_packed(layer)}
    if not layers:
        return []
    torchao = import_extra("torchao.prototype.mx_formats.nvfp4_tensor", "nvfp4", "keep_in_4_bits")
    library = import_extra("compressed_tensors.compressors", "nvfp4", "keep_in_4_bits")
    for layer in layers.values():
        parameters: Any = {name: layer._parameters.pop(name) for name in _PARAMETERS}
        weight = torchao.NVFP4Tensor(
            parameters["weight_packed"].detach(),
            parameters["weight_scale"].detach(),
            16,
            _DTYPE,
            parameters["weight_global_scale"].detach().reciprocal().squeeze(),
        )
        # The order of nn.Linear.
        bias = layer._parameters.pop("bias", None)
        layer._parameters.update(weight=nn.Parameter(weight, requires_grad=False), bias=bias)
        for name in _ATTRIBUTES:
            layer.__dict__.pop(name, None)
    for hooked in [module for module in model.modules() if _HOOK in module.__dict__]:
        # Decompress what the hook would decompress at the first forward: it would also put hooks on
        # every module, PEFT's included.
        for module in hooked.modules():
            library.decompress_module(module)
        hooked.__dict__.pop(_HOOK).remove()
    return [*layers]


def _is_packed(layer: nn.Module) -> bool:
    """Whether compressed-tensors stores a linear layer as NVFP4A16 and has not decompressed it, and
    its forward is not accelerate's.
    """
    if type(layer) is not nn.Linear or layer._parameters.keys() - {"bias"} != _PARAMETERS:
        return False
    if "_hf_hook" in layer.__dict__:
        return False
    scheme: Any = layer.__dict__.get("quantization_scheme")
    return scheme is None or not (scheme.input_activations or scheme.output_activations)
