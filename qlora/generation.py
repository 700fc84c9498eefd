"""Answer prompts with a base model, with or without an adapter.

Prompts are tokenized by the same function as training data. Decoding one token at a time is tens of times slower
if a layer dequantizes its whole weight for one row. Inside `fast_decoding` every frozen layer uses its stored
weight through a kernel for few rows (qlora/kernels/gemv.py) or, if there is none, a copy in a suitable layout, and
DoRA's scale is computed once; copies and scales are dropped afterwards. Weights that train are never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from qlora.config.generate import Sampling
from qlora.data.encode import encode_prompt
from qlora.data.row_encoder import end_of_turn_ids
from qlora.lora.adapter import lora_layers
from qlora.model.base import base_info
from qlora.quant.decode import decode_copy, decode_in_place
from qlora.quant.layers import Linear4bit, Linear16bit, logical_numel
from qlora.system.errors import InputError
from qlora.system.memory import GIB

DENSE_COPY_LIMIT = 1 * GIB  # above this, copies are repacked 4-bit weights, not dense ones


@contextmanager
def fast_decoding(model: Any) -> Iterator[None]:
    """Within the `with` block, give frozen layers decoding functions and adapted ones a fixed scale."""
    layers = [m for m in model.modules() if isinstance(m, (Linear4bit, Linear16bit))]
    adapted = list(lora_layers(model).values())
    dtype = base_info(model).compute_dtype
    was_training = model.training
    model.eval()
    try:
        for layer in layers:
            layer.decode = decode_in_place(layer, dtype)
        rest = [layer for layer in layers if layer.decode is None]
        dense = sum(logical_numel(layer.weight) for layer in rest) * dtype.itemsize <= DENSE_COPY_LIMIT
        for layer in rest:
            layer.decode = decode_copy(layer, dtype, dense)
        for lora in adapted:
            scale = lora.output_scale(dtype)
            lora.fixed_scale = None if scale is None else scale.detach()
        yield
    finally:
        for lora in adapted:
            lora.fixed_scale = None
        for layer in layers:
            layer.decode = None
        model.train(was_training)


def generate(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Any],
    sampling: Sampling | None = None,
    batch_size: int = 16,
    streamer: Any = None,
    raw: bool = False,
) -> list[str]:
    """Generate the assistant's next turn in each conversation, or the rest of each text.

    Args:
        model: from `load_base_model`, adapted or not.
        conversations: messages up to the user's last turn, or a prompt's token ids; with `raw`, texts.
        sampling: length of the answers, and how they are drawn; None: greedy.
        batch_size: conversations decoded together (padded on the left), of similar length.
        streamer: transformers streamer that prints as tokens come; one conversation only.
        raw: continue texts as they are, without a chat template.
    Returns:
        Texts in the order of `conversations`, without special tokens; with `raw` what comes after each text, with
        its white space.
    Raises:
        InputError: messages with `raw`, or a text that is empty.
    """
    if raw:
        return _continue_texts(model, tokenizer, conversations, sampling, batch_size, streamer)
    samples = generate_samples(model, tokenizer, conversations, 1, sampling, batch_size, streamer=streamer)
    return [texts[0] for texts in samples]


def _continue_texts(
    model: Any, tokenizer: Any, texts: Sequence[Any], sampling: Sampling | None, batch_size: int, streamer: Any
) -> list[str]:
    """The rest of each text. Decoded together with its prompt: alone, some tokenizers drop the first space."""
    unfit = next((text for text in texts if not isinstance(text, str) or not text), None)
    if unfit is not None:
        raise InputError(f"raw continues texts, but {unfit!r:.60} is none; give texts, or leave out raw.")
    prompts = [encode_prompt([{"role": "document", "content": text}], tokenizer) for text in texts]
    found = continue_ids(model, tokenizer, prompts, 1, sampling, batch_size, streamer=streamer)
    stops = (sampling or Sampling()).stop_texts
    rest = []
    for prompt, (ids,) in zip(prompts, found, strict=True):
        before, whole = tokenizer.batch_decode([prompt, prompt + ids], skip_special_tokens=True)
        rest.append(cut_before(whole[len(before) :], stops))
    return rest


def generate_samples(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[list[Any]],
    num_samples: int,
    sampling: Sampling | None = None,
    batch_size: int = 16,
    numbers: Sequence[int] | None = None,
    streamer: Any = None,
) -> list[list[str]]:
    """Generate several next turns for each conversation, computing each prompt once.

    Args:
        conversations, sampling: as for `generate`.
        batch_size: answers decoded together.
        numbers: index of each conversation, if processes share the work; by default 0, 1, ... Sample s of
            conversation i is seeded by the sampling's seed, i and s, whatever else is in the batch.
        streamer: transformers streamer; one conversation only.
    Returns:
        `num_samples` texts for each conversation.
    """
    prompts = [c if isinstance(c[0], int) else encode_prompt(c, tokenizer) for c in conversations]
    texts = continue_prompts(
        model, tokenizer, prompts, num_samples, sampling, batch_size, numbers=numbers, streamer=streamer
    )
    return [[text.strip() for text in samples] for samples in texts]


def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    num_samples: int = 1,
    sampling: Sampling | None = None,
    batch_size: int = 16,
    numbers: Sequence[int] | None = None,
    streamer: Any = None,
) -> list[list[str]]:
    """Continue each prompt, given as token ids: `num_samples` texts each, with their white space.

    Args:
        sampling: a text ends before the first of its stop texts.
        batch_size, numbers, streamer: as for `generate_samples`.
    """
    stops = (sampling or Sampling()).stop_texts
    found = continue_ids(model, tokenizer, prompts, num_samples, sampling, batch_size, numbers, streamer)
    return [
        [cut_before(text, stops) for text in tokenizer.batch_decode(samples, skip_special_tokens=True)]
        for samples in found
    ]


@torch.inference_mode()
def continue_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    num_samples: int = 1,
    sampling: Sampling | None = None,
    batch_size: int = 16,
    numbers: Sequence[int] | None = None,
    streamer: Any = None,
) -> list[list[list[int]]]:
    """The token ids of `continue_prompts`: padded at the end, and uncut where a stop text ended them."""
    sampling = sampling or Sampling()
    stops = sampling.stop_texts
    numbers = range(len(prompts)) if numbers is None else numbers
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    settings = _generation_settings(model, tokenizer, sampling.max_new_tokens)
    together = max(1, batch_size // num_samples)
    answers: list[list[list[int]]] = [[] for _ in prompts]
    with fast_decoding(model):
        for start in range(0, len(order), together):
            rows = order[start : start + together]
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.full((len(rows), longest), settings.pad_token_id, device=device)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(rows):
                ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index], device=device)
                mask[row, longest - len(prompts[index]) :] = 1
            cache = _compute_prompts(model, ids, mask) if num_samples > 1 else None
            for first in range(0, num_samples, batch_size):
                samples = range(first, min(first + batch_size, num_samples))
                seeds = [(sampling.seed, numbers[i], s) for i in rows for s in samples]
                draw = [SeededDraw(sampling.temperature, sampling.top_p, seeds)]
                output = model.generate(
                    ids.repeat_interleave(len(samples), dim=0),
                    attention_mask=mask.repeat_interleave(len(samples), dim=0),
                    past_key_values=_repeat(cache, len(samples)),
                    generation_config=settings,
                    logits_processor=draw if sampling.temperature > 0 else None,
                    stopping_criteria=[StopTexts(tokenizer, stops, longest)] if stops else None,
                    streamer=streamer,
                )
                for position, ids_after in enumerate(output[:, longest:].tolist()):
                    answers[rows[position // len(samples)]].append(ids_after)
    return answers


def cut_before(text: str, stop_texts: Sequence[str]) -> str:
    """The text up to the first stop text in it."""
    return text[: min([text.find(stop) for stop in stop_texts if stop and stop in text], default=len(text))]


class StopTexts:
    """A stopping criterion: a row ends once a stop text appears after its prompt of `start` tokens."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], start: int) -> None:
        self.tokenizer, self.texts, self.start = tokenizer, [text for text in texts if text], start

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B, T) ids -> (B,) bool."""
        texts = self.tokenizer.batch_decode(ids[:, self.start :], skip_special_tokens=True)
        done = [any(stop in text for stop in self.texts) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=ids.device)


class SeededDraw:
    """A logits processor that makes the largest score a draw from softmax(logits / temperature).

    For E from Exp(1), argmax(log p - log E) is distributed as p. Each row has its own random numbers, so a draw
    depends neither on the other rows nor on the number of processes; torch's global generators are not used.

    Args:
        temperature, top_p: as in `Sampling`.
        seeds: seed material of each row's generator.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[tuple[int, ...]]) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.generators = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, V) logits -> (B, V) fp32."""
        scores = scores.float() / self.temperature
        if self.top_p < 1:
            from transformers import TopPLogitsWarper

            scores = TopPLogitsWarper(self.top_p)(ids, scores)  # type: ignore[arg-type]
        width = scores.shape[-1]
        noise = np.stack([generator.standard_exponential(width, np.float32) for generator in self.generators])
        smallest = torch.finfo(torch.float32).tiny  # the logarithm of 0 would be infinite
        return scores - torch.from_numpy(noise).to(scores.device).clamp_min(smallest).log()


