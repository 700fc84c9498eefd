"""lm-eval's tasks on our model: equal to lm-eval's own model, on task files and data written here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.__main__ import main
from eval.harness import find_tasks, import_lm_eval, task_scores
from qlora.config.generate import Sampling
from qlora.generation import continue_prompts, cut_before
from qlora.model.load import load_base_model
from qlora.model.tokenizer import load_tokenizer
from qlora.system.errors import InputError
from tests.evaluation.test_choice import write_questions
from tests.lm_eval_models import (
    evaluate_by_lm_eval,
    instances,
    load_lm_eval,
    save_rounded_llama,
    write_choice_task,
)
from tests.processes import launch

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rounded_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files: two of multiple choice, a rolling log-likelihood, a generation."""
    folder = tmp_path_factory.mktemp("tasks")
    solved = write_questions(folder / "train.jsonl", "text", 4, seed=1)
    for kind in ("text", "continued"):
        data = write_questions(folder / f"{kind}.jsonl", kind, 8)
        write_choice_task(folder, kind, data, solved if kind == "text" else data, 2 if kind == "text" else 0)
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "text.jsonl")}}}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
    rolling["metric_list"] = [{"metric": name} for name in ("word_perplexity", "bits_per_byte")]  # type: ignore
    generated = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answerKey}}"}
    generated["generation_kwargs"] = {"until": ["a", "\n"], "max_gen_toks": 12}  # type: ignore[assignment]
    generated["metric_list"] = [{"metric": "exact_match"}]  # type: ignore[assignment]
    for name, task in (("rolling", rolling), ("generated", generated)):
        whole = {"task": f"local_{name}", "test_split": "test", **files, **task}
        (folder / f"local_{name}.yaml").write_text(yaml.safe_dump(whole))
    return folder


NAMES = ["local_text", "local_continued", "local_rolling", "local_generated"]


def run(*flags: object) -> None:
    main(["harness", "--compute-dtype", "float32", *map(str, flags)])


def test_tasks_have_the_results_of_lm_eval_s_own_model(directory: Path, tasks: Path, tmp_path: Path) -> None:
    """All kinds of request, fp32: metrics equal, every response equal or within 1e-3."""
    out = tmp_path / "out.json"
    common = ("--model", directory, "--no-4bit", "--max-length", 512, "--output", out)
    run(*common, "--tasks", ",".join(NAMES), "--include-path", tasks)
    ours = json.loads(out.read_text())
    theirs = evaluate_by_lm_eval(load_lm_eval(directory, 512), NAMES, tasks)
    samples = [sample for task in theirs["samples"] for sample in theirs["samples"][task]]
    assert len(ours["rows"]) == len(samples) == 32
    for row, sample in zip(ours["rows"], samples, strict=True):
        for response, expected in zip(row["responses"], sample["filtered_resps"], strict=True):
            if isinstance(expected, str):
                assert response == expected
            elif isinstance(expected, float):
                assert response == pytest.approx(expected, abs=1e-3)
            else:
                assert response[0] == pytest.approx(expected[0], abs=1e-3) and response[1] == expected[1]
    for name in NAMES:
        for key, value in theirs["results"][name].items():
            if isinstance(value, float) and "stderr" not in key:
                assert ours["results"][name][key] == pytest.approx(value, rel=1e-5), (name, key)
    answers = [r for row in ours["rows"] for r in row["responses"] if isinstance(r, str)]
    assert len(answers) == 8 and max(map(len, answers)) > 2 and not any("a" in text for text in answers)
    scores = {score["name"]: score for score in ours["scores"]}
    assert scores["local_text: acc"]["method"] == "Wilson" and scores["local_text: acc"]["num_samples"] == 8
    assert (
        scores["local_text: acc"]["low"] < scores["local_text: acc"]["value"] < scores["local_text: acc"]["high"]
    )
    assert scores["local_rolling: bits_per_byte"]["low"] is None


