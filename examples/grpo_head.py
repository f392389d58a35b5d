"""GRPO with a LoRA adapter on the head, in a plain loop: the log-probabilities of sampled tokens, and
their entropies, come from ``lora_linear_log_probs``, which never holds the logits of a batch.

python -m examples.grpo_head            15 steps of a small random Llama, 40 seconds on two cores

The reward of a completion is the share of its tokens that are even numbers: a task that a model without
any training learns in a minute. TRL's trainers refuse an adapter on ``lm_head``, so
the loop is our own. It samples groups of completions for each prompt, takes the rewards' deviations
within a group as advantages (GRPO, arXiv 2402.03300), and makes two updates with each batch. The ratio
of new to old probabilities is exactly 1 in the first of them, which the loop checks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import Tensor

import stablelora_kernels as slk

# So that `python examples/grpo_head.py` finds the repository's packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WORDS, PROMPTS, GROUP, PROMPT_LENGTH, LENGTH = 64, 16, 8, 4, 12
TEMPERATURE, CLIP, ENTROPY_BONUS = 1.0, 0.2, 1e-3
IGNORED = -100


class Batch(NamedTuple):
    """Completions, prompts included, with their rewards and advantages."""

    tokens: Tensor
    rewards: Tensor
    advantages: Tensor


class Policy(NamedTuple):
    """Of sampled tokens [batch, LENGTH], under the model now."""

    log_probs: Tensor
    entropy: Tensor


def make_model() -> Any:
    """A small random Llama with LoRA on all its linear layers, the head among them."""
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        # No token ends a completion.
        eos_token_id=None,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    targets = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "lm_head",
    ]
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    slk.accelerate_peft(model, strict=True)
    return model


def policy(model: Any, tokens: Tensor) -> Policy:
    """Log-probabilities and entropies of each completion's tokens, without logits."""
    causal = model.get_base_model()
    hidden = causal.model(input_ids=tokens).last_hidden_state[:, PROMPT_LENGTH - 1 : -1]
    head = causal.lm_head
    found = slk.functional.lora_linear_log_probs(
        hidden,
        head.get_base_layer().weight,
        None,
        head.lora_A["default"].weight,
        head.lora_B["default"].weight,
        head.scaling["default"],
        tokens[:, PROMPT_LENGTH:],
        temperature=TEMPERATURE,
        ignore_index=IGNORED,
    )
    return Policy(*found)


@torch.no_grad()
def sample(model: Any, generator: torch.Generator) -> Batch:
    """A group of completions for each of some random prompts."""
    prompts = torch.randint(2, WORDS, (PROMPTS, PROMPT_LENGTH), generator=generator)
    tokens = model.generate(
        input_ids=prompts.repeat_interleave(GROUP, 0),
        attention_mask=torch.ones(PROMPTS * GROUP, PROMPT_LENGTH, dtype=torch.int64),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        min_new_tokens=LENGTH,
        max_new_tokens=LENGTH,
    )
    rewards = (tokens[:, PROMPT_LENGTH:] % 2 == 0).float().mean(1)
    groups = rewards.view(PROMPTS, GROUP)
    deviations = groups - groups.mean(1, keepdim=True)
    return Batch(tokens, rewards, (deviations / (groups.std(1, keepdim=True) + 1e-4)).flatten())


def loss_of(now: Policy, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """GRPO's clipped loss with an entropy bonus, and the ratios."""
    ratios = torch.exp(now.log_probs - old)
    weighted = ratios * advantages[:, None]
    clipped = ratios.clamp(1 - CLIP, 1 + CLIP) * advantages[:, None]
    return -torch.minimum(weighted, clipped).mean() - ENTROPY_BONUS * now.entropy.mean(), ratios


def main(argv: list[str] | None = None) -> list[float]:
    """Train, and return each step's mean reward."""
    parser = argparse.ArgumentParser("grpo_head", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--lr", type=float, default=1e-2)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = make_model()
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=options.lr, max_grad_norm=1.0)
    rewards = []
    for step in range(1, options.steps + 1):
        batch = sample(model, generator)
        with torch.no_grad():
            old = policy(model, batch.tokens).log_probs
        for update in range(2):
            now = policy(model, batch.tokens)
            loss, ratios = loss_of(now, old, batch.advantages)
            if update == 0 and not bool((ratios == 1).all()):
                raise RuntimeError(
                    f"the first ratios must be 1, got {ratios.min()} to {ratios.max()}"
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        rewards.append(batch.rewards.mean().item())
        if step == 1 or step % 5 == 0:
            print(f"step {step}: reward {rewards[-1]:.3f}, entropy {now.entropy.mean().item():.2f}")
    return rewards


if __name__ == "__main__":
    main()
