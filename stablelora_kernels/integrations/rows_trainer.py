"""``RowsTrainer``: several adapters in one step by Hugging Face's Trainer. Importing this module
needs no transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from stablelora_kernels.integrations.hf_trainer import derived_from_transformers
from stablelora_kernels.integrations.peft.rows import adapters_of_rows, losses_of_rows
from stablelora_kernels.integrations.peft.rows_state import BASE, ranges_of
from stablelora_kernels.model.reports import list_some
from stablelora_kernels.nn.fused_loss import has_fused_loss
from stablelora_kernels.optim import StableLoRAAdamW
from stablelora_kernels.optim.groups import check_adapters, frozen_adapters
from stablelora_kernels.pairs import adapter_of
from stablelora_kernels.utils.modules import check_module, clean, innermost

# The class of an instance derives from transformers' Trainer too.
_Trainer: Any = object
Settings = Mapping[str, Mapping[str, Any]]


class RowsTrainer(_Trainer):
    """A ``Trainer`` of transformers that trains several adapters of a PEFT model in one step, each
    as a ``Trainer`` of its own would, by :func:`adapters_of_rows`::

        slk.accelerate_peft(model)
        slk.RowsTrainer(model, args, train_dataset=rows, adapters={"a": {"lr": 1e-4}, "b": {"lr": 1e-3}}).train()

    A column of each dataset has the name of the row's adapter. Each adapter by itself

    - has its loss divided by its own tokens, over all micro-batches and processes of a step. It is
      logged as ``a/loss``, the mean over the steps with rows of the adapter since the last entry.
      The entry's ``loss`` is the sum of the adapters' losses.
    - has its gradient clipped to ``max_grad_norm``. The norm is logged as ``a/grad_norm``.
    - is evaluated on its own rows of ``eval_dataset``, as ``eval_a_loss``.

    A step without rows of an adapter leaves its parameters, moments and latch as they are. The
    learning rates follow the trainer's schedule. Checkpoints have PEFT's files of each adapter, and
    training resumes from them. With ``fuse_loss=True`` it computes no logits.

    Args:
        model: a PEFT model after :func:`accelerate_peft`.
        args, data_collator, train_dataset, eval_dataset: Trainer's. The collator gets the rows
            sorted by adapter, without the names. Each dataset of an ``eval_dataset`` that is a dict
            has the rows of one adapter.
        adapters: the adapters to train, with the settings of :class:`StableLoRAAdamW` in which each
            differs from ``args``. None: all of the model's.
        names_column: the column of the names.
        options: Trainer's other arguments. An optimizer among them replaces ``StableLoRAAdamW``.

    Raises:
        ImportError: transformers is not installed.
        TypeError: ``model`` is no module, or ``adapters`` or one of its values is no dict.
        ValueError: as :func:`adapters_of_rows`; another parameter than the adapters' trains; an
            argument cannot hold for each adapter by itself, or would be ignored; a dataset lacks
            the column, or has the name of no adapter that trains; or an optimizer lacks a
            parameter of an adapter.
    """

    # Trainer's.
    data_collator: Any
    optimizer: Any

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return object.__new__(derived_from_transformers(cls, "Trainer"))  # type: ignore[arg-type]

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        adapters: Settings | None = None,
        names_column: str = "adapter",
        **options: Any,
    ) -> None:
        check_module(model)
        named = _named_parameters(model)
        if adapters is None:
            adapters = {name: {} for p, _ in named if (name := adapter_of(p)) is not None}
        else:
            check_adapters(adapters, named, {})
        # The adapters that are frozen now will train: no warning.
        with torch.no_grad(), adapters_of_rows(model, adapters or (BASE,)):
            pass
        for name, p in named:
            if p.requires_grad and adapter_of(name) not in adapters:
                raise ValueError(
                    f"model must train nothing but the adapters {_listed(adapters)}, got {name!r}, which requires gradients"
                )
        _check_options(model, args, adapters, options)
        self.adapters = adapters
        self.names_column = names_column
        # The collator checks the other rows, batch by batch.
        if isinstance(train_dataset, Sized) and len(train_dataset):
            _name_of(train_dataset[0], names_column, adapters)  # type: ignore[index]
        if eval_dataset is not None and not isinstance(eval_dataset, dict):
            eval_dataset = self.by_adapter(eval_dataset)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **options)
        # compute_loss divides by the tokens of all micro-batches, whatever the model's loss does.
        self.model_accepts_loss_kwargs = True
        self.data_collator = SortingCollator(self.data_collator, names_column, tuple(adapters))
        # Of each adapter, since the last entry.
        self._loss_sums = torch.zeros(len(adapters), device=self.args.device)
        self._steps = torch.zeros_like(self._loss_sums)
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._grad_norms: dict[str, Tensor] = {}

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        for name, is_on in {
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP": self.is_fsdp_enabled,
        }.items():
            if is_on:
                raise ValueError(
                    f"RowsTrainer must run on one process or under DistributedDataParallel, got {name}, "
                    "which shards the gradients that it clips for each adapter"
                )
        # All releases of Trainer clip by this method, or take the norm for their log from it.
        self.accelerator.clip_grad_norm_ = self._clip_each_adapter

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.names_column not in self._signature_columns:
            self._signature_columns.append(self.names_column)

    def by_adapter(self, dataset: Any) -> dict[str, Subset[Any]]:
        """The rows of each adapter in a dataset that has a length, for ``evaluate`` and ``predict``."""
        rows: dict[str, list[int]] = {}
        for place in range(len(dataset)):
            name = _name_of(dataset[place], self.names_column, self.adapters)
            rows.setdefault(name, []).append(place)
        return {name: Subset(dataset, rows[name]) for name in self.adapters if name in rows}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        named = _named_parameters(self.model)
        # PEFT freezes all adapters but the active one, also when it has loaded a checkpoint.
        for _, p in frozen_adapters(self.adapters, named):
            p.requires_grad_(True)
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            self.optimizer = StableLoRAAdamW.from_model(
                self.model,
                adapters=self.adapters,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._parameters = {adapter: [] for adapter in self.adapters}
        for name, p in named:
            if not p.requires_grad:
                continue
            if id(p) not in held:
                raise ValueError(
                    f"optimizer must have all parameters of the adapters {_listed(self.adapters)}, got none for {name!r}"
                )
            self._parameters[adapter_of(name)].append(p)  # type: ignore[index]
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor]:
        """The micro-batches of a step, and how many tokens of each adapter they have."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        counts = self._count_tokens(batches)
        self._steps += counts > 0
        return batches, counts

    def _count_tokens(self, batches: Iterable[Mapping[str, Any]]) -> Tensor:
        """How many tokens of each adapter have a loss, over all processes."""
        places = [*self.adapters]
        counts = torch.zeros(len(places), dtype=torch.int64, device=self.args.device)
        for batch in batches:
            has_loss = batch["labels"][:, 1:].to(counts.device) != -100
            for adapter, start, end in ranges_of(batch[self.names_column]):
                counts[places.index(adapter)] += has_loss[start:end].sum()
        return self.accelerator.reduce(counts, "sum")  # type: ignore[no-any-return]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        with adapters_of_rows(model, inputs[self.names_column]):
            return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[no-any-return]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The sum of the adapters' losses. ``num_items_in_batch``: in training, of each adapter."""
        if not model.training or num_items_in_batch is None:
            num_items_in_batch = self._count_tokens([inputs])
        names, labels = inputs[self.names_column], inputs["labels"]
        arguments = {
            name: value
            for name, value in inputs.items()
            if name not in (self.names_column, "labels", "skip_logits")
        }
        if has_fused_loss(model):
            arguments |= {"labels": labels, "token_losses": True}
        outputs = model(**arguments)
        logits = outputs.get("logits")
        losses = losses_of_rows(
            outputs.loss if logits is None else logits,
            labels,
            names,
            num_items=dict(zip(self.adapters, num_items_in_batch, strict=True)),
        )
        # DistributedDataParallel takes the mean over processes.
        none = labels.new_zeros((), dtype=torch.float32)
        own = torch.stack([losses.get(name, none) for name in self.adapters])
        own = own * self.accelerator.num_processes
        if model.training:
            self._loss_sums += own.detach()
        loss = own.sum()
        return (loss, outputs) if return_outputs else loss

    def _clip_each_adapter(self, _: object, max_norm: float, norm_type: float = 2) -> Tensor:
        """Clip each adapter's gradient by itself, and return the norm of them all."""
        self.accelerator.unscale_gradients()
        self._grad_norms = {}
        for adapter, parameters in self._parameters.items():
            if any(p.grad is not None for p in parameters):
                norm = nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
                self._grad_norms[adapter] = norm
        return torch.stack([*self._grad_norms.values()]).norm(norm_type)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            sums = self.accelerator.reduce(self._loss_sums, "mean").tolist()
            for adapter, total, steps in zip(
                self.adapters, sums, self._steps.tolist(), strict=True
            ):
                if steps:
                    logs[f"{adapter}/loss"] = total / steps
            logs |= {f"{name}/grad_norm": norm.item() for name, norm in self._grad_norms.items()}
            self._loss_sums.zero_()
            self._steps.zero_()
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        names = inputs[self.names_column]
        if len({*names}) > 1:
            raise ValueError(
                f"evaluate and predict must get the rows of one adapter at a time, got {_listed(dict.fromkeys(names))}: "
                "trainer.by_adapter(dataset) has those of each"
            )
        # Without gradients, frozen adapters are no mistake.
        with torch.no_grad(), adapters_of_rows(model, names):
            return super().prediction_step(model, inputs, *args, **kwargs)


