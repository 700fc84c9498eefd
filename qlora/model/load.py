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

import platform
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.model.base import BaseInfo
from qlora.model.block import decoder_layers, fuse_blocks
from qlora.model.cache import cached_base, open_cache, write_cache
from qlora.model.hf_config import declared_quantization, generation_config_of, load_config, metadata_directory
from qlora.model.resolve import open_source, resolve_model
from qlora.model.skeleton import EmptySource, Source, empty_model, matrix_layers, set_tensor, tied_names
from qlora.model.weights import stored_weights
from qlora.quant.layers import FrozenMatrix, Linear4bit, Linear16bit, frozen_conv1d
from qlora.quant.library import Params4bit
from qlora.quant.weight import QuantConfig, quantization_of
from qlora.system.cache import cache_directory, make_cache
from qlora.system.device import choose_compute_dtype
from qlora.system.errors import InputError
from qlora.system.files import new_file, only_writer

MEASURED_WIDTH = 1024  # of the matrix product that decides between fp32 and bf16
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
        cut: takes each weight by name, as it is kept, and returns the part of it to keep here.
    Returns:
        A transformers causal LM in eval mode, nothing trainable, with a `BaseInfo` (model/base.py).
    Raises:
        InputError: no such model; or all missing, extra and misshapen weights.
    """
    quant = quant or QuantConfig()
    device = torch.device(device)
    path = resolve_model(model)
    cached = cached_base(path, quant) if use_4bit and cache else None
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
                    write_cache(network, source, quant, device, cached)
    if cached is not None:
        source = open_cache(cached)
    dtype = cached_compute_dtype(compute_dtype, device, cache)
    _finish(network, source, model, quant if use_4bit else None, dtype, device, cut)
    network.generation_config = generation_config_of(network, metadata_directory(model))
    return network.eval()


def load_first_block(
    model: str, source: Source, quant: QuantConfig | None, dtype: torch.dtype, device: torch.device
) -> Any:
    """A model that can compute up to its first decoder layer, from given embeddings: to compare that layer with.

    Of embeddings, head and the other layers nothing is read; they stay on the meta device.
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
    """What `load_base_model` returns, every tensor of the same shape and dtype, but on the meta device.

    Nothing but the config is read, and of a hub id nothing else downloaded. Adapters go into it as into the loaded
    model, and `plan_recomputing` counts both by the same lines.

    Args:
        model, use_4bit, quant: as for `load_base_model`. Of a checkpoint in 4 bits its config says how.
        compute_dtype, device: dtype of activations; "auto" is bf16 on a GPU that is not here.
    Raises:
        InputError: as `load_base_model`, as far as the config shows it.
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
    """Make of an `empty_model` the base that computes, in place."""
    weights = stored_weights(network, source, quant, device)
    _fill(network, weights if cut is None else ((name, cut(name, weight)) for name, weight in weights), device)
    _compute_in(network, dtype)
    fuse_blocks(network)
    network.base_info = BaseInfo(model, _quantization_of(network), dtype)


def cached_compute_dtype(name: str, device: torch.device, cache: bool) -> torch.dtype:
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
    network.to(device)  # buffers: everything else lies there already


def _place(network: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Put parameters into their places, and our own linear layers into that of torch's."""
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
