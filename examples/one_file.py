"""Fine-tune a language model with PEFT's LoRA on this library's kernels. One file to copy: it reads
no other file of the clone.

pip install '.[peft]'   (in a clone; stablelora-kernels is not on PyPI yet)
python one_file.py --model HuggingFaceTB/SmolLM2-135M --text my_text.txt --out run
"""

from __future__ import annotations

import argparse
from pathlib import Path

import peft
import torch
import transformers

import stablelora_kernels as slk


def main() -> None:
    parser = argparse.ArgumentParser(
        "one_file", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a hub id or a local directory")
    parser.add_argument(
        "--text", type=Path, required=True, help="a text file; its last tenth is held out"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of checkpoints and of the adapter"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16 if on_gpu else torch.float32
    )

    tokens = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"])
    rows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length)
    rows = [{"input_ids": row, "labels": row} for row in rows]
    held_out = max(1, len(rows) // 10)

    lora = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora)
    # The one new line. The report says what runs on the kernels, and what does not and why.
    print(slk.accelerate_peft(model, fuse_mlp=True))

    arguments = transformers.TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        learning_rate=args.lr,
        warmup_steps=args.steps // 10,
        # evaluate() before train() would keep the Trainer from DDP under torchrun.
        eval_on_start=True,
        per_device_train_batch_size=4,
        logging_steps=10,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        report_to=[],
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows[:-held_out],
        eval_dataset=rows[-held_out:],
        # Optional: Stable-LoRA and AdamW in one kernel, with the settings of the arguments.
        optimizer_cls_and_kwargs=slk.StableLoRAAdamWFactory.from_args(arguments),
    )
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        before = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
        print(f"held-out loss {before:.3f} before, {after:.3f} after {args.steps} steps")
        # PEFT's files: PeftModel.from_pretrained loads them.
        model.save_pretrained(args.out / "adapter")
        print(f"adapter in {args.out / 'adapter'}")


if __name__ == "__main__":
    main()
