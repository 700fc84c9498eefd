"""One run of PEFT + TRL's SFTTrainer or DPOTrainer on tokenized rows, started by benchmarks/peers.py.

    python peer_trl.py JOB.json

It imports nothing from this project, since it runs in a separate environment. It prints one JSON object.
"""

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, prepare_model_for_kbit_training
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Seconds and loss of each optimizer step."""

    def __init__(self):
        self.seconds, self.losses = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


class SFTInOrder(SFTTrainer):
    """Takes the rows in the given order."""

    def _get_train_sampler(self, *_args):
        return SequentialSampler(self.train_dataset)


class DPOInOrder(DPOTrainer):
    """The same."""

    def _get_train_sampler(self, *_args):
        return SequentialSampler(self.train_dataset)

    def _prepare_dataset(self, dataset, *_args):
        return dataset  # SFTTrainer knows tokenized rows by itself


def peak_bytes():
    """Highest memory use of this process, as qlora/system/device.py reads it: CUDA allocator or resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    with open(sys.argv[1]) as file:
        job = json.load(file)
    dtype = getattr(torch, job["dtype"])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, quantization_config=quantization)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=job["checkpointing"])
    model = PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)
    clock = Clock()
    is_dpo = job["objective"] == "dpo"
    kind, trainer_kind = (DPOConfig, DPOInOrder) if is_dpo else (SFTConfig, SFTInOrder)
    config = kind(
        output_dir=job["output_dir"], per_device_train_batch_size=job["batch_size"], max_steps=job["steps"],
        learning_rate=job["learning_rate"], lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1.0,
        optim="adamw_torch", weight_decay=0.0, bf16=dtype == torch.bfloat16, use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=job["checkpointing"], max_length=None,
        **({"beta": 0.1} if is_dpo else {"completion_only_loss": True}),
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, dataset_num_proc=None,
    )  # fmt: skip
    trainer = trainer_kind(
        model=model, args=config, train_dataset=Dataset.from_list([job["rows"][i] for i in job["order"]]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]), callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    packages = ("torch", "transformers", "bitsandbytes", "accelerate", "peft", "trl")
    result = {"seconds": clock.seconds, "losses": clock.losses, "peak_bytes": peak_bytes()}
    result |= {"versions": {name: version(name) for name in packages}, "threads": torch.get_num_threads()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
