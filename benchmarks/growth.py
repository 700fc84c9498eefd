"""Measure how time and memory grow with the tokens of a micro-batch and with sequence length.

    python -m benchmarks.growth [--model M] [--rounds 3] [--plot growth.png]

Trains rank-8 adapters on q_proj and v_proj of SmolLM2-135M (or --model) in 4 bits on random tokens, all of them
targets, and keeps all activations. Two series:

    tokens     1,024 to 8,192 tokens a micro-batch, in sequences of 256: a token should take as long in each, which
               is why a CPU's micro-batches stop at `CPU_TOKENS` (qlora/data/batches.py), and memory should be
    linear length     sequences of 256 to 8,192 tokens, a micro-batch of one sequence or of 1,024 tokens

Each point is a separate process, for its peak memory; the points take turns, `--rounds` times, in both directions,
and every step runs twice, first as a warm-up. Results are medians over the rounds. Memory is the peak of the steps
(the kernel's VmHWM, or the CUDA allocator's) above what was resident before, next to the plan of
qlora/planning/memory.py, on a CPU with the base, which is mapped and read in the first step. The limit is that of
benchmarks/roofline.py: it includes attention's products, whose share grows with the length, but not its softmax.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.roofline import describe_machine, describe_versions, product_rate, useful_flops
from examples.demo import packaged_model
from qlora.cli.exits import run

ROOT = Path(__file__).resolve().parent.parent
Point = tuple[int, int]  # tokens of the micro-batch, tokens of each of its sequences
BY_TOKENS: list[Point] = [(tokens, 256) for tokens in (1024, 2048, 4096, 8192)]
BY_LENGTH: list[Point] = [(max(1024, length), length) for length in (256, 512, 1024, 2048, 4096, 8192)]
FLAT = 0.15  # goal: largest relative change of the time per token from 1,024 to 8,192 tokens
HEADINGS = (
    "tokens", "length", "tokens/s", "ms per token", "of the limit", "attention's FLOPs", "peak GiB", "KiB a token",
    "planned GiB",
)  # fmt: skip


def measure_point(name: str, dtype: str, point: Point) -> dict[str, float]:
    """Run forward, backward and update of one micro-batch twice; time of the second, memory of both."""
    from accelerate import Accelerator

    from qlora.config.lora import LoRAConfig
    from qlora.data.batches import collate_packed
    from qlora.data.example import Example
    from qlora.lora.adapter import inject_lora
    from qlora.lora.optimizer import build_optimizer
    from qlora.lora.trainable import freeze_base, lora_parameters
    from qlora.model.base import base_info
    from qlora.model.load import load_base_model
    from qlora.planning.memory import plan_recomputing
    from qlora.system.device import best_device
    from qlora.system.memory import GIB, peak_memory_gib
    from qlora.training.step import train_step

    device = best_device()
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    model = load_base_model(name, compute_dtype=dtype, device=device)
    inject_lora(model, LoRAConfig(rank=8))
    freeze_base(model)
    model.train()
    optimizer = build_optimizer(lora_parameters(model), "adamw")
    tokens, length = point
    ids = torch.randint(model.config.vocab_size, (tokens + 1,), generator=torch.Generator().manual_seed(0))
    window = [Example(ids[i : i + length], ids[i + 1 : i + length + 1]) for i in range(0, tokens, length)]
    batch = collate_packed(window)
    resident = reset_peak(device)
    seconds = limit = 0.0
    for _ in range(2):
        before = product_rate(base_info(model).compute_dtype, device)
        started = time.perf_counter()
        train_step(model, optimizer, [batch], accelerator, learning_rate=0.0)
        seconds = time.perf_counter() - started
        rate = (before + product_rate(base_info(model).compute_dtype, device)) / 2
        limit = useful_flops(model, window) / rate
    products = useful_flops(model, [Example(ids[:1], ids[:1])]) * tokens  # with almost no attention
    plan = plan_recomputing(model, tokens, base_info(model).compute_dtype)[0]
    return {
        "seconds": seconds,
        "limit": limit,
        "attention": 1 - products / useful_flops(model, window),
        "peak": peak_memory_gib(device) * GIB - resident,
        "plan": plan.total - plan.adapters - (plan.base if device.type == "cuda" else 0),
    }


def reset_peak(device: torch.device) -> int:
    """Bytes in use now; the peak counts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    import psutil

    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # proc(5): resets VmHWM to what is resident
    return psutil.Process().memory_info().rss


