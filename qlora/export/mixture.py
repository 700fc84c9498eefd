"""Several adapters of one base, combined into one update of its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapters.load import load_adapter
from qlora.adapters.mix import mix
from qlora.adapters.peft_files import SavedAdapter, read_adapter
from qlora.adapters.provenance import trained_base
from qlora.config.lora import LoRAConfig
from qlora.data.tokenizer_files import read_tokenizer_files
from qlora.lora.adapter import activate, wrap_layers
from qlora.lora.full_parameters import vocabulary_names
from qlora.lora.layer import LoRAWeights
from qlora.lora.slot import Adapter
from qlora.model.skeleton import weight_shapes
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError


@dataclass(frozen=True)
class Mixture:
    """Adapters to merge together: W becomes W + sum_i w_i (W_i - W), where W_i is W with adapter i merged."""

    adapters: Sequence[SavedAdapter]
    weights: Sequence[float]
    quantization: QuantConfig | None  # of the base they were trained on; None = 16 bits
    is_base_known: bool = True  # False: nothing says how it was quantized
    untied: frozenset[str] = frozenset()  # head that the base ties to its embedding and the adapters do not

    @property
    def is_plain(self) -> bool:
        """True for one adapter with weight 1."""
        return len(self.adapters) == 1 and self.weights[0] == 1

    def merge_into(self, name: str, weight: Tensor) -> Tensor:
        """The merged weight; the same tensor if no adapter changes it (see `SavedAdapter.merge_into`)."""
        if self.is_plain:
            return self.adapters[0].merge_into(name, weight)
        merged = weight
        for saved, factor in zip(self.adapters, self.weights, strict=True):
            own = saved.merge_into(name, weight)
            if own is not weight:
                merged = merged + factor * (own - weight)
        return merged

    def check(self, as_one: bool) -> None:
        """Check that these adapters can be merged together.

        Args:
            as_one: they must also run together (`load_onto`), to measure drift and to calibrate.
        Raises:
            InputError: an adapter changes the base (PiSSA, LoftQ), has its own tokenizer or (as_one) uses DoRA,
                and is not merged alone with weight 1.
        """
        if self.is_plain:
            return
        for saved in self.adapters:
            if as_one or saved.base_shift or saved.config.init == "pissa":
                for layer in saved.adapted_layers[:1]:
                    saved.low_rank(layer)
            if saved.rows:
                raise InputError(f"{saved.directory} changes rows of an embedding; merge it alone, with weight 1.")
            if read_tokenizer_files(saved.directory):
                raise InputError(f"{saved.directory} has its own tokenizer; merge it alone, with weight 1.")

    def merged_shapes(self, network: Any) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of the merged model by name; new tokens add rows.

        An untied head comes last.
        """
        shapes = weight_shapes(network)
        shapes |= {head: shapes[vocabulary_names(network)[0]] for head in self.untied}
        for saved in self.adapters:
            shapes.update(
                {
                    name: tuple(t.shape)
                    for name, t in saved.trained.items()
                    if name in shapes or name in self.untied
                }
            )
        return shapes

    def load_onto(self, network: Any) -> None:
        """Attach these adapters to a base model in place, unmerged: their A and B concatenated."""
        if self.is_plain:
            load_adapter(network, self.adapters[0].directory)
            return
        updates = [{layer: saved.low_rank(layer) for layer in saved.adapted_layers} for saved in self.adapters]
        layers = {}
        for layer, (A, B) in mix(updates, self.weights).items():
            layers[layer] = LoRAWeights(A, len(B), alpha=len(A), dtype=torch.float32)
            layers[layer].lora_B.data = B
        parameters = dict(network.named_parameters())
        names = {name for saved in self.adapters for name in saved.trained}
        trained = {name: nn.Parameter(self.merge_into(name, parameters[name].detach().float())) for name in names}
        wrap_layers(network, layers)
        activate(network, Adapter(LoRAConfig(), layers, trained))
        network.requires_grad_(False)


def read_mixture(
    directories: Sequence[str], weights: Sequence[float] | None = None, model: str | None = None
) -> Mixture:
    """Read adapters that were trained on the same base; one that does not tell its bits goes with the others.

    Args:
        model: the base they are merged into, which may tell how it was quantized (`trained_base`).
        weights: one per adapter; None = all 1.
    Raises:
        InputError: no adapter, wrong number of weights, a weight that is not finite, or different bases.
    """
    weights = [1.0] * len(directories) if weights is None else list(weights)
    if not directories or len(weights) != len(directories) or not all(map(math.isfinite, weights)):
        raise InputError(
            f"{len(directories)} adapters have the weights {weights}; give --weights one number per adapter."
        )
    adapters = [read_adapter(directory) for directory in directories]
    bases = {directory: trained_base(directory, model) for directory in directories}
    known = {directory: base.quantization for directory, base in bases.items() if base.is_known}
    first = next(iter(known), directories[0])
    quant = known.get(first)
    for directory, other in known.items():
        if other != quant:
            raise InputError(
                f"{first} was trained on a base in {quant or '16 bits'}, {directory} on one in "
                f"{other or '16 bits'}; merge them one at a time."
            )
    return Mixture(adapters, weights, quant, bool(known))


def untied_head(mixture: Mixture, network: Any) -> frozenset[str]:
    """The head's weight, by name, if the base ties it to the embedding and an adapter changed one of the two."""
    if not network.config.tie_word_embeddings:
        return frozenset()
    embedding, head = vocabulary_names(network)
    for saved in mixture.adapters:
        changes = [saved.rows[name] for name in (embedding, head) if name in saved.rows]
        if head.removesuffix(".weight") in saved.adapted_layers or not all(c.is_tied for c in changes):
            return frozenset([head])
        one, other = saved.trained.get(embedding), saved.trained.get(head)
        if (one is None) != (other is None) or (
            one is not None and other is not None and not torch.equal(one, other)
        ):
            return frozenset([head])
    return frozenset()
