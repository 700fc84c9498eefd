"""Adapters on disk, in the format of PEFT.

    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight (rank, in), ...lora_B.weight (out, rank),
                                ...lora_magnitude_vector (out,) under DoRA, and by their names the parameters
                                that train in full
    adapter_config.json         variant, rank, alpha, dropout, targets, name of the base model
    base_shift.safetensors      PiSSA, and LoftQ of several rounds: what was subtracted from the base's weights
                                before they were quantized (initialize.py), ...lora_A.weight and ...lora_B.weight

AdaLoRA's tensors (adalora.py) are called ...lora_A (rank, in), ...lora_B (out, rank), ...lora_E (rank, 1); the
triplets that training has zeroed are left out, and rank_pattern in the config says which.

PEFT, vLLM and the hub read these files, and theirs load here. An adapter that asks for something this
project does not compute is refused by name, never half loaded.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adalora import describe_adalora, pack_triplets, unpack_triplets
from qlora.config import LoRAConfig
from qlora.errors import InputError
from qlora.files import explain, new_file, read_json, read_tensors
from qlora.foreign import recognise
from qlora.initialize import BaseShift, base_shift, check_base, pissa_shift, same_shift, shift_base
from qlora.injection import (
    Adapter,
    activate,
    active_adapter,
    adapter_state,
    create_adapter,
    freeze_base,
    linear_layers,
    list_problems,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    wrap_layers,
    wrapped_layers,
)
from qlora.lora import with_magnitude
from qlora.quantize import logical_shape
from qlora.redact import redact
from qlora.trained import (
    base_shapes,
    read_tokenizer_files,
    saved_modules,
    trained_names,
    trained_problems,
)

WEIGHTS, CONFIG, BASE_SHIFT = "adapter_model.safetensors", "adapter_config.json", "base_shift.safetensors"
PREFIX = "base_model.model."
STARTS = ("gaussian", "pissa", "loftq")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARY = ("embed_tokens.weight", "wte.weight", "lm_head.weight")  # ends of embeddings' and heads' names
# PEFT's fields that change the forward pass, with the values that mean "not used".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "lora_bias": (None, False),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    # Strings here may name a start that changed the base; of those PiSSA can be done again, and LoftQ where it
    # comes with its base shift.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva", "pissa"),
}


@dataclass(frozen=True)
class AdapterSnapshot:
    """What an adapter's two files will hold, apart from the model: training may go on while it is written.

    Attributes:
        state: tensors in PEFT's names, copies in main memory.
        description: adapter_config.json.
        metadata: of the safetensors file.
        tokenizer: files by name, where the adapter has a tokenizer of its own.
        base_shift: tensors of base_shift.safetensors, which is not written where there are none.
    """

    state: dict[str, Tensor]
    description: dict[str, Any]
    metadata: dict[str, str]
    tokenizer: dict[str, bytes] = field(default_factory=dict)
    base_shift: dict[str, Tensor] = field(default_factory=dict)


def snapshot_adapter(model: nn.Module, config: LoRAConfig, base_model: str = "") -> AdapterSnapshot:
    """Copy the adapters of `model` as they are now.

    Args:
        base_model: name or path of the base, recorded for whoever loads the adapter.
    """
    layers = lora_layers(model)
    if not layers:
        raise RuntimeError("The model has no LoRA layers to save.")
    state = {key: t.to("cpu", copy=True) for key, t in lora_state_dict(model).items()}
    transposed = any(not isinstance(layer.base_layer, nn.Linear) for layer in layers.values())
    quantization = getattr(model, "quantization", None)
    # One key and no more: safetensors writes several in no fixed order, and equal adapters should be equal files.
    metadata = {"base_quantization": json.dumps(quantization and asdict(quantization))}
    description = describe_adapter(config, list(layers), base_model, transposed)
    adapter = active_adapter(model)
    trained = {} if adapter is None else adapter.trained
    description["modules_to_save"] = sorted(saved_modules(model, config, trained)) or None
    if len(set(map(id, trained.values()))) < len(trained):  # one tensor is both embedding and head
        description["ensure_weight_tying"] = True
    if config.use_adalora:
        state, pattern = pack_triplets(state)
        description |= describe_adalora(config, pattern, (0, 0, 1) if adapter is None else adapter.budget)
    state = {_file_key(key, layers, config.use_adalora): tensor for key, tensor in state.items()}
    shift = {
        f"{PREFIX}{layer}.lora_{part}.weight": factor.cpu().contiguous()
        for layer, factors in base_shift(model).items()
        for part, factor in zip("AB", factors, strict=True)
    }
    if shift:  # PEFT redoes PiSSA on a 16-bit base, and refuses it on a 4-bit one and LoftQ without its config
        description["init_lora_weights"] = config.init
    return AdapterSnapshot(state, description, metadata, {} if adapter is None else adapter.tokenizer, shift)


def describe_adapter(config: LoRAConfig, layers: list[str], base_model: str, transposed: bool) -> dict[str, Any]:
    """The adapter_config.json of an adapter of these layers.

    Args:
        transposed: whether they are Conv1D.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": redact(base_model),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _saved_targets(config, layers),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": config.rank_patterns,
        "alpha_pattern": config.alpha_patterns,
        "layers_to_transform": config.layer_numbers,
        "bias": config.bias,
        "modules_to_save": config.trained_modules or None,
        "fan_in_fan_out": transposed,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "inference_mode": True,
    }


