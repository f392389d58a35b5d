"""SmolLM2 from its GGUF file: a Llama of transformers and its tokenizer, without a hub or a copy on
disk.

``from_pretrained(gguf_file=...)`` gives the same weights in three times the time, and a tokenizer
that does not split digits first: other ids for 8 lines of the plays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# Names in transformers and in GGUF: of settings, special tokens, and weights
# (model.layers.N.<value>.weight).
_CONFIG = {
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
# GGUF's mark of a token that is never split.
_CONTROL_TOKEN = 3


def load_smollm2(path: Path, causal: bool) -> tuple[Any, Any]:
    """The decoder in fp32, or with ``causal`` the language model around it, and the tokenizer."""
    from gguf import GGUFReader
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(
        **{name: fields[key] for name, key in _CONFIG.items()}, tie_word_embeddings=True
    )
    # Use no memory and no random numbers for weights that the next lines replace. The rotary tables
    # are not in the file but computed from the config, so build them again off the meta device.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    weights = _weights(reader, config)
    model.load_state_dict(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, assign=True
    )
    model.tie_weights()
    return (model if causal else model.model).requires_grad_(False), _tokenizer(fields)


def _weights(reader: Any, config: Any) -> dict[str, torch.Tensor]:
    from gguf.quants import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name = _TOP_NAMES.get(tensor.name)
        if name is None:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{_LAYER_NAMES[kind]}.weight"
            if kind in heads:
                # A rotary pair's rows are adjacent in GGUF, and half a head apart in transformers.
                value = (
                    value.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).reshape(value.shape)
                )
        weights[name] = value
    return weights


def _tokenizer(fields: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    )
    # GGUF's "smollm" pre-tokenizer makes every digit a token, then splits as GPT-2 does.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    control = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in kinds
        if kind == _CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens(control)
    special = {
        name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in _SPECIAL.items()
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
