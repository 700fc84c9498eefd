"""Load a frozen base model: empty modules first, then one tensor at a time into its final form.

    source (directory, hub id or .gguf)  ->  read one tensor  ->  quantize it  ->  into the cache  ->  next
    cache  ->  memory-mapped, every start, the first one too

Nothing is ever resident in full precision but the tensor in hand, and of the quantized model one shard while the
cache is written. A mapped weight is read from the disk when it is first used and, as it is never written to, may
be dropped again by the system.

Linear layers inside the blocks (Conv1D and the matrices of experts too) become 4-bit (`use_4bit`) or bf16;
embeddings and the output head stay in bf16; norms, biases and routers take the compute dtype. Embeddings cast
their output, and our linear layers compute in their input's dtype, so the stored dtype never shows in the
activations.

GPT-2's Conv1D holds W^T, (in, out). In 4 bits it is the Linear4bit it stands for, (out, in), as bitsandbytes has
it; in 16 bits and in every file it keeps its own layout.

The quantized model is kept on disk in the layout transformers uses for bitsandbytes checkpoints, so the
cache and an already quantized checkpoint load by the same path.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.block import decoder_layers, fuse_blocks
from qlora.device import cache_directory, choose_compute_dtype, make_cache
from qlora.errors import InputError
from qlora.experts import separate_experts
from qlora.files import explain, new_directory, new_file, only_writer, read_json
from qlora.quantize import (
    FrozenMatrix,
    Linear4bit,
    Linear16bit,
    Params4bit,
    QuantConfig,
    dequantize_weight,
    frozen_conv1d,
    packed_tensors,
    quantization_of,
    quantize_weight,
    unpack_tensors,
)
from qlora.sources import (
    REMEDY,
    GGUFSource,
    SafetensorsSource,
    open_source,
    resolve_model,
    saved_name,
    weight_files,
)

MEASURED_WIDTH = 1024  # of the matrix product that decides between fp32 and bf16
NUM_LISTED = 50  # mismatches that one error names
SHARD_BYTES = 128 * 2**20  # of the cache; what waits in memory to be written
CACHE_FORMAT = 1  # part of the cache key: raise it when the stored layout changes
SIZE_LIMITS = {  # of a model's config: many times today's largest
    "num_hidden_layers": 2**12,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "head_dim": 2**16,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "vocab_size": 2**28,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "n_routed_experts": 2**14,
}
Source: TypeAlias = "SafetensorsSource | GGUFSource | _EmptySource"
Cut: TypeAlias = Callable[[str, Tensor], Tensor]
# Buffers that old checkpoints stored; today's modules compute them.
STORED_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


# ---- config and tokenizer ---------------------------------------------------------------------------------


def load_config(model: str) -> Any:
    """The transformers config of a model; custom code is never run."""
    from transformers import AutoConfig

    path = metadata_directory(model)
    file = path / "config.json"
    declared = read_json(file, REMEDY)
    _refuse_own_code(declared, file)
    if "configuration_files" in declared:  # transformers would read one of those instead of this file
        raise InputError(f"{file} names other configuration_files; remove that entry.")
    with _named_failure(f"{file} describes no model that loads", "download it again, or choose another model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        # Modules of any size can be declared; making them takes real time and, for buffers, memory.
        for field, limit in SIZE_LIMITS.items():
            value = getattr(config, field, None)
            if isinstance(value, int) and value > limit:
                raise ValueError(f"{field} is {value}, more than {limit}")
    return config


def load_tokenizer(model: str, adapter: str | Path | None = None) -> Any:
    """The model's tokenizer with its chat template, if it has one; custom code is never run.

    Args:
        adapter: an adapter's directory: where it holds a tokenizer (new tokens, a chat template) that one is
            loaded, for it is what the adapter was trained with.
    """
    from transformers import AutoTokenizer

    path, where = metadata_directory(model), f"--model {model}"
    if adapter is not None and Path(adapter, "tokenizer_config.json").is_file():
        path, where = Path(adapter), f"The adapter {adapter}"
    ignored: dict[str, Any] = dict(_check_tokenizer_files(path))
    with _named_failure(f"{where} has no tokenizer that loads", "give a directory with its tokenizer's files"):
        if not (path / "config.json").is_file():  # an adapter's: the class may hang on the kind of model
            ignored["config"] = load_config(model)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **ignored)


def _check_tokenizer_files(path: Path) -> dict[str, None]:
    """Refuse what would run code or read files elsewhere when the tokenizer of a directory is made.

    transformers passes every entry of tokenizer_config.json to the tokenizer class, and every entry of
    special_tokens_map.json after it has put the directory's own files in place.

    Returns:
        Arguments that put None in the place of paths, which old files carry from their author's machine.
    """
    file = path / "tokenizer_config.json"
    declared = read_json(file, REMEDY) if file.is_file() else {}
    _refuse_own_code(declared, file)
    own = path / "config.json"
    for source, entries in ((file, declared), (own, read_json(own, REMEDY) if own.is_file() else {})):
        if entries.get("tokenizer_class") is not None:
            _check_tokenizer_class(entries["tokenizer_class"], source)
    paths = [key for key in ("vocab", "merges", "tokenizer_object") if isinstance(declared.get(key), str)]
    paths += [key for key in ("init_inputs", "fast_tokenizer_files") if declared.get(key)]
    if paths:
        raise InputError(f"{file} names other files to read as {paths[0]}; remove that entry.")
    special = path / "special_tokens_map.json"
    tokens = read_json(special, REMEDY) if special.is_file() else {}
    others = [name for name in tokens if not name.endswith(("_token", "_tokens"))]
    if others:
        raise InputError(f"{special} holds {others[0]!r:.60}, which is no special token; remove that entry.")
    return dict.fromkeys(key for key in declared if key.endswith("_file"))


def _check_tokenizer_class(name: Any, file: Path) -> None:
    """Only tokenizers: transformers would take any of its classes, a model's too, and load that."""
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    with _named_failure(f"{file} has no good tokenizer_class", "correct that entry"):
        found: Any = tokenizer_class_from_name(name)
    if found is None and not (file.parent / "tokenizer.json").is_file():  # which any fast tokenizer can read
        raise InputError(
            f"{file} wants the tokenizer_class {name!r:.60}, which is none of transformers' own; it would take "
            "trust_remote_code, which is off: use a model with a built-in tokenizer."
        )
    # Where an optional package is missing, transformers has a placeholder that says so when it is used.
    is_tokenizer = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
    if found is not None and not is_tokenizer and not hasattr(found, "_backends"):
        raise InputError(f"{file} has the tokenizer_class {name!r:.60}, which is no tokenizer; correct it.")


