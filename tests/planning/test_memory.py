"""The arithmetic against what autograd keeps and what the tensors weigh."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora.config.loop import LoopConfig
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import inject_lora, lora_layers
from qlora.lora.optimizer import build_optimizer
from qlora.lora.trainable import freeze_base
from qlora.model.attention import packed_arguments
from qlora.model.base import base_info
from qlora.model.block import decoder_layers, is_fused
from qlora.model.load import load_base_model
from qlora.planning.memory import (
    MemoryPlan,
    activation_bytes,
    adapter_bytes,
    choose_recomputed,
    differentiated_layers,
    layer_bytes,
)
from qlora.system import device
from qlora.system.device import best_device, choose_compute_dtype
from qlora.system.errors import InputError
from qlora.system.memory import GIB, available_memory, peak_memory_gib
from qlora.training.recompute import choose_recomputed_layers
from tests.models import save_tiny_llama, tiny_llama_config
from tests.shortcuts import plan_memory

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[2]
NUM_TOKENS = 96


def kept_by_layer(model: Any, num_tokens: int) -> list[int]:
    """Bytes of the storages that autograd keeps for each decoder layer's backward pass, each counted once.

    Parameters and buffers are not activations; one packed sequence of `num_tokens`, as training computes it.
    """
    counted = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    counted |= {p.quant_state.code.data_ptr() for p in model.parameters() if hasattr(p, "quant_state")}
    layers = decoder_layers(model)
    kept, alive = [0] * len(layers), []
    current: int | None = None

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if current is not None and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            alive.append(tensor)  # or its address might be given to another
            kept[current] += storage.nbytes()
        return tensor

    def enter(number: int | None) -> Any:
        def hook(*_: Any) -> None:
            nonlocal current
            current = number

        return hook

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(enter(number))
        layer.register_forward_hook(enter(None))
    ids = torch.arange(num_tokens)[None] % model.config.vocab_size
    bounds = torch.tensor([0, num_tokens], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.base_model(ids, use_cache=False, **packed_arguments(bounds, num_tokens))
    assert output.last_hidden_state.requires_grad
    return kept


def adapted_model(
    directory: Path, layers: int, dtype: str, targets: str = "q_proj,v_proj", numbers: str = "", **settings: Any
) -> Any:
    model = load_base_model(
        str(save_tiny_llama(directory / f"llama-{layers}-{dtype}", num_hidden_layers=layers, **settings)),
        compute_dtype=dtype,
        cache=False,
    )
    inject_lora(model, LoRAConfig(rank=1, target_modules=targets, layers=numbers))
    freeze_base(model)
    return model.train()


# ---- activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear", "up_proj"])
def test_a_layer_against_autograd(
    tmp_path: Path, dtype: str, heads: tuple[int, int], targets: str, fused: bool
) -> None:
    """A layer's plan is what autograd keeps, within 3 % (the h of adapted layers, a number a row of the norms)."""
    settings = dict(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    model, num_tokens = adapted_model(tmp_path, 3, dtype, targets, **settings), 256  # fewer: attention in fp32
    num_adapters = len(lora_layers(model)) // 3
    for layer in decoder_layers(model):
        if not fused:
            layer.__class__ = type(layer).__mro__[1]  # transformers' own
    assert is_fused(decoder_layers(model)[1]) == fused
    adapted = {name.rpartition(".")[2] for name in lora_layers(model)}
    planned = num_tokens * layer_bytes(model.config, getattr(torch, dtype), adapted, fused)
    assert (
        adapter_bytes(model, getattr(torch, dtype)) == 3 * num_adapters * base_info(model).compute_dtype.itemsize
    )
    measured = kept_by_layer(model, num_tokens)
    assert measured[2] > measured[0] > 0  # below the first adapter the input needs no gradient
    assert 0.97 < planned / measured[2] < 1.01


def test_layers_below_the_first_adapted_one_keep_nothing(tmp_path: Path) -> None:
    """Neither a tensor nor a gradient: not in memory, not in time, not in the plan."""
    model = adapted_model(tmp_path, 5, "float32", numbers="2-3")
    layers = decoder_layers(model)
    reached: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda _m, _a, y, n=number: reached.append(n) if y.requires_grad else None)
    kept = kept_by_layer(model, NUM_TOKENS)
    assert kept[:2] == [0, 0] and min(kept[2:]) > 0
    assert reached == [2, 3, 4]
    assert differentiated_layers(model) == layers[2:]
    plan = plan_memory(model, NUM_TOKENS, torch.float32).activations
    layer = layer_bytes(model.config, torch.float32, fused=is_fused(layers[0]))
    # Of the 3 layers 2 have adapters: q's and v's h, rank 1 in fp32; the mean is rounded up.
    assert plan == 3 * NUM_TOKENS * (layer + -(-2 * 2 * 4 // 3))


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        (dict(rank=32), 0.05),
        (dict(rank=1, dropout=0.1), 0.05),
        (dict(rank=1, use_dora=True), 0.2),
        (dict(rank=16, dropout=0.1, use_dora=True), 0.3),
    ],
)
def test_what_an_adapter_keeps_against_autograd(tmp_path: Path, settings: dict[str, Any], share: float) -> None:
    """h, dropout's masks and DoRA's z, which are a good part of a small layer; they were left out."""
    path = save_tiny_llama(tmp_path / "llama", num_hidden_layers=3)
    model = load_base_model(str(path), compute_dtype="bfloat16", cache=False)
    inject_lora(model, LoRAConfig(target_modules="all-linear", **settings))
    freeze_base(model)
    measured = kept_by_layer(model.train(), 256)[2]
    adapters = 256 * adapter_bytes(model, torch.bfloat16) / 3
    assert adapters > share * measured
    assert 0.97 < plan_memory(model, 256, torch.bfloat16).activations / 3 / measured < 1.01


