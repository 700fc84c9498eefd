"""adapters/inspect.py: sizes of updates against the formed matrices, what is printed, what is drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import qlora.adapters.inspect
from qlora.adapters.inspect import Inspection, inspect_adapter
from qlora.adapters.peft_config import PREFIX
from qlora.cli.exits import run
from qlora.cli.main import main
from qlora.cli.show_inspection import draw_inspection, print_inspection
from qlora.lora.linalg import split_svd
from qlora.model.weights import dequantized_weights
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.system.file_names import BASE_SHIFT, CONFIG, WEIGHTS
from tests.models import save_tiny_llama

Q, V, DOWN = "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"
SHAPES = {Q: (64, 64), V: (32, 64), DOWN: (64, 160)}  # (out, in) in the tiny LLaMA
TOLERANCE = 1e-7  # s B is rounded to fp32 once; all else is fp64
FP32_TOLERANCE = 1e-5  # sums of up to 160 squares in fp32


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


def save_adapter(
    directory: Path,
    modules: tuple[str, ...] = (Q, V, DOWN),
    ranks: dict[str, int] | None = None,
    dora: bool = False,
    quantization: Any = "absent",
    extra: dict[str, Tensor] | None = None,
    **fields: Any,
) -> Path:
    """An adapter of the tiny LLaMA in PEFT's format, of random numbers, rank 4 and alpha 6."""
    generator = torch.Generator().manual_seed(0)
    state = dict(extra or {})
    for block in range(2):
        for module in modules:
            (rows, columns), rank = SHAPES[module], (ranks or {}).get(module, 4)
            name = f"model.layers.{block}.{module}"
            state[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            state[f"{name}.lora_B.weight"] = 0.01 * (1 + block) * torch.randn(rows, rank, generator=generator)
            if dora:
                state[f"{name}.lora_magnitude_vector"] = torch.rand(rows, generator=generator) + 1
    metadata = None if quantization == "absent" else {"base_quantization": json.dumps(quantization)}
    directory.mkdir()
    save_file({PREFIX + key: tensor for key, tensor in state.items()}, directory / WEIGHTS, metadata)
    description = {"peft_type": "LORA", "r": 4, "lora_alpha": 6.0, "target_modules": ["q_proj"], "use_dora": dora}
    (directory / CONFIG).write_text(json.dumps({**description, **fields}))
    return directory


def formed_updates(directory: Path, scaling: float) -> dict[str, Tensor]:
    """layer -> the whole update s B A in fp64."""
    state = {key.removeprefix(PREFIX): t.double() for key, t in load_file(directory / WEIGHTS).items()}
    layers = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    return {x: scaling * state[f"{x}.lora_B.weight"] @ state[f"{x}.lora_A.weight"] for x in layers}


def printed(found: Inspection, width: int = 150) -> str:
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        print_inspection(found, console)
    return capture.get()


# ---- sizes ------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_formed_update(tmp_path: Path) -> None:
    found = inspect_adapter(save_adapter(tmp_path / "adapter"))
    formed = formed_updates(tmp_path / "adapter", scaling=1.5)
    assert {u.layer for u in found.updates} == set(formed) and len(formed) == 6
    for update in found.updates:
        sizes = torch.linalg.svdvals(formed[update.layer])
        assert update.norm == pytest.approx(formed[update.layer].norm().item(), rel=TOLERANCE)
        assert update.spectral_norm == pytest.approx(sizes[0].item(), rel=TOLERANCE)
        stable = (sizes.square().sum() / sizes[0].square()).item()
        assert update.stable_rank == pytest.approx(stable, rel=TOLERANCE)
        assert 1 < update.stable_rank < update.rank == 4
        assert update.relative is None and update.magnitude_change is None
    blocks, modules, sizes_by_place = found.grid()
    assert (blocks, sorted(modules)) == ([0, 1], sorted(SHAPES))
    for (block, module), size in sizes_by_place.items():
        assert size == pytest.approx(formed[f"model.layers.{block}.{module}"].norm().item(), rel=TOLERANCE)
    together = torch.cat([update.flatten() for update in formed.values()]).norm().item()
    assert found.size(found.updates) == pytest.approx(together, rel=TOLERANCE)


def test_ranks_alphas_and_rslora_count(tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3.0}, use_rslora=True)
    found = inspect_adapter(save_adapter(tmp_path / "adapter", ranks={V: 2}, **settings))
    formed = formed_updates(tmp_path / "adapter", scaling=1.0)
    for update in found.updates:
        rank, alpha = (2, 3.0) if update.module == V else (4, 6.0)
        expected = alpha / math.sqrt(rank) * formed[update.layer].norm().item()
        assert update.rank == rank and update.norm == pytest.approx(expected, rel=TOLERANCE)
    text = printed(found)
    assert "rsLoRA" in text and "4 (4 layers), 2 (2 layers)" in text
    assert "6 (4 layers), 3 (2 layers)" in text and "3 (4 layers), 2.12132 (2 layers)" in text


