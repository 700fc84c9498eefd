"""Fine-tune a 4-bit LLaMA-architecture model with LoRA, or answer a prompt with one.

    python train.py --use-4bit --model M --data train.jsonl --output-dir out
    accelerate launch --multi_gpu --num_processes 2 train.py --use-4bit --model M --data train.jsonl
    python train.py --use-4bit --model M --adapter out --prompt "..."

This file is the table of contents of a run. `qlora train` is the same run, and from Python
`TrainingRun.from_config(config)` is (qlora/training/run.py): its `train` goes through the same chapters.
"""

import sys
from collections.abc import Sequence

from qlora.cli.commands.train import answer_prompt, publish, start_run
from qlora.cli.exits import run
from qlora.config.parse import parse_args
from qlora.config.run import RunConfig


def main(argv: Sequence[str]) -> None:
    config = parse_args(RunConfig, "train.py", argv)  # qlora/config: flags and YAML -> settings
    if config.generate.prompt is not None:
        return answer_prompt(config)  # qlora/generation.py
    with start_run(config, argv) as training:  # qlora/parallel, training/run_directory.py
        training.read_data()  # qlora/data: rows -> token ids and targets
        training.load_base()  # qlora/model, qlora/quant: the frozen base, in 4 bits
        training.add_adapter()  # qlora/lora: what trains, and how
        training.fit()  # qlora/training/loop.py: the steps; observers evaluate, sample, save and show
        training.save()  # training/saver.py, qlora/report: adapter, last page, loss curve
    publish(training)  # qlora/export/hub.py


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
