"""Load, quantize and train a model of LLaMA-7B's shape: seconds, memory and share of the limit.

    python -m benchmarks.seven_b [--layers 32] [--steps 2] [--folder DIR] [--memory-budget GB] [--calibrate TOKENS]

The benchmark writes random weights, one tensor in memory at a time (13.5 GB for 32 layers, plus 3.9 GB of cache;
all is deleted at the end). Then, each in a separate process:

    first start     load_base_model reads the bf16 weights, quantizes them and writes the cache
    second start    it maps the cache, once with cold and once with warm page cache
    training        rank 8 on q_proj and v_proj through `fit`, micro-batches of 1,024 random tokens, all of them
                    targets; every layer recomputed, or with --memory-budget as few as needed
    calibration     with --calibrate: 4-bit codes chosen on random tokens (model/calibrate.py)

"Ready" counts from the start of the process, with imports. Memory is the resident set of the process, with mapped
files. The limit is that of benchmarks/roofline.py. 32 layers take about 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peers import mark_goal
from benchmarks.roofline import describe_machine, product_rate, useful_flops
from qlora.cli.exits import run
from qlora.system.errors import InputError
from qlora.training.recompute import choose_recomputed_layers

ROOT = Path(__file__).resolve().parent.parent
NUM_TOKENS = 1024
GB = 1e9
LOADING_SLACK, TRAINING_PEAK, READY_SECONDS, LIMIT_SHARE = 0.2, 7.0, 5.0, 0.93  # the goals: GB, GB, seconds, 1
PACKAGES = ("torch", "transformers", "bitsandbytes", "safetensors")

Result = dict[str, Any]


def write_config(folder: Path, layers: int) -> None:
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    }
    config = LlamaConfig(**sizes, num_hidden_layers=layers, tie_word_embeddings=False, pad_token_id=None)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def write_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write random bf16 weights, one file per decoder layer, one tensor in memory at a time; norms are 1."""
    files: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.split(".")[2] if ".layers." in name else name.removesuffix(".weight")
        files.setdefault(f"model-{layer}.safetensors", []).append(name)
    for file, names in files.items():
        header, end = {}, 0
        for name in names:
            start, end = end, end + 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                weight = torch.ones(shapes[name], dtype=torch.bfloat16)
                if weight.dim() == 2:
                    weight.normal_(std=0.02)
                out.write(weight.view(torch.uint8).numpy().data)
    places = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def start(folder: Path) -> tuple[Any, Result]:
    """`load_base_model` as train.py calls it: (the model, seconds and bytes)."""
    import psutil

    from qlora.model.load import load_base_model
    from qlora.system.device import best_device
    from qlora.system.memory import GIB, peak_memory_gib

    device = best_device()
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    model = load_base_model(str(folder), device=device)
    return model, {
        "seconds": time.perf_counter() - started,
        "ready": time.time(),
        "libraries": before,  # resident before
        "resident": psutil.Process().memory_info().rss,
        "peak": peak_memory_gib(device) * GIB,
    }