def test_rank_one_and_an_untrained_adapter(tmp_path: Path) -> None:
    directory = save_adapter(tmp_path / "adapter", ranks=dict.fromkeys(SHAPES, 1), r=1)
    assert all(u.stable_rank == pytest.approx(1) for u in inspect_adapter(directory).updates)
    state = load_file(directory / WEIGHTS)
    save_file({k: t * ("lora_A" in k) for k, t in state.items()}, directory / WEIGHTS)
    for update in inspect_adapter(directory).updates:
        assert (update.norm, update.spectral_norm, update.stable_rank) == (0, 0, 0)


@pytest.mark.parametrize("quant", [QuantConfig(), None], ids=["nf4", "16 bits"])
def test_with_the_base_sizes_are_relative_to_the_weights_of_training(
    llama: Path, tmp_path: Path, quant: QuantConfig | None
) -> None:
    recorded = quant and {"quant_type": "nf4", "double_quant": True}
    found = inspect_adapter(save_adapter(tmp_path / "adapter", quantization=recorded), str(llama))
    weights = {name: weight.double() for name, weight in dequantized_weights(str(llama), quant)}
    formed = formed_updates(tmp_path / "adapter", scaling=1.5)
    for update in found.updates:
        expected = formed[update.layer].norm() / weights[f"{update.layer}.weight"].norm()
        assert update.relative == pytest.approx(expected.item(), rel=FP32_TOLERANCE)
    q_updates = [u for u in found.updates if u.module == Q]
    stacked = (
        torch.cat([formed[u.layer] for u in q_updates]),
        torch.cat([weights[f"{u.layer}.weight"] for u in q_updates]),
    )
    assert found.size(q_updates) == pytest.approx(
        (stacked[0].norm() / stacked[1].norm()).item(), rel=FP32_TOLERANCE
    )
    assert "update relative to the base's weight" in printed(found)


def test_dora_is_measured_whole_with_the_base_and_in_part_without(llama: Path, tmp_path: Path) -> None:
    directory = save_adapter(tmp_path / "adapter", dora=True, quantization=None)
    part, whole = inspect_adapter(directory), inspect_adapter(directory, str(llama))
    weights = {name: weight.double() for name, weight in dequantized_weights(str(llama), None)}
    formed = formed_updates(directory, scaling=1.5)
    magnitudes = load_file(directory / WEIGHTS)
    for low_rank, update in zip(part.updates, whole.updates, strict=True):
        weight = weights[f"{update.layer}.weight"]
        magnitude = magnitudes[f"{PREFIX}{update.layer}.lora_magnitude_vector"].double()
        adapted = weight + formed[update.layer]
        change = adapted * (magnitude / adapted.norm(dim=1))[:, None] - weight
        assert low_rank.norm == pytest.approx(formed[update.layer].norm().item(), rel=TOLERANCE)
        assert update.norm == pytest.approx(change.norm().item(), rel=FP32_TOLERANCE)
        assert update.relative == pytest.approx((change.norm() / weight.norm()).item(), rel=FP32_TOLERANCE)
        moved = (magnitude / weight.norm(dim=1) - 1).abs().mean().item()
        assert update.magnitude_change == pytest.approx(moved, rel=FP32_TOLERANCE)
    assert "pass --model to measure the whole update" in printed(part)
    assert "\nmagnitude change " in printed(whole) and "pass --model" not in printed(whole)
    assert "nan" not in printed(part) + printed(whole)


