"""The first hour on a GPU, without a network: what docs/gpu.md cannot say without one.

    make gpu                                          all parts; they stop after 9 minutes
    python -m tools.gpu_hour --parts speed,decoding   some of them

    tests     the tests marked gpu
    speed     training LLaMA 3.1 8B's shape (random weights, r = 32, all linear layers) on one packed row of 2,048
              and 8,192 tokens, and of twice as many until memory ends: tokens per second, share of the device's
              own bf16 matrix rate, peak memory beside the plan
    losses    the same four layers in bf16 and in fp32
    decoding  tokens per second of 1 and 16 answers

Each part replaces its own lines in the section "Measured" of docs/gpu.md, so parts can be run apart.
`--device cpu --shape DIR --page FILE` runs the same code on a small shape, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.config.lora import LoRAConfig
from qlora.data.batches import collate_packed
from qlora.data.example import Example
from qlora.generation import fast_decoding
from qlora.lora.adalora_optimizer import build_adapter_optimizer
from qlora.lora.adapter import inject_lora
from qlora.lora.trainable import freeze_base
from qlora.model.load import _finish
from qlora.model.skeleton import EmptySource, empty_model
from qlora.planning.devices import DeviceLayout
from qlora.planning.step import Work, step_flops
from qlora.quant.weight import QuantConfig
from qlora.system.device import choose_compute_dtype, choose_optimizer, describe_device
from qlora.system.memory import GIB
from qlora.training.held_out import evaluate
from qlora.training.recompute import choose_recomputed_layers
from qlora.training.step import StepOutOfMemory, train_step

ROOT = Path(__file__).parents[1]
MINUTES = 9.0
STEPS = 3  # measured, after one that is not
RANK = 32
PAGE = ROOT / "docs" / "gpu.md"


@dataclass
class Alone:
    """What a step asks of accelerate, with one process on any device."""

    device: torch.device
    num_processes, process_index = 1, 0

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


@dataclass
class Job:
    """What is measured, and until when: `ends` in the seconds of time.monotonic."""

    shape: Path
    device: torch.device
    lengths: Sequence[int]
    ends: float

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.ends

    @property
    def alone(self) -> Any:
        return Alone(self.device)


class RandomSource(EmptySource):
    """Normal weights of the right shapes, made on the device."""

    def __init__(self, network: Any, device: torch.device, seed: int) -> None:
        super().__init__(network)
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def read(self, name: str) -> torch.Tensor:
        shape, kind = self.shape(name), {"dtype": torch.bfloat16, "device": self.device}
        if len(shape) == 1:  # norms
            return torch.ones(shape, **kind)
        return 0.02 * torch.randn(shape, generator=self.generator, **kind)

    view = read


def random_base(directory: Path, device: torch.device, compute_dtype: str = "bfloat16", seed: int = 0) -> Any:
    """A 4-bit base of this shape with normal weights, placed as `load_base_model` does."""
    network, dtype = empty_model(str(directory)), choose_compute_dtype(compute_dtype, device, 1)
    source = RandomSource(network, device, seed)
    _finish(network, source, str(directory), QuantConfig(), dtype, device)
    return network.eval()


def random_row(length: int, vocabulary: int) -> Example:
    """A row whose tokens all train."""
    ids = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(length))
    return Example(ids, ids.roll(-1))


def wait(device: torch.device) -> float:
    """The time once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matrix_rate(job: Job) -> float:
    """Multiplications and additions per second of a large bf16 product, the best of 5."""
    size = 8192 if job.device.type == "cuda" else 256
    a, b = (torch.ones(size, size, dtype=torch.bfloat16, device=job.device) for _ in range(2))
    best = 0.0
    for _ in range(5):
        before = wait(job.device)
        a @ b
        best = max(best, 2 * size**3 / (wait(job.device) - before))
    return best


# ---- the parts: each returns lines of Markdown -------------------------------------------------------------


