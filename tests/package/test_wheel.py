"""The source distribution and the wheel: what is in them, and that the installed command runs anywhere.

Both are built without network, the wheel from the unpacked source distribution: what that lacks, the wheel lacks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.metadata import Metadata

import qlora
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOP = (
    "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml",
    "requirements-dev.txt", "requirements.txt", "setup.py", "train.py",
)  # fmt: skip
FOLDERS = ("benchmarks", "configs", "docs", "eval", "examples", "qlora", "tests", "tools")
MADE = {"__pycache__", ".venv", ".peers", ".pytest_cache"}  # by running things
CODE = (".py", ".c", ".h", ".html")
COMMANDS = (
    "train", "generate", "chat", "plan", "merge", "mix", "import", "inspect", "export", "push", "check-data",
    "report", "eval",
)  # fmt: skip
STRANGER = "raise AssertionError('a stranger was imported')\n"


def files_in(folder: Path) -> Iterator[Path]:
    """Its files, none of them made by running things."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not MADE & set(file.parts):
            yield file


def sources() -> dict[str, Path]:
    """Every file of a checkout but those for git and CI, by its path there."""
    listed = [ROOT / name for name in TOP] + [file for name in FOLDERS for file in files_in(ROOT / name)]
    return {file.relative_to(ROOT).as_posix(): file for file in listed}


@dataclass
class Built:
    sdist: Path
    wheel: Path

    def metadata(self) -> Metadata:
        with ZipFile(self.wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            return Metadata.from_email(archive.read(name), validate=True)


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done


def pip(*arguments: object, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", "--no-cache-dir", *arguments, "--no-deps", "--no-index", cwd=cwd)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("built")
    for name, file in sources().items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, checkout / name)
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, out, cwd=checkout)
    (sdist,) = out.iterdir()
    pip("wheel", "--no-build-isolation", "--wheel-dir", out, sdist, cwd=out)
    (wheel,) = out.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files and bin/qlora, beside which this Python finds the requirements."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--target", target, built.wheel, cwd=target)
    return target


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a train.py and an eval/ of its own, a tiny model, and a few rows."""
    directory = tmp_path_factory.mktemp("strangers")
    (directory / "eval").mkdir()
    for name in ("train.py", "eval/__init__.py", "eval/__main__.py"):
        (directory / name).write_text(STRANGER)
    save_tiny_llama(directory / "M", tokenizer=tiny_tokenizer())
    rows = [{"prompt": f"What is {n} and 1?", "completion": str(n + 1)} for n in range(8)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_the_sdist_is_a_checkout(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    expected = set(sources())
    assert {"LICENSE", "CHANGELOG.md", "train.py", "tests/conftest.py", "configs/demo.yaml"} <= expected
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or name.startswith("qlora.egg-info/")}
    assert held - made == expected


def test_the_wheel_holds_all_code_and_no_top_level_train_or_eval(built: Built) -> None:
    with ZipFile(built.wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        tops = {name.partition("/")[0] for name in archive.namelist()}
    code = [name for name in sources() if name.endswith(CODE)]
    expected = {name for name in code if name.startswith("qlora/")}
    expected |= {name.replace("eval/", "qlora/evaluation/", 1) for name in code if name.startswith("eval/")}
    assert held == expected
    for ending in CODE:
        assert any(name.endswith(ending) for name in held), ending
    assert tops == {"qlora", f"qlora-{qlora.__version__}.dist-info"}


def test_the_metadata_is_complete(built: Built) -> None:
    found = built.metadata()
    assert (found.name, str(found.version)) == ("qlora", qlora.__version__)
    assert found.summary and found.description == (ROOT / "README.md").read_text()
    assert found.description_content_type == "text/markdown" and found.keywords
    assert found.license_expression == "Apache-2.0" and found.license_files == ["LICENSE"]
    assert found.author == "the qlora developers" and not found.project_urls and not found.home_page
    minors = {
        n for c in found.classifiers or [] if (n := c.removeprefix("Programming Language :: Python :: 3.")) != c
    }
    assert minors == {"10", "11", "12", "13"} and str(found.requires_python) == ">=3.10"
    with ZipFile(built.wheel) as archive:
        info = f"qlora-{qlora.__version__}.dist-info"
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert archive.read(f"{info}/entry_points.txt").split() == [
            b"[console_scripts]", b"qlora", b"=", b"qlora.cli.main:console",
        ]  # fmt: skip


def test_the_license_is_apache_s() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_changelog_tells_of_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "Unreleased" and qlora.__version__ in headings


def test_help_lists_every_command(installed: Path, strangers: Path) -> None:
    shown = run(installed / "bin" / "qlora", "--help", cwd=strangers, PYTHONPATH=str(installed)).stdout
    assert "usage: qlora COMMAND" in shown
    missing = [command for command in COMMANDS if not re.search(rf"\b{command}\b", shown)]
    assert missing == []


@pytest.mark.parametrize("command", [*COMMANDS, "eval perplexity"])
def test_each_command_has_help(command: str, installed: Path, strangers: Path) -> None:
    words = [*command.split(), "--help"]
    shown = run(installed / "bin" / "qlora", *words, cwd=strangers, PYTHONPATH=str(installed)).stdout
    assert f"usage: qlora {command}" in shown


def test_python_m_qlora_takes_no_stranger(installed: Path, strangers: Path) -> None:
    """Python puts the current directory first on the path."""
    for command in ("train", "eval"):
        words = [sys.executable, "-m", "qlora", command, "--help"]
        assert f"usage: python -m qlora {command}" in run(*words, cwd=strangers, PYTHONPATH=str(installed)).stdout


def test_a_run_from_plan_to_score(installed: Path, strangers: Path) -> None:
    """Kernels, the page of a run and the evaluations come from the wheel."""

    def call(*words: str) -> str:
        done = run(installed / "bin" / "qlora", *words, cwd=strangers, PYTHONPATH=str(installed))
        return done.stdout

    assert "GiB" in call("plan", "--model", "M", "--device", "cpu", "--max-length", "64")
    training = ("--model", "M", "--data", "rows.jsonl", "--rank", "2", "--batch-size", "2", "--max-length", "64")
    call("train", *training, "--max-steps", "2", "--output-dir", "out")
    assert len((strangers / "out" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (strangers / "out" / "report.html").stat().st_size > 10_000
    evaluation = ("--model", "M", "--adapter", "out", "--data", "rows.jsonl", "--max-length", "64")
    call("eval", "perplexity", *evaluation, "--output", "score.json")
    result = json.loads((strangers / "score.json").read_text())
    assert result["task"] == "perplexity" and len(result["rows"]) == 8