def _refuse_own_code(declared: dict[str, Any], file: Path) -> None:
    if "auto_map" in declared:
        raise InputError(
            f"{file} brings code of its own to run (auto_map), which would take trust_remote_code; it is off, and "
            "only built-in architectures and tokenizers load."
        )


@contextmanager
def _named_failure(what: str, remedy: str) -> Iterator[None]:
    """Make an InputError of whatever transformers raises over files that may hold anything.

    Its parsers check little, so that a wrong type may surface as any exception, and those of the tokenizers
    library are plain Exceptions or, where it panicked, not even that.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or "Panic" in type(error).__name__:
            raise InputError(f"{what} ({explain(error)}); {remedy}.") from error
        raise


def metadata_directory(model: str) -> Path:
    """The directory with config.json and the tokenizer; for a .gguf they are converted once and kept.

    Of a hub id no weights are downloaded.
    """
    path = resolve_model(model, weights=False)
    if path.suffix != ".gguf":
        return path
    target = cache_directory() / f"gguf-{_fingerprint([path])}"
    if not target.is_dir():
        from transformers import AutoConfig, AutoTokenizer

        make_cache()

        GGUFSource(path)  # names a damaged file or an unknown architecture before transformers trips on it
        failure = _named_failure(f"{path} has no config or tokenizer that loads", "download it again")
        with tempfile.TemporaryDirectory() as alone, failure:
            # By itself: transformers would take a tokenizer.json that happens to lie beside it for its own.
            Path(alone, "model.gguf").symlink_to(path.resolve())
            config = AutoConfig.from_pretrained(alone, gguf_file="model.gguf", trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf", trust_remote_code=False)
        with new_directory(target) as staging:
            config.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    return target


# ---- the cache --------------------------------------------------------------------------------------------


def _fingerprint(files: Iterable[Path], *parts: object) -> str:
    """Identity of source files (path, size, time of change) and of what is done with them."""
    digest = hashlib.sha256(repr((CACHE_FORMAT, *parts)).encode())
    for file in files:
        status = file.resolve().stat()
        digest.update(f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _write_cache(network: Any, weights: Iterable[tuple[str, Tensor]], quant: QuantConfig, target: Path) -> None:
    """Write a quantized model as a bitsandbytes checkpoint that transformers could load too.

    Args:
        weights: what `_stored_weights` yields; a shard of it is in memory at a time.
    """
    with new_directory(target) as staging:
        _write_shards(staging, weights)
        description = network.config.to_dict()
        description["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quant.quant_type,
            "bnb_4bit_use_double_quant": quant.double_quant,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
        (staging / "config.json").write_text(json.dumps(description, indent=2, default=str))


def _write_shards(directory: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """model.safetensors, or shards and their index; the tensor that brings a shard to SHARD_BYTES is its last."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []  # names of the tensors in each
    waiting: dict[str, Tensor] = {}

    def write() -> None:
        save_file(waiting, directory / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, weight in weights:
        parts = packed_tensors(weight) if isinstance(weight, Params4bit) else {"": weight}
        waiting.update({f"{name}{part}": tensor.contiguous().cpu() for part, tensor in parts.items()})
        del weight, parts  # else they are held while the next one is read
        if sum(tensor.nbytes for tensor in waiting.values()) >= SHARD_BYTES:
            write()
    if waiting:
        write()
    if len(shards) == 1:
        os.rename(directory / "0.safetensors", directory / "model.safetensors")
        return
    places = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(directory / f"{number}.safetensors", directory / file)
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


# ---- loading ----------------------------------------------------------------------------------------------


def load_base_model(
    model: str,
    use_4bit: bool = True,
    quant: QuantConfig | None = None,
    compute_dtype: str = "auto",
    device: torch.device | str = "cpu",
    cache: bool = True,
    cut: Cut | None = None,
) -> Any:
    """Load a frozen base model for training or generation.

    Args:
        model: Hugging Face directory, hub id, or .gguf file.
        use_4bit: quantize the blocks' linear layers as `quant` says; False keeps them in bf16.
        compute_dtype: "auto" (measured on the device), "float32" or "bfloat16": dtype of activations.
        cache: keep the quantized weights on disk and read them from there the next time.
        cut: takes each weight by name, as it is kept, and returns the part of it to keep here.
    Returns:
        A transformers causal LM in eval mode, nothing trainable, with three attributes more: `compute_dtype`,
        `source` (`model` as given), and `quantization`, the QuantConfig of its weights (None for a 16-bit base).
    Raises:
        InputError: no such model; or all missing, extra and misshapen weights.
    """
    quant = quant or QuantConfig()
    device = torch.device(device)
    path = resolve_model(model)
    cached = _cached_base(path, quant) if use_4bit and cache else None
    network = empty_model(model)
    source: Source
    if cached is None or not cached.is_dir():
        source = open_source(path)
        if source.packed:  # it is what a cache would hold
            cached = None
            if not use_4bit:
                raise InputError(f"--model {model} is stored in 4 bits; leave out --no-4bit.")
        elif cached is not None:
            make_cache()
            with only_writer(cached) as is_first:
                if is_first:
                    _write_cache(network, _stored_weights(network, source, quant, device), quant, cached)
    if cached is not None:
        source = _open_cache(cached)
    dtype = settle_compute_dtype(compute_dtype, device, cache)
    _finish(network, source, model, quant if use_4bit else None, dtype, device, cut)
    network.generation_config = generation_config_of(network, metadata_directory(model))
    return network.eval()


def _cached_base(path: Path, quant: QuantConfig) -> Path:
    """Where the quantized form of a model's files is kept."""
    return cache_directory() / f"base-{_fingerprint(weight_files(path), quant)}"


def _open_cache(cached: Path) -> SafetensorsSource:
    try:
        return SafetensorsSource(cached, map_files=True, remedy="delete this cache and it is made again")
    except InputError as error:
        raise InputError(f"The cached model {cached} is damaged; delete it and it is made again.") from error


def find_source(model: str, quant: QuantConfig | None, cache: bool = True) -> Source:
    """A model's weights: quantized ones from the cache where it has them, else its own files; nothing is written.

    Args:
        quant: how the base is quantized; None for a 16-bit one.
    """
    path = resolve_model(model)
    cached = _cached_base(path, quant) if quant is not None and cache else None
    return _open_cache(cached) if cached is not None and cached.is_dir() else open_source(path)


def load_first_block(
    model: str, source: Source, quant: QuantConfig | None, dtype: torch.dtype, device: torch.device
) -> Any:
    """A model that can compute up to its first decoder layer, from given embeddings: to compare that layer with.

    Of embeddings, head and the other layers nothing is read; they stay on the meta device.
    """
    network = empty_model(model)
    out = {network.get_input_embeddings(), network.get_output_embeddings(), *decoder_layers(network)[1:]}
    left = tuple(f"{name}." for name, module in network.named_modules() if module in out)
    weights = _stored_weights(network, source, quant, device, lambda name: not name.startswith(left))
    _place(network, weights)
    _compute_in(network, dtype)
    fuse_blocks(network)
    for module in network.modules():
        module._buffers.update({name: b.to(device) for name, b in module._buffers.items() if b is not None})
    network.compute_dtype = dtype
    return network.eval()


def plan_base_model(
    model: str,
    use_4bit: bool = True,
    quant: QuantConfig | None = None,
    compute_dtype: str = "auto",
    device: torch.device | str = "cpu",
) -> Any:
    """What `load_base_model` returns, every tensor of the same shape and dtype, but on the meta device.

    Nothing but the config is read, and of a hub id nothing else downloaded. Adapters go into it as into the loaded
    model, and `plan_memory` counts both by the same lines.

    Args:
        model, use_4bit, quant: as for `load_base_model`. Of a checkpoint in 4 bits its config says how.
        compute_dtype, device: dtype of activations; "auto" is bf16 on a GPU that is not here.
    Raises:
        InputError: as `load_base_model`, as far as the config shows it.
    """
    stored = _declared_quantization(load_config(model), model)
    if stored is not None and not use_4bit:
        raise InputError(f"--model {model} is stored in 4 bits; leave out --no-4bit.")
    quant = (stored or quant or QuantConfig()) if use_4bit else None
    device, dtype = torch.device(device), torch.bfloat16
    if compute_dtype != "auto" or device.type == "cpu" or torch.cuda.is_available():
        dtype = settle_compute_dtype(compute_dtype, device, cache=True)
    network = empty_model(model)
    _finish(network, _EmptySource(network), model, quant, dtype, torch.device("meta"))
    return network.eval()


class _EmptySource:
    """A source of weights that have a shape and nothing else."""

    def __init__(self, network: Any) -> None:
        self._shapes = _parameter_shapes(network)
        self.path, self.names = Path(), set(self._shapes)
        self.packed: dict[str, str] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def is_float(self, name: str) -> bool:
        return True

    def read(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], dtype=torch.bfloat16, device="meta")

    view = read


