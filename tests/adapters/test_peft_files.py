"""adapters/peft_files.py: the format both ways with PEFT, and everything it refuses."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora.adapters.load import load_adapter
from qlora.adapters.model import LoRAModel, get_lora_model
from qlora.adapters.peft_config import PREFIX, UNSUPPORTED
from qlora.adapters.peft_files import read_adapter, save_adapter
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import lora_layers
from qlora.lora.state import lora_state_dict
from qlora.lora.trainable import lora_parameters, unfreeze
from qlora.model.load import load_base_model
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from tests import reference
from tests.models import save_tiny_llama
from tests.reference import relative_error

IDS = torch.arange(3, 27)[None]
FP32_TOLERANCE = 1e-5  # two layers of fp32 products of up to 160 terms, summed in another order


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=64)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=2))
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    directory = tmp_path_factory.mktemp("models") / "gpt2"
    model.save_pretrained(directory)
    return directory


def base(directory: Path, use_4bit: bool = True, quant: QuantConfig | None = None) -> Any:
    return load_base_model(str(directory), use_4bit, quant, compute_dtype="float32", cache=False)


def dense_twin(network: Any) -> Any:
    """transformers' own model, in fp32, with the weights that `network` computes with: PEFT's base."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(network.config)
    twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    twin.load_state_dict(
        {
            name: reference.dequantize(p) if hasattr(p, "quant_state") else p.detach().float()
            for name, p in network.named_parameters(remove_duplicate=False)
        }
    )
    return twin.eval()


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Adapters as after training: A and B of a size that changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def adapted(directory: Path, use_4bit: bool = True, **settings: Any) -> LoRAModel:
    config = LoRAConfig(**{"rank": 4, "alpha": 6.0, "adapter_dtype": "float32", **settings})
    model = get_lora_model(base(directory, use_4bit), config, base_name=str(directory))
    randomize(model)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


