"""An adapter, and the one object per model that records what adapters have changed in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor, nn

from qlora.config.lora import LoRAConfig
from qlora.lora.layer import LoRALinear, LoRAWeights
from qlora.system.errors import InputError

BaseShift: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""Layer -> (A' (r, in), B' (out, r)) fp32; its base is q(W - B' A')."""


@dataclass
class Adapter:
    """Everything that one adapter learns, active in a model or not.

    Attributes:
        config: its settings.
        layers: qualified layer name -> its weights there.
        trained: parameter name -> a copy of a base parameter that trains in full (biases, embeddings, ...).
        tokenizer: files by name of the adapter's own tokenizer; empty if it uses the base's.
        run_fields: whole numbers of its adapter_config.json that come from the run (AdaLoRA's schedule).
    """

    config: LoRAConfig
    layers: dict[str, LoRAWeights]
    trained: dict[str, nn.Parameter] = field(default_factory=dict)
    tokenizer: dict[str, bytes] = field(default_factory=dict)
    run_fields: dict[str, int] = field(default_factory=dict)


@dataclass
class AdapterSlot:
    """What adapters have changed in a model; empty for an untouched one.

    Attributes:
        wrapped: qualified name -> LoRALinear, in model order; None before the first `wrap_layers`.
        active: the adapter that the model computes with; None = the base alone.
        replaced: the base's parameters that the active adapter's copies replace, by name.
        shift: what was subtracted from the base's weights (base_shift.py); empty for an ordinary base.
    """

    wrapped: dict[str, LoRALinear] | None = None
    active: Adapter | None = None
    replaced: dict[str, nn.Parameter] = field(default_factory=dict)
    shift: BaseShift = field(default_factory=dict)


class Wrapper(nn.Module):
    """A module around an adapted network, which is its `model`: LoRAModel."""

    model: nn.Module


def network_of(model: nn.Module) -> nn.Module:
    """The network inside LoRAModel, (Distributed)DataParallel and torch.compile; without them `model` itself.

    Raises:
        InputError: `model` is no torch module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {model!r:.80}; give a torch module.")
    while True:
        if isinstance(model, Wrapper):
            model = model.model
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's
            model = model.get_submodule("_orig_mod")
        else:
            return model


def slot_of(model: nn.Module) -> AdapterSlot:
    """The slot of a model, made on first use. A deep copy of the model gets a copy of it."""
    model = network_of(model)
    slot: AdapterSlot = vars(model).setdefault("adapter_slot", AdapterSlot())
    return slot