def write_adapter(snapshot: AdapterSnapshot, directory: str | Path) -> None:
    """Write both files of an adapter, and its tokenizer if it has one, and read the tensors back.

    Each file is written beside its name and renamed: an existing adapter is replaced whole or not at all.

    Raises:
        RuntimeError: what was read back is not what was to be written.
    """
    from safetensors.torch import load_file, save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in snapshot.tokenizer.items():
        with new_file(directory / name) as file:
            file.write_bytes(content)
    with new_file(directory / CONFIG) as config_file, new_file(directory / WEIGHTS) as weights_file:
        save_file(snapshot.state, weights_file, metadata=snapshot.metadata)
        config_file.write_text(json.dumps(snapshot.description, indent=2, sort_keys=True) + "\n")
        if snapshot.base_shift:
            with new_file(directory / BASE_SHIFT) as shift_file:
                save_file(snapshot.base_shift, shift_file)
        else:
            (directory / BASE_SHIFT).unlink(missing_ok=True)
    written = load_file(directory / WEIGHTS)
    if written.keys() != snapshot.state.keys() or not all(
        torch.equal(written[k], t) for k, t in snapshot.state.items()
    ):
        raise RuntimeError(f"{directory / WEIGHTS} does not hold what was written; the disk may be failing.")


def save_adapter(model: nn.Module, directory: str | Path, config: LoRAConfig, base_model: str = "") -> None:
    """Write the adapters of `model` as they are now; arguments and errors as the two above."""
    write_adapter(snapshot_adapter(model, config, base_model), directory)


def _saved_targets(config: LoRAConfig, names: list[str]) -> list[str]:
    """The targets as PEFT's list of name endings; "all-linear" as the endings it stood for."""
    if config.targets != ["all-linear"]:
        return config.targets
    return sorted({name.rpartition(".")[2] for name in names})