def test_what_pissa_has_learned_is_measured_without_its_start(llama: Path, tmp_path: Path) -> None:
    """Its base is W - B' A': the update of W is B A - B' A'."""
    directory = save_adapter(tmp_path / "adapter", quantization=None, init_lora_weights="pissa")
    generator = torch.Generator().manual_seed(1)
    shift = {}
    for key, tensor in load_file(directory / WEIGHTS).items():
        shift[key] = 0.02 * torch.randn(3, tensor.shape[1], generator=generator)
        if ".lora_B." in key:
            shift[key] = torch.randn(len(tensor), 3, generator=generator)
    save_file(shift, directory / BASE_SHIFT)
    found, with_base = inspect_adapter(directory), inspect_adapter(directory, str(llama))
    weights = dict(dequantized_weights(str(llama), None))
    for update, relative in zip(found.updates, with_base.updates, strict=True):
        name = f"{PREFIX}{update.layer}"
        start = shift[f"{name}.lora_B.weight"].double() @ shift[f"{name}.lora_A.weight"].double()
        expected = (formed_updates(directory, scaling=1.5)[update.layer] - start).norm().item()
        assert update.norm == relative.norm == pytest.approx(expected, rel=TOLERANCE)
        size = weights[f"{update.layer}.weight"].norm().item()
        assert relative.relative == pytest.approx(expected / size, rel=1e-3)  # q(W - D) + D: bf16's rounding
        assert update.rank == 4
    text = printed(found)
    assert "LoRA, started as PiSSA" in text and "start included" not in text and "1.5" in text


def test_pissa_of_peft_is_measured_without_its_start_where_the_base_is_there(llama: Path, tmp_path: Path) -> None:
    """Untrained, so that the update is nothing but the start."""
    weights, state = dict(dequantized_weights(str(llama), None, original=True)), {}
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        A, B = split_svd(weights[f"{layer}.weight"], 4, 1.5)
        state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = A.contiguous(), B.contiguous()
    settings = {"init_lora_weights": "pissa", "target_modules": ["0.self_attn.q_proj", "1.mlp.down_proj"]}
    directory = save_adapter(tmp_path / "adapter", (), None, False, None, state, **settings)
    with_start, without = inspect_adapter(directory), inspect_adapter(directory, str(llama))
    for update in with_start.updates:
        largest = torch.linalg.svdvals(weights[f"{update.layer}.weight"].double())[:4]
        assert update.norm == pytest.approx(largest.norm().item(), rel=FP32_TOLERANCE)
    for update, bare in zip(with_start.updates, without.updates, strict=True):
        assert bare.norm < FP32_TOLERANCE * update.norm
    assert "the PiSSA start included" in printed(with_start) and "start included" not in printed(without)


def test_the_ranks_that_adalora_has_left_are_told(tmp_path: Path) -> None:
    """Two of four triplets are gone from the file; the scale is still that of four."""
    kept, name = [True, False, False, True], f"model.layers.0.{V}"
    A, B, E = torch.randn(2, 64), torch.randn(32, 2), torch.randn(2, 1)
    state = {f"{name}.lora_A": A, f"{name}.lora_B": B, f"{name}.lora_E": E}
    settings = dict(peft_type="ADALORA", init_r=4, target_r=2, rank_pattern={f"{name}.lora_E": kept})
    (update,) = (found := inspect_adapter(save_adapter(tmp_path / "adapter", (), extra=state, **settings))).updates
    assert update.rank == 2
    assert update.norm == pytest.approx((1.5 * B @ (E * A)).double().norm().item(), rel=FP32_TOLERANCE)
    text = printed(found)
    facts = dict(line.split("  ", 1) for line in text.partition("\n\n")[0].splitlines())
    assert [facts[x].strip() for x in ("variant", "rank", "scaling")] == ["AdaLoRA", "2", "1.5"]


def test_conv1d_weights_are_turned(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=64)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=2))
    model.save_pretrained(tmp_path / "gpt2")
    layers = [f"transformer.h.{block}.{name}" for block in (0, 1) for name in ("attn.c_proj", "mlp.c_proj")]
    dense = dict(dequantized_weights(str(tmp_path / "gpt2"), None))
    weights = {layer: dense[f"{layer}.weight"].double().T for layer in layers}
    state = {}
    for layer, weight in weights.items():
        rows, columns = weight.shape
        state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = (
            torch.ones(4, columns),
            torch.ones(rows, 4),
        )
        state[f"{layer}.lora_magnitude_vector"] = torch.ones(rows)
    directory = save_adapter(
        tmp_path / "adapter", (), quantization=None, extra=state, use_dora=True, fan_in_fan_out=True
    )
    found = inspect_adapter(directory, str(tmp_path / "gpt2"))
    for update in found.updates:
        moved = (1 / weights[update.layer].norm(dim=1) - 1).abs().mean().item()
        assert update.magnitude_change == pytest.approx(moved, rel=FP32_TOLERANCE)
    header = printed(found).partition("norms:\n")[2].splitlines()[0].split()
    assert header == ["layer", "attn.c_proj", "mlp.c_proj", "all"]  # the last names alone would be the same


