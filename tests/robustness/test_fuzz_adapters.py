"""Adapters and models that are wrong: one of each kind, then at random. One sentence, nothing changed, no hang.

    QLORA_FUZZ=100000 python -m pytest tests/robustness/test_fuzz_adapters.py -k random

The number is that of all inputs together; without it they take some ten seconds.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

import qlora.cli.main as command_line
import qlora.export.merge
import qlora.system.files
import train
from qlora.adapters.load import load_adapter
from qlora.adapters.model import get_lora_model
from qlora.adapters.peft_config import PREFIX
from qlora.adapters.provenance import trained_base
from qlora.cli.exits import run as run_main
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import activate, active_adapter, lora_layers
from qlora.lora.slot import slot_of
from qlora.lora.trainable import lora_parameters
from qlora.model.base import base_info
from qlora.model.gguf_source import GGUFSource
from qlora.model.hf_config import load_config
from qlora.model.load import load_base_model
from qlora.model.resolve import open_source
from qlora.model.safetensors_source import SafetensorsSource
from qlora.model.skeleton import empty_model
from qlora.model.tokenizer import load_tokenizer
from qlora.quant.storage import unpack_tensors
from qlora.quant.weight import QuantConfig, dequantize_weight
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from qlora.system.files import JSON_LIMIT
from qlora.system.wording import quote
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer

NUM_INPUTS = int(os.environ.get("QLORA_FUZZ", "1500"))
Q0, V1 = (PREFIX + f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.v_proj"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = dict(hidden_size=32, intermediate_size=32, vocab_size=269, max_position_embeddings=64)
    sizes["attention_bias"] = True
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama", tokenizer=tiny_tokenizer(), **sizes)


@pytest.fixture(scope="module")
def quantized(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a bitsandbytes checkpoint."""
    directory = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(directory))
        load_base_model(str(llama), compute_dtype="float32")
    return next(directory.glob("base-*"))


@pytest.fixture(scope="module")
def base(llama: Path) -> Any:
    """One model for all: every test must leave it as it was."""
    return load_base_model(str(llama), compute_dtype="float32", cache=False)


@pytest.fixture(scope="module")
def adapted(llama: Path) -> Any:
    """The same with adapters of rank 4."""
    network = load_base_model(str(llama), compute_dtype="float32", cache=False)
    model = get_lora_model(network, LoRAConfig(rank=4, adapter_dtype="float32"), base_name=str(llama)).model
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.weights.lora_B, std=0.1)
    return model


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter, of rank 4."""
    network = load_base_model(str(llama), compute_dtype="float32", cache=False)
    model = get_lora_model(network, LoRAConfig(rank=4, adapter_dtype="float32"), base_name=str(llama))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.lora_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    directory = tmp_path_factory.mktemp("adapters") / "whole"
    model.save(directory)
    return directory


# Every field that a variant brings; "whole" and "adapted" above are plain LoRA.
VARIANT = dict(
    rank=4,
    adapter_dtype="float32",
    use_dora=True,
    use_rslora=True,
    bias="lora_only",
    rank_pattern={"1.self_attn.v_proj": 2},
    alpha_pattern={r"layers\.0\..*": 4.0},
    layers="0-1",
)


@pytest.fixture(scope="module")
def varied(llama: Path) -> Any:
    """The model with an active adapter of all variants together."""
    network = load_base_model(str(llama), compute_dtype="float32", cache=False)
    model = get_lora_model(network, LoRAConfig(**VARIANT), base_name=str(llama))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.lora_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def whole_variant(varied: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its adapter, saved."""
    directory = tmp_path_factory.mktemp("adapters") / "variant"
    varied.save(directory)
    return directory


@pytest.fixture
def saved_variant(whole_variant: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole_variant, tmp_path / "variant"))


@pytest.fixture
def saved(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "adapter"))


