"""The model to evaluate: flags shared by all evaluations, loading, and distribution over processes.

Under `accelerate launch` or torchrun each process computes its share of the items and gets all results in the
items' order; only the main process writes.
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
    """Flags shared by all evaluations."""

    adapter: str | None = None
    """Adapter directory; without it the base is evaluated."""
    data: str | None = None
    """Data to evaluate on."""
    max_examples: Count = 0
    """Use only this many examples; 0 = all."""
    batch_size: Positive = 16
    """Items computed together on each device."""
    output: str | None = None
    """Write scores, settings and every item's result to this JSON file."""
    confidence: Annotated[float, Check("a number between 0 and 1, such as 0.95", lambda x: 0 < x < 1)] = 0.95
    """Confidence level of the intervals."""
    seed: Count = 42
    """Seed for resampling and sampling."""
    debug: bool = False
    """Show the traceback of an error."""


def require(config: Any, *names: str) -> None:
    """InputError if one of these is missing; it names all that are."""
    missing = [f"--{name.replace('_', '-')}" for name in names if getattr(config, name) is None]
    if missing:
        raise InputError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} required.")


def load_evaluated(config: EvalConfig, later: Sequence[str] = ()) -> tuple[Any, Any, Any]:
    """The model to evaluate, in eval mode, with its adapter if there is one.

    Args:
        later: adapters that the caller will load: the base is the one that they were trained on.
    Returns:
        (model, tokenizer, accelerator); the model is on the accelerator's device.
    Raises:
        InputError: model or adapter does not exist, or they do not fit together.
    """
    from qlora.system.startup import collection_paused

    require(config, "model")
    name = config.model or ""
    with collection_paused():
        import transformers.modeling_utils  # noqa: F401  (load_base_model needs it)
        from accelerate import Accelerator

        from qlora.adapters.load import check_before_loading, load_adapter
        from qlora.adapters.provenance import calibration_of
        from qlora.model.load import load_base_model
        from qlora.model.tokenizer import load_tokenizer
        from qlora.quant.weight import QuantConfig
        from qlora.system.device import best_device

    # Without cpu=True, each of several processes on a machine without a GPU would compute everything.
    adapters = [*later] if config.adapter is None else [config.adapter]
    check_before_loading(adapters, name)
    accelerator = Accelerator(cpu=best_device().type == "cpu", mixed_precision="no")
    tokenizer = load_tokenizer(name, config.adapter)
    quant = calibration_of(adapters, QuantConfig(config.quant_type, config.double_quant))
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
    """Apply `compute` to all items, a share per process; every process gets all results, in the items' order.

    Args:
        compute: items -> results in the same order; called once per process, even with no items.
        lengths: cost of each item, to split them evenly.
    """
    from accelerate.utils import gather_object

    from qlora.data.batches import balance_by_length

    hands = balance_by_length(lengths or [1] * len(items), accelerator.num_processes)
    mine = sorted(hands[accelerator.process_index])
    results = compute([items[i] for i in mine])
    gathered: dict[int, R] = dict(gather_object(list(zip(mine, results, strict=True))))
    return [gathered[i] for i in range(len(items))]
