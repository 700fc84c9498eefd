"""log p of continuations of a context: what perplexity, multiple choice and lm-eval's tasks are computed from.

A *passage* is what one forward pass must read to answer some questions about next tokens:

    trunk      c_0 .. c_(P-1)              read by all
    branches   b_0 .. , b'_0 .. , ...      each continues the trunk, blind to the other branches
    queries    (position, token, owner)    log p(token | what stands up to the position), added to the owner's sum

A context with four continuations of a few tokens is one passage: the trunk holds the context, each branch the
continuation but its last token, and the first token of every continuation is asked at the trunk's end. So a
context is computed once, and where all continuations are single tokens (the letters of MMLU) nothing else is.

Passages without branches are packed by qlora/packing.py and its block-diagonal attention. With branches, several
passages share a row too, and a mask says who sees whom: (N, N) booleans for a row of N tokens, SHARED_TOKENS where
no passage is longer. A model with sliding windows gets each branch with a copy of its trunk instead.

How text becomes tokens, and where a context too long for the model is cut, is lm-eval's way (0.4.13,
lm_eval/api/model.py and models/huggingface.py), so that the sums are comparable with its own.
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

SHARED_TOKENS = 4096  # of a row with branches: its mask and scores grow with the square

Sums = dict[int, tuple[float, bool]]  # of each owner: log p in nats, and whether every token was the likeliest


@dataclass
class Passage:
    """See the module docstring; positions count through the trunk and then the branches, laid end to end."""

    trunk: list[int]
    branches: list[list[int]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.trunk) + sum(map(len, self.branches))

    def ask(self, position: int, token: int, owner: int) -> None:
        """One query more."""
        self.positions.append(position)
        self.tokens.append(token)
        self.owners.append(owner)


def longest_window(model: Any, max_length: int) -> int:
    """`max_length`, or as many tokens as the model was made for where that is fewer."""
    limits = [getattr(model.config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx")]
    return min([max_length, *(limit for limit in limits if limit)])


def prefix_token(tokenizer: Any) -> int:
    """What a text's first token is conditioned on: BOS, else EOS.

    Raises:
        InputError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise InputError(
        "The tokenizer has neither a BOS nor an EOS token for a text's first token to follow; set one."
    )


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Ids of a text that begins a sequence, after a BOS where the tokenizer puts one and the text has none."""
    options = {"add_special_tokens": False} if text.startswith(tokenizer.decode(prefix_token(tokenizer))) else {}
    return tokenizer.encode(text, verbose=False, **options)


def encode_pairs(context: str, continuations: Sequence[str], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Ids of a context, and of each text that continues it, cut where the context's own tokens end.

    Spaces at the context's end go over to the continuation: a token mostly begins with its space. An empty context
    is the prefix token.
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
    """Passages that give log p of each continuation; owners are numbered as the continuations.

    A context that leaves too little room loses its first tokens, for each continuation by itself: the model reads
    the last max_length tokens before the last one.
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
    """Of each (context, continuations): for every continuation, log p in nats and whether it is the greedy one.

    Args:
        max_length, budget, is_shown: as `branch_out` and `score_passages`.
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
    """A whole row t_0 .. t_T as windows, whose scored tokens are disjoint and together all of t_1 .. t_T.

    The first window scores up to `max_length` tokens, each further one the next `stride`, after as much of what
    precedes them as fits: as lm-eval's rolling windows with max_length - stride + 1 tokens of context.

    Args:
        is_scored: (T + 1,) which tokens count; windows without one are left out.
    Returns:
        passages with the one owner 0.
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
        model: from `load_base_model`, adapted or not, in eval mode.
        budget: halved for as long as a row does not fit in memory.
        is_shown: draw a progress bar, if the terminal can.
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
    """Add (owner, log p, is greedy) of single tokens to their owners' sums."""
    for owner, log_p, is_greedy in answers:
        before = sums.get(owner, (0.0, True))
        sums[owner] = (before[0] + log_p, before[1] and is_greedy)


def _separate(passages: Sequence[Passage], window: int | None) -> tuple[list[int], list[Passage]]:
    """(index of the passage each part comes from, parts): passages without branches, or with two and more.

    A single branch just continues its trunk. Where a sliding window is shorter than a passage, our mask would hide
    it, and each branch takes its trunk along.
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
    """Indices of parts that share a row; those with branches stay among themselves."""
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
    """Positions (1, N), and (1, 1, N, N) booleans: true where a token sees another.

    Each token sees the trunk of its own passage and its own branch, up to itself.
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
    """A context manager that gives a function to call with the number of finished items."""
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
