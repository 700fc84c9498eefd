"""Text to token ids: many texts in one call, and a long one in pieces.

A fast tokenizer's wrapper costs more than the tokenizer for a short row, and an encoding keeps two hundred bytes
per character of a long text. So texts go to the tokenizer behind the wrapper where that adds nothing, and a long
one in pieces that overlap. Two pieces are joined inside a run of AGREED tokens that both have at the same places:
what stands far enough away from a cut does not depend on it. Without such a run the text is tokenized whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 2**18  # characters; the tokenizer needs 50 MB for them
OVERLAP = 2**13
AGREED = 64  # tokens

Token = tuple[int, int, int]  # id, first character, end


class Texts:
    """Ids of texts without special tokens around them; picklable."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._is_plain: bool | None = None

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; texts may be of any length."""
        found: dict[int, list[int]] = {}
        for number, text in enumerate(texts):
            if len(text) > PIECE + OVERLAP and self._is_backend_enough():
                found[number] = self.ids_in_pieces(text)
        short = [text for number, text in enumerate(texts) if number not in found]
        known = iter(self._short_ids(short) if short else ())
        return [found[number] if number in found else next(known) for number in range(len(texts))]

    def first_ids(self, text: str, limit: int) -> list[int]:
        """The ids of a text, or the first of them, at least `limit` many."""
        if len(text) <= PIECE + OVERLAP or not self._is_backend_enough():
            return self.ids([text])[0]
        return self.ids_in_pieces(text, limit)

    def ids_in_pieces(self, text: str, limit: int | None = None) -> list[int]:
        ids: list[int] = []
        start = 0  # of the piece
        known: list[Token] = []  # tokens of the piece before from `start` on
        while True:
            end = min(len(text), start + PIECE + OVERLAP)
            tokens = self._tokens(text[start:end], start)
            first = 0
            if start:
                places = _agreement(known, tokens)
                if places is None:
                    return self._short_ids([text])[0]
                ids += [token for token, _, _ in known[: places[0]]]
                first = places[1]
            if end == len(text):
                return ids + [token for token, _, _ in tokens[first:]]
            start = end - OVERLAP
            split = next((n for n, token in enumerate(tokens) if token[1] >= start), len(tokens))
            ids += [token for token, _, _ in tokens[first:split]]
            known = tokens[split:]
            if limit is not None and len(ids) >= limit:
                return ids

    def _tokens(self, text: str, start: int) -> list[Token]:
        encoding = self._backend().encode(text, add_special_tokens=False)
        return [
            (token, start + a, start + b) for token, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def _short_ids(self, texts: list[str]) -> list[list[int]]:
        if self._is_backend_enough():
            encodings = self._backend().encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _backend(self) -> Any:
        backend: Any = self.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        if backend.encode_special_tokens:  # left so by a call for plain text
            backend.encode_special_tokens = False
        return backend

    def _is_backend_enough(self) -> bool:
        """Whether the wrapper only calls the tokenizer behind it; a call with the wrapper settles its options."""
        if self._is_plain is None:
            self.tokenizer("a", add_special_tokens=False, verbose=False)
            self._is_plain = _is_plain(self.tokenizer)
        return self._is_plain


def _is_plain(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerBase, TokenizersBackend

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(tokenizer, TokenizersBackend) or backend is None or tokenizer.split_special_tokens:
        return False
    own = type(tokenizer)
    return (
        own.__call__ is PreTrainedTokenizerBase.__call__
        and own._encode_plus is TokenizersBackend._encode_plus
        and backend.truncation is None
        and backend.padding is None
    )


def _agreement(before: list[Token], after: list[Token]) -> tuple[int, int] | None:
    """Places in two lists of tokens from which on the second can take over; None: they agree nowhere for long."""
    places = {token: number for number, token in enumerate(after)}
    run = 0
    for number, token in enumerate(before):
        place = places.get(token)
        follows = place is not None and number and place and after[place - 1] == before[number - 1]
        run = run + 1 if follows else 0
        if run >= AGREED and place is not None:
            return number - AGREED // 2, place - AGREED // 2
    return None
