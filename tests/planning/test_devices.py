"""Plans of many devices against what torch's FSDP2 does with a fake process group, and against numbers by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.roofline import useful_flops
from qlora.cli.main import main
from qlora.config.data import DataConfig
from qlora.config.devices import DevicesConfig
from qlora.config.loop import LoopConfig
from qlora.config.lora import LoRAConfig
from qlora.config.model import ModelConfig
from qlora.config.parallel import ParallelConfig
from qlora.config.run import RunConfig
from qlora.data.batches import collate_packed
from qlora.data.example import Example
from qlora.lora.adapter import inject_lora
from qlora.lora.trainable import base_parameters, freeze_base
from qlora.model.base import base_info
from qlora.model.load import load_base_model
from qlora.model.loss import causal_lm_loss
from qlora.parallel.fsdp import load_sharded_model
from qlora.parallel.launch import arrange_ranks
from qlora.parallel.load import load_for_ranks
from qlora.parallel.tensor_parallel import WeightCut, split_model
from qlora.planning.devices import Census, DeviceLayout, Unit, add_communication, gathered_peak
from qlora.planning.memory import MemoryPlan, layer_bytes
from qlora.planning.planner import Planner
from qlora.planning.step import Traffic, measure_flops, step_time
from qlora.quant.parts import local
from qlora.system.errors import InputError
from qlora.system.memory import GIB
from qlora.system.ranks import Ranks
from qlora.training.recompute import choose_recomputed_layers
from tests.models import save_tiny_llama, tiny_llama_config
from tests.tiny import tiny_tokenizer

LENGTH = 32


@contextmanager
def fake_ranks(size: int) -> Iterator[Any]:
    """This process as the first of many that are not there: what they would send is not sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield dist.init_device_mesh("cpu", (size,))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny"), tokenizer=tiny_tokenizer()))


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config alone: heads and widths that divide by 2 and 4."""
    config = tiny_llama_config(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4
    )
    path = tmp_path_factory.mktemp("even")
    config.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def even_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Such a model with its weights."""
    widths = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4)
    return str(save_tiny_llama(tmp_path_factory.mktemp("even_model"), **widths))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """Of a model with layers enough that the base, and not what is gathered of it, is most of the memory."""
    config = tiny_llama_config(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=16
    )
    path = tmp_path_factory.mktemp("deep")
    config.save_pretrained(path)
    return Planner(str(path), "cuda", 1000)


def run_config(
    name: str, parallel: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **lora: Any
) -> RunConfig:
    return RunConfig(
        ModelConfig(name, compute_dtype="float32"),
        LoRAConfig(**lora),
        DataConfig(max_length=LENGTH),
        LoopConfig(**{"batch_size": 1, "gradient_checkpointing": "off", **(train or {})}),
        parallel=ParallelConfig(**(parallel or {})),
    )


# ---- sharded ----------------------------------------------------------------------------------------------


class Gathers(TorchDispatchMode):
    """Bytes of every all-gather."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in str(func):
            self.sizes.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize(("size", "is_tied", "layers"), [(3, True, "1"), (1024, False, "")])
def test_a_sharded_base_is_what_torch_shards(
    tmp_path: Path, size: int, is_tied: bool, layers: str, mode: str
) -> None:
    """Bytes that the first rank holds, and number and bytes of what it gathers in a pass forward and back.

    3 divides nothing in the model; of 1,024 ranks most hold nothing of a norm. With an adapter in the upper layer
    alone the lower one is gathered forward only: nothing is fetched where the backward pass ends.
    """
    name = str(save_tiny_llama(tmp_path, tokenizer=tiny_tokenizer(), tie_word_embeddings=is_tied))
    with fake_ranks(size) as mesh:
        model = load_sharded_model(name, Ranks(0, size, shard_mesh=mesh), compute_dtype="float32", cache=False)
        inject_lora(model, LoRAConfig(layers=layers))
        freeze_base(model)
        choose_recomputed_layers(model, mode, LENGTH, 1, say=lambda line: None)
        held = sum(local(p).numel() * p.itemsize for p in base_parameters(model))
        tokens = torch.arange(LENGTH)
        with Gathers() as seen:
            for _ in range(2):
                causal_lm_loss(model.train(), collate_packed([Example(tokens, tokens)]))[0].backward()
    train = {"grad_accum": 2, "gradient_checkpointing": mode}
    plan = Planner(name, "cpu").plan(
        run_config(name, {"shard": "fsdp"}, train, layers=layers), DevicesConfig(gpus=size)
    )
    assert plan.memory.base == held
    gathers = next(t for t in plan.traffic if t.kind == "gathers")
    assert gathers.calls == len(seen.sizes) > 12
    assert gathers.inside == -(-sum(seen.sizes) * (size - 1) // size)


class Block(nn.Module):
    """Frozen bytes beside a number that trains."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(size, 32, dtype=torch.uint8), requires_grad=False)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