class State:
    """Everything of a model that a refused adapter must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(name, type(module), id(module)) for name, module in model.named_modules()]
        self.tensors = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
        self.settings = self.settings_of(model)

    @staticmethod
    def settings_of(model: nn.Module) -> list[Any]:
        layers = ((name, layer.weights) for name, layer in lora_layers(model).items())
        own = [(name, w.alpha, w.dropout, w.rank, w.scaling) for name, w in layers]
        adapter = active_adapter(model)
        return [*own, id(adapter), None if adapter is None else copy.deepcopy(adapter.config)]

    def assert_kept(self, model: nn.Module) -> None:
        assert self.modules == [(name, type(module), id(module)) for name, module in model.named_modules()]
        after = dict(model.named_parameters())
        assert list(after) == list(self.tensors)
        for name, (identity, requires_grad, tensor) in self.tensors.items():
            assert (id(after[name]), after[name].requires_grad) == (identity, requires_grad), name
            assert torch.equal(after[name], tensor), name
        assert self.settings == self.settings_of(model)


def assert_one_sentence(error: InputError) -> None:
    text = str(error)
    assert text.isprintable() and text.endswith(".") and len(text) < 10_000, text


def assert_refused(directory: Path, models: list[nn.Module], *parts: str) -> None:
    """`load_adapter` says so in a sentence with `parts`, and no model is changed."""
    for model in models:
        before = State(model)
        with pytest.raises(InputError) as raised:
            load_adapter(model, directory)
        assert_one_sentence(raised.value)
        for part in parts:
            assert part in str(raised.value), f"{part!r} is not in {raised.value}"
        before.assert_kept(model)


def edit_description(directory: Path, **values: Any) -> None:
    description = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**description, **values}))


def edit_state(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(directory / WEIGHTS)
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / WEIGHTS)


# ---- one of each kind -------------------------------------------------------------------------------------


def test_the_good_ones_load(base: Any, adapted: Any, varied: Any, whole: Path, whole_variant: Path) -> None:
    """Otherwise every refusal below could have another reason; and a loaded one is noticed."""
    other = copy.deepcopy(varied.model)
    other.model.layers[0].self_attn.q_proj.weights.lora_B.data.zero_()
    for model, directory in ((base, whole), (adapted, whole), (base, whole_variant), (other, whole_variant)):
        model = copy.deepcopy(model)
        before = State(model)
        load_adapter(model, directory)
        with pytest.raises(AssertionError):
            before.assert_kept(model)


FIELDS: dict[str, list[Any]] = {
    "r": [0, -1, True, "4", 4.0, None, [4], {}, float("inf"), float("nan"), 10**400],
    "lora_alpha": [0, -1, True, "16", None, [16], float("inf"), float("-inf"), float("nan"), 10**400, 1e300],
    "lora_dropout": [1, -0.1, True, "0", [0], float("nan"), float("inf")],
    "target_modules": [7, True, False, {}, {"q_proj": 1}, [1], ["q_proj", None], [["q_proj"]], 1.5],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values], ids=repr
)
def test_fields_of_the_config(base: Any, adapted: Any, saved: Path, field: str, value: Any) -> None:
    """File, field, value, remedy."""
    edit_description(saved, **{field: value})
    assert_refused(
        saved, [base, adapted], str(saved / CONFIG), f"{field} = ", quote(value)[:12], "save the adapter"
    )


@pytest.mark.parametrize("rank", [1, 3, 8, 10**12])
def test_rank_of_the_config_and_of_the_tensors(base: Any, adapted: Any, saved: Path, rank: int) -> None:
    edit_description(saved, r=rank)
    assert_refused(saved, [base, adapted], str(saved / CONFIG), f"r = {rank}", "have rank 4")


@pytest.mark.parametrize("kind", ["LOHA", None, 7, ["LORA"], {"a": [1] * 10**5}, "LORA\n", "x" * 10**5])
def test_kind_of_the_config(base: Any, saved: Path, kind: Any) -> None:
    edit_description(saved, peft_type=kind)
    assert_refused(saved, [base], str(saved), "which this version does not compute")


TEXTS = {
    "empty": b"",
    "cut": b'{"peft_type": "LORA", "r": 4',
    "no JSON": b"r = 4",
    "list": b"[1]",
    "null": b"null",
    "text": b'"LORA"',
    "number": b"1e999",
    "not UTF-8": b'{"peft_type": "\xff\xfe"}',
    "UTF-16": '{"peft_type": "LORA"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"peft_type": "LORA"}',
    "deep lists": b'{"r": ' + b"[" * 10**6 + b"]" * 10**6 + b"}",
    "deep objects": b'{"a": ' * 10**5 + b"1" + b"}" * 10**5,
    "10,000 digits": b'{"r": ' + b"9" * 10**4 + b"}",
    "zero bytes": b"\0" * 100,
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01r\x94K\x04s.",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_configs_that_are_no_object(base: Any, saved: Path, kind: str) -> None:
    (saved / CONFIG).write_bytes(TEXTS[kind])
    assert_refused(saved, [base], str(saved / CONFIG), "save the adapter again")


def test_a_config_of_100_mb(base: Any, saved: Path) -> None:
    """Valid JSON, of which only the allowed part is read."""
    text = (saved / CONFIG).read_text().rstrip().removesuffix("}")
    (saved / CONFIG).write_text(text + ', "x": "')
    with open(saved / CONFIG, "r+b") as file:
        file.seek(100 * 10**6)
        file.write(b'"}')
    assert_refused(saved, [base], str(saved / CONFIG), f"larger than {JSON_LIMIT // 2**20} MiB")


def test_a_key_given_twice(base: Any, saved: Path) -> None:
    """Readers differ in which they take."""
    text = (saved / CONFIG).read_text().rstrip().removesuffix("}")
    (saved / CONFIG).write_text(text + ', "r": 4}')
    assert_refused(saved, [base], str(saved / CONFIG), "'r' twice")


def write_safetensors(file: Path, header: str | bytes, data: bytes = b"", length: int | None = None) -> None:
    text = header.encode() if isinstance(header, str) else header
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


# Header and data; %s is a good name, and <dtype shape start end> an entry.
HEADERS: dict[str, tuple[str | bytes, bytes]] = {
    "a tensor twice": ("{%s: <U8 [4] 0 4>, %s: <U8 [4] 4 8>}", b"\0" * 8),
    "overlapping": ("{%s: <U8 [4] 0 4>, 'b': <U8 [4] 2 6>}", b"\0" * 6),
    "outside": ("{%s: <F32 [1] 96 100>}", b"\0" * 4),
    "backwards": ("{%s: <F32 [1] 4 0>}", b"\0" * 4),
    "shape and bytes differ": ("{%s: <F32 [2] 0 4>}", b"\0" * 4),
    "bytes left over": ("{%s: <F32 [1] 0 4>}", b"\0" * 400),
    "overflowing": ("{%s: <F32 [4294967296,4294967296,4] 0 0>}", b""),
    "too long for torch": ("{%s: <F32 [0,18446744073709551615] 0 0>}", b""),
    "negative": ("{%s: <F32 [-1] 0 4>}", b"\0" * 4),
    "no such dtype": ("{%s: <F31 [1] 0 4>}", b"\0" * 4),
    "half bytes": ("{%s: <F4 [2,1] 0 1>}", b"\0"),
    "no fields": ("{%s: {}}", b""),
    "a list": ("[%s]", b""),
    "a wrong type": ("{%s: <F32 '1' 0 4>}", b"\0" * 4),
    "metadata no texts": ("{'__metadata__': {'a': 1}, %s: <U8 [4] 0 4>}", b"1234"),
    "deep": (b'{"a":' * 10**5, b""),
    "not UTF-8": (b'{"\xff\xfe": 1}', b""),
    "empty": ("", b""),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_the_weights(base: Any, adapted: Any, saved: Path, kind: str) -> None:
    header, data = HEADERS[kind]
    if isinstance(header, str):
        entry = r'{"dtype": "\1", "shape": \2, "data_offsets": [\3, \4]}'
        header = re.sub(r"<(\S+) (\S+) (\d+) (\d+)>", entry, header)
        header = header.replace("%s", f"'{Q0}.lora_A.weight'").replace("'", '"')
    write_safetensors(saved / WEIGHTS, header, data)
    assert_refused(saved, [base, adapted], WEIGHTS, "save the adapter again")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32, 2**63, 2**64 - 1])
def test_length_of_the_header(base: Any, saved: Path, length: int) -> None:
    write_safetensors(saved / WEIGHTS, "{}", length=length)
    assert_refused(saved, [base], str(saved / WEIGHTS), "is not a complete safetensors file")


def to(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: tensor.to(dtype) for name, tensor in state.items()})


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({new: state.pop(old)})


A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "int8": (to(torch.int8), ("int8", "save it in float32")),
    "one int8": (lambda s: s.update({A: s[A].to(torch.int8)}), ("q_proj.lora_A.weight in int8",)),
    "float64": (to(torch.float64), ("float64", "save it in float32")),
    "float8": (to(torch.float8_e4m3fn), ("float8_e4m3fn", "save it in float32")),
    "bool": (to(torch.bool), ("bool", "save it in float32")),
    "complex": (to(torch.complex64), ("complex64", "save it in float32")),
    "swapped": (lambda s: s.update({A: s[B], B: s[A]}), ("q_proj.lora_A.weight is (32, 4)",)),
    "transposed": (lambda s: s.update({A: s[A].T, B: s[B].T}), ("q_proj.lora_A.weight is (32, 4)",)),
    "NaN": (lambda s: s[B][1].fill_(torch.nan), ("q_proj.lora_B.weight holds NaN or infinity",)),
    "infinity": (lambda s: s[A][1].fill_(-torch.inf), ("q_proj.lora_A.weight holds NaN or infinity",)),
    "missing B": (lambda s: s.pop(B), ("missing model.layers.0.self_attn.q_proj.lora_B.weight",)),
    "extra layer": (lambda s: s.update({A.replace("0", "9"): s[A] + 1}), ("layers.9.self_attn.q_proj",)),
    "extra tensor": (lambda s: s.update({"x": torch.ones(1)}), ("x among 9 tensors", "save the adapter again")),
    "no name": (rename(A, f"{PREFIX}.lora_A.weight"), ("is not a linear layer",)),
    "line break": (rename(A, f"{Q0}\n.lora_A.weight"), ("not LoRA tensors in PEFT's names",)),
    "escape": (rename(A, f"{Q0}\x1b[2J.lora_A.weight"), ("not LoRA tensors in PEFT's names",)),
    "comma": (rename(A, f"{Q0},{V1}.lora_A.weight"), ("is not a linear layer",)),
    "no dimension": (lambda s: s.update({A: torch.tensor(1.0)}), ("q_proj.lora_A.weight is ()",)),
    "three": (lambda s: s.update({A: s[A][None]}), ("q_proj.lora_A.weight is (1, 4, 32)",)),
    "no rows": (lambda s: s.update({A: s[A][:0]}), ("q_proj.lora_A.weight is (0, 32)",)),
    "nothing": (lambda s: s.clear(), ("holds nothing",)),
    "10,000 foreign layers": (
        lambda s: s.update({f"{PREFIX}x{i}.lora_A.weight": torch.ones(4, 1) for i in range(10**4)}),
        ("is not a linear layer", "more"),
    ),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors(base: Any, saved: Path, kind: str) -> None:
    change, parts = TENSORS[kind]
    edit_state(saved, change)
    assert_refused(saved, [base], str(saved), *parts)


@pytest.mark.parametrize("kind", ["int8", "float64", "swapped", "NaN", "missing B", "extra layer", "no dimension"])
def test_tensors_for_a_model_with_adapters(adapted: Any, saved: Path, kind: str) -> None:
    edit_state(saved, TENSORS[kind][0])
    assert_refused(saved, [adapted], str(saved))


def test_another_rank_than_the_models(adapted: Any, base: Any, saved: Path) -> None:
    """Whole in itself, but for a model adapted with another rank."""
    edit_description(saved, r=2)
    edit_state(saved, lambda s: s.update({k: t[:2] if "lora_A" in k else t[:, :2] for k, t in s.items()}))
    assert_refused(saved, [adapted], str(saved), "lora_A.weight is (2, 32) but the model wants (4, 32)")
    load_adapter(copy.deepcopy(base), saved)


MAGNITUDE, BIAS = f"{Q0}.lora_magnitude_vector", f"{Q0}.base_layer.bias"
HANGING = [
    "(a+)+$",
    "(.*)*x",
    "(a|a)*$",
    "a?" * 40 + "a" * 40,
    ".*" * 30 + "x",
    "(x+x+)+y",
    "a{1,9}" * 9,
    "a" * 9999,
]
FIELDS_OF_VARIANTS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": False}, "which adapter_config.json does not announce"),
    ({"use_dora": "yes"}, "use_dora = 'yes', not true or false"),
    ({"use_rslora": 1}, "use_rslora = 1, not true or false"),
    ({"bias": "none"}, "which adapter_config.json does not announce"),
    ({"bias": "some"}, "bias = 'some', not none, all or lora_only"),
    ({"bias": ["all"]}, "bias = ['all'], not none"),
    ({"bias": "all"}, "missing model.layers.0.self_attn.k_proj.bias"),
    ({"rank_pattern": {}}, "v_proj.lora_A.weight is (2, 32) but its layer and rank want (4, 32)"),
    (
        {"rank_pattern": {"q_proj": 3}},
        "q_proj.lora_A.weight is (4, 32) but its layer and rank want (3, 32)",
    ),
    ({"rank_pattern": {"v_proj": 2.5}}, "rank 2.5; give a whole number"),
    ({"rank_pattern": {"v_proj": 0}}, "not names with numbers above 0"),
    ({"rank_pattern": ["v_proj"]}, "not names with numbers above 0"),
    ({"rank_pattern": {"v_proj": True}}, "not names with numbers above 0"),
    ({"rank_pattern": {"v_proj": 10**400}}, "not names with numbers above 0"),
    ({"rank_pattern": {"(": 2}}, "rank_pattern holds '(=2'"),
    ({"rank_pattern": {"": 2}}, "rank_pattern holds '=2'"),
    ({"rank_pattern": {f"x{i}": 2 for i in range(9999)}}, "holds 9999 entries"),
    ({"alpha_pattern": {"v_proj": float("nan")}}, "not names with numbers above 0"),
    ({"alpha_pattern": {"v_proj": -1}}, "not names with numbers above 0"),
    ({"alpha_pattern": {"a{99999999999999}": 1}}, "alpha_pattern holds 'a{99999999999999}=1'"),
    ({"layers_to_transform": [-1]}, "not a list of layer numbers"),
    ({"layers_to_transform": ["0"]}, "not a list of layer numbers"),
    ({"layers_to_transform": [True]}, "not a list of layer numbers"),
    ({"layers_to_transform": 10**9}, "not a list of layer numbers"),
    *(({"alpha_pattern": {pattern: 1}}, "alpha_pattern") for pattern in HANGING),
]


@pytest.mark.parametrize(("fields", "part"), FIELDS_OF_VARIANTS, ids=lambda value: str(value)[:40])
def test_fields_of_variants(base: Any, varied: Any, saved_variant: Path, fields: Any, part: str) -> None:
    edit_description(saved_variant, **fields)
    with limited(10):
        assert_refused(saved_variant, [base, varied.model], str(saved_variant), part)


TENSORS_OF_VARIANTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no magnitude": (lambda s: s.pop(MAGNITUDE), "missing model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    "short magnitude": (lambda s: s.update({MAGNITUDE: torch.ones(31)}), "magnitude_vector is (31,) but"),
    "flat magnitude": (lambda s: s.update({MAGNITUDE: torch.ones(1, 32)}), "magnitude_vector is (1, 32) but"),
    "NaN magnitude": (lambda s: s[MAGNITUDE][3].fill_(torch.nan), "magnitude_vector holds NaN or infinity"),
    "whole magnitude": (lambda s: s.update({MAGNITUDE: torch.ones(32, dtype=torch.int32)}), "vector in int32"),
    "two magnitudes": (lambda s: s.update({f"{MAGNITUDE}.weight": s[MAGNITUDE] + 1}), "under two names"),
    "magnitude alone": (
        lambda s: s.update({MAGNITUDE.replace("q_proj", "o_proj"): torch.ones(32)}),
        "missing model.layers.0.self_attn.o_proj.lora_A.weight",
    ),
    "no bias": (lambda s: s.pop(BIAS), "missing model.layers.0.self_attn.q_proj.bias"),
    "no biases": (
        lambda s: [s.pop(key) for key in list(s) if key.endswith(".bias")],
        "older versions of PEFT write no biases of bias = lora_only",
    ),
    "short bias": (lambda s: s.update({BIAS: torch.ones(31)}), "q_proj.bias is (31,)"),
    "infinite bias": (lambda s: s[BIAS][3].fill_(torch.inf), "q_proj.bias holds NaN or infinity"),
    "two biases": (lambda s: s.update({f"{Q0}.bias": s[BIAS] + 1}), "under two names"),
    "bias of a layer without": (
        lambda s: s.update({f"{PREFIX}model.layers.0.mlp.up_proj.bias": torch.ones(32)}),
        "up_proj.bias is not a fully trainable parameter",
    ),
    "bias of another layer": (
        lambda s: s.update({f"{PREFIX}model.layers.0.self_attn.k_proj.bias": torch.ones(16)}),
        "k_proj.bias is not trained by the bias and modules_to_save of adapter_config.json",
    ),
    "singular values": (lambda s: s.update({f"{Q0}.lora_E": torch.ones(4, 1)}), "does not announce"),
}


@pytest.mark.parametrize("kind", TENSORS_OF_VARIANTS)
def test_tensors_of_variants(base: Any, varied: Any, saved_variant: Path, kind: str) -> None:
    change, part = TENSORS_OF_VARIANTS[kind]
    edit_state(saved_variant, change)
    assert_refused(saved_variant, [base, varied.model], str(saved_variant), part)


def test_every_damage_at_once(base: Any, varied: Any, saved_variant: Path) -> None:
    """One error names them all."""
    kinds = ("no magnitude", "short bias", "bias of another layer", "bias of a layer without")

    def damage(state: dict[str, Tensor]) -> None:
        for kind in kinds:
            TENSORS_OF_VARIANTS[kind][0](state)

    edit_state(saved_variant, damage)
    edit_description(saved_variant, rank_pattern={})
    parts = [TENSORS_OF_VARIANTS[kind][1] for kind in kinds]
    assert_refused(saved_variant, [base, varied.model], *parts, "v_proj.lora_A.weight is (2, 32) but its layer")


def test_a_variant_for_a_model_with_another_one(
    adapted: Any, varied: Any, whole: Path, whole_variant: Path
) -> None:
    """Each whole in itself: plain LoRA and DoRA with biases do not fit each other's parameters."""
    assert_refused(whole_variant, [adapted], "unexpected model.layers.0.self_attn.q_proj.lora_magnitude_vector")
    assert_refused(whole, [varied.model], "missing model.layers.0.self_attn.q_proj.lora_magnitude_vector")


