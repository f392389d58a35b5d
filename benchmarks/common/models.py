"""Models to fine-tune: a pretrained backbone, pooled, with a linear head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import assets
from benchmarks.common.smollm2 import load_smollm2

# Names of the query and value projections in different model families.
_QUERY_VALUE = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "query_proj", "value_proj")


class Classifier(nn.Module):
    """A backbone whose last hidden states are averaged over the text, and a linear head on the
    average.
    """

    def __init__(self, backbone: nn.Module, hidden_size: int, classes: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, classes)
        # Every arm's head has the same start, whatever random numbers its backbone drew.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head.reset_parameters()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits [batch, classes] in fp32."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            mask = attention_mask.unsqueeze(-1)
            return self.head((hidden.float() * mask).sum(1) / mask.sum(1))


class NextToken(nn.Module):
    """A causal language model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits [batch * length, vocabulary] in fp32."""
        return (
            self.model(input_ids=input_ids, attention_mask=attention_mask)
            .logits.flatten(0, 1)
            .float()
        )


def load_model(name: str, causal: bool = False) -> tuple[Any, Any]:
    """The frozen fp32 model and the tokenizer of ``"smollm2"``, ``"minilm"``, a local directory or
    a hub id.

    It has no head, or with ``causal`` that of a causal language model.

    Raises:
        AssetError: the model can't be had, or lacks weights.
    """
    if name == "smollm2":
        model, tokenizer = load_smollm2(assets.fetch(assets.SMOLLM2)[0], causal)
    else:
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        source = str(
            assets.fetch(assets.MINILM)[0].parent if name == "minilm" else Path(name).expanduser()
        )
        options: Any = {
            "dtype": torch.float32,
            "use_safetensors": True,
            "output_loading_info": True,
        }
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model, report = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(
                source, **options
            )
        except (OSError, ValueError) as error:
            kind = (
                "a local directory"
                if Path(source).is_dir()
                else "a hub id (and no local directory)"
            )
            reason = str(error).strip().splitlines()[0]
            raise assets.AssetError(f"could not load model {name!r}, {kind}: {reason}") from error
        # transformers would draw an encoder a head.
        if causal and (missing := report["missing_keys"]):
            raise assets.AssetError(
                f"model {name!r} is no {type(model).__name__} with all its weights: {min(missing)} is missing"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    model.config.use_cache = False
    if getattr(model, "pooler", None) is not None:
        # Classifier averages the hidden states, so adapters in a BERT's pooler would get no
        # gradient.
        model.pooler = None
    return model.requires_grad_(False), tokenizer


def share(model: Any) -> Any:
    """A copy of ``model``'s modules over the same frozen weights, which takes no memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def linear_names(model: nn.Module, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The last parts of the names of ``model``'s linear layers, but for a language model's head; if
    given, those ``wanted``.

    Raises:
        ValueError: no linear layer has one of the wanted names.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    present = tuple(sorted({name.rpartition(".")[2] for name in layers}))
    if unknown := [name for name in wanted if name not in present]:
        raise ValueError(
            f"--target-modules must name linear layers of {type(model).__name__} ({', '.join(present) or 'it has none'}), "
            f"got {', '.join(unknown)}"
        )
    return tuple(wanted) or present


def query_value_names(model: nn.Module) -> tuple[str, ...]:
    """The names of ``model``'s query and value projections.

    Raises:
        ValueError: it has none under a known name.
    """
    present = linear_names(model)
    found = tuple(name for name in present if name in _QUERY_VALUE)
    if not found:
        raise ValueError(
            f"{type(model).__name__} must have layers named {', '.join(_QUERY_VALUE)}, got {present}"
        )
    return found


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision as in trainers of PEFT models: autocast around frozen weights and adapters in
    fp32.
    """
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
