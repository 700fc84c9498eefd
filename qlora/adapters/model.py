"""`LoRAModel`: a base model and its adapters, by name, in one object.

At most one adapter is active. Adapters are small and share the base, so many fit in memory, and switching changes
one reference per adapted layer: nothing is copied, read or allocated. The methods have PEFT's names.
adapters/mix.py makes sums and stacks of adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.adapters.load import build_adapter, compare_base, load_adapter, settle_base
from qlora.adapters.mix import Method, adapter_factors, mix, mixed_config
from qlora.adapters.peft_files import read_adapter, save_adapter
from qlora.config.lora import LoRAConfig
from qlora.lora.adalora_optimizer import optimizer_for
from qlora.lora.adapter import activate, active_adapter, create_adapter, say_targets, wrap_layers, wrapped_layers
from qlora.lora.base_shift import base_shift
from qlora.lora.full_parameters import replaced_parameters
from qlora.lora.optimizer import AdapterOptimizer, MakeOptimizer
from qlora.lora.slot import Adapter, Wrapper
from qlora.lora.svd_start import initialize_adapter
from qlora.lora.trainable import (
    ParameterSummary,
    freeze_base,
    lora_parameters,
    merge_lora,
    parameter_summary,
    unmerge_lora,
)
from qlora.lora.unload import merge_and_unload, unload
from qlora.quant.layers import keep_unpacked
from qlora.system.errors import InputError


class _BaseForward:
    """`LoRAModel.forward`: the base's call, with the signature of the base's forward.

    transformers' Trainer keeps the columns of a dataset that this signature names.
    """

    def __get__(self, owner: LoRAModel | None, kind: type) -> Any:
        if owner is None:
            return _call_base
        call = partial(nn.Module.__call__, owner.model)
        call.__signature__ = inspect.signature(owner.model.forward)  # type: ignore[attr-defined]
        return call


def _call_base(model: LoRAModel, *args: Any, **options: Any) -> Any:
    return model.model(*args, **options)


class _JointConfig(LoRAConfig):
    """An adapter's settings, and what they lack from the base model's configuration; both to read and to set."""

    __slots__ = ("base",)
    __class__ = LoRAConfig  # type: ignore[assignment]  # equal to it, printed as it, replaced by it

    @classmethod
    def of(cls, own: LoRAConfig, base: Any) -> LoRAConfig:
        joint = object.__new__(cls)
        object.__setattr__(joint, "__dict__", own.__dict__)
        object.__setattr__(joint, "base", base)
        return joint

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self.base, name, value)

    def __reduce__(self) -> Any:
        return LoRAConfig, tuple(self.__dict__.values())


class LoRAModel(Wrapper):
    """A base model with its adapters: trains, saves, loads, switches, mixes, merges.

    Any torch model will do. Attributes and methods that it does not have itself are the base model's.

    The active adapter trains; inactive ones stay on the base's device, outside of the module tree, and get no
    gradient. Each may have its own layers, rank and variant.

    Args:
        base_model: adapted layers are wrapped in place and everything else is frozen.
        config: of a first, active adapter; None: the base alone.
        base_name: name or path of the base, recorded in saved adapters.
        name: of that adapter.
        tokenizer, say: as in `inject_lora`.
    """

    def __init__(
        self,
        base_model: nn.Module,
        config: LoRAConfig | None = None,
        seed: int = 0,
        base_name: str = "",
        name: str = "default",
        tokenizer: Any = None,
        say: Callable[[str], Any] = print,
    ) -> None:
        super().__init__()
        if not isinstance(base_model, nn.Module):
            raise InputError(f"base_model is {base_model!r:.80}; give LoRAModel a torch module (load_base_model).")
        if wrapped_layers(base_model):
            raise InputError("The model has LoRA layers already; give LoRAModel a fresh base model.")
        self._known: dict[str, Adapter] = {}
        self.model, self.base_name = base_model, base_name
        freeze_base(base_model)
        keep_unpacked(base_model)
        if config is not None:
            self._add(name, lambda: create_adapter(base_model, config, seed, tokenizer))
            say_targets(self._named(name), config, say)
            self.set_adapter(name)
            initialize_adapter(base_model, config)

    forward: Any = _BaseForward()

    def __setattr__(self, name: str, value: Any) -> None:
        """What only the base model has is set there, as it is read from there."""
        model = self.__dict__.get("_modules", {}).get("model")
        own = name in self.__dict__ or hasattr(type(self), name)
        if model is None or own or not hasattr(model, name):
            super().__setattr__(name, value)
        else:
            setattr(model, name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None or name.startswith("__"):
                raise
            return getattr(model, name)

    @property
    def base_model(self) -> nn.Module:
        """The base model, with its adapted layers."""
        return self.model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate on the adapted model."""
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    # ---- several adapters -----------------------------------------------------------------------------------

    @property
    def _adapters(self) -> dict[str, Adapter]:
        """All adapters by name; one that `inject_lora` or `qlora.load_adapter` activated joins as "default"."""
        active = active_adapter(self.model)
        if active is not None and not any(own is active for own in self._known.values()):
            names = ("default", *(f"default_{number}" for number in range(2, len(self._known) + 3)))
            self._known[next(name for name in names if name not in self._known)] = active
        return self._known

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters, in the order they came."""
        return list(self._adapters)

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter that the model computes with; None = the base alone."""
        active = active_adapter(self.model)
        return next((name for name, adapter in self._adapters.items() if adapter is active), None)

    @property
    def config(self) -> LoRAConfig:
        """Configuration of the active adapter.

        What it lacks is the base model's (`base_model.config`), which transformers' Trainer and its callbacks look
        for here.
        """
        own, base = self._active().config, getattr(self.model, "config", None)
        return own if base is None else _JointConfig.of(own, base)

    @property
    def lora_config(self) -> LoRAConfig:
        """The same as `config`."""
        return self.config

    def add_adapter(self, name: str, config: LoRAConfig, seed: int = 0, tokenizer: Any = None) -> None:
        """Make a fresh, inactive adapter; `set_adapter` activates it for training.

        Raises:
            InputError: a target matches nothing, or the initialization may change the base (PiSSA, LoftQ).
        """
        if isinstance(config, LoRAConfig) and config.starts_from_base:
            raise InputError(
                f"init {config.init} is for the adapter that a LoRAModel is made with; give that its config."
            )
        self._add(name, lambda: create_adapter(self.model, config, seed, tokenizer))

    def load_adapter(self, directory: str | Path, name: str, say: Callable[[str], Any] = print) -> None:
        """Load a saved adapter, inactive; one that changes its base (PiSSA) must be the only one and is activated.

        Args:
            say: called if the adapter names a base other than this model's `base_name`.
        Raises:
            InputError: every mismatch at once; the model is then unchanged.
        """
        saved = read_adapter(directory)
        self._add(name, lambda: build_adapter(settle_base(saved, self.model), self.model))
        compare_base(saved, self.base_name, say)
        if base_shift(self.model):
            self.set_adapter(name)

    def add_weighted_adapter(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        new_name: str,
        combination_type: Method = "cat",
        rank: int | None = None,
    ) -> None:
        """Make an inactive mix of adapters; "cat" is exactly the weighted sum, see adapters/mix.py.

        Args:
            rank: of the mix under "svd"; None = the largest rank among those mixed.
        Raises:
            InputError: an unknown name, DoRA or trained parameters, or shapes or ranks that do not fit.
        """
        factors = mix([adapter_factors(self._named(name)) for name in names], weights, combination_type, rank)

        def make() -> Adapter:
            adapter = create_adapter(self.model, mixed_config(factors))
            with torch.no_grad():
                for layer, weights in adapter.layers.items():
                    weights.lora_A.copy_(factors[layer][0])
                    weights.lora_B.copy_(factors[layer][1])
            return adapter

        self._add(new_name, make)

    def set_adapter(self, name: str | None) -> None:
        """Compute with this adapter and let it train; None: the base alone.

        Raises:
            InputError: no adapter of this name.
            RuntimeError: an adapter is merged.
        """
        adapter = None if name is None else self._named(name)
        before = active_adapter(self.model)
        activate(self.model, adapter)
        _let_train(before, False)
        _let_train(adapter, True)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Use the base alone within a `with` block."""
        return self._using(None)

    def delete_adapter(self, name: str) -> None:
        """Delete an adapter; if it was active, the base computes alone afterwards."""
        if self._named(name) is active_adapter(self.model):
            self.set_adapter(None)
        del self._adapters[name]

    def _named(self, name: str) -> Adapter:
        if not isinstance(name, str) or name not in self._adapters:
            raise InputError(f"Unknown adapter {name!r}; this model has {', '.join(self._adapters) or 'none'}.")
        return self._adapters[name]

    def _active(self) -> Adapter:
        adapter = active_adapter(self.model)
        if adapter is None:
            raise InputError("No adapter is active; call set_adapter(name) first.")
        return adapter

    def _has(self, adapter: Adapter | None) -> bool:
        return any(own is adapter for own in self._adapters.values())

    @contextmanager
    def _using(self, adapter: Adapter | None) -> Iterator[None]:
        before = active_adapter(self.model)
        if adapter is before:  # merged or not
            yield
            return
        is_ours = self._has(before)
        activate(self.model, adapter)
        try:
            yield
        finally:
            is_deleted = is_ours and not self._has(before)
            activate(self.model, None if is_deleted else before)

    def _add(self, name: str, make: Callable[[], Adapter]) -> None:
        """Add the adapter that `make` returns, inactive; `make` runs while the base has no active adapter."""
        if not isinstance(name, str) or not name:
            raise InputError(f"name is {name!r:.80}; give the adapter's name as text.")
        if name in self._adapters:
            raise InputError(f"There is an adapter {name!r} already; delete it first, or choose another name.")
        with self.disable_adapter():
            adapter = make()
            wrap_layers(self.model, adapter.layers)
        _let_train(adapter, False)
        self._adapters[name] = adapter

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LoRAModel:
        """Called by `to`, `cuda` and the like: moves inactive adapters with the model."""
        super()._apply(fn, recurse)
        active = active_adapter(self.model)
        resting = [adapter for adapter in self._adapters.values() if adapter is not active]
        for weights in (weights for adapter in resting for weights in adapter.layers.values()):
            weights._apply(fn)
        trained = [parameter for adapter in resting for parameter in adapter.trained.values()]
        for parameter in [*trained, *replaced_parameters(self.model).values()]:
            parameter.data = fn(parameter.data)
        return self

    # ---- the active adapter ---------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters for an optimizer. `optimizer` loses no small update to their rounding."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def optimizer(
        self,
        lr: float,
        kind: str | MakeOptimizer = "adamw",
        weight_decay: float = 0.0,
        total_steps: int | None = None,
    ) -> AdapterOptimizer:
        """A torch optimizer that steps fp32 masters of what trains, with the adapter's LoRA+ rates and AdaLoRA.

        Args:
            kind: adamw, paged_adamw_32bit, paged_adamw_8bit, or any torch optimizer's class (torch.optim.SGD).
            total_steps: optimizer steps of the whole training; only AdaLoRA's schedule needs it.
        Raises:
            InputError: no adapter is active, an unknown kind, or AdaLoRA without total_steps.
        """
        return optimizer_for(self.model, lr, kind, weight_decay, total_steps)

    def lora_parameters(self) -> list[nn.Parameter]:
        """All parameters of the active adapter: A and B of every adapted layer, and those trained in full."""
        return lora_parameters(self.model)

    def save(self, directory: str | Path, name: str | None = None) -> None:
        """Write adapter_model.safetensors and adapter_config.json of an adapter, by default the active one."""
        adapter = self._active() if name is None else self._named(name)
        with self._using(adapter):
            save_adapter(self.model, directory, adapter.config, self.base_name)

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        """The same as `save`: the adapter alone, as PEFT's method of this name."""
        self.save(directory)

    def load(self, directory: str | Path) -> None:
        """Load values and settings of a saved adapter with the same layers into the active one.

        Raises:
            InputError: every mismatch at once; the model is then unchanged.
        """
        self._active()
        load_adapter(self.model, directory)

    def merge(self) -> None:
        """Compute with merged dense weights from now on; training and switching become errors."""
        merge_lora(self.model)

    def unmerge(self) -> None:
        """Return to base and adapter, bit for bit."""
        unmerge_lora(self.model)

    def merge_and_unload(self, quantize: bool = False) -> nn.Module:
        """The base model with the active adapter in its weights, in place, and no trace of LoRA.

        This wrapper has no adapters afterwards. Layers, dtypes, `quantize` and errors are `lora.unload`'s.
        """
        model = merge_and_unload(self.model, quantize)
        self._adapters.clear()
        return model

    def unload(self) -> nn.Module:
        """The base model as it was, in place, without LoRA; this wrapper has no adapters afterwards.

        Raises:
            InputError: the base was changed for a PiSSA or LoftQ adapter.
        """
        model = unload(self.model)
        self._adapters.clear()
        return model

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As every module's. Raises InputError: not strict, and none of the names is this model's."""
        result = super().load_state_dict(state_dict, strict, assign)
        if state_dict and len(result.unexpected_keys) == len(state_dict):
            raise InputError(
                "No name in this state dict is one of this model's; load a base checkpoint into base_model."
            )
        return result

    @property
    def is_merged(self) -> bool:
        return any(layer.merged_weight is not None for layer in wrapped_layers(self.model).values())

    def summary(self) -> ParameterSummary:
        """Logical parameter counts; print it."""
        return parameter_summary(self.model)

    def print_summary(self) -> None:
        """Print the numbers of total, trainable and frozen parameters, and of adapted layers."""
        print(self.summary().table())


def _let_train(adapter: Adapter | None, train: bool) -> None:
    if adapter is None:
        return
    for weights in adapter.layers.values():
        for parameter in weights.parameters():
            parameter.requires_grad = train
    for parameter in adapter.trained.values():
        parameter.requires_grad = train


def get_lora_model(
    base_model: nn.Module, config: LoRAConfig | None = None, seed: int = 0, base_name: str = ""
) -> LoRAModel:
    """Adapt a model in place with q_proj and v_proj adapters by default, everything else frozen."""
    return LoRAModel(base_model, config or LoRAConfig(), seed, base_name)


def create_lora_model(
    cls: Callable[[Any], nn.Module], model_config: Any, lora_config: LoRAConfig | None = None, seed: int = 0
) -> LoRAModel:
    """Build a fresh model, `cls(model_config)`, and adapt it.

    Args:
        cls: a class of torch modules, such as transformers' LlamaForCausalLM, or a function that builds one.
        seed: for A's initial values.
    """
    if not callable(cls) or isinstance(cls, nn.Module):
        raise InputError(f"cls is {cls!r:.80}; give a class of torch modules.")
    return get_lora_model(cls(model_config), lora_config, seed)
