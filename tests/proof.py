"""Training on several processes against training on one; `python -m tests.proof` prints the whole table.

A case is trained by `fit` for some steps, in fp32 and with fp32 adapters, so that nothing but the order of sums
differs. Compared are every step's loss and whole gradient, and an evaluation at the end. The processes are started
by torchrun and compute by gloo; each runs `main` and leaves its results in a file.

    python -m tests.proof                       the tiny models and the real one, 10 steps, 2 to 4 processes
    python -m tests.proof --only fsdp --steps 3
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.adapter import save_adapter
from qlora.config import LoRAConfig, ParallelConfig
from qlora.distributed import arrange_ranks
from qlora.injection import base_parameters, freeze_base, inject_lora, lora_parameters, parameter_summary
from qlora.optim import MasterOptimizer, build_optimizer
from qlora.output import base_fingerprint
from qlora.quantize import Linear4bit, ShardedLinear4bit, dense_weight, local
from qlora.split import load_for_ranks
from qlora.tokenize import IGNORE_INDEX, Example
from qlora.trainer import fit, settle_checkpointing

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-5  # relative: fp32 sums in another order
EXAMPLES_PER_STEP, LEARNING_RATE = 16, 2e-4


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        model: directory or .gguf.
        lora, parallel: of LoRAConfig and ParallelConfig.
        processes: 1 is the reference.
        batch_size: examples of a micro-batch; a step has EXAMPLES_PER_STEP whatever it is.
        longest: row, in tokens.
        cache: whether the quantized base comes from the cache, which a run on one process has made.
    """

    name: str
    model: str
    processes: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    checkpointing: str = "off"
    packing: bool = True
    batch_size: int = 2
    longest: int = 24
    cache: bool = True

    def alone(self) -> Case:
        """The same training on one process."""
        return Case(**{**asdict(self), "processes": 1, "parallel": {}})


class _Recorder:
    """An optimizer's step that first notes the gradient."""

    def __init__(self, optimizer: MasterOptimizer) -> None:
        self.gradients: list[Tensor] = []
        self.optimizer, self.step = optimizer, optimizer.step
        optimizer.step = self._step  # type: ignore[method-assign]

    def _step(self, learning_rate: float) -> None:
        self.gradients.append(torch.cat([p.grad.flatten().float() for p in self.optimizer.parameters]))  # type: ignore[union-attr]
        self.step(learning_rate)


def make_examples(count: int, longest: int, vocabulary: int) -> list[Example]:
    """Random rows of 3 to `longest` tokens, the first third of each without a target."""
    generator = torch.Generator().manual_seed(7)
    examples = []
    for _ in range(count):
        length = int(torch.randint(3, longest + 1, (1,), generator=generator))
        ids = torch.randint(0, vocabulary, (length + 1,), generator=generator)
        targets = ids[1:].clone()
        targets[: length // 3] = IGNORE_INDEX
        examples.append(Example(ids[:-1], targets))
    return examples


def train_case(case: Case, accelerator: Accelerator, adapter: Path | None = None) -> dict[str, Tensor]:
    """Train a case on the processes there are.

    Args:
        adapter: where to save it.
    Returns:
        "losses" (steps,), "gradients" (steps, values), "held_out" (1,), of one row, so that other processes have
        none; "bytes" (1,) of the frozen weights with their statistics on this process; "fingerprint" of the base
        and of all its dequantized weights; "parameters" (2,): as counted, in all and those that train.
    """
    ranks = arrange_ranks(ParallelConfig(**case.parallel), accelerator)
    model = load_for_ranks(case.model, ranks, accelerator, compute_dtype="float32", cache=case.cache)
    fingerprint = base_fingerprint(model) + weights_digest(model)
    lora = LoRAConfig(**{"rank": 4, "adapter_dtype": "float32", **case.lora})
    inject_lora(model, lora, seed=1)
    freeze_base(model)
    settle_checkpointing(
        model, case.checkpointing, case.longest * case.batch_size, None, accelerator, lambda line: None
    )
    optimizer = build_optimizer(lora_parameters(model), "adamw")
    recorder, lines = _Recorder(optimizer), []
    examples = make_examples(case.steps * EXAMPLES_PER_STEP, case.longest, model.config.vocab_size)
    fit(
        model, optimizer, lambda step: LEARNING_RATE, examples, accelerator, total_steps=case.steps,
        batch_size=case.batch_size, grad_accum=EXAMPLES_PER_STEP // case.batch_size // ranks.data_size,
        max_length=case.longest, packing=case.packing, eval_examples=examples[:1], eval_every=case.steps,
        log=lines.append, say=lambda line: None,
    )  # fmt: skip
    if adapter is not None and accelerator.is_main_process:
        save_adapter(model, adapter, lora, case.model)
    summary = parameter_summary(model)
    return {
        "losses": torch.tensor([line["loss"] for line in lines if "loss" in line], dtype=torch.float64),
        "gradients": torch.stack(recorder.gradients),
        "held_out": torch.tensor([line["eval_loss"] for line in lines if "eval_loss" in line][-1:]).double(),
        "bytes": torch.tensor([base_bytes(model)]),
        "parameters": torch.tensor([summary.total, summary.trainable]),
        "fingerprint": torch.tensor(list(fingerprint.encode()), dtype=torch.uint8),
    }


def weights_digest(model: Any) -> str:
    """Of all 4-bit weights, dequantized: gathered where they are sharded."""
    digest = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, (Linear4bit, ShardedLinear4bit)):
            digest.update(dense_weight(module, torch.float32).numpy().tobytes())
    return digest.hexdigest()


