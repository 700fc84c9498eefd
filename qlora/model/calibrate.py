"""Choose the 4-bit codes of a base by what its layers compute on given texts.

The blocks are done one after another. The texts' hidden states enter a block, whose 4-bit layers get new codes in
the order in which it calls them, each for the inputs that come from layers that have their new codes already:

    hidden states -> inputs of q, k, v -> their codes -> input of o -> its codes -> ... -> hidden states -> next

quant/gptq.py chooses the codes from the second moment of the inputs; layers that read the same tensor share it.
Part of the texts is kept out: a layer whose output there is no better than with the nearest codes keeps those.
Bits, memory and speed of the base stay the same, and so does its layout.

The result is kept in the cache under the model's content, the quantization and a digest of the texts and the
method (`QuantConfig.calibration`). Each finished block is a file there, from which an interrupted calibration
continues.

Memory: the hidden states of all texts, one block's activations for `CHUNK_TOKENS`, one moment and its inverse, one
weight in fp32. The base itself is mapped from the cache.

A mixture's experts keep their nearest codes: each sees too few of the texts' tokens.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora.data.batches import collate_packed, pack_examples
from qlora.data.example import Example
from qlora.model.attention import packed_arguments
from qlora.model.block import decoder_layers
from qlora.model.cache import cached_base, open_cache
from qlora.model.cache_writer import write_cache
from qlora.model.hf_config import CALIBRATION
from qlora.model.load import load_base_model
from qlora.model.loss import causal_lm_loss
from qlora.model.resolve import resolve_model
from qlora.model.shards import stored_parts
from qlora.model.skeleton import empty_model
from qlora.model.weights import is_stored_in_4bit, weight_reader
from qlora.quant.gptq import Feedback, choose_codes
from qlora.quant.layers import Linear4bit
from qlora.quant.library import Params4bit
from qlora.quant.storage import unpack_tensors
from qlora.quant.weight import QuantConfig
from qlora.system.digests import damaged_file, is_whole, make_verified, write_digests
from qlora.system.errors import InputError
from qlora.system.files import new_directory, read_json

CODES = "codes.safetensors"  # of a block
METHOD = 1  # part of the identity: raise it when other codes are chosen from the same texts
DAMPING = 0.1  # share of H's mean diagonal: what more of it loses on the texts' kind, it gains on other text
CHUNK_TOKENS = 2048  # that run through a block at once
FEWEST_TOKENS = 2048  # from fewer texts the codes serve nothing else
UNSEEN_SHARE = 8  # every eighth text is kept out


@dataclass(frozen=True)
class Calibration:
    """A calibrated base in the cache.

    Attributes:
        id: digest of texts and method.
        num_tokens: of the texts, without those kept out.
        before, after: loss per token on the texts kept out, with the nearest codes and with the new ones.
        num_layers, num_kept: all 4-bit layers that were tried; those that keep the nearest codes.
    """

    id: str
    num_tokens: int
    before: float
    after: float
    num_layers: int
    num_kept: int

    def __str__(self) -> str:
        kept = f"; {self.num_kept} of {self.num_layers} layers keep the nearest codes" if self.num_kept else ""
        return (
            f"4-bit codes chosen on {self.num_tokens:,} tokens: loss on texts kept out {self.before:.4f} with the "
            f"nearest codes, {self.after:.4f} with these{kept}"
        )


def choose_texts(examples: Iterable[Example], num_tokens: int) -> list[Example]:
    """The first examples with this many tokens in all, and an eighth more to keep out."""
    chosen: list[Example] = []
    wanted = num_tokens + num_tokens // (UNSEEN_SHARE - 1)
    for example in examples:
        if wanted <= 0:
            break
        chosen.append(example)
        wanted -= len(example)
    return chosen


def calibrate_base(
    model: str,
    texts: Sequence[Example],
    quant: QuantConfig | None = None,
    compute_dtype: str = "auto",
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> tuple[QuantConfig, Calibration]:
    """Make a calibrated base in the cache, unless it is there.

    Args:
        model: directory, hub id or .gguf file with the original weights.
        texts: tokenized; every eighth is kept out.
        progress: called with the finished blocks and all blocks.
    Returns:
        (`quant` that names the calibration, for `load_base_model`; what came out).
    Raises:
        InputError: the base is stored in 4 bits, there are too few texts, or the new codes are not better.
    """
    quant = quant or QuantConfig()
    seen, unseen = _split(texts)
    num_tokens = sum(map(len, seen))
    if num_tokens < FEWEST_TOKENS or not any(text.num_targets for text in unseen):
        raise InputError(
            f"There are {num_tokens:,} tokens in {len(texts)} texts to choose 4-bit codes on; give at least "
            f"{FEWEST_TOKENS:,} in {UNSEEN_SHARE} texts or more, the eighth with an answer, or --calibrate off."
        )
    calibration = _identity(seen, unseen)
    named = replace(quant, calibration=calibration)
    target = cached_base(resolve_model(model), named)

    def write(staging: Path) -> None:
        network = load_base_model(model, True, quant, compute_dtype, device)
        before = _mean_loss(network, unseen)
        codes, num_kept = _choose_all(network, model, seen, unseen, parts, progress)
        after = _mean_loss(network, unseen)
        done = Calibration(calibration, num_tokens, before, after, len(codes), num_kept)
        source = open_cache(cached_base(resolve_model(model), quant))
        write_cache(empty_model(model), source, quant, torch.device("cpu"), staging, codes, vars(done))

    parts = target.with_name(f"calibrating-{target.name.removeprefix('base-')}")
    if not is_whole(target):
        if is_stored_in_4bit(model):
            raise InputError(
                f"--model {model} is stored in 4 bits, so its codes cannot be chosen again; pass the original."
            )
        make_verified(target, write)
        shutil.rmtree(parts, ignore_errors=True)
    found = Calibration(**read_json(target / "config.json", f"delete {target}")[CALIBRATION])
    if not found.after < found.before:
        raise InputError(
            f"The 4-bit codes chosen on these {num_tokens:,} tokens are no better than the nearest ones (loss "
            f"{found.after:.4f}, not below {found.before:.4f}); give more texts or --calibrate off."
        )
    return named, found


def _split(texts: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(those that codes are chosen on, those kept out)."""
    kept_out = range(UNSEEN_SHARE - 1, len(texts), UNSEEN_SHARE)
    return [text for place, text in enumerate(texts) if place not in kept_out], [texts[i] for i in kept_out]


