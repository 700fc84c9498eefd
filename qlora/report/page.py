"""Write report.html: everything known about a run, on one self-contained page.

The page is made from the files of a run, so it can be made of any run at any time; missing files are noted or left
out. The template, page.html, escapes text from the data.
"""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlora.config.lora import VARIANTS
from qlora.report.answers import MOST_ROWS, OPEN_PROMPTS, UNPRINTABLE, cut, short_count, trace_samples, words
from qlora.report.charts import smooth
from qlora.report.figures import draw_charts
from qlora.report.run import Run, is_number, read_run
from qlora.system.errors import InputError
from qlora.system.file_names import WEIGHTS
from qlora.system.files import new_file
from qlora.system.redact import redact

NAME = "report.html"
GIB = 2**30
ORIGIN = {"device": "device", "num_processes": "processes"}  # fact -> label
EXAMPLES = {
    "num_train": "training examples",
    "num_held_out": "held-out examples",
    "num_tokens": "training tokens",
    "num_targets": "learned tokens",
}


class Tile(NamedTuple):
    """A key number with its label and a note."""

    label: str
    value: str
    note: str = ""


def write_report(directory: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run atomically; returns its path.

    Args:
        directory: the --output-dir of a run, finished or not.
        output: output file; default: report.html in `directory`.
    Raises:
        InputError: there is no run, or `output` exists and is not a report.
    """
    directory = Path(directory)
    target = directory / NAME if output is None else Path(output)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; pass the --output-dir of a run.")
    if target.exists() and not (target.is_file() and target.read_bytes().startswith(b"<!doctype html")):
        raise InputError(f"--output {target} exists and is not a report; remove it or choose another.")
    page = render_report(read_run(directory))
    with new_file(target) as file:
        file.write_text(page, "utf-8")
    return target


def render_report(run: Run) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def clean(value: Any) -> Any:
        """Clean any text for the page; escaping follows."""
        return (
            UNPRINTABLE.sub("\ufffd", redact(value)) if type(value) is str else value
        )  # a drawing is Markup, not str

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = Markup  # only for what report/charts.py drew
    prompts, num_prompts = trace_samples(run.samples)
    changed, unchanged = list_settings(run.settings)
    return environment.get_template("page.html").render(
        name=run.directory.resolve().name,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        run=run,
        verdict=summarize(run),
        tiles=list_tiles(run),
        charts=draw_charts(run),
        memory=compare_memory(run),
        prompts=prompts,
        num_prompts=num_prompts,
        num_open=OPEN_PROMPTS,
        changed=changed,
        unchanged=unchanged,
        adapter=describe_adapter(run),
        origin=describe_origin(run),
        command=command_of(run),
        most_rows=MOST_ROWS,
    )


# ---- in words -----------------------------------------------------------------------------------------------


def summarize(run: Run) -> list[str]:
    """What the numbers show and what they leave open, one sentence each."""
    said = []
    steps, losses = run.held_out()
    if not run.training:
        said.append("No step has finished yet.")
    if len(losses) > 1:
        low = losses.argmin()
        verb = "fell" if losses[-1] < losses[0] else "rose" if losses[-1] > losses[0] else "went"
        said.append(
            f"The held-out loss {verb} from {losses[0]:.3f} (step {steps[0]:,}) to {losses[-1]:.3f} "
            f"(step {steps[-1]:,})."
        )
        if losses[-1] > losses[low] and low > 0:
            said.append(f"Its lowest was {losses[low]:.3f} at step {steps[low]:,}; it has risen since then.")
    elif len(losses):
        said.append(f"The held-out loss is {losses[0]:.3f} (step {steps[0]:,}); one evaluation shows no trend.")
    elif run.training:
        said.append("There was no evaluation on held-out data, so performance on new data is unknown.")
    for name in run.scores:
        steps, scores = run.held_out(name)
        before = "is" if scores[0] == scores[-1] else f"went from {scores[0]:.3g} to"
        said.append(f"{words(name).capitalize()} {before} {scores[-1]:.3g} (step {steps[-1]:,}).")
    if run.skipped:
        number = len(run.skipped)
        which = "1 step was" if number == 1 else f"{number:,} steps were"
        said.append(f"{which} skipped: the loss was not a finite number.")
    return said


def list_tiles(run: Run) -> list[Tile]:
    """The key numbers."""
    tiles = []
    steps, losses = run.held_out()
    if len(losses):
        low = f"lowest {losses.min():.3f}, step {steps[losses.argmin()]:,}"
        note = low if len(losses) > 1 else f"step {steps[0]:,}"
        tiles.append(Tile("Held-out loss", f"{losses[-1]:.3f}", note))
    for name in run.scores:
        steps, scores = run.held_out(name)
        note = f"highest {scores.max():.3g}, step {steps[scores.argmax()]:,}"
        tiles.append(Tile(words(name), f"{scores[-1]:.3g}", note))
    steps, losses = run.column("loss")
    if len(losses):
        smoothed, width = smooth(losses)
        note = f"mean of the last {width:,}; first {losses[0]:.3f}" if width > 1 else f"first {losses[0]:.3f}"
        tiles.append(Tile("Training loss", f"{smoothed[-1]:.3f}", note if len(losses) > 1 else "one step"))
    total = run.total_steps
    tiles.append(Tile("Steps", f"{run.last_step:,}", f"of {total:,}" if total else ""))
    tokens, targets, speeds, peaks = (
        run.column(name)[1] for name in ("num_tokens", "target_tokens", "tokens_per_second", "peak_memory_gib")
    )
    if len(tokens):
        tiles.append(Tile("Tokens", short_count(tokens.sum()), f"{short_count(targets.sum())} of them learned"))
    if len(speeds):
        seconds = (
            f"; {span((tokens / speeds).sum())} in steps" if len(tokens) == len(speeds) and speeds.all() else ""
        )
        tiles.append(Tile("Tokens/s", f"{np.median(speeds):,.0f}", f"median{seconds}"))
    if len(peaks):
        plan = sum(memory_plan(run).values())
        tiles.append(
            Tile("Peak memory", f"{peaks.max():.2f} GiB", f"{plan / GIB:.2f} GiB planned" if plan else "")
        )
    trainable, parameters = run.fact("parameters", "trainable"), run.fact("parameters", "total")
    if trainable and parameters:
        share = f"{trainable / parameters:.3%} of {short_count(parameters)}"
        tiles.append(Tile("Trained parameters", short_count(trainable), share))
    return tiles


def span(seconds: float) -> str:
    """Format a duration in its two largest units."""
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def memory_plan(run: Run) -> dict[str, int]:
    plan = run.facts.get("memory_plan")
    return {k: int(v) for k, v in plan.items() if is_number(v) and v >= 0} if isinstance(plan, dict) else {}


def compare_memory(run: Run) -> list[tuple[str, str, float, str]]:
    """Bars of planned and measured memory: (name, formatted size, percent of the longest, kind)."""
    plan, peaks = memory_plan(run), run.column("peak_memory_gib")[1]
    bars = [(words(name), size / GIB, "part") for name, size in plan.items()]
    if plan:
        bars.append(("planned total", sum(plan.values()) / GIB, "total"))
    if len(peaks):
        bars.append(("measured peak", float(peaks.max()), "measured"))
    longest = max((size for _, size, _ in bars), default=0) or 1
    return [
        (name, f"{size:.2f} GiB" if size >= 0.1 else f"{size * 1024:.3g} MiB", 100 * size / longest, kind)
        for name, size, kind in bars
    ]


# ---- settings and origin ------------------------------------------------------------------------------------


def list_settings(settings: dict[str, dict[str, Any]]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """((flag, value, default) of changed settings, (flag, value) of the others)."""
    from qlora.config.run import RunConfig

    defaults = RunConfig().saved()
    changed: list[tuple[str, ...]] = []
    unchanged: list[tuple[str, ...]] = []
    for section, values in settings.items():
        known = defaults.get(section)
        for name, value in values.items():
            flag, shown = "--" + name.replace("_", "-"), show(value)
            if not isinstance(known, dict) or name not in known:
                changed.append((flag, shown, "unknown"))
            elif show(known[name]) != shown:
                changed.append((flag, shown, show(known[name])))
            else:
                unchanged.append((flag, shown))
    return changed, unchanged


def show(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value)) or "—"
    return "—" if value is None or value == "" else str(value)


def command_of(run: Run) -> str:
    command = run.facts.get("command")
    return command if isinstance(command, str) else ""


def describe_origin(run: Run) -> list[tuple[str, str]]:
    """When, where and with which versions the run took place."""
    facts, versions = run.facts, run.facts.get("versions")
    rows = [("started", show(facts["started"])[:16].replace("T", " "))] if "started" in facts else []
    rows += [(name, show(facts[key])) for key, name in ORIGIN.items() if key in facts]
    counts = {name: run.fact("examples", key) for key, name in EXAMPLES.items()}
    rows += [(name, f"{count:,}") for name, count in counts.items() if count is not None]
    examples = facts.get("examples")
    notes = examples.get("notes") if isinstance(examples, dict) else None
    rows += [("data", cut(show(note))) for note in notes[:MOST_ROWS]] if isinstance(notes, list) else []
    return rows + (
        [(name, show(version)) for name, version in versions.items()] if isinstance(versions, dict) else []
    )


def describe_adapter(run: Run) -> list[tuple[str, str]]:
    """Describe the saved adapter; empty before the first save."""
    from safetensors import SafetensorError, safe_open

    adapter, rows = run.adapter, []
    if not adapter:
        return []
    ways = [name for key, name in VARIANTS.items() if adapter.get(key) is True]
    kind = " + ".join(ways) or {"ADALORA": "AdaLoRA"}.get(str(adapter.get("peft_type")), "LoRA")
    rows.append(("variant", kind))
    names = {"base_model_name_or_path": "base", "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
             "target_modules": "target modules", "modules_to_save": "fully trained"}  # fmt: skip
    rows += [(name, cut(show(adapter[key]))) for key, name in names.items() if adapter.get(key)]
    file = run.directory / WEIGHTS
    try:
        with safe_open(file, framework="numpy") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118  (no mapping)
        rows.append(("saved", f"{sum(map(math.prod, shapes)):,} parameters in {len(shapes):,} tensors"))
        rows.append(("size", f"{file.stat().st_size / 1e6:,.1f} MB"))
    except (OSError, SafetensorError) as error:
        rows.append(("saved", f"{WEIGHTS} cannot be read ({error})"))
    return rows
