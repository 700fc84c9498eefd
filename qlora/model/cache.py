"""Where the quantized base is on disk: a bitsandbytes checkpoint that is memory-mapped at the next start."""

from __future__ import annotations

from pathlib import Path

from qlora.model.fingerprint import fingerprint_files
from qlora.model.hf_config import declared_quantization, load_config
from qlora.model.resolve import open_source, resolve_model
from qlora.model.safetensors_source import SafetensorsSource, weight_files
from qlora.model.skeleton import Source
from qlora.quant.weight import QuantConfig
from qlora.system.cache import cache_directory
from qlora.system.digests import is_whole
from qlora.system.errors import InputError


def cached_base(path: Path, quant: QuantConfig) -> Path:
    """Where the quantized form of a model's files is kept."""
    own = [quant.calibration] if quant.calibration else []
    return cache_directory() / f"base-{fingerprint_files(weight_files(path), quant, *own)}"


def open_cache(cached: Path) -> SafetensorsSource:
    """The weights in a directory of the cache that has been verified (`is_whole`, `build_verified`)."""
    return SafetensorsSource(cached, map_files=True, remedy="delete this cache and it is made again")


def find_source(model: str, quant: QuantConfig | None, cache: bool = True) -> Source:
    """A model's weights: the quantized ones in the cache if present, else its own files. Writes nothing.

    Args:
        quant: how the base is quantized; None for a 16-bit one.
    Raises:
        InputError: `quant` names a calibrated base, which is not in the cache.
    """
    path = resolve_model(model)
    is_calibrated = quant is not None and quant.calibration != ""
    cached = cached_base(path, quant) if quant is not None and (cache or is_calibrated) else None
    if cached is not None and is_whole(cached):
        return open_cache(cached)
    source = open_source(path)
    check_calibration(model, source, quant)
    return source


def check_calibration(model: str, source: Source, quant: QuantConfig | None) -> None:
    """Check that a model's own files are the base that `quant` names, if it names a calibrated one.

    Raises:
        InputError: they are not; the calibrated base is missing.
    """
    if quant is None or not quant.calibration:
        return
    stored = declared_quantization(load_config(model), model) if source.packed else None
    if stored is None or stored.calibration != quant.calibration:
        raise InputError(
            f"This needs the base {model} with the calibration {quant.calibration}, which is not in "
            f"{cache_directory()}: repeat --calibrate with the same rows, or pass as --model the directory that "
            "`qlora quantize` made."
        )
