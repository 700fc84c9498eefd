"""Every setting of a run, each with its one default. Entry points unpack these; the library takes values.

The command line is generated from these classes (field `max_length` is the flag `--max-length`), a
`--config` file holds the same flat names, and the comment on a field is its help text.
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from qlora.errors import InputError

T = TypeVar("T")
ComputeDtype = Literal["auto", "float32", "bfloat16"]
# Text with commas on the command line; a list, or a mapping to numbers, in YAML and Python.
LIST_FIELDS, PATTERN_FIELDS = (
    ("target_modules", "modules_to_save", "new_tokens", "data", "data_weights", "report_to"),
    ("rank_pattern", "alpha_pattern", "columns"),
)


@dataclass
class ModelConfig:
    """The frozen base."""

    model: str | None = None
    """A Hugging Face directory, a hub id, or a .gguf file."""
    use_4bit: bool = True
    """Quantize the base to 4 bits; --no-4bit loads it in bf16 for plain LoRA."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 levels of a 4-bit weight: normal quantiles (nf4) or a tiny float (fp4)."""
    double_quant: bool = True
    """Quantize the block scales too."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of activations; auto picks the faster one on this device by measuring."""
    cache: bool = True
    """Keep the quantized base on disk ($QLORA_CACHE, else ~/.cache/qlora) for the next start."""