def base_bytes(model: Any) -> int:
    """Of the frozen parameters, scales and tables that this process holds."""
    held = sum(local(p).numel() * p.itemsize for p in base_parameters(model))
    for module in model.modules():
        if isinstance(module, ShardedLinear4bit):
            held += module.table.nbytes + module.nested_table.nbytes
        elif isinstance(module, Linear4bit):
            state: Any = module.weight.quant_state
            held += sum(
                tensor.nbytes for tensor in (state.absmax, state.code, state.state2.absmax, state.state2.code)
            )
    return held


def run_cases(cases: Sequence[Case], folder: Path, timeout: float = 600) -> dict[str, list[dict[str, Tensor]]]:
    """Train cases of one number of processes; (case's name -> results by rank).

    The adapter of each is in folder/<name>.
    """
    processes = {case.processes for case in cases}
    assert len(processes) == 1, "cases of one launch have as many processes"
    plan = folder / "cases.json"
    plan.write_text(json.dumps([asdict(case) for case in cases]))
    number = processes.pop()
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(number), "--rdzv_backend", "c10d"]
    launch += ["--rdzv_endpoint", "localhost:0", "-m", "tests.proof", "--worker", str(plan)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch], cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        case.name: [load_file(folder / f"{case.name}.{rank}.safetensors") for rank in range(number)]
        for case in cases
    }


def reference(case: Case) -> dict[str, Tensor]:
    """The case on one process, this one, with as many threads as the others have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train_case(case.alone(), Accelerator(cpu=True))
    finally:
        torch.set_num_threads(threads)


def worst_errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative error over the steps of losses, gradients (as vectors) and the held-out loss."""
    loss = ((found["losses"] - right["losses"]) / right["losses"]).abs().max().item()
    gradients = (found["gradients"] - right["gradients"]).norm(dim=1) / right["gradients"].norm(dim=1)
    held_out = ((found["held_out"] - right["held_out"]) / right["held_out"]).abs().max().item()
    return {"loss": loss, "gradient": gradients.max().item(), "held-out loss": held_out}


def check_case(case: Case, found: Sequence[dict[str, Tensor]], right: dict[str, Tensor]) -> dict[str, float]:
    """Assert that every process had one process' numbers; the worst errors."""
    errors = [worst_errors(result, right) for result in found]
    worst = {name: max(error[name] for error in errors) for name in errors[0]}
    assert all(value <= TOLERANCE for value in worst.values()), f"{case.name}: {worst}"
    for result in found:
        for name in ("fingerprint", "parameters"):
            assert torch.equal(result[name], right[name]), f"{case.name}: another {name}"
    return worst


def all_cases(tiny: str, tied: str, real: str | None, steps: int) -> list[Case]:
    """Those of the table."""
    everything = {"target_modules": "all-linear"}
    modes: list[tuple[str, int, dict[str, Any]]] = [
        ("ddp", 2, {}), ("ddp", 4, {}), ("fsdp", 2, {"shard": "fsdp"}), ("fsdp", 4, {"shard": "fsdp"}),
        ("hsdp 2x2", 4, {"shard": "hsdp", "shard_size": 2}),
    ]  # fmt: skip
    cases = []
    for label, processes, parallel in modes:
        name = f"{label}, {processes} processes"
        cases += [
            Case(f"{name}, tiny, q and v", tiny, processes, parallel, steps=steps, checkpointing="on"),
            Case(f"{name}, tiny, all-linear", tiny, processes, parallel, everything, steps, batch_size=1),
            Case(f"{name}, tied, unpacked", tied, processes, parallel, steps=steps, packing=False),
        ]
        if real is not None:
            cases.append(Case(f"{name}, SmolLM2", real, processes, parallel, steps=steps, longest=48))
    return cases


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worker", metavar="FILE", help="of torchrun: train the cases in FILE")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", default="", help="cases whose names hold this")
    options = parser.parse_args(arguments)
    if options.worker:
        return _work(Path(options.worker))
    with tempfile.TemporaryDirectory() as folder:
        print_table(Path(folder), options.steps, lambda case: options.only in case.name)


def _work(plan: Path) -> None:
    accelerator = Accelerator(cpu=True)
    for case in (Case(**entry) for entry in json.loads(plan.read_text())):
        result = train_case(case, accelerator, plan.parent / case.name)
        save_file(result, plan.parent / f"{case.name}.{accelerator.process_index}.safetensors")


def print_table(folder: Path, steps: int, is_wanted: Callable[[Case], bool]) -> None:
    """Train all wanted cases and print how far each is from one process."""
    from tests.models import smollm2_path

    tiny, tied = save_models(folder)
    real = smollm2_path()
    cases = [case for case in all_cases(tiny, tied, real and str(real), steps) if is_wanted(case)]
    print(
        f"{'largest relative error over ' + str(steps) + ' steps':48}{'loss':>10}{'gradient':>10}{'held-out':>10}"
    )
    references: dict[Case | str, dict[str, Tensor]] = {}
    for case in cases:
        key = json.dumps({**asdict(case.alone()), "name": ""})
        if key not in references:
            references[key] = reference(case)
        worst = check_case(case, run_cases([case], folder)[case.name], references[key])
        print(f"{case.name:48}" + "".join(f"{value:10.1e}" for value in worst.values()), flush=True)


def save_models(folder: Path) -> tuple[str, str]:
    """Two small random models, heads divisible by 4: one untied, one tied."""
    from tests.models import save_tiny_llama

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    tiny = save_tiny_llama(folder / "tiny", num_hidden_layers=3, **sizes)
    tied = save_tiny_llama(folder / "tied", tie_word_embeddings=True, hidden_size=128, intermediate_size=192)
    return str(tiny), str(tied)


if __name__ == "__main__":
    main(sys.argv[1:])
