"""``Mergeable``: merge a LoRA branch into its weight, measure the rounding error, and undo it bit
for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Elements to add at a time, which bounds the float32 copies.
_MERGE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class MergeError:
    """The difference between a merged weight, as stored, and ``W + scaling · B A``.

    Attributes:
        largest_error: the largest absolute difference of an element.
        largest_delta: the largest absolute element of ``scaling · B A``.
    """

    largest_error: float
    largest_delta: float

    @property
    def relative(self) -> float:
        """``largest_error / largest_delta``: 0 if nothing was rounded away, 1 if the whole largest
        change was.
        """
        if self.largest_delta == 0:
            return math.inf if self.largest_error else 0.0
        return self.largest_error / self.largest_delta

    def __str__(self) -> str:
        return f"largest error {self.largest_error:.3g}, {self.relative:.3g} of the largest change {self.largest_delta:.3g}"


class Mergeable(nn.Module):
    """The merging half of :class:`~stablelora_kernels.LoRALinear`."""

    weight: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float

    def _start_unmerged(self) -> None:
        """Set the attributes of a layer that is not merged."""
        self.merged = False
        # While merged, the Parameter that merge() replaced. It is not registered: state_dict and
        # parameters() must not list it.
        self.__dict__["_unmerged_weight"] = None

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``scaling · B A`` [out_features, in_features] in float32 (float64 for a float64 layer)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    @torch.no_grad()
    def merge(self) -> MergeError:
        """Add the branch to the weight: ``W + scaling · B A``, in float32, rounded once to the
        weight's dtype.

        The merged weight is a new Parameter. A module that shares the frozen one, such as a tied
        embedding, keeps it; the two are untied until :meth:`unmerge` restores the frozen one bit
        for bit. Keeping it takes one weight's memory until then. ``state_dict`` holds the frozen
        weight, A and B all the time. ``save_pretrained`` of a transformers model that
        ``apply_lora`` or ``load_adapter`` gave its layers writes the merged weights if all layers
        are merged, and raises ``ValueError`` if only some are. A model with layers put in by hand
        needs :func:`~stablelora_kernels.merge_lora` for that.

        Returns:
            The rounding error, as :meth:`merge_error`.

        Raises:
            RuntimeError: the layer is already merged.
            ValueError: the merged weight would not be finite. Nothing is changed then.
        """
        if self.merged:
            raise RuntimeError("this LoRALinear is merged already")
        merged = torch.empty_like(self.weight)
        delta = self._stored_delta()
        for out, weight, change in self._merge_rows(merged, self.weight, delta):
            out.copy_(weight.to(delta.dtype) + change)
        if not self._all_finite(merged):
            raise ValueError(
                "merging would give a weight that is not finite; check lora_A, lora_B and weight for nan or inf"
            )
        self.__dict__["_unmerged_weight"] = self.weight
        self.set_weight(nn.Parameter(merged, requires_grad=False))
        self.merged = True
        return self._merge_error(delta)

    def merge_error(self) -> MergeError:
        """The difference between the current merged weight and ``W + scaling · B A`` with the
        current W, A and B.

        It is measured against the exact sum of W and ``scaling · B A``, the latter rounded to
        float32 (float64 for a float64 layer). So it shows even a change that is too small for a
        float32 weight.

        Raises:
            RuntimeError: the layer is not merged.
        """
        if not self.merged:
            raise RuntimeError("this LoRALinear is not merged")
        return self._merge_error(self._stored_delta())

    def _all_finite(self, matrix: Tensor) -> bool:
        return bool(torch.isfinite(matrix).all())

    def _merge_error(self, delta: Tensor) -> MergeError:
        return MergeError(*(value.item() for value in self._merge_error_of(delta)))

    @torch.no_grad()
    def _merge_error_of(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The largest error and the largest change, as device scalars."""
        largest_error = delta.new_zeros(())
        for stored, weight, change in self._merge_rows(self.weight, self.frozen_weight, delta):
            stored = stored.to(delta.dtype)
            weight = weight.to(delta.dtype)
            # The exact rounding error of the addition itself (Knuth's TwoSum).
            total = weight + change
            back = total - weight
            lost = (weight - (total - back)) + (change - back)
            largest_error = torch.maximum(largest_error, ((stored - total) - lost).abs().max())
        return largest_error, delta.abs().max()

    @property
    def frozen_weight(self) -> nn.Parameter:
        """``weight``; while the layer is merged, the Parameter that :meth:`unmerge` will restore."""
        return self.__dict__["_unmerged_weight"] if self.merged else self.weight

    @property
    def holder(self) -> nn.Module:
        """The module whose parameter ``weight`` is."""
        return self

    def set_weight(self, weight: nn.Parameter) -> None:
        """Put another Parameter in the place of ``weight``."""
        self.weight = weight

    def _stored_delta(self) -> Tensor:
        """:meth:`delta_weight` in the weight's storage layout."""
        return self.delta_weight()

    def _merge_rows(self, *matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Split tensors of the weight's shape into blocks of rows."""
        rows = max(1, _MERGE_ELEMENTS // max(1, matrices[0][:1].numel()))
        return zip(*(matrix.split(rows) for matrix in matrices), strict=True)

    def unmerge(self) -> None:
        """Undo :meth:`merge` exactly.

        Raises:
            RuntimeError: the layer is not merged.
        """
        if not self.merged:
            raise RuntimeError("this LoRALinear is not merged")
        self.set_weight(self.frozen_weight)
        self.__dict__["_unmerged_weight"] = None
        self.merged = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mergeable:
        # .to(), .half() and the like must also move the weight that unmerge() will restore.
        super()._apply(fn, recurse)
        if self.merged:
            with torch.no_grad():
                self.frozen_weight.data = fn(self.frozen_weight.data)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        # Loading a merged weight together with A and B would apply the branch twice.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[self._weight_key(prefix)] = (
                self.frozen_weight if keep_vars else self.frozen_weight.detach()
            )

    def _weight_key(self, prefix: str) -> str:
        """The weight's key in ``state_dict``."""
        return prefix + "weight"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local: dict[str, object],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        if self.merged:
            errors.append(
                f"{prefix.rstrip('.') or 'this LoRALinear'} is merged; unmerge() before loading into it"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local, strict, missing, unexpected, errors
        )
