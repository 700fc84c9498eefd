"""The model that is measured: the flags every evaluation shares, how it is loaded, and who computes what.

Started by `accelerate launch` or torchrun, each process takes its share of the items, and every one gets all the
results in the items' order; what is one writer's work, the main process does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from qlora.config.model import ModelConfig
from qlora.config.settings import Check, Count, Positive, at_least
from qlora.system.errors import InputError

Window = Annotated[int, at_least(2)]  # in tokens
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class EvalConfig(ModelConfig):
    """What every evaluation asks; a command's own flags come on top."""

    adapter: str | None = None
    """Adapter directory; without one the base itself is measured."""
    data: str | None = None
    """What is measured on."""
    max_examples: Count = 0
    """Only the first so many; 0 = all."""
    batch_size: Positive = 16
    """Items computed together, per device."""
    output: str | None = None
    """Write scores, settings and every item's result to this JSON file."""
    confidence: Annotated[float, Check("a number between 0 and 1, such as 0.95", lambda x: 0 < x < 1)] = 0.95
    """Confidence of the intervals."""
    seed: Count = 42
    """Seeds the resampling, and whatever is drawn."""
    debug: bool = False
    """Show the traceback of an error."""


def require(config: Any, *names: str) -> None:
    """Refuse a config that lacks one of these, naming all that it lacks."""
    missing = [f"--{name.replace('_', '-')}" for name in names if getattr(config, name) is None]
    if missing:
        raise InputError(f"Something is missing; pass {' and '.join(missing)}.")


def load_evaluated(config: EvalConfig) -> tuple[Any, Any, Any]:
    """The model to measure, in eval mode, with its adapter if it has one.

    Returns:
        (model, tokenizer, accelerator); the model stands on the accelerator's device.
    Raises:
        InputError: no such model or adapter, or one that does not fit the other.
    """
    from qlora.system.startup import collection_paused

    require(config, "model")
    name = config.model or ""
    with collection_paused():
        import transformers.modeling_utils  # noqa: F401  (load_base_model needs it)
        from accelerate import Accelerator

        from qlora.adapters.load import load_adapter
        from qlora.model.load import load_base_model
        from qlora.model.tokenizer import load_tokenizer
        from qlora.quant.weight import QuantConfig
        from qlora.system.device import best_device

    # Without cpu=True, several processes on a machine without a GPU would each measure everything.
    accelerator = Accelerator(cpu=best_device().type == "cpu", mixed_precision="no")
    tokenizer = load_tokenizer(name, config.adapter)
    quant = QuantConfig(config.quant_type, config.double_quant)
    with accelerator.main_process_first():  # the others find the quantized base in the cache
        model = load_base_model(
            name, config.use_4bit, quant, config.compute_dtype, accelerator.device, config.cache
        )
    if config.adapter is not None:
        load_adapter(model, config.adapter, name, accelerator.print)
    return model.eval(), tokenizer, accelerator


def share_out(
    accelerator: Any,
    items: Sequence[T],
    compute: Callable[[list[T]], list[R]],
    lengths: Sequence[int] | None = None,
) -> list[R]:
    """`compute` over all items, each process doing its share; every process gets all results, in the items' order.

    Args:
        compute: items -> their results, in the same order; called once in each process, also with no items.
        lengths: what each item costs, to deal them out evenly.
    """
    from accelerate.utils import gather_object

    from qlora.data.batches import balance_by_length

    hands = balance_by_length(lengths or [1] * len(items), accelerator.num_processes)
    mine = sorted(hands[accelerator.process_index])
    results = compute([items[i] for i in mine])
    gathered: dict[int, R] = dict(gather_object(list(zip(mine, results, strict=True))))
    return [gathered[i] for i in range(len(items))]
