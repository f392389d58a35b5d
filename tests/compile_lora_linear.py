"""Compile the kernels of lora_linear for a GPU that need not be there: ``python -m tests.compile_lora_linear cuda:90``.

Prints a JSON list with a row for each kernel and case: its name, tiles, bytes of shared memory, matrix instructions and, for
NVIDIA's, registers a thread, bytes spilled and the widest loads.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch

from stablelora_kernels.kernels import lora_linear as kernels
from stablelora_kernels.kernels import lora_linear_launch as launches
from stablelora_kernels.ops.lora_linear import FUSED_MAX_R
from tests.compiling import SHARED_LIMITS, compile_kernel, resources, target

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32"}
MMA = re.compile(r"\b(HGMMA[\w.]*|HMMA[\w.]*|UTC\w*MMA[\w.]*|v_mfma_\w+)")
# x's dtype, A's dtype, rows, rank, what is special about the call.
CASES = [
    (BF16, FP32, 8192, 16, "forward"),
    (BF16, BF16, 8192, 64, "forward"),
    (BF16, FP32, 8192, 128, "forward from s"),
    (FP16, FP32, 16, 8, "forward"),
    (FP32, FP32, 1024, 8, "forward"),
    (BF16, FP32, 8192, 16, "dx"),
    (BF16, FP32, 8192, 64, "dx, dropout"),
    (BF16, FP32, 64, 128, "forward"),
    (BF16, FP32, 64, 128, "dx"),
]


def row(name: str, case: str, where: str, compiled: Any, config: Any) -> dict[str, Any]:
    machine = compiled.asm["sass"] if where.startswith("cuda") else compiled.asm["amdgcn"]
    result = {"kernel": name, "case": case, "config": list(config), "shared": compiled.metadata.shared}
    result["mma"] = sorted(set(MMA.findall(machine)))
    if where.startswith("cuda"):
        result |= resources(compiled.asm["cubin"])
        widths = re.findall(
            r"(?:cp\.async\.\w+\.shared\.global[^;]*?, (0x\w+|\d+)|ld\.global\S*\.v4\.b(32))", compiled.asm["ptx"]
        )
        result["widest_load"] = max((int(a, 0) if a else 4 * int(b) // 8 for a, b in widths), default=0)
    return result


def linear(where: str, dtype: torch.dtype, lora: torch.dtype, m: int, r: int, what: str) -> dict[str, Any]:
    """The forward at N = K = 4096, or dX, which reads W, A and B through swapped strides."""
    config = launches.linear_config(m, 4096, r, dtype, lora, SHARED_LIMITS[where], masked="dropout" in what)
    x, a, load_s, backward = NAMES[dtype], NAMES[lora], "from s" in what, what.startswith("dx")
    types = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "s_ptr", "y_ptr"), x) | {
        "a_ptr": a,
        "b_ptr": a,
        "seed_ptr": "*i64",
    }
    types |= dict.fromkeys(("M", "N", "K", "R", "stride_xm", "stride_sm", "stride_ym"), "i32+")
    types |= {"scaling": "fp32", "threshold": "i32"}
    # Of each matrix one stride is 1: the forward's inner one, dX's outer one.
    inner, outer = ("stride_wk", "stride_ak", "stride_br"), ("stride_wn", "stride_ar", "stride_bn")
    types |= dict.fromkeys(inner if backward else outer, "i32+")
    constants: dict[str, Any] = dict.fromkeys(outer if backward else inner, 1) | {"stride_xk": 1}
    constants |= {"HAS_BIAS": not backward, "LOAD_S": load_s, "STORE_S": not load_s, "MASK_BRANCH": "dropout" in what}
    constants |= {
        "EVEN_K": True,
        "ONE_RANK_BLOCK": r <= config.BLOCK_R,
        "INPUT_PRECISION": "ieee" if dtype == FP32 else "tf32",
    }
    constants |= {key: value for key, value in config._asdict().items() if key.isupper()}
    built = compile_kernel(
        kernels._lora_linear_kernel,
        types,
        constants,
        target(where),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return row("lora_linear", f"{what} {dtype} {lora} m{m} r{r}".replace("torch.", ""), where, built, config)


def shrink(where: str, r: int) -> dict[str, Any]:
    config = launches.shrink_config(8192, r, BF16, FP32, SHARED_LIMITS[where])
    types = {
        "x_ptr": "*bf16",
        "a_ptr": "*fp32",
        "s_ptr": "*bf16",
        "seed_ptr": "*i64",
        "scaling": "fp32",
        "threshold": "i32",
    }
    types |= dict.fromkeys(("M", "K", "R", "stride_xm", "stride_ar", "stride_sm"), "i32+")
    constants = {
        "stride_xk": 1,
        "stride_ak": 1,
        "DROPOUT": True,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_K": config.BLOCK_C,
        "BLOCK_R": config.BLOCK_R,
        "INPUT_PRECISION": "tf32",
    }
    built = compile_kernel(
        kernels._lora_shrink_kernel,
        types,
        constants,
        target(where),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return row("lora_shrink", f"dropout bfloat16 float32 m8192 r{r}", where, built, config)


def grads(where: str, r: int) -> dict[str, Any]:
    """dA and dB with dropout, and dX in the same launch where the rank is above what is fused."""
    with_dx = r > FUSED_MAX_R
    config = launches.weight_grads_config(4096, 4096, r, BF16)
    tile = launches.linear_config(8192, 4096, r, BF16, FP32, SHARED_LIMITS[where], masked=True)
    types = dict.fromkeys(("x_ptr", "w_ptr", "s_ptr", "ds_ptr", "dy_ptr", "dx_ptr"), "*bf16") | {"seed_ptr": "*i64"}
    types |= dict.fromkeys(("a_ptr", "b_ptr", "da_ptr", "db_ptr"), "*fp32")
    strides = ("stride_xm", "stride_wn", "stride_ar", "stride_sm", "stride_dsm", "stride_ym", "stride_dxm")
    types |= dict.fromkeys(("M", "N", "K", "R", *strides), "i32+")
    types |= dict.fromkeys(("TILES_X", "TILES_A", "TILES_B", "threshold"), "i32")
    constants = {"stride_xk": 1, "stride_wk": 1, "stride_ak": 1, "stride_yn": 1, "WITH_DX": with_dx, "DROPOUT": True}
    constants |= {"EVEN_N": True, "BLOCK_M": config.BLOCK_M, "BLOCK_C": config.BLOCK_C, "BLOCK_R": config.BLOCK_R}
    constants |= {"DX_BLOCK_M": tile.BLOCK_M, "DX_BLOCK_K": tile.BLOCK_N, "DX_BLOCK_N": tile.BLOCK_K}
    constants |= {"GROUP_M": tile.GROUP_M, "INPUT_PRECISION": "tf32"}
    used = tile if with_dx else config
    built = compile_kernel(
        kernels._lora_linear_grads_kernel,
        types,
        constants,
        target(where),
        num_warps=used.num_warps,
        num_stages=used.num_stages,
    )
    return row("lora_linear_grads", f"dropout bfloat16 float32 m8192 r{r}", where, built, used)


def main(where: str) -> None:
    rows = [
        *(linear(where, *case) for case in CASES),
        shrink(where, 16),
        shrink(where, 128),
        grads(where, 16),
        grads(where, 128),
    ]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
