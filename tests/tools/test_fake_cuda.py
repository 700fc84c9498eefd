"""A step on fake CUDA tensors; before, it waited for the device 33 times where it now waits twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.fake_cuda import Case, count_launches, passages, problems, write_config
from tools.fake_device import CUDA, fake_cuda

CASES = (
    Case("llama"),
    Case("mixture", packing=False, recompute=True, optim="paged_adamw_8bit"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_on_cuda_breaks_no_rule(case: Case, tmp_path: Path) -> None:
    found = {name: seen for name, seen in passages(case, str(write_config(tmp_path, case.model)))}
    assert list(found) == ["start", "step", "evaluation", "merge", "decoding"]
    assert sum(found["step"].launches.values()) > 100  # it ran
    assert [problem for name, seen in found.items() for problem in problems(case, name, seen)] == []


def test_the_fused_step_launches_fewer_kernels_than_the_composed_one(tmp_path: Path) -> None:
    directory, case = str(write_config(tmp_path, "llama")), Case("llama")
    assert 0 < count_launches(directory, case, composed=False) < count_launches(directory, case, composed=True)


def test_the_watch_sees_what_it_is_for() -> None:
    """Each thing that a rule forbids, done on purpose."""
    with fake_cuda(weight_size=64) as watch:
        x = torch.ones(8, 8, dtype=torch.bfloat16, device=CUDA)
        x.sum().item()
        x.nonzero()
        x[x > 0]
        x[0].tolist()
        x.cpu()
        torch.cuda.synchronize()
        assert sum(watch.seen.syncs.values()) == 6
        x.float()
        assert sum(watch.seen.upcasts.values()) == 1
        before = watch.live
        torch.ones(3) * 2
        assert sum(watch.seen.on_cpu.values()) == 2
        y = torch.empty(1024, dtype=torch.bfloat16, device=CUDA)
        assert watch.live == before + 2048 and y.is_cuda
        del y
        assert watch.live == before
