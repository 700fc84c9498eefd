"""Weights of a .gguf file, under the names of our modules."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache as _cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.model.families import gguf_forms
from qlora.model.rotary import to_halves
from qlora.model.safetensors_source import check_finite, check_names
from qlora.system.errors import InputError
from qlora.system.memory import is_out_of_memory
from qlora.system.wording import explain


class GGUFSource:
    """Weights of a .gguf file under their Hugging Face names, dequantized one at a time.

    llama.cpp stores the rows of q and k in the order of its rotary embedding; they are restored to Hugging Face's
    order (only for the llama architecture; Qwen's keep theirs).
    """

    def __init__(self, file: Path) -> None:
        import numpy as np
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self.path, self.remedy = file, "download it again"
        self.packed: dict[str, str] = {}
        try:
            with np.errstate(over="ignore"):  # a damaged offset; checked below, so no warning
                reader = _bounded_reader()(str(file))
            _check_whole(reader, file)
            architecture = _gguf_value(reader, "general.architecture", str)
            if not architecture.isprintable():
                raise ValueError(f"general.architecture is {architecture!r:.60}")
        # A damaged length or type sends the reader into any of these.
        except InputError:
            raise
        except (ValueError, LookupError, TypeError, ArithmeticError, OSError, RecursionError) as error:
            raise InputError(
                f"{file} is not a complete GGUF file ({explain(error)}); download it again."
            ) from error
        forms = gguf_forms()
        if architecture not in forms:
            known = ", ".join(forms)
            raise InputError(f"{file} holds a {architecture:.60} model; GGUF bases of {known} can be loaded.")
        self._interleaved = forms[architecture].rotary == "interleaved"
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
        if "rope_freqs.weight" in tensors or (scaling is not None and scaling.contents() != "none"):
            raise InputError(  # transformers' reader drops both, so the model would compute other numbers
                f"{file} scales its rotary embedding, which is not read from GGUF; use the model's safetensors."
            )
        check_names(tensors, file)
        try:
            num_layers = _gguf_value(reader, f"{architecture}.block_count", int)
            heads = _gguf_value(reader, f"{architecture}.attention.head_count", int)
            kv_name = f"{architecture}.attention.head_count_kv"
            kv_heads = _gguf_value(reader, kv_name, int) if kv_name in reader.fields else heads
            self._heads = {"q": heads, "k": kv_heads}
            if not 0 < num_layers <= len(tensors) or min(self._heads.values()) < 1:
                raise ValueError(f"{num_layers} blocks, {heads} heads, {len(tensors)} tensors")
        except ValueError as error:
            raise InputError(
                f"{file} is not a complete GGUF file ({explain(error)}); download it again."
            ) from error
        arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
        self._tensors: dict[str, Any] = {}
        name_map = get_tensor_name_map(arch, num_layers)
        for name in _decoder_names(num_layers):
            gguf_name = name_map.get_name(name.rpartition(".")[0])
            stored = f"{gguf_name}.{name.rpartition('.')[2]}"
            if stored in tensors:
                self._tensors[name] = tensors.pop(stored)
        # A tensor without a Hugging Face name keeps its own and is reported as unexpected.
        self._tensors.update(tensors)
        self.names = set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def is_float(self, name: str) -> bool:
        """Always true: `read` returns fp32."""
        return name in self._tensors

    def view(self, name: str) -> Tensor:
        """Same as `read`: GGUF's blocks cannot be viewed as a tensor."""
        return self.read(name)

    def read(self, name: str) -> Tensor:
        """Read a weight from the file, not mapped, and dequantize it to fp32."""
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
                if self._interleaved and f".self_attn.{letter}_proj." in name:
                    tensor = to_halves(tensor, heads)
        except (ValueError, TypeError, RuntimeError) as error:  # a type or head count that does not fit the shape
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"{self.path}: {name} cannot be read ({explain(error)}); download it again."
            ) from error
        check_finite(tensor, name, self.path, self.remedy)
        return tensor


@_cache
def _bounded_reader() -> Any:
    """gguf's reader with bounds checks: the original reads past the end, and a damaged length makes it loop."""
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


def _check_whole(reader: Any, file: Path) -> None:
    """InputError for one of the parts into which llama.cpp splits a large model."""
    number, count = (reader.fields[f"split.{key}"].contents() if f"split.{key}" in reader.fields else 0
                     for key in ("no", "count"))  # fmt: skip
    if count > 1:
        raise InputError(
            f"{file} is part {number + 1} of {count}; join them with llama.cpp (llama-gguf-split --merge), or use "
            "the model's safetensors."
        )


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
