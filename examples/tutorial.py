"""Fine-tune SmolLM2-135M on the plays of Shakespeare and plot its latch curve: the program of
docs/getting-started/tutorial.md.

python -m examples.tutorial --out run               SmolLM2-135M, 48 steps; minutes on a CPU
python -m examples.tutorial --out run --steps 20    a shorter run

Needs the bench extra. The page shows this program piece by piece; tests compare the two.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, get_constant_schedule_with_warmup

import stablelora_kernels as slk

# So that `python examples/tutorial.py` finds the repository's packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.inputs import add_inputs, load_model, load_tokens


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tutorial", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add_inputs(parser)
    add(
        "--out",
        type=Path,
        required=True,
        help="a new directory for the adapter, the log and the plot",
    )
    add("--steps", type=int, default=48, help="optimizer steps")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.out.exists():
        parser.error(f"--out must be a new directory, got {args.out}, which exists")
    return args


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: torch.Tensor) -> float:
    model.eval()
    losses = [len(part) * model(input_ids=part, labels=part).loss.item() for part in rows.split(8)]
    return sum(losses) / len(rows)


def show(when: str, model: Any, tokenizer: Any, held_out: torch.Tensor) -> None:
    """Print the held-out loss and the 24 tokens that the model finds most likely after a prompt."""
    inputs = tokenizer("ROMEO.\nO, my love,", return_tensors="pt").to(model.device)
    tokens = model.eval().generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0)
    words = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
    print(
        f"{when}: held-out loss {held_out_loss(model, held_out):.3f}; O, my love,{words}",
        flush=True,
    )


def plot_latches(optimizer: slk.StableLoRAAdamW, steps: int, file: Path) -> None:
    """The latch curve: for each kind of layer, the share of its pairs that have latched, over the
    steps.
    """
    from matplotlib.figure import Figure

    latches = defaultdict(list)
    for pair in optimizer.stability():
        latches[pair.name.rpartition(".")[2]].append(pair.latched_at)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for kind, found in latches.items():
        share = [
            sum(at is not None and at <= step for at in found) / len(found)
            for step in range(steps + 1)
        ]
        axes.step(range(steps + 1), share, where="post", label=kind)
    axes.set(xlabel="optimizer step", ylabel="share of pairs that have latched", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.25)
    axes.legend(title=None, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(file, dpi=130)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    model, tokenizer = load_model(args.model, AutoModelForCausalLM)
    text, held_out = load_tokens(args.text, tokenizer, length=32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, text, held_out = model.to(device), text.to(device), held_out.to(device)
    show("before", model, tokenizer, held_out)

    torch.manual_seed(0)
    print(slk.apply_lora(model, "all-linear", r=16, lora_alpha=32, lora_dropout=0.05))

    optimizer = slk.StableLoRAAdamW.from_model(model, lr=2e-3, shrink_ratio=5e-3, max_grad_norm=1.0)
    schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=5)

    args.out.mkdir(parents=True)
    log = args.out / "stability.csv"
    model.train()
    with slk.StabilityLogger(optimizer, log, every=1):
        for step in range(args.steps):
            starts = torch.randint(len(text) - 32, (4,)).tolist()
            batch = torch.stack([text[i : i + 32] for i in starts])
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if (step + 1) % 8 == 0:
                latched = sum(pair.latched for pair in optimizer.stability())
                print(
                    f"step {step + 1}: loss {loss.item():.3f}, {latched} of {len(optimizer.pairs)} pairs have latched",
                    flush=True,
                )
    show("after", model, tokenizer, held_out)

    plot_latches(optimizer, args.steps, args.out / "latches.png")

    slk.save_adapter(model, args.out / "adapter")
    fresh = load_model(args.model, AutoModelForCausalLM)[0].to(device)
    slk.load_adapter(fresh, args.out / "adapter")
    print(f"loaded: held-out loss {held_out_loss(fresh, held_out):.3f}")
    for name, module in list(fresh.named_modules()):
        if isinstance(module, slk.LoRALinear):
            module.merge()
            fresh.set_submodule(name, module.to_linear())
    print(f"merged: held-out loss {held_out_loss(fresh, held_out):.3f}")


if __name__ == "__main__":
    main()
