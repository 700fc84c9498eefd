"""log p of continuations of a context, the basis of perplexity, multiple choice and lm-eval's tasks.

A *passage* is the input of one forward pass that answers some queries about next tokens:

    trunk      c_0 .. c_(P-1)              seen by all branches
    branches   b_0 .. , b'_0 .. , ...      each continues the trunk and does not see the other branches
    queries    (position, token, owner)    log p(token | text up to the position), added to the owner's sum

A context with four short continuations is one passage: the trunk is the context, each branch is a continuation
without its last token, and the first token of every continuation is queried at the trunk's end. So a context is
computed once, and if all continuations are single tokens (the letters of MMLU) there are no branches.

Passages without branches are packed (qlora/data/batches.py) with block-diagonal attention. Passages with branches
also share rows, with a mask that says which tokens see each other: (N, N) booleans for a row of N tokens, at most
SHARED_TOKENS unless a passage is longer. With sliding windows each branch gets a copy of its trunk instead.

Tokenization, and truncation of a context that is too long, follow lm-eval (0.4.13, lm_eval/api/model.py and
models/huggingface.py), so that the sums are comparable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora.data.batches import CPU_TOKENS, collate_packed, pack_examples
from qlora.data.example import IGNORE_INDEX, Example
from qlora.model.loss import attention_arguments, output_head, target_log_likelihoods
from qlora.system.errors import InputError, TrainingStopped
from qlora.system.memory import is_out_of_memory

SHARED_TOKENS = 4096  # per row with branches: mask and scores grow with the square

Sums = dict[int, tuple[float, bool]]  # owner -> (log p in nats, whether every token was the most likely)


@dataclass
class Passage:
    """See the module docstring; positions count through the trunk, then through the branches in order."""

    trunk: list[int]
    branches: list[list[int]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.trunk) + sum(map(len, self.branches))

    def ask(self, position: int, token: int, owner: int) -> None:
        """Add a query."""
        self.positions.append(position)
        self.tokens.append(token)
        self.owners.append(owner)


def longest_window(model: Any, max_length: int) -> int:
    """The smaller of `max_length` and the model's context length."""
    limits = [getattr(model.config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx")]
    return min([max_length, *(limit for limit in limits if limit)])


def prefix_token(tokenizer: Any) -> int:
    """The token before a text's first token: BOS, else EOS.

    Raises:
        InputError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise InputError("The tokenizer has neither a BOS nor an EOS token to start a text with; set one.")


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Ids of a text that starts a sequence, after BOS if the tokenizer adds it and the text has none."""
    options = {"add_special_tokens": False} if text.startswith(tokenizer.decode(prefix_token(tokenizer))) else {}
    return tokenizer.encode(text, verbose=False, **options)


def encode_pairs(context: str, continuations: Sequence[str], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Ids of a context and of each continuation, split where the tokens of the context alone end.

    Spaces at the context's end move to the continuation, since tokens usually begin with their space. An empty
    context becomes the prefix token.
    """
    prefix = prefix_token(tokenizer)
    if not context:
        rows = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in continuations]
        return [prefix], [ids[1:] if ids[:1] == [prefix] else ids for ids in rows]
    kept = context.rstrip()
    context_ids = text_ids(kept, tokenizer) if kept else []
    wholes = [text_ids(context + text, tokenizer) for text in continuations]
    return context_ids or [prefix], [whole[len(context_ids) :] for whole in wholes]


def branch_out(context: list[int], continuations: Sequence[list[int]], max_length: int) -> list[Passage]:
    """Passages for log p of each continuation; owners have the numbers of the continuations.

    A context that is too long loses its first tokens, separately for each continuation: the model reads the last
    max_length tokens before the last one.
    """
    by_trunk: dict[tuple[int, ...], list[int]] = {}
    for owner, continuation in enumerate(continuations):
        room = max_length + 1 - len(continuation)
        if not continuation:
            raise InputError("A continuation has no token of its own; give each choice some text.")
        if room < 1:
            raise InputError(
                f"A continuation has {len(continuation)} tokens, more than --max-length {max_length}; raise it."
            )
        by_trunk.setdefault(tuple(context[-room:]), []).append(owner)
    passages = []
    for trunk, owners in by_trunk.items():
        passage = Passage(list(trunk))
        for owner in owners:
            ids = continuations[owner]
            start = len(passage)
            for index, token in enumerate(ids):
                passage.ask(len(trunk) - 1 if index == 0 else start + index - 1, token, owner)
            if len(ids) > 1:
                passage.branches.append(ids[:-1])
        passages.append(passage)
    return passages


def log_likelihoods(
    model: Any,
    requests: Sequence[tuple[list[int], Sequence[list[int]]]],
    max_length: int,
    budget: int,
    is_shown: bool = False,
) -> list[list[tuple[float, bool]]]:
    """For each (context, continuations): log p of every continuation in nats, and whether it is the greedy one.

    Args:
        max_length, budget, is_shown: as for `branch_out` and `score_passages`.
    """
    passages, places = [], []
    for index, (context, continuations) in enumerate(requests):
        for passage in branch_out(context, continuations, max_length):
            passages.append(passage)
            places.append(index)
    merged: list[Sums] = [{} for _ in requests]
    for index, sums in zip(places, score_passages(model, passages, budget, is_shown), strict=True):
        merged[index] |= sums
    return [[sums[owner] for owner in sorted(sums)] for sums in merged]


def rolling_windows(ids: Sequence[int], is_scored: Sequence[bool], max_length: int, stride: int) -> list[Passage]:
    """Split a row t_0 .. t_T into windows that score each of t_1 .. t_T once.

    The first window scores up to `max_length` tokens, each further one the next `stride`, with as many preceding
    tokens as fit: like lm-eval's rolling windows with max_length - stride + 1 tokens of context.

    Args:
        is_scored: (T + 1,) which tokens count; windows without any are dropped.
    Returns:
        passages with a single owner, 0.
    """
    windows, done, last = [], 1, len(ids)
    while done < last:
        end = min(last, done + (max_length if done == 1 else stride))
        start = max(0, end - 1 - max_length)
        passage = Passage(list(ids[start : end - 1]))
        for place in range(done, end):
            if is_scored[place]:
                passage.ask(place - 1 - start, ids[place], 0)
        if passage.tokens:
            windows.append(passage)
        done = end
    return windows


@torch.no_grad()
def score_passages(model: Any, passages: Sequence[Passage], budget: int, is_shown: bool = False) -> list[Sums]:
    """The sums of every passage's owners, computed in rows of about `budget` tokens.

    Args:
        model: from `load_base_model`, with or without an adapter, in eval mode.
        budget: halved until a row fits in memory.
        is_shown: show a progress bar if the terminal supports it.
    Raises:
        TrainingStopped: a single passage does not fit in memory.
    """
    device = next(model.parameters()).device
    if device.type == "cpu":
        budget = min(budget, CPU_TOKENS)
    sources, parts = _separate(passages, getattr(model.config, "sliding_window", None))
    sums: list[Sums] = [{} for _ in passages]
    waiting = _rows(parts, budget)
    with _progress(len(parts), is_shown) as advance:
        while waiting:
            row = waiting.pop()
            try:
                found = _score_row(model, [parts[i] for i in row], device)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(row) == 1:
                    raise TrainingStopped("an item does not fit in memory; lower --max-length") from error
                waiting += [row[::2], row[1::2]]
                continue
            for index, answers in zip(row, found, strict=True):
                _add(sums[sources[index]], answers)
            advance(len(row))
    return sums


def _add(sums: Sums, answers: Sequence[tuple[int, float, bool]]) -> None:
    """Add each token's (owner, log p, is greedy) to its owner's sum."""
    for owner, log_p, is_greedy in answers:
        before = sums.get(owner, (0.0, True))
        sums[owner] = (before[0] + log_p, before[1] and is_greedy)


def _separate(passages: Sequence[Passage], window: int | None) -> tuple[list[int], list[Passage]]:
    """(index of each part's passage, parts); the parts have no branches, or two and more.

    A single branch is joined to its trunk. If a sliding window is shorter than a passage, which our mask would
    ignore, each branch gets a copy of its trunk.
    """
    sources, parts = [], []
    for index, passage in enumerate(passages):
        if len(passage.branches) == 1:
            joined = [passage.trunk + passage.branches[0]]
            pieces = [Passage(joined[0], [], passage.positions, passage.tokens, passage.owners)]
        elif passage.branches and window is not None and len(passage) > window:
            pieces = _unshare(passage)
        else:
            pieces = [passage]
        sources += [index] * len(pieces)
        parts += pieces
    return sources, parts


def _unshare(passage: Passage) -> list[Passage]:
    trunk = Passage(passage.trunk)
    bounds, pieces = len(passage.trunk), [trunk]
    starts = []
    for branch in passage.branches:
        starts.append(bounds)
        bounds += len(branch)
        pieces.append(Passage(passage.trunk + branch))
    for position, token, owner in zip(passage.positions, passage.tokens, passage.owners, strict=True):
        number = sum(start <= position for start in starts)
        shift = starts[number - 1] - len(passage.trunk) if number else 0
        pieces[number].ask(position - shift, token, owner)
    return [piece for piece in pieces if piece.tokens]


def _rows(parts: Sequence[Passage], budget: int) -> list[list[int]]:
    """Indices of parts that share a row; parts with and without branches are not mixed."""
    rows = []
    for has_branches, limit in ((False, budget), (True, min(budget, SHARED_TOKENS))):
        chosen = [i for i, part in enumerate(parts) if bool(part.branches) == has_branches]
        rows += [[chosen[i] for i in bin] for bin in pack_examples([len(parts[i]) for i in chosen], limit)]
    return rows


def _score_row(model: Any, row: Sequence[Passage], device: torch.device) -> list[list[tuple[int, float, bool]]]:
    """(owner, log p, is greedy) of every query of each passage, in one forward pass."""
    examples = []
    for passage in row:
        ids = torch.tensor([token for part in (passage.trunk, *passage.branches) for token in part])
        examples.append(Example(ids, torch.full_like(ids, IGNORE_INDEX)))
    batch = collate_packed(examples)
    assert batch.cu_seqlens is not None
    starts = batch.cu_seqlens.tolist()[:-1]
    places = [
        start + position for start, passage in zip(starts, row, strict=True) for position in passage.positions
    ]
    tokens = torch.tensor([token for passage in row for token in passage.tokens], device=device)
    if any(passage.branches for passage in row):
        batch.position_ids, mask = _tree_mask(row)
        batch = batch.to(device)
        arguments = {"attention_mask": mask.to(device)}
    else:
        batch = batch.to(device)
        arguments = attention_arguments(model, batch)
    hidden = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **arguments
    ).last_hidden_state[0]
    states = hidden[torch.tensor(places, device=device)]
    log_p, is_greedy = target_log_likelihoods(states, output_head(model), tokens)
    found = iter(zip(log_p.tolist(), is_greedy.tolist(), strict=True))
    return [[(owner, *next(found)) for owner in passage.owners] for passage in row]


def _tree_mask(row: Sequence[Passage]) -> tuple[Tensor, Tensor]:
    """Positions (1, N), and a mask (1, 1, N, N): true where a token sees another.

    Each token sees the trunk of its passage and its own branch, up to itself.
    """
    positions: list[int] = []
    passage_of: list[int] = []
    branch_of: list[int] = []
    for number, passage in enumerate(row):
        length = len(passage.trunk)
        for branch, ids in enumerate((passage.trunk, *passage.branches)):
            begin = length if branch else 0
            positions += range(begin, begin + len(ids))
            passage_of += [number] * len(ids)
            branch_of += [branch] * len(ids)
    place, passages, branches = (torch.tensor(x) for x in (positions, passage_of, branch_of))
    same_branch = branches[:, None] == branches[None, :]
    mask = (passages[:, None] == passages[None, :]) & (same_branch | (branches[None, :] == 0))
    return place[None], (mask & (place[:, None] >= place[None, :]))[None, None]


def _progress(total: int, is_shown: bool) -> Any:
    """A context manager that yields a function to call with the number of finished items."""
    if not is_shown or not sys.stderr.isatty():
        return nullcontext(lambda count: None)
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    @contextmanager
    def draw() -> Any:
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=total)
            yield lambda count: progress.update(task, advance=count)

    return draw()