@pytest.mark.parametrize("sizes", [(40000, 40000, 40000), (90000, 30000, 10000), (10000, 30000, 90000)])
def test_gathered_units_as_torch_counts_them(sizes: tuple[int, ...]) -> None:
    """Its tracker's peak, of shares and of what is gathered: units of equal, falling and rising size."""
    with fake_ranks(4) as mesh:
        blocks = nn.Sequential(*map(Block, sizes))
        gains = {block.gain for block in blocks}
        for block in blocks:
            fully_shard(block, mesh=mesh, ignored_params=gains)
        fully_shard(blocks, mesh=mesh, ignored_params=gains)
        tracker = FSDPMemTracker(blocks)
        with tracker:
            blocks(torch.ones(4)).sum().backward()
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    units = [Unit("block", ((size, 32),)) for size in sizes]
    shares = sum(unit.share(4) for unit in units)
    assert peak - shares == pytest.approx(gathered_peak(units, DeviceLayout(4, base_ranks=4)), rel=0.001)


def test_shares_written_out() -> None:
    """5 rows of 2 bytes and 7 of 1 over 3 ranks: 2 and 3 rows each; nothing is less than a row."""
    unit = Unit("block", ((5, 2), (7, 1)))
    assert [unit.share(n) for n in (1, 3, 7, 1000)] == [17, 7, 3, 3]
    assert unit.gathered(3) == 21 and unit.gathered(1000) == 3000
    layout = DeviceLayout(3, base_ranks=3, cpu_offload=True)
    assert gathered_peak([unit], layout) == 2 * 21 + 7  # received, copied out, and its own share on the device
    assert gathered_peak([unit, Unit("block", ((3, 1),))], layout) == 2 * 21 + 7


def test_gathered_beside_the_logits() -> None:
    """The head, or tied embeddings, come on top of them; blocks, and what is on its way, take their place."""
    nothing = MemoryPlan(base=0, adapters=0, gradients=0, optimizer=0, activations=0, logits=0, workspace=10)
    embeddings, block, head = Unit("embeddings", ((20, 1),)), Unit("block", ((30, 1),)), Unit("head", ((24, 1),))

    def communication(logits: int, *units: Unit) -> int:
        census = Census(1, 0, units, trained=0, replaced=0, tensor_base=0, token_bytes=0)
        [plan] = add_communication([replace(nothing, logits=logits)], census, DeviceLayout(2, base_ranks=2), 1)
        return plan.communication

    assert communication(0, embeddings, block, head) == 20 + 2 * 30
    assert communication(50, embeddings, block, head) == 20 + 2 * 30 - 50
    assert communication(70, embeddings, block, head) == 24
    assert communication(70, embeddings, block, Unit("head", ())) == 20


def test_more_ranks_hold_less(tiny: str) -> None:
    """Each less than before, all of them together the base and its padding; only the base is divided."""
    planner, config = Planner(tiny, "cuda"), run_config(tiny, {"shard": "fsdp"})
    whole = planner.plan(run_config(tiny)).memory
    before = whole.base
    for size in (2, 3, 4, 8, 64, 512):
        memory = planner.plan(config, DevicesConfig(gpus=size)).memory
        assert memory.base < before and memory.base * size >= whole.base
        assert vars(memory) == {**vars(whole), "base": memory.base, "communication": memory.communication}
        before = memory.base


