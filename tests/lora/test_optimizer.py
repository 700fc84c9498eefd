"""Small updates are kept, and the state survives a restart bit for bit."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora.adapters.model import LoRAModel
from qlora.config.lora import LoRAConfig
from qlora.lora.adalora_optimizer import build_adapter_optimizer
from qlora.lora.adapter import active_adapter
from qlora.lora.optimizer import BETAS, EPS, MasterOptimizer, adamw_kind, build_optimizer
from qlora.lora.trainable import unfreeze
from qlora.quant.library import bnb
from qlora.system.device import choose_optimizer
from qlora.system.errors import InputError
from tests.models import save_tiny_llama
from tests.reference import relative_error

OPTIMIZERS = ("adamw", "paged_adamw_32bit", "paged_adamw_8bit")


def make_parameters(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    """Two large enough for 8-bit moments (4,096 values and more), and one that keeps 32-bit ones."""
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((64, 80), (8, 8), (64, 64))
    ]
    for parameter in parameters:
        parameter.grad_dtype = torch.float32  # as LoRALinear sets it
    return parameters


def gradients(step: int, parameters: list[nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [0.1 * torch.randn(p.shape, generator=generator) for p in parameters]


def run_steps(optimizer: MasterOptimizer, steps: range, learning_rate: float = 1e-2) -> None:
    for step in steps:
        for parameter, gradient in zip(optimizer.parameters, gradients(step, optimizer.parameters), strict=True):
            parameter.grad = gradient.to(parameter.device)
        optimizer.step(learning_rate)
        optimizer.zero_grad()


def test_tiny_updates_add_up_in_bf16() -> None:
    """100 updates of 1e-6 of the value, each far below bf16's 2^-9, move the master by 1e-4.

    Larger ones after them reach the bf16 parameter, which is the master rounded. Plain AdamW on a bf16
    parameter would stay where it was for ever.
    """
    start = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    parameter, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    parameter.grad_dtype = torch.float32
    ours = build_optimizer([parameter], "adamw")
    torchs = torch.optim.AdamW([plain], lr=1e-6, weight_decay=0.0)
    for _ in range(100):  # a constant gradient: AdamW moves by the learning rate each step
        parameter.grad, plain.grad = torch.ones(64, 64), torch.ones_like(plain)
        ours.step(1e-6)
        torchs.step()
    moved = 1 - ours.masters[0].double()
    assert torch.equal(plain, start), "the contrast: bf16 alone loses all of it"
    assert (moved - 1e-4).abs().max() < 3e-6  # a step is rounded to half of 2^-24, 3 % of 1e-6
    assert torch.equal(parameter, start), "not yet half a bf16 step"
    for _ in range(30):
        parameter.grad, plain.grad = torch.ones(64, 64), torch.ones_like(plain)
        ours.step(1e-4)
    assert (parameter < start).all()
    assert torch.equal(parameter, ours.masters[0].to(torch.bfloat16))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fp32_parameters_equal_torch_adamw(weight_decay: float) -> None:
    """fp32 parameters are their own masters: torch's AdamW, to the fused kernel's rounding, 2^-24 a step."""
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer = build_optimizer(ours, "adamw", weight_decay)
    assert all(master is parameter for master, parameter in zip(optimizer.masters, ours, strict=True))
    plain = torch.optim.AdamW(theirs, lr=1e-2, betas=BETAS, eps=EPS, weight_decay=weight_decay, fused=False)
    run_steps(optimizer, range(10))
    for step in range(10):
        for parameter, gradient in zip(theirs, gradients(step, theirs), strict=True):
            parameter.grad = gradient
        plain.step()
    for mine, other, start in zip(ours, theirs, make_parameters(torch.float32), strict=True):
        assert relative_error(mine.detach() - start, other.detach() - start) < 1e-5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bf16_parameters_are_rounded_fp32_ones(name: str) -> None:
    """The same walk as fp32 parameters from the same start, rounded at the end, not on the way."""
    ours, exact = make_parameters(), make_parameters()
    exact = [nn.Parameter(p.detach().float()) for p in exact]
    run_steps(build_optimizer(ours, name), range(10))
    run_steps(build_optimizer(exact, name), range(10))
    for mine, other, start in zip(ours, exact, make_parameters(), strict=True):
        assert mine.dtype == torch.bfloat16 and not torch.equal(mine, start)
        assert torch.equal(mine, other.to(torch.bfloat16))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_kind_steps_as_adamw(name: str, weight_decay: float) -> None:
    """The first AdamW step is -learning_rate x (sign(gradient) + decay x parameter); ten stay near torch's.

    32-bit moments differ by rounding; 8-bit ones keep 2 to 3 digits, and only for large parameters.
    """
    start = [p.detach() for p in make_parameters(torch.float32)]
    first = make_parameters(torch.float32)
    run_steps(build_optimizer(first, name, weight_decay), range(1))
    for parameter, before, gradient in zip(first, start, gradients(0, first), strict=True):
        # The moved parameter is rounded to 2^-23 of itself, which is 1e-5 of the step.
        expected = -1e-2 * (gradient.sign() + weight_decay * before)
        assert relative_error(parameter.detach() - before, expected) < 1e-4
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    run_steps(build_optimizer(ours, name, weight_decay), range(10))
    run_steps(build_optimizer(theirs, "adamw", weight_decay), range(10))
    errors = [relative_error(a.detach() - s, b.detach() - s) for a, b, s in zip(ours, theirs, start, strict=True)]
    assert errors[1] < 1e-5
    for error in (errors[0], errors[2]):
        assert 1e-4 < error < 0.1 if name == "paged_adamw_8bit" else error < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restart_equals_uninterrupted(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """5 steps, to disk, 5 more in a new optimizer over other parameters: every bit of 10 steps."""
    straight = make_parameters(dtype)
    whole = build_optimizer(straight, name)
    run_steps(whole, range(10))

    before = make_parameters(dtype)
    optimizer = build_optimizer(before, name)
    run_steps(optimizer, range(5))
    assert not torch.equal(before[0], straight[0])
    stored = optimizer.state_tensors()
    save_file(stored, tmp_path / "optimizer.safetensors")

    after = [nn.Parameter(torch.zeros_like(p)) for p in before]
    for parameter in after:
        parameter.grad_dtype = torch.float32
    resumed = build_optimizer(after, name)
    resumed.load_state_tensors(load_file(tmp_path / "optimizer.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    restored = resumed.state_tensors()
    assert restored.keys() == stored.keys() and len(stored) > 2 * len(before)
    assert all(torch.equal(restored[key], stored[key]) for key in stored)
    assert all(restored[key].dtype == stored[key].dtype for key in stored)
    run_steps(resumed, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(after, straight, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(resumed.masters, whole.masters, strict=True))


def test_loading_does_not_share_memory_with_what_was_loaded() -> None:
    first, second = build_optimizer(make_parameters(), "adamw"), build_optimizer(make_parameters(), "adamw")
    run_steps(first, range(3))
    second.load_state_tensors(first.state_tensors())
    kept = {key: tensor.clone() for key, tensor in first.state_tensors().items()}
    run_steps(second, range(3, 6))
    assert all(torch.equal(tensor, kept[key]) for key, tensor in first.state_tensors().items())


def test_state_of_another_adapter_is_refused() -> None:
    optimizer = build_optimizer(make_parameters(), "adamw")
    run_steps(optimizer, range(2))
    state = optimizer.state_tensors()
    other = build_optimizer([nn.Parameter(torch.zeros(s)) for s in ((64, 80), (4, 8), (64, 64))], "adamw")
    with pytest.raises(InputError, match=r"1\.master"):
        other.load_state_tensors(state)
    assert not any(master.any() for master in other.masters), "nothing is loaded"
    fewer = build_optimizer([nn.Parameter(torch.zeros(64, 80))], "adamw")
    with pytest.raises(InputError):
        fewer.load_state_tensors(state)


@pytest.mark.parametrize(("stored", "wanted"), itertools.permutations(OPTIMIZERS, 2))
def test_state_of_another_kind_of_optimizer_is_refused(stored: str, wanted: str) -> None:
    optimizer = build_optimizer(make_parameters(), stored)
    run_steps(optimizer, range(2))
    other = build_optimizer(make_parameters(), wanted)
    with pytest.raises(InputError):
        other.load_state_tensors(optimizer.state_tensors())


def test_a_parameter_without_gradient_stays() -> None:
    parameters = make_parameters()
    start = [p.detach().clone() for p in parameters]
    optimizer = build_optimizer(parameters, "adamw")
    parameters[0].grad = torch.ones(64, 80)
    optimizer.step(1e-2)
    assert not torch.equal(parameters[0], start[0]) and torch.equal(parameters[1], start[1])
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters)


def test_names() -> None:
    with pytest.raises(InputError, match="'sgd'; choose adamw"):
        build_optimizer(make_parameters(), "sgd")
    assert choose_optimizer("auto", torch.device("cpu")) == "adamw"
    assert choose_optimizer("auto", torch.device("cuda")) == "paged_adamw_32bit"
    assert choose_optimizer("paged_adamw_8bit", torch.device("cpu")) == "paged_adamw_8bit"


# ---- LoRA+ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_plus_is_two_adamws(weight_decay: float) -> None:
    """B at 16 times the rate of the others: two of torch's AdamW, each over its own parameters."""
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer = build_optimizer(ours, "adamw", weight_decay, 16.0, [ours[1], ours[2]])
    options = {"betas": BETAS, "eps": EPS, "weight_decay": weight_decay, "fused": False}
    slow = torch.optim.AdamW(theirs[:1], lr=1e-3, **options)
    fast = torch.optim.AdamW(theirs[1:], lr=16e-3, **options)
    run_steps(optimizer, range(10), 1e-3)
    for step in range(10):
        for parameter, gradient in zip(theirs, gradients(step, theirs), strict=True):
            parameter.grad = gradient
        slow.step()
        fast.step()
    for mine, other, start in zip(ours, theirs, make_parameters(torch.float32), strict=True):
        assert relative_error(mine.detach() - start, other.detach() - start) < 1e-5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lora_plus_with_each_kind(name: str) -> None:
    """The first step is the rate times the gradient's sign; restored, it goes on bit for bit."""
    parameters = make_parameters(torch.float32)
    start = [p.detach().clone() for p in parameters]
    optimizer = build_optimizer(parameters, name, lora_plus_ratio=4.0, lora_B=parameters[1:2])
    run_steps(optimizer, range(1), 1e-3)
    for index, (parameter, before) in enumerate(zip(parameters, start, strict=True)):
        expected = -(4e-3 if index == 1 else 1e-3) * gradients(0, parameters)[index].sign()
        assert relative_error(parameter.detach() - before, expected) < 1e-3  # rounded to 2^-23 of the parameter
    after = make_parameters(torch.float32)
    resumed = build_optimizer(after, name, lora_plus_ratio=4.0, lora_B=after[1:2])
    resumed.load_state_tensors({key: tensor.clone() for key, tensor in optimizer.state_tensors().items()})
    run_steps(optimizer, range(1, 4), 1e-3)
    run_steps(resumed, range(1, 4), 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(after, parameters, strict=True))