@pytest.fixture
def saved(llama: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny LLaMA to damage."""
    adapted(llama).save(tmp_path / "saved")
    return tmp_path / "saved"


def edit_description(directory: Path, **values: Any) -> None:
    description = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**description, **values}))


def edit_state(directory: Path, change: Any) -> None:
    state = load_file(directory / WEIGHTS)
    change(state)
    save_file(state, directory / WEIGHTS)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_same_adapter(actual: Path, expected: Path) -> None:
    """Byte for byte."""
    assert sorted(contents(actual)) == [CONFIG, WEIGHTS] and load_file(actual / WEIGHTS)
    assert contents(actual) == contents(expected)


# ---- with PEFT, both ways ---------------------------------------------------------------------------------

CASES = [
    ("llama", True, "q_proj,v_proj"),
    ("llama", False, "q_proj,v_proj"),
    ("llama", True, "all-linear"),
    ("llama", False, "down_proj,o_proj"),
    ("gpt2", False, "c_attn"),  # Conv1D, not square
    ("gpt2", False, "attn.c_proj"),  # Conv1D, square: a forgotten transpose would still fit
    ("gpt2", False, "all-linear"),
]


@pytest.mark.parametrize(("kind", "use_4bit", "targets"), CASES)
def test_peft_loads_ours(
    kind: str, use_4bit: bool, targets: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Equal logits, from the files alone, with every tensor taken over and no complaint about the config."""
    from peft import PeftModel

    ours = adapted(request.getfixturevalue(kind), use_4bit, target_modules=targets)
    plain = base(request.getfixturevalue(kind), use_4bit)
    ours.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["fan_in_fan_out"] == (kind == "gpt2")
    theirs = PeftModel.from_pretrained(dense_twin(plain), tmp_path / "adapter").eval()
    assert relative_error(logits(theirs), logits(ours)) < FP32_TOLERANCE
    assert relative_error(logits(plain), logits(ours)) > 0.01
    num_adapters = sum("lora_B" in name for name, _ in theirs.named_parameters())
    assert num_adapters == len(lora_layers(ours)) > 0


@pytest.mark.parametrize(("kind", "use_4bit", "targets"), CASES)
def test_ours_loads_peft(
    kind: str, use_4bit: bool, targets: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from peft import LoraConfig, get_peft_model

    ours = base(request.getfixturevalue(kind), use_4bit)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        fan_in_fan_out=kind == "gpt2",
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(dense_twin(ours), config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    plain = logits(ours)
    loaded = load_adapter(ours, tmp_path / "adapter")
    assert relative_error(logits(ours), logits(theirs)) < FP32_TOLERANCE
    assert relative_error(plain, logits(theirs)) > 0.01
    assert (loaded.rank, loaded.alpha, loaded.dropout, loaded.adapter_dtype) == (4, 6.0, 0.1, "float32")
    assert {p.requires_grad for p in lora_parameters(ours)} == {True}
    assert sum(p.requires_grad for p in ours.parameters()) == len(lora_parameters(ours)) > 0


def test_peft_regex_targets(llama: Path, tmp_path: Path) -> None:
    """PEFT's target_modules may be a pattern; the names come from the tensors."""
    from peft import LoraConfig, get_peft_model

    ours = base(llama)
    theirs = get_peft_model(dense_twin(ours), LoraConfig(r=4, target_modules=r".*layers\.1.*\.(q|up)_proj"))
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    assert list(lora_layers(ours)) == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert relative_error(logits(ours), logits(theirs)) < FP32_TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ours_loads_ours(llama: Path, tmp_path: Path, dtype: str) -> None:
    """Logits equal to the last bit, dtype kept, also when loaded into a model that has adapters already."""
    model = adapted(llama, adapter_dtype=dtype)
    model.save(tmp_path / "adapter")
    fresh = base(llama)
    config = load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))
    assert {p.dtype for p in lora_parameters(fresh)} == {getattr(torch, dtype)}
    assert config.adapter_dtype == dtype and config.target_modules == ["q_proj", "v_proj"]
    randomize(fresh, seed=5)
    assert not torch.equal(logits(fresh), logits(model))
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))


def test_loading_freezes_the_rest(llama: Path, saved: Path) -> None:
    """Whatever trained before: after loading it is the adapter alone."""
    model = base(llama, use_4bit=False)
    unfreeze(model)
    load_adapter(model, saved)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 8 and all(".lora_" in name for name in trainable)


def test_alpha_comes_with_the_values(llama: Path, tmp_path: Path) -> None:
    """Loaded over adapters of another alpha, the scale must be the file's: the update is alpha / rank B A."""
    model = adapted(llama, alpha=32.0)
    model.save(tmp_path / "adapter")
    other = adapted(llama, alpha=4.0).model
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits(other), logits(model))


# ---- what is written --------------------------------------------------------------------------------------


def recorded(quant: QuantConfig) -> dict[str, Any]:
    """What an adapter says of its base: a calibration only if there is one, since earlier versions know none."""
    return {name: value for name, value in vars(quant).items() if name != "calibration"}


