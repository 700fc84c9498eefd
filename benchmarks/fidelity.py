"""The QLoRA paper's tables on a small scale: effect of 4 bits, double quantization, adapted layers and rank.

    python -m benchmarks.fidelity --model M --data train.jsonl --eval-data test.jsonl --output-dir DIR \\
        [--steps 16] [--seeds 3] [--only nf4-qv-r8,bf16-qv-r8] [--page docs/fidelity.md]
    python -m benchmarks.fidelity --report-only --output-dir DIR

Eleven adapters, each trained from every seed, with the same steps, rows, learning rate and alpha:

    data type   bf16, nf4, fp4, nf4-nodq (without double quantization) and nf4-calibrated (--calibrate auto):
                q_proj and v_proj, rank 8
    layers      bf16, nf4 and nf4-calibrated: all linear layers, rank 8
    rank        nf4: q_proj and v_proj, rank 4, 16 and 64

A seed gives the same order of rows and, in layers of the same shape and rank, the same initial A for every base:
cells are compared within a seed. Loss (nats per target token) and exact match of greedy answers are measured on
held-out rows before (the base alone) and after training.

Each finished part is a file in DIR, written atomically; when restarted, the command computes the missing ones.
Several commands with different --only may share DIR. benchmarks/fidelity_report.py makes tables and pictures from
the existing files.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qlora.cli.exits import run
from qlora.config.lora import LoRAConfig
from qlora.config.model import ComputeDtype
from qlora.config.parse import parse_args
from qlora.system.errors import InputError
from qlora.system.files import new_file, read_json
from qlora.training.recompute import choose_recomputed_layers

STUDY = "study.json"  # the settings shared by all files of a directory
REMEDY = "remove it to compute it again"


@dataclass(frozen=True)
class Cell:
    """One row of the study: an adapter on a base."""

    base: str
    targets: str
    rank: int

    @property
    def name(self) -> str:
        return f"{self.base}-{self.targets}-r{self.rank}"


# Base -> (quant_type, double_quant); None is the 16-bit base.
BASES: dict[str, tuple[str, bool] | None] = {
    "bf16": None,
    "nf4": ("nf4", True),
    "nf4-nodq": ("nf4", False),
    "fp4": ("fp4", True),
    "nf4-calibrated": ("nf4", True),  # as --calibrate auto
}
CALIBRATION_TOKENS = 8192
TARGETS = {"qv": ["q_proj", "v_proj"], "all": ["all-linear"]}
CELLS = (
    Cell("bf16", "qv", 8),
    Cell("bf16", "all", 8),
    Cell("nf4", "qv", 8),
    Cell("nf4", "qv", 4),
    Cell("nf4", "qv", 16),
    Cell("nf4", "qv", 64),
    Cell("nf4", "all", 8),
    Cell("nf4-nodq", "qv", 8),
    Cell("fp4", "qv", 8),
    Cell("nf4-calibrated", "qv", 8),
    Cell("nf4-calibrated", "all", 8),
)


@dataclass
class FidelityConfig:
    """Held-out loss and exact match by data type, layers and rank, with intervals over seeds."""

    model: str | None = None
    """A Hugging Face directory, a hub id, or a .gguf file."""
    data: str | None = None
    """Training data, in any format accepted for training."""
    eval_data: str | None = None
    """Held-out data."""
    output_dir: str = "fidelity"
    """Directory for a file per finished part, report.md and pictures; its name is the study's name."""
    seeds: int = 3
    """Each adapter is trained from the seeds 0, 1, ..."""
    only: str = ""
    """Train only these cells: names as in the report, separated by commas; empty = all."""
    steps: int = 16
    """Optimizer steps of each adapter."""
    batch_size: int = 4
    """Examples per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of all cells, with warm-up over a tenth of the steps, then cosine decay."""
    alpha: float = 16.0
    """LoRA alpha of all cells; the update is scaled by alpha / rank."""
    max_length: int = 512
    """Longest example in tokens; longer ones are dropped."""
    eval_rows: int = 64
    """Number of held-out rows for the loss, from the start; 0 = all."""
    problems: int = 16
    """Number of held-out rows for exact match, from the start; 0 = none."""
    match: Literal["gsm8k", "json", "text"] = "gsm8k"
    """Compare the number after #### (or else the last one), JSON values, or text."""
    max_new_tokens: int = 200
    """Longest answer, in tokens."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of activations in all cells; auto measures which is faster on this device."""
    report_only: bool = False
    """Train nothing; only make tables and pictures from the files in --output-dir."""
    page: str | None = None
    """Write the tables to this page, between the study's marks, and results and pictures next to it."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        lows = dict(seeds=1, steps=1, batch_size=1, max_length=2, eval_rows=0, problems=0, max_new_tokens=1)
        for name, low in lows.items():
            if getattr(self, name) < low:
                flag = name.replace("_", "-")
                raise InputError(f"{name} is {getattr(self, name)}; give --{flag} {low} or more.")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning_rate is {self.learning_rate}; give --learning-rate a number above 0.")
        _ = self.cells, LoRAConfig(alpha=self.alpha)  # each raises if invalid

    @property
    def cells(self) -> list[Cell]:
        """The cells to train."""
        wanted = [name.strip() for name in self.only.split(",") if name.strip()]
        known = {cell.name: cell for cell in CELLS}
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise InputError(f"--only names {', '.join(unknown)}; the cells are {', '.join(known)}.")
        return [known[name] for name in wanted] or list(CELLS)


# ---- the files of a study ---------------------------------------------------------------------------------


def run_name(cell: Cell, seed: int) -> str:
    return f"{cell.name}-seed{seed}"


def write_result(path: Path, result: dict[str, Any]) -> None:
    with new_file(path) as staging:
        staging.write_text(json.dumps(result) + "\n")


def settle_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Save the settings with the results, or check that existing results have the same settings.

    Raises:
        InputError: the settings differ; lists the differences.
    """
    path = directory / STUDY
    if not path.exists():
        write_result(path, settings)
        return
    kept = read_settings(directory)
    different = [
        f"{k} {kept.get(k)!r}, not {settings.get(k)!r}"
        for k in sorted(kept.keys() | settings.keys())
        if kept.get(k) != settings.get(k)
    ]
    if different:
        raise InputError(
            f"{directory} holds a study with other settings ({'; '.join(different)}); choose another --output-dir."
        )


