"""Load a frozen base model: empty modules first, then one tensor at a time in its final form.

    source (directory, hub id or .gguf)  ->  read one tensor  ->  quantize it  ->  into the cache  ->  next
    cache  ->  memory-mapped, every start, the first one too; verified in a thread while the modules are made

Only the current tensor is in memory in full precision and, while the cache is written, one shard of the quantized
model. A mapped weight is read from disk on first use; as it is never written to, the OS can evict and reload it.

Linear layers inside the blocks (also Conv1D and experts' matrices) become 4-bit (`use_4bit`) or bf16; embeddings
and the output head stay in bf16; norms, biases and routers take the compute dtype. Embeddings cast their output
and our linear layers compute in their input's dtype, so activations never depend on the stored dtype.

GPT-2's Conv1D holds W^T, (in, out). In 4 bits it becomes a Linear4bit, (out, in), as in bitsandbytes; in 16 bits
and in files it keeps its own layout.

The cache has the layout of transformers' bitsandbytes checkpoints, so it and an already quantized checkpoint load
the same way.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.model.base import BaseInfo
from qlora.model.block import decoder_layers, fuse_blocks
from qlora.model.bounds import check_lookup
from qlora.model.cache import cached_base, check_calibration, open_cache
from qlora.model.cache_writer import write_cache
from qlora.model.hf_config import declared_quantization, generation_config_of, load_config, metadata_directory
from qlora.model.resolve import open_source, resolve_model
from qlora.model.skeleton import EmptySource, Source, empty_model, matrix_layers, set_tensor, tied_names
from qlora.model.weights import stored_weights
from qlora.quant.layers import FrozenMatrix, Linear4bit, Linear16bit, frozen_conv1d
from qlora.quant.library import Params4bit
from qlora.quant.weight import QuantConfig, quantization_of
from qlora.system.cache import cache_directory, make_cache
from qlora.system.device import choose_compute_dtype
from qlora.system.digests import build_verified, make_verified
from qlora.system.errors import InputError
from qlora.system.files import new_file

MEASURED_WIDTH = 1024  # of the matrix product timed to decide between fp32 and bf16
Cut: TypeAlias = Callable[[str, Tensor], Tensor]


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
        cut: called with each weight's name and final form, returns the part to keep here.
    Returns:
        A transformers causal LM in eval mode, nothing trainable, with a `BaseInfo` (model/base.py).
    Raises:
        InputError: no such model; or lists all missing, extra and misshapen weights.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"model is {model!r:.80}; give a directory, a hub id or a .gguf file.")
    quant = quant or QuantConfig()
    device = torch.device(device)
    path = resolve_model(model)
    cached = cached_base(path, quant) if use_4bit and (cache or quant.calibration) else None
    dtype = cached_compute_dtype(compute_dtype, device, cache)

    def build(source: Source) -> Any:
        network = empty_model(model)
        _finish(network, source, model, quant if use_4bit else None, dtype, device, cut)
        network.generation_config = generation_config_of(network, metadata_directory(model))
        return network.eval()

    found = None if cached is None else build_verified(cached, lambda: build(open_cache(cached)))
    if found is not None:
        return found
    source = open_source(path)
    if source.packed and not use_4bit:
        raise InputError(f"--model {model} is stored in 4 bits; leave out --no-4bit.")
    check_calibration(model, source, quant if use_4bit else None)
    if cached is None or source.packed:  # 4-bit codes are what a cache would hold
        return build(source)
    make_verified(cached, lambda staging: write_cache(empty_model(model), source, quant, device, staging))
    return build(open_cache(cached))


def load_first_block(
    model: str, source: Source, quant: QuantConfig | None, dtype: torch.dtype, device: torch.device
) -> Any:
    """Load only the first decoder layer, to compare it with a split one; it computes from given embeddings.

    Embeddings, head and the other layers are not read; they stay on the meta device.
    """
    network = empty_model(model)
    out = {network.get_input_embeddings(), network.get_output_embeddings(), *decoder_layers(network)[1:]}
    left = tuple(f"{name}." for name, module in network.named_modules() if module in out)
    weights = stored_weights(network, source, quant, device, lambda name: not name.startswith(left))
    _place(network, weights)
    _compute_in(network, dtype)
    fuse_blocks(network)
    for module in network.modules():
        module._buffers.update({name: b.to(device) for name, b in module._buffers.items() if b is not None})
    network.base_info = BaseInfo(model, quant, dtype)
    return network.eval()


def plan_base_model(
    model: str,
    use_4bit: bool = True,
    quant: QuantConfig | None = None,
    compute_dtype: str = "auto",
    device: torch.device | str = "cpu",
) -> Any:
    """The model of `load_base_model` with the same shapes and dtypes, but on the meta device.

    Only the config is read or downloaded. Adapters go into it as into the loaded model, and `plan_recomputing`
    counts both with the same code.

    Args:
        model, use_4bit, quant: as for `load_base_model`; a 4-bit checkpoint's config overrides `quant`.
        compute_dtype, device: dtype of activations; "auto" is bf16 for a GPU that this machine lacks.
    Raises:
        InputError: as `load_base_model`, if the config alone shows the problem.
    """
    stored = declared_quantization(load_config(model), model)
    if stored is not None and not use_4bit:
        raise InputError(f"--model {model} is stored in 4 bits; leave out --no-4bit.")
    quant = (stored or quant or QuantConfig()) if use_4bit else None
    device, dtype = torch.device(device), torch.bfloat16
    if compute_dtype != "auto" or device.type == "cpu" or torch.cuda.is_available():
        dtype = cached_compute_dtype(compute_dtype, device, cache=True)
    network = empty_model(model)
    _finish(network, EmptySource(network), model, quant, dtype, torch.device("meta"))
    return network.eval()


def _finish(
    network: Any,
    source: Source,
    model: str,
    quant: QuantConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    cut: Cut | None = None,
) -> None:
    """Turn an `empty_model` into a working base, in place."""
    weights = stored_weights(network, source, quant, device)
    _fill(network, weights if cut is None else ((name, cut(name, weight)) for name, weight in weights), device)
    _compute_in(network, dtype)
    fuse_blocks(network)
    quantization = _quantization_of(network)
    if quantization is not None:
        named = declared_quantization(load_config(model), model) or quant
        quantization = replace(quantization, calibration=named.calibration if named is not None else "")
    network.base_info = BaseInfo(model, quantization, dtype)


def cached_compute_dtype(name: str, device: torch.device, cache: bool) -> torch.dtype:
    """`choose_compute_dtype`, measured once per machine: measuring again on a busy machine could differ.

    Args:
        cache: save a new measurement; a saved one is used in any case.
    """
    if name != "auto" or device.type == "cuda":
        return choose_compute_dtype(name, device, MEASURED_WIDTH)
    machine = f"{platform.node()}-{platform.machine()}-{torch.__version__}-{torch.get_num_threads()}"
    remembered = cache_directory() / f"compute-dtype-{machine}"
    known = remembered.read_text("utf-8", "replace") if remembered.is_file() else ""
    if known not in ("float32", "bfloat16"):  # absent, or damaged
        known = str(choose_compute_dtype(name, device, MEASURED_WIDTH)).removeprefix("torch.")
        if cache:
            make_cache()
            with new_file(remembered) as file:
                file.write_text(known)
    return choose_compute_dtype(known, device, MEASURED_WIDTH)


def _fill(network: Any, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Give an `empty_model` all its weights."""
    matrices = matrix_layers(network)
    _place(network, weights)
    embedding = network.get_input_embeddings()
    for name in tied_names(network):
        owner = name.removesuffix(".weight")
        if owner in matrices:
            tied = Linear16bit(embedding.weight.data, network.get_submodule(owner).bias)
            tied.weight = embedding.weight
            set_tensor(network, owner, tied)
    network.to(device)  # buffers: everything else is there already


