"""Print the plan of a run: memory, time, and what would make it fit."""

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
    "cpu": "Not counted: what the C library keeps of freed memory.",
    "cuda": "Not counted: the CUDA context and the allocator's rounding. Paged moments may move to main memory.",
}


def print_plan(
    planner: Planner, config: RunConfig, devices: DevicesConfig | None = None, console: Console | None = None
) -> None:
    """The plan by component, whether it fits, and if not what would make it; of many devices also a step's."""
    if console is None:
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=WIDTH)
    plan = planner.plan(config, devices)
    dtype = str(plan.dtype).removeprefix("torch.")
    console.print(f"{plan.summary}")
    console.print(
        f"on {planner.device.type}, computing in {dtype}, {plan.num_tokens:,} tokens a micro-batch at most"
    )
    console.print(f"{plan.layout}\n" if plan.layout.ranks > 1 else "")
    meanings = {
        "base": "weights of the frozen model with their scales",
        "adapters": "A and B, and what trains beside them",
        "gradients": "of these, in fp32",
        "optimizer": f"{plan.optim}: fp32 copies of bf16 adapters, and two moments",
        "activations": f"kept for the backward pass; {plan.recomputed} of {plan.num_layers} layers are recomputed",
        "logits": f"of {min(CHUNK_SIZE, plan.num_tokens)} positions at a time",
        "workspace": "of the layer that is differentiated: gradients, one weight dequantized",
        "communication": plan.layout.sent,
        "process": "Python and the libraries, as measured in this process",
    }
    sizes = vars(plan.memory) | ({"process": plan.process} if plan.process else {})
    if plan.layout.ranks == 1:
        del sizes["communication"]
    rows = [(name, f"{size / GIB:.2f} GiB", meanings[name]) for name, size in sizes.items()]
    table = _table(*rows)
    unit = "GB" if plan.layout.ranks == 1 else "GB, of each device"
    table.add_row("total", f"{plan.total / GIB:.2f} GiB", f"{plan.total / 1e9:.2f} {unit}", style="bold")
    console.print(table)
    if plan.main_memory:
        console.print(f"and {plan.main_memory / GIB:.2f} GiB of each node's main memory for the base")
    console.print(f"\n{NOT_COUNTED[planner.device.type]}")
    if plan.layout.ranks > 1:
        console.print("Nor the buffers of the library that sends, nor its latency.")
    if devices is not None:
        _print_step(plan, config, devices, planner.device, console)
    memory = planner.memory_of(plan.layout)
    if memory is None:
        if config.loop.gradient_checkpointing == "auto":
            least = f"{plan.all_recomputed / GIB:.2f} GiB with all layers recomputed"
            console.print(f"auto recomputes as many layers as the device asks for: {least}. Give --device-memory.")
    elif planner.fits(plan):
        console.print(f"fits {memory / GIB:.2f} GiB, {(memory - plan.total) / GIB:.2f} to spare")
    else:
        console.print(f"does not fit {memory / GIB:.2f} GiB, {(plan.total - memory) / GIB:.2f} too much")
        _print_remedies(planner, *planner.remedies(config, devices), console)


def _table(*rows: tuple[str, str, str]) -> Table:
    """Names, figures to the right, and what they are."""
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
    """What a step sends and computes, and its time as far as rates are known."""
    layout, (link_rate, node_link_rate) = plan.layout, devices.rates
    rate, source = devices.flops, "as given"
    if rate is None and device.type == "cpu":
        rate = measure_flops(plan.dtype) / layout.node_ranks
        source = "a plain product on this machine" + (", shared by its processes" if layout.node_ranks > 1 else "")
    timed = step_time(plan.flops, plan.traffic, rate, link_rate, node_link_rate)
    meanings = {
        "gradients": "one fp32 sum over all devices, in a ring",
        "gathers": "of the sharded base: {calls:,} pieces",
        "activations": "{calls:,} sums of a layer's output",
        "shares": "from main memory, {calls:,} times",
    }
    if plan.traffic:
        console.print("\nsent by each device in a step, and received:")
    rows = []
    for t in plan.traffic:
        text = meanings[t.kind].format(calls=t.calls)
        if layout.nodes > 1:
            text += f"; {t.between / GIB:.2f} GiB from node to node" if t.between else "; none between nodes"
        if t.kind in timed.sending:
            text += f"; {_seconds(timed.sending[t.kind])}"
        rows.append((t.kind, f"{t.inside / GIB:.2f} GiB", text))
    if rows:
        console.print(_table(*rows))
    tokens = config.loop.batch_size * config.loop.grad_accum * config.data.max_length
    console.print(
        f"\ncomputed by each device in a step of {tokens:,} tokens: {plan.flops / 1e12:,.3g} TFLOP", end=""
    )
    if rate is None or timed.computing is None:
        console.print("; give --flops for its time")
        return
    console.print(f"\nthat takes {_seconds(timed.computing)} at {rate / 1e12:,.3g} TFLOP/s, {source}")
    if timed.least is None or timed.most is None:
        console.print("give --link-rate for the time of a step")
        return
    least, most = _seconds(timed.least), _seconds(timed.most)
    tokens *= layout.data_parallel
    slow, fast = f"{tokens / timed.most:,.0f}", f"{tokens / timed.least:,.0f}"
    if (least, slow) == (most, fast):
        console.print(f"a step takes {most}: {slow} tokens/s")
        return
    speed = slow if slow == fast else f"{slow} to {fast}"
    console.print(
        f"a step takes {least} (gathers behind computing) to {most} (one after another): {speed} tokens/s"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def _print_remedies(planner: Planner, alone: list[Remedy], together: Remedy | None, console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for remedy in alone:
        verdict = "fits" if planner.fits(remedy.plan) else "too much still"
        table.add_row(f"  {remedy.flags}", f"{remedy.plan.total / GIB:.2f} GiB", verdict)
    if alone:
        console.print("each change alone:")
        console.print(table)
    if together is not None:
        console.print(f"fits with {together.flags}: {together.plan.total / GIB:.2f} GiB")
    else:
        console.print("nothing here makes it fit; take a smaller model or a larger device")
