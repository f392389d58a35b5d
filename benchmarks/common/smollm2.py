"""SmolLM2 from its GGUF file: a Llama of transformers and its tokenizer, without a hub or a copy on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

# GGUF's names, and transformers' for the same weight: model.layers.N.<value>.weight.
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
_TOP_NAMES = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
# GGUF's mark of a token that is never split.
_CONTROL_TOKEN = 3


def load_smollm2(path: Path) -> tuple[LlamaModel, PreTrainedTokenizerFast]:
    """The decoder in fp32, and the tokenizer. The language-model head is left out: it is the embedding."""
    from gguf import GGUFReader
    from transformers import LlamaConfig, LlamaModel

    reader = GGUFReader(path)
    heads, kv_heads = _field(reader, "llama.attention.head_count"), _field(reader, "llama.attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=_field(reader, "llama.rope.freq_base"),
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
    )
    # Use no memory and no random numbers for weights that the next lines replace. The rotary tables are not in the file
    # but computed from the config, so build them again off the meta device.
    with torch.device("meta"):
        model = LlamaModel(config)
    model.rotary_emb = type(model.rotary_emb)(config)
    model.load_state_dict(_weights(reader, heads, kv_heads), assign=True)
    return model.requires_grad_(False), _tokenizer(reader)


def load_smollm2_lm(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The same with its language-model head."""
    from transformers import LlamaForCausalLM

    backbone, tokenizer = load_smollm2(path)
    with torch.device("meta"):
        model = LlamaForCausalLM(backbone.config)
    model.model = backbone
    model.lm_head.weight = backbone.embed_tokens.weight
    return model, tokenizer


def _field(reader: GGUFReader, name: str) -> Any:
    if name not in reader.fields:
        raise ValueError(f"the GGUF file has no field {name!r}")
    return reader.fields[name].contents()


def _weights(reader: GGUFReader, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    from gguf.quants import dequantize

    weights = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name = _TOP_NAMES.get(tensor.name)
        if name is None:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"layers.{layer}.{_LAYER_NAMES[kind]}.weight"
            if kind in ("attn_q", "attn_k"):
                value = _unpermute(value, heads if kind == "attn_q" else kv_heads)
        weights[name] = value
    return weights


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows: a rotary pair is adjacent in GGUF, and half a head apart in transformers."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # GGUF's "smollm" pre-tokenizer makes every digit a token, then splits as GPT-2 does.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def special(name: str) -> str:
        return tokens[_field(reader, f"tokenizer.ggml.{name}_token_id")]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special("bos"),
        eos_token=special("eos"),
        unk_token=special("unknown"),
        pad_token=special("padding"),
    )
