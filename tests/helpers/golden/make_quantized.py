"""Writes quantized.json beside this file: small weights as bitsandbytes and torchao store and dequantize them.

    pip install bitsandbytes==0.50.2 torchao==0.18.0 && python tests/helpers/golden/make_quantized.py

bfloat16 and float16 results are written as float32, which holds them exactly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import torchao
from bitsandbytes import functional
from torchao.quantization import Float8WeightOnlyConfig, quantize_

# N, K, block size, nested, the weight's dtype: whole blocks, blocks across rows, half a byte left over.
NF4 = [
    (4, 64, 64, False, torch.bfloat16),
    (5, 37, 64, True, torch.float32),
    (3, 100, 128, True, torch.float16),
    (2, 256, 128, False, torch.float32),
]


def nf4(n: int, k: int, blocksize: int, nested: bool, dtype: torch.dtype) -> dict[str, Any]:
    weight = torch.randn(n, k, dtype=dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
    outer = state.state2
    return {
        "shape": [n, k],
        "blocksize": blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "packed": packed.view(-1).tolist(),
        "absmax": state.absmax.tolist(),
        "code": state.code.tolist(),
        "nested_absmax": outer.absmax.tolist() if nested else None,
        "nested_code": outer.code.tolist() if nested else None,
        "offset": state.offset.item() if nested else None,
        "nested_blocksize": outer.blocksize if nested else 0,
        "dequantized": functional.dequantize_4bit(packed, state).float().view(-1).tolist(),
    }


def fp8(n: int, k: int) -> dict[str, Any]:
    layer = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16))
    quantize_(layer, Float8WeightOnlyConfig())
    weight = layer[0].weight
    return {
        "shape": [n, k],
        "data": weight.qdata.view(torch.uint8).view(-1).tolist(),
        "scale": weight.scale.view(-1).tolist(),
        "dtype": "bfloat16",
        "dequantized": weight.dequantize().float().view(-1).tolist(),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    golden = {
        "made_by": f"bitsandbytes {bitsandbytes.__version__}, torchao {torchao.__version__}, torch {torch.__version__}",
        "nf4": [nf4(*case) for case in NF4],
        "fp8": [fp8(5, 24)],
    }
    path = Path(__file__).with_suffix("").with_name("quantized.json")
    path.write_text(json.dumps(golden) + "\n", encoding="utf-8")