def test_trained_embeddings_differentiate_every_layer(tmp_path: Path) -> None:
    model = adapted_model(tmp_path, 3, "float32", numbers="2")
    assert len(differentiated_layers(model)) == 1
    model.get_input_embeddings().weight.requires_grad_(True)
    assert len(differentiated_layers(model)) == 3


@pytest.mark.parametrize("recomputed", range(5))
def test_recomputed_layers_keep_their_input(tmp_path: Path, recomputed: int) -> None:
    """What autograd keeps with the lowest layers recomputed is the plan, less the layer held in full at a time."""
    model = adapted_model(tmp_path, 5, "float32", numbers="1-4")
    totals = [plan_memory(model, NUM_TOKENS, torch.float32, number).total for number in range(5)]
    share, _ = choose_recomputed_layers(model, "auto", NUM_TOKENS, totals[recomputed], say=lambda line: None)
    number = round(5 * share)
    kept = kept_by_layer(model, NUM_TOKENS)
    layer_input = NUM_TOKENS * 4 * model.config.hidden_size
    if recomputed == 4:  # all: the layer held while it is recomputed takes more than the one that could be kept
        assert number == 3
    else:
        assert number == recomputed
    assert kept[0] == 0 and kept[1 : 1 + number] == [layer_input] * number
    planned = plan_memory(model, NUM_TOKENS, torch.float32, number).activations
    assert 0.9 < planned / sum(kept) < 1.05  # the lowest adapted layer keeps less than the others


def test_activations_are_proportional_to_tokens() -> None:
    for recomputed in range(4):
        one = activation_bytes(100, 7, 1, num_layers=3, recomputed=recomputed)
        assert one == {0: 300, 1: 207, 2: 114, 3: 121}[recomputed]  # the last: 3 inputs, and one layer at a time
        assert activation_bytes(100, 7, 1000, 3, recomputed) == 1000 * one


def test_layers_of_llama_7b() -> None:
    """D 4096, F 11008, bf16, by hand: 8 D + 2 (D + 4 D + 3 F), and fused 2 (2 D + D + 3 D + 2 F)."""
    config = SimpleNamespace(model_type="llama", hidden_size=4096, num_attention_heads=32, intermediate_size=11008)
    assert layer_bytes(config, torch.bfloat16) == 8 * 4096 + 2 * (5 * 4096 + 3 * 11008)
    assert layer_bytes(config, torch.bfloat16, fused=True) == 2 * (6 * 4096 + 2 * 11008)


@pytest.mark.parametrize(
    ("mode", "limit", "expected"),
    [
        ("on", 99, 3),
        ("off", 0, 0),
        ("auto", 30, 0),
        ("auto", 29, 1),
        ("auto", 20, 1),
        ("auto", 10, 2),
        ("auto", 9, 3),
    ],
)
def test_as_few_layers_as_needed(mode: str, limit: int, expected: int) -> None:
    """Three layers; with all of them recomputed the plan is a little above that with two."""
    assert choose_recomputed(mode, [30, 20, 10, 11], limit) == expected


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 * 2**30), ("3.5GB", 3_500_000_000), ("800 MiB", 800 * 2**20), ("0.5TB", 5 * 10**11)],
)
def test_a_budget_is_read_in_bytes(text: str, size: int) -> None:
    assert LoopConfig(memory_budget=text).memory_budget_bytes == size


