"""Merge adapters into their base and save an ordinary Hugging Face model, one tensor at a time.

    W_merged = bf16( W_hat + w (alpha / rank) B A )        added in fp32; several adapters add up, each by its w

W_hat is by default the *dequantized* base, the weights the adapter was trained against; `original` takes the
weights as they were before quantization, for which the adapter was not trained. Either way the saved model
differs from base + adapter a little (bf16 rounding at least), so the drift is measured and written down.

`save_4bit` goes back into 4 bits. Quantizing the merged weights anew is no way there: W_hat lies on the 4-bit
grid, and an update below half a step of it is rounded away. qlora/quant/gptq.py chooses the codes instead.

What is finished lies in a directory beside the output, named after a fingerprint of everything that goes into
it: a merge that was killed goes on there, and the output appears whole or not at all.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from qlora.adapters.load import check_adapter, with_base_shift
from qlora.config.merge import MergeOptions
from qlora.data.chat_template import fallback_template
from qlora.data.encode import encode_prompt
from qlora.data.tokenizer_files import read_tokenizer_files
from qlora.export.drift import Drift, DriftTexts, load_drift_texts, load_texts, measure_drift
from qlora.export.merged_weights import GB, DenseWriter, PackedWriter, write_merged_shards
from qlora.export.mixture import Mixture, read_mixture, untied_head
from qlora.export.model_card import make_merged_card
from qlora.export.staging import merge_fingerprint, staging_directory
from qlora.export.texts import CALIBRATION_TEXTS
from qlora.lora.full_parameters import vocabulary_names
from qlora.model.hf_config import load_config, metadata_directory
from qlora.model.load import load_base_model
from qlora.model.skeleton import empty_model
from qlora.model.tokenizer import load_tokenizer
from qlora.quant.layers import FrozenMatrix
from qlora.system.errors import CheckFailed, InputError

CALIBRATION_LENGTH, CALIBRATION_TOKENS = 512, 8192  # of one text of a calibration file, and of all


def merge_adapter(
    model: str,
    adapter: str | Sequence[str],
    output_dir: str,
    options: MergeOptions | None = None,
    say: Callable[[str], Any] = print,
) -> Drift | None:
    """Write base + adapter as a model directory that transformers loads by itself.

    Memory while writing stays near one tensor in fp32 (with `save_4bit` beside the 4-bit base and 1 GiB);
    measuring the drift loads each model once, in turn.

    Args:
        model: the base: directory, hub id or .gguf.
        adapter: directory, or several; how the base was quantized is read from their weights files.
        output_dir: must not exist; appears whole or not at all.
        options: what is merged onto what, what is written, and how it is checked.
        say: hears that a merge goes on where it was stopped.
    Returns:
        The drift, unless `options.drift` is off.
    Raises:
        InputError: an adapter that does not fit, or an output directory that exists.
        CheckFailed: the drift is larger than `options.max_drift`; nothing is left of the merge.
    """
    o, target = options or MergeOptions(), Path(output_dir)
    if target.exists():
        raise InputError(f"--output-dir {target} exists already; remove it or choose another.")
    mixture = read_mixture([adapter] if isinstance(adapter, str) else adapter, o.weights or None)
    quant = mixture.quantization
    if o.save_4bit and (o.base == "original" or quant is None):
        why = "--base original is asked for" if quant is not None else "The adapter was trained on a 16-bit base"
        raise InputError(f"{why}, so there is no 4-bit base to go back into; leave out --save-4bit.")
    if not o.max_shard_gb > 0:
        raise InputError(f"max_shard_gb is {o.max_shard_gb}; give --max-shard-gb a number above 0.")
    if o.max_drift is not None and not (o.drift and 0 <= o.max_drift < math.inf):
        raise InputError(
            f"max_drift is {o.max_drift}; give --max-drift a number of 0 or more, without --no-drift."
        )
    network = empty_model(model)
    if o.save_4bit and any(isinstance(module, FrozenMatrix) for module in network.modules()):
        raise InputError("transformers reads no mixture of experts in 4 bits; leave out --save-4bit.")
    for saved in mixture.adapters:
        check_adapter(saved, network)
    mixture = replace(
        mixture,
        adapters=[with_base_shift(saved, network, model) for saved in mixture.adapters],
        untied=untied_head(mixture, network),
    )
    mixture.check(as_one=o.drift or o.save_4bit)
    tokenizer, context = load_tokenizer(model), network.config.max_position_embeddings
    drift_texts = load_drift_texts(tokenizer, o.drift_text, context)
    texts: list[list[int]] = []
    if o.save_4bit:
        rows = min(CALIBRATION_LENGTH, context)
        texts = (
            [encode_prompt([{"role": "user", "content": text}], tokenizer)[:rows] for text in CALIBRATION_TEXTS]
            if o.calibration is None
            else load_texts(o.calibration, tokenizer, rows, CALIBRATION_TOKENS)
        )

    max_bytes = int(o.max_shard_gb * GB)
    made_of = merge_fingerprint(model, mixture, o.base, max_bytes, o.save_4bit, texts)
    with staging_directory(target, made_of) as staging:
        writer: DenseWriter | PackedWriter
        if o.save_4bit:
            writer = PackedWriter(model, mixture, texts, network)
        else:
            writer = DenseWriter(model, mixture, o.base == "original", network)
        write_merged_shards(writer, staging, max_bytes, say)
        _write_metadata(model, mixture, staging, writer)
        drift = None
        if o.drift:
            drift = measure_merged(model, mixture, staging, o.save_4bit, drift_texts)
            (staging / "drift.json").write_text(json.dumps(asdict(drift), indent=2) + "\n")
            if o.max_drift is not None and not drift.mean_kl <= o.max_drift:
                raise CheckFailed(
                    f"The merged model drifts by {drift.mean_kl:.3e} nats per token from base + adapter, more "
                    f"than --max-drift {o.max_drift:g} allows, so {target} was not written."
                )
        card = make_merged_card(model, mixture, o.base, o.save_4bit, o.calibration, drift)
        (staging / "README.md").write_text(card)
    return drift


def _write_metadata(model: str, mixture: Mixture, directory: Path, writer: DenseWriter | PackedWriter) -> None:
    """Config, generation config, tokenizer and chat template."""
    from transformers import GenerationConfig

    config = load_config(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if writer.quantization_config is not None:
        config.quantization_config = writer.quantization_config
    config.dtype = torch.bfloat16
    config.tie_word_embeddings = config.tie_word_embeddings and not mixture.untied
    config.vocab_size = writer.shapes[vocabulary_names(empty_model(model))[0]][0]
    config.save_pretrained(directory)
    # Copied as it stands: transformers refuses to save some that it loads (a temperature without sampling).
    generation = metadata_directory(model) / "generation_config.json"
    if generation.is_file():
        shutil.copy(generation, directory / generation.name)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(directory)
    tokenizer = load_tokenizer(model)
    own_files = read_tokenizer_files(mixture.adapters[0].directory) if mixture.is_plain else {}
    if own_files:  # with tokens that the base has not
        tokenizer.save_pretrained(directory)
        for name, content in own_files.items():
            (directory / name).write_bytes(content)
        tokenizer = load_tokenizer(str(directory))
    if tokenizer.chat_template is None:
        tokenizer.chat_template = fallback_template(tokenizer)  # what training used
    tokenizer.save_pretrained(directory)


def measure_merged(model: str, mixture: Mixture, merged: Path, is_4bit: bool, texts: DriftTexts) -> Drift:
    """Drift of a merged directory from base + adapters, both in fp32."""
    quant = mixture.quantization

    def load_reference() -> Any:
        network = load_base_model(model, quant is not None, quant, compute_dtype="float32")
        mixture.load_onto(network)
        return network

    def load_merged() -> Any:
        return load_base_model(str(merged), is_4bit, compute_dtype="float32")

    return measure_drift(load_reference, load_merged, texts)
