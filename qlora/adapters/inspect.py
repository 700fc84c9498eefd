"""Inspect an adapter: measure its update of each layer.

A layer's update is B A (all factors in B), of rank R at most. From its singular values, in fp64 (the (O, I) update
itself is never formed; lora/linalg.py):

    norm            the Frobenius norm: root of the sum of their squares
    spectral norm   the largest one: how far the update can stretch an input
    stable rank     (norm / spectral norm)^2, 1 to R: how many directions the update really uses

Under DoRA the update, c (W + B A) - W, is not of low rank and depends on the base's weight W. With a base it is
formed, one layer at a time; without one, B A is measured and reported as a part.

PiSSA and LoftQ of several rounds subtract B' A' from the base before training; they learn B A - B' A'.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.adapters.load import check_adapter, with_base_shift
from qlora.adapters.peft_files import SavedAdapter, read_adapter
from qlora.adapters.provenance import TrainedBase, blocks_of_base, trained_base
from qlora.lora.linalg import low_rank_svd
from qlora.lora.targets import linear_layers
from qlora.lora.variants import variant_of
from qlora.model.skeleton import empty_model
from qlora.model.weights import dequantized_weights
from qlora.system.errors import InputError
from qlora.system.wording import list_first, show_value


@dataclass(frozen=True)
class LayerUpdate:
    """How large an adapter's update of one layer is.

    Attributes:
        block: index of the decoder layer, from 0; None: outside the decoder layers.
        module: the layer's name within its block, numbers as "*" (all experts of a mixture are one module).
        norm, spectral_norm: of the update; NaN where the adapter holds such values.
        relative: norm divided by the Frobenius norm of the base's weight; None without a base.
        magnitude_change: DoRA: mean over the outputs of |magnitude / row norm of W - 1|; None without a base.
    """

    layer: str
    block: int | None
    module: str
    rank: int
    norm: float
    spectral_norm: float
    relative: float | None = None
    magnitude_change: float | None = None

    @property
    def stable_rank(self) -> float:
        return (self.norm / self.spectral_norm) ** 2 if self.spectral_norm else 0.0


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_adapter`.

    Attributes:
        adapter: as read from its files.
        quantization: how the base was quantized in training, in words.
        with_base: the updates were measured against a base.
        num_blocks: decoder layers of the base; None: it is not on this machine.
    """

    adapter: SavedAdapter
    quantization: str
    updates: list[LayerUpdate]
    with_base: bool
    num_blocks: int | None = None

    @property
    def variant(self) -> str:
        """The common name: LoRA, rsLoRA, DoRA, AdaLoRA, and its initialization."""
        config, start = self.adapter.config, self.adapter.description.get("init_lora_weights")
        start = {"pissa": "PiSSA", "loftq": "LoftQ"}.get(str(start), start)
        name = config.variant_name
        return f"{name}, started as {show_value(start, 200)}" if isinstance(start, str) else name

    @property
    def is_partial(self) -> bool:
        """Whether only the low-rank part of a DoRA update could be measured."""
        return self.adapter.is_beyond_low_rank and not self.with_base

    @property
    def includes_start(self) -> bool:
        """Whether the update includes the initial A and B: only the base tells what PEFT's PiSSA subtracted."""
        return self.adapter.config.init == "pissa" and not self.adapter.base_shift

    @property
    def measure(self) -> str:
        """Name of the measure in the table and picture."""
        if self.with_base:
            return "update relative to the base's weight, Frobenius norms"
        part = "the low-rank part of the update" if self.is_partial else "the update"
        return f"Frobenius norm of {part}{', the PiSSA start included' if self.includes_start else ''}"

    @property
    def gaps(self) -> dict[str, list[int]]:
        """Module -> blocks for which the file has no tensors and nothing says so; a name of target_modules that no
        layer has -> no blocks.

        A file that lost some layers looks whole by its tensors alone; with a base, `check_adapter` refuses it.
        Where the number of blocks is not known, those after the last adapted one are not checked (`last_checked`).
        """
        targets = self.adapter.description.get("target_modules")
        found: dict[str, set[int]] = {}
        for update in self.updates:
            if update.block is not None:
                found.setdefault(update.module, set()).add(update.block)
        wanted = sorted(self._numbers) or range(
            self.last_block + 1 if self.num_blocks is None else self.num_blocks
        )
        gaps = {module: [block for block in wanted if block not in there] for module, there in found.items()}
        changed = [*(u.layer for u in self.updates), *(name.rpartition(".")[0] for name in self.adapter.rows)]
        without = [
            target
            for target in (targets if isinstance(targets, list) else [])
            if not any(f".{layer}".endswith(f".{target}") for layer in changed)
        ]
        return {module: missing for module, missing in gaps.items() if missing} | {
            target: [] for target in without
        }

    @property
    def last_checked(self) -> int | None:
        """The last adapted block, if nothing tells whether the base has more."""
        is_known = self.num_blocks is not None or bool(self._numbers) or self.last_block < 0
        return None if is_known else self.last_block

    @property
    def last_block(self) -> int:
        return max((update.block for update in self.updates if update.block is not None), default=-1)

    @property
    def _numbers(self) -> set[int]:
        """layers_to_transform; empty: all layers."""
        numbers = self.adapter.description.get("layers_to_transform")
        return {numbers} if type(numbers) is int else set(numbers or ())

    def grid(self) -> tuple[list[int | None], list[str], dict[tuple[int | None, str], float]]:
        """(blocks, modules, (block, module) -> size), with layers of the same block and module combined.

        Sizes are norms, relative to the weight's if there is a base.
        """
        blocks = sorted({u.block for u in self.updates}, key=lambda block: (block is None, block or 0))
        modules = list(dict.fromkeys(u.module for u in self.updates))
        places: dict[tuple[int | None, str], list[LayerUpdate]] = {}
        for update in self.updates:
            places.setdefault((update.block, update.module), []).append(update)
        return blocks, modules, {place: self.size(updates) for place, updates in places.items()}

    def size(self, updates: list[LayerUpdate]) -> float:
        """Norm of several updates as one long vector; with a base, relative to the norm of its weights."""
        norm = math.hypot(*(u.norm for u in updates))
        if not self.with_base or not norm:
            return norm
        return norm / math.hypot(*(u.norm / u.relative for u in updates if u.relative))


