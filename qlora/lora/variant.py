"""How a variant of LoRA differs: in a layer, in an adapter's files, in the memory plan.

A layer computes y = c * (x W^T + s (x A'^T) B^T) + b. Plain LoRA has c = 1 and A' = A, and no variant.

To add one, write a file like dora.py or adalora.py with a class that overrides what differs, a flag in
LoRAConfig that turns it on, and its row in variants.py. Other code asks `LoRAWeights.variant` or `variant_of`.

I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.config.lora import LoRAConfig
from qlora.lora.layer import LoRALinear, LoRAWeights
from qlora.system.errors import InputError
from qlora.system.wording import quote


class PeftFields:
    """The fields of an adapter_config.json, checked as they are read."""

    def __init__(self, file: Path, description: dict[str, Any]) -> None:
        self.file, self.description = file, description

    def check(self, name: str, wanted: str, fits: bool) -> None:
        """Raises an InputError unless `fits`."""
        if not fits:
            value = quote(self.description[name]) if name in self.description else "no value"
            raise InputError(f"{self.file} has {name} = {value}, not {wanted}; save the adapter again.")

    def given(self, name: str, default: Any) -> Any:
        """The field's value; `default` where it is absent or null."""
        value = self.description.get(name)
        return default if value is None else value


class Variant:
    """One variant, stateless; the methods of this base class are plain LoRA's.

    `extras` are the tensors of one layer besides A and B, by their saved names.

    Attributes:
        flag: the setting of LoRAConfig that turns it on.
        name: its common name.
        extras: saved name, as in `<layer>.<saved name>` -> attribute of LoRAWeights.
        beyond: what it learns beyond a low-rank update, in words; empty = nothing.
        needs_weight: whether it computes from the base's weight, which must then be all that the base layer is.
        peft_type, rank_field: PEFT's, in adapter_config.json.
        run_fields: whole numbers of adapter_config.json that come from the run (`Adapter.run_fields`).
    """

    flag: ClassVar[str]
    name: ClassVar[str]
    extras: ClassVar[Mapping[str, str]] = {}
    beyond: ClassVar[str] = ""
    needs_weight: ClassVar[bool] = False
    peft_type: ClassVar[str] = "LORA"
    rank_field: ClassVar[str] = "r"
    run_fields: ClassVar[tuple[str, ...]] = ()

    # ---- in a layer -----------------------------------------------------------------------------------------

    def start(self, weights: LoRAWeights, layer: nn.Module, generator: torch.Generator) -> None:
        """Add the variant's parameters to the fresh weights of a frozen layer.

        Args:
            generator: CPU generator that A was drawn from.
        """

    def follow_start(self, layer: LoRALinear) -> None:
        """Update the extras after PiSSA or LoftQ has set A, B and the base (svd_start.py)."""

    def effective_A(self, A: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """(R, I) A'."""
        return A

    def output_scale(self, layer: LoRALinear, dtype: torch.dtype) -> Tensor | None:
        """(O,) fp32 c; None = ones.

        Args:
            dtype: of the products it computes.
        """
        return None

    def terms(self, layer: LoRALinear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(A', c) of one forward pass."""
        weights, scale = layer.weights, layer.fixed_scale
        return weights.effective_A, self.output_scale(layer, dtype) if scale is None else scale

    def merge(self, weight: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """(O, I) fp32 W + s B A' -> the weight that computes the same as base and adapter."""
        return weight

    def token_bytes(self, layer: LoRALinear, itemsize: int) -> int:
        """Bytes per token that a layer keeps for the backward pass, besides LoRA's."""
        return 0

    # ---- in files -------------------------------------------------------------------------------------------

    def shapes(self, rows: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shape of each of the extras, in a layer with `rows` outputs."""
        return {}

    def misfit(self, rows: int, rank: int) -> str:
        """Describes a layer whose extras have wrong shapes, for an error."""
        raise NotImplementedError

    def used_rank(self, A: Tensor, extras: Mapping[str, Tensor]) -> int:
        """Number of rows of A in use."""
        return len(A)

    def file_name(self, key: str) -> str:
        """PEFT's file name of a tensor of `lora_state_dict`, without PEFT's prefix."""
        return key

    def own_name(self, key: str) -> str:
        """The inverse of `file_name`, for a file of any variant."""
        return key

    def pack(
        self, state: dict[str, Tensor], config: LoRAConfig, run_fields: Mapping[str, int]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(`lora_state_dict` as it is stored, fields of adapter_config.json that differ from LoRA's)."""
        return state, {}

    def unpack(
        self, state: dict[str, Tensor], description: Mapping[str, Any], config: LoRAConfig, file: Path
    ) -> dict[str, Tensor]:
        """The inverse of `pack`. Raises InputError if `file`, an adapter_config.json, does not fit the tensors."""
        return state

    def describe(self, config: LoRAConfig) -> dict[str, Any]:
        """Fields that this variant adds to every adapter_config.json."""
        return {}

    def read(self, fields: PeftFields) -> dict[str, Any]:
        """Settings of LoRAConfig from these fields; the rank has been checked."""
        return {}
