"""Merge adapters into their base and save an ordinary Hugging Face model, one tensor at a time.

    W_merged = bf16( W_hat + w (alpha / rank) B A )        added in fp32; several adapters add up, each by its w

W_hat is by default the *dequantized* base, the weights the adapter was trained against; `original` takes the
weights as they were before quantization, for which the adapter was not trained. Either way the saved model
differs from base + adapter a little (bf16 rounding at least), so the drift is measured and written down.

`save_4bit` goes back into 4 bits. Quantizing the merged weights anew is no way there: W_hat lies on the 4-bit
grid, and an update below half a step of it is rounded away. qlora/requantize.py chooses the codes instead.

What is finished lies in a directory beside the output, named after a fingerprint of everything that goes into
it: a merge that was killed goes on there, and the output appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapter import (
    BASE_SHIFT,
    CONFIG,
    WEIGHTS,
    SavedAdapter,
    check_adapter,
    load_adapter,
    read_adapter,
    with_base_shift,
)
from qlora.config import LoRAConfig
from qlora.drift import Drift, DriftTexts, load_drift_texts, load_texts, measure_drift
from qlora.errors import CheckFailed, InputError
from qlora.files import explain, new_directory, new_file, read_json, remove_leftovers
from qlora.injection import Adapter, activate, linear_layers, wrap_layers
from qlora.lora import LoRAWeights
from qlora.mixing import mix
from qlora.model import (
    dequantized_weights,
    empty_model,
    load_base_model,
    load_config,
    load_tokenizer,
    metadata_directory,
    weight_shapes,
)
from qlora.quantize import FrozenMatrix, Params4bit, QuantConfig, dequantize_weight, packed_tensors
from qlora.redact import redact
from qlora.requantize import CALIBRATION_TEXTS, input_moments, requantize
from qlora.sources import module_name, resolve_model, saved_name, weight_files
from qlora.tokenize import encode_prompt, fallback_template
from qlora.trained import named_base_parameters, read_tokenizer_files, vocabulary_names

GB = 10**9
CALIBRATION_LENGTH, CALIBRATION_TOKENS = 512, 8192  # of one text of a calibration file, and of all
STATE_BYTES = 512  # of the state of a 4-bit weight, in a file
SHARDS = "shards.json"  # in the staging directory: checksum of each finished file
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}
Layout = dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]


def merge_adapter(
    model: str,
    adapter: str | Sequence[str],
    output_dir: str,
    base: Literal["dequantized", "original"] = "dequantized",
    max_shard_size: int = 5 * GB,
    check_drift: bool = True,
    *,
    weights: Sequence[float] | None = None,
    save_4bit: bool = False,
    calibration: str | None = None,
    drift_text: str | None = None,
    max_drift: float | None = None,
    say: Callable[[str], Any] = print,
) -> Drift | None:
    """Write base + adapter as a model directory that transformers loads by itself.

    Memory while writing stays near one tensor in fp32 (with `save_4bit` beside the 4-bit base and 1 GiB);
    measuring the drift loads each model once, in turn.

    Args:
        model: the base: directory, hub id or .gguf.
        adapter: directory, or several; how the base was quantized is read from their weights files.
        output_dir: must not exist; appears whole or not at all.
        max_shard_size: bytes of a weights file.
        weights: what each adapter's change is multiplied by; by default 1.
        save_4bit: write a bitsandbytes checkpoint instead of bf16.
        calibration: texts like those the model is for (best: the training data), for the choice of the 4-bit
            codes; by default a few that come with this project.
        drift_text: file to measure the drift on, instead of the texts of qlora/drift.py.
        max_drift: largest mean KL to accept, in nats per token.
        say: hears that a merge goes on where it was stopped.
    Returns:
        The drift, unless `check_drift` is off.
    Raises:
        InputError: an adapter that does not fit, or an output directory that exists.
        CheckFailed: the drift is larger than `max_drift`; nothing is left of the merge.
    """
    target = Path(output_dir)
    if target.exists():
        raise InputError(f"--output-dir {target} exists already; remove it or choose another.")
    mixture = read_mixture([adapter] if isinstance(adapter, str) else adapter, weights)
    quant = mixture.quantization
    if save_4bit and (base == "original" or quant is None):
        why = "--base original is asked for" if quant is not None else "The adapter was trained on a 16-bit base"
        raise InputError(f"{why}, so there is no 4-bit base to go back into; leave out --save-4bit.")
    if max_drift is not None and not (check_drift and 0 <= max_drift < math.inf):
        raise InputError(f"max_drift is {max_drift}; give --max-drift a number of 0 or more, without --no-drift.")
    network = empty_model(model)
    if save_4bit and any(isinstance(module, FrozenMatrix) for module in network.modules()):
        raise InputError("transformers reads no mixture of experts in 4 bits; leave out --save-4bit.")
    for saved in mixture.adapters:
        check_adapter(saved, network)
    mixture = replace(
        mixture,
        adapters=[with_base_shift(saved, network, model) for saved in mixture.adapters],
        untied=_untied_head(mixture, network),
    )
    mixture.check(as_one=check_drift or save_4bit)
    tokenizer, context = load_tokenizer(model), network.config.max_position_embeddings
    drift_texts = load_drift_texts(tokenizer, drift_text, context)
    texts: list[list[int]] = []
    if save_4bit:
        rows = min(CALIBRATION_LENGTH, context)
        texts = (
            [encode_prompt([{"role": "user", "content": text}], tokenizer)[:rows] for text in CALIBRATION_TEXTS]
            if calibration is None
            else load_texts(calibration, tokenizer, rows, CALIBRATION_TOKENS)
        )

    with _staging_directory(
        target, _fingerprint(model, mixture, base, max_shard_size, save_4bit, texts)
    ) as staging:
        writer: _DenseWriter | _PackedWriter
        if save_4bit:
            writer = _PackedWriter(model, mixture, texts, network)
        else:
            writer = _DenseWriter(model, mixture, base == "original", network)
        _write_shards(writer, staging, max_shard_size, say)
        _write_metadata(model, mixture, staging, writer)
        drift = None
        if check_drift:
            drift = measure_merged(model, mixture, staging, save_4bit, drift_texts)
            (staging / "drift.json").write_text(json.dumps(asdict(drift), indent=2) + "\n")
            if max_drift is not None and not drift.mean_kl <= max_drift:
                raise CheckFailed(
                    f"The merged model drifts by {drift.mean_kl:.3e} nats per token from base + adapter, more "
                    f"than --max-drift {max_drift:g} allows, so {target} was not written."
                )
        card = _model_card(model, mixture, base, save_4bit, calibration, drift)
        (staging / "README.md").write_text(card)
    return drift


# ---- adapters ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Adapters to merge together: each parameter W becomes W + sum of w_i (what adapter i makes of W, - W)."""

    adapters: Sequence[SavedAdapter]
    weights: Sequence[float]
    quantization: QuantConfig | None  # of the base they were trained on
    untied: frozenset[str] = frozenset()  # the name of a head that the base ties to its embedding, and they do not

    @property
    def is_plain(self) -> bool:
        """One adapter as it stands."""
        return len(self.adapters) == 1 and self.weights[0] == 1

    def merge_into(self, name: str, weight: Tensor) -> Tensor:
        """As `SavedAdapter.merge_into`; the same tensor where no adapter has anything."""
        if self.is_plain:
            return self.adapters[0].merge_into(name, weight)
        merged = weight
        for saved, factor in zip(self.adapters, self.weights, strict=True):
            own = saved.merge_into(name, weight)
            if own is not weight:
                merged = merged + factor * (own - weight)
        return merged

    def check(self, as_one: bool) -> None:
        """Whether these adapters can be merged together.

        Args:
            as_one: they must also compute together (`load_onto`), for the drift and for calibration.
        Raises:
            InputError: adapters of a base that was changed (PiSSA, LoftQ), with a tokenizer of their own or (as
                one) with DoRA, that are not merged alone with weight 1.
        """
        if self.is_plain:
            return
        for saved in self.adapters:
            if as_one or saved.base_shift or saved.config.init == "pissa":
                for layer in saved.adapted_layers[:1]:
                    saved.low_rank(layer)
            if read_tokenizer_files(saved.directory):
                raise InputError(
                    f"{saved.directory} has a tokenizer of its own; merge it alone, with the weight 1."
                )

    def merged_shapes(self, network: Any) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of the merged model by name, as `weight_shapes`; new tokens add rows.

        A head that is no longer tied to the embedding comes last.
        """
        shapes = weight_shapes(network)
        shapes |= {head: shapes[vocabulary_names(network)[0]] for head in self.untied}
        for saved in self.adapters:
            shapes.update(
                {
                    name: tuple(t.shape)
                    for name, t in saved.trained.items()
                    if name in shapes or name in self.untied
                }
            )
        return shapes

    def load_onto(self, network: Any) -> None:
        """Give a base model these adapters, in place, without merging them: B A of all side by side."""
        if self.is_plain:
            load_adapter(network, self.adapters[0].directory)
            return
        updates = [{layer: saved.low_rank(layer) for layer in saved.adapted_layers} for saved in self.adapters]
        layers = {}
        for layer, (A, B) in mix(updates, self.weights).items():
            layers[layer] = LoRAWeights(A.shape[1], len(B), rank=len(A), alpha=len(A), dtype=torch.float32)
            layers[layer].lora_A.data, layers[layer].lora_B.data = A, B
        parameters = dict(network.named_parameters())
        names = {name for saved in self.adapters for name in saved.trained}
        trained = {name: nn.Parameter(self.merge_into(name, parameters[name].detach().float())) for name in names}
        wrap_layers(network, layers)
        activate(network, Adapter(LoRAConfig(), layers, trained))
        network.requires_grad_(False)


def read_mixture(directories: Sequence[str], weights: Sequence[float] | None = None) -> Mixture:
    """Read adapters that were trained on one base.

    Args:
        weights: one for each; None for 1.
    Raises:
        InputError: none, another number of weights, one that is not finite, or bases that differ.
    """
    weights = [1.0] * len(directories) if weights is None else list(weights)
    if not directories or len(weights) != len(directories) or not all(map(math.isfinite, weights)):
        raise InputError(
            f"{len(directories)} adapters have the weights {weights}; give --weights one number for each adapter."
        )
    adapters = [read_adapter(directory) for directory in directories]
    bases = [adapter_quantization(directory) for directory in directories]
    for directory, quant in zip(directories, bases, strict=True):
        if quant != bases[0]:
            raise InputError(
                f"{directories[0]} was trained on a base in {bases[0] or '16 bits'}, {directory} on one in "
                f"{quant or '16 bits'}; merge them one at a time."
            )
    return Mixture(adapters, weights, bases[0])


def _untied_head(mixture: Mixture, network: Any) -> frozenset[str]:
    """The name of the head, where the base ties it to the embedding and an adapter trained the two apart."""
    if not network.config.tie_word_embeddings:
        return frozenset()
    embedding, head = vocabulary_names(network)
    for saved in mixture.adapters:
        one, other = saved.trained.get(embedding), saved.trained.get(head)
        if (one is None) != (other is None) or (
            one is not None and other is not None and not torch.equal(one, other)
        ):
            return frozenset([head])
    return frozenset()


def adapter_quantization(adapter: str) -> QuantConfig | None:
    """How the base was quantized when the adapter was trained; None for a 16-bit base.

    Adapters of other tools do not say; NF4 with double quantization is taken, as QLoRA's default.
    """
    from safetensors import SafetensorError, safe_open

    weights = Path(adapter) / WEIGHTS
    try:
        with safe_open(weights, framework="pt") as file:
            recorded = (file.metadata() or {}).get("base_quantization")
        if recorded is None:
            return QuantConfig()
        fields = json.loads(recorded)
        return None if fields is None else QuantConfig(**fields)
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{weights} has no base_quantization that reads ({explain(error)}); save it again."
        ) from error


def base_model_of(adapter: str, say: Callable[[str], Any] = print) -> str:
    """The base that an adapter names, for `merge` without --model: said aloud, for the name is the file's.

    An adapter may come from anyone, so its word reads nothing that is not on this machine: a directory, a
    .gguf file, or a hub id that was downloaded before.

    Args:
        say: hears which base it is and where the name stands.
    Raises:
        InputError: no name, or one of nothing that is here.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = read_adapter(adapter).description.get("base_model_name_or_path")
    source = Path(adapter) / CONFIG
    if not isinstance(name, str) or not name:
        raise InputError(f"The adapter {adapter} names no base; pass --model.")
    shown = redact(name) if name.isprintable() else repr(name)
    on_network = name.startswith(("//", "\\\\"))  # a share of another machine, on Windows
    is_here = name.isprintable() and not on_network and os.path.exists(os.path.expanduser(name))
    with suppress(HFValidationError):  # it need not be a hub id
        is_here = is_here or isinstance(try_to_load_from_cache(name, "config.json"), str)
    if not is_here:
        raise InputError(
            f"{source} names {shown:.200} as its base, which is not on this machine; pass --model with the base's "
            "path, or with that name to download it."
        )
    say(f"base model: {shown}, as {source} names it")
    return name


