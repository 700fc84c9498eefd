"""A frozen base sharded over processes (torch's FSDP2), gathered one block at a time as it computes.

    share     embeddings, each decoder layer, the head and the last norm: the first axis of every parameter in K
              chunks of ceil(rows / K); of a 4-bit weight the rows are its blocks (quantize.ShardedLinear4bit)
    forward   a layer is gathered in 4 bits before it computes and freed after; meanwhile the next one is fetched.
              The head is gathered while the loss is computed (model/loss.py)
    backward  the same from the top, down to the first layer that trains

K is the number of processes or, under hsdp, of those in a group that shares one base. Adapters are not sharded:
they are made later, whole on every process.

Each process reads and quantizes only its share. A weight's blocks are independent except for the mean of their
scales under double quantization. The scales are therefore gathered (1/32 of the weight's bf16 bytes) and quantized
identically everywhere: the shares equal, bit for bit, those of a base loaded by one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora.model.base import base_info
from qlora.model.block import decoder_layers
from qlora.model.cache import find_source
from qlora.model.fingerprint import as_bytes, describe_weight, sampled
from qlora.model.hf_config import generation_config_of, metadata_directory
from qlora.model.load import plan_base_model
from qlora.model.skeleton import Source, empty_model, match_names, tied_names, transposed_names
from qlora.model.weights import read_packed_weight
from qlora.quant.layers import Linear4bit
from qlora.quant.library import Params4bit
from qlora.quant.parts import local
from qlora.quant.sharded import ShardedLinear4bit
from qlora.quant.weight import QuantConfig, dequantize_weight
from qlora.system.errors import InputError
from qlora.system.memory import trim_heap
from qlora.system.ranks import Ranks


def load_sharded_model(
    model: str,
    ranks: Ranks,
    use_4bit: bool = True,
    quant: QuantConfig | None = None,
    compute_dtype: str = "auto",
    device: torch.device | str = "cpu",
    cache: bool = True,
) -> Any:
    """Load a base that all processes hold together; call on all of them.

    Quantized weights are read from the cache if present, but not written to it: no process has them all.

    Args:
        ranks: with a `shard_mesh`.
        compute_dtype: the same on all processes.
        model, use_4bit, quant, device: as for `load_base_model`.
    Returns:
        A model as from `load_base_model`; its `BaseInfo` says how it is split.
    Raises:
        InputError: as `load_base_model`; or the model's weights cannot be split.
    """
    device, quant = torch.device(device), quant or QuantConfig()
    network = plan_base_model(model, use_4bit, quant, compute_dtype, device)
    source = find_source(model, quant if use_4bit else None, cache)
    if source.packed and not use_4bit:
        raise InputError(f"--model {model} is stored in 4 bits; leave out --no-4bit.")
    plain = empty_model(model)
    stored, transposed = match_names(plain, source), transposed_names(plain)
    _make_shardable(network)
    _shard(network, ranks, device)
    for name, buffer in plain.named_buffers():  # the plan's buffers are on the meta device
        owner, _, kind = name.rpartition(".")
        network.get_submodule(owner)._buffers[kind] = buffer.to(device)
    samples = _Loader(network, source, ranks, device).load(stored, transposed)
    network.base_info = replace(base_info(network), ranks=ranks, weight_samples=samples)
    network.generation_config = generation_config_of(network, metadata_directory(model))
    trim_heap()
    return network.eval()


def _make_shardable(network: nn.Module) -> None:
    """Give 4-bit layers parameters that FSDP2 can shard."""
    for name, module in list(network.named_modules()):
        if type(module) is Linear4bit:
            owner, _, child = name.rpartition(".")
            setattr(network.get_submodule(owner), child, ShardedLinear4bit(module))
    odd = next((name for name, p in network.named_parameters() if isinstance(p, Params4bit)), None)
    if odd is not None:
        raise InputError(f"{odd} is one of many experts', which are not split; leave out --shard.")


def _shard(network: Any, ranks: Ranks, device: torch.device) -> None:
    """Let FSDP2 wrap the parameters, then allocate only this process's shards."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    options: dict[str, Any] = {"mesh": ranks.shard_mesh, "reshard_after_forward": True}
    options["offload_policy"] = CPUOffloadPolicy() if ranks.cpu_offload else OffloadPolicy()
    head, embeddings = network.get_output_embeddings(), network.get_input_embeddings()
    is_tied = bool(tied_names(network))
    if is_tied:
        head._parameters["weight"] = None  # an alias, which would become a separate tensor
    for module in [embeddings, *decoder_layers(network), *([] if is_tied else [head])]:
        fully_shard(module, **options)
    fully_shard(network.base_model, **options)
    network.to_empty(device="cpu" if ranks.cpu_offload else device)
    if is_tied:
        head._parameters["weight"] = embeddings.weight


def end_backward_at(layer: Any) -> None:
    """Stop gathering for the backward pass at `layer`, the first decoder layer that trains.

    FSDP2 prefetches the layer that computed before, unless told otherwise: here, `layer` itself, already gathered.
    """
    layer.set_modules_to_backward_prefetch([layer])