def _file_key(key: str, layers: Collection[str], use_adalora: bool = False) -> str:
    """PEFT's name of a tensor of `lora_state_dict`: it knows the bias of an adapted layer as its base layer's."""
    if use_adalora and ".lora_" in key:
        key = key.removesuffix(".weight")
    layer, _, kind = key.rpartition(".")
    return f"{PREFIX}{layer}.base_layer.bias" if kind == "bias" and layer in layers else PREFIX + key


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as its files hold it.

    Attributes:
        config: what it was made by, the exact names of its layers as targets.
        state: tensors keyed as in `lora_state_dict`.
        description: adapter_config.json.
        directory: where it was read from.
        base_shift: layer -> (A', B') of what was subtracted from its base's weights; empty for an ordinary base.
    """

    config: LoRAConfig
    state: dict[str, Tensor]
    description: dict[str, Any]
    directory: Path
    base_shift: BaseShift = field(default_factory=dict)

    @property
    def adapted_layers(self) -> list[str]:
        """Qualified names of the layers with a low-rank update."""
        return sorted({key.rpartition(".lora_")[0] for key in self.state if ".lora_" in key})

    @property
    def trained(self) -> dict[str, Tensor]:
        """Parameter name -> value, of those that were trained in full."""
        return {key: tensor for key, tensor in self.state.items() if ".lora_" not in key}

    def low_rank(self, layer: str) -> tuple[Tensor, Tensor]:
        """(A (rank, in), B (out, rank)) in fp32 with every factor put into B: the update is B A.

        Raises:
            InputError: a DoRA adapter, whose update is not of low rank; a PiSSA one, whose base is another.
        """
        if self.base_shift or self.config.init == "pissa":
            raise InputError(
                f"{self.directory} holds an adapter for a base that was changed (PiSSA, LoftQ); make plain LoRA "
                "of it with as_plain_lora, or merge it."
            )
        if self.config.use_dora:
            raise InputError(f"{self.directory} holds a DoRA adapter, whose update is not of low rank; merge it.")
        return self._factors(layer)

    def _factors(self, layer: str) -> tuple[Tensor, Tensor]:
        A, B = (self.state[f"{layer}.lora_{part}.weight"].float() for part in "AB")
        if f"{layer}.lora_E" in self.state:
            A = A * self.state[f"{layer}.lora_E"].float()
        return A, self.config.scaling_of(layer, A.shape[0]) * B

    def as_plain_lora(self) -> SavedAdapter:
        """The same update relative to the original W, as LoRA of twice the rank: B A - B' A' = [B, -B'] [A; A'].

        On W in full precision it computes what this adapter computes on W - B' A' in full precision, to rounding.
        On a quantized base it does not: q(W) + [B, -B'] [A; A'] has q's error of W where this one has the smaller
        error of its own base. (PEFT's "convert PiSSA to LoRA".)

        Raises:
            InputError: a DoRA adapter, or PEFT's PiSSA without its base shift (`with_base_shift` finds it).
        """
        if self.config.init == "pissa" and not self.base_shift:
            raise InputError(f"{self.directory} does not hold its base shift; find it with with_base_shift.")
        if not self.base_shift:
            return self
        if self.config.use_dora:
            raise InputError(f"{self.directory} holds a DoRA adapter, whose update is not of low rank; merge it.")
        state, ranks = dict(self.state), {}
        for layer in self.adapted_layers:
            A, B = self._factors(layer)  # each B with its scaling, so that the new one is 1
            if layer in self.base_shift:
                shift_A, shift_B = self.base_shift[layer]
                A, B = torch.cat([A, shift_A]), torch.cat([B, -shift_B], 1)
            state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = A, B
            ranks[layer] = len(A)
        rank = max(ranks.values())
        others = ",".join(f"{layer}={own}" for layer, own in ranks.items() if own != rank)
        config = replace(
            self.config, rank=rank, alpha=float(rank), rank_pattern=others, alpha_pattern=others, use_rslora=False,
            init="kaiming", adapter_dtype="float32",
        )  # fmt: skip
        return replace(self, config=config, state=state, base_shift={})

    def merge_into(self, name: str, weight: Tensor) -> Tensor:
        """What the adapter makes of one parameter of its base.

        Args:
            name: of the parameter, as transformers saves it.
            weight: its fp32 value, (out, in) for a linear layer's weight (a Conv1D's transposed).
        Returns:
            c (W + s B A), or the trained parameter itself, in fp32; `weight` where the adapter has nothing.
        """
        if name in self.state:
            return self.state[name].float()
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or f"{layer}.lora_A.weight" not in self.state:
            return weight
        A, B = self._factors(layer)
        merged = torch.addmm(weight, B, A)
        return with_magnitude(merged, self.state.get(f"{layer}.lora_magnitude_vector"))


def read_adapter(directory: str | Path) -> SavedAdapter:
    """Read an adapter directory.

    Raises:
        InputError: a file missing or damaged, a foreign key, or a variant this project does not compute.
    """
    directory = Path(directory)
    tool = recognise(directory)
    if tool is not None:
        raise InputError(
            f"{directory} holds an adapter in {tool}'s own format; turn it into PEFT's by python -m qlora import."
        )
    _check_files(directory)
    description = read_json(directory / CONFIG, "save the adapter again", unique_keys=True)
    kind = description.get("peft_type")
    used = [k for k, neutral in UNSUPPORTED.items() if description.get(k) not in neutral]
    if description.get("init_lora_weights") == "loftq" and (directory / BASE_SHIFT).is_file():
        used.remove("init_lora_weights")
    if kind not in ("LORA", "ADALORA") or used:
        what = f"an adapter with {', '.join(used)}" if kind == "LORA" else f"a {_show(kind)} adapter"
        raise InputError(f"{directory} holds {what}, which this version does not compute; use plain LoRA.")
    config = _read_settings(directory / CONFIG, description)
    state = _read_tensors(directory / WEIGHTS, config)
    if config.use_adalora:
        state = unpack_triplets(state, description.get("rank_pattern"), config.rank, directory / CONFIG)
    saved = SavedAdapter(config, state, description, directory, _read_base_shift(directory / BASE_SHIFT))
    # PEFT saves embeddings of a grown vocabulary, and a tied head, without listing them.
    vocabulary = [name for name in saved.trained if name.endswith(VOCABULARY)]
    config.modules_to_save = ",".join([*config.trained_modules, *(n.rpartition(".")[0] for n in vocabulary)])
    ranks = {t.shape[0] for key, t in state.items() if key.endswith(".lora_A.weight") and t.dim() == 2}
    if ranks and not config.rank_pattern and config.rank not in ranks:
        raise InputError(
            f"{directory / CONFIG} has r = {config.rank}, but the tensors in {WEIGHTS} have rank "
            f"{', '.join(map(str, sorted(ranks)[:5]))}; save the adapter again."
        )
    # The exact layers: what the patterns of the file mean depends on the base.
    config.target_modules, config.layers = ",".join(saved.adapted_layers), ""
    # The narrowest dtype that holds every value exactly.
    factors = {tensor.dtype for key, tensor in state.items() if ".lora_A." in key or ".lora_B." in key}
    config.adapter_dtype = "bfloat16" if factors == {torch.bfloat16} else "float32"
    return saved


def _check_files(directory: Path) -> None:
    """Both files are there; where only a pickle is, say why it will not do."""
    try:
        missing = [name for name in (CONFIG, WEIGHTS) if not (directory / name).is_file()]
        pickle = directory / "adapter_model.bin"
        if WEIGHTS in missing and pickle.is_file():
            raise InputError(
                f"The adapter directory {directory} has no {WEIGHTS}, only {pickle.name}, a pickle, which can run "
                "code and is never loaded; save the adapter as safetensors."
            )
    except OSError as error:
        raise InputError(
            f"The adapter directory {directory} cannot be read ({explain(error)}); check the path."
        ) from error
    if missing:
        raise InputError(f"The adapter directory {directory} has no {missing[0]}; check the path.")


def _read_settings(file: Path, description: dict[str, Any]) -> LoRAConfig:
    """The settings of an adapter_config.json; each field's type and range are checked."""

    def check(field: str, wanted: str, fits: bool) -> None:
        if not fits:
            value = reprlib.repr(description[field])[:60] if field in description else "no value"
            raise InputError(f"{file} has {field} = {value}, not {wanted}; save the adapter again.")

    def given(field: str, default: Any) -> Any:
        value = description.get(field)
        return default if value is None else value

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value < torch.finfo(torch.float32).max

    is_adalora = description.get("peft_type") == "ADALORA"
    rank_name = "init_r" if is_adalora else "r"
    rank: Any = description.get(rank_name)
    alpha: Any = description.get("lora_alpha")
    dropout: Any = given("lora_dropout", 0.0)
    targets = description.get("target_modules")
    modules: Any = given("modules_to_save", [])
    numbers: Any = given("layers_to_transform", [])
    numbers = [numbers] if type(numbers) is int else numbers
    ranks: Any = {} if is_adalora else given("rank_pattern", {})
    alphas: Any = given("alpha_pattern", {})
    check(rank_name, "a whole number of 1 or more", type(rank) is int and rank >= 1)
    check("lora_alpha", "a number above 0", is_number(alpha))
    check(
        "lora_dropout",
        "a number from 0 up to, not including, 1",
        type(dropout) in (int, float) and 0 <= dropout < 1,
    )
    listed = targets if isinstance(targets, list) else [targets]
    named = targets is None or all(isinstance(name, str) for name in listed)
    check("target_modules", "a list of names or a pattern", named)
    check("modules_to_save", "a list of names", _is_list_of_names(modules))
    are_numbers = isinstance(numbers, list) and all(type(n) is int and 0 <= n < 10_000 for n in numbers)
    check("layers_to_transform", "a list of layer numbers", are_numbers)
    for name, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        fits = (
            isinstance(values, dict) and _is_list_of_names(list(values)) and all(map(is_number, values.values()))
        )
        check(name, "names with numbers above 0", fits)
    target: Any = given("target_r", 0) if is_adalora else 0
    interval: Any = given("deltaT", 1) if is_adalora else 10
    check("target_r", "a whole number", type(target) is int and target >= 0)
    check("deltaT", "a whole number of 1 or more", type(interval) is int and interval >= 1)
    for name in ("use_rslora", "use_dora"):
        check(name, "true or false", type(given(name, False)) is bool)
    check("bias", "none, all or lora_only", given("bias", "none") in ("none", "all", "lora_only"))
    try:
        return LoRAConfig(
            rank=rank,
            alpha=float(alpha),
            dropout=float(dropout),
            use_rslora=given("use_rslora", False),
            use_dora=given("use_dora", False),
            use_adalora=is_adalora,
            adalora_target_rank=min(target, rank),
            adalora_interval=interval,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            layers=",".join(map(str, numbers)),
            bias=given("bias", "none"),
            modules_to_save=modules,
            init=start if (start := description.get("init_lora_weights")) in STARTS else "kaiming",
        )
    except InputError as error:
        raise InputError(f"{file} does not hold together ({explain(error)}); save the adapter again.") from error