def run_point(options: argparse.Namespace, point: Point) -> dict[str, float]:
    """Measure in a separate process."""
    command = [sys.executable, "-m", "benchmarks.growth", "--model", options.model, "--dtype", options.dtype]
    done = subprocess.run(
        [*command, "--point", *map(str, point)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode == 2:  # bad input, already reported
        sys.exit(2)
    if done.returncode != 0:
        sys.exit(
            f"error: the process for {point[0]} tokens in sequences of {point[1]} ended with {done.returncode}."
        )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def per_token(runs: list[dict[str, float]], point: Point) -> float:
    """Milliseconds."""
    return 1e3 * median(runs, "seconds") / point[0]


def report(results: dict[Point, list[dict[str, float]]], console: Console) -> None:
    """Print the table and the results for the two goals."""
    table = Table(title=f"medians of {len(next(iter(results.values())))} rounds")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    first = results[BY_TOKENS[0]]
    for point, runs in results.items():
        if point == BY_LENGTH[1]:
            table.add_section()
        peak, share = median(runs, "peak"), statistics.median(run["limit"] / run["seconds"] for run in runs)
        table.add_row(
            f"{point[0]:,}", f"{point[1]:,}", f"{point[0] / median(runs, 'seconds'):.0f}",
            f"{per_token(runs, point):.3f}", f"{share:.2f}", f"{median(runs, 'attention'):.0%}",
            f"{peak / 2**30:.2f}", f"{peak / point[0] / 1024:.0f}", f"{median(runs, 'plan') / 2**30:.2f}",
        )  # fmt: skip
    console.print(table)
    # Within a round, so that a busy machine slows both sides.
    change = {
        point: statistics.median(
            run["seconds"] / point[0] / (other["seconds"] / BY_TOKENS[0][0])
            for run, other in zip(results[point], first, strict=True)
        )
        for point in BY_TOKENS
    }
    worst = max(change.values(), key=lambda ratio: abs(ratio - 1))
    met = "met" if abs(worst - 1) <= FLAT else "missed"
    console.print(f"time per token from 1,024 to 8,192 tokens: at most x {worst:.2f} (goal: within 15 %, {met})")
    (small, _), (large, _) = BY_TOKENS[0], BY_TOKENS[-1]
    low, high = median(first, "peak"), median(results[BY_TOKENS[-1]], "peak")
    slope = (high - low) / (large - small)
    straight = [median(results[p], "peak") / (low + slope * (p[0] - small)) - 1 for p in BY_TOKENS[1:-1]]
    bend = max(straight, key=abs)
    console.print(f"memory: {slope / 1024:.0f} KiB a token; between the ends {bend:+.1%} at most from that line")


def plot(results: dict[Point, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axis, memory_axis) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for points, index, label in (
        (BY_LENGTH, 1, "by length of the sequences"),
        (BY_TOKENS, 0, "by tokens, length 256"),
    ):
        x = [point[index] for point in points]
        time_axis.plot(x, [per_token(results[p], p) for p in points], "o-", label=label)
    limits = [1e3 * median(results[p], "limit") / p[0] for p in BY_LENGTH]
    time_axis.plot([p[1] for p in BY_LENGTH], limits, "k:", label="the limit, by length")
    time_axis.set_xscale("log", base=2)
    time_axis.xaxis.set_major_formatter("{x:g}")
    time_axis.set(xlabel="tokens", ylabel="ms per token", ylim=(0, None))
    for points, label in ((BY_TOKENS, "sequences of 256"), (BY_LENGTH[2:], "one sequence")):
        memory_axis.plot(
            [p[0] for p in points], [median(results[p], "peak") / 2**30 for p in points], "o-", label=label
        )
    planned = [median(results[p], "plan") / 2**30 for p in BY_TOKENS]
    memory_axis.plot([p[0] for p in BY_TOKENS], planned, "k:", label="planned")
    memory_axis.set(
        xlabel="tokens of the micro-batch", ylabel="GiB above the loaded model", xlim=(0, None), ylim=(0, None)
    )
    for axis in (time_axis, memory_axis):
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face directory or .gguf file; default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="auto", help="compute dtype")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=8192, help="leave out longer sequences (minutes each)")
    parser.add_argument("--plot", type=Path, help="write the figure to this .png")
    parser.add_argument("--point", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.model = options.model or str(packaged_model())
    if options.point:
        print(json.dumps(measure_point(options.model, options.dtype, tuple(options.point))))
        return
    BY_LENGTH[:] = [point for point in BY_LENGTH if point[1] <= options.longest]
    results: dict[Point, list[dict[str, float]]] = {point: [] for point in [*BY_TOKENS, *BY_LENGTH]}
    for number in range(options.rounds):
        for point in list(results)[:: 1 if number % 2 == 0 else -1]:
            results[point].append(run_point(options, point))
            seconds = results[point][-1]["seconds"]
            print(f"round {number + 1}, {point[0]} tokens in sequences of {point[1]}: {seconds:.2f} s", flush=True)
    console = Console(width=115)
    report(results, console)
    console.print(describe_versions())
    console.print(describe_machine())
    if options.plot:
        plot(results, options.plot)
        print(f"figure in {options.plot}")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
