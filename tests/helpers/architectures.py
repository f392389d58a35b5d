"""Tiny models of transformers' architectures, from their configurations alone: nothing is
downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip(
    "transformers", reason="runs where transformers is installed: pip install .[test]"
)
auto = transformers.models.auto.modeling_auto

# Sizes by each name that a configuration may have for them.
WIDTH, LAYERS, HEADS, INNER = 32, 2, 4, 48
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), INNER),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels"), WIDTH // HEADS),
    **dict.fromkeys(("num_local_experts", "num_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "vocab_size"), 64),
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "multi_query_group_num": 2, "rotary_dim": 4,
    "partial_rotary_factor": 0.5, "type_vocab_size": 2, "sliding_window": 8, "num_kv_shared_layers": 0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Larger models than this have a size by another name.
MAX_PARAMETERS = 3_000_000
IDS = torch.arange(3, 15).view(2, 6)


def architectures() -> Iterator[tuple[str, str]]:
    """The type of each model and its class's name: causal, else with an encoder and a decoder, else
    a classifier.
    """
    seen = set()
    for names in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ):
        for model_type, name in names.items():
            if model_type not in seen and isinstance(name, str):
                seen.add(model_type)
                yield model_type, name


def small_config(model_type: str) -> Any:
    """Any error: the configuration does not allow these sizes."""
    defaults = transformers.AutoConfig.for_model(model_type)
    # Falcon's head size is computed.
    computed = {name for name, value in vars(type(defaults)).items() if isinstance(value, property)}
    sizes = {
        name: value
        for name, value in SIZES.items()
        if hasattr(defaults, name) and name not in computed
    }
    if isinstance(getattr(defaults, "layer_types", None), list):
        sizes["layer_types"] = ["full_attention"] * LAYERS
    return type(defaults)(**sizes)


def build(model_type: str, class_name: str) -> nn.Module:
    """The tiny model, in eval mode, of the same values at each call.

    Raises:
        ValueError: it is not tiny, or its output is not finite. Any error: as small_config.
    """
    model_class = getattr(transformers, class_name)
    config = small_config(model_type)
    # The default for experts, a grouped product, has no float64.
    config._experts_implementation = "eager"
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"{model_type} has {count:,} parameters")
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        if not logits(model).isfinite().all():
            raise ValueError(f"{model_type} returns values that are not finite")
    return model


def logits(model: nn.Module) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits
