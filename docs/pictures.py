"""The pictures of docs/qlora.md, and the figures it gives beside them.

    python -m docs.pictures [--adapter OUT] [--output-dir docs]

nf4.png      the 16 levels of NF4, FP4 and int4 beside the density of normal weights over their block's absmax
error.png    what quantizing costs by block size and kind of level, on normal numbers and on SmolLM2-135M
memory.png   what LLaMA 7B to 65B take, by component, in the recipes of configs/ at one row of 512 tokens
update.png   singular values of an adapter's update beside those of the weights it changes (with --adapter)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.demo import packaged_model
from qlora.adapters.peft_files import read_adapter
from qlora.cli.commands.plan import PlanConfig
from qlora.config.parse import parse_args
from qlora.model.weights import read_weights
from qlora.planning.planner import Planner
from qlora.quant.weight import BLOCK_SIZES, QuantConfig, dequantize_weight, quantize_weight

ROOT = Path(__file__).parent.parent
SIZES = ("7b", "13b", "33b", "65b")
PAPER_GB = (6.9, 11.3, 24.7, 45.0)  # arXiv 2305.14314, figure 6: batch 1, length 512, gradient checkpointing
LAYERS = [f"model.layers.{n}.{part}" for n in (0, 15, 29) for part in ("self_attn.q_proj", "mlp.down_proj")]
INT4 = torch.arange(-7, 8) / 7  # symmetric: one of the 16 codes is not used


def levels(kind: str) -> Tensor:
    """The levels of a 4-bit type on [-1, 1], sorted."""
    if kind == "int4":
        return INT4
    state = quantize_weight(torch.ones(1, 64), QuantConfig(kind)).quant_state
    return state.code.sort().values


def relative_error(weight: Tensor, kind: str, block_size: int) -> float:
    """|W_hat - W| / |W| of a weight in 4 bits."""
    if kind == "int4":
        blocks = weight.reshape(-1, block_size)
        absmax = blocks.abs().amax(1, keepdim=True)
        restored = ((blocks / absmax * 7).round() / 7 * absmax).view_as(weight)
    else:
        restored = dequantize_weight(quantize_weight(weight, QuantConfig(kind, True, block_size)), torch.float32)
    return ((restored - weight).norm() / weight.norm()).item()


def draw_levels(path: Path, pyplot: Any) -> None:
    x = torch.randn(2**14, 64, generator=torch.Generator().manual_seed(0))
    x /= x.abs().amax(1, keepdim=True)
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    axes.hist(x.flatten(), bins=201, density=True, color="0.8", label="normal weights")
    for row, kind in enumerate(("nf4", "fp4", "int4")):
        height = -0.12 - 0.18 * row
        axes.plot(levels(kind), [height] * len(levels(kind)), "|", markersize=13, markeredgewidth=2, label=kind)
    axes.set(xlabel="W / absmax", ylabel="density", yticks=[0, 0.5, 1])
    axes.set_ylim(top=1.3)
    axes.legend(loc="upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def draw_errors(path: Path, pyplot: Any) -> None:
    normal = [torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))]
    real = [weight for _, weight in read_weights(str(packaged_model()), LAYERS)]
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    for axes, weights, title in zip(panels, (normal, real), ("normal numbers", "SmolLM2-135M"), strict=True):
        for kind in ("nf4", "fp4", "int4"):
            errors = [sum(relative_error(w, kind, b) for w in weights) / len(weights) for b in BLOCK_SIZES]
            axes.plot(BLOCK_SIZES, errors, "o-", label=kind)
            listed = ", ".join(f"{b}: {e:.4f}" for b, e in zip(BLOCK_SIZES, errors, strict=True))
            print(f"{title}, {kind}, by block size: {listed}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="weights in a block", title=title, ylim=(0, 0.2))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative error")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def draw_memory(path: Path, pyplot: Any) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 3.8), layout="constrained")
    plans = []
    for size in SIZES:
        flags = ["--config", str(ROOT / "configs" / f"llama-{size}.yaml"), "--batch-size", "1"]
        planner = Planner(str(ROOT / "configs" / "shapes" / f"llama-{size}"), "cuda")
        plans.append(planner.plan(parse_args(PlanConfig, "plan", flags)).memory)
    bottom = [0.0] * len(plans)
    for part in vars(plans[0]):
        heights = [vars(plan)[part] / 1e9 for plan in plans]
        axes.bar(SIZES, heights, 0.5, bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.hlines(
        PAPER_GB, [n - 0.35 for n in range(4)], [n + 0.35 for n in range(4)], "k", label="the paper's total"
    )
    for size, plan, paper in zip(SIZES, plans, PAPER_GB, strict=True):
        parts = ", ".join(f"{name} {number / 1e9:.2f}" for name, number in vars(plan).items())
        print(f"LLaMA {size}: {plan.total / 1e9:.1f} GB, the paper {paper} ({parts})")
    for memory in (24, 48):
        axes.axhline(memory, color="0.5", linestyle=":", linewidth=1)
        axes.text(3.32, memory + 0.5, f"{memory} GB", fontsize=8)
    axes.set(ylabel="GB", xlabel="LLaMA, r = 64 on all linear layers, one row of 512 tokens")
    axes.legend(fontsize=8, reverse=True, loc="upper left")
    figure.savefig(path, dpi=110)


def draw_update(path: Path, adapter: str, pyplot: Any) -> None:
    saved = read_adapter(adapter)
    layer = saved.adapted_layers[len(saved.adapted_layers) // 2]
    A, B = (saved.state[f"{layer}.lora_{side}.weight"].float() for side in "AB")
    update = torch.linalg.svdvals(saved.config.scaling_of(layer, len(A)) * (B @ A))
    weight = torch.linalg.svdvals(next(read_weights(str(packaged_model()), [layer]))[1])
    figure, axes = pyplot.subplots(figsize=(8, 3.4), layout="constrained")
    axes.semilogy(range(1, len(weight) + 1), weight, label=f"W, {layer}")
    axes.semilogy(range(1, len(A) + 1), update[: len(A)], "o-", markersize=4, label="its update (alpha / r) B A")
    share = (update[:4].square().sum() / update.square().sum()).item()
    print(f"{layer}: the update has rank {len(A)}, {share:.0%} of its squared norm in 4 directions")
    axes.set(xlabel="number", ylabel="singular value", xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapter", help="of SmolLM2-135M, for update.png")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    draw_levels(options.output_dir / "nf4.png", pyplot)
    draw_errors(options.output_dir / "error.png", pyplot)
    draw_memory(options.output_dir / "memory.png", pyplot)
    if options.adapter:
        draw_update(options.output_dir / "update.png", options.adapter, pyplot)


if __name__ == "__main__":
    main()
