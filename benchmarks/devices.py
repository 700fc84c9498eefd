"""Split a base over processes of this machine and compare memory, bytes sent per step and seconds with the plan.

    python -m benchmarks.devices [--layers 24] [--train-layers 4] [--processes 2] [--steps 2] [--folder DIR]

The model has LLaMA-7B's shape with --layers layers and random weights; the benchmark writes and deletes it.

    loading     one process with load_base_model (nothing cached), then --processes that each read and quantize
                their share; memory is the peak of the resident set, with and without Python and libraries
    training    the same shape with --train-layers: rank 8 on q_proj and v_proj, one row of --tokens random tokens
                on each process, every layer recomputed; in every mode. Planned is what `qlora.plan` says from the
                config; its rates are those of a plain product and of a sum over the processes just before the
                first step. Bytes are those that the loopback carries from the second step on (gloo, headers
                included), for each process; peaks are above what was resident before the model

torchrun starts each part with one thread per process. 24 layers write 10 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.roofline import describe_machine
from benchmarks.seven_b import GB, ROOT, write_config, write_weights
from qlora.cli.exits import run
from qlora.config.data import DataConfig
from qlora.config.devices import DevicesConfig
from qlora.config.loop import LoopConfig
from qlora.config.lora import LoRAConfig
from qlora.config.model import ModelConfig
from qlora.config.optimizer import OptimizerConfig
from qlora.config.parallel import ParallelConfig
from qlora.config.run import RunConfig
from qlora.system.errors import InputError

Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One launch: load only, or load and train."""

    name: str
    processes: int
    parallel: dict[str, Any] = field(default_factory=dict, hash=False)
    steps: int = 0
    tokens: int = 512
    cache: bool = False

    def result(self, folder: Path, rank: int) -> Path:
        return folder / f"{self.name.replace(' ', '-')}.{rank}.json"

    def config(self, model: Path) -> RunConfig:
        """The settings of the run."""
        return RunConfig(
            model=ModelConfig(model=str(model), compute_dtype="float32"),
            lora=LoRAConfig(rank=8),
            data=DataConfig(max_length=self.tokens),
            loop=LoopConfig(batch_size=1, grad_accum=1, gradient_checkpointing="on"),
            optimizer=OptimizerConfig(optim="adamw"),
            parallel=ParallelConfig(**self.parallel),
        )


def resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """Peak resident bytes since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def sent() -> int:
    """Bytes sent over the loopback interface."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


def measure_rates(processes: int) -> Result:
    """Rates of computing and sending per process when this many processes run at once."""
    from qlora.planning.step import measure_flops

    if processes == 1:
        return {"flops": measure_flops(torch.float32), "link": None}
    torch.distributed.barrier()
    rates: Result = {"flops": measure_flops(torch.float32)}
    values = torch.zeros(1 << 22)
    seconds = []
    for _ in range(4):
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(values)
        seconds.append(time.perf_counter() - start)
    return rates | {"link": 2 * (processes - 1) / processes * values.nbytes / statistics.median(seconds[1:])}


