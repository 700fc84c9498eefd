"""The limit of a training step: the FLOPs it must compute, divided by the GEMM rate of this machine.

For a step on sequences of T tokens with Y targets, P parameters in the decoder blocks' matrices, V x D in the
head, L layers and Q = heads x head_dim:

    2 P T                     forward; the same for the gradient of the activations (frozen weights have none)
    2 P T x recomputed share  forward pass of the recomputed layers: none, some, or all
    4 V D Y                   the head, forward and backward, at the targets
    12 L Q T^2 / 2            attention: two products forward, four backward, over the causal half

So a block's matrices cost 2 P per token, 2 times without checkpointing and 3 times with. The adapters' products,
norms, softmax, dequantization, recomputed attention and the optimizer are not counted: an implementation that
reaches 1.0 would spend no time on them.

The rate is that of torch's square product in the compute dtype, timed before and after each step in the same
process, since shared machines drift from minute to minute. This project's own products (qlora/kernels/gemm.py) may
be faster than torch's, so a share above 1 is possible.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlora.data.example import Example
from qlora.quant.layers import Linear4bit, logical_numel

SQUARE = 1536  # width of the product that measures the machine's rate


def useful_flops(model: Any, window: Iterable[Example], recomputed_share: float = 0.0) -> float:
    """FLOPs of one optimizer step on these examples, by the module's formula.

    Args:
        model: a 4-bit causal LM.
        recomputed_share: layers under gradient checkpointing / layers; True and False mean all and none.
    """
    config = model.config
    body = sum(logical_numel(m.weight) for m in model.modules() if isinstance(m, Linear4bit))
    head = config.vocab_size * config.hidden_size
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim / 2
    per_token = 2 * body * (2 + recomputed_share)
    return sum(per_token * len(e) + 4 * head * e.num_targets + attention * len(e) ** 2 for e in window)


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square product: the median of five."""
    x = torch.ones(SQUARE, SQUARE, dtype=dtype, device=device)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * SQUARE**3 / statistics.median(seconds)


def describe_versions() -> str:
    """Versions of the libraries that decide speed, for the output of a benchmark."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes", "accelerate"))


def describe_machine() -> str:
    """Processor or GPU, threads and date, for the output of every benchmark."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    return f"{name}, {torch.get_num_threads()} threads, {date.today()}"
