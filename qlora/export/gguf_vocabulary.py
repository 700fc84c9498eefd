"""A Hugging Face tokenizer as the metadata of a .gguf file.

llama.cpp supports two kinds for LLaMA-like models:

    gpt2     byte-level BPE: the merges in order, and the *name* of the regular expression that first splits text
             into words (`tokenizer.ggml.pre`), from a list compiled into llama.cpp
    llama    SentencePiece BPE: a score per token instead of merges; of all adjacent pairs, the one whose joined
             token scores highest is merged. Minus the rank of a token's first merge is such a score.

llama.cpp's own converter finds a splitter's name by hashing the tokens of a test text, which works for published
vocabularies only. Here the splitter in tokenizer.json is compared with llama.cpp's, which works for every
vocabulary. An unknown splitter is an error, since a wrong one would silently give wrong tokens.

Source: llama.cpp, conversion/base.py (get_vocab_base, _set_vocab_sentencepiece) and src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from qlora.data.chat_template import fallback_template
from qlora.data.row_encoder import end_of_turn_ids
from qlora.data.rows import BadRow
from qlora.system.errors import InputError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name -> (how text is split before the bytes, ignore_merges: whether a word that is itself a token is
# never split). "words" is GPT-2's own expression, inside ByteLevel.
PRE_TOKENIZERS: dict[str, tuple[list[Any], bool]] = {
    "gpt-2": (["words"], False),
    "smollm": (["digits", "words"], False),
    "llama-bpe": ([_WORDS + r"\p{N}{1,3}" + _REST], True),
    "smaug-bpe": ([_WORDS + r"\p{N}{1,3}" + _REST], False),
    "qwen2": ([_WORDS + r"\p{N}" + _REST], False),
    "tekken": ([_TEKKEN], True),
}
ADDED_SCORE = -1000.0  # as in llama.cpp's converter; such tokens are matched in the text, not merged


def add_vocabulary(writer: Any, tokenizer: Any, num_rows: int, pre_tokenizer: str | None = None) -> None:
    """Write a fast tokenizer's tokens, special ids and chat template into a GGUFWriter.

    A tokenizer without a chat template gets the fallback that training uses.

    Args:
        num_rows: rows of the embedding; those beyond the tokenizer's tokens are marked unused.
        pre_tokenizer: llama.cpp's name for the splitter, if it is not recognized.
    Raises:
        InputError: llama.cpp has no equivalent tokenizer.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise InputError(
            f"The tokenizer is a {type(tokenizer).__name__} without a tokenizer.json; save the fast one next to "
            "the model."
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    size = max(tokenizer.get_vocab().values()) + 1
    if size > num_rows:
        raise InputError(
            f"The tokenizer has {size:,} tokens but the embedding {num_rows:,} rows; use the model's own."
        )
    merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model.get("merges") or ()]
    tokens, types = _tokens(tokenizer, num_rows)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_has_space_prefix(backend))
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, merges, set(tokenizer.get_added_vocab())))
    elif model["type"] == "BPE":
        name = pre_tokenizer or pre_tokenizer_name(backend)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        raise InputError(f"The tokenizer is a {model['type']} model; only BPE can be written as GGUF.")
    writer.add_token_types(types)
    _add_special_ids(writer, tokenizer)
    writer.add_chat_template(plain_templates(tokenizer))


def plain_templates(tokenizer: Any) -> str | list[dict[str, str]]:
    """The tokenizer's chat template, or all of them by name, for engines with plain Jinja; else the fallback.

    transformers' `{% generation %}` marks the answers and changes no text. Other engines refuse it, so it becomes
    `{% if true %}`, which keeps the whitespace control of both tags.
    """

    def plain(template: str) -> str:
        opened = re.sub(r"({%[-+]?\s*)generation(\s*[-+]?%})", r"\1if true\2", template)
        return re.sub(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})", r"\1endif\2", opened)

    templates = tokenizer.chat_template or fallback_template(tokenizer)
    if isinstance(templates, str):
        return plain(templates)
    return [{"name": name, "template": plain(template)} for name, template in templates.items()]