def _identity(seen: Sequence[Example], unseen: Sequence[Example]) -> str:
    digest = hashlib.sha256(repr((METHOD, DAMPING, len(seen))).encode())
    for text in (*seen, *unseen):
        for tensor in (text.input_ids, text.targets):
            digest.update(tensor.to(torch.int64).contiguous().numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:16]


# ---- block after block ------------------------------------------------------------------------------------


@dataclass
class _Chunk:
    """Texts that run together.

    Attributes:
        hidden: (1, N, D), the input of the next block.
        calls: the other arguments of each block.
        is_unseen: whether they are kept out.
    """

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    is_unseen: bool

    def run(self, block: Any, number: int) -> Tensor:
        args, kwargs = self.calls[number]
        out = block(self.hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


class _Found(Exception):
    """Ends a block's forward pass when the input of a layer is known."""


@torch.inference_mode()
def _choose_all(
    network: Any,
    model: str,
    seen: Sequence[Example],
    unseen: Sequence[Example],
    parts: Path,
    progress: Callable[[int, int], Any],
) -> tuple[dict[str, Params4bit], int]:
    """Give a network new codes, in place.

    Args:
        model: where the original weights are.
        parts: directory of the finished blocks; those that are there are used.
    Returns:
        (name -> weight, mapped from `parts`; how many layers keep the nearest codes).
    """
    blocks, names = decoder_layers(network), {module: name for name, module in network.named_modules()}
    chunks = [chunk for part in (seen, unseen) for chunk in _chunks(network, blocks, part, part is unseen)]
    read, device = weight_reader(model), chunks[0].hidden.device
    codes: dict[str, Params4bit] = {}
    num_kept = 0
    for number, block in enumerate(blocks):
        part = parts / str(number)
        if damaged_file(part) is not None:
            shutil.rmtree(part, ignore_errors=True)
            _choose_block(block, number, chunks, names, read, part)
        found, kept = _read_part(part, device)
        for name, weight in found.items():
            set_codes(network.get_submodule(name), weight)
        codes |= {f"{name}.weight": weight for name, weight in found.items()}
        num_kept += kept
        for chunk in chunks:
            chunk.hidden = chunk.run(block, number)
        progress(number + 1, len(blocks))
    return codes, num_kept


def _choose_block(
    block: nn.Module,
    number: int,
    chunks: Sequence[_Chunk],
    names: dict[nn.Module, str],
    read: Callable[[str], Tensor],
    part: Path,
) -> None:
    """Choose the codes of a block's layers, into the block and into the directory `part`."""
    tensors: dict[str, Tensor] = {}
    num_kept = 0
    for group in _groups(block, lambda: chunks[0].run(block, number)):
        moment, kept_out = _inputs(group[0], chunks, lambda chunk: chunk.run(block, number))
        feedback = Feedback.of(moment, DAMPING)
        del moment
        for layer in group:
            chosen = choose_codes(
                read(names[layer]).to(kept_out.device), cast(Params4bit, layer.weight), feedback, kept_out
            )
            num_kept += chosen is None
            if chosen is not None:
                set_codes(layer, chosen)
            stored = stored_parts(f"{names[layer]}.weight", layer.weight)
            tensors |= {key: tensor.detach().cpu().contiguous() for key, tensor in stored.items()}
    with new_directory(part) as staging:
        save_file(tensors, staging / CODES, {"num_kept": str(num_kept)})
        write_digests(staging)


def _read_part(part: Path, device: torch.device) -> tuple[dict[str, Params4bit], int]:
    """(layer -> its weight, mapped from the file; how many keep the nearest codes)."""
    stored: dict[str, dict[str, Tensor]] = {}
    with safe_open(part / CODES, "pt") as file:
        num_kept = int(file.metadata()["num_kept"])
        for key in file.keys():  # noqa: SIM118  (no mapping)
            name, _, suffix = key.partition(".weight")
            stored.setdefault(name, {})[suffix] = file.get_tensor(key)
    return {name: unpack_tensors(tensors, device) for name, tensors in stored.items()}, num_kept


def set_codes(layer: Any, weight: Params4bit) -> None:
    """Give a 4-bit layer another weight of the same shape."""
    weight.module = layer
    layer.weight = weight
    layer.quant_state = weight.quant_state


def _chunks(network: Any, blocks: Sequence[Any], texts: Sequence[Example], is_unseen: bool) -> Iterator[_Chunk]:
    """Run only the embeddings, and note how the blocks are called."""
    device = network.get_input_embeddings().weight.device
    for places in pack_examples([len(text) for text in texts], CHUNK_TOKENS):
        batch = collate_packed([texts[i] for i in places]).to(device)
        assert batch.cu_seqlens is not None
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def skip(hidden_states: Tensor, *args: Any, calls: Any = calls, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return hidden_states

        for block in blocks:
            block.forward = skip
        hidden: list[Tensor] = []
        first = blocks[0].register_forward_pre_hook(lambda block, args, to=hidden: to.append(args[0]))
        try:
            network.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                **packed_arguments(batch.cu_seqlens, batch.max_length),
            )
        finally:
            first.remove()
            for block in blocks:
                del block.forward
        yield _Chunk(hidden[0], calls, is_unseen)


def _groups(block: nn.Module, run: Callable[[], Any]) -> list[list[Linear4bit]]:
    """A block's 4-bit layers in the order of their calls; those that read the same tensor together."""
    groups: list[list[Linear4bit]] = []
    last: list[Tensor] = []  # kept, so that no other tensor takes its place

    def watch(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        if last and inputs[0] is last[0]:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        last[:] = [inputs[0]]

    layers = [module for module in block.modules() if isinstance(module, Linear4bit)]
    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return groups


def _inputs(layer: Linear4bit, chunks: Sequence[_Chunk], run: Callable[[_Chunk], Any]) -> tuple[Tensor, Tensor]:
    """((I, I) fp32 second moment of a layer's inputs, (N, I) fp32 inputs on the texts kept out)."""
    device = layer.weight.device
    moment = torch.zeros(layer.in_features, layer.in_features, device=device)
    kept_out: list[Tensor] = []
    count = 0
    for chunk in chunks:
        x = _input_of(layer, lambda chunk=chunk: run(chunk))  # type: ignore[misc]
        if chunk.is_unseen:
            kept_out.append(x)
        else:
            moment.addmm_(x.T, x)
            count += len(x)
    return moment.div_(count), torch.cat(kept_out)


def _input_of(layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """(N, I) fp32 input of a layer, which is called at least once."""
    found: list[Tensor] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].reshape(-1, inputs[0].shape[-1]).float())
        raise _Found

    handle = layer.register_forward_pre_hook(watch)
    try:
        run()
    except _Found:
        pass
    finally:
        handle.remove()
    return found[0]


@torch.inference_mode()
def _mean_loss(network: Any, texts: Sequence[Example]) -> float:
    """Loss per target token."""
    device = network.get_input_embeddings().weight.device
    total = count = 0.0
    for places in pack_examples([len(text) for text in texts], CHUNK_TOKENS):
        loss, num_targets = causal_lm_loss(network, collate_packed([texts[i] for i in places]).to(device))
        total, count = total + float(loss), count + float(num_targets)
    return total / count
