"""DoRA (arXiv 2402.09353): W' = m (W + s B A) / |W + s B A|, with each output's magnitude m learned separately.

The backward pass treats the norms as constants (section 4.3). `weight_norm` computes them without forming
W + s B A. PEFT's DoRA applies dropout to part of W's input as well; ours only to A's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.config.lora import LoRAConfig
from qlora.lora.layer import LoRALinear, LoRAWeights
from qlora.lora.variant import PeftFields, Variant
from qlora.quant.layers import dense_weight, dequantize_into_scratch

SMALLEST = torch.finfo(torch.float32).tiny
MAGNITUDE = "lora_magnitude_vector"


class DoRA(Variant):
    """Adds `magnitude` (out,) fp32, initially the norms of W's rows, so that c = 1."""

    flag, name, beyond = "use_dora", "DoRA", "DoRA's magnitudes"
    needs_weight = True
    extras: ClassVar = {MAGNITUDE: "magnitude"}

    def start(self, weights: LoRAWeights, layer: nn.Module, generator: torch.Generator) -> None:
        weights.register_parameter("magnitude", nn.Parameter(squared_norms(layer).sqrt()))

    def follow_start(self, layer: LoRALinear) -> None:
        layer.weights.extras[MAGNITUDE].copy_(weight_norm(layer))

    def output_scale(self, layer: LoRALinear, dtype: torch.dtype) -> Tensor | None:
        return layer.weights.extras[MAGNITUDE] / weight_norm(layer, dtype)

    def merge(self, weight: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        norms = weight.norm(dim=1).clamp_(min=SMALLEST)
        return weight * (extras[MAGNITUDE].detach().float() / norms)[:, None]

    def token_bytes(self, layer: LoRALinear, itemsize: int) -> int:
        return layer.out_features * itemsize  # z

    def shapes(self, rows: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {MAGNITUDE: (rows,)}

    def misfit(self, rows: int, rank: int) -> str:
        return f"{rows} outputs and not as many magnitudes"

    def own_name(self, key: str) -> str:
        return key.removesuffix(".weight") if key.endswith(f".{MAGNITUDE}.weight") else key

    def describe(self, config: LoRAConfig) -> dict[str, Any]:
        return {"use_dora": config.use_dora}

    def read(self, fields: PeftFields) -> dict[str, Any]:
        value = fields.given("use_dora", False)
        fields.check("use_dora", "true or false", type(value) is bool)
        return {"use_dora": value}


def squared_norms(layer: nn.Module) -> Tensor:
    """(out,) fp32 squared norms of the rows of a frozen layer's weight."""
    return dense_weight(layer, torch.float32).square().sum(1)


@torch.no_grad()
def weight_norm(layer: LoRALinear, dtype: torch.dtype = torch.float32) -> Tensor:
    """(out,) fp32 row norms of W + s B A, without forming that matrix.

        |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b       for each row w of W, b of B

    |w|^2 is cached (`activate` drops the cache, in case the base has changed); w A^T is one product with rank
    columns, computed in `dtype`.
    """
    base, weights = layer.base_layer, layer.weights
    if layer.kept_of_base is None or layer.kept_of_base.device != base.weight.device:
        layer.kept_of_base = squared_norms(base)
    A, B, s = weights.effective_A.float(), weights.lora_B.float(), weights.scaling
    cross = (dequantize_into_scratch(base, dtype) @ A.to(dtype).T).float()
    squares = layer.kept_of_base + (2 * s * cross + s * s * (B @ (A @ A.T))).mul_(B).sum(1)
    return squares.clamp_(min=SMALLEST).sqrt_()  # a row of zeros has c = 0 rather than 0 / 0