def _place(network: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Put parameters in place and replace torch's linear layers by ours."""
    matrices = matrix_layers(network)
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
                set_tensor(network, owner, Linear4bit(weight, None))  # its bias comes next
        elif isinstance(layer, nn.Linear):
            set_tensor(network, owner, Linear16bit(weight, None))
        else:
            layer.weight = nn.Parameter(weight, requires_grad=False)


def _quantization_of(network: Any) -> QuantConfig | None:
    """The quantization of the weights themselves: an already quantized checkpoint has its own."""
    for parameter in network.parameters():
        if isinstance(parameter, Params4bit):
            return quantization_of(parameter)
    return None


def _compute_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Make activations `dtype`: embeddings cast their output, norms are converted."""
    from transformers.pytorch_utils import Conv1D

    def cast_output(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        scale = getattr(module, "embed_scale", None)
        if scale is None:
            return output.to(dtype)
        # Gemma's embedding scales in its table's dtype: in bf16 that would round the product.
        return F.embedding(args[0], module.weight, module.padding_idx).to(dtype) * scale.to(dtype)

    for module in network.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(check_lookup)
            module.register_forward_hook(cast_output)
        elif isinstance(module, Conv1D):
            module.__class__ = cast(Any, frozen_conv1d())
        elif not isinstance(module, (nn.Linear, FrozenMatrix)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
