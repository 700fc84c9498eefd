"""Compare training with PEFT + TRL in one run: real tokens per second, peak memory and losses.

    make bench [DATA=train.jsonl]        both environments, then the whole comparison (15 to 40 minutes on 2 cores)
    python -m benchmarks.peers [--model M] [--data train.jsonl] [--rounds 3] [--steps 4]
    python -m benchmarks.peers --objective dpo [--data pairs.jsonl]     with DPOTrainer instead of SFTTrainer

Each side is a separate process that loads the same dense checkpoint, quantizes it to NF4 with double quantization,
starts from the same rank-8 adapter on q_proj and v_proj, and trains on the same tokenized rows in the same windows
with AdamW at a constant rate. Without --data the rows come from benchmarks/word_problems.py; the rejected answers
of pairs are those of other problems. With DPO both sides compute the reference in each step, and have no dropout.

    ours        the defaults, through `fit`: measured compute dtype, packing, checkpointing if needed
    TRL bf16    the trainer's defaults: bf16, gradient checkpointing, batch 8, padded rows
    TRL fp32    the same in fp32
    TRL fp32-   the same in fp32 without gradient checkpointing

The sides take turns, `--rounds` times. A step's rate counts real tokens without padding; the first step of each
process is a warm-up. Ratios are medians over the rounds of (ours / theirs in the same round), since machines are
shared and drift. Memory is the peak resident set of the process (of the CUDA allocator on a GPU). Losses are
compared at every step with a run of ours in the same dtype; if `ours` uses another dtype, ours runs once more in
that dtype for the losses. The limit is that of benchmarks/roofline.py.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.roofline import describe_machine, product_rate, useful_flops
from benchmarks.word_problems import write_problems
from examples.demo import packaged_model
from qlora.cli.exits import run
from qlora.data.batches import largest_micro_batch
from qlora.data.example import IGNORE_INDEX, Example
from qlora.system.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
PEERS: dict[str, dict[str, Any]] = {
    "TRL bf16": {"dtype": "bfloat16", "checkpointing": True},
    "TRL fp32": {"dtype": "float32", "checkpointing": True},
    "TRL fp32-": {"dtype": "float32", "checkpointing": False},
}
DEFAULT = "TRL bf16"  # what a user gets by default
LIMIT_SHARE, LOSS_GAP = 0.80, 1e-3  # the goals
GOALS = {"sft": (5.0, 3.5, 0.3), "dpo": (6.0, None, 0.25)}  # faster than its default and its best, memory
PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate")

Run = dict[str, Any]  # seconds, losses, peak_bytes; ours also limit and dtype


def write_job(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write a dense checkpoint, the initial adapter, the rows and their order, for both sides."""
    from transformers import AutoModelForCausalLM, GgufConfig

    from qlora.adapters.peft_files import save_adapter
    from qlora.config.lora import LoRAConfig
    from qlora.data.dataset import Encoder, Sources, load_examples
    from qlora.data.order import WindowOrder
    from qlora.data.preferences import kind_of
    from qlora.lora.adapter import inject_lora
    from qlora.model.load import load_base_model
    from qlora.model.tokenizer import load_tokenizer

    count = options.steps * options.batch_size
    source, dense, is_dpo = Path(options.model), folder / "model", options.objective == "dpo"
    data = options.data or str(write_problems(folder / "rows.jsonl", 2 * count, is_paired=is_dpo))
    tokenizer = load_tokenizer(options.model)
    encoder = Encoder(tokenizer, options.max_length, on_long="drop", kind=kind_of(options.objective))
    examples, _ = load_examples(Sources(data), encoder)
    if len(examples) < count:
        raise InputError(f"{data} has {len(examples)} rows, too few for {options.steps} steps; lower --steps.")
    rows: list[dict[str, list[int]]] = []
    for example in random.Random(0).sample(examples, count):
        parts = []  # ids of each sequence, and which are trained
        for part in example.sequences:
            ids = [*part.input_ids.tolist(), max(0, int(part.targets[-1]))]
            parts.append((ids, [0, *(part.targets != IGNORE_INDEX).int().tolist()]))
        if is_dpo:
            (chosen, mask), (rejected, _) = parts
            start = mask.index(1)
            answers = {"chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}
            rows.append({"prompt_ids": chosen[:start]} | answers)
        else:
            rows.append({"input_ids": parts[0][0], "completion_mask": parts[0][1]})
    windows = WindowOrder(count, options.batch_size, seed=0)

    where: tuple[Any, dict[str, Any]] = (options.model, {})
    if source.suffix == ".gguf":
        where = source.parent, {"gguf_file": source.name, "quantization_config": GgufConfig(dequantize=True)}
    AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.bfloat16, **where[1]).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    lora = LoRAConfig(rank=8, dropout=0.0)
    model = load_base_model(str(dense), compute_dtype="float32", cache=False)
    inject_lora(model, lora, seed=0)
    save_adapter(model, folder / "adapter", lora, str(dense))
    names = ("batch_size", "steps", "learning_rate", "max_length", "objective")
    job = {name: getattr(options, name) for name in names}
    job |= {"rows": rows, "order": [i for step in range(options.steps) for i in windows.window(step)]}
    return job | {"model": str(dense), "adapter": str(folder / "adapter"), "output_dir": str(folder / "trl")}