def _is_list_of_names(names: Any) -> bool:
    """Names that can go into messages, and between commas."""
    return isinstance(names, list) and all(
        isinstance(name, str) and name.isprintable() and "=" not in name and "," not in name for name in names
    )


def _read_tensors(file: Path, config: LoRAConfig) -> dict[str, Tensor]:
    """The tensors of a file, keyed as `lora_state_dict`."""
    stored = read_tensors(file, "save the adapter again")
    state = {_own_key(key): tensor for key, tensor in stored.items()}
    if len(state) < len(stored):
        raise InputError(f"{file} holds a parameter under two names; save the adapter again.")
    foreign = [key for key in stored if not key.startswith(PREFIX) or not key.isprintable()]
    if foreign or not state:
        named = f"{_show(foreign[0])} among {len(state)} tensors" if foreign else "nothing"
        raise InputError(f"{file} holds {named}, not LoRA tensors in PEFT's names; save the adapter again.")
    unannounced = [key for key in state if not _belongs(key, config)]
    if unannounced:
        raise InputError(
            f"{file} holds {_show(unannounced[0])} among {len(state)} tensors, which {CONFIG} does not announce "
            "by use_dora, bias or modules_to_save; save the adapter again."
        )
    for key, tensor in state.items():
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{file} holds {key} in {dtype}; save it in float32, bfloat16 or float16.")
    return state