# ---- what is printed --------------------------------------------------------------------------------------


def test_everything_about_an_adapter_is_printed(tmp_path: Path) -> None:
    trained = {"model.embed_tokens.weight": torch.zeros(300, 64, dtype=torch.bfloat16)}
    directory = save_adapter(
        tmp_path / "adapter",
        quantization={"quant_type": "fp4", "double_quant": False},
        extra=trained,
        modules_to_save=["embed_tokens"],
        lora_dropout=0.05,
        base_model_name_or_path="org/base[red]",
    )
    text = printed(inspect_adapter(directory))
    numbers = sum(tensor.numel() for tensor in load_file(directory / WEIGHTS).values())
    size = (directory / WEIGHTS).stat().st_size
    facts = dict(line.split("  ", 1) for line in text.partition("\n\n")[0].splitlines())
    assert {fact: value.strip() for fact, value in facts.items()} == {
        "adapter": str(directory),
        "base model": "org/base[red]",
        "base quantization": "4 bits, fp4, scales in fp32",
        "variant": "LoRA",
        "rank": "4",
        "alpha": "6",
        "scaling": "1.5",
        "dropout": "0.05",
        "layers": "6 in 2 blocks",
        "modules": "mlp.down_proj, self_attn.q_proj, self_attn.v_proj",
        "not checked": "whether the base has blocks after 1 that the file leaves out; pass --model",
        "trained whole": "model.embed_tokens.weight",
        "parameters": f"{numbers:,}",
        "file": f"{size:,} bytes, float32 (12 tensors), bfloat16 (1 tensors)",
    }
    formed = formed_updates(directory, scaling=1.5)
    table = text.partition("Frobenius norm of the update:\n")[2].splitlines()
    assert table[0].split() == ["layer", "down_proj", "q_proj", "v_proj", "all"]
    rows = {line.split()[0]: line.split()[1:] for line in table[1:4]}
    for block in (0, 1):
        norms = [formed[f"model.layers.{block}.{module}"].norm().item() for module in (DOWN, Q, V)]
        assert rows[str(block)] == [f"{x:.3g}" for x in (*norms, math.hypot(*norms))]
    assert rows["all"][-1] == f"{math.hypot(*(update.norm().item() for update in formed.values())):.3g}"
    assert table[4].split()[:2] == ["spectral", "norm"] and table[5].split()[:2] == ["stable", "rank"]


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, "none, 16 bits"),
        ("absent", "not recorded; 16 bits assumed"),
        ({"quant_type": "nf4", "double_quant": True}, "4 bits, nf4, scales quantized too"),
    ],
)
def test_the_quantization_of_the_base_is_told(tmp_path: Path, quantization: Any, expected: str) -> None:
    text = printed(inspect_adapter(save_adapter(tmp_path / "adapter", quantization=quantization)))
    assert f"  {expected}" in text


def test_every_block_has_its_row_and_layers_in_none_have_theirs(tmp_path: Path) -> None:
    """Experts of one layer are one column; "10" comes after "9"."""
    state = {}
    for layer in ["lm_head", *(f"model.layers.{b}.mlp.experts.{e}.up_proj" for b in range(12) for e in range(3))]:
        state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = torch.ones(4, 2), torch.ones(2, 4)
    found = inspect_adapter(save_adapter(tmp_path / "adapter", (), extra=state))
    blocks, modules, sizes = found.grid()
    assert blocks == [*range(12), None] and set(modules) == {"lm_head", "mlp.experts.*.up_proj"}
    assert sizes[3, "mlp.experts.*.up_proj"] == pytest.approx(1.5 * 4 * 2 * math.sqrt(3))
    table = printed(found).partition("update:\n")[2].splitlines()
    assert [line.split()[0] for line in table[1:14]] == [*map(str, range(12)), "none"]