def train(folder: Path, steps: int, memory_budget: float | None) -> Result:
    """Run optimizer steps of one micro-batch each, with the same calls as train.py."""
    from accelerate import Accelerator

    from qlora.config.lora import LoRAConfig
    from qlora.data.example import Example
    from qlora.lora.adapter import inject_lora
    from qlora.lora.optimizer import build_optimizer
    from qlora.lora.trainable import freeze_base, lora_parameters
    from qlora.model.base import base_info
    from qlora.system.device import choose_optimizer
    from qlora.system.memory import GIB, peak_memory_gib
    from qlora.training.loop import Limits, Trainer, TrainingData
    from qlora.training.observer import Observer
    from qlora.training.schedule import build_schedule

    model, _ = start(folder)
    device = next(model.parameters()).device
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    inject_lora(model, LoRAConfig(rank=8))
    freeze_base(model)
    budget = None if memory_budget is None else int(memory_budget * GB)
    recomputed, _ = choose_recomputed_layers(model, "on" if budget is None else "auto", NUM_TOKENS, budget)
    optimizer = build_optimizer(lora_parameters(model), choose_optimizer("auto", device))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(model.config.vocab_size, (NUM_TOKENS + 1,), generator=generator) for _ in range(steps)]
    examples = [Example(row[:-1], row[1:]) for row in rows]
    rates: list[float] = []  # before each step and after the last
    lines: list[Result] = []

    class Measure(Observer):
        """Measures between steps, outside their timing."""

        def before_step(self, trainer: Trainer) -> None:
            rates.append(product_rate(base_info(model).compute_dtype, device))

        def after_step(self, trainer: Trainer, line: Result) -> None:
            lines.append(line)

    data, schedule = TrainingData(examples, 1, 1, NUM_TOKENS), build_schedule("constant", 2e-4, 0, steps)
    Trainer(model, optimizer, schedule, data, accelerator, Limits(steps), [Measure()]).fit()
    seconds = [line["num_tokens"] / line["tokens_per_second"] for line in lines]
    work = useful_flops(model, examples[:1], recomputed)
    limits = [work / ((a + b) / 2) for a, b in itertools.pairwise(rates)]
    return {
        "step_seconds": seconds,
        "shares": [limit / second for limit, second in zip(limits, seconds, strict=True)],
        "losses": [line["loss"] for line in lines],
        "recomputed": recomputed,
        "dtype": str(base_info(model).compute_dtype).removeprefix("torch."),
        "peak": peak_memory_gib(device) * GIB,
    }


def calibrate(folder: Path, num_tokens: int) -> Result:
    """`calibrate_base` on random rows of 512 tokens."""
    import psutil

    from qlora.data.example import Example
    from qlora.model.calibrate import calibrate_base
    from qlora.model.hf_config import load_config
    from qlora.system.device import best_device
    from qlora.system.memory import GIB, peak_memory_gib

    generator, vocabulary = torch.Generator().manual_seed(0), load_config(str(folder)).vocab_size
    num_rows = -(-num_tokens * 8 // (7 * 512))
    rows = [torch.randint(vocabulary, (513,), generator=generator) for _ in range(num_rows)]
    before, seconds, device = psutil.Process().memory_info().rss, list[float](), best_device()
    started = time.perf_counter()
    with suppress(InputError):  # random weights are no better at random tokens than their nearest codes
        calibrate_base(
            str(folder), [Example(row[:-1], row[1:]) for row in rows], device=device,
            progress=lambda done, total: seconds.append(time.perf_counter() - started),
        )  # fmt: skip
    return {
        "layer_seconds": [b - a for a, b in itertools.pairwise(seconds)] or seconds,
        "seconds": time.perf_counter() - started,
        "libraries": before,
        "peak": peak_memory_gib(device) * GIB,
    }


def run_part(part: str, folder: Path, options: argparse.Namespace) -> Result:
    """Run a part in a separate process; returns the JSON object that it prints last, and seconds until ready."""
    command = [sys.executable, "-m", "benchmarks.seven_b", "--part", part, "--folder", str(folder / "model")]
    command += ["--steps", str(options.steps), "--calibrate", str(options.calibrate)]
    if options.memory_budget is not None:
        command += ["--memory-budget", str(options.memory_budget)]
    environment = os.environ | {"QLORA_CACHE": str(folder / "cache")}
    started = time.time()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"error: {part} ended with code {done.returncode}.")
    result: Result = json.loads(done.stdout.strip().splitlines()[-1])
    if "ready" in result:
        result["ready"] -= started
    return result


