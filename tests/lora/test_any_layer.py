"""Layers that are more than their weight or read by it, autocast, parallel layers, base checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from qlora.adapters.model import LoRAModel
from qlora.config.lora import LoRAConfig
from qlora.lora.layer import LoRALinear
from qlora.quant.layers import Linear4bit, Linear16bit
from qlora.quant.linear import LinearShape, register_linear
from qlora.quant.parts import Part
from qlora.quant.weight import QuantConfig, quantize_weight
from qlora.system.errors import InputError
from tests.processes import run_processes
from tests.reference import relative_error

TOLERANCE = 2e-6
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


class Doubled(nn.Linear):
    """Its weight is not all that it computes."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input).relu()


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def odd_layer(kind: str) -> nn.Module:
    torch.manual_seed(1)
    layer: nn.Module = Doubled(12, 8) if kind == "subclass" else nn.Linear(12, 8)
    if kind == "hook":
        layer.register_forward_hook(lambda module, args, output: output.tanh())
    elif kind == "pre-hook":
        layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    elif kind == "parametrized":
        parametrize.register_parametrization(layer, "weight", Half())
    elif kind == "weight_norm":
        torch.nn.utils.weight_norm(layer)
    elif kind == "spectral_norm":
        torch.nn.utils.spectral_norm(layer)
    elif kind == "forward":
        layer.forward = lambda input: input.sin() @ layer.weight.T  # type: ignore[assignment, operator]
    return layer


def adapted(layer: nn.Module, **settings: Any) -> LoRAModel:
    """One layer with an adapter away from its start."""
    options = {"rank": 4, "adapter_dtype": "float32", "target_modules": ["all-linear"], **settings}
    model = LoRAModel(nn.Sequential(layer), LoRAConfig(**options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.lora_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def composed(base: nn.Module, weights: Any, x: Tensor) -> Tensor:
    """base(x) + s B A x, written out."""
    return base(x) + weights.scaling * F.linear(
        F.linear(x, weights.lora_A.to(x.dtype)), weights.lora_B.to(x.dtype)
    )


ODD = ("subclass", "hook", "pre-hook", "parametrized", "weight_norm", "spectral_norm", "forward")


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_called_as_it_is(kind: str, training: bool) -> None:
    """Both modes computed another function than each other: the one from `.weight`, the other by a call."""
    base = odd_layer(kind)
    model = adapted(odd_layer(kind)).train(training)
    base.train(training)
    layer = model.model.get_submodule("0")
    assert isinstance(layer, LoRALinear)
    x = X.clone().requires_grad_()
    actual, expected = model(x), composed(base, layer.weights, x)
    assert relative_error(actual, expected) < TOLERANCE
    dy = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2))
    wanted = [x, layer.weights.lora_A, layer.weights.lora_B]
    for ours, theirs in zip(
        torch.autograd.grad(actual, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True
    ):
        assert relative_error(ours, theirs) < TOLERANCE
    with torch.no_grad():
        assert relative_error(model(X), composed(base, layer.weights, X)) < TOLERANCE
    with pytest.raises(InputError, match=r"^0 is a .*so it cannot be merged"):
        model.merge()
    with pytest.raises(InputError, match=r"^0 is a .*so it cannot be merged"):
        model.merge_and_unload()


def test_a_hook_that_comes_later_is_noticed() -> None:
    model = adapted(nn.Linear(12, 8))
    layer: Any = model.model.get_submodule("0")
    plain = model(X)
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: output + 7)
    assert relative_error(model(X), plain + 7) < TOLERANCE
    handle.remove()
    assert torch.equal(model(X), plain)
    model.eval().merge()
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 7)
    with pytest.raises(InputError, match="with hooks"):
        model(X)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init": "pissa"}])
