"""adapters/fused_formats.py: LitGPT's, Megatron's and minimind's layouts compute the same after `import`.

The references are the tools' own formulas, written out over whole weights. (Checked once against LitGPT 0.5.13
itself, on the base's weights in fp32: logits within 1e-6, relative.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from qlora.adapters.load import load_adapter
from qlora.adapters.other_formats import detect_tool
from qlora.cli.exits import run
from qlora.cli.main import main
from qlora.model.load import load_base_model
from qlora.system.file_names import CONFIG, WEIGHTS
from tests.models import save_tiny_llama
from tests.reference import relative_error

IDS = torch.arange(3, 27)[None]
FP32_TOLERANCE = 1e-5  # two layers of fp32 products of up to 160 terms, summed in another order
RANK, ALPHA = 4, 6.0
HEADS, GROUPS, SIZE, HIDDEN, MLP = 4, 2, 16, 64, 160  # of the tiny LLaMA
Q, K = HEADS * SIZE, GROUPS * SIZE


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


class Draw:
    """Seeded tensors."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, *shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=self.generator)


def save(state: dict[str, Tensor], file: Path, **settings: Any) -> Path:
    """Write tensors and, if given, adapter_config.json; returns the directory."""
    file.parent.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
    if settings:
        (file.parent / CONFIG).write_text(json.dumps(settings))
    return file.parent


def assert_computes(source: Path, llama: Path, updates: dict[str, Tensor], *flags: str) -> None:
    """After `import`, the logits are those of weights W + update."""
    output = source.parent / f"{source.name}-imported"
    assert run(main, ["import", str(source), "--output-dir", str(output), *flags]) == 0
    model = load_base_model(str(llama), use_4bit=False, compute_dtype="float32", cache=False)
    load_adapter(model, output)
    with torch.no_grad():
        actual = model(IDS).logits
        plain = load_base_model(str(llama), use_4bit=False, compute_dtype="float32", cache=False)
        plain.float()
        before = plain(IDS).logits
        for layer, update in updates.items():
            plain.get_submodule(layer).weight += update
        expected = plain(IDS).logits
    assert relative_error(before, expected) > 0.01, "the adapter does something"
    assert relative_error(actual, expected) < FP32_TOLERANCE


def refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str, *flags: str) -> None:
    """One sentence, exit code 2, nothing written."""
    capsys.readouterr()
    assert run(main, ["import", str(source), "--output-dir", str(tmp_path / "out"), *flags]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1, printed
    assert not (tmp_path / "out").exists()


# ---- minimind ---------------------------------------------------------------------------------------------


def minimind_state(prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    draw, state, updates = Draw(), {}, {}
    for layer in (f"model.layers.{n}.self_attn.{name}" for n in range(2) for name in ("q_proj", "o_proj")):
        A, B = draw(RANK, HIDDEN), draw(HIDDEN, RANK)
        state[f"{prefix}{layer}.lora.A.weight"], state[f"{prefix}{layer}.lora.B.weight"] = A, B
        updates[layer] = B @ A
    return state, updates


@pytest.mark.parametrize(("name", "prefix"), [("lora.safetensors", ""), (WEIGHTS, "module.")])
def test_minimind(llama: Path, tmp_path: Path, name: str, prefix: str) -> None:
    """A square layer's B A is added without a factor; no settings are stored."""
    state, updates = minimind_state(prefix)
    directory = save(state, tmp_path / "mini" / name)
    assert detect_tool(directory) == detect_tool(directory / name) == "minimind"
    assert_computes(directory, llama, updates)


def test_a_pickle_is_converted_by_the_words_of_the_error(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, updates = minimind_state()
    directory = tmp_path / "mini"
    directory.mkdir()
    torch.save(state, directory / "lora_medical_512.pth")
    capsys.readouterr()
    assert run(main, ["import", str(directory), "--output-dir", str(tmp_path / "out")]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "is a pickle, which can run code" in printed
    code = printed[printed.index("import torch") :]
    exec(code, {})  # the user's own Python
    assert_computes(directory, llama, updates)


# ---- LitGPT -----------------------------------------------------------------------------------------------


def litgpt_state(parts: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """litgpt/lora.py: of the parts of q, k, v that train, each has R rows of A and its rows of B."""
    draw, state, updates, s = Draw(), {}, {}, ALPHA / RANK
    for n in range(2):
        A, B = [], []
        for part in parts:
            a, b = draw(RANK, HIDDEN), draw(Q if part == "q" else K, RANK)
            A.append(a), B.append(b)
            updates[f"model.layers.{n}.self_attn.{part}_proj"] = s * b @ a
        state[f"transformer.h.{n}.attn.qkv.lora_A"], state[f"transformer.h.{n}.attn.qkv.lora_B"] = (
            torch.cat(A),
            torch.cat(B),
        )
        for theirs, ours, rows, columns in (
            ("attn.proj", "self_attn.o_proj", HIDDEN, Q),
            ("mlp.fc_1", "mlp.gate_proj", MLP, HIDDEN),
            ("mlp.fc_2", "mlp.up_proj", MLP, HIDDEN),
            ("mlp.proj", "mlp.down_proj", HIDDEN, MLP),
        ):
            a, b = draw(RANK, columns), draw(rows, RANK)
            state[f"transformer.h.{n}.{theirs}.lora_A"], state[f"transformer.h.{n}.{theirs}.lora_B"] = a, b
            updates[f"model.layers.{n}.{ours}"] = s * b @ a
    state["lm_head.lora_A"], state["lm_head.lora_B"] = draw(RANK, HIDDEN), draw(300, RANK)
    updates["lm_head"] = s * state["lm_head.lora_B"] @ state["lm_head.lora_A"]
    return state, updates


def litgpt_settings(directory: Path, parts: str, **changed: Any) -> None:
    flags = {f"lora_{word}": word[0] in parts for word in ("query", "key", "value")}
    settings = {
        "checkpoint_dir": "checkpoints/org/base",
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
    }
    (directory / "hyperparameters.yaml").write_text(yaml.safe_dump({**settings, **flags, **changed}))


@pytest.mark.parametrize("parts", ["qv", "qkv", "k"])
def test_litgpt(llama: Path, tmp_path: Path, parts: str) -> None:
    state, updates = litgpt_state(parts)
    directory = save(state, tmp_path / "lit" / WEIGHTS)
    litgpt_settings(directory, parts)
    assert detect_tool(directory) == "LitGPT"
    assert_computes(directory, llama, updates, "--model", str(llama))
    described = json.loads((tmp_path / "lit-imported" / CONFIG).read_text())
    assert described["lora_dropout"] == 0.05 and described["lora_alpha"] == ALPHA


def test_litgpt_without_what_it_needs(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", str(llama))
    directory = save(litgpt_state("qv")[0], tmp_path / "lit" / WEIGHTS)
    refused(directory, tmp_path, capsys, "whose layout depends on its base; pass --model")
    refused(directory, tmp_path, capsys, "put LitGPT's next to the tensors", *model)
    litgpt_settings(directory, "qkv")
    refused(directory, tmp_path, capsys, "has 8 rows, but q_proj, k_proj, v_proj of rank 4 have 12", *model)
    litgpt_settings(directory, "qv", lora_alpha=None)
    refused(directory, tmp_path, capsys, "lora_alpha = ", *model)
    (directory / WEIGHTS).rename(directory / "lit_model.pth.lora")
    refused(directory, tmp_path, capsys, "is a pickle", *model)


# ---- Megatron ---------------------------------------------------------------------------------------------


def by_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows of linear_qkv: for each group its query heads, then its key and its value head."""
    rows = []
    for group in range(GROUPS):
        share = HEADS // GROUPS * SIZE
        rows += [q[group * share : (group + 1) * share]]
        rows += [part[group * SIZE : (group + 1) * SIZE] for part in (k, v)]
    return torch.cat(rows)


def megatron_state(canonical: bool, prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    draw, state, updates, s = Draw(), {}, {}, ALPHA / RANK

    def add(name: str, A: Tensor, B: Tensor) -> None:
        state[f"{prefix}{name}.linear_in.weight"], state[f"{prefix}{name}.linear_out.weight"] = A, B

    for n in range(2):
        block, own = f"decoder.layers.{n}", f"model.layers.{n}"
        shapes = {"q": Q, "k": K, "v": K, "gate": MLP, "up": MLP}
        B = {part: draw(rows, RANK) for part, rows in shapes.items()}
        A = {part: draw(RANK, HIDDEN) for part in shapes}
        if not canonical:
            A["k"] = A["v"] = A["q"]
            A["up"] = A["gate"]
            add(f"{block}.self_attention.linear_qkv.adapter", A["q"], by_group(B["q"], B["k"], B["v"]))
            add(f"{block}.mlp.linear_fc1.adapter", A["gate"], torch.cat([B["gate"], B["up"]]))
        for part in shapes:
            module = "mlp" if part in ("gate", "up") else "self_attn"
            updates[f"{own}.{module}.{part}_proj"] = s * B[part] @ A[part]
            if canonical:
                where = "mlp.linear_fc1" if module == "mlp" else "self_attention.linear_qkv"
                add(f"{block}.{where}.adapter.adapter_{part}", A[part], B[part])
        for theirs, ours, rows, columns in (
            ("self_attention.linear_proj", "self_attn.o_proj", HIDDEN, Q),
            ("mlp.linear_fc2", "mlp.down_proj", HIDDEN, MLP),
        ):
            a, b = draw(RANK, columns), draw(rows, RANK)
            add(f"{block}.{theirs}.adapter", a, b)
            updates[f"{own}.{ours}"] = s * b @ a
    return state, updates


@pytest.mark.parametrize(("canonical", "prefix"), [(False, "module.module."), (True, "")])
def test_megatron(llama: Path, tmp_path: Path, canonical: bool, prefix: str) -> None:
    state, updates = megatron_state(canonical, prefix)
    directory = save(state, tmp_path / "meg" / "adapter.safetensors", r=RANK, lora_alpha=ALPHA)
    assert detect_tool(directory) == "Megatron"
    assert_computes(directory, llama, updates, "--model", str(llama))


def test_megatron_that_does_not_fit(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A share of a tensor parallel process; an expert's adapter; no settings."""
    model = ("--model", str(llama))
    state, _ = megatron_state(False, "")
    key = "decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight"
    share = save({**state, key: state[key][:64]}, tmp_path / "share" / WEIGHTS, r=RANK, lora_alpha=ALPHA)
    refused(share, tmp_path, capsys, "has 64 rows, but q, k and v of --model have 128", *model)
    expert = "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.adapter.linear_in.weight"
    strange = save({**state, expert: torch.ones(RANK, 4)}, tmp_path / "moe" / WEIGHTS, r=RANK, lora_alpha=ALPHA)
    refused(strange, tmp_path, capsys, f"{expert} is not a LoRA tensor of a block's linear layer", *model)
    refused(save(state, tmp_path / "bare" / WEIGHTS), tmp_path, capsys, 'with "r" and "lora_alpha"', *model)
