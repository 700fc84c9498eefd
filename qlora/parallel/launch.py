"""Arrange the processes of a run into data, shard and tensor groups."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator

from qlora.config.parallel import ParallelConfig
from qlora.system.errors import InputError
from qlora.system.ranks import Ranks


def arrange_ranks(config: ParallelConfig, accelerator: Accelerator) -> Ranks:
    """Arrange the processes into the groups that `config` asks for; call on all of them.

    Raises:
        InputError: the number of processes does not divide.
    """
    rank, size, device = accelerator.process_index, accelerator.num_processes, accelerator.device.type
    launch = "start it with accelerate launch --num_processes N or torchrun"
    if config.is_split and size == 1:
        raise InputError(f"{config.flag} splits the base over several processes, but this is one; {launch}.")
    if config.cpu_offload and device == "cpu":
        raise InputError(
            "--cpu-offload moves shares out of a GPU's memory, but this run has no GPU; leave it out."
        )
    if config.tensor_parallel > 1:
        tensor_size = config.tensor_parallel
        if size % tensor_size:
            raise InputError(
                f"--tensor-parallel {tensor_size} does not divide {size} processes; give a divisor of them."
            )
        mesh = torch.distributed.init_device_mesh(
            device, (size // tensor_size, tensor_size), mesh_dim_names=("data", "tensor")
        )
        return Ranks(rank, size, tensor_size, mesh.get_group("tensor"), None, config.sequence_parallel)
    if config.shard == "none":
        return Ranks(rank, size)
    shape: tuple[int, ...] = (size,)
    if config.shard == "hsdp":
        within = config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if size % within:
            raise InputError(f"--shard-size {within} does not divide {size} processes; give a divisor of them.")
        shape = (size // within, within)
    mesh = torch.distributed.init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    return Ranks(rank, size, shard_mesh=mesh, cpu_offload=config.cpu_offload)