def run_tests(job: Job) -> list[str]:
    """The tests marked gpu, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    left = max(1.0, job.ends - time.monotonic())
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return [f"`pytest -m gpu` did not finish in {left:.0f} seconds."]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return [f"`pytest -m gpu`: {(done.stdout.splitlines() or ['no output'])[-1]}", *(f"- {x}" for x in failed)]


def measure_speed(job: Job) -> list[str]:
    """Steps on one packed row of each length, then of twice as many tokens until memory or time ends."""
    rate = matrix_rate(job)
    lines = [
        f"A bf16 product reaches {rate / 1e12:.2f} TFLOP/s.", "",
        "| tokens | tokens/s | share of the product's rate | layers recomputed | peak GiB | planned GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    model = random_base(job.shape, job.device)
    inject_lora(model, LoRAConfig(rank=RANK, target_modules=["all-linear"]), say=lambda line: None)
    freeze_base(model)
    optim = choose_optimizer("auto", job.device)
    optimizer = build_adapter_optimizer(model.train(), LoRAConfig(rank=RANK), optim, 0.0, 100)
    lengths = list(job.lengths)
    while lengths and not job.is_over:
        length = lengths.pop(0)
        share, plan = choose_recomputed_layers(
            model, "auto", length, accelerator=job.alone, say=lambda line: None, optim=optim
        )
        batches = [collate_packed([random_row(length, model.config.vocab_size)])]
        if job.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(job.device)
        try:
            train_step(model, optimizer, batches, job.alone, 1e-4)
            before = wait(job.device)
            for _ in range(STEPS):
                train_step(model, optimizer, batches, job.alone, 1e-4)
        except StepOutOfMemory:
            lines.append(f"| {length:,} | out of memory | | {share:.0%} | | {plan.total / GIB:.2f} |")
            break
        seconds = (wait(job.device) - before) / STEPS
        recomputed = round(share * model.config.num_hidden_layers)
        work = Work(length, 1, length, recomputed, 0)
        reached = step_flops(model, work, DeviceLayout()) / seconds / rate
        peak = torch.cuda.max_memory_allocated(job.device) / GIB if job.device.type == "cuda" else float("nan")
        lines.append(
            f"| {length:,} | {length / seconds:,.0f} | {reached:.1%} | {share:.0%} | {peak:.2f} "
            f"| {plan.total / GIB:.2f} |"
        )
        if not lengths and job.device.type == "cuda":
            lengths.append(2 * length)
    return lines


def compare_losses(job: Job) -> list[str]:
    """Held-out loss of the first four layers in bf16 and in fp32."""
    config = json.loads((job.shape / "config.json").read_text())
    config["num_hidden_layers"] = min(4, config["num_hidden_layers"])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        for name in ("bfloat16", "float32"):
            model = random_base(Path(folder), job.device, name)
            rows = [random_row(length, model.config.vocab_size) for length in (100, 300, 77)]
            found[name] = evaluate(model, rows, job.alone, 512)
    narrow, wide = found["bfloat16"], found["float32"]
    assert narrow is not None and wide is not None
    return [f"Loss of four layers: {narrow:.5f} in bf16, {wide:.5f} in fp32, {narrow / wide - 1:+.2e} apart."]


def measure_decoding(job: Job) -> list[str]:
    """Tokens per second after a prompt of 64 tokens."""
    model = random_base(job.shape, job.device)
    tokens = 64 if job.device.type == "cuda" else 4
    lines = ["| answers | tokens/s |", "| --- | --- |"]
    for count in (1, 16):
        ids = torch.ones(count, 64, dtype=torch.int64, device=job.device)
        with torch.inference_mode(), fast_decoding(model):
            output = model(ids, use_cache=True)
            before = wait(job.device)
            for _ in range(tokens):
                chosen = output.logits[:, -1:].argmax(-1)
                output = model(chosen, past_key_values=output.past_key_values, use_cache=True)
            seconds = wait(job.device) - before
        lines.append(f"| {count} | {count * tokens / seconds:,.1f} |")
    return lines


PARTS: dict[str, Callable[[Job], list[str]]] = {
    "tests": run_tests,
    "speed": measure_speed,
    "losses": compare_losses,
    "decoding": measure_decoding,
}


# ---- the page ----------------------------------------------------------------------------------------------


def write_part(page: Path, part: str, lines: Sequence[str]) -> None:
    """Replace a part's lines in the page, between its two comments; new parts go to the end."""
    begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    text = page.read_text() if page.is_file() else "# On a GPU\n"
    block = "\n".join([begin, *lines, end])
    if begin in text:
        before, _, rest = text.partition(begin)
        text = before + block + rest.partition(end)[2]
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    page.write_text(text)


def whole_numbers(text: str) -> list[int]:
    """The numbers of "2048,8192"; argparse reports its ValueError."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_hour", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", type=Path, default=ROOT / "configs" / "shapes" / "llama-3.1-8b")
    parser.add_argument("--lengths", type=whole_numbers, default="2048,8192", help="tokens of a row")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {sorted(unknown)[0]!r}; choose from {', '.join(PARTS)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --device cpu --shape DIR tries the tool on a small shape")
    if device.type != "cuda" and options.page.resolve() == PAGE.resolve():
        parser.error(f"{PAGE.name} is about GPUs; pass --page FILE with --device {device.type}")
    if not (options.shape / "config.json").is_file():
        parser.error(
            f"--shape {options.shape} has no config.json; pass a directory such as configs/shapes/llama-7b"
        )
    job = Job(options.shape, device, options.lengths, time.monotonic() + 60 * MINUTES)
    machine = f"{describe_device(device)}, torch {torch.__version__}"
    failed = 0
    for part in parts:
        started = time.monotonic()
        if job.is_over:
            print(f"{part}: no time left; run it alone with --parts {part}")
            continue
        try:
            lines = PARTS[part](job)
        except Exception as error:  # the other parts go on: time on such a machine is dear
            failed += 1
            lines = [f"{part} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"]
        done = (
            f"{part}: {time.monotonic() - started:.0f} s on {machine}: `python -m tools.gpu_hour --parts {part}`"
        )
        write_part(options.page, part, ["", done, "", *lines, ""])
        print("\n".join([done, *lines]), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
