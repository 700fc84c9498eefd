"""Merge adapters into their base and save an ordinary Hugging Face model, one tensor at a time.

    W_merged = bf16( W_hat + w (alpha / rank) B A )     added in fp32; several adapters are summed, each with its w

W_hat is by default the base that the adapter was trained on: the *dequantized* 4-bit weights, or the original ones
for an adapter of a 16-bit base (adapters/provenance.py says how that is known). Where nothing tells, 16 bits are
assumed, this is said, and the drift is measured for both. The saved model differs slightly from base + adapter, at
least by bf16 rounding, so the drift is measured and recorded.

`save_4bit` writes 4-bit weights. Quantizing the merged weights again would not work: W_hat lies on the 4-bit grid,
so an update below half a step is rounded away. qlora/quant/gptq.py chooses the codes instead.

Finished files go into a directory next to the output, named after a fingerprint of all inputs. A killed merge
continues there, and the output appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qlora.adapters.load import check_adapter, with_base_shift
from qlora.config.merge import MergeOptions
from qlora.data.encode import encode_prompt
from qlora.export.drift import Drift, DriftTexts, load_drift_texts, load_texts, measure_drift
from qlora.export.merged_weights import GB, DenseWriter, PackedWriter, write_merged_shards
from qlora.export.metadata import write_metadata
from qlora.export.mixture import Mixture, read_mixture, untied_head
from qlora.export.model_card import make_merged_card
from qlora.export.staging import merge_fingerprint, staging_directory
from qlora.export.texts import CALIBRATION_TEXTS
from qlora.model.load import load_base_model
from qlora.model.skeleton import empty_model
from qlora.model.tokenizer import load_tokenizer
from qlora.quant.layers import FrozenMatrix
from qlora.quant.weight import QuantConfig
from qlora.system.errors import CheckFailed, InputError

CALIBRATION_LENGTH, CALIBRATION_TOKENS = 512, 8192  # tokens per text of a calibration file, and in total


def merge_adapter(
    model: str,
    adapter: str | Sequence[str],
    output_dir: str,
    options: MergeOptions | None = None,
    say: Callable[[str], Any] = print,
) -> Drift | None:
    """Write base + adapter as an ordinary model directory for transformers.

    Memory while writing stays near one tensor in fp32 (with `save_4bit` plus the 4-bit base and 1 GiB); measuring
    the drift loads both models, one after the other.

    Args:
        model: the base: directory, hub id or .gguf.
        adapter: directory, or several; how the base was quantized is read from their weights files.
        output_dir: must not exist; written atomically.
        options: base weights, output format and checks.
        say: receives a line if an interrupted merge is continued.
    Returns:
        The drift, unless `options.drift` is off.
    Raises:
        InputError: an adapter that does not fit, or an output directory that exists.
        CheckFailed: the drift exceeds `options.max_drift`; nothing is written.
    """
    o, target = options or MergeOptions(), Path(output_dir)
    o.check_bounds()
    if target.exists():
        raise InputError(f"--output-dir {target} exists already; remove it or choose another.")
    mixture = _settle_base(
        read_mixture([adapter] if isinstance(adapter, str) else adapter, o.weights or None, model), o, say
    )
    network = empty_model(model)
    if o.save_4bit and any(isinstance(module, FrozenMatrix) for module in network.modules()):
        raise InputError("transformers cannot load a 4-bit mixture of experts; leave out --save-4bit.")
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
        write_metadata(model, mixture, staging, writer)
        drift = None
        if o.drift:
            drift = measure_merged(model, mixture, staging, o.save_4bit, drift_texts)
            if not mixture.is_base_known:
                other = replace(mixture, quantization=None if mixture.quantization else QuantConfig())
                drifts = measure_merged(model, other, staging, o.save_4bit, drift_texts)
                say(f"Drift if the base was {'NF4' if other.quantization else '16 bits'} in training: {drifts}")
            (staging / "drift.json").write_text(json.dumps(asdict(drift), indent=2) + "\n")
            if o.max_drift is not None and not drift.mean_kl <= o.max_drift:
                raise CheckFailed(
                    f"The merged model drifts by {drift.mean_kl:.3e} nats per token from base + adapter, more "
                    f"than --max-drift {o.max_drift:g} allows, so {target} was not written."
                )
        card = make_merged_card(model, mixture, o.base, o.save_4bit, o.calibration, drift)
        (staging / "README.md").write_text(card)
    return drift


def _settle_base(mixture: Mixture, o: MergeOptions, say: Callable[[str], Any]) -> Mixture:
    """The mixture with the quantization of the base to merge into; an assumption is reported.

    Raises:
        InputError: `save_4bit` without a 4-bit base.
    """
    if not mixture.is_base_known:
        if o.base == "dequantized":
            mixture = replace(mixture, quantization=QuantConfig())
        elif o.base == "auto":
            say(
                "The adapter does not say whether its base had 4 or 16 bits in training. Merging into the 16-bit "
                "weights; pass --base dequantized if it was trained on NF4."
            )
    if o.save_4bit and (o.base == "original" or mixture.quantization is None):
        why = "The adapter was trained on a 16-bit base" if mixture.is_base_known else "No 4-bit base is recorded"
        why = "--base original was given" if o.base == "original" and mixture.quantization is not None else why
        raise InputError(f"{why}, so there are no 4-bit scales to reuse; leave out --save-4bit.")
    return mixture


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
