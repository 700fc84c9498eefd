"""--calibrate from end to end: the run, its adapter, what reads them, and a base to keep."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora
from eval.compare import main as compare
from qlora.adapters.load import load_adapter
from qlora.adapters.provenance import calibration_of, trained_base
from qlora.cli.commands.generate import main as generate
from qlora.cli.commands.merge import main as merge
from qlora.cli.commands.quantize import main as quantize
from qlora.data.dataset import Encoder, Sources, load_examples
from qlora.data.example import Example
from qlora.model.cache import cached_base
from qlora.model.calibrate import calibrate_base, choose_texts
from qlora.model.load import load_base_model
from qlora.model.tokenizer import load_tokenizer
from qlora.model.weights import dequantized_weights
from qlora.quant.layers import Linear4bit
from qlora.quant.storage import packed_tensors
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.training.calibration import _first_rows
from tests.models import save_tiny_llama
from tests.reference import relative_error
from tests.tiny import tiny_tokenizer

ROWS = [{"prompt": f"{n} + {n}", "completion": f"{2 * n}, as everyone knows who counts"} for n in range(160)]
SETTINGS: dict[str, Any] = dict(max_steps=2, batch_size=4, max_length=64, rank=2, compute_dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cache")
        patch.setenv("QLORA_CACHE", str(directory))
        # A random model is no better on any rows than its rounded copy.
        losses = itertools.cycle([2.0, 1.0])
        patch.setattr("qlora.model.calibrate._mean_loss", lambda network, texts: next(losses))
        yield directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("base"), tokenizer=tiny_tokenizer()))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


@pytest.fixture(scope="module")
def run(base: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("run") / "out"
    return qlora.train(model=base, data=rows, output_dir=str(output), calibrate=rows, save_every=1, **SETTINGS)


def test_the_adapter_names_its_base(run: Any, base: str) -> None:
    quant = trained_base(str(run.adapter_dir)).quantization
    assert quant is not None and len(quant.calibration) == 16
    assert run.model.base_info.quantization == quant
    assert cached_base(Path(base), quant).is_dir()


def test_it_is_used_again_without_asking(run: Any, base: str, tmp_path: Path, capsys: Any) -> None:
    """By an answer, a merge and a run that goes on from the adapter: the base that was trained on."""
    quant = calibration_of([run.adapter_dir], QuantConfig())
    generate(["--model", base, "--adapter", str(run.adapter_dir), "--prompt", "1 + 1", "--max-new-tokens", "4"])
    merge(["--model", base, "--adapter", str(run.adapter_dir), "--output-dir", str(tmp_path / "merged")])
    merged = load_base_model(str(tmp_path / "merged"), use_4bit=False, compute_dtype="float32")
    weight = merged.get_submodule("model.layers.1.mlp.down_proj").weight  # not adapted
    expected = dict(dequantized_weights(base, quant))["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(weight, expected.bfloat16())
    assert not torch.equal(
        weight, dict(dequantized_weights(base, QuantConfig()))["model.layers.1.mlp.down_proj.weight"].bfloat16()
    )
    more = qlora.train(
        model=base, data=ROWS, output_dir=str(tmp_path / "more"), adapter=str(run.adapter_dir),
        **{name: value for name, value in SETTINGS.items() if name != "rank"},
    )  # fmt: skip
    assert more.model.base_info.quantization == quant


def test_load_base_model_is_the_longer_way(base: str, rows: str, tmp_path: Path) -> None:
    """Rows in a file or in Python: the base that `calibrate_base` makes of the same texts."""
    examples = load_examples(Sources([rows]), Encoder(load_tokenizer(base), 1024))[0]
    quant, _ = calibrate_base(base, choose_texts(examples, 4096), compute_dtype="float32")
    expected = list(load_base_model(base, True, quant, compute_dtype="float32").parameters())
    nearest = list(load_base_model(base, compute_dtype="float32").parameters())
    options: dict[str, Any] = dict(calibrate_tokens=4096, compute_dtype="float32")
    for source in (rows, Path(rows), ROWS):
        found = qlora.load_base_model(base, calibrate=source, **options)
        assert found.base_info.quantization == quant
        assert all(torch.equal(one, other) for one, other in zip(found.parameters(), expected, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(expected, nearest, strict=True))
    off = qlora.load_base_model(base, calibrate="off", **options)
    assert off.base_info.quantization == QuantConfig()
    assert all(torch.equal(one, other) for one, other in zip(off.parameters(), nearest, strict=True))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(calibrate=ROWS, use_4bit=False), "calibrate and use_4bit=False do not go together"),
        (dict(calibrate=ROWS, cache=False), "calibrate and cache=False do not go together"),
        (dict(calibrate=ROWS, quant=QuantConfig(calibration="0" * 16)), "names a calibration do not go together"),
        (dict(calibrate="auto"), "'auto' is for training"),
        (dict(calibrate=7), "calibrate is of type int; give a path, a list of dicts"),
        (dict(calibrate=ROWS[:9]), "give at least 2,048"),
    ],
)
def test_load_base_model_refuses(base: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        qlora.load_base_model(base, compute_dtype="float32", **options)


def test_compare_takes_the_base_of_its_adapters(run: Any, base: str, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    options = ["--data", str(tmp_path / "test.jsonl"), "--max-new-tokens", "4", "--compute-dtype", "float32"]
    compare(["--model", base, "--adapter", str(run.adapter_dir), *options])


def test_an_adapter_without_a_record_goes_with_any_base(run: Any, tmp_path: Path) -> None:
    """As PEFT writes it: nothing is known, and nothing of it is read twice."""
    other = Path(shutil.copytree(run.adapter_dir, tmp_path / "other"))
    save_file(load_file(other / "adapter_model.safetensors"), other / "adapter_model.safetensors")
    found = calibration_of([other, run.adapter_dir], QuantConfig())
    assert found == trained_base(str(run.adapter_dir)).quantization
    assert calibration_of([other], QuantConfig()) == QuantConfig()


def test_another_base_is_refused(run: Any, base: str) -> None:
    with pytest.raises(InputError, match="trained on a 4-bit base with another calibration"):
        load_adapter(load_base_model(base, compute_dtype="float32"), run.adapter_dir)
    load_adapter(load_base_model(base, use_4bit=False, compute_dtype="float32"), run.adapter_dir)


def test_resumed_on_the_same_base(run: Any, base: str, rows: str, tmp_path: Path) -> None:
    """With --calibrate as before the checkpoint fits; without, the base is another one."""
    settings = dict(model=base, data=rows, output_dir=str(run.adapter_dir), resume="auto", **SETTINGS)
    assert qlora.train(calibrate=rows, **settings).metrics == run.metrics
    with pytest.raises(InputError, match="base"):
        qlora.train(**settings)


def test_auto(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first rows; too few leave the nearest codes, which is said."""
    run = qlora.train(model=base, data=ROWS * 2, output_dir=str(tmp_path / "auto"), calibrate="auto", **SETTINGS)
    assert run.model.base_info.quantization.calibration
    assert "4-bit codes chosen on" in capsys.readouterr().out
    few = qlora.train(model=base, data=ROWS[:20], output_dir=str(tmp_path / "few"), calibrate="auto", **SETTINGS)
    assert few.model.base_info.quantization == QuantConfig()
    assert "to choose 4-bit codes on; give at least" in capsys.readouterr().out


