"""Side by side with PEFT + TRL's SFTTrainer: real tokens per second, peak memory and losses, in one run.

    python -m venv benchmarks/.venv && benchmarks/.venv/bin/pip install -r benchmarks/requirements.txt
    python -m benchmarks.peers --model M --data train.jsonl

Each side is a process of its own that loads the same dense checkpoint, quantizes it to NF4 with double
quantization, starts from the same rank-8 adapter on q_proj and v_proj, and trains on the same tokenised rows in
the same windows with AdamW at a constant rate. The sides take turns, `--rounds` times; a step's rate counts
real tokens, padding left out, and each process's first step is left out as its warm-up. Ratios are medians over
the rounds of (ours / theirs in the same round), for these machines are shared and drift.

    ours        as it comes: compute dtype by measurement, packing, checkpointing only where needed
    TRL bf16    SFTTrainer's defaults: bf16, gradient checkpointing, batch 8, padded rows
    TRL fp32    the same in fp32
    TRL fp32-   the same in fp32 without gradient checkpointing

The limit: FLOPs that any implementation must do, over the rate of a square matrix product timed before and
after each step in the same process. Per token 2 x body parameters (without embeddings) for the forward pass and
as much for the gradient of the activations; 4 x head parameters per supervised token; attention's
12 x layers x heads x head_dim x length / 2 per token.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PEERS: dict[str, dict[str, Any]] = {
    "TRL bf16": {"dtype": "bfloat16", "checkpointing": True},
    "TRL fp32": {"dtype": "float32", "checkpointing": True},
    "TRL fp32-": {"dtype": "float32", "checkpointing": False},
}
SQUARE = 1536  # width of the product that tells the machine's rate


def write_job(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A dense checkpoint, the initial adapter, and the rows in the order that both sides train on."""
    from transformers import AutoModelForCausalLM, GgufConfig

    from qlora.adapter import save_adapter
    from qlora.config import LoRAConfig
    from qlora.dataset import load_examples
    from qlora.injection import inject_lora
    from qlora.model import load_base_model, load_tokenizer
    from qlora.packing import WindowOrder

    source, dense = Path(options.model), folder / "model"
    tokenizer = load_tokenizer(options.model)
    where: tuple[Any, dict[str, Any]] = (options.model, {})
    if source.suffix == ".gguf":
        where = source.parent, {"gguf_file": source.name, "quantization_config": GgufConfig(dequantize=True)}
    AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.bfloat16, **where[1]).save_pretrained(dense)
    tokenizer.save_pretrained(dense)

    examples, _ = load_examples(options.data, tokenizer, options.max_length, on_long="drop")
    order = WindowOrder(len(examples), options.batch_size, seed=0)
    rows = []
    for step in range(options.steps):
        for example in (examples[i] for i in order.window(step)):
            ids = [*example.input_ids.tolist(), max(0, int(example.targets[-1]))]
            rows.append({"input_ids": ids, "completion_mask": [0, *(example.targets != -100).int().tolist()]})
    if len(rows) < options.steps * options.batch_size:
        sys.exit(f"error: {options.data} has too few rows for {options.steps} whole windows")
    lora = LoRAConfig(rank=8)
    model = load_base_model(str(dense), compute_dtype="float32", cache=False)
    inject_lora(model, lora, seed=0)
    save_adapter(model, folder / "adapter", lora, str(dense))
    keep = ("batch_size", "steps", "learning_rate", "max_length")
    job = {name: getattr(options, name) for name in keep} | {"rows": rows, "model": str(dense)}
    return job | {"adapter": str(folder / "adapter"), "output_dir": str(folder / "trl")}


