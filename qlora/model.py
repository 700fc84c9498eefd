"""Load a frozen base model: empty modules first, then one tensor at a time into its final form.

    source (directory, hub id or .gguf)  ->  read one tensor  ->  quantize it  ->  drop it  ->  next

Nothing is ever resident in full precision but the tensor in hand. Linear layers inside the blocks become
4-bit (`use_4bit`) or bf16; embeddings and the output head stay in bf16; norms and biases take the compute
dtype. Embeddings cast their output, and our linear layers compute in their input's dtype, so the stored
dtype never shows in the activations.

The quantized model is kept on disk in the layout transformers uses for bitsandbytes checkpoints, so the
cache and an already quantized checkpoint load by the same path, memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from functools import cache as _cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlora.device import choose_compute_dtype
from qlora.errors import InputError
from qlora.files import new_directory, new_file
from qlora.quantize import (
    Linear4bit,
    Linear16bit,
    Params4bit,
    QuantConfig,
    dequantize_weight,
    frozen_conv1d,
    packed_shape,
    packed_tensors,
    quantization_of,
    quantize_weight,
    unpack_tensors,
)

MEASURED_WIDTH = 1024  # of the matrix product that decides between fp32 and bf16
CACHE_FORMAT = 1  # part of the cache key: raise it when the stored layout changes
GGUF_ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}  # name -> rows of q and k are permuted
# Buffers that old checkpoints stored; today's modules compute them.
STORED_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


# ---- where weights come from ------------------------------------------------------------------------------


class SafetensorsSource:
    """Weights of a Hugging Face directory: model.safetensors, or shards and their index.

    Tensors are read into fresh memory, gone when dropped; with `map_files` they are views of the mapped files.
    """

    def __init__(self, directory: Path, map_files: bool = False) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = directory
        self.files = _weight_files(directory)
        self._file_of: dict[str, Any] = {}
        for file in self.files:
            try:
                handle = safe_open(file, framework="pt", backend="mmap" if map_files else "pread")
            except SafetensorError as error:
                raise InputError(
                    f"{file} is not a whole safetensors file ({error}); download it again."
                ) from error
            self._file_of.update(dict.fromkeys(handle.keys(), handle))
        self.names = set(self._file_of)
        marker = ".quant_state.bitsandbytes__"
        self.packed = {name.partition(marker)[0]: name for name in self.names if marker in name}

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape: that of a 4-bit weight is recorded beside its codes."""
        if name in self.packed:
            return packed_shape(self.read(self.packed[name]))
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)


