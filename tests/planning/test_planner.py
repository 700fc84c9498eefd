"""Plans from a config alone against those of the loaded model, and what `python -m qlora plan` says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.cli.main import main
from qlora.config.data import DataConfig
from qlora.config.devices import DevicesConfig
from qlora.config.loop import LoopConfig
from qlora.config.lora import LoRAConfig
from qlora.config.model import ModelConfig
from qlora.config.optimizer import OptimizerConfig
from qlora.config.preferences import PreferenceConfig
from qlora.config.run import RunConfig
from qlora.data.tokenizer_files import add_tokens
from qlora.lora.adapter import inject_lora
from qlora.lora.optimizer import build_optimizer
from qlora.lora.trainable import freeze_base, parameter_summary
from qlora.model.base import base_info
from qlora.model.load import load_base_model, plan_base_model
from qlora.model.tokenizer import load_tokenizer
from qlora.planning.memory import plan_recomputing
from qlora.planning.planner import Planner, RunPlan
from qlora.quant.weight import QuantConfig, dequantize_weight, quantize_weight
from qlora.system.errors import InputError
from qlora.training.recompute import choose_recomputed_layers
from tests.models import save_tiny_llama
from tests.shortcuts import plan_memory
from tests.tiny import tiny_tokenizer

TOKENS = 96


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tied")
    return save_tiny_llama(path, tokenizer=tiny_tokenizer(), tie_word_embeddings=True, attention_bias=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("untied"), tokenizer=tiny_tokenizer())


def adapted(model: Any, name: str, lora: LoRAConfig) -> Any:
    tokenizer = None
    if lora.new_tokens:
        tokenizer = load_tokenizer(name)
        add_tokens(tokenizer, lora.new_tokens)
    inject_lora(model, lora, tokenizer=tokenizer)
    freeze_base(model)
    return model


def assert_same_plan(name: str, model: ModelConfig, lora: LoRAConfig, cache: bool = False) -> None:
    """Every component, with any number of layers recomputed, of the loaded model and of its config."""
    quant, dtype = QuantConfig(model.quant_type, model.double_quant), model.compute_dtype
    loaded = adapted(load_base_model(name, model.use_4bit, quant, dtype, cache=cache), name, lora)
    config = RunConfig(replace(model, model=name), lora, DataConfig(max_length=TOKENS), LoopConfig(batch_size=1))
    planned = Planner(name, "cpu").plan(config)
    assert planned.memory == plan_memory(loaded, TOKENS, base_info(loaded).compute_dtype)
    assert planned.summary == parameter_summary(loaded)
    empty = adapted(plan_base_model(name, model.use_4bit, quant, dtype), name, lora)
    assert all(p.is_meta for p in empty.parameters())
    assert plan_recomputing(empty, TOKENS, base_info(empty).compute_dtype) == plan_recomputing(
        loaded, TOKENS, base_info(loaded).compute_dtype
    )


@pytest.mark.parametrize("which", ["tied", "untied"])
@pytest.mark.parametrize(
    ("model", "lora"),
    [
        (dict(), dict()),
        (dict(quant_type="fp4", double_quant=False), dict(target_modules="all-linear", rank=3)),
        (dict(use_4bit=False), dict(adapter_dtype="float32")),
        (dict(compute_dtype="float32"), dict(use_dora=True, dropout=0.1, target_modules="all-linear")),
        (dict(use_4bit=False), dict(use_dora=True)),
        (dict(), dict(modules_to_save="lm_head,norm", bias="all")),
        (dict(), dict(new_tokens="<a>,<b>", layers="1")),
        (dict(), dict(use_adalora=True)),
        (dict(), dict(rank_pattern="layers.0.self_attn.q_proj=2")),
    ],
)
def test_the_config_alone_gives_the_loaded_model_s_plan(
    which: str, model: dict[str, Any], lora: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    settings = {"compute_dtype": "bfloat16", **model}
    assert_same_plan(str(request.getfixturevalue(which)), ModelConfig(**settings), LoRAConfig(**lora))


@pytest.mark.parametrize("use_4bit", [True, False])
def test_the_real_model_s_plan(smollm2: str, use_4bit: bool) -> None:
    model = ModelConfig(use_4bit=use_4bit, compute_dtype="bfloat16")
    assert_same_plan(smollm2, model, LoRAConfig(target_modules="all-linear", rank=16), cache=True)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_rows_of_preferences(untied: Path, device: str) -> None:
    """A pair trains two sequences. KTO trains one, and computes the other without gradients, as a reference is."""
    planner = Planner(str(untied), device)

    def plan(objective: Any, length: int = TOKENS, each_step: bool = False) -> RunPlan:
        config = RunConfig(
            ModelConfig(str(untied), compute_dtype="bfloat16"), data=DataConfig(max_length=length),
            preference=PreferenceConfig(objective, reference_each_step=each_step),
        )  # fmt: skip
        return planner.plan(config, DevicesConfig())

    assert plan("kto").memory == plan("sft").memory
    assert plan("dpo").memory == plan("sft", 2 * TOKENS).memory
    other = plan("kto").flops - plan("sft").flops
    assert 0.3 < other / plan("sft").flops < 0.6
    assert plan("dpo", each_step=True).flops - plan("dpo").flops == 2 * other
    assert plan("kto", each_step=True).flops - plan("kto").flops == 2 * other
    assert plan("kto").flops < plan("dpo").flops == 2 * plan("sft").flops


def test_a_family_without_fused_blocks(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=300)).save_pretrained(tmp_path)
    assert_same_plan(str(tmp_path), ModelConfig(compute_dtype="float32"), LoRAConfig(target_modules="c_attn"))


def test_a_checkpoint_in_4_bits(untied: Path, tmp_path: Path) -> None:
    """Its config says how it was quantized, whatever the flags say."""
    from qlora.model.cache_writer import write_cache
    from qlora.model.resolve import open_source
    from qlora.model.skeleton import empty_model

    target, quant = tmp_path / "quantized", QuantConfig("fp4", False)
    target.mkdir()
    network = empty_model(str(untied))
    write_cache(network, open_source(untied), quant, torch.device("cpu"), target)
    assert_same_plan(str(target), ModelConfig(compute_dtype="bfloat16"), LoRAConfig())
    with pytest.raises(InputError, match="stored in 4 bits; leave out --no-4bit"):
        plan_base_model(str(target), use_4bit=False)


def test_planning_leaves_quantizing_as_it_was(untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes caches a table on the device of its first call: after a plan nothing could be quantized."""
    monkeypatch.setattr("bitsandbytes.functional.name2qmap", {})
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    plan_base_model(str(untied), compute_dtype="float32")
    first = dequantize_weight(quantize_weight(weight, QuantConfig()), torch.float32)
    assert (first - weight).norm() < 0.2 * weight.norm()


