"""LoRAModel as people use it from Python: wrapper or module, the base's interface, plain models again."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qlora
from qlora.adapters.model import LoRAModel, create_lora_model
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import active_adapter
from qlora.lora.layer import LoRALinear
from qlora.lora.slot import network_of
from qlora.model.load import load_base_model
from qlora.quant.layers import Linear4bit
from qlora.system.errors import InputError
from qlora.system.file_names import WEIGHTS
from tests.models import save_tiny_llama, tiny_llama_config
from tests.reference import relative_error

IDS = torch.arange(3, 27)[None]
TOLERANCE = 1e-5
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300, "n_positions": 64}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


def gpt2(**settings: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**GPT2, **settings)).eval()


def randomized(model: LoRAModel) -> LoRAModel:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.lora_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# ---- wrapper or module ------------------------------------------------------------------------------------


def test_functions_take_the_wrapper_and_the_module(llama: Path, tmp_path: Path) -> None:
    """`lora_state_dict(lora_model)` was {}, and `save_adapter(lora_model)` wrote a file of 56 bytes."""
    network = load_base_model(str(llama), compute_dtype="float32", cache=False)
    model = randomized(LoRAModel(network, LoRAConfig(rank=4)))
    compiled: Any = torch.compile(model, backend="eager")
    states = [qlora.lora_state_dict(m) for m in (network, model, nn.DataParallel(network), compiled)]
    assert len(states[0]) == 8 and all(state.keys() == states[0].keys() for state in states)
    files = []
    for name, one in {"module": network, "wrapper": model}.items():
        qlora.save_adapter(one, tmp_path / name, model.config)
        files.append((tmp_path / name / WEIGHTS).read_bytes())
        assert len(load_file(tmp_path / name / WEIGHTS)) == 8
    assert files[0] == files[1]
    expected = logits(model)
    for count in (qlora.count_trainable_parameters, qlora.count_parameters, qlora.parameter_summary):
        assert count(model) == count(network)
    assert [id(p) for p in qlora.lora_parameters(model)] == [id(p) for p in qlora.lora_parameters(network)]
    qlora.merge_lora(model)
    assert model.is_merged and relative_error(logits(model), expected) < TOLERANCE
    qlora.unmerge_lora(model)
    with torch.no_grad():
        for parameter in model.lora_parameters():
            parameter.zero_()
    qlora.load_lora_state_dict(model, load_state(tmp_path / "wrapper"))
    assert torch.equal(logits(model), expected)
    fresh = LoRAModel(load_base_model(str(llama), compute_dtype="float32", cache=False), LoRAConfig(rank=4))
    qlora.load_adapter(fresh, tmp_path / "wrapper")
    assert torch.equal(logits(fresh.eval()), expected)
    with pytest.raises(InputError, match="has LoRA layers already"):
        qlora.inject_lora(model, LoRAConfig())


def load_state(directory: Path) -> dict[str, torch.Tensor]:
    state = load_file(directory / WEIGHTS)
    return {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}


def test_nothing_is_saved_without_an_adapter(llama: Path, tmp_path: Path) -> None:
    model = LoRAModel(load_base_model(str(llama), cache=False))
    for save in (
        lambda: model.save(tmp_path / "a"),
        lambda: qlora.save_adapter(model, tmp_path / "a", LoRAConfig()),
    ):
        with pytest.raises(InputError, match="No adapter is active"):
            save()
    assert not (tmp_path / "a").exists()


def test_layers_that_were_wrapped_by_hand_and_larger_modules() -> None:
    """Neither has been through `inject_lora`; their tensors are found by walking the modules."""
    hand = nn.Sequential(LoRALinear(nn.Linear(4, 4), rank=2))
    assert list(qlora.lora_state_dict(hand)) == ["0.lora_A.weight", "0.lora_B.weight"]
    network = LoRAModel(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(target_modules="0")).model
    outer = nn.ModuleDict({"inner": network, "head": nn.Linear(4, 2)})
    assert list(qlora.lora_state_dict(outer)) == ["inner.0.lora_A.weight", "inner.0.lora_B.weight"]
    qlora.freeze_base(outer)
    assert qlora.count_trainable_parameters(outer) == 2 * 4 * 8


# ---- the base's interface ---------------------------------------------------------------------------------


def test_the_base_is_seen_through_the_wrapper() -> None:
    model = LoRAModel(base_model=gpt2(), config=LoRAConfig(target_modules="c_attn"))
    assert model.base_model is model.model is network_of(model)
    assert model.config.target_modules == ["c_attn"] and model.base_model.config.n_layer == 2  # type: ignore[union-attr]
    assert model.device == torch.device("cpu") and model.get_input_embeddings() is model.model.transformer.wte  # type: ignore[union-attr]
    assert inspect.signature(model.forward) == inspect.signature(model.model.forward)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert not hasattr(model, "nothing_of_this_name")
    parameters = model.trainable_parameters()
    assert isinstance(parameters, list) and sum(p.numel() for p in parameters) == 2 * 8 * (32 + 96)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lora_parameters()[1].fill_(1.0)
    assert not torch.equal(logits(copied), logits(model)), "the copy's forward is its own"
    with pytest.raises(InputError, match="give LoRAModel a torch module"):
        LoRAModel("gpt2", LoRAConfig())  # type: ignore[arg-type]


def test_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    model = create_lora_model(
        lambda width: nn.Sequential(nn.Linear(width, width)), 100, LoRAConfig(target_modules="0")
    )
    model.print_summary()
    assert capsys.readouterr().out.splitlines() == [
        "Total parameters:     11,700",
        "Trainable parameters: 1,600 (13.6752%)",
        "Frozen parameters:    10,100",
        "Adapted layers:       1",
    ]


def test_a_model_of_a_class_and_its_config() -> None:
    from transformers import LlamaForCausalLM

    model = create_lora_model(LlamaForCausalLM, tiny_llama_config(), LoRAConfig(rank=4))
    assert isinstance(model.base_model, LlamaForCausalLM) and model.summary().adapted_layers == 4
    assert create_lora_model(LlamaForCausalLM, tiny_llama_config()).config.rank == 8


def test_attributes_are_set_where_they_are_read() -> None:
    """A head set through the wrapper was never used, and `model.config.use_cache = False` changed nothing."""
    model = LoRAModel(gpt2(), LoRAConfig(target_modules="c_attn"))
    model.lm_head = nn.Linear(32, 5)
    assert model(input_ids=IDS).logits.shape[-1] == 5 and "lm_head" not in dict(model.named_children())
    model.config.use_cache, model.config.alpha = False, 4.0
    assert model.base_model.config.use_cache is False and model.config.vocab_size == 300
    assert model.config == LoRAConfig(target_modules="c_attn", alpha=4.0) == copy.deepcopy(model.config)
    assert repr(model.config).startswith("LoRAConfig(rank=8") and model.config.scaling == 0.5
    model.note = "of the wrapper alone"
    assert not hasattr(model.base_model, "note")


def test_a_base_checkpoint_for_the_wrapper_is_refused() -> None:
    """None of its names fits: with strict=False that loaded nothing, without a word."""
    model = LoRAModel(gpt2(), LoRAConfig(target_modules="c_attn"))
    with pytest.raises(InputError, match="load a base checkpoint into base_model"):
        model.load_state_dict(gpt2().state_dict(), strict=False)
    assert not model.load_state_dict(model.state_dict(), strict=False).missing_keys


PLAIN = nn.Sequential(nn.Linear(4, 4))
WRONG_USE: dict[str, tuple[Callable[[LoRAModel, Path], Any], str]] = {
    "no module": (lambda m, _: qlora.inject_lora(None, LoRAConfig()), "model is None; give a torch module"),
    "freeze": (lambda m, _: qlora.freeze_base(3), "model is 3"),
    "count": (lambda m, _: qlora.count_parameters([m]), "give a torch module"),
    "config": (lambda m, _: LoRAModel(PLAIN, {"rank": 8}), "config is .*give a LoRAConfig"),
    "changed in place": (lambda m, _: LoRAModel(PLAIN, numbers_as_targets()), r"target_modules is \[.*5\]"),
    "seed": (lambda m, _: LoRAModel(PLAIN, LoRAConfig(target_modules="0"), seed=1.5), "seed is 1.5"),
    "class": (lambda m, _: qlora.create_lora_model(PLAIN, None), "give a class of torch modules"),
    "base": (lambda m, _: qlora.load_base_model(PLAIN), "give a directory, a hub id"),
    "name": (lambda m, _: m.add_adapter("", LoRAConfig()), "name is ''"),
    "set": (lambda m, _: m.set_adapter(["default"]), "Unknown adapter"),
    "add": (lambda m, _: m.add_adapter("other", None), "config is None"),
    "weights": (lambda m, _: m.add_weighted_adapter(["default"], ["a"], "mix"), "give finite numbers"),
    "state": (lambda m, _: qlora.load_lora_state_dict(m, [1]), "give tensors by name"),
    "values": (lambda m, _: qlora.load_lora_state_dict(m, {"a": 1}), "give tensors by name"),
    "integers": (
        lambda m, _: qlora.load_lora_state_dict(m, {k: v.long() for k, v in qlora.lora_state_dict(m).items()}),
        "is of torch.int64",
    ),
    "nothing to load": (lambda m, _: qlora.load_lora_state_dict(PLAIN, {}), "No adapter is active"),
    "nothing to merge": (lambda m, _: qlora.merge_lora(PLAIN), "No adapter is active"),
    "save where": (lambda m, _: m.save(None), "path is None"),
    "save here": (lambda m, _: m.save(""), "path is ''"),
    "save into a file": (lambda m, path: m.save(path / "file"), "file is a file"),
    "save below a file": (lambda m, path: m.save(path / "file" / "a.safetensors"), "file is a file"),
    "pickle": (lambda m, path: m.save(path / "adapter.pt"), "give a directory or a .safetensors file"),
    "load what": (lambda m, _: m.load(5), "path is 5"),
    "settings of saving": (lambda m, path: qlora.save_adapter(m, path / "new", None), "config is None"),
    "layer": (lambda m, _: LoRALinear(nn.Linear(4, 4), rank=-1), "rank is -1"),
    "dtype": (lambda m, _: LoRALinear(nn.Linear(4, 4), dtype="float32"), "dtype is 'float32'"),  # type: ignore[arg-type]
}


def numbers_as_targets() -> LoRAConfig:
    config = LoRAConfig(target_modules=["0"])
    config.target_modules.append(5)  # type: ignore[arg-type]
    return config


@pytest.mark.parametrize("name", WRONG_USE)
def test_wrong_use_is_one_sentence(name: str, tmp_path: Path) -> None:
    """Each of these was a traceback from inside, or silence."""
    call, message = WRONG_USE[name]
    (tmp_path / "file").write_text("not a directory")
    model = LoRAModel(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(target_modules="0"))
    with pytest.raises(InputError, match=message):
        call(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and not qlora.lora_parameters(PLAIN)


def test_transformers_trainer(tmp_path: Path) -> None:
    """It keeps the columns that `forward` names, trains the adapter alone, and saves it.

    With a tokenizer it looks for the base's settings in `model.config`.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

    words = Tokenizer(models.WordLevel({"</s>": 0, "<pad>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
    model = LoRAModel(gpt2(), LoRAConfig(target_modules="c_attn"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [{"input_ids": IDS[0], "labels": IDS[0], "text": "dropped"} for _ in range(8)]
    options: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(
        str(tmp_path), save_strategy="no", disable_tqdm=True, learning_rate=1e-2, logging_strategy="no", **options
    )
    optimizer = model.optimizer(lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    from datasets import Dataset

    data = Dataset.from_list([{**row, "input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()} for row in rows])
    Trainer(
        model, arguments, train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, scheduler)
    ).train()
    assert model.base_model.config.pad_token_id == 1
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora." in name}


# ---- plain again ------------------------------------------------------------------------------------------

VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"use_adalora": True},
    {"bias": "all"},
    {"init": "pissa"},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("use_4bit", [False, True])
def test_merged_into_plain_layers(llama: Path, settings: dict[str, Any], use_4bit: bool, tmp_path: Path) -> None:
    """No trace of LoRA, equal logits, and transformers reads what it saves."""
    from transformers import AutoModelForCausalLM

    network = load_base_model(str(llama), use_4bit, compute_dtype="float32", cache=False)
    model = randomized(LoRAModel(network, LoRAConfig(rank=4, target_modules="q_proj,up_proj", **settings)))
    expected = logits(model)
    quantized = copy.deepcopy(model)
    merged = model.merge_and_unload()
    assert merged is network and model.adapters == [] and relative_error(logits(merged), expected) < TOLERANCE
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())
    assert merged.state_dict().keys() == AutoModelForCausalLM.from_pretrained(llama).state_dict().keys()
    layer = merged.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(layer) is nn.Linear and layer.weight.dtype == torch.float32 and not layer.weight.requires_grad
    assert qlora.count_trainable_parameters(merged) == 0
    merged.save_pretrained(tmp_path)  # type: ignore[operator]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert relative_error(logits(again), expected) < TOLERANCE
    if not use_4bit:
        with pytest.raises(InputError, match="quantize is for a base in 4 bits"):
            quantized.merge_and_unload(quantize=True)
        return
    again = quantized.merge_and_unload(quantize=True)
    assert isinstance(again.get_submodule("model.layers.0.self_attn.q_proj"), Linear4bit)
    assert 0 < relative_error(logits(again), expected) < 0.5


def test_an_adapter_injected_into_a_wrapper_is_one_of_its_own() -> None:
    """It computed, but had no name: set_adapter(None) lost it."""
    model = LoRAModel(gpt2())
    qlora.inject_lora(model, LoRAConfig(rank=2))
    assert model.adapters == ["default"] and model.active_adapter == "default"
    own = active_adapter(model.model)
    model.set_adapter(None)
    model.set_adapter("default")
    assert active_adapter(model.model) is own and model.trainable_parameters()


def test_a_4bit_conv1d_is_one_again(tmp_path: Path) -> None:
    """GPT-2's layers are (in, out) in files; adapted and other ones, among them a square one."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    base: Any = gpt2(bos_token_id=None, eos_token_id=2)
    base.save_pretrained(tmp_path / "base")
    network = load_base_model(str(tmp_path / "base"), compute_dtype="float32", cache=False)
    model = randomized(LoRAModel(network, LoRAConfig(rank=4, target_modules="c_attn,attn.c_proj")))
    ids = torch.arange(3, 33)[None]
    expected = model(input_ids=ids).logits
    merged: Any = model.merge_and_unload()
    assert all(isinstance(block.attn.c_proj, Conv1D) for block in merged.transformer.h)
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in base.state_dict().items()
    }
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert relative_error(again(input_ids=ids).logits, expected) < TOLERANCE


def test_a_base_that_transformers_quantized_is_saved_as_an_ordinary_model(llama: Path, tmp_path: Path) -> None:
    """Its config kept the quantization, so that nothing could load what was merged."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    options: dict[str, Any] = {"quantization_config": quantization, "dtype": torch.float32}
    model = randomized(LoRAModel(AutoModelForCausalLM.from_pretrained(llama, **options), LoRAConfig(rank=4)))
    expected = logits(model)
    network: Any = model.merge_and_unload()
    network.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert relative_error(logits(again), expected) < TOLERANCE


def test_unloading_gives_the_base_back(llama: Path) -> None:
    network = load_base_model(str(llama), compute_dtype="float32", cache=False)
    before, names = logits(network), list(network.state_dict())
    model = randomized(LoRAModel(network, LoRAConfig(bias="all", modules_to_save="embed_tokens")))
    assert not torch.equal(logits(model), before)
    assert model.unload() is network and torch.equal(logits(network), before)
    assert list(network.state_dict()) == names and model.adapters == []
    again = LoRAModel(network, LoRAConfig(init="pissa"))
    with pytest.raises(InputError, match="changed for a PiSSA"):
        again.unload()
    assert logits(again.merge_and_unload()).isfinite().all()
    with pytest.raises(InputError, match="No adapter is active"):
        again.merge_and_unload()


def test_conv1d_keeps_its_orientation_and_shared_weights_part() -> None:
    from transformers.pytorch_utils import Conv1D

    network = gpt2()
    model = randomized(LoRAModel(network, LoRAConfig(target_modules="c_attn,c_proj")))
    expected, merged = logits(model), model.merge_and_unload()
    layer = merged.get_submodule("transformer.h.0.attn.c_attn")
    assert type(layer) is Conv1D and layer.weight.shape == (32, 96)
    assert relative_error(logits(merged), expected) < TOLERANCE
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    tied = randomized(LoRAModel(nn.Sequential(first, second), LoRAConfig(target_modules="0,1")))
    x = torch.randn(3, 6)
    y = tied(x)
    plain = tied.merge_and_unload()
    assert relative_error(plain(x), y) < TOLERANCE and first.weight is not second.weight


def test_a_16_bit_torch_model_keeps_its_dtype() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.bfloat16)
    merged = randomized(LoRAModel(network, LoRAConfig(target_modules="0", bias="all"))).merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert merged(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bitsandbytes_own_layers_train_after_evaluating() -> None:
    """Their evaluation repacked weights on an AVX512-BF16 CPU; the gradients below were then lost in silence."""
    import bitsandbytes

    torch.manual_seed(0)
    layers = [bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32) for _ in range(2)]
    model = LoRAModel(nn.Sequential(*layers).to("cpu"), LoRAConfig(target_modules="0"))
    x = torch.randn(4, 64)
    with torch.no_grad():
        first = model.eval()(x)
    model.train()(x).square().sum().backward()
    gradient = model.lora_parameters()[1].grad
    assert gradient is not None and gradient.abs().sum() > 0
    assert relative_error(model(x), first) < TOLERANCE
    with pytest.raises(InputError, match=r"0 is not quantized yet"):
        LoRAModel(nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64)), LoRAConfig(target_modules="0"))