def _weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights, all of them there."""
    if path.suffix == ".gguf":
        return [path]
    index = path / "model.safetensors.index.json"
    files = _indexed_files(index) if index.is_file() else [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing; a model directory needs its safetensors weights complete.")
    return files


def _indexed_files(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{index} has no weight_map from tensors to files; download the model again.")
    shards = sorted(set(weight_map.values()))
    if any(Path(shard).name != shard for shard in shards):
        raise InputError(f"{index} names a shard outside its directory; the file is not to be trusted.")
    return [index.parent / shard for shard in shards]


class GGUFSource:
    """Weights of a .gguf file under their Hugging Face names, dequantized one at a time.

    llama.cpp stores the rows of q and k in the order of its own rotary embedding; they are put back into
    Hugging Face's order (the llama architecture only; the Qwen ones keep theirs).
    """

    def __init__(self, file: Path) -> None:
        from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

        self.path = file
        self.packed: dict[str, str] = {}
        try:
            reader = GGUFReader(str(file))
            architecture = str(reader.fields["general.architecture"].contents())
        except (ValueError, IndexError, KeyError) as error:
            raise InputError(f"{file} is not a whole GGUF file ({error}); download it again.") from error
        if architecture not in GGUF_ARCHITECTURES:
            known = ", ".join(GGUF_ARCHITECTURES)
            raise InputError(f"{file} holds a {architecture} model; GGUF bases of {known} can be loaded.")
        self._permuted = GGUF_ARCHITECTURES[architecture]
        count = {
            key: int(reader.fields[f"{architecture}.{field}"].contents())
            for key, field in (("layers", "block_count"), ("q", "attention.head_count"))
        }
        kv_field = reader.fields.get(f"{architecture}.attention.head_count_kv")
        self._heads = {"q": count["q"], "k": int(kv_field.contents()) if kv_field else count["q"]}
        arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._tensors: dict[str, Any] = {}
        name_map = get_tensor_name_map(arch, count["layers"])
        for name in _decoder_names(count["layers"]):
            gguf_name = name_map.get_name(name.rpartition(".")[0])
            stored = f"{gguf_name}.{name.rpartition('.')[2]}"
            if stored in tensors:
                self._tensors[name] = tensors.pop(stored)
        # What has no Hugging Face name keeps its own, and is reported as unexpected.
        self._tensors.update(tensors)
        self.names = set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def read(self, name: str) -> Tensor:
        """fp32, dequantized from GGUF's blocks. Read from the file, not mapped."""
        import numpy as np
        from gguf import dequantize

        stored = self._tensors[name]
        raw = np.fromfile(self.path, stored.data.dtype, stored.data.size, offset=stored.data_offset)
        if raw.size != stored.data.size:
            raise InputError(f"{self.path} ends inside {name}; download it again.")
        tensor = torch.from_numpy(dequantize(raw.reshape(stored.data.shape), stored.tensor_type))
        tensor = tensor.reshape(self.shape(name))
        for letter, heads in self._heads.items():
            if self._permuted and f".self_attn.{letter}_proj." in name:
                rows = tensor.shape[0]
                tensor = tensor.view(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        return tensor


def _decoder_names(num_layers: int) -> Iterable[str]:
    yield from ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    parts = [f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")]
    parts += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    parts += [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    parts += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    for layer in range(num_layers):
        yield from (f"model.layers.{layer}.{part}" for part in parts)


def resolve_model(model: str) -> Path:
    """A local directory or .gguf file for a path or hub id (downloaded through huggingface_hub).

    Raises:
        InputError: neither a path nor an id that the hub knows, or the hub is out of reach.
    """
    path = Path(model).expanduser()
    if path.is_dir() or path.is_file():
        if path.is_file() and path.suffix != ".gguf":
            raise InputError(f"--model {model} is a file but no .gguf; give the model's directory instead.")
        if path.is_dir() and not (path / "config.json").is_file():
            raise InputError(f"--model {model} has no config.json; give a Hugging Face model directory.")
        return path
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"--model {model} does not exist; check the path.")
    return _download(model)


@_cache
def _download(model: str) -> Path:
    """The hub's snapshot of a model, without the second copy of the weights that some repositories hold."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["consolidated*", "*/*"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            f"--model {model} is neither a local path nor a model the hub could give ({reason}); "
            "check the spelling and the connection."
        ) from error


def open_source(path: Path) -> SafetensorsSource | GGUFSource:
    """The weights of a resolved model."""
    return GGUFSource(path) if path.suffix == ".gguf" else SafetensorsSource(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); download the model again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object; download the model again.")
    return content


# ---- config and tokenizer ---------------------------------------------------------------------------------


def load_config(model: str) -> Any:
    """The transformers config of a model; custom code is never run."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = metadata_directory(model)
    declared = _read_json(path / "config.json")
    if "auto_map" in declared:
        raise InputError(f"--model {model} brings code of its own to run; only built-in architectures load.")
    try:
        return AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise InputError(f"{path / 'config.json'} describes no model that loads: {_first_line(error)}.") from error


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer with its chat template, if it has one."""
    from transformers import AutoTokenizer

    path = metadata_directory(model)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"--model {model} has no tokenizer that loads: {_first_line(error)}.") from error


def metadata_directory(model: str) -> Path:
    """The directory with config.json and the tokenizer; for a .gguf they are converted once and kept."""
    path = resolve_model(model)
    if path.suffix != ".gguf":
        return path
    target = cache_directory() / f"gguf-{_fingerprint([path])}"
    if not target.is_dir():
        from transformers import AutoConfig, AutoTokenizer

        GGUFSource(path)  # names a damaged file or an unknown architecture before transformers trips on it
        with new_directory(target) as staging:
            AutoConfig.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(staging)
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(staging)
    return target


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# ---- the cache --------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """$QLORA_CACHE, or ~/.cache/qlora."""
    return Path(os.environ.get("QLORA_CACHE") or "~/.cache/qlora").expanduser()


def _fingerprint(files: Iterable[Path], *parts: object) -> str:
    """Identity of source files (path, size, time of change) and of what is done with them."""
    digest = hashlib.sha256(repr((CACHE_FORMAT, *parts)).encode())
    for file in files:
        status = file.resolve().stat()
        digest.update(f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _save_quantized(model: Any, quant: QuantConfig, target: Path) -> None:
    """Write a quantized model as a bitsandbytes checkpoint that transformers could load too."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    tied = set(_tied_names(model))
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            tensors.update(
                {f"{name}.weight{k}": v for k, v in packed_tensors(cast(Params4bit, module.weight)).items()}
            )
    for name, parameter in model.named_parameters():
        if name not in tensors and name not in tied:
            tensors[name] = parameter.detach()
    with new_directory(target) as staging:
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
            staging / "model.safetensors",
            metadata={"format": "pt"},
        )
        description = model.config.to_dict()
        description["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quant.quant_type,
            "bnb_4bit_use_double_quant": quant.double_quant,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
        (staging / "config.json").write_text(json.dumps(description, indent=2, default=str))


# ---- loading ----------------------------------------------------------------------------------------------


def load_base_model(
    model: str,
    use_4bit: bool = True,
    quant: QuantConfig | None = None,
    compute_dtype: str = "auto",
    device: torch.device | str = "cpu",
    cache: bool = True,
) -> Any:
    """Load a frozen base model for training or generation.

    Args:
        model: Hugging Face directory, hub id, or .gguf file.
        use_4bit: quantize the blocks' linear layers as `quant` says; False keeps them in bf16.
        compute_dtype: "auto" (measured on the device), "float32" or "bfloat16": dtype of activations.
        cache: keep the quantized weights on disk and read them from there the next time.
    Returns:
        A transformers causal LM in eval mode, nothing trainable, with two attributes more: `compute_dtype`, and
        `quantization`, the QuantConfig of its weights (None for a 16-bit base).
    Raises:
        InputError: no such model; or all missing, extra and misshapen weights.
    """
    quant = quant or QuantConfig()
    device = torch.device(device)
    path = resolve_model(model)
    files = _weight_files(path)
    cached = cache_directory() / f"base-{_fingerprint(files, quant)}" if use_4bit and cache else None
    if cached is not None and cached.is_dir():
        try:
            source: SafetensorsSource | GGUFSource = SafetensorsSource(cached, map_files=True)
        except InputError as error:
            raise InputError(f"The cached model {cached} is damaged; delete it and it is made again.") from error
    else:
        source = open_source(path)
        if source.packed:  # it is what a cache would hold
            cached = None
            if not use_4bit:
                raise InputError(f"--model {model} is stored in 4 bits; leave out --no-4bit.")
    network = empty_model(model)
    dtype = _settle_compute_dtype(compute_dtype, device, cache)
    _fill(network, source, use_4bit, quant, device)
    if cached is not None and not cached.is_dir():
        _save_quantized(network, quant, cached)
    _compute_in(network, dtype)
    network.compute_dtype = dtype
    network.quantization = _quantization_of(network)
    network.generation_config = _generation_config(network, metadata_directory(model))
    return network.eval()


def _settle_compute_dtype(name: str, device: torch.device, cache: bool) -> torch.dtype:
    """`choose_compute_dtype`, measured once per machine: a second measurement on a busy one could differ."""
    if name != "auto" or device.type == "cuda" or not cache:
        return choose_compute_dtype(name, device, MEASURED_WIDTH)
    machine = f"{platform.node()}-{platform.machine()}-{torch.__version__}-{torch.get_num_threads()}"
    remembered = cache_directory() / f"compute-dtype-{machine}"
    if not remembered.is_file():
        remembered.parent.mkdir(parents=True, exist_ok=True)
        with new_file(remembered) as file:
            file.write_text(str(choose_compute_dtype(name, device, MEASURED_WIDTH)).removeprefix("torch."))
    return choose_compute_dtype(remembered.read_text(), device, MEASURED_WIDTH)


def weight_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, tied ones once, in the order of `dequantized_weights`."""
    tied = _tied_names(network)
    return {name: tuple(p.shape) for name, p in network.named_parameters() if name not in tied}


def dequantized_weights(
    model: str, quant: QuantConfig | None, original: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a model by name, one at a time, as `load_base_model` would compute with it.

    Args:
        quant: how the blocks are quantized; None for a 16-bit base.
        original: give the stored weight itself, not the one its 4-bit codes stand for.
    Yields:
        (name, fp32 tensor), names as transformers saves them, tied ones once.
    Raises:
        InputError: as `load_base_model`; or the original of a checkpoint that is stored in 4 bits.
    """
    source = open_source(resolve_model(model))
    network = empty_model(model)
    stored = _match_names(network, weight_shapes(network), source)
    blocks = _names_to_quantize(network, source) if quant is not None else set()
    for name in stored:
        packed = _read_packed(source, stored[name], torch.device("cpu"))
        if packed is not None and original:
            raise InputError(f"--model {model} is stored in 4 bits, so there is no original to merge onto.")
        if packed is None:
            tensor = source.read(stored[name])
            if quant is None or name not in blocks or original:
                yield name, tensor.float()
                continue
            packed = quantize_weight(tensor, quant)
            del tensor
        yield name, dequantize_weight(packed, torch.float32)


def _names_to_quantize(network: Any, source: SafetensorsSource | GGUFSource) -> set[str]:
    """The weights to bring into 4 bits: linear layers, the output head left out.

    None in a checkpoint that is quantized already: what it keeps in 16 bits it keeps on purpose.
    """
    if source.packed:
        return set()
    head = network.get_output_embeddings()
    linears = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not linears:
        kind = network.config.model_type
        raise InputError(f"A {kind} model has no plain linear layers to quantize; pass --no-4bit.")
    return {f"{name}.weight" for name in linears}


def _read_packed(source: SafetensorsSource | GGUFSource, key: str, device: torch.device) -> Params4bit | None:
    """The 4-bit weight stored under `key` and its companions, or None if it is stored dense."""
    if key not in source.packed:
        return None
    suffixes = [name.removeprefix(key) for name in source.names if name.startswith(key + ".")]
    return unpack_tensors({suffix: source.read(key + suffix) for suffix in ["", *suffixes]}, device)


def empty_model(model: str) -> Any:
    """The model's modules with parameters on the meta device and real (computed) buffers."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from qlora.attention import ATTENTION_NAME, register_attention

    register_attention()
    config = load_config(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        try:
            return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
        except ValueError as error:
            raise InputError(f"This is no causal language model that loads: {_first_line(error)}.") from error


def _tied_names(network: Any) -> list[str]:
    """Parameters that are another one's alias (lm_head when embeddings are tied)."""
    if not network.config.tie_word_embeddings:
        return []
    return list(getattr(network, "_tied_weights_keys", None) or ())


def _fill(
    network: Any,
    source: SafetensorsSource | GGUFSource,
    use_4bit: bool,
    quant: QuantConfig,
    device: torch.device,
) -> None:
    """Read every parameter into its stored form; norms and biases in fp32."""
    from transformers.pytorch_utils import Conv1D

    tied = _tied_names(network)
    stored = _match_names(network, weight_shapes(network), source)
    blocks = _names_to_quantize(network, source) if use_4bit else set()
    linears = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    head = network.get_output_embeddings()

    def read(name: str) -> Tensor:
        return source.read(stored[name]).to(device)

    for name in stored:
        module_name = name.rpartition(".")[0]
        if module_name in linears:
            continue
        tensor = read(name)
        stays_16bit = isinstance(network.get_submodule(module_name), (nn.Embedding, Conv1D)) and tensor.dim() == 2
        tensor = tensor.to(torch.bfloat16 if stays_16bit else torch.float32)
        _set(network, name, nn.Parameter(tensor, requires_grad=False))
    for name, module in linears.items():
        bias = read(f"{name}.bias").float() if module.bias is not None else None
        if f"{name}.weight" in tied:
            weight = network.get_input_embeddings().weight.data
            _set(network, name, Linear16bit(weight, bias))
            network.get_submodule(name).weight = network.get_input_embeddings().weight
        else:
            packed = _read_packed(source, stored[f"{name}.weight"], device)
            if packed is None and f"{name}.weight" in blocks:
                packed = quantize_weight(read(f"{name}.weight"), quant)
            if packed is not None and module is not head:
                _set(network, name, Linear4bit(packed, bias))
            elif packed is not None:  # the loss needs the head as a matrix
                _set(network, name, Linear16bit(dequantize_weight(packed, torch.float32), bias))
            else:
                _set(network, name, Linear16bit(read(f"{name}.weight").to(torch.bfloat16), bias))
    network.to(device)  # buffers: everything else lies there already


def _match_names(
    network: Any, expected: dict[str, tuple[int, ...]], source: SafetensorsSource | GGUFSource
) -> dict[str, str]:
    """Parameter name -> stored name, or one error that lists everything missing, extra or misshapen."""
    prefix = network.base_model_prefix + "."
    bare = not any(name.startswith(prefix) for name in source.names)  # GPT-2's files leave the prefix out
    stored = {name: name.removeprefix(prefix) if bare else name for name in expected}
    problems = [f"missing {name}" for name, key in stored.items() if key not in source.names]
    for name, key in stored.items():
        if key in source.names and source.shape(key) != expected[name]:
            problems.append(f"{name} is {source.shape(key)} but should be {expected[name]}")
    companions = [key + part for key in source.packed for part in (".absmax", ".quant_map")]
    problems += [f"missing {name}" for name in companions if name not in source.names]
    known = set(stored.values()) | set(_tied_names(network))
    for name in source.names - known:
        if name.partition(".weight.")[0] + ".weight" not in source.packed and not name.endswith(STORED_BUFFERS):
            problems.append(f"unexpected {name}")
    if problems:
        raise InputError(f"The weights in {source.path} do not fit the config: {'; '.join(sorted(problems))}.")
    return stored


def _set(network: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, value)


def _quantization_of(network: Any) -> QuantConfig | None:
    """Read from the weights themselves: an already quantized checkpoint brings its own."""
    for module in network.modules():
        if isinstance(module, Linear4bit):
            return quantization_of(cast(Params4bit, module.weight))
    return None


def _compute_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Make activations `dtype`: embeddings cast what they give out, norms take the dtype itself."""
    from transformers.pytorch_utils import Conv1D

    for module in network.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _module, _args, output: output.to(dtype))
        elif isinstance(module, Conv1D):
            module.__class__ = cast(Any, frozen_conv1d())
        elif not isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def _generation_config(network: Any, directory: Path) -> Any:
    from transformers import GenerationConfig

    if (directory / "generation_config.json").is_file():
        try:
            return GenerationConfig.from_pretrained(directory)
        except (ValueError, TypeError, AttributeError, OSError) as error:
            file = directory / "generation_config.json"
            raise InputError(f"{file} is not valid: {_first_line(error)}; mend or remove it.") from error
    return GenerationConfig.from_model_config(network.config)