def test_lora_plus_groups_are_pefts(tmp_path: Path) -> None:
    """The parameters at B's rate are those that PEFT puts there; B is told by what it is, not by its name."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM

    from qlora.config.lora import LoRAConfig
    from qlora.lora.adalora_optimizer import build_adapter_optimizer
    from qlora.lora.adapter import inject_lora, lora_layers
    from qlora.lora.trainable import freeze_base
    from qlora.model.load import load_base_model

    model = str(save_tiny_llama(tmp_path))
    network = load_base_model(model, use_4bit=False, compute_dtype="float32", cache=False)
    config = LoRAConfig(lora_plus_ratio=16.0, use_dora=True, modules_to_save="embed_tokens")
    inject_lora(network, config)
    freeze_base(network)
    ours = build_adapter_optimizer(network, config, "adamw", 0.0, 10)
    masters = {id(master): parameter for parameter, master in zip(ours.parameters, ours.masters, strict=True)}
    fast = [
        masters[id(master)]
        for group in ours.inner.param_groups
        if group["ratio"] == 16.0
        for master in group["params"]
    ]
    assert {id(p) for p in fast} == {id(layer.weights.lora_B) for layer in lora_layers(network).values()}
    assert sum(len(group["params"]) for group in ours.inner.param_groups) == len(ours.parameters) == 4 * 3 + 1
    options = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(model), options)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    shapes = [tuple(p.shape) for group in optimizer.param_groups if group["lr"] == 16e-3 for p in group["params"]]
    assert sorted(shapes) == sorted(tuple(p.shape) for p in fast)


# ---- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_paged_optimizer_is_paged_and_restarts() -> None:
    """Moments of 100,000 values and more lie in pages that the driver can move, also after a restart."""
    torch.manual_seed(0)
    start = torch.randn(512, 512)

    def fresh() -> MasterOptimizer:
        parameter = nn.Parameter(start.to("cuda", torch.bfloat16))
        parameter.grad_dtype = torch.float32
        return build_optimizer([parameter], "paged_adamw_32bit")

    def paged(optimizer: MasterOptimizer) -> list[bool]:
        (state,) = optimizer.inner.state.values()
        return [getattr(state[name], "is_paged", False) for name in ("state1", "state2")]

    whole = fresh()
    run_steps(whole, range(10))
    assert paged(whole) == [True, True]
    first, resumed = fresh(), fresh()
    run_steps(first, range(5))
    resumed.load_state_tensors({key: tensor.cpu() for key, tensor in first.state_tensors().items()})
    run_steps(resumed, range(5, 10))
    assert paged(resumed) == [True, True]
    assert torch.equal(resumed.masters[0], whole.masters[0])


# ---- loops of one's own -----------------------------------------------------------------------------------


def small_model(**settings: Any) -> LoRAModel:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    return LoRAModel(network, LoRAConfig(rank=4, target_modules="all-linear", **settings), seed=1).train()


def train_loop(model: LoRAModel, optimizer: torch.optim.Optimizer, steps: int = 15) -> list[float]:
    x, labels = torch.randn(12, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


TORCH_OPTIMIZERS = {
    "Adam": {}, "Adam foreach": {"foreach": True}, "Adam loop": {"foreach": False}, "Adam fused": {"fused": True},
    "AdamW": {}, "AdamW foreach": {"foreach": True}, "AdamW loop": {"foreach": False},
    "AdamW fused": {"fused": True}, "AdamW amsgrad": {"amsgrad": True}, "SGD": {"momentum": 0.9},
    "SGD fused": {"fused": True}, "Adagrad": {}, "RMSprop": {"momentum": 0.5}, "NAdam": {}, "RAdam": {},
    "Adamax": {}, "Adadelta": {"lr": 1.0}, "Rprop": {}, "ASGD": {"lr": 0.1}, "Adafactor": {},
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_any_torch_optimizer_works_as_it_comes(name: str) -> None:
    """Over bf16 adapters; Adam and AdamW raised "expected dtype c10::BFloat16" as their gradients were fp32."""
    # torch 2.13's fused SGD changes few values of a bf16 parameter on a CPU: pytorch/pytorch issue 191763.
    dtype = torch.float32 if name == "SGD fused" else torch.bfloat16
    model = small_model(adapter_dtype=str(dtype).removeprefix("torch."))
    options = {"lr": 0.02, **TORCH_OPTIMIZERS[name]}
    optimizer = getattr(torch.optim, name.split()[0])(model.trainable_parameters(), **options)
    losses = train_loop(model, optimizer)
    assert losses[-1] < losses[0]
    for parameter in model.trainable_parameters():
        assert parameter.dtype == dtype and parameter.grad is not None and parameter.grad.dtype == dtype


@pytest.mark.parametrize("own", [False, True])
def test_training_a_deep_copy_equals_the_original(own: bool) -> None:
    """Also of a model that an optimizer has taken; a copied parameter loses its `grad_dtype`."""
    first = small_model()
    if own:
        train_loop(first, first.optimizer(lr=1e-2), 2)
    second = copy.deepcopy(first)
    make = [lambda m: m.optimizer(lr=1e-2), lambda m: torch.optim.SGD(m.trainable_parameters(), 1e-2)][not own]
    assert train_loop(first, make(first)) == train_loop(second, make(second))


def test_the_models_own_optimizer_is_the_runs() -> None:
    """The same updates as `build_adapter_optimizer`, with LoRA+, under a scheduler, bit for bit."""
    ours, theirs = (small_model(lora_plus_ratio=8.0) for _ in range(2))
    optimizer = ours.optimizer(lr=1e-2, weight_decay=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [1e-2, 8e-2]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    masters = build_adapter_optimizer(theirs.model, theirs.config, "adamw", 0.1, 0)
    for step in range(5):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        for model in (ours, theirs):
            model(x).square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in ours.trainable_parameters())  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        masters.step(1e-2 / (1 + step))
        masters.zero_grad()
    pairs = list(zip(ours.lora_parameters(), theirs.lora_parameters(), strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["adamw", "paged_adamw_8bit", torch.optim.SGD, torch.optim.RMSprop])
def test_the_models_optimizer_of_any_kind_restarts(kind: Any) -> None:
    model = small_model()
    optimizer = model.optimizer(lr=1e-2, kind=kind)
    losses = train_loop(model, optimizer)
    assert losses[-1] < losses[0]
    again = copy.deepcopy(model)
    resumed = again.optimizer(lr=5.0, kind=kind)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train_loop(again, resumed) == train_loop(model, optimizer)


def test_small_updates_are_kept_by_the_models_optimizer() -> None:
    """A rate at which every update of a bf16 parameter rounds to nothing."""
    for own in (True, False):
        model = small_model()
        before = [parameter.detach().clone() for parameter in model.lora_parameters()]
        with torch.no_grad():
            for parameter, start in zip(model.lora_parameters(), before, strict=True):
                parameter.fill_(1.0), start.fill_(1.0)
        optimizer = model.optimizer(lr=1e-4) if own else torch.optim.AdamW(model.trainable_parameters(), lr=1e-4)
        train_loop(model, optimizer, 60)
        changed = [not torch.equal(p, b) for p, b in zip(model.lora_parameters(), before, strict=True)]
        assert any(changed) == own


def test_adalora_with_the_models_optimizer() -> None:
    model = small_model(use_adalora=True, adalora_target_rank=1, adalora_interval=1)
    with pytest.raises(InputError, match="give AdaLoRA's schedule the number of optimizer steps"):
        model.optimizer(lr=1e-2)
    optimizer = model.optimizer(lr=0.3, total_steps=20)
    train_loop(model, optimizer, 20)
    assert sum(int(w.lora_E.count_nonzero()) for w in active_adapter(model).layers.values()) == 2  # type: ignore[union-attr, arg-type, operator, misc]


def test_an_unfrozen_base_trains_along() -> None:
    model = small_model()
    unfreeze(model)
    before = model.model.get_submodule("0").base_layer.weight.clone()  # type: ignore[union-attr, operator]
    train_loop(model, model.optimizer(lr=1e-2), 2)
    assert not torch.equal(model.model.get_submodule("0").base_layer.weight, before)  # type: ignore[union-attr, arg-type]


def test_what_the_models_optimizer_refuses() -> None:
    model = small_model()
    with pytest.raises(InputError, match="choose adamw"):
        model.optimizer(lr=1e-2, kind="sgdd")
    with pytest.raises(InputError, match="lr is -1"):
        model.optimizer(lr=-1)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"lr": "high"}, "lr is 'high'"),
        ({"kind": nn.Linear}, "give a torch optimizer whose step needs no closure"),
        ({"kind": torch.optim.LBFGS}, "needs no closure"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"weight_decay": 0.1, "kind": torch.optim.SGD}, "weight_decay is for AdamW"),
    ]
    for options, message in wrong:
        with pytest.raises(InputError, match=message):
            model.optimizer(**{"lr": 1e-2, **options})
    with pytest.raises(InputError, match="an optimizer of their own"):  # it was listed, and never stepped
        model.optimizer(lr=1e-2).add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    state = model.optimizer(lr=1e-2).state_dict()
    with pytest.raises(InputError, match="make it with the same lora_plus_ratio"):
        small_model(lora_plus_ratio=4.0).optimizer(lr=1e-2).load_state_dict(state)
    model.set_adapter(None)
    with pytest.raises(InputError, match="No adapter is active"):
        model.optimizer(lr=1e-2)


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_waiting_once_per_step_computes_what_bitsandbytes_does(name: str) -> None:
    """Its own step waits for the device after every tensor: 450 times per step of an 8B model."""
    bits = 8 if name.endswith("8bit") else 32
    found = []
    for kind in ("ours", "theirs"):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(size, 64)) for size in (80, 3)]
        groups = [{"params": weights}]
        optimizer = (
            adamw_kind(name, 0.1)(groups)
            if kind == "ours"
            else bnb.optim.AdamW(groups, 0.0, BETAS, EPS, 0.1, optim_bits=bits)
        )
        for _ in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        found.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], torch.randn(80, 64, generator=torch.Generator().manual_seed(0)))
