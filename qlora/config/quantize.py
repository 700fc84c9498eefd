"""Settings of `quantize`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from qlora.config.model import CalibrationConfig, ComputeDtype
from qlora.config.settings import Columns, Settings, at_least


@dataclass
class QuantizeConfig(Settings):
    """Save a base in 4 bits, its codes chosen by what the layers compute on given texts."""

    model: str | None = None
    """A Hugging Face directory, a hub id, or a .gguf file, in 16 bits."""
    calibrate: str | None = None
    """File or hub id of rows to choose the 4-bit codes on, of any shape that --data of train takes; default: the
    nearest codes."""
    calibrate_tokens: Annotated[int, at_least(2048)] = CalibrationConfig.calibrate_tokens
    """Tokens of text for --calibrate."""
    columns: Columns = field(default_factory=dict)
    """Columns that go by another name, as prompt=question,completion=answer."""
    chat_template: str | None = None
    """File of a Jinja chat template to use in the place of the tokenizer's, for the rows."""
    max_length: Annotated[int, at_least(2)] = 1024
    """Longest row, in tokens."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 levels of a 4-bit weight: normal quantiles (nf4) or a tiny float (fp4)."""
    double_quant: bool = True
    """Quantize the block scales too."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of activations; auto picks the faster one on this device by measuring."""
    output_dir: str | None = None
    """Output directory; must not exist."""
    debug: bool = False
    """Show the traceback of an error."""