@dataclass
class LoRAConfig:
    """The adapter: y = W x + (alpha / rank) B A x."""

    rank: int = 8
    """Rows of A and columns of B."""
    alpha: float = 16.0
    """Scale of the update, as alpha / rank."""
    dropout: float = 0.0
    """Probability of dropping an input of A while training."""
    target_modules: str = "q_proj,v_proj"
    """Linear layers to adapt: names separated by commas, or all-linear."""
    layers: str = ""
    """Adapt only these decoder layers, counted from 0: 8-15, or 0,2,4-7; all if empty."""
    rank_pattern: str = ""
    """Other ranks for some layers, as name=rank,...: a name's end or a pattern, the first that fits wins."""
    alpha_pattern: str = ""
    """Other alphas for some layers, as name=alpha,..."""
    adapter_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of A and B; the optimizer always works in fp32."""
    init: Literal["kaiming", "gaussian", "pissa", "loftq"] = "kaiming"
    """How A and B start: with B at zero, or (pissa) from the weight's largest singular values, or (loftq) from its
    quantization error."""
    loftq_iterations: int = 1
    """Rounds of quantizing and refitting under --init loftq; with one the base stays as it is."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), so that large ranks learn too (rsLoRA)."""
    use_dora: bool = False
    """Learn each output's magnitude apart from its direction (DoRA)."""
    use_adalora: bool = False
    """Move the ranks to the layers that need them while training (AdaLoRA); --rank is where they start."""
    adalora_target_rank: int = 0
    """Mean rank of a layer at the end of AdaLoRA; 0 = half of --rank."""
    adalora_start: float = 0.1
    """Share of the steps after which AdaLoRA begins to take ranks away."""
    adalora_end: float = 0.7
    """Share of the steps after which the ranks stay as they are."""
    adalora_interval: int = 10
    """Steps between two choices of the triplets to keep."""
    lora_plus_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+; its authors take 16)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Train no biases, all of the model's, or those of the adapted layers."""
    modules_to_save: str = ""
    """Modules to train whole: embed_tokens, lm_head (either means both where they are tied), norm, ..."""
    new_tokens: str = ""
    """Tokens to add to the vocabulary, separated by commas; embeddings and head then train, too."""

    def __post_init__(self) -> None:
        _join_fields(self)
        if self.rank < 1:
            raise InputError(f"rank is {self.rank}; give --rank a whole number of 1 or more.")
        if not 0 < self.alpha < math.inf:
            raise InputError(f"alpha is {self.alpha}; give --alpha a number above 0.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; give --dropout a number from 0 up to, not including, 1.")
        for name, value, choices in (
            ("adapter_dtype", self.adapter_dtype, ("bfloat16", "float32")),
            ("init", self.init, ("kaiming", "gaussian", "pissa", "loftq")),
            ("bias", self.bias, ("none", "all", "lora_only")),
        ):
            if value not in choices:
                raise InputError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")
        if self.loftq_iterations < 1:
            raise InputError(f"loftq_iterations is {self.loftq_iterations}; give --loftq-iterations 1 or more.")
        if self.adalora_target_rank < 0 or self.adalora_target_rank > self.rank:
            raise InputError(
                f"adalora_target_rank is {self.adalora_target_rank}; give --adalora-target-rank a number from 0 "
                f"to --rank, {self.rank}."
            )
        if not 0 < self.lora_plus_ratio < math.inf:
            raise InputError(
                f"lora_plus_ratio is {self.lora_plus_ratio}; give --lora-plus-ratio a number above 0."
            )
        if not 0 <= self.adalora_start < self.adalora_end <= 1:
            raise InputError(
                f"adalora_start is {self.adalora_start} and adalora_end {self.adalora_end}; give shares of "
                "the steps from 0 to 1, the start first."
            )
        if self.adalora_interval < 1:
            raise InputError(f"adalora_interval is {self.adalora_interval}; give --adalora-interval 1 or more.")
        others = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
        if self.use_adalora and (self.init != "kaiming" or any(getattr(self, name) for name in others)):
            raise InputError(f"use_adalora sets start, ranks and scale; leave out init, {', '.join(others)}.")
        _ = self.layer_numbers, self.rank_patterns, self.alpha_patterns  # each raises if it does not read

    @property
    def targets(self) -> list[str]:
        """The target names, split and stripped."""
        return _split(self.target_modules)

    @property
    def trained_modules(self) -> list[str]:
        """The names of modules that train whole."""
        return _split(self.modules_to_save)

    @property
    def added_tokens(self) -> list[str]:
        """The tokens to add to the vocabulary."""
        return _split(self.new_tokens)

    @property
    def layer_numbers(self) -> list[int] | None:
        """The decoder layers to adapt; None = all."""
        numbers: list[int] = []
        for part in _split(self.layers):
            match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if last < first:
                raise InputError(f"layers is {self.layers!r}; give --layers numbers and ranges, such as 0,2,4-7.")
            numbers += range(first, last + 1)
        return numbers or None

    @property
    def rank_patterns(self) -> dict[str, int]:
        """Name or pattern -> rank."""
        numbers = _read_pattern("rank_pattern", self.rank_pattern)
        for key, number in numbers.items():
            if number != int(number):
                raise InputError(f"rank_pattern gives {key} the rank {number}; give a whole number.")
        return {key: int(number) for key, number in numbers.items()}

    @property
    def alpha_patterns(self) -> dict[str, float]:
        """Name or pattern -> alpha."""
        return dict(_read_pattern("alpha_pattern", self.alpha_pattern))

    def variant(self) -> dict[str, Any]:
        """Rank, alpha, dropout, and every other setting of the adapter's maths that is not the default."""
        always, elsewhere = ("rank", "alpha", "dropout"), ("target_modules", "adapter_dtype", "init")
        return {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name in always or (item.name not in elsewhere and getattr(self, item.name) != item.default)
        }

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its qualified name."""
        return next((r for key, r in self.rank_patterns.items() if fits_pattern(layer, key)), self.rank)

    def alpha_of(self, layer: str) -> float:
        """The alpha of a layer, by its qualified name."""
        return next((a for key, a in self.alpha_patterns.items() if fits_pattern(layer, key)), self.alpha)

    def scaling_of(self, layer: str, rank: int) -> float:
        """What B A is multiplied by in a layer of this rank (AdaLoRA: by the rank it began with)."""
        if self.use_adalora:
            return self.alpha / (self.rank + 1e-5)  # PEFT's guard against a rank of zero
        return self.alpha_of(layer) / (math.sqrt(rank) if self.use_rslora else rank)


def _split(names: str) -> list[str]:
    return [name for name in (part.strip() for part in names.split(",")) if name]


@lru_cache(maxsize=64)
def _read_pattern(field: str, text: str) -> dict[str, float]:
    """name=number,... as a dict; a name may be a regular expression, as in PEFT."""
    flag = "--" + field.replace("_", "-")
    numbers: dict[str, float] = {}
    entries = re.split(r",(?=[^,]*=)", text) if text.strip() else []
    if len(entries) > 4096:  # an entry for each layer of the largest model is a thousand
        raise InputError(f"{field} holds {len(entries)} entries; give {flag} 4096 at most.")
    for entry in entries:
        key, _, number = entry.strip().rpartition("=")
        try:
            # A repeated group, or a dozen repeats, can take for ever to fail; names in a model need none.
            if not key or len(key) > 200 or re.search(r"\)\s*[*+?{]", key) or len(re.findall(r"[*+?{]", key)) > 4:
                raise ValueError
            re.compile(key)
            numbers[key] = float(number)
            if not 0 < numbers[key] < math.inf:
                raise ValueError
        except (ValueError, OverflowError, RecursionError, re.error) as error:
            raise InputError(
                f"{field} holds {entry[:60]!r}; give {flag} as name=number,... with numbers above 0 and names, or "
                "patterns with at most 4 repeats."
            ) from error
    return numbers


def _join_fields(config: Any) -> None:
    """Lists and mappings, as Python gives them, become the text of the command line."""
    for name in LIST_FIELDS:
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, str):
            setattr(config, name, ",".join(map(str, value)))
    for name in PATTERN_FIELDS:
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, str):
            setattr(config, name, ",".join(f"{key}={item}" for key, item in value.items()))


@lru_cache(maxsize=8192)
def _compile_pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})")


def fits_pattern(layer: str, pattern: str) -> bool:
    """Whether a layer's name, or its end after a dot, is `pattern`, read as a regular expression (PEFT's rule)."""
    return _compile_pattern(pattern).fullmatch(layer) is not None


@dataclass
class DataConfig:
    """What is trained on."""

    data: str | None = None
    """Training data: a .jsonl, .json, .csv or .parquet file, or a hub id; several, or a pattern, by commas."""
    data_weights: str = ""
    """How often an epoch sees each of these, as 1,0.3,...: 0.3 = a new sample of 30 % each time, 2 = twice."""
    columns: str = ""
    """Columns that go by another name, as prompt=question,completion=answer."""
    eval_data: str | None = None
    """Held-out data for --eval-every."""
    eval_split: float = 0.0
    """Share of --data (of each source) to hold out instead, drawn by --seed; with or without --eval-every, so both
    train alike."""
    chat_template: str | None = None
    """File of a Jinja chat template to use in the place of the tokenizer's; it is saved with the adapter."""
    max_length: int = 1024
    """Longest example, in tokens."""
    on_long: Literal["truncate", "drop"] = "truncate"
    """A longer example keeps its first --max-length tokens, or is dropped."""
    train_on: Literal["completion", "all"] = "completion"
    """Learn the assistant's turns only, or every token."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A row that cannot be used ends the run, or is left out, counted and listed in bad_rows.jsonl."""
    parse_special: bool = False
    """Let text that spells a special token inside a message be that token instead of plain text."""
    num_workers: int = 0
    """Processes that tokenise; 0 = this one."""
    token_cache: bool = True
    """Keep the tokens on disk ($QLORA_CACHE/tokens) for the next start and map them; else they stay in memory."""
    packing: bool = True
    """Lay examples end to end with block-diagonal attention; --no-packing pads rows instead."""
    show_sample: bool = False
    """Print one example as the model sees it, with what is masked."""

    def __post_init__(self) -> None:
        _join_fields(self)
        _ = self.weights, self.column_names  # each raises if it does not read
        if self.max_length < 2:
            raise InputError(f"max_length is {self.max_length}; give --max-length 2 or more.")
        if self.num_workers < 0:
            raise InputError(f"num_workers is {self.num_workers}; give --num-workers 0 or more.")
        if not 0 <= self.eval_split < 1:
            raise InputError(f"eval_split is {self.eval_split}; give --eval-split a share from 0 to below 1.")
        if self.eval_split > 0 and self.eval_data is not None:
            raise InputError("Both eval_data and eval_split are given; pass one of them.")

    @property
    def weights(self) -> list[float]:
        """--data-weights as numbers."""
        try:
            return [float(part) for part in _split(self.data_weights)]
        except ValueError as error:
            raise InputError(
                f"data_weights is {self.data_weights!r:.80}; give --data-weights numbers separated by commas."
            ) from error

    @property
    def column_names(self) -> dict[str, str]:
        """The name that is read -> the data's own; a comma or = may stand in the latter."""
        names: dict[str, str] = {}
        for entry in re.split(r",(?=\s*\w+\s*=)", self.columns) if self.columns.strip() else []:
            key, _, column = (part.strip() for part in entry.partition("="))
            if not key or not column or key in names:
                raise InputError(f"columns holds {entry!r:.80}; give --columns name=column,... each name once.")
            names[key] = column
        return names


