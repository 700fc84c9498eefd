"""The model to evaluate: flags shared by all evaluations, loading, and distribution over processes.

Under `accelerate launch` or torchrun each process computes its share of the items and gets all results in the
items' order; only the main process writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from qlora.config.model import ComputeDtype
from qlora.system.errors import InputError

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class EvalConfig:
    """Flags shared by all evaluations."""

    model: str | None = None
    """A Hugging Face directory, a hub id, or a .gguf file."""
    adapter: str | None = None
    """Adapter directory; without it the base is evaluated."""
    use_4bit: bool = True
    """Quantize the base to 4 bits; --no-4bit keeps it in bf16."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 levels of a 4-bit weight: normal quantiles (nf4) or a tiny float (fp4)."""
    double_quant: bool = True
    """Quantize the block scales too."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of activations; auto picks the faster one on this device by measuring."""
    cache: bool = True
    """Cache the quantized base on disk ($QLORA_CACHE, else ~/.cache/qlora)."""
    data: str | None = None
    """Data to evaluate on."""
    max_examples: int = 0
    """Use only this many examples; 0 = all."""
    batch_size: int = 16
    """Items computed together on each device."""
    output: str | None = None
    """Write scores, settings and every item's result to this JSON file."""
    confidence: float = 0.95
    """Confidence level of the intervals."""
    seed: int = 42
    """Seed for resampling and sampling."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        for name, low in (("max_examples", 0), ("batch_size", 1), ("seed", 0)):
            require_at_least(self, name, low)
        if not 0 < self.confidence < 1:
            raise InputError(
                f"confidence is {self.confidence}; give --confidence a number between 0 and 1, such as 0.95."
            )


def require_at_least(config: Any, name: str, low: int) -> None:
    """InputError if a number of a config is too small."""
    if getattr(config, name) < low:
        raise InputError(f"{name} is {getattr(config, name)}; give --{name.replace('_', '-')} {low} or more.")


def require(config: Any, *names: str) -> None:
    """InputError if one of these is missing; it names all that are."""
    missing = [f"--{name.replace('_', '-')}" for name in names if getattr(config, name) is None]
    if missing:
        raise InputError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} required.")


def load_evaluated(config: EvalConfig) -> tuple[Any, Any, Any]:
    """The model to evaluate, in eval mode, with its adapter if there is one.

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

        from qlora.adapters.load import load_adapter
        from qlora.model.load import load_base_model
        from qlora.model.tokenizer import load_tokenizer
        from qlora.quant.weight import QuantConfig
        from qlora.system.device import best_device

    # Without cpu=True, each of several processes on a machine without a GPU would compute everything.
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
