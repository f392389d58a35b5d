"""Trainings by Hugging Face's Trainer and TRL's SFTTrainer, whole or resumed; as a program in a
fresh process.

python -m tests.helpers.trainer_runs DIRECTORY CASE...: resume runs that ``train_whole`` left under
DIRECTORY; a case is its three words with slashes between them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import stablelora_kernels as slk
from tests.helpers import small_models

peft, transformers, _ = (
    pytest.importorskip(name, reason=f"runs where {name} is installed: pip install .[test]")
    for name in ("peft", "transformers", "accelerate")
)
STEPS, WORDS = 6, 32
# The first layer's pairs latch before the checkpoint, the second's behind it.
SETTINGS: dict[str, Any] = {
    "lr": 0.1,
    "shrink_ratio": 0.2,
    "shrink_pattern": {r".*layers\.0\..*": 0.6},
}
KINDS = ("ours", "peft", "accelerated")
# The trainer, the kind of model, and the way to give the optimizer.
Case = tuple[str, str, str]


def llama(
    kind: str, base_seed: int = 0, adapter_seed: int = 0, dropout: float = 0.0, **changes: Any
) -> torch.nn.Module:
    """A tiny Llama with adapters of random A and zero B on q_proj and v_proj."""
    torch.manual_seed(base_seed)
    model = small_models.llama(
        vocab_size=WORDS, attention_dropout=dropout / 2, pad_token_id=0, **changes
    )
    torch.manual_seed(adapter_seed)
    lora = {
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": dropout,
        "target_modules": ["q_proj", "v_proj"],
    }
    if kind == "ours":
        slk.apply_lora(model, **lora)
        return model
    model = peft.get_peft_model(model, peft.LoraConfig(**lora, task_type="CAUSAL_LM"))
    if kind == "accelerated":
        assert len(slk.accelerate_peft(model, strict=True).replaced) == 4
    return model


def rows() -> list[dict[str, list[int]]]:
    ids = torch.randint(
        3, WORDS, (4 * STEPS, 7), generator=torch.Generator().manual_seed(1)
    ).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {
        word: number
        for number, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, WORDS))])
    }
    model = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **tokens)


def arguments(place: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "output_dir": str(place), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS,
        "seed": 3, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "bf16": False,
    }  # fmt: skip
    return settings | changes


def make_trainer(
    model: torch.nn.Module,
    place: Path,
    via: str = "a factory",
    settings: Any = SETTINGS,
    made: Any = None,
    **changes: Any,
) -> Any:
    """A Trainer, or one of the class ``made``; without the optimizer's ``settings`` its own AdamW
    trains.
    """
    made = made or transformers.Trainer
    extra: dict[str, Any] = {"callbacks": changes.pop("callbacks", None), "train_dataset": rows()}
    if via == "optimizers":
        extra["optimizers"] = slk.StableLoRAAdamW.from_model(model, **settings), None
    elif settings is not None:
        is_class = isinstance(settings, tuple)
        extra["optimizer_cls_and_kwargs"] = (
            settings if is_class else (slk.StableLoRAAdamWFactory, settings)
        )
    if made.__name__ == "SFTTrainer":
        import datasets
        import trl

        extra["train_dataset"] = datasets.Dataset.from_list(
            [{"input_ids": row["input_ids"]} for row in rows()]
        )
        args = trl.SFTConfig(**arguments(place, **changes))
        return made(model=model, args=args, processing_class=tokenizer(), **extra)
    return made(
        model=model, args=transformers.TrainingArguments(**arguments(place, **changes)), **extra
    )


def results_of(optimizer: Any, schedule: Any, model: torch.nn.Module) -> dict[str, Any]:
    """All that must be equal to the bit: adapters, moments, counters, latches and learning rates."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(optimizer, slk.StableLoRAAdamW) and len(optimizer.pairs) == 4
    return {
        "adapters": trained(model),
        "optimizer": optimizer.state_dict(),
        "latches": [pair.latched_at for pair in optimizer.stability()],
        "schedule": schedule.state_dict(),
    }


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def place_of(directory: Path, case: Case) -> Path:
    return directory / "-".join(case).replace(" ", "")


def run(directory: Path, case: Case, resumed: bool = False) -> dict[str, Any]:
    """The whole run; or its second half, in a model whose adapters are others. Of ours the
    checkpoint has the base model, too.
    """
    name, kind, via = case
    base_seed, adapter_seed = (9 if kind == "ours" else 0, 7) if resumed else (0, 0)
    model, place = llama(kind, base_seed, adapter_seed, dropout=0.2), place_of(directory, case)
    made = None
    if name == "SFTTrainer":
        from trl import SFTTrainer as made
    schedule = {
        "warmup_steps": 2,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": STEPS // 2,
    }
    target = directory / "resumed" if resumed else place
    trainer = make_trainer(model, target, via, made=made, logging_strategy="no", **schedule)
    trainer.train(
        resume_from_checkpoint=str(place / f"checkpoint-{STEPS // 2}") if resumed else None
    )
    return results_of(trainer.optimizer, trainer.lr_scheduler, model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, cases = Path(sys.argv[1]), [tuple(words.split("/")) for words in sys.argv[2:]]
    # The generators' states of another run: what is not in a checkpoint must not matter.
    torch.manual_seed(1234)
    torch.save({case: run(place, case, resumed=True) for case in cases}, place / "resumed.pt")