def _declared_quantization(config: Any, model: str) -> QuantConfig | None:
    """How a checkpoint's config says that its weights are quantized; None: they are not."""
    declared = getattr(config, "quantization_config", None)
    if declared is None:
        return None
    entries = declared if isinstance(declared, dict) else declared.to_dict()
    if not entries.get("load_in_4bit"):
        method = entries.get("quant_method")
        raise InputError(
            f"--model {model} is stored in another quantization ({method!r:.60}); choose the original."
        )
    return QuantConfig(entries.get("bnb_4bit_quant_type", "fp4"), entries.get("bnb_4bit_use_double_quant", False))


def _finish(
    network: Any,
    source: Source,
    model: str,
    quant: QuantConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    cut: Cut | None = None,
) -> None:
    """Make of an `empty_model` the base that computes, in place."""
    weights = _stored_weights(network, source, quant, device)
    _fill(network, weights if cut is None else ((name, cut(name, weight)) for name, weight in weights), device)
    _compute_in(network, dtype)
    fuse_blocks(network)
    network.compute_dtype = dtype
    network.source = model
    network.quantization = _quantization_of(network)


def settle_compute_dtype(name: str, device: torch.device, cache: bool) -> torch.dtype:
    """`choose_compute_dtype`, measured once per machine: a second measurement on a busy one could differ.

    Args:
        cache: remember a measurement; one that was remembered counts in any case.
    """
    if name != "auto" or device.type == "cuda":
        return choose_compute_dtype(name, device, MEASURED_WIDTH)
    machine = f"{platform.node()}-{platform.machine()}-{torch.__version__}-{torch.get_num_threads()}"
    remembered = cache_directory() / f"compute-dtype-{machine}"
    if not remembered.is_file():
        if not cache:
            return choose_compute_dtype(name, device, MEASURED_WIDTH)
        make_cache()
        with new_file(remembered) as file:
            file.write_text(str(choose_compute_dtype(name, device, MEASURED_WIDTH)).removeprefix("torch."))
    return choose_compute_dtype(remembered.read_text(), device, MEASURED_WIDTH)


