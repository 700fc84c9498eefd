"""memory.py and device.py: the arithmetic against what autograd keeps and what the tensors weigh."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora import device
from qlora.config import LoRAConfig
from qlora.device import GIB, available_memory, best_device, choose_compute_dtype, peak_memory_gib
from qlora.injection import freeze_base, inject_lora, lora_layers
from qlora.memory import MemoryPlan, activation_bytes, plan_memory, wants_checkpointing
from qlora.model import load_base_model
from qlora.optim import build_optimizer
from tests.models import save_tiny_llama, tiny_llama_config

CPU = torch.device("cpu")
REPOSITORY = Path(device.__file__).parents[1]
NUM_TOKENS = 96


def saved_bytes(network: Any, num_tokens: int) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of the blocks, each counted once.

    Parameters and buffers are not activations; neither is what the graph of a no-grad part would hold.
    """
    own = {p.data_ptr() for p in network.parameters()} | {b.data_ptr() for b in network.buffers()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(num_tokens)[None] % network.config.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network.model(ids).last_hidden_state
    assert output.requires_grad and kept
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def adapted_model(
    directory: Path, layers: int, dtype: str, targets: str = "q_proj,v_proj", **settings: Any
) -> Any:
    model = load_base_model(
        str(save_tiny_llama(directory / f"llama-{layers}-{dtype}", num_hidden_layers=layers, **settings)),
        compute_dtype=dtype,
        cache=False,
    )
    inject_lora(model, LoRAConfig(target_modules=targets))
    freeze_base(model)
    return model.train()


# ---- activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear", "up_proj"])
def test_activations_against_autograd(tmp_path: Path, dtype: str, heads: tuple[int, int], targets: str) -> None:
    """A layer's plan is what autograd keeps, within a twelfth (the h of adapted layers, norms' scales).

    One layer is a model of 5 less a model of 2, by 3: what is kept once (rotary tables, last norm) drops out.
    """
    settings = dict(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    models = {layers: adapted_model(tmp_path, layers, dtype, targets, **settings) for layers in (2, 5)}
    measured = (saved_bytes(models[5], NUM_TOKENS) - saved_bytes(models[2], NUM_TOKENS)) / 3
    config = models[2].config
    adapted = {name.rpartition(".")[2] for name in lora_layers(models[2])}
    planned = activation_bytes(config, NUM_TOKENS, getattr(torch, dtype), False, adapted) / 2
    assert measured > 0
    assert 0.92 < planned / measured < 1.05


def test_checkpointing_keeps_one_layer(tmp_path: Path) -> None:
    """Every layer keeps its input, and one layer at a time is held in full."""
    config = tiny_llama_config(num_hidden_layers=10)
    one_layer = activation_bytes(config, 1, torch.bfloat16, checkpointing=False) / 10
    with_it = activation_bytes(config, 1, torch.bfloat16, checkpointing=True)
    assert with_it == one_layer + 10 * 2 * config.hidden_size
    assert with_it < 10 * one_layer


def test_activations_grow_with_tokens_and_dtype() -> None:
    config = tiny_llama_config()
    for checkpointing in (True, False):
        one = activation_bytes(config, 1, torch.float32, checkpointing)
        assert activation_bytes(config, 1000, torch.float32, checkpointing) == 1000 * one
        assert one / 2 < activation_bytes(config, 1, torch.bfloat16, checkpointing) < one


def test_activations_of_llama_7b() -> None:
    """D 4096, 32 layers, F 11008, bf16: 8 D + 2 (D + 4 D + 3 F) bytes a token and layer, by hand."""
    config = SimpleNamespace(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008
    )
    assert activation_bytes(config, 1, torch.bfloat16, False) == 32 * (8 * 4096 + 2 * (5 * 4096 + 3 * 11008))


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_wants_checkpointing(mode: str) -> None:
    """auto asks the arithmetic: over half of what is free, recompute; on and off are orders."""
    config = tiny_llama_config()
    needed = activation_bytes(config, 1000, torch.float32, checkpointing=False)
    for available, auto in ((2 * needed, False), (2 * needed - 2, True), (0, True)):
        expected = {"on": True, "off": False, "auto": auto}[mode]
        assert wants_checkpointing(mode, needed, available) is expected


# ---- the whole plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("use_4bit", [True, False])
def test_plan_against_the_tensors(tmp_path: Path, use_4bit: bool, adapter_dtype: str) -> None:
    """Base, adapters, gradients and optimizer state are the bytes that those tensors have after a step."""
    path = save_tiny_llama(tmp_path / "llama")
    model = load_base_model(str(path), use_4bit, compute_dtype="float32", cache=False)
    inject_lora(model, LoRAConfig(adapter_dtype=adapter_dtype))  # type: ignore[arg-type]
    freeze_base(model)
    plan = plan_memory(model, NUM_TOKENS, torch.float32, checkpointing=False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert trainable and frozen

    base = sum(p.nbytes for p in frozen)
    states = [p.quant_state for p in frozen if hasattr(p, "quant_state")]
    assert bool(states) == use_4bit
    base += sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    assert plan.base == base
    assert plan.adapters == sum(p.nbytes for p in trainable)

    optimizer = build_optimizer(trainable, "adamw")
    model.train()(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    assert plan.gradients == sum(p.grad.nbytes for p in trainable if p.grad is not None)
    optimizer.step(1e-3)
    state = {name: tensor for name, tensor in optimizer.state_tensors().items() if tensor.dim() > 0}  # no counters
    if adapter_dtype == "float32":  # fp32 adapters are their own masters
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".master")}
    assert plan.optimizer == sum(tensor.nbytes for tensor in state.values()) > 0


def test_plan_is_the_sum_of_its_parts() -> None:
    plan = MemoryPlan(base=GIB, adapters=2 * GIB, gradients=3, optimizer=4, activations=5, logits=6)
    assert plan.total == 3 * GIB + 18
    assert str(plan).startswith("3.00 GiB planned (base 1.00, adapters 2.00, gradients 0.00")


def test_logits_are_one_chunk(tmp_path: Path) -> None:
    """Never (N, V): the chunk bounds them however long the batch is."""
    model = adapted_model(tmp_path, 2, "float32")
    plans = [plan_memory(model, n, torch.float32, False, chunk_size=64).logits for n in (32, 64, 6400)]
    assert plans[0] == plans[1] / 2 and plans[1] == plans[2] == 64 * model.config.vocab_size * (4 + 4)


# ---- the device -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_named_compute_dtype(name: str, dtype: torch.dtype) -> None:
    assert choose_compute_dtype(name, CPU, 64) is dtype


@pytest.mark.parametrize("name", ["float16", "bf16", ""])
def test_unknown_compute_dtype_is_named(name: str) -> None:
    """A ValueError that says what there is; it was a bare KeyError."""
    with pytest.raises(ValueError, match="float32"):
        choose_compute_dtype(name, CPU, 64)


@pytest.mark.parametrize(
    ("bf16_seconds", "expected"), [(0.5, torch.bfloat16), (0.79, torch.bfloat16), (0.9, torch.float32)]
)
def test_auto_measures(bf16_seconds: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 only where a product of this model's size takes less than 80 % of fp32's time; the clock is ours."""
    clock = {"now": 0.0, "products": 0}
    matmul = Tensor.__matmul__

    def timed_matmul(x: Tensor, weight: Tensor) -> Tensor:
        assert x.shape == (512, 96) and weight.shape == (96, 384) and x.dtype == weight.dtype
        clock["now"] += 1.0 if x.dtype == torch.float32 else bf16_seconds
        clock["products"] += 1
        return matmul(x, weight)

    monkeypatch.setattr(Tensor, "__matmul__", timed_matmul)
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock["now"])
    assert choose_compute_dtype("auto", CPU, 96) is expected
    assert clock["products"] >= 6


def test_auto_on_this_machine() -> None:
    assert choose_compute_dtype("auto", best_device(), 64) in (torch.float32, torch.bfloat16)


def test_memory_of_this_process() -> None:
    """Peak counts what was touched, in GiB; 64 MiB written raise it by as much, if they are the peak."""
    psutil = pytest.importorskip("psutil")
    assert 0 < available_memory(CPU) <= psutil.virtual_memory().total
    resident = psutil.Process().memory_info().rss / GIB
    assert 0.9 * resident < peak_memory_gib(CPU) < psutil.virtual_memory().total / GIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_is_of_this_process_alone() -> None:
    """A child's ru_maxrss starts at the peak of the process that started it; that is not the run's."""
    script = """if True:
        import re, torch
        from qlora.device import GIB, peak_memory_gib
        status = open("/proc/self/status").read()
        print(peak_memory_gib(torch.device("cpu")), 1024 * int(re.search("VmHWM:(.*) kB", status)[1]) / GIB)
    """
    ballast = torch.zeros(2**28)  # 1 GiB: this process is larger than the child will ever be
    ballast.fill_(1.0)
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    reported, actual = map(float, result.stdout.split())
    assert ballast.nbytes / GIB == 1 > actual > 0
    assert reported == pytest.approx(actual, rel=0.05)


def test_dense_model_needs_no_quant_state() -> None:
    """A plain module with a config plans too: nothing is assumed about 4 bits."""
    model = nn.Linear(8, 8)
    model.config = tiny_llama_config()  # type: ignore[assignment]
    plan = plan_memory(model, 10, torch.float32, checkpointing=True)
    assert plan.base == 0 and plan.adapters == model.weight.nbytes + model.bias.nbytes
