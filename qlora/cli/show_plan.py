"""Print the plan of a run: memory, time, and changes that make it fit."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from qlora.config.devices import DevicesConfig
from qlora.config.run import RunConfig
from qlora.model.loss import CHUNK_SIZE
from qlora.planning.planner import Planner, Remedy, RunPlan
from qlora.planning.step import measure_flops, step_time
from qlora.system.memory import GIB

WIDTH = 115
NOT_COUNTED = {
    "cpu": "Not counted: freed memory that the C library keeps.",
    "cuda": "Not counted: the CUDA context and the allocator's rounding. Paged moments may move to main memory.",
}


def print_plan(
    planner: Planner, config: RunConfig, devices: DevicesConfig | None = None, console: Console | None = None
) -> None:
    """Print memory by component, whether it fits or what would make it fit, and on several devices the step."""
    if console is None:
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=WIDTH)
    plan = planner.plan(config, devices)
    dtype = str(plan.dtype).removeprefix("torch.")
    console.print(f"{plan.summary}")
    console.print(
        f"on {planner.device.type}, computing in {dtype}, at most {plan.num_tokens:,} tokens per micro-batch"
    )
    console.print(f"{plan.layout}\n" if plan.layout.ranks > 1 else "")
    meanings = {
        "base": "frozen weights and their scales",
        "adapters": "A, B and other trained parameters",
        "gradients": "adapter gradients, fp32",
        "optimizer": f"{plan.optim}: two moments, and fp32 copies of bf16 adapters",
        "activations": f"saved for the backward pass; {plan.recomputed} of {plan.num_layers} layers recomputed",
        "logits": f"{min(CHUNK_SIZE, plan.num_tokens)} positions at a time",
        "workspace": "backward pass of one layer: gradients, one dequantized weight",
        "communication": plan.layout.sent,
        "process": "Python and libraries, measured in this process",
    }
    sizes = vars(plan.memory) | ({"process": plan.process} if plan.process else {})
    if plan.layout.ranks == 1:
        del sizes["communication"]
    rows = [(name, f"{size / GIB:.2f} GiB", meanings[name]) for name, size in sizes.items()]
    table = _table(*rows)
    unit = "GB" if plan.layout.ranks == 1 else "GB per device"
    table.add_row("total", f"{plan.total / GIB:.2f} GiB", f"{plan.total / 1e9:.2f} {unit}", style="bold")
    console.print(table)
    if plan.main_memory:
        console.print(f"plus {plan.main_memory / GIB:.2f} GiB of main memory per node for the base")
    if plan.offloaded:
        places = {"cuda": "main memory per device", "cpu": "disk per process, in the output directory,"}
        console.print(
            f"plus {plan.offloaded / GIB:.2f} GiB of {places[planner.device.type]} for the inputs of recomputed "
            "layers, written and read once a micro-batch"
        )
    console.print(f"\n{NOT_COUNTED[planner.device.type]}")
    if plan.layout.ranks > 1:
        console.print("Also not counted: buffers and latency of the communication library.")
    if devices is not None:
        _print_step(plan, config, devices, planner.device, console)
    memory = planner.memory_of(plan.layout)
    if memory is None:
        if config.loop.gradient_checkpointing == "auto":
            least = f"{plan.all_recomputed / GIB:.2f} GiB with all layers recomputed"
            console.print(
                f"auto recomputes as many layers as needed: {least}. Pass --device-memory for the number."
            )
    elif planner.fits(plan):
        console.print(f"fits in {memory / GIB:.2f} GiB, {(memory - plan.total) / GIB:.2f} GiB to spare")
    else:
        console.print(f"does not fit in {memory / GIB:.2f} GiB: {(plan.total - memory) / GIB:.2f} GiB too much")
        _print_remedies(planner, *planner.remedies(config, devices), console)


def _table(*rows: tuple[str, str, str]) -> Table:
    """A table of names, right-aligned figures and descriptions."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


def _print_step(
    plan: RunPlan, config: RunConfig, devices: DevicesConfig, device: torch.device, console: Console
) -> None:
    """Print what a step sends and computes, and its time if the rates are known."""
    layout, (link_rate, node_link_rate) = plan.layout, devices.rates
    rate, source = devices.flops, "as given"
    if rate is None and device.type == "cpu":
        rate = measure_flops(plan.dtype) / layout.node_ranks
        source = "measured with a matrix product here" + (", shared by processes" if layout.node_ranks > 1 else "")
    timed = step_time(plan.flops, plan.traffic, rate, link_rate, node_link_rate)
    meanings = {
        "gradients": "one fp32 ring all-reduce over all devices",
        "gathers": "sharded base, {calls:,} pieces",
        "activations": "layer outputs, {calls:,} all-reduces",
        "shares": "from main memory, {calls:,} times",
        "offloaded": "inputs of recomputed layers, written and read again, {calls:,} copies",
    }
    if plan.traffic:
        console.print("\nsent and received by each device per step:")
    rows = []
    for t in plan.traffic:
        text = meanings[t.kind].format(calls=t.calls)
        if layout.nodes > 1:
            text += f"; {t.between / GIB:.2f} GiB between nodes" if t.between else "; none between nodes"
        if t.kind in timed.sending:
            text += f"; {_seconds(timed.sending[t.kind])}"
        rows.append((t.kind, f"{t.inside / GIB:.2f} GiB", text))
    if rows:
        console.print(_table(*rows))
    tokens = config.loop.batch_size * config.loop.grad_accum * config.trained_tokens
    console.print(
        f"\ncomputed by each device per step of {tokens:,} tokens: {plan.flops / 1e12:,.3g} TFLOP", end=""
    )
    if rate is None or timed.computing is None:
        console.print("; pass --flops for the time")
        return
    console.print(f"\ncomputing takes {_seconds(timed.computing)} at {rate / 1e12:,.3g} TFLOP/s, {source}")
    if timed.least is None or timed.most is None:
        console.print("pass --link-rate for the step time")
        return
    least, most = _seconds(timed.least), _seconds(timed.most)
    tokens *= layout.data_parallel
    slow, fast = f"{tokens / timed.most:,.0f}", f"{tokens / timed.least:,.0f}"
    if (least, slow) == (most, fast):
        console.print(f"a step takes {most}: {slow} tokens/s")
        return
    speed = slow if slow == fast else f"{slow} to {fast}"
    console.print(f"a step takes {least} (gathers overlap computing) to {most} (no overlap): {speed} tokens/s")


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def _print_remedies(planner: Planner, alone: list[Remedy], together: Remedy | None, console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for remedy in alone:
        verdict = "fits" if planner.fits(remedy.plan) else "still too much"
        table.add_row(f"  {remedy.flags}", f"{remedy.plan.total / GIB:.2f} GiB", verdict)
    if alone:
        console.print("each change alone:")
        console.print(table)
    if together is not None:
        console.print(f"fits with {together.flags}: {together.plan.total / GIB:.2f} GiB")
    else:
        console.print("no combination makes it fit; use a smaller model or a larger device")