def test_a_layer_that_is_not_finite_is_named(tmp_path: Path) -> None:
    directory = save_adapter(tmp_path / "adapter")
    state = load_file(directory / WEIGHTS)
    state[f"{PREFIX}model.layers.1.{V}.lora_B.weight"][3, 2] = math.nan
    save_file(state, directory / WEIGHTS)
    found = inspect_adapter(directory)
    assert f"not finite: model.layers.1.{V}\n" in printed(found)
    draw_inspection(found, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").is_file()


# ---- bad adapters -----------------------------------------------------------------------------------------


def damaged(directory: Path, change: Any) -> str:
    state = load_file(directory / WEIGHTS)
    change(state, f"{PREFIX}model.layers.0.{V}")
    save_file(state, directory / WEIGHTS)
    return str(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, v: s.pop(f"{v}.lora_B.weight"), "has A (4, 64) and B missing; save it again."),
        (lambda s, v: s.update({f"{v}.lora_B.weight": torch.ones(32, 3)}), "has A (4, 64) and B (32, 3)"),
        (lambda s, v: s.update({f"{v}.lora_A.weight": torch.ones(4)}), "has A (4,) and B (32, 4)"),
        (lambda s, v: s.update({f"{v}.lora_B.weight": torch.ones(0, 4)}), "has A (4, 64) and B (0, 4)"),
        (lambda s, v: s.update({f"{v}.lora_magnitude_vector": torch.ones(3)}), "32 outputs and not as many"),
    ],
)
def test_halves_that_do_not_fit_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    directory = damaged(save_adapter(tmp_path / "adapter", dora=True), change)
    assert run(main, ["inspect", directory, "--picture", str(tmp_path / "sizes.png")]) == 2
    output = capsys.readouterr()
    assert f"is damaged: model.layers.0.{V} " in output.err and message in output.err
    assert not output.out and not (tmp_path / "sizes.png").exists()


def test_a_base_shift_of_another_shape_is_one_sentence(tmp_path: Path) -> None:
    directory = save_adapter(tmp_path / "adapter", init_lora_weights="pissa")
    name = f"{PREFIX}model.layers.0.{V}"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.ones(33, 4)},
        directory / BASE_SHIFT,
    )
    with pytest.raises(
        InputError, match=r"v_proj has a base shift of another shape than \(32, 64\); save it again"
    ):
        inspect_adapter(directory)


def test_another_base_is_refused(llama: Path, tmp_path: Path) -> None:
    other = {
        f"model.layers.7.{Q}.lora_A.weight": torch.ones(4, 64),
        f"model.layers.7.{Q}.lora_B.weight": torch.ones(64, 4),
    }
    directory = save_adapter(tmp_path / "adapter", extra=other)
    assert len(inspect_adapter(directory).updates) == 7
    with pytest.raises(
        InputError, match=r"model\.layers\.7\.self_attn\.q_proj is not a linear layer of this model"
    ):
        inspect_adapter(directory, str(llama))


# ---- the picture ------------------------------------------------------------------------------------------


def test_the_picture_shows_the_sizes_and_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: None)  # so that it can be looked at
    found = inspect_adapter(save_adapter(tmp_path / "adapter $\\frac$", modules=(Q, V)))
    draw_inspection(found, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    figure = pyplot.gcf()
    axes, colour_bar = figure.axes
    shown = torch.tensor(axes.images[0].get_array().data, dtype=torch.float64)
    _, modules, sizes = found.grid()
    expected = torch.tensor([[sizes[block, module] for module in modules] for block in (0, 1)])
    assert torch.allclose(shown, expected.double(), rtol=1e-6)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q_proj", "v_proj"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("module", "layer")
    assert axes.get_title() == "Size of the updates in adapter $\\frac$\nLoRA, rank 4"
    assert colour_bar.get_ylabel() == "Frobenius norm of the update"
    monkeypatch.undo()
    pyplot.close(figure)


def test_the_picture_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_adapter(tmp_path / "adapter")
    for name in ("sizes.jpg", "nowhere/sizes.png"):
        with pytest.raises(InputError, match=r"give a \.png file in an existing directory"):
            draw_inspection(inspect_adapter(directory), tmp_path / name)
    from matplotlib.figure import Figure

    def fail(figure: Any, file: Path, **options: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_inspection(inspect_adapter(directory), tmp_path / "sizes.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_from_the_command_line_without_a_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No base is read, whatever the adapter names."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the base was read")

    for name in ("empty_model", "dequantized_weights"):
        monkeypatch.setattr(qlora.adapters.inspect, name, refuse)
    directory = save_adapter(tmp_path / "adapter", base_model_name_or_path="/no/such/[red]base")
    main(["inspect", str(directory), "--picture", str(tmp_path / "sizes.png")])
    output = capsys.readouterr().out
    assert "/no/such/[red]base" in output and "stable rank " in output
    assert (tmp_path / "sizes.png").is_file() and sorted(p.name for p in directory.iterdir()) == [CONFIG, WEIGHTS]
