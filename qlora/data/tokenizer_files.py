"""The tokenizer saved with an adapter: added tokens, and its files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora.system.errors import InputError

# The tokenizer files that transformers may write.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
NAMED_TEMPLATES = "additional_chat_templates/*.jinja"  # of a tokenizer with several, such as one for tools


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add tokens to a tokenizer, in place.

    They are ordinary tokens: text in the data that spells one becomes that token, and answers show it. Special
    tokens are control tokens, which are hidden in messages (data/row_encoder.py) and left out of answers.

    Raises:
        InputError: a token is given twice or already in the tokenizer; nothing is added then.
    """
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    twice = [token for token in tokens if tokens.count(token) > 1]
    if twice:
        raise InputError(f"new_tokens names {twice[0]!r:.60} twice; name each token once.")
    present = [token for token in tokens if token in vocabulary]
    if present:
        raise InputError(
            f"new_tokens names {', '.join(present)!r:.200}, which the tokenizer already has; remove it."
        )
    # normalized=False: match the token as spelled, before the tokenizer lowercases or marks anything.
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])


def token_ids_of(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Ids of tokens that `add_tokens` added.

    Raises:
        InputError: no tokenizer, or one without these tokens.
    """
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    absent = [token for token in tokens if token not in vocabulary]
    if absent:
        raise InputError(
            f"new_tokens names {absent[0]!r:.60}, which the tokenizer lacks; call add_tokens(tokenizer, tokens) "
            "and pass that tokenizer."
        )
    return [vocabulary[token] for token in tokens]


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The tokenizer's files by name, as saved by transformers."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return read_tokenizer_files(Path(directory))


def read_tokenizer_files(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files in a directory, by path within it; empty if there is no tokenizer."""
    if not (directory / "tokenizer_config.json").is_file():
        return {}
    files = [*(directory / name for name in TOKENIZER_FILES), *sorted(directory.glob(NAMED_TEMPLATES))]
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files if file.is_file()}
