"""Do llama.cpp and vLLM compute what transformers computes with our adapters?

    python -m benchmarks.lab.serving make DIR
    python -m benchmarks.lab.serving llama-cpp DIR --source LLAMA_CPP
    python -m benchmarks.lab.serving vllm DIR

``make`` builds two small models from configs, trains adapters of many kinds on them, merges two, and
writes the log-probabilities that transformers gives each token of a prompt. It needs sentencepiece.
The other two serve these files and compare: in float32, with the adapter's own effect beside it.
They may run in environments of their own. ``llama-cpp`` needs llama-cpp-python, whatever the
converters in llama.cpp's source tree import, and that tree: the source package has it in
``vendor/llama.cpp``. ``vllm`` runs on a GPU, or on a CPU with a build for CPUs; there set
VLLM_CPU_KVCACHE_SPACE=1 and VLLM_CPU_OMP_THREADS_BIND=nobind.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCABULARY, TOKENS, RANK = 800, 64, 8
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
LINEAR = [*ATTENTION, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Adapters of "base" in PEFT: what differs from rank 8, alpha 16, all linear layers of the decoder.
OPTIONS: dict[str, dict[str, Any]] = {
    "peft": {},
    "use_rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 4, "down_proj": 16}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 32}},
    "lm_head": {"target_modules": [*LINEAR, "lm_head"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "rank_32": {"r": 32},
}
ON_EXPERTS = {"target_modules": ATTENTION, "target_parameters": EXPERTS}
# Name: the model that it belongs to.
ADAPTERS = {"ours": "base", **dict.fromkeys(OPTIONS, "base"), "experts": "mixture"}
MERGED = {"merged_ours": "ours", "merged_rslora": "use_rslora", "merged_experts": "experts"}


def make(directory: Path) -> None:
    import peft
    import sentencepiece
    import transformers

    import stablelora_kernels as slk

    directory.mkdir(parents=True)
    pages = sorted((Path(__file__).parents[2] / "docs").rglob("*.md"))
    corpus = directory / "corpus.txt"
    corpus.write_text("".join(page.read_text() for page in pages))
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(
        input=str(corpus),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    ids = torch.tensor(tokenizer.encode(corpus.read_text()))
    prompt = ids[:TOKENS].clone()
    found: dict[str, torch.Tensor] = {"prompt": prompt}

    def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        model.train()
        for _ in range(steps):
            starts = torch.randint(0, len(ids) - TOKENS, (8,), generator=generator).tolist()
            batch = torch.stack([ids[start : start + TOKENS] for start in starts])
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def remember(name: str, model: Any) -> None:
        with torch.no_grad():
            found[name] = model.eval()(input_ids=prompt[None]).logits[0].log_softmax(-1)

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
    }
    configs = {
        "base": transformers.LlamaConfig(intermediate_size=256, attention_bias=True, **sizes),
        "mixture": transformers.MixtralConfig(intermediate_size=64, num_local_experts=4, **sizes),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), 60)
        model.save_pretrained(directory / name)
        shutil.copy(directory / "tokenizer.model", directory / name)
        remember(name, model)
    for name, base in ADAPTERS.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(directory / base)
        torch.manual_seed(1)
        if name == "ours":
            slk.apply_lora(model, LINEAR, r=RANK, lora_alpha=16)
        else:
            options = ON_EXPERTS if name == "experts" else OPTIONS[name]
            plain = {"r": RANK, "lora_alpha": 16, "target_modules": LINEAR}
            model = peft.get_peft_model(model, peft.LoraConfig(**{**plain, **options}))
            slk.accelerate_peft(model, fuse_mlp=True)
        train(model, slk.StableLoRAAdamW.from_model(model, lr=5e-3), 30)
        if name == "ours":
            slk.save_adapter(model, directory / name)
        else:
            model.save_pretrained(directory / name)
        remember(name, model)
    for name, adapter in MERGED.items():
        base = transformers.AutoModelForCausalLM.from_pretrained(directory / ADAPTERS[adapter])
        model = peft.PeftModel.from_pretrained(base, directory / adapter)
        model.merge_and_unload().save_pretrained(directory / name)
        shutil.copy(directory / "tokenizer.model", directory / name)
    save_file(found, directory / "found.safetensors")


def expected_without_adapter(model: str, adapter: str | None) -> str:
    """The name of the log-probabilities in which an adapter, or a merged one, has no part."""
    if adapter is None and model in MERGED:
        return ADAPTERS[MERGED[model]]
    return model


def compare(
    directory: Path, serve: Callable[[str, str | None], torch.Tensor | str], models: list[str]
) -> None:
    """Print what ``serve(model, adapter)`` differs from transformers by: its log-probabilities, or
    why it refused.
    """
    found = load_file(directory / "found.safetensors")
    print(f"{'model':16}{'adapter':18}{'server - transformers':>24}{'adapter - base':>18}")
    for model in models:
        of_model = [name for name, base in ADAPTERS.items() if base == model]
        for adapter in [None, *of_model]:
            expected = found[adapter or MERGED.get(model, model)]
            served = serve(model, adapter)
            if isinstance(served, str):
                print(f"{model:16}{adapter or '':18}  refused: {served}")
                continue
            base = found[expected_without_adapter(model, adapter)]
            error = (served - expected).abs().max()
            effect = (expected - base).abs().max()
            print(f"{model:16}{adapter or '':18}{error:24.1e}{effect:18.2f}", flush=True)


def llama_cpp(directory: Path, source: Path) -> None:
    import llama_cpp as api

    ids = load_file(directory / "found.safetensors")["prompt"].tolist()
    api.llama_backend_init()
    silent = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(silent, ctypes.c_void_p(0))

    def converted(script: str, name: str, *options: str) -> tuple[str, str]:
        """The GGUF file of ``name``, and why there is none."""
        file = directory / f"{name}.gguf"
        if file.exists():
            return str(file), ""
        command = [sys.executable, str(source / script), "--outtype", "f32", "--outfile", str(file)]
        done = subprocess.run(
            [*command, *options, str(directory / name)], capture_output=True, text=True
        )
        if done.returncode == 0:
            return str(file), ""
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith(("ERROR:", "ValueError:"))]
        return "", errors[0] if errors else done.stderr

    def serve(model: str, adapter: str | None) -> torch.Tensor | str:
        file, error = converted("convert_hf_to_gguf.py", model)
        if error:
            return error
        weights = api.llama_model_load_from_file(file.encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        for name in ("n_ctx", "n_batch", "n_ubatch"):
            setattr(params, name, 2 * TOKENS)
        # A cache in float32, and attention in the order of the formula.
        for name in ("type_k", "type_v", "flash_attn_type"):
            setattr(params, name, 0)
        context = api.llama_init_from_model(weights, params)
        if adapter:
            file, error = converted(
                "convert_lora_to_gguf.py", adapter, "--base", str(directory / model)
            )
            if error:
                return error
            lora = api.llama_adapter_lora_init(weights, file.encode())
            loras = (api.llama_adapter_lora_p_ctypes * 1)(lora)
            api.llama_set_adapters_lora(context, loras, 1, (ctypes.c_float * 1)(1.0))
        batch = api.llama_batch_init(TOKENS, 0, 1)
        batch.n_tokens = TOKENS
        for i, token in enumerate(ids):
            batch.token[i] = token
            batch.pos[i] = i
            batch.logits[i] = 1
            # One sequence, of number 0.
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
        if api.llama_decode(context, batch) != 0:
            return "llama_decode failed"
        rows = [api.llama_get_logits_ith(context, i)[:VOCABULARY] for i in range(TOKENS)]
        return torch.tensor(rows).log_softmax(-1)

    compare(directory, serve, ["base", "mixture", *MERGED])


def vllm(directory: Path, model: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest

    ids = load_file(directory / "found.safetensors")["prompt"].tolist()
    # On a CPU, vLLM has no LoRA on experts, nor on other layers of a model with experts.
    with_lora: dict[str, Any] = {
        "enable_lora": True,
        "max_lora_rank": 16,
        "lora_dtype": torch.float32,
    }
    engine = LLM(
        str(directory / model),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2 * TOKENS,
        max_logprobs=VOCABULARY,
        enable_prefix_caching=False,
        **(with_lora if model == "base" else {}),
    )
    all_of_them: dict[str, Any] = {"logprobs": VOCABULARY, "prompt_logprobs": VOCABULARY}
    params = SamplingParams(max_tokens=1, detokenize=False, temperature=0, **all_of_them)

    def serve(model: str, adapter: str | None) -> torch.Tensor | str:
        request = None
        if adapter:
            path = str(directory / adapter)
            try:
                # The engine's own check, made here since a refused request keeps its place in the batch.
                PEFTHelper.from_local_dir(path, None).validate_legal(LoRAConfig(max_lora_rank=16))
            except ValueError as error:
                return str(error)
            request = LoRARequest(adapter, 1 + list(ADAPTERS).index(adapter), path)
        (output,) = engine.generate({"prompt_token_ids": ids}, params, lora_request=request)
        served = torch.empty(TOKENS, VOCABULARY)
        rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        for i, row in enumerate(rows):
            for token, value in row.items():
                served[i, token] = value.logprob
        return served

    compare(directory, serve, [model])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab.serving", description=__doc__)
    parser.add_argument("action", choices=["make", "llama-cpp", "vllm"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--source", type=Path, help="llama.cpp's source tree")
    parser.add_argument("--model", help="of vllm: this model alone")
    args = parser.parse_args()
    if args.action == "make":
        make(args.directory)
    elif args.action == "llama-cpp":
        llama_cpp(args.directory, args.source)
    elif args.model:
        vllm(args.directory, args.model)
    else:
        for model in ["base", *MERGED]:
            own = [sys.executable, "-m", "benchmarks.lab.serving", "vllm", str(args.directory)]
            subprocess.run([*own, "--model", model], check=True)


if __name__ == "__main__":
    main()
