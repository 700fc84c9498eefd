"""What a run knows about its base, in one object: the only attribute we set on a transformers model.

`load_base_model`, `plan_base_model` and the loaders of qlora/parallel set it. A model that a user built in another
way has none. Code that needs it calls `base_info`, which raises if it is missing; code that also adapts plain
models calls `find_base_info`, which raises only if one of our loaders forgot it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from qlora.quant.layers import FrozenMatrix, Linear4bit, Linear16bit
from qlora.quant.sharded import ShardedLinear4bit
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.system.ranks import Ranks


@dataclass(frozen=True)
class BaseInfo:
    """A base as it was loaded.

    Attributes:
        source: directory, hub id or .gguf file, as given; original weights are read from it again.
        quantization: of its weights; None for a 16-bit base.
        compute_dtype: dtype of activations.
        ranks: how processes split it; None if each holds it whole.
        weight_samples: for a split base, name -> sample of the whole weight, for the fingerprint.
    """

    source: str
    quantization: QuantConfig | None
    compute_dtype: torch.dtype
    ranks: Ranks | None = None
    weight_samples: dict[str, bytes] | None = None

    def __post_init__(self) -> None:
        assert (self.ranks is None) == (self.weight_samples is None), "a split base needs ranks and weight samples"


def base_info(model: nn.Module) -> BaseInfo:
    """The base's description.

    Raises:
        InputError: the model was not loaded by this package.
    """
    info = find_base_info(model)
    if info is None:
        raise InputError("This needs a model from load_base_model, which knows its source and compute dtype.")
    return info


def find_base_info(model: nn.Module) -> BaseInfo | None:
    """The base's description; None for a plain model, with only torch and transformers layers.

    Raises:
        RuntimeError: a loader put our layers into the model but did not set the description.
    """
    info: BaseInfo | None = vars(model).get("base_info")
    own = (Linear4bit, Linear16bit, ShardedLinear4bit, FrozenMatrix)
    if info is None and any(isinstance(module, own) for module in model.modules()):
        raise RuntimeError("The model has frozen layers of qlora but no base_info, which its loader has to set.")
    return info


def ranks_of(model: nn.Module, accelerator: Accelerator | None) -> Ranks:
    """How processes share the work: as the base was split, else data parallel; accelerator None: one process."""
    info = find_base_info(model)
    if info is not None and info.ranks is not None:
        return info.ranks
    return Ranks() if accelerator is None else Ranks(accelerator.process_index, accelerator.num_processes)