def test_hsdp_stays_in_its_node(tiny: str) -> None:
    """A rank holds what it would among its node's alone, and only gradients leave the node."""
    planner = Planner(tiny, "cuda")
    node = planner.plan(run_config(tiny, {"shard": "fsdp"}), DevicesConfig(gpus=4))
    hsdp = planner.plan(run_config(tiny, {"shard": "hsdp"}), DevicesConfig(gpus=32, nodes=8))
    assert hsdp.memory == node.memory and (hsdp.layout.base_ranks, hsdp.layout.node_ranks) == (4, 4)
    gradients, gathers = hsdp.traffic
    assert gathers.between == 0 and gradients.between == gradients.inside > 0
    assert gathers.inside == node.traffic[1].inside and gathers.calls == node.traffic[1].calls
    sized = planner.plan(run_config(tiny, {"shard": "hsdp", "shard_size": 8}), DevicesConfig(gpus=32, nodes=8))
    assert sized.layout.base_ranks == 8 and sized.traffic[1].between == sized.traffic[1].inside


def test_shares_in_main_memory(tiny: str) -> None:
    """Of the base nothing rests on the device; every gathering copies a share there."""
    planner = Planner(tiny, "cuda")
    plain, config = run_config(tiny, {"shard": "fsdp"}), run_config(tiny, {"shard": "fsdp", "cpu_offload": True})
    on_device, off = planner.plan(plain, DevicesConfig(gpus=4)), planner.plan(config, DevicesConfig(gpus=4))
    assert off.memory.base == 0 and off.main_memory == 4 * on_device.memory.base
    gathers, shares = off.traffic[1:]
    assert (shares.kind, shares.calls) == ("shares", gathers.calls) and shares.inside * 3 == gathers.inside


# ---- tensor parallel --------------------------------------------------------------------------------------


