"""What several test modules share: a small model, filled branches, and proof that a refused call
changed nothing.
"""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.nn.linear import LoRALinear


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.v_proj(torch.tanh(self.q_proj(x))))


class Model(nn.Module):
    """Two blocks under "layers", an embedding and a head."""

    def __init__(self, width: int = 8, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


IDS = torch.arange(10).view(2, 5)


def llama(**changes):
    """A Llama of two layers, of which ``changes`` replace settings; its values go by torch's seed."""
    transformers = pytest.importorskip(
        "transformers", reason="runs where transformers is installed: pip install .[test]"
    )
    settings = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes))


def gpt2():
    """Of two layers, whose weights are [in, out] and whose head is tied."""
    transformers = pytest.importorskip(
        "transformers", reason="runs where transformers is installed: pip install .[test]"
    )
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def lora_options(**kwargs):
    """Arguments of apply_lora for :class:`Model`."""
    return {"r": 2, "target_modules": ["q_proj", "v_proj"]} | kwargs


def remove_lora(model):
    """Put plain layers into the places of LoRALinear's, as the guide says."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.to_linear())


def fill_b(model):
    """A branch that is zero would hide every mistake."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_()


def lora_over(base, **kwargs):
    """The LoRA layer over ``base``, with a branch that is not zero."""
    layer = LoRALinear.from_linear(base, **{"r": 3, "lora_alpha": 6} | kwargs)
    nn.init.normal_(layer.lora_B, std=layer.r**-0.5)
    return layer


def through_a_file(model):
    """What torch.load makes of what torch.save writes."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model):
    """Everything that a refused call must leave alone: objects, their attributes' names, flags and
    values.
    """
    modules = [
        (name, module, list(vars(module)))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    parameters = [
        (name, p, p.requires_grad, p.detach().clone())
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    return modules, parameters


def assert_untouched(model, before):
    modules, parameters = snapshot(model)
    assert modules == before[0]
    assert [(name, id(p), flag) for name, p, flag, _ in parameters] == [
        (n, id(p), f) for n, p, f, _ in before[1]
    ]
    assert all(
        torch.equal(now[3], then[3]) for now, then in zip(parameters, before[1], strict=True)
    )


@contextmanager
def refused(model, error, match):
    """The block raises ``error``, and leaves ``model`` as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=match):
        yield
    assert_untouched(model, before)


def reasons(report):
    return {module.name: module.reason for module in report.skipped}


def output(model):
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def holds_kernels(model: nn.Module) -> bool:
    """Whether the kernels library gave ``model`` functions, which cannot be pickled."""
    return any("_kernel_funcs" in module.__dict__ for module in model.modules())


def unpickled(model: nn.Module) -> nn.Module:
    """A pickle's copy; a deep copy of a model that cannot be pickled."""
    if holds_kernels(model):
        return copy.deepcopy(model)
    return pickle.loads(pickle.dumps(model))
