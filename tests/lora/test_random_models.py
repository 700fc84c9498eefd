"""Random torch models with random adapters equal the written-out sum, through every step of an adapter's life."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapters.model import LoRAModel
from qlora.config.lora import LoRAConfig
from qlora.lora.layer import LoRALinear
from qlora.lora.state import load_lora_state_dict, lora_state_dict
from qlora.lora.targets import linear_layers
from qlora.model.base import BaseInfo
from qlora.quant.layers import Linear4bit
from qlora.quant.weight import QuantConfig, quantize_weight
from qlora.system.errors import InputError
from tests.reference import dense_weight, relative_error

TOLERANCE = 1e-5  # up to nine layers of fp32 products
WIDTH = 64  # of every layer, so that any of them may follow any other
SEEDS = range(24)


class Cubed(nn.Linear):
    """A subclass with its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).pow(3).clamp(-3, 3)


class Block(nn.Module):
    """Two children, of which one may be shared with other blocks, and a list that is a child as well."""

    def __init__(self, first: nn.Module, second: nn.Module, rest: list[nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.rest = first, second, nn.ModuleList(rest)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.second(torch.tanh(self.first(x)))
        for layer in self.rest:
            y = y + 0.5 * layer(y)
        return y / y.std()


def random_layer(draw: random.Random) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    kind = draw.choice(["linear", "linear", "conv1d", "4bit", "subclass", "hook", "pre-hook", "weight_norm"])
    bias = draw.random() < 0.7
    if kind == "conv1d":
        return Conv1D(WIDTH, WIDTH)
    if kind == "4bit":
        return Linear4bit(quantize_weight(torch.randn(WIDTH, WIDTH) / 8, QuantConfig()), torch.randn(WIDTH))
    layer: nn.Module = (Cubed if kind == "subclass" else nn.Linear)(WIDTH, WIDTH, bias=bias)
    if kind == "hook":
        layer.register_forward_hook(lambda module, args, output: output.sin())
    elif kind == "pre-hook":
        layer.register_forward_pre_hook(lambda module, args: (args[0].cos(),))
    elif kind == "weight_norm":
        layer = nn.utils.parametrizations.weight_norm(layer)
    return layer


def random_model(seed: int) -> nn.Module:
    """Nested blocks of every kind of layer; some layers are used twice, some share their weight with another."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    pool = [random_layer(draw) for _ in range(draw.randint(3, 5))]
    blocks: list[nn.Module] = []
    for _ in range(draw.randint(1, 3)):
        first, second = draw.choice(pool), draw.choice(pool)
        blocks.append(Block(first, second, draw.sample(pool, draw.randint(0, 2))))
    plain = [layer for layer in pool if type(layer) is nn.Linear and "weight" in layer._parameters]
    if len(plain) > 1 and draw.random() < 0.5:
        plain[0].weight = plain[1].weight
    model = nn.Sequential(*blocks)
    if any(isinstance(module, Linear4bit) for module in model.modules()):  # as its loader would set it
        vars(model)["base_info"] = BaseInfo("", QuantConfig(), torch.float32)
    return model


def random_config(seed: int, names: list[str]) -> LoRAConfig:
    draw = random.Random(seed + 1000)
    chosen = draw.sample(names, draw.randint(1, len(names)))
    rank = draw.choice([1, 3, 8])
    return LoRAConfig(
        rank=rank,
        alpha=draw.choice([1.0, 8.0, 16.0]),
        dropout=draw.choice([0.0, 0.0, 0.3]),
        target_modules=draw.choice([["all-linear"], chosen]),
        rank_pattern={chosen[0].replace(".", r"\."): 2} if draw.random() < 0.3 else {},
        use_rslora=draw.random() < 0.3,
        init=draw.choice(["kaiming", "gaussian"]),
        adapter_dtype="float32",
    )


class Reference(nn.Module):
    """base(x) + s B A drop(x), with nothing but torch's own operations."""

    def __init__(self, layer: LoRALinear, base: nn.Module) -> None:
        super().__init__()
        self.base, w = base, layer.weights
        self.scaling, self.dropout = w.scaling, w.dropout
        self.A, self.B = nn.Parameter(w.lora_A.detach().clone()), nn.Parameter(w.lora_B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x.flatten(0, -2), self.dropout, self.training).view(x.shape)
        return self.base(x) + self.scaling * F.linear(F.linear(dropped, self.A), self.B)


def dense_twin(base: nn.Module) -> nn.Module:
    """The model with 4-bit layers as nn.Linear, whose gradients autograd computes."""
    twins: dict[int, nn.Linear] = {}
    for module in list(base.modules()):
        for name, child in module._modules.items():
            if isinstance(child, Linear4bit):
                twin = twins.setdefault(id(child), nn.Linear(WIDTH, WIDTH))
                twin.weight.data, twin.bias.data = dense_weight(child), child.bias.detach().clone()
                module._modules[name] = twin
    return base


def reference_of(model: LoRAModel, base: nn.Module) -> tuple[nn.Module, dict[str, Reference]]:
    """The written-out twin of an adapted model; layers that the model shares are shared there, too."""
    layers: dict[int, tuple[str, Reference]] = {}
    dense_twin(base)
    for name, module in model.model.named_modules():
        if isinstance(module, LoRALinear):
            layers[id(base.get_submodule(name))] = name, Reference(module, base.get_submodule(name))
    for module in list(base.modules()):
        for child, layer in module._modules.items():
            if id(layer) in layers and not isinstance(module, Reference):
                module._modules[child] = layers[id(layer)][1]
    return base, dict(layers.values())


def call(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return model(x)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_model(seed: int, tmp_path: Path) -> None:
    base, x = random_model(seed), torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
    names = list(linear_layers(base))
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with torch.no_grad():
        before = base(x)
    config = random_config(seed, names)
    model = LoRAModel(copy.deepcopy(base), config, seed)
    assert torch.equal(model.eval()(x), before), "a fresh adapter changes nothing"
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.lora_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 8)
    twin, references = reference_of(model, copy.deepcopy(base))
    assert references.keys() == set(names if config.target_modules == ["all-linear"] else config.target_modules)
    assert not torch.equal(model(x), before), "the adapter does something"
    for training in (True, False):
        compare(model.train(training), twin.train(training), references, x, seed)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    round_trips(model, base, before, x, tmp_path)
    merges(copied, x, seed)
    assert torch.equal(model.unload()(x), before)
    assert model.model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.model.state_dict().items())
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def compare(model: LoRAModel, twin: nn.Module, references: dict[str, Reference], x: Tensor, seed: int) -> None:
    """Output, and gradients of the input and of every A and B."""
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = call(model, inputs[0], seed), call(twin, inputs[1], seed)
    assert relative_error(y, expected) < TOLERANCE
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    y.backward(dy), expected.backward(dy)
    assert inputs[0].grad is not None and relative_error(inputs[0].grad, inputs[1].grad) < 10 * TOLERANCE
    for name, reference in references.items():
        weights: Any = model.model.get_submodule(name).weights
        for ours, theirs in ((weights.lora_A, reference.A), (weights.lora_B, reference.B)):
            assert ours.grad is not None and theirs.grad is not None, name
            assert relative_error(ours.grad, theirs.grad) < 10 * TOLERANCE, name
            ours.grad = theirs.grad = None
    with torch.no_grad():
        assert relative_error(call(model, x, seed), call(twin, x, seed)) < TOLERANCE


def round_trips(model: LoRAModel, base: nn.Module, before: Tensor, x: Tensor, tmp_path: Path) -> None:
    """Through files, through a state dict, from module or wrapper; and the base beneath."""
    model.save(tmp_path / "adapter")
    loaded = LoRAModel(copy.deepcopy(base)).eval()
    loaded.load_adapter(tmp_path / "adapter", "again")
    assert torch.equal(loaded(x), before)
    loaded.set_adapter("again")
    assert torch.equal(loaded(x), model.eval()(x))
    state = lora_state_dict(model)
    assert state and state.keys() == lora_state_dict(model.model).keys()
    fresh = LoRAModel(copy.deepcopy(base), model.config, seed=5).eval()
    load_lora_state_dict(fresh, {name: tensor.clone() for name, tensor in state.items()})
    assert torch.equal(fresh(x), model(x))
    with model.disable_adapter():
        assert torch.equal(model(x), before)


def is_odd(layer: Any) -> bool:
    """Whether a layer is more than its weight."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return isinstance(layer, Cubed) or bool(hooks) or hasattr(layer, "parametrizations")


def merges(model: LoRAModel, x: Tensor, seed: int) -> None:
    """Merged, unmerged and unloaded, or refused by the name of the first layer that is more than its weight."""
    adapted = model.eval()(x).detach()
    layers = {n: m for n, m in model.model.named_modules() if isinstance(m, LoRALinear)}
    odd = [name for name, layer in layers.items() if is_odd(layer.base_layer)]
    if odd:
        for refused in (model.merge, model.merge_and_unload):
            with pytest.raises(InputError, match=f"^{odd[0]} is a .*cannot be merged"):
                refused()
        assert torch.equal(model(x), adapted)
        return
    model.merge()
    assert relative_error(model(x), adapted) < TOLERANCE
    model.unmerge()
    assert torch.equal(model(x), adapted)
    four_bit = any(isinstance(layer.base_layer, Linear4bit) for layer in layers.values())
    if four_bit:
        again = copy.deepcopy(model).merge_and_unload(quantize=True)
        assert any(isinstance(module, Linear4bit) for module in again.modules())
        assert relative_error(again(x), adapted) < 0.5
    kinds = {name: type(layer.base_layer) for name, layer in layers.items()}
    merged = model.merge_and_unload()
    assert relative_error(merged(x), adapted) < 10 * TOLERANCE
    for name, kind in kinds.items():
        assert type(merged.get_submodule(name)) is (nn.Linear if kind is Linear4bit else kind), name
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())


def test_the_seeds_cover_every_case() -> None:
    """Guards the property against passing on nothing: refusals and merges, sharing, tying, 4 bits."""
    odd = shared = tied = packed = 0
    for seed in SEEDS:
        model = random_model(seed)
        layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
        packed += bool(layers)
        odd += any(isinstance(module, Cubed) or module._forward_hooks for module in model.modules())
        shared += len(list(model.named_modules(remove_duplicate=False))) > len(list(model.named_modules()))
        tied += len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.named_parameters()))
    assert min(odd, shared, tied, packed) >= 4 and odd <= len(SEEDS) - 4