def forget(files: Iterable[Path]) -> None:
    """Drop files from the page cache if the system supports it."""
    for file in files if hasattr(os, "posix_fadvise") else ():
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Load and train a model of LLaMA-7B's shape.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="training steps; 0 leaves training out")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--memory-budget", type=float, help="in GB: recompute as few layers as fit")
    parser.add_argument("--calibrate", type=int, default=0, metavar="TOKENS", help="also choose codes on them")
    parser.add_argument("--part", choices=("start", "train", "calibrate"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part == "start":
        print(json.dumps(start(options.folder)[1]))
    elif options.part == "train":
        print(json.dumps(train(options.folder, options.steps, options.memory_budget)))
    elif options.part == "calibrate":
        print(json.dumps(calibrate(options.folder, options.calibrate)))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed on SIGTERM too
        measure_all(options)


def measure_all(options: argparse.Namespace) -> None:
    from qlora.model.skeleton import empty_model, weight_shapes

    if not options.folder.is_dir():
        raise InputError(f"--folder {options.folder} does not exist; create it or choose another.")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="seven_b-") as name:
        folder = Path(name)
        (folder / "model").mkdir()
        write_config(folder / "model", options.layers)
        shapes = weight_shapes(empty_model(str(folder / "model")))
        sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
        needed, free = 1.3 * sum(sizes.values()), shutil.disk_usage(folder).free  # 4 bits of 16, and embeddings
        if free < needed:
            raise InputError(
                f"{options.folder} has {free / GB:.1f} GB free and the benchmark writes {needed / GB:.1f}; "
                "choose another --folder, or fewer --layers."
            )
        print(f"writing {sum(sizes.values()) / GB:.1f} GB of random weights to {folder}", flush=True)
        write_weights(folder / "model", shapes)
        first = run_part("start", folder, options)
        cache = list((folder / "cache").glob("base-*/*.safetensors"))
        forget(cache)
        cold, warm = (run_part("start", folder, options) for _ in range(2))
        trained = run_part("train", folder, options) if options.steps else None
        model_bytes = sum(file.stat().st_size for file in cache)
        chosen = run_part("calibrate", folder, options) if options.calibrate else None
    table = report(first, cold, warm, trained, model_bytes, max(sizes.values()))
    if chosen is not None:
        layers = ", ".join(f"{seconds:.0f}" for seconds in chosen["layer_seconds"])
        table.add_row(f"calibration on {options.calibrate:,} tokens: seconds per layer", layers)
        above = (chosen["peak"] - chosen["libraries"]) / GB
        table.add_row(
            "calibration: seconds in all; peak above the libraries", f"{chosen['seconds']:.0f}; {above:.2f} GB"
        )
    table.title = f"{options.layers} layers of LLaMA-7B's shape, {sum(sizes.values()) / 2e9:.2f} billion weights"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    Console(width=115).print(table, versions, describe_machine(), sep="\n")


def report(
    first: Result, cold: Result, warm: Result, trained: Result | None, model_bytes: int, largest: int
) -> Table:
    """Table of every result and its goal.

    Args:
        model_bytes: of the 4-bit model.
        largest: bytes of the largest tensor in full precision.
    """
    table = Table("what", "measured")

    def show(what: str, text: str, value: float = 0.0, sign: str = "<=", goal: float | None = None) -> None:
        table.add_row(what, mark_goal(text, value, sign, goal))

    limit = (model_bytes + largest) / GB + LOADING_SLACK
    above = (first["peak"] - first["libraries"]) / GB
    show("4-bit model", f"{model_bytes / GB:.2f} GB")
    show("largest tensor in full precision", f"{largest / GB:.2f} GB")
    show("first start: load, quantize, write the cache", f"{first['seconds']:.0f} s")
    show("first start: peak above the libraries", f"{above:.2f} GB", above, "<=", limit)
    show("first start: resident after it, libraries included", f"{first['resident'] / GB:.2f} GB")
    for kind, second in (("cold", cold), ("warm", warm)):
        ready = second["ready"]
        show(f"second start, {kind}: ready after", f"{ready:.2f} s", ready, "<=", READY_SECONDS)
        show(f"second start, {kind}: load_base_model alone", f"{second['seconds']:.2f} s")
        show(f"second start, {kind}: resident, libraries included", f"{second['resident'] / GB:.2f} GB")
    if trained is not None:
        seconds = ", ".join(f"{second:.1f}" for second in trained["step_seconds"])
        peak, share = trained["peak"] / GB, max(trained["shares"])
        shares = ", ".join(f"{share:.2f}" for share in trained["shares"])
        show("training: computed in, layers recomputed", f"{trained['dtype']}, {trained['recomputed']:.0%}")
        show("training: seconds per step of 1,024 tokens", seconds)
        show("training: peak, all included", f"{peak:.2f} GB", peak, "<=", TRAINING_PEAK)
        show("training: share of the limit, each step", shares, share, ">=", LIMIT_SHARE)
        show("training: losses", ", ".join(f"{loss:.3f}" for loss in trained["losses"]))
    return table


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
