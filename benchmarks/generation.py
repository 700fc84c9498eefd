"""Compare generation with transformers in one run: tokens per second, time to first token, peak memory.

    python -m benchmarks.generation --model M          # the model, and a stack of layers of LLaMA-7B's shape

Every side is a separate process with one model. The sides answer the same prompt in turns, greedily, at batch 1.
Ratios are medians over the rounds of (ours / theirs in the same round), since machines drift; the first answer
of each process is a warm-up.

    ours + LoRA        4-bit base with a rank-8 adapter on q_proj and v_proj
    ours               the same without an adapter
    bnb, training      transformers with bitsandbytes' Linear4bit in the training layout, which dequantizes
    bf16               transformers in bf16, not quantized

bitsandbytes has a faster layout on CPUs with AVX512-BF16, but repacking a weight into it is permanent: the weight
cannot train afterwards, so generation between training steps cannot use it. The time to the first token includes
everything prepared for one generation. The stack has random weights, written to a temporary folder.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qlora.cli.exits import run

OURS = ("ours + LoRA", "ours")
THEIRS = ("bnb, training", "bf16")


def write_stack(folder: Path, num_layers: int) -> Path:
    """Write `num_layers` random layers of LLaMA-7B's shape in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=num_layers, dtype="bfloat16")  # the defaults are LLaMA-7B's
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    return folder


def write_dense(model: Path, folder: Path) -> Path:
    """Convert a .gguf model to a dense Hugging Face directory for transformers; others are returned unchanged."""
    from transformers import AutoModelForCausalLM, GgufConfig

    from qlora.model.resolve import resolve_model

    model = resolve_model(str(model))
    if model.suffix != ".gguf":
        return model
    where: dict[str, Any] = {"gguf_file": model.name, "quantization_config": GgufConfig(dequantize=True)}
    AutoModelForCausalLM.from_pretrained(model.parent, dtype=torch.bfloat16, **where).save_pretrained(folder)
    return folder


def load_side(side: str, model: str) -> Any:
    """Load a side's model, ready to generate."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if side == "bf16":
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    if side == "bnb, training":
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=how)
        return loaded.train()  # bitsandbytes repacks in eval mode
    from qlora.config.lora import LoRAConfig
    from qlora.lora.adapter import inject_lora
    from qlora.model.load import load_base_model

    ours = load_base_model(model, cache=False)
    if side == "ours + LoRA":
        inject_lora(ours, LoRAConfig(rank=8))
    return ours


class Clock:
    """A streamer that records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def answer(side: str, model: Any, prompt: int, tokens: int) -> tuple[float, float]:
    """(tokens per second after the first, seconds to the first) of one answer."""
    from transformers import GenerationConfig

    from qlora.generation import fast_decoding

    ids = torch.randint(5, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    clock, started = Clock(), time.perf_counter()
    with fast_decoding(model) if side in OURS else nullcontext(), torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=clock)
    first, *rest = clock.times[1:]  # the first entry is the prompt
    return len(rest) / (rest[-1] - first), first - started


def serve(side: str, model: str, prompt: int, tokens: int, pipe: Any) -> None:
    """A side's process: generate one answer per request, until the request is None."""
    from transformers.utils import logging

    from qlora.system.memory import peak_memory_gib

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = load_side(side, model)
    answer(side, loaded, prompt, 4)
    pipe.send("ready")
    while pipe.recv():
        pipe.send((*answer(side, loaded, prompt, tokens), peak_memory_gib(torch.device("cpu"))))


def measure(model: Path, options: argparse.Namespace) -> dict[str, list[tuple[float, float, float]]]:
    """(tokens per second, seconds to the first token, peak GiB) by side and round."""
    processes = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    for side in (*OURS, *THEIRS):
        pipes[side], theirs = processes.Pipe()
        arguments = (side, str(model), options.prompt, options.tokens, theirs)
        processes.Process(target=serve, args=arguments, daemon=True).start()
        theirs.close()  # so that the death of a side is noticed
        pipes[side].recv()
    results: dict[str, list[tuple[float, float, float]]] = {side: [] for side in pipes}
    for number in range(options.rounds):
        for side in list(pipes)[:: 1 if number % 2 == 0 else -1]:
            pipes[side].send(True)
            results[side].append(pipes[side].recv())
    for pipe in pipes.values():
        pipe.send(None)
    return results


def table_of(title: str, results: dict[str, list[tuple[float, float, float]]]) -> Table:
    """Table of medians, and of how much faster ours with LoRA is within a round."""
    table = Table(title=title)
    for heading in ("side", "tokens/s", "ours + LoRA is", "ours is", "first token, s", "peak GiB"):
        table.add_column(heading)
    for side, rounds in results.items():
        ratios = [
            statistics.median(a[0] / b[0] for a, b in zip(results[mine], rounds, strict=True)) for mine in OURS
        ]
        rate, first, peak = (statistics.median(values) for values in zip(*rounds, strict=True))
        table.add_row(side, f"{rate:.1f}", *(f"{ratio:.2f} x" for ratio in ratios), f"{first:.2f}", f"{peak:.2f}")
    return table


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Compare generation with transformers'.")
    parser.add_argument("--model", type=Path, help="a Hugging Face directory or .gguf file (only the stack)")
    parser.add_argument("--layers", type=int, default=4, help="layers in the stack; 0 = no stack")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        if options.model is not None:
            models[options.model.stem] = write_dense(options.model, Path(folder) / "dense")
        if options.layers > 0:
            models[f"{options.layers} layers of LLaMA-7B's shape"] = write_stack(
                Path(folder) / "stack", options.layers
            )
        for name, path in models.items():
            title = f"{name}: {options.prompt} + {options.tokens} tokens, {options.rounds} rounds"
            console.print(table_of(title, measure(path, options)))
    names = ("torch", "transformers", "bitsandbytes")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    console.print(f"{versions}; {platform.machine()}, {torch.get_num_threads()} threads; {date.today()}")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