@pytest.mark.parametrize("optim", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_the_optimizer_s_state(untied: Path, optim: str) -> None:
    """The bytes of masters and moments after a step; tensors of fewer and of more than 4,096 values."""
    lora = LoRAConfig(rank=60, target_modules="all-linear")
    model = adapted(load_base_model(str(untied), compute_dtype="float32", cache=False), str(untied), lora)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert min(p.numel() for p in trainable) < 4096 < max(p.numel() for p in trainable)
    optimizer = build_optimizer(trainable, optim)
    for parameter in trainable:
        parameter.grad = torch.zeros(parameter.shape)
    optimizer.step(1e-3)
    state = {name: tensor for name, tensor in optimizer.state_tensors().items() if tensor.dim() > 0}
    planned = plan_memory(model, TOKENS, torch.float32, optim=optim).optimizer
    assert planned == sum(tensor.nbytes for tensor in state.values())


def test_a_run_recomputes_what_its_plan_says(untied: Path) -> None:
    """From the same free memory and budget: the rule stands in one place."""
    name = str(untied)
    loaded = adapted(load_base_model(name, compute_dtype="float32", cache=False), name, LoRAConfig())
    totals = [plan.total for plan in plan_recomputing(loaded, TOKENS, torch.float32)]
    for budget, expected in ((totals[0], 0), (totals[1], 1), (min(totals) - 2**20, 2)):
        train = LoopConfig(batch_size=1, memory_budget=f"{budget / 2**20:.9f}MiB")
        if budget != train.memory_budget_bytes:  # rounded down
            train = LoopConfig(batch_size=1, memory_budget=f"{(budget + 1) / 2**20:.9f}MiB")
        model = ModelConfig(model=name, compute_dtype="float32")
        plan = Planner(name, "cpu").plan(RunConfig(model, LoRAConfig(), DataConfig(max_length=TOKENS), train))
        share, _ = choose_recomputed_layers(
            loaded, "auto", TOKENS, train.memory_budget_bytes, say=lambda line: None
        )
        assert plan.recomputed == expected == round(2 * share)


def test_half_of_the_device_is_left_free(untied: Path) -> None:
    """Without a budget: as `choose_recomputed_layers`, what is loaded and half of what is then free."""
    name, config = str(untied), RunConfig(ModelConfig(compute_dtype="float32"), data=DataConfig(max_length=500))
    everything = Planner(name, "cuda").plan(config).memory
    beside = everything.total - everything.base - everything.adapters
    for free, kept in ((2 * beside, True), (2 * beside - 2, False)):
        planner = Planner(name, "cuda", everything.base + everything.adapters + free)
        assert (planner.plan(config).recomputed == 0) is kept


# ---- what makes it fit ------------------------------------------------------------------------------------


def config_of(**train: Any) -> RunConfig:
    settings = dict(batch_size=4, gradient_checkpointing="off")
    return RunConfig(
        ModelConfig(compute_dtype="float32", use_4bit=False),
        LoRAConfig(rank=32, target_modules="all-linear"),
        DataConfig(max_length=512),
        LoopConfig(**{**settings, **train}),
        OptimizerConfig(optim="adamw"),
    )


def test_remedies_make_it_fit(untied: Path) -> None:
    """Each is planned anew, alone and together, and the mildest that fits is named."""
    name, config = str(untied), config_of()
    before = Planner(name, "cuda").plan(config).total
    smaller = Planner(name, "cuda").plan(config_of(batch_size=2, grad_accum=2)).total
    alone, together = Planner(name, "cuda", smaller).remedies(config)
    totals = {remedy.flags: remedy.plan.total for remedy in alone}
    assert totals["--batch-size 2 --grad-accum 2"] == smaller < before
    assert {flags.split()[0] for flags in totals} == {
        "--gradient-checkpointing", "--batch-size", "--optim", "--use-4bit", "--rank", "--max-length",
    }  # fmt: skip
    assert together is not None and together.plan.total <= smaller
    for remedy in [*alone, together]:
        assert Planner(name, "cuda").plan(remedy.config).total == remedy.plan.total < before


def test_remedies_add_up_until_it_fits(untied: Path) -> None:
    name, config = str(untied), config_of()
    planner = Planner(name, "cuda")
    least = planner.plan(config_of(gradient_checkpointing="on", batch_size=1, grad_accum=4)).total
    _, together = Planner(name, "cuda", least).remedies(config)
    assert together is not None
    assert together.flags == "--gradient-checkpointing on --batch-size 1 --grad-accum 4"
    assert together.plan.total == least
    _, none = Planner(name, "cuda", 1000).remedies(config)
    assert none is None


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    main(["plan", *flags])
    return capsys.readouterr().out


def test_the_command(untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Components add up to the total, any file of a run is taken, and it ends with a verdict."""
    file = tmp_path / "run.yaml"
    file.write_text("rank: 4\nlearning_rate: 0.001\ndata: none.jsonl\ngradient_checkpointing: on\nmax_steps: 3\n")
    flags = ("--model", str(untied), "--config", str(file), "--device", "cpu")
    out = printed(capsys, *flags, "--device-memory", "900GiB")
    sizes = [float(number) for number in re.findall(r"^\w+ {2,}([\d.]+) GiB", out, re.MULTILINE)]
    assert len(sizes) == 9 and sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=0.05) and sizes[-2] > 0.1
    assert "2 of 2 layers recomputed" in out and re.search(r"^fits in 900.00 GiB, ", out, re.MULTILINE)
    out = printed(capsys, "--model", str(untied), "--device", "cuda")
    assert "process" not in out and ("Pass --device-memory" in out or torch.cuda.is_available())
    flags = ("--model", str(untied), "--device", "cuda", "--gradient-checkpointing", "off")
    out = printed(capsys, *flags, "--device-memory", "1MB")
    assert "does not fit in 0.00 GiB" in out and "  --gradient-checkpointing on" in out
    assert "fits with --gradient-checkpointing on --batch-size 1 --grad-accum 8 --max-length 128" in out
    assert "no combination makes it fit" in printed(capsys, *flags, "--device-memory", "0.1MB")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "No model given"),
        (("--model", "/no/such/model"), "does not exist"),
        (("--device-memory", "24"), "device_memory is '24'; give --device-memory a size such as 24GiB"),
        (("--target-modules", "wq"), r"target_modules \['wq'\] match no linear layer"),
    ],
)
def test_bad_input(untied: Path, flags: tuple[str, ...], message: str) -> None:
    model = () if not flags or "--model" in flags else ("--model", str(untied))
    with pytest.raises(InputError, match=message):
        main(["plan", *model, *flags])


def test_a_hub_id_s_weights_are_not_downloaded(
    untied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append(options)
        return str(untied)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert " GiB" in printed(capsys, "--model", "owner/plan-test", "--device", "cuda")
    files = ["config.json", "model.safetensors", "tokenizer.json"]
    wanted = [list(filter_repo_objects(files, allow_patterns=options["allow_patterns"])) for options in asked]
    assert wanted == [["config.json", "tokenizer.json"]]