@pytest.mark.parametrize("kind", ["no magnitude", "no biases", "bias of a layer without", "a hanging pattern"])
@pytest.mark.parametrize("command", ["prompt", "merge"])
def test_bad_variants_at_the_command_line(
    llama: Path, saved_variant: Path, kind: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line."""
    if kind == "a hanging pattern":
        part = "alpha_pattern"
        edit_description(saved_variant, alpha_pattern={HANGING[0]: 1})
    else:
        change, part = TENSORS_OF_VARIANTS[kind]
        edit_state(saved_variant, change)
    flags = ["--model", str(llama), "--adapter", str(saved_variant)]
    if command == "prompt":
        code = run_main(train.main, [*flags, "--prompt", "Hi", "--compute-dtype", "float32", "--no-cache"])
    else:
        code = run_main(command_line.main, ["merge", *flags, "--output-dir", str(tmp_path / "merged")])
        assert not (tmp_path / "merged").exists()
    said = capsys.readouterr().err.splitlines()
    assert code == 2 and part in said[-1] and sum(line.startswith("error: ") for line in said) == 1


def test_an_adapter_of_another_base(base: Any, saved: Path, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", hidden_size=64, num_hidden_layers=1)
    model = load_base_model(str(other), compute_dtype="float32", cache=False)
    assert_refused(
        saved, [model], "made for another base", "layers.1.self_attn.q_proj is not a linear layer", "(4, 32)"
    )


def test_half_precision_keeps_its_digits(base: Any, saved: Path) -> None:
    """fp16 has three bits more than bf16: such an adapter is held in fp32."""
    edit_state(saved, lambda s: s.update({k: (t / 8).to(torch.float16) for k, t in s.items()}))
    model = copy.deepcopy(base)
    load_adapter(model, saved)
    stored = load_file(saved / WEIGHTS)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.weights.lora_A, stored[f"{PREFIX}{name}.lora_A.weight"].float())


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["directory", "loop", "dangling", "absent", "pipe"])
def test_files_that_are_none(base: Any, saved: Path, name: str, kind: str) -> None:
    file = saved / name
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)  # reading it would wait for ever
    elif kind != "absent":
        file.symlink_to(file if kind == "loop" else saved / "nothing")
    with limited():
        assert_refused(saved, [base], str(saved), f"has no {name}", "check the path")


@pytest.mark.parametrize("kind", ["absent", "file", "loop", "long", "zero byte"])
def test_directories_that_are_none(base: Any, saved: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / {"long": "x" * 5000, "zero byte": "a\0b"}.get(kind, "other")
    if kind == "file":
        path.write_text("{}")
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(InputError, match="check the path"):
        load_adapter(base, path)


def test_files_that_may_not_be_read(base: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, who may read anything: the system's refusal is played."""
    import safetensors.torch

    def refuse(file: Any, *args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(qlora.system.files, "open", refuse, raising=False)
        assert_refused(saved, [base], str(saved / CONFIG), "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "load_file", refuse)
        assert_refused(saved, [base], str(saved / WEIGHTS), "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", refuse)
        assert_refused(saved, [base], str(saved), "Permission denied")


@pytest.mark.parametrize(
    "recorded",
    [
        "", "{", "[]", "7", '"nf4"', "{}x", '{"quant_type": "nf9"}', '{"quant_type": 4}', '{"block_size": 63}',
        '{"block_size": "64"}', '{"block_size": 64.0}', '{"block_size": true}', '{"double_quant": 1}',
        '{"double_quant": "yes"}', '{"bits": 3}', '{"quant_type": ["nf4"]}', "[" * 10**5, "9" * 10**4, "\x1b[2J",
    ],
)  # fmt: skip
def test_quantization_of_the_base(saved: Path, recorded: str) -> None:
    save_file(load_file(saved / WEIGHTS), saved / WEIGHTS, metadata={"base_quantization": recorded})
    with pytest.raises(InputError, match=f"{WEIGHTS} has no base_quantization that reads") as raised:
        trained_base(str(saved))
    assert_one_sentence(raised.value)


# ---- models -----------------------------------------------------------------------------------------------


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copied"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9), ("hidden_size", 10**12), ("hidden_size", -64), ("vocab_size", 0),
        ("intermediate_size", 2**62), ("num_attention_heads", 0), ("num_attention_heads", 10**9),
        ("num_key_value_heads", -1), ("head_dim", 10**10), ("hidden_size", "many"), ("rope_theta", "x"),
        ("vocab_size", 10**400), ("num_hidden_layers", None), ("model_type", 7), ("model_type", ["llama"]),
        ("rope_parameters", 7), ("hidden_act", "nothing"), ("architectures", 7), ("dtype", "float9"),
        ("tie_word_embeddings", "yes"), ("layer_types", [1, 2, 3]), ("quantization_config", 7),
    ],
)  # fmt: skip
def test_configs_of_a_model(copied: Path, field: str, value: Any) -> None:
    """A sentence, or a model: no traceback, no hang, no memory for what the weights do not have."""
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, field: value}))
    with limited():
        try:
            load_base_model(str(copied), compute_dtype="float32", cache=False)
        except InputError as error:
            assert_one_sentence(error)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("use_4bit", [True, False])
