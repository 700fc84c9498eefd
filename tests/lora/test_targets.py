"""Which layers an adapter gets: names, patterns, exclusions, and the defaults of other architectures."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora
from qlora.adapters.model import LoRAModel
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import inject_lora
from qlora.lora.layer import draw_A
from qlora.lora.targets import match_targets
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG


def llama(layers: int = 2) -> nn.Module:
    from transformers import LlamaForCausalLM

    from tests.models import tiny_llama_config

    return LlamaForCausalLM(tiny_llama_config(num_hidden_layers=layers))


def tree(*names: str) -> nn.Module:
    """Two blocks with linear layers of these names."""
    return nn.ModuleDict(
        {"h": nn.ModuleList(nn.ModuleDict({name: nn.Linear(4, 4) for name in names}) for _ in range(2))}
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": r".*\.[qk]_proj"}, ["q_proj", "k_proj"] * 2),
        ({"target_modules": re.compile(r"layers\.1\..*(up|down)_proj")}, []),
        ({"target_modules": re.compile(r".*layers\.1\..*(up|down)_proj")}, ["up_proj", "down_proj"]),
        ({"target_modules": {"v_proj", r".*0\.self_attn\.o_proj"}}, ["v_proj", "o_proj", "v_proj"]),
        ({"target_modules": ("q_proj", "v_proj"), "exclude_modules": r".*\.0\..*"}, ["q_proj", "v_proj"]),
        (
            {"target_modules": "all-linear", "exclude_modules": ["gate_proj", "up_proj", "down_proj"]},
            ["q_proj", "k_proj", "v_proj", "o_proj"] * 2,
        ),
    ],
)
def test_list_set_text_or_regex(settings: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    """The same choice by `should_adapt`, by PEFT from the saved file, and after loading."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config, network = LoRAConfig(**settings), llama()
    if not expected:
        pattern = config.target_modules
        assert pattern == [r"layers\.1\..*(up|down)_proj"]
        expected = ["up_proj", "down_proj"]  # a pattern may also fit the end of a name
    names = inject_lora(network, config)
    assert [name.rpartition(".")[2] for name in names] == expected
    layers = [name for name, m in llama().named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    assert [name for name in layers if config.should_adapt(name)] == names
    qlora.save_adapter(network, tmp_path, config)
    description = json.loads((tmp_path / CONFIG).read_text())
    theirs = get_peft_model(llama(), PeftConfig(target_modules=description["target_modules"], r=8))
    found = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert found == names
    again = LoRAModel(llama())
    again.load_adapter(tmp_path, "saved")
    assert list(again._adapters["saved"].layers) == names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": "(q_proj"}, "regular expressions"),
        ({"target_modules": ["(a+)+"]}, "regular expressions"),
        ({"target_modules": [r".{1,2}"]}, "without a comma"),
        ({"target_modules": 3}, "names separated by commas"),
        ({"exclude_modules": "[a"}, "exclude_modules holds"),
        ({"init_std": 0.02}, "init_std is for init gaussian"),
        ({"kaiming_a": 1.0, "init": "gaussian"}, "kaiming_a is for init kaiming"),
        ({"init_std": -1.0, "init": "gaussian"}, "init_std is -1.0"),
    ],
)
def test_values_are_checked_whenever_they_are_set(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoRAConfig(**settings)
    config = LoRAConfig(init=settings.get("init", "kaiming"))
    name = next(iter(settings))
    with pytest.raises(InputError, match=message):
        setattr(config, name, settings[name])
    assert config == LoRAConfig(init=settings.get("init", "kaiming"))


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("rank", "8"), ("alpha", math.nan), ("dropout", 1.0)])
def test_ranks_and_the_like_later(name: str, value: Any) -> None:
    """`rank = 0` was a ZeroDivisionError later, `rank="8"` a TypeError."""
    config = LoRAConfig()
    with pytest.raises(InputError, match=f"^{name} is "):
        setattr(config, name, value)
    assert config == LoRAConfig() and config.scaling == 2.0
    config.target_modules = ["c_attn"]
    config.use_rslora = True
    assert config.should_adapt("h.0.c_attn") and config.scaling == 16 / math.sqrt(8)


def test_unknown_settings_are_refused() -> None:
    config = LoRAConfig()
    with pytest.raises(InputError, match="Unknown setting 'rnak'; LoRAConfig has rank, alpha, "):
        config.rnak = 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_do_nothing_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match=r"\['k_proj'\] names none of the layers"):
        LoRAModel(llama(), LoRAConfig(**{kind: {"q_proj": 4, "k_proj": 4}}))


