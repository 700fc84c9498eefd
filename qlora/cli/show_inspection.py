"""Print and plot what `inspect_adapter` found."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qlora.adapters.files import weights_file
from qlora.adapters.inspect import Inspection
from qlora.config.fields import to_text
from qlora.system.errors import InputError
from qlora.system.files import new_file
from qlora.system.wording import list_first, show_value

NUM_NAMES = 10  # in one line
WIDTH = 250  # columns of the widest table; a narrower terminal wraps its lines instead of cutting them


def print_inspection(found: Inspection, console: Console | None = None) -> None:
    """Print the settings, then the update sizes by layer and module."""
    if console is None:
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=WIDTH)
    adapter, config = found.adapter, found.adapter.config
    base = adapter.description.get("base_model_name_or_path")
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in adapter.state.values())
    num_parameters = sum(tensor.numel() for tensor in adapter.state.values())
    size = weights_file(adapter.directory).stat().st_size
    alphas = Counter(config.alpha_of(u.layer) for u in found.updates)
    rows = {u.layer: len(adapter.state[f"{u.layer}.lora_A.weight"]) for u in found.updates}
    scalings = Counter(config.scaling_of(layer, rank) for layer, rank in rows.items())
    facts = {
        "adapter": str(adapter.directory),
        "base model": show_value(base, 200) if base else "not named",
        "base quantization": found.quantization,
        "variant": found.variant,
        "rank": _counted(Counter(u.rank for u in found.updates)),
        "alpha": _counted(alphas),
        "scaling": _counted(scalings),
        "dropout": f"{config.dropout:g}",
        "layers": f"{len(found.updates):,} in {len({u.block for u in found.updates}):,} blocks",
        "modules": _listed(list(dict.fromkeys(u.module for u in found.updates))),
        **({"without tensors": _gaps(found.gaps)} if found.gaps else {}),
        **({"not checked": _unchecked(found.last_checked)} if found.last_checked is not None else {}),
        "trained whole": _listed(list(adapter.trained)),
        **({"embeddings": _listed([f"{c} of {n}" for n, c in adapter.rows.items()])} if adapter.rows else {}),
        "parameters": f"{num_parameters:,}",
        "file": f"{size:,} bytes, {_counted(dtypes, 'tensors')}",
    }
    for fact, text in facts.items():
        console.print(f"{fact:<19}{text}")
    if found.updates:
        console.print(f"\n{found.measure}:")
        console.print(_size_table(found))
        console.print(
            "(all: over all layers; spectral norm: the largest; stable rank and magnitude change: the mean)"
        )
    if found.is_partial:
        console.print("\nDoRA also rescales the outputs; pass --model to measure the whole update.")
    broken = [u.layer for u in found.updates if math.isnan(u.norm)]
    if found.includes_start:
        console.print("\nPiSSA starts from the base's weights; pass --model to subtract that start.")
    if broken:
        console.print(f"\nnot finite: {_listed(broken)}")


def _gaps(gaps: dict[str, list[int]]) -> str:
    """Modules with the blocks that the file leaves out."""
    return _listed([f"{m} in blocks {to_text(blocks)}" if blocks else m for m, blocks in gaps.items()])


def _unchecked(last: int) -> str:
    return f"whether the base has blocks after {last} that the file leaves out; pass --model"


def _size_table(found: Inspection) -> Table:
    """One row per block, one column per module, then summary columns."""
    blocks, modules, sizes = found.grid()
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    for label in (*_labels(modules), "all"):
        table.add_column(label, justify="right", no_wrap=True)
    for block in blocks:
        row = [_number(sizes.get((block, module))) for module in modules]
        together = found.size([u for u in found.updates if u.block == block])
        table.add_row("none" if block is None else str(block), *row, _number(together))
    columns = [[u for u in found.updates if u.module == module] for module in modules] + [found.updates]
    table.add_row("all", *(_number(found.size(updates)) for updates in columns), style="bold")
    if any(u.magnitude_change is not None for u in found.updates):
        changes = [sum(u.magnitude_change or 0.0 for u in updates) / len(updates) for updates in columns]
        table.add_row("magnitude change", *map(_number, changes), style="dim")
    else:
        largest = [max(u.spectral_norm for u in updates) for updates in columns]
        used = [sum(u.stable_rank for u in updates) / len(updates) for updates in columns]
        table.add_row("spectral norm", *map(_number, largest), style="dim")
        table.add_row("stable rank", *map(_number, used), style="dim")
    return table


def _labels(modules: list[str]) -> list[str]:
    """Last name parts if they are unique, otherwise full names."""
    last = Counter(module.rpartition(".")[2] for module in modules)
    return [name if last[name := module.rpartition(".")[2]] == 1 else module for module in modules]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _counted(values: Counter[Any], of: str = "layers") -> str:
    """A single value, or each value with its count."""
    texts = [(f"{value:g}" if isinstance(value, (int, float)) else value, n) for value, n in values.most_common()]
    if len(texts) == 1:
        return texts[0][0]
    return _listed([f"{text} ({count:,} {of})" for text, count in texts])


def _listed(names: list[str]) -> str:
    return list_first(names, NUM_NAMES, ", ") or "none"


def draw_inspection(found: Inspection, picture: str | Path) -> None:
    """Plot a heat map of the sizes: one row per block, one column per module.

    Raises:
        InputError: nothing to plot, or `picture` is not a .png file in an existing directory.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture = Path(picture)
    if picture.suffix.lower() != ".png" or not picture.parent.is_dir():
        raise InputError(f"--picture is {picture}; give a .png file in an existing directory.")
    if not found.updates:
        raise InputError(f"{found.adapter.directory} has no low-rank updates to plot; leave out --picture.")
    blocks, modules, sizes = found.grid()
    cells = torch.full((len(blocks), len(modules)), math.nan)
    for (block, module), size in sizes.items():
        cells[blocks.index(block), modules.index(module)] = size
    figure, axes = pyplot.subplots(
        figsize=(min(3 + 0.9 * len(modules), 40), min(2.5 + 0.25 * len(blocks), 40)), layout="constrained"
    )
    colors = pyplot.get_cmap("viridis").with_extremes(bad="0.85")  # gray: no value, or not finite
    image = axes.imshow(cells.numpy(), aspect="auto", cmap=colors, vmin=0, interpolation="nearest")
    figure.colorbar(image, ax=axes, label=found.measure)
    axes.set_xticks(range(len(modules)), _labels(modules), rotation=45, ha="right", parse_math=False)
    step = -(-len(blocks) // 40)
    rows = range(0, len(blocks), step)
    axes.set_yticks(rows, ["none" if blocks[row] is None else str(blocks[row]) for row in rows])
    axes.set(xlabel="module", ylabel="layer")
    name = found.adapter.directory.resolve().name
    ranks = _counted(Counter(u.rank for u in found.updates))
    axes.set_title(f"Size of the updates in {name}\n{found.variant}, rank {ranks}", fontsize=10, parse_math=False)
    with new_file(picture) as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)
