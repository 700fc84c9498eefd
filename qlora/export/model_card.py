"""The model card of an adapter or merged model: what it was made from, how, and how well it does.

Everything in it is read from the files that a run and a merge leave behind; what is not there is left out. Paths
of this machine are cut down to names, and secrets are taken out.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from qlora.config.lora import VARIANTS
from qlora.config.preferences import REFERRING, PreferenceConfig
from qlora.export.drift import Drift
from qlora.export.mixture import Mixture
from qlora.model.calibrate import Calibration
from qlora.quant.weight import QuantConfig
from qlora.report.curve import read_metrics
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG
from qlora.system.files import read_json
from qlora.system.redact import redact

REMEDY = "remove it, or write it again"
HYPERPARAMETERS = {  # section of run.json -> the settings to tell
    "lora": f"rank alpha dropout target_modules init {' '.join(reversed(VARIANTS))} bias modules_to_save",
    "train": "epochs batch_size grad_accum learning_rate schedule warmup_steps weight_decay seed",
    "data": "max_length train_on packing",
    "model": "use_4bit quant_type double_quant",
}


USE_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained({base}, quantization_config=quantization)
model = PeftModel.from_pretrained(model, {adapter})
tokenizer = AutoTokenizer.from_pretrained({base})"""
USE_MERGED = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({model})
tokenizer = AutoTokenizer.from_pretrained({model})"""
ADVICE_16BIT = (
    "Load it in 16 bits. The base's weights lie on the grid of 4-bit values, and an update smaller than half a "
    "step of that grid is rounded away when the merged weights are quantized to 4 bits again; for a light "
    "fine-tune that can be all of it. For 4-bit use merge with `--save-4bit`, or keep base and adapter apart."
)
TEMPLATE = """---
{{ card_data }}
---
# {{ title }}

{{ summary }}
{% for heading, rows in tables %}
## {{ heading }}

| | |
| --- | --- |
{% for key, value in rows -%}
| {{ key }} | {{ value }} |
{% endfor %}{% endfor %}
## Use

{{ advice }}

```python
{{ code }}
```
{{ after }}
"""


def make_card(directory: str | Path, exact_match: str | Path | None = None, repo: str = "REPO") -> str:
    """README.md, with the hub's metadata, for an output directory of `train.py` or `python -m qlora merge`.

    Args:
        exact_match: what `python -m eval exact_match --output` wrote.
        repo: the name to load it by.
    Raises:
        InputError: a file there that does not read.
    """
    from huggingface_hub import EvalResult

    directory = Path(directory)
    is_adapter = (directory / CONFIG).is_file()
    described = _read(directory / CONFIG)
    run = _read(directory / "run.json")
    base = public_name(described.get("base_model_name_or_path") or run.get("model", {}).get("model") or "")
    data = ", ".join(map(public_name, (run.get("data", {}).get("data") or "").split(",")))
    drift = _read(directory / "drift.json")
    results = _results(directory / "metrics.jsonl", _read(Path(exact_match)) if exact_match is not None else {})
    name = repo.rpartition("/")[2]
    tables = [("Training", _training(run, data, directory / "metrics.jsonl"))] if run else []
    if results:
        tables.append(("Results", [(label, f"{value:.4g}") for _, label, value in results]))
    if drift:
        rows = [(key.replace("_", " "), f"{value:.4g}") for key, value in drift.items() if _is_number(value)]
        tables.append(("Drift of the merged model from base + adapter", rows))
    what = "A LoRA adapter for" if is_adapter else "A LoRA adapter merged into"
    measured = [
        EvalResult("text-generation", "own", data or "held-out data", metric, value, metric_name=label)
        for metric, label, value in results
    ]
    return _fill(
        base,
        repo,
        is_adapter=is_adapter,
        title=name,
        summary=f"{what} {_span(base) if base else 'an unnamed base'}.",
        tables=tables,
        metadata={
            "datasets": [name for name in data.split(", ") if is_hub_id(name)] or None,
            "model_name": name if results else None,
            "eval_results": measured or None,
        },
    )


def make_merged_card(
    model: str,
    mixture: Mixture,
    base: str,
    save_4bit: bool,
    calibration: str | None,
    drift: Drift | None,
) -> str:
    """README.md of a merge: what was merged into what, stored how, and how far it drifts."""
    quant, name = mixture.quantization, public_name(model)
    kind = "original" if base == "original" else "dequantized"
    weights = f"{kind} ({quant.quant_type}, double quantization {quant.double_quant})" if quant else "16-bit"
    adapters = " and ".join(
        f"{factor:g} x a LoRA adapter (rank {saved.config.rank}, alpha {saved.config.alpha:g})"
        for saved, factor in zip(mixture.adapters, mixture.weights, strict=True)
    ).removeprefix("1 x ")
    adapters = adapters[0].upper() + adapters[1:]
    storage, advice = "saved in bf16", None
    if save_4bit:
        source = "a few built-in texts" if calibration is None else _span(Path(calibration).name)
        storage = f"back in 4 bits: the codes chosen by GPTQ on the base's scales, calibrated on {source}"
        advice = "It is a bitsandbytes checkpoint: transformers loads it in 4 bits automatically."
    return _fill(
        name,
        "PATH",
        is_adapter=False,
        title=f"{name}, fine-tuned",
        summary=f"{adapters} merged into the {weights} weights of {_span(name)}, {storage}.\n\n"
        f"Drift from base + adapter, in fp32: {'not measured' if drift is None else drift}.",
        advice=advice,
    )


def make_quantized_card(model: str, quant: QuantConfig, found: Calibration | None) -> str:
    """README.md of a base that was only quantized."""
    name = public_name(model)
    how = "the nearest of its 16 levels for each weight" if found is None else str(found)
    return _fill(
        name,
        "PATH",
        is_adapter=False,
        title=f"{name} in 4 bits",
        summary=f"{_span(name)}, its blocks' linear layers quantized to {quant.quant_type} "
        f"(double quantization {quant.double_quant}): {how}.",
        advice="It is a bitsandbytes checkpoint: transformers loads it in 4 bits automatically.",
    )


def _fill(
    base: str,
    load_by: str,
    *,
    is_adapter: bool,
    metadata: dict[str, Any] | None = None,
    advice: str | None = None,
    **texts: Any,
) -> str:
    """TEMPLATE with metadata and a way to load it.

    Args:
        load_by: name of the adapter or model in the code.
        texts: title, summary and tables of the template.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["qlora", "lora"] if is_adapter else ["qlora", "lora", "merged"],
        **(metadata or {}),
    )
    texts["title"] = _plain(texts["title"])
    texts["tables"] = [
        (heading, [(_cell(key), _cell(value)) for key, value in rows]) for heading, rows in texts.get("tables", [])
    ]
    base, load_by = _line(base) or "BASE", _line(load_by)
    if is_adapter:
        advice = "With PEFT, on the base in 4 bits as it was trained:"
        code = USE_ADAPTER.format(base=json.dumps(base), adapter=json.dumps(load_by))
        command = f'python train.py --model {shlex.quote(base)} --adapter DIRECTORY --prompt "Hello"'
        after = f"\nWith qlora, from a copy of the files:\n\n```sh\n{command}\n```"
    else:
        code, after = USE_MERGED.format(model=json.dumps(load_by)), ""
    texts |= {"advice": advice or ADVICE_16BIT, "code": code, "after": after}
    card = str(ModelCard.from_template(data, template_str=TEMPLATE, **texts))
    return redact(card.rstrip() + "\n")


