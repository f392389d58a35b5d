"""Tiny models with random weights, in a hub cache, under the names that PEFT's tests ask the hub
for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SMALL: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# Some tests combine adapters to rank 20, so every layer must be larger.
_LLAMA = _SMALL | {
    "intermediate_size": 64,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
_EXPERTS = _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}
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

_TINY, _HF = "peft-internal-testing/tiny-random-", "hf-internal-testing/tiny-random-"
# A model's class, its config, and its names on the hub.
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "OPTForCausalLM": (_OPT, [f"{_TINY}OPTForCausalLM", "peft-internal-testing/opt-125m"]),
    "GPT2LMHeadModel": (_GPT2, [f"{_TINY}GPT2LMHeadModel", f"{_TINY}gpt2", f"{_HF}gpt2"]),
    "GPTJForCausalLM": (_GPT2 | {"rotary_dim": 4}, [f"{_TINY}GPTJForCausalLM"]),
    "LlamaForCausalLM": (_LLAMA, [f"{o}-internal-testing/tiny-random-LlamaForCausalLM" for o in ("trl", "hf", "peft")]),
    "Llama4ForCausalLM": (
        _EXPERTS | {"intermediate_size_mlp": 64, "head_dim": 8, "num_experts_per_tok": 1},
        ["trl-internal-testing/tiny-Llama4ForCausalLM"],
    ),
    "GptOssForCausalLM": (_EXPERTS | {"head_dim": 8}, ["trl-internal-testing/tiny-GptOssForCausalLM"]),
    "Qwen2ForCausalLM": (_LLAMA, ["peft-internal-testing/tiny-dummy-qwen2"]),
    "MistralForCausalLM": (_LLAMA, [f"{_HF}MistralForCausalLM"]),
    "Gemma3ForCausalLM": (_LLAMA | {"head_dim": 8}, [f"{_HF}Gemma3ForCausalLM"]),
    **{f"{name}Model": (_BERT, [f"{_TINY}{name}Model"]) for name in ("Bert", "Roberta", "DebertaV2", "Deberta")},
    **{
        f"{name}ForSequenceClassification": (_BERT, [f"{_TINY}{name}ForSequenceClassification"])
        for name in ("Bert", "Roberta")
    },
    "LlamaForSequenceClassification": (
        _LLAMA | {"pad_token_id": 0}, ["trl-internal-testing/tiny-LlamaForSequenceClassification-3.2"],
    ),
    "BartForConditionalGeneration": (_BART, [f"{_TINY}BartForConditionalGeneration"]),
    "T5ForConditionalGeneration": (
        _T5, [f"{_TINY}{name}" for name in ("T5ForConditionalGeneration-calibrated", "t5", "T5ForConditionalGeneration")],
    ),
}  # fmt: skip


def build(cache: Path) -> None:
    """Write all models into ``cache``, which is then a hub cache: the directory that HF_HUB_CACHE
    names.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    revision = "0" * 40
    for name, model, settings in (
        (n, model, settings) for model, (settings, names) in MODELS.items() for n in names
    ):
        torch.manual_seed(0)
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(revision, encoding="utf-8")
        made = getattr(transformers, model)
        made(made.config_class(**settings)).save_pretrained(folder / "snapshots" / revision)