def _compute_prompts(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    """Keys and values of all prompt tokens except the last ones; None if there are no others."""
    if ids.shape[1] == 1:
        return None
    mask = mask[:, :-1]
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return model.base_model(
        ids[:, :-1], attention_mask=mask, position_ids=positions, use_cache=True
    ).past_key_values


def _repeat(cache: Any, count: int) -> Any:
    """Copy the cache with each row repeated `count` times; decoding appends to the copy."""
    if cache is not None:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(count)
    return cache


def _generation_settings(model: Any, tokenizer: Any, max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    stops = sorted(end_ids(model, tokenizer))
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=next(i for i in (tokenizer.pad_token_id, *stops, 0) if i is not None),
    )


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    stops = model.generation_config.eos_token_id
    stops = [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id, *end_of_turn_ids(tokenizer)]
    return {stop for stop in stops if stop is not None}


def stream_answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    sampling: Sampling | None = None,
    raw: bool = False,
) -> str:
    """Print the answer to one prompt as it is generated, and return it.

    Args:
        raw: continue the prompt as plain text, which is printed with it.
    """
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=not raw, skip_special_tokens=True)
    if raw:
        return generate(model, tokenizer, [prompt], sampling, streamer=streamer, raw=True)[0]
    conversation = [{"role": "user", "content": prompt}]
    return generate(model, tokenizer, [conversation], sampling, streamer=streamer)[0]