def read_settings(directory: Path) -> dict[str, Any]:
    return read_json(directory / STUDY, "remove the directory, or choose another --output-dir")


# ---- one part ---------------------------------------------------------------------------------------------


class Bench:
    """Data and settings of a study, and the current base; only one base is in memory at a time."""

    def __init__(self, config: FidelityConfig, model: str, data: str, eval_data: str) -> None:
        from accelerate import Accelerator

        from qlora.data.dataset import Encoder, Sources, load_examples
        from qlora.data.readers import read_records
        from qlora.model.tokenizer import load_tokenizer
        from qlora.system.device import best_device
        from qlora.training.fingerprint import data_fingerprint

        self.config, self.source = config, model
        self.accelerator = Accelerator(cpu=best_device().type == "cpu", mixed_precision="no")
        self.tokenizer = load_tokenizer(model)
        self.examples, held_out = load_examples(
            Sources(data, held_out=eval_data), Encoder(self.tokenizer, config.max_length, on_long="drop")
        )
        self.held_out = held_out[: config.eval_rows or None]
        self.records = read_records(eval_data)[: config.problems]
        self.base = ""
        self.model: Any = None
        self.dtype = settle_dtype(config)
        shared = ("steps", "batch_size", "learning_rate", "alpha", "max_length", "match", "max_new_tokens")
        self.settings = {name: getattr(config, name) for name in shared} | {
            "compute_dtype": self.dtype,
            "model": Path(model).name,
            "data": Path(data).name,
            "eval_data": Path(eval_data).name,
            "rows": len(self.examples),
            "eval_rows": len(self.held_out),
            "problems": len(self.records),
            "data_fingerprint": data_fingerprint(self.examples),
            "eval_fingerprint": data_fingerprint(self.held_out),
        }

    def take_base(self, base: str) -> Any:
        """The base of this name as a LoRAModel without an adapter; drops the previous one first."""
        from qlora.adapters.model import LoRAModel
        from qlora.data.dataset import Encoder
        from qlora.model.load import load_base_model
        from qlora.quant.weight import QuantConfig
        from qlora.system.device import best_device
        from qlora.training.calibration import calibrated

        if self.base != base:
            self.model = None
            gc.collect()
            how = BASES[base]
            quant = None if how is None else QuantConfig(*how)
            if base == "nf4-calibrated" and quant is not None:
                encoder, device = Encoder(self.tokenizer, self.config.max_length), best_device()
                quant = calibrated(
                    self.source, quant, "auto", CALIBRATION_TOKENS, self.examples, encoder, self.dtype, device
                )
            network = load_base_model(self.source, how is not None, quant, self.dtype, best_device())
            self.model = LoRAModel(network)
            self.base = base
        return self.model

    def measure_base(self, base: str) -> dict[str, Any]:
        """Loss of each held-out row and weight error of a base without an adapter."""
        from qlora.training.held_out import evaluate

        network = self.take_base(base).model
        rows = [
            (evaluate(network, [example], self.accelerator, self.config.max_length), example.num_targets)
            for example in self.held_out
        ]
        return {
            "base": base,
            "row_losses": [[loss, count] for loss, count in rows],
            "weight_error": weight_error(network, self.source),
        }

    def train_cell(self, cell: Cell, seed: int, directory: Path) -> dict[str, Any]:
        """Train one adapter, save it in `directory` and measure it; leaves the base unchanged."""
        from qlora.data.batches import largest_micro_batch
        from qlora.lora.optimizer import build_optimizer
        from qlora.lora.trainable import count_trainable_parameters
        from qlora.system.device import choose_optimizer
        from qlora.training.held_out import evaluate
        from qlora.training.loop import Limits, Trainer, TrainingData
        from qlora.training.observer import Observer
        from qlora.training.schedule import build_schedule

        c, kind = self.config, self.accelerator.device.type
        lora_model = self.take_base(cell.base)
        lora_model.add_adapter(
            cell.name,
            LoRAConfig(rank=cell.rank, alpha=c.alpha, target_modules=TARGETS[cell.targets]),
            seed,
        )
        lora_model.set_adapter(cell.name)
        network = lora_model.model
        lines: list[dict[str, Any]] = []
        longest = max(len(example) for example in self.examples)
        tokens = largest_micro_batch(c.batch_size, c.max_length, longest, True, kind)
        choose_recomputed_layers(network, "auto", tokens, say=lambda line: None)
        optim = choose_optimizer("auto", self.accelerator.device)
        optimizer = build_optimizer(lora_model.lora_parameters(), optim)
        rate = build_schedule("cosine", c.learning_rate, -(-c.steps // 10), c.steps)

        class Lines(Observer):
            def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
                lines.append(line)

        data = TrainingData(self.examples, c.batch_size, 1, c.max_length, seed=seed)
        limits = Limits(c.steps, max_grad_norm=1.0)
        Trainer(network, optimizer, rate, data, self.accelerator, limits, [Lines()]).fit()
        result = {
            "cell": cell.name,
            "seed": seed,
            "trainable": count_trainable_parameters(network),
            "losses": [line["loss"] for line in lines],
            "tokens": sum(line["num_tokens"] for line in lines),
            "eval_loss": evaluate(network, self.held_out, self.accelerator, c.batch_size * c.max_length),
        }
        lora_model.save(directory)
        lora_model.delete_adapter(cell.name)
        return result

    def answer(self, base: str, directory: Path | None) -> dict[str, Any]:
        """Whether each greedy answer is right, for a base with or without the adapter in `directory`."""
        from eval.exact_match import exact_match
        from qlora.data.answers import make_matcher

        lora_model = self.take_base(base)
        if directory is not None:
            lora_model.load_adapter(directory, "answering")
            lora_model.set_adapter("answering")
        tokens, is_right = self.config.max_new_tokens, make_matcher(self.config.match).same
        found = exact_match(lora_model.model, self.tokenizer, self.records, "text", tokens)
        if directory is not None:
            lora_model.delete_adapter("answering")
        return {"correct": [is_right(p.expected, p.answer) for p in found], "answers": [p.answer for p in found]}


def settle_dtype(config: FidelityConfig) -> str:
    """Name of the dtype for all cells; with auto, the one that the study started with."""
    from qlora.model.load import MEASURED_WIDTH
    from qlora.system.device import best_device, choose_compute_dtype

    directory = Path(config.output_dir)
    if config.compute_dtype == "auto" and (directory / STUDY).is_file():
        return str(read_settings(directory).get("compute_dtype"))
    measured = choose_compute_dtype(config.compute_dtype, best_device(), MEASURED_WIDTH)
    return str(measured).removeprefix("torch.")


def weight_error(network: Any, source: str) -> float:
    """Mean over the blocks' linear layers of |W_hat - W| / |W| (Frobenius); W: the weight in the files."""
    import torch

    from qlora.lora.targets import match_targets
    from qlora.model.weights import read_weights
    from qlora.quant.layers import dense_weight

    layers = match_targets(network, ["all-linear"])
    errors = []
    for name, weight in read_weights(source, layers):
        used = dense_weight(layers[name], torch.float32)
        errors.append(((used - weight).norm() / weight.norm()).item())
    return sum(errors) / len(errors)


# ---- the study --------------------------------------------------------------------------------------------


def make_part(path: Path, measure: Callable[[], dict[str, Any]]) -> None:
    """Measure and save the result with its wall and processor seconds, unless it exists already."""
    if path.exists():
        read_json(path, REMEDY)
        return
    wall, processor = time.perf_counter(), time.process_time()
    result = measure()
    result["seconds"] = time.perf_counter() - wall
    result["cpu_seconds"] = time.process_time() - processor
    write_result(path, result)
    print(f"{path.name}: {result['seconds']:.0f} s", flush=True)


def run_study(config: FidelityConfig) -> None:
    """Compute every missing part, seed by seed, so that the results left by a kill are comparable."""
    if config.model is None or config.data is None or config.eval_data is None:
        raise InputError("--model, --data and --eval-data are required (or --report-only).")
    directory = Path(config.output_dir)
    bench = Bench(config, config.model, config.data, config.eval_data)
    directory.mkdir(parents=True, exist_ok=True)
    settle_settings(directory, bench.settings)
    bases = list(dict.fromkeys(cell.base for cell in config.cells))
    rounds = [(seed, base) for seed in range(config.seeds) for base in bases]
    for seed, base in rounds:
        make_part(directory / f"base-{base}.json", partial(bench.measure_base, base))
        for cell in (cell for cell in config.cells if cell.base == base):
            name = run_name(cell, seed)
            train = partial(bench.train_cell, cell, seed, directory / "adapters" / name)
            make_part(directory / f"{name}.json", train)
    for seed, base in rounds if bench.records else ():  # last, since it takes longest and shows least
        make_part(directory / f"answers-{base}.json", partial(bench.answer, base, None))
        for cell in (cell for cell in config.cells if cell.base == base):
            name = run_name(cell, seed)
            answer = partial(bench.answer, base, directory / "adapters" / name)
            make_part(directory / f"answers-{name}.json", answer)


def main(argv: Sequence[str]) -> None:
    config = parse_args(FidelityConfig, "python -m benchmarks.fidelity", argv)
    if not config.report_only:
        run_study(config)
    from benchmarks.fidelity_report import write_report

    write_report(Path(config.output_dir), None if config.page is None else Path(config.page))


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
