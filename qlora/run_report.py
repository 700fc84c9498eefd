"""report.html: all that is known of a run, on one page that needs nothing but itself.

All comes from the files that a run leaves behind, so that a page can be made of any run, at any moment; what is
missing there is said or left out. What came from data is escaped by the template, run_report.html.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from qlora.charts import Curve, Numbers, draw_curves, draw_histogram, smooth
from qlora.errors import InputError
from qlora.files import new_file
from qlora.redact import redact
from qlora.run_files import ADAPTER, Run, is_number, read_run

T = TypeVar("T")
NAME = "report.html"
GIB = 2**30
MOST_ROWS, MOST_PROMPTS, MOST_ANSWERS, MOST_CHARACTERS = 100, 12, 8, 1500  # of what is shown; the rest is counted
OPEN_PROMPTS = 4  # the others' answers are folded away
WIDE = (860, 260)  # view box of the loss on a large screen
ORIGIN = {"device": "device", "num_processes": "processes"}  # of the facts, and how to call them
EXAMPLES = {
    "num_train": "training examples",
    "num_held_out": "held-out examples",
    "num_tokens": "training tokens",
    "num_targets": "learned tokens",
}
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # none belongs in HTML


class Tile(NamedTuple):
    """A figure that matters, with a word on it."""

    label: str
    value: str
    note: str = ""


@dataclass
class Table:
    """Numbers behind a chart; of many rows, some, evenly."""

    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass
class Chart:
    """One figure of the page.

    Attributes:
        label: its main numbers in words; the text for those who do not see it.
        svgs: one drawing, or a wide and a narrow one.
        key: (style, words) of each curve, where there are several.
    """

    title: str
    label: str
    svgs: list[str]
    tables: list[Table]
    key: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Answer:
    """What the model said at one or more evaluations in a row.

    Attributes:
        parts: (text, whether it differs from the answer before).
        is_expected: None where nothing is known of what to expect.
    """

    steps: str
    parts: list[tuple[str, bool]]
    is_expected: bool | None


@dataclass
class Prompt:
    """A fixed prompt and how the answers to it changed.

    Attributes:
        left_out: different answers that are not shown.
    """

    text: str
    expected: str | None
    answers: list[Answer]
    left_out: int


def write_report(directory: str | Path, output: str | Path | None = None) -> Path:
    """Make the page of a run, whole or not at all; returns where it is.

    Args:
        directory: the --output-dir of a run, finished or not.
        output: where to write; by default report.html in it.
    Raises:
        InputError: there is no run, or `output` is something else than a report.
    """
    directory = Path(directory)
    target = directory / NAME if output is None else Path(output)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; pass the --output-dir of a run.")
    if target.exists() and not (target.is_file() and target.read_bytes().startswith(b"<!doctype html")):
        raise InputError(f"--output {target} exists and is no report; remove it or choose another.")
    page = render_report(read_run(directory))
    with new_file(target) as file:
        file.write_text(page, "utf-8")
    return target


def render_report(run: Run) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def clean(value: Any) -> Any:
        """Any text on its way into the page; escaping follows."""
        return UNPRINTABLE.sub("\ufffd", redact(value)) if type(value) is str else value  # no str is a drawing

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = Markup  # only for what charts.py drew
    prompts, num_prompts = trace_samples(run.samples)
    changed, unchanged = list_settings(run.settings)
    return environment.get_template("run_report.html").render(
        name=run.directory.resolve().name,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        run=run,
        verdict=judge(run),
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


def judge(run: Run) -> list[str]:
    """What the numbers say, one sentence each, and what they do not."""
    said = []
    steps, losses = run.held_out()
    if not run.training:
        said.append("No step has been finished yet.")
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
        said.append("Nothing was evaluated on held-out data: how well it does on anything new is not known.")
    for name in run.scores:
        steps, scores = run.held_out(name)
        before = "is" if scores[0] == scores[-1] else f"went from {scores[0]:.3g} to"
        said.append(f"{words(name).capitalize()} {before} {scores[-1]:.3g} (step {steps[-1]:,}).")
    if run.skipped:
        number = len(run.skipped)
        which = "1 step was" if number == 1 else f"{number:,} steps were"
        said.append(f"{which} skipped: the loss was not a finite number.")
    return said


def words(name: str) -> str:
    return name.replace("_", " ")


def list_tiles(run: Run) -> list[Tile]:
    """The numbers to see first."""
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
        tiles.append(Tile("Tokens", shorten(tokens.sum()), f"{shorten(targets.sum())} of them learned"))
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
        share = f"{trainable / parameters:.3%} of {shorten(parameters)}"
        tiles.append(Tile("Trained parameters", shorten(trainable), share))
    return tiles


def shorten(count: float) -> str:
    """1,234 as it is, then 123 k, 4.5 M, 6.74 B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= max(1e4, 0.9995 * unit):
            return f"{count / unit:.3g} {name}" if count < 999.5 * unit else f"{count / unit:,.0f} {name}"
    return f"{count:,.0f}"