def _line(text: str) -> str:
    """A name as one line of text, which no name ends early."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _plain(text: str) -> str:
    """A line of text that Markdown shows as it is: no HTML, link, picture or code of a name's."""
    escaped = re.sub(r"([\\`*\[\]])", r"\\\1", _line(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _span(name: str) -> str:
    """A name between backticks, without its own."""
    return f"`{_line(name).replace('`', chr(39))}`"


def _cell(text: str) -> str:
    """Text as a cell of a table."""
    return _line(text).replace("|", "\\|")


def public_name(name: str) -> str:
    """A hub id as it is; of a path on this machine the last part."""
    is_path = os.path.isabs(name) or "\\" in name or name.startswith(("~", ".")) or os.path.exists(name)
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_path or not is_hub_id(name) else name


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of one on the hub: owner/name."""
    return re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", name) is not None


def _read(file: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is no such file."""
    return read_json(file, REMEDY) if file.is_file() else {}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _results(metrics: Path, exact_match: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(metric, words, value) of what was measured."""
    found = []
    if metrics.is_file():
        try:
            training, held_out = read_metrics(metrics)
            if training:
                found.append(("loss", "Training loss of the last step", float(training[-1]["loss"])))
            if held_out:
                best = min(float(line["eval_loss"]) for line in held_out)
                found.append(("loss", "Held-out loss, lowest", best))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{metrics} has a line that does not read; {REMEDY}.") from error
    score = exact_match.get("exact_match")
    if _is_number(score):
        label = f"Exact match of {exact_match.get('examples', '?')} answers"
        found.append(("exact_match", label, float(score)))  # type: ignore[arg-type]
    return found


def _training(run: dict[str, Any], data: str, metrics: Path) -> list[tuple[str, str]]:
    """Data, length and hyperparameters of the run."""
    lines = read_metrics(metrics)[0] if metrics.is_file() else []
    tokens = sum(line.get("num_tokens", 0) for line in lines)
    targets = sum(line.get("target_tokens", 0) for line in lines)
    train = run.get("train", {})
    rows = [("data", _span(data))] if data else []
    if lines:
        examples = train.get("batch_size", 0) * train.get("grad_accum", 0)
        rows.append(("optimizer steps", f"{len(lines):,}, each of {examples} examples per device"))
        rows.append(("tokens", f"{tokens:,}, of which {targets:,} were learned"))
    rows += _objective(train)
    for section, names in HYPERPARAMETERS.items():
        rows += [(name, f"{run[section][name]}") for name in names.split() if name in run.get(section, {})]
    return rows


def _objective(train: dict[str, Any]) -> list[tuple[str, str]]:
    """The objective of preferences, its constants and its reference; nothing of a run that learned answers."""
    if train.get("objective", "sft") == "sft":
        return []
    own = PreferenceConfig(**{name: train[name] for name in vars(PreferenceConfig()) if name in train})
    rows = [("objective", own.objective), *((name, f"{value:g}") for name, value in own.constants().items())]
    if own.objective in REFERRING:
        adapter = own.reference_adapter
        rows.append(("reference", "the base" + (f" with {_span(public_name(adapter))}" if adapter else "")))
    return rows