def inspect_adapter(directory: str | Path, model: str | None = None) -> Inspection:
    """Read an adapter and measure its updates.

    Args:
        model: the base (directory, hub id or .gguf), read one tensor at a time and quantized as in training; None:
            read only the adapter.
    Raises:
        InputError: the adapter is unreadable, lacks A or B of a layer, or does not fit `model`.
    """
    adapter = read_adapter(directory)
    _check_layers(adapter)
    base = trained_base(str(directory), model)
    num_blocks = blocks_of_base(str(directory))
    if model is None:
        updates = _measure(adapter)
    else:
        network = empty_model(model)
        num_blocks = network.config.get_text_config().num_hidden_layers
        adapter = with_base_shift(adapter, network, model)
        check_adapter(adapter, network)
        updates = _measure(adapter)
        flipped = {name for name, layer in linear_layers(network).items() if not isinstance(layer, nn.Linear)}
        for name, weight in dequantized_weights(model, base.quantization, shift=adapter.base_shift):
            layer = name.removesuffix(".weight")
            if layer in updates:
                dense = weight.T if layer in flipped else weight  # Conv1D: (in, out)
                updates[layer] = _compare(adapter, updates[layer], dense)
    return Inspection(adapter, _quantization(base), list(updates.values()), model is not None, num_blocks)


def _check_layers(adapter: SavedAdapter) -> None:
    """Check without a base that A (R, I) and B (O, R) exist for each layer and fit each other."""
    shapes = {key: tuple(tensor.shape) for key, tensor in adapter.state.items()}
    problems, variant = [], variant_of(adapter.config)
    shifts = {layer: (len(B), A.shape[1]) for layer, (A, B) in adapter.base_shift.items()}
    for layer in adapter.adapted_layers:
        A, B = (shapes.get(f"{layer}.lora_{part}.weight", ()) for part in "AB")
        if not (len(A) == len(B) == 2 and A[0] == B[1] and min(A + B) > 0):
            problems.append(f"{layer} has A {A or 'missing'} and B {B or 'missing'}")
        elif variant is not None and any(
            shapes.get(f"{layer}.{name}") != shape for name, shape in variant.shapes(B[0], A[0]).items()
        ):
            problems.append(f"{layer} has {variant.misfit(B[0], A[0])}")
        elif shifts.get(layer, (B[0], A[1])) != (B[0], A[1]):
            problems.append(f"{layer} has a base shift of another shape than ({B[0]}, {A[1]})")
    if problems:
        raise InputError(f"The adapter in {adapter.directory} is damaged: {list_first(problems)}; save it again.")


def _measure(adapter: SavedAdapter) -> dict[str, LayerUpdate]:
    """layer -> its low-rank update, measured by singular values (module docstring)."""
    updates, variant = {}, variant_of(adapter.config)
    for layer in adapter.adapted_layers:
        A, B = adapter.factors_on_original(layer)
        if torch.isfinite(A).all() and torch.isfinite(B).all():
            sizes = low_rank_svd(A, B)[1]
            norm, largest = sizes.norm().item(), sizes.max().item()
        else:
            norm = largest = math.nan
        match = re.search(r"\.([0-9]{1,9})\.", layer)
        block, module = (int(match[1]), layer[match.end() :]) if match else (None, layer)
        own_A = adapter.state[f"{layer}.lora_A.weight"]
        rank = len(own_A) if variant is None else variant.used_rank(own_A, adapter.extras(layer))
        updates[layer] = LayerUpdate(layer, block, re.sub(r"\b\d+\b", "*", module), rank, norm, largest)
    return updates


def _compare(adapter: SavedAdapter, update: LayerUpdate, weight: Tensor) -> LayerUpdate:
    """Add the comparison with the base's fp32 (O, I) weight in training; a DoRA update is measured whole."""
    original = weight
    if update.layer in adapter.base_shift:
        shift_A, shift_B = adapter.base_shift[update.layer]
        original = torch.addmm(weight, shift_B, shift_A)
    size = original.norm(dtype=torch.float64).item()
    magnitude = adapter.state.get(f"{update.layer}.lora_magnitude_vector")
    change = None
    if magnitude is not None:
        norm = (adapter.merge_into(f"{update.layer}.weight", weight) - original).norm(dtype=torch.float64).item()
        change = (magnitude.float() / original.norm(dim=1) - 1).abs().mean().item()
        update = replace(update, norm=norm, spectral_norm=math.nan)
    return replace(update, relative=update.norm / size if size else math.nan, magnitude_change=change)


def _quantization(base: TrainedBase) -> str:
    """`trained_base` in words."""
    quant = base.quantization
    if quant is None:
        return "none, 16 bits" if base.is_known else "not recorded; 16 bits assumed"
    return f"4 bits, {quant.quant_type}, scales {'quantized too' if quant.double_quant else 'in fp32'}"