class Block(nn.Module):
    """Its layer has the name that a wrapped layer has inside."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.lora = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora(self.base_layer(x))


@pytest.mark.parametrize("targets", ["base_layer", "lora", "all-linear"])
def test_layers_with_names_of_ours(targets: str, tmp_path: Path) -> None:
    """A layer called base_layer was taken for its parent, and refused."""
    x, base = torch.ones(2, 8), nn.Sequential(Block(), Block())
    model = LoRAModel(copy.deepcopy(base), LoRAConfig(target_modules=targets))
    for parameter in model.trainable_parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save(tmp_path)
    again = LoRAModel(copy.deepcopy(base))
    again.load_adapter(tmp_path, "again")
    again.set_adapter("again")
    expected = model(x)
    assert torch.equal(again(x), expected) and not torch.allclose(expected, base(x))
    assert model.summary().adapted_layers == (4 if targets == "all-linear" else 2)
    assert model.merge_and_unload().state_dict().keys() == base.state_dict().keys()


def test_a_shared_layer_has_each_of_its_names() -> None:
    """Only its first name was known: others matched no layer."""
    network = nn.ModuleDict({"first": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    network["last"] = network["first"]
    assert list(match_targets(network, ["last"])) == ["first"]
    assert list(match_targets(network, ["all-linear"], exclude=["last"])) == ["other"]
    model = LoRAModel(network, LoRAConfig(target_modules="last"))
    assert network["last"] is network["first"] and model.summary().adapted_layers == 1
    assert list(match_targets(network, ["last"])) == ["first"]


def test_exclusions_that_do_nothing_are_refused() -> None:
    with pytest.raises(InputError, match=r"exclude_modules \['k_proj'\] name none of the layers"):
        match_targets(llama(), ["q_proj"], exclude=["k_proj"])
    with pytest.raises(InputError, match="leaves no layer to adapt"):
        match_targets(llama(), ["q_proj"], exclude=["q_proj"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("c_attn", "c_proj"), "c_attn"),
        (("query_key_value", "dense"), "query_key_value"),
        (("query", "key", "value"), "query, value"),
        (("qkv_proj", "o_proj"), "qkv_proj"),
    ],
)
def test_defaults_by_architecture(names: tuple[str, ...], expected: str) -> None:
    said: list[str] = []
    model = LoRAModel(tree(*names), LoRAConfig(), say=said.append)
    assert said == [f"target_modules: {expected}, since this model has no q_proj or v_proj"]
    assert model.config.target_modules == expected.split(", ")
    assert model.summary().adapted_layers == 2 * len(model.config.target_modules)


def test_defaults_stay_where_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert LoRAModel(llama(), LoRAConfig()).config.target_modules == ["q_proj", "v_proj"]
    assert LoRAModel(tree("q_proj", "c_attn"), LoRAConfig(target_modules="q_proj")).summary().adapted_layers == 2
    with pytest.raises(InputError, match=r"\['v_proj'\] match no linear layer"):
        LoRAModel(tree("q_proj", "c_attn"), LoRAConfig())
    with pytest.raises(InputError, match="This model has: one, two"):
        LoRAModel(tree("one", "two"), LoRAConfig())
    assert capsys.readouterr().out == ""


def test_counts() -> None:
    """GPT-2 124M, LLaMA-7B and a 4096 x 4096 layer, none of them allocated."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        gpt2, llama_7b = GPT2LMHeadModel(GPT2Config()), LlamaForCausalLM(LlamaConfig())
        square = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    for model, targets, expected in (
        (gpt2, None, 294_912),
        (GPT2LMHeadModel, r"c_attn,.*attn\.c_proj", 442_368),
        (llama_7b, None, 4_194_304),
        (square, "0", 65_536),
    ):
        with torch.device("meta"):
            network = model if isinstance(model, nn.Module) else model(GPT2Config())
        config = LoRAConfig() if targets is None else LoRAConfig(target_modules=targets)
        inject_lora(network, config)
        qlora.freeze_base(network)
        assert qlora.count_trainable_parameters(network) == expected


def test_spread_of_the_initial_values() -> None:
    def draw(init: str, spread: float | None) -> torch.Tensor:
        return draw_A(64, 600, init, torch.Generator().manual_seed(0), None, spread)

    assert draw("gaussian", 0.02).std().item() == pytest.approx(0.02, rel=0.02)
    assert draw("gaussian", None).std().item() == pytest.approx(1 / 64, rel=0.02)
    for slope in (None, 0.0, 1.0):
        expected = torch.empty(64, 600)
        nn.init.kaiming_uniform_(expected, a=math.sqrt(5) if slope is None else slope)
        assert draw("kaiming", slope).abs().max().item() == pytest.approx(expected.abs().max().item(), rel=1e-3)
    config = LoRAConfig(init="gaussian", init_std=0.02, target_modules="0", rank=64, adapter_dtype="float32")
    A = LoRAModel(nn.Sequential(nn.Linear(600, 4)), config).lora_parameters()[0]
    assert A.std().item() == pytest.approx(0.02, rel=0.02)
