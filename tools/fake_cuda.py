"""Training steps, evaluations, merges and decoding on CUDA tensors that do not exist (tools/fake_device.py).

    python -m tools.fake_cuda                      every case; exit code 1 if one breaks a rule
    python -m tools.fake_cuda --case llama,qwen3   those whose name contains one of these words
    python -m tools.fake_cuda --memory             peak memory of a step beside the plan, at full size

Rules: an optimizer step waits for the device at most MOST_SYNCS times; a mixture of experts once more per pass
through a layer, since the router's counts decide which experts run. Nothing is computed on the CPU, and no tensor
as large as a weight is upcast, but for a merge, which adds in fp32. A step of the LLaMA path launches no more
kernels than the composed one (transformers' blocks, layers and adapters one after another).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from qlora.config.lora import LoRAConfig
from qlora.data.batches import make_batches
from qlora.data.example import Example
from qlora.generation import fast_decoding
from qlora.lora.adalora_optimizer import build_adapter_optimizer
from qlora.lora.adapter import inject_lora, lora_layers
from qlora.lora.layer import LoRALinear
from qlora.lora.optimizer import MasterOptimizer
from qlora.lora.svd_start import initialize_adapter
from qlora.lora.trainable import freeze_base
from qlora.model import load
from qlora.planning.memory import MemoryPlan
from qlora.quant.library import Params4bit
from qlora.system.memory import GIB
from qlora.training.held_out import evaluate
from qlora.training.recompute import choose_recomputed_layers
from qlora.training.step import train_step
from tools.fake_device import CUDA, ROOT, Packed, Seen, fake_cuda, on_host

MOST_SYNCS = 2  # in an optimizer step
TOLERANCE = 0.1  # of a plan beside the peak
SHAPES = ("llama-7b", "llama-13b", "llama-33b", "llama-65b", "llama-3.1-8b")
SHAPE = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 1024, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
WEIGHT_SIZE = 128 * 1024  # the smallest matrix of SHAPE; activations of LENGTHS are smaller
LENGTHS = (17, 30, 9, 24)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "qwen3": {"model_type": "qwen3"},
    "mixture": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 512,
        "router_aux_loss_coef": 0.01, "output_router_logits": False, "decoder_sparse_step": 1,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run: a model and its settings."""

    model: str
    lora: dict[str, Any] = field(default_factory=dict)
    packing: bool = True
    recompute: bool = False
    use_4bit: bool = True
    optim: str = "paged_adamw_32bit"

    @property
    def name(self) -> str:
        words = [self.model, "packed" if self.packing else "padded"]
        words += ["recomputed"] * self.recompute + ["16-bit"] * (not self.use_4bit)
        words += [key.removeprefix("use_") for key, value in self.lora.items() if value]
        return " ".join([*words, self.optim])


def cases() -> Iterator[Case]:
    """Every model packed and padded, recomputed and not; every variant; 16 bits; every optimizer."""
    for model in MODELS:
        for packing in (True, False):
            for recompute in (False, True):
                yield Case(model, packing=packing, recompute=recompute)
    for lora in ({"use_dora": True}, {"use_adalora": True}, {"new_tokens": ["<a>", "<b>"]}, {"dropout": 0.1}):
        yield Case("llama", lora)
    yield Case("llama", use_4bit=False)
    yield Case("llama", optim="paged_adamw_8bit")
    yield Case("llama", optim="adamw")


# ---- a model and its rows ----------------------------------------------------------------------------------


def write_config(folder: Path, model: str) -> Path:
    """A directory with a config.json of SHAPE."""
    directory = folder / model
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**SHAPE, **MODELS[model]}))
    return directory