def _read_base_shift(file: Path) -> BaseShift:
    """What a base_shift.safetensors holds; nothing where there is none."""
    if not file.is_file():
        return {}
    state = _read_tensors(file, LoRAConfig())
    layers = sorted({key.rpartition(".lora_")[0] for key in state})
    shift = {}
    for layer in layers:
        A, B = (state.get(f"{layer}.lora_{part}.weight") for part in "AB")
        if A is None or B is None or A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            raise InputError(
                f"{file} holds no pair lora_A (rank, in), lora_B (out, rank) for {layer}; save it again."
            )
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise InputError(f"{file} holds NaN or infinity for {layer}; save the adapter again.")
        shift[layer] = A.float(), B.float()
    return shift


def _own_key(key: str) -> str:
    """A tensor's name in `lora_state_dict`, from its name in a file of any version of PEFT."""
    key = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    if key.endswith((".lora_A", ".lora_B")):  # AdaLoRA's
        return f"{key}.weight"
    return key.removesuffix(".weight") if key.endswith(".lora_magnitude_vector.weight") else key


def _belongs(key: str, config: LoRAConfig) -> bool:
    """Whether an adapter of this configuration may hold such a tensor."""
    if key.endswith((".lora_A.weight", ".lora_B.weight")):
        return True
    if key.endswith(".lora_magnitude_vector"):
        return config.use_dora
    if key.endswith(".lora_E"):
        return config.use_adalora
    if key.endswith(VOCABULARY) or (key.endswith(".bias") and config.bias != "none"):
        return True
    module = "." + key.rpartition(".")[0]
    return any(module.endswith("." + name) for name in config.trained_modules)


