"""Does training under DeepSpeed's ZeRO give what DistributedDataParallel gives?

    DS_ACCELERATOR=cpu python -m benchmarks.lab.zero  # 20 minutes on two busy cores

It needs deepspeed and a C++ compiler.

Trainer takes four steps on two CPU processes, under DistributedDataParallel and under each stage of
ZeRO: in float32, on a small Llama with PEFT's LoRA, with and without AccelerateCallback. A row says
how many layers the callback put on this library's ops, and the largest difference of A and B from
those of the same optimizer with PEFT under DistributedDataParallel. StableShrink is AdamW with
StableLoRACallback.

DeepSpeed compiles its communication for CPUs at the first run, which takes a minute. A run that is
ended meanwhile leaves a file named lock in ~/.cache/torch_extensions, for which all later runs wait.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

OPTIMIZERS = ("AdamW", "StableLoRAAdamW", "StableShrink")
SHRINK_RATIO = 0.25
ARRANGEMENTS = ("ddp", "0", "1", "2", "3")
ERROR = re.compile(r"\[rank0\]: \w+Error: ")


def train(arrangement: str, optimizer: str, accelerate: bool, out: Path) -> None:
    """One process's part. The first one writes A and B to ``out``."""
    import peft
    import transformers

    import stablelora_kernels as slk
    from stablelora_kernels.nn.take_over import TakesOver

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    model: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=64, **sizes, **heads)
    )
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (32, 12))]
    # Without clipping, for which DeepSpeed has a default of its own.
    options: dict[str, Any] = {"max_grad_norm": 0.0, "ddp_backend": "gloo"}
    if arrangement != "ddp":
        # Of stage 3's parameters, those of fewer elements than the threshold stay whole.
        zero = {"stage": int(arrangement), "stage3_param_persistence_threshold": 0}
        auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size"), "auto")
        options = {
            "deepspeed": {"zero_optimization": zero, "gradient_clipping": 0.0, **auto},
            "max_grad_norm": 0.0,
        }
    args = transformers.TrainingArguments(
        str(out.parent),
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    extra: dict[str, Any] = {}
    if optimizer == "StableLoRAAdamW":
        factory = slk.StableLoRAAdamWFactory.from_args(args, shrink_ratio=SHRINK_RATIO)
        extra["optimizer_cls_and_kwargs"] = factory
    callbacks: list[Any] = [slk.AccelerateCallback(fuse_mlp=True)] if accelerate else []
    if optimizer == "StableShrink":
        callbacks.append(slk.StableLoRACallback(shrink_ratio=SHRINK_RATIO))
    trainer = transformers.Trainer(model, args, train_dataset=rows, callbacks=callbacks, **extra)
    trainer.train()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if hasattr(parameter, "ds_id"):
                import deepspeed

                with deepspeed.zero.GatheredParameters(parameter):
                    found[name] = parameter.detach().clone()
            else:
                found[name] = parameter.detach().clone()
    if trainer.is_world_process_zero():
        layers = [module for module in model.modules() if hasattr(module, "lora_A")]
        ours = sum(isinstance(layer, TakesOver) for layer in layers)
        torch.save((ours, len(layers), found), out)
    torch.distributed.destroy_process_group()


class Trained(NamedTuple):
    """What a run of two processes left."""

    layers_here: int
    layers: int
    # A and B by name.
    found: dict[str, torch.Tensor]


def run(arrangement: str, optimizer: str, accelerate: bool) -> Trained | str:
    """Train in two processes: what they left, or their error."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "found.pt")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        own = ["-m", "benchmarks.lab.zero", "--train", arrangement, optimizer, str(accelerate)]
        command = [sys.executable, *launch, *own, str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return Trained(*torch.load(out))
    errors = [line for line in done.stderr.splitlines() if ERROR.match(line)]
    return errors[0] if errors else done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab.zero", description=__doc__)
    parser.add_argument("--train", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        arrangement, optimizer, accelerate, out = args.train
        train(arrangement, optimizer, accelerate == "True", Path(out))
        # With gloo, a process may abort while its interpreter shuts down.
        os._exit(0)
    print(f"{'optimizer':17}{'arrangement':13}{'layers on our ops':19}largest difference")
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for optimizer, arrangement, accelerate in product(OPTIMIZERS, ARRANGEMENTS, (False, True)):
        name = "DDP" if arrangement == "ddp" else f"ZeRO {arrangement}"
        row = f"{optimizer:17}{name:13}"
        trained = run(arrangement, optimizer, accelerate)
        if isinstance(trained, str):
            print(row + trained, flush=True)
            continue
        # The first run of an optimizer is PEFT's under DistributedDataParallel.
        rival = expected.setdefault(optimizer, trained.found)
        error = max((trained.found[name] - rival[name]).abs().max() for name in rival)
        layers = f"{trained.layers_here} of {trained.layers}"
        print(f"{row}{layers:19}{error:.1e}", flush=True)


if __name__ == "__main__":
    main()
