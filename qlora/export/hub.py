"""Upload an adapter, a merged model or a .gguf file to the Hugging Face hub, with its model card.

Only files on UPLOADED leave this machine: no checkpoint, no training data, no setting with a path in it.
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qlora.adapters.peft_files import read_adapter
from qlora.data.tokenizer_files import NAMED_TEMPLATES
from qlora.export.model_card import make_card, public_name
from qlora.system.errors import InputError
from qlora.system.file_names import BASE_SHIFT, CONFIG, WEIGHTS
from qlora.system.redact import redact
from qlora.system.wording import explain

UPLOADED = (
    WEIGHTS,
    CONFIG,
    BASE_SHIFT,
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    NAMED_TEMPLATES,
    "*.gguf",
    "Modelfile",
    "drift.json",
    "loss.png",
)
MODELS = (WEIGHTS, "model.safetensors", "model.safetensors.index.json", "*.gguf")  # one of these must be there


def push_to_hub(
    directory: str | Path,
    repo: str,
    private: bool = False,
    token: str | None = None,
    exact_match: str | Path | None = None,
) -> str:
    """Upload what a run, a merge or an export left in a directory, in one commit.

    A README.md there is uploaded as it stands, secrets taken out; otherwise a model card is made.

    Args:
        repo: "name" or "owner/name"; made if it is not there.
        token: by default $HF_TOKEN, or the one that `hf auth login` saved.
        exact_match: what `python -m eval exact_match --output` wrote, for the card.
    Returns:
        The address of the repository.
    Raises:
        InputError: nothing to upload, no token, a bad name, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    directory = Path(directory)
    files = files_to_upload(directory)
    api = HfApi(token=check_destination(repo, token))
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        card = directory / "README.md"
        text = redact(card.read_text()) if card.is_file() else make_card(directory, exact_match, address.repo_id)
        operations = [CommitOperationAdd("README.md", text.encode())]
        operations += [
            CommitOperationAdd(file.relative_to(directory).as_posix(), _content(file)) for file in files
        ]
        api.create_commit(address.repo_id, operations, commit_message="Upload with qlora")
    except (HFValidationError, HTTPError, ConnectionError) as error:
        raise InputError(
            f"Uploading to {redact(repo):.100} failed ({redact(explain(error))}); check name, token and "
            "connection."
        ) from error
    return str(address)


def check_destination(repo: str, token: str | None = None) -> str:
    """The token to upload to `repo` with; nothing is asked of the hub, so a run can check before it trains.

    Raises:
        InputError: no token, or a name that the hub would not take.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(
            f"{redact(repo)!r:.100} is not a valid repository name ({redact(explain(error))}); give OWNER/NAME."
        ) from error
    token = token or get_token()
    if token is None:
        raise InputError("No Hugging Face token found; run `hf auth login`, or set HF_TOKEN.")
    return token


def files_to_upload(directory: Path) -> list[Path]:
    """Those files of a directory that are on UPLOADED.

    Raises:
        InputError: it holds neither an adapter nor a model, or an adapter that does not read.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; give the output directory of a run, merge or export.")
    found = sorted({file for pattern in UPLOADED for file in directory.glob(pattern) if file.is_file()})
    if not any(fnmatch(file.name, pattern) for file in found for pattern in MODELS):
        raise InputError(f"{directory} holds no adapter or model; give the output directory of a run.")
    if (directory / WEIGHTS).is_file():
        read_adapter(directory)
    return found


def _content(file: Path) -> Any:
    """A path to upload; of adapter_config.json the text, with the base's name instead of its path here."""
    if file.name != CONFIG:
        return file
    description = json.loads(file.read_text())
    description["base_model_name_or_path"] = public_name(str(description.get("base_model_name_or_path") or ""))
    return (redact(json.dumps(description, indent=2, sort_keys=True)) + "\n").encode()