def test_a_file_in_4_bits_with_an_adapter(
    directory: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the path of its file, few-shot and limited; the adapter changes what is found."""
    import torch

    from qlora.adapters.peft_files import save_adapter
    from qlora.config.lora import LoRAConfig
    from qlora.lora.adapter import inject_lora
    from qlora.lora.trainable import lora_parameters

    model, config = load_base_model(str(directory), compute_dtype="float32"), LoRAConfig()
    inject_lora(model, config, seed=1)
    torch.manual_seed(2)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter.data, std=0.3)
    save_adapter(model, tmp_path / "adapter", config, str(directory))
    found = []
    flags = ("--model", directory, "--tasks", tasks / "local_text.yaml", "--limit", 3, "--num-fewshot", 1)
    for adapter in ((), ("--adapter", tmp_path / "adapter")):
        run(*flags, *adapter, "--output", tmp_path / "out.json")
        result = json.loads((tmp_path / "out.json").read_text())
        assert result["n_shot"] == {"local_text": 1} and len(result["rows"]) == 3
        assert {"acc": ["acc"], "acc_norm": ["acc_norm"]}.items() <= result["pairing"].items()
        assert [row["id"] for row in result["rows"]] == [f"local_text:{i}" for i in range(3)]
        found.append(result["rows"][0]["responses"][0][0])
    assert abs(found[0] - found[1]) > 0.5
    assert "local_text: acc_norm" in capsys.readouterr().out


def test_from_python_by_its_name(directory: Path, tasks: Path) -> None:
    import eval.lm_eval_model  # noqa: F401  (registers it)

    found: Any = evaluate_by_lm_eval("qlora", ["local_text"], tasks, f"model={directory},compute_dtype=float32")
    assert len(found["samples"]["local_text"]) == 8


def test_stop_texts_end_a_row_by_itself(directory: Path) -> None:
    """As cutting the whole answers afterwards; with fewer steps where all rows are done."""
    model, tokenizer = load_base_model(str(directory), compute_dtype="float32"), load_tokenizer(str(directory))
    prompts = [tokenizer.encode(text) for text in ("the cat", "a hen and the barn", "bread")]
    whole = [texts[0] for texts in continue_prompts(model, tokenizer, prompts, 1, Sampling(16))]
    stop = whole[1][3]
    cut = [
        texts[0] for texts in continue_prompts(model, tokenizer, prompts, 1, Sampling(16, stop_texts=[stop, ""]))
    ]
    assert cut == [cut_before(text, [stop]) for text in whole] and cut[1] == whole[1][: whole[1].index(stop)]
    assert cut_before("abcb", ["c", "b"]) == "a" and cut_before("abc", []) == "abc"


@pytest.mark.slow
def test_two_processes_equal_one(directory: Path, tasks: Path, tmp_path: Path) -> None:
    flags = ["harness", "--model", str(directory), "--compute-dtype", "float32", "--tasks"]
    flags += [str(tasks / f"local_{kind}.yaml") + "," + str(tasks / "local_generated.yaml") for kind in ("text",)]
    main([*flags, "--output", str(tmp_path / "one.json")])
    result = launch(2, "-m", "eval", *flags, "--output", str(tmp_path / "two.json"))
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert len(one["rows"]) == 16 and [row["id"] for row in one["rows"]] == [row["id"] for row in two["rows"]]
    assert one["scores"] == two["scores"]


def test_wrong_input(directory: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, message in (
        (("--model", directory), "--tasks is required"),
        (("--model", directory, "--tasks", "x", "--data", "d"), "leave out --data"),
        (("--model", directory, "--tasks", ","), "--tasks is empty"),
        (("--model", directory, "--tasks", "no/file.yaml"), "lm-eval has no task no/file.yaml"),
        (
            ("--model", directory, "--tasks", "a.yaml", "--include-path", "no"),
            "--include-path no is not a directory",
        ),
    ):
        with pytest.raises(InputError, match=message):
            run(*flags)
    broken = tasks.parent / "broken.yaml"
    broken.write_text("task: broken\noutput_type: multiple_choice\n")
    with pytest.raises(InputError, match=r"lm-eval cannot run .*broken.yaml"):
        run("--model", directory, "--tasks", broken)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match='pip install "lm-eval'):
        import_lm_eval()


def test_unknown_names_are_listed(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import tasks as module

    manager = module.TaskManager
    monkeypatch.setattr(module, "TaskManager", lambda **k: manager(**{**k, "include_defaults": False}))
    assert find_tasks(["local_text"], str(tasks))[1] == ["local_text"]
    with pytest.raises(InputError, match="lm-eval has no task nothing, local_txt; see"):
        find_tasks(["local_text", "nothing", "local_txt"], str(tasks))


def test_a_figure_that_is_no_mean_has_no_interval() -> None:
    samples = [
        {"filter": "none", "acc": hit, "length": length} for hit, length in ((1.0, 3.0), (0.0, 5.0), (1.0, 4.5))
    ]
    results = {"acc,none": 2 / 3, "acc_stderr,none": 0.1, "length,none": 12.5 / 3, "ppl,none": 9.0, "alias": "t"}
    scores = {score.name: score for score in task_scores({"results": {"t": results}, "samples": {"t": samples}})}
    assert set(scores) == {"t: acc", "t: length", "t: ppl"}
    assert scores["t: acc"].method == "Wilson" and scores["t: length"].method == "bootstrap"
    assert (scores["t: ppl"].value, scores["t: ppl"].low, scores["t: ppl"].method) == (9.0, None, "none")


def test_requests_come_back_in_their_order(directory: Path) -> None:
    """Contexts that repeat, far from each other, and an empty one."""
    from eval.lm_eval_model import TaskModel

    pairs = [("the cat", " ate"), ("a hen", " and"), ("the cat", " in the barn"), ("", "bread"), ("a hen", "x")]
    model = TaskModel(str(directory), use_4bit=False, compute_dtype="float32", max_length=64)
    ours = model.loglikelihood(instances("loglikelihood", *pairs))
    theirs = load_lm_eval(directory, 64).loglikelihood(instances("loglikelihood", *pairs))
    assert [o[0] for o in ours] == pytest.approx([t[0] for t in theirs], abs=1e-3)
    assert [o[1] for o in ours] == [t[1] for t in theirs]
