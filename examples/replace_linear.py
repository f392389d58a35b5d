"""Give a model's linear layers LoRA, train it, merge it, and see what merging rounds away.

python -m examples.replace_linear --out run               MiniLM (22.7M parameters) on the plays of Shakespeare
python -m examples.replace_linear --out run --resume      go on from the last checkpoint

The model learns which of 32 passages follows which: neighbors are to have like vectors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModel

import stablelora_kernels as slk

# So that `python examples/replace_linear.py` finds the repository's packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.inputs import add_inputs, load_model, load_text

# Lines of text in a passage.
LINES = 4


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "replace_linear", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add_inputs(parser, "minilm")
    add(
        "--out",
        type=Path,
        required=True,
        help="directory for the checkpoint and, at the end, the adapter",
    )
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--steps", type=int, default=60)
    add("--save-every", type=int, default=20, help="steps between two checkpoints")
    add("--batch-size", type=int, default=32, help="pairs of passages a step")
    add(
        "--target-modules",
        nargs="+",
        default=["query", "value"],
        help="ends of the names of the layers to adapt",
    )
    add("--rank", type=int, default=8)
    add("--dropout", type=float, default=0.05, help="of the LoRA branch")
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, least in (("steps", 1), ("save_every", 1), ("batch_size", 2)):
        if getattr(args, name) < least:
            parser.error(
                f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}"
            )
    return args


def save_checkpoint(state: dict[str, Any], file: Path) -> None:
    """Write it under another name first, so that an interrupt leaves the old one."""
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    file = args.out / "checkpoint.pt"
    if args.resume != file.exists():
        found = (
            "has none: leave --resume out"
            if args.resume
            else "has one: --resume it, or name another directory"
        )
        sys.exit(f"--resume is for an --out with a checkpoint, and {args.out} {found}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(args.model, AutoModel)
    lines = [line.strip() for line in load_text(args.text).splitlines() if line.strip()]
    passages = [" ".join(lines[i : i + LINES]) for i in range(0, len(lines) - LINES + 1, LINES)]
    if len(passages) < 4 * args.batch_size:
        sys.exit(
            f"--text must have {4 * args.batch_size} passages of {LINES} lines, got {len(passages)}"
        )

    torch.manual_seed(args.seed)
    options = {"r": args.rank, "lora_alpha": 2 * args.rank, "lora_dropout": args.dropout}
    try:
        print(slk.apply_lora(model, args.target_modules, **options))
    except ValueError as error:
        sys.exit(f"--target-modules: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(device).train()
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=args.lr, seed=args.seed)

    def vectors(texts: list[str]) -> torch.Tensor:
        """The average of each text's last hidden states, of length 1."""
        inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=64, return_tensors="pt"
        ).to(device)
        hidden = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def products(places: list[int]) -> torch.Tensor:
        """How like each passage is to each one's next."""
        return vectors([passages[i] for i in places]) @ vectors([passages[i + 1] for i in places]).T

    # The last tenth is held out.
    border = len(passages) - len(passages) // 10
    held_out = torch.linspace(border, len(passages) - 2, args.batch_size).long().tolist()
    labels = torch.arange(args.batch_size, device=device)

    @torch.no_grad()
    def outputs() -> torch.Tensor:
        model.eval()
        found = products(held_out)
        model.train()
        return found

    start = 0
    if args.resume:
        saved = torch.load(file, map_location=device, weights_only=True)
        # Not the frozen weights, which are in the model's own files.
        model.load_state_dict(saved["adapter"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    right = (outputs().argmax(1) == labels).sum().item()
    print(
        f"step {start}: {right} of {args.batch_size} held-out passages are closest to their next passage"
    )

    for step in (bar := tqdm(range(start, args.steps), initial=start, total=args.steps)):
        # Batch and dropout go by the step, so that a resumed run is the uninterrupted one to the
        # bit.
        torch.manual_seed(args.seed * 1_000_003 + step)
        loss = F.cross_entropy(
            20 * products(torch.randperm(border - 1)[: args.batch_size].tolist()), labels
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            adapter = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            state = {"adapter": adapter, "optimizer": optimizer.state_dict(), "step": step + 1}
            save_checkpoint(state, file)

    unmerged = outputs()
    right = (unmerged.argmax(1) == labels).sum().item()
    print(
        f"step {args.steps}: {right} of {args.batch_size} held-out passages are closest to their next passage"
    )
    slk.save_adapter(model, args.out / "adapter")
    print(f"adapter in {args.out / 'adapter'}")

    layers = {name: m for name, m in model.named_modules() if isinstance(m, slk.LoRALinear)}
    for layer in layers.values():
        layer.merge()
    print(f"merged, the outputs differ by at most {(outputs() - unmerged).abs().max().item():.2g}")
    for layer in layers.values():
        layer.unmerge()
    same = torch.equal(outputs(), unmerged)
    print(f"unmerged, the outputs are {'the same to the bit' if same else 'NOT the same'}")
    # What you would ship: plain linear layers with merged weights.
    for name, layer in layers.items():
        layer.merge()
        model.set_submodule(name, layer.to_linear())
    model.save_pretrained(args.out / "merged")
    print(f"merged model in {args.out / 'merged'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