class SortingCollator:
    """Gives rows to a collator sorted by adapter and without the names, which it adds to the batch."""

    def __init__(
        self,
        collator: Callable[[list[Any]], Mapping[str, Any]],
        names_column: str,
        adapters: Sequence[str],
    ) -> None:
        self.collator = collator
        self.names_column = names_column
        self.adapters = adapters
        # Trainer saves it.
        self.tokenizer = getattr(collator, "tokenizer", None)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        column = self.names_column
        names = [_name_of(row, column, self.adapters) for row in rows]
        order = sorted(range(len(rows)), key=lambda row: self.adapters.index(names[row]))
        batch = self.collator(
            [{key: value for key, value in rows[row].items() if key != column} for row in order]
        )
        if "labels" not in batch:
            raise ValueError(f"data_collator must give labels, got {_listed(batch)}")
        return {**batch, column: [names[row] for row in order]}


def _named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(clean(name), p) for name, p in innermost(model).named_parameters()]


def _listed(names: Iterable[str]) -> str:
    return list_some([*map(repr, names)])


def _name_of(row: Mapping[str, Any], column: str, adapters: Collection[str]) -> str:
    """The name of a row's adapter."""
    if column not in row:
        raise ValueError(
            f"each row must have the column names_column={column!r}, got one with {_listed(row)}"
        )
    name: str = row[column]
    if name not in adapters:
        raise ValueError(
            f"the column {column!r} must name adapters that train, {_listed(adapters)}, got {name!r}"
        )
    return name