def work(part: Part, model_folder: Path) -> Result:
    """Run this process's share of a part."""
    from accelerate import Accelerator

    from qlora.data.example import Example
    from qlora.lora.adapter import inject_lora
    from qlora.lora.optimizer import build_optimizer
    from qlora.lora.trainable import freeze_base, lora_parameters
    from qlora.parallel.check import check_split
    from qlora.parallel.launch import arrange_ranks
    from qlora.parallel.load import load_for_ranks
    from qlora.planning.memory import plan_recomputing
    from qlora.training.loop import Limits, Trainer, TrainingData
    from qlora.training.observer import Observer
    from qlora.training.recompute import choose_recomputed_layers

    accelerator, config = Accelerator(cpu=True), part.config(model_folder)
    ranks = arrange_ranks(config.parallel, accelerator)
    import transformers.models.llama.modeling_llama  # noqa: F401  (before the libraries are measured)

    result: Result = {"libraries": resident()}
    forget_peak()
    started = time.perf_counter()
    model = load_for_ranks(
        str(model_folder), ranks, accelerator, compute_dtype="float32", cache=part.cache, check=False
    )
    result |= {"load_seconds": time.perf_counter() - started, "load_peak": peak(), "check_peak": 0}
    if ranks.is_split:
        forget_peak()
        check_split(model, part.cache)
        result["check_peak"] = peak()
    inject_lora(model, config.lora)
    freeze_base(model)
    result["base"] = plan_recomputing(model, 1, torch.float32)[0].base
    result["trainable"] = sum(p.numel() for p in lora_parameters(model))
    if not part.steps:
        return result
    t = config.loop
    choose_recomputed_layers(model, t.gradient_checkpointing, part.tokens, None, accelerator, lambda line: None)
    optimizer = build_optimizer(lora_parameters(model), config.optimizer.optim)
    generator = torch.Generator().manual_seed(0)
    count = part.steps * ranks.data_size
    rows = [torch.randint(model.config.vocab_size, (part.tokens + 1,), generator=generator) for _ in range(count)]
    marks: list[tuple[float, int]] = []

    class Mark(Observer):
        """Records clock and network traffic between steps."""

        def before_step(self, trainer: Trainer) -> None:
            accelerator.wait_for_everyone()
            marks.append((time.perf_counter(), sent()))

        def after_step(self, trainer: Trainer, line: Result) -> None:
            lines.append(line)

    result["rates"] = measure_rates(part.processes)
    forget_peak()
    lines: list[Result] = []
    data = TrainingData([Example(row[:-1], row[1:]) for row in rows], t.batch_size, t.grad_accum, part.tokens)
    Trainer(
        model, optimizer, lambda step: 1e-4, data, accelerator, Limits(part.steps), [Mark()],
        say=lambda line: None,
    ).fit()  # fmt: skip
    (begun, before), (ended, after) = marks[1], marks[-1]
    result |= {
        "step_seconds": (ended - begun) / (part.steps - 1),
        "step_bytes": (after - before) / (part.steps - 1),
        "train_peak": peak(),
        "losses": [line["loss"] for line in lines],
    }
    return result


def run_part(part: Part, folder: Path) -> list[Result]:
    """The results of each process of a part."""
    plan = folder / "part.json"
    plan.write_text(json.dumps(asdict(part)))
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(part.processes), "--rdzv_backend", "c10d"]
    launch += ["--rdzv_endpoint", "localhost:0", "-m", "benchmarks.devices", "--worker", str(plan)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QLORA_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, *launch], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: {part.name} ended with code {done.returncode}.\n{done.stderr[-3000:]}")
    return [json.loads(part.result(folder, rank).read_text()) for rank in range(part.processes)]


def write_model(folder: Path, layers: int) -> int:
    """Write a model of random weights to folder/model; returns the number of weights."""
    from qlora.model.skeleton import empty_model, weight_shapes

    shutil.rmtree(folder / "model", ignore_errors=True)
    (folder / "model").mkdir()
    write_config(folder / "model", layers)
    shapes = weight_shapes(empty_model(str(folder / "model")))
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    free = shutil.disk_usage(folder).free
    if free < 3 * count:
        raise InputError(f"{folder} has {free / GB:.1f} GB free, {3 * count / GB:.1f} are needed; give --folder.")
    print(f"writing {2 * count / GB:.1f} GB of random weights to {folder}", flush=True)
    write_weights(folder / "model", shapes)
    return count


