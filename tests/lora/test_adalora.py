"""AdaLoRA against the paper's formulas by autograd, step by step against PEFT, and resumed bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import train
from examples.orders import write_task
from qlora.adapters.load import load_adapter
from qlora.adapters.peft_files import read_adapter, save_adapter
from qlora.config.lora import LoRAConfig
from qlora.config.merge import MergeOptions
from qlora.export.merge import merge_adapter
from qlora.lora.adalora import BudgetSchedule, ScaledRows, pack_triplets, plan_budget, unpack_triplets
from qlora.lora.adalora_optimizer import AdaLoRAOptimizer, build_adapter_optimizer
from qlora.lora.adapter import inject_lora, lora_layers
from qlora.lora.optimizer import BETAS, EPS
from qlora.lora.trainable import freeze_base
from qlora.model.load import load_base_model
from qlora.system.errors import InputError
from tests.models import save_tiny_llama
from tests.reference import relative_error
from tests.tiny import tiny_tokenizer

IDS = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(5))
TARGETS = "q_proj,v_proj,down_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Stored in bf16, so that our 16-bit base and transformers' fp32 one are the same numbers."""
    directory = save_tiny_llama(tmp_path_factory.mktemp("llama"), tokenizer=tiny_tokenizer())
    tensors = load_file(directory / "model.safetensors")
    save_file({k: t.bfloat16() for k, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    return str(directory)


def started(model: str, use_4bit: bool = False, **settings: Any) -> tuple[Any, LoRAConfig]:
    common = {"rank": 6, "use_adalora": True, "target_modules": TARGETS, "adapter_dtype": "float32", "alpha": 12.0}
    config = LoRAConfig(**{"adalora_interval": 2, "adalora_target_rank": 2, **common, **settings})
    network = load_base_model(model, use_4bit, compute_dtype="float32", cache=False)
    inject_lora(network, config, seed=1)
    freeze_base(network)
    return network, config


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def learn(network: Any, optimizer: Any, steps: int, rate: float = 1e-2) -> None:
    for _ in range(steps):
        loss_of(network(input_ids=IDS).logits).backward()
        optimizer.step(rate)
        optimizer.zero_grad()


@torch.no_grad()
def logits(network: Any) -> Tensor:
    return network.eval()(input_ids=IDS).logits


# ---- the formulas -----------------------------------------------------------------------------------------


def test_the_start(llama: str) -> None:
    """A and B Gaussian with a deviation of 0.02, E zero: the adapted model is its base."""
    network, _ = started(llama)
    base = load_base_model(llama, use_4bit=False, compute_dtype="float32", cache=False)
    assert torch.equal(logits(network), logits(base))
    layers = [layer.weights for layer in lora_layers(network).values()]
    assert len(layers) == 6 and not any(layer.lora_E.any() for layer in layers)
    values = torch.cat([p.detach().flatten() for layer in layers for p in (layer.lora_A, layer.lora_B)])
    assert abs(values.std() / 0.02 - 1) < 0.05 and abs(values.mean()) < 0.002
    assert all(layer.scaling == 12.0 / (6 + 1e-5) for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_rows(dtype: torch.dtype) -> None:
    """E * A and its gradients, those of a bf16 A unrounded."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 6, generator=generator).to(dtype).requires_grad_()
    A.grad_dtype = torch.float32
    E = torch.randn(4, 1, generator=generator, requires_grad=True)
    dy = torch.randn(4, 6, generator=generator)
    ScaledRows.apply(A, E).backward(dy)
    plain_A, plain_E = A.detach().float().requires_grad_(), E.detach().requires_grad_()
    expected = plain_A * plain_E
    expected.backward(dy)
    assert A.grad.dtype == torch.float32 and torch.equal(A.grad, plain_A.grad)
    assert torch.allclose(E.grad, plain_E.grad, rtol=1e-6)


def test_the_penalty_is_the_gradient_of_equation_4(llama: str) -> None:
    """With no gradient of the data, what the optimizer steps along is autograd's of the penalty."""
    network, config = started(llama)
    optimizer = build_adapter_optimizer(network, config, "adamw", 0.0, 10)
    assert isinstance(optimizer, AdaLoRAOptimizer)
    layers = [layer.weights for layer in lora_layers(network).values()]
    penalty = torch.zeros(())
    for layer in layers:
        for P in (layer.lora_A.T, layer.lora_B):
            penalty = penalty + 0.5 / (2 * len(layers)) * (P.T @ P - torch.eye(6)).norm()
    wanted = torch.autograd.grad(penalty, [p for layer in layers for p in (layer.lora_A, layer.lora_B)])
    optimizer._add_penalty()
    given = [p.grad for layer in layers for p in (layer.lora_A, layer.lora_B)]
    for mine, expected in zip(given, wanted, strict=True):
        assert relative_error(mine, expected) < 1e-5
    optimizer._add_penalty()  # it adds to what is there
    assert relative_error(layers[0].lora_A.grad, 2 * wanted[0]) < 1e-5


def test_triplets_become_orthonormal(llama: str) -> None:
    network, config = started(llama)
    optimizer = build_adapter_optimizer(network, config, "adamw", 0.0, 200)
    layer = lora_layers(network)["model.layers.0.self_attn.q_proj"].weights

    def distance() -> float:
        return (layer.lora_A @ layer.lora_A.T - torch.eye(6)).norm().item()

    before = distance()
    for _ in range(60):
        optimizer.step(5e-3)  # no data: the penalty alone
        optimizer.zero_grad()
    assert distance() < 0.2 * before


def test_the_budget_falls_as_in_equation_12() -> None:
    schedule = BudgetSchedule(start=72, target=24, t_i=10, t_f=20, interval=5, total=100)
    assert [schedule.budget(step) for step in (1, 10, 80, 100)] == [72, 72, 24, 24]
    assert schedule.budget(45) == int(24 + 48 * (1 - 35 / 70) ** 3)
    budgets = [schedule.budget(step) for step in range(1, 101)]
    assert budgets == sorted(budgets, reverse=True)
    chosen = [step for step in range(1, 101) if schedule.chooses(step)]
    assert chosen == list(range(15, 81, 5))
    odd = BudgetSchedule(72, 24, t_i=10, t_f=19, interval=5, total=100)
    assert [step for step in range(70, 101) if odd.chooses(step)] == [70, 75, 80, 81]


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_every_run_has_a_choice(total: int) -> None:
    """The last choice, which brings the ranks to the target, comes in runs of any length."""
    for start, end in ((0.0, 1.0), (0.1, 0.7), (0.9, 0.95)):
        config = LoRAConfig(rank=8, use_adalora=True, adalora_start=start, adalora_end=end)
        schedule = plan_budget(config, 4, total)
        last = total - schedule.t_f
        assert 0 <= schedule.t_i < last <= total and schedule.chooses(last)
        assert schedule.budget(last) == schedule.target == 16


# ---- PEFT -------------------------------------------------------------------------------------------------


def peft_model(model: str, **settings: Any) -> Any:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    options = {"init_r": 6, "target_r": 2, "lora_alpha": 12, "target_modules": TARGETS.split(","), **settings}
    return peft.get_peft_model(base, peft.AdaLoraConfig(task_type="CAUSAL_LM", **options))


def test_24_steps_equal_pefts(llama: str, tmp_path: Path) -> None:
    """Same start and batch: scores, kept triplets and weights of every step, then the files in both directions.

    fp32 throughout. A score is a product of two averages of |w g|, so twice a gradient's rounding, which AdamW's
    division by small second moments enlarges: 1e-3.
    """
    network, config = started(llama, adalora_start=0.2, adalora_end=0.75)
    total = 24
    optimizer = build_adapter_optimizer(network, config, "adamw", 0.0, total)
    assert isinstance(optimizer, AdaLoRAOptimizer)
    schedule = optimizer.schedule
    theirs = peft_model(llama, tinit=schedule.t_i, tfinal=schedule.t_f, deltaT=2, total_step=total)
    parameters = dict(theirs.named_parameters())
    layers = lora_layers(network)
    names = {name: f"base_model.model.{name}.lora_%s.default" for name in layers}
    for name, layer in layers.items():
        for part in "AB":
            parameters[names[name] % part].data.copy_(getattr(layer.weights, f"lora_{part}"))
    adamw = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=0.0
    )
    theirs.train()
    num_masked = []
    for step in range(1, total + 1):
        learn(network, optimizer, 1)
        output = theirs(input_ids=IDS, labels=IDS)
        output.loss.backward()
        adamw.step()
        theirs.base_model.update_and_allocate(step)
        adamw.zero_grad()
        allocator = theirs.base_model.rankallocator
        for index, (name, layer) in enumerate(layers.items()):
            for part in "ABE":
                mine = getattr(layer.weights, f"lora_{part}").detach()
                other = parameters[names[name] % part].detach()
                assert (mine - other).abs().max() < 2e-4, (step, name, part)  # of steps of 1e-2
                if part == "E":
                    assert torch.equal(mine == 0, other == 0), (step, name)
                if step < total - schedule.t_f:
                    key = f"{name}.lora_{part}.default"
                    assert relative_error(optimizer.sensitivity[index][part], allocator.exp_avg_ipt[key]) < 1e-3
                    assert relative_error(optimizer.uncertainty[index][part], allocator.exp_avg_unc[key]) < 1e-3
        num_masked.append(sum(int((layer.weights.lora_E == 0).sum()) for layer in layers.values()))
    # all kept, then fewer, 6 layers x 2 at the end; the choice was between layers, not 2 in each
    assert num_masked[schedule.t_i - 1] == 0 and num_masked[-1] == 36 - 12
    assert len(set(num_masked)) > 3
    kept = [int((layer.weights.lora_E != 0).sum()) for layer in layers.values()]
    assert sum(kept) == 12 and len(set(kept)) > 1

    save_adapter(network, tmp_path / "ours", config, llama)
    theirs.save_pretrained(tmp_path / "theirs")
    check_both_ways(llama, tmp_path, logits(network), logits(theirs))


def check_both_ways(llama: str, tmp_path: Path, ours: Tensor, theirs: Tensor) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    mine, other = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in other.items()}
    settings, their_settings = (
        json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "theirs")
    )
    assert settings["rank_pattern"] == their_settings["rank_pattern"]
    fields = ("peft_type", "r", "init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step", "beta1", "beta2")
    assert {f: settings[f] for f in fields} == {f: their_settings[f] for f in fields}
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert relative_error(logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "ours"))), ours) < 1e-5
    here = load_base_model(llama, use_4bit=False, compute_dtype="float32", cache=False)
    loaded = load_adapter(here, tmp_path / "theirs")
    assert loaded.use_adalora and loaded.rank == 6 and loaded.adalora_target_rank == 2
    assert relative_error(logits(here), theirs) < 1e-5


