"""Cost of checkpoints in a training run: seconds that the loop waits, and seconds that the writing thread works.

    python -m benchmarks.checkpoint_cost --model M --data train.jsonl [--steps 30] [--save-every 50]

Trains with a checkpoint after every step, so that each is measured, and scales to one in `--save-every` steps.
"Waits" is the loop's time in `save`: copies, and waiting for an unfinished write. "Writes" runs in parallel with
training; if all cores are busy it may slow a step by as much, so the upper bound is the sum.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train
from qlora.cli.exits import run
from qlora.report.curve import read_metrics
from qlora.training.saver import CheckpointWriter


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save-every", type=int, default=50, help="the interval to scale to")
    options, others = parser.parse_known_args(argv)

    waits: list[float] = []
    writes: list[float] = []
    save, write = CheckpointWriter.save, CheckpointWriter._write

    def timed(method: Any, seconds: list[float]) -> Any:
        def call(*arguments: Any) -> None:
            start = time.perf_counter()
            method(*arguments)
            seconds.append(time.perf_counter() - start)

        return call

    CheckpointWriter.save = timed(save, waits)  # type: ignore[method-assign]
    CheckpointWriter._write = timed(write, writes)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model", options.model, "--data", options.data, "--output-dir", f"{folder}/out"]
        train.main([*flags, "--max-steps", str(options.steps), "--save-every", "1", *others])
        training, _ = read_metrics(Path(folder) / "out/metrics.jsonl")
        newest = max((Path(folder) / "out/checkpoints").iterdir())
        size = sum(file.stat().st_size for file in newest.iterdir())
    step = statistics.median(line["num_tokens"] / line["tokens_per_second"] for line in training)
    wait, work = statistics.median(waits), statistics.median(writes)
    interval = options.save_every * step
    print(
        f"a step takes {step:.3f} s; a checkpoint of {size / 1e6:.1f} MB waits {wait:.4f} s, writes {work:.4f} s"
    )
    print(
        f"at --save-every {options.save_every}: {wait / interval:.4%} of the time waiting, "
        f"at most {(wait + work) / interval:.4%} with the writing"
    )


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