def _show(value: Any) -> str:
    """A value out of a file, on one line and not too long."""
    return value[:60] if isinstance(value, str) and value.isprintable() else reprlib.repr(value)[:60]


def load_adapter(
    model: nn.Module, directory: str | Path, base_model: str = "", say: Callable[[str], Any] = print
) -> LoRAConfig:
    """Give a base model the adapter of a directory, in place and frozen all but the adapter.

    A model without an active adapter gets this one; where one is active, it takes over values and settings.

    Args:
        base_model: name or path of `model`; where the adapter names another, `say` hears of it.
    Returns:
        The adapter's configuration, its targets as in the file.
    Raises:
        InputError: every mismatch at once; the model is then unchanged.
    """
    if any(layer.merged_weight is not None for layer in wrapped_layers(model).values()):
        raise RuntimeError("The adapter is merged; call unmerge before loading another.")
    active = active_adapter(model)
    saved = settle_base(read_adapter(directory), model)
    if active is None:
        adapter = build_adapter(saved, model)
        wrap_layers(model, adapter.layers)
        activate(model, adapter)
    else:
        check_adapter(saved, model)
        load_lora_state_dict(model, saved.state, origin=str(directory))
        active.config = written_config(saved)
        for name, weights in active.layers.items():
            weights.alpha, weights.dropout = saved.config.alpha_of(name), saved.config.dropout
            weights.scaling = saved.config.scaling_of(name, weights.rank)
    freeze_base(model)
    compare_base(saved, base_model, say)
    return written_config(saved)


def compare_base(saved: SavedAdapter, base_model: str, say: Callable[[str], Any]) -> None:
    """Note it where the adapter names another base than `base_model`: no more, for people move directories."""
    named = saved.description.get("base_model_name_or_path")
    theirs, ours = (Path(name).name if isinstance(name, str) else "" for name in (named, base_model))
    if theirs and ours and theirs != ours:
        say(f"note: the adapter {saved.directory} names {_show(redact(theirs))} as its base, not {redact(ours)}")


def build_adapter(saved: SavedAdapter, model: nn.Module) -> Adapter:
    """A saved adapter in memory, at rest, on the device of `model`, which is left as it is.

    Raises:
        InputError: every mismatch at once (`check_adapter`).
    """
    check_adapter(saved, model)
    check_base(model, saved.base_shift, ready=True)
    adapter = create_adapter(model, saved.config, trained=saved.trained)
    with torch.no_grad():
        for key, parameter in adapter_state(adapter).items():
            parameter.copy_(saved.state[key])
    adapter.config, adapter.tokenizer = written_config(saved), read_tokenizer_files(saved.directory)
    budget = [saved.description.get(field) for field in ("tinit", "tfinal", "total_step")]
    if all(type(number) is int for number in budget):  # AdaLoRA's; they only go back into a file
        adapter.budget = tuple(budget)  # type: ignore[assignment]
    return adapter


