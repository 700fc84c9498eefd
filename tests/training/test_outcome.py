"""Success that is none: what a run that learned nothing says, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qlora.cli.exits import run as exit_code
from qlora.model.load import load_base_model
from qlora.model.weights import dequantized_weights
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.training.loop import Trainer
from qlora.training.observer import Observer
from qlora.training.outcome import doubts
from qlora.training.run import TrainingRun
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer
from tests.training.test_run import config_of


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("outcome")
    model, data = save_tiny_llama(folder / "model", tokenizer=tiny_tokenizer()), folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) + "\n" for n in range(6)))
    text = f"--model {model} --data {data} --compute-dtype float32 --batch-size 2 --rank 2 --num-samples 0"
    return text.split()


class Spoil(Observer):
    """Makes every loss infinite: a row of the embedding that each prompt holds."""

    def before_step(self, trainer: Trainer) -> None:
        trainer.model.get_input_embeddings().weight.data.fill_(float("inf"))  # type: ignore[operator]


def test_a_run_that_made_no_step_fails(job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ended with exit code 0 and "adapter in out"."""
    config = config_of(job, tmp_path / "out", "--max-steps", "2", "--max-skipped", "3")

    def main(argv: object) -> None:
        with TrainingRun.from_config(config, observers=[Spoil()]) as run:
            run.train()

    assert exit_code(main, []) == 3
    out, err = capsys.readouterr()
    assert "All 2 steps were skipped" in err and "Adapter saved" not in out
    assert len(list((tmp_path / "out" / "skipped").iterdir())) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("use_4bit", [True, False])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, bad: float, use_4bit: bool) -> None:
    model = save_tiny_llama(tmp_path / "model")
    tensors, name = load_file(model / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = bad
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} has 1 of 10240 values that are not finite"):
        load_base_model(str(model), use_4bit, compute_dtype="float32")
    with pytest.raises(InputError, match=rf"{name} has 1 of"):
        list(dequantized_weights(str(model), QuantConfig()))


def test_large_weights_are_finite(tmp_path: Path) -> None:
    """Their sum is not, in fp32."""
    model = save_tiny_llama(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    load_base_model(str(model), compute_dtype="float32", cache=False)


def test_doubts() -> None:
    falling = [3.0 - 0.1 * step for step in range(20)]
    assert doubts(falling, [5, 1], 300, warmup=10) == []
    (said,) = doubts(falling[:9], [5], 300, warmup=10)
    assert "9 of 10 steps" in said and "--warmup-steps" in said
    (said,) = doubts(falling[::-1], [5], 300, warmup=0)
    assert "did not fall (1.150 at the start, 2.950 at the end)" in said
    (said,) = doubts([5.0] * 5 + [5.8] * 5, [5], 300, warmup=0)
    assert "no better than guessing among 300 tokens (5.70)" in said
    (said,) = doubts(falling, [1, 1, 0], 300, warmup=0)
    assert "answers in the data empty" in said
    assert doubts([], [], 300, warmup=10) == []


def test_a_run_says_its_doubts(job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(job, tmp_path / "out", "--max-steps", "2", "--resume", "auto", "--warmup-steps", "10")
    with TrainingRun.from_config(config) as run:
        run.train()
    said = " ".join(capsys.readouterr().out.split())
    assert "ended within its warm-up (2 of 10 steps)" in said and "Adapter saved" in said
    assert f"--resume auto: {tmp_path / 'out'} has no checkpoint" in said


def test_a_short_run_warms_up_shortly(job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of 20 steps warmed up for 10 of them. A longer plan does not change the warm-up of a resumed run."""
    out = tmp_path / "out"
    for steps, resume in (("20", []), ("200", ["--resume", "auto"])):
        config = config_of(job, out, "--max-steps", steps, "--learning-rate", "1", *resume)
        with TrainingRun.from_config(config) as run:
            if not resume:
                run.train()
            else:
                for stage in (run.read_data, run.load_base, run.add_adapter):
                    stage()
        assert run.settings["warmup_steps"] == run.config.optimizer.warmup_steps == 2
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and rates[3] < 1
    assert json.loads((out / "run.json").read_text())["train"]["warmup_steps"] == 2
    assert config.optimizer.warmup_steps is None and "within its warm-up" not in capsys.readouterr().out
