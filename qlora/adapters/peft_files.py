"""Read and write adapters in PEFT's format.

    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight (rank, in), ...lora_B.weight (out, rank),
                                ...lora_magnitude_vector (out,) under DoRA, and the parameters that train in full
                                under their own names
    adapter_config.json         variant, rank, alpha, dropout, targets, name of the base model
    base_shift.safetensors      PiSSA, and LoftQ of several rounds: what was subtracted from the base's weights
                                before they were quantized (lora/svd_start.py), ...lora_A.weight and
                                ...lora_B.weight

One .safetensors file may hold tensors and settings (files.py).

AdaLoRA's tensors (lora/adalora.py) are called ...lora_A (rank, in), ...lora_B (out, rank), ...lora_E (rank, 1);
zeroed triplets are omitted, and rank_pattern in the config says which.

PEFT, vLLM and the hub read these files, and theirs load here. An adapter with an unsupported setting is refused by
name, never half loaded.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapters.files import (
    adapter_path,
    is_one_file,
    metadata_of_one_file,
    read_description,
    weights_file,
)
from qlora.adapters.other_formats import detect_tool
from qlora.adapters.peft_config import (
    PREFIX,
    UNSUPPORTED,
    belongs_to_adapter,
    describe_adapter,
    file_key,
    is_vocabulary,
    own_key,
    read_settings,
)
from qlora.adapters.peft_extras import Rows, StoredTensors, sort_stored
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import active_adapter, lora_layers
from qlora.lora.base_shift import base_shift
from qlora.lora.full_parameters import saved_modules
from qlora.lora.slot import BaseShift, network_of
from qlora.lora.state import lora_state_dict
from qlora.lora.variants import PEFT_TYPES, variant_of
from qlora.model.base import find_base_info
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.system.file_names import BASE_SHIFT, CONFIG, WEIGHTS
from qlora.system.files import new_file, read_tensors
from qlora.system.wording import explain, show_value

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AdapterSnapshot:
    """A copy of an adapter for writing its files while training continues.

    Attributes:
        state: tensors by PEFT's names, copies in main memory.
        description: adapter_config.json.
        metadata: of the safetensors file.
        tokenizer: files by name, if the adapter has its own tokenizer.
        base_shift: tensors of base_shift.safetensors, which is written only if there are any.
    """

    state: dict[str, Tensor]
    description: dict[str, Any]
    metadata: dict[str, str]
    tokenizer: dict[str, bytes] = field(default_factory=dict)
    base_shift: dict[str, Tensor] = field(default_factory=dict)


def snapshot_adapter(model: nn.Module, config: LoRAConfig, base_model: str = "") -> AdapterSnapshot:
    """Copy the current state of the active adapter of `model`, or of the network that it wraps.

    Args:
        base_model: name or path of the base, recorded in the adapter.
    Raises:
        InputError: no adapter is active.
    """
    model = network_of(model)
    layers, adapter = lora_layers(model), active_adapter(model)
    if not isinstance(config, LoRAConfig):
        raise InputError(f"config is {config!r:.80}; give a LoRAConfig.")
    if not layers and (adapter is None or not adapter.trained):
        raise InputError("No adapter is active, so nothing can be saved; call set_adapter or inject_lora first.")
    state = {key: t.to("cpu", copy=True) for key, t in lora_state_dict(model).items()}
    transposed = any(not isinstance(layer.base_layer, nn.Linear) for layer in layers.values())
    info = find_base_info(model)
    quantization = None if info is None else info.quantization
    # Only one key: safetensors writes several in random order, and equal adapters should give equal files.
    metadata = {"base_quantization": json.dumps(_as_recorded(quantization))}
    description = describe_adapter(config, list(layers), base_model, transposed)
    trained = {} if adapter is None else adapter.trained
    description["modules_to_save"] = sorted(saved_modules(model, config, trained)) or None
    if len(set(map(id, trained.values()))) < len(trained):  # one tensor is both embedding and head
        description["ensure_weight_tying"] = True
    variant = variant_of(config)
    if variant is not None:
        state, own = variant.pack(state, config, {} if adapter is None else adapter.run_fields)
        description |= own
    state = {file_key(key, layers, variant): tensor for key, tensor in state.items()}
    shift = {
        f"{PREFIX}{layer}.lora_{part}.weight": factor.cpu().contiguous()
        for layer, factors in base_shift(model).items()
        for part, factor in zip("AB", factors, strict=True)
    }
    if shift:  # PEFT redoes PiSSA on a 16-bit base, refuses it on a 4-bit one, and LoftQ without its config
        description["init_lora_weights"] = config.init
    return AdapterSnapshot(state, description, metadata, {} if adapter is None else adapter.tokenizer, shift)


def _as_recorded(quant: QuantConfig | None) -> dict[str, Any] | None:
    """A base's quantization as adapters record it; earlier versions know no calibration."""
    fields = None if quant is None else asdict(quant)
    return fields and {name: value for name, value in fields.items() if value != "" or name != "calibration"}