def settle_base(saved: SavedAdapter, model: nn.Module) -> SavedAdapter:
    """Make the base of `model` the one that the adapter was trained on: PiSSA's and LoftQ's are changed first.

    Returns:
        The adapter, with its base shift where PEFT's file leaves it to the reader.
    Raises:
        InputError: a mismatch, or a base that other adapters share; the model is then unchanged.
    """
    saved = with_base_shift(saved, model, getattr(model, "source", None))
    if not same_shift(base_shift(model), saved.base_shift):
        check_adapter(saved, model)
        check_base(model, saved.base_shift)
        shift_base(model, saved.base_shift)
    return saved


def with_base_shift(saved: SavedAdapter, model: nn.Module, source: str | None) -> SavedAdapter:
    """A PiSSA adapter of PEFT with the base shift that it does not carry; others as they are.

    Args:
        model: the base, for its shapes; may be on the meta device.
        source: what `load_base_model` loads it from.
    """
    if saved.config.init != "pissa" or saved.base_shift:
        return saved
    check_adapter(saved, model)
    if source is None:
        raise InputError(f"{saved.directory} wants its base's original weights; load that with load_base_model.")
    settings = saved.config
    scalings = {}
    for layer in saved.adapted_layers:
        rank = settings.rank_of(layer)
        scalings[layer] = rank, settings.scaling_of(layer, rank)
    return replace(saved, base_shift=pissa_shift(source, scalings))


def written_config(saved: SavedAdapter) -> LoRAConfig:
    """The configuration of an adapter with targets and layers as its file spells them."""
    targets, numbers = (saved.description.get(field) for field in ("target_modules", "layers_to_transform"))
    listed = [numbers] if type(numbers) is int else numbers or []
    return replace(
        saved.config,
        target_modules=",".join(targets) if isinstance(targets, list) and targets else saved.config.target_modules,
        layers=",".join(map(str, listed)),
    )


def check_adapter(saved: SavedAdapter, model: nn.Module) -> None:
    """Compare an adapter's tensors with a base, before anything is changed.

    Args:
        model: the base; may be on the meta device.
    Raises:
        InputError: lists every unknown layer, missing part, wrong shape or rank, and non-finite value.
    """
    layers = {name: logical_shape(layer) for name, layer in linear_layers(model).items()}
    problems: list[str] = []
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in saved.adapted_layers:
        if layer not in layers:
            problems.append(f"{layer} is no linear layer of this model")
            continue
        (rows, columns), rank = layers[layer], saved.config.rank_of(layer)
        wanted[f"{layer}.lora_A.weight"], wanted[f"{layer}.lora_B.weight"] = (rank, columns), (rows, rank)
        if saved.config.use_dora:
            wanted[f"{layer}.lora_magnitude_vector"] = (rows,)
        if saved.config.use_adalora:
            wanted[f"{layer}.lora_E"] = (rank, 1)
    parameters = base_shapes(model)
    problems += trained_problems(model, saved.trained)
    adapted = [name for name in saved.adapted_layers if name in layers]
    try:
        trained = trained_names(model, saved.config, adapted, tied=False)
    except InputError as error:
        problems.append(explain(error))
        trained = []
    wanted |= {name: parameters[name] for name in trained if name not in saved.trained}
    for name in saved.trained:
        if trained and name in parameters and name not in trained:
            problems.append(f"{name} is none that bias and modules_to_save in {CONFIG} let train")
    if saved.config.bias == "lora_only" and any(n not in saved.state and n.endswith(".bias") for n in trained):
        problems.append(
            "older versions of PEFT write no biases of bias = lora_only (train with bias = all, or set bias to "
            f"none in {CONFIG} to load the adapter without them)"
        )
    for layer, (A, B) in saved.base_shift.items():
        if layers.get(layer) != (len(B), A.shape[1]):
            here = layers.get(layer, "no layer")
            problems.append(f"the base shift of {layer} is {(len(B), A.shape[1])}, but here it is {here}")
    for key, shape in wanted.items():
        tensor = saved.state.get(key)
        if tensor is None:
            problems.append(f"missing {key}")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{key} is {tuple(tensor.shape)} but its layer and rank want {shape}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{key} holds NaN or infinity")
    if problems:
        listed = list_problems(problems)
        raise InputError(f"The adapter in {saved.directory} is damaged or was made for another base: {listed}.")