def on_cuda(tensor: Tensor) -> Tensor:
    """A fake CUDA tensor like one on the meta device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


def fake_base(model: str, use_4bit: bool = True) -> Any:
    """The model of `load_base_model(device="cuda")` without weights; within `fake_cuda`."""
    network = on_host(load.plan_base_model)(model, use_4bit, compute_dtype="bfloat16", device="cuda")
    done: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                made = done[id(parameter)] = done.get(id(parameter)) or _fake_parameter(parameter)
                module._parameters[name] = made
                if isinstance(made, Packed):
                    made.module = module
                    module.quant_state = made.quant_state
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(CUDA)
    return network


def _fake_parameter(parameter: nn.Parameter) -> Any:
    made: Any = nn.Parameter(on_cuda(parameter), requires_grad=False)
    if isinstance(parameter, Params4bit):
        state = parameter.quant_state
        for owner in (state, state.state2) if state.nested else (state,):
            for name, value in vars(owner).items():
                if isinstance(value, Tensor):
                    setattr(owner, name, on_cuda(value))
        made.__class__ = Packed
        made.quant_state, made.quant_type, made.blocksize = state, state.quant_type, state.blocksize
    return made


@on_host
def rows(lengths: Sequence[int]) -> list[Example]:
    """Examples of these lengths; half of each is a prompt."""
    found = []
    for length in lengths:
        ids = torch.arange(length) % 97
        targets = torch.where(torch.arange(length) < length // 2, -100, ids)
        found.append(Example(ids, targets))
    return found


class NewTokens:
    """What the project asks of a tokenizer whose vocabulary has grown."""

    def get_vocab(self) -> dict[str, int]:
        return {"<a>": 1000, "<b>": 1001}

    def save_pretrained(self, directory: str) -> None:
        """Nothing."""


class Device:
    """What a step asks of accelerate, with one process."""

    device, num_processes, process_index = CUDA, 1, 0

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def reduce(self, values: Tensor, how: str) -> Tensor:
        return values

    def gather(self, values: Tensor) -> Tensor:
        return values


@dataclass
class Run:
    """A model ready to train on fake tensors, and its plan."""

    model: Any
    optimizer: MasterOptimizer
    plan: MemoryPlan


def start(directory: str, case: Case, num_tokens: int, targets: Sequence[str] = ("all-linear",)) -> Run:
    """Everything of a run up to its first step."""
    model = fake_base(directory, case.use_4bit)
    config = LoRAConfig(**{"target_modules": list(targets), "rank": 16, **case.lora})
    inject_lora(model, config, 0, NewTokens(), say=_quiet)
    freeze_base(model)
    initialize_adapter(model, config)
    device: Any = Device()
    mode = "on" if case.recompute else "off"
    plan = choose_recomputed_layers(model, mode, num_tokens, 1 << 60, device, _quiet, case.optim)[1]
    optimizer = build_adapter_optimizer(model, config, case.optim, 0.0, 100)
    return Run(model.train(), optimizer, plan)


def _quiet(line: object) -> None:
    """Says nothing."""


def step(run: Run, lengths: Sequence[int], packing: bool, micro_batches: int = 1) -> None:
    """One optimizer step over micro-batches of these rows."""
    batches = make_batches(rows(lengths), len(lengths), max(lengths), packing, "cuda") * micro_batches
    device: Any = Device()
    train_step(run.model, run.optimizer, batches, device, 1e-4, max_grad_norm=0.3)


# ---- what is run -------------------------------------------------------------------------------------------


def decode(model: Any) -> None:
    """A prompt of two rows padded on the left, and one token after it."""
    ids, mask = torch.ones(2, 8, dtype=torch.int64, device=CUDA), torch.ones(2, 8, dtype=torch.int64, device=CUDA)
    with torch.no_grad(), fast_decoding(model):
        output = model(ids, attention_mask=mask, use_cache=True)
        mask = torch.ones(2, 9, dtype=torch.int64, device=CUDA)
        model(ids[:, :1], attention_mask=mask, past_key_values=output.past_key_values, use_cache=True)


def passages(case: Case, directory: str) -> Iterator[tuple[str, Seen]]:
    """(what was run, what it did): a second step, an evaluation, a merge, decoding."""
    with fake_cuda(WEIGHT_SIZE) as watch:
        run = start(directory, case, sum(LENGTHS))
        for parameter in (*run.model.parameters(), *run.model.buffers(), *run.optimizer.masters):
            if parameter.device.type != "cuda":
                watch.seen.on_cpu[f"{tuple(parameter.shape)} of the model"] += 1
        step(run, LENGTHS, case.packing)  # makes the moments
        device: Any = Device()
        layer = next(iter(lora_layers(run.model).values()))

        def judge() -> None:
            evaluate(run.model, rows(LENGTHS), device, sum(LENGTHS), case.packing)

        work: dict[str, Callable[[], Any]] = {
            "step": lambda: step(run, LENGTHS, case.packing),
            "evaluation": judge,
            "merge": layer.merged,
            "decoding": lambda: decode(run.model),
        }
        yield "start", watch.seen
        for name, function in work.items():
            watch.begin()
            function()
            yield name, watch.seen


def problems(case: Case, passage: str, seen: Seen) -> list[str]:
    """The rules that a passage breaks."""
    if passage == "start":  # A is drawn on the CPU, so that all devices start the same
        return [f"left on the CPU: {place}" for place in seen.on_cpu if place.endswith("of the model")]
    found = [f"computed on the CPU: {place} (x{count})" for place, count in seen.on_cpu.items()]
    if passage != "merge":
        found += [f"upcast of a weight: {place} (x{count})" for place, count in seen.upcasts.items()]
    if passage == "step":
        routed = {place for place in seen.syncs if place.startswith("qlora/model/experts.py")}
        waits = sum(count for place, count in seen.syncs.items() if place not in routed)
        passes = SHAPE["num_hidden_layers"] * (2 if case.recompute else 1)
        most = passes if case.model == "mixture" else 0
        if waits > MOST_SYNCS or sum(seen.syncs[place] for place in routed) > most:
            found += [f"waits for the device: {place} (x{count})" for place, count in seen.syncs.items()]
    return found


def count_launches(directory: str, case: Case, composed: bool) -> int:
    """Kernels that a step launches; `composed`: transformers' blocks, and each adapter beside its layer."""
    with ExitStack() as stack:
        if composed:
            stack.enter_context(patch.object(load, "fuse_blocks", _quiet))
            stack.enter_context(patch.object(LoRALinear, "forward", LoRALinear._compose))
        watch = stack.enter_context(fake_cuda(compiled=not composed))
        run = start(directory, case, sum(LENGTHS))
        step(run, LENGTHS, case.packing)
        watch.begin()
        step(run, LENGTHS, case.packing)
        return sum(watch.seen.launches.values())


