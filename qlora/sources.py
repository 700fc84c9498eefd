"""Where a model's weights come from: a Hugging Face directory, a .gguf file, or the hub.

Files of others may hold anything. Each is checked before it is used: whole, no pickle, no path that leads out
of its directory, no size that its bytes cannot have; an error names the file and the value.

A source gives every weight under the name it has in our modules. Where the files say it otherwise (an expert's
matrices in a mixture of experts, the tensors of a .gguf) the names are translated here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import cache as _cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.errors import InputError, is_out_of_memory
from qlora.files import explain, is_file_name, read_json
from qlora.quantize import packed_shape

REMEDY = "download the model again"
GGUF_ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}  # name -> rows of q and k are permuted
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # a narrower one needs scales, which no plain weight has
MAX_STACKED = 2**14  # experts in one tensor
MAX_HEADER = 100_000_000  # bytes; safetensors opens no file with a longer one
SMALL = 2**16  # bytes: more than a norm has, or any part of a 4-bit weight but its codes and scales
# Mixtral's files keep the names of its first release; today's modules have those of other mixtures of experts.
MIXTRAL_NAMES = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class SafetensorsSource:
    """Weights of a Hugging Face directory: model.safetensors, or shards and their index.

    Tensors are read into fresh memory, gone when dropped; with `map_files` they are views of the mapped files.

    Args:
        remedy: what to do about a damaged file, for the error.
    """

    def __init__(self, directory: Path, map_files: bool = False, remedy: str = "download it again") -> None:
        from safetensors import SafetensorError, safe_open

        self.path, self.remedy = directory, remedy
        self.files = weight_files(directory)
        # name -> file, key in it, index in the tensor there
        self._places: dict[str, tuple[Any, str, tuple[Any, ...]]] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            try:
                if map_files:
                    _fetch_beginnings(file)
                handle = safe_open(file, framework="pt", backend="mmap" if map_files else "pread")
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{file} is not a whole safetensors file ({explain(error)}); {remedy}."
                ) from error
            for key in handle.keys():  # noqa: SIM118
                for name, index in _names_of(key, handle).items():
                    self._places[name] = (handle, key, index)
                    self._file_of[name] = file
        self.names = set(self._places)
        _check_names(self.names, directory)
        marker = ".quant_state.bitsandbytes__"
        self.packed = {name.partition(marker)[0]: name for name in self.names if marker in name}
        self._parts: dict[str, list[str]] = {}  # of a packed weight: its own name and its companions'
        for name in self.names:
            owner = name.partition(".weight.")[0] + ".weight" if ".weight." in name else name
            if owner in self.packed:
                self._parts.setdefault(owner, []).append(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape: that of a 4-bit weight is recorded beside its codes."""
        if name in self.packed:
            quant_state = self.read(self.packed[name])
            try:
                return packed_shape(quant_state)
            except ValueError as error:
                raise InputError(f"{self.path}: {name} is damaged ({explain(error)}); {self.remedy}.") from error
        file, key, index = self._places[name]
        whole = tuple(file.get_slice(key).get_shape())
        if not index:
            return whole
        rows = index[1] if len(index) > 1 else slice(0, whole[1])
        return (rows.stop - rows.start, *whole[2:])

    def is_float(self, name: str) -> bool:
        """Whether the values are floating point numbers, as a weight's are (a 4-bit one's stand for such)."""
        file, key, _ = self._places[name]
        return name in self.packed or file.get_slice(key).get_dtype() in FLOAT_DTYPES

    def view(self, name: str) -> Tensor:
        """`read`, but of pages that are fetched when they are touched, and let go with the tensor."""
        from safetensors import safe_open

        _, key, index = self._places[name]
        return self._read(name, safe_open(self._file_of[name], framework="pt", backend="mmap"), key, index)

    def read(self, name: str) -> Tensor:
        return self._read(name, *self._places[name])

    def _read(self, name: str, file: Any, key: str, index: tuple[Any, ...]) -> Tensor:
        from safetensors import SafetensorError

        try:
            return file.get_slice(key)[index] if index else file.get_tensor(key)
        # TypeError and RuntimeError: shapes that safetensors lets pass and torch cannot make.
        except (SafetensorError, OSError, TypeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise InputError(f"{self.path}: {name} cannot be read ({explain(error)}); {self.remedy}.") from error

    def read_packed(self, name: str, as_views: bool = False) -> dict[str, Tensor]:
        """The tensors of a 4-bit weight, by bitsandbytes' suffixes ("" for the codes)."""
        read = self.view if as_views else self.read
        return {part.removeprefix(name): read(part) for part in sorted(self._parts[name])}


def _fetch_beginnings(file: Path) -> None:
    """Read from the disk what loading looks into in a mapped file: small tensors, and the start of large ones.

    Through the mapping, a page that is missing comes with its surroundings, as far as the system reads ahead:
    where that is megabytes, some hundred looks bring in most of a 7B model. The start: torch (2.13) looks at the
    first byte of every tensor that safetensors makes.
    """
    from safetensors import safe_open

    with open(file, "rb", buffering=0) as raw:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
        size = int.from_bytes(raw.read(8), "little")
        header = raw.read(min(size, MAX_HEADER))
        with safe_open(file, framework="pt"):  # refuses a header that is none
            tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for tensor in tensors.values():
            start, end = tensor["data_offsets"]
            raw.seek(8 + size + start)
            raw.read(end - start if end - start <= SMALL else 1)


def _names_of(key: str, file: Any) -> dict[str, tuple[Any, ...]]:
    """Names of the weights that one stored tensor holds -> their index in it, () for all of it.

    One and the same but for experts: E of them may be stacked, gate over up, as transformers holds them.
    """
    prefix, _, part = key.rpartition(".experts.")
    if part in ("gate_up_proj", "down_proj"):
        shape = file.get_slice(key).get_shape()
        if len(shape) == 3 and shape[0] <= MAX_STACKED and 0 not in shape:
            half = shape[1] // 2
            rows = {"gate_proj": (slice(0, half),), "up_proj": (slice(half, shape[1]),)}
            matrices = rows if part == "gate_up_proj" else {part: ()}
            return {
                f"{prefix}.experts.{expert}.{name}.weight": (expert, *index)
                for expert in range(shape[0])
                for name, index in matrices.items()
            }
    return {module_name(key): ()}


def module_name(name: str) -> str:
    """The name that a stored tensor has in our modules; the inverse of `saved_name`."""
    if ".block_sparse_moe." in name:
        for theirs, ours in MIXTRAL_NAMES.items():
            name = name.replace(theirs, ours)
    return name


def saved_name(name: str, model_type: str) -> str:
    """The name that transformers saves a parameter of our modules under."""
    if model_type == "mixtral" and ".mlp." in name:
        for theirs, ours in MIXTRAL_NAMES.items():
            name = name.replace(ours, theirs)
    return name


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights, all of them there."""
    if path.suffix == ".gguf":
        return [path]
    index = path / "model.safetensors.index.json"
    files = _indexed_files(index) if index.is_file() else [path / "model.safetensors"]
    for file in files:
        if file.is_file():
            continue
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles and not index.is_file():
            raise InputError(
                f"{file} is missing, and {pickles[0]} is a pickle, which can run code and is never loaded; "
                "convert the model to safetensors."
            )
        raise InputError(f"{file} is missing; a model directory needs its safetensors weights complete.")
    return files


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index, REMEDY).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map from tensors to files; download the model again.")
    elsewhere = [shard for shard in weight_map.values() if not is_file_name(shard)]
    if elsewhere:
        raise InputError(
            f"{index} names a shard outside its directory, {elsewhere[0]!r:.60}; the file is not to be trusted."
        )
    return [index.parent / shard for shard in sorted(set(weight_map.values()))]


def _check_names(names: Iterable[str], path: Path) -> None:
    """Tensor names go into messages: nothing that moves a terminal's cursor."""
    for name in names:
        if not name.isprintable() or not name:
            raise InputError(f"{path} holds a tensor named {name!r:.60}; the file is not to be trusted.")


class GGUFSource:
    """Weights of a .gguf file under their Hugging Face names, dequantized one at a time.

    llama.cpp stores the rows of q and k in the order of its own rotary embedding; they are put back into
    Hugging Face's order (the llama architecture only; the Qwen ones keep theirs).
    """

    def __init__(self, file: Path) -> None:
        import numpy as np
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self.path, self.remedy = file, "download it again"
        self.packed: dict[str, str] = {}
        try:
            with np.errstate(over="ignore"):  # a damaged offset; it is checked, and needs no warning
                reader = _bounded_reader()(str(file))
            architecture = _gguf_value(reader, "general.architecture", str)
            if not architecture.isprintable():
                raise ValueError(f"general.architecture is {architecture!r:.60}")
        # A damaged length or type sends the reader into any of these.
        except (ValueError, LookupError, TypeError, ArithmeticError, OSError, RecursionError) as error:
            raise InputError(f"{file} is not a whole GGUF file ({explain(error)}); download it again.") from error
        if architecture not in GGUF_ARCHITECTURES:
            known = ", ".join(GGUF_ARCHITECTURES)
            raise InputError(f"{file} holds a {architecture:.60} model; GGUF bases of {known} can be loaded.")
        self._permuted = GGUF_ARCHITECTURES[architecture]
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
        if "rope_freqs.weight" in tensors or (scaling is not None and scaling.contents() != "none"):
            raise InputError(  # transformers' reader leaves both out, so the model would compute other numbers
                f"{file} scales its rotary embedding, which is not read from GGUF; use the model's safetensors."
            )
        _check_names(tensors, file)
        try:
            num_layers = _gguf_value(reader, f"{architecture}.block_count", int)
            heads = _gguf_value(reader, f"{architecture}.attention.head_count", int)
            kv_name = f"{architecture}.attention.head_count_kv"
            kv_heads = _gguf_value(reader, kv_name, int) if kv_name in reader.fields else heads
            self._heads = {"q": heads, "k": kv_heads}
            if not 0 < num_layers <= len(tensors) or min(self._heads.values()) < 1:
                raise ValueError(f"{num_layers} blocks, {heads} heads, {len(tensors)} tensors")
        except ValueError as error:
            raise InputError(f"{file} is not a whole GGUF file ({explain(error)}); download it again.") from error
        arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
        self._tensors: dict[str, Any] = {}
        name_map = get_tensor_name_map(arch, num_layers)
        for name in _decoder_names(num_layers):
            gguf_name = name_map.get_name(name.rpartition(".")[0])
            stored = f"{gguf_name}.{name.rpartition('.')[2]}"
            if stored in tensors:
                self._tensors[name] = tensors.pop(stored)
        # What has no Hugging Face name keeps its own, and is reported as unexpected.
        self._tensors.update(tensors)
        self.names = set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def is_float(self, name: str) -> bool:
        """`read` gives fp32 of whatever it can read."""
        return name in self._tensors

    def view(self, name: str) -> Tensor:
        """As `read`: what a file holds in other blocks cannot be looked at."""
        return self.read(name)

    def read(self, name: str) -> Tensor:
        """fp32, dequantized from GGUF's blocks. Read from the file, not mapped."""
        import numpy as np
        from gguf import dequantize

        stored = self._tensors[name]
        raw = np.fromfile(self.path, stored.data.dtype, stored.data.size, offset=stored.data_offset)
        if raw.size != stored.data.size:
            raise InputError(f"{self.path} ends inside {name}; download it again.")
        try:
            tensor = torch.from_numpy(dequantize(raw.reshape(stored.data.shape), stored.tensor_type))
            tensor = tensor.reshape(self.shape(name))
            for letter, heads in self._heads.items():
                if self._permuted and f".self_attn.{letter}_proj." in name:
                    rows = tensor.shape[0]
                    tensor = tensor.view(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        except (ValueError, TypeError, RuntimeError) as error:  # a type, or heads, that do not go with the shape
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"{self.path}: {name} cannot be read ({explain(error)}); download it again."
            ) from error
        return tensor


@_cache
def _bounded_reader() -> Any:
    """gguf's reader, with an end: the original reads past it, and a damaged length makes it loop for years."""
    import numpy as np
    from gguf import GGUFReader

    class BoundedReader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            # Reading through the map's own class takes twice as long.
            self.data = self.data.view(np.ndarray)  # type: ignore[assignment]
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, but announces data up to {end}")
            return super()._get(offset, dtype, count, override_order)

    return BoundedReader


def _gguf_value(reader: Any, name: str, kind: type) -> Any:
    """A metadata field of the type it should have."""
    value = reader.fields[name].contents() if name in reader.fields else None
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r:.60}")
    return value


