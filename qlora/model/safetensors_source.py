"""Read a model's weights from a Hugging Face directory.

Files are untrusted. Each is checked before use: complete, no pickle, no path out of its directory, no size that
its bytes cannot have; an error names the file and the value.

A source gives every weight its name in our modules, translated if the files use another (an expert's matrices in a
mixture of experts).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.model.families import FAMILIES
from qlora.quant.storage import packed_shape
from qlora.system.errors import InputError
from qlora.system.files import is_file_name, read_json
from qlora.system.memory import is_out_of_memory
from qlora.system.wording import explain

INDEX = "model.safetensors.index.json"
REMEDY = "download the model again"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # narrower ones need scales, which plain weights lack
MAX_STACKED = 2**14  # experts in one tensor
MAX_HEADER = 100_000_000  # bytes; safetensors rejects a longer one
SMALL = 2**16  # bytes: larger than a norm or any part of a 4-bit weight except codes and scales
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class SafetensorsSource:
    """Weights of a Hugging Face directory: model.safetensors, or shards and their index.

    Tensors are read into fresh memory, freed when dropped; with `map_files` they are views of the mapped files.

    Args:
        remedy: what to do about a damaged file, for the error.
    """

    def __init__(self, directory: Path, map_files: bool = False, remedy: str = "download it again") -> None:
        from safetensors import SafetensorError, safe_open

        self.path, self.remedy, self.is_mapped = directory, remedy, map_files
        self.files = weight_files(directory)
        places = _weight_map(directory) or {}
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
                    f"{file} is not a complete safetensors file ({explain(error)}); {remedy}."
                ) from error
            for key in handle.keys():  # noqa: SIM118
                for name, index in _names_of(key, handle).items():
                    if name in self._places:
                        both = f"{self._file_of[name].name} and {file.name}"
                        raise InputError(f"{directory}: {name[:200]!r:.202} is in both {both}; {remedy}.")
                    self._places[name] = (handle, key, index)
                    self._file_of[name] = file
                if key in places and places[key] != file.name:
                    raise InputError(
                        f"{directory / INDEX} says that {key[:200]!r:.202} is in {places[key]}, but it is in "
                        f"{file.name}; {remedy}."
                    )
        self.names = set(self._places)
        check_names(self.names, directory)
        marker = ".quant_state.bitsandbytes__"
        self.packed = {name.partition(marker)[0]: name for name in self.names if marker in name}
        self._parts: dict[str, list[str]] = {}  # packed weight -> its own name and its companions'
        for name in self.names:
            owner = name.partition(".weight.")[0] + ".weight" if ".weight." in name else name
            if owner in self.packed:
                self._parts.setdefault(owner, []).append(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape; a 4-bit weight's is stored with its codes."""
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
        """Whether the values are floating point, as a weight's are (also a 4-bit one's)."""
        file, key, _ = self._places[name]
        return name in self.packed or file.get_slice(key).get_dtype() in FLOAT_DTYPES

    def view(self, name: str) -> Tensor:
        """Like `read`, but as mapped pages, loaded when touched and freed with the tensor."""
        from safetensors import safe_open

        _, key, index = self._places[name]
        return self._read(name, safe_open(self._file_of[name], framework="pt", backend="mmap"), key, index)

    def read(self, name: str) -> Tensor:
        tensor = self._read(name, *self._places[name])
        if not self.is_mapped:  # mapped files are ours, checked when they were written
            check_finite(tensor, name, self.path, self.remedy)
        return tensor

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
    """Read in advance what loading touches in a mapped file: small tensors, and the start of large ones.

    A page fault in the mapping also reads ahead: if by megabytes, a few hundred faults load most of a 7B model.
    torch (2.13) touches the first byte of every tensor that safetensors makes.
    """
    from safetensors import safe_open

    with open(file, "rb", buffering=0) as raw:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        size = int.from_bytes(raw.read(8), "little")
        header = raw.read(min(size, MAX_HEADER))
        with safe_open(file, framework="pt"):  # rejects an invalid header
            tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for tensor in tensors.values():
            start, end = tensor["data_offsets"]
            raw.seek(8 + size + start)
            raw.read(end - start if end - start <= SMALL else 1)


def _names_of(key: str, file: Any) -> dict[str, tuple[Any, ...]]:
    """Names of the weights in one stored tensor -> their index in it, () for the whole tensor.

    A tensor holds one weight, except experts: E may be stacked, gate over up, as in transformers.
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
    """A stored tensor's name in our modules; the inverse of `saved_name`."""
    for family in FAMILIES.values():
        if family.file_names and family.file_names[0][1] in name:
            for ours, theirs in family.file_names:
                name = name.replace(theirs, ours)
    return name


def saved_name(name: str, model_type: str) -> str:
    """The name under which transformers saves a parameter of our modules."""
    family = FAMILIES.get(model_type)
    if family and family.file_names and family.file_names[0][0] in name:
        for ours, theirs in family.file_names:
            name = name.replace(ours, theirs)
    return name


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights; all exist."""
    if path.suffix == ".gguf":
        return [path]
    index, places = path / INDEX, _weight_map(path)
    files = [path / "model.safetensors"] if places is None else [path / s for s in sorted(set(places.values()))]
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


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Tensor -> file, from a directory's index; None: it has none. A tensor may be listed and nowhere."""
    index = directory / INDEX
    if not index.is_file():
        return None
    weight_map = read_json(index, REMEDY).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map from tensors to files; download the model again.")
    elsewhere = [shard for shard in weight_map.values() if not is_file_name(shard)]
    if elsewhere:
        raise InputError(
            f"{index} names a shard outside its directory, {elsewhere[0]!r:.60}; the file is not to be trusted."
        )
    return weight_map


def check_finite(tensor: Tensor, name: str, path: Path, remedy: str) -> None:
    """Refuse a weight with NaN or infinity, which every loss then has. Reads the tensor once.

    Raises:
        InputError: names it, and how many of its values.
    """
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return
    if not tensor.sum(dtype=torch.float32).isfinite() and (count := int((~tensor.isfinite()).sum())):
        raise InputError(f"{path}: {name} has {count} of {tensor.numel()} values that are not finite; {remedy}.")


def check_names(names: Iterable[str], path: Path) -> None:
    """Reject tensor names that could control a terminal: they appear in messages."""
    for name in names:
        if not name.isprintable() or not name:
            raise InputError(f"{path} holds a tensor named {name!r:.60}; the file is not to be trusted.")
