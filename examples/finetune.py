"""Fine-tune a causal language model in a plain loop: LoRALinear layers, StableLoRAAdamW, one
process or many.

python -m examples.finetune --out run               SmolLM2-135M on the plays of Shakespeare
python -m examples.finetune --out run --resume      go on from the last checkpoint
torchrun --nproc-per-node 2 -m examples.finetune --out run --distributed fsdp

A step's batch and dropout go by its number, so that an interrupted run goes on to the same bits.
Another number of processes may resume it, under DDP or FSDP2, whichever wrote the checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

import stablelora_kernels as slk

# So that `python examples/finetune.py` finds the repository's packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.inputs import add_inputs, load_model, load_tokens

# The frozen weights are in the model's own files.
TRAINABLE = StateDictOptions(ignore_frozen_params=True, strict=False)
# What may change where a run is resumed: where the steps are computed, and in which parts.
FREE = {"out", "resume", "distributed", "gradient_accumulation", "checkpointing", "save_every"}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "finetune", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add_inputs(parser)
    add(
        "--out",
        type=Path,
        required=True,
        help="directory for checkpoints and, at the end, the adapter",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add(
        "--distributed",
        choices=("none", "ddp", "fsdp"),
        default="none",
        help="how torchrun's processes share the work",
    )
    add("--steps", type=int, default=100, help="optimizer steps of the whole run")
    add("--save-every", type=int, default=25, help="steps between two checkpoints")
    add("--batch-size", type=int, default=4, help="sequences a step, of all processes together")
    add(
        "--gradient-accumulation",
        type=int,
        default=1,
        help="parts in which a process computes its sequences",
    )
    add("--length", type=int, default=128, help="tokens a sequence")
    add(
        "--target-modules",
        nargs="+",
        default=["q_proj", "v_proj"],
        help="ends of the names of the layers to adapt",
    )
    add("--rank", type=int, default=8)
    add("--dropout", type=float, default=0.0, help="of the LoRA branch")
    add("--lr", type=float, default=1e-3)
    add("--shrink-ratio", type=float, default=5e-4, help="lambda of Stable-LoRA")
    add(
        "--checkpointing",
        action="store_true",
        help="compute activations anew in the backward pass, to save memory",
    )
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("steps", "save_every", "batch_size", "gradient_accumulation"):
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
            )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.distributed == "none" and world > 1:
        parser.error(
            f"--distributed must be ddp or fsdp for torchrun's {world} processes, got none"
        )
    if args.distributed != "none" and "RANK" not in os.environ:
        parser.error(
            f"--distributed {args.distributed} needs torchrun --nproc-per-node N -m examples.finetune ..."
        )
    parts = world * args.gradient_accumulation
    if args.batch_size % parts:
        parser.error(
            f"--batch-size must be a multiple of {world} processes x {args.gradient_accumulation} parts, got {args.batch_size}"
        )
    return args


def checkpoint_to_resume(args: argparse.Namespace, settings: dict[str, str]) -> Path | None:
    """The last one in --out, of a run with these settings."""
    # A checkpoint's .metadata is written last.
    last = max((file.parent for file in args.out.glob("step-*/.metadata")), default=None)
    if args.resume and last is None:
        sys.exit(f"--resume needs a checkpoint in --out, got {args.out} without one")
    if last and not args.resume:
        sys.exit(
            f"--out {args.out} holds {last.name} of another run: --resume it, or name another directory"
        )
    before = json.loads((args.out / "settings.json").read_text()) if last else settings
    for name, value in settings.items():
        if before[name] != value:
            sys.exit(f"--{name.replace('_', '-')} was {before[name]} in {args.out}, got {value}")
    return last


def distribute(model: torch.nn.Module, how: str, device: torch.device) -> torch.nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # A transformers model names the classes of its blocks.
        for block in [
            m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())
        ]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def averaging(model: torch.nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """Around a forward and backward pass: gradients are averaged over the processes, or kept for
    the next pass.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    return (
        model.no_sync()
        if isinstance(model, DistributedDataParallel) and not now
        else contextlib.nullcontext()
    )


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    settings = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    last = checkpoint_to_resume(args, settings)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    rank, world = 0, 1
    if args.distributed != "none":
        dist.init_process_group()
        rank, world = dist.get_rank(), dist.get_world_size()
    say = tqdm.write if rank == 0 else lambda _: None

    model, tokenizer = load_model(args.model, AutoModelForCausalLM)
    text, held_out = load_tokens(args.text, tokenizer, args.length)
    torch.manual_seed(args.seed)
    options = {"r": args.rank, "lora_alpha": 2 * args.rank, "lora_dropout": args.dropout}
    try:
        say(str(slk.apply_lora(model, args.target_modules, **options)))
    except ValueError as error:
        sys.exit(str(error))
    model.to(device).train()
    if args.checkpointing:
        # Older transformers have it under the second name alone.
        enable = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    model = distribute(model, args.distributed, device)
    hyper = {
        "lr": args.lr,
        "shrink_ratio": args.shrink_ratio,
        "max_grad_norm": 1.0,
        "seed": args.seed,
    }
    optimizer = slk.StableLoRAAdamW.from_model(model, **hyper)
    schedule = get_linear_schedule_with_warmup(optimizer, args.steps // 10, args.steps)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            return model(input_ids=rows, labels=rows, use_cache=False).loss

    @torch.no_grad()
    def held_out_loss() -> float:
        model.eval()
        losses = [len(rows) * loss_of(rows).item() for rows in held_out.split(8)]
        model.train()
        return sum(losses) / len(held_out)

    def state() -> dict:
        parameters, moments = get_state_dict(model, optimizer, options=TRAINABLE)
        return {"model": parameters, "optimizer": moments, "schedule": schedule.state_dict()}

    if last:
        saved = state()
        checkpoint.load(saved, checkpoint_id=last)
        moments = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
        set_state_dict(model, optimizer, options=TRAINABLE, **moments)
        schedule.load_state_dict(saved["schedule"])
    elif rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "settings.json").write_text(json.dumps(settings, indent=2))
    start = schedule.last_epoch
    say(f"step {start}: held-out loss {held_out_loss():.3f}")

    for step in (
        bar := tqdm(range(start, args.steps), initial=start, total=args.steps, disable=rank > 0)
    ):
        draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        starts = torch.randint(
            len(text) - args.length + 1, (args.batch_size,), generator=draw
        ).tolist()
        mine = torch.stack([text[i : i + args.length] for i in starts]).chunk(world)[rank]
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)
        parts, total = mine.chunk(args.gradient_accumulation), torch.zeros((), device=device)
        for i, rows in enumerate(parts, 1):
            with averaging(model, now=i == len(parts)):
                loss = loss_of(rows) / len(parts)
                loss.backward()
            total += loss.detach()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(total)
        bar.set_postfix(loss=f"{total.item() / world:.3f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            checkpoint.save(state(), checkpoint_id=args.out / f"step-{step + 1:06d}")

    latched = [pair.latched for pair in optimizer.stability()]
    say(
        f"step {args.steps}: held-out loss {held_out_loss():.3f}, {sum(latched)} of {len(latched)} pairs latched"
    )
    slk.save_adapter(model, args.out / "adapter")
    say(f"adapter in {args.out / 'adapter'}")
    if dist.is_initialized():
        # Until rank 0 has written it.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        main()
    except (KeyboardInterrupt, checkpoint.CheckpointException) as error:
        # Interrupted while it was saving: that checkpoint has no .metadata, and the one before it
        # counts.
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        if not isinstance(causes[0], KeyboardInterrupt):
            raise
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    if "RANK" in os.environ:
        # gloo's threads, which torch's caches keep after FSDP2, may abort an interpreter that comes
        # to its end under them (github.com/pytorch/pytorch/pull/179291): end without it.
        sys.stdout.flush()
        os._exit(0)