def _decoder_names(num_layers: int) -> Iterable[str]:
    yield from ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    parts = [f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")]
    parts += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    parts += [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    parts += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    for layer in range(num_layers):
        yield from (f"model.layers.{layer}.{part}" for part in parts)


def resolve_model(model: str, weights: bool = True) -> Path:
    """A local directory or .gguf file for a path or hub id (downloaded through huggingface_hub).

    Args:
        weights: False leaves them on the hub.
    Raises:
        InputError: neither a path nor an id that the hub knows, or the hub is out of reach.
    """
    path = Path(os.path.expanduser(model))  # leaves "~nobody" as it is, where pathlib raises
    if path.is_dir() or path.is_file():
        if path.is_file() and path.suffix != ".gguf":
            raise InputError(f"--model {model} is a file but no .gguf; give the model's directory instead.")
        if path.is_dir() and not (path / "config.json").is_file():
            raise InputError(f"--model {model} has no config.json; give a Hugging Face model directory.")
        return path
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"--model {model} does not exist; check the path.")
    return _download(model, weights)


@_cache
def _download(model: str, weights: bool) -> Path:
    """The hub's snapshot of a model, without the second copy of the weights that some repositories hold.

    The weights are those of the commit that the config was taken from.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    revision = _download(model, False).name if weights else None  # a snapshot's directory is called by its commit
    patterns = ["*.json", "*.txt", "*.jinja", "tokenizer.model", *(["*.safetensors"] if weights else [])]
    others = ["consolidated*", "*/*"]
    try:
        found = snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=others)
        return Path(found)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            f"--model {model} is neither a local path nor a model the hub could give ({reason}); "
            "check the spelling and the connection."
        ) from error


def open_source(path: Path) -> SafetensorsSource | GGUFSource:
    """The weights of a resolved model."""
    return GGUFSource(path) if path.suffix == ".gguf" else SafetensorsSource(path)
