"""Trainings by Hugging Face's Trainer, TRL's SFTTrainer and accelerate, whole or resumed; as a program in a fresh process.

python -m tests.helpers.trainer_runs DIRECTORY CASE...: resume runs that ``train_whole`` left under DIRECTORY; a case is its
three words with slashes between them.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers

import stablelora_kernels as slk
from tests.helpers import small_models

STEPS = 6
ROWS, LENGTH, WORDS = 24, 7, 32
# The first layer's pairs latch before the checkpoint, the second's behind it.
SETTINGS: dict[str, Any] = {"lr": 0.1, "shrink_ratio": 0.2, "shrink_pattern": {r".*layers\.0\..*": 0.6}}
KINDS = ("ours", "peft", "accelerated")
Case = tuple[str, str, str]
CASES: list[Case] = [
    *itertools.product(("Trainer", "SFTTrainer"), KINDS, ("optimizers", "a factory")),
    *(("accelerate", kind, "prepare") for kind in KINDS),
]


def llama(kind: str, base_seed: int, adapter_seed: int) -> torch.nn.Module:
    """A tiny Llama with dropout everywhere, and adapters of random A and zero B on q_proj and v_proj."""
    torch.manual_seed(base_seed)
    model = small_models.llama(vocab_size=WORDS, attention_dropout=0.1, pad_token_id=0)
    torch.manual_seed(adapter_seed)
    lora = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}
    if kind == "ours":
        slk.apply_lora(model, slk.LoRAConfig(**lora))
        return model
    model = peft.get_peft_model(model, peft.LoraConfig(**lora, task_type="CAUSAL_LM"))
    if kind == "accelerated":
        report = slk.accelerate_peft(model, strict=True)
        assert len(report.replaced) == 4
    return model


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, WORDS, (ROWS, LENGTH), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, WORDS))])}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def make_trainer(case: Case, model: torch.nn.Module, place: Path) -> Any:
    trainer, _, via = case
    arguments = {
        "output_dir": str(place), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS,
        "warmup_steps": 2, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": STEPS // 2, "seed": 3,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "bf16": False,
    }  # fmt: skip
    if via == "optimizers":
        extra: dict[str, Any] = {"optimizers": (slk.StableLoRAAdamW.from_model(model, **SETTINGS), None)}
    else:
        extra = {"optimizer_cls_and_kwargs": (slk.StableLoRAAdamWFactory, SETTINGS)}
    if trainer == "Trainer":
        return transformers.Trainer(
            model=model, args=transformers.TrainingArguments(**arguments), train_dataset=rows(), **extra,
            data_collator=transformers.default_data_collator,
        )  # fmt: skip
    import datasets
    import trl

    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()])
    return trl.SFTTrainer(
        model=model, args=trl.SFTConfig(**arguments), train_dataset=data, processing_class=tokenizer(), **extra
    )


def train_by_accelerate(model: torch.nn.Module, place: Path, resumed: bool) -> dict[str, Any]:
    """A loop by hand around accelerate's ``prepare``, ``save_state`` and ``load_state``."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = slk.StableLoRAAdamW.from_model(model, **SETTINGS)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    # With a generator of its own: an iterator over a DataLoader draws a number, at another place of the run when it is resumed.
    loader = torch.utils.data.DataLoader(
        rows(), batch_size=2, collate_fn=transformers.default_data_collator, generator=torch.Generator()
    )
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    if resumed:
        accelerator.load_state(str(place))
        loader = accelerator.skip_first_batches(loader, STEPS)
    for number, batch in enumerate(loader, STEPS if resumed else 0):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if number + 1 == STEPS and not resumed:
            accelerator.save_state(str(place))
    return results_of(optimizer, schedule, model)


def results_of(optimizer: Any, schedule: Any, model: torch.nn.Module) -> dict[str, Any]:
    """All that must be equal to the bit: adapters, moments, counters, latches and learning rates."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(optimizer, slk.StableLoRAAdamW) and len(optimizer.pairs) == 4
    return {
        "adapters": {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "latches": [pair.latched_at for pair in optimizer.stability()],
        "schedule": schedule.state_dict(),
    }


def place_of(directory: Path, case: Case) -> Path:
    return directory / "-".join(case).replace(" ", "")


def train_whole(directory: Path, case: Case) -> dict[str, Any]:
    model = llama(case[1], base_seed=0, adapter_seed=0)
    place = place_of(directory, case)
    if case[0] == "accelerate":
        return train_by_accelerate(model, place, resumed=False)
    trainer = make_trainer(case, model, place)
    trainer.train()
    return results_of(trainer.optimizer, trainer.lr_scheduler, model)


def resume(directory: Path, case: Case) -> dict[str, Any]:
    """The second half of a run, in a model whose adapters are others; of ours the checkpoint has the base model, too."""
    model = llama(case[1], base_seed=9 if case[1] == "ours" else 0, adapter_seed=7)
    place = place_of(directory, case)
    if case[0] == "accelerate":
        return train_by_accelerate(model, place, resumed=True)
    trainer = make_trainer(case, model, directory / "resumed")
    trainer.train(resume_from_checkpoint=str(place / f"checkpoint-{STEPS // 2}"))
    return results_of(trainer.optimizer, trainer.lr_scheduler, model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, cases = Path(sys.argv[1]), [tuple(words.split("/")) for words in sys.argv[2:]]
    # The generators' states of another run: what is not in a checkpoint must not matter.
    torch.manual_seed(1234)
    torch.save({case: resume(place, case) for case in cases}, place / "resumed.pt")