@pytest.mark.parametrize("text", ["", "4", "4G", "0GiB", "-1GiB", "1e3GB", "GiB", "lots", "4GiB or so"])
def test_a_budget_that_is_no_size_is_named(text: str) -> None:
    with pytest.raises(InputError, match=f"memory_budget is '{text}'; give --memory-budget a size such as 4GiB"):
        LoopConfig(memory_budget=text)


# ---- the whole plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("use_4bit", [True, False])
def test_plan_against_the_tensors(tmp_path: Path, use_4bit: bool, adapter_dtype: str) -> None:
    """Base, adapters, gradients and optimizer state are the bytes that those tensors have after a step."""
    path = save_tiny_llama(tmp_path / "llama")
    model = load_base_model(str(path), use_4bit, compute_dtype="float32", cache=False)
    inject_lora(model, LoRAConfig(adapter_dtype=adapter_dtype))  # type: ignore[arg-type]
    freeze_base(model)
    plan = plan_memory(model, NUM_TOKENS, torch.float32)
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
    plan = MemoryPlan(base=GIB, adapters=2 * GIB, gradients=3, optimizer=4, activations=5, logits=6, workspace=7)
    assert plan.total == 3 * GIB + 25
    assert str(plan).startswith("3.00 GiB planned (base 1.00, adapters 2.00, gradients 0.00")


def test_logits_are_one_chunk(tmp_path: Path) -> None:
    """Never (N, V): the chunk bounds them however long the batch is. The head is bf16, and copied for fp32."""
    model = adapted_model(tmp_path, 2, "float32")
    size = model.config.vocab_size
    for dtype, copied in ((torch.float32, 4 * size * model.config.hidden_size), (torch.bfloat16, 0)):
        plans = [plan_memory(model, n, dtype, chunk_size=64).logits - copied for n in (32, 64, 6400)]
        assert plans[0] == plans[1] / 2 and plans[1] == plans[2] == 64 * size * (4 + dtype.itemsize)


def test_workspace_is_one_layer_and_one_weight(tmp_path: Path) -> None:
    """However many layers there are; the largest weight is an MLP's, 64 x 160."""
    for layers in (2, 5):
        model = adapted_model(tmp_path, layers, "float32")
        for recomputed in (0, 1):
            plan = plan_memory(model, NUM_TOKENS, torch.float32, recomputed)
            one = plan_memory(model, NUM_TOKENS, torch.float32).activations / layers
            assert plan.workspace == one + 64 * 160 * 4


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
    ("bf16_seconds", "expected", "products"),
    [
        (0.5, torch.bfloat16, 14),
        (0.79, torch.bfloat16, 14),
        (0.9, torch.float32, 14),
        (1.9, torch.float32, 14),
        (2.1, torch.float32, 6),
    ],
)
def test_auto_measures(
    bf16_seconds: float, expected: torch.dtype, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 only where a product of this model's size takes less than 80 % of fp32's time; the clock is ours.

    Where it takes more than twice as long, that is known after two rounds and a first one.
    """
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
    assert clock["products"] == products


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
        from qlora.system.memory import GIB, peak_memory_gib
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does with freed memory")
def test_freed_tensors_go_back_at_once() -> None:
    """Fifty tensors of 4 MB are freed, with something that stays behind each; glibc would keep them all."""
    command = (
        "import sys, psutil, torch; from qlora.system.memory import return_large_frees\n"
        "torch.ones(7 * 2**20)  # glibc learns from it to take the next ones from the heap\n"
        "if sys.argv[1] == 'at once': return_large_frees()\n"
        "large = []; stay = []\n"
        "for _ in range(50): large.append(torch.ones(2**20)); stay.append(torch.ones(2000))\n"
        "before = psutil.Process().memory_info().rss; del large[:]\n"
        "print((before - psutil.Process().memory_info().rss) // 2**20)"
    )

    def freed(how: str) -> int:
        return int(
            subprocess.run(
                [sys.executable, "-c", command, how], cwd=REPOSITORY, capture_output=True, check=True
            ).stdout
        )

    assert freed("later") < 20 and freed("at once") > 180


def test_dense_model_needs_no_quant_state() -> None:
    """A plain module with a config plans too: nothing is assumed about 4 bits."""
    model = nn.Linear(8, 8)
    model.config = tiny_llama_config()  # type: ignore[assignment]
    plan = plan_memory(model, 10, torch.float32, recomputed=0)
    assert plan.base == 0 and plan.adapters == model.weight.nbytes + model.bias.nbytes
