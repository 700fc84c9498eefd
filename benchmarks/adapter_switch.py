"""Cost of switching adapters on one base, compared with reading the adapter, or base and adapter, again.

    python -m benchmarks.adapter_switch MODEL [--adapters 8] [--rank 8] [--rounds 200]

For q_proj,v_proj and for all-linear: save adapters with random values, load them by name onto one 4-bit base, and
switch in turn. Medians. Files and the quantized base come from the disk cache in every round, the best case for
reading. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlora.adapters.load import load_adapter
from qlora.adapters.model import LoRAModel
from qlora.cli.exits import run
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import wrapped_layers
from qlora.model.load import load_base_model


def median_seconds(call: Callable[[], Any], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def save_random_adapters(base: Any, directories: list[Path], config: LoRAConfig) -> None:
    """Adapters as after training: B is not zero."""
    model = LoRAModel(base)
    for seed, directory in enumerate(directories):
        model.add_adapter(directory.name, config, seed)
        model.set_adapter(directory.name)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.lora_parameters():
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        model.save(directory)
        model.delete_adapter(directory.name)


def time_switches(path: str, directories: list[Path], rounds: int) -> tuple[int, int, float, float]:
    """(adapted layers, bytes of an adapter, seconds of a switch, seconds of reading one again)."""
    model = LoRAModel(load_base_model(path))
    for directory in directories:
        model.load_adapter(directory, directory.name)
    turn = iter([directory.name for directory in directories] * rounds)
    switch = median_seconds(lambda: model.set_adapter(next(turn)), len(directories) * rounds)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.lora_parameters())
    return len(wrapped_layers(model.model)), size, switch, median_seconds(lambda: model.load(directories[0]), 10)


def measure(path: str, targets: str, count: int, rank: int, rounds: int) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        directories = [Path(folder) / f"adapter{index}" for index in range(count)]
        save_random_adapters(
            load_base_model(path), directories, LoRAConfig(rank=rank, target_modules=targets.split(","))
        )
        layers, size, switch, reread = time_switches(path, directories, rounds)
        reload = median_seconds(lambda: load_adapter(load_base_model(path), directories[0]), 3)
    sizes = f"| {targets} | {layers} | {size / 1e6:.2f} MB "
    return sizes + f"| {switch * 1e6:.0f} µs | {reread * 1e3:.0f} ms | {reload:.2f} s |"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=200, help="number of switches to each adapter")
    options = parser.parse_args(argv)
    load_base_model(options.model)  # fills the cache
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
    print(
        f"{options.adapters} adapters of rank {options.rank} on {Path(options.model).name}, {device}, "
        f"{torch.get_num_threads()} threads, {versions}, {date.today()}\n"
    )
    print("| targets | layers | memory of an adapter | switch | read the adapter again | base and adapter again |")
    print("| --- | --- | --- | --- | --- | --- |")
    for targets in ("q_proj,v_proj", "all-linear"):
        print(measure(options.model, targets, options.adapters, options.rank, options.rounds))


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
