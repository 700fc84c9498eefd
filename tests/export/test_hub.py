"""Upload and model card: what leaves this machine by huggingface_hub itself, and what the model card tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from qlora.cli import main as command_line
from qlora.cli.exits import run
from qlora.export.hub import push_to_hub
from qlora.export.model_card import is_hub_id, make_card, public_name
from qlora.system.errors import InputError
from tests.loopback_hub import LoopbackHub

SECRET = "hf_" + "A1b2C3d4E5" * 4
REPOSITORY = "someone/orders"


def save_run(directory: Path, base: str = "/home/jane/models/SmolLM2-135M") -> Path:
    """What train.py leaves behind, with things in it that are nobody's business."""
    directory.mkdir(parents=True)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, directory / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": base}))
    settings = {
        "model": {"model": base, "use_4bit": True, "quant_type": "nf4"},
        "lora": {"rank": 2, "alpha": 4.0, "target_modules": "q_proj"},
        "data": {"data": f"/home/jane/{SECRET}/orders.jsonl", "max_length": 512},
        "train": {"learning_rate": 0.001, "batch_size": 8, "grad_accum": 2, "output_dir": "/home/jane/out"},
    }
    (directory / "run.json").write_text(json.dumps(settings))
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 2.0 / (step + 1), "num_tokens": 1000, "target_tokens": 100} for step in range(4)
    ]
    lines[2:2] = [{"step": 2, "eval_loss": 0.75}]
    lines += [{"step": 4, "eval_loss": 0.875}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "loss.png").write_bytes(b"picture")
    for name in ("checkpoints/step-000004/adapter_model.safetensors", "skipped/step-1.jsonl"):
        (directory / name).parent.mkdir(parents=True)
        (directory / name).write_text("private")
    for name in (
        ".lock",
        "bad_rows.jsonl",
        "notes.txt",
        "train.jsonl",
        "optimizer.safetensors",
        ".env",
        "model.bin",
    ):
        (directory / name).write_text("private")
    return directory


def metadata_of(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


# ---- what is uploaded -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"objective": "sft", "beta": None}, []),
        ({"objective": "dpo", "beta": 0.3, "label_smoothing": 0.0, "reference_adapter": "/home/jane/sft"},
         ["objective | dpo", "beta | 0.3", "label_smoothing | 0", "reference | the base with `sft`"]),
        ({"objective": "kto", "beta": None, "desirable_weight": 2.0},
         ["objective | kto", "beta | 0.1", "desirable_weight | 2", "undesirable_weight | 1",
          "reference | the base"]),
        ({"objective": "simpo"}, ["objective | simpo", "beta | 2", "simpo_gamma | 1"]),
    ],
)  # fmt: skip
def test_a_card_names_the_objective(tmp_path: Path, train: dict[str, Any], expected: list[str]) -> None:
    """Its constants with their defaults, and what it was measured against; SFT has none."""
    file = save_run(tmp_path / "out") / "run.json"
    run = json.loads(file.read_text())
    file.write_text(json.dumps(run | {"train": run["train"] | train}))
    rows = make_card(file.parent).partition("## Training")[2].partition("## Results")[0].splitlines()
    shown = ("objective", "beta", "label", "simpo", "desirable", "undesirable", "reference")
    assert [row.strip("| ") for row in rows if row.startswith(tuple(f"| {name}" for name in shown))] == expected


