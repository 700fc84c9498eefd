"""Training runs of a model whose layers several processes compute together, one after another, for comparison.

    python -m tests.split_worker CASES.json OUT N

in N processes, which are forked once everything is imported: that takes longer than the runs.
CASES.json is a list of `Case`s. Of each, OUT/NAME.safetensors holds what the first process found: "losses" of the
steps and held-out at the end, "gradient of step I" and "adapter" at the end (of all parameters one after another),
"base" (the fingerprint's bytes) and "block bytes"; or "refused" where the check at the start failed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.imports import collection_paused, importing_transformers

with collection_paused(), importing_transformers():
    import torch
    import transformers.modeling_utils  # noqa: F401  (load_base_model needs it)
    from accelerate import Accelerator
    from safetensors.torch import save_file
    from torch import Tensor

    from qlora.adapter import save_adapter
    from qlora.config import LoRAConfig, ParallelConfig
    from qlora.distributed import arrange_ranks, ranks_of
    from qlora.errors import TrainingStopped
    from qlora.injection import freeze_base, inject_lora, lora_layers, lora_parameters, lora_state_dict
    from qlora.optim import build_optimizer
    from qlora.output import base_fingerprint
    from qlora.quantize import Params4bit
    from qlora.split import check_split, load_for_ranks
    from qlora.tokenize import IGNORE_INDEX, Example
    from qlora.trainer import evaluate, fit, settle_checkpointing


@dataclass
class Case:
    """One run.

    Attributes:
        name, model: of the result; the base's directory or file.
        tensor, sequence: --tensor-parallel and --sequence-parallel.
        targets, recompute ("on" or "off"), packing, dropout, adapter_dtype, compute_dtype: as the flags.
        extra: more of LoRAConfig.
        rows: examples of a window, whatever the number of processes.
        save: a directory for the adapter.
        damage: exchange two blocks of codes of the second process, which the check should find.
    """

    name: str
    model: str
    tensor: int = 1
    sequence: bool = False
    targets: str = "q_proj,v_proj"
    recompute: str = "off"
    packing: bool = True
    dropout: float = 0.0
    adapter_dtype: str = "float32"
    compute_dtype: str = "float32"
    extra: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    rows: int = 4
    save: str | None = None
    damage: bool = False


def make_examples(vocabulary: int, count: int = 16) -> list[Example]:
    """Random rows of 4 to 40 tokens whose first third is masked."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(count):
        length = int(torch.randint(4, 41, (), generator=generator))
        ids = torch.randint(5, min(vocabulary, 1000), (length + 1,), generator=generator)
        targets = ids[1:].clone()
        targets[: length // 3] = IGNORE_INDEX
        examples.append(Example(ids[:-1], targets))
    return examples


def load(case: Case, accelerator: Accelerator) -> Any:
    """The base of a case, split where the case says so."""
    config = ParallelConfig(tensor_parallel=case.tensor, sequence_parallel=case.sequence)
    ranks = arrange_ranks(config, accelerator)
    model = load_for_ranks(case.model, ranks, accelerator, compute_dtype=case.compute_dtype)
    if case.damage:
        if accelerator.process_index == 1:
            codes = model.model.layers[0].self_attn.o_proj.weight.data
            codes[:64] = codes[:64].roll(32, 0)
        check_split(model)
    return model


def block_bytes(model: Any) -> int:
    """Of the codes and 8-bit scales in the model's first block."""
    weights: Any = [p for p in model.model.layers[0].parameters() if isinstance(p, Params4bit)]
    return sum(weight.nbytes + weight.quant_state.absmax.nbytes for weight in weights)


def run_case(case: Case, accelerator: Accelerator) -> dict[str, Tensor]:
    """Train, and evaluate at the end; what the module says of the result's contents."""
    try:
        model = load(case, accelerator)
    except TrainingStopped:
        return {"refused": torch.ones(1)}
    adapted: dict[str, Any] = {"rank": 4, "target_modules": case.targets, "dropout": case.dropout, **case.extra}
    lora = LoRAConfig(adapter_dtype=case.adapter_dtype, **adapted)  # type: ignore[arg-type]
    inject_lora(model, lora, seed=1)
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():  # a B of zeros would leave A without a gradient
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.02)
    freeze_base(model)
    settle_checkpointing(model, case.recompute, 200, None, accelerator, lambda line: None)
    optimizer = build_optimizer(lora_parameters(model), "adamw")
    gradients: list[list[Tensor]] = []
    step = optimizer.step

    def keep_and_step(learning_rate: float) -> None:
        gradients.append([p.grad.clone() for p in optimizer.parameters if p.grad is not None])
        step(learning_rate)

    optimizer.step = keep_and_step  # type: ignore[method-assign]
    examples, lines = make_examples(model.config.vocab_size), []
    window = case.rows // ranks_of(model, accelerator).data_size
    fit(
        model, optimizer, lambda step: 2e-4, examples, accelerator, total_steps=case.steps, batch_size=window,
        grad_accum=1, max_length=64, packing=case.packing, seed=3, log=lines.append,
    )  # fmt: skip
    held_out = evaluate(model, examples[:5], accelerator, 64, case.packing)
    assert held_out is not None
    if case.save is not None and accelerator.is_main_process:
        save_adapter(model, case.save, lora, case.model)
    found = {f"gradient of step {i}": torch.cat([g.flatten() for g in gs]) for i, gs in enumerate(gradients)}
    found["adapter"] = torch.cat([value.flatten() for value in lora_state_dict(model).values()])
    found["losses"] = torch.tensor([line["loss"] for line in lines] + [held_out], dtype=torch.float64)
    found["base"] = torch.tensor(list(base_fingerprint(model).encode()))
    found["block bytes"] = torch.tensor(block_bytes(model))
    return found


def main(cases: str, out: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    for settings in json.loads(Path(cases).read_text()):
        found = run_case(Case(**settings), accelerator)
        if accelerator.is_main_process:
            save_file(found, Path(out, f"{settings['name']}.safetensors"))


def fork(size: int) -> None:
    """Return in `size` processes, each of which knows its rank as torchrun would tell it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size))
    rank = next((rank for rank in range(1, size) if os.fork() == 0), 0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))


if __name__ == "__main__":
    fork(int(sys.argv[3]))
    main(*sys.argv[1:3])
    if os.environ["RANK"] == "0":
        for _ in range(1, int(sys.argv[3])):
            assert os.wait()[1] == 0, "another process has failed"
