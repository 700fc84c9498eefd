"""--offload-activations: the same bits, elsewhere."""

from __future__ import annotations

import errno
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.cli.exits import run as run_command
from qlora.config.devices import DevicesConfig
from qlora.config.loop import LoopConfig
from qlora.config.run import RunConfig
from qlora.planning.planner import Planner
from qlora.system.errors import InputError
from qlora.training import offload
from qlora.training.offload import FileStore
from qlora.training.run import TrainingRun
from tests.training.test_outcome import job  # noqa: F401
from tests.training.test_run import config_of

LLAMA_8B = "configs/shapes/llama-3.1-8b"


def fit(job: list[str], out: Path, *flags: str) -> TrainingRun:  # noqa: F811
    settings = "--max-steps 3 --save-every 2 --gradient-checkpointing on".split()
    with TrainingRun.from_config(config_of(job, out, *settings, *flags)) as run:
        return run.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_come_back(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, as the system may move them; a part that nothing refers to is used again."""
    store = FileStore(tmp_path)
    for name in ("pwritev", "preadv"):
        plain = getattr(os, name)
        monkeypatch.setattr(os, name, lambda f, views, at, plain=plain: plain(f, [views[0][:1000]], at))
    tensors = [torch.randn(7, 311).to(dtype) for _ in range(3)]
    kept = [store.put(x) for x in tensors]
    assert [part.offset for part in kept] == [0, tensors[0].nbytes, 2 * tensors[0].nbytes]
    assert all(torch.equal(store.get(part), x) for part, x in zip(kept, tensors, strict=True))
    assert store.get(kept[1]).dtype == dtype and not list(tmp_path.iterdir())  # a file without a name
    del kept[1]
    gc.collect()
    again = store.put(tensors[0].T.contiguous().T)
    assert again.offset == tensors[0].nbytes and torch.equal(store.get(again), tensors[0])


def test_a_run_is_the_same_to_the_last_byte(
    job: list[str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)
    fit(job, tmp_path / "plain")
    counts = {"put": 0, "get": 0}
    for name in counts:
        plain = getattr(FileStore, name)

        def counted(self: Any, x: Any, name: str = name, plain: Any = plain) -> Any:
            counts[name] += 1
            return plain(self, x)

        monkeypatch.setattr(FileStore, name, counted)
    run = fit(job, tmp_path / "offloaded", "--offload-activations")
    layers = run.model.config.num_hidden_layers
    assert counts["put"] == counts["get"] >= 3 * layers
    weights = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("plain", "offloaded")]
    assert weights[0] == weights[1]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        for out in ("plain", "offloaded")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_no_room_is_one_sentence(
    job: list[str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(offload, "SMALLEST", 1)
    monkeypatch.setattr(os, "pwritev", full)
    assert run_command(lambda argv: fit(job, tmp_path / "out", "--offload-activations"), []) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--offload-activations cannot write" in said and "No space left on device. Free some space" in said
    assert "Traceback" not in said


def test_nothing_recomputed_is_refused_or_said(
    job: list[str],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(InputError, match="--gradient-checkpointing off recomputes none"):
        RunConfig(loop=LoopConfig(gradient_checkpointing="off", offload_activations=True)).loop.check()
    with TrainingRun.from_config(
        config_of(job, tmp_path / "out", "--max-steps", "1", "--offload-activations")
    ) as run:
        run.train()
    assert "--offload-activations has nothing to do" in " ".join(capsys.readouterr().out.split())


def test_a_long_sequence_of_llama_8b_fits_24_gib() -> None:
    """Rank 32 on all layers: what is kept without offloading is one hidden state a layer, with it two in all."""

    def longest(**settings: Any) -> int:
        planner = Planner(LLAMA_8B, "cuda", 24 * 2**30)
        config = RunConfig(loop=LoopConfig(batch_size=1, gradient_checkpointing="on", **settings))
        config.lora.target_modules, config.lora.rank = "all-linear", 32
        fitting = 0
        for tokens in range(8000, 240_000, 8000):
            config.data.max_length = tokens
            fitting = tokens if planner.fits(planner.plan(config)) else fitting
        return fitting

    kept, offloaded = longest(), longest(offload_activations=True)
    assert 40_000 <= kept < 78_000 < offloaded
    config = RunConfig(loop=LoopConfig(batch_size=1))
    config.data.max_length = 78_000
    alone, _ = Planner(LLAMA_8B, "cuda", 24 * 2**30).remedies(config)
    assert "--gradient-checkpointing on --offload-activations" in [remedy.flags for remedy in alone]


def test_the_plan_counts_bytes_and_time() -> None:
    config = RunConfig(loop=LoopConfig(batch_size=1, gradient_checkpointing="on", offload_activations=True))
    config.data.max_length = 10_000
    plan = Planner(LLAMA_8B, "cuda", 24 * 2**30).plan(config, DevicesConfig(flops=100e12))
    assert plan.offloaded == 32 * 10_000 * 4096 * 2
    (traffic,) = plan.traffic
    assert (traffic.kind, traffic.inside, traffic.calls) == ("offloaded", 2 * plan.offloaded, 64)
    assert traffic.seconds(25e9, 25e9) == 2 * plan.offloaded / 25e9