def test_an_untrained_adapter_keeps_its_triplets(llama: str, tmp_path: Path) -> None:
    """Every E is zero: without them there would be nothing to go on with."""
    import peft
    from transformers import AutoModelForCausalLM

    network, config = started(llama)
    save_adapter(network, tmp_path, config, llama)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] is None
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert state["base_model.model.model.layers.0.self_attn.q_proj.lora_A"].shape == (6, 64)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert relative_error(logits(peft.PeftModel.from_pretrained(base, str(tmp_path))), logits(network)) < 1e-5


def test_a_layer_may_lose_all_its_triplets(llama: str, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    network, config = started(llama)
    for index, layer in enumerate(lora_layers(network).values()):
        with torch.no_grad():
            layer.weights.lora_E[index % 3 : 2 * (index % 3)] = 0.7 + index  # none in every third layer
    save_adapter(network, tmp_path, config, llama)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert relative_error(logits(peft.PeftModel.from_pretrained(base, str(tmp_path))), logits(network)) < 1e-5
    here = load_base_model(llama, use_4bit=False, compute_dtype="float32", cache=False)
    load_adapter(here, tmp_path)
    assert torch.equal(logits(here), logits(network))


# ---- saved, loaded, resumed, merged -----------------------------------------------------------------------


def test_packing_and_unpacking(tmp_path: Path) -> None:
    state = {
        "a.lora_A.weight": torch.randn(3, 5),
        "a.lora_B.weight": torch.randn(4, 3),
        "a.lora_E": torch.tensor([[1.0], [0.0], [-2.0]]),
        "b.bias": torch.randn(2),
    }
    packed, pattern = pack_triplets(state)
    assert pattern == {"a.lora_E": [True, False, True]} and packed["a.lora_B.weight"].shape == (4, 2)
    whole = unpack_triplets(packed, pattern, 3, tmp_path)
    kept = torch.tensor([1.0, 0.0, 1.0])
    assert torch.equal(whole["a.lora_A.weight"], state["a.lora_A.weight"] * kept[:, None])
    assert torch.equal(whole["a.lora_B.weight"], state["a.lora_B.weight"] * kept)
    assert torch.equal(whole["a.lora_E"], state["a.lora_E"]) and torch.equal(whole["b.bias"], state["b.bias"])
    for wrong in (
        [],
        {"a.lora_E": [True, False]},
        {"a.lora_E": [True, True, True]},
        {"a.lora_E": [1, 0, 1]},
        {"b.lora_E": [True, False, True]},
        {"a.lora_E": 2},
    ):
        with pytest.raises(InputError, match="rank_pattern that does not fit"):
            unpack_triplets(packed, wrong, 3, tmp_path)


@pytest.mark.parametrize(("dtype", "stop"), [("bfloat16", 1), ("float32", 7), ("bfloat16", 11)])
def test_restart_equals_uninterrupted(llama: str, tmp_path: Path, dtype: str, stop: int) -> None:
    """Before the first choice, between two, and after the last: every bit of 12 steps."""
    whole, config = started(llama, adapter_dtype=dtype)
    learn(whole, optimizer := build_adapter_optimizer(whole, config, "adamw", 0.0, 12), 12)
    first, _ = started(llama, adapter_dtype=dtype)
    before = build_adapter_optimizer(first, config, "adamw", 0.0, 12)
    learn(first, before, stop)
    save_file(before.state_tensors(), tmp_path / "optimizer.safetensors")
    second, _ = started(llama, adapter_dtype=dtype)
    resumed = build_adapter_optimizer(second, config, "adamw", 0.0, 12)
    resumed.load_state_tensors(load_file(tmp_path / "optimizer.safetensors"))
    learn(second, resumed, 12 - stop)
    expected = optimizer.state_tensors()
    actual = resumed.state_tensors()
    assert actual.keys() == expected.keys() and all(torch.equal(actual[k], expected[k]) for k in expected)
    assert torch.equal(logits(second), logits(whole))
    assert sum(int(kept.sum()) for kept in optimizer.kept) == 12


def test_state_of_another_run_is_refused(llama: str) -> None:
    network, config = started(llama)
    optimizer = build_adapter_optimizer(network, config, "adamw", 0.0, 12)
    learn(network, optimizer, 2)
    state = optimizer.state_tensors()
    other, _ = started(llama, target_modules="q_proj")
    with pytest.raises(InputError, match="is not AdaLoRA's of this adapter"):
        build_adapter_optimizer(other, config, "adamw", 0.0, 12).load_state_tensors(state)
    without = {key: tensor for key, tensor in state.items() if not key.startswith("adalora.")}
    with pytest.raises(InputError, match="is not AdaLoRA's of this adapter"):
        build_adapter_optimizer(network, config, "adamw", 0.0, 12).load_state_tensors(without)


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_with_the_other_optimizers(llama: str, optim: str) -> None:
    network, config = started(llama, use_4bit=True, adapter_dtype="bfloat16", lora_plus_ratio=4.0)
    before = loss_of(logits(network))
    optimizer = build_adapter_optimizer(network, config, optim, 0.0, 12)
    learn(network.train(), optimizer, 12)
    assert loss_of(logits(network)) < before - 0.05
    assert sum(int((layer.weights.lora_E != 0).sum()) for layer in lora_layers(network).values()) == 12


def test_a_run_from_the_command_line(llama: str, tmp_path: Path) -> None:
    """Trained, resumed bit for bit, loaded, merged: 4-bit base, bf16 adapter."""
    data = write_task(tmp_path / "orders", num_train=12, num_test=1)[0]
    flags = ["--model", llama, "--data", str(data), "--max-length", "256", "--batch-size", "2", "--max-steps", "6"]
    flags += ["--compute-dtype", "float32", "--save-every", "3", "--use-adalora", "--rank", "4"]
    flags += ["--adalora-interval", "1", "--learning-rate", "1e-2"]
    train.main([*flags, "--output-dir", str(tmp_path / "whole")])
    train.main([*flags, "--output-dir", str(tmp_path / "parts")])
    last = tmp_path / "parts" / "checkpoints" / "step-000006"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    (tmp_path / "parts" / "adapter_model.safetensors").unlink()
    train.main([*flags, "--output-dir", str(tmp_path / "parts"), "--resume", "auto"])
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file
    settings = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert (settings["tinit"], settings["tfinal"], settings["total_step"]) == (0, 2, 6)
    assert sum(map(sum, settings["rank_pattern"].values())) == 2 * 4  # mean rank 2 in 4 layers
    network = load_base_model(llama, compute_dtype="float32", cache=False)
    before = logits(network)
    load_adapter(network, tmp_path / "whole")
    assert relative_error(logits(network), before) > 1e-3
    merge_adapter(llama, str(tmp_path / "whole"), str(tmp_path / "merged"), MergeOptions(drift=False))
    merged = load_base_model(str(tmp_path / "merged"), use_4bit=False, compute_dtype="float32", cache=False)
    assert relative_error(logits(merged), logits(network)) < 0.02  # bf16 rounding of the merged weights
    saved = read_adapter(tmp_path / "whole")
    for name, layer in lora_layers(network).items():
        A, B = saved.low_rank(name)
        assert relative_error(B @ A, layer.weights.delta_weight()) < 1e-6 or not layer.weights.delta_weight().any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "leave out init, use_dora"),
        ({"init": "pissa"}, "leave out init"),
        ({"alpha_pattern": "q_proj=3"}, "leave out init"),
        ({"adalora_start": 0.8}, "the start first"),
        ({"adalora_end": 1.5}, "the start first"),
        ({"adalora_interval": 0}, "adalora_interval is 0"),
        ({"adalora_target_rank": 9}, "adalora_target_rank is 9"),
        ({"adalora_start": math.nan}, "the start first"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoRAConfig(use_adalora=True, **settings)
