"""Answer prompts with a base model, with or without an adapter.

Prompts are tokenised by the same function as training data. While decoding, one token at a time, a layer
that dequantizes its whole weight for a single row is tens of times slower than it need be: inside `fast_decoding`
every frozen layer computes from its stored weight by a kernel for few rows (qlora/few_rows.py), or, where there is
none, from a copy laid out for them, and DoRA's scale is computed once; both are dropped after it. The weights that
train are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qlora.device import GIB
from qlora.injection import lora_layers
from qlora.quantize import Linear4bit, Linear16bit, decode_copy, decode_in_place, logical_numel
from qlora.tokenize import encode_prompt, end_of_turn_id

DENSE_COPY_LIMIT = 1 * GIB  # above it copies are repacked 4-bit weights, not dense ones


@contextmanager
def fast_decoding(model: Any) -> Iterator[None]:
    """Give the frozen layers decoding functions, and the adapted ones a fixed scale, for the time of the block."""
    layers = [m for m in model.modules() if isinstance(m, (Linear4bit, Linear16bit))]
    adapted = list(lora_layers(model).values())
    dtype = model.compute_dtype
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


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[list[dict[str, Any]]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    streamer: Any = None,
) -> list[str]:
    """The assistant's next turn in each conversation.

    Args:
        model: from `load_base_model`, adapted or not.
        conversations: messages up to the user's last turn.
        temperature: 0 is greedy; otherwise tokens are drawn from the `top_p` nucleus, seeded by `seed`.
        batch_size: conversations decoded together (padded on the left), of similar length.
        streamer: transformers streamer that prints as tokens come; one conversation only.
    Returns:
        Texts in the order of `conversations`, without special tokens.
    """
    prompts = [encode_prompt(messages, tokenizer) for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    settings = _generation_settings(model, tokenizer, max_new_tokens, temperature, top_p)
    answers = [""] * len(prompts)
    # Random numbers are drawn from a state of their own: a sample between two steps leaves training alone.
    with fast_decoding(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.full((len(rows), longest), settings.pad_token_id, device=device)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(rows):
                ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index], device=device)
                mask[row, longest - len(prompts[index]) :] = 1
            output = model.generate(ids, attention_mask=mask, generation_config=settings, streamer=streamer)
            texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
            for index, text in zip(rows, texts, strict=True):
                answers[index] = text.strip()
    return answers


def _generation_settings(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float) -> Any:
    from transformers import GenerationConfig

    stops = sorted(end_ids(model, tokenizer))
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=stops or None,
        pad_token_id=next(i for i in (tokenizer.pad_token_id, *stops, 0) if i is not None),
        **sampling,
    )


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    stops = model.generation_config.eos_token_id
    stops = [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    return {stop for stop in stops if stop is not None}


def stream_answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Print the answer to one prompt as it is made, and return it; arguments as `generate`."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    conversation = [{"role": "user", "content": prompt}]
    return generate(model, tokenizer, [conversation], max_new_tokens, temperature, top_p, seed, streamer=streamer)[
        0
    ]
