"""Convert a 4-bit weight to stored tensors and back, with checks: the kernels trust the sizes."""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.quant.library import Params4bit, QuantState, wrap_codes
from qlora.quant.weight import QuantConfig

STATE_BYTES = 512  # of a 4-bit weight's quant_state in a file


def quantization_config(quant: QuantConfig) -> dict[str, Any]:
    """The entry of config.json that makes transformers load a 4-bit bitsandbytes checkpoint."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant.quant_type,
        "bnb_4bit_use_double_quant": quant.double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
    }


def packed_tensors(weight: Params4bit) -> dict[str, Tensor]:
    """The tensors that store a 4-bit weight, named by bitsandbytes' suffixes ("" for the codes).

    Their sizes do not depend on its values: the state is JSON with a number of varying length, padded with spaces
    to STATE_BYTES. A weight on the meta device gives tensors of the same dtypes and shapes.
    """
    state = weight.quant_state
    if weight.is_meta and state.nested:  # the offset goes into the JSON as a number
        state = copy(state)
        state.offset = torch.zeros(())
    parts = {f".{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    (name,) = (key for key in parts if key.startswith(".quant_state."))
    parts[name] = F.pad(parts[name], (0, STATE_BYTES - len(parts[name])), value=ord(" "))
    return {"": weight.data, **parts}


def packed_shape(quant_state: Tensor) -> tuple[int, ...]:
    """Logical shape of a 4-bit weight from its stored `quant_state` tensor alone.

    Raises:
        ValueError: the tensor holds no shape.
    """
    from bitsandbytes.utils import unpack_tensor_to_dict

    try:
        return tuple(unpack_tensor_to_dict(quant_state)["shape"])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:  # JSON in a tensor of bytes
        raise ValueError(f"no shape in its quant_state: {error}") from error


def unpack_tensors(tensors: dict[str, Tensor], device: torch.device) -> Params4bit:
    """The inverse of `packed_tensors`, bit for bit.

    Raises:
        ValueError: the parts do not fit together; the kernels trust their sizes and would read past the end.
    """
    stats = {suffix[1:]: tensor for suffix, tensor in tensors.items() if suffix}
    try:
        state = QuantState.from_dict(stats, device=device)
    # Its fields are JSON of any type, used unchecked; an unknown one is an AssertionError.
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"its quant_state does not read: {error}") from error
    except AssertionError as error:
        raise ValueError("its quant_state holds foreign fields") from error
    _check_parts(tensors[""], state)
    return wrap_codes(tensors[""].to(device), state)


def _check_parts(codes: Tensor, state: QuantState) -> None:
    """Check type and size of every part of a 4-bit weight."""
    shape, block_size = state.shape or (), state.blocksize
    if len(shape) != 2 or min(shape) < 1 or not isinstance(state.dtype, torch.dtype):
        raise ValueError(f"its shape is {tuple(shape)}, its dtype {state.dtype!r:.60}")
    QuantConfig(state.quant_type, state.nested, block_size)  # raises for an unknown type or block size
    num_blocks = -(-math.prod(shape) // block_size)
    wanted = {
        "codes": (codes.numel() * codes.element_size(), -(-math.prod(shape) // 2)),
        "table": (state.code.numel(), 16),
        "scales": (state.absmax.numel(), num_blocks),
    }
    floats = [state.code]
    if state.nested:
        nested_size = state.state2.blocksize
        if type(nested_size) is not int or nested_size < 1 or state.absmax.dtype != torch.uint8:
            raise ValueError(f"nested block size {nested_size!r:.60}, scales in {state.absmax.dtype}")
        wanted["nested scales"] = (state.state2.absmax.numel(), -(-num_blocks // nested_size))
        wanted["nested table"] = (state.state2.code.numel(), 256)
        if not math.isfinite(state.offset):
            raise ValueError(f"its offset is {float(state.offset)}")
        floats += [state.state2.absmax, state.state2.code]
    else:
        floats += [state.absmax]
    wrong = [f"{part} {actual} instead of {right}" for part, (actual, right) in wanted.items() if actual != right]
    wrong += [f"a table or scales in {part.dtype}" for part in floats if part.dtype != torch.float32]
    if wrong:
        raise ValueError(f"for the shape {tuple(shape)}: {', '.join(wrong)}")