def train_ours(job: dict[str, Any], dtype: str) -> dict[str, Any]:
    """One run of this project, through `fit`."""
    from accelerate import Accelerator

    from qlora.adapter import load_adapter
    from qlora.device import best_device
    from qlora.injection import lora_parameters
    from qlora.model import load_base_model
    from qlora.optim import build_optimizer, build_schedule, choose_optimizer
    from qlora.packing import make_batches
    from qlora.tokenize import IGNORE_INDEX, Example
    from qlora.trainer import settle_checkpointing, train_step

    device, size = best_device(), job["batch_size"]
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    model = load_base_model(job["model"], compute_dtype=dtype, device=device)
    load_adapter(model, job["adapter"])
    checkpointing = settle_checkpointing(model, "auto", size * job["max_length"], say=lambda line: None)
    parameters = lora_parameters(model)
    for parameter in parameters:
        parameter.grad_dtype = torch.float32
    optimizer = build_optimizer(parameters, choose_optimizer("auto", device))
    rate = build_schedule("constant", job["learning_rate"], 0, job["steps"])
    examples = []
    for row in job["rows"]:
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["completion_mask"], dtype=torch.bool)
        examples.append(Example(ids[:-1], ids.masked_fill(~mask, IGNORE_INDEX)[1:]))
    model.train()
    result: dict[str, Any] = {"seconds": [], "losses": [], "limit": [], "checkpointing": checkpointing}
    for step in range(job["steps"]):
        window = examples[step * size : (step + 1) * size]
        before = product_rate(model.compute_dtype, device)
        started = time.perf_counter()
        batches = make_batches(window, size, job["max_length"], packing=True)
        loss, _, _, _ = train_step(model, optimizer, batches, accelerator, rate(step), max_grad_norm=1.0)
        result["seconds"].append(time.perf_counter() - started)
        result["losses"].append(loss)
        machine = (before + product_rate(model.compute_dtype, device)) / 2
        result["limit"].append(useful_flops(model, window) / machine)
    result["dtype"] = str(model.compute_dtype).removeprefix("torch.")
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square product: the median of five."""
    x = torch.ones(SQUARE, SQUARE, dtype=dtype, device=device)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        (x @ x)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * SQUARE**3 / statistics.median(seconds)


def useful_flops(model: Any, window: list[Any]) -> float:
    """What a step must compute, by the module's formula."""
    from qlora.quantize import Linear4bit, logical_numel

    config = model.config
    body = sum(logical_numel(m.weight) for m in model.modules() if isinstance(m, Linear4bit))
    head = config.vocab_size * config.hidden_size
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim / 2
    return sum(4 * body * len(e) + 4 * head * e.num_targets + pairs * len(e) ** 2 for e in window)


def run_side(name: str, job_file: Path, peer_python: str, dtype: str) -> dict[str, Any]:
    """Start one side and read the JSON object that it prints last."""
    if name == "ours":
        command = [sys.executable, "-m", "benchmarks.peers", "--job", str(job_file), "--dtype", dtype]
    else:
        command = [peer_python, str(ROOT / "benchmarks/peer_trl.py"), str(job_file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: {name} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare training with PEFT + TRL's.")
    parser.add_argument("--model", help="a Hugging Face directory or .gguf file")
    parser.add_argument("--data", help="rows as train.py takes them")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a process, the first unmeasured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtype", default="auto", help="our compute dtype")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of them to run")
    parser.add_argument("--peer-python", default=str(ROOT / "benchmarks/.venv/bin/python"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(train_ours(json.loads(Path(options.job).read_text()), options.dtype)))
        return
    if not options.model or not options.data:
        parser.error("give --model and --data")
    names = ["ours", *options.peers.split(",")]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        job = write_job(options, Path(folder))
        files = {}
        for name in names:
            files[name] = Path(folder) / f"{name}.json"
            files[name].write_text(json.dumps(job | PEERS.get(name, {})))
        for number in range(options.rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                runs[name].append(run_side(name, files[name], options.peer_python, options.dtype))
                print(f"round {number + 1}, {name}: {runs[name][-1]['seconds']}", flush=True)
    report(job, runs)


def report(job: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table: medians over rounds, ratios within rounds, and the largest difference of a loss."""
    size = job["batch_size"]
    tokens = [
        sum(len(row["input_ids"]) - 1 for row in job["rows"][start : start + size])
        for start in range(0, len(job["rows"]), size)
    ]

    def rates(run: dict[str, Any], key: str = "seconds") -> float:
        return sum(tokens[1:]) / sum(run[key][1:])

    ours = runs["ours"]
    table = Table(title=f"{len(ours)} rounds of {len(tokens) - 1} measured steps, {sum(tokens[1:])} real tokens")
    for heading in ("side", "tokens/s", "ours is", "peak GiB", "ours takes", "losses differ by"):
        table.add_column(heading)
    for name, results in runs.items():
        faster = statistics.median(rates(a) / rates(b) for a, b in zip(ours, results, strict=True))
        memory = statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in zip(ours, results, strict=True))
        apart = max(
            abs(x - y)
            for a, b in zip(ours, results, strict=True)
            for x, y in zip(a["losses"], b["losses"], strict=True)
        )
        rate = statistics.median(rates(run) for run in results)
        peak = statistics.median(run["peak_bytes"] for run in results) / 2**30
        label = name if name != "ours" else f"ours ({ours[0]['dtype']})"
        table.add_row(label, f"{rate:.0f}", f"{faster:.2f} x", f"{peak:.2f}", f"{memory:.2f} x", f"{apart:.1e}")
    limit = statistics.median(rates(run, "limit") for run in ours)
    share = statistics.median(rates(run) / rates(run, "limit") for run in ours)
    table.add_row("the limit", f"{limit:.0f}", f"{share:.2f} x", "", "", "")
    console = Console(width=100)
    console.print(table)
    names = ("torch", "transformers", "bitsandbytes", "accelerate")
    console.print(", ".join(f"{name} {version(name)}" for name in names), "peers: benchmarks/requirements.txt")
    console.print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
