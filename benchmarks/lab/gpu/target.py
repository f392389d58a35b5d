"""What ``ncu`` and ``compute-sanitizer`` watch: ``python -m benchmarks.lab.gpu.target dram|small``. See ``_gpu_tools``."""

from __future__ import annotations

import sys
from itertools import product

import torch

import stablelora_kernels as slk
from benchmarks.lab.cost_model.predict import Shape
from benchmarks.lab.gpu import checks, layer, step
from benchmarks.lab.gpu.device import CudaDevice, Device

ARMS = ("frozen", "eager", "ours")
# A kernel of this name, which nothing else here launches, comes before each arm's.
MARKER = "erfinv"
FINISHED = "the small run has finished"
SHAPE = Shape(8192, *layer.TARGET_SIZE, layer.TARGET_R, True)


def dram(device: Device, s: Shape) -> None:
    """Forward and backward of each arm, once, in a region of its own that is profiled."""
    x, grad, arms, _ = layer.build(s, device)
    marker = torch.zeros(1, device=device.device)
    for name in ARMS:
        run = layer.runs(arms[name], x, grad, "both")
        for _ in range(2):
            run()
        device.flush()
        device.synchronize()
        if not device.dry:
            torch.cuda.profiler.start()
        torch.erfinv(marker)
        run()
        device.synchronize()
        if not device.dry:
            torch.cuda.profiler.stop()


def small(device: Device) -> None:
    """Every kernel once or twice on small ragged and aligned shapes, and steps of the optimizer."""
    shapes = ((9, 40, 24, 8),) if device.dry else ((9, 264, 200, 16), (131, 71, 67, 20), (260, 264, 520, 16))
    kernels = ("auto",) if device.dry else ("auto", "split", "vendor")
    for shape, p, kernel in product(shapes, (0.0, 0.1), kernels):
        with slk.use_kernel(kernel):
            checks.run(checks.Case(*shape, p).inputs(device.device), p)
    optimizer = slk.StableLoRAAdamW(
        step.pairs(step.Set("uniform", 4, 4, 64 if device.dry else 2048, torch.float32), device, False), lr=step.LR
    )
    for _ in range(2):
        optimizer.step()
    device.synchronize()


def main() -> None:
    device = CudaDevice()
    with slk.use_backend("triton"):
        if sys.argv[1] == "dram":
            dram(device, SHAPE)
        else:
            small(device)
    print(FINISHED, flush=True)


if __name__ == "__main__":
    main()