def test_adapter(hub: LoopbackHub, tmp_path: Path) -> None:
    """The adapter, its curve and a card; the base's path is cut down to its name, the files stay as they are."""
    directory = save_run(tmp_path / "out")
    before = (directory / "adapter_config.json").read_bytes()
    assert push_to_hub(directory, REPOSITORY, private=True) == f"{hub.url}/{REPOSITORY}"
    assert [(made["repo"], made["visibility"]) for made in hub.made] == [(REPOSITORY, "private")]
    files = hub.repositories["models", REPOSITORY]
    wanted = {"README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png"}
    assert files.keys() == wanted
    assert files["adapter_model.safetensors"] == (directory / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "SmolLM2-135M"
    assert json.loads(files["adapter_config.json"])["r"] == 2
    for name, content in files.items():
        assert b"jane" not in content and SECRET.encode() not in content and b"private" not in content, name
    assert (directory / "adapter_config.json").read_bytes() == before


def test_merged_model_and_gguf(hub: LoopbackHub, tmp_path: Path) -> None:
    """A model's own files, shards and all; its README.md goes as it stands, without a secret that got in."""
    directory = tmp_path / "merged"
    directory.mkdir()
    kept = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    kept += [
        "chat_template.jinja",
        "drift.json",
        "model.gguf",
        "Modelfile",
        "additional_chat_templates/tool.jinja",
    ]
    (directory / "additional_chat_templates").mkdir()
    for name in [*kept, ".state.json", "model.safetensors.tmp", "training.csv"]:
        (directory / name).write_text("{}")
    (directory / "README.md").write_text(f"# By hand\n\ntoken {SECRET}\n")
    assert push_to_hub(directory, "orders").endswith("/me/orders")
    assert hub.made[0].get("visibility") != "private"
    files = hub.repositories["models", "me/orders"]
    assert files.keys() == {*kept, "README.md"}
    assert files["README.md"] == b"# By hand\n\ntoken [redacted]\n"


def test_command(hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save_run(tmp_path / "out")
    assert run(command_line.main, ["push", str(directory), "--repo", REPOSITORY, "--private"]) == 0
    assert capsys.readouterr().out == f"{hub.url}/{REPOSITORY}\n"
    assert hub.made[0]["visibility"] == "private"
    assert run(command_line.main, ["push", str(directory)]) == 2
    assert "pass --repo owner/name" in capsys.readouterr().err


# ---- what goes wrong --------------------------------------------------------------------------------------


def test_nothing_to_upload(hub: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory; give the output directory"):
        push_to_hub(tmp_path / "absent", REPOSITORY)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no adapter or model"):
        push_to_hub(tmp_path, REPOSITORY)
    directory = save_run(tmp_path / "out")
    (directory / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        push_to_hub(directory, REPOSITORY)
    assert hub.asked == []


def test_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match=r"No Hugging Face token found; run `hf auth login`, or set HF_TOKEN\."):
        push_to_hub(save_run(tmp_path / "out"), REPOSITORY)


def test_the_real_client(tmp_path: Path) -> None:
    """huggingface_hub itself, offline as all tests are."""
    directory = save_run(tmp_path / "out")
    with pytest.raises(InputError, match=r"Uploading to .* failed .*[Oo]ffline.*; check name, token"):
        push_to_hub(directory, REPOSITORY, token=SECRET)
    assert not (directory / "README.md").exists()


def test_a_run_with_a_bad_destination_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """train.py looks at name and token before it reads a model or makes its directory."""
    import train

    arguments = ["--model", "nowhere", "--data", "x.jsonl", "--output-dir", str(tmp_path / "out"), "--push-to-hub"]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match=r"'a//b c' is not a valid repository name \(Repo id must"):
        train.main([*arguments, "a//b c"])
    with pytest.raises(InputError, match="No Hugging Face token found"):
        train.main([*arguments, REPOSITORY])
    assert not (tmp_path / "out").exists()


def test_refusal_of_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    """Its words are passed on, without the token that some servers repeat."""
    token = "hf_" + "z" * 34
    with pytest.raises(InputError, match=r"Uploading to .* failed .*401.*; check name, token") as refused:
        push_to_hub(save_run(tmp_path / "out"), REPOSITORY, token=token)
    assert token not in str(refused.value)


# ---- the card ---------------------------------------------------------------------------------------------


def test_card_of_an_adapter(tmp_path: Path) -> None:
    """Base, data, settings and results, in words and in the hub's metadata, which huggingface_hub reads back."""
    directory = save_run(tmp_path / "out", base="HuggingFaceTB/SmolLM2-135M")
    (tmp_path / "score.json").write_text(json.dumps({"exact_match": 0.97, "correct": 97, "examples": 100}))
    text = make_card(directory, tmp_path / "score.json", REPOSITORY)
    (tmp_path / "README.md").write_text(text)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M" and data.library_name == "peft"
    assert {(r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results} == {
        ("loss", "Training loss of the last step", 0.5),
        ("loss", "Held-out loss, lowest", 0.75),
        ("exact_match", "Exact match of 100 answers", 0.97),
    }
    assert {result.dataset_name for result in data.eval_results} == {"orders.jsonl"}
    for line in (
        "| optimizer steps | 4, each of 16 examples per device |",
        "| tokens | 4,000, of which 400 were learned |",
        "| data | `orders.jsonl` |",
        "| rank | 2 |",
        "| learning_rate | 0.001 |",
        "| Exact match of 100 answers | 0.97 |",
        f'model = PeftModel.from_pretrained(model, "{REPOSITORY}")',
        "python train.py --model HuggingFaceTB/SmolLM2-135M --adapter DIRECTORY",
    ):
        assert line in text
    assert "jane" not in text and SECRET not in text


def test_card_of_a_merged_model(tmp_path: Path) -> None:
    """The drift that the merge wrote down; no base_model where the base was a path."""
    directory = save_run(tmp_path / "merged")
    (directory / "adapter_config.json").unlink()
    (directory / "drift.json").write_text(json.dumps({"mean_kl": 0.00046, "greedy_agreement": 1.0, "texts": "x"}))
    text = make_card(directory, repo="orders")
    metadata = metadata_of(text)
    assert metadata["library_name"] == "transformers" and "merged" in metadata["tags"]
    assert "base_model" not in metadata and "merged into `SmolLM2-135M`" in text
    assert "| mean kl | 0.00046 |" in text and "| greedy agreement | 1 |" in text and "texts" not in text
    assert 'AutoModelForCausalLM.from_pretrained("orders")' in text and "PeftModel" not in text


def test_card_of_bare_files(tmp_path: Path) -> None:
    """Nothing is known but the adapter: nothing is claimed."""
    directory = save_run(tmp_path / "out", base="")
    for name in ("run.json", "metrics.jsonl"):
        (directory / name).unlink()
    text = make_card(directory)
    assert "model-index" not in metadata_of(text) and "## Training" not in text and "## Results" not in text
    assert "an unnamed base" in text


def test_card_keeps_secrets(tmp_path: Path) -> None:
    text = make_card(save_run(tmp_path / "out", base=f"someone/{SECRET}"))
    assert SECRET not in text and "`someone/[redacted]`" in text


def test_names_in_a_card_stay_names(tmp_path: Path) -> None:
    """A name ends neither its quotes, its line nor its cell, and a template in it is text."""
    hostile = 'x`"|{{ 7 * 7 }}\n# Heading\n```\nos.remove("y")'
    directory = save_run(tmp_path / "out", base=hostile)
    settings = json.loads((directory / "run.json").read_text())
    settings["lora"]["target_modules"] = hostile
    (directory / "run.json").write_text(json.dumps(settings))
    text = make_card(directory, repo="someone/" + hostile)
    assert "{{ 7 * 7 }}" in text and "49" not in text
    body = text.split("---\n")[2].splitlines()
    assert len([line for line in body if line.startswith("# ")]) == 1
    assert len([line for line in body if line.startswith("```")]) == 4  # the two blocks of an adapter's card
    (row,) = [line for line in body if line.startswith("| target_modules")]
    assert row.replace("\\|", "").count("|") == 3
    (summary,) = [line for line in body if line.startswith("A LoRA adapter for")]
    assert summary.count("`") == 2
    compile(text.split("\n```python\n")[1].split("\n```\n")[0], "card", "exec")


def test_card_of_damaged_files(tmp_path: Path) -> None:
    directory = save_run(tmp_path / "out")
    (directory / "metrics.jsonl").write_text('{"step": 1, "loss": ')
    with pytest.raises(InputError, match=r"metrics\.jsonl has a line that does not read"):
        make_card(directory)
    (directory / "run.json").write_text("[]")
    with pytest.raises(InputError, match=r"run\.json is not a JSON object"):
        make_card(directory)


def test_names_that_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name, told in (
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("/home/jane/models/x.gguf", "x.gguf"),
        ("~/models/x/", "x"),
        ("../x", "x"),
        ("models/mine", "mine"),  # here it is a directory
        ("a/b/c/train.jsonl", "train.jsonl"),
        (r"C:\Users\jane\train.jsonl", "train.jsonl"),
        ("", ""),
    ):
        assert public_name(name) == told
    assert is_hub_id("a/b") and not is_hub_id("a") and not is_hub_id("a/b/c") and not is_hub_id("a/b\n")


def test_a_title_is_plain_text(tmp_path: Path) -> None:
    """A name that would be a picture, HTML or code."""
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    name = "<img src=x onerror=alert(1)>![a](x)`code`*b*&amp;"
    title = make_card(tmp_path, repo=f"owner/{name}").partition("---\n# ")[2].splitlines()[0]
    assert title == r"&lt;img src=x onerror=alert(1)&gt;!\[a\](x)\`code\`\*b\*&amp;amp;"
