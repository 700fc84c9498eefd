"""The model card of an adapter or merged model: what it was made from, how, and how well it does.

Everything in it is read from the files that a run and a merge leave behind; what is not there is left out. Paths
of this machine are cut down to names, and secrets are taken out.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from qlora.adapters.peft_config import CONFIG
from qlora.config.lora import VARIANTS
from qlora.export.drift import Drift
from qlora.export.mixture import Mixture
from qlora.report.curve import read_metrics
from qlora.system.errors import InputError
from qlora.system.files import read_json
from qlora.system.redact import redact

REMEDY = "remove it, or write it again"
HYPERPARAMETERS = {  # section of run.json -> the settings to tell
    "lora": f"rank alpha dropout target_modules init {' '.join(reversed(VARIANTS))} bias modules_to_save",
    "train": "epochs batch_size grad_accum learning_rate schedule warmup_steps weight_decay seed",
    "data": "max_length train_on packing",
    "model": "use_4bit quant_type double_quant",
}


def make_card(directory: str | Path, exact_match: str | Path | None = None, repo: str = "REPO") -> str:
    """README.md, with the hub's metadata, for an output directory of `train.py` or `python -m qlora merge`.

    Args:
        exact_match: what `python -m eval exact_match --output` wrote.
        repo: the name to load it by.
    Raises:
        InputError: a file there that does not read.
    """
    from huggingface_hub import EvalResult, ModelCardData

    directory = Path(directory)
    is_adapter = (directory / CONFIG).is_file()
    described = _read(directory / CONFIG)
    run = _read(directory / "run.json")
    base = public_name(described.get("base_model_name_or_path") or run.get("model", {}).get("model") or "")
    data = ", ".join(map(public_name, (run.get("data", {}).get("data") or "").split(",")))
    drift = _read(directory / "drift.json")
    results = _results(directory / "metrics.jsonl", _read(Path(exact_match)) if exact_match is not None else {})
    name = repo.rpartition("/")[2]
    card = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        datasets=[name for name in data.split(", ") if is_hub_id(name)] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["qlora", "lora"] if is_adapter else ["qlora", "lora", "merged"],
        model_name=name if results else None,
        eval_results=[
            EvalResult("text-generation", "own", data or "held-out data", metric, value, metric_name=label)
            for metric, label, value in results
        ]
        or None,
    )
    what = "A LoRA adapter for" if is_adapter else "A LoRA adapter merged into"
    parts = [f"---\n{card.to_yaml()}\n---\n# {name}", f"{what} `{base or 'a base that it does not name'}`."]
    if run:
        parts.append(_training(run, data, directory / "metrics.jsonl"))
    if results:
        parts.append(_table("Results", [(label, f"{value:.4g}") for _, label, value in results]))
    if drift:
        rows = [(key.replace("_", " "), f"{value:.4g}") for key, value in drift.items() if _is_number(value)]
        parts.append(_table("Drift of the merged model from base + adapter", rows))
    parts.append("## Use\n\n" + (_use_adapter(base, repo) if is_adapter else _use_merged(repo)))
    return redact("\n\n".join(parts) + "\n")


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


def _training(run: dict[str, Any], data: str, metrics: Path) -> str:
    """Data, length and hyperparameters of the run."""
    lines = read_metrics(metrics)[0] if metrics.is_file() else []
    tokens = sum(line.get("num_tokens", 0) for line in lines)
    targets = sum(line.get("target_tokens", 0) for line in lines)
    train = run.get("train", {})
    rows = [("data", f"`{data}`")] if data else []
    if lines:
        examples = train.get("batch_size", 0) * train.get("grad_accum", 0)
        rows.append(("optimizer steps", f"{len(lines):,}, each of {examples} examples per device"))
        rows.append(("tokens", f"{tokens:,}, of which {targets:,} were learned"))
    for section, names in HYPERPARAMETERS.items():
        rows += [(name, f"{run[section][name]}") for name in names.split() if name in run.get(section, {})]
    return _table("Training", rows)


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"## {title}\n", "| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)])


def _use_adapter(base: str, repo: str) -> str:
    return f"""With PEFT, on the base in 4 bits as it was trained:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained("{base or "BASE"}", quantization_config=quantization)
model = PeftModel.from_pretrained(model, "{repo}")
tokenizer = AutoTokenizer.from_pretrained("{base or "BASE"}")
```

With qlora, from a copy of the files:

```sh
python train.py --model {base or "BASE"} --adapter DIRECTORY --prompt "Hello"
```"""


def _use_merged(repo: str) -> str:
    return f"""Load it in 16 bits: quantizing it to 4 bits again can round the fine-tune away.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```"""


def make_merged_card(
    model: str,
    mixture: Mixture,
    base: str,
    save_4bit: bool,
    calibration: str | None,
    drift: Drift | None,
) -> str:
    quant = mixture.quantization
    base_text = f"{base} ({quant.quant_type}, double quantization {quant.double_quant})" if quant else "16-bit"
    name = redact(Path(model).name if Path(model).exists() else model)
    drift_text = "not measured" if drift is None else str(drift)
    adapters = " and ".join(
        f"{factor:g} x a LoRA adapter (rank {saved.config.rank}, alpha {saved.config.alpha:g})"
        for saved, factor in zip(mixture.adapters, mixture.weights, strict=True)
    ).removeprefix("1 x ")
    adapters = adapters[0].upper() + adapters[1:]
    if save_4bit:
        source = "a few built-in texts" if calibration is None else f"`{redact(Path(calibration).name)}`"
        storage = f"back in 4 bits: the codes chosen by GPTQ on the base's scales, calibrated on {source}"
        advice = "It is a bitsandbytes checkpoint: transformers loads it in 4 bits by itself."
    else:
        storage = "saved in bf16"
        advice = (
            "Load it in 16 bits. The base's weights lie on the grid of 4-bit values, and an update smaller than "
            "half a step of that grid is rounded away when the merged weights are quantized to 4 bits again; for "
            "a light fine-tune that can be all of it. For 4-bit use merge with `--save-4bit`, or keep base and "
            "adapter apart."
        )
    return f"""---
library_name: transformers
tags: [qlora, lora, merged]
---
# {name}, fine-tuned

{adapters} merged into the {base_text} weights of `{name}`, {storage}.

Drift from base + adapter, in fp32: {drift_text}.

{advice}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""