def report_loading(alone: Result, together: list[Result], weights: int) -> Table:
    table = Table("loading", "one process", f"each of {len(together)}", "share")
    table.title = f"{weights / 1e9:.2f} billion weights"

    def show(what: str, one: float, each: list[float]) -> None:
        table.add_row(
            what, f"{one / GB:.3f} GB", ", ".join(f"{x / GB:.3f}" for x in each) + " GB", f"{max(each) / one:.2f}"
        )

    show("weights as stored", alone["base"], [r["base"] for r in together])
    show("peak, libraries included", alone["load_peak"], [r["load_peak"] for r in together])
    show(
        "peak above the libraries",
        alone["load_peak"] - alone["libraries"],
        [r["load_peak"] - r["libraries"] for r in together],
    )
    checks = ", ".join(f"{r['check_peak'] / GB:.3f}" for r in together) + " GB"
    table.add_row("peak of the check after it, libraries included", "", checks)
    seconds = max(r["load_seconds"] for r in together)
    share = f"{seconds / alone['load_seconds']:.2f}"
    table.add_row("seconds", f"{alone['load_seconds']:.0f}", f"{seconds:.0f}", share)
    return table


def report_training(runs: dict[Part, list[Result]], model: Path, weights: int) -> Table:
    from qlora.planning.planner import Planner
    from qlora.planning.step import step_time

    table = Table("training", "loss, step 2", "peak, GB", "planned", "MB sent", "planned", "s a step", "planned")
    planner = Planner(str(model), "cpu")
    for part, results in runs.items():
        plan = planner.plan(part.config(model), DevicesConfig(gpus=part.processes))
        table.title = f"{weights / 1e9:.2f} billion weights, {part.tokens} tokens a process"
        peaks = [r["train_peak"] - r["libraries"] for r in results]
        rates, sent_bytes = results[0]["rates"], results[0]["step_bytes"] / part.processes
        planned_bytes = sum(t.inside for t in plan.traffic)
        timed = step_time(plan.flops, plan.traffic, rates["flops"], rates["link"])
        bounds = " to ".join(dict.fromkeys(f"{bound:.1f}" for bound in (timed.least, timed.most) if bound))
        table.add_row(
            part.name, f"{results[0]['losses'][1]:.6f}", f"{max(peaks) / GB:.3f}",
            f"{plan.memory.total / GB:.3f}", f"{sent_bytes / 1e6:.2f}", f"{planned_bytes / 1e6:.2f}",
            f"{results[0]['step_seconds']:.1f}", bounds,
        )  # fmt: skip
    return table


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="A base split over processes of this machine.")
    parser.add_argument("--layers", type=int, default=24, help="of the model that is loaded; 0 leaves that out")
    parser.add_argument("--train-layers", type=int, default=4, help="of the one that trains; 0 leaves that out")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="2 or more; the first one is not timed")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker is not None:
        part = Part(**json.loads(options.worker.read_text()))
        result = work(part, options.worker.parent / "model")
        rank = int(os.environ["RANK"])
        part.result(options.worker.parent, rank).write_text(json.dumps(result))
        return
    console, count = Console(width=115), options.processes
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="devices-") as name:
        folder = Path(name)
        if options.layers:
            weights = write_model(folder, options.layers)
            [alone] = run_part(Part("alone", 1), folder)
            together = run_part(Part("fsdp", count, {"shard": "fsdp"}), folder)
            console.print(report_loading(alone, together, weights))
        if options.train_layers:
            weights = write_model(folder, options.train_layers)
            parts = [Part("one process", 1)] + [
                Part(name, count, parallel)
                for name, parallel in {
                    "data parallel": {},
                    "--shard fsdp": {"shard": "fsdp"},
                    "--shard hsdp": {"shard": "hsdp", "shard_size": count // 2},
                    "--tensor-parallel": {"tensor_parallel": count},
                    "the same, --sequence-parallel": {"tensor_parallel": count, "sequence_parallel": True},
                }.items()
                if parallel.get("shard_size", 2) > 1
            ]
            runs = {}
            for part in parts:
                part = replace(part, steps=options.steps, tokens=options.tokens)
                runs[part] = run_part(part, folder)
            console.print(report_training(runs, folder / "model", weights))
    console.print(describe_machine())


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
