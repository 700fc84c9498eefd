"""Save a base in 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora.cli.program import program
from qlora.config.parse import parse_args
from qlora.config.quantize import QuantizeConfig
from qlora.system.errors import InputError
from qlora.system.startup import collection_paused, importing_transformers


def main(argv: Sequence[str]) -> None:
    config = parse_args(QuantizeConfig, program("quantize"), argv)
    if config.model is None or config.output_dir is None:
        raise InputError("--model and --output-dir are required.")
    if Path(config.output_dir).exists():
        raise InputError(f"--output-dir {config.output_dir} exists already; remove it or choose another.")
    if config.calibrate in ("auto", "off"):
        raise InputError(
            f"--calibrate {config.calibrate} is for training; name a file of rows here, or leave it out."
        )
    with collection_paused(), importing_transformers():
        import transformers.modeling_utils  # noqa: F401  (load_base_model needs it)

        from qlora.data.dataset import Encoder
        from qlora.data.row_encoder import set_chat_template
        from qlora.export.quantize import save_quantized
        from qlora.model.tokenizer import load_tokenizer
        from qlora.quant.weight import QuantConfig
        from qlora.system.device import best_device
        from qlora.training.calibration import calibrated

    quant = QuantConfig(config.quant_type, config.double_quant)
    if config.calibrate is not None:
        tokenizer = load_tokenizer(config.model)
        if config.chat_template is not None:
            set_chat_template(tokenizer, config.chat_template)
        encoder = Encoder(tokenizer, config.max_length, columns=config.columns)
        quant = calibrated(
            config.model, quant, config.calibrate, config.calibrate_tokens, [], encoder, config.compute_dtype,
            best_device(),
        )  # fmt: skip
    save_quantized(config.model, quant, config.output_dir)
    print(f"4-bit model saved to {config.output_dir}; train on it with --model {config.output_dir}")