def test_weights_that_are_no_floats(copied: Path, dtype: torch.dtype, use_4bit: bool) -> None:
    """int8 without the scales it was made with would load as a model of noise."""
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(dtype)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight holds whole numbers or narrow floats"):
        load_base_model(str(copied), use_4bit, cache=False)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", ""])
def test_names_of_a_models_tensors(copied: Path, name: str) -> None:
    tensors = load_file(copied / "model.safetensors")
    save_file({**tensors, name: torch.ones(1)}, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="holds a tensor named") as raised:
        load_base_model(str(copied), cache=False)
    assert_one_sentence(raised.value)


UP = "model.layers.0.mlp.up_proj.weight"


def edit_quant_state(tensors: dict[str, Tensor], **values: Any) -> None:
    name = f"{UP}.quant_state.bitsandbytes__nf4"
    fields = json.loads(bytes(tensors[name].numpy()))
    tensors[name] = torch.tensor(list(json.dumps({**fields, **values}).encode()), dtype=torch.uint8)


PARTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "fewer codes": lambda t: t.update({UP: t[UP][:-1].contiguous()}),
    "more codes": lambda t: t.update({UP: torch.cat([t[UP], t[UP]])}),
    "fewer scales": lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"][:-1].contiguous()}),
    "scales of a type": lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"].float()}),
    "short table": lambda t: t.update({f"{UP}.quant_map": t[f"{UP}.quant_map"][:15].contiguous()}),
    "table of a type": lambda t: t.update({f"{UP}.quant_map": t[f"{UP}.quant_map"].half()}),
    "no nested scales": lambda t: t.pop(f"{UP}.nested_absmax"),
    "short nested scales": lambda t: t.update({f"{UP}.nested_absmax": torch.ones(0)}),
    "short nested table": lambda t: t.update({f"{UP}.nested_quant_map": torch.ones(255)}),
    "block size 0": lambda t: edit_quant_state(t, blocksize=0),
    "block size -64": lambda t: edit_quant_state(t, blocksize=-64),
    "block size 65": lambda t: edit_quant_state(t, blocksize=65),
    "block size text": lambda t: edit_quant_state(t, blocksize="64"),
    "block size 64.0": lambda t: edit_quant_state(t, blocksize=64.0),
    "nested block size 0": lambda t: edit_quant_state(t, nested_blocksize=0),
    "nested block size 1": lambda t: edit_quant_state(t, nested_blocksize=1),
    "type": lambda t: edit_quant_state(t, quant_type="int4"),
    "shape": lambda t: edit_quant_state(t, shape=[64, 16]),
    "shape of texts": lambda t: edit_quant_state(t, shape=["a", "b"]),
    "no shape": lambda t: edit_quant_state(t, shape=None),
    "dtype": lambda t: edit_quant_state(t, dtype="load"),
    "no dtype": lambda t: edit_quant_state(t, dtype="nothing"),
    "offset": lambda t: edit_quant_state(t, nested_offset="x"),
    "huge offset": lambda t: edit_quant_state(t, nested_offset=10**400),
    "foreign field": lambda t: edit_quant_state(t, more=1),
    "no JSON": lambda t: t.update({f"{UP}.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8)}),
    "JSON list": lambda t: t.update({f"{UP}.quant_state.bitsandbytes__nf4": torch.tensor([91, 93]).byte()}),
    "floats": lambda t: t.update({f"{UP}.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.bfloat16)}),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_a_4bit_weight(quantized: Path, tmp_path: Path, kind: str) -> None:
    """The kernels read as many scales as the shape says, there or not."""
    broken = Path(shutil.copytree(quantized, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    PARTS[kind](tensors)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight") as raised:
        load_base_model(str(broken), compute_dtype="float32", cache=False)
    assert_one_sentence(raised.value)


def test_the_parts_that_load(quantized: Path) -> None:
    """Unchanged, they do; otherwise the refusals above could have another reason."""
    quantized_model = load_base_model(str(quantized), compute_dtype="float32", cache=False)
    assert base_info(quantized_model).quantization == QuantConfig()


def test_a_damaged_cache_is_made_again(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    load_base_model(str(llama), compute_dtype="float32")
    (file,) = (tmp_path / "cache").glob("*/model.safetensors")
    tensors = load_file(file)
    before = tensors[f"{UP}.absmax"].shape
    PARTS["fewer scales"](tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    load_base_model(str(llama), compute_dtype="float32")
    assert load_file(file)[f"{UP}.absmax"].shape == before


def tiny_gguf(file: Path, blocks: Any = 1, heads: Any = 2, kv_heads: Any = 1, kind: str = "llama") -> bytes:
    """A .gguf of one layer with the metadata that GGUFSource reads, and little else."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(file), kind)
    fields = {"block_count": blocks, "attention.head_count": heads, "attention.head_count_kv": kv_heads}
    for name, value in fields.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        (writer.add_array if isinstance(value, list) else add)(f"llama.{name}", value)
    writer.add_token_list(["a", "b", "c"])
    for name, shape in {"token_embd": (3, 8), "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8)}.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(8, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"blocks": 2**32 - 1}, "4294967295 blocks"), ({"blocks": 0}, "0 blocks"), ({"heads": 0}, "0 heads"),
        ({"blocks": "x"}, "block_count is"), ({"blocks": [1, 2]}, "block_count is"), ({"heads": "x"}, "count is"),
        ({"kv_heads": 0}, "heads"), ({"kv_heads": [1]}, "head_count_kv is"), ({"kind": "x\ny"}, "architecture is"),
    ],
)  # fmt: skip
def test_metadata_of_a_gguf(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    """A number of blocks is looped over, and a number of heads divided by."""
    tiny_gguf(tmp_path / "model.gguf", **fields)
    with (
        limited(),
        pytest.raises(InputError, match=rf"model\.gguf is not a complete GGUF file \(.*{reason}") as raised,
    ):
        GGUFSource(tmp_path / "model.gguf")
    assert_one_sentence(raised.value)


def test_files_beside_a_gguf_are_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download folder may hold another model's tokenizer.json: transformers would take that one."""
    from tests.model.test_load import write_gguf

    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "download").mkdir()
    file = write_gguf(tmp_path / "download" / "model.gguf", save_tiny_llama(tmp_path / "source"))
    other = tiny_tokenizer()
    other.add_tokens(["of another model"])
    other.save_pretrained(tmp_path / "download")
    (tmp_path / "download" / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    tokenizer = load_tokenizer(str(file))
    assert "of another model" not in tokenizer.get_vocab() and tokenizer.eos_token == "<|im_end|>"
    assert load_config(str(file)).hidden_size == 64


@pytest.mark.parametrize("stops", ["x", ["x"], 1.5, [None], [[2]], True, {"a": 1}])
def test_stops_of_a_generation_config(copied: Path, stops: Any) -> None:
    """They are compared with tokens later, in the middle of an answer."""
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    with pytest.raises(InputError, match=r"generation_config\.json is not valid") as raised:
        load_base_model(str(copied), cache=False)
    assert_one_sentence(raised.value)


@pytest.mark.parametrize("heads", [3, 5, 100])
def test_heads_of_a_gguf_that_do_not_divide(tmp_path: Path, heads: int) -> None:
    tiny_gguf(tmp_path / "model.gguf", heads=heads)
    with pytest.raises(
        InputError, match=r"model\.gguf: model\.layers\.0\.self_attn\.q_proj\.weight cannot be read"
    ):
        read_everything(GGUFSource(tmp_path / "model.gguf"))


@pytest.mark.parametrize("length", [4, 2**31, 2**60, 2**64 - 1])
@pytest.mark.parametrize("kind", [4, 8, 9])
def test_a_list_longer_than_its_file(tmp_path: Path, length: int, kind: int) -> None:
    """gguf's own reader goes on past the end, for numbers (type 4) as long as the list is said to be."""
    content = bytearray(tiny_gguf(tmp_path / "model.gguf"))
    place = content.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 4
    content[place : place + 12] = struct.pack("<IQ", kind, length)
    (tmp_path / "model.gguf").write_bytes(content)
    with limited(5), pytest.raises(InputError, match="is not a complete GGUF file"):
        GGUFSource(tmp_path / "model.gguf")


# ---- at random --------------------------------------------------------------------------------------------


class Hang(BaseException):
    """No Exception: what catches those must not take it for a damaged file."""


@contextmanager
def limited(seconds: float = 20.0) -> Iterator[None]:
    """Fail if the block takes longer; an input takes milliseconds."""

    def stop(*_: Any) -> None:
        raise Hang(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(share: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis with a share of the inputs; the short run is the same each time."""
    return settings(
        max_examples=max(10, round(share * NUM_INPUTS)),
        derandomize="QLORA_FUZZ" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["F32", "BF16", "I8", "F4", "LORA", "llama", "../x", "/etc/passwd", "nf4", "\x1b[2J", "a\nb"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def changed_json(draw: st.DrawFn, content: Any, num_changes: int = 3) -> bytes:
    """The text of `content` with a few values, anywhere in it, replaced, removed, added or copied."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, num_changes))):
        parent, key = None, None
        value = content
        while isinstance(value, (dict, list)) and value and (parent is None or draw(st.integers(0, 3))):
            parent = value
            key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
            value = value[key]
        if parent is None:
            content = draw(JSON)
            continue
        action = draw(st.sampled_from(["replace", "replace", "remove", "add", "copy"]))
        if action == "remove":
            del parent[key]
        elif action == "copy":
            parent[key] = copy.deepcopy(
                draw(st.sampled_from(list(content.values()) if isinstance(content, dict) else [0]))
            )
        elif action == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = draw(JSON)
        else:
            parent[key] = draw(JSON)
    return json.dumps(content).encode()


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes, where: int) -> bytes:
    """Bytes with one or a few replaced, put in or cut out, mostly among the first `where`."""
    data = bytearray(content)
    rng = random.Random(draw(st.integers(0, 2**32)))  # Hypothesis would choose the first bytes too often
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        position = rng.randrange(max(1, len(data) if rng.random() < 0.1 else min(where, len(data))))
        action = rng.choice(("byte", "byte", "byte", "number", "insert", "delete", "cut"))
        if action == "byte":
            data[position : position + 1] = bytes([rng.choice((0, 1, 255, rng.randrange(256)))])
        elif action == "number":
            value = rng.choice((0, 1, 2**16, 2**31, 2**32 - 1, 2**48, 2**63, 2**64 - 1))
            data[position : position + 8] = struct.pack("<Q", value)
        elif action == "insert":
            data[position:position] = rng.randbytes(rng.randrange(9))
        elif action == "delete":
            del data[position : position + rng.randrange(1, 9)]
        else:
            del data[position:]
    return bytes(data)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.float8_e5m2]
VALUES = [0.0, 1.0, -3e38, 1e-40, float("nan"), float("inf")]


@st.composite
def changed_tensors(draw: st.DrawFn, tensors: dict[str, Tensor]) -> bytes:
    """A whole safetensors file, with some tensors gone, renamed, or of another shape, type or value."""
    tensors = dict(tensors)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        action = draw(st.sampled_from(["remove", "rename", "shape", "dtype", "value", "swap"]))
        other = draw(st.sampled_from(sorted(tensors)))
        if action == "remove" and len(tensors) > 1:
            del tensors[name]
        elif action == "rename":
            part = draw(st.sampled_from(name.split(".") or [name]))
            text = draw(st.text(max_size=4) | st.integers(0, 3).map(str))
            tensors[name.replace(part, text)] = tensors.pop(name)
        elif action == "shape":
            tensors[name] = torch.ones(draw(st.lists(st.integers(0, 33), max_size=3)))
        elif action == "dtype":
            tensors[name] = tensors[name].to(draw(st.sampled_from(DTYPES)))
        elif action == "value":
            tensors[name] = torch.full_like(tensors[name], draw(st.sampled_from(VALUES)), dtype=torch.float32)
        else:
            tensors[name], tensors[other] = tensors[other], tensors[name]
    quantization = draw(st.sampled_from([b"null", b"{}"]) | changed_json(vars(QuantConfig())) | st.none())
    metadata = None if quantization is None else {"base_quantization": quantization.decode()}
    return save({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, metadata)


def changed_safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with its tensors, its header as JSON, or any of its bytes changed, or no such file."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    framed = changed_json(header, 1).map(lambda text: struct.pack("<Q", len(text)) + text + data)
    whole = changed_tensors(load(content))
    return st.one_of(whole, whole, framed, changed_bytes(content, 8 + length), st.binary(max_size=64))


def unwrap(model: nn.Module) -> None:
    """Take the adapters off again."""
    layers = lora_layers(model)
    activate(model, None)
    slot_of(model).wrapped = None
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)


def try_adapter(directory: Path, base: Any, before: State) -> None:
    """Loaded, or refused in a sentence with nothing changed."""
    with limited():
        try:
            load_adapter(base, directory)
        except InputError as error:
            assert_one_sentence(error)
        else:
            assert lora_layers(base) and all(torch.isfinite(p).all() for p in lora_parameters(base))
            unwrap(base)
        before.assert_kept(base)
        try:
            trained_base(str(directory))
        except InputError as error:
            assert_one_sentence(error)


@pytest.fixture(params=["plain", "variant"])
def good(request: pytest.FixtureRequest, whole: Path, whole_variant: Path) -> Path:
    """An adapter directory to change, of either kind."""
    return whole if request.param == "plain" else whole_variant


def test_random_adapter_weights(base: Any, good: Path, tmp_path: Path) -> None:
    before = State(base)
    work = Path(shutil.copytree(good, tmp_path / "adapter"))

    @fuzz(0.15)
    @given(changed_safetensors((good / WEIGHTS).read_bytes()))
    def run(content: bytes) -> None:
        (work / WEIGHTS).write_bytes(content)
        try_adapter(work, base, before)

    run()


# Names, and pieces of patterns: repeats of repeats are what may never end.
PATTERN = st.one_of(
    st.sampled_from(["q_proj", "v_proj", "self_attn.q_proj", "0.self_attn.v_proj", ".*", r"layers\.[01]\..*"]),
    st.lists(st.sampled_from([*list("aq.*+?|()[]{}^$\\,=10 _"), ".*", "(.+)+", "proj", "{9}"]), max_size=12).map(
        "".join
    ),
)
PATTERNS = st.dictionaries(
    PATTERN, st.sampled_from([1, 2, 4, 4.0, 0.5, 0, -1, True, "4", None, 1e300]), max_size=3
)


def test_random_adapter_config(base: Any, good: Path, tmp_path: Path) -> None:
    before = State(base)
    work = Path(shutil.copytree(good, tmp_path / "adapter"))
    text = (good / CONFIG).read_bytes()
    content = json.loads(text)
    patterns = st.tuples(PATTERNS, PATTERNS).map(
        lambda pair: json.dumps({**content, "rank_pattern": pair[0], "alpha_pattern": pair[1]}).encode()
    )

    @fuzz(0.125)
    @given(st.one_of(changed_json(content), patterns, changed_bytes(text, len(text)), st.binary(max_size=64)))
    def run(content: bytes) -> None:
        (work / CONFIG).write_bytes(content)
        try_adapter(work, base, before)

    run()


def read_everything(source: SafetensorsSource | GGUFSource) -> None:
    """Name, shape, type and values of every tensor."""
    for name in source.names:
        source.shape(name)
        if source.is_float(name):
            source.read(name)


def try_model(action: Callable[[], Any]) -> None:
    with limited():
        try:
            action()
        except InputError as error:
            assert_one_sentence(error)


@pytest.fixture(scope="module")
def directory(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose files are replaced again and again."""
    return Path(shutil.copytree(llama, tmp_path_factory.mktemp("fuzz") / "model"))


def test_random_model_weights(llama: Path, directory: Path) -> None:
    """Through the reader, and one in ten through all of loading."""
    turn = iter(range(10**9))

    @fuzz(0.2)
    @given(changed_safetensors((llama / "model.safetensors").read_bytes()))
    def run(content: bytes) -> None:
        (directory / "model.safetensors").write_bytes(content)
        try_model(lambda: read_everything(SafetensorsSource(directory)))
        if next(turn) % 10 == 0:
            try_model(lambda: load_base_model(str(directory), compute_dtype="float32", cache=False))

    run()
    shutil.copy(llama / "model.safetensors", directory / "model.safetensors")


def test_random_4bit_weights(quantized: Path) -> None:
    """Sizes, types and fields of the many parts of a 4-bit weight; what is accepted dequantizes to its shape."""
    stored = load_file(quantized / "model.safetensors")
    parts = {name.removeprefix(UP): tensor for name, tensor in stored.items() if name.startswith(UP)}
    state = ".quant_state.bitsandbytes__nf4"
    fields = json.loads(bytes(parts[state].numpy()))
    sizes = st.lists(st.integers(0, 40), max_size=3)
    dtypes = st.sampled_from([torch.uint8, torch.float32, torch.bfloat16, torch.int8, torch.float64])
    texts = st.just(json.dumps(fields).encode()) | changed_json(fields)
    num_accepted = 0

    @fuzz(0.04)
    @given(st.sampled_from(sorted(parts)), sizes, dtypes, texts, st.booleans())
    def run(part: str, shape: list[int], dtype: torch.dtype, text: bytes, in_state: bool) -> None:
        nonlocal num_accepted
        changed = dict(parts)
        if in_state:
            changed[state] = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
        else:
            changed[part] = torch.ones(shape, dtype=dtype)
        with limited():
            try:
                weight = unpack_tensors(changed, torch.device("cpu"))
            except ValueError:  # load_base_model names file and tensor around it
                return
            dense = dequantize_weight(weight, torch.float32)
        num_accepted += 1
        assert tuple(dense.shape) == tuple(weight.quant_state.shape)

    run()
    assert num_accepted > 0


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES += (
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rms_norm_eps",
    "attention_bias",
)


def test_random_model_config(llama: Path, directory: Path) -> None:
    """Anything anywhere, and numbers where numbers belong; one in ten goes through all of loading."""
    text = (llama / "config.json").read_bytes()
    sizes = st.dictionaries(st.sampled_from(SIZES), st.integers(-2, 40) | SCALARS, min_size=1, max_size=3)
    resized = sizes.map(lambda values: json.dumps({**json.loads(text), **values}).encode())
    anything = changed_json(json.loads(text), 1)
    turn = iter(range(10**9))

    @fuzz(0.05)
    @given(st.one_of(resized, anything, anything, changed_bytes(text, len(text)), st.binary(max_size=64)))
    def run(content: bytes) -> None:
        (directory / "config.json").write_bytes(content)
        try_model(lambda: load_config(str(directory)))
        try_model(lambda: empty_model(str(directory)))
        if next(turn) % 10 == 0:
            try_model(lambda: load_base_model(str(directory), compute_dtype="float32", cache=False))

    run()
    shutil.copy(llama / "config.json", directory / "config.json")


def test_random_model_index(llama: Path, directory: Path) -> None:
    names = load_file(llama / "model.safetensors")
    content = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    text = json.dumps(content).encode()
    index = directory / "model.safetensors.index.json"

    @fuzz(0.06)
    @given(st.one_of(changed_json(content), changed_bytes(text, len(text)), st.binary(max_size=64)))
    def run(content: bytes) -> None:
        index.write_bytes(content)
        try_model(lambda: read_everything(SafetensorsSource(directory)))

    run()
    index.unlink()


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "generation"]
)
def test_random_tokenizer_and_generation_config(llama: Path, directory: Path, file: str) -> None:
    name = "generation_config.json" if file == "generation" else file
    original = (
        (llama / name).read_bytes() if (llama / name).is_file() else b'{"bos_token": "<s>", "eos_token": "</s>"}'
    )

    @fuzz(0.01)
    @given(st.one_of(changed_json(json.loads(original)), changed_bytes(original, len(original))))
    def run(content: bytes) -> None:
        (directory / name).write_bytes(content)
        if file == "generation":
            try_model(lambda: load_base_model(str(directory), compute_dtype="float32", cache=False))
        else:
            try_model(lambda: load_tokenizer(str(directory)))

    run()
    (directory / name).unlink()
    if (llama / name).is_file():
        shutil.copy(llama / name, directory / name)


def test_random_gguf(tmp_path: Path) -> None:
    """Through the reader, every tensor dequantized."""
    file = tmp_path / "model.gguf"
    original = tiny_gguf(file)
    assert len(GGUFSource(file).names) == 4

    @fuzz(0.1)
    @given(st.one_of(changed_bytes(original, 560), st.binary(max_size=64)))
    def run(content: bytes) -> None:
        file.write_bytes(content)
        try_model(lambda: read_everything(open_source(file)))

    run()


def test_a_hang_is_found() -> None:
    """The limit works inside code that catches everything."""
    with pytest.raises(Hang), limited(0.05):
        while True:
            with suppress(Exception):
                sum(range(1000))