def test_a_part_of_each_layer_written_out(even: str) -> None:
    """Two layers of 4 x 256 x 256 and 3 x 256 x 512 in 4 bits: codes and scales by 4, scales of scales whole."""
    planner = Planner(even, "cuda")
    plan = planner.plan(run_config(even, {"tensor_parallel": 4}), DevicesConfig(gpus=8))
    weights = 4 * 256 * 256 + 3 * 256 * 512
    nested = 4 * (4 * 256 * 256 + 3 * 256 * 512) // 64 // 256
    norms, embeddings = 5 * 256 * 4, 2 * 300 * 256 * 2
    assert plan.memory.base == 2 * (weights // 2 // 4 + weights // 64 // 4 + nested) + norms + embeddings
    assert plan.layout.data_parallel == 2
    whole = planner.plan(run_config(even)).memory
    assert plan.memory.adapters == whole.adapters and plan.memory.optimizer == whole.optimizer


def test_activations_of_a_part_written_out() -> None:
    """By the formula of `activation_bytes`, 4 bytes each: Q, K and F by 2, and norms where they are divided."""
    config = tiny_llama_config(hidden_size=256, intermediate_size=512, num_key_value_heads=4)
    own = 256 + 2 * 256 + 2 * 512  # q, k, v, gate, up
    options: list[dict[str, Any]] = [
        {}, {"tensor_parallel": 2}, {"tensor_parallel": 2, "sequence_parallel": True}
    ]  # fmt: skip
    kept = [layer_bytes(config, torch.float32, fused=True, **chosen) for chosen in options]
    assert kept == [4 * (256 + 512 + own), 4 * (256 + 512 + own // 2), 4 * (256 + 256 + own // 2)]


def test_sums_of_a_part(even: str) -> None:
    """Two a layer forward, one more recomputed, two back but for the lowest, which wants no gradient below."""
    planner, devices = Planner(even, "cuda"), DevicesConfig(gpus=4)
    one = LENGTH * 256 * 4  # N D c
    for train, sums in (({}, 4 + 4 - 1), ({"gradient_checkpointing": "on"}, 4 + 2 + 4 - 1)):
        traffic = planner.plan(run_config(even, {"tensor_parallel": 2}, train), devices).traffic
        assert traffic[1] == Traffic("activations", sums, sums * one, 0)  # 2 (T - 1) / T is 1
    flags = {"tensor_parallel": 2, "sequence_parallel": True}
    divided = planner.plan(run_config(even, flags), devices).traffic[1]
    assert divided.calls == 15 + 1 and divided.inside == 16 * one // 2  # and the last output gathered
    upper = planner.plan(run_config(even, {"tensor_parallel": 2}, layers="1"), devices).traffic[1]
    assert upper.calls == 4 + 2 - 1
    accumulated = run_config(even, {"tensor_parallel": 2}, {"grad_accum": 3})
    assert planner.plan(accumulated, devices).traffic[1].inside == 3 * 7 * one


class Exchanges(TorchDispatchMode):
    """Bytes of every sum, gathering and scattered sum, the whole of it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("c10d."):
            whole = args[1] if "scatter" in str(func) else args[0]
            self.sizes.append(sum(part.nbytes for parts in whole for part in flattened(parts)))
        return func(*args, **(kwargs or {}))


def flattened(parts: Any) -> list[Tensor]:
    return [parts] if isinstance(parts, Tensor) else list(parts)


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("layers", ["", "1"])
@pytest.mark.parametrize("sequence", [False, True])
def test_exchanges_of_a_pass(tmp_path: Path, sequence: bool, layers: str, mode: str) -> None:
    """Number and bytes of what a split model's pass forward and back exchanges."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    name = str(save_tiny_llama(tmp_path, tokenizer=tiny_tokenizer(), **sizes))
    with fake_ranks(4) as mesh:
        cut = WeightCut(name, Ranks(0, 4, 4, mesh.get_group(), sequence_parallel=sequence))
        model = load_base_model(name, compute_dtype="float32", cut=cut)
        split_model(model, cut)
        inject_lora(model, LoRAConfig(layers=layers))
        freeze_base(model)
        choose_recomputed_layers(model, mode, LENGTH, say=lambda line: None)
        tokens = torch.arange(LENGTH)
        with Exchanges() as seen:
            causal_lm_loss(model.train(), collate_packed([Example(tokens, tokens)]))[0].backward()
    flags = {"tensor_parallel": 4, "sequence_parallel": sequence}
    config = run_config(name, flags, {"gradient_checkpointing": mode, "grad_accum": 1}, layers=layers)
    activations = Planner(name, "cpu").plan(config, DevicesConfig(gpus=4)).traffic[1]
    assert activations.calls == len(seen.sizes) > 4
    ring = 1 if sequence else 2  # a sum is a scattered sum and a gathering
    assert activations.inside == ring * sum(seen.sizes) * 3 // 4


# ---- a step -----------------------------------------------------------------------------------------------


def test_gradients_travel_in_every_mode(tiny: str) -> None:
    """4 bytes of each number that trains, 2 (W - 1) / W times, whatever is split and however often it is added."""
    planner = Planner(tiny, "cuda")
    for parallel in ({}, {"shard": "fsdp"}):
        for size in (2, 8, 1024):
            config = run_config(tiny, parallel, {"grad_accum": 5})
            plan = planner.plan(config, DevicesConfig(gpus=size))
            expected = Traffic("gradients", 1, -(-8 * plan.summary.trainable * (size - 1) // size), 0)
            assert plan.traffic[0] == expected
    assert planner.plan(run_config(tiny), DevicesConfig(gpus=1)).traffic == ()


def test_sums_take_the_place_of_activations(even: str) -> None:
    """One fp32 copy of the gradients, when the passes' memory is free again."""
    planner, devices = Planner(even, "cuda"), DevicesConfig(gpus=2)
    config = run_config(even, rank=256, target_modules="all-linear")
    plan = planner.plan(config, devices)
    passing = plan.memory.activations + plan.memory.logits + plan.memory.workspace
    assert plan.memory.communication == 4 * plan.summary.trainable - passing > 0
    assert planner.plan(run_config(even, rank=1), devices).memory.communication == 0


@pytest.mark.parametrize("rank", [1, 256])
@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"shard": "fsdp"},
        {"shard": "fsdp", "cpu_offload": True},
        {"shard": "hsdp", "shard_size": 2},
        {"tensor_parallel": 2},
        {"tensor_parallel": 4, "sequence_parallel": True},
    ],
    ids=str,
)
def test_a_run_plans_what_the_plan_says(even_model: str, parallel: dict[str, Any], rank: int) -> None:
    """Every component, of the model as a process loads it; with a rank of 256 the sum of gradients is the most."""
    config = run_config(even_model, parallel, {"optim": "adamw"}, rank=rank, target_modules="all-linear")
    planner, size, offload = Planner(even_model, "cuda"), 4, config.parallel.cpu_offload
    here: Any = SimpleNamespace(
        process_index=0, num_processes=size, device=torch.device("cpu"), main_process_first=nullcontext
    )
    with fake_ranks(size):
        ranks = arrange_ranks(replace(config.parallel, cpu_offload=False), here)
        model = load_for_ranks(even_model, ranks, here, compute_dtype="float32", cache=False, check=False)
        inject_lora(model, config.lora)
        freeze_base(model)
        ranks = replace(ranks, cpu_offload=offload)  # without a GPU FSDP2 refuses to do it
        model.base_info = replace(base_info(model), ranks=ranks)
        for mode in ("off", "on"):
            loop = replace(config.loop, gradient_checkpointing=mode)
            plan = planner.plan(replace(config, loop=loop), DevicesConfig(gpus=size))
            _, found = choose_recomputed_layers(model, mode, plan.num_tokens, 1, here, lambda line: None)
            assert found == plan.memory
            passing = found.activations + found.logits + found.workspace
            summing = 4 * plan.summary.trainable - passing
            assert (found.communication == summing) == (rank == 256) == (summing > 0)


def test_operations_of_a_step(tiny: str) -> None:
    """The benchmarks' count, which torch's confirms, and what it leaves out: adapters, scores computed again."""
    planner, devices = Planner(tiny, "cuda"), DevicesConfig(gpus=1)
    tokens = torch.zeros(LENGTH, dtype=torch.int64)
    for mode, times in (("off", 0), ("on", 1)):
        config = run_config(tiny, train={"gradient_checkpointing": mode, "grad_accum": 3}, rank=4)
        plan = planner.plan(config, devices)
        scores = 2 * 64 * LENGTH  # layers, heads x head_dim
        more = (6 + 2 * times) * plan.summary.trainable + (1 + 2 * times) * scores
        base = useful_flops(planner._base(config.model), [Example(tokens, tokens)] * 3, times)
        assert plan.flops == base + more * 3 * LENGTH


def test_bounds_of_a_step() -> None:
    """What is gathered may hide behind computing, or the other way round; sums wait."""
    traffic = [Traffic("gradients", 1, 60, 300), Traffic("gathers", 9, 40, 0, hidden=True)]
    timed = step_time(1000, traffic, 100.0, 10.0, 20.0)
    assert timed.sending == {"gradients": 15.0, "gathers": 4.0}
    assert (timed.computing, timed.least, timed.most) == (10.0, 25.0, 29.0)
    assert step_time(100, traffic, 100.0, 10.0, 20.0).least == 4.0 + 15.0
    assert step_time(1000, traffic, 100.0).least is None and step_time(1000, traffic).computing is None
    assert step_time(1000, [], 100.0).least == step_time(1000, [], 100.0).most == 10.0


def test_a_measured_rate() -> None:
    assert measure_flops(torch.float32, 64, 64) > 1e7  # any machine's


# ---- golden values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "gib"),
    [
        (("llama-7b", "--gpus", "2", "--shard", "fsdp"), {"base": 1.80, "communication": 0.44, "total": 5.34}),
        (("llama-7b", "--gpus", "8", "--tensor-parallel", "4"), {"base": 1.27, "total": 4.54}),
        (("llama-7b", "--gpus", "1024", "--nodes", "128", "--shard", "hsdp"), {"base": 0.45, "adapters": 0.30}),
    ],
)
def test_llama(flags: tuple[str, ...], gib: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    """As docs/memory.md and the commands there have it."""
    recipe, *others = flags
    settings = ("--config", f"configs/{recipe}.yaml", "--model", f"configs/shapes/{recipe}", "--batch-size", "1")
    main(["plan", *settings, "--device", "cuda", *others])
    out = capsys.readouterr().out
    for name, size in gib.items():
        found = re.search(rf"^{name} +([\d.]+) GiB", out, re.MULTILINE)
        assert found is not None and float(found[1]) == size, (name, out)


# ---- what makes it fit ------------------------------------------------------------------------------------


def flags_that_help(planner: Planner, memory: int, config: RunConfig, devices: DevicesConfig | None) -> list[str]:
    """Each change alone, with devices of so many bytes."""
    planner.device_memory = memory
    return [remedy.flags for remedy in planner.remedies(config, devices)[0]]


def test_remedies_of_many(deep: Planner) -> None:
    """Splitting the base is named first; then the least number of devices that fits."""
    devices, recomputing = DevicesConfig(gpus=4), {"gradient_checkpointing": "on"}
    split = run_config(deep.name, {"shard": "fsdp"}, recomputing, rank=1)
    config = run_config(deep.name, train=recomputing, rank=1)
    needed = {number: deep.plan(split, DevicesConfig(gpus=number)).total for number in (4, 5, 6)}
    assert needed[4] > needed[5] > needed[6]
    deep.device_memory = needed[4]
    alone, together = deep.remedies(config, devices)
    flags = [remedy.flags for remedy in alone]
    assert flags[0] == "--shard fsdp" and "--shard fsdp --cpu-offload" in flags
    assert {"--tensor-parallel 2", "--tensor-parallel 4"} & set(flags)
    assert together is not None and together.flags == "--shard fsdp" and together.plan.total == needed[4]
    assert "--gpus 6" in flags_that_help(deep, needed[6], split, devices)
    over_nodes = flags_that_help(deep, 1000, config, DevicesConfig(gpus=4, nodes=2))
    assert over_nodes[0] == "--shard fsdp" and "--gpus 1024 --nodes 512 --shard fsdp" in over_nodes


def test_one_device_is_asked_nothing_more(deep: Planner) -> None:
    """Without --gpus no remedy speaks of more; with it, of the split over more, where a run can have one."""
    one = flags_that_help(deep, 1000, run_config(deep.name), None)
    assert one and not [flags for flags in one if "--gpus" in flags or "--shard" in flags]
    more = flags_that_help(deep, 1000, run_config(deep.name), DevicesConfig(gpus=1))
    assert "--gpus 1024 --nodes 128 --shard fsdp" in more
    biased = flags_that_help(deep, 1000, run_config(deep.name, bias="all"), DevicesConfig(gpus=4))
    assert biased and not [flags for flags in biased if "--shard" in flags or "--tensor-parallel" in flags]


# ---- the command ------------------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    main(["plan", *flags])
    return capsys.readouterr().out


def test_the_command(even: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", even, "--device", "cuda", "--gpus", "16", "--nodes", "2", "--compute-dtype", "bfloat16")
    rates = ("--flops", "1e12", "--link-rate", "1GB", "--node-link-rate", "100MB")
    out = printed(capsys, *flags, "--shard", "fsdp", "--cpu-offload", "--gpu-memory", "24GiB", *rates)
    assert "16 devices on 2 nodes of 8: the base split over 16, its shares in main memory\n\n" in out
    sizes = [float(number) for number in re.findall(r"^\w+ {2,}([\d.]+) GiB", out.partition("sent")[0], re.M)]
    assert len(sizes) == 9 and sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=0.05)
    assert "of main memory per node for the base" in out and re.search(r"^fits in 24.00 GiB", out, re.M)
    assert re.search(r"^gradients +0\.\d\d GiB .*GiB between nodes; ", out, re.M)
    assert re.search(r"^a step takes .* s \(gathers overlap computing\) to .* s \(no overlap\)", out, re.M)
    hsdp = printed(capsys, *flags, "--shard", "hsdp", *rates)
    assert re.search(r"^gathers .*none between nodes", hsdp, re.M) and "split over 8, 2 times" in hsdp
    together = printed(capsys, *flags, "--tensor-parallel", "4", "--sequence-parallel")
    assert "4 compute each layer together, norms by tokens; 4 micro-batches at a time\n" in together
    assert "pass --flops for the time" in together
    assert "pass --link-rate for the step time" in printed(capsys, *flags, "--flops", "1e12")
    for text in (out, hsdp, together):
        assert max(len(line.rstrip()) for line in text.splitlines()) <= 115


def test_the_command_on_processors(even: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The rate is measured; processes on one machine share it and the memory."""
    flags = ("--model", even, "--device", "cpu", "--compute-dtype", "float32", "--max-length", "128")
    out = printed(capsys, *flags, "--gpus", "2", "--link-rate", "1GB")
    assert "measured with a matrix product here, shared by processes" in out
    assert re.search(r"^fits in [\d.]+ GiB", out, re.M) and re.search(r"^a step takes .* tokens/s$", out, re.M)
    one = printed(capsys, *flags, "--gpus", "1")
    assert "communication" not in one and "sent by" not in one and "a step takes" in one
    half, whole = (float(re.findall(r"^fits ([\d.]+) GiB", text, re.M)[0]) for text in (out, one))
    assert half == pytest.approx(whole / 2, rel=0.2)
    assert GIB * half > 0 and "device" not in printed(capsys, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpus 0", "give --gpus a number from 1 to 16,384"),
        ("--gpus 20000", "gpus is 20000; give --gpus a number from 1 to 16,384"),
        ("--gpus 8 --nodes 0", "give --nodes 1 or more"),
        ("--gpus 8 --nodes 3", "--gpus 8 is not a multiple of --nodes 3"),
        ("--shard fsdp", "--shard fsdp splits the base over several devices; pass their number with --gpus"),
        ("--gpus 1 --tensor-parallel 2", "--tensor-parallel 2 splits the base over several devices"),
        ("--gpus 6 --tensor-parallel 4", "--tensor-parallel 4 does not divide --gpus 6"),
        (
            "--gpus 6 --tensor-parallel 3",
            r"--tensor-parallel 3: the model \S+ has 4 heads; .*Its layers divide into 2 or 4; or use --shard",
        ),
        ("--gpus 4 --tensor-parallel 2 --shard fsdp", "are not combined; choose one"),
        ("--gpus 12 --nodes 2 --tensor-parallel 4", "--tensor-parallel 4 does not fit nodes of 6 devices"),
        ("--gpus 8 --shard hsdp", "--shard hsdp splits the base within a node; pass --nodes or --shard-size"),
        ("--gpus 8 --shard hsdp --shard-size 3", "cannot split the base over groups of 3 of 8"),
        ("--gpus 8 --nodes 8 --shard hsdp", "cannot split the base over groups of 1 of 8"),
        (
            "--gpus 12 --nodes 2 --shard hsdp --shard-size 4",
            "--shard-size 4 does not fit nodes of 6 devices",
        ),
        ("--gpus 8 --shard fsdp --shard-size 4", "without hsdp"),
        ("--gpus 8 --cpu-offload", "--cpu-offload is for a base that is split"),
        ("--gpus 8 --shard fsdp --cpu-offload --device cpu", "leave it out with --device cpu"),
        ("--gpus 8 --shard fsdp --bias all", "--bias all needs the whole base on every device"),
        ("--gpus 8 --sequence-parallel", "--sequence-parallel goes with tensor parallel"),
        ("--gpus 8 --flops 0", "give --flops operations a second"),
        ("--gpus 8 --flops nan", "give --flops operations a second"),
        ("--gpus 8 --link-rate 25", "link_rate is '25'; give --link-rate bytes a second, as 25GB"),
        ("--gpus 8 --node-link-rate 25GB", "pass --link-rate with it"),
        ("--gpus 8 --gpu-memory 24", "give --device-memory a size such as 24GiB"),
    ],
)
def test_bad_input(even: str, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one sentence, or in the frame that the command line puts around what a single group of flags refuses."""
    with pytest.raises((InputError, SystemExit)) as caught:
        main(["plan", "--model", even, "--device", "cuda", *flags.split()])
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
    text = " ".join(re.sub("[│╭╰─╮╯]", " ", f"{caught.value} {capsys.readouterr().err}").split())
    assert re.search(message, text), text


def test_other_blocks_are_not_computed_together(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=300).save_pretrained(tmp_path)
    flags = ("--gpus", "2", "--tensor-parallel", "2", "--target-modules", "c_attn")
    with pytest.raises(InputError, match="of the kind gpt2; tensor parallel is for llama, mistral, qwen2, qwen3"):
        main(["plan", "--model", str(tmp_path), "--device", "cuda", *flags])