def span(seconds: float) -> str:
    """A time in its two largest units."""
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


# ---- charts -------------------------------------------------------------------------------------------------


def draw_charts(run: Run) -> list[Chart]:
    """Those for which there is more than one point."""
    charts = [
        draw_loss(run),
        *(_draw_score(run, name) for name in run.scores),
        _draw_column(run, "learning_rate", "Learning rate"),
        _draw_column(run, "grad_norm", "Gradient norm, before clipping", is_noisy=True),
        _draw_column(run, "tokens_per_second", "Tokens per second", is_noisy=True),
        _draw_lengths(run),
    ]
    return [chart for chart in charts if chart is not None]


def draw_loss(run: Run) -> Chart | None:
    """Training loss, each step and smoothed, and held-out loss."""
    steps, losses = run.column("loss")
    eval_steps, eval_losses = run.held_out()
    if max(len(losses), len(eval_losses)) < 2:
        return None
    curves, key, tables, said = [], [], [], []
    if len(losses):
        smoothed, width = smooth(losses)
        style = "each" if width > 1 else "smooth"
        curves.append(Curve(steps, losses, style))
        key.append((style, "training, each step"))
        if width > 1:
            curves.append(Curve(steps, smoothed, "smooth"))
            key.append(("smooth", f"training, mean of {width:,} steps"))
        said.append(f"training {losses[0]:.3f} at step {steps[0]:,}, {smoothed[-1]:.3f} at step {steps[-1]:,}")
        tables.append(_table("Training", ("step", "loss", f"mean of {width:,}"), steps, losses, smoothed))
    if len(eval_losses):
        curves.append(Curve(eval_steps, eval_losses, "held-out"))
        key.append(("held-out", "held out"))
        said.append(f"held out {_describe(eval_steps, eval_losses)}")
        tables.append(_table("Held out", ("step", "loss"), eval_steps, eval_losses))
    label = f"Loss by optimizer step: {'; '.join(said)}"
    svgs = [draw_curves("loss-wide", label, curves, WIDE, None), draw_curves("loss", label, curves, bottom=None)]
    return Chart("Loss per target token, in nats", label, svgs, tables, key)


def _draw_score(run: Run, name: str) -> Chart | None:
    steps, scores = run.held_out(name)
    if len(scores) < 2:
        return None
    title = f"{words(name).capitalize()}, held out"
    label = f"{title}: {_describe(steps, scores)}"
    top = 1.02 if 0 <= scores.min() <= scores.max() <= 1 else None
    svg = draw_curves(f"score-{name}", label, [Curve(steps, scores, "held-out")], top=top)
    return Chart(title, label, [svg], [_table("", ("step", words(name)), steps, scores)])