def sequences_of(row: dict[str, list[int]]) -> list[tuple[list[int], list[int]]]:
    """The sequences of a row: (ids, 1 for each that is trained)."""
    if "prompt_ids" not in row:
        return [(row["input_ids"], row["completion_mask"])]
    prompt, answers = row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])
    return [(prompt + answer, [0] * len(prompt) + [1] * len(answer)) for answer in answers]


def train_ours(job: dict[str, Any]) -> Run:
    """One run of this project, with the same calls as train.py."""
    from accelerate import Accelerator

    from qlora.adapters.load import load_adapter
    from qlora.data.preferences import join_pair
    from qlora.lora.adalora_optimizer import build_adapter_optimizer
    from qlora.model.base import base_info
    from qlora.model.load import load_base_model
    from qlora.model.preference_loss import PreferenceLoss
    from qlora.system.device import best_device, choose_optimizer
    from qlora.system.memory import GIB, peak_memory_gib
    from qlora.training.loop import Limits, Trainer, TrainingData
    from qlora.training.observer import Observer
    from qlora.training.preferences import Preferences
    from qlora.training.recompute import choose_recomputed_layers
    from qlora.training.schedule import build_schedule

    device, size, steps, is_dpo = best_device(), job["batch_size"], job["steps"], job["objective"] == "dpo"
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    model = load_base_model(job["model"], compute_dtype=job["dtype"], device=device)
    lora = load_adapter(model, job["adapter"])
    optimizer = build_adapter_optimizer(model, lora, choose_optimizer("auto", device), 0.0, steps)
    examples = []
    for row in job["rows"]:
        parts = []
        for ids, mask in ((torch.tensor(ids), torch.tensor(mask).bool()) for ids, mask in sequences_of(row)):
            parts.append(Example(ids[:-1], ids.masked_fill(~mask, IGNORE_INDEX)[1:]))
        examples.append(join_pair(parts[0], parts[1]) if is_dpo else parts[0])
    preferences = Preferences(PreferenceLoss("dpo", 0.1), reference_each_step=True) if is_dpo else None
    row_tokens = job["max_length"] * (1 + is_dpo)
    longest = max(len(example) for example in examples)
    num_tokens = largest_micro_batch(size, row_tokens, longest, packing=True, device_type=device.type)
    recomputed, _ = choose_recomputed_layers(model, "auto", num_tokens)
    rates: list[float] = []  # before each step and after the last
    lines: list[dict[str, Any]] = []

    class Measure(Observer):
        """Measures between steps, outside their timing."""

        def before_step(self, trainer: Trainer) -> None:
            rates.append(product_rate(base_info(model).compute_dtype, device))

        def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
            lines.append(line)

    data = TrainingData(examples, size, 1, row_tokens, preferences=preferences)
    schedule = build_schedule("constant", job["learning_rate"], 0, steps)
    Trainer(model, optimizer, schedule, data, accelerator, Limits(steps, max_grad_norm=1.0), [Measure()]).fit()
    windows = [[examples[i] for i in job["order"][step * size : (step + 1) * size]] for step in range(steps)]
    again = recomputed + is_dpo  # the reference is one more forward pass
    work = [useful_flops(model, [part for e in w for part in e.sequences], again) for w in windows]
    return {
        "seconds": [line["num_tokens"] / line["tokens_per_second"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "limit": [w / ((a + b) / 2) for w, a, b in zip(work, rates[:-1], rates[1:], strict=True)],
        "dtype": str(base_info(model).compute_dtype).removeprefix("torch."),
        "recomputed": recomputed,
        "peak_bytes": peak_memory_gib(device) * GIB,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def run_side(name: str, job: dict[str, Any], folder: Path, peer_python: str) -> Run:
    """Start one side and read the JSON object that it prints last."""
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    ours = [sys.executable, "-m", "benchmarks.peers", "--job", str(file)]
    command = [peer_python, str(ROOT / "benchmarks/peer_trl.py"), str(file)] if name in PEERS else ours
    environment = os.environ | {"QLORA_CACHE": str(folder / "cache")}  # not the user's
    if name in PEERS:
        environment.pop("GOMP_SPINCOUNT", None)  # our entry points set it, for their own threads
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"error: {name} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Compare training with PEFT + TRL's.")
    parser.add_argument("--model", help="a Hugging Face directory or .gguf file (SmolLM2-135M-Instruct)")
    parser.add_argument("--objective", choices=list(GOALS), default="sft")
    parser.add_argument("--data", help="training data (generated word problems)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per process, the first unmeasured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtype", default="auto", help="our compute dtype")
    parser.add_argument("--peers", default=",".join(PEERS), help="peers to run")
    parser.add_argument("--peer-python", default=str(ROOT / "benchmarks/.venv/bin/python"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.job:
        print(json.dumps(train_ours(json.loads(Path(options.job).read_text()))))
        return
    peers = [name.strip() for name in options.peers.split(",")]
    if unknown := [name for name in peers if name not in PEERS]:
        parser.error(f"--peers has {unknown}; choose from {', '.join(PEERS)}")
    if options.steps < 2:
        parser.error(f"--steps is {options.steps}; give at least 2, since the first is not measured")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; give at least 1")
    if not Path(options.peer_python).is_file():
        parser.error(f"{options.peer_python} is missing; run `make bench`, or name one with --peer-python")
    options.model = options.model or str(packaged_model())
    runs: dict[str, list[Run]] = {name: [] for name in ("ours", *peers)}
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        job = write_job(options, folder)

        def measure(name: str, **settings: Any) -> Run:
            result = run_side(name, job | settings, folder, options.peer_python)
            print(f"{name}: {', '.join(f'{seconds:.2f}' for seconds in result['seconds'])} s", flush=True)
            return result

        for number in range(options.rounds):
            for name in runs if number % 2 == 0 else reversed(runs):
                runs[name].append(measure(name, **PEERS.get(name, {"dtype": options.dtype})))
        same = {runs["ours"][0]["dtype"]: runs["ours"]}  # our runs by compute dtype
        for dtype in {PEERS[name]["dtype"] for name in peers} - set(same):
            same[dtype] = [measure(f"ours in {dtype}", dtype=dtype)]
    Console(width=115).print(report(job, runs, same), *describe_runs(runs, same), sep="\n")


def report(job: dict[str, Any], runs: dict[str, list[Run]], same: dict[str, list[Run]]) -> Table:
    """The table: medians over rounds, ratios within rounds, the largest loss difference, and the goals.

    Args:
        runs: each side's rounds.
        same: our runs by compute dtype, for comparing losses.
    """
    ours, size = runs["ours"], job["batch_size"]
    rows = [job["rows"][i] for i in job["order"][size:]]  # of the measured steps
    tokens = sum(len(ids) - 1 for row in rows for ids, _ in sequences_of(row))
    faster_than_default, faster_than_best, memory_share = GOALS[job["objective"]]

    def speed(run: Run) -> float:
        return tokens / sum(run["seconds"][1:])

    def limit(run: Run) -> float:
        return tokens / sum(run["limit"][1:])

    def peak(run: Run) -> float:
        return run["peak_bytes"] / 2**30

    def median(results: list[Run], value: Callable[[Run], float]) -> float:
        return statistics.median(map(value, results))

    def ratio(results: list[Run], value: Callable[[Run], float]) -> float:
        return statistics.median(value(a) / value(b) for a, b in zip(ours, results, strict=True))

    others = [name for name in runs if name not in ("ours", DEFAULT)]
    best = max(others, key=lambda name: median(runs[name], speed), default=None)
    table = Table(title=f"{len(ours)} rounds of {job['steps'] - 1} measured steps, {tokens:,} real tokens in each")
    for heading in ("side", "tokens/s", "ours is faster", "peak GiB", "ours takes", "losses differ by"):
        table.add_column(heading)
    for name, results in runs.items():
        rate, memory = f"{median(results, speed):.0f}", f"{median(results, peak):.2f}"
        if name == "ours":
            table.add_row(f"ours, {ours[0]['dtype']}", rate, "", memory, "", "")
            continue
        kind = {DEFAULT: ", its default", best: ", its best here"}.get(name, "")
        goal = {DEFAULT: faster_than_default, best: faster_than_best}.get(name)
        gap = loss_gap(same[PEERS[name]["dtype"]], results)
        faster, smaller = ratio(results, speed), ratio(results, peak)
        table.add_row(
            f"PEFT + {name}{kind}",
            rate,
            mark_goal(f"{faster:.2f} x", faster, ">=", goal),
            memory,
            mark_goal(f"{smaller:.2f} x", smaller, "<=", goal and memory_share),
            mark_goal(f"{gap:.1e}", gap, "<=", LOSS_GAP),
        )
    share = median(ours, lambda run: speed(run) / limit(run))
    table.add_row("the limit", f"{median(ours, limit):.0f}", mark_goal(f"{share:.2f} x", share, ">=", LIMIT_SHARE))
    return table


def loss_gap(some: list[Run], others: list[Run]) -> float:
    """The largest difference of a step's losses between any two runs."""
    pairs = ((a, b) for a in some for b in others)
    return max(abs(x - y) for a, b in pairs for x, y in zip(a["losses"], b["losses"], strict=True))


def mark_goal(text: str, value: float, sign: str, goal: float | None) -> str:
    """`text`, followed by the goal if there is one, and whether `value` meets it."""
    if goal is None:
        return text
    holds = {">=": operator.ge, "<=": operator.le}[sign](value, goal)
    return f"{text} ({sign} {goal:g}: {'yes' if holds else 'NO'})"


def describe_runs(runs: dict[str, list[Run]], same: dict[str, list[Run]]) -> list[str]:
    """Lines to print below the table: choices of `ours`, effect of bf16 on each side's losses, versions, threads,
    machine and date.
    """
    chosen = runs["ours"][0]
    lines = [f"ours: {chosen['dtype']}, {chosen['recomputed']:.0%} of the layers recomputed"]
    peers = {PEERS[name]["dtype"]: results for name, results in runs.items() if name in PEERS}
    for side, by_dtype in (("ours", same), ("peers", peers)):
        if {"bfloat16", "float32"} <= by_dtype.keys():
            gap = loss_gap(by_dtype["bfloat16"], by_dtype["float32"])
            lines.append(f"{side}: losses in bf16 differ from those in fp32 by {gap:.1e} at most")
    for name, side in [("ours", "ours"), ("peers", next(name for name in runs if name != "ours"))]:
        first = runs[side][0]
        versions = ", ".join(f"{package} {number}" for package, number in first["versions"].items())
        lines.append(f"{name}: {versions}; {first['threads']} threads")
    return [*lines, describe_machine()]


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
