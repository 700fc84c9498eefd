"""Fine-tune a 4-bit LLaMA-architecture model with LoRA, or answer a prompt with one.

    python train.py --use-4bit --model M --data train.jsonl --output-dir out
    accelerate launch --multi_gpu --num_processes 2 train.py --use-4bit --model M --data train.jsonl
    python train.py --use-4bit --model M --adapter out --prompt "..."

This file is the table of contents of a run: each step's chapter is a module of qlora/.
"""

import sys

from qlora.cli.commands.train import main
from qlora.cli.exits import run

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
