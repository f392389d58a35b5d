"""Fine-tune a PEFT model with Hugging Face's Trainer, on this library's kernels and with its
optimizer.

python -m examples.peft_trainer --out run               SmolLM2-135M on the plays of Shakespeare
python -m examples.peft_trainer --out run --resume      go on from the last checkpoint

What differs from a script without this library are two lines: accelerate_peft, and the optimizer's
factory. TRL's SFTTrainer takes the same two.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import peft
import torch
import transformers

import stablelora_kernels as slk

# So that `python examples/peft_trainer.py` finds the repository's packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.inputs import add_inputs, load_model, load_tokens


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "peft_trainer", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
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
    add("--steps", type=int, default=100, help="optimizer steps of the whole run")
    add("--save-every", type=int, default=25, help="steps between two checkpoints")
    add("--batch-size", type=int, default=4, help="sequences in a forward pass")
    add("--gradient-accumulation", type=int, default=1, help="forward passes a step")
    add("--length", type=int, default=128, help="tokens a sequence")
    add(
        "--target-modules",
        nargs="+",
        default=["q_proj", "v_proj"],
        help="ends of the names of the layers to adapt",
    )
    add("--rank", type=int, default=8)
    add("--dropout", type=float, default=0.05, help="of the LoRA branch")
    add("--lr", type=float, default=1e-3)
    add("--shrink-ratio", type=float, default=5e-4, help="lambda of Stable-LoRA")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("steps", "save_every", "batch_size", "gradient_accumulation", "rank"):
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
            )
    return args


def last_checkpoint(out: Path) -> Path | None:
    """The last checkpoint that is whole. One that was being written when its run was killed may
    lack any file.
    """
    numbered = {
        int(path.name.removeprefix("checkpoint-")): path for path in out.glob("checkpoint-*[0-9]")
    }
    for step in sorted(numbered, reverse=True):
        try:
            # The Trainer writes it last.
            json.loads((numbered[step] / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            print(f"{numbered[step].name} is not whole and is passed over", file=sys.stderr)
        else:
            return numbered[step]
    return None


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    last = last_checkpoint(args.out)
    if args.resume and last is None:
        sys.exit(f"--resume needs a checkpoint in --out, got {args.out} without one")
    if last and not args.resume:
        sys.exit(
            f"--out {args.out} holds {last.name} of another run: --resume it, or name another directory"
        )

    model, tokenizer = load_model(args.model, transformers.AutoModelForCausalLM)
    text, held_out = load_tokens(args.text, tokenizer, args.length)
    rows = text[: len(text) // args.length * args.length].view(-1, args.length)
    transformers.set_seed(args.seed)
    lora = peft.LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=args.dropout,
        target_modules=args.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        model = peft.get_peft_model(model, lora)
    except ValueError as error:
        sys.exit(f"--target-modules: {error}")
    # PEFT's layers compute on this library's kernels from here on; what would not is an error.
    print(slk.accelerate_peft(model, strict=True))

    training = transformers.TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        save_steps=args.save_every,
        learning_rate=args.lr,
        weight_decay=0.01,
        logging_steps=min(10, args.steps),
        # Not by evaluate() before train(), after which the Trainer would not put a model in DDP any
        # more.
        eval_on_start=last is None,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        lr_scheduler_type="linear",
        warmup_steps=args.steps // 10,
        bf16=args.bf16,
        seed=args.seed,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = transformers.Trainer(
        model=model,
        args=training,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        eval_dataset=[{"input_ids": row, "labels": row} for row in held_out],
        # It is called with the model, whose names tell the pairs of A and B.
        optimizer_cls_and_kwargs=slk.StableLoRAAdamWFactory.from_args(
            training, shrink_ratio=args.shrink_ratio, seed=args.seed
        ),
    )
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    latched = [pair.latched for pair in trainer.optimizer.optimizer.stability()]
    print(
        f"held-out loss {trainer.evaluate()['eval_loss']:.3f}, {sum(latched)} of {len(latched)} pairs latched"
    )
    # PEFT's own files, as a checkpoint has them.
    trainer.save_model(str(args.out / "adapter"))
    print(f"adapter in {args.out / 'adapter'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    if "RANK" in os.environ:
        # As in finetune.py: gloo's threads may abort an interpreter that comes to its end under
        # them.
        sys.stdout.flush()
        os._exit(0)
