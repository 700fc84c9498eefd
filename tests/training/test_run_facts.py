"""The facts in run.json."""

from __future__ import annotations

import json
import shlex
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import train
from qlora.config.parse import parse_args
from qlora.config.run import RunConfig
from qlora.lora.trainable import parameter_summary
from qlora.model.loss import CHUNK_SIZE
from qlora.system.device import describe_device
from qlora.training.run_facts import count_lengths, describe_command, gather_facts
from tests.models import save_tiny_llama
from tests.shortcuts import plan_memory
from tests.tiny import tiny_tokenizer
from tests.training.test_checkpoint import adapted
from tests.training.test_loop import make_examples


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny"), tokenizer=tiny_tokenizer()))


def test_sizes_and_data_are_those_of_the_run(tiny: str) -> None:
    model, examples = adapted(tiny), make_examples(12)
    plan = plan_memory(model, 256, torch.float32, 0, CHUNK_SIZE)
    facts = gather_facts(["--rank", "4"], Accelerator(cpu=True), model, plan, examples, 3)
    counts = facts["parameters"]
    assert str(parameter_summary(model)).startswith(f"{counts['trainable']:,} trainable of {counts['total']:,}")
    assert sum(facts["memory_plan"].values()) == plan.total and facts["memory_plan"]["base"] == plan.base
    found = facts["examples"]
    assert (found["num_train"], found["num_held_out"]) == (12, 3)
    assert found["num_tokens"] == sum(len(e) for e in examples)
    assert found["num_targets"] == sum(int((e.targets != -100).sum()) for e in examples)
    assert sum(found["lengths"]["counts"]) == 12
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["qlora"]
    assert set(facts["versions"]) == {
        "python", "torch", "bitsandbytes", "transformers", "accelerate", "datasets", "qlora",
    }  # fmt: skip
    assert datetime.fromisoformat(facts["started"]).tzinfo is not None
    assert facts == json.loads(json.dumps(facts)) and facts["num_processes"] == 1


def test_examples_that_are_read_when_asked_for_tell_their_sizes(tiny: str) -> None:
    import numpy as np

    class Lazy:
        lengths, num_targets = np.array([3, 5]), np.int64(4)

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("read for nothing")

    model = adapted(tiny)
    plan = plan_memory(model, 256, torch.float32, 0, CHUNK_SIZE)
    lazy: Any = Lazy()
    found = json.loads(json.dumps(gather_facts([], Accelerator(cpu=True), model, plan, lazy, 0)["examples"]))
    assert (found["num_train"], found["num_tokens"], found["num_targets"]) == (2, 8, 4)


@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [1, 2, 3, 400], list(range(1, 1025))])
def test_the_histogram_counts_every_length_once(lengths: list[int]) -> None:
    found = count_lengths(lengths)
    edges, counts = found["edges"], found["counts"]
    assert len(edges) == len(counts) + 1 <= 21 and len({b - a for a, b in pairwise(edges)}) == 1
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        assert count == sum(low <= length < high for length in lengths)
    assert sum(counts) == len(lengths) and edges[0] == 0 and edges[-1] > max(lengths)


def test_the_command_gives_the_same_settings_back() -> None:
    arguments = ["--model", "a b", "--data", "it's.jsonl", "--new-tokens", "<a>,$b", "--rank", "4"]
    words = shlex.split(describe_command(arguments))
    assert words[:2] == ["python", "train.py"]
    assert parse_args(RunConfig, "train.py", words[2:]) == parse_args(RunConfig, "train.py", arguments)
    several = describe_command(arguments, 4)
    assert several.startswith("accelerate launch --multi_gpu --num_processes 4 train.py --model 'a b'")


def test_a_device_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_device(torch.device("cpu")).endswith(f", {torch.get_num_threads()} threads")
    properties = type("P", (), {"name": "NVIDIA X", "total_memory": 80 * 2**30})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert describe_device(torch.device("cuda")) == "NVIDIA X, 80 GiB"


def test_run_json_holds_settings_and_the_facts_of_the_latest_start(tiny: str, tmp_path: Path) -> None:
    """Secrets are taken out; checkpoints, which equal runs share byte for byte, hold no facts."""
    secret = "hf_" + "aB3" * 12
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) + "\n" for n in range(6)))
    flags = ["--model", tiny, "--data", str(data), "--compute-dtype", "float32", "--output-dir", str(out)]
    flags += ["--batch-size", "2", "--run-name", secret]
    train.main([*flags, "--max-steps", "1"])
    first = json.loads((out / "run.json").read_text())
    assert list(first) == [
        "model",
        "lora",
        "data",
        "train",
        "parallel",
        "generate",
        "calibration",
        "debug",
        "facts",
    ]
    assert first["train"]["batch_size"] == 2 and first["train"]["run_name"] == "[redacted]"
    assert first["facts"]["command"].startswith(f"python train.py --model {tiny} --data")
    assert secret not in (out / "run.json").read_text()
    train.main([*flags, "--max-steps", "2", "--resume", "auto"])
    second = json.loads((out / "run.json").read_text())["facts"]
    assert second["command"].endswith("--max-steps 2 --resume auto")
    assert second["started"] >= first["facts"]["started"]
    assert "facts" not in (out / "checkpoints/step-000002/state.json").read_text()
    assert not (out / "samples.jsonl").exists() and not (out / "logs").exists()