def _check_options(
    model: nn.Module, args: Any, adapters: Settings, options: Mapping[str, Any]
) -> None:
    """Raise of what cannot hold for each adapter by itself, or would be ignored."""
    config = getattr(model, "config", None)
    own_loss = "an adapter's loss is the cross-entropy of its own tokens"
    refused: dict[str, tuple[object, str]] = {
        "compute_loss_func": (options.get("compute_loss_func"), own_loss),
        "model.config.output_router_logits": (
            getattr(config, "output_router_logits", False),
            own_loss,
        ),
    }
    has_optimizer = options.get("optimizer_cls_and_kwargs") is not None
    has_optimizer |= options.get("optimizers", (None, None))[0] is not None
    if has_optimizer:
        settings = {name: own for name, own in adapters.items() if own}
        refused["adapters"] = (settings, "an optimizer of your own has settings of its own")
    if args is not None:
        smoothing = "args.label_smoothing_factor"
        refused[smoothing] = (args.label_smoothing_factor, own_loss)
        best = "args.load_best_model_at_end"
        refused[best] = (args.load_best_model_at_end, "each adapter has a best step of its own")
        devices = args.n_gpu if args.n_gpu > 1 else None
        refused["args.n_gpu"] = (devices, "start a process for each device, as torchrun does")
        if not has_optimizer and args.optim not in ("adamw_torch", "adamw_torch_fused"):
            reason = "StableLoRAAdamW trains the adapters, or what optimizers= or optimizer_cls_and_kwargs= give"
            refused["args.optim"] = (args.optim.value, reason)
    for name, (value, reason) in refused.items():
        if value:
            raise ValueError(f"RowsTrainer cannot take {name}={value!r}: {reason}")
