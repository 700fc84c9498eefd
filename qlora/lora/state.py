"""An adapter's tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import active_adapter, lora_layers
from qlora.lora.layer import LoRAWeights
from qlora.lora.slot import Adapter
from qlora.system.errors import InputError
from qlora.system.wording import list_first


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Everything the active adapter has learned, detached, not copied.

    `<layer>.lora_A.weight` (rank, in), `<layer>.lora_B.weight` (out, rank), under DoRA
    `<layer>.lora_magnitude_vector` (out,), under AdaLoRA `<layer>.lora_E` (rank, 1), and by their own names the
    parameters that train in full.

    Args:
        model: the network, or LoRAModel, DistributedDataParallel or torch.compile around it. In a larger module
            that only contains the network, layers have the names they have there.
    """
    adapter = active_adapter(model)
    if adapter is None:
        layers = {name: layer.weights for name, layer in lora_layers(model).items()}
        adapter = Adapter(LoRAConfig(), layers)
    return {key: value.detach() for key, value in adapter_state(adapter).items()}


def adapter_state(adapter: Adapter) -> dict[str, nn.Parameter]:
    """The parameters of an adapter, active or at rest, by the names of `lora_state_dict`."""
    layers = adapter.layers.items()
    state = {f"{name}.{key}": value for name, weights in layers for key, value in weights_state(weights).items()}
    return {**state, **adapter.trained}


def weights_state(weights: LoRAWeights) -> dict[str, nn.Parameter]:
    """One layer's parameters by the names they are saved under."""
    return {"lora_A.weight": weights.lora_A, "lora_B.weight": weights.lora_B, **weights.extras}


def load_lora_state_dict(model: nn.Module, state: dict[str, Tensor], origin: str = "state dict") -> None:
    """Copy `state` into the model's active adapter, or change nothing if anything does not fit.

    Raises:
        InputError: lists every missing or unexpected key, wrong shape and non-finite tensor at once.
    """
    own = lora_state_dict(model)
    if not own:
        raise InputError("No adapter is active, so nothing can be loaded; call set_adapter or inject_lora first.")
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{origin} is {state!r:.80}; give tensors by name, as lora_state_dict returns them.")
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            problems.append(f"{key} is {tuple(state[key].shape)} but the model wants {tuple(own[key].shape)}")
        elif not state[key].is_floating_point():
            problems.append(f"{key} is of {state[key].dtype}")
        elif not torch.isfinite(state[key]).all():
            problems.append(f"{key} holds NaN or infinity")
    first_name: dict[int, str] = {}
    for key in own.keys() & state.keys():
        tied = first_name.setdefault(own[key].data_ptr(), key)
        if key != tied and not torch.equal(state[key], state[tied]):
            problems.append(f"{key} and {tied} are one tensor in the model, but differ")
    if problems:
        raise InputError(f"The adapter in {origin} does not fit this model: {list_first(sorted(problems))}.")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])
