"""Loss on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from qlora.data.batches import balance_by_length, lengths_of, make_batches, split_batch
from qlora.data.example import Example
from qlora.model.base import ranks_of
from qlora.model.loss import causal_lm_loss
from qlora.system.errors import TrainingStopped
from qlora.system.memory import is_out_of_memory
from qlora.training.step import in_lockstep


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    accelerator: Accelerator,
    budget: int,
    packing: bool = True,
    stop: Callable[[], str | None] = lambda: None,
) -> float | None:
    """Mean loss per target token over `examples`, in nats; the model is left as it was found.

    Args:
        budget: tokens of a micro-batch; halved for as long as one does not fit in memory.
        stop: asked after each micro-batch; once there is a reason on any device, the result is None.
    """
    was_training = model.training
    model.eval()
    lengths, ranks = lengths_of(examples), ranks_of(model, accelerator)
    mine = balance_by_length(lengths, ranks.data_size)[ranks.data_rank]
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    longest = max(lengths)
    rows, kind = max(1, budget // longest), accelerator.device.type
    waiting = make_batches([examples[i] for i in mine], rows, longest, packing, kind)
    waiting = list(in_lockstep(waiting, ranks, accelerator.device))
    while waiting and not sums[2]:
        batch = waiting.pop()
        try:
            loss_sum, count = causal_lm_loss(model, batch.to(accelerator.device))
            sums[:2] += torch.stack([loss_sum.double(), torch.tensor(count, device=sums.device)])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch.examples) == 1 or ranks.is_split:
                raise TrainingStopped("a held-out example does not fit in memory; lower --max-length") from error
            waiting += split_batch(batch, batch.input_ids.numel() // 2)
        reason = stop() is not None
        sums[2] = ranks.max(reason, accelerator.device) if ranks.is_split else reason
    model.train(was_training)
    loss_sum, count, stopped = ranks.sum(sums).tolist()
    return None if stopped else loss_sum / count