@dataclass
class TrainConfig:
    """The loop."""

    output_dir: str = "out"
    """Receives adapter, metrics.jsonl, samples.jsonl, loss.png and checkpoints/."""
    max_steps: int = 0
    """Stop after this many optimizer steps; 0 means --epochs decides."""
    epochs: int = 1
    """Passes over the data."""
    batch_size: int = 8
    """Examples per micro-batch and device; batch size x max length bounds its tokens."""
    grad_accum: int = 1
    """Micro-batches per optimizer step: batch size x grad accum x devices examples share a step."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up: down to zero as a cosine or a line, or constant."""
    warmup_steps: int = 10
    """Optimizer steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Clip the adapter's gradient to this norm; 0 = never."""
    optim: Literal["auto", "adamw", "paged_adamw_32bit", "paged_adamw_8bit"] = "auto"
    """auto: paged_adamw_32bit where the device can page, else fused adamw."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute activations in the backward pass; auto: in as few layers as make the rest fit."""
    memory_budget: str | None = None
    """What auto makes the run fit: 4GiB, 3.5GB, 800MiB; by default its base and half of the free memory."""
    eval_every: int = 0
    """Evaluate every N steps and at the end; 0 = never."""
    sample_every: int = 0
    """Answer a few fixed prompts every N steps and at the end; 0 = with each evaluation."""
    num_samples: int = 3
    """How many prompts to answer; 0 = never any."""
    sample_tokens: int = 64
    """Longest such answer, in tokens."""
    sample_prompts: str | None = None
    """Prompts to answer, any data file; by default those of the first held-out, else training examples."""
    best_metric: Literal["eval_loss", "exact_match"] = "eval_loss"
    """What makes an evaluation the best: the held-out loss, or how many held-out answers come out as expected."""
    score_examples: int = 64
    """Held-out examples that exact_match answers, greedily and up to --max-new-tokens; 0 = all."""
    score_match: Literal["text", "json", "json_in_text", "gsm8k", "letter"] = "text"
    """How exact_match compares answers, as --match of python -m eval exact_match."""
    early_stopping_patience: int = 0
    """End after so many evaluations in a row without a better --best-metric; 0 = never."""
    early_stopping_min_delta: float = 0.0
    """Better means by more than this."""
    load_best: bool = False
    """Leave the adapter of the best checkpoint in --output-dir at the end, instead of the last one."""
    report_to: str = ""
    """Trackers to log to, separated by commas: tensorboard, wandb, trackio, ..., or all that are installed."""
    project_name: str = "qlora"
    """The project of the run in trackers."""
    run_name: str | None = None
    """The run's name in trackers; by default that of --output-dir."""
    save_every: int = 0
    """Checkpoint every N steps; 0 = only at the end."""
    keep_last: int = 0
    """Keep this many newest checkpoints, and the best by --best-metric; 0 = all."""
    resume: str | None = None
    """Continue from a checkpoint directory, or auto for the newest whole one in --output-dir."""
    force_resume: bool = False
    """Resume although model, data or settings differ from the checkpoint's; names what differs."""
    stop_after: str | None = None
    """Save and stop in time, as on SIGTERM: 45s, 90m, 3h or 1h30m after the start."""
    max_skipped: int = 3
    """Steps with a non-finite loss or gradient to skip before the run stops."""
    push_to_hub: str | None = None
    """Upload the adapter to this Hugging Face repository at the end, with a model card."""
    seed: int = 42
    """Seeds the adapter, the data order, the split and the dropout."""

    def __post_init__(self) -> None:
        _join_fields(self)
        for name, low in (
            ("max_steps", 0), ("epochs", 1), ("batch_size", 1), ("grad_accum", 1), ("warmup_steps", 0),
            ("weight_decay", 0), ("max_grad_norm", 0), ("eval_every", 0), ("save_every", 0), ("keep_last", 0),
            ("max_skipped", 0), ("seed", 0), ("sample_every", 0), ("num_samples", 0), ("sample_tokens", 1),
            ("score_examples", 0), ("early_stopping_patience", 0), ("early_stopping_min_delta", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value < math.inf and not (name == "max_grad_norm" and value == math.inf):
                flag = name.replace("_", "-")
                raise InputError(f"{name} is {getattr(self, name)}; give --{flag} {low} or more.")
        if self.stop_after is not None and self.stop_after_seconds is None:
            raise InputError(
                f"stop_after is {self.stop_after!r}; give --stop-after a time such as 45s, 90m or 1h30m."
            )
        if self.memory_budget is not None and self.memory_budget_bytes is None:
            raise InputError(
                f"memory_budget is {self.memory_budget!r}; give --memory-budget a size such as 4GiB or 800MB."
            )
        if self.force_resume and self.resume is None:
            raise InputError("force_resume is given without resume; pass --resume auto or a checkpoint with it.")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate}; give --learning-rate a number above 0.")

    @property
    def trackers(self) -> list[str]:
        """The names in --report-to, split and stripped."""
        return _split(self.report_to)

    @property
    def keeps_best(self) -> bool:
        """Whether a setting needs the best state as a checkpoint, however often others are saved."""
        return self.load_best or self.early_stopping_patience > 0 or self.best_metric != "eval_loss"

    @property
    def stop_after_seconds(self) -> float | None:
        """--stop-after in seconds; None where it is not given or says no time."""
        match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", self.stop_after or "")
        if match is None or not self.stop_after:
            return None
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

    @property
    def memory_budget_bytes(self) -> int | None:
        """--memory-budget in bytes; None where it is not given or says no size."""
        return size_in_bytes(self.memory_budget or "")


def size_in_bytes(text: str) -> int | None:
    """4GiB, 3.5GB, 800 MiB in bytes; None where it says no size."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([MGT])(i?)B", text)
    if match is None or not float(match[1]):
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (2 + "MGT".index(match[2])))


@dataclass
class ParallelConfig:
    """Several devices. Without these flags each holds the whole base and computes its own micro-batches."""

    shard: Literal["none", "fsdp", "hsdp"] = "none"
    """Split the base: over all devices (fsdp), or over those of a node, alike in every node (hsdp)."""
    shard_size: int = 0
    """Devices that hold one copy of the base between them under hsdp; 0 = those of a node."""
    cpu_offload: bool = False
    """Keep each GPU's share of a split base in main memory; slower, and nearly free of GPU memory."""
    tensor_parallel: int = 1
    """Devices that compute each layer together, on the same micro-batches; 1 = every one by itself."""
    sequence_parallel: bool = False
    """With --tensor-parallel: what lies between the split layers (norms) is divided by tokens."""

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise InputError(f"tensor_parallel is {self.tensor_parallel}; give --tensor-parallel 1 or more.")
        if self.shard_size < 0:
            raise InputError(f"shard_size is {self.shard_size}; give --shard-size 0 or more.")
        if self.shard_size and self.shard != "hsdp":
            raise InputError(f"shard_size is {self.shard_size} without hsdp; pass --shard hsdp with it.")
        if self.cpu_offload and self.shard == "none":
            raise InputError("--cpu-offload is for a base that is split; pass --shard fsdp or hsdp with it.")
        if self.tensor_parallel > 1 and self.shard != "none":
            raise InputError(
                f"--tensor-parallel {self.tensor_parallel} and --shard {self.shard} are not combined; choose one."
            )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise InputError("--sequence-parallel goes with tensor parallel; pass --tensor-parallel N with it.")

    @property
    def is_split(self) -> bool:
        """Whether no device holds the whole base."""
        return self.shard != "none" or self.tensor_parallel > 1

    @property
    def flag(self) -> str:
        """The flag that splits the base, for messages."""
        return f"--shard {self.shard}" if self.shard != "none" else f"--tensor-parallel {self.tensor_parallel}"


@dataclass
class GenerateConfig:
    """Prompt mode."""

    prompt: str | None = None
    """Answer this instead of training."""
    adapter: str | None = None
    """Adapter directory: to answer with, or to start training from."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 = greedy; higher is more random."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; give --max-new-tokens 1 or more.")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; give --temperature 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; give --top-p a number above 0, at most 1.")


@dataclass
class RunConfig:
    """Fine-tune a 4-bit base with LoRA, or answer a --prompt with one."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    debug: bool = False
    """Show the traceback of an error."""

    def check_training(self) -> None:
        """Whether the settings of a training run go together.

        Raises:
            InputError: they do not.
        """
        t, held_out = self.train, self.data.eval_data is not None or self.data.eval_split > 0
        if t.eval_every and not held_out:
            raise InputError(
                "--eval-every needs held-out data; pass --eval-data FILE, or --eval-split 0.05 for a share."
            )
        if t.keeps_best and not t.eval_every:
            names = ("early_stopping_patience", "load_best")
            flag = next((n for n in names if getattr(t, n)), "best_metric").replace("_", "-")
            raise InputError(f"--{flag} goes by evaluations; pass --eval-every N with it.")
        if t.best_metric == "exact_match" and self.data.train_on == "all":
            raise InputError(
                "--best-metric exact_match needs answers apart from their prompts; leave out --train-on all."
            )
        self.check_split()
        if self.generate.adapter is not None and self.lora.added_tokens:
            raise InputError("--new-tokens begins an adapter, --adapter goes on with one; leave out one of them.")

    def check_split(self) -> None:
        """Whether a base that is split can do what is asked.

        Raises:
            InputError: it cannot.
        """
        parallel, lora = self.parallel, self.lora
        is_tensor = parallel.tensor_parallel > 1
        unable = {
            "--modules-to-save": bool(lora.trained_modules),
            "--new-tokens": bool(lora.added_tokens),
            f"--bias {lora.bias}": lora.bias != "none",
            f"--init {lora.init}": lora.init in ("pissa", "loftq"),
            "--use-dora": lora.use_dora and is_tensor,
            "--use-adalora": lora.use_adalora and is_tensor,
            "--no-4bit": not self.model.use_4bit and is_tensor,
            "--best-metric exact_match": self.train.best_metric == "exact_match",
        }
        for other in (flag for flag, is_asked in unable.items() if is_asked and parallel.is_split):
            raise InputError(f"{other} needs the whole base on every device; leave it out, or {parallel.flag}.")


def parse_args(config_class: type[T], prog: str, argv: Sequence[str] | None = None) -> T:
    """Build a config from the command line, with an optional YAML file below it.

    The file becomes flags placed before the given ones: the same types and checks, and the command line wins.

    Raises:
        InputError: unreadable YAML, an unknown key (with the closest name), a value out of range.
        SystemExit: the flags themselves are wrong (code 2) or --help was asked for.
    """
    import tyro

    args = [_NEGATIONS.get(arg, arg) for arg in (sys.argv[1:] if argv is None else argv)]
    args, file = _take_config_flag(args)
    if file is not None:
        args = config_file_flags(file, _field_names(config_class)) + args
    return tyro.cli(
        config_class,
        prog=prog,
        args=args,
        description=f"{config_class.__doc__} A YAML file of the same names may be given with --config FILE.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


# The documented spelling of "no 4 bits"; the generated one is --no-use-4bit.
_NEGATIONS = {"--no-4bit": "--no-use-4bit", "--use_4bit": "--use-4bit"}


def _take_config_flag(args: list[str]) -> tuple[list[str], str | None]:
    for position, arg in enumerate(args):
        if arg == "--config":
            if position + 1 == len(args):
                raise InputError("--config needs a file; give it the path of a YAML file.")
            return args[:position] + args[position + 2 :], args[position + 1]
        if arg.startswith("--config="):
            return args[:position] + args[position + 1 :], arg.partition("=")[2]
    return args, None


def _field_names(config_class: type) -> dict[str, type]:
    """Flat name -> declared type text, through one level of nesting."""
    names: dict[str, Any] = {}
    for item in fields(config_class):
        if item.default_factory is not None and hasattr(item.default_factory, "__dataclass_fields__"):
            names.update(_field_names(item.default_factory))  # type: ignore[arg-type]
        else:
            names[item.name] = item.type
    return names


def config_file_flags(file: str, names: dict[str, Any]) -> list[str]:
    """Read a flat YAML file as command-line flags; `names` are the keys it may hold."""
    flags: list[str] = []
    lines: dict[str, int] = {}
    for key, value, line in _read_yaml(file):
        name, where = str(key).replace("-", "_"), f"{file}:{line}"
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(sorted(names))}."
            raise InputError(f"{where}: unknown key {reprlib.repr(key)}; {hint}")
        if name in lines:
            raise InputError(f"{where}: {name} was given in line {lines[name]} already; remove one of them.")
        lines[name] = line
        flag = name.replace("_", "-")
        if names[name] == "bool":
            if not isinstance(value, bool):
                raise InputError(f"{where}: {key} is {reprlib.repr(value)}; write true or false.")
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list) and name in LIST_FIELDS and all(_is_plain(v) for v in value):
            flags.append(f"--{flag}={','.join(map(str, value))}")
        elif isinstance(value, dict) and name in PATTERN_FIELDS:
            flags.append(f"--{flag}={','.join(f'{layer}={number}' for layer, number in value.items())}")
        elif isinstance(value, (dict, list, set, bytes)):
            raise InputError(f"{where}: {key} is a {type(value).__name__}; write a single value.")
        elif value is not None:
            if isinstance(value, bool):  # YAML reads a bare on or off as a boolean
                value = "on" if value else "off"
            flags.append(f"--{flag}={value}")
    return flags


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _read_yaml(file: str) -> list[tuple[Any, Any, int]]:
    """(key, value, line) of a YAML mapping, doubled keys included."""
    import yaml

    try:
        loader = yaml.SafeLoader(Path(file).read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        if node is not None and not isinstance(node, yaml.MappingNode):
            kind = "list" if isinstance(node, yaml.SequenceNode) else "text alone"
            raise InputError(f"The config file {file} holds {kind}; write one `name: value` a line.")
        return [
            (loader.construct_object(key, deep=True), loader.construct_object(value, deep=True), line + 1)
            for key, value in (node.value if node is not None else ())
            for line in (key.start_mark.line,)
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The config file {file} cannot be read ({error}); check path and encoding.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"The config file {file} is not valid YAML: {' '.join(str(error).split())}.") from error
    except (ValueError, OverflowError) as error:  # a date or number that YAML recognises but Python has not
        if isinstance(error, InputError):
            raise
        raise InputError(f"The config file {file} holds a value that does not exist: {error}.") from error