def _draw_column(run: Run, name: str, title: str, is_noisy: bool = False) -> Chart | None:
    """One number of the training lines; a noisy one also smoothed."""
    steps, values = run.column(name)
    if len(values) < 2:
        return None
    curves, key = [Curve(steps, values, "smooth")], [("smooth", "each step")]
    smoothed, width = smooth(values)
    if is_noisy and width > 1:
        curves = [Curve(steps, values, "each"), Curve(steps, smoothed, "smooth")]
        key = [("each", "each step"), ("smooth", f"mean of {width:,}")]
    limit = run.setting("train", "max_grad_norm")
    if name == "grad_norm" and is_number(limit) and 0 < limit < 3 * values.max():
        curves.append(Curve([steps[0], steps[-1]], [limit, limit], "limit"))
        key.append(("limit", f"clipped to {limit:g}"))
    label = f"{title} by optimizer step: {_describe(steps, values)}, median {np.median(values):.4g}"
    table = _table("", ("step", words(name)), steps, values)
    return Chart(title, label, [draw_curves(name, label, curves)], [table], key if len(key) > 1 else [])


def _draw_lengths(run: Run) -> Chart | None:
    """How long the training examples are."""
    examples = run.facts.get("examples")
    lengths = examples.get("lengths") if isinstance(examples, dict) else None
    edges, counts = (lengths.get(k) if isinstance(lengths, dict) else None for k in ("edges", "counts"))
    if not (isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1 > 1):
        return None
    if not all(map(is_number, edges + counts)) or sum(counts) <= 0 or edges != sorted(set(edges)):
        return None
    top = counts.index(max(counts))
    label = (
        f"Length of {sum(counts):,.0f} examples, in tokens: {edges[0]:,.0f} to {edges[-1]:,.0f}, most "
        f"({counts[top]:,.0f}) between {edges[top]:,.0f} and {edges[top + 1]:,.0f}"
    )
    table = _table("", ("from", "to, not included", "examples"), edges[:-1], edges[1:], counts)
    return Chart(
        "Length of the examples, in tokens", label, [draw_histogram("lengths", label, edges, counts)], [table]
    )


def _describe(steps: np.ndarray, values: np.ndarray) -> str:
    """First, last, lowest and highest, in words."""
    low, high = values.argmin(), values.argmax()
    return (
        f"{values[0]:.4g} at step {steps[0]:,}, {values[-1]:.4g} at step {steps[-1]:,}, lowest {values[low]:.4g} "
        f"(step {steps[low]:,}), highest {values[high]:.4g} (step {steps[high]:,})"
    )


def _table(caption: str, columns: tuple[str, ...], *values: Numbers) -> Table:
    """Args: values: those of each column."""
    number = len(values[0])
    places = choose_evenly(range(number), MOST_ROWS)
    left_out = f"{len(places):,} of {number:,} rows; metrics.jsonl has all" if len(places) < number else ""
    rows = [tuple(_cell(column[place]) for column in values) for place in places]
    return Table(", ".join(filter(None, (caption, left_out))), columns, rows)


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, (int, np.integer)) else f"{value:.6g}"