# ---- the weights ------------------------------------------------------------------------------------------


class _DenseWriter:
    """Merged weights in bf16, read, merged and dropped one at a time."""

    quantization_config: dict[str, Any] | None = None

    def __init__(self, model: str, mixture: Mixture, original: bool, network: Any) -> None:
        self.model, self.mixture, self.original = model, mixture, original
        self.shapes = mixture.merged_shapes(network)
        self.layout: Layout = {name: {name: (torch.bfloat16, shape)} for name, shape in self.shapes.items()}
        layers = linear_layers(network).items()
        self.transposed = {f"{name}.weight" for name, layer in layers if not isinstance(layer, nn.Linear)}
        self.embedding = vocabulary_names(network)[0]

    def tensors(self, wanted: Collection[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, {name: tensor}) of the wanted parameters, in the order of `layout`."""
        shift = self.mixture.adapters[0].base_shift
        head = next((name for name in reversed(self.shapes) if name in self.mixture.untied), None)
        for name, weight in dequantized_weights(self.model, self.mixture.quantization, self.original, shift):
            if name == self.embedding and head is not None:
                tied = weight
            if name not in wanted:
                continue
            own = module_name(name)  # a Mixtral router's in this project, by which an adapter knows it
            if name in self.transposed:  # Conv1D
                weight = self.mixture.merge_into(own, weight.T).T
            else:
                weight = self.mixture.merge_into(own, weight)
            yield name, {name: weight.to(torch.bfloat16)}
        if head is not None and head in wanted:
            yield head, {head: self.mixture.merge_into(head, tied).to(torch.bfloat16)}


class _PackedWriter:
    """Merged weights in the layout of a bitsandbytes checkpoint: those the adapters change get new codes."""

    def __init__(self, model: str, mixture: Mixture, texts: list[list[int]], network: Any) -> None:
        self.shapes = shapes = mixture.merged_shapes(network)
        self.network = load_base_model(model, True, mixture.quantization, compute_dtype="float32")
        own, kind = self.network.quantization, self.network.config.model_type
        linears = [(n, m) for n, m in self.network.named_modules() if isinstance(m, nn.Linear)]
        self.quantization_config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": own.quant_type,
            "bnb_4bit_use_double_quant": own.double_quant,
            "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": [n for n, m in linears if not isinstance(m.weight, Params4bit)],
        }
        mixture.load_onto(self.network)
        parameters = {
            saved_name(name, kind): p.detach() if p.is_floating_point() else p
            for name, p in named_base_parameters(self.network)
        }
        self.parameters = {name: parameters[name] for name in shapes}
        self.mixture, self.texts = mixture, texts
        self.layout: Layout = {}
        for name, parameter in self.parameters.items():
            if isinstance(parameter, Params4bit):
                parts = _stored_parts(name, parameter).items()
                self.layout[name] = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in parts}
            else:
                self.layout[name] = {name: (torch.bfloat16, shapes[name])}

    def tensors(self, wanted: Collection[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, its stored parts) of the wanted parameters, in the order of `layout`."""
        adapted = {f"{layer}.weight" for saved in self.mixture.adapters for layer in saved.adapted_layers}
        packed = [n for n in self.parameters if n in adapted and isinstance(self.parameters[n], Params4bit)]
        layers = [name.removesuffix(".weight") for name in packed if name in wanted]
        moments = input_moments(self.network, layers, self.texts)
        for name, parameter in self.parameters.items():
            if name not in wanted:
                continue
            if not isinstance(parameter, Params4bit):
                yield name, {name: self.mixture.merge_into(name, parameter.float()).to(torch.bfloat16)}
                continue
            if name in adapted:
                layer, moment = next(moments)
                assert f"{layer}.weight" == name
                merged = self.mixture.merge_into(name, dequantize_weight(parameter, torch.float32))
                parameter = requantize(merged, parameter, moment)
            yield name, _stored_parts(name, parameter)


def _stored_parts(name: str, weight: Params4bit) -> dict[str, Tensor]:
    """The tensors of a 4-bit weight under their names, of sizes that do not depend on its values.

    Its state is JSON with a number in it, whose digits vary; spaces bring it to one length.
    """
    parts = {f"{name}{part}": tensor for part, tensor in packed_tensors(weight).items()}
    (state,) = (key for key in parts if ".quant_state." in key)
    parts[state] = F.pad(parts[state], (0, STATE_BYTES - len(parts[state])), value=ord(" "))
    return parts


def _write_shards(
    writer: _DenseWriter | _PackedWriter, directory: Path, max_shard_size: int, say: Callable[[str], Any]
) -> None:
    """Write all tensors into safetensors files of at most `max_shard_size` bytes, and the index.

    Files that are there already, whole by their checksums, are left as they are.
    """
    shards: list[Layout] = [{}]
    size = total = 0
    for name, parts in writer.layout.items():
        own = sum(map(_num_bytes, parts.values()))
        if shards[-1] and size + own > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = parts
        size, total = size + own, total + own
    several = len(shards) > 1
    files = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" if several else "model.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    finished = _finished_shards(directory)
    waiting = {file: shard for file, shard in zip(files, shards, strict=True) if file not in finished}
    if finished:
        say(f"going on with a merge that was stopped: {len(finished)} of {len(files)} files are there")
    weights = writer.tensors({name for shard in waiting.values() for name in shard})
    for file, shard in waiting.items():
        with new_file(directory / file) as staging:
            _write_safetensors(staging, shard, weights)
        finished[file] = _sha256(directory / file)
        with new_file(directory / SHARDS) as staging:
            staging.write_text(json.dumps(finished))
    if several:
        weight_map = {
            key: file for file, shard in zip(files, shards, strict=True) for p in shard.values() for key in p
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _finished_shards(directory: Path) -> dict[str, str]:
    """Checksums of the files that an earlier try has finished and that are still what they were."""
    if not (directory / SHARDS).is_file():
        return {}
    noted = read_json(directory / SHARDS, f"delete {directory}")
    return {
        file: checksum
        for file, checksum in noted.items()
        if (directory / file).is_file() and _sha256(directory / file) == checksum
    }


def _write_safetensors(file: Path, layout: Layout, weights: Iterator[tuple[str, dict[str, Tensor]]]) -> None:
    """Write the next tensors of `weights`, which `layout` announces, without holding more than one weight.

    The safetensors library wants all tensors of a file in memory; the format itself is a length, a JSON
    header of dtypes, shapes and offsets, and the bytes (github.com/huggingface/safetensors, README, "Format").
    Wide dtypes come first, so that each tensor starts at a multiple of its item size.
    """
    parts = [item for stored in layout.values() for item in stored.items()]
    parts.sort(key=lambda item: -item[1][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in parts:
        start, end = end, end + _num_bytes((dtype, shape))
        header[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for expected, (name, tensors) in zip(layout, weights, strict=False):
            assert name == expected and tensors.keys() == layout[name].keys()
            for key, tensor in tensors.items():
                assert (tensor.dtype, tuple(tensor.shape)) == layout[name][key]
                handle.seek(8 + len(text) + header[key]["data_offsets"][0])
                handle.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _num_bytes(part: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = part
    return dtype.itemsize * math.prod(shape)


# ---- the directory ----------------------------------------------------------------------------------------


@contextmanager
def _staging_directory(target: Path, fingerprint: str) -> Iterator[Path]:
    """Yield a directory beside `target` to fill, with whatever an earlier try of the same merge has finished.

    On success its files become `target`. A merge that is refused, or ends before its first whole file, leaves
    nothing; any other end (a signal, a full disk) leaves the directory for the next try.
    """
    staging = target.with_name(f".{target.name}.{fingerprint}.partial")
    staging.mkdir(parents=True, exist_ok=True)
    lock = FileLock(staging / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"Another merge is writing {target}; wait for its end or choose another.") from error
    remove_leftovers(staging)
    keep = False
    try:
        yield staging
        with new_directory(target) as final:
            for file in staging.iterdir():
                if file.name not in (SHARDS, ".lock"):
                    os.replace(file, final / file.name)
        remove_leftovers(target.parent, target.name)  # of merges that were killed just above
    except BaseException as error:
        keep = (staging / SHARDS).is_file() and not isinstance(error, (InputError, CheckFailed))
        raise
    finally:
        lock.release()
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)


def _fingerprint(model: str, mixture: Mixture, *settings: object) -> str:
    """Identity of everything that the weights files depend on."""
    from importlib.metadata import version

    parts: list[object] = [version(name) for name in ("torch", "transformers", "bitsandbytes")]
    for file in map(Path.resolve, weight_files(resolve_model(model))):
        parts += [str(file), file.stat().st_size, file.stat().st_mtime_ns]
    for saved in mixture.adapters:
        names = (CONFIG, WEIGHTS, BASE_SHIFT)
        parts += [_sha256(saved.directory / name) for name in names if (saved.directory / name).is_file()]
    return hashlib.sha256(repr((parts, mixture.weights, mixture.quantization, settings)).encode()).hexdigest()[:16]


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while piece := handle.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _write_metadata(model: str, mixture: Mixture, directory: Path, writer: _DenseWriter | _PackedWriter) -> None:
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


def _model_card(
    model: str,
    mixture: Mixture,
    base: str,
    save_4bit: bool,
    calibration: str | None,
    drift: Drift | None,
) -> str:
    quant = mixture.quantization
    base_text = f"{base} ({quant.quant_type}, double quantization {quant.double_quant})" if quant else "16-bit"
    name = redact(Path(model).name if Path(model).exists() else model)
    drift_text = "not measured" if drift is None else str(drift)
    adapters = " and ".join(
        f"{factor:g} x a LoRA adapter (rank {saved.config.rank}, alpha {saved.config.alpha:g})"
        for saved, factor in zip(mixture.adapters, mixture.weights, strict=True)
    ).removeprefix("1 x ")
    adapters = adapters[0].upper() + adapters[1:]
    if save_4bit:
        source = "a few built-in texts" if calibration is None else f"`{redact(Path(calibration).name)}`"
        storage = f"back in 4 bits: the codes chosen by GPTQ on the base's scales, calibrated on {source}"
        advice = "It is a bitsandbytes checkpoint: transformers loads it in 4 bits by itself."
    else:
        storage = "saved in bf16"
        advice = (
            "Load it in 16 bits. The base's weights lie on the grid of 4-bit values, and an update smaller than "
            "half a step of that grid is rounded away when the merged weights are quantized to 4 bits again; for "
            "a light fine-tune that can be all of it. For 4-bit use merge with `--save-4bit`, or keep base and "
            "adapter apart."
        )
    return f"""---
library_name: transformers
tags: [qlora, lora, merged]
---
# {name}, fine-tuned

{adapters} merged into the {base_text} weights of `{name}`, {storage}.

Drift from base + adapter, in fp32: {drift_text}.

{advice}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""