# ---- memory ------------------------------------------------------------------------------------------------


def peak_and_plan(directory: str, case: Case, num_tokens: int, rank: int = 64) -> tuple[int, MemoryPlan]:
    """(peak bytes of a step over two packed rows, its plan): with one, gradients never meet all activations."""
    with fake_cuda() as watch:
        run = start(directory, replace(case, lora={**case.lora, "rank": rank}), num_tokens)
        for master in run.optimizer.masters:
            master.grad = torch.zeros_like(master)
        run.optimizer.inner.step()  # makes the moments
        run.optimizer.inner.zero_grad()
        watch.begin()
        step(run, [num_tokens], case.packing, micro_batches=2)
        return watch.seen.peak, run.plan


def compare_memory() -> int:
    """Print peak and plan of a step at full size; 1 if they differ by more than TOLERANCE."""
    print("| shape | tokens | recomputed | peak GiB | planned GiB | planned / peak |")
    print("| --- | --- | --- | --- | --- | --- |")
    worst = 0.0
    for shape in SHAPES:
        for num_tokens, recompute in ((512, False), (2048, True)):
            directory = ROOT / "configs" / "shapes" / shape
            peak, plan = peak_and_plan(str(directory), Case(shape, recompute=recompute), num_tokens)
            ratio = plan.total / peak
            worst = max(worst, abs(ratio - 1))
            how = "all" if recompute else "none"
            sizes = f"{peak / GIB:.2f} | {plan.total / GIB:.2f} | {ratio:.3f}"
            print(f"| {shape} | {num_tokens} | {how} | {sizes} |", flush=True)
    return int(worst > TOLERANCE)


def report(case: Case, folder: Path) -> int:
    """Print a case; returns how many rules it breaks."""
    broken = 0
    for passage, seen in passages(case, str(write_config(folder, case.model))):
        if passage != "start":
            waits = f"{sum(seen.syncs.values())} synchronizations, {sum(seen.launches.values())} launches"
            print(f"{case.name}: {passage}: {waits}")
        for problem in problems(case, passage, seen):
            broken += 1
            print(f"  {problem}")
    return broken


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fake_cuda", description=__doc__)
    parser.add_argument("--case", default="", help="words, separated by commas; a case's name contains one")
    parser.add_argument("--memory", action="store_true", help="peak memory beside the plan")
    options = parser.parse_args(argv)
    if options.memory:
        return compare_memory()
    chosen = [case for case in cases() if any(word in case.name for word in options.case.split(","))]
    if not chosen:
        parser.error(f"no case's name contains {options.case!r}")
    with tempfile.TemporaryDirectory() as folder:
        broken = sum(report(case, Path(folder)) for case in chosen)
        directory = str(write_config(Path(folder), "llama"))
        fused, composed = (count_launches(directory, Case("llama"), way) for way in (False, True))
        print(f"llama: {fused} launches in a step, composed {composed}")
        broken += fused > composed
    print(f"{len(chosen)} cases, {broken} rules broken")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