def test_files(llama: Path, tmp_path: Path) -> None:
    """PEFT's keys, no adapter name in them, the base's name, and how the base was quantized."""
    model = adapted(llama, target_modules="all-linear", init="gaussian", dropout=0.25)
    model.save(tmp_path / "deep" / "adapter")
    assert sorted(contents(tmp_path / "deep" / "adapter")) == [CONFIG, WEIGHTS]
    description = json.loads((tmp_path / "deep" / "adapter" / CONFIG).read_text())
    expected = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(llama), r=4, lora_alpha=6.0,
        lora_dropout=0.25, bias="none", fan_in_fan_out=False, init_lora_weights="gaussian", inference_mode=True,
        target_modules=["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        use_rslora=False, use_dora=False, rank_pattern={}, alpha_pattern={}, layers_to_transform=None,
        modules_to_save=None,
    )  # fmt: skip
    assert description == expected
    with safe_open(tmp_path / "deep" / "adapter" / WEIGHTS, framework="pt") as file:
        assert json.loads(file.metadata()["base_quantization"]) == recorded(QuantConfig())
        assert len(file.keys()) == 2 * 7 * 2
        first = file.get_tensor(f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight")
    assert torch.equal(first, model.model.model.layers[0].mlp.down_proj.weights.lora_A)


@pytest.mark.parametrize("quant", [QuantConfig("fp4", double_quant=False), None])
def test_base_quantization_is_recorded(llama: Path, tmp_path: Path, quant: QuantConfig | None) -> None:
    model = get_lora_model(base(llama, quant is not None, quant))
    model.save(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert json.loads(file.metadata()["base_quantization"]) == (quant and recorded(quant))


def test_every_field_is_one_of_pefts(saved: Path) -> None:
    """PEFT warns about, or refuses, a key that it does not know."""
    from peft import LoraConfig

    assert json.loads((saved / CONFIG).read_text()).keys() <= LoraConfig().to_dict().keys()
    assert UNSUPPORTED.keys() <= LoraConfig().to_dict().keys()


def test_saving_a_model_without_adapters(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing can be saved"):
        save_adapter(base(llama), tmp_path / "adapter", LoRAConfig())
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("moment", ["weights", "config"])
def test_a_failed_save_leaves_the_old_adapter(
    llama: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Disk full in either file: both old ones are still there, and nothing else. New weights beside the old
    config would be an adapter of the wrong scale."""
    import safetensors.torch

    before, failed = contents(saved), []
    model = adapted(llama, alpha=99.0)
    randomize(model, seed=9)

    def fail(path: Path) -> None:
        failed.append(path)
        raise OSError(28, "No space left on device")

    if moment == "weights":

        def failing(tensors: Any, file: Path, **options: Any) -> None:
            Path(file).write_bytes(b"half")
            fail(file)

        monkeypatch.setattr(safetensors.torch, "save_file", failing)
    else:
        write = Path.write_text

        def failing_text(path: Path, text: str, *args: Any, **options: Any) -> int:
            write(path, text[:5], *args, **options)
            return fail(path)  # type: ignore[func-returns-value]

        monkeypatch.setattr(Path, "write_text", failing_text)
    with pytest.raises(OSError, match="No space left"):
        model.save(saved)
    assert failed and contents(saved) == before


def test_what_was_written_is_read_back(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses bits is found out at once."""
    import safetensors.torch

    load = safetensors.torch.load_file

    def flipped(file: Path) -> dict[str, Tensor]:
        state = load(file)
        next(iter(state.values()))[0, 0] += 1
        return state

    monkeypatch.setattr(safetensors.torch, "load_file", flipped)
    with pytest.raises(RuntimeError, match="does not hold what was written"):
        adapted(llama).save(tmp_path)


# ---- what is refused --------------------------------------------------------------------------------------

# One value of each field that changes the forward pass.
VARIANTS: dict[str, Any] = {
    "lora_bias": True,
    "target_parameters": ["experts.weight"],
    "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 2},
    "arrow_config": {"top_k": 2},
    "init_lora_weights": "olora",
}
# Starts that take a part out of the base weight: A and B belong to the changed base, not to this one.
BASE_CHANGING_STARTS = ["pissa_niter_16", "olora", "corda", "loftq", "lora_ga"]


def test_every_unsupported_field_is_tried() -> None:
    assert VARIANTS.keys() == UNSUPPORTED.keys()
    assert all(VARIANTS[name] not in neutral for name, neutral in UNSUPPORTED.items())


@pytest.mark.parametrize("field", VARIANTS)
def test_unsupported_fields_are_named(llama: Path, saved: Path, field: str) -> None:
    model = base(llama)
    edit_description(saved, **{field: VARIANTS[field]})
    with pytest.raises(InputError, match=rf"an adapter with {field}, which this version does not compute"):
        load_adapter(model, saved)
    assert not lora_layers(model)


@pytest.mark.parametrize("start", BASE_CHANGING_STARTS)
def test_adapters_of_a_changed_base_are_named(llama: Path, saved: Path, start: str) -> None:
    edit_description(saved, init_lora_weights=start)
    with pytest.raises(InputError, match="init_lora_weights"):
        load_adapter(base(llama), saved)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", None])
def test_other_starts_do_not_matter(llama: Path, saved: Path, start: Any) -> None:
    edit_description(saved, init_lora_weights=start)
    load_adapter(base(llama), saved)


def test_several_unsupported_fields_are_named_together(llama: Path, saved: Path) -> None:
    edit_description(saved, lora_bias=True, use_qalora=True)
    with pytest.raises(InputError, match="an adapter with lora_bias, use_qalora,"):
        load_adapter(base(llama), saved)


@pytest.mark.parametrize("kind", ["LOHA", "IA3", None])
def test_other_kinds_of_adapter(llama: Path, saved: Path, kind: str | None) -> None:
    edit_description(saved, peft_type=kind)
    with pytest.raises(InputError, match=f"holds a {kind} adapter"):
        load_adapter(base(llama), saved)


Q0, V1 = (PREFIX + f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.v_proj"))


def damage_everything(state: dict[str, Tensor]) -> None:
    """One of each: missing half, not in this model, misshapen, of another rank, NaN, infinity."""
    del state[f"{Q0}.lora_B.weight"]
    state[PREFIX + "model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 64)
    state[PREFIX + "model.layers.9.self_attn.q_proj.lora_B.weight"] = torch.ones(64, 4)
    state[f"{V1}.lora_A.weight"] = torch.ones(4, 65)
    state[f"{V1}.lora_B.weight"][0, 0] = torch.nan
    state[f"{Q0}.lora_A.weight"][0, 0] = torch.inf


@pytest.mark.parametrize("has_adapters", [False, True])
def test_every_mismatch_at_once(llama: Path, saved: Path, has_adapters: bool) -> None:
    """All six in one error, and the model is as it was: no adapter, or the adapter it had."""
    model = adapted(llama).model if has_adapters else base(llama)
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    expected = logits(model)
    edit_state(saved, damage_everything)
    with pytest.raises(InputError) as raised:
        load_adapter(model, saved)
    for part in (
        "layers.0.self_attn.q_proj.lora_B.weight",
        "layers.9.self_attn.q_proj",
        "layers.1.self_attn.v_proj.lora_A.weight",
        "layers.1.self_attn.v_proj.lora_B.weight",
        "layers.0.self_attn.q_proj.lora_A.weight",
        str(saved),
    ):
        assert part in str(raised.value), part
    after = lora_state_dict(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), expected)


SINGLE_DAMAGES = {
    "missing": lambda state: state.pop(f"{Q0}.lora_B.weight"),
    "not finite": lambda state: state[f"{Q0}.lora_B.weight"].fill_(torch.nan),
    "misshapen A": lambda state: state.update({f"{Q0}.lora_A.weight": torch.ones(4, 32)}),
    "misshapen B": lambda state: state.update({f"{Q0}.lora_B.weight": torch.ones(32, 4)}),
    "another rank": lambda state: state.update(
        {f"{Q0}.lora_A.weight": torch.ones(8, 64), f"{Q0}.lora_B.weight": torch.ones(64, 8)}
    ),
    "one dimension": lambda state: state.update({f"{Q0}.lora_A.weight": torch.ones(64)}),
}


@pytest.mark.parametrize("damage", SINGLE_DAMAGES)
def test_a_refused_adapter_leaves_the_model_unchanged(llama: Path, saved: Path, damage: str) -> None:
    """Nothing is injected, whichever check finds it."""
    model = base(llama)
    edit_state(saved, SINGLE_DAMAGES[damage])
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        load_adapter(model, saved)
    assert not lora_layers(model)


def test_adapter_of_another_base(saved: Path, tmp_path: Path) -> None:
    other = base(save_tiny_llama(tmp_path / "other", num_hidden_layers=1, hidden_size=128))
    with pytest.raises(InputError, match="was made for another base") as raised:
        load_adapter(other, saved)
    assert "model.layers.1.self_attn.q_proj is not a linear layer" in str(raised.value)
    assert "is (4, 64) but its layer and rank want (4, 128)" in str(raised.value)
    assert not lora_layers(other)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"weight": torch.ones(2)},
    ],
    ids=["empty", "no prefix"],
)
def test_foreign_tensors(llama: Path, saved: Path, state: dict[str, Tensor]) -> None:
    save_file(state, saved / WEIGHTS)
    with pytest.raises(InputError, match="not LoRA tensors in PEFT's names"):
        load_adapter(base(llama), saved)


@pytest.mark.parametrize("name", ["lora_magnitude_vector.weight", "lora_A.default.weight", "base_layer.bias"])
def test_tensors_that_the_config_does_not_announce(llama: Path, saved: Path, name: str) -> None:
    """A magnitude without use_dora, an adapter's name in the key, a bias without bias."""
    edit_state(saved, lambda state: state.update({f"{Q0}.{name}": torch.ones(64)}))
    with pytest.raises(
        InputError, match=r"q_proj\..* among 9 tensors, which adapter_config.json does not announce"
    ):
        load_adapter(base(llama), saved)


@pytest.mark.parametrize(("given", "is_said"), [("/models/other", True), ("elsewhere/{}/", False), ("", False)])
def test_another_name_of_the_base_is_said(llama: Path, saved: Path, given: str, is_said: bool) -> None:
    """People move models: the last part of the path counts, and it is no error."""
    said: list[str] = []
    load_adapter(base(llama), saved, given.format(llama.name), said.append)
    note = f"note: the adapter {saved} names {llama.name} as its base, not other"
    assert said == ([note] if is_said else [])


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(InputError, match=f"has no {name}; check the path"):
        read_adapter(saved)


def test_pickle_is_not_read(saved: Path) -> None:
    torch.save(load_file(saved / WEIGHTS), saved / "adapter_model.bin")
    (saved / WEIGHTS).unlink()
    with pytest.raises(InputError, match=f"has no {WEIGHTS}"):
        read_adapter(saved)


def test_path_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check the path"):
        read_adapter(tmp_path / "none")


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_weights(saved: Path, keep: int) -> None:
    file = saved / WEIGHTS
    os.truncate(file, keep if keep >= 0 else file.stat().st_size - 1)
    with pytest.raises(InputError, match=r"is not a complete safetensors file .*save the adapter again"):
        read_adapter(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"text"', b"\xff\xfe"])
def test_description_that_is_no_object(saved: Path, text: str | bytes) -> None:
    (saved / CONFIG).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match=CONFIG):
        read_adapter(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"r": None}, {"r": "eight"}, {"r": [8]}, {"r": 0}, {"lora_alpha": None}, {"lora_alpha": "big"},
        {"lora_alpha": 0}, {"lora_dropout": "some"}, {"lora_dropout": 1.5},
    ],
)  # fmt: skip
def test_wrong_numbers(saved: Path, change: dict[str, Any]) -> None:
    edit_description(saved, **change)
    with pytest.raises(InputError, match=CONFIG):
        read_adapter(saved)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_missing_numbers(saved: Path, key: str) -> None:
    description = json.loads((saved / CONFIG).read_text())
    del description[key]
    (saved / CONFIG).write_text(json.dumps(description))
    with pytest.raises(InputError, match=key):
        read_adapter(saved)
