"""Every recipe in configs/ reads, takes the memory it says, and trains: scaled down, with its own settings."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from qlora.cli.commands.plan import PlanConfig
from qlora.config.parse import parse_args
from qlora.config.run import RunConfig
from qlora.model.hf_config import load_config
from qlora.planning.planner import Planner
from qlora.system.memory import GIB
from tests.tiny import tiny_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPES = CONFIGS / "shapes"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "demo")
MEMORY, PAGE = ((CONFIGS.parent / "docs" / name).read_text() for name in ("memory.md", "qlora.md"))
PLANNED = re.compile(r"^# +([\d.]+) GiB  (.*)$", re.MULTILINE)
PAPER_GB = {"7b": 6.9, "13b": 11.3, "33b": 24.7, "65b": 45.0}  # arXiv 2305.14314, figure 6
# Parameters as their authors and the hub give them.
SIZES = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
}


def flags_of(recipe: str) -> Iterator[tuple[str, list[str]]]:
    """(figure, flags of the plan command beside it) of a recipe's comment."""
    first: list[str] = []
    for figure, command in PLANNED.findall((CONFIGS / f"{recipe}.yaml").read_text()):
        same = command.startswith("the same, with ")
        flags = shlex.split(command.removeprefix("the same, with ").removeprefix("python -m qlora plan "))
        first = first or flags
        yield figure, [*first, *flags] if same else flags


def test_every_shape_has_a_recipe_and_every_recipe_a_shape() -> None:
    assert RECIPES == sorted(SIZES) == sorted(path.name for path in SHAPES.iterdir())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_what_it_says(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures in the comment are those of the command beside them, and the counts follow from the shapes."""
    monkeypatch.chdir(CONFIGS.parent)
    lines = list(flags_of(recipe))
    assert len(lines) == 2
    config = load_config(str(SHAPES / recipe))
    hidden, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    q_and_v = [(hidden, queries), (hidden, keys)]
    others = [(hidden, keys), (queries, hidden), (hidden, mlp), (hidden, mlp), (mlp, hidden)]
    in_and_out = {"q_proj,v_proj": q_and_v, "all-linear": q_and_v + others}
    planner = Planner(f"configs/shapes/{recipe}", "cuda")
    for figure, flags in lines:
        settings = parse_args(PlanConfig, "plan", flags)
        assert settings.model.model == f"configs/shapes/{recipe}" and settings.device == "cuda"
        assert f"--config configs/{recipe}.yaml" in " ".join(flags)
        plan = planner.plan(settings)
        assert figure == f"{plan.total / GIB:.2f}"
        shapes = in_and_out[",".join(settings.lora.target_modules)]
        trainable = settings.lora.rank * layers * sum(map(sum, shapes))
        assert plan.summary.trainable == trainable
        assert plan.summary.total == SIZES[recipe] + trainable
    size = recipe.removeprefix("llama-")
    if size in PAPER_GB:  # the comparison with the paper
        plan = planner.plan(parse_args(PlanConfig, "plan", [*lines[0][1], "--batch-size", "1"]))
        parts = [number / 1e9 for number in vars(plan.memory).values()]
        row = [f"{plan.total / 1e9:.1f}", *(f"{part:.2f}" for part in parts[:4]), f"{sum(parts[4:]):.2f}"]
        assert f"| {size.upper()} | {PAPER_GB[size]} | {' | '.join(row)} |" in PAGE
        assert re.search(rf"^\| planned, GB: .*\| {row[0]} \|", MEMORY, re.MULTILINE)
        less = (plan.total - 6 * plan.summary.trainable) / 1e9
        assert re.search(rf"^\| without fp32 copies .*\| {less:.1f} \|", MEMORY, re.MULTILINE)


@pytest.mark.parametrize(
    ("recipe", "lora", "count"),
    [
        ("llama-7b", dict(rank=8, target_modules="q_proj,v_proj"), 4_194_304),
        ("llama-13b", dict(rank=8, target_modules="q_proj,v_proj"), 6_553_600),
        ("llama-7b", dict(rank=64, target_modules="all-linear"), 159_907_840),
    ],
)
def test_golden_counts(recipe: str, lora: dict[str, Any], count: int) -> None:
    """Those that the papers' readers know."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in lora.items()]
    plan = Planner(str(SHAPES / recipe), "cuda").plan(parse_args(RunConfig, "plan", flags))
    assert plan.summary.trainable == count


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_when_scaled_down(recipe: str, tmp_path: Path) -> None:
    """Its own settings and architecture, two narrow layers: a step through train.py, and the adapter is there."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config = load_config(str(SHAPES / recipe))
    grouped = config.num_key_value_heads < config.num_attention_heads
    for name, value in dict(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
        num_key_value_heads=2 if grouped else 4, head_dim=16, layer_types=["full_attention"] * 2,
        bos_token_id=None, eos_token_id=2, pad_token_id=None,
    ).items():  # fmt: skip
        if hasattr(config, name):
            setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(20)))
    flags = ["--config", str(CONFIGS / f"{recipe}.yaml"), "--model", str(tmp_path / "model"), "--data", str(data)]
    train.main([*flags, "--output-dir", str(tmp_path / "out"), "--max-steps", "1", "--no-cache"])

    settings = parse_args(RunConfig, "train.py", flags)
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["learning_rate"] == settings.optimizer.learning_rate  # constant, from the first step
    assert line["loss"] > 0 and line["grad_norm"] > 0
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = [tensor.shape[0 if "lora_A" in name else 1] for name, tensor in saved.items()]
    assert ranks == [settings.lora.rank] * (2 * 2 * 7)
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
