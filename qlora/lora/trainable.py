"""Which parameters train, and how many."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qlora.lora.adapter import active_adapter, lora_layers, wrapped_layers
from qlora.lora.slot import network_of
from qlora.quant.layers import logical_sizes
from qlora.quant.linear import explain_not_plain, is_plain
from qlora.system.errors import InputError


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters of the active adapter, in model order: A and B of every layer, and those trained in full."""
    adapter = active_adapter(model)
    own = [p for layer in lora_layers(model).values() for p in layer.weights.parameters()]
    return own + (list(dict.fromkeys(adapter.trained.values())) if adapter is not None else [])


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that is not an adapter's; tied ones once."""
    adapter = {id(p) for p in lora_parameters(model)}
    return [p for p in model.parameters() if id(p) not in adapter]


def freeze_base(model: nn.Module) -> None:
    """Train only the adapters. Raises InputError: a lazy layer has no shape yet."""
    model = network_of(model)
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
        raise InputError("The model has lazy layers without a shape yet; run it once before adapting it.")
    for parameter in base_parameters(model):
        parameter.requires_grad_(False)
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)


def unfreeze(model: nn.Module) -> None:
    """Train everything that can take a gradient; packed 4-bit weights are integers and cannot."""
    for parameter in network_of(model).parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)


def merge_lora(model: nn.Module) -> None:
    """Compute each adapted layer with one merged dense weight (export/merge.py writes merged models to disk).

    Raises:
        InputError: no adapter is active, or a layer is more than its weight; nothing is merged.
    """
    if not lora_layers(model):
        raise InputError("No adapter is active, so nothing can be merged; call set_adapter or inject_lora first.")
    for name, layer in lora_layers(model).items():
        if not is_plain(layer.base_layer):
            raise InputError(f"{name} {explain_not_plain(layer.base_layer)}, so it cannot be merged.")
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Return to base + adapter, bit for bit."""
    for layer in wrapped_layers(model).values():
        layer.unmerge()


def count_parameters(model: nn.Module) -> int:
    """Number of weights: tied ones once, packed 4-bit ones unpacked."""
    return sum(size for _, size in logical_sizes(network_of(model)))


def count_trainable_parameters(model: nn.Module) -> int:
    """Number of weights that require a gradient."""
    return sum(size for parameter, size in logical_sizes(network_of(model)) if parameter.requires_grad)


@dataclass
class ParameterSummary:
    """Logical parameter counts; `str()` is the line a run prints."""

    total: int
    trainable: int
    adapted_layers: int

    @property
    def share(self) -> float:
        return self.trainable / self.total if self.total else 0.0

    def table(self) -> str:
        """Total, trainable and frozen parameters and adapted layers, one per line."""
        return (
            f"Total parameters:     {self.total:,}\n"
            f"Trainable parameters: {self.trainable:,} ({self.share:.4%})\n"
            f"Frozen parameters:    {self.total - self.trainable:,}\n"
            f"Adapted layers:       {self.adapted_layers:,}"
        )

    def __str__(self) -> str:
        return (
            f"{self.trainable:,} trainable of {self.total:,} parameters ({self.share:.4%}), "
            f"{self.adapted_layers} adapted layers"
        )


def parameter_summary(model: nn.Module) -> ParameterSummary:
    """Counts of all and of trainable parameters, and the number of adapted layers."""
    return ParameterSummary(count_parameters(model), count_trainable_parameters(model), len(lora_layers(model)))