def test_every_source_gives_its_first_rows(base: str) -> None:
    """In proportion to what an epoch sees of it."""
    rows = [Example(torch.full((10,), place), torch.full((10,), place)) for place in range(100)]

    class Sources(list[Example]):
        sources = ((20, 2.0), (80, 0.5))  # 40 rows of each in an epoch

    chosen = [int(row.input_ids[0]) for row in _first_rows(Sources(rows), 140)]
    assert chosen == [*range(8), *range(20, 28)]  # 70 tokens each, and a seventh more to keep out


@pytest.mark.parametrize(
    "settings", [{"use_4bit": False}, {"cache": False}, {"init": "pissa"}, {"init": "loftq"}], ids=str
)
def test_what_does_not_go_together(base: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"--calibrate and .* do not go together"):
        qlora.train(
            model=base, data=ROWS, output_dir=str(tmp_path / "out"), calibrate="auto", **settings, **SETTINGS
        )


@pytest.fixture(scope="module")
def kept(base: str, rows: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `qlora quantize` makes of the same rows."""
    output = str(tmp_path_factory.mktemp("kept") / "kept")
    options = ["--max-length", "64", "--compute-dtype", "float32", "--output-dir", output]
    quantize(["--model", base, "--calibrate", rows, *options])
    return output


def test_a_base_to_keep(run: Any, base: str, kept: str) -> None:
    """It loads by itself, with the run's codes, and fits the run's adapter."""
    quant = trained_base(str(run.adapter_dir)).quantization
    network = load_base_model(kept, compute_dtype="float32")
    assert network.base_info.quantization == quant
    cached = load_base_model(base, True, quant, compute_dtype="float32")
    for one, other in zip(network.parameters(), cached.parameters(), strict=True):
        assert torch.equal(one, other.to(torch.bfloat16).to(other.dtype) if other.is_floating_point() else other)
    load_adapter(network, run.adapter_dir)
    assert "4-bit codes chosen on" in Path(kept, "README.md").read_text()


def test_transformers_loads_it_bit_for_bit(kept: str) -> None:
    """An ordinary bitsandbytes checkpoint: the same codes and scales, logits and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, ours = AutoModelForCausalLM.from_pretrained(kept), load_base_model(kept, compute_dtype="float32")
    num_layers = 0
    for name, layer in ours.named_modules():
        if isinstance(layer, Linear4bit):
            packed, expected = (packed_tensors(one.weight) for one in (theirs.get_submodule(name), layer))
            for part, tensor in expected.items():
                assert part.startswith(".quant_state") or torch.equal(packed[part].flatten(), tensor.flatten())
            num_layers += 1
    assert num_layers == 14
    ids = torch.arange(5, 60)[None]
    with torch.inference_mode():
        assert relative_error(theirs(input_ids=ids).logits.float(), ours(input_ids=ids).logits) < 3e-2
    assert AutoTokenizer.from_pretrained(kept)("a b")["input_ids"]


def test_quantize_without_texts_and_with_wrong_input(base: str, kept: str, tmp_path: Path) -> None:
    quantize(["--model", base, "--output-dir", str(tmp_path / "nearest")])
    assert load_base_model(str(tmp_path / "nearest")).base_info.quantization == QuantConfig()
    for arguments, problem in (
        (["--model", base], "--output-dir are required"),
        (["--model", base, "--output-dir", str(tmp_path / "nearest")], "exists already"),
        (["--model", kept, "--output-dir", str(tmp_path / "x")], "stored in 4 bits"),
        (["--model", base, "--calibrate", "auto", "--output-dir", str(tmp_path / "x")], "auto is for training"),
        (["--model", base, "--calibrate", "none.jsonl", "--output-dir", str(tmp_path / "x")], "none.jsonl"),
    ):
        with pytest.raises(InputError, match=problem):
            quantize(arguments)
    assert not (tmp_path / "x").exists()
