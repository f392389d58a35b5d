"""Find a learning rate in one run: train an adapter for each of eight rates at once, over one frozen
model, and plot their losses. The program of docs/guides/several-adapters.md.

python -m examples.learning_rates --out run               SmolLM2-135M, 16 steps; two minutes on a CPU
python -m examples.learning_rates --out run --steps 100   a longer run

Needs the bench extra.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

import stablelora_kernels as slk

# So that `python examples/learning_rates.py` finds the repository's packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.inputs import add_inputs, load_model, load_tokens

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 3e-2)
# By adapter: PEFT allows no dots in names.
RATE_OF = {f"lr_{rate:.0e}": rate for rate in RATES}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "learning_rates", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add_inputs(parser)
    add("--out", type=Path, required=True, help="a new directory for the best adapter and the plot")
    add("--steps", type=int, default=16, help="optimizer steps of each adapter")
    add("--length", type=int, default=32, help="tokens a sequence; one a step for each adapter")
    add("--rank", type=int, default=16)
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("steps", "length", "rank"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.out.exists():
        parser.error(f"--out must be a new directory, got {args.out}, which exists")
    return args


def with_adapters(model: torch.nn.Module, rank: int, seed: int) -> peft.PeftModel:
    """``model`` with an adapter for each rate; all start from the same values."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapted = None
    for name in RATE_OF:
        torch.manual_seed(seed)
        if adapted is None:
            adapted = peft.get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    assert adapted is not None
    return adapted


@torch.no_grad()
def held_out_losses(model: torch.nn.Module, rows: torch.Tensor) -> dict[str, float]:
    """Each adapter's loss on the same rows."""
    model.eval()
    totals = dict.fromkeys(RATE_OF, 0.0)
    for row in rows.split(1):
        losses = losses_on(model, row)
        for name, loss in losses.items():
            totals[name] += loss.item() / len(rows)
    model.train()
    return totals


def losses_on(model: torch.nn.Module, row: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each adapter's loss on a row [1, tokens], by one forward."""
    names = [*RATE_OF]
    batch = row.expand(len(names), -1)
    with slk.adapters_of_rows(model, names):
        logits = model(input_ids=batch, use_cache=False).logits
    return slk.losses_of_rows(logits, batch, names)


def plot(history: list[dict[str, float]], held_out: dict[str, float], file: Path) -> None:
    """Each rate's loss over the steps, and its held-out loss."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    steps_axes, rates_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    colors = colormaps["viridis"](torch.linspace(0, 0.95, len(RATE_OF)).tolist())
    for (name, rate), color in zip(RATE_OF.items(), colors, strict=True):
        smooth = moving_average([losses[name] for losses in history], 5)
        steps_axes.plot(range(1, len(smooth) + 1), smooth, color=color, label=f"{rate:g}")
        rates_axes.plot(rate, held_out[name], "o", color=color)
    rates_axes.plot([*RATES], [held_out[name] for name in RATE_OF], color="#8a8f98", zorder=0)
    steps_axes.set(xlabel="step", ylabel="training loss, mean of 5 steps")
    steps_axes.legend(title="learning rate", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    rates_axes.set(xlabel="learning rate", ylabel="held-out loss after the last step", xscale="log")
    for axes in (steps_axes, rates_axes):
        # Of a rate that is too high, the loss is many times the others'.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 4.0, 6.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
    steps_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(file, dpi=130)


def moving_average(values: list[float], width: int) -> list[float]:
    """The mean of each value and up to ``width - 1`` before it."""
    averages = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        averages.append(sum(window) / len(window))
    return averages


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    base, tokenizer = load_model(args.model, AutoModelForCausalLM)
    text, held_out = load_tokens(args.text, tokenizer, args.length)
    model = with_adapters(base, args.rank, args.seed).train()
    # The report has a line for each layer and adapter.
    print(str(slk.accelerate_peft(model, strict=True)).partition("\n")[0])
    optimizer = slk.StableLoRAAdamW.from_model(
        model, adapters={name: {"lr": rate} for name, rate in RATE_OF.items()}, seed=args.seed
    )
    torch.manual_seed(args.seed)
    history = []
    for step in range(1, args.steps + 1):
        start = int(torch.randint(len(text) - args.length, ()))
        # Every adapter gets the same tokens, so that the rate alone differs.
        row = text[start : start + args.length][None]
        losses = losses_on(model, row)
        torch.stack([*losses.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: loss.item() for name, loss in losses.items()})
        if step % 8 == 0 or step == args.steps:
            shown = ", ".join(
                f"{RATE_OF[name]:g}: {loss:.3f}" for name, loss in history[-1].items()
            )
            print(f"step {step}, loss by learning rate: {shown}", flush=True)
    final = held_out_losses(model, held_out[:8])
    best = min(final, key=lambda name: final[name])
    args.out.mkdir(parents=True)
    plot(history, final, args.out / "losses.png")
    model.save_pretrained(args.out, selected_adapters=[best])
    print(f"best learning rate {RATE_OF[best]:g}, held-out loss {final[best]:.3f}")
    print(f"adapter in {args.out / best}, plot in {args.out / 'losses.png'}")


if __name__ == "__main__":
    main()