def write_adapter(snapshot: AdapterSnapshot, path: str | Path) -> None:
    """Write an adapter's files, including its tokenizer if it has one, and read the tensors back.

    Each file is written under another name and renamed: an existing adapter is replaced completely or not at all.

    Args:
        path: a directory; or a .safetensors file, which then holds tensors and settings.
    Raises:
        InputError: one file cannot hold all of this adapter.
        RuntimeError: the tensors read back differ.
    """
    from safetensors.torch import save_file

    path = adapter_path(path, to_write=True)
    if is_one_file(path):
        if snapshot.tokenizer or snapshot.base_shift:
            what = "a tokenizer of its own" if snapshot.tokenizer else "a changed base (PiSSA, LoftQ)"
            raise InputError(f"An adapter with {what} needs several files; give a directory instead of {path}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            save_file(snapshot.state, file, metadata_of_one_file(snapshot.description, snapshot.metadata))
    else:
        _write_directory(snapshot, path)
    _compare_written(weights_file(path), snapshot.state)


def _compare_written(file: Path, state: dict[str, Tensor]) -> None:
    from safetensors.torch import load_file

    written = load_file(file)
    if written.keys() != state.keys() or not all(torch.equal(written[k], t) for k, t in state.items()):
        raise RuntimeError(f"{file} does not hold what was written; the disk may be failing.")


def _write_directory(snapshot: AdapterSnapshot, directory: Path) -> None:
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    for name, content in snapshot.tokenizer.items():
        (directory / name).parent.mkdir(exist_ok=True)
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


def save_adapter(model: nn.Module, path: str | Path, config: LoRAConfig, base_model: str = "") -> None:
    """Write the active adapter of `model` into a directory or one .safetensors file."""
    write_adapter(snapshot_adapter(model, config, base_model), path)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as read from its files.

    Attributes:
        config: its settings, with the exact names of its layers as targets.
        state: tensors keyed as in `lora_state_dict`.
        description: adapter_config.json.
        directory: where it was read from.
        base_shift: layer -> (A', B'), subtracted from its base's weights; empty for an ordinary base.
        base_weights: parameter name -> the base's own value, which PEFT saves with an adapted head.
        rows: name of an embedding's weight -> its change: PEFT's trainable_token_indices, or LoRA on it.
    """

    config: LoRAConfig
    state: dict[str, Tensor]
    description: dict[str, Any]
    directory: Path
    base_shift: BaseShift = field(default_factory=dict)
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)

    @property
    def adapted_layers(self) -> list[str]:
        """Qualified names of the layers with a low-rank update."""
        return sorted({key.rpartition(".lora_")[0] for key in self.state if ".lora_" in key})

    @property
    def trained(self) -> dict[str, Tensor]:
        """Parameter name -> value, for parameters trained in full."""
        return {key: tensor for key, tensor in self.state.items() if ".lora_" not in key}

    def low_rank(self, layer: str) -> tuple[Tensor, Tensor]:
        """(A (rank, in), B (out, rank)) in fp32 with all factors in B: the update is B A.

        Raises:
            InputError: a DoRA adapter, whose update is not of low rank; a PiSSA one, whose base differs.
        """
        if self.base_shift or self.config.init == "pissa":
            raise InputError(
                f"{self.directory} holds an adapter for a base that was changed (PiSSA, LoftQ); make plain LoRA "
                "of it with as_plain_lora, or merge it."
            )
        self._check_low_rank()
        return self._factors(layer)

    @property
    def is_beyond_low_rank(self) -> bool:
        """Whether its variant learns more than low-rank updates (DoRA's magnitudes)."""
        variant = variant_of(self.config)
        return variant is not None and bool(variant.beyond)

    def _check_low_rank(self) -> None:
        if self.is_beyond_low_rank:
            name = self.config.variant_name
            raise InputError(
                f"{self.directory} holds a {name} adapter, whose update is not of low rank; merge it."
            )

    def extras(self, layer: str) -> dict[str, Tensor]:
        """The variant's tensors in a layer besides A and B, by saved names.

        Raises:
            InputError: some are missing.
        """
        variant = variant_of(self.config)
        names = {} if variant is None else {name: f"{layer}.{name}" for name in variant.extras}
        missing = next((key for key in names.values() if key not in self.state), None)
        if missing is not None:
            raise InputError(f"The adapter in {self.directory} is damaged: missing {missing}; save it again.")
        return {name: self.state[key] for name, key in names.items()}

    def _factors(self, layer: str) -> tuple[Tensor, Tensor]:
        A, B = (self.state[f"{layer}.lora_{part}.weight"].float() for part in "AB")
        variant = variant_of(self.config)
        A = A if variant is None else variant.effective_A(A, self.extras(layer))
        return A, self.config.scaling_of(layer, A.shape[0]) * B

    def factors_on_original(self, layer: str) -> tuple[Tensor, Tensor]:
        """(A, B) in fp32 of the update's low-rank part relative to the original W, with all factors in B."""
        A, B = self._factors(layer)
        if layer in self.base_shift:
            shift_A, shift_B = self.base_shift[layer]
            A, B = torch.cat([A, shift_A]), torch.cat([B, -shift_B], 1)
        return A, B

    def as_plain_lora(self) -> SavedAdapter:
        """The same update relative to the original W, as LoRA of twice the rank: B A - B' A' = [B, -B'] [A; A'].

        In full precision it computes the same on W as this adapter on W - B' A', up to rounding. On a quantized
        base it does not: q(W) + [B, -B'] [A; A'] has W's quantization error, this adapter the smaller error of its
        own base. (PEFT's "convert PiSSA to LoRA".)

        Raises:
            InputError: a DoRA adapter, or PEFT's PiSSA without its base shift (`with_base_shift` finds it).
        """
        if self.config.init == "pissa" and not self.base_shift:
            raise InputError(f"{self.directory} does not hold its base shift; find it with with_base_shift.")
        if not self.base_shift:
            return self
        self._check_low_rank()
        state, ranks = dict(self.state), {}
        for layer in self.adapted_layers:
            A, B = self.factors_on_original(layer)  # B includes its scaling, so that the new scaling is 1
            state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = A, B
            ranks[layer] = len(A)
        rank = max(ranks.values())
        others = {layer: own for layer, own in ranks.items() if own != rank}
        config = replace(
            self.config, rank=rank, alpha=float(rank), rank_pattern=others, alpha_pattern=dict[str, float](others),
            use_rslora=False, init="kaiming", adapter_dtype="float32",
        )  # fmt: skip
        return replace(self, config=config, state=state, base_shift={})

    def merge_into(self, name: str, weight: Tensor) -> Tensor:
        """Merge the adapter into one parameter of its base.

        Args:
            name: of the parameter, as transformers saves it.
            weight: its fp32 value, (out, in) for a linear layer's weight (a Conv1D's transposed).
        Returns:
            c (W + s B A), or the trained parameter itself, in fp32; `weight` if the adapter has none.
        """
        if name in self.state:
            return self.state[name].float()
        if name in self.rows:
            weight = self.rows[name].apply(weight)
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or f"{layer}.lora_A.weight" not in self.state:
            return weight
        A, B = self._factors(layer)
        merged = torch.addmm(weight, B, A)
        variant = variant_of(self.config)
        return merged if variant is None else variant.merge(merged, self.extras(layer))


def read_adapter(path: str | Path) -> SavedAdapter:
    """Read an adapter from a directory or one .safetensors file.

    Raises:
        InputError: a file is missing or damaged, a key is unknown, or the variant is unsupported.
    """
    directory = adapter_path(path)
    settings = directory if is_one_file(directory) else directory / CONFIG
    tool = detect_tool(directory)
    if tool is not None:
        raise InputError(
            f"{directory} holds an adapter in {tool}'s own format; turn it into PEFT's by python -m qlora import."
        )
    _check_files(directory)
    description = read_description(directory)
    kind = description.get("peft_type")
    used = [k for k, neutral in UNSUPPORTED.items() if description.get(k) not in neutral]
    if description.get("init_lora_weights") == "loftq" and (directory / BASE_SHIFT).is_file():
        used.remove("init_lora_weights")
    if kind not in PEFT_TYPES or used:
        what = f"an adapter with {', '.join(used)}" if kind == "LORA" else f"a {show_value(kind)} adapter"
        raise InputError(f"{directory} holds {what}, which this version does not compute; use plain LoRA.")
    config = read_settings(settings, description)
    stored = _read_tensors(weights_file(directory), config, description.get("trainable_token_indices"))
    state = stored.plain
    variant = variant_of(config)
    state = state if variant is None else variant.unpack(state, description, config, settings)
    shift = _read_base_shift(directory / BASE_SHIFT)
    saved = SavedAdapter(config, state, description, directory, shift, stored.base_weights, stored.rows)
    # PEFT saves embeddings of an extended vocabulary, and a tied head, without listing them, and takes a listed
    # name for the end of a module's: "norm" means input_layernorm, too.
    listed = tuple(f".{name}" for name in config.modules_to_save)
    modules = [
        name.rpartition(".")[0] for name in saved.trained if is_vocabulary(name) or not name.endswith(".bias")
    ]
    unlisted = [name for name in modules if is_vocabulary(f"{name}.weight") or not f".{name}".endswith(listed)]
    config.modules_to_save = [*config.modules_to_save, *dict.fromkeys(unlisted)]
    ranks = {t.shape[0] for key, t in state.items() if key.endswith(".lora_A.weight") and t.dim() == 2}
    if ranks and not config.rank_pattern and config.rank not in ranks:
        raise InputError(
            f"{settings} has r = {config.rank}, but the tensors in {WEIGHTS} have rank "
            f"{', '.join(map(str, sorted(ranks)[:5]))}; save the adapter again."
        )
    # The exact layers: the meaning of the file's patterns depends on the base.
    config.target_modules, config.layers = saved.adapted_layers, []
    # The narrowest dtype that holds every value exactly.
    factors = {tensor.dtype for key, tensor in state.items() if ".lora_A." in key or ".lora_B." in key}
    config.adapter_dtype = "bfloat16" if factors == {torch.bfloat16} else "float32"
    return saved


def _check_files(directory: Path) -> None:
    """Check that the files exist; if there is only a pickle, say why it is refused."""
    if is_one_file(directory):
        if not directory.is_file():
            raise InputError(f"The adapter file {directory} does not exist; check the path.")
        return
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


def _read_tensors(file: Path, config: LoRAConfig, indices: Any = None) -> StoredTensors:
    """The tensors of a file; the plain ones keyed as in `lora_state_dict`.

    Args:
        indices: trainable_token_indices of the adapter.
    """
    found = sort_stored(file, read_tensors(file, "save the adapter again"), config, indices)
    stored = found.plain
    state = {own_key(key): tensor for key, tensor in stored.items()}
    if len(state) < len(stored):
        raise InputError(f"{file} holds a parameter under two names; save the adapter again.")
    foreign = [key for key in stored if not key.startswith(PREFIX) or not key.isprintable()]
    if foreign or not (state or found.rows):
        named = f"{show_value(foreign[0])} among {len(state)} tensors" if foreign else "nothing"
        raise InputError(f"{file} holds {named}, not LoRA tensors in PEFT's names; save the adapter again.")
    unannounced = [key for key in state if not belongs_to_adapter(key, config)]
    if unannounced:
        raise InputError(
            f"{file} holds {show_value(unannounced[0])} among {len(state)} tensors, which {CONFIG} does not "
            "announce by its variant, bias or modules_to_save; save the adapter again."
        )
    changes = [(name, tensor) for name, change in found.rows.items() for tensor in change.tensors]
    for key, tensor in (*state.items(), *changes):
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{file} holds {key} in {dtype}; save it in float32, bfloat16 or float16.")
    return replace(found, plain=state)


def _read_base_shift(file: Path) -> BaseShift:
    """The content of a base_shift.safetensors; empty if there is no file."""
    if not file.is_file():
        return {}
    state = _read_tensors(file, LoRAConfig()).plain
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


def written_config(saved: SavedAdapter) -> LoRAConfig:
    """An adapter's configuration, with targets and layers as written in its file."""
    targets, numbers = (saved.description.get(field) for field in ("target_modules", "layers_to_transform"))
    listed = [numbers] if type(numbers) is int else numbers or []
    return replace(
        saved.config,
        target_modules=targets if isinstance(targets, list) and targets else saved.config.target_modules,
        layers=listed,
    )