def _tokens(tokenizer: Any, num_rows: int) -> tuple[list[str], list[int]]:
    """Text and gguf.TokenType for every row of the embedding."""
    from gguf import TokenType

    tokens = [f"[PAD{row}]" for row in range(num_rows)]
    types = [TokenType.UNUSED] * num_rows
    added = tokenizer.added_tokens_decoder
    for token, row in tokenizer.get_vocab().items():
        tokens[row] = token
        if row in added:
            types[row] = TokenType.CONTROL if added[row].special else TokenType.USER_DEFINED
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[row] = TokenType.BYTE
        else:
            types[row] = TokenType.NORMAL
    return tokens, [int(kind) for kind in types]


def _scores(tokens: list[str], merges: list[list[str]], added: set[str]) -> list[float]:
    """Score per token: minus the rank of the first merge that makes it; letters and bytes need no merge."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [ADDED_SCORE if token in added else -float(ranks.get(token, 0)) for token in tokens]


def _has_space_prefix(backend: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text.

    Metaspace adds none before a text that begins with one, nor, with "first", after a special token; llama.cpp
    and SentencePiece do.

    Raises:
        InputError: the tokenizer changes the text in another way.
    """
    normalizers = _flatten(backend.get("normalizer"), "normalizers")
    splitters = _flatten(backend.get("pre_tokenizer"), "pretokenizers")
    prefix = False
    for step in normalizers + splitters:
        if step == {"type": "Prepend", "prepend": "▁"}:
            prefix = True
        elif step["type"] == "Metaspace" and step["replacement"] == "▁":
            prefix = step.get("prepend_scheme", "always") != "never"
        elif step != {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            raise InputError(
                f"The tokenizer has a step {step['type']!r:.60} that llama.cpp's SentencePiece lacks; export "
                "the adapter alone (--adapter-only)."
            )
    return prefix


def pre_tokenizer_name(backend: dict[str, Any]) -> str:
    """llama.cpp's name for the splitter in a byte-level tokenizer.json.

    Raises:
        InputError: none of the known splitters does the same.
    """
    normalizers = [step["type"] for step in _flatten(backend.get("normalizer"), "normalizers")]
    splits: list[Any] = []
    for step in _flatten(backend.get("pre_tokenizer"), "pretokenizers"):
        kind = step["type"]
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            splits += ["words"] if step.get("use_regex", True) else []
        elif kind == "Digits" and step["individual_digits"]:
            splits.append("digits")
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            splits.append(step["pattern"].get("Regex"))
        else:
            splits.append(step)
    signature = (splits, bool(backend["model"].get("ignore_merges")))
    # Qwen's NFC is dropped: llama.cpp does not normalize, and nearly all text is NFC already.
    for name, known in PRE_TOKENIZERS.items():
        if known == signature and normalizers in ([], ["NFC"]):
            return name
    raise InputError(
        f"The tokenizer splits text unlike any known splitter ({', '.join(PRE_TOKENIZERS)}); if llama.cpp "
        "supports it, pass its name with --pre-tokenizer NAME."
    )


def _flatten(step: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer in tokenizer.json, with sequences flattened."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[parts] for inner in _flatten(part, parts)]


def _add_special_ids(writer: Any, tokenizer: Any) -> None:
    """Write special ids by role, whether BOS and EOS are added to plain text, and the trained ends of turns."""
    for role in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{role}_token_id")
        if token is not None:
            getattr(writer, f"add_{role}_token_id")(token)
    ids, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    added_before, added_after = ids[: -len(plain)], ids[len(plain) :]
    writer.add_add_bos_token(bool(added_before) and added_before[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(added_after) and added_after[-1] == tokenizer.eos_token_id)
    others = [token for token in stop_ids(tokenizer) if token != tokenizer.eos_token_id]
    # llama.cpp stops at both: an end of turn, and an end of message, which is a call's.
    for token, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(token)


def stop_ids(tokenizer: Any) -> list[int]:
    """EOS, and the ends of turns that training teaches if the chat template has them."""
    ends = [tokenizer.eos_token_id]
    with suppress(BadRow):
        ends += end_of_turn_ids(tokenizer)
    return [token for token in dict.fromkeys(ends) if token is not None]