def choose_evenly(items: Sequence[T], most: int) -> Sequence[T]:
    """At most `most` of them, the first and the last always."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def memory_plan(run: Run) -> dict[str, int]:
    plan = run.facts.get("memory_plan")
    return {k: int(v) for k, v in plan.items() if is_number(v) and v >= 0} if isinstance(plan, dict) else {}


def compare_memory(run: Run) -> list[tuple[str, str, float, str]]:
    """Bars of planned and measured memory: (name, size in words, per cent of the longest, kind)."""
    plan, peaks = memory_plan(run), run.column("peak_memory_gib")[1]
    bars = [(words(name), size / GIB, "part") for name, size in plan.items()]
    if plan:
        bars.append(("planned in all", sum(plan.values()) / GIB, "total"))
    if len(peaks):
        bars.append(("measured peak", float(peaks.max()), "measured"))
    longest = max((size for _, size, _ in bars), default=0) or 1
    return [
        (name, f"{size:.2f} GiB" if size >= 0.1 else f"{size * 1024:.3g} MiB", 100 * size / longest, kind)
        for name, size, kind in bars
    ]


# ---- samples ------------------------------------------------------------------------------------------------


def trace_samples(samples: list[dict[str, Any]]) -> tuple[list[Prompt], int]:
    """(the first prompts with what was said to them, the number of all)."""
    by_prompt: dict[str, dict[int, dict[str, Any]]] = {}
    for sample in samples:  # of a step done again the last one counts
        by_prompt.setdefault(sample["prompt"], {})[sample["step"]] = sample
    shown = list(by_prompt.items())[:MOST_PROMPTS]
    return [_trace(prompt, [said[step] for step in sorted(said)]) for prompt, said in shown], len(by_prompt)


def _trace(prompt: str, samples: list[dict[str, Any]]) -> Prompt:
    """The answers to one prompt, in the order of their steps; the same ones in a row as one."""
    expected = next((s["expected"] for s in samples if isinstance(s.get("expected"), str)), None)
    runs = [list(same) for _, same in groupby(samples, key=lambda sample: sample["completion"])]
    answers: list[Answer] = []
    before: str | None = None
    for same in choose_evenly(runs, MOST_ANSWERS):
        text, first, last = same[0]["completion"], same[0]["step"], same[-1]["step"]
        steps = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
        is_expected = None if expected is None else text.strip() == expected.strip()
        answers.append(Answer(steps, mark_changes(before, cut(text)), is_expected))
        before = cut(text)
    return Prompt(cut(prompt), None if expected is None else cut(expected), answers, len(runs) - len(answers))


def cut(text: str) -> str:
    left = len(text) - MOST_CHARACTERS
    return text if left <= 0 else f"{text[:MOST_CHARACTERS]} … ({left:,} more characters)"


def mark_changes(before: str | None, now: str) -> list[tuple[str, bool]]:
    """`now` in parts, with whether each is new against `before`, word by word; put together they are `now`."""
    if before is None:
        return [(now, False)] if now else []
    old, new = (re.findall(r"\s*\S+|\s+$", text) for text in (before, now))
    parts = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, old, new).get_opcodes():
        text = "".join(new[start:end])
        bare = text.lstrip()
        is_new = kind != "equal"
        parts += [(text[: len(text) - len(bare)], False), (bare, True)] if is_new else [(text, False)]
    return [part for part in parts if part[0]]


# ---- settings and origin ------------------------------------------------------------------------------------


def list_settings(settings: dict[str, dict[str, Any]]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """((flag, value, default) of those that differ from it, (flag, value) of the others)."""
    from qlora.config import RunConfig

    defaults = asdict(RunConfig())
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
    """When, where and with what it ran."""
    facts, versions = run.facts, run.facts.get("versions")
    rows = [("started", show(facts["started"])[:16].replace("T", " "))] if "started" in facts else []
    rows += [(name, show(facts[key])) for key, name in ORIGIN.items() if key in facts]
    counts = {name: run.fact("examples", key) for key, name in EXAMPLES.items()}
    rows += [(name, f"{count:,}") for name, count in counts.items() if count is not None]
    return rows + (
        [(name, show(version)) for name, version in versions.items()] if isinstance(versions, dict) else []
    )


def describe_adapter(run: Run) -> list[tuple[str, str]]:
    """What was saved; nothing before the first time."""
    from safetensors import SafetensorError, safe_open

    adapter, rows = run.adapter, []
    if not adapter:
        return []
    ways = [name for key, name in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA")) if adapter.get(key) is True]
    kind = " + ".join(ways) or {"ADALORA": "AdaLoRA"}.get(str(adapter.get("peft_type")), "LoRA")
    rows.append(("variant", kind))
    names = {"base_model_name_or_path": "base", "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
             "target_modules": "target modules", "modules_to_save": "trained whole"}  # fmt: skip
    rows += [(name, cut(show(adapter[key]))) for key, name in names.items() if adapter.get(key)]
    file = run.directory / ADAPTER
    try:
        with safe_open(file, framework="numpy") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118  (no mapping)
        rows.append(("saved", f"{sum(map(math.prod, shapes)):,} numbers in {len(shapes):,} tensors"))
        rows.append(("size", f"{file.stat().st_size / 1e6:,.1f} MB"))
    except (OSError, SafetensorError) as error:
        rows.append(("saved", f"{ADAPTER} does not read ({error})"))
    return rows
