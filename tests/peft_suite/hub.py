"""Tiny models with random weights, in a hub cache, under the names that PEFT's tests ask the hub for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SMALL: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Some tests combine adapters to rank 20, so every layer must be larger.
_LLAMA = _SMALL | {"intermediate_size": 64, "num_key_value_heads": 4, "max_position_embeddings": 128}
# Some tests expect OPT to have 5 layers and 16 features.
_OPT = _SMALL | {
    "hidden_size": 16, "num_hidden_layers": 5, "ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
_GPT2 = {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_BERT = _SMALL | {"intermediate_size": 64, "max_position_embeddings": 128}
_BART = {
    "vocab_size": 1024, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
}  # fmt: skip
_T5 = {
    "vocab_size": 1024, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip

# Class of the model, class of its config, the config, and its names on the hub.
FAMILIES: list[tuple[str, str, dict[str, Any], list[str]]] = [
    ("OPTForCausalLM", "OPTConfig", _OPT, ["peft-internal-testing/tiny-random-OPTForCausalLM", "peft-internal-testing/opt-125m"]),
    (
        "GPT2LMHeadModel", "GPT2Config", _GPT2,
        ["peft-internal-testing/tiny-random-GPT2LMHeadModel", "peft-internal-testing/tiny-random-gpt2",
         "hf-internal-testing/tiny-random-gpt2"],
    ),
    ("GPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 4}, ["peft-internal-testing/tiny-random-GPTJForCausalLM"]),
    (
        "LlamaForCausalLM", "LlamaConfig", _LLAMA,
        [f"{owner}-internal-testing/tiny-random-LlamaForCausalLM" for owner in ("trl", "hf", "peft")],
    ),
    ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA, ["peft-internal-testing/tiny-dummy-qwen2"]),
    ("MistralForCausalLM", "MistralConfig", _LLAMA, ["hf-internal-testing/tiny-random-MistralForCausalLM"]),
    (
        "Gemma3ForCausalLM", "Gemma3TextConfig", _LLAMA | {"head_dim": 8},
        ["hf-internal-testing/tiny-random-Gemma3ForCausalLM"],
    ),
    ("BertModel", "BertConfig", _BERT, ["peft-internal-testing/tiny-random-BertModel"]),
    ("RobertaModel", "RobertaConfig", _BERT, ["peft-internal-testing/tiny-random-RobertaModel"]),
    ("DebertaV2Model", "DebertaV2Config", _BERT, ["peft-internal-testing/tiny-random-DebertaV2Model"]),
    ("DebertaModel", "DebertaConfig", _BERT, ["peft-internal-testing/tiny-random-DebertaModel"]),
    *(
        (f"{name}ForSequenceClassification", f"{name}Config", _BERT,
         [f"peft-internal-testing/tiny-random-{name}ForSequenceClassification"])
        for name in ("Bert", "Roberta")
    ),
    (
        "LlamaForSequenceClassification", "LlamaConfig", _LLAMA | {"pad_token_id": 0},
        ["trl-internal-testing/tiny-LlamaForSequenceClassification-3.2"],
    ),
    (
        "BartForConditionalGeneration", "BartConfig", _BART,
        ["peft-internal-testing/tiny-random-BartForConditionalGeneration"],
    ),
    (
        "T5ForConditionalGeneration", "T5Config", _T5,
        ["peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated", "peft-internal-testing/tiny-random-t5",
         "peft-internal-testing/tiny-random-T5ForConditionalGeneration"],
    ),
]  # fmt: skip
MODELS = {name: (model, config, kwargs) for model, config, kwargs, names in FAMILIES for name in names}


def build(cache: Path) -> None:
    """Write all models into ``cache``, which is then a hub cache: the directory that HF_HUB_CACHE names."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    revision = "0" * 40
    for name, (model, config, kwargs) in MODELS.items():
        torch.manual_seed(0)
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(revision, encoding="utf-8")
        made = getattr(transformers, model)(getattr(transformers, config)(**kwargs))
        made.save_pretrained(folder / "snapshots" / revision)