def weight_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of an `empty_model` under the name transformers saves it, tied ones once.

    In the order and the layout of `dequantized_weights`.
    """
    kind = network.config.model_type
    return {saved_name(name, kind): shape for name, shape in _parameter_shapes(network).items()}


def _parameter_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, tied ones once."""
    tied = tied_names(network)
    return {name: tuple(p.shape) for name, p in network.named_parameters() if name not in tied}


def dequantized_weights(
    model: str,
    quant: QuantConfig | None,
    original: bool = False,
    shift: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a model by name, one at a time, as `load_base_model` would compute with it.

    Args:
        quant: how the blocks are quantized; None for a 16-bit base.
        original: give the stored weight itself, not the one its 4-bit codes stand for.
        shift: the base shift of a PiSSA or LoftQ adapter (see initialize.py), subtracted before quantizing.
    Yields:
        (name, fp32 tensor), names as transformers saves them, tied ones once.
    Raises:
        InputError: as `load_base_model`; or the original of a checkpoint that is stored in 4 bits.
    """
    source = open_source(resolve_model(model))
    network = empty_model(model)
    stored = match_names(network, source)
    blocks = _names_to_quantize(network, source) if quant is not None else set()
    transposed = transposed_names(network)
    kind = network.config.model_type
    for name in stored:
        packed = read_packed_weight(source, stored[name], torch.device("cpu"))
        if packed is not None and original:
            raise InputError(f"--model {model} is stored in 4 bits, so there is no original to merge onto.")
        layer = name.removesuffix(".weight")
        if shift and name != layer and layer in shift:
            tensor = source.read(stored[name]) if packed is None else dequantize_weight(packed, torch.float32)
            turned = name in transposed and packed is None
            weight = shifted_weight(tensor.T if turned else tensor, shift[layer])
            how = quantization_of(packed) if packed is not None else quant if name in blocks else None
            if how is not None and not original:
                weight = dequantize_weight(quantize_weight(weight, how), torch.float32)
            yield saved_name(name, kind), weight.T if name in transposed else weight
            continue
        if packed is None:
            tensor = source.read(stored[name])
            if quant is None or name not in blocks or original:
                yield saved_name(name, kind), tensor.float()
                continue
            packed = quantize_weight(tensor.T if name in transposed else tensor, quant)
            del tensor
        dense = dequantize_weight(packed, torch.float32)
        yield saved_name(name, kind), dense.T if name in transposed else dense


def read_weights(model: str, layers: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, weight (out, in) fp32) of the named linear layers as a model's files hold them, one at a time.

    Where the files hold 4-bit codes, what these stand for.
    """
    source, network = open_source(resolve_model(model)), empty_model(model)
    stored, transposed = match_names(network, source), transposed_names(network)
    for layer in layers:
        name = f"{layer}.weight"
        packed = read_packed_weight(source, stored[name], torch.device("cpu"))
        if packed is not None:
            yield layer, dequantize_weight(packed, torch.float32)
        else:
            tensor = source.read(stored[name]).float()
            yield layer, tensor.T.contiguous() if name in transposed else tensor


def is_stored_in_4bit(model: str) -> bool:
    """Whether a model's files hold 4-bit codes, and no original weights."""
    return bool(open_source(resolve_model(model)).packed)


def shifted_weight(weight: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """W - B' A' for a weight (out, in) and factors (A', B'), right to the last bit of fp32.

    Multiplied in fp64, so that every machine finds the same 4-bit codes in it.
    """
    A, B = (factor.to(weight.device, torch.float64) for factor in factors)
    pieces = zip(weight.split(1024), B.split(1024), strict=True)  # rows of a large product in fp64
    return torch.cat([(rows.double() - part @ A).float() for rows, part in pieces])


def _names_to_quantize(network: Any, source: Source) -> set[str]:
    """The weights to bring into 4 bits: linear layers, Conv1D and experts' matrices, the output head left out.

    None in a checkpoint that is quantized already: what it keeps in 16 bits it keeps on purpose.
    """
    if source.packed:
        return set()
    head = network.get_output_embeddings()
    names = {f"{name}.weight" for name, module in _matrix_layers(network).items() if module is not head}
    if not names:
        raise InputError(f"A {network.config.model_type} model has no linear layers to quantize; pass --no-4bit.")
    return names


def _matrix_layers(network: Any) -> dict[str, nn.Module]:
    """Qualified name -> layer whose weight is one matrix that may be quantized; the output head among them."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, FrozenMatrix)
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def transposed_names(network: Any) -> set[str]:
    """The weights that files hold as (in, out) and 4-bit layers as (out, in)."""
    from transformers.pytorch_utils import Conv1D

    return {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, Conv1D)}


def read_packed_weight(
    source: Source, key: str, device: torch.device, as_views: bool = False
) -> Params4bit | None:
    """The 4-bit weight stored under `key` and its companions, or None if it is stored dense.

    Args:
        as_views: of the file's pages, let go with the weight; for the CPU.
    """
    if not isinstance(source, SafetensorsSource) or key not in source.packed:
        return None
    tensors = source.read_packed(key, as_views)
    try:
        return unpack_tensors(tensors, device)
    except ValueError as error:
        raise InputError(
            f"{source.path}: {key} is no 4-bit weight ({explain(error)}); {source.remedy}."
        ) from error


def empty_model(model: str) -> Any:
    """The model's modules with parameters on the meta device and real (computed) buffers.

    Those of transformers, but for mixtures of experts: their experts are kept apart (qlora/experts.py).
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from qlora.attention import ATTENTION_NAME, register_attention

    register_attention()
    config = load_config(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    failure = _named_failure(f"--model {model} is no causal language model that loads", "choose another model")
    with init_empty_weights(include_buffers=False), failure:
        network = AutoModelForCausalLM.from_config(
            config, attn_implementation=ATTENTION_NAME, trust_remote_code=False
        )
        separate_experts(network)
    return network


def tied_names(network: Any) -> list[str]:
    """Parameters that are another one's alias (lm_head when embeddings are tied)."""
    if not network.config.tie_word_embeddings:
        return []
    return list(getattr(network, "_tied_weights_keys", None) or ())


def _stored_weights(
    network: Any,
    source: Source,
    quant: QuantConfig | None,
    device: torch.device,
    is_wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, tied ones once, in the form that it is kept in; each is read when it is asked for.

    Args:
        quant: how to quantize the blocks' matrices; None leaves them in bf16.
        is_wanted: which to read, by name.
    Returns:
        Params4bit for them; bf16 for embeddings, the head and other matrices; fp32 for norms, biases and routers.
    Raises:
        InputError: weights that do not fit the model, before any is read.
    """
    stored = match_names(network, source)
    to_quantize = _names_to_quantize(network, source) if quant is not None else set()
    transposed = transposed_names(network)
    matrices = _matrix_layers(network)
    embeddings = {name for name, module in network.named_modules() if isinstance(module, nn.Embedding)}
    in_bf16 = {f"{name}.weight" for name in embeddings.union(matrices)}
    head = network.get_output_embeddings()

    def read(name: str) -> Tensor:
        packed = read_packed_weight(source, stored[name], device)
        if packed is not None:  # of a head the loss needs the matrix, of an embedding the look-up its rows
            stays_packed = matrices.get(name.removesuffix(".weight"), head) is not head
            return packed if stays_packed else dequantize_weight(packed, torch.float32)
        dense = source.read(stored[name]).to(device)
        if quant is not None and name in to_quantize:
            return quantize_weight(dense.T if name in transposed else dense, quant)
        return dense.to(torch.bfloat16 if name in in_bf16 else torch.float32)

    return ((name, read(name)) for name in stored if is_wanted(name))


def _fill(network: Any, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Give an `empty_model` all its weights."""
    matrices = _matrix_layers(network)
    _place(network, weights)
    embedding = network.get_input_embeddings()
    for name in tied_names(network):
        owner = name.removesuffix(".weight")
        if owner in matrices:
            tied = Linear16bit(embedding.weight.data, network.get_submodule(owner).bias)
            tied.weight = embedding.weight
            _set(network, owner, tied)
    network.to(device)  # buffers: everything else lies there already


def _place(network: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Put parameters into their places, and our own linear layers into that of torch's."""
    matrices = _matrix_layers(network)
    for name, weight in weights:
        owner, _, kind = name.rpartition(".")
        layer = matrices.get(owner)
        if kind != "weight" or layer is None:
            parameter = nn.Parameter(weight, requires_grad=False)
            setattr(network.get_submodule(owner), kind, parameter)
        elif isinstance(weight, Params4bit):
            if isinstance(layer, FrozenMatrix):
                layer.weight = weight
            else:
                _set(network, owner, Linear4bit(weight, None))  # its bias comes next
        elif isinstance(layer, nn.Linear):
            _set(network, owner, Linear16bit(weight, None))
        else:
            layer.weight = nn.Parameter(weight, requires_grad=False)


def match_names(network: Any, source: Source) -> dict[str, str]:
    """Parameter name -> stored name, or one error that lists everything missing, extra or misshapen."""
    expected, transposed = _parameter_shapes(network), transposed_names(network)
    prefix = network.base_model_prefix + "."
    bare = not any(name.startswith(prefix) for name in source.names)  # GPT-2's files leave the prefix out
    stored = {name: name.removeprefix(prefix) if bare else name for name in expected}
    problems = [f"missing {name}" for name, key in stored.items() if key not in source.names]
    for name, key in stored.items():
        wanted = expected[name][::-1] if name in transposed and key in source.packed else expected[name]
        if key in source.names and source.shape(key) != wanted:
            problems.append(f"{name} is {source.shape(key)} but should be {wanted}")
        elif key in source.names and not source.is_float(key):
            problems.append(f"{name} holds whole numbers or narrow floats, whose scales are not known")
    companions = [key + part for key in source.packed for part in (".absmax", ".quant_map")]
    problems += [f"missing {name}" for name in companions if name not in source.names]
    known = set(stored.values()) | set(tied_names(network))
    for name in source.names - known:
        if name.partition(".weight.")[0] + ".weight" not in source.packed and not name.endswith(STORED_BUFFERS):
            problems.append(f"unexpected {name}")
    if problems:
        rest = [f"and {len(problems) - NUM_LISTED} more"] if len(problems) > NUM_LISTED else []
        listed = "; ".join([*sorted(problems)[:NUM_LISTED], *rest])
        raise InputError(f"The weights in {source.path} do not fit the config: {listed}.")
    return stored


def _set(network: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, value)


def _quantization_of(network: Any) -> QuantConfig | None:
    """Read from the weights themselves: an already quantized checkpoint brings its own."""
    for parameter in network.parameters():
        if isinstance(parameter, Params4bit):
            return quantization_of(parameter)
    return None


def _compute_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Make activations `dtype`: embeddings cast what they give out, norms take the dtype itself."""
    from transformers.pytorch_utils import Conv1D

    def cast_output(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        scale = getattr(module, "embed_scale", None)
        if scale is None:
            return output.to(dtype)
        # Gemma's embedding multiplies in the dtype of its table: in bf16 that would round the product.
        return F.embedding(args[0], module.weight, module.padding_idx).to(dtype) * scale.to(dtype)

    for module in network.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(cast_output)
        elif isinstance(module, Conv1D):
            module.__class__ = cast(Any, frozen_conv1d())
        elif not isinstance(module, (nn.Linear, FrozenMatrix)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def generation_config_of(network: Any, directory: Path) -> Any:
    from transformers import GenerationConfig

    file = directory / "generation_config.json"
    if file.is_file():
        with _named_failure(f"{file} is not valid", "mend or remove it"):
            config = GenerationConfig.from_pretrained(directory)
            stops = config.eos_token_id
            if not all(type(stop) is int for stop in (stops if isinstance(stops, list) else [stops or 0])):
                raise ValueError(f"eos_token_id is {stops!r:.60}")
            return config
    return GenerationConfig.from_model_config(network.config)