def test_what_needs_the_weight_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"\b0 is a Doubled, which may compute more than its weight"):
        adapted(Doubled(12, 8), **settings)
    model = adapted(nn.Linear(12, 8), use_dora=True)
    model.model.get_submodule("0").base_layer.register_forward_hook(lambda module, args, output: output)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="DoRA needs a frozen, plain base layer"):
        model(X)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 3), "one linear layer itself"),
        (nn.Sequential(nn.LazyLinear(3)), "lazy layers without a shape yet"),
    ],
)
def test_other_refusals(model: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoRAModel(model, LoRAConfig(target_modules="all-linear"))
    with pytest.raises(InputError, match="not Conv2d; see register_linear"):
        LoRALinear(nn.Conv2d(1, 1, 1))


# ---- code that reads a layer's weight ---------------------------------------------------------------------


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}])
def test_multihead_attention_and_its_fast_path(variant: dict[str, Any]) -> None:
    """Both read `.weight` and never call out_proj: adapted, training and evaluating, values and gradients."""
    model = LoRAModel(
        encoder(), LoRAConfig(rank=2, target_modules="all-linear", adapter_dtype="float32", **variant)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    layers = {n.removeprefix("model."): m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert len(layers) == 6 and sum("out_proj" in name for name in layers) == 2
    twin, x = encoder().train(), torch.randn(2, 3, 16, generator=generator)
    before = twin(x)
    for name, layer in layers.items():
        twin.get_submodule(name).weight = nn.Parameter(layer.merged())
    y = model.train()(x)
    assert relative_error(y, twin(x)) < TOLERANCE < relative_error(y, before)
    dy = torch.randn(y.shape, generator=generator)
    y.backward(dy)
    twin(x).backward(dy)
    for name, layer in layers.items():
        own, weights = twin.get_submodule(name).weight, layer.weights
        assert isinstance(own, Tensor) and own.grad is not None and weights.lora_B.grad is not None
        if not variant:
            expected = weights.scaling * own.grad @ weights.lora_A.T
            assert relative_error(weights.lora_B.grad, expected) < 10 * TOLERANCE, name
    model.eval(), twin.eval()
    with torch.no_grad():
        assert relative_error(model(x), twin(x)) < 10 * TOLERANCE
    with pytest.raises(InputError, match=r"out_proj is read by nn.MultiheadAttention, which skips dropout"):
        LoRAModel(encoder(), LoRAConfig(target_modules="all-linear", dropout=0.1))


# ---- autocast ---------------------------------------------------------------------------------------------


def autocast_layer(kind: str) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    dense = torch.randn(8, 64) / 8
    if kind == "4bit":
        return Linear4bit(quantize_weight(dense, QuantConfig()), torch.ones(8))
    if kind == "16bit":
        return Linear16bit(dense.to(torch.bfloat16), torch.ones(8))
    return Conv1D(8, 64) if kind == "conv1d" else nn.Linear(64, 8)


@pytest.mark.parametrize("mode", ["train", "unfrozen", "no_grad", "merged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "4bit", "16bit"])
def test_autocast_is_that_of_a_linear_layer(kind: str, dtype: torch.dtype, mode: str) -> None:
    """Output dtype, values and gradients as base(x) + s B A x with an nn.Linear in the base's place."""
    if mode == "unfrozen" and kind == "4bit":
        pytest.skip("packed weights do not train")
    base = autocast_layer(kind)
    model = adapted(base)
    weights = model.model.get_submodule("0").weights  # type: ignore[union-attr]
    if mode == "unfrozen":
        base.requires_grad_()
    from tests.reference import dense_weight

    twin = nn.Linear(64, 8)
    twin.weight.data, twin.bias.data = dense_weight(base).clone(), base.bias.detach().float().clone()
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    if mode == "merged":
        model.eval().merge()
    with torch.set_grad_enabled(mode != "no_grad"), torch.autocast("cpu", dtype):
        actual, expected = model(x), composed(twin, weights, x)
    assert actual.dtype == expected.dtype == dtype
    tolerance = 3 * torch.finfo(dtype).eps
    assert relative_error(actual, expected) < tolerance
    if mode in ("train", "unfrozen"):
        wanted = [x, weights.lora_A, weights.lora_B]
        dy = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        for ours, theirs in zip(
            torch.autograd.grad(actual, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True
        ):
            assert ours.dtype == theirs.dtype == torch.float32 and relative_error(ours, theirs) < tolerance


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loop_with_amp(dtype: torch.dtype, base_dtype: torch.dtype) -> None:
    """GradScaler, accumulation, clipping, set_to_none; the same losses as the composed layer's, and falling."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).to(base_dtype)
    x, labels = torch.randn(32, 16), torch.arange(32) % 4

    def train(model: LoRAModel, compute: Any) -> list[float]:
        optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        losses = []
        for step in range(12):
            part = slice(8 * (step % 4), 8 * (step % 4) + 8)
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(compute(x[part]), labels[part]) / 2
            scaler.scale(loss).backward()
            losses.append(loss.item())
            if step % 2:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
        return losses

    def make() -> LoRAModel:
        config = LoRAConfig(target_modules="all-linear", adapter_dtype="float32")
        return LoRAModel(copy.deepcopy(base), config).train()

    ours, theirs = make(), make()
    layers = [module for module in theirs.modules() if isinstance(module, LoRALinear)]

    def written_out(x: Tensor) -> Tensor:
        hidden = composed(layers[0].base_layer, layers[0].weights, x).relu()
        return composed(layers[1].base_layer, layers[1].weights, hidden)

    losses = train(ours, ours)
    assert losses == pytest.approx(train(theirs, written_out), rel=4 * torch.finfo(dtype).eps)
    assert losses[-1] < losses[3]


# ---- parallel layers --------------------------------------------------------------------------------------


class Parallel(nn.Module):
    """A stand-in for a column- or row-parallel linear layer: not an nn.Linear; returns (output, bias)."""

    def __init__(self, weight: Tensor, dim: int, rank: int, size: int) -> None:
        super().__init__()
        self.whole, self.part = weight.shape, Part(dim, rank, size)
        self.weight = nn.Parameter(self.part.of(weight).clone())

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        from qlora.quant.parts import SumGradient, SumOutput

        if self.part.count == 1:
            return F.linear(x, self.weight), None
        if self.part.dim == 0:
            return F.linear(SumGradient.apply(x, None), self.weight), None
        return SumOutput.apply(F.linear(x, self.weight), None), None


class ParallelPair(nn.Module):
    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.up = Parallel(torch.randn(16, 12, generator=draw) / 4, 0, rank, size)
        self.down = Parallel(torch.randn(12, 16, generator=draw) / 4, 1, rank, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)[0].relu())[0]


def parallel_results(rank: int, size: int) -> dict[str, Tensor]:
    """Output, gradients, trained adapter and merged output of the pair."""
    register_linear(Parallel, lambda layer: LinearShape(*layer.whole, layer.part if size > 1 else None))
    config = LoRAConfig(rank=4, dropout=0.25, target_modules="up,down", adapter_dtype="float32")
    model = LoRAModel(ParallelPair(rank, size), config, seed=2).train()
    with torch.no_grad():
        for index, parameter in enumerate(model.lora_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) / 4)
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1e-3)
    torch.manual_seed(4)  # the dropout masks
    results = {}
    for step in range(3):
        x = X.clone().requires_grad_()
        y = model(x)
        optimizer.zero_grad()
        y.square().mean().backward()
        assert x.grad is not None
        results |= {f"y{step}": y.detach(), f"dx{step}": x.grad}
        results |= {f"d{n}{step}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    results["eval"] = model.eval()(X).detach()
    results["merged"] = model.merge_and_unload()(X).detach()
    assert not any("lora" in name or "base_layer" in name for name in model.model.state_dict())
    return results


def compare_parallel(expected: dict[str, Tensor]) -> None:
    torch.distributed.init_process_group("gloo")
    actual = parallel_results(torch.distributed.get_rank(), 2)
    assert actual.keys() == expected.keys() and len(expected) == 3 * 6 + 2
    for name, tensor in expected.items():
        assert relative_error(actual[name], tensor) < 2e-5, name


def test_two_processes_with_parallel_layers_equal_one() -> None:
    expected = parallel_results(0, 1)
    assert relative_error(expected["merged"], expected["eval"]) < TOLERANCE
    run_processes(2, compare_parallel, expected, timeout=120)


def test_a_layer_that_is_described_wrong() -> None:
    register_linear(Parallel, lambda layer: LinearShape(16, 13))
    with pytest.raises(InputError, match=r"turned \(5, 12\) into \(5, 16\), which LoRA cannot follow"):
        LoRAModel(ParallelPair(0, 1), LoRAConfig(target_modules="up"))(X)
    with pytest.raises(InputError, match="give it a class of torch modules"):
        register_linear(3, lambda layer: LinearShape(1, 1))  # type: ignore[arg-type]


# ---- a base's checkpoint, after wrapping ------------------------------------------------------------------


def test_a_base_checkpoint_reaches_wrapped_layers() -> None:
    """strict=False left them as they were, without a word."""
    model = adapted(nn.Linear(12, 8))
    other = nn.Sequential(nn.Linear(12, 8))
    missing, unexpected = model.model.load_state_dict(other.state_dict(), strict=False)
    assert sorted(missing) == ["0.lora.lora_A", "0.lora.lora_B"] and not unexpected
    with model.disable_adapter():
        assert torch.equal(model(X), other(X))
    again = adapted(nn.Linear(12, 8))
    again.model.load_state_dict(model.model.state_dict())
    assert torch.equal(again(X), model(X))
    model.merge()
    with pytest.raises(RuntimeError, match="0 is merged; call unmerge"):
        model.model.load_state_dict(other.state_dict(), strict=False)