PIECE = 1 << 23  # values of a dense weight read at once


class _Loader:
    """Fills the shards of a network from a source.

    Attributes:
        samples: name -> the weight's part of the base's fingerprint: description, and bytes that are zero for
            other processes' shares.
    """

    def __init__(self, network: Any, source: Source, ranks: Ranks, device: torch.device) -> None:
        self.network, self.source, self.device = network, source, device
        mesh = ranks.shard_mesh
        self.group = mesh.get_group(mesh.ndim - 1)
        self.size, self.index = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
        self.samples: dict[str, tuple[bytes, bytearray]] = {}

    def load(self, stored: dict[str, str], transposed: set[str]) -> dict[str, bytes]:
        """Fill every shard; returns the `weight_samples` of the whole base.

        Args:
            stored, transposed: as `match_names` and `transposed_names` of the plain modules.
        """
        with torch.no_grad():
            for name, key in stored.items():
                owner, _, kind = name.rpartition(".")
                layer = self.network.get_submodule(owner)
                if isinstance(layer, ShardedLinear4bit) and kind == "weight":
                    self._load_4bit(name, key, layer, name in transposed)
                else:
                    self._load_dense(name, key, getattr(layer, kind))
        return self._collect_samples()

    def chunk(self, rows: int) -> slice:
        """This process's rows, as FSDP2 distributes them."""
        each = -(-rows // self.size)
        return slice(min(self.index * each, rows), min((self.index + 1) * each, rows))

    def _load_4bit(self, name: str, key: str, layer: ShardedLinear4bit, is_transposed: bool) -> None:
        layer.compute_device = self.device
        size, block_size = layer.out_features * layer.in_features, layer.config.block_size
        blocks = self.chunk(size // block_size)
        packed = read_packed_weight(self.source, key, torch.device("cpu"), as_views=True)
        if packed is not None:
            codes = layer.take_codes(packed, blocks, self.chunk)
        elif self.source.packed:
            raise InputError(f"{self.source.path} keeps {name} in 16 bits among 4-bit weights; leave out --shard.")
        else:
            dense = self.source.view(key)
            flat = (dense.T if is_transposed else dense).reshape(-1)
            mine = flat[blocks.start * block_size : blocks.stop * block_size].to(self.device)
            del dense, flat
            codes = layer.take_dense(mine, blocks, self.chunk, self._gather_scales(size // block_size))
            del mine
        first = blocks.start * block_size // 2
        self._sample(name, (size // 2, 1), codes, first, size // 2)

    def _gather_scales(self, blocks: int) -> Callable[[Tensor], Tensor]:
        def gather(scales: Tensor) -> Tensor:
            each = -(-blocks // self.size)
            padded = torch.zeros(each, device=scales.device)
            padded[: len(scales)] = scales
            every = [torch.empty_like(padded) for _ in range(self.size)]
            torch.distributed.all_gather(every, padded, group=self.group)
            return torch.cat(every)[:blocks]

        return gather

    def _load_dense(self, name: str, key: str, parameter: Tensor) -> None:
        packed = read_packed_weight(self.source, key, torch.device("cpu"))
        dense = None if packed is None else dequantize_weight(packed, torch.float32)
        shape, share, rows = tuple(parameter.shape), local(parameter), self.chunk(len(parameter))
        size = parameter.numel()
        width = size // len(parameter)
        for part in share.split(max(1, PIECE // width)):  # frees the file's pages after reading
            first = rows.start + (part.storage_offset() - share.storage_offset()) // width
            part.copy_((self.source.view(key) if dense is None else dense)[first : first + len(part)])
        self._sample(name, shape, share.reshape(-1), rows.start * width, size)

    def _sample(self, name: str, shape: tuple[int, ...], mine: Tensor, first: int, size: int) -> None:
        """Record the sampled values that are in `mine`, the weight's flat values from index `first` on."""
        numbers, width = range(size)[sampled(size)], mine.dtype.itemsize
        held = bytearray(len(numbers) * width)
        inside = [place for place, number in enumerate(numbers) if first <= number < first + mine.numel()]
        if inside:
            values = mine[torch.tensor([numbers[place] - first for place in inside], device=mine.device)]
            held[inside[0] * width : (inside[-1] + 1) * width] = as_bytes(values)
        self.samples[name] = describe_weight(name, shape, mine.dtype), held

    def _collect_samples(self) -> dict[str, bytes]:
        """Sum over processes: for each byte one process has the value, the others zero."""
        flat = b"".join(held for _, held in self.samples.values())
        total = torch.frombuffer(bytearray(flat), dtype=torch.uint8).to(self.device, torch.int32)
        torch.distributed.all_reduce(total, group=self.group)
        found, start, samples = bytes(total.to("cpu", torch.uint8).numpy().tobytes()), 0, {}
        for name, (description, held) in self.samples.items():
            samples[name] = description + found[start : start + len(held)]
            start += len(held)
        return samples
